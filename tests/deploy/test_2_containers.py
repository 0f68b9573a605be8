"""What the containers are, what they may do, and whom they reach."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from deploy.site import PORTS, PROJECT, SERVICES, SLOW, Site
from support.process import until


def test_nodes_reserve_the_gpu_that_env_names(site: Site) -> None:
    def reserved(files: str) -> list[Any]:
        given = f"OLLAMA_2_GPU=7 docker compose {files} --profile ollama-3 config --format json"
        services = json.loads(site.do(given))["services"]
        nodes = [services[f"ollama-{number}"].get("deploy", {}) for number in (1, 2, 3)]
        return [node.get("resources", {}).get("reservations", {}).get("devices") for node in nodes]

    found = reserved("-f docker-compose.yml")
    assert [(device["driver"], device["device_ids"]) for (device,) in found] == [
        ("nvidia", ["0"]),
        ("nvidia", ["7"]),
        ("nvidia", ["2"]),
    ]
    assert not any(reserved("-f docker-compose.yml -f compose.cpu.yml"))


def test_the_image_has_no_tools_to_build_with_and_is_nobody_s_root(site: Site) -> None:
    found = site.do("docker compose exec -T control sh -c 'id -u; ls /opt/corral/bin; command -v gcc cc make || true'")
    assert found.split()[0] == "10001"
    assert not {"pip", "gcc", "cc", "make"} & {Path(word).name for word in found.split()}
    assert site.shell("docker compose exec -T control touch /opt/corral/x").returncode != 0
    assert site.do("docker compose exec -T control find /opt/corral -name '*.pth'") == ""


def test_containers_have_no_more_than_they_need(site: Site) -> None:
    for service in SERVICES:
        host = site.container(service)["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Privileged"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service
        assert host["RestartPolicy"]["Name"] == "unless-stopped", service
        assert host["Memory"] > 0, service
        assert host["LogConfig"]["Config"] == {"max-file": "5", "max-size": "10m"}, service
    # By what runs, not by what was asked for.
    for service in SERVICES:
        pid = site.container(service)["State"]["Pid"]
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^CapEff:\s*0{16}$", status, re.MULTILINE), service
        root = re.search(r"^Uid:\s*0\s", status, re.MULTILINE)
        # Its image keeps the models in root's folder.
        assert bool(root) == service.startswith("ollama"), service


def test_ports_are_published_as_they_should_be(site: Site) -> None:
    published = {
        binding["HostPort"]: binding["HostIp"]
        for service in SERVICES
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


def test_valkey_has_a_password_that_no_inspection_shows(site: Site) -> None:
    password = (site.folder / "secrets/valkey-password").read_text().strip()
    assert len(password) >= 32
    everything = site.docker("inspect", *site.docker("ps", "-aq").split())
    assert password not in everything
    for service in SERVICES:
        pid = site.container(service)["State"]["Pid"]
        for name in ("environ", "cmdline"):
            assert password.encode() not in Path(f"/proc/{pid}/{name}").read_bytes(), f"{service}: {name}"
    asked = "docker compose exec -T redis sh -c '{}valkey-cli -e ping'"
    refused = site.shell(asked.format(""))
    assert refused.returncode != 0 and "NOAUTH" in refused.stdout + refused.stderr
    given = "REDISCLI_AUTH=$(cat /run/secrets/valkey-password) "
    assert site.do(asked.format(given)).strip() == "PONG"
    # Those who use it have it: its INFO reaches Prometheus through control.
    until(lambda: site.corral("status")["store"]["valkey"]["state"] == "ready", "control has it", every=0.5)
    until(lambda: _value(site, "corral_valkey_clients") > 0, "Prometheus has its INFO", SLOW, every=1.0)


def _value(site: Site, name: str) -> float:
    answer = httpx.get(site.url("PROMETHEUS_PORT") + "/api/v1/query", params={"query": name}, timeout=30).json()
    return max((float(row["value"][1]) for row in answer["data"]["result"]), default=0.0)


def test_what_needs_no_way_out_has_none(site: Site) -> None:
    def internal(service: str) -> dict[str, bool]:
        networks = site.container(service)["NetworkSettings"]["Networks"]
        found = {name: site.docker("network", "inspect", "-f", "{{.Internal}}", name).strip() for name in networks}
        return {name.removeprefix(f"{PROJECT}_"): value == "true" for name, value in found.items()}

    assert internal("ollama-1") == {"nodes": True, "egress": False}
    assert internal("control") == {"backend": True, "nodes": True, "data": True, "database": True, "edge": False}
    for service in ("api-gateway-1", "api-gateway-2", "redis", "postgres"):
        assert all(internal(service).values()), service


def test_monitoring_finds_everything_it_is_told_of(site: Site) -> None:
    def up() -> set[tuple[str, str]]:
        answer = httpx.get(site.url("PROMETHEUS_PORT") + "/api/v1/targets", timeout=30).json()
        return {(target["labels"]["job"], target["health"]) for target in answer["data"]["activeTargets"]}

    jobs = {"ollama", "api-gateway", "haproxy", "control", "redis", "postgres"}
    until(lambda: up() == {(job, "up") for job in jobs}, "every job is scraped", SLOW, every=1.0)
    rules = httpx.get(site.url("PROMETHEUS_PORT") + "/api/v1/rules", timeout=SLOW).json()["data"]["groups"]
    assert rules
    managers = httpx.get(site.url("PROMETHEUS_PORT") + "/api/v1/alertmanagers", timeout=SLOW).json()["data"]
    assert [manager["url"] for manager in managers["activeAlertmanagers"]] == ["http://alertmanager:9093/api/v2/alerts"]
    password = (site.folder / "secrets/grafana-admin-password").read_text().strip()
    for given, status in ((password, 200), ("admin", 401)):
        answer = httpx.get(site.url("GRAFANA_PORT") + "/api/datasources", auth=("admin", given), timeout=SLOW)
        assert answer.status_code == status
    assert "haproxy_process" in httpx.get(site.url("CORRAL_STATS_PORT") + "/metrics", timeout=SLOW).text
