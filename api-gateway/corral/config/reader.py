"""From a file and the environment to settings; every complaint names its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from corral.config.errors import ConfigError
from corral.config.settings import Settings

Place = tuple[str | int, ...]
"""A field's way from the top: ("nodes", 0, "url")."""

DEPTH = 32
VALUES_MAX = 100_000

_OWN_VARIABLES = frozenset(
    ("CORRAL_URL", "CORRAL_ADMIN_KEY", "CORRAL_ADMIN_KEY_FILE", "CORRAL_OLLAMA", "CORRAL_STATE", "CORRAL_CONFIG")
)


def read(path: Path | None, env: Mapping[str, str], whole: bool = False) -> Settings:
    """Settings of ``path`` with ``env`` over it. Raises ConfigError with every problem found.

    ``whole``: the nodes that are named have to be among its own, where it has any.
    """
    source = Source()
    if path is not None:
        source.read_file(path)
    source.read_environment(env)
    if source.problems:
        raise ConfigError(source.problems)
    try:
        settings = Settings.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError([source.explain(dict(item)) for item in error.errors()]) from None
    if whole and settings.nodes and (problems := source.unknown_nodes(settings)):
        raise ConfigError(problems)
    return settings


class Source:
    """What was read, and where each value stood."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.where: dict[Place, str] = {(): "corral.yaml"}
        self.problems: list[str] = []
        self._read = 0

    # -- the file

    def read_file(self, path: Path) -> None:
        self.where[()] = str(path)
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except OSError as error:
            raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
        except UnicodeDecodeError:
            raise ConfigError([f"{path}: is not UTF-8 text"]) from None
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise ConfigError([f"{path}{line}: not YAML: {error.problem or error.context}"]) from None
        except yaml.YAMLError as error:
            raise ConfigError([f"{path}: not YAML: {error}"]) from None
        except RecursionError:
            raise ConfigError([f"{path}: is nested too deeply"]) from None
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            line = f"{path}:{node.start_mark.line + 1}"
            raise ConfigError([f"{line}: expected fields such as 'gateway: …' at the top"])
        self.data = self._value(node, (), str(path))

    def _value(self, node: yaml.Node, place: Place, file: str) -> Any:
        line = f"{file}:{node.start_mark.line + 1}"
        if len(place) > DEPTH:
            raise ConfigError([f"{line}: {dotted(place[:1])!r} is nested too deeply, or refers to itself"])
        self._read += 1
        if self._read > VALUES_MAX:
            raise ConfigError([f"{line}: the file has more than {VALUES_MAX} values, with aliases (*name) resolved"])
        if place:
            self.where.setdefault(place, line)
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                at = f"{file}:{key_node.start_mark.line + 1}"
                if key in values:
                    self.problems.append(f"{at}: {dotted((*place, key))!r} is given twice")
                self.where[(*place, key)] = at
                values[key] = self._value(value_node, (*place, key), file)
            return values
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*place, index), file) for index, item in enumerate(node.value)]
        try:
            value = _scalars.construct_object(node)
        except yaml.YAMLError as error:
            self.problems.append(f"{line}: {getattr(error, 'problem', error)}")
            return None
        # A date or a set is no value of ours; its text gives the better message.
        return value if value is None or isinstance(value, str | int | float | bool) else str(node.value)

    # -- the environment

    def read_environment(self, env: Mapping[str, str]) -> None:
        """``CORRAL_SECTION__FIELD``, the same with ``_FILE``, OLLAMA_URL (some by commas), REDIS_URL."""
        if urls := [url.strip() for url in env.get("OLLAMA_URL", "").split(",") if url.strip()]:
            self.data["nodes"] = [{"url": url} for url in urls]
            self.where |= {("nodes", index, "url"): "environment: OLLAMA_URL" for index in range(len(urls))}
        if url := env.get("REDIS_URL"):
            self._set(("store", "valkey"), url, "REDIS_URL")
        for variable in sorted(env):
            if variable.startswith("CORRAL_") and variable not in _OWN_VARIABLES:
                self._read_variable(variable, env[variable])

    def _read_variable(self, variable: str, text: str) -> None:
        place = tuple(variable[len("CORRAL_") :].lower().split("__"))
        known = set(fields())
        by_file = (*place[:-1], place[-1].removesuffix("_file"))
        if place in known:
            self._set(place, text, variable)
        elif by_file != place and by_file in known:
            try:
                self._set(by_file, Path(text).read_text(encoding="utf-8").rstrip("\r\n"), variable)
            except (OSError, UnicodeDecodeError) as error:
                self.problems.append(f"environment: {variable}: {text} cannot be read: {error}")
        elif "__" in variable:
            names = ["CORRAL_" + "__".join(field).upper() for field in known]
            self.problems.append(f"environment: unknown field {variable!r}{hint(variable, names)}")

    def _set(self, place: tuple[str, ...], text: str, variable: str) -> None:
        value: Any = text
        if text.lower() in ("null", "none"):
            value = None
        elif text.lstrip()[:1] in ("[", "{"):
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                self.problems.append(f"environment: {variable}: not YAML")
                return
            except RecursionError:
                self.problems.append(f"environment: {variable}: is nested too deeply")
                return
        elif place == ("gateway", "trusted_proxies"):
            value = [part.strip() for part in text.split(",")]
        if text == "":
            return  # not set: compose files write it so
        inner = self.data
        for name in place[:-1]:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[place[-1]] = value
        for stale in [known for known in self.where if known[: len(place)] == place]:
            del self.where[stale]
        self.where[place] = f"environment: {variable}"

    # -- complaints

    def explain(self, error: dict[str, Any]) -> str:
        """One line for one of pydantic's errors."""
        place: Place = tuple(part for part in error["loc"] if part != "[key]")
        where = self._nearest(place)
        if error["type"] == "extra_forbidden":
            return f"{where}: unknown field {dotted(place)!r}{_suggest(place)}"
        message = _MESSAGES.get(error["type"])
        if error["type"] == "string_pattern_mismatch":
            message = "expected " + WORDS[error["ctx"]["pattern"]]
        elif message is None:
            message = str(error["msg"]).removeprefix("Value error, ")
            message = message[0].lower() + message[1:].replace("Input should", "it should")
        else:
            message = message.format_map(error.get("ctx", {}))
        if error["type"] == "missing":
            return f"{where}: {dotted(place)}: {message}"
        given = error["input"]
        shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
        if isinstance(given, dict | list) and error["type"] in _MESSAGES:
            shown = ", got " + ("fields" if isinstance(given, dict) else "a list")
        if given is None:
            shown = ", got nothing"
        if "://" in shown and "@" in shown:
            shown = ""  # it may hold a password
        return f"{where}: {dotted(place) + ': ' if place else ''}{message}{shown}"

    def unknown_nodes(self, settings: Settings) -> list[str]:
        """A line for each node of ``tenants.nodes`` that the fleet does not have."""
        known = [node.name for node in settings.nodes]
        return [
            f"{self._nearest(('tenants', 'nodes', tenant, index))}: tenants.nodes.{tenant}: there is no node {name!r}"
            f"{hint(name, known) or ';'} the nodes are {', '.join(known)}"
            for tenant, names in settings.tenants.nodes.items()
            for index, name in enumerate(names)
            if name not in known
        ]

    def _nearest(self, place: Place) -> str:
        while place and place not in self.where:
            place = place[:-1]
        return self.where[place]


_scalars = yaml.SafeLoader("")
_MESSAGES = {
    "missing": "is needed",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "path_type": "expected a path",
    "tuple_type": "expected a list",
    "dict_type": "expected fields (name: value)",
    "model_type": "expected fields (name: value)",
    "literal_error": "expected {expected}",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than_equal": "expected at most {le:g}",
    "string_too_short": "expected some text",
    "string_too_long": "expected at most {max_length} letters",
    "finite_number": "expected a number",
    "int_parsing_size": "expected a smaller number",
}
WORDS = {
    r"^sha256:[0-9a-f]{64}$": "a digest: sha256: and 64 hexadecimal digits",
    r"^[0-9A-Za-z.:_-]+$": "an address to listen on, such as 127.0.0.1 or ::",
    r"^[#@]?[\w.-]{1,80}$": "a channel such as #llm-alerts",
    r"^(https?://\S+[^/\s])?$": "an address such as https://example.com/runbooks, without a slash at its end",
    r"^age1[02-9ac-hj-np-z]{58}$": "a public key of age's (age1…), as age-keygen prints it",
    r"^[0-9a-f]{32}$": "the id of a signing key, 32 hexadecimal digits, as `corral doctor` names it",
    r"^https?://\S+$": "an address such as https://example.com/hook",
    r"^[A-Za-z]{1,8}$": "one to eight letters, such as EUR",
}
"""What the patterns of the settings ask for."""


def dotted(place: Place) -> str:
    """``nodes[0].url`` of ("nodes", 0, "url")."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def fields(model: type[BaseModel] = Settings, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field that is not within a list, sections included."""
    for name, field in model.model_fields.items():
        yield (*place, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, (*place, name))


def _suggest(place: Place) -> str:
    model = _section(place[:-1])
    name = str(place[-1])
    siblings = list(model.model_fields) if model else []
    if near := hint(name, siblings):
        return near
    elsewhere = [dotted(field) for field in fields() if field[-1] == name]
    if len(elsewhere) == 1:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; expected one of {', '.join(siblings)}" if siblings else ""


def hint(name: str, valid: list[str]) -> str:
    """The nearest of the valid names, as the end of a complaint; "" where none is near."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _section(place: Place) -> type[BaseModel] | None:
    """The model of the mapping at ``place``."""
    found: Any = Settings
    for part in place:
        if isinstance(part, int):
            found = next((arg for arg in get_args(found) if arg is not Ellipsis), None)
        elif isinstance(found, type) and issubclass(found, BaseModel) and part in found.model_fields:
            found = found.model_fields[part].annotation
        else:
            return None
    plain = get_origin(found) is None and isinstance(found, type)
    return found if plain and issubclass(found, BaseModel) else None
