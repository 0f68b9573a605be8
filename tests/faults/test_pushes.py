"""Control's word that something changed reaches a gateway by the store's channel, wherever the store has moved."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import yaml
from support.control import Running, make_key
from support.line import line
from support.process import Process, free_port, until
from support.servers import Server, python_env, valkey

WITHIN = 1.0
NEVER = 3600.0
"""A gateway's pause between two questions for the snapshot (seconds): only a push makes it ask."""
SERVE = f"from corral.gateway import feed; feed.POLL = {NEVER}; from corral.cli.main import cli; cli()"


def port(server: Server) -> int:
    return int(str(urlsplit(server.url).port))


def say(server: Server, *commands: str) -> str:
    """All that a store answers to these."""
    with socket.create_connection(("127.0.0.1", port(server)), 5) as connection:
        connection.sendall("".join(f"{command}\r\n" for command in (*commands, "QUIT")).encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


@contextmanager
def gateway(folder: Path, control: Running, store: str = "") -> Iterator[str]:
    """A gateway of this control, and of its store or one at another address, that never asks by itself; its address."""
    listen = f"127.0.0.1:{free_port()}"
    settings = {
        "gateway": {
            "listen": listen,
            "metrics": "",
            "control_url": control.url,
            **{name: str(folder / name) for name in ("spool", "cache", "access_log")},
        },
        "store": {"valkey": store or control.settings.store.valkey},
        "auth": {
            "pepper_file": str(control.state / "pepper"),
            "internal_token_file": str(control.state / "internal.token"),
            "stale": NEVER,
        },
    }
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump(settings))
    argv = [sys.executable, "-c", SERVE, "serve", "gateway", "--config", file]
    process = Process(argv, folder / "gateway.log", python_env())
    try:
        process.wait_until(lambda: httpx.get(f"http://{listen}/health").status_code == 200)
        yield f"http://{listen}"
    finally:
        process.end(signal.SIGKILL)


def test_a_revocation_is_pushed_to_a_gateway_whose_store_became_a_replica(
    tmp_path: Path, matrix: Callable[[str, str, str], None]
) -> None:
    with ExitStack() as exits:
        old = exits.enter_context(valkey(tmp_path))
        new = exits.enter_context(valkey(tmp_path, primary=port(old)))
        way = exits.enter_context(line(port(old)))
        control = Running(tmp_path / "state", store={"valkey": f"redis://127.0.0.1:{way.port}/0"})
        exits.callback(control.close)
        url = exits.enter_context(gateway(tmp_path, control))

        def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.get(url + "/api/tags", headers=headers, timeout=10).status_code

        def revoked() -> float:
            """Make a key and revoke it; seconds until the gateway refuses it."""
            made = make_key(control)
            until(lambda: status(made["key"]) == 200, "the gateway is told of the key")
            began = time.monotonic()
            control.admin.post(f"/admin/keys/{made['id']}/revoke").raise_for_status()
            until(lambda: status(made["key"]) == 401, "it is told that it is none", every=0.005)
            return time.monotonic() - began

        until(lambda: "link_status:up" in say(new, "INFO replication"), "the replica follows")
        assert revoked() < WITHIN
        # It stays and answers, as a replica that hears nothing of the new primary: what is published there is lost.
        say(new, "REPLICAOF NO ONE")
        say(old, f"REPLICAOF 127.0.0.1 {free_port()}")
        way.to = port(new)
        until(lambda: say(old, "CLIENT LIST TYPE normal").count(" addr=") == 1, "all have left it but who asks")
        took = revoked()
        assert took < WITHIN
    matrix("the store becomes a replica: a push", f"a revocation <= {WITHIN:g} s", f"{took * 1e3:.0f} ms")


def test_what_was_pushed_while_a_gateway_was_away_from_the_store_is_asked_for(tmp_path: Path) -> None:
    with ExitStack() as exits:
        store = exits.enter_context(valkey(tmp_path))
        way = exits.enter_context(line(port(store)))
        control = Running(tmp_path / "state", store={"valkey": store.url})
        exits.callback(control.close)
        url = exits.enter_context(gateway(tmp_path, control, f"redis://127.0.0.1:{way.port}/0"))
        made = make_key(control)

        def status() -> int:
            return httpx.get(url + "/api/tags", headers={"Authorization": f"Bearer {made['key']}"}).status_code

        until(lambda: status() == 200, "the gateway is told of the key")
        way.to = free_port()
        for kind in ("normal", "pubsub"):
            say(store, f"CLIENT KILL TYPE {kind} SKIPME yes")
        until(lambda: say(store, "CLIENT LIST TYPE pubsub").count(" addr=") == 0, "nobody listens")
        control.admin.post(f"/admin/keys/{made['id']}/revoke").raise_for_status()
        assert status() == 200, "nobody could tell it"
        way.to = port(store)
        until(lambda: status() == 401, "it asks once it listens again")
