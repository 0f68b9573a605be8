"""`pip install .` gives the command that `./corral` is, with all that it needs of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support.load import CHAT, WHOLE, Client, body_of
from support.process import free_port
from support.servers import REPOSITORY

NOT_INSTALLED = {".c", ".pyc", ".so"}
"""What only a checkout compiles, and what is compiled."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "sources"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, copy)
    shutil.copytree(REPOSITORY / "api-gateway", copy / "api-gateway", ignore=shutil.ignore_patterns("__pycache__"))
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, copy], folder)
    return next(folder.glob("*.whl"))


def _run(argv: list[str | Path], cwd: Path, **env: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CORRAL_", "PYTHON"))}
    done = subprocess.run(argv, cwd=cwd, env=kept | env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{argv}: status {done.returncode}\n{done.stderr[-3000:]}\n{done.stdout[-3000:]}"
    return done.stdout


def test_all_of_the_package_is_in_it(wheel: Path) -> None:
    sources = REPOSITORY / "api-gateway"
    files = [path for path in (sources / "corral").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {str(path.relative_to(sources)) for path in files if path.suffix not in NOT_INSTALLED}
    assert len(wanted) > 250
    assert wanted - set(zipfile.ZipFile(wheel).namelist()) == set()


def test_the_command_serves_from_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    # Beside the libraries that are installed already, and away from the sources.
    site, state, port = tmp_path / "site", tmp_path / "state", free_port()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel]
    _run(pip, tmp_path)
    libraries = os.pathsep.join([str(site), sysconfig.get_paths()["purelib"]])

    def corral(*arguments: str) -> str:
        return _run([site / "bin/corral", *arguments], tmp_path, PYTHONPATH=libraries)

    assert _run(
        [sys.executable, "-c", "import corral; print(corral.__file__)"], tmp_path, PYTHONPATH=libraries
    ).startswith(str(site))
    where = ["--state", str(state)]
    try:
        told = json.loads(
            corral("up", "--detach", "--json", "--port", str(port), "--node-backend", "simulated", *where)
        )
        client = Client(told["url"].rstrip("/"), told["key"])
        answer = client.ask(CHAT, body_of(CHAT, told["model"], 8), "installed")
        client.close()
        assert answer.fate == WHOLE, str(answer)
    finally:
        corral("down", *where)
