"""docs/configuration.md, made of the settings model: `python -m corral.config.reference > docs/configuration.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from corral.config import values
from corral.config.record import PriceSettings
from corral.config.settings import Settings

_INTRODUCTION = """\
# Configuration

Made of the settings model (`api-gateway/corral/config/settings.py`): in `api-gateway`,
`../.venv/bin/python -m corral.config.reference`.

Everything has a default; `corral.yaml` says what shall be otherwise. The file is that of `--config FILE` or
`CORRAL_CONFIG`; `corral up` and `corral config` look for `corral.yaml` in the working directory too, `corral serve`
does not. A field that does not exist, or a value that does not fit, stops the start with the file's line, what was
expected and the nearest name.

- `corral config check` says every problem; `corral config show` the settings in force, passwords hidden; `corral config
  schema` prints a JSON Schema for editors.
- `corral config reload` applies nodes and models of a changed file to what runs, and names what waits for a restart.
- Each field also has an environment variable, which wins over the file: `CORRAL_`, then the field's place with `__`
  between its parts. With `_FILE` behind the name it says which file holds the value (secrets). An empty variable is not
  set; `none` is null; lists and mappings are written as YAML in one line, as `[{url: "http://10.0.0.11:11434"}]`.
- `OLLAMA_URL` (one address, or some with commas) stands for `nodes`, `REDIS_URL` for `store.valkey`.

Durations: `500ms`, `30s`, `30m`, `12h`, `400d`, or seconds; how long records are kept always has its unit. Sizes:
`64KiB`, `32MiB`, `22GiB` (powers of 1024), `22GB` (powers of 1000), or bytes.

```yaml
nodes:
  - {name: node-1, url: "http://10.0.0.11:11434", slots: 4, memory: 22GiB, accelerator: gpu}
  - {name: node-2, url: "http://10.0.0.12:11434", slots: 4, memory: 22GiB, accelerator: gpu}
models:
  - {name: "llama3.2:3b", copies: 2, num_ctx: 8192}
limits:
  default: {rpm: 600, tpm: 200000, concurrency: 32}
```
"""

_KINDS: list[tuple[Any, str]] = [
    (values.Duration, "duration"),
    (values.Retention, "duration with its unit"),
    (values.Size, "size"),
    (values.Whole, "whole number"),
    (values.BaseUrl, "`http(s)://host:port`"),
    (values.Listen, "`host:port`"),
    (values.ListenOrNone, '`host:port` or `""`'),
    (values.Name, "name"),
    (values.Network, "network"),
    (values.Registry, "registry"),
    (values.HostPattern, "host name"),
    (values.Origin, "origin"),
    (values.DatabaseUrl, "`sqlite:///…` or `postgresql://…`"),
    (values.RedisUrl, "`redis://…`"),
    (Path, "path"),
    (str, "text"),
    (bool, "true or false"),
    (PriceSettings, "`{prompt, generated}`"),
    (Any, "any value"),
]


def kind(hint: Any) -> str:
    """A type in words; a new one has to be added here."""
    for known, words in _KINDS:
        if hint == known:
            return words
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else kind(part) for part in inner)
    if origin is Literal:
        return " or ".join(f"`{word}`" for word in inner)
    if origin is tuple:
        words = kind(inner[0])
        return f"list of {words[:-1]}ies" if words.endswith("y") else f"list of {words}s"
    if origin is dict:
        return f"mapping of {kind(inner[0])} to {kind(inner[1])}"
    raise TypeError(f"no words for {hint!r}")


def default(field: FieldInfo, hint: Any) -> str:
    """The default as corral.yaml would have it."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True, validated_data={})
    if hint in (values.Duration, values.Retention):
        return f"`{values.duration_text(value)}`"
    if hint == values.Size:
        return f"`{values.size_text(value)}`"
    plain = (
        [str(item) for item in value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    )
    text = plain if isinstance(plain, str) and plain else json.dumps(plain)
    return f"`{text}`"


def bounds(field: FieldInfo) -> str:
    """What its limits add to a field's type, "" for none."""
    found = {name: getattr(rule, name) for rule in field.metadata for name in ("ge", "le", "gt") if hasattr(rule, name)}
    words = {"ge": "at least", "le": "at most", "gt": "more than"}
    return "".join(f", {word} {found[name]:g}" for name, word in words.items() if name in found)


def sections(model: type[BaseModel] = Settings, place: str = "") -> Iterator[str]:
    """A heading and a table for each section, in the order of the model."""
    hints = get_type_hints(model, include_extras=True)
    inner: list[tuple[str, type[BaseModel]]] = []
    lines: list[str] = []
    listed = "[]" in place
    for name, field in model.model_fields.items():
        hint, where = hints[name], f"{place}.{name}" if place else name
        item = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if isinstance(item, type) and issubclass(item, BaseModel):
            inner.append((f"{where}[]" if item is not hint else where, item))
            continue
        variable = "" if listed else f"`CORRAL_{where.replace('.', '__').upper()}` | "
        said = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        type_ = (kind(hint) + bounds(field)).replace("|", "\\|")
        lines.append(f"| `{name}` | {type_} | {default(field, hint)} | {variable}{said} |")
    if lines:
        told = (model.__doc__ or "").strip().splitlines()[0]
        yield f"\n## {place}\n\n{told}\n"
        if listed:
            yield f"As one variable: `CORRAL_{place.removesuffix('[]').upper()}`.\n"
        columns = ["field", "type", "default", *([] if listed else ["variable"]), "meaning"]
        yield f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
        yield from lines
    for where, section in inner:
        yield from sections(section, where)


def page() -> str:
    """The whole of docs/configuration.md."""
    return _INTRODUCTION + "\n".join(sections()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
