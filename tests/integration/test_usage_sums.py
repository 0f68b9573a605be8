"""Ten thousand requests, answered, refused, cut, continued and left by callers: usage is what the nodes counted."""

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
from sqlalchemy import select
from support.control import Running, make_key
from support.gateway import END, HEAD, LAST, LINE, Behaviour, FakeNode, Gateway, chunk, gateway, says
from support.load import APIS, CHAT, body_of
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


def digest(model: str, node: int) -> str:
    return "sha256:" + (model[0] if model == MODELS[0] else str(node)) * 64


class Counted:
    """What nodes did of what is to count: ``tokens`` that they sent, by request, and ``prompts`` that they told the
    length of.

    ``dropped`` are tokens of answers that were begun anew or given up: nobody got them.
    """

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.prompts = 0
        self._lock = threading.Lock()

    def add(self, request: bytes, tokens: int, prompts: int, dropped: int = 0) -> None:
        with self._lock:
            self.tokens[request.decode()] += tokens
            self.prompts += prompts
            self.dropped[request.decode()] += dropped


class Script(list[Behaviour]):
    """What a node does with each request, by chance; with those of control and of gateways themselves, all is well."""

    def __init__(self, counted: Counted, node: FakeNode, seed: int) -> None:
        super().__init__()
        self.streams = True
        self._counted, self._node, self._dice = counted, node, random.Random(seed)

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
        if chance < 0.02:
            return self._cut(0)
        if chance < (0.05 if self.streams else 0.12):
            return self._cut(min(words, bound))
        if self.streams and chance < 0.12:
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
        return b"".join(chunk(LINE % word if chat else b'{"response":"%b","done":false}\n' % word) for word in words)

    def _whole(self, words: int, counted: Counted) -> Behaviour:
        body = self._node.asked.body
        if body.get("_debug_render_only") or ("prompt" not in body and "messages" not in body):  # or /api/show
            return says(200, {RENDERED: {"rendered_template": SHOWN}, "parameters": ""})
        sent = len(body["prompt"]) - len(SHOWN) if body.get("raw") and len(body["prompt"]) > len(SHOWN) else 0

        counted = Counted() if self._aside() else counted

        def behave(connection: socket.socket) -> None:
            counted.add(self._request(), words, PROMPT)
            last = (LAST % words).replace(b'"prompt_eval_count":7', b'"prompt_eval_count":%d' % (PROMPT + sent))
            said = self._said([b"w"] * words) if body.get("stream", True) else b""
            connection.sendall(HEAD + said + chunk(last) + END)

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


def ask(gw: Gateway, key: str, number: int, stream: bool) -> int:
    """One request on a connection of its own, left when the answer says so; its status."""
    path = APIS[number % 3] if number % 10 else "/api/nothing"
    connection = http.client.HTTPConnection("127.0.0.1", gw.port, timeout=30)
    # A prompt of its own: one that was alone with two nodes that cut it is refused from then on.
    prompt = f"Which number is {number}, {stream}?"
    body = body_of(path if path in APIS else CHAT, MODELS[number % 2], 16, prompt, stream)
    try:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        seen = b""
        while data := response.read1(65536):
            seen += data
            if stream and LEAVE in seen:
                break
        return response.status
    except (http.client.HTTPException, OSError):
        return 0
    finally:
        connection.close()


def nodes() -> list[FakeNode]:
    made = [FakeNode("node-1"), FakeNode("node-2")]
    for number, node in enumerate(made):
        node.models = [{"name": model, "model": model, "digest": digest(model, number), "size": 1} for model in MODELS]
    return made


@pytest.mark.slow
def test_usage_is_what_the_nodes_counted(tmp_path: Path, database_url: str) -> None:
    counted, fakes = Counted(), nodes()
    for seed, node in enumerate(fakes):
        node.script = Script(counted, node, seed)
    known = [{"name": node.name, "url": node.url, "slots": 4} for node in fakes]
    state = tmp_path / "state"
    control = Running(state, nodes=known, store={"database": database_url})
    secrets = {"pepper_file": str(state / "pepper"), "internal_token_file": str(state / "internal.token")}
    try:
        made = make_key(control, rpm=1_000_000, tpm=1_000_000_000, concurrency=1000)
        until(lambda: control.snapshot().json()["continuable"].keys() == set(MODELS), "control has tried both models")
        with gateway(tmp_path, fakes, gateway={"control_url": control.url}, auth=secrets) as gw:
            check(control, gw, made, counted)
    finally:
        control.close()


def check(control: Running, gw: Gateway, made: dict[str, Any], counted: Counted) -> None:
    def used(by: str) -> list[dict[str, Any]]:
        return list(control.admin.get("/admin/usage", params={"by": by}).json()["usage"])

    statuses: Counter[int] = Counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        for stream in (True, False):
            for node in gw.nodes:
                node.script.streams = stream  # type: ignore[attr-defined]
            numbers = range(REQUESTS // 2)
            statuses.update(pool.map(lambda number, how=stream: ask(gw, made["key"], number, how), numbers))
    until(lambda: sum(row["requests"] for row in used("day")) == REQUESTS, "all are recorded", 60)
    assert statuses[200] > REQUESTS * 0.6 and statuses[404] == REQUESTS // 10
    (sums,) = (row for row in used("key") if row["key"] == made["id"])
    database = Database(resolve(control.settings.store.database, control.state))
    rows = database.read_now(lambda c: c.execute(select(audit).where(audit.c.api != "admin")).mappings().all())
    database.close()
    wrong = [dict(row) for row in rows if row["tokens"] != counted.tokens[row["request_id"]]]
    assert not wrong, [(row, counted.tokens[row["request_id"]]) for row in wrong[:3]]
    assert sum(row["tokens"] for row in used("key,model")) == sums["tokens"] == counted.tokens.total()
    guessed = [row for row in rows if row["estimated"]]
    assert sums["estimated"] == len(guessed)
    assert sums["prompt_tokens"] - sum(row["prompt_tokens"] for row in guessed) == counted.prompts
    outcomes = Counter(row["outcome"] for row in rows)
    went_on = Counter(row["outcome"] for row in rows if row["continued"])
    told = {
        "outcomes": outcomes,
        "continued": went_on,
        "tokens": counted.tokens.total(),
        "dropped": counted.dropped.total(),
    }
    print(json.dumps({**told, "key": sums}))
    assert outcomes["client_gone"] > 50 and outcomes["upstream_error"] > 20
    assert went_on["ok"] > 50 and went_on["client_gone"] > 0
    in_vain = Counter(row["outcome"] for row in rows if counted.dropped[row["request_id"]])
    assert in_vain["ok"] > 50 and in_vain["upstream_error"] > 10
