"""benchmarks/request: the gateway without a record that it compares with can be made of today's sources."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from unrecorded import UNRECORDED, without_record  # noqa: E402


@pytest.mark.parametrize("name", UNRECORDED)
def test_what_it_changes_is_there(name: str) -> None:
    ast.parse(without_record(name))
