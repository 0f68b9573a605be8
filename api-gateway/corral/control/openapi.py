"""The API's description: control's own routes, and those of the gateways as a caller at the edge sees them."""

from __future__ import annotations

import html
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse

from corral import __version__
from corral.control import refusals

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
        }
    },
}
_CHAT = {"type": "array", "items": {"type": "object"}}
_MESSAGES = {"minItems": 1, **_CHAT}
_TEXT = {"type": "string"}
_TEXTS = {"oneOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_OPTIONS = {"options": {"type": "object"}, "stream": {"type": "boolean"}}

# (method, path, API, what it does, fields of the body, required ones)
_INFERENCE: tuple[tuple[str, str, str, str, dict[str, Any], tuple[str, ...]], ...] = (
    ("post", "/api/generate", "Ollama", "Complete a prompt", {"prompt": _TEXT, **_OPTIONS}, ("model",)),
    ("post", "/api/chat", "Ollama", "Chat", {"messages": _CHAT, **_OPTIONS}, ("model",)),
    ("post", "/api/embed", "Ollama", "Embed texts", {"input": _TEXTS}, ("model",)),
    ("post", "/api/embeddings", "Ollama", "Embed one text", {"prompt": _TEXT}, ("model",)),
    ("post", "/api/show", "Ollama", "Describe a model", {}, ("model",)),
    ("get", "/api/tags", "Ollama", "Models that the key may use", {}, ()),
    ("get", "/api/ps", "Ollama", "Models in memory", {}, ()),
    ("get", "/api/version", "Ollama", "Ollama's version", {}, ()),
    (
        *("post", "/v1/chat/completions", "OpenAI", "Chat"),
        *({"messages": _MESSAGES, "stream": {"type": "boolean"}}, ("model", "messages")),
    ),
    (
        *("post", "/v1/completions", "OpenAI", "Complete a prompt"),
        *({"prompt": _TEXT, "stream": {"type": "boolean"}}, ("model",)),
    ),
    ("post", "/v1/embeddings", "OpenAI", "Embed texts", {"input": _TEXTS}, ("model", "input")),
    ("get", "/v1/models", "OpenAI", "Models that the key may use", {}, ()),
    ("get", "/v1/models/{id}", "OpenAI", "One model", {}, ()),
    (
        *("post", "/v1/messages", "Anthropic", "Chat"),
        *(
            {"messages": _MESSAGES, "max_tokens": {"type": "integer"}, "stream": {"type": "boolean"}},
            ("model", "messages", "max_tokens"),
        ),
    ),
    ("post", "/v1/responses", "OpenAI", "Not served by this version", {}, ()),
    ("post", "/v1/messages/count_tokens", "Anthropic", "Not served by this version", {}, ()),
    ("get", "/health", "Health", "Whether a gateway answers; no key", {}, ()),
    ("get", "/health/ready", "Health", "Whether a node is ready; no key", {}, ()),
)
_LATER = ("/v1/responses", "/v1/messages/count_tokens")
_REFUSALS = {
    "400": "Bad input; the message names the field.",
    "401": "No key, or one that does not work.",
    "403": "A key outside its networks, a model that is disabled, or a request that an operator cancelled.",
    "404": "No such model for this key.",
    "413": "The body is larger than `gateway.max_body`.",
    "429": "A limit of the key; `Retry-After` says when.",
    "500": "A fault of the gateway's own; its log has it under the request's id.",
    "501": "Not served by this version.",
    "502": "The node failed.",
    "503": "No node is free or ready; `Retry-After` says when.",
    "504": "No node answered in time.",
    "507": "No node has the memory for the model; the message says how much it lacks.",
}
_OF_ANY = ("400", "401", "403", "429", "500", "503")
_OF_A_MODEL = ("404", "413", "502", "504")


def install(app: FastAPI) -> None:
    """Serve the description at /openapi.json and a page of it at /docs, which needs nothing from elsewhere."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = build(app)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))


def build(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description of `app` and of the gateways' routes."""
    about = "The admin API of control, and the inference API of the gateways, behind one address."
    described = get_openapi(title="Corral", version=__version__, description=about, routes=app.routes)
    components = described.setdefault("components", {})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "bearerFormat": "crl_…"}}
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = _ERROR
    described["security"] = [{"key": []}]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            operation["responses"] |= {status: _refusal(text) for status, text in refusals.of(method, path).items()}
    for method, path, api, summary, fields, required in _INFERENCE:
        described["paths"].setdefault(path, {})[method] = _inference(path, api, summary, fields, required)
    return described


def _inference(path: str, api: str, summary: str, fields: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": [api],
        "summary": summary,
        "responses": {"200": {"description": f"As {api} answers, streamed if asked for."}},
    }
    if api == "Health":
        operation["security"] = []
        operation["responses"] = {"200": {"description": "Yes."}, "503": {"description": "No."}}
        return operation
    statuses = {*_OF_ANY}
    if required:
        statuses |= {*_OF_A_MODEL, *(() if path == "/api/show" else ("507",))}
    elif path in _LATER:
        statuses, operation["responses"] = {"501"}, {}
    elif "{id}" in path:
        statuses.add("404")
    operation["responses"] |= {status: {"description": _REFUSALS[status]} for status in sorted(statuses)}
    if "{id}" in path:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": _TEXT}]
    if required:
        schema = {"type": "object", "required": list(required), "properties": {"model": _TEXT, **fields}}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _refusal(description: str) -> dict[str, Any]:
    reference = {"schema": {"$ref": "#/components/schemas/Error"}}
    return {"description": description, "content": {"application/json": reference}}


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font:14px ui-monospace,monospace}b{display:inline-block;width:4.5rem}"
    "details{border-bottom:1px solid #8884;padding:.4rem 0}dt{margin-top:.4rem}"
)


def page(described: dict[str, Any]) -> str:
    """A page for people, without scripts: groups, routes, fields and answers."""
    groups: dict[str, list[str]] = {}
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            groups.setdefault(operation.get("tags", ["other"])[0], []).append(
                _route(described, method, path, operation)
            )
    listed = "".join(f"<h2>{html.escape(name)}</h2>{''.join(routes)}" for name, routes in groups.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Corral API</title><style>{_STYLE}</style>'
        f"<h1>Corral {html.escape(described['info']['version'])}</h1>"
        f"<p>{html.escape(described['info']['description'])} Send <code>Authorization: Bearer crl_…</code>. "
        f'The whole description: <a href="/openapi.json">openapi.json</a>.</p>{listed}</html>'
    )


def _route(described: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    lines = [
        _field(one["name"], one["in"], one.get("schema", {}), one.get("required", False), one.get("description", ""))
        for one in operation.get("parameters", ())
    ]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = _resolved(described, content.get("schema", {}))
    for name, one in schema.get("properties", {}).items():
        needed = name in schema.get("required", ())
        lines.append(_field(name, "body", one, needed, one.get("description", "")))
    answers = "".join(
        f"<dt><code>{status}</code> {html.escape(one.get('description', ''))}</dt>"
        for status, one in sorted(operation["responses"].items())
    )
    text = html.escape(operation.get("description", operation.get("summary", "")))
    return (
        f"<details><summary><b>{method.upper()}</b><code>{html.escape(path)}</code> "
        f"{html.escape(operation.get('summary', ''))}</summary>"
        f"<p>{text}</p><dl>{''.join(lines)}{answers}</dl></details>"
    )


def _resolved(described: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for one in (schema, *schema.get("anyOf", ())):
        if reference := one.get("$ref"):
            return dict(described["components"]["schemas"][reference.rpartition("/")[2]])
    return schema


def _field(name: str, place: str, schema: dict[str, Any], needed: bool, text: str) -> str:
    kind = schema.get("type") or "/".join(str(one.get("type", "")) for one in schema.get("anyOf", ()))
    note = f"{place}, {kind or 'any'}{', required' if needed else ''}"
    return f"<dt><code>{html.escape(name)}</code> ({html.escape(note)}) {html.escape(text)}</dt>"
