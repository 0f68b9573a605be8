"""The simulated back end: models that take the time they are said to take, and say nothing of worth.

A simulated model loads for ``load`` seconds, reads a prompt at ``prefill`` tokens/s and writes at ``decode``
tokens/s, each request by itself, whatever else runs (unless `Simulation` says otherwise). Its text is a function of
all text before it, so that a request with the prompt and the start of an answer continues that answer exactly, as a
real model does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import yaml

from corral.config import values
from corral.node import names, prompt
from corral.node.errors import NodeError
from corral.node.faults import Disconnect, EndWithoutDone, Fault, Faults, NoHttp, endless_head
from corral.node.models import Model, newest_first
from corral.node.names import Name
from corral.node.options import Options
from corral.node.runners import BROKEN, TOO_LONG, Completion, Piece, Runner, truncated
from corral.node.work import Work

_WORDS = (
    "corral", "horse", "river", "stone", "light", "north", "field", "water", "road", "bridge", "garden",
    "window", "paper", "letter", "winter", "summer", "morning", "evening", "market", "harbor", "island",
    "forest", "mountain", "valley", "engine", "signal", "circle", "number", "answer", "question",
)  # fmt: skip
# As a real tokenizer, it joins a space to the word behind it, and a line's end to nothing: a prompt has as many tokens
# with an answer behind it.
_TOKEN = re.compile(r" *(?:<\|\w+\|>|\w+|[^\w\s])|\s")
_WIDTH = 64
_SLOW = ("slow", "cpu")


@dataclass(frozen=True, slots=True)
class Profile:
    """What a simulated model is like: seconds, tokens per second, bytes, tokens of an unbounded answer."""

    name: str
    load: float = 1.0
    prefill: float = 2500.0
    decode: float = 60.0
    slots: int | None = None
    size: int = 4 << 30
    tokens: int = 64
    context: int = 8192


@dataclass(frozen=True, slots=True)
class Simulation:
    """A simulated node: its models, its memory in bytes and how many models it holds at most.

    ``gpu``: it says that models are in a GPU's memory. ``stalls``: while it loads a model, no other one gives a token.
    ``prefill_stalls``: while a model reads a prompt, none of its requests gets a token; it reads any number at once.
    """

    models: tuple[Profile, ...] = (Profile("sim-small"), Profile("sim-large", load=4.0, decode=25.0, size=16 << 30))
    memory: int | None = None
    max_loaded: int | None = None
    gpu: bool = False
    stalls: bool = False
    prefill_stalls: bool = False


def load(source: Path | Mapping[str, Any] | None) -> Simulation:
    """The simulation that a YAML or JSON file (or its content) describes; two models by default.

    Raises ValueError naming what is wrong.
    """
    if source is None:
        return Simulation()
    data = yaml.safe_load(source.read_text("utf-8")) if isinstance(source, Path) else source
    if not isinstance(data, Mapping) or not isinstance(data.get("models"), list):
        raise ValueError("models: a list of models is needed")
    if unknown := set(data) - {"models", "memory", "max_loaded", "gpu", "stalls", "prefill_stalls"}:
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    memory = _bytes(data["memory"]) if data.get("memory") is not None else None
    profiles = tuple(_profile(entry) for entry in data["models"])
    flags = (data.get(name) is True for name in ("gpu", "stalls", "prefill_stalls"))
    return Simulation(profiles, memory, data.get("max_loaded"), *flags)


def _profile(entry: Any) -> Profile:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise ValueError("models: each needs a name")
    if unknown := set(entry) - set(Profile.__dataclass_fields__):
        raise ValueError(f"models: {entry['name']}: unknown field {sorted(map(str, unknown))[0]}")
    given = dict(entry)
    if "size" in given:
        given["size"] = _bytes(given["size"])
    for name, value in given.items():
        if name != "name" and value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"models: {entry['name']}: {name} must be a number")
    return Profile(**given)


def _bytes(value: Any) -> int:
    return values.size(value) if isinstance(value, str) else int(value)


class SimulatedStore:
    """The models of a simulation. Copies and deletions last as long as the process."""

    def __init__(self, simulation: Simulation) -> None:
        self.profiles: dict[str, Profile] = {}
        self._models: dict[Name, Model] = {}
        for profile in simulation.models:
            name = names.parse(profile.name)
            digest = hashlib.sha256(f"simulated {profile}".encode()).hexdigest()
            self.profiles[digest] = profile
            self._models[name] = Model(
                name=name,
                digest=digest,
                size=profile.size,
                modified_ns=time.time_ns(),
                details={
                    "parent_model": "",
                    "format": "simulated",
                    "family": "simulated",
                    "families": ["simulated"],
                    "parameter_size": "1B",
                    "quantization_level": "Q4_0",
                },
                template=prompt.CHATML,
                parameters={"stop": prompt.CHATML_STOP},
                context_length=profile.context,
            )

    def find(self, text: str) -> Model | None:
        wanted = str(names.parse(text)).lower()
        return next((model for name, model in self._models.items() if str(name).lower() == wanted), None)

    def all(self) -> list[Model]:
        return newest_first(list(self._models.values()))

    def copy(self, source: Name, target: Name) -> bool:
        model = self.find(str(source))
        if model is not None:
            self._models[target] = replace(model, name=target, modified_ns=time.time_ns())
        return model is not None

    def delete(self, name: Name) -> bool:
        model = self.find(str(name))
        return model is not None and self._models.pop(model.name) is model

    def information(self, model: Model, verbose: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        information = {
            "general.architecture": "simulated",
            "general.parameter_count": 1_000_000_000,
            "simulated.context_length": model.context_length,
            "simulated.embedding_length": _WIDTH,
        }
        return information, []


class Stall:
    """Work that keeps requests from their tokens while it is under way, where it ``stalls`` them."""

    def __init__(self, stalls: bool) -> None:
        self._stalls = stalls
        self._under_way = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Some is under way."""
        self._under_way += 1
        if self._stalls:
            self._none.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._none.set()

    async def over(self) -> float:
        """Wait for the end of what is under way; how long that took (seconds)."""
        began = time.monotonic()
        await self._none.wait()
        return time.monotonic() - began


class SimulatedBackend:
    """Makes simulated runners; ``faults`` holds what they are to do wrong, ``work`` what they do."""

    def __init__(self, simulation: Simulation) -> None:
        self.store = SimulatedStore(simulation)
        self._gpu = simulation.gpu
        self._loads, self._prefill_stalls = Stall(simulation.stalls), simulation.prefill_stalls
        self.faults = Faults()
        self.work = Work()

    def runner(self, model: Model, options: Options, parallel: int) -> Runner:
        profile = self.store.profiles[model.digest]
        slots = profile.slots or parallel
        shared = self.faults, self.work, self._loads
        prefills = Stall(self._prefill_stalls)
        return SimulatedRunner(model, profile, options.num_ctx, slots, *shared, prefills, self._gpu)

    async def meet(self, path: str) -> None:
        """What a GET route meets: the faults of a scope that it belongs to."""
        if fault := self.faults.take(None, path):
            await show(fault, self.faults)

    def close(self) -> None:
        self.faults.clear()


class SimulatedRunner:
    """A simulated model in memory."""

    alive = True

    def __init__(
        self,
        model: Model,
        profile: Profile,
        context: int,
        slots: int,
        faults: Faults,
        work: Work,
        loads: Stall,
        prefills: Stall,
        gpu: bool,
    ) -> None:
        self.size = model.size
        self._gpu = gpu
        self.slots = slots
        self._name = model.name.short
        self._profile = profile
        self._context = context
        self._faults = faults
        self._work = work
        self._loads, self._prefills = loads, prefills

    @property
    def vram(self) -> int:
        """Bytes of it in a GPU's memory."""
        return self.size if self._gpu and not self._faults.on_cpu(self._name) else 0

    async def start(self) -> None:
        self._work.of(self._name).loads += 1
        with self._loads.work():
            await asyncio.sleep(self._profile.load)

    async def close(self) -> None:
        return None

    async def tokenize(self, text: str) -> list[int]:
        return [crc32(piece.encode()) & 0x7FFFFFFF for piece in _TOKEN.findall(text)]

    async def detokenize(self, tokens: list[int]) -> str:
        return "".join(f" {_WORDS[token % len(_WORDS)]}" for token in tokens)

    async def embed(self, text: str) -> tuple[list[float], int]:
        count = len(await self.tokenize(text))
        if count > self._context:
            raise NodeError(400, TOO_LONG)
        if fault := self._faults.take(self._name):
            await show(fault, self._faults)
        with self._prefills.work():
            await asyncio.sleep(count / self._profile.prefill)
        await self._loads.over()
        seed = hashlib.shake_256(text.encode()).digest(_WIDTH)
        vector = [byte / 127.5 - 1.0 for byte in seed]
        length = math.sqrt(sum(value * value for value in vector))
        return [value / length for value in vector], count

    async def complete(self, request: Completion) -> AsyncIterator[Piece]:
        last: Piece | None = None
        async with contextlib.aclosing(self._pieces(request)) as pieces:
            with self._work.request(self._name, request.options.num_predict) as work:
                async for piece in pieces:
                    if piece.done:
                        last = piece
                        break
                    work.tokens += 1
                    yield piece
        # It runs no more when who asked hears of its end, and may begin another.
        if last is not None:
            yield last

    async def _pieces(self, request: Completion) -> AsyncGenerator[Piece, None]:
        options, profile = request.options, self._profile
        prompt_tokens = len(
            truncated(await self.tokenize(request.prompt), self._context, options.num_keep, request.truncate)
        )
        fault = self._faults.take(self._name)
        if fault and not fault.after_tokens and fault.kind not in _SLOW:
            await show(fault, self._faults)
            if fault.kind == "hang":
                fault = None  # it was removed
        start = time.monotonic()
        with self._prefills.work():
            await asyncio.sleep(prompt_tokens / profile.prefill)
        reason, tokens = ("length", options.num_predict) if options.num_predict > 0 else ("stop", profile.tokens)
        if not request.shift and prompt_tokens + tokens > self._context:
            reason, tokens = "length", max(1, self._context - prompt_tokens)
        first = due = time.monotonic()
        sent = 0
        for text, last in _text(request, tokens):
            # Against the clock, not token after token: sleeping late must not add up.
            delay = due + sent / profile.decode - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            due += await self._loads.over() + await self._prefills.over()
            if fault and sent >= fault.after_tokens and (sent or fault.kind in _SLOW or fault.kind == "nonsense"):
                due += fault.delay if fault.kind in _SLOW else 0.0
                await show(fault, self._faults)
                if fault.kind == "nonsense":
                    fault = None
                    yield Piece(raw=b'\x00{"model": nonsense\n')
            sent += 1
            if last:
                reason = "stop"
            if text:
                yield Piece(text, logprobs=_logprobs(text, request.logprobs))
            if last:
                break
        yield Piece(
            done=True,
            reason=reason,
            prompt_tokens=prompt_tokens,
            prompt_ns=int((first - start) * 1e9),
            tokens=sent,
            eval_ns=int((time.monotonic() - first) * 1e9),
        )


async def show(fault: Fault, faults: Faults) -> None:
    """Do what ``fault`` says where it is not a matter of the answer's text."""
    if fault.kind == "hang":
        await faults.hang()
    elif fault.kind == "fail":
        raise NodeError(fault.status, BROKEN if fault.after_tokens else fault.message)
    elif fault.kind in _SLOW:
        await asyncio.sleep(fault.delay)
    elif fault.kind == "no_done":
        raise EndWithoutDone
    elif fault.kind in ("reset", "cut_after"):
        raise Disconnect(reset=fault.kind == "reset")
    elif fault.kind == "no_http":
        raise NoHttp(iter([b"SSH-2.0-Simulated\r\n"]))
    elif fault.kind == "endless_head":
        raise NoHttp(endless_head(), fault.delay)


def _text(request: Completion, tokens: int) -> Iterator[tuple[str, bool]]:
    """(text of a token, whether a stop string ends the answer with it) for up to ``tokens`` tokens."""
    state = crc32(request.prompt.encode())
    written = ""
    for at in range(tokens):
        piece = ("" if not written and request.prompt[-1:].isspace() else " ") + _WORDS[state % len(_WORDS)]
        if request.schema is not None:
            piece = ('{"text": "' if at == 0 else "") + piece + ('"}' if at == tokens - 1 else "")
        state = crc32(piece.encode(), state)
        written += piece
        found = [cut for stop in request.options.stop if stop and (cut := written.find(stop)) >= 0]
        if found:
            yield written[len(written) - len(piece) : min(found)], True
            return
        yield piece, False


def _logprobs(text: str, top: int | None) -> list[dict[str, Any]] | None:
    if top is None:
        return None
    entry: dict[str, Any] = {"token": text, "logprob": -0.5, "bytes": list(text.encode())}
    if top:
        entry["top_logprobs"] = [dict(entry)]
    return [entry]
