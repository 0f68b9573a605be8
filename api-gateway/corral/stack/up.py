"""`corral up` and `corral down`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from corral.config.settings import EdgeSettings, NodeSettings, Settings, load
from corral.config.values import host_port
from corral.stack import guard, http, nodes, plan, ports, ready, reload
from corral.stack.plan import Plan
from corral.stack.ready import Progress
from corral.stack.signals import ENDING, Stopped, say, unheard
from corral.stack.state import STOPPING, Lock, StackError, StateFolder, running, write_private

STOP_WITHIN = 120.0
"""More than all programs take that have to be killed."""

START_ENDS_WITHIN = 5.0
"""What nobody was told of yet has no answers to wait for, and a program that did not hear its signal would take all of
the time that it has for these."""

TELL_AFTER = 4.0
_WAITS = "corral: stopping, which takes some seconds; any answers that have begun may end (25 s at most)"


@dataclass(frozen=True)
class Options:
    """What the command line says; None: not said."""

    config: str | None = None
    port: int | None = None
    nodes: int | None = None
    attach: Sequence[str] = ()
    backend: str | None = None
    detach: bool = False
    monitoring: bool = False


def up(
    state: StateFolder,
    options: Options,
    env: Mapping[str, str],
    progress: Progress,
    bootstrap: Callable[[Path, Settings], None],
    announce: Callable[[dict[str, Any]], None],
) -> int:
    """Start the stack, then wait in the foreground until it is stopped or fails, and leave nothing. The exit status.

    ``bootstrap`` makes secrets and database, ``announce`` says what serves. With ``detach`` the stack runs on when this
    returns. StackError where it cannot start, `Stopped` where the operator ended it before it served.
    """
    settings = configuration(options, env)
    fresh = not state.root.exists()
    state.create()
    lock = Lock(state)
    if not lock.acquire() and not _released(lock, state):
        raise StackError(_already(state, state.option(env)))
    supervisor: subprocess.Popen[bytes] | None = None
    serves = False
    # One block for the start and the wait: an interrupt between two of them would end nothing in order.
    try:
        sweep(state)
        write_private(state.stack_file, json.dumps({"pid": os.getpid(), "state": "starting"}))
        _claim_ports(settings.edge, lock)
        attach = [
            *(NodeSettings(name=f"node-{number}", url=url) for number, url in enumerate(options.attach, 1)),
            *(() if options.attach or options.nodes or options.backend else settings.nodes),
        ]
        fleet = nodes.choose(attach, options.nodes, options.backend, env)
        made = plan.make(settings, fleet, state, options.monitoring, partial(_taken, lock))
        _tenants_have_nodes(made.settings)
        bootstrap(state.root, made.settings)
        plan.write(made, state)
        of_file = bool(attach) and not options.attach
        reload.remember(state, _file(options, env), options.port, env, settings, of_file)
        described = made.describe()
        supervisor = _start_supervisor(state, lock, options.detach)
        pids = {"supervisor": supervisor.pid, "pid": supervisor.pid if options.detach else os.getpid()}
        _save(state, {**described, **pids, "state": "starting"})
        note = ready.wait(made, state, supervisor, progress)
        described |= {**_welcome(made, state), "note": note}
        serves = not options.detach
        _save(state, {**made.describe(), **pids, "state": "running"})
        announce(described)
        if options.detach:
            lock.close()
            return 0
        asked = supervisor.wait() in (0, -signal.SIGTERM)
    except BaseException as error:
        asked = serves and isinstance(error, Stopped | KeyboardInterrupt)
        try:
            if supervisor is not None:
                with contextlib.suppress(Stopped, KeyboardInterrupt):  # a second one stops the waiting
                    _stop(state, supervisor, serves)
        finally:
            _leave_nothing(state, lock)
        if not asked:
            state.remove_empty(fresh)
            raise
    else:
        _leave_nothing(state, lock)  # once: the folder may be another's from then on
    if not asked:
        say(f"corral: the supervisor ended by itself; see {state.logs / 'supervisord.log'}")
    return 0 if asked else 1


def _stop(state: StateFolder, supervisor: subprocess.Popen[bytes], serves: bool) -> None:
    if serves:
        _stopping(state)
        say(f"{_WAITS}; Ctrl-C cuts them")
        _end(supervisor, STOP_WITHIN)
    else:
        say("corral: stopping")
        _end(supervisor, START_ENDS_WITHIN)


def _leave_nothing(state: StateFolder, lock: Lock) -> None:
    with unheard():  # a second Ctrl-C stops the waiting for programs, not this
        clean(state)
        lock.remove()


def down(state: StateFolder, timeout: float = STOP_WITHIN) -> bool:
    """Stop what runs; False if nothing did. StackError if it does not stop."""
    if not state.run.is_dir():
        return False
    was = running(state)
    lock = Lock(state)
    if was:
        stack = state.stack() or {}
        pid = stack.get("pid")
        if not isinstance(pid, int) or not _is_ours(pid):
            pid = stack.get("supervisor")
        if isinstance(pid, int) and _is_ours(pid):
            _stopping(state)
            os.kill(pid, signal.SIGTERM)
    began, told = time.monotonic(), False
    while not lock.acquire():
        waited = time.monotonic() - began
        if waited > timeout:
            raise StackError(f"the stack has not stopped within {timeout:.0f} s; see {state.logs}")
        if waited > TELL_AFTER and not told:
            told = True
            print(_WAITS, file=sys.stderr, flush=True)
        time.sleep(0.05)
    left = clean(state)
    lock.remove()
    return was or left > 0


def configuration(options: Options, env: Mapping[str, str]) -> Settings:
    """The operator's settings: ``--config``, ``$CORRAL_CONFIG`` or ./corral.yaml, and the environment."""
    settings = load(_file(options, env), env, whole=True)
    if options.port is not None:
        edge = settings.edge.model_copy(update={"port": options.port})
        settings = settings.model_copy(update={"edge": edge})
    return settings


def _claim_ports(edge: EdgeSettings, lock: Lock) -> None:
    """StackError where an address that is not ours to choose is taken, or another stack is about to take it."""
    wanted = [(edge.host, edge.port, "--port N")]
    if edge.certificate:
        wanted.append((edge.host, edge.tls_port, "edge.tls_port in corral.yaml"))
    if edge.ollama:
        wanted.append((*host_port(edge.ollama), "edge.ollama in corral.yaml"))
    for host, port, setting in wanted:
        other = f"choose another with {setting}, or stop that one"
        if not ports.is_free(port, host):
            raise StackError(f"port {port} is taken by {ports.holder(port)}: {other}")
        if not _taken(lock, port, host):
            raise StackError(f"port {port} is taken by another `corral up`, which is about to listen there: {other}")


def _taken(lock: Lock, port: int, host: str = "127.0.0.1") -> bool:
    """Claim an address for this stack; False if another's holds it."""
    if (held := ports.claim(port, host)) is None:
        return False
    lock.claims.append(held)
    return True


def _tenants_have_nodes(settings: Settings) -> None:
    """StackError where tenants.nodes names a node that this start does not have (--nodes, --attach, or none named)."""
    known = [node.name for node in settings.nodes]
    for tenant, names in settings.tenants.nodes.items():
        for name in names:
            if name not in known:
                there = f"this start has {', '.join(known)}"
                raise StackError(f"tenants.nodes.{tenant}: there is no node {name!r}: {there}")


def _file(options: Options, env: Mapping[str, str]) -> str | None:
    return options.config or env.get("CORRAL_CONFIG") or ("corral.yaml" if Path("corral.yaml").exists() else None)


def clean(state: StateFolder) -> int:
    """Remove what a stopped stack could leave; how many processes were ended. Needs the lock."""
    ended = sweep(state)
    state.remove_sockets()
    for name in ("stack.json", "supervisord.pid"):
        (state.run / name).unlink(missing_ok=True)
    return ended


def sweep(state: StateFolder) -> int:
    """End processes that an earlier stack of this folder left; how many there were."""
    ended: set[int] = set()
    deadline = time.monotonic() + 10
    while pids := guard.left_behind(str(state.root)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
                ended.add(pid)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise StackError(f"processes of an earlier stack do not end: {pids}")
        time.sleep(0.02)
    return len(ended)


def _start_supervisor(state: StateFolder, lock: Lock, detach: bool) -> subprocess.Popen[bytes]:
    parent = os.getpid()
    # An interrupt waits until the new process can be told by its environment: `sweep` would not find it before.
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def prepare() -> None:
        if not detach:
            guard.die_with_parent(signal.SIGTERM, parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    argv = [sys.executable, "-m", "supervisor.supervisord", "-c", str(state.run / "supervisord.conf")]
    try:
        return _spawned(argv, state, lock, prepare)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _spawned(
    argv: Sequence[str], state: StateFolder, lock: Lock, prepare: Callable[[], None]
) -> subprocess.Popen[bytes]:
    with (state.logs / "supervisord.out").open("wb") as output:
        return subprocess.Popen(
            argv,
            cwd=state.run,
            # Its children have this before they are programs of their own: what a killed one leaves is found by it.
            env={**os.environ, guard.STACK: str(state.root)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for `up`, which stops them in order
            pass_fds=lock.fds,
            preexec_fn=prepare,
        )


def _end(supervisor: subprocess.Popen[bytes], within: float) -> None:
    """Stop the supervisor and with it everything; a second Ctrl-C stops the waiting. `clean` ends what is left then."""
    supervisor.terminate()
    try:
        supervisor.wait(within)
    except (subprocess.TimeoutExpired, Stopped, KeyboardInterrupt):
        supervisor.kill()
        supervisor.wait()


def _welcome(made: Plan, state: StateFolder) -> dict[str, Any]:
    """The user's key, made on the first start and shown then alone, and a line that works."""
    admin = state.admin_key.read_text(encoding="utf-8").strip()
    answer = http.request(made.url, "GET", "/admin/keys", key=admin)
    listed = answer.json()
    keys = listed.get("keys", []) if isinstance(listed, dict) else listed or []
    known = any(key.get("name") == "default" and not key.get("revoked") for key in keys)
    key = None
    if not known:
        answer = http.request(made.url, "POST", "/admin/keys", body={"name": "default", "role": "inference"}, key=admin)
        created = answer.json()
        if answer.status not in (200, 201) or not isinstance(created, dict) or "key" not in created:
            raise StackError(f"no key could be made: {answer.status} {answer.body.decode(errors='replace')[:200]}")
        key = str(created["key"])
    model = ready.first_model(made, ready.fleet(made, state))
    ready.until("the gateway knows key and model", lambda: _knows(made.url, key or admin, model), 20.0)
    shown = key or "$CORRAL_KEY"
    # A small model may never come to an end by itself.
    body = {
        "model": model or "MODEL",
        "messages": [{"role": "user", "content": "Hello!"}],
        "options": {"num_predict": 64},
    }
    curl = f"curl {made.url}/api/chat -H 'Authorization: Bearer {shown}' -d '{json.dumps(body)}'"
    if key is None:
        curl = curl.replace("'Authorization: Bearer $CORRAL_KEY'", '"Authorization: Bearer $CORRAL_KEY"')
    return {"key": key, "model": model, "curl": curl}


def _knows(url: str, key: str, model: str | None) -> bool:
    """Whether the gateway takes the key and lists the model (a fleet may have none yet)."""
    answer = http.request(url, "GET", "/api/tags", key=key)
    value = answer.json()
    listed = value.get("models", []) if isinstance(value, dict) else []
    return answer.status == 200 and (model is None or any(item.get("name") == model for item in listed))


def _released(lock: Lock, state: StateFolder, patience: float = 3.0) -> bool:
    """Take the lock of a holder that is ending: its memory, by which it is known, goes before its files do."""
    deadline = time.monotonic() + patience
    supervisor = (state.stack() or {}).get("supervisor")
    while set(guard.left_behind(str(state.root))) <= {supervisor} and time.monotonic() < deadline:
        if lock.acquire():
            return True
        time.sleep(0.02)
    return False


def _already(state: StateFolder, option: str) -> str:
    if state.stopping:
        return f"the Corral with the state folder {state.root} is being stopped: try again in half a minute"
    if url := (state.stack() or {}).get("url"):
        shows, stops = f"`corral status{option}` shows it", f"`corral down{option}` stops it"
        return f"already running at {url} (state {state.root}): {shows}, {stops}"
    return f"another `corral up` is starting with the state folder {state.root}"


def _save(state: StateFolder, described: Mapping[str, Any]) -> None:
    kept = {name: value for name, value in described.items() if name != "key"}
    write_private(state.stack_file, json.dumps(kept, indent=1))


def _stopping(state: StateFolder) -> None:
    if stack := state.stack():
        _save(state, stack | {"state": STOPPING})


def _is_ours(pid: int) -> bool:
    """Whether a pid from stack.json is still a process of this program's (numbers are used again)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"corral" in command or b"supervisord" in command
