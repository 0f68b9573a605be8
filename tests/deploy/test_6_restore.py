"""All of the stack is lost but for a backup and its passphrase; it comes back on an empty one, by the documents."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import httpx
import pytest
from deploy.site import MODEL, PROJECT, SLOW, Site
from support.load import COMPLETIONS
from support.process import until
from support.runbook import sections

KIND = "sh compose"
CHECK, LOST = ("maintenance", "Check the backups"), ("disaster-recovery", "Lost control machine")


def _left(site: Site) -> list[str]:
    """Containers, volumes and networks of the project that are there."""
    networks = site.docker("network", "ls", "--format", "{{.Name}}").split()
    return [
        *site.docker("ps", "-aq").split(),
        *site.docker("volume", "ls", "-q").split(),
        *[name for name in networks if name.startswith(PROJECT)],
    ]


def _ask(site: Site, key: str) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 4}
    return httpx.post(site.url() + COMPLETIONS, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=SLOW / 2)


def test_a_lost_machine_is_restored_from_its_backup(
    site: Site, say: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    away = tmp_path_factory.mktemp("away")
    passphrase = away / "backup.passphrase"
    passphrase.write_text("a passphrase of a test\n")
    given = {"CORRAL_BACKUP_PASSPHRASE_FILE": str(passphrase)}
    revoked = site.corral("keys create revoked")
    site.corral(f"keys revoke {revoked['id']}")
    site.recorded([_ask(site, site.key).headers["x-request-id"] for _ in range(3)])
    old_key, old_audit, old_admin = site.key, site.all_recorded(), site.admin_key
    keys = {key["id"]: key["name"] for key in site.corral("keys list")}

    there = set((site.folder / "backups").glob("corral-*.backup"))
    assert ": whole" in site.block("".join(sections(CHECK[0], KIND)[CHECK[1]]), **given)
    made = set((site.folder / "backups").glob("corral-*.backup")) - there
    assert made, "a new one beside those of before"
    backup = Path(shutil.copy(max(made), away))
    backup.chmod(0o600)
    site.do("docker compose --profile '*' down -v")
    assert _left(site) == []

    other = Site(site.docker, tmp_path_factory.mktemp("other"))
    try:
        # A stack that has begun anew, with a pepper and keys of its own.
        other.init()
        other.up()
        assert _ask(other, old_key).status_code == 401
        _refusals(other, backup, passphrase, away)
        began = time.monotonic()
        said = other.block("".join(sections(LOST[0], KIND)[LOST[1]]), BACKUP=str(backup), **given)
        seconds = time.monotonic() - began
        assert {"load", "revoked"} <= set(said.split()), "its keys are listed"
        for service in ("ollama-1", "ollama-2"):
            other.give_model(service)
        other.key = old_key
        other.knows("ollama-1", "ollama-2")
        until(lambda: _ask(other, old_key).status_code == 200, "the old key works", every=0.5)
        assert _ask(other, revoked["key"]).status_code == 401
        other.admin_key = other.do("docker compose exec -T control cat /var/lib/corral/admin.key").strip()
        assert other.admin_key != old_admin
        again = other.audit()
        lost = {request_id for request_id in old_audit if again.get(request_id) != old_audit[request_id]}
        assert not lost, f"{len(lost)} of {len(old_audit)} records are not as they were"
        listed = {key["id"]: key["name"] for key in other.corral("keys list")}
        assert keys.items() <= listed.items()
        other.recorded([_ask(other, old_key).headers["x-request-id"]])
        say.append(
            f"restored from a backup of {backup.stat().st_size} bytes into an empty stack in {seconds:.1f} s: "
            f"{len(keys)} keys, {len(old_audit)} audit records"
        )
        other.do("docker compose down -v")
        assert _left(other) == []
        # The same where nothing was started before.
        other.block("".join(sections(LOST[0], KIND)[LOST[1]]), BACKUP=str(backup), **given)
        listed = {key["id"]: key["name"] for key in other.corral("keys list")}
        assert keys.items() <= listed.items()
        other.do("docker compose down -v")
        assert _left(other) == []
    finally:
        other.end()


def _refusals(site: Site, backup: Path, passphrase: Path, away: Path) -> None:
    """What is wrong is refused in one line that says what to do, and nothing is touched."""
    (wrong := away / "wrong").write_text("another passphrase\n")
    mount = away / "readable.backup"
    shutil.copy(backup, mount)
    mount.chmod(0o644)
    site.do("docker compose stop control")
    restore = f'docker compose run --rm -T -v "{mount}:/from.backup:ro" control backup restore /from.backup'
    for options, secret, reason in (
        ("--replace", wrong, "passphrase"),
        ("", passphrase, "holds an installation"),
        ("--replace", passphrase, "corral backup extract"),  # the pepper is another one
    ):
        done = site.shell(f"{restore} {options} --passphrase-file /dev/stdin < {secret}")
        said = [line for line in done.stderr.splitlines() if line.startswith("corral: ")]
        assert done.returncode == 1 and len(said) == 1 and reason in said[0], done.stderr
    site.do("docker compose start control && docker compose up -d --wait control")
    assert site.corral("keys list")
