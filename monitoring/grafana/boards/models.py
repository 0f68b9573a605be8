"""How fast each model answers, and where it is."""

from __future__ import annotations

from boards.panel import MODEL, NODE, RATE, Board, Panel, line, quantiles

MODELS = Board(
    "corral-models",
    "Corral: Models",
    "How fast each model answers, and where it is.",
    (MODEL, NODE),
    {
        "Answers": (
            line(
                "Requests by model",
                "Requests that end, by model; the empty name is a model that no node has.",
                "reqps",
                (f'sum by (model) (rate(corral_requests_total{{model=~"$model"}}{RATE}))', "{{model}}"),
                stacked=True,
            ),
            line(
                "Time to first token",
                "From the request's arrival to its first token.",
                "s",
                *quantiles("corral_time_to_first_token_seconds", 'model=~"$model"', "model"),
            ),
            line(
                "Time between tokens",
                "The pause between two tokens of a stream.",
                "s",
                *quantiles("corral_time_between_tokens_seconds", 'model=~"$model"', "model"),
            ),
            line(
                "Time in the queue",
                "From the request's arrival to its dispatch to a node.",
                "s",
                *quantiles("corral_queue_duration_seconds", 'model=~"$model"', "model"),
            ),
            line(
                "Duration by route",
                "From arrival to the last byte.",
                "s",
                *quantiles("corral_request_duration_seconds", 'model=~"$model"', "route"),
            ),
            line(
                "Tokens",
                "Tokens read (prompt) and written (generated).",
                "short",
                (f'sum by (model, kind) (rate(corral_tokens_total{{model=~"$model"}}{RATE}))', "{{model}} {{kind}}"),
                stacked=True,
            ),
            line(
                "Tokens per second of a stream",
                "How fast a caller sees an answer grow.",
                "short",
                *quantiles("corral_output_tokens_per_second", 'model=~"$model"', "model"),
            ),
        ),
        "Objectives": (
            line(
                "Failing requests",
                "Share over 5 minutes and 6 hours; HighErrorRate looks at these.",
                "percentunit",
                ('corral:requests_failed:ratio_rate5m{model=~"$model"}', "{{model}} 5m"),
                ('corral:requests_failed:ratio_rate6h{model=~"$model"}', "{{model}} 6h"),
            ),
            line(
                "Late first tokens",
                "Share over 5 minutes and 6 hours; SlowFirstToken looks at these.",
                "percentunit",
                ('corral:first_token_slow:ratio_rate5m{model=~"$model"}', "{{model}} 5m"),
                ('corral:first_token_slow:ratio_rate6h{model=~"$model"}', "{{model}} 6h"),
            ),
        ),
        "Residency": (
            Panel(
                "Resident models",
                "1 while the model is in the node's memory.",
                "short",
                (('corral_node_model_resident{node=~"$node",model=~"$model"}', "{{node}} {{model}}"),),
                "timeline",
            ),
            line(
                "Loads and unloads",
                "Models that came into memory and left it, in 15 minutes. Many of both are thrashing.",
                "short",
                (
                    'sum by (node) (increase(corral_node_loads_total{node=~"$node",model=~"$model"}[15m]))',
                    "{{node}} loads",
                ),
                (
                    'sum by (node) (increase(corral_node_unloads_total{node=~"$node",model=~"$model"}[15m]))',
                    "{{node}} unloads",
                ),
            ),
            line(
                "Load time",
                "How long the last load of a model took.",
                "s",
                ('corral_node_load_seconds{node=~"$node",model=~"$model"}', "{{node}} {{model}}"),
            ),
            line(
                "Share in GPU memory",
                "Of a resident model; below 1, layers are computed on the CPU.",
                "percentunit",
                (
                    'corral_node_model_vram_bytes{node=~"$node",model=~"$model"}'
                    ' / corral_node_model_size_bytes{node=~"$node",model=~"$model"}',
                    "{{node}} {{model}}",
                ),
            ),
        ),
    },
)
