"""alertmanager.yml: who hears of which alert, and which alerts say nothing new while another fires.

``python -m corral.config.alertmanager [--without-slack]`` writes one of the two default renderings; they are committed
in monitoring/alertmanager and compared in a test. Control hears of every alert, with Slack and without.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import yaml

SLACK, CONTROL = "slack-notifications", "control"


@dataclass(frozen=True)
class AlertmanagerPlan:
    """Whom to tell. ``slack_webhook_file`` holds the URL of an incoming webhook; "" is no Slack. Times: 30s, 5m."""

    control_url: str = "http://control:9102/internal/alerts"
    slack_webhook_file: str = "/run/secrets/slack_webhook"
    slack_channel: str = "#llm-alerts"
    group_wait: str = "30s"
    group_interval: str = "5m"
    repeat_interval: str = "4h"


def render(plan: AlertmanagerPlan) -> str:
    """The whole alertmanager.yml of ``plan``."""
    config = {
        "route": _route(plan),
        "receivers": [*([_slack(plan)] if plan.slack_webhook_file else []), _control(plan)],
        "inhibit_rules": _INHIBITIONS,
    }
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)
    return "# Rendered by corral/config/alertmanager.py: see docs/monitoring.md before you change it.\n" + text


def _route(plan: AlertmanagerPlan) -> dict[str, Any]:
    root: dict[str, Any] = {
        "receiver": SLACK if plan.slack_webhook_file else CONTROL,
        "group_by": ["alertname", "severity"],
        "group_wait": plan.group_wait,
        "group_interval": plan.group_interval,
        "repeat_interval": plan.repeat_interval,
    }
    # Control shows what fires (`corral status`): it is told at once.
    control = {"receiver": CONTROL, "group_wait": "1s", "group_interval": "15s"}
    if not plan.slack_webhook_file:
        return root | {"group_wait": control["group_wait"], "group_interval": control["group_interval"]}
    return root | {
        "routes": [
            control | {"matchers": ['severity="info"']},
            control | {"continue": True},
            {"receiver": SLACK, "matchers": ['severity="critical"'], "repeat_interval": "1h"},
            {"receiver": SLACK},
        ]
    }


def _slack(plan: AlertmanagerPlan) -> dict[str, Any]:
    return {
        "name": SLACK,
        "slack_configs": [
            {
                "api_url_file": plan.slack_webhook_file,
                "channel": plan.slack_channel,
                "send_resolved": True,
                "color": '{{ if eq .Status "resolved" }}good{{ else if eq .CommonLabels.severity "critical" }}danger'
                "{{ else }}warning{{ end }}",
                "title": '{{ if eq .Status "firing" }}{{ .CommonLabels.severity }}: {{ .CommonLabels.alertname }}'
                " ({{ .Alerts.Firing | len }}){{ else }}resolved: {{ .CommonLabels.alertname }}{{ end }}",
                "title_link": "{{ (index .Alerts 0).Annotations.runbook_url }}",
                "fallback": "{{ .Status }}: {{ .CommonLabels.alertname }}: {{ (index .Alerts 0).Annotations.summary }}",
                "text": "{{ range .Alerts }}*{{ .Annotations.summary }}* ({{ .Status }})\n"
                "{{ .Annotations.description }}\n"
                "Severity: {{ .Labels.severity }}. <{{ .Annotations.runbook_url }}|Runbook>\n"
                "{{ end }}",
            }
        ],
    }


def _control(plan: AlertmanagerPlan) -> dict[str, Any]:
    return {"name": CONTROL, "webhook_configs": [{"url": plan.control_url, "send_resolved": True}]}


def _quiet(source: list[str], target: list[str], equal: list[str] | None = None) -> dict[str, Any]:
    """While an alert like ``source`` fires, those like ``target`` with the same ``equal`` labels are not told."""
    rule: dict[str, Any] = {"source_matchers": source, "target_matchers": target}
    return rule | ({"equal": equal} if equal else {})


# Labels that both lack are equal too: where a label has to be there, the matchers say so.
_INHIBITIONS = [
    _quiet(['severity="critical"', 'node!=""'], ['severity="warning"', 'node!=""'], ["node"]),
    _quiet(['severity="critical"', 'model!=""'], ['severity="warning"', 'model!=""'], ["alertname", "model"]),
    # The quicker burn is the same news.
    _quiet(['severity="critical"', 'window="1h"'], ['severity="critical"', 'window="6h"'], ["alertname", "model"]),
    # What a part that is gone would have measured, or what cannot go well without it.
    _quiet(['alertname="NodeDown"'], ['alertname=~"NodeRunnerHung|ScrapeMissing"', 'node!=""'], ["node"]),
    _quiet(['alertname="GatewayDown"'], ['alertname="ScrapeMissing"', 'job="api-gateway"'], ["gateway"]),
    _quiet(
        ['alertname="ControlDown"'],
        ['alertname=~"SnapshotStale|SpoolBacklog|IngestBehind|DatabaseDown|BackupTooOld|BackupMissing|RestoreUnproven"'],
    ),
    _quiet(['alertname="ControlDown"'], ['alertname="HaproxyBackendDown"', 'proxy="control"']),
    _quiet(['alertname="ControlDown"'], ['alertname="ScrapeMissing"', 'job=~"control|ollama|redis|postgres"']),
    _quiet(['alertname="EdgeDown"'], ['alertname=~"HaproxyBackendDown|HighErrorRate|SlowFirstToken|ModelUnavailable"']),
    _quiet(['alertname="EdgeDown"'], ['alertname="ScrapeMissing"', 'job="haproxy"']),
    _quiet(['alertname="LimitStoreDown"'], ['alertname="ScrapeMissing"', 'job="redis"']),
    _quiet(['alertname="DatabaseDown"'], ['alertname=~"SpoolBacklog|IngestBehind"']),
    _quiet(['alertname="DatabaseDown"'], ['alertname="ScrapeMissing"', 'job="postgres"']),
    _quiet(['alertname="SpoolFailing"'], ['alertname="SpoolBacklog"', 'gateway!=""'], ["gateway"]),
]  # fmt: skip


if __name__ == "__main__":
    plan = AlertmanagerPlan(slack_webhook_file="") if sys.argv[1:] == ["--without-slack"] else AlertmanagerPlan()
    sys.stdout.write(render(plan))
