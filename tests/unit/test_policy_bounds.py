"""What a model's policy says of options is no harm to a runner either."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from corral.config.settings import ModelSettings


@pytest.mark.parametrize(
    "options",
    [
        {"repeat_penalty": 0},
        {"temperature": 1e-30},
        {"repeat_penalty": {"max": 0}},
        {"presence_penalty": {"min": -1e9}},
    ],
)
def test_a_policy_that_would_end_a_runner_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="ends Ollama's runner"):
        ModelSettings(name="m", options=options)


def test_one_within_the_bounds_is_taken() -> None:
    options = {"repeat_penalty": {"min": 0.5, "max": 2}, "temperature": 0, "presence_penalty": -1.5}
    assert ModelSettings(name="m", options=options).options == options
