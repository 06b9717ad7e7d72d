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
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from cryptography import x509
from OpenSSL import SSL

from handfast.errors import Failure, InvalidInput, Reason, VerificationFailed
from handfast.pki.verification import MAX_CHAIN, Terms, VerifiedPeer, still_trusted, verify
from handfast.tls.channel import Channel
from handfast.tls.credential import Credential
from handfast.tls.engine import (
    new_context,
    parse,
    parse_shown,
    presented,
    presented_count,
    renew_memory,
    step,
    take,
)
from handfast.tls.judge import Judge, Judging, judge_later, judge_within
from handfast.tls.reasons import handshake_failure

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
        chain = parse_shown(ders)
        peer = verify(chain, self.terms, now, self._judge(chain))
        self._known[digest] = peer
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return peer


class ServerHandshake:
    """A handshake under way: feed it records, send what `take` returns, until `feed` returns an outcome."""

    __slots__ = ("_clock", "_connection", "_context", "_judging")

    def __init__(self, connection: SSL.Connection, context: ServerContext, clock: Callable[[], datetime]) -> None:
        self._connection = connection
        self._context = context
        self._clock = clock
        # Of use only where the client is judged within the handshake.
        self._judging = Judging(connection, lambda path: context.admit(path, clock()))
        connection.set_accept_state()

    def feed(self, records: bytes) -> Accepted | Refused | None:
        """Go on with what the network brought; None while more is needed. Raises what is a bug of ours."""
        judging = self._judging
        try:
            finished = judging.step(self._connection, records)
        except SSL.Error as error:
            failures = (handshake_failure(error),) if judging.refused is None else judging.refused.failures
            return Refused(failures, parse(judging.path), None)
        return self._finished() if finished else None

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return take(self._connection)

    def _finished(self) -> Accepted | Refused:
        connection, settings = self._connection, self._context.settings
        renew_memory(connection)
        channel = Channel(connection)
        facts = Facts(
            server_name=(connection.get_servername() or b"").decode("ascii", "replace"),
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            group=connection.get_group_name() or "",
            alpn=connection.get_alpn_proto_negotiated() if settings.alpn else b"",
        )
        if settings.client_auth is ClientAuth.OFF:
            return Accepted(None, channel, facts)
        if self._judging.peer is not None:
            count = presented_count(connection)
            if count > MAX_CHAIN:  # OpenSSL follows a path among them, however many there are
                failure = Failure(Reason.VERIFY_CHAIN_TOO_LONG, {"count": count, "limit": MAX_CHAIN})
                return Refused((failure,), parse(self._judging.path), channel, facts)
            return Accepted(self._judging.peer, channel, facts)
        ders = presented(connection)
        if not ders and settings.client_auth is ClientAuth.OPTIONAL:
            return Accepted(None, channel, facts)
        try:
            return Accepted(self._context.admit(ders, self._clock()), channel, facts)
        except VerificationFailed as refused:
            return Refused(refused.failures, parse(ders), channel, facts)


def _context(credential: Credential, terms: Terms, settings: ServerSettings) -> SSL.Context:
    context = new_context(SSL.TLS_SERVER_METHOD, allow_tls12=settings.allow_tls12)
    context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE)
    context.set_tls13_ciphersuites(_SUITES)
    if settings.alpn:
        context.set_alpn_select_callback(_choose(settings.alpn))
    credential.configure(context)
    if settings.client_auth is ClientAuth.OFF:
        return context
    if settings.offer_authorities:
        for anchor in terms.bundle.anchors:
            context.add_client_ca(anchor)
    if settings.answer_refusals:
        judge_later(context)
    else:
        judge_within(context, optional=settings.client_auth is ClientAuth.OPTIONAL)
    return context


def _choose(spoken: tuple[bytes, ...]) -> Callable[[SSL.Connection, list[bytes]], bytes]:
    """What chooses the application protocol: the first of ours that the client names. None of them: no handshake."""

    def choose(_connection: SSL.Connection, named: list[bytes]) -> bytes:
        for protocol in spoken:
            if protocol in named:
                return protocol
        # Raised here it becomes the alert (RFC 7301 3.2), and comes out of `do_handshake` as an error of OpenSSL's own.
        raise SSL.Error([("SSL routines", "", "no application protocol")])

    return choose


def _digest(ders: Iterable[bytes]) -> bytes:
    """What tells a list of certificates from every other."""
    return hashlib.sha256(b"".join([len(der).to_bytes(4, "big") + der for der in ders])).digest()


def _prove(context: ServerContext) -> None:
    """Run a handshake in memory with a client that shows no certificate: it must get as far as being judged."""
    client_context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    client_context.set_verify(SSL.VERIFY_NONE)
    client = SSL.Connection(client_context, None)
    client.set_connect_state()
    server = context.accept(lambda: datetime.min.replace(tzinfo=UTC))  # there is no chain to judge
    records = b""
    for _ in range(4):
        try:
            step(client, records)
        except SSL.Error:
            break
        outcome = server.feed(take(client))
        if outcome is not None:
            if isinstance(outcome, Accepted):
                if context.settings.client_auth is not ClientAuth.REQUIRED:
                    return
            elif outcome.failures[0].reason is Reason.VERIFY_NO_CERTIFICATE:
                return
            break
        records = server.take()
    raise InvalidInput(Reason.TLS_HANDSHAKE, detail="the new certificate and key do not complete a handshake")
