"""`corral up --monitoring`: a real Prometheus scrapes every job, follows the fleet, and Alertmanager tells control."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.fleet import SimulatedNode
from support.monitoring import query, rules
from support.process import until
from support.up import Up, corral, nothing_left

from corral.config.prometheus import JOBS

SCRAPED = 60.0
"""Two intervals, one for the targets and one for the scrape, twice over."""


class Watched:
    """A stack with Prometheus and Alertmanager."""

    def __init__(self, folder: Path) -> None:
        self.up = Up(folder / "state", "--monitoring")
        self.told = self.up.ready()
        self.status = self.corral("status")
        self.prometheus: str = self.status["monitoring"]["prometheus"]["url"]
        self.alertmanager: str = self.status["monitoring"]["alertmanager"]["url"]

    def corral(self, *words: str) -> Any:
        return json.loads(corral(*words, "--json", state=self.up.state.root).stdout)

    def targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/api/v1/targets?state=active")["activeTargets"]
        return found

    def get(self, path: str) -> Any:
        return httpx.get(self.prometheus + path, timeout=60).json()["data"]

    def nodes(self) -> dict[str, str]:
        """Node → whether its page is scraped: up, down, unknown."""
        found = [target for target in self.targets() if target["labels"]["job"] == "ollama"]
        return {target["labels"]["node"]: target["health"] for target in found}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with ExitStack() as exits:
        made = Watched(tmp_path_factory.mktemp("scrape"))
        exits.callback(made.up.stop)
        yield made


def test_status_shows_where_they_are(watched: Watched) -> None:
    for name, known in watched.status["monitoring"].items():
        assert known["state"] == "up" and known["pid"] > 1, name
        assert known["url"] in corral("status", state=watched.up.state.root).stdout
    assert watched.told["monitoring"] == {
        name: {"url": known["url"]} for name, known in watched.status["monitoring"].items()
    }
    flags = watched.get("/api/v1/status/flags")
    assert flags["storage.tsdb.retention.time"] == "15d" and flags["web.listen-address"].startswith("127.0.0.1:")


def test_every_job_is_scraped(watched: Watched) -> None:
    def all_up() -> bool:
        targets = watched.targets()
        jobs = {target["labels"]["job"] for target in targets}
        return jobs == set(JOBS) and all(target["health"] == "up" for target in targets)

    until(all_up, "every target is up", SCRAPED, every=0.5)
    assert watched.nodes() == {"node-1": "up", "node-2": "up"}
    # A scrape holds for 15 s, also one that comes while a gateway has just missed the store, or control a node.
    until(lambda: query(watched.prometheus, "sum(corral_node_up) == 2"), "both nodes are up", SCRAPED, every=0.5)

    def stored() -> list[str]:
        return [series["metric"]["gateway"] for series in query(watched.prometheus, "corral_limit_store_up == 1")]

    until(lambda: stored() == ["gateway-1"], "the gateway has its store", SCRAPED, every=0.5)
    assert query(watched.prometheus, 'haproxy_backend_active_servers{proxy="gateways"}')
    assert not [series for series in query(watched.prometheus, '{__name__=~"corral_.+",exported_instance!=""}')]


def test_rules_and_alertmanager_are_in_place(watched: Watched) -> None:
    loaded = [rule for group in watched.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert len(loaded) == len(rules())
    until(
        lambda: all(
            rule["health"] == "ok" for group in watched.get("/api/v1/rules")["groups"] for rule in group["rules"]
        ),
        "every rule was evaluated",
        SCRAPED,
        every=0.5,
    )
    known = [one["url"] for one in watched.get("/api/v1/alertmanagers")["activeAlertmanagers"]]
    assert known == [f"{watched.alertmanager}/api/v2/alerts"]


def test_an_added_node_is_scraped_and_a_removed_one_is_not(watched: Watched, tmp_path: Path) -> None:
    node = SimulatedNode("node-3", tmp_path)
    try:
        watched.corral("nodes", "add", node.url, "--name", "node-3")
        until(lambda: watched.nodes().get("node-3") == "up", "node-3 is scraped", SCRAPED, every=0.5)
        watched.corral("nodes", "remove", "node-3")
        until(lambda: "node-3" not in watched.nodes(), "node-3 is not scraped any more", SCRAPED, every=0.5)
    finally:
        node.kill()


def test_what_fires_is_in_the_status_until_it_ends(watched: Watched) -> None:
    labels = {"alertname": "OnlyATest", "severity": "warning", "node": "node-1"}
    annotations = {"summary": "nothing is wrong", "runbook_url": "https://runbooks.example/OnlyATest"}

    def tell(ends: datetime) -> None:
        alert = {"labels": labels, "annotations": annotations, "endsAt": ends.isoformat()}
        httpx.post(f"{watched.alertmanager}/api/v2/alerts", json=[alert]).raise_for_status()

    found: list[dict[str, Any]] = []

    def firing() -> bool:
        found[:] = [alert for alert in watched.corral("status")["alerts"] if alert["name"] == "OnlyATest"]
        return bool(found)

    tell(datetime.now(UTC) + timedelta(hours=1))
    # Asked once: where Alertmanager takes a second to answer, control goes by notifications, which may yet come.
    until(firing, "control was told", every=0.5)
    (alert,) = found
    assert (alert["severity"], alert["summary"]) == ("warning", "nothing is wrong")
    tell(datetime.now(UTC))
    until(lambda: not firing(), "control was told that it ended", SCRAPED, every=0.5)


def test_they_end_with_the_stack_and_keep_their_data(watched: Watched) -> None:
    ports = (watched.up.state.stack() or {})["ports"]
    assert {"prometheus", "alertmanager", "control-metrics", "gateway-1-metrics"} <= ports.keys()
    assert watched.up.stop() == 0
    nothing_left(watched.up.state, {**ports, "edge": watched.up.port})
    assert (watched.up.state.root / "prometheus").is_dir()
