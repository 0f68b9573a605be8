"""Callers of every kind at once: each API, streamed and not, embeddings, and some that leave in the midst."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from support.load import (
    APIS,
    COMPLETIONS,
    EMBED,
    EMBEDDINGS,
    GENERATE,
    LEGACY,
    MESSAGES,
    PROMPT,
    Answer,
    Client,
    Load,
    body_of,
    json_of,
    whole_lines,
)


@dataclass(frozen=True)
class Way:
    """How a caller asks. ``leaves``: it does so within that many seconds; 0.0: it stays."""

    path: str
    stream: bool = True
    leaves: float = 0.0

    def body(self, model: str, tokens: int, prompt: str = PROMPT) -> bytes:
        """What it sends."""
        body = body_of(self.path, model, tokens, prompt, self.stream)
        if self.path in (COMPLETIONS, LEGACY) and self.stream:
            body = json.dumps(json.loads(body) | {"stream_options": {"include_usage": True}}).encode()
        return body


WRITTEN = (*APIS, GENERATE, LEGACY)
"""What writes an answer."""
EMBEDDED = (EMBED, EMBEDDINGS)
WAYS = (*(Way(path, stream) for path in WRITTEN for stream in (True, False)), *(Way(path, False) for path in EMBEDDED))


def leaving(within: float) -> tuple[Way, ...]:
    """Each way, with a caller that leaves within so many seconds; embeddings are quick, and left sooner."""
    return tuple(Way(way.path, way.stream, within if way.path in WRITTEN else within / 8) for way in WAYS)


def counts(answer: Answer) -> tuple[int, int]:
    """The tokens of the prompt and of the answer, as a whole answer tells them."""
    lines = [line for line in answer.body.decode().splitlines() if line]
    if answer.path.startswith("/api/"):
        last = json_of(lines[-1])
        return last["prompt_eval_count"], last.get("eval_count", 0)
    # Each event of LEGACY has a usage; all but the last have zeros, as Ollama's have.
    (usage,) = [told for told in map(_usage, lines) if any(told.values())]
    if answer.path == MESSAGES:
        return usage["input_tokens"], usage["output_tokens"]
    return usage["prompt_tokens"], usage.get("completion_tokens", 0)


def _usage(line: str) -> dict[str, Any]:
    value = json_of(line)
    return dict(value.get("usage") or {}) if value.get("type") != "message_start" else {}


def pieces(answer: Answer) -> int:
    """How many tokens of a stream its caller has seen: of simulated models each is a piece."""
    seen = 0
    for value in whole_lines(answer.body):
        choice = (value.get("choices") or [{}])[0]
        message, delta = value.get("message") or {}, choice.get("delta") or value.get("delta") or {}
        said = value.get("response") or message.get("content") or delta.get("content") or delta.get("text")
        said = said or choice.get("text")
        seen += bool(said)
    return seen


class Mixed(Load):
    """Callers of whom each asks in all ``ways``, one after the other, again and again, while the block runs.

    ``asked``: how many tokens each request is for at most, by its id.
    """

    def __init__(
        self, url: str, key: str, model: str, ways: Sequence[Way], clients: int, tokens: Sequence[int], name: str
    ) -> None:
        super().__init__(url, key, model, clients, [way.path for way in ways], tokens, name)
        self.asked: dict[str, int] = {}
        self._ways, self._seed = ways, name  # not what its requests are called, which is new in each load

    def _run(self, number: int, path: str, tokens: int, prompt: str) -> None:
        client, dice = Client(self._url, self._key, self._timeout), random.Random(f"{self._seed} {number}")
        # Each begins elsewhere, so that no way is asked for by all of them at once.
        for count, way in enumerate(itertools.islice(itertools.cycle(self._ways), number, None)):
            if self._stop.is_set():
                break
            body, stays = way.body(self._model, tokens, prompt), dice.uniform(0.01, way.leaves) if way.leaves else 0.0
            request_id = f"{self._name}-{number}-{count}"
            self.asked[request_id] = tokens
            self.answers.append(client.ask(way.path, body, request_id, None, way.stream, stays))
        client.close()
