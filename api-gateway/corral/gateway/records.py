"""The records of requests as they stand in the spool: admitted, far, settled. The last is a line of the access log too.

The first record of a gateway's life says that it began: what those before it left open will not be settled.
"""

from __future__ import annotations

import msgspec


class Begun(msgspec.Struct, tag_field="t", tag="begin", omit_defaults=True):
    """A gateway began, at ``ts`` (epoch seconds). ``gone``: it will not, says another one, and has shipped the rest."""

    gw: str
    ts: float
    gone: bool = False


class Progress(msgspec.Struct, tag_field="t", tag="progress"):
    """How far requests are: each row is the id and what store/progress.py names behind it."""

    rows: list[tuple[str, str, int, int, int, int, float, float | None, float]]


class Admitted(msgspec.Struct, tag_field="t", tag="admit"):
    """The record that is written before a node hears of the request, or the fleet answers it. ``ts`` is epoch seconds.

    ``prompt_hash``: the keyed hash of the request's body (store/content.py).
    """

    id: str
    request_id: str
    ts: float
    gw: str
    key: str
    addr: str
    api: str
    route: str
    model: str
    prompt_hash: str | None = None


class Settled(msgspec.Struct, tag_field="t", tag="settle"):
    """The record that completes it. Times are milliseconds; ``ttft_ms`` is to the first token.

    ``continued``: the nodes that wrote the answer, in order, joined by commas, where one went on with another's.
    ``answer_hash``: the keyed hash of the text that was sent. ``model_digest``: the SHA-256 (hex) of the model's
    manifest on ``node``, as that told it before it was asked; None where it is not known. ``content``: prompt and
    answer, encrypted (gateway/content.py), where they are kept; in the spool alone.
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
    answer_hash: str | None = None
    model_digest: str | None = None
    content: str | msgspec.UnsetType = msgspec.UNSET
