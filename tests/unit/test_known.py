"""What the leader believes of the store."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

from corral.config.settings import ModelSettings
from corral.control.known import REBUILD, Known, Rebuilt
from corral.control.models import _returns
from corral.control.placement import Placement
from corral.fleet.demand import Rate
from corral.fleet.placement import Demand, Host, Planner
from corral.fleet.pools import counted
from corral.store.demand import Seen


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


def test_a_disabled_model_is_loaded_for_nobody() -> None:
    """Who came before would otherwise have it back in memory once it is unloaded."""
    known = Known(Rate(0.0), 0)
    known.look(Seen(asked=50, waiting=3), 1.0)
    host = Host("n1", held=frozenset({"m"}))
    for disabled, steps in ((False, ["load"]), (True, [])):
        demand = Demand("m", disabled=disabled)
        known.tell(demand, 3, 2.0)
        assert [step.action for step in Planner([host], {"m": demand}, 2.0).plan()] == steps
    known.tell(kept := Demand("m", copies=1, disabled=True), 0, 2.0)
    assert [step.reason for step in Planner([host], {"m": kept}, 2.0).plan()] == ["0 of 1 copies"], "the catalogue's"


def test_who_unloads_a_model_is_told_what_loads_it_again() -> None:
    asked, waiting, quiet = (Known(Rate(-9999.0), 0) for _ in range(3))
    asked.rate.note(time.monotonic())
    waiting.waits_since = 0.0
    placement = SimpleNamespace(known={counted("asked", "b"): asked, "waiting": waiting, "quiet": quiet})
    entries = {"off": ModelSettings(name="off"), "quiet": ModelSettings(name="quiet", copies=2)}
    control: Any = SimpleNamespace(
        leading=SimpleNamespace(placement=placement, leads=True),
        hub=SimpleNamespace(disabled={"off": None}),
        catalogue=SimpleNamespace(entries=entries),
    )

    async def notes(*names: str) -> list[str]:
        return [note.partition(":")[0] for note in _returns(control, list(names))]

    at_once = "{} is loaded again at once, as it was asked for lately"
    assert asyncio.run(notes("asked", "waiting")) == [at_once.format("asked"), at_once.format("waiting")]
    later = "quiet is loaded again for the next request that asks for it"
    assert asyncio.run(notes("quiet")) == [later, "the catalogue has quiet in memory on 2 nodes"]
    assert asyncio.run(notes("off")) == ["the catalogue has off in memory on 1 node"], "nobody's requests are taken"
    control.leading.leads = False
    assert asyncio.run(notes("asked")) == ["asked is loaded again where it was asked for lately, or is"], "who knows?"
