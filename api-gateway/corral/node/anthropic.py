"""Anthropic's /v1/messages, as Ollama translates it: text, images and system prompts; no tools."""

from __future__ import annotations

import base64
import contextlib
import secrets
from typing import Any

from starlette.requests import Request

from corral.node import decode
from corral.node.errors import NodeError
from corral.node.exchange import BARE_JSON, SSE, Reply, encode
from corral.node.faults import EndWithoutDone
from corral.node.inference import Answers, chat, folded
from corral.node.service import Node

_BAD = "invalid_request_error"
_FIELDS: decode.Fields = {
    "model": "string",
    "max_tokens": "int",
    "messages": ("[]anthropic.MessageParam", {"role": "string", "content": "any"}),
    "system": "any",
    "stream": "bool",
    "temperature": "float",
    "top_p": "float",
    "top_k": "int",
    "stop_sequences": "any",
    "tools": "any",
    "thinking": "any",
}
_STOP = {"stop": "end_turn", "length": "max_tokens"}
_KINDS = {400: _BAD, 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_KINDS |= {429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error"}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def error_body(error: NodeError) -> dict[str, Any]:
    kind = error.kind or _KINDS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": _id("req")}


def to_chat(request: dict[str, Any]) -> dict[str, Any]:
    """The native request for a decoded Anthropic one. Raises NodeError 400."""
    if not request.get("model"):
        raise NodeError(400, "model is required", _BAD)
    if request.get("max_tokens", 0) <= 0:
        raise NodeError(400, "max_tokens is required and must be positive", _BAD)
    if not request.get("messages"):
        raise NodeError(400, "messages is required", _BAD)
    messages = [_message(message) for message in request["messages"]]
    system = request.get("system")
    text = _text(system) if isinstance(system, list) else system
    if isinstance(text, str) and text:
        messages.insert(0, {"role": "system", "content": text})
    options = {"num_predict": request["max_tokens"]}
    options |= {name: request[name] for name in ("temperature", "top_p", "top_k") if name in request}
    if request.get("stop_sequences"):
        options["stop"] = request["stop_sequences"]
    native = {"model": request["model"], "messages": messages, "options": options}
    if request.get("tools"):
        native["tools"] = request["tools"]
    return native


def _text(blocks: list[Any]) -> str:
    return "".join(str(b.get("text", "")) for b in blocks if isinstance(b, dict) and b.get("type") == "text")


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message.get("role", "").lower(), message.get("content")
    if role not in ("user", "assistant", "system", "tool"):
        raise NodeError(400, f"invalid message role: {role}", _BAD)
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise NodeError(400, "invalid content block format", _BAD)
    images = [_image(block) for block in content if block.get("type") == "image"]
    texts = [_text(content)]
    texts += [_result(block) for block in content if block.get("type") == "tool_result"]
    return {"role": role, "content": "".join(texts), **({"images": images} if images else {})}


def _result(block: dict[str, Any]) -> str:
    content = block.get("content", "")
    return _text(content) if isinstance(content, list) else str(content)


def _image(block: dict[str, Any]) -> bytes:
    source = block.get("source")
    if not isinstance(source, dict):
        raise NodeError(400, "invalid image source", _BAD)
    if source.get("type") != "base64":
        kind = source.get("type", "")
        raise NodeError(400, f"invalid image source type: {kind}. Only base64 images are supported.", _BAD)
    try:
        return base64.b64decode(str(source.get("data", "")), validate=True)
    except ValueError as error:
        raise NodeError(400, f"invalid base64 image data: {error}", _BAD) from None


async def post_messages(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    reply.translated = True
    try:
        request = decode.body(body, "anthropic.MessagesRequest", _FIELDS)
    except NodeError as error:
        message = "EOF" if error.message == "missing request body" else error.message
        raise NodeError(400, message, _BAD) from None
    native = to_chat(request)
    base = {"id": _id("msg"), "type": "message", "role": "assistant", "model": native["model"]}
    if request.get("stream"):
        await _stream(reply, chat(node, native), base, _estimate(native))
        return
    held = []
    async with contextlib.aclosing(chat(node, native)) as answers:  # type: ignore[type-var]
        with contextlib.suppress(EndWithoutDone):
            held = [answer async for answer in answers if answer is not None]
    value = folded(held, lambda v: (v["message"], "content"))
    text = value["message"]["content"]
    await reply.json(
        {
            **base,
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": _STOP.get(value.get("done_reason", ""), "end_turn"),
            "usage": _usage(value),
        },
        content_type=BARE_JSON,
    )


def _usage(value: dict[str, Any]) -> dict[str, int]:
    return {"input_tokens": value.get("prompt_eval_count", 0), "output_tokens": value.get("eval_count", 0)}


def _estimate(native: dict[str, Any]) -> int:
    """Ollama's guess of the prompt's tokens, for the first event: a quarter of its characters."""
    characters = sum(len(message["role"]) + len(message["content"]) for message in native["messages"])
    return max(1, characters // 4)


async def _event(reply: Reply, kind: str, **fields: Any) -> None:
    await reply.chunk(f"event: {kind}\ndata: ".encode() + encode({"type": kind, **fields}) + b"\n\n")


async def _stream(reply: Reply, answers: Answers, base: dict[str, Any], estimate: int) -> None:
    opened = False
    async with contextlib.aclosing(answers):  # type: ignore[type-var]
        with contextlib.suppress(EndWithoutDone):
            async for answer in answers:
                reply.stream(SSE, cache_control="no-cache")
                if answer is None:
                    continue
                if not reply.started:
                    usage = {"input_tokens": estimate, "output_tokens": 0}
                    await _event(reply, "message_start", message={**base, "content": [], "usage": usage})
                if answer.raw is not None:
                    await reply.chunk(answer.raw)
                    continue
                if text := answer.value["message"]["content"]:
                    if not opened:
                        opened = True
                        block = {"type": "text", "text": ""}
                        await _event(reply, "content_block_start", index=0, content_block=block)
                    delta = {"type": "text_delta", "text": text}
                    await _event(reply, "content_block_delta", index=0, delta=delta)
                if answer.value["done"]:
                    if opened:
                        await _event(reply, "content_block_stop", index=0)
                    reason = _STOP.get(answer.value.get("done_reason", ""), "end_turn")
                    usage = _usage(answer.value)
                    await _event(reply, "message_delta", delta={"stop_reason": reason}, usage=usage)
                    await _event(reply, "message_stop")
    await reply.end()
