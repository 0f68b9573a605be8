"""haproxy.cfg: the committed default, HAProxy's own check, and names that cannot break out of their line."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import certifi
import pytest
from support.servers import certificate

from corral.config.haproxy import DEFAULT, HaproxyPlan, render
from corral.config.settings import load
from corral.control.haproxy import plan_of

COMMITTED = Path(__file__).resolve().parents[2] / "load-balancer/haproxy.cfg"


def check(haproxy: str, folder: Path, plan: HaproxyPlan) -> str:
    path = folder / "haproxy.cfg"
    path.write_text(render(plan))
    done = subprocess.run([haproxy, "-c", "-f", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_committed_file_is_the_default_rendering() -> None:
    assert COMMITTED.read_text() == render(DEFAULT), "python -m corral.config.haproxy > load-balancer/haproxy.cfg"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"nodes": []},
        {"nodes": [(f"node-{number}", f"http://10.0.{number // 250}.{number % 250}:11434") for number in range(300)]},
        {
            "nodes": [
                ("a", "http://ollama.internal:11434"),
                ("b", "https://gpu.example"),
                ("c", "http://[::1]:11434"),
            ],
            "ca_file": certifi.where(),
        },
        {"gateways": [(f"gateway-{number}", "127.0.0.1", 8081 + number) for number in range(8)]},
        {"edge_host": "::1", "max_duration": 7200.5},
        {"gateways": [("gateway-1", "api-gateway-1", 8081)], "control": ("control", 8090)},
        {"ollama": ("127.0.0.1", 11434)},
        {"stats_socket": '/tmp/a folder/it\'s "here"#1/h.sock'},
    ],
    ids=["default", "no-nodes", "300-nodes", "names-and-tls", "8-gateways", "ipv6", "by-name", "ollama", "odd-path"],
)
def test_haproxy_accepts_it_without_a_warning(haproxy: str, tmp_path: Path, change: dict[str, object]) -> None:
    said = check(haproxy, tmp_path, dataclasses.replace(DEFAULT, **change))  # type: ignore[arg-type]
    assert "WARNING" not in said


def test_it_accepts_a_certificate_without_a_warning(haproxy: str, tmp_path: Path) -> None:
    pem = certificate(tmp_path / "a folder")
    assert "WARNING" not in check(haproxy, tmp_path, dataclasses.replace(DEFAULT, certificate=str(pem)))


@pytest.mark.parametrize("host", ["api-gateway-1", "10.0.0.7"])
def test_names_are_looked_up_again_and_again(host: str) -> None:
    text = render(dataclasses.replace(DEFAULT, gateways=[("gateway-1", host, 8081)], control=(host, 8090), nodes=[]))
    servers = [line for line in text.splitlines() if line.startswith("    server ")]
    assert len(servers) == 2
    assert all(("resolvers system" in line) == (host == "api-gateway-1") for line in servers)
    assert ("resolvers system\n    parse-resolv-conf" in text) == (host == "api-gateway-1")


def test_the_plan_of_a_container_is_what_corral_yaml_says() -> None:
    settings = load(COMMITTED.parents[1] / "deploy/compose/corral.yaml", {})
    plan = plan_of(settings)
    assert plan.gateways == [("api-gateway-1", "api-gateway-1", 8081), ("api-gateway-2", "api-gateway-2", 8081)]
    assert (plan.edge_host, plan.edge_port, plan.tls_port) == ("0.0.0.0", 8080, 8443)
    assert plan.certificate == "/run/secrets/tls.pem"
    assert plan.ollama == ("0.0.0.0", 11434)
    assert plan.control == ("control-backend", 8090)
    assert plan.nodes == [("ollama-1", "http://ollama-1:11434"), ("ollama-2", "http://ollama-2:11434")]


def test_time_outs_are_above_the_longest_request() -> None:
    text = render(dataclasses.replace(DEFAULT, max_duration=90.2))
    assert "timeout server 151s" in text
    assert "timeout client 151s" in text


@pytest.mark.parametrize(
    "node",
    [
        ("a\n    http-request deny", "http://10.0.0.1"),
        ("a b", "http://10.0.0.1"),
        ("", "http://10.0.0.1"),
        ("a", "http://10.0.0.1/path"),
        ("a", "http://10.0.0.1\n    bind :1"),
        ("a", "http://10.0.0.1 backup"),
    ],
)
def test_nothing_breaks_out_of_its_line(node: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"cannot stand|expected"):
        render(dataclasses.replace(DEFAULT, nodes=[node]))
