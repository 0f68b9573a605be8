"""scripts/install-ollama: which program it takes, what it asks of a release, and that it installs in one step."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.programs import GO_WHEEL, program

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/install-ollama"
TESTED = "0.17.4"


def ollama(path: Path, version: str) -> Path:
    lines = f"Warning: could not connect to a running Ollama instance\nWarning: client version is {version}"
    return program(path, f"echo '{lines}'")


class Machine:
    """A home, a PATH with an Ollama, and a release that `curl` gets."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.cache = folder / "cache/corral" / f"ollama-{TESTED}"
        self.on_path = ollama(self.bin / "ollama", "0.16.2")
        self.fetched = folder / "fetched"
        self.release = folder / "release.tar.zst"
        program(
            self.bin / "curl",
            f'touch {self.fetched}; while [ "$1" != -o ]; do shift; done; cp {self.release} "$2"',
        )

    def pack(self, version: str, content: str) -> str:
        """Make the release; the SHA-256 of its archive."""
        tree = self.folder / "packed"
        shutil.rmtree(tree, ignore_errors=True)
        ollama(tree / "bin/ollama", version)
        program(tree / "lib/ollama/libggml.so", content)
        subprocess.run(["tar", "--zstd", "-cf", self.release, "-C", tree, "bin", "lib"], check=True)
        return hashlib.sha256(self.release.read_bytes()).hexdigest()

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        given = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.folder), **env}
        given["XDG_CACHE_HOME"] = str(self.folder / "cache")
        return subprocess.run([SCRIPT], env=given, capture_output=True, text=True, timeout=60)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(("version", "warned"), [(TESTED, False), ("0.17.5", True), ("0.20.0", True), ("1.0.0", True)])
def test_the_tested_version_and_newer_ones_are_taken(machine: Machine, version: str, warned: bool) -> None:
    ollama(machine.on_path, version)
    done = machine.run()
    assert (done.returncode, done.stdout) == (0, f"{machine.on_path}\n"), done.stderr
    assert ("warning" in done.stderr and version in done.stderr) == warned
    named = machine.run(CORRAL_OLLAMA=str(machine.on_path))
    assert named.stdout == done.stdout


@pytest.mark.parametrize("version", ["0.17.3", "0.9.9", "0.0.0", "unknown"])
def test_an_older_one_is_not(machine: Machine, version: str) -> None:
    ollama(machine.on_path, version)
    cached = ollama(machine.cache / "bin/ollama", TESTED)
    done = machine.run()
    assert (done.returncode, done.stdout) == (0, f"{cached}\n"), done.stderr
    assert f"{machine.on_path} " in done.stderr
    assert machine.run(CORRAL_OLLAMA=str(machine.on_path)).returncode == 1


def test_a_release_is_installed_with_its_checksum_alone(machine: Machine) -> None:
    digest = machine.pack(TESTED, "one")
    wrong = machine.run(CORRAL_OLLAMA_SHA256="0" * 64)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "CORRAL_OLLAMA_SHA256" in wrong.stderr
    assert not list((machine.cache / "bin").iterdir())
    done = machine.run(CORRAL_OLLAMA_SHA256=digest)
    assert (done.returncode, done.stdout) == (0, f"{machine.cache}/bin/ollama\n"), done.stderr
    real = (machine.cache / "bin/ollama").resolve()
    assert (real.parents[1] / "lib/ollama/libggml.so").read_text().endswith("one\n")
    machine.fetched.unlink()
    assert machine.run(CORRAL_OLLAMA_SHA256=digest).stdout == done.stdout
    assert not machine.fetched.exists(), "it is installed already"


def test_a_broken_install_is_replaced_whole(machine: Machine) -> None:
    ollama(machine.cache / "bin/ollama", "0.1.0")
    program(machine.cache / "tree.old/lib/ollama/libggml.so", "old")
    assert machine.run(CORRAL_OLLAMA_SHA256=machine.pack(TESTED, "new")).returncode == 0
    assert (machine.cache / "bin/ollama").is_symlink()
    (tree,) = machine.cache.glob("tree.*")
    assert (tree / "lib/ollama/libggml.so").read_text().endswith("new\n")
    assert not list(machine.cache.glob("work.*"))


def test_a_release_of_another_version_is_not_installed(machine: Machine) -> None:
    done = machine.run(CORRAL_OLLAMA_SHA256=machine.pack("0.17.3", "one"))
    assert done.returncode == 1
    assert not (machine.cache / "bin/ollama").exists()


def test_without_a_checksum_nothing_is_fetched_and_another_module_is_not_built(machine: Machine) -> None:
    for tool in ("gcc", "g++"):
        program(machine.bin / tool, "exit 1")
    version = "go version go1.24.1 linux/amd64"
    program(
        machine.bin / "go",
        f"""case $1 in version) echo {version} ;; env) echo on ;; *) echo '{{"Sum": "h1:other="}}' ;; esac""",
    )
    done = machine.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert "h1:other= instead of h1:" in done.stderr
    assert not machine.fetched.exists()
    program(machine.bin / "go", f"if [ $1 = version ]; then echo {version}; else echo off; fi")
    assert "GOSUMDB=off" in machine.run().stderr


@pytest.mark.parametrize("defined", ["__AVX2__", "__AMX_INT8__"])
def test_a_processor_whose_sources_the_module_lacks_is_built_for_without_them(machine: Machine, defined: str) -> None:
    """With a Go of the user's cache, where that on PATH is too old."""
    flags, sources = machine.folder / "flags", machine.folder / "miniaudio-1.71/miniaudio"
    sources.mkdir(parents=True)
    (sources / "miniaudio.h").touch()
    made = machine.folder / "made"
    ollama(made, TESTED)
    program(machine.bin / "gcc", f"echo '#define {defined} 1'")
    for tool in ("g++", "apt-get"):
        program(machine.bin / tool, "exit 0")
    digest = next(line for line in SCRIPT.read_text().splitlines() if line.startswith("module_hash=")).partition("=")[2]
    program(machine.bin / "go", "echo go version go1.19.8 linux/amd64")
    program(
        machine.folder / f"cache/corral/go-{GO_WHEEL}/bin/go",
        f"""[ -z "${{GOROOT:-}}" ] || exit 1
case $1 in
version) echo go version go{GO_WHEEL} linux/amd64 ;;
env) echo on ;;
mod) echo '{{"Sum": "{digest}"}}' ;;
install) echo "$CGO_CFLAGS" > {flags}; mkdir -p "$GOBIN"; cp {made} "$GOBIN/ollama" ;;
esac""",
    )
    # A virtual environment is this program again, and the package that it downloads is the folder above.
    program(
        machine.bin / "python3",
        f"""case "$*" in
-c*) cat > /dev/null; echo '{digest}' ;;
-m\\ venv*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*\\ download\\ *)
    while [ "$1" != -d ]; do shift; done
    mkdir -p "$2" && tar -czf "$2/miniaudio-1.71.tar.gz" -C {machine.folder} miniaudio-1.71 ;;
esac""",
    )
    done = machine.run(GOROOT=str(machine.folder))
    assert (done.returncode, done.stdout) == (0, f"{machine.cache}/bin/ollama\n"), done.stderr
    assert f"{machine.bin}/go is Go 1.19.8" in done.stderr
    assert ("-mno-amx-int8" in flags.read_text()) == ("AMX" in defined)
