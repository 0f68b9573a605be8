"""A gateway that alone has lost the store sees it by what control says of the others, and where all have lost it, that
nobody has."""

from __future__ import annotations

from collections.abc import Callable

import pytest

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
    return CutOff(lambda: store.connected, lambda: store.connections)


def polls(cut_off: CutOff, others: Callable[[float], int], start: float, end: float) -> float | None:
    """Control is asked each half second; when this gateway is alone for the first time."""
    now, first = start, None
    while now <= end:
        cut_off.heard(others(now), now)
        if first is None and cut_off.alone(now):
            first = now
        now += EACH
    return first


def test_one_that_alone_has_lost_it_leaves_after_others_had_it_for_a_while(store: Store) -> None:
    cut_off = made(store)
    assert polls(cut_off, lambda now: 1, 100.0, 110.0) == 100.0 + LASTING


def test_nobody_leaves_where_all_have_lost_it(store: Store) -> None:
    # The other one asks little: it sees the loss, and says so, a second after this one.
    assert polls(made(store), lambda now: int(now < 101.1), 100.0, 110.0) is None


def test_it_is_back_at_once_where_it_has_the_store_again(store: Store) -> None:
    cut_off = made(store)
    polls(cut_off, lambda now: 1, 100.0, 103.0)
    assert cut_off.alone(103.1)
    store.connected, store.connections = True, 2
    assert not cut_off.alone(103.1)
    store.connected = False  # lost anew: it begins from the start
    assert not cut_off.alone(103.2)
    assert polls(cut_off, lambda now: 1, 103.5, 110.0) == 103.5 + LASTING


def test_it_is_back_where_nobody_says_any_more_that_others_have_it(store: Store) -> None:
    cut_off = made(store)
    polls(cut_off, lambda now: 1, 100.0, 103.0)
    assert cut_off.alone(103.0 + CURRENT) and not cut_off.alone(103.1 + CURRENT), "control is away"
    assert polls(cut_off, lambda now: 1, 110.0, 115.0) == 110.0 + LASTING, "what was said before has ended"
    cut_off.heard(0, 115.5)
    assert not cut_off.alone(115.5), "others have none either"


def test_control_counts_whom_it_heard_just_now_and_who_did_not_leave(hub_of: Callable[..., int]) -> None:
    def one(name: str, age: float = 0.0, store: bool = True, left: bool = False) -> Gateway:
        return Gateway(name, 0.0, "", store=store, left=left, at=1000.0 - age)

    assert hub_of("a", one("a"), one("b"), one("c")) == 2
    assert hub_of("a", one("a", store=False), one("b")) == 1
    assert hub_of("a", one("b", age=JUST_NOW + 0.1), one("c", store=False), one("d", left=True)) == 0
    assert hub_of("", one("a")) == 1


@pytest.fixture
def hub_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`Hub.with_store` of these gateways at 1000 monotonic seconds."""
    from corral.control import snapshot

    def count(name: str, *gateways: Gateway) -> int:
        hub = object.__new__(snapshot.Hub)
        hub.gateways = {one.name: one for one in gateways}
        monkeypatch.setattr(snapshot.time, "monotonic", lambda: 1000.0)
        return hub.with_store(name)

    return count
