"""A gateway's /metrics, on a port of its own that callers never reach."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from corral import __version__
from corral.config.values import host_port
from corral.gateway.metrics import Histogram

if TYPE_CHECKING:
    from corral.gateway.server import Gateway

HEAD_MAX = 8 << 10
DEADLINE = 5.0
CONNECTIONS = 16

log = logging.getLogger(__name__)


class Exposition:
    """Serves `GET /metrics` and nothing else; every answer ends its connection. ``address`` is "" for none."""

    def __init__(self, gateway: Gateway, address: str) -> None:
        self.address = address
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(Page(gateway))
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self) -> None:
        """Listen; the process ends where the address cannot be used."""
        if self.address:
            host, port = host_port(self.address)
            try:
                self._server = await asyncio.start_server(self._serve, host, port, limit=HEAD_MAX)
            except OSError as error:
                reason = f"gateway.metrics: {self.address} cannot be used: {error.strerror or error}"
                raise SystemExit(f"corral: {reason}") from None
            log.info("metrics at http://%s/metrics", self.address)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(DEADLINE):
                if self._open > CONNECTIONS:
                    status, body = b"503 Service Unavailable", b"too many at once\n"
                else:
                    status, body = await self._answer(reader)
                head = b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
                kind = CONTENT_TYPE_PLAIN_0_0_4 if status.startswith(b"200") else "text/plain; charset=utf-8"
                writer.write(head % (status, kind.encode(), len(body)) + body)
                await writer.drain()
        except (OSError, TimeoutError):
            pass
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return b"431 Request Header Fields Too Large", b"the head is too large\n"
        except asyncio.IncompleteReadError:
            return b"400 Bad Request", b"expected a whole request\n"
        parts = head.partition(b"\r\n")[0].split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            return b"400 Bad Request", b"expected HTTP/1.1\n"
        if parts[1].partition(b"?")[0] != b"/metrics":
            return b"404 Not Found", b"there is /metrics\n"
        if parts[0] != b"GET":
            return b"405 Method Not Allowed", b"expected GET\n"
        return b"200 OK", generate_latest(self.registry)


class Page(Collector):
    """The gateway's own numbers, read when they are asked for."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._started = time.time()

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not read a gateway that is still being made."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield labelled(GaugeMetricFamily, "corral_build_info", "1, by version.", ("version",), {(__version__,): 1})
        yield from self._requests()
        yield from self._models()
        yield from self._now()

    def _requests(self) -> Iterator[Metric]:
        metrics = self._gateway.metrics
        ended: dict[tuple[str, ...], int] = {}
        for one in metrics.ended.values():
            names = (one.route, one.api, one.label, one.outcome, str(one.status))
            ended[names] = ended.get(names, 0) + one.count  # a model may be asked for with and without its tag
        yield labelled(
            CounterMetricFamily,
            "corral_requests",
            "Requests that ended.",
            ("route", "api", "model", "outcome", "code"),
            ended,
        )
        refusals = {(reason,): count for reason, count in metrics.refusals.items()}
        yield labelled(CounterMetricFamily, "corral_refusals", "Requests that were refused.", ("reason",), refusals)
        retries = {(reason,): count for reason, count in metrics.retries.items()}
        yield labelled(CounterMetricFamily, "corral_retries", "Attempts after a failed one.", ("reason",), retries)
        text = "Arrival to end of a request."
        yield histogram("corral_request_duration_seconds", text, ("route", "model"), metrics.durations)

    def _models(self) -> Iterator[Metric]:
        models = self._gateway.metrics.models
        for name, text, attribute in (
            ("corral_time_to_first_token_seconds", "Arrival to the answer's first token.", "first_token"),
            ("corral_time_between_tokens_seconds", "Between two pieces of an answer.", "between"),
            ("corral_queue_duration_seconds", "Arrival to dispatch.", "queue"),
            ("corral_output_tokens_per_second", "Tokens a second after the first one, of a whole answer.", "rate"),
        ):
            yield histogram(name, text, ("model",), {(model,): getattr(of, attribute) for model, of in models.items()})
        tokens = {(model, "prompt"): of.prompt for model, of in models.items()}
        tokens |= {(model, "generated"): of.generated for model, of in models.items()}
        yield labelled(CounterMetricFamily, "corral_tokens", "Tokens that nodes counted.", ("model", "kind"), tokens)

    def _now(self) -> Iterator[Metric]:
        gateway = self._gateway
        nodes = list(gateway.snapshot.nodes.values())
        busy = {(node.name,): node.in_flight for node in nodes}
        yield labelled(GaugeMetricFamily, "corral_requests_in_flight", "Requests on a node.", ("node",), busy)
        slots = {(node.name,): node.slots for node in nodes}
        yield labelled(GaugeMetricFamily, "corral_slots", "Requests at once that a node is for.", ("node",), slots)
        waiting = sum(not exchange.first_token for exchange in gateway.running)
        local = CounterMetricFamily("corral_local_admissions", "Requests admitted on the local share of a limit.")
        local.add_metric((), gateway.limits.local)
        yield local
        confirmed = gateway.snapshot.confirmed or self._started
        for name, text, value in (
            ("corral_requests_waiting", "Requests that wait for their first token.", waiting),
            ("corral_connections", "Callers' connections.", len(gateway.connections)),
            ("corral_spool_bytes", "Bytes of records that control has not confirmed.", gateway.shipper.backlog()),
            ("corral_spool_oldest_seconds", "How long the oldest of them wait.", gateway.shipper.behind()),
            ("corral_spool_failing", "1 while the disk takes no records.", gateway.journal.failing),
            ("corral_limit_store_up", "1 while this gateway reaches Valkey.", gateway.store.connected),
            ("corral_snapshot_age_seconds", "Since control confirmed keys.", max(0.0, time.time() - confirmed)),
        ):  # fmt: skip
            yield GaugeMetricFamily(name, text, float(value))


def labelled(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: Mapping[Any, int],
) -> Metric:
    """A counter or gauge of several series, by the values of their labels."""
    family = kind(name, text, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family


def histogram(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, Histogram]) -> Metric:
    """A histogram of several series."""
    family = HistogramMetricFamily(name, text, labels=labels)
    for of, known in values.items():
        count, buckets = 0, []
        for bound, more in zip((*map(str, known.bounds), "+Inf"), known.counts, strict=True):
            count += more
            buckets.append((bound, count))
        family.add_metric(of, buckets, known.total)
    return family
