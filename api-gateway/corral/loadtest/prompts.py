"""Prompts of a stated length: plain English words, each about one token of a common vocabulary.

A prompt begins with its own number, so that no node has it in its prefix cache; blocks of a trace that names shared
prefixes are the same text wherever they occur. How many tokens a model made of it stands in the answers.
"""

from __future__ import annotations

import random

from corral.loadtest.traces import BLOCK

_TEXT = """
the of and to in that it is was for on are as with they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know get through back much before go
good new write our used me man too any day same right look think also around another came come work three word must
because does part even place well such here take why things help put years different away again off went old number
great tell men say small every found still between name should home big give air line set own under read last never
us left end along while might next sound below saw something thought both few those always looked show large often
together asked house world going want school important until form food keep children feet land side without boy once
animals life enough took sometimes four head above kind began almost live page got earth need far hand high year
mother light parts country father let night following picture being study second eyes soon times story boys since
white days ever paper hard near sentence better best across during today others however sure means knew try told
young miles sun ways thing whole hear example heard several change answer room sea against top turned learn point
city play toward five using himself usually
"""
_WORDS = _TEXT.split()
_SIZE = 1 << 16


class Corpus:
    """A long text of which prompts are cut; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        words = random.Random(f"corpus {seed}").choices(_WORDS, k=_SIZE)
        self._text = " ".join(words)
        starts, at = [], 0
        for word in words:
            starts.append(at)
            at += len(word) + 1
        self._starts = [*starts, at - 1]

    def prompt(self, number: int, tokens: int, blocks: tuple[int, ...] = ()) -> str:
        """A text of ``tokens`` words for request ``number``."""
        if blocks:
            parts = [self._cut(block * 2_654_435_761, BLOCK) for block in blocks]
            words = " ".join(parts).split(" ", tokens)
            return " ".join(words[:tokens])
        if tokens <= 4:
            return self._cut(number * 40_503, tokens)
        return f"{number} {self._cut(number * 40_503, tokens - 1)}"

    def _cut(self, place: int, tokens: int) -> str:
        """``tokens`` words from a place on, round the end as often as it takes."""
        parts, at = [], place % _SIZE
        while tokens > 0:
            take = min(tokens, _SIZE - at)
            parts.append(self._text[self._starts[at] : self._starts[at + take] - (at + take < _SIZE)])
            tokens, at = tokens - take, 0
        return " ".join(parts)
