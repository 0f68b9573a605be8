"""Other ways to write a path, each of which some server once took for the path itself; and requests as raw bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping


def tricks(path: str) -> Iterator[str]:
    """Targets that are not `path`, but like it."""
    head, _, last = path.rpartition("/")
    yield "/" + path
    yield f"{head}//{last}"
    yield path + "/"
    yield path + "//"
    yield path + "/."
    yield path + "/x/.."
    yield "/." + path
    yield "/x/.." + path
    yield "/%2e" + path
    yield "/x/%2e%2e" + path
    yield "/x/..%2f" + path[1:]
    yield f"{head}%2f{last}"
    yield f"{head}%2F{last}"
    yield f"{head}\\{last}"
    yield f"{head}%5c{last}"
    yield f"{head}/%{ord(last[0]):x}{last[1:]}"
    yield f"{head}/%25{ord(last[0]):x}{last[1:]}"
    yield "/" + path[1:].upper()
    yield path[:1] + path[1:].capitalize()
    yield path + "%00"
    yield path + "%20"
    yield path + ";a=b"
    yield path + "%3f"
    yield path + "#a"
    yield path + "/%c0%af"
    yield path[1:]
    yield "*"


def absolute(path: str) -> str:
    """The form that proxies are sent."""
    return "http://node-1" + path


def ask(port: int, method: str, target: str, headers: Mapping[str, str], body: object = None) -> int:
    """The status of one request on a connection of its own, its target sent as it is; 0 where it is closed on us."""
    sent = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {target} HTTP/1.1", f"Content-Length: {len(sent)}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in ({"Host": "corral"} | dict(headers)).items()]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + sent)
        answer = b""
        try:
            while data := connection.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
