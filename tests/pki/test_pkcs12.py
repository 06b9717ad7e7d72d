"""PKCS#12: what goes in comes out with the password, and with nothing else."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, NoEncryption, pkcs12
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, Reason
from handfast.pki.issuing import Issuer, Order, build_certificate, make_serial, sign
from handfast.pki.keys import PrivateKey, same_key
from handfast.pki.names import parse_name
from handfast.pki.pkcs12 import encode_p12, parse_p12
from handfast.pki.profiles import PROFILES

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
CA_KEY = ec.generate_private_key(ec.SECP256R1())
EC = ec.generate_private_key(ec.SECP256R1())
ROOT_ORDER = Order(PROFILES["root"], (), CA_KEY.public_key(), common_name="CA")
ROOT = sign(build_certificate(ROOT_ORDER, None, make_serial(0, bytes(16)), NOW), CA_KEY)


def leaf(key: PrivateKey) -> x509.Certificate:
    order = Order(PROFILES["client"], (parse_name("ann@example.com"),), key.public_key())
    return sign(build_certificate(order, Issuer(ROOT, CA_KEY, ()), make_serial(1, bytes(16)), NOW), CA_KEY)


LEAF = leaf(EC)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [EC, ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)])
def test_key_and_chain_come_out(key: PrivateKey, legacy: bool) -> None:
    """Key and chain come out, leaf first, in both forms; another password or none opens nothing."""
    certificate = leaf(key)
    data = encode_p12("ann", key, [certificate, ROOT], b"secret", legacy)
    found, chain = parse_p12(data, "ann.p12", b"secret")
    assert found is not None
    assert same_key(found.public_key(), key.public_key())
    assert chain == (certificate, ROOT)
    for password in (None, b"", b"Secret", b"\xff"):
        with pytest.raises(InvalidInput) as caught:
            parse_p12(data, "ann.p12", password)
        assert caught.value.reason is Reason.INPUT_NOT_P12


@pytest.mark.parametrize(
    ("legacy", "encryption", "mac"),
    [(False, "PBES2, PBKDF2, AES-256-CBC, Iteration 100000, PRF hmacWithSHA256", "MAC: sha256"),
     (True, "pbeWithSHA1And3-KeyTripleDES-CBC, Iteration 2048", "MAC: sha1")],
)  # fmt: skip
def test_openssl_reads_both_forms(legacy: bool, encryption: str, mac: str) -> None:
    """`openssl pkcs12` opens both, and sees the algorithms that the documents promise."""
    data = encode_p12("ann's laptop", EC, [LEAF, ROOT], b"secret", legacy)
    command = ["openssl", "pkcs12", "-info", "-nodes", "-passin", "pass:secret"]
    shown = subprocess.run(command, input=data, capture_output=True, check=True)
    text = (shown.stdout + shown.stderr).decode()
    assert encryption in text
    assert mac in text
    assert text.count("BEGIN CERTIFICATE") == 2
    assert "friendlyName: ann's laptop" in text


def test_passwords_that_cannot_encrypt_are_refused() -> None:
    """An empty password never means a plain file."""
    for password in (b"", b"\xff"):
        with pytest.raises(InvalidInput) as caught:
            encode_p12("ann", EC, [LEAF], password)
        assert caught.value.reason is Reason.INPUT_BAD_PASSPHRASE


def test_the_chain_belongs_to_the_key() -> None:
    """No chain, or one of another key, is a bug of the caller."""
    for chain in ([], [ROOT]):
        with pytest.raises(ValueError, match=r"."):
            encode_p12("ann", EC, chain, b"secret")


def test_files_of_others_are_read() -> None:
    """A file without a key, or without a password, is read; one with a key that we do not accept is not."""
    trust = pkcs12.serialize_key_and_certificates(None, None, None, [ROOT], BestAvailableEncryption(b"x"))
    assert parse_p12(trust, "trust.p12", b"x") == (None, (ROOT,))
    plain = pkcs12.serialize_key_and_certificates(b"n", EC, LEAF, None, NoEncryption())
    assert parse_p12(plain, "plain.p12", None)[1] == (LEAF,)
    odd = pkcs12.serialize_key_and_certificates(
        None, ed448.Ed448PrivateKey.generate(), None, None, BestAvailableEncryption(b"x")
    )
    with pytest.raises(InvalidInput):
        parse_p12(odd, "odd.p12", b"x")


GOOD = encode_p12("ann", EC, [LEAF], b"secret", legacy=True)


@pytest.mark.filterwarnings("ignore")  # the library warns of oddities that it still reads
@given(st.integers(0, 60), st.binary(min_size=1, max_size=4), st.binary(max_size=100))
def test_parsing_is_total(at: int, patch: bytes, garbage: bytes) -> None:
    """Any bytes are a key and chain or InvalidInput."""
    for data in (garbage, GOOD[:at] + patch + GOOD[at + len(patch) :]):
        with suppress(InvalidInput):
            parse_p12(data, "a.p12", b"secret")
