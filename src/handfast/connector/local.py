"""One local client's connection: plain bytes on its side, a call to the server on the other.

Theory of operation. A connection is in one phase at a time:

    SEEKING --call--> OPEN --both ended--> GONE
       |               |  \\--refused, nothing was sent: once back to SEEKING, with a fresh call
       +---refused-----+--> DOOMED --its first bytes look like HTTP--> LINGERING (502) --> GONE
                               \\--they do not, or none come--> reset --> GONE

In TLS 1.3 a client that is refused finishes its handshake first. So an open call is `offered`; it is `connected` with
the server's first byte, or once the server has been quiet for a while. A stream that was cut on one side ends with a
reset on the other, never with a quiet end: close_notify alone is the end of a stream.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
import struct
from collections.abc import Callable
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from handfast.connector.call import Call, CallFailed
from handfast.connector.words import Verdict
from handfast.errors import Failure, Reason
from handfast.guard.events import refusal_body, told
from handfast.guard.transports import LINGER, LINGER_BYTES, LONGEST_LINGER, reset, reset_when_taken, was_reset
from handfast.tls.channel import TlsBroken
from handfast.wire.http1 import plain_response

if TYPE_CHECKING:
    from handfast.connector.service import Connector

MAX_HELD = 1 << 16  # bytes taken from a local client before there is a call
HEARING = 0.5  # seconds that a refused client has for the first bytes by which we see whether it speaks HTTP
_HTTP = re.compile(rb"[A-Z]{3,20} [!-~]{1,8000} HTTP/1\.[01]\r?\n")
_MAY_BE_HTTP = re.compile(rb"[A-Z]{0,20}|[A-Z]{3,20} [!-~]{0,8000}( [HTP/1.0\r]{0,9})?")
# What a guard of ours says over HTTP/1 to whom it does not let in; see guard.events.refusal_body.
_TURNED_AWAY = re.compile(
    rb"HTTP/1\.1 (4\d\d) [^\r\n]{0,64}\r\n(?:[^\r\n]{1,256}\r\n){0,16}\r\n"
    rb'\{"error": "([a-z]{1,20}\.[a-z_]{1,40})", "id": "([0-9a-f-]{1,40})"\}'
)
_NEVER = float("inf")


class Phase(Enum):
    """See the theory of operation."""

    SEEKING = "seeking"
    OPEN = "open"
    DOOMED = "doomed"
    LINGERING = "lingering"
    GONE = "gone"


class Local(asyncio.Protocol):
    """The local side; it owns its call."""

    __slots__ = (
        *("_answered", "_asked", "_call", "_connector", "_deadline", "_expiry_told", "_failure", "_finished"),
        *("_first", "_full", "_held", "_in", "_moved", "_opened", "_out", "_phase", "_retried", "_seeking"),
        *("_spoken", "_who", "id", "transport"),
    )

    transport: asyncio.Transport

    def __init__(self, connector: Connector, who: dict[str, Any]) -> None:
        self.id = secrets.token_hex(6)
        self._connector = connector
        self._who = who
        self._phase = Phase.SEEKING
        self._call: Call | None = None
        self._seeking: asyncio.Task[None] | None = None
        self._failure: Failure | None = None
        self._held = bytearray()  # what came before there was a call
        self._first = b""  # the client's first bytes, by which HTTP is known
        self._deadline = _NEVER
        self._full = False  # whether the way to the local client is full
        self._asked = self._finished = False  # whether the client, and the server, said that they send no more
        self._answered = False  # whether the server sent a byte
        self._spoken = False  # whether it was logged that the server takes us
        self._retried = self._expiry_told = False
        self._in = self._out = 0  # bytes from the server, and to it

    # What the event loop calls. An exception in here is a bug of ours, and ends this connection alone.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it
        self._opened = self._moved = monotonic()
        self._connector.opening.discard(self)
        self._connector.connections.add(self)
        self._have(self._begin)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._have(lambda: self._received(data))

    def eof_received(self) -> bool:
        """See asyncio.Protocol. True: the server may still answer."""
        self._have(self._ended)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._connector.connections.discard(self)
        self._have(self._lost)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._full = True
        if self._call is not None:
            self._call.transport.pause_reading()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._full = False
        if self._call is not None and self._phase is Phase.OPEN:
            self._call.transport.resume_reading()
            self._have(self._pull)

    # What the connector calls.

    def tick(self, moment: float) -> None:
        """Act on what time brings. `moment` is on the clock of `monotonic`."""
        self._have(lambda: self._tick(moment))

    def abort(self, how: str) -> None:
        """End it at once, for a reason of ours."""
        if self._phase is not Phase.GONE:
            self._end(how, cut=True)

    # What the call tells; see call.Owner.

    def call_moved(self) -> None:
        """See Owner."""
        self._pull()

    def call_ended(self, *, lost: bool) -> None:
        """See Owner. Without close_notify before it, the stream was cut."""
        if self._phase is not Phase.OPEN:
            return
        self._full = False  # whatever is left in the channel is passed on, or what it says would be lost
        self._pull()
        if self._phase is not Phase.OPEN or self._call is None:
            return
        if not self._call.at_eof:
            self._cut_off()
        elif lost:
            self._end("ended", cut=not self._asked)

    def call_writable(self, yes: bool) -> None:
        """See Owner."""
        if self._phase is Phase.OPEN and not self.transport.is_closing():
            if yes:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def call_bug(self, bug: Exception) -> None:
        """See Owner."""
        self._bug(bug)

    # Getting a call.

    def _begin(self, fresh: bool = False) -> None:
        if self._connector.log.broken:
            self._refuse(Failure(Reason.GUARD_LOG_FAILED), {})
            return
        call = None if fresh else self._connector.pool.take()
        if call is not None:
            self._attach(call, pooled=True)
            return
        self._seeking = asyncio.get_running_loop().create_task(self._seek())

    async def _seek(self) -> None:
        try:
            call = await self._connector.dial()
        except CallFailed as failed:
            verdict = failed.verdict
            if self._phase is Phase.SEEKING:
                self._have(lambda: self._refuse(verdict.failure, verdict.fields()))
        except Exception as bug:
            self._bug(bug)
        else:
            if self._phase is Phase.SEEKING:
                self._have(lambda: self._attach(call, pooled=False))
            else:
                call.close()

    def _attach(self, call: Call, *, pooled: bool) -> None:
        self._call, self._phase, call.owner = call, Phase.OPEN, self
        shown: dict[str, Any] = {"server": str(call.peer.identity), "version": call.facts.version}
        shown |= {"group": call.facts.group, "pooled": pooled}
        if not pooled:
            shown["ms"] = round((call.ready_at - call.began) * 1000, 1)
        self._event("offered", shown)
        self._deadline = monotonic() + self._connector.limits.quiet
        if self._full:
            call.transport.pause_reading()
        self._pull()
        if self._phase is Phase.OPEN and self._held:
            held, self._held = bytes(self._held), bytearray()
            self._send(held)
        if self._phase is Phase.OPEN:
            if self._asked:
                call.finish()
            elif not self.transport.is_closing():
                self.transport.resume_reading()

    # What the local client does.

    def _received(self, data: bytes) -> None:
        self._moved = monotonic()
        if not self._answered and len(self._first) < 8192:
            self._first += data[:8192]
        match self._phase:
            case Phase.OPEN:
                self._send(data)
            case Phase.SEEKING:
                self._held += data
                if len(self._held) >= MAX_HELD:
                    self.transport.pause_reading()
            case Phase.DOOMED:
                self._answer()
            case Phase.LINGERING:
                self._in += len(data)
                if self._in > LINGER_BYTES:
                    self.transport.abort()
            case Phase.GONE:
                pass

    def _send(self, data: bytes) -> None:
        assert self._call is not None
        self._out += len(data)
        try:
            self._call.write(data)
        except TlsBroken as error:
            self._broken(error.failure)

    def _ended(self) -> None:
        if self._phase in (Phase.OPEN, Phase.SEEKING) and was_reset(self.transport):
            self._end("cut", cut=True, failure=Failure(Reason.CONNECT_CUT, {"who": "the local side"}))
            return
        self._asked = True
        match self._phase:
            case Phase.OPEN:
                assert self._call is not None
                if self._finished:
                    self._end("ended", cut=False)
                else:
                    self._call.finish()
            case Phase.DOOMED:
                self._answer(final=True)
            case Phase.LINGERING:
                self.transport.close()
            case Phase.SEEKING | Phase.GONE:
                pass

    def _lost(self) -> None:
        was, self._phase = self._phase, Phase.GONE
        if self._seeking is not None:
            self._seeking.cancel()
        if self._call is not None:
            self._call.cut()
            self._call = None
        if was in (Phase.OPEN, Phase.SEEKING):
            self._log_end("cut", Failure(Reason.CONNECT_CUT, {"who": "the local side"}))

    # What the server does.

    def _pull(self) -> None:
        call = self._call
        if call is None or self._phase is not Phase.OPEN:
            return
        try:
            while not self._full and self._phase is Phase.OPEN and (plain := call.read()):
                self._got(plain)
            call.flush()
        except TlsBroken as error:
            self._broken(error.failure)
            return
        if call.at_eof and not self._finished and self._phase is Phase.OPEN and not self._full:
            self._server_finished(call)

    def _got(self, plain: bytes) -> None:
        self._moved = monotonic()
        self._in += len(plain)
        if not self._answered:
            self._answered, self._first = True, b""
            self._taken("the server's first byte")
            if (refusal := _TURNED_AWAY.match(plain)) is not None:
                self._turned_away(*(part.decode() for part in refusal.groups()))
        self.transport.write(plain)

    def _server_finished(self, call: Call) -> None:
        self._finished = True
        if not self._answered and not self._asked and not self._spoken:
            self._refused(call.why_silent(cut=False))
        elif self._asked:
            self._end("ended", cut=False)
        else:
            self.transport.write_eof()

    def _broken(self, failure: Failure) -> None:
        assert self._call is not None
        verdict = self._call.why_broken(failure)
        if self._answered:
            self._end("cut", cut=True, failure=verdict.failure, by_server=True)
        else:
            self._refused(verdict)

    def _cut_off(self) -> None:
        assert self._call is not None
        if self._answered or self._spoken:
            self._end("cut", cut=True, failure=Failure(Reason.CONNECT_CUT, {"who": "the server"}), by_server=True)
        else:
            self._refused(self._call.why_silent(cut=True))

    def _taken(self, by: str) -> None:
        """The server takes us, as far as can be known."""
        self._deadline = _NEVER
        if not self._spoken:
            self._spoken = True
            self._event("connected", {"by": by})

    def _turned_away(self, status: str, code: str, request: str) -> None:
        """A guard let us in as far as TLS goes, and says no over HTTP: the program may not look at why."""
        detail = f"the guard there answers {status}: {code}"
        remedy = f"its own log says more, under {request}"
        self._event("turned_away", {"cause": code, "detail": detail, "remedy": remedy})

    def _refused(self, verdict: Verdict) -> None:
        """The server refused after the handshake. With nothing sent, once more: the call may have waited too long."""
        if self._call is not None:
            self._call.cut()
            self._call = None
        if self._out == 0 and not self._retried:
            self._retried, self._finished, self._phase = True, False, Phase.SEEKING
            self._event("retry", verdict.fields())
            self._begin(fresh=True)
            return
        self._refuse(verdict.failure, verdict.fields())

    # How it ends.

    def _refuse(self, failure: Failure, fields: dict[str, Any]) -> None:
        self._event("refused", fields or told(failure))
        self._failure, self._phase = failure, Phase.DOOMED
        self._deadline = monotonic() + HEARING
        if not self.transport.is_closing():
            self.transport.resume_reading()
        self._answer(final=self._asked)

    def _answer(self, final: bool = False) -> None:
        """Tell a client that speaks HTTP why; reset any other; wait for bytes while neither is clear."""
        assert self._failure is not None
        reason = self._failure.reason
        if _HTTP.match(self._first) and reason.http:
            body = refusal_body(reason, self.id)
            self.transport.write(plain_response(reason.http, body, head_only=self._first.startswith(b"HEAD ")))
            self._phase, self._deadline, self._in = Phase.LINGERING, monotonic() + LINGER, 0
            self.transport.write_eof()
            if self._asked:
                self.transport.close()
        elif final or not _MAY_BE_HTTP.fullmatch(self._first):
            self._phase = Phase.GONE
            reset(self.transport)

    def _end(self, how: str, *, cut: bool, failure: Failure | None = None, by_server: bool = False) -> None:
        call, self._call, self._phase = self._call, None, Phase.GONE
        if self._seeking is not None:
            self._seeking.cancel()
        if cut:
            if call is not None:
                call.cut()
            if by_server:  # what came before is the local side's, if it takes it in time
                reset_when_taken(self.transport, monotonic() + LONGEST_LINGER)
            else:
                reset(self.transport)
        else:
            if call is not None:
                call.close()
            self.transport.close()
        self._log_end(how, failure)

    def _log_end(self, how: str, failure: Failure | None) -> None:
        took = round((monotonic() - self._opened) * 1000, 1)
        fields = {"how": how, "bytes_out": self._out, "bytes_in": self._in, "ms": took}
        self._event("closed", fields | (told(failure) if failure is not None else {}))

    def _tick(self, moment: float) -> None:
        limits = self._connector.limits
        if moment >= self._deadline:
            match self._phase:
                case Phase.OPEN:
                    self._taken(f"no objection within {limits.quiet:g} s")
                case Phase.DOOMED:
                    self._answer(final=True)
                case Phase.LINGERING:
                    self.transport.abort()
                case _:
                    pass
        if self._phase is not Phase.OPEN or self._call is None:
            return
        if moment - self._moved >= limits.idle:
            self._end("idle", cut=True, failure=Failure(Reason.ENDED_IDLE, {"limit": f"{limits.idle:g}"}))
            return
        if self._call.expired:
            failure = Failure(Reason.ENDED_EXPIRED, {"remedy": "renew the server's certificate"})
            self._end("expired", cut=True, failure=failure)
            return
        leaf = self._call.generation.own.chain[0]
        if not self._expiry_told and self._connector.now >= leaf.not_valid_after_utc:
            self._expiry_told = True
            self._event("expired", told(self._connector.expired(leaf)))

    def _event(self, event: str, fields: dict[str, Any]) -> None:
        self._connector.event(event, {"id": self.id} | self._who | fields)

    def _have(self, happen: Callable[[], None]) -> None:
        try:
            happen()
        except Exception as bug:
            self._bug(bug)

    def _bug(self, bug: Exception) -> None:
        """Fail closed on what should not happen: end this connection, say so, keep serving the others."""
        if self._phase is Phase.GONE:
            return
        failure = Failure(Reason.BUG, {"detail": f"{type(bug).__name__}: {bug}"[:200]})
        self._end("bug", cut=True, failure=failure)


def peer_of(plug: socket.socket) -> tuple[int, int] | None:
    """The uid and pid at the other end of a UNIX socket (SO_PEERCRED, unix(7)); None for any other socket."""
    if plug.family != socket.AF_UNIX:
        return None
    pid, uid, _ = struct.unpack("3i", plug.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, pid
