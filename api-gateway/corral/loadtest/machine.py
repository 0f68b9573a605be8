"""What a run ran on: software and machine, without the machine's name."""

from __future__ import annotations

import os
import platform
import resource
from importlib import metadata
from pathlib import Path

from corral import __version__


def versions() -> dict[str, str]:
    """Corral, Python and what the client is made of."""
    found = {"corral": __version__, "python": platform.python_version()}
    for name in ("uvloop", "httptools", "msgspec"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Processor, cores this process may use, memory, system."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        "memory": _memory(),
        "system": f"{_field('/etc/os-release', 'PRETTY_NAME') or platform.system()}, kernel {platform.release()}",
    }


def raise_file_limit(wanted: int) -> int:
    """Allow this process ``wanted`` open files if it may; how many it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.replace("=", ":", 1).partition(":")
        if key.strip() == name:
            return value.strip().strip('"')
    return ""


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (OSError, ValueError):
        return "unknown"
