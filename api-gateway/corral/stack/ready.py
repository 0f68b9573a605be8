"""Waiting until the stack serves, with a line for each step."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from corral.fleet.node import canonical_name
from corral.stack import haproxy, http, models, nodes, supervisor
from corral.stack.plan import Plan, log_file
from corral.stack.state import StackError, StateFolder
from corral.wire.options import ModelPolicy, check

PATIENCE = 90.0
TRIES = 4


class Progress(Protocol):
    """Takes one line for each thing that has become ready."""

    def __call__(self, line: str) -> None: ...


def until(what: str, holds: Callable[[], bool], timeout: float = PATIENCE) -> None:
    """Ask until it holds. StackError after ``timeout`` seconds, with the last reason."""
    deadline = time.monotonic() + timeout
    reason = ""
    while True:
        try:
            if holds():
                return
        except http.Unreachable as error:
            reason = f" ({error})"
        if time.monotonic() > deadline:
            raise StackError(f"gave up after {timeout:.0f} s: {what}{reason}")
        time.sleep(0.05)


def wait(plan: Plan, state: StateFolder, process: subprocess.Popen[bytes], progress: Progress) -> str | None:
    """Wait for every part; what is to be said of a fleet that serves nobody. StackError naming the part that does not
    come, and the end of its log.
    """
    started = time.monotonic()
    checked = 0.0

    def step(what: str, holds: Callable[[], bool], timeout: float = PATIENCE) -> None:
        def watched() -> bool:
            nonlocal checked
            if time.monotonic() - checked > 1.0:
                checked = time.monotonic()
                _check_processes(state, process)
            return holds()

        until(f"{what} is not ready; see {state.logs}", watched, timeout)
        progress(f"{what}  ({time.monotonic() - started:.1f} s)")

    token = state.internal_token.read_text(encoding="utf-8").strip()
    settings = plan.settings
    step("control", lambda: _ok(settings.gateway.control_url, "/internal/snapshot", key=token))
    step("gateway", lambda: _ok(plan.url, "/health"))
    answering = []
    for node in settings.nodes:
        timeout = 10.0 if plan.fleet.kind == "attached" else PATIENCE
        try:
            step(f"{node.name} at {node.url}", lambda url=node.url: _ok(url, "/api/version"), timeout)  # type: ignore[misc]
            answering.append(node.name)
        except StackError:
            if plan.fleet.kind != "attached" or len(settings.nodes) == 1:
                raise
            progress(f"{node.name} at {node.url} does not answer: left for later")
    admin = state.admin_key.read_text(encoding="utf-8").strip()
    step("edge to control", lambda: _ok(plan.url, "/admin/status", key=admin))
    used = fleet(plan, state)
    _models(plan, used, progress)
    note = _unserved(plan, used, answering)
    for node in settings.nodes if used else ():
        if node.name in answering and node.name not in used:
            progress(f"{node.name} runs, but was removed from the fleet: `corral nodes add {node.url}` uses it again")
    if note is None:
        step("edge to nodes", lambda: _ok(plan.url, "/health/ready") and _proxied(state, answering))
    for name, known in (plan.monitoring.describe() if plan.monitoring is not None else {}).items():
        step(f"{name} at {known['url']}", lambda url=known["url"]: _ok(url, "/-/ready"))  # type: ignore[misc]
    return note


def fleet(plan: Plan, state: StateFolder) -> list[str]:
    """The nodes that control uses: not those that an operator removed. Raises http.Unreachable."""
    admin = state.admin_key.read_text(encoding="utf-8").strip()
    listed = http.request(plan.url, "GET", "/admin/nodes", key=admin).json()
    return [str(node["name"]) for node in listed["nodes"]] if isinstance(listed, dict) and "nodes" in listed else []


def _unserved(plan: Plan, used: list[str], answering: list[str]) -> str | None:
    """Why no request would be served; None where a node that was waited for is in the fleet."""
    if set(answering) & set(used):
        return None
    removed = [f"`corral nodes add {node.url}` ({node.name})" for node in plan.settings.nodes if node.name not in used]
    what = "; ".join(f"{name} is not waited for" for name in used) or "the fleet has no node: all were removed"
    again = f"; to use one again: {', or '.join(removed)}" if removed else ""
    return f"no request is served: {what}{again}"


def _proxied(state: StateFolder, nodes: list[str]) -> bool:
    """Whether HAProxy has seen since that these nodes answer; it checks each second, and began before they did."""
    try:
        seen = haproxy.server_states(state)
    except OSError:
        return False
    return all(seen.get(name) != "DOWN" for name in nodes)


def first_model(plan: Plan, used: Collection[str]) -> str | None:
    """A model to show in the example; None where none of the nodes that are ``used`` has any."""
    for node in plan.settings.nodes:
        if node.name not in used:
            continue
        try:
            if names := models.listed(node.url):
                return min(names, key=lambda name: "embed" in name)
        except http.Unreachable:
            continue
    return None


def _models(plan: Plan, used: Collection[str], progress: Progress) -> None:
    urls = [node.url for node in plan.settings.nodes if node.name in used]
    if plan.fleet.kind == "attached" or not urls:
        return
    if plan.fleet.kind == "ollama" and not models.listed(urls[0]):
        models.install(urls[0], None if plan.fleet.gpus else nodes.threads(plan.fleet.count))
        progress("model  smollm2:135m installed")
    name = first_model(plan, used)
    if plan.fleet.kind == "simulated" or name is None:
        return
    entries = [model for model in plan.settings.models if canonical_name(model.name) == canonical_name(name)]
    options = check({}, ModelPolicy.from_entry(entries[0].model_dump(mode="json"))) if entries else {}
    with ThreadPoolExecutor(max_workers=len(urls)) as pool:
        slowest = max(pool.map(lambda url: models.warm(url, name, options), urls))
    progress(f"model  {name} loaded on {len(urls)} node{'s' if len(urls) > 1 else ''} in {slowest:.1f} s")


def _ok(base: str, path: str, key: str | None = None) -> bool:
    return http.request(base, "GET", path, key=key, timeout=3).status == 200


def _check_processes(state: StateFolder, process: subprocess.Popen[bytes]) -> None:
    """StackError when a program keeps ending, with its last words."""
    if process.poll() is not None:
        raise StackError(f"the supervisor ended: {(state.logs / 'supervisord.out').read_text()[-500:]}")
    for name, known in supervisor.processes(state).items():
        if known["statename"] in ("BACKOFF", "FATAL") and _starts(state, name) >= TRIES:
            raise StackError(f"{name} does not start. The end of {log_file(state, name)}:\n{_tail(state, name)}")


def _starts(state: StateFolder, name: str) -> int:
    """How often the supervisor has started a program, by its log of this run."""
    try:
        text = (state.logs / "supervisord.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return text.rpartition("supervisord started with pid")[2].count(f"spawned: '{name}'")


def _tail(state: StateFolder, name: str, lines: int = 8) -> str:
    try:
        text = log_file(state, name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join("    " + line[:300] for line in text.splitlines()[-lines:])
