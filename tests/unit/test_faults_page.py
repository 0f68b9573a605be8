"""docs/faults.md has the rows of the table that the tests of faults print, and names each file of them."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fault_rows import rows

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/faults").glob("test_*.py"))
PAGE = (ROOT / "docs/faults.md").read_text()
ROWS = rows(PAGE)

Pattern = tuple[str, str]


def pattern(node: ast.expr, known: Mapping[str, Any], local: Mapping[str, str]) -> str:
    """What a text comes to, as a regular expression: what only a run knows is anything."""
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part, known, local) for part in node.values)
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value))
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    if isinstance(inner, ast.Name) and inner.id in local:
        return local[inner.id]
    text = ast.JoinedStr([node]) if isinstance(node, ast.FormattedValue) else node
    try:
        return re.escape(str(eval(compile(ast.fix_missing_locations(ast.Expression(text)), "", "eval"), dict(known))))
    except NameError:
        return ".+"


@cache
def printed(file: str) -> list[Pattern]:
    """The faults and bars that a file's tests note."""
    module, found = runpy.run_path(str(ROOT / file)), list[Pattern]()
    for function in ast.parse((ROOT / file).read_text()).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        own = {node.id for node in names} | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        known = {name: value for name, value in module.items() if name not in own}
        local: dict[str, str] = {}
        # In the order in which they are written, not in that of the tree.
        inner = [node for node in ast.walk(function) if isinstance(node, ast.Assign | ast.AugAssign | ast.Call)]
        for node in sorted(inner, key=lambda node: (node.lineno, node.col_offset)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                if isinstance(node.value, ast.JoinedStr | ast.Constant):
                    local[node.targets[0].id] = pattern(node.value, known, local)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id in local:
                local[node.target.id] += pattern(node.value, known, local)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "matrix":
                fault, bar = (pattern(one, known, local) for one in node.args[:2])
                found.append((fault, bar))
    return found


def test_each_file_of_faults_is_named_and_each_that_is_named_is_there() -> None:
    assert sorted(set(re.findall(r"tests/faults/test_\w+\.py", PAGE))) == FILES


@pytest.mark.parametrize("file", FILES)
def test_the_rows_of_a_file_are_those_that_its_tests_print(file: str) -> None:
    there = [(fault, bar) for fault, _, bar, named in ROWS if named == file]
    patterns = printed(file)
    for fault, bar in there:
        assert [one for one in patterns if re.fullmatch(one[0], fault) and re.fullmatch(one[1], bar)], (fault, bar)
    for one in patterns:
        assert [row for row in there if re.fullmatch(one[0], row[0]) and re.fullmatch(one[1], row[1])], one
