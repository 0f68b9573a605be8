"""What `corral doctor` says of the catalogue."""

from __future__ import annotations

from typing import Any

import pytest

from corral.stack.doctor import _catalogue
from corral.stack.state import StackError


def plan(*steps: tuple[str, str], problems: tuple[str, ...] = (), catalogue: int = 1) -> dict[str, Any]:
    listed = [{"action": action, "node": "n1", "model": "m:1", "reason": reason} for action, reason in steps]
    return {"steps": listed, "problems": list(problems), "catalogue": catalogue}


@pytest.mark.parametrize(
    ("made", "levels"),
    [
        (plan(catalogue=0), []),
        (plan(), ["ok"]),
        (plan(("pull", "not held"), ("load", "copy 1 of 1")), ["warning"]),
        (plan(("pull", "digest differs: recorded A, held B")), ["problem"]),
        (plan(("copy", "digest differs: stated A, held B"), ("load", "copy 1 of 1")), ["problem", "warning"]),
        (plan(problems=("n2: m:1: the node is down",)), ["warning"]),
    ],
)  # fmt: skip
def test_findings(made: dict[str, Any], levels: list[str]) -> None:
    found = list(_catalogue(lambda path: made if path == "/models/plan" else None))
    assert [item.level for item in found] == levels
    assert all(item.advice for item in found if item.level != "ok")


def test_control_that_does_not_answer_is_a_problem() -> None:
    def ask(path: str) -> Any:
        raise StackError("no")

    assert [item.level for item in _catalogue(ask)] == ["problem"]
