"""haproxy.cfg: the edge before the gateways and the strict back ends before the nodes.

``python -m corral.config.haproxy > ../load-balancer/haproxy.cfg`` writes the default rendering anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from corral.config.haproxy_rules import (
    ERRORS,
    OF_BACK_END,
    PROXY_HEADER,
    answer,
    answer_in_form,
    for_hosts,
    for_origins,
    in_form_of_api,
    shared_with,
    well_formed,
)
from corral.config.settings import EdgeSettings
from corral.config.values import base_url, loopback

NODE_HEADER = "X-Corral-Node"

# Each pool of idle connections closes before its peer does: HAProxy's own before a gateway's 75 s (a node keeps
# them for good), and the gateway's before HAProxy's front end.
KEEP_ALIVE = "60s"
POOL_PURGE = "20s"

# HTTP/1.1 alone (alpn, below): its requests are what the rules against smuggling were tested with.
_TLS = [
    "    # TLS 1.3, and of 1.2 the suites with forward secrecy and authenticated encryption.",
    "    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets",
    "    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256",
    "    ssl-default-bind-ciphers ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL:!SHA1:!AESCCM",
]

# A reload would close a connection under a request that is on its way: many a caller takes that for an error.
_RELOADED = (
    "    # At a reload the old worker takes one more request of a caller, and says in its answer that it closes.",
    "    option idle-close-on-response",
)

# What the front end for other programs lets through: by method, exact paths.
_INFERENCE = (
    "/api/generate /api/chat /api/embed /api/embeddings /api/show"
    " /v1/chat/completions /v1/completions /v1/embeddings /v1/messages"
)
_READS = "/ /api/tags /api/ps /api/version /v1/models"


@dataclass(frozen=True)
class HaproxyPlan:
    """Who listens where. ``nodes`` are (name, URL); ``max_duration`` is the longest request in seconds.

    ``ca_file`` has the certificates that an https node's is checked against. With a ``certificate`` (a PEM file of
    chain and key) the edge speaks TLS at ``tls_port`` too; with ``ollama`` (host, port) there is a front end for
    programs that know nothing of Corral, which gives nothing to the ``resting`` nodes. ``hosts`` are the names that
    the edge is called by, beside local ones (``*``: any); ``origins`` the pages that may read its answers.
    """

    edge_host: str
    edge_port: int
    nodes_host: str
    nodes_port: int
    stats_host: str
    stats_port: int
    stats_socket: str
    gateways: list[tuple[str, str, int]]
    control: tuple[str, int]
    nodes: list[tuple[str, str]]
    max_duration: float
    ca_file: str = "@system-ca"
    tls_port: int = 8443
    certificate: str | None = None
    ollama: tuple[str, int] | None = None
    resting: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


DEFAULT = HaproxyPlan(
    edge_host="127.0.0.1",
    edge_port=8080,
    nodes_host="127.0.0.1",
    nodes_port=8082,
    stats_host="127.0.0.1",
    stats_port=8404,
    stats_socket="/run/corral/haproxy.sock",
    gateways=[("gateway-1", "127.0.0.1", 8081)],
    control=("127.0.0.1", 8090),
    nodes=[("node-1", "http://127.0.0.1:11435"), ("node-2", "http://127.0.0.1:11436")],
    max_duration=1800.0,
)
"""What load-balancer/haproxy.cfg shows."""


def edge_hosts(edge: EdgeSettings) -> tuple[str, ...]:
    """The plan's ``hosts``: where nobody named any, local names on loopback, and any beyond."""
    return edge.hosts or _names_at(edge.host)


def _names_at(host: str) -> tuple[str, ...]:
    # Of an address that this machine alone reaches, local names; of others nobody knows the names here.
    return () if loopback(host) else ("*",)


def render(plan: HaproxyPlan) -> str:
    """The whole haproxy.cfg of ``plan``. ValueError for a name or an address that cannot stand in it."""
    longest = f"{math.ceil(plan.max_duration) + 60}s"
    return "\n".join(
        [
            *_global(plan),
            *_defaults(longest),
            *(_resolvers() if _any_by_name(plan) else []),
            *_statistics(plan),
            *_edge(plan),
            *_gateways(plan),
            *_control(plan),
            *_node_front_end(plan),
            *(line for name, url in plan.nodes for line in _node(name, url, plan.ca_file)),
            *(_ollama(plan, *plan.ollama) if plan.ollama else []),
        ]
    )


def _global(plan: HaproxyPlan) -> list[str]:
    return [
        "# Rendered by Corral from corral.yaml: changes made here are lost.",
        "global",
        "    log stderr format raw local0 notice",
        f"    stats socket {_path(plan.stats_socket)} mode 600 level admin expose-fd listeners",
        "    stats timeout 30s",
        "    # Reloads: the old worker serves its streams to their end, but not for ever.",
        f"    hard-stop-after {math.ceil(plan.max_duration) + 120}s",
        "    # Connections follow from this, or from the user's own limit where that is lower.",
        "    fd-hard-limit 40000",
        "    # What fits one buffer can be replayed.",
        "    tune.bufsize 65536",
        *(_TLS if plan.certificate else []),
        "",
    ]


def _defaults(longest: str) -> list[str]:
    lines = [
        "defaults",
        "    mode http",
        "    log global",
        "    option dontlognull",
        "    # Small chunks leave at once; without it a token waits up to 208 ms for the next one.",
        "    option http-no-delay",
        "    # A client that left frees its place upstream.",
        "    option abortonclose",
        "    timeout connect 2s",
        "    timeout http-request 10s",
        f"    timeout http-keep-alive {KEEP_ALIVE}",
        f"    timeout client {longest}",
        f"    timeout server {longest}",
        "    timeout queue 2s",
        "    timeout check 2s",
        "    retries 0",
        "    # Every answer that HAProxy makes itself is marked, so that nobody takes it for a server's. (But for what",
        "    # is no HTTP at all: that 400 is made before a rule is looked at.)",
    ]
    return [*lines, *(f"    {_error(status)}" for status in ERRORS), ""]


def _error(status: int) -> str:
    return f"http-error {answer(status)}"


def _statistics(plan: HaproxyPlan) -> list[str]:
    return [
        "frontend stats",
        f"    bind {_address(plan.stats_host, plan.stats_port)}",
        *for_hosts(_names_at(plan.stats_host)),
        "    timeout client 30s",
        "    http-request use-service prometheus-exporter if { path /metrics }",
        "    stats enable",
        "    stats uri /",
        "    stats refresh 10s",
        "    stats show-legends",
        "",
    ]


def _edge(plan: HaproxyPlan) -> list[str]:
    return [
        "frontend edge",
        f"    bind {_address(plan.edge_host, plan.edge_port)}",
        *_tls_bind(plan),
        "    # The whole of a small request is here before a gateway sees it: slow callers cost no gateway, and",
        "    # a replay has what it needs.",
        "    option http-buffer-request",
        *_RELOADED,
        *well_formed(),
        *for_hosts(plan.hosts),
        *shared_with(plan.origins, local=not plan.hosts),
        "    # What only Corral says is not taken from a caller; its deadline is its own.",
        "    http-request set-var(txn.deadline) req.fhdr(X-Corral-Deadline-Ms)",
        "    http-request del-header x-corral- -m beg",
        "    http-request set-header X-Corral-Deadline-Ms %[var(txn.deadline)] if { var(txn.deadline) -m found }",
        "    http-request del-header x-forwarded- -m beg",
        "    http-request del-header forwarded",
        "    http-request del-header x-real-ip",
        "    http-request set-header X-Forwarded-For %[src]",
        *(["    http-request set-header X-Forwarded-Proto https if { ssl_fc }"] if plan.certificate else []),
        "    # One id from here to the audit record; a replay towards another gateway has it as well. It is a UUIDv7",
        "    # (RFC 9562, section 5.7), in the order of time: the indexes of millions of records grow at one end.",
        "    http-request set-var(txn.ms) date(0,ms),hex,lower",
        "    http-request set-header X-Corral-Edge-ID "
        "%[var(txn.ms),bytes(4,8)]-%[var(txn.ms),bytes(12,4)]-7%[uuid(),bytes(15)]",
        "    # The caller is told his own, where it is well formed and given once, else that one.",
        "    acl id_fit req.hdr(X-Request-ID) -m reg ^[A-Za-z0-9._-]{1,64}$",
        "    acl id_once req.hdr_cnt(X-Request-ID) eq 1",
        "    acl id_key req.hdr(X-Request-ID) -m sub crl_",
        "    http-request set-header X-Request-ID %[req.hdr(X-Corral-Edge-ID)] unless id_fit id_once !id_key",
        "    http-request return " + answer(404) + " if { path,url_dec,lower -m reg ^/+(metrics|internal)(/|$) }",
        "    acl to_control path /admin /docs /openapi.json",
        "    acl to_control path_beg /admin/ /docs/",
        *in_form_of_api(),
        "    use_backend control if to_control",
        "    default_backend gateways",
        "",
    ]


def _tls_bind(plan: HaproxyPlan) -> list[str]:
    if not plan.certificate:
        return []
    return [f"    bind {_address(plan.edge_host, plan.tls_port)} ssl crt {_path(plan.certificate)} alpn http/1.1"]


def _gateways(plan: HaproxyPlan) -> list[str]:
    lines = [
        "backend gateways",
        "    balance leastconn",
        "    # The header is for a gateway to tell these checks from who asks through this proxy.",
        "    option httpchk",
        "    http-check send meth GET uri /health hdr X-Corral-Check edge",
        "    http-check expect status 200",
        "    # One that alone has lost the store says 404: nobody new is sent there.",
        "    http-check disable-on-404",
        "    # Once more, elsewhere, and only when the first gateway cannot have done anything with it.",
        "    retries 1",
        "    option redispatch 1",
        "    retry-on conn-failure empty-response",
        "    http-reuse safe",
        f"    http-response del-header {PROXY_HEADER}",
        *(f"    http-error {answer_in_form(status)}" for status in OF_BACK_END),
        "    default-server check inter 1s fastinter 250ms downinter 250ms fall 2 rise 1"
        f" pool-purge-delay {POOL_PURGE}",
    ]
    servers = [
        f"    server {_word(name)} {_address(host, port)}{_resolved(host)}" for name, host, port in plan.gateways
    ]
    last = [f"    use-server {_word(name)} if {{ nbsrv(gateways) eq 0 }}" for name, _, _ in plan.gateways]
    said = "    # Where none is left but gateways that are sent nobody, the first that is not down serves."
    return [*lines, *servers, said, *last, ""]


def _control(plan: HaproxyPlan) -> list[str]:
    return [
        "backend control",
        "    option httpchk GET /health",
        "    http-check expect status 200",
        "    http-reuse safe",
        f"    server control {_address(*plan.control)} check inter 1s fastinter 250ms fall 2 rise 1"
        f" pool-purge-delay {POOL_PURGE}{_resolved(plan.control[0])}",
        "",
    ]


def _node_front_end(plan: HaproxyPlan) -> list[str]:
    known = [
        f"    use_backend node_{_word(name)} if {{ req.fhdr({NODE_HEADER}) -m str {name} }}" for name, _ in plan.nodes
    ]
    return [
        "# The gateway names the node and owns its deadlines and retries; here nothing is tried twice.",
        "frontend nodes",
        f"    bind {_address(plan.nodes_host, plan.nodes_port)}",
        *for_hosts(_names_at(plan.nodes_host)),
        *known,
        "    default_backend no_such_node",
        "",
        "backend no_such_node",
        # Named otherwise, so that a gateway on a connection to an old worker asks the new one.
        "    http-request return " + answer(503, "no-such-node"),
        "",
    ]


def _node(name: str, url: str, ca_file: str) -> list[str]:
    return [
        f"backend node_{_word(name)}",
        "    option httpchk GET /api/version",
        "    http-check expect status 200",
        f"    http-request set-header Host {urlsplit(base_url(url)).netloc}",
        f"    http-request del-header {NODE_HEADER}",
        f"    http-response del-header {PROXY_HEADER}",
        "    http-reuse safe",
        _node_server(name, url, ca_file),
        "",
    ]


def _node_server(name: str, url: str, ca_file: str) -> str:
    parts = urlsplit(base_url(url))
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    options = "check inter 1s fastinter 500ms fall 2 rise 2 pool-purge-delay " + POOL_PURGE
    if parts.scheme == "https":
        options += f" ssl verify required ca-file {_path(ca_file)} sni str({host}) check-sni {host}"
    return f"    server {_word(name)} {_address(host, port)} {options}{_resolved(host)}"


def _ollama(plan: HaproxyPlan, host: str, port: int) -> list[str]:
    return [
        "# For programs that know nothing of Corral: no key is asked, so this is for loopback or an internal network.",
        "# It balances over the nodes by itself, apart from what the gateways send them.",
        "frontend ollama",
        f"    bind {_address(host, port)}",
        "    option http-buffer-request",
        *_RELOADED,
        *well_formed(),
        "    # Nor from a page of the web: a browser that was told another name, or sends what it need not ask for.",
        *for_hosts(tuple(name for name in plan.hosts if name != "*")),
        *for_origins(plan.origins, local=True),
        "    http-request del-header x-corral- -m beg",
        f"    acl inference path {_INFERENCE}",
        f"    acl reads path {_READS}",
        "    acl reads path_beg /v1/models/",
        "    acl fit path -m reg ^/[A-Za-z0-9._:/-]*$",
        "    http-request return " + answer(404) + " unless METH_POST inference or METH_GET reads fit",
        "    default_backend ollama",
        "",
        "backend ollama",
        "    balance leastconn",
        "    option httpchk GET /api/version",
        "    http-check expect status 200",
        "    http-request set-header Host localhost",
        "    # Failover while nothing can have been done with the request: each node is asked at most once more.",
        "    retries 1",
        "    option redispatch 1",
        "    retry-on conn-failure empty-response",
        "    http-reuse safe",
        *(
            _node_server(name, url, plan.ca_file) + (" disabled" if name in plan.resting else "")
            for name, url in plan.nodes
        ),
        "",
    ]


def _resolvers() -> list[str]:
    return ["resolvers system", "    parse-resolv-conf", "    hold valid 5s", ""]


def _any_by_name(plan: HaproxyPlan) -> bool:
    hosts = [plan.control[0], *(host for _, host, _ in plan.gateways)]
    return any(map(_by_name, [*hosts, *(urlsplit(url).hostname or "" for _, url in plan.nodes)]))


def _resolved(host: str) -> str:
    """How a server's name is looked up, again and again; "" for an address."""
    return " resolvers system init-addr last,libc,none" if _by_name(host) else ""


def _by_name(host: str) -> bool:
    return ":" not in host and not host.replace(".", "").isdigit()


def _address(host: str, port: int) -> str:
    base_url(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def _word(name: str) -> str:
    if not name or not all(letter.isascii() and (letter.isalnum() or letter in "-_.") for letter in name):
        raise ValueError(f"{name!r} cannot stand in haproxy.cfg")
    return name


def _path(path: str) -> str:
    """A path as one word of the configuration."""
    if any(letter in path for letter in "\n\r\0"):
        raise ValueError(f"{path!r} cannot stand in haproxy.cfg")
    return "".join("\\" + letter if letter in " #\"'\\$" else letter for letter in path)


if __name__ == "__main__":
    print(render(DEFAULT), end="")
