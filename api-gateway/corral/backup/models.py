"""Models in a backup: what each node holds, and the files of model folders, each blob once.

A model folder is laid out as Ollama's: ``manifests/HOST/NAMESPACE/MODEL/TAG`` and ``blobs/sha256-HEX``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from corral.backup.archive import BackupError, Writer, nameable
from corral.stack import http

DEPTH = 3
MANIFESTS, BLOBS = "models/manifests", "models/blobs"

Say = Callable[[str], None]


@dataclass
class ModelFiles:
    """The whole models of the folders below one: manifests by their place, blobs by their digest (hexadecimal)."""

    manifests: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, Path] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The models' names, as Ollama writes them."""
        parts = (place.split("/")[-3:] for place in self.manifests)
        return sorted({("" if space == "library" else f"{space}/") + f"{name}:{tag}" for space, name, tag in parts})


def inventory(nodes: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """What each node says it has: names, digests and sizes; ``models`` is null where it does not answer."""
    found = []
    for name, url in nodes:
        models: list[dict[str, Any]] | None = None
        try:
            answer = http.request(url, "GET", "/api/tags", timeout=3.0)
            value = answer.json()
            if answer.status == 200 and isinstance(value, dict):
                listed = [item for item in value.get("models") or [] if isinstance(item, dict)]
                models = [{key: item.get(key) for key in ("name", "digest", "size")} for item in listed]
        except http.Unreachable:
            pass
        found.append({"node": name, "url": url, "models": models})
    return found


def scan(base: Path, say: Say) -> ModelFiles:
    """The models of all folders below `base` that are laid out as Ollama's, those of stopped nodes too."""
    found = ModelFiles()
    for folder in _folders(base, DEPTH):
        below = "" if folder == base else f"{folder.relative_to(base).as_posix()}/"
        for path in sorted((folder / "manifests").glob("*/*/*/*")):
            place = path.relative_to(folder / "manifests").as_posix()
            try:
                data = path.read_bytes()
                digests = digests_of(data)
            except (OSError, ValueError):
                say(f"{path} is no manifest: left out")
                continue
            if not nameable(f"{MANIFESTS}/{below}{place}"):
                say(f"{path} has a name that no model has: left out")
                continue
            missing = [one for one in digests if not (folder / "blobs" / f"sha256-{one}").is_file()]
            if missing:
                say(f"{place} lacks its blob sha256-{missing[0][:12]}…: left out")
                continue
            found.manifests[below + place] = data
            for one in digests:
                found.blobs.setdefault(one, folder / "blobs" / f"sha256-{one}")
                found.users.setdefault(one, place)
    return found


def write(writer: Writer, files: ModelFiles, with_blobs: bool, say: Say) -> int:
    """Add manifests and blobs; bytes of the blobs. Each blob is hashed on its way.

    Raises:
        BackupError: a blob is not what its name says, or the backup cannot be written.
    """
    for place, data in files.manifests.items():
        writer.add(f"{MANIFESTS}/{place}", data)
    if not with_blobs:
        return 0
    sizes = {digest: path.stat().st_size for digest, path in files.blobs.items()}
    progress = Progress("models", sum(sizes.values()), say)
    for digest, path in files.blobs.items():
        with path.open("rb") as source:
            found = writer.stream(f"{BLOBS}/sha256-{digest}", sizes[digest], progress.of(source))
        if found != digest:
            raise BackupError(
                f"{path}: is not what its name says, so {files.users[digest]} is damaged: pull the model again"
            )
    return progress.done


class Progress:
    """Says every few seconds how much of something was read."""

    EVERY = 3.0

    def __init__(self, what: str, total: int, say: Say) -> None:
        self.done, self._what, self._total, self._say = 0, what, total, say
        self._next = time.monotonic() + self.EVERY

    def add(self, size: int) -> None:
        """So many bytes more."""
        self.done += size
        if (now := time.monotonic()) >= self._next:
            self._next = now + self.EVERY
            self._say(f"{self._what}: {self.done / 1e6:.0f} of {self._total / 1e6:.0f} MB")

    def of(self, source: BinaryIO) -> BinaryIO:
        """`source`, whose reads are counted."""
        return _Counted(source, self)  # type: ignore[return-value]


class _Counted:
    def __init__(self, source: BinaryIO, progress: Progress) -> None:
        self._source, self._progress = source, progress

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._progress.add(len(data))
        return data


class Target:
    """Takes manifests and blobs out of a backup into a folder, and lays them out as they were."""

    def __init__(self, base: Path) -> None:
        self._base, self._blobs = base, base / ".blobs"
        self._manifests: dict[str, bytes] = {}

    def manifest(self, place: str, data: bytes) -> None:
        self._manifests[place] = data

    def blob_path(self, name: str) -> Path:
        """Where to write a blob."""
        self._blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._blobs / name).unlink(missing_ok=True)
        return self._blobs / name

    def abandon(self) -> None:
        """Leave no blob that is in no model."""
        shutil.rmtree(self._blobs, ignore_errors=True)

    def lay_out(self) -> None:
        """Put manifests, and links to their blobs, where they were. Without blobs nothing is put anywhere."""
        if not self._blobs.exists():
            return
        for place, data in self._manifests.items():
            *folder, host, namespace, model, tag = place.split("/")
            at = self._base.joinpath(*folder)
            path = at / "manifests" / host / namespace / model / tag
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(data)
            (at / "blobs").mkdir(mode=0o700, exist_ok=True)
            for digest in digests_of(data):
                source, target = self._blobs / f"sha256-{digest}", at / "blobs" / f"sha256-{digest}"
                if not target.exists():
                    _link(source, target)
        shutil.rmtree(self._blobs)


def digests_of(manifest: bytes) -> list[str]:
    """The digests (hexadecimal) of the blobs that a manifest names. ValueError where it is none."""
    try:
        value = json.loads(manifest)
        layers = [value["config"], *(value["layers"] or [])]
        digests = [str(layer["digest"]) for layer in layers]
    except (ValueError, KeyError, TypeError):
        raise ValueError("not a manifest") from None
    found = [digest.removeprefix("sha256:") for digest in digests]
    if not all(len(one) == 64 and set(one) <= set("0123456789abcdef") for one in found):
        raise ValueError("not a manifest")
    return list(dict.fromkeys(found))


def _folders(base: Path, depth: int) -> Iterator[Path]:
    if (base / "manifests").is_dir() and (base / "blobs").is_dir():
        yield base
    elif depth and base.is_dir():
        for path in sorted(base.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from _folders(path, depth - 1)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
