"""The server's side of a mutual-TLS handshake, over memory.

Theory of operation. A `ServerContext` is one generation: a credential, the terms for clients, and nothing
that changes. It is proved with a handshake in memory when it is made, and never altered afterwards.

    bytes -> ServerHandshake.feed() -> Accepted(VerifiedPeer, Channel)
                                    -> Refused(failures, Channel | None)

OpenSSL judges the path, and `pki.verify` alone makes the peer. Where a refusal can be answered in words (HTTP),
the handshake is finished first, which proves that the client holds the key; then the chain is judged, and the
refusal comes out with a channel to say it on. A chain that this generation has accepted before, byte for byte, is
not judged again but for what time changes. Where a refusal cannot be answered (TCP), the chain is judged within
the handshake, which fails with the alert that fits.

TLS 1.3 only unless told otherwise; no resumption, no early data: a resumed session would skip revocation,
expiry and policy (CVE-2025-23419 and its kin). OpenSSL sends two tickets after a TLS 1.3 handshake unless its
configuration says otherwise (`tls.configuration`); with OP_NO_TICKET and no session cache they stand for nothing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509, X509StoreFlags

from handfast.errors import Failure, InvalidInput, Reason, VerificationFailed
from handfast.pki.verification import MAX_CHAIN, Judgement, Terms, VerifiedPeer, still_trusted, verify
from handfast.tls.credential import Credential
from handfast.tls.judge import Judge
from handfast.tls.reasons import alert_error, handshake_failure, path_detail

MAX_KNOWN = 4096  # chains that a generation remembers to have accepted
# What a TLS 1.3 handshake may use. AES-128 first: its key schedule hashes with SHA-256, which processors do fast.
_SUITES = b"TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384"


class ClientAuth(StrEnum):
    """Whether a client must show a certificate."""

    REQUIRED = "required"
    OPTIONAL = "optional"  # asked for; without one the client is nobody, with a bad one it is refused
    OFF = "off"  # not asked for


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a listener asks of its handshakes.

    `answer_refusals`: finish the handshake of a client that is refused, so that it can be told in HTTP.
    `offer_authorities`: name the accepted authorities in CertificateRequest; browsers choose by them.
    `alpn`: the application protocols that are spoken, best first. A client that names protocols, and none of
    these, is refused (RFC 7301 3.2): it would take what we say for another language.
    """

    answer_refusals: bool = True
    offer_authorities: bool = True
    allow_tls12: bool = False
    client_auth: ClientAuth = ClientAuth.REQUIRED
    alpn: tuple[bytes, ...] = ()


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
        self.where = _ffi.new("char **")


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
        buffer = _room.buffer
        _lib.ERR_clear_error()  # SSL_get_error reads the thread's queue, whoever left something in it
        size = _lib.SSL_read(self._ssl, buffer, _BUFFER_SIZE)  # one record's bytes at most
        if size <= 0:
            self._see_why(size)
            return b""
        while _lib.BIO_get_mem_data(self._in, _room.where):  # more records, or a part of one
            if size == _BUFFER_SIZE:
                self.more = True
                break
            got = _lib.SSL_read(self._ssl, buffer + size, _BUFFER_SIZE - size)
            if got <= 0:
                self._see_why(got)
                break
            size += got
        if size == _BUFFER_SIZE and not self.more:  # a record may have been cut by the end of the room
            self.more = _lib.SSL_pending(self._ssl) > 0
        return bytes(_ffi.unpack(buffer, size))

    def _see_why(self, result: int) -> None:
        """Nothing was read: more is needed, it is the end, or it broke."""
        error = _lib.SSL_get_error(self._ssl, result)
        if error == _lib.SSL_ERROR_ZERO_RETURN:
            self.at_eof = True
        elif error != _lib.SSL_ERROR_WANT_READ:  # broken is not ended: the stream may have been cut
            raise TlsBroken(self._failure(result))

    def write(self, plain: bytes) -> None:
        """Encrypt; `take` has the records. Raises TlsBroken."""
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
    alpn: bytes = b""  # the protocol that was agreed on; b'' without


@dataclass(frozen=True, slots=True)
class Accepted:
    """The client proved who it is, or need not: `peer` is None only where no certificate is required."""

    peer: VerifiedPeer | None
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
        if not terms.bundle.anchors and settings.client_auth is not ClientAuth.OFF:
            raise InvalidInput(Reason.GUARD_NO_BUNDLE)
        self.terms = terms
        self.settings = settings
        self.credential = credential
        self._judge = Judge(terms.bundle)
        self._known: OrderedDict[bytes, VerifiedPeer] = OrderedDict()  # by `_digest`: what was shown may be large
        self._context = _context(credential, terms, settings)
        _prove(self)

    def accept(self, clock: Callable[[], datetime]) -> ServerHandshake:
        """Begin one handshake. `clock` gives the instant at which the chain is judged."""
        return ServerHandshake(SSL.Connection(self._context, None), self, clock)

    def admit(self, ders: tuple[bytes, ...], now: datetime) -> VerifiedPeer:
        """Return who the chain, as presented in DER, leaf first, proves its holder to be.

        Raises VerificationFailed. A chain accepted before under these terms would be accepted again, but for the
        time and for revocation, which are looked at each time.
        """
        digest = _digest(ders)
        known = self._known.get(digest)
        if known is not None:
            if still_trusted(known, self.terms, now) is None:
                return known
            del self._known[digest]
        chain = _parse(ders)
        judgement = self._judge(chain) if 0 < len(chain) <= MAX_CHAIN else None
        peer = verify(chain, self.terms, now, judgement)
        self._known[digest] = peer
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return peer


class ServerHandshake:
    """A handshake under way: feed it records, send what `take` returns, until `feed` returns an outcome."""

    __slots__ = ("_clock", "_connection", "_context", "_failures", "_path", "_peer", "bug")

    def __init__(self, connection: SSL.Connection, context: ServerContext, clock: Callable[[], datetime]) -> None:
        self._connection = connection
        self._context = context
        self._clock = clock
        # What was judged within the handshake, where it is judged there.
        self._path: tuple[x509.Certificate, ...] = ()  # as far as OpenSSL could follow it
        self._failures: tuple[Failure, ...] = ()
        self._peer: VerifiedPeer | None = None
        self.bug: Exception | None = None  # what OpenSSL's call of us raised
        connection.set_app_data(self)
        connection.set_accept_state()

    def feed(self, records: bytes) -> Accepted | Refused | None:
        """Go on with what the network brought; None while more is needed. Raises what is a bug of ours."""
        self._connection.bio_write(records)
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return None
        except SSL.Error as error:
            if self.bug is not None:
                raise self.bug from None
            failures = self._failures or (handshake_failure(error),)
            return Refused(failures, self._path, None)
        return self._finished()

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return _take(self._connection._from_ssl)

    def on_certificate(self, store_context: Any, ok: int) -> int:
        """OpenSSL looked at a certificate of the path; 1 lets it go on, 0 ends the handshake."""
        if self._context.settings.answer_refusals:
            return 1  # judged once the client has proved that it holds the key
        error = _lib.X509_STORE_CTX_get_error(store_context)
        depth = _lib.X509_STORE_CTX_get_error_depth(store_context)
        if ok and depth:
            return 1  # the leaf comes last
        self._path = _parse(_ders_of(_lib.X509_STORE_CTX_get1_chain(store_context), owned=True))
        judgement = Judgement(self._path) if ok else Judgement((), path_detail(error, depth))
        try:
            self._peer = verify(self._path, self._context.terms, self._clock(), judgement)
        except VerificationFailed as refused:
            self._failures = refused.failures
            if ok:  # OpenSSL had nothing against it: choose the alert
                _lib.X509_STORE_CTX_set_error(store_context, alert_error(refused.failures[0].reason))
            return 0
        return int(ok)

    def _finished(self) -> Accepted | Refused:
        connection, channel, settings = self._connection, Channel(self._connection), self._context.settings
        facts = Facts(
            server_name=(connection.get_servername() or b"").decode("ascii", "replace"),
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            group=connection.get_group_name() or "",
            alpn=connection.get_alpn_proto_negotiated() if settings.alpn else b"",
        )
        if settings.client_auth is ClientAuth.OFF:
            return Accepted(None, channel, facts)
        if self._peer is not None:
            count = 1 + _count(_lib.SSL_get_peer_cert_chain(connection._ssl))
            if count > MAX_CHAIN:  # OpenSSL follows a path among them, however many there are
                failure = Failure(Reason.VERIFY_CHAIN_TOO_LONG, {"count": count, "limit": MAX_CHAIN})
                return Refused((failure,), self._path, channel, facts)
            return Accepted(self._peer, channel, facts)
        presented = _presented(connection._ssl)
        if not presented and settings.client_auth is ClientAuth.OPTIONAL:
            return Accepted(None, channel, facts)
        try:
            return Accepted(self._context.admit(presented, self._clock()), channel, facts)
        except VerificationFailed as refused:
            return Refused(refused.failures, _parse(presented), channel, facts)


def _context(credential: Credential, terms: Terms, settings: ServerSettings) -> SSL.Context:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION if settings.allow_tls12 else SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_tls13_ciphersuites(_SUITES)
    write_whole(context)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # an idle connection keeps no record buffers
    if settings.allow_tls12:
        context.set_cipher_list(b"ECDHE+AESGCM:ECDHE+CHACHA20")
    if settings.alpn:
        context.set_alpn_select_callback(_choose(settings.alpn))
    credential.configure(context)
    if settings.client_auth is ClientAuth.OFF:
        return context
    store = context.get_cert_store()
    assert store is not None
    for anchor in terms.bundle.anchors:
        if not settings.answer_refusals:  # else the chain is judged later, and a store would only have it judged twice
            store.add_cert(X509.from_cryptography(anchor))
        if settings.offer_authorities:
            context.add_client_ca(anchor)
    # The anchors are what the operator chose, each an authority; one need not be self-signed to be trusted.
    store.set_flags(X509StoreFlags.PARTIAL_CHAIN)
    context.set_verify_depth(MAX_CHAIN)
    told = settings.answer_refusals or settings.client_auth is ClientAuth.OPTIONAL
    mode = SSL.VERIFY_PEER | (0 if told else SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_verify(mode)
    _lib.SSL_CTX_set_verify(context._context, mode, _on_certificate)
    return context


@_ffi.callback("int (*)(int, X509_STORE_CTX *)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _on_certificate(ok: int, store_context: Any) -> int:
    """Called for each certificate of a path. Fails closed: an exception fails the handshake (CVE-2026-27448)."""
    ssl = _lib.X509_STORE_CTX_get_ex_data(store_context, _lib.SSL_get_ex_data_X509_STORE_CTX_idx())
    handshake = SSL.Connection._reverse_mapping[ssl].get_app_data()
    try:
        return handshake.on_certificate(store_context, ok) if isinstance(handshake, ServerHandshake) else 0
    except Exception as bug:
        handshake.bug = bug
        return 0


def _choose(spoken: tuple[bytes, ...]) -> Callable[[SSL.Connection, list[bytes]], bytes]:
    """What chooses the application protocol: the first of ours that the client names. None of them: no handshake."""

    def choose(_connection: SSL.Connection, named: list[bytes]) -> bytes:
        for protocol in spoken:
            if protocol in named:
                return protocol
        # Raised here it becomes the alert (RFC 7301 3.2), and comes out of `do_handshake` as an error of OpenSSL's own.
        raise SSL.Error([("SSL routines", "", "no application protocol")])

    return choose


def _presented(ssl: Any) -> tuple[bytes, ...]:
    """What the client showed, in DER, leaf first; () for nothing."""
    leaf = _lib.SSL_get_peer_certificate(ssl)
    if leaf == _ffi.NULL:
        return ()
    try:
        first = _der(leaf)
    finally:
        _lib.X509_free(leaf)
    return (first, *(der for der in _ders_of(_lib.SSL_get_peer_cert_chain(ssl)) if der != first))


def _ders_of(stack: Any, *, owned: bool = False) -> tuple[bytes, ...]:
    """The certificates of a STACK_OF(X509), which is freed if it is `owned`."""
    if stack == _ffi.NULL:
        return ()
    certificates = [_lib.sk_X509_value(stack, at) for at in range(_lib.sk_X509_num(stack))]
    ders = tuple(map(_der, certificates))
    if owned:
        for certificate in certificates:
            _lib.X509_free(certificate)
        _lib.sk_X509_free(stack)
    return ders


def _digest(ders: Iterable[bytes]) -> bytes:
    """What tells a list of certificates from every other."""
    return hashlib.sha256(b"".join([len(der).to_bytes(4, "big") + der for der in ders])).digest()


def _count(stack: Any) -> int:
    return 0 if stack == _ffi.NULL else int(_lib.sk_X509_num(stack))


def _der(certificate: Any) -> bytes:
    bio = _lib.BIO_new(_lib.BIO_s_mem())
    try:
        _lib.i2d_X509_bio(bio, certificate)
        return _take(bio)
    finally:
        _lib.BIO_free(bio)


def _parse(ders: Iterable[bytes]) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(map(x509.load_der_x509_certificate, ders))
    except ValueError:  # OpenSSL could read it and `cryptography` cannot: judged as not presented
        return ()


def _take(bio: Any) -> bytes:
    buffer = _room.buffer
    got = _lib.BIO_read(bio, buffer, _BUFFER_SIZE)
    if got < _BUFFER_SIZE:
        return bytes(_ffi.unpack(buffer, got)) if got > 0 else b""
    pieces = []
    while got > 0:
        pieces.append(bytes(_ffi.unpack(buffer, got)))
        got = _lib.BIO_read(bio, buffer, _BUFFER_SIZE)
    return b"".join(pieces)


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
            if isinstance(outcome, Accepted):
                if context.settings.client_auth is not ClientAuth.REQUIRED:
                    return
            elif outcome.failures[0].reason is Reason.VERIFY_NO_CERTIFICATE:
                return
            break
        client.bio_write(server.take())
    raise InvalidInput(Reason.TLS_HANDSHAKE, detail="the new certificate and key do not complete a handshake")
