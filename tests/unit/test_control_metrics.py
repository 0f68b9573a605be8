"""What control measures, whom it tells Prometheus to scrape, and what Alertmanager may tell it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from corral.config.prometheus import DEFAULT, JOBS, PrometheusPlan, render
from corral.control import alerts as control_alerts
from corral.control import discovery, measure, pages
from corral.control.alerts import ANSWER_MAX, FORGET, KEPT_MAX, Alerts, BadNotification
from corral.control.canary import due, policies, stays
from corral.control.gateways import Gateway
from corral.control.measured import Measured, Residence
from corral.control.prober import Member
from corral.store.spool import SpoolReader, SpoolWriter, opened
from corral.wire.options import ModelPolicy

COMMITTED = Path(__file__).resolve().parents[2] / "monitoring/prometheus/prometheus.yml"


def samples(page: bytes) -> dict[str, float]:
    """``name{labels}`` → value."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


# -- prometheus.yml


def test_the_committed_file_is_the_default_rendering() -> None:
    assert COMMITTED.read_text() == render(DEFAULT), (
        "python -m corral.config.prometheus > ../monitoring/prometheus/prometheus.yml"
    )


def test_what_is_rendered_is_what_was_planned() -> None:
    import yaml

    config = yaml.safe_load(render(PrometheusPlan("[::1]:9102", "127.0.0.1:1", "rules/*.yml", "https://a/runbooks")))
    assert config["global"] == {
        "scrape_interval": "15s", "evaluation_interval": "15s", "external_labels": {"runbooks": "https://a/runbooks"},
    }  # fmt: skip
    assert config["rule_files"] == ["rules/*.yml"]
    urls = [job["http_sd_configs"][0]["url"] for job in config["scrape_configs"]]
    assert urls == [f"http://[::1]:9102/sd/{job}" for job in JOBS]


# -- targets


@pytest.mark.parametrize(
    ("told", "peer", "target"),
    [
        ("127.0.0.1:9101", "10.0.0.9", "127.0.0.1:9101"),
        ("gateway-1:9101", "10.0.0.9", "gateway-1:9101"),
        ("0.0.0.0:9101", "10.0.0.9", "10.0.0.9:9101"),
        ("[::]:9101", "fd00::9", "[fd00::9]:9101"),
        ("", "10.0.0.9", ""),
        ("10.0.0.1:0", "10.0.0.9", ""),
        ("10.0.0.1:99999", "10.0.0.9", ""),
        ("10.0.0.1:80/x", "10.0.0.9", ""),
        ("user@10.0.0.1:80", "10.0.0.9", ""),
        ("a" * 400 + ":80", "10.0.0.9", ""),
        ("0.0.0.0:9101", "", ""),
    ],
)
def test_where_a_gateway_is_scraped(told: str, peer: str, target: str) -> None:
    assert discovery.address(told, peer) == target


def test_targets_of_nodes_and_gateways() -> None:
    found = discovery.nodes([Member("a", "http://10.0.0.1:11434"), Member("b", "https://gpu.example")], "control:9102")
    assert [one["targets"] for one in found] == [["control:9102"]] * 2
    assert found[1]["labels"] == {
        "__metrics_path__": "/metrics/nodes/b", "node": "b", "instance": "gpu.example:443",
    }  # fmt: skip
    gateways = [Gateway("gateway-1", 0.0, "", "10.0.0.9:9101"), Gateway("gateway-2", 0.0, "")]
    assert discovery.gateways(gateways) == [{"targets": ["10.0.0.9:9101"], "labels": {"gateway": "gateway-1"}}]


# -- alerts


def notification(status: str = "firing", **labels: str) -> dict[str, Any]:
    alert = {
        "status": status,
        "labels": {"alertname": "NodeDown", "severity": "critical", **labels},
        "annotations": {"summary": "a node is down", "runbook_url": "https://a/NodeDown"},
        "startsAt": "2026-11-24T15:00:00.123456789Z",
        "endsAt": "0001-01-01T00:00:00Z",
    }
    return {"version": "4", "groupKey": "{}", "status": status, "receiver": "control", "alerts": [alert]}


def test_an_alert_is_listed_until_it_is_resolved() -> None:
    alerts = Alerts()
    alerts.take(notification(node="a"))
    alerts.take(notification(node="b"))
    alerts.take(notification(node="b"))
    assert [(one["labels"]["node"], one["state"]) for one in alerts.firing()] == [("a", "firing"), ("b", "firing")]
    assert {name: alerts.firing()[0][name] for name in ("name", "severity", "summary", "runbook_url", "since")} == {
        "name": "NodeDown", "severity": "critical", "summary": "a node is down", "runbook_url": "https://a/NodeDown",
        "since": "2026-11-24T15:00:00.123456789Z",
    }  # fmt: skip
    alerts.take(notification("resolved", node="a"))
    assert [one["labels"]["node"] for one in alerts.firing()] == ["b"]
    assert alerts.received == {"firing": 3, "resolved": 1}


def test_without_alertmanagers_answer_alerts_are_those_that_were_sent() -> None:
    alerts = Alerts("http://127.0.0.1:1")
    alerts.take(notification(node="a"))
    assert [one["labels"]["node"] for one in asyncio.run(alerts.now())] == ["a"]
    one = notification()["alerts"][0]
    good = json.dumps({**one, "labels": {"alertname": "N"}, "status": {"state": "active"}})
    assert [one["name"] for one in asked(alerts, f"[{good}]".encode())] == ["N"]
    for body in (
        *(b"{}", b"[7]", b"[{}]", b"<html>", b"[" * 200_000, b" " * (ANSWER_MAX + 1)),
        *(good.replace(was, to).encode() for was, to in (('"N"', '"\\ud800"'), ("active", "suppressed"))),
    ):
        assert [one["labels"]["node"] for one in asked(alerts, body)] == ["a"], body[:20]


def asked(alerts: Alerts, body: bytes) -> list[dict[str, Any]]:
    """What fires, where Alertmanager answers so."""
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=body))
    with patch("corral.control.alerts.http_client", partial(httpx.AsyncClient, transport=transport)):
        return asyncio.run(alerts.now())


def test_alertmanagers_answer_is_waited_for_a_second_in_all() -> None:
    alerts = Alerts("http://127.0.0.1:1")

    async def drop(_: httpx.Request) -> httpx.Response:
        async def bytes_() -> AsyncIterator[bytes]:
            while True:
                await asyncio.sleep(0.01)
                yield b" "

        return httpx.Response(200, content=bytes_())

    with (
        patch("corral.control.alerts.http_client", partial(httpx.AsyncClient, transport=httpx.MockTransport(drop))),
        patch.object(control_alerts, "ANSWER_WITHIN", 0.1),
    ):
        assert asyncio.run(asyncio.wait_for(alerts.now(), 30)) == []


def test_alerts_are_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    alerts = Alerts()
    for number in range(KEPT_MAX + 5):
        alerts.take(notification(node=str(number)))
    assert len(alerts.firing()) == KEPT_MAX
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + FORGET + 1)
    assert alerts.firing() == []


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"version": "3", "status": "firing", "alerts": []},
        {"version": "4", "status": "odd", "alerts": []},
        {"version": "4", "status": "firing"},
        {"version": "4", "status": "firing", "alerts": [1]},
        {"version": "4", "status": "firing", "alerts": [{"status": "firing", "labels": {"alertname": 1}}]},
        {"version": "4", "status": "firing", "alerts": [{"status": "firing", "labels": {"a": "b"}}]},
        {"version": "4", "status": "firing", "alerts": [{"status": "firing", "labels": {"alertname": "A"}}]},
    ],
)
def test_a_wrong_notification_changes_nothing(body: object) -> None:
    alerts = Alerts()
    with pytest.raises(BadNotification, match=r"expected|is needed"):
        alerts.take(body)
    assert alerts.firing() == [] and not any(alerts.received.values())


# -- the nodes


def test_loads_are_what_was_seen_to_come() -> None:
    measured = Measured()
    measured.resident({"a"}, 1.0)
    assert (measured.loads, measured.residents["a"].fresh) == ({"a": 0}, False), "it was there before"
    measured.held(["b"])
    measured.resident({"b"}, 2.0)
    measured.resident({"a", "b"}, 3.0)
    assert measured.loads == {"a": 1, "b": 1} and measured.unloads == {"a": 1, "b": 0}
    assert measured.residents["a"].fresh


def test_the_load_that_a_request_waited_for() -> None:
    measured = Measured()
    measured.resident(set(), 1.0)
    measured.resident({"a"}, 2.0)
    measured.residents["a"].appeared = 1000.0
    measured.waited("a", 999.0, 1100.0)
    measured.waited("a", 992.0, 999.5)
    measured.waited("a", 995.0, 1000.5)
    assert measured.load_seconds == {"a": 7.5}, "the one that waited longest saw it from its begin"
    measured.waited("a", 980.0, 990.0)
    measured.waited("a", 1001.0, 1002.0)
    measured.waited("b", 992.0, 999.5)
    assert measured.load_seconds == {"a": 7.5}, "these waited for no load of this one"
    measured.residents["a"].fresh = False
    measured.waited("a", 900.0, 1000.0)
    assert measured.load_seconds == {"a": 7.5}, "it was there before control was"


def test_a_record_may_come_before_its_model_is_seen() -> None:
    measured = Measured()
    measured.resident(set(), 1.0)
    now = time.time()
    measured.waited("a", now - 0.5, now - 0.2)
    measured.resident({"a"}, 2.0)
    assert measured.load_seconds["a"] == pytest.approx(0.3)
    measured.waited("b", now - 60.0, now - 50.0)
    measured.resident({"a", "b"}, 3.0)
    assert "b" not in measured.load_seconds, "it was not that one's load"


def test_one_hung_runner_is_enough() -> None:
    measured = Measured()
    measured.resident({"a", "b"}, 1.0)
    assert measured.canary_ok is None
    measured.residents["a"].proven = True
    assert measured.canary_ok is True
    measured.residents["b"].failing = True
    assert measured.canary_ok is False
    measured.resident({"a"}, 2.0)
    assert measured.canary_ok is True


def test_whose_turn_it_is() -> None:
    assert due({}, 100.0, 15.0) is None
    assert due({"a": Residence(1.0, False, tried=90.0), "b": Residence(1.0, False)}, 100.0, 15.0) == "b", (
        "the new one first"
    )
    known = {"a": Residence(1.0, False, tried=90.0), "b": Residence(1.0, False, tried=60.0)}
    assert due(known, 100.0, 15.0) is None
    assert due(known, 105.0, 15.0) == "b", "in turn"


def test_a_canary_keeps_no_model() -> None:
    now = 1_795_533_244.0
    assert stays("2026-11-24T15:14:24.5+00:00", 1_795_533_264.0 - 60) == "60.500s"
    assert stays("2318-03-06T14:00:00Z", now) == -1
    assert stays("2020-01-01T00:00:00Z", now) == "1.000s"
    assert stays(None, now) == stays("soon", now) == -1


def test_the_canary_has_the_options_of_the_catalogue() -> None:
    known = policies([{"name": "m", "num_ctx": 8192, "options": {"num_gpu": 9, "num_thread": "refuse"}}])
    assert known == {"m:latest": ModelPolicy(8192, {"num_gpu": 9}, frozenset({"num_thread"}))}


def test_a_node_that_computes_on_its_cpu() -> None:
    member = Member("a", "http://a:1", accelerator="gpu", up=True, memory=9)
    member.ps = [{"name": "m:latest", "size": 100, "size_vram": 50}]
    assert samples(pages.node_page(member))["corral_node_cpu_fallback"] == 0
    member.ps[0]["size_vram"] = 49
    seen = samples(pages.node_page(member))
    assert seen["corral_node_cpu_fallback"] == 1 and seen["corral_node_memory_bytes"] == 9
    assert seen["corral_node_model_vram_bytes{model=m:latest}"] == 49
    member.accelerator = "cpu"
    assert samples(pages.node_page(member))["corral_node_cpu_fallback"] == 0
    member.up = False
    seen = samples(pages.node_page(member))
    assert seen["corral_node_state{state=down}"] == 1 and seen["corral_node_state{state=ready}"] == 0
    assert not any(name.startswith("corral_node_model_resident{") for name in seen)


# -- the database


class Hanging:
    """A database that does not answer until it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.go = asyncio.Event()

    async def read(self, question: object) -> dict[str, int]:
        self.asked += 1
        await self.go.wait()
        return {"active": 1}


def test_a_database_that_hangs_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TIMEOUT", 0.05)

    async def run() -> None:
        database: Any = Hanging()
        assert [await measure.keys_by_state(database) for _ in range(3)] == [None, None, None]
        assert database.asked == 1
        database.go.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await measure.keys_by_state(database) == {"active": 1}

    asyncio.run(run())


def test_a_database_that_fails_is_none() -> None:
    class Failing:
        async def read(self, question: object) -> None:
            raise OperationalError("x", None, Exception("away"))

    database: Any = Failing()
    assert asyncio.run(measure.database(database)) is None
    assert samples(pages.render(pages._database(None))) == {"corral_database_up": 0}


# -- what is in the state folder


def test_a_backup_that_was_made(tmp_path: Path) -> None:
    assert pages.last_success(tmp_path / pages.BACKUP) is None
    (tmp_path / pages.BACKUP).write_text(json.dumps({"last_success": 12.5}))
    assert pages.last_success(tmp_path / pages.BACKUP) == 12.5
    (tmp_path / pages.BACKUP).write_text("[")
    assert pages.last_success(tmp_path / pages.BACKUP) is None


def test_the_backlog_of_a_spool(tmp_path: Path) -> None:
    writer, reader = SpoolWriter(tmp_path), SpoolReader(tmp_path)
    assert reader.backlog() == {}
    writer.append(b"{}")
    writer.flush()
    segment = writer.segment.name
    assert reader.backlog() == {segment: 10}
    assert abs(opened(segment) - time.time()) < 60
    reader.confirm(segment, 10)
    assert reader.backlog() == {}
    writer.close()
