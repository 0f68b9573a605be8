"""What of a key is changed later, its limits and its deadline: from the command line to the gateway."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Connection, update
from support.control import Running, make_key, recorded
from support.gateway import gateway
from support.held import Held, hold, leading, placed, waited
from support.process import until

from corral.cli.main import cli
from corral.control import keys
from corral.control.auth import Principal
from corral.store import tables


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path / "state")
    yield made
    made.close()


def command(control: Running, *arguments: str) -> Result:
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}
    return CliRunner().invoke(cli, ["keys", *arguments], env=env)


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
    for wrong in ({"deadline": -1}, {"rpm": 0}, {"weight": 0}, {"models": []}, {"name": "x"}):
        assert control.admin.patch(f"/admin/keys/{made['id']}", json=wrong).status_code == 400
    assert control.admin.patch(f"/admin/keys/{made['id']}", json={"deadline": None}).json()["deadline"] is None
    assert told() is None
    rows = [row for row in recorded(control.admin) if row["method"] == "PATCH" and row["status"] == 200]
    first = next(row for row in rows if row["route"] == f"/admin/keys/{made['id']}")
    assert (first["before"]["deadline"], first["after"]["deadline"]) == (30.0, 1.5)
    control.admin.post(f"/admin/keys/{made['id']}/revoke")
    assert control.admin.patch(f"/admin/keys/{made['id']}", json={"deadline": 1}).status_code == 409


def test_limits_and_models_of_a_key_are_changed_and_never_beyond_those_of_who_does(control: Running) -> None:
    made = make_key(control, rpm=10, models=["llama*"])
    operator = make_key(control, role="operator", rpm=100, weight=2, models=["llama*", "qwen*"])

    def told() -> dict[str, Any]:
        found = next(key for key in control.snapshot().json()["keys"] if key["id"] == made["id"])
        return {name: found[name] for name in ("rpm", "tpm", "weight", "models")}

    wanted = {"rpm": 50, "tpm": 1000, "weight": 1.5, "models": ["qwen2.5:*"]}
    with control.client(operator["key"]) as client:
        changed = client.patch(f"/admin/keys/{made['id']}", json=wanted)
        assert changed.status_code == 200, changed.text
        assert told() == wanted
        for beyond, field in (({"rpm": 101}, "rpm"), ({"models": ["*"]}, "models"), ({"weight": 2.5}, "weight")):
            refused = client.patch(f"/admin/keys/{made['id']}", json=beyond)
            assert (refused.status_code, refused.json()["error"]["message"].split(":")[0]) == (403, field)
        own = client.patch(f"/admin/keys/{operator['id']}", json={"rpm": 1000})
        assert own.status_code == 403, "nobody raises its own limits"
        assert told() == wanted
    assert control.admin.patch(f"/admin/keys/{made['id']}", json={"rpm": 101, "tpm": None}).status_code == 200
    assert told() == wanted | {"rpm": 101, "tpm": None}
    rows = [row for row in recorded(control.admin) if row["method"] == "PATCH" and row["status"] == 200]
    assert {(row["before"]["rpm"], row["after"]["rpm"]) for row in rows} == {(10, 50), (50, 101)}


def test_what_a_key_made_does_no_more_than_it_after_it_was_narrowed(control: Running) -> None:
    operator = make_key(control, role="operator", rpm=100, weight=2, models=["llama*", "qwen*"])
    with control.client(operator["key"]) as client:
        first, other = (
            client.post("/admin/keys", json={"name": name, "rpm": 90, "weight": 2, "models": models}).json()
            for name, models in (("first", ["llama3*", "qwen2*"]), ("other", ["qwen*"]))
        )
        second = client.post("/admin/keys", json={"name": "second", "role": "operator", "rpm": 90, "models": ["*a*"]})
        assert second.status_code == 403
        made = {"name": "second", "role": "operator", "rpm": 90, "models": ["llama*"]}
        second = client.post("/admin/keys", json=made).json()
    with control.client(second["key"]) as client:
        third = client.post("/admin/keys", json={"name": "third", "rpm": 80, "models": ["llama3.2:*"]}).json()
        fourth = client.post("/admin/keys", json={"name": "fourth", "rpm": 60, "models": ["llama*"]}).json()
    beside = make_key(control, rpm=1000)
    assert [key["maker"] for key in (first, second, third)] == [operator["id"], operator["id"], second["id"]]
    control.admin.post(f"/admin/keys/{second['id']}/revoke").raise_for_status()

    changed = control.admin.patch(f"/admin/keys/{operator['id']}", json={"rpm": 70, "models": ["llama*"], "weight": 1})
    assert sorted(changed.json()["narrowed"]) == sorted([first["id"], other["id"], third["id"]])
    told = {key["id"]: (key["rpm"], key["models"], key["weight"]) for key in control.snapshot().json()["keys"]}
    assert told[first["id"]] == (70, ["llama3*"], 1)
    assert told[other["id"]] == (70, [" "], 1), "no model is left that both may use"
    assert told[third["id"]] == (70, ["llama3.2:*"], None), "through the one that was revoked"
    assert (told[fourth["id"]][0], told[beside["id"]][0]) == (60, 1000)
    rows = {row["route"]: row for row in recorded(control.admin) if row["method"] == "PATCH" and row["status"] == 200}
    row = rows[f"/admin/keys/{first['id']}"]
    assert (row["before"]["rpm"], row["after"]["rpm"], row["before"]["models"]) == (90, 70, ["llama3*", "qwen2*"])
    assert f"/admin/keys/{second['id']}" not in rows

    # Whoever gives it more than its maker has is its maker from then on.
    wider = control.admin.patch(f"/admin/keys/{first['id']}", json={"rpm": 500}).json()
    assert (wider["rpm"], wider["maker"], wider["narrowed"]) == (500, changed.json()["maker"], [])
    assert re.search(r"models +none", command(control, "show", other["id"]).stdout)
    narrowed = command(control, "update", operator["id"], "--rpm", "65")
    assert narrowed.stdout.startswith(f"changed {operator['id']}; narrowed with it, as it made them: ")
    assert {first["id"] in narrowed.stdout, other["id"] in narrowed.stdout} == {False, True}


@pytest.mark.parametrize("models", [[" "], []])
def test_a_key_of_which_no_model_is_left_may_use_none(tmp_path: Path, models: list[str]) -> None:
    with gateway(tmp_path) as gw:
        key = {"Authorization": f"Bearer {gw.new_key(models=models)}"}
        assert gw.post(headers=key).status_code == 404


def test_limits_and_models_of_a_key_on_the_command_line(control: Running) -> None:
    made = make_key(control)
    changed = command(control, "update", made["id"], "--rpm", "7", "--models", "a*, b*", "--weight", "3")
    assert changed.stdout == f"changed {made['id']}\n"
    shown = json.loads(command(control, "show", made["id"], "--json").stdout)
    assert (shown["rpm"], shown["limits"]["rpm"], shown["models"], shown["weight"]) == (7, 7, ["a*", "b*"], 3.0)
    assert command(control, "update", made["id"], "--rpm", "none").exit_code == 0
    shown = json.loads(command(control, "show", made["id"], "--json").stdout)
    assert shown["rpm"] is None and shown["limits"]["rpm"] != 7, "the default of corral.yaml"
    for wrong in (("--rpm", "0"), ("--rpm", "many"), ("--deadline", "0s"), ("--models", ","), ("--weight", "0")):
        assert command(control, "update", made["id"], *wrong).exit_code != 0, wrong


def test_a_limit_that_is_changed_holds_at_the_gateway_and_what_was_used_counts(tmp_path: Path) -> None:
    with gateway(tmp_path) as gw:
        key = {"Authorization": f"Bearer {gw.new_key(rpm=1)}"}
        assert gw.post(headers=key).status_code == 200
        # One that misses the store for 50 ms is admitted on the gateway's share.
        until(lambda: gw.post(headers=key).status_code == 429, "its limit is reached")
        gw.control.snapshot["keys"][-1]["rpm"] = 60
        gw.publish()
        until(lambda: gw.post(headers=key).status_code == 200, "a second is over, not a minute", 30)


def test_the_deadline_of_a_key_on_the_command_line(control: Running) -> None:
    def corral(*arguments: str) -> Result:
        return command(control, *arguments)

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
        leader = leading(gw)
        hurried = {"Authorization": f"Bearer {gw.new_key(deadline=1.0)}"}
        placed(gw, leader, 1, "node-1")
        held = Held()
        hold(gw, held)
        runs = callers.submit(gw.post)
        until(lambda: held.running == 1, "one runs")
        asked = time.monotonic()
        late = gw.post(headers=hurried)
        took = time.monotonic() - asked
        assert late.status_code == 503 and 1 <= waited(late.json()["error"]) <= round(took)
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


def test_a_name_is_that_of_the_key_that_lives(control: Running) -> None:
    old, new = make_key(control, name="twice")["id"], make_key(control, name="twice")["id"]
    answer = control.admin.get("/admin/keys/twice")
    assert (answer.status_code, old in answer.text, new in answer.text) == (409, True, True)
    control.admin.post(f"/admin/keys/{old}/revoke").raise_for_status()
    assert control.admin.get("/admin/keys/twice").json()["id"] == new
    control.admin.post(f"/admin/keys/{new}/revoke").raise_for_status()
    assert control.admin.get("/admin/keys/twice").status_code == 409, "none lives: any may be meant"


@pytest.mark.parametrize(
    ("change", "path", "wanted"),
    [
        ("_create", "", {"name": "more"}),
        ("_rotate", "/{}/rotate", {}),
        ("_update", "/{}", {"models": ["a"]}),
        ("_update", "/{}", {"deadline": None}),
        ("_revoke", "/{}/revoke", {}),
    ],
)
def test_a_key_that_is_revoked_before_its_turn_makes_and_changes_none(
    control: Running, monkeypatch: pytest.MonkeyPatch, change: str, path: str, wanted: dict[str, Any]
) -> None:
    """The gate has let it in, and who revokes it writes first."""
    made, operator = make_key(control), make_key(control, role="operator")
    made_by = getattr(keys, change)

    def late(connection: Connection, who: Principal, *rest: Any) -> Any:
        connection.execute(update(tables.keys).where(tables.keys.c.id == who.key_id).values(revoked=time.time()))
        return made_by(connection, who, *rest)

    monkeypatch.setattr(keys, change, late)
    with control.client(operator["key"]) as client:
        ask = client.patch if change == "_update" else client.post
        answer = ask("/admin/keys" + path.format(made["id"]), json=wanted)
    assert (answer.status_code, answer.json()["error"]["message"]) == (401, "the API key was revoked")


def test_a_key_has_two_texts_at_most(control: Running) -> None:
    made = make_key(control, role="operator")
    texts = [made["key"]]
    for overlap in (3600, 60, 3600, 3600):
        how = {"overlap": overlap, "end_oldest": True}
        rotated = control.admin.post(f"/admin/keys/{made['id']}/rotate", json=how).json()
        texts.append(rotated["key"])

    def status(text: str) -> int:
        with control.client(text) as client:
            return client.get("/admin/status").status_code

    assert [status(text) for text in texts] == [401, 401, 401, 200, 200]
    entry = next(key for key in control.snapshot().json()["keys"] if key["id"] == made["id"])
    assert len(entry["verifiers"]) == 2
    assert list(entry["ends"].values()) == [rotated["rotating_until"]], "gateways know when the old one ends"


def test_a_text_that_works_is_not_ended_without_a_word(control: Running) -> None:
    made = make_key(control, role="operator")
    first = json.loads(command(control, "rotate", made["id"], "--overlap", "1h", "--json").stdout)
    texts = [made["key"], first["key"]]

    def working() -> list[bool]:
        answers = []
        for text in texts:
            with control.client(text) as client:
                answers.append(client.get("/admin/status").status_code == 200)
        return answers

    refused = command(control, "rotate", made["id"])
    until_then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(first["rotating_until"]))
    assert refused.exit_code == 1 and refused.stdout == "", "no key is there to take"
    assert f"works until {until_then}" in refused.stderr and "--end-oldest" in refused.stderr
    answer = control.admin.post(f"/admin/keys/{made['id']}/rotate")
    assert (answer.status_code, answer.json()["rotating_until"]) == (409, first["rotating_until"])
    assert working() == [True, True], "nothing was changed"
    refusals = [row["status"] for row in recorded(control.admin) if row["route"] == f"/admin/keys/{made['id']}/rotate"]
    assert refusals == [200, 409, 409]
    meant = command(control, "rotate", made["id"], "--overlap", "1s", "--end-oldest", "--json")
    texts.append(json.loads(meant.stdout)["key"])
    assert working()[::2] == [False, True]
    # What has ended by itself is nobody's to lose.
    until(lambda: working() == [False, False, True], "the overlap is over")
    texts.append(json.loads(command(control, "rotate", made["id"], "--json").stdout)["key"])
    assert working() == [False, False, True, True]
    # Who says that the old text ends at once says it of all: a key that leaked.
    texts.append(json.loads(command(control, "rotate", made["id"], "--overlap", "0s", "--json").stdout)["key"])
    assert working() == [False, False, False, False, True]
