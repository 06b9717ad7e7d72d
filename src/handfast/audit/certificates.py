"""Attacks with certificates, by somebody who has none of the authority's: nothing shown, forged, copied, tampered.

All of them end in one question: was the application reached?
"""

from __future__ import annotations

from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from handfast.audit import odd
from handfast.audit.model import (
    Check,
    Evidence,
    Need,
    Outcome,
    Remedies,
    Severity,
    Verdict,
    failed,
    not_applicable,
    passed,
    unclear,
)
from handfast.audit.oracle import Reach, reach, worst
from handfast.audit.runner import Audit
from handfast.files import generate_key
from handfast.pki.keys import KeyType, PrivateKey, key_type_of
from handfast.testing import Spec, TestAuthority, TestLeaf, below, make, tampered

_DER = Encoding.DER
_MOST_IMPOSTORS = 3  # authorities to be impersonated; a server that names hundreds is asked about these

_REQUIRE = Remedies(
    handfast="guard the port with `handfast guard --client-ca F`; every client then needs a certificate",
    nginx="ssl_verify_client on; ssl_client_certificate /etc/nginx/ca.crt; (never optional or optional_no_ca)",
    haproxy="bind :443 ssl crt F ca-file ca.pem verify required (never verify optional or ca-ignore-err all)",
    envoy="DownstreamTlsContext: require_client_certificate: true and validation_context.trusted_ca",
    apache="SSLVerifyClient require and SSLCACertificateFile (never optional or optional_no_ca)",
)
_VERIFY = Remedies(
    handfast="nothing to do: every chain is verified; check that --client-ca holds only authorities that you trust",
    nginx="ssl_verify_client on, not optional_no_ca, and ssl_client_certificate with your own authority alone",
    haproxy="verify required, without crt-ignore-err and ca-ignore-err",
    envoy="validation_context.trusted_ca must be set, and trust_chain_verification not ACCEPT_UNTRUSTED",
    apache="SSLVerifyClient require, not optional_no_ca",
)
_UPGRADE = Remedies(
    handfast="upgrade handfast and report it: this must not happen",
    nginx="upgrade nginx and its OpenSSL",
    haproxy="upgrade HAProxy and its TLS library",
    envoy="upgrade Envoy; a custom certificate validator must not skip the handshake's own checks",
    apache="upgrade httpd, mod_ssl and OpenSSL",
)


def _no_certificate(audit: Audit) -> Outcome:
    tries = [
        audit.refused(f"TLS 1.{3 - old} without a certificate, then a request", None, tls12=old)
        for old in _versions(audit)
    ]
    return worst(tries)


def _self_signed(audit: Audit) -> Outcome:
    forged = [
        ("a self-signed certificate with the names of an accepted one", make(_copied(audit), None)),
        ("a self-signed authority's certificate", make(Spec(subject="Audit", ca=True, eku=None), None)),
    ]
    return _all_refused(audit, forged)


def _same_name(audit: Audit) -> Outcome:
    """The impostor has the name of a trusted authority, and the leaf that of an accepted client."""
    forged: list[tuple[str, TestLeaf]] = []
    for twin in _impostors(audit):
        leaf = make(_copied(audit), twin)
        name = twin.certificate.subject.rfc4514_string() or "(no name)"
        forged.append((f"a certificate of an impostor of {name}", leaf))
        with_root = TestLeaf(leaf.key, (*leaf.presented, twin.certificate.public_bytes(_DER)))
        forged.append((f"the same, with the impostor's own certificate behind it ({name})", with_root))
    return _all_refused(audit, forged)


def _spoofed(audit: Audit) -> Outcome:
    server = audit.target.name
    usual = ("localhost", "127.0.0.1", "admin", server)
    anyone = TestAuthority.root("Audit Root")
    forged = [
        (f"CN={name} and its SAN, of an unknown authority", make(Spec(names=(name,), subject=name[:64]), anyone))
        for name in dict.fromkeys(usual)
    ]
    leaf = audit.look.leaf
    if leaf is not None:  # a server that trusts its own names
        spec = Spec(subject=leaf.subject, san=_san(leaf))
        forged.append(("the names of the server itself, of an unknown authority", make(spec, anyone)))
    return _all_refused(audit, forged)


def _copied_certificate(audit: Audit) -> Outcome:
    credential = audit.means.credential
    if credential is not None:
        thief = credential.with_key(_like(credential))
        tries = []
        for old in _versions(audit):
            said = f"TLS 1.{3 - old}: an accepted certificate, and a proof made with another key"
            if not _goes_through(audit, credential, tls12=old):
                tries.append(unclear("the same with the right key does not get through, so nothing is shown"))
                continue
            tries.append(audit.judge(said, odd.call(audit, thief, tls12=old)))
        return worst(tries)
    if audit.look.facts is None or not audit.look.facts.chain:
        return not_applicable(Need.CREDENTIAL.value)
    # The server's own certificate is public. That it is refused shows little, for it is no client's.
    chain = tuple(one.public_bytes(_DER) for one in audit.look.facts.chain)
    mirror = TestLeaf(generate_key(KeyType.P256), chain)
    outcome = audit.judge("the server's own certificate, and a proof made with another key", odd.call(audit, mirror))
    return outcome if outcome.verdict is Verdict.FAIL else not_applicable(Need.CREDENTIAL.value)


def _goes_through(audit: Audit, credential: TestLeaf, *, tls12: bool) -> bool:
    """The counter-trial: the engine that makes the wrong proof reaches the application with the right one."""
    return reach(odd.call(audit, credential, tls12=tls12), audit.baseline)[0] is Reach.YES


def _tampered(audit: Audit) -> Outcome:
    forged: list[tuple[str, TestLeaf]] = []
    credential = audit.means.credential
    if credential is not None:
        forged.append(
            ("an accepted certificate with our key put into it, under the old signature", tampered(credential))
        )
    for twin in _impostors(audit):  # the issuer's name is right and nothing points to its key: only the signature says
        leaf = tampered(make(replace(_copied(audit), key_ids=False), twin))
        forged.append(
            (f"a certificate that says {twin.certificate.subject.rfc4514_string()}, with a wrong signature", leaf)
        )
    return _all_refused(audit, forged)


def _leaf_as_issuer(audit: Audit) -> Outcome:
    credential = audit.means.credential
    assert credential is not None  # it is needed
    made = below(credential, _copied(audit))
    called = below(credential, Spec(names=("spiffe://audit/admin",), subject="admin"))
    return _all_refused(
        audit,
        [
            ("a certificate signed with the key of an accepted client's", made),
            ("another name, signed with the key of an accepted client's", called),
        ],
    )


def _authority_names(audit: Audit) -> Outcome:
    names = [name.rfc4514_string() for name in audit.look.authorities]
    if audit.look.facts is None:
        return not_applicable("the server ended the handshake before it would have named any")
    if not names:
        return passed("the server names no authorities in its CertificateRequest")
    evidence = Evidence.of("a ClientHello", f"CertificateRequest: {'; '.join(names)}")
    return failed(f"the server tells anybody the {len(names)} authorities that it accepts", evidence)


def _all_refused(audit: Audit, forged: list[tuple[str, TestLeaf]]) -> Outcome:
    """Show each leaf, in TLS 1.3 and, where the server speaks it, 1.2."""
    tries = []
    for said, leaf in forged:
        for old in _versions(audit):
            tries.append(audit.refused(f"TLS 1.{3 - old}: {said}", leaf, tls12=old))
    return worst(tries)


def _versions(audit: Audit) -> list[bool]:
    """The versions to try, each as whether it is TLS 1.2."""
    return [old for old, spoken in ((False, audit.look.tls13), (True, audit.look.tls12)) if spoken] or [False]


def _copied(audit: Audit) -> Spec:
    """The names of a client that is accepted, as far as one is known; else those of the server."""
    credential = audit.means.credential
    source = credential.certificate if credential is not None else audit.look.leaf
    if source is None:
        return Spec(names=("spiffe://audit/web",), subject="web")
    return Spec(subject=source.subject, san=_san(source))


def _impostors(audit: Audit) -> list[TestAuthority]:
    """Authorities with the names of those that the server trusts, as far as they can be known, and other keys."""
    names = list(audit.look.authorities)
    if audit.means.credential is not None:
        names.insert(0, audit.means.credential.certificate.issuer)
    if audit.look.leaf is not None:  # often the same authority
        names.append(audit.look.leaf.issuer)
    return [TestAuthority.root(name) for name in list(dict.fromkeys(names))[:_MOST_IMPOSTORS]]


def _san(certificate: x509.Certificate) -> bytes | None:
    try:
        return certificate.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value.public_bytes()
    except (ValueError, x509.ExtensionNotFound):
        return None


def _like(leaf: TestLeaf) -> PrivateKey:
    """A key of the same kind as the leaf's, and not the leaf's."""
    return generate_key(key_type_of(leaf.key.public_key()) or KeyType.P256)


CHECKS = (
    Check(
        "outsider.no-certificate",
        "A client shows no certificate and sends a request.",
        "The application is not reached without a certificate.",
        Severity.CRITICAL,
        ("RFC 8446 4.4.2.4", "CWE-306"),
        _REQUIRE,
        _no_certificate,
    ),
    Check(
        "outsider.self-signed",
        "A client shows a certificate that it signed itself.",
        "A certificate alone does not open the door; it must lead to a trusted authority.",
        Severity.CRITICAL,
        ("RFC 5280 6.1", "CWE-295"),
        _VERIFY,
        _self_signed,
    ),
    Check(
        "outsider.same-name-other-ca",
        "A client shows an accepted client's names, certified by an impostor with the trusted authority's name.",
        "Authorities are told apart by their keys and not by their names.",
        Severity.CRITICAL,
        ("RFC 5280 6.1.3", "CWE-295"),
        _VERIFY,
        _same_name,
        seconds=40,
    ),
    Check(
        "outsider.spoofed-names",
        "A client shows a certificate with a trusted-sounding CN and SAN (localhost, admin, the server's own name).",
        "Names count only once the chain is verified.",
        Severity.CRITICAL,
        ("RFC 9525 6", "CWE-290"),
        _VERIFY,
        _spoofed,
        seconds=40,
    ),
    Check(
        "outsider.copied-certificate",
        "A client shows an accepted client's certificate, which is public, without holding its key.",
        "The server checks CertificateVerify: who shows a certificate must prove that the key is theirs.",
        Severity.CRITICAL,
        ("RFC 8446 4.4.3", "CWE-347"),
        _UPGRADE,
        _copied_certificate,
        seconds=40,
    ),
    Check(
        "outsider.tampered-signature",
        "A client shows a certificate that was changed after it was signed, with a key that fits the change.",
        "The issuer's signature is checked over the whole certificate.",
        Severity.CRITICAL,
        ("RFC 5280 6.1.3", "CVE-2020-0601", "CWE-347"),
        _UPGRADE,
        _tampered,
        seconds=40,
    ),
    Check(
        "outsider.leaf-as-issuer",
        "A client uses its own good certificate as an authority and issues itself another name.",
        "Only authorities issue: basicConstraints is checked on every issuer of a chain.",
        Severity.CRITICAL,
        ("RFC 5280 6.1.4 (k)", "CVE-2002-0862", "CVE-2021-3450", "CWE-295"),
        _UPGRADE,
        _leaf_as_issuer,
        needs=(Need.CREDENTIAL,),
    ),
    Check(
        "outsider.authority-names",
        "Anybody asks for the list of accepted authorities, which the server sends before it knows who asks.",
        "The names of internal authorities are not told to strangers.",
        Severity.INFO,
        ("RFC 8446 4.2.4", "https://github.com/envoyproxy/envoy/pull/44820", "CWE-200"),
        Remedies(
            handfast="--no-ca-names, unless browsers choose their certificate by the list",
            nginx="new releases: ssl_trusted_certificate alone, which is not sent; older ones send the list",
            haproxy="no-ca-names on the bind line",
            envoy="new releases: validation_context.suppress_client_ca_list: true; older ones send the list",
            apache="SSLCADNRequestFile with an authority whose name may be known",
        ),
        _authority_names,
    ),
)
