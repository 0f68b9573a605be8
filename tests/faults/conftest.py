"""The fleet that these tests hurt: one for all of them, since each leaves it whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fleet import Fleet
from support.fleet import fleet as run_fleet


@pytest.fixture(scope="session")
def whole_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Edge, two gateways, control, Valkey and two simulated nodes."""
    with run_fleet(tmp_path_factory.mktemp("fleet")) as made:
        yield made


@pytest.fixture
def fleet(whole_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, every node ready before and after."""
    whole_fleet.all_ready()
    yield whole_fleet
    whole_fleet.all_ready()
