"""Bodies in and answers out, without any I/O: whatever the cuts, the bytes and the nonsense."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.wire.answers import OBJECT_MAX, Pass, Whole
from corral.wire.common import Responder
from corral.wire.continuation import Counting, Rendering
from corral.wire.decode import DECODERS, Decoded
from corral.wire.errors import ApiError, UpstreamNonsense, upstream_message
from corral.wire.options import ModelPolicy

ROUTES = ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages"]
EMPTY = '"message":{"role":"assistant","content":""}'
TEXTS = st.lists(st.text(max_size=8) | st.just(EMPTY) | st.just('"done":true') | st.just("\n"), max_size=6)


def decode(route: str, body: Any, policy: ModelPolicy | None = None) -> Decoded:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return DECODERS[route](raw, "r1", lambda model: policy)


def body_for(route: str, **more: Any) -> dict[str, Any]:
    """A small right body."""
    body: dict[str, Any] = {"model": "m", "max_tokens": 5} if route == "/v1/messages" else {"model": "m"}
    if "chat" in route or "messages" in route:
        return body | {"messages": [{"role": "user", "content": "hello"}]} | more
    return body | {"prompt": "hello"} | more


def chat_lines(texts: list[str], **last: Any) -> list[dict[str, Any]]:
    """What a node sends for a chat."""
    common = {"model": "m", "created_at": "2026-01-01T00:00:00Z"}
    lines: list[dict[str, Any]] = [
        common | {"message": {"role": "assistant", "content": text}, "done": False} for text in texts
    ]
    end = {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": len(texts), "later_field": [1]}
    return [*lines, common | {"message": {"role": "assistant", "content": ""}} | end | last]


def encoded(lines: list[dict[str, Any]]) -> bytes:
    """Lines as Ollama writes them: no spaces, letters beyond ASCII as they are."""
    return b"".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n" for line in lines)


def fed(responder: Any, data: bytes, cuts: list[int]) -> bytes:
    """What comes out when the data arrives cut at some places."""
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return b"".join(responder.feed(data[a:b]) for a, b in pairwise(edges)) + responder.finish()


@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=8))
def test_a_whole_answer_is_the_last_line_with_all_the_text(texts: list[str], cuts: list[int]) -> None:
    lines = chat_lines(texts)
    responder = Whole("message")
    value = json.loads(fed(responder, encoded(lines), cuts))
    assert value == lines[-1] | {"message": {"role": "assistant", "content": "".join(texts)}}
    assert list(value) == list(lines[-1]), "the fields stand in Ollama's order"
    assert (responder.done, responder.prompt_tokens, responder.tokens) == (True, 3, len(texts))


@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=8))
def test_a_whole_completion_too(texts: list[str], cuts: list[int]) -> None:
    lines = [{"model": "m", "response": text, "done": False} for text in texts]
    lines.append({"model": "m", "response": "", "done": True, "context": [1, 2], "eval_count": 1})
    value = json.loads(fed(Whole("response"), encoded(lines), cuts))
    assert value == lines[-1] | {"response": "".join(texts)}


def test_thinking_tools_and_logprobs_are_put_together() -> None:
    first, second, last = chat_lines(["", "b"])
    first["message"] |= {"thinking": "hm"}
    second["message"] |= {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    second["logprobs"] = [{"token": "b", "logprob": -1.0}]
    value = json.loads(fed(Whole("message"), encoded([first, second, last]), []))
    assert value["message"] == {"role": "assistant", "content": "b", "thinking": "hm"} | {
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}]
    }
    assert value["logprobs"] == [{"token": "b", "logprob": -1.0}]


def test_what_stands_beside_the_text_is_not_copied_with_each_line() -> None:
    # Or a few MB of such lines keep a gateway from all else for minutes.
    line = encoded([{"model": "m", "message": {"role": "assistant", "thinking": "a"}, "logprobs": [1], "done": False}])
    responder, other = Whole("message"), Whole("message")
    responder.feed(line)
    kept = responder._thinking, responder._logprobs
    responder.feed(line * 2)
    assert responder._thinking is kept[0] and responder._logprobs is kept[1]
    assert (kept, other._thinking, other._logprobs) == ((["a"] * 3, [1] * 3), [], [])


@pytest.mark.parametrize("what", ["message", "response"])
def test_an_answer_without_end_is_not_kept_for_ever(what: str) -> None:
    responder = Whole(what)
    line = encoded([{"model": "m", "message": {"role": "assistant", "content": "a"}, "response": "a", "done": False}])
    responder._size = OBJECT_MAX - len(line)
    responder.feed(line)
    with pytest.raises(UpstreamNonsense):
        responder.feed(line)


@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=8))
def test_a_streamed_answer_goes_through_as_it_is(texts: list[str], cuts: list[int]) -> None:
    data = encoded(chat_lines(texts))
    responder = Pass()
    assert fed(responder, data, cuts) == data
    assert responder.done and responder.tokens == len(texts)


@pytest.mark.parametrize("make", [lambda: Whole("message"), Pass])
@pytest.mark.parametrize(
    "data",
    [
        b"no json\n",
        b"[]\n",
        b"\xff\xfe\n",
        encoded(chat_lines([])) + encoded(chat_lines([])),
        b'{"model":"m","created_at":"x"' + b" " * (1 << 20) + b"x",
        b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false,"lo\n',
    ],
)
def test_nonsense_is_told_apart(make: Any, data: bytes) -> None:
    with pytest.raises(UpstreamNonsense):
        make().feed(data)


@pytest.mark.parametrize("make", [lambda: Whole("message"), lambda: Whole("response"), Pass])
def test_an_error_in_band_is_no_token(make: Any) -> None:
    responder = make()
    assert responder.feed(b'{"error":"the runner died"}\n') == b""
    assert responder.error is not None and responder.error.message == "the runner died"
    assert not responder.done


def bulk(route: str) -> tuple[Decoded, list[dict[str, Any]]]:
    """130 inputs, and the bodies that nodes are sent for them, each answered but the last."""
    asked = decode(route, {"model": "m", "input": [str(number) for number in range(130)]})
    sent = [json.loads(asked.body)]
    while asked.more:
        numbers = ",".join(f"[{text},1e-05]" for text in sent[-1]["input"])
        asked.responder.feed(b'{"model":"m","embeddings":[%b],"prompt_eval_count":7}' % numbers.encode())
        asked.go_on()
        sent.append(json.loads(asked.body))
    return asked, sent


@pytest.mark.parametrize("route", ["/api/embed", "/v1/embeddings"])
def test_of_a_bulk_of_embeddings_each_batch_is_guessed_by_itself(route: str) -> None:
    asked = decode(route, {"model": "m", "input": ["a"] * 64 + ["river " * 500] * 64})
    short = asked.reads
    asked.responder.feed(b'{"model":"m","embeddings":[[1]],"prompt_eval_count":7}')
    asked.go_on()
    assert short < 100 < 64 * 500 < asked.reads < asked.estimate
    one = decode("/api/chat", {"model": "m", "messages": [{"role": "user", "content": "a b c d"}]})
    assert one.reads == one.estimate


@pytest.mark.parametrize("route", ["/api/embed", "/v1/embeddings"])
def test_a_bulk_of_embeddings_is_asked_in_batches_and_answered_as_one(route: str) -> None:
    asked, sent = bulk(route)
    assert [len(body["input"]) for body in sent] == [64, 64, 2]
    asked.responder.feed(b'{"model":"m","embeddings":[[7,7]')
    asked.responder.drop()  # that node died
    whole = json.loads(everything(asked, b'{"model":"m","embeddings":[[128,1],[129,1]],"prompt_eval_count":2}'))
    vectors = [one["embedding"] for one in whole["data"]] if "data" in whole else whole["embeddings"]
    assert [vector[0] for vector in vectors] == list(range(130)) and vectors[5][1] == 1e-05
    assert (whole["usage"]["prompt_tokens"] if "data" in whole else whole["prompt_eval_count"]) == 16
    assert asked.responder.prompt_tokens == 16


@pytest.mark.parametrize("last", [b"{}", b'{"embeddings":5}', b'{"embeddings":[[1]],', b"[]", b'{"embeddings":null}'])
@pytest.mark.parametrize("route", ["/api/embed", "/v1/embeddings"])
def test_a_batch_without_embeddings_is_nonsense(route: str, last: bytes) -> None:
    asked, _ = bulk(route)
    with pytest.raises(UpstreamNonsense):
        everything(asked, last)


@pytest.mark.parametrize("last", [b"no json", b'{"model":"\xff","embeddings":[[1]]}', b'{"a":[1,2,}', b"[" * 3000])
@pytest.mark.parametrize("route", ["/api/embed", "/api/embeddings", "/v1/embeddings"])
def test_an_answer_that_is_no_object_is_nonsense(route: str, last: bytes) -> None:
    asked = decode(route, {"model": "m", "prompt" if route == "/api/embeddings" else "input": "a"})
    asked.responder.feed(last)
    with pytest.raises(UpstreamNonsense):
        asked.responder.finish()


def embeds(route: str) -> Responder:
    return decode(route, {"model": "m", "input": "a"}).responder


@pytest.mark.parametrize("filler", [b"[]", b"{}"])
@pytest.mark.parametrize("field", [b"embeddings", b"prompt_eval_count", b"_debug_info"])
@pytest.mark.parametrize(
    "make", [lambda: embeds("/api/embed"), lambda: embeds("/v1/embeddings"), lambda: Rendering(0), lambda: Counting(0)]
)
def test_an_answer_of_arrays_alone_takes_not_many_times_its_size(make: Any, field: bytes, filler: bytes) -> None:
    responder = make()
    body = b'{"model":"m","%b":[' % field + (filler + b",") * 300_000 + filler + b"]}"
    responder.feed(body)
    tracemalloc.start()
    try:
        with suppress(UpstreamNonsense):
            responder.finish()
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", ["http://evil", None, {"a": 1}, 3])
@pytest.mark.parametrize("name", ["api_base", "base_url", "host", "url", "upstream", "node", "callback_url"])
def test_a_field_that_could_name_an_upstream_is_refused_by_name(route: str, value: Any, name: str) -> None:
    with pytest.raises(ApiError, match=f"`{name}` is not accepted") as refused:
        decode(route, body_for(route) | {name: value})
    assert (refused.value.status, refused.value.param) == (400, name)


@pytest.mark.parametrize("route", ROUTES)
def test_what_goes_upstream_follows_the_policy(route: str) -> None:
    policy = ModelPolicy(num_ctx=4096, pinned={"num_gpu": 99})
    more = {"options": {"num_ctx": 1, "num_gpu": 0}, "keep_alive": 0, "truncate": True} if "api" in route else {}
    sent = json.loads(decode(route, body_for(route, stream=False, **more), policy).body)
    assert (sent["stream"], sent["keep_alive"], sent["truncate"]) == (True, -1, False)
    assert (sent["options"]["num_ctx"], sent["options"]["num_gpu"]) == (4096, 99)


DEEP: Any = None
for _ in range(100):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("route", "more"),
    [
        ("/api/chat", {"tools": DEEP}),
        ("/api/chat", {"format": {"a": DEEP}}),
        ("/api/generate", {"format": {"a": DEEP}}),
        ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": DEEP}]}),
        ("/v1/chat/completions", {"tools": DEEP}),
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": DEEP}}}}),
        ("/v1/messages", {"tools": [{"name": "t", "input_schema": {"a": DEEP}}]}),
    ],
)
def test_what_is_nested_too_deep_is_refused(route: str, more: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="nested"):
        decode(route, body_for(route) | more)


@pytest.mark.parametrize("depth", [65, 1500, 100_000])
def test_arguments_as_text_are_held_to_the_same_depth(depth: int) -> None:
    call = {"function": {"name": "f", "arguments": '{"a":' + "[" * depth + "]" * depth + "}"}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(ApiError, match=r"nested|arrays and objects"):
        decode("/v1/chat/completions", body_for("/v1/chat/completions", messages=messages))


def test_brackets_in_text_are_no_nesting() -> None:
    text = '[{"\\' * 5000
    decode("/api/chat", body_for("/api/chat", format="json", messages=[{"role": "user", "content": text}]))


def test_a_body_of_brackets_is_refused() -> None:
    body = b'{"model":"m","format":{"a":[' + b"[]," * 1_000_000 + b"[]]}}"
    with pytest.raises(ApiError, match="arrays and objects"):
        decode("/api/chat", body)


def test_an_image_counts_as_an_image_and_not_as_text() -> None:
    picture = "A" * 1_000_000
    message = {"role": "user", "content": "what is it?", "images": [picture]}
    assert decode("/api/chat", {"model": "m", "messages": [message]}).estimate < 1000
    assert decode("/api/generate", {"model": "m", "prompt": "what is it?", "images": [picture]}).estimate < 1000
    assert 200 < decode("/api/generate", {"model": "m", "prompt": "abcd" * 200}).estimate < 300


def everything(make: Any, data: bytes) -> bytes:
    """What a node's whole answer becomes."""
    responder = make.responder
    out: bytes = responder.feed(data)
    return out + responder.finish()


TOOL_CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(
    "message",
    [
        {"content": "", "tool_calls": [TOOL_CALL | {"id": 5}]},
        {"content": "", "tool_calls": [{"function": {"name": 6, "arguments": {}}}]},
        {"content": "", "tool_calls": ["f"]},
        {"content": 5},
        {"content": "", "thinking": 5},
    ],
)
def test_a_message_of_the_wrong_types_is_nonsense(route: str, stream: bool, message: dict[str, Any]) -> None:
    data = encoded(chat_lines(["a"], message={"role": "assistant"} | message))
    with pytest.raises(UpstreamNonsense):
        everything(decode(route, body_for(route, stream=stream)), data)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_a_null_in_a_message_is_an_empty_text(route: str, stream: bool) -> None:
    call = {"id": None, "function": {"name": None, "arguments": None}}
    message = {"role": None, "content": None, "thinking": None, "tool_calls": [call]}
    out = everything(decode(route, body_for(route, stream=stream)), encoded(chat_lines(["a"], message=message)))
    assert b'"a"' in out
    if not stream and route != "/v1/messages":
        value = json.loads(out)
        assert (value.get("message") or value["choices"][0]["message"])["role"] == "assistant"


@pytest.mark.parametrize("route", ["/api/chat", "/v1/chat/completions"])
def test_a_role_that_is_no_text_is_nonsense(route: str) -> None:
    message = {"role": 5, "content": "", "tool_calls": [TOOL_CALL]}
    with pytest.raises(UpstreamNonsense):
        everything(decode(route, body_for(route, stream=False)), encoded(chat_lines(["a"], message=message)))


@pytest.mark.parametrize("vector", ["[1e39]", "[" + "9" * 400 + "]", '["a"]', "5", '{"a":1}', "null"])
def test_an_embedding_of_no_floats_is_nonsense(vector: str) -> None:
    asked = decode("/v1/embeddings", {"model": "m", "input": "x", "encoding_format": "base64"})
    with pytest.raises(UpstreamNonsense):
        everything(asked, b'{"embeddings":[%b]}' % vector.encode())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tokens", [10**30, 2**63, -1, True, "3", None, 1.5])
def test_a_count_that_no_node_can_have_counts_as_none(route: str, tokens: Any) -> None:
    made = decode(route, body_for(route, stream=False))
    everything(made, encoded(chat_lines(["a"], response="", eval_count=tokens, prompt_eval_count=tokens)))
    assert (made.responder.tokens, made.responder.prompt_tokens) == (0, 0)


def test_the_text_of_an_error_that_is_nested_too_deep() -> None:
    assert upstream_message(b"[" * 60_000).startswith("[[")


@pytest.mark.parametrize("done", ['"done": true', '"done" : true', '"done":\ttrue'])
@pytest.mark.parametrize("apart", [True, False])
def test_the_last_line_of_a_stream_may_have_spaces(done: str, apart: bool) -> None:
    data = encoded(chat_lines(["a", "b"])).replace(b'"done":true', done.encode())
    responder = Pass()
    pieces = data.splitlines(keepends=True) if apart else [data]
    assert b"".join(map(responder.feed, pieces)) == data
    assert (responder.done, responder.tokens, responder.prompt_tokens) == (True, 2, 3)


def test_lines_with_spaces_throughout_are_counted_alike() -> None:
    data = b"".join(json.dumps(line).encode() + b"\n" for line in chat_lines(["a", "b"]))
    responder = Pass()
    assert fed(responder, data, [10, 50, 150]) == data
    assert (responder.done, responder.tokens) == (True, 2)


def test_an_error_in_band_is_one_wherever_it_stands_in_its_line() -> None:
    responder = Pass()
    assert responder.feed(b'{"model":"m","error":"died","done":false}\n') == b""
    assert responder.error is not None and responder.error.message == "died"


def test_blank_lines_after_the_last_one_are_nothing() -> None:
    responder = Pass()
    responder.feed(encoded(chat_lines(["a"])))
    assert responder.feed(b"\n") == b""
    with pytest.raises(UpstreamNonsense):
        responder.feed(encoded(chat_lines(["b"])))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
def test_two_objects_in_a_line_are_nonsense(route: str, stream: bool) -> None:
    lines = [line | {"response": "x"} for line in chat_lines(["a"])]
    data = encoded(lines)
    together = data.replace(b"\n", b"", 1)
    with pytest.raises(UpstreamNonsense):
        everything(decode(route, body_for(route, stream=stream)), together)
    with pytest.raises(UpstreamNonsense):
        everything(decode(route, body_for(route, stream=stream)), data.replace(b',"done":true', b',\n"done":true'))
