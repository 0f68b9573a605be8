"""Two controls on one PostgreSQL sign one chain, if they have the same key; the one that has another signs nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.control import FakeNode, Running, make_key, until
from support.postgres import postgres

from corral.cli.main import cli
from corral.config.values import database_url
from corral.stack import doctor

SHARED = ("pepper", "internal.token", "audit.key", "admin.key")


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with postgres() as made:
        yield made


def started(server: Any, folder: Path, node: FakeNode, url: str, **audit: str) -> Running:
    return Running(folder, nodes=[{"url": node.url}], store={"database": url}, audit={"checkpoint": "100ms", **audit})


def copy(first: Running, folder: Path, names: tuple[str, ...]) -> None:
    folder.mkdir()
    for name in names:
        shutil.copy(first.state / name, folder / name)


def verify(control: Running, *keys: str) -> Result:
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}
    given = [part for key in keys for part in ("--public-key", key)]
    return CliRunner().invoke(cli, ["audit", "verify", *given], env=env)


def told(control: Running) -> dict[str, Any]:
    return dict(control.admin.get("/admin/status").json()["audit"])


def public_key(control: Running) -> str:
    return str(control.admin.get("/admin/audit/chain").json()["public_key"])


def test_with_the_same_key_they_sign_one_chain(tmp_path: Path, server: Any, node: FakeNode) -> None:
    url = database_url(server.database())
    one = started(server, tmp_path / "a", node, url)
    copy(one, tmp_path / "b", SHARED)
    two = started(server, tmp_path / "b", node, url)
    try:
        for _ in range(3):
            for control in (one, two):
                before = told(control)["checkpoint"]
                make_key(control)
                until("a checkpoint comes", lambda control=control, before=before: told(control)["checkpoint"] > before)
        for control in (one, two):
            assert told(control)["stranger"] is None
            done = verify(control)
            assert done.exit_code == 0, done.output
    finally:
        two.close()
        one.close()


def test_one_with_another_key_signs_nothing_until_that_is_stated(
    tmp_path: Path, server: Any, node: FakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    url = database_url(server.database())
    one = started(server, tmp_path / "a", node, url)
    try:
        make_key(one)
        until("the first signs", lambda: told(one)["checkpoint"] > 0)
        copy(one, tmp_path / "b", tuple(name for name in SHARED if name != "audit.key"))
        two = started(server, tmp_path / "b", node, url)
        try:
            stranger = until("the other does not", lambda: told(two)["stranger"])
            for _ in range(3):
                before = told(two)["checkpoint"]
                make_key(two)
                until("the first signs what it enters", lambda before=before: told(two)["checkpoint"] > before)
            assert (told(two)["stranger"], told(one)["stranger"]) == (stranger, None)
            assert "is signed by another key" in caplog.text and f"audit.follows: {stranger}" in caplog.text
            found = [one for one in doctor._parts(lambda path: two.admin.get(f"/admin{path}").json())]
            assert [one.level for one in found if one.check == "audit"] == ["problem"]
            done = verify(one)
            assert done.exit_code == 0, done.output
            keys = public_key(one), public_key(two)
        finally:
            two.close()
    finally:
        one.close()
    two = started(server, tmp_path / "b", node, url, follows=stranger)
    try:
        before = told(two)["checkpoint"]
        make_key(two)
        until("it goes on", lambda: told(two)["checkpoint"] > before)
        assert told(two)["stranger"] is None
        done = verify(two, *keys)
        assert done.exit_code == 0, done.output
        assert "signed by another key" in verify(two).output
    finally:
        two.close()
