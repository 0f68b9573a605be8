"""Models that become as slow as on a CPU, by the speeds of their streams."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.control.measured import Measured
from corral.control.prober import Member
from corral.fleet.dispatch import SAMPLE_MIN
from corral.fleet.fallback import AGAIN, FALLEN, RESTORED, SAMPLES, SPAN, Pace, Streams

GPU, CPU = 60.0, 3.0
PROPERTY = settings(max_examples=200, derandomize=True)


class Streaming:
    """A model whose streams end two seconds apart."""

    def __init__(self, *speeds: float) -> None:
        self.pace, self.now = Pace(), 0.0
        self.at(*speeds)

    def at(self, *speeds: float, beside: float = 1.0, apart: float = 2.0) -> bool:
        """Streams of these speeds end; whether it has fallen back then."""
        for speed in speeds:
            self.now += apart
            self.pace.note(speed, beside, self.now)
        return self.pace.fallen


def test_a_model_falls_back_once_enough_streams_in_a_row_are_slow() -> None:
    model = Streaming(*[GPU] * SAMPLES)
    assert model.pace.good == GPU
    assert not model.at(*[CPU] * (SAMPLES - 1))
    assert model.at(CPU)
    assert (model.pace.last, model.pace.good) == (CPU, GPU)


def test_one_fast_stream_among_slow_ones_is_enough() -> None:
    model = Streaming(*[GPU] * SAMPLES)
    for _ in range(20):
        assert not model.at(*[CPU] * (SAMPLES - 1), GPU / (FALLEN - 1))


def test_what_is_slow_from_the_first_stream_on_is_a_cpu() -> None:
    assert not Streaming(*[CPU] * 50).pace.fallen


def test_the_first_speed_is_the_best_that_later_streams_had() -> None:
    model = Streaming(*[CPU] * SAMPLES)
    model.at(*[GPU] * SAMPLES)
    assert model.pace.good == GPU
    assert model.at(*[CPU] * SAMPLES)


def test_a_crowd_is_no_cpu() -> None:
    model = Streaming(*[GPU] * SAMPLES)
    assert not model.at(*[GPU / 10] * 50, beside=10.0)
    assert model.pace.good == GPU, "nor is it a faster node"
    assert model.at(*[CPU / 4] * SAMPLES, beside=4.0)


def test_what_holds_up_many_streams_for_a_moment_is_no_cpu() -> None:
    model = Streaming(*[GPU] * SAMPLES)
    assert not model.at(*[CPU] * SAMPLES, apart=SPAN / SAMPLES / 2)


def test_it_has_fallen_back_until_some_streams_are_about_as_fast_as_they_were() -> None:
    model = Streaming(*[GPU] * SAMPLES, *[CPU] * SAMPLES)
    assert model.at(*[GPU / (FALLEN - 1)] * 50), "less slow is not fast"
    assert model.at(*[CPU] * 10, *[GPU] * (AGAIN // 2))
    assert not model.at(*[GPU / RESTORED + 1] * AGAIN)
    assert not model.at(*[CPU] * (SAMPLES - 1)), "it begins anew"
    assert model.at(CPU)


def test_a_model_that_was_loaded_anew_is_judged_by_what_it_is_since() -> None:
    model = Streaming(*[GPU] * SAMPLES, *[CPU] * SAMPLES)
    model.pace.restart()
    assert not model.at(*[CPU] * (SAMPLES - 1))
    assert model.at(CPU), "by the speed that it had before"


@PROPERTY
@given(st.lists(st.floats(GPU / FALLEN + 0.1, GPU), max_size=100), st.floats(1.0, 64.0))
def test_nothing_falls_back_that_stays_within_the_factor(speeds: list[float], beside: float) -> None:
    model = Streaming(*[GPU] * SAMPLES)
    model.at(*speeds, beside=beside)
    assert not model.pace.fallen and model.pace.good == GPU


def test_who_ran_beside_whom() -> None:
    streams = Streams()
    assert streams.note(0.0, 10.0) == 1.0
    assert streams.note(5.0, 15.0) == 1.5
    assert streams.note(0.0, 10.0) == 2.5
    assert streams.note(20.0, 30.0) == streams.note(30.0, 30.0) == 1.0


def ps(share: float = 1.0, **more: Any) -> list[dict[str, Any]]:
    entry = {"name": "m:1", "digest": "d", "size": 1000}
    entry |= more
    return [entry | {"size_vram": int(share * entry["size"])}]


class Node:
    """A node that says that all of its model is on its GPU, and streams of it."""

    def __init__(self, share: float = 1.0, **more: Any) -> None:
        self.member = Member("a", "http://a:1", up=True, **more)
        self.ends = count(int(time.time()) + 100, 20)
        self.load(share)

    @property
    def measured(self) -> Measured:
        return self.member.measured

    def load(self, share: float = 1.0, **more: Any) -> None:
        """It is loaded (again)."""
        self.measured.resident(set(), time.monotonic())
        self.measured.resident({"m:1"}, time.monotonic())
        self.member.ps = ps(share, **more)
        self.measured.holds(self.member.ps)

    def streams(self, speed: float, number: int = SAMPLES) -> list[str]:
        """So many streams of that speed end; what has fallen back then."""
        for _ in range(number):
            ended = float(next(self.ends))
            self.measured.decoded("m:1", SAMPLE_MIN, ended - SAMPLE_MIN / speed, ended)
        return self.member.on_cpu


def test_a_node_whose_word_hides_it_is_told_by_its_speed() -> None:
    node = Node()
    assert node.streams(GPU) == [] and node.member.reason is None
    assert node.streams(CPU) == ["m:1"] == node.member.entry()["on_cpu"]
    assert node.member.reason == "m:1 gives 3 tokens/s there and gave 60, as if it ran on its CPU"
    node.member.ps = ps(0.0)
    assert node.member.on_cpu == ["m:1"], "once"
    node.member.up = False
    assert node.member.on_cpu == []


def test_it_is_told_until_it_is_fast_again() -> None:
    node = Node()
    node.streams(GPU)
    assert node.streams(CPU, SAMPLES + 5) == ["m:1"]
    assert node.streams(GPU, AGAIN) == []


@pytest.mark.parametrize(
    "node",
    [Node(accelerator="cpu"), Node(share=0.0), Node(share=0.0, accelerator="cpu")],
    ids=["declared", "never on a GPU", "both"],
)
def test_a_cpu_is_not_at_fault_for_its_speed(node: Node) -> None:
    node.streams(GPU)
    assert node.streams(CPU) == []


def test_another_file_or_size_begins_anew() -> None:
    for more in ({"digest": "other"}, {"size": 2000}):
        node = Node()
        node.streams(GPU)
        assert node.streams(CPU) == ["m:1"]
        node.load(**more)
        assert node.streams(CPU, 50) == []


def test_one_that_is_loaded_again_is_as_it_is_then() -> None:
    node = Node()
    node.streams(GPU)
    node.streams(CPU)
    node.load()
    assert node.member.on_cpu == []
    assert node.streams(CPU) == ["m:1"]


def test_streams_beside_a_load_and_short_ones_say_nothing() -> None:
    node = Node()
    node.streams(GPU)
    with node.measured.loads_now("big"):
        assert node.streams(CPU) == []
    node.measured.resident({"m:1", "big:latest"}, time.monotonic())
    node.measured.residents["big:latest"].appeared = float(next(node.ends)) + 20 * SAMPLES
    assert node.streams(CPU) == [], "control saw only its end"
    for _ in range(50):
        ended = float(next(node.ends))
        node.measured.decoded("m:1", SAMPLE_MIN - 1, ended - 9.0, ended)
    assert node.member.on_cpu == []
