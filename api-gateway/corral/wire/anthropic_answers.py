"""A node's answers as Anthropic's `/v1/messages` sends them: one message, or events."""

from __future__ import annotations

from typing import Any, Final

from corral.wire import answers
from corral.wire.common import MARK, Lines, Responder, count, decode_line, encode, text
from corral.wire.errors import UpstreamNonsense

STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens"}


def stop_reason(line: dict[str, Any], called: bool) -> str:
    """`stop_reason` of a last line."""
    return "tool_use" if called else STOP_REASONS.get(str(line.get("done_reason") or ""), "stop_sequence")


def _calls(part: dict[str, Any]) -> list[tuple[str, str, Any]]:
    made: list[tuple[str, str, Any]] = []
    calls = part.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UpstreamNonsense("a tool call without a function")
        made.append((text(call.get("id")), text(function.get("name")), function.get("arguments") or {}))
    return made


class MessageWhole(answers.Whole):
    """One message."""

    def __init__(self, identity: str) -> None:
        super().__init__("message")
        self.content_type = "application/json"
        self.identity = identity

    def finish(self) -> bytes:
        value = self.value()
        part = value.get("message") or {}
        content: list[dict[str, Any]] = []
        if part.get("thinking"):
            content.append({"type": "thinking", "thinking": part["thinking"]})
        if part.get("content"):
            content.append({"type": "text", "text": part["content"]})
        calls = _calls(part)
        content += [{"type": "tool_use", "id": id_, "name": name, "input": given} for id_, name, given in calls]
        return encode(
            {
                "id": self.identity,
                "type": "message",
                "role": "assistant",
                "model": value.get("model", ""),
                "content": content or None,
                "stop_reason": stop_reason(value, bool(calls)),
                "usage": {"input_tokens": self.prompt_tokens, "output_tokens": self.tokens},
            }
        )


class EventStream(Responder):
    """A streamed message: message_start, blocks with their deltas, message_delta, message_stop."""

    content_type = "text/event-stream"
    stream = True

    def __init__(self, identity: str, model: str, estimate: int) -> None:
        self._identity, self._model, self._estimate = identity, model, estimate
        self._lines = Lines()
        self._index = 0
        self._block = ""  # the kind of the block that is open
        self._called = False

    def feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        for line in self._lines.split(data):
            if self.done:
                raise UpstreamNonsense("lines after the last one")
            value = decode_line(line)
            if "error" in value:
                self.error = answers.error_of(line)
                break
            part = value.get("message")
            if not isinstance(part, dict):
                raise UpstreamNonsense("a line without a message")
            if not self.started:
                self.started = True
                out.append(self._start(value))
            self.tokens += 1
            self._part(part, out)
            if value.get("done") is True:
                self._end(value, out)
        return b"".join(out)

    def finish(self) -> bytes:
        return b""

    def resume(self) -> None:
        self._lines.rest, self.error = b"", None

    def _start(self, value: dict[str, Any]) -> bytes:
        usage = {"input_tokens": count(value.get("prompt_eval_count")) or self._estimate, "output_tokens": 0}
        message = {
            "id": self._identity,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "usage": usage,
        }
        return _event("message_start", {"message": message})

    def _part(self, part: dict[str, Any], out: list[bytes]) -> None:
        if part.get("thinking"):
            self._open("thinking", {"type": "thinking", "thinking": ""}, out)
            self._delta({"type": "thinking_delta", "thinking": text(part["thinking"])}, out)
        if part.get("content"):
            self._open("text", {"type": "text", "text": ""}, out)
            self._delta({"type": "text_delta", "text": text(part["content"])}, out)
        for identity, name, given in _calls(part):
            self._close(out)
            self._called = True
            self._open("tool_use", {"type": "tool_use", "id": identity, "name": name, "input": {}}, out)
            self._delta({"type": "input_json_delta", "partial_json": encode(given).decode()}, out)
            self._close(out)

    def _open(self, kind: str, block: dict[str, Any], out: list[bytes]) -> None:
        if self._block == kind:
            return
        self._close(out)
        self._block = kind
        out.append(_event("content_block_start", {"index": self._index, "content_block": block}))

    def _delta(self, delta: dict[str, Any], out: list[bytes]) -> None:
        out.append(_event("content_block_delta", {"index": self._index, "delta": delta}))

    def _close(self, out: list[bytes]) -> None:
        if self._block:
            self._block = ""
            out.append(_event("content_block_stop", {"index": self._index}))
            self._index += 1

    def _end(self, value: dict[str, Any], out: list[bytes]) -> None:
        self.done = True
        self.prompt_tokens, self.tokens = (
            count(value.get("prompt_eval_count")),
            count(value.get("eval_count")),
        )
        self._close(out)
        usage = {"input_tokens": self.prompt_tokens, "output_tokens": self.tokens}
        delta = {"stop_reason": stop_reason(value, self._called)}
        ended: dict[str, Any] = {"delta": delta, "usage": usage}
        if MARK in value:
            ended[MARK] = value[MARK]
        out.append(_event("message_delta", ended))
        out.append(_event("message_stop", {}))


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind} | data) + b"\n\n"
