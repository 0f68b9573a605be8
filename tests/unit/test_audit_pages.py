"""A control that shows the same records again and again: who reads them all comes to an end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from corral.cli.audit import PAGE, _all, _Api
from corral.stack.state import StackError


class Liar:
    """Answers each question for a page with the same one."""

    def __call__(self, method: str, path: str, timeout: float = 0.0) -> dict[str, Any]:
        if path == "/audit/chain":
            told = {"public_key": "", "checkpoint": 0, "fields": ["id", "pos"]}
            return {**told, "streams": {}, "outside": 0, "older": 0}
        return {"audit": [{"seq": number} for number in range(1, PAGE + 1)]}

    def raw(self, path: str) -> bytes:
        return msgspec.json.encode({"records": [["a", 1, None], ["b", 2, None]], "kept": {}})


def test_an_export_ends() -> None:
    with pytest.raises(StackError, match=f"behind {PAGE} are not in their order"):
        list(_all(Liar(), {}))  # type: ignore[arg-type]


def test_a_check_ends() -> None:
    source = _Api(Liar())  # type: ignore[arg-type]
    assert [row["pos"] for row in source.records("g", 0, 5)] == [1, 2]
    with pytest.raises(StackError, match="behind 2 are not in their order"):
        source.records("g", 2, 5)
