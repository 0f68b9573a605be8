"""Keyed hashes of prompts and answers: who has a text can show that it is the one of a record, and nobody can guess it.

A hash is HMAC-SHA-256 (RFC 2104) of the text's SHA-256, so that whoever compares a text sends its SHA-256 alone. The
keys, one for prompts and one for answers, are derived from the pepper by HKDF-Expand (RFC 5869; the pepper is random,
so its Extract is left out, section 3.3).
"""

from __future__ import annotations

import _hashlib
import hmac
from hashlib import sha256
from importlib import import_module
from typing import Any, Final

BLOCK: Final = 64
"""Bytes of a block of SHA-256."""


def _native() -> Any:
    """What does it in C (`_keyed.c`), where that is compiled and hashlib's library has what it needs; else None."""
    try:
        found = import_module("corral.store._keyed")
        return found if found.use(_hashlib.__file__) else None
    except (ImportError, AttributeError):
        return None


_C: Final[Any] = _native()


class Keyed:
    """HMAC-SHA-256 under one key whose two halves are computed once: a third of the time of a new one each time."""

    def __init__(self, key: bytes) -> None:
        padded = key.ljust(BLOCK, b"\0")
        self._inner: Any = sha256(bytes([byte ^ 0x36 for byte in padded]))
        self._outer: Any = sha256(bytes([byte ^ 0x5C for byte in padded]))
        self._halves: bytes = _C.halves(key) if _C is not None else b""

    def of(self, digest: bytes) -> str:
        """The keyed hash of a text whose SHA-256 is `digest`, as 64 hexadecimal digits."""
        if self._halves:
            return str(_C.of_digest(self._halves, digest))
        inner = self._inner.copy()
        inner.update(digest)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return str(outer.hexdigest())

    def of_text(self, text: bytes) -> str:
        """The keyed hash of a text, as `of`."""
        if self._halves:
            return str(_C.of_text(self._halves, text))
        return self.of(sha256(text).digest())


class Hashes:
    """What makes the hashes of an installation, by its pepper."""

    def __init__(self, pepper: bytes) -> None:
        self.prompt = Keyed(_expand(pepper, b"corral audit prompt"))
        self.answer = Keyed(_expand(pepper, b"corral audit answer"))


def _expand(key: bytes, info: bytes) -> bytes:
    # HKDF-Expand of one block: 32 bytes are as many as SHA-256 has.
    return hmac.digest(key, info + b"\x01", "sha256")
