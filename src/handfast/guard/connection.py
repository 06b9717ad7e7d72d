"""One client's connection, from its first byte to its last.

Theory of operation. A connection is always in one state, and a state is an object:

    (Announced ->) Handshaking (-> Checking) --accepted--> a session: HTTP/1.1, HTTP/2 or Tunnel
                     |  \\--refused, can be told--> Refusing --answered--+
                     \\----refused------------------------------------> Lingering --> closed

Only sessions can reach an app. A Tunnel cannot be made without a VerifiedPeer, unless its listener asks for no
certificate; an HTTP session cannot be made without a Door, which judges each of its requests. Lingering shuts
down the write side and reads on for a moment: closing at once would send RST, and the peer would lose the
alert or the answer that says why.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_address
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, cast

from handfast.errors import Failure, Reason
from handfast.guard.checking import look_again
from handfast.guard.entry import Announced, Gone, Handshaking, Lingering, Refusing
from handfast.guard.events import Logged, encode, refusal_body, request_facts, told
from handfast.guard.http import HttpSession
from handfast.guard.http2_refusing import Http2Refusing
from handfast.guard.limits import Gate
from handfast.guard.places import join_address
from handfast.guard.routes import Site
from handfast.guard.upstream import Upstreams
from handfast.pki.certificates import common_names, fingerprint
from handfast.pki.verification import VerifiedPeer
from handfast.tls.channel import Channel, TlsBroken
from handfast.tls.server import Facts
from handfast.wire.proxy import Address, Endpoints, TlsFacts, proxy_v2

if TYPE_CHECKING:
    from handfast.guard.service import Guard
    from handfast.wire.http1 import RequestHead

LAST_MOMENT = 2.0  # seconds for a handshake, and for the one request after it, once the guard is told to stop
MAX_UNREAD = 4 << 20  # bytes that may wait for a client that does not read; the app is paused long before


@dataclass(frozen=True, slots=True)
class Limits:
    """How long, in seconds, and how much."""

    handshake: float = 10  # from the first byte of the connection to the end of the handshake
    head: float = 10  # from the first byte of a request to the end of its head
    idle: float = 75  # between requests, or without a byte either way
    response: float = 60  # from the request to the head of its response
    tunnel_idle: float | None = None  # without a byte either way in TCP mode or a websocket; None: for ever
    max_body: int | None = None  # bytes of a request's body


@dataclass(slots=True)
class Listener:
    """One address that is listened on: what it speaks, whom it believes a PROXY header, and its limits."""

    name: str
    http: bool
    limits: Limits
    gate: Gate | None = None
    proxy_from: tuple[IPv4Network | IPv6Network, ...] = ()


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


class Session(State, Protocol):
    """A state that may reach an app."""

    def start(self) -> None:
        """Begin with what came along with the last of the handshake."""

    def finish(self) -> None:
        """Finish what is under way, and nothing more."""

    def still_allowed(self) -> bool:
        """Whether the site now in force allows what is under way."""


class Connection(asyncio.Protocol):
    """The transport's side: owns the socket, the deadline and the id; the state does the rest."""

    __slots__ = (
        *("_entered", "_full", "_may_need_app", "_prefix", "_session", "_state", "address", "by", "cut", "deadline"),
        *("facts", "gate", "guard", "host", "id", "limits", "listener", "opened", "peer", "site", "transport", "who"),
    )

    transport: asyncio.Transport
    site: Site  # set once the server name is known

    def __init__(self, guard: Guard, listener: Listener) -> None:
        self.guard = guard
        self.listener = listener
        self.limits = listener.limits
        self.gate = listener.gate
        self.id = secrets.token_hex(6)
        self.peer: VerifiedPeer | None = None
        self.who: str | None = None  # the peer's identity, as logs say it
        self.by: str | None = None  # its authority, where authorities have names: then it is half of who it is
        self.facts: Facts | None = None
        self.cut: Failure | None = None  # why we closed it, in the midst of something
        self.deadline = 0.0
        self.address = ""
        self.host = ""  # the address without its port; '' over a UNIX socket
        self._state: State = Handshaking(self)
        self._session: Session | None = None
        self._entered: list[str | None] = []  # what the gate let in: the address, then the identity
        self._full = False  # the way to the client is
        self._may_need_app = False
        self._prefix = b""  # what all log lines of requests have in common

    # What the event loop calls. An exception in here is a bug of ours, and refuses.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it
        self.opened = monotonic()
        self._have(self._made)

    def _made(self) -> None:
        transport = self.transport
        name = transport.get_extra_info("peername")
        if isinstance(name, tuple):
            self._come_from(_unmapped(name[0]), name[1])
        self.guard.connections.add(self)
        self._may_need_app = True
        self.guard.expected += 1
        plug = transport.get_extra_info("socket")
        self.guard.crowded(-1 if plug is None else plug.fileno())
        self.guard.metrics.connection_opened(self.listener.name)
        self.set_deadline(self.limits.handshake)
        if self.guard.draining:
            self.hurry()
        if self.listener.proxy_from and self._believed(self.host):
            self.become(Announced(self))
        else:
            self.enter()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        try:
            self._state.received(data)
        except Exception as bug:
            self.bug(bug)

    def eof_received(self) -> bool:
        """See asyncio.Protocol. True: our side stays open until we have said what there is to say."""
        self._have(self._state.ended)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        guard = self.guard
        guard.connections.discard(self)
        guard.metrics.connection_closed(self.listener.name)
        if self._entered and self.gate is not None:
            self.gate.leave(self.host, self.counted_as)
        self._need_no_app()
        state, self._state, self._session = self._state, Gone(), None
        self._have(state.lost)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._full = True
        self._have(self._state.writable, False)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._full = False
        self._have(self._state.writable, True)

    # What the guard calls.

    def tick(self, moment: float, now: datetime) -> None:
        """Act on the deadline and on the end of trust by time. `moment` is on the clock of `monotonic`."""
        self._have(self._tick, moment, now)

    def _tick(self, moment: float, now: datetime) -> None:
        if moment >= self.deadline:
            self._state.expired()
        elif self.peer is not None and now >= self.peer.not_after:
            self.end_trust(Failure(Reason.ENDED_EXPIRED))
        else:
            if isinstance(self._state, HttpSession):
                self._state.rest(moment)
            if self.peer is not None and self.site.ocsp is not None:
                look_again(self, now)

    def belong_to(self, site: Site) -> None:
        """Be judged by this site from now on, and named as it names its clients' authorities."""
        self.site, self._prefix = site, b""
        self.by = (self.peer and site.asked_for(self.peer)) or None

    def recheck(self, now: datetime) -> None:
        """Act on a new snapshot: a peer that it does not trust, or cannot judge, is cut off."""
        if self._session is None or self.facts is None:
            return
        try:
            sites = self.guard.snapshot.sites.get(self.listener.name)
            site = None if sites is None else sites.pick(self.facts.server_name)
            failure = Failure(Reason.ENDED_POLICY) if site is None else site.objection(self.peer, now)
            if failure is None and site is not None:
                self.belong_to(site)
                failure = None if self._session.still_allowed() else Failure(Reason.ENDED_POLICY)
        except Exception as bug:
            self.bug(bug)
            return
        if failure is not None:
            self.end_trust(failure)

    def drain(self) -> None:
        """Finish what is under way, and nothing more. Who is coming in may ask once: a hand-over refuses nobody."""
        if self._session is not None:
            self._have(self._session.finish)
        elif isinstance(self._state, Handshaking | Announced):
            self.hurry()
        if isinstance(self._state, Lingering):
            self._state.hurry()

    def hurry(self) -> None:
        """Leave the present state no more than a moment."""
        self.deadline = min(self.deadline, monotonic() + LAST_MOMENT)

    def end_trust(self, failure: Failure) -> None:
        """Cut the peer off: nothing more goes either way."""
        self.event("ended", {"decision": "deny"} | told(failure))
        self.end(failure)

    def end(self, failure: Failure) -> None:
        """Close at once, for this reason: what is under way is logged with it."""
        self.guard.metrics.ended(failure.reason.code)
        self.cut = failure
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        self.deadline = inf
        self.transport.abort()

    # What the states call.

    def enter(self) -> None:
        """Be counted; too many are turned away before they cost anything."""
        if self.gate is None:
            return
        failure = self.gate.admit_connection(self.host)
        if failure is None:
            self._entered.append(self.host)
            failure = self.gate.admit_handshake(self.host, monotonic())
        if failure is not None:
            self.limited(failure)

    def denied(self, failure: Failure, more: dict[str, Any] | None = None) -> None:
        """Log and count a client that does not come in."""
        took = monotonic() - self.opened
        self.guard.metrics.handshake("deny", failure.reason.code, took, self.listener.name)
        self.event("connection", {"decision": "deny"} | told(failure) | (more or {}))

    def limited(self, failure: Failure) -> None:
        """Turn the client away: a limit is reached."""
        self.guard.metrics.limited(failure.reason.code)
        self.event("connection", {"decision": "deny"} | told(failure))
        self.abort()

    def announced(self, source: Address | bytes) -> None:
        """Take the client's address from a proxy that is believed."""
        if isinstance(source, Address):
            self._come_from(source.host, source.port)
        else:
            self.address = self.host = ""

    def preface(self, upstreams: Upstreams) -> bytes:
        """What a connection to these backends begins with: a PROXY header that tells whose it is, or nothing."""
        if not upstreams.proxy:
            return b""
        facts, peer = self.facts, self.peer
        assert facts is not None
        leaf = None if peer is None else peer.leaf
        names = () if leaf is None else common_names(leaf)
        tls = TlsFacts(
            version=facts.version,
            cipher=facts.cipher,
            alpn=facts.alpn,
            server_name=facts.server_name,
            verified=leaf is not None,
            common_name=names[0].value if names else "",
            certificate=peer.leaf_der if peer is not None and upstreams.proxy_certificate else b"",
        )
        here = self.transport.get_extra_info("sockname")
        if not self.host or not isinstance(here, tuple):  # over a UNIX socket; readers skip the TLVs of LOCAL
            return proxy_v2(Endpoints(b"", b""), tls)
        port = int(self.address.rpartition(":")[2])
        return proxy_v2(Endpoints(Address(self.host, port), Address(here[0], here[1])), tls)

    def _log_unusual(self, logged: Logged, took: float) -> None:
        """Log a request with all that there is to say of it."""
        admission, timing = logged.admission, logged.timing
        first = round((timing.first_byte - timing.began) * 1000, 1) if timing.first_byte else None
        fields = json.loads(b"{%b}" % admission.note)
        fields |= {"request": f"{self.id}-{logged.number}", "status": logged.status or None}
        fields |= {"ms": round(took * 1000, 1), "app_ms": first, "outcome": logged.outcome}
        fields |= {"bytes_in": timing.bytes_in, "bytes_out": timing.bytes_out}
        self.event("request", fields | ({} if logged.failure is None else told(logged.failure)))

    def log_request(self, logged: Logged) -> None:
        """Count and log a request that was forwarded: its line is mostly made already, where it went as usual."""
        number, admission, status, timing, failure, outcome = logged
        guard, name, began = self.guard, self.listener.name, timing.began
        took = monotonic() - began
        guard.metrics.request(name, admission.effect, admission.reason, status, took)
        guard.metrics.bytes(name, timing.bytes_in, timing.bytes_out)
        if failure is not None or outcome is not None or not (timing.first_byte and status and guard.log.plain):
            self._log_unusual(logged, took)
            return
        if not self._prefix:
            common: dict[str, str | None] = {"event": "request", "id": self.id, "listener": self.listener.name}
            common |= {"address": self.address, "peer": self.who} | ({} if self.by is None else {"by": self.by})
            self._prefix = encode(common)[1:-1] + b',"request":"%b-' % self.id.encode()
        took, app = int(took * 10_000), int((timing.first_byte - began) * 10_000)  # tenths of a millisecond
        guard.log.emit_line(
            b'%b%d","status":%d,"ms":%d.%d,"app_ms":%d.%d,"bytes_in":%d,"bytes_out":%d,%b}\n'
            % (
                *(self._prefix, number, status, took // 10, took % 10, app // 10, app % 10),
                *(timing.bytes_in, timing.bytes_out, admission.note),
            )
        )

    def refuse_request(
        self, number: int, head: RequestHead | None, failure: Failure, began: float | None
    ) -> tuple[int, bytes]:
        """Count and log a request that the guard answers in place of an app; return the answer's status and its body.

        `began`: when a request that was let through did, on the clock of `monotonic`; None: it was not.
        """
        request_id, status, metrics = f"{self.id}-{number}", failure.reason.http or 403, self.guard.metrics
        decision, took = ("deny", 0.0) if began is None else ("allow", monotonic() - began)
        metrics.request(self.listener.name, decision, failure.reason.code, status, took)
        if failure.reason is Reason.LIMIT_REQUESTS:
            metrics.limited(failure.reason.code)
        said = {"request": request_id, "decision": decision, "rule": failure.facts.get("rule"), "status": status}
        facts = {} if head is None else request_facts(head.method, head.host, head.path)
        self.event("request", said | facts | told(failure))
        return status, refusal_body(failure.reason, request_id)

    def set_deadline(self, seconds: float | None) -> None:
        """Give the present state so long; None: for ever."""
        self.deadline = inf if seconds is None else monotonic() + seconds

    def become(self, state: State) -> None:
        """Go over to another state."""
        self._state = state
        if isinstance(state, Refusing | Http2Refusing | Lingering):
            self._need_no_app()

    def _need_no_app(self) -> None:
        """Give back the descriptor that was kept free for a connection to the app."""
        if self._may_need_app:
            self._may_need_app = False
            self.guard.expected -= 1

    def send(self, records: bytes) -> None:
        """Send records to the client; one that takes nothing while it makes us write is cut off."""
        self.transport.write(records)
        if self._full and self.transport.get_write_buffer_size() > MAX_UNREAD:
            self.abort()

    def begin(self, session: Session) -> None:
        """Go over to a session, which may reach an app."""
        self._state = self._session = session
        session.start()

    def admit_identity(self) -> Failure | None:
        """Have the gate count the peer, once it is known."""
        if self.gate is None or self.peer is None:
            return None
        authority = self.peer.identity.authority  # the same name of two authorities is two identities
        if self.site.context.terms.bundle.names:  # another site may call another authority alike
            authority += f" {fingerprint(self.peer.path[-1])}"
        key = f"{authority} {self.who}"
        failure = self.gate.admit_identity(key, monotonic())
        if failure is None:
            self._entered.append(key)
        return failure

    @property
    def counted_as(self) -> str | None:
        """What the gate counts the peer as."""
        return self._entered[1] if len(self._entered) > 1 else None

    @property
    def entered(self) -> bool:
        """Whether it came to a session: its peer is known, or need not be."""
        return self._session is not None

    def linger(self, channel: Channel | None = None) -> None:
        """Say no more (over a TLS channel that it is the end), and wait a moment for the peer to read what was said."""
        if channel is not None:
            channel.close()
            self.transport.write(channel.take())
        self.become(Lingering(self))

    def event(self, event: str, fields: dict[str, Any]) -> None:
        """Log an event of this connection."""
        made = {"id": self.id, "listener": self.listener.name, "address": self.address}
        made |= {"peer": self.who, "by": self.by} | fields
        self.guard.log.emit(event, self.guard.now, made)

    def _come_from(self, host: str, port: int) -> None:
        self.address, self.host = join_address(host, port), host

    def _believed(self, host: str) -> bool:
        """Whether a PROXY header is taken from who connected; over a UNIX socket its mode says who may."""
        if not host:
            return True
        address = ip_address(host.partition("%")[0])
        return any(address in network for network in self.listener.proxy_from)

    def later(self, seconds: float, happen: Callable[..., None], *what: object) -> None:
        """Let something happen after so long, as `_have` does."""
        asyncio.get_running_loop().call_later(seconds, self._have, happen, *what)

    def _have(self, happen: Callable[..., None], *what: object) -> None:
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


def _unmapped(host: str) -> str:
    """An IPv4 address that a socket for both tells in IPv6's clothes, as itself (RFC 4291 2.5.5.2)."""
    return host.removeprefix("::ffff:") if "." in host else host
