"""From settings to everything the stack's processes read: corral.yaml, haproxy.cfg, valkey.conf, supervisord.conf."""

from __future__ import annotations

import json
import signal
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from corral import __version__
from corral.config.haproxy import HaproxyPlan, edge_hosts, render
from corral.config.settings import Settings
from corral.config.values import host_port
from corral.stack import binaries, monitoring, nodes, ports
from corral.stack.nodes import Fleet
from corral.stack.programs import Program, supervisord_conf, valkey_conf, write_specs
from corral.stack.state import StateFolder, read_json, write_private

GATEWAY_STOPS = 35
"""Seconds in which a gateway has stopped that got SIGINT (`corral.gateway.life`): HAProxy hears of it, answers get 25 s
at most, records go out. The supervisor stops it with the stack alone; who restarts one gateway sends it SIGTERM."""

_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True)
class Plan:
    """What will run. ``settings`` are the effective ones, as all processes read them."""

    settings: Settings
    fleet: Fleet
    ports: Mapping[str, int]
    programs: tuple[Program, ...]
    haproxy: HaproxyPlan
    own_valkey: bool
    monitoring: monitoring.Monitoring | None = None

    @property
    def url(self) -> str:
        edge = self.settings.edge
        shown = "127.0.0.1" if edge.host in ("0.0.0.0", "::") else edge.host
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{edge.port}"

    def _page(self, port: str) -> str | None:
        return f"http://127.0.0.1:{self.ports[port]}/metrics" if port in self.ports else None

    @property
    def gateways(self) -> list[str]:
        return [f"gateway-{number}" for number in range(1, self.settings.gateway.processes + 1)]

    def describe(self) -> dict[str, Any]:
        """stack.json, but for the pids."""
        own = set(self.fleet.names)
        return {
            "version": __version__,
            "url": self.url,
            "kind": self.fleet.kind,
            "edge": {"host": self.settings.edge.host, "port": self.settings.edge.port},
            "nodes_url": self.settings.gateway.nodes_url,
            "stats_url": f"http://127.0.0.1:{self.ports['stats']}",
            "control": {
                "url": self.settings.gateway.control_url,
                "metrics": self._page(metrics_of("control")),
            },
            "gateways": [
                {
                    "name": name,
                    "url": f"http://127.0.0.1:{self.ports[name]}",
                    "metrics": self._page(metrics_of(name)),
                }
                for name in self.gateways
            ],
            "valkey": {"url": self.settings.store.valkey, "own": self.own_valkey},
            "nodes": [{"name": node.name, "url": node.url, "own": node.name in own} for node in self.settings.nodes],
            "ports": dict(self.ports),
            "programs": [program.name for program in self.programs],
            **({"monitoring": self.monitoring.describe()} if self.monitoring is not None else {}),
        }


def make(
    given: Settings,
    fleet: Fleet,
    state: StateFolder,
    monitored: bool = False,
    take: Callable[[int], bool] = lambda port: True,
) -> Plan:
    """Choose ports and complete the settings. StackError where a program is missing.

    ``monitored``: with Prometheus and Alertmanager. ``take`` claims a port that was chosen.
    """
    gateways = [f"gateway-{number}" for number in range(1, given.gateway.processes + 1)]
    names = ["valkey", "control", "nodes", "stats", *gateways, *fleet.names]
    names += [metrics_of("control")] if given.control.metrics else []
    names += [metrics_of(name) for name in gateways if given.gateway.metrics]
    names += [monitoring.PROMETHEUS, monitoring.ALERTMANAGER] if monitored else []
    before = {name: port for name, port in (read_json(state.ports_file) or {}).items() if isinstance(port, int)}
    chosen = ports.choose(names, before, avoid=(given.edge.port,), take=take)
    own_valkey, valkey_url, chosen["valkey"] = _valkey(given, chosen["valkey"])
    settings = _effective(given, fleet, state, chosen, valkey_url)
    haproxy = HaproxyPlan(
        edge_host=settings.edge.host,
        edge_port=settings.edge.port,
        nodes_host="127.0.0.1",
        nodes_port=chosen["nodes"],
        stats_host="127.0.0.1",
        stats_port=chosen["stats"],
        stats_socket=str(state.socket("haproxy.sock")),
        gateways=[(name, "127.0.0.1", chosen[name]) for name in gateways],
        control=("127.0.0.1", chosen["control"]),
        nodes=[(node.name, node.url) for node in settings.nodes],
        max_duration=settings.gateway.max_duration,
        ca_file=ssl.get_default_verify_paths().cafile or _CERTIFICATES,
        tls_port=settings.edge.tls_port,
        certificate=str(settings.edge.certificate.absolute()) if settings.edge.certificate else None,
        ollama=host_port(settings.edge.ollama) if settings.edge.ollama else None,
        hosts=edge_hosts(settings.edge),
        origins=settings.edge.origins,
    )
    watchers = monitoring.plan(settings, chosen, state) if monitored else None
    programs = (
        *([Program("valkey", [binaries.valkey(), str(state.run / "valkey.conf")], priority=10)] if own_valkey else []),
        _control(state),
        *(_gateway(state, name, chosen, settings) for name in gateways),
        *nodes.programs(fleet, chosen, state),
        _haproxy(state),
        *(watchers.programs if watchers is not None else ()),
    )
    return Plan(settings, fleet, chosen, programs, haproxy, own_valkey, watchers)


def write(plan: Plan, state: StateFolder) -> None:
    """Write every file the processes read."""
    write_private(state.settings, dump(plan.settings))
    write_private(state.ports_file, json.dumps(dict(plan.ports)))
    write_private(state.haproxy_plan, json.dumps(asdict(plan.haproxy), indent=1))
    write_private(state.haproxy_config, render(plan.haproxy))
    write_private(state.run / "valkey.conf", valkey_conf(plan.ports["valkey"], state.run))
    write_private(state.run / "supervisord.conf", supervisord_conf(state, plan.programs))
    write_specs(state, plan.programs)
    if plan.monitoring is not None:
        monitoring.write(plan.monitoring, state)


def dump(settings: Settings) -> str:
    """Settings as a corral.yaml that loads to the same."""
    text: str = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return "# The effective configuration, written by `corral up`: changes made here are lost.\n" + text


def _effective(
    given: Settings, fleet: Fleet, state: StateFolder, chosen: Mapping[str, int], valkey_url: str
) -> Settings:
    database = given.store.database
    path = database.removeprefix("sqlite:///")
    if path != database and not path.startswith("/"):
        database = f"sqlite:///{state.root / path}"
    return given.model_copy(
        update={
            "nodes": tuple(nodes.settings(fleet, chosen)),
            "gateway": given.gateway.model_copy(
                update={
                    "listen": f"127.0.0.1:{chosen['gateway-1']}",
                    "metrics": _metrics(chosen, "gateway-1"),
                    "nodes_url": f"http://127.0.0.1:{chosen['nodes']}",
                    "control_url": f"http://127.0.0.1:{chosen['control']}",
                    "spool": state.spool,
                    "cache": state.cache,
                }
            ),
            "control": given.control.model_copy(
                update={
                    "listen": f"127.0.0.1:{chosen['control']}",
                    "metrics": _metrics(chosen, "control"),
                    "state": state.root,
                    "haproxy_socket": state.socket("master.sock"),
                }
            ),
            "auth": given.auth.model_copy(
                update={"pepper_file": state.pepper, "internal_token_file": state.internal_token}
            ),
            "store": given.store.model_copy(update={"database": database, "valkey": valkey_url}),
            "monitoring": given.monitoring.model_copy(update=monitoring.address(chosen)),
        }
    )


def _valkey(given: Settings, port: int) -> tuple[bool, str, int]:
    """Whether to start Valkey, its URL, and its port. A named one is used; a local one that is not there is started."""
    if given.store.valkey_password_file is not None:
        return False, given.store.valkey, port
    if "valkey" in given.store.model_fields_set:
        parts = urlsplit(given.store.valkey)
        local = parts.hostname in ("127.0.0.1", "localhost") and parts.scheme in ("redis", "valkey")
        if not (local and not parts.password and parts.port and ports.is_free(parts.port)):
            return False, given.store.valkey, port
        port = parts.port
    return True, f"redis://127.0.0.1:{port}/0", port


def _serve(state: StateFolder, what: str) -> list[str]:
    return [sys.executable, "-P", "-m", "corral", "serve", what, "--config", str(state.settings)]


def _control(state: StateFolder) -> Program:
    return Program("control", _serve(state, "control"), priority=20)


def metrics_of(name: str) -> str:
    """The name of the port with a program's metrics."""
    return f"{name}-metrics"


def _metrics(chosen: Mapping[str, int], name: str) -> str:
    """The address of a program's metrics; "" where its settings want none."""
    return f"127.0.0.1:{chosen[metrics_of(name)]}" if metrics_of(name) in chosen else ""


def _gateway(state: StateFolder, name: str, chosen: Mapping[str, int], settings: Settings) -> Program:
    log = settings.gateway.access_log
    env = {
        "CORRAL_GATEWAY__NAME": name,
        "CORRAL_GATEWAY__LISTEN": f"127.0.0.1:{chosen[name]}",
        "CORRAL_GATEWAY__METRICS": _metrics(chosen, name),
        # Not through the supervisor's pipe: a slow reader there would hold up the token path.
        "CORRAL_GATEWAY__ACCESS_LOG": str(state.logs / f"{name}.access.log") if log == "-" else log,
    }
    # Stopped first, and waited for: answers that have begun need the edge and their nodes until they end.
    return Program(
        name,
        _serve(state, "gateway"),
        env,
        stop_wait=GATEWAY_STOPS,
        stop_signal=signal.SIGINT,
        oom_score_adj=-100,
        priority=60,
        group="gateways",
    )


def _haproxy(state: StateFolder) -> Program:
    master = f"{state.socket('master.sock')},mode,600"
    argv = [binaries.haproxy(), "-W", "-S", master, "-f", str(state.haproxy_config)]
    # Its workers end with the master, which has to be asked rather than killed to take them along at once.
    return Program("haproxy", argv, death_signal=signal.SIGTERM, priority=40)


def address_of(url: str, default: int) -> tuple[str, int]:
    """Host and port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or default


def log_file(state: StateFolder, program: str) -> Path:
    """A program's log."""
    return state.logs / f"{program}.log"
