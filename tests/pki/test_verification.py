"""Verification without a network: every acceptance with its negative twin, every refusal with its reason."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from handfast.errors import Reason, VerificationFailed
from handfast.pki import Identity, Purpose, Terms, TrustBundle, VerifiedPeer, verify
from handfast.pki.names import Kind, Name, parse_name
from handfast.pki.revocation import Revocations, build_crl, check_crls
from handfast.pki.verification import MAX_CHAIN, Judgement, still_trusted
from handfast.tls.judge import judge_offline
from tests.support.certs import CLIENT, DAY, SERVER, Ca, Leaf

NOW = datetime.now(UTC)
ROOT = Ca.root()
OTHER = Ca.root("Other Root")


def _terms(purpose: Purpose = Purpose.CLIENT, **terms: Any) -> Terms:
    return Terms(TrustBundle((ROOT.certificate,), terms.pop("trust_domain", None)), purpose, **terms)


def _verify(leaf: Leaf, terms: Terms | None = None, now: datetime = NOW) -> VerifiedPeer:
    terms = terms or _terms()
    return verify(leaf.presented, terms, now, judge_offline(leaf.presented, terms.bundle, now))


def _reasons(leaf: Leaf, terms: Terms | None = None, now: datetime = NOW) -> list[str]:
    with pytest.raises(VerificationFailed) as refused:
        _verify(leaf, terms, now)
    return [failure.reason.code for failure in refused.value.failures]


def test_a_good_chain_gives_the_peer() -> None:
    """A good leaf is accepted, as its SPIFFE ID under its anchor."""
    peer = _verify(ROOT.client("spiffe://test/web"))
    assert str(peer.identity) == "spiffe://test/web"
    assert peer.identity.authority.startswith("sha256:")
    assert peer.path[-1] == ROOT.certificate
    assert peer.not_after == peer.leaf.not_valid_after_utc


def test_a_chain_of_another_authority_is_refused() -> None:
    """The same leaf under another root is refused."""
    with pytest.raises(VerificationFailed) as refused:
        _verify(OTHER.client("spiffe://test/web"))
    assert refused.value.reason is Reason.VERIFY_UNKNOWN_ISSUER


def test_the_first_of_two_certificates_for_one_issuer_is_followed() -> None:
    """Behind the leaf any order will do, but of two certificates for its issuer the first decides, if time allows."""
    key = ec.generate_private_key(ec.SECP256R1())
    ours, theirs = ROOT.sub("Issuer", key=key), OTHER.sub("Issuer", key=key)
    past = OTHER.sub("Issuer", key=key, not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    deep = ours.sub("Deep")
    leaf, below = ours.client().certificate, deep.client().certificate
    good = [
        (leaf, ours.certificate, theirs.certificate),
        (leaf, past.certificate, ours.certificate),
        (below, ours.certificate, deep.certificate),
    ]
    for chain in good:
        peer = verify(chain, _terms(), NOW, judge_offline(chain, _terms().bundle, NOW))
        assert peer.path[-2:] == (ours.certificate, ROOT.certificate)
    chain = (leaf, theirs.certificate, ours.certificate)
    with pytest.raises(VerificationFailed) as refused:
        verify(chain, _terms(), NOW, judge_offline(chain, _terms().bundle, NOW))
    assert refused.value.reason is Reason.VERIFY_UNKNOWN_ISSUER


def test_a_certificate_that_openssl_cannot_read_is_refused() -> None:
    """Text that is not UTF-8, which `cryptography` loads and OpenSSL does not, is a refusal and no other error."""
    octets = ROOT.client(cn="caf\u00e9").certificate.public_bytes(Encoding.DER)
    damaged = x509.load_der_x509_certificate(octets.replace(b"caf\xc3\xa9", b"caf\xff\xff"))
    judgement = judge_offline((damaged,), _terms().bundle, NOW)
    assert judgement == Judgement((), "OpenSSL cannot read one of the certificates")
    with pytest.raises(VerificationFailed):
        verify((damaged,), _terms(), NOW, judgement)
    assert judge_offline(ROOT.client().presented, TrustBundle((damaged,)), NOW).path == ()


def test_nobody_else_makes_a_verified_peer() -> None:
    """A VerifiedPeer cannot be built by hand."""
    identity = Identity("x", Name(Kind.DNS, "x"))
    with pytest.raises(TypeError, match="only"):
        VerifiedPeer(identity, (), (), NOW, (), proof=object())


def test_our_rules_hold_against_a_judge_that_says_yes() -> None:
    """A judge that accepts everything lets no leaf through that our rules refuse."""
    leaf = ROOT.client(eku=[SERVER])
    with pytest.raises(VerificationFailed) as refused:
        verify(leaf.presented, _terms(), NOW, Judgement((leaf.certificate, ROOT.certificate)))
    assert refused.value.reason is Reason.VERIFY_PURPOSE


def test_a_judge_that_says_no_is_never_overturned() -> None:
    """A chain in which our diagnosis finds nothing is still refused if the judge refused it."""
    with pytest.raises(VerificationFailed) as refused:
        verify(ROOT.client().presented, _terms(), NOW, Judgement((), "some reason"))
    assert refused.value.reason is Reason.VERIFY_JUDGE


CASES: dict[str, tuple[Callable[[], Leaf], str]] = {
    "expired": (lambda: ROOT.client(not_before=NOW - 2 * DAY, not_after=NOW - DAY), "verify.expired"),
    "future": (lambda: ROOT.client(not_before=NOW + DAY, not_after=NOW + 2 * DAY), "verify.not_yet_valid"),
    "no_eku": (lambda: ROOT.client(eku=None), "verify.no_eku"),
    "server": (lambda: ROOT.client(eku=[SERVER]), "verify.purpose"),
    "any": (lambda: ROOT.client(eku=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), "verify.purpose"),
    "ca": (lambda: ROOT.client(ca=True), "verify.ca_as_leaf"),
    "no_name": (lambda: ROOT.leaf(cn="admin"), "verify.no_name"),
    "two_uris": (lambda: ROOT.leaf("https://a.example/", "https://b.example/"), "verify.svid_names"),
    "bare_spiffe": (lambda: ROOT.client("spiffe://test"), "verify.forbidden_name"),
    "cert_sign": (lambda: ROOT.client(key_usage=False, extra=[(_usage("key_cert_sign"), True)]), "verify.ca_as_leaf"),
    "control": (lambda: ROOT.client(cn="a\x7fb"), "verify.forbidden_name"),
    "weak_key": (lambda: ROOT.client(key=rsa.generate_private_key(65537, 1024)), "verify.weak_key"),
    "curve": (lambda: ROOT.client(key=ec.generate_private_key(ec.SECP256K1())), "verify.weak_key"),
    "self_signed": (lambda: Leaf(Ca.root("Self").certificate, None), "verify.unknown_issuer"),
    "no_digital_signature": (lambda: ROOT.client(key_usage=False, extra=[(_usage(), True)]), "verify.key_usage"),
    "path_length": (lambda: ROOT.sub(path_length=0).sub("Deep").client(), "verify.path_length"),
    "leaf_issuer": (lambda: _below_a_leaf(), "verify.not_a_ca"),
    "no_cert_sign": (lambda: ROOT.sub(key_usage=False, extra=[(_usage(), True)]).client(), "verify.key_usage"),
    "expired_issuer": (lambda: ROOT.sub(not_before=NOW - 9 * DAY, not_after=NOW - DAY).client(), "verify.expired"),
    "constraint_dns": (
        lambda: _constrained(x509.DNSName("good.example")).leaf("evil.example"),
        "verify.name_constraint",
    ),
    "constraint_uri": (
        lambda: _constrained(x509.UniformResourceIdentifier("good")).client("spiffe://evil/x"),
        "verify.name_constraint",
    ),
    "critical": (lambda: ROOT.client(extra=[(_unknown(), True)]), "verify.critical_extension"),
    "altered": (lambda: _altered(ROOT.client()), "verify.bad_signature"),
}


def _usage(only: str = "key_encipherment") -> x509.KeyUsage:
    flags = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    flags += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{flag: flag == only for flag in flags})


def _unknown() -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")


def _constrained(base: x509.GeneralName) -> Ca:
    return ROOT.sub(extra=[(x509.NameConstraints([base], None), True)])


def _below_a_leaf() -> Leaf:
    leaf = ROOT.client()
    return Ca(leaf.certificate, leaf.key, (leaf.certificate,)).client("spiffe://test/evil")


def _altered(leaf: Leaf) -> Leaf:
    der = bytearray(leaf.certificate.public_bytes(Encoding.DER))
    at = der.index(b"spiffe://test/web") + len(b"spiffe://test/")
    der[at : at + 3] = b"adm"
    return Leaf(x509.load_der_x509_certificate(bytes(der)), leaf.key)


@pytest.mark.parametrize("case", CASES)
def test_each_fault_has_its_reason(case: str) -> None:
    """A leaf or chain with one fault is refused for that fault, first or among all that were found."""
    make, code = CASES[case]
    assert code in _reasons(make())


@pytest.mark.parametrize(
    ("base", "name"),
    [(x509.DNSName("good.example"), "a.good.example"), (x509.UniformResourceIdentifier("good"), "spiffe://good/web")],
)
def test_a_name_within_the_constraints_is_accepted(base: x509.GeneralName, name: str) -> None:
    """An authority that is held to names vouches for those, of hosts and of URIs alike."""
    assert str(_verify(_constrained(base).client(name)).identity).endswith(name)


def test_a_sha1_signature_is_refused(tmp_path: Path) -> None:
    """A leaf signed with SHA-1 is refused for it (openssl makes it: `cryptography` will not)."""
    ca, ca_key = Leaf(ROOT.certificate, ROOT.key).save(tmp_path, "ca")
    leaf = tmp_path / "leaf.crt"
    config = tmp_path / "extensions"
    config.write_text("extendedKeyUsage=clientAuth\nsubjectAltName=URI:spiffe://test/web\n")
    for command in (
        f"req -new -newkey rsa:2048 -nodes -keyout {tmp_path}/k -subj / -out {tmp_path}/csr",
        f"x509 -req -sha1 -in {tmp_path}/csr -CA {ca} -CAkey {ca_key} -set_serial 7 -extfile {config} -out {leaf}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    made = x509.load_pem_x509_certificate(leaf.read_bytes())
    assert "verify.weak_hash" in _reasons(Leaf(made, None))


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()])
def test_other_good_keys_are_accepted(key: Any) -> None:
    """P-384 and Ed25519 are as good as P-256."""
    assert _verify(ROOT.client(key=key)).identity.name.kind is Kind.SPIFFE


def test_every_reason_is_given_at_once() -> None:
    """An expired server certificate without a name is refused for all three."""
    leaf = ROOT.leaf(cn="x", eku=[SERVER], not_before=NOW - 2 * DAY, not_after=NOW - DAY)
    assert {"verify.expired", "verify.purpose", "verify.no_name"} <= set(_reasons(leaf))


def test_an_empty_chain_is_no_certificate() -> None:
    """Nothing presented is its own reason."""
    with pytest.raises(VerificationFailed) as refused:
        verify((), _terms(), NOW, judge_offline((), _terms().bundle, NOW))
    assert refused.value.reason is Reason.VERIFY_NO_CERTIFICATE


def test_a_hundred_certificates_are_refused_unread() -> None:
    """A chain longer than the limit is refused before any signature is looked at."""
    leaf = ROOT.client()
    assert _reasons(Leaf(leaf.certificate, None, (ROOT.certificate,) * 100)) == ["verify.chain_too_long"]
    assert MAX_CHAIN == 10


def test_time_is_what_is_handed_in() -> None:
    """The same chain is good now and expired later; the end of the path's first certificate counts."""
    sub = ROOT.sub(not_after=(NOW + timedelta(hours=1)).replace(microsecond=0))
    leaf = sub.client()
    assert _verify(leaf).not_after == sub.certificate.not_valid_after_utc
    assert "verify.expired" in _reasons(leaf, now=NOW + timedelta(hours=2))


def test_legacy_certificates_are_named_by_their_cn() -> None:
    """Without EKU and SAN a certificate is refused, and with `legacy` admitted under its common name."""
    leaf = ROOT.leaf(cn="client", eku=None, key_usage=False)
    assert _reasons(leaf) == ["verify.no_eku", "verify.no_name"]
    assert str(_verify(leaf, _terms(legacy=True)).identity) == "cn:client"


def test_legacy_admits_no_wrong_purpose() -> None:
    """A certificate that says it is for servers is refused as a client's, legacy or not."""
    assert "verify.purpose" in _reasons(ROOT.client(eku=[SERVER]), _terms(legacy=True))


def test_a_trust_domain_binds_the_issuer() -> None:
    """An authority of one trust domain cannot vouch for a name of another."""
    leaf = ROOT.client("spiffe://test/web")
    assert _verify(leaf, _terms(trust_domain="test")).identity.authority == "test"
    assert _reasons(leaf, _terms(trust_domain="elsewhere")) == ["verify.trust_domain"]


@pytest.mark.parametrize(
    ("names", "expected", "good"),
    [
        (("api.example",), "api.example", True),
        (("api.example",), "www.example", False),
        (("*.example.com",), "a.example.com", True),
        (("*.example.com",), "a.b.example.com", False),
        (("*.example.com",), "example.com", False),
        (("127.0.0.1",), "127.0.0.1", True),
        (("127.0.0.1",), "127.0.0.2", False),
        (("spiffe://test/api",), "spiffe://test/api", True),
        (("spiffe://test/api",), "spiffe://test/api2", False),
    ],
)
def test_a_server_is_checked_for_its_name(names: tuple[str, ...], expected: str, good: bool) -> None:
    """The expected name must be among the certificate's, a wildcard standing for one label."""
    terms = _terms(Purpose.SERVER, name=parse_name(expected))
    leaf = ROOT.server(*names)
    if good:
        assert _verify(leaf, terms)
    else:
        assert _reasons(leaf, terms) == ["verify.name_mismatch"]


def test_a_revoked_leaf_is_refused() -> None:
    """A serial in the set is refused for it; its neighbour is not."""
    bad, good = ROOT.client(), ROOT.client()
    revoked = Revocations(frozenset({(bad.certificate.issuer.public_bytes(), bad.certificate.serial_number)}))
    assert _reasons(bad, _terms(revocations=revoked)) == ["verify.revoked"]
    assert _verify(good, _terms(revocations=revoked))


def test_a_revoked_intermediate_is_refused() -> None:
    """What an issuer that was revoked signed is refused too."""
    sub = ROOT.sub()
    key = (sub.certificate.issuer.public_bytes(), sub.certificate.serial_number)
    assert _reasons(sub.client(), _terms(revocations=Revocations(frozenset({key})))) == ["verify.revoked"]


def test_revocation_lists_fail_closed() -> None:
    """With lists in use, an issuer without one is refused, and so is a stale or forged one."""
    from handfast.pki.issuing import Issuer

    def crl(ca: Ca, serials: list[int], due: timedelta) -> x509.CertificateRevocationList:
        issuer = Issuer(ca.certificate, ca.key, ())
        return build_crl(issuer, [(serial, NOW, None) for serial in serials], 1, NOW - DAY, NOW + due)

    good, bad = ROOT.client(), ROOT.client()
    fresh = check_crls([crl(ROOT, [bad.certificate.serial_number], DAY)], [ROOT.certificate])
    assert _verify(good, _terms(crls=fresh))
    assert _reasons(bad, _terms(crls=fresh)) == ["verify.revoked"]
    assert _reasons(ROOT.sub().client(), _terms(crls=fresh)) == ["verify.crl_missing"]
    stale = check_crls([crl(ROOT, [], -timedelta(hours=1))], [ROOT.certificate])
    assert _reasons(good, _terms(crls=stale)) == ["verify.crl_stale"]
    forged = check_crls([crl(Ca.root("Test Root"), [], DAY)], [ROOT.certificate])
    assert _reasons(good, _terms(crls=forged))[0] in ("verify.crl_invalid", "verify.crl_missing")


def test_a_peer_stays_only_while_it_is_trusted() -> None:
    """A peer that was verified may stay; not after its end, its revocation, or the loss of its authority."""
    peer = _verify(ROOT.client())
    assert still_trusted(peer, _terms(), NOW) is None
    late = still_trusted(peer, _terms(), peer.not_after)
    assert late is not None
    assert late.reason is Reason.ENDED_EXPIRED
    key = (peer.leaf.issuer.public_bytes(), peer.leaf.serial_number)
    revoked = still_trusted(peer, _terms(revocations=Revocations(frozenset({key}))), NOW)
    assert revoked is not None
    assert revoked.reason is Reason.ENDED_REVOKED
    elsewhere = still_trusted(peer, Terms(TrustBundle((OTHER.certificate,)), Purpose.CLIENT), NOW)
    assert elsewhere is not None
    assert elsewhere.reason is Reason.VERIFY_UNKNOWN_ISSUER


def test_san_kinds_are_not_confused() -> None:
    """A host in a URI or email entry, or a URI in a host's place, does not make that host's identity."""
    leaf = ROOT.leaf("admin@api.example", eku=[SERVER])
    assert _reasons(leaf, _terms(Purpose.SERVER, name=parse_name("api.example"))) == ["verify.name_mismatch"]


def test_both_purposes_fit_either_use() -> None:
    """A peer certificate is good as a client's and as a server's."""
    leaf = ROOT.client(eku=[CLIENT, SERVER])
    assert _verify(leaf)
    assert _verify(leaf, _terms(Purpose.SERVER))


GOOD_DER = ROOT.client().certificate.public_bytes(Encoding.DER)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD_DER) - 1), st.integers(0, 255))
def test_verification_is_total_over_damage(at: int, octet: int) -> None:
    """With any one byte changed, a certificate loads and is judged, or does not load; nothing else is raised."""
    damaged = bytearray(GOOD_DER)
    damaged[at] = octet
    try:
        certificate = x509.load_der_x509_certificate(bytes(damaged))
    except (ValueError, x509.InvalidVersion):
        return
    if bytes(damaged) == GOOD_DER:
        return
    for judgement in (judge_offline((certificate,), _terms().bundle, NOW), Judgement((), "no")):
        with pytest.raises(VerificationFailed):
            verify((certificate,), _terms(), NOW, judgement)
