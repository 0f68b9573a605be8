"""A pepper that is lost: what control's start refuses, makes anew and revokes, and what of it is in the audit trail."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy import text as sql
from sqlalchemy.exc import IntegrityError
from support.control import Running

from corral.config.settings import Settings
from corral.control.bootstrap import BootstrapError, bootstrap
from corral.store.database import Database, resolve
from corral.store.tables import keys


def test_a_lost_pepper_stops_the_start_where_keys_depend_on_it(tmp_path: Path) -> None:
    settings = Settings.model_validate({"control": {"state": tmp_path}})
    bootstrap(tmp_path, settings)
    pepper = (tmp_path / "pepper").read_bytes()
    (tmp_path / "pepper").unlink()
    with pytest.raises(BootstrapError, match=r"pepper.*restore.*--new-pepper"):
        bootstrap(tmp_path, settings)
    assert not (tmp_path / "pepper").exists()
    (tmp_path / "pepper").write_bytes(pepper)
    bootstrap(tmp_path, settings)


def test_a_lost_admin_key_is_made_anew_and_those_that_still_work_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings.model_validate({"control": {"state": tmp_path}})
    bootstrap(tmp_path, settings)
    old = (tmp_path / "admin.key").read_text().split("_")[1]
    bootstrap(tmp_path, settings)
    assert caplog.messages == []
    (tmp_path / "admin.key").unlink()
    bootstrap(tmp_path, settings)
    (said,) = caplog.messages
    new = (tmp_path / "admin.key").read_text().split("_")[1]
    assert f"has a new admin key, {new}." in said and said.endswith(f"revoke what nobody has: {old}")


def test_a_new_pepper_revokes_every_key_and_makes_an_admin_key_that_works(tmp_path: Path, database_url: str) -> None:
    store = {"database": database_url}
    settings = Settings.model_validate({"control": {"state": tmp_path}, "store": store})
    bootstrap(tmp_path, settings)
    old = (tmp_path / "admin.key").read_text()
    (tmp_path / "pepper").unlink()
    bootstrap(tmp_path, settings, new_pepper=True)
    new = (tmp_path / "admin.key").read_text()
    assert new != old
    bootstrap(tmp_path, settings, new_pepper=True)
    assert stat.S_IMODE((tmp_path / "pepper").stat().st_mode) == 0o600
    control = Running(tmp_path, store=store)
    try:
        listed = control.admin.get("/admin/keys").json()["keys"]
        assert sorted(key["revoked"] for key in listed) == [False, True]
        rows = control.admin.get("/admin/audit").json()["audit"]
    finally:
        control.close()
    ran = [row for row in rows if row["method"] == "RUN"]
    told = [(row["route"], row["after"].get("id"), row["after"].get("revoked")) for row in ran]
    (was, now) = (text.split("_")[1] for text in (old, new))
    assert told == [
        ("corral serve control", was, None),
        ("corral serve control --new-pepper", None, [was]),
        ("corral serve control", now, None),
    ], "each once"
    assert all("@" in row["after"]["by"] for row in ran)
    assert [(row["gw"], row["pos"]) for row in ran] == [("control", 1), ("control", 2), ("control", 3)], "sealed"


@pytest.mark.parametrize("what", ["--new-pepper", "corral serve control"])
def test_no_key_is_revoked_or_made_at_the_start_that_is_not_on_record(tmp_path: Path, what: str) -> None:
    settings = Settings.model_validate({"control": {"state": tmp_path}})
    bootstrap(tmp_path, settings)
    (tmp_path / "pepper").unlink()
    database = Database(resolve(settings.store.database, tmp_path))
    database.write_now(lambda c: c.execute(sql(
        "CREATE TRIGGER refuse BEFORE INSERT ON audit "
        f"WHEN NEW.route LIKE '%{what}' BEGIN SELECT RAISE(ABORT, 'no record'); END"
    )))  # fmt: skip
    with pytest.raises(IntegrityError, match="no record"):
        bootstrap(tmp_path, settings, new_pepper=True)
    (row,) = database.read_now(lambda c: c.execute(select(keys.c.revoked)).all())
    assert (row.revoked is None) == (what == "--new-pepper")
    database.write_now(lambda c: c.execute(sql("DROP TRIGGER refuse")))
    database.close()
    bootstrap(tmp_path, settings, new_pepper=True)
    control = Running(tmp_path)
    try:
        assert len(control.admin.get("/admin/keys").json()["keys"]) == 2
    finally:
        control.close()


def test_a_pepper_that_no_key_depends_on_is_made_anew(tmp_path: Path) -> None:
    settings = Settings.model_validate({"control": {"state": tmp_path}})
    bootstrap(tmp_path, settings)
    database = Database(resolve(settings.store.database, tmp_path))
    database.write_now(lambda connection: connection.execute(keys.update().values(revoked=1.0)))
    database.close()
    for name in ("pepper", "admin.key"):
        (tmp_path / name).unlink()
    bootstrap(tmp_path, settings)
    assert (tmp_path / "pepper").exists()
