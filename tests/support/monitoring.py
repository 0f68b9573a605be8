"""Prometheus and Alertmanager as tests run them, and what the repository's rule files say."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.process import Process, free_port
from support.servers import REPOSITORY, Server, answers

MONITORING = REPOSITORY / "monitoring"
RULES = sorted((MONITORING / "prometheus/rules").glob("*.yml"))
RULE_TESTS = sorted((MONITORING / "prometheus/tests").glob("*.yml"))
RUNBOOKS = REPOSITORY / "docs/runbooks"

_DURATION = r"(?:\d+(?:ms|[smhdw]))+"
_AGE = r"(corral_(?:\w+(?<!timestamp)|audit_signed_timestamp)_seconds > )(\d+)"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def program(*names: str) -> str:
    """The first of these programs; the test fails where there is none."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.fail(f"{names[0]} is not installed: `scripts/test monitoring` installs it", pytrace=False)


def rules() -> list[dict[str, Any]]:
    """Every rule of the repository, as its file says it."""
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[dict[str, Any]]:
    """The rules that alert."""
    return [rule for rule in rules() if "alert" in rule]


def seconds(duration: str) -> float:
    """Seconds of a duration of Prometheus's, such as 1h30m."""
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdw])", duration))


def hasten(text: str, factor: float, longest: float = 20.0, window: float = 20.0, age: float = math.inf) -> str:
    """A rule file whose every ``for`` is ``factor`` times shorter, between 2 s and ``longest`` seconds, and whose every
    window is so, between 2 s and ``window`` seconds.

    So is an age in seconds beyond which something is too old, which is ``age`` at most. Nothing else is changed: what
    alerts, on which metric, beyond which number.
    """

    def scaled(match: re.Match[str]) -> str:
        most = window if match["before"] == "[" else longest
        short = min(max(seconds(match["duration"]) / factor, 2.0), most)
        return f"{match['before']}{round(short * 1000)}ms{match['after']}"

    text = re.sub(_AGE, lambda match: f"{match[1]}{min(float(match[2]) / factor, age):g}", text)
    text = re.sub(rf"(?P<before>\[)(?P<duration>{_DURATION})(?P<after>\])", scaled, text)
    return re.sub(rf"(?P<before>\n +for: )(?P<duration>{_DURATION})(?P<after>\n)", scaled, text)


@contextmanager
def prometheus(folder: Path, config: dict[str, Any]) -> Iterator[Server]:
    """A Prometheus with ``config`` as its prometheus.yml."""
    port = free_port()
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    argv = [program("prometheus"), f"--config.file={path}", f"--storage.tsdb.path={folder / 'prometheus'}"]
    argv += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    url = f"http://127.0.0.1:{port}"
    process = Process(argv, folder / "prometheus.log")
    try:
        process.wait_until(lambda: answers(url + "/-/ready"))
        yield Server(url, process)
    finally:
        process.end()


@contextmanager
def alertmanager(folder: Path, config: str) -> Iterator[Server]:
    """An Alertmanager on its own, with the text ``config``."""
    port = free_port()
    path = folder / "alertmanager.yml"
    path.write_text(config, encoding="utf-8")
    argv = [program("prometheus-alertmanager", "alertmanager"), f"--config.file={path}", "--cluster.listen-address="]
    argv += [f"--storage.path={folder / 'alertmanager'}", f"--web.listen-address=127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}"
    process = Process(argv, folder / "alertmanager.log")
    try:
        process.wait_until(lambda: answers(url + "/-/ready"))
        yield Server(url, process)
    finally:
        process.end()


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """The series that a Prometheus has now for an expression: labels (``metric``) and ``value``."""
    answer = httpx.post(url + "/api/v1/query", data={"query": expression}, timeout=30)
    assert answer.status_code == 200, f"{expression}\n{answer.text}"
    result: Any = answer.json()["data"]["result"]
    assert isinstance(result, list), f"{expression}: not series but {result}"
    return result
