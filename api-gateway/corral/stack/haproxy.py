"""Asking the stack's HAProxy over its sockets."""

from __future__ import annotations

import csv
import socket
from pathlib import Path

from corral.stack.state import StackError, StateFolder


def server_states(state: StateFolder) -> dict[str, str]:
    """Node → UP or DOWN as HAProxy's checks see it. Raises OSError."""
    table = csv.DictReader(_call(state.socket("haproxy.sock"), "show stat").lstrip("# ").splitlines())
    return {
        str(row["svname"]): str(row["status"]).split()[0]
        for row in table
        if str(row["pxname"]).startswith("node_") and row["svname"] not in ("BACKEND", "FRONTEND")
    }


def reload(state: StateFolder) -> None:
    """Have HAProxy read its configuration anew; running streams end where they are. StackError if it refuses."""
    try:
        answer = _call(state.socket("master.sock"), "reload")
    except OSError as error:
        raise StackError(f"HAProxy does not answer ({error}): is the stack running?") from None
    if not answer.startswith("Success=1"):
        raise StackError(f"HAProxy refuses its configuration: {answer}")


def _call(path: Path, command: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        connection.sendall(command.encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)  # the master would wait for more
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode(errors="replace")
