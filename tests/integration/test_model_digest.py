"""The record names the model that answered: its digest, as its node told it before it was asked."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from sqlalchemy import update
from support.control import Running
from support.gateway import END, HEAD, LAST, LINE, Behaviour, Gateway, chunk, gateway, says, well

from corral.cli.main import cli
from corral.cli.siem import FORMATS
from corral.store.database import Database, resolve
from corral.store.spool import encode_frame
from corral.store.tables import audit

OLD, NEW = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def gw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway")) as made:
        yield made


def hold(gw: Gateway, *digests: object, ready: str = "") -> None:
    """Have control say that the nodes hold the model by these digests (None: without one), and that one alone is up."""
    gw.forget()
    tag = {"name": "m:latest", "model": "m:latest", "modified_at": "2026-11-23T15:00:00Z", "size": 1}
    nodes: list[dict[str, Any]] = []
    for one, digest in zip(gw.control.snapshot["nodes"], digests, strict=True):
        tags = [{"name": "other:latest", "digest": "c" * 64}, tag if digest is None else tag | {"digest": digest}]
        nodes.append(one | {"tags": tags, "state": "ready" if ready in ("", one["name"]) else "down"})
    gw.control.publish(nodes=nodes)
    gw.control.until_known()


def settled(gw: Gateway, answer: httpx.Response) -> dict[str, Any]:
    return gw.control.settled(answer.headers["x-request-id"])


@pytest.mark.parametrize(("node", "digest"), [("node-1", OLD), ("node-2", NEW)])
def test_it_is_that_of_the_node_that_was_asked(gw: Gateway, node: str, digest: str) -> None:
    hold(gw, OLD, NEW, ready=node)
    record = settled(gw, gw.post())
    assert (record["node"], record["model"], record["model_digest"]) == (node, "m", digest)


def test_it_is_that_of_the_last_node_where_one_failed(gw: Gateway) -> None:
    hold(gw, OLD, NEW)
    # Not a connection that ends: one that was used before is made anew, which is no other attempt.
    acts: list[Behaviour] = [says(500, {"error": "out of luck"}), well]
    for node in gw.nodes:
        node.script = [lambda connection: acts.pop(0)(connection)] * 2
    record = settled(gw, gw.post())
    assert (record["outcome"], record["attempts"], acts) == ("ok", 2, [])
    assert record["model_digest"] == {"node-1": OLD, "node-2": NEW}[record["node"]]


def test_it_is_that_of_the_version_that_answered_where_it_is_replaced_meanwhile(gw: Gateway) -> None:
    hold(gw, OLD, OLD, ready="node-1")
    replaced = threading.Event()

    def slowly(connection: socket.socket) -> None:
        connection.sendall(HEAD + chunk(LINE % b"one"))
        assert replaced.wait(60)
        connection.sendall(chunk(LAST % 1) + END)

    gw.nodes[0].script = [slowly]
    with httpx.stream("POST", gw.url + "/api/chat", json=gw.chat(), headers=gw.auth, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        hold(gw, NEW, NEW, ready="node-1")
        replaced.set()
        list(lines)
    assert settled(gw, answer)["model_digest"] == OLD
    assert settled(gw, gw.post())["model_digest"] == NEW


@pytest.mark.parametrize("told", [f"sha256:{OLD}", None, "d", OLD[:-1], OLD.upper(), 7])
def test_what_is_no_digest_is_left_out(gw: Gateway, told: object) -> None:
    hold(gw, told, told)
    record = settled(gw, gw.post())
    assert (record["outcome"], record["model_digest"]) == ("ok", OLD if told == f"sha256:{OLD}" else None)


def test_a_request_that_no_node_heard_of_has_none(gw: Gateway) -> None:
    hold(gw, OLD, NEW)
    record = settled(gw, gw.post(body=gw.chat(model="none", stream=False)))
    assert (record["status"], record["node"], record["model_digest"]) == (404, "", None)


def test_it_is_listed_exported_and_sealed(control: Running) -> None:
    record = {"t": "settle", "ts": time.time(), "api": "native", "model": "m:latest", "node": "node-1", "outcome": "ok"}
    frames = encode_frame({**record, "id": "r1", "model_digest": OLD}) + encode_frame({**record, "id": "r2"})
    path = "/internal/spool/gateway-1/0000000000000001.seg"
    assert control.internal.post(path, params={"offset": 0}, content=frames).status_code == 200
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["audit", *arguments], env=env)
        assert done.exit_code == 0, done.output
        return done.stdout

    listed = json.loads(said("list", "--model", "m:latest", "--json"))
    assert [row["model_digest"] for row in listed] == [OLD, None]
    head, first, second = said("list", "--model", "m:latest").splitlines()
    at = head.index("DIGEST")
    assert [line[at:].split()[:2] for line in (first, second)] == [[OLD[:12], "node-1"], ["-", "node-1"]]
    for form in FORMATS:
        *_, first, second = said("export", "--model", "m:latest", "--format", form).splitlines()
        assert (OLD in first, OLD in second) == (True, False), form
    assert "whole" in said("verify")
    database = Database(resolve(control.settings.store.database, control.state))
    try:
        change = update(audit).where(audit.c.id == "r1").values(model_digest=NEW)
        database.write_now(lambda connection: connection.execute(change))
    finally:
        database.close()
    told = CliRunner().invoke(cli, ["audit", "verify"], env=env)
    assert (told.exit_code, "record 1 (r1) was changed" in told.stdout) == (1, True), told.stdout
