"""The alert rules: right for promtool, each tested, each with its runbook and everything that a notification shows."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.monitoring import RULE_TESTS, RULES, RUNBOOKS, alerts, hasten, program, seconds

HEADINGS = ["Meaning", "Impact", "Diagnosis", "Mitigation"]
NAMES = sorted({rule["alert"] for rule in alerts()})
BASE = '{{ or $externalLabels.runbooks "https://'


def promtool(*arguments: str | Path) -> None:
    """Run promtool; its words where it fails."""
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout + done.stderr, done.stdout + done.stderr


def label(rule: dict[str, Any]) -> tuple[str, str, str]:
    """What tells rules of one name apart."""
    return rule["alert"], rule["labels"]["severity"], rule["labels"].get("window", "")


def checks() -> list[tuple[float, str, list[dict[str, Any]], str]]:
    """(seconds, alert, expected alerts, test) of each moment that the promtool tests look at."""
    return [
        (seconds(check["eval_time"]), check["alertname"], check["exp_alerts"], test["name"])
        for path in RULE_TESTS
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
        for check in test["alert_rule_test"]
    ]


def test_the_rules_are_right() -> None:
    promtool("check", "rules", *RULES)


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_the_rules_do_what_their_tests_say(path: Path) -> None:
    promtool("test", "rules", path)


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: "-".join(filter(None, label(rule))))
def test_an_alert_says_what_a_notification_shows(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert all(text.strip() for text in annotations.values())
    assert "\n" not in annotations["summary"]
    assert annotations["runbook_url"].startswith(BASE)
    assert annotations["runbook_url"].endswith(f"}}}}/{rule['alert']}.md")
    assert "for" in rule


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: "-".join(filter(None, label(rule))))
def test_an_alert_is_tested_before_and_after_its_time_and_when_it_is_over(rule: dict[str, Any]) -> None:
    name, severity, window = label(rule)

    def fires(expected: list[dict[str, Any]]) -> bool:
        return any(
            alert["exp_labels"]["severity"] == severity and alert["exp_labels"].get("window", "") == window
            for alert in expected
        )

    mine: dict[str, list[tuple[float, bool]]] = {}
    for at, alert, expected, test in checks():
        if alert == name:
            mine.setdefault(test, []).append((at, fires(expected)))
    step = 60.0
    rises, falls = [], []
    for moments in mine.values():
        for (before, fired_before), (after, fired_after) in itertools.pairwise(moments):
            if not fired_before and fired_after:
                rises.append((before, after))
            if fired_before and not fired_after:
                falls.append(after)
    assert any(after - before <= step for before, after in rises), "no test looks just before and just after its time"
    assert falls, "no test sees it resolve"


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_has_a_runbook(name: str) -> None:
    path = RUNBOOKS / f"{name}.md"
    assert path.is_file(), f"docs/runbooks/{name}.md is missing"
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    sections = re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]
    assert all(len(section.strip()) > 40 for section in sections)
    assert not re.search(r"TODO|TBD|FIXME", text)


def test_no_runbook_is_of_an_alert_that_is_gone() -> None:
    named = {path.stem for path in RUNBOOKS.glob("[A-Z]*.md")} - {"README"}
    assert named - set(NAMES) == set()


def test_a_hastened_copy_differs_in_its_times_alone() -> None:
    for path in RULES:
        text = path.read_text(encoding="utf-8")
        times = re.compile(r"(?<=\[)[0-9a-z]+(?=\])|(?<=for: )[0-9a-z]+|(?<=[a-oq-z]_seconds > )[0-9.]+"
                           r"|(?<=signed_timestamp_seconds > )[0-9.]+")  # fmt: skip
        assert times.sub("", hasten(text, 120)) == times.sub("", text)
    assert hasten("corral_a_seconds > 180\ncorral_b_timestamp_seconds > 26 * 3600", 20) == (
        "corral_a_seconds > 9\ncorral_b_timestamp_seconds > 26 * 3600"
    )
    assert hasten("x[1h] y[5m]\n  for: 10m\n", 120) == "x[20000ms] y[2500ms]\n  for: 5000ms\n"
    assert hasten("x[1h] y[5m]\n  for: 1h\n", 20, 5, 8) == "x[8000ms] y[8000ms]\n  for: 5000ms\n"
    assert hasten("corral_audit_signed_timestamp_seconds > 900", 20, age=15) == (
        "corral_audit_signed_timestamp_seconds > 15"
    )
