"""The dashboards: generated, complete, and every query has data on a stack that works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.monitoring import MONITORING
from support.process import NotReady, until
from support.stage import MODEL, Stage

GRAFANA = MONITORING / "grafana"
COMMITTED = sorted((GRAFANA / "dashboards").glob("*.json"))
VARIABLES = {"corral-fleet": {"node"}, "corral-models": {"model", "node"}, "corral-tenants": {"key"}}


def dashboard(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """(dashboard's uid, panel) of all of them, without rows."""
    for path in COMMITTED:
        for panel in dashboard(path)["panels"]:
            if panel["type"] != "row":
                yield path.stem, panel


def queries() -> list[tuple[str, str]]:
    """(where it stands, expression) of each query of each panel."""
    return [
        (f"{uid} / {panel['title']} / {target['refId']}", target["expr"])
        for uid, panel in panels()
        for target in panel["targets"]
    ]


def test_the_committed_dashboards_are_the_generated_ones(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "generate.py", tmp_path], check=True, timeout=60)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text(encoding="utf-8") for path in COMMITTED}


def test_there_are_enough_panels_and_each_says_what_it_is() -> None:
    shown = list(panels())
    assert len(shown) >= 25
    for uid, panel in shown:
        assert panel["description"].endswith("."), f"{uid}: {panel['title']}"
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["legendFormat"].strip() for target in panel["targets"]), panel["title"]
        if panel["type"] != "stat":
            assert panel["options"]["legend"]["showLegend"] is True
    for path in COMMITTED:
        ids = [panel["id"] for panel in dashboard(path)["panels"]]
        assert len(set(ids)) == len(ids)


def test_variables_are_there_and_used() -> None:
    for path in COMMITTED:
        board = dashboard(path)
        named = {variable["name"] for variable in board["templating"]["list"]}
        assert named >= VARIABLES.get(path.stem, set())
        used = set(re.findall(r"\$(\w+)", " ".join(expr for where, expr in queries() if where.startswith(path.stem))))
        assert used - {"__rate_interval"} == named


def test_provisioning_finds_the_dashboards_and_they_find_their_data() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/corral.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/corral.yml").read_text())["providers"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    for uid, panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}, (uid, panel["title"])


@pytest.fixture(scope="module")
def loaded(whole_stage: Stage) -> Stage:
    """The stage after some work: answers to two keys, limits that were met, a model that was loaded anew."""
    stage = whole_stage
    until(stage.quiet, "nothing is wrong", 120, every=0.3)
    few = stage.key("few", "--rpm", "2", "--tenant", "team-a", "--new-tenant")
    many = stage.key("many", "--tenant", "team-b", "--new-tenant")
    # By control: its canary would be on its way to a model that leaves by itself, and bring it back.
    stage.stack.corral("models", "unload", MODEL)
    until(lambda: not stage.query("corral_node_model_resident == 1"), "no model is resident", every=0.2)
    with ThreadPoolExecutor(8) as pool:
        statuses = [status for done in pool.map(lambda _: stage.ask(6, many), range(8)) for status in done]
    assert set(statuses) == {200}
    assert 429 in stage.ask(6, few)
    assert stage.ask(1, "crl_nobody") == [401]
    # Rates need two scrapes of what has been counted, ratios an evaluation behind those.
    until(lambda: stage.query("corral_key_limited_total > 0"), "control has counted it", every=0.2)
    until(lambda: stage.query("corral_node_load_seconds"), "the load was measured", every=0.2)
    stage.ask(8, many)
    at = time.time() + 3
    until(lambda: stage.query(f"timestamp(corral_connections) > {at}"), "it was scraped after that", every=0.2)
    return stage


def evaluated(expression: str) -> str:
    """As Grafana asks: with every value of each variable, and an interval of four scrapes and more."""
    return re.sub(r"\$\w+", ".*", expression.replace("$__rate_interval", "30s"))


def has_data(stage: Stage, expression: str) -> bool:
    values = [float(series["value"][1]) for series in stage.query(evaluated(expression))]
    return any(value == value for value in values)


def test_every_query_has_data(loaded: Stage) -> None:
    empty = dict(queries())

    def asked() -> bool:
        # The rules' windows are as short as their times here: they show what goes on now.
        loaded.ask(4)
        for where in [where for where, expression in empty.items() if has_data(loaded, expression)]:
            del empty[where]
        return not empty

    try:
        until(asked, "every query has data", 120, every=0.5)
    except NotReady as error:
        raise NotReady(
            f"{error}\n" + "\n".join(f"{where}: {expression}" for where, expression in empty.items())
        ) from None


def test_the_variables_have_values(loaded: Stage) -> None:
    for path in COMMITTED:
        for variable in dashboard(path)["templating"]["list"]:
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
            assert match, variable["query"]
            # Of a target whose last scrape came late there is nothing until the next one.
            until(partial(has_values, loaded, *match.groups()), variable["name"], every=0.5)


def has_values(stage: Stage, metric: str, label: str) -> bool:
    return bool({series["metric"].get(label) for series in stage.query(metric)} - {None, ""})
