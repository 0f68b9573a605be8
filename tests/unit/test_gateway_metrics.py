"""A gateway's counters and their page: what is counted where, and that callers make no series."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.process import free_port

from corral.gateway.exposition import HEAD_MAX, Exposition
from corral.gateway.metrics import BETWEEN, EVERY_REASON, Histogram, Metrics
from corral.gateway.recover import Failure
from corral.gateway.settle import Settled, outcome_of, settled


def snapshot(held: frozenset[str] = frozenset({"m:latest"})) -> Any:
    return SimpleNamespace(held=held, policies={"catalogue:1b": None}, nodes={}, confirmed=0.0)


def record(**fields: Any) -> Settled:
    known: dict[str, Any] = {
        "id": "i", "request_id": "r", "ts": 1.0, "gw": "g", "key": "k", "addr": "a", "api": "native",
        "route": "/api/chat", "method": "POST", "model": "m", "status": 200, "outcome": "ok", "node": "node-1",
        "attempts": 1, "req_bytes": 1, "resp_bytes": 1, "prompt_tokens": 7, "tokens": 21, "estimated": False,
        "queue_ms": 2.0, "ttft_ms": 100.0, "ms": 1100.0,
    }  # fmt: skip
    return Settled(**known | fields)


def exchange(**fields: Any) -> Any:
    return SimpleNamespace(
        **{"path": "/api/chat", "model": "m", "arrived": 10.0, "refusal": "", "decoded": None, **fields}
    )


def page(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the page, by name and labels."""
    gateway = SimpleNamespace(
        metrics=metrics,
        snapshot=metrics._snapshot,
        running=set(),
        connections=[1, 2],
        limits=SimpleNamespace(sharing=SimpleNamespace(count=2), local=3),
        shipper=SimpleNamespace(backlog=lambda: 5, behind=lambda: 1.5, free=lambda: 9),
        spool_max=10,
        stopping=True,
        put_aside=lambda: ["a.torn"] * 3,
        journal=SimpleNamespace(failing=True, shed=2),
        store=SimpleNamespace(connected=False, connections=2),
        cut_off=SimpleNamespace(alone=lambda now: True),
        health=SimpleNamespace(canaries={}, ejections=2, frozen=1),
        queue=SimpleNamespace(waiting={"a": 1}, full=4, overdue=5, slots=SimpleNamespace(counts=True)),
    )
    text = Exposition(gateway, "").render().decode()  # type: ignore[arg-type]
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def one(samples: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_a_request_is_counted_with_its_tokens_and_times() -> None:
    metrics = Metrics(snapshot())
    for _ in range(2):
        metrics.settled(exchange(), record())
    metrics.settled(exchange(), record(model="m:latest"))
    seen = page(metrics)
    labels = {"route": "/api/chat", "api": "native", "model": "m:latest", "outcome": "ok", "code": "200"}
    assert one(seen, "corral_requests_total", **labels) == 3
    assert one(seen, "corral_tokens_total", model="m:latest", kind="prompt") == 21
    assert one(seen, "corral_tokens_total", model="m:latest", kind="generated") == 63
    assert one(seen, "corral_request_duration_seconds_count", route="/api/chat", model="m:latest") == 3
    assert one(seen, "corral_request_duration_seconds_sum", route="/api/chat", model="m:latest") == pytest.approx(3.3)
    assert one(seen, "corral_queue_duration_seconds_sum", model="m:latest") == pytest.approx(0.006)
    # 20 tokens in the second after the first one.
    assert one(seen, "corral_output_tokens_per_second_sum", model="m:latest") == pytest.approx(60)


def test_ignored_fields_are_counted_by_route_alone() -> None:
    metrics = Metrics(snapshot())
    for ignored in (0, 2, 1):
        metrics.settled(exchange(decoded=SimpleNamespace(ignored=ignored)), record())
    metrics.settled(exchange(decoded=SimpleNamespace(ignored=9)), record(attempts=0, status=429, outcome="limited"))
    seen = page(metrics)
    assert one(seen, "corral_ignored_fields_total", route="/api/chat") == 3
    assert one(seen, "corral_ignored_fields_total", route="/v1/messages") == 0


def test_a_histogram_has_cumulative_buckets_with_inclusive_bounds() -> None:
    metrics = Metrics(snapshot())
    pace = metrics.first_token(exchange(arrived=10.0), 10.25)
    assert pace is not None
    pace.piece(10.254)
    pace.piece(10.258)
    pace.piece(40.0)
    seen = page(metrics)
    assert one(seen, "corral_time_to_first_token_seconds_bucket", model="m:latest", le="0.25") == 1
    assert one(seen, "corral_time_to_first_token_seconds_bucket", model="m:latest", le="0.1") == 0
    between = [one(seen, "corral_time_between_tokens_seconds_bucket", model="m:latest", le=str(le)) for le in BETWEEN]
    assert between == [2] * len(BETWEEN), "each since the one before it"
    assert one(seen, "corral_time_between_tokens_seconds_bucket", model="m:latest", le="+Inf") == 3
    exact = Histogram((1.0, 2.0))
    exact.observe(1.0)
    assert exact.counts == [1, 0, 0], "a bound belongs to its bucket, as Prometheus has it"


def test_answers_without_tokens_are_not_timed() -> None:
    metrics = Metrics(snapshot())
    assert metrics.first_token(exchange(path="/api/embed"), 11.0) is None
    assert metrics.models == {}


def test_names_that_callers_invent_make_no_series_and_take_no_memory() -> None:
    metrics = Metrics(snapshot())
    for number in range(1000):
        metrics.settled(exchange(), record(model=f"x{number}", status=404, outcome="refused", attempts=0, node=""))
    metrics.settled(exchange(), record(model="catalogue:1b", status=404, outcome="refused", attempts=0))
    assert len(metrics.ended) == 2 and len(metrics.durations) == 2 and metrics.models == {}
    seen = page(metrics)
    labels = {"route": "/api/chat", "api": "native", "outcome": "refused", "code": "404"}
    assert one(seen, "corral_requests_total", model="", **labels) == 1000
    assert one(seen, "corral_requests_total", model="catalogue:1b", **labels) == 1
    assert one(seen, "corral_refusals_total", reason="not_found") == 1001


def test_one_that_left_early_does_not_hide_the_tokens_of_one_that_left_late() -> None:
    metrics = Metrics(snapshot())
    gone = {"status": 499, "outcome": "client_gone"}
    metrics.settled(exchange(), record(attempts=0, tokens=0, prompt_tokens=0, ttft_ms=None, **gone))
    metrics.settled(exchange(), record(tokens=4, **gone))
    seen = page(metrics)
    assert one(seen, "corral_tokens_total", model="m:latest", kind="generated") == 4
    assert one(seen, "corral_queue_duration_seconds_count", model="m:latest") == 1
    assert one(seen, "corral_output_tokens_per_second_count", model="m:latest") == 0


@pytest.mark.parametrize(
    ("status", "fields", "reason"),
    [
        (401, {}, "unauthorized"),
        (404, {}, "not_found"),
        (400, {}, "bad_request"),
        (413, {}, "too_large"),
        (431, {}, "too_large"),
        (429, {"refusal": "rpm", "decoded": 1}, "rpm"),
        (429, {"refusal": "concurrency", "decoded": 1}, "concurrency"),
        (503, {"refusal": "store", "decoded": 1}, "store"),
        (503, {"refusal": "recording", "decoded": 1}, "recording"),
        (503, {"decoded": 1}, "no_node"),
        (503, {}, "other"),
        (415, {}, "other"),
        (501, {}, "other"),
    ],
)
def test_a_refusal_has_its_reason(status: int, fields: dict[str, Any], reason: str) -> None:
    metrics = Metrics(snapshot())
    metrics.settled(exchange(**fields), record(status=status, outcome=outcome_of(status), attempts=0))
    assert {name: count for name, count in metrics.refusals.items() if count} == {reason: 1}
    assert set(metrics.refusals) == set(EVERY_REASON)


@pytest.mark.parametrize("outcome", ["ok", "upstream_error", "timeout", "client_gone"])
def test_what_was_not_refused_is_no_refusal(outcome: str) -> None:
    metrics = Metrics(snapshot())
    metrics.settled(exchange(), record(status=500, outcome=outcome))
    assert not any(metrics.refusals.values())


def test_every_retry_has_a_counter() -> None:
    metrics = Metrics(snapshot())
    for failure in set(Failure) - {Failure.CALLER}:
        metrics.retried(failure)
    reasons = ("connect", "reset", "down", "crash", "node", "timeout", "nonsense", "missing")
    assert metrics.retries == dict.fromkeys(reasons, 1)


def test_what_is_now() -> None:
    seen = page(Metrics(snapshot()))
    assert one(seen, "corral_connections") == 2 and one(seen, "corral_stopping") == 1
    assert one(seen, "corral_spool_bytes") == 5 and one(seen, "corral_spool_oldest_seconds") == 1.5
    assert one(seen, "corral_spool_failing") == 1 and one(seen, "corral_limit_store_up") == 0
    assert one(seen, "corral_spool_aside_files") == 3
    assert one(seen, "corral_local_admissions_total") == 3 and one(seen, "corral_limit_store_connections_total") == 2
    assert one(seen, "corral_queue_length") == one(seen, "corral_slots_shared") == 1
    assert one(seen, "corral_queue_full_total") == 4 and one(seen, "corral_queue_overdue_total") == 5


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"POST /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"GET /api/tags HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"a" * HEAD_MAX + b"\r\n\r\n", 431),
    ],
)
def test_the_port_serves_its_page_alone(sent: bytes, status: int) -> None:
    async def asked() -> bytes:
        port = free_port()
        gateway = SimpleNamespace()
        exposition = Exposition(gateway, f"127.0.0.1:{port}")  # type: ignore[arg-type]
        exposition._page.render = lambda: b""  # type: ignore[method-assign]
        await exposition.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        await exposition.close()
        return answer

    assert asyncio.run(asked()).split(b" ")[1] == b"%d" % status


def test_a_taken_port_ends_the_start_with_a_sentence() -> None:
    async def both() -> None:
        address = f"127.0.0.1:{free_port()}"
        first, second = (Exposition(SimpleNamespace(), address) for _ in range(2))  # type: ignore[arg-type]
        await first.start()
        try:
            await second.start()
        finally:
            await first.close()

    with pytest.raises(SystemExit, match=r"gateway\.metrics: 127\.0\.0\.1:\d+ cannot be used"):
        asyncio.run(both())


def test_a_name_that_needs_escapes_is_read_as_it_is() -> None:
    odd = 'a"b\\c:1'
    metrics = Metrics(snapshot(frozenset({odd})))
    metrics.settled(exchange(), record(model=odd))
    seen = page(metrics)
    assert one(seen, "corral_tokens_total", model=odd, kind="prompt") == 7
    assert one(seen, "corral_queue_duration_seconds_bucket", model=odd, le="+Inf") == 1


@pytest.mark.parametrize(
    ("counted", "outcome", "density"),
    [(40, "ok", 1.9), (2, "ok", 1.0), (0, "client_gone", 1.0), (40, "client_gone", 1.0), (10**6, "ok", 1.9)],
)
def test_what_a_model_counts_teaches_the_guess_of_its_keys_next_prompt(
    counted: int, outcome: str, density: float
) -> None:
    key = SimpleNamespace(density=1.0)
    responder = SimpleNamespace(prompt_tokens=counted, tokens=5, counted=True, kept=0)
    decoded = SimpleNamespace(estimate=10, responder=responder, more=())
    names = ("record_id", "request_id", "key_id", "address", "api", "path", "model", "node_name")
    asked = SimpleNamespace(
        **dict.fromkeys(names, "x"),
        **{
            "wall": 1.0,
            "gateway": SimpleNamespace(name="g", hashes=None),
            "method": b"POST",
            "attempts": 1,
            "body": b"",
            "key": key,
        },
        **{"queued": lambda now: 0.0, "arrived": 1.0, "first_token": 2.0, "decoded": decoded, "resumption": None},
        opened=True,
        overdue=False,
        model_digest=None,
    )
    settled(asked, 200, outcome, 1, 3.0)  # type: ignore[arg-type]
    assert key.density == pytest.approx(density)
