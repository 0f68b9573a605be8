"""OpenAI's `/v1` as Ollama serves it: bodies become native ones, answers are translated back.

The defaults, the ids and each field of the answers are those of Ollama's own `/v1` (0.17.4), compared field by field
in tests/conformance. One difference is meant: `n` is 1 or refused, where Ollama answers once without a word.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import msgspec

from corral.wire import bodies, native
from corral.wire import options as opts
from corral.wire.bodies import Body
from corral.wire.common import (
    CAPS,
    CHARS_PER_TOKEN,
    Caps,
    Decoded,
    PolicyOf,
    Reader,
    check_depth,
    encode,
    require_model,
)
from corral.wire.errors import bad_request
from corral.wire.openai_answers import ChatStream, ChatWhole, CompletionStream, CompletionWhole, EmbeddingList

EFFORTS = ("high", "medium", "low", "none")
IMAGE_PREFIXES = ("data:;base64,", *(f"data:image/{kind};base64," for kind in ("jpeg", "jpg", "png", "webp")))
UNSET = msgspec.UNSET


class FunctionCall(msgspec.Struct):
    """A call that the assistant made; ``arguments`` is JSON text."""

    name: str = ""
    arguments: str = ""


class ToolCall(msgspec.Struct):
    """One of a message's tool calls."""

    function: FunctionCall
    id: str = ""


class Message(msgspec.Struct):
    """A chat message; ``content`` is text or parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    tool_call_id: str | None = None


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool = False


class JsonSchema(msgspec.Struct):
    """`response_format.json_schema`."""

    schema: Any = None


class ResponseFormat(msgspec.Struct):
    """`response_format`."""

    type: str = ""
    json_schema: JsonSchema | None = None


class Reasoning(msgspec.Struct):
    """`reasoning`."""

    effort: str = ""


class Chat(Body):
    """`POST /v1/chat/completions`."""

    model: str = ""
    messages: list[Message] = msgspec.field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_p: float | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    n: int | None = None


class Completion(Body):
    """`POST /v1/completions`."""

    model: str = ""
    prompt: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_p: float | None = None
    suffix: str | None = None
    logprobs: int | None = None
    n: int | None = None


class Embeddings(Body):
    """`POST /v1/embeddings`."""

    model: str = ""
    input: str | list[str] | None = None
    dimensions: int | None = None
    encoding_format: str | None = None


_chat = Reader(Chat)
_completion = Reader(Completion)
_embeddings = Reader(Embeddings)


def short_id(request_id: str) -> str:
    """A number of three digits for an id, as Ollama has: the same for the same request."""
    return str(zlib.crc32(request_id.encode()) % 999)


def sampling(body: Chat | Completion) -> dict[str, Any]:
    """The options that both forms share, with OpenAI's defaults for temperature and top_p."""
    if body.n is not None and body.n != 1:
        raise bad_request("n must be 1: one answer a request", "n")
    options: dict[str, Any] = {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
    }
    if body.stop is not None:
        options["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.max_tokens is not None:
        options["num_predict"] = body.max_tokens
    for name in ("seed", "frequency_penalty", "presence_penalty"):
        value = getattr(body, name)
        if value is not None:
            options[name] = value
    return options


def decode_chat(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    body, ignored = _chat.read(raw, caps)
    model = require_model(body.model)
    if not body.messages:
        raise bad_request("[] is too short - 'messages'", "messages")
    options = sampling(body)
    if body.max_tokens is None and body.max_completion_tokens is not None:
        options["num_predict"] = body.max_completion_tokens
    chat = bodies.Chat(model=model, messages=messages(body.messages, raw, caps), options=options)
    if body.tools:
        chat.tools = body.tools
    form = response_format(body.response_format)
    if form is not None:
        chat.format = form
    effort = body.reasoning.effort if body.reasoning is not None else body.reasoning_effort
    if effort:
        if effort not in EFFORTS:
            words = ", ".join(f'"{word}"' for word in EFFORTS[:-1])
            raise bad_request(f"invalid reasoning value: '{effort}' (must be {words}, or \"none\")", "reasoning_effort")
        chat.think = False if effort == "none" else effort
    if body.logprobs:
        chat.logprobs = True
    if body.top_logprobs:
        chat.top_logprobs = body.top_logprobs  # without logprobs too: the node refuses what is out of its range
    estimate = native.check_chat(chat, raw, caps)
    max_tokens = native.prepare(chat, policy_of, caps)
    usage = body.stream_options is not None and body.stream_options.include_usage
    identity = f"chatcmpl-{short_id(request_id)}"
    stream = bool(body.stream)
    responder = ChatStream(identity, usage) if stream else ChatWhole(identity)
    return Decoded(
        b"/api/chat",
        model,
        encode(chat),
        estimate,
        max_tokens,
        responder,
        ignored=ignored,
        resumable=stream and native.is_text(chat),
    )


def response_format(form: ResponseFormat | None) -> Any:
    """Ollama's ``format`` for a `response_format`."""
    kind = form.type.strip().lower() if form is not None else ""
    if kind == "json_object":
        return "json"
    if kind == "json_schema" and form is not None and form.json_schema is not None:
        return form.json_schema.schema
    return None


def messages(given: list[Message], raw: bytes, caps: Caps) -> list[bodies.Message]:
    """Native messages; a message of several parts becomes one each, as Ollama does it. Raises ApiError."""
    out: list[bodies.Message] = []
    if any(isinstance(message.content, list) for message in given):
        check_depth(raw, caps.nesting)
    names = {call.id: call.function.name for message in given for call in message.tool_calls or [] if call.id}
    for message in given:
        role = message.role.lower()
        calls = [_call(call, caps) for call in message.tool_calls or []]
        if isinstance(message.content, list):
            start = len(out)
            out += [_part(role, part) for part in message.content]
            if len(out) == start:
                continue
            target = out[-1]
        elif message.content is None and message.tool_calls is None:
            raise bad_request("invalid message content type: <nil>", "messages.content")
        else:
            target = bodies.Message(role=role, content=message.content or "")
            out.append(target)
        if calls:
            target.tool_calls = calls
        if message.reasoning:
            target.thinking = message.reasoning
        if role == "tool":
            target.tool_name = message.name or names.get(message.tool_call_id or "", "")
        if message.tool_call_id:
            target.tool_call_id = message.tool_call_id
    return out


def _call(call: ToolCall, caps: Caps) -> dict[str, Any]:
    check_depth(call.function.arguments.encode(), caps.nesting)
    try:
        arguments = msgspec.json.decode(call.function.arguments)
    except msgspec.DecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_request("invalid tool call arguments", "messages.tool_calls")
    made: dict[str, Any] = {"function": {"index": 0, "name": call.function.name, "arguments": arguments}}
    return {"id": call.id} | made if call.id else made


def _part(role: str, part: dict[str, Any]) -> bodies.Message:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return bodies.Message(role=role, content=part["text"])
    if kind == "image_url":
        given = part.get("image_url")
        url = given.get("url") if isinstance(given, dict) else given
        if isinstance(url, str):
            return bodies.Message(role=role, content="", images=[inline_image(url)])
    raise bad_request("invalid message format", "messages.content")


def inline_image(url: str) -> str:
    """The base64 of a `data:` URL. Raises ApiError for any other."""
    if url.startswith(("http://", "https://")):
        raise bad_request(
            "image URLs are not currently supported, please use base64 encoded data instead",
            "messages.content",
        )
    for prefix in IMAGE_PREFIXES:
        if url.startswith(prefix):
            data = url[len(prefix) :]
            try:
                base64.b64decode(data, validate=True)
            except ValueError:
                break
            return data
    raise bad_request("invalid image input", "messages.content")


def decode_completion(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    body, ignored = _completion.read(raw, caps)
    model = require_model(body.model)
    options = {"frequency_penalty": 0.0, "presence_penalty": 0.0} | sampling(body)
    if body.top_p == 0.0:
        options["top_p"] = 1.0
    generate = bodies.Generate(model=model, prompt=body.prompt, options=options)
    if body.suffix:
        generate.suffix = body.suffix
    if body.logprobs is not None and body.logprobs > 0:
        generate.logprobs = True
        generate.top_logprobs = body.logprobs
    max_tokens = native.prepare(generate, policy_of, caps)
    usage = body.stream_options is not None and body.stream_options.include_usage
    identity = f"cmpl-{short_id(request_id)}"
    stream = bool(body.stream)
    responder = CompletionStream(identity, usage) if stream else CompletionWhole(identity)
    return Decoded(
        b"/api/generate",
        model,
        encode(generate),
        len(raw) // CHARS_PER_TOKEN,
        max_tokens,
        responder,
        ignored=ignored,
        resumable=stream and not body.suffix and native.is_text(generate),
    )


def decode_embeddings(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    body, ignored = _embeddings.read(raw, caps)
    model = require_model(body.model)
    if body.encoding_format is not None and body.encoding_format.lower() not in ("float", "base64"):
        raise bad_request(
            f"Invalid value for 'encoding_format' = {body.encoding_format}. Supported values: ['float', 'base64'].",
            "encoding_format",
        )
    if body.input is None or body.input == "" or body.input == []:
        raise bad_request("invalid input", "input")
    native.check_inputs(body.input, caps)
    embed = bodies.Embed(model=model, input=body.input, truncate=False, keep_alive=native.KEEP_ALIVE)
    if body.dimensions:
        embed.dimensions = body.dimensions
    embed.options = opts.check({}, policy_of(model) or opts.NO_POLICY, caps.stops) or None
    first, *more = native.batches(embed)
    responder = EmbeddingList(model, (body.encoding_format or "float").lower() == "base64")
    return Decoded(
        b"/api/embed",
        model,
        first,
        len(raw) // CHARS_PER_TOKEN,
        None,
        responder,
        ignored=ignored,
        more=more,
    )
