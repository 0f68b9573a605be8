"""Whether the audit trail is what was signed: reads every record once, and needs no database of its own.

Each record is hashed anew. What is found is named by stream and place: a changed, missing or moved record, one beside
the chain, a cut tail, a chain that fits together but is not the signed one, a checkpoint that is not the signer's.
The text that is kept of a record has to be the one that the record names; it may be missing where a record of the
stream `control` says that retention has removed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from corral.store.chain import ZERO, Merkle, Older, OlderRoot, Signed, Span, content, leaf_of, link_after
from corral.store.signed import Beside, Checkpoints

CONTROL = "control"
"""The stream of what administrators and control itself do."""

TEXTS_DROPPED = "/retention/content"
"""The route of records that say up to which time prompts and answers were removed."""

PAGE = 5000
SHOWN = 20
"""Changed records of a stream that are named one by one."""


@dataclass(frozen=True)
class Head:
    """A stream as the database has it: its end, the last place that is signed, rows with a place, their highest."""

    pos: int
    link: bytes
    signed: int
    highest: int


@dataclass(frozen=True)
class State:
    """The streams, rows that are complete but in no chain, and rows that are older than the chain.

    ``last_older``: those numbered up to there are, as the database has it.
    """

    heads: Mapping[str, Head]
    outside: int
    older: int
    last_older: int = 0


class Source(Protocol):
    """Where records come from: the admin API, or a database."""

    def state(self) -> State:
        """The streams as they are now, in one look."""

    def records(self, stream: str, after: int, limit: int) -> Sequence[Mapping[str, Any]]:
        """The next records of a stream behind a place, in order: each with the fields that are hashed, ``leaf``, and
        ``kept``, the SHA-256 of the text that is there of it or None. Of "": those that are older than the chain.
        """

    def checkpoints(self, after: int) -> Iterable[bytes]:
        """The checkpoints behind the first `after`, as they were signed until now."""


@dataclass
class Report:
    """What was found. No ``problems``: the trail is what was signed."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    records: int = 0
    unsigned: int = 0
    checkpoints: int = 0
    streams: int = 0


Say = Callable[[int, int], None]
"""Hears how many are checked, of how many."""


def _silent(done: int, total: int) -> None:
    """Nobody hears it."""


def verify(
    source: Source, lines: Sequence[bytes], publics: Sequence[str], say: Say = _silent, say_signed: Say = _silent
) -> Report:
    """Check everything. `lines` are the checkpoints as they were signed, `publics` the keys (hex) that may sign.

    `say_signed` hears of the checkpoints, which come first, `say` of the records.
    """
    report = Report()
    checkpoints = Checkpoints(publics, report.problems)
    good = checkpoints.take(lines, lambda done: say_signed(done, len(lines)))
    if lines:
        say_signed(len(lines), len(lines))
    report.checkpoints = len(good)
    beside = Beside(source, checkpoints)
    state = source.state()
    if state.outside:
        report.problems.append(f"{state.outside} records stand beside the chain: they were inserted")
    spans: dict[str, list[tuple[int, Span]]] = {name: [] for name in sorted(state.heads)}
    for signed in good:
        for span in signed.checkpoint.streams:
            spans.setdefault(span.stream, []).append((signed.checkpoint.number, span))
    report.streams = len(spans)
    total = sum(head.pos for head in state.heads.values()) + state.older
    texts = _Texts(report)
    # Control's first: its records say which texts may be missing.
    for stream in sorted(spans, key=lambda name: (name != CONTROL, name)):
        _Stream(stream, spans[stream], state.heads.get(stream), report, total, say, texts).check(beside)
    head = state.heads.get(CONTROL)
    texts.finish(beside, head.pos if head is not None else 0)
    _older(beside, good, state, report)
    say(report.records, report.records)
    return report


def _older(source: Beside, good: Sequence[Signed], state: State, report: Report) -> None:
    """Check the records that are older than the chain: the database says which, and a checkpoint has to confirm it."""
    told = [(one.checkpoint.number, one.checkpoint.older) for one in good if one.checkpoint.older is not None]
    if not told:
        if state.older:
            report.notes.append(f"{state.older} records are older than the chain and covered by no checkpoint")
        return
    begun, first = told[0]
    number, signed = told[-1]
    if signed.last != first.last:
        report.problems.append(
            f"checkpoint {number}: records up to {signed.last} are older than the chain, up to {first.last} were"
        )
    if state.last_older != signed.last:
        report.problems.append(
            f"records up to {state.last_older} ({state.older}) pass for older than the chain, up to {signed.last} "
            f"({signed.count}) were signed"
        )
        return
    counted, early, texts = _count(source, signed)
    while (counted.count, counted.root()) != (signed.count, signed.root):
        # Retention signs what it will leave, and then removes the rest.
        later = source.older()
        if later is None or later.last != signed.last or later.until <= signed.until:
            break
        signed = later
        counted, early, texts = _count(source, signed)
    count = counted.count
    report.records += count
    if count != signed.count:
        how = f"{signed.count - count} are missing" if count < signed.count else f"{count - signed.count} were inserted"
        report.problems.append(f"of {signed.count} records older than the chain {how}")
    elif counted.root() != signed.root:
        report.problems.append(f"of {count} records older than the chain some were changed")
    if texts:
        report.problems.append(f"{texts} records older than the chain have a text, which none of them had")
    if count:
        report.notes.append(f"{count} records are older than the chain: covered as they were at checkpoint {begun}")
    if early:
        report.notes.append(f"{early} records older than the chain, which retention removes, are still there")


def _count(source: Beside, signed: Older) -> tuple[OlderRoot, int, int]:
    """Read the records that are older than the chain; the root of those that are to be there, how many are not, and of
    how many of all there is a text. Texts are kept since schema 0009, and there is the chain since 0007."""
    counted = OlderRoot(signed.until)
    after = early = texts = 0
    while after < signed.last and (rows := source.records("", after, PAGE)):
        early += sum(not counted.add(row) for row in rows)
        texts += sum(row["kept"] is not None for row in rows)
        after = rows[-1]["pos"]
    return counted, early, texts


class _Texts:
    """The texts that are kept of records, as far as they are looked at."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._until = 0.0
        self._ahead: set[str] = set()
        self._missing: list[tuple[str, int, str, float]] = []
        self._unnamed = 0

    def look(self, stream: str, row: Mapping[str, Any]) -> None:
        """Look at a record that is as it was entered, and at the text of it."""
        if stream == CONTROL and row["route"] == TEXTS_DROPPED:
            self._until = max(self._until, row["after"]["until"])
            self._ahead.update(row["after"]["ahead"])
        wanted, kept = row["content_hash"], row["kept"]
        if wanted == kept:
            return
        if wanted is None:
            self._unnamed += 1
        elif kept is not None:
            self._report.problems.append(f"{stream}: the text of record {row['pos']} ({row['id']}) was changed")
        elif not self._dropped(row["id"], row["ts"]):
            self._missing.append((stream, row["pos"], row["id"], row["ts"]))

    def _dropped(self, record: str, ts: float) -> bool:
        return ts < self._until or record in self._ahead

    def finish(self, source: Beside, after: int) -> None:
        """Name those that are missing, but for what retention has removed meanwhile; `after`: control's end before.

        Those that no record names are counted.
        """
        if self._unnamed:
            what = f"{self._unnamed} prompts with their answers are not covered: their records have no digest of them"
            self._report.notes.append(what)
        while self._missing and (rows := source.records(CONTROL, after, PAGE)):
            for row in rows:
                self.look(CONTROL, row)
            after = rows[-1]["pos"]
        missing = [
            (stream, pos, record)
            for stream, pos, record, ts in self._missing
            # Of a record that goes too, control's own may have gone before, and with it what it said of texts.
            if not self._dropped(record, ts) and pos > source.dropped(stream, pos)
        ]
        for stream, pos, record in missing[:SHOWN]:
            self._report.problems.append(f"{stream}: the text of record {pos} ({record}) is missing")
        if len(missing) > SHOWN:
            self._report.problems.append(f"the texts of {len(missing) - SHOWN} more records are missing")


class _Stream:
    """One stream's pass over its records."""

    def __init__(
        self,
        name: str,
        spans: list[tuple[int, Span]],
        head: Head | None,
        report: Report,
        total: int,
        say: Say,
        texts: _Texts,
    ) -> None:
        self._name, self._spans, self._head, self._texts = name, spans, head, texts
        self._report, self._total, self._say = report, total, say
        self._changed: list[Mapping[str, Any]] = []
        self._changes = 0
        self._rebuilt = False
        self._gone = 0

    def check(self, source: Beside) -> None:
        link, at = self._dropped()
        if at and (first := source.records(self._name, 0, 1)) and first[0]["pos"] <= at:
            # Retention is at work, or somebody put them there: it removes them either way.
            left = f"{self._name}: records up to {at} that retention removes are still there, from {first[0]['pos']} on"
            self._report.notes.append(left)
        rows = _Rows(source, self._name, at, self._head.pos if self._head is not None else 0)
        for number, span in self._spans:
            if span.last < span.first or span.last <= at:
                continue
            if span.first != at + 1:
                self._problem(f"checkpoint {number} begins at record {span.first}, not at {at + 1}")
            whole, root, end = self._range(rows, span.first, span.last, link)
            if whole and (root, end.hex()) != (span.root, span.link):
                self._rebuilt = True
                self._problem(
                    f"checkpoint {number}: records {span.first} to {span.last} fit together, but are not those that "
                    "were signed: the chain was rebuilt"
                )
            link, at = bytes.fromhex(span.link), span.last
        self._unsigned(rows, at, link)
        self._name_changed()
        if self._gone:
            self._report.notes.append(f"{self._name}: records up to {self._gone} were removed by retention meanwhile")

    def _dropped(self) -> tuple[bytes, int]:
        """Where the records begin that retention has left, and the link before them."""
        dropped = max((span.dropped for _, span in self._spans), default=0)
        if not dropped:
            return ZERO, 0
        for _, span in self._spans:
            if span.last == dropped:
                return bytes.fromhex(span.link), dropped
        self._problem(f"records up to {dropped} are said to be dropped, which is no checkpoint's end")
        return ZERO, dropped

    def _range(self, rows: _Rows, first: int, last: int, link: bytes) -> tuple[bool, str, bytes]:
        """Read records `first` to `last`: whether each is there as it was entered, their root, the link after them."""
        tree, whole, expected = Merkle(), True, first
        while expected <= last:
            row = rows.next(last)
            pos = row["pos"] if row is not None else last + 1
            if pos != expected:
                self._miss(rows, expected, pos - 1, row is None and last >= self._end())
                whole = False
            if row is None:
                break
            leaf = leaf_of(content(row))
            if leaf != row["leaf"]:
                self._changes += 1
                if len(self._changed) < SHOWN:
                    self._changed.append(row)
                whole = False
            else:
                self._texts.look(self._name, row)
            tree.add(leaf)
            link = link_after(link, leaf)
            expected = pos + 1
            self._report.records += 1
            if not self._report.records % PAGE:
                self._say(self._report.records, self._total)
        return whole, tree.root().hex(), link

    def _miss(self, rows: _Rows, first: int, last: int, end: bool) -> None:
        """Name records that are not there, but for those that retention has removed since this began."""
        gone = min(rows.dropped(last), last)
        if gone >= first:
            self._gone, first = gone, gone + 1
        if first <= last:
            what = f"record {first} is" if first == last else f"records {first} to {last} are"
            self._problem(f"{what} missing" + (": the tail was cut" if end else ""))

    def _end(self) -> int:
        """The last place that anything knows of."""
        return max([span.last for _, span in self._spans] + [self._head.pos if self._head is not None else 0])

    def _unsigned(self, rows: _Rows, at: int, link: bytes) -> None:
        head = self._head
        if head is None:
            self._problem("the database no longer knows this stream")
            return
        if head.signed > at:
            self._problem(f"checkpoints are missing: records {at + 1} to {head.signed} were signed")
        if head.highest > head.pos:
            self._problem(f"records {head.pos + 1} to {head.highest} stand behind the end: they were inserted")
        if head.pos < at:
            self._problem(f"the database ends at record {head.pos}, {at} were signed: the tail was cut")
        elif head.pos > at:
            whole, _, end = self._range(rows, at + 1, head.pos, link)
            self._report.unsigned += head.pos - at
            if whole and end != head.link and not self._rebuilt:
                self._problem(f"records {at + 1} to {head.pos}, not signed yet, do not lead to the chain's end")

    def _name_changed(self) -> None:
        """Name the records that are not what was hashed; those that stand in each other's place as such."""
        places = [row["pos"] for row in self._changed]
        for row in self._changed:
            pos = row["pos"]
            was = next((one for one in places if leaf_of(content({**row, "pos": one})) == row["leaf"]), None)
            how = "was changed" if was is None else f"was moved: it was record {was}"
            self._problem(f"record {pos} ({row['id']}) {how}")
        if self._changes > len(self._changed):
            self._problem(f"{self._changes - len(self._changed)} more records were changed")

    def _problem(self, text: str) -> None:
        self._report.problems.append(f"{self._name}: {text}")


class _Rows:
    """A stream's records behind a place, up to the stream's end, page by page."""

    def __init__(self, source: Beside, stream: str, after: int, end: int) -> None:
        self._source, self._stream, self._end = source, stream, end
        self._page: list[Mapping[str, Any]] = []
        self._after = after

    def next(self, last: int) -> Mapping[str, Any] | None:
        """The next record up to `last`, None where there is none."""
        if not self._page and self._after < self._end:
            found = self._source.records(self._stream, self._after, PAGE)
            self._page = [row for row in reversed(found) if row["pos"] <= self._end]
            self._after = found[-1]["pos"] if found else self._end
        if not self._page or self._page[-1]["pos"] > last:
            return None
        return self._page.pop()

    def dropped(self, wanted: int) -> int:
        """See `Beside.dropped`."""
        return self._source.dropped(self._stream, wanted)
