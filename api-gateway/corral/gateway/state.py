"""What is known of one request while it is answered. What is done with it is in `exchange.py`."""

from __future__ import annotations

from asyncio import TimerHandle
from time import monotonic, time
from typing import TYPE_CHECKING, Final

from corral.fleet.hanging import Runner
from corral.gateway.authenticate import Key
from corral.gateway.journal import Waiter
from corral.gateway.listen import ClientConnection
from corral.gateway.metrics import Pace
from corral.gateway.relay import Attempt
from corral.gateway.resume import Resume
from corral.store.slots import Answer, Wanted
from corral.wire.decode import Decoded

if TYPE_CHECKING:
    from corral.gateway.server import Gateway

NOTHING: Final = 0
RESPOND: Final = 1
STREAM: Final = 2
END: Final = 3
"""What is left to send once the last record is written: an answer, a whole stream, or the end of one."""


class State(Waiter):
    """One request as it was read, and its state. Times are monotonic seconds, ``wall`` is epoch seconds.

    ``headers`` has lower-case names; ``modern``: HTTP/1.1. ``wanted`` is the slot that it has or asks for, ``answer``
    what it heard of that last, ``asked`` how often it has asked, ``bounced`` nodes that it was sent to in vain;
    ``waiting`` while it has a ticket, ``fresh`` before the first attempt at a further batch of it, ``beginnings`` those
    of its prompt (`corral.fleet.dispatch`), ``most`` how long it may take, ``own_headers`` lines that its answer has
    whatever it is, ``opened`` once a part of a node's answer was sent, ``overdue`` once it took longer than it may,
    ``seen`` the answer's tokens when last some of it came. ``headed`` once the head was sent before any of that, with a
    heartbeat; ``beaten`` is when the last of those was (`corral.gateway.heartbeat`), 0.0 before the first.
    ``sent`` is when its last attempt began, at ``runner``, ``token`` when that last gave one, 0.0 before its first.
    ``model_digest`` is that of its model on the node of its last attempt, as that began, None where it is not known.
    ``suspect`` is its prompt's fingerprint once that was at a runner's crash (`corral.gateway.crashing`).
    ``orphaned``, ``crashes``, ``lost`` and ``held_until`` are `corral.gateway.recover.History`'s.
    ``queue_ms`` is what its waits for a node took that are over, ``nodeless_since`` when the one began that is on,
    0.0 while it has a node. What most requests never set stands on the class.
    """

    body = b""
    keep_alive = False
    modern = True
    tried: tuple[str, ...] = ()
    bounced: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

    api = "native"
    path = ""
    model = ""
    key: Key | None = None
    key_id = ""
    tenant = ""
    decoded: Decoded | None = None
    node_name = ""
    model_digest: str | None = None
    attempts = 0
    orphaned = 0
    crashes = 0
    lost = 0
    held_until = 0.0
    wanted: Wanted | None = None
    answer: Answer | None = None
    asked = 0
    fresh = False
    beginnings: list[int] = []  # noqa: RUF012 - set anew, never changed
    waiting = False
    waiting_bytes = 0
    queued_at = 0.0
    wait_until = 0.0
    queue_ms = 0.0
    most = 0.0
    due: TimerHandle | None = None
    cool = 0.0
    first_token = 0.0
    deadline = 0.0
    sent = 0.0
    token = 0.0
    runner: Runner | None = None
    suspect = ""
    refusal = ""
    pace: Pace | None = None
    resumption: Resume | None = None
    _attempt: Attempt | None = None
    seen = 0
    paused = False
    node_header = b""
    own_headers = b""
    _tail = b""
    _admitted = False
    _appended = False
    _recorded = False
    settled = False
    opened = False
    headed = False
    beaten = 0.0
    overdue = False
    _ending = NOTHING
    _status = 0
    _last_head = b""
    _last = b""

    def __init__(
        self,
        gateway: Gateway,
        connection: ClientConnection,
        method: bytes,
        target: bytes,
        headers: dict[bytes, bytes],
        identity: tuple[str, str, str],
    ) -> None:
        self.gateway = gateway
        self.connection = connection
        self.method = method
        self.target = target
        self.headers = headers
        self.record_id, self.request_id, self.address = identity
        self.arrived = self.nodeless_since = monotonic()
        self.wall = time()

    def queued(self, now: float) -> float:
        """For how long it has waited for a node until `now`, all waits together (ms): from its arrival, and again
        before each further attempt. Who was refused before it could ask for a node has not waited."""
        if not self.nodeless_since or not self._recorded:
            return self.queue_ms
        return self.queue_ms + max(0.0, now - self.nodeless_since) * 1e3

    @property
    def connects(self) -> int:
        """Attempts that found no connection."""
        return len(self.unreached)
