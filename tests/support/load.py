"""Clients that stream answers without pause, and what became of each request."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from support.process import until

CHAT, COMPLETIONS, MESSAGES = "/api/chat", "/v1/chat/completions", "/v1/messages"
APIS = (CHAT, COMPLETIONS, MESSAGES)
GENERATE, LEGACY = "/api/generate", "/v1/completions"
"""What goes on with a prompt, not with a chat."""
EMBED, EMBEDDINGS = "/api/embed", "/v1/embeddings"
PROMPT = "Tell me of the horses behind the river, of their names, and of the colours that they had in winter."

WHOLE, TOLD, REFUSED, CUT, SILENT, LEFT = "whole", "told", "refused", "cut", "silent", "left"
"""What became of a request: answered whole; begun, then ended by an error in the API's own form; answered with an
error alone; cut so that the client's HTTP library sees it; ended as if it were whole though it is not; left."""


@dataclass
class Answer:
    """A request and what came of it. Times are monotonic seconds, ``first`` 0.0 where no token came.

    ``stream``: it was asked for as a stream; ``sent``: its body's bytes; ``left``: its caller did not wait for its end.
    """

    path: str
    request_id: str
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    problem: str = ""
    stream: bool = True
    sent: int = 0
    left: bool = False

    @property
    def node(self) -> str:
        """Who answered."""
        return self.headers.get("x-corral-node", "")

    @property
    def attempts(self) -> int:
        """How many nodes were asked."""
        return int(self.headers.get("x-corral-attempts", "0"))

    @property
    def fate(self) -> str:
        """What became of it."""
        if self.left:
            return LEFT
        if self.problem:
            return CUT
        if self.status != 200:
            return REFUSED
        if not self.stream:
            return WHOLE if json_of(self.body.decode()) else SILENT
        lines = [line for line in self.body.decode().split("\n") if line]
        last = json_of(lines[-1]) if lines else {}
        if "error" in last:
            return TOLD
        if self.path.startswith("/api/"):
            whole = last.get("done") is True
        elif self.path == MESSAGES:
            whole = last.get("type") == "message_stop"
        else:
            whole = bool(lines) and lines[-1] == "data: [DONE]"
        return WHOLE if whole else SILENT

    @property
    def text(self) -> str:
        """What the model said."""
        said = []
        for value in whole_lines(self.body):
            message, choice = value.get("message") or {}, (value.get("choices") or [{}])[0]
            delta = choice.get("delta") or {}
            said += [message.get("content") or delta.get("content") or value.get("response") or ""]
            said += [(value.get("delta") or choice).get("text") or ""]
        return "".join(part for part in said if isinstance(part, str))

    def __str__(self) -> str:
        times = f"{self.first - self.began if self.first else -1:.2f} s to the first, {self.ended - self.began:.2f} s"
        said = self.problem or self.body[-200:].decode(errors="replace")
        return f"{self.path} {self.status} {self.fate} on {self.node or '-'}, {self.attempts} attempts, {times}: {said}"


def json_of(line: str) -> dict[str, Any]:
    """The object in a line of NDJSON or of an event stream; empty where there is none."""
    line = line.removeprefix("data: ")
    value = json.loads(line) if line.startswith("{") else {}
    return value if isinstance(value, dict) else {}


def whole_lines(body: bytes) -> list[dict[str, Any]]:
    """The objects in a body's lines, but for what came of one within which its caller left."""
    *lines, last = body.decode(errors="replace").split("\n")
    found = [json_of(line) for line in lines]
    with suppress(ValueError):
        found.append(json_of(last))
    return found


def body_of(path: str, model: str, tokens: int, prompt: str = PROMPT, stream: bool = True) -> bytes:
    """A chat of ``tokens`` tokens in the form of the path's API, a completion of as many, or the prompt to embed."""
    body: dict[str, Any] = {"model": model}
    if path in (EMBED, EMBEDDINGS):
        return json.dumps(body | {"input": prompt}).encode()
    body |= {"stream": stream}
    body |= {"prompt": prompt} if path in (GENERATE, LEGACY) else {"messages": [{"role": "user", "content": prompt}]}
    body |= {"options": {"num_predict": tokens}} if path in (CHAT, GENERATE) else {"max_tokens": tokens}
    return json.dumps(body).encode()


class Client:
    """One caller with one connection, which it keeps as long as it can."""

    def __init__(self, url: str, key: str, timeout: float = 60.0) -> None:
        self._address = urlsplit(url).netloc
        self._key, self._timeout = key, timeout
        self._connection: http.client.HTTPConnection | None = None

    def ask(
        self,
        path: str,
        body: bytes,
        request_id: str,
        seen: Callable[[Answer], object] | None = None,
        stream: bool = True,
        patience: float = 0.0,
    ) -> Answer:
        """Send a request and read its answer to the end; ``seen`` hears of the first token.

        ``patience``: seconds after which the caller leaves, whatever came until then; 0.0: it stays.
        """
        answer = Answer(path, request_id, stream=stream, sent=len(body))
        connection = self._connection or http.client.HTTPConnection(self._address, timeout=self._timeout)
        self._connection = None
        headers = {"Authorization": f"Bearer {self._key}", "X-Request-ID": request_id}
        try:
            connection.request("POST", path, body, {**headers, "Content-Type": "application/json"})
            link = connection.sock  # an answer that ends its connection takes it away
            link.settimeout(self._timeout)
            left = answer.began + patience if patience else 0.0
            _wait(link, left)
            response = connection.getresponse()
            answer.status = response.status
            answer.headers = {name.lower(): value for name, value in response.getheaders()}
            while _wait(link, left) and (data := response.read1(65536)):
                if not answer.first and answer.status == 200:
                    answer.first = time.monotonic()
                    if seen is not None:
                        seen(answer)
                answer.body += data
            if len(answer.body) < int(answer.headers.get("content-length", 0)):
                raise http.client.IncompleteRead(answer.body)  # which `read1` does not mind
            # Whole, as `read1` does not know of an answer with a length: else the connection takes no other request.
            response.close()
        except (OSError, http.client.HTTPException) as error:
            answer.left = isinstance(error, TimeoutError) and patience > 0
            answer.problem = f"{type(error).__name__}: {error}"
            connection.close()
        else:
            if response.will_close:
                connection.close()
            else:
                self._connection = connection
        answer.ended = time.monotonic()
        return answer

    def close(self) -> None:
        """Leave."""
        if self._connection is not None:
            self._connection.close()


def _wait(link: socket.socket, until: float) -> bool:
    """Have a connection wait no longer than until then (0.0: as it does).

    Raises:
        TimeoutError: it is later.
    """
    if until:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        link.settimeout(left)
    return True


_loads = itertools.count(1)


class Load:
    """``clients`` callers that ask again and again while the block runs; ``answers`` are those that came so far.

    Each caller has the API, the answer's length and the prompt that its number picks of ``paths``, ``tokens`` and
    ``prompts``. ``fresh``: no two prompts begin alike, so that no node is preferred for having read one. ``think``:
    seconds between an answer and its caller's next request. ``timeout``: seconds that a caller waits for a byte.

    Requests are called NAME.LOAD-CALLER-COUNT, so that no record is taken for that of an earlier load of the same name.
    """

    def __init__(
        self,
        url: str,
        key: str,
        model: str,
        clients: int = 16,
        paths: Sequence[str] = APIS,
        tokens: Sequence[int] = (16,),
        name: str = "load",
        fresh: bool = False,
        think: float = 0.0,
        prompts: Sequence[str] = (PROMPT,),
        timeout: float = 60.0,
    ) -> None:
        self.answers: list[Answer] = []
        self.streaming: dict[str, Answer] = {}
        """Requests of which some was answered, not yet all."""
        self._url, self._key, self._model, self._name = url, key, model, f"{name}.{next(_loads)}"
        self._timeout = timeout
        self._fresh, self._think = fresh, think
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(number, paths[number % len(paths)], tokens[number % len(tokens)], prompts[number % len(prompts)]),
                daemon=True,
            )
            for number in range(clients)
        ]

    def _run(self, number: int, path: str, tokens: int, prompt: str) -> None:
        client = Client(self._url, self._key, self._timeout)
        body = body_of(path, self._model, tokens, prompt)
        for count in itertools.count():
            if self._stop.is_set():
                break
            request_id = f"{self._name}-{number}-{count}"
            if self._fresh:
                body = body_of(path, self._model, tokens, f"{request_id}: {prompt}")
            answer = client.ask(path, body, request_id, lambda begun: self.streaming.update({begun.request_id: begun}))
            self.streaming.pop(request_id, None)
            self.answers.append(answer)
            self._stop.wait(self._think)
        client.close()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self._timeout + 10)

    def until(self, condition: Callable[[list[Answer]], object], what: str, seconds: float = 120.0) -> float:
        """Wait until a condition on the answers so far holds; the time at which it did."""
        until(lambda: condition(list(self.answers)), what, seconds, every=0.02)
        return time.monotonic()

    def more(self, count: int, node: str = "", seconds: float = 120.0) -> float:
        """Wait for ``count`` whole answers that were asked for from now on (by ``node``); the time then."""
        since = time.monotonic()
        what = f"{count} more answers" + (f" by {node}" if node else "")
        return self.until(lambda answers: len(after(answers, since, node)) >= count, what, seconds)

    @property
    def fates(self) -> Counter[str]:
        """How many requests came to what."""
        return Counter(answer.fate for answer in self.answers)

    def unlike(self, *fates: str) -> list[str]:
        """The requests that came to something else."""
        return [str(answer) for answer in self.answers if answer.fate not in fates]


def after(answers: Sequence[Answer], moment: float, node: str = "") -> list[Answer]:
    """Requests that began after a moment and were answered whole (by ``node``)."""
    return [a for a in answers if a.began >= moment and a.fate == WHOLE and (not node or a.node == node)]
