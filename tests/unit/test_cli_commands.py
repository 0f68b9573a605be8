"""The command line without a stack: usage, exit statuses, and what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from support.command import Runner
from support.process import free_port

from corral.cli.common import Admin
from corral.cli.main import cli
from corral.stack.state import StateFolder
from corral.stack.status import runbook

NOUNS = [
    *("up", "down", "status", "doctor", "keys", "tenants", "nodes", "models"),
    *("audit", "config", "logs", "loadtest", "serve"),
]


@pytest.mark.parametrize("noun", NOUNS)
def test_every_command_explains_itself(noun: str) -> None:
    result = CliRunner().invoke(cli, [noun, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()[2].strip()) > 10


@pytest.mark.parametrize(
    "words",
    [
        ["status"], ["keys", "create", "x"], ["keys", "list"], ["nodes", "list"], ["models", "list"],
        ["models", "plan"], ["models", "apply", "--yes"], ["models", "watch"],
        ["audit", "list"], ["config", "reload"], ["logs"], ["loadtest", "run", "--no-key", "--closed", "2"],
        ["loadtest", "report", "nowhere.json"],
    ],
)  # fmt: skip
def test_without_a_stack_a_command_fails_with_a_sentence(run: Runner, words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith("corral: ")
    assert "Traceback" not in result.output
    assert not run.state.exists(), "asking makes no state"


def test_the_admin_key_may_come_from_a_file(run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CORRAL_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("CORRAL_ADMIN_KEY_FILE", str(tmp_path / "admin.key"))
    missing = run("keys", "list")
    assert missing.exit_code == 1 and f"{tmp_path / 'admin.key'} cannot be read" in missing.stderr
    (tmp_path / "admin.key").write_text("crl_x\n")
    # It has a key now, and asks.
    assert "127.0.0.1:1" in run("keys", "list").stderr
    assert Admin(StateFolder(run.state)).key == "crl_x"


def test_with_json_the_error_is_json(run: Runner) -> None:
    result = run("status", "--json")
    assert result.exit_code == 1
    assert "corral up" in json.loads(result.stdout)["error"]["message"]


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"], ["up", "--nodes", "0"], ["up", "--attach", "nonsense"], ["up", "--port", "99999"],
        ["up", "--attach", "http://a", "--nodes", "2"], ["keys", "create"], ["keys", "create", "x", "--role", "king"],
        ["keys", "create", "x", "--rpm", "0"], ["keys", "create", "x", "--expires", "soon"],
        ["keys", "create", "x", "--expires", "30"], ["audit", "list", "--since", "5"],
        ["loadtest", "run", "--no-key"], ["loadtest", "run", "--closed", "2"],
        ["loadtest", "run", "--no-key", "--closed", "2", "--rate", "3"],
        ["loadtest", "run", "--no-key", "--closed", "2", "--threshold", "p95_speed<1s"],
        ["loadtest", "run", "--no-key", "--closed", "2", "--slo", "ttft"],
        ["loadtest", "run", "--no-key", "--closed", "2", "--model", "a=0"],
        ["loadtest", "run", "--no-key", "--closed", "2", "--model", "a=2", "--zipf", "1"],
        ["loadtest", "run", "--no-key", "--closed", "2", "--prompt-tokens", "many"],
        ["loadtest", "run", "--no-key", "--closed", "2", "--speed", "2"],
        ["loadtest", "run", "--no-key", "--closed", "2", "--api", "anthropic", "--route", "embed"],
    ],
)  # fmt: skip
def test_wrong_usage_is_status_2(run: Runner, words: list[str]) -> None:
    assert run(*words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["statsu"], "No such command 'statsu'. Did you mean 'status'?"),
        (["key", "list"], "Did you mean 'keys'?"),
        (["list", "keys"], "Did you mean 'keys list'?"),
        (["backup", "drll"], "Did you mean 'drill'?"),
        (["zzz"], "No such command 'zzz'.\n"),
        (
            ["keys", "create", "x", "--tpm", "abc"],
            "'abc': expected a whole number of at least 1, such as 1000",
        ),
        (["keys", "create", "x", "--tpm", "0"], "'0': expected a whole number of at least 1"),
        (["keys", "create", "x", "--rpm", "1.5"], "'1.5': expected a whole number of at least 1"),
        (["tenants", "create", "x", "--rpm", "x"], "such as 1000, or none"),
        (["tenants", "create", ""], "'': expected a name of 1 to 128 characters, such as my-app"),
        (["keys", "create", ""], "'': expected a name of 1 to 128 characters, such as my-app"),
        (["keys", "create", "a\n"], "'a\\n': expected a name"),
        (["keys", "create", "a\tb"], "'a\\tb': expected a name"),
        (["keys", "create", "x" * 129], "expected a name of 1 to 128 characters"),
        (["keys", "create", "x", "--tenant", ""], "Invalid value for '--tenant': '': expected a name"),
        (
            ["keys", "create", "x", "--models", ""],
            "'': expected models such as 'llama3.2:*,qwen3:8b'; leave it out for all",
        ),
        (
            ["keys", "create", "x", "--networks", " ,"],
            "expected networks such as 10.1.0.0/16; leave it out for anywhere",
        ),
        (["keys", "update", "x", "--models", ""], "'': expected models such as 'llama3.2:*,qwen3:8b'; '*' is all"),
        (
            ["keys", "create", "x", "--deadline", "0s"],
            "'0s': expected more than nothing, such as 30s or 30d; leave it out",
        ),
        (
            ["keys", "create", "x", "--expires", "0"],
            "'0': expected more than nothing, such as 30s or 30d; leave it out",
        ),
        (["keys", "update", "x", "--deadline", "0s"], "'0s': expected more than nothing, such as 30s or 30d, or none"),
        (["backup", "list", "/nope"], "/nope is no folder"),
    ],
)
def test_wrong_usage_says_what_is_expected(run: Runner, words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert said in result.stderr


class Told:
    """An admin API that knows these answers."""

    answers: ClassVar[dict[str, Any]] = {}

    def __init__(self, state: StateFolder) -> None:
        pass

    def __call__(self, method: str, path: str, body: object = None, timeout: float = 30.0) -> Any:
        return self.answers[path.partition("?")[0]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The answers of the admin API, to be filled in."""
    monkeypatch.setattr(Told, "answers", {})
    for module in ("keys", "tenants", "audit"):
        monkeypatch.setattr(f"corral.cli.{module}.Admin", Told)
    return Told.answers


def test_a_key_is_shown_with_the_limits_in_force(run: Runner, told: dict[str, Any]) -> None:
    own = {"rpm": 7, "tpm": None, "concurrency": None, "daily_tokens": None, "monthly_tokens": None}
    told["/keys/x"] = {"id": "x", **own, "limits": {**own, "tpm": 200000, "concurrency": 32}}
    lines = {" ".join(line.split()) for line in run("keys", "show", "x").stdout.splitlines()}
    assert {"rpm 7", "tpm 200000 (default)", "concurrency 32 (default)", "daily_tokens none"} <= lines
    assert json.loads(run("keys", "show", "x", "--json").stdout) == told["/keys/x"]


def test_a_key_that_has_expired_is_marked(run: Runner, told: dict[str, Any]) -> None:
    keys = [{"id": name, "expires": ends} for name, ends in (("old", 1e9), ("new", 3e10), ("ever", None))]
    told["/keys"], told["/keys/old"] = {"keys": keys}, keys[0]
    old, new, ever = run("keys", "list").stdout.splitlines()[1:]
    assert "expired 2001-09-" in old
    assert " 2920-0" in new and "expired" not in new + ever
    assert "expired 2001-09-" in run("keys", "show", "old").stdout
    assert json.loads(run("keys", "list", "--json").stdout) == keys


def test_a_tenant_s_time_is_one_to_read(run: Runner, told: dict[str, Any]) -> None:
    told["/tenants/t"] = {"name": "t", "created": 1_700_000_000.5}
    assert "created  2023-11-1" in run("tenants", "show", "t").stdout


def test_an_audit_record_is_a_row_with_one_name_for_each_thing(
    run: Runner, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        {"id": "r1", "request_id": "q1", "ts": 1_700_000_000.0, "key": "k1"},
        {"id": "r2", "request_id": "", "ts": 1_720_000_000.0, "key": "gone"},
        {"id": "r3", "request_id": "q3", "ts": 1_720_000_000.0, "key": "k3"},
    ]
    keys = [{"id": "k1", "name": "my-app"}, {"id": "k2", "name": "twin"}, {"id": "k3", "name": "twin"}]
    told["/audit"], told["/keys"] = {"audit": records}, {"keys": keys}
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    try:
        head, first, second, third = (line.split() for line in run("audit", "list").stdout.splitlines())
    finally:
        monkeypatch.undo()
        time.tzset()
    assert head[:5] == ["TIME", "REQUEST", "ID", "KEY", "ADDR"]
    assert first[:5] == ["2023-11-14", "23:13:20", "CET", "q1", "my-app"]
    assert second[:5] == ["2024-07-03", "11:46:40", "CEST", "r2", "gone"], "what has no other name is shown by its id"
    assert third[3:6] == ["q3", "twin", "(k3)"], "and a name that is another key's too is not enough"


def test_who_waits_for_a_drained_node_drains_it_once(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Draining(Told):
        def __call__(self, method: str, path: str, body: object = None, timeout: float = 30.0) -> Any:
            asked.append(f"{method} {path}")
            return {"drained": len(asked) == 3, "streams": 3 - len(asked)}

    monkeypatch.setattr("corral.cli.nodes.Admin", Draining)
    assert run("nodes", "drain", "n", "--wait").stdout == "n is drained\n"
    assert asked == ["POST /nodes/n/drain?wait=5", *["GET /nodes/n/drain?wait=5"] * 2]


def test_a_record_with_what_is_no_time_hides_no_other(run: Runner, told: dict[str, Any]) -> None:
    told["/audit"] = {"audit": [{"id": "r1", "ts": 1e300}, {"id": "r2", "ts": "soon"}, {"id": "r3", "ts": 1.0}]}
    told["/keys"] = {"keys": []}
    shown = run("audit", "list").stdout
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["1e+300", "soon"]
    assert "r3" in shown


def test_a_row_that_stands_for_others_says_so(run: Runner, told: dict[str, Any]) -> None:
    admin, read = {"api": "admin", "ts": 1.0}, {"route": "/admin/audit", "status": 200}
    told["/keys"] = {"keys": []}
    told["/audit"] = {
        "audit": [
            {**admin, **read, "method": "GET", "after": {"query": "limit=5"}},
            {**admin, **read, "method": "GET", "after": {"query": "limit=5", "counting": True}},
            {**admin, **read, "method": "", "after": {"more_read": 29}},
            {**admin, "route": "/admin", "method": "", "status": 429, "after": {"more_refused": 7}},
            {**admin, "route": "/admin/keys", "method": "POST", "after": {"more_read": 1}},
            {**admin, "route": "/admin/keys", "method": "", "after": "more_read"},
        ]
    }
    shown = [re.split(r"  +", line)[2:] for line in run("audit", "list").stdout.splitlines()[1:]]
    routes = [next(cell for cell in row if "/admin" in cell).partition("/")[2] for row in shown]
    assert routes == [
        *("admin/audit", "admin/audit (those behind it are counted)", "admin/audit (29 more read)"),
        *("admin (7 more refused)", "admin/keys", "admin/keys"),
    ]
    assert "after.more_read" in run("audit", "list", "--help").stdout


def test_an_audit_record_is_whole_in_the_json(run: Runner, told: dict[str, Any]) -> None:
    told["/audit"] = {"audit": [{"id": "r1", "ts": 1.0, "key": "k1"}, {"id": "r2", "ts": 2.0, "key": "gone"}]}
    assert json.loads(run("audit", "list", "--json").stdout) == told["/audit"]["audit"]


def test_an_alert_s_runbook_is_one_that_is_there(tmp_path: Path) -> None:
    published = "https://github.com/corral-llm/corral/blob/main/docs/runbooks/NodeDown.md"
    alert = {"name": "NodeDown", "runbook_url": published}
    assert Path(runbook(alert)).read_text().startswith("# NodeDown\n")
    assert runbook(alert, tmp_path) == published
    assert runbook(alert | {"name": "Other"}) == published
    assert runbook(alert | {"runbook_url": "https://ours/NodeDown.md"}) == "https://ours/NodeDown.md"


def test_down_with_nothing_running_is_done(run: Runner) -> None:
    assert json.loads(run("down", "--json").stdout) == {"stopped": False}


def test_doctor_works_without_a_stack(run: Runner) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["healthy"]
    assert {"haproxy", "valkey", "disk"} <= {finding["check"] for finding in told["findings"]}


def test_doctor_names_a_folder_that_others_can_read(run: Runner) -> None:
    run.state.mkdir(mode=0o755)
    result = run("doctor")
    assert result.exit_code == 1
    assert f"chmod go= '{run.state}'" in result.stdout


def test_config_check_names_the_line(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "corral.yaml").write_text("limts: {}\n")
    result = run("config", "check")
    assert result.exit_code == 1
    assert result.stderr == "corral: corral.yaml:1: unknown field 'limts'; did you mean 'limits'?\n"


def test_config_show_hides_passwords(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "corral.yaml").write_text('store: {valkey: "redis://:hunter2@host:1/0"}\n')
    result = run("config", "show")
    assert result.exit_code == 0
    assert "hunter2" not in result.output
    assert "redis://:***@host:1/0" in result.output


def test_a_number_of_nothing_is_asked_for_its_unit(run: Runner) -> None:
    assert "30 of what? Write 30s, 30m, 30h or 30d" in run("keys", "create", "x", "--expires", "30").stderr
    assert "nothing runs" in run("keys", "rotate", "x", "--overlap", "0").stderr, "nothing is nothing in any unit"


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "localhost", "ftp://x", "https://"])
def test_an_address_without_a_scheme_is_told_what_it_needs(
    run: Runner, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("CORRAL_URL", url)
    monkeypatch.setenv("CORRAL_ADMIN_KEY", "crl_x")
    said = run("keys", "list")
    assert said.exit_code == 1
    assert "CORRAL_URL: expected an address such as http://127.0.0.1:8080" in said.stderr


def test_config_show_has_units_and_says_whose_the_ports_are(run: Runner) -> None:
    shown = run("config", "show").stdout
    assert "retention: 400d" in shown and "max_body: 32MiB" in shown
    assert "`corral status` shows" in shown.splitlines()[1]


def test_config_check_knows_the_nodes_that_a_tenant_may_have(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "corral.yaml"
    file.write_text("nodes: [{name: gpu-1, url: 'http://a:1'}]\ntenants: {nodes: {red: [gpu-9]}}\n")
    for words in (["config", "check"], ["up"]):
        result = run(*words)
        assert result.exit_code == 1
        assert "corral.yaml:2: tenants.nodes.red: there is no node 'gpu-9'" in result.stderr
    file.write_text("tenants: {nodes: {red: [gpu-9]}}\n")
    result = run("up", "--node-backend", "simulated", "--nodes", "1", "--port", str(free_port()))
    assert result.exit_code == 1
    assert "tenants.nodes.red: there is no node 'gpu-9': this start has node-1" in result.stderr
    assert not list((run.state / "run").glob("lock"))


def test_config_schema_is_json(run: Runner) -> None:
    assert "gateway" in json.loads(run("config", "schema").stdout)["properties"]


def test_up_with_a_wrong_configuration_starts_nothing(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "corral.yaml").write_text("gateway: {processes: many}\n")
    result = run("up")
    assert result.exit_code == 1
    assert "corral.yaml:1: gateway.processes: expected a whole number" in result.stderr
    assert not run.state.exists()


def test_a_taken_port_is_reported_with_its_holder(run: Runner) -> None:
    before = signal.getsignal(signal.SIGINT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run("up", "--port", str(port), "--node-backend", "simulated")
    assert result.exit_code == 1
    assert f"port {port} is taken by " in result.stderr
    assert f"(pid {os.getpid()})" in result.stderr
    assert signal.getsignal(signal.SIGINT) is before
    assert not list((run.state / "run").glob("lock"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--listen", "foo"], "--listen: expected HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "--listen: expected HOST:PORT"),
        (["--simulated", "nofile"], "--simulated: nofile cannot be read"),
    ],
)
def test_a_node_that_is_started_wrongly_is_told_in_a_line(run: Runner, words: list[str], said: str) -> None:
    result = run("serve", "node", *words)
    assert result.exit_code == 1
    assert said in result.output + str(result.exception)
    assert "Traceback" not in result.output


def test_a_log_that_is_empty_is_said_to_be(run: Runner) -> None:
    logs = run.state / "logs"
    logs.mkdir(parents=True)
    for name, text in (("node-1", ""), ("gateway-1", "a line\n")):
        (logs / f"{name}.log").write_text(text)
    told = {name: run("logs", "--program", name) for name in ("node-1", "gateway-1")}
    assert (told["node-1"].stdout, told["gateway-1"].stderr) == ("", "")
    assert f"nothing is in {logs / 'node-1.log'} yet" in told["node-1"].stderr
