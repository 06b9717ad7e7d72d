"""Worker processes that share ports, and the parent that keeps them running.

The parent accepts nothing and reads no byte of a client: it forks, waits, restarts and passes signals on. It knows
nothing of what a worker does.

Theory of operation. With SO_REUSEPORT the kernel spreads connections over the sockets of a port by a hash of their
addresses. Each worker serves one of these sockets; the parent keeps all of them open. So when a worker dies, its
socket lives on: connections that hash to it wait in its queue, where the next life of the worker finds them, and
none is refused. Had the parent closed it, the kernel would have reset those that waited. UNIX sockets, and those
that systemd made, cannot be doubled; all workers accept from the one queue.

There is one loop around poll(2). A signal writes its number into a pipe that the loop waits on, so none is lost
between a look and a sleep. Each worker has a pipe to the parent, on which it says that it serves, or why it ends.
    starting  --all ready-->  serving  --SIGTERM, SIGINT, handed over-->  stopping  -->  over
What ends unasked while starting ends the whole: the same settings would fail again. While serving it is restarted.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

from handfast.errors import Exit, Failure, HandfastError, Reason
from handfast.guard.events import told
from handfast.guard.handover import Attempt, Handed, say_failed, say_ready
from handfast.guard.sandbox import end_with_parent, thread_count
from handfast.guard.systemd import notify, watchdog_interval

FIRST_DELAY, LONGEST_DELAY = 0.1, 30.0  # seconds before a restart, doubled each time
LONG_LIFE = 2.0  # seconds of serving after which a worker's deaths are forgotten: it can start

_RELOAD = 10.0  # seconds for workers to take new settings before systemd is told that it is done
_ADMIN_STOP = 2.0  # seconds for the admin process to end, once the workers have
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
_MAX_WORDS = 4096  # bytes that a worker may say at once: PIPE_BUF, so that they arrive whole

Say = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Worker:
    """What one worker process has. `index` counts from 0; the admin process has -1.

    `report` is a datagram socket, non-blocking: workers write to it, the admin process reads. None: no admin.
    A full queue raises BlockingIOError, and then a report is lost.
    """

    index: int
    sockets: tuple[socket.socket, ...]
    report: socket.socket | None
    _parent: int
    _pipe: int

    def ready(self) -> None:
        """Say that it serves: once at first, and again when a SIGHUP has been acted on.

        Call it after a change of user, since that makes the kernel forget that we end with our parent.
        """
        with suppress(OSError):
            os.write(self._pipe, b"ready\n")
        end_with_parent(signal.SIGTERM)
        if os.getppid() != self._parent:
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. There is one worker for each entry of `sockets`.

    `run` is called in each worker, again in each of its lives, in a process without threads or an event loop: it
    reads its settings itself, so that a restart gets those of today, and returns an exit code. SIGTERM asks it to
    drain and end, SIGHUP to read its settings anew. SIGINT it never gets: Ctrl-C in a terminal reaches the parent.
    `admin`, if there is one, is run likewise, and is the last to stop; it gets SIGUSR2 when the others are told to
    stop, and may ignore it. `say` gets each event; it must not block.
    `begin_hand_over` is called at SIGUSR2.
    """

    run: Callable[[Worker], int]
    sockets: Sequence[Sequence[socket.socket]]
    say: Say
    admin: Callable[[Worker], int] | None = None
    admin_sockets: Sequence[socket.socket] = ()
    begin_hand_over: Callable[[], Attempt | Failure] | None = None
    drain: float = 35.0  # seconds; more than a worker gives its own connections


def supervise(plan: Plan) -> int:
    """Run the workers until a signal ends them; return the exit code.

    SIGTERM and SIGINT stop it: the workers drain, those that are left after `plan.drain` are killed; a second one
    kills at once. The sockets are closed as soon as it stops. systemd, and the process before us in a hand-over,
    are told once all workers serve. A process that gets here must have no thread but one and no event loop
    (ValueError). Raises HandfastError with the reason of a worker that fails before all serve, or returns its exit
    code if it gives no reason.
    """
    if thread_count() != 1:
        raise ValueError("supervise() forks, so there must be no other thread")
    with _signals() as wake:
        return _Supervisor(plan, wake).run()


def auto_workers() -> int:
    """How many workers this machine is good for: the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def deal(sockets: Sequence[socket.socket], count: int) -> list[list[socket.socket]]:
    """Give each of `count` workers its sockets of one listener, so that every socket is served.

    One socket goes to all; of more, each goes to one worker at least and each worker gets one at least.
    """
    most = max(len(sockets), count)
    hands: list[list[socket.socket]] = [[] for _ in range(count)]
    for at in range(most):
        hands[at % count].append(sockets[at % len(sockets)])
    return hands


class _State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


@dataclass(slots=True)
class _Child:
    """One worker over all of its lives."""

    index: int
    run: Callable[[Worker], int]
    sockets: tuple[socket.socket, ...]
    report: socket.socket | None
    pid: int = 0  # 0: not running
    pipe: int = -1
    said: bytes = b""
    deaf: bool = False  # its end of the pipe is closed
    failure: Failure | None = None  # as it told
    ready: bool = False
    born: float = 0.0
    deaths: int = 0
    due: float | None = None  # when to start it again

    @property
    def name(self) -> str:
        return "the admin process" if self.index < 0 else f"worker {self.index}"


@dataclass(slots=True)
class _Supervisor:
    plan: Plan
    wake: int
    state: _State = _State.STARTING
    children: list[_Child] = field(default_factory=list)
    reloading: set[int] = field(default_factory=set)  # pids that have not said yet that they took new settings
    reload_deadline: float = 0.0
    attempt: Attempt | None = None
    code: int = Exit.OK
    failure: Failure | None = None
    kill_at: float = 0.0
    next_ping: float = 0.0
    limit: float = 0.0  # seconds from being told to stop to kill_at
    told_to_stop: bool = False
    admin_told: bool = False

    def run(self) -> int:
        writer, reader = _report_pair() if self.plan.admin is not None else (None, None)
        for index, sockets in enumerate(self.plan.sockets):
            self.children.append(_Child(index, self.plan.run, tuple(sockets), writer))
        if self.plan.admin is not None:
            self.children.append(_Child(-1, self.plan.admin, tuple(self.plan.admin_sockets), reader))
        try:
            for child in self.children:
                if self.state is _State.STARTING:
                    self._start(child)
            while self.state is not _State.STOPPING or any(child.pid for child in self.children):
                self._wait()
                self._look()
        finally:
            for plug in (writer, reader, *self.plan.admin_sockets):
                if plug is not None:
                    plug.close()
        if self.failure is not None:
            say_failed(self.failure)
            raise HandfastError(self.failure.reason, **self.failure.facts)
        return self.code

    def _wait(self) -> None:
        waiting = select.poll()
        waiting.register(self.wake, select.POLLIN)
        for child in self.children:
            if child.pid and not child.deaf:
                waiting.register(child.pipe, select.POLLIN)
        if self.attempt is not None:
            waiting.register(self.attempt.fileno(), select.POLLIN)
        now, times = time.monotonic(), self._times()
        waiting.poll(max(0.0, min(times) - now) * 1000 + 1 if times else None)

    def _times(self) -> list[float]:
        times = [child.due for child in self.children if child.due is not None]
        if self.state is _State.STOPPING:
            times.append(self.kill_at)
        if self.attempt is not None:
            times.append(self.attempt.deadline)
        if self.reloading:
            times.append(self.reload_deadline)
        if watchdog_interval() is not None:
            times.append(self.next_ping)
        return times

    def _look(self) -> None:
        """Act on all that has happened."""
        with suppress(BlockingIOError):
            for number in os.read(self.wake, 1024):
                self._signal(number)
        for child in self.children:
            if child.pid:
                self._hear(child)
                self._reap(child)
        now = time.monotonic()
        for child in self.children:
            if child.due is not None and child.due <= now:
                child.due = None
                self._start(child)
        if self.state is _State.STARTING and all(child.ready for child in self.children):
            self.state = _State.SERVING
            self._say("serving", {"workers": len(self.plan.sockets)})
            notify(READY=1)
            say_ready()
        if self.attempt is not None and (outcome := self.attempt.result()) is not None:
            self._handed(outcome)
        self._keep_times(now)

    def _keep_times(self, now: float) -> None:
        if self.reloading and now >= self.reload_deadline:
            self._reloaded(set(self.reloading))
        interval = watchdog_interval()
        if interval is not None and now >= self.next_ping:
            notify(WATCHDOG=1)
            self.next_ping = now + interval
        if self.state is not _State.STOPPING:
            return
        workers = [child for child in self.children if child.pid and child.index >= 0]
        if not workers and not self.admin_told:
            self.admin_told = True
            self.limit, self.kill_at = _ADMIN_STOP, now + _ADMIN_STOP
            self._send(signal.SIGTERM, self.children)
        if now >= self.kill_at:
            stuck = workers or [child for child in self.children if child.pid]
            for child in stuck:
                failure = Failure(Reason.GUARD_WORKER_STUCK, {"worker": child.name, "limit": self.limit})
                self._say("worker_killed", {"worker": child.index, "pid": child.pid} | told(failure))
                self.code = Exit.BUG
            self._kill(stuck)

    def _signal(self, number: int) -> None:
        match number:
            case signal.SIGTERM | signal.SIGINT if self.told_to_stop:
                self.code = self.code or Exit.REFUSED
                self._kill(self.children)
            case signal.SIGTERM | signal.SIGINT:
                self.told_to_stop = True
                if self.state is not _State.STOPPING:  # as it is after a hand-over
                    self._say("stopping", {"signal": signal.Signals(number).name})
                    notify(STOPPING=1)
                    self._stop(self.plan.drain)
            case signal.SIGHUP if self.state is not _State.STOPPING:
                self._reload()
            case signal.SIGUSR2 if self.state is _State.SERVING and self.attempt is None:
                self._begin_hand_over()
            case _:  # SIGCHLD: each turn of the loop looks at the children
                pass

    def _reload(self) -> None:
        self._send(signal.SIGHUP, self.children)
        if self.state is _State.SERVING:
            notify(RELOADING=1)
            self.reloading = {child.pid for child in self.children if child.pid and child.ready}
            self.reload_deadline = time.monotonic() + _RELOAD
            self._reloaded(set())

    def _begin_hand_over(self) -> None:
        if self.plan.begin_hand_over is None:
            return
        begun = self.plan.begin_hand_over()
        if isinstance(begun, Failure):
            self._handed(begun)
        else:
            self.attempt = begun

    def _handed(self, outcome: Handed | Failure) -> None:
        self.attempt = None
        if isinstance(outcome, Failure):
            self._say("hand_over_failed", told(outcome))
            return
        self._say("handed_over", {"pid": outcome.pid})
        if self.state is not _State.STOPPING:
            self._stop(self.plan.drain)

    def _reloaded(self, pids: set[int]) -> None:
        self.reloading -= pids
        if not self.reloading:
            notify(READY=1)

    def _stop(self, limit: float) -> None:
        self.state = _State.STOPPING
        self.limit, self.kill_at = limit, time.monotonic() + limit
        if self.attempt is not None:
            self.attempt.give_up("the old process was told to stop")
            self.attempt = None
        self._send(signal.SIGTERM, [child for child in self.children if child.index >= 0])
        self._send(signal.SIGUSR2, [child for child in self.children if child.index < 0])
        for child in self.children:
            child.due = None
            if child.index >= 0:
                # Or who connects now would wait in a queue that nobody serves.
                for plug in child.sockets:
                    plug.close()

    def _send(self, number: int, children: list[_Child]) -> None:
        for child in children:
            if child.pid:
                os.kill(child.pid, number)  # not reaped yet, so the number is still its own

    def _kill(self, children: list[_Child]) -> None:
        self._send(signal.SIGKILL, children)
        self.kill_at = time.monotonic() + LONGEST_DELAY

    def _start(self, child: _Child) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()  # or the child would write it once more
        parent, (reader, writer) = os.getpid(), os.pipe()
        child.ready, child.deaf, child.said, child.failure, child.born = False, False, b"", None, time.monotonic()
        # A signal between the fork and the child's own handlers would be taken for the parent's.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        try:
            child.pid = os.fork()
            if child.pid == 0:
                self._live(child, parent, reader, writer)
        except OSError as error:  # EAGAIN, ENOMEM
            os.close(reader)
            self._died(child, os.strerror(error.errno or 0).lower(), Exit.BUG)
        else:
            os.set_blocking(reader, False)
            child.pipe = reader
        finally:
            os.close(writer)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _live(self, child: _Child, parent: int, reader: int, pipe: int) -> NoReturn:
        """The life of a worker process, from its fork to its end."""
        code: int = Exit.BUG
        try:
            os.close(reader)
            _be_a_child()
            if os.getppid() != parent:
                os._exit(Exit.BUG)
            self._close_what_is_not_for(child)
            code = int(child.run(Worker(child.index, child.sockets, child.report, parent, pipe)))
        except HandfastError as error:
            code = error.reason.exit
            _tell(pipe, error.failure)
        except BaseException as bug:
            _tell(pipe, Failure(Reason.BUG, {"detail": repr(bug)[:200]}))
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code & 0xFF)

    def _close_what_is_not_for(self, child: _Child) -> None:
        kept = {id(plug) for plug in (*child.sockets, child.report)}
        os.close(self.wake)
        for other in self.children:
            if other.pid:
                os.close(other.pipe)
            for plug in (*other.sockets, other.report):
                if plug is not None and id(plug) not in kept:
                    plug.close()

    def _hear(self, child: _Child) -> None:
        with suppress(BlockingIOError):
            while piece := os.read(child.pipe, _MAX_WORDS):
                child.said = (child.said + piece)[-2 * _MAX_WORDS :]
            child.deaf = True
        *lines, child.said = child.said.split(b"\n")
        for line in lines:
            if line == b"ready":
                child.ready = True
                if child.pid in self.reloading:
                    self._reloaded({child.pid})
            else:
                child.failure = _told(line) or child.failure

    def _reap(self, child: _Child) -> None:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid == 0:
            return
        self._hear(child)  # its last words came between the two looks
        os.close(child.pipe)
        if pid in self.reloading:
            self._reloaded({pid})
        code = os.waitstatus_to_exitcode(status)
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        self._died(child, how, code)

    def _died(self, child: _Child, how: str, code: int) -> None:
        pid, child.pid, child.pipe = child.pid, 0, -1
        if self.state is _State.STOPPING:
            if code not in (Exit.OK, -signal.SIGTERM, -signal.SIGKILL):
                self.code = max(self.code, code, Exit.BUG)
            return
        unasked = Failure(Reason.GUARD_WORKER_DIED, {"worker": child.name, "how": how})
        fields = {"worker": child.index, "pid": pid, "how": how}
        if self.state is _State.STARTING and not child.ready:
            self.failure = child.failure or (unasked if code <= 0 else None)
            self.code = code
            self._say("worker_failed", fields | told(child.failure or unasked))
            self._stop(_ADMIN_STOP)
            return
        if time.monotonic() - child.born >= LONG_LIFE:
            child.deaths = 0
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(child.deaths, 20))
        child.deaths += 1
        child.ready, child.due = False, time.monotonic() + delay
        self._say("worker_died", fields | {"restart_in": delay} | told(child.failure or unasked))

    def _say(self, event: str, fields: dict[str, Any]) -> None:
        with suppress(OSError, ValueError):  # a log that is full must not end the workers
            self.plan.say(event, fields)


def _be_a_child() -> None:
    os.close(signal.set_wakeup_fd(-1))
    # A SIGHUP before the worker has a handler is no loss: it reads its settings after.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    end_with_parent(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)


@contextmanager
def _signals() -> Iterator[int]:
    """A pipe into which each signal writes its number."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, lambda *_: None) for number in _PASSED_ON}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _report_pair() -> tuple[socket.socket, socket.socket]:
    writer, reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # for reports of some 100 kB; the kernel may cap it
    writer.setblocking(False)
    reader.setblocking(False)
    return writer, reader


def _tell(pipe: int, failure: Failure) -> None:
    facts = {name: str(value)[:300] for name, value in list(failure.facts.items())[:8]}
    line = json.dumps({"reason": failure.reason.code, "facts": facts}).encode()
    with suppress(OSError):
        os.write(pipe, line[: _MAX_WORDS - 1] + b"\n")


def _told(line: bytes) -> Failure | None:
    """A failure as a worker told it. A worker meets the world, so what it says is only text to us."""
    try:
        told_ = json.loads(line)
        reason = next(reason for reason in Reason if reason.code == told_["reason"])
        return Failure(reason, {str(name): str(value) for name, value in told_["facts"].items()})
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
        return None
