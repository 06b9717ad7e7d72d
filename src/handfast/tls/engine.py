"""OpenSSL by its raw binding: contexts as we make them, and bytes and certificates across the border.

pyOpenSSL's methods make a buffer and raise an exception for each call, which is most of what a small record costs
(`make bench`), and some calls it does not offer. The names `lib` and `ffi` are private to it; they are used in this
room alone, and tests/tls hold them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from cryptography import x509
from OpenSSL import SSL

from handfast.errors import Failure, Reason, VerificationFailed
from handfast.pki.certificates import UNREADABLE

lib, ffi = SSL._lib, SSL._ffi  # type: ignore[attr-defined]  # see above
BUFFER_SIZE = 1 << 18


class _Room(threading.local):
    """Where bytes cross; nothing stays in it between calls. One for each thread: OpenSSL's calls let others run."""

    def __init__(self) -> None:
        self.buffer = ffi.new("char[]", BUFFER_SIZE)
        self.where = ffi.new("char **")


room = _Room()


def engine_version() -> str:
    """The TLS engine's name and version."""
    return SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()


def new_context(method: int, *, allow_tls12: bool) -> SSL.Context:
    """Make what every context of ours has that serves or calls: TLS 1.3, or 1.2 at the least; nothing to resume."""
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_2_VERSION if allow_tls12 else SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # an idle connection keeps no record buffers
    write_whole(context)
    if allow_tls12:
        context.set_cipher_list(b"ECDHE+AESGCM:ECDHE+CHACHA20")
    return context


def write_whole(context: SSL.Context) -> None:
    """Have `Channel.write` take all it is given in one crossing; pyOpenSSL asks for a record at a time."""
    context.clear_mode(lib.SSL_MODE_ENABLE_PARTIAL_WRITE)


def step(connection: SSL.Connection, records: bytes) -> bool:
    """Go on with a handshake (b'' begins it); return whether it is finished. Raises SSL.Error."""
    if records:
        connection.bio_write(records)
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        return False
    return True


def take(connection: SSL.Connection) -> bytes:
    """Return all records that wait to be sent."""
    return take_bio(connection._from_ssl)


def take_bio(bio: Any) -> bytes:
    """Return all that a memory BIO holds."""
    buffer = room.buffer
    got = lib.BIO_read(bio, buffer, BUFFER_SIZE)
    if got < BUFFER_SIZE:
        return bytes(ffi.unpack(buffer, got)) if got > 0 else b""
    pieces = []
    while got > 0:
        pieces.append(bytes(ffi.unpack(buffer, got)))
        got = lib.BIO_read(bio, buffer, BUFFER_SIZE)
    return b"".join(pieces)


def renew_memory(connection: SSL.Connection) -> None:
    """Give back what the handshake's flights took: a memory BIO never shrinks, and what follows is mostly small."""
    into, out = lib.BIO_new(lib.BIO_s_mem()), lib.BIO_new(lib.BIO_s_mem())
    for old, new in ((connection._into_ssl, into), (connection._from_ssl, out)):
        if rest := take_bio(old):
            lib.BIO_write(new, rest, len(rest))
    lib.SSL_set_bio(connection._ssl, into, out)  # which frees the old ones
    connection._into_ssl, connection._from_ssl = into, out


def presented(connection: SSL.Connection) -> tuple[bytes, ...]:
    """What the other side of a finished handshake showed, in DER, leaf first; () for nothing."""
    leaf = lib.SSL_get_peer_certificate(connection._ssl)
    if leaf == ffi.NULL:
        return ()
    try:
        first = _der(leaf)
    finally:
        lib.X509_free(leaf)
    return (first, *(der for der in _ders_of(lib.SSL_get_peer_cert_chain(connection._ssl)) if der != first))


def presented_count(connection: SSL.Connection) -> int:
    """How many certificates the client of a finished handshake showed, who showed one at least."""
    stack = lib.SSL_get_peer_cert_chain(connection._ssl)  # a server's has no leaf
    return 1 if stack == ffi.NULL else 1 + int(lib.sk_X509_num(stack))


def path_of(store_context: Any) -> tuple[bytes, ...]:
    """The path of an X509_STORE_CTX in DER, leaf first, as far as OpenSSL could follow it."""
    return _ders_of(lib.X509_STORE_CTX_get1_chain(store_context), owned=True)


def parse(ders: Iterable[bytes]) -> tuple[x509.Certificate, ...]:
    """Parse certificates in DER; () if there is one that `cryptography` does not read, though OpenSSL does."""
    try:
        return tuple(map(x509.load_der_x509_certificate, ders))
    except UNREADABLE:
        return ()


def parse_shown(ders: tuple[bytes, ...]) -> tuple[x509.Certificate, ...]:
    """Parse what the other side showed, in DER, to judge it. Raises VerificationFailed (VERIFY_MALFORMED)."""
    chain = parse(ders)
    if len(chain) != len(ders):
        detail = "OpenSSL can, but not the library that judges it"
        raise VerificationFailed((Failure(Reason.VERIFY_MALFORMED, {"detail": detail}),))
    return chain


def _ders_of(stack: Any, *, owned: bool = False) -> tuple[bytes, ...]:
    """The certificates of a STACK_OF(X509), which is freed if it is `owned`."""
    if stack == ffi.NULL:
        return ()
    certificates = [lib.sk_X509_value(stack, at) for at in range(lib.sk_X509_num(stack))]
    ders = tuple(map(_der, certificates))
    if owned:
        for certificate in certificates:
            lib.X509_free(certificate)
        lib.sk_X509_free(stack)
    return ders


def _der(certificate: Any) -> bytes:
    bio = lib.BIO_new(lib.BIO_s_mem())
    try:
        lib.i2d_X509_bio(bio, certificate)
        return take_bio(bio)
    finally:
        lib.BIO_free(bio)
