"""The first command of the README on a machine that has nothing of Corral: from the sources, with an empty home, to the
first token of a real model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from support.load import CHAT, WHOLE, Client, body_of
from support.process import free_port
from support.servers import REPOSITORY
from support.up import nothing_left

from corral.stack.state import StateFolder

FIRST, SECOND = 180.0, 20.0
"""Seconds from the command to the first token: of the first start, and of the next one."""
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".cache", ".hypothesis")


def machine(home: Path) -> dict[str, str]:
    """The environment of who has an empty home and no Ollama; where packages come from is the machine's own."""
    own = ("CORRAL_", "PYTHON", "OLLAMA_")
    kept = {name: it for name, it in os.environ.items() if not name.startswith(own) or name == "CORRAL_PYTHON"}
    for file in (".config/pip/pip.conf", ".pip/pip.conf"):
        if (Path.home() / file).exists():
            kept.setdefault("PIP_CONFIG_FILE", str(Path.home() / file))
    for name in ("VIRTUAL_ENV", "XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        kept.pop(name, None)
    folders = [_without_ollama(Path(folder), home / f"bin-{at}") for at, folder in enumerate(kept["PATH"].split(":"))]
    return kept | {"HOME": str(home), "PATH": ":".join(map(str, folders))}


def _without_ollama(folder: Path, copy: Path) -> Path:
    """A folder of programs, or one of links to all of them but Ollama where that is among them."""
    if not (folder / "ollama").exists():
        return folder
    copy.mkdir()
    for program in folder.iterdir():
        if program.name != "ollama":
            (copy / program.name).symlink_to(program)
    return copy


def test_from_the_sources_to_the_first_token(
    tmp_path: Path, matrix: Callable[[str, str, str], None], turn: int
) -> None:
    copy, home, port = tmp_path / "corral", tmp_path / "home", free_port()
    shutil.copytree(REPOSITORY, copy, ignore=LEFT_OUT, symlinks=True)
    home.mkdir()
    env = machine(home)

    def run(*arguments: str) -> str:
        argv = ["./corral", *arguments]
        said = subprocess.run(
            argv, cwd=copy, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=FIRST * 2
        )
        assert said.returncode == 0, f"{argv}: status {said.returncode}\n{said.stderr[-3000:]}\n{said.stdout[-3000:]}"
        return said.stdout

    def start(key: str) -> tuple[float, str]:
        """Seconds to the first token, and the key."""
        began = time.monotonic()
        told = json.loads(run("up", "--detach", "--json", "--port", str(port)))
        key = told.get("key") or key
        client = Client(told["url"].rstrip("/"), key)
        answer = client.ask(CHAT, body_of(CHAT, told["model"], 16), f"first-{turn}")
        client.close()
        assert answer.fate == WHOLE, str(answer)
        assert answer.text
        return answer.first - began, key

    state = StateFolder(home / ".local/state/corral")
    try:
        first, key = start("")
        known = state.stack()
        assert known
        run("down")
        nothing_left(state, known["ports"])
        second, _ = start(key)
    finally:
        subprocess.run(["./corral", "down"], cwd=copy, env=env, capture_output=True, timeout=FIRST * 2)
    bar = f"first token <= {FIRST:g} s, of the second start <= {SECOND:g} s"
    matrix("nothing is installed, an empty home, no Ollama", bar, f"{first:.0f} s, {second:.1f} s")
    assert first <= FIRST
    assert second <= SECOND
