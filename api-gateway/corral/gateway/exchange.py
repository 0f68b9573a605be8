"""One request and its answer: the nine steps, joined by callbacks.

`start` runs listen's request through route, authenticate and decode; admit, the queue and relay call back. Whatever
happens, `_settle` runs once: the slot and the lease are given back, the record is written, and only then do the last
bytes leave.
"""

from __future__ import annotations

import logging
from time import monotonic

from corral.fleet.node import Node, canonical_name
from corral.gateway import admit, catalogue, checks, heads, schedule, settle
from corral.gateway.authenticate import Key, authenticate, locate
from corral.gateway.crashing import refused
from corral.gateway.decode import decode
from corral.gateway.metrics import WHOLE
from corral.gateway.recover import GIVEN_UP, Failure, count, final_error, may_retry
from corral.gateway.relay import Attempt
from corral.gateway.resume import Resume, end_early, goes_on, keep, take_over
from corral.gateway.route import Kind, api_of, resolve
from corral.gateway.state import END, NOTHING, RESPOND, STREAM, State
from corral.store.limits import Verdict
from corral.store.slots import Answer
from corral.wire import errors
from corral.wire.decode import Decoded
from corral.wire.errors import ApiError, UpstreamNonsense, overloaded

log = logging.getLogger(__name__)


class Exchange(State):
    """A request's way from its bytes to its end."""

    def start(self) -> None:
        """Steps 2 to 5, up to the call of the store."""
        gateway = self.gateway
        try:
            route = resolve(self.method, self.target)
            self.api, self.path, kind = route.api, route.path, route.kind
            if kind is Kind.HEALTH:
                self.settled = True  # health checks are not requests of anybody: no record
                status, body = checks.answer(gateway, self.path, self.connection.peer, self.headers, self.arrived)
                self.connection.respond(status, heads.JSON, body, self.keep_alive)
                return
            snapshot = gateway.snapshot_now(self.arrived)
            self.key = key = authenticate(self.headers, snapshot.keys, gateway.pepper, self.wall, snapshot.verified)
            self.key_id, self.tenant = key.id, key.tenant
            if key.networks is not None:
                locate(key, self.address)
            self.most = admit.duration(self.headers, gateway.max_duration, key.deadline)
            if self.most < gateway.max_duration:
                self.due = gateway.loop.call_later(self.most, self._past)
            if kind is Kind.RELAY:
                self.decoded = decoded = decode(route.path, self.body, self.request_id, key, snapshot)
                self.model = decoded.model
                if gateway.suspects.known and gateway.crashing.refuses(self, decoded):
                    self.refusal = "crashing"
                    raise refused()
            budget = key.budget
            tokens = admit.reserve(self.decoded, gateway.answer_tokens, key.density) if budget.most else 0
            self.wanted = wanted = gateway.queue.want(self)
            heard = self.slot_heard if wanted is not None else None
            gateway.limits.admit(budget, self.record_id, self.arrived, self._on_verdict, tokens, wanted, heard)
        except ApiError as error:
            if not self.path:
                self.api = api_of(self.target)
            self.refuse(error)
        except Exception:
            if self.settled:
                raise
            self.broken()

    def broken(self) -> None:
        """End with the fault of the gateway's own that is being handled; it is recorded like any other."""
        log.exception("%s: %s could not be answered", self.request_id, self.path)
        self.abandon()
        self.give_up(ApiError(500, "internal_error", "the gateway failed at this request"), "upstream_error")

    # -- admit

    def _on_verdict(self, verdict: Verdict) -> None:
        key = self.key
        assert key is not None
        if self.settled:  # the caller left meanwhile
            if not verdict.refused:
                self.gateway.limits.release(key.budget, self.record_id)
            return
        try:
            self._admit(verdict, key)
        except Exception:
            self.broken()

    def _admit(self, verdict: Verdict, key: Key) -> None:
        self._admitted = not verdict.refused
        self.own_headers = admit.headers(verdict, key.budget)
        if verdict.refused:
            self.refusal = verdict.refused
            self.refuse(admit.refusal(verdict, key.budget))
            return
        answer = self.answer
        if answer is not None and answer.full:
            self.refuse(self.gateway.queue.refused(self, answer))
            return
        if self.decoded is not None:
            self.gateway.retries.earn()
        self._appended = self.gateway.journal.record(settle.admitted(self), self)

    def recorded(self, written: bool) -> None:
        """The record of the admission is written, or the last one."""
        if self.settled:
            self._send_last()
            return
        if not written:
            self.refusal = "recording"
            self.refuse(overloaded("the audit record cannot be written", self.gateway.journal.pause(monotonic())))
            return
        self._recorded = True
        now = monotonic()
        try:
            if self.wanted is not None:
                self.gateway.queue.go(self, now)
            elif self.decoded is not None:
                self.unslotted(now)
            else:
                catalogue.serve(self)
        except Exception:
            self.broken()

    # -- schedule, relay

    def slot_heard(self, answer: Answer) -> None:
        """A word on the slot that it asked for: in the same turn as the verdict, or when a ticket has its turn."""
        self.answer = answer
        if self._recorded and not self.settled:
            try:
                self.gateway.queue.go(self, monotonic())
            except Exception:
                self.broken()

    def unslotted(self, now: float) -> None:
        """Go to a node without a slot: nothing is generated, or there is no node, which the caller hears."""
        try:
            node = schedule.schedule(self.gateway.snapshot, self.tenant, self.model, now, self.tried)
        except ApiError as error:
            self.give_up(error, settle.outcome_of(error.status))
            return
        self.begin(node, now)

    def begin(self, node: Node, now: float) -> None:
        """An attempt at a node, on which it has a slot."""
        decoded, resume = self.decoded, self.resumption
        assert decoded is not None
        self.queue_ms = self.queued(now)
        self.wait_until = self.nodeless_since = 0.0
        if self.fresh:
            self.fresh = False
        else:
            self.attempts += 1
        if resume is not None:
            self.decoded = decoded = resume.begin(node)
        else:
            gateway = self.gateway
            keep(decoded, gateway.snapshot, gateway.hashes is not None, gateway.content_wanted(self.key))
            self.node_header = node.header
        self.gateway.running.add(self)
        self.model_digest = node.digests.get(canonical_name(decoded.model))
        self.ask(node, decoded, now)

    def ask(self, node: Node, decoded: Decoded, now: float) -> None:
        """Send `decoded` to a node; the answer comes back by `progress`, `answered` or `attempt_failed`."""
        self.node_name = node.name
        self.deadline = now + self.gateway.first_token
        self.gateway.health.sent(self, node, now)
        self._attempt = attempt = Attempt(self, node, decoded)
        attempt.begin()

    def progress(self, out: bytes) -> None:
        """The node sent something; `out` is what of it goes to the caller now."""
        assert self.decoded is not None
        responder = self.decoded.responder
        tokens = responder.tokens
        first = not self.first_token and responder.started
        # Bytes alone are no progress: a node that sends blank lines is as silent as one that sends nothing.
        if first or tokens != self.seen or self.path in WHOLE:
            self.seen = tokens
            gateway, now = self.gateway, monotonic()
            gateway.health.token(self, first, now)
            if first:
                self.first_token = now
                gateway.queue.read(self, now)
                if self.suspect:
                    gateway.crashing.got_on(self)
                self.pace = gateway.metrics.first_token(self, now)
            elif self.pace is not None:
                self.pace.piece(now)
            if not self.paused:
                self.deadline = now + gateway.between_tokens
        if responder.done:
            self._tail += out  # the last bytes leave when the settle record is written
            if responder.early:
                end_early(self, self._attempt)
        elif not out:
            return
        elif self.opened:
            self.connection.send(out)
        elif responder.started:
            self.opened = True
            if self.headed:
                self.connection.send(out)
            else:
                self.connection.begin(heads.relayed(self, responder.content_type), out, self.keep_alive, self.modern)

    def answered(self) -> None:
        """The node's answer is whole."""
        attempt, self._attempt = self._attempt, None
        assert self.decoded is not None and attempt is not None
        responder = self.decoded.responder
        self.gateway.health.answered(self, attempt.node, monotonic())
        try:
            if (self.resumption is not None or self.decoded.more) and goes_on(self, attempt.node):
                return
            rest = self._tail + responder.finish()
        except UpstreamNonsense as error:
            self.attempt_failed(attempt.node, Failure.NONSENSE, ApiError(502, "upstream_error", str(error)))
            return
        except Exception:
            self.not_understood(attempt.node)
            self.attempt_failed(attempt.node, Failure.NONSENSE, None)
            return
        if self.opened or self.headed:
            self._settle(200, "ok", END, b"", rest)
        else:
            ending = STREAM if responder.stream else RESPOND
            self._settle(200, "ok", ending, heads.relayed(self, responder.content_type), rest)

    def not_understood(self, node: Node) -> None:
        """Log the fault, the gateway's own or the node's, that is being handled."""
        log.exception("%s: an answer of %s was not understood", self.request_id, node.name)

    def attempt_failed(self, node: Node, failure: Failure, cause: ApiError | None) -> None:
        """Step 8. The attempt is over and gave back its place on the node."""
        try:
            self._failed(node, failure, cause)
        except Exception:
            self.broken()

    def _failed(self, node: Node, failure: Failure, cause: ApiError | None) -> None:
        gateway, decoded, self._attempt = self.gateway, self.decoded, None
        assert decoded is not None
        # The node may not know yet that nobody wants its answer.
        gateway.queue.leave(self, gateway.queue.cooling(self) if failure in GIVEN_UP else 0.0)
        if failure is Failure.CALLER and cause is not None and decoded.without_thinking(cause.message):
            gateway.queue.again(self, monotonic())
            return
        count(self, failure, monotonic())
        if failure is Failure.CONNECT:
            self.unreached += (node.name,)
        if failure is not Failure.CALLER:
            self.tried += (node.name,)
            gateway.queue.shun(node, failure, self.model, monotonic())
        if failure is not Failure.CRASH or not gateway.crashing.crashed(self, node, cause):
            self.go_on(node, failure, cause)

    def go_on(self, node: Node, failure: Failure, cause: ApiError | None) -> None:
        """After a failed attempt: to another node, or to the end."""
        gateway = self.gateway
        if not self.opened and may_retry(failure, self, len(gateway.snapshot.nodes), gateway.retries, monotonic()):
            gateway.metrics.retried(failure)
            self._again()
            return
        if not (self.opened and take_over(self, failure, node)):
            self.give_up(final_error(failure, self, cause, schedule.ready_for(self, monotonic())), "upstream_error")

    def _again(self) -> None:
        # A responder lives for one answer, and nothing of this one was sent.
        key, decoded = self.key, self.decoded
        assert key is not None and decoded is not None
        self.first_token, self.pace, self._tail, self.seen = 0.0, None, b"", 0
        if decoded.responder.kept:
            decoded.responder.drop()
        else:
            try:
                self.decoded = decode(self.path, self.body, self.request_id, key, self.gateway.snapshot)
            except ApiError as error:
                self.give_up(error, settle.outcome_of(error.status))
                return
        self.gateway.queue.again(self, monotonic())

    def resumes(self, resume: Resume) -> None:
        """Another node is to go on with the answer."""
        self.resumption = resume
        self._tail, self.paused = b"", False
        self.gateway.queue.again(self, monotonic())

    # -- the end

    def refuse(self, error: ApiError, outcome: str = "") -> None:
        """Answer with an error; nothing was sent before."""
        headers = heads.refusal(error, self.request_id, self.own_headers)
        self.finish_whole(error.status, headers, errors.render(self.api, error, self.request_id), outcome)

    def finish_whole(self, status: int, headers: bytes, body: bytes, outcome: str = "") -> None:
        """End with an answer that is no node's."""
        self._settle(status, outcome or settle.outcome_of(status), RESPOND, headers, body)

    def give_up(self, error: ApiError, outcome: str) -> None:
        """End with an error, whatever was sent before."""
        if not self.opened and outcome not in settle.ENDED_BY_US:
            outcome = settle.outcome_of(error.status)
        if not (self.opened or self.headed):
            self.refuse(error, outcome)
            return
        self.keep_alive = False
        self._settle(error.status, outcome, END, b"", errors.in_band(self.api, error, self.request_id))

    def _settle(self, status: int, outcome: str, ending: int, head: bytes, last: bytes) -> None:
        if self.settled:
            return
        self.settled = True
        self._ending, self._status, self._last_head, self._last = ending, status, head, last
        gateway = self.gateway
        gateway.running.discard(self)
        if self.due is not None:
            self.due.cancel()
        now = monotonic()
        if outcome == "ok" and self.wanted is not None:
            gateway.queue.note(self.model, now - self.arrived - self.queue_ms / 1e3)
        gateway.queue.leave(self)
        record = settle.settled(self, status, outcome, self.connection.sent + len(last), now)
        if self._admitted and self.key is not None:
            gateway.release(self, record.prompt_tokens + record.tokens)
        if self.resumption is not None:
            gateway.metrics.continuations[settle.continued(outcome)] += 1
        gateway.metrics.settled(self, record)
        if self.attempts and gateway.content_wanted(self.key):
            gateway.keep_content(self, record)
        gateway.journal.record(record, self, access=True, follows=self._appended)

    def _send_last(self) -> None:
        # Once, though a request that ends in the turn it was admitted in waits for two records.
        ending, self._ending = self._ending, NOTHING
        if ending == RESPOND:
            self.connection.respond(self._status, self._last_head, self._last, self.keep_alive)
        elif ending == STREAM:
            self.connection.whole_stream(self._last_head, self._last, self.keep_alive, self.modern)
        elif ending == END:
            self.connection.end(self._last, self.keep_alive)

    def client_gone(self) -> None:
        """The caller left: stop the node's work now; it is not the node's fault."""
        if self.settled:
            return
        self.abandon()
        self._settle(499, "client_gone", NOTHING, b"", b"")

    def abandon(self) -> None:
        """End the attempt, if there is one; it is not the node's fault."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.abandon()
            self.gateway.queue.let_go(self)

    # -- time and back-pressure

    def check(self, now: float) -> None:
        """End what is past its deadline."""
        attempt, gateway = self._attempt, self.gateway
        if self.waiting:
            if now >= min(self.wait_until, self.arrived + self.most):
                self.give_up(gateway.queue.too_late(self), "overloaded")
        elif now >= self.arrived + self.most:  # not the difference: it may be a little less than `most`
            self.overdue = True
            self.abandon()
            self.give_up(ApiError(504, "timeout", f"the request took longer than {self.most:g} s"), "timeout")
        elif attempt is not None:
            if not self.first_token and schedule.is_down(attempt.node, gateway.snapshot, self.tenant, self.model, now):
                attempt.give_up(Failure.DOWN)
            elif not self.paused and now >= self.deadline:
                attempt.give_up(Failure.TIMEOUT)

    def _past(self) -> None:
        self.check(max(monotonic(), self.arrived + self.most))  # a timer may be a millisecond early

    def pause(self) -> None:
        """The caller's connection is full."""
        # From here the node waits for the caller, whose own deadline is WRITE_DEADLINE.
        if self._attempt is not None:
            self.paused = True
            self._attempt.pause()

    def resume(self) -> None:
        """The caller's connection takes bytes again."""
        if self._attempt is not None:
            if self.paused:
                self.paused = False
                gateway = self.gateway
                self.deadline = monotonic() + (gateway.between_tokens if self.first_token else gateway.first_token)
            self._attempt.resume()
