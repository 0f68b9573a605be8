"""Prompts and answers that are kept for keys that want it, for no other: encrypted, redacted, cut, and for a time."""

from __future__ import annotations

import json
import socket
import time
from base64 import b64decode
from hashlib import sha256
from pathlib import Path
from threading import Semaphore
from typing import Any

import httpx
import pyrage
import pytest
from click.testing import CliRunner
from pydantic import ValidationError
from support.control import FakeNode, Running, make_key, recorded
from support.control import until as wait
from support.gateway import END, HEAD, LAST, LINE, Gateway, chunk, gateway
from support.process import until

from corral.cli.main import cli
from corral.config.record import AuditSettings
from corral.gateway.content import Keeper, open_content
from corral.store.keys import generate
from corral.store.spool import encode_frame

ME = pyrage.x25519.Identity.generate()
FULL = {"content": "full", "content_recipient": str(ME.to_public())}
SECRET = "Guten Tag! I am ann@example.org, 4111 1111 1111 1111"


def kept(gw: Gateway, request_id: str) -> list[dict[str, Any]]:
    """What the gateway has shipped of a request's text."""
    settled = gw.control.settled(request_id)
    return [open_content(b64decode(settled["content"]), [ME])] if "content" in settled else []


def test_it_is_kept_for_the_keys_that_want_it_and_lies_nowhere_in_clear(tmp_path: Path) -> None:
    with gateway(tmp_path, audit=FULL) as gw:
        wants = {"Authorization": f"Bearer {gw.new_key(content=True)}"}
        for stream in (True, False):
            body = gw.chat(stream=stream, messages=[{"role": "user", "content": SECRET}])
            (told,) = kept(gw, gw.post(body=body, headers=wants).headers["x-request-id"])
            assert (told["answer"], told["cut"]) == ("w0 w1 w2 ", [])
            sent = json.loads(told["prompt"])
            assert sent["messages"][0]["content"] == "Guten Tag! I am [redacted], [redacted]"
            assert (sent["model"], sent["stream"]) == ("m", stream)
        assert kept(gw, gw.post(body=body).headers["x-request-id"]) == [], "another key does not want it"
        refused = gw.post(body=gw.chat(model="nobody-has-it"), headers=wants)
        assert kept(gw, refused.headers["x-request-id"]) == []
        assert len([one for one in gw.control.records if "content" in one]) == 2
        until(lambda: (tmp_path / "access.log").read_bytes().count(b"answer_hash") == 4, "the access log is written")
        assert b'"content"' not in (tmp_path / "access.log").read_bytes()
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not [path for path in files if b"Guten Tag" in path.read_bytes()]
    other = tmp_path / "hash"
    other.mkdir()
    with gateway(other, audit={"content": "hash", "content_recipient": FULL["content_recipient"]}) as gw:
        wants = {"Authorization": f"Bearer {gw.new_key(content=True)}"}
        assert kept(gw, gw.post(headers=wants).headers["x-request-id"]) == []


def test_a_request_that_is_refused_as_the_spool_is_full_adds_nothing_to_it(tmp_path: Path) -> None:
    with gateway(tmp_path, audit=FULL, gateway={"spool_max": "20KB"}) as gw:
        wants = {"Authorization": f"Bearer {gw.new_key(content=True)}"}
        gw.control.busy = True
        until(lambda: gw.post(headers=wants).status_code == 503, "requests are shed")
        held = gw.spooled()
        for _ in range(20):
            assert gw.post(headers=wants).status_code == 503
        assert gw.spooled() == held


def test_it_is_cut_after_it_was_redacted() -> None:
    keeper = Keeper(AuditSettings.model_validate({**FULL, "content_max": 20}))
    told = open_content(b64decode(keeper.keep(b"0123456789 ann@example.org", "x" * 21 + LINE.decode())), [ME])
    assert told == {"prompt": "0123456789 [redacted", "answer": "x" * 20, "cut": ["prompt", "answer"]}
    text = "a crl_abcdefghij_0123456789abcdefghijABCDEFGHIJ0123456789 key"
    whole = Keeper(AuditSettings.model_validate(FULL))
    told = open_content(b64decode(whole.keep(b"\xff", text)), [ME])
    assert (told["prompt"], told["cut"], "0123456789" in told["answer"]) == ("\ufffd", [], False)
    with pytest.raises(ValueError, match="another identity"):
        open_content(b64decode(whole.keep(b"", "")), [pyrage.x25519.Identity.generate()])


@pytest.mark.parametrize("piece", ["a", "1", "a.", "1-", "a@", "a@b.", "\\n", "\\u0041", "crl_", " "])
def test_whatever_was_sent_is_redacted_in_no_time(piece: str) -> None:
    keeper = Keeper(AuditSettings.model_validate(FULL))
    text = piece * (400_000 // len(piece))
    began = time.process_time()
    told = open_content(b64decode(keeper.keep(f'{{"prompt":"{text}"}}'.encode(), text)), [ME])
    assert time.process_time() - began < 3, "all other requests wait meanwhile"
    assert told["cut"] == ["prompt", "answer"]


def test_what_is_redacted_is_what_json_means() -> None:
    patterns = [r"\b\d{4}( \d{4}){3}\b", r"\S+@\S+", "é"]
    keeper = Keeper(AuditSettings.model_validate({**FULL, "content_redact": patterns}))
    said = "the card:\n4111 1111 1111 1111\t4222 2222 2222 2222\u2028ann@example.org é \\4333 3333 3333 3333"
    for body in (json.dumps(said), json.dumps(said, ensure_ascii=False), json.dumps(said).replace("@", r"\u0040")):
        told = open_content(b64decode(keeper.keep(body.encode(), said)), [ME])
        expected = "the card:\n[redacted]\t[redacted]\u2028[redacted] [redacted] \\[redacted]"
        assert (json.loads(told["prompt"]), told["answer"]) == (expected, expected)
    for text in ("1ann@b.example+bob@c.example", "a@b@c.example", "x4111-1111-1111-1111y", "4111.1111  1111.1111"):
        told = open_content(b64decode(Keeper(AuditSettings.model_validate(FULL)).keep(b"", text)), [ME])
        assert "example" not in told["answer"], told
        assert "1111" not in told["answer"], told
    _, key = generate()
    for escaped in (key, key.replace("_", r"\u005f", 1), "".join(f"\\u{ord(letter):04x}" for letter in key)):
        body = json.dumps({"prompt": f"é {key} end"}).replace(key, escaped)
        told = open_content(b64decode(keeper.keep(body.encode(), "")), [ME])
        assert key[20:] not in json.loads(told["prompt"])["prompt"] and json.loads(told["prompt"])["prompt"].endswith(
            " end"
        )


def test_no_cut_leaves_half_of_what_is_redacted(tmp_path: Path) -> None:
    keeper = Keeper(AuditSettings.model_validate({**FULL, "content_max": 9000}))
    long = f"{'a' * 60}@example.org "
    text = long * 1000
    told = open_content(b64decode(keeper.keep(text.encode(), text)), [ME])
    assert (told["cut"], told["answer"].replace("[redacted] ", "")) == (["prompt", "answer"], "")
    with gateway(tmp_path, audit={**FULL, "content_max": 10, "content_redact": ["w0 .*w99"]}) as gw:
        wants = {"Authorization": f"Bearer {gw.new_key(content=True)}"}
        heard = Semaphore(0)

        def in_turns(connection: socket.socket) -> None:
            """Each word after the caller has the one before."""
            connection.sendall(HEAD)
            for number in range(101):
                connection.sendall(chunk(LINE % b"w%d " % number))
                assert heard.acquire(timeout=60)
            connection.sendall(chunk(LAST % 101) + END)

        for node in gw.nodes:
            node.script = [in_turns]
        with httpx.stream("POST", gw.url + "/api/chat", json=gw.chat(), headers=wants, timeout=60) as answer:
            for _ in answer.iter_lines():
                heard.release()
        (told,) = kept(gw, answer.headers["x-request-id"])
        assert (told["answer"], told["cut"]) == ("[redacted]", ["prompt", "answer"]), "its end was behind what is kept"


@pytest.mark.parametrize(
    "wrong",
    [
        {"content_recipient": None},
        {"content_recipient": "age1" + 58 * "q"},
        {"content_redact": ["("]},
        {"content_max": 300 << 10},
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        AuditSettings.model_validate({**FULL, **wrong})


def test_control_keeps_it_for_its_time_and_shows_it_to_who_has_the_identity(
    tmp_path: Path, node: FakeNode, database_url: str
) -> None:
    control = Running(
        tmp_path / "state",
        nodes=[{"url": node.url}],
        store={"database": database_url},
        audit={**FULL, "content_retention": "8s", "checkpoint": "200ms"},
    )
    try:
        key = make_key(control, content=True)
        assert (key["content"], make_key(control)["content"]) == (True, False)
        snapshot = {one["id"]: one for one in control.snapshot().json()["keys"]}
        assert snapshot[key["id"]]["content"] is True
        data = Keeper(AuditSettings.model_validate(FULL)).keep(b"asked", "said")
        now, identity = time.time(), tmp_path / "identity"
        identity.write_text(f"{ME}\n")
        settle = {"t": "settle", "request_id": "req-1", "ts": now, "key": key["id"], "outcome": "ok"}
        content = {"t": "content", "ts": now, "data": data}
        broken = [{**content, "of": 5}, {**content, "of": "r3", "data": "%"}, {**content, "of": "r4", "ts": None}]
        of_1 = [{**settle, "id": "r1", "content": data}, {**settle, "id": "r1", "content": "AAAA"}]
        records = [*of_1, *broken, {**content, "of": "r1", "data": "AAAA"}, {**settle, "id": "r5", "content": 5}]
        frames = b"".join(encode_frame(one) for one in records)
        path = "/internal/spool/gateway-1/0000000000000001.seg"
        assert control.internal.post(path, params={"offset": 0}, content=frames).status_code == 200
        env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}
        shown = CliRunner().invoke(cli, ["audit", "content", "req-1", "--identity", str(identity), "--json"], env=env)
        assert shown.exit_code == 0, shown.output
        assert json.loads(shown.stdout) == [{"id": "r1", "prompt": "asked", "answer": "said", "cut": []}]
        (named, none) = [row["content_hash"] for row in recorded(control.admin) if row["gw"] == "gateway-1"]
        assert (named, none) == (sha256(b64decode(data)).hexdigest(), None)
        read = [
            row for row in control.admin.get("/admin/audit").json()["audit"] if row["route"] == "/admin/audit/content"
        ]
        assert (len(read), read[0]["after"]) == (1, {"query": "request=req-1"})
        assert control.admin.get("/admin/audit/content", params={"request": "r3"}).status_code == 404
        assert control.admin.get("/admin/audit/content", params={"request": "r1\0"}).status_code == 400
        with control.client(make_key(control, role="operator")["key"]) as operator:
            assert operator.get("/admin/audit/content", params={"request": "req-1"}).status_code == 403
        gone = lambda: control.admin.get("/admin/audit/content", params={"request": "r1"}).status_code == 404  # noqa: E731
        wait("it is deleted", gone, 20)
        stays = [row["id"] for row in recorded(control.admin) if row["gw"] == "gateway-1"]
        assert stays == ["r1", "r5"], "its record stays"
        verified = CliRunner().invoke(cli, ["audit", "verify", "--json"], env=env)
        assert (verified.exit_code, json.loads(verified.stdout)["problems"]) == (0, []), "what is over is not missing"
    finally:
        control.close()
