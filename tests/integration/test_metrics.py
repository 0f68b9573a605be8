"""Metrics of a stack that runs: each one that is documented is there, and the numbers are those of the requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.fleet import MODEL, QUICK, SINGLE, SimulatedNode
from support.metrics import Page, documented, page
from support.process import NotReady, until
from support.stack import Stack, stack
from support.up import Up, corral

REQUESTS, TOKENS = 6, 12
ALERT: dict[str, Any] = {
    "version": "4",
    "status": "firing",
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "NodeDown", "severity": "critical", "node": "node-9"},
            "annotations": {"summary": "node-9 is away", "runbook_url": "https://runbooks.example/NodeDown"},
            "startsAt": "2026-11-24T15:00:00Z",
        }
    ],
}


class Watched:
    """A stack of two gateways and two nodes after a little traffic. ``answers`` are the last lines of its answers."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self.nodes = [SimulatedNode(name, folder) for name in ("node-1", "node-2")]
        for node in self.nodes:
            exits.callback(node.kill)
        config = folder / "corral.yaml"
        settings = {
            "gateway": {"processes": 2, "first_token": "3s"},
            "control": {"canary": {"interval": "1s", "timeout": "1s"}},
            "models": [{"name": MODEL}],
        }
        config.write_text(yaml.safe_dump(settings))
        attach = [f"--attach={node.url}" for node in self.nodes]
        self.stack: Stack = exits.enter_context(stack(folder / "state", "--config", str(config), *attach))
        known = json.loads((folder / "state/run/stack.json").read_text())
        self.gateways: list[str] = [gateway["metrics"] for gateway in known["gateways"]]
        self.control: str = known["control"]["metrics"].removesuffix("/metrics")
        for node in self.nodes:
            body = {"model": MODEL, "prompt": "a", "options": {"num_predict": 1}}
            httpx.post(node.url + "/api/generate", json=body).raise_for_status()
        self.answers = [self.ask(MODEL) for _ in range(REQUESTS)]

    def ask(self, model: str) -> dict[str, Any]:
        body = {"model": model, "prompt": "a b c", "options": {"num_predict": TOKENS}}
        headers = self.stack.headers()
        answer = httpx.post(self.stack.url + "/api/generate", json=body, headers=headers, timeout=60)
        return dict(json.loads(answer.text.splitlines()[-1]))

    def key_page(self) -> Page:
        return page(self.control + "/metrics")

    def node(self, name: str) -> Page:
        return page(f"{self.control}/metrics/nodes/{name}")

    def sum(self, name: str, **labels: str) -> float:
        """Over both gateways; one that has no such series has 0."""
        pages = [page(url) for url in self.gateways]
        return sum(one.value(name, **labels) if _any(one, name, labels) else 0.0 for one in pages)

    def targets(self, job: str) -> list[dict[str, Any]]:
        return list(httpx.get(f"{self.control}/sd/{job}").json())


def _any(one: Page, name: str, labels: dict[str, str]) -> bool:
    return any(labels.items() <= have.items() for have, _ in one.samples.get(name, []))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with ExitStack() as exits:
        yield Watched(tmp_path_factory.mktemp("metrics"), exits)


def pages_of(watched: Watched) -> dict[str, list[Page]]:
    """Job → the pages of its targets."""
    found: dict[str, list[Page]] = {}
    for job in documented():
        for group in watched.targets(job):
            path = group["labels"].get("__metrics_path__", "/metrics")
            found.setdefault(job, []).append(page(f"http://{group['targets'][0]}{path}"))
    return found


def test_every_documented_metric_is_there_and_no_other(watched: Watched) -> None:
    until(lambda: all(watched.node(node.name).has("corral_node_canary_success") for node in watched.nodes), "canaries")

    def missing() -> dict[str, list[str]]:
        pages = pages_of(watched)
        return {
            job: [one.name for one in metrics if not one.absent and not any(page.has(one.name) for page in pages[job])]
            for job, metrics in documented().items()
        }

    # What is counted of records is there once they were shipped.
    with suppress(NotReady):
        until(lambda: not any(missing().values()), "all are there", every=0.2)
    assert [names for names in missing().values() if names] == [], "documented, not exposed"
    seen = pages_of(watched)
    for job, metrics in documented().items():
        known = {metric.name: metric for metric in metrics}
        for one in seen[job]:
            exposed = {name: kind for name, kind in one.kinds.items() if name.startswith("corral_")}
            assert exposed.keys() <= known.keys(), f"{job}: not in docs/metrics.md"
            for name, kind in exposed.items():
                assert known[name].kind == kind, name
                assert one.labels(name) <= {known[name].labels}, name


def test_counts_are_those_of_the_requests(watched: Watched) -> None:
    labels = {"route": "/api/generate", "model": MODEL}
    assert watched.sum("corral_requests_total", **labels, outcome="ok", code="200", api="native") == REQUESTS
    assert watched.sum("corral_request_duration_seconds_count", **labels) == REQUESTS
    for name in ("time_to_first_token_seconds", "queue_duration_seconds", "output_tokens_per_second"):
        assert watched.sum(f"corral_{name}_count", model=MODEL) == REQUESTS, name
    for kind, field in (("prompt", "prompt_eval_count"), ("generated", "eval_count")):
        tokens = sum(answer[field] for answer in watched.answers)
        assert tokens > 0 and watched.sum("corral_tokens_total", model=MODEL, kind=kind) == tokens
    # Pieces that arrive together count as one.
    assert REQUESTS <= watched.sum("corral_time_between_tokens_seconds_count", model=MODEL) <= REQUESTS * TOKENS
    # Of most of them: where the gateway halts at a first token, those behind it come at once.
    few, many = (watched.sum("corral_output_tokens_per_second_bucket", model=MODEL, le=le) for le in ("10.0", "75.0"))
    assert (many - few) * 2 > REQUESTS, "the simulated model writes 40 tokens a second"
    assert watched.sum("corral_slots", node="node-1") == 8, "4, for each of two gateways"


def test_control_counts_by_key_what_it_was_shipped(watched: Watched) -> None:
    key = watched.stack.key.split("_")[1]

    def shipped() -> bool:
        now = watched.key_page()
        return _any(now, "corral_key_tokens_total", {"key": key}) and (
            now.value("corral_key_tokens_total", key=key, kind="generated")
            == sum(answer["eval_count"] for answer in watched.answers)
        )

    until(shipped, "the tokens of the key are counted")
    now = watched.key_page()
    # `corral up` asks for the models until the gateway knows key and model.
    asked = now.value("corral_key_requests_total", key=key, tenant="default")
    assert now.value("corral_audit_records_total", kind="admit") == asked > REQUESTS
    assert now.value("corral_keys", state="active") == 2
    assert now.value("corral_gateways", state="ready") == 2
    assert now.value("corral_control_leader") == now.value("corral_database_up") == now.value("corral_valkey_up") == 1
    rates = [watched.node(node.name).samples.get("corral_node_tokens_per_second", []) for node in watched.nodes]
    assert any(20 < value < 60 for rows in rates for _, value in rows)


def test_the_time_of_a_load_that_a_request_waited_for(watched: Watched) -> None:
    watched.ask(SINGLE)

    def told() -> bool:
        return any(watched.node(node.name).has("corral_node_load_seconds") for node in watched.nodes)

    until(told, "the load is timed")
    loads = [
        row for node in watched.nodes for row in watched.node(node.name).samples.get("corral_node_load_seconds", [])
    ]
    ((labels, seconds),) = loads
    assert labels == {"model": SINGLE} and 0.09 <= seconds < 5, "the simulated model loads for 0.1 s"


def test_callers_make_no_series(watched: Watched) -> None:
    before = watched.sum("corral_requests_total", model="", route="/api/generate", code="404")
    for number in range(5):
        watched.ask(f"invented-{number}")
    for path in ("/invented", "/metrics/invented", "/v1/models/invented"):
        httpx.get(watched.stack.url + path, headers=watched.stack.headers())
    assert watched.sum("corral_requests_total", model="", route="/api/generate", code="404") == before + 5
    for url in watched.gateways:
        one = page(url)
        assert one.values("model") <= {MODEL, QUICK, SINGLE, ""}
        assert not any("invented" in value for label in ("route", "reason", "api") for value in one.values(label))


def test_refusals_have_their_reasons(watched: Watched) -> None:
    before = watched.sum("corral_refusals_total", reason="unauthorized")
    httpx.get(watched.stack.url + "/api/tags")
    assert watched.sum("corral_refusals_total", reason="unauthorized") == before + 1
    unread = watched.sum("corral_refusals_total", reason="other")
    assert httpx.post(watched.stack.url + "/api/chat", headers={"Content-Encoding": "gzip"}).status_code == 415
    assert watched.sum("corral_refusals_total", reason="other") == unread + 1
    made = watched.stack.corral("keys", "create", "narrow", "--rpm", "1")
    narrow = {"Authorization": f"Bearer {made['key']}"}
    statuses = []

    def limited() -> bool:
        statuses.append(httpx.get(watched.stack.url + "/api/tags", headers=narrow).status_code)
        return statuses[-1] == 429

    until(limited, "the key is at its limit")
    assert watched.sum("corral_refusals_total", reason="rpm") == statuses.count(429)

    def counted() -> bool:
        now, key = watched.key_page(), {"key": made["id"]}
        return _any(now, "corral_key_limited_total", key) and now.value("corral_key_limited_total", **key) == 1

    until(counted, "control has it")
    assert statuses.count(429) == 1


def test_metrics_are_not_at_the_edge_nor_where_callers_are(watched: Watched) -> None:
    status = watched.stack.corral("status")
    servers = [watched.stack.url, status["control"]["url"], *(gateway["url"] for gateway in status["gateways"])]
    for server in servers:
        for path in ("/metrics", "/metrics/nodes/node-1", "/sd/ollama"):
            answer = httpx.get(server + path, headers={"Authorization": f"Bearer {watched.stack.admin_key}"})
            assert answer.status_code == 404 and "corral_" not in answer.text, server + path


def test_a_node_that_comes_and_goes_is_a_target_meanwhile(watched: Watched, tmp_path: Path) -> None:
    def names() -> list[str]:
        return [group["labels"]["node"] for group in watched.targets("ollama")]

    assert names() == ["node-1", "node-2"]
    node = SimulatedNode("node-3", tmp_path)
    try:
        watched.stack.corral("nodes", "add", node.url, "--name", "node-3")
        assert names() == ["node-1", "node-2", "node-3"]
        group = watched.targets("ollama")[2]
        assert group["labels"]["instance"] == f"127.0.0.1:{node.port}"
        assert watched.node("node-3").value("corral_node_up") == 1
        watched.stack.corral("nodes", "remove", "node-3")
    finally:
        node.kill()
    assert names() == ["node-1", "node-2"]
    assert httpx.get(f"{watched.control}/metrics/nodes/node-3").status_code == 404


def test_other_targets(watched: Watched) -> None:
    told = [(group["labels"]["gateway"], group["targets"][0]) for group in watched.targets("api-gateway")]
    assert told == [(f"gateway-{n}", url.split("/")[2]) for n, url in enumerate(watched.gateways, 1)]
    here = watched.control.removeprefix("http://")
    assert watched.targets("control") == [{"targets": [here], "labels": {}}]
    by_name = httpx.get(f"{watched.control}/sd/control", headers={"Host": "control.internal:9102"}).json()
    assert by_name[0]["targets"] == ["control.internal:9102"]
    (haproxy,) = watched.targets("haproxy")
    assert "haproxy_frontend_status" in httpx.get(f"http://{haproxy['targets'][0]}/metrics").text
    assert httpx.get(f"{watched.control}/sd/odd").status_code == 404


def test_a_hung_runner_fails_its_canary_and_recovers(watched: Watched) -> None:
    node = watched.nodes[0]

    def tried() -> bool:
        models = watched.stack.corral("models", "list")
        return all(model["continuation"] for model in models if model["resident"])

    until(tried, "control's own requests have ended, which would hang too and keep their slot", 120, every=0.3)
    until(lambda: watched.node(node.name).value("corral_node_canary_success") == 1, "the canary lives")
    loads = watched.node(node.name).value("corral_node_loads_total")
    node.fault(kind="hang")
    try:
        until(lambda: watched.node(node.name).value("corral_node_canary_success") == 0, "the canary is silent")
        seen = watched.node(node.name)
        assert seen.value("corral_node_up") == seen.value("corral_node_state", state="ready") == 1
    finally:
        node.well()
    until(lambda: watched.node(node.name).value("corral_node_canary_success") == 1, "the canary lives again")
    assert watched.node(node.name).value("corral_node_loads_total") == loads, "a canary loads nothing"
    assert watched.sum("corral_requests_in_flight") == 0


def test_a_node_that_dies_is_down(watched: Watched) -> None:
    node = watched.nodes[1]
    node.kill()
    until(lambda: watched.node(node.name).value("corral_node_state", state="down") == 1, "it is down")
    seen = watched.node(node.name)
    assert seen.value("corral_node_up") == 0 and not seen.has("corral_node_canary_success")
    assert seen.value("corral_node_probe_failures_total") >= 2
    node.start()
    until(lambda: watched.node(node.name).value("corral_node_up") == 1, "it is up")


def test_alerts_are_in_the_status_until_they_are_resolved(watched: Watched) -> None:
    hook = f"{watched.control}/internal/alerts"
    assert httpx.post(hook, json={"version": "4"}).status_code == 400
    assert httpx.post(hook, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert httpx.post(hook, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx.post(hook, json=ALERT).status_code == 204
    (alert,) = watched.stack.corral("status")["alerts"]
    assert (alert["name"], alert["severity"], alert["state"]) == ("NodeDown", "critical", "firing")
    assert alert["labels"]["node"] == "node-9" and alert["since"] == "2026-11-24T15:00:00Z"
    shown = corral("status", state=watched.stack.state).stdout
    assert "Alerts firing" in shown and "https://runbooks.example/NodeDown" in shown
    resolved = {**ALERT, "status": "resolved", "alerts": [{**ALERT["alerts"][0], "status": "resolved"}]}
    assert httpx.post(hook, json=resolved).status_code == 204
    assert watched.stack.corral("status")["alerts"] == []
    assert "Alerts firing" not in corral("status", state=watched.stack.state).stdout
    assert watched.key_page().value("corral_alerts_received_total", status="firing") == 1


def test_monitoring_without_its_programs_names_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("prometheus") is None
    started = Up(tmp_path / "state", "--monitoring", "--detach")
    assert started.process.wait(240) == 1
    assert "apt-get install prometheus prometheus-alertmanager" in started.said
    assert "Traceback" not in started.said
