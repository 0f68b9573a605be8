"""Step 7, before the first token: comments in a stream of events, where `gateway.queue.heartbeat` asks for them.

Who stands between takes a connection that is silent for too long for a dead one. Clients ignore a line that begins with
a colon (WHATWG HTML, section 9.2.6). The head leaves with the first of them: from then on an error is told in band.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from corral.gateway import heads

if TYPE_CHECKING:
    from corral.gateway.exchange import Exchange

EVENTS: Final = "text/event-stream"
TYPE: Final = b"Content-Type: text/event-stream\r\n"
COMMENT: Final = b": waiting\n\n"


def beat(exchange: Exchange, every: float, now: float) -> None:
    """Send a comment to the caller of a stream of events who has heard nothing for `every` seconds.

    It says nothing of the node: whoever looks for progress must not see it.
    """
    decoded = exchange.decoded
    if exchange.first_token or now - (exchange.beaten or exchange.arrived) < every or decoded is None:
        return
    connection = exchange.connection
    if decoded.responder.content_type != EVENTS or connection.stalled_since:
        return
    exchange.beaten = now
    if exchange.headed:
        connection.send(COMMENT)
    else:
        exchange.headed = True
        head = heads.own(exchange.request_id, exchange.own_headers, TYPE)
        connection.begin(head, COMMENT, exchange.keep_alive, exchange.modern)
