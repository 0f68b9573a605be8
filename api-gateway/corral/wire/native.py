"""Ollama's native API: bodies in, the body for the node, and the answers passed on or put together."""

from __future__ import annotations

import re
from typing import Any, Final

from corral.wire import options as opts
from corral.wire.answers import Object, Pass, Whole
from corral.wire.bodies import UNSET, Chat, Embed, Embeddings, Generate, Show
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

KEEP_ALIVE: Final = -1
TOKENS_PER_IMAGE: Final = 256
"""Guesses, for what a node did not come to count."""

EMBED_BATCH: Final = 64
"""How many inputs of an embedding request go to a node at once: others have their turn between them."""

REPEATS_MAX: Final = 2000
"""How often a schema may have a part repeated. By more, or by less than nothing, Ollama's runner crashes (0.17.4), and
where no number of them fits it gives no answer."""
_REPEATS: Final[tuple[tuple[str, str], ...]] = (("minLength", "maxLength"), ("minItems", "maxItems"))
_ESCAPED: Final = re.compile(r"\\.", re.DOTALL)
_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_DIGITS: Final = re.compile(r"[0-9]+")

_chat: Final = Reader(Chat)
_generate: Final = Reader(Generate)
_embed: Final = Reader(Embed)
_embeddings: Final = Reader(Embeddings)
_show: Final = Reader(Show)


def decode_show(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    """`POST /api/show`. Raises ApiError."""
    show, ignored = _show.read(raw, caps)
    model = require_model(show.model or show.name)
    body = encode(Show(model=model, verbose=show.verbose))
    return Decoded(b"/api/show", model, body, 0, None, Object(), ignored=ignored)


def check_format(form: Any) -> None:
    """`format` is "json" or a schema, nested no deeper than `Caps.nesting`. Raises ApiError with Ollama's words."""
    if isinstance(form, dict):
        _check_schema(form)
        return
    if form is UNSET or form is None or form in ("", "json"):
        return
    shown = encode(form).decode()[:80]
    raise bad_request(f'invalid format: {shown}; expected "json" or a valid JSON Schema object', "format")


def _check_schema(part: Any) -> None:
    # Data such as an enum's is looked at as if it were a schema too: a property may be called "enum".
    if isinstance(part, list):
        for item in part:
            _check_schema(item)
    if not isinstance(part, dict):
        return
    for names in _REPEATS:
        least, most = (_repeats(name, part.get(name)) for name in names)
        if least is not None and most is not None and least > most:
            raise bad_request(f"format: {names[0]} is more than {names[1]}", "format")
    pattern = part.get("pattern")
    if isinstance(pattern, str):
        for braces in _BRACES.findall(_ESCAPED.sub("", pattern)):
            for digits in _DIGITS.findall(braces):
                # Not all of its digits: int() refuses thousands of them.
                _repeats("a repetition in pattern", int(digits.lstrip("0")[:9] or "0"))
    for item in part.values():
        _check_schema(item)


def _repeats(name: str, value: Any) -> int | float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if not 0 <= value <= REPEATS_MAX:
        raise bad_request(f"format: {name} must be from 0 to {REPEATS_MAX}", "format")
    return value


def prepare(body: Chat | Generate, policy_of: PolicyOf, caps: Caps) -> int | None:
    """Hold a chat or generate body to the policy, in place; the caller's bound of the answer is returned."""
    if body.format is not UNSET:
        check_format(body.format)
    body.stream = True
    body.truncate = False
    body.keep_alive = KEEP_ALIVE
    policy = policy_of(body.model)
    options = body.options
    if policy is None:
        if not options:
            return None
        policy = opts.NO_POLICY
    body.options = options = opts.check(options or {}, policy, caps.stops) or None
    limit = options.get("num_predict") if options else None
    return limit if isinstance(limit, int) and limit > 0 else None


def decode_chat(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    """`POST /api/chat`. Raises ApiError."""
    body, ignored = _chat.read(raw, caps)
    model = require_model(body.model)
    estimate = check_chat(body, raw, caps)
    stream = body.stream is not False
    max_tokens = prepare(body, policy_of, caps)
    responder = Pass() if stream else Whole("message")
    return Decoded(
        b"/api/chat",
        model,
        encode(body),
        estimate,
        max_tokens,
        responder,
        ignored=ignored,
        resumable=stream and is_text(body),
    )


def check_chat(body: Chat, raw: bytes, caps: Caps) -> int:
    """Caps on messages, images, tools and what is nested in them; a guess of the prompt's tokens. Raises ApiError."""
    messages = body.messages or []
    if len(messages) > caps.messages:
        raise bad_request(f"at most {caps.messages} messages", "messages")
    images = encoded = 0
    nested = body.format is not UNSET or body.tools
    for message in messages:
        nested = nested or message.tool_calls
        if message.images:
            images += len(message.images)
            encoded += check_images(message.images)
    if images > caps.images:
        raise bad_request(f"at most {caps.images} images", "messages")
    if nested:
        if body.tools and len(body.tools) > caps.tools:
            raise bad_request(f"at most {caps.tools} tools", "tools")
        check_depth(raw, caps.nesting)
    return (len(raw) - encoded) // CHARS_PER_TOKEN + images * TOKENS_PER_IMAGE


def is_text(body: Chat | Generate) -> bool:
    """Whether nothing but text is asked for, as far as the body's own fields say."""
    if body.format or body.think or body.logprobs or body.render_only:
        return False
    return not (isinstance(body, Chat) and body.tools)


def check_images(images: list[str]) -> int:
    """Inline images only; their size in base64. Raises ApiError."""
    for image in images:
        if ":" in image[:64]:  # no letter of base64, and in every address
            raise bad_request("images must be sent inline as base64, not by address", "images")
    return sum(map(len, images))


def decode_generate(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    """`POST /api/generate`. Raises ApiError."""
    body, ignored = _generate.read(raw, caps)
    model = require_model(body.model)
    estimate = len(raw) // CHARS_PER_TOKEN
    if body.images:
        if len(body.images) > caps.images:
            raise bad_request(f"at most {caps.images} images", "images")
        estimate += len(body.images) * TOKENS_PER_IMAGE - check_images(body.images) // CHARS_PER_TOKEN
    if body.context:
        check_context(body.context, caps)
    if body.format is not UNSET:
        check_depth(raw, caps.nesting)
    stream = body.stream is not False
    max_tokens = prepare(body, policy_of, caps)
    responder = Pass() if stream else Whole("response")
    return Decoded(
        b"/api/generate",
        model,
        encode(body),
        estimate,
        max_tokens,
        responder,
        ignored=ignored,
        resumable=stream and not body.suffix and not body.context and not body.images and is_text(body),
    )


def check_context(ids: list[int], caps: Caps) -> None:
    """The ids of an earlier answer's tokens. By one that its model does not know, Ollama's whole server ends (0.17.4:
    std::out_of_range as it makes text of them), and a gateway does not know the vocabularies. Raises ApiError."""
    if not caps.token_ids:
        raise bad_request(
            '"context" is not taken: send the conversation to /api/chat, or set gateway.request.token_ids', "context"
        )
    if not 0 <= min(ids) <= max(ids) < caps.token_ids:
        raise bad_request(f'"context" has ids of tokens from 0 to {caps.token_ids - 1}', "context")


def check_inputs(given: str | list[str] | None, caps: Caps) -> None:
    """A cap on the texts of one request. Raises ApiError."""
    if isinstance(given, list) and len(given) > caps.inputs:
        raise bad_request(f"at most {caps.inputs} inputs", "input")


def batches(body: Embed) -> tuple[bytes, ...]:
    """The bodies of its requests to nodes, one after the other."""
    given = body.input
    if not isinstance(given, list) or len(given) <= EMBED_BATCH:
        return (encode(body),)
    found: list[bytes] = []
    for at in range(0, len(given), EMBED_BATCH):
        body.input = given[at : at + EMBED_BATCH]
        found.append(encode(body))
    return tuple(found)


def decode_embed(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    """`POST /api/embed`. Raises ApiError."""
    body, ignored = _embed.read(raw, caps)
    model = require_model(body.model)
    check_inputs(body.input, caps)
    body.options = opts.check(body.options or {}, policy_of(model) or opts.NO_POLICY, caps.stops) or None
    body.truncate, body.keep_alive = False, KEEP_ALIVE
    first, *more = batches(body)
    return Decoded(
        b"/api/embed",
        model,
        first,
        len(raw) // CHARS_PER_TOKEN,
        None,
        Object(),
        ignored=ignored,
        more=more,
    )


def decode_embeddings(raw: bytes, request_id: str, policy_of: PolicyOf, caps: Caps = CAPS) -> Decoded:
    """`POST /api/embeddings`: its vectors are not normalised, so it is no form of embed. Raises ApiError."""
    body, ignored = _embeddings.read(raw, caps)
    model = require_model(body.model)
    body.options = opts.check(body.options or {}, policy_of(model) or opts.NO_POLICY, caps.stops) or None
    body.keep_alive = KEEP_ALIVE
    responder = Object()
    responder.counted = not body.prompt  # its answer is the vector alone; without a prompt it but loads the model
    return Decoded(
        b"/api/embeddings",
        model,
        encode(body),
        len(raw) // CHARS_PER_TOKEN,
        None,
        responder,
        ignored=ignored,
    )
