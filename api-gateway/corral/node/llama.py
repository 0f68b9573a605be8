"""The real back end: models run by llama.cpp, each in a runner process of its own (see ``runner``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec

from corral.node import gguf
from corral.node.errors import NodeError
from corral.node.models import Model
from corral.node.options import Options
from corral.node.runners import BROKEN, STOPPED, TOO_LONG, Completion, Piece, Runner, truncated

_BATCH = 64
# llama.cpp wants room beyond the prompt, and rounds contexts up to this.
_CONTEXT_STEP = 256
_PACKAGES = str(Path(__file__).resolve().parents[2])


class LlamaBackend:
    """Makes runners. ``threads`` is what each of them computes with; sockets are in a private folder."""

    def __init__(self, threads: int) -> None:
        _sweep()
        self._threads = threads
        self._folder = Path(tempfile.mkdtemp(prefix=f"corral-node-{os.getpid()}-"))
        self._made = 0

    def runner(self, model: Model, options: Options, parallel: int) -> Runner:
        self._made += 1
        return LlamaRunner(model, options, parallel, self._threads, self._folder / f"{self._made}.sock")

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _sweep() -> None:
    """Remove socket folders of nodes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob("corral-node-*-*"):
        pid = folder.name.split("-")[2]
        with contextlib.suppress(OSError):
            if pid.isdigit() and folder.stat().st_uid == os.getuid() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(folder, ignore_errors=True)


class LlamaRunner:
    """A model in a process. ``size`` estimates its memory in bytes: weights and attention cache."""

    vram = 0

    def __init__(self, model: Model, options: Options, parallel: int, threads: int, socket: Path) -> None:
        assert model.path is not None
        head = gguf.read(model.path)
        self._context = options.num_ctx
        room = (options.num_ctx // _CONTEXT_STEP + 1) * _CONTEXT_STEP
        self.size = model.size + head.cache_bytes(room) * parallel
        self.slots = parallel
        self._socket = socket
        self._config = {
            "model": str(model.path),
            "socket": str(socket),
            "parallel": parallel,
            "context": room,
            "batch": max(32, min(options.num_batch, _BATCH)),
            "threads": options.num_thread or threads,
            "pools": head.embeds_only,
            "parent": os.getpid(),
        }
        self._process: asyncio.subprocess.Process | None = None
        self._client: httpx.AsyncClient | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        path = os.pathsep.join(filter(None, (_PACKAGES, os.environ.get("PYTHONPATH"))))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "corral.node.runner", json.dumps(self._config)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if line.strip() != b"ready":
            status = await self._process.wait()
            raise NodeError(500, f"llama runner process has terminated: exit status {status}")
        # No idle connections: each would hold one of llama.cpp's few HTTP threads.
        transport = httpx.AsyncHTTPTransport(uds=str(self._socket), limits=httpx.Limits(max_keepalive_connections=0))
        self._client = httpx.AsyncClient(transport=transport, base_url="http://runner", timeout=None)

    async def close(self) -> None:
        """Kill the process: it holds nothing that is not also on disk, and a hung one obeys nothing less."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._client is not None:
            await self._client.aclose()
        self._socket.unlink(missing_ok=True)

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        assert self._client is not None
        try:
            answer = await self._client.post(path, content=msgspec.json.encode(body))
        except httpx.TransportError:
            raise NodeError(500, STOPPED) from None
        if answer.status_code != 200:
            raise _failure(answer.content)
        return msgspec.json.decode(answer.content)

    async def tokenize(self, text: str) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": True}
        tokens: list[int] = (await self._post("/tokenize", body))["tokens"]
        return tokens

    async def detokenize(self, tokens: list[int]) -> str:
        text: str = (await self._post("/detokenize", {"tokens": tokens}))["content"]
        return text

    async def embed(self, text: str) -> tuple[list[float], int]:
        tokens = await self.tokenize(text)
        if not tokens:
            raise NodeError(500, "Failed to create new sequence: no input provided")
        if len(tokens) > self._context:
            raise NodeError(400, TOO_LONG)
        answer = await self._post("/embedding", {"content": tokens, "embd_normalize": -1})
        return answer[0]["embedding"][0], len(tokens)

    async def complete(self, request: Completion) -> AsyncIterator[Piece]:
        tokens = await self.tokenize(request.prompt)
        tokens = truncated(tokens, self._context, request.options.num_keep, request.truncate)
        body = _completion_body(request, tokens, self._context)
        assert self._client is not None
        started = False
        try:
            async with self._client.stream("POST", "/completion", content=msgspec.json.encode(body)) as answer:
                if answer.status_code != 200:
                    raise _failure(await answer.aread())
                started = True
                async for event in _events(answer):
                    if "error" in event:
                        raise NodeError(500, str(event["error"].get("message", event["error"])))
                    piece = _piece(event, len(tokens), request.logprobs)
                    if piece.text or piece.done or piece.logprobs:
                        yield piece
                    if piece.done:
                        return
        except httpx.TransportError:
            raise NodeError(500, BROKEN if started else STOPPED) from None
        raise NodeError(500, BROKEN)


def _completion_body(request: Completion, tokens: list[int], context: int) -> dict[str, Any]:
    options = request.options
    # Ollama's bound on an answer without one, so that a model that never ends does end.
    limit = options.num_predict
    if limit <= 0 or limit > 10 * context:
        limit = 10 * context
    if not request.shift:
        limit = max(1, min(limit, context - len(tokens) + 1))
    body: dict[str, Any] = {
        "prompt": tokens,
        "stream": True,
        "return_progress": True,  # writes during prompt processing are how llama.cpp notices a client that left
        "cache_prompt": True,
        "n_predict": limit,
        "n_keep": max(-1, options.num_keep),
        "seed": options.seed,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "typical_p": options.typical_p,
        "repeat_last_n": max(0, options.repeat_last_n),  # -1 is none to Ollama's runner, whatever its documents say
        "repeat_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "stop": options.stop,
        "preserved_tokens": options.stop,  # special tokens among them must show up as text to be found
    }
    if request.schema is not None:
        body["json_schema"] = {**request.schema, "x-guidance": {"whitespace_flexible": False}}
    if request.logprobs is not None:
        body["n_probs"] = max(1, request.logprobs)
    return body


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for chunk in answer.aiter_raw():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield msgspec.json.decode(line[6:])
            elif line.startswith(b"error: "):
                yield {"error": msgspec.json.decode(line[7:])}


def _piece(event: dict[str, Any], prompt_tokens: int, logprobs: int | None) -> Piece:
    found = event.get("completion_probabilities") if logprobs is not None else None
    piece = Piece(event.get("content", ""), logprobs=[_logprob(entry, logprobs) for entry in found] if found else None)
    if event.get("stop"):
        timings = event.get("timings", {})
        piece.done = True
        piece.reason = "length" if event.get("stop_type") == "limit" else "stop"
        piece.prompt_tokens = prompt_tokens
        piece.prompt_ns = int(timings.get("prompt_ms", 0) * 1e6)
        piece.tokens = event.get("tokens_predicted", 0)
        # The first token counts as reading the prompt, so one alone took no time (and is left out, as Ollama does).
        piece.eval_ns = int(timings.get("predicted_ms", 0) * 1e6) if piece.tokens > 1 else 0
    return piece


def _logprob(entry: dict[str, Any], top: int | None) -> dict[str, Any]:
    found = {"token": entry["token"], "logprob": entry["logprob"]}
    if entry.get("bytes"):
        found["bytes"] = entry["bytes"]
    if top:
        found["top_logprobs"] = [_logprob(other, None) for other in entry.get("top_logprobs", ())[:top]]
    return found


def _failure(content: bytes) -> NodeError:
    """A NodeError for what llama.cpp refused."""
    try:
        error = msgspec.json.decode(content)["error"]
        message, status = str(error["message"]), int(error["code"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return NodeError(500, content.decode("utf-8", "replace").strip())
    if "context size" in message:
        return NodeError(400, TOO_LONG)
    if "grammar" in message or "schema" in message.lower():
        return NodeError(500, "invalid JSON schema in format")
    return NodeError(status if status >= 500 else 500, message)
