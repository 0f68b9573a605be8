"""scripts/install-packages: the Debian packages that tests need, by what is missing; scripts/test begins with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.programs import program

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ALL = ("unit", "fuzz", "integration", "conformance", "faults", "monitoring", "deploy")
PROGRAMS = {
    "python3": "python3", "gcc": "gcc", "git": "git", "curl": "curl", "zstd": "zstd", "openssl": "openssl",
    "pgrep": "procps", "ip": "iproute2", "redis-server": "redis-server", "g++": "g++",
    "docker-registry": "docker-registry", "dockerd": "docker.io", "docker": "docker.io", "debootstrap": "debootstrap",
    "iptables": "iptables", "mkfs.ext4": "e2fsprogs", "mount": "mount", "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}  # fmt: skip


class Machine:
    """A PATH with every program that is asked for, of an operator who is root or not; `apt-get` notes its calls."""

    def __init__(self, folder: Path, user: int) -> None:
        self.bin, self.calls = folder / "bin", folder / "calls"
        self.bin.mkdir()
        for name in PROGRAMS:
            program(self.bin / name, "exit 0")
        for name in ("bash", "sort", "mktemp", "rm", "chmod", "tail", "dirname", "sed"):
            (self.bin / name).symlink_to(shutil.which(name) or name)
        program(self.bin / "id", f"echo {user}")
        program(self.bin / "apt-get", f'echo "$*" >> {self.calls}')

    def run(self, *groups: str, script: Path = SCRIPTS / "install-packages") -> subprocess.CompletedProcess[str]:
        bash = str(self.bin / "bash")
        return subprocess.run(
            [bash, script, *groups], env={"PATH": str(self.bin)}, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, user=1000)


def test_where_all_is_there_nothing_is_asked_for(machine: Machine) -> None:
    done = machine.run(*ALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not machine.calls.exists()


@pytest.mark.parametrize("missing", PROGRAMS)
def test_what_is_missing_is_named_by_its_package(machine: Machine, missing: str) -> None:
    (machine.bin / missing).unlink()
    done = machine.run(*ALL)
    assert done.returncode == 1
    named = done.stderr.rpartition("--no-install-recommends")[2].split()
    # Without Python all that is Python's is missing.
    assert named == (["python3", "python3-dev", "python3-venv"] if missing == "python3" else [PROGRAMS[missing]])


@pytest.mark.parametrize(("asked", "package"), [("ensurepip", "python3-venv"), ("Python.h", "python3-dev")])
def test_parts_of_python_are_packages_of_their_own(machine: Machine, asked: str, package: str) -> None:
    program(machine.bin / "python3", f'case "$*" in *{asked}*) exit 1 ;; esac')
    for groups in ((), ALL):
        done = machine.run(*groups)
        assert (done.returncode, done.stderr.split()[-1]) == (1, package)


@pytest.mark.parametrize(
    ("groups", "package"),
    [(("unit",), "curl"), (("monitoring",), "prometheus"), (("faults",), "g++"), (("unit", "deploy"), "debootstrap")],
)
def test_a_group_needs_its_own(machine: Machine, groups: tuple[str, ...], package: str) -> None:
    (machine.bin / package).unlink()
    assert machine.run(*groups).returncode == 1
    assert machine.run().returncode == 0
    if package != "curl":
        assert machine.run("unit", "fuzz").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root installs packages")
def test_root_installs_them_and_no_service_starts(tmp_path: Path) -> None:
    machine, policy = Machine(tmp_path, user=0), Path("/usr/sbin/policy-rc.d")
    there = policy.exists()
    program(machine.bin / "apt-get", f'[ -x {policy} ] || exit 1; echo "$*" >> {machine.calls}')
    for name in ("ip", "redis-server"):
        (machine.bin / name).unlink()
    done = machine.run("faults")
    assert done.returncode == 0, done.stderr
    update, install = machine.calls.read_text().splitlines()
    assert update.split()[0] == "update"
    assert install.split() == ["install", "-qy", "--no-install-recommends", "iproute2", "redis-server"]
    program(machine.bin / "apt-get", "echo no such package; exit 1")
    failed = machine.run("faults")
    assert failed.returncode == 1 and "no such package" in failed.stderr
    assert policy.exists() == there


def test_tests_begin_with_it(machine: Machine, tmp_path: Path) -> None:
    """Minutes before something else would miss them."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("test", "install-packages"):
        shutil.copy(SCRIPTS / name, scripts / name)
    program(scripts / "setup", "exit 3")
    assert machine.run("unit", script=scripts / "test").returncode == 3
    (machine.bin / "zstd").unlink()
    done = machine.run("unit", script=scripts / "test")
    assert (done.returncode, done.stderr.split()[-1]) == (1, "zstd")
