"""A gateway that has lost the store sees by what control says whether others have it, or nobody has."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from corral.control import snapshot
from corral.control.gateways import JUST_NOW, Gateway
from corral.gateway.cut_off import CURRENT, LASTING, CutOff

EACH = 0.5


class Store:
    """What a gateway knows of its own connection."""

    def __init__(self) -> None:
        self.connected, self.connections = False, 1


@pytest.fixture
def store() -> Store:
    return Store()


def made(store: Store) -> CutOff:
    return CutOff(store)  # type: ignore[arg-type]


def polls(cut_off: CutOff, elsewhere: Callable[[float], bool], start: float, end: float) -> float | None:
    """Control is asked each half second; when this gateway is alone for the first time."""
    now, first = start, None
    while now <= end:
        cut_off.heard(elsewhere(now), now)
        if first is None and cut_off.alone(now):
            first = now
        now += EACH
    return first


def test_one_that_alone_has_lost_it_leaves_after_others_had_it_for_a_while(store: Store) -> None:
    cut_off = made(store)
    assert polls(cut_off, lambda now: True, 100.0, 110.0) == 100.0 + LASTING


def test_nobody_leaves_where_all_have_lost_it(store: Store) -> None:
    # The other one asks little: it sees the loss, and says so, a second after this one.
    assert polls(made(store), lambda now: now < 101.1, 100.0, 110.0) is None


def test_it_is_back_at_once_where_it_has_the_store_again(store: Store) -> None:
    cut_off = made(store)
    polls(cut_off, lambda now: True, 100.0, 103.0)
    assert cut_off.alone(103.1)
    store.connected, store.connections = True, 2
    assert not cut_off.alone(103.1)
    store.connected = False  # lost anew: it begins from the start
    assert not cut_off.alone(103.2)
    assert polls(cut_off, lambda now: True, 103.5, 110.0) == 103.5 + LASTING


def test_it_is_back_where_nobody_says_any_more_that_others_have_it(store: Store) -> None:
    cut_off = made(store)
    polls(cut_off, lambda now: True, 100.0, 103.0)
    assert cut_off.alone(103.0 + CURRENT) and not cut_off.alone(103.1 + CURRENT), "control is away"
    assert polls(cut_off, lambda now: True, 110.0, 115.0) == 110.0 + LASTING, "what was said before has ended"
    cut_off.heard(False, 115.5)
    assert not cut_off.alone(115.5), "others have none either"


def test_control_counts_who_serves_and_was_heard_just_now(elsewhere: Callable[..., bool]) -> None:
    def one(name: str, store: bool | None = True, age: float = 0.0, left: bool = False) -> Gateway:
        return Gateway(name, 0.0, "", store=store, left=left, at=1000.0 - age)

    a = one("a", store=False)
    assert elsewhere("a", a, one("b"))
    assert elsewhere("a", a, one("b"), one("c", store=False), one("d"))
    assert not elsewhere("a", a, one("b"), one("c", store=False)), "one would serve for three"
    assert elsewhere("a", a, one("b"), one("c", store=None)), "which serves nobody, and needs nobody in its place"
    for nobody in (one("b", age=JUST_NOW + 0.1), one("b", store=False), one("b", left=True), one("b", store=None)):
        assert not elsewhere("a", a, nobody)
    assert not elsewhere("a", one("a"), one("b", store=False)), "none but itself has it"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """`Hub.elsewhere` of these gateways at 1000 monotonic seconds."""

    def told(name: str, *gateways: Gateway) -> bool:
        hub = object.__new__(snapshot.Hub)
        hub.gateways = {one.name: one for one in gateways}
        monkeypatch.setattr(snapshot.time, "monotonic", lambda: 1000.0)
        return hub.elsewhere(name)

    return told
