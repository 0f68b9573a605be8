"""`corral up --monitoring`: Prometheus and Alertmanager on this machine, with all their files in the state folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from corral.config.alertmanager import AlertmanagerPlan
from corral.config.alertmanager import render as render_alertmanager
from corral.config.prometheus import PrometheusPlan
from corral.config.prometheus import render as render_prometheus
from corral.config.settings import Settings
from corral.stack.programs import Program
from corral.stack.state import StackError, StateFolder, write_private

PROMETHEUS, ALERTMANAGER = "prometheus", "alertmanager"
RETENTION = "15d"

_PROGRAMS = {PROMETHEUS: ("prometheus",), ALERTMANAGER: ("prometheus-alertmanager", "alertmanager")}
"""Where they are by name: Debian has a longer one for Alertmanager."""
_PACKAGE = Path(__file__).resolve().parents[1]
_RULES = (_PACKAGE / "monitoring/rules", _PACKAGE.parents[1] / "monitoring/prometheus/rules")
"""An installed package's copy, or the source tree's."""


@dataclass(frozen=True)
class Monitoring:
    """Two programs and what they read. ``ports`` are by program."""

    ports: Mapping[str, int]
    programs: tuple[Program, ...]
    prometheus: PrometheusPlan
    alertmanager: AlertmanagerPlan
    rules: tuple[Path, ...]

    def describe(self) -> dict[str, dict[str, str]]:
        """Their addresses, for stack.json."""
        return {name: {"url": f"http://127.0.0.1:{port}"} for name, port in self.ports.items()}


def plan(settings: Settings, ports: Mapping[str, int], state: StateFolder) -> Monitoring:
    """What will run. StackError where a program, the rules or the Slack secret is missing."""
    binaries = _binaries()
    if not settings.control.metrics:
        raise StackError('--monitoring needs control.metrics: with "" there is nothing to scrape')
    chosen = {name: ports[name] for name in _PROGRAMS}
    prometheus = PrometheusPlan(
        settings.control.metrics, f"127.0.0.1:{chosen[ALERTMANAGER]}", "rules/*.yml", settings.monitoring.runbooks
    )
    alertmanager = AlertmanagerPlan(
        control_url=f"http://{settings.control.metrics}/internal/alerts",
        slack_webhook_file=_slack(settings),
        slack_channel=settings.monitoring.slack_channel,
    )
    return Monitoring(chosen, tuple(_programs(binaries, chosen, state)), prometheus, alertmanager, _rules())


def write(made: Monitoring, state: StateFolder) -> None:
    """Write both configurations, the rules beside Prometheus's, and make the folders of their data."""
    for name in _PROGRAMS:
        _data(state, name).mkdir(mode=0o700, exist_ok=True)
    folder = state.run / PROMETHEUS
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "rules").mkdir(mode=0o700, parents=True)
    for path in made.rules:
        write_private(folder / "rules" / path.name, path.read_text(encoding="utf-8"))
    write_private(folder / "prometheus.yml", render_prometheus(made.prometheus))
    write_private(state.run / "alertmanager.yml", render_alertmanager(made.alertmanager))


def address(ports: Mapping[str, int]) -> dict[str, str]:
    """Where control finds Alertmanager, as a setting; none where it is not started here."""
    return {"alertmanager": f"http://127.0.0.1:{ports[ALERTMANAGER]}"} if ALERTMANAGER in ports else {}


def _binaries() -> dict[str, str]:
    found = {name: next(filter(None, map(shutil.which, names)), None) for name, names in _PROGRAMS.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise StackError(
            f"--monitoring: {' and '.join(missing)} not on PATH: install them (Debian and Ubuntu: "
            "apt-get install prometheus prometheus-alertmanager), or start without --monitoring"
        )
    return {name: path for name, path in found.items() if path is not None}


def _rules() -> tuple[Path, ...]:
    for folder in _RULES:
        if found := sorted(folder.glob("*.yml")):
            return tuple(found)
    raise StackError("--monitoring: the alert rules (monitoring/prometheus/rules) are missing: use a source tree")


def _slack(settings: Settings) -> str:
    file = settings.monitoring.slack_webhook_file
    if file is None:
        return ""
    file = file.absolute()
    try:
        told = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StackError(f"monitoring.slack_webhook_file: {file} cannot be read: {error}") from None
    if not told.startswith(("https://", "http://")):
        raise StackError(f"monitoring.slack_webhook_file: {file} holds no address: put the webhook's there")
    return str(file)


def _programs(binaries: Mapping[str, str], ports: Mapping[str, int], state: StateFolder) -> list[Program]:
    common = ["--web.listen-address=127.0.0.1:{port}", "--web.external-url=http://127.0.0.1:{port}", "--log.level=warn"]
    own = {
        ALERTMANAGER: [
            f"--config.file={state.run / 'alertmanager.yml'}",
            f"--storage.path={_data(state, ALERTMANAGER)}",
            "--cluster.listen-address=",
        ],
        PROMETHEUS: [
            f"--config.file={state.run / PROMETHEUS / 'prometheus.yml'}",
            f"--storage.tsdb.path={_data(state, PROMETHEUS)}",
            f"--storage.tsdb.retention.time={RETENTION}",
        ],
    }
    return [
        Program(name, [binaries[name], *(one.format(port=ports[name]) for one in common), *arguments], priority=50)
        for name, arguments in own.items()
    ]


def _data(state: StateFolder, name: str) -> Path:
    return state.root / name
