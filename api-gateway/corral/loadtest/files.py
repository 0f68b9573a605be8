"""Where a run leaves its result: result.json and report.html in a folder of its own."""

from __future__ import annotations

import time
from pathlib import Path

from corral.loadtest import report, result
from corral.loadtest.errors import LoadTestError
from corral.loadtest.result import Result


def folder(given: str | None) -> Path:
    """The folder, made before the run so that a run is not lost to it. LoadTestError where it cannot be."""
    path = Path(given or time.strftime("loadtest-%Y%m%d-%H%M%S"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadTestError(f"{path} cannot be made: {error.strerror}") from None
    return path


def save(path: Path, found: Result) -> tuple[Path, Path]:
    """Write both; their paths."""
    data, page = path / result.FILE, path / "report.html"
    try:
        data.write_bytes(result.encode(found))
        page.write_text(report.page(found), encoding="utf-8")
    except OSError as error:
        raise LoadTestError(f"{error.filename} cannot be written: {error.strerror}") from None
    return data, page
