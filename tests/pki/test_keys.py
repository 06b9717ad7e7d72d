"""Keys: which are accepted, and why the others are not."""

from __future__ import annotations

import subprocess
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from handfast.errors import InvalidInput, Reason
from handfast.pki.keys import (
    KeyType,
    PrivateKey,
    encode_private_key,
    key_id,
    key_type_of,
    parse_private_key,
    same_key,
    weakness,
)

EC = ec.generate_private_key(ec.SECP256R1())
EC384 = ec.generate_private_key(ec.SECP384R1())
ED = ed25519.Ed25519PrivateKey.generate()
RSA = rsa.generate_private_key(65537, 2048)
KEYS: list[PrivateKey] = [EC, EC384, ED, RSA]

SMALL_PRIMES = [n for n in range(2, 168) if all(n % d for d in range(2, n))]
PRIMORIAL = 1
for prime in SMALL_PRIMES:
    PRIMORIAL *= prime


def rsa_public(n: int, e: int = 65537) -> rsa.RSAPublicKey:
    return rsa.RSAPublicNumbers(e, n).public_key()


def without_small_factor(start: int, step: int) -> int:
    """The first n of start, start + step, ... that has no factor below 752."""
    n = start
    while any(n % d == 0 for d in range(2, 752)):
        n += step
    return n


def next_prime(n: int) -> int:
    n |= 1
    while any(n % d == 0 for d in range(3, 2000, 2)) or pow(2, n - 1, n) != 1:
        n += 2
    return n


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_we_make_are_not_weak(key: PrivateKey) -> None:
    """Keys of the types that are issued for pass."""
    assert weakness(key.public_key()) is None
    assert key_type_of(key.public_key()) is not None


def test_rsa_sizes() -> None:
    """RSA passes from 2048 to 8192 bits in whole bytes, and not below, above or between."""
    for bits in (2048, 2056, 3072, 4096, 8192):
        assert weakness(rsa_public(without_small_factor((1 << (bits - 1)) + (1 << 900) + 1, 2))) is None, bits
    for bits in (1024, 2040, 2047, 2049, 2050, 8200, 16384):
        found = weakness(rsa_public(without_small_factor((1 << (bits - 1)) + (1 << 900) + 1, 2)))
        assert found is not None, bits
        assert f"{bits} bits" in found


@pytest.mark.parametrize("e", [3, 17, 257, 65535, (1 << 32) + 1])
def test_rsa_exponents_out_of_range_are_weak(e: int) -> None:
    """An RSA exponent below 65537, or that does not fit 32 bits, is refused; the largest that fits is not."""
    n = RSA.public_key().public_numbers().n
    assert "exponent" in (weakness(rsa_public(n, e)) or "")
    assert weakness(rsa_public(n, (1 << 32) - 1)) is None


def test_rsa_with_a_small_factor_is_weak() -> None:
    """A modulus with a factor below 752 is refused; one whose least factor is larger passes this check."""
    for factor in (3, 7, 751):
        cofactor = without_small_factor((1 << 2047) // factor + (1 << 800) | 1, 2)
        assert "small factor" in (weakness(rsa_public(factor * cofactor)) or ""), factor
    assert weakness(rsa_public(757 * without_small_factor((1 << 2047) // 757 + (1 << 800) | 1, 2))) is None


def test_rsa_of_the_broken_generator_is_weak() -> None:
    """A modulus that is a power of 65537 modulo all small primes is refused as ROCA; its neighbour is not."""
    start = pow(65537, 0x1234567, PRIMORIAL) + PRIMORIAL * ((1 << 2047) // PRIMORIAL + (1 << 700))
    n = without_small_factor(start, PRIMORIAL)
    assert n.bit_length() == 2048
    assert "ROCA" in (weakness(rsa_public(n)) or "")
    assert weakness(rsa_public(without_small_factor(n + 2, 2))) is None


def test_rsa_with_close_primes_is_weak() -> None:
    """Primes that lie together are found by Fermat's method; those of a sound key are not."""
    p = next_prime((3 << 1022) + 98765)
    q = next_prime(p + 2)
    assert "close together" in (weakness(rsa_public(p * q)) or "")
    assert "close together" in (weakness(rsa_public(p * p)) or "")
    assert weakness(rsa_public(p * next_prime(p + (1 << 900)))) is None


@pytest.mark.parametrize("curve", [ec.SECP256K1(), ec.SECP224R1(), ec.BrainpoolP256R1()])
def test_other_curves_are_weak(curve: ec.EllipticCurve) -> None:
    """Curves that TLS stacks do not share are refused, and have no type; P-521 is sound but not issued for."""
    key = ec.generate_private_key(curve).public_key()
    assert curve.name in (weakness(key) or "")
    assert key_type_of(key) is None
    p521 = ec.generate_private_key(ec.SECP521R1()).public_key()
    assert weakness(p521) is None
    assert key_type_of(p521) is None


def test_other_kinds_are_weak() -> None:
    """What is not on the list of accepted kinds is weak, whatever it is."""
    parameters = dsa.DSAParameterNumbers(p=(1 << 2047) + 1, q=(1 << 255) + 1, g=2)
    for key in (ed448.Ed448PrivateKey.generate().public_key(), parameters, None, "key", EC):
        assert "kind" in (weakness(key) or "")


ED_PRIME = 2**255 - 19
# RFC 8032 5.1.7 with the points of order 1, 2, 4, 8 (libsodium's list), and y that are p or more.
SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
]


@pytest.mark.parametrize("raw", SMALL_ORDER)
def test_ed25519_points_of_small_order_are_weak(raw: str) -> None:
    """A key under which one signature fits any message is refused."""
    assert "small order" in (weakness(ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(raw))) or "")


@pytest.mark.parametrize("y", [2, ED_PRIME, ED_PRIME + 1, 2**255 - 1])
def test_ed25519_points_off_the_curve_are_weak(y: int) -> None:
    """32 bytes that encode no point (RFC 8032 5.1.3) are refused."""
    key = ed25519.Ed25519PublicKey.from_public_bytes(y.to_bytes(32, "little"))
    assert "not on the curve" in (weakness(key) or "")


@given(st.binary(min_size=32, max_size=32))
def test_ed25519_weakness_is_total(seed: bytes) -> None:
    """Every key made from a seed passes; every 32 bytes get an answer."""
    assert weakness(ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key()) is None
    weakness(ed25519.Ed25519PublicKey.from_public_bytes(seed))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_every_form_of_a_key_is_read(key: PrivateKey, encoding: Encoding, form: PrivateFormat) -> None:
    """PKCS#8, PKCS#1 and SEC 1 are read, PEM and DER, also with a passphrase that is not needed."""
    if form is PrivateFormat.TraditionalOpenSSL and key is ED:
        return  # RFC 8410 knows PKCS#8 alone
    data = key.private_bytes(encoding, form, NoEncryption())
    for passphrase in (None, b"not needed"):
        assert same_key(parse_private_key(data, "k", passphrase).public_key(), key.public_key())


def test_a_key_among_other_blocks_is_found() -> None:
    """A key behind its certificate or its curve's parameters, as openssl writes them, is read."""
    made = subprocess.run(["openssl", "ecparam", "-genkey", "-name", "prime256v1"], capture_output=True, check=True)
    assert b"EC PARAMETERS" in made.stdout
    assert key_type_of(parse_private_key(made.stdout, "k").public_key()) is KeyType.P256


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "neither PEM nor DER"),
        (b"garbage", "neither PEM nor DER"),
        (b"\x30\x00", "neither PEM nor DER"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "damaged"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds a certificate"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "ssh-keygen"),
        (b"-----BEGIN EC PARAMETERS-----\nAAAA\n-----END EC PARAMETERS-----\n", "damaged"),
        (
            ed448.Ed448PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "neither EC, Ed25519 nor RSA",
        ),
        (EC.public_key().public_bytes(Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo), "a public key"),
    ],
)
def test_what_is_no_key_is_refused_with_what_it_is(data: bytes, detail: str) -> None:
    """Other files are INPUT_NOT_KEY, and the message says what they are."""
    with pytest.raises(InvalidInput) as caught:
        parse_private_key(data, "my.key")
    assert caught.value.reason is Reason.INPUT_NOT_KEY
    assert detail in caught.value.facts["detail"]
    assert "my.key" in str(caught.value)


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_parsing_is_total(garbage: bytes, at: int, patch: bytes) -> None:
    """Any bytes, and any damage to a good key, are a key or InvalidInput."""
    good = encode_private_key(EC)
    der = EC.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    for data in (garbage, good[:at] + patch + good[at + len(patch) :], der[:at] + patch + der[at + len(patch) :]):
        with suppress(InvalidInput):
            parse_private_key(data, "k", b"pass")


@pytest.mark.parametrize("key", KEYS)
def test_an_encrypted_key_opens_with_its_passphrase_alone(key: PrivateKey) -> None:
    """Encrypted keys ask for the passphrase, open with the right one, and with no other."""
    data = encode_private_key(key, b"open sesame", rounds=1000)
    assert data.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    assert same_key(parse_private_key(data, "k", b"open sesame").public_key(), key.public_key())
    for passphrase, reason in (
        (None, Reason.INPUT_KEY_ENCRYPTED),
        (b"", Reason.INPUT_WRONG_PASSPHRASE),
        (b"open sesame ", Reason.INPUT_WRONG_PASSPHRASE),
    ):
        with pytest.raises(InvalidInput) as caught:
            parse_private_key(data, "k", passphrase)
        assert caught.value.reason is reason


def test_encryption_is_what_it_says() -> None:
    """openssl reads the encrypted key, and sees PBES2, AES-256-CBC, HMAC-SHA256 and the rounds."""
    data = encode_private_key(EC, b"open sesame")
    shown = subprocess.run(["openssl", "asn1parse"], input=data, capture_output=True, check=True).stdout.decode()
    for text in ("PBES2", "PBKDF2", "hmacWithSHA256", "aes-256-cbc", "0927C0"):  # 600 000
        assert text in shown
    opened = subprocess.run(
        ["openssl", "pkey", "-passin", "pass:open sesame"], input=data, capture_output=True, check=True
    )
    assert same_key(parse_private_key(opened.stdout, "k").public_key(), EC.public_key())


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
@settings(max_examples=30)
def test_any_text_is_a_passphrase(text: str) -> None:
    """Whatever text a person chooses encrypts, and opens what it encrypted."""
    data = encode_private_key(EC, text.encode(), rounds=1)
    assert same_key(parse_private_key(data, "k", text.encode()).public_key(), EC.public_key())


@pytest.mark.parametrize("passphrase", [b"", b"\xff\xfe"])
def test_a_passphrase_that_cannot_encrypt_is_refused(passphrase: bytes) -> None:
    """An empty passphrase never means a plain key."""
    with pytest.raises(InvalidInput) as caught:
        encode_private_key(EC, passphrase)
    assert caught.value.reason is Reason.INPUT_BAD_PASSPHRASE


def test_same_key_and_key_id() -> None:
    """A key is the same as itself read again, and no other; its id is openssl's subject key identifier."""
    again = parse_private_key(encode_private_key(EC), "k")
    assert same_key(EC.public_key(), again.public_key())
    assert not same_key(EC.public_key(), EC384.public_key())
    assert not same_key(EC.public_key(), RSA.public_key())
    command = ["openssl", "req", "-x509", "-key", "/dev/stdin", "-subj", "/CN=x", "-days", "2"]
    made = subprocess.run(command, input=encode_private_key(EC), capture_output=True, check=True).stdout
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-ext", "subjectKeyIdentifier"], input=made, capture_output=True, check=True
    ).stdout
    assert key_id(EC.public_key()).hex(":").upper() in shown.decode()
