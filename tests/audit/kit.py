"""Servers with one hole each, and right ones; and one check run against one of them."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tlslite.api import HandshakeSettings, TLSConnection, X509CertChain, parsePEMKey
from tlslite.errors import TLSError
from tlslite.messages import Certificate

from handfast.audit.catalogue import choose
from handfast.audit.model import Finding
from handfast.audit.odd import chain_of
from handfast.audit.runner import Means, Pace, Target, prepare, run
from handfast.testing import TestAuthority
from tests.support.apps import accepted
from tests.support.programs import free_port, nginx, s_server

FAST = Pace(answer=2.0, limit=1.5, patience=1.5)
# Longer than any alert, so that a replayed answer could be told from one.
BODY = "Hello World, " * 20
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(BODY), BODY.encode())


def target(port: int) -> Target:
    return Target("127.0.0.1", port, "localhost")


def found(check: str, port: int, means: Means | None = None, pace: Pace = FAST) -> Finding:
    """What one check finds at a port of this machine."""
    audit = prepare(target(port), means or Means(), pace)
    (finding,) = run(audit, choose([check]), lambda *_: None).findings
    return finding


Serve = Callable[[socket.socket], None]


@contextmanager
def scripted(serve: Serve) -> Iterator[int]:
    """A server on a free port that hands each connection to `serve`, on a thread of its own."""
    stopped = threading.Event()
    open_now: set[socket.socket] = set()
    threads: list[threading.Thread] = []

    def attend(connection: socket.socket) -> None:
        with connection, suppress(OSError, TLSError, ssl.SSLError, AssertionError, IndexError):
            connection.settimeout(10)
            serve(connection)
        open_now.discard(connection)

    def accept(listener: socket.socket) -> None:
        while True:
            if (connection := accepted(listener)) is None:
                return
            if stopped.is_set():
                connection.close()
                return
            open_now.add(connection)
            thread = threading.Thread(target=attend, args=(connection,))
            threads.append(thread)
            thread.start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        acceptor = threading.Thread(target=accept, args=(listener,))
        acceptor.start()
        try:
            yield port
        finally:
            stopped.set()
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 5).close()
            acceptor.join(30)
            for connection in list(open_now):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(30)


def python_context(authority: TestAuthority, folder: Path, verify: ssl.VerifyMode) -> ssl.SSLContext:
    """A server's context of the stdlib."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.server().save(folder, "python"))
    context.load_verify_locations(cadata=authority.pem.decode())
    context.verify_mode = verify
    return context


def answering(context: ssl.SSLContext) -> Serve:
    """Answer one request over TLS."""

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(4096)
            tls.sendall(ANSWER)

    return serve


def credulous(authority: TestAuthority, engine: Callable[[socket.socket], Any] = TLSConnection) -> Serve:
    """tlslite-ng asks for a certificate and verifies no chain: that is left to the application, which here forgot."""
    server = authority.server()

    def serve(connection: socket.socket) -> None:
        tls = engine(connection)
        settings = HandshakeSettings()
        settings.ticket_count = 0
        settings.certificate_compression_send = settings.certificate_compression_receive = []
        tls.handshakeServer(
            certChain=chain_of(server),
            privateKey=parsePEMKey(server.key_pem.decode(), private=True),
            reqCert=True,
            settings=settings,
        )
        if not tls.session.clientCertChain:
            tls.close()
            return
        tls.read(max=4096, min=1)
        tls.write(ANSWER)
        tls.close()

    return serve


class Gullible(TLSConnection):  # type: ignore[misc]  # tlslite-ng has no types
    """A TLS server that takes any CertificateVerify for a good one."""

    def _getMsg(self, *arguments: Any, **keywords: Any) -> Iterator[Any]:
        for result in super()._getMsg(*arguments, **keywords):
            if isinstance(result, Certificate) and isinstance(result.cert_chain, X509CertChain):
                for certificate in result.cert_chain.x509List:
                    certificate.publicKey.verify = lambda *_, **__: True
            yield result


@contextmanager
def nginx_with(authority: TestAuthority, folder: Path, *lines: str, listen: str = "ssl") -> Iterator[int]:
    """nginx with TLS of the authority and these lines in its server block."""
    port = free_port()
    cert, key = authority.server().save(folder, "nginx")
    ca = authority.save(folder)
    settings = "\n".join(
        [
            f"listen 127.0.0.1:{port} {listen};",
            "server_name localhost;",
            f"ssl_certificate {cert}; ssl_certificate_key {key};",
            f"ssl_client_certificate {ca};",
            "client_header_timeout 1s;",
            *lines,
            f'location / {{ return 200 "{BODY}"; }}',
        ]
    )
    with nginx(f"server {{\n{settings}\n}}\n", folder):
        yield port


@contextmanager
def openssl_with(authority: TestAuthority, folder: Path, *words: str) -> Iterator[int]:
    """`openssl s_server` with a certificate of the authority and these flags."""
    cert, key = authority.server().save(folder, "openssl")
    with s_server("-cert", cert, "-key", key, *words, folder=folder) as (port, _):
        yield port
