"""The spool of a gateway that is gone: who shares the folder ships it, and control settles what was open."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.control import Running, haproxy, make_key
from support.fleet import QUICK, SINGLE, SimulatedNode
from support.process import Process, free_port, until
from support.servers import answers, python_env, valkey

from corral.control import ledger
from corral.store import recovery
from corral.store.database import Database, resolve
from corral.store.spool import decode_frames, segments

# A minute without a write, and a look each quarter of one, is what a gateway waits.
HURRIED = "from corral.gateway import adopt; adopt.GONE, adopt.EVERY = 2.0, 0.3; from corral.cli.main import cli; cli()"


class Site:
    """Two gateways with one folder of spools, a control, a node and what stands between them."""

    def __init__(self, folder: Path, exits: ExitStack, database_url: str) -> None:
        self._folder, self._exits = folder, exits
        self.spools = folder / "spool"
        node = SimulatedNode("node-1", folder)
        exits.callback(node.process.end, signal.SIGKILL)
        self._store = {"database": database_url, "valkey": exits.enter_context(valkey(folder)).url}
        self.control = Running(folder / "state", nodes=[{"url": node.url, "slots": 8}], store=self._store)
        exits.callback(self.control.close)
        self._nodes_port = exits.enter_context(haproxy(self.control.state, node))[0].nodes_port  # type: ignore[arg-type]
        self.key = make_key(self.control)["key"]

    def gateway(self, name: str) -> tuple[str, Process]:
        """Start one; its address."""
        port, state = free_port(), self.control.state
        settings = {
            "gateway": {
                "name": name,
                "listen": f"127.0.0.1:{port}",
                "metrics": f"127.0.0.1:{free_port()}",
                "nodes_url": f"http://127.0.0.1:{self._nodes_port}",
                "control_url": self.control.url,
                "spool": str(self.spools),
                "cache": str(self._folder / f"{name}.cache"),
            },
            "store": {"valkey": self._store["valkey"]},
            "auth": {"pepper_file": str(state / "pepper"), "internal_token_file": str(state / "internal.token")},
        }
        file = self._folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        argv = [sys.executable, "-P", "-c", HURRIED, "serve", "gateway", "--config", str(file)]
        process = Process(argv, self._folder / f"{name}.log", python_env())
        self._exits.callback(process.end)
        url = f"http://127.0.0.1:{port}"
        process.wait_until(lambda: answers(url + "/health/ready"))
        until(lambda: httpx.get(url + "/api/tags", headers=self.auth).status_code == 200, "it knows the key")
        return url, process

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def spooled(self, name: str) -> list[str]:
        """The kinds of records that are in a spool."""
        frames = [decode_frames(path.read_bytes()) for path in segments(self.spools / name)]
        return [record["t"] for found in frames for _, record in found]

    def rows(self, model: str) -> list[dict[str, Any]]:
        return list(self.control.admin.get("/admin/audit", params={"model": model}).json()["audit"])


@pytest.fixture
def site(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(recovery, "GRACE", 0.0)
    monkeypatch.setattr(ledger, "ROUND", 0.2)
    with ExitStack() as exits:
        yield Site(tmp_path, exits, database_url)


def body(model: str, tokens: int) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "a"}], "options": {"num_predict": tokens}}


def test_who_shares_the_folder_ships_what_a_gateway_left_and_its_open_request_is_settled(site: Site) -> None:
    url, gone = site.gateway("gateway-1")
    site.gateway("gateway-2")
    database = Database(resolve(site.control.settings.store.database, site.control.state))
    try:
        # Whoever writes waits: what the gateway records from now on stays in its spool.
        with database.engine.connect().execution_options(corral_write=True) as held, held.begin():
            done = httpx.post(url + "/api/chat", json=body(QUICK, 3), headers=site.auth, timeout=60)
            assert done.status_code == 200
            # Its model is to be loaded: a caller who gives up is no gateway that is killed.
            asked: dict[str, Any] = {"json": body(SINGLE, 2000), "headers": site.auth, "timeout": 60}
            with pytest.raises(httpx.HTTPError), httpx.stream("POST", url + "/api/chat", **asked) as response:
                lines = response.iter_lines()
                next(lines)
                until(lambda: "progress" in site.spooled("gateway-1"), "how far it is, is recorded")
                os.kill(gone.pid, signal.SIGKILL)
                list(lines)
            gone.end()
        until(lambda: not (site.spools / "gateway-1").exists(), "its spool is shipped")
        until(lambda: [row["outcome"] for row in site.rows(SINGLE)] == ["interrupted"], "what was open is settled")
    finally:
        database.close()
    (whole,), (cut,) = site.rows(QUICK), site.rows(SINGLE)
    assert (whole["outcome"], whole["tokens"], whole["gw"]) == ("ok", 3, "gateway-1")
    assert (cut["gw"], cut["estimated"], cut["tokens"] > 0) == ("gateway-1", True, True)
    counted = site.control.admin.get("/admin/usage", params={"by": "model"}).json()["usage"]
    sums = {row["model"]: (row["requests"], row["tokens"]) for row in counted if row["model"]}
    assert sums == {QUICK: (1, 3), SINGLE: (1, cut["tokens"])}
