"""The text of prompts and answers, for keys that it is kept for: redacted, cut, and encrypted before it is written.

A gateway has the public key alone: what it wrote, it cannot read again, nor can control, nor who has a backup.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64encode
from typing import Any

import msgspec
import pyrage

from corral.config.record import AuditSettings
from corral.store.keys import masked

REDACTED = "[redacted]"

_encode = msgspec.json.Encoder().encode


class Keeper:
    """Makes of a prompt and an answer what the record keeps of them. ``most``: bytes of each."""

    def __init__(self, settings: AuditSettings) -> None:
        """Raises ValueError where the recipient is none."""
        try:
            self._recipient = pyrage.x25519.Recipient.from_str(settings.content_recipient or "")
        except pyrage.RecipientError as error:
            raise ValueError(f"audit.content_recipient: {error}") from None
        self.most = settings.content_max
        self._patterns = [re.compile(one) for one in settings.content_redact]

    def keep(self, prompt: bytes, answer: str) -> str:
        """Base64 of an age file that holds deflated JSON: ``prompt`` (the request's body), ``answer``, ``cut``."""
        told: dict[str, Any] = {"cut": []}
        for name, text in (("prompt", prompt.decode("utf-8", "replace")), ("answer", answer)):
            # Redacted first: a cut must not leave half of what a pattern would have found.
            for pattern in self._patterns:
                text = pattern.sub(REDACTED, text)
            data = masked(text).encode()
            told[name] = data[: self.most].decode("utf-8", "ignore")
            if len(data) > self.most:
                told["cut"].append(name)
        return b64encode(pyrage.encrypt(zlib.compress(_encode(told), 1), [self._recipient])).decode()


def open_content(data: bytes, identities: list[pyrage.x25519.Identity]) -> dict[str, Any]:
    """What `keep` has kept. Raises ValueError where none of the identities opens it."""
    try:
        found: dict[str, Any] = msgspec.json.decode(zlib.decompress(pyrage.decrypt(data, identities)))
    except pyrage.DecryptError as error:
        raise ValueError(f"it is for another identity, or damaged: {error}") from None
    return found
