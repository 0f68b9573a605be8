"""haproxy.cfg: the committed default, HAProxy's own check, and names that cannot break out of their line."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import certifi
import pytest

from corral.config.haproxy import DEFAULT, HaproxyPlan, render

COMMITTED = Path(__file__).resolve().parents[2] / "load-balancer/haproxy.cfg"


def check(haproxy: str, folder: Path, plan: HaproxyPlan) -> str:
    path = folder / "haproxy.cfg"
    path.write_text(render(plan))
    done = subprocess.run([haproxy, "-c", "-f", path], capture_output=True, text=True, timeout=20)
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
        {"stats_socket": '/tmp/a folder/it\'s "here"#1/h.sock'},
    ],
    ids=["default", "no-nodes", "300-nodes", "names-and-tls", "8-gateways", "ipv6", "odd-path"],
)
def test_haproxy_accepts_it_without_a_warning(haproxy: str, tmp_path: Path, change: dict[str, object]) -> None:
    said = check(haproxy, tmp_path, dataclasses.replace(DEFAULT, **change))  # type: ignore[arg-type]
    assert "WARNING" not in said


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
