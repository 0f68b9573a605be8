"""Load tests: percentiles, tallies over models, nodes and time, thresholds, and the result's file."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import msgspec
import pytest

from corral.loadtest import answers, measure, progress, result, thresholds
from corral.loadtest.answers import CANCELLED, OK
from corral.loadtest.client import Answer
from corral.loadtest.errors import LoadTestError
from corral.loadtest.histogram import Histogram
from corral.loadtest.measure import Objectives, Recorder
from corral.loadtest.result import ErrorKind, Group, Summary

SHARES = [1, 25, 50, 90, 95, 99, 99.9, 100]


def exact(samples: list[float], share: float) -> float:
    """The nearest rank, by counting."""
    return next(v for v in sorted(samples) if sum(s <= v for s in samples) >= share / 100 * len(samples) - 1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 20, 100, 999])
def test_percentiles_of_few_samples_are_exact(count: int) -> None:
    rng = random.Random(count)
    samples = [rng.lognormvariate(0, 1) for _ in range(count)]
    histogram = Histogram()
    histogram.extend(samples)
    assert histogram.exact
    assert histogram.percentiles(SHARES) == [exact(samples, share) for share in SHARES]
    assert histogram.mean == pytest.approx(statistics.mean(samples))
    assert histogram.deviation == pytest.approx(statistics.stdev(samples) if count > 1 else 0)


def test_percentiles_of_many_samples_are_within_half_a_percent_and_memory_is_bounded() -> None:
    rng = random.Random(3)
    samples = [rng.lognormvariate(-3, 2) for _ in range(30_000)]
    histogram = Histogram(exact_max=1000)
    histogram.extend(samples)
    assert not histogram.exact
    ordered = sorted(samples)
    for share in SHARES:
        rank = -(-round(share * 10) * len(ordered) // 1000)
        assert histogram.percentile(share) == pytest.approx(ordered[rank - 1], rel=0.0051)
    assert (histogram.count, histogram.greatest, histogram.least) == (30_000, ordered[-1], ordered[0])
    assert histogram.deviation == pytest.approx(statistics.stdev(samples))
    histogram.extend([0.0, 1e-12, 3e7])
    assert len(histogram._buckets) < 3500


def test_merging_is_as_if_all_had_been_put_into_one() -> None:
    rng = random.Random(4)
    samples = [rng.random() for _ in range(3000)]
    for first, second in ((5000, 5000), (100, 5000), (5000, 100), (100, 100)):
        one, two = Histogram(first), Histogram(second)
        one.extend(samples[:2000])
        two.extend(samples[2000:])
        one.merge(two)
        assert one.count == 3000
        assert one.mean == pytest.approx(statistics.mean(samples))
        assert one.percentile(90) == pytest.approx(exact(samples, 90), rel=0.0051)


def test_no_samples() -> None:
    assert Histogram().percentiles([50, 99]) == [0.0, 0.0]
    assert measure.summary(Histogram()) == Summary()


# -- the recorder


def answered(
    times: list[float], ended: float, kind: str = OK, reason: str = "", node: str = "n1", **more: str
) -> Answer:
    reader = answers.reader("native", True)
    reader.times = times
    headers = {"x-corral-node": node, "x-corral-attempts": "1", "x-corral-queue-ms": "250"} | more
    return Answer(reader, status=200 if kind == OK else 503, kind=kind, reason=reason, ended=ended, headers=headers)


def recorded(*given: tuple[float, Answer], objectives: Objectives | None = None) -> Recorder:
    recorder = Recorder(objectives or Objectives(), 100.0)
    for due, answer in given:
        recorder.begun(due, 0.0)
        recorder.ended(answer, due, "m", "k", 0)
    return recorder


def test_latencies_count_from_the_time_a_request_was_due() -> None:
    recorder = recorded((100.0, answered([103.0, 103.5, 104.5], 105.0)))
    group = recorder.total.result(recorder.window, False)
    assert (group.measures["ttft"].max, group.measures["e2e"].max) == (3.0, 5.0)
    assert (group.measures["itl"].min, group.measures["itl"].max, group.measures["itl"].count) == (0.5, 1.0, 2)
    assert group.measures["queue"].max == 0.25
    assert group.measures["stream_rate"].max == pytest.approx(2 / 1.5)
    assert recorder.window == 5.0
    assert group.requests_per_s == 0.2


def test_what_failed_is_counted_and_is_no_latency() -> None:
    recorder = recorded(
        (100.0, answered([101.0], 102.0)),
        (100.0, answered([101.0], 103.0, "truncated", "cut")),
        (100.5, answered([], 104.0, "unavailable", "no node")),
        (100.6, answered([], 104.0, CANCELLED)),
    )
    group = recorder.total.result(recorder.window, False)
    assert (group.requests, group.ok, group.failed, group.cancelled) == (4, 1, 2, 1)
    assert group.error_rate == pytest.approx(2 / 3)
    assert group.errors == {"truncated": ErrorKind(1, {"cut": 1}), "unavailable": ErrorKind(1, {"no node": 1})}
    assert group.measures["e2e"].count == 1
    assert recorder.in_flight == 0


def test_goodput_counts_what_keeps_to_every_objective() -> None:
    good, slow_start = answered([101.0, 101.1, 101.2], 102.0), answered([102.5, 102.6], 103.0)
    slow_tokens = answered([101.0, 101.1, 102.9], 103.0)
    objectives = Objectives(ttft=2.0, itl=0.5)
    recorder = recorded((100.0, good), (100.0, slow_start), (100.0, slow_tokens), objectives=objectives)
    assert recorder.total.group.good == 1
    assert recorder.total.result(4.0, False).good_per_s == 0.25


def test_nodes_are_told_apart_and_bounded() -> None:
    recorder = recorded(*[(100.0, answered([100.1], 100.2, node=f"n{number}")) for number in range(100)])
    groups = recorder.groups("node")
    assert len(groups) == 65
    assert groups["other"].ok == 36
    assert sum(group.ok for group in groups.values()) == 100


def test_reasons_are_bounded() -> None:
    recorder = recorded(*[(100.0, answered([], 100.2, "connect", f"reason {n:x}")) for n in range(100)])
    kind = recorder.total.group.errors["connect"]
    assert (kind.count, len(kind.reasons), sum(kind.reasons.values())) == (100, 25, 100)


def test_the_series_is_bounded_and_loses_nothing() -> None:
    recorder = recorded(*[(100.0 + at, answered([100.5 + at, 101.0 + at], 101.0 + at)) for at in range(0, 3600, 7)])
    slots = recorder.series.result()
    assert len(slots) <= 240
    assert sum(slot.started for slot in slots) == sum(slot.ok for slot in slots) == len(range(0, 3600, 7))
    assert sum(slot.tokens for slot in slots) == 2 * len(range(0, 3600, 7))
    assert {slot.seconds for slot in slots} == {16.0}
    told = [slot.ttft_p50 for slot in slots if slot.ttft_p50 is not None]
    assert told == pytest.approx([0.5] * len(told))


def test_progress_tells_of_the_last_seconds() -> None:
    recorder = recorded(*[(100.0 + at, answered([100.5 + at], 101.0 + at)) for at in range(60)])
    counts = "  60.0 s  under way 0  done 60  1.0 req/s  1 tok/s  "
    times = "first token p50 500 ms p95 500 ms  end p50 1.00 s p95 1.00 s"
    assert progress.line(recorder, 160.0) == counts + times
    assert " 0.0 req/s  1 tok/s " in progress.line(recorder, 170.0), "what is long ago is no rate of now"
    assert "req/s" in progress.line(Recorder(Objectives(), 100.0), 100.0)


# -- thresholds

GROUP = Group(
    requests=110, ok=95, failed=5, good=80, requests_per_s=9.5, good_per_s=8.0, error_rate=0.05,
    errors={"truncated": ErrorKind(2, {})},
    measures={"ttft": Summary(count=95, p95=1.5, mean=0.5), "stream_rate": Summary(count=9, p50=40.0)},
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value", "passed"),
    [
        ("p95_ttft<2s", 1.5, True), ("p95_ttft < 1500ms", 1.5, False), ("p95_ttft<=1500ms", 1.5, True),
        ("mean_ttft<=0.4s", 0.5, False), ("error_rate<5%", 0.05, False), ("error_rate<=0.05", 0.05, True),
        ("goodput>=8", 8.0, True), ("good_share>90%", 0.8, False), ("requests_per_s>9", 9.5, True),
        ("errors.truncated==0", 2, False), ("errors.lost==0", 0, True), ("p50_stream_rate>30", 40.0, True),
        ("p95_itl<1s", None, False),
    ],
)  # fmt: skip
def test_thresholds(text: str, value: float | None, passed: bool) -> None:
    verdict = thresholds.parse(text).judge(GROUP)
    assert (verdict.value, verdict.passed) == (value, passed)


def test_a_threshold_on_nothing_measured_fails() -> None:
    assert not thresholds.parse("error_rate<100%").judge(Group()).passed


@pytest.mark.parametrize(
    "text",
    [
        "", "p95_ttft", "p95_ttft<", "p95_ttft<soon", "p42_ttft<1s", "p95_speed<1s", "error_rate<x%", "errors.magic==0",
        "p95_ttft!=1s",
    ],
)  # fmt: skip
def test_wrong_thresholds_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"^'"):
        thresholds.parse(text)


# -- the file


def test_a_result_is_read_as_it_was_written(tmp_path: Path, made: result.Result) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(result.encode(made))
    assert result.read(path) == made
    names = set(result.schema()["$defs"]["Result"]["properties"])
    assert names == set(msgspec.json.decode(path.read_bytes()))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(LoadTestError, match="is no result of"):
        result.read(path)
    with pytest.raises(LoadTestError, match="cannot be read"):
        result.read(tmp_path / "other.json")


def test_a_result_of_another_version_is_refused(tmp_path: Path, made: result.Result) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(result.encode(msgspec.structs.replace(made, version=2)))
    with pytest.raises(LoadTestError, match="has version 2"):
        result.read(path)
