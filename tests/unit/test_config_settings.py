"""corral.yaml and the environment: values, and complaints with file, line and the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args
from urllib.parse import unquote

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from corral.config import settings as model
from corral.config.errors import ConfigError
from corral.config.reader import WORDS
from corral.config.values import base_url, duration, duration_text, host_port, size, size_text
from corral.store.valkey import Valkey


def load(tmp_path: Path, text: str, env: dict[str, str] | None = None) -> model.Settings:
    path = tmp_path / "corral.yaml"
    path.write_text(text)
    return model.load(str(path), env or {})


def problems(tmp_path: Path, text: str, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, env)
    return [line.removeprefix(f"{tmp_path}/") for line in caught.value.problems]


def test_the_design_s_example_loads(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    loaded = load(
        tmp_path,
        f"""
nodes:   [{{name: node-1, url: "http://10.0.0.11:11434", slots: 4, memory: 22GiB, max_models: 3, accelerator: gpu}}]
models:  [{{name: "llama3.2:3b", digest: "{digest}", copies: 2, pin: true, num_ctx: 8192, options: {{seed: refuse}}}}]
gateway: {{processes: 1, max_duration: 30m, queue: {{length: 256, wait: 30s}}, first_token: 60s, between_tokens: 20s}}
limits:  {{on_store_failure: local, default: {{rpm: 600, tpm: 200000, concurrency: 32}}}}
store:   {{database: "sqlite:///corral.db", valkey: "redis://127.0.0.1:6390/0"}}
audit:   {{durability: written, retention: 400d, content: hash}}
""",
    )
    assert loaded.nodes[0].memory == 22 << 30
    assert loaded.models[0].options == {"seed": "refuse"}
    assert loaded.gateway.max_duration == 1800.0
    assert loaded.audit.retention == 400 * 86400.0
    assert loaded == model.load(None, {}).model_copy(update={"nodes": loaded.nodes, "models": loaded.models})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("audit: {}\nlimts: {}\n", "corral.yaml:2: unknown field 'limts'; did you mean 'limits'?"),
        (
            "gateway:\n  queue:\n    lenght: 3\n",
            "corral.yaml:3: unknown field 'gateway.queue.lenght'; did you mean 'length'?",
        ),
        ("max_body: 3\n", "corral.yaml:1: unknown field 'max_body'; did you mean 'gateway.max_body'?"),
        ("nodes:\n- {nam: a, url: http://a}\n", "corral.yaml:2: unknown field 'nodes[0].nam'; did you mean 'name'?"),
        (
            "gateway:\n  processes: two\n",
            "corral.yaml:2: gateway.processes: expected a whole number, got 'two'",
        ),
        ("gateway: {processes: true}", "corral.yaml:1: gateway.processes: expected a whole number, got True"),
        ("gateway: {processes: 0}", "corral.yaml:1: gateway.processes: expected at least 1, got 0"),
        (
            "\ngateway: {max_duration: 30x}",
            "corral.yaml:2: gateway.max_duration: expected a duration such as 500ms, 30s, 30m, 12h or 400d, got '30x'",
        ),
        (
            "audit:\n  retention: 30\n",
            "corral.yaml:2: audit.retention: a number alone would be seconds: write 30d for days (or 30h, 30w, 30s), "
            "got 30",
        ),
        (
            "audit: {content_retention: '90'}",
            "corral.yaml:1: audit.content_retention: a number alone would be seconds: write 90d for days "
            "(or 90h, 90w, 90s), got '90'",
        ),
        (
            "edge: {host: 'a b'}",
            "corral.yaml:1: edge.host: expected an address to listen on, such as 127.0.0.1 or ::, got 'a b'",
        ),
        (
            "models: [{name: a, digest: abc}]",
            "corral.yaml:1: models[0].digest: expected a digest: sha256: and 64 hexadecimal digits, got 'abc'",
        ),
        ("limits: {default: {rpm: .inf}}", "corral.yaml:1: limits.default.rpm: expected a number, got inf"),
        (
            "haproxy: {gateways: {A: 'h:1'}}",
            "corral.yaml:1: haproxy.gateways.A: expected lower-case letters, digits and hyphens, such as node-1, "
            "got 'A'",
        ),
        ("limits: 3", "corral.yaml:1: limits: expected fields (name: value), got 3"),
        ("nodes: [{name: a}]", "corral.yaml:1: nodes[0].url: is needed"),
        (
            "limits: {on_store_failure: maybe}",
            "corral.yaml:1: limits.on_store_failure: expected 'local' or 'deny', got 'maybe'",
        ),
        ("audit: {}\naudit: {}\n", "corral.yaml:2: 'audit' is given twice"),
        ("- a", "corral.yaml:1: expected fields such as 'gateway: …' at the top"),
        ("\na: &a [*a]\n", "corral.yaml:2: 'a' is nested too deeply, or refers to itself"),
        ("a: &a\n  b: *a\n", "corral.yaml:1: 'a' is nested too deeply, or refers to itself"),
        ("a: " + "[" * 40 + "]" * 40, "corral.yaml:1: 'a' is nested too deeply, or refers to itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "corral.yaml: is nested too deeply"),
        (
            "a: &a [" + "x, " * 100 + "]\nb: &b [" + "*a, " * 100 + "]\nc: [" + "*b, " * 100 + "]\n",
            "corral.yaml:1: the file has more than 100000 values, with aliases (*name) resolved",
        ),
        ("a: [", "corral.yaml:1: not YAML: expected the node content, but found '<stream end>'"),
        (
            "edge:\n  host: 0.0.0.0\n",
            "corral.yaml:1: edge: keys would cross the network in clear text: edge.plaintext: true allows that",
        ),
    ],
)
def test_a_complaint_names_its_line_and_the_nearest_name(tmp_path: Path, text: str, complaint: str) -> None:
    assert problems(tmp_path, text) == [complaint]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "gateway: {processes: x, nam: y}\nfoo: 1\n")) == 3


def test_a_password_is_never_in_a_complaint(tmp_path: Path) -> None:
    assert "hunter2" not in "\n".join(problems(tmp_path, 'store: {valkey: "http://:hunter2@host/0"}'))


def test_names_of_nodes_differ(tmp_path: Path) -> None:
    text = "nodes: [{name: a, url: 'http://a'}, {name: a, url: 'http://b'}]"
    assert problems(tmp_path, text) == ["corral.yaml: two nodes are called 'a': names must differ"]


def test_nodes_without_a_name_are_numbered(tmp_path: Path) -> None:
    loaded = load(tmp_path, "nodes: [{url: 'http://a:1'}, {url: 'http://b:2'}]")
    assert [node.name for node in loaded.nodes] == ["node-1", "node-2"]


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("redis://:pw@host:1/0\n")
    loaded = load(
        tmp_path,
        "gateway: {max_duration: 1m}\nlimits: {default: {rpm: 5}}\n",
        {
            "CORRAL_GATEWAY__MAX_DURATION": "1h30m",
            "CORRAL_GATEWAY__QUEUE__LENGTH": "7",
            "CORRAL_LIMITS__DEFAULT__RPM": "none",
            "CORRAL_STORE__VALKEY_FILE": str(secret),
            "CORRAL_AUTH__PEPPER_FILE": "/run/secrets/pepper",
            "CORRAL_GATEWAY__TRUSTED_PROXIES": "10.0.0.0/8,127.0.0.1/32",
            "CORRAL_URL": "http://elsewhere",
        },
    )
    assert loaded.gateway.max_duration == 5400.0
    assert loaded.gateway.queue.length == 7
    assert loaded.limits.default.rpm is None
    assert loaded.store.valkey == "redis://:pw@host:1/0"
    assert loaded.auth.pepper_file == Path("/run/secrets/pepper")
    assert loaded.gateway.trusted_proxies == ("10.0.0.0/8", "127.0.0.1/32")


@pytest.mark.parametrize(
    ("text", "env", "denied"),
    [
        ("", {}, []),
        ("limits: {on_store_failure: deny}", {}, ["rpm", "concurrency", "tpm", "daily_tokens", "monthly_tokens"]),
        ("limits: {on_store_failure: {monthly_tokens: deny}}", {}, ["monthly_tokens"]),
        ("", {"CORRAL_LIMITS__ON_STORE_FAILURE__TPM": "deny"}, ["tpm"]),
        ("limits: {on_store_failure: deny}", {"CORRAL_LIMITS__ON_STORE_FAILURE": "local"}, []),
    ],
)
def test_what_becomes_of_a_limit_without_its_store(
    tmp_path: Path, text: str, env: dict[str, str], denied: list[str]
) -> None:
    file = tmp_path / "corral.yaml"
    file.write_text(text)
    assert model.load(file, env).limits.denied() == denied


def test_ollama_url_and_redis_url_are_understood() -> None:
    loaded = model.load(None, {"OLLAMA_URL": "http://a:1, http://b:2", "REDIS_URL": "redis://r:1/0"})
    assert [(node.name, node.url) for node in loaded.nodes] == [("node-1", "http://a:1"), ("node-2", "http://b:2")]
    assert loaded.store.valkey == "redis://r:1/0"


def test_empty_variables_are_not_set() -> None:
    assert model.load(None, {"OLLAMA_URL": "", "REDIS_URL": "", "CORRAL_GATEWAY__NAME": ""}) == model.load(None, {})


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        (
            {"CORRAL_GATEWAY__MAX_DURATIN": "1"},
            "environment: unknown field 'CORRAL_GATEWAY__MAX_DURATIN'; did you mean 'CORRAL_GATEWAY__MAX_DURATION'?",
        ),
        (
            {"CORRAL_GATEWAY__FIRST_TOKEN": "soon"},
            "environment: CORRAL_GATEWAY__FIRST_TOKEN: gateway.first_token: "
            "expected a duration such as 500ms, 30s, 30m, 12h or 400d, got 'soon'",
        ),
        (
            {"CORRAL_NODES": "[" * 5000 + "]" * 5000},
            "environment: CORRAL_NODES: is nested too deeply",
        ),
        (
            {"OLLAMA_URL": "ftp://x"},
            "environment: OLLAMA_URL: nodes[0].url: expected an address such as http://10.0.0.11:11434, got 'ftp://x'",
        ),
    ],
)
def test_a_complaint_names_the_variable(env: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model.load(None, env)
    assert caught.value.problems == (complaint,)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        model.load(str(tmp_path / "nowhere.yaml"), {})


def test_settings_written_as_yaml_load_to_the_same(tmp_path: Path) -> None:
    before = load(tmp_path, "limits: {default: {rpm: null}}\nnodes: [{url: 'http://a:1', memory: 1GiB}]\n")
    assert load(tmp_path, yaml.safe_dump(before.model_dump(mode="json"))) == before


def test_the_schema_knows_every_section() -> None:
    assert set(model.schema()["properties"]) == set(model.Settings.model_fields)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), (5, 5), ("250ms", 0.25), ("1h30m", 5400), ("400d", 34_560_000), ("1.5m", 90)]
)
def test_durations(text: object, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1h30", "-3", "3y", True, None, [], float("inf"), float("nan"), "1 2"])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration(text)


@pytest.mark.parametrize(
    ("text", "count"), [("22GiB", 22 << 30), ("1kb", 1000), ("1K", 1024), (5, 5), ("1.5MiB", 1_572_864)]
)
def test_sizes(text: object, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("value", ["9" * 400, "9" * 400 + "d", 10**400], ids=["digits", "days", "whole"])
def test_a_duration_that_no_float_holds_is_none(value: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration(value)


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans()))
def test_anything_is_a_value_or_a_value_error(value: object) -> None:
    for parse in (duration, size):
        try:
            assert parse(value) >= 0
        except ValueError:
            continue


@given(st.text())
def test_an_address_cannot_break_out_of_a_line(text: str) -> None:
    for parse in (base_url, host_port):
        try:
            parse(text)
        except ValueError:
            continue
        assert not set(text.strip()) & set(" \t\r\n#\"'\\{}"), text


@pytest.mark.parametrize("url", ["http://a:1/path", "http://u:p@a:1", "http://a b", "http://a:0", "http://a\nb", "x"])
def test_what_is_no_node(url: str) -> None:
    with pytest.raises(ValueError, match="expected an address"):
        base_url(url)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://host:1/0", "redis://:a%2Fb%40c@host:1/0"),
        ("redis://user:old@[::1]:6379", "redis://user:a%2Fb%40c@[::1]:6379"),
    ],
)
def test_valkey_s_password_comes_from_a_file(tmp_path: Path, url: str, address: str) -> None:
    (tmp_path / "valkey.password").write_text("a/b@c\n")
    store = {"valkey": url, "valkey_password_file": "valkey.password"}
    loaded = model.Settings.model_validate({"store": store, "control": {"state": str(tmp_path)}})
    assert loaded.valkey_address() == address
    assert "a/b@c" not in loaded.model_dump_json()
    client = Valkey(loaded.valkey_address())
    assert unquote(client.password or "") == "a/b@c"


def test_a_password_of_valkey_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_text("\n")
    for file, reason in ((path, "is empty"), (tmp_path / "none", "cannot be read: No such file")):
        loaded = model.Settings.model_validate({"store": {"valkey_password_file": str(file)}})
        with pytest.raises(ConfigError, match=reason):
            loaded.valkey_address()


def test_without_a_file_the_address_is_what_is_said() -> None:
    assert model.load(None, {}).valkey_address() == "redis://127.0.0.1:6390/0"


def patterns(model_: type[BaseModel], seen: set[type[BaseModel]]) -> set[str]:
    seen.add(model_)
    found: set[str] = set()
    for field in model_.model_fields.values():
        found |= {str(rule.pattern) for rule in field.metadata if getattr(rule, "pattern", None)}
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
                found |= patterns(inner, seen)
    return found


def test_no_complaint_shows_a_regular_expression() -> None:
    assert patterns(model.Settings, set()) == set(WORDS)


NODES = """
nodes:
  - {name: gpu-1, url: "http://10.0.0.11:11434"}
  - {name: gpu-2, url: "http://10.0.0.12:11434"}
"""


def test_a_tenant_s_node_is_one_of_the_nodes(tmp_path: Path) -> None:
    path = tmp_path / "corral.yaml"
    path.write_text(NODES + "tenants:\n  nodes:\n    red:\n      - gpu-1\n      - gpu-3\n")
    with pytest.raises(ConfigError) as caught:
        model.load(path, {}, whole=True)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}:9: tenants.nodes.red: there is no node 'gpu-3'; did you mean 'gpu-")
    assert line.endswith("'? the nodes are gpu-1, gpu-2")
    # What `corral up` wrote may be behind in one of the two.
    assert model.load(path, {}).tenants.nodes["red"] == ("gpu-1", "gpu-3")
    path.write_text("tenants: {nodes: {red: [gpu-3]}}\n")
    assert model.load(path, {}, whole=True).nodes == (), "which nodes there will be is not known here"


@given(st.floats(0, 1e15))
def test_a_duration_is_written_so_that_it_is_read_again(seconds: float) -> None:
    assert duration(duration_text(seconds)) == seconds


@given(st.integers(0, 1 << 60))
def test_a_size_is_written_so_that_it_is_read_again(octets: int) -> None:
    assert size(size_text(octets)) == octets


def test_what_was_loaded_is_shown_with_units_and_loads_again(tmp_path: Path) -> None:
    loaded = load(tmp_path, "audit: {retention: 30d}\npreload: {timeout: 90}\ngateway: {max_body: 1MiB}\n")
    shown = loaded.model_dump(mode="json")
    assert (shown["audit"]["retention"], shown["preload"]["timeout"], shown["gateway"]["max_body"]) == (
        "30d",
        "90s",
        "1MiB",
    )
    assert load(tmp_path, yaml.safe_dump(shown)) == loaded
