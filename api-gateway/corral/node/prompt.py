"""From messages to the model's prompt: templates, merging of messages, dropping old ones that do not fit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from corral.node.gotemplate import Node, Template, TemplateError

Message = Mapping[str, Any]

# What a model without a template of its own gets, and what ChatML models (SmolLM2, Qwen, Yi, ...) get.
PLAIN = "{{ .Prompt }}"
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
CHATML_STOP = ["<|im_start|>", "<|im_end|>"]

# Beyond this a chat template does more than ChatML (tools, thinking), and ChatML would misrepresent it.
_CHATML_LIMIT = 700


def detect(chat_template: str) -> tuple[str, list[str]] | None:
    """The Ollama template and stop strings for a GGUF's own chat template, None if none is known."""
    if "<|im_start|>" in chat_template and "<|im_end|>" in chat_template and len(chat_template) < _CHATML_LIMIT:
        return CHATML, CHATML_STOP
    return None


@lru_cache(maxsize=64)
def compiled(source: str) -> Template:
    """The parsed template; one that reads neither messages nor the response answers after its end.

    Raises TemplateError.
    """
    template = Template(source)
    if not template.fields & {"messages", "response"}:
        template.nodes.append(Node("action", pipe=[[("field", ".Response")]]))
    return template


def render(source: str, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """The prompt for ``messages``. Raises TemplateError."""
    template = compiled(source)
    system, merged = _merge(messages)
    if "messages" in template.fields:
        values = {"System": system, "Messages": merged, "Tools": list(tools), "Response": ""}
        return template.render(values)
    return _render_turns(template, merged)


def fill(source: str, prompt: str, suffix: str) -> str:
    """The prompt of a request to fill in between ``prompt`` and ``suffix``. Raises TemplateError."""
    return compiled(source).render({"Prompt": prompt, "Suffix": suffix, "Response": ""})


def _merge(messages: Sequence[Message]) -> tuple[str, list[dict[str, Any]]]:
    """All system texts in one, and the messages with neighbours of one role joined (but not tools')."""
    system: list[str] = []
    merged: list[dict[str, Any]] = []
    for message in messages:
        role, content = str(message.get("role", "")), str(message.get("content", ""))
        if role == "system":
            system.append(content)
        if merged and merged[-1]["Role"] == role != "tool":
            merged[-1]["Content"] += "\n\n" + content
        else:
            merged.append({"Role": role, "Content": content, "Thinking": message.get("thinking", "")})
    return "\n\n".join(system), merged


def _render_turns(template: Template, messages: list[dict[str, Any]]) -> str:
    """For templates of one turn (``.System``, ``.Prompt``, ``.Response``): a rendering for each turn."""
    out: list[str] = []
    turn = {"System": "", "Prompt": "", "Response": ""}

    def flush() -> None:
        out.append(template.render(turn))
        turn.update(System="", Prompt="", Response="")

    for message in messages:
        role, content = message["Role"], message["Content"]
        if role == "system":
            if turn["Prompt"] or turn["Response"]:
                flush()
            turn["System"] = content
        elif role == "user":
            if turn["Response"]:
                flush()
            turn["Prompt"] = content
        elif role == "assistant":
            turn["Response"] = content
    # The last turn is open: what the template has after its response is for the model's answer, not for now.
    out.append(_until_response(template).render(turn))
    return "".join(out)


def _until_response(template: Template) -> Template:
    cut = Template("")
    cut.nodes, _ = _cut(template.nodes)
    return cut


def _cut(nodes: list[Node]) -> tuple[list[Node], bool]:
    """``nodes`` up to and with the first action that reads the response, and whether there was one."""
    kept: list[Node] = []
    for node in nodes:
        if node.kind == "action" and any(
            operand[:2] == ("field", ".Response") for command in node.pipe for operand in command
        ):
            return [*kept, node], True
        body, found = _cut(node.body)
        other, found_other = _cut(node.other) if not found else ([], True)
        kept.append(Node(node.kind, node.text, node.pipe, node.names, body, other))
        if found or found_other:
            return kept, True
    return kept, False


def with_image_tags(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Copies of the messages with ``[img-N]`` in the text for each image, and the images in that order."""
    images: list[bytes] = []
    tagged: list[dict[str, Any]] = []
    for message in messages:
        content, prefix = str(message.get("content", "")), ""
        for image in message.get("images", ()):
            tag = f"[img-{len(images)}]"
            images.append(image)
            if "[img]" in content:
                content = content.replace("[img]", tag, 1)
            else:
                prefix += tag
        tagged.append({**message, "content": prefix + content})
    return tagged, images


async def fit(
    source: str,
    messages: Sequence[Message],
    limit: int,
    tokenize: Callable[[str], Awaitable[list[int]]],
    truncate: bool,
) -> tuple[str, list[bytes]]:
    """The prompt and its images; with ``truncate`` the oldest messages go until it has ``limit`` tokens.

    System messages and the last message always stay. Raises TemplateError.
    """
    start = 0
    if truncate and len(messages) > 1:
        for start in range(len(messages)):
            if start == len(messages) - 1:
                break
            system = [message for message in messages[:start] if message.get("role") == "system"]
            if len(await tokenize(render(source, [*system, *messages[start:]]))) <= limit:
                break
    system = [message for message in messages[:start] if message.get("role") == "system"]
    tagged, images = with_image_tags(messages[start:])
    return render(source, [*system, *tagged]), images


__all__ = ["CHATML", "CHATML_STOP", "PLAIN", "TemplateError", "compiled", "detect", "fill", "fit", "render"]
