"""One client's connection, from its first byte to its last.

Theory of operation. A connection is always in one state, and a state is an object:

    Handshaking --accepted--> HttpSession(VerifiedPeer) or Tunnel(VerifiedPeer)
        |  \\--refused, can be told--> Refusing --answered--+
        \\----refused------------------------------------> Lingering --> closed

Only HttpSession and Tunnel can reach an app, and neither can be made without a VerifiedPeer. Lingering shuts
down the write side and reads on for a moment: closing at once would send RST, and the peer would lose the
alert or the answer that says why.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, cast

from handfast.errors import Failure, Reason, RemoteProtocolError
from handfast.guard.events import refusal_body, told
from handfast.guard.http import HttpSession
from handfast.guard.tunnel import Tunnel
from handfast.pki.certificates import label, serial_text
from handfast.pki.verification import VerifiedPeer
from handfast.policy import decide
from handfast.tls.server import Accepted, Channel, Refused, ServerHandshake, TlsBroken
from handfast.wire.http1 import MAX_HEAD, find_head, plain_response

if TYPE_CHECKING:
    from handfast.guard.service import Guard

MAX_UNREAD = 4 << 20  # bytes that may wait for a client that does not read; the app is paused long before
LINGER = 2.0  # seconds for the peer to read why
LINGER_BYTES = 1 << 18  # and what it may send meanwhile

_HANDSHAKE_RECORD = 0x16  # RFC 8446 5.1; every TLS connection begins with one
_LETTERS = frozenset(range(0x41, 0x5B))


class State(Protocol):
    """What a connection does with what happens to it."""

    def received(self, data: bytes) -> None:
        """Bytes came from the client."""

    def ended(self) -> None:
        """The client closed its side."""

    def writable(self, yes: bool) -> None:
        """The way to the client is full, or free again."""

    def lost(self) -> None:
        """The connection is gone."""

    def expired(self) -> None:
        """The deadline of the state passed."""


class Connection(asyncio.Protocol):
    """The transport's side: owns the socket, the deadline and the id; the state does the rest."""

    __slots__ = ("_state", "address", "deadline", "guard", "id", "opened", "peer", "transport", "who")

    transport: asyncio.Transport

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.id = secrets.token_hex(6)
        self.peer: VerifiedPeer | None = None
        self.who: str | None = None  # the peer's identity, as logs say it
        self.deadline = 0.0
        self.address = ""
        self._state: State = Handshaking(self)

    # What the event loop calls. An exception in here is a bug of ours, and refuses.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it
        self.opened = self.moment()
        name = transport.get_extra_info("peername")
        self.address = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else ""
        self.guard.connections.add(self)
        self.set_deadline(self.guard.limits.handshake)
        if self.guard.draining:
            self.abort()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._have(self._state.received, data)

    def eof_received(self) -> bool:
        """See asyncio.Protocol. True: our side stays open until we have said what there is to say."""
        self._have(self._state.ended)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.guard.connections.discard(self)
        state, self._state = self._state, Gone()
        self._have(state.lost)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._have(self._state.writable, False)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._have(self._state.writable, True)

    # What the guard calls.

    def tick(self, moment: float, now: datetime) -> None:
        """Act on the deadline and on the end of trust by time. `moment` is on the clock of `moment()`."""
        if moment >= self.deadline:
            self._have(self._state.expired)
        elif self.peer is not None and now >= self.peer.not_after:
            self.end_trust(Failure(Reason.ENDED_EXPIRED))

    def recheck(self, now: datetime) -> None:
        """Act on a new snapshot: a peer that it does not trust, or cannot judge, is cut off."""
        if self.peer is None:
            return
        try:
            failure = self.guard.snapshot.objection(self.peer, now)
            if failure is None and isinstance(self._state, HttpSession | Tunnel):
                allowed = self._state.allowed_by(self.guard.snapshot.policy)
                failure = None if allowed else Failure(Reason.ENDED_POLICY)
        except Exception as bug:
            self.bug(bug)
            return
        if failure is not None:
            self.end_trust(failure)

    def drain(self) -> None:
        """Finish what is under way, and nothing more."""
        state = self._state
        if isinstance(state, HttpSession | Tunnel):
            state.finish()
        elif isinstance(state, Handshaking):
            self.abort()

    def end_trust(self, failure: Failure) -> None:
        """Cut the peer off: nothing more goes either way."""
        self.event("ended", {"decision": "deny"} | told(failure))
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        self.deadline = float("inf")
        self.transport.abort()

    # What the states call.

    def moment(self) -> float:
        """The clock of deadlines, in seconds. Not the loop's: asking for the loop costs a system call."""
        return monotonic()

    def set_deadline(self, seconds: float) -> None:
        """Give the present state so long."""
        self.deadline = monotonic() + seconds

    def become(self, state: State) -> None:
        """Go over to another state."""
        self._state = state

    def send(self, records: bytes) -> None:
        """Send records to the client; one that takes nothing while it makes us write is cut off."""
        self.transport.write(records)
        if self.transport.get_write_buffer_size() > MAX_UNREAD:
            self.abort()

    def linger(self) -> None:
        """Say no more, and wait a moment for the peer to read what was said."""
        self.become(Lingering(self))

    def event(self, event: str, fields: dict[str, Any]) -> None:
        """Log an event of this connection."""
        made = {"id": self.id, "address": self.address, "peer": self.who}
        made |= fields
        self.guard.log.emit(event, self.guard.now, made)

    def _have(self, happen: Callable[..., None], *what: bytes | bool) -> None:
        """Let something happen to the state. What goes wrong in it ends this connection, and no other."""
        try:
            happen(*what)
        except Exception as bug:
            self.bug(bug)

    def bug(self, bug: Exception) -> None:
        """Fail closed on what should not happen: refuse, say so, keep serving the others."""
        if isinstance(bug, TlsBroken):  # no bug of ours: the client's records do not decrypt
            self.event("ended" if self.peer else "connection", {"decision": "deny"} | told(bug.failure))
            self.abort()
            return
        detail = f"{type(bug).__name__}: {bug}"[:200]
        self.event("ended", {"decision": "deny"} | told(Failure(Reason.BUG, {"detail": detail})))
        self.abort()


class Handshaking:
    """Before anyone is known: nothing but a TLS handshake is understood."""

    __slots__ = ("_connection", "_handshake")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._handshake: ServerHandshake | None = None  # made with the first byte: a silent client costs little

    def received(self, data: bytes) -> None:
        """Bytes of the handshake."""
        connection, guard = self._connection, self._connection.guard
        if self._handshake is None:
            if data[0] != _HANDSHAKE_RECORD:
                self._not_tls(data)
                return
            self._handshake = guard.snapshot.context.accept(lambda: guard.now)
        outcome = self._handshake.feed(data)
        if records := self._handshake.take():
            connection.transport.write(records)
        match outcome:
            case Accepted():
                _admit(connection, outcome)
            case Refused():
                _refuse(connection, outcome)
            case None:
                pass

    def ended(self) -> None:
        """The client went away in the midst of it."""
        if self._handshake is not None:
            self._connection.event("connection", {"decision": "deny"} | told(Failure(Reason.TLS_CLOSED)))
        self._connection.abort()

    def writable(self, yes: bool) -> None:
        """A handshake's few records always fit."""

    def lost(self) -> None:
        """Nothing to tidy."""

    def expired(self) -> None:
        """Too slow: make room for others."""
        failure = Failure(Reason.TLS_TIMEOUT, {"limit": self._connection.guard.limits.handshake})
        self._connection.event("connection", {"decision": "deny"} | told(failure))
        self._connection.abort()

    def _not_tls(self, data: bytes) -> None:
        connection = self._connection
        plain_http = connection.guard.target.http and data[0] in _LETTERS
        failure = Failure(Reason.TLS_PLAIN_HTTP if plain_http else Reason.TLS_NOT_TLS)
        connection.event("connection", {"decision": "deny"} | told(failure))
        if plain_http:
            connection.transport.write(plain_response(failure.reason.http, refusal_body(failure.reason, connection.id)))
        connection.linger()


class Refusing:
    """A refused client whose handshake was finished: it may send one request, and is told why it is refused."""

    __slots__ = ("_channel", "_connection", "_head", "_reason")

    def __init__(self, connection: Connection, channel: Channel, reason: Reason) -> None:
        self._connection = connection
        self._channel = channel
        self._reason = reason
        self._head = b""

    def received(self, data: bytes) -> None:
        """Read until the head of the request is there; then answer. No byte of it goes anywhere."""
        self._channel.feed(data)
        self.read()

    def read(self) -> None:
        """See `received`."""
        while plain := self._channel.read():
            self._head += plain
            try:
                if find_head(self._head) < 0:
                    continue
            except RemoteProtocolError:
                pass
            self._answer()
            return
        if self._channel.at_eof or len(self._head) > MAX_HEAD:
            self._answer()

    def ended(self) -> None:
        """It did not ask anything."""
        self._connection.linger()

    def writable(self, yes: bool) -> None:
        """The one answer always fits."""

    def lost(self) -> None:
        """Nothing to tidy."""

    def expired(self) -> None:
        """It asked nothing in time."""
        self._answer()

    def _answer(self) -> None:
        connection = self._connection
        head_only = self._head.startswith(b"HEAD ")
        body = refusal_body(self._reason, connection.id)
        self._channel.write(plain_response(self._reason.http or 403, body, head_only=head_only))
        self._channel.close()
        connection.transport.write(self._channel.take())
        connection.linger()


class Lingering:
    """All is said; what still comes is thrown away."""

    __slots__ = ("_connection", "_left")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._left = LINGER_BYTES
        connection.set_deadline(LINGER)
        if not connection.transport.is_closing():
            connection.transport.write_eof()

    def received(self, data: bytes) -> None:
        """Throw it away, within bounds."""
        self._left -= len(data)
        if self._left < 0:
            self._connection.abort()

    def ended(self) -> None:
        """The peer has closed too."""
        self._connection.transport.close()

    def writable(self, yes: bool) -> None:
        """Nothing is written any more."""

    def lost(self) -> None:
        """Nothing to tidy."""

    def expired(self) -> None:
        """Long enough."""
        self._connection.abort()


class Gone:
    """After the transport's last word: whatever a late callback says is ignored."""

    __slots__ = ()

    def received(self, data: bytes) -> None:
        """Ignored."""

    def ended(self) -> None:
        """Ignored."""

    def writable(self, yes: bool) -> None:
        """Ignored."""

    def lost(self) -> None:
        """Ignored."""

    def expired(self) -> None:
        """Ignored."""


def _admit(connection: Connection, accepted: Accepted) -> None:
    guard, peer = connection.guard, accepted.peer
    # The snapshot may have changed while the handshake ran (ztunnel#1986): judge by the one in force now.
    failure = guard.snapshot.objection(peer, guard.now)
    if failure is not None and failure.reason is not Reason.ENDED_POLICY:
        _refuse(connection, Refused((failure,), peer.path, accepted.channel, accepted.facts))
        return
    connection.peer, connection.who = peer, str(peer.identity)
    facts = accepted.facts
    shown: dict[str, Any] = {
        "authority": peer.identity.authority,
        "serial": serial_text(peer.leaf.serial_number),
        "version": facts.version,
        "cipher": facts.cipher,
        "group": facts.group,
        "ms": round((connection.moment() - connection.opened) * 1000, 1),
    }
    if guard.target.http:
        connection.event("connection", {"decision": "accept"} | shown)
        session = HttpSession(connection, peer, accepted.channel, facts)
        connection.become(session)
        session.start()
        return
    if guard.log.broken:
        _refuse(connection, Refused((Failure(Reason.GUARD_LOG_FAILED),), peer.path, accepted.channel, facts))
        return
    decision = decide(guard.snapshot.policy, peer, None)
    rule = None if decision.rule is None else str(decision.rule)
    if not decision.allowed:
        failure = Failure(decision.reason, {"who": str(peer.identity), "rule": rule})
        connection.event("connection", {"decision": "deny", "rule": rule} | told(failure) | shown)
        accepted.channel.close()
        connection.transport.write(accepted.channel.take())
        connection.linger()
        return
    connection.event("connection", {"decision": "allow", "rule": rule, "reason": decision.reason.code} | shown)
    tunnel = Tunnel(connection, peer, accepted.channel)
    connection.become(tunnel)
    tunnel.start()


def _refuse(connection: Connection, refused: Refused) -> None:
    first = refused.failures[0]
    shown: dict[str, Any] = {}
    if refused.presented:
        leaf = refused.presented[0]
        shown = {"presented": label(leaf), "serial": serial_text(leaf.serial_number)}
    also = [failure.reason.code for failure in refused.failures[1:]] or None
    connection.event("connection", {"decision": "deny"} | told(first) | {"also": also} | shown)
    if refused.channel is not None and connection.guard.target.http:
        refusing = Refusing(connection, refused.channel, first.reason)
        connection.become(refusing)
        connection.set_deadline(connection.guard.limits.head)
        refusing.read()
        return
    if refused.channel is not None:
        refused.channel.close()
        connection.transport.write(refused.channel.take())
    connection.linger()
