"""What the three APIs share: reading JSON strictly, refusals by name, and the interface of a responder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from corral.wire.errors import ApiError, UpstreamNonsense, bad_request
from corral.wire.options import ModelPolicy

NESTING_MAX = 64
MESSAGES_MAX = 2048
IMAGES_MAX = 16
TOOLS_MAX = 128
LINE_MAX = 1 << 20

UPSTREAM_FIELDS = (
    "api_base",
    "base_url",
    "api_key",
    "api_version",
    "endpoint",
    "host",
    "upstream",
    "node",
    "proxy",
    "url",
    "webhook",
    "callback_url",
)
"""Top-level fields by which some gateways let a caller name where a request goes. Here none does."""

PolicyOf = Callable[[str], ModelPolicy | None]
T = TypeVar("T", bound=msgspec.Struct)

encode = msgspec.json.Encoder().encode
_any = msgspec.json.Decoder().decode
_UPSTREAM = re.compile(b'"(?:' + "|".join(UPSTREAM_FIELDS).encode() + b')"')


class Responder(Protocol):
    """Translates one answer of a node for the caller.

    ``started``: a first token, or the end, was seen. ``done``: the last line was seen. ``error``: the node sent an
    error in band; nothing is emitted for it. ``tokens`` counts generated tokens, exact once ``done``.
    """

    content_type: str
    stream: bool
    started: bool
    done: bool
    error: ApiError | None
    prompt_tokens: int
    tokens: int

    def feed(self, data: bytes) -> bytes:
        """Bytes of the node's body in, in any cut; bytes for the caller out. Raises UpstreamNonsense."""

    def finish(self) -> bytes:
        """After the node's orderly end: the tail of a stream, or the whole JSON body."""


@dataclass(slots=True)
class Decoded:
    """A request as it goes to a node.

    ``estimate`` is a guess of the prompt's tokens; ``max_tokens`` the caller's bound of the answer.
    """

    api: str
    route: str
    model: str
    stream: bool
    upstream_path: str
    body: bytes
    estimate: int
    max_tokens: int | None
    responder: Responder
    fallback: bytes = b""
    """The body for a model that cannot think, where the caller does not insist on it (Anthropic clients)."""

    def without_thinking(self, refusal: str) -> bool:
        """Give up thinking, once, where a node refused it; whether the request is to be sent again."""
        if not self.fallback or "does not support thinking" not in refusal:
            return False
        self.body, self.fallback = self.fallback, b""
        return True


def read(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """A typed body.

    Raises:
        ApiError: 400 naming the field; fields that could name an upstream are refused by name.
    """
    if not raw:
        raise bad_request("missing request body")
    try:
        body = decoder.decode(raw)
    except msgspec.ValidationError as error:
        text = str(error)
        path = text.rpartition(" - at `$")[2].rstrip("`") if " - at `$" in text else ""
        raise bad_request(f"invalid request: {text.replace('`$.', '`')}", path.lstrip(".") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise bad_request(f"the body is nested deeper than {NESTING_MAX} levels") from None
    if _UPSTREAM.search(raw) is not None:
        _refuse_upstream(raw)
    return body


def _refuse_upstream(raw: bytes) -> None:
    value: Any = _any(raw)
    for name in UPSTREAM_FIELDS:
        if isinstance(value, dict) and name in value:
            raise bad_request(
                f"the field `{name}` is not accepted: the gateway alone chooses where a request goes", name
            )


def check_depth(raw: bytes) -> None:
    """Refuse a body nested deeper than `NESTING_MAX`, whether or not its types allow it.

    Raises:
        ApiError: 400.
    """
    # Brackets within strings only make the count too high, so a low count settles it without a parse.
    if raw.count(b"{") + raw.count(b"[") <= NESTING_MAX:
        return
    depth = deepest = 0
    in_string = False
    escaped = False
    for byte in raw:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"}]":
            depth -= 1
    if deepest > NESTING_MAX:
        raise bad_request(f"the body is nested deeper than {NESTING_MAX} levels")


def require_model(model: str) -> str:
    """The model's name as sent, if it is one.

    Raises:
        ApiError: 400 where it is missing or malformed.
    """
    if not model:
        raise bad_request("model is required", "model")
    if len(model) > 256 or not _MODEL.fullmatch(model):
        raise bad_request(f"model name {model[:80]!r} is malformed", "model")
    return model


_MODEL = re.compile(r"[A-Za-z0-9._:/-]+")


def decode_line(line: bytes) -> dict[str, Any]:
    """One line of a node's answer.

    Raises:
        UpstreamNonsense: it is no JSON object.
    """
    try:
        value = _any(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UpstreamNonsense(f"a line that is no JSON: {line[:80]!r}") from None
    if not isinstance(value, dict):
        raise UpstreamNonsense(f"a line that is no object: {line[:80]!r}")
    return value


def count(value: Any) -> int:
    """A token count of a node; anything but a whole number from 0 counts as none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


class Lines:
    """Splits a body into lines whatever its cuts; what is unfinished waits, bounded."""

    __slots__ = ("rest",)

    def __init__(self) -> None:
        self.rest = b""

    def split(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, without their ends, blank ones left out.

        Raises:
            UpstreamNonsense: a line longer than `LINE_MAX`.
        """
        if self.rest:
            data = self.rest + data
        *lines, self.rest = data.split(b"\n")
        if len(self.rest) > LINE_MAX:
            raise UpstreamNonsense(f"a line of more than {LINE_MAX} bytes")
        return [line for line in lines if line.strip()]
