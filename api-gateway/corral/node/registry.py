"""The model folder, laid out as Ollama lays out its own (``blobs`` and ``manifests``), so both can use it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from corral.fleet import smollm2
from corral.node import gguf, names, prompt
from corral.node.errors import NodeError
from corral.node.models import Model, newest_first
from corral.node.names import Name

_LAYER = "application/vnd.ollama.image."
_CONFIG = "application/vnd.docker.container.image.v1+json"
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}\Z")
_CHUNK = 1 << 20

Layer = dict[str, Any]


class Registry:
    """The models in ``folder``. Files are written whole and renamed, so several nodes may share a folder."""

    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.manifests = folder / "manifests"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.manifests.mkdir(parents=True, exist_ok=True)
        self._cache: dict[Path, tuple[int, Model]] = {}

    # --- reading

    def find(self, text: str) -> Model | None:
        name = self.existing(names.parse(text))
        return self._load(name) if name.valid else None

    def existing(self, name: Name) -> Name:
        """``name`` with the upper and lower case of the parts that exist in the folder."""
        parts: list[str] = []
        at = self.manifests
        for part in name.path:
            exact = at / part
            if not exact.exists() and at.is_dir():
                part = next((p.name for p in at.iterdir() if p.name.lower() == part.lower()), part)
            parts.append(part)
            at = at / part
        return Name(*parts)

    def all(self) -> list[Model]:
        found = []
        for path in self.manifests.glob("*/*/*/*"):
            name = Name(*path.relative_to(self.manifests).parts)
            if name.valid and (model := self._load(name)):
                found.append(model)
        return newest_first(found)

    def information(self, model: Model, verbose: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        assert model.path is not None
        head = gguf.read(model.path)
        values = {
            key: value if verbose or not isinstance(value, list) else None
            for key, value in head.values.items()
            if key not in ("general.name", "tokenizer.chat_template")
        }
        values["general.parameter_count"] = head.parameters
        if (vocabulary := head.values.get("tokenizer.ggml.tokens")) is not None:
            values.setdefault(f"{head.architecture}.vocab_size", len(vocabulary))
        return dict(sorted(values.items())), head.tensors

    def _load(self, name: Name) -> Model | None:
        path = self.manifests.joinpath(*name.path)
        try:
            changed = path.stat().st_mtime_ns
            cached = self._cache.get(path)
            if cached and cached[0] == changed:
                return cached[1]
            data = path.read_bytes()
            model = self._parse(name, data, changed)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        self._cache[path] = (changed, model)
        return model

    def _parse(self, name: Name, data: bytes, changed: int) -> Model:
        manifest = json.loads(data)
        layers: list[Layer] = manifest["layers"]
        config = json.loads(self.path(manifest["config"]["digest"]).read_bytes())
        texts: dict[str, list[str]] = {}
        blob: Path | None = None
        parent = ""
        for layer in layers:
            kind, path = layer["mediaType"].removeprefix(_LAYER), self.path(layer["digest"])
            if kind == "model":
                blob, parent = path, layer.get("from", "")
            elif kind in ("template", "system", "params", "messages", "license"):
                texts.setdefault(kind, []).append(path.read_text("utf-8"))
        head = gguf.read(blob) if blob else None
        return Model(
            name=name,
            digest=hashlib.sha256(data).hexdigest(),
            size=sum(layer["size"] for layer in layers) + manifest["config"]["size"],
            modified_ns=changed,
            details={
                "parent_model": "",
                "format": config.get("model_format", ""),
                "family": config.get("model_family", ""),
                "families": config.get("model_families"),
                "parameter_size": config.get("model_type", ""),
                "quantization_level": config.get("file_type", ""),
            },
            path=blob,
            template=texts.get("template", [prompt.PLAIN])[-1],
            system=texts.get("system", [""])[-1],
            parameters=json.loads(texts["params"][-1]) if "params" in texts else {},
            messages=tuple(json.loads(texts["messages"][-1])) if "messages" in texts else (),
            licenses=tuple(texts.get("license", ())),
            parent=parent,
            context_length=head.context_length if head else 0,
            embeds_only=head.embeds_only if head else False,
        )

    # --- blobs

    def path(self, digest: str) -> Path:
        """Where the blob ``digest`` is or would be. Raises NodeError for what is no digest."""
        if not _DIGEST.match(digest):
            raise NodeError(400, "invalid digest format")
        return self.blobs / digest.replace(":", "-")

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Incoming]:
        """A new blob to write into; it exists once ``keep`` was called, else it is removed."""
        handle, name = tempfile.mkstemp(prefix="sha256-incoming-", dir=self.blobs)
        try:
            with os.fdopen(handle, "wb") as file:
                yield Incoming(file, Path(name))
        finally:
            Path(name).unlink(missing_ok=True)

    def put(self, data: bytes, kind: str) -> Layer:
        """Store ``data`` as a layer of media type ``kind``."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        known = path.exists()
        if not known:
            with self.incoming() as blob:
                blob.write(data)
                blob.keep(path)
        return {"mediaType": kind, "digest": digest, "size": len(data), "known": known}

    def adopt(self, file: Path) -> str:
        """Make ``file`` a blob, without a second copy where the file system can; returns the digest."""
        with file.open("rb") as source:
            digest = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
        target = self.path(digest)
        if not target.exists():
            handle, name = tempfile.mkstemp(prefix="sha256-incoming-", dir=self.blobs)
            os.close(handle)
            scratch = Path(name)
            try:
                scratch.unlink()
                os.link(file, scratch)
            except OSError:
                shutil.copyfile(file, scratch)
            scratch.rename(target)
        return digest

    # --- writing

    def layers_of(self, digest: str) -> list[Layer]:
        """The layers of a model made from the GGUF blob ``digest``: it, its template and its stop strings.

        Raises NodeError with Ollama's texts if the blob is missing or is no GGUF.
        """
        try:
            path = self.path(digest)
        except NodeError as error:
            raise NodeError(500, error.message) from None
        if not path.exists():
            raise NodeError(500, f"open {path}: no such file or directory")
        try:
            head = gguf.read(path)
        except gguf.NotGguf:
            raise NodeError(400, "supplied file was not in GGUF format") from None
        layers = [{"mediaType": _LAYER + "model", "digest": digest, "size": path.stat().st_size, "known": True}]
        known = prompt.detect(head.chat_template)
        if known:
            template, stop = known
            layers.append(self.put(template.encode(), _LAYER + "template") | {"note": "chatml"})
            layers.append(self.put(_json({"stop": stop}), _LAYER + "params"))
        return layers

    def layers_from(self, model: Model) -> list[Layer]:
        """The layers of ``model``, for a new model that starts from it."""
        manifest = json.loads(self.manifests.joinpath(*model.name.path).read_bytes())
        return [
            {**layer, "known": True, **({"from": model.name.short} if layer["mediaType"] == _LAYER + "model" else {})}
            for layer in manifest["layers"]
        ]

    def customise(self, layers: Sequence[Layer], changes: Mapping[str, Any]) -> list[Layer]:
        """``layers`` with what /api/create asks for: template, system, license, parameters and messages."""
        kept = list(layers)

        def replace(kind: str, data: bytes) -> None:
            kept[:] = [layer for layer in kept if layer["mediaType"] != _LAYER + kind]
            kept.append(self.put(data, _LAYER + kind))

        for kind in ("template", "system"):
            if changes.get(kind):
                replace(kind, changes[kind].encode())
        licenses = changes.get("license") or []
        for text in [licenses] if isinstance(licenses, str) else licenses:
            kept.append(self.put(str(text).encode(), _LAYER + "license"))
        if changes.get("parameters"):
            old = next((layer for layer in kept if layer["mediaType"] == _LAYER + "params"), None)
            before = json.loads(self.path(old["digest"]).read_bytes()) if old else {}
            replace("params", _json(dict(sorted({**before, **changes["parameters"]}.items()))))
        if changes.get("messages"):
            replace("messages", _json(changes["messages"]))
        return kept

    def write(self, name: Name, layers: Sequence[Layer]) -> None:
        """Write the manifest of ``name``, with the configuration that describes its model layer."""
        blob = next(layer["digest"] for layer in layers if layer["mediaType"] == _LAYER + "model")
        head = gguf.read(self.path(blob))
        config = {
            "model_format": "gguf",
            "model_family": head.architecture,
            "model_families": [head.architecture],
            "model_type": gguf.human_count(head.parameters),
            "file_type": head.quantization,
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _bare(self.put(_json(config), _CONFIG)),
            "layers": [_bare(layer) for layer in layers],
        }
        path = self.manifests.joinpath(*name.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(manifest, separators=(",", ":")).encode())

    def copy(self, source: Name, target: Name) -> bool:
        path = self.manifests.joinpath(*source.path)
        if not path.is_file():
            return False
        if source != target:
            to = self.manifests.joinpath(*target.path)
            to.parent.mkdir(parents=True, exist_ok=True)
            _write(to, path.read_bytes())
        return True

    def delete(self, name: Name) -> bool:
        path = self.manifests.joinpath(*name.path)
        if not path.is_file():
            return False
        gone = _digests(json.loads(path.read_bytes()))
        path.unlink()
        for folder in list(path.parents)[:3]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        used = {d for p in self.manifests.glob("*/*/*/*") for d in _digests(json.loads(p.read_bytes()))}
        for digest in gone - used:
            self.path(digest).unlink(missing_ok=True)
        return True

    def ensure(self, name: str, file: Path) -> None:
        """Register SmolLM2's ``file`` as ``name`` if the folder has no model at all."""
        if any(self.manifests.glob("*/*/*/*")):
            return
        changes = {"template": smollm2.TEMPLATE, "parameters": {"stop": smollm2.STOP}}
        self.write(names.parse(name), self.customise(self.layers_of(self.adopt(file)), changes))


class Incoming:
    """A blob being written. ``digest`` is that of what was written so far."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._hash = file, path, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()

    def keep(self, target: Path) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.rename(target)


def _write(path: Path, data: bytes) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent.parent, prefix=".manifest-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    Path(scratch).rename(path)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _bare(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: layer[key] for key in ("mediaType", "digest", "size", "from") if key in layer}


def _digests(manifest: Mapping[str, Any]) -> set[str]:
    layers: Iterable[Mapping[str, Any]] = (*manifest["layers"], manifest["config"])
    return {layer["digest"] for layer in layers}
