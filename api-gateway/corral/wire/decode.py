"""Step 4's entry: any API's body becomes one upstream dialect, Ollama's native one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from corral.wire import anthropic, native, openai
from corral.wire.common import Caps, Decoded, PolicyOf, Responder

__all__ = ["DECODERS", "Decoded", "Responder"]

DECODERS: Final[dict[str, Callable[[bytes, str, PolicyOf, Caps], Decoded]]] = {
    "/api/generate": native.decode_generate,
    "/api/chat": native.decode_chat,
    "/api/embed": native.decode_embed,
    "/api/embeddings": native.decode_embeddings,
    "/api/show": native.decode_show,
    "/v1/chat/completions": openai.decode_chat,
    "/v1/completions": openai.decode_completion,
    "/v1/embeddings": openai.decode_embeddings,
    "/v1/messages": anthropic.decode,
}
"""By route: body, request id (part of the ids that OpenAI's and Anthropic's answers carry), policy and caps in, the
request out. Each raises ApiError: 400 naming the field."""
