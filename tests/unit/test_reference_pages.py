"""docs/configuration.md and docs/cli.md are what the program says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from corral.cli import reference as commands
from corral.config import reader, settings
from corral.config import reference as configuration

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "page", "module"),
    [
        ("configuration.md", configuration.page, "corral.config.reference"),
        ("cli.md", commands.page, "corral.cli.reference"),
    ],
)
def test_a_generated_page_is_up_to_date(name: str, page: object, module: str) -> None:
    assert callable(page)
    stale = f"in api-gateway: ../.venv/bin/python -m {module} > ../docs/{name}"
    assert (DOCS / name).read_text(encoding="utf-8") == page(), stale


def test_every_field_has_a_row_with_its_variable_and_a_meaning() -> None:
    text = configuration.page()
    leaves = [place for place in reader.fields() if not any(other[:-1] == place for other in reader.fields())]
    for place in leaves:
        if place[0] not in ("nodes", "models"):
            variable = "CORRAL_" + "__".join(place).upper()
            assert re.search(rf"^\| `{place[-1]}` \| .+ \| `{variable}` \| \S.+ \|$", text, re.MULTILINE), place
    for model in (settings.NodeSettings, settings.ModelSettings):
        for name in model.model_fields:
            assert re.search(rf"^\| `{name}` \| .+ \| \S.+ \|$", text, re.MULTILINE), name


def test_defaults_are_written_as_the_file_takes_them(tmp_path: Path) -> None:
    text = configuration.page()
    (tmp_path / "corral.yaml").write_text(*re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    settings.load(tmp_path / "corral.yaml", {})
    env = {
        variable: value
        for value, variable in re.findall(r"\| `([^`]+)` \| `(CORRAL_[A-Z_]+__[A-Z_]+)` \|", text)
        if value != '""'
    }
    assert len(env) > 40
    assert settings.load(None, env) == settings.load(None, {})
    assert yaml.safe_load(env["CORRAL_GATEWAY__TRUSTED_PROXIES"]) == ["127.0.0.1/32"]


def test_every_command_is_on_its_page_and_explains_itself() -> None:
    text = commands.page()
    found = list(commands.commands())
    assert len(found) > 30
    for path, command in found:
        assert f"`corral {' '.join(path)}" in text
        assert command.get_short_help_str(), path
        assert {"--json", "--state"} <= {option for param in command.params for option in param.opts}, path
