"""Defaults of limits that are raised between two starts: no key gets more than the key that made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select

from corral.config.settings import Settings
from corral.control.bootstrap import CONTROL, bootstrap
from corral.store.database import Database, resolve
from corral.store.tables import audit, keys


def enter(connection: Connection, key_id: str, maker: str | None, **more: Any) -> None:
    row = {"id": key_id, "name": key_id, "tenant": "default", "role": "inference", "models": ["*"], "created": 1.0}
    connection.execute(insert(keys).values(row | {"class": "interactive", "maker": maker} | more))


def test_no_key_gets_more_than_its_maker_where_the_defaults_are_raised(tmp_path: Path, database_url: str) -> None:
    def start(rpm: int | None) -> dict[str, int | None]:
        limits = {"default": {"rpm": rpm}}
        told = {"control": {"state": tmp_path}, "store": {"database": database_url}, "limits": limits}
        bootstrap(tmp_path, Settings.model_validate(told))
        return {row.id: row.rpm for row in database.read_now(lambda one: one.execute(select(keys)).all())}

    def recorded() -> dict[str, tuple[Any, Any]]:
        rows = database.read_now(lambda one: one.execute(select(audit).order_by(audit.c.ts)).all())
        changes = [(row.before, row.after) for row in rows if row.before and row.route == CONTROL]
        return {before["key"]: (before["rpm"], after["rpm"]) for before, after in changes}

    database = Database(resolve(database_url, tmp_path))
    try:
        (admin,) = start(60)

        def make(one: Connection) -> None:
            enter(one, "operator", admin, role="operator", rpm=60)
            enter(one, "a-third", "child")
            enter(one, "child", "operator", role="operator")
            enter(one, "less", "operator", rpm=50)
            enter(one, "revoked", "operator", revoked=2.0)
            enter(one, "over", "of-nobody", rpm=1000)
            enter(one, "ended", "operator", role="operator", rpm=10, revoked=2.0)
            enter(one, "left", "ended")
            enter(one, "of-admin", admin)
            enter(one, "of-nobody", None)

        database.write_now(make)
        before = start(60)
        assert (before["child"], before["less"], recorded()) == (None, 50, {}), "none has more"
        assert (before["over"], before["left"]) == (1000, None), "given by somebody; made by one that was revoked"
        after = start(600)
        assert after == before | {"child": 60, "a-third": 60, "revoked": 60}
        assert recorded() == {"child": (None, 60), "a-third": (None, 60)}
        assert start(600) == start(60) == start(None) == after, "what they got is theirs"
        assert len(recorded()) == 2
    finally:
        database.close()
