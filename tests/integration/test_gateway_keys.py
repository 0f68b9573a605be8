"""What a key's own limits in place, time and models come to at a gateway, and the kill switch of a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gateway import Gateway, gateway
from support.process import until

from corral.gateway.authenticate import authenticate, build_key
from corral.store import keys
from corral.wire.errors import ApiError

ROUTES = ["/api/chat", "/v1/chat/completions", "/v1/messages"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway")) as made:
        yield made


@pytest.fixture
def gw(running: Gateway) -> Gateway:
    running.forget()
    return running


def asked(gw: Gateway) -> int:
    return sum(len(node.requests) for node in gw.nodes)


def from_address(address: str, url: str, gw: Gateway, key: str, **headers: str) -> httpx.Response:
    """Chat from one of this machine's own addresses."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=60) as client:
        sent = {"Authorization": f"Bearer {key}", **headers}
        return client.post(url + "/api/chat", json=gw.chat(stream=False), headers=sent)


def test_a_key_works_from_its_networks_alone(gw: Gateway) -> None:
    key = gw.new_key(networks=["127.0.0.2/32", "10.0.0.0/8", "2001:db8::/32"])
    assert from_address("127.0.0.2", gw.edge, gw, key).status_code == 200
    refused = from_address("127.0.0.3", gw.edge, gw, key)
    assert refused.status_code == 403
    assert refused.json() == {"error": "the API key may not be used from 127.0.0.3"}
    assert asked(gw) == 1
    # No word of the caller's own counts, at the edge or at a gateway that it reaches past it.
    forged = {"X-Forwarded-For": "127.0.0.2", "X_Forwarded_For": "127.0.0.2", "X-Real-IP": "127.0.0.2"}
    assert from_address("127.0.0.3", gw.edge, gw, key, **forged).status_code == 403
    assert from_address("127.0.0.3", gw.url, gw, key, **forged).status_code == 403
    assert from_address("127.0.0.2", gw.url, gw, key, **{"X-Forwarded-For": "192.0.2.1"}).status_code == 200
    # The edge's word does.
    for address, status in [
        *(("10.1.2.3", 200), ("::ffff:10.1.2.3", 200), ("2001:db8::7", 200), ("10.9.9.9, 11.0.0.1", 403)),
        *(("11.0.0.1, 10.9.9.9", 200), ("11.0.0.1", 403), ("nowhere", 403), ("", 403)),
    ]:
        assert from_address("127.0.0.1", gw.url, gw, key, **{"X-Forwarded-For": address}).status_code == status, address
    for path, kind in (("/v1/chat/completions", "permission_error"), ("/v1/messages", "permission_error")):
        body = gw.post(path, headers={"Authorization": f"Bearer {key}"}).json()
        assert body["error"]["type"] == kind
    assert httpx.get(gw.url + "/api/tags", headers={"Authorization": f"Bearer {key}"}).status_code == 403


def test_networks_change_with_the_snapshot(gw: Gateway) -> None:
    key = gw.new_key(networks=["127.0.0.2"])
    assert from_address("127.0.0.2", gw.edge, gw, key).status_code == 200
    gw._keys[-1]["networks"] = ["127.0.0.3"]
    gw.publish()
    assert from_address("127.0.0.2", gw.edge, gw, key).status_code == 403
    assert from_address("127.0.0.3", gw.edge, gw, key).status_code == 200


def test_both_texts_of_a_rotating_key_work_until_one_ends(gw: Gateway) -> None:
    first = gw.new_key()
    key_id = keys.parse(first)
    assert key_id is not None
    second = keys.secret_for(key_id)
    entry: dict[str, Any] = gw._keys[-1]
    entry["verifiers"] = [keys.verifier(gw.pepper, text) for text in (first, second)]
    gw.publish()

    def statuses() -> list[int]:
        return [gw.post(headers={"Authorization": f"Bearer {text}"}).status_code for text in (first, second)]

    assert statuses() == [200, 200]
    entry["verifiers"] = entry["verifiers"][1:]
    gw.publish()
    assert statuses() == [401, 200]


def test_an_old_text_ends_with_its_overlap_though_control_says_nothing(gw: Gateway) -> None:
    first = gw.new_key()
    second = keys.secret_for(str(keys.parse(first)))
    entry: dict[str, Any] = gw._keys[-1]
    old, new = (keys.verifier(gw.pepper, text) for text in (first, second))
    entry |= {"verifiers": [old, new], "ends": {old: time.time() + 3600}}
    gw.publish()

    def statuses() -> list[int]:
        texts = [{"Authorization": f"Bearer {text}"} for text in (first, second)]
        return [httpx.get(gw.url + "/api/tags", headers=headers).status_code for headers in texts]

    assert statuses() == [200, 200]
    entry["ends"] = {old: time.time() + 1}
    gw.publish()
    until(lambda: statuses() == [401, 200], "the old one has ended")


def test_a_text_that_ends_is_remembered_by_nobody() -> None:
    pepper = b"p" * 32
    key_id, first = keys.generate()
    second = keys.secret_for(key_id)
    verifiers = [keys.verifier(pepper, text) for text in (first, second)]
    entry = {"id": key_id, "verifiers": verifiers, "ends": {verifiers[0]: 100.0}}
    known, verified = {key_id: build_key(entry, {})}, {}  # type: ignore[var-annotated]

    def ask(text: str, wall: float) -> None:
        authenticate({b"authorization": f"Bearer {text}".encode()}, known, pepper, wall, verified)

    for text in (first, second):
        ask(text, 99.0)
    assert list(verified) == [f"Bearer {second}".encode()]
    ask(second, 100.0)
    with pytest.raises(ApiError, match="unknown"):
        ask(first, 100.0)
    # A snapshot of before has verifiers without an end.
    known[key_id], old = build_key({"id": key_id, "verifiers": verifiers}, {}), {}  # type: ignore[var-annotated]
    assert authenticate({b"x-api-key": first.encode()}, known, pepper, 100.0, old).id == key_id


def test_a_key_ends_when_it_expires() -> None:
    pepper = b"p" * 32
    key_id, text = keys.generate()
    entry = {"id": key_id, "verifiers": [keys.verifier(pepper, text)], "expires": 100.0}
    known, verified = {key_id: build_key(entry, {})}, {}  # type: ignore[var-annotated]
    headers = {b"authorization": f"Bearer {text}".encode()}
    authenticate(headers, known, pepper, 99.0, verified)
    for remembered in (verified, {}):
        with pytest.raises(ApiError, match="expired"):
            authenticate(headers, known, pepper, 100.0, remembered)


def disable(gw: Gateway, *names: str) -> None:
    gw.control.publish(disabled=list(names))
    gw.control.until_known()


@pytest.mark.parametrize("path", ROUTES)
def test_a_disabled_model_is_refused_by_name_and_no_node_hears_of_it(gw: Gateway, path: str) -> None:
    disable(gw, "m:latest", "other:latest")
    try:
        for model in ("m", "m:latest"):
            answer = gw.post(path, gw.chat(model=model, stream=False, max_tokens=5))
            assert answer.status_code == 403
            error = answer.json()["error"]
            text = error if isinstance(error, str) else error["message"]
            assert text == f"model '{model}' is disabled by its operator"
            if path.startswith("/v1/chat"):
                assert (error["code"], error["type"], error["param"]) == ("model_disabled", "permission_error", "model")
        assert httpx.get(gw.url + "/api/tags", headers=gw.auth).json() == {"models": []}
        assert httpx.get(gw.url + "/v1/models/m", headers=gw.auth).status_code == 403
        # Who may not use it is not told that it is there.
        other = {"Authorization": f"Bearer {gw.new_key(models=['x*'])}"}
        assert gw.post(path, gw.chat(stream=False, max_tokens=5), headers=other).status_code == 404
        assert httpx.get(gw.url + "/v1/models/m", headers=other).status_code == 404
        upper = httpx.get(gw.url + "/v1/models/M", headers=gw.auth)
        assert (upper.status_code, "did you mean" in upper.text) == (404, False), "it is not there for anybody"
        assert asked(gw) == 0
    finally:
        disable(gw)
    assert "model 'M' not found; did you mean 'm'?" in httpx.get(gw.url + "/v1/models/M", headers=gw.auth).text
    assert gw.post(path, gw.chat(stream=False, max_tokens=5)).status_code == 200
    assert httpx.get(gw.url + "/v1/models/m", headers=gw.auth).status_code == 200


near = st.builds(
    lambda text, at, new: text[:at] + new + text[at + 1 :],
    st.sampled_from([keys.generate()[1] for _ in range(3)]),
    st.integers(0, 60),
    st.text(max_size=3),
)


class Looked(dict[str, Any]):
    """Keys by id that remembers which ids it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.append(key)
        return default


@given(text=st.text(max_size=80) | near | st.sampled_from(["' OR 1=1 --", "crl_'||(select 1)||'_x", "crl_*_*", ""]))
def test_nothing_is_looked_up_before_shape_and_checksum(text: str) -> None:
    known, value = Looked(), text.encode("utf-8", "surrogatepass")
    for headers in ({b"authorization": b"Bearer " + value}, {b"x-api-key": value}):
        with pytest.raises(ApiError) as refused:
            authenticate(headers, known, b"p" * 32, 0.0, {})
        assert refused.value.status == 401
    assert all(keys.parse(value.strip().decode("latin-1")) == key_id for key_id in known.asked)


def test_a_mistyped_key_is_not_looked_up() -> None:
    """Each character behind the id, made another of those that may stand there: the checksum tells."""
    text = keys.generate()[1]
    for at in range(text.index("_", 4) + 1, len(text)):
        known, wrong = Looked(), text[:at] + ("a" if text[at] != "a" else "b") + text[at + 1 :]
        with pytest.raises(ApiError, match="malformed"):
            authenticate({b"x-api-key": wrong.encode()}, known, b"p" * 32, 0.0, {})
        assert known.asked == []
