"""Verification: does this chain prove who its holder claims to be, here, now, for this use?

`verify` is the only maker of a VerifiedPeer. A judge decides on the path: OpenSSL, whose Judgement `tls` hands in.
Our own rules come on top and are stricter; our diagnosis says why a chain was refused, in full, and never overturns
the judge.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from handfast.errors import Failure, InvalidInput, Reason, VerificationFailed
from handfast.pki.certificates import (
    UNREADABLE,
    certificate_names,
    common_names,
    extended_usages,
    fingerprint,
    forbidden_names,
    is_authority,
    label,
    public_key_der,
    serial_text,
    usage_text,
)
from handfast.pki.constraints import forbidden_by
from handfast.pki.floor import broken_hash, is_signed_by, weak_size
from handfast.pki.names import Kind, Name
from handfast.pki.revocation import NO_REVOCATIONS, CrlSet, Revocations

MAX_CHAIN = 10  # certificates a peer may present; more are refused unread (CVE-2023-0464 and its kin)


class Purpose(StrEnum):
    """Which side of a handshake the chain is for."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def usage(self) -> x509.ObjectIdentifier:
        """What an extended key usage lists for it (RFC 5280 4.2.1.12)."""
        return ExtendedKeyUsageOID.CLIENT_AUTH if self is Purpose.CLIENT else ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """The issuers a side accepts.

    `trust_domain`: the only SPIFFE trust domain that they may vouch for; None leaves it open, which fits
    an authority that is not ours. `names`: what the authority of each anchor is called, in their order; several
    anchors may be of one authority. () where nobody named them.
    """

    anchors: tuple[x509.Certificate, ...]
    trust_domain: str | None = None
    names: tuple[str, ...] = ()
    _named: dict[bytes, str] = field(init=False, repr=False, compare=False)  # by the key of each anchor

    def __post_init__(self) -> None:
        named = dict(zip(map(public_key_der, self.anchors), self.names, strict=True)) if self.names else {}
        object.__setattr__(self, "_named", named)

    def authority_of(self, path: Sequence[x509.Certificate]) -> str:
        """The authority in the identity that a path, leaf to anchor, proves: where they have names, the nearest one.

        Nearest by key, and not the path's anchor: an authority that another one certified could else pass for that
        one, since a client has a say in which path is found. ValueError if no authority on the path has a name.
        """
        if not self.names:
            return self.trust_domain or f"sha256:{fingerprint(path[-1])}"
        for authority in path[1:]:
            if (key := public_key_der(authority)) and key in self._named:
                return self._named[key]
        raise ValueError("no authority on the path has a name")


@dataclass(frozen=True, slots=True)
class Terms:
    """What is asked of a chain.

    `name`: whom it must be for, or None. `legacy` admits certificates without extended key usage or without
    a subject alternative name; they are then named by their common name. `depth`: how many authorities may stand
    between the leaf and its anchor, as OpenSSL counts them; None leaves it to MAX_CHAIN.
    """

    bundle: TrustBundle
    purpose: Purpose
    name: Name | None = None
    revocations: Revocations = NO_REVOCATIONS
    crls: CrlSet | None = None
    legacy: bool = False
    depth: int | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judge's word on a chain: the path from leaf to anchor that it accepts, or () and why not."""

    path: tuple[x509.Certificate, ...]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a peer is once verified: who vouches for it, and its one typed name.

    `authority` is what the bundle called it then, or the bundle's trust domain, or `sha256:` and the anchor's
    fingerprint: two authorities that use the same name do not make the same identity.
    """

    authority: str
    name: Name

    def __str__(self) -> str:
        return str(self.name)


_PROOF = object()


@dataclass(frozen=True, slots=True)
class VerifiedPeer:
    """A peer that `verify` accepted; it cannot be made in any other way."""

    identity: Identity
    names: tuple[Name, ...]  # all that a rule may match: alternative names, common names, the certificate's SHA-256
    path: tuple[x509.Certificate, ...]  # leaf to anchor
    not_after: datetime  # when the first certificate of the path expires: trust ends then
    measure: tuple[object, ...] = field(repr=False, compare=False)  # what of the terms it was held against
    proof: object = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.proof is not _PROOF:
            raise TypeError("only handfast.pki.verify makes a VerifiedPeer")

    @property
    def leaf(self) -> x509.Certificate:
        """The peer's own certificate."""
        return self.path[0]

    @property
    def leaf_der(self) -> bytes:
        """The peer's own certificate in DER."""
        return self.path[0].public_bytes(Encoding.DER)


def verify(chain: Sequence[x509.Certificate], terms: Terms, now: datetime, judgement: Judgement) -> VerifiedPeer:
    """Return who the chain proves its holder to be. `chain` is as presented, leaf first; the judge's word is on it.

    The others may stand in any order, but the judge follows one path: of two certificates for the same issuer (one
    from each of two roots, say), the first that is valid by time. Where that one leads to no anchor, it stops.

    Raises VerificationFailed with every reason found, the most telling first. Raises nothing else, whatever
    the certificates hold.
    """
    if not chain:
        raise VerificationFailed((Failure(Reason.VERIFY_NO_CERTIFICATE),))
    if len(chain) > MAX_CHAIN:
        raise VerificationFailed((Failure(Reason.VERIFY_CHAIN_TOO_LONG, {"count": len(chain), "limit": MAX_CHAIN}),))
    try:
        if judgement.path:
            # The judge goes by a clock of its own, which may be a moment behind.
            failures = [failure for certificate in judgement.path for failure in _lifetime(certificate, now)]
            failures += _rules(judgement.path, terms, now)
            if not failures:
                return _accept(judgement.path, terms)
        else:
            path, failures = _diagnose(chain, terms, now)
            failures += [failure for failure in _rules(path, terms, now) if failure not in failures]
            failures = failures or [Failure(Reason.VERIFY_JUDGE, {"detail": judgement.detail})]
    except (InvalidInput, *UNREADABLE) as error:
        detail = error.facts.get("detail", "") if isinstance(error, InvalidInput) else str(error)
        failures = [Failure(Reason.VERIFY_MALFORMED, {"detail": str(detail)[:200]})]
    raise VerificationFailed(tuple(failures))


def still_trusted(peer: VerifiedPeer, terms: Terms, now: datetime) -> Failure | None:
    """Why a peer that was verified under older terms may not stay under these; None if it may.

    Signatures and names do not change, so it looks at what does: time, revocations, the bundle; and at all of our
    rules where these terms ask for something else than those that the peer was verified under.
    """
    if now >= peer.not_after:
        return Failure(Reason.ENDED_EXPIRED)
    if peer.path[-1] not in terms.bundle.anchors:
        facts = {"subject": label(peer.leaf), "issuer": _issuer_label(peer.path[-1])}
        return Failure(Reason.VERIFY_UNKNOWN_ISSUER, facts)
    same = _measure(terms) == peer.measure
    failures = _revoked(peer.path, terms, now) if same else _rules(peer.path, terms, now)
    if any(failure.reason is Reason.VERIFY_REVOKED for failure in failures):
        return Failure(Reason.ENDED_REVOKED)
    return failures[0] if failures else None


def _measure(terms: Terms) -> tuple[object, ...]:
    """What of the terms decides on names and uses, which a change of them decides anew."""
    return terms.bundle.trust_domain, terms.purpose, terms.name, terms.legacy, terms.depth


def name_matches(certificate: x509.Certificate, name: Name) -> bool:
    """Whether the certificate is for `name`; a DNS wildcard stands for one left-most label (RFC 9525 6.3)."""
    for candidate in certificate_names(certificate):
        if candidate == name:
            return True
        if candidate.kind is Kind.DNS is name.kind and candidate.value.startswith("*."):
            first, dot, rest = name.value.partition(".")
            if first and dot and rest == candidate.value[2:] and "." in rest:
                return True
    return False


def _accept(path: tuple[x509.Certificate, ...], terms: Terms) -> VerifiedPeer:
    leaf = path[0]
    names = certificate_names(leaf)
    cns = common_names(leaf)
    return VerifiedPeer(
        identity=Identity(terms.bundle.authority_of(path), _principal(names, cns)),
        names=(*names, *cns, Name(Kind.SHA256, fingerprint(leaf))),
        path=path,
        not_after=min(certificate.not_valid_after_utc for certificate in path),
        measure=_measure(terms),
        proof=_PROOF,
    )


def _principal(names: tuple[Name, ...], cns: tuple[Name, ...]) -> Name:
    """The one name that stands for the peer; `_rules` has made sure that there is one."""
    rank = (Kind.SPIFFE, Kind.URI, Kind.EMAIL, Kind.DNS, Kind.IP, Kind.CN, Kind.OPAQUE)
    return min((*names, *cns), key=lambda name: rank.index(name.kind))


# Our rules, on top of the judge's.


def _rules(path: Sequence[x509.Certificate], terms: Terms, now: datetime) -> list[Failure]:
    if not path:
        return []
    failures = _revoked(path, terms, now)
    if terms.depth is not None and len(path) - 2 > terms.depth:
        facts = {"subject": label(path[0]), "count": len(path) - 2, "limit": terms.depth}
        failures.append(Failure(Reason.VERIFY_DEPTH, facts))
    for at, certificate in enumerate(path):
        is_anchor = at == len(path) - 1 and at > 0
        failures += _floor(certificate, signed=not is_anchor)  # a root's signature on itself proves nothing
    leaf = path[0]
    if _is_for_signing(leaf):
        failures.append(Failure(Reason.VERIFY_CA_AS_LEAF, {"subject": label(leaf)}))
    failures += [failure for authority in path[1:] for failure in _purpose(authority, terms)]
    return failures + _usage(leaf, terms) + _names(leaf, terms)


def _purpose(certificate: x509.Certificate, terms: Terms, *, any_counts: bool = True) -> list[Failure]:
    """Whether its extended key usage, where it has one, allows the purpose. An authority's binds what it issues."""
    usages = extended_usages(certificate)
    if usages is None or terms.purpose.usage in usages:
        return []
    if any_counts and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages:
        return []
    words = ", ".join(map(usage_text, usages))
    facts = {"subject": label(certificate), "purpose": str(terms.purpose), "usages": words}
    return [Failure(Reason.VERIFY_PURPOSE, facts)]


def _is_for_signing(leaf: x509.Certificate) -> bool:
    """X509-SVID 4.1, 4.3: a leaf has neither cA nor keyCertSign nor cRLSign."""
    try:
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return is_authority(leaf) and leaf.version is x509.Version.v3
    return is_authority(leaf) or usage.key_cert_sign or usage.crl_sign


def _revoked(path: Sequence[x509.Certificate], terms: Terms, now: datetime) -> list[Failure]:
    failures = []
    for certificate, issuer in itertools.pairwise(path):
        if terms.revocations.revoked(certificate):
            facts = {"subject": label(certificate), "serial": serial_text(certificate.serial_number)}
            failures.append(Failure(Reason.VERIFY_REVOKED, facts))
        if terms.crls is not None and (failure := terms.crls.failure(certificate, issuer, now)) is not None:
            failures.append(failure)
    return failures


def _floor(certificate: x509.Certificate, *, signed: bool) -> list[Failure]:
    failures = []
    if weak := _weakness(certificate):
        failures.append(Failure(Reason.VERIFY_WEAK_KEY, {"subject": label(certificate), "detail": weak}))
    if signed and (broken := broken_hash(certificate.signature_hash_algorithm)):
        failures.append(Failure(Reason.VERIFY_WEAK_HASH, {"subject": label(certificate), "hash": broken}))
    return failures


@lru_cache(512)
def _weakness(certificate: x509.Certificate) -> str:
    try:
        return weak_size(certificate.public_key())
    except UNREADABLE as error:
        return str(error)[:100] or "it cannot be read"


def _usage(leaf: x509.Certificate, terms: Terms) -> list[Failure]:
    facts: dict[str, object] = {"subject": label(leaf), "purpose": str(terms.purpose)}
    failures = _purpose(leaf, terms, any_counts=False)  # RFC 5280 4.2.1.12 lets us
    if not terms.legacy and extended_usages(leaf) is None:
        failures.append(Failure(Reason.VERIFY_NO_EKU, facts))
    try:
        if not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
            # RFC 8446 4.4.2.2: digitalSignature must be set where keyUsage is there.
            failures.append(Failure(Reason.VERIFY_KEY_USAGE, facts | {"usage": "digital signatures"}))
    except x509.ExtensionNotFound:
        pass
    return failures


def _names(leaf: x509.Certificate, terms: Terms) -> list[Failure]:
    names, cns, subject = certificate_names(leaf), common_names(leaf), label(leaf)
    failures = [
        Failure(Reason.VERIFY_FORBIDDEN_NAME, {"subject": subject, "name": name.value})
        for name in forbidden_names(leaf)
    ]
    failures += [  # X509-SVID 2: a leaf's SPIFFE ID has a path; a bare one names the whole trust domain
        Failure(Reason.VERIFY_FORBIDDEN_NAME, {"subject": subject, "name": name.value})
        for name in names
        if name.kind is Kind.SPIFFE and "/" not in name.value[9:]
    ]
    if all(name.kind is Kind.OPAQUE for name in names) and not (terms.legacy and cns):
        failures.append(Failure(Reason.VERIFY_NO_NAME, {"subject": subject}))
    uris = [name for name in names if name.is_uri]
    if len(uris) > 1 and (terms.purpose is Purpose.CLIENT or any(name.kind is Kind.SPIFFE for name in uris)):
        # X509-SVID 2: exactly one URI. We ask it of every client, so that a peer has one name.
        failures.append(Failure(Reason.VERIFY_SVID_NAMES, {"subject": subject, "count": len(uris)}))
    domain = terms.bundle.trust_domain
    failures += [
        Failure(Reason.VERIFY_TRUST_DOMAIN, {"name": str(name), "trust_domain": domain})
        for name in names
        if domain is not None and name.kind is Kind.SPIFFE and name.trust_domain != domain
    ]
    if terms.name is not None and not name_matches(leaf, terms.name):
        if terms.legacy and not names and terms.name.kind is Kind.DNS and Name(Kind.CN, terms.name.value) in cns:
            return failures
        facts = {"names": ", ".join(map(str, names)) or subject, "name": str(terms.name)}
        failures.append(Failure(Reason.VERIFY_NAME_MISMATCH, facts))
    return failures


# The diagnosis of what the judge refused.


def _diagnose(
    chain: Sequence[x509.Certificate], terms: Terms, now: datetime
) -> tuple[list[x509.Certificate], list[Failure]]:
    """Walk from the leaf towards an anchor; return the path so far and what is wrong with it."""
    path, failures = [chain[0]], list[Failure]()
    anchors = terms.bundle.anchors
    while path[-1] not in anchors:
        issuer, failure = _find_issuer(path[-1], anchors, [c for c in chain[1:] if c not in path])
        if failure is not None:
            failures.append(failure)
        if issuer is None:
            break
        path.append(issuer)
    for certificate in path:
        failures += _lifetime(certificate, now)
        failures += _unknown_critical(certificate)
    for at, issuer in enumerate(path[1:]):
        failures += _issuing(issuer, path[: at + 1])
    return path, failures


def _lifetime(certificate: x509.Certificate, now: datetime) -> list[Failure]:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        return [Failure(Reason.VERIFY_EXPIRED, {"subject": label(certificate), "not_after": end})]
    if now < begin:
        return [Failure(Reason.VERIFY_NOT_YET_VALID, {"subject": label(certificate), "not_before": begin})]
    return []


def _find_issuer(
    certificate: x509.Certificate, anchors: Sequence[x509.Certificate], presented: Sequence[x509.Certificate]
) -> tuple[x509.Certificate | None, Failure | None]:
    facts = {"subject": label(certificate), "issuer": _issuer_label(certificate)}
    named = [issuer for issuer in (*anchors, *presented) if issuer.subject == certificate.issuer]
    for issuer in named:
        if is_signed_by(certificate, issuer, any_size=issuer in anchors):
            return issuer, None
    # An anchor of that name whose key did not make the signature: forged, altered, or an older key of the same name.
    if any(issuer in anchors for issuer in named):
        return None, Failure(Reason.VERIFY_BAD_SIGNATURE, facts)
    return None, Failure(Reason.VERIFY_UNKNOWN_ISSUER, facts)


def _issuer_label(certificate: x509.Certificate) -> str:
    if certificate.issuer == certificate.subject:
        return "itself"
    text = certificate.issuer.rfc4514_string()
    return text if text.isprintable() and text else "an authority without a name"


def _issuing(issuer: x509.Certificate, below: Sequence[x509.Certificate]) -> list[Failure]:
    """What forbids `issuer` to stand above the certificates `below` it (leaf first)."""
    facts: dict[str, object] = {"issuer": label(issuer), "subject": label(below[-1])}
    if not is_authority(issuer):
        return [Failure(Reason.VERIFY_NOT_A_CA, facts)]
    leaf = below[0]
    failures = [
        Failure(Reason.VERIFY_NAME_CONSTRAINT, {"issuer": label(issuer), "name": name})
        for name in forbidden_by(issuer, certificate_names(leaf), leaf.subject)
    ]
    try:
        if not issuer.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign:
            failures.append(
                Failure(Reason.VERIFY_KEY_USAGE, {"subject": label(issuer), "usage": "signing certificates"})
            )
    except x509.ExtensionNotFound:
        pass
    try:
        limit = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        if limit is not None and len(below) - 1 > limit:
            failures.append(Failure(Reason.VERIFY_PATH_LENGTH, facts | {"limit": limit}))
    except x509.ExtensionNotFound:
        pass
    return failures


_UNDERSTOOD = frozenset(
    {
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.CERTIFICATE_POLICIES,
        ExtensionOID.POLICY_CONSTRAINTS,
        ExtensionOID.INHIBIT_ANY_POLICY,
    }
)


def _unknown_critical(certificate: x509.Certificate) -> list[Failure]:
    return [
        Failure(
            Reason.VERIFY_CRITICAL_EXTENSION,
            {"subject": label(certificate), "oid": extension.oid.dotted_string},
        )
        for extension in certificate.extensions
        if extension.critical and extension.oid not in _UNDERSTOOD
    ]
