"""Proxies and applications with one hole each, of the kind that only an accepted client can use."""

from __future__ import annotations

import queue
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from handfast.audit.catalogue import choose
from handfast.audit.model import Finding
from handfast.audit.runner import Means, Pace, prepare, run
from handfast.testing import TestAuthority
from tests.audit.kit import FAST, python_context, scripted, target

Lengths = Callable[[bytes], int | None]  # a head's body length; None: it is chunked
Head = Callable[[bytes], bytes]
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
BAD = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
LOST = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def found_at(
    check: str, port: int, means: Means, pace: Pace = FAST, *, echo: str | None = None, protected: str | None = None
) -> Finding:
    """What one check finds, where paths are named for it."""
    aim = replace(target(port), echo=echo, protected=protected)
    (finding,) = run(prepare(aim, means, pace), choose([check]), lambda *_: None).findings
    return finding


def answer(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


class Stream:
    """A socket that is read by pieces."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pending = b""

    def head(self) -> bytes:
        """The next head with its empty line; b'' at the end."""
        while b"\r\n\r\n" not in self.pending:
            if not self._more():
                return b""
        head, _, self.pending = self.pending.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    def body(self, length: int | None) -> bytes:
        """A body of this length; None: chunked, read as strictly as need be."""
        if length is None:
            return self._chunks()
        while len(self.pending) < length and self._more():
            pass
        body, self.pending = self.pending[:length], self.pending[length:]
        return body

    def _chunks(self) -> bytes:
        taken = b""
        while True:
            while b"\n" not in self.pending:
                if not self._more():
                    return taken
            line, _, rest = self.pending.partition(b"\n")
            taken, self.pending = taken + line + b"\n", rest
            size = int(line.strip().partition(b";")[0] or b"0", 16)
            if size == 0:
                while b"\r\n" not in self.pending and self._more():
                    pass
                end, _, self.pending = self.pending.partition(b"\r\n")
                while end:  # trailers
                    taken += end + b"\r\n"
                    end, _, self.pending = self.pending.partition(b"\r\n")
                return taken + b"\r\n"
            taken += self.body(size + 2)

    def _more(self) -> bool:
        piece = self.connection.recv(1 << 16)
        self.pending += piece
        return bool(piece)


def by_length(head: bytes) -> int | None:
    """Content-Length counts, whatever else is there."""
    found = re.search(rb"(?im)^content-length:[ \t]*(\d+)", head)
    return int(found[1]) if found else None if _chunked(head) else 0


def by_coding(head: bytes) -> int | None:
    """Transfer-Encoding counts, whatever else is there."""
    return None if _chunked(head) else by_length(head)


def by_any_coding(head: bytes) -> int | None:
    """Whatever looks like `chunked` counts."""
    return None if re.search(rb"(?im)transfer-encoding.*?chunked", head) else by_length(head)


def by_last_length(head: bytes) -> int | None:
    found = re.findall(rb"(?im)^content-length:[ \t]*(\d+)", head)
    return int(found[-1]) if found else by_coding(head)


def _chunked(head: bytes) -> bool:
    return re.search(rb"(?im)^transfer-encoding:[ \t]*chunked\r?$", head) is not None


@contextmanager
def application(respond: Callable[[bytes], bytes], lengths: Lengths = by_coding) -> Iterator[int]:
    """An application that frames requests in its own way and answers each."""

    def serve(connection: socket.socket) -> None:
        stream = Stream(connection)
        while head := stream.head():
            stream.body(lengths(head))
            connection.sendall(respond(head))

    with scripted(serve) as port:
        yield port


def echo(head: bytes) -> bytes:
    return answer(head)


@contextmanager
def proxy(
    authority: TestAuthority, folder: Path, behind: int, rewrite: Head = lambda head: head, lengths: Lengths = by_length
) -> Iterator[int]:
    """A proxy of mutual TLS with one connection to the application for all of its clients.

    `rewrite` makes the head that is passed on; what begins with HTTP/ is answered in its place.
    """
    context = python_context(authority, folder, ssl.CERT_REQUIRED)
    shared: queue.Queue[Any] = queue.Queue()
    shared.put(None)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            stream = Stream(tls)
            while head := stream.head():
                body = stream.body(lengths(head))
                passed = rewrite(head)
                if passed.startswith(b"HTTP/"):
                    tls.sendall(passed)
                else:
                    tls.sendall(_asked(shared, behind, passed + body))
                if b"connection: close" in head.lower():
                    return

    try:
        with scripted(serve) as port:
            yield port
    finally:
        upstream = shared.get(timeout=5)
        if upstream is not None:
            upstream.connection.close()


def _asked(shared: queue.Queue[Any], behind: int, request: bytes) -> bytes:
    """Ask over the one connection, in turn; what is left of an earlier answer comes first, as it does in a pool."""
    upstream = shared.get(timeout=5)
    try:
        if upstream is None:
            upstream = Stream(socket.create_connection(("127.0.0.1", behind), 5))
            upstream.connection.settimeout(1.0)
        upstream.connection.sendall(request)
        head = upstream.head()
        if not head:
            raise OSError
        return bytes(head + upstream.body(by_length(head)))
    except OSError:
        if upstream is not None:
            upstream.connection.close()
        upstream = None
        return LOST
    finally:
        shared.put(upstream)


def path_of(head: bytes) -> str:
    """The path of a head, without its query."""
    line = head.partition(b"\r\n")[0].decode("latin-1")
    return line.partition(" ")[2].rpartition(" ")[0].partition("?")[0]
