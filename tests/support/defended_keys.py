"""Rows 13 to 17 of docs/security.md: limits, keys, records, tenants."""

from __future__ import annotations

from support.defended import Defence

AWAY = "tests/faults/test_keys_away.py"
BUDGETS = "tests/unit/test_limits.py"
EDGE = "tests/integration/test_edge_callers.py"
KEYS = "tests/integration/test_gateway_keys.py"
LIMITS = "tests/unit/test_wire_limits.py"
USED = "tests/unit/test_limits_used.py"
COMMAND = "tests/integration/test_audit_command.py"
COMPARED = "tests/unit/test_keys_compared.py"
CHANGES = "tests/integration/test_key_changes.py"
VERIFY = "tests/unit/test_store_verify.py"
POLICY = "tests/integration/test_real_policy.py"
SECRETS = "tests/integration/test_secrets.py tests/integration/test_secrets_stay.py"
TOGETHER = "tests/unit/test_limits_together.py"

EARLY = "matched = matched or hmac.compare_digest(verifier, digest)"
KEPT = "    body.truncate = False\n    body.keep_alive = KEEP_ALIVE\n"

DEFENCES = (
    Defence(13, "wire/options.py", "if name in RELOADING:", "if False:", LIMITS + " " + POLICY),
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
    Defence(
        13,
        "store/scripts/reserve.lua",
        "if scope.tpm > 0 and (window(use)",
        "if false and (window(use)",
        BUDGETS + " " + TOGETHER,
    ),
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
    Defence(
        15,
        "gateway/authenticate.py",
        '_unauthorized("the API key is malformed',
        '_unauthorized(f"the API key {text} is malformed',
        SECRETS,
    ),
    Defence(15, "gateway/route.py", 'if b"crl_" in target:', "if False:", "tests/integration/test_secrets_stay.py"),
    Defence(15, "gateway/authenticate.py", "matched |= hmac.compare_digest(verifier, digest)", EARLY, COMPARED),
    Defence(15, "gateway/authenticate.py", "hmac.compare_digest(verifier, digest)", "verifier == digest", COMPARED),
    Defence(15, "control/auth.py", "hmac.compare_digest(verifier, proof)", "verifier == proof", COMPARED),
    Defence(15, "control/auth.py", "known |= hmac.comp", "known = known or hmac.comp", COMPARED),
    Defence(15, "store/keys.py", 'text.encode(), "sha256")', 'text.encode(), "sha3_256")', COMPARED),
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
    Defence(16, "store/verify.py", 'if leaf != row["leaf"]:', "if False:", VERIFY + " " + COMMAND),
    Defence(16, "store/verify.py", "if pos != expected:", "if False:", VERIFY),
    Defence(16, "store/verify.py", "if whole and (root, end.hex()) != (span.root, span.link):", "if False:", VERIFY),
    Defence(
        16, "store/verify.py", "elif counted.root() != signed.root:", "elif False:", "tests/unit/test_store_older.py"
    ),
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
