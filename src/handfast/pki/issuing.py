"""Issuing: an order, held to its profile and its issuer, becomes a certificate.

The steps are apart so that a caller can rehearse them with a throwaway key: build, sign, lint. Who may
order what is not judged here, but for `authorize_names`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from handfast.errors import InvalidInput, IssuanceRefused, Reason
from handfast.pki.certificates import UNREADABLE, certificate_names, is_authority, label
from handfast.pki.constraints import forbidden_by, subtree
from handfast.pki.keys import PrivateKey, PublicKey, key_id, key_type_of, same_key, weakness
from handfast.pki.names import Kind, Name, general_name, parse_name, printable
from handfast.pki.profiles import BACKDATE, Profile

SERIAL_BITS = 128  # random bits in a serial number; the CA/B Baseline Requirements ask 64
MAX_NAMES = 100  # in one certificate; also the limit of public authorities

_LONGEST_COMMON_NAME = 64  # RFC 5280 A.1, ub-common-name
_EVERY_ADDRESS = ("0.0.0.0/0", "::/0")
_SERVER, _CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True, slots=True)
class Order:
    """What certificate is asked for."""

    profile: Profile
    names: tuple[Name, ...]
    public_key: PublicKey
    lifetime: timedelta | None = None  # None: the profile's, or the ceiling if that is lower
    common_name: str | None = None  # of the subject: a label for people, never an identity
    max_lifetime: timedelta | None = None  # the authority's own ceiling; None: the profile's
    permitted: tuple[Name, ...] = ()  # name constraints of an authority; () is none


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who signs."""

    certificate: x509.Certificate
    key: PrivateKey
    chain: tuple[x509.Certificate, ...]  # from its own certificate up to, and without, the root


def authorize_names(requested: Sequence[Name], allowed: Sequence[Name]) -> None:
    """Check that each name asked for is one of those allowed, exactly.

    Raises IssuanceRefused (ISSUE_NAME_NOT_AUTHORIZED) with the first that is not.
    """
    for name in requested:
        if name not in allowed:
            raise _not_authorized(name, allowed)


def make_serial(signer: int, random: bytes) -> int:
    """Return a serial number: 2 octets that say which signer, then 16 random ones (RFC 5280 4.1.2.2).

    The first octet is 0x40 to 0x7F, so it is positive and always 18 octets long. ValueError where `signer` is
    not in 0..0x3FFF or `random` is not 16 bytes.
    """
    if not 0 <= signer <= 0x3FFF or len(random) * 8 != SERIAL_BITS:
        raise ValueError("a serial is made of a signer in 0..0x3FFF and 16 random bytes")
    return (0x4000 | signer) << SERIAL_BITS | int.from_bytes(random, "big")


def build_certificate(order: Order, issuer: Issuer | None, serial: int, now: datetime) -> x509.CertificateBuilder:
    """Return the certificate that fills the order, ready to be signed. `issuer` None: a root, signed by itself.

    It begins BACKDATE before `now` (aware, UTC) and ends with its lifetime or its issuer, whichever is
    first. Raises IssuanceRefused (any ISSUE_*) where the order breaks its profile or its issuer's limits, and
    InvalidInput (INPUT_NAME) for an unusable common name. ValueError: a profile that does not fit `issuer`.
    """
    if (order.profile.name == "root") is not (issuer is None):
        raise ValueError("a root signs itself, and nothing else does")
    names = _unique(order.names)
    _check_key(order)
    _check_names(order, names)
    not_before, not_after = _validity(order, issuer, now)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, order.common_name)] if order.common_name else [])
    if issuer is not None:
        _check_issuer(issuer, order, names, subject)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(order.public_key)
        .serial_number(serial)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )
    signer = key_id(order.public_key) if issuer is None else authority_key_id(issuer)
    for extension, critical in _extensions(order, names, signer):
        builder = builder.add_extension(extension, critical)
    return builder


def sign(builder: x509.CertificateBuilder, key: PrivateKey) -> x509.Certificate:
    """Sign a certificate with the hash that fits the key: SHA-256 for P-256 and RSA, SHA-384 for P-384."""
    return builder.sign(key, signature_hash(key))


def signature_hash(key: PrivateKey) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None:
    """Return the hash to sign with; None for Ed25519, which has its own (RFC 8410)."""
    match key:
        case ed25519.Ed25519PrivateKey():
            return None
        case ec.EllipticCurvePrivateKey() if key.curve.key_size > 384:
            return hashes.SHA512()
        case ec.EllipticCurvePrivateKey() if key.curve.key_size > 256:
            return hashes.SHA384()
        case _:
            return hashes.SHA256()


def authority_key_id(issuer: Issuer) -> bytes:
    """Return what an authority key identifier says of the issuer: its subject key identifier, or its key's hash.

    Authorities made by hand may have none (RFC 5280 4.2.1.1).
    """
    try:
        return issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return key_id(issuer.key.public_key())


def lint(certificate: x509.Certificate, order: Order, issuer: x509.Certificate | None) -> None:
    """Read a certificate back from its bytes and hold it against order and profile. `issuer` None: a root.

    It does not look at the signature, so the certificate may be signed with a throwaway key. Raises
    IssuanceRefused (ISSUE_LINT) with everything that is wrong.
    """
    try:
        again = x509.load_der_x509_certificate(certificate.public_bytes(Encoding.DER))
        found = [*_lint_fields(again, order, issuer), *_lint_extensions(again, order, issuer)]
    except (InvalidInput, ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        found = [str(error)]
    if found:
        raise _lint(", ".join(found))


# What the order must be.


def _check_key(order: Order) -> None:
    if (weak := weakness(order.public_key)) is not None:
        raise IssuanceRefused(Reason.ISSUE_WEAK_KEY, detail=weak)
    kind = key_type_of(order.public_key)
    if kind not in order.profile.key_types:
        size = getattr(order.public_key, "key_size", "")
        raise IssuanceRefused(
            Reason.ISSUE_KEY_TYPE,
            profile=order.profile.name,
            value=kind or f"{size}-bit {'RSA' if isinstance(order.public_key, rsa.RSAPublicKey) else 'EC'}",
            allowed=", ".join(order.profile.key_types),
        )


def _check_names(order: Order, names: Sequence[Name]) -> None:
    profile = order.profile
    if len(names) > MAX_NAMES:
        raise IssuanceRefused(Reason.ISSUE_TOO_MANY_NAMES, value=len(names), allowed=MAX_NAMES)
    if not (order.common_name if profile.ca else names):
        raise IssuanceRefused(Reason.ISSUE_NO_NAME, profile=profile.name)
    for name in names:
        allowed = ", ".join(sorted(profile.kinds))
        if name.kind is Kind.SPIFFE and (name.value.count("/") > 2) is profile.ca:
            # X509-SVID 3.1 and 3.2: a leaf's SPIFFE ID has a path, an authority's has none.
            allowed = f"spiffe://DOMAIN{'' if profile.ca else '/PATH'}"
        elif name.kind in profile.kinds and (profile.server or not name.value.startswith("*.")):
            continue  # a wildcard says which hosts a server may be; of a client it says nothing
        raise IssuanceRefused(Reason.ISSUE_NAME_KIND, profile=profile.name, value=str(name), allowed=allowed)
    uris = sum(name.is_uri for name in names)
    both = profile.server and profile.client
    if uris > 1 or (both and uris != 1):
        allowed = "exactly one" if both else "at most one"
        raise IssuanceRefused(Reason.ISSUE_URI_COUNT, profile=profile.name, value=uris, allowed=allowed)
    if order.permitted and not profile.ca:
        raise ValueError("name constraints are for authorities")
    _check_common_name(order, names)


def _check_common_name(order: Order, names: Sequence[Name]) -> None:
    text = order.common_name
    if text is None:
        return
    if not (0 < len(text) <= _LONGEST_COMMON_NAME and printable(text)):
        detail = f"a common name is 1 to {_LONGEST_COMMON_NAME} printable characters"
        raise InvalidInput(Reason.INPUT_NAME, value=text[:80], detail=detail)
    try:
        meant = parse_name(text)
    except InvalidInput:
        return  # a mere label
    # Old software takes a common name that looks like a host for one (RFC 9525 appendix A), so it must be one.
    if not order.profile.ca and meant not in names:
        raise _not_authorized(meant, names)


def _validity(order: Order, issuer: Issuer | None, now: datetime) -> tuple[datetime, datetime]:
    if now.tzinfo is None:
        raise ValueError("now must be aware")
    ceiling = order.max_lifetime or order.profile.max_lifetime
    lifetime = min(order.profile.lifetime, ceiling) if order.lifetime is None else order.lifetime
    if not timedelta(seconds=1) <= lifetime <= ceiling:
        raise IssuanceRefused(
            Reason.ISSUE_LIFETIME, value=_length(lifetime), allowed=_length(ceiling), profile=order.profile.name
        )
    now = now.replace(microsecond=0)
    not_before, not_after = now - BACKDATE, now + lifetime
    if issuer is None:
        return not_before, not_after
    first, last = issuer.certificate.not_valid_before_utc, issuer.certificate.not_valid_after_utc
    if now >= last:
        raise IssuanceRefused(Reason.ISSUE_ISSUER_EXPIRED, not_after=last)
    if now < first:
        raise IssuanceRefused(Reason.ISSUE_ISSUER_NOT_YET_VALID, not_before=first)
    return max(not_before, first), min(not_after, last)


def _check_issuer(issuer: Issuer, order: Order, names: Sequence[Name], subject: x509.Name) -> None:
    certificate = issuer.certificate
    try:
        facts = _Facts.of(certificate)
        refused = next(
            (name for above in (certificate, *issuer.chain) for name in forbidden_by(above, names, subject)), None
        )
        public, has_subject = certificate.public_key(), bool(certificate.subject)
    except UNREADABLE:
        raise _not_a_ca(certificate, "its extensions, subject or key cannot be read") from None
    if not is_authority(certificate):
        raise _not_a_ca(certificate, "its basic constraints do not say so")
    if facts.key_usage is not None and not facts.key_usage.key_cert_sign:
        raise _not_a_ca(certificate, "its key usage does not allow signing certificates")
    if not has_subject:
        raise _not_a_ca(certificate, "it has no subject to be named by")
    if not isinstance(public, PublicKey) or not same_key(public, issuer.key.public_key()):
        raise _not_a_ca(certificate, "the key that is to sign is not its own")
    if order.profile.ca and facts.path_length is not None and facts.path_length <= (order.profile.path_length or 0):
        raise _limited(certificate, f"its path length is {facts.path_length}")
    missing = [usage for usage in _usages(order.profile) if facts.usages is not None and usage not in facts.usages]
    if missing and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in (facts.usages or ()):
        # RFC 5280 leaves it open, but OpenSSL and others hold the chain to the usages of its authorities.
        raise _limited(certificate, f"its extended key usage lacks {' and '.join(_words(missing))}")
    if refused is not None:
        raise IssuanceRefused(Reason.ISSUE_NAME_CONSTRAINT, value=refused)


@dataclass(frozen=True, slots=True)
class _Facts:
    """The extensions of an issuer's certificate that bear on what it may sign; None where it has none."""

    path_length: int | None
    key_usage: x509.KeyUsage | None
    usages: tuple[x509.ObjectIdentifier, ...] | None

    @classmethod
    def of(cls, certificate: x509.Certificate) -> _Facts:
        path_length, key_usage, usages = None, None, None
        for extension in certificate.extensions:
            match extension.value:
                case x509.BasicConstraints() as value:
                    path_length = value.path_length
                case x509.KeyUsage() as value:
                    key_usage = value
                case x509.ExtendedKeyUsage() as value:
                    usages = tuple(value)
        return cls(path_length, key_usage, usages)


# What goes into the certificate.


def _extensions(order: Order, names: Sequence[Name], signer: bytes) -> list[tuple[x509.ExtensionType, bool]]:
    """(extension, critical) in the order of RFC 5280 4.2.1; `signer` is the issuer's key identifier."""
    profile = order.profile
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.AuthorityKeyIdentifier(signer, None, None), False),
        (x509.SubjectKeyIdentifier(key_id(order.public_key)), False),
        (_key_usage(profile), True),
    ]
    if names:
        # RFC 5280 4.1.2.6: critical where the subject is empty.
        extensions.append((x509.SubjectAlternativeName(map(general_name, names)), order.common_name is None))
    extensions.append((x509.BasicConstraints(profile.ca, profile.path_length), True))
    if order.permitted:
        extensions.append((_name_constraints(order.permitted), True))
    if usages := _usages(profile):
        extensions.append((x509.ExtendedKeyUsage(usages), False))
    return extensions


def _name_constraints(permitted: Sequence[Name]) -> x509.NameConstraints:
    """Only the names permitted, of the kinds that certificates are used with.

    A constraint on one kind of name leaves all others free (RFC 5280 4.2.1.10), so all hosts and all addresses
    are excluded where none is permitted, as the CA/B Baseline Requirements 7.1.2.5.2 have it.
    """
    permits = list(dict.fromkeys(subtree(name) for name in permitted))
    excludes: list[x509.GeneralName] = []
    if not any(name.kind is Kind.DNS for name in permitted):
        excludes.append(x509.DNSName(""))
    if not any(name.kind is Kind.IP for name in permitted):
        excludes += [x509.IPAddress(ipaddress.ip_network(network)) for network in _EVERY_ADDRESS]
    return x509.NameConstraints(permits, excludes or None)


def _key_usage(profile: Profile) -> x509.KeyUsage:
    # X509-SVID 4.3. A leaf's key signs in the handshake; RSA key transport left TLS with 1.3.
    return x509.KeyUsage(
        digital_signature=not profile.ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=profile.ca,
        crl_sign=profile.ca,
        encipher_only=False,
        decipher_only=False,
    )


def _usages(profile: Profile) -> list[x509.ObjectIdentifier]:
    return [_SERVER] * profile.server + [_CLIENT] * profile.client


# What came out.


def _lint_fields(certificate: x509.Certificate, order: Order, issuer: x509.Certificate | None) -> list[str]:
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    ceiling = order.max_lifetime or order.profile.max_lifetime
    asked = order.lifetime or min(order.profile.lifetime, ceiling)
    subject = [order.common_name] if order.common_name else []
    public = certificate.public_key()
    checks = [
        (certificate.version is x509.Version.v3, "it is not X.509 v3"),
        (64 <= certificate.serial_number.bit_length() <= 159, "its serial is not positive, or not of 64 to 159 bits"),
        (certificate.serial_number > 0, "its serial is not positive"),
        (first < last, "it ends before it begins"),
        (last - first <= min(asked, ceiling) + BACKDATE, "it lives longer than was asked"),
        ([part.value for part in certificate.subject] == subject, "its subject is not the one asked for"),
        (isinstance(public, PublicKey) and same_key(public, order.public_key), "its key is not the one asked for"),
    ]
    if issuer is None:
        checks.append((certificate.issuer == certificate.subject, "a root is its own issuer"))
    else:
        inside = issuer.not_valid_before_utc <= first and last <= issuer.not_valid_after_utc
        checks += [
            (certificate.issuer.public_bytes() == issuer.subject.public_bytes(), "its issuer is another"),
            (certificate.subject != issuer.subject, "its subject is its issuer's"),
            (inside, "it outlives its issuer"),
        ]
    return [text for good, text in checks if not good]


def _lint_extensions(certificate: x509.Certificate, order: Order, issuer: x509.Certificate | None) -> list[str]:
    """Say again, apart from `_extensions`, what must be there; what is not named here must not be."""
    profile, names = order.profile, _unique(order.names)
    found, seen = [], set[x509.ObjectIdentifier]()
    for extension in certificate.extensions:
        seen.add(extension.oid)
        if not _is_sound(extension, order, issuer):
            found.append(f"its {extension.oid._name} is not as it should be")
    if certificate_names(certificate) != names:
        found.append("its names are not those asked for")
    needed = {ExtensionOID.AUTHORITY_KEY_IDENTIFIER, ExtensionOID.SUBJECT_KEY_IDENTIFIER}
    needed |= {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE}
    needed |= {ExtensionOID.EXTENDED_KEY_USAGE} if not profile.ca else set()
    needed |= {ExtensionOID.NAME_CONSTRAINTS} if order.permitted else set()
    needed |= {ExtensionOID.SUBJECT_ALTERNATIVE_NAME} if names else set()
    found += [f"its {oid._name} is missing" for oid in needed - seen]
    return found


def _is_sound(extension: x509.Extension[x509.ExtensionType], order: Order, issuer: x509.Certificate | None) -> bool:
    profile = order.profile
    match extension.value:
        case x509.KeyUsage() as usage:
            leaf, authority = usage.digital_signature, usage.key_cert_sign and usage.crl_sign
            return extension.critical and (authority, leaf) == (profile.ca, not profile.ca)
        case x509.BasicConstraints() as constraints:
            wanted = (profile.ca, profile.path_length)
            return extension.critical and (constraints.ca, constraints.path_length) == wanted
        case x509.ExtendedKeyUsage() as usages:
            served, called = _SERVER in usages, _CLIENT in usages
            return (served, called) == (profile.server, profile.client) and len(usages) == served + called
        case x509.SubjectAlternativeName():
            return extension.critical is (order.common_name is None)
        case x509.NameConstraints() as constraints:
            bases = {subtree(name) for name in order.permitted}
            return extension.critical and bool(bases) and set(constraints.permitted_subtrees or ()) == bases
        case x509.SubjectKeyIdentifier() as identifier:
            return identifier.digest == key_id(order.public_key)
        case x509.AuthorityKeyIdentifier() as identifier:
            return identifier.key_identifier == _lint_signer(order, issuer)
        case _:
            return False


def _lint_signer(order: Order, issuer: x509.Certificate | None) -> bytes | None:
    public = order.public_key if issuer is None else issuer.public_key()
    own = [] if issuer is None else [e.value for e in issuer.extensions]
    written = [value.digest for value in own if isinstance(value, x509.SubjectKeyIdentifier)]
    return written[0] if written else key_id(public) if isinstance(public, PublicKey) else None


def _unique(names: Sequence[Name]) -> tuple[Name, ...]:
    return tuple(dict.fromkeys(names))


def _length(length: timedelta) -> str:
    """A length of time as `parse_lifetime` takes it."""
    seconds = int(length.total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _words(usages: Sequence[x509.ObjectIdentifier]) -> list[str]:
    return ["serverAuth" if usage == _SERVER else "clientAuth" for usage in usages]


def _not_authorized(name: Name, allowed: Sequence[Name]) -> IssuanceRefused:
    texts = ", ".join(map(str, allowed)) or "nothing"
    return IssuanceRefused(Reason.ISSUE_NAME_NOT_AUTHORIZED, value=str(name), allowed=texts)


def _not_a_ca(certificate: x509.Certificate, detail: str) -> IssuanceRefused:
    return IssuanceRefused(Reason.ISSUE_ISSUER_NOT_CA, subject=label(certificate), detail=detail)


def _limited(certificate: x509.Certificate, detail: str) -> IssuanceRefused:
    return IssuanceRefused(Reason.ISSUE_ISSUER_LIMITED, subject=label(certificate), detail=detail)


def _lint(detail: str) -> IssuanceRefused:
    return IssuanceRefused(Reason.ISSUE_LINT, detail=detail)
