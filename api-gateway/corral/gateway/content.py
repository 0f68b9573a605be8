"""The text of prompts and answers, for keys that it is kept for: redacted, cut, and encrypted before it is written.

A gateway has the public key alone: what it wrote, it cannot read again, nor can control, nor who has a backup.
"""

from __future__ import annotations

import re
import zlib
from base64 import b64encode
from bisect import bisect_right
from typing import Any

import msgspec
import pyrage

from corral.config.record import AuditSettings
from corral.store.keys import masked, spans

REDACTED = "[redacted]"
MARGIN = 4096
"""Characters behind what is kept that are looked at too: a cut must leave no half of what a pattern would find."""

_encode = msgspec.json.Encoder().encode
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))", re.DOTALL)
_MEANT = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}


class Keeper:
    """Makes of a prompt and an answer what the record keeps of them.

    ``most``: bytes of each that are kept; ``window``: characters of each that it has to see for that.
    """

    def __init__(self, settings: AuditSettings) -> None:
        """Raises ValueError where the recipient is none."""
        try:
            self._recipient = pyrage.x25519.Recipient.from_str(settings.content_recipient or "")
        except pyrage.RecipientError as error:
            raise ValueError(f"audit.content_recipient: {error}") from None
        self.most = settings.content_max
        self.window = self.most + MARGIN + 1
        self._patterns = [re.compile(one) for one in settings.content_redact]

    def keep(self, prompt: bytes, answer: str) -> str:
        """Base64 of an age file that holds deflated JSON: ``prompt`` (the request's body), ``answer``, ``cut``."""
        told: dict[str, Any] = {"cut": []}
        # A character has four bytes at most. All this is done between two turns of all other requests.
        begins = prompt[: 4 * self.window].decode("utf-8", "replace")
        for name, text, escaped in (("prompt", begins, True), ("answer", answer, False)):
            whole = len(text) < self.window
            kept = self._redact(text[: self.window - 1], escaped)
            data = (kept if whole else kept[:-MARGIN]).encode()
            told[name] = data[: self.most].decode("utf-8", "ignore")
            if not whole or len(data) > self.most:
                told["cut"].append(name)
        return b64encode(pyrage.encrypt(zlib.compress(_encode(told), 1), [self._recipient])).decode()

    def _redact(self, text: str, escaped: bool) -> str:
        """`text` without what the patterns find, and without keys; `escaped`: what they look at is what JSON means."""
        said, steps, places = _unescaped(text) if escaped else (text, [0], [0])

        def place(at: int) -> int:
            step = bisect_right(steps, at) - 1
            return places[step] + at - steps[step]

        parts, end = [], 0
        found = [one.span() for pattern in self._patterns for one in pattern.finditer(said)]
        if escaped:  # a key with an escape in it is none as it stands
            found += [(first, last) for first, last in spans(said) if place(last) - place(first) > last - first]
        for first, last in sorted(found):
            start, stop = place(first), place(last)
            if stop > max(start, end):
                if start >= end:
                    parts += [text[end:start], REDACTED]
                end = stop
        return masked("".join([*parts, text[end:]]))


def _unescaped(text: str) -> tuple[str, list[int], list[int]]:
    """JSON with the characters that its escapes mean, so that a word behind a line end begins there.

    Its character ``steps[i]`` is at ``places[i]`` of `text`; up to the next step both go on alike.
    """
    parts, steps, places, length, end = [], [0], [0], 0, 0
    for escape in _ESCAPE.finditer(text):
        code, letter = escape.groups()
        parts += [text[end : escape.start()], chr(int(code, 16)) if code else _MEANT.get(letter, letter)]
        length += escape.start() - end + 1
        end = escape.end()
        steps.append(length)
        places.append(end)
    return "".join([*parts, text[end:]]), steps, places


def open_content(data: bytes, identities: list[pyrage.x25519.Identity]) -> dict[str, Any]:
    """What `keep` has kept. Raises ValueError where none of the identities opens it."""
    try:
        found: dict[str, Any] = msgspec.json.decode(zlib.decompress(pyrage.decrypt(data, identities)))
    except pyrage.DecryptError as error:
        raise ValueError(f"it is for another identity, or damaged: {error}") from None
    return found
