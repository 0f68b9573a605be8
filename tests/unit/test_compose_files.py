"""docker-compose.yml, .env.example and docs/compose.md say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.config.settings import load
from corral.config.values import duration
from corral.stack.plan import GATEWAY_STOPS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
PAGE = (ROOT / "docs/compose.md").read_text()


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(TEXT)
    return read


def test_env_example_has_each_setting_with_its_default() -> None:
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT))
    listed = dict(re.findall(r"^#?([A-Z]\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert listed.pop("CORRAL_SECRETS") == "./secrets"
    assert listed.pop("COMPOSE_FILE") == "docker-compose.yml:compose.cpu.yml"
    assert listed == used


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        tag = service["image"].partition(":")[2]
        assert "build" in service or re.fullmatch(r"v?\d+\.\d+[\w.-]*", tag), f"{name}: {service['image']}"


def test_every_root_is_read_only_and_no_capability_is_kept(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_the_page_names_every_port_secret_and_volume(compose: dict[str, Any]) -> None:
    for setting, default in re.findall(r"\$\{(\w+_PORT):-(\d+)\}", TEXT):
        assert f"| `{setting}` | {default} |" in PAGE
    for name in compose["secrets"]:
        assert f"| `{name}` |" in PAGE
    for name in compose["volumes"]:
        general = re.sub(r"^(ollama|api-gateway)-[0-9]", r"\1-N", name)
        assert f"| `{general}` |" in PAGE


def test_docker_kills_no_gateway_that_drains(compose: dict[str, Any]) -> None:
    for name in ("api-gateway-1", "api-gateway-2"):
        grace = re.fullmatch(r"\$\{GATEWAY_STOP_GRACE_PERIOD:-(\w+)\}", compose["services"][name]["stop_grace_period"])
        assert grace is not None
        # What takes its time besides: HAProxy hears of it, and records go out.
        drain = load(ROOT / "deploy/compose/corral.yaml", {}).gateway.longest_drain
        assert duration(grace[1]) >= drain + GATEWAY_STOPS


def test_with_one_gpu_the_second_node_waits_to_be_asked_for(compose: dict[str, Any]) -> None:
    changed = yaml.safe_load((ROOT / "compose.one-gpu.yml").read_text())["services"]
    assert changed == {"ollama-2": {"profiles": ["ollama-2"]}}
    assert not [name for name, service in compose["services"].items() if "ollama-2" in service.get("depends_on", {})]
    listed = yaml.safe_load((ROOT / "deploy/compose/corral.yaml").read_text())["nodes"]
    assert [node["name"] for node in listed] == ["ollama-1", "ollama-2"], "so the page says which line goes"


def test_without_a_gpu_no_node_reserves_one(compose: dict[str, Any]) -> None:
    reserving = {name for name, service in compose["services"].items() if "deploy" in service}
    freed = re.findall(r"^  (\S+): \{deploy: \{resources: \{reservations: \{devices: !reset \[\]\}\}\}\}$",
                       (ROOT / "compose.cpu.yml").read_text(), re.MULTILINE)  # fmt: skip
    assert reserving == set(freed) == {"ollama-1", "ollama-2", "ollama-3"}


def test_with_the_setting_no_network_of_a_node_leads_out_or_to_the_machine() -> None:
    """That Docker makes such networks of it is seen in tests/deploy."""

    def ways(setting: str) -> list[tuple[bool, str]]:
        read = yaml.safe_load(TEXT.replace("${CORRAL_NODES_INTERNAL:-false}", setting))
        found = []
        for name in ("ollama-1", "ollama-2", "ollama-3"):
            of = [read["networks"][network] for network in read["services"][name]["networks"]]
            found += [(one["internal"], one["driver_opts"]["com.docker.network.bridge.inhibit_ipv4"]) for one in of]
        return found

    assert ways("true") == [(True, "true")] * 6
    assert ways("false") == [(True, "false"), (False, "false")] * 3
