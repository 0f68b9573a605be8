"""Whether callers are served, and how busy each node is."""

from __future__ import annotations

from boards.panel import FAILED, NODE, RATE, Board, Panel, line, stat

FLEET = Board(
    "corral-fleet",
    "Corral: Fleet",
    "Whether callers are served, and how busy each node is.",
    (NODE,),
    {
        "Now": (
            stat("Nodes ready", "Nodes that take work.", "short", 'sum(corral_node_state{state="ready"})'),
            stat("Requests", "Requests that end, all models.", "reqps", f"sum(rate(corral_requests_total{RATE}))"),
            stat(
                "Failing",
                "Share of requests that fail by a node's or the fleet's fault.",
                "percentunit",
                f"(sum(rate(corral_requests_total{{{FAILED}}}{RATE})) or vector(0))"
                f" / sum(rate(corral_requests_total{RATE}))",
            ),
            stat("Alerts", "Alerts that fire.", "short", 'count(ALERTS{alertstate="firing"}) or vector(0)'),
        ),
        "Requests": (
            line(
                "Requests by outcome",
                "How requests end. limited and refused are the callers' own doing.",
                "reqps",
                (f"sum by (outcome) (rate(corral_requests_total{RATE}))", "{{outcome}}"),
                stacked=True,
            ),
            line(
                "Refusals by reason",
                "Requests that were not sent to a node, and why.",
                "reqps",
                (f"sum by (reason) (rate(corral_refusals_total{RATE})) > 0 or vector(0)", "{{reason}}"),
                stacked=True,
            ),
            line(
                "Waiting and slots",
                "Requests without a first token yet. Above the slots, they queue.",
                "short",
                ("sum(corral_requests_waiting)", "waiting"),
                ("sum(max by (node) (corral_slots))", "slots"),
            ),
            line(
                "Retries by reason",
                "Requests that were tried on another node, unseen by the caller.",
                "reqps",
                (f"sum by (reason) (rate(corral_retries_total{RATE})) > 0 or vector(0)", "{{reason}}"),
            ),
        ),
        "Answers whose node was lost": (
            line(
                "Gone on with, or not",
                "Answers whose node left after the first token. All but ok and client_gone ended with an error.",
                "short",
                ("sum by (outcome) (increase(corral_continuations_total[5m]))", "{{outcome}}"),
                stacked=True,
            ),
            line(
                "Runners left alone",
                "Models on nodes where no stream progressed; ejected: they gave no token when asked.",
                "short",
                ("sum(corral_runners_suspect)", "suspect"),
                ("sum(corral_runners_ejected)", "ejected"),
            ),
        ),
        "Nodes": (
            Panel(
                "Nodes that answer",
                "1 while the node answers control's probe.",
                "short",
                (('corral_node_up{node=~"$node"}', "{{node}}"),),
                "timeline",
            ),
            line(
                "Requests in flight",
                "Requests on each node, from all gateways.",
                "short",
                ('sum by (node) (corral_requests_in_flight{node=~"$node"})', "{{node}}"),
                stacked=True,
            ),
            line(
                "Decode rate",
                "Tokens per second of the last answer that was measured, by node and model.",
                "short",
                ('corral_node_tokens_per_second{node=~"$node"}', "{{node}} {{model}}"),
            ),
            line(
                "Canary",
                "How long one token takes on a model that is resident.",
                "s",
                ('corral_node_canary_duration_seconds{node=~"$node"}', "{{node}}"),
            ),
            line(
                "Memory for models",
                "What resident models take, and what the node is declared to have.",
                "bytes",
                ('sum by (node) (corral_node_model_size_bytes{node=~"$node"})', "{{node}} models"),
                ('corral_node_memory_bytes{node=~"$node"}', "{{node}} declared"),
            ),
            line(
                "Failed probes",
                "Probes of control that a node did not answer well.",
                "short",
                (f'sum by (node) (rate(corral_node_probe_failures_total{{node=~"$node"}}{RATE}))', "{{node}}"),
            ),
        ),
    },
)
