"""What is wrong with a configuration, said so that it can be mended without reading the source."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(Exception):
    """A configuration that cannot be used.

    ``problems`` has one line each: ``corral.yaml:12: unknown field 'limts'; did you mean 'limits'?``
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))
