"""What stands for each defence of docs/security.md in the code, and the tests that fail when it is taken out."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "api-gateway/corral/"


@dataclass(frozen=True)
class Defence:
    """``there`` stands once in ``file`` (in the package, or in the repository); ``gone`` is what is left without it."""

    row: int
    file: str
    there: str
    gone: str
    tests: str

    @property
    def path(self) -> str:
        """The file's path in the repository."""
        return self.file if (ROOT / self.file).exists() else PACKAGE + self.file


ADMIN = "tests/integration/test_matrix_admin.py"
AWAY = "tests/faults/test_keys_away.py"
BUDGETS = "tests/unit/test_limits.py"
COMPOSE = "tests/unit/test_compose_files.py"
EDGE = "tests/integration/test_edge_callers.py"
GATEWAY = "tests/integration/test_matrix_gateway.py"
KEYS = "tests/integration/test_gateway_keys.py"
LIMITS = "tests/unit/test_wire_limits.py"
USED = "tests/unit/test_limits_used.py"
LISTEN = "tests/unit/test_listen.py"
PULLS = "tests/integration/test_pulls.py"
SMUGGLING = "tests/integration/test_smuggling.py"
CHANGES = "tests/integration/test_key_changes.py"
TENANTS = "tests/integration/test_tenants.py"
VERIFY = "tests/unit/test_store_verify.py"

KEPT = "    body.truncate = False\n    body.keep_alive = KEEP_ALIVE\n"

DEFENCES = (
    Defence(
        1,
        "gateway/route.py",
        "_ROUTES.get((method, target))",
        '_ROUTES.get((method, target.partition(b"?")[0].rstrip(b"/")))',
        "tests/unit/test_route.py",
    ),
    Defence(
        1,
        "control/auth.py",
        'return bool(OPERATOR.fullmatch(path) or (method == "GET" and OPERATOR_READS.fullmatch(path)))',
        "return True",
        ADMIN,
    ),
    Defence(1, "control/auth.py", 'if not plain(scope.get("raw_path") or path.encode()):', "if False:", ADMIN),
    Defence(2, "fleet/catalogue.py", "return len(parts) <= 2 or parts[0]", "return bool(parts) or parts[0]", PULLS),
    Defence(2, "control/modelops.py", "if not permitted(name", "if False and not permitted(name", PULLS),
    Defence(2, "docker-compose.yml", "internal: ${CORRAL_NODES_INTERNAL:-false}", "internal: false", COMPOSE),
    Defence(
        2, "docker-compose.yml", 'inhibit_ipv4: "${CORRAL_NODES_INTERNAL:-false}"', 'inhibit_ipv4: "false"', COMPOSE
    ),
    Defence(3, "wire/common.py", "for name in UPSTREAM_FIELDS]", "for name in ()]", LIMITS),
    Defence(3, "wire/native.py", 'if ":" in image[:64]:', "if False:", LIMITS),
    Defence(3, "wire/openai.py", 'raise bad_request("invalid image input", "messages.content")', "return url", LIMITS),
    Defence(3, "wire/anthropic.py", 'if kind != "base64" or not isinstance(data, str):', "if False:", LIMITS),
    Defence(4, "control/auth.py", "if not headers.host_fits():", "if False:", ADMIN),
    Defence(4, "config/haproxy_rules.py", 'f"{refuse} unless host_fit or hostless old",', "", EDGE),
    Defence(
        5,
        "store/keys.py",
        'if match is None or f"{zlib.crc32(text[:-8].encode()):08x}" != match[2]:',
        "if match is None:",
        "tests/integration/test_gateway_keys.py " + ADMIN,
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
    Defence(8, "docker-compose.yml", "valkey/valkey:8.1.8", "valkey/valkey:latest", COMPOSE),
    Defence(9, "gateway/listen.py", "if name in _ONCE:", "if False:", SMUGGLING + " " + GATEWAY),
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
        LISTEN,
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
    Defence(13, "wire/options.py", "if name in RELOADING:", "if False:", LIMITS),
    Defence(13, "wire/options.py", "checked.update(policy.pinned)", "pass", LIMITS),
    Defence(13, "wire/options.py", "if name in policy.refused:", "if False:", LIMITS),
    Defence(13, "wire/options.py", "if policy.clamped:", "if False:", LIMITS),
    Defence(13, "wire/options.py", "if policy.num_ctx is not None:", "if False:", LIMITS),
    Defence(13, "wire/native.py", "if not caps.token_ids:", "if False:", LIMITS),
    Defence(13, "wire/native.py", "if not 0 <= min(ids) <= max(ids) < caps.token_ids:", "if False:", LIMITS),
    Defence(13, "wire/native.py", "if not 0 <= value <= REPEATS_MAX:", "if False:", LIMITS),
    Defence(13, "wire/native.py", KEPT, KEPT.replace("    body.keep_alive = KEEP_ALIVE\n", ""), LIMITS),
    Defence(13, "wire/native.py", KEPT, KEPT.replace("    body.truncate = False\n", ""), "tests/unit/test_wire.py"),
    Defence(13, "store/scripts/admit.lua", "if after - now > MINUTE then", "if false then", BUDGETS),
    Defence(
        13,
        "store/scripts/reserve.lua",
        "    if after > 0 then refuse(base + 1, after) end\n",
        "",
        BUDGETS,
    ),
    Defence(
        13,
        "store/scripts/admit.lua",
        "if concurrency > 0 then\n  if redis.call('ZSCORE'",
        "if false then\n  if redis.call('ZSCORE'",
        "tests/unit/test_limits_wait.py",
    ),
    Defence(
        13,
        "store/scripts/reserve.lua",
        "if scope.concurrency > 0 and scope.running >= scope.concurrency then",
        "if false then",
        "tests/unit/test_limits_wait.py",
    ),
    Defence(13, "store/scripts/reserve.lua", "if scope.tpm > 0 and (window(use)", "if false and (window(use)", BUDGETS),
    Defence(
        13,
        "store/scripts/reserve.lua",
        "if scope.monthly > 0 and use[4] + cost > scope.monthly then",
        "if false then",
        BUDGETS,
    ),
    Defence(
        13,
        "store/budget.py",
        "return [self] if self.tenant is None else [self, self.tenant]",
        "return [self]",
        BUDGETS,
    ),
    Defence(
        13,
        "store/limits.py",
        "if self._denied and any([scope.limits()[limit] for scope in scopes for limit in self._denied]):",
        "if False:",
        "tests/unit/test_limits_denied.py",
    ),
    Defence(13, "store/scripts/told.lua", "redis.call('PUBLISH', CHANNEL", "tostring(CHANNEL", USED),
    Defence(13, "store/share.py", "        scope.told(now, numbers)\n", "", USED),
    Defence(13, "store/sharing.py", "self.names = sorted({*self.names, *names})", "pass", "tests/unit/test_feed.py"),
    Defence(
        13,
        "store/scripts/reserve.lua",
        "if scope.daily > 0 and use[2] + cost > scope.daily then",
        "if false then",
        BUDGETS,
    ),
    Defence(
        13,
        "store/scripts/declare.lua",
        "use[2] = math.max(use[2], tonumber(ARGV[7]))",
        "use[2] = use[2]",
        "tests/unit/test_limits_away.py tests/faults/test_limits.py",
    ),
    Defence(
        13,
        "store/leases.py",
        "return known.server not in (None, store.server)",
        "return False",
        "tests/faults/test_limits.py",
    ),
    Defence(
        13,
        "store/budget.py",
        "if day == self.day and day_used > self.day_used:",
        "if False:",
        "tests/integration/test_spent.py",
    ),
    Defence(
        14,
        "config/haproxy_rules.py",
        " unless host_known or {{ req.hdr_cnt(host) eq 0 }}",
        " if {{ always_false }}",
        EDGE,
    ),
    Defence(14, "config/haproxy_rules.py", 'if origin_sent !origin_own"', 'if origin_sent !origin_once"', EDGE),
    Defence(14, "config/haproxy.py", "local=not plan.hosts", "local=False", EDGE),
    Defence(
        15, "gateway/authenticate.py", "key is None or key.revoked:", "key is None:", "tests/faults/test_revocation.py"
    ),
    Defence(
        15,
        "gateway/authenticate.py",
        "    if not keys.allows(key.networks, address):",
        "    if False:",
        "tests/integration/test_gateway_keys.py",
    ),
    Defence(
        15,
        "store/keys.py",
        "return _KEY_LIKE.sub(",
        "return text or _KEY_LIKE.sub(",
        "tests/integration/test_control_refusals.py",
    ),
    Defence(15, "gateway/authenticate.py", "wall >= key.expires:", "False:", KEYS),
    Defence(
        15,
        "gateway/authenticate.py",
        "if key.patterns is not None and not key.may_use(canonical_name(model)):",
        "if False:",
        "tests/unit/test_keys.py",
    ),
    Defence(15, "gateway/feed.py", "os.O_TRUNC, 0o600)", "os.O_TRUNC, 0o644)", "tests/unit/test_feed.py"),
    Defence(15, "gateway/authenticate.py", "if end is not None and wall >= end:", "if False:", KEYS),
    Defence(15, "gateway/authenticate.py", "if lasts and bearer", "if bearer", KEYS),
    Defence(
        15,
        "control/keys.py",
        "mine if how.overlap <= 0 else mine & column.expires.is_not(None)",
        "mine & (column.expires <= now)",
        CHANGES,
    ),
    Defence(15, "gateway/feed.py", "self._snapshot.confirmed = now - age", "self._snapshot.confirmed = now", AWAY),
    Defence(
        15,
        "gateway/server.py",
        "self.limits.on_moved = self.changes.reset",
        "pass",
        "tests/faults/test_pushes.py",
    ),
    Defence(15, "gateway/feed.py", "        date(draft)\n", "", AWAY),
    Defence(15, "control/app.py", "            tasks.append(asyncio.create_task(control.hub.follow()))\n", "", AWAY),
    Defence(16, "store/verify.py", 'if leaf != row["leaf"]:', "if False:", VERIFY),
    Defence(16, "store/verify.py", "if pos != expected:", "if False:", VERIFY),
    Defence(16, "store/verify.py", "if whole and (root, end.hex()) != (span.root, span.link):", "if False:", VERIFY),
    Defence(16, "store/signed.py", "elif not signed_by(signed, public):", "elif False:", VERIFY),
    Defence(16, "store/verify.py", "if head.pos < at:", "if False:", VERIFY),
    Defence(
        17,
        "gateway/snapshot.py",
        "return self._pools.get(tenant, self._shared)",
        "return Pool(self.nodes)",
        "tests/unit/test_dedicated.py",
    ),
    Defence(17, "gateway/snapshot.py", 'data.get("dedicated") or {}', "{}", "tests/integration/test_own_nodes.py"),
)


def copied(folder: Path) -> None:
    """A copy of what git knows of, with this environment."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    # Some tests ask git for the files.
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


def taken_out(folder: Path, defence: Defence) -> str:
    """Run the tests without a defence: the first that fails, "" where all pass."""
    file = folder / defence.path
    text = file.read_text()
    file.write_text(text.replace(defence.there, defence.gone))
    try:
        argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *defence.tests.split()]
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    finally:
        file.write_text(text)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED tests/", "ERROR tests/"))]
    return failed[0].split(" - ")[0] if done.returncode == 1 and failed else ""


def main(rows: list[str]) -> int:
    """Print a line for each defence; 1 where one is not watched."""
    stood = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        for defence in DEFENCES:
            if rows and str(defence.row) not in rows:
                continue
            began = time.monotonic()
            failed = taken_out(folder, defence)
            stood += not failed
            told = f"row {defence.row:2} {defence.file}: {defence.there.strip()[:60]!r}"
            print(f"{told}: {failed or 'NO TEST FAILED'} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(stood > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
