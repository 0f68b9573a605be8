"""Ten thousand requests, answered, refused, cut by nodes and left by callers: usage is what the nodes counted."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.gateway import END, HEAD, LAST, LINE, Behaviour, FakeNode, Gateway, chunk, gateway, says
from support.load import APIS, CHAT, body_of
from support.process import until

from corral.store import usage
from corral.store.database import Database, resolve
from corral.store.ingest import ingest
from corral.store.spool import encode_frame
from corral.store.tables import audit

REQUESTS = 10_000
CALLERS = 8
PROMPT = 7
"""What each whole answer says of its prompt."""

LEAVE = b"leave"


class Counted:
    """What nodes did: tokens that they sent, and prompts that they told the length of."""

    def __init__(self) -> None:
        self.tokens = 0
        self.prompts = 0
        self._lock = threading.Lock()

    def add(self, tokens: int, prompts: int) -> None:
        with self._lock:
            self.tokens += tokens
            self.prompts += prompts

    def whole(self, words: int) -> Behaviour:
        def behave(connection: socket.socket) -> None:
            self.add(words, PROMPT)
            body = b"".join(chunk(LINE % b"w") for _ in range(words)) + chunk(LAST % words) + END
            connection.sendall(HEAD + body)

        return behave

    def cut(self, words: int) -> Behaviour:
        """Ends within its answer; before the first word it is another node's request."""

        def behave(connection: socket.socket) -> None:
            self.add(words, 0)
            connection.sendall(HEAD + b"".join(chunk(LINE % b"w") for _ in range(words)))
            connection.shutdown(socket.SHUT_RDWR)

        return behave

    def left(self, words: int, node: FakeNode) -> Behaviour:
        """Its caller leaves when it hears LEAVE, and it says no more."""

        def behave(connection: socket.socket) -> None:
            self.add(words, 0)
            said = [*[b"w"] * (words - 1), LEAVE]
            connection.sendall(HEAD + b"".join(chunk(LINE % word) for word in said))
            node.wait_for_close(connection)
            raise OSError("the caller left")

        return behave


class Script(list[Behaviour]):
    """What a node does with each request, by chance."""

    def __init__(self, counted: Counted, node: FakeNode, seed: int) -> None:
        super().__init__()
        self.streams = True
        self._counted, self._node, self._dice = counted, node, random.Random(seed)

    def __bool__(self) -> bool:
        return True

    def pop(self, at: int = -1) -> Behaviour:  # type: ignore[override]
        chance, words = self._dice.random(), self._dice.randint(1, 12)
        if chance < 0.01:
            return says(500, {"error": "out of memory"})
        if chance < 0.02:
            return self._counted.cut(0)
        if self.streams and chance < 0.05:
            return self._counted.cut(words)
        if self.streams and chance < 0.12:
            return self._counted.left(words, self._node)
        return self._counted.whole(words)


def ask(gw: Gateway, number: int, stream: bool) -> int:
    """One request on a connection of its own, left when the answer says so; its status."""
    path = APIS[number % 3] if number % 10 else "/api/nothing"
    connection = http.client.HTTPConnection("127.0.0.1", gw.port, timeout=30)
    # A prompt of its own: one that was alone with two nodes that cut it is refused from then on.
    body = body_of(path if path in APIS else CHAT, "m", 16, f"Which number is {number}, {stream}?", stream)
    try:
        connection.request("POST", path, body, {**gw.auth, "Content-Type": "application/json"})
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


@pytest.mark.slow
def test_usage_is_what_the_nodes_counted(tmp_path: Path, database_url: str) -> None:
    counted = Counted()
    with gateway(tmp_path) as gw:
        for seed, node in enumerate(gw.nodes):
            node.script = Script(counted, node, seed)
        statuses: Counter[int] = Counter()
        with ThreadPoolExecutor(CALLERS) as pool:
            for stream in (True, False):
                for node in gw.nodes:
                    node.script.streams = stream  # type: ignore[attr-defined]
                numbers = range(REQUESTS // 2)
                statuses.update(pool.map(lambda number, how=stream: ask(gw, number, how), numbers))
        records = gw.control.records
        until(lambda: sum(record["t"] == "settle" for record in records) == REQUESTS, "all are recorded", 30)
    assert statuses[200] > REQUESTS * 0.6 and statuses[404] == REQUESTS // 10
    made = Database(resolve(database_url, tmp_path))
    made.migrate()
    offset = 0
    for start in range(0, len(records), 500):
        data = b"".join(encode_frame(record) for record in records[start : start + 500])
        offset = made.write_now(ingest, "gateway-1", "0000000000000001.seg", offset, data).watermark
    (sums,) = made.read_now(usage.report, 0.0, 4e9, ["key"])[-1:]
    all_of_it = made.read_now(lambda connection: usage.report(connection, 0.0, 4e9, ["day"]))
    assert sum(row["requests"] for row in all_of_it) == REQUESTS
    assert sum(row["tokens"] for row in all_of_it) == counted.tokens
    guessed = audit.select().where(audit.c.estimated)
    estimates = made.read_now(lambda connection: connection.execute(guessed).mappings().all())
    prompts = sum(row["prompt_tokens"] for row in all_of_it)
    assert prompts - sum(row["prompt_tokens"] for row in estimates) == counted.prompts
    outcomes = Counter(record["outcome"] for record in records if record["t"] == "settle")
    print(json.dumps({"outcomes": outcomes, "tokens": counted.tokens, "estimated": len(estimates), "key": sums}))
    assert outcomes["client_gone"] > 50 and outcomes["upstream_error"] > 50
    made.close()
