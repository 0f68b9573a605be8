"""What is compiled (api-gateway/compile.py), and what must not be."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "api-gateway"
MODULES: tuple[str, ...] = runpy.run_path(str(ROOT / "compile.py"))["MODULES"]


@pytest.mark.parametrize("module", MODULES)
def test_what_is_compiled_has_neither_coroutines_nor_structs(module: str) -> None:
    """mypyc loses a cancellation that meets nested contexts, and msgspec reads annotations that mypyc does not keep."""
    tree = ast.parse((ROOT / "corral" / module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AsyncFunctionDef), f"{module}:{node.lineno} is a coroutine"
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            assert not bases & {"msgspec.Struct", "Struct", "Body"}, f"{module}:{node.lineno} is a struct"


def test_no_two_handlers_of_a_function_share_a_name_for_different_errors() -> None:
    """mypyc gives a name one type for the whole function: the second handler would fail on its error."""
    for module in MODULES:
        for function in ast.walk(ast.parse((ROOT / "corral" / module).read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            kinds: dict[str, set[str]] = {}
            for handler in ast.walk(function):
                if isinstance(handler, ast.ExceptHandler) and handler.name and handler.type is not None:
                    kinds.setdefault(handler.name, set()).add(ast.unparse(handler.type))
            shared = {name: found for name, found in kinds.items() if len(found) > 1}
            assert not shared, f"{module}: {function.name}: {shared}"


def test_all_that_is_written_in_c_is_compiled() -> None:
    native: tuple[str, ...] = runpy.run_path(str(ROOT / "compile.py"))["NATIVE"]
    assert set(native) == {str(path.relative_to(ROOT / "corral")) for path in ROOT.glob("corral/**/*.c")}


@pytest.mark.parametrize("module", MODULES)
def test_no_constant_is_a_tuple_of_fixed_length(module: str) -> None:
    """mypyc 2.4 keeps a `Final` one as a C struct, and one of ten floats it reads as never set."""
    tree = ast.parse((ROOT / "corral" / module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Tuple):
            assert ast.unparse(node.annotation) != "Final", f"{module}:{node.lineno}: say Final[tuple[…, ...]]"
