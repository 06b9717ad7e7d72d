"""Raw TCP for attacks: sockets with deadlines that keep what went over them, and calls through a TLS probe.

Every wait ends at its deadline and every read at its limit. What the network does is no error here: it is a `Reply`.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from handfast.audit.oracle import End, Reply
from handfast.errors import Reason, Unreachable
from handfast.tls.probe import Offer, Probe, ProbeRefused

MAX_REPLY = 64 << 10  # bytes of one answer that are kept
_QUIET = 0.4  # seconds after which an answer that is not HTTP counts as whole
_MAX_KEPT = 1 << 20  # bytes of one direction that a wire remembers

Flight = Callable[["Wire", bytes], None]  # puts one flight of records on the wire, in its own way


class Silence(Exception):
    """Nothing came within the time there was."""


@dataclass(slots=True)
class Wire:
    """One TCP connection. `deadline` is in `time.monotonic()` seconds; no wait outlasts it.

    `sent` and `received` hold the flights: what went one way until the other side spoke is one item.
    """

    socket: socket.socket
    deadline: float
    sent: list[bytes] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    _sending: bool = False
    _kept: int = 0

    @classmethod
    def connect(cls, host: str, port: int, deadline: float) -> Wire:
        """Connect. Raises Unreachable."""
        try:
            plain = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.01))
        except (UnicodeError, socket.gaierror) as error:
            detail = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "it is not a name"
            raise Unreachable(Reason.UNREACHABLE_NAME, target=f"{host}:{port}", host=host, detail=detail) from None
        except OSError as error:
            detail = (error.strerror or str(error)).lower()
            raise Unreachable(Reason.UNREACHABLE, target=f"{host}:{port}", detail=detail) from None
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(plain, deadline)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    @property
    def left(self) -> float:
        """Seconds until the deadline; 0 when it is past."""
        return max(self.deadline - time.monotonic(), 0.0)

    def send(self, data: bytes) -> None:
        """Send all of it. Raises OSError when the other side is gone, Silence when it takes no more."""
        if not data:
            return
        self._keep(self.sent, data, new=not self._sending)
        self._sending = True
        try:
            self.socket.settimeout(max(self.left, 0.001))
            self.socket.sendall(data)
        except TimeoutError:
            raise Silence from None

    def receive(self, within: float | None = None) -> bytes:
        """What comes next; b'' at the other side's end. Raises Silence, and OSError when it was reset."""
        wait = self.left if within is None else min(within, self.left)
        try:
            self.socket.settimeout(max(wait, 0.001))
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            raise Silence from None
        self._keep(self.received, data, new=self._sending)
        self._sending = False
        return data

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self.socket.shutdown(socket.SHUT_WR)

    def read_all(self, limit: int = MAX_REPLY, within: float | None = None) -> tuple[bytes, End]:
        """Everything until the other side ends, falls silent for `within`, or `limit` bytes."""
        data = b""
        try:
            while len(data) < limit:
                piece = self.receive(within)
                if not piece:
                    return data, End.CLOSED
                data += piece
        except Silence:
            return data, End.OPEN if data else End.SILENT
        except OSError:
            return data, End.RESET
        return data[:limit], End.OPEN

    def _keep(self, flights: list[bytes], data: bytes, new: bool) -> None:
        self._kept += len(data)
        if self._kept > _MAX_KEPT:
            return
        if new or not flights:
            flights.append(data)
        else:
            flights[-1] += data


def whole(wire: Wire, records: bytes) -> None:
    """Put a flight on the wire as it is."""
    wire.send(records)


def shake_hands(wire: Wire, probe: Probe, flight: Flight = whole) -> None:
    """Run the probe's handshake. Raises ProbeRefused (also where the connection ends), Silence, OSError."""
    probe.feed(b"")
    flight(wire, probe.take())
    while not probe.done:
        records = wire.receive()
        if not records:
            raise ProbeRefused("the server closed the connection during the handshake")
        try:
            probe.feed(records)
        finally:
            wire.send(probe.take())  # an alert of ours as well


def call(wire: Wire, offer: Offer, request: bytes, flight: Flight = whole) -> tuple[Reply, Probe | None]:
    """Shake hands, send one request, and read what comes: a TLS 1.3 client is refused only then.

    The probe comes along for whoever wants to look at it; None where the engine did not take the offer.
    """
    try:
        probe = Probe(offer)
    except ProbeRefused as refused:
        return Reply(False, b"", End.UNMADE, detail=str(refused)), None
    try:
        shake_hands(wire, probe, flight)
    except ProbeRefused as refused:
        return _ended(probe, refused), probe
    except Silence:
        return Reply(False, b"", End.SILENT, detail="the handshake was not answered"), probe
    except OSError:
        return Reply(False, b"", End.RESET), probe
    return ask(wire, probe, request), probe


def ask(wire: Wire, probe: Probe, request: bytes) -> Reply:
    """Send a request over a finished handshake and read the answer."""
    try:
        probe.write(request)
        wire.send(probe.take())
    except ProbeRefused as refused:
        return _ended(probe, refused)
    except Silence:
        return Reply(True, b"", End.SILENT)
    except OSError:
        pass  # refused already; why may still be there to be read
    return answer(wire, probe)


def answer(wire: Wire, probe: Probe) -> Reply:
    """Read one answer: an HTTP response to its end, else until it falls quiet."""
    data = b""
    while len(data) < MAX_REPLY:
        try:
            plain = probe.read()
            if plain is None:
                return Reply(True, data, End.CLOSED)
            data += plain
            if plain:
                continue
            if is_whole(data):
                return Reply(True, data, End.OPEN)
            records = wire.receive(_QUIET if data and not data.startswith(b"HTTP/") else None)
        except ProbeRefused as refused:
            return Reply(True, data, End.ALERT if refused.alert else End.CLOSED, refused.alert, str(refused))
        except Silence:
            return Reply(True, data, End.OPEN if data else End.SILENT)
        except OSError:
            return Reply(True, data, End.RESET)
        if not records:
            return Reply(True, data, End.CLOSED)
        probe.feed(records)
    return Reply(True, data[:MAX_REPLY], End.OPEN)


def is_whole(data: bytes) -> bool:
    """Whether an HTTP response with a Content-Length, or without a body, is all there."""
    head, mark, body = data.partition(b"\r\n\r\n")
    if not mark or not head.startswith(b"HTTP/"):
        return False
    length = re.search(rb"(?i)\r\ncontent-length:[ \t]*([0-9]{1,12})[ \t]*(?:\r\n|$)", head)
    return length is not None and len(body) >= int(length[1])


def _ended(probe: Probe, refused: ProbeRefused) -> Reply:
    return Reply(probe.done, b"", End.ALERT if refused.alert else End.CLOSED, refused.alert, str(refused))
