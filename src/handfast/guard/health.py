"""Health checks: each backend asked now and then whether it serves, beside what connections to it tell.

A backend is up again after `rise` good answers in a row, and down after `fall` bad ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from time import monotonic

from handfast.errors import Failure, RemoteProtocolError
from handfast.guard.events import EventLog
from handfast.guard.places import Speech
from handfast.guard.schema import HealthConfig
from handfast.guard.upstream import Backend, SecureUpstream, Upstream, Upstreams
from handfast.wire.http1 import MAX_HEAD, find_head, parse_response_head

_TURN = 0.25  # seconds between two looks at what is due


class HealthChecks:
    """Checks the groups that ask for it, for as long as it runs. `groups` is asked anew, since snapshots change."""

    def __init__(self, groups: Callable[[], Iterable[Upstreams]], log: EventLog) -> None:
        self._groups = groups
        self._log = log
        self._task: asyncio.Task[None] | None = None
        self._due: dict[int, float] = {}  # by the backend's identity, on the clock of `monotonic`
        self._streaks: dict[int, int] = {}  # good answers in a row, or bad ones as a negative number
        self._asking: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """End."""
        for task in (self._task, *self._asking):
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        while True:
            now = monotonic()
            seen = set()
            for group in self._groups():
                if group.health is None:
                    continue
                for backend in group.backends:
                    seen.add(id(backend))
                    if now >= self._due.get(id(backend), 0.0):
                        self._due[id(backend)] = now + group.health.interval.total_seconds()
                        task = asyncio.get_running_loop().create_task(self._ask(group, backend, group.health))
                        self._asking.add(task)
                        task.add_done_callback(self._asking.discard)
            for gone in set(self._due) - seen:
                self._due.pop(gone)
                self._streaks.pop(gone, None)
            await asyncio.sleep(_TURN)

    async def _ask(self, group: Upstreams, backend: Backend, health: HealthConfig) -> None:
        probe = _Probe(backend, health.path)
        task = group.dial_one(backend, probe)
        try:
            async with asyncio.timeout(health.timeout.total_seconds()):
                fault = await probe.answered
        except TimeoutError:
            fault = f"no answer in {health.timeout.total_seconds():g} s"
        finally:
            task.cancel()
            probe.close()
        streak = self._streaks.get(id(backend), 0)
        streak = min(streak, 0) - 1 if fault else max(streak, 0) + 1
        self._streaks[id(backend)] = streak
        up = backend.healthy
        if not up and streak >= health.rise:
            backend.healthy = True
        elif up and streak <= -health.fall:
            backend.healthy = False
        if backend.healthy is not up:
            said = {"upstream": group.name, "target": str(backend.target), "healthy": backend.healthy}
            self._log.emit("health", datetime.now(UTC), said | {"detail": fault or None})


class _Probe:
    """The owner of a connection that only asks whether the backend serves."""

    def __init__(self, backend: Backend, path: str | None) -> None:
        self.answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._backend = backend
        self._path = path
        self._upstream: Upstream | SecureUpstream | None = None
        self._answer = b""

    def close(self) -> None:
        """Let go of the connection."""
        if self._upstream is not None:
            self._upstream.drop()

    def upstream_open(self, upstream: Upstream | SecureUpstream) -> None:
        """See Owner."""
        self._upstream = upstream
        if self._path is None or not self._backend.target.http or self._backend.target.speech is Speech.HTTP2:
            self._say("")
            return
        host = self._backend.target.host or "localhost"
        lines = (f"GET {self._path} HTTP/1.1", f"Host: {host}", "User-Agent: handfast-health", "Connection: close")
        upstream.write("".join(f"{line}\r\n" for line in (*lines, "")).encode())

    def upstream_failed(self, failure: Failure) -> None:
        """See Owner."""
        self._say(failure.message)

    def upstream_data(self, data: bytes) -> None:
        """See Owner."""
        self._answer = (self._answer + data)[: MAX_HEAD + 1]
        try:
            end = find_head(self._answer)
            if end >= 0:
                status = parse_response_head(self._answer[:end], b"GET").status
                self._say("" if 200 <= status < 400 else f"status {status}")
        except RemoteProtocolError as error:
            self._say(f"no answer of HTTP: {error.failure.message}")

    def upstream_ended(self) -> None:
        """See Owner."""
        self._say("it closed without an answer")

    def upstream_lost(self, reset: bool) -> None:
        """See Owner."""
        self._say("it closed without an answer")

    def upstream_writable(self, yes: bool) -> None:
        """The one request always fits."""

    def upstream_bug(self, bug: Exception) -> None:
        """See Owner."""
        self._say(repr(bug)[:200])

    def _say(self, fault: str) -> None:
        """What is wrong with it; '' for nothing."""
        if not self.answered.done():
            self.answered.set_result(fault)
