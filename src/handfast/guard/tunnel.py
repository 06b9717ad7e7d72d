"""TCP mode: the bytes of one verified peer, both ways, unread."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from handfast.errors import Failure, Reason
from handfast.guard.events import told
from handfast.guard.upstream import SecureUpstream, Upstream
from handfast.policy import Decision, Effect, decide_by
from handfast.tls.channel import Channel

if TYPE_CHECKING:
    from handfast.guard.connection import Connection


class Tunnel:
    """A connection that was allowed as a whole. Backpressure: each side is read only while the other takes."""

    __slots__ = (
        *(
            "_answered",
            "_asked",
            "_blocked",
            "_channel",
            "_connection",
            "_dialling",
            "_full",
            "_in",
            "_moved",
            "_out",
            "_upstream",
        ),
    )

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self._connection = connection
        self._channel = channel
        self._upstream: Upstream | SecureUpstream | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._full = True  # nothing is read from the client until there is somewhere to put it
        self._blocked = False  # the way to the client is full
        self._asked = self._answered = False  # whether the client, and the app, said that they send no more
        self._in = self._out = 0  # bytes, as the app reads and writes them
        self._moved = 0  # of both, when the deadline was last looked at

    def decide(self) -> Decision:
        """Whether the peer may have the connection, by the site now in force."""
        connection = self._connection
        route = connection.site.routes[0]
        if route.anonymous:
            return Decision(Effect.ALLOW, None, Reason.POLICY_OPEN_ROUTE)
        if connection.peer is None:
            return Decision(Effect.DENY, None, Reason.VERIFY_NO_CERTIFICATE)
        return decide_by(connection.site.rules_about(route.policy, connection.peer), None)

    def start(self) -> None:
        """Dial the app: the decision is made."""
        connection = self._connection
        connection.transport.pause_reading()
        self._connection.set_deadline(self._connection.limits.tunnel_idle)
        upstreams = connection.site.routes[0].upstreams
        self._dialling = upstreams.dial(self, connection.preface(upstreams))

    # The client's side.

    def received(self, data: bytes) -> None:
        """Records from the client."""
        channel, upstream = self._channel, self._upstream
        channel.feed(data)
        if upstream is not None and not self._full and (plain := channel.read()):
            self._in += len(plain)
            upstream.write(plain)
            if not channel.more and not channel.at_eof:
                return  # what TLS itself may have to answer goes out with the next bytes
        self._pump()

    def ended(self) -> None:
        """The client's TCP ended. Without close_notify before it the stream may be cut short: pass no end on."""
        if not self._channel.at_eof:
            self._connection.abort()

    def writable(self, yes: bool) -> None:
        """The way to the client is full, or free again."""
        self._blocked = not yes
        if self._upstream is not None and self._upstream.usable:
            (self._upstream.resume if yes else self._upstream.pause)()

    def lost(self) -> None:
        """The client is gone."""
        if self._dialling is not None:
            self._dialling.cancel()
        if self._upstream is not None:
            self._upstream.drop(cut=not self._channel.at_eof)
        self._log_end()

    def expired(self) -> None:
        """Nothing moved for a while, if there is a limit to that."""
        moved = self._in + self._out
        if moved != self._moved:
            self._moved = moved
            self._connection.set_deadline(self._connection.limits.tunnel_idle)
            return
        limit = self._connection.limits.tunnel_idle
        self._connection.event("ended", told(Failure(Reason.ENDED_IDLE, {"limit": f"{limit:g}"})))
        self._connection.abort()

    def finish(self) -> None:
        """A tunnel goes on until the drain limit."""

    def still_allowed(self) -> bool:
        """Whether the site now in force allows it."""
        return self.decide().allowed

    # The app's side.

    def upstream_open(self, upstream: Upstream | SecureUpstream) -> None:
        """See Owner."""
        self._upstream = upstream
        self._full = False
        if self._blocked:
            upstream.pause()
        self._connection.transport.resume_reading()
        self._pump()

    def upstream_failed(self, failure: Failure) -> None:
        """See Owner."""
        self._connection.event("upstream", told(failure))
        if self._upstream is None:
            self._close()
        else:  # in the midst of things: the client must not take it for the end
            self._upstream = None
            self._connection.abort()

    def upstream_data(self, data: bytes) -> None:
        """See Owner."""
        self._out += len(data)
        self._channel.write(data)
        self._connection.send(self._channel.take())

    def upstream_ended(self) -> None:
        """See Owner. Half-closed: the client may still send."""
        if self._channel.at_eof:
            self._close()
            return
        self._answered = True
        self._channel.close()
        if records := self._channel.take():
            self._connection.send(records)

    def upstream_lost(self, reset: bool) -> None:
        """See Owner."""
        if reset:  # no close_notify: the client must not take it for the end
            self._upstream = None
            self._connection.abort()
        else:
            self._close()

    def upstream_bug(self, bug: Exception) -> None:
        """See Owner."""
        self._connection.bug(bug)

    def upstream_writable(self, yes: bool) -> None:
        """See Owner."""
        self._full = not yes
        _flow(self._connection.transport, yes)
        if yes:
            self._pump()

    def _pump(self) -> None:
        upstream = self._upstream
        while not self._full and upstream is not None and upstream.usable:
            plain = self._channel.read()
            if not plain:
                break
            self._in += len(plain)
            upstream.write(plain)
        if self._channel.at_eof and not self._asked and upstream is not None and upstream.usable:
            self._asked = True
            upstream.write_eof()
            if self._answered:
                self._close()
                return
        if records := self._channel.take():  # answers of TLS itself, as to a KeyUpdate
            self._connection.send(records)

    def _log_end(self) -> None:
        took = round((monotonic() - self._connection.opened) * 1000, 1)
        self._connection.guard.metrics.bytes(self._connection.listener.name, self._in, self._out)
        self._connection.event("closed", {"bytes_in": self._in, "bytes_out": self._out, "ms": took})

    def _close(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None
        self._channel.close()
        if records := self._channel.take():
            self._connection.send(records)
        if not self._connection.transport.is_closing():
            self._connection.transport.resume_reading()
            self._log_end()
            self._connection.linger()


def _flow(transport: asyncio.Transport, yes: bool) -> None:
    if yes:
        transport.resume_reading()
    else:
        transport.pause_reading()
