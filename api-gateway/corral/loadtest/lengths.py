"""How long prompts and answers are: a number, or a distribution of numbers."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

LONGEST = 1_000_000
_NUMBER = r"(\d+(?:\.\d+)?)"
_FORMS = {
    "fixed": re.compile(r"(\d+)"),
    "uniform": re.compile(r"(\d+)-(\d+)"),
    "exp": re.compile(rf"exp:{_NUMBER}"),
    "normal": re.compile(rf"normal:{_NUMBER}:{_NUMBER}"),
    "lognormal": re.compile(rf"lognormal:{_NUMBER}:{_NUMBER}"),
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, always at least 1. ``text`` is how it was written."""

    text: str
    kind: str
    first: float
    second: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.kind == "fixed":
            return int(self.first)
        if self.kind == "uniform":
            return rng.randint(int(self.first), int(self.second))
        if self.kind == "exp":
            value = rng.expovariate(1 / self.first)
        elif self.kind == "normal":
            value = rng.gauss(self.first, self.second)
        else:
            value = self.first * rng.lognormvariate(0.0, self.second)
        return min(LONGEST, max(1, round(value)))


def parse(text: str) -> Lengths:
    """``128``, ``64-512`` (uniform), ``exp:MEAN``, ``normal:MEAN:DEVIATION`` or ``lognormal:MEDIAN:SIGMA``.

    ValueError otherwise.
    """
    for kind, form in _FORMS.items():
        if match := form.fullmatch(text.strip()):
            values = [float(value) for value in match.groups()]
            ordered = kind != "uniform" or values[0] <= values[1]
            if 1 <= values[0] <= LONGEST and values[-1] <= LONGEST and ordered:
                return Lengths(text.strip(), kind, *values)
    raise ValueError("expected tokens such as 128, 64-512, exp:256, normal:256:64 or lognormal:200:0.8")
