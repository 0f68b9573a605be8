"""What stops a load test before it starts."""

from __future__ import annotations


class LoadTestError(Exception):
    """Why a load test cannot run, or a result cannot be read: one sentence that says what to do."""
