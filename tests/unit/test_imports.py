"""Imports point one way, and the gateway and the control plane never meet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "api-gateway" / "corral"
LOW = frozenset({"fleet", "store", "wire", "config"})
ALLOWED: dict[str, frozenset[str]] = {
    "config": frozenset(),
    "wire": frozenset({"config"}),
    "store": frozenset({"wire", "config"}),
    "fleet": frozenset({"wire", "config"}),
    "gateway": LOW,
    "control": LOW,
    "node": LOW,
    "stack": LOW,
    "backup": LOW | {"stack"},
    # The command line starts each of them.
    "cli": LOW | {"gateway", "control", "node", "stack", "backup", "loadtest"},
    "loadtest": LOW,
    "__main__": frozenset({"cli"}),
    "__init__": frozenset(),
}
"""What each part may import of the others."""


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def _part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of this package's modules, within functions too.

    ``package`` is the dotted package of the file, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "corral" or name.startswith("corral."):
                yield node.lineno, name


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_direction(path: Path) -> None:
    part = _part(path)
    assert part in ALLOWED, f"{part} is a new part: say in this test what it may import"
    package = ".".join(["corral", *path.relative_to(PACKAGE).parent.parts])
    for line, name in imports(path.read_text(encoding="utf-8"), package):
        other = name.partition(".")[2].partition(".")[0]
        if not (PACKAGE / other).is_dir():
            continue  # a name of corral itself, such as __version__
        assert other == part or other in ALLOWED[part], f"{path.name}:{line}: {part} may not import {name}"


def test_gateway_and_control_never_import_each_other() -> None:
    assert "control" not in ALLOWED["gateway"] and "gateway" not in ALLOWED["control"]


def test_relative_and_local_imports_are_seen() -> None:
    source = "def f():\n    from ..control import app\n    import corral.stack.up\n"
    assert [name for _, name in imports(source, "corral.gateway")] == ["corral.control.app", "corral.stack.up"]


@pytest.mark.parametrize("part", ["wire", "fleet"])
def test_pure_parts_do_no_io(part: str) -> None:
    forbidden = {"asyncio", "socket", "subprocess", "httpx", "requests", "sqlalchemy", "hiredis", "uvloop"}
    for path in (PACKAGE / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = {name.partition(".")[0] for name in names} & forbidden
            assert not found, f"{path.name}:{node.lineno}: {part} is pure, and imports {found}"
