"""Pages of metrics as tests read them, and the tables of docs/metrics.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from support.servers import REPOSITORY

_ROW = re.compile(r"\| `(corral_\w+)` \| (\w+) \| ([\w, ]*?) ?\| (.*) \|")


@dataclass(frozen=True)
class Documented:
    """A metric as the document has it. ``absent``: it says when it is not there."""

    name: str
    kind: str
    labels: frozenset[str]
    absent: bool


class Page:
    """The samples of one /metrics."""

    def __init__(self, text: str) -> None:
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        self.kinds: dict[str, str] = {}
        for family in text_string_to_metric_families(text):
            # The parser takes the suffix off a counter's name, and the document does not.
            name = family.name + ("_total" if family.type == "counter" else "")
            self.kinds[name] = family.type
            for sample in family.samples:
                self.samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def value(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels."""
        found = [value for have, value in self.samples.get(name, []) if labels.items() <= have.items()]
        assert found, f"{name}{labels} is not there"
        return sum(found)

    def has(self, name: str) -> bool:
        """Whether there is a series of a metric."""
        return any(part in self.samples for part in (name, f"{name}_count"))

    def labels(self, name: str) -> set[frozenset[str]]:
        """The sets of labels of its series, but for a histogram's bound."""
        rows = self.samples.get(name) or self.samples.get(f"{name}_count") or []
        return {frozenset(labels) for labels, _ in rows}

    def values(self, label: str) -> set[str]:
        """Every value of a label."""
        return {labels[label] for rows in self.samples.values() for labels, _ in rows if label in labels}


def page(url: str) -> Page:
    """What an address says now."""
    response = httpx.get(url, timeout=30, trust_env=False)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Page(response.text)


def documented() -> dict[str, list[Documented]]:
    """docs/metrics.md: job → its metrics."""
    found: dict[str, list[Documented]] = {}
    job = ""
    for line in (REPOSITORY / "docs/metrics.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("### "):
            match = re.search(r"job `([\w-]+)`", line)
            job = match[1] if match else ""
        elif row := _ROW.fullmatch(line):
            labels = frozenset(name for name in row[3].split(", ") if name)
            found.setdefault(job, []).append(Documented(row[1], row[2], labels, "Absent" in row[4]))
    return found
