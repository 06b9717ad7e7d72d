"""One request of an HTTP/2 client and its answer.

A `Stream` holds what goes to the client, within the client's windows. Its `Carrier` takes the request to the app and
brings the answer: a `Line` (http2_lines) to an app of HTTP/1.1, a `Call` (http2_upstream) to one of HTTP/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, Protocol

from h2.errors import ErrorCodes

from handfast.errors import Failure, Reason
from handfast.guard.door import Admission
from handfast.guard.events import Logged, Timing
from handfast.guard.http2_frames import Outflow
from handfast.wire.bodies import BodyKind
from handfast.wire.http1 import Header, RequestHead

if TYPE_CHECKING:
    from handfast.guard.http2 import Http2Session


class Carrier(Protocol):
    """The way of one request to its app."""

    def body(self, data: bytes, credit: int, last: bool) -> None:
        """Take a piece of the request's body; `credit` goes back by `Stream.taken` when it went on."""

    def trailers(self, fields: list[Header]) -> None:
        """The request ends with these."""

    def sent(self, credit: int) -> None:
        """The client was sent so much of the answer."""

    def cut(self, code: int) -> None:
        """Nobody waits for the answer any more."""


class AnswerHead(NamedTuple):
    """The head of an answer, as it goes to the client; `lasting`: it may rest in the midst (a websocket, gRPC)."""

    status: int
    fields: tuple[Header, ...]  # `:status` first
    lasting: bool


def answer_head(status: int, fields: list[Header], *, lasting: bool = False) -> AnswerHead:
    """Put a head together; `fields` are without `:status`."""
    lasting = lasting or any(n == b"content-type" and v.startswith(b"application/grpc") for n, v in fields)
    return AnswerHead(status, ((b":status", b"%d" % status), *fields), lasting)


class Stream:
    """See the module's docstring. `admission` is there where the request was let through."""

    __slots__ = (
        *("_counted", "_held", "_lasting", "_out", "_session", "_stalled", "admission", "asked", "carrier", "deadline"),
        *("head", "id", "number", "status", "timing"),
    )

    def __init__(
        self, session: Http2Session, identifier: int, number: int, head: RequestHead | None, *, asked: bool
    ) -> None:
        self._session = session
        self.id = identifier
        self.number = number  # of the connection's requests
        self.head = head
        self.asked = asked  # the request is whole
        self.admission: Admission | None = None
        self.carrier: Carrier | None = None
        self.timing = Timing(monotonic())
        self.status = 0  # of the answer, once it began
        self.deadline = inf  # on the clock of `monotonic`
        self._out = Outflow(session.machine, session.frames, identifier)
        self._counted = 0  # bytes of the answer, as the session counts them
        self._held = 0  # bytes that the client may not send again before they went on
        self._stalled = False  # the client takes no more for now
        self._lasting = False  # may rest in the midst of its answer: a websocket, gRPC

    @property
    def waiting(self) -> int:
        """Bytes of the answer that wait for the client."""
        return self._out.size

    # The client's side.

    def take(self, data: bytes, credit: int, last: bool) -> None:
        """A piece of the request's body."""
        self._held += credit
        if self._belies_its_length(len(data), last):
            return
        self.asked = self.asked or last
        if self.carrier is None:  # answered already
            self.taken(credit)
            return
        self.timing.bytes_in += len(data)
        limit = self._session.connection.limits.max_body
        if limit is not None and self.timing.bytes_in > limit:
            self.fail(Failure(Reason.HTTP_BODY_TOO_LARGE, {"limit": limit}))
            return
        self.carrier.body(data, credit, last)
        self.wait()

    def take_trailers(self, fields: list[Header]) -> None:
        """The request's end."""
        if self._belies_its_length(0, True):
            return
        self.asked = True
        if self.carrier is not None:
            self.carrier.trailers(fields)
            self.wait()

    def _belies_its_length(self, size: int, last: bool) -> bool:
        """Whether the body is not as long as its head said (RFC 9113 8.1.1); the stream is cut then.

        The library looks at this where DATA ends a request, and not where trailers do. An app that waits for the rest
        would take the next request on the connection for it: so the connection is reset, for it was not `asked` all.
        """
        if self.head is None or self.head.body is not BodyKind.LENGTH or self.carrier is None:
            return False
        came = self.timing.bytes_in + size
        if came == self.head.length or (came < self.head.length and not last):
            return False
        detail = f"{came} bytes came{'' if last else ' and go on'}, and {self.head.length} were said"
        self.cut(Failure(Reason.HTTP_FRAMING, {"detail": detail}), ErrorCodes.PROTOCOL_ERROR)
        self._session.frames.spend_reset()
        return True

    def taken(self, credit: int) -> None:
        """So much of the body went on: the client may send as much more."""
        if credit:
            self._held -= credit
            self._session.machine.acknowledge_received_data(credit, self.id)

    def gone(self) -> None:
        """The client reset the stream, or is gone itself."""
        finished = self._lasting and self.status != 0
        cut = self._session.connection.cut
        self.log(cut, "finished" if finished else "client gone" if cut is None else None)
        self._end(ErrorCodes.CANCEL)

    def pump(self) -> None:
        """Send what the client takes."""
        before = self._out.size
        self._went(before, 0 if self._session.blocked else self._out.pump())

    def _went(self, before: int, credit: int) -> None:
        """So much went to the client, of `before` bytes that waited."""
        out = self._out
        if out.size != self._counted:
            self._count()
        if credit and self.carrier is not None:
            self.carrier.sent(credit)
        if out.done:
            self.log()
            self._finish()
        elif out.size or out.last:  # the end alone waits too, while the way to the client is full
            self._session.hungry[self.id] = self
            if out.size < before or not self._stalled:  # what the app adds buys the client no time
                self._stalled = True
                self.wait()
        else:
            self._stalled = False
            self.wait()

    # The app's side.

    def informed(self, head: AnswerHead) -> None:
        """An answer of the class 1xx, which another follows."""
        if self._session.sendable(self.id):
            self._session.machine.put_headers(self.id, head.fields, False)

    def answered(self, head: AnswerHead, *, last: bool) -> None:
        """The head of the answer."""
        self.status, fields, self._lasting = head
        self.timing.first_byte = monotonic()
        if not self._session.sendable(self.id):
            return  # the client reset it; that is heard of in a moment
        self._session.machine.put_headers(self.id, fields, last)
        if last:
            self._out.done = True
            self.log()
            self._finish()
        else:
            self.wait()

    def data(self, data: bytes, credit: int, last: bool) -> None:
        """A piece of the answer's body. `Carrier.sent` gets the credit."""
        self.timing.bytes_out += len(data)
        out, before = self._out, self._out.size + len(data)
        if self._session.blocked:
            out.push(data, credit, last)
            self._went(before, 0)
        else:
            self._went(before, out.send(data, credit, last))

    def finish(self, trailers: Sequence[Header]) -> None:
        """The answer's end."""
        self._out.trailers, self._out.last = trailers, True
        self.pump()

    def cut(self, failure: Failure, code: int = ErrorCodes.INTERNAL_ERROR) -> None:
        """The answer cannot be finished: the client must see that it is none."""
        self.log(failure)
        self._session.reset(self.id, code)
        self._end(ErrorCodes.CANCEL)

    def fail(self, failure: Failure) -> None:
        """The request cannot be answered as it should be: say so, if nothing was said yet."""
        if self.status:
            self.cut(failure)
            return
        carrier, self.carrier = self.carrier, None
        if carrier is not None:
            carrier.cut(ErrorCodes.CANCEL)
        self.refuse(failure)

    def refuse(self, failure: Failure) -> None:
        """Answer in place of the app."""
        connection, head = self._session.connection, self.head
        began = None if self.admission is None else self.timing.began
        self.status, body = connection.refuse_request(self.number, head, failure, began)
        self.admission = None  # it is logged
        self.taken(self._held)
        fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        bodiless = head is not None and head.method == b"HEAD"
        self.answered(answer_head(self.status, fields), last=bodiless)
        if not bodiless:
            self.data(body, 0, True)

    # Time, and the end.

    def wait(self) -> None:
        """Give what is awaited now its time."""
        limits = self._session.connection.limits
        seconds: float | None = limits.idle
        if not self.status:
            upstreams = None if self.admission is None else self.admission.route.upstreams
            seconds = (upstreams and upstreams.response) or limits.response
        elif self._lasting and not self._out.size:
            seconds = limits.tunnel_idle
        deadline = self.deadline = inf if seconds is None else monotonic() + seconds
        connection = self._session.connection
        if deadline < connection.deadline:
            connection.deadline = deadline

    def expired(self) -> None:
        """The deadline passed."""
        limits = self._session.connection.limits
        if self.status:
            seconds = limits.tunnel_idle if self._lasting and not self._out.size else limits.idle
            self.cut(Failure(Reason.ENDED_IDLE, {"limit": f"{seconds:g}"}), ErrorCodes.CANCEL)
        elif (self.asked or self._held) and self.admission is not None:  # the app answers not, or reads not
            upstreams = self.admission.route.upstreams
            limit = upstreams.response or limits.response
            self.fail(Failure(Reason.UPSTREAM_TIMEOUT, {"target": str(upstreams), "limit": f"{limit:g}"}))
        else:
            self.fail(Failure(Reason.HTTP_TIMEOUT))

    def log(self, failure: Failure | None = None, outcome: str | None = None) -> None:
        """Say once how it went."""
        if self.admission is not None:
            logged = Logged(self.number, self.admission, self.status, self.timing, failure, outcome)
            self._session.connection.log_request(logged)
            self.admission = None

    def _finish(self) -> None:
        """The answer is sent. RFC 9113 8.1: a request that is not whole yet need not be sent on.

        The client is told so in a write of its own: some (curl 7.88) lose an answer that is read together with it.
        """
        if not self.asked:
            self._session.connection.later(0, self._session.need_no_more, self.id)
        self._end(ErrorCodes.NO_ERROR)

    def _end(self, code: int) -> None:
        carrier, self.carrier = self.carrier, None
        if carrier is not None:
            carrier.cut(code)
        self._out.drop()
        self._count()
        self.taken(self._held)
        self._session.forget(self)

    def _count(self) -> None:
        """Tell the session what waits here for the client."""
        size = self._out.size
        if size != self._counted:
            more, self._counted = size - self._counted, size
            self._session.hold(more)
