"""Model names as Ollama reads them: ``[host/][namespace/]model[:tag]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Ollama's defaults. They are part of its names, of its folder layout and of some of its error texts.
DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
MISSING = "!MISSING!"

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}\Z")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}\Z")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}\Z")


@dataclass(frozen=True, slots=True)
class Name:
    """A parsed name; parts that were left out hold Ollama's defaults. It may be invalid: see ``valid``."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def valid(self) -> bool:
        return bool(
            _HOST.match(self.host)
            and _NAMESPACE.match(self.namespace)
            and _PART.match(self.model)
            and _PART.match(self.tag)
        )

    @property
    def short(self) -> str:
        """The name as Ollama lists it: without the default host and namespace, always with the tag."""
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"

    @property
    def path(self) -> tuple[str, str, str, str]:
        """The four folder levels under ``manifests``."""
        return (self.host, self.namespace, self.model, self.tag)

    def __str__(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"


def parse(text: str) -> Name:
    """Parse a name; never raises, the result's ``valid`` says whether it can exist."""
    rest, tag = text, DEFAULT_TAG
    if rest.rfind(":") > rest.rfind("/"):
        rest, _, tag = rest.rpartition(":")
        tag = tag or MISSING
    head, slash, model = rest.rpartition("/")
    namespace, host = DEFAULT_NAMESPACE, DEFAULT_HOST
    if slash:
        head, slash, namespace = head.rpartition("/")
        namespace = namespace or MISSING
        if slash:
            host = head.split("://", 1)[-1] or MISSING
    return Name(host, namespace, model or MISSING, tag)
