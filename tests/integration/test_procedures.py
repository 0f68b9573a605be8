"""docs/runbooks/incident-response.md and maintenance.md as they are read, on a stack in the state that they are for."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.operator import Operator
from support.process import free_port, until
from support.runbook import sections

pytestmark = pytest.mark.slow

INCIDENT, MAINTENANCE = "incident-response", "maintenance"
MODEL = "sim-small:latest"


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("procedures")
    (folder / "corral.yaml").write_text("audit: {retention: 30d}\n")
    made = Operator(folder, nodes=2)
    made.env |= {"URL": f"http://127.0.0.1:{made.port}", "KEY": made.key, "NODE": "node-1", "CLIENT": "client-2"}
    yield made
    made.end()


def told(operator: Operator, command: str) -> Any:
    return json.loads(operator.run(f"corral {command} --json"))


def blocks(page: str, heading: str) -> str:
    return "\n".join(sections(page)[heading])


def ask(operator: Operator, key: str | None = None, path: str = "/api/generate") -> httpx.Response:
    body = {"model": MODEL, "prompt": "Hello", "stream": False, "options": {"num_predict": 4}}
    headers = {"Authorization": f"Bearer {key or operator.key}"}
    return httpx.post(operator.env["URL"] + path, json=body, headers=headers, timeout=60, trust_env=False)


def pid_of(operator: Operator, find: Callable[[Any], Any]) -> int | None:
    """The pid of a part, None while it is none."""
    pid = find(told(operator, "status"))["pid"]
    return None if pid is None else int(pid)


def recorded(operator: Operator, request_id: str) -> dict[str, Any]:
    """The audit record of a request, as soon as control has it."""

    found: list[dict[str, Any]] = []

    def there() -> bool:
        listed = told(operator, "audit list --limit 1000")
        found[:] = [row for row in listed if row["request_id"] == request_id and row["outcome"]]
        return bool(found)

    until(there, "the record is there", every=0.2)
    return found[0]


def test_the_first_five_minutes(operator: Operator) -> None:
    recorded(operator, ask(operator).headers["x-request-id"])
    said = operator.run(blocks(INCIDENT, "The first five minutes"))
    assert "node-2" in said and "200\n" in said and '"outcome": "ok"' in said
    assert "/admin/keys" in said, "what was changed last"


def test_401(operator: Operator) -> None:
    made = told(operator, "keys create revoked")
    operator.run(f"corral keys revoke {made['id']}")
    until(lambda: ask(operator, made["key"]).status_code == 401, "it is refused")
    operator.env["ID"] = made["id"]
    assert "revoked" in operator.run(blocks(INCIDENT, "401: the key is refused"))


def test_429(operator: Operator) -> None:
    made = told(operator, "keys create hasty --rpm 1")
    answers: list[httpx.Response] = []

    def limited() -> bool:
        answers.append(ask(operator, made["key"]))
        return answers[-1].status_code == 429

    until(limited, "the key is at its limit")
    refused = answers[-1]
    assert int(refused.headers["retry-after"]) >= 1
    recorded(operator, refused.headers["x-request-id"])
    operator.env["ID"] = made["id"]
    assert f'"key": "{made["id"]}"' in operator.run(blocks(INCIDENT, "429: a limit is reached"))


def test_503(operator: Operator) -> None:
    operator.run("corral nodes drain node-1 && corral nodes drain node-2")
    try:
        until(lambda: ask(operator).status_code == 503, "nobody can take it", every=0.2)
        said = operator.run(blocks(INCIDENT, "503: nobody can take it"), status=1)  # the doctor: PROBLEM
        assert "unhealthy" in said and said.count("draining") >= 2
    finally:
        operator.run("corral nodes resume node-1 && corral nodes resume node-2")
    until(lambda: ask(operator).status_code == 200, "it serves again", every=0.2)


@pytest.mark.parametrize("heading", ["Slow first token", "Cut streams", "Wrong node or model", "Afterwards"])
def test_looking(operator: Operator, heading: str) -> None:
    answer = ask(operator)
    assert answer.headers["x-corral-node"] in ("node-1", "node-2")
    recorded(operator, answer.headers["x-request-id"])
    said = operator.run(blocks(INCIDENT, heading))
    assert {"Slow first token": '"ttft_ms"', "Cut streams": '"ok"'}.get(heading, "") in said


def test_take_a_node_out(operator: Operator) -> None:
    try:
        assert "draining" in operator.run(blocks(INCIDENT, "Take a node out"))
        assert ask(operator).headers["x-corral-node"] == "node-2"
    finally:
        operator.run("corral nodes resume node-1")


@pytest.mark.parametrize(
    ("heading", "find"),
    [
        ("Node down", lambda seen: seen["nodes"][0]),
        ("Valkey down", lambda seen: seen["store"]["valkey"]),
        ("Gateway down", lambda seen: seen["gateways"][0]),
        ("Edge down", lambda seen: seen["edge"]),
    ],
)
def test_a_part_is_killed_and_comes_back(operator: Operator, heading: str, find: Callable[[Any], Any]) -> None:
    pid = pid_of(operator, find)
    assert pid is not None
    os.kill(pid, 9)
    # While it is away, `doctor` ends with 1, and without the edge `status` may: what counts is that they say so.
    said = operator.run(f"set +e\n(\n{blocks(INCIDENT, heading)}\n) 2>&1\ntrue")
    assert "Traceback" not in said

    def back() -> bool:
        seen = json.loads(operator.attempt("corral status --json") or "null")
        if not seen or find(seen)["pid"] in (None, pid) or {node["state"] for node in seen["nodes"]} != {"ready"}:
            return False
        return ask_or_none(operator) == 200

    until(back, f"{heading}: it is back", 60, every=0.5)
    operator.run(blocks(INCIDENT, heading))
    assert ask(operator).status_code == 200


def ask_or_none(operator: Operator) -> int | None:
    try:
        return ask(operator).status_code
    except httpx.TransportError:
        return None


def test_database_down(operator: Operator) -> None:
    assert "spool" in operator.run(blocks(INCIDENT, "Database down"))


def test_a_leaked_key_is_refused_at_once(operator: Operator) -> None:
    made = told(operator, "keys create leaked")
    recorded(operator, ask(operator, made["key"]).headers["x-request-id"])
    operator.env["ID"] = made["id"]
    assert made["id"] in operator.run(blocks(INCIDENT, "A key or secret has leaked"))
    until(lambda: ask(operator, made["key"]).status_code == 401, "it is refused")


def test_evidence(operator: Operator) -> None:
    request_id = ask(operator).headers["x-request-id"]
    recorded(operator, request_id)
    operator.env["REQUEST_ID"] = request_id
    said = operator.run(blocks(INCIDENT, "Collect evidence"))
    assert said.count(request_id) >= 2, "the audit record, and the line of the access log"
    assert (operator.folder / "evidence.tar.gz").stat().st_size > 1000
    kept = "".join(path.read_text() for path in (operator.folder / "evidence").iterdir())
    assert operator.key not in kept and (operator.state / "admin.key").read_text().strip() not in kept


@pytest.mark.parametrize("heading", ["Before any of it", "Check the backups"])
def test_backups(operator: Operator, heading: str) -> None:
    operator.run("corral backup create")
    assert ".backup" in operator.run(blocks(MAINTENANCE, heading))


def test_upgrade_ollama_on_a_node(operator: Operator) -> None:
    drain, resume = sections(MAINTENANCE)["Upgrade Ollama on a node"]
    operator.run(drain)
    node = told(operator, "status")["nodes"][0]
    os.kill(node["pid"], 15)  # The supervisor starts the next one, as an upgrade would.
    until(lambda: told(operator, "status")["nodes"][0]["pid"] not in (None, node["pid"]), "it is back", every=0.5)
    operator.env["NODE_URL"] = node["url"]
    until(lambda: operator.attempt('curl --fail --silent "$NODE_URL/api/version"'), "it answers", every=0.3)
    operator.run(resume)
    until(lambda: told(operator, "nodes list")[0]["state"] == "ready", "it is in service", every=0.3)


def test_a_gateway_is_restarted(operator: Operator) -> None:
    pid = pid_of(operator, lambda seen: seen["gateways"][0])
    operator.env["GATEWAY_PID"] = str(pid)
    operator.run(blocks(MAINTENANCE, "Restart a gateway"))
    until(lambda: pid_of(operator, lambda seen: seen["gateways"][0]) not in (None, pid), "the next one is there")
    until(lambda: ask_or_none(operator) == 200, "it serves")


def test_a_client_s_key_is_rotated_without_a_gap(operator: Operator) -> None:
    made = told(operator, "keys create rotated")
    operator.env["ID"] = made["id"]
    said = operator.run(blocks(MAINTENANCE, "Rotate a client's key"))
    fresh = said.split()[0]
    assert fresh.startswith("crl_") and fresh != made["key"]
    until(lambda: ask(operator, fresh).status_code == 200, "the new secret works")
    assert ask(operator, made["key"]).status_code == 200, "and the old one still does"


def test_the_admin_key_is_rotated(operator: Operator) -> None:
    old = (operator.state / "admin.key").read_text().strip()
    operator.run(blocks(MAINTENANCE, "Rotate the admin key"))
    new = (operator.state / "admin.key").read_text().strip()
    assert new != old and (operator.state / "admin.key").stat().st_mode & 0o077 == 0
    assert told(operator, "keys list")


def test_disk_and_retention(operator: Operator) -> None:
    assert "spool" in operator.run(blocks(MAINTENANCE, "Disk space"))
    (operator.folder / "corral.yaml").write_text("audit: {retention: 60d}\n")
    assert "audit.retention" in operator.run(blocks(MAINTENANCE, "Change how long the audit trail is kept"))


@pytest.mark.parametrize("heading", ["Upgrade Corral", "Planned reboot"])
def test_down_and_up_again(operator: Operator, heading: str) -> None:
    down, up = sections(MAINTENANCE)[heading]
    operator.run(down)
    assert ask_or_none(operator) is None
    operator.run(up)
    assert operator.works()


def test_the_certificate_is_replaced(tmp_path: Path) -> None:
    path, port = tmp_path / "tls.pem", free_port()
    _certificate(tmp_path, "old")
    (tmp_path / "corral.yaml").write_text(f"edge: {{certificate: {path}, tls_port: {port}}}\n")
    operator = Operator(tmp_path)
    try:
        before = ssl.get_server_certificate(("127.0.0.1", port))
        _certificate(tmp_path, "new")
        operator.env["CERTIFICATE"] = str(path)
        assert "CN = new" in operator.run(blocks(MAINTENANCE, "Replace the TLS certificate"))
        until(lambda: ssl.get_server_certificate(("127.0.0.1", port)) != before, "the new one is shown", every=0.2)
    finally:
        operator.end()


def _certificate(folder: Path, name: str) -> None:
    key, chain = folder / "key", folder / "chain"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-days", "3", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(chain)]
    subprocess.run(argv, check=True, capture_output=True)
    (folder / "tls.pem").write_text(chain.read_text() + key.read_text())
    (folder / "tls.pem").chmod(0o600)


def test_the_pepper_is_changed(operator: Operator) -> None:
    """The last of this stack: every key ends."""
    said = operator.run(blocks(MAINTENANCE, "Change the pepper"))
    assert not operator.works()
    fresh = next(line for line in said.splitlines() if line.startswith("crl_"))
    until(lambda: ask(operator, fresh).status_code == 200, "it is known")
