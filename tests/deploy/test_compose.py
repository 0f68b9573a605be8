"""The Compose files on a real engine, from an empty folder to its end: the tests are one story, in this order."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from deploy.site import MODEL, PORTS, PROJECT, Site
from support.load import COMPLETIONS, CUT, TOLD, WHOLE, Load
from support.process import until

MESSAGES = [{"role": "user", "content": "Say hi."}]
ALL = (
    *("ollama-1", "ollama-2", "haproxy", "api-gateway-1", "api-gateway-2", "control", "redis", "postgres"),
    *("prometheus", "alertmanager", "grafana"),
)
ONE_LINE = re.compile(r"[^\n]+\n?")


def test_without_secrets_one_line_says_what_to_do(site: Site) -> None:
    done = site.shell("docker compose up -d --wait")
    assert done.returncode != 0
    assert ONE_LINE.fullmatch(done.stderr) and "run scripts/compose-init first" in done.stderr, done.stderr


def test_init_makes_what_is_needed_and_says_what_comes_next(site: Site) -> None:
    said = site.init()
    assert "SELF-SIGNED" in said
    assert "docker compose up -d --wait" in said
    folder = site.folder / "secrets"
    assert folder.stat().st_mode & 0o777 == 0o700
    password = (folder / "grafana-admin-password").read_text().strip()
    assert len(password) >= 32 and password != "admin"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "made" not in site.do("scripts/compose-init")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert site.shell("scripts/compose-init more").returncode == 2


def test_a_taken_port_is_one_line_that_says_what_to_do(site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.ports["GRAFANA_PORT"])):
        done = site.shell("scripts/compose-init")
    assert done.returncode == 1
    assert ONE_LINE.fullmatch(done.stderr), done.stderr
    assert f"port {site.ports['GRAFANA_PORT']} is taken" in done.stderr and "GRAFANA_PORT in .env" in done.stderr


def test_a_certificate_that_cannot_be_used_is_refused(site: Site) -> None:
    path = site.folder / "secrets/tls.pem"
    good = path.read_text()
    path.chmod(0o600)
    try:
        for bad in ("nonsense", good[: good.index("-----BEGIN PRIVATE")]):
            path.write_text(bad)
            done = site.shell("scripts/compose-init")
            assert done.returncode == 1 and ONE_LINE.fullmatch(done.stderr) and "tls.pem" in done.stderr, done.stderr
    finally:
        path.write_text(good)
    site.do("scripts/compose-init")


def test_up_and_one_printed_command_gives_a_key(site: Site, say: list[str]) -> None:
    seconds = site.up()
    say.append(f"docker compose up -d --wait: {seconds:.1f} s")
    for service in ALL:
        assert site.container(service)["State"]["Health"]["Status"] == "healthy", service
    command = site.do("scripts/compose-init").splitlines()[-1].partition("#")[0].strip()
    printed = site.do(command.replace("exec", "exec -T").replace("NAME", "first"))
    site.key = printed.split()[0]
    assert site.key.startswith("crl_")
    made = site.corral("keys create load --rpm 1000000 --tpm 100000000 --concurrency 1000")
    site.key = made["key"]
    site.admin_key = site.do("docker compose exec -T control cat /var/lib/corral/admin.key").strip()
    for service in ("ollama-1", "ollama-2"):
        site.give_model(service)
    site.knows("ollama-1", "ollama-2")
    status = site.corral("status")
    assert status["store"]["valkey"]["state"] == status["store"]["database"]["state"] == "ready"
    assert {gateway["name"]: gateway["state"] for gateway in status["gateways"]} == {
        "api-gateway-1": "ready",
        "api-gateway-2": "ready",
    }


def _tls(site: Site) -> ssl.SSLContext:
    """Trusts the certificate that the edge has to show, and nothing else."""
    return ssl.create_default_context(cafile=str(site.folder / "secrets/tls.pem"))


@pytest.mark.parametrize(("variable", "scheme"), [("CORRAL_HTTP_PORT", "http"), ("CORRAL_HTTPS_PORT", "https")])
def test_the_official_clients_get_tokens(site: Site, variable: str, scheme: str) -> None:
    url = site.url(variable, scheme)
    client = ollama.Client(host=url, headers=site.headers(), verify=_tls(site), timeout=60)
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
        load.more(4, "ollama-1", seconds=60)
        load.more(4, "ollama-2", seconds=60)
    assert load.unlike(WHOLE) == []
    site.recorded([answer.request_id for answer in load.answers])
    rows = site.audit()
    assert {rows[answer.request_id]["gateway"] for answer in load.answers} == {"api-gateway-1", "api-gateway-2"}
    # The caller's own address, not HAProxy's: its one fixed address is believed.
    addresses = {rows[answer.request_id]["addr"] for answer in load.answers}
    assert not any(address.startswith("172.30.77.") for address in addresses), addresses


def test_the_front_end_for_other_programs_balances_and_lets_through_inference_alone(site: Site) -> None:
    url = site.url("CORRAL_OLLAMA_PORT")
    body: dict[str, Any] = {"model": MODEL, "prompt": "a", "stream": False, "options": {"num_predict": 2}}
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/api/tags").json()["models"][0]["name"] == MODEL
        assert client.post("/api/generate", json=body).json()["done"]
        for path in ("/api/pull", "/api/delete", "/api/create", "/api/copy", "/api/push", "/api/../api/pull"):
            assert client.post(path, json={"model": MODEL}).status_code == 404, path
        assert client.request("DELETE", "/api/delete", json={"model": MODEL}).status_code == 404


# -- what the containers are


def test_containers_have_no_more_than_they_need(site: Site) -> None:
    for service in ALL:
        host = site.container(service)["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["RestartPolicy"]["Name"] == "unless-stopped", service
        assert host["Memory"] > 0, service
        assert host["LogConfig"]["Config"] == {"max-file": "5", "max-size": "10m"}, service
    # By what runs, not by what was asked for.
    for service in ALL:
        pid = site.container(service)["State"]["Pid"]
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^CapEff:\s*0{16}$", status, re.MULTILINE), service
        root = re.search(r"^Uid:\s*0\s", status, re.MULTILINE)
        # Its image keeps the models in root's folder.
        assert bool(root) == service.startswith("ollama"), service


def test_ports_are_published_as_they_should_be(site: Site) -> None:
    published = {
        binding["HostPort"]: binding["HostIp"]
        for service in ALL
        for bindings in (site.container(service)["NetworkSettings"]["Ports"] or {}).values()
        for binding in bindings or []
    }
    public = {"CORRAL_HTTP_PORT", "CORRAL_HTTPS_PORT"}
    wanted = {str(site.ports[name]): "0.0.0.0" if name in public else "127.0.0.1" for name in PORTS}
    assert published == wanted


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"


@pytest.mark.parametrize(
    ("source", "target", "port", "reached"),
    [
        ("control", "ollama-1", 11434, True),
        ("control", "postgres", 5432, True),
        ("api-gateway-1", "redis", 6379, True),
        ("api-gateway-1", "ollama-1", 11434, False),
        ("api-gateway-1", "postgres", 5432, False),
    ],
)
def test_networks_keep_apart_what_has_no_business_with_each_other(
    site: Site, source: str, target: str, port: int, reached: bool
) -> None:
    network = {"ollama-1": "nodes", "postgres": "database", "redis": "data"}[target]
    address = site.container(target)["NetworkSettings"]["Networks"][f"{PROJECT}_{network}"]["IPAddress"]
    done = site.shell(f"docker compose exec -T {source} python -c '{CONNECT}' {address} {port}")
    assert (done.returncode == 0) == reached, done.stderr


def test_only_nodes_have_a_way_out(site: Site) -> None:
    def internal(service: str) -> dict[str, bool]:
        networks = site.container(service)["NetworkSettings"]["Networks"]
        found = {name: site.docker("network", "inspect", "-f", "{{.Internal}}", name).strip() for name in networks}
        return {name.removeprefix(f"{PROJECT}_"): value == "true" for name, value in found.items()}

    assert internal("ollama-1") == {"nodes": True, "egress": False}
    for service in ("api-gateway-1", "api-gateway-2", "control", "redis", "postgres"):
        assert all(internal(service).values()), service


def test_monitoring_finds_everything_it_is_told_of(site: Site) -> None:
    def up() -> set[tuple[str, str]]:
        answer = httpx.get(site.url("PROMETHEUS_PORT") + "/api/v1/targets", timeout=5).json()
        return {(target["labels"]["job"], target["health"]) for target in answer["data"]["activeTargets"]}

    jobs = {"ollama", "api-gateway", "haproxy", "control", "redis", "postgres"}
    until(lambda: up() == {(job, "up") for job in jobs}, "every job is scraped", 60, every=1.0)
    rules = httpx.get(site.url("PROMETHEUS_PORT") + "/api/v1/rules", timeout=5).json()["data"]["groups"]
    assert rules
    managers = httpx.get(site.url("PROMETHEUS_PORT") + "/api/v1/alertmanagers", timeout=5).json()["data"]
    assert [manager["url"] for manager in managers["activeAlertmanagers"]] == ["http://alertmanager:9093/api/v2/alerts"]
    password = (site.folder / "secrets/grafana-admin-password").read_text().strip()
    for given, status in ((password, 200), ("admin", 401)):
        answer = httpx.get(site.url("GRAFANA_PORT") + "/api/datasources", auth=("admin", given), timeout=5)
        assert answer.status_code == status
    assert "haproxy_process" in httpx.get(site.url("CORRAL_STATS_PORT") + "/metrics", timeout=5).text


# -- each container but the edge is killed


def _killed(site: Site, say: list[str], service: str, serving: Callable[[Load], object] | None = None) -> Load:
    """Kill a service's container under load; the load, once it is back and requests have gone on."""
    with site.load(f"killed-{service}") as load:
        load.more(6, seconds=60)
        if serving:
            serving(load)
        pid, killed = site.kill(service), time.monotonic()
        site.back(service, pid)
        seconds = time.monotonic() - killed
        load.more(9, seconds=60)
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(load.fates.items()))
    say.append(f"killed {service}: back in {seconds:.1f} s; of {len(load.answers)} requests: {fates}")
    return load


@pytest.mark.parametrize("service", ["redis", "postgres", "control"])
def test_what_is_not_on_the_token_path_loses_nothing(site: Site, say: list[str], service: str) -> None:
    load = _killed(site, say, service)
    assert load.unlike(WHOLE) == []
    # Records waited in the spools where they could not be shipped.
    site.recorded([answer.request_id for answer in load.answers])


def test_a_node_loses_nothing(site: Site, say: list[str]) -> None:
    load = _killed(site, say, "ollama-1", lambda load: load.more(3, "ollama-1", seconds=60))
    # What had begun to stream is ended in the form of its API, and never silently; all else is answered elsewhere.
    assert load.unlike(WHOLE, TOLD) == []
    told = [answer for answer in load.answers if answer.fate == TOLD]
    assert [str(answer) for answer in told if not answer.text] == []
    say.append(f"    told that their stream ended: {len(told)}, each after its first token")
    site.recorded([answer.request_id for answer in load.answers])
    site.knows("ollama-1", "ollama-2")


@pytest.mark.parametrize("service", ["api-gateway-1", "api-gateway-2"])
def test_a_gateway_loses_nothing_that_the_edge_may_replay(site: Site, say: list[str], service: str) -> None:
    load = _killed(site, say, service, lambda load: load.until(lambda _: load.streaming, "something streams"))
    assert load.unlike(WHOLE, CUT) == []
    cut = [answer for answer in load.answers if answer.fate == CUT]
    assert [str(answer) for answer in cut if not answer.first] == [], "it had not begun: the edge may replay it"
    say.append(f"    cut after their first token, which nobody may replay: {len(cut)}")
    whole = [answer.request_id for answer in load.answers if answer.fate == WHOLE]
    site.recorded(whole, [answer.request_id for answer in cut])


@pytest.mark.parametrize("service", ["prometheus", "alertmanager", "grafana"])
def test_monitoring_comes_back(site: Site, say: list[str], service: str) -> None:
    pid, killed = site.kill(service), time.monotonic()
    site.back(service, pid)
    say.append(f"killed {service}: back in {time.monotonic() - killed:.1f} s")


# -- operation


def test_a_node_is_added_and_no_stream_is_cut(site: Site, say: list[str]) -> None:
    site.up("--profile ollama-3")
    site.give_model("ollama-3")
    with site.load("added") as load:
        load.more(6, seconds=60)
        began = time.monotonic()
        site.corral("nodes add http://ollama-3:11434 --name ollama-3")
        seconds = time.monotonic() - began
        load.more(3, "ollama-3", seconds=60)
        load.more(9, seconds=60)
    assert load.unlike(WHOLE) == []
    say.append(f"added ollama-3 in {seconds:.1f} s under load: {len(load.answers)} requests, all whole")


def test_a_new_certificate_is_shown_after_a_reload_that_cuts_nothing(site: Site) -> None:
    path = site.folder / "secrets/tls.pem"
    old = _shown(site)
    with site.load("certificate") as load:
        load.more(3, seconds=60)
        site.do(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3 -subj /CN=new"
            " -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout new.key -out new.pem 2> /dev/null"
            " && cat new.pem new.key > secrets/tls.pem && docker compose kill -s USR2 haproxy"
        )
        until(lambda: _shown(site) != old, "the edge shows the new certificate", 10)
        load.more(6, seconds=60)
    assert load.unlike(WHOLE) == []
    assert path.read_text().startswith(ssl.DER_cert_to_PEM_cert(_shown(site)).strip()[:200])


def _shown(site: Site) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", site.ports["CORRAL_HTTPS_PORT"]), 5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        assert secured.version() == "TLSv1.3"
        shown = secured.getpeercert(binary_form=True)
        assert shown
        return shown


def test_down_and_up_keeps_keys_audit_and_models(site: Site, say: list[str]) -> None:
    keys = {key["id"]: key["name"] for key in site.corral("keys list")}
    audit = site.audit()
    assert audit
    site.do("docker compose --profile ollama-3 down", 180)
    assert site.docker("ps", "-aq").split() == []
    say.append(f"docker compose down and up again: {site.up('--profile ollama-3'):.1f} s to come back")
    assert {key["id"]: key["name"] for key in site.corral("keys list")} == keys
    again = site.audit()
    assert {request_id: again[request_id]["outcome"] for request_id in audit} == {
        request_id: row["outcome"] for request_id, row in audit.items()
    }
    site.knows("ollama-1", "ollama-2", "ollama-3")
    answer = httpx.post(
        site.url() + COMPLETIONS,
        json={"model": MODEL, "messages": MESSAGES, "max_tokens": 4},
        headers=site.headers(),
        timeout=60,
    )
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]


def test_a_secret_that_the_database_needs_is_not_made_anew(site: Site) -> None:
    pepper = site.folder / "secrets/pepper"
    kept = pepper.rename(site.folder / "kept")
    try:
        done = site.shell("scripts/compose-init")
        assert done.returncode == 1 and not pepper.exists()
        assert ONE_LINE.fullmatch(done.stderr) and "restore it from a backup" in done.stderr, done.stderr
    finally:
        kept.rename(pepper)
    site.do("scripts/compose-init")


def test_it_ends_with_nothing_left(site: Site) -> None:
    site.do("docker compose --profile ollama-3 down -v", 180)
    assert site.docker("ps", "-aq").split() == []
    assert site.docker("volume", "ls", "-q").split() == []
    left = site.docker("network", "ls", "--format", "{{.Name}}").split()
    assert not [name for name in left if name.startswith(PROJECT)]


