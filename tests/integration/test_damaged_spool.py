"""Segments that cannot be read whole: nothing behind the damage is lost, and they are named wherever one looks."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner
from msgspec.json import encode
from support.control import FakeNode, Running
from support.metrics import page
from support.process import Process, free_port, until
from support.servers import python_env

from corral.cli.main import cli
from corral.config.settings import Settings
from corral.gateway.server import ASIDE_TOLD
from corral.gateway.shipper import Shipper
from corral.store.spool import SpoolWriter, encode_frame, framed, segments


@pytest.fixture
def control(tmp_path: Path, node: FakeNode) -> Iterator[Running]:
    made = Running(tmp_path / "state", nodes=[{"url": node.url}])
    yield made
    made.close()


def settled(number: int) -> dict[str, Any]:
    known = {"t": "settle", "id": f"e{number}", "ts": 1795000000.5, "api": "native", "model": "m:latest"}
    return known | {"outcome": "ok", "prompt_tokens": 7, "tokens": number}


def far(number: int, tokens: int) -> dict[str, Any]:
    return {"t": "progress", "rows": [[f"e{number}", "node-1", 1, 7, tokens, 9, 1.0, 2.0, 1000.0]]}


def damaged(*records: dict[str, Any]) -> bytes:
    """Frames of which the second one, of no record here, is not what was written."""
    first, *rest = map(encode_frame, records)
    bad = bytearray(encode_frame(settled(99)))
    bad[-3] ^= 1
    return first + bytes(bad) + b"".join(rest)


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.mark.parametrize("current", [True, False], ids=["the segment that is written to", "an earlier one"])
@pytest.mark.parametrize("renamed", [False, True], ids=["before the rename", "after it"])
def test_a_gateway_that_is_killed_at_the_rename_ships_everything_once(
    control: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, current: bool, renamed: bool
) -> None:
    folder = tmp_path / "spool/gateway-1"
    admitted = {"t": "admit", "id": "e6", "ts": 1795000000.5, "api": "native", "model": "m:latest"}
    behind = (settled(3), admitted | {"id": "e5"}, far(5, 20), admitted, settled(6))
    writer = SpoolWriter(folder)
    writer.segment.write_bytes(damaged(settled(1), *behind))
    if not current:
        writer.roll()
        writer.append(encode(far(5, 50)))
        writer.flush()
    token = control.internal.headers["authorization"].removeprefix("Bearer ")

    def ship(writer: SpoolWriter) -> None:
        async def all_of_it() -> None:
            shipper = Shipper(writer, folder, control.url, token, "gateway-1")
            async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
                await shipper.ship_all(client)
                await shipper.ship_all(client)
            assert shipper.backlog() == 0

        asyncio.run(all_of_it())

    rename = Path.replace

    def kill(path: Path, target: Path) -> None:
        if renamed:
            rename(path, target)
        raise Killed(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(Killed):
            ship(writer)
    # What it had rescued by then is shipped, and before the rename once more from the segment, which is as it was.
    assert len(list(folder.glob("*.corrupt"))) == renamed
    again = SpoolWriter(folder)
    ship(again)
    ship(again)
    rows = {row["id"]: row for row in control.admin.get("/admin/audit", params={"model": "m:latest"}).json()["audit"]}
    assert {known: (row["outcome"], row["tokens"]) for known, row in rows.items()} == {
        **{f"e{number}": ("ok", number) for number in (1, 3, 6)},
        "e5": (None, 20 if current else 50),
    }
    (used,) = control.admin.get("/admin/usage", params={"by": "model", "since": 1794000000}).json()["usage"]
    assert (used["requests"], used["tokens"]) == (3, 10)
    assert len(list(folder.glob("*.corrupt"))) == 1
    assert segments(folder) == [again.segment]
    again.close()
    writer.close()


def test_the_log_names_a_damaged_segment_where_it_is_damaged_and_how_much_came_behind(
    control: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "spool/gateway-1"
    writer = SpoolWriter(folder)
    corrupt, torn = folder / "0000000000000001.seg", folder / "0000000000000002.seg"
    begun = framed(encode({"t": "begin", "gw": "gateway-1", "ts": 1795000000.5}))
    pair = framed(encode(settled(3)) + b"\n" + encode(settled(4)))
    corrupt.write_bytes(damaged(settled(1), settled(2)) + begun + pair)
    torn.write_bytes(encode_frame(settled(5)) + encode_frame(settled(6)) + encode_frame(settled(7))[:-3])
    damage = {
        corrupt: ("a corrupt frame", len(encode_frame(settled(1))), corrupt.stat().st_size, ".corrupt", 3),
        torn: ("a torn frame", len(encode_frame(settled(5)) * 2), torn.stat().st_size, ".torn", 0),
    }
    held = {path: path.read_bytes() for path in damage}
    token = control.internal.headers["authorization"].removeprefix("Bearer ")

    async def ship() -> None:
        shipper = Shipper(writer, folder, control.url, token, "gateway-1")
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            await shipper.ship_all(client)

    with caplog.at_level("WARNING", "corral.gateway.shipper"):
        asyncio.run(ship())
    writer.close()
    said = [(one.levelname, one.getMessage()) for one in caplog.records if one.name == "corral.gateway.shipper"]
    assert sorted(said) == [
        (
            "ERROR",
            f"{path} has {what} at byte {offset} of {size}; kept as {path.with_suffix(suffix)}. "
            f"{count} records behind it were shipped all the same",
        )
        for path, (what, offset, size, suffix, count) in damage.items()
    ]
    kept = {path: path.with_suffix(suffix).read_bytes() for path, (_, _, _, suffix, _) in damage.items()}
    assert kept == held, "what is named is there, as it was"
    rows = control.admin.get("/admin/audit", params={"model": "m:latest"}).json()["audit"]
    assert {row["id"] for row in rows} == {f"e{number}" for number in range(1, 7)}


def test_a_remote_doctor_names_what_a_gateway_put_aside(control: Running, tmp_path: Path) -> None:
    spool, metrics, port = tmp_path / "spool", free_port(), free_port()
    adopted, own = spool / "gateway-9", spool / "gateway-1"
    for folder in (adopted, own):
        folder.mkdir(parents=True)
    (adopted / "0000000000000007.corrupt").write_bytes(b"evidence")
    (own / "an operator's, über.corrupt").write_bytes(b"of no interest")
    bad = own / "0000000000000001.seg"
    bad.write_bytes(damaged(settled(1), settled(3)))
    (own / "0000000000000002.seg").write_bytes(encode_frame(settled(4))[:-3])
    settings = {
        "gateway": {
            **{"listen": f"127.0.0.1:{port}", "metrics": f"127.0.0.1:{metrics}", "control_url": control.url},
            **{"spool": str(spool), "cache": str(tmp_path / "cache"), "access_log": ""},
        },
        "store": {"valkey": "redis://127.0.0.1:1/0"},
        "auth": {
            "pepper_file": str(control.state / "pepper"),
            "internal_token_file": str(control.state / "internal.token"),
        },
    }
    Settings.model_validate(settings)
    (tmp_path / "gateway.yaml").write_text(yaml.safe_dump(settings))
    argv = [sys.executable, "-m", "corral", "serve", "gateway", "--config", str(tmp_path / "gateway.yaml")]
    gateway = Process(argv, tmp_path / "gateway.log", python_env())
    names = ["0000000000000001.corrupt", "0000000000000002.torn", "gateway-9/0000000000000007.corrupt"]

    def told() -> dict[str, Any]:
        listed = control.admin.get("/admin/status").json()["gateways"]
        return dict(listed[0]["aside"]) if listed else {}

    def doctor() -> tuple[int, list[dict[str, str]]]:
        env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}
        done = CliRunner().invoke(cli, ["doctor", "--json", "--state", str(tmp_path / "none")], env=env)
        found = json.loads(done.stdout)["findings"]
        return done.exit_code, [one for one in found if one["check"] == "spool of gateway-1"]

    try:
        gateway.wait_until(lambda: told() == {"count": 3, "names": names})
        assert page(f"http://127.0.0.1:{metrics}/metrics").value("corral_spool_aside_files") == 3
        status, (found,) = doctor()
        assert (status, found["level"], all(name in found["seen"] for name in names)) == (1, "problem", True)
        assert "gateway-1" in found["advice"]
        logged = (tmp_path / "gateway.log").read_text()
        assert all(str(own / name) in logged for name in names[:2]), "what it put aside itself is in its log"
        for name in ("gateway-1/0000000000000001.corrupt", "gateway-9/0000000000000007.corrupt"):
            (spool / name).unlink()
        for number in range(ASIDE_TOLD + 5):
            (own / f"{number + 100:016d}.torn").touch()
        until(lambda: told()["count"] == ASIDE_TOLD + 6, "there are more than are named")
        assert told()["names"] == ["0000000000000002.torn", *(f"{n + 100:016d}.torn" for n in range(ASIDE_TOLD - 1))]
        _, (found,) = doctor()
        assert (found["level"], " and 6 more " in found["seen"]) == ("warning", True)
        for path in own.glob("*.torn"):
            path.unlink()
        until(lambda: told()["count"] == 0, "they were removed")
        assert doctor()[1] == []
    finally:
        gateway.end()
    assert {row["id"] for row in control.admin.get("/admin/audit", params={"model": "m:latest"}).json()["audit"]} == {
        "e1",
        "e3",
    }
