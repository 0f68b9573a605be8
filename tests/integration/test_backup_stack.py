"""A stack that served is lost, and serves again from nothing but its backup: keys, audit trail, models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import pytest
from support.backup import IDENTITY, cli
from support.postgres import Postgres
from support.servers import MODEL, ollama_program
from support.stack import stack

from corral.config.values import database_url as address


@pytest.fixture
def ollama_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ollama").symlink_to(ollama_program())
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


def chat(url: str, key: str) -> str:
    body = {"model": MODEL, "stream": False, "options": {"temperature": 0, "num_predict": 8}}
    headers = {"Authorization": f"Bearer {key}"}
    messages = [{"role": "user", "content": "Count to ten."}]
    answer = httpx.post(f"{url}/api/chat", json={**body, "messages": messages}, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["message"]["content"])


@pytest.mark.ollama
@pytest.mark.slow
@pytest.mark.usefixtures("ollama_on_path")
def test_from_sqlite_with_models_to_postgresql(tmp_path: Path, postgres: Postgres) -> None:
    identity = tmp_path / "identity"
    identity.write_text(str(IDENTITY) + "\n")
    backup = tmp_path / "whole.backup"
    with stack(tmp_path / "old", "--nodes", "1") as old:
        said = chat(old.url, old.key)
        revoked = old.corral("keys", "create", "revoked")
        old.corral("keys", "revoke", str(revoked["id"]))
        made = cli("create", "--with-models", "--state", old.state, "--recipient", str(IDENTITY.to_public()),
                   "--output", backup, "--json")  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["models"] == [MODEL]
        before = {row["id"]: row for row in old.corral("audit", "list", "--limit", "1000")}
        refused = cli("restore", backup, "--identity", identity, "--state", old.state, "--replace")
        assert (refused.returncode, "corral down" in refused.stderr) == (1, True)
        assert chat(old.url, old.key) == said
    tags = json.loads((old.state / "models/manifests/registry.ollama.ai/library/smollm2/135m").read_text())
    shutil.rmtree(tmp_path / "old")

    url = address(postgres.database())
    done = cli("restore", backup, "--identity", identity, "--state", tmp_path / "new", "--database", url, "--json")
    assert done.returncode == 0, done.stderr
    (tmp_path / "corral.yaml").write_text(f"store: {{database: '{url}'}}\n")
    with stack(tmp_path / "new", "--nodes", "1", "--config", str(tmp_path / "corral.yaml")) as new:
        assert new.key is None, "the key of then is still the key"
        assert chat(new.url, old.key) == said
        answer = httpx.get(f"{new.url}/api/tags", headers={"Authorization": f"Bearer {revoked['key']}"})
        assert answer.status_code == 401
        after = {row["id"]: row for row in new.corral("audit", "list", "--limit", "1000")}
        kept = {name: row for name, row in before.items() if row["outcome"] is not None and name in after}
        assert len(kept) >= 3 and all(after[name] == row for name, row in kept.items())
        assert json.loads((new.state / "models/manifests/registry.ollama.ai/library/smollm2/135m").read_text()) == tags

    blob = max((tmp_path / "new/models/blobs").iterdir(), key=lambda path: path.stat().st_size)
    with blob.open("r+b") as file:
        file.seek(1 << 20)
        byte = file.read(1)
        file.seek(1 << 20)
        file.write(bytes([byte[0] ^ 1]))
    damaged = cli("create", "--with-models", "--state", tmp_path / "new", "--recipient", str(IDENTITY.to_public()),
                  "--output", tmp_path / "damaged.backup")  # fmt: skip
    assert (damaged.returncode, "smollm2" in damaged.stderr, "is not what its name says" in damaged.stderr) == (
        1,
        True,
        True,
    ), damaged.stderr
    assert not list(tmp_path.glob("*damaged.backup*"))
