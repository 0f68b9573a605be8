"""Commands without a stack, in the tests' own process."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from corral.cli.main import cli


class Runner:
    """Runs commands on a state folder."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli, [*arguments, "--state", str(self.state)])
