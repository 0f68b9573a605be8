"""Where a node gets to, with a way out and without: from its container, to listeners that count who came."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deploy.images import PYTHON
from deploy.site import Site
from support.links import namespace
from support.process import Process, free_port, until

PROJECT = "corral-apart"
"""Beside the site, which may run: a node of its own, with networks of its own, of the same files."""
NODE = f"{PROJECT}-ollama-1-1"
LISTEN = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("listens", flush=True)
while True:
    connection, (_, caller) = server.accept()
    print("hit", connection.getsockname()[0], caller, flush=True)
    connection.close()
"""
# Ollama's image has no client but its own; a neighbour that is not there is given up after some 3 s.
CONNECT = 'timeout 9 bash -c ": < /dev/tcp/{host}/{port}"'
PULL = "timeout 9 ollama pull --insecure {host}:{port}/library/canary:latest"


class Canary:
    """A listener that nobody should reach, at any of its ``addresses``."""

    def __init__(self, folder: Path, name: str, *inside: str) -> None:
        """``inside``: the command that runs it elsewhere than on the host."""
        self.port, self.addresses, self._own = free_port(), list[str](), set[str]()
        self.process = Process([*inside, sys.executable, "-c", LISTEN, str(self.port)], folder / f"{name}.log")
        self.process.wait_until(lambda: "listens" in self._said())

    def hits(self) -> list[str]:
        """The addresses where somebody came, as often as somebody did: all until now, as this comes after them."""
        with socket.create_connection((self.addresses[0], self.port), 60) as connection:
            own = f"hit {self.addresses[0]} {connection.getsockname()[1]}"
            until(lambda: own in self._said(), "the canary counts")
        self._own.add(own)
        return [line.split()[1] for line in self._said() if line.startswith("hit") and line not in self._own]

    def _said(self) -> list[str]:
        return self.process.log.read_text().splitlines()


@pytest.fixture
def canaries(tmp_path: Path) -> Iterator[list[Canary]]:
    """One on the host, at its end of the link to a network beyond it; one there."""
    with namespace() as beyond:
        made = [Canary(tmp_path, "host"), Canary(tmp_path, "beyond", "ip", "netns", "exec", beyond.name)]
        try:
            made[0].addresses.append(re.sub(r"\d+$", "1", beyond.address))
            made[1].addresses.append(beyond.address)
            yield made
        finally:
            for canary in made:
                canary.process.end()


@contextmanager
def node(site: Site, host: Canary, setting: str = "") -> Iterator[None]:
    """A node as `up -d` starts it with this line in .env, down afterwards.

    The host's canary has addresses in the node's networks too, if it has any.
    """
    env = site.folder / ".env.apart"
    env.write_text((site.folder / ".env").read_text() + setting + "\n")
    compose = f"docker compose -p {PROJECT} --env-file {env.name}"
    try:
        site.do(f"{compose} up -d --no-deps ollama-1")
        # Sooner than `--wait`, which hears of it by a check each 10 s.
        until(lambda: site.shell(f"docker exec {NODE} ollama list").returncode == 0, "the node serves", every=0.2)
        networks = site.docker.inspect(NODE)["NetworkSettings"]["Networks"]
        assert set(networks) == {f"{PROJECT}_nodes", f"{PROJECT}_egress"}
        gateway = "{{range .IPAM.Config}}{{.Gateway}}{{end}}"
        host.addresses[1:] = [site.docker("network", "inspect", "-f", gateway, name).strip() for name in networks]
        yield
    finally:
        site.do(f"{compose} down -v -t 3")


def reached(site: Site, canaries: list[Canary], command: str) -> set[str]:
    """Have the node try each address, all at once: those where somebody came."""
    before = [len(canary.hits()) for canary in canaries]
    targets = [command.format(host=host, port=canary.port) for canary in canaries for host in canary.addresses]
    site.do(f"docker exec {NODE} bash -c '{' & '.join(targets)} & wait'")
    return {host for canary, count in zip(canaries, before, strict=True) for host in canary.hits()[count:]}


def test_a_node_without_a_way_out_reaches_its_mirror_and_no_canary(empty: Site, canaries: list[Canary]) -> None:
    empty.init()
    with node(empty, canaries[0]):
        everywhere = {host for canary in canaries for host in canary.addresses}
        assert len(everywhere) == 4
        for command in (CONNECT, PULL):
            assert reached(empty, canaries, command) == everywhere, "or nothing would be seen below"
    with node(empty, canaries[0], "CORRAL_NODES_INTERNAL=true"), mirror(empty) as address:
        for command in (CONNECT, PULL):
            assert reached(empty, canaries, command) == set()
        empty.do(f"docker exec {NODE} {CONNECT.format(host=address, port=5000)}")


@contextmanager
def mirror(site: Site) -> Iterator[str]:
    """What listens in the network `egress`, connected as docs/compose.md says; its address there."""
    name, network = f"{PROJECT}-mirror", f"{PROJECT}_egress"
    site.docker("run", "-d", "--name", name, "--network", "none", PYTHON, "python", "-c", LISTEN, "5000")
    try:
        site.docker("network", "disconnect", "none", name)
        site.docker("network", "connect", network, name)
        # The engine is done once its program is started, which has yet to come to listening.
        until(lambda: "listens" in site.docker("logs", name), "the mirror listens", every=0.2)
        yield site.docker.inspect(name)["NetworkSettings"]["Networks"][network]["IPAddress"]
    finally:
        site.docker("rm", "-f", name)
