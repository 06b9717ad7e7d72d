"""Certificates: read from bytes, the names they carry, and how messages call them.

It trusts nothing it reads: every accessor is total over what `cryptography` can load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from handfast.errors import InvalidInput, Reason
from handfast.pki import der
from handfast.pki.names import Kind, Name, parse_san, printable

_PEM = re.compile(
    rb"-----BEGIN (?:TRUSTED |X509 )?CERTIFICATE-----.+?-----END (?:TRUSTED |X509 )?CERTIFICATE-----", re.S
)
_NO_NAMES = b"\x30\x00"  # an empty sequence
_SAN = ExtensionOID.SUBJECT_ALTERNATIVE_NAME.dotted_string

# What `cryptography` raises, from one accessor or another, for a certificate with something odd in it.
UNREADABLE = (
    *(ValueError, TypeError, UnsupportedAlgorithm),
    *(x509.UnsupportedGeneralNameType, x509.DuplicateExtension, x509.InvalidVersion),
)

# String types of a subject that can spell one text in several ways (X.520; RFC 5280 4.1.2.4 has retired them).
_RETIRED_STRINGS = {0x14: "TeletexString", 0x1C: "UniversalString", 0x1E: "BMPString"}


_USAGES = {
    ExtendedKeyUsageOID.SERVER_AUTH: "server",
    ExtendedKeyUsageOID.CLIENT_AUTH: "client",
    ExtendedKeyUsageOID.EMAIL_PROTECTION: "email",
    ExtendedKeyUsageOID.CODE_SIGNING: "code signing",
    ExtendedKeyUsageOID.TIME_STAMPING: "time stamping",
    ExtendedKeyUsageOID.OCSP_SIGNING: "OCSP signing",
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "any",
}


def parse_certificates(data: bytes, what: str) -> tuple[x509.Certificate, ...]:
    """Return the certificates in a PEM bundle, or the one in a DER file; at least one.

    `what` names the source in messages. Raises InvalidInput (INPUT_NOT_CERTIFICATE).
    """
    try:
        if b"-----BEGIN" in data:
            blocks = _PEM.findall(data)
            if not blocks:
                found = re.search(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----", data)
                raise _not_certificate(what, f"it holds a {found[1].decode().lower()}" if found else "it was cut short")
            if data.count(b"-----BEGIN CERTIFICATE-----") > len(blocks):
                raise _not_certificate(what, "it was cut short")
            return tuple(x509.load_pem_x509_certificate(block) for block in blocks)
        return (x509.load_der_x509_certificate(data),)
    except UNREADABLE as error:
        raise _not_certificate(what, str(error).split("\n")[0][:100]) from None


def encode_chain(certificates: Iterable[x509.Certificate]) -> bytes:
    """Return the certificates as PEM, one behind the other."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def certificate_names(certificate: x509.Certificate) -> tuple[Name, ...]:
    """Return the subject alternative names in their order; () where there is none.

    Raises InvalidInput (VERIFY_MALFORMED) where the extension's DER does not parse.
    """
    return _carried(certificate).names


def common_names(certificate: x509.Certificate) -> tuple[Name, ...]:
    """Return the subject's common names; one with control bytes or a retired string type is FORBIDDEN."""
    return _carried(certificate).common_names


def forbidden_names(certificate: x509.Certificate) -> tuple[Name, ...]:
    """Return what no certificate may carry, among its alternative names and all parts of its subject."""
    return _carried(certificate).forbidden


def label(certificate: x509.Certificate) -> str:
    """How messages call it: its first name, else its common name, else its serial. Always printable."""
    try:
        names = [*certificate_names(certificate), *common_names(certificate)]
        subject = "" if names else certificate.subject.rfc4514_string()
    except (InvalidInput, *UNREADABLE):
        names, subject = [], ""
    if names:
        return str(names[0])
    return subject if subject and printable(subject) else f"serial {serial_text(certificate.serial_number)}"


def serial_text(serial: int) -> str:
    """A serial number in hex, as openssl prints it."""
    text = f"{abs(serial):x}"
    return ("-" if serial < 0 else "") + ("0" * (len(text) % 2)) + text


def fingerprint(certificate: x509.Certificate) -> str:
    """The SHA-256 of the DER, in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


@lru_cache(512)
def public_key_der(certificate: x509.Certificate) -> bytes:
    """Its key (SubjectPublicKeyInfo), alike however it is encoded there; b"" where it cannot be read."""
    try:
        return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except UNREADABLE:
        return b""


@lru_cache(512)
def is_authority(certificate: x509.Certificate) -> bool:
    """Whether basicConstraints says cA (RFC 5280 4.2.1.9), or it is a self-signed X.509 v1 certificate.

    The v1 case is how a root was made before 1999, and how some tools still do.
    """
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return certificate.version is x509.Version.v1 and certificate.issuer == certificate.subject
    except UNREADABLE:
        return False


def extended_usages(certificate: x509.Certificate) -> tuple[x509.ObjectIdentifier, ...] | None:
    """What its extended key usage lists (RFC 5280 4.2.1.12); None without one. Raises what UNREADABLE lists."""
    try:
        return tuple(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return None


def usage_text(usage: x509.ObjectIdentifier) -> str:
    """How messages call an extended key usage: `client`, `server`, or its number."""
    return _USAGES.get(usage, usage.dotted_string)


@dataclass(frozen=True, slots=True)
class _Carried:
    """All that a certificate says its holder is called."""

    names: tuple[Name, ...]
    common_names: tuple[Name, ...]
    forbidden: tuple[Name, ...]


@lru_cache(512)  # a peer that calls again shows the same certificate; reading it anew takes longer than verifying it
def _carried(certificate: x509.Certificate) -> _Carried:
    names, subject = parse_san(_san(certificate)), _subject(certificate)
    return _Carried(
        names,
        tuple(name for oid, name in subject if oid == NameOID.COMMON_NAME.dotted_string),
        tuple(name for name in (*names, *(part for _, part in subject)) if name.kind is Kind.FORBIDDEN),
    )


def _san(certificate: x509.Certificate) -> bytes:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return extension.value.public_bytes()
    except x509.ExtensionNotFound:
        return _NO_NAMES
    except UNREADABLE:
        # `cryptography` cannot read one of the extensions; the names may still be readable.
        _, extensions = der.certificate_parts(certificate.public_bytes(Encoding.DER))
        return extensions[_SAN][1] if _SAN in extensions else _NO_NAMES


def _subject(certificate: x509.Certificate) -> list[tuple[str, Name]]:
    """(attribute OID, its text as a name of kind CN or FORBIDDEN) for each part of the subject."""
    try:
        if not certificate.subject:
            return []
    except UNREADABLE:
        pass  # text that is not what its type says: read below, as FORBIDDEN
    rdns, _ = der.certificate_parts(certificate.public_bytes(Encoding.DER))
    parts: list[tuple[str, Name]] = []
    for _, rdn in der.read_all(rdns):
        for _, attribute in der.read_all(rdn):
            (_, oid), (tag, value) = list(der.read_all(attribute))[:2]
            parts.append((der.dotted(oid), _subject_text(tag, value)))
    return parts


def _subject_text(tag: int, value: bytes) -> Name:
    if tag in _RETIRED_STRINGS:
        return Name(Kind.FORBIDDEN, f"{_RETIRED_STRINGS[tag]}:{value.hex()}")
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return Name(Kind.FORBIDDEN, f"cn:{value.hex()}")
    if not printable(text):
        return Name(Kind.FORBIDDEN, "cn:" + text.encode("unicode_escape").decode())
    return Name(Kind.CN, text)


def _not_certificate(what: str, detail: str) -> InvalidInput:
    return InvalidInput(Reason.INPUT_NOT_CERTIFICATE, what=what, detail=detail)
