"""The server's side of a mutual-TLS handshake, over memory.

Theory of operation. A `ServerContext` is one generation: a credential, the terms for clients, and nothing
that changes. It is proved with a handshake in memory when it is made, and never altered afterwards.

    bytes -> ServerHandshake.feed() -> Accepted(VerifiedPeer, Channel)
                                    -> Refused(failures, Channel | None)

OpenSSL judges the path while the handshake runs. Where a refusal can be answered in words (HTTP), the
handshake is finished all the same and the refusal comes out with a channel to say it on; where it cannot
(TCP), the handshake itself fails, with OpenSSL's alert. Either way `pki.verify` alone makes the peer.

TLS 1.3 only unless told otherwise; no resumption, no early data: a resumed session would skip revocation,
expiry and policy (CVE-2025-23419 and its kin). OpenSSL still sends two tickets after a TLS 1.3 handshake, for
pyOpenSSL has no way to ask for none; with OP_NO_TICKET and no session cache they stand for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509, X509StoreFlags

from handfast.errors import Failure, InvalidInput, Reason, VerificationFailed
from handfast.pki.verification import MAX_CHAIN, Judgement, Terms, VerifiedPeer, verify
from handfast.tls.credential import Credential
from handfast.tls.reasons import handshake_failure, path_detail


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a listener asks of its handshakes.

    `answer_refusals`: finish the handshake of a client that is refused, so that it can be told in HTTP.
    `offer_authorities`: name the accepted authorities in CertificateRequest; browsers choose by them.
    """

    answer_refusals: bool = True
    offer_authorities: bool = True
    allow_tls12: bool = False


def engine_version() -> str:
    """The TLS engine's name and version."""
    return SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()


# A connection's bytes cross into OpenSSL through these, not through pyOpenSSL's methods: those make a buffer and
# raise an exception for each call, which is most of what a small record costs (`make bench`). The names are private
# to pyOpenSSL; they stand in this file alone, and tests/tls hold them.
_lib, _ffi = SSL._lib, SSL._ffi  # type: ignore[attr-defined]  # see above
_BUFFER_SIZE = 1 << 18


class _Room(threading.local):
    """Where bytes cross; nothing stays in it between calls. One for each thread: OpenSSL's calls let others run."""

    def __init__(self) -> None:
        self.buffer = _ffi.new("char[]", _BUFFER_SIZE)


_room = _Room()


class Channel:
    """The encrypted pipe of a finished handshake: plain bytes on one side, TLS records on the other."""

    __slots__ = ("_connection", "_in", "_out", "_ssl", "at_eof", "more")

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection = connection  # owns what the others point to
        self._ssl = connection._ssl
        self._in = connection._into_ssl
        self._out = connection._from_ssl
        self.at_eof = False
        self.more = False  # whether the last `read` left plain bytes behind

    def feed(self, records: bytes) -> None:
        """Take what the network brought."""
        if _lib.BIO_write(self._in, records, len(records)) != len(records):
            raise MemoryError("a memory BIO takes no more")

    def read(self) -> bytes:
        """Return the next plain bytes; b'' when more records are needed or, with `at_eof`, at the peer's end.

        Raises TlsBroken when records do not decrypt.
        """
        self.more = False
        if self.at_eof:
            return b""
        size, buffer = 0, _room.buffer
        _lib.ERR_clear_error()  # SSL_get_error reads the thread's queue, whoever left something in it
        while size < _BUFFER_SIZE:  # each call gives one record's bytes at most
            got = _lib.SSL_read(self._ssl, buffer + size, _BUFFER_SIZE - size)
            if got <= 0:
                error = _lib.SSL_get_error(self._ssl, got)
                if error == _lib.SSL_ERROR_WANT_READ:
                    break
                if error != _lib.SSL_ERROR_ZERO_RETURN:  # broken is not ended: the stream may have been cut
                    raise TlsBroken(self._failure(got))
                self.at_eof = True
                break
            size += got
        else:
            self.more = True
        return bytes(_ffi.buffer(buffer, size)) if size else b""

    def write(self, plain: bytes) -> None:
        """Encrypt; `take` has the records. Raises TlsBroken."""
        _lib.ERR_clear_error()
        if plain and (put := _lib.SSL_write(self._ssl, plain, len(plain))) != len(plain):
            raise TlsBroken(self._failure(put))

    def close(self) -> None:
        """Say close_notify, where that can still be said."""
        try:
            self._connection.shutdown()
        except SSL.Error:
            return

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return _take(self._out)

    def _failure(self, result: int) -> Failure:
        try:
            self._connection._raise_ssl_error(self._ssl, result)
        except SSL.Error as error:
            return handshake_failure(error)
        return Failure(Reason.TLS_HANDSHAKE, {"detail": "no reason given"})


def write_whole(context: SSL.Context) -> None:
    """Have `Channel.write` take all it is given in one crossing; pyOpenSSL asks for a record at a time."""
    context.clear_mode(_lib.SSL_MODE_ENABLE_PARTIAL_WRITE)


class TlsBroken(Exception):
    """The channel cannot go on; `failure` says why. Never leaves the guard."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the handshake settled, for logs and rules."""

    server_name: str  # SNI, as sent; '' without
    version: str
    cipher: str
    group: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The client proved who it is."""

    peer: VerifiedPeer
    channel: Channel
    facts: Facts


@dataclass(frozen=True, slots=True)
class Refused:
    """The client did not. `presented` is what it showed, leaf first, for the log; nothing in it is verified.

    `channel` is there where the handshake was finished and the refusal can be told.
    """

    failures: tuple[Failure, ...]
    presented: tuple[x509.Certificate, ...]
    channel: Channel | None
    facts: Facts | None = None


class ServerContext:
    """One generation of a listener's TLS. Making one proves it; InvalidInput if it cannot serve."""

    def __init__(self, credential: Credential, terms: Terms, settings: ServerSettings) -> None:
        if not terms.bundle.anchors:
            raise InvalidInput(Reason.GUARD_NO_BUNDLE)
        self.terms = terms
        self.settings = settings
        self._context = _context(credential, terms, settings)
        _prove(self)

    def accept(self, clock: Callable[[], datetime]) -> ServerHandshake:
        """Begin one handshake. `clock` gives the instant at which the chain is judged."""
        return ServerHandshake(SSL.Connection(self._context, None), self, clock)


class ServerHandshake:
    """A handshake under way: feed it records, send what `take` returns, until `feed` returns an outcome."""

    __slots__ = ("_clock", "_connection", "_context", "_refusal", "_seen")

    def __init__(self, connection: SSL.Connection, context: ServerContext, clock: Callable[[], datetime]) -> None:
        self._connection = connection
        self._context = context
        self._clock = clock
        self._refusal: tuple[int, int] | None = None  # (OpenSSL's error, depth) of the path's first fault
        self._seen: dict[int, X509] = {}  # by depth, as OpenSSL walked the path; it forgets them when it refuses
        connection.set_app_data(self)
        connection.set_accept_state()

    def feed(self, records: bytes) -> Accepted | Refused | None:
        """Go on with what the network brought; None while more is needed."""
        self._connection.bio_write(records)
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return None
        except SSL.Error as error:
            return self._failed(error)
        return self._finished()

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return _take(self._connection._from_ssl)

    def on_certificate(self, certificate: X509, error: int, depth: int) -> bool:
        """OpenSSL looked at a certificate of the path. Note the first fault; say whether it may go on."""
        self._seen[depth] = certificate
        if error and self._refusal is None:
            self._refusal = (error, depth)
        return not error or self._context.settings.answer_refusals

    def _finished(self) -> Accepted | Refused:
        connection, channel = self._connection, Channel(self._connection)
        facts = Facts(
            server_name=(connection.get_servername() or b"").decode("ascii", "replace"),
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            group=connection.get_group_name() or "",
        )
        presented = self._presented()
        try:
            peer = verify(presented, self._context.terms, self._clock(), self._judgement())
        except VerificationFailed as refused:
            return Refused(refused.failures, presented, channel, facts)
        return Accepted(peer, channel, facts)

    def _failed(self, error: SSL.Error) -> Refused:
        presented = tuple(self._seen[depth].to_cryptography() for depth in sorted(self._seen))
        if self._refusal is not None:  # OpenSSL refused the path: explain it as the verifier would
            try:
                verify(presented, self._context.terms, self._clock(), self._judgement())
            except VerificationFailed as refused:
                return Refused(refused.failures, presented, None)
        return Refused((handshake_failure(error),), presented, None)

    def _judgement(self) -> Judgement:
        if self._refusal is not None:
            return Judgement((), path_detail(*self._refusal))
        path = self._connection.get_verified_chain(as_cryptography=True)
        return Judgement(tuple(path or ()), "no path was built")

    def _presented(self) -> tuple[x509.Certificate, ...]:
        try:
            leaf = self._connection.get_peer_certificate(as_cryptography=True)
            rest = self._connection.get_peer_cert_chain(as_cryptography=True) or []
        except ValueError:  # OpenSSL could read it and `cryptography` cannot: judged as not presented
            return ()
        return () if leaf is None else (leaf, *(certificate for certificate in rest if certificate != leaf))


def _context(credential: Credential, terms: Terms, settings: ServerSettings) -> SSL.Context:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION if settings.allow_tls12 else SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    write_whole(context)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # an idle connection keeps no record buffers
    if settings.allow_tls12:
        context.set_cipher_list(b"ECDHE+AESGCM:ECDHE+CHACHA20")
    credential.configure(context)
    store = context.get_cert_store()
    assert store is not None
    for anchor in terms.bundle.anchors:
        store.add_cert(X509.from_cryptography(anchor))
        if settings.offer_authorities:
            context.add_client_ca(anchor)
    # The anchors are what the operator chose, each an authority; one need not be self-signed to be trusted.
    store.set_flags(X509StoreFlags.PARTIAL_CHAIN)
    context.set_verify_depth(MAX_CHAIN)
    mode = SSL.VERIFY_PEER | (0 if settings.answer_refusals else SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_verify(mode, _on_certificate)
    return context


def _on_certificate(connection: SSL.Connection, certificate: X509, error: int, depth: int, ok: int) -> bool:
    """Called for each certificate of a path. An exception here fails the handshake (since pyOpenSSL 26.0)."""
    handshake = connection.get_app_data()
    return isinstance(handshake, ServerHandshake) and handshake.on_certificate(certificate, 0 if ok else error, depth)


def _take(bio: Any) -> bytes:
    pieces, buffer = [], _room.buffer
    while (got := _lib.BIO_read(bio, buffer, _BUFFER_SIZE)) > 0:
        pieces.append(bytes(_ffi.buffer(buffer, got)))
        if got < _BUFFER_SIZE:
            break
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _prove(context: ServerContext) -> None:
    """Run a handshake in memory with a client that shows no certificate: it must get as far as being judged."""
    client_context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    client_context.set_verify(SSL.VERIFY_NONE)
    client = SSL.Connection(client_context, None)
    client.set_connect_state()
    server = context.accept(lambda: datetime.min.replace(tzinfo=UTC))  # there is no chain to judge
    for _ in range(4):
        try:
            client.do_handshake()
        except SSL.WantReadError:
            pass
        except SSL.Error:
            break
        outcome = server.feed(_take(client._from_ssl))
        if outcome is not None:
            if isinstance(outcome, Refused) and outcome.failures[0].reason is Reason.VERIFY_NO_CERTIFICATE:
                return
            break
        client.bio_write(server.take())
    raise InvalidInput(Reason.TLS_HANDSHAKE, detail="the new certificate and key do not complete a handshake")
