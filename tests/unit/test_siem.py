"""Audit records in the forms of others: nothing that a record has is left out of one."""

from __future__ import annotations

import csv
import json
import re
from typing import Any

import pytest

from corral.cli.siem import COLUMNS, FORMATS, lines, ocsf
from corral.store.tables import audit

UNSEEN = {"leaf"}
"""Of a record's columns: the hash of all the others, which `verify` makes anew."""


def record(**more: Any) -> dict[str, Any]:
    """One with another text or number in each of its columns."""
    made: dict[str, Any] = {name: f"v-{name}-w" for name in COLUMNS}
    numbers = ("seq", "ts", "pos", "attempts", "req_bytes", "resp_bytes", "prompt_tokens", "tokens", "ms", "status")
    made |= {name: 7000 + at for at, name in enumerate(numbers)}
    made |= {
        "queue_ms": 8000.5,
        "ttft_ms": 8001.5,
        "estimated": True,
        "outcome": "ok",
        "method": "POST",
        "api": "openai",
    }
    made |= {"before": {"rpm": 8002}, "after": {"rpm": 8003}}
    return made | more


def test_the_columns_are_those_of_the_table() -> None:
    assert set(COLUMNS) == {column.name for column in audit.columns} - UNSEEN


@pytest.mark.parametrize("form", FORMATS)
def test_each_form_has_all_of_a_record(form: str) -> None:
    *_, line = lines([record()], form, "1.0")
    for name, value in record().items():
        text = re.sub(r"\D", "", json.dumps(value)) if isinstance(value, dict) else str(value)
        if name == "ts" and form in ("cef", "ocsf"):
            text += "000"
        assert text.lower() in line.lower().replace("\\=", "="), name


def test_each_form_is_read_by_what_reads_it() -> None:
    table = list(csv.DictReader(lines([record()], "csv", "1.0")))
    assert (table[0]["continued"], table[0]["prompt_hash"]) == ("v-continued-w", "v-prompt_hash-w")
    (line,) = lines([record(continued="node=2")], "cef", "1.0")
    pairs = dict(re.findall(r"(\w+)=((?:\\=|[^=])*?)(?= \w+=|$)", line.split("|")[7]))
    assert (pairs["CorralContinued"], pairs["CorralPromptHash"]) == ("node\\=2", "v-prompt_hash-w")
    assert pairs["CorralModelDigest"] == "v-model_digest-w"
    assert (pairs["CorralEstimated"], pairs["externalId"]) == ("true", "v-request_id-w")
    (line,) = lines([record()], "ocsf", "1.0")
    assert json.loads(line)["unmapped"]["answer_hash"] == "v-answer_hash-w"


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_record_has_not_is_left_out_or_empty(form: str) -> None:
    bare = dict.fromkeys(COLUMNS) | {"seq": 1, "ts": 1.5, "id": "a"}
    *_, line = lines([bare], form, "1.0")
    assert "None" not in line


def test_an_event_of_ocsf_has_what_its_class_requires_and_nothing_empty() -> None:
    """Class 6003 of schema 1.3.0: what is required of it and of the objects in it."""
    bare: dict[str, Any] = dict.fromkeys(COLUMNS) | {"seq": 1, "ts": 1.5, "id": "a"}
    retention = bare | {
        "api": "admin",
        "method": "DELETE",
        "route": "/retention/content",
        "gw": "control",
        "status": 200,
    }

    def empty(value: Any) -> bool:
        return value in (None, "", {}) or (isinstance(value, dict) and any(map(empty, value.values())))

    for one in (record(addr="2001:db8::1"), bare, retention, record(outcome=None, status=None, method="OPTIONS")):
        event = ocsf(one, "1.0")
        assert not any(map(empty, event.values())), event
        assert {"activity_id", "category_uid", "class_uid", "type_uid", "time", "severity_id", "metadata"} <= set(event)
        assert event["api"]["operation"] and event["metadata"]["product"] and event["metadata"]["version"] == "1.3.0"
        assert event["type_uid"] == 100 * event["class_uid"] + event["activity_id"]
        assert {"ip", "name"} & set(event["src_endpoint"]) and {"user", "app_name"} & set(event["actor"])
        assert "http_response" not in event or event["http_response"]["code"] == one["status"]
    whole = ocsf(record(addr="192.0.2.7"), "1.0")
    assert whole["src_endpoint"] == {"ip": "192.0.2.7"} and whole["resources"] == [
        {"name": "v-model-w", "type": "model"}
    ]
    assert (whole["http_request"]["length"], whole["http_response"]["length"]) == (7004, 7005)


def test_a_request_that_runs_is_no_failure() -> None:
    (line,) = lines([record(outcome=None)], "cef", "1.0")
    assert line.split("|")[6] == "0"
    event = ocsf(record(outcome=None), "1.0")
    assert (event["severity_id"], event["status_id"]) == (0, 0)


def test_cef_has_a_key_of_its_own_for_addresses_of_ipv6() -> None:
    (line,) = lines([record(addr="2001:db8::1")], "cef", "1.0")
    assert "c6a2Label=Source IPv6 Address c6a2=2001:db8::1" in line and " src=" not in line
    (line,) = lines([record(addr="192.0.2.7")], "cef", "1.0")
    assert " src=192.0.2.7 " in line and "c6a2" not in line


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("ts", ["soon", 1e308, None])
def test_a_record_with_what_is_no_time_hides_no_other(form: str, ts: Any) -> None:
    found = list(lines([record(ts=ts, ms=ts), record(id="behind")], form, "1"))
    assert "behind" in found[-1]
