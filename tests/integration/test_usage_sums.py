"""Ten thousand requests, answered, refused, cut, continued and left by callers: usage is what the nodes counted.

They are of each API that writes and of each that embeds, streamed and not.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import RowMapping, select
from support.control import Running, make_key
from support.gateway import END, HEAD, LAST, LINE, Behaviour, FakeNode, Gateway, chunk, gateway, says
from support.load import CHAT, EMBED, EMBEDDINGS, body_of
from support.mixed import WRITTEN
from support.process import until

from corral.store.database import Database, resolve
from corral.store.tables import audit
from corral.wire.lines import RENDERED

REQUESTS = 10_000
CALLERS = 8
PROMPT = 7
"""What each whole answer says of its prompt."""
SHOWN = "<p>"
"""The prompt as a model would get it: what stands behind it was sent already."""
MODELS = "m:latest", "n:latest"
"""What one node leaves of the first, another goes on with: it is the same file on both. The other is not."""

LEAVE = b"leave"
WRITES = b'{"model":"m:latest","response":"%b","done":false}\n'

OLDER = "/api/embeddings"
PATHS = (*WRITTEN, EMBED, EMBEDDINGS, OLDER)
PAID = "ok", "client_gone"
BYTES = 4
"""Of a body that are taken for a token, as docs/audit.md says, where a key's prompts have no more: here none has."""
BULK, BULKS = 70, 3
"""Texts that one request in so many asks to embed: two batches of it."""


def digest(model: str, node: int) -> str:
    return "sha256:" + (model[0] if model == MODELS[0] else str(node)) * 64


class Counted:
    """What nodes did of what is to count, by request: ``tokens`` that they sent, and tokens of ``prompts`` that they
    told.

    ``dropped`` are tokens of answers that were begun anew or given up: nobody got them. ``unread``: bytes of the
    batch that a node had to embed when its caller left. ``resumed``: whose rest a node wrote to its end.
    """

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.prompts: Counter[str] = Counter()
        self.unread: dict[str, int] = {}
        self.resumed: set[str] = set()
        self._lock = threading.Lock()

    def add(self, request: bytes, tokens: int, prompts: int, dropped: int = 0) -> None:
        with self._lock:
            self.tokens[request.decode()] += tokens
            self.prompts[request.decode()] += prompts
            self.dropped[request.decode()] += dropped


class Script(list[Behaviour]):
    """What a node does with each request, by chance; with those of control and of gateways themselves, all is well."""

    def __init__(self, counted: Counted, node: FakeNode, seed: int, callers: dict[bytes, socket.socket]) -> None:
        super().__init__()
        self.streams = True
        self._counted, self._node, self._dice = counted, node, random.Random(seed)
        self._callers = callers

    def __bool__(self) -> bool:
        return True

    def pop(self, at: int = -1) -> Behaviour:  # type: ignore[override]
        asked = self._node.asked
        chance, words = self._dice.random(), self._dice.randint(1, 12)
        bound = asked.body.get("options", {}).get("num_predict", words)
        if b"x-request-id" not in asked.headers:
            return self._whole(bound, Counted())
        if chance < 0.01:
            return says(500, {"error": "out of memory"})
        if "input" in asked.body or "stream" not in asked.body:
            return self._embeds(chance)
        if chance < 0.02:
            return self._cut(0)
        if chance < (0.05 if self.streams else 0.12):
            return self._cut(min(words, bound))
        # Of the few that are gone on with some are to be left, whatever the dice.
        if self.streams and chance < (0.3 if asked.body.get("raw") else 0.12):
            return self._left(min(words, bound))
        return self._whole(min(words, bound), self._counted)

    def _request(self) -> bytes:
        return self._node.asked.headers.get(b"x-request-id", b"")

    def _aside(self) -> bool:
        """Whether a gateway asks for a prompt or a count, to go on with an answer: no tokens of a caller's."""
        body = self._node.asked.body
        return "_debug_render_only" in body or (body.get("raw", False) and not body["stream"])

    def _said(self, words: list[bytes]) -> bytes:
        chat = "messages" in self._node.asked.body
        return b"".join(chunk(LINE % word if chat else WRITES % word) for word in words)

    def _embeds(self, chance: float) -> Behaviour:
        """One batch: whole, cut, or left by its caller while it is read."""
        request, texts = self._request(), self._node.asked.body.get("input")
        told = PROMPT * (len(texts) if isinstance(texts, list) else 1)
        answer = {"embeddings": [[0.5]] * len(texts), "prompt_eval_count": told} if texts else {"embedding": [0.5]}
        if chance >= 0.12:
            self._counted.add(request, 0, told if texts else 0)
            return says(200, answer)
        if chance < 0.05:
            return self._cut(0)

        def behave(connection: socket.socket) -> None:
            self._counted.unread[request.decode()] = int(self._node.asked.headers[b"content-length"])
            self._callers[request].shutdown(socket.SHUT_RDWR)
            self._node.wait_for_close(connection)
            raise OSError("the caller left")

        return behave

    def _whole(self, words: int, counted: Counted) -> Behaviour:
        body = self._node.asked.body
        if body.get("_debug_render_only") or ("prompt" not in body and "messages" not in body):  # or /api/show
            return says(200, {RENDERED: {"rendered_template": SHOWN}, "parameters": ""})
        sent = len(body["prompt"]) - len(SHOWN) if body.get("raw") and len(body["prompt"]) > len(SHOWN) else 0

        counted = Counted() if self._aside() else counted

        def behave(connection: socket.socket) -> None:
            counted.add(self._request(), words, PROMPT)
            last = (LAST % words).replace(b'"prompt_eval_count":7', b'"prompt_eval_count":%d' % (PROMPT + sent))
            if "messages" not in body:
                last = last.replace(b'"message":{"role":"assistant","content":""}', b'"response":""')
            said = self._said([b"w"] * words) if body.get("stream", True) else b""
            connection.sendall(HEAD + said + chunk(last) + END)
            if body.get("raw") and body["stream"]:
                counted.resumed.add(self._request().decode())

        return behave

    def _cut(self, words: int) -> Behaviour:
        """Ends within its answer. Before the first word it is another node's request, and so it is, with all of its
        words, where the caller gets the answer as a whole."""
        if self._aside():
            words = 0

        def behave(connection: socket.socket) -> None:
            self._counted.add(self._request(), words if self.streams else 0, 0, 0 if self.streams else words)
            connection.sendall(HEAD + self._said([b"w"] * words))
            connection.shutdown(socket.SHUT_RDWR)

        return behave

    def _left(self, words: int) -> Behaviour:
        """Its caller leaves when it hears LEAVE, and it says no more."""
        if self._aside():
            return self._whole(words, self._counted)

        def behave(connection: socket.socket) -> None:
            self._counted.add(self._request(), words, 0)
            connection.sendall(HEAD + self._said([*[b"w"] * (words - 1), LEAVE]))
            self._node.wait_for_close(connection)
            raise OSError("the caller left")

        return behave


def model_of(number: int) -> str:
    """The model that a request asks for: of each path each is asked for."""
    return MODELS[number // len(PATHS) % len(MODELS)]


def asked_of(path: str, number: int, stream: bool) -> bytes:
    """The body of a request."""
    # A prompt of its own: one that was alone with two nodes that cut it is refused from then on.
    prompt, model = f"Which number is {number}, {stream}?", model_of(number)
    if path == OLDER:
        return json.dumps({"model": model, "prompt": prompt}).encode()
    if path in (EMBED, EMBEDDINGS):
        return json.dumps({"model": model, "input": [prompt] * (1 if number % BULKS else BULK)}).encode()
    return body_of(path if path in PATHS else CHAT, model, 16, prompt, stream)


def ask(gw: Gateway, key: str, callers: dict[bytes, socket.socket], number: int, stream: bool) -> int:
    """One request on a connection of its own, left when the answer says so; its status, of an error within it too."""
    path = PATHS[number % len(PATHS)] if number % 10 else "/api/nothing"
    connection = http.client.HTTPConnection("127.0.0.1", gw.port, timeout=60)
    name = f"{number}-{stream}"
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", "X-Request-ID": name}
        connection.connect()
        callers[name.encode()] = connection.sock
        connection.request("POST", path, asked_of(path, number, stream), headers)
        response = connection.getresponse()
        seen = b""
        while data := response.read1(65536):
            seen += data
            if stream and LEAVE in seen:
                break
        return 502 if b'"error"' in seen and response.status == 200 else response.status
    except (http.client.HTTPException, OSError):
        return 0
    finally:
        callers.pop(name.encode(), None)
        connection.close()


def to_guess(row: RowMapping, counted: Counted) -> int:
    """The tokens of the prompt that no node has told, and somebody pays for: of who left, or was sent a part."""
    if row["outcome"] == "ok" and row["route"] != OLDER:
        return 0
    if row["outcome"] not in PAID and not counted.tokens[row["request_id"]]:
        return 0
    number, _, stream = row["request_id"].partition("-")
    if row["route"] in (EMBED, EMBEDDINGS) and int(number) % BULKS == 0:
        return counted.unread[row["request_id"]] // BYTES
    return len(asked_of(row["route"], int(number), stream == "True")) // BYTES


def nodes() -> list[FakeNode]:
    made = [FakeNode("node-1"), FakeNode("node-2")]
    for number, node in enumerate(made):
        node.models = [{"name": model, "model": model, "digest": digest(model, number), "size": 1} for model in MODELS]
    return made


@pytest.mark.slow
def test_usage_is_what_the_nodes_counted(tmp_path: Path, database_url: str) -> None:
    counted, fakes = Counted(), nodes()
    callers: dict[bytes, socket.socket] = {}
    for seed, node in enumerate(fakes):
        node.script = Script(counted, node, seed, callers)
    known = [{"name": node.name, "url": node.url, "slots": 4} for node in fakes]
    state = tmp_path / "state"
    control = Running(state, nodes=known, store={"database": database_url})
    secrets = {"pepper_file": str(state / "pepper"), "internal_token_file": str(state / "internal.token")}
    try:
        made = make_key(control, rpm=1_000_000, tpm=1_000_000_000, concurrency=1000)
        until(lambda: control.snapshot().json()["continuable"].keys() == set(MODELS), "control has tried both models")
        with gateway(tmp_path, fakes, gateway={"control_url": control.url}, auth=secrets) as gw:
            check(control, gw, made, counted, callers)
    finally:
        control.close()


def check(
    control: Running, gw: Gateway, made: dict[str, Any], counted: Counted, callers: dict[bytes, socket.socket]
) -> None:
    def used(by: str) -> list[dict[str, Any]]:
        return list(control.admin.get("/admin/usage", params={"by": by}).json()["usage"])

    statuses: Counter[int] = Counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        for stream in (True, False):
            for node in gw.nodes:
                node.script.streams = stream  # type: ignore[attr-defined]
            numbers = range(REQUESTS // 2)
            statuses.update(pool.map(lambda number, how=stream: ask(gw, made["key"], callers, number, how), numbers))
    until(lambda: sum(row["requests"] for row in used("day")) == REQUESTS, "all are recorded", 120)
    assert statuses[200] > REQUESTS * 0.6 and statuses[404] == REQUESTS // 10
    (sums,) = (row for row in used("key") if row["key"] == made["id"])
    database = Database(resolve(control.settings.store.database, control.state))
    rows = database.read_now(lambda c: c.execute(select(audit).where(audit.c.api != "admin")).mappings().all())
    database.close()
    wrong = [dict(row) for row in rows if row["tokens"] != counted.tokens[row["request_id"]]]
    assert not wrong, [(row, counted.tokens[row["request_id"]]) for row in wrong[:3]]
    by_model: Counter[str] = Counter()
    for name, tokens in counted.tokens.items():
        by_model[model_of(int(name.partition("-")[0]))] += tokens
    assert {row["model"]: row["tokens"] for row in used("model") if row["model"]} == by_model
    assert sums["tokens"] == counted.tokens.total()
    # Who was told of an error is counted as one that failed, or that was refused.
    assert sums["failed"] == sum(count for status, count in statuses.items() if status >= 500)
    assert sum(row["refused"] for row in used("day")) == sum(statuses[one] for one in statuses if 400 <= one < 500)
    spent = sum(max(row["ms"] if row["attempts"] else 0.0, row["queue_ms"]) for row in rows) / 1e3
    assert sum(row["queue_seconds"] + row["node_seconds"] for row in used("day")) == pytest.approx(spent)
    # Who was sent nothing of an answer, and did not leave it, pays for no batch of it.
    told = {row["request_id"]: counted.prompts[row["request_id"]] for row in rows if row["outcome"] in PAID}
    guessed = {row["request_id"]: to_guess(row, counted) for row in rows}
    due = {name: told.get(name, 0) + guess for name, guess in guessed.items()}
    wrong = [dict(row) for row in rows if row["prompt_tokens"] != due[row["request_id"]]]
    assert not wrong, [(row, due[row["request_id"]]) for row in wrong[:3]]
    assert [dict(row) for row in rows if row["estimated"] != (guessed[row["request_id"]] > 0)][:3] == []
    assert sums["prompt_tokens"] == sum(due.values())
    assert sums["estimated"] == sum(guess > 0 for guess in guessed.values())
    by_route = Counter((row["route"], row["outcome"]) for row in rows if counted.prompts[row["request_id"]])
    assert all(by_route[path, "ok"] > REQUESTS / len(PATHS) / 2 for path in PATHS if path != OLDER)
    # Left with a batch at a node, which nobody has counted, behind one that was.
    assert by_route[EMBED, "client_gone"] > 5 and by_route[EMBEDDINGS, "client_gone"] > 5
    asked = Counter((row["route"], row["model"].removesuffix(":latest")) for row in rows)
    assert all(asked[path, model[0]] > REQUESTS / len(PATHS) / 3 for path in PATHS for model in MODELS), asked
    outcomes = Counter(row["outcome"] for row in rows)
    went_on = Counter(row["outcome"] for row in rows if row["continued"])
    measured = {
        "outcomes": outcomes,
        "continued": went_on,
        "tokens": counted.tokens.total(),
        "dropped": counted.dropped.total(),
    }
    in_vain = Counter(row["outcome"] for row in rows if counted.dropped[row["request_id"]])
    print(json.dumps({**measured, "in vain": in_vain, "key": sums}))
    assert outcomes["client_gone"] > 50 and outcomes["upstream_error"] > 20
    # Of some forty that another node goes on with, chance has some cut again, and ten left.
    assert {row["request_id"] for row in rows if row["continued"] and row["outcome"] == "ok"} == counted.resumed
    assert went_on["ok"] > 5 and went_on["client_gone"] > 0
    assert in_vain["ok"] > 25 and in_vain["upstream_error"] > 3
