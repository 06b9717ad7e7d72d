"""Attacks with certificates that a trusted authority signed and should not have: each must not get in.

The insider holds the authority's key. What they make is wrong for one reason, beside a good one that gets in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from handfast.audit import odd
from handfast.audit.insider import Bad, Inside, by_authority, by_client, meanwhile, versions
from handfast.audit.model import (
    Check,
    Need,
    Outcome,
    Remedies,
    Severity,
    not_applicable,
    unclear,
)
from handfast.audit.oracle import worst
from handfast.audit.runner import Audit
from handfast.testing import Flaw, NameKind, TestAuthority, TestLeaf, names_as

REVOKED_WITHIN = 5.0  # seconds in which a revocation must have come through
_TIMES = 3  # that each costly certificate is shown
_HOUR = timedelta(hours=1)
_STRANGER = "spiffe://audit/nobody-has-this-name"

_CHAIN = Remedies(
    handfast="nothing to do: handfast verifies every certificate of a chain itself",
    nginx="ssl_verify_client on (not optional_no_ca), and a current OpenSSL",
    haproxy="verify required, without crt-ignore-err and ca-ignore-err",
    envoy="validation_context.trusted_ca, and trust_chain_verification VERIFY_TRUST_CHAIN (the default)",
    apache="SSLVerifyClient require, and a current OpenSSL",
)
_PURPOSE = Remedies(
    handfast="nothing to do, without --legacy-certs: a client's certificate must say clientAuth",
    nginx="OpenSSL takes a certificate without extendedKeyUsage for any purpose: let the authority always set it",
    haproxy="as nginx: the authority must set extendedKeyUsage, for there is no setting to demand it",
    envoy="as nginx; a match on the SAN (match_typed_subject_alt_names) tells clients from servers",
    apache='SSLRequire with OID("extendedKeyUsage"), or an authority for clients alone',
)
_NAMES = Remedies(
    handfast="nothing to do: certificates with such names are refused for clients",
    nginx="refuse by a map on $ssl_client_s_dn, or let the application parse $ssl_client_escaped_cert strictly",
    haproxy="http-request deny unless ssl_c_s_dn(cn) fits a strict pattern; never forward raw names",
    envoy="match_typed_subject_alt_names with san_type and an exact matcher",
    apache="Require expr on SSL_CLIENT_SAN_* with anchored patterns",
)
_REVOKE = Remedies(
    handfast="--crl F, or a guard on the authority's own state; revocations count within 2 s",
    nginx="ssl_crl /etc/nginx/crl.pem; and a reload whenever it changes",
    haproxy="crl-file F on the bind line; `set ssl crl-file` and `commit ssl crl-file` when it changes",
    envoy="validation_context.crl, by SDS so that a change is taken up",
    apache="SSLCARevocationCheck chain and SSLCARevocationFile; a reload whenever it changes",
)
_STRENGTH = Remedies(
    handfast="nothing to do: RSA under 2048 bits, weak curves, MD5 and SHA-1 are refused",
    nginx="ssl_ciphers …:@SECLEVEL=2, with an OpenSSL that knows security levels",
    haproxy="ssl-default-bind-ciphers …:@SECLEVEL=2",
    envoy="a release whose BoringSSL refuses such certificates, and an authority that does not issue them",
    apache="SSLCipherSuite …:@SECLEVEL=2",
)
_COST = Remedies(
    handfast="report it: chains and keys are bounded before anything is verified",
    nginx="ssl_verify_depth 2; more worker_processes; limit_conn by address",
    haproxy="rate-limit connections by source: stick-table with conn_rate; nbthread above 1",
    envoy="max_verify_depth: 2; connection limits on the listener",
    apache="SSLVerifyDepth 2; the event MPM; a limit on connections by address",
)


def _flaws(*flaws: Flaw, below: int = 0) -> Callable[[Audit], Outcome]:
    """A leaf of each flaw must not get in. `below`: how many issuers under ours it takes; a good leaf is tried so."""

    def attack(inside: Inside) -> Outcome:
        if below and not _may_have_below(inside, below):
            return not_applicable("no good certificate gets in through an issuer below this authority either")
        return inside.all_refused([_flawed(inside, flaw) for flaw in flaws])

    return by_authority(attack)


def _flawed(inside: Inside, flaw: Flaw) -> Bad:
    return f"a certificate of the authority's: {flaw}", inside.authority.flawed(flaw, *inside.names)


def _may_have_below(inside: Inside, depth: int) -> bool:
    authority = inside.authority
    for number in range(depth):
        authority = authority.sub(f"Good Issuer {number}")
    return inside.gets_in(authority.client(*inside.names), tls12=versions(inside.audit)[0])


def _expired(inside: Inside) -> Outcome:
    short = inside.authority.client(*inside.names, validity=(-2 * _HOUR, -timedelta(minutes=2)))
    return inside.all_refused([_flawed(inside, Flaw.EXPIRED), ("a certificate that expired two minutes ago", short)])


def _wrong_usage(inside: Inside) -> Outcome:
    other = inside.authority.client(*inside.names, eku=(ExtendedKeyUsageOID.CODE_SIGNING,))
    return inside.all_refused(
        [_flawed(inside, Flaw.SERVER_ONLY), ("a certificate of the authority's: for code signing alone", other)]
    )


def _authority_as_leaf(inside: Inside) -> Outcome:
    authority = inside.authority
    own = TestLeaf(authority.key, authority.above or (authority.certificate.public_bytes(Encoding.DER),))
    return inside.all_refused(
        [_flawed(inside, Flaw.CA_AS_LEAF), ("the authority's own certificate, as a client's", own)]
    )


def _weak_keys(inside: Inside) -> Outcome:
    tries = [inside.all_refused([_flawed(inside, Flaw.WEAK_KEY)])]
    if inside.audit.look.tls12:  # TLS 1.3 has no signature scheme for P-192
        said, leaf = _flawed(inside, Flaw.WEAK_CURVE)
        tries.append(inside.judge(f"TLS 1.2: {said}", inside.audit.call(leaf, tls12=True)))
    return worst(tries)


def _weak_hashes(inside: Inside) -> Outcome:
    tries = [inside.all_refused([_flawed(inside, Flaw.SHA1)])]
    if _may_have_below(inside, 1):  # MD5 takes an RSA issuer
        tries.append(inside.all_refused([_flawed(inside, Flaw.MD5)]))
    return worst(tries)


def _name_types(inside: Inside) -> Outcome:
    if inside.gets_in(inside.authority.client(_STRANGER), tls12=versions(inside.audit)[0]):
        return not_applicable("the server takes any name of this authority, so there is none to be confused with")
    name = inside.names[0]
    own = _kind_of(name)
    bad: list[Bad] = [
        (f"the accepted name as {_article(kind.value)}: {name}", inside.authority.client(san=names_as(kind, name)))
        for kind in NameKind
        if kind is not own
    ]
    bad.append((f"the accepted name as CN alone: {name}", inside.authority.client(subject=name[:64], san=b"\x30\0")))
    bad.append(
        (f"the accepted name as CN beside another name: {name}", inside.authority.client(_STRANGER, subject=name[:64]))
    )
    return inside.all_refused(bad)


def _kind_of(name: str) -> NameKind | None:
    if "://" in name or name.startswith("urn:"):
        return NameKind.URI
    if "@" in name:
        return NameKind.EMAIL
    return None if name.replace(".", "").isdigit() or ":" in name else NameKind.DNS


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeo' else 'a'} {kind}"


def _two_authorities(inside: Inside) -> Outcome:
    credential = inside.audit.means.credential
    if credential is None or credential.certificate.issuer in _issuers(inside.authority):
        return not_applicable("needs an accepted client of another authority than --ca: --cert F --key F")
    if inside.gets_in(inside.authority.client(_STRANGER), tls12=versions(inside.audit)[0]):
        return not_applicable("the server takes any name of this authority, so no other's name is needed")
    leaf = inside.authority.client(*inside.names)
    return inside.all_refused([(f"{inside.names[0]}, which another authority gave to somebody else", leaf)])


def _issuers(authority: TestAuthority) -> tuple[object, ...]:
    return authority.certificate.subject, authority.certificate.issuer


def _revoked(inside: Inside) -> Outcome:
    means = inside.audit.means
    if means.revoked is not None:
        return inside.all_refused([("a certificate that was revoked", means.revoked)])
    if means.revoker is None:
        return not_applicable("needs a certificate that was revoked: --revoked-cert F --revoked-key F, or --authority")
    leaf = means.revoker.issue(inside.names)
    if not inside.gets_in(leaf, tls12=versions(inside.audit)[0]):
        return unclear("a new certificate of the authority does not get in, so nothing is shown once it is revoked")
    means.revoker.revoke(leaf)
    ends = time.monotonic() + REVOKED_WITHIN
    while time.monotonic() < ends and inside.gets_in(leaf, tls12=versions(inside.audit)[0]):
        time.sleep(0.25)
    return inside.all_refused([(f"a certificate that was revoked {REVOKED_WITHIN:g} s ago at most", leaf)])


def _huge_keys(inside: Inside) -> Outcome:
    """Neither has a key that anybody holds, so neither gets in; the question is what it costs to say so."""
    bad = [_flawed(inside, Flaw.HUGE_KEY), _flawed(inside, Flaw.HUGE_ISSUER_KEY)]
    return _costly(inside, bad)


def _huge_names(inside: Inside) -> Outcome:
    return _costly(inside, [_flawed(inside, Flaw.HUGE_NAMES), _flawed(inside, Flaw.LONG_NAME)])


def _costly(inside: Inside, bad: list[Bad]) -> Outcome:
    """Whether a good client is answered while the server has these before it. It may take them or not."""
    said = ", and ".join(one for one, _ in bad)
    return meanwhile(inside, said, [partial(_odd_call, inside.audit, leaf) for _, leaf in bad for _ in range(_TIMES)])


def _odd_call(audit: Audit, leaf: TestLeaf) -> None:
    """By an engine that minds neither a key that does not fit nor the size of anything."""
    with suppress(Exception):  # how it ends is not asked here
        odd.call(audit, leaf, tls12=not audit.look.tls13)


def _check(
    name: str,
    attack: str,
    proves: str,
    severity: Severity,
    references: tuple[str, ...],
    remedies: Remedies,
    run: Callable[[Audit], Outcome],
    need: Need = Need.AUTHORITY,
) -> Check:
    return Check(f"insider.{name}", attack, proves, severity, references, remedies, run, (need,), seconds=40)


CHECKS = (
    _check(
        "expired",
        "A client shows a certificate that was good until it expired.",
        "Trust ends on time.",
        Severity.HIGH,
        ("RFC 5280 6.1.3 (a)(2)", "CWE-298"),
        _CHAIN,
        by_authority(_expired),
    ),
    _check(
        "not-yet-valid",
        "A client shows a certificate whose time has not begun.",
        "Trust does not begin before its time.",
        Severity.HIGH,
        ("RFC 5280 6.1.3 (a)(2)", "CWE-298"),
        _CHAIN,
        _flaws(Flaw.NOT_YET_VALID),
    ),
    _check(
        "revoked",
        "A client shows a certificate that its authority has revoked.",
        "Who was put out stays out.",
        Severity.HIGH,
        ("RFC 5280 6.3", "CWE-299"),
        _REVOKE,
        by_client(_revoked),
        Need.INSIDER,
    ),
    _check(
        "wrong-usage",
        "A client shows a certificate that is for servers alone, or for signing code.",
        "What is stolen from a server is no client.",
        Severity.HIGH,
        ("RFC 5280 4.2.1.12", "CWE-295"),
        _CHAIN,
        by_authority(_wrong_usage),
    ),
    _check(
        "no-usage",
        "A client shows a certificate that does not say what it is for.",
        "A certificate is for clients only where it says so.",
        Severity.LOW,
        ("RFC 5280 4.2.1.12", "CWE-295"),
        _PURPOSE,
        _flaws(Flaw.NO_EKU),
    ),
    _check(
        "authority-as-client",
        "A client shows an authority's certificate as its own.",
        "The keys that issue do not also call.",
        Severity.MEDIUM,
        ("RFC 5280 4.2.1.9", "CWE-295"),
        _PURPOSE,
        by_authority(_authority_as_leaf),
    ),
    _check(
        "path-length",
        "An issuer that may have no issuer below itself makes one, and that one certifies a client.",
        "The path length of every issuer is kept to.",
        Severity.HIGH,
        ("RFC 5280 6.1.4 (l)", "CWE-295"),
        _CHAIN,
        _flaws(Flaw.PATH_LENGTH, below=2),
    ),
    _check(
        "name-constraints",
        "An issuer that is limited to some names certifies a client by another.",
        "The name constraints of every issuer are kept to, for every kind of name.",
        Severity.HIGH,
        ("RFC 5280 6.1.4 (g)", "CVE-2021-44532", "CWE-295"),
        _CHAIN,
        _flaws(Flaw.NAME_CONSTRAINT, below=1),
    ),
    _check(
        "issuer-not-ca",
        "A certificate that says it is no authority's certifies a client.",
        "basicConstraints is checked on every issuer of a chain.",
        Severity.CRITICAL,
        ("RFC 5280 6.1.4 (k)", "CVE-2021-3450", "CWE-295"),
        _CHAIN,
        _flaws(Flaw.NOT_A_CA, below=1),
    ),
    _check(
        "weak-keys",
        "A client has a key that can be broken: RSA of 1024 bits, or the curve P-192.",
        "Weak keys identify nobody.",
        Severity.MEDIUM,
        ("RFC 9325 4.5", "CWE-326"),
        _STRENGTH,
        by_authority(_weak_keys),
    ),
    _check(
        "weak-hashes",
        "A client shows a certificate that is signed over SHA-1 or MD5, as colliding ones would be.",
        "A certificate is signed over a hash that nobody can make collide.",
        Severity.MEDIUM,
        ("RFC 9325 4.5", "CVE-2004-2761", "CWE-328"),
        _STRENGTH,
        by_authority(_weak_hashes),
    ),
    _check(
        "malformed-names",
        "A client shows a certificate with a NUL or a line break in its names.",
        "Names that two readers would read as two names are no names.",
        Severity.MEDIUM,
        ("CVE-2009-2408", "RFC 5280 4.2.1.6", "CWE-158"),
        _NAMES,
        _flaws(Flaw.NUL_BEHIND_NAME, Flaw.NUL_IN_NAME, Flaw.CONTROL_IN_NAME, Flaw.NUL_IN_SUBJECT),
    ),
    _check(
        "two-names",
        "A client shows a certificate with two SPIFFE IDs, so that each reader may take another.",
        "A peer is one identity.",
        Severity.MEDIUM,
        ("https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md 5.2", "CWE-290"),
        _NAMES,
        _flaws(Flaw.TWO_URIS),
    ),
    _check(
        "name-types",
        "A client has the accepted name in a field of another kind: an email, another name, the CN.",
        "A name counts only as what its authority certified it to be.",
        Severity.HIGH,
        ("CVE-2021-44531", "CVE-2021-44533", "RFC 9525 6.3", "CWE-843"),
        _NAMES,
        by_authority(_name_types),
    ),
    _check(
        "two-authorities",
        "One trusted authority certifies a client by the name that another gave to somebody else.",
        "An identity is a name and who gave it, so that one authority cannot speak for another.",
        Severity.HIGH,
        ("RFC 9525 7", "CWE-290"),
        Remedies(
            handfast="name the authorities, client_ca = { a = FILE, b = FILE }, and write `WHO by a` in rules",
            nginx="one server block per authority, or a map on $ssl_client_i_dn and the name together",
            haproxy="match ssl_c_i_dn beside ssl_c_s_dn in every rule",
            envoy="the SPIFFE validator (envoy.tls.cert_validator.spiffe) with one bundle per trust domain",
            apache="Require expr on SSL_CLIENT_I_DN beside the name",
        ),
        by_client(_two_authorities),
    ),
    _check(
        "critical-extension",
        "A client shows a certificate with a critical extension that the server cannot know.",
        "What must be understood and is not ends in a refusal.",
        Severity.MEDIUM,
        ("RFC 5280 4.2", "CWE-295"),
        _CHAIN,
        _flaws(Flaw.CRITICAL_EXTENSION),
    ),
    _check(
        "duplicate-extension",
        "A client shows a certificate with two extendedKeyUsage extensions that differ.",
        "An extension comes once, so that no two readers can read two things.",
        Severity.LOW,
        ("RFC 5280 4.2", "CWE-436"),
        _CHAIN,
        _flaws(Flaw.TWICE),
    ),
    _check(
        "long-chain",
        "A client shows a chain of a hundred issuers, each with a good signature.",
        "The cost of verifying a client is bounded by a depth.",
        Severity.LOW,
        ("RFC 5280 6.1", "CWE-400"),
        _COST,
        _flaws(Flaw.LONG_CHAIN),
    ),
    _check(
        "huge-keys",
        "Clients show certificates and issuers with RSA keys of 16,384 bits, several at once.",
        "Others are answered while the server has a costly key before it.",
        Severity.MEDIUM,
        ("CVE-2023-29409", "CVE-2023-3446", "CWE-400"),
        _COST,
        by_authority(_huge_keys),
    ),
    _check(
        "huge-names",
        "Clients show certificates with a thousand names, and with a name of 20 kB.",
        "Others are answered, and the server stands, whatever is in a certificate.",
        Severity.MEDIUM,
        ("CVE-2022-3602", "CWE-400"),
        _COST,
        by_authority(_huge_names),
    ),
)
