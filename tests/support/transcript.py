"""What a store's calls and keys of slots say, in the words of `support.twin`."""

from __future__ import annotations

import re
from typing import Any

from corral.store import keeper, slots
from corral.store.lua import PREFIX, sha
from support.witness import Call

P = PREFIX.decode()
SCRIPTS = {
    sha(text).decode(): name
    for name, text in {
        "ask": slots.ASK,
        "end": slots.END,
        "declare": slots.DECLARE,
        "stand": slots.STAND,
        "place": keeper.PLACE,
        "live": keeper.LIVE,
        "over": keeper.LOOK,
        "tell": keeper.TELL,
    }.items()
}


def counted(counts: dict[str, Any]) -> dict[str, Any]:
    """Without counts of nothing: a store keeps a 0 where the ledger has forgotten, and the other way round."""
    found = {}
    for key, value in counts.items():
        kept = {name: one for name, one in value.items() if one} if key.startswith(("used:", "busy:")) else value
        if kept:
            found[key] = kept
    return found


def state(dump: list[list[Any]]) -> dict[str, Any]:
    """A store's keys of slots, in the form of `support.twin.Twin`."""
    found: dict[str, Any] = {}
    for key, value in dump:
        name = key.decode().removeprefix(P)
        kind = name.partition(":")[0]
        texts = [text.decode() for text in value]
        pairs: dict[str, Any] = dict(zip(texts[::2], texts[1::2], strict=True)) if len(texts) % 2 == 0 else {}
        if kind == "total":
            found[name] = int(texts[0])
        elif kind in ("used", "busy", "wait", "live"):
            found[name] = {one: int(text) for one, text in pairs.items()}
        elif kind == "load":
            found[name] = {one: float(text) for one, text in pairs.items()}
        elif kind == "places":
            found[name] = pairs
        elif kind == "held":  # of a ticket without its time, which stands in its queue
            found[name] = {one: re.sub(r"^(t \S+ \S+) \S+", r"\1", text) for one, text in pairs.items()}
    return counted(found)


def orders(call: Call) -> list[list[str]]:
    """In which order models were looked at: each time that a node's were, or, in a renewal, all of them."""
    found: list[list[str]] = [[]]
    listed = found[0]
    for words in call.inner:
        if words[0] == "SINTER":
            listed = []
            found.append(listed)
        elif words[0] == "SISMEMBER":
            listed = []
        elif words[0] == "ZRANGE" and words[2:] == ["0", "0", "WITHSCORES"]:
            model = words[1].removeprefix(f"{P}load:")
            if model not in listed:
                listed.append(model)
    return found if SCRIPTS[call.words[1]] == "live" else found[1:]


def moved(call: Call) -> dict[str, int]:
    """Tickets that were put back, with their new times."""
    if SCRIPTS[call.words[1]] in ("ask", "declare"):
        return {}
    return {words[3]: int(words[2]) for words in call.inner if words[0] == "ZADD" and words[1].startswith(f"{P}wait:")}


def published(call: Call) -> list[tuple[str, ...]]:
    found = []
    for words in call.inner:
        if words[0] == "PUBLISH":
            id, node, generation = words[2].split(" ")
            found.append((words[1].removeprefix(f"{P}wake:"), id, node, int(generation)))
    return found  # type: ignore[return-value]
