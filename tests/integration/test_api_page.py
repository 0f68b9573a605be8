"""docs/api.md: its examples are run, and its routes are those that the gateway has."""

from __future__ import annotations

import re
from pathlib import Path

from support.runbook import Shell
from support.servers import REPOSITORY
from support.stack import Stack

from corral.gateway import route

TEXT = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")


def test_the_examples(stack: Stack, tmp_path: Path) -> None:
    shell = Shell(tmp_path, stack.state, URL=stack.url, KEY=stack.key, MODEL="smollm2:135m")
    said = [shell.run(block) for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]
    native, openai, anthropic, lists, errors = said
    assert native.count("\n") > 1 and '"done":true' in native
    assert openai.rstrip().endswith("data: [DONE]")
    assert '"type":"message"' in anthropic
    assert lists.count("smollm2:135m") >= 2 and '{"status":"healthy"}' in lists
    assert errors.startswith("401\n") and '"param":"messages"' in errors


def test_the_routes() -> None:
    told = {one for one in re.findall(r"`(GET|POST) (/[\w/{}]+)`", TEXT) if not one[1].startswith("/admin/")}
    served = {(method.decode(), path.decode()) for method, path in route._ROUTES} | {("GET", "/v1/models/{id}")}
    assert told == served
