"""A load test of a whole stack measures what its simulated nodes are said to take, and tells its faults apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import loadtest
from support.fleet import MODEL, SIMULATION, Fleet

from corral.loadtest.answers import KINDS

PROFILE = next(model for model in SIMULATION["models"] if model["name"] == MODEL)
PREFILL, DECODE = float(PROFILE["prefill"]), float(PROFILE["decode"])  # type: ignore[arg-type]
TOKENS = 21
WORDS = ("--model", MODEL, "--max-tokens", str(TOKENS))
SLACK = 0.12
"""Seconds that a stack of nine processes on two busy cores may add in the median."""


@pytest.fixture
def well(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet; no node shows a fault afterwards."""
    yield fleet
    for node in fleet.nodes.values():
        node.well()


@pytest.mark.parametrize("api", ["native", "openai", "anthropic"])
@pytest.mark.parametrize("loop", [("--closed", "6"), ("--poisson", "8")], ids=["closed", "open"])
def test_what_is_measured_is_what_the_nodes_take(fleet: Fleet, tmp_path: Path, api: str, loop: tuple[str, str]) -> None:
    words = (*WORDS, *loop, "--api", api, "--requests", "36", "--prompt-tokens", "50")
    found, done = loadtest.run(fleet.stack.url, tmp_path, *words, key=fleet.stack.key)
    assert done.returncode == 0, done.stderr
    total = found.total
    assert (total.ok, total.failed) == (36, 0)
    assert total.output_tokens == 36 * TOKENS
    prefill = total.prompt_tokens / 36 / PREFILL
    assert 0.4 < prefill < 0.7, "a prompt of 50 words and its template"
    ttft, itl, e2e = (total.measures[name] for name in ("ttft", "itl", "e2e"))
    # A node never comes early, and the median of them is little late.
    assert prefill * 0.98 <= ttft.min
    assert prefill * 0.98 <= ttft.p50 <= prefill + SLACK
    assert itl.mean == pytest.approx(1 / DECODE, rel=0.15)
    assert 1 / DECODE * 0.6 <= itl.p50 <= 1 / DECODE * 1.4
    whole = prefill + (TOKENS - 1) / DECODE
    assert whole * 0.98 <= e2e.p50 <= whole + SLACK
    assert total.measures["stream_rate"].p50 == pytest.approx(DECODE, rel=0.15)


def test_nodes_keys_and_models_are_told_apart(fleet: Fleet, tmp_path: Path) -> None:
    other = fleet.key("second")
    keys = tmp_path / "keys"
    keys.write_text(f"# two keys\n{fleet.stack.key}\n{other}\n")
    words = (*WORDS, "--model", "quick", "--closed", "8", "--requests", "60", "--key-file", str(keys))
    found, _ = loadtest.run(fleet.stack.url, tmp_path / "out", *words, key=fleet.stack.key)
    assert found.total.ok == 60
    assert set(found.by_node) == {"node-1", "node-2"}
    assert set(found.by_model) == {MODEL, "quick"}
    assert set(found.by_key) == {key.split("_")[1] for key in (fleet.stack.key, other)}
    for groups in (found.by_node, found.by_model, found.by_key):
        assert sum(group.ok for group in groups.values()) == 60
        assert all(group.ok > 0 for group in groups.values())
    assert found.total.attempts == 60
    assert "queue" in found.total.measures
    written = (tmp_path / "out" / "result.json").read_text() + (tmp_path / "out" / "report.html").read_text()
    assert fleet.stack.key not in written and other not in written


def test_a_limit_is_met_and_waited_out(fleet: Fleet, tmp_path: Path) -> None:
    words = ("--model", "quick", "--closed", "4", "--requests", "12", "--max-tokens", "2", "--warmup", "0")
    limited = fleet.key("limited", "--concurrency", "1")
    refused, _ = loadtest.run(fleet.stack.url, tmp_path / "refused", *words, "--max-tokens", "400", key=limited)
    assert refused.total.errors.keys() == {"rate_limited"}
    reasons = refused.total.errors["rate_limited"].reasons
    assert len(reasons) == 1 and "requests at the same time" in next(iter(reasons))
    assert refused.total.status["429"] == refused.total.failed > 0
    waited, done = loadtest.run(fleet.stack.url, tmp_path / "waited", *words, "--retry-after", key=limited)
    assert done.returncode == 0, done.stderr
    assert (waited.total.ok, waited.total.failed) == (12, 0)
    assert waited.total.retries > 0


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "cut_after", "after_tokens": 3},
        {"kind": "no_done", "after_tokens": 3},
        {"kind": "fail", "after_tokens": 3},
        {"kind": "fail", "status": 503},
        {"kind": "reset"},
    ],
    ids=json.dumps,
)
def test_a_fault_of_one_node_is_not_seen(well: Fleet, tmp_path: Path, fault: dict[str, object]) -> None:
    well.stack.until_continued()
    at_once = fault == {"kind": "fail", "status": 503}
    if at_once:
        # The canary asks for a token too, and would take one of the two.
        well.canary_asked("node-1")
    well.nodes["node-1"].fault(**fault, count=2)
    words = (*WORDS, "--closed", "4", "--requests", "24", "--prompt-tokens", "5", "--warmup", "0")
    found, _ = loadtest.run(well.stack.url, tmp_path, *words, key=well.stack.key)
    assert (found.total.ok, found.total.errors) == (24, {})
    if at_once:
        assert found.total.attempts == 26, "two were asked again on the other node"


def test_a_fault_of_all_nodes_is_told_in_the_stream(well: Fleet, tmp_path: Path) -> None:
    for node in well.nodes.values():
        node.fault(kind="fail", after_tokens=3)
    words = (*WORDS, "--closed", "1", "--requests", "4", "--prompt-tokens", "5", "--warmup", "0")
    found, _ = loadtest.run(well.stack.url, tmp_path, *words, key=well.stack.key)
    assert found.total.errors["error_in_stream"].count >= 1
    assert (found.total.ok, sum(error.count for error in found.total.errors.values())) == (0, 4)
    assert set(found.total.errors) <= set(KINDS)
