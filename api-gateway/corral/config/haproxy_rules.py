"""What HAProxy refuses by itself: its own answers, and the rules of its front ends."""

from __future__ import annotations

import json

PROXY_HEADER = "X-Corral-Proxy"

ERRORS = {
    400: ("bad_request", "The request is not valid HTTP."),
    401: ("unauthorized", "A key is needed."),
    403: ("forbidden", "This is not allowed."),
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This method is not allowed here."),
    408: ("request_timeout", "The request did not arrive in time."),
    410: ("gone", "There is nothing at this address any more."),
    413: ("request_too_large", "The request is too large."),
    421: ("misdirected", "This is not the server for that."),
    422: ("unprocessable", "The request cannot be processed."),
    425: ("too_early", "The request came too early."),
    429: ("too_many_requests", "There are too many requests."),
    500: ("proxy_error", "The proxy failed."),
    501: ("not_implemented", "The proxy does not support this."),
    502: ("bad_gateway", "The answer was not valid HTTP."),
    503: ("unavailable", "No server is available to take the request."),
    504: ("gateway_timeout", "The server did not answer in time."),
}
"""Status → code and message of an answer that HAProxy makes."""

OF_BACK_END = (500, 502, 503, 504)
"""What HAProxy answers where a request was well formed, and no server could take it."""

_ORIGIN = (403, ("forbidden", "This origin is not allowed: see edge.origins in corral.yaml."))
_HOST = (421, ("misdirected", "This host name is not served here: see edge.hosts in corral.yaml."))
_LOCAL = "127.0.0.1 localhost [::1]"
# What no public name can be: an address, a name without a dot, or one under a top level that is not delegated.
_LOCAL_NAMES = r"^([0-9.]+|\[[0-9a-f:.]+\]|[a-z0-9_-]+|([a-z0-9_-]+\.)+(localhost|local|internal))$"
_LOCAL_ORIGINS = r"^[a-z-]+://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?$"


def answer(status: int, proxy: str = "haproxy", said: tuple[str, str] | None = None) -> str:
    """The rest of an `http-error` or `return` that answers with a status; `said` is its code and message."""
    code, message = said or ERRORS[status]
    body = json.dumps({"error": {"code": code, "message": message}}, separators=(",", ":"))
    extra = "hdr Retry-After %[rand(2),add(1)] " if status == 503 else ""
    return f"status {status} content-type application/json hdr {PROXY_HEADER} {proxy} {extra}string '{body}'"


def in_form_of_api() -> list[str]:
    """What `answer_in_form` needs to be in the form of the API that was called, Ollama's, OpenAI's or Anthropic's."""
    forms = (
        ("", '"', '"'),
        (" if { path_beg /v1/ }", '{"type":"api_error","param":null,"code":null,"message":"', '"}'),
        (" if { path /v1/messages }", '{"type":"api_error","message":"', '"},"type":"error"'),
    )
    return [
        "    # An error that is made here is in the form of the API that was called.",
        *(
            f"    http-request set-var-fmt(txn.{name}) '{text}'{condition}"
            for condition, before, behind in forms
            for name, text in (("before", before), ("behind", behind))
        ),
    ]


def answer_in_form(status: int) -> str:
    """The rest of an `http-error` of a back end whose front end has the rules of `in_form_of_api`."""
    start, _, _ = answer(status).partition(" string ")
    body = '{"error":%[var(txn.before)]' + ERRORS[status][1] + "%[var(txn.behind)]}"
    return f"{start} lf-string '{body}'"


def well_formed() -> list[str]:
    """Nothing that two servers could read differently. The parser refuses most of it before any rule.

    What it reads in one way only and writes anew (a folded line, a bare LF, a length beside chunks) is one request to
    whoever comes next.
    """
    refuse = "    http-request return " + answer(400)
    return [
        "    # HTTP/1.1 and 1.0 alone, in origin form, for one host, with a body of one framing.",
        "    option disable-h2-upgrade",
        "    option http-restrict-req-hdr-names reject",
        "    acl origin_form url_beg /",
        "    acl http1 req.ver 1.1 1.0",
        r"    acl host_fit req.hdr(host) -m reg ^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?$",
        "    acl hostless req.hdr_cnt(host) eq 0",
        "    acl old req.ver 1.0",
        "    acl coded req.fhdr(transfer-encoding) -m found",
        "    acl chunked_alone req.fhdr(transfer-encoding) -i -m str chunked",
        f"{refuse} unless origin_form http1",
        f"{refuse} unless host_fit or hostless old",
        f"{refuse} if coded !chunked_alone or coded old",
    ]


def for_hosts(names: tuple[str, ...]) -> list[str]:
    """Only requests for these hosts or for a local name: a page whose name was rebound to here has another. ``*``: any.

    A name that begins with ``*.`` stands for all names under the rest.
    """
    if "*" in names:
        return []
    exact = [name for name in names if not name.startswith("*.")]
    under = [name[1:] for name in names if name.startswith("*.")]
    known = "    acl host_known req.hdr(host),host_only,lower -m"
    return [
        "    # No name of somebody else that leads here (DNS rebinding).",
        f"{known} str {_LOCAL}",
        *([f"{known} str {' '.join(exact)}"] if exact else []),
        *([f"{known} end {' '.join(under)}"] if under else []),
        f"{known} reg {_LOCAL_NAMES}",
        f"    http-request return {answer(*_said(_HOST))} unless host_known or {{ req.hdr_cnt(host) eq 0 }}",
    ]


def for_origins(origins: tuple[str, ...], local: bool = False) -> list[str]:
    """Only pages of these origins, or of the address itself; ``local``: those of this machine too."""
    return [
        '    http-request set-var(txn.site) req.hdr(origin),regsub("^[a-z-]+://","")',
        "    acl origin_sent req.hdr_cnt(origin) gt 0",
        "    acl origin_once req.hdr_cnt(origin) eq 1",
        "    acl origin_own req.hdr(host),strcmp(txn.site) eq 0",
        *([f"    acl origin_own req.hdr(origin) -m reg {_LOCAL_ORIGINS}"] if local else []),
        *([f"    acl origin_known req.hdr(origin) -m str {' '.join(origins)}"] if origins else []),
        f"    http-request return {answer(*_said(_ORIGIN))} if origin_sent !origin_once",
        f"    http-request return {answer(*_said(_ORIGIN))} if origin_sent !origin_own"
        + (" !origin_known" if origins else ""),
    ]


def shared_with(origins: tuple[str, ...], local: bool = False) -> list[str]:
    """CORS for these origins; without any it is off: no page elsewhere may read an answer.

    ``local``: nor may one that is not of this machine ask anything, where no origin is named.
    """
    if not origins:
        return ["    # No page of the web that posts to a local address.", *for_origins((), local)] if local else []
    allow = "Access-Control-Allow"
    return [
        "    # CORS, for the pages that corral.yaml names.",
        *for_origins(origins),
        "    acl preflight req.hdr(access-control-request-method) -m found",
        f"    http-request return status 204 hdr {allow}-Origin %[req.hdr(origin)] hdr {allow}-Methods GET,POST"
        f" hdr {allow}-Headers %[req.fhdr(access-control-request-headers)] hdr Access-Control-Max-Age 600"
        " hdr Vary Origin if METH_OPTIONS origin_known preflight",
        "    http-request set-var(txn.origin) req.hdr(origin) if origin_known",
        f"    http-response set-header {allow}-Origin %[var(txn.origin)] if {{ var(txn.origin) -m found }}",
        "    http-response set-header Access-Control-Expose-Headers X-Request-ID,Retry-After"
        " if { var(txn.origin) -m found }",
        "    http-response add-header Vary Origin",
    ]


def _said(known: tuple[int, tuple[str, str]]) -> tuple[int, str, tuple[str, str]]:
    return known[0], "haproxy", known[1]
