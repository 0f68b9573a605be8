"""What the leader believes of the store."""

from __future__ import annotations

from typing import Any

from corral.control.known import REBUILD, Known, Rebuilt
from corral.control.placement import Placement
from corral.fleet.demand import Rate
from corral.fleet.pools import counted


def test_a_store_that_was_flushed_is_not_believed_before_it_has_been_told() -> None:
    rebuilt = Rebuilt()
    assert rebuilt.whole(None, None, 1.0), "no gateway has ever come"
    assert rebuilt.whole(b"10", b"10", 2.0)
    assert not rebuilt.whole(b"10", None, 3.0), "flushed while it was looked at"
    assert not rebuilt.whole(None, None, 3.5)
    assert not rebuilt.whole(None, b"20", 4.0), "told while it was looked at"
    assert rebuilt.whole(b"20", b"20", 4.5)
    assert not rebuilt.whole(None, None, 10.0)
    assert not rebuilt.whole(None, None, 10.0 + REBUILD - 0.1)
    assert rebuilt.whole(None, None, 10.0 + REBUILD), "no gateway is left that could tell it"


def test_what_was_decided_last_is_told_first() -> None:
    """Of one look, what is done is noted behind what waits; of several pools, each has its own notes."""
    nothing: Any = None
    placement = Placement(nothing, nothing, nothing)
    first, second = (placement.known.setdefault(counted("m", group), Known(Rate(0.0), 0)) for group in ("", "b"))
    first.note(1.0, "load on a")
    second.note(2.0, "waits: z")
    first.note(3.0, "waits: b makes room")
    first.note(3.0, "drain on b")
    second.note(3.0, "waits: a")
    placement.known["other"] = Known(Rate(0.0), 0)
    placement.known["other"].note(9.0, "load on c")
    wanted = ["drain on b", "waits: b makes room", "waits: a", "waits: z", "load on a"]
    assert [text for _, text in placement.why("m")] == wanted
    assert [one["ago"] for one in placement.about("m", 4.0)["decisions"]] == [1.0, 1.0, 1.0, 2.0, 3.0]
