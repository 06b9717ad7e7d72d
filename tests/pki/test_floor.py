"""The floor under what others have signed: hashes, keys and signatures, each with its negative twin."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.explain.chain import look_at_chain
from handfast.pki.certificates import extended_usages, usage_text
from handfast.pki.floor import broken_hash, is_signed_by, weak_size
from handfast.pki.verification import Purpose
from tests.support.certs import CLIENT, Ca

ROOT = Ca.root()


def _rsa(bits: int) -> rsa.RSAPublicKey:
    return rsa.RSAPublicNumbers(65537, (1 << bits) - 1).public_key()


@pytest.mark.parametrize(
    ("algorithm", "broken"),
    [
        (hashes.MD5(), "MD5"),
        (hashes.SHA1(), "SHA1"),
        (hashes.SHA256(), ""),
        (hashes.SHA3_256(), ""),
        (None, ""),
    ],
)
def test_a_broken_hash_is_named(algorithm: hashes.HashAlgorithm | None, broken: str) -> None:
    """MD5 and SHA-1 prove nothing; SHA-2, SHA-3 and keys with a hash of their own do."""
    assert broken_hash(algorithm) == broken


@pytest.mark.parametrize(
    ("key", "good"),
    [
        (_rsa(2048), True),
        (_rsa(16384), True),
        (_rsa(2047), False),
        (_rsa(16385), False),
        (ec.generate_private_key(ec.SECP521R1()).public_key(), True),
        (ec.generate_private_key(ec.SECP256K1()).public_key(), False),
        (ed25519.Ed25519PrivateKey.generate().public_key(), True),
        (ed448.Ed448PrivateKey.generate().public_key(), True),
        (mldsa.MLDSA44PrivateKey.generate().public_key(), True),
        (x25519.X25519PrivateKey.generate().public_key(), False),
        (object(), False),
    ],
)
def test_a_key_below_the_floor_is_told(key: object, good: bool) -> None:
    """RSA of 2048 to 16384 bits, the curves that TLS has, Edwards keys and ML-DSA pass, and no other key."""
    assert (weak_size(key) == "") is good


def test_a_signature_is_its_issuers() -> None:
    """The issuer's key stands behind its certificates, and no other key of the same name does."""
    leaf, namesake = ROOT.client().certificate, Ca.root()
    assert is_signed_by(leaf, ROOT.certificate)
    assert not is_signed_by(leaf, namesake.certificate)
    assert not is_signed_by(leaf, leaf)


def test_a_strangers_giant_key_counts_for_nothing() -> None:
    """An RSA key of more than 4096 bits is tried where it was chosen, and not where it was only sent along."""
    giant = Ca.root("Giant", key=rsa.generate_private_key(65537, 4104))
    leaf = giant.client().certificate
    assert is_signed_by(leaf, giant.certificate, any_size=True)
    assert not is_signed_by(leaf, giant.certificate)
    ders = [certificate.public_bytes(Encoding.DER) for certificate in (leaf, giant.certificate)]
    for anchors, good in (((giant.certificate,), True), ((), False)):
        (first, *_) = look_at_chain(ders, Purpose.CLIENT, datetime.now(UTC), anchors, None)[0].checks
        assert (first.what, first.good) == ("signature", good)


def test_what_a_certificate_is_for_is_read() -> None:
    """An extended key usage is read and called by a word; none is not an empty one; an unknown one keeps its number."""
    assert extended_usages(ROOT.client(eku=[CLIENT]).certificate) == (CLIENT,) == (Purpose.CLIENT.usage,)
    assert extended_usages(ROOT.client(eku=None).certificate) is None
    assert usage_text(Purpose.SERVER.usage) == "server"
    assert usage_text(type(CLIENT)("1.2.3")) == "1.2.3"
