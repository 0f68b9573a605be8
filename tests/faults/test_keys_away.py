"""The database is away, and control is not: keys are believed for as long as it is stated. Two controls on one
PostgreSQL: what one of them changes is in force on the gateways of the other."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
import yaml
from support.control import Running, make_key
from support.postgres import Postgres
from support.postgres import postgres as run_postgres
from support.process import Process, free_port, until
from support.servers import python_env, valkey

STALE = 6.0
WITHIN = 1.0
ROUNDS = 5


@pytest.fixture
def server() -> Iterator[Postgres]:
    with run_postgres() as made:
        yield made


class Lone:
    """A gateway of a control, without nodes: a key is all that it is asked about."""

    def __init__(self, folder: Path, control: Running) -> None:
        self._port, self._folder, self._state = free_port(), folder, control.state
        self._store = {"valkey": control.settings.store.valkey}
        self.url, self.file = f"http://127.0.0.1:{self._port}", folder / "cache/gateway-1/snapshot.json"
        self._control = control.url
        self.start()

    def start(self) -> None:
        gateway = {"listen": f"127.0.0.1:{self._port}", "metrics": "", "control_url": self._control}
        gateway |= {"spool": str(self._folder / "spool"), "cache": str(self._folder / "cache")}
        files = {"pepper_file": "pepper", "internal_token_file": "internal.token"}
        auth = {name: str(self._state / file) for name, file in files.items()}
        settings = {"gateway": gateway, "auth": {**auth, "stale": f"{STALE:g}s"}, "store": self._store}
        (self._folder / "gateway.yaml").write_text(yaml.safe_dump(settings))
        argv = [sys.executable, "-m", "corral", "serve", "gateway", "--config", self._folder / "gateway.yaml"]
        self.process = Process(argv, self._folder / "gateway.log", python_env())
        self.process.wait_until(lambda: self.status("") in (401, 503))

    def close(self) -> None:
        self.process.end(signal.SIGKILL)

    def status(self, text: str) -> int:
        headers = {"Authorization": f"Bearer {text}"} if text else {}
        return httpx.get(self.url + "/api/tags", headers=headers, timeout=5, trust_env=False).status_code


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_known_keys_outlive_the_database_for_the_stated_time(tmp_path: Path, server: Postgres, how: str) -> None:
    store = {"database": server.database()}
    with closing(Running(tmp_path / "state", store=store, auth={"stale": STALE})) as control:
        made = make_key(control, role="operator")
        with closing(Lone(tmp_path, control)) as gateway, control.client(made["key"]) as operator:
            until(lambda: gateway.status(made["key"]) == 200, "the gateway has the key")
            began = time.monotonic()
            server.hold(True) if how == "hangs" else server.kill()
            lost = time.monotonic()
            try:
                until(lambda: gateway.status(made["key"]) == 503, "keys are too old", STALE + 10)
                # It answers nobody from a moment on that is between the two: its processes take a while to be gone.
                ended = time.monotonic()
                assert ended - began > STALE - WITHIN and ended - lost < STALE + WITHIN
                assert control.snapshot().status_code == 200, "control answers all the while"
                if how == "killed":
                    assert operator.get("/admin/nodes").status_code == 503, "nor does control itself go by them"
                # One that starts now has no more time, by its file or by what control says.
                gateway.close()
                gateway.file.unlink()
                gateway.start()
                until(gateway.file.exists, "control has answered it")
                assert time.time() - gateway.file.stat().st_mtime > STALE, "nor has one that starts from this file"
                assert gateway.status(made["key"]) == 503
            finally:
                server.hold(False) if how == "hangs" else server.start()
            until(lambda: gateway.status(made["key"]) == 200, "the database is back")


def test_what_one_control_changes_reaches_the_gateways_of_another_within_a_second(
    tmp_path: Path, server: Postgres
) -> None:
    states = [tmp_path / "first", tmp_path / "second"]
    with ExitStack() as stack:
        store = {"database": server.database(), "valkey": stack.enter_context(valkey(tmp_path)).url}
        first = stack.enter_context(closing(Running(states[0], store=store)))
        states[1].mkdir()
        for name in ("pepper", "internal.token", "admin.key"):
            shutil.copy2(states[0] / name, states[1] / name)
        second = stack.enter_context(closing(Running(states[1], store=store)))
        gateway = stack.enter_context(closing(Lone(tmp_path, second)))
        for _ in range(ROUNDS):
            made = make_key(first)
            changed = time.monotonic()
            until(lambda key=made["key"]: gateway.status(key) == 200, "it knows the key", every=0.01)  # type: ignore[misc]
            assert time.monotonic() - changed < WITHIN
            changed = time.monotonic()
            assert first.admin.post(f"/admin/keys/{made['id']}/revoke").status_code == 200
            until(lambda key=made["key"]: gateway.status(key) == 401, "it refuses the key", every=0.01)  # type: ignore[misc]
            assert time.monotonic() - changed < WITHIN
