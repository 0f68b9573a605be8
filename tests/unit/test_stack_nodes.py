"""Which nodes `corral up` starts: an Ollama of PATH, of the user's cache, or the embedded node."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.node import service
from corral.stack import binaries, nodes
from corral.stack.state import StackError

ROOT = Path(__file__).resolve().parents[2]


def program(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Of a user who has no Ollama."""
    return {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}


@pytest.mark.parametrize("cache", [".cache", "elsewhere"])
def test_what_install_ollama_made_runs_where_it_is_asked_for(env: dict[str, str], tmp_path: Path, cache: str) -> None:
    if cache != ".cache":
        env["XDG_CACHE_HOME"] = str(tmp_path / cache)
    with pytest.raises(StackError, match="scripts/install-ollama"):
        nodes.choose((), None, "ollama", env)
    made = program(tmp_path / cache / f"corral/ollama-{nodes.TESTED}/bin/ollama")
    chosen = nodes.choose((), 3, "ollama", env)
    assert (chosen.kind, chosen.ollama, chosen.count) == ("ollama", made, 3)
    assert nodes.choose((), None, None, env).kind == "llama", "a plain `corral up` starts what it did before"


def test_one_on_path_comes_before_it_and_one_that_is_named_before_both(env: dict[str, str], tmp_path: Path) -> None:
    program(tmp_path / f".cache/corral/ollama-{nodes.TESTED}/bin/ollama")
    on_path = program(tmp_path / "bin/ollama")
    assert nodes.choose((), None, "ollama", env).ollama == nodes.choose((), None, None, env).ollama == on_path
    env["CORRAL_OLLAMA"] = program(tmp_path / "named")
    assert nodes.choose((), None, "ollama", env).ollama == env["CORRAL_OLLAMA"]
    env["CORRAL_OLLAMA"] = str(tmp_path)
    with pytest.raises(StackError, match="CORRAL_OLLAMA"):
        nodes.choose((), None, "ollama", env)


def test_the_folder_is_that_of_the_script() -> None:
    text = (ROOT / "scripts/install-ollama").read_text()
    assert f"\nversion={nodes.TESTED}\n" in text
    assert nodes.TESTED == service.VERSION, "the embedded node speaks as that Ollama does"
    assert "\ncache=${XDG_CACHE_HOME:-$HOME/.cache}/corral/ollama-$version\nprogram=$cache/bin/ollama\n" in text


def test_a_program_that_is_missing_is_got_from_the_checkout() -> None:
    """No package of Corral's is in an index: a name there would be somebody else's."""
    with pytest.raises(
        StackError, match=r"not-there is not installed: use \./corral of the checkout, or .*'\.\["
    ) as told:
        binaries._find("CORRAL_NOT_THERE", "no_such_package", ("not-there",))
    assert "corral[" not in str(told.value)
