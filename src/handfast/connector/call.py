"""One connection to the server: dialled, its handshake made, then a channel in the hands of one owner.

No byte of a local client is sent before the server has proved who it is.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Protocol, cast

from handfast.connector.words import Own, Verdict, broken, silent, unreachable, untrusted
from handfast.errors import Failure, Reason, VerificationFailed
from handfast.guard.places import join_address, no_way
from handfast.guard.transports import reset, tell, unread
from handfast.pki.verification import VerifiedPeer
from handfast.tls.channel import Channel, TlsBroken
from handfast.tls.client import ClientContext, ServerFacts

_YOUNG = 5.0  # seconds: a server that closes sooner than that did not simply tire of waiting


@dataclass(frozen=True, slots=True)
class Generation:
    """What is shown and trusted, swapped as one value."""

    context: ClientContext
    own: Own


@dataclass(frozen=True, slots=True)
class Route:
    """Where the server is, and how long it may take: in seconds, to connect and for the handshake."""

    host: str
    port: int
    connect: float = 5
    handshake: float = 10

    def __str__(self) -> str:
        return join_address(self.host, self.port)


class CallFailed(Exception):
    """There is no call; `verdict` says why. Never leaves the connector."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(verdict.failure.message)


class Owner(Protocol):
    """Who a finished call belongs to: the pool, then one local client."""

    def call_moved(self) -> None:
        """Records came: `read` may have something, or raise."""

    def call_ended(self, *, lost: bool) -> None:
        """The server's TCP has ended; nothing more will come. `lost`: nor can anything be sent."""

    def call_writable(self, yes: bool) -> None:
        """The way to the server is full, or free again."""

    def call_bug(self, bug: Exception) -> None:
        """One of the others raised what it should not: fail closed."""


class Call(asyncio.Protocol):
    """A connection to the server, from its first byte to its last."""

    __slots__ = (
        *("_channel", "_early", "_facts", "_handshake", "_peer", "began"),
        *("generation", "owner", "ready", "ready_at", "transport"),
    )

    transport: asyncio.Transport

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.owner: Owner | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.began = monotonic()
        self.ready_at = 0.0
        self._early = b""
        self._handshake = generation.context.connect(lambda: datetime.now(UTC))
        self._channel: Channel | None = None
        self._peer: VerifiedPeer | None = None
        self._facts: ServerFacts | None = None

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it
        self._step(b"")

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._channel is None:
            self._step(data)
            return
        self._channel.feed(data)
        if (owner := self.owner) is not None:
            tell(owner.call_bug, owner.call_moved)

    def eof_received(self) -> bool:
        """See asyncio.Protocol. True: our side may go on; whoever owns the call decides."""
        if (owner := self.owner) is not None:
            tell(owner.call_bug, owner.call_ended, lost=False)
        self._fail(broken(Failure(Reason.TLS_CLOSED), self.generation.own, (), datetime.now(UTC)))
        return self.owner is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._fail(broken(Failure(Reason.TLS_CLOSED), self.generation.own, (), datetime.now(UTC)))
        owner, self.owner = self.owner, None
        if owner is None:
            return
        if exc is not None and self._channel is not None and (rest := unread(self.transport)):
            self._channel.feed(rest)
        tell(owner.call_bug, owner.call_ended, lost=True)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        if (owner := self.owner) is not None:
            tell(owner.call_bug, owner.call_writable, False)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if (owner := self.owner) is not None:
            tell(owner.call_bug, owner.call_writable, True)

    # What owners call, once the call is ready.

    @property
    def peer(self) -> VerifiedPeer:
        """Who the server proved to be."""
        assert self._peer is not None
        return self._peer

    @property
    def facts(self) -> ServerFacts:
        """What the handshake settled."""
        assert self._facts is not None
        return self._facts

    @property
    def usable(self) -> bool:
        """Whether it is still open, as far as we know, and the server's certificate good."""
        return self._channel is not None and not self.transport.is_closing() and not self.expired

    @property
    def expired(self) -> bool:
        """Whether the server's certificate, or one above it, has ended: nothing more may go either way."""
        return datetime.now(UTC) >= self.peer.not_after

    @property
    def young(self) -> bool:
        """Whether it was ready only now."""
        return monotonic() - self.ready_at < _YOUNG

    @property
    def at_eof(self) -> bool:
        """Whether the server said that it sends no more (close_notify)."""
        assert self._channel is not None
        return self._channel.at_eof

    def read(self) -> bytes:
        """Return the next plain bytes; b'' when there are none, or with `at_eof`. Raises TlsBroken."""
        assert self._channel is not None
        if self._early:
            plain, self._early = self._early, b""
            return plain
        return self._channel.read()

    def peek(self) -> int:
        """Look at what came, for a refusal, and keep it for `read`; return how many bytes wait. Raises TlsBroken."""
        assert self._channel is not None
        while plain := self._channel.read():
            self._early += plain
        return len(self._early)

    def write(self, plain: bytes) -> None:
        """Send bytes. Raises TlsBroken."""
        assert self._channel is not None
        self._channel.write(plain)
        self.flush()

    def flush(self) -> None:
        """Send what TLS itself has to say, as in answer to a KeyUpdate."""
        assert self._channel is not None
        if (records := self._channel.take()) and not self.transport.is_closing():
            self.transport.write(records)

    def finish(self) -> None:
        """Say that we send no more; the server still may."""
        assert self._channel is not None
        self._channel.close()
        self.flush()

    def close(self) -> None:
        """End it in good order; its owner hears no more of it."""
        self.owner = None
        if self._channel is not None and not self.transport.is_closing():
            self.finish()
        self.transport.close()

    def cut(self) -> None:
        """End it so that the server cannot take what it got for the whole; its owner hears no more of it."""
        self.owner = None
        reset(self.transport)

    def why_broken(self, failure: Failure) -> Verdict:
        """Explain a `TlsBroken` of this call."""
        return broken(failure, self.generation.own, self.facts.accepted_authorities, datetime.now(UTC))

    def why_silent(self, *, cut: bool) -> Verdict:
        """Explain that the server closed before its first byte."""
        return silent(self.generation.own, self.facts.accepted_authorities, datetime.now(UTC), cut=cut)

    def _step(self, records: bytes) -> None:
        if self.ready.done():  # it failed; what still comes is nothing to us
            return
        try:
            channel = self._handshake.feed(records)
            if channel is not None:
                self._peer, self._facts = self._handshake.peer, self._handshake.facts
        except VerificationFailed as refused:
            self._fail(untrusted(refused.failures))
        except TlsBroken as error:
            self._fail(broken(error.failure, self.generation.own, (), datetime.now(UTC)))
        except Exception as bug:
            self.ready.set_exception(bug)
        else:
            if channel is not None:
                self._channel = channel
                self.ready_at = monotonic()
                if not self.ready.done():
                    self.ready.set_result(None)
        if out := self._handshake.take():  # an alert of ours, also where it failed
            self.transport.write(out)

    def _fail(self, verdict: Verdict) -> None:
        if not self.ready.done():
            self.ready.set_exception(CallFailed(verdict))


async def dial(route: Route, generation: Generation) -> Call:
    """Open a call and make its handshake. Raises CallFailed."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(route.connect):
            _, call = await loop.create_connection(lambda: Call(generation), route.host, route.port)
    except TimeoutError:
        raise CallFailed(unreachable(str(route), f"no answer in {route.connect:g} s")) from None
    except (OSError, UnicodeError) as error:
        raise CallFailed(unreachable(str(route), no_way(error))) from None
    try:
        async with asyncio.timeout(route.handshake):
            await call.ready
    except TimeoutError:
        call.transport.abort()
        late = Failure(Reason.TLS_TIMEOUT, {"limit": route.handshake})
        raise CallFailed(broken(late, generation.own, (), datetime.now(UTC))) from None
    except BaseException:
        call.transport.close()
        call.ready.cancel()
        raise
    return call


@dataclass(slots=True)
class _Listening:
    """The owner of a call that is only tried: it waits for the first word."""

    call: Call
    heard: asyncio.Future[None]

    def call_moved(self) -> None:
        try:
            if self.call.read():
                self._end(None)
            elif self.call.at_eof:
                self._end(CallFailed(self.call.why_silent(cut=False)))
        except TlsBroken as error:
            self._end(CallFailed(self.call.why_broken(error.failure)))

    def call_ended(self, *, lost: bool) -> None:
        self._end(CallFailed(self.call.why_silent(cut=True)))

    def call_writable(self, yes: bool) -> None:
        pass

    def call_bug(self, bug: Exception) -> None:
        self._end(bug)

    def _end(self, error: Exception | None) -> None:
        if self.heard.done():
            return
        if error is None:
            self.heard.set_result(None)
        else:
            self.heard.set_exception(error)


@dataclass(frozen=True, slots=True)
class Tried:
    """How a trial went. `answered`: the server spoke; else it only raised no objection for a while."""

    peer: VerifiedPeer
    facts: ServerFacts
    answered: bool


async def try_out(route: Route, generation: Generation) -> Tried:
    """Make one handshake and wait for an objection: in TLS 1.3 a server refuses after ours is done.

    Raises CallFailed.
    """
    call = await dial(route, generation)
    # An objection takes one round trip, and a handshake takes about two and the server's work.
    patience = min(2.0, max(0.3, 4 * (call.ready_at - call.began)))
    listening = _Listening(call, asyncio.get_running_loop().create_future())
    call.owner = listening
    listening.call_moved()
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await listening.heard
        answered = listening.heard.done() and not listening.heard.cancelled()
        return Tried(call.peer, call.facts, answered)
    finally:
        call.close()
