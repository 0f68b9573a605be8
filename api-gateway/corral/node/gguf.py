"""The head of a GGUF file: its metadata and its list of tensors (never the weights)."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip
_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16",
}  # fmt: skip


class NotGguf(Exception):
    """The file is no GGUF, or is cut off."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """``values``: the metadata, arrays whole; ``tensors``: name, type and shape as /api/show lists them."""

    values: dict[str, Any]
    tensors: list[dict[str, Any]]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", "unknown"))

    def key(self, name: str, default: Any = None) -> Any:
        """The value of ``<architecture>.<name>``."""
        return self.values.get(f"{self.architecture}.{name}", default)

    @property
    def context_length(self) -> int:
        return int(self.key("context_length", 0))

    @property
    def parameters(self) -> int:
        return sum(prod(tensor["shape"]) for tensor in self.tensors)

    @property
    def quantization(self) -> str:
        return _FILE_TYPES.get(self.values.get("general.file_type", -1), "unknown")

    @property
    def chat_template(self) -> str:
        return str(self.values.get("tokenizer.chat_template", ""))

    @property
    def embeds_only(self) -> bool:
        """A model that states how to pool is one for embeddings, and for nothing else (Ollama's rule)."""
        return self.key("pooling_type") is not None

    def cache_bytes(self, context: int) -> int:
        """Bytes of the half-precision attention cache for ``context`` tokens."""
        heads = int(self.key("attention.head_count", 0)) or 1
        kv_heads = self.key("attention.head_count_kv", heads)
        kv_heads = max(kv_heads) if isinstance(kv_heads, list) else int(kv_heads)
        width = int(self.key("embedding_length", 0)) // heads * kv_heads
        return int(self.key("block_count", 0)) * context * width * 4


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise NotGguf("file is cut off")
        self._at += size
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SCALARS:
                code = f"<{count}{_SCALARS[inner][1]}"
                return list(struct.unpack(code, self.take(struct.calcsize(code))))
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise NotGguf(f"unknown value type {kind}")
        return self.number(_SCALARS[kind])


def is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC


@lru_cache(maxsize=8)
def read(path: Path) -> Gguf:
    """Read the head of the GGUF at ``path``; cached, since blobs never change. Raises NotGguf, OSError."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise NotGguf("not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data))


def _read(reader: _Reader) -> Gguf:
    reader.take(4)
    if reader.number("<I") < 2:
        raise NotGguf("GGUF version 1 is not supported")
    tensor_count, value_count = reader.number("<Q"), reader.number("<Q")
    values = {}
    for _ in range(value_count):
        name = reader.text()
        values[name] = reader.value(reader.number("<I"))
    tensors = []
    for _ in range(tensor_count):
        name = reader.text()
        shape = [reader.number("<Q") for _ in range(reader.number("<I"))]
        kind = reader.number("<I")
        reader.number("<Q")
        tensors.append({"name": name, "type": _TENSOR_TYPES.get(kind, "unknown"), "shape": shape})
    return Gguf(values, tensors)


def human_count(number: int) -> str:
    """A parameter count as Ollama shows it: 134515008 is "134.52M"."""
    for size, letter, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if number >= size:
            value = number / size
            return f"{value:.0f}{letter}" if value == int(value) else f"{value:.{digits}f}{letter}"
    return str(number)
