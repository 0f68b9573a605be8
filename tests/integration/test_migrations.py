"""The schema of earlier versions, with rows in each of its tables, brought to this one: nothing that was there is lost,
and a control goes on with it."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Column, Connection, MetaData, insert, select
from support.control import Running
from support.process import free_port
from support.servers import python_env

from corral.cli.main import cli
from corral.store.chain import FIELDS, ZERO, Merkle, Signer, Span, content, leaf_of, link_after
from corral.store.database import Database, resolve, revisions, upgrade

FIRST = "0013"
"""Each version from this one on is brought to the last one, and so always the one before it."""

Rows = dict[str, list[dict[str, Any]]]


def begins(rows: Rows) -> None:
    rows["spool_begins"] = [{**row, "life": 0} for row in rows.pop("spool_begun")]


MOVES: dict[str, Callable[[Rows], None]] = {"0014": begins}
"""What a version's migration makes of rows that it does not leave as they are. What it adds is not compared."""

MEANT = {
    "role": "inference",
    "class": "interactive",
    "models": ["*"],
    "networks": ["10.0.0.0/8"],
    "url": "http://127.0.0.1:1",
    "source": "admin",
    "accelerator": "gpu",
    "day": "2026-01-02",
}
"""What stands in a column whose text or list has to mean something to a control that reads it."""


def value(column: Column[Any], number: int) -> Any:
    """What stands in a column of a table's row of this number."""
    for key in column.foreign_keys:
        return value(key.column, number)
    if column.name in MEANT:
        return MEANT[column.name]
    kind = column.type.python_type
    if kind is str:
        return f"{number}-{column.name}"[: getattr(column.type, "length", None)]
    plain = {bool: number == 1, int: number, float: number + 0.5, bytes: f"{number}-{column.name}".encode()}
    return plain.get(kind, {"number": number})


def seal(rows: Rows, signer: Signer) -> None:
    """Make the two records a chain with two checkpoints, which name their texts: `verify` finds nothing wrong."""
    link, previous = ZERO, ZERO.hex()
    for pos, (row, text) in enumerate(zip(rows["audit"], rows["audit_content"], strict=True), 1):
        row |= {"gw": "gateway-1", "pos": pos, "outcome": "ok", "content_hash": sha256(text["data"]).hexdigest()}
        row["leaf"] = leaf_of(content(dict.fromkeys(FIELDS) | row))
        link = link_after(link, row["leaf"])
        span = Span("gateway-1", pos, pos, link.hex(), Merkle([row["leaf"]]).root().hex(), 0)
        signed = signer.sign(pos, pos + 0.5, previous, [span])
        previous = signed.digest()
        rows["audit_checkpoints"][pos - 1] |= {"number": pos, "line": signed.line().decode()}
    ends = {"gateway-1": (2, link), "gateway-2": (0, ZERO)}
    for row, (stream, (pos, link)) in zip(rows["audit_streams"], ends.items(), strict=True):
        row |= {"stream": stream, "pos": pos, "link": link, "signed": pos, "signed_link": link, "dropped": 0}


def tables(connection: Connection) -> MetaData:
    """The tables as they are there, whatever this version's source says of them."""
    found = MetaData()
    found.reflect(connection)
    found.remove(found.tables["alembic_version"])
    return found


def fill(connection: Connection, version: str, signer: Signer) -> Rows:
    """Make the schema of a version, and two rows in each table: of all there may be, and of what there has to be."""
    upgrade(connection, version)
    known = tables(connection)
    rows: Rows = {}
    for table in known.sorted_tables:
        given = [column for column in table.columns if column.server_default is None]
        least = [column for column in given if not column.nullable]
        rows[table.name] = [{one.name: value(one, 1) for one in given}, {one.name: value(one, 2) for one in least}]
    seal(rows, signer)
    for table in known.sorted_tables:
        for row in rows[table.name]:
            connection.execute(insert(table).values(row))
    return everything(connection)


def everything(connection: Connection) -> Rows:
    return {
        table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
        for table in tables(connection).sorted_tables
    }


@pytest.mark.parametrize("version", [one for one in revisions()[:-1] if one >= FIRST])
def test_no_row_of_an_earlier_version_is_lost(tmp_path: Path, database_url: str, version: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "pepper").write_text(secrets.token_hex(32))
    (state / "audit.key").write_text(secrets.token_hex(32))
    database = Database(resolve(database_url, state))
    try:
        kept = database.write_now(fill, version, Signer((state / "audit.key").read_text()))
        assert {len(rows) for rows in kept.values()} == {2}
        database.migrate()
        found = database.read_now(everything)
    finally:
        database.close()
    for newer in revisions():
        if newer > version and newer in MOVES:
            MOVES[newer](kept)
    for table, rows in kept.items():
        here = [{name: row.get(name) for name in rows[0]} for row in found[table]]
        assert sorted(here, key=str) == sorted(rows, key=str), table
    goes_on(state, database_url)


def goes_on(state: Path, database_url: str) -> None:
    """A control starts with what there is, shows it, enters what is done now, and `verify` finds nothing wrong."""
    control = Running(state, store={"database": database_url}, audit={"checkpoint": "200ms"})
    try:
        assert {"1-id", "2-id"} <= {key["id"] for key in control.admin.get("/admin/keys").json()["keys"]}
        assert control.admin.post("/admin/keys", json={"name": "new"}).status_code == 201
        listed = control.admin.get("/admin/audit").json()["audit"]
        assert {"1-id", "2-id"} < {row["id"] for row in listed}
        assert "POST" in {row["method"] for row in listed}
        env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (state / "admin.key").read_text().strip()}
        verified = CliRunner().invoke(cli, ["audit", "verify", "--json"], env=env)
        told = json.loads(verified.stdout)
        assert (verified.exit_code, told["problems"]) == (0, [])
        assert told["checkpoints"] >= 2
    finally:
        control.close()


def test_control_does_not_start_on_a_newer_database_and_says_both_versions(tmp_path: Path, database_url: str) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    database = Database(resolve(database_url, state))
    try:
        database.migrate()
        newer = "UPDATE alembic_version SET version_num = '9999'"
        database.write_now(lambda connection: connection.exec_driver_sql(newer))
        settings = f"store: {{database: '{database_url}', valkey: 'redis://127.0.0.1:1/0'}}\n"
        (tmp_path / "corral.yaml").write_text(settings)
        argv = [sys.executable, "-P", "-m", "corral", "serve", "control", "--config", str(tmp_path / "corral.yaml")]
        argv += ["--state", str(state), "--listen", f"127.0.0.1:{free_port()}"]
        done = subprocess.run(argv, env=python_env(), cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("corral: the database ")
        assert f"has schema version 9999; this Corral knows versions up to {revisions()[-1]}" in line
        assert database.version() == "9999"
        assert database.read_now(everything)["keys"] == [], "it has entered no key of its own"
    finally:
        database.close()
