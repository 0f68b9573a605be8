"""prometheus.yml: what is scraped, by which rules, and who is told. All targets come from control.

``python -m corral.config.prometheus > ../monitoring/prometheus/prometheus.yml`` writes the default rendering anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

JOBS = ("ollama", "api-gateway", "haproxy", "control", "redis", "postgres")
"""Each has its targets at control's /sd/JOB."""


@dataclass(frozen=True)
class PrometheusPlan:
    """Addresses are host:port. ``rules`` is a pattern of files, relative ones beside prometheus.yml.

    ``runbooks`` is where the runbooks are, if not where the rules say.
    """

    control: str = "control:9102"
    alertmanager: str = "alertmanager:9093"
    rules: str = "/etc/prometheus/rules/*.yml"
    runbooks: str = ""


DEFAULT = PrometheusPlan()
"""What monitoring/prometheus/prometheus.yml shows, and docker-compose.yml uses."""


def render(plan: PrometheusPlan) -> str:
    """The whole prometheus.yml of ``plan``."""
    whole = {"scrape_interval": "15s", "evaluation_interval": "15s"}
    alerting: dict[str, Any] = {"alertmanagers": [{"static_configs": [{"targets": [plan.alertmanager]}]}]}
    if plan.runbooks:
        # The rules make links of it; on an alert it would be noise.
        alerting |= {"alert_relabel_configs": [{"action": "labeldrop", "regex": "runbooks"}]}
    config = {
        "global": whole | ({"external_labels": {"runbooks": plan.runbooks}} if plan.runbooks else {}),
        "rule_files": [plan.rules],
        "alerting": alerting,
        "scrape_configs": [
            # Control says in an instant what has changed; asking for it costs nothing.
            {
                "job_name": job,
                "http_sd_configs": [{"url": f"http://{plan.control}/sd/{job}", "refresh_interval": "15s"}],
            }
            for job in JOBS
        ],
    }
    text: str = yaml.safe_dump(config, sort_keys=False)
    return (
        "# Rendered by corral/config/prometheus.py: targets come from control, nothing is to be edited here.\n" + text
    )


if __name__ == "__main__":
    print(render(DEFAULT), end="")
