"""The guard as a whole: what is in force, who is connected, when trust ends, and how it stops.

One snapshot is in force at a time and is swapped as one value. Every half second each connection is asked
whether its time is up and whether its peer is still trusted.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from time import monotonic, time

from handfast.errors import Failure, HandfastError, Reason
from handfast.guard.connection import Connection, Listener
from handfast.guard.events import EventLog, told
from handfast.guard.listening import BACKLOG, cannot_listen, serve_unix
from handfast.guard.metrics import Metrics
from handfast.guard.places import join_address
from handfast.guard.routes import Snapshot
from handfast.guard.upstream import MORE_FILES

TICK = 0.5  # seconds; a trust that ended is acted on within two of them
FLUSH = 0.1  # seconds that an event may wait for its line in the log
_SPARE = (16, 128)  # descriptors, least and most, kept for apps, files and the log when clients take the rest


@dataclass(slots=True)
class Guard:
    """A running guard. `refresh` is asked each tick for a new snapshot; None keeps the one in force.

    `drain`: seconds that open requests have, once the guard is told to stop. `by_file`: whether its settings stand in
    a file, which remedies then name.
    """

    snapshot: Snapshot
    log: EventLog
    drain: float = 30.0
    refresh: Callable[[datetime], Snapshot | None] | None = None
    metrics: Metrics = field(default_factory=Metrics)
    connections: set[Connection] = field(default_factory=set)
    by_file: bool = False
    draining: bool = False
    drain_until: float = 0.0  # on the clock of `monotonic`
    loaded: float = field(default_factory=time)  # when the snapshot in force came, seconds since 1970
    _plugs: list[tuple[Callable[[], Connection], socket.socket]] = field(default_factory=list)
    _servers: list[asyncio.Server] = field(default_factory=list)
    _ceiling: int = field(default_factory=lambda: _ceiling())
    expected: int = 0  # of the connections, those that may yet need one to an app
    _room: int = 1 << 31  # descriptors for both
    _resuming: asyncio.Task[None] | None = None
    _full: bool = False  # no descriptor is left for another client: who connects waits in the kernel's queue
    _ticker: asyncio.TimerHandle | None = None
    _flusher: asyncio.TimerHandle | None = None
    _reload_failure: str = ""

    @property
    def now(self) -> datetime:
        """The instant by which chains are judged."""
        return datetime.now(UTC)

    async def listen(self, plug: socket.socket, listener: Listener) -> str:
        """Begin to serve on a socket that `bind` gave; return the address. Raises Unreachable (GUARD_LISTEN)."""
        loop = asyncio.get_running_loop()
        name = plug.getsockname()
        address = join_address(*name[:2]) if isinstance(name, tuple) else f"unix:{name}"
        make: Callable[[], Connection] = partial(Connection, self, listener)
        try:
            await self._accept(make, plug)
        except OSError as error:
            raise cannot_listen(address, error) from None
        self._plugs.append((make, plug))
        with plug.dup() as lowest:
            self._room = max(self._ceiling - lowest.fileno(), 1)
        if self._ticker is None:
            self._ticker = loop.call_later(TICK, self._tick)
            self._flusher = loop.call_later(FLUSH, self._flush)
        return address

    def crowded(self, descriptor: int) -> None:
        """Told of each client's descriptor: the kernel gives the lowest that is free, so a high one says it all.

        Accepting pauses then, before accept(2) fails: libuv would close those that wait, or ask without a pause. It
        pauses too while all that are left may be needed for the apps of who is here already.
        """
        if (descriptor >= self._ceiling or self._taken >= self._room) and not self._full and not self.draining:
            self._full = True
            self._close_servers()
            clients = len(self.connections)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            detail = f"{clients} clients, and {limit} open files for them, their connections to apps, and the rest"
            self.log.emit("accepting", self.now, {"paused": True, "detail": detail, "remedy": MORE_FILES})

    @property
    def _taken(self) -> int:
        """Descriptors that clients have, or may need for their apps."""
        return len(self.connections) + self.expected

    async def _accept(self, make: Callable[[], Connection], plug: socket.socket) -> None:
        """Accept from a socket, by a copy of it: it outlives a pause."""
        loop, copy = asyncio.get_running_loop(), plug.dup()
        try:
            if plug.family == socket.AF_UNIX:
                server = await serve_unix(make, copy)
            else:
                server = await loop.create_server(make, sock=copy, backlog=BACKLOG)
        except OSError:
            copy.close()
            raise
        if self.draining:  # it was told to stop meanwhile
            server.close()
        else:
            self._servers.append(server)

    async def _resume(self) -> None:
        """Accept again, once there is room for some."""
        try:
            with self._plugs[0][1].dup() as lowest:
                if lowest.fileno() >= self._ceiling - _SPARE[0] // 2 or self._taken >= self._room or self.draining:
                    return
            for make, plug in self._plugs:
                await self._accept(make, plug)
        except OSError:
            self._close_servers()
            return
        self._full = False
        self.log.emit("accepting", self.now, {"paused": False})

    def _close_servers(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def stop(self) -> None:
        """Take no more connections, let open requests finish within the drain limit, then end the rest."""
        self.draining = True
        self._close_servers()
        for _, plug in self._plugs:
            plug.close()
        self.drain_until = monotonic() + self.drain
        for connection in list(self.connections):
            connection.drain()
        while self.connections and monotonic() < self.drain_until:
            await asyncio.sleep(0.05)
        for connection in list(self.connections):
            connection.end(Failure(Reason.ENDED_STOPPED, {"limit": f"{self.drain:g}"}))
        if self._ticker is not None:
            self._ticker.cancel()
        if self._flusher is not None:
            self._flusher.cancel()
        await asyncio.sleep(0.05)  # for the transports to close: an event loop with open ones cannot end

    def swap(self, snapshot: Snapshot) -> None:
        """Put a new snapshot in force, at once and whole; connections that it does not allow end."""
        self.snapshot, self.loaded = snapshot, time()
        now = self.now
        for connection in list(self.connections):
            connection.recheck(now)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(TICK, self._tick)
        self.refresh_now()
        if self._full and not self.draining:
            self._resuming = loop.create_task(self._resume())  # held: the loop itself holds it weakly
        moment, now = monotonic(), self.now
        for connection in list(self.connections):
            connection.tick(moment, now)

    def _flush(self) -> None:
        self._flusher = asyncio.get_running_loop().call_later(FLUSH, self._flush)
        self.log.flush()

    def refresh_now(self) -> None:
        """Ask for a new snapshot, and put it in force."""
        if self.refresh is None:
            return
        try:
            snapshot = self.refresh(self.now)
            if snapshot is not None:
                self.swap(snapshot)
                self.log.emit("reload", self.now, {"outcome": "taken"})
                self.metrics.reload("taken", "")
            self._reload_failure = ""
        except HandfastError as error:  # what is in force stays, whole; said once per cause
            if self._reload_failure != str(error):
                self._reload_failure = str(error)
                self.log.emit("reload", self.now, {"outcome": "kept"} | told(error.failure))
                step = f"; next: {error.hint}" if error.hint else ""
                self.metrics.reload("kept", error.reason.code, f"{error}{step}")
        except Exception as bug:  # ours; time and trust must go on being looked at
            if self._reload_failure != repr(bug):
                self._reload_failure = repr(bug)
                failure = Failure(Reason.BUG, {"detail": repr(bug)[:200]})
                self.log.emit("reload", self.now, {"outcome": "kept"} | told(failure))
                self.metrics.reload("kept", failure.reason.code, failure.message)


def _ceiling() -> int:
    """The descriptor from which on a client's is one of the last."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    least, most = _SPARE
    return limit - max(least, min(most, limit // 8))


def raise_descriptor_limit() -> None:
    """Ask for as many file descriptors as the system gives: each client takes up to two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
