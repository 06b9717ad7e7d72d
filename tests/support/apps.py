"""Apps behind a guard that note every byte they were sent, and clients that speak raw TLS to it."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.certs import Leaf
from tests.support.waiting import PATIENCE

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nHello World\n"
Answer = Callable[[socket.socket, bytes], None]


def hello(connection: socket.socket, _request: bytes) -> None:
    """Answer a request with Hello World."""
    connection.sendall(HELLO)


def echo_head(connection: socket.socket, request: bytes) -> None:
    """Answer with the head that was received."""
    head = request.partition(b"\r\n\r\n")[0]
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(head) + head)


@dataclass
class App:
    """A plain TCP server on loopback. It reads heads and calls `answer` for each; `received` holds all bytes."""

    answer: Answer = hello
    received: bytearray = field(default_factory=bytearray)
    connections: int = 0

    def __enter__(self) -> App:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        stop_accepting(self._listener, self._acceptor)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while (connection := accepted(self._listener)) is not None:
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        pending = b""
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    self.received += data
                    pending += data
                    while b"\r\n\r\n" in pending:
                        head, _, pending = pending.partition(b"\r\n\r\n")
                        self.answer(connection, head + b"\r\n\r\n" + pending)
            except OSError:
                return


def accepted(listener: socket.socket) -> socket.socket | None:
    """The next connection; None once the listener was shut down. That files run out for a while ends no app."""
    while True:
        try:
            return listener.accept()[0]
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                return None
            time.sleep(0.01)


def stop_accepting(listener: socket.socket, acceptor: threading.Thread) -> None:
    """Close a listener on which a thread waits. Closing alone does not wake the thread, and the port stays open."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    acceptor.join(PATIENCE)
    assert not acceptor.is_alive(), "the app still accepts"
    listener.close()


@contextmanager
def refusing() -> Iterator[str]:
    """An address at which every connection is refused, and that nobody else can take meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and never listened on
        yield f"127.0.0.1:{held.getsockname()[1]}"


def client_context(ca: Path, leaf: Leaf | None = None, folder: Path | None = None) -> ssl.SSLContext:
    """A stdlib client context that trusts `ca` and, with `leaf`, presents it."""
    context = ssl.create_default_context(cafile=str(ca))
    if leaf is not None:
        assert folder is not None
        cert, key = leaf.save(folder, f"client-{leaf.certificate.serial_number:x}"[:24])
        context.load_cert_chain(cert, key)
    return context


def talk(address: str, context: ssl.SSLContext, request: bytes, server_name: str = "localhost") -> bytes:
    """Send `request` over TLS and return all that comes back until the far side closes or there is silence for long."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname=server_name) as tls,
    ):
        tls.sendall(request)
        pieces = []
        try:
            while piece := tls.recv(1 << 16):
                pieces.append(piece)
        except TimeoutError:
            pass
        return b"".join(pieces)


def get(path: str = "/", host: str = "localhost", *headers: str, close: bool = True) -> bytes:
    """A GET request; one that asks to close afterwards unless told otherwise."""
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", *headers]
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
