"""HTTP mode: the requests of one verified peer, one after another.

Theory of operation. An `Exchange` is one request and its answer. Its request body is read just far enough
to find its end, its answer likewise; nothing else of either is held. A request that comes before its turn
waits in the buffer, within bounds. One connection to the app serves one client connection, so an answer
can only belong to the request before it.

    head -> host and path judged -> decide() -> dial or reuse -> head rewritten, identity set -> body -> answer

Every refusal before `_forward` is answered by the guard, and the app never learns of it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from handfast.errors import Failure, Reason, RemoteProtocolError
from handfast.guard.door import Admission, Door
from handfast.guard.events import Logged, Timing
from handfast.guard.places import Speech
from handfast.guard.upstream import (
    EXPECTED,
    FRESH,
    SecureUpstream,
    Upstream,
    Upstreams,
    bad_answer,
    cut_short,
    unanswered,
)
from handfast.tls.channel import Channel
from handfast.wire.bodies import Body, BodyKind, body_reader
from handfast.wire.http1 import (
    MAX_HEAD,
    SAFE_METHODS,
    RequestHead,
    ResponseHead,
    find_head,
    parse_response_head,
    plain_response,
    rewrite_response,
    stays_open,
)

if TYPE_CHECKING:
    from handfast.guard.connection import Connection

MAX_REFUSALS = 256  # in a row, after which a connection is closed
REST = 10.0  # seconds without a request after which a connection keeps no more than it must
LATELY = 2.0  # seconds after an answer within which the next request may be on its way already
_GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"
_NO_BODY = body_reader(BodyKind.NONE, 0)
# What is said of one request, and not of those that may follow it on the connection.
_OTHERS_MAY = frozenset(
    {
        *(Reason.POLICY_DENIED, Reason.POLICY_NO_RULE, Reason.VERIFY_NO_CERTIFICATE, Reason.HTTP_NO_ROUTE),
        *(Reason.LIMIT_REQUESTS, Reason.HTTP_MISDIRECTED),
    }
)


@dataclass(slots=True)
class Exchange:
    """One request and its answer."""

    number: int  # of the connection's requests
    head: RequestHead
    admission: Admission
    body: Body
    timing: Timing
    again: bytes | None  # the request, kept while it may be sent a second time on a fresh connection
    tries: int = 0  # how often it was
    waiting: list[bytes] = field(default_factory=list)  # for the app, until it is connected
    answer: bytes = b""  # the answer's head, as far as it has come
    response: ResponseHead | None = None
    response_body: Body | None = None
    usual: bool = False  # nothing in the request asks for more than a usual answer
    keep: bool = False  # whether the client's connection carries another request after this
    tunnel: bool = False  # a websocket: from here on bytes
    moved: int = 0  # bytes of a websocket, when its deadline was last looked at


class HttpSession:
    """A connection that may carry requests: it cannot be made without a Door."""

    __slots__ = (
        *("_blocked", "_buffer", "_channel", "_closed", "_connection", "_count", "_dialling", "_done_at", "_door"),
        *("_exchange", "_finishing", "_full", "_half", "_head_begun", "_reading", "_refusals", "_rested", "_unread"),
        *("_upstream", "_upstreams"),
    )

    def __init__(self, connection: Connection, door: Door, channel: Channel) -> None:
        self._connection = connection
        self._door = door
        self._channel = channel
        self._buffer = b""  # plain bytes that no exchange has taken yet
        self._exchange: Exchange | None = None
        self._upstream: Upstream | SecureUpstream | None = None
        self._upstreams: Upstreams | None = None  # what it, or what is being dialled, belongs to
        self._dialling: asyncio.Task[None] | None = None
        self._full = False  # the way to the app is full
        self._reading = True
        self._unread = True  # whether the channel may hold plain bytes that were not read yet
        self._finishing = False
        self._half = False  # the client's side of TCP is closed
        self._blocked = False  # the way to the client is full
        self._closed = False  # all is said
        self._head_begun = False
        self._rested = False
        self._refusals = 0
        self._count = 0
        self._done_at = 0.0  # when the last exchange was over

    def start(self) -> None:
        """Read what came along with the last of the handshake."""
        self._connection.set_deadline(self._connection.limits.idle)
        if self._connection.guard.draining:
            self._finishing = True
            self._connection.hurry()
        self._pump()

    # The client's side.

    def received(self, data: bytes) -> None:
        """Records from the client."""
        self._channel.feed(data)
        if self._exchange is None and self._usual():
            return
        self._unread = True
        self._pump()

    def ended(self) -> None:
        """The client's TCP ended: it waits for no answer. By close_notify alone it says that it asks no more."""
        if self._exchange is not None:
            self._connection.abort()
        else:
            self._close()

    def writable(self, yes: bool) -> None:
        """The way to the client is full, or free again: read the app as fast as the client takes."""
        self._blocked = not yes
        if self._upstream is not None and self._upstream.usable:
            if yes:
                self._upstream.resume()
            else:
                self._upstream.pause()
        if yes:
            self._advance()
            self._pump()

    def lost(self) -> None:
        """The client is gone."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            cut = self._connection.cut
            self._log(exchange, cut, "finished" if exchange.tunnel else "client gone" if cut is None else None)
        self._drop_upstream(cut=exchange is not None and not exchange.body.done)

    def expired(self) -> None:
        """The deadline of what is awaited passed."""
        exchange, limits = self._exchange, self._connection.limits
        if exchange is None:
            if self._buffer:
                self._refuse(Failure(Reason.HTTP_TIMEOUT))
            else:
                self._close()
        elif exchange.tunnel:
            moved = exchange.timing.bytes_in + exchange.timing.bytes_out
            if moved != exchange.moved:
                exchange.moved = moved
                self._connection.set_deadline(limits.tunnel_idle)
                return
            self._log(exchange, Failure(Reason.ENDED_IDLE, {"limit": f"{limits.tunnel_idle:g}"}))
            self._exchange = None
            self._connection.abort()
        elif exchange.response is None and (exchange.body.done or self._full):  # the app answers not, or reads not
            upstreams = exchange.admission.route.upstreams
            limit = upstreams.response or limits.response
            self._fail(Failure(Reason.UPSTREAM_TIMEOUT, {"target": str(upstreams), "limit": f"{limit:g}"}))
        elif exchange.response is None:
            self._fail(Failure(Reason.HTTP_TIMEOUT))
        else:
            self._log(exchange, Failure(Reason.ENDED_IDLE, {"limit": f"{limits.idle:g}"}))
            self._exchange = None
            self._connection.abort()

    def finish(self) -> None:
        """Answer what is under way, then close.

        Who has asked lately, or not at all yet, has a moment for one more request: its answer says that the connection
        closes. Closed at once, it would meet a request that is on its way already, and some cannot be asked again.
        """
        self._finishing = True
        if self._closed:
            return
        if self._count and self._exchange is None and not self._buffer and self._idle(monotonic()) > LATELY:
            self._close()
        elif self._exchange is None:
            self._connection.hurry()

    def _idle(self, moment: float) -> float:
        """For how many seconds nothing has been asked; `moment` is on the clock of `monotonic`."""
        return moment - (self._connection.deadline - self._connection.limits.idle)

    def rest(self, moment: float) -> None:
        """Give back what an idle connection does not need; `moment` is on the clock of `monotonic`."""
        if self._rested or self._exchange is not None or self._dialling is not None or self._idle(moment) < REST:
            return
        self._rested = True
        self._drop_upstream()

    def still_allowed(self) -> bool:
        """Whether what is under way is: a websocket goes on; another request is judged anyway."""
        exchange = self._exchange
        return exchange is None or not exchange.tunnel or self._door.allows(exchange.head.method, exchange.head.path)

    def _usual(self) -> bool:
        """Take what came if it is one request like one before it of this client. False: nothing was taken.

        All that `_pump` and `_advance` would do for it, in one piece.
        """
        channel = self._channel
        if self._buffer or self._closed or self._blocked or self._full:
            return False
        plain = channel.read()
        known = None if channel.more or channel.at_eof else self._door.requests().usual(plain)
        if known is None:
            self._buffer = plain
            return False
        head, sent = known
        self._count += 1
        admission = self._door.judge(head.method, head.path, head.host)
        if isinstance(admission, Failure):
            self._deny(head, admission)
            return True
        again = sent if head.method in SAFE_METHODS else None
        self._begin(Exchange(self._count, head, admission, _NO_BODY, Timing(monotonic()), again, usual=True), sent)
        return True

    def _pump(self) -> None:
        """Take plain bytes while there is somewhere to put them."""
        while self._unread and self._hungry():
            plain = self._channel.read()
            self._unread = self._channel.more
            self._buffer += plain
            self._advance()
        if self._closed:
            return
        self._flush()
        if self._channel.at_eof:
            self._client_ended()
        self._throttle()

    def _hungry(self) -> bool:
        exchange = self._exchange
        if self._closed or self._full or self._connection.transport.is_closing():
            return False
        if self._blocked and (exchange is None or exchange.body.done):
            return False  # it does not read our answers: no more of its requests
        if exchange is None or (not exchange.tunnel and not exchange.body.done):
            return exchange is None or not exchange.waiting
        if exchange.tunnel:
            return True
        return len(self._buffer) < MAX_HEAD

    def _throttle(self) -> None:
        hungry = self._hungry()  # once closed, it is read on, until its FIN
        if hungry != self._reading and not self._closed and not self._connection.transport.is_closing():
            self._reading = hungry
            if hungry:
                self._connection.transport.resume_reading()
            else:
                self._connection.transport.pause_reading()

    def _advance(self) -> None:
        """Use what is in the buffer, as far as its turn has come."""
        while self._buffer and not self._closed:
            exchange = self._exchange
            if exchange is None:
                if self._blocked or not self._next_request():
                    return
            elif exchange.tunnel:
                data, self._buffer = self._buffer, b""
                exchange.timing.bytes_in += len(data)
                self._to_app(data)
            elif not exchange.body.done:
                if not self._take_body(exchange):
                    return
            else:
                return

    def _next_request(self) -> bool:
        """Begin with the next request, if its head is there and may go on."""
        try:
            end = find_head(self._buffer)
            if end < 0:
                if not self._head_begun:  # once: a byte now and then buys no more time
                    self._head_begun = True
                    self._connection.set_deadline(self._connection.limits.head)
                return False
            head = self._door.requests().parse(self._buffer[:end])
        except RemoteProtocolError as error:
            self._refuse(error.failure)
            return False
        self._buffer = self._buffer[end:]
        self._head_begun = False
        self._count += 1
        judged = self._door.judge(head.method, head.path, head.host)
        if isinstance(judged, Failure):
            return self._deny(head, judged)
        limit = self._connection.limits.max_body
        if limit is not None and head.length > limit:
            self._refuse(Failure(Reason.HTTP_BODY_TOO_LARGE, {"limit": limit}), head)
            return False
        if judged.route.upstreams.target.speech is Speech.HTTP2:  # it takes no HTTP/1.1
            facts = {
                "detail": "the app takes HTTP/2 alone",
                "remedy": "call with HTTP/2, or give the app an http:// target",
            }
            self._refuse(Failure(Reason.HTTP_VERSION, facts), head)
            return False
        self._forward(head, judged)
        return True

    def _deny(self, head: RequestHead, failure: Failure) -> bool:
        """Answer a request that may not go on; the connection carries others where that is the policy's word."""
        self._refusals += 1  # in a row: what a client pipelines is worked off in one turn, which others wait for
        lasting = failure.reason in _OTHERS_MAY and head.body is BodyKind.NONE and head.keep_alive
        if not lasting or self._finishing or self._refusals >= MAX_REFUSALS:
            self._refuse(failure, head)
            return False
        self._answer(failure, head, close=False)
        self._connection.set_deadline(self._connection.limits.idle)
        return True

    # The request, on its way to the app.

    def _forward(self, head: RequestHead, admission: Admission) -> None:
        sent = self._door.requests().rewrite(head)
        plain = head.body is BodyKind.NONE and not head.websocket
        exchange = Exchange(
            number=self._count,
            head=head,
            admission=admission,
            body=body_reader(head.body, head.length),
            timing=Timing(monotonic()),
            again=sent if plain and head.method in SAFE_METHODS else None,
            usual=plain and head.minor == 1 and head.keep_alive and head.method != b"HEAD",
        )
        if head.expect_continue and head.minor:
            self._connection.later(EXPECTED, self._go_on, exchange)
        self._begin(exchange, sent)

    def _go_on(self, exchange: Exchange) -> None:
        """Ask for the body that the client holds back, where the app says nothing (RFC 9110 10.1.1)."""
        if self._exchange is exchange and exchange.response is None and not (exchange.timing.bytes_in or self._buffer):
            if self._upstream is None:  # it is being dialled yet
                self._connection.later(EXPECTED, self._go_on, exchange)
                return
            self._channel.write(_GO_ON)
            self._flush()

    def _begin(self, exchange: Exchange, sent: bytes) -> None:
        upstreams = exchange.admission.route.upstreams
        self._exchange, self._rested, self._refusals = exchange, False, 0
        self._connection.set_deadline(upstreams.response or self._connection.limits.response)
        fresh = exchange.again is not None or monotonic() - self._done_at < FRESH
        if fresh and self._upstream is not None and self._upstream.usable and upstreams is self._upstreams:
            self._upstream.write(sent)
        else:
            exchange.waiting.append(sent)
            self._dial(upstreams)

    def _dial(self, upstreams: Upstreams) -> None:
        self._drop_upstream()
        self._upstreams = upstreams
        self._dialling = upstreams.dial(self, self._connection.preface(upstreams))

    def _take_body(self, exchange: Exchange) -> bool:
        try:
            out, used = exchange.body.feed(self._buffer)
        except RemoteProtocolError as error:
            self._fail(error.failure)
            return False
        exchange.timing.bytes_in += used
        self._buffer = self._buffer[used:]
        limit = self._connection.limits.max_body
        if limit is not None and exchange.timing.bytes_in > limit:  # it did not say beforehand (chunked)
            self._fail(Failure(Reason.HTTP_BODY_TOO_LARGE, {"limit": limit}))
            return False
        upstreams = exchange.admission.route.upstreams
        self._connection.set_deadline(upstreams.response or self._connection.limits.response)
        if out:
            self._to_app(out)
        return True

    def _to_app(self, data: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        if exchange.waiting or self._upstream is None:
            exchange.waiting.append(data)
        elif self._upstream.usable:
            self._upstream.write(data)

    # The app's side.

    def upstream_open(self, upstream: Upstream | SecureUpstream) -> None:
        """See Owner."""
        self._dialling = None
        exchange = self._exchange
        if exchange is None or self._connection.transport.is_closing():
            upstream.drop()
            return
        self._upstream = upstream
        if self._blocked:
            upstream.pause()
        waiting, exchange.waiting = exchange.waiting, []
        upstream.write(b"".join(waiting))
        self._advance()
        self._pump()

    def upstream_failed(self, failure: Failure) -> None:
        """See Owner."""
        self._dialling = None
        self._fail(failure)

    def upstream_data(self, data: bytes) -> None:
        """See Owner."""
        exchange = self._exchange
        if exchange is None:  # an answer to nothing: what follows it could not be trusted
            self._drop_upstream()
            return
        exchange.again = None
        if exchange.usual and exchange.response is None and not exchange.answer and not self._finishing:
            known = exchange.admission.route.upstreams.answers.whole(data)
            if known is not None:
                self._done_usually(exchange, *known)
                return
        try:
            self._take_answer(exchange, data)
        except RemoteProtocolError as error:
            self._fail(bad_answer(exchange.admission.route.upstreams, error))
            return
        self._flush()
        if self._exchange is None:
            self._advance()
            self._pump()

    def upstream_ended(self) -> None:
        """See Owner."""
        self._upstream_gone(reset=False)

    def upstream_lost(self, reset: bool) -> None:
        """See Owner."""
        self._upstream_gone(reset=reset)

    def upstream_bug(self, bug: Exception) -> None:
        """See Owner."""
        self._connection.bug(bug)

    def upstream_writable(self, yes: bool) -> None:
        """See Owner."""
        self._full = not yes
        if yes:
            self._advance()
            self._pump()
        else:
            self._throttle()

    def _take_answer(self, exchange: Exchange, data: bytes) -> None:
        """Read what the app sent; write what of it goes to the client."""
        out: list[bytes] = []
        limits = self._connection.limits
        while data and self._exchange is exchange:
            if exchange.tunnel:
                out.append(data)
                break
            if exchange.response is None:
                exchange.answer += data
                end = find_head(exchange.answer)
                if end < 0:
                    break
                head, data, exchange.answer = exchange.answer[:end], exchange.answer[end:], b""
                out.append(self._take_head(exchange, head))
            else:
                assert exchange.response_body is not None
                if exchange.response_body.done:
                    break
                piece, used = exchange.response_body.feed(data)
                out.append(piece)
                data = data[used:]
            if not exchange.tunnel:
                self._connection.set_deadline(limits.idle)
        whole = b"".join(out) if len(out) != 1 else out[0]
        exchange.timing.bytes_out += len(whole)
        if whole:
            self._channel.write(whole)
        if exchange.response_body is not None and exchange.response_body.done and not exchange.tunnel:
            self._done(exchange, reusable=not data)

    def _take_head(self, exchange: Exchange, head: bytes) -> bytes:
        """Take the head of the app's answer; return what goes to the client."""
        request, limits = exchange.head, self._connection.limits
        minor = request.minor
        exchange.timing.first_byte = exchange.timing.first_byte or monotonic()
        # A client that has not sent all of its body yet cannot be asked for another request behind it, and one
        # that asked for a websocket and got none may already speak its language (a way to smuggle).
        may_keep = exchange.body.done and not request.websocket and not self._finishing
        if may_keep and minor and request.keep_alive and request.method != b"HEAD":
            usual = exchange.admission.route.upstreams.answers.usual(head)
            if usual is not None:
                exchange.response, sent = usual
                exchange.response_body = body_reader(BodyKind.LENGTH, exchange.response.length)
                exchange.keep = True
                return sent
        response = parse_response_head(head, request.method)
        if response.status == 101:
            made = rewrite_response(response, True, request.websocket)
            exchange.response, exchange.tunnel = response, True
            self._connection.set_deadline(limits.tunnel_idle)
            return made
        if response.status < 200:
            return rewrite_response(response, True) if minor else b""
        exchange.response = response
        exchange.response_body = body_reader(response.body, response.length, decode=minor == 0)
        exchange.keep = may_keep and stays_open(request, response)
        return rewrite_response(response, exchange.keep, client_minor=minor)

    def _done_usually(self, exchange: Exchange, response: ResponseHead, sent: bytes) -> None:
        """A usual answer came whole: all that `_take_answer` and `_done` would do, in one piece."""
        channel, connection, timing = self._channel, self._connection, exchange.timing
        timing.first_byte, timing.bytes_out = monotonic(), len(sent)
        channel.write(sent)
        connection.send(channel.take())
        connection.log_request(Logged(exchange.number, exchange.admission, response.status, timing))
        self._exchange, self._done_at = None, timing.first_byte
        if channel.at_eof or self._over():
            self._close()
            return
        connection.set_deadline(connection.limits.idle)
        if self._buffer or self._unread:
            self._advance()
            self._pump()

    def _done(self, exchange: Exchange, *, reusable: bool) -> None:
        response = exchange.response
        assert response is not None
        self._log(exchange)
        self._exchange, self._done_at = None, monotonic()
        if not (reusable and response.keep_alive and exchange.body.done):
            self._drop_upstream()
        if not exchange.keep or self._channel.at_eof or self._over():
            self._close()
            return
        self._connection.set_deadline(self._connection.limits.idle)
        if self._finishing:  # the client was told before that the connection stays
            self._connection.hurry()

    def _upstream_gone(self, *, reset: bool) -> None:
        """The app closed its side: the end of an answer, or a failure."""
        exchange = self._exchange
        if exchange is not None and exchange.again is not None and self._upstream is not None:
            self._upstream.blame()
        self._drop_upstream()
        if exchange is None:
            return
        if exchange.again is not None and exchange.tries < exchange.admission.route.upstreams.retries:
            exchange.tries += 1  # it is safe, and nothing was answered: a kept connection that ended, or a crash
            exchange.waiting = [exchange.again]
            self._dial(exchange.admission.route.upstreams)
        elif exchange.response is None:
            self._fail(unanswered(exchange.admission.route.upstreams, exchange.answer))
        elif not reset and (exchange.response.body is BodyKind.UNTIL_CLOSE or exchange.tunnel):
            exchange.keep = False
            self._done(exchange, reusable=False)
        else:  # cut short: the client must see that it is
            self._fail(cut_short(exchange.admission.route.upstreams))

    # Ends.

    def _fail(self, failure: Failure) -> None:
        """The exchange cannot be finished: say so if nothing was said yet, else cut the answer off visibly."""
        exchange = self._exchange
        self._drop_upstream(cut=exchange is not None and not exchange.body.done)
        if exchange is None:
            return
        self._exchange = None
        if exchange.response is None:
            self._answer(failure, exchange.head, close=True, exchange=exchange)
            self._close()
        else:
            self._log(exchange, failure)
            self._connection.abort()

    def _refuse(self, failure: Failure, head: RequestHead | None = None) -> None:
        """Answer a request that is not forwarded, and close."""
        self._answer(failure, head, close=True)
        self._close()

    def _answer(
        self, failure: Failure, head: RequestHead | None, *, close: bool, exchange: Exchange | None = None
    ) -> None:
        number, began = (self._count, None) if exchange is None else (exchange.number, exchange.timing.began)
        status, body = self._connection.refuse_request(number, head, failure, began)
        head_only = head is not None and head.method == b"HEAD"
        self._channel.write(plain_response(status, body, close=close, head_only=head_only))
        self._flush()

    def _close(self) -> None:
        """Nothing that still comes on this connection is a request (it may be the rest of a refused one's body)."""
        self._closed, self._buffer = True, b""
        self._drop_upstream()
        if self._connection.transport.is_closing():
            return
        self._channel.close()
        self._flush()
        if not self._reading:
            self._connection.transport.resume_reading()
        self._connection.linger()

    def _over(self) -> bool:
        """Whether no other request can come."""
        return self._half and not self._buffer and not self._unread

    def _client_ended(self) -> None:
        exchange = self._exchange
        if exchange is None:
            self._close()
        elif exchange.tunnel or not exchange.body.done:
            self._connection.abort()
        else:
            self._half = True
            if not self._buffer and not self._unread:  # no other request can come
                self._finishing, exchange.keep = True, False

    def _flush(self) -> None:
        if records := self._channel.take():
            self._connection.send(records)

    def _drop_upstream(self, *, cut: bool = False) -> None:
        self._full = False
        if self._dialling is not None:
            self._dialling.cancel()
            self._dialling = None
        if self._upstream is not None:
            self._upstream.drop(cut=cut)
            self._upstream = None

    def _log(self, exchange: Exchange, failure: Failure | None = None, outcome: str | None = None) -> None:
        status = 0 if exchange.response is None else exchange.response.status
        logged = Logged(exchange.number, exchange.admission, status, exchange.timing, failure, outcome)
        self._connection.log_request(logged)
