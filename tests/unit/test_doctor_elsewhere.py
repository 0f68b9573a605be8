"""What `corral doctor` says of an installation that runs elsewhere: what its control tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corral.stack import doctor
from corral.stack.state import StackError, StateFolder

NODE = {"name": "n1", "url": "http://n1:11434", "state": "ready", "version": "0.17.4", "reason": None, "models": ["m"]}


def aside(*names: str) -> dict[str, Any]:
    """A gateway that put segments aside."""
    return {"name": "g1", "state": "ready", "aside": {"count": len(names), "names": list(names)}}


def told(**changes: Any) -> dict[str, Any]:
    whole = {
        "gateways": [{"name": "g1", "state": "ready"}],
        "store": {"valkey": {"state": "ready"}, "database": {"state": "ready"}},
        "alerts": [],
    }
    return {"/status": {**whole, **changes}, "/nodes": [NODE], "/models/plan": {"catalogue": 0}}


def levels(tmp_path: Path, answers: dict[str, Any]) -> dict[str, str]:
    found = doctor.examine(StateFolder(tmp_path), lambda path: answers[path])
    assert all(item.advice for item in found if item.level != "ok")
    return {item.check: item.level for item in found}


def test_all_is_well(tmp_path: Path) -> None:
    """Programs and folders of this machine say nothing of it."""
    assert levels(tmp_path, told()) == dict.fromkeys(["control", "g1", "valkey", "database", "n1"], "ok")


@pytest.mark.parametrize(
    ("changes", "check", "level"),
    [
        ({"gateways": [{"name": "g1", "state": "down"}]}, "g1", "problem"),
        ({"gateways": [{"name": "g1", "state": "ready", "store": False}]}, "g1", "warning"),
        ({"gateways": []}, "gateways", "problem"),
        ({"store": {"valkey": {"state": "down"}, "database": {"state": "ready"}}}, "valkey", "problem"),
        ({"gateways": [aside("1.corrupt", "2.torn")]}, "spool of g1", "problem"),
        ({"audit": {"checkpoint": 3, "stranger": "ab"}}, "audit", "problem"),
        ({"gateways": [aside("2.torn")]}, "spool of g1", "warning"),
        ({"alerts": [{"name": "NodeDown", "summary": "a node is down"}]}, "alert", "warning"),
    ],
)
def test_what_is_wrong(tmp_path: Path, changes: dict[str, Any], check: str, level: str) -> None:
    assert levels(tmp_path, told(**changes))[check] == level


def test_a_node_that_is_down(tmp_path: Path) -> None:
    down = {**NODE, "name": "n2", "state": "down", "reason": "it does not answer"}
    found = levels(tmp_path, told() | {"/nodes": [NODE, down]})
    assert (found["n1"], found["n2"], "nodes" in found) == ("ok", "warning", False)


@pytest.mark.parametrize(
    ("nodes", "level"),
    [
        ([], "problem"),
        ([{**NODE, "state": "down"}], "problem"),
        ([{**NODE, "state": "draining"}], "problem"),
        ([{**NODE, "models": []}], "warning"),
    ],
)
def test_a_fleet_that_serves_nobody(tmp_path: Path, nodes: list[Any], level: str) -> None:
    assert levels(tmp_path, told() | {"/nodes": nodes})["nodes"] == level


def test_an_edge_that_does_not_answer(tmp_path: Path) -> None:
    def ask(path: str) -> Any:
        raise StackError("no")

    found = doctor.examine(StateFolder(tmp_path), ask)
    assert {item.level for item in found} == {"problem"}
