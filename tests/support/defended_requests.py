"""Rows 1 to 12 of docs/security.md: what of requests, callers and the supply chain is defended against."""

from __future__ import annotations

from support.defended import Defence

ADMIN = "tests/integration/test_matrix_admin.py"
CATALOGUE = "tests/unit/test_catalogue.py"
COMPOSE = "tests/unit/test_compose_files.py"
EDGE = "tests/integration/test_edge_callers.py"
GATEWAY = "tests/integration/test_matrix_gateway.py"
LIMITS = "tests/unit/test_wire_limits.py"
LISTEN = "tests/unit/test_listen.py"
PULLS = "tests/integration/test_pulls.py"
SLOW = "tests/faults/test_slow_callers.py::test_large_bodies_that_never_end"
SMUGGLING = "tests/integration/test_smuggling.py"
CHANGES = "tests/integration/test_key_changes.py"
TENANTS = "tests/integration/test_tenants.py"
UPSTREAMS = "tests/integration/test_upstreams_named.py"

DEFENCES = (
    Defence(
        1,
        "gateway/route.py",
        "_ROUTES.get((method, target))",
        '_ROUTES.get((method, target.partition(b"?")[0].rstrip(b"/")))',
        "tests/unit/test_route.py " + GATEWAY,
    ),
    Defence(
        1,
        "gateway/route.py",
        "_ROUTES.get((method, target))",
        "next((one for (verb, path), one in _ROUTES.items() if verb == method and target.endswith(path)), None)",
        "tests/integration/test_nothing_gets_in.py",
    ),
    Defence(
        1,
        "gateway/route.py",
        '        ("POST", "/api/show", "native", Kind.RELAY),\n',
        '        ("POST", "/api/show", "native", Kind.RELAY),\n        ("POST", "/api/pull", "native", Kind.RELAY),\n',
        "tests/conformance/test_gateway.py::test_management_is_not_there",
    ),
    Defence(
        1,
        "control/auth.py",
        'return bool(OPERATOR.fullmatch(path) or (method == "GET" and OPERATOR_READS.fullmatch(path)))',
        "return True",
        ADMIN,
    ),
    Defence(1, "control/auth.py", 'if not plain(scope.get("raw_path") or path.encode()):', "if False:", ADMIN),
    Defence(
        2,
        "fleet/catalogue.py",
        "return len(parts) <= 2 or parts[0]",
        "return bool(parts) or parts[0]",
        PULLS + " " + CATALOGUE,
    ),
    Defence(2, "control/modelops.py", "if not permitted(name", "if False and not permitted(name", PULLS),
    Defence(2, "docker-compose.yml", "internal: ${CORRAL_NODES_INTERNAL:-false}", "internal: false", COMPOSE),
    Defence(
        2, "docker-compose.yml", 'inhibit_ipv4: "${CORRAL_NODES_INTERNAL:-false}"', 'inhibit_ipv4: "false"', COMPOSE
    ),
    Defence(3, "wire/common.py", "for name in UPSTREAM_FIELDS]", "for name in ()]", LIMITS + " " + UPSTREAMS),
    Defence(3, "wire/native.py", 'if ":" in image[:64]:', "if False:", LIMITS),
    Defence(3, "wire/openai.py", 'raise bad_request("invalid image input", "messages.content")', "return url", LIMITS),
    Defence(3, "wire/anthropic.py", 'if kind != "base64" or not isinstance(data, str):', "if False:", LIMITS),
    Defence(4, "control/auth.py", "if not headers.host_fits():", "if False:", ADMIN),
    Defence(
        4,
        "gateway/exchange.py",
        "resolve(self.method, self.target)",
        'resolve(self.method, b"/" + (self.headers.get(b"host", b"") + self.target).split(b"?")[0].partition(b"/")[2])',
        GATEWAY + "::test_the_host_header_opens_nothing",
    ),
    Defence(4, "config/haproxy_rules.py", 'f"{refuse} unless host_fit or hostless old",', "", EDGE),
    Defence(
        5,
        "store/keys.py",
        'if match is None or f"{zlib.crc32(text[:-8].encode()):08x}" != match[2]:',
        "if match is None:",
        "tests/integration/test_gateway_keys.py",
    ),
    Defence(
        5, "control/auth.py", "key_id = keytext.parse(text)", "key_id = keytext.parse(text) or text or None", ADMIN
    ),
    Defence(6, "gateway/authenticate.py", "if other is not None and other != found:", "if False:", GATEWAY),
    Defence(
        6,
        "control/auth.py",
        "if bearer and other and found != other:",
        "if False:",
        "tests/integration/test_control_refusals.py",
    ),
    Defence(6, "control/scope.py", "if child.expires > maker.expires:", "if False:", "tests/unit/test_scope.py"),
    Defence(
        6, "control/scope.py", "if not admin and child.weight > maker.weight:", "if False:", "tests/unit/test_scope.py"
    ),
    Defence(
        6,
        "control/keys.py",
        "who.key_id\n    _no_more(connection, who, row, defaults)\n",
        "who.key_id\n",
        TENANTS,
    ),
    Defence(6, "control/keys.py", "_narrow(connection, who, after, defaults)", "[]", CHANGES),
    Defence(
        7,
        "control/keys.py",
        "return true() if who.bound is None else keys.c.tenant == who.bound",
        "return true()",
        TENANTS,
    ),
    Defence(7, "control/audit.py", "ids, caller.bound, model", "ids, None, model", TENANTS),
    Defence(
        8, "scripts/setup", "install --require-hashes --no-deps", "install --no-deps", "tests/unit/test_repository.py"
    ),
    Defence(8, "docker-compose.yml", "  read_only: true\n", "", COMPOSE),
    Defence(8, "docker-compose.yml", "valkey/valkey:8.1.8", "valkey/valkey:latest", COMPOSE),
    Defence(9, "gateway/listen.py", "if name in _ONCE:", "if False:", SMUGGLING),
    Defence(
        9,
        "wire/http1.py",
        'if headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":',
        "if False:",
        SMUGGLING,
    ),
    Defence(
        9,
        "config/haproxy_rules.py",
        'f"{refuse} if coded !chunked_alone or coded old",',
        "",
        "tests/integration/test_stack_haproxy.py",
    ),
    Defence(
        10,
        "wire/http1.py",
        'if headers.get(b"content-encoding", b"identity").lower() != b"identity":',
        "if False:",
        SMUGGLING,
    ),
    Defence(10, "wire/native.py", "if images > caps.images:", "if False:", LIMITS),
    Defence(10, "wire/native.py", "if len(messages) > caps.messages:", "if False:", LIMITS),
    Defence(10, "wire/native.py", "if body.tools and len(body.tools) > caps.tools:", "if False:", LIMITS),
    Defence(10, "wire/native.py", "if isinstance(given, list) and len(given) > caps.inputs:", "if False:", LIMITS),
    Defence(10, "wire/options.py", "if len(value) > stop_max:", "if False:", LIMITS),
    Defence(10, "wire/common.py", "if depth > most:", "if False:", LIMITS),
    Defence(
        10,
        "gateway/listen.py",
        "if length is not None and len(length) >= self.gateway.max_body_digits and int(length)",
        "if False and int(length or 0)",
        LISTEN,
    ),
    Defence(10, "gateway/listen.py", "if size > self.gateway.max_body:", "if False:", LISTEN),
    Defence(10, "gateway/listen.py", "if self._head_bytes > HEADER_BYTES:", "if False:", LISTEN),
    Defence(10, "gateway/listen.py", "if self._head_bytes + self._fed > HEADER_BYTES:", "if False:", LISTEN),
    Defence(10, "gateway/listen.py", "if len(headers) > HEADER_COUNT:", "if False:", LISTEN),
    Defence(
        11,
        "gateway/listen.py",
        "if gateway.unfinished > BODIES_MAX and gateway.unfinished > gateway.max_body:",
        "if False:",
        LISTEN + " " + SLOW,
    ),
    Defence(11, "gateway/listen.py", "if self._body_bytes > BODY_KNOWN and not known:", "if False:", LISTEN),
    Defence(
        11,
        "gateway/listen.py",
        "self._body_since + BODY_DEADLINE",
        "time.monotonic() + BODY_DEADLINE",
        LISTEN,
    ),
    Defence(11, "gateway/listen.py", "if not self._head_bytes:", "if True:", LISTEN),
    Defence(
        11,
        "gateway/listen.py",
        "self.stalled_since and now - self.stalled_since > WRITE_DEADLINE",
        "False",
        LISTEN,
    ),
    Defence(
        12,
        "config/haproxy.py",
        """        "    http-request del-header x-forwarded- -m beg",
        "    http-request del-header forwarded",
        "    http-request del-header x-real-ip",
        "    http-request set-header X-Forwarded-For %[src]",
""",
        "",
        EDGE,
    ),
    Defence(
        12, "gateway/server.py", "return any(address in network for network in self._trusted)", "return True", EDGE
    ),
    Defence(12, "config/haproxy_rules.py", '        "    option http-restrict-req-hdr-names reject",\n', "", EDGE),
)
