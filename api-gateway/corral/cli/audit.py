"""`corral audit`: who asked what, when, and how it ended; whether the record of it is what was signed."""

from __future__ import annotations

import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click
import msgspec

from corral import __version__
from corral.cli import common, siem
from corral.cli.common import Admin, rows
from corral.cli.keys import Span
from corral.cli.progress import Bar
from corral.stack.state import StackError
from corral.store.chain import Signer
from corral.store.verify import Head, State, verify

PAGE = 1000
CHECKPOINTS = 5000
"""Checkpoints of a page."""

WRITTEN = 5.0
"""Within this many seconds control has written a checkpoint to its file."""

DIGEST_SHOWN = 12
"""Digits of a model's digest in the table: as many as `ollama list` shows of it."""

_COLUMNS = (
    *("time", "request_id", "key", "addr", "method", "route", "model", "digest", "node", "status"),
    *("outcome", "prompt_tokens", "tokens", "ms"),
)


@click.group("audit")
def command() -> None:
    """Read, check and export the audit trail."""


@command.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Records at most.")
@click.option("--after", type=click.IntRange(0), help="Records behind this number (seq).")
@click.option("--key", help="Of this key alone: its id or its name.")
@click.option("--model", help="For this model alone.")
@click.option("--request", help="Of this request alone: the X-Request-ID that its caller got.")
@click.option("--since", type=Span(unit=True), help="Of the last 10m, 24h, …")
@common.options
def list_records(as_json: bool, state: str | None, since: float | None, **given: Any) -> None:
    """List audit records, oldest first.

    Of calls of the admin API that only read or were refused, 20 of each a minute and caller have a record. One without
    a method stands for the rest: its route says how many (in the JSON `after.more_read` or `after.more_refused`).
    """
    query = {name: value for name, value in given.items() if value is not None}
    if since is not None:
        query["since"] = time.time() - since
    admin = Admin(common.folder(state))
    listed = rows(admin("GET", "/audit?" + urlencode(query)), "audit")
    names = {} if as_json or not listed else _told_apart(common.key_names(admin))
    shown = [_shown(item, names) for item in listed]
    common.emit(listed, as_json, lambda: common.table(shown, _COLUMNS, "no records"))


@command.command("verify")
@click.option("--checkpoints", type=click.Path(exists=True, dir_okay=False), help="A copy that was kept elsewhere.")
@click.option(
    "--public-key", multiple=True, help="Of the signer (hex, or a file with it); control's is not asked then."
)
@common.options
def verify_records(as_json: bool, state: str | None, checkpoints: str | None, public_key: tuple[str, ...]) -> None:
    """Check every record against the chain and the signed checkpoints.

    For an independent result give both a copy of the checkpoints and the public key that you noted. What was signed
    after the copy was made is taken from control.
    """
    admin = Admin(common.folder(state))
    own = Path(checkpoints).read_bytes().splitlines() if checkpoints else None
    source, signed = _signed(admin, own)
    publics = [_public(one) for one in public_key] or [source.public_key]
    begun = time.monotonic()
    checked, verified = Bar("checked", "checkpoints"), Bar("verified", "records")
    report = verify(source, signed, publics, verified.show, checked.show)
    if own is not None and len(signed) > len(own):
        report.notes.append(f"{len(signed) - len(own)} checkpoints are newer than {checkpoints} and control's own")
    seconds = time.monotonic() - begun
    told = {**vars(report), "ok": not report.problems, "public_keys": publics, "seconds": round(seconds, 3)}
    lines = [f"PROBLEM: {one}" for one in report.problems] + [f"note: {one}" for one in report.notes]
    if not public_key:
        lines.append("note: the public key is what control says: give --public-key to be independent of it")
    counts = f"{report.records} records of {report.streams} streams, {report.checkpoints} checkpoints"
    verdict = f"{len(report.problems)} problems" if report.problems else "whole"
    lines.append(f"{verdict}: {counts}, {report.unsigned} records not signed yet, {seconds:.1f} s")
    common.emit(told, as_json, lambda: "\n".join(lines))
    if report.problems:
        raise SystemExit(1)


@command.command("compare")
@click.argument("request")
@click.option("--prompt", type=click.Path(exists=True, dir_okay=False), help="Has the request's body, as it was sent.")
@click.option("--answer", type=click.Path(exists=True, dir_okay=False), help="Has the answer's text.")
@common.options
def compare(as_json: bool, state: str | None, request: str, prompt: str | None, answer: str | None) -> None:
    """Check whether a text was the prompt or the answer of REQUEST (its X-Request-ID, or its record's id).

    The text stays here: control is sent its SHA-256. Exit status 1 where no record has what was given.
    """
    given = {name: _digests(Path(file)) for name, file in (("prompt", prompt), ("answer", answer)) if file is not None}
    if not given:
        raise click.UsageError("give --prompt FILE, --answer FILE, or both")
    admin = Admin(common.folder(state))
    found = rows(admin("POST", "/audit/compare", {"request": request, **given}), "records")
    same = [one["id"] for one in found if all(one[name] for name in given)]
    lines = [f"{one['id']}: " + ", ".join(f"{name} {_ANSWERS[one[name]]}" for name in given) for one in found]
    common.emit({"same": same, "records": found}, as_json, lambda: "\n".join(lines))
    if not same:
        raise SystemExit(1)


_ANSWERS = {True: "is the same", False: "is another", None: "has no hash"}


def _digests(file: Path) -> list[str]:
    """The SHA-256 of a file's text, also without the line end that editors put behind it."""
    data = file.read_bytes()
    texts = [data] + [data.removesuffix(end) for end in (b"\n", b"\r\n") if data.endswith(end)]
    return [sha256(text).hexdigest() for text in texts]


@command.command("content")
@click.argument("request")
@click.option("--identity", multiple=True, required=True, metavar="FILE", help="Identities of age (repeatable).")
@common.options
def show_content(as_json: bool, state: str | None, request: str, identity: tuple[str, ...]) -> None:
    """Show prompt and answer of REQUEST (its X-Request-ID, or its record's id), where its key has them kept."""
    from corral.backup.archive import BackupError
    from corral.backup.place import read_secrets
    from corral.gateway.content import open_content

    try:
        identities = list(read_secrets(None, (), identity).identities)
        found = rows(Admin(common.folder(state))("GET", "/audit/content?" + urlencode({"request": request})), "content")
        shown = [{"id": one["id"], **open_content(_unchanged(one), identities)} for one in found]
    except (BackupError, ValueError) as error:
        common.fail(str(error), as_json)
    lines = [f"{one['id']}\nprompt: {one['prompt']}\nanswer: {one['answer']}" for one in shown]
    common.emit(shown, as_json, lambda: "\n\n".join(lines))


@command.command("export")
@click.option("--format", "form", type=click.Choice(siem.FORMATS), default="json", show_default=True)
@click.option("--since", type=Span(unit=True), help="Of the last 10m, 24h, …")
@click.option("--key", help="Of this key alone: its id or its name.")
@click.option("--model", help="For this model alone.")
@click.option("--output", type=click.Path(dir_okay=False), help="Into this file instead of standard output.")
@common.options
def export(as_json: bool, state: str | None, form: str, output: str | None, **given: Any) -> None:
    """Write records for a SIEM: JSON Lines, CSV, CEF, or OCSF (JSON Lines of API Activity, class 6003)."""
    query = {name: value for name, value in given.items() if value is not None}
    if "since" in query:
        query["since"] = time.time() - query["since"]
    lines = siem.lines(_all(Admin(common.folder(state)), query), form, __version__)
    if output is None:
        for line in lines:
            click.echo(line)
        return
    try:
        with Path(output).open("w", encoding="utf-8") as file:
            count = sum(file.write(line + "\n") > 0 for line in lines)
    except OSError as error:
        raise StackError(f"--output: {output} cannot be written: {error.strerror}") from None
    common.emit({"file": output, "lines": count}, as_json, lambda: f"{count} lines in {output}")


def _unchanged(content: dict[str, Any]) -> bytes:
    """What is kept of a record. Raises ValueError where it is not what the record names."""
    data = b64decode(content["data"])
    if content["content_hash"] not in (None, sha256(data).hexdigest()):
        raise ValueError(f"{content['id']}: the text is not the one that its record names: it was changed")
    return data


FIRST = -(2**63)
"""Behind which all records are, also one whose number somebody has changed."""


def _all(admin: Admin, query: dict[str, Any]) -> Iterator[dict[str, Any]]:
    after = FIRST
    whole = True
    # A page that is not full is the last: that it was read is a record too.
    while whole:
        listed = rows(admin("GET", "/audit?" + urlencode({**query, "after": after, "limit": PAGE})), "audit")
        _go_on(after, [row["seq"] for row in listed])
        yield from listed
        whole = len(listed) == PAGE
        after = listed[-1]["seq"] if listed else after


def _go_on(after: int, numbers: list[int]) -> None:
    """See that a page is one behind `after`: a control that says the same again and again would be read for ever."""
    if any(number <= before for before, number in pairwise([after, *numbers])):
        raise StackError(f"control's records behind {after} are not in their order: it does not tell what is there")


def _signed(admin: Admin, own: list[bytes] | None) -> tuple[_Api, list[bytes]]:
    """The chain's end, and its checkpoints: those of a copy, if there is one, and what control has behind them.

    They are read before the chain's end, so that none of them is passed over, and again where it says that more was
    signed meanwhile: control writes its file after its database.
    """
    known = _checkpoints(admin, 0) if own is None else own
    source = _Api(admin)
    # A copy is compared with what control has from the first one on.
    told = known if own is None or len(own) >= source.checkpoint else _checkpoints(admin, 0)
    until = time.monotonic() + WRITTEN
    while len(told) < source.checkpoint and time.monotonic() < until:
        time.sleep(0.1)
        told = told + _checkpoints(admin, len(told))
    # Later ones seal records behind the end that was told.
    return source, told[: max(len(known), source.checkpoint)] if told[: len(known)] == known else known


def _checkpoints(admin: Admin, after: int) -> list[bytes]:
    """The checkpoints behind the first `after`, fetched page by page."""
    found: list[bytes] = []
    bar, total = Bar("fetched", "checkpoints"), -1
    while True:
        query = urlencode({"after": after + len(found), "limit": CHECKPOINTS})
        some = admin.raw(f"/audit/checkpoints?{query}").splitlines()
        if found and some and some[0] in found[-CHECKPOINTS:]:  # each has its own number
            raise StackError("control shows the same checkpoints again and again: it does not tell what is there")
        found += some
        if len(some) == CHECKPOINTS and total < 0:
            total = max(0, int(admin("GET", "/status")["audit"]["checkpoint"]) - after)
        if total >= 0:
            bar.show(len(found), max(total, len(found)))
        if len(some) < CHECKPOINTS:
            return found


class _Api:
    """Records by the admin API, as `verify` asks for them: control reads the next page while one is checked."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[str, Future[bytes]] | None = None
        told = admin("GET", "/audit/chain", timeout=120.0)
        self.public_key = str(told["public_key"])
        self.checkpoint = int(told["checkpoint"])
        self._fields = tuple(told["fields"])
        heads = {
            name: Head(head["pos"], bytes.fromhex(head["link"]), head["signed"], head["highest"])
            for name, head in told["streams"].items()
        }
        self._state = State(heads, told["outside"], told["older"], told.get("last_older", 0))

    def state(self) -> State:
        return self._state

    def records(self, stream: str, after: int, limit: int) -> list[dict[str, Any]]:
        path = _records(stream, after, limit)
        ahead, self._ahead = self._ahead, None
        data = ahead[1].result() if ahead is not None and ahead[0] == path else self._admin.raw(path)
        found = msgspec.json.decode(data)
        names = (*self._fields, "leaf")
        if len(found["records"]) == limit:
            path = _records(stream, found["records"][-1][names.index("pos")], limit)
            self._ahead = path, self._reader.submit(self._admin.raw, path)
        listed = [dict(zip(names, row, strict=True)) for row in found["records"]]
        for row in listed:
            row["leaf"] = bytes.fromhex(row["leaf"]) if row["leaf"] is not None else None
            row["kept"] = found["kept"].get(row["id"])
        _go_on(after, [row["pos"] for row in listed])
        return listed

    def checkpoints(self, after: int) -> list[bytes]:
        return _checkpoints(self._admin, after)


def _records(stream: str, after: int, limit: int) -> str:
    return "/audit/records?" + urlencode({"stream": stream, "after": after, "limit": limit})


def _public(text: str) -> str:
    """A public key in hex: as given, or in a file; of a signing key's file, its public part."""
    path = Path(text)
    found = path.read_text(encoding="ascii").strip() if path.is_file() else text.strip()
    try:
        if len(bytes.fromhex(found)) != 32:
            raise ValueError
        return Signer(found).public if path.name == "audit.key" else found
    except ValueError:
        raise StackError(f"{text}: expected a file, or the 64 hexadecimal digits of an Ed25519 public key") from None


def _told_apart(names: dict[Any, str]) -> dict[Any, str]:
    """Of keys by their ids, the names, with the id where another key has the same one."""
    count = Counter(names.values())
    return {id: name if count[name] == 1 else f"{name} ({id})" for id, name in names.items()}


def _shown(record: dict[str, Any], names: dict[Any, str]) -> dict[str, Any]:
    """A record as a row, with one name for each thing: the others are in the JSON."""
    ts, key = record.get("ts"), record.get("key")
    # With its zone in each row: some may be of summer time, and some not.
    try:
        shown = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(ts)) if ts is not None else ts
    except (TypeError, ValueError, OverflowError, OSError):
        shown = ts  # what somebody has written there hides no other record
    one = {"request_id": record.get("request_id") or record.get("id"), "key": names.get(key, key)}
    if counted := _counted(record):
        one["route"] = f"{record.get('route')}{counted}"
    return {**record, **one, "time": shown, "digest": (record.get("model_digest") or "")[:DIGEST_SHOWN]}


def _counted(record: dict[str, Any]) -> str:
    """Of a record of the admin API that stands for calls without one of their own: how many, or that they follow."""
    told = record.get("after")
    if record.get("api") != "admin" or not isinstance(told, dict):
        return ""
    if told.get("counting") is True:
        return " (those behind it are counted)"
    counts = [f"{count} more {kind}" for kind in ("read", "refused") if (count := told.get(f"more_{kind}")) is not None]
    return f" ({', '.join(counts)})" if counts and not record.get("method") else ""
