"""Control's pages of metrics: itself, each node, Valkey and the database. Read when they are asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hiredis
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from corral import __version__
from corral.control import audit, measure
from corral.control.context import Control
from corral.control.gateways import LATELY, Gateway
from corral.control.measured import number
from corral.control.prober import Member
from corral.store.valkey import ValkeyDown

STATES = ("ready", "suspect", "draining", "down")
BACKUP, DRILL = "backup.json", "drill.json"

_VALKEY = (
    ("memory_bytes", "used_memory", "Memory in use.", GaugeMetricFamily),
    ("memory_max_bytes", "maxmemory", "Memory that it may use; 0: no limit.", GaugeMetricFamily),
    ("clients", "connected_clients", "Connections.", GaugeMetricFamily),
    ("commands", "total_commands_processed", "Commands.", CounterMetricFamily),
    ("evicted_keys", "evicted_keys", "Keys that were evicted for want of memory.", CounterMetricFamily),
    ("uptime_seconds", "uptime_in_seconds", "Since it was started.", GaugeMetricFamily),
)

_process = CollectorRegistry()
ProcessCollector(registry=_process)


def gauge(name: str, text: str, value: float) -> Metric:
    """One number."""
    return GaugeMetricFamily(name, text, float(value))


def labelled(kind: type[Any], name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    """A counter or gauge of several series, by the values of their labels (one may stand without its tuple)."""
    family = kind(name, text, labels=labels)
    for of, value in values.items():
        family.add_metric((of,) if isinstance(of, str) else of, value)
    metric: Metric = family
    return metric


def render(metrics: Iterable[Metric]) -> bytes:
    """In Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Given(list(metrics)))
    return generate_latest(registry)


class _Given(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def lags_of(gateways: Iterable[Gateway]) -> dict[str, float]:
    """How far control is behind with each gateway's records (seconds). What one said that was not heard since holds no
    more: another one may have shipped it, and that it is away has an alert of its own."""
    since = time.monotonic() - LATELY
    return {gateway.name: gateway.behind for gateway in gateways if gateway.at >= since}


async def control_page(control: Control) -> bytes:
    """Control itself. Without the database, what is in it is left out."""
    known = await measure.keys_by_state(control.database)
    return render(_control(control, known, await _info(control) is not None)) + generate_latest(_process)


def _control(control: Control, keys: Mapping[str, int] | None, valkey: bool) -> Iterator[Metric]:
    yield labelled(GaugeMetricFamily, "corral_build_info", "1, by version.", ("version",), {__version__: 1})
    yield gauge("corral_control_leader", "1 while this control leads.", not control.leading.missing)
    yield gauge("corral_database_up", "1 while the database answers.", keys is not None)
    yield gauge("corral_valkey_up", "1 while Valkey answers.", valkey)
    gateways = control.hub.known()
    ready = sum(gateway.present for gateway in gateways)
    by_state = {"ready": ready, "down": len(gateways) - ready}
    yield labelled(GaugeMetricFamily, "corral_gateways", "Gateways of the last hour.", ("state",), by_state)
    spared = sum(bool(member.spared) for member in control.fleet.members.values())
    yield gauge("corral_nodes_spared", "Nodes that do not answer control and are used all the same.", spared)
    lags = lags_of(gateways)
    text = "How long the gateway's oldest record waits for control, by its own word."
    yield labelled(GaugeMetricFamily, "corral_ingest_lag_seconds", text, ("gateway",), lags)
    if keys is not None:
        yield labelled(GaugeMetricFamily, "corral_keys", "Keys.", ("state",), keys)
    usage = control.usage
    records = {**usage.records, "admin": audit.entered}
    yield labelled(CounterMetricFamily, "corral_audit_records", "Records of the audit trail.", ("kind",), records)
    for name, text, counts in (
        ("corral_key_requests", "Requests of a key that ended.", usage.requests),
        ("corral_key_limited", "Of them, those that a limit refused.", usage.limited),
    ):
        yield labelled(CounterMetricFamily, name, text, ("key", "tenant"), counts)
    text = "Tokens of a key."
    yield labelled(CounterMetricFamily, "corral_key_tokens", text, ("key", "tenant", "kind"), usage.tokens)
    text = "Notifications from Alertmanager."
    yield labelled(CounterMetricFamily, "corral_alerts_received", text, ("status",), control.alerts.received)
    ledger = control.ledger
    text = "When all records of the time had a signed checkpoint."
    yield gauge("corral_audit_signed_timestamp_seconds", text, ledger.signed_at)
    yield gauge("corral_audit_checkpoint", "Number of the last checkpoint.", ledger.number)
    if ledger.webhook.url is not None:
        text = "Number of the last checkpoint that the webhook took."
        yield gauge("corral_audit_delivered_checkpoint", text, ledger.webhook.delivered)
    text = "Requests that control settled, as their gateway was killed or their end was lost."
    yield CounterMetricFamily("corral_audit_recovered", text, ledger.recovered)
    for record, name, text in (
        (BACKUP, "corral_backup_last_success_timestamp_seconds", "When the last backup was made."),
        (DRILL, "corral_backup_drill_last_success_timestamp_seconds", "When a backup was last restored as a drill."),
    ):
        if (done := last_success(control.state / record)) is not None:
            yield gauge(name, text, done)


def last_success(record: Path) -> float | None:
    """Epoch seconds of the last backup or drill, as it left them in the state folder; None if there was none."""
    try:
        value = json.loads(record.read_text(encoding="utf-8"))
        return float(value["last_success"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- a node


def node_page(member: Member) -> bytes:
    """A node as the prober, the canary and the gateways' records show it."""
    return render(_node(member))


def _node(member: Member) -> Iterator[Metric]:
    measured = member.measured
    yield gauge("corral_node_up", "1 while it answers.", member.answers)
    states = {state: int(state == member.condition) for state in STATES}
    yield labelled(GaugeMetricFamily, "corral_node_state", "1 for the state it is in.", ("state",), states)
    labels = ("version", "accelerator", "url")
    about = {(member.version, member.accelerator or "", member.url): 1}
    yield labelled(GaugeMetricFamily, "corral_node_info", "1, by what it is.", labels, about)
    yield gauge("corral_node_slots", "Requests at once that it is for.", member.slots)
    if member.memory is not None:
        yield gauge("corral_node_memory_bytes", "Memory for models, as configured.", member.memory)
    yield gauge("corral_node_models", "Models that it holds.", len(member.tags))
    yield from _residents(member.ps if member.up else [], member.on_cpu)
    for name, text, counts in (
        ("corral_node_loads", "Seen to become resident.", measured.loads),
        ("corral_node_unloads", "Seen to leave the memory.", measured.unloads),
    ):
        yield labelled(CounterMetricFamily, name, text, ("model",), counts)
    for name, text, values in (
        ("corral_node_load_seconds", "Time of the last load that was seen.", measured.load_seconds),
        ("corral_node_tokens_per_second", "Decode rate of the last answer that told.", measured.rates),
    ):
        yield labelled(GaugeMetricFamily, name, text, ("model",), values)
    yield from _canary(member)
    failures = CounterMetricFamily("corral_node_probe_failures", "Probes without a good answer.")
    failures.add_metric((), measured.probe_failures)
    yield failures


def _residents(entries: list[dict[str, Any]], on_cpu: list[str]) -> Iterator[Metric]:
    sizes = {entry["name"]: number(entry.get("size")) for entry in entries}
    vram = {entry["name"]: number(entry.get("size_vram")) for entry in entries}
    for name, text, values in (
        ("corral_node_model_resident", "1 for a model in memory.", dict.fromkeys(sizes, 1)),
        ("corral_node_model_size_bytes", "Memory of a resident model.", sizes),
        ("corral_node_model_vram_bytes", "Of it, on the accelerator.", vram),
    ):
        yield labelled(GaugeMetricFamily, name, text, ("model",), values)
    text = "1 while a GPU node has most of a model in main memory, or is as slow as if it had."
    yield gauge("corral_node_cpu_fallback", text, bool(on_cpu))


def _canary(member: Member) -> Iterator[Metric]:
    measured = member.measured
    if member.answers and (good := measured.canary_ok) is not None:
        yield gauge("corral_node_canary_success", "1 while each resident model answered its last canary.", good)
    if measured.canary_duration is not None and measured.canary_success is not None:
        text = "Time of the last canary that got its token."
        yield gauge("corral_node_canary_duration_seconds", text, measured.canary_duration)
        text = "When that was."
        yield gauge("corral_node_canary_last_success_timestamp_seconds", text, measured.canary_success)


# -- the stores


async def valkey_page(control: Control) -> bytes:
    """Valkey by its own INFO."""
    return render(_valkey(await _info(control)))


def _valkey(info: Mapping[str, str] | None) -> Iterator[Metric]:
    yield gauge("corral_valkey_up", "1 while it answers.", info is not None)
    if info is None:
        return
    for name, field, text, kind in _VALKEY:
        if field in info:
            family = kind(f"corral_valkey_{name}", text)
            family.add_metric((), float(info[field]))
            yield family
    keys = sum(int(text.partition("keys=")[2].partition(",")[0]) for name, text in info.items() if name[:2] == "db")
    yield gauge("corral_valkey_keys", "Keys that it holds.", keys)


async def _info(control: Control) -> dict[str, str] | None:
    try:
        reply = await control.valkey.request(b"INFO")
    except (ValkeyDown, TimeoutError, hiredis.HiredisError):
        return None
    lines = reply.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))


async def database_page(control: Control) -> bytes:
    """The database by its own statistics."""
    return render(_database(await measure.database(control.database)))


def _database(seen: measure.Statistics | None) -> Iterator[Metric]:
    yield gauge("corral_database_up", "1 while it answers.", seen is not None)
    if seen is None:
        return
    yield gauge("corral_database_size_bytes", "Size on its disk.", seen.size)
    if seen.connections is not None:
        yield gauge("corral_database_connections", "Connections, everybody's.", seen.connections)
    if seen.connections_max is not None:
        yield gauge("corral_database_connections_max", "Connections that it allows.", seen.connections_max)
    if seen.transactions is not None:
        family = CounterMetricFamily("corral_database_transactions", "Transactions that ended.")
        family.add_metric((), seen.transactions)
        yield family
    text = "Rows of a table; those of audit are an estimate."
    yield labelled(GaugeMetricFamily, "corral_database_rows", text, ("table",), seen.rows)
