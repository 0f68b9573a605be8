"""Prompts that were present at crashes of runners, kept in the store: all gateways tell it, and have one verdict.

A prompt that was present at a crash is suspect, until it is answered to the end, or for ten minutes. At a crash at
which a suspect is present again, all who were there are compared: the one that was at two is refused for ten minutes,
and what it was present at is held against nobody else. Where several were at two, nobody is blamed that could be
innocent: a suspect's next attempt has a runner to itself, as far as suspects go, which tells them apart. While the
store is away, nobody is suspect.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from corral.store.lua import PREFIX, script, sha
from corral.store.valkey import Valkey, encode

KEPT: Final = 600.0
"""For how long a prompt is suspect, or refused (seconds); the script has it too."""
KNOWN_MAX: Final = 1000
SETTLED: Final = 0.25
"""After so many seconds all gateways have told who was present at a crash."""
CHANNEL: Final = PREFIX + b"crashing"
"""Where the store tells gateways what changes."""
TEXT: Final = f"local P = '{PREFIX.decode()}'\n" + script("suspects", metered=False)
_SHA: Final = sha(TEXT)

log = logging.getLogger(__name__)

Judged = Callable[[bool, int], None]
"""Hears whether a prompt is refused, and for how many crashes it is suspect still; 0 where the store cannot say."""


class Suspects:
    """What a gateway knows of such prompts, by fingerprints. ``refused`` and ``suspects`` hold until when (monotonic
    seconds), ``known`` is whether there are any; ``on_free`` is called when a runner may have its next suspect.
    """

    def __init__(self, store: Valkey) -> None:
        self._store = store
        self.known = False
        self.refused: dict[str, float] = {}
        self.suspects: dict[str, float] = {}
        self.on_free: Callable[[], None] = _nothing
        self._recalled = 0

    # -- what is known here

    def sweep(self, now: float) -> None:
        """Forget what is over; ask what this gateway has missed, once for each connection that is made."""
        for known in (self.refused, self.suspects):
            for name in [name for name, end in known.items() if end <= now]:
                del known[name]
        self.known = bool(self.refused or self.suspects)
        if self._store.connected and self._recalled != self._store.connections:
            self._recalled = self._store.connections
            self._call(self._told, b"recall")

    def missed(self) -> None:
        """What was told until now may not have been heard."""
        self._recalled = 0

    def heard(self, message: bytes, seconds: float = KEPT) -> None:
        """The store tells what changes, or what still holds for so many seconds."""
        what, _, name = message.decode("latin-1").partition(" ")
        if what == "free":
            self.on_free()
        elif what == "clear":
            self.suspects.pop(name, None)
        elif what in ("refused", "suspect"):
            self.suspects.pop(name, None)
            known = self.refused if what == "refused" else self.suspects
            if what == "refused" and name not in known:
                log.warning("a prompt was present at two crashes of its model: refused for ten minutes (%s)", name)
            _note(known, name, monotonic() + seconds)
            self.known = True

    def _told(self, reply: Any) -> None:
        if type(reply) is list:
            for message, left in zip(reply[::2], reply[1::2], strict=True):
                self.heard(message, left / 1e6)

    # -- what is told

    def crashed(self, name: str, model: str, node: str, age: float, got_on: bool, judged: Judged) -> None:
        """A prompt was present at a crash, in an attempt that began `age` seconds ago and had a token, or had not.

        `judged` is called at once where it is the first one, else when all have told.
        """
        _note(self.suspects, name, monotonic() + KEPT)
        self.known = True

        def verdict(reply: Any) -> None:
            if type(reply) is list:
                if reply[0]:
                    # Its caller hears of it now, and may ask again before the channel has told.
                    self.heard(b"refused " + name.encode())
                judged(bool(reply[0]), reply[1])
            else:
                judged(False, 0)

        def counted(reply: Any) -> None:
            if type(reply) is not list:
                judged(False, 0)
            elif reply[1] < 2:
                judged(False, reply[1])
            else:
                loop = self._store.loop
                assert loop is not None
                loop.call_later(SETTLED, self._call, verdict, b"judge", reply[0], name.encode())

        since = b"%d" % max(0, int(age * 1e6))
        parts = (name.encode(), model.encode(), node.encode(), since, b"1" if got_on else b"0")
        self._call(counted, b"crash", *parts)

    def clear(self, name: str) -> None:
        """A runner has answered it to the end."""
        self.suspects.pop(name, None)
        self._call(_ignore, b"clear", name.encode())

    def begin(self, name: str, model: str, node: str, heard: Callable[[bool], None]) -> None:
        """An attempt at a suspect is to begin; `heard` gets False where another one has the runner now."""

        def replied(reply: Any) -> None:
            heard(reply != 0)

        self._call(replied, b"try", name.encode(), model.encode(), node.encode())

    def leave(self, name: str, model: str, node: str) -> None:
        """That attempt got on, or is over."""
        self._call(_ignore, b"leave", name.encode(), model.encode(), node.encode())

    def _call(self, replied: Callable[[Any], None], what: bytes, *parts: bytes) -> None:
        self._store.call(encode(b"EVALSHA", _SHA, b"0", what, CHANNEL, *parts), replied)


def _note(known: dict[str, float], name: str, until: float) -> None:
    known.pop(name, None)
    known[name] = until
    if len(known) > KNOWN_MAX:
        del known[next(iter(known))]


def _nothing() -> None:
    """What happens where nobody listens."""


def _ignore(_: Any) -> None:
    """An answer that nobody waits for."""
