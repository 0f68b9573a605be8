"""A node's native answers: passed on line by line, put together, or taken as one object."""

from __future__ import annotations

from typing import Any

import msgspec

from corral.wire.common import LINE_MAX, count, decode_line, encode
from corral.wire.errors import ApiError, UpstreamNonsense

DONE = b'"done":true'
ERROR = b'{"error"'
RENDERED = "_debug_info"

UNSET = msgspec.UNSET
Unset = msgspec.UnsetType


def error_of(line: bytes) -> ApiError:
    """The error that a node sent as a line of its answer."""
    text = decode_line(line).get("error")
    return ApiError(502, "upstream_error", text if isinstance(text, str) else "the node failed without a reason")


class Pass:
    """A streamed native answer: whole lines go through as they are.

    A quote within a JSON string is escaped, so the bytes of `DONE` stand in a line's own fields alone; the line that
    has them, and only that one, is parsed.
    """

    __slots__ = ("_rest", "content_type", "done", "error", "prompt_tokens", "started", "stream", "tokens")

    def __init__(self) -> None:
        self.content_type = "application/x-ndjson"
        self.stream = True
        self.started = self.done = False
        self.error: ApiError | None = None
        self.prompt_tokens = self.tokens = 0
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith(b"\n"):
            data, _, self._rest = data.rpartition(b"\n")
            if len(self._rest) > LINE_MAX:
                raise UpstreamNonsense(f"a line of more than {LINE_MAX} bytes")
            if not data:
                return b""
            data += b"\n"
        if self.done:
            raise UpstreamNonsense("lines after the last one")
        if DONE in data or ERROR in data or not data.startswith(b'{"model"'):
            return self._closely(data)
        self.started = True
        self.tokens += data.count(b"\n")
        return data

    def _closely(self, data: bytes) -> bytes:
        passed: list[bytes] = []
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            if self.done:
                raise UpstreamNonsense("lines after the last one")
            value = decode_line(line)
            if "error" in value:
                self.error = error_of(line)
                return b""
            if value.get("done") is True or RENDERED in value:
                self.done = True
                self.prompt_tokens = count(value.get("prompt_eval_count"))
                self.tokens = count(value.get("eval_count"))
                if RENDERED in value or value.get("done_reason") in ("load", "unload"):
                    self.content_type = "application/json; charset=utf-8"  # no stream, though one was asked for
            elif "model" not in value:
                raise UpstreamNonsense(f"a line that is no part of an answer: {line[:80]!r}")
            else:
                self.tokens += 1
            passed.append(line)
        self.started = self.started or bool(passed)
        return b"\n".join(passed) + b"\n" if passed else b""

    def finish(self) -> bytes:
        return b""


class Part(msgspec.Struct):
    """What a line adds to a chat's message."""

    role: str | None = None
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[Any] | None = None


class Line(msgspec.Struct):
    """A line of an answer, as far as putting it together needs it."""

    done: bool = False
    error: Any = UNSET
    logprobs: list[Any] | None = None
    prompt_eval_count: Any = 0
    eval_count: Any = 0
    rendered: msgspec.Raw | Unset = msgspec.field(name=RENDERED, default=UNSET)


class ChatLine(Line):
    """A line of a chat."""

    message: Part | None = None


class GenerateLine(Line):
    """A line of a completion: what a chat has in its message stands in the line itself."""

    role: str | None = None
    content: str | None = msgspec.field(name="response", default=None)
    thinking: str | None = None
    tool_calls: list[Any] | None = None


_chat_line = msgspec.json.Decoder(ChatLine).decode
_generate_line = msgspec.json.Decoder(GenerateLine).decode
_EMPTY = b'"message":{"role":"assistant","content":""}'


class Whole:
    """`stream: false`: the streamed answer put together as Ollama does it. `what` is message or response."""

    __slots__ = (
        "_chat",
        "_logprobs",
        "_rest",
        "_text",
        "_thinking",
        "_tool_calls",
        "content_type",
        "done",
        "error",
        "last",
        "prompt_tokens",
        "role",
        "started",
        "stream",
        "tokens",
    )

    def __init__(self, what: str) -> None:
        self.content_type = "application/json; charset=utf-8"
        self.stream = self.started = self.done = False
        self.error: ApiError | None = None
        self.prompt_tokens = self.tokens = 0
        self.last = b""
        self.role = "assistant"
        self._chat = what == "message"
        self._rest = b""
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._tool_calls: list[Any] = []
        self._logprobs: list[Any] = []

    def feed(self, data: bytes) -> bytes:
        if self._rest:
            data = self._rest + data
        *lines, rest = data.split(b"\n")
        self._rest = rest
        if len(rest) > LINE_MAX:
            raise UpstreamNonsense(f"a line of more than {LINE_MAX} bytes")
        for line in lines:
            if not line or line.isspace():
                continue
            if self.done:
                raise UpstreamNonsense("lines after the last one")
            value: Line
            part: Part | GenerateLine | None
            try:
                if self._chat:
                    value = chat = _chat_line(line)
                    part = chat.message
                else:
                    value = part = _generate_line(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise UpstreamNonsense(f"a line that is no part of an answer: {line[:80]!r}") from None
            if value.error is not UNSET:
                self.error = error_of(line)
                return b""
            self.started = True
            self.tokens += 1
            if part is not None:
                self._take(part)
            elif not value.done and value.rendered is UNSET:
                raise UpstreamNonsense("a line without a message")
            if value.logprobs:
                self._logprobs += value.logprobs
            if value.done or value.rendered is not UNSET:
                self.done = True
                self.last = line
                self.prompt_tokens = count(value.prompt_eval_count)
                self.tokens = count(value.eval_count)
        return b""

    def _take(self, part: Part | GenerateLine) -> None:
        if part.content:
            self._text.append(part.content)
        if part.thinking:
            self._thinking.append(part.thinking)
        if part.tool_calls:
            self._tool_calls += part.tool_calls
        if part.role:
            self.role = part.role

    def value(self) -> dict[str, Any]:
        """The one object that Ollama would have sent."""
        whole = decode_line(self.last)
        if RENDERED in whole:
            return whole
        text, thinking = "".join(self._text), "".join(self._thinking)
        if self._chat:
            message: dict[str, Any] = {"role": self.role, "content": text}
            if thinking:
                message["thinking"] = thinking
            if self._tool_calls:
                message["tool_calls"] = self._tool_calls
            whole["message"] = message
        else:
            whole["response"] = text
            if thinking:
                whole["thinking"] = thinking
            if self._tool_calls:
                whole["tool_calls"] = self._tool_calls
        if self._logprobs:
            whole["logprobs"] = self._logprobs
        return whole

    def finish(self) -> bytes:
        if self._chat and not (self._thinking or self._tool_calls or self._logprobs) and self.role == "assistant":
            # Plain text, by far the most common: it takes the place of the last line's empty message. These bytes
            # stand for nothing else, since a quote within a JSON string is escaped.
            before, empty, after = self.last.partition(_EMPTY)
            if empty and _EMPTY not in after:
                return b'%b"message":{"role":"assistant","content":%b}%b' % (before, encode("".join(self._text)), after)
        return encode(self.value())


class Object:
    """An answer that is one JSON object: embed, embeddings, show."""

    __slots__ = (
        "_parts",
        "_size",
        "content_type",
        "done",
        "error",
        "prompt_tokens",
        "started",
        "stream",
        "tokens",
    )

    SIZE_MAX = 256 << 20

    def __init__(self) -> None:
        self.content_type = "application/json; charset=utf-8"
        self.stream = False
        self.started = False
        self.done = True  # an object is whole when the node's answer is
        self.error: ApiError | None = None
        self.prompt_tokens = self.tokens = 0
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> bytes:
        self.started = True
        self._size += len(data)
        if self._size > self.SIZE_MAX:
            raise UpstreamNonsense(f"an answer of more than {self.SIZE_MAX} bytes")
        self._parts.append(data)
        return b""

    def body(self) -> bytes:
        """The object as it was sent."""
        return b"".join(self._parts)

    def finish(self) -> bytes:
        body = self.body()
        value = decode_line(body)
        self.prompt_tokens = count(value.get("prompt_eval_count"))
        return body
