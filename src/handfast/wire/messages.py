"""Handshake messages, read: what each of TLS 1.2's and 1.3's messages says (RFC 8446 4, RFC 5246 7.4).

A reader for eyes, not for decisions: total over any bytes, it shows what it could read and names what it could
not (`Unreadable`). It verifies nothing. Names of numbers come from `registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from handfast.wire import registry
from handfast.wire.alerts import alert_name
from handfast.wire.extensions import Extensions, Malformed, Reader, read_extensions, read_names, read_numbers
from handfast.wire.records import ContentType, Event

TLS_1_2, TLS_1_3 = 0x0303, 0x0304
MAX_CERTIFICATES = 100  # of one message that are read

# RFC 8446 4.1.3: the SHA-256 of "HelloRetryRequest", in the place of the random.
_RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


@dataclass(frozen=True, slots=True)
class ClientHello:
    """The client's offer."""

    legacy_version: int
    random: bytes
    session_id: bytes
    suites: tuple[int, ...]
    extensions: Extensions

    @property
    def server_name(self) -> str:
        """The host that is asked for (SNI); '' without."""
        return "".join(values_of(self, registry.SERVER_NAME)[:1])

    @property
    def protocols(self) -> tuple[str, ...]:
        """The application protocols on offer (ALPN)."""
        return values_of(self, registry.ALPN)

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions on offer."""
        return values_of(self, registry.SUPPORTED_VERSIONS) or (
            registry.name_of(registry.VERSIONS, self.legacy_version),
        )


@dataclass(frozen=True, slots=True)
class ServerHello:
    """The server's choice; with `retry` a HelloRetryRequest, which has its form."""

    legacy_version: int
    random: bytes
    session_id: bytes
    suite: int
    extensions: Extensions

    @property
    def retry(self) -> bool:
        """Whether it asks for another ClientHello."""
        return self.random == _RETRY

    @property
    def version(self) -> int:
        """The version that was chosen, as 0x0304."""
        for extension in self.extensions:
            if extension.number == registry.SUPPORTED_VERSIONS and len(extension.data) == 2:
                return int.from_bytes(extension.data, "big")
        return self.legacy_version


@dataclass(frozen=True, slots=True)
class EncryptedExtensions:
    """The server's answers that need no eavesdropper (RFC 8446 4.3.1)."""

    extensions: Extensions


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """The server asks for a client certificate. `authorities`: the names it accepts, DER; () means any."""

    context: bytes
    types: tuple[int, ...]  # TLS 1.2 alone
    schemes: tuple[int, ...]
    authorities: tuple[bytes, ...]
    extensions: Extensions = ()


@dataclass(frozen=True, slots=True)
class CertificateEntry:
    """One certificate of a chain, in DER, and what was said with it."""

    der: bytes
    extensions: Extensions = ()


@dataclass(frozen=True, slots=True)
class Certificate:
    """A chain, leaf first; () where a client has none to show."""

    context: bytes
    entries: tuple[CertificateEntry, ...]


@dataclass(frozen=True, slots=True)
class ServerKeyExchange:
    """TLS 1.2: the server's half of the key agreement, signed with the certificate's key."""

    group: int | None  # None: finite-field Diffie-Hellman
    scheme: int | None
    size: int


@dataclass(frozen=True, slots=True)
class ClientKeyExchange:
    """TLS 1.2: the client's half of the key agreement or, with RSA key transport, the encrypted premaster secret."""

    size: int


@dataclass(frozen=True, slots=True)
class CertificateVerify:
    """A signature over the handshake so far: proof that its sender holds the certificate's key."""

    scheme: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """A checksum, under the new keys, of all that was said."""

    verify_data: bytes


@dataclass(frozen=True, slots=True)
class NewSessionTicket:
    """A ticket to resume with. `lifetime` in seconds."""

    lifetime: int
    size: int
    extensions: Extensions = ()


@dataclass(frozen=True, slots=True)
class KeyUpdate:
    """TLS 1.3: fresh traffic keys from here on."""

    requested: bool


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """TLS 1.2: a stapled OCSP answer."""

    size: int


@dataclass(frozen=True, slots=True)
class CompressedCertificate:
    """RFC 8879: a Certificate message, compressed; it is not unpacked here."""

    algorithm: int
    unpacked: int
    size: int


@dataclass(frozen=True, slots=True)
class Bare:
    """A message whose kind says it all, or one that is not known here: its name, and how long it is."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class ChangeCipherSpec:
    """TLS 1.2: encrypted from here on. TLS 1.3 sends it for old middleboxes' sake alone."""


@dataclass(frozen=True, slots=True)
class AlertMessage:
    """Why the connection ends, in one number."""

    level: int
    number: int

    @property
    def name(self) -> str:
        """Its name in the RFCs."""
        return alert_name(self.number)

    @property
    def fatal(self) -> bool:
        """Whether it ends the connection: in TLS 1.3 all but these two do, whatever their level (RFC 8446 6)."""
        return self.number not in (0, 90) and (self.level != 1 or self.number != 100)


@dataclass(frozen=True, slots=True)
class ApplicationData:
    """What TLS is for: `size` bytes of it."""

    size: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """A message that stayed encrypted: a handshake message or else an alert, as its record says (TLS 1.2)."""

    size: int
    handshake: bool


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that does not parse; `name` says what it claims to be."""

    name: str
    detail: str
    size: int


Message: TypeAlias = (
    ClientHello
    | ServerHello
    | EncryptedExtensions
    | CertificateRequest
    | Certificate
    | ServerKeyExchange
    | ClientKeyExchange
    | CertificateVerify
    | Finished
    | NewSessionTicket
    | KeyUpdate
    | CertificateStatus
    | CompressedCertificate
    | Bare
    | ChangeCipherSpec
    | AlertMessage
    | ApplicationData
    | Sealed
    | Unreadable
)


def values_of(message: ClientHello | ServerHello | EncryptedExtensions, number: int) -> tuple[str, ...]:
    """What the extension of that number says, in words; () where it is not there. Raises nothing."""
    for extension in message.extensions:
        if extension.number == number:
            return extension.values
    return ()


def read_events(events: tuple[Event, ...]) -> Iterator[tuple[Event, Message]]:
    """Yield each event with what it says, reading each in the version that was settled before it. Raises nothing."""
    version, suite = TLS_1_2, 0
    for event in events:
        message: Message
        match event.kind:
            case ContentType.HANDSHAKE | ContentType.ALERT if event.encrypted and not event.data:
                message = Sealed(event.size, event.kind == ContentType.HANDSHAKE)
            case ContentType.HANDSHAKE:
                message = read_message(event.data, version, suite)
            case ContentType.ALERT if len(event.data) == 2:
                message = AlertMessage(event.data[0], event.data[1])
            case ContentType.CHANGE_CIPHER_SPEC if event.data == b"\x01":
                message = ChangeCipherSpec()
            case ContentType.APPLICATION_DATA:
                message = ApplicationData(event.size or len(event.data))
            case _:
                size = len(event.data) or event.size
                message = Unreadable(f"record of type {event.kind}", "it is encrypted, or no TLS", size)
        if isinstance(message, ServerHello):
            version, suite = message.version, message.suite
        yield event, message


def read_message(data: bytes, version: int = TLS_1_3, suite: int = 0) -> Message:
    """Return what one whole handshake message says; `data` has its four bytes of header. Raises nothing.

    `version` and `suite` are the ones that ServerHello settled: the forms of several messages hang on them.
    """
    if len(data) < 4:
        return Unreadable("message", "it is shorter than its header", len(data))
    kind = data[0]
    name = registry.MESSAGES.get(kind, f"message {kind}")
    if int.from_bytes(data[1:4], "big") != len(data) - 4:
        return Unreadable(name, "its length is not what its header says", len(data))
    parser = _parser(kind, version, suite)
    if parser is None:
        return Bare(name, len(data))
    reader = Reader(data[4:])
    try:
        message = parser(reader)
        reader.end()
    except Malformed as malformed:
        return Unreadable(name, str(malformed), len(data))
    return message


# How each is read.


def _parser(kind: int, version: int, suite: int) -> Callable[[Reader], Message] | None:
    new = version >= TLS_1_3
    match kind:
        case 1:
            return _client_hello
        case 2:
            return _server_hello
        case 4:
            return _ticket_13 if new else _ticket_12
        case 8:
            return lambda reader: EncryptedExtensions(read_extensions(reader, "encrypted"))
        case 11:
            return _certificate_13 if new else _certificate_12
        case 12:
            return partial(_server_key_exchange, suite=suite)
        case 13:
            return _request_13 if new else _request_12
        case 15:
            return lambda reader: CertificateVerify(reader.number(2), reader.vector(2))
        case 16:
            return lambda reader: ClientKeyExchange(len(reader.rest()))
        case 20:
            return lambda reader: Finished(reader.rest())
        case 22:
            return lambda reader: CertificateStatus(len(reader.rest()))
        case 24:
            return lambda reader: KeyUpdate(reader.number(1) == 1)
        case 25:
            return lambda reader: CompressedCertificate(reader.number(2), reader.number(3), len(reader.vector(3)))
        case _:
            return None


def _client_hello(reader: Reader) -> ClientHello:
    version, random, session = reader.number(2), reader.take(32), reader.vector(1)
    suites = read_numbers(reader.inside(2), 2)
    reader.vector(1)  # compression methods: since TLS 1.3 always one byte, 0
    return ClientHello(version, random, session, suites, read_extensions(reader, "client") if reader.left else ())


def _server_hello(reader: Reader) -> ServerHello:
    version, random, session = reader.number(2), reader.take(32), reader.vector(1)
    suite = reader.number(2)
    reader.number(1)
    where = "retry" if random == _RETRY else "server"
    return ServerHello(version, random, session, suite, read_extensions(reader, where) if reader.left else ())


def _request_13(reader: Reader) -> CertificateRequest:
    context, extensions = reader.vector(1), read_extensions(reader, "request")
    by_number = {extension.number: extension.data for extension in extensions}
    schemes = read_numbers(Reader(by_number.get(registry.SIGNATURE_ALGORITHMS, b"\0\0")).inside(2), 2)
    authorities = read_names(Reader(by_number.get(registry.CERTIFICATE_AUTHORITIES, b"\0\0")).inside(2))
    return CertificateRequest(context, (), schemes, authorities, extensions)


def _request_12(reader: Reader) -> CertificateRequest:
    types = read_numbers(reader.inside(1), 1)
    schemes = read_numbers(reader.inside(2), 2)
    return CertificateRequest(b"", types, schemes, read_names(reader.inside(2)))


def _certificate_13(reader: Reader) -> Certificate:
    context, entries = reader.vector(1), reader.inside(3)
    found = []
    while entries.left:
        found.append(CertificateEntry(entries.vector(3), read_extensions(entries, "certificate")))
        _check_count(found)
    return Certificate(context, tuple(found))


def _certificate_12(reader: Reader) -> Certificate:
    entries, found = reader.inside(3), list[CertificateEntry]()
    while entries.left:
        found.append(CertificateEntry(entries.vector(3)))
        _check_count(found)
    return Certificate(b"", tuple(found))


def _check_count(found: list[CertificateEntry]) -> None:
    if len(found) > MAX_CERTIFICATES:
        raise Malformed(f"it holds more than {MAX_CERTIFICATES} certificates")


def _server_key_exchange(reader: Reader, suite: int) -> ServerKeyExchange:
    size = reader.left
    if "_DHE_" in registry.SUITES.get(suite, ""):
        for _ in range(3):  # p, g, the public value
            reader.vector(2)
        group = None
    elif reader.number(1) != 3:  # RFC 8422 5.4: explicit curves are gone
        raise Malformed("it names no curve")
    else:
        group = reader.number(2)
        reader.vector(1)
    scheme = reader.number(2)
    reader.vector(2)
    return ServerKeyExchange(group, scheme, size)


def _ticket_13(reader: Reader) -> NewSessionTicket:
    lifetime = reader.number(4)
    reader.number(4)  # ticket_age_add
    reader.vector(1)  # ticket_nonce
    return NewSessionTicket(lifetime, len(reader.vector(2)), read_extensions(reader, "ticket"))


def _ticket_12(reader: Reader) -> NewSessionTicket:
    return NewSessionTicket(reader.number(4), len(reader.vector(2)))
