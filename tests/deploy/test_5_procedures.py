"""The blocks for Compose of the procedures in docs/runbooks, run on the stack as they stand there."""

from __future__ import annotations

import json
import secrets
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from deploy.site import MODEL, PROJECT, SLOW, Site, ask, serves
from support.load import TOLD, WHOLE
from support.process import until
from support.runbook import NOT_HERE, sections

KIND = "sh compose"
SCALING, MODELS, INCIDENT = "scaling", "model-deployment", "incident-response"
MAINTENANCE, DISASTER = "maintenance", "disaster-recovery"
MANY = 6
"""So many clients that each node has something to do: gateways count their own requests alone."""


def block(page: str, heading: str) -> str:
    """The blocks of a section, one after the other, without the lines of NOT_HERE."""
    lines = "".join(sections(page, KIND)[heading]).splitlines()
    assert lines, f"{page}.md has no block for Compose under {heading}"
    return "\n".join(line for line in lines if line not in NOT_HERE)


def around(page: str, heading: str, line: str) -> tuple[str, str]:
    """What stands before and after a line of NOT_HERE, for which the test does something else."""
    before, found, after = "".join(sections(page, KIND)[heading]).partition(line)
    assert found and line in NOT_HERE
    return before, after


def nodes(site: Site) -> dict[str, Any]:
    return {node["name"]: node for node in site.corral("nodes list")}


def started(site: Site, service: str) -> str:
    return str(site.container(service)["State"]["StartedAt"])


@pytest.fixture(scope="module")
def passphrase(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file with the passphrase of the backups."""
    path = tmp_path_factory.mktemp("passphrase") / "backup.passphrase"
    path.write_text("a passphrase of a test\n")
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def shim(site: Site) -> dict[str, str]:
    """`corral` with `docker compose exec control` in front of it, as the pages say; and what they call URL and KEY."""
    (site.folder / "bin").mkdir(exist_ok=True)
    path = site.folder / "bin/corral"
    path.write_text('#!/bin/sh\nexec docker compose exec -T control corral "$@"\n')
    path.chmod(0o755)
    return {"URL": site.url(), "KEY": site.key, "NODE": "ollama-2"}


def anywhere(site: Site, shim: dict[str, str], page: str, heading: str, **variables: str) -> str:
    """The blocks that are for every installation, with that `corral`."""
    text = "\n".join(sections(page)[heading])
    return site.block(f'PATH="$PWD/bin:$PATH"\n{text}', **{**shim, **variables})


# -- incidents


def test_the_first_five_minutes(site: Site, shim: dict[str, str]) -> None:
    site.recorded([ask(site).headers["x-request-id"]])
    said = site.block(block(INCIDENT, "The first five minutes"))
    assert all(f"{PROJECT}-{service}-1" in said for service in ("haproxy", "control", "redis", "postgres"))
    assert "api-gateway-1-1  |" in said, "its log"
    said = anywhere(site, shim, INCIDENT, "The first five minutes")
    assert "ollama-2" in said and "200\n" in said and '"outcome": "ok"' in said and "/admin/keys" in said


@pytest.mark.parametrize(
    ("page", "heading", "service", "fates"),
    [
        (INCIDENT, "Node down", "ollama-1", (WHOLE, TOLD)),
        (INCIDENT, "Valkey down", "redis", (WHOLE,)),
        (INCIDENT, "Database down", "postgres", (WHOLE,)),
        (INCIDENT, "Gateway down", "api-gateway-1", (WHOLE,)),
        (MAINTENANCE, "Restart a gateway", "api-gateway-1", (WHOLE,)),
    ],
)
def test_a_part_is_restarted_while_requests_go_on(
    site: Site, say: list[str], page: str, heading: str, service: str, fates: tuple[str, ...]
) -> None:
    before = started(site, service)
    with site.load(f"restarted-{service}") as load:
        load.more(3, seconds=SLOW)
        said = site.block(block(page, heading))
        assert started(site, service) > before
        assert "docker compose logs" not in block(page, heading) or f"{service}-1  |" in said, "its log"
        load.more(6, seconds=SLOW)
    assert load.unlike(*fates) == []
    site.recorded([answer.request_id for answer in load.answers])
    site.knows("ollama-1", "ollama-2")
    say.append(f"runbook, {heading}: {service} restarted, {len(load.answers)} requests: {dict(load.fates)}")


def test_edge_down(site: Site) -> None:
    site.do("docker compose kill haproxy")
    with pytest.raises(httpx.TransportError):
        ask(site)
    site.block(block(INCIDENT, "Edge down"))
    serves(site)


def test_a_node_is_taken_out_and_brought_back(site: Site, shim: dict[str, str]) -> None:
    assert "draining" in anywhere(site, shim, INCIDENT, "Take a node out")
    assert "ollama-2" not in {ask(site).headers["x-corral-node"] for _ in range(4)}
    site.corral("nodes resume ollama-2")
    site.knows("ollama-2")


def test_a_leaked_key_is_refused(site: Site, shim: dict[str, str]) -> None:
    made = site.corral("keys create leaked")
    until(lambda: ask(site, made["key"]).status_code == 200, "it works")
    anywhere(site, shim, INCIDENT, "A key or secret has leaked", ID=made["id"])
    until(lambda: ask(site, made["key"]).status_code == 401, "it is refused")


# -- scaling


def test_a_node_is_removed_and_added_and_takes_traffic(site: Site, say: list[str]) -> None:
    if "ollama-3" in nodes(site):
        site.block(block(SCALING, "Remove a node"))
    before, after = around(SCALING, "Add a node", 'docker compose exec ollama-3 ollama pull "$MODEL"')
    site.block(before)
    site.give_model("ollama-3")
    with site.load("procedure-added", MANY) as load:
        load.more(3, seconds=SLOW)
        assert "ollama-3" in site.block(after)
        load.more(3, "ollama-3", seconds=SLOW)
        assert "ollama-3" in nodes(site)
        site.block(block(SCALING, "Remove a node"))
        load.more(6, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    assert "ollama-3" not in nodes(site)
    assert f"{PROJECT}-ollama-3-1" not in site.docker("ps", "-a", "--format", "{{.Names}}").split()
    assert f"{PROJECT}_ollama-3-data" not in site.docker("volume", "ls", "-q").split()
    say.append(f"runbook, a node added and removed: {len(load.answers)} requests, all whole")


def test_a_gateway_is_removed_and_none_of_its_records_is_lost(site: Site) -> None:
    serves(site)
    site.do("docker compose stop control")
    served = int(site.gateway("api-gateway-2")["stot"])
    ids = [ask(site).raise_for_status().headers["x-request-id"] for _ in range(8)]
    assert int(site.gateway("api-gateway-2")["stot"]) > served
    site.do("docker compose kill api-gateway-2")
    site.do("docker compose up -d --wait --no-deps control")
    site.block(block(SCALING, "Remove a gateway"))
    assert f"{PROJECT}-api-gateway-2-1" not in site.docker("ps", "-a", "--format", "{{.Names}}").split()
    assert f"{PROJECT}_api-gateway-2-spool" not in site.docker("volume", "ls", "-q").split()
    site.recorded(ids)
    site.do("docker compose up -d --wait --no-deps api-gateway-2")
    serves(site)
    site.knows("ollama-1", "ollama-2")


# -- maintenance


def test_ollama_is_upgraded_on_a_node_and_goes_back(site: Site) -> None:
    compose = site.folder / "docker-compose.yml"
    kept = compose.read_text()
    old = site.container("ollama-1")["Config"]["Image"]
    new = f"{old}-next"
    site.docker("tag", old, new)
    with site.load("ollama-upgraded", MANY) as load:
        load.more(3, seconds=SLOW)
        for image in (new, old):
            compose.write_text(kept.replace(f"image: {old}\n", f"image: {image}\n"))
            site.block(block(MAINTENANCE, "Upgrade Ollama on a node"))
            assert site.container("ollama-1")["Config"]["Image"] == image
            # There is no catalogue: else nobody would ask a node that has yet to load it.
            site.corral(f"models load {MODEL} --node ollama-1")
            load.more(3, "ollama-1", seconds=SLOW)
    assert load.unlike(WHOLE) == []
    site.docker("rmi", new)


def test_a_model_of_the_catalogue(site: Site) -> None:
    config = site.folder / "deploy/compose/corral.yaml"
    kept = config.read_text()
    with site.load("catalogue") as load:
        load.more(3, seconds=SLOW)
        config.write_text(kept + f"\nmodels:\n  - {{name: {MODEL}, copies: 2}}\n")
        said = site.block(block(MODELS, "With Compose"))
        load.more(6, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    # It is there already, so that nothing has to be pulled: its version is recorded, and it stays in memory.
    assert "nothing to do" in said and " ok " in said
    (listed,) = [row for row in site.corral("models list") if row["name"] == MODEL]
    assert listed["expected"].startswith("sha256:")
    # Without the catalogue again once control and the gateways are made anew, as Corral's upgrade does next.
    config.write_text(kept)


def test_corral_is_upgraded_and_no_stream_is_cut(site: Site, say: list[str]) -> None:
    # This engine has no network for builds but the machine's own.
    services = ("control", "api-gateway-1", "api-gateway-2")
    (site.folder / "build.yml").write_text(
        json.dumps({"services": {service: {"build": {"network": "host"}} for service in services}})
    )
    env = site.folder / ".env"
    files = [line for line in env.read_text().splitlines() if line.startswith("COMPOSE_FILE=")][-1]
    with env.open("a") as file:
        file.write(f"{files}:build.yml\nCORRAL_VERSION=next\n")
    edge = started(site, "haproxy")
    with site.load("corral-upgraded") as load:
        load.more(3, seconds=SLOW)
        began = time.monotonic()
        site.block(block(MAINTENANCE, "Upgrade Corral"))
        seconds = time.monotonic() - began
        load.more(6, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    assert {site.container(service)["Config"]["Image"] for service in services} == {"corral:next"}
    assert started(site, "haproxy") == edge
    say.append(f"runbook, Corral built anew and upgraded in {seconds:.1f} s: {len(load.answers)} requests, all whole")


def test_a_client_s_key_is_rotated(site: Site, shim: dict[str, str]) -> None:
    made = site.corral("keys create rotated")
    fresh = anywhere(site, shim, MAINTENANCE, "Rotate a client's key", ID=made["id"]).split()[0]
    assert fresh.startswith("crl_") and fresh != made["key"]
    until(lambda: ask(site, fresh).status_code == 200, "the new secret works")
    assert ask(site, made["key"]).status_code == 200, "and the old one still does"


def test_the_admin_key_is_rotated(site: Site) -> None:
    site.block(block(MAINTENANCE, "Rotate the admin key"))
    fresh = site.do("docker compose exec -T control cat /var/lib/corral/admin.key").strip()
    assert fresh.startswith("crl_") and fresh != site.admin_key
    site.admin_key = fresh
    assert site.audit()
    assert site.do("docker compose exec -T control stat -c %a /var/lib/corral/admin.key").strip() == "600"


def test_the_certificate_is_replaced(site: Site) -> None:
    address = ("127.0.0.1", site.ports["CORRAL_HTTPS_PORT"])
    before = ssl.get_server_certificate(address)
    site.do(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3 -subj /CN=renewed"
        " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout new.key -out new.pem 2> /dev/null"
        " && chmod u+w secrets/tls.pem && cat new.pem new.key > secrets/tls.pem"
    )
    with site.load("renewed") as load:
        load.more(3, seconds=SLOW)
        site.block(block(MAINTENANCE, "Replace the TLS certificate"))
        until(lambda: ssl.get_server_certificate(address) != before, "the new one is shown", every=0.2)
        load.more(3, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    assert ssl.get_server_certificate(address).strip() == (site.folder / "new.pem").read_text().strip()


def test_the_password_of_the_database_is_changed(site: Site) -> None:
    fresh = secrets.token_hex(16)
    site.block(block(MAINTENANCE, "Change PostgreSQL's password"), NEW=fresh)
    # Control is made to connect anew: with the old password it could not.
    site.do("docker compose restart control && docker compose up -d --wait control")
    until(lambda: site.corral("status")["store"]["database"]["state"] == "ready", "control has it", every=0.5)
    site.do("scripts/compose-init")
    assert (site.folder / "secrets/postgres-password").stat().st_mode & 0o777 == 0o444


def _has_limits(site: Site, gateway: str) -> bool:
    """Whether a gateway reaches Valkey, by its own metrics, which control's container may ask for."""
    read = f"import urllib.request as r; print(r.urlopen('http://{gateway}:9101/metrics', timeout=30).read().decode())"
    return "corral_limit_store_up 1" in site.do(f'docker compose exec -T control python -c "{read}"')


def test_the_password_of_valkey_is_changed(site: Site) -> None:
    path = site.folder / "secrets/valkey-password"
    old = path.read_text().strip()
    with site.load("valkey-password") as load:
        load.more(3, seconds=SLOW)
        site.block(block(MAINTENANCE, "Change Valkey's password"))
        load.more(3, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    assert path.read_text().strip() != old
    asked = "docker compose exec -T redis sh -c 'REDISCLI_AUTH={} valkey-cli -e ping'"
    assert site.shell(asked.format(old)).returncode != 0
    until(lambda: site.corral("status")["store"]["valkey"]["state"] == "ready", "control has the new one", every=0.5)
    for gateway in ("api-gateway-1", "api-gateway-2"):
        until(lambda name=gateway: _has_limits(site, name), f"{gateway} has the new one", every=0.5)  # type: ignore[misc]


def test_the_backups_are_checked(site: Site, passphrase: str) -> None:
    said = site.block(block(MAINTENANCE, "Check the backups"), CORRAL_BACKUP_PASSPHRASE_FILE=passphrase)
    assert ": whole" in said
    # The next file does it once more, beside this one.
    assert len(list((site.folder / "backups").glob("corral-*.backup"))) == 1


def test_a_restore_is_tried(site: Site, passphrase: str) -> None:
    heading = "Before anything is lost"
    said = site.block(block(DISASTER, heading), CORRAL_BACKUP_PASSPHRASE_FILE=passphrase)
    assert ": restores" in said and "into postgresql, in " in said and " is taken" in said
    left = site.do("docker compose exec -T control ls /var/lib/corral/run")
    assert "corral-drill-" not in left
    databases = "docker compose exec -T postgres psql -U corral -d corral -Atc 'SELECT datname FROM pg_database'"
    assert "corral_drill_" not in site.do(databases)


def test_disk_space(site: Site) -> None:
    said = site.block(block(MAINTENANCE, "Disk space"))
    assert f"{PROJECT}_postgres-data" in said and MODEL in said and " MB" in said


def test_vacuum_a_minor_and_a_major_version_of_postgresql(site: Site, say: list[str], passphrase: str) -> None:
    keys = {key["id"] for key in site.corral("keys list")}
    before = site.audit().keys()
    volume = _made(site, "postgres-data")
    with site.load("postgresql") as load:
        load.more(3, seconds=SLOW)
        began = time.monotonic()
        site.block(block(MAINTENANCE, "PostgreSQL: vacuum and upgrades"), CORRAL_BACKUP_PASSPHRASE_FILE=passphrase)
        seconds = time.monotonic() - began
        load.more(3, seconds=SLOW)
    assert load.unlike(WHOLE) == []
    assert _made(site, "postgres-data") != volume, "the volume is a new one"
    assert {key["id"] for key in site.corral("keys list")} >= keys
    _new_admin_key(site)
    # What was recorded while control was stopped waited in the spools.
    site.recorded([answer.request_id for answer in load.answers])
    assert site.audit().keys() >= before
    say.append(f"runbook, PostgreSQL moved to a new volume in {seconds:.1f} s: {len(load.answers)} requests, all whole")


def _made(site: Site, volume: str) -> str:
    return site.docker("volume", "inspect", "-f", "{{.CreatedAt}}", f"{PROJECT}_{volume}").strip()


def _new_admin_key(site: Site) -> None:
    """A restore makes control give itself another admin key."""
    site.admin_key = site.do("docker compose exec -T control cat /var/lib/corral/admin.key").strip()


def test_planned_reboot(site: Site) -> None:
    audit = site.audit().keys()
    site.block(block(MAINTENANCE, "Planned reboot"))
    serves(site)
    assert site.audit().keys() >= audit


# -- disasters; a lost control machine is in the next file


def test_a_lost_node(site: Site) -> None:
    before, after = around(DISASTER, "Lost node", 'docker compose exec ollama-2 ollama pull "$MODEL"')
    with site.load("lost-node", MANY) as load:
        load.more(3, seconds=SLOW)
        site.block(before)
        site.give_model("ollama-2")
        assert "ollama-2" in site.block(after)
        load.more(3, "ollama-2", seconds=SLOW)
    assert load.unlike(WHOLE, TOLD) == []


def test_a_corrupt_database_is_salvaged_and_a_lost_one_restored(site: Site, passphrase: str) -> None:
    given = {"CORRAL_BACKUP_PASSPHRASE_FILE": passphrase}
    site.recorded([ask(site).headers["x-request-id"]])
    before = site.audit().keys()
    site.block(block(DISASTER, "Corrupt database"), **given)
    backup = max((site.folder / "salvaged").glob("corral-*.backup"))
    volume = _made(site, "postgres-data")
    said = site.block(block(DISASTER, "Lost database"), BACKUP=str(backup), **given)
    assert "ready" in said
    assert _made(site, "postgres-data") != volume
    serves(site)
    _new_admin_key(site)
    assert site.audit().keys() >= before


def test_a_lost_pepper(site: Site, passphrase: str) -> None:
    pepper = site.folder / "secrets/pepper"
    kept = pepper.read_bytes()
    pepper.unlink()
    backup = max(Path(site.folder, "salvaged").glob("corral-*.backup"))
    site.block(block(DISASTER, "Lost pepper"), BACKUP=str(backup), CORRAL_BACKUP_PASSPHRASE_FILE=passphrase)
    assert pepper.read_bytes().split() == kept.split()
    serves(site)
