"""Load tests: when requests are due, how long they are, and what a trace says."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from corral.loadtest import lengths, schedule, traces
from corral.loadtest.errors import LoadTestError
from corral.loadtest.prompts import Corpus
from corral.loadtest.schedule import Load, jobs
from corral.loadtest.traces import Arrival

LOAD = Load("poisson", (("a", 3.0), ("b", 1.0)), ("k1", "k2"), 1000, 60.0, rate=10.0)


def test_constant_arrivals_are_evenly_spaced() -> None:
    due = [job.due for job in jobs(dataclasses.replace(LOAD, mode="constant", rate=4.0, duration=2.0))]
    assert due == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


def test_poisson_arrivals_have_the_mean_and_the_spread_of_their_rate() -> None:
    times = list(itertools.islice(schedule.poisson(50.0, random.Random(1)), 20_000))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)
    # Memoryless: of the gaps over the mean, the same share is over twice the mean as of all over the mean.
    over = [gap for gap in gaps if gap > 0.02]
    assert len([gap for gap in over if gap > 0.04]) / len(over) == pytest.approx(len(over) / len(gaps), abs=0.02)


def test_a_schedule_ends_by_count_and_by_time() -> None:
    assert len(list(jobs(dataclasses.replace(LOAD, requests=7)))) == 7
    due = [job.due for job in jobs(dataclasses.replace(LOAD, duration=3.0))]
    assert due and all(at is not None and at < 3.0 for at in due)


def test_the_same_seed_gives_the_same_schedule_and_another_does_not() -> None:
    assert list(jobs(LOAD)) == list(jobs(LOAD))
    assert list(jobs(LOAD)) != list(jobs(dataclasses.replace(LOAD, seed=1)))


def test_models_do_not_move_arrivals() -> None:
    one = dataclasses.replace(LOAD, models=(("a", 1.0),), keys=("k",))
    assert [job.due for job in jobs(one)] == [job.due for job in jobs(LOAD)]


def test_models_are_drawn_by_weight_and_keys_evenly() -> None:
    drawn = list(jobs(dataclasses.replace(LOAD, mode="closed", requests=8000)))
    models, keys = Counter(job.model for job in drawn), Counter(job.key for job in drawn)
    assert models["a"] / models["b"] == pytest.approx(3, rel=0.1)
    assert keys[0] / keys[1] == pytest.approx(1, rel=0.1)
    assert {job.due for job in drawn} == {None}


def test_zipf_weights() -> None:
    assert schedule.zipf(["a", "b", "c"], 1.0) == (("a", 1.0), ("b", 0.5), ("c", 1 / 3))


def test_a_trace_keeps_its_lengths_and_is_scaled_in_time() -> None:
    arrivals = [Arrival(0.0, 100, 5), Arrival(3.0, 900, 50), Arrival(9.0, 10, 7)]
    load = dataclasses.replace(LOAD, mode="trace", arrivals=arrivals, speed=3.0)
    assert [(j.due, j.prompt_tokens, j.max_tokens) for j in jobs(load)] == [(0, 100, 5), (1, 900, 50), (3, 10, 7)]
    capped = dataclasses.replace(load, cap_prompt=200, cap_output=6)
    assert [(j.prompt_tokens, j.max_tokens) for j in jobs(capped)] == [(100, 5), (200, 6), (10, 6)]


# -- lengths


@pytest.mark.parametrize(
    ("text", "mean"),
    [("128", 128), ("64-512", 288), ("exp:300", 300), ("normal:256:16", 256), ("lognormal:100:0.5", 113.3)],
)
def test_lengths_have_their_mean(text: str, mean: float) -> None:
    rng, parsed = random.Random(2), lengths.parse(text)
    drawn = [parsed.draw(rng) for _ in range(20_000)]
    assert statistics.mean(drawn) == pytest.approx(mean, rel=0.03)
    assert min(drawn) >= 1


@pytest.mark.parametrize("text", ["", "0", "-5", "9-3", "exp:0", "normal:5", "many", "2000000", "1-2000000"])
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected tokens such as"):
        lengths.parse(text)


# -- prompts


@pytest.mark.parametrize("tokens", [1, 4, 5, 64, 70_000, 200_000])
def test_a_prompt_has_as_many_words_as_tokens(tokens: int) -> None:
    corpus = Corpus(0)
    assert len(corpus.prompt(3, tokens).split()) == tokens
    assert corpus.prompt(3, tokens) == Corpus(0).prompt(3, tokens)


def test_prompts_differ_from_their_first_word_on() -> None:
    corpus = Corpus(0)
    assert len({corpus.prompt(number, 20).split()[0] for number in range(1000)}) == 1000


def test_shared_blocks_are_shared_text() -> None:
    corpus = Corpus(0)
    one, two = corpus.prompt(1, 1200, (7, 8, 9)).split(), corpus.prompt(2, 1300, (7, 8, 10)).split()
    assert (len(one), len(two)) == (1200, 1300)
    assert one[:1024] == two[:1024]
    assert one[1024:] != two[1024:1200]


# -- traces


def test_the_traces_of_the_repository() -> None:
    azure, mooncake = traces.load("azure"), traces.load("mooncake")
    assert (len(azure), len(mooncake)) == (19_366, 12_031)
    assert azure[0] == Arrival(0.0, 374, 44)
    assert azure[1].at == pytest.approx(4.314579, abs=1e-5)
    assert statistics.mean(arrival.prompt_tokens for arrival in azure) == pytest.approx(1155, abs=1)
    assert statistics.mean(arrival.output_tokens for arrival in azure) == pytest.approx(211, abs=1)
    assert mooncake[0].blocks == tuple(range(14))
    assert mooncake[-1].at == pytest.approx(59 * 60, rel=0.01)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no request in it"),
        ("TIMESTAMP,ContextTokens\n", ":1: column GeneratedTokens is missing"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,10\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,10,10\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,0,10\n", ":2: tokens must be"),
        ("".join(f'{{"timestamp": {at}, "input_length": 1, "output_length": 1}}\n' for at in (5, 4)),
         ":2: the time goes back"),
        ('{"timestamp": 5, "input_length": "1"}\n', ":1: "),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}\n', ":1: "),
    ],
)  # fmt: skip
def test_a_wrong_trace_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(LoadTestError) as raised:
        traces.load(str(path))
    assert f"trace.csv{says}" in str(raised.value) or says in str(raised.value)


def test_a_trace_that_is_not_there() -> None:
    with pytest.raises(LoadTestError, match="no file"):
        traces.load("nowhere.csv")
