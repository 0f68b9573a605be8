"""The state folder: everything a stack keeps, private to its user."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Linux takes 108 bytes with the closing zero; HAProxy adds ".<pid>.tmp" while it binds.
SOCKET_PATH_MAX = 90


class StackError(Exception):
    """Why a stack cannot start, stop or be asked, in a sentence for its operator."""


STOPPING = "stopping"
"""The state of a stack, in stack.json, that was told to end."""


@dataclass(frozen=True)
class StateFolder:
    """Where things lie below ``root`` (absolute)."""

    root: Path

    @classmethod
    def locate(cls, given: str | None, env: Mapping[str, str]) -> StateFolder:
        """``--state``, ``$CORRAL_STATE``, ``$XDG_STATE_HOME/corral`` or ``~/.local/state/corral``."""
        if chosen := given or env.get("CORRAL_STATE"):
            return cls(Path(chosen).expanduser().resolve())
        base = env.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
        return cls((Path(base) / "corral").resolve())

    def option(self, env: Mapping[str, str]) -> str:
        """What a command needs to mean this folder: `` --state DIR``, or nothing where it does without."""
        return "" if self == StateFolder.locate(None, env) else f" --state {shlex.quote(str(self.root))}"

    def nothing_runs(self, more: str) -> StackError:
        """What a command says that needs a stack, where none runs; ``more`` goes on after what starts one."""
        starts = f"`corral up{self.option(os.environ)}`"
        return StackError(f"nothing runs with the state folder {self.root}: {starts}{more}")

    def create(self) -> None:
        """Make what is missing, mode 700. StackError if it is another's."""
        for folder in self._folders:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if folder.stat().st_uid != os.getuid():
                    raise StackError(f"{folder} belongs to another user: choose a folder with --state")
                folder.chmod(0o700)
            except OSError as error:
                raise StackError(f"{folder} cannot be made: {error.strerror}") from None

    def remove_empty(self, root: bool) -> None:
        """Remove the folders in it that hold nothing, and with `root` itself, where nothing is left."""
        for folder in reversed(self._folders if root else self._folders[1:]):
            with contextlib.suppress(OSError):
                folder.rmdir()

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.root, self.run, self.programs, self.logs, self.spool, self.cache, self.models

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def programs(self) -> Path:
        return self.run / "programs"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def admin_key(self) -> Path:
        return self.root / "admin.key"

    @property
    def pepper(self) -> Path:
        return self.root / "pepper"

    @property
    def internal_token(self) -> Path:
        return self.root / "internal.token"

    @property
    def settings(self) -> Path:
        return self.root / "corral.yaml"

    @property
    def stack_file(self) -> Path:
        return self.run / "stack.json"

    @property
    def given(self) -> Path:
        """What the stack was started with, for `corral config reload`."""
        return self.run / "given.json"

    @property
    def ports_file(self) -> Path:
        return self.run / "ports.json"

    @property
    def haproxy_config(self) -> Path:
        return self.run / "haproxy.cfg"

    @property
    def haproxy_plan(self) -> Path:
        return self.run / "haproxy.json"

    def socket(self, name: str) -> Path:
        """A path for a unix socket: in run/, or in a private folder of the system's where run/ is too deep."""
        path = self.run / name
        if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
            return path
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"corral-{os.getuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        seen = folder.lstat()
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o077:
            raise StackError(f"{folder} is not private to this user: remove it, or choose a shorter --state")
        return folder / name

    def remove_sockets(self) -> None:
        """Remove the sockets of a stack that has stopped."""
        for name in ("supervisor.sock", "haproxy.sock", "master.sock"):
            path = self.socket(name)
            path.unlink(missing_ok=True)
            if path.parent != self.run and not any(path.parent.iterdir()):
                path.parent.rmdir()

    def stack(self) -> dict[str, Any] | None:
        """stack.json: what runs; None where nothing was started."""
        return read_json(self.stack_file)

    @property
    def stopping(self) -> bool:
        """Whether what runs is being stopped."""
        return (self.stack() or {}).get("state") == STOPPING


class Lock:
    """One stack per state folder. Held by `up` and, inherited, by the supervisor: until both have ended.

    ``claims`` are what keeps the stack's addresses (ports.claim), held for as long.
    """

    def __init__(self, state: StateFolder) -> None:
        self._path = state.run / "lock"
        self.fd = -1
        self.claims: list[socket.socket] = []

    @property
    def fds(self) -> tuple[int, ...]:
        """What the supervisor inherits."""
        return (self.fd, *(claim.fileno() for claim in self.claims))

    def acquire(self) -> bool:
        """Take it; False if another has it."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            # The last holder removes the file: what was opened may be gone by now.
            try:
                current = os.stat(self._path).st_ino == os.fstat(fd).st_ino
            except FileNotFoundError:
                current = False
            if current:
                self.fd = fd
                return True
            os.close(fd)

    def remove(self) -> None:
        """Give it up for good; no file is left. Needs to be held."""
        self._free()  # before another can have the folder
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let this process's hold go; the supervisor may keep its own."""
        self._free()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _free(self) -> None:
        while self.claims:
            self.claims.pop().close()


def running(state: StateFolder) -> bool:
    """Whether a stack (or its start) holds the state folder."""
    if not (state.run / "lock").exists():
        return False
    lock = Lock(state)
    if not lock.acquire():
        return True
    lock.close()
    return False


def read_json(path: Path) -> dict[str, Any] | None:
    """An object from a file; None if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_private(path: Path, text: str) -> None:
    """Replace a file whole, mode 600."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(fresh, path)
