"""The schema of control's database: one for SQLite and PostgreSQL.

Times are epoch seconds (UTC) as floats; a change here needs a migration of its own.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts up by itself only in a column that is called INTEGER; its integers have 64 bits anyway.
Serial = BigInteger().with_variant(Integer(), "sqlite")

# Whom keys and records belong to, and the limits that its keys share (null: none).
tenants = Table(
    "tenants",
    metadata,
    Column("name", Text, primary_key=True),
    Column("created", Double, nullable=False),
    Column("rpm", BigInteger),
    Column("tpm", BigInteger),
    Column("concurrency", BigInteger),
    Column("daily_tokens", BigInteger),
    Column("monthly_tokens", BigInteger),
)

# `networks`: CIDRs that it may be used from, null for anywhere. `content`: its prompts and answers are kept.
# `deadline`: how long a request of it may take that does not say so (seconds). `weight`: its share, null for 1.
# `maker`: the key that made it, or gave it more than that had; null for the first one, and where it is not known.
keys = Table(
    "keys",
    metadata,
    Column("id", String(10), primary_key=True),
    Column("name", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("role", String(16), nullable=False),
    Column("models", JSON, nullable=False),
    Column("networks", JSON(none_as_null=True)),
    Column("rpm", BigInteger),
    Column("tpm", BigInteger),
    Column("concurrency", BigInteger),
    Column("daily_tokens", BigInteger),
    Column("monthly_tokens", BigInteger),
    Column("class", String(16), nullable=False),
    Column("content", Boolean),
    Column("deadline", Double),
    Column("weight", Double),
    Column("created", Double, nullable=False),
    Column("expires", Double),
    Column("revoked", Double),
    Column("last_used", Double),
    Column("maker", String(10)),
    Index(None, "maker"),
)

# What proves a key. One while it rests, two while it rotates: the older one then has an end.
key_verifiers = Table(
    "key_verifiers",
    metadata,
    Column("verifier", String(64), primary_key=True),
    Column("key_id", String(10), ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double),
    Index(None, "key_id"),
)

# A configured node that an operator removed stays here as `removed`, so that a restart does not bring it back.
nodes = Table(
    "nodes",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("url", Text, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("memory", BigInteger),
    Column("max_models", Integer),
    Column("accelerator", String(8)),
    Column("source", String(8), nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("removed", Boolean, nullable=False),
    Column("created", Double, nullable=False),
)

# The digest of a catalogue model that corral.yaml gives none: what the first node had when the catalogue was applied.
models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("digest", String(71), nullable=False),
    Column("recorded", Double, nullable=False),
    Column("node", String(63), nullable=False),
)

# Models that nobody may use for now, whatever nodes hold: by canonical name.
disabled_models = Table(
    "disabled_models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("reason", Text),
    Column("disabled", Double, nullable=False),
)

# One row for each request of the data plane (admit inserts, settle completes) and for each admin action. A row that is
# complete is sealed: `pos` is its place in the chain of its `gw`, `leaf` the hash of its content (store/chain.py).
# `content_hash` is the SHA-256 of what `audit_content` has of it, so that the chain covers that too.
audit = Table(
    "audit",
    metadata,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("request_id", Text),
    Column("ts", Double, nullable=False),
    Column("gw", Text),
    Column("key", Text),
    Column("tenant", Text),
    Column("addr", Text),
    Column("api", Text),
    Column("route", Text),
    Column("method", Text),
    Column("model", Text),
    Column("model_digest", Text),
    Column("status", Integer),
    Column("outcome", Text),
    Column("node", Text),
    Column("attempts", Integer),
    Column("req_bytes", BigInteger),
    Column("resp_bytes", BigInteger),
    Column("prompt_tokens", BigInteger),
    Column("tokens", BigInteger),
    Column("estimated", Boolean),
    Column("continued", Text),
    Column("prompt_hash", Text),
    Column("answer_hash", Text),
    Column("content_hash", Text),
    Column("queue_ms", Double),
    Column("ttft_ms", Double),
    Column("ms", Double),
    Column("before", JSON(none_as_null=True)),
    Column("after", JSON(none_as_null=True)),
    Column("pos", BigInteger),
    Column("leaf", LargeBinary(32)),
    Index(None, "ts"),
    Index(None, "gw", "pos", unique=True),
    Index(None, "key", "seq"),
    Index(None, "tenant", "seq"),
    Index(None, "model", "seq"),
    Index(None, "request_id", "seq"),
    sqlite_autoincrement=True,
)

# Prompts and answers of keys that they are kept for, by their record's id, encrypted for who may read them.
audit_content = Table(
    "audit_content",
    metadata,
    Column("id", Text, primary_key=True),
    Column("ts", Double, nullable=False),
    Column("data", LargeBinary, nullable=False),
    Index(None, "ts"),
)

# How far each spool segment is in the database; moves in the transaction that inserts its rows.
spool_watermarks = Table(
    "spool_watermarks",
    metadata,
    Column("gateway", String(63), primary_key=True),
    Column("segment", String(64), primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("updated", Double, nullable=False),
)

# How far each chain is: the last record's place and the link after it; `dropped`: retention has removed up to there.
# The row without a name says up to which `seq` records are older than the chain.
audit_streams = Table(
    "audit_streams",
    metadata,
    Column("stream", Text, primary_key=True),
    Column("pos", BigInteger, nullable=False),
    Column("link", LargeBinary(32), nullable=False),
    Column("signed", BigInteger, nullable=False),
    Column("signed_link", LargeBinary(32), nullable=False),
    Column("dropped", BigInteger, nullable=False),
)

# The signed checkpoints, as they stand in the file outside of the database.
audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("ts", Double, nullable=False),
    Column("line", Text, nullable=False),
)

# Gateways that began anew: requests of theirs up to `seq` that nobody has settled are recovered, a while after `since`.
# Those beside them in `audit_holders` are of lives before `life`.
spool_begins = Table(
    "spool_begins",
    metadata,
    Column("gateway", String(63), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("since", Double, nullable=False),
    Column("life", Integer, nullable=False),
)

# All that a gateway wrote until `shipped` is here (epoch seconds), as it said when it was last `heard`; `ended`: it
# will write no more. It has begun `life` times.
spools = Table(
    "spools",
    metadata,
    Column("gateway", String(63), primary_key=True),
    Column("life", Integer, nullable=False),
    Column("shipped", Double, nullable=False),
    Column("heard", Double, nullable=False),
    Column("ended", Boolean, nullable=False),
)

# An open request that the edge gave to a second gateway, or to the next life of the same: who may still settle it.
audit_holders = Table(
    "audit_holders",
    metadata,
    Column("id", Text, primary_key=True),
    Column("gateway", String(63), primary_key=True),
    Column("life", Integer, nullable=False),
)

# What requests of a day (UTC, by their arrival) add up to; "" where a request had no key, tenant or model.
usage = Table(
    "usage",
    metadata,
    Column("day", String(10), primary_key=True),
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("refused", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("estimated", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("queue_seconds", Double, nullable=False),
    Column("node_seconds", Double, nullable=False),
)

# Who leads among control processes: until when (epoch seconds), and in which term.
leases = Table(
    "leases",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("holder", Text, nullable=False),
    Column("term", BigInteger, nullable=False),
    Column("until", Double, nullable=False),
)

# Whether answers of a model's file are continued: `passed`, or why not; found by these versions of Corral and Ollama.
verdicts = Table(
    "verdicts",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("said", Text, nullable=False),
    Column("at", Double, nullable=False),
    Column("versions", Text, nullable=False),
)
