"""Step 4's entry: any API's body becomes one upstream dialect, Ollama's native one."""

from __future__ import annotations

from corral.wire import anthropic, native, openai
from corral.wire.common import Decoded, PolicyOf, Responder

__all__ = ["Decoded", "Responder", "decode"]


def decode(route: str, raw: bytes, request_id: str, policy_of: PolicyOf) -> Decoded:
    """The request of a relayed route.

    `request_id` becomes part of the ids that OpenAI's and Anthropic's answers carry.

    Raises:
        ApiError: 400 naming the field.
    """
    if route.startswith("/api/"):
        return native.decode(route, raw, policy_of)
    if route == "/v1/messages":
        return anthropic.decode(raw, request_id, policy_of)
    return openai.decode(route, raw, request_id, policy_of)
