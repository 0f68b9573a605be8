"""What several unit tests look at."""

from __future__ import annotations

import pytest
from support.results import result

from corral.loadtest.result import Result


@pytest.fixture(scope="session")
def made() -> Result:
    """A load test's result."""
    return result()
