"""What is written in C, compiled for a test."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[2] / "api-gateway" / "corral"


def load(source: str, folder: Path) -> ModuleType:
    """The extension module that a file of the package (``wire/_scan.c``) makes; every warning is an error.

    CFLAGS of the environment are added: ``CFLAGS=-fsanitize=address,undefined`` and ``LD_PRELOAD`` of libasan watch
    each access of its memory.
    """
    path = PACKAGE / source
    made = folder / f"{path.stem}.so"
    headers = sysconfig.get_path("include")
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    flags = ["-O2", "-shared", "-fPIC", *warnings, *os.environ.get("CFLAGS", "").split(), f"-I{headers}"]
    subprocess.run([os.environ.get("CC", "gcc"), *flags, "-o", made, path], check=True)
    spec = spec_from_file_location(path.stem, made, loader=ExtensionFileLoader(path.stem, str(made)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
