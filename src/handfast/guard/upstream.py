"""The way to the app: groups of backends, and the connections to them.

A connection to a backend belongs to one client connection and is never shared, so no answer can reach the wrong
client, and no identity another's request. `Upstreams` chooses the backend; `Upstream` and `SecureUpstream` are
one connection, in the clear and over TLS of our own, and look the same to their owner.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Protocol, cast

from handfast.errors import Failure, Reason, RemoteProtocolError, VerificationFailed
from handfast.guard.places import Target, no_way
from handfast.guard.schema import HealthConfig
from handfast.guard.transports import reset, tell, unread, was_reset
from handfast.pki.verification import VerifiedPeer
from handfast.tls.channel import Channel, TlsBroken
from handfast.wire.proxy import proxy_v2
from handfast.wire.usual import Answers

_ALERT = b"\x15\x03"  # how a record with an alert begins, in every version of TLS (RFC 8446 5.1)
FRESH = 1.0  # seconds that a connection may have rested for what cannot be asked again: the app may be closing it
EXPECTED = 1.0  # seconds for an app to say that it wants the body; then we do: many apps never say it
LOOK = 1.0  # seconds between two looks at whether an app's certificate has ended
MORE_FILES = "raise its limit of open files: `ulimit -n`, or LimitNOFILE= of systemd"
_REST = (0.2, 30.0)  # seconds, shortest and longest, that a backend which took no connection is left alone


class Owner(Protocol):
    """Who an upstream connection belongs to."""

    def upstream_open(self, upstream: Upstream | SecureUpstream) -> None:
        """It can be written to."""

    def upstream_failed(self, failure: Failure) -> None:
        """It could not be opened; or, after `upstream_open`, it may not go on: nothing more comes of it."""

    def upstream_data(self, data: bytes) -> None:
        """The app sent bytes."""

    def upstream_ended(self) -> None:
        """The app sends no more; it may still read."""

    def upstream_lost(self, reset: bool) -> None:
        """It is closed; `reset`: in the midst of things, so what came may be cut short."""

    def upstream_writable(self, yes: bool) -> None:
        """The way to the app is full, or free again."""

    def upstream_bug(self, bug: Exception) -> None:
        """One of the others raised what it should not: fail closed."""


class Handshake(Protocol):
    """Our side of a TLS handshake with a backend; it has verified the server when it gives a channel."""

    def feed(self, records: bytes) -> Channel | None:
        """Go on with what the network brought (b'' to begin). Raises TlsBroken or VerificationFailed."""

    def take(self) -> bytes:
        """Return the records that wait to be sent."""

    @property
    def peer(self) -> VerifiedPeer | None:
        """Who the server is, once there is a channel."""


@dataclass(slots=True)
class Backend:
    """One place where the app runs, and how it fares."""

    target: Target
    connections: int = 0
    dialling: int = 0  # connections that are not open yet
    healthy: bool = True  # by the health checks; without any it stays so
    refusals: int = 0  # connections in a row that it did not take
    rest_until: float = 0.0  # on the clock of `monotonic`

    def usable(self, moment: float) -> bool:
        """Whether it may be chosen before others."""
        return self.healthy and moment >= self.rest_until

    def took(self) -> None:
        """It took a connection."""
        self.refusals, self.rest_until = 0, 0.0

    def refused(self, moment: float) -> None:
        """It took none: leave it alone for a while, twice as long each time; what fails at one time counts once."""
        if moment < self.rest_until:
            return
        shortest, longest = _REST
        self.rest_until = moment + min(longest, shortest * 2 ** min(self.refusals, 10))
        self.refusals += 1


@dataclass(slots=True)
class Upstreams:
    """Backends that serve alike. They outlive snapshots, so that counts and health do.

    `handshake` begins TLS towards a backend, where its target asks for it. `retries`: how many other backends are
    tried when one takes no connection. `proxy`: whether each connection begins with a PROXY header;
    `proxy_certificate`: with the client's certificate in it, which small readers refuse.
    """

    name: str
    backends: tuple[Backend, ...]
    handshake: Callable[[Target], Handshake] | None = None
    round_robin: bool = False
    retries: int = 2
    connect: float = 5.0  # seconds
    response: float | None = None  # seconds; None: the listener's
    proxy: bool = False
    proxy_certificate: bool = False
    health: HealthConfig | None = None
    answers: Answers = field(default_factory=Answers, repr=False, compare=False)
    _turn: int = field(default=0, repr=False)

    @property
    def target(self) -> Target:
        """The first backend's; all of a group speak alike."""
        return self.backends[0].target

    def __str__(self) -> str:
        return self.name

    def choose(self, moment: float, tried: Sequence[Backend] = ()) -> Backend | None:
        """Return the backend for the next connection, the usable first; None when all were tried."""
        left = [backend for backend in self.backends if backend not in tried]
        usable = [backend for backend in left if backend.usable(moment)] or left
        if not usable:
            return None
        self._turn += 1
        start = self._turn % len(usable)
        turned = usable[start:] + usable[:start]
        return turned[0] if self.round_robin else min(turned, key=lambda one: one.connections + one.dialling)

    def dial(self, owner: Owner, preface: bytes = b"") -> asyncio.Task[None]:
        """Open a connection for `owner`, which hears how it went. Cancel the task to give up.

        `preface` is sent before anything else, in the clear.
        """
        return asyncio.get_running_loop().create_task(self._dial(owner, preface))

    def dial_one(self, backend: Backend, owner: Owner) -> asyncio.Task[None]:
        """Open a connection to this backend alone, whatever is thought of it."""
        return asyncio.get_running_loop().create_task(self._dial_one(backend, owner))

    async def _dial_one(self, backend: Backend, owner: Owner) -> None:
        _hand_over(owner, await _open(backend, owner, self, proxy_v2(None) if self.proxy else b""))

    async def _dial(self, owner: Owner, preface: bytes) -> None:
        tried: list[Backend] = []
        opened: Upstream | SecureUpstream | Failure
        opened = Failure(Reason.UPSTREAM_DOWN, {"target": self.name, "detail": "it has no backend"})
        while len(tried) <= self.retries and (backend := self.choose(monotonic(), tried)) is not None:
            tried.append(backend)
            backend.dialling += 1
            try:
                opened = await _open(backend, owner, self, preface)
            finally:
                backend.dialling -= 1
            if not isinstance(opened, Failure):
                backend.took()
                break
            if isinstance(opened, _Shortage):
                break
            backend.refused(monotonic())
        _hand_over(owner, opened)


class Upstream(asyncio.Protocol):
    """One connection to a backend, in the clear."""

    __slots__ = ("_backend", "_owner", "_transport", "pause", "resume", "write", "write_eof")

    def __init__(self, owner: Owner, backend: Backend) -> None:
        self._owner: Owner | None = owner
        self._backend = backend

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        made = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it
        self._transport = made
        self._backend.connections += 1
        # One call less for each piece of data: these are the transport's own.
        self.write, self.write_eof = made.write, made.write_eof
        self.pause, self.resume = made.pause_reading, made.resume_reading

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None:
            try:
                owner.upstream_data(data)
            except Exception as bug:
                owner.upstream_bug(bug)

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None:
            if was_reset(self._transport):
                self._owner = None
                tell(owner.upstream_bug, owner.upstream_lost, True)
            else:
                tell(owner.upstream_bug, owner.upstream_ended)
        return self._owner is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._backend.connections -= 1
        if exc is not None and (data := unread(self._transport)):
            self.data_received(data)
        owner, self._owner = self._owner, None
        if owner is not None:
            tell(owner.upstream_bug, owner.upstream_lost, exc is not None)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None:
            tell(owner.upstream_bug, owner.upstream_writable, False)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None:
            tell(owner.upstream_bug, owner.upstream_writable, True)

    @property
    def usable(self) -> bool:
        """Whether it is still open, as far as we know."""
        return self._owner is not None and not self._transport.is_closing()

    def blame(self) -> None:
        """It ended without an answer: choose others before its backend for a while."""
        self._backend.refused(monotonic())

    def close(self) -> None:
        """Close it when what was written is sent; the owner hears no more of it."""
        self._owner = None
        self._transport.close()

    def drop(self, *, cut: bool = False) -> None:
        """Close it at once; the owner hears no more of it.

        `cut`: what was sent is not whole, and the app must not take a quiet end for its end: reset it.
        """
        self._owner = None
        _abort(self._transport, cut=cut)


class SecureUpstream(asyncio.Protocol):
    """One connection to a backend, over TLS, until its certificate ends.

    `opened` is done once the server is verified, or failed.
    """

    __slots__ = (
        *("_backend", "_channel", "_handshake", "_held", "_looking", "_owner", "_transport", "_trusted_until"),
        "opened",
    )

    _transport: asyncio.Transport
    _trusted_until: datetime  # set once the server is verified

    def __init__(self, owner: Owner, backend: Backend, handshake: Handshake, opened: asyncio.Future[None]) -> None:
        self._owner: Owner | None = owner
        self._backend = backend
        self._handshake = handshake
        self._channel: Channel | None = None
        self._held = False  # by the owner, who reads no more for now
        self._looking: asyncio.TimerHandle | None = None
        self.opened = opened

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        self._backend.connections += 1

    def begin(self, preface: bytes) -> None:
        """Say the first words."""
        self._transport.write(preface)
        self._greet(b"")

    def start(self) -> None:
        """Read on: the owner knows that it is open."""
        self._look()
        if not self._held and self._owner is not None:
            self._transport.resume_reading()
            self.data_received(b"")

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is None:
            return
        try:
            if self._channel is None:
                self._greet(data)
            else:
                if data:
                    self._channel.feed(data)
                self._read(owner, self._channel)
        except Exception as bug:
            owner.upstream_bug(bug)

    def eof_received(self) -> bool:
        """See asyncio.Protocol. An end without close_notify may be a cut (RFC 8446 6.1)."""
        if self._channel is not None and self._channel.at_eof:
            return self._owner is not None
        self.connection_lost_early()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._backend.connections -= 1
        if self._looking is not None:
            self._looking.cancel()
        if exc is not None and (data := unread(self._transport)):
            self.data_received(data)
        if exc is None and self._channel is not None and self._channel.at_eof:
            owner, self._owner = self._owner, None
            if owner is not None:
                tell(owner.upstream_bug, owner.upstream_lost, False)
        else:
            self.connection_lost_early()

    def connection_lost_early(self) -> None:
        """It ended before it said that it would."""
        if not self.opened.done():
            self.opened.set_exception(ConnectionError("it closed in the midst of the TLS handshake"))
        owner, self._owner = self._owner, None
        if owner is not None and self._channel is not None:
            tell(owner.upstream_bug, owner.upstream_lost, True)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None and self._channel is not None:
            tell(owner.upstream_bug, owner.upstream_writable, False)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None and self._channel is not None:
            tell(owner.upstream_bug, owner.upstream_writable, True)

    @property
    def usable(self) -> bool:
        """Whether it is still open, as far as we know."""
        return self._owner is not None and self._channel is not None and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send bytes to the app."""
        assert self._channel is not None
        self._channel.write(data)
        self._transport.write(self._channel.take())

    def write_eof(self) -> None:
        """Say that no more is sent."""
        assert self._channel is not None
        self._channel.close()
        self._transport.write(self._channel.take())

    def pause(self) -> None:
        """Read no more for now."""
        self._held = True
        self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self._held = False
        self._transport.resume_reading()

    def blame(self) -> None:
        """It ended without an answer: choose others before its backend for a while."""
        self._backend.refused(monotonic())

    def close(self) -> None:
        """Close it when what was written is sent; the owner hears no more of it."""
        self._owner = None
        if self._channel is not None and not self._transport.is_closing():
            self.write_eof()
        self._transport.close()

    def drop(self, *, cut: bool = False) -> None:
        """As Upstream.drop."""
        self._owner = None
        _abort(self._transport, cut=cut)

    def _greet(self, records: bytes) -> None:
        try:
            channel = self._handshake.feed(records)
        except (TlsBroken, VerificationFailed) as refused:
            self._transport.write(self._handshake.take())
            if not self.opened.done():
                self.opened.set_exception(refused)
            return
        self._transport.write(self._handshake.take())
        if channel is not None and not self.opened.done():
            peer = self._handshake.peer
            assert peer is not None
            self._channel, self._trusted_until = channel, peer.not_after
            self._transport.pause_reading()  # until `start`: the owner hears that it is open before anything else
            self.opened.set_result(None)

    def _look(self) -> None:
        """End it once the app's certificate has ended.

        It is looked at again and again: the loop's clock and that of certificates drift apart when the one is set, or
        when the machine sleeps.
        """
        if self._owner is None or self._transport.is_closing():
            return
        left = (self._trusted_until - datetime.now(UTC)).total_seconds()
        if left > 0:
            self._looking = asyncio.get_running_loop().call_later(min(left, LOOK), self._look)
            return
        owner, self._owner = self._owner, None
        target = str(self._backend.target)
        detail = "its certificate expired during the connection"
        facts = {"target": target, "detail": detail, "remedy": f"renew the certificate of {target}"}
        tell(owner.upstream_bug, owner.upstream_failed, Failure(Reason.UPSTREAM_TLS, facts))
        if not self._transport.is_closing():
            reset(self._transport)

    def _read(self, owner: Owner, channel: Channel) -> None:
        while True:
            try:
                plain = channel.read()
            except TlsBroken:  # the app's; what the owner does with its client's channel is its own
                self.drop()
                owner.upstream_lost(True)
                return
            if not plain:
                break
            owner.upstream_data(plain)
            if self._owner is None:
                return
        if records := channel.take():
            self._transport.write(records)
        if channel.at_eof:
            owner.upstream_ended()


def _hand_over(owner: Owner, opened: Upstream | SecureUpstream | Failure) -> None:
    """Tell the owner how it went."""
    if isinstance(opened, Failure):
        tell(owner.upstream_bug, owner.upstream_failed, opened)
        return
    tell(owner.upstream_bug, owner.upstream_open, opened)
    if isinstance(opened, SecureUpstream):
        opened.start()


async def _open(
    backend: Backend, owner: Owner, group: Upstreams, preface: bytes
) -> Upstream | SecureUpstream | Failure:
    target, loop = backend.target, asyncio.get_running_loop()
    made: list[Upstream | SecureUpstream] = []
    opened: asyncio.Future[None] = loop.create_future()

    def protocol() -> Upstream | SecureUpstream:
        if target.tls:
            assert group.handshake is not None
            made.append(SecureUpstream(owner, backend, group.handshake(target), opened))
        else:
            made.append(Upstream(owner, backend))
        return made[-1]

    try:
        async with asyncio.timeout(group.connect):
            if target.path:
                await loop.create_unix_connection(protocol, target.path)
            else:
                await loop.create_connection(protocol, target.host, target.port)
            upstream = made[-1]
            if isinstance(upstream, SecureUpstream):
                upstream.begin(preface)
                await opened
            elif preface:
                upstream.write(preface)
            return upstream
    except TimeoutError:
        failure = _down(target, f"no answer in {group.connect:g} s")
    except (TlsBroken, VerificationFailed) as refused:
        facts = {"target": str(target), "detail": refused.failure.message}
        if refused.failure.facts.get("alert") == "protocol_version":  # RFC 8446 6.2
            facts["remedy"] = 'it may speak TLS 1.2 at most: tls_min = "1.2" in its [upstream.NAME] allows that'
        failure = Failure(Reason.UPSTREAM_TLS, facts)
    except (OSError, UnicodeError) as error:
        failure = _down(target, no_way(error))
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            failure = _Shortage(
                failure.reason, failure.facts | {"remedy": f"the guard itself is short of them: {MORE_FILES}"}
            )
    except asyncio.CancelledError:
        _discard(made)
        raise
    except Exception as bug:  # ours; who waits for the connection must hear of it
        failure = Failure(Reason.UPSTREAM_BUG, {"target": str(target), "detail": repr(bug)[:200]})
    _discard(made)
    if opened.done() and not opened.cancelled():
        opened.exception()  # looked at, so that the loop does not complain of it
    return failure


class _Shortage(Failure):
    """No descriptor was left here for a connection: the backend was never asked."""


def _abort(transport: asyncio.Transport, *, cut: bool) -> None:
    if cut:
        reset(transport)
    else:
        transport.abort()


def _discard(made: list[Upstream | SecureUpstream]) -> None:
    for upstream in made:
        if hasattr(upstream, "_transport"):  # else it never came to a connection
            upstream.drop()


def cut_short(group: Upstreams) -> Failure:
    """What became of an answer that its app did not finish."""
    return Failure(Reason.UPSTREAM_BAD_RESPONSE, {"target": str(group), "detail": "it closed in the midst of it"})


def bad_answer(group: Upstreams, error: RemoteProtocolError) -> Failure:
    """What became of a request whose app's answer could not be read."""
    detail = error.facts.get("detail", error.failure.message)
    return Failure(Reason.UPSTREAM_BAD_RESPONSE, {"target": str(group), "detail": detail})


def unanswered(group: Upstreams, begun: bytes = b"") -> Failure:
    """What became of a request whose app closed before an answer; `begun` is what came of one.

    A server of TLS ends so when it is spoken to in the clear, perhaps with an alert (RFC 8446 5.1, 6).
    """
    target, facts = group.target, {"target": str(group)}
    secure = replace(target, tls=True)
    if begun.startswith(_ALERT) and not target.tls:
        facts |= {"detail": "a TLS alert", "remedy": f"it speaks TLS: write {secure}"}
        return Failure(Reason.UPSTREAM_BAD_RESPONSE, facts)
    facts |= {"detail": "it closed without an answer", "remedy": "its own log may say why"}
    if not target.tls:
        facts |= {
            "detail": "it closed without an answer; perhaps it speaks TLS",
            "remedy": f"if it speaks TLS, write {secure}; if not, its own log may say why",
        }
    return Failure(Reason.UPSTREAM_DOWN, facts)


def _down(target: Target, detail: str) -> Failure:
    return Failure(Reason.UPSTREAM_DOWN, {"target": str(target), "detail": detail})
