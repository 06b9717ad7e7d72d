"""Where a guard is watched: the admin listener, and how worker processes report to it.

Owns a small HTTP server on a socket of its own, apart from clients and apps, and the reports of workers. It shows
what it is given and changes nothing. Whatever goes wrong in what it is given is a 500, and no more.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic, time
from typing import Any, TypedDict, cast

import msgspec

from handfast import __version__
from handfast.errors import Reason, RemoteProtocolError
from handfast.guard.listening import serve_unix
from handfast.guard.metrics import CONTENT_TYPE, SILENT, State, Totals, is_whole, merge, render
from handfast.wire.http1 import RequestHead, find_head, parse_request_head, plain_response

MAX_REQUEST = 8192  # bytes of a request head
MAX_CLIENTS = 64
DEADLINE = 5.0  # seconds for a whole exchange

PATHS = ("/metrics", "/healthz", "/readyz", "/status", "/.well-known/jwks.json")

_JSON = b"application/json"
# Answers are of this instant, and of no use to a page in a browser.
_EXTRA = ((b"Cache-Control", b"no-store"), (b"X-Content-Type-Options", b"nosniff"))
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class AdminFacts:
    """What the admin listener shows. All are called on the event loop, for each request anew.

    `ready` says why no traffic should come, in words; nothing: it may. `jwks` is a JSON Web Key Set (RFC 7517 5),
    None where no assertions are signed. `bug` is told what went wrong in the others.
    """

    state: Callable[[], State]
    ready: Callable[[], list[str]]
    status: Callable[[], Status]
    jwks: Callable[[], Mapping[str, Any]] | None = None
    bug: Callable[[Exception], None] | None = None


class Drain(TypedDict):
    """A guard that lets connections finish: how many there were when it began, and how long they still may."""

    of: int
    seconds_left: float


class Status(TypedDict):
    """What `/status` says, all that `handfast status` shows."""

    version: str
    now: float  # Unix seconds
    listeners: dict[str, str]  # name: address
    unready: list[str]
    draining: Drain | None
    state: State


def status_of(state: State, listeners: Mapping[str, str], unready: list[str], draining: Drain | None) -> Status:
    """What `/status` says now."""
    return Status(
        version=__version__, now=time(), listeners=dict(listeners), unready=unready, draining=draining, state=state
    )


def unready_for(state: State, now: float, *, listening: bool, draining: bool) -> list[str]:
    """Why a guard should get no traffic, in words; empty when it may. `now` is Unix seconds."""
    said = {
        "it does not listen": not listening,
        "it is draining": draining,
        "no snapshot is in force": state["generation"] == 0,
        "the log cannot be written": state["log_broken"],
        "no worker is heard of": all(worker["silent"] >= SILENT for worker in state["workers"]),
    }
    expired = [f"the certificate of {name} expired" for name, end in state["certificates"].items() if end <= now]
    return [words for words, so in said.items() if so] + expired


class Admin:
    """The admin listener."""

    def __init__(self, facts: AdminFacts) -> None:
        self._facts = facts
        self._server: asyncio.Server | None = None
        self._clients: set[_Client] = set()
        self._local = True  # only this machine can connect

    async def serve(self, plug: socket.socket) -> None:
        """Begin to serve on a bound stream socket, TCP or UNIX; returns at once."""
        loop = asyncio.get_running_loop()
        make = partial(_Client, self)
        if plug.family == socket.AF_UNIX:
            self._local = False  # no browser can be led to it
            self._server = await serve_unix(make, plug)
        else:
            self._local = ipaddress.ip_address(plug.getsockname()[0]).is_loopback
            self._server = await loop.create_server(make, sock=plug)

    def close(self) -> None:
        """Take no more, and end what is under way."""
        if self._server is not None:
            self._server.close()
        for client in list(self._clients):
            client.abort()

    def enter(self, client: _Client) -> bool:
        """Count a client in; False when there are as many as there may be."""
        if len(self._clients) >= MAX_CLIENTS:
            return False
        self._clients.add(client)
        return True

    def leave(self, client: _Client) -> None:
        """Count a client out."""
        self._clients.discard(client)

    def answer(self, head: RequestHead) -> bytes:
        """The whole response to a request. Raises nothing."""
        try:
            return self._answer(head)
        except Exception as bug:
            if self._facts.bug is not None:
                with suppress(Exception):
                    self._facts.bug(bug)
            return _refusal(500, Reason.BUG, head.method == b"HEAD")

    def _answer(self, head: RequestHead) -> bytes:
        head_only = head.method == b"HEAD"
        if head.method not in (b"GET", b"HEAD"):
            return _refusal(405, Reason.HTTP_METHOD, extra=((b"Allow", b"GET, HEAD"),))
        if not self._is_ours(head.host):
            return _refusal(421, Reason.HTTP_MISDIRECTED, head_only)
        facts, status, content_type = self._facts, 200, _JSON
        match head.path:
            case b"/metrics":
                body, content_type = render(facts.state(), time()), CONTENT_TYPE
            case b"/healthz":
                body = _json({"alive": True})
            case b"/readyz":
                reasons = facts.ready()
                status = 503 if reasons else 200
                body = _json({"ready": not reasons, "reasons": reasons})
            case b"/status":
                body = _json(facts.status())
            case b"/.well-known/jwks.json" if facts.jwks is not None:
                body, content_type = _json(facts.jwks()), b"application/jwk-set+json"
            case _:
                status, body = 404, _json({"error": "not_found", "paths": PATHS})
        return plain_response(status, body, content_type, head_only=head_only, extra=_EXTRA)

    def _is_ours(self, host: bytes) -> bool:
        """Whether a request may be for this host. A page whose name an attacker rebinds to a loopback address
        makes a browser on this machine ask for that name. Where others can connect, any name may be ours.
        """
        if not self._local or host == b"localhost":
            return True
        try:
            return ipaddress.ip_address(host.decode("ascii")).is_loopback
        except ValueError:
            return False


class _Client(asyncio.Protocol):
    """One exchange: a request, a response, the end."""

    __slots__ = ("_admin", "_answered", "_buffer", "_deadline", "_transport")

    _transport: asyncio.Transport

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._buffer = b""
        self._answered = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it
        self._deadline = asyncio.get_running_loop().call_later(DEADLINE, self.abort)
        if not self._admin.enter(self):
            self._answered = True
            self._transport.write(_refusal(503, Reason.LIMIT_CONNECTIONS))
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._buffer += data
        if self._answered:
            if len(self._buffer) > 2 * MAX_REQUEST:  # what comes after the request is thrown away, within bounds
                self.abort()
            return
        try:
            end = find_head(self._buffer)
            if end > MAX_REQUEST or (end < 0 and len(self._buffer) > MAX_REQUEST):
                raise RemoteProtocolError(Reason.HTTP_HEAD_TOO_LARGE, limit=MAX_REQUEST)
            if end >= 0:
                self._say(self._admin.answer(parse_request_head(self._buffer[:end])))
        except RemoteProtocolError as error:
            self._say(_refusal(error.reason.http, error.reason))

    def eof_received(self) -> None:
        """See asyncio.Protocol. The transport closes once what is written has been sent."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._admin.leave(self)

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def _say(self, response: bytes) -> None:
        """Answer, and wait for the client to close: closing first, with bytes unread, would cut the answer off."""
        self._answered = True
        self._transport.write(response)
        self._transport.write_eof()


def _json(value: object) -> bytes:
    return _encode(value) + b"\n"


def _refusal(
    status: int, reason: Reason, head_only: bool = False, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> bytes:
    body = _json({"error": reason.code})
    return plain_response(status, body, _JSON, head_only=head_only, extra=_EXTRA + extra)


# The reports of workers. A state is sent as JSON in one datagram, or in several where it is long, each with who
# sends it, when (the clock of `monotonic`, which is one for all processes of a machine), and which part it is.

_HEADER = struct.Struct("!4sdHHH")  # mark, sent at, worker, part, parts
_MARK = b"hfst"
_MAX_DATAGRAM = 60 << 10
_MAX_PARTS = 16
_MAX_WORKERS = 1024
_MAX_READS = 4096  # datagrams at a time
_decode = msgspec.json.Decoder(State).decode


def send_state(plug: socket.socket, worker: int, state: State) -> bool:
    """Send a worker's state to who reads `Reports`; False when it did not get through, and the next one may.

    `plug` is one end of a UNIX datagram socket pair, made before the fork. Never waits.
    """
    encoded, room = _encode(state), _MAX_DATAGRAM - _HEADER.size
    pieces = [encoded[at : at + room] for at in range(0, len(encoded), room)]
    if len(pieces) > _MAX_PARTS:
        return False
    sent_at = monotonic()
    try:
        for part, piece in enumerate(pieces):
            header = _HEADER.pack(_MARK, sent_at, worker, part, len(pieces))
            plug.send(header + piece, socket.MSG_DONTWAIT)
    except OSError:  # the reader is slow, or gone
        return False
    return True


class Reports:
    """What the workers say, as far as it came. Have `read` called when the socket is readable."""

    def __init__(self, plug: socket.socket) -> None:
        self._plug = plug
        self._totals = Totals()
        self._sent_at: dict[int, float] = {}
        self._parts: dict[int, tuple[float, dict[int, bytes]]] = {}  # of a report that is not whole yet

    def read(self) -> None:
        """Take what has come. What does not read as a report is passed over."""
        for _ in range(_MAX_READS):
            try:
                datagram = self._plug.recv(1 << 16, socket.MSG_DONTWAIT)
            except OSError:  # nothing more
                return
            self._take(datagram)

    def gone(self, worker: int) -> None:
        """A worker died: what it counted stays in the sums, and it is not shown any more."""
        self.read()
        self._totals.gone(worker)
        self._sent_at.pop(worker, None)
        self._parts.pop(worker, None)

    def states(self) -> dict[int, State]:
        """The last state of each worker, with how long ago that was."""
        self.read()
        now = monotonic()
        return {worker: _aged(state, now - self._sent_at[worker]) for worker, state in self._totals.live().items()}

    def state(self) -> State:
        """All of them as one, the counts of dead workers too."""
        states = self.states()
        merged = self._totals.state()
        merged["workers"] = merge(states.values())["workers"]
        return merged

    def _take(self, datagram: bytes) -> None:
        if len(datagram) < _HEADER.size:
            return
        mark, sent_at, worker, part, parts = _HEADER.unpack_from(datagram)
        if mark != _MARK or worker >= _MAX_WORKERS or not part < parts <= _MAX_PARTS or not math.isfinite(sent_at):
            return
        before, pieces = self._parts.get(worker, (sent_at, {}))
        if before != sent_at:
            pieces = {}
        pieces[part] = datagram[_HEADER.size :]
        if len(pieces) < parts:
            self._parts[worker] = (sent_at, pieces)
            return
        self._parts.pop(worker, None)
        try:
            state = _decode(b"".join(pieces[at] for at in range(parts)))
        except (msgspec.DecodeError, KeyError):
            return
        if is_whole(state):
            self._totals.take(worker, state)
            self._sent_at[worker] = sent_at


def _aged(state: State, seconds: float) -> State:
    workers = [worker | {"silent": max(0.0, seconds)} for worker in state["workers"]]
    return state | {"workers": workers}
