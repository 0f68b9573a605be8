"""What the command line says to someone whose command does not fit what there is: each says what to do instead."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.control import FakeNode, Running, make_key, until
from support.process import free_port

from corral.cli.main import cli
from corral.store.spool import encode_frame

RECIPIENT = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"


@pytest.fixture
def control(tmp_path: Path, node: FakeNode) -> Iterator[Running]:
    full = {"content": "full", "content_recipient": RECIPIENT, "content_retention": "1h"}
    made = Running(tmp_path / "state", nodes=[{"url": node.url}], audit=full)
    yield made
    made.close()


def run(control: Running, *arguments: str) -> Result:
    env = {"CORRAL_URL": control.url, "CORRAL_ADMIN_KEY": (control.state / "admin.key").read_text().strip()}
    return CliRunner().invoke(cli, list(arguments), env=env)


# -- tenants


def test_a_tenant_that_is_not_there_is_made_only_where_that_is_said(control: Running) -> None:
    assert run(control, "tenants", "create", "research").exit_code == 0
    slip = run(control, "keys", "create", "x", "--tenant", "reserch")
    assert slip.exit_code == 1
    assert "there is no tenant 'reserch'; did you mean 'research'?" in slip.stderr
    assert "`corral tenants create reserch`, or --new-tenant" in slip.stderr
    assert [one["name"] for one in json.loads(run(control, "tenants", "list", "--json").stdout)] == [
        "default",
        "research",
    ]
    assert run(control, "keys", "create", "x", "--tenant", "research").exit_code == 0
    assert run(control, "keys", "create", "x", "--tenant", "team b", "--new-tenant").exit_code == 0
    assert "team b" in run(control, "tenants", "list").stdout
    assert run(control, "keys", "create", "x").exit_code == 0


def test_usage_of_a_tenant_that_is_not_there_is_an_error(control: Running) -> None:
    key = make_key(control, tenant="team")["id"]
    ship(control, {"request_id": "r", "key": key, "status": 200})
    for wrong, more in (
        ("tean", "; did you mean 'team'?"),
        ("x", ": `corral tenants list` shows those that there are"),
    ):
        unknown = run(control, "usage", "report", "--tenant", wrong)
        assert (unknown.exit_code, unknown.stderr) == (1, f"corral: tenant: there is no tenant {wrong!r}{more}\n")
    assert run(control, "usage", "report", "--tenant", "default").stdout == "nothing was used\n"
    control.admin.post(f"/admin/keys/{key}/revoke").raise_for_status()
    assert run(control, "tenants", "remove", "team").exit_code == 0
    assert run(control, "usage", "report", "--tenant", "team").stdout.splitlines()[1:], "what it used stays"


def test_a_key_whose_texts_are_not_kept_is_made_and_that_is_said(control: Running, tmp_path: Path) -> None:
    told = "note: content: its prompts and answers are not kept"
    assert f"{told}, though audit.content is full: that takes --content\n" in run(control, "keys", "create", "x").stderr
    made = run(control, "keys", "create", "y", "--content")
    assert (made.exit_code, "note:" in made.stderr) == (0, False)
    for setting in ("hash", "none"):
        other = Running(tmp_path / setting, audit={"content": setting})
        try:
            made = run(other, "keys", "create", "x", "--content")
            assert made.stdout.startswith("crl_") and made.stdout.count("\n") == 1
            assert f"{told}: audit.content is {setting}. That takes full, and audit.content_recipient" in made.stderr
            assert "note:" not in run(other, "keys", "create", "y").stderr
        finally:
            other.close()


# -- models


def test_removing_a_model_that_is_nowhere_is_a_failure(control: Running) -> None:
    nowhere = run(control, "models", "remove", "nope")
    assert nowhere.exit_code == 1
    assert "no node holds nope:latest: `corral models list` shows what there is" in nowhere.stderr
    assert json.loads(run(control, "models", "operations", "--json").stdout) == [], "nothing was begun"
    slip = run(control, "models", "why", "mm:latest")
    assert "no node holds mm:latest, and the catalogue does not name it; did you mean 'm'?" in slip.stderr


def test_the_last_copy_of_a_model_is_not_removed_unasked(control: Running, node: FakeNode) -> None:
    refused = run(control, "models", "remove", "m")
    assert refused.exit_code == 2
    assert "no node would hold m:latest any more: give --yes" in refused.stderr
    with closing(FakeNode()) as other:
        assert run(control, "nodes", "add", other.url).exit_code == 0
        both = run(control, "models", "remove", "m", "--node", "node-1", "--node", "node-2")
        assert both.exit_code == 2
        one = run(control, "models", "remove", "m", "--node", "node-2")
        assert "give --yes" not in one.stderr, "node-1 has it"
        assert "remove m:latest on node-2" in one.stderr
    (begun,) = json.loads(run(control, "models", "operations", "--json").stdout)
    assert [step["node"] for step in begun["steps"]] == ["node-2"]


def test_what_loads_an_unloaded_model_again_is_said(control: Running) -> None:
    until("the node is known", lambda: control.node()["state"] == "ready")
    unloaded = run(control, "models", "unload", "m")
    assert (unloaded.exit_code, unloaded.stdout) == (0, "done\n")
    again = "m:latest is loaded again for the next request that asks for it"
    assert f"note: {again}: `corral models disable m:latest` refuses those\n" in unloaded.stderr
    run(control, "models", "disable", "m")
    assert "note:" not in run(control, "models", "unload", "m").stderr


def test_why_a_model_is_disabled_is_in_the_table(control: Running) -> None:
    until("the node is known", lambda: control.node()["state"] == "ready")
    assert run(control, "models", "disable", "m", "--reason", "it leaks").exit_code == 0
    assert run(control, "models", "disable", "other").exit_code == 0
    rows = run(control, "models", "list").stdout.splitlines()[1:]
    assert [("yes: it leaks" in row, " yes " in row) for row in rows] == [(True, False), (False, True)], rows
    listed = json.loads(run(control, "models", "list", "--json").stdout)
    assert [one["disabled_reason"] for one in listed] == ["it leaks", None]
    assert "leaks" not in control.snapshot().text, "it is for operators alone"
    assert run(control, "models", "why", "m").stdout.splitlines()[0].startswith("disabled: it leaks (")
    run(control, "models", "enable", "m")
    assert "leaks" not in run(control, "models", "list").stdout


# -- nodes


def test_a_node_that_is_there_already_is_refused_however_it_is_written(control: Running, node: FakeNode) -> None:
    same = node.url.replace("127.0.0.1", "localhost") + "/"
    for url in (node.url, same):
        refused = run(control, "nodes", "add", url)
        assert (refused.exit_code, f"node-1 is at {node.url} already" in refused.stderr) == (1, True), url
    assert len(json.loads(run(control, "nodes", "list", "--json").stdout)) == 1


def test_an_address_of_corral_itself_is_no_node(control: Running) -> None:
    edge = f"http://127.0.0.1:{control.settings.edge.port}"
    for url in (edge, edge.replace("127.0.0.1", "localhost"), control.url, control.settings.gateway.nodes_url):
        refused = run(control, "nodes", "add", url)
        assert refused.exit_code == 1
        assert "is an address of Corral itself: a node is an Ollama server" in refused.stderr, url
    assert len(json.loads(run(control, "nodes", "list", "--json").stdout)) == 1


def test_another_corral_is_no_node(control: Running, tmp_path: Path) -> None:
    """By what it answers: of its addresses this control knows nothing."""
    other = Running(tmp_path / "other")
    try:
        refused = run(control, "nodes", "add", other.url)
        assert (refused.exit_code, "is an address of Corral itself" in refused.stderr) == (1, True), refused.output
    finally:
        other.close()


def test_a_node_that_does_not_answer_is_added_and_that_is_said(control: Running) -> None:
    added = run(control, "nodes", "add", f"http://127.0.0.1:{free_port()}")
    assert added.exit_code == 0
    assert "added node-2, which does not answer as Ollama does now (no connection: connection refused)" in added.stdout
    with closing(FakeNode()) as other:
        assert run(control, "nodes", "add", other.url).stdout == "added node-3\n"


# -- the audit trail


def ship(control: Running, *records: dict[str, Any]) -> None:
    common = {"t": "settle", "ts": time.time(), "api": "native", "route": "/api/chat", "outcome": "ok"}
    frames = b"".join(encode_frame({**common, "id": one["request_id"], **one}) for one in records)
    path = "/internal/spool/gateway-1/0000000000000001.seg"
    assert control.internal.post(path, params={"offset": 0}, content=frames).status_code == 200


def test_why_there_is_nothing_to_compare_or_to_show(control: Running, tmp_path: Path) -> None:
    keeps, other = make_key(control, content=True)["id"], make_key(control, name="plain")["id"]
    ship(
        control,
        {"request_id": "old", "key": keeps, "ts": time.time() - 7200},
        {"request_id": "new", "key": keeps},
        {"request_id": "plain", "key": other},
        {"request_id": "refused", "key": keeps, "outcome": "limited"},
    )
    call = control.admin.post("/admin/keys", json={"name": "x"}, headers={"X-Request-ID": "call-1"})
    asked = [row for row in control.admin.get("/admin/audit").json()["audit"] if row["route"] == "/admin/keys"]
    admin = asked[-1]["request_id"] or asked[-1]["id"]
    assert call.status_code == 201
    identity, text = tmp_path / "identity", tmp_path / "text"
    identity.write_text("AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX\n")
    text.write_text("asked")
    for request, why in (
        ("old", "audit.content_retention (1h) is over"),
        ("new", "its text has not come from its gateway yet"),
        ("plain", f"its key plain ({other}) was made without --content"),
        ("refused", "it was refused (outcome limited)"),
        ("nobody", "there is no record of a request 'nobody': `corral audit list` shows those that there are"),
        (admin, "is a call of the admin API: only requests for models have a prompt and an answer"),
    ):
        shown = run(control, "audit", "content", request, "--identity", str(identity))
        assert (shown.exit_code, why in shown.stderr) == (1, True), shown.output
    for request, why in ((admin, "is a call of the admin API"), ("nobody", "there is no record of a request")):
        compared = run(control, "audit", "compare", request, "--prompt", str(text))
        assert (compared.exit_code, why in compared.stderr) == (1, True), compared.output


def test_that_no_text_is_kept_at_all_is_said_first(tmp_path: Path, node: FakeNode) -> None:
    control = Running(tmp_path / "state", nodes=[{"url": node.url}])
    try:
        ship(control, {"request_id": "r", "key": make_key(control, content=True)["id"]})
        until("the record is there", lambda: control.admin.get("/admin/audit?request=r").json()["audit"])
        told = control.admin.get("/admin/audit/content", params={"request": "r"}).json()["error"]["message"]
        assert "audit.content is 'hash'; with 'full' it is kept for keys made with --content" in told
    finally:
        control.close()
