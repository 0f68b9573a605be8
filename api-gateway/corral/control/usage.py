"""What the records of the gateways add up to since control started: by kind, by key, and each node's decode rate."""

from __future__ import annotations

from collections import Counter
from typing import Any

from corral.control.prober import Fleet, Member
from corral.control.snapshot import Hub
from corral.fleet.dispatch import Speeds
from corral.fleet.node import canonical_name
from corral.store.ingest import Taken

RATE_TOKENS = 8
"""From so many tokens on an answer tells a node's rate."""
SPREAD = 4
"""Of an answer that came as it was made, the time after the first token is that of so many tokens at least."""


class Usage:
    """Counters by kind of record; by (key, tenant); tokens by (key, tenant, kind)."""

    def __init__(self) -> None:
        self.records: Counter[str] = Counter(admit=0, settle=0)
        self.requests: Counter[tuple[str, str]] = Counter()
        self.limited: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[tuple[str, str, str]] = Counter()

    def ingested(self, taken: Taken, hub: Hub, fleet: Fleet) -> None:
        """Count records that are in the database now. A key that is not known (any more) has no counter."""
        self.records["admit"] += len(taken.admits)
        self.records["settle"] += len(taken.settles)
        for row in taken.settles:
            key = row["key"] or ""
            tenant = hub.tenant(key)
            if tenant is not None:
                who = key, tenant
                self.requests[who] += 1
                self.limited[who] += row["outcome"] == "limited"
                self.tokens[(*who, "prompt")] += row["prompt_tokens"] or 0
                self.tokens[(*who, "generated")] += row["tokens"] or 0
            member = fleet.members.get(row["node"] or "")
            if member is not None:
                _note_speed(row, member, fleet.speeds)


def _note_speed(row: dict[str, Any], member: Member, speeds: Speeds) -> None:
    """The node's decode rate by this answer (the tokens after the first one, in the time after it), and its load."""
    measured = member.measured
    tokens, first, whole = row["tokens"], row["ttft_ms"], row["ms"]
    model = canonical_name(row["model"] or "")
    if first is None or whole is None or model not in measured.loads:
        return
    queued = row["queue_ms"] or 0.0
    # Batches of embeddings wait after the first token too: then it is not known when the first of them was sent.
    if row["attempts"] == 1 and queued <= first:
        measured.waited(model, row["ts"] + queued / 1e3, row["ts"] + first / 1e3)
    if row["outcome"] == "ok" and tokens and tokens >= RATE_TOKENS and whole > first:
        measured.rates[model] = (tokens - 1) / (whole - first) * 1e3
        speeds.note(member.name, model, tokens - 1, (whole - first) / 1e3)
        # What was held back (as Ollama does with what may be the call of a tool) comes at once, whatever the node is.
        if row["attempts"] == 1 and (whole - first) * tokens >= SPREAD * (whole - queued):
            measured.decoded(model, tokens - 1, row["ts"] + first / 1e3, row["ts"] + whole / 1e3)
