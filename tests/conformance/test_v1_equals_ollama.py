"""The gateway's translation of /v1 and /v1/messages, field by field against the same Ollama's own.

Both answers come from one model with greedy sampling, so every value must be equal, the text and the cut of the stream
too; only what names the one answer (ids, times) is compared by form.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Callable
from typing import Any

import pytest
from conformance.cases import MODEL, SCHEMA, TOOL
from conformance.differences import ERROR_WORDS, V1_BETTER, V1_FIELDS, V1_STATUS, V1_WORDS, content_type
from conformance.exchange import Answer, Target, about, send

CHAT, COMPLETION, EMBEDDINGS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"
HI = [{"role": "user", "content": "Say hi."}]
GREEDY = {"temperature": 0, "seed": 0, "max_tokens": 6}
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
USAGE = {"stream_options": {"include_usage": True}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


def _text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {}),
    "chat-stream": (CHAT, {"stream": True}),
    "chat-stream-usage": (CHAT, {"stream": True, **USAGE}),
    "chat-system": (CHAT, {"messages": [{"role": "system", "content": "You are a cat."}, *HI]}),
    "chat-turns": (CHAT, {"messages": [*HI, {"role": "assistant", "content": "hi"}, *HI]}),
    "chat-parts": (CHAT, {"messages": [{"role": "user", "content": _text("Say hi.", "Or not.")}]}),
    "chat-tool-turn": (
        CHAT,
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": "5"},
            ]
        },
    ),
    "chat-stop": (CHAT, {"stop": "!"}),
    "chat-stops": (CHAT, {"stop": ["!", "there"]}),
    "chat-max-completion-tokens": (CHAT, {"max_tokens": None, "max_completion_tokens": 3}),
    "chat-negative-max-tokens": (CHAT, {"max_tokens": -1, "stop": [" ", "!", "."]}),
    "chat-penalties": (CHAT, {"frequency_penalty": 1.0, "presence_penalty": 1.0, "top_p": 0.5}),
    "chat-json": (CHAT, {"response_format": {"type": "json_object"}, "max_tokens": 16}),
    "chat-schema": (CHAT, {"response_format": JSON_SCHEMA, "max_tokens": 40}),
    "chat-logprobs": (CHAT, {"logprobs": True, "top_logprobs": 2}),
    "chat-logprobs-stream": (CHAT, {"logprobs": True, "stream": True}),
    "chat-reasoning-none": (CHAT, {"reasoning_effort": "none"}),
    "chat-unknown-field": (CHAT, {"user": "me", "store": False, "metadata": {}}),
    "chat-tools-unsupported": (CHAT, {"tools": [TOOL]}),
    "chat-think-unsupported": (CHAT, {"reasoning_effort": "high"}),
    "chat-reasoning-wrong": (CHAT, {"reasoning_effort": "extreme"}),
    "chat-no-messages": (CHAT, {"messages": []}),
    "chat-message-without-content": (CHAT, {"messages": [{"role": "user"}]}),
    "chat-bad-part": (CHAT, {"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
    "chat-image-url": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.test/b.png"}}]}
            ]
        },
    ),
    "chat-bad-tool-arguments": (
        CHAT,
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "no"}}]}
            ]
        },
    ),
    "chat-unknown-model": (CHAT, {"model": "nope"}),
    "chat-wrong-type": (CHAT, {"max_tokens": "many"}),
    "completion": (COMPLETION, {}),
    "completion-stream": (COMPLETION, {"stream": True}),
    "completion-stream-usage": (COMPLETION, {"stream": True, **USAGE}),
    "completion-stop": (COMPLETION, {"stop": ["!"]}),
    "completion-no-max-tokens": (COMPLETION, {"max_tokens": 0, "stop": [" ", "!", "."]}),
    "completion-suffix-unsupported": (COMPLETION, {"suffix": "end"}),
    "completion-logprobs": (COMPLETION, {"logprobs": 2}),
    "completion-unknown-model": (COMPLETION, {"model": "nope"}),
    "completion-wrong-type": (COMPLETION, {"prompt": 5}),
    "embeddings": (EMBEDDINGS, {"input": "hello"}),
    "embeddings-list": (EMBEDDINGS, {"input": ["hello", "you"]}),
    "embeddings-base64": (EMBEDDINGS, {"input": "hello", "encoding_format": "base64"}),
    "embeddings-dimensions": (EMBEDDINGS, {"input": "hello", "dimensions": 16}),
    "embeddings-empty": (EMBEDDINGS, {"input": ""}),
    "embeddings-bad-format": (EMBEDDINGS, {"input": "hello", "encoding_format": "hex"}),
    "embeddings-unknown-model": (EMBEDDINGS, {"model": "nope", "input": "hello"}),
    "messages": (MESSAGES, {}),
    "messages-stream": (MESSAGES, {"stream": True}),
    "messages-system": (MESSAGES, {"system": "You are a cat."}),
    "messages-system-blocks": (MESSAGES, {"system": _text("You are", " a cat.")}),
    "messages-blocks": (MESSAGES, {"messages": [{"role": "user", "content": _text("Say", " hi.")}]}),
    "messages-turns": (MESSAGES, {"messages": [*HI, {"role": "assistant", "content": "hi"}, *HI]}),
    "messages-tool-turn": (
        MESSAGES,
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "5"}]},
            ]
        },
    ),
    "messages-stop": (MESSAGES, {"stop_sequences": ["!"]}),
    "messages-sampling": (MESSAGES, {"top_p": 0.5, "top_k": 5}),
    "messages-tools-unsupported": (MESSAGES, {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
    "messages-thinking-unsupported": (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    "messages-no-max-tokens": (MESSAGES, {"max_tokens": None}),
    "messages-negative-max-tokens": (MESSAGES, {"max_tokens": -1}),
    "messages-no-messages": (MESSAGES, {"messages": []}),
    "messages-unknown-model": (MESSAGES, {"model": "nope"}),
    "messages-wrong-type": (MESSAGES, {"max_tokens": "many"}),
    "messages-image-url": (
        MESSAGES,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://a.test/b"}}]}
            ]
        },
    ),
}
FORMS = {
    "id": (re.compile(r"chatcmpl-\d{1,3}"), re.compile(r"cmpl-\d{1,3}"), re.compile(r"msg_[0-9a-f-]{24,36}")),
    "request_id": (re.compile(r"req_[0-9a-f-]{24,36}"),),
}


@pytest.mark.parametrize("name", BODIES)
def test_v1_equals_ollama(name: str, target_of: Callable[[str], Target]) -> None:
    path, fields = BODIES[name]
    base: dict[str, Any] = {"model": MODEL}
    if path in (CHAT, MESSAGES):
        base |= {"messages": HI}
    if path == COMPLETION:
        base |= {"prompt": "Say hi."}
    if path != EMBEDDINGS:
        base |= GREEDY
    body = {key: value for key, value in (base | fields).items() if value is not None}
    expected = send(target_of("ollama"), "POST", path, body | V1_BETTER.get(name, {}))
    answer = send(target_of("gateway-ollama"), "POST", path, body)
    if name in V1_STATUS:
        assert expected.status >= 500 and answer.status == V1_STATUS[name], (answer, expected)
        assert answer.last["error"]["message"]
        return
    assert (answer.status, answer.content_type) == (expected.status, content_type(expected)), (answer, expected)
    assert reduced(answer, name) == about(reduced(expected, name))


def reduced(answer: Answer, name: str) -> list[tuple[str, Any]]:
    return [(event.name, _reduce(event.data, "", answer.status, name)) for event in answer.events]


def _reduce(value: Any, path: str, status: int, name: str) -> Any:
    key = path.rpartition(".")[2]
    if key in FORMS and isinstance(value, str):
        return next((form.pattern for form in FORMS[key] if form.fullmatch(value)), value)
    if key == "created" and isinstance(value, int) and value > 1_700_000_000:
        return "time"
    if path in V1_FIELDS.get(name, ()):
        return type(value)
    if key == "logprob" and isinstance(value, int):
        return float(value)
    if key == "embedding" and isinstance(value, str):
        numbers = base64.b64decode(value)
        return struct.unpack(f"<{len(numbers) // 4}f", numbers)
    if status >= 400 and path in ERROR_WORDS:
        return "null or string"
    if status >= 400 and path == "error.message" and name in V1_WORDS:
        return bool(value)
    if isinstance(value, dict):
        # The order of fields is part of the bytes, not of the meaning: compared as a set.
        return {field: _reduce(item, f"{path}.{field}".lstrip("."), status, name) for field, item in value.items()}
    if isinstance(value, list):
        return [_reduce(item, path, status, name) for item in value]
    return value
