"""Anthropic's `/v1/messages` as Ollama serves it: the body becomes a native chat, the answer is translated back."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from corral.wire import bodies, native
from corral.wire.anthropic_answers import EventStream, MessageWhole
from corral.wire.bodies import Body, Message
from corral.wire.common import CAPS, Caps, Decoded, PolicyOf, Reader, check_depth, encode, require_model
from corral.wire.errors import bad_request


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


_messages = Reader(Messages)


def decode(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    """A request of `/v1/messages`. Raises ApiError."""
    body, ignored = _messages.read(raw, caps)
    if not body.model:
        raise bad_request("model is required", "model")
    model = require_model(body.model)
    if body.max_tokens is None or body.max_tokens <= 0:
        raise bad_request("max_tokens is required and must be positive", "max_tokens")
    if not body.messages:
        raise bad_request("messages is required", "messages")
    check_depth(raw, caps.nesting)
    options: dict[str, Any] = {"num_predict": body.max_tokens}
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(body, name)
        if value is not None:
            options[name] = value
    if body.stop_sequences:
        options["stop"] = body.stop_sequences
    chat = bodies.Chat(model=model, messages=conversation(body), options=options)
    if body.tools:
        chat.tools = [_tool(tool) for tool in body.tools]
    if body.thinking is not None and body.thinking.type == "enabled":
        chat.think = True
    estimate = native.check_chat(chat, raw, caps)
    max_tokens = native.prepare(chat, policy_of, caps)
    identity = f"msg_{request_id}"
    responder = EventStream(identity, model, estimate) if body.stream else MessageWhole(identity)
    sent, fallback, resumable = encode(chat), b"", body.stream and native.is_text(chat)
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
        ignored=ignored,
        resumable=resumable,
    )


def conversation(body: Messages) -> list[Message]:
    """Native messages of system prompt and turns. Raises ApiError."""
    system = body.system if isinstance(body.system, str) else _text(body.system or [])
    out = [Message(role="system", content=system)] if system else []
    for turn in body.messages:
        role = turn.role.lower()
        if isinstance(turn.content, str):
            out.append(Message(role=role, content=turn.content))
        else:
            out += _blocks(role, turn.content)
    return out


def _text(blocks: list[dict[str, Any]]) -> str:
    return "".join(
        block["text"] for block in blocks if block.get("type") == "text" and isinstance(block.get("text"), str)
    )


def _blocks(role: str, blocks: list[dict[str, Any]]) -> list[Message]:
    message = Message(role=role, content=_text(blocks))
    images: list[str] = []
    calls: list[Any] = []
    results: list[Message] = []
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
                Message(role="tool", content=text, tool_call_id=identity if isinstance(identity, str) else "")
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
