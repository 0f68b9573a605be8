"""A node's native answers: passed on line by line, put together, or taken as one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from corral.wire.common import LINE_MAX, Responder, count, decode_line, encode, fields_of, text
from corral.wire.errors import ApiError, UpstreamNonsense
from corral.wire.lines import RENDERED, UNSET, ChatLine, GenerateLine

DONE: Final = b'"done":true'
GOES_ON: Final = b'"done":false}\n'
ERROR: Final = b'"error"'
OBJECT_MAX: Final = 256 << 20
COUNT_TEXT: Final = 32
SUMS = ("total_duration", "load_duration", "prompt_eval_count")
"""Of several answers that make one."""


def error_of(line: bytes) -> ApiError:
    """The error that a node sent as a line of its answer."""
    return in_band_error(decode_line(line).get("error"))


def in_band_error(text: Any) -> ApiError:
    """The same, of the value of a line's `error`."""
    return ApiError(502, "upstream_error", text if isinstance(text, str) else "the node failed without a reason")


class Pass(Responder):
    """A streamed native answer: whole lines go through as they are.

    A quote within a JSON string is escaped, so the bytes of `GOES_ON`, `DONE` and `ERROR` stand for fields alone. Lines
    that each end with the first and have neither of the others, as Ollama writes them, need no closer look; all others
    are parsed.
    """

    content_type = "application/x-ndjson"
    stream = True
    _rest = b""

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
        lines = data.count(b"\n")
        if (
            self.done
            or data.count(GOES_ON) != lines
            or data.find(DONE) >= 0  # `in` costs several times as much: it tries a number first
            or data.find(ERROR) >= 0
            or not data.startswith(b'{"model"')
        ):
            return self._closely(data)
        self.started = True
        self.tokens += lines
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
                break
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

    def resume(self) -> None:
        self._rest, self.error = b"", None


_chat_lines: Final[Callable[[bytes], list[Any]]] = msgspec.json.Decoder(ChatLine).decode_lines
_chat_line: Final[Callable[[bytes], Any]] = msgspec.json.Decoder(ChatLine).decode
_generate_line: Final[Callable[[bytes], Any]] = msgspec.json.Decoder(GenerateLine).decode
_generate_lines: Final[Callable[[bytes], list[Any]]] = msgspec.json.Decoder(GenerateLine).decode_lines
_EMPTY: Final = b'"message":{"role":"assistant","content":""}'
_CONTENT: Final = b'"message":{"role":"assistant","content":'


class Whole(Responder):
    """`stream: false`: the streamed answer put together as Ollama does it. `what` is message or response."""

    content_type = "application/json; charset=utf-8"
    last = b""
    _rest = b""
    _size = 0
    _more = False  # more than text came: these are its own from then on
    _thinking: list[str] = []  # noqa: RUF012 - set anew, never changed
    _tool_calls: list[Any] = []  # noqa: RUF012
    _logprobs: list[Any] = []  # noqa: RUF012

    def __init__(self, what: str) -> None:
        self._chat = what == "message"
        self._text: list[str] = []

    def feed(self, data: bytes) -> bytes:
        self._size += len(data)
        if self._size > OBJECT_MAX:  # an answer without end is kept until its time is over
            raise UpstreamNonsense(f"an answer of more than {OBJECT_MAX} bytes")
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith(b"\n"):
            data, _, self._rest = data.rpartition(b"\n")
            if len(self._rest) > LINE_MAX:
                raise UpstreamNonsense(f"a line of more than {LINE_MAX} bytes")
        # The last line by itself, as it may be the answer's last and then goes to the caller: it has to be one object.
        data = data.rstrip()
        if not data:
            return b""
        before, _, last = data.rpartition(b"\n")
        try:
            if self._chat:
                lines = _chat_lines(before) if before else []
                lines.append(_chat_line(last))
            else:
                lines = _generate_lines(before) if before else []
                lines.append(_generate_line(last))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise UpstreamNonsense(f"lines that are no part of an answer: {data[:80]!r}") from None
        self.started = True
        for line in lines:
            if self.done:
                raise UpstreamNonsense("lines after the last one")
            if line.error is not UNSET:
                self.error = in_band_error(line.error)
                return b""
            ends = line.done or line.rendered is not UNSET
            part = line.message if self._chat else line
            if part is not None:
                if part.content:
                    self._text.append(part.content)
                if part.thinking or part.tool_calls or line.logprobs:
                    self._beside(part.thinking, part.tool_calls, line.logprobs)
            elif not ends:
                raise UpstreamNonsense("a line without a message")
            self.tokens += 1
            if ends:
                self.done = True
                self.last = last
                self.prompt_tokens, self.tokens = count(line.prompt_eval_count), count(line.eval_count)
        return b""

    def _beside(self, thinking: str | None, calls: list[Any] | None, logprobs: list[Any] | None) -> None:
        if not self._more:
            self._more, self._thinking, self._tool_calls, self._logprobs = True, [], [], []
        self._thinking.append(thinking or "")
        self._tool_calls.extend(calls or ())
        self._logprobs.extend(logprobs or ())

    def said(self) -> str | None:
        return "".join(self._text)

    def value(self) -> dict[str, Any]:
        """The one object that Ollama would have sent."""
        whole = decode_line(self.last)
        if RENDERED in whole:
            return whole
        content, thinking = "".join(self._text), "".join(self._thinking)
        if self._chat:
            role = text((whole.get("message") or {}).get("role")) or "assistant"
            message: dict[str, Any] = {"role": role, "content": content}
            if thinking:
                message["thinking"] = thinking
            if self._tool_calls:
                message["tool_calls"] = self._tool_calls
            whole["message"] = message
        else:
            whole["response"] = content
            if thinking:
                whole["thinking"] = thinking
            if self._tool_calls:
                whole["tool_calls"] = self._tool_calls
        if self._logprobs:
            whole["logprobs"] = self._logprobs
        return whole

    def finish(self) -> bytes:
        if self._chat and not (self._thinking or self._tool_calls or self._logprobs):
            # Plain text, by far the most common: it takes the place of the last line's empty message. These bytes
            # stand for nothing else, since a quote within a JSON string is escaped.
            last = self.last
            at = last.find(_EMPTY)
            if at >= 0 and last.find(_EMPTY, at + 1) < 0:
                content = encode("".join(self._text))
                return b"".join((last[:at], _CONTENT, content, b"}", last[at + len(_EMPTY) :]))
        return encode(self.value())


class Object(Responder):
    """An answer that is one JSON object: embed, embeddings, show. Of embeddings it may be made of several."""

    content_type = "application/json; charset=utf-8"
    done = True  # an object is whole when the node's answer is

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._whole: list[bytes] = []
        self._size = 0

    def keep(self) -> None:
        body = self.body()
        # Counted now: a caller that leaves before the last of them has had these made.
        self.prompt_tokens += number(fields_of(body), "prompt_eval_count")
        self._whole.append(body)
        self.kept += 1
        self._parts = []

    def drop(self) -> None:
        self._parts = []

    def feed(self, data: bytes) -> bytes:
        self.started = True
        self._size += len(data)
        if self._size > OBJECT_MAX:
            raise UpstreamNonsense(f"an answer of more than {OBJECT_MAX} bytes")
        self._parts.append(data)
        return b""

    def body(self) -> bytes:
        """The object as it was sent."""
        return b"".join(self._parts)

    def bodies(self) -> list[bytes]:
        """All of which it is made, in their order."""
        return [*self._whole, self.body()]

    def finish(self) -> bytes:
        if self._whole:
            return self._together()
        body = self.body()
        # Not read as values: of arrays alone they take thirty times the memory of their text, and a gateway's seconds.
        self.prompt_tokens = number(fields_of(body), "prompt_eval_count")
        return body

    def _together(self) -> bytes:
        vectors: list[bytes] = []
        sums: dict[str, int] = {}
        merged: dict[str, Any] = {}
        for body in self.bodies():
            found = fields_of(body)
            # Vectors are many numbers: they stay as they were sent.
            embeddings = bytes(found.get("embeddings", b"")).strip()
            if embeddings[:1] != b"[" or embeddings[-1:] != b"]":
                raise UpstreamNonsense("an answer without embeddings")
            vectors.append(embeddings[1:-1])
            merged = merged or dict(found)
            for name in SUMS:
                if name in found:
                    sums[name] = sums.get(name, 0) + number(found, name)
        self.prompt_tokens = sums.get("prompt_eval_count", 0)
        return encode({**merged, "embeddings": msgspec.Raw(b"[%b]" % b",".join(vectors)), **sums})


def number(fields: dict[str, msgspec.Raw], name: str) -> int:
    """The count in a field of `fields_of`; 0 where there is none."""
    found = bytes(fields.get(name, b""))
    # What is longer is no count, and not looked at: it may be all that a node could send.
    return count(decode_line(b'{"n":%b}' % found).get("n")) if 0 < len(found) <= COUNT_TEXT else 0
