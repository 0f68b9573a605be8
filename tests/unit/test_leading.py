"""Who leads among control processes."""

from __future__ import annotations

from typing import Any

from corral.control.leading import Leading


def test_no_leader_is_missing_where_none_is_wanted() -> None:
    nothing: Any = None
    leading = Leading(nothing, nothing, nothing, nothing)
    assert leading.missing
    leading.leads = True
    assert not leading.missing
    leading.leads = leading.wanted = False
    assert not leading.missing
