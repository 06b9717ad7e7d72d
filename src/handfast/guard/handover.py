"""A restart in which no connection is refused: the sockets go to a new process, then the old one drains.

Theory of operation. The old process starts the program anew and leaves its listening sockets open in it; the
variable HANDFAST_FDS says which is which, and HANDFAST_READY which pipe to answer on. Both share one queue of
connections, so whoever calls in between waits in the queue and is accepted by one of them. Only when the new
process says that it serves does the old one stop to accept; one that fails, or says nothing in time, leaves the
old one as it was. It closes no socket and decides nothing about draining: that is the caller's.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from handfast.errors import Failure, HandfastError, Reason
from handfast.guard.systemd import MAX_SOCKETS, adopt, notify

DEADLINE = 30.0  # seconds for the new process to say that it serves

_SOCKETS, _READY = "HANDFAST_FDS", "HANDFAST_READY"
# The sockets that systemd gave are ours to hand on by our own variables; the watchdog's process changes.
_NOT_PASSED_ON = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID")
_MAX_WORDS = 2048  # bytes that a new process may say
_LAST_WORDS = 2.0  # seconds for a process that closed its pipe to end
_LOOK = 0.1  # seconds between two looks at whether the new process lives


@dataclass(frozen=True, slots=True)
class Handed:
    """The new process serves; the old one may drain and end."""

    pid: int


@dataclass(slots=True)
class Attempt:
    """A new process that has not said yet whether it serves. `fileno` becomes readable when it has something to say."""

    process: subprocess.Popen[bytes]
    deadline: float  # of time.monotonic()
    _pipe: int
    _said: bytearray = field(default_factory=bytearray)

    def fileno(self) -> int:
        """The pipe to wait on, for poll(2) or an event loop."""
        return self._pipe

    def result(self) -> Handed | Failure | None:
        """What came of it; None: not known yet. Call it when `fileno` is readable, at SIGCHLD and at the deadline.

        On success systemd has been told the new MAINPID. On failure the new process is dead. Call it no more after
        either.
        """
        ended = self._read()
        word, complete, _ = bytes(self._said).partition(b"\n")
        if complete and word == b"ready":
            os.close(self._pipe)
            self.process.returncode = 0  # it outlives us, of which Popen would warn
            notify(MAINPID=self.process.pid)
            return Handed(self.process.pid)
        if complete:
            return self.give_up(word.decode("utf-8", "replace"))
        if ended:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_LAST_WORDS)
        code = self.process.poll()
        if code is not None:
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            return self.give_up(f"it ended with {how} before it served")
        if ended:
            return self.give_up("it never said that it serves")
        if time.monotonic() >= self.deadline:
            return self.give_up("it did not serve in time")
        return None

    def give_up(self, why: str) -> Failure:
        """Kill the new process, if it lives yet."""
        os.close(self._pipe)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        return _failure(why)

    def _read(self) -> bool:
        """Take what it said; whether the pipe was closed."""
        with suppress(BlockingIOError):
            while len(self._said) < _MAX_WORDS:
                piece = os.read(self._pipe, _MAX_WORDS)
                if not piece:
                    return True
                self._said += piece
        return len(self._said) >= _MAX_WORDS


def own_command() -> list[str]:
    """The command that started this process, to start it anew."""
    return [sys.executable, *sys.orig_argv[1:]]


def hand_over(
    sockets: Mapping[str, Sequence[socket.socket]],
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float = DEADLINE,
) -> Handed | Failure:
    """Start `command` with these listening sockets and wait until it serves, `limit` seconds at most.

    It blocks: call it in a thread of an executor, while the event loop goes on serving. A `Failure`
    (GUARD_HANDOVER) leaves everything as it was. Raises nothing.
    """
    attempt = begin(sockets, command, environment, limit)
    if isinstance(attempt, Failure):
        return attempt
    waiting = select.poll()
    waiting.register(attempt.fileno(), select.POLLIN)
    while (outcome := attempt.result()) is None:
        waiting.poll(_LOOK * 1000)
    return outcome


def begin(
    sockets: Mapping[str, Sequence[socket.socket]],
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float = DEADLINE,
) -> Attempt | Failure:
    """Start the new process without waiting for it. Raises nothing."""
    if os.getpid() == 1:  # its end would end the container, the new process with it
        return _failure("this process is the first of its container; replace the container instead")
    given = [(name, plug.fileno()) for name, plugs in sockets.items() for plug in plugs]
    if len(given) > MAX_SOCKETS:
        return _failure(f"{len(given)} sockets are too many")
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    passed = {name: value for name, value in environment.items() if name not in _NOT_PASSED_ON}
    passed[_SOCKETS] = json.dumps({"parent": os.getpid(), "sockets": given})
    passed[_READY] = f"{os.getpid()}:{writer}"
    try:
        descriptors = sorted({writer, *(descriptor for _, descriptor in given)})
        process = subprocess.Popen(list(command), env=passed, pass_fds=descriptors)  # noqa: S603  # our own command line
    except (OSError, ValueError) as error:
        os.close(reader)
        return _failure(f"it cannot be started ({error})")
    finally:
        os.close(writer)
    return Attempt(process, time.monotonic() + limit, reader)


def inherited() -> dict[str, list[socket.socket]]:
    """Take the sockets that the process before us handed over, by name, in its order; none is no error.

    Checked as `systemd.listen_sockets` does. The variable is removed; `say_ready` is for once they are served.
    Raises HandfastError (GUARD_SOCKETS).
    """
    text = os.environ.pop(_SOCKETS, "")
    if (pipe := _ready_pipe()) is not None:
        with suppress(OSError):
            os.set_inheritable(pipe, False)
    if not text:
        return {}
    try:
        told = json.loads(text)
        parent = int(told["parent"])
        given = [(str(name), int(descriptor)) for name, descriptor in told["sockets"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HandfastError(Reason.GUARD_SOCKETS, detail=f"{_SOCKETS} is malformed") from None
    if parent != os.getppid():  # meant for a process above us
        return {}
    descriptors = {descriptor for _, descriptor in given}
    if len(given) > MAX_SOCKETS or len(descriptors) != len(given) or min(descriptors, default=3) < 3:
        raise HandfastError(Reason.GUARD_SOCKETS, detail=f"{_SOCKETS} names descriptors that cannot be")
    return adopt(given)


def say_ready() -> None:
    """Tell the process before us, if there is one, that we serve. The second call does nothing."""
    _answer(b"ready\n")


def say_failed(failure: Failure) -> None:
    """Tell the process before us, if there is one, why we shall not serve; for its log."""
    words = " ".join(failure.message.split()).encode("utf-8", "replace")
    _answer(words[: _MAX_WORDS // 2] + b"\n")


def _answer(words: bytes) -> None:
    pipe = _ready_pipe()
    os.environ.pop(_READY, None)
    if pipe is None:
        return
    with suppress(OSError):  # the process before us may be gone
        os.write(pipe, words)
        os.close(pipe)


def _ready_pipe() -> int | None:
    found = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,7})", os.environ.get(_READY, ""))
    if found is None or int(found[1]) != os.getppid():
        return None
    return int(found[2])


def _failure(detail: str) -> Failure:
    return Failure(Reason.GUARD_HANDOVER, {"detail": detail[:500]})
