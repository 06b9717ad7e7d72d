"""The guard's log: one event a line, as JSON or for people, written off the event loop.

A log that cannot be written stops the guard from forwarding (`broken`): what is not recorded is not allowed.
It never holds a key, a token or a query string.
"""

from __future__ import annotations

import json
import threading
from datetime import datetime
from typing import Any, BinaryIO

from handfast.errors import Failure, Reason

MAX_PENDING = 16 << 20  # bytes that may wait for a slow reader of the log before it counts as broken


class EventLog:
    """Events to one stream, through one thread, so that a slow disk or pipe does not hold up connections."""

    def __init__(self, stream: BinaryIO, *, pretty: bool) -> None:
        self.broken = False
        self._stream = stream
        self._pretty = pretty
        self._lines: list[bytes] = []
        self._size = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name="handfast-log", daemon=True)
        self._thread.start()

    def emit(self, event: str, when: datetime, **fields: Any) -> None:
        """Take one event. Values are JSON values; None is left out. Raises nothing; see `broken`."""
        fields = {key: value for key, value in fields.items() if value is not None}
        line = _pretty(event, when, fields) if self._pretty else _json(event, when, fields)
        with self._changed:
            self._lines.append(line)
            self._size += len(line)
            if self._size > MAX_PENDING:
                self.broken = True
                self._lines.clear()
                self._size = 0
            self._changed.notify()

    def close(self) -> None:
        """Write what is left; wait for it 2 s at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(2)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._closing:
                    self._changed.wait()
                lines, self._lines = self._lines, []
                closing = self._closing
            batch = b"".join(lines)
            try:
                self._stream.write(batch)
                self._stream.flush()
                self.broken = False
            except (OSError, ValueError):
                self.broken = True
            with self._changed:
                self._size = max(0, self._size - len(batch))
                if closing and not self._lines:
                    return


def told(failure: Failure) -> dict[str, Any]:
    """A failure as fields of an event: reason, detail, remedy."""
    return {"reason": failure.reason.code, "detail": failure.message, "remedy": failure.hint or None}


def refusal_body(reason: Reason, request_id: str) -> bytes:
    """The JSON that a refused client gets: the stable code and an id to ask the operator about, no more."""
    return json.dumps({"error": reason.code, "id": request_id}).encode() + b"\n"


def _json(event: str, when: datetime, fields: dict[str, Any]) -> bytes:
    return json.dumps({"event": event, "time": when.isoformat(timespec="milliseconds"), **fields}).encode() + b"\n"


_HIDDEN = frozenset({"authority", "serial", "facts", "version", "cipher", "group"})


def _pretty(event: str, when: datetime, fields: dict[str, Any]) -> bytes:
    shown = " ".join(f"{key}={_word(value)}" for key, value in fields.items() if key not in _HIDDEN)
    return f"{when:%H:%M:%S} {event:<10} {shown}\n".encode("utf-8", "backslashreplace")


def _word(value: object) -> str:
    text = str(value)
    return text if text and " " not in text and text.isprintable() else json.dumps(text)
