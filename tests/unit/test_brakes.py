"""How many nodes may go out of use because control does not hear them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.fleet.brakes import MOST, REACHED, Standing, spared
from corral.fleet.hanging import stays
from corral.fleet.node import Node, NodeState

FOUR = ("a", "b", "c", "d")


def fleet(*missed: str, names: tuple[str, ...] = FOUR, unused: tuple[str, ...] = ()) -> list[Standing]:
    return [Standing(name, name in missed, name in missed, name not in unused, frozenset({"m"})) for name in names]


def test_half_of_the_nodes_may_go_by_the_prober_s_word_alone() -> None:
    assert spared(fleet(), None) == {}
    assert spared(fleet("a", "b"), None) == {}
    assert spared(fleet("a", names=("a", "b")), None) == {}


def test_more_than_half_stay_where_nobody_else_can_say() -> None:
    assert spared(fleet("a", "b", "c"), None) == dict.fromkeys("abc", MOST)


@pytest.mark.parametrize("lost", range(1, 5))
def test_none_goes_that_haproxy_reaches_however_few_control_does_not_hear(lost: int) -> None:
    assert spared(fleet(*FOUR[:lost]), set()) == dict.fromkeys(FOUR[:lost], REACHED)
    assert spared(fleet(*FOUR[:lost]), {"a"}) == dict.fromkeys(FOUR[1:lost], REACHED)
    assert spared(fleet("a", names=("a",)), set()) == {"a": REACHED}


def test_those_that_are_about_to_be_missed_count() -> None:
    nodes = [Standing(name, True, name == "a", True, frozenset({"m"})) for name in "abc"] + fleet(names=("d",))
    assert spared(nodes, None) == {"a": MOST}


def test_of_those_that_are_gone_half_may_go_and_all_where_none_is_left() -> None:
    assert spared(fleet("a", "b", "c"), {"a", "b", "c"}) == {"c": MOST}
    assert spared(fleet("a", "b", "c", unused=("b", "c")), {"a", "b", "c"}) == {"a": MOST}
    assert spared(fleet(*FOUR), set(FOUR)) == {}


def test_the_last_node_with_a_model_stays_until_somebody_else_misses_it_too() -> None:
    nodes = [
        Standing("a", True, True, True, frozenset({"m", "rare"})),
        Standing("b", False, False, True, frozenset({"m"})),
        Standing("c", False, False, True, frozenset({"m"})),
    ]
    assert spared(nodes, None) == {"a": "as no other has rare"}
    assert spared(nodes, {"a"}) == {}


def test_one_node_alone_goes_unless_haproxy_reaches_it() -> None:
    one = fleet("a", names=("a",))
    assert spared(one, None) == spared(one, {"a"}) == {}


def test_what_is_out_of_use_is_used_again_only_where_somebody_reaches_it() -> None:
    nodes = fleet("a", "b", "c", unused=("a",))
    assert spared(nodes, None) == dict.fromkeys("bc", MOST)
    assert spared(nodes, set()) == dict.fromkeys("abc", REACHED)
    assert spared(nodes, {"a", "b"}) == {"c": REACHED}
    assert spared(nodes, {"a", "b", "c"}) == {"c": MOST}, "what is out of use goes first"


@given(st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef")), st.sets(st.sampled_from("abcdef")))
def test_never_more_than_half_of_the_nodes_that_were_in_use_go(
    missed: set[str], dead: set[str], unused: set[str]
) -> None:
    unused &= missed
    unused = set(sorted(unused)[:3])
    nodes = fleet(*missed, names=tuple("abcdef"), unused=tuple(unused))
    kept = spared(nodes, dead)
    assert kept.keys() <= missed
    gone = missed - kept.keys()
    assert gone <= dead
    assert len(gone) <= 3 or (gone <= dead | unused and len(dead & missed) == 6)


ANSWERS, LATE, MISSED, OUT = ("answers", "late", "missed", "out of use")


# Most answer, as else most draws have more than half of the nodes away, and then it is their number that holds.
standings = st.tuples(
    st.sampled_from((ANSWERS, ANSWERS, ANSWERS, ANSWERS, LATE, MISSED, MISSED, OUT)),
    st.frozensets(st.sampled_from("mnop"), max_size=2),
)


@settings(max_examples=300, derandomize=True)
@given(st.lists(standings, min_size=2, max_size=6), st.none() | st.sets(st.sampled_from("abcdef"), max_size=3))
def test_no_copy_goes_that_no_node_answers_for_unless_somebody_else_misses_its_node_too(
    drawn: list[tuple[str, frozenset[str]]], dead: set[str] | None
) -> None:
    nodes = [
        Standing(name, state != ANSWERS, state in (MISSED, OUT), state != OUT, models)
        for name, (state, models) in zip("abcdef", drawn, strict=False)
    ]
    kept = spared(nodes, dead)
    assert kept.keys() <= {node.name for node in nodes if node.missed}
    left = {model for node in nodes if not node.late for model in node.models}
    for node in nodes:
        if node.missed and node.used and node.name not in kept and node.name not in (dead or ()):
            assert dead is None and node.models <= left


@settings(max_examples=300, derandomize=True)
@given(
    st.integers(1, 6),
    st.sets(st.sampled_from("abcdef")),
    st.none() | st.sets(st.sampled_from("abcdef")),
    st.permutations("abcdef"),
)
def test_what_control_and_gateways_take_out_together_is_never_more_than_half(
    size: int, missed: set[str], dead: set[str] | None, order: list[str]
) -> None:
    names = tuple("abcdef"[:size])
    kept = spared(fleet(*missed, names=names), dead)
    nodes = {name: Node(name, "", 1, held=frozenset("m")) for name in names}
    for name in missed & nodes.keys() - kept.keys():
        nodes[name].state = NodeState.DOWN
    down = {name for name, node in nodes.items() if node.state is NodeState.DOWN}
    suspect, gone = set(), set[str]()
    for name in order:
        if name in nodes.keys() - down:
            suspect.add((name, "m"))
            if not stays(nodes[name], "m", suspect, nodes, {}):
                gone.add(name)
    assert len(down | gone) * 2 <= size or (not gone and len(down) == size), "all of them, where none is left"
