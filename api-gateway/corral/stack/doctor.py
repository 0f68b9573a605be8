"""What `corral doctor` looks at. Each finding says what was seen and what to do about it."""

from __future__ import annotations

import contextlib
import email.utils
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from corral.stack import binaries, guard, haproxy, http, nodes, ports, status, supervisor
from corral.stack.state import StackError, StateFolder, running
from corral.store.spool import ASIDE

BACKLOG = 64 << 20
DISK = 1 << 30
CLOCK = 5.0
OLLAMA_TESTED = (0, 17)
LOST = "those are not in the audit trail"

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One check. ``advice`` is empty where all is well."""

    check: str
    level: Level
    seen: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine(state: StateFolder, ask: Callable[[str], Any] | None) -> list[Finding]:
    """All checks. ``ask`` gets a path below /admin (None: nothing runs).

    What is asked and does not run with the state folder runs elsewhere (in containers, say): of that, only what its
    control tells can be looked at.
    """
    ask = _once(ask) if ask is not None else None
    if ask is not None and not running(state):
        return [*_parts(ask), *_nodes(None, ask), *_catalogue(ask)]
    found = [*_versions(), *_folder(state), *_disk(state)]
    if ask is None:
        return [*found, *_not_running(state)]
    rest = (*_nodes(state, ask), *_catalogue(ask), *_backlog(state), *_clock(state), *_told(ask))
    return [*found, *_processes(state), *_ports(state), *rest]


def _once(ask: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same, which waits once for an edge that does not answer."""
    away: list[http.Unreachable] = []

    def asked(path: str) -> Any:
        if away:
            raise away[0]
        try:
            return ask(path)
        except http.Unreachable as error:
            away.append(error)
            raise

    return asked


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    for name, find, flag in (("haproxy", binaries.haproxy, "-v"), ("valkey", binaries.valkey, "--version")):
        try:
            output = subprocess.run([find(), flag], capture_output=True, text=True, timeout=10, check=True)
        except (StackError, OSError, subprocess.SubprocessError) as error:
            yield Finding(name, "problem", str(error), binaries.ADVICE)
        else:
            yield Finding(name, "ok", output.stdout.splitlines()[0])


def _folder(state: StateFolder) -> Iterator[Finding]:
    option = state.option(os.environ)
    if not state.root.is_dir():
        yield Finding("state folder", "ok", f"{state.root} is not there yet: `corral up{option}` makes it")
        return
    secret = [state.admin_key, state.pepper, state.internal_token, state.stack_file]
    open_to_others = [path for path in (state.root, *secret) if path.exists() and path.stat().st_mode & 0o077]
    for path in open_to_others:
        yield Finding("state folder", "problem", f"{path} is open to others", f"chmod go= '{path}'")
    if not open_to_others:
        yield Finding("state folder", "ok", f"{state.root} is private")


def _disk(state: StateFolder) -> Iterator[Finding]:
    place = state.root
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    inodes = os.statvfs(place)
    free = f"{usage.free / (1 << 30):.1f} GiB free at {place}"
    if usage.free < DISK or (inodes.f_files and inodes.f_favail / inodes.f_files < 0.02):
        yield Finding("disk", "problem", free, "make room: without it requests are refused, as none can be recorded")
    else:
        yield Finding("disk", "ok", free)


def _not_running(state: StateFolder) -> Iterator[Finding]:
    option = state.option(os.environ)
    if left := guard.left_behind(str(state.root)) if not running(state) else []:
        yield Finding("processes", "warning", f"left by an earlier stack: {left}", f"`corral down{option}` ends them")
    else:
        yield Finding("processes", "ok", f"nothing runs with {state.root}: `corral up{option}` starts it")


def _processes(state: StateFolder) -> Iterator[Finding]:
    known = supervisor.processes(state)
    if not known:
        option = state.option(os.environ)
        advice = f"`corral down{option}`, then `corral up{option}`"
        yield Finding("supervisor", "problem", "it does not answer", advice)
    gateways = {one["name"]: one["url"] for one in (state.stack() or {}).get("gateways", [])}
    for name, process in sorted(known.items()):
        if process["statename"] == "RUNNING" and name in gateways and not status.http_ok(gateways[name], "/health"):
            advice = f"`corral logs --program {name}`; `kill -9 {process['pid']}` has it started again"
            yield Finding(name, "problem", f"pid {process['pid']} runs and does not answer", advice)
        elif process["statename"] == "RUNNING":
            seconds = int(process["now"] - process["start"])
            yield Finding(name, "ok", f"pid {process['pid']}, for {seconds} s")
        elif process["statename"] == "STARTING":
            # So the supervisor calls what has run for less than a second: an upgrade's or a crash's first one.
            yield Finding(name, "warning", f"pid {process['pid']} has begun just now", "run `corral doctor` again")
        else:
            seen = f"{process['statename'].lower()} {process['spawnerr']}".strip()
            yield Finding(name, "problem", seen, f"see `corral logs --program {name}`")


def _ports(state: StateFolder) -> Iterator[Finding]:
    stack = state.stack() or {}
    edge = stack.get("edge", {})
    chosen = {"edge": edge.get("port"), **stack.get("ports", {})}
    for name, port in chosen.items():
        if name == "valkey" and not stack.get("valkey", {}).get("own"):
            continue
        if isinstance(port, int) and ports.is_free(port):
            yield Finding(f"port of {name}", "problem", f"nobody listens at {port}", f"`corral logs` of {name}")
    if not status.valkey_ok(stack.get("valkey", {}).get("url", "")):
        advice = "limits are shared out locally until it is back; see `corral logs --program valkey`"
        yield Finding("valkey", "problem", "it does not answer a PING", advice)


def _parts(ask: Callable[[str], Any]) -> Iterator[Finding]:
    """What control says of the gateways and stores, and of the alerts that fire."""
    try:
        told = ask("/status")
    except (StackError, http.Unreachable) as error:
        yield Finding("control", "problem", str(error), "read the logs of the edge and of control")
        return
    yield Finding("control", "ok", "answers through the edge")
    parts = [(str(gateway["name"]), gateway["state"]) for gateway in told["gateways"]]
    parts += [(name, part["state"]) for name, part in told["store"].items()]
    for name, said in parts:
        if said == "ready":
            yield Finding(name, "ok", "ready")
        else:
            yield Finding(name, "problem", str(said), f"read the log of {name}; docs/runbooks/incident-response.md")
    if not told["gateways"]:
        yield Finding("gateways", "problem", "control knows none", "read the logs of the gateways")
    for gateway in told["gateways"]:
        name = str(gateway["name"])
        yield from _aside(name, gateway.get("aside") or {"count": 0})
        yield from _without_store(gateway)
    if stranger := told.get("audit", {}).get("stranger"):
        seen = f"this control signs nothing: the last checkpoint is of another key ({stranger})"
        yield Finding("audit", "problem", seen, "docs/runbooks/CheckpointLate.md")
    yield from _firing(told["alerts"])


def _without_store(gateway: dict[str, Any]) -> Iterator[Finding]:
    """What a gateway says of its store: nothing where it serves nobody yet, or is of a version before."""
    if gateway["state"] == "ready" and gateway.get("store") is False:
        yield Finding(str(gateway["name"]), "warning", "it has no use of Valkey", "docs/runbooks/LimitStoreDown.md")


def _aside(gateway: str, told: dict[str, Any]) -> Iterator[Finding]:
    """What a gateway says that it put aside. A control of before says nothing of it."""
    if told["count"]:
        names = [str(name) for name in told["names"]]
        more = f" and {told['count'] - len(names)} more" if told["count"] > len(names) else ""
        seen = f"records in {', '.join(names)}{more} could not be read: {LOST}"
        corrupt = any(name.endswith(".corrupt") for name in names)
        advice = f"the log of {gateway} says from which byte on; check the disk of its spool, then remove them"
        yield Finding(f"spool of {gateway}", "problem" if corrupt else "warning", seen, advice)


def _firing(alerts: list[dict[str, Any]]) -> Iterator[Finding]:
    for alert in alerts:  # no problem: they end a while after what they are about
        seen = f"{alert['name']} fires: {alert['summary']}"
        yield Finding("alert", "warning", seen, f"docs/runbooks/{alert['name']}.md")


def _told(ask: Callable[[str], Any]) -> Iterator[Finding]:
    """What control alone says of a stack that runs here: gateways without their store, alerts that fire."""
    with contextlib.suppress(StackError, http.Unreachable):  # that control does not answer is said elsewhere
        told = ask("/status")
        for gateway in told["gateways"]:
            yield from _without_store(gateway)
        yield from _firing(told["alerts"])


def _nodes(state: StateFolder | None, ask: Callable[[str], Any]) -> Iterator[Finding]:
    """HAProxy's view (where its socket is: in a state folder) of each node beside control's; the fleet's versions."""
    seen_by_haproxy: dict[str, str] = {}
    try:
        if state is not None:
            seen_by_haproxy = haproxy.server_states(state)
    except OSError as error:
        yield Finding("haproxy", "problem", f"its socket does not answer: {error}", "`corral logs --program haproxy`")
    try:
        listed = ask("/nodes")
    except (StackError, http.Unreachable) as error:
        yield Finding("control", "problem", str(error), "see `corral logs --program control`")
        return
    told = listed.get("nodes", []) if isinstance(listed, dict) else listed
    stack = (state.stack() if state is not None else None) or {}
    own = {node["name"] for node in stack.get("nodes", []) if node["own"]}
    versions: dict[str, str] = {}
    for node in told:
        name, said = str(node["name"]), str(node.get("state"))
        proxied = seen_by_haproxy.get(name)
        why = node.get("error") or node.get("reason")
        reason = f": {why}" if why else ""
        if proxied is None and state is not None:
            if seen_by_haproxy:
                yield Finding(name, "problem", "HAProxy does not know it", "`corral config reload`")
        elif proxied is not None and (proxied == "UP") != (said in ("ready", "draining", "suspect")):
            advice = f"if it lasts more than 5 s: curl {node.get('url')}/api/version, then `corral config reload`"
            yield Finding(name, "warning", f"control says {said}, HAProxy says {proxied}{reason}", advice)
        elif said == "ready" and reason:
            yield Finding(name, "warning", f"ready{reason}", "`corral models plan` shows what is missing")
        elif said == "ready":
            yield Finding(name, "ok", "ready for control and HAProxy" if state is not None else "ready")
        else:
            yield Finding(name, "warning", f"{said}{reason}", _node_advice(said, node, name in own))
        if version := node.get("version"):
            versions[name] = str(version)
    if not told:
        yield Finding("nodes", "problem", "the fleet has none: every request gets a 503", "`corral nodes add URL`")
    elif not any(node.get("state") in ("ready", "suspect") for node in told):
        yield Finding("nodes", "problem", "none is ready: every request gets a 503", "see each node's line")
    elif not any(node.get("models") for node in told):
        yield Finding("nodes", "warning", "none holds a model: every request gets a 404", "`corral models pull NAME`")
    if len(set(versions.values())) > 1:
        yield Finding("ollama", "warning", f"versions differ: {versions}", "upgrade the nodes one after the other")
    for name, version in versions.items():
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if len(numbers) == 2 and numbers != (0, 0) and numbers < OLLAMA_TESTED:
            advice = f"upgrade it to {nodes.TESTED}"
            yield Finding(name, "warning", f"Ollama {version} is older than what is tested", advice)


def _node_advice(said: str, node: Any, own: bool) -> str:
    if said == "draining" and node.get("reason"):
        return f"`corral models watch` shows it; `corral nodes resume {node['name']} --no-preload` uses it now"
    if said == "draining":
        return f"`corral nodes resume {node['name']}` uses it again"
    if own:
        return (
            f"`corral logs --program {node['name']}`; one that is stuck ends by `kill -9` and its pid (`corral status`)"
        )
    return f"curl {node.get('url')}/api/version; is Ollama running there, and does its firewall let this host in?"


def _catalogue(ask: Callable[[str], Any]) -> Iterator[Finding]:
    """Whether the nodes hold and keep what the catalogue says."""
    try:
        plan = ask("/models/plan")
    except (StackError, http.Unreachable) as error:
        yield Finding("catalogue", "problem", str(error), "see `corral logs --program control`")
        return
    if not plan["catalogue"]:
        return
    drifted = [step for step in plan["steps"] if "digest differs" in step["reason"]]
    for step in drifted:
        seen = f"{step['model']} on {step['node']}: {step['reason']}"
        yield Finding("catalogue", "problem", seen, "`corral models apply` brings the right version back")
    others = len(plan["steps"]) - len(drifted)
    for problem in plan["problems"]:
        yield Finding("catalogue", "warning", problem, "`corral models plan` says more")
    if others:
        seen = f"{others} step{'s' if others > 1 else ''} to what corral.yaml asks for"
        yield Finding("catalogue", "warning", seen, "`corral models plan` shows them, `corral models apply` does them")
    elif not drifted and not plan["problems"]:
        yield Finding("catalogue", "ok", f"in force: {plan['catalogue']} models")


def _backlog(state: StateFolder) -> Iterator[Finding]:
    """Bytes that control has not taken (whole segments are removed once it has), and what it cannot take."""
    for folder in sorted(path for path in state.spool.iterdir() if path.is_dir()) if state.spool.is_dir() else []:
        sizes: dict[Path, int] = {}
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # shipped and removed while we look
                sizes[path] = path.stat().st_size
        held = sum(size for path, size in sizes.items() if path.suffix not in ASIDE)
        check, text = f"spool of {folder.name}", f"{held / (1 << 20):.1f} MiB"
        if held > BACKLOG:
            yield Finding(check, "warning", text, "is control up? see `corral logs --program control`")
        else:
            yield Finding(check, "ok", text)
        for path, size in sizes.items():
            if path.suffix in ASIDE:
                seen = f"{path} ({size} bytes) has records that could not be read: {LOST}"
                advice = (
                    f"`corral logs --program {folder.name}` says from which byte on; check the disk, then remove it"
                )
                yield Finding(check, "problem" if path.suffix == ".corrupt" else "warning", seen, advice)


def _clock(state: StateFolder) -> Iterator[Finding]:
    """The local clock beside each attached node's; expiry of keys and the audit trail need it right."""
    for node in (state.stack() or {}).get("nodes", []):
        try:
            answer = http.request(node["url"], "GET", "/api/version", timeout=3)
            date = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
        except (http.Unreachable, KeyError, ValueError):
            continue
        if abs(date - time.time()) > CLOCK:
            seen = f"{node['name']} is {date - time.time():+.0f} s off"
            yield Finding("clock", "warning", seen, "run an NTP client (chrony, systemd-timesyncd) on both machines")
            return
    yield Finding("clock", "ok", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
