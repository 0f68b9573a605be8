"""A defence of docs/security.md: what stands for it in the code, and the tests that fail when it is taken out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "api-gateway/corral/"


@dataclass(frozen=True)
class Defence:
    """``there`` stands once in ``file`` (in the package, or in the repository); ``gone`` is what is left without it.

    ``tests`` are files, or tests of one (``file::test``); each of them fails by itself.
    """

    row: int
    file: str
    there: str
    gone: str
    tests: str

    @property
    def path(self) -> str:
        """The file's path in the repository."""
        return self.file if (ROOT / self.file).exists() else PACKAGE + self.file

    @property
    def files(self) -> set[str]:
        """The files of its tests."""
        return {test.partition("::")[0] for test in self.tests.split()}
