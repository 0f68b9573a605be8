"""A key's own deadline: from the command line to the gateway that keeps it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.control import Running, make_key, recorded
from support.gateway import gateway
from support.held import Held, hold, placed
from support.leader import Leader
from support.process import until

from corral.cli.main import cli


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path / "state")
    yield made
    made.close()


def test_the_deadline_of_a_key_is_changed_and_reaches_the_snapshot(control: Running) -> None:
    made = make_key(control, deadline="30s")

    def told() -> float | None:
        return next(key["deadline"] for key in control.snapshot().json()["keys"] if key["id"] == made["id"])

    assert (made["deadline"], told()) == (30.0, 30.0)
    with_operator = make_key(control, role="operator")["key"]
    with control.client(with_operator) as operator:
        changed = operator.patch(f"/admin/keys/{made['id']}", json={"deadline": "1500ms"})
        assert (changed.status_code, changed.json()["deadline"], told()) == (200, 1.5, 1.5)
        assert changed.json()["gateways"] == {"acknowledged": [], "pending": []}
        assert operator.patch(f"/admin/keys/{made['id']}", json={}).json()["deadline"] == 1.5
        admin = make_key(control, role="admin")["id"]
        assert operator.patch(f"/admin/keys/{admin}", json={"deadline": 1}).status_code == 403
    for wrong in ({"deadline": -1}, {"rpm": 5}):
        assert control.admin.patch(f"/admin/keys/{made['id']}", json=wrong).status_code == 400
    assert control.admin.patch(f"/admin/keys/{made['id']}", json={"deadline": None}).json()["deadline"] is None
    assert told() is None
    rows = [row for row in recorded(control.admin) if row["method"] == "PATCH" and row["status"] == 200]
    first = next(row for row in rows if row["route"] == f"/admin/keys/{made['id']}")
    assert (first["before"]["deadline"], first["after"]["deadline"]) == (30.0, 1.5)
    control.admin.post(f"/admin/keys/{made['id']}/revoke")
    assert control.admin.patch(f"/admin/keys/{made['id']}", json={"deadline": 1}).status_code == 409


def test_the_deadline_of_a_key_on_the_command_line(control: Running) -> None:
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}

    def corral(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["keys", *arguments], env=env)

    made = json.loads(corral("create", "hurried", "--deadline", "30s", "--json").stdout)
    assert made["deadline"] == 30.0
    assert corral("update", made["id"], "--deadline", "2m").stdout == f"changed {made['id']}\n"
    assert "deadline        120.0" in corral("show", made["id"]).stdout
    assert json.loads(corral("update", made["id"], "--deadline", "none", "--json").stdout)["deadline"] is None
    wrong = corral("update", made["id"])
    assert (wrong.exit_code, "name what to change" in wrong.output) == (2, True)
    assert corral("create", "x", "--deadline", "none").exit_code == 2
    assert "30 of what?" in corral("update", made["id"], "--deadline", "30").output


def test_a_key_has_a_deadline_for_requests_that_state_none(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw, ThreadPoolExecutor(8) as callers:
        leader = Leader(gw.valkey.url)
        until(lambda: leader.ask(b"EXISTS", b"corral:1:slots-grant"), "the store grants slots")
        leader.leads()
        hurried = {"Authorization": f"Bearer {gw.new_key(deadline=1.0)}"}
        placed(gw, leader, 1, "node-1")
        held = Held()
        hold(gw, held)
        runs = callers.submit(gw.post)
        until(lambda: held.running == 1, "one runs")
        late = gw.post(headers=hurried)
        assert late.status_code == 503 and "no slot for 'm' within 1 s" in late.json()["error"]
        patient = callers.submit(gw.post, headers=hurried | {"X-Corral-Deadline-Ms": "60000"})
        until(lambda: leader.waiting() == 1, "one that states a deadline waits")
        queued = time.monotonic()
        until(lambda: time.monotonic() - queued > 2.0 or patient.done(), "longer than its key's")
        assert not patient.done()
        held.release(2)
        assert (runs.result().status_code, patient.result().status_code) == (200, 200)
        cut = gw.post(headers=hurried)
        assert cut.status_code == 504 and "longer than 1 s" in cut.json()["error"]
        held.release()
        until(lambda: not leader.used(), "nothing is held")
