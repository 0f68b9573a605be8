"""The part of Go's text/template that Ollama's prompt templates use: parse once, render many times."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)|(?P<op>:=|=|\||\(|\)|,)"""
    r"""|(?P<variable>\$\w*(?:\.\w+)*)|(?P<field>(?:\.\w+)+|\.)|(?P<word>\w+)|(?P<bad>\S))"""
)


class TemplateError(Exception):
    """The template does not parse, or cannot be rendered with the values at hand."""


@dataclass(slots=True)
class Node:
    """One piece of a parsed template. ``kind``: text, action, if, with, range, break or continue."""

    kind: str
    text: str = ""
    pipe: list[list[Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    body: list[Node] = field(default_factory=list)
    other: list[Node] = field(default_factory=list)


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class Template:
    """A parsed template; ``source`` is its text. Raises TemplateError with Go's text where it can."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._pieces = list(_pieces(source))
        self._at = 0
        self.nodes, end = self._list(top=True)
        if end:
            raise TemplateError(f"template: :{self._line()}: unexpected {{{{{end}}}}}")
        self.fields = {name.lower() for node in self.nodes for name in _fields(node)}

    def _line(self) -> int:
        return 1 + sum(text.count("\n") for _, text in self._pieces[: self._at])

    def _list(self, top: bool = False) -> tuple[list[Node], str]:
        """Nodes up to the ``end`` or ``else`` that closes them, and that word (empty at the end of input)."""
        nodes: list[Node] = []
        while self._at < len(self._pieces):
            action, text = self._pieces[self._at]
            self._at += 1
            if not action:
                nodes.append(Node("text", text))
                continue
            word = text.split(None, 1)[0] if text.split() else ""
            if word in ("end", "else"):
                return nodes, text.strip()
            if word in ("if", "with", "range"):
                nodes.append(self._branch(word, text.strip()[len(word) :]))
            elif word in ("break", "continue"):
                nodes.append(Node(word))
            elif word in ("define", "template", "block"):
                raise TemplateError(f"template: :{self._line()}: {word} is not supported")
            else:
                nodes.append(self._action("action", text))
        if not top:
            raise TemplateError(f"template: :{self._line()}: unexpected EOF")
        return nodes, ""

    def _branch(self, kind: str, text: str) -> Node:
        node = self._action(kind, text)
        node.body, end = self._list()
        if end.startswith("else"):
            rest = end[4:].strip()
            if rest:
                inner = rest.split(None, 1)[0]
                node.other = [self._branch(inner, rest[len(inner) :])]
            else:
                node.other, _ = self._list()
        return node

    def _action(self, kind: str, text: str) -> Node:
        tokens = self._tokens(text)
        if not tokens:
            raise TemplateError(
                f"template: :{self._line()}: missing value for {'command' if kind == 'action' else kind}"
            )
        node = Node(kind)
        texts = [token for token, _ in tokens]
        for sign in (":=", "="):
            if sign in texts:
                cut = texts.index(sign)
                node.names = [name for name, token in tokens[:cut] if token == "variable"]
                tokens = tokens[cut + 1 :]
                break
        node.pipe, rest = self._pipeline(tokens)
        if rest:
            raise TemplateError(f'template: :{self._line()}: unexpected "{rest[0][0]}" in operand')
        return node

    def _tokens(self, text: str) -> list[tuple[str, str]]:
        found = []
        for match in _TOKEN.finditer(text.strip()):
            kind = match.lastgroup or "bad"
            value = match.group(kind)
            if kind == "bad":
                raise TemplateError(f'template: :{self._line()}: unexpected "{value}" in operand')
            if kind == "word" and value not in _FUNCTIONS and value not in ("true", "false", "nil"):
                raise TemplateError(f'template: :{self._line()}: function "{value}" not defined')
            found.append((value, kind))
        return found

    def _pipeline(self, tokens: list[tuple[str, str]]) -> tuple[list[list[Any]], list[tuple[str, str]]]:
        commands: list[list[Any]] = [[]]
        while tokens:
            (value, kind), tokens = tokens[0], tokens[1:]
            if value == "|" and kind == "op":
                commands.append([])
            elif value == ")":
                return commands, [(value, kind), *tokens]
            elif value == "(":
                inner, tokens = self._pipeline(tokens)
                if not tokens:
                    raise TemplateError(f"template: :{self._line()}: unclosed left paren")
                tokens = tokens[1:]
                operand: Any = ("pipe", inner)
                if tokens and tokens[0][1] == "field" and tokens[0][0] != ".":
                    operand, tokens = ("chain", inner, tokens[0][0]), tokens[1:]
                commands[-1].append(operand)
            else:
                commands[-1].append((kind, value))
        return commands, []

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for ``values`` (keys as in ``.Key``; absent ones are empty). Raises TemplateError."""
        out: list[str] = []
        try:
            _run(self.nodes, values, {"$": values}, out)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise TemplateError(f"template: {error}") from None
        return "".join(out)


def _pieces(source: str) -> Iterator[tuple[bool, str]]:
    """(is an action, text) in order, with the trim markers applied and comments dropped."""
    at, trim = 0, False
    while True:
        start = source.find("{{", at)
        text = source[at:] if start < 0 else source[at:start]
        if trim:
            text = text.lstrip(" \t\r\n")
        if start < 0:
            if text:
                yield False, text
            return
        inside = start + 2
        if source[inside : inside + 1] == "-" and source[inside + 1 : inside + 2] in " \t\r\n":
            text = text.rstrip(" \t\r\n")
            inside += 1
        if text:
            yield False, text
        comment = source[inside:].lstrip().startswith("/*")
        end = source.find("}}", source.find("*/", inside) if comment else inside)
        if end < 0:
            raise TemplateError(f"template: :{1 + source.count(chr(10), 0, start)}: unclosed action")
        action = source[inside:end]
        trim = bool(re.search(r"[ \t\r\n]-\Z", action))
        if not comment:
            yield True, action[:-1] if trim else action
        at = end + 2


def _fields(node: Node) -> Iterator[str]:
    yield from _pipe_fields(node.pipe)
    for child in (*node.body, *node.other):
        yield from _fields(child)


def _pipe_fields(pipe: list[list[Any]]) -> Iterator[str]:
    for command in pipe:
        for operand in command:
            if operand[0] in ("field", "variable"):
                yield from (part for part in operand[1].lstrip("$").split(".") if part)
            elif operand[0] in ("pipe", "chain"):
                yield from _pipe_fields(operand[1])


def _run(nodes: list[Node], dot: Any, scope: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            out.append(node.text)
        elif node.kind == "break":
            raise _Break
        elif node.kind == "continue":
            raise _Continue
        elif node.kind == "range":
            _range(node, dot, scope, out)
        else:
            value = _evaluate(node.pipe, dot, scope)
            if node.kind == "action":
                if node.names:
                    scope[node.names[0]] = value
                else:
                    out.append(_text(value))
            elif _true(value):
                if node.names:
                    scope[node.names[0]] = value
                _run(node.body, value if node.kind == "with" else dot, scope, out)
            else:
                _run(node.other, dot, scope, out)


def _range(node: Node, dot: Any, scope: dict[str, Any], out: list[str]) -> None:
    value = _evaluate(node.pipe, dot, scope)
    pairs: list[tuple[Any, Any]]
    if isinstance(value, Mapping):
        pairs = sorted(value.items())
    elif isinstance(value, int):
        pairs = [(i, i) for i in range(value)]
    else:
        pairs = list(enumerate(value or []))
    if not pairs:
        _run(node.other, dot, scope, out)
    for key, item in pairs:
        if len(node.names) == 2:
            scope[node.names[0]], scope[node.names[1]] = key, item
        elif node.names:
            scope[node.names[0]] = item
        try:
            _run(node.body, item, scope, out)
        except _Continue:
            continue
        except _Break:
            break


_NOTHING = object()


def _evaluate(pipe: list[list[Any]], dot: Any, scope: dict[str, Any]) -> Any:
    value: Any = _NOTHING
    for command in pipe:
        head, *rest = command
        if head[0] == "word" and head[1] in _FUNCTIONS:
            value = _call(head[1], rest, value, dot, scope)
        else:
            value = _operand(head, dot, scope)
    return value


def _call(name: str, operands: list[Any], piped: Any, dot: Any, scope: dict[str, Any]) -> Any:
    if name in ("and", "or"):  # these two stop at the first operand that decides
        result: Any = None
        for operand in operands:
            result = _operand(operand, dot, scope)
            if _true(result) == (name == "or"):
                return result
        return result if piped is _NOTHING else piped
    arguments = [_operand(operand, dot, scope) for operand in operands]
    if piped is not _NOTHING:
        arguments.append(piped)
    return _FUNCTIONS[name](*arguments)


def _operand(operand: Any, dot: Any, scope: dict[str, Any]) -> Any:
    kind, value = operand[0], operand[1]
    if kind == "string":
        return value[1:-1] if value[0] == "`" else json.loads(value)
    if kind == "number":
        return float(value) if "." in value else int(value)
    if kind == "field":
        return _walk(dot, value)
    if kind == "variable":
        name, point, path = value.partition(".")
        return _walk(scope.get(name), "." + path) if point else scope.get(name)
    if kind == "pipe":
        return _evaluate(value, dot, scope)
    if kind == "chain":
        return _walk(_evaluate(value, dot, scope), operand[2])
    if value in _FUNCTIONS:
        return _FUNCTIONS[value]()
    return {"true": True, "false": False}.get(value)


def _walk(value: Any, path: str) -> Any:
    for part in path.split("."):
        if part:
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


def _true(value: Any) -> bool:
    return bool(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping | list):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return str(value)


def _slice(value: Any, *at: int) -> Any:
    return value[slice(*at)] if len(at) > 1 else value[at[0] :] if at else value


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else value[key]
    return value


def _day(offset: int) -> Callable[..., str]:
    return lambda *_: (date.today() + timedelta(days=offset)).isoformat()


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda *a: a,  # evaluated in _call
    "or": lambda *a: a,
    "not": lambda a: not a,
    "eq": lambda a, *b: any(a == item for item in b),
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "len": lambda a: len(a or ""),
    "index": _index,
    "slice": _slice,
    "print": lambda *a: "".join(map(_text, a)),
    "println": lambda *a: " ".join(map(_text, a)) + "\n",
    "printf": lambda form, *a: form.replace("%v", "%s") % tuple(_text(v) for v in a),
    "json": lambda a: json.dumps(a, separators=(",", ":"), ensure_ascii=False),
    "currentDate": _day(0),
    "yesterdayDate": _day(-1),
}
