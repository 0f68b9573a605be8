"""Reading an answer for its truth: its tokens and their times, whether it came to its proper end, and what it lacks.

A streamed answer is whole when its API's own end came (`"done":true`, `data: [DONE]`, `message_stop`), not when the
connection ended in good order. Times are monotonic seconds at which the bytes were there.
"""

from __future__ import annotations

from typing import Any

import msgspec

LINE_MAX = 8 << 20
BODY_MAX = 256 << 20

OK = "ok"
TRUNCATED, ERROR_IN_STREAM, BAD_ANSWER = "truncated", "error_in_stream", "bad_answer"
RATE_LIMITED, UNAVAILABLE, HTTP_ERROR, REDIRECT = "rate_limited", "unavailable", "http_error", "redirect"
CONNECT, LOST, TIMEOUT, NOT_SENT = "connect", "lost", "timeout", "not_sent"
CANCELLED = "cancelled"
KINDS = {
    TRUNCATED: "the answer began and lacks its proper end",
    ERROR_IN_STREAM: "the answer began and ended with an error of its API",
    BAD_ANSWER: "what came is no answer of the API",
    RATE_LIMITED: "status 429",
    UNAVAILABLE: "status 503",
    HTTP_ERROR: "HTTP error",
    REDIRECT: "sent elsewhere, which is not followed",
    CONNECT: "no connection",
    LOST: "the connection ended before an answer",
    TIMEOUT: "not whole in time",
    NOT_SENT: "the client had too many requests under way",
}
"""What can become of a request that is not ``ok``; ``cancelled`` (by Ctrl-C) counts as neither."""

SILENT, CUT = "ended in good order, as if whole", "the connection was cut"


class _Part(msgspec.Struct):
    content: str | None = None
    thinking: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None
    text: str | None = None
    partial_json: str | None = None

    def __bool__(self) -> bool:
        return bool(
            self.content or self.text or self.thinking or self.reasoning or self.tool_calls or self.partial_json
        )


class _Native(msgspec.Struct):
    message: _Part | None = None
    response: str | None = None
    thinking: str | None = None
    done: bool = False
    error: Any = msgspec.UNSET
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    embeddings: list[Any] | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Choice(msgspec.Struct):
    delta: _Part | None = None
    message: _Part | None = None
    text: str | None = None


class _OpenAI(msgspec.Struct):
    choices: list[_Choice] | None = None
    data: list[Any] | None = None
    usage: _Usage | None = None
    error: Any = msgspec.UNSET


class _Message(msgspec.Struct):
    usage: _Usage | None = None


class _Anthropic(msgspec.Struct):
    type: str = ""
    message: _Message | None = None
    delta: _Part | None = None
    content: list[Any] | None = None
    usage: _Usage | None = None
    error: Any = msgspec.UNSET


_native = msgspec.json.Decoder(_Native).decode
_openai = msgspec.json.Decoder(_OpenAI).decode
_anthropic = msgspec.json.Decoder(_Anthropic).decode


class _Nonsense(Exception):
    """What came is no part of an answer."""


class Reader:
    """Reads one answer. ``times``: when each token that is seen came; token counts are the server's own, or 0."""

    streams = True

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt_tokens = self.output_tokens = 0
        self.ended = False
        self.problem: tuple[str, str] | None = None
        self._rest: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes of the body, in any cut, as they came at ``now``."""
        if self.problem is None:
            try:
                self._feed(data, now)
            except (_Nonsense, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                self.problem = BAD_ANSWER, _brief(str(error))

    def finish(self, clean: bool, now: float) -> tuple[str, str]:
        """Kind and reason once the body has ended: ``clean`` where HTTP says that it is whole."""
        if self.problem is None and clean:
            try:
                self._finish(now)
            except (_Nonsense, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                self.problem = BAD_ANSWER, _brief(str(error))
        if self.problem is not None:
            return self.problem
        if not self.ended:
            return TRUNCATED, SILENT if clean else CUT
        # The end of the answer was there, but its HTTP body was not whole.
        return (OK, "") if clean else (TRUNCATED, CUT)

    def _keep(self, data: bytes, limit: int) -> None:
        self._size += len(data)
        if self._size > limit:
            raise _Nonsense(f"more than {limit} bytes")
        self._rest.append(data)

    def _feed(self, data: bytes, now: float) -> None:
        """A stream: line by line."""
        head, newline, rest = data.rpartition(b"\n")
        if not newline:
            self._keep(rest, LINE_MAX)
            return
        lines = b"".join([*self._rest, head])
        self._rest, self._size = [], 0
        if rest:
            self._keep(rest, LINE_MAX)
        for line in lines.split(b"\n"):
            if (line := line.strip()) and self.problem is None:
                self._line(line, now)

    def _finish(self, now: float) -> None:
        if line := b"".join(self._rest).strip():
            self._line(line, now)

    def _line(self, line: bytes, now: float) -> None:
        raise NotImplementedError

    def _fail(self, error: Any) -> None:
        self.problem = ERROR_IN_STREAM, error_text(error)

    def _usage(self, usage: _Usage | None) -> None:
        if usage is not None:
            self.prompt_tokens = usage.prompt_tokens or usage.input_tokens or self.prompt_tokens
            self.output_tokens = usage.completion_tokens or usage.output_tokens or self.output_tokens


class NativeStream(Reader):
    """Ollama's lines of JSON."""

    def _line(self, line: bytes, now: float) -> None:
        if self.ended:
            raise _Nonsense("a line after the last one")
        value = _native(line)
        if value.error is not msgspec.UNSET:
            self._fail(value.error)
            return
        if value.message or value.response or value.thinking:
            self.times.append(now)
        if value.done:
            self.ended = True
            self.prompt_tokens, self.output_tokens = value.prompt_eval_count or 0, value.eval_count or 0


class _Events(Reader):
    """Server-sent events; only their data counts."""

    def _line(self, line: bytes, now: float) -> None:
        if line.startswith(b"data:"):
            if self.ended:
                raise _Nonsense("an event after the last one")
            self._event(line[5:].strip(), now)
        elif not line.startswith((b"event:", b":", b"id:", b"retry:")):
            raise _Nonsense(f"a line that is no event: {line[:60]!r}")

    def _event(self, data: bytes, now: float) -> None:
        raise NotImplementedError


class OpenAIStream(_Events):
    """Chunks of a chat or a completion."""

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.ended = True
            return
        value = _openai(data)
        if value.error is not msgspec.UNSET:
            self._fail(value.error)
            return
        if any(choice.delta or choice.text for choice in value.choices or ()):
            self.times.append(now)
        self._usage(value.usage)


class AnthropicStream(_Events):
    """Events of a message."""

    def _event(self, data: bytes, now: float) -> None:
        value = _anthropic(data)
        if value.type == "error" or value.error is not msgspec.UNSET:
            self._fail(value.error)
            return
        if value.delta:
            self.times.append(now)
        self._usage(value.message.usage if value.message else value.usage)
        self.ended = value.type == "message_stop"


class Whole(Reader):
    """An answer that is one JSON object; it has no times of tokens."""

    streams = False

    def __init__(self, api: str) -> None:
        super().__init__()
        self._api = api

    def _feed(self, data: bytes, now: float) -> None:
        self._keep(data, BODY_MAX)

    def _finish(self, now: float) -> None:
        body = b"".join(self._rest)
        if self._api == "native":
            native = _native(body)
            self.ended = native.done or bool(native.embeddings)
            self.prompt_tokens, self.output_tokens = native.prompt_eval_count or 0, native.eval_count or 0
            error = native.error
        else:
            value = _openai(body) if self._api == "openai" else _anthropic(body)
            listed = (value.choices or value.data) if isinstance(value, _OpenAI) else value.content
            self.ended = listed is not None
            self._usage(value.usage)
            error = value.error
        if error is not msgspec.UNSET:
            self._fail(error)


class Raw(Reader):
    """Any body, kept as it is."""

    streams = False

    @property
    def body(self) -> bytes:
        """What came."""
        return b"".join(self._rest)

    def _feed(self, data: bytes, now: float) -> None:
        self._keep(data, BODY_MAX)

    def _finish(self, now: float) -> None:
        self.ended = True


def reader(api: str, stream: bool) -> Reader:
    """The reader of a 200 of ``native``, ``openai`` or ``anthropic``."""
    if not stream:
        return Whole(api)
    return {"native": NativeStream, "openai": OpenAIStream, "anthropic": AnthropicStream}[api]()


def refusal(status: int, body: bytes) -> tuple[str, str]:
    """Kind and reason of a status that is not 200."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = _brief(body[:200].decode("utf-8", "replace"))
    else:
        text = error_text(value.get("error") if isinstance(value, dict) else None)
    if 300 <= status < 400:
        return REDIRECT, f"status {status}"
    if status == 429:
        return RATE_LIMITED, text
    if status == 503:
        return UNAVAILABLE, text
    return HTTP_ERROR, f"status {status}: {text}"


def error_text(error: Any) -> str:
    """What an API's error says: its code where it has one, else its message."""
    if isinstance(error, dict):
        said = [str(error[name]) for name in ("code", "type", "message") if error.get(name)]
        return _brief(": ".join(dict.fromkeys([said[0], said[-1]]))) if said else "no reason given"
    return _brief(error) if isinstance(error, str) and error.strip() else "no reason given"


def _brief(text: str) -> str:
    """One line of a bounded length, numbers left out so that like reasons count as one."""
    words = []
    for word in text.split():
        digits = word.strip(".,:;()'\"`s%")
        words.append(word.replace(digits, "N") if digits.replace(".", "").isdigit() else word)
    shown = "".join(letter if letter.isprintable() else "?" for letter in " ".join(words))
    return shown[:160] or "no reason given"
