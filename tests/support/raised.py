"""The errors that a route of control may answer, by its source: each `Problem` of what it calls by name."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from corral.control.context import Control
from corral.control.errors import Problem
from corral.control.operations import Operations
from corral.control.preload import Preloader

_LATE = {"Operations": Operations, "Preloader": Preloader}
"""What the parts are that `Control` knows by their names alone."""


def statuses(route: Callable[..., Any]) -> set[str]:
    """Those of a function, and of what it calls or hands on."""
    found: set[str] = set()
    seen: set[Any] = set()
    rest = [(inspect.unwrap(route), None)]
    while rest:
        function, owner = rest.pop()
        if function in seen or not (function.__module__ or "").startswith("corral.control"):
            continue
        seen.add(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        names = function.__globals__
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and names.get(node.func.id) is Problem:
                found |= {str(one.value) for one in ast.walk(node.args[0]) if isinstance(one, ast.Constant)}
        rest += _named(tree, names, owner)
    return found


def _named(tree: ast.AST, names: dict[str, Any], owner: type | None) -> Iterator[tuple[Any, type | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(names.get(node.id), FunctionType):
            yield names[node.id], None
        if not isinstance(node, ast.Attribute):
            continue
        base, value = node.value, None
        if isinstance(base, ast.Name):
            value = owner if base.id == "self" else names.get(base.id)
        elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and base.value.id == "control":
            value = _part(base.attr)
        function = getattr(value, node.attr, None)
        if isinstance(value, type | ModuleType) and isinstance(function, FunctionType):
            yield function, value if isinstance(value, type) else None


def _part(name: str) -> Any:
    told = Control.__annotations__.get(name, "")
    return _LATE.get(told) or getattr(inspect.getmodule(Control), str(told), None)
