"""The file of a backup: a tar of the members, encrypted by age, in a tar that says how to open it.

Outside, in clear: ``identity.age`` (only with a passphrase: an age identity made for this one backup, encrypted with
the passphrase) and ``backup.tar.age``. Inside: ``corral-backup.json`` first, the members, and ``manifest.json`` last,
with size and SHA-256 of each. All of it opens with the standard programs::

    tar xf FILE && age -d -i identity.age backup.tar.age | tar x

Everything streams: memory does not grow with what is backed up.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyrage

from corral.backup import passphrase
from corral.backup.streams import Bounded, Hashing, Sink, Whole
from corral.store.disk import sync_folder

FORMAT = 1
HEADER, MANIFEST = "corral-backup.json", "manifest.json"
IDENTITY, PAYLOAD = "identity.age", "backup.tar.age"
DRAFT = ".backup-part"
CHUNK = 1 << 20
SMALL = 64 << 20

_MEMBER = re.compile(r"(?!.*(?:^|/)\.{1,2}(?:/|$))[A-Za-z0-9._@+:=-][A-Za-z0-9._@+:=/-]*[A-Za-z0-9._@+:=-]", re.ASCII)
_END = bytes(2 * tarfile.BLOCKSIZE)


class BackupError(Exception):
    """Why a backup cannot be made, read or restored, in one line for its operator."""


@dataclass(frozen=True)
class Secrets:
    """What a backup is encrypted for, or opened with: a passphrase, or age's recipients and identities."""

    passphrase: str | None = None
    recipients: tuple[pyrage.x25519.Recipient, ...] = ()
    identities: tuple[pyrage.x25519.Identity, ...] = ()


@dataclass
class Contents:
    """What a whole, checked backup holds: its header, and of each member the size and SHA-256."""

    header: dict[str, Any]
    members: dict[str, tuple[int, str]] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)

    def small_json(self, name: str) -> Any:
        """A small member's value."""
        return json.loads(self.small[name])


class Writer:
    """Writes a backup beside `path`, of mode 600, and gives it its name once it is whole and on the disk."""

    def __init__(self, path: Path, secrets: Secrets, header: dict[str, Any]) -> None:
        self.path = path
        self._manifest: dict[str, dict[str, Any]] = {}
        recipients = list(secrets.recipients)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sweep(path.parent)
            descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=DRAFT)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise BackupError(f"{path}: cannot be written: {error.strerror}") from None
        self._draft = Path(draft)
        self._sink = Sink(os.fdopen(descriptor, "w+b"))
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None
        try:
            protected = None
            if secrets.passphrase is not None:
                identity = pyrage.x25519.Identity.generate()
                recipients.append(identity.to_public())
                protected = passphrase.encrypt(f"{identity}\n".encode(), secrets.passphrase)
                self._sink.write(_outer_header(IDENTITY, len(protected)) + protected + _padding(len(protected)))
            self._start = self._sink.file.tell()
            self._sink.write(bytes(tarfile.BLOCKSIZE))
            reading, writing = os.pipe()
            self._thread = threading.Thread(target=self._encrypt, args=(reading, recipients), daemon=True)
            self._thread.start()
            self._pipe = os.fdopen(writing, "wb", buffering=0)
            whole: Any = Whole(self._pipe)
            self._tar = tarfile.open(fileobj=whole, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
            digest = hashlib.sha256(protected).hexdigest() if protected is not None else None
            self.add(HEADER, _json({"format": FORMAT, **header, "identity": digest}))
        except BaseException as error:
            self.abandon()
            raise self._explain(error) from None

    def add(self, name: str, data: bytes) -> None:
        """Add a member."""
        self.stream(name, len(data), io.BytesIO(data))

    def stream(self, name: str, size: int, source: BinaryIO) -> str:
        """Add a member of `size` bytes that `source` has; its SHA-256.

        Raises:
            BackupError: `source` has less, or the file cannot be written.
        """
        assert _MEMBER.fullmatch(name) and name not in self._manifest, name
        hashing = Hashing(source, size)
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o600
        try:
            self._tar.addfile(info, hashing)
        except EOFError:
            raise BackupError(f"{name} became shorter while it was read: try again") from None
        except OSError as error:
            raise self._explain(error) from None
        digest = hashing.digest.hexdigest()
        self._manifest[name] = {"size": size, "sha256": digest}
        return digest

    def finish(self) -> int:
        """Complete the file, put it on the disk and give it its name; its size in bytes."""
        try:
            self.add(MANIFEST, _json({name: entry for name, entry in self._manifest.items() if name != MANIFEST}))
            self._tar.close()
            self._pipe.close()
            assert self._thread is not None
            self._thread.join()
            if self._failed is not None:
                raise self._failed
            file = self._sink.file
            size = file.tell() - self._start - tarfile.BLOCKSIZE
            self._sink.write(_padding(size) + _END)
            total = file.tell()
            file.seek(self._start)
            self._sink.write(_outer_header(PAYLOAD, size))
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._draft, self.path)
            sync_folder(self.path.parent)
        except (OSError, pyrage.EncryptError) as error:
            raise self._explain(error) from None
        return total

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._thread is not None:
            with contextlib.suppress(OSError, AttributeError):
                self._pipe.close()
            self._thread.join()
        with contextlib.suppress(OSError):
            self._sink.file.close()
        self._draft.unlink(missing_ok=True)

    def _encrypt(self, reading: int, recipients: list[pyrage.x25519.Recipient]) -> None:
        with os.fdopen(reading, "rb", buffering=0) as source:
            try:
                pyrage.encrypt_io(source, self._sink, recipients)
            except Exception as error:
                self._failed = error

    def _explain(self, error: BaseException) -> BaseException:
        """The reason behind an error: of a pipe that broke, what broke it."""
        if isinstance(error, BrokenPipeError) and self._thread is not None:
            self._thread.join()
        cause = self._sink.error or (error if isinstance(error, OSError) else None)
        if cause is not None:
            return BackupError(f"{self.path}: cannot be written: {cause.strerror or cause}")
        return BackupError(f"{self.path}: cannot be encrypted: {error}") if self._failed is error else error


Take = Callable[[str, int, BinaryIO], None]
"""Hears of each member: name, size, and its bytes, of which it reads what it needs."""


def read(
    path: Path, secrets: Secrets, take: Take | None = None, progress: Callable[[int], None] = lambda size: None
) -> Contents:
    """Decrypt a backup from its first byte to its last, and check all of it.

    `take` sees members before the rest is checked; without it, nothing comes out but what was checked.

    Raises:
        BackupError: wrong passphrase or identity, damaged, cut short, or not a backup.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file, secrets, take, progress)
    except OSError as error:
        raise BackupError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(path: Path, file: BinaryIO, secrets: Secrets, take: Take | None, progress: Callable[[int], None]) -> Contents:
    total = os.fstat(file.fileno()).st_size
    protected, size = _outside(path, file)
    start = file.tell()
    if total != start + size + len(_padding(size)) + len(_END):
        raise BackupError(f"{path}: is damaged: its length is not what its head says")
    file.seek(start + size)
    if file.read().strip(b"\0"):
        raise BackupError(f"{path}: is damaged at its end")
    file.seek(start)
    identities = _identities(path, protected, secrets)
    reading, writing = os.pipe()
    failed: list[Exception] = []

    def decrypt() -> None:
        with os.fdopen(writing, "wb", buffering=0) as sink:
            try:
                pyrage.decrypt_io(Bounded(file, size, progress), Whole(sink), identities)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=decrypt, daemon=True)
    thread.start()
    problem: Exception | None = None
    contents = None
    with os.fdopen(reading, "rb", buffering=0) as source:
        try:
            contents = _inside(path, source, take)
            while source.read(CHUNK):
                pass  # age's last word is at the end
        except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError) as error:
            problem = error
            with contextlib.suppress(OSError):
                while source.read(CHUNK):
                    pass
        except BaseException:
            source.close()
            thread.join()
            raise
    thread.join()
    if failed:
        raise BackupError(f"{path}: {_refusal(failed[0])}")
    if problem is not None or contents is None:
        raise BackupError(f"{path}: is damaged: {problem}")
    given = hashlib.sha256(protected).hexdigest() if protected is not None else None
    if contents.header.get("identity") != given:
        raise BackupError(f"{path}: is damaged: its identity is another backup's")
    return contents


def _outside(path: Path, file: BinaryIO) -> tuple[bytes | None, int]:
    """The protected identity, if there is one, and the payload's size; the file is then at the payload."""
    protected = None
    while True:
        block = file.read(tarfile.BLOCKSIZE)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, ValueError):
            raise BackupError(f"{path}: is no backup, or its head is damaged") from None
        if block != _outer_header(info.name, info.size) or info.name not in (IDENTITY, PAYLOAD):
            raise BackupError(f"{path}: is no backup, or its head is damaged")
        if info.name == PAYLOAD:
            return protected, info.size
        if protected is not None or info.size > CHUNK:
            raise BackupError(f"{path}: is no backup, or its head is damaged")
        protected = file.read(info.size)
        if file.read(len(_padding(info.size))).strip(b"\0"):
            raise BackupError(f"{path}: its head is damaged")


def _identities(path: Path, protected: bytes | None, secrets: Secrets) -> list[pyrage.x25519.Identity]:
    found = list(secrets.identities)
    if protected is not None and secrets.passphrase is not None:
        try:
            found.append(_unlocked(protected, secrets.passphrase))
        except (pyrage.IdentityError, ValueError):
            if not found:
                raise BackupError(f"{path}: the passphrase is wrong, or the file is damaged") from None
    if not found:
        wanted = "its passphrase (--passphrase-file)" if protected is not None else "an --identity of its recipients"
        raise BackupError(f"{path}: is encrypted: give {wanted}")
    return found


@functools.lru_cache(maxsize=4)
def _unlocked(protected: bytes, given: str) -> pyrage.x25519.Identity:
    # It takes a second, on purpose, and a restore reads its file twice.
    return pyrage.x25519.Identity.from_str(passphrase.decrypt(protected, given).decode().strip())


def _inside(path: Path, source: BinaryIO, take: Take | None) -> Contents:
    contents: Contents | None = None
    manifest: dict[str, Any] | None = None
    with tarfile.open(fileobj=source, mode="r|") as tar:
        for info in tar:
            if manifest is not None or not info.isreg() or not _MEMBER.fullmatch(info.name):
                raise ValueError(f"the member {info.name!r}")
            opened = tar.extractfile(info)
            assert opened is not None
            hashing = Hashing(opened, info.size)  # type: ignore[arg-type]
            if contents is None:
                contents = Contents(_header(path, info.name, hashing.read(SMALL)))
            elif info.name == MANIFEST:
                manifest = json.loads(hashing.read(SMALL))
                continue
            elif info.name in contents.members:
                raise ValueError(f"the member {info.name!r} comes twice")
            elif take is not None:
                take(info.name, info.size, hashing)  # type: ignore[arg-type]
            elif info.name.endswith((".json", ".yaml")) and info.size <= SMALL:
                contents.small[info.name] = hashing.read(SMALL)
            while hashing.read(CHUNK):
                pass
            contents.members[info.name] = (info.size, hashing.digest.hexdigest())
            tar.members = []  # type: ignore[attr-defined]  # else it keeps each one's header
    if contents is None or manifest is None:
        raise ValueError("it ends before its manifest")
    told = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    if told != contents.members:
        raise ValueError("its members are not those of its manifest")
    for name, (_, digest) in contents.members.items():
        if "/sha256-" in name and name.rpartition("/sha256-")[2] != digest:
            raise ValueError(f"{name} is not what its name says")
    return contents


def _header(path: Path, name: str, data: bytes) -> dict[str, Any]:
    if name != HEADER:
        raise ValueError("it does not begin with its header")
    header: dict[str, Any] = json.loads(data)
    if header["format"] > FORMAT:
        raise BackupError(
            f"{path}: is of format {header['format']}, made by Corral {header.get('version')}; this Corral reads "
            f"formats up to {FORMAT}: use the newer Corral"
        )
    return header


def _refusal(error: Exception) -> str:
    if isinstance(error, pyrage.DecryptError) and "No matching keys" in str(error):
        return "is not encrypted for this passphrase or identity, or is damaged"
    return "is damaged or cut short: it does not decrypt to its end"


def _outer_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT)


def _sweep(folder: Path) -> None:
    """Remove drafts whose makers are dead: each holds a lock on its own."""
    for path in folder.glob(f".*{DRAFT}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def nameable(name: str) -> bool:
    """Whether a member may be called so."""
    return _MEMBER.fullmatch(name) is not None
