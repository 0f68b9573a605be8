"""Corral's own parts."""

from __future__ import annotations

from boards.panel import GATEWAY, RATE, Board, Panel, line, stat

PLATFORM = Board(
    "corral-platform",
    "Corral: Platform",
    "Corral's own parts: edge, gateways, control, Valkey, database, monitoring.",
    (GATEWAY,),
    {
        "Parts": (
            Panel(
                "Targets", "1 while Prometheus gets metrics.", "short", (("min by (job) (up)", "{{job}}"),), "timeline"
            ),
            line("Gateways", "Gateways by state.", "short", ("sum by (state) (corral_gateways)", "{{state}}")),
            line(
                "Versions",
                "Processes by version of Corral: one, but for upgrades.",
                "short",
                ("count by (version) (corral_build_info)", "{{version}}"),
            ),
            stat(
                "Last backup",
                "Time since the last backup that succeeded.",
                "s",
                "time() - max(corral_backup_last_success_timestamp_seconds)",
            ),
            stat(
                "Last drill",
                "Time since a backup was last restored to see that it can be.",
                "s",
                "time() - max(corral_backup_drill_last_success_timestamp_seconds)",
            ),
        ),
        "Edge": (
            line(
                "Edge answers",
                "Answers to callers by class of status.",
                "reqps",
                (f'sum by (code) (rate(haproxy_frontend_http_responses_total{{proxy="edge"}}{RATE}))', "{{code}}"),
                stacked=True,
            ),
            line(
                "Sessions",
                "Connections of callers (edge) and of gateways (nodes).",
                "short",
                ('haproxy_frontend_current_sessions{proxy=~"edge|nodes"}', "{{proxy}}"),
            ),
            Panel(
                "Back ends",
                "1 while a back end of HAProxy has a server.",
                "short",
                (('haproxy_backend_status{state="UP",proxy!="no_such_node"}', "{{proxy}}"),),
                "timeline",
            ),
        ),
        "Gateways": (
            line(
                "CPU",
                "Cores that each gateway uses; one is all it can.",
                "short",
                (
                    f'rate(process_cpu_seconds_total{{job="api-gateway",gateway=~"$gateway"}}{RATE})',
                    "{{gateway}}",
                ),
            ),
            line(
                "Memory",
                "Resident memory of gateways and control.",
                "bytes",
                ('process_resident_memory_bytes{job="api-gateway",gateway=~"$gateway"}', "{{gateway}}"),
                ('process_resident_memory_bytes{job="control"}', "control"),
            ),
            line("Connections", "Of callers.", "short", ('corral_connections{gateway=~"$gateway"}', "{{gateway}}")),
            line(
                "Open files",
                "File descriptors of each gateway.",
                "short",
                ('process_open_fds{job="api-gateway",gateway=~"$gateway"}', "{{gateway}}"),
            ),
            line(
                "Age of keys",
                "Since control last confirmed what a gateway knows of keys and nodes.",
                "s",
                ('corral_snapshot_age_seconds{gateway=~"$gateway"}', "{{gateway}}"),
            ),
            line(
                "Spool",
                "Records that control has not confirmed yet.",
                "bytes",
                ('corral_spool_bytes{gateway=~"$gateway"}', "{{gateway}}"),
            ),
            line(
                "Age of records",
                "Of the oldest that waits, as the gateway and as control see it.",
                "s",
                ('corral_spool_oldest_seconds{gateway=~"$gateway"}', "{{gateway}} spool"),
                ('corral_ingest_lag_seconds{gateway=~"$gateway"}', "{{gateway}} ingest"),
            ),
        ),
        "Stores": (
            line(
                "Valkey memory",
                "In use, and what it may use at most.",
                "bytes",
                ("corral_valkey_memory_bytes", "in use"),
                ("corral_valkey_memory_max_bytes", "at most"),
            ),
            line(
                "Valkey commands",
                "Commands per second.",
                "ops",
                (f"rate(corral_valkey_commands_total{RATE})", "commands"),
            ),
            line("Valkey connections", "Clients.", "short", ("corral_valkey_clients", "clients")),
            line("Database size", "On its disk.", "bytes", ("corral_database_size_bytes", "size")),
            line("Database rows", "Rows by table.", "short", ("corral_database_rows", "{{table}}")),
            line(
                "Database connections",
                "Of PostgreSQL; SQLite has none.",
                "short",
                ("corral_database_connections or vector(0)", "in use"),
            ),
            line(
                "Notifications",
                "What Alertmanager told control.",
                "short",
                (f"sum by (status) (rate(corral_alerts_received_total{RATE})) or vector(0)", "{{status}}"),
            ),
        ),
    },
)
