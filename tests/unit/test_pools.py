"""Which nodes' slots are counted together."""

from __future__ import annotations

from corral.fleet import tickets
from corral.fleet.pools import counted, groups, model_of
from corral.store import slots
from corral.store.lua import slots_script


def test_tenants_that_share_a_node_are_of_one_group() -> None:
    found = groups({"a": ["n5", "n4"], "b": ["n7"], "c": ["n9", "n8"], "d": ["n8", "n5"], "e": []})
    assert found == {"n4": "n4", "n5": "n4", "n8": "n4", "n9": "n4", "n7": "n7"}
    assert groups({}) == {}


def test_a_model_is_counted_by_group() -> None:
    assert (counted("m:1", ""), counted("m:1", "n4")) == ("m:1", "m:1|n4")
    assert model_of(counted("hf.co/a/b:c", "n4")) == "hf.co/a/b:c" == model_of("hf.co/a/b:c")


def test_the_store_knows_of_as_many_kinds_as_there_are() -> None:
    text = slots_script("slots_ask")
    assert len(tickets.KINDS) == slots.KINDS and f"LAST_KIND = 1e12, 4, 16, {slots.KINDS - 1}\n" in text
