"""What the three APIs share: reading JSON strictly, refusals by name, and the interface of a responder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar

import msgspec

from corral.wire.bodies import UPSTREAM_FIELDS, Refused
from corral.wire.errors import ApiError, UpstreamNonsense, bad_request
from corral.wire.options import ModelPolicy
from corral.wire.transcript import Transcript

LINE_MAX: Final = 1 << 20
MARK: Final = "corral"
"""The field of an answer's last event that says that other nodes went on with it, and which."""
CHARS_PER_TOKEN: Final = 4
"""A guess, for what a node did not come to count."""
COUNT_MAX: Final = (1 << 31) - 1

BRACKETS_MAX: Final = 100_000


@dataclass(slots=True, frozen=True)
class Caps:
    """What one request may hold (``gateway.request`` of corral.yaml). ``nesting``: depth of arrays and objects.
    ``token_ids``: those of a ``context`` are lower; 0: none is taken."""

    messages: int = 2048
    images: int = 16
    tools: int = 128
    inputs: int = 2048
    stops: int = 16
    nesting: int = 64
    token_ids: int = 0


CAPS: Final = Caps()
PolicyOf = Callable[[str], ModelPolicy | None]
T = TypeVar("T", bound=msgspec.Struct)

encode: Final = msgspec.json.Encoder().encode
_any: Final = msgspec.json.Decoder().decode
_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")

_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_UNKNOWN: Final = "Object contains unknown field"


class Responder:
    """Translates one answer of a node for the caller. A base, since compiled code knows where its attributes are.

    ``started``: a first token, or the end, was seen. ``done``: the last line was seen. ``error``: the node sent an
    error in band; what came before it is emitted, and nothing for it. ``tokens`` counts generated tokens, exact once
    ``done``. ``early``: it is done, and what the node may still send is not wanted. ``kept``: answers that this one has
    begun with; their prompts are counted in ``prompt_tokens``, which is else 0 until ``done``. ``counted``: the node
    tells how many tokens it took.
    """

    content_type = "application/json"
    stream = False
    started = False
    done = False
    early = False
    error: ApiError | None = None
    prompt_tokens = 0
    tokens = 0
    kept = 0
    counted = True

    def keep(self) -> None:
        """The answer so far is one of several that make one."""
        raise NotImplementedError

    def drop(self) -> None:
        """Forget what came since the last `keep`: it is asked again."""
        raise NotImplementedError

    def feed(self, data: bytes) -> bytes:
        """Bytes of the node's body in, in any cut; bytes for the caller out. Raises UpstreamNonsense."""
        raise NotImplementedError

    def finish(self) -> bytes:
        """After the node's orderly end: the tail of a stream, or the whole JSON body."""
        raise NotImplementedError

    def said(self) -> str | None:
        """The text of an answer that is put together here; None of any other."""
        return None

    def resume(self) -> None:
        """Forget a line that was cut and the error that cut it: another node goes on with the next line."""
        self.error = None


class Decoded:
    """A request as it goes to a node. Written out, as a dataclass's `__init__` is not compiled.

    ``estimate`` is a guess of the prompt's tokens; ``max_tokens`` the caller's bound of the answer. ``fallback``: the
    body for a model that cannot think, where the caller does not insist on it (Anthropic clients). ``ignored``: fields
    of the body that mean nothing here. ``resumable``: a stream of nothing but text, as far as the request says: another
    node could go on with it. ``more``: bodies for what is to be asked after that, one after the other: one answer is
    made of all. ``transcript``: what is said, kept where the fleet could go on with it, hashed where the record wants
    that.
    """

    __slots__ = (
        "body",
        "estimate",
        "fallback",
        "ignored",
        "max_tokens",
        "model",
        "more",
        "responder",
        "resumable",
        "transcript",
        "upstream_path",
    )

    def __init__(
        self,
        upstream_path: bytes,
        model: str,
        body: bytes,
        estimate: int,
        max_tokens: int | None,
        responder: Responder,
        fallback: bytes = b"",
        ignored: int = 0,
        resumable: bool = False,
        more: Sequence[bytes] = (),
    ) -> None:
        self.upstream_path = upstream_path
        self.model = model
        self.body = body
        self.estimate = estimate
        self.max_tokens = max_tokens
        self.responder = responder
        self.fallback = fallback
        self.ignored = ignored
        self.resumable = resumable
        self.more = more
        self.transcript: Transcript | None = None

    @property
    def reads(self) -> int:
        """A guess of the tokens in the body: of embeddings one batch, that may be the one with all the long texts."""
        return len(self.body) // CHARS_PER_TOKEN if self.upstream_path == b"/api/embed" else self.estimate

    def go_on(self) -> None:
        """An answer is whole, and there is more to ask."""
        self.responder.keep()
        self.body, self.more = self.more[0], self.more[1:]

    def without_thinking(self, refusal: str) -> bool:
        """Give up thinking, once, where a node refused it; whether the request is to be sent again."""
        if not self.fallback or "does not support thinking" not in refusal:
            return False
        self.body, self.fallback = self.fallback, b""
        return True


class Reader(Generic[T]):
    """Reads the bodies of one type; of what it does not know, only how much there was is known."""

    def __init__(self, kind: type[T]) -> None:
        # Most bodies have no unknown field: they are read once, by a type that has none. The other type has the fields
        # that are refused, with a type that no value fits.
        strict: Any = msgspec.defstruct(kind.__name__, [], bases=(kind,), forbid_unknown_fields=True)
        refused = [(name, Refused, msgspec.UNSET) for name in UPSTREAM_FIELDS]
        lenient: Any = msgspec.defstruct(kind.__name__, refused, bases=(kind,))
        self._strict: Callable[[bytes], T] = msgspec.json.Decoder(strict).decode
        self._lenient: Callable[[bytes], T] = msgspec.json.Decoder(lenient).decode
        self._known = frozenset(kind.__struct_encode_fields__)

    def read(self, raw: bytes, caps: Caps) -> tuple[T, int]:
        """A typed body, and how many of its fields are ignored.

        Raises:
            ApiError: 400 naming the field; fields that could name an upstream are refused by name.
        """
        if not raw:
            raise bad_request("missing request body")
        try:
            try:
                return self._strict(raw), 0
            except msgspec.ValidationError as unknown:
                if not str(unknown).startswith(_UNKNOWN):
                    raise
            body = self._lenient(raw)
            check_depth(raw, caps.nesting)
            return body, len(_fields(raw).keys() - self._known)
        except msgspec.ValidationError as invalid:
            text = str(invalid)
            path = text.rpartition(" - at `$")[2].rstrip("`").lstrip(".") if " - at `$" in text else ""
            if path in UPSTREAM_FIELDS:
                message = f"the field `{path}` is not accepted: the gateway alone chooses where a request goes"
            else:
                message = f"invalid request: {text.replace('`$.', '`')}"
            raise bad_request(message, path or None) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad_request(f"the body is not JSON: {error}") from None
        except RecursionError:
            raise bad_request(f"the body is nested deeper than {caps.nesting} levels") from None


def check_depth(raw: bytes, most: int) -> None:
    """Refuse JSON that is nested deeper than `most` levels, for bodies whose types leave the depth open.

    Raises:
        ApiError: 400; also for more than `BRACKETS_MAX` arrays and objects.
    """
    # Brackets within strings only make the count too high, so a low count settles it without a closer look.
    if raw.count(b"{") + raw.count(b"[") <= most:
        return
    brackets = _STRING.sub(b"", raw).translate(None, _NO_BRACKETS)
    if len(brackets) > 2 * BRACKETS_MAX:
        raise bad_request(f"the body has more than {BRACKETS_MAX} arrays and objects")
    depth = 0
    for bracket in brackets:
        if bracket in b"{[":
            depth += 1
            if depth > most:
                raise bad_request(f"the body is nested deeper than {most} levels")
        else:
            depth -= 1


@lru_cache(4096)
def require_model(model: str) -> str:
    """The model's name as sent, if it is one.

    Raises:
        ApiError: 400 where it is missing or malformed.
    """
    if not model:
        raise bad_request("model is required", "model")
    if "crl_" in model:
        raise bad_request("the model's name looks like an API key", "model")  # and would be in every record
    if len(model) > 256 or not _MODEL.fullmatch(model):
        raise bad_request(f"model name {model[:80]!r} is malformed", "model")
    return model


_MODEL: Final = re.compile(r"[A-Za-z0-9._:/-]+")


def fields_of(text: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a node's answer as they were sent. Raises UpstreamNonsense: it is no JSON object."""
    try:
        if not text.isascii():
            text.decode()  # strings within a field that is left as it is are not looked at
        return _fields(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UpstreamNonsense(f"an answer that is no object: {text[:80]!r}") from None


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
    """A token count of a node; anything but a whole number from 0 to `COUNT_MAX` counts as none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= COUNT_MAX else 0


def text(value: Any) -> str:
    """A string of a node's line; null counts as none.

    Raises:
        UpstreamNonsense: it is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UpstreamNonsense(f"no text where one belongs: {type(value).__name__}")
    return value


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
