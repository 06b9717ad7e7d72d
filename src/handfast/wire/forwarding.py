"""The headers that tell an app who called, in the styles that apps know: RFC 9440, ours, Envoy's, nginx's.

Owns the list of styles, and what each says of a verified peer. Values are printable ASCII whatever a certificate
holds, and nothing in a name can be taken for another field. It never decides who a peer is. What clients send under
these names is taken out of requests by `handfast.wire.identity`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.errors import InvalidInput, Reason
from handfast.pki import der
from handfast.pki.certificates import fingerprint, serial_text
from handfast.pki.names import Kind, Name
from handfast.pki.verification import VerifiedPeer
from handfast.wire.http1 import Header
from handfast.wire.identity import client_cert, client_cert_chain, client_identity


class HeaderStyle(StrEnum):
    """One way to tell an app who called."""

    CLIENT_CERT = "client-cert"  # Client-Cert: RFC 9440 2.2
    CLIENT_CERT_CHAIN = "client-cert-chain"  # Client-Cert-Chain: RFC 9440 2.3
    CLIENT_IDENTITY = "client-identity"  # Client-Identity: the one name that the peer goes by
    XFCC = "xfcc"  # X-Forwarded-Client-Cert of By, Hash, Subject, URI, DNS
    XFCC_CERT = "xfcc-cert"  # the same, with Cert and Chain
    X_SSL_CLIENT = "x-ssl-client"  # X-SSL-Client-Verify and more, with the values of nginx's $ssl_client_*
    ASSERTION = "assertion"  # Handfast-Assertion: wire.assertion signs it, with a key and a clock


DEFAULT_STYLES = (HeaderStyle.CLIENT_CERT, HeaderStyle.CLIENT_IDENTITY)


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What the headers say of a verified peer.

    `chain` holds the issuers' certificates, nearest first, without the leaf and without the trust anchor. `names`
    are the leaf's alternative names. `by` is the URI of the guard's own certificate, "" where it has none.
    """

    leaf: x509.Certificate
    identity: Name
    names: tuple[Name, ...] = ()
    chain: tuple[x509.Certificate, ...] = ()
    by: str = ""


def facts_of(peer: VerifiedPeer, by: str = "") -> PeerFacts:
    """Return the facts of a verified peer. `by` is the URI of the guard's own certificate, if it has one."""
    return PeerFacts(peer.leaf, peer.identity.name, peer.names, peer.path[1:-1], by)


def identity_headers(styles: Collection[HeaderStyle], peer: PeerFacts | None) -> tuple[Header, ...]:
    """Return the headers of the styles, in the order of `HeaderStyle`; for nobody, `X-SSL-Client-Verify: NONE` at most.

    They are the same for a connection's whole life: make them once. They take 2 KB and more where certificates are in
    them; many apps refuse more than 8 KB. Of XFCC and XFCC_CERT the second is taken. ASSERTION, which grows stale, is
    not among them. Raises InvalidInput (VERIFY_MALFORMED) where the leaf's names do not parse, which no verified
    peer's do.
    """
    if peer is None:
        return ((b"X-SSL-Client-Verify", b"NONE"),) if HeaderStyle.X_SSL_CLIENT in styles else ()
    headers: list[Header] = []
    if HeaderStyle.CLIENT_CERT in styles:
        headers.append((b"Client-Cert", client_cert(peer.leaf.public_bytes(Encoding.DER))))
    if HeaderStyle.CLIENT_CERT_CHAIN in styles and peer.chain:
        chain = client_cert_chain(certificate.public_bytes(Encoding.DER) for certificate in peer.chain)
        headers.append((b"Client-Cert-Chain", chain))
    if HeaderStyle.CLIENT_IDENTITY in styles:
        headers.append((b"Client-Identity", client_identity(peer.identity)))
    if HeaderStyle.XFCC in styles or HeaderStyle.XFCC_CERT in styles:
        value = forwarded_client_cert(peer, certificates=HeaderStyle.XFCC_CERT in styles)
        headers.append((b"X-Forwarded-Client-Cert", value))
    if HeaderStyle.X_SSL_CLIENT in styles:
        headers += _x_ssl_client(peer)
    return tuple(headers)


# What a value of XFCC holds without being taken for more than one, by the most careless of readers.
_PLAIN = re.compile(r"[!#-+\--:<-\[\]-~]*")


def forwarded_client_cert(peer: PeerFacts, *, certificates: bool) -> bytes:
    r"""Return the value of X-Forwarded-Client-Cert, as Envoy's SANITIZE_SET makes it: one element, this hop's.

    By, Hash, then with `certificates` Cert and Chain (leaf first), Subject, each URI and each DNS name. It differs from
    Envoy's in what a name could forge: in Subject, `\`, `"`, `,` and `;` inside a value are hex pairs (`\2C`: RFC 4514
    2.4), and a URI with one of these in it is left out. So it can be split at `;` without a look at quotes.
    """
    fields = [f"By={_quoted(peer.by)}"] if peer.by and _PLAIN.fullmatch(peer.by) else []
    fields.append(f"Hash={fingerprint(peer.leaf)}")
    if certificates:
        pems = [_url_pem(certificate) for certificate in (peer.leaf, *peer.chain)]
        fields += [f'Cert="{pems[0]}"', f'Chain="{"".join(pems)}"']
    fields.append(f'Subject="{_distinguished_name(_tbs_fields(peer.leaf)[_SUBJECT], _hex_pair)}"')
    uris = [name.value for name in peer.names if name.is_uri]
    fields += [f"URI={_quoted(uri)}" for uri in uris if _PLAIN.fullmatch(uri)]
    fields += [f"DNS={name.value}" for name in peer.names if name.kind is Kind.DNS]
    return ";".join(fields).encode("ascii")


def _quoted(uri: str) -> str:
    return f'"{uri}"' if "=" in uri else uri


def _x_ssl_client(peer: PeerFacts) -> list[Header]:
    """The values of nginx's $ssl_client_* (ngx_http_ssl_module), but for $ssl_client_v_remain, which grows stale."""
    leaf, fields = peer.leaf, _tbs_fields(peer.leaf)
    sha1 = hashlib.sha1(leaf.public_bytes(Encoding.DER), usedforsecurity=False).hexdigest()
    values = {
        "Verify": "SUCCESS",
        "S-DN": _distinguished_name(fields[_SUBJECT], _backslash),
        "I-DN": _distinguished_name(fields[_ISSUER], _backslash),
        "Serial": serial_text(leaf.serial_number).upper(),
        "Fingerprint": sha1,
        "V-Start": _openssl_time(leaf.not_valid_before_utc),
        "V-End": _openssl_time(leaf.not_valid_after_utc),
        "Cert": _url_pem(leaf),
    }
    return [(f"X-SSL-Client-{name}".encode("ascii"), value.encode("ascii")) for name, value in values.items()]


def _url_pem(certificate: x509.Certificate) -> str:
    """PEM with all but unreserved characters percent-encoded, as nginx's $ssl_client_escaped_cert and Envoy's Cert."""
    return quote(certificate.public_bytes(Encoding.PEM), safe="")


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def _openssl_time(instant: datetime) -> str:
    """As OpenSSL's ASN1_TIME_print, whatever the locale: `Nov  1 09:00:00 2026 GMT`."""
    return f"{_MONTHS[instant.month - 1]} {instant.day:2d} {instant:%H:%M:%S} {instant.year} GMT"


# Of a tbsCertificate without its version: serialNumber, signature, issuer, validity, subject (RFC 5280 4.1).
_ISSUER, _SUBJECT = 2, 4


def _tbs_fields(certificate: x509.Certificate) -> list[bytes]:
    """The contents of the fields, read from the bytes: the names as they were signed, whatever is in them."""
    fields = list(der.read_all(der.read_one(certificate.tbs_certificate_bytes)[1]))
    if fields and fields[0][0] == 0xA0:
        del fields[0]
    if len(fields) < 6:
        raise InvalidInput(Reason.VERIFY_MALFORMED, detail="a field is missing")
    return [contents for _, contents in fields]


# OpenSSL's short names, which RFC 2253 and 4514 have where they name a type. Other types are given in dots.
_TYPES = {
    "2.5.4.3": "CN",
    "2.5.4.4": "SN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "street",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.12": "title",
    "2.5.4.13": "description",
    "2.5.4.15": "businessCategory",
    "2.5.4.16": "postalAddress",
    "2.5.4.17": "postalCode",
    "2.5.4.41": "name",
    "2.5.4.20": "telephoneNumber",
    "2.5.4.42": "GN",
    "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier",
    "2.5.4.45": "x500UniqueIdentifier",
    "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym",
    "2.5.4.72": "role",
    "2.5.4.97": "organizationIdentifier",
    "1.2.840.113549.1.9.1": "emailAddress",
    "1.2.840.113549.1.9.2": "unstructuredName",
    "1.2.840.113549.1.9.8": "unstructuredAddress",
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "0.9.2342.19200300.100.1.3": "mail",
    "1.3.6.1.4.1.311.60.2.1.1": "jurisdictionL",
    "1.3.6.1.4.1.311.60.2.1.2": "jurisdictionST",
    "1.3.6.1.4.1.311.60.2.1.3": "jurisdictionC",
}
# Tags of text, and how OpenSSL reads it (ASN1_STRING_print_ex): Teletex as Latin-1, Universal as 4-byte characters.
_TEXT = {
    0x0C: "utf-8",
    0x12: "latin-1",
    0x13: "latin-1",
    0x14: "latin-1",
    0x16: "latin-1",
    0x1A: "latin-1",
    0x1C: "utf-32-be",
    0x1E: "utf-16-be",
}
_Escape = Callable[[int], str]


def _distinguished_name(rdns: bytes, escape: _Escape) -> str:
    """The contents of an RDNSequence as text: RFC 2253, last RDN first, as OpenSSL's XN_FLAG_RFC2253 prints it."""
    written = []
    for _, rdn in der.read_all(rdns):
        attributes = [_attribute(contents, escape) for _, contents in der.read_all(rdn)]
        written.append("+".join(reversed(attributes)))
    return ",".join(reversed(written))


def _attribute(contents: bytes, escape: _Escape) -> str:
    parts = list(der.read_all(contents))
    if len(parts) != 2 or parts[0][0] != der.OBJECT_IDENTIFIER:
        raise InvalidInput(Reason.VERIFY_MALFORMED, detail="a part of a name is malformed")
    oid = der.dotted(parts[0][1])
    tag, value = parts[1]
    if oid in _TYPES and tag in _TEXT:
        try:
            return f"{_TYPES[oid]}={_text(value.decode(_TEXT[tag]).encode('utf-8'), escape)}"
        except UnicodeError:
            pass
    encoded = contents[-_encoded_length(value) :]
    return f"{_TYPES.get(oid, oid)}=#{encoded.hex().upper()}"  # RFC 2253 2.4: the value's DER


def _encoded_length(value: bytes) -> int:
    """Of a DER value with its tag and length: X.690 8.1.3."""
    return 2 + len(value) + (0 if len(value) < 0x80 else (len(value).bit_length() + 7) // 8)


def _text(value: bytes, escape: _Escape) -> str:
    """RFC 2253 2.4, with every byte that is not printable ASCII as a hex pair."""
    written = [
        _hex_pair(octet) if not 0x20 <= octet < 0x7F else escape(octet) if octet in b',+"\\<>;' else chr(octet)
        for octet in value
    ]
    if written and written[-1] == " ":
        written[-1] = escape(0x20)
    if written and written[0] in (" ", "#"):
        written[0] = escape(ord(written[0]))
    return "".join(written)


def _backslash(octet: int) -> str:
    return f"\\{chr(octet)}"


def _hex_pair(octet: int) -> str:
    return f"\\{octet:02X}"
