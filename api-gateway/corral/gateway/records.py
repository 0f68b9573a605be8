"""The two records of a request as they stand in the spool; the second is a line of the access log too."""

from __future__ import annotations

import msgspec


class Admitted(msgspec.Struct, tag_field="t", tag="admit"):
    """The record that is written before a node hears of the request. ``ts`` is epoch seconds."""

    id: str
    request_id: str
    ts: float
    gw: str
    key: str
    addr: str
    api: str
    route: str
    model: str


class Settled(msgspec.Struct, tag_field="t", tag="settle"):
    """The record that completes it. Times are milliseconds; ``ttft_ms`` is to the first token.

    ``continued``: the nodes that wrote the answer, in order, joined by commas, where one went on with another's.
    """

    id: str
    request_id: str
    ts: float
    gw: str
    key: str
    addr: str
    api: str
    route: str
    method: str
    model: str
    status: int
    outcome: str
    node: str
    attempts: int
    req_bytes: int
    resp_bytes: int
    prompt_tokens: int
    tokens: int
    estimated: bool
    queue_ms: float
    ttft_ms: float | None
    ms: float
    continued: str | None = None
