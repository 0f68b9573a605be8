"""`corral audit verify` and `export`, `corral usage report`: against a control, over its API."""

from __future__ import annotations

import asyncio
import csv
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Connection, Engine, event, insert, update
from support.control import FakeNode, Running, make_key, recorded, until
from support.sealed import Records, begin_before_the_chain, move
from support.servers import python_env
from support.tampers import TAMPERS, note

from corral.cli.common import Admin
from corral.cli.main import cli
from corral.config.record import AuditSettings
from corral.control.ledger import Ledger
from corral.store import verify as verifying
from corral.store.content import Hashes
from corral.store.database import Database, resolve
from corral.store.keys import read_pepper
from corral.store.spool import encode_frame
from corral.store.tables import audit, audit_checkpoints


class Webhook:
    """Takes checkpoints, once it is told to."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.broken = True
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                broken = hook.broken
                if not broken:
                    hook.taken.append(json.loads(body))
                self.send_response(503 if broken else 204)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/checkpoints"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.close()


@pytest.fixture
def control(tmp_path: Path, node: FakeNode, database_url: str, hook: Webhook) -> Iterator[Running]:
    made = Running(
        tmp_path / "state",
        nodes=[{"url": node.url}],
        store={"database": database_url},
        audit={"checkpoint": "200ms", "webhook": hook.url},
        usage={"currency": "EUR", "prices": {"m:*": {"prompt": 1.0, "generated": 4.0}}},
    )
    yield made
    made.close()


def run(control: Running, *arguments: str, key: str = "") -> Result:
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": key or (control.state / "admin.key").read_text().strip()}
    return CliRunner().invoke(cli, list(arguments), env=env)


def ship(control: Running, key: str, count: int, first: int = 0, offset: int = 0) -> int:
    """Records r`first` and on; where the next ones begin."""
    record = {"t": "settle", "request_id": "s", "ts": time.time(), "key": key, "api": "openai", "addr": "192.0.2.7"}
    what = {"route": "/v1/chat/completions", "method": "POST", "model": "m:latest", "status": 200, "outcome": "ok"}
    counted = {"node": "node-1", "attempts": 1, "prompt_tokens": 10, "tokens": 5, "queue_ms": 0.0, "ms": 1000.0}
    frames = b"".join(
        encode_frame({**record, **what, **counted, "id": f"r{number}"}) for number in range(first, first + count)
    )
    path = "/internal/spool/gateway-1/0000000000000001.seg"
    assert control.internal.post(path, params={"offset": offset}, content=frames).status_code == 200
    return offset + len(frames)


def signed(control: Running) -> None:
    def all_of_it() -> bool:
        streams = control.admin.get("/admin/audit/chain").json()["streams"].values()
        return bool(streams) and all(one["signed"] == one["pos"] for one in streams)

    until("all is signed", all_of_it)


def test_verify_says_whole_and_names_what_is_not(control: Running, hook: Webhook, tmp_path: Path) -> None:
    key = make_key(control)["id"]
    ship(control, key, 7)
    signed(control)
    public = control.admin.get("/admin/audit/chain").json()["public_key"]
    done = run(control, "audit", "verify", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["ok"], told["problems"], told["public_keys"]) == (True, [], [public])
    assert told["records"] >= 8 and told["streams"] == 2
    assert "verified 100%" in done.stderr
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(control.admin.get("/admin/audit/checkpoints").content)
    own = ("--checkpoints", str(copy), "--public-key", public)
    assert run(control, "audit", "verify", *own).exit_code == 0
    wrong = run(control, "audit", "verify", "--public-key", "00" * 32)
    assert (wrong.exit_code, "PROBLEM: checkpoint 1 is signed by another key" in wrong.stdout) == (1, True)
    assert run(control, "audit", "verify", "--public-key", "abc").exit_code == 1
    database = Database(resolve(control.settings.store.database, control.state))
    database.write_now(lambda c: c.execute(update(audit).where(audit.c.id == "r3").values(tokens=1)))
    database.close()
    changed = run(control, "audit", "verify", *own)
    assert (changed.exit_code, "PROBLEM: gateway-1: record 4 (r3) was changed" in changed.stdout) == (1, True)
    assert hook.taken == []
    hook.broken = False
    until("the webhook gets what waited for it", lambda: hook.taken)
    assert [one["checkpoint"]["number"] for one in hook.taken][:1] == [1]
    assert json.loads(copy.read_text().splitlines()[0]) == hook.taken[0]


def test_the_tamper_table_by_the_command(control: Running, tmp_path: Path) -> None:
    key = make_key(control)["id"]
    first = offset = 0
    for count in (5, 5, 5, 3):
        offset = ship(control, key, count, first, offset)
        first += count
        signed(control)
    copy, public = tmp_path / "copy.jsonl", control.admin.get("/admin/audit/chain").json()["public_key"]
    copy.write_bytes(control.admin.get("/admin/audit/checkpoints").content)
    argv = [sys.executable, "-P", "-m", "corral", "audit", "verify", "--json"]
    argv += ["--checkpoints", str(copy), "--public-key", public]
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}

    def verified() -> tuple[int, list[str]]:
        done = subprocess.run(argv, env=os.environ | python_env() | env, capture_output=True, text=True, timeout=240)
        return done.returncode, json.loads(done.stdout)["problems"]

    records = Records(Database(resolve(control.settings.store.database, control.state)))
    try:
        put_back = records.keep()
        for tamper, (do, words) in TAMPERS.items():
            do(records)
            status, problems = verified()
            found = [one for one in problems if words in one]
            assert (status, len(found)) == (1, 1), (tamper, problems)
            note("corral audit verify", records.database.dialect, tamper, found[0])
            put_back()
            assert verified() == (0, []), tamper
    finally:
        records.database.close()


def test_records_older_than_the_chain_by_the_command(tmp_path: Path, node: FakeNode, database_url: str) -> None:
    (tmp_path / "state").mkdir()
    records = Records(Database(resolve(database_url, tmp_path / "state")))
    records.write(begin_before_the_chain)
    audited = {"checkpoint": "200ms", "retention": "36500d"}
    made = Running(tmp_path / "state", nodes=[{"url": node.url}], store={"database": database_url}, audit=audited)
    try:
        signed(made)
        whole = run(made, "audit", "verify")
        assert whole.exit_code == 0, whole.output
        assert "note: 6 records are older than the chain: covered as they were at checkpoint 1" in whole.stdout

        def told(words: str) -> bool:
            done = run(made, "audit", "verify")
            return done.exit_code == 1 and f"PROBLEM: {words}" in done.stdout

        records.write(lambda c: c.execute(update(audit).where(audit.c.id == "old2").values(tokens=7)))
        assert told("of 6 records older than the chain some were changed")
        row = {"seq": -1, "id": "forged", "ts": 2.0, "outcome": "ok"}
        records.write(lambda c: c.execute(insert(audit).values(row)))
        assert told("1 records stand beside the chain: they were inserted")
        move(records, 10**9)
        assert told("records up to 1000000000 (6) pass for older than the chain, up to 7 (6) were signed")
    finally:
        made.close()
        records.database.close()


def test_what_is_signed_while_verify_reads_is_not_missing(
    control: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = make_key(control)["id"]
    ship(control, key, 7)
    signed(control)
    data = control.admin.get("/admin/audit/checkpoints").content
    raw = Admin.raw

    def signs_meanwhile(admin: Admin, path: str) -> bytes:
        found = raw(admin, path)
        if path.startswith("/audit/checkpoints?"):
            monkeypatch.setattr(Admin, "raw", raw)
            make_key(control)
            signed(control)
        return found

    monkeypatch.setattr(Admin, "raw", signs_meanwhile)
    checked = run(control, "audit", "verify")
    assert checked.exit_code == 0, checked.output
    older = tmp_path / "older.jsonl"
    older.write_bytes(data)
    checked = run(control, "audit", "verify", "--checkpoints", str(older))
    assert (checked.exit_code, f"newer than {older} and control's own" in checked.output) == (0, True), checked.output
    older.write_bytes(data.replace(b"gateway-1", b"gateway-2"))
    assert run(control, "audit", "verify", "--checkpoints", str(older)).exit_code == 1, "no copy of this one"


@pytest.mark.parametrize("dropped", [(), (12,)], ids=["whole", "dropped record"])
def test_what_retention_removes_between_two_pages_is_not_missing(
    control: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dropped: tuple[int, ...]
) -> None:
    key = make_key(control)["id"]
    offset, numbers = 0, []
    for first in (0, 5, 10):
        offset = ship(control, key, 5, first, offset)
        signed(control)
        numbers.append(control.admin.get("/admin/audit/chain").json()["checkpoint"])
    records = Records(Database(resolve(control.settings.store.database, control.state)))
    aged = update(audit_checkpoints).where(audit_checkpoints.c.number <= numbers[1]).values(ts=5.0)
    # Another control of this database: what it signs is in the first one's file a round later.
    (tmp_path / "audit.key").write_bytes((control.state / "audit.key").read_bytes())
    other = Ledger(records.database, AuditSettings(retention="1h"), tmp_path, 60.0)
    raw, ran = Admin.raw, []

    def removes_meanwhile(admin: Admin, path: str) -> bytes:
        if path.startswith("/audit/records?stream=gateway-1&after=4&") and not ran:
            ran.append(path)
            records.write(lambda connection: connection.execute(aged))
            asyncio.run(other.forget())
            for place in dropped:
                records.drop(place, place)
        return raw(admin, path)

    monkeypatch.setattr(verifying, "PAGE", 4)
    monkeypatch.setattr(Admin, "raw", removes_meanwhile)
    checked = run(control, "audit", "verify", "--json")
    records.database.close()
    told = json.loads(checked.stdout)
    assert told["problems"] == [f"gateway-1: record {place} is missing" for place in dropped]
    assert "gateway-1: records up to 10 were removed by retention meanwhile" in told["notes"]
    assert (checked.exit_code, len(ran)) == (len(dropped), 1)


def test_a_key_is_named_by_its_id_or_its_name(control: Running) -> None:
    first, second = (make_key(control, name="support")["id"] for _ in range(2))
    other = make_key(control, name="other")["id"]
    ship(control, first, 2)
    for words in (["audit", "list"], ["usage", "report"], ["audit", "export"]):
        whole = run(control, *words, "--key", "support")
        assert whole.exit_code == 0 and first in whole.stdout, whole.output
        assert run(control, *words, "--key", first).stdout == whole.stdout
        assert first not in run(control, *words, "--key", other).stdout
        assert first not in run(control, *words, "--key", second).stdout
        unknown = run(control, *words, "--key", "suport")
        assert unknown.exit_code == 1
        assert "key: there is no key 'suport': `corral keys list` shows ids and names" in unknown.stderr
    stranger = make_key(control, tenant="others", role="operator")["key"]
    hidden = run(control, "audit", "list", "--key", "support", key=stranger)
    assert (hidden.exit_code, "there is no key" in hidden.stderr) == (1, True)


def test_usage_is_reported_in_three_forms_and_by_tenant(control: Running) -> None:
    key = make_key(control, tenant="team")["id"]
    ship(control, key, 3)
    told = json.loads(run(control, "usage", "report", "--json").stdout)
    (row,) = [row for row in told["usage"] if row["key"] == key]
    assert (row["requests"], row["prompt_tokens"], row["tokens"], row["node_seconds"]) == (3, 30, 15, 3.0)
    assert (row["cost"], told["currency"]) == (pytest.approx((30 * 1.0 + 15 * 4.0) / 1e6), "EUR")
    named = run(control, "usage", "report", "--key", key).stdout.splitlines()
    assert (named[0].split()[:3], named[1].split()[:2]) == (["KEY", "KEY", "NAME"], [key, "k"])
    table = run(control, "usage", "report", "--by", "day,tenant").stdout
    assert table.splitlines()[0].split()[:3] == ["DAY", "TENANT", "REQUESTS"] and " EUR" in table
    (first,) = csv.DictReader(run(control, "usage", "report", "--csv", "--key", key).stdout.splitlines())
    assert (first["model"], first["requests"]) == ("m:latest", "3")
    assert run(control, "usage", "report", "--by", "node").exit_code == 1
    mine = make_key(control, tenant="team", role="operator")["key"]
    other = make_key(control, tenant="others", role="operator")["key"]
    assert len(json.loads(run(control, "usage", "report", "--json", key=mine).stdout)["usage"]) == 1
    assert json.loads(run(control, "usage", "report", "--json", key=other).stdout)["usage"] == []
    assert run(control, "usage", "report", "--tenant", "team", key=other).exit_code == 1


def test_no_writer_waits_while_records_are_looked_for(control: Running) -> None:
    writes: list[bool] = []

    def asked(connection: Connection, cursor: object, statement: str, *rest: object) -> None:
        if statement.startswith("SELECT") and "prompt_hash" in statement:
            writes.append(connection.get_execution_options().get("corral_write", False))

    event.listen(Engine, "before_cursor_execute", asked)
    try:
        body = {"request": "nobody", "prompt": ["0" * 64]}
        assert control.admin.post("/admin/audit/compare", json=body).status_code == 404
    finally:
        event.remove(Engine, "before_cursor_execute", asked)
    assert writes == [False]


def test_compare_tells_whether_a_text_was_it_and_leaves_the_text_at_home(control: Running, tmp_path: Path) -> None:
    hashes = Hashes(read_pepper(control.state / "pepper"))
    key = make_key(control, tenant="team")["id"]
    body, said = b'{"model": "m", "prompt": "Guten Tag!"}', "ja\nbitte"
    common = {"request_id": "req-1", "ts": time.time(), "key": key, "api": "native", "route": "/api/generate"}
    admit = {"t": "admit", **common, "prompt_hash": hashes.prompt.of(sha256(body).digest())}
    settle = {"t": "settle", **common, "outcome": "ok", "answer_hash": hashes.answer.of(sha256(said.encode()).digest())}
    together = [{**admit, "id": "r1"}, {**settle, "id": "r1"}, {**admit, "id": "r2"}]
    later = [{**settle, "id": "r2"}, {**settle, "id": "r3", "answer_hash": None}]
    offset = 0
    for records in (together, later):
        frames = b"".join(encode_frame(one) for one in records)
        path = "/internal/spool/gateway-1/0000000000000001.seg"
        assert control.internal.post(path, params={"offset": offset}, content=frames).status_code == 200
        offset += len(frames)
    prompt, answer, other = (tmp_path / name for name in ("prompt", "answer", "other"))
    prompt.write_bytes(body)
    answer.write_text(said + "\n")  # as an editor leaves it
    other.write_text("nein")
    both = ("--prompt", str(prompt), "--answer", str(answer))
    told = json.loads(run(control, "audit", "compare", "req-1", *both, "--json").stdout)
    assert sorted(told["same"]) == ["r1", "r2"], "whether both records came at once or not"
    found = {one["id"]: (one["prompt"], one["answer"]) for one in told["records"]}
    assert found == {"r1": (True, True), "r2": (True, True), "r3": (None, None)}
    shown = run(control, "audit", "compare", "r1", "--prompt", str(prompt), "--answer", str(other))
    assert (shown.exit_code, shown.stdout.strip()) == (1, "r1: prompt is the same, answer is another")
    assert run(control, "audit", "compare", "req-1").exit_code == 2
    nothing = run(control, "audit", "compare", "req-2", "--prompt", str(prompt))
    assert (nothing.exit_code, "no record of a request 'req-2'" in nothing.stderr) == (1, True)
    others = make_key(control, tenant="others", role="operator")["key"]
    assert "no record" in run(control, "audit", "compare", "req-1", *both, key=others).stderr
    mine = make_key(control, tenant="team", role="operator")["key"]
    assert run(control, "audit", "compare", "req-1", *both, key=mine).exit_code == 0
    asked = [
        row for row in recorded(control.admin) if row["route"] == "/admin/audit/compare" and row["outcome"] == "ok"
    ]
    assert {"id": "r1", "prompt": True, "answer": True} in asked[0]["after"]["records"]
    assert "Guten Tag" not in json.dumps(asked) and sha256(body).hexdigest() not in json.dumps(asked)
    assert len(asked) == 3
    signed(control)
    checked = run(control, "audit", "verify")
    assert checked.exit_code == 0, checked.output
    database = Database(resolve(control.settings.store.database, control.state))
    database.write_now(lambda c: c.execute(update(audit).where(audit.c.id == "r1").values(prompt_hash="0" * 64)))
    database.close()
    assert "(r1) was changed" in run(control, "audit", "verify").stdout


def test_export_has_every_record_in_each_form(control: Running, tmp_path: Path) -> None:
    key = make_key(control, name="=cmd|' /C calc'!A0")["id"]
    ship(control, key, 1500)
    database = Database(resolve(control.settings.store.database, control.state))
    database.write_now(lambda c: c.execute(update(audit).where(audit.c.id == "r1").values(seq=-7)))
    database.close()
    lines = run(control, "audit", "export").stdout.splitlines()
    records = [json.loads(line) for line in lines]
    assert len([one for one in records if one["gw"] == "gateway-1"]) == 1500, "whatever somebody made of its number"
    assert len({one["seq"] for one in records}) == len(records)
    (made,) = [one for one in records if one["api"] == "admin" and one["method"] == "POST"]
    table = list(csv.DictReader(run(control, "audit", "export", "--format", "csv", "--key", key).stdout.splitlines()))
    assert (len(table), table[0]["model"], table[0]["tokens"]) == (1500, "m:latest", "5")
    cef = run(control, "audit", "export", "--format", "cef").stdout.splitlines()
    assert len(cef) >= 1501 and all(line.startswith("CEF:0|Corral|Corral|") for line in cef)
    (line,) = [line for line in cef if f"externalId={made['request_id']} " in line]
    assert "|admin|POST /admin/keys" in line and "cs4Label=after" in line
    of_requests = [line for line in cef if "src=192.0.2.7" in line]
    assert len(of_requests) == 1500 and all("cn2Label=tokens cn2=5" in line for line in of_requests)
    file = tmp_path / "events.jsonl"
    nowhere = run(control, "audit", "export", "--output", str(file / "x"))
    assert (nowhere.exit_code, "--output: " in nowhere.stderr, "Traceback" in nowhere.stderr) == (1, True, False)
    done = run(control, "audit", "export", "--format", "ocsf", "--output", str(file), "--json")
    assert json.loads(done.stdout)["lines"] == len(file.read_text().splitlines())
    events = [json.loads(line) for line in file.read_text().splitlines()]
    event = next(one for one in events if "tokens" in one["unmapped"])
    assert (event["class_uid"], event["type_uid"], event["activity_id"]) == (6003, 600301, 1)
    assert (event["actor"]["user"]["uid"], event["unmapped"]["tokens"]) == (key, 5)
