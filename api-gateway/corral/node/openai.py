"""OpenAI's routes, as Ollama translates them: /v1/chat/completions, completions, embeddings, models."""

from __future__ import annotations

import base64
import contextlib
import random
import struct
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from corral.node import decode, names
from corral.node.errors import NodeError
from corral.node.exchange import BARE_JSON, SSE, Reply, encode
from corral.node.faults import EndWithoutDone
from corral.node.inference import Answers, chat, folded, generate
from corral.node.management import show
from corral.node.native import embed
from corral.node.service import Node

_BAD = "invalid_request_error"

_STREAM: decode.Fields = {
    "stream": "bool",
    "stream_options": ("openai.StreamOptions", {"include_usage": "bool"}),
    "model": "string",
    "max_tokens": "int",
    "seed": "int",
    "stop": "any",
    "_debug_render_only": "bool",
}
_MESSAGE: decode.Fields = {
    "role": "string",
    "content": "any",
    "reasoning": "string",
    "tool_calls": "any",
    "name": "string",
    "tool_call_id": "string",
}
_CHAT: decode.Fields = {
    **_STREAM,
    "messages": ("[]openai.Message", _MESSAGE),
    "temperature": "float",
    "frequency_penalty": "float",
    "presence_penalty": "float",
    "top_p": "float",
    "response_format": (
        "openai.ResponseFormat",
        {"type": "string", "json_schema": ("openai.JsonSchema", {"schema": "any"})},
    ),
    "tools": ("api.Tools", {}),
    "reasoning": ("openai.Reasoning", {"effort": "string"}),
    "reasoning_effort": "string",
    "logprobs": "bool",
    "top_logprobs": "int",
}
_COMPLETION: decode.Fields = {
    **_STREAM,
    "prompt": "string",
    "temperature": "float32",
    "frequency_penalty": "float32",
    "presence_penalty": "float32",
    "top_p": "float32",
    "suffix": "string",
    "logprobs": "int",
}
_EMBED: decode.Fields = {"input": "any", "model": "string", "dimensions": "int", "encoding_format": "string"}


def error_body(error: NodeError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.kind or "api_error", "param": None, "code": None}}


def _body(data: bytes, struct_: str, fields: decode.Fields) -> dict[str, Any]:
    if not data.strip():
        raise NodeError(400, "EOF", _BAD)
    try:
        return decode.body(data, struct_, fields)
    except NodeError as error:
        raise NodeError(error.status, error.message, _BAD) from None


# --- requests


def _options(request: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
    for ours, theirs in (("num_predict", "max_tokens"), ("seed", "seed"), ("temperature", "temperature")):
        if theirs in request:
            options[ours] = request[theirs]
    for name in ("frequency_penalty", "presence_penalty", "top_p"):
        if name in request:
            options[name] = request[name]
    stop = request.get("stop")
    if isinstance(stop, str):
        options["stop"] = [stop]
    elif isinstance(stop, list):
        options["stop"] = [item for item in stop if isinstance(item, str)]
    return options


def to_chat(request: dict[str, Any]) -> dict[str, Any]:
    """The native request for a decoded chat completion. Raises NodeError 400 with Ollama's texts."""
    if not request.get("messages"):
        raise NodeError(400, "[] is too short - 'messages'", _BAD)
    native: dict[str, Any] = {
        "model": request.get("model", ""),
        "messages": [part for message in request["messages"] for part in _messages(message)],
        "options": _options(request),
        "stream": request.get("stream", False),
    }
    wanted = request.get("response_format", {})
    kind = wanted.get("type", "").strip().lower()
    if kind == "json_object":
        native["format"] = "json"
    elif kind == "json_schema" and "json_schema" in wanted:
        native["format"] = wanted["json_schema"].get("schema")
    effort = request.get("reasoning", {}).get("effort") or request.get("reasoning_effort")
    if effort:
        if effort not in ("high", "medium", "low", "none"):
            levels = '"high", "medium", "low", or "none"'
            raise NodeError(400, f"invalid reasoning value: '{effort}' (must be {levels})", _BAD)
        native["think"] = False if effort == "none" else effort
    for name in ("tools", "logprobs", "top_logprobs", "_debug_render_only"):
        if name in request:
            native[name] = request[name]
    return native


def _messages(message: dict[str, Any]) -> list[dict[str, Any]]:
    """One OpenAI message as Ollama's: each part of a list becomes a message of its own."""
    role, content = message.get("role", ""), message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if isinstance(content, list):
        return [{"role": role, **_part(part)} for part in content]
    if message.get("tool_calls"):
        return [{"role": role, "content": ""}]
    kinds = {type(None): "<nil>", bool: "bool", dict: "map[string]interface {}"}
    raise NodeError(400, f"invalid message content type: {kinds.get(type(content), 'float64')}", _BAD)


def _part(part: Any) -> dict[str, Any]:
    bad = NodeError(400, "invalid message format", _BAD)
    if not isinstance(part, dict):
        raise bad
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"content": part["text"]}
    if part.get("type") == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            return {"content": "", "images": [_image(url)]}
    raise bad


def _image(url: str) -> bytes:
    if url.startswith(("http://", "https://")):
        text = "image URLs are not currently supported, please use base64 encoded data instead"
        raise NodeError(400, text, _BAD)
    head, comma, data = url.partition(",")
    known = {"data:;base64", *(f"data:image/{kind};base64" for kind in ("jpeg", "jpg", "png", "webp"))}
    try:
        if comma and head in known:
            return base64.b64decode(data, validate=True)
    except ValueError:
        pass
    raise NodeError(400, "invalid image input", _BAD)


# --- answers


def _usage(value: dict[str, Any]) -> dict[str, int]:
    before, after = value.get("prompt_eval_count", 0), value.get("eval_count", 0)
    return {"prompt_tokens": before, "completion_tokens": after, "total_tokens": before + after}


def _choice(value: dict[str, Any], **text: Any) -> dict[str, Any]:
    choice = {"index": 0, **text, "finish_reason": value.get("done_reason")}
    if "logprobs" in value and "text" not in text:
        choice["logprobs"] = {"content": value["logprobs"]}
    return choice


def _chat_choice(value: dict[str, Any], stream: bool) -> dict[str, Any]:
    message = {"role": "assistant" if stream else value["message"]["role"], "content": value["message"]["content"]}
    return _choice(value, **{"delta" if stream else "message": message})


def _completion_choice(value: dict[str, Any], stream: bool) -> dict[str, Any]:
    return _choice(value, text=value["response"])


async def post_chat(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    reply.translated = True
    request = _body(body, "openai.ChatCompletionRequest", _CHAT)
    answers = chat(node, to_chat(request))
    await _send(reply, answers, request, "chat.completion", "chatcmpl", _chat_choice)


async def post_completion(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    reply.translated = True
    request = _body(body, "openai.CompletionRequest", _COMPLETION)
    stop = request.get("stop")
    if isinstance(stop, list) and not all(isinstance(item, str) for item in stop):
        raise NodeError(400, "invalid type for 'stop' field: float64", _BAD)
    options = {"frequency_penalty": 0.0, "presence_penalty": 0.0, **_options(request)}
    options["top_p"] = options["top_p"] or 1.0
    native = {
        "model": request.get("model", ""),
        "prompt": request.get("prompt", ""),
        "suffix": request.get("suffix", ""),
        "options": options,
        "stream": request.get("stream", False),
        "logprobs": request.get("logprobs", 0) > 0,
        "top_logprobs": max(0, request.get("logprobs", 0)),
        "_debug_render_only": request.get("_debug_render_only", False),
    }
    await _send(reply, generate(node, native), request, "text_completion", "cmpl", _completion_choice)


async def _send(
    reply: Reply,
    answers: Answers,
    request: dict[str, Any],
    kind: str,
    prefix: str,
    choice: Callable[[dict[str, Any], bool], dict[str, Any]],
) -> None:
    stream = request.get("stream", False)
    usage = stream and request.get("stream_options", {}).get("include_usage", False)
    base: dict[str, Any] = {
        "id": f"{prefix}-{random.randrange(999)}",
        "object": "chat.completion.chunk" if stream and kind == "chat.completion" else kind,
        "created": int(time.time()),
        "model": request.get("model", ""),
        "system_fingerprint": "fp_ollama",
    }
    held = []
    async with contextlib.aclosing(answers):  # type: ignore[type-var]
        with contextlib.suppress(EndWithoutDone):
            async for answer in answers:
                if answer is None:
                    if stream:
                        reply.stream(SSE)
                    continue
                if not stream:
                    held.append(answer)
                    continue
                reply.stream(SSE)
                value = answer.value
                if answer.raw is not None:
                    await reply.chunk(b"data: " + answer.raw + b"\n")
                    continue
                chunk = {**base, "created": int(time.time()), "choices": [choice(value, True)]}
                if usage and kind == "text_completion":
                    chunk["usage"] = _usage({})
                await _event(reply, chunk)
                if value.get("done"):
                    if usage:
                        await _event(reply, {**chunk, "choices": [], "usage": _usage(value)})
                    await reply.chunk(b"data: [DONE]\n\n")
    if stream:
        await reply.end()
        return
    value = held[-1].value if held else {}
    if len(held) > 1:
        value = folded(held, lambda v: (v["message"], "content") if "message" in v else (v, "response"))
    found = {**base, "choices": [choice(value, False)], "usage": _usage(value)}
    if "_debug_info" in value:
        found["_debug_info"] = value["_debug_info"]
    await reply.json(found, content_type=BARE_JSON)


async def _event(reply: Reply, value: dict[str, Any]) -> None:
    await reply.chunk(b"data: " + encode(value) + b"\n\n")


# --- embeddings and models


async def post_embeddings(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    reply.translated = True
    request = _body(body, "openai.EmbedRequest", _EMBED)
    form = request.get("encoding_format", "")
    if form.lower() not in ("", "float", "base64"):
        text = f"Invalid value for 'encoding_format' = {form}. Supported values: ['float', 'base64']."
        raise NodeError(400, text, _BAD)
    given = request.get("input")
    if given is None or given == []:
        raise NodeError(400, "invalid input", _BAD)
    native = {"model": request.get("model", ""), "input": [""] if given == "" else given}
    found = await embed(node, {**native, "dimensions": request.get("dimensions", 0)})
    vectors = found["embeddings"]
    if form.lower() == "base64":
        vectors = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in vectors]
    count = found.get("prompt_eval_count", 0)
    data = [{"object": "embedding", "embedding": vector, "index": at} for at, vector in enumerate(vectors)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    await reply.json({"object": "list", "data": data, "model": native["model"], "usage": usage}, content_type=BARE_JSON)


async def get_models(node: Node, _: Request, body: bytes, reply: Reply) -> None:
    data = [_model(model.name.short, model.modified_ns // 10**9) for model in node.store.all()]
    await reply.json({"object": "list", "data": data or None}, content_type=BARE_JSON)


async def get_model(node: Node, request: Request, body: bytes, reply: Reply) -> None:
    reply.translated = True
    text = request.path_params["model"]
    await show(node, {"model": text})
    model = node.model(text)
    await reply.json(_model(text, model.modified_ns // 10**9), content_type=BARE_JSON)


def _model(text: str, created: int) -> dict[str, Any]:
    return {"id": text, "object": "model", "created": created, "owned_by": names.parse(text).namespace}
