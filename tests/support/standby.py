"""A second control beside a stack's: of the same database, store and nodes, with the same secrets, and no gateway of
its own."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import httpx
import yaml

from corral.stack.state import StateFolder
from support.process import Process, free_port
from support.servers import answers, python_env

SECRETS = ("pepper", "internal.token", "admin.key", "audit.key")


class Standby:
    """Another control, which leads once nobody else does."""

    def __init__(self, stack: Path, folder: Path) -> None:
        """``stack``: the state folder of one that runs; ``folder``: its own, to be made."""
        port, state = free_port(), folder / "state"
        state.mkdir(parents=True)
        for name in SECRETS:
            shutil.copy2(stack / name, state / name)
        settings = yaml.safe_load(StateFolder(stack).settings.read_text())
        own = {"listen": f"127.0.0.1:{port}", "metrics": "", "state": str(state), "haproxy_socket": None}
        settings["control"] |= own
        file = folder / "corral.yaml"
        file.write_text(yaml.safe_dump(settings))
        self.url = f"http://127.0.0.1:{port}"
        argv = [sys.executable, "-P", "-m", "corral", "serve", "control", "--config", file]
        self.process = Process(argv, folder / "control.log", python_env())
        self.process.wait_until(lambda: answers(f"{self.url}/docs"))

    def close(self) -> None:
        """End it as a crash would."""
        self.process.end(signal.SIGKILL)


def leads(url: str, admin_key: str) -> bool:
    """Whether a control says that it leads."""
    headers = {"Authorization": f"Bearer {admin_key}"}
    answer = httpx.get(f"{url}/admin/status", headers=headers, timeout=10, trust_env=False)
    return bool(answer.raise_for_status().json()["control"]["leader"])
