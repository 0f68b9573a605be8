"""How a run goes, while it goes: one line that is written anew on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
from time import perf_counter
from typing import TextIO

from corral.loadtest.histogram import Histogram
from corral.loadtest.measure import Recorder
from corral.loadtest.units import seconds

EVERY = 5.0
RECENT = 2.0


class Progress:
    """Writes to ``out``. Elsewhere than on a terminal a line comes after a second, then each ``EVERY`` seconds."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._terminal = out.isatty()
        self._last = perf_counter() + 1.0 - EVERY

    def __call__(self, recorder: Recorder, over: bool) -> None:
        """Say how it stands."""
        now = perf_counter()
        if not self._terminal and not over and now - self._last < EVERY:
            return
        self._last = now
        text = line(recorder, now)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._out.write("\r" + text[:width].ljust(width) + ("\n" if over else ""))
        else:
            self._out.write(text + "\n")
        self._out.flush()


def line(recorder: Recorder, now: float) -> str:
    """The state: answers of the last seconds, tokens of the run so far, times of the latest answers."""
    elapsed = max(1e-9, now - recorder.start)
    group, series = recorder.total.group, recorder.series
    end = int(elapsed / series.seconds)
    begin = max(0, end - max(1, round(RECENT / series.seconds)))
    recent = series.slices[begin:end] or series.slices[:1]
    span = (end - begin) * series.seconds or elapsed
    parts = [f"{elapsed:6.1f} s", f"under way {recorder.in_flight}", f"done {group.ok}"]
    if group.failed:
        parts.append(f"failed {group.failed}")
    parts.append(f"{sum(part.ok for part in recent) / span:.1f} req/s")
    # Tokens are known once an answer is whole, so those of the last seconds would be too few.
    parts.append(f"{group.output_tokens / elapsed:.0f} tok/s")
    firsts, ends = [ttft for ttft, _ in recorder.latest if ttft is not None], [e2e for _, e2e in recorder.latest]
    for name, values in (("first token", firsts), ("end", ends)):
        if values:
            histogram = Histogram()
            histogram.extend(values)
            p50, p95 = histogram.percentiles((50, 95))
            parts.append(f"{name} p50 {seconds(p50)} p95 {seconds(p95)}")
    return "  ".join(parts)
