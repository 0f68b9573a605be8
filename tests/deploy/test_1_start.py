"""From an empty folder to the first tokens: each test goes on where the one before it ended."""

from __future__ import annotations

import re
import socket
import ssl
from typing import Any

import httpx
import ollama
import openai
import pytest
from deploy.site import MODEL, SERVICES, SLOW, Site
from support.load import WHOLE
from support.process import until

MESSAGES = [{"role": "user", "content": "Say hi."}]
ONE_LINE = re.compile(r"[^\n]+\n?")


def test_without_secrets_one_line_says_what_to_do(empty: Site) -> None:
    done = empty.shell("docker compose up -d --wait")
    assert done.returncode != 0
    assert ONE_LINE.fullmatch(done.stderr) and "run scripts/compose-init first" in done.stderr, done.stderr


def test_init_makes_what_is_needed_and_says_what_comes_next(empty: Site) -> None:
    said = empty.init()
    assert "SELF-SIGNED" in said
    assert "docker compose up -d --wait" in said
    folder = empty.folder / "secrets"
    assert folder.stat().st_mode & 0o777 == 0o700
    password = (folder / "grafana-admin-password").read_text().strip()
    assert len(password) >= 32 and password != "admin"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "made" not in empty.do("scripts/compose-init")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert empty.shell("scripts/compose-init more").returncode == 2


def test_a_taken_port_is_one_line_that_says_what_to_do(empty: Site) -> None:
    with socket.create_server(("127.0.0.1", empty.ports["GRAFANA_PORT"])):
        done = empty.shell("scripts/compose-init")
    assert done.returncode == 1
    assert ONE_LINE.fullmatch(done.stderr), done.stderr
    assert f"port {empty.ports['GRAFANA_PORT']} is taken" in done.stderr and "GRAFANA_PORT in .env" in done.stderr


def test_a_certificate_that_cannot_be_used_is_refused(empty: Site) -> None:
    path = empty.folder / "secrets/tls.pem"
    good = path.read_text()
    path.chmod(0o600)
    try:
        for bad in ("nonsense", good[: good.index("-----BEGIN PRIVATE")]):
            path.write_text(bad)
            done = empty.shell("scripts/compose-init")
            assert done.returncode == 1 and ONE_LINE.fullmatch(done.stderr) and "tls.pem" in done.stderr, done.stderr
    finally:
        path.write_text(good)
    empty.do("scripts/compose-init")


def test_up_and_one_printed_command_gives_a_key(empty: Site, say: list[str]) -> None:
    empty.start()
    say.append(f"docker compose up -d --wait, from nothing: {empty.seconds:.1f} s")
    for service in SERVICES:
        assert empty.container(service)["State"]["Health"]["Status"] == "healthy", service
    command = empty.do("scripts/compose-init").splitlines()[-1].partition("#")[0].strip()
    printed = empty.do(command.replace("exec", "exec -T").replace("NAME", "first"))
    assert printed.startswith("crl_")
    # What control looks at has a second to answer, and who was not heard for three is down.
    until(lambda: _all_ready(empty.corral("status")), "the edge, the gateways and the stores are there", every=0.5)


def _all_ready(status: dict[str, Any]) -> bool:
    stores = {name: store["state"] for name, store in status["store"].items()}
    gateways = {gateway["name"]: gateway["state"] for gateway in status["gateways"]}
    return (
        status["edge"]["state"] == "up"
        and stores == {"valkey": "ready", "database": "ready"}
        and gateways == {"api-gateway-1": "ready", "api-gateway-2": "ready"}
    )


def _tls(site: Site) -> ssl.SSLContext:
    """Trusts the certificate that the edge has to show, and nothing else."""
    return ssl.create_default_context(cafile=str(site.folder / "secrets/tls.pem"))


@pytest.mark.parametrize(("variable", "scheme"), [("CORRAL_HTTP_PORT", "http"), ("CORRAL_HTTPS_PORT", "https")])
def test_the_official_clients_get_tokens(site: Site, variable: str, scheme: str) -> None:
    url = site.url(variable, scheme)
    client = ollama.Client(host=url, headers=site.headers(), verify=_tls(site), timeout=SLOW)
    parts = list(client.chat(MODEL, MESSAGES, options={"num_predict": 8}, stream=True))
    assert parts[-1].done and "".join(part.message.content or "" for part in parts)
    client._client.close()
    with (
        httpx.Client(verify=_tls(site)) as transport,
        openai.OpenAI(base_url=f"{url}/v1", api_key=site.key, max_retries=0, http_client=transport) as other,
    ):
        answer = other.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8)  # type: ignore[arg-type]
        assert answer.choices[0].message.content
        with pytest.raises(openai.AuthenticationError):
            other.with_options(api_key="crl_wrong").models.list()


def test_both_nodes_and_both_gateways_take_part(site: Site) -> None:
    with site.load("spread") as load:
        load.more(4, "ollama-1", seconds=SLOW)
        load.more(4, "ollama-2", seconds=SLOW)
    assert load.unlike(WHOLE) == []
    site.recorded([answer.request_id for answer in load.answers])
    rows = site.audit()
    assert all(int(site.gateway(name)["stot"]) > 0 for name in ("api-gateway-1", "api-gateway-2"))
    # The caller's own address, not HAProxy's: its one fixed address is believed.
    addresses = {rows[answer.request_id]["addr"] for answer in load.answers}
    assert not any(address.startswith("172.30.77.") for address in addresses), addresses


def test_the_front_end_for_other_programs_balances_and_lets_through_inference_alone(site: Site) -> None:
    url = site.url("CORRAL_OLLAMA_PORT")
    body: dict[str, Any] = {"model": MODEL, "prompt": "a", "stream": False, "options": {"num_predict": 2}}
    with httpx.Client(base_url=url, timeout=SLOW) as client:
        assert client.get("/api/tags").json()["models"][0]["name"] == MODEL
        assert client.post("/api/generate", json=body).json()["done"]
        for path in ("/api/pull", "/api/delete", "/api/create", "/api/copy", "/api/push", "/api/../api/pull"):
            assert client.post(path, json={"model": MODEL}).status_code == 404, path
        assert client.request("DELETE", "/api/delete", json={"model": MODEL}).status_code == 404
