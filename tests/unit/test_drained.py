"""Whether a drained node still has streams, where HAProxy does not always say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from support.command import Runner

from corral.cli.common import Admin
from corral.control.haproxy import HaproxyError
from corral.control.nodes import _drained, list_nodes
from corral.control.prober import Member


class Haproxy:
    """Says one after the other of its answers, the last one again and again; None is that it does not."""

    configured = True

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)

    async def streams(self, name: str) -> int:
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if found is None:
            raise HaproxyError("no answer in time")
        return found


async def acknowledged(number: int, within: float) -> None:
    """Every gateway has heard of it."""


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ((2, 0), (0, None)),
        ((2, None, 0), (0, None)),
        ((2, None), (2, None)),
        ((None,), (None, "no answer in time")),
        ((None, 1, None), (1, None)),
    ],
)
def test_what_haproxy_said_last_counts_where_it_does_not_answer_just_now(
    answers: tuple[int | None, ...], expected: tuple[int | None, str | None]
) -> None:
    control: Any = SimpleNamespace(hub=SimpleNamespace(number=1, acknowledged=acknowledged), haproxy=Haproxy(*answers))
    assert asyncio.run(_drained(control, "node-1", 2.0)) == expected


@pytest.mark.parametrize(
    ("answer", "draining", "heard", "streams"),
    [(0, True, "v2", 0), (2, True, "v2", 2), (None, True, "v2", None), (0, True, "v1", None), (0, False, "v2", None)],
)
def test_what_runs_on_a_node_in_the_list_is_told_once_it_is_drained_and_every_gateway_has_heard_of_it(
    answer: int | None, draining: bool, heard: str, streams: int | None
) -> None:
    gateways = [SimpleNamespace(version="v2"), SimpleNamespace(version=heard)]
    hub = SimpleNamespace(version="v2", present=lambda: gateways)
    member = Member("node-1", "http://a", up=True, error=None, draining=draining)
    down = Member("node-2", "http://b", error="no connection", draining=draining)
    fleet = SimpleNamespace(members={"node-1": member, "node-2": down})
    control: Any = SimpleNamespace(hub=hub, haproxy=Haproxy(answer), fleet=fleet)
    first, second = asyncio.run(list_nodes(control))["nodes"]
    # The reason is another one's: that of a node that waits for its models, for one.
    assert [(node["streams"], node["reason"]) for node in (first, second)] == [
        (streams, None),
        (streams, "no connection"),
    ]


@pytest.mark.parametrize(
    ("streams", "reason", "shown"),
    [
        (0, None, "drained"),
        (1, None, "1 request still runs there"),
        (2, "no connection", "2 requests still run there; no connection"),
        (None, "waits for its models", "waits for its models"),
    ],
)
def test_the_table_says_whether_a_node_is_drained(
    run: Runner, monkeypatch: pytest.MonkeyPatch, streams: int | None, reason: str | None, shown: str
) -> None:
    node = {"name": "node-1", "state": "draining", "streams": streams, "reason": reason}
    monkeypatch.setattr(Admin, "__init__", lambda *_: None)
    monkeypatch.setattr(Admin, "__call__", lambda *_: {"nodes": [node]})
    assert run("nodes", "list").stdout.splitlines()[1].endswith(shown)
