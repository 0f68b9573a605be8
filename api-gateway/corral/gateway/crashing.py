"""Prompts that runners crash under: who was present at two crashes is refused for ten minutes.

A request counts its own crashes. No prompt is refused for nodes that were lost: they are for many reasons, several at
once among them, and their runners hardly. Beyond one request, a runner's crash is remembered where the prompt was alone
with it, since a prompt that others send too would be blamed for theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final

import msgspec

from corral.fleet.node import canonical_name
from corral.gateway.recover import CRASHES_MAX
from corral.wire.common import Decoded, encode
from corral.wire.errors import ApiError

REFUSED_FOR: Final = 600.0
KNOWN_MAX: Final = 1000
CHANNEL: Final = b"corral:crashing"
"""Where gateways tell each other the fingerprints."""

_body: Final[Callable[[bytes], dict[str, Any]]] = msgspec.json.Decoder(dict[str, Any]).decode
_PROMPT = ("messages", "prompt", "system", "suffix", "images", "input")


def fingerprint(decoded: Decoded) -> str:
    """What stands for model and prompt, whatever the options; 32 hexadecimal digits."""
    body = _body(decoded.body)
    parts: list[Any] = [canonical_name(decoded.model)]
    parts += [body.get(name) for name in _PROMPT]
    return blake2b(encode(parts), digest_size=16).hexdigest()


def refused() -> ApiError:
    """What the caller hears: 400, since clients repeat what is answered with a 5xx."""
    message = f"this prompt was present at {CRASHES_MAX} crashes of its model: it is refused for some minutes"
    return ApiError(400, "prompt_refused", message)


class Crashing:
    """What this gateway knows of such prompts. ``refused`` and ``seen`` hold until when (monotonic seconds)."""

    def __init__(self) -> None:
        self.refused: dict[str, float] = {}
        self._seen: dict[str, float] = {}

    def refuses(self, decoded: Decoded, now: float) -> bool:
        """Whether it is such a prompt."""
        known = self.refused
        for name in [name for name, end in known.items() if end <= now]:
            del known[name]
        return bool(known) and fingerprint(decoded) in known

    def present(self, decoded: Decoded, crashes: int, runner: bool, alone: bool, now: float) -> str:
        """A request was there at a crash, its ``crashes``th: the fingerprint, if it is refused from now on, else "".

        ``runner``: the model's runner crashed, the node lives. ``alone``: no other request was on the node.
        """
        if not runner or (not alone and crashes < CRASHES_MAX):
            return ""
        name = fingerprint(decoded)
        before = self._seen.get(name, 0.0)
        if alone:
            _note(self._seen, name, now + REFUSED_FOR)
        if crashes < CRASHES_MAX and before <= now:
            return ""
        self.refuse(name, now)
        return name

    def refuse(self, name: str, now: float) -> None:
        """Refuse a fingerprint, this gateway's own or one that another has told."""
        _note(self.refused, name, now + REFUSED_FOR)


def _note(known: dict[str, float], name: str, until: float) -> None:
    known.pop(name, None)
    known[name] = until
    if len(known) > KNOWN_MAX:
        del known[next(iter(known))]
