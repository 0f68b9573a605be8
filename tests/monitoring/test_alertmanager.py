"""Alertmanager: its configuration, whom it tells what, and what stays quiet while something else fires."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support import monitoring
from support.monitoring import MONITORING, program
from support.process import Process, free_port, until
from support.receivers import Receivers, receivers
from support.servers import REPOSITORY, Server, answers

from corral.config.alertmanager import CONTROL, SLACK, AlertmanagerPlan, render

FOLDER = MONITORING / "alertmanager"
WITH, WITHOUT = FOLDER / "alertmanager.yml", FOLDER / "alertmanager.without-slack.yml"
RUNBOOK = "https://runbooks.example/NodeDown.md"


def amtool(*arguments: str | Path) -> str:
    """What amtool prints; its words where it fails."""
    done = subprocess.run(
        [program("amtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_committed_files_are_the_default_renderings() -> None:
    assert WITH.read_text(encoding="utf-8") == render(AlertmanagerPlan())
    assert WITHOUT.read_text(encoding="utf-8") == render(AlertmanagerPlan(slack_webhook_file=""))


@pytest.mark.parametrize("path", [WITH, WITHOUT], ids=lambda path: path.stem)
def test_the_configuration_is_right(path: Path) -> None:
    amtool("check-config", path)


def test_slack_has_its_channel_and_its_times() -> None:
    config = yaml.safe_load(WITH.read_text(encoding="utf-8"))
    route = config["route"]
    assert (route["receiver"], route["group_wait"], route["group_interval"], route["repeat_interval"]) == (
        "slack-notifications", "30s", "5m", "4h",
    )  # fmt: skip
    (slack,) = next(item for item in config["receivers"] if item["name"] == SLACK)["slack_configs"]
    assert slack["channel"] == "#llm-alerts"
    assert "api_url" not in slack, "the webhook is a secret, in a file of its own"


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["severity=critical"], {CONTROL, SLACK}),
        (["severity=warning"], {CONTROL, SLACK}),
        (["severity=info"], {CONTROL}),
        (["alertname=SomeoneElses"], {CONTROL, SLACK}),
    ],
)
def test_who_is_told_depends_on_the_severity(labels: list[str], told: set[str]) -> None:
    assert set(amtool("config", "routes", "test", f"--config.file={WITH}", *labels).strip().split(",")) == told
    assert amtool("config", "routes", "test", f"--config.file={WITHOUT}", *labels).strip() == CONTROL


def test_every_alert_that_keeps_another_quiet_exists() -> None:
    known = {rule["alert"] for rule in monitoring.alerts()}
    named = set()
    for rule in yaml.safe_load(WITH.read_text(encoding="utf-8"))["inhibit_rules"]:
        for matcher in [*rule["source_matchers"], *rule["target_matchers"]]:
            if matcher.startswith("alertname"):
                named |= set(matcher.split('"')[1].split("|"))
    assert named
    assert named - known == set()


@pytest.fixture(scope="module")
def heard() -> Iterator[Receivers]:
    """Who hears of the alerts of this module."""
    with receivers() as made:
        yield made


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory, heard: Receivers) -> Iterator[Server]:
    """An Alertmanager with the committed configuration, but for its times, its addresses and control's pause."""
    folder = tmp_path_factory.mktemp("alertmanager")
    (folder / "webhook").write_text(heard.slack_url)
    plan = replace(AlertmanagerPlan(), control_url=heard.control_url, slack_webhook_file=str(folder / "webhook"))
    plan = replace(plan, group_wait="1s", group_interval="1s")
    with monitoring.alertmanager(folder, render(plan).replace("group_interval: 15s", "group_interval: 1s")) as server:
        yield server


def send(manager: Server, *alerts: dict[str, str], ended: bool = False) -> None:
    """Tell Alertmanager of alerts with these labels, as Prometheus does."""
    now = datetime.now(UTC)
    body = [
        {
            "labels": labels,
            "annotations": {
                "summary": f"{labels['alertname']} in short",
                "description": "More of it.",
                "runbook_url": RUNBOOK,
            },
            "startsAt": (now - timedelta(minutes=1)).isoformat(),
            "endsAt": (now if ended else now + timedelta(minutes=5)).isoformat(),
        }
        for labels in alerts
    ]
    httpx.post(manager.url + "/api/v2/alerts", json=body).raise_for_status()


def test_slack_and_control_hear_that_it_fires_and_that_it_is_over(manager: Server, heard: Receivers) -> None:
    alert = {"alertname": "NodeDown", "severity": "critical", "node": "node-7"}
    send(manager, alert)
    until(lambda: heard.told("NodeDown", "firing", node="node-7"), "control hears of it")
    until(lambda: "critical: NodeDown (1)" in heard.titles(), "Slack hears of it")
    message = heard.slack[heard.titles().index("critical: NodeDown (1)")]
    (attachment,) = message["attachments"]
    assert message["channel"] == "#llm-alerts"
    assert attachment["color"] == "danger"
    assert attachment["title_link"] == RUNBOOK
    for part in ("NodeDown in short", "More of it.", "Severity: critical", f"<{RUNBOOK}|Runbook>"):
        assert part in attachment["text"]

    send(manager, alert, ended=True)
    until(lambda: heard.told("NodeDown", "resolved", node="node-7"), "control hears that it is over")
    until(lambda: "resolved: NodeDown" in heard.titles(), "Slack hears that it is over")
    (attachment,) = heard.slack[heard.titles().index("resolved: NodeDown")]["attachments"]
    assert (attachment["color"], attachment["title_link"]) == ("good", RUNBOOK)
    assert heard.refused == []


def test_what_is_for_information_does_not_reach_slack(manager: Server, heard: Receivers) -> None:
    send(manager, {"alertname": "VersionMismatch", "severity": "info"})
    send(manager, {"alertname": "BackupTooOld", "severity": "warning"})
    until(lambda: "warning: BackupTooOld (1)" in heard.titles(), "Slack hears of the other")
    until(lambda: heard.told("VersionMismatch", "firing"), "control hears of it")
    assert not any("VersionMismatch" in title for title in heard.titles())


_names = itertools.count(1)


@pytest.mark.parametrize(
    ("source", "target", "quiet"),
    [
        ({"alertname": "NodeDown", "node": "A"}, {"alertname": "NodeRunnerHung", "node": "A"}, True),
        ({"alertname": "NodeDown", "node": "A"}, {"alertname": "NodeRunnerHung", "node": "B"}, False),
        ({"alertname": "NodeDown", "node": "A"}, {"alertname": "HaproxyBackendDown", "node": "A"}, True),
        ({"alertname": "NodeDown", "node": "A"}, {"alertname": "QueueGrowing"}, False),
        ({"alertname": "HighErrorRate", "model": "m", "window": "1h"}, {"alertname": "HighErrorRate", "model": "m",
          "window": "3d"}, True),
        ({"alertname": "HighErrorRate", "model": "m", "window": "1h"}, {"alertname": "HighErrorRate", "model": "n",
          "window": "3d"}, False),
        ({"alertname": "ControlDown"}, {"alertname": "ScrapeMissing", "job": "redis"}, True),
        ({"alertname": "ControlDown"}, {"alertname": "ScrapeMissing", "job": "api-gateway"}, False),
        ({"alertname": "GatewayDown", "gateway": "g"}, {"alertname": "ScrapeMissing", "job": "api-gateway",
          "gateway": "g"}, True),
        ({"alertname": "EdgeDown"}, {"alertname": "SlowFirstToken", "model": "m"}, True),
        ({"alertname": "LimitStoreDown", "gateway": "g"}, {"alertname": "ScrapeMissing", "job": "redis"}, True),
        ({"alertname": "DatabaseDown"}, {"alertname": "IngestBehind", "gateway": "g"}, True),
    ],
)  # fmt: skip
def test_a_worse_alert_keeps_what_follows_from_it_quiet(
    manager: Server, source: dict[str, str], target: dict[str, str], quiet: bool
) -> None:
    # Neither disturbs the next case: each has its own node, model or gateway, and ends here.
    mark = str(next(_names))
    source, target = (
        {name: value + mark if name in ("node", "model", "gateway") else value for name, value in labels.items()}
        | {"severity": severity, "case": mark}
        for labels, severity in ((source, "critical"), (target, "warning"))
    )
    send(manager, source)
    send(manager, target)
    state: dict[str, Any] = {}

    def processed() -> bool:
        params = {"filter": f'case="{mark}"'}
        for alert in httpx.get(manager.url + "/api/v2/alerts", params=params).json():
            state[alert["labels"]["alertname"] + alert["labels"]["severity"]] = alert["status"]
        inhibited = state.get(target["alertname"] + "warning", {}).get("inhibitedBy")
        return len(state) == 2 and (inhibited or not quiet)

    until(processed, "Alertmanager has both, and has judged them")
    send(manager, source, target, ended=True)
    assert bool(state[target["alertname"] + "warning"]["inhibitedBy"]) == quiet
    assert state[source["alertname"] + "critical"]["inhibitedBy"] == []


def test_the_documented_ways_to_silence_work(manager: Server) -> None:
    text = (REPOSITORY / "docs/monitoring.md").read_text(encoding="utf-8")
    lines = re.findall(r"^amtool .+$", text, re.MULTILINE)
    assert any(" silence add " in line for line in lines)
    for line in lines:
        _, *arguments = shlex.split(line.replace("http://127.0.0.1:9093", manager.url))
        amtool(*arguments)
    silences = httpx.get(manager.url + "/api/v2/silences").json()
    assert [silence["comment"] for silence in silences] == ["a new GPU"]
    for silence in silences:
        httpx.delete(f"{manager.url}/api/v2/silence/{silence['id']}").raise_for_status()


@pytest.mark.parametrize("secret", ["absent", "empty", "there"])
def test_it_starts_with_and_without_a_webhook(tmp_path: Path, heard: Receivers, secret: str) -> None:
    webhook = tmp_path / "slack_webhook"
    if secret != "absent":
        webhook.write_text(heard.slack_url if secret == "there" else "")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/alertmanager").symlink_to(program("prometheus-alertmanager", "alertmanager"))
    port = free_port()
    argv: list[str | Path] = [FOLDER / "start", f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLACK_WEBHOOK_FILE": str(webhook)}
    process = Process([*argv, f"--storage.path={tmp_path}"], tmp_path / "log", environment)
    url = f"http://127.0.0.1:{port}"
    try:
        process.wait_until(lambda: answers(url + "/-/ready"))
        names = {item["name"] for item in httpx.get(url + "/api/v2/receivers").json()}
    finally:
        process.end()
    assert names == ({SLACK, CONTROL} if secret == "there" else {CONTROL})
