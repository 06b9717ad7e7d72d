"""The client's side of a handshake, over memory: to look at a server, and to call one that proves who it is.

`ClientHandshake` verifies nothing and is for looking. `ClientContext` is for calling: the server is judged while the
handshake runs, before our certificate is shown to it, and there is no channel to one that was not accepted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509, X509StoreFlags

from handfast.errors import Failure, InvalidInput, Reason, VerificationFailed
from handfast.pki.names import Kind, Pattern
from handfast.pki.verification import MAX_CHAIN, Judgement, Terms, VerifiedPeer, verify
from handfast.tls.credential import Credential
from handfast.tls.reasons import alert_error, handshake_failure, path_detail
from handfast.tls.server import Channel, TlsBroken, _ders_of, _ffi, _lib, _parse, write_whole


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server showed in its handshake; nothing in it is verified."""

    chain: tuple[x509.Certificate, ...]
    version: str
    cipher: str
    group: str
    accepted_authorities: tuple[str, ...]  # distinguished names in its CertificateRequest


class ClientHandshake:
    """A handshake that verifies nothing, so that the server can be looked at; the caller judges `facts.chain`."""

    def __init__(self, server_name: str | None, credential: Credential | None = None) -> None:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_verify(SSL.VERIFY_NONE)
        write_whole(context)
        if credential is not None:
            credential.configure(context)
        self._connection = _connection(context, server_name)

    def feed(self, records: bytes) -> Channel | None:
        """Go on with what the network brought (b'' to begin); None while more is needed. Raises TlsBroken."""
        if records:
            self._connection.bio_write(records)
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return None
        except SSL.Error as error:
            raise TlsBroken(handshake_failure(error)) from None
        return Channel(self._connection)

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return _take(self._connection)

    @property
    def facts(self) -> ServerFacts:
        """What the server showed, once `feed` has returned a channel."""
        return _facts(self._connection)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How a server is called.

    `server_name`: the SNI, a DNS name; None sends none, as for an address (RFC 6066 3).
    `expect`: which identity the server must have, instead of, or on top of, the name in the terms.
    `alpn`: the application protocols that are offered, best first.
    """

    server_name: str | None = None
    expect: Pattern | None = None
    allow_tls12: bool = False
    alpn: tuple[bytes, ...] = ()


class ClientContext:
    """One generation of what a caller shows and whom it trusts; never changed once made.

    Raises InvalidInput where the credential does not serve, there is no authority to trust, or nothing says which
    server is meant: a chain alone would let any holder of a certificate pass for it.
    """

    def __init__(self, credential: Credential | None, terms: Terms, settings: ClientSettings) -> None:
        if not terms.bundle.anchors:
            raise InvalidInput(Reason.INPUT_EMPTY, what="the bundle of authorities to trust servers by")
        if terms.name is None and settings.expect is None:
            raise InvalidInput(Reason.INPUT_NAME, value="", detail="the server to expect has no name")
        self.credential = credential
        self.terms = terms
        self.settings = settings
        self._context = _verifying_context(credential, terms, settings)

    def connect(self, clock: Callable[[], datetime]) -> VerifyingHandshake:
        """Begin one handshake. `clock` gives the instant at which the server's chain is judged."""
        return VerifyingHandshake(_connection(self._context, self.settings.server_name), self, clock)

    def judge(self, path: tuple[x509.Certificate, ...], judgement: Judgement, now: datetime) -> VerifiedPeer:
        """Return who the server is. Raises VerificationFailed."""
        peer = verify(path, self.terms, now, judgement)
        expect = self.settings.expect
        if expect is not None and not any(expect.matches(name) for name in peer.names):
            shown = [str(name) for name in peer.names if name.kind is not Kind.SHA256]
            facts = {"names": ", ".join(shown[:10]), "name": str(expect)}
            raise VerificationFailed((Failure(Reason.VERIFY_NAME_MISMATCH, facts),))
        return peer


class VerifyingHandshake:
    """A handshake under way with a server that has to prove who it is.

    The server is judged where OpenSSL has followed its path to the leaf, or can follow it no further. A no ends the
    handshake before our certificate goes out. A handshake that ends without a yes gives no channel, whatever
    OpenSSL thinks of it.
    """

    __slots__ = ("_clock", "_connection", "_context", "_refused", "peer")

    def __init__(self, connection: SSL.Connection, context: ClientContext, clock: Callable[[], datetime]) -> None:
        self.peer: VerifiedPeer | None = None
        self._connection = connection
        self._context = context
        self._clock = clock
        self._refused: VerificationFailed | None = None
        connection.set_app_data(self)

    def feed(self, records: bytes) -> Channel | None:
        """Go on with what the network brought (b'' to begin); None while more is needed.

        Raises VerificationFailed where the server is not whom it should be, and TlsBroken where TLS fails;
        `take` may then have an alert to send.
        """
        if records:
            self._connection.bio_write(records)
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return None
        except SSL.Error as error:
            if self._refused is not None:
                raise self._refused from None
            raise TlsBroken(handshake_failure(error)) from None
        if self.peer is None:
            raise self._refused or VerificationFailed((Failure(Reason.VERIFY_JUDGE, {"detail": "it was not judged"}),))
        return Channel(self._connection)

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return _take(self._connection)

    def on_certificate(self, store_context: Any, ok: int) -> int:
        """OpenSSL looked at a certificate of the path; 1 lets it go on, 0 ends the handshake."""
        error = _lib.X509_STORE_CTX_get_error(store_context)
        depth = _lib.X509_STORE_CTX_get_error_depth(store_context)
        if ok and depth:
            return 1  # the leaf comes last
        path = _parse(_ders_of(_lib.X509_STORE_CTX_get1_chain(store_context), owned=True))
        judgement = Judgement(path) if ok else Judgement((), path_detail(error, depth))
        try:
            self.peer = self._context.judge(path, judgement, self._clock())
        except VerificationFailed as refused:
            self._refused = refused
            if ok:  # OpenSSL had nothing against it: choose the alert
                _lib.X509_STORE_CTX_set_error(store_context, alert_error(refused.failures[0].reason))
            return 0
        return int(ok)

    @property
    def facts(self) -> ServerFacts:
        """What the server showed, once `feed` has returned a channel."""
        return _facts(self._connection)


def server_name_of(host: str) -> str | None:
    """The SNI for a host: itself, or None for an address (RFC 6066 3)."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.rstrip(".").lower()
    return None


def _verifying_context(credential: Credential | None, terms: Terms, settings: ClientSettings) -> SSL.Context:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION if settings.allow_tls12 else SSL.TLS1_3_VERSION)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # an idle connection keeps no record buffers
    write_whole(context)
    if settings.allow_tls12:
        context.set_cipher_list(b"ECDHE+AESGCM:ECDHE+CHACHA20")
    if settings.alpn:
        context.set_alpn_protos(list(settings.alpn))
    if credential is not None:
        credential.configure(context)
    store = context.get_cert_store()
    assert store is not None
    for anchor in terms.bundle.anchors:
        store.add_cert(X509.from_cryptography(anchor))
    # The anchors are what the operator chose, each an authority; one need not be self-signed to be trusted.
    store.set_flags(X509StoreFlags.PARTIAL_CHAIN)
    context.set_verify_depth(MAX_CHAIN)
    context.set_verify(SSL.VERIFY_PEER)
    _lib.SSL_CTX_set_verify(context._context, SSL.VERIFY_PEER, _on_certificate)
    return context


@_ffi.callback("int (*)(int, X509_STORE_CTX *)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _on_certificate(ok: int, store_context: Any) -> int:
    """Called for each certificate of a path. An exception here fails the handshake: cffi then returns `error`."""
    ssl = _lib.X509_STORE_CTX_get_ex_data(store_context, _lib.SSL_get_ex_data_X509_STORE_CTX_idx())
    handshake = SSL.Connection._reverse_mapping[ssl].get_app_data()
    return handshake.on_certificate(store_context, ok) if isinstance(handshake, VerifyingHandshake) else 0


def _connection(context: SSL.Context, server_name: str | None) -> SSL.Connection:
    connection = SSL.Connection(context, None)
    if server_name is not None:
        connection.set_tlsext_host_name(server_name.encode("idna"))
    connection.set_connect_state()
    return connection


def _take(connection: SSL.Connection) -> bytes:
    try:
        return connection.bio_read(1 << 16)
    except SSL.WantReadError:
        return b""


def _facts(connection: SSL.Connection) -> ServerFacts:
    return ServerFacts(
        chain=tuple(connection.get_peer_cert_chain(as_cryptography=True) or ()),
        version=connection.get_protocol_version_name(),
        cipher=connection.get_cipher_name() or "",
        group=connection.get_group_name() or "",
        accepted_authorities=tuple(
            name.rfc4514_string() for name in connection.get_client_ca_list(as_cryptography=True)
        ),
    )
