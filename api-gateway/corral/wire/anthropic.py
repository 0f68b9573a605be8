"""Anthropic's `/v1/messages` as Ollama serves it: the body becomes a native chat, the answer is translated back."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from corral.wire import answers, native
from corral.wire.common import Body, Decoded, Lines, PolicyOf, count, decode_line, encode, read, require_model
from corral.wire.errors import ApiError, UpstreamNonsense, bad_request

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class Turn(msgspec.Struct):
    """One message of the conversation; ``content`` is text or blocks."""

    role: str
    content: str | list[dict[str, Any]]


class Tool(msgspec.Struct):
    """A tool that the caller offers."""

    name: str = ""
    type: str = ""
    description: str = ""
    input_schema: dict[str, Any] | None = None


class Thinking(msgspec.Struct):
    """`thinking`."""

    type: str = ""


class Messages(Body):
    """`POST /v1/messages`."""

    model: str = ""
    max_tokens: int | None = None
    messages: list[Turn] = msgspec.field(default_factory=list)
    system: str | list[dict[str, Any]] | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[Tool] | None = None
    thinking: Thinking | None = None


_messages = msgspec.json.Decoder(Messages)


def decode(raw: bytes, request_id: str, policy_of: PolicyOf) -> Decoded:
    """A request of `/v1/messages`. Raises ApiError."""
    body = read(_messages, raw)
    if not body.model:
        raise bad_request("model is required", "model")
    model = require_model(body.model)
    if body.max_tokens is None or body.max_tokens <= 0:
        raise bad_request("max_tokens is required and must be positive", "max_tokens")
    if not body.messages:
        raise bad_request("messages is required", "messages")
    options: dict[str, Any] = {"num_predict": body.max_tokens}
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(body, name)
        if value is not None:
            options[name] = value
    if body.stop_sequences:
        options["stop"] = body.stop_sequences
    chat = native.Chat(model=model, messages=conversation(body), options=options)
    if body.tools:
        chat.tools = [_tool(tool) for tool in body.tools]
    if body.thinking is not None and body.thinking.type == "enabled":
        chat.think = True
    estimate = native.check_chat(chat, raw)
    max_tokens = native.prepare(chat, policy_of)
    identity = f"msg_{request_id}"
    responder = EventStream(identity, model, estimate) if body.stream else MessageWhole(identity)
    sent, fallback = encode(chat), b""
    if chat.think is True:
        chat.think = msgspec.UNSET
        fallback = encode(chat)
    return Decoded(
        b"/api/chat",
        model,
        sent,
        estimate,
        max_tokens,
        responder,
        fallback,
    )


def conversation(body: Messages) -> list[native.Message]:
    """Native messages of system prompt and turns. Raises ApiError."""
    system = body.system if isinstance(body.system, str) else _text(body.system or [])
    out = [native.Message(role="system", content=system)] if system else []
    for turn in body.messages:
        role = turn.role.lower()
        if isinstance(turn.content, str):
            out.append(native.Message(role=role, content=turn.content))
        else:
            out += _blocks(role, turn.content)
    return out


def _text(blocks: list[dict[str, Any]]) -> str:
    return "".join(
        block["text"] for block in blocks if block.get("type") == "text" and isinstance(block.get("text"), str)
    )


def _blocks(role: str, blocks: list[dict[str, Any]]) -> list[native.Message]:
    message = native.Message(role=role, content=_text(blocks))
    images: list[str] = []
    calls: list[Any] = []
    results: list[native.Message] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "image":
            images.append(_image(block.get("source")))
        elif kind == "tool_use":
            calls.append(_tool_use(block))
        elif kind == "tool_result":
            content = block.get("content")
            text = content if isinstance(content, str) else _text(content if isinstance(content, list) else [])
            identity = block.get("tool_use_id")
            results.append(
                native.Message(role="tool", content=text, tool_call_id=identity if isinstance(identity, str) else "")
            )
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            message.thinking = block["thinking"]
    if images:
        message.images = images
    if calls:
        message.tool_calls = calls
    if message.content or images or calls or message.thinking is not msgspec.UNSET:
        return [message, *results]
    return results


def _image(source: Any) -> str:
    if not isinstance(source, dict):
        raise bad_request("invalid image source", "messages.content")
    kind, data = source.get("type"), source.get("data")
    if kind != "base64" or not isinstance(data, str):
        raise bad_request(
            f"invalid image source type: {kind}. Only base64 images are supported.", "messages.content.source"
        )
    try:
        base64.b64decode(data, validate=True)
    except ValueError:
        raise bad_request("invalid base64 image data", "messages.content.source") from None
    return data


def _tool_use(block: dict[str, Any]) -> dict[str, Any]:
    for name in ("id", "name"):
        if not isinstance(block.get(name), str):
            raise bad_request(f"tool_use block missing required '{name}' field", "messages.content")
    arguments = block.get("input")
    function = {
        "index": 0,
        "name": block["name"],
        "arguments": arguments if isinstance(arguments, dict) else {},
    }
    return {"id": block["id"], "function": function}


def _tool(tool: Tool) -> dict[str, Any]:
    if tool.type not in ("", "custom"):
        raise bad_request(f"the built-in tool {tool.type!r} is not served here", "tools")
    parameters = tool.input_schema or {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def stop_reason(line: dict[str, Any], called: bool) -> str:
    """`stop_reason` of a last line."""
    return "tool_use" if called else STOP_REASONS.get(str(line.get("done_reason") or ""), "stop_sequence")


def _calls(part: dict[str, Any]) -> list[tuple[str, str, Any]]:
    made: list[tuple[str, str, Any]] = []
    for call in part.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UpstreamNonsense("a tool call without a function")
        made.append((call.get("id", ""), function.get("name", ""), function.get("arguments") or {}))
    return made


class MessageWhole(answers.Whole):
    """One message."""

    __slots__ = ("identity",)

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


class EventStream:
    """A streamed message: message_start, blocks with their deltas, message_delta, message_stop."""

    __slots__ = (
        "_block",
        "_called",
        "_estimate",
        "_identity",
        "_index",
        "_lines",
        "_model",
        "content_type",
        "done",
        "error",
        "prompt_tokens",
        "started",
        "stream",
        "tokens",
    )

    def __init__(self, identity: str, model: str, estimate: int) -> None:
        self.content_type = "text/event-stream"
        self.stream = True
        self.started = self.done = False
        self.error: ApiError | None = None
        self.prompt_tokens = self.tokens = 0
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
                return b""
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
            self._delta({"type": "thinking_delta", "thinking": part["thinking"]}, out)
        if part.get("content"):
            self._open("text", {"type": "text", "text": ""}, out)
            self._delta({"type": "text_delta", "text": part["content"]}, out)
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
        out.append(_event("message_delta", {"delta": delta, "usage": usage}))
        out.append(_event("message_stop", {}))


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind} | data) + b"\n\n"
