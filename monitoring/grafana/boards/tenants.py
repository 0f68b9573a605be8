"""Who uses how much, and whom the limits meet."""

from __future__ import annotations

from boards.panel import KEY, RATE, Board, line, stat

TENANTS = Board(
    "corral-tenants",
    "Corral: Tenants and limits",
    "Who uses how much, and whom the limits meet.",
    (KEY,),
    {
        "Usage": (
            line(
                "Requests by key",
                "Requests of each key that ended, as the audit trail has them.",
                "reqps",
                (
                    f'sum by (key, tenant) (rate(corral_key_requests_total{{key=~"$key"}}{RATE}))',
                    "{{key}} {{tenant}}",
                ),
                stacked=True,
            ),
            line(
                "Tokens by key",
                "Tokens read and written for each key.",
                "short",
                (f'sum by (key, kind) (rate(corral_key_tokens_total{{key=~"$key"}}{RATE}))', "{{key}} {{kind}}"),
                stacked=True,
            ),
            line(
                "Tokens by tenant",
                "Tokens of all keys of a tenant.",
                "short",
                (f"sum by (tenant) (rate(corral_key_tokens_total{RATE}))", "{{tenant}}"),
            ),
            line(
                "Largest users",
                "The ten keys with the most tokens in the last hour.",
                "short",
                ("topk(10, sum by (key, tenant) (increase(corral_key_tokens_total[1h])))", "{{key}} {{tenant}}"),
            ),
        ),
        "Limits": (
            line(
                "Limited requests by key",
                "Requests that a limit of the key refused with 429.",
                "reqps",
                (f'sum by (key) (rate(corral_key_limited_total{{key=~"$key"}}{RATE})) or vector(0)', "{{key}}"),
            ),
            line(
                "Refusals by limit",
                "Which limit refuses: the key's, or with tenant_ before it the tenant's.",
                "reqps",
                (
                    f'sum by (reason) (rate(corral_refusals_total{{reason=~".*(rpm|concurrency|tpm|tokens)"}}{RATE}))',
                    "{{reason}}",
                ),
            ),
            line(
                "Refused keys",
                "Requests without a valid key. Many of them are somebody who tries.",
                "reqps",
                (f'sum(rate(corral_refusals_total{{reason="unauthorized"}}{RATE}))', "unauthorized"),
            ),
            line(
                "Admitted without the limit store",
                "Requests that gateways admitted on their own share while Valkey was away.",
                "reqps",
                (f"sum by (gateway) (rate(corral_local_admissions_total{RATE}))", "{{gateway}}"),
            ),
        ),
        "Records": (
            stat("Active keys", "Keys that work now.", "short", 'sum(corral_keys{state="active"})'),
            line("Keys", "Keys by state.", "short", ("sum by (state) (corral_keys)", "{{state}}"), stacked=True),
            line(
                "Audit records",
                "Records that control took into the audit trail, by kind.",
                "short",
                (f"sum by (kind) (rate(corral_audit_records_total{RATE}))", "{{kind}}"),
            ),
        ),
    },
)
