"""Answers with thinking and tool calls in the forms of OpenAI and Anthropic, streamed and whole: what Ollama 0.17.4
(openai/openai.go, anthropic/anthropic.go) makes of the same lines, but for what is told as a difference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from corral.wire.decode import DECODERS
from corral.wire.openai import short_id

JSON = dict[str, Any]


def call(identity: str, index: int, name: str, arguments: JSON) -> JSON:
    """As Ollama's native API has it."""
    return {"id": identity, "function": {"index": index, "name": name, "arguments": arguments}}


def called(identity: str, index: int, name: str, arguments: str) -> JSON:
    """As OpenAI's has it."""
    return {"id": identity, "index": index, "type": "function", "function": {"name": name, "arguments": arguments}}


def used(identity: str, name: str, given: JSON) -> JSON:
    """As Anthropic's has it."""
    return {"type": "tool_use", "id": identity, "name": name, "input": given}


WEATHER = call("call_a", 0, "weather", {"city": "Zürich", "days": [1, 2], "in": {"unit": "C"}})
TIME = call("call_b", 1, "time", {})
WEATHER_CALLED = called("call_a", 0, "weather", '{"city":"Zürich","days":[1,2],"in":{"unit":"C"}}')
TIME_CALLED = called("call_b", 1, "time", "{}")
WEATHER_USED = used("call_a", "weather", {"city": "Zürich", "days": [1, 2], "in": {"unit": "C"}})
TIME_USED = used("call_b", "time", {})
WEATHER_GIVEN = {"type": "input_json_delta", "partial_json": '{"city":"Zürich","days":[1,2],"in":{"unit":"C"}}'}
TIME_GIVEN = {"type": "input_json_delta", "partial_json": "{}"}


def thinks(text: str) -> JSON:
    return {"type": "thinking_delta", "thinking": text}


def says(text: str) -> JSON:
    return {"type": "text_delta", "text": text}


THINKING = {"type": "thinking", "thinking": ""}
TEXT = {"type": "text", "text": ""}


@dataclass(frozen=True)
class Case:
    """The messages of a node's lines, the last one's among them, and what becomes of them.

    ``deltas`` are OpenAI's, one a line; ``message`` its whole one, without the role; ``blocks`` Anthropic's, each with
    what starts it and its deltas; ``content`` that of its whole message.
    """

    messages: list[JSON]
    deltas: list[JSON]
    message: JSON
    blocks: list[tuple[JSON, list[JSON]]]
    content: list[JSON] | None
    reason: str = "stop"
    openai: str = "tool_calls"
    anthropic: str = "tool_use"


CASES = {
    "thinking, text and two calls": Case(
        [
            {"content": "", "thinking": "They "},
            {"content": "", "thinking": "ask."},
            {"content": "I "},
            {"content": "look."},
            {"content": "", "tool_calls": [WEATHER]},
            {"content": "", "tool_calls": [TIME]},
            {"content": ""},
        ],
        [
            {"content": "", "reasoning": "They "},
            {"content": "", "reasoning": "ask."},
            {"content": "I "},
            {"content": "look."},
            {"content": "", "tool_calls": [WEATHER_CALLED]},
            {"content": "", "tool_calls": [TIME_CALLED]},
            {"content": ""},
        ],
        {"content": "I look.", "reasoning": "They ask.", "tool_calls": [WEATHER_CALLED, TIME_CALLED]},
        [
            (THINKING, [thinks("They "), thinks("ask.")]),
            (TEXT, [says("I "), says("look.")]),
            (used("call_a", "weather", {}), [WEATHER_GIVEN]),
            (used("call_b", "time", {}), [TIME_GIVEN]),
        ],
        [
            {"type": "thinking", "thinking": "They ask."},
            {"type": "text", "text": "I look."},
            WEATHER_USED,
            TIME_USED,
        ],
    ),
    "all of it in the last line": Case(
        [{"content": "So:", "thinking": "Hm.", "tool_calls": [WEATHER, TIME]}],
        [{"content": "So:", "reasoning": "Hm.", "tool_calls": [WEATHER_CALLED, TIME_CALLED]}],
        {"content": "So:", "reasoning": "Hm.", "tool_calls": [WEATHER_CALLED, TIME_CALLED]},
        [
            (THINKING, [thinks("Hm.")]),
            (TEXT, [says("So:")]),
            (used("call_a", "weather", {}), [WEATHER_GIVEN]),
            (used("call_b", "time", {}), [TIME_GIVEN]),
        ],
        [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So:"}, WEATHER_USED, TIME_USED],
    ),
    "a call alone": Case(
        [{"content": "", "tool_calls": [TIME]}, {"content": ""}],
        [{"content": "", "tool_calls": [TIME_CALLED]}, {"content": ""}],
        {"content": "", "tool_calls": [TIME_CALLED]},
        [(used("call_b", "time", {}), [TIME_GIVEN])],
        [TIME_USED],
    ),
    "text before and behind a call": Case(
        [{"content": "a"}, {"content": "b", "tool_calls": [WEATHER]}, {"content": "c"}, {"content": ""}],
        [{"content": "a"}, {"content": "b", "tool_calls": [WEATHER_CALLED]}, {"content": "c"}, {"content": ""}],
        {"content": "abc", "tool_calls": [WEATHER_CALLED]},
        [
            (TEXT, [says("a"), says("b")]),
            (used("call_a", "weather", {}), [WEATHER_GIVEN]),
            (TEXT, [says("c")]),
        ],
        [{"type": "text", "text": "abc"}, WEATHER_USED],
    ),
    "thinking and text, cut by the limit": Case(
        [{"content": "", "thinking": "Hm."}, {"content": "Yes"}, {"content": ""}],
        [{"content": "", "reasoning": "Hm."}, {"content": "Yes"}, {"content": ""}],
        {"content": "Yes", "reasoning": "Hm."},
        [(THINKING, [thinks("Hm.")]), (TEXT, [says("Yes")])],
        [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes"}],
        reason="length",
        openai="length",
        anthropic="max_tokens",
    ),
    "thinking alone, cut by the limit": Case(
        [{"content": "", "thinking": "Hm"}, {"content": ""}],
        [{"content": "", "reasoning": "Hm"}, {"content": ""}],
        {"content": "", "reasoning": "Hm"},
        [(THINKING, [thinks("Hm")])],
        [{"type": "thinking", "thinking": "Hm"}],
        reason="length",
        openai="length",
        anthropic="max_tokens",
    ),
    # From here on Ollama's stream of /v1/messages is another (docs/api.md): its StreamConverter does not end thinking
    # before a call, which has the same index, and thinking behind text begins within the text's block.
    "thinking and a call": Case(
        [{"content": "", "thinking": "Hm."}, {"content": "", "tool_calls": [WEATHER]}, {"content": ""}],
        [{"content": "", "reasoning": "Hm."}, {"content": "", "tool_calls": [WEATHER_CALLED]}, {"content": ""}],
        {"content": "", "reasoning": "Hm.", "tool_calls": [WEATHER_CALLED]},
        [(THINKING, [thinks("Hm.")]), (used("call_a", "weather", {}), [WEATHER_GIVEN])],
        [{"type": "thinking", "thinking": "Hm."}, WEATHER_USED],
    ),
    "thinking behind text": Case(
        [{"content": "a"}, {"content": "", "thinking": "Hm."}, {"content": "b"}, {"content": ""}],
        [{"content": "a"}, {"content": "", "reasoning": "Hm."}, {"content": "b"}, {"content": ""}],
        {"content": "ab", "reasoning": "Hm."},
        [(TEXT, [says("a")]), (THINKING, [thinks("Hm.")]), (TEXT, [says("b")])],
        [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "ab"}],
        openai="stop",
        anthropic="end_turn",
    ),
}
IDENTITY = f"chatcmpl-{short_id('r1')}"
CREATED = "2026-01-01T00:00:00.25Z"


def lines(case: Case) -> bytes:
    """What a node sends."""
    common = {"model": "m", "created_at": CREATED}
    made = [common | {"message": {"role": "assistant"} | message, "done": False} for message in case.messages]
    made[-1] |= {"done": True, "done_reason": case.reason, "prompt_eval_count": 7, "eval_count": 5}
    return b"".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n" for line in made)


def answered(route: str, case: Case, step: int, **asked: Any) -> str:
    """What a caller gets of it, where the node's bytes come ``step`` at a time."""
    body: JSON = {"model": "asked", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9} | asked
    responder = DECODERS[route](json.dumps(body).encode(), "r1", lambda model: None).responder  # type: ignore[call-arg]
    data = lines(case)
    out = b"".join(responder.feed(data[at : at + step]) for at in range(0, len(data), step)) + responder.finish()
    assert responder.done and responder.error is None
    assert (responder.prompt_tokens, responder.tokens) == (7, 5)
    return out.decode()


each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
pieces = pytest.mark.parametrize("step", [1, 1 << 20], ids=["bytes", "at once"])


@each
@pieces
def test_openai_whole(case: Case, step: int) -> None:
    assert json.loads(answered("/v1/chat/completions", case, step)) == {
        "id": IDENTITY,
        "object": "chat.completion",
        "created": 1767225600,
        "model": "m",
        "system_fingerprint": "fp_ollama",
        "choices": [{"index": 0, "message": {"role": "assistant"} | case.message, "finish_reason": case.openai}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    }


@each
@pieces
def test_openai_stream(case: Case, step: int) -> None:
    out = answered("/v1/chat/completions", case, step, stream=True, stream_options={"include_usage": True})
    *events, usage, end, nothing = out.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    last = json.loads(usage.removeprefix("data: "))
    for chunk in (*chunks, last):
        assert isinstance(chunk.pop("created"), int)
    common = {
        "id": IDENTITY, "object": "chat.completion.chunk", "model": "m", "system_fingerprint": "fp_ollama",
    }  # fmt: skip
    reasons = [None] * (len(case.deltas) - 1) + [case.openai]
    assert chunks == [
        common | {"choices": [{"index": 0, "delta": {"role": "assistant"} | delta, "finish_reason": reason}]}
        for delta, reason in zip(case.deltas, reasons, strict=True)
    ]
    assert last == common | {
        "choices": [],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    }


@each
@pieces
def test_anthropic_whole(case: Case, step: int) -> None:
    assert json.loads(answered("/v1/messages", case, step)) == {
        "id": "msg_r1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": case.content,
        "stop_reason": case.anthropic,
        "usage": {"input_tokens": 7, "output_tokens": 5},
    }


@each
@pieces
def test_anthropic_stream(case: Case, step: int) -> None:
    *events, nothing = answered("/v1/messages", case, step, stream=True).split("\n\n")
    told = []
    for event in events:
        kind, data = event.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {told[-1]['type']}"
    assert nothing == ""
    expected: list[JSON] = []
    for index, (block, deltas) in enumerate(case.blocks):
        expected.append({"type": "content_block_start", "index": index, "content_block": block})
        expected += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        expected.append({"type": "content_block_stop", "index": index})
    start, *blocks, delta, stop = told
    guessed = 7 if len(case.messages) == 1 else start["message"]["usage"]["input_tokens"]
    assert guessed > 0
    assert start == {
        "type": "message_start",
        "message": {
            "id": "msg_r1",
            "type": "message",
            "role": "assistant",
            "model": "asked",
            "content": [],
            "usage": {"input_tokens": guessed, "output_tokens": 0},
        },
    }
    assert blocks == expected
    assert delta == {
        "type": "message_delta",
        "delta": {"stop_reason": case.anthropic},
        "usage": {"input_tokens": 7, "output_tokens": 5},
    }
    assert stop == {"type": "message_stop"}
