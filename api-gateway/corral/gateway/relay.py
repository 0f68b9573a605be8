"""Step 7: one attempt at one node. Its answer goes through the responder, chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from corral.fleet.node import Node
from corral.gateway.recover import Failure, classify, crashed
from corral.gateway.upstream import Handler, UpstreamConnection
from corral.wire.common import Decoded
from corral.wire.errors import ApiError, UpstreamNonsense, upstream_message

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange

ERROR_BODY_MAX: Final = 64 << 10
NO_SUCH_NODE: Final = b"no-such-node"
TEMPLATE: Final = b'"template":'
IMAGES: Final = b'"images":'
"""As a field: a quote within a JSON string is escaped."""


class Attempt(Handler):
    """A request on a node; tells the exchange how it goes until it is over."""

    __slots__ = (
        "_connection",
        "_decoded",
        "_error_body",
        "_exchange",
        "_kept",
        "_over",
        "_proxied",
        "_renewed",
        "_status",
        "node",
    )

    def __init__(self, exchange: Exchange, node: Node, decoded: Decoded) -> None:
        self._exchange = exchange
        self._decoded = decoded
        self._kept = decoded.transcript
        self.node = node
        self._connection: UpstreamConnection | None = None
        self._over = False
        self._status = 0
        self._proxied = b""
        self._renewed = False
        self._error_body = b""
        node.in_flight += 1

    def begin(self) -> None:
        """Take a connection and send the request."""
        upstreams, address = self._exchange.gateway.upstreams, self._exchange.gateway.nodes_address
        connection = upstreams.idle(address)
        if connection is None:
            upstreams.connect(address, self._connected)
        else:
            self._send(connection)

    def _connected(self, connection: UpstreamConnection | OSError) -> None:
        if isinstance(connection, OSError):
            if not self._over:
                self._fail(Failure.CONNECT)
        elif self._over:
            connection.abort()
        else:
            self._send(connection)

    def _send(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        exchange = self._exchange
        decoded = self._decoded
        body = decoded.body
        parts = (
            b"POST ",
            decoded.upstream_path,
            b" HTTP/1.1\r\nHost: nodes\r\n",
            self.node.header,
            b"X-Request-ID: ",
            exchange.request_id.encode(),
            b"\r\nContent-Type: application/json\r\nContent-Length: ",
            str(len(body)).encode(),
            b"\r\n\r\n",
            body,
        )
        connection.send(b"".join(parts), self)

    # -- the answer

    def on_head(self, status: int, proxied: bytes) -> None:
        self._status, self._proxied = status, proxied

    def on_body(self, data: bytes) -> None:
        if self._over:
            return
        if self._status != 200:
            self._error_body += data[: ERROR_BODY_MAX - len(self._error_body)]
            return
        responder = self._decoded.responder
        try:
            out = responder.feed(data)
        except UpstreamNonsense as error:
            responder.tokens = self._exchange.seen  # no line of this piece is sent
            self._fail(Failure.NONSENSE, ApiError(502, "upstream_error", str(error)))
            return
        except Exception:
            # Whatever a node sends, the request ends: nothing else would give back its place and its lease.
            responder.tokens = self._exchange.seen
            self._exchange.not_understood(self.node)
            self._fail(Failure.NONSENSE)
            return
        if responder.error is not None:
            self._failed_in_band(responder.error, data, out)
            return
        kept = self._kept
        if kept is not None:
            kept.add(data)
        self._exchange.progress(out)

    def _failed_in_band(self, told: ApiError, data: bytes, out: bytes) -> None:
        """Under status 200: the model's runner died, or refused in mid-answer.

        Who has the beginning of it gets all that came before; who has nothing yet may have an answer of another node.
        """
        if out and self._exchange.opened:
            if self._kept is not None:
                self._kept.add(data[: data.rstrip().rfind(b"\n") + 1])
            self._exchange.progress(out)
        if not self._over:
            self._fail(Failure.CRASH if crashed(told.message) else Failure.NODE, told)

    def on_end(self) -> None:
        self._connection = None
        if self._over:
            return
        if self._status != 200:
            if self._proxied == NO_SUCH_NODE and not self._renewed:
                # HAProxy was reloaded while this connection was in use: it ends at the old worker, which does not
                # know a node that is new.
                self._renewed, self._error_body = True, b""
                gateway = self._exchange.gateway
                gateway.upstreams.connect(gateway.nodes_address, self._connected)
                return
            message = upstream_message(self._error_body)
            body = self._decoded.body
            own = body.find(TEMPLATE) >= 0, body.find(IMAGES) >= 0
            failure = classify(self._status, bool(self._proxied), message, *own)
            status = 400 if failure is Failure.CALLER and self._status >= 500 else self._status
            code = {400: "bad_request", 404: "model_not_found"}.get(status, "upstream_error")
            self._fail(failure, ApiError(status, code, message))
            return
        responder = self._decoded.responder
        if not responder.done:
            self.on_body(b"\n")  # an answer that is one object has no line end of its own
            if self._over:
                return  # type: ignore[unreachable]  # on_body may have failed
        if responder.done:
            self._close()
            self._exchange.answered()
        else:
            self._fail(Failure.RESET)  # an orderly end in the middle of an answer is none

    def on_lost(self, untouched: bool) -> None:
        self._connection = None
        if self._over:
            return
        if untouched:
            # A reused connection that its peer had closed: nothing was lost, and a new one is sure.
            gateway = self._exchange.gateway
            gateway.upstreams.connect(gateway.nodes_address, self._connected)
        else:
            self._fail(Failure.RESET)

    def give_up(self, failure: Failure) -> None:
        """Nothing more is expected of the node, though its connection stands."""
        if not self._over:
            self._fail(failure)

    # -- back-pressure, end

    def pause(self) -> None:
        """The caller takes no more bytes now."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """The caller takes bytes again."""
        if self._connection is not None:
            self._connection.resume()

    def abandon(self) -> None:
        """Nobody wants the answer any more: close, so that the node stops."""
        if not self._over:
            self._close()

    def _close(self) -> None:
        self._over = True
        self.node.in_flight -= 1
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def _fail(self, failure: Failure, cause: ApiError | None = None) -> None:
        self._close()
        self._exchange.attempt_failed(self.node, failure, cause)
