"""What gateways are told of a node."""

from __future__ import annotations

from corral.control.prober import Member
from corral.fleet.catalogue import aside


def member(**more: object) -> Member:
    names = ("m:1", "new:1", aside("m:1", "previous"))
    return Member("n1", "http://n1", up=True, tags=[{"name": name} for name in names], **more)  # type: ignore[arg-type]


def test_what_is_not_verified_or_kept_aside_is_nobodys_to_use() -> None:
    assert [tag["name"] for tag in member().entry()["tags"]] == ["m:1", "new:1"]
    assert [tag["name"] for tag in member(withheld={"new:1"}).entry()["tags"]] == ["m:1"]
    assert member(withheld={"new:1"}).describe()["models"] == ["m:1"]
    loaded = member(ps=[{"name": "m:1"}, {"name": aside("m:1", "aside")}])
    assert ([one["name"] for one in loaded.entry()["ps"]], loaded.resident) == (["m:1"], ["m:1"])


def test_a_node_that_is_preloaded_is_not_in_service() -> None:
    held = member(preloading="preloading m:1 (42%)")
    assert (held.state, held.entry()["state"], held.reason) == ("draining", "draining", "preloading m:1 (42%)")
    held.up = False
    assert (held.state, held.reason) == ("down", None)
    assert (member(warning="preloading failed").state, member().state) == ("ready", "ready")
