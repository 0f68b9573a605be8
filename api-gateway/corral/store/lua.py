"""The scripts that run in the store: their texts, and what EVALSHA calls them by."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

PREFIX: Final = b"corral:1:"
"""Stands before each key; the number is that of the schema, so that two releases coexist."""

_FOLDER: Final = files("corral.store") / "scripts"


_P: Final = f"local P = '{PREFIX.decode()}'\n"


def script(name: str, metered: bool = True, tells: bool = False) -> str:
    """The text of a script of limits, with what the metered ones share before it, and those that tell of use."""
    text = (_FOLDER / f"{name}.lua").read_text()
    if metered:
        text = (_FOLDER / "meter.lua").read_text() + text
    return _P + (_FOLDER / "told.lua").read_text() + text if tells else text


def slots_script(name: str) -> str:
    """The text of a script of slots, after what those share."""
    return _P + (_FOLDER / "slots.lua").read_text() + (_FOLDER / f"{name}.lua").read_text()


def combined(limits: str) -> str:
    """One call for all of a request: the text of a script of limits (`corral.store.budget`), and a slot if they admit.

    ARGV  1 how many arguments ask for the slot, 2.. those (as of `slots_ask.lua`), then those of the limits.
    Returns {the limits' answer, the slot's or 0 (REBUILD)}, without the second where the limits refuse, or 0.
    """
    return (
        f"local function limits(KEYS, ARGV)\n{limits}\nend\n"
        + _P
        + (_FOLDER / "slots.lua").read_text()
        + f"local function slot(ARGV)\n{(_FOLDER / 'slots_ask.lua').read_text()}\nend\n"
        + "local last = tonumber(ARGV[1]) + 1\n"
        + "local verdict = limits(KEYS, { unpack(ARGV, last + 1) })\n"
        + "if verdict == 0 then return 0 end\n"
        + "if verdict[1] == 0 then return { verdict } end\n"
        + "return { verdict, slot({ unpack(ARGV, 2, last) }) }\n"
    )


def sha(text: str) -> bytes:
    """What EVALSHA calls a script by."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest().encode()
