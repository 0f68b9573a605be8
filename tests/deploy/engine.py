"""A Docker engine of the tests' own: dockerd with its own data, sockets and networks, and the `docker` that asks it.

Its data (images and the builder's cache, no container or volume after a run) stays in the user's cache.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.process import Process, until

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corral"
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
NETWORKS = "base=10.213.0.0/16,size=24"


def run(*argv: str, timeout: float = 240.0, env: Mapping[str, str] | None = None, given: bytes | None = None) -> str:
    """Standard output of a command. AssertionError with what it said where it fails."""
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        timeout=timeout,
    )
    said, complained = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(argv)}: status {done.returncode}\n{complained[-3000:]}{said[-3000:]}"
    return said


class Docker:
    """The `docker` command, asking one engine. ``env`` is what it needs for that."""

    def __init__(self, socket: Path, config: Path) -> None:
        # The classic builder: BuildKit would need a plugin that Debian does not have.
        self.env = {"DOCKER_HOST": f"unix://{socket}", "DOCKER_CONFIG": str(config), "DOCKER_BUILDKIT": "0"}

    def __call__(self, *arguments: str, timeout: float = 240.0, given: bytes | None = None) -> str:
        return run("docker", *arguments, timeout=timeout, env=self.env, given=given)

    def inspect(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container."""
        found: list[dict[str, Any]] = json.loads(self("inspect", container))
        return found[0]


def other() -> int | None:
    """The pid of an engine that runs already: two would undo each other's rules in the machine's packet filter."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == "dockerd":
                return int(path.parent.name)
        except OSError:
            continue
    return None


@contextmanager
def engine(folder: Path, compose: str) -> Iterator[Docker]:
    """A dockerd that runs for the block, with Docker Compose as `docker compose`. ``folder`` needs a short path."""
    config = folder / "config"
    (config / "cli-plugins").mkdir(parents=True)
    (config / "cli-plugins/docker-compose").symlink_to(compose)
    # Only what is said here: the machine's own engine may have a configuration that this one must not take.
    (folder / "daemon.json").write_text("{}")
    docker = Docker(folder / "docker.sock", config)
    before, forwarding = _tables(), FORWARDING.read_text()
    daemon = Process(
        [
            *("dockerd", "--config-file", folder / "daemon.json"),
            *("--data-root", CACHE / "docker", "--exec-root", folder / "exec"),
            *("--pidfile", folder / "docker.pid", "--host", f"unix://{folder / 'docker.sock'}"),
            *("--bridge", "none", "--default-address-pool", NETWORKS),
        ],
        folder / "dockerd.log",
    )
    try:
        daemon.wait_until(lambda: _answers(docker), 240)
        _clean(docker)
        yield docker
        _clean(docker)
    finally:
        daemon.end(seconds=240)
        _end_left(folder)
        for namespace in (folder / "exec/netns").glob("*"):
            run("umount", str(namespace))
        _restore(before)
        FORWARDING.write_text(forwarding)


def _answers(docker: Docker) -> bool:
    try:
        return bool(docker("version", "--format", "{{.Server.Version}}"))
    except (AssertionError, subprocess.TimeoutExpired):
        return False


def _clean(docker: Docker) -> None:
    """Remove the containers, networks and volumes of this run, or of one that was killed."""
    if containers := docker("ps", "-aq").split():
        docker("rm", "-f", "-v", *containers)
    docker("network", "prune", "-f")
    if volumes := docker("volume", "ls", "-q").split():
        docker("volume", "rm", "-f", *volumes)


Tables = dict[str, tuple[dict[str, str], list[str]]]
"""By table: the chains with their policies, and the rules as iptables-save writes them."""


def _tables() -> Tables:
    found: Tables = {}
    chains: dict[str, str] = {}
    rules: list[str] = []
    for line in run("iptables-save").splitlines():
        if line.startswith("*"):
            chains, rules = found[line[1:]] = ({}, [])
        elif line.startswith(":"):
            name, policy, *_ = line[1:].split()
            chains[name] = policy
        elif line.startswith("-A "):
            rules.append(line)
    return found


def _restore(before: Tables) -> None:
    """Take back what the engine changed in the machine's packet filter: it leaves it behind."""
    for table, (chains, rules) in _tables().items():
        old_chains, old_rules = before.get(table, ({}, []))
        change = ("iptables", "-w", "-t", table)
        for rule in rules:
            if rule not in old_rules:
                run(*change, "-D", *shlex.split(rule)[1:])
        for name in chains.keys() - old_chains.keys():
            # A chain that the kernel has from the start shows itself once its table is used.
            if chains[name] == "-":
                run(*change, "-X", name)
        for name, policy in old_chains.items():
            if chains[name] != policy:
                run(*change, "-P", name, policy)
        for name in chains.keys() - old_chains.keys():
            if chains[name] not in ("-", "ACCEPT"):
                run(*change, "-P", name, "ACCEPT")


def _end_left(folder: Path) -> None:
    """End what a dockerd that was killed leaves: containerd and the containers' shims, known by their folder."""
    needle = str(folder / "exec").encode()

    def left() -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if needle in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    for pid in left():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    until(lambda: not left(), "nothing of the engine is left")
