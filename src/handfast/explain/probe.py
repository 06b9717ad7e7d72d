"""Connections made to be explained: a client that looks at a server, and a server that looks at one client.

Owns the sockets, the clock and every limit. Nothing is verified here; a client goes on after the handshake for
long enough to learn a refusal, which in TLS 1.3 comes when the client believes itself connected.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from handfast.errors import Failure, Reason, Unreachable
from handfast.explain.model import Ending, Recording
from handfast.tls.channel import Channel, TlsBroken
from handfast.tls.server import Accepted, Refused, ServerContext
from handfast.tls.transcript import Offer, Recorder, WatchedClient, WatchedServer
from handfast.wire.records import MAX_HANDSHAKE, Chunk, Side

_MOST_ANSWER = 1 << 16  # bytes of application data that are read
_READ = 1 << 16
_MOST_READ = 4 << 20  # bytes of records of one connection
_SPEAKS_FIRST = 0.25  # seconds in which a server that greets would have greeted


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds: a connection with its handshake; the wait for a refusal after it."""

    handshake: float = 10.0
    refusal: float = 1.0


@dataclass
class _Line:
    """A socket whose bytes are kept."""

    plug: socket.socket
    began: float
    side: Side
    chunks: list[Chunk] = field(default_factory=list)
    size: int = 0

    def clock(self) -> float:
        return time.monotonic() - self.began

    def send(self, data: bytes) -> None:
        if data:
            self.chunks.append(Chunk(self.clock(), self.side, data))
            self.plug.sendall(data)

    def receive(self, until: float) -> bytes:
        """The next bytes; b'' at the end. Raises TimeoutError at `until` (of the clock) and OSError."""
        self.plug.settimeout(max(until - self.clock(), 0.001))
        data = self.plug.recv(_READ)
        if data:
            self.size += len(data)
            self.chunks.append(Chunk(self.clock(), self.side.other, data))
        return data


@dataclass
class _Course:
    """How a connection went, so far."""

    ending: Ending = Ending.QUIET
    done: float | None = None
    waited: float = 0.0
    broken: Failure | None = None
    said: bytes = b""
    answer: bytes = b""
    protocol: str = ""


def call(host: str, port: int, offer: Offer, limits: Limits, request: bytes = b"") -> Recording:
    """Shake hands with a server as a client and watch what comes after. Raises Unreachable where there is none.

    `request` is sent once the server has kept silent for a moment, so that a server that refuses in its
    application's words does so.
    """
    place, now = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", datetime.now(UTC)
    client = WatchedClient(offer, lambda: line.clock())  # made first, so that its making counts for no time
    line = _Line(_connect(host, port, place, limits), time.monotonic(), Side.CLIENT)
    with line.plug:
        course = _Course()
        channel = _guarded(course, lambda: _client_handshake(line, client, limits, course))
        if channel is not None:
            course.protocol = client.protocol
            _guarded(course, lambda: _listen(line, channel, limits.refusal, course, request))
        return _recording(place, now, line, client.recorder, course)


def answer(plug: socket.socket, context: ServerContext, limits: Limits, place: str, reply: bytes = b"") -> Recording:
    """Be the server of one connection that was accepted on `plug`, judging the client as a guard does.

    A client that is let in gets `reply` once it has asked something; one that is refused is told the reason.
    """
    began, now = time.monotonic(), datetime.now(UTC)
    with plug:
        line, course = _Line(plug, began, Side.SERVER), _Course()
        server = WatchedServer(context, line.clock)
        channel = _guarded(course, lambda: _server_handshake(line, server, limits, course))
        if channel is not None:
            verdict = course.broken
            words = reply if verdict is None else _refusal(verdict)
            _guarded(course, lambda: _listen(line, channel, limits.refusal, course, words, asked=True))
            course.broken = verdict or course.broken
        return _recording(place, now, line, server.recorder, course)


def _connect(host: str, port: int, place: str, limits: Limits) -> socket.socket:
    try:
        plug = socket.create_connection((host, port), timeout=limits.handshake)
    except UnicodeError:
        raise Unreachable(Reason.UNREACHABLE_NAME, target=place, host=host, detail="it is not a name") from None
    except socket.gaierror as error:
        detail = (error.strerror or str(error)).lower()
        raise Unreachable(Reason.UNREACHABLE_NAME, target=place, host=host, detail=detail) from None
    except TimeoutError:
        detail = f"no answer within {limits.handshake:g} s"
        raise Unreachable(Reason.UNREACHABLE, target=place, detail=detail) from None
    except OSError as error:
        raise Unreachable(Reason.UNREACHABLE, target=place, detail=(error.strerror or str(error)).lower()) from None
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plug


def _guarded(course: _Course, work: Callable[[], Channel | None]) -> Channel | None:
    """Do the work; note how the connection ended if it did."""
    try:
        return work()
    except TimeoutError:
        course.ending = Ending.TIMEOUT if course.done is None else Ending.QUIET
    except TlsBroken as broken:
        course.broken = broken.failure
        course.ending = Ending.CUT if broken.failure.reason is Reason.TLS_CLOSED else Ending.BROKEN
    except ConnectionError:
        course.ending = Ending.RESET
    except OSError as error:
        course.ending, course.broken = Ending.CUT, Failure(Reason.TLS_HANDSHAKE, {"detail": str(error)})
    return None


def _client_handshake(line: _Line, client: WatchedClient, limits: Limits, course: _Course) -> Channel | None:
    records = b""
    while True:
        try:
            channel = client.feed(records)
        finally:
            line.send(client.take())  # an alert among them
        if channel is not None:
            course.done = line.clock()
            return channel
        if line.size > MAX_HANDSHAKE or client.recorder.full:
            course.ending = Ending.FULL
            return None
        records = line.receive(limits.handshake)
        if not records:
            course.ending = Ending.CUT
            return None


def _server_handshake(line: _Line, server: WatchedServer, limits: Limits, course: _Course) -> Channel | None:
    while True:
        records = line.receive(limits.handshake)
        if not records:
            course.ending = Ending.CUT
            return None
        outcome = server.feed(records)
        line.send(server.take())
        match outcome:
            case Accepted(channel=channel):
                course.done = line.clock()
                return channel
            case Refused(failures=failures, channel=channel):
                course.broken = failures[0]
                if channel is None:
                    course.ending = Ending.BROKEN
                    return None
                course.done = line.clock()
                return channel
        if line.size > MAX_HANDSHAKE:
            course.ending = Ending.FULL
            return None


def _listen(
    line: _Line, channel: Channel, wait: float, course: _Course, words: bytes, asked: bool = False
) -> Channel | None:
    """Read what comes after the handshake. `words` are sent after a short silence or, if `asked`, after a question."""
    begin = line.clock()
    until, speak_at = begin + wait, begin + (wait if asked else min(_SPEAKS_FIRST, wait / 2))
    spoken = not words
    try:
        while True:
            answer = channel.read()
            line.send(channel.take())
            course.answer = (course.answer + answer)[:_MOST_ANSWER]
            if channel.at_eof:
                course.ending = Ending.CLOSED
                return None
            if not asked and course.answer:
                spoken = True  # it greets, so it need not be asked
            if not spoken and (answer if asked else line.clock() >= speak_at):
                spoken = True
                channel.write(words)
                course.said = words
                if asked:
                    channel.close()
                    until = min(until, line.clock() + wait / 4)
                line.send(channel.take())
            if line.size > _MOST_READ:
                course.ending = Ending.FULL
                return None
            if len(course.answer) >= _MOST_ANSWER or (course.answer and not asked and _whole(course.answer)):
                channel.close()
                line.send(channel.take())
                return None
            if channel.more:
                continue
            try:
                records = line.receive(until if spoken else min(speak_at, until))
            except TimeoutError:
                if not spoken and not asked and line.clock() < until:
                    continue
                channel.close()
                line.send(channel.take())
                raise
            if not records:
                course.ending = Ending.CUT
                return None
            channel.feed(records)
    finally:
        course.waited = line.clock() - begin


def _whole(answer: bytes) -> bool:
    """Whether an HTTP answer's head and the body that it announces are there; True for what is no HTTP."""
    if not answer.startswith(b"HTTP/1."):
        return True
    head, end, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:") and line[15:].strip().isdigit():
            return bool(end) and len(body) >= int(line[15:].strip()[:9])
    return False  # until it closes, or the time is over


def _refusal(failure: Failure) -> bytes:
    """As a guard tells a client: the short code and no more."""
    body = b'{"error": "%s"}\n' % failure.reason.code.encode()
    head = f"HTTP/1.1 {failure.reason.http or 403} Refused\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _recording(place: str, now: datetime, line: _Line, recorder: Recorder, course: _Course) -> Recording:
    return Recording(
        place=place,
        began=now,
        seen_from=line.side,
        events=tuple(recorder.events),
        chunks=tuple(line.chunks),
        ending=course.ending,
        done=course.done,
        waited=course.waited,
        broken=course.broken,
        said=course.said,
        answer=course.answer,
        protocol=course.protocol,
        keylog=tuple(recorder.keylog),
    )
