"""The audit trail's own figures: ingest, checkpoints, verification and retention, on SQLite or PostgreSQL.

    benchmarks/audit verify [--records 1000000] [--checkpoints 6400] [--postgresql] [--api]
    benchmarks/audit retention [--records 5000000] [--postgresql]
    benchmarks/audit reads [--records 5000000] [--postgresql]

``verify`` enters records as control does, signs them, and checks every one as `corral audit verify` does, without the
way over HTTP; with ``--api`` a control signs them, and that command itself checks them over its API. More than a minute
for it is a failure. ``--checkpoints`` signs so many, as records come in over days: one for each 200,000 by default.
``retention`` makes rows by one statement of the database's own, and deletes the older half as
control does, while another writer enters records: it prints the plan of the statement, rows a second, and how long that
other writer waited. ``reads`` makes such rows too, without the index of requests' ids, enters some more before and
after it builds that as its migration does, and asks a control for them as commands do: it prints what each took. More
than 30 s, after which control ends a read, is a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "api-gateway"), str(ROOT / "tests")]

from sqlalchemy import Connection, func, insert, select, text, update  # noqa: E402
from support.postgres import postgres  # noqa: E402
from support.process import Process, free_port, until  # noqa: E402
from support.sealed import Direct  # noqa: E402

from corral.cli.common import Admin  # noqa: E402
from corral.cli.progress import Bar  # noqa: E402
from corral.config.record import AuditSettings  # noqa: E402
from corral.config.values import database_url  # noqa: E402
from corral.control.ledger import Ledger  # noqa: E402
from corral.stack.http import Unreachable  # noqa: E402
from corral.stack.state import StackError, StateFolder  # noqa: E402
from corral.store import retention  # noqa: E402
from corral.store.chain import ZERO, Span  # noqa: E402
from corral.store.database import Database, resolve  # noqa: E402
from corral.store.indexes import AHEAD, build_ahead  # noqa: E402
from corral.store.ingest import ingest  # noqa: E402
from corral.store.spool import HEADER  # noqa: E402
from corral.store.tables import audit, audit_checkpoints, audit_streams  # noqa: E402
from corral.store.verify import verify  # noqa: E402

GROUP = 1000
NOW = 1_800_000_000.0
BAR = 60.0
"""Seconds that the verification of a million records may take."""

TIMES = 3
"""Calls of each read; the best is told."""
BEFORE = "0015"
"""The last schema without an index of requests' ids."""
MORE = 20_000
"""Records that come in beside those that `reads` makes."""
PATIENCE = 30.0
"""Seconds after which control ends a read."""
COMMAND = [sys.executable, "-P", "-m", "corral"]

_encode = msgspec.json.Encoder().encode


def frame(first: int, count: int) -> bytes:
    """A frame of settle records like a gateway's: ids are the edge's UUIDv7, each text has its keyed hash."""
    records = []
    drawn = random.Random(first)
    for number in range(first, first + count):
        at = NOW + number / 100
        name = str(uuid.UUID(int=int(at * 1e3) << 80 | 7 << 76 | drawn.getrandbits(12) << 64 | 1 << 63 | number))
        prompt, answer = (drawn.randbytes(32).hex() for _ in range(2))
        records.append(
            _encode(
                {"t": "settle", "id": name, "request_id": name, "ts": at, "key": "k" * 10}
                | {"addr": "192.0.2.7", "api": "openai", "route": "/v1/chat/completions", "method": "POST"}
                | {"model": f"model-{number % 6}:latest", "status": 200, "outcome": "ok", "node": "node-1"}
                | {"attempts": 1, "req_bytes": 900, "resp_bytes": 1800, "prompt_tokens": 230, "tokens": number % 500}
                | {"estimated": False, "queue_ms": 0.125, "ttft_ms": 120.5, "ms": 2400.75}
                | {"prompt_hash": prompt, "answer_hash": answer, "model_digest": "d" * 64}
            )
        )
    payload = b"\n".join(records)
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def fill(database: Database, records: int, ledger: Ledger, checkpoints: int) -> None:
    """Enter records as a gateway's spool comes in, and sign them so many times meanwhile."""
    bar, offset, first = Bar("entered", "records"), 0, 0
    part = max(1, records // checkpoints) if checkpoints else records
    while first < records:
        count = min(GROUP, records - first, part - first % part)
        data = frame(first, count)
        offset = database.write_now(ingest, "gateway-1", "0000000000000001.seg", offset, data).watermark
        first += count
        bar.show(first, records)
        if checkpoints and not first % part:
            asyncio.run(ledger.sign())


ROWS = """
INSERT INTO audit (id, request_id, ts, gw, key, tenant, addr, api, route, method, model, status, outcome, node,
  attempts, req_bytes, resp_bytes, prompt_tokens, tokens, estimated, queue_ms, ttft_ms, ms, pos, leaf)
WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})
SELECT 'gateway-1-0123456789ab-' || i, {shown}, {now} + i / 100.0, 'gateway-1',
  CASE WHEN i % 100000 = 0 THEN 'key-rare' ELSE 'key-' || (i % 50) END, 'team-' || (i % 9), '192.0.2.7', 'openai',
  '/v1/chat/completions', 'POST', 'model-' || (i % 6), 200, 'ok', 'node-1', 1, 900, 1800, 230, i % 500, {false}, 0.125,
  120.5, 2400.75, i, {leaf} FROM n"""


def make(database: Database, ledger: Ledger, records: int) -> None:
    """Rows as they are after ingest, and two checkpoints that have half of them each."""
    bar = Bar("made", "rows")
    lite = database.dialect == "sqlite"
    leaf, false = ("randomblob(32)", "0") if lite else ("decode(md5(i::text) || md5(i::text), 'hex')", "false")
    shown = "hex(randomblob(18))" if lite else "gen_random_uuid()"
    for first in range(1, records + 1, 250_000):
        last = min(first + 249_999, records)
        values = {"first": first, "last": last, "now": NOW, "leaf": leaf, "false": false, "shown": shown}
        statement = text(ROWS.format(**values).replace("::", "\\:\\:"))
        database.write_now(lambda connection, one=statement: connection.execute(one))
        bar.show(last, records)
    half, link = records // 2, "00" * 32

    def sign(connection: Connection) -> None:
        head = {"stream": "gateway-1", "pos": records, "link": ZERO, "signed": records, "signed_link": ZERO}
        connection.execute(insert(audit_streams).values(**head, dropped=0))
        previous = link
        for number, span in enumerate(
            (Span("gateway-1", 1, half, link, link), Span("gateway-1", half + 1, records, link, link)), 1
        ):
            signed = ledger.signer.sign(number, NOW, previous, [span])
            previous = signed.digest()
            connection.execute(insert(audit_checkpoints).values(number=number, ts=NOW, line=signed.line().decode()))

    database.write_now(sign)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def verified(database: Database, ledger: Ledger, records: int, checkpoints: int) -> int:
    """Enter, sign and check; the exit status."""
    fill(database, records, ledger, checkpoints)
    begun = time.monotonic()
    asyncio.run(ledger.sign())
    print(f"signed in {time.monotonic() - begun:.1f} s: {ledger.number} checkpoints")
    begun = time.monotonic()
    lines = ledger.path.read_bytes().splitlines()
    checked, bar = Bar("checked", "checkpoints"), Bar("verified", "records")
    report = verify(Direct(database), lines, [ledger.signer.public], bar.show, checked.show)
    seconds = time.monotonic() - begun
    print(f"{database.dialect}: {report.records} records verified in {seconds:.1f} s, {len(report.problems)} problems")
    return 0 if report.records == records and not report.problems and seconds <= BAR else 1


@contextlib.contextmanager
def serving(database: Database, state: Path) -> Iterator[tuple[Process, Admin]]:
    """A control of that database, and its API; `corral` asks it too."""
    port = free_port()
    # JSON is YAML, too.
    settings = {
        "control": {"listen": f"127.0.0.1:{port}", "metrics": "", "state": str(state)},
        "store": {"database": database.engine.url.render_as_string(False), "valkey": "redis://127.0.0.1:1/0"},
        "audit": {"checkpoint": "1s"},
    }
    (state / "corral.yaml").write_text(json.dumps(settings))
    os.environ |= {"PYTHONPATH": str(ROOT / "api-gateway"), "CORRAL_URL": f"http://127.0.0.1:{port}"}
    os.environ["CORRAL_ADMIN_KEY_FILE"] = str(state / "admin.key")
    argv = [*COMMAND, "serve", "control", "--config", state / "corral.yaml"]
    control = Process(argv, state / "control.log", {"PYTHONPATH": os.environ["PYTHONPATH"]})
    try:
        control.wait_until((state / "admin.key").exists)
        yield control, Admin(StateFolder.locate(str(state), os.environ))
    finally:
        control.end()


def corral(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command."""
    return subprocess.run([*COMMAND, *arguments], stdout=subprocess.PIPE)


def verified_by_command(database: Database, ledger: Ledger, state: Path, records: int, checkpoints: int) -> int:
    """Enter, let a control sign, and check by the command, as one does; the exit status."""
    fill(database, records, ledger, checkpoints)
    with serving(database, state) as (control, admin):
        until(lambda: is_signed(admin), "all is signed", 600, every=1.0)
        begun, spent, theirs = time.monotonic(), os.times(), cpu_of(control.pid)
        run = corral("audit", "verify", "--json")
        seconds, theirs, now = time.monotonic() - begun, cpu_of(control.pid) - theirs, os.times()
        own = now.children_user + now.children_system - spent.children_user - spent.children_system
        told = json.loads(run.stdout)
    print(
        f"{database.dialect}: corral audit verify: {told['records']} records verified in {seconds:.1f} s, "
        f"{len(told['problems'])} problems; CPU: {own:.1f} s of the command's, {theirs:.1f} s of control's"
    )
    # Control's own records are among them.
    return 0 if run.returncode == 0 and told["records"] >= records and seconds <= BAR else 1


def cpu_of(pid: int) -> float:
    """The CPU seconds that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_signed(admin: Admin) -> bool:
    """Whether all that was entered has its checkpoint."""
    try:
        streams = admin("GET", "/audit/chain", timeout=120.0)["streams"]
    except (Unreachable, StackError):
        return False
    return all(one["signed"] == one["pos"] for name, one in streams.items() if name == "gateway-1")


def more(database: Database, first: int, offset: int) -> tuple[float, int]:
    """Enter more records; microseconds of CPU for each, the database's included, and where the next ones begin."""
    frames = [frame(number, GROUP) for number in range(first, first + MORE, GROUP)]
    server = text("SELECT pg_backend_pid()")
    pid = 0 if database.dialect == "sqlite" else database.write_now(lambda c: c.execute(server).scalar_one())
    begun = time.process_time() + (cpu_of(pid) if pid else 0.0)
    for data in frames:
        offset = database.write_now(ingest, "gateway-2", "0000000000000001.seg", offset, data).watermark
    spent = time.process_time() + (cpu_of(pid) if pid else 0.0) - begun
    return spent / MORE * 1e6, offset


def timed(admin: Admin, path: str, body: object) -> float:
    """The seconds of a call."""
    begun = time.monotonic()
    admin("GET" if body is None else "POST", path, body, timeout=600.0)
    return time.monotonic() - begun


def index(database: Database) -> None:
    """Build what migrations behind `BEFORE` have as indexes, as they do."""
    if database.dialect == "sqlite":
        for _, name, what in AHEAD:
            database.write_now(lambda c, made=f"CREATE INDEX {name} ON {what}": c.execute(text(made)))
    else:
        build_ahead(database.engine, BEFORE)


def read(database: Database, ledger: Ledger, state: Path, records: int) -> int:
    """Make rows, enter some more, and read as commands do; the exit status."""
    make(database, ledger, records)
    before, offset = more(database, records, 0)
    begun = time.monotonic()
    index(database)
    seconds = time.monotonic() - begun
    after, _ = more(database, records + MORE, offset)
    print(
        f"{database.dialect}, {records} rows: the index of requests' ids in {seconds:.1f} s; "
        f"CPU of a record that is entered: {before:.0f} us before, {after:.0f} us after"
    )
    row = select(audit.c.request_id).where(audit.c.seq == records // 2)
    request = database.read_now(lambda connection: str(connection.execute(row).scalar_one()))
    last, tenth = NOW + records / 100 - 50, NOW + records * 0.009
    calls: dict[str, tuple[str, object]] = {
        "verify's first call": ("/audit/chain", None),
        "compare": ("/audit/compare", {"request": request, "prompt": ["00" * 32]}),
    }
    slow = 0.0
    with serving(database, state) as (_, admin):
        until(lambda: is_signed(admin), "all is signed", 600, every=1.0)
        for what, asked in {
            "list": {},
            "list --request": {"request": request},
            "list --key": {"key": "key-7"},
            "list --key --since": {"key": "key-7", "since": last},
            "list --key --since, of a rare key": {"key": "key-rare", "since": last},
            "list --since, all of it": {"since": NOW},
            "list --since, the last 5,000": {"since": last},
            "list --since, none": {"since": NOW + records},
            "export --since, the first page of 5,000": {"after": 0, "since": last},
            "export --since, the first page of a tenth": {"after": 0, "since": tenth},
        }.items():
            calls[what] = "/audit?" + urlencode({"limit": 100, **asked}), None
        for what, (path, body) in calls.items():
            seconds = min(timed(admin, path, body) for _ in range(TIMES))
            slow = max(slow, seconds)
            print(f"{seconds * 1e3:10.1f} ms  {what}")
    return 0 if slow <= PATIENCE else 1


def forgotten(database: Database, ledger: Ledger, records: int) -> int:
    """Make rows, and delete the older half beside another writer; the exit status."""
    make(database, ledger, records)
    until = time.time() - 86400
    old = update(audit_checkpoints).where(audit_checkpoints.c.number == 1).values(ts=until - 1)
    database.write_now(lambda connection: connection.execute(old))
    dropped = database.read_now(retention.due, until)
    print(f"due: {dropped}")
    print(database.read_now(plan, dropped["gateway-1"]))
    waits: list[float] = []
    over = threading.Event()

    def other() -> None:
        offset = 0
        while not over.wait(0.05):
            data, begun = frame(10**9 + len(waits), 1), time.monotonic()
            offset = database.write_now(ingest, "gateway-2", "0000000000000001.seg", offset, data).watermark
            waits.append(time.monotonic() - begun)

    writer = threading.Thread(target=other)
    writer.start()
    begun = time.monotonic()
    asyncio.run(Ledger.forget(ledger))
    seconds = time.monotonic() - begun
    over.set()
    writer.join()
    left = database.read_now(lambda c: c.execute(select(func.count()).where(audit.c.gw == "gateway-1")).scalar_one())
    gone = records - left
    print(
        f"{database.dialect}: {gone} of {records} rows deleted in {seconds:.1f} s ({gone / seconds:,.0f}/s); another "
        f"writer waited {statistics.median(waits) * 1e3:.1f} ms (median), {max(waits) * 1e3:.0f} ms at most, "
        f"{len(waits)} times"
    )
    return 0 if gone == dropped["gateway-1"] else 1


def plan(connection: Connection, last: int) -> str:
    """How the database finds a batch of what goes."""
    explain = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN "
    where = f"gw = 'gateway-1' AND pos BETWEEN {last - retention.BATCH + 1} AND {last}"
    rows = connection.execute(text(f"{explain}DELETE FROM audit WHERE {where}")).all()
    return "\n".join("  " + str(row[-1]) for row in rows)


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verify", "retention", "reads"))
    parser.add_argument("--records", type=int)
    parser.add_argument("--checkpoints", type=int, default=0, help="sign so many times while records come in")
    parser.add_argument("--postgresql", action="store_true", help="on a server of its own, without fsync")
    parser.add_argument("--api", action="store_true", help="verify by the command, over the API of a control")
    given = parser.parse_args()
    records = given.records or {"verify": 1_000_000}.get(given.what, 5_000_000)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as exits:
        state = Path(folder)
        url = exits.enter_context(postgres()).database() if given.postgresql else "sqlite:///corral.db"
        (state / "audit.key").write_text(secrets.token_hex(32))
        database = Database(resolve(database_url(url), state))
        try:
            database.migrate()
            if given.what == "reads":
                for _, name, _ in AHEAD:
                    database.write_now(lambda c, one=name: c.execute(text(f"DROP INDEX {one}")))
            settings = AuditSettings(retention="1d")
            ledger = Ledger(database, settings, state, 1800.0)
            if given.what == "verify" and given.api:
                return verified_by_command(database, ledger, state, records, given.checkpoints)
            if given.what == "verify":
                return verified(database, ledger, records, given.checkpoints)
            if given.what == "reads":
                return read(database, ledger, state, records)
            return forgotten(database, ledger, records)
        finally:
            database.close()


if __name__ == "__main__":
    sys.exit(main())
