"""A client that looks for holes: it verifies nothing, offers what it is told, and reports how it was refused.

Over memory, like all handshakes here: the caller moves the records and so may keep, change or repeat them. It must
never be used to reach a server that is trusted for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from OpenSSL import SSL

from handfast.errors import Reason
from handfast.tls.client import ServerFacts, accepted_names, server_facts
from handfast.tls.engine import lib, step, take
from handfast.tls.reasons import handshake_failure

ProbeKey = (
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
    | dsa.DSAPrivateKey
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a probe brings. `presented`: DER certificates, leaf first, with their `key`.

    `tls12`: no newer version. `tickets`: TLS 1.2 tickets are asked for; without, a session is known by its id alone.
    The key must fit the leaf, or OpenSSL will not go on.
    """

    server_name: str | None
    presented: Sequence[bytes] | None = None
    key: ProbeKey | None = None
    tls12: bool = False
    alpn: tuple[str, ...] = ()
    session: Session | None = None
    tickets: bool = True


@dataclass(frozen=True, slots=True)
class Session:
    """What a finished connection left to be resumed.

    Whoever offers it brings what that connection brought: certificate, versions and protocols are its own.
    """

    _engine: SSL.Session
    _context: SSL.Context


class ProbeRefused(Exception):
    """The other side, or the engine, would not go on. `alert` is the alert's name in the RFCs, '' without one."""

    def __init__(self, detail: str, alert: str = "") -> None:
        self.alert = alert
        super().__init__(detail)


class Probe:
    """One connection as a client. `feed` what the network brought and send what `take` returns, until `done`."""

    def __init__(self, offer: Offer) -> None:
        # The engine resumes a session only in the context that it was made in.
        context = _context(offer) if offer.session is None else offer.session._context
        self._connection = SSL.Connection(context, None)
        if offer.server_name is not None:
            self._connection.set_tlsext_host_name(offer.server_name.encode("ascii"))
        if offer.session is not None:
            self._connection.set_session(offer.session._engine)
        self._connection.set_connect_state()
        self.done = False  # the handshake, as far as a client can tell: in TLS 1.3 it may yet be refused

    def feed(self, records: bytes) -> None:
        """Go on with the handshake (b'' to begin). Raises ProbeRefused."""
        if not self.done:
            self.done = self._step(records)
        elif records:
            self._connection.bio_write(records)

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return take(self._connection)

    def write(self, plain: bytes) -> None:
        """Encrypt; `take` has the records. Raises ProbeRefused."""
        try:
            while plain:
                plain = plain[self._connection.send(plain) :]
        except SSL.WantReadError:
            return
        except SSL.Error as error:
            raise _refused(error) from None

    def read(self) -> bytes | None:
        """Return the next plain bytes: b'' when more records are needed, None at the end. Raises ProbeRefused."""
        try:
            return self._connection.recv(1 << 16)
        except SSL.WantReadError:
            return b""
        except SSL.ZeroReturnError:
            return None
        except SSL.Error as error:
            raise _refused(error) from None

    def renegotiate(self) -> None:
        """Begin a new handshake on the same connection (TLS 1.2). `again` goes on with it. Raises ProbeRefused."""
        self._connection.renegotiate()
        self._step(b"")

    def again(self, records: bytes) -> None:
        """Go on with a renegotiation; `renegotiated` says whether it is done. Raises ProbeRefused."""
        self._step(records)

    @property
    def renegotiated(self) -> bool:
        """Whether a new handshake was asked for and is finished."""
        return self._connection.total_renegotiations() > 0 and not self._connection.renegotiate_pending()

    def _step(self, records: bytes) -> bool:
        try:
            return step(self._connection, records)
        except SSL.Error as error:
            raise _refused(error) from None

    def leave(self) -> Session | None:
        """End the connection in good order, and return what may be resumed; in TLS 1.3 once a ticket has been read.

        `take` has the records that say goodbye.
        """
        with suppress(SSL.Error):  # it has ended already
            self._connection.shutdown()
        # On both sides, OpenSSL spoils the session of a connection that is dropped without a close_notify.
        self._connection.set_shutdown(SSL.SENT_SHUTDOWN | SSL.RECEIVED_SHUTDOWN)
        engine = self._connection.get_session()
        return None if engine is None else Session(engine, self._connection.get_context())

    @property
    def resumed(self) -> bool:
        """Whether the server resumed the session that was offered."""
        return bool(lib.SSL_session_reused(self._connection._ssl))

    @property
    def facts(self) -> ServerFacts:
        """What the server has shown so far."""
        return server_facts(self._connection)

    @property
    def accepted_authorities(self) -> tuple[x509.Name, ...]:
        """The names in the server's CertificateRequest that can be read, as names."""
        return tuple(name for _, name in accepted_names(self._connection) if name is not None)

    @property
    def alpn(self) -> str:
        """The application protocol that was agreed on; '' without."""
        return self._connection.get_alpn_proto_negotiated().decode("ascii", "replace")


def _context(offer: Offer) -> SSL.Context:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    if offer.tls12:
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
    if not offer.tickets:
        context.set_options(SSL.OP_NO_TICKET)
    context.set_verify(SSL.VERIFY_NONE)
    # Level 0: weak certificates of ours shall be refused by the other side, not by our engine.
    context.set_cipher_list(b"ALL:@SECLEVEL=0")
    if offer.alpn:
        context.set_alpn_protos([protocol.encode("ascii") for protocol in offer.alpn])
    if offer.presented:
        if offer.key is None:
            raise ProbeRefused("a certificate without a key cannot be presented by this engine")
        try:
            context.use_certificate(x509.load_der_x509_certificate(offer.presented[0]))
            for certificate in offer.presented[1:]:
                context.add_extra_chain_cert(x509.load_der_x509_certificate(certificate))
            context.use_privatekey(offer.key)
        except (SSL.Error, ValueError, TypeError) as error:
            raise ProbeRefused(f"our engine does not take the certificate ({str(error)[:120]})") from None
    return context


def _refused(error: SSL.Error) -> ProbeRefused:
    failure = handshake_failure(error)
    if failure.reason is Reason.TLS_CLOSED:
        return ProbeRefused("the connection was cut")
    alert = str(failure.facts["alert"]) if failure.reason is Reason.TLS_ALERT else ""
    return ProbeRefused(f"the alert {alert}" if alert else failure.message, alert)
