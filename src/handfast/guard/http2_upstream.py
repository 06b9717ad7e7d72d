"""The way to an HTTP/2 app (gRPC): one connection for each client connection and group of backends.

Each `Call` is one stream on it, for one stream of the client. Flow control goes from end to end: what one side does
not take, the other may not send. Trailers, resets and GOAWAY go through in both directions.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from hyperframe.frame import GoAwayFrame

from handfast.errors import Failure, Reason, RemoteProtocolError
from handfast.guard.http2_frames import Outflow, machine
from handfast.guard.http2_streams import AnswerHead, Stream, answer_head
from handfast.guard.upstream import SecureUpstream, Upstream, Upstreams, cut_short, unanswered
from handfast.wire.http1 import Header
from handfast.wire.http2 import app_answer, trailer_fields

if TYPE_CHECKING:
    from handfast.guard.http2 import Http2Session

_MOST_KNOWN, _LONGEST_KNOWN = 8, 2048  # heads of answers, and trailers, that are remembered, and bytes of one
# Resets that mean to the client what they mean to us; any other is a fault behind us.
_PASSED_ON = frozenset({ErrorCodes.CANCEL, ErrorCodes.REFUSED_STREAM, ErrorCodes.ENHANCE_YOUR_CALM})


class Call:
    """One request on its way to the app, and back. See Carrier."""

    __slots__ = ("_app", "answered", "fields", "out", "stream", "unpaid")

    def __init__(self, app: AppConnection, stream: Stream, fields: Sequence[Header]) -> None:
        self._app = app
        self.fields = fields
        self.stream: Stream | None = stream  # None: nobody waits for it any more
        self.out = Outflow(app.machine, app.frames)
        self.out.last = stream.asked
        self.answered = False  # the app has said all
        self.unpaid = 0  # bytes of the answer that the app may not send again before the client took them

    def body(self, data: bytes, credit: int, last: bool) -> None:
        """See Carrier."""
        if self.stream is not None and not self._app.full and not self._app.closed:
            self.stream.taken(self.out.send(data, credit, last))
            self._app.touch()
        else:
            self.out.push(data, credit, last)

    def trailers(self, fields: list[Header]) -> None:
        """See Carrier."""
        self.out.trailers, self.out.last = fields, True
        self.pump()

    def sent(self, credit: int) -> None:
        """See Carrier."""
        self.unpaid -= credit
        self._app.pay(self, credit)

    def cut(self, code: int) -> None:
        """See Carrier."""
        self.stream = None
        self.out.drop()
        self._app.leave(self, code)

    def pump(self) -> None:
        """Send what the app takes."""
        if self.stream is not None and not self._app.full and not self._app.closed:
            self.stream.taken(self.out.pump())
            self._app.touch()


class AppConnection:
    """See the module's docstring. It belongs to one client connection alone."""

    def __init__(self, session: Http2Session, upstreams: Upstreams) -> None:
        self.upstreams = upstreams
        self.retired = False  # takes no more calls
        self.closed = False  # nothing can be sent any more
        self.full = False  # the way to the app is
        self.machine, self.frames = machine(client_side=True)
        self._session = session
        self._upstream: Upstream | SecureUpstream | None = None
        self._calls: dict[int, Call] = {}
        self._waiting: deque[Call] = deque()  # until it is open, or has room for one more
        self._gathered = False  # something may wait to be written
        # What came lately and what it became, by the id of what came, which is kept with it.
        self._answers: dict[int, tuple[Sequence[Header], AnswerHead]] = {}
        self._trailers: dict[int, tuple[Sequence[Header], Sequence[Header]]] = {}
        self._dialling: asyncio.Task[None] | None = upstreams.dial(self, session.connection.preface(upstreams))

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._calls and not self._waiting

    def call(self, stream: Stream, fields: Sequence[Header]) -> None:
        """Take a request to the app."""
        call = Call(self, stream, fields)
        stream.carrier = call
        self._waiting.append(call)
        self._begin()

    def touch(self) -> None:
        """Have what was gathered written at the end of the turn."""
        if not self._gathered:
            self._gathered = True
            self._session.dirty(self)

    def flush(self) -> None:
        """Write what was gathered."""
        self._gathered = False
        if self.machine.unsent and self._upstream is not None and self._upstream.usable:
            self._upstream.write(self.machine.data_to_send())

    def pay(self, call: Call, credit: int) -> None:
        """The client took so much of an answer: the app may send as much more."""
        if credit and not self.closed:
            self.machine.acknowledge_received_data(credit, call.out.id)
            if self.machine.unsent:
                self.touch()

    def leave(self, call: Call, code: int) -> None:
        """Nobody waits for this call any more."""
        unpaid, call.unpaid = call.unpaid, 0
        self.pay(call, unpaid)
        if not call.out.id:
            if call in self._waiting:
                self._waiting.remove(call)
            return
        self._reset(call.out.id, code)
        self._calls.pop(call.out.id, None)
        self._leave_if_retired()
        self._begin()

    def drop(self) -> None:
        """Close it; what is under way on it is somebody else's worry."""
        self.retired = self.closed = True
        if self._dialling is not None:
            self._dialling.cancel()
            self._dialling = None
        if self._upstream is not None:
            self._upstream.drop()
            self._upstream = None

    # Owner.

    def upstream_open(self, upstream: Upstream | SecureUpstream) -> None:
        """See Owner."""
        self._dialling = None
        self._upstream = upstream
        self.touch()
        self._begin()
        self._session.flush()

    def upstream_failed(self, failure: Failure) -> None:
        """See Owner."""
        self._dialling = None
        self._lost(failure)

    def upstream_data(self, data: bytes) -> None:
        """See Owner."""
        try:
            events = self.machine.receive_data(data)
        except ProtocolError as error:
            self.flush()  # it holds what tells the app why
            detail = f"it does not keep to HTTP/2: {error}"[:200]
            self._lost(Failure(Reason.UPSTREAM_BAD_RESPONSE, {"target": str(self.upstreams), "detail": detail}))
            return
        for event in events:
            self._on(event)
        if (frame := self.frames.goaway) is not None:
            self.frames.goaway = None
            self._retire(frame)
        if self.machine.unsent:
            self.touch()
        self._session.flush()

    def upstream_ended(self) -> None:
        """See Owner."""
        self._lost(None)

    def upstream_lost(self, reset: bool) -> None:
        """See Owner."""
        self._lost(None)

    def upstream_bug(self, bug: Exception) -> None:
        """See Owner."""
        self._session.connection.bug(bug)

    def upstream_writable(self, yes: bool) -> None:
        """See Owner."""
        self.full = not yes
        if yes:
            self._pump_all()
            self._session.flush()

    def _begin(self) -> None:
        """Begin the calls that have room."""
        made = self.machine
        while self._waiting and self._upstream is not None and not self.retired:
            if len(self._calls) >= made.places:
                return
            call = self._waiting.popleft()
            out = call.out
            out.id = made.next_stream
            waits = not out.empty
            out.done = out.last and not waits
            made.put_headers(out.id, call.fields, out.done)
            self._calls[out.id] = call
            self.touch()
            if waits:
                call.pump()

    def _on(self, event: Event) -> None:
        match event:
            case DataReceived():
                self._on_data(event)
            case ResponseReceived() | InformationalResponseReceived() | TrailersReceived():
                self._on_headers(event)
            case StreamReset():
                self._on_reset(event)
            case WindowUpdated():
                call = self._calls.get(event.stream_id)
                if call is not None:
                    call.pump()
                elif not event.stream_id:
                    self._pump_all()
            case RemoteSettingsChanged():
                self._pump_all()
                self._begin()
            case _:  # of these the library takes care: PING, and ends that the others tell of too
                pass

    def _on_data(self, event: DataReceived) -> None:
        call, credit = self._calls.get(event.stream_id), event.flow_controlled_length
        if call is None or call.stream is None:
            if credit:
                self.machine.acknowledge_received_data(credit, event.stream_id)
            return
        call.unpaid += credit
        call.answered = event.stream_ended is not None
        call.stream.data(event.data, credit, call.answered)

    def _on_headers(self, event: ResponseReceived | InformationalResponseReceived | TrailersReceived) -> None:
        call = self._calls.get(event.stream_id)
        if call is None or call.stream is None:
            return
        stream = call.stream
        try:
            if isinstance(event, TrailersReceived):
                trailers = self._read_trailers(event.headers)
                call.answered = True
                stream.finish(trailers)
                return
            head = self._read_answer(event.headers)
            if head.status == 101 or (head.status < 200) is not isinstance(event, InformationalResponseReceived):
                raise RemoteProtocolError(Reason.UPSTREAM_BAD_RESPONSE, target="", detail="a status out of place")
        except RemoteProtocolError as error:
            detail = error.facts.get("detail", error.failure.message)
            stream.fail(Failure(Reason.UPSTREAM_BAD_RESPONSE, {"target": str(self.upstreams), "detail": detail}))
            return
        if isinstance(event, InformationalResponseReceived):
            assert stream.head is not None
            if head.status != 100 or stream.head.expect_continue:
                stream.informed(head)
            return
        call.answered = event.stream_ended is not None
        stream.answered(head, last=call.answered)

    def _read_answer(self, headers: Sequence[Header]) -> AnswerHead:
        """What goes to the client for the head of an answer; the very tuple that came before is known."""
        known = self._answers.get(id(headers))
        if known is None or known[0] is not headers:
            known = headers, answer_head(*app_answer(headers))
            _keep(self._answers, known)
        return known[1]

    def _read_trailers(self, headers: Sequence[Header]) -> Sequence[Header]:
        known = self._trailers.get(id(headers))
        if known is None or known[0] is not headers:
            known = headers, tuple(trailer_fields(headers))
            _keep(self._trailers, known)
        return known[1]

    def _on_reset(self, event: StreamReset) -> None:
        call = self._calls.pop(event.stream_id, None)
        if call is None or call.stream is None:
            return
        if call.answered:  # the app wants no more of the request, and has said all; what it said still goes out
            call.stream.taken(call.out.drop())
            return
        code = event.error_code if isinstance(event.error_code, ErrorCodes) else ErrorCodes.INTERNAL_ERROR
        detail = f"it reset the request ({code.name})"
        failure = Failure(Reason.UPSTREAM_BAD_RESPONSE, {"target": str(self.upstreams), "detail": detail})
        call.stream.cut(failure, code if code in _PASSED_ON else ErrorCodes.INTERNAL_ERROR)

    def _retire(self, frame: GoAwayFrame) -> None:
        """The app takes no more on this connection (RFC 9113 6.8): what it did not look at may be asked again."""
        self.retired = True
        refused = [call for identifier, call in self._calls.items() if identifier > frame.last_stream_id]
        for call in [*refused, *self._waiting]:
            if call.stream is not None:
                detail = "it closes the connection and did not take the request"
                failure = Failure(Reason.UPSTREAM_DOWN, {"target": str(self.upstreams), "detail": detail})
                call.stream.cut(failure, ErrorCodes.REFUSED_STREAM)
        self._leave_if_retired()

    def _lost(self, failure: Failure | None) -> None:
        """The connection is gone, or never was."""
        self.drop()
        self._session.leave(self)
        calls = [*self._calls.values(), *self._waiting]
        self._calls.clear()
        self._waiting.clear()
        for call in calls:
            if call.stream is None or call.answered:
                continue
            told = failure
            if told is None and not call.stream.status:
                told = unanswered(self.upstreams)
            elif told is None:
                told = cut_short(self.upstreams)
            call.stream.fail(told)
        self._session.flush()

    def _leave_if_retired(self) -> None:
        if self.retired and self.idle and self._upstream is not None:
            self.flush()
            self._upstream.close()
            self._upstream, self.closed = None, True
            self._session.leave(self)

    def _pump_all(self) -> None:
        for call in list(self._calls.values()):
            call.pump()

    def _reset(self, identifier: int, code: int) -> None:
        if not self.closed and self.machine.live(identifier) is not None:
            self.machine.reset_stream(identifier, code or ErrorCodes.CANCEL)
            self.touch()


def _keep(known: dict[int, Any], made: tuple[Sequence[Header], Any]) -> None:
    """Remember what a header list became, where nobody can change the list."""
    if isinstance(made[0], tuple) and sum(len(name) + len(value) for name, value in made[0]) <= _LONGEST_KNOWN:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[id(made[0])] = made
