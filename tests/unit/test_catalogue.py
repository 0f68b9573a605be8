"""From what nodes hold to what the catalogue asks for: the steps, and that they lead there."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.fleet.catalogue import (
    COPY,
    LOAD,
    PULL,
    UNLOAD,
    Held,
    Holdings,
    Plan,
    Resident,
    Wanted,
    aside,
    clipped,
    digest_of,
    is_own,
    mirrored,
    permitted,
    plan,
    settled,
    without,
)

A, B = (f"sha256:{letter * 64}" for letter in "ab")


def node(name: str, held: str = "", resident: str = "", digest: str = A, **more: object) -> Holdings:
    return Holdings(
        name,
        {one: Held(digest, 100) for one in held.split()},
        {one: Resident(digest, 100, 4096) for one in resident.split()},
        **more,  # type: ignore[arg-type]
    )


def short(made: Plan) -> list[str]:
    return [f"{step.action} {step.model} {step.node}" for step in made.steps]


def test_nothing_to_do() -> None:
    made = plan([Wanted("m:1", A, num_ctx=4096)], [node("n1", "m:1", "m:1"), node("n2", "m:1")])
    assert made == Plan()


def test_every_node_holds_a_model_and_copies_of_them_keep_it() -> None:
    made = plan([Wanted("m:1", A, copies=2), Wanted("x:1")], [node("n1", "m:1"), node("n2"), node("n3", "x:1 m:1")])
    assert short(made) == [
        "load m:1 n1", "pull x:1 n1",
        "pull m:1 n2", "pull x:1 n2", "load m:1 n2",
        "load x:1 n3",
    ]  # fmt: skip
    assert made.problems == ()


def test_another_version_is_replaced_and_loaded_anew() -> None:
    made = plan([Wanted("m:1", B, stated=True)], [node("n1", "m:1", "m:1")])
    assert short(made) == ["pull m:1 n1", "load m:1 n1"]
    assert made.steps[0].reason == f"digest differs: catalogue {B}, held {A}"
    assert made.steps[1].digest == B
    recorded = plan([Wanted("m:1", B)], [node("n1", "m:1")])
    assert "recorded" in recorded.steps[0].reason


def test_a_version_that_is_there_under_another_name_is_not_pulled() -> None:
    there = node("n1", "m:1")
    there = replace(there, held={**there.held, aside("m:1", "previous"): Held(B)})
    (copied, _) = plan([Wanted("m:1", B)], [there]).steps
    assert (copied.action, copied.source, copied.digest) == (COPY, aside("m:1", "previous"), B)


@pytest.mark.parametrize(
    ("resident", "why"),
    [
        (Resident(A, context=2048), "a context of 2048"),
        (Resident(A, context=8192, lasting=False), "for a while"),
        (Resident(B, context=8192), "another version"),
    ],
)
def test_what_is_in_memory_as_requests_do_not_need_it_is_loaded_anew(resident: Resident, why: str) -> None:
    there = replace(node("n1", "m:1"), resident={"m:1": resident})
    (step,) = plan([Wanted("m:1", A, num_ctx=8192)], [there, node("n2", "m:1")]).steps
    assert (step.action, step.node, why in step.reason) == (LOAD, "n1", True)


def test_room_is_made_by_what_the_catalogue_does_not_ask_for() -> None:
    full = node("n1", "m:1 x:1 y:1", "x:1 y:1", max_models=2)
    assert short(plan([Wanted("m:1", A)], [full])) == ["unload x:1 n1", "load m:1 n1"]
    steps = plan([Wanted("m:1", A)], [full]).steps
    assert without({"m:1"}, steps) == (), "no room is made for what does not come"
    pinned = plan([Wanted("m:1", A), Wanted("x:1", A, pin=True), Wanted("y:1", A, pin=True)], [full])
    assert pinned.steps == ()
    assert pinned.problems == ("m:1: 0 of 1 copies, no node has room: n1 (max_models 2) keeps x:1, y:1",)


def test_a_pinned_model_stays_also_beyond_its_copies() -> None:
    nodes = [node(name, "m:1 x:1", "x:1", max_models=1) for name in ("n1", "n2")]
    assert short(plan([Wanted("m:1", A), Wanted("x:1", A)], nodes)) == ["unload x:1 n2", "load m:1 n2"]
    made = plan([Wanted("m:1", A), Wanted("x:1", A, pin=True)], nodes)
    assert (made.steps, len(made.problems)) == ((), 1)


def test_memory_is_room_too() -> None:
    small = node("n1", "m:1 x:1", "x:1", memory=150)
    assert short(plan([Wanted("m:1", A)], [small])) == ["unload x:1 n1", "load m:1 n1"]
    made = plan([Wanted("x:1", A), Wanted("m:1", A)], [small, node("n2", "m:1 x:1", memory=150)])
    assert short(made) == ["load m:1 n2"]
    assert plan([Wanted("m:1", A)], [node("n1", "m:1", memory=50)]).problems


def test_nodes_that_are_down_are_a_problem_and_drained_ones_are_left_alone() -> None:
    made = plan(
        [Wanted("m:1", A)], [node("n1", problem="is down"), node("n2", draining=True), node("n3", "m:1", "m:1")]
    )
    assert made == Plan((), ("n1: m:1: the node is down",), ("n2 is draining: it is left as it is",))
    assert plan([Wanted("m:1")], []).problems == ("no node is in service",)


def test_everywhere_is_as_far_as_there_is_room() -> None:
    nodes = [node("n1", "m:1 x:1", max_models=1), node("n2", "m:1 x:1", max_models=2)]
    made = plan([Wanted("m:1", A), Wanted("x:1", A)], nodes, everywhere=True)
    assert short(made) == ["load m:1 n1", "load m:1 n2", "load x:1 n2"]
    assert made.problems == ()
    assert plan([Wanted("m:1", A), Wanted("x:1", A, copies=2)], nodes, everywhere=True).problems


def test_the_digest_of_most_nodes_is_recorded() -> None:
    nodes = [node("n1", "m:1", digest=B), node("n2", "m:1"), node("n3", "m:1"), node("n4", "m:1", problem="down")]
    assert settled("m:1", nodes) == (A, "n2")
    assert settled("m:1", nodes[:2]) == (B, "n1")
    assert settled("x:1", nodes) is None


def test_names() -> None:
    assert digest_of("a" * 64) == A == digest_of(A)
    assert mirrored("smollm2:135m", "r:5000") == "r:5000/library/smollm2:135m"
    assert mirrored("me/m", "r:5000") == "r:5000/me/m:latest"
    assert mirrored("hf.co/me/m:1", "r:5000") == "hf.co/me/m:1"
    assert mirrored("m", None) == "m"


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *(("m", True), ("me/m:1", True), ("r:5000/me/m", True), ("R:5000/me/m:1", True), ("hf.co/me/m:1", True)),
        *(("evil.example/me/m", False), ("r:5001/me/m", False), ("r/me/m", False), ("http://r:5000/me/m", False)),
        *(("user@r:5000/me/m", False), ("169.254.169.254/latest/meta-data", False), ("evil.example/a/b/c", False)),
    ],
)
def test_a_name_sends_a_node_to_a_listed_registry_alone(name: str, where: bool) -> None:
    assert permitted(name, "r:5000", ("hf.co",)) is where
    assert permitted(name, None, ()) is (name in ("m", "me/m:1"))
    assert aside("hf.co/me/M:q4", "previous") == "corral-previous/hf.co.me.M:q4"
    assert len(aside("n" * 200, "aside")) < 100 and aside("n" * 200, "aside") != aside("n" * 201, "aside")
    assert is_own(aside("m", "previous")) and not is_own("corral-llm:1b")
    assert clipped(Wanted("m:1", A, num_ctx=9000), {A: 8192}).num_ctx == 8192
    assert clipped(Wanted("m:1", A, num_ctx=2048), {A: 8192}).num_ctx == 2048


# -- the steps lead there


MODELS = ["a:1", "b:1", "c:1", "d:1"]
digests = st.sampled_from([A, B])
residents = st.builds(
    Resident, digests, st.just(10), st.sampled_from([None, 2048, 8192]), st.booleans()
)  # fmt: skip
wanteds = st.lists(
    st.builds(
        Wanted,
        st.sampled_from(MODELS),
        digests,
        st.booleans(),
        st.integers(1, 4),
        st.booleans(),
        st.sampled_from([None, 8192]),
    ),
    max_size=4,
    unique_by=lambda one: one.name,
)


@st.composite
def fleets(draw: st.DrawFn) -> list[Holdings]:
    made = []
    for number in range(draw(st.integers(1, 4))):
        held = draw(st.dictionaries(st.sampled_from(MODELS), st.builds(Held, digests, st.just(10))))
        resident = draw(st.dictionaries(st.sampled_from(sorted(held)), residents)) if held else {}
        most = draw(st.sampled_from([None, max(1, len(resident)), 4]))
        made.append(Holdings(f"n{number}", held, resident, max_models=most, draining=draw(st.booleans())))
    return made


def carried_out(made: Plan, nodes: list[Holdings], wanted: list[Wanted]) -> list[Holdings]:
    after = {one.node: replace(one, held=dict(one.held), resident=dict(one.resident)) for one in nodes}
    contexts = {one.name: one.num_ctx for one in wanted}
    for step in made.steps:
        there = after[step.node]
        held, resident = dict(there.held), dict(there.resident)
        if step.action in (PULL, COPY):
            assert step.digest is not None
            held[step.model] = Held(step.digest, 10)
        elif step.action == LOAD:
            resident[step.model] = Resident(held[step.model].digest, 10, contexts[step.model])
        elif step.action == UNLOAD:
            del resident[step.model]
        after[step.node] = replace(there, held=held, resident=resident)
    return list(after.values())


@settings(max_examples=400)
@given(wanteds, fleets(), st.booleans())
def test_after_its_steps_nothing_is_left_to_do(wanted: list[Wanted], nodes: list[Holdings], everywhere: bool) -> None:
    made = plan(wanted, nodes, everywhere)
    after = carried_out(made, nodes, wanted)
    assert plan(wanted, after, everywhere).steps == ()
    assert plan(wanted, after, everywhere).problems == made.problems
    for before, there in zip(nodes, after, strict=True):
        assert before.max_models is None or len(there.resident) <= before.max_models
        pinned = {one.name for one in wanted if one.pin}
        assert set(before.resident) & pinned <= set(there.resident), "a pinned model was unloaded"
        assert not before.draining or there == before
