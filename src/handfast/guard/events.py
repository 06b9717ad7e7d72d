"""The guard's log: one event a line, as JSON or for people, written off the event loop.

A log that cannot be written stops the guard from forwarding (`broken`): what is not recorded is not allowed.
It never holds a key, a token or a query string.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from select import PIPE_BUF
from time import gmtime, monotonic, sleep, strftime, time
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import msgspec

from handfast.errors import Failure, Reason

if TYPE_CHECKING:
    from handfast.guard.door import Admission

_SOON = 0.3  # seconds that a process which must not wait waits for the log
MAX_TEXT = 512  # characters of a detail
MAX_PENDING = 16 << 20  # bytes that may wait for a slow reader of the log before it counts as broken


encode = msgspec.json.Encoder().encode  # instants as RFC 3339 has them


@dataclass(slots=True)
class Timing:
    """How a request goes: seconds on the clock of `monotonic` (`first_byte` 0: none came), and bytes of its app's."""

    began: float
    first_byte: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


class Logged(NamedTuple):
    """A request that was forwarded, as its log line needs it. `status` 0: no answer came."""

    number: int  # of the connection's requests
    admission: Admission
    status: int
    timing: Timing
    failure: Failure | None = None
    outcome: str | None = None


class EventLog:
    """Events to one stream. `emit` only collects; `flush`, a few times a second, hands them to a thread.

    So neither a slow disk nor a thread that wakes for each line holds up connections. A kill -9 can lose what
    was collected since the last flush.
    """

    def __init__(self, stream: BinaryIO, *, pretty: bool, lock: int | None = None, worker: int | None = None) -> None:
        """`lock`: a file's descriptor, for processes that share the stream: a batch is written under its lock.

        `worker`: which of them this is; it stands in all events but those of usual requests.
        """
        self.broken = False
        self._stuck = False  # lines that could not be written wait in the writing thread
        # Opened anew: a lock belongs to the opening, and what is inherited is one and the same (flock(2)).
        self._lock = None if lock is None else os.open(f"/proc/self/fd/{lock}", os.O_RDWR | os.O_CLOEXEC)
        stream.flush()
        self._opened = stream  # its end would close what is written to
        self._stream = getattr(stream, "raw", stream)  # it must be known how much of a line went
        self._at = -1  # where the last write ended, in a file
        self._pretty = pretty
        self._worker: dict[str, Any] = {} if worker is None else {"worker": worker}
        self._lines: list[bytes] = []
        self._second, self._words = 0, b""
        self._batches: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting = 0  # bytes of these
        self._lost = 0  # lines that were too many
        self._handed = 0  # bytes, counted by the event loop alone
        self._written = 0  # bytes, counted by the writing thread alone
        self._thread = threading.Thread(target=self._write_all, name="handfast-log", daemon=True)
        self._thread.start()

    def emit(self, event: str, when: datetime, fields: dict[str, Any]) -> None:
        """Take one event. Values are JSON values; None is left out. Raises nothing; see `broken`."""
        self._take((_pretty if self._pretty else _json)(event, when, self._worker | fields))

    def emit_line(self, line: bytes) -> None:
        """Take one event that is a line of JSON already, without `time`; only where `plain`."""
        self._take(b'{"time":"%b",%b' % (self._stamp(), line))

    @property
    def plain(self) -> bool:
        """Whether events are written as JSON."""
        return not self._pretty

    def _stamp(self) -> bytes:
        """The instant as RFC 3339 has it; its seconds are put in words once a second."""
        moment = time()
        second = int(moment)
        if second != self._second:
            self._second, self._words = second, strftime("%Y-%m-%dT%H:%M:%S", gmtime(second)).encode()
        return b"%b.%06dZ" % (self._words, (moment - second) * 1_000_000)

    def flush(self) -> None:
        """Have written what was collected."""
        if self._lost and not self.broken:
            lost, self._lost = self._lost, 0
            self.emit("log", datetime.now(UTC), {"lost": lost})
        if not self._lines and not self._stuck:
            return
        batch = b"".join(self._lines)
        self._lines.clear()
        self._waiting = 0
        self._handed += len(batch)
        self._batches.put(batch)

    def _take(self, line: bytes) -> None:
        """Keep a line for the next flush. What is too much is counted, and stops the guard."""
        if self._handed - self._written + self._waiting + len(line) > MAX_PENDING:
            self.broken = True
            self._lost += 1
            return
        self._waiting += len(line)
        self._lines.append(line)

    def close(self) -> None:
        """Write what is left; wait for it 2 s at most."""
        self.flush()
        self._batches.put(None)
        self._thread.join(2)

    @staticmethod
    def write_one(stream: BinaryIO, event: str, fields: dict[str, Any], *, pretty: bool, lock: int) -> None:
        """Write one event at once, for a process that may have no thread and must not wait for a reader.

        Raises OSError, and then nothing was written; BlockingIOError where it would have to wait for long.
        """
        line = (_pretty if pretty else _json)(event, datetime.now(UTC), fields)[:PIPE_BUF]
        own = os.open(f"/proc/self/fd/{lock}", os.O_RDWR | os.O_CLOEXEC)
        try:
            _hold_soon(own)
            # pipe(7): what is ready for writing takes PIPE_BUF bytes, whole and at once. Of a file, all is.
            if not select.select((), (stream,), (), _SOON)[1]:
                raise BlockingIOError
            os.write(stream.fileno(), line)
        finally:
            os.close(own)  # ends the lock too

    def _write_all(self) -> None:
        rest = b""
        ended = False
        while not ended:
            batch = self._batches.get()
            ended = batch is None
            rest = rest + batch if batch else rest
            done = 0
            try:
                with _held(self._lock):
                    try:
                        while done < len(rest):
                            done += self._write(rest[done:] if done else rest)
                    except (OSError, ValueError):  # within the lock: another's line must not follow half of ours
                        done -= self._take_back(done - rest.rfind(b"\n", 0, done) - 1)
                        raise
                self.broken = self._stuck = False
            except (OSError, ValueError):
                self.broken = self._stuck = True
            rest = rest[done:]
            self._written += done

    def _write(self, data: bytes) -> int:
        if (
            size := self._stream.write(data)
        ) is None:  # no room now, and it is not to be waited for (open(2), O_NONBLOCK)
            raise BlockingIOError
        self._at = self._tell()
        return size

    def _tell(self) -> int:
        """Where in the file the next line goes; -1 for what has no such place."""
        try:
            return os.lseek(self._stream.fileno(), 0, os.SEEK_CUR)
        except (OSError, ValueError, AttributeError):
            return -1

    def _take_back(self, size: int) -> int:
        """Take the half of a line out of a file again, where it is the last that stands there; return what went."""
        if not size or (at := self._tell()) < 0:
            return 0
        try:
            descriptor = self._stream.fileno()
            if at != self._at or at != os.fstat(descriptor).st_size:  # somebody else wrote
                return 0
            os.ftruncate(descriptor, at - size)
            os.lseek(descriptor, at - size, os.SEEK_SET)
        except (OSError, ValueError):
            return 0
        return size


def _hold_soon(lock: int) -> None:
    """Take a lock among processes; raises BlockingIOError where another keeps it for long."""
    deadline = monotonic() + _SOON
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if monotonic() > deadline:
                raise
        sleep(0.01)


@contextmanager
def _held(lock: int | None) -> Iterator[None]:
    """Hold a lock among processes; it ends with the process at the latest."""
    if lock is None:
        yield
        return
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def told(failure: Failure) -> dict[str, Any]:
    """A failure as fields of an event: reason, detail, remedy."""
    return {"reason": failure.reason.code, "detail": cut(failure.message), "remedy": cut(failure.hint) or None}


def cut(text: str) -> str:
    """Keep a stranger's long names from filling the log."""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def request_facts(method: bytes, host: bytes, path: bytes) -> dict[str, str]:
    """What the log says of a request: `path` is without its query, which may hold secrets."""
    return {
        "method": method.decode("ascii", "replace"),
        "host": host.decode("ascii", "replace"),
        "path": path[:512].decode("ascii", "replace"),
    }


def refusal_body(reason: Reason, request_id: str) -> bytes:
    """The JSON that a refused client gets: the stable code and an id to ask the operator about, no more."""
    return json.dumps({"error": reason.code, "id": request_id}).encode() + b"\n"


def _json(event: str, when: datetime, fields: dict[str, Any]) -> bytes:
    return encode({"event": event, "time": when} | {k: v for k, v in fields.items() if v is not None}) + b"\n"


_HIDDEN = frozenset({"listener", "worker", "authority", "serial", "facts", "version", "cipher", "group"})


def _pretty(event: str, when: datetime, fields: dict[str, Any]) -> bytes:
    shown = " ".join(
        f"{key}={_word(value)}" for key, value in fields.items() if value is not None and key not in _HIDDEN
    )
    return f"{when:%H:%M:%S} {event:<10} {shown}\n".encode("utf-8", "backslashreplace")


def _word(value: object) -> str:
    text = str(value)
    return text if text and " " not in text and text.isprintable() else json.dumps(text)
