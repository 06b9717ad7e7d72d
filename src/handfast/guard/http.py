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
from time import time
from typing import TYPE_CHECKING

from handfast.errors import Failure, Reason, RemoteProtocolError
from handfast.guard.events import RequestEvent, refusal_body, told
from handfast.guard.upstream import Upstream, dial
from handfast.pki.verification import VerifiedPeer
from handfast.policy import Decision, Policy, Request, Rule, decide_by, rules_about
from handfast.tls.server import Channel, Facts
from handfast.wire.bodies import Body, BodyKind, body_reader
from handfast.wire.http1 import (
    MAX_HEAD,
    RequestHead,
    ResponseHead,
    find_head,
    parse_response_head,
    plain_response,
    rewrite_response,
    stays_open,
)
from handfast.wire.identity import claims_identity, client_cert, client_identity, fold, overrides_request
from handfast.wire.targets import ambiguous_path, normal_host
from handfast.wire.usual import Requests, usual_answer

if TYPE_CHECKING:
    from handfast.guard.connection import Connection

_SAFE = frozenset({b"GET", b"HEAD", b"OPTIONS"})  # RFC 9110 9.2.1: asking twice does what asking once does
# What a proxy says of the client's side; ours replaces whatever the client sent.
_FORWARDED = frozenset(
    {
        *(b"xforwardedfor", b"xforwardedproto", b"forwarded", b"xrealip", b"xforwardedhost", b"xforwardedport"),
        *(b"xforwardedserver", b"xforwardedscheme", b"xforwardedssl", b"xoriginalhost"),
        *(b"scriptname", b"pathinfo"),  # gunicorn takes these from 127.0.0.1 for its own, and moves the path
    }
)


@dataclass(slots=True)
class Exchange:
    """One request and its answer."""

    id: str
    head: RequestHead
    decision: Decision
    body: Body
    began: float
    again: bytes | None  # the request, kept while it may be sent a second time on a fresh connection
    waiting: list[bytes] = field(default_factory=list)  # for the app, until it is connected
    answer: bytes = b""  # the answer's head, as far as it has come
    response: ResponseHead | None = None
    response_body: Body | None = None
    keep: bool = False  # whether the client's connection carries another request after this
    tunnel: bool = False  # a websocket: from here on bytes
    first_byte: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


class HttpSession:
    """A connection that may carry requests: it cannot be made without a VerifiedPeer."""

    __slots__ = (
        *(
            "_blocked",
            "_buffer",
            "_channel",
            "_closed",
            "_connection",
            "_count",
            "_dialling",
            "_exchange",
            "_finishing",
        ),
        *("_full", "_head_begun", "_policy"),
        *("_reading", "_requests", "_rules", "_server_name", "_trusted_until", "_unread", "_upstream", "peer"),
    )

    def __init__(self, connection: Connection, peer: VerifiedPeer, channel: Channel, facts: Facts) -> None:
        self.peer = peer
        self._connection = connection
        self._channel = channel
        self._server_name = normal_host(facts.server_name) or b"" if facts.server_name else None
        self._trusted_until = peer.not_after.timestamp()
        self._buffer = b""  # plain bytes that no exchange has taken yet
        self._exchange: Exchange | None = None
        self._upstream: Upstream | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._full = False  # the way to the app is full
        self._reading = True
        self._unread = True  # whether the channel may hold plain bytes that were not read yet
        self._finishing = False
        self._blocked = False  # the way to the client is full
        self._closed = False  # all is said
        self._head_begun = False
        self._count = 0
        self._policy: Policy | None = None
        self._rules: list[Rule] = []  # of that policy, about this peer
        ours = (
            (b"X-Forwarded-For", connection.address.rpartition(":")[0].encode()),
            (b"X-Forwarded-Proto", b"https"),
            (b"Client-Cert", client_cert(peer.leaf_der)),
            (b"Client-Identity", client_identity(peer.identity.name)),
        )
        self._requests = Requests(ours, _strip)

    def start(self) -> None:
        """Read what came along with the last of the handshake."""
        self._connection.set_deadline(self._connection.guard.limits.idle)
        self._pump()

    # The client's side.

    def received(self, data: bytes) -> None:
        """Records from the client."""
        self._channel.feed(data)
        self._unread = True
        self._pump()

    def ended(self) -> None:
        """The client's TCP ended. An answer under way is finished; a request cut short is dropped."""
        self._client_ended()

    def writable(self, yes: bool) -> None:
        """The way to the client is full, or free again: read the app as fast as the client takes."""
        self._blocked = not yes
        if self._upstream is not None and self._upstream.usable:
            if yes:
                self._upstream.transport.resume_reading()
            else:
                self._upstream.transport.pause_reading()
        if yes:
            self._advance()
            self._pump()

    def lost(self) -> None:
        """The client is gone."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._log(exchange, outcome="finished" if exchange.tunnel else "client gone")
        self._drop_upstream(cut=exchange is not None and not exchange.body.done)

    def expired(self) -> None:
        """The deadline of what is awaited passed."""
        exchange, limits = self._exchange, self._connection.guard.limits
        if exchange is None:
            if self._buffer:
                self._refuse(Failure(Reason.HTTP_TIMEOUT))
            else:
                self._close()
        elif exchange.response is None and exchange.body.done:
            target = str(self._connection.guard.target)
            self._fail(Failure(Reason.UPSTREAM_TIMEOUT, {"target": target, "limit": f"{limits.response:g}"}))
        elif exchange.response is None:
            self._fail(Failure(Reason.HTTP_TIMEOUT))
        else:
            self._log(exchange, Failure(Reason.ENDED_IDLE, {"limit": f"{limits.idle:g}"}))
            self._exchange = None
            self._connection.abort()

    def finish(self) -> None:
        """Answer what is under way, then close."""
        self._finishing = True
        if self._exchange is None and not self._buffer:
            self._close()

    def allowed_by(self, policy: Policy) -> bool:
        """Whether a new policy allows what is under way: a websocket goes on; another request is judged anyway."""
        exchange = self._exchange
        if exchange is None or not exchange.tunnel:
            return True
        request = Request(exchange.head.method, exchange.head.path)
        return decide_by(rules_about(policy, self.peer), request).allowed

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
        hungry = self._hungry()
        if hungry != self._reading and not self._connection.transport.is_closing():
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
                exchange.bytes_in += len(data)
                self._to_app(data)
            elif not exchange.body.done:
                if not self._take_body(exchange):
                    return
            else:
                return

    def _next_request(self) -> bool:
        """Begin with the next request, if its head is there and may go on."""
        guard = self._connection.guard
        try:
            end = find_head(self._buffer)
            if end < 0:
                if not self._head_begun:  # once: a byte now and then buys no more time
                    self._head_begun = True
                    self._connection.set_deadline(guard.limits.head)
                return False
            head = self._requests.parse(self._buffer[:end])
        except RemoteProtocolError as error:
            self._refuse(error.failure)
            return False
        self._buffer = self._buffer[end:]
        self._head_begun = False
        self._count += 1
        policy = guard.snapshot.policy
        failure = self._objection(head, policy)
        if failure is not None:
            self._refuse(failure, head)
            return False
        if policy is not self._policy:  # a new snapshot reaches the next request
            self._policy, self._rules = policy, rules_about(policy, self.peer)
            self._requests.strip_by(_strip_override if policy.judges_requests else _strip)
        decision = decide_by(self._rules, Request(head.method, head.path))
        if not decision.allowed:
            return self._deny(head, decision)
        self._forward(head, decision)
        return True

    def _objection(self, head: RequestHead, policy: Policy) -> Failure | None:
        """What forbids to judge the request at all."""
        if self._connection.guard.log.broken:
            return Failure(Reason.GUARD_LOG_FAILED)
        if time() >= self._trusted_until:
            return Failure(Reason.ENDED_EXPIRED)
        if self._server_name is not None and self._server_name != head.host:
            return Failure(Reason.HTTP_MISDIRECTED)
        if policy.judges_paths and ambiguous_path(head.path):
            return Failure(Reason.HTTP_AMBIGUOUS_PATH)
        if head.upgrade is not None and not head.websocket:
            return Failure(Reason.HTTP_METHOD, {"method": f"Upgrade: {head.upgrade.decode('latin-1')[:32]}"})
        return None

    def _deny(self, head: RequestHead, decision: Decision) -> bool:
        rule = None if decision.rule is None else str(decision.rule)
        failure = Failure(decision.reason, {"who": str(self.peer.identity), "rule": rule})
        if head.body is not BodyKind.NONE or not head.keep_alive or self._finishing:
            self._refuse(failure, head)
            return False
        self._answer(failure, head, close=False)
        self._connection.set_deadline(self._connection.guard.limits.idle)
        return True

    # The request, on its way to the app.

    def _forward(self, head: RequestHead, decision: Decision) -> None:
        connection = self._connection
        sent = self._requests.rewrite(head)
        repeatable = head.body is BodyKind.NONE and head.method in _SAFE and not head.websocket
        exchange = Exchange(
            id=f"{connection.id}-{self._count}",
            head=head,
            decision=decision,
            body=body_reader(head.body, head.length),
            began=connection.moment(),
            again=sent if repeatable else None,
        )
        self._exchange = exchange
        connection.set_deadline(connection.guard.limits.response)
        if self._upstream is not None and self._upstream.usable:
            self._upstream.transport.write(sent)
        else:
            exchange.again = None  # the connection is new: a failure is the app's word
            exchange.waiting.append(sent)
            self._dial()

    def _dial(self) -> None:
        guard = self._connection.guard
        self._drop_upstream()
        self._dialling = dial(guard.target, self, guard.limits.connect)

    def _take_body(self, exchange: Exchange) -> bool:
        try:
            out, used = exchange.body.feed(self._buffer)
        except RemoteProtocolError as error:
            self._fail(error.failure)
            return False
        exchange.bytes_in += used
        self._buffer = self._buffer[used:]
        self._connection.set_deadline(self._connection.guard.limits.response)
        if out:
            self._to_app(out)
        return True

    def _to_app(self, data: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        if exchange.waiting or self._upstream is None:
            exchange.waiting.append(data)
        elif self._upstream.usable:
            self._upstream.transport.write(data)

    # The app's side.

    def upstream_open(self, upstream: Upstream) -> None:
        """See Owner."""
        self._dialling = None
        exchange = self._exchange
        if exchange is None or self._connection.transport.is_closing():
            upstream.drop()
            return
        self._upstream = upstream
        if self._blocked:
            upstream.transport.pause_reading()
        waiting, exchange.waiting = exchange.waiting, []
        upstream.transport.write(b"".join(waiting))
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
        try:
            self._take_answer(exchange, data)
        except RemoteProtocolError as error:
            detail = error.facts.get("detail", error.failure.message)
            facts = {"target": str(self._connection.guard.target), "detail": detail}
            self._fail(Failure(Reason.UPSTREAM_BAD_RESPONSE, facts))
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
        limits = self._connection.guard.limits
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
        exchange.bytes_out += len(whole)
        if whole:
            self._channel.write(whole)
        if exchange.response_body is not None and exchange.response_body.done and not exchange.tunnel:
            self._done(exchange, reusable=not data)

    def _take_head(self, exchange: Exchange, head: bytes) -> bytes:
        """Take the head of the app's answer; return what goes to the client."""
        request = exchange.head
        minor = request.minor
        exchange.first_byte = exchange.first_byte or self._connection.moment()
        # A client that has not sent all of its body yet cannot be asked for another request behind it, and one
        # that asked for a websocket and got none may already speak its language (a way to smuggle).
        may_keep = exchange.body.done and not request.websocket and not self._finishing
        if may_keep and minor and request.keep_alive and request.method != b"HEAD":
            usual = usual_answer(head)
            if usual is not None:
                exchange.response, sent = usual
                exchange.response_body = body_reader(BodyKind.LENGTH, exchange.response.length)
                exchange.keep = True
                return sent
        response = parse_response_head(head, request.method)
        if response.status == 101:
            made = rewrite_response(response, True, request.websocket)
            exchange.response, exchange.tunnel = response, True
            self._connection.deadline = float("inf")
            return made
        if response.status < 200:
            return rewrite_response(response, True) if minor else b""
        exchange.response = response
        exchange.response_body = body_reader(response.body, response.length, decode=minor == 0)
        exchange.keep = may_keep and stays_open(request, response)
        return rewrite_response(response, exchange.keep, client_minor=minor)

    def _done(self, exchange: Exchange, *, reusable: bool) -> None:
        response = exchange.response
        assert response is not None
        self._log(exchange)
        self._exchange = None
        if not (reusable and response.keep_alive and exchange.body.done):
            self._drop_upstream()
        if not exchange.keep or self._channel.at_eof:
            self._close()
        else:
            self._connection.set_deadline(self._connection.guard.limits.idle)

    def _upstream_gone(self, *, reset: bool) -> None:
        """The app closed its side: the end of an answer, or a failure."""
        exchange = self._exchange
        self._drop_upstream()
        if exchange is None:
            return
        if exchange.again is not None:  # a kept connection that the app closed as we wrote: ask once more
            exchange.waiting, exchange.again = [exchange.again], None
            self._dial()
        elif exchange.response is None:
            facts = {"target": str(self._connection.guard.target), "detail": "it closed without an answer"}
            self._fail(Failure(Reason.UPSTREAM_DOWN, facts))
        elif not reset and (exchange.response.body is BodyKind.UNTIL_CLOSE or exchange.tunnel):
            exchange.keep = False
            self._done(exchange, reusable=False)
        else:  # cut short: the client must see that it is
            self._fail(Failure(Reason.UPSTREAM_BAD_RESPONSE, {"detail": "it closed in the midst of its answer"}))

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
        request_id = exchange.id if exchange is not None else f"{self._connection.id}-{self._count}"
        fields = {} if head is None else _request_fields(head)
        rule = failure.facts.get("rule")
        status = failure.reason.http or 403
        decision = "deny" if exchange is None else "allow"
        said = {"request": request_id, "decision": decision, "rule": rule, "status": status}
        self._connection.event("request", said | fields | told(failure))
        body = refusal_body(failure.reason, request_id)
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

    def _client_ended(self) -> None:
        exchange = self._exchange
        if exchange is None:
            self._close()
        elif exchange.tunnel or not exchange.body.done:
            self._connection.abort()

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
        connection, head, decision = self._connection, exchange.head, exchange.decision
        guard, took = connection.guard, connection.moment() - exchange.began
        guard.log.emit_request(
            RequestEvent(
                event="request",
                time=guard.now,
                id=connection.id,
                address=connection.address,
                peer=connection.who,
                request=exchange.id,
                decision=decision.effect,
                rule=None if decision.rule is None else decision.rule.text,
                status=None if exchange.response is None else exchange.response.status,
                method=head.method.decode("ascii", "replace"),
                host=head.host.decode("ascii", "replace"),
                path=head.path[:512].decode("ascii", "replace"),
                reason=decision.reason.code if failure is None else failure.reason.code,
                ms=round(took * 1000, 1),
                app_ms=round((exchange.first_byte - exchange.began) * 1000, 1) if exchange.first_byte else None,
                bytes_in=exchange.bytes_in,
                bytes_out=exchange.bytes_out,
                detail=None if failure is None else failure.message,
                remedy=None if failure is None else failure.hint or None,
                outcome=outcome,
            )
        )


def _request_fields(head: RequestHead) -> dict[str, str]:
    """What the log says of a request; never its query, which may hold secrets."""
    return {
        "method": head.method.decode("ascii", "replace"),
        "host": head.host.decode("ascii", "replace"),
        "path": head.path[:512].decode("ascii", "replace"),
    }


def _strip(name: bytes) -> bool:
    return claims_identity(name) or fold(name) in _FORWARDED


def _strip_override(name: bytes) -> bool:
    """Where rules judge method and path, no header may tell the app another one."""
    return _strip(name) or overrides_request(name)
