"""Load tests: a stream is whole when its API's own end came, in whatever pieces it arrives."""

from __future__ import annotations

import json

import pytest

from corral.loadtest import answers
from corral.loadtest.answers import BAD_ANSWER, CUT, ERROR_IN_STREAM, OK, SILENT, TRUNCATED, Reader, reader


def native(*contents: str, done: bool = True) -> bytes:
    lines = [{"model": "m", "message": {"role": "assistant", "content": text}, "done": False} for text in contents]
    if done:
        message = {"role": "assistant", "content": ""}
        lines.append({"model": "m", "message": message, "done": True, "prompt_eval_count": 7, "eval_count": 3})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def openai(*contents: str, done: bool = True) -> bytes:
    chunks: list[object] = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in contents]
    chunks.append({"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]})
    chunks.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})
    events = [b"data: " + json.dumps(chunk).encode() for chunk in chunks] + ([b"data: [DONE]"] if done else [])
    return b"".join(event + b"\n\n" for event in events)


def anthropic(*contents: str, done: bool = True) -> bytes:
    events: list[dict[str, object]] = [
        {"type": "message_start", "message": {"usage": {"input_tokens": 2, "output_tokens": 0}, "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    ]
    events += [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}} for text in contents]
    usage = {"input_tokens": 7, "output_tokens": 3}
    events.append({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage})
    events += [{"type": "message_stop"}] if done else []
    return b"".join(b"event: %b\ndata: %b\n\n" % (str(e["type"]).encode(), json.dumps(e).encode()) for e in events)


MAKE = {"native": native, "openai": openai, "anthropic": anthropic}
APIS = list(MAKE)


def read(api: str, data: bytes, size: int = 0, clean: bool = True) -> tuple[Reader, tuple[str, str]]:
    found = reader(api, True)
    pieces = [data[at : at + size] for at in range(0, len(data), size)] if size else [data]
    for number, piece in enumerate(pieces):
        found.feed(piece, float(number))
    return found, found.finish(clean, float(len(pieces)))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("size", [0, 1, 7, 64])
def test_a_whole_stream(api: str, size: int) -> None:
    found, outcome = read(api, MAKE[api]("one", " two", " three"), size)
    assert outcome == (OK, "")
    assert len(found.times) == 3
    assert (found.prompt_tokens, found.output_tokens) == (7, 3)
    assert found.times == sorted(found.times)


@pytest.mark.parametrize("api", APIS)
def test_the_time_of_a_token_is_that_of_its_last_byte(api: str) -> None:
    data = MAKE[api]("one", " two")
    at = data.index(b" two")
    found = reader(api, True)
    found.feed(data[:at], 1.0)
    found.feed(data[at:], 2.0)
    assert found.times == [1.0, 2.0]


@pytest.mark.parametrize("api", APIS)
def test_a_stream_without_its_end_is_truncated_however_it_ends(api: str) -> None:
    data = MAKE[api]("one", " two", done=False)
    assert read(api, data)[1] == (TRUNCATED, SILENT)
    assert read(api, data, clean=False)[1] == (TRUNCATED, CUT)


@pytest.mark.parametrize("api", APIS)
def test_every_cut_is_seen(api: str) -> None:
    data = MAKE[api]("one", " two").rstrip()
    for length in range(len(data)):
        kind = read(api, data[:length], clean=False)[1][0]
        assert kind == TRUNCATED, data[:length]


@pytest.mark.parametrize("api", APIS)
def test_an_end_within_a_broken_http_body_is_no_end(api: str) -> None:
    assert read(api, MAKE[api]("one"), clean=False)[1] == (TRUNCATED, CUT)


@pytest.mark.parametrize(
    ("api", "error", "says"),
    [
        ("native", b'{"error":"the node is gone"}\n', "the node is gone"),
        ("openai", b'data: {"error":{"message":"gone","code":"upstream_error"}}\n\n', "upstream_error: gone"),
        ("anthropic", b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"gone"}}\n\n',
         "api_error: gone"),
    ],
)  # fmt: skip
def test_an_error_in_the_stream(api: str, error: bytes, says: str) -> None:
    found, outcome = read(api, MAKE[api]("one", done=False) + error)
    assert outcome == (ERROR_IN_STREAM, says)
    assert len(found.times) == 1


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("nonsense", [b'\x00{"model": nonsense\n', b"data: {}{\n", b"<html>\n"])
def test_nonsense_is_no_answer(api: str, nonsense: bytes) -> None:
    assert read(api, MAKE[api]("one", done=False) + nonsense)[1][0] == BAD_ANSWER


@pytest.mark.parametrize("api", APIS)
def test_more_after_the_end_is_no_answer(api: str) -> None:
    assert read(api, MAKE[api]("one") + MAKE[api]("two"))[1][0] == BAD_ANSWER


def test_a_line_without_end_is_bounded() -> None:
    found = reader("native", True)
    for _ in range(10):
        found.feed(b"x" * (1 << 20), 0.0)
    assert found.finish(True, 0.0)[0] == BAD_ANSWER


@pytest.mark.parametrize("part", ["thinking", "tool_calls"])
def test_thoughts_and_tool_calls_are_tokens_too(part: str) -> None:
    value = "hm" if part == "thinking" else [{"function": {"name": "f"}}]
    found = reader("native", True)
    found.feed(json.dumps({"message": {"content": "", part: value}}).encode() + b"\n", 1.0)
    assert found.times == [1.0]


# -- answers that are not streamed


@pytest.mark.parametrize(
    ("api", "body", "tokens"),
    [
        ("native", {"done": True, "message": {"content": "x"}, "prompt_eval_count": 4, "eval_count": 2}, (4, 2)),
        ("native", {"embeddings": [[0.1]], "prompt_eval_count": 4}, (4, 0)),
        ("openai", {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 4, "completion_tokens": 2}},
         (4, 2)),
        ("openai", {"data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": 4}}, (4, 0)),
        ("anthropic", {"type": "message", "content": [], "usage": {"input_tokens": 4, "output_tokens": 2}}, (4, 2)),
    ],
)  # fmt: skip
def test_a_whole_object(api: str, body: object, tokens: tuple[int, int]) -> None:
    data = json.dumps(body).encode()
    found = reader(api, False)
    found.feed(data[:9], 0.0)
    found.feed(data[9:], 1.0)
    assert found.finish(True, 1.0) == (OK, "")
    assert (found.prompt_tokens, found.output_tokens) == tokens
    cut = reader(api, False)
    cut.feed(data[:9], 0.0)
    assert cut.finish(False, 1.0) == (TRUNCATED, CUT)


@pytest.mark.parametrize("api", APIS)
def test_an_object_that_is_no_answer(api: str) -> None:
    found = reader(api, False)
    found.feed(b"{}", 0.0)
    assert found.finish(True, 1.0)[0] == TRUNCATED
    broken = reader(api, False)
    broken.feed(b"<html>", 0.0)
    assert broken.finish(True, 1.0)[0] == BAD_ANSWER


# -- refusals


@pytest.mark.parametrize(
    ("status", "body", "kind", "reason"),
    [
        (429, b'{"error":"rate limit reached: 60 requests per minute; retry in 12 s"}', "rate_limited",
         "rate limit reached: N requests per minute; retry in N s"),
        (503, b'{"error":{"code":"overloaded","message":"no node"}}', "unavailable", "overloaded: no node"),
        (404, b'{"error":"model not found"}', "http_error", "status 404: model not found"),
        (502, b"<html>bad gateway</html>", "http_error", "status 502: <html>bad gateway</html>"),
        (302, b"", "redirect", "status 302"),
        (500, b"", "http_error", "status 500: no reason given"),
        (500, b'{"error":"' + b"x" * 5000 + b'"}', "http_error", "status 500: " + "x" * 160),
    ],
)  # fmt: skip
def test_a_refusal_has_its_kind_and_reason(status: int, body: bytes, kind: str, reason: str) -> None:
    assert answers.refusal(status, body) == (kind, reason)
