"""The guard as a whole: what is in force, who is connected, when trust ends, and how it stops.

One snapshot is in force at a time and is swapped as one value. Every half second each connection is asked
whether its time is up and whether its peer is still trusted.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic

from handfast.errors import Failure, HandfastError, Reason, Unreachable
from handfast.guard.connection import Connection
from handfast.guard.events import EventLog, told
from handfast.guard.places import Target, join_address
from handfast.pki.verification import VerifiedPeer, still_trusted
from handfast.policy import Policy, admits
from handfast.tls.server import ServerContext

TICK = 0.5  # seconds; a trust that ended is acted on within two of them
FLUSH = 0.05  # seconds that an event may wait for its line in the log
BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how much, in seconds and bytes."""

    handshake: float = 10  # from the first byte of the connection to the end of the handshake
    head: float = 10  # from the first byte of a request to the end of its head
    idle: float = 75  # between requests, or without a byte either way
    connect: float = 5  # to the app
    response: float = 60  # from the request to the head of its response
    drain: float = 30  # for open requests, once the guard is told to stop


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that decides: the TLS generation (credential, bundle, revocations) and the policy."""

    context: ServerContext
    policy: Policy

    def objection(self, peer: VerifiedPeer, now: datetime) -> Failure | None:
        """Why a connected peer may not stay; None if it may."""
        failure = still_trusted(peer, self.context.terms, now)
        if failure is not None:
            return failure
        return None if admits(self.policy, peer) else Failure(Reason.ENDED_POLICY)


@dataclass(slots=True)
class Guard:
    """A running guard. `refresh` is asked each tick for a new snapshot; None keeps the one in force."""

    snapshot: Snapshot
    target: Target
    log: EventLog
    limits: Limits = field(default_factory=Limits)
    refresh: Callable[[datetime], Snapshot | None] | None = None
    connections: set[Connection] = field(default_factory=set)
    draining: bool = False
    _servers: list[asyncio.Server] = field(default_factory=list)
    _ticker: asyncio.TimerHandle | None = None
    _flusher: asyncio.TimerHandle | None = None
    _reload_failure: str = ""

    @property
    def now(self) -> datetime:
        """The instant by which chains are judged."""
        return datetime.now(UTC)

    async def listen(self, plug: socket.socket) -> str:
        """Begin to serve on a socket that `bind` gave; return the address. Raises Unreachable (GUARD_LISTEN)."""
        loop = asyncio.get_running_loop()
        host, port = plug.getsockname()[:2]
        try:
            server = await loop.create_server(lambda: Connection(self), sock=plug, backlog=BACKLOG)
        except OSError as error:
            raise _cannot_listen(host, port, error) from None
        self._servers.append(server)
        if self._ticker is None:
            self._ticker = loop.call_later(TICK, self._tick)
            self._flusher = loop.call_later(FLUSH, self._flush)
        return join_address(host, port)

    async def stop(self) -> None:
        """Take no more connections, let open requests finish within the drain limit, then end the rest."""
        self.draining = True
        for server in self._servers:
            server.close()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.drain
        for connection in list(self.connections):
            connection.drain()
        while self.connections and loop.time() < deadline:
            await asyncio.sleep(0.05)
        for connection in list(self.connections):
            connection.abort()
        if self._ticker is not None:
            self._ticker.cancel()
        if self._flusher is not None:
            self._flusher.cancel()
        await asyncio.sleep(0.05)  # for the transports to close: an event loop with open ones cannot end

    def swap(self, snapshot: Snapshot) -> None:
        """Put a new snapshot in force, at once and whole; connections that it does not allow end."""
        self.snapshot = snapshot
        now = self.now
        for connection in list(self.connections):
            connection.recheck(now)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(TICK, self._tick)
        self._refresh()
        moment, now = monotonic(), self.now
        for connection in list(self.connections):
            connection.tick(moment, now)

    def _flush(self) -> None:
        self._flusher = asyncio.get_running_loop().call_later(FLUSH, self._flush)
        self.log.flush()

    def _refresh(self) -> None:
        if self.refresh is None:
            return
        try:
            snapshot = self.refresh(self.now)
            if snapshot is not None:
                self.swap(snapshot)
                self.log.emit("reload", self.now, {"outcome": "taken"})
            self._reload_failure = ""
        except HandfastError as error:  # what is in force stays, whole; said once per cause
            if self._reload_failure != str(error):
                self._reload_failure = str(error)
                kept = {"outcome": "kept", "reason": error.reason.code, "detail": str(error)}
                self.log.emit("reload", self.now, kept)
        except Exception as bug:  # ours; time and trust must go on being looked at
            if self._reload_failure != repr(bug):
                self._reload_failure = repr(bug)
                failure = Failure(Reason.BUG, {"detail": repr(bug)[:200]})
                self.log.emit("reload", self.now, {"outcome": "kept"} | told(failure))


def raise_descriptor_limit() -> None:
    """Ask for as many file descriptors as the system gives: each client takes up to two."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def bind(host: str, port: int) -> socket.socket:
    """Take an address for a guard to listen on; who connects waits for it. Raises Unreachable (GUARD_LISTEN)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        plug = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from None
    try:
        if os.name == "posix":
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        plug.setblocking(False)
        plug.bind(address)
        plug.listen(BACKLOG)  # at once: two that are bound with SO_REUSEADDR would not mind each other until then
    except OSError as error:
        plug.close()
        raise _cannot_listen(host, port, error) from None
    return plug


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> Unreachable:
    detail = "it is not an address of this machine"
    if isinstance(error, socket.gaierror):
        detail = "the host is not known here"
    elif isinstance(error, OSError) and error.errno:
        detail = os.strerror(error.errno).lower()
    return Unreachable(Reason.GUARD_LISTEN, address=join_address(host, port), detail=detail)
