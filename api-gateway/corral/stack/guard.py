"""Starts one program of a stack: ``python -I -S guard.py SPEC.json``. Standard library alone; it starts fast.

What an earlier run of the same program left behind is ended first (a killed `ollama serve` leaves its runners).
The kernel ends the program when the supervisor dies, so that nothing is left even after ``kill -9``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
STACK = "CORRAL_STACK"
PROGRAM = "CORRAL_PROGRAM"


def left_behind(stack: str, program: str | None = None) -> list[int]:
    """Pids of this user's processes that were started for ``stack`` (and ``program``), this one excepted."""
    wanted = {f"{STACK}={stack}".encode()}
    if program is not None:
        wanted.add(f"{PROGRAM}={program}".encode())
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if wanted <= set(file.read().split(b"\0")):
                        found.append(int(name))
            except OSError:
                continue
    return found


def stack_of(pid: int) -> str:
    """The state folder of the stack that a process was started for; "" of any other."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            for entry in file.read().split(b"\0"):
                if entry.startswith(f"{STACK}=".encode()):
                    return os.fsdecode(entry.partition(b"=")[2])
    except OSError:
        pass
    return ""


def die_with_parent(number: int, parent: int) -> None:
    """Have the kernel send this process a signal when ``parent`` dies; it survives exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def main() -> None:
    parent = os.getppid()
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    environment = spec["env"]
    for pid in left_behind(environment[STACK], environment[PROGRAM]):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    die_with_parent(spec["death_signal"], parent)
    if spec["cpus"]:
        os.sched_setaffinity(0, spec["cpus"])
    # A preference, not a need: where memory ends, the kernel takes a node before the data plane.
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(spec["oom_score_adj"]))
    except OSError:
        pass
    os.execvpe(spec["argv"][0], spec["argv"], environment)


if __name__ == "__main__":
    main()
