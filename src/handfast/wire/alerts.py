"""TLS alerts: what each number is called, what it means, and what most likely went wrong.

Owns the words of the table (RFC 8446 6, RFC 5246 7.2). Never decides which alert is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Row:
    """One alert: its number, what the side that sent it says, and the usual cause under mutual TLS."""

    number: int
    meaning: str
    cause: str


class Alert(Enum):
    """Every alert of IANA's TLS Alerts registry that TLS, not DTLS, uses; the value is its row."""

    CLOSE_NOTIFY = Row(0, "nothing more will be sent; this is a normal end", "nothing")
    UNEXPECTED_MESSAGE = Row(
        10, "a message came that does not belong here", "the two sides do not speak the same protocol, or one has a bug"
    )
    BAD_RECORD_MAC = Row(20, "a record did not decrypt", "something between the two sides changed the bytes")
    DECRYPTION_FAILED = Row(21, "a record did not decrypt (TLS 1.0 and older)", "a very old TLS on the other side")
    RECORD_OVERFLOW = Row(22, "a record was too long", "something that is not TLS answered, or a bug")
    DECOMPRESSION_FAILURE = Row(30, "compressed data did not unpack", "a very old TLS on the other side")
    HANDSHAKE_FAILURE = Row(
        40,
        "there is no set of parameters that both sides accept",
        "in TLS 1.2, no client certificate was presented; else no cipher or signature algorithm is shared",
    )
    NO_CERTIFICATE = Row(41, "no certificate was presented (SSL 3.0)", "a very old TLS on the other side")
    BAD_CERTIFICATE = Row(
        42,
        "the certificate is malformed or its signature is wrong; SSL 3 has no part in it, whatever the text says",
        "the certificate is not yet valid (compare the clocks), is damaged, or was refused for a name in it",
    )
    UNSUPPORTED_CERTIFICATE = Row(
        43,
        "the certificate is of a kind that is not accepted here",
        "a server's certificate was presented by a client, or the other way round: look at its extended key usage",
    )
    CERTIFICATE_REVOKED = Row(
        44, "the certificate was revoked", "it was revoked on purpose, or by mistake: issue a new one"
    )
    CERTIFICATE_EXPIRED = Row(
        45, "the certificate has expired", "it was not renewed, or the program still holds the old one in memory"
    )
    CERTIFICATE_UNKNOWN = Row(
        46,
        "the certificate was refused for a reason that has no alert of its own",
        "its issuer may not issue for its name (name constraints); the other side's log says more",
    )
    ILLEGAL_PARAMETER = Row(
        47, "a field of the handshake is out of range", "a bug, or something rewrites the handshake"
    )
    UNKNOWN_CA = Row(
        48,
        "the certificate's issuer is not in the trust bundle",
        "the certificate is of another authority, an intermediate was not sent along,"
        " or the other side has no revocation list for the issuer",
    )
    ACCESS_DENIED = Row(
        49, "the certificate is valid, but may not come in", "no rule allows the name in the certificate"
    )
    DECODE_ERROR = Row(50, "a message could not be read", "something that is not TLS answered, or a bug")
    DECRYPT_ERROR = Row(
        51,
        "a signature or Finished message of the handshake did not verify",
        "the private key does not belong to the certificate",
    )
    EXPORT_RESTRICTION = Row(60, "export rules were broken (TLS 1.0)", "a very old TLS on the other side")
    PROTOCOL_VERSION = Row(
        70, "no TLS version that is offered is accepted", "one side speaks only TLS 1.2 and the other asks for 1.3"
    )
    INSUFFICIENT_SECURITY = Row(
        71, "only stronger ciphers are accepted", "an old client, or one configured for old ones"
    )
    INTERNAL_ERROR = Row(
        80, "the other side failed in itself", "its certificate and key may not match; its log says more"
    )
    INAPPROPRIATE_FALLBACK = Row(
        86, "the client came back with an older version than both sides know", "a first handshake broke on the way"
    )
    USER_CANCELED = Row(90, "the handshake was called off", "a person or program gave up")
    NO_RENEGOTIATION = Row(
        100,
        "a second handshake was refused",
        "the server asks for a certificate late; ask for it in the first handshake",
    )
    MISSING_EXTENSION = Row(109, "an extension that must be there is not", "an odd client, such as a scanner")
    UNSUPPORTED_EXTENSION = Row(110, "an extension came that nobody asked for", "a bug on the side that sent it")
    CERTIFICATE_UNOBTAINABLE = Row(
        111, "a certificate could not be fetched from its URL", "client certificate URLs, which nobody uses"
    )
    UNRECOGNIZED_NAME = Row(
        112, "the server has no site by the name that was asked for", "the client asked for the wrong host name (SNI)"
    )
    BAD_CERTIFICATE_STATUS_RESPONSE = Row(
        113, "the stapled OCSP answer is not good", "the server's stapled answer is stale or of another certificate"
    )
    BAD_CERTIFICATE_HASH_VALUE = Row(
        114, "a certificate does not have the hash that was announced", "client certificate URLs, which nobody uses"
    )
    UNKNOWN_PSK_IDENTITY = Row(
        115, "no such pre-shared key is known", "the client came with a key or ticket of another server"
    )
    CERTIFICATE_REQUIRED = Row(
        116,
        "a client certificate is asked for and none was presented",
        "the client was given no certificate, or has none of an authority that the server named",
    )
    GENERAL_ERROR = Row(117, "the handshake failed for a reason that is not said", "the other side's log says more")
    NO_APPLICATION_PROTOCOL = Row(
        120, "none of the application protocols that are offered is spoken", "the client offers only h2, or none (ALPN)"
    )
    ECH_REQUIRED = Row(
        121, "an encrypted ClientHello is asked for", "the client's copy of the server's ECH keys is out of date"
    )

    @property
    def number(self) -> int:
        """The number on the wire."""
        return self.value.number

    @property
    def wire_name(self) -> str:
        """The name in the RFCs, as `bad_certificate`."""
        return self.name.lower()

    @property
    def meaning(self) -> str:
        """What the side that sent it says."""
        return self.value.meaning

    @property
    def cause(self) -> str:
        """What a user of mutual TLS most likely did wrong."""
        return self.value.cause


_BY_NUMBER = {alert.number: alert for alert in Alert}


def alert_of(number: int) -> Alert | None:
    """Return the alert with that number, or None when there is none. Raises nothing."""
    return _BY_NUMBER.get(number)


def alert_name(number: int) -> str:
    """Return the alert's name in the RFCs, or `alert N` for a number without one. Raises nothing."""
    alert = _BY_NUMBER.get(number)
    return f"alert {number}" if alert is None else alert.wire_name


def alert_record(alert: Alert) -> bytes:
    """Return a fatal alert as a plain record (RFC 8446 5.1, 6), for a handshake that was not begun."""
    return bytes((21, 3, 3, 0, 2, 2, alert.value.number))
