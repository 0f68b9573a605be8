"""What the supervisor keeps running, and its configuration."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corral.stack import guard
from corral.stack.state import StackError, StateFolder, write_private

LOG_BYTES = "20MB"
LOG_COPIES = 3


@dataclass(frozen=True)
class Program:
    """One process. ``cpus`` empty: any. Stop times are seconds.

    The least ``priority`` starts first and is stopped last, when all others have ended; a ``group`` is stopped at once.
    """

    name: str
    argv: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    cpus: Sequence[int] = ()
    stop_wait: int = 10
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: int = signal.SIGKILL
    oom_score_adj: int = 0
    priority: int = 100
    group: str = ""


# What an operator's shell may say to `up` is in the rendered settings already; a child reads those alone.
_KEPT = ("CORRAL_HAPROXY", "CORRAL_VALKEY")
_SETTINGS_VARIABLES = ("CORRAL_", "OLLAMA_", "REDIS_URL", "LLAMA_ARG_")


def environment(state: StateFolder, program: Program) -> dict[str, str]:
    """The environment of a program: the shell's without what configures Corral or Ollama, and its own."""
    kept = {
        name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(_SETTINGS_VARIABLES)
    }
    return kept | program.env | {guard.STACK: str(state.root), guard.PROGRAM: program.name, "PYTHONUNBUFFERED": "1"}


def write_specs(state: StateFolder, programs: Sequence[Program]) -> None:
    """Write what guard.py reads, one file a program."""
    for old in state.programs.glob("*.json"):
        old.unlink()
    for program in programs:
        spec = {
            "argv": list(program.argv),
            "env": environment(state, program),
            "cpus": list(program.cpus),
            "death_signal": int(program.death_signal),
            "oom_score_adj": program.oom_score_adj,
        }
        write_private(state.programs / f"{program.name}.json", json.dumps(spec))


def supervisord_conf(state: StateFolder, programs: Sequence[Program]) -> str:
    """supervisord.conf for ``programs``; its paths are relative to run/, where the supervisor works."""
    socket = state.socket("supervisor.sock")
    lines = [
        "[unix_http_server]",
        f"file = {_value(socket)}",
        "chmod = 0600",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        "[supervisord]",
        "nodaemon = true",
        "silent = true",
        "logfile = ../logs/supervisord.log",
        f"logfile_maxbytes = {LOG_BYTES}",
        f"logfile_backups = {LOG_COPIES}",
        "pidfile = supervisord.pid",
        "childlogdir = ../logs",
        "umask = 077",
        "minfds = 1024",
    ]
    for program in programs:
        command = [sys.executable, "-I", "-S", guard.__file__, f"programs/{program.name}.json"]
        lines += [
            f"[program:{program.name}]",
            f"command = {_value(shlex.join(command))}",
            f"stdout_logfile = ../logs/{program.name}.log",
            "redirect_stderr = true",
            f"stdout_logfile_maxbytes = {LOG_BYTES}",
            f"stdout_logfile_backups = {LOG_COPIES}",
            "autostart = true",
            "autorestart = true",
            "startsecs = 1",
            "startretries = 1000000",
            f"stopsignal = {program.stop_signal.name.removeprefix('SIG')}",
            "stopasgroup = true",
            "killasgroup = true",
            f"stopwaitsecs = {program.stop_wait}",
            f"priority = {program.priority}",
        ]
    groups: dict[str, list[Program]] = {}
    for program in programs:
        if program.group:
            groups.setdefault(program.group, []).append(program)
    for name, members in groups.items():
        lines += [f"[group:{name}]", f"programs = {','.join(member.name for member in members)}"]
        lines.append(f"priority = {max(member.priority for member in members)}")
    return "\n".join(lines) + "\n"


def _value(text: str | Path) -> str:
    """A value of supervisord.conf: it expands %, and takes " ;" and " #" for the start of a comment."""
    text = str(text)
    if any(bad in text for bad in ("\n", "\r", " ;", " #")):
        raise StackError(f"{text}: the supervisor's configuration cannot hold this path: choose another --state")
    return text.replace("%", "%%")


def valkey_conf(port: int, folder: Path) -> str:
    """valkey.conf: loopback, nothing on disk (all of it can be rebuilt), bounded."""
    return "\n".join(
        [
            "bind 127.0.0.1",
            f"port {port}",
            "protected-mode yes",
            "daemonize no",
            'save ""',
            "appendonly no",
            f"dir {json.dumps(str(folder))}",
            "maxmemory 256mb",
            "maxmemory-policy noeviction",
            "tcp-keepalive 60",
            "timeout 0",
            "loglevel notice",
            'logfile ""',
            "",
        ]
    )
