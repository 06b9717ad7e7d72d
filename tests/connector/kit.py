"""A connector in this process, on a thread of its own, and servers for it to call."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import uvloop

from handfast.connector.call import Generation, Route
from handfast.connector.service import Connector, Limits
from handfast.connector.words import Own
from handfast.errors import HandfastError
from handfast.guard.events import EventLog
from handfast.guard.listening import bind
from handfast.guard.places import Place
from handfast.pki.names import parse_name, parse_pattern
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.client import ClientContext, ClientSettings
from handfast.tls.credential import Credential
from tests.support.apps import accepted, stop_accepting
from tests.support.certs import Ca, Leaf
from tests.support.guards import Events
from tests.support.waiting import PATIENCE

RENEW = "handfast issue web"
Look = Callable[[datetime], Generation | HandfastError | None]


def generation(
    ca: Ca, leaf: Leaf, *, name: str | None = "localhost", expect: str | None = None, tls12: bool = False
) -> Generation:
    """What a connector shows and trusts."""
    pattern = None if expect is None else parse_pattern(expect)
    known = None if name is None or pattern is not None else parse_name(name)
    terms = Terms(TrustBundle((ca.certificate,)), Purpose.SERVER, known)
    context = ClientContext(Credential(leaf.key, leaf.presented), terms, ClientSettings(name, pattern, tls12))
    return Generation(context, Own(leaf.presented, RENEW))


@dataclass
class Calling:
    """A connector that runs until the `with` ends."""

    to: str
    made: Generation
    pool: int = 0
    limits: Limits = field(default_factory=lambda: Limits(drain=2, quiet=0.5))
    uids: frozenset[int] = frozenset()
    unix: Path | None = None
    look: Look | None = None

    def __enter__(self) -> Calling:
        self.events = Events()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main(started)))
        self._thread.start()
        started.result(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the connector did not stop"

    def call(self, function: Any, *arguments: Any) -> Any:
        """Call something on the connector's loop and return what it returns."""
        done: Future[Any] = Future()
        self.loop.call_soon_threadsafe(lambda: done.set_result(function(*arguments)))
        return done.result(PATIENCE)

    def open(self) -> socket.socket:
        """A local client's connection."""
        if self.unix is not None:
            plug = socket.socket(socket.AF_UNIX)
            plug.settimeout(PATIENCE)
            plug.connect(str(self.unix))
            return plug
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def ask(self, request: bytes) -> bytes:
        """Send bytes and the end; return all that comes back."""
        with self.open() as plug:
            plug.sendall(request)
            plug.shutdown(socket.SHUT_WR)
            return everything(plug)

    def fetch(self, request: bytes) -> bytes:
        """Send a request and return all that comes back; our side stays open, as HTTP clients keep it."""
        with self.open() as plug:
            plug.sendall(request)
            return everything(plug)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far."""
        self.call(self.connector.log.flush)
        return [event for event in list(self.events.all) if event["event"] == kind]

    async def _main(self, started: Future[None]) -> None:
        try:
            self.loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            log = EventLog(self.events, pretty=False)  # type: ignore[arg-type]  # as much of a stream as is used
            host, _, port = self.to.rpartition(":")
            self.connector = Connector(
                Route(host, int(port)), self.made, log, self.limits, self.pool, self.uids, self.look
            )
            if self.unix is None:
                plug = bind(Place("127.0.0.1", 0))
                self.port = plug.getsockname()[1]
            else:
                plug = bind(Place(path=str(self.unix)), others=bool(self.uids))
            self.connector.listen(plug)
            started.set_result(None)
        except BaseException as error:
            started.set_exception(error)
            raise
        await self._stop.wait()
        await self.connector.stop()
        log.close()


Serve = Callable[[ssl.SSLSocket], None]


def echo(tls: ssl.SSLSocket) -> None:
    """Give every byte back; end when the client does."""
    while data := tls.recv(1 << 16):
        tls.sendall(data)
    finish(tls)


def finish(tls: ssl.SSLSocket) -> None:
    """Say close_notify, if there is still anybody to hear it."""
    with contextlib.suppress(OSError, ValueError):
        tls.unwrap()


def count(tls: ssl.SSLSocket) -> None:
    """Read to the end, then say how much that was."""
    total = 0
    while data := tls.recv(1 << 16):
        total += len(data)
    tls.sendall(b"%d bytes" % total)
    finish(tls)


@dataclass
class Server:
    """A TLS server of Python's own that asks for client certificates; `serve` has each connection."""

    ca: Ca
    folder: Path
    serve: Serve = echo
    leaf: Leaf | None = None
    client_ca: Ca | None = None
    crl: Path | None = None
    connections: int = 0
    peers: list[int] = field(default_factory=list)  # serials of the certificates that came
    refusals: list[str] = field(default_factory=list)
    open: list[ssl.SSLSocket] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)  # handshakes wait for it

    def __enter__(self) -> Server:
        self.go.set()
        leaf = self.leaf or self.ca.server()
        cert, key = leaf.save(self.folder, "server")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(cert, key)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._context.load_verify_locations((self.client_ca or self.ca).save(self.folder, "clients"))
        if self.crl is not None:
            self._context.load_verify_locations(self.crl)
            self._context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        stop_accepting(self._listener, self._acceptor)
        self.go.set()
        self.kill()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def kill(self) -> None:
        """Cut every connection that is open, as a process that dies does."""
        for tls in self.open:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(tls, socket.SHUT_RDWR)  # the TLS is its own thread's
        self.open.clear()

    def _accept(self) -> None:
        while (plain := accepted(self._listener)) is not None:
            self.connections += 1
            threading.Thread(target=self._handle, args=(plain,), daemon=True).start()

    def _handle(self, plain: socket.socket) -> None:
        plain.settimeout(2 * PATIENCE)
        with plain:
            try:
                self.go.wait(PATIENCE)
                with self._context.wrap_socket(plain, server_side=True, suppress_ragged_eofs=False) as tls:
                    shown = tls.getpeercert()
                    assert shown is not None
                    self.peers.append(int(str(shown["serialNumber"]), 16))
                    self.open.append(tls)
                    self.serve(tls)
            except ssl.SSLError as error:
                self.refusals.append(error.reason or str(error))
            except OSError:
                return


def everything(plug: socket.socket) -> bytes:
    """All that comes until the other side ends."""
    pieces = []
    while piece := plug.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)
