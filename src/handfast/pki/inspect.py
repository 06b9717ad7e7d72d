"""Inspection: everything a person asks of a file of keys and certificates, as values and as text.

Total over any bytes, and it shows no private key: only its kind, and the public half's hash.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable
from datetime import timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID

from handfast.errors import HandfastError, InvalidInput, IssuanceRefused, Reason
from handfast.pki import der
from handfast.pki.certificates import (
    UNREADABLE,
    certificate_names,
    fingerprint,
    forbidden_names,
    is_authority,
    parse_certificates,
    serial_text,
    usage_text,
)
from handfast.pki.floor import BROKEN_HASHES
from handfast.pki.keys import parse_private_key, weakness
from handfast.pki.names import Kind, printable
from handfast.pki.pkcs12 import parse_p12
from handfast.pki.requests import load_csr, parse_csr, requested_names
from handfast.pki.revocation import parse_crls

Facts = dict[str, object]

_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----.+?-----END \1-----", re.S)
_MOST_OBJECTS = 1000  # of one file that are shown
_APPLE_LIMIT = timedelta(days=825)  # support.apple.com/en-us/103769: also for authorities of one's own
_UNREADABLE = (InvalidInput, *UNREADABLE)

_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
)
_UNDERSTOOD = frozenset(
    {
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    }
)


def describe(data: bytes, what: str, password: bytes | None = None) -> list[Facts]:
    """Return one dict of JSON values for each object in a file, PEM or DER, in its order.

    `type` says what it is: certificate, private key, public key, request, revocation list, pkcs12. `password`
    opens encrypted keys and PKCS#12. `warnings` holds what a strict verifier would dislike; time is not among
    it, for there is no clock here. `what` names the source in messages. Raises InvalidInput
    (INPUT_UNKNOWN_FILE), and where it is one encrypted PKCS#12 file that `password` does not open,
    INPUT_NOT_P12.
    """
    if b"-----BEGIN" in data:
        found = [fact for block in _blocks(data) for fact in _describe_pem(*block, password)]
    else:
        found = _describe_der(data, what, password)
    if not found:
        raise InvalidInput(Reason.INPUT_UNKNOWN_FILE, what=what)
    return found


def render(facts: list[Facts]) -> str:
    """Return what `describe` found as text for a terminal: one paragraph an object, no control characters."""
    paragraphs = []
    for fact in facts:
        lines = [str(fact.get("type", "?"))]
        for key, value in fact.items():
            if key not in ("type", "warnings") and value not in (None, [], ""):
                lines.append(f"  {key.replace('_', ' ') + ':':<22}{_shown(value)}")
        warnings = fact.get("warnings")
        lines += [f"  ! {_clean(str(text))}" for text in (warnings if isinstance(warnings, list) else [])]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


# What kind of object it is.


def _blocks(data: bytes) -> Iterable[tuple[str, bytes]]:
    for at, found in enumerate(_PEM.finditer(data)):
        if at >= _MOST_OBJECTS:
            return
        yield found[1].decode(), found[0]


def _describe_pem(kind: str, block: bytes, password: bytes | None) -> list[Facts]:
    try:
        match kind:
            case "CERTIFICATE" | "TRUSTED CERTIFICATE" | "X509 CERTIFICATE":
                return [_certificate(one) for one in parse_certificates(block, kind)]
            case "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST":
                return [_request(block, kind)]
            case "X509 CRL":
                return [_crl(one) for one in parse_crls(block, kind)]
            case "PUBLIC KEY":
                return [{"type": "public key", "sha256": hashlib.sha256(_unarmoured(block)).hexdigest()}]
            case "EC PARAMETERS":
                return []
            case _ if kind.endswith("PRIVATE KEY"):
                return [_private_key(block, kind, password)]
            case _:
                return [{"type": kind.lower(), "warnings": ["it is not understood"]}]
    except _UNREADABLE as error:
        return [{"type": kind.lower(), "warnings": [f"it cannot be read: {_reason(error)}"]}]


def _describe_der(data: bytes, what: str, password: bytes | None) -> list[Facts]:
    tries: list[Callable[[], list[Facts]]] = [
        lambda: [_certificate(one) for one in parse_certificates(data, what)],
        lambda: [_request(data, what)],
        lambda: [_crl(one) for one in parse_crls(data, what)],
        lambda: [_private_key(data, what, password)],
    ]
    for attempt in tries:
        try:
            return attempt()
        except _UNREADABLE:
            continue
    return _pkcs12(data, what, password) if _is_p12(data) else []


def _is_p12(data: bytes) -> bool:
    """Whether it begins as a PFX does: a sequence of version 3 and more (RFC 7292 4)."""
    # BER of indefinite length (Windows, NSS) begins with 30 80.
    return bool(re.match(rb"\x30(?:[\x00-\x80]|\x81.|\x82..|\x83.{3}|\x84.{4})\x02\x01\x03\x30", data, re.S))


# One object.


def _certificate(certificate: x509.Certificate) -> Facts:
    facts: Facts = {"type": "certificate"}
    warnings: list[str] = []
    _fill(facts, "names", lambda: [_clean(str(name)) for name in certificate_names(certificate)], warnings)
    _fill(facts, "subject", lambda: _clean(certificate.subject.rfc4514_string()), warnings)
    _fill(facts, "issuer", lambda: _clean(certificate.issuer.rfc4514_string()), warnings)
    facts |= {
        "serial": serial_text(certificate.serial_number),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
    }
    _fill(facts, "key", lambda: _key_text(certificate.public_key()), warnings)
    _fill(facts, "signature_hash", lambda: _hash_text(certificate.signature_hash_algorithm), warnings)
    facts["ca"] = is_authority(certificate)
    try:
        _extensions(certificate, facts)
    except _UNREADABLE:
        _raw_extensions(certificate, facts, warnings)
    facts["sha256"] = fingerprint(certificate)
    return facts | {"warnings": warnings + _dislikes(certificate, facts)}


def _extensions(certificate: x509.Certificate, facts: Facts) -> None:
    others = []
    for extension in certificate.extensions:
        match extension.value:
            case x509.BasicConstraints() as value:
                facts["path_length"] = value.path_length
            case x509.KeyUsage() as value:
                facts["key_usages"] = [usage.replace("_", " ") for usage in _KEY_USAGES if getattr(value, usage)]
            case x509.ExtendedKeyUsage() as value:
                facts["purposes"] = [usage_text(usage) for usage in value]
            case x509.NameConstraints() as value:
                facts["permitted_names"] = [_base_text(base) for base in value.permitted_subtrees or ()]
                facts["excluded_names"] = [_base_text(base) for base in value.excluded_subtrees or ()]
            case x509.SubjectKeyIdentifier() as value:
                facts["key_id"] = value.digest.hex()
            case x509.AuthorityKeyIdentifier() as value if value.key_identifier is not None:
                facts["issuer_key_id"] = value.key_identifier.hex()
            case x509.CRLDistributionPoints() as value:
                points = [_base_text(base) for point in value for base in point.full_name or ()]
                facts["revocation_lists"] = points
            case _ if extension.oid not in _UNDERSTOOD:
                others.append(f"{_oid_text(extension.oid)}{' (critical)' * extension.critical}")
    facts["other_extensions"] = others


def _raw_extensions(certificate: x509.Certificate, facts: Facts, warnings: list[str]) -> None:
    """List the extensions of a certificate whose extensions do not parse, and say which is at fault."""
    warnings.append("its extensions cannot be read, so verifiers refuse it")
    _, extensions = der.certificate_parts(certificate.public_bytes(Encoding.DER))
    facts["other_extensions"] = [oid + " (critical)" * critical for oid, (critical, _) in extensions.items()]


def _private_key(data: bytes, what: str, password: bytes | None) -> Facts:
    facts: Facts = {"type": "private key", "encrypted": False}
    try:
        key = parse_private_key(data, what)
    except InvalidInput as error:
        if error.reason is not Reason.INPUT_KEY_ENCRYPTED:
            raise
        facts["encrypted"] = True
        if password is None:
            return facts
        try:
            key = parse_private_key(data, what, password)
        except InvalidInput as refused:
            return facts | {"warnings": [str(refused)]}
    public = key.public_key()
    weak = weakness(public)
    facts |= {"key": _key_text(public), "public_key_sha256": _spki_hash(public)}
    return facts | {"warnings": [f"the key is too weak: {weak}"] if weak else []}


def _request(data: bytes, what: str) -> Facts:
    csr = load_csr(data, what)
    facts: Facts = {"type": "request"}
    warnings: list[str] = []
    _fill(facts, "names", lambda: [_clean(str(name)) for name in requested_names(csr)], warnings)
    _fill(facts, "subject", lambda: _clean(csr.subject.rfc4514_string()), warnings)
    _fill(facts, "key", lambda: _key_text(csr.public_key()), warnings)
    _fill(facts, "public_key_sha256", lambda: _spki_hash(csr.public_key()), warnings)
    _fill(facts, "signature_hash", lambda: _hash_text(csr.signature_hash_algorithm), warnings)
    try:
        parse_csr(data, what)
    except (InvalidInput, IssuanceRefused) as refused:
        warnings.append(str(refused))
    return facts | {"warnings": warnings}


def _crl(crl: x509.CertificateRevocationList) -> Facts:
    facts: Facts = {"type": "revocation list"}
    warnings: list[str] = []
    _fill(facts, "issuer", lambda: _clean(crl.issuer.rfc4514_string()), warnings)
    facts["last_update"] = crl.last_update_utc.isoformat()
    facts["next_update"] = None if crl.next_update_utc is None else crl.next_update_utc.isoformat()
    facts["revoked"] = len(crl)
    facts["first_serials"] = [serial_text(crl[at].serial_number) for at in range(min(10, len(crl)))]
    _fill(facts, "signature_hash", lambda: _hash_text(crl.signature_hash_algorithm), warnings)
    try:
        for extension in crl.extensions:
            if isinstance(extension.value, x509.CRLNumber):
                facts["number"] = extension.value.crl_number
            elif extension.critical:
                warnings.append(f"it has a critical extension that is not understood ({_oid_text(extension.oid)})")
    except _UNREADABLE:
        warnings.append("its extensions cannot be read")
    if crl.next_update_utc is None:
        warnings.append("it does not say until when it holds")
    return facts | {"warnings": warnings}


def _pkcs12(data: bytes, what: str, password: bytes | None) -> list[Facts]:
    try:
        key, certificates = parse_p12(data, what, password)
    except InvalidInput:
        if password is not None:
            raise
        return [{"type": "pkcs12", "encrypted": True}]
    facts: Facts = {"type": "pkcs12", "encrypted": password is not None, "certificates": len(certificates)}
    if key is not None:
        facts |= {"key": _key_text(key.public_key()), "public_key_sha256": _spki_hash(key.public_key())}
    return [facts, *(_certificate(certificate) for certificate in certificates)]


# What a strict verifier would dislike.


def _dislikes(certificate: x509.Certificate, facts: Facts) -> list[str]:
    found = []
    if certificate.version is not x509.Version.v3:
        found.append("it is X.509 v1, which can say neither its names nor its uses")
    if not 0 < certificate.serial_number < 1 << 159:
        found.append("its serial number is not positive, or longer than 20 octets (RFC 5280 4.1.2.2)")
    if certificate.not_valid_after_utc <= certificate.not_valid_before_utc:
        found.append("it ends before it begins")
    if facts.get("signature_hash") in BROKEN_HASHES and certificate.issuer != certificate.subject:
        found.append(f"it is signed with {facts['signature_hash']}, which is broken")
    try:
        weak = weakness(certificate.public_key())
        found += [f"the key is too weak: {weak}"] if weak else []
        found += [f"it carries a name that no certificate may carry: {n.value}" for n in forbidden_names(certificate)]
        found += _authority_dislikes(certificate, facts) if facts["ca"] else _leaf_dislikes(certificate, facts)
    except _UNREADABLE as error:
        found.append(f"it cannot be read whole: {_reason(error)}")
    return found


def _authority_dislikes(certificate: x509.Certificate, facts: Facts) -> list[str]:
    found = []
    usages = facts.get("key_usages")
    if not isinstance(usages, list):
        found.append("it is an authority without key usage (RFC 5280 4.2.1.3)")
    elif "key cert sign" not in usages:
        found.append("it is an authority whose key usage does not allow signing certificates")
    if not facts.get("key_id"):
        found.append("it is an authority without subject key identifier (RFC 5280 4.2.1.2)")
    if not certificate.subject:
        found.append("it is an authority without a subject to be named by (RFC 5280 4.1.2.6)")
    for extension in certificate.extensions:
        if extension.oid in (ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.NAME_CONSTRAINTS) and not extension.critical:
            found.append(f"its {_oid_text(extension.oid)} is not critical")
    return found


def _leaf_dislikes(certificate: x509.Certificate, facts: Facts) -> list[str]:
    found = []
    names = certificate_names(certificate)
    if not names:
        found.append("it has no subject alternative name, so it names nobody (RFC 9525 1.2)")
    uris = [name for name in names if name.is_uri]
    spiffe = [name for name in uris if name.kind is Kind.SPIFFE]
    if spiffe and len(uris) > 1:
        found.append("it has several URI names; a SPIFFE certificate has one (X509-SVID 2)")
    if any(name.value.count("/") == 2 for name in spiffe):
        found.append("its SPIFFE ID has no path, which only an authority's may lack (X509-SVID 3.1)")
    purposes = facts.get("purposes")
    if not isinstance(purposes, list):
        found.append("it does not say what it is for (no extended key usage)")
    elif "server" in purposes and certificate.not_valid_after_utc - certificate.not_valid_before_utc > _APPLE_LIMIT:
        found.append("it lives longer than 825 days, so Apple's systems refuse it as a server's")
    usages = facts.get("key_usages")
    if isinstance(usages, list):
        if "key cert sign" in usages or "crl sign" in usages:
            found.append("it is no authority, but its key usage says it may sign for one")
        if "digital signature" not in usages:
            found.append("its key usage does not allow digital signatures, which TLS 1.3 needs")
    if not facts.get("issuer_key_id") and certificate.issuer != certificate.subject:
        found.append("it has no authority key identifier (RFC 5280 4.2.1.1)")
    return found


# Texts.


def _fill(facts: Facts, key: str, make: Callable[[], object], warnings: list[str]) -> None:
    try:
        facts[key] = make()
    except _UNREADABLE as error:
        facts[key] = None
        warnings.append(f"its {key.replace('_', ' ')} cannot be read: {_reason(error)}")


def _reason(error: BaseException) -> str:
    text = error.facts.get("detail", error) if isinstance(error, HandfastError) else error
    return _clean(str(text).split("\n")[0][:150])


def _key_text(key: PublicKeyTypes) -> str:
    match key:
        case rsa.RSAPublicKey():
            return f"RSA {key.key_size}"
        case ec.EllipticCurvePublicKey():
            return {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}.get(
                key.curve.name, key.curve.name
            )
        case _:
            return type(key).__name__.removesuffix("PublicKey")


def _hash_text(algorithm: object) -> str:
    return str(getattr(algorithm, "name", "its own"))


def _spki_hash(key: PublicKeyTypes) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _unarmoured(block: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(block.split(b"\n")[1:-1]), validate=False)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _base_text(base: x509.GeneralName) -> str:
    kinds = {x509.DNSName: "dns", x509.IPAddress: "ip", x509.RFC822Name: "email", x509.UniformResourceIdentifier: "uri"}
    value = base.value.rfc4514_string() if isinstance(base.value, x509.Name) else str(base.value)
    return _clean(f"{kinds.get(type(base), 'other')}:{value}")


def _oid_text(oid: x509.ObjectIdentifier) -> str:
    name = oid._name
    return oid.dotted_string if name == "Unknown OID" else name


def _shown(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(_clean(str(entry)) for entry in value)
        case _:
            return _clean(str(value))


def _clean(text: str) -> str:
    """Text that cannot steer a terminal or turn its reading direction."""
    return (
        text
        if printable(text)
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )
