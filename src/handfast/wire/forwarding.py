"""The headers that tell an app who called, in the styles that apps know: RFC 9440, ours, Envoy's, nginx's.

Owns the list of styles, and what each says of a verified peer. Values are printable ASCII whatever a certificate
holds, and nothing in a name can be taken for another field. It never decides who a peer is. What clients send under
these names is taken out of requests by `handfast.wire.identity`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
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
from handfast.wire.distinguished import Spelling, render_rdns
from handfast.wire.http1 import Header
from handfast.wire.identity import client_authority, client_cert, client_cert_chain, client_identity


class HeaderStyle(StrEnum):
    """One way to tell an app who called."""

    CLIENT_CERT = "client-cert"  # Client-Cert: RFC 9440 2.2
    CLIENT_CERT_CHAIN = "client-cert-chain"  # Client-Cert-Chain: RFC 9440 2.3
    CLIENT_IDENTITY = "client-identity"  # Client-Identity: the one name that the peer goes by
    CLIENT_AUTHORITY = "client-authority"  # Client-Authority: who vouches for it
    XFCC = "xfcc"  # X-Forwarded-Client-Cert of By, Hash, Subject, URI, DNS
    XFCC_CERT = "xfcc-cert"  # the same, with Cert and Chain
    X_SSL_CLIENT = "x-ssl-client"  # X-SSL-Client-Verify and more, with the values of nginx's $ssl_client_*
    ASSERTION = "assertion"  # Handfast-Assertion: wire.assertion signs it, with a key and a clock


DEFAULT_STYLES = (HeaderStyle.CLIENT_CERT, HeaderStyle.CLIENT_IDENTITY)


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What the headers say of a verified peer.

    `chain` holds the issuers' certificates, nearest first, without the leaf and without the trust anchor. `names`
    are the leaf's alternative names. `by` is the URI of the guard's own certificate, "" where it has none. `authority`
    is who vouches for the identity, as in handfast.pki.verification.Identity.
    """

    leaf: x509.Certificate
    identity: Name
    authority: str
    names: tuple[Name, ...] = ()
    chain: tuple[x509.Certificate, ...] = ()
    by: str = ""


def facts_of(peer: VerifiedPeer, by: str = "", authority: str = "") -> PeerFacts:
    """Return the facts of a verified peer. `by` is the URI of the guard's own certificate, if it has one.

    `authority`: what its authority is called by now, where that may not be what it was when the peer was verified.
    """
    return PeerFacts(
        peer.leaf, peer.identity.name, authority or peer.identity.authority, peer.names, peer.path[1:-1], by
    )


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
    if HeaderStyle.CLIENT_AUTHORITY in styles:
        headers.append((b"Client-Authority", client_authority(peer.authority)))
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
    fields.append(f'Subject="{render_rdns(_tbs_fields(peer.leaf)[_SUBJECT], Spelling.HEX)}"')
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
        "S-DN": render_rdns(fields[_SUBJECT], Spelling.ASCII),
        "I-DN": render_rdns(fields[_ISSUER], Spelling.ASCII),
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
