"""How a request of an HTTP/2 client is carried to an HTTP/1.1 app: see `Carrier` in http2_streams.

A connection to the app carries one request at a time, is kept for the next one, and serves one client alone.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from time import monotonic
from typing import TYPE_CHECKING

from handfast.errors import Failure, Reason, RemoteProtocolError
from handfast.guard.http2_streams import answer_head
from handfast.guard.upstream import (
    FRESH,
    SecureUpstream,
    Upstream,
    Upstreams,
    bad_answer,
    cut_short,
    unanswered,
)
from handfast.wire.bodies import Body, BodyKind, body_reader
from handfast.wire.http1 import SAFE_METHODS, Header, ResponseHead, find_head, parse_response_head
from handfast.wire.http2 import answer_fields

if TYPE_CHECKING:
    from handfast.guard.http2 import Http2Session
    from handfast.guard.http2_streams import Stream

_HIGH, _LOW = 1 << 17, 1 << 15  # bytes of an answer that wait for the client, when the app is paused and resumed
_WEBSOCKET = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3


class Line:
    """One connection to an HTTP/1.1 app: it carries one request after another, of one client alone."""

    __slots__ = (
        *("_again", "_answer", "_asked", "_body", "_chunked", "_dialling", "_done_at", "_full", "_held", "_key"),
        *("_last", "_out", "_owed", "_paused", "_session", "_stream", "_tries", "_tunnel", "_until_close"),
        *("_upstream", "upstreams"),
    )

    def __init__(self, session: Http2Session, upstreams: Upstreams) -> None:
        self._session = session
        self.upstreams = upstreams
        self._upstream: Upstream | SecureUpstream | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._stream: Stream | None = None
        self._out: list[bytes] = []  # to be written at the end of the turn, or when it is open
        self._owed = 0  # credit of what waits for the app
        self._full = False  # the way to the app is
        self._paused = False
        self._asked = self._chunked = self._tunnel = False
        self._key = b""  # of a websocket that was asked for
        self._held: list[bytes] = []  # of the client's, until the app has agreed to a websocket
        self._again: bytes | None = None  # the request, while it may be sent again on a fresh connection
        self._tries = 0  # how often it was
        self._answer = b""  # the answer's head, as far as it has come
        self._body: Body | None = None
        self._until_close = False  # the answer ends where the app closes
        self._last = False  # no request follows this one
        self._done_at = 0.0  # when the last answer was

    @property
    def usable(self) -> bool:
        """Whether it can carry another request."""
        return self._upstream is not None and self._upstream.usable and self._stream is None

    def carry(self, stream: Stream, sent: bytes, key: bytes) -> None:
        """Take a request's head to the app. `key`: of the websocket that it asks for, or b''."""
        assert stream.head is not None
        self._stream, stream.carrier = stream, self
        # An app that was asked for a websocket and gave none may yet speak its language (a way to smuggle).
        self._asked, self._key, self._last = stream.asked, key, bool(key)
        self._chunked = stream.head.body is BodyKind.CHUNKED
        self._out.append(sent)
        safe = stream.head.body is BodyKind.NONE and stream.head.method in SAFE_METHODS and not key
        self._again, self._tries = sent if safe else None, 0
        if not safe and self._upstream is not None and monotonic() - self._done_at >= FRESH:
            self._upstream.drop()
            self._upstream = None
        if self._upstream is None:
            self._dial()
        self.flow()
        self._session.dirty(self)

    def flush(self) -> None:
        """Write what was gathered in this turn."""
        if self._out and self._upstream is not None and self._upstream.usable:
            out, self._out = self._out, []
            self._upstream.write(b"".join(out) if len(out) > 1 else out[0])

    def drop(self, *, cut: bool = False) -> None:
        """Close it; the request on it, if any, is somebody else's worry."""
        self._stream, self._full = None, False
        if self._dialling is not None:
            self._dialling.cancel()
            self._dialling = None
        if self._upstream is not None:
            self._upstream.drop(cut=cut)
            self._upstream = None

    def flow(self) -> None:
        """Read the app or not, by what waits for the client: of this answer, and of all."""
        stream, upstream = self._stream, self._upstream
        if stream is None or upstream is None or not upstream.usable:
            return
        paused = stream.waiting > (_LOW if self._paused else _HIGH) or self._session.crowded(stream)
        if paused is not self._paused:
            self._paused = paused
            if paused:
                upstream.pause()
            else:
                upstream.resume()

    # Carrier.

    def body(self, data: bytes, credit: int, last: bool) -> None:
        """See Carrier."""
        assert self._stream is not None
        self._asked = self._asked or last
        if self._key and not self._tunnel:
            self._held.append(data)
            self._owed += credit
            return
        if data:
            self._out.append(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        if last and self._chunked:
            self._out.append(b"0\r\n\r\n")
        if self._full or self._upstream is None:
            self._owed += credit
        else:
            self._stream.taken(credit)
        if last and self._tunnel:
            self.flush()
            self._close_for_writing()
        self._session.dirty(self)

    def trailers(self, fields: list[Header]) -> None:
        """See Carrier. They are dropped, as those of HTTP/1.1 are."""
        self.body(b"", 0, True)

    def sent(self, credit: int) -> None:
        """See Carrier."""
        if self._paused:
            self.flow()

    def cut(self, code: int) -> None:
        """See Carrier."""
        self._owed = 0  # the stream gives back all that it holds
        self.drop(cut=self._tunnel or not self._asked)

    # Owner.

    def upstream_open(self, upstream: Upstream | SecureUpstream) -> None:
        """See Owner."""
        self._dialling = None
        if self._stream is None:
            upstream.drop()
            return
        self._upstream, self._paused = upstream, False
        self.flow()
        self.flush()
        if not self._full:
            self._pay()
        self._session.flush()

    def upstream_failed(self, failure: Failure) -> None:
        """See Owner."""
        self._dialling = None
        self._fail(failure)

    def upstream_data(self, data: bytes) -> None:
        """See Owner."""
        stream = self._stream
        if stream is None:  # an answer to nothing: what follows it could not be trusted
            self._session.discard(self)
            return
        self._again = None
        try:
            self._take(stream, data)
        except RemoteProtocolError as error:
            self._fail(bad_answer(self.upstreams, error))
            return
        self.flow()
        self._session.flush()

    def upstream_ended(self) -> None:
        """See Owner."""
        self._gone(reset=False)

    def upstream_lost(self, reset: bool) -> None:
        """See Owner."""
        self._gone(reset=reset)

    def upstream_bug(self, bug: Exception) -> None:
        """See Owner."""
        self._session.connection.bug(bug)

    def upstream_writable(self, yes: bool) -> None:
        """See Owner."""
        self._full = not yes
        if yes:
            self._pay()
            self._session.flush()

    def _dial(self) -> None:
        self._dialling = self.upstreams.dial(self, self._session.connection.preface(self.upstreams))

    def _pay(self) -> None:
        owed, self._owed = self._owed, 0
        if self._stream is not None:
            self._stream.taken(owed)

    def _take(self, stream: Stream, data: bytes) -> None:
        """Read what the app sent."""
        while data and self._stream is stream:
            if self._tunnel:
                stream.data(data, len(data), False)
                return
            if self._body is None:
                self._answer += data
                end = find_head(self._answer)
                if end < 0:
                    return
                head, data, self._answer = self._answer[:end], self._answer[end:], b""
                self._take_head(stream, head, more=bool(data))
            else:
                piece, used = self._body.feed(data)
                data = data[used:]
                if self._body.done:
                    self._release(stream, reusable=not data)
                    stream.data(piece, 0, True)
                elif piece:
                    stream.data(piece, len(piece), False)

    def _take_head(self, stream: Stream, head: bytes, *, more: bool) -> None:
        asked = stream.head
        assert asked is not None
        response = parse_response_head(head, asked.method)
        if response.status == 101:
            self._take_websocket(stream, response)
            return
        if response.status < 200:
            if response.status != 100 or asked.expect_continue:
                stream.informed(answer_head(response.status, answer_fields(response)))
            return
        self._body = body = body_reader(response.body, response.length, decode=True)
        self._until_close = response.body is BodyKind.UNTIL_CLOSE
        self._last = self._last or not response.keep_alive
        if body.done:
            self._release(stream, reusable=not more)
        stream.answered(answer_head(response.status, answer_fields(response)), last=body.done)

    def _take_websocket(self, stream: Stream, response: ResponseHead) -> None:
        """The app changes to a websocket: only to the one that was asked for (RFC 6455 4.1, RFC 8441 5)."""
        accept = base64.b64encode(hashlib.sha1(self._key + _WEBSOCKET, usedforsecurity=False).digest())
        fields = answer_fields(response)
        accepts = [value for name, value in fields if name == b"sec-websocket-accept"]
        if not self._key or response.upgrade != b"websocket" or accepts != [accept]:
            detail = "it changed to a protocol that was not asked for"
            raise RemoteProtocolError(Reason.UPSTREAM_BAD_RESPONSE, target="", detail=detail)
        self._tunnel = True
        kept = [field for field in fields if field[0] not in (b"sec-websocket-accept", b"content-length")]
        stream.answered(answer_head(200, kept, lasting=True), last=False)
        if self._stream is not stream:
            return
        held, self._held = b"".join(self._held), []
        self.body(held, 0, self._asked)
        if not self._full:
            self._pay()

    def _close_for_writing(self) -> None:
        if self._upstream is not None and self._upstream.usable:
            self._upstream.write_eof()

    def _release(self, stream: Stream, *, reusable: bool) -> None:
        """The app's answer is whole: the stream goes on without the line."""
        self._pay()
        stream.carrier = None
        if reusable and self._asked and not self._last and not self._out:
            if self._paused and self._upstream is not None:
                self._upstream.resume()
            self._paused = False
            self._stream = self._body = None
            self._done_at = monotonic()
            self._session.keep(self)
        else:
            self.drop(cut=not self._asked)

    def _gone(self, *, reset: bool) -> None:
        """The app closed its side: the end of an answer, or a failure."""
        stream = self._stream
        if stream is None:
            self._session.discard(self)
            return
        if self._again is not None and self._upstream is not None:
            self._upstream.blame()
        if self._again is not None and self._tries < self.upstreams.retries:
            self._tries += 1  # it is safe, and nothing was answered: a kept connection that ended, or a crash
            self.drop()
            self._stream, self._out = stream, [self._again]
            self._dial()
        elif not reset and (self._tunnel or (self._body is not None and self._until_close)):
            self._release(stream, reusable=False)
            stream.data(b"", 0, True)
            self._session.flush()
        elif self._body is None and not self._tunnel:
            self._fail(unanswered(self.upstreams, self._answer))
        else:
            self._fail(cut_short(self.upstreams))

    def _fail(self, failure: Failure) -> None:
        stream = self._stream
        if stream is not None:
            stream.fail(failure)
        self._session.flush()
