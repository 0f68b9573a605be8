"""What a model is to the node's routes, whichever back end serves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from corral.node import clock
from corral.node.names import Name
from corral.node.prompt import PLAIN, TemplateError, compiled


@dataclass(frozen=True, slots=True)
class Model:
    """A model as its manifest describes it. ``size`` is in bytes, ``modified_ns`` since the epoch."""

    name: Name
    digest: str
    size: int
    modified_ns: int
    details: Mapping[str, Any]
    path: Path | None = None
    template: str = PLAIN
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    licenses: tuple[str, ...] = ()
    parent: str = ""
    context_length: int = 0
    embeds_only: bool = False

    @property
    def key(self) -> str:
        """Models of the same weights share a runner, as in Ollama."""
        return str(self.path) if self.path else self.digest

    @property
    def capabilities(self) -> list[str]:
        found = ["embedding" if self.embeds_only else "completion"]
        try:
            fields = compiled(self.template).fields
        except TemplateError:
            return found
        return [*found, *(c for c, name in (("tools", "tools"), ("insert", "suffix")) if name in fields)]

    def listing(self) -> dict[str, Any]:
        """The model's entry in /api/tags."""
        return {
            "name": self.name.short,
            "model": self.name.short,
            "modified_at": clock.rfc3339(self.modified_ns),
            "size": self.size,
            "digest": self.digest,
            "details": dict(self.details),
        }


class Store(Protocol):
    """Where a back end's models are kept. All methods raise NodeError with Ollama's text and status."""

    def find(self, text: str) -> Model | None:
        """The model that the name ``text`` means, None if there is none."""

    def all(self) -> list[Model]:
        """Every model, the last modified first."""

    def copy(self, source: Name, target: Name) -> bool:
        """Give a model a second name; False if there is no such model."""

    def delete(self, name: Name) -> bool:
        """Forget a name and what nothing else uses; False if there is no such model."""

    def information(self, model: Model, verbose: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """``model_info`` and ``tensors`` of /api/show."""


def newest_first(models: list[Model]) -> list[Model]:
    return sorted(models, key=lambda model: -(model.modified_ns // 1_000_000_000))
