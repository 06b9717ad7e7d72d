"""Servers that show what OpenSSL reads and `cryptography` does not, by OpenSSL's raw binding."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from handfast.tls.engine import ffi, lib
from tests.support.apps import accepted, stop_accepting
from tests.support.certs import Leaf

VERSION_3, VERSION_6 = bytes.fromhex("a003020102"), bytes.fromhex("a003020105")  # [0] INTEGER (RFC 5280 4.1.2.1)


def unreadable(certificate: x509.Certificate) -> bytes:
    """The certificate in DER, of a version that there is none of; its signature does not verify any more."""
    der = certificate.public_bytes(Encoding.DER)
    assert der.count(VERSION_3) == 1
    return der.replace(VERSION_3, VERSION_6)


def unreadable_name(authority: x509.Certificate) -> bytes:
    """An authority's certificate in DER whose name is of letters that a PrintableString has not (X.680 41.4)."""
    name = str(next(iter(authority.subject)).value).encode()
    utf8 = bytes([0x0C, len(name)]) + name
    return authority.public_bytes(Encoding.DER).replace(utf8, bytes([0x13, len(name)]) + b"@" * len(name))


def serving(leaf: Leaf, *also: bytes, shown: bytes | None = None, accepts: tuple[bytes, ...] = ()) -> SSL.Context:
    """A server's context: it shows `leaf`, or the DER in `shown`, then the DER in `also`; it asks for a certificate
    of the authorities in `accepts` where there are any.
    """
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    der = leaf.certificate.public_bytes(Encoding.DER) if shown is None else shown
    assert lib.SSL_CTX_use_certificate(context._context, ffi.gc(_read(der), lib.X509_free)) == 1
    context.use_privatekey(leaf.key)
    for der in also:
        assert lib.SSL_CTX_add_extra_chain_cert(context._context, _read(der)) == 1  # and takes it over
    for der in accepts:
        authority = ffi.gc(_read(der), lib.X509_free)
        assert lib.SSL_CTX_add_client_CA(context._context, authority) == 1
    if accepts:
        context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
    return context


@contextmanager
def answering(context: SSL.Context) -> Iterator[str]:
    """A TLS server that gives the first bytes of each connection back; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while (plain := accepted(listener)) is not None:
                with plain, suppress(SSL.Error):
                    tls = SSL.Connection(context, plain)
                    tls.set_accept_state()
                    tls.do_handshake()
                    tls.sendall(tls.recv(100))
                    tls.shutdown()
                    tls.recv(1)  # to the client's end: closing before it would be a reset

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        yield f"localhost:{listener.getsockname()[1]}"
        stop_accepting(listener, acceptor)


def _read(der: bytes) -> Any:
    bio = lib.BIO_new_mem_buf(ffi.from_buffer(der), len(der))
    certificate = lib.d2i_X509_bio(bio, ffi.NULL)
    lib.BIO_free(bio)
    assert certificate != ffi.NULL, "OpenSSL reads it"
    return certificate
