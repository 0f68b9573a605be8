"""Every alert fires and is over once, through Prometheus and Alertmanager.

What can be broken is broken: processes are killed or stopped in a stack that runs, its stores run full, callers come in
crowds. What takes hours is said by an exporter of the test's. Rules are the repository's in
a hurry (support.monitoring.hasten): the same expressions over shorter times.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from support import monitoring
from support.exporter import Exporter, exporter
from support.fleet import SimulatedNode
from support.process import NotReady, until
from support.receivers import Receivers, receivers
from support.stage import LATE, MODEL, RUNBOOKS, Fired, Stage, pause, quick_alertmanager, quick_rules

PATIENCE = 240.0
"""Seconds that an alert may take to fire or to be over: what a late scrape makes it forget, it begins anew."""


@dataclass(frozen=True)
class Fault:
    """What is done to a stack, and what undoes it; ``meanwhile`` is done again and again until the alert fires, and
    ``after`` until it is over."""

    alert: str
    done: str
    do: Callable[[Stage], object]
    undo: Callable[[Stage], object]
    labels: dict[str, str] = field(default_factory=dict)
    meanwhile: Callable[[Stage], object] = lambda stage: None
    after: Callable[[Stage], object] = lambda stage: None


def pid(stage: Stage, part: str) -> int:
    """The process of a part; it is looked up once, since a stopped control cannot be asked."""
    known = stage.__dict__.setdefault("pids", {})
    if part not in known:
        told = stage.status()
        known |= {"control": told["control"]["pid"], "haproxy": told["edge"]["pid"]}
        known |= {gateway["name"]: gateway["pid"] for gateway in told["gateways"]}
    return int(known[part])


def stop(*parts: str) -> Callable[[Stage], None]:
    return lambda stage: [pause(pid(stage, part)) for part in parts] and None


def go_on(*parts: str) -> Callable[[Stage], None]:
    return lambda stage: [pause(pid(stage, part), signal.SIGCONT) for part in parts] and None


def room(limit: int) -> Callable[[Stage], None]:
    """Let gateway-1 write files of so many bytes: with 0 the disk takes nothing, whoever asks."""
    return lambda stage: psutil.Process(pid(stage, "gateway-1")).rlimit(
        psutil.RLIMIT_FSIZE, (limit, psutil.RLIM_INFINITY)
    )  # type: ignore[func-returns-value]


def each(what: Callable[[SimulatedNode], object]) -> Callable[[Stage], None]:
    return lambda stage: [what(node) for node in stage.nodes.values()] and None


FAULTS = [
    Fault("NodeDown", "node-1 killed (SIGKILL)", lambda s: s.nodes["node-1"].kill(),
          lambda s: s.nodes["node-1"].start(), {"node": "node-1"}, after=lambda s: s.ask(1)),
    Fault("NodeRunnerHung", "node-2 answers probes and generates nothing",
          lambda s: s.nodes["node-2"].fault(kind="hang"), each(SimulatedNode.well), {"node": "node-2"}),
    Fault("EjectionsFrozen", "both nodes generate nothing, and callers come", Stage.hang_under_callers,
          Stage.callers_go_on, meanwhile=Stage.grow),
    Fault("ProberDistrusted", "both nodes say after 3 s what they hold: control waits for 2 s, HAProxy does not ask",
          each(lambda node: node.fault(kind="slow", scope="listings", delay=3.0)), each(SimulatedNode.well)),
    Fault("LimitStoreDown", "Valkey killed (SIGKILL)", lambda s: s.valkey.process.end(signal.SIGKILL),
          Stage.revive_valkey),
    Fault("GatewayDown", "gateway-2 stopped (SIGSTOP)", stop("gateway-2"), go_on("gateway-2"),
          {"gateway": "gateway-2"}),
    Fault("HaproxyBackendDown", "both gateways stopped (SIGSTOP)", stop("gateway-1", "gateway-2"),
          go_on("gateway-1", "gateway-2"), {"proxy": "gateways"}),
    Fault("ControlDown", "control stopped (SIGSTOP)", stop("control"), go_on("control")),
    Fault("EdgeDown", "HAProxy stopped (SIGSTOP)", stop("haproxy"), go_on("haproxy")),
    Fault("HighErrorRate", "both nodes answer 500", each(lambda node: node.fault(kind="fail", status=500)),
          each(SimulatedNode.well),
          {"window": "1h"}, meanwhile=lambda s: s.ask(4), after=lambda s: s.ask(20)),
    Fault("StreamsCut", "both nodes fail in the midst of each answer",
          each(lambda node: node.fault(kind="fail", after_tokens=3)), each(SimulatedNode.well),
          meanwhile=lambda s: s.ask(4), after=lambda s: s.ask(1)),
    Fault("ModelUnavailable", "both nodes killed (SIGKILL)", each(SimulatedNode.kill),
          each(SimulatedNode.start), {"model": MODEL}, meanwhile=lambda s: s.ask(2), after=lambda s: s.ask(4)),
    Fault("SlowFirstToken", "a crowd for a slow model", lambda s: s.come(LATE), Stage.leave,
          {"window": "1h", "model": LATE}, meanwhile=Stage.grow),
    Fault("QueueGrowing", "more and more callers", lambda s: s.come(LATE), Stage.leave, meanwhile=Stage.grow),
    Fault("SpoolFailing", "gateway-1 cannot write (RLIMIT_FSIZE)", room(0), room(psutil.RLIM_INFINITY),
          {"gateway": "gateway-1"}, meanwhile=lambda s: s.ask(4), after=lambda s: s.ask(4)),
    Fault("LimitStoreFull", "Valkey's maxmemory lowered", Stage.fill_valkey, Stage.empty_valkey),
    Fault("DatabaseDown", "PostgreSQL stopped", lambda s: s.database.stop(), lambda s: s.database.start()),
    Fault("ModelReloadThrash", "node-1 asked for twelve models in turn", lambda s: s.thrash("node-1"), lambda s: None,
          {"node": "node-1"}, meanwhile=lambda s: s.thrash("node-1")),
    Fault("NodeCpuFallback", "a GPU node with a model in main memory", Stage.gpu_node, Stage.no_gpu_node,
          {"node": "gpu"}),
    Fault("BackupTooOld", "the last backup is 27 hours old", lambda s: s.backup(27 * 3600.0), lambda s: s.backup(60)),
    Fault("BackupMissing", "there is no backup", lambda s: s.backup(None), lambda s: s.backup(60)),
    Fault("RestoreUnproven", "the last drill is 36 days old", lambda s: s.backup(36 * 86400.0, "drill"),
          lambda s: s.backup(60, "drill"), {"severity": "warning"}),
    Fault("RestoreUnproven", "there was never a drill", lambda s: s.backup(None, "drill"),
          lambda s: s.backup(60, "drill"), {"severity": "info"}),
    Fault("SpoolFilling", "records come, and PostgreSQL is stopped", lambda s: s.database.stop(),
          lambda s: s.database.start(), {"gateway": "gateway-1"}, meanwhile=lambda s: s.record(50)),
    Fault("IngestBehind", "a session of PostgreSQL locks a table that ingest writes", Stage.hold_records,
          Stage.release_records),
    Fault("LeaderMissing", "a control that nobody scrapes holds the lease", Stage.lead_elsewhere, lambda s: None,
          meanwhile=Stage.lead_elsewhere),
    Fault("CheckpointLate", "a folder in the place of the checkpoints' file", Stage.no_file_of_checkpoints,
          Stage.file_of_checkpoints, {"severity": "critical"}, meanwhile=lambda s: s.record(1)),
    Fault("CheckpointLate", "the webhook of checkpoints answers 503", lambda s: s.heard.away(True),
          lambda s: s.heard.away(False), {"severity": "warning"}, meanwhile=lambda s: s.record(1)),
    Fault("VersionMismatch", "a gateway of another version beside the two", Stage.newer_gateway,
          Stage.no_newer_gateway),
    Fault("ScrapeMissing", "every node taken out", Stage.no_nodes, Stage.nodes_again, {"job": "ollama"}),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.alert)
def test_what_is_broken_fires_and_what_is_mended_is_over(whole_stage: Stage, table: list[Fired], fault: Fault) -> None:
    stage = whole_stage
    pid(stage, "control")
    until(stage.quiet, "nothing else is wrong", PATIENCE, every=0.3)

    def hear(status: str, since: float, doing: Callable[[Stage], object], what: str) -> None:
        def look() -> object:
            doing(stage)
            return stage.heard.told(fault.alert, status, since, **fault.labels)

        try:
            until(look, f"{fault.alert} {what}", PATIENCE, every=0.1)
        except NotReady as error:
            raise NotReady(f"{error}: {stage.alerts()}") from None

    began = time.monotonic()
    try:
        fault.do(stage)
        hear("firing", began, fault.meanwhile, "fires")
    finally:
        mended = time.monotonic()
        fault.undo(stage)
    hear("resolved", mended, fault.after, "is over")
    fired = stage.heard.told(fault.alert, "firing", began, **fault.labels) - began
    over = stage.heard.told(fault.alert, "resolved", mended, **fault.labels) - mended
    table.append(Fired(fault.alert, fault.done, fired, over))
    told = [alert for message in stage.heard.control for alert in message["alerts"]]
    links = {alert["annotations"]["runbook_url"] for alert in told if alert["labels"]["alertname"] == fault.alert}
    assert links == {f"{RUNBOOKS}/{fault.alert}.md"}
    assert not any("runbooks" in alert["labels"] for alert in told)
    assert stage.heard.refused == []


# -- what others hold back


def suppressed(stage: Stage) -> set[str]:
    """Alerts that Alertmanager has and does not tell."""
    return {alert for alert, state in stage.alerts()["Alertmanager"] if state == "suppressed"}


Doing = Callable[[Stage], object]
HELD: list[tuple[str, set[str], Doing, Doing]] = [
    ("ControlDown", {"SnapshotStale", "SpoolBacklog"}, stop("control"), go_on("control")),
    ("DatabaseDown", {"SpoolBacklog", "IngestBehind"}, lambda s: s.database.stop(),
     lambda s: s.database.start()),
]  # fmt: skip


@pytest.mark.parametrize(("told", "held", "do", "undo"), HELD, ids=[told for told, *_ in HELD])
def test_what_only_follows_fires_and_is_not_told(
    whole_stage: Stage,
    table: list[Fired],
    told: str,
    held: set[str],
    do: Doing,
    undo: Doing,
) -> None:
    stage = whole_stage
    pid(stage, "control")
    until(stage.quiet, "nothing else is wrong", PATIENCE, every=0.3)
    fired: dict[str, float] = {}

    def firing() -> bool:
        stage.ask(1)
        back = suppressed(stage)  # first: what is held back fires
        now = {one["metric"]["alertname"] for one in stage.query('ALERTS{alertstate="firing"}')}
        fired.update({name: time.monotonic() - began for name in now if name not in fired})
        return held <= back

    began = time.monotonic()
    do(stage)
    try:
        until(firing, f"{held} fire, and are held back", PATIENCE, every=0.3)
        until(lambda: stage.heard.told(told, "firing", began), f"{told} is told")
    finally:
        mended = time.monotonic()
        undo(stage)
    until(lambda: not stage.query('ALERTS{alertstate="firing"}'), "all is over", PATIENCE, every=0.3)
    # What was held back until it ended is told to nobody: it is asked for.
    until(lambda: not stage.status()["alerts"], "nothing is in the status", every=0.3)
    over = time.monotonic() - mended
    table.extend(Fired(name, f"{told} holds it back", fired[name], over) for name in sorted(held))
    heard = {alert["labels"]["alertname"] for message in stage.heard.control if message["at"] > began
             for alert in message["alerts"] if alert["status"] == "firing"}  # fmt: skip
    assert told in heard


# -- what the test only says

NODE, GATEWAY = 'node="node-1"', 'gateway="gateway-1"'
GOOD: dict[str, dict[str, float]] = {
    "ollama": {
        f"corral_node_up{{{NODE}}}": 1,
        f"corral_node_cpu_fallback{{{NODE}}}": 0,
        f'corral_node_loads_total{{{NODE},model="m"}}': 0,
        f'corral_node_model_resident{{{NODE},model="m"}}': 1,
    },
    "api-gateway": {
        'corral_build_info{version="1.0"}': 1,
        'corral_requests_total{model="m",outcome="ok"}': 0,
        'corral_requests_total{model="m",outcome="timeout"}': 0,
        'corral_time_to_first_token_seconds_bucket{model="m",le="10.0"}': 0,
        'corral_time_to_first_token_seconds_count{model="m"}': 0,
        "corral_requests_waiting": 0,
        f"corral_slots{{{NODE}}}": 4,
        f"corral_spool_failing{{{GATEWAY}}}": 0,
        f"corral_spool_oldest_seconds{{{GATEWAY}}}": 0,
        f"corral_spool_bytes{{{GATEWAY}}}": 0,
        f"corral_spool_max_bytes{{{GATEWAY}}}": 100,
        f"corral_spool_disk_free_bytes{{{GATEWAY}}}": 1000,
        f"corral_snapshot_age_seconds{{{GATEWAY}}}": 1,
        f"corral_ejections_frozen_total{{{GATEWAY}}}": 0,
    },
    "control": {
        'corral_build_info{version="1.0"}': 1,
        "corral_control_leader": 1,
        "corral_database_up": 1,
        "corral_backup_last_success_timestamp_seconds": 4e9,
        "corral_audit_signed_timestamp_seconds": 4e9,
        "corral_backup_drill_last_success_timestamp_seconds": 4e9,
        f"corral_ingest_lag_seconds{{{GATEWAY}}}": 0,
    },
    "redis": {"corral_valkey_memory_bytes": 100, "corral_valkey_memory_max_bytes": 256},
    "postgres": {},
    "haproxy": {"haproxy_process_uptime_seconds": 1},
}
FLOW: dict[str, float] = {
    'corral_requests_total{model="m",outcome="ok"}': 50,
    'corral_time_to_first_token_seconds_bucket{model="m",le="10.0"}': 50,
    'corral_time_to_first_token_seconds_count{model="m"}': 50,
}


@dataclass(frozen=True)
class Told:
    """What the exporter says from now on: values by job and series, and what counters grow by at each scrape."""

    alert: str
    done: str
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)


TOLD = [
    [
        Told("SlowFirstToken", "said: every first token late",
             rates={'corral_time_to_first_token_seconds_bucket{model="m",le="10.0"}': 0}),
        Told("HighErrorRate", "said: every request fails",
             rates={'corral_requests_total{model="m",outcome="timeout"}': 50,
                    'corral_requests_total{model="m",outcome="ok"}': 0}),
    ],
]  # fmt: skip


def say(made: Exporter, told: list[Told]) -> None:
    """Have the exporter say that all is well, but for ``told``. Counters go on from where they are."""
    before = {series: value for page in made.pages.values() if page for series, value in page.items()}
    counters = [series for page in GOOD.values() for series in page if "_total" in series or "first_token" in series]
    pages = {job: dict(page) for job, page in GOOD.items()}
    for page in pages.values():
        page.update({series: before[series] for series in counters if series in page and series in before})
    rates = dict(FLOW)
    for one in told:
        rates |= one.rates
        for job, values in one.values.items():
            pages[job].update(values)
    made.pages, made.rates = dict(pages), rates


def test_what_is_said_fires_and_is_over(tmp_path: Path, table: list[Fired]) -> None:
    with receivers() as heard, exporter() as made, quick_alertmanager(tmp_path, heard) as manager:
        say(made, [])
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(quick_rules(tmp_path, 120.0, 5.0, 5.0) / "*.yml")],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [manager.url.removeprefix("http://")]}]}]},
            "scrape_configs": made.scrape_configs(),
        }
        with monitoring.prometheus(tmp_path, config) as prometheus:
            until(lambda: len(monitoring.query(prometheus.url, "up == 1")) == len(GOOD), "all is scraped")
            for told in TOLD:
                table.extend(fire(prometheus.url, heard, made, told))
    assert heard.refused == []


def fire(url: str, heard: Receivers, made: Exporter, told: list[Told]) -> list[Fired]:
    """Say it, wait until every alert of it fires, take it back, and wait until every one is over."""
    until(lambda: not monitoring.query(url, "ALERTS"), "nothing fires", PATIENCE, every=0.3)
    began = time.monotonic()
    say(made, told)

    def missing(status: str, since: float) -> list[str]:
        return [one.alert for one in told if not heard.told(one.alert, status, since)]

    def wait(status: str, since: float) -> None:
        try:
            until(lambda: not missing(status, since), f"each is {status}", PATIENCE, every=0.2)
        except NotReady as error:
            raise NotReady(f"{error}: {missing(status, since)}") from None

    def windows(alert: str) -> set[str]:
        firing = monitoring.query(url, f'ALERTS{{alertname="{alert}",alertstate="firing"}}')
        return {series["metric"]["window"] for series in firing}

    wait("firing", began)
    if any(one.alert == "SlowFirstToken" for one in told):
        every = {"1h", "6h", "3d"}
        for alert in ("SlowFirstToken", "HighErrorRate"):
            until(lambda alert=alert: windows(alert) == every, f"{alert} in each window", PATIENCE)  # type: ignore[misc]
    mended = time.monotonic()
    say(made, [])
    wait("resolved", mended)
    return [
        Fired(one.alert, one.done, heard.told(one.alert, "firing", began) - began,
              heard.told(one.alert, "resolved", mended) - mended)
        for one in told
    ]  # fmt: skip


def test_no_alert_is_left_out() -> None:
    tried = {fault.alert for fault in FAULTS} | {one.alert for told in TOLD for one in told}
    tried |= {name for _, held, _, _ in HELD for name in held}
    assert tried == {rule["alert"] for rule in monitoring.alerts()}
