"""How a client comes in, or does not: the states of a connection before and after its session.

Nothing in here can reach an app; `_admit` alone makes what can, out of a finished handshake.
"""

from __future__ import annotations

import re
from time import monotonic
from typing import TYPE_CHECKING, Any

from handfast.errors import Failure, Reason, RemoteProtocolError
from handfast.guard.checking import Checking
from handfast.guard.door import Door, no_rule
from handfast.guard.events import cut, refusal_body, told
from handfast.guard.http import HttpSession
from handfast.guard.http2 import Http2Session
from handfast.guard.http2_refusing import Http2Refusing
from handfast.guard.ocsp import Verdict
from handfast.guard.transports import LINGER, LINGER_BYTES, LONGEST_LINGER
from handfast.guard.tunnel import Tunnel
from handfast.pki.certificates import label, serial_text
from handfast.tls.channel import Channel
from handfast.tls.server import Accepted, Refused, ServerHandshake
from handfast.wire.alerts import Alert, alert_record
from handfast.wire.hello import HelloReader
from handfast.wire.http1 import MAX_HEAD, find_head, plain_response
from handfast.wire.proxy import read_proxy

if TYPE_CHECKING:
    from handfast.guard.connection import Connection

MAX_ALSO = 8  # further reasons that a refusal's log line names

_HANDSHAKE_RECORD = 0x16  # RFC 8446 5.1; every TLS connection begins with one
# What others begin with who take the port for another one, and what helps them.
_REQUEST = re.compile(rb"(?!PROXY )[A-Z]{1,16}(?: |$)")
_STRANGERS = {
    # https://www.postgresql.org/docs/current/protocol-message-formats.html, SSLRequest
    b"\x00\x00\x00\x08\x04\xd2\x16\x2f": (
        "a PostgreSQL client asks for TLS its own way: sslnegotiation=direct, or handfast connect beside it"
    ),
    b"PROXY ": "name the proxy that it came through: proxy_protocol_from",
    b"\r\n\r\n\x00\r\nQUIT\n": "name the proxy that it came through: proxy_protocol_from",
}


class Announced:
    """Behind a proxy that is believed: its header says who the client is. Without one nothing goes on."""

    __slots__ = ("_buffer", "_connection")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._buffer = b""

    def received(self, data: bytes) -> None:
        """Bytes of the header, and what follows it."""
        connection = self._connection
        self._buffer += data
        try:
            read = read_proxy(self._buffer)
        except RemoteProtocolError as error:
            connection.denied(error.failure)
            connection.abort()
            return
        if read is None:
            return
        proxied, used = read
        if proxied.endpoints is not None:
            connection.announced(proxied.endpoints.source)
        handshaking = Handshaking(connection)
        connection.become(handshaking)
        connection.enter()
        if not connection.transport.is_closing() and len(self._buffer) > used:
            handshaking.received(self._buffer[used:])

    def ended(self) -> None:
        """A health check of the proxy's, as often as not."""
        self._connection.abort()

    def writable(self, yes: bool) -> None:
        """Nothing is written here."""

    def lost(self) -> None:
        """Nothing to tidy."""

    def expired(self) -> None:
        """No header came."""
        self._connection.denied(Failure(Reason.TLS_TIMEOUT, {"limit": self._connection.limits.handshake}))
        self._connection.abort()


class Handshaking:
    """Before anyone is known: nothing but a TLS handshake is understood."""

    __slots__ = ("_asked", "_connection", "_early", "_handshake", "_hello")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._handshake: ServerHandshake | None = None  # made with the first byte: a silent client costs little
        self._hello: HelloReader | None = None  # where the site is chosen by the server name
        self._asked: str | None = None  # the server name that it gave there
        self._early = b""  # what the hello was read from

    def received(self, data: bytes) -> None:
        """Bytes of the handshake."""
        connection = self._connection
        if self._handshake is None:
            if self._hello is None and data[0] != _HANDSHAKE_RECORD:
                self._not_tls(data)
                return
            self._handshake = self._choose(data)
            if self._handshake is None:
                return
            data, self._early = self._early + data, b""
        outcome = self._handshake.feed(data)
        if outcome is not None and not self._same_name(outcome):
            return
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
        if self._handshake is not None or self._hello is not None:
            self._connection.denied(Failure(Reason.TLS_CLOSED))
        self._connection.abort()

    def writable(self, yes: bool) -> None:
        """A handshake's few records always fit."""

    def lost(self) -> None:
        """Nothing to tidy."""

    def expired(self) -> None:
        """Too slow: make room for others."""
        self._connection.denied(Failure(Reason.TLS_TIMEOUT, {"limit": self._connection.limits.handshake}))
        self._connection.abort()

    def _choose(self, data: bytes) -> ServerHandshake | None:
        """Choose the site, and begin the handshake with its own TLS generation: never change it within one.

        None while the hello is not all there, or when the client was turned away.
        """
        connection, guard = self._connection, self._connection.guard
        sites = guard.snapshot.sites[connection.listener.name]
        site = sites.only
        if site is None:
            self._hello = self._hello or HelloReader()
            try:
                hello = self._hello.feed(data)
            except RemoteProtocolError as error:
                self._turn_away(error.failure, Alert.DECODE_ERROR)
                return None
            if hello is None:
                self._early += data
                return None
            self._asked = hello.server_name
            site = sites.pick(hello.server_name)
            if site is None:
                self._turn_away(_unknown_name(hello.server_name), Alert.UNRECOGNIZED_NAME)
                return None
        connection.site = site
        return site.context.accept(lambda: guard.now)

    def _same_name(self, outcome: Accepted | Refused) -> bool:
        """Whether the handshake was for the site it began with.

        After a HelloRetryRequest the client says hello again, and may change only what RFC 8446 4.1.2 lists. OpenSSL
        takes the second's server name, when the site's terms are chosen long since.
        """
        if self._asked is None or outcome.facts is None or outcome.facts.server_name == self._asked:
            return True
        self._connection.denied(Failure(Reason.TLS_BAD_HELLO, {"detail": "it says hello twice, to two names"}))
        self._connection.abort()
        return False

    def _turn_away(self, failure: Failure, alert: Alert) -> None:
        self._connection.denied(failure)
        self._connection.transport.write(alert_record(alert))
        self._connection.linger()

    def _not_tls(self, data: bytes) -> None:
        connection = self._connection
        plain_http = connection.listener.http and _REQUEST.match(data) is not None
        failure = Failure(Reason.TLS_PLAIN_HTTP if plain_http else Reason.TLS_NOT_TLS)
        for begins, remedy in _STRANGERS.items():
            if data.startswith(begins):
                failure = Failure(Reason.TLS_NOT_TLS, {"remedy": remedy})
        connection.denied(failure)
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
        connection.linger(self._channel)


class Lingering:
    """All is said; what still comes is thrown away, until the peer has read what was said, or takes too long.

    Who was let in may have long answers to read, and uploads under way; who was not is told its few words and leaves.
    """

    __slots__ = ("_connection", "_left", "_moved", "_unsent", "_until")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._left = LINGER_BYTES
        self._moved = monotonic()  # when some of what waits for the peer was last seen to have gone
        self._until = self._moved + (LONGEST_LINGER if connection.entered else LINGER)
        self._unsent = connection.transport.get_write_buffer_size()  # bytes that wait, at the last look
        connection.set_deadline(LINGER)
        if connection.guard.draining:
            self.hurry()
        if not connection.transport.is_closing():
            connection.transport.write_eof()

    def hurry(self) -> None:
        """Throw away what comes for a moment only."""
        self._until = min(self._until, monotonic() + LINGER)
        self._connection.hurry()

    def received(self, data: bytes) -> None:
        """Throw it away, within bounds."""
        self._left -= len(data)
        if self._left < 0:
            self._connection.abort()
        else:
            self._connection.set_deadline(min(LINGER, self._until - monotonic()))

    def ended(self) -> None:
        """The peer has closed too."""
        self._connection.transport.close()

    def writable(self, yes: bool) -> None:
        """Nothing is written any more."""

    def lost(self) -> None:
        """Nothing to tidy."""

    def expired(self) -> None:
        """Long enough, unless the peer is reading what waits for it."""
        connection, moment = self._connection, monotonic()
        waited, self._unsent = self._unsent, connection.transport.get_write_buffer_size()
        if self._unsent < waited:
            self._moved = moment
        if waited and moment - self._moved < connection.limits.idle:
            connection.set_deadline(LINGER)
        else:
            connection.abort()


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


def _admit(connection: Connection, accepted: Accepted, verdict: Verdict | None = None) -> None:
    """Let in who proved who it is, if that still holds, its authority's responder agrees and no limit is reached."""
    guard, peer, facts, listener = connection.guard, accepted.peer, accepted.facts, connection.listener
    # The snapshot may have changed while the handshake ran (ztunnel#1986): judge by the one in force now.
    site = guard.snapshot.sites[listener.name].pick(facts.server_name)
    if site is None:
        _refuse_accepted(connection, accepted, _unknown_name(facts.server_name))
        return
    failure = None if site is connection.site else site.objection(peer, guard.now)
    if failure is not None and failure.reason is not Reason.ENDED_POLICY:  # what its policy says is said later
        _refuse_accepted(connection, accepted, failure)
        return
    if peer is not None and site.ocsp is not None:
        verdict = verdict or site.ocsp.known(peer, guard.now)
        if verdict is None:
            connection.become(Checking(connection, accepted, site.ocsp, _admit))
            return
        if verdict.failure is not None:
            _refuse_accepted(connection, accepted, verdict.failure)
            return
    connection.peer, connection.who = peer, None if peer is None else str(peer.identity)
    connection.facts = facts
    connection.belong_to(site)
    if (failure := connection.admit_identity()) is not None:
        connection.limited(failure)
        return
    if verdict is not None and verdict.unanswered is not None:
        connection.event("ocsp", {"decision": "allow"} | told(verdict.unanswered))
    (_open_http if listener.http else _open_tunnel)(connection, accepted, _shown(connection, accepted))


def _shown(connection: Connection, accepted: Accepted) -> dict[str, Any]:
    """What the log says of a handshake that was finished."""
    peer, facts = accepted.peer, accepted.facts
    shown: dict[str, Any] = {"server_name": facts.server_name or None}
    shown |= {"version": facts.version, "cipher": facts.cipher, "group": facts.group}
    shown["ms"] = round((monotonic() - connection.opened) * 1000, 1)
    if peer is None:
        return shown
    return {"authority": peer.identity.authority, "serial": serial_text(peer.leaf.serial_number)} | shown


def _open_http(connection: Connection, accepted: Accepted, shown: dict[str, Any]) -> None:
    """The policy is asked for each request."""
    connection.guard.metrics.handshake("accept", "", monotonic() - connection.opened, connection.listener.name)
    connection.event("connection", {"decision": "accept"} | shown)
    session = Http2Session if accepted.facts.alpn == b"h2" else HttpSession
    door = Door(connection, connection.site, accepted.peer, accepted.facts)
    connection.begin(session(connection, door, accepted.channel))


def _open_tunnel(connection: Connection, accepted: Accepted, shown: dict[str, Any]) -> None:
    """The policy is asked once, here."""
    guard = connection.guard
    if guard.log.broken:
        _refuse_accepted(connection, accepted, Failure(Reason.GUARD_LOG_FAILED))
        return
    tunnel = Tunnel(connection, accepted.channel)
    decision = tunnel.decide()
    rule = None if decision.rule is None else str(decision.rule)
    if not decision.allowed:
        failure = Failure(decision.reason, {"who": connection.who, "rule": rule})
        if decision.reason is Reason.POLICY_NO_RULE and accepted.peer is not None:
            failure = no_rule(accepted.peer, None, connection.site.asked_for(accepted.peer), by_file=guard.by_file)
        connection.denied(failure, {"rule": rule} | shown)
        connection.linger(accepted.channel)
        return
    guard.metrics.handshake("accept", "", monotonic() - connection.opened, connection.listener.name)
    connection.event("connection", {"decision": "allow", "rule": rule, "reason": decision.reason.code} | shown)
    connection.begin(tunnel)


def _unknown_name(name: str) -> Failure:
    return Failure(Reason.TLS_UNKNOWN_NAME, {"name": cut(name) or "nothing (it sent no server name)"})


def _refuse_accepted(connection: Connection, accepted: Accepted, failure: Failure) -> None:
    presented = () if accepted.peer is None else accepted.peer.path
    _refuse(connection, Refused((failure,), presented, accepted.channel, accepted.facts))


def _refuse(connection: Connection, refused: Refused) -> None:
    first = refused.failures[0]
    shown: dict[str, Any] = {}
    if refused.presented:
        leaf = refused.presented[0]
        shown = {"presented": cut(label(leaf)), "serial": serial_text(leaf.serial_number)}
    if refused.facts is not None:
        shown["server_name"] = cut(refused.facts.server_name) or None
    also = list(dict.fromkeys(failure.reason.code for failure in refused.failures[1:]))[:MAX_ALSO] or None
    connection.denied(first, {"also": also} | shown)
    if refused.channel is not None and connection.listener.http and refused.facts is not None:
        teller = Http2Refusing if refused.facts.alpn == b"h2" else Refusing
        refusing = teller(connection, refused.channel, first.reason)
        connection.become(refusing)
        connection.set_deadline(connection.limits.head)
        refusing.read()
        return
    connection.linger(refused.channel)
