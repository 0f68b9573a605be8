"""The allow-list: what exists, and that nothing else does."""

from __future__ import annotations

import pytest

from corral.gateway.route import Kind, api_of, model_of, resolve
from corral.wire.errors import ApiError


@pytest.mark.parametrize(
    ("method", "target", "api"),
    [
        (b"POST", b"/api/chat", "native"),
        (b"GET", b"/api/tags", "native"),
        (b"POST", b"/v1/chat/completions", "openai"),
        (b"GET", b"/v1/models", "openai"),
        (b"GET", b"/v1/models/library/llama3.2:3b", "openai"),
        (b"POST", b"/v1/messages", "anthropic"),
    ],
)
def test_a_route_is_found(method: bytes, target: bytes, api: str) -> None:
    assert resolve(method, target).api == api


@pytest.mark.parametrize(
    "target",
    [
        b"//api/chat",
        b"/api//chat",
        b"/api/chat/",
        b"/API/chat",
        b"/api/ch%61t",
        b"/api/chat?x=1",
        b"/api/chat#a",
        b"/api/./chat",
        b"/api/x/../chat",
        b"/api/pull",
        b"/api/push",
        b"/api/create",
        b"/api/copy",
        b"/api/delete",
        b"/api/blobs/sha256:00",
        b"/",
        b"*",
        b"http://node/api/chat",
        b"/metrics",
        b"/internal/snapshot",
        b"/admin/keys",
        b"/v1/models/",
        b"/v1/models/../api",
        b"/v1/models/a//b",
        b"/v1/models/a%2eb",
        b"/api/chat\xff",
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE", b"PUT", b"HEAD", b"OPTIONS", b"TRACE", b"CONNECT"])
def test_nothing_else_is(method: bytes, target: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        resolve(method, target)
    assert caught.value.status == 404


def test_a_wrong_method_is_not_found() -> None:
    for method, target in [(b"GET", b"/api/chat"), (b"POST", b"/api/tags"), (b"DELETE", b"/v1/models/a")]:
        with pytest.raises(ApiError) as caught:
            resolve(method, target)
        assert caught.value.status == 404


@pytest.mark.parametrize("target", [b"/v1/responses", b"/v1/messages/count_tokens"])
def test_what_comes_later_is_a_501(target: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        resolve(b"POST", target)
    assert caught.value.status == 501


def test_health_needs_no_key() -> None:
    assert resolve(b"GET", b"/health").kind is Kind.HEALTH


def test_the_shape_of_an_error_follows_the_path() -> None:
    assert [api_of(t) for t in (b"/x", b"/v1/x", b"/v1/messages/x")] == ["native", "openai", "anthropic"]


def test_the_model_of_a_target() -> None:
    assert model_of(b"/v1/models/a/b:c") == "a/b:c"
    assert model_of(b"/v1/models/a b") == ""


def test_the_query_of_anthropics_clients_is_the_only_one() -> None:
    assert resolve(b"POST", b"/v1/messages?beta=true").path == "/v1/messages"
    for target in (b"/v1/messages?beta=false", b"/v1/messages?beta=true&x=1", b"/v1/messages?", b"/api/chat?beta=true"):
        with pytest.raises(ApiError, match=r"no route POST /.*: it takes no query") as caught:
            resolve(b"POST", target)
        assert caught.value.status == 404
    with pytest.raises(ApiError):
        resolve(b"GET", b"/v1/messages?beta=true")


@pytest.mark.parametrize("target", [b"/api/chat?key=crl_abc", b"/api/crl_abc", b"/v1/models/crl_abc", b"/x?token=abc"])
def test_a_key_in_a_path_is_not_repeated(target: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        resolve(b"GET", target)
    assert caught.value.status == 404 and "abc" not in caught.value.message


@pytest.mark.parametrize(
    ("method", "target", "said"),
    [
        (b"POST", b"/chat/completions", "no route POST /chat/completions: did you mean /v1/chat/completions? "),
        (b"GET", b"/models", "no route GET /models: did you mean /v1/models? "),
        (b"GET", b"/api/chat", "no route GET /api/chat: it takes POST"),
        (b"GET", b"/", "no route GET /: /docs has those that there are"),
        (b"POST", b"/api/pull", "no route POST /api/pull: models are the operator's: `corral models pull`"),
        (b"DELETE", b"/api/delete", "no route DELETE /api/delete: models are the operator's: `corral models remove`"),
        (b"POST", b"/api/nothing", "no route POST /api/nothing"),
    ],
)
def test_what_was_meant_is_said(method: bytes, target: bytes, said: str) -> None:
    with pytest.raises(ApiError) as refused:
        resolve(method, target)
    assert refused.value.message.startswith(said) and (said.endswith(" ") or refused.value.message == said)
