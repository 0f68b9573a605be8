"""A control that shows the same again and again: who reads it all comes to an end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from corral.cli.audit import CHECKPOINTS, PAGE, _all, _Api, _checkpoints
from corral.stack.state import StackError


class Liar:
    """Answers each question for a page with the same one."""

    def __call__(self, method: str, path: str, timeout: float = 0.0) -> dict[str, Any]:
        if path == "/audit/chain":
            told = {"public_key": "", "checkpoint": 0, "fields": ["id", "pos"]}
            return {**told, "streams": {}, "outside": 0, "older": 0}
        if path == "/status":
            return {"audit": {"checkpoint": CHECKPOINTS}}
        return {"audit": [{"seq": number} for number in range(1, PAGE + 1)]}

    def raw(self, path: str) -> bytes:
        if path.startswith("/audit/checkpoints"):
            return b"\n".join(b'{"number":%d}' % number for number in range(CHECKPOINTS))
        return msgspec.json.encode({"records": [["a", 1, None], ["b", 2, None]], "kept": {}})


def test_an_export_ends() -> None:
    with pytest.raises(StackError, match=f"behind {PAGE} are not in their order"):
        list(_all(Liar(), {}))  # type: ignore[arg-type]


def test_a_check_ends() -> None:
    source = _Api(Liar())  # type: ignore[arg-type]
    assert [row["pos"] for row in source.records("g", 0, 5)] == [1, 2]
    with pytest.raises(StackError, match="behind 2 are not in their order"):
        source.records("g", 2, 5)


def test_fetching_checkpoints_ends() -> None:
    with pytest.raises(StackError, match="the same checkpoints again"):
        _checkpoints(Liar(), 0)  # type: ignore[arg-type]
