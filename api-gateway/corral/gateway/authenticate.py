"""Step 3: who calls. One extractor, a checksum before any look-up, and a constant-time comparison."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from ipaddress import ip_network
from re import Pattern
from re import compile as compile_pattern
from typing import Any, Final

from corral.fleet.node import canonical_name
from corral.store import keys
from corral.store.budget import Budget, of_key
from corral.store.keys import Network
from corral.wire.errors import ApiError

VERIFIED_MAX: Final = 10_000
PLACES_MAX: Final = 1000


@dataclass(slots=True, eq=False)
class Key:
    """A key as the gateway uses it. ``expires`` is epoch seconds. ``content``: its prompts and answers are kept.

    ``density`` is how many tokens its prompts were found to have for each that was guessed (`settle.learn`).
    ``deadline`` is how long a request of it may take that does not say so (seconds), None for as long as any.
    ``weight`` is its share where keys wait for the same model.
    ``networks`` is None for a key that may be used from anywhere; ``places`` are addresses that were found in them.
    ``ends`` has the end (epoch seconds) of each verifier that has one: an old text's, while the key rotates.
    """

    id: str
    tenant: str
    verifiers: list[bytes]
    patterns: list[Pattern[str]] | None
    networks: list[Network] | None
    expires: float | None
    revoked: bool
    batch: bool
    budget: Budget
    content: bool = False
    deadline: float | None = None
    weight: float = 1.0
    density: float = 1.0
    places: set[str] = field(default_factory=set)
    ends: dict[bytes, float] = field(default_factory=dict)

    def may_use(self, model: str) -> bool:
        """Whether one of the key's globs matches the model's canonical name, or its name without `:latest`."""
        if self.patterns is None:
            return True
        short = model.removesuffix(":latest")
        return any(pattern.match(model) or pattern.match(short) for pattern in self.patterns)


def build_key(entry: Mapping[str, Any], defaults: Mapping[str, int | None], tenant: Budget | None = None) -> Key:
    """A key from an entry of the snapshot; `defaults` are the limits of a key with none of its own."""
    globs = entry.get("models")
    networks = entry.get("networks")
    ends: dict[str, float] = entry.get("ends") or {}
    return Key(
        id=entry["id"],
        tenant=entry.get("tenant") or "default",
        verifiers=[bytes.fromhex(text) for text in entry["verifiers"]],
        patterns=None if globs is None or "*" in globs else [compile_pattern(translate(glob)) for glob in globs],
        networks=[ip_network(one) for one in networks] if networks else None,
        expires=entry.get("expires"),
        revoked=bool(entry.get("revoked")),
        batch=entry.get("class") == "batch",
        budget=of_key(entry, defaults, tenant),
        content=bool(entry.get("content")),
        deadline=entry.get("deadline"),
        weight=float(entry.get("weight") or 1.0),
        ends={bytes.fromhex(text): end for text, end in ends.items()},
    )


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, "unauthorized", message)


def credential(headers: Mapping[bytes, bytes]) -> str:
    """The one credential of a request: `Authorization: Bearer`, or `x-api-key` as Anthropic's clients send it.

    Raises:
        ApiError: 401 where there is none or it is malformed; 400 where two differ.
    """
    bearer, other = headers.get(b"authorization"), headers.get(b"x-api-key")
    found = other
    if bearer is not None:
        scheme, _, rest = bearer.partition(b" ")
        if scheme.lower() != b"bearer":
            raise _unauthorized("the Authorization header must be `Bearer <key>`")
        found = rest.strip()
        if other is not None and other != found:
            raise ApiError(400, "bad_request", "two different credentials: send Authorization or x-api-key, not both")
    if not found:
        raise _unauthorized("no API key: send `Authorization: Bearer crl_…`")
    return found.decode("latin-1")


def authenticate(
    headers: Mapping[bytes, bytes], known: Mapping[str, Key], pepper: bytes, wall: float, verified: dict[bytes, Key]
) -> Key:
    """The key of a request. `wall` is epoch seconds.

    `verified` remembers which `Authorization` headers were checked against the keys in `known`; whoever changes
    `known` empties it. It is looked up by the header's hash, whose seed no caller knows, so its timing tells nothing.
    A text that ends is checked each time.

    Raises:
        ApiError: 401 for a key that is missing, malformed, unknown, revoked or expired; says which.
    """
    bearer = headers.get(b"authorization")
    key = None if bearer is None or b"x-api-key" in headers else verified.get(bearer)
    if key is None:
        key, lasts = _verify(credential(headers), known, pepper, wall)
        if lasts and bearer is not None and b"x-api-key" not in headers:
            if len(verified) >= VERIFIED_MAX:
                verified.clear()
            verified[bearer] = key
    check(key, wall)
    return key


def check(key: Key | None, wall: float) -> None:
    """See that a key may be used now; None is one that is known no more. `wall` is epoch seconds.

    Raises:
        ApiError: 401 for one that is revoked or expired.
    """
    if key is None or key.revoked:
        raise _unauthorized("the API key was revoked")
    if key.expires is not None and wall >= key.expires:
        raise _unauthorized("the API key has expired")


def _verify(text: str, known: Mapping[str, Key], pepper: bytes, wall: float) -> tuple[Key, bool]:
    """The key of a text, and whether that text lasts as long as the key."""
    key_id = keys.parse(text)
    if key_id is None:
        raise _unauthorized("the API key is malformed: check that it was copied whole")
    key = known.get(key_id)
    digest = hmac.digest(pepper, text.encode(), "sha256")
    matched = False
    for verifier in key.verifiers if key is not None else ():
        matched |= hmac.compare_digest(verifier, digest)
    if key is None or not matched:
        raise _unauthorized("the API key is unknown")
    end = key.ends.get(digest)
    if end is not None and wall >= end:
        raise _unauthorized("the API key is unknown")
    return key, end is None


def locate(key: Key, address: str) -> None:
    """Refuse a caller outside the networks of a key that has some. `address` is the edge's word, or the peer's own.

    Raises:
        ApiError: 403 naming the address.
    """
    if key.networks is None or address in key.places:
        return
    if not keys.allows(key.networks, address):
        raise ApiError(403, "forbidden", f"the API key may not be used from {address or 'an unknown address'}")
    if len(key.places) >= PLACES_MAX:
        key.places.clear()
    key.places.add(address)


def authorize(key: Key, model: str, held: Collection[str] = (), disabled: Collection[str] = ()) -> None:
    """Refuse a model that the key may not use, with the same words as for one that nobody has."""
    if key.patterns is not None and not key.may_use(canonical_name(model)):
        raise not_found(key, model, held, disabled)


def not_found(key: Key, model: str, held: Collection[str], disabled: Collection[str] = ()) -> ApiError:
    """What is said of a model that nobody has. Of those that are held, and not disabled, it names the one whose name
    differs in upper and lower case alone, where the key may use it: Ollama takes both for the same."""
    wanted = canonical_name(model).casefold()
    alike = sorted(name for name in held if name.casefold() == wanted)
    near = [name for name in alike if key.may_use(name) and name not in disabled]
    hint = f"; did you mean '{near[0].removesuffix(':latest')}'?" if near else ""
    return ApiError(404, "model_not_found", f"model '{model}' not found{hint}", param="model")


def disabled(model: str) -> ApiError:
    """What is said of a model that was switched off, to those who may use it."""
    return ApiError(403, "model_disabled", f"model '{model}' is disabled by its operator", param="model")
