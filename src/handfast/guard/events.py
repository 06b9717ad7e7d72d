"""The guard's log: one event a line, as JSON or for people, written off the event loop.

A log that cannot be written stops the guard from forwarding (`broken`): what is not recorded is not allowed.
It never holds a key, a token or a query string.
"""

from __future__ import annotations

import json
import queue
import threading
from datetime import datetime
from typing import Any, BinaryIO

import msgspec

from handfast.errors import Failure, Reason

MAX_PENDING = 16 << 20  # bytes that may wait for a slow reader of the log before it counts as broken


_encode = msgspec.json.Encoder().encode  # instants as RFC 3339 has them


class RequestEvent(msgspec.Struct, omit_defaults=True):
    """One request that was forwarded, as the log says it. A struct, since there is one for every request."""

    event: str
    time: datetime
    id: str
    address: str
    peer: str | None
    request: str
    decision: str
    rule: str | None
    status: int | None
    method: str
    host: str
    path: str  # never the query, which may hold secrets
    reason: str
    ms: float
    app_ms: float | None
    bytes_in: int
    bytes_out: int
    detail: str | None = None
    remedy: str | None = None
    outcome: str | None = None


class EventLog:
    """Events to one stream. `emit` only collects; `flush`, a few times a second, hands them to a thread.

    So neither a slow disk nor a thread that wakes for each line holds up connections. A kill -9 can lose what
    was collected since the last flush.
    """

    def __init__(self, stream: BinaryIO, *, pretty: bool) -> None:
        self.broken = False
        self._stream = stream
        self._pretty = pretty
        self._lines: list[bytes] = []
        self._batches: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._handed = 0  # bytes, counted by the event loop alone
        self._written = 0  # bytes, counted by the writing thread alone
        self._thread = threading.Thread(target=self._write_all, name="handfast-log", daemon=True)
        self._thread.start()

    def emit(self, event: str, when: datetime, fields: dict[str, Any]) -> None:
        """Take one event. Values are JSON values; None is left out. Raises nothing; see `broken`."""
        self._lines.append((_pretty if self._pretty else _json)(event, when, fields))

    def emit_request(self, event: RequestEvent) -> None:
        """Take the event of a request that was forwarded."""
        if self._pretty:
            fields = msgspec.structs.asdict(event)
            self._lines.append(_pretty(fields.pop("event"), fields.pop("time"), fields))
        else:
            self._lines.append(_encode(event) + b"\n")

    def flush(self) -> None:
        """Have written what was collected."""
        if not self._lines:
            return
        batch = b"".join(self._lines)
        self._lines.clear()
        if self._handed - self._written + len(batch) > MAX_PENDING:
            self.broken = True
            return
        self._handed += len(batch)
        self._batches.put(batch)

    def close(self) -> None:
        """Write what is left; wait for it 2 s at most."""
        self.flush()
        self._batches.put(None)
        self._thread.join(2)

    def _write_all(self) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                self._stream.write(batch)
                self._stream.flush()
                self.broken = False
            except (OSError, ValueError):
                self.broken = True
            self._written += len(batch)


def told(failure: Failure) -> dict[str, Any]:
    """A failure as fields of an event: reason, detail, remedy."""
    return {"reason": failure.reason.code, "detail": failure.message, "remedy": failure.hint or None}


def refusal_body(reason: Reason, request_id: str) -> bytes:
    """The JSON that a refused client gets: the stable code and an id to ask the operator about, no more."""
    return json.dumps({"error": reason.code, "id": request_id}).encode() + b"\n"


def _json(event: str, when: datetime, fields: dict[str, Any]) -> bytes:
    return _encode({"event": event, "time": when} | {k: v for k, v in fields.items() if v is not None}) + b"\n"


_HIDDEN = frozenset({"authority", "serial", "facts", "version", "cipher", "group"})


def _pretty(event: str, when: datetime, fields: dict[str, Any]) -> bytes:
    shown = " ".join(
        f"{key}={_word(value)}" for key, value in fields.items() if value is not None and key not in _HIDDEN
    )
    return f"{when:%H:%M:%S} {event:<10} {shown}\n".encode("utf-8", "backslashreplace")


def _word(value: object) -> str:
    text = str(value)
    return text if text and " " not in text and text.isprintable() else json.dumps(text)
