"""A gateway's /metrics, on a port of its own that callers never reach."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from corral import __version__
from corral.config.values import host_port
from corral.gateway.metrics import Histogram

if TYPE_CHECKING:
    from corral.gateway.server import Gateway

HEAD_MAX = 8 << 10
DEADLINE = 5.0
CONNECTIONS = 16
COUNTER, GAUGE = "counter", "gauge"

log = logging.getLogger(__name__)


class Exposition:
    """Serves `GET /metrics` and nothing else; every answer ends its connection. ``address`` is "" for none."""

    def __init__(self, gateway: Gateway, address: str) -> None:
        self.address = address
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        self._page = Page(gateway)
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
        return b"200 OK", self.render()

    def render(self) -> bytes:
        """The whole page."""
        return self._page.render() + generate_latest(self._process)


class Page:
    """The gateway's own numbers, read when they are asked for.

    Written here: prometheus_client takes some twenty times as long, and every stream would wait meanwhile.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._started = time.monotonic()

    def render(self) -> bytes:
        """In Prometheus's text format."""
        return "".join((*self._requests(), *self._models(), *self._now())).encode()

    def _requests(self) -> Iterator[str]:
        yield from family("corral_build_info", GAUGE, "1, by version.", ("version",), {(__version__,): 1})
        metrics = self._gateway.metrics
        ended: dict[tuple[str, ...], int] = {}
        for one in metrics.ended.values():
            names = (one.route, one.api, one.label, one.outcome, str(one.status))
            ended[names] = ended.get(names, 0) + one.count  # a model may be asked for with and without its tag
        labels = ("route", "api", "model", "outcome", "code")
        yield from family("corral_requests_total", COUNTER, "Requests that ended.", labels, ended)
        refusals = {(reason,): count for reason, count in metrics.refusals.items()}
        yield from family("corral_refusals_total", COUNTER, "Requests that were refused.", ("reason",), refusals)
        retries = {(reason,): count for reason, count in metrics.retries.items()}
        yield from family("corral_retries_total", COUNTER, "Attempts after a failed one.", ("reason",), retries)
        continued = {(outcome,): count for outcome, count in metrics.continuations.items()}
        text = "Answers whose node left after the first token."
        yield from family("corral_continuations_total", COUNTER, text, ("outcome",), continued)
        ignored = {(route,): count for route, count in metrics.ignored.items()}
        text = "Fields of bodies that mean nothing here."
        yield from family("corral_ignored_fields_total", COUNTER, text, ("route",), ignored)
        text = "Arrival to end of a request."
        yield from histogram("corral_request_duration_seconds", text, ("route", "model"), metrics.durations)

    def _models(self) -> Iterator[str]:
        models = self._gateway.metrics.models
        waits = "Waits for a node: arrival to dispatch, and before each further attempt."
        for name, text, attribute in (
            ("corral_time_to_first_token_seconds", "Arrival to the answer's first token.", "first_token"),
            ("corral_time_between_tokens_seconds", "Between two pieces of an answer.", "between"),
            ("corral_queue_duration_seconds", waits, "queue"),
            ("corral_output_tokens_per_second", "Tokens a second after the first one, of a whole answer.", "rate"),
        ):
            known = {(model,): getattr(of, attribute) for model, of in models.items()}
            yield from histogram(name, text, ("model",), known)
        tokens = {(model, "prompt"): of.prompt for model, of in models.items()}
        tokens |= {(model, "generated"): of.generated for model, of in models.items()}
        yield from family("corral_tokens_total", COUNTER, "Tokens that nodes counted.", ("model", "kind"), tokens)

    def _now(self) -> Iterator[str]:
        gateway = self._gateway
        nodes = list(gateway.snapshot.nodes.values())
        busy = {(node.name,): node.in_flight for node in nodes}
        yield from family("corral_requests_in_flight", GAUGE, "Requests on a node.", ("node",), busy)
        slots = {(node.name,): node.slots for node in nodes}
        yield from family("corral_slots", GAUGE, "Requests at once that a node is for.", ("node",), slots)
        waiting = sum(not exchange.first_token for exchange in gateway.running)
        age = time.monotonic() - max(gateway.snapshot.confirmed, self._started)
        local, health, queue = gateway.limits.local, gateway.health, gateway.queue
        ejected = sum(canary.ejected for canary in health.canaries.values())
        cut_off = gateway.cut_off.alone(time.monotonic())
        for name, kind, text, value in (
            ("corral_requests_waiting", GAUGE, "Requests that wait for their first token.", waiting),
            ("corral_queue_length", GAUGE, "Requests that wait for a slot.", len(queue.waiting)),
            ("corral_queue_full_total", COUNTER, "Requests refused, as too many waited.", queue.full),
            ("corral_queue_overdue_total", COUNTER, "Requests that waited for as long as they may.", queue.overdue),
            ("corral_slots_shared", GAUGE, "1 while the store counts slots for all gateways.", int(queue.slots.counts)),
            ("corral_connections", GAUGE, "Callers' connections.", len(gateway.connections)),
            ("corral_stopping", GAUGE, "1 while it waits for its last answers to end.", int(gateway.stopping)),
            ("corral_spool_bytes", GAUGE, "Records that control has not confirmed.", gateway.shipper.backlog()),
            ("corral_spool_oldest_seconds", GAUGE, "How long the oldest of them wait.", gateway.shipper.behind()),
            ("corral_spool_max_bytes", GAUGE, "Most that there may be of them.", gateway.spool_max),
            ("corral_spool_disk_free_bytes", GAUGE, "Free on the spool's disk.", gateway.shipper.free()),
            ("corral_spool_aside_files", GAUGE, "Damaged segments that were put aside.", len(gateway.put_aside())),
            ("corral_spool_shed_total", COUNTER, "Requests refused, as none can be recorded.", gateway.journal.shed),
            ("corral_spool_failing", GAUGE, "1 while the disk takes no records.", int(gateway.journal.failing)),
            ("corral_limit_store_up", GAUGE, "1 while this gateway reaches Valkey.", int(gateway.store.connected)),
            (
                "corral_cut_off",
                GAUGE,
                "1 while it lacks Valkey and others do not: it is sent nobody.",
                int(cut_off),
            ),
            ("corral_gateways_sharing", GAUGE, "Gateways that share limits and slots.", gateway.limits.sharing.count),
            ("corral_limit_store_connections_total", COUNTER, "Connections made to Valkey.", gateway.store.connections),
            ("corral_local_admissions_total", COUNTER, "Requests admitted on the local share of a limit.", local),
            ("corral_runners_suspect", GAUGE, "Models on nodes that get no new streams.", len(health.canaries)),
            ("corral_runners_ejected", GAUGE, "Those of them that gave no token when asked.", ejected),
            ("corral_ejections_total", COUNTER, "Models on nodes that were ejected.", health.ejections),
            ("corral_ejections_frozen_total", COUNTER, "Ejections that were too many at once.", health.frozen),
            ("corral_snapshot_age_seconds", GAUGE, "Since keys were confirmed by control and database.", age),
        ):
            yield from family(name, kind, text, (), {(): value})


def family(name: str, kind: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Iterator[str]:
    """A metric's lines, by the values of its labels."""
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for of, value in values.items():
        written = _labels(labels, of)
        yield f"{name}{{{written}}} {value}\n" if written else f"{name} {value}\n"


def histogram(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, Histogram]) -> Iterator[str]:
    """The same of a histogram."""
    yield f"# HELP {name} {text}\n# TYPE {name} histogram\n"
    for of, known in values.items():
        written = _labels(labels, of)
        bucket, count = f'{name}_bucket{{{written},le="', 0
        for bound, more in zip(known.bounds, known.counts, strict=False):
            count += more
            yield f'{bucket}{bound}"}} {count}\n'
        count += known.counts[-1]
        yield f'{bucket}+Inf"}} {count}\n{name}_count{{{written}}} {count}\n{name}_sum{{{written}}} {known.total}\n'


@lru_cache(4096)
def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
