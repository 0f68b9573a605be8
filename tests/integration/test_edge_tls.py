"""`corral up` with a certificate and with the front end for other programs."""

from __future__ import annotations

import csv
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from support.process import free_port, until
from support.servers import certificate
from support.stack import Stack, corral


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def edge(pem: Path, start_stack: Callable[..., Stack]) -> Iterator[tuple[Stack, int, int]]:
    """The stack, its TLS port, and that of the front end for other programs."""
    tls, other = free_port(), free_port()
    config = pem.with_name("corral.yaml")
    settings = {"edge": {"certificate": str(pem), "tls_port": tls, "ollama": f"127.0.0.1:{other}"}}
    config.write_text(yaml.safe_dump(settings))
    yield start_stack("--config", str(config), "--nodes", "2", "--node-backend", "simulated"), tls, other


def test_tls_is_of_today_and_speaks_http_1_alone(edge: tuple[Stack, int, int], pem: Path) -> None:
    stack, tls, _ = edge
    trusting = ssl.create_default_context(cafile=str(pem))
    with httpx.Client(base_url=f"https://localhost:{tls}", verify=trusting) as client:
        assert client.get("/api/tags", headers=stack.headers()).status_code == 200
        assert client.get("/api/tags").status_code == 401
    trusting.set_alpn_protocols(["h2", "http/1.1"])
    for newest, version in ((ssl.TLSVersion.TLSv1_3, "TLSv1.3"), (ssl.TLSVersion.TLSv1_2, "TLSv1.2")):
        trusting.maximum_version = newest
        with (
            socket.create_connection(("127.0.0.1", tls), 60) as plain,
            trusting.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            assert (secured.version(), secured.selected_alpn_protocol()) == (version, "http/1.1")
            cipher = secured.cipher()
            assert cipher and ("GCM" in cipher[0] or "CHACHA20" in cipher[0])


def test_tls_of_yesterday_is_refused(edge: tuple[Stack, int, int]) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.options &= ~(ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1)
    with pytest.warns(DeprecationWarning):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", edge[1]), 60) as plain, pytest.raises((ssl.SSLError, ConnectionError)):
        old.wrap_socket(plain)


def test_the_front_end_for_other_programs_asks_no_key_and_lets_through_inference_alone(
    edge: tuple[Stack, int, int],
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{edge[2]}", timeout=60) as client:
        model = client.get("/api/tags").json()["models"][0]["name"]
        body = {"model": model, "prompt": "a", "stream": False, "options": {"num_predict": 2}}
        assert client.post("/api/generate", json=body).json()["done"]
        for method, path in (
            *(("POST", f"/api/{verb}") for verb in ("pull", "push", "create", "copy")),
            *(
                ("DELETE", "/api/delete"),
                ("POST", "/api/blobs/sha256:0"),
                ("GET", "/api/generate"),
                ("PUT", "/api/tags"),
            ),
            *(("GET", "/metrics"), ("GET", "/admin/keys"), ("GET", "/v1/models/%2e%2e/x"), ("POST", "/api/tags")),
        ):
            answer = client.request(method, path, json={"model": model})
            assert answer.status_code == 404 and answer.headers["x-corral-proxy"] == "haproxy", path


def test_a_drained_node_gets_nothing_by_it_either(edge: tuple[Stack, int, int]) -> None:
    stack, _, port = edge

    def served() -> dict[str, int]:
        answer = httpx.get(stack.corral("status")["stats_url"] + "/;csv", timeout=60)
        rows = csv.DictReader(answer.text.lstrip("# ").splitlines())
        return {row["svname"]: int(row["stot"]) for row in rows if row["pxname"] == "ollama" and row["stot"]}

    def gets(node: str) -> bool:
        """Whether a node gets some of six requests, or of those before: counted anew since the last reload."""
        for _ in range(6):
            assert httpx.get(f"http://127.0.0.1:{port}/api/version", timeout=60).status_code == 200
        return served()[node] > 0

    assert gets("node-1")
    stack.corral("nodes", "drain", "node-1", "--wait")
    # For a moment the old worker may take connections, which the new one does not count.
    until(lambda: gets("node-2"), "the other one has all of them")
    assert served()["node-1"] == 0
    stack.corral("nodes", "resume", "node-1")
    until(lambda: gets("node-1"), "it gets some again")


def test_a_port_that_is_taken_is_named(pem: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = tmp_path / "corral.yaml"
        config.write_text(yaml.safe_dump({"edge": {"certificate": str(pem), "tls_port": port}}))
        with pytest.raises(AssertionError, match=f"port {port} is taken by .*edge.tls_port"):
            corral(
                "up", "--detach", "--config", str(config), "--port", str(free_port()), "--state", str(tmp_path / "s")
            )
