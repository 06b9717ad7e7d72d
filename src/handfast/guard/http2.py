"""HTTP/2 mode: the requests of one verified peer, many at a time (RFC 9113).

Theory of operation. The library (`http2_frames`) keeps the rules of frames, states and windows. Each request becomes
a `Stream`, which the connection's one Door judges, and a carrier takes it to its app:

    frames -> header list -> wire.http2 (one strict reading) -> Door -> Line (HTTP/1.1) | Call (HTTP/2) -> app

What one stream does wrong ends that stream; what breaks the connection's rules, or floods it, ends the connection.
All that a turn of the event loop makes goes out in one write to each side. Each stream has a deadline of its own,
and the connection's is the nearest of them.
"""

from __future__ import annotations

import secrets
from base64 import b64encode
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from hpack import NeverIndexedHeaderTuple

from handfast.errors import Failure, Reason, RemoteProtocolError
from handfast.guard.door import Admission, Door, strip_override
from handfast.guard.events import told
from handfast.guard.http2_frames import MAX_STREAMS, MOST_STREAMS, Flood, goaway, machine
from handfast.guard.http2_lines import Line
from handfast.guard.http2_streams import Stream, answer_head
from handfast.guard.http2_upstream import AppConnection
from handfast.guard.places import Speech
from handfast.guard.upstream import EXPECTED, Upstreams
from handfast.tls.channel import Channel
from handfast.wire.http1 import Header, RequestHead, rewrite_request
from handfast.wire.http2 import request_fields, request_head, trailer_fields
from handfast.wire.identity import fold

if TYPE_CHECKING:
    from handfast.guard.connection import Connection

# Bytes that wait for one client: above the first, apps are read only for streams that hold nothing; above the second,
# for none. So one that does not read costs so much and a read more, and streams that rest leave room for the others.
MANY_HELD, MOST_HELD = 1 << 20, 1 << 23
_TURN = 1 << 19  # bytes of answers after which a client's other streams wait for the next turn of the event loop
_KEPT = 16  # connections to HTTP/1.1 apps that wait for the next request
_ON_ITS_WAY = 1.0  # seconds in which a request may come that was sent before its client heard that we leave
_REST = 10.0  # seconds without a request after which the connections to apps are given back
_MOST_KNOWN, _LONGEST_KNOWN = 16, 2048  # requests that are remembered, and bytes of their header lists
_SECRET = frozenset({b"authorization", b"cookie", b"proxy-authorization"})  # RFC 7541 7.1.3: never in a table


class _Known:
    """A header list that came before, and what it became."""

    __slots__ = ("fields", "head", "sent", "set_headers", "strip")

    def __init__(self, head: RequestHead, set_headers: tuple[Header, ...], strip: Callable[[bytes], bool]) -> None:
        self.head, self.set_headers, self.strip = head, set_headers, strip
        self.fields: tuple[Header, ...] = ()  # for an app of HTTP/2
        self.sent = b""  # for one of HTTP/1.1


class Http2Session:
    """A connection that may carry requests: it cannot be made without a Door."""

    __slots__ = (
        *("_apps", "_channel", "_closed", "_count", "_dirty", "_door", "_finishing", "_head_begun", "_held", "_kept"),
        *("_known", "_latest", "_leaving", "_pumping", "_rested", "_streams"),
        *("blocked", "connection", "frames", "hungry", "machine"),
    )

    def __init__(self, connection: Connection, door: Door, channel: Channel) -> None:
        self.connection = connection
        self.machine, self.frames = machine(client_side=False)
        self.hungry: dict[int, Stream] = {}  # these have something for the client
        self.blocked = False  # the way to the client is full
        self._door = door
        self._channel = channel
        self._streams: dict[int, Stream] = {}
        self._kept: list[Line] = []
        self._apps: list[AppConnection] = []
        self._dirty: list[Line | AppConnection] = []  # they have something to write
        self._known: dict[tuple[object, ...], _Known] = {}
        self._latest: tuple[tuple[Header, ...], bool, _Known] | None = None
        self._pumping = False  # a turn of `_pump` is to come
        self._leaving = False  # the client was told to ask elsewhere
        self._finishing = False  # no new requests
        self._closed = False  # all is said
        self._held = 0  # bytes of answers that wait for the client
        self._head_begun = False
        self._rested = True  # no connection to an app waits
        self._count = 0

    def start(self) -> None:
        """Say the first words, and read what came along with the last of the handshake."""
        self.connection.set_deadline(self.connection.limits.idle)
        if self.connection.guard.draining:  # who came in as the guard was told to stop may ask all the same
            self.connection.hurry()
        self._read()

    # The client's side.

    def received(self, data: bytes) -> None:
        """Records from the client."""
        self._channel.feed(data)
        self._read()

    def ended(self) -> None:
        """The client's TCP ended: it waits for no answer. By close_notify alone it says that it asks no more."""
        if self._streams:
            self.connection.abort()
        else:
            self._close()

    def writable(self, yes: bool) -> None:
        """The way to the client is full, or free again."""
        self.blocked = not yes
        if yes:
            self._pump()
            self.flush()

    def lost(self) -> None:
        """The client is gone."""
        self._closed = True
        for stream in list(self._streams.values()):
            stream.gone()
        self._drop_apps()

    def expired(self) -> None:
        """The nearest deadline passed: of a stream, or of a connection without any."""
        moment, connection = monotonic(), self.connection
        if not self._streams:
            if not self._rested and not self._head_begun:
                self._rested = True
                self._drop_apps()
                connection.set_deadline(max(connection.limits.idle - _REST, 0))
                return
            if self._head_begun:
                self._log_end(Failure(Reason.HTTP_TIMEOUT))
            self._close()
            return
        for stream in list(self._streams.values()):
            if moment >= stream.deadline:
                stream.expired()
        if self._streams:
            connection.deadline = min(stream.deadline for stream in self._streams.values())
        self.flush()

    def finish(self) -> None:
        """Answer what is under way, then close. The client may ask the rest elsewhere.

        It is told so twice: what it asked before it heard of it the first time is answered too (RFC 9113 6.8).
        """
        if self._leaving or self._finishing or self._closed:
            return
        if not self._count:  # it came in and has not asked yet: it may
            self.connection.hurry()
        elif not self._streams and self._rested:
            self._close()
        else:
            self._leaving = True
            self._say_goaway(MOST_STREAMS)
            self.connection.later(_ON_ITS_WAY, self._finish_now)

    def _finish_now(self) -> None:
        """Take no more requests."""
        if self._closed or self.connection.transport.is_closing():
            return
        self._finishing = True
        if self._streams:
            self._say_goaway(self.machine.highest_inbound_stream_id)
        else:
            self._close()

    def _say_goaway(self, last_stream: int) -> None:
        self.flush()
        self._channel.write(goaway(last_stream))
        self._send()

    def still_allowed(self) -> bool:
        """End what the site now in force does not allow: a call may last for days. The connection goes on."""
        for stream in list(self._streams.values()):
            head = stream.head
            if stream.admission is not None and head is not None and not self._door.allows(head.method, head.path):
                stream.fail(Failure(Reason.ENDED_POLICY))
        self.flush()
        return True

    def _read(self) -> None:
        """Act on what the client sent."""
        channel, connection = self._channel, self.connection
        while not self._closed:
            plain = channel.read()
            if not plain:
                break
            count = self.frames.count
            try:
                events = self.machine.receive_data(plain)
            except ProtocolError as error:  # GOAWAY is made already, and says so
                self._broken(error)
                return
            try:
                for event in events:
                    self._on(event)
            except Flood as flood:
                self.machine.close_connection(flood.error_code)
                self._broken(flood)
                return
            if not self._streams and count == self.frames.count and not self._head_begun:
                self._head_begun = True  # once: a byte now and then buys no more time
                connection.set_deadline(connection.limits.head)
            if not channel.more:
                break
        if self.frames.goaway is not None:
            self._finishing = True
            if not self._streams:
                self._close()
        self.flush()
        if channel.at_eof:
            self._client_ended()

    def _on(self, event: Event) -> None:
        if self._closed:  # by what came before it in the same breath: it is nobody's
            return
        match event:
            case RequestReceived():
                self._on_request(event)
            case DataReceived():
                stream, credit = self._streams.get(event.stream_id), event.flow_controlled_length
                if stream is not None:
                    stream.take(event.data, credit, event.stream_ended is not None)
                elif credit:
                    self.machine.acknowledge_received_data(credit, event.stream_id)
            case WindowUpdated():
                if not event.stream_id:
                    self._pump()
                elif event.stream_id in self.hungry:
                    if self.machine.unsent < _TURN:
                        self.hungry.pop(event.stream_id).pump()
                    else:
                        self._pump_later()
            case StreamReset():
                # Made to reset it ourselves, at no less a cost (CVE-2025-8671), it counts in any case.
                lived = 0.0
                if (stream := self._streams.get(event.stream_id)) is not None:
                    lived = monotonic() - stream.timing.began if event.remote_reset else 0.0
                    stream.gone()
                self.frames.spend_reset(lived)
            case TrailersReceived():
                self._on_trailers(event)
            case RemoteSettingsChanged():
                self._pump()
            case _:  # of these the library takes care: PING, PRIORITY, and ends that the others tell of too
                pass

    def _on_request(self, event: RequestReceived) -> None:
        self._head_begun = False
        if self._finishing or len(self._streams) >= MAX_STREAMS:
            self.reset(event.stream_id, ErrorCodes.REFUSED_STREAM)
            self.frames.spend_reset()
            return
        self._count += 1
        asked = event.stream_ended is not None
        try:
            known = self._parse(event.headers, asked)
        except RemoteProtocolError as error:
            self._refuse(event.stream_id, None, error.failure, asked=asked)
            self.frames.spend_reset()
            return
        head = known.head
        judged = self._door.judge(head.method, head.path, head.host)
        limit = self.connection.limits.max_body
        if isinstance(judged, Failure):
            self._refuse(event.stream_id, head, judged, asked=asked)
        elif limit is not None and head.length > limit:
            self._refuse(event.stream_id, head, Failure(Reason.HTTP_BODY_TOO_LARGE, {"limit": limit}), asked=asked)
        elif head.upgrade and judged.route.upstreams.target.speech is Speech.HTTP2:
            self._refuse(event.stream_id, head, Failure(Reason.HTTP_METHOD, {"method": "CONNECT"}), asked=asked)
        else:
            self._forward(event, known, judged)

    def _on_trailers(self, event: TrailersReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        ours = {fold(name) for name, _ in self._door.headers()}
        try:
            fields = trailer_fields(event.headers, lambda name: fold(name) in ours or strip_override(name))
            stream.take_trailers(fields)
        except RemoteProtocolError as error:
            self.frames.spend_reset()
            stream.cut(error.failure, ErrorCodes.PROTOCOL_ERROR)

    def _parse(self, headers: Sequence[Header], asked: bool) -> _Known:
        """Read a header list; one that came before is known, and the very tuple that came last at once."""
        set_headers, strip, latest = self._door.headers(), self._door.strip, self._latest
        if latest is not None and latest[0] is headers and latest[1] is asked:
            known = latest[2]
            if known.set_headers is set_headers and known.strip is strip:
                return known
        return self._read_fields(headers, asked, set_headers, strip)

    def _read_fields(
        self, headers: Sequence[Header], asked: bool, set_headers: tuple[Header, ...], strip: Callable[[bytes], bool]
    ) -> _Known:
        key = (*headers, asked, *map(type, headers))
        known = self._known.get(key)
        if known is not None and known.set_headers is set_headers and known.strip is strip:
            if isinstance(headers, tuple):
                self._latest = headers, asked, known
            return known
        head = request_head(headers, asked)
        known = _Known(head, set_headers, strip)
        if sum(len(name) + len(value) for name, value in headers) <= _LONGEST_KNOWN:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = known
        return known

    # Towards the apps.

    def _forward(self, event: RequestReceived, known: _Known, admission: Admission) -> None:
        self._rested = False
        asked, upstreams = event.stream_ended is not None, admission.route.upstreams
        stream = Stream(self, event.stream_id, self._count, known.head, asked=asked)
        stream.admission = admission
        self._streams[event.stream_id] = stream
        stream.wait()
        if known.head.expect_continue and not asked:
            self.connection.later(EXPECTED, self._go_on, stream)
        if upstreams.target.speech is Speech.HTTP2:
            if not known.fields:
                fields = request_fields(event.headers, known.head, known.set_headers, known.strip)
                known.fields = tuple(
                    NeverIndexedHeaderTuple(*field) if field[0] in _SECRET else field for field in fields
                )
            self._app(upstreams).call(stream, known.fields)
            return
        key = b64encode(secrets.token_bytes(16)) if known.head.upgrade else b""
        if key:
            ours = (*known.set_headers, (b"Sec-WebSocket-Key", key))
            sent = rewrite_request(known.head, ours, known.strip)
        else:
            sent = known.sent = known.sent or rewrite_request(known.head, known.set_headers, known.strip)
        self._line(upstreams).carry(stream, sent, key)

    def _go_on(self, stream: Stream) -> None:
        """Ask for the body that the client holds back, where the app says nothing (RFC 9110 10.1.1)."""
        closing = self._closed or self.connection.transport.is_closing()
        if self._streams.get(stream.id) is stream and not (stream.status or stream.timing.bytes_in or closing):
            stream.informed(answer_head(100, []))
            self.flush()

    def _line(self, upstreams: Upstreams) -> Line:
        """Return a connection that is free, or a new one."""
        for at in reversed(range(len(self._kept))):
            if self._kept[at].upstreams is upstreams:
                line = self._kept.pop(at)
                if line.usable:
                    return line
                line.drop()
        return Line(self, upstreams)

    def _app(self, upstreams: Upstreams) -> AppConnection:
        for app in self._apps:
            if app.upstreams is upstreams and not app.retired:
                return app
        self._apps.append(AppConnection(self, upstreams))
        return self._apps[-1]

    def hold(self, more: int) -> None:
        """So many bytes more (or less) wait for the client, of all answers."""
        before, self._held = self._held, self._held + more
        for bound in (MANY_HELD, MOST_HELD):
            if (before > bound) is not (self._held > bound):
                for stream in self._streams.values():
                    if isinstance(stream.carrier, Line):
                        stream.carrier.flow()
                return

    def crowded(self, stream: Stream) -> bool:
        """Whether so much waits for the client that no more is read of this stream's answer."""
        return self._held > MOST_HELD or (self._held > MANY_HELD and stream.waiting > 0)

    def keep(self, line: Line) -> None:
        """Keep a connection for the next request."""
        self._kept.append(line)
        if len(self._kept) > _KEPT:
            self._kept.pop(0).drop()

    def discard(self, line: Line) -> None:
        """A connection that was kept is of no more use."""
        if line in self._kept:
            self._kept.remove(line)
        line.drop()

    def leave(self, app: AppConnection) -> None:
        """A connection to an app is gone."""
        if app in self._apps:
            self._apps.remove(app)

    def dirty(self, carrier: Line | AppConnection) -> None:
        """Have it write at the end of this turn."""
        self._dirty.append(carrier)

    def _drop_apps(self) -> None:
        for line in self._kept:
            line.drop()
        for app in self._apps:
            app.drop()
        self._kept.clear()
        self._apps.clear()

    # Towards the client.

    def sendable(self, identifier: int) -> bool:
        """Whether the client still hears of this stream."""
        return self.machine.live(identifier) is not None

    def reset(self, identifier: int, code: int) -> None:
        """End a stream visibly."""
        if self.sendable(identifier):
            self.machine.reset_stream(identifier, code)

    def need_no_more(self, identifier: int) -> None:
        """Tell the client, whose request was answered before it was whole, to send no more of it."""
        if not self._closed and not self.connection.transport.is_closing():
            self.reset(identifier, ErrorCodes.NO_ERROR)
            self.flush()

    def forget(self, stream: Stream) -> None:
        """A stream is over."""
        self.hungry.pop(stream.id, None)
        self._streams.pop(stream.id, None)
        if self._streams or self._closed:
            return
        if self._finishing:
            self._close()
            return
        if self.connection.guard.draining:
            self.finish()
        if not self._closed:
            self.connection.set_deadline(min(_REST, self.connection.limits.idle))

    def flush(self) -> None:
        """Write what this turn made, to each side at once."""
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for carrier in dirty:
                carrier.flush()
        if self.machine.unsent:
            self._channel.write(self.machine.data_to_send())
        self._send()

    def _send(self) -> None:
        if records := self._channel.take():
            self.connection.send(records)

    def _pump(self) -> None:
        """Give each stream that has something its turn; those that are not done come last the next time."""
        if self.blocked:
            return
        hungry, self.hungry = self.hungry, {}
        while hungry and self.machine.unsent < _TURN:
            identifier = next(iter(hungry))
            stream = hungry.pop(identifier)
            if identifier in self._streams:
                stream.pump()
        if hungry:
            self.hungry = {one: stream for one, stream in hungry.items() if one in self._streams} | self.hungry
            self._pump_later()

    def _pump_later(self) -> None:
        if not self._pumping:
            self._pumping = True
            self.connection.later(0, self._pump_on)

    def _pump_on(self) -> None:
        self._pumping = False
        if not self._closed and not self.connection.transport.is_closing():
            self._pump()
            self.flush()

    def _refuse(self, identifier: int, head: RequestHead | None, failure: Failure, *, asked: bool) -> None:
        stream = Stream(self, identifier, self._count, head, asked=asked)
        self._streams[identifier] = stream
        stream.refuse(failure)

    # Ends.

    def _broken(self, error: ProtocolError) -> None:
        """The client broke the rules of the connection, or floods it."""
        if isinstance(error, Flood):
            failure = Failure(Reason.HTTP_H2_FLOOD, {"what": error.what})
        else:
            failure = Failure(Reason.HTTP_H2, {"detail": f"{error}"[:200] or type(error).__name__})
        self._log_end(failure)
        self._end()

    def _log_end(self, failure: Failure) -> None:
        self.connection.event("ended", {"decision": "deny"} | told(failure))

    def _close(self) -> None:
        """Say that nothing more comes."""
        if not self._closed:
            self.machine.close_connection(ErrorCodes.NO_ERROR)
            self._end()

    def _end(self) -> None:
        self._closed = True
        for stream in list(self._streams.values()):
            stream.gone()
        self._drop_apps()
        if self.connection.transport.is_closing():
            return
        self.flush()
        self._channel.close()
        self._send()
        self.connection.linger()

    def _client_ended(self) -> None:
        self._finishing = True
        if not self._streams:
            self._close()
        elif not all(stream.asked for stream in self._streams.values()):
            self.connection.abort()
