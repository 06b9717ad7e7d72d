"""The client's side of a handshake, over memory: to look at a server, and to call one that proves who it is.

`ClientHandshake` verifies nothing and is for looking. `ClientContext` is for calling: the server is judged while the
handshake runs, before our certificate is shown to it, and there is no channel to one that was not accepted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from OpenSSL import SSL

from handfast.errors import Failure, InvalidInput, Reason, VerificationFailed
from handfast.pki.certificates import UNREADABLE
from handfast.pki.names import Kind, Pattern
from handfast.pki.verification import Terms, VerifiedPeer, verify
from handfast.tls.channel import Channel, TlsBroken
from handfast.tls.credential import Credential
from handfast.tls.engine import (
    new_context,
    parse,
    parse_shown,
    presented,
    renew_memory,
    step,
    take,
    write_whole,
)
from handfast.tls.judge import Judge, Judging, judge_within
from handfast.tls.reasons import handshake_failure


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server showed in its handshake; nothing in it is verified.

    `chain`: the certificates that can be read, leaf first; () where the leaf cannot. `unread`: how many that leaves
    out.
    """

    chain: tuple[x509.Certificate, ...]
    version: str
    cipher: str
    group: str
    accepted_authorities: tuple[str, ...]  # distinguished names in its CertificateRequest; `#` and DER if unreadable
    unread: int = 0


class ClientHandshake:
    """A handshake that verifies nothing, so that the server can be looked at; the caller judges `facts.chain`.

    `adjust` may change the context before it is used. Raises InvalidInput where the name cannot be sent.
    """

    def __init__(
        self,
        server_name: str | None,
        credential: Credential | None = None,
        adjust: Callable[[SSL.Context], None] | None = None,
    ) -> None:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_verify(SSL.VERIFY_NONE)
        write_whole(context)
        if credential is not None:
            credential.configure(context)
        if adjust is not None:
            adjust(context)
        self._connection = _connection(context, server_name)

    def feed(self, records: bytes) -> Channel | None:
        """Go on with what the network brought (b'' to begin); None while more is needed. Raises TlsBroken."""
        try:
            finished = step(self._connection, records)
        except SSL.Error as error:
            raise TlsBroken(handshake_failure(error)) from None
        return Channel(self._connection) if finished else None

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return take(self._connection)

    @property
    def facts(self) -> ServerFacts:
        """What the server showed, once `feed` has returned a channel."""
        return server_facts(self._connection)

    @property
    def protocol(self) -> bytes:
        """The application protocol that was settled; b'' if none was."""
        return self._connection.get_alpn_proto_negotiated()


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
        self._judge = Judge(terms.bundle)
        self._context = _verifying_context(credential, settings)

    def connect(self, clock: Callable[[], datetime]) -> VerifyingHandshake:
        """Begin one handshake. `clock` gives the instant at which the server's chain is judged."""
        return VerifyingHandshake(_connection(self._context, self.settings.server_name), self, clock)

    def judge(self, ders: tuple[bytes, ...], now: datetime) -> VerifiedPeer:
        """Return who the chain, in DER, leaf first, proves the server to be. Raises VerificationFailed."""
        chain = parse_shown(ders)
        peer = verify(chain, self.terms, now, self._judge(chain))
        expect = self.settings.expect
        if expect is not None and not any(expect.matches(name) for name in peer.names):
            shown = [str(name) for name in peer.names if name.kind is not Kind.SHA256]
            facts = {"names": ", ".join(shown[:10]), "name": str(expect)}
            raise VerificationFailed((Failure(Reason.VERIFY_NAME_MISMATCH, facts),))
        return peer


class VerifyingHandshake:
    """A handshake under way with a server that has to prove who it is.

    A server that is refused does not get to see our certificate. A handshake that ends without a yes gives no
    channel, whatever OpenSSL thinks of it.
    """

    __slots__ = ("_connection", "_judging")

    def __init__(self, connection: SSL.Connection, context: ClientContext, clock: Callable[[], datetime]) -> None:
        self._connection = connection
        self._judging = Judging(connection, lambda path: context.judge(path, clock()))

    def feed(self, records: bytes) -> Channel | None:
        """Go on with what the network brought (b'' to begin); None while more is needed.

        Raises VerificationFailed where the server is not whom it should be, and TlsBroken where TLS fails;
        `take` may then have an alert to send. Raises what is a bug of ours.
        """
        judging = self._judging
        try:
            finished = judging.step(self._connection, records)
        except SSL.Error as error:
            if judging.refused is not None:
                raise judging.refused from None
            raise TlsBroken(handshake_failure(error)) from None
        if not finished:
            return None
        if judging.peer is None:
            raise VerificationFailed((Failure(Reason.VERIFY_JUDGE, {"detail": "it was not judged"}),))
        renew_memory(self._connection)
        return Channel(self._connection)

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return take(self._connection)

    @property
    def peer(self) -> VerifiedPeer | None:
        """Who the server is; None until it is judged, and where it was refused."""
        return self._judging.peer

    @property
    def facts(self) -> ServerFacts:
        """What the server showed, once `feed` has returned a channel."""
        return server_facts(self._connection)


def server_facts(connection: SSL.Connection) -> ServerFacts:
    """What the server at the other end of a connection has shown so far. Raises nothing, whatever that is."""
    read = [parse((der,)) for der in presented(connection)]
    chain = tuple(certificate for found in read for certificate in found) if read and read[0] else ()
    return ServerFacts(
        chain=chain,
        version=connection.get_protocol_version_name(),
        cipher=connection.get_cipher_name() or "",
        group=connection.get_group_name() or "",
        accepted_authorities=tuple(
            f"#{der.hex()}" if name is None else name.rfc4514_string() for der, name in accepted_names(connection)
        ),
        unread=len(read) - len(chain),
    )


def accepted_names(connection: SSL.Connection) -> list[tuple[bytes, x509.Name | None]]:
    """The names in the server's CertificateRequest, in DER, and as names where they can be read."""
    return [(der, _read_name(der)) for der in (name.der() for name in connection.get_client_ca_list())]


def server_name_of(host: str) -> str | None:
    """The SNI for a host: itself, or None for an address (RFC 6066 3)."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.rstrip(".").lower()
    return None


def _verifying_context(credential: Credential | None, settings: ClientSettings) -> SSL.Context:
    context = new_context(SSL.TLS_CLIENT_METHOD, allow_tls12=settings.allow_tls12)
    if settings.alpn:
        context.set_alpn_protos(list(settings.alpn))
    if credential is not None:
        credential.configure(context)
    judge_within(context)
    return context


def _connection(context: SSL.Context, server_name: str | None) -> SSL.Connection:
    connection = SSL.Connection(context, None)
    if server_name is not None:
        try:
            connection.set_tlsext_host_name(server_name.encode("idna"))
        except UnicodeError:
            raise InvalidInput(Reason.INPUT_NAME, value=server_name, detail="it is no host") from None
    connection.set_connect_state()
    return connection


def _read_name(der: bytes) -> x509.Name | None:
    try:
        name = x509.Name.from_bytes(der)
        name.rfc4514_string()
    except UNREADABLE:
        return None
    return name
