"""The connector as a whole: where it listens, who may call, what is in force, and how it stops."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from cryptography import x509

from handfast.connector.call import Call, Generation, Route, dial
from handfast.connector.local import Local, peer_of
from handfast.connector.pool import Pool
from handfast.connector.words import Verdict
from handfast.errors import Failure, HandfastError, Reason
from handfast.guard.events import EventLog, told
from handfast.guard.places import join_address
from handfast.pki.certificates import label

TICK = 0.25  # seconds
LOOK = 1.0  # seconds between two looks at the files
FLUSH = 0.05  # seconds that an event may wait for its line in the log
_ACCEPTS = 64  # connections taken in one go, so that those that are open get their turn
_REST = 0.5  # seconds without accepting once descriptors have run out
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Limits:
    """How many and how long, in seconds."""

    connections: int = 10_000
    quiet: float = 3  # without a word from the server, until it counts as having taken us
    idle: float = float("inf")  # without a byte either way
    drain: float = 30  # for open connections, once the connector is told to stop


@dataclass(slots=True)
class Connector:
    """A running connector. `look` is asked each second for a new generation; see files.Watch.

    `uids`: the local users who may call over a UNIX socket; empty: whoever can open it.
    """

    route: Route
    generation: Generation
    log: EventLog
    limits: Limits = field(default_factory=Limits)
    pool_size: int = 1
    uids: frozenset[int] = frozenset()
    look: Callable[[datetime], Generation | HandfastError | None] | None = None
    connections: set[Local] = field(default_factory=set)
    opening: set[Local] = field(default_factory=set)  # accepted, and not among the connections yet
    hurried: bool = False  # set while it stops: end at once what is open
    pool: Pool = field(init=False)
    _plugs: list[socket.socket] = field(default_factory=list)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    _next_look: float = 0.0
    _pool_cause: str = ""
    _starved: bool = False
    _full_told: float = 0.0

    def __post_init__(self) -> None:
        self.pool = Pool(self.dial, self.pool_size, self._pool_failed)

    @property
    def now(self) -> datetime:
        """The instant by which certificates are judged."""
        return datetime.now(UTC)

    async def dial(self) -> Call:
        """Open a call under what is in force. Raises CallFailed."""
        return await dial(self.route, self.generation)

    def listen(self, plug: socket.socket) -> None:
        """Begin to serve on a listening socket that does not block."""
        self._plugs.append(plug)
        asyncio.get_running_loop().add_reader(plug, self._accept, plug)
        if not self._timers:
            self._tick()
            self._flush()
            self.pool.fill()

    async def stop(self) -> None:
        """Take no more connections, let open ones finish within the drain limit, then end the rest."""
        loop = asyncio.get_running_loop()
        for plug in self._plugs:
            loop.remove_reader(plug)
            plug.close()
        self._plugs.clear()
        self.pool.close()
        deadline = monotonic() + self.limits.drain
        while self.connections and not self.hurried and monotonic() < deadline:
            await asyncio.sleep(0.05)
        for connection in list(self.connections):
            connection.abort("drained")
        for timer in self._timers.values():
            timer.cancel()
        await asyncio.sleep(0.05)  # for the transports to close: an event loop with open ones cannot end

    def swap(self, generation: Generation) -> None:
        """Put a new generation in force for the calls to come; open ones go on as they are."""
        self.generation = generation
        self.pool.flush()
        self.pool.fill()
        leaf = generation.own.chain[0]
        self.event("reload", {"outcome": "taken", "certificate": label(leaf), "until": leaf.not_valid_after_utc})

    def expired(self, leaf: x509.Certificate) -> Failure:
        """What is said of a certificate of ours that has expired while it was in use."""
        facts = {"subject": label(leaf), "not_after": leaf.not_valid_after_utc}
        return Failure(Reason.CONNECT_EXPIRED, facts | {"next": f"run: {self.generation.own.renew}"})

    def event(self, event: str, fields: dict[str, Any]) -> None:
        """Log an event."""
        self.log.emit(event, self.now, fields)

    def _accept(self, plug: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            try:
                taken, address = plug.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._rest(plug, error)
                return
            self._starved = False
            taken.setblocking(False)
            self._admit(taken, address)

    def _admit(self, plug: socket.socket, address: object) -> None:
        peer = peer_of(plug)
        who: dict[str, Any] = {}
        if peer is not None:
            who = {"uid": peer[0], "pid": peer[1]}
        elif isinstance(address, tuple):
            who = {"address": join_address(str(address[0]), int(address[1]))}
        failure = None
        if self.uids and (peer is None or peer[0] not in self.uids):
            failure = Failure(Reason.CONNECT_USER, {"uid": "?" if peer is None else peer[0]})
        elif len(self.connections) + len(self.opening) >= self.limits.connections:
            failure = Failure(Reason.CONNECT_FULL, {"limit": self.limits.connections})
        if failure is not None:
            self._turn_away(plug, failure, who)
            return
        local = Local(self, who)
        self.opening.add(local)
        task = asyncio.get_running_loop().create_task(self._take(plug, local))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, plug: socket.socket, local: Local) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: local, plug)
        except OSError:  # it was gone by then
            plug.close()
        finally:
            self.opening.discard(local)

    def _turn_away(self, plug: socket.socket, failure: Failure, who: dict[str, Any]) -> None:
        plug.close()
        moment = monotonic()
        if failure.reason is Reason.CONNECT_FULL:  # once a second is enough
            if moment - self._full_told < 1:
                return
            self._full_told = moment
        self.event("refused", who | told(failure))

    def _rest(self, plug: socket.socket, error: OSError) -> None:
        """Accept nothing for a moment: those who wait stay in the backlog."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(plug)
        loop.call_later(_REST, self._resume, plug)
        if not self._starved:
            self._starved = True
            what = "open files" if error.errno in (errno.EMFILE, errno.ENFILE) else "memory"
            if error.errno not in _EXHAUSTED:
                what = os.strerror(error.errno or 0).lower()
            self.event("paused", told(Failure(Reason.CONNECT_DESCRIPTORS, {"what": what})))

    def _resume(self, plug: socket.socket) -> None:
        if plug in self._plugs:
            asyncio.get_running_loop().add_reader(plug, self._accept, plug)
            self._accept(plug)

    def _tick(self) -> None:
        self._timers["tick"] = asyncio.get_running_loop().call_later(TICK, self._tick)
        moment = monotonic()
        for connection in list(self.connections):
            connection.tick(moment)
        if moment >= self._next_look:
            self._next_look = moment + LOOK
            self._look()
        self.pool.tick(moment)
        if len(self.pool):
            self._pool_cause = ""

    def _flush(self) -> None:
        self._timers["flush"] = asyncio.get_running_loop().call_later(FLUSH, self._flush)
        self.log.flush()

    def _look(self) -> None:
        if self.look is None:
            return
        try:
            found = self.look(self.now)
        except Exception as bug:  # ours; connections must go on being looked at
            found = HandfastError(Reason.BUG, detail=repr(bug)[:200])
        match found:
            case Generation():
                self.swap(found)
            case HandfastError():
                self.event("reload", {"outcome": "kept"} | told(found.failure))
            case None:
                pass

    def _pool_failed(self, why: Verdict | Failure) -> None:
        cause, fields = (why.message, told(why)) if isinstance(why, Failure) else (why.cause, why.fields())
        if cause != self._pool_cause:  # said once for each cause
            self._pool_cause = cause
            self.event("pool", fields)
