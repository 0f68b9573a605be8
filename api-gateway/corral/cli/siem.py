"""Audit records as others read them: JSON Lines, CSV, ArcSight's CEF, and OCSF's API Activity. Pure functions.

CEF: Implementing ArcSight Common Event Format, revision 25. OCSF: schema 1.3.0, class 6003.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

FORMATS = ("json", "csv", "cef", "ocsf")
COLUMNS = (
    *("seq", "id", "request_id", "ts", "gw", "pos", "key", "tenant", "addr", "api", "route", "method", "model"),
    *("status", "outcome", "node", "attempts", "req_bytes", "resp_bytes", "prompt_tokens", "tokens", "estimated"),
    *("queue_ms", "ttft_ms", "ms", "continued", "before", "after", "prompt_hash", "answer_hash", "content_hash"),
    "model_digest",
)
"""What a record has, in each form."""
SEVERITY = {"ok": 1, "client_gone": 2, "cancelled": 3, "refused": 4, "limited": 4, "overloaded": 5}
"""CEF's, 0 to 10; 6 for what is not here, 0 for a request that runs."""
OCSF_SEVERITY = {"ok": 1, "client_gone": 1, "cancelled": 1, "refused": 2, "limited": 2}
"""OCSF's; 3 for what is not here, 0 (unknown) for a request that runs."""

_OCSF_UNMAPPED = (
    *("seq", "gw", "pos", "model", "attempts", "prompt_tokens", "tokens", "estimated", "queue_ms", "ttft_ms"),
    *("continued", "before", "after", "prompt_hash", "answer_hash", "content_hash", "model_digest"),
)
_OCSF_ACTIVITY = {"POST": 1, "GET": 2, "PUT": 3, "PATCH": 3, "DELETE": 4}
_OCSF_NAMES = {1: "Create", 2: "Read", 3: "Update", 4: "Delete", 99: "Other"}
_CEF_KEYS = {
    **{"request_id": "externalId", "addr": "src", "key": "suid", "route": "request", "method": "requestMethod"},
    **{"outcome": "outcome", "req_bytes": "in", "resp_bytes": "out", "gw": "dvchost", "node": "dhost"},
}
_CEF_CUSTOM = {
    **{"tenant": "cs1", "model": "cs2", "prompt_tokens": "cn1", "tokens": "cn2", "status": "cn3"},
    **{"before": "cs3", "after": "cs4"},
}
_CEF_OWN = {
    name: "Corral" + "".join(word.title() for word in name.split("_"))
    for name in COLUMNS
    if name not in {**_CEF_KEYS, **_CEF_CUSTOM, "ts": ""}
}
"""What CEF has no key for: keys of our own, after the vendor's name as the standard has it."""


def lines(records: Iterable[Mapping[str, Any]], form: str, version: str) -> Iterator[str]:
    """The records as lines of one of FORMATS; `version` is Corral's."""
    if form == "csv":
        yield ",".join(COLUMNS)
    for record in records:
        if form == "csv":
            yield _csv(record)
        elif form == "cef":
            yield _cef(record, version)
        elif form == "ocsf":
            yield json.dumps(ocsf(record, version), ensure_ascii=False)
        else:
            shown = {name: value for name, value in record.items() if name != "leaf"}
            yield json.dumps(shown, ensure_ascii=False)


def _csv(record: Mapping[str, Any]) -> str:
    cells = []
    for name in COLUMNS:
        value = record.get(name)
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
        # A spreadsheet takes such a text for a formula.
        cells.append(f"'{text}" if isinstance(text, str) and text[:1] in ("=", "+", "-", "@", "\t", "\r") else text)
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    # A cell's own line breaks are within quotes, but a line here is a record.
    return out.getvalue().replace("\r", " ").replace("\n", " ")


def _milliseconds(value: object, in_one: int) -> int:
    """A time of a record, of which one has so many of them; 0 where somebody has written what is none: that hides no
    other record."""
    return int(value * in_one) if isinstance(value, int | float) and abs(value) < 1e300 else 0


def _cef(record: Mapping[str, Any], version: str) -> str:
    kind = "admin" if record.get("api") == "admin" else "inference"
    name = f"{record.get('method') or ''} {record.get('route') or ''}".strip()
    severity = SEVERITY.get(outcome, 6) if (outcome := record.get("outcome")) else 0
    head = ("CEF:0", "Corral", "Corral", version, kind, name, str(severity))
    pairs = [("rt", str(_milliseconds(record.get("ts"), 1000)))]
    for field, key in _CEF_KEYS.items():
        if (value := record.get(field)) is None:
            continue
        if field == "addr" and ":" in str(value):
            # `src` is for IPv4 alone.
            pairs += [("c6a2Label", "Source IPv6 Address"), ("c6a2", str(value))]
        else:
            pairs.append((key, str(value)))
    for field, key in _CEF_CUSTOM.items():
        if (value := record.get(field)) is not None:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
            pairs += [(f"{key}Label", field), (key, text)]
    for field, key in _CEF_OWN.items():
        if (value := record.get(field)) is not None:
            pairs.append((key, str(value).lower() if isinstance(value, bool) else str(value)))
    return "|".join([head[0], *map(_cef_head, head[1:])]) + "|" + " ".join(f"{k}={_cef_value(v)}" for k, v in pairs)


def _cef_head(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def _cef_value(text: str) -> str:
    return text.replace("\\", "\\\\").replace("=", "\\=").replace("\r", "\\r").replace("\n", "\\n")


def ocsf(record: Mapping[str, Any], version: str) -> dict[str, Any]:
    """A record as an event of OCSF's class API Activity."""
    outcome = record.get("outcome")
    activity = _OCSF_ACTIVITY.get(str(record.get("method")), 99)
    moment = _milliseconds(record.get("ts"), 1000)
    status, by = record.get("status"), record.get("gw") or "control"
    answered = {"code": status, "length": record.get("resp_bytes")} if status else {}
    known = {
        "activity_id": activity,
        "activity_name": _OCSF_NAMES[activity],
        "category_uid": 6,
        "class_uid": 6003,
        "type_uid": 600300 + activity,
        "time": moment,
        "severity_id": OCSF_SEVERITY.get(outcome, 3) if outcome else 0,
        "status_id": 0 if outcome is None else 1 if outcome == "ok" else 2,
        "status_code": None if status is None else str(status),
        "status_detail": outcome,
        "metadata": {
            "version": "1.3.0",
            "uid": record.get("id"),
            "correlation_uid": record.get("request_id"),
            "product": {"name": "Corral", "vendor_name": "Corral", "version": version},
        },
        "actor": {"user": {"uid": record["key"], "org": {"uid": record.get("tenant")}}}
        if record.get("key")
        else {"app_name": by},
        # What control does by itself comes from nowhere else.
        "src_endpoint": {"ip": record["addr"]} if record.get("addr") else {"name": by},
        "dst_endpoint": {"name": record.get("node")},
        "resources": [{"name": record.get("model"), "type": "model"}] if record.get("model") else None,
        "api": {"operation": record.get("route") or "none", "service": {"name": record.get("api")}},
        "http_request": {
            "http_method": record.get("method"),
            "url": {"path": record.get("route")},
            "length": record.get("req_bytes"),
        },
        "http_response": answered,
        "duration": _milliseconds(record.get("ms"), 1),
    }
    others = _OCSF_UNMAPPED if answered else (*_OCSF_UNMAPPED, "resp_bytes")
    more = {name: record[name] for name in others if record.get(name) is not None}
    return {**_there(known), "unmapped": more}


def _there(given: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty, at any depth: an attribute of OCSF has a value or is left out."""
    found = {name: _there(value) if isinstance(value, dict) else value for name, value in given.items()}
    return {name: value for name, value in found.items() if value not in (None, "", {})}
