"""What `corral status` shows: control's view, with the pids that the supervisor knows."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from corral.stack import http, plan, supervisor
from corral.stack.state import StackError, StateFolder

RUNBOOKS = Path(__file__).resolve().parents[3] / "docs/runbooks"
PUBLISHED = "https://github.com/corral-llm/corral/"
"""Where the rules say that runbooks are, unless `monitoring.runbooks` names another place."""


def status(url: str, ask: Callable[[], Any], state: StateFolder | None) -> dict[str, Any]:
    """The object of the command line's contract. ``ask`` is GET /admin/status; ``state`` None: no local stack.

    With control away its part says so, and what is known locally is shown all the same.
    """
    stack = (state.stack() if state else None) or {}
    processes = supervisor.processes(state) if state else {}
    try:
        told = ask()
        reached = isinstance(told, dict)
    except (http.Unreachable, StackError):
        told, reached = {}, False
    if not reached:
        told = {}

    def pid(program: str) -> int | None:
        return int(processes[program]["pid"]) or None if program in processes else None

    control = told.get("control") if isinstance(told.get("control"), dict) else {}
    store = told.get("store") if isinstance(told.get("store"), dict) else {}
    return {
        "url": url,
        "edge": {"pid": pid("haproxy"), "state": _state(http_ok(url, "/health"))},
        "gateways": _gateways(told, stack, pid),
        "control": {
            "pid": pid("control"),
            "url": control.get("url") or stack.get("control", {}).get("url"),
            "leader": bool(control.get("leader", reached)),
            "state": _state(reached),
        },
        "nodes": _nodes(told, stack, pid),
        "store": {
            "valkey": {"state": _valkey(store, stack), "pid": pid("valkey") or _told_pid(store.get("valkey"))},
            "database": {"state": store.get("database", {}).get("state") or ("up" if reached else "unknown")},
        },
        "queues": told.get("queues") or [],
        "stats_url": stack.get("stats_url"),
        "monitoring": {
            name: {"state": _state(http_ok(known["url"], "/-/ready")), "pid": pid(name), "url": known["url"]}
            for name, known in stack.get("monitoring", {}).items()
        },
        "alerts": [{**alert, "runbook": runbook(alert)} for alert in told.get("alerts") or []],
    }


def runbook(alert: Mapping[str, Any], folder: Path = RUNBOOKS) -> str:
    """Where the runbook of an alert is: its file, where Corral runs from a checkout and no other place is configured,
    else the address that the alert gives."""
    file = folder / f"{alert.get('name')}.md"
    url = str(alert.get("runbook_url") or "")
    return str(file) if url.startswith(PUBLISHED) and file.is_file() else url


def http_ok(url: str, path: str) -> bool:
    """Whether an address answers 200."""
    try:
        return http.request(url, "GET", path, timeout=3).status == 200
    except http.Unreachable:
        return False


def valkey_ok(url: str, timeout: float = 2.0) -> bool:
    """Whether a Valkey (or Redis) answers a PING; that it wants a password is an answer too.

    A connection alone says nothing: the kernel makes one for a process that is stopped.
    """
    parts = urlsplit(url)
    try:
        with contextlib.ExitStack() as stack:
            if parts.scheme == "unix":
                connection = stack.enter_context(socket.socket(socket.AF_UNIX))
                connection.settimeout(timeout)
                connection.connect(parts.path)
            else:
                connection = stack.enter_context(socket.create_connection(plan.address_of(url, 6379), timeout))
            if parts.scheme in ("rediss", "valkeys"):
                unchecked = ssl.create_default_context()
                unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
                connection = stack.enter_context(unchecked.wrap_socket(connection))
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
            return connection.recv(1) in (b"+", b"-")
    except (OSError, ValueError):
        return False


def _state(up: bool) -> str:
    return "up" if up else "down"


def _valkey(store: Mapping[str, Any], stack: Mapping[str, Any]) -> str:
    told = store.get("valkey", {}).get("state")
    if told:
        return str(told)
    url = stack.get("valkey", {}).get("url")
    return _state(valkey_ok(url)) if url else "unknown"


def _gateways(
    told: Mapping[str, Any], stack: Mapping[str, Any], pid: Callable[[str], int | None]
) -> list[dict[str, Any]]:
    local = {item["name"]: item for item in stack.get("gateways", [])}
    remote = {str(item.get("name")): item for item in told.get("gateways") or [] if isinstance(item, dict)}
    shown = []
    for name in [*local, *(name for name in remote if name not in local)]:
        url = local.get(name, {}).get("url") or remote.get(name, {}).get("url")
        known = remote.get(name, {}).get("state") if name not in local else None
        state = known or (_state(http_ok(url, "/health")) if url else "unknown")
        store = remote.get(name, {}).get("store")
        shown.append({"name": name, "pid": pid(name), "url": url, "state": state, "store": store})
    return shown


def _told_pid(item: object) -> int | None:
    """The pid that control says, of what runs on its machine but not under this stack's supervisor."""
    pid = item.get("pid") if isinstance(item, dict) else None
    return pid if isinstance(pid, int) else None


def _nodes(told: Mapping[str, Any], stack: Mapping[str, Any], pid: Callable[[str], int | None]) -> list[dict[str, Any]]:
    own = {item["name"] for item in stack.get("nodes", []) if item.get("own")}
    listed = told.get("nodes")
    nodes = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if not isinstance(listed, list):  # control is away; a fleet without a node is one that it told
        nodes = [{"name": item["name"], "url": item["url"]} for item in stack.get("nodes", [])]
    return [
        {
            "name": item.get("name"),
            "url": item.get("url"),
            "state": item.get("state") or ("ready" if http_ok(str(item.get("url")), "/api/version") else "down"),
            "pid": (pid(str(item.get("name"))) if item.get("name") in own else None) or _told_pid(item),
            "reason": item.get("reason"),
            "models": item.get("models") or [],
        }
        for item in nodes
    ]
