"""Callers' bytes: whatever they are and however they are cut, they are read in one way, or refused."""

from __future__ import annotations

import re

import h11
from hypothesis import assume
from hypothesis import strategies as st
from support.fuzz import PLACES, changes, cuts, fuzz, mutated
from support.listening import Stage
from support.smuggling import body, chunked, corpus, request

from corral.gateway.listen import HEADER_BYTES

Served = list[tuple[bytes, bytes, bytes]]
KEY = b"Bearer k"
CHUNKED = b"POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body("open"))
GET = b"GET /c HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n"
WHOLE = [request(KEY, body("open")), CHUNKED, GET]
TOKENS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b";",
        b",",
        b"0\r\n\r\n",
        b"5\r\n",
        b"\r\n\r\n",
        b"\x0b",
        b"_",
        b"-",
    ),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.0", b"HTTP/1.1"),
    *(b"Transfer-Encoding: gzip, chunked\r\n", b"chunked", b"identity", b"Connection: close\r\n", b"Upgrade: x\r\n"),
    *(
        b"Content-Encoding: gzip\r\n",
        b"Expect: 100-continue\r\n",
        b"Host: b\r\n",
        b"GET / HTTP/1.1\r\n",
        b"x: " + b"y" * 300,
    ),
]
REQUESTS = st.lists(
    st.one_of(st.sampled_from(WHOLE), st.sampled_from([case.raw for case in corpus(KEY)])), min_size=1, max_size=4
)


class Server(Stage):
    """Answers at once."""

    def on_start(self, keep_alive: bool) -> None:
        self.connection.respond(200, b"", b"ok", keep_alive)

    def read(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            if self.closed:
                return
            self.connection.data_received(piece)
            while self.soon:
                self.turn()


def statuses(written: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", written) if status != b"100"]


def by_h11(data: bytes) -> Served:
    """What another strict reader makes of the same bytes, as far as it goes with them."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_BYTES)
    reader.receive_data(data)
    served: Served = []
    try:
        while True:
            event = reader.next_event()
            if isinstance(event, h11.Request):
                served.append((bytes(event.method), bytes(event.target), b""))
                whole = False
            elif isinstance(event, h11.Data):
                served[-1] = (*served[-1][:2], served[-1][2] + bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                whole = True
            elif event is h11.PAUSED:
                reader.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                reader.send(h11.EndOfMessage())
                if reader.our_state is not h11.DONE:
                    return served
                reader.start_next_cycle()
            else:
                return served if not served or whole else served[:-1]
    except h11.ProtocolError:
        return served


def check(requests: list[bytes], edits: list[tuple[int, int, bytes]], first: list[int], second: list[int]) -> None:
    data = mutated(b"".join(requests), edits)
    assume(data)
    one, other = Server(), Server()
    one.read(cuts(data, first))
    other.read(cuts(data, second))
    # The cuts of the network mean nothing, but for which of two faults is named.
    assert one.served == other.served
    assert (len(statuses(one.written)), one.closed) == (len(statuses(other.written)), other.closed)
    # Each request has its answer; a refusal is the last one, and ends the connection.
    answered = statuses(one.written)
    assert answered[: len(one.served)] == [200] * len(one.served)
    assert len(answered) - len(one.served) in (0, 1)
    if len(answered) > len(one.served):
        assert one.closed and 400 <= answered[-1] < 500
    assert one.gateway.unfinished == one.connection._body_bytes
    # Where a second strict reader sees requests in the same bytes, they are the same ones.
    for ours, theirs in zip(one.served, by_h11(data), strict=False):
        assert ours[1:] == theirs[1:]


def test_requests() -> None:
    assert fuzz(check, REQUESTS, changes(*TOKENS), PLACES, PLACES) > 100
