"""The public test kit: good leaves are good, every flaw is refused for its own reason, and files are what they say."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from handfast.errors import Reason
from handfast.files import generate_key
from handfast.pki.keys import KeyType
from handfast.testing import Flaw, Spec, TestAuthority, TestLeaf, make, resign, shake_hands, tampered
from handfast.tls.probe import ProbeRefused
from handfast.tls.server import Accepted, Refused
from tests.support.programs import must, run

# Flaw -> why a guard refuses it. None: the engine shows no such certificate, so no server gets to judge it.
REASONS = {
    Flaw.EXPIRED: Reason.VERIFY_EXPIRED,
    Flaw.NOT_YET_VALID: Reason.VERIFY_NOT_YET_VALID,
    Flaw.SERVER_ONLY: Reason.VERIFY_PURPOSE,
    Flaw.NO_EKU: Reason.VERIFY_NO_EKU,
    Flaw.NO_NAME: Reason.VERIFY_NO_NAME,
    Flaw.CA_AS_LEAF: Reason.VERIFY_CA_AS_LEAF,
    Flaw.LEAF_AS_ISSUER: Reason.VERIFY_NOT_A_CA,
    Flaw.SELF_SIGNED: Reason.VERIFY_UNKNOWN_ISSUER,
    Flaw.OTHER_AUTHORITY: Reason.VERIFY_BAD_SIGNATURE,
    Flaw.TAMPERED: Reason.VERIFY_BAD_SIGNATURE,
    Flaw.WRONG_KEY: None,
    Flaw.WEAK_KEY: Reason.VERIFY_WEAK_KEY,
    Flaw.WEAK_CURVE: None,
    Flaw.SHA1: Reason.VERIFY_WEAK_HASH,
    Flaw.MD5: Reason.VERIFY_WEAK_HASH,
    Flaw.HUGE_KEY: None,
    Flaw.HUGE_ISSUER_KEY: Reason.VERIFY_UNKNOWN_ISSUER,
    Flaw.NUL_IN_NAME: Reason.VERIFY_FORBIDDEN_NAME,
    Flaw.CONTROL_IN_NAME: Reason.VERIFY_FORBIDDEN_NAME,
    Flaw.NUL_IN_SUBJECT: Reason.VERIFY_FORBIDDEN_NAME,
    Flaw.NUL_BEHIND_NAME: Reason.VERIFY_FORBIDDEN_NAME,
    Flaw.TWO_URIS: Reason.VERIFY_SVID_NAMES,
    Flaw.URI_AS_DNS: Reason.VERIFY_FORBIDDEN_NAME,
    Flaw.URI_AS_OTHER_NAME: Reason.VERIFY_NO_NAME,
    Flaw.LONG_NAME: Reason.VERIFY_FORBIDDEN_NAME,
    Flaw.CRITICAL_EXTENSION: Reason.VERIFY_CRITICAL_EXTENSION,
    Flaw.TWICE: Reason.VERIFY_MALFORMED,
    Flaw.PATH_LENGTH: Reason.VERIFY_PATH_LENGTH,
    Flaw.NAME_CONSTRAINT: Reason.VERIFY_NAME_CONSTRAINT,
    Flaw.NOT_A_CA: Reason.VERIFY_NOT_A_CA,
    Flaw.LONG_CHAIN: Reason.VERIFY_CHAIN_TOO_LONG,
}


@pytest.fixture(scope="module")
def authority() -> TestAuthority:
    return TestAuthority.root()


@pytest.fixture(scope="module")
def issuer(authority: TestAuthority) -> TestAuthority:
    return authority.sub(path_length=0)


def test_good_leaves_are_accepted(authority: TestAuthority, issuer: TestAuthority) -> None:
    """A client's leaf is taken, from the root and from an authority below it, by the name that it was given."""
    for maker in (authority, issuer):
        outcome = shake_hands(authority, maker.client("spiffe://test/ann"))
        assert isinstance(outcome, Accepted)
        assert outcome.peer is not None
        assert str(outcome.peer.identity.name) == "spiffe://test/ann"


def test_nobody_is_refused(authority: TestAuthority) -> None:
    """Without a certificate the handshake in memory ends as with a guard."""
    outcome = shake_hands(authority, None)
    assert isinstance(outcome, Refused)
    assert outcome.failures[0].reason is Reason.VERIFY_NO_CERTIFICATE


@pytest.mark.parametrize("flaw", [flaw for flaw in Flaw if flaw is not Flaw.HUGE_NAMES])
def test_every_flaw_is_refused_for_its_own_reason(authority: TestAuthority, flaw: Flaw) -> None:
    """Each bad certificate is refused for what is wrong with it, and for nothing before that."""
    reason = REASONS[flaw]
    bad = authority.flawed(flaw, "spiffe://test/web")
    if flaw is Flaw.WRONG_KEY:
        with pytest.raises(ProbeRefused):
            shake_hands(authority, bad)
        return
    outcome = shake_hands(authority, bad)
    assert isinstance(outcome, Refused)
    assert outcome.failures[0].reason is (reason or Reason.VERIFY_NO_CERTIFICATE)


def test_a_thousand_names_are_a_load_and_no_lie(authority: TestAuthority) -> None:
    """HUGE_NAMES is the one flaw that a right server may take."""
    bad = authority.flawed(Flaw.HUGE_NAMES)
    assert len(bad.presented[0]) > 50_000
    assert isinstance(shake_hands(authority, bad), Accepted)


@pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.ED25519, KeyType.RSA2048])
@pytest.mark.parametrize("flaw", [Flaw.MD5, Flaw.SHA1, Flaw.TAMPERED, Flaw.TWICE, Flaw.LEAF_AS_ISSUER])
def test_flaws_do_not_hang_on_the_authority_s_key(key_type: KeyType, flaw: Flaw) -> None:
    """The hand-made certificates are made by authorities of every kind, and refused for the same reason."""
    outcome = shake_hands(
        (made := TestAuthority.root(key=generate_key(key_type))), made.flawed(flaw, "spiffe://test/web")
    )
    assert isinstance(outcome, Refused)
    assert outcome.failures[0].reason is REASONS[flaw]


@pytest.mark.parametrize(
    ("flaw", "complaint"),
    [
        (Flaw.EXPIRED, "certificate has expired"),
        (Flaw.NOT_YET_VALID, "not yet valid"),
        (Flaw.SERVER_ONLY, "unsuitable certificate purpose"),
        (Flaw.SELF_SIGNED, "self-signed certificate"),
        (Flaw.TAMPERED, "signature failure"),
        (Flaw.CRITICAL_EXTENSION, "unhandled critical extension"),
        (Flaw.PATH_LENGTH, "path length constraint exceeded"),
        (Flaw.NAME_CONSTRAINT, "permitted subtree violation"),
        (Flaw.NOT_A_CA, "invalid CA certificate"),
        (Flaw.LEAF_AS_ISSUER, "invalid CA certificate"),
    ],
)
def test_openssl_sees_the_same_flaw(authority: TestAuthority, tmp_path: Path, flaw: Flaw, complaint: str) -> None:
    """`openssl verify` refuses it in the words for that flaw; and takes a good leaf."""
    ca = authority.save(tmp_path)
    for leaf, wanted in ((authority.flawed(flaw), complaint), (authority.client(), "OK")):
        cert, _ = leaf.save(tmp_path, "leaf")
        words = ("verify", "-purpose", "sslclient", "-CAfile", ca, "-untrusted", cert, cert)
        done = run("openssl", *words, folder=tmp_path)
        assert wanted in done.stdout + done.stderr
        assert (done.returncode == 0) is (wanted == "OK")


def test_files_are_what_they_say(authority: TestAuthority, issuer: TestAuthority, tmp_path: Path) -> None:
    """The chain is PEM, leaf first; the key is PEM that only its owner may read, and belongs to the leaf."""
    cert, key = issuer.client().save(tmp_path, "web")
    chain = x509.load_pem_x509_certificates(cert.read_bytes())
    private = load_pem_private_key(key.read_bytes(), None)
    assert [one.subject for one in chain] == [x509.Name([]), issuer.certificate.subject]
    assert private.public_key() == chain[0].public_key()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "Test Root" in must(
        "openssl", "x509", "-in", authority.save(tmp_path), "-noout", "-subject", folder=tmp_path
    )


def test_a_twin_has_the_name_and_not_the_key(authority: TestAuthority) -> None:
    """An impostor differs from the authority in nothing that is a name."""
    twin = authority.twin()
    assert twin.certificate.subject == authority.certificate.subject
    assert twin.certificate.public_key() != authority.certificate.public_key()


def test_a_tampered_leaf_can_prove_its_key(authority: TestAuthority) -> None:
    """The forgery holds the key that it shows: only the issuer's signature gives it away."""
    forged = tampered(authority.client())
    assert forged.key.public_key() == forged.certificate.public_key()


def test_a_weak_hash_signs(authority: TestAuthority, tmp_path: Path) -> None:
    """What is signed over SHA-1 is a true signature: openssl at security level 0 takes it."""
    cert, _ = authority.flawed(Flaw.SHA1).save(tmp_path, "sha1")
    ca = authority.save(tmp_path)
    words = ("verify", "-CAfile", ca, cert)
    assert "OK" in must("openssl", *words[:1], "-auth_level", "0", *words[1:], folder=tmp_path)
    assert run("openssl", *words[:1], "-auth_level", "2", *words[1:], folder=tmp_path).returncode != 0


def test_ed25519_has_no_weak_hash() -> None:
    """There is no Ed25519 signature over SHA-1 to be made."""
    leaf = TestAuthority.root().client()
    with pytest.raises(ValueError, match="Ed25519"):
        resign(leaf.presented[0], generate_key(KeyType.ED25519), "sha1")


def test_pytest_collects_none_of_it() -> None:
    """Names that begin with Test are no tests where users import them."""
    assert TestAuthority.__test__ is TestLeaf.__test__ is False


def test_what_is_asked_for_is_made() -> None:
    """A spec is followed, sound or not: a leaf may say that it is an authority and last for no time at all."""
    made = make(Spec(names=("a.test", "10.0.0.1", "a@b.test"), ca=True, subject="x", eku=None), None).certificate
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [type(name) for name in names] == [x509.DNSName, x509.IPAddress, x509.RFC822Name]
    assert made.issuer == made.subject
