"""Calls kept ready: finished handshakes, idle, few, none older than a minute, each used once.

A call that is refused or dies while it waits is replaced, after a pause that grows while it happens again. None is
handed out, nor kept, once the server's certificate has ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic

from handfast.connector.call import Call, CallFailed
from handfast.connector.words import Verdict
from handfast.errors import Failure, Reason
from handfast.guard.transports import tell
from handfast.tls.channel import TlsBroken

# Seconds that a call may wait. The limit is a minute, at which servers such as nginx (client_header_timeout) end a
# connection that asks nothing; stay clear of it, or a request would meet the end half way.
MAX_AGE = 50.0
MAX_EARLY = 1 << 16  # bytes a server may say before it is asked anything, as a greeting
_PAUSES = (0.5, 30.0)  # seconds, shortest and longest


@dataclass(slots=True)
class Pool:
    """`size` calls kept ready; 0 keeps none. `told` hears why one could not be had: a Failure is a bug of ours."""

    dial: Callable[[], Awaitable[Call]]
    size: int
    told: Callable[[Verdict | Failure], None]
    _waiting: deque[_Waiting] = field(default_factory=deque)
    _dialling: set[asyncio.Task[None]] = field(default_factory=set)
    _pause: float = 0.0
    _not_before: float = 0.0
    _closed: bool = False

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Call | None:
        """The call that has waited longest, to be used once; None if none is ready."""
        while self._waiting:
            waiting = self._waiting.popleft()
            call = waiting.call
            if call.usable and monotonic() - call.ready_at < MAX_AGE:
                call.owner = None
                call.transport.resume_reading()
                self.fill()
                return call
            call.close()
        self.fill()
        return None

    def fill(self) -> None:
        """Begin what is missing, unless a pause is on."""
        if self._closed or monotonic() < self._not_before:
            return
        loop = asyncio.get_running_loop()
        while len(self._waiting) + len(self._dialling) < self.size:
            task = loop.create_task(self._add())
            self._dialling.add(task)
            task.add_done_callback(self._dialling.discard)

    def tick(self, moment: float) -> None:
        """Replace what has waited too long or is not to be trusted any more; fill up.

        `moment` is on the clock of `monotonic`.
        """
        for waiting in list(self._waiting):
            if moment - waiting.call.ready_at >= MAX_AGE or waiting.call.expired:
                self._waiting.remove(waiting)
                waiting.call.close()
        self.fill()

    def flush(self) -> None:
        """Drop all: they were made with what is in force no more."""
        for task in self._dialling:
            task.cancel()
        while self._waiting:
            self._waiting.popleft().call.close()
        self._pause = self._not_before = 0.0

    def close(self) -> None:
        """Drop all, for good."""
        self._closed = True
        self.flush()

    def died(self, waiting: _Waiting, why: Verdict | Failure | None) -> None:
        """A call that waits has ended; `why`: it was refused, or a bug of ours ended it."""
        if waiting not in self._waiting:
            return
        self._waiting.remove(waiting)
        waiting.call.close()
        if why is not None or waiting.call.young:
            self._rest()
        else:
            self._pause = 0.0
        if why is not None:
            self.told(why)

    async def _add(self) -> None:
        try:
            call = await self.dial()
        except CallFailed as failed:
            self._rest()
            self.told(failed.verdict)
            return
        except Exception as bug:  # ours; it is said, and the server not pressed by it
            self._rest()
            self.told(_bug(bug))
            return
        if self._closed or len(self._waiting) >= self.size:
            call.close()
            return
        waiting = _Waiting(call, self)
        self._waiting.append(waiting)
        call.owner = waiting
        tell(waiting.call_bug, waiting.call_moved)  # what came along with the end of the handshake

    def _rest(self) -> None:
        shortest, longest = _PAUSES
        self._pause = min(longest, max(shortest, self._pause * 2))
        self._not_before = monotonic() + self._pause


@dataclass(eq=False, slots=True)
class _Waiting:
    """The owner of a call that waits: it hears whether the server objects, and keeps what it says."""

    call: Call
    pool: Pool

    def call_moved(self) -> None:
        try:
            said = self.call.peek()
            self.call.flush()
        except TlsBroken as error:
            self.pool.died(self, self.call.why_broken(error.failure))
            return
        if self.call.at_eof:
            self.pool.died(self, None if said else self.call.why_silent(cut=False))
        elif said >= MAX_EARLY:
            self.call.transport.pause_reading()

    def call_ended(self, *, lost: bool) -> None:
        self.pool.died(self, self.call.why_silent(cut=True) if self.call.young else None)

    def call_writable(self, yes: bool) -> None:
        pass

    def call_bug(self, bug: Exception) -> None:
        self.pool.died(self, _bug(bug))


def _bug(bug: Exception) -> Failure:
    return Failure(Reason.BUG, {"detail": f"{type(bug).__name__}: {bug}"[:200]})
