"""Requests: the key is checked, the names are read and prove nothing."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Sequence
from contextlib import suppress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, IssuanceRefused, Reason
from handfast.pki.keys import PrivateKey, same_key
from handfast.pki.names import Kind, parse_name
from handfast.pki.requests import parse_csr

EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
RSA = rsa.generate_private_key(65537, 2048)
NAMES = [x509.UniformResourceIdentifier("spiffe://td/web"), x509.DNSName("web.example.com")]


def make_csr(
    key: PrivateKey | ed448.Ed448PrivateKey,
    names: Sequence[x509.GeneralName] = (),
    cn: str | None = None,
    encoding: Encoding = Encoding.DER,
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)] if cn else [])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    edwards = isinstance(key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey))
    return builder.sign(key, None if edwards else hashes.SHA256()).public_bytes(encoding)


def refusal(data: bytes) -> Reason:
    with pytest.raises((InvalidInput, IssuanceRefused)) as caught:
        parse_csr(data, "my.csr")
    return caught.value.reason


@pytest.mark.parametrize("key", [EC, ED, RSA])
@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_a_good_request_is_read(key: PrivateKey, encoding: Encoding) -> None:
    """Key, names in their order, and common name come out of PEM and DER alike."""
    request = parse_csr(make_csr(key, NAMES, "web", encoding), "my.csr")
    assert same_key(request.public_key, key.public_key())
    assert request.names == (parse_name("spiffe://td/web"), parse_name("web.example.com"))
    assert request.common_name == "web"


def test_a_request_may_ask_for_nothing() -> None:
    """Names and common name may be missing; a common name that cannot be shown counts as missing."""
    assert parse_csr(make_csr(EC), "my.csr").names == ()
    assert parse_csr(make_csr(EC), "my.csr").common_name is None
    assert parse_csr(make_csr(EC, cn="a\x00b"), "my.csr").common_name is None


def test_odd_names_are_carried_and_match_nothing() -> None:
    """A name with a NUL, and one of a kind that we do not use, are not lost and not taken for another."""
    odd = [x509.DNSName("a\x00b.example"), x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))]
    names = parse_csr(make_csr(EC, odd), "my.csr").names
    assert [name.kind for name in names] == [Kind.FORBIDDEN, Kind.OPAQUE]


def test_a_request_signed_with_another_key_is_refused() -> None:
    """A changed signature or a changed key is ISSUE_CSR_SIGNATURE; unchanged it passes."""
    for key in (EC, ED, RSA):
        data = make_csr(key, NAMES)
        parse_csr(data, "my.csr")
        assert refusal(data.replace(b"spiffe://td/web", b"spiffe://td/abc")) is Reason.ISSUE_CSR_SIGNATURE
        assert refusal(data[:-1] + bytes([data[-1] ^ 1])) is Reason.ISSUE_CSR_SIGNATURE


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256K1()),
        ed448.Ed448PrivateKey.generate(),
        rsa.generate_private_key(65537, 1024),
        rsa.generate_private_key(3, 2048),
    ],
)
def test_a_weak_key_is_refused(key: PrivateKey | ed448.Ed448PrivateKey) -> None:
    """Keys that `weakness` finds fault with are ISSUE_WEAK_KEY, though the request is signed well."""
    assert refusal(make_csr(key)) is Reason.ISSUE_WEAK_KEY


def test_a_point_off_the_curve_is_refused() -> None:
    """An EC point that is not on its curve never becomes a key (invalid-curve attacks)."""
    point = EC.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    for broken in (point[:-1] + bytes([point[-1] ^ 1]), b"\x04" + bytes(64)):
        assert refusal(make_csr(EC).replace(point, broken)) is Reason.ISSUE_WEAK_KEY


@pytest.mark.parametrize("hash_name", ["md5", "sha1"])
def test_a_broken_hash_is_refused(hash_name: str) -> None:
    """Requests signed with MD5 or SHA-1 are ISSUE_WEAK_HASH; the same with SHA-384 passes."""
    for digest, good in ((hash_name, False), ("sha384", True)):
        made = openssl_csr(f"-{digest}")
        if good:
            parse_csr(made, "my.csr")
        else:
            with pytest.raises(IssuanceRefused) as caught:
                parse_csr(made, "my.csr")
            assert caught.value.reason is Reason.ISSUE_WEAK_HASH
            assert hash_name.upper() in str(caught.value)


def openssl_csr(*options: str) -> bytes:
    key = RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    command = ["openssl", "req", "-new", "-key", "/dev/stdin", "-subj", "/O=Acme/CN=web.example.com", *options]
    return subprocess.run(command, input=key, capture_output=True, check=True).stdout


def test_requests_of_openssl_are_read() -> None:
    """What `openssl req` makes is read, also with PSS signatures and the old PEM label."""
    made = openssl_csr("-addext", "subjectAltName=DNS:web.example.com,IP:10.0.0.1")
    assert parse_csr(made, "my.csr").names == (parse_name("web.example.com"), parse_name("10.0.0.1"))
    assert parse_csr(made.replace(b"CERTIFICATE REQUEST", b"NEW CERTIFICATE REQUEST"), "my.csr").names
    pss = openssl_csr("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32")
    assert parse_csr(pss, "my.csr").common_name == "web.example.com"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x30\x00",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        make_csr(EC)[:-1],
        make_csr(EC) + b"\x00",
        make_csr(EC).replace(b"\x02\x01\x00", b"\x02\x01\x05", 1),  # of a version that there is not
    ],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    """Other bytes are INPUT_NOT_CSR."""
    assert refusal(data) is Reason.INPUT_NOT_CSR


GOOD = make_csr(EC, NAMES, "web")


@pytest.mark.filterwarnings("ignore")  # the library warns of oddities that it still reads
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4), st.booleans())
def test_damage_never_passes(at: int, patch: bytes, pem: bool) -> None:
    """A request with any bytes changed is refused, or was not changed in what counts."""
    data = GOOD[:at] + patch + GOOD[at + len(patch) :]
    if pem:
        body = base64.encodebytes(data)
        data = b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"
    with suppress(InvalidInput, IssuanceRefused):
        request = parse_csr(data, "my.csr")
        assert same_key(request.public_key, EC.public_key())
        assert request.names == (parse_name("spiffe://td/web"), parse_name("web.example.com"))
