"""What `corral up --monitoring` starts and writes, and why it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.config.settings import Settings
from corral.stack import monitoring
from corral.stack.state import StackError, StateFolder

PORTS = {"prometheus": 1001, "alertmanager": 1002}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateFolder:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("prometheus", "prometheus-alertmanager"):
        (programs / name).write_text("")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    made = StateFolder(tmp_path / "state")
    made.create()
    return made


def settings(**watched: Any) -> Settings:
    return Settings.model_validate({"control": {"metrics": "127.0.0.1:1003"}, "monitoring": watched})


def written(made: monitoring.Monitoring, state: StateFolder) -> tuple[Any, Any]:
    """prometheus.yml and alertmanager.yml."""
    monitoring.write(made, state)
    files = (state.run / "prometheus/prometheus.yml", state.run / "alertmanager.yml")
    return yaml.safe_load(files[0].read_text()), yaml.safe_load(files[1].read_text())


def test_both_know_their_addresses(state: StateFolder) -> None:
    made = monitoring.plan(settings(), PORTS, state)
    prometheus, alertmanager = written(made, state)
    assert prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["127.0.0.1:1002"]
    assert prometheus["scrape_configs"][0]["http_sd_configs"][0]["url"] == "http://127.0.0.1:1003/sd/ollama"
    assert sorted(path.name for path in (state.run / "prometheus/rules").iterdir()) == [
        path.name for path in made.rules
    ]  # fmt: skip
    (receiver,) = alertmanager["receivers"]
    assert receiver["webhook_configs"][0]["url"] == "http://127.0.0.1:1003/internal/alerts"
    by_name = {program.name: list(program.argv) for program in made.programs}
    assert "--web.listen-address=127.0.0.1:1001" in by_name["prometheus"]
    assert "--storage.tsdb.retention.time=15d" in by_name["prometheus"]
    assert by_name["alertmanager"][0].endswith("/prometheus-alertmanager")


def test_rules_that_are_gone_do_not_stay(state: StateFolder) -> None:
    made = monitoring.plan(settings(), PORTS, state)
    monitoring.write(made, state)
    (state.run / "prometheus/rules/old.yml").write_text("groups: []")
    monitoring.write(made, state)
    assert not (state.run / "prometheus/rules/old.yml").exists()


def test_slack_where_there_is_a_webhook(state: StateFolder, tmp_path: Path) -> None:
    secret = tmp_path / "webhook"
    secret.write_text("https://hooks.example/services/x\n")
    made = monitoring.plan(settings(slack_webhook_file=str(secret), slack_channel="#ops"), PORTS, state)
    _, alertmanager = written(made, state)
    (slack,) = alertmanager["receivers"][0]["slack_configs"]
    assert (slack["api_url_file"], slack["channel"]) == (str(secret), "#ops")
    assert "hooks.example" not in (state.run / "alertmanager.yml").read_text(), "the secret stays in its file"


@pytest.mark.parametrize(("text", "reason"), [(None, "cannot be read"), ("", "holds no address"), ("x", "no address")])
def test_a_webhook_that_is_none(state: StateFolder, tmp_path: Path, text: str | None, reason: str) -> None:
    secret = tmp_path / "webhook"
    if text is not None:
        secret.write_text(text)
    with pytest.raises(StackError, match=rf"slack_webhook_file: .*{reason}"):
        monitoring.plan(settings(slack_webhook_file=str(secret)), PORTS, state)


def test_without_the_programs(state: StateFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin/prometheus-alertmanager").unlink()
    with pytest.raises(StackError, match=r"alertmanager not on PATH.*prometheus-alertmanager"):
        monitoring.plan(settings(), PORTS, state)


def test_without_metrics(state: StateFolder) -> None:
    with pytest.raises(StackError, match=r"control\.metrics"):
        monitoring.plan(Settings.model_validate({"control": {"metrics": ""}}), PORTS, state)


def test_alerts_link_to_the_runbooks_that_are_named(state: StateFolder) -> None:
    prometheus, _ = written(monitoring.plan(settings(runbooks="https://wiki.example/runbooks"), PORTS, state), state)
    assert prometheus["global"]["external_labels"] == {"runbooks": "https://wiki.example/runbooks"}
    assert prometheus["alerting"]["alert_relabel_configs"] == [{"action": "labeldrop", "regex": "runbooks"}]
    prometheus, _ = written(monitoring.plan(settings(), PORTS, state), state)
    assert "external_labels" not in prometheus["global"]
    with pytest.raises(ValueError, match="runbooks"):
        settings(runbooks="wiki")
