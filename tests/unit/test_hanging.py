"""When a runner hangs, by its tokens and the time it has had work; and when it stays in use though it does."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.fleet.hanging import (
    FADES,
    IDLE,
    LOADS,
    PREFILL,
    RATE,
    SILENCE,
    STEP_MAX,
    Rates,
    Runner,
    needs,
    patience,
    stays,
)
from corral.fleet.hanging import LONG as COUNTS
from corral.fleet.node import Node, NodeState

LOOK = 0.5
LONG = 30.0
PROPERTY = settings(max_examples=150, derandomize=True)
Works = Iterable[tuple[float, float]]


class Watched:
    """A runner that is looked at each half second from 100.0 on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.runner = Runner("node-1", "m:latest", self.now)

    def look(self, works: Works, later: float = LOOK, loaded: bool = True, patience: float = 0.0) -> bool:
        """The next look; `works` are its requests then: when they were sent, and what they need."""
        self.now += later
        for sent, need in works:
            self.runner.works(sent, need)
        return self.runner.look(self.now, loaded, patience)

    def hangs_after(self, works: Works, most: float = 1000.0, patience: float = 0.0) -> float:
        """Seconds until it hangs with these requests."""
        works, began = list(works), self.now
        for _ in range(int(most / LOOK)):
            if self.look(works, patience=patience):
                return self.now - began
        return most


def test_what_a_prompt_needs_is_as_long_as_it_is_and_never_less_than_any_token() -> None:
    assert needs(10, 100.0) == SILENCE
    assert needs(1000, 100.0) == PREFILL * 10.0


@pytest.mark.parametrize("need", [SILENCE, LONG])
def test_a_runner_hangs_that_gives_no_token_for_as_long_as_its_prompts_need(need: float) -> None:
    watched = Watched()
    assert watched.hangs_after([(watched.now, need)]) == need + LOOK


def test_who_comes_and_leaves_is_no_progress() -> None:
    watched = Watched()
    for at in count():
        # Each stays for three seconds, and the next comes after another half.
        sent = watched.now
        if any(watched.look([(sent, SILENCE)]) for _ in range(6)):
            break
        watched.look([])
        assert at < 3
    assert watched.now == 100.0 + SILENCE + LOOK + LOOK


def test_a_token_of_any_stream_is_progress_also_of_one_that_has_ended_since() -> None:
    watched = Watched()
    waits = [(watched.now, SILENCE)]
    for _ in range(100):
        watched.hangs_after(waits, SILENCE - LOOK)
        watched.runner.token = watched.now + LOOK / 2
        assert not watched.look(waits)
    assert watched.hangs_after(waits) == SILENCE


def test_a_long_prompt_that_came_late_has_the_time_that_it_needs() -> None:
    watched = Watched()
    assert watched.hangs_after([(watched.now, SILENCE)], SILENCE) == SILENCE
    assert watched.hangs_after([(watched.now, LONG)]) == LONG - SILENCE + LOOK


def test_who_comes_while_a_long_prompt_was_read_waits_as_long_as_any_once_nobody_wants_that() -> None:
    watched = Watched()
    watched.hangs_after([(watched.now, LONG)], 15.0)
    assert watched.hangs_after([(watched.now, SILENCE)]) == SILENCE + LOOK


def test_a_prompt_that_nobody_waits_for_excuses_no_runner_for_ever() -> None:
    watched = Watched()
    watched.look([(watched.now, 3000.0)])
    # Prompts of every length have their budgets, and callers of long ones are no more patient.
    assert watched.hangs_after([(watched.now, 8.0)]) == 8.0


def test_time_without_work_is_none_of_silence_and_a_while_of_it_has_all_forgotten() -> None:
    watched = Watched()
    watched.hangs_after([(watched.now, SILENCE)], SILENCE - LOOK)
    for _ in range(int(IDLE / LOOK) - 1):
        assert not watched.look([])
    assert watched.hangs_after([(watched.now, SILENCE)]) == LOOK * 2
    watched.runner.anew()
    watched.hangs_after([(watched.now, SILENCE)], SILENCE - LOOK)
    for _ in range(int(IDLE / LOOK) + 1):
        assert not watched.look([])
    assert watched.hangs_after([(watched.now, SILENCE)]) == SILENCE + LOOK


def test_what_was_sent_since_the_last_look_has_waited_since_it_was_sent() -> None:
    watched = Watched()
    assert not watched.look([(watched.now + 0.4, SILENCE)])
    assert watched.runner.waited == pytest.approx(0.1)


def test_a_gateway_that_stood_still_sees_no_runner_hang() -> None:
    watched = Watched()
    assert not watched.look([(watched.now, SILENCE)], later=3600.0)
    assert watched.runner.waited == STEP_MAX


def test_a_load_excuses_for_as_long_as_it_should_take_and_one_that_nobody_timed_for_a_while() -> None:
    assert patience() == patience(1.0) == LOADS
    assert patience(100.0) == 150.0


def test_a_silence_beside_a_load_is_excused_up_to_a_bound() -> None:
    watched = Watched()
    assert watched.hangs_after([(watched.now, SILENCE)], patience=20.0) == 20.0 + SILENCE + LOOK
    watched.runner.token = watched.now + LOOK / 2
    assert not watched.look([], patience=20.0)
    assert watched.hangs_after([(watched.now, SILENCE)], patience=20.0) == 20.0 + SILENCE + LOOK, "another silence"


def test_what_was_silent_before_a_load_and_after_it_counts() -> None:
    watched = Watched()
    waits = [(watched.now, SILENCE)]
    watched.hangs_after(waits, 3.0)
    watched.hangs_after(waits, 10.0, patience=20.0)
    assert (watched.runner.waited, watched.runner.excused) == (3.0, 10.0)
    assert watched.hangs_after(waits) == SILENCE - 3.0 + LOOK


def test_one_load_after_the_other_hides_no_runner_for_ever() -> None:
    watched = Watched()
    waits = [(watched.now, SILENCE)]
    seconds = 0.0
    while not watched.look(waits, patience=20.0 if int(seconds) % 9 else 0.0):
        seconds += LOOK
        assert seconds <= 20.0 + SILENCE + LOOK


def test_a_long_prompt_that_comes_beside_a_load_has_its_time_behind_it() -> None:
    watched = Watched()
    watched.hangs_after([(watched.now, LONG)], 10.0, patience=20.0)
    assert watched.hangs_after([(watched.now, LONG)]) == LONG + LOOK


def test_a_runner_is_forgotten_once_it_is_not_used() -> None:
    watched = Watched()
    watched.look([(watched.now, SILENCE)])
    assert not watched.runner.unused(watched.now + IDLE)
    assert watched.runner.unused(watched.now + IDLE + LOOK)
    watched.runner.token = watched.now + 1.0
    assert not watched.runner.unused(watched.now + IDLE + LOOK)


# What is there at a look: for how long it has been, and what it needs.
streams = st.lists(st.tuples(st.floats(0.0, 4.0), st.sampled_from((SILENCE, SILENCE, 8.0, LONG))), max_size=4)


@PROPERTY
@given(st.lists(streams, min_size=1, max_size=30))
def test_without_a_token_it_hangs_once_it_has_had_work_for_what_the_longest_prompt_needs(looks: list[Works]) -> None:
    watched = Watched()
    worked = 0
    longest = SILENCE
    for turn in range(150):
        works = [(max(100.0, watched.now - age), need) for age, need in looks[turn % len(looks)]]
        hangs = watched.look(works)
        worked += bool(works)
        longest = max([longest, *(need for _, need in works)])
        if hangs:
            # Never sooner than one that is there may take.
            assert worked * LOOK > max(need for _, need in works)
            break
        assert worked * LOOK <= longest + LOOK or not works


@PROPERTY
@given(st.lists(st.tuples(streams, st.booleans(), st.floats(0.0, LOOK)), min_size=1, max_size=200))
def test_a_runner_that_gives_a_token_in_time_never_hangs(looks: list[tuple[Works, bool, float]]) -> None:
    watched = Watched()
    watched.runner.token = watched.now
    for works, gives, at in looks:
        if gives or watched.now + LOOK - watched.runner.token > SILENCE:
            watched.runner.token = watched.now + at
        assert not watched.look([(watched.now - age, need) for age, need in works])


def test_the_slowest_rate_counts_and_fades() -> None:
    rates = Rates()
    assert rates.of("m") == RATE
    rates.learn("m", COUNTS - 1, 1000.0)
    assert rates.of("m") == RATE, "so short a prompt says nothing"
    rates.learn("m", 5000, 1.0)
    rates.learn("m", 4000, 2.0)
    assert (rates.of("m"), rates.of("other")) == (2000.0, RATE)
    rates.learn("m", 5000, 1.0)
    assert rates.of("m") == 2000.0 * FADES
    assert rates.needs("m", 42_000) == PREFILL * 20.0


# Batches of embeddings, one after the other or several at once: tokens, and how many share the runner with each.
batches = st.lists(st.tuples(st.integers(1, 60_000), st.integers(1, int(PREFILL))), min_size=1, max_size=12)


@PROPERTY
@given(st.floats(RATE, 1e5), batches)
def test_a_runner_that_embeds_as_fast_as_it_did_never_hangs_and_one_that_stops_does_in_time(
    rate: float, asked: list[tuple[int, int]]
) -> None:
    watched, rates = Watched(), Rates()
    for tokens, at_once in asked:
        # Who shares it waits for all, in the order in which they came: each is answered in its turn.
        sent = watched.now
        for turn in range(1, at_once + 1):
            ends = sent + turn * tokens / rate
            need = rates.needs("m", tokens)
            while watched.now + LOOK < ends:
                assert not watched.look([(sent, need)] * (at_once - turn + 1))
            watched.runner.token = ends
            rates.learn("m", tokens, ends - sent)
    watched.look([])
    need = rates.needs("m", asked[-1][0])
    assert watched.hangs_after([(watched.now, need)], need + 60.0) <= need + 2 * LOOK


@pytest.mark.parametrize("load", [20.0, 60.0, 600.0])
@PROPERTY
@given(looks=st.lists(streams, min_size=1, max_size=30))
def test_a_model_that_loads_hangs_not_however_long_that_takes_and_is_judged_from_then_on(
    load: float, looks: list[Works]
) -> None:
    watched = Watched()
    for turn in range(int(load / LOOK)):
        works = [(max(100.0, watched.now - age), need) for age, need in looks[turn % len(looks)]]
        assert not watched.look(works, loaded=False)
    # Who has waited for all of the load has the time that any request has, once it is in memory.
    assert watched.hangs_after([(100.0, SILENCE)]) == SILENCE + LOOK


def fleet(held: Iterable[Iterable[str]]) -> dict[str, Node]:
    nodes = [Node(f"node-{at}", "", 1, held=frozenset(models)) for at, models in enumerate(held)]
    return {node.name: node for node in nodes}


def test_more_than_half_of_the_nodes_are_never_out_of_use() -> None:
    nodes = fleet("mm" * 3)
    out = {("node-0", "m"), ("node-1", "m"), ("node-2", "m"), ("node-2", "n"), ("gone", "m")}
    assert not stays(nodes["node-0"], "m", out, nodes, {})
    assert stays(nodes["node-0"], "m", {*out, ("node-3", "n")}, nodes, {})


def test_a_runner_stays_that_no_other_could_stand_in_for() -> None:
    nodes = fleet(["mn", "m", "n", ""])
    out = {("node-0", "m"), ("node-1", "n")}
    assert not stays(nodes["node-0"], "m", out, nodes, {})
    assert stays(nodes["node-0"], "m", out, nodes, {"node-1": "theirs"})
    nodes["node-1"].state = NodeState.DRAINING
    assert stays(nodes["node-0"], "m", out, nodes, {})
    nodes["node-1"].state = NodeState.READY
    assert stays(nodes["node-0"], "m", {*out, ("node-1", "m")}, nodes, {})


def test_what_is_down_in_another_group_is_not_missed_in_this_one() -> None:
    nodes = fleet("m" * 7)
    theirs = {f"node-{at}": "theirs" for at in range(3, 7)}
    for name in theirs:
        nodes[name].state = NodeState.DOWN
    out = {("node-0", "m")}
    assert not stays(nodes["node-0"], "m", out, nodes, theirs)
    nodes["node-1"].state = NodeState.DOWN
    assert stays(nodes["node-0"], "m", out, nodes, theirs), "two of its three"


def test_what_is_down_is_out_too_and_what_is_drained_is_missed_by_nobody() -> None:
    nodes = fleet("m" * 6)
    for name in ("node-3", "node-4", "node-5"):
        nodes[name].state = NodeState.DOWN
    assert stays(nodes["node-0"], "m", {("node-0", "m")}, nodes, {}), "with it four of six"
    nodes["node-5"].state = NodeState.READY
    out = {("node-0", "m"), ("node-3", "m"), ("node-4", "m")}
    assert not stays(nodes["node-0"], "m", out, nodes, {}), "a node counts once"
    assert stays(nodes["node-0"], "m", {*out, ("node-1", "m")}, nodes, {})
    # A dead node that an operator has given up leaves four, of which two may go.
    nodes["node-3"].state = NodeState.DRAINING
    assert stays(nodes["node-0"], "m", {*out, ("node-1", "m")}, nodes, {}), "three of five"
    nodes["node-4"].state = NodeState.DRAINING
    assert not stays(nodes["node-0"], "m", {*out, ("node-1", "m")}, nodes, {})


def test_one_that_hangs_beside_a_dead_one_goes_once_that_is_given_up() -> None:
    nodes = fleet("mmm")
    nodes["node-2"].state = NodeState.DOWN
    assert stays(nodes["node-0"], "m", {("node-0", "m")}, nodes, {})
    nodes["node-2"].state = NodeState.DRAINING
    assert not stays(nodes["node-0"], "m", {("node-0", "m")}, nodes, {})
    del nodes["node-2"]
    assert not stays(nodes["node-0"], "m", {("node-0", "m")}, nodes, {})
    nodes["node-1"].state = NodeState.DOWN
    assert stays(nodes["node-0"], "m", {("node-0", "m")}, nodes, {}), "the last copy"


# Most are ready, as else most draws have more than half of the nodes down before any hangs.
drawn_states = st.sampled_from((NodeState.READY,) * 4 + (NodeState.DOWN, NodeState.DRAINING))


@PROPERTY
@given(st.lists(st.tuples(st.frozensets(st.sampled_from("mno")), drawn_states), min_size=1, max_size=8), st.data())
def test_whatever_hangs_never_the_last_copy_goes_and_never_more_than_half(
    drawn: list[tuple[frozenset[str], NodeState]], data: st.DataObject
) -> None:
    nodes = fleet([held for held, _ in drawn])
    for node, (_, state) in zip(nodes.values(), drawn, strict=True):
        node.state = state
    runners = sorted((node.name, model) for node in nodes.values() for model in node.held)
    suspect: set[tuple[str, str]] = set()
    gone = set()
    for name, model in data.draw(st.permutations(runners)):
        suspect.add((name, model))
        if not stays(nodes[name], model, suspect, nodes, {}):
            gone.add((name, model))
    serving = {name for name, node in nodes.items() if node.state is not NodeState.DRAINING}
    down = {name for name, node in nodes.items() if node.state is NodeState.DOWN}
    out = down | {name for name, _ in gone} & serving
    assert len(out) * 2 <= len(serving) or not gone, "of those that are to serve, however they are lost"
    ready = {name for name, node in nodes.items() if node.state is NodeState.READY}
    for model in {model for name, model in runners if name in ready}:
        assert {name for name, other in runners if other == model and name in ready and (name, other) not in gone}
