"""Signals and advice of the commands that start a stack or stop one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Runner

from corral.stack import up
from corral.stack.state import StateFolder

_INTERRUPTED = """
import signal, sys

def interrupt(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        signal.raise_signal(signal.SIGINT)

sys.addaudithook(interrupt)
"""


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("click", "interrupted"),
        ("corral.config.errors", "interrupted"),
        ("corral.stack.up", "stopped before it was ready"),
    ],
)
def test_ctrl_c_while_modules_are_imported_leaves_a_sentence(tmp_path: Path, module: str, said: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(_INTERRUPTED.format(module=module), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    argv = [sys.executable, "-P", "-m", "corral", "up", "--config", str(tmp_path / "none")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (1, f"corral: {said}\n")


def test_a_signal_while_a_restore_is_finished_leaves_a_sentence(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    run.state.mkdir()
    monkeypatch.setattr("corral.store.replace.finish", lambda _state: signal.raise_signal(signal.SIGTERM))
    done = run("up")
    assert (done.exit_code, done.stderr) == (1, "corral: stopped before it was ready\n")
    assert list(run.state.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["doctor"],
        ["status"],
        ["config", "reload"],
        ["loadtest", "run", "--closed", "1", "--model", "m", "--duration", "1s"],
    ],
)
def test_what_starts_a_stack_says_which(run: Runner, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Followed to the letter, `corral up` alone would start that of the default folder."""
    monkeypatch.setenv("CORRAL_KEY", "crl_none")
    assert f"`corral up --state {run.state}`" in run(*words).output
    monkeypatch.setenv("CORRAL_STATE", str(run.state))
    assert "`corral up`" in run(*words).output


def test_a_second_signal_cuts_short_no_cleaning_up(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(state: StateFolder) -> int:
        signal.raise_signal(signal.SIGINT)
        return clean(state)

    clean = up.clean
    monkeypatch.setattr(up, "clean", signalled)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("up", "--port", str(taken.getsockname()[1]), "--node-backend", "simulated")
    assert (done.exit_code, "is taken by" in done.stderr) == (1, True)
    assert not run.state.exists()
