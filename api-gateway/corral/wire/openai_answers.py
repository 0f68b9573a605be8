"""Native answers in the forms of OpenAI's `/v1`, field by field as Ollama's own `/v1` has them."""

from __future__ import annotations

import base64
import struct
import time
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

import msgspec

from corral.wire import answers
from corral.wire.common import MARK, Lines, Responder, count, decode_line, encode, text
from corral.wire.errors import UpstreamNonsense

FINGERPRINT: Final = "fp_ollama"
VECTORS_MAX: Final = 32 << 20
BRACKETS_MAX: Final = 100
"""Bytes, arrays and objects of a node's answer of 64 embeddings at most: read as values, those of one without a bound
would take a gateway's memory and its seconds."""


def tool_calls(calls: Any) -> list[dict[str, Any]]:
    """A native message's tool calls in OpenAI's form."""
    made: list[dict[str, Any]] = []
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UpstreamNonsense("a tool call without a function")
        arguments = msgspec.json.encode(function.get("arguments") or {}).decode()
        made.append(
            {
                "id": text(call.get("id")),
                "index": function.get("index", 0),
                "type": "function",
                "function": {"name": text(function.get("name")), "arguments": arguments},
            }
        )
    return made


def usage_of(line: dict[str, Any]) -> dict[str, int]:
    """`usage` of a last line."""
    prompt, generated = count(line.get("prompt_eval_count")), count(line.get("eval_count"))
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def message_of(part: dict[str, Any], role: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """A message or delta; what is empty is left out, as Ollama does, but for the content."""
    message: dict[str, Any] = {"role": role, "content": text(part.get("content"))}
    if part.get("thinking"):
        message["reasoning"] = text(part["thinking"])
    if calls:
        message["tool_calls"] = calls
    return message


class Stream(Responder):
    """What both streamed forms share: lines in, server-sent events out."""

    content_type = "text/event-stream"
    stream = True

    def __init__(self, identity: str, usage: bool) -> None:
        self.identity = identity
        self._usage = usage
        self._lines = Lines()

    def feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        for line in self._lines.split(data):
            if self.done:
                raise UpstreamNonsense("lines after the last one")
            value = decode_line(line)
            if "error" in value:
                self.error = answers.error_of(line)
                break
            self.started = True
            self.tokens += 1
            chunk = self.chunk(value)
            if MARK in value:
                chunk[MARK] = value[MARK]
            out.append(b"data: " + encode(chunk) + b"\n\n")
            if value.get("done") is True:
                self.done = True
                self.prompt_tokens, self.tokens = (
                    count(value.get("prompt_eval_count")),
                    count(value.get("eval_count")),
                )
                if self._usage:
                    out.append(b"data: " + encode(chunk | {"choices": [], "usage": usage_of(value)}) + b"\n\n")
        return b"".join(out)

    def chunk(self, value: dict[str, Any]) -> dict[str, Any]:
        """The event of one line."""
        raise NotImplementedError

    def finish(self) -> bytes:
        return b"data: [DONE]\n\n"

    def resume(self) -> None:
        self._lines.rest, self.error = b"", None


class ChatStream(Stream):
    """`chat.completion.chunk` events."""

    def __init__(self, identity: str, usage: bool) -> None:
        super().__init__(identity, usage)
        self._called = False

    def chunk(self, value: dict[str, Any]) -> dict[str, Any]:
        part = value.get("message")
        if not isinstance(part, dict):
            raise UpstreamNonsense("a line without a message")
        calls = tool_calls(part.get("tool_calls"))
        self._called = self._called or bool(calls)
        reason = value.get("done_reason") or None
        choice: dict[str, Any] = {
            "index": 0,
            "delta": message_of(part, "assistant", calls),
            "finish_reason": "tool_calls" if reason and self._called else reason,
        }
        if value.get("logprobs"):
            choice["logprobs"] = {"content": value["logprobs"]}
        return {
            "id": self.identity,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": value.get("model", ""),
            "system_fingerprint": FINGERPRINT,
            "choices": [choice],
        }


class CompletionStream(Stream):
    """`text_completion` events."""

    def chunk(self, value: dict[str, Any]) -> dict[str, Any]:
        response = value.get("response")
        if not isinstance(response, str):
            raise UpstreamNonsense("a line without a response")
        event: dict[str, Any] = {
            "id": self.identity,
            "object": "text_completion",
            "created": int(time.time()),
            "choices": [{"text": response, "index": 0, "finish_reason": value.get("done_reason") or None}],
            "model": value.get("model", ""),
            "system_fingerprint": FINGERPRINT,
        }
        if self._usage:
            event["usage"] = usage_of({})
        return event


def created_of(line: dict[str, Any]) -> int:
    """`created_at` as epoch seconds."""
    try:
        return int(datetime.fromisoformat(str(line.get("created_at", ""))[:19] + "+00:00").timestamp())
    except ValueError:
        return int(time.time())


class ChatWhole(answers.Whole):
    """One `chat.completion`."""

    def __init__(self, identity: str) -> None:
        super().__init__("message")
        self.content_type = "application/json"
        self.identity = identity

    def finish(self) -> bytes:
        value = self.value()
        part = value.get("message") or {}
        calls = tool_calls(part.get("tool_calls"))
        choice: dict[str, Any] = {
            "index": 0,
            "message": message_of(part, text(part.get("role")) or "assistant", calls),
            "finish_reason": "tool_calls" if calls else value.get("done_reason") or None,
        }
        if value.get("logprobs"):
            choice["logprobs"] = {"content": value["logprobs"]}
        return encode(
            {
                "id": self.identity,
                "object": "chat.completion",
                "created": created_of(value),
                "model": value.get("model", ""),
                "system_fingerprint": FINGERPRINT,
                "choices": [choice],
                "usage": usage_of(value),
            }
        )


class CompletionWhole(answers.Whole):
    """One `text_completion`."""

    def __init__(self, identity: str) -> None:
        super().__init__("response")
        self.content_type = "application/json"
        self.identity = identity

    def finish(self) -> bytes:
        value = self.value()
        return encode(
            {
                "id": self.identity,
                "object": "text_completion",
                "created": created_of(value),
                "model": value.get("model", ""),
                "system_fingerprint": FINGERPRINT,
                "choices": [
                    {
                        "text": value.get("response", ""),
                        "index": 0,
                        "finish_reason": value.get("done_reason") or None,
                    }
                ],
                "usage": usage_of(value),
            }
        )


class EmbeddingList(answers.Object):
    """A list of embeddings, as numbers or as base64 of little-endian float32."""

    def __init__(self, model: str, as_base64: bool) -> None:
        super().__init__()
        self.content_type = "application/json"
        self._model = model
        self._base64 = as_base64

    def finish(self) -> bytes:
        vectors: list[Any] = []
        counted = 0
        for body in self.bodies():
            if len(body) > VECTORS_MAX or body.count(b"[") + body.count(b"{") > BRACKETS_MAX:
                raise UpstreamNonsense("more than the embeddings that were asked for")
            value = decode_line(body)
            found = value.get("embeddings")
            if not isinstance(found, list):
                raise UpstreamNonsense("an answer without embeddings")
            vectors += found
            counted += count(value.get("prompt_eval_count"))
        data = [
            {"object": "embedding", "embedding": self._form(vector), "index": index}
            for index, vector in enumerate(vectors)
        ]
        self.prompt_tokens = counted
        usage = {"prompt_tokens": counted, "total_tokens": counted}
        return encode({"object": "list", "data": data, "model": self._model, "usage": usage})

    def _form(self, vector: Any) -> Any:
        if isinstance(vector, list):
            if not self._base64:
                return vector
            # A number that is too large for a float32 is an OverflowError.
            with suppress(struct.error, TypeError, OverflowError):
                return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        raise UpstreamNonsense("an embedding that is no list of numbers")
