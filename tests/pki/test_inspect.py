"""Inspection: what is in a file is said, what is wrong with it too, and no secret is shown."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, Reason
from handfast.pki.certificates import encode_chain, fingerprint
from handfast.pki.inspect import describe, render
from handfast.pki.issuing import Issuer, Order, build_certificate, make_serial, sign
from handfast.pki.keys import encode_private_key
from handfast.pki.names import parse_name
from handfast.pki.pkcs12 import encode_p12
from handfast.pki.profiles import PROFILES
from handfast.pki.revocation import build_crl

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)
CA_KEY, KEY = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
ROOT_ORDER = Order(
    PROFILES["root"], (), CA_KEY.public_key(), common_name="Test CA", permitted=(parse_name("example.com"),)
)
ROOT = sign(build_certificate(ROOT_ORDER, None, make_serial(0, bytes(16)), NOW), CA_KEY)
CA = Issuer(ROOT, CA_KEY, ())
ORDER = Order(PROFILES["peer"], (parse_name("spiffe://td/web"), parse_name("a.example.com")), KEY.public_key())
LEAF = sign(build_certificate(ORDER, CA, make_serial(1, bytes(16)), NOW), CA_KEY)
CRL = build_crl(CA, [(1, NOW, None), (255, NOW, "superseded")], 7, NOW, NOW + DAY)
CSR = (
    x509.CertificateSigningRequestBuilder()
    .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "web")]))
    .add_extension(x509.SubjectAlternativeName([x509.DNSName("a.example.com")]), False)
    .sign(KEY, hashes.SHA256())
)
LEAF_FACTS = {
    "type": "certificate",
    "names": ["spiffe://td/web", "dns:a.example.com"],
    "subject": "",
    "issuer": "CN=Test CA",
    "serial": "400100000000000000000000000000000000",
    "not_before": "2026-11-21T11:59:00+00:00",
    "not_after": "2026-11-22T12:00:00+00:00",
    "key": "P-256",
    "signature_hash": "sha384",
    "ca": False,
    "key_usages": ["digital signature"],
    "purposes": ["server", "client"],
    "path_length": None,
    "other_extensions": [],
    "sha256": fingerprint(LEAF),
    "warnings": [],
}


def one(data: bytes, password: bytes | None = None) -> dict[str, object]:
    (found,) = describe(data, "my.file", password)
    json.dumps(found)
    return found


def warnings(data: bytes, password: bytes | None = None) -> str:
    found = one(data, password)["warnings"]
    assert isinstance(found, list)
    return "; ".join(found)


def der(thing: x509.Certificate | x509.CertificateSigningRequest | x509.CertificateRevocationList) -> bytes:
    return thing.public_bytes(Encoding.DER)


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_a_leaf_is_described(encoding: Encoding) -> None:
    """Everything a person asks of a certificate is there, and a good one has no warnings."""
    found = one(LEAF.public_bytes(encoding))
    assert {key: found[key] for key in LEAF_FACTS} == LEAF_FACTS
    assert set(found) - set(LEAF_FACTS) == {"key_id", "issuer_key_id"}


def test_an_authority_is_described() -> None:
    """An authority shows its path length and name constraints, and ours has no warnings."""
    found = one(der(ROOT))
    assert (found["ca"], found["path_length"], found["warnings"]) == (True, 1, [])
    assert found["permitted_names"] == ["dns:example.com"]
    assert found["excluded_names"] == ["ip:0.0.0.0/0", "ip:::/0"]
    assert found["key_usages"] == ["key cert sign", "crl sign"]


def test_requests_and_lists_are_described() -> None:
    """Requests and revocation lists show what they hold."""
    request = one(der(CSR))
    assert (request["type"], request["names"], request["subject"]) == ("request", ["dns:a.example.com"], "CN=web")
    assert request["warnings"] == []
    crl = one(der(CRL))
    assert (crl["type"], crl["issuer"], crl["number"]) == ("revocation list", "CN=Test CA", 7)
    assert (crl["revoked"], crl["first_serials"]) == (2, ["01", "ff"])
    assert crl["next_update"] == "2026-11-22T12:00:00+00:00"


def secrets_of(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> list[str]:
    numbers = key.private_numbers()
    values = [numbers.private_value] if isinstance(numbers, ec.EllipticCurvePrivateNumbers) else [numbers.d, numbers.p]
    return [text for value in values for text in (str(value), f"{value:x}", f"{value:X}")]


@pytest.mark.parametrize("key", [KEY, rsa.generate_private_key(65537, 2048)])
@pytest.mark.parametrize("passphrase", [None, b"secret"])
def test_a_private_key_is_never_shown(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, passphrase: bytes | None
) -> None:
    """Of a private key only its kind and the public half's hash are shown, opened or not."""
    data = encode_private_key(key, passphrase, rounds=1)
    found = one(data, passphrase)
    assert found["type"] == "private key"
    assert found["encrypted"] is (passphrase is not None)
    assert found["key"] in ("P-256", "RSA 2048")
    p12 = encode_p12("n", KEY, [LEAF], b"secret")
    for shown in (json.dumps([*describe(p12, "p", b"secret"), found]), render([found]), repr(found)):
        for text in [*secrets_of(key), *secrets_of(KEY), "secret"]:
            assert text not in shown


def test_an_encrypted_key_is_told_from_a_plain_one() -> None:
    """Without its passphrase an encrypted key is only said to be one; with a wrong one that is said too."""
    data = encode_private_key(KEY, b"secret", rounds=1)
    assert one(data) == {"type": "private key", "encrypted": True}
    assert "does not open" in warnings(data, b"wrong")
    der_key = load_pem_private_key(data, b"secret").private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    assert one(der_key)["encrypted"] is False


def test_a_public_key_hashes_as_its_private_key_does() -> None:
    """Key, request and public key of one pair show the same hash, so that they can be compared."""
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    hashed = one(encode_private_key(KEY))["public_key_sha256"]
    assert one(public)["sha256"] == one(der(CSR))["public_key_sha256"] == hashed
    assert one(encode_private_key(CA_KEY))["public_key_sha256"] != hashed


def test_pkcs12_is_described() -> None:
    """With the password, key and certificates; without, that it is one; with a wrong one, INPUT_NOT_P12."""
    data = encode_p12("web", KEY, [LEAF, ROOT], b"secret")
    assert describe(data, "my.p12") == [{"type": "pkcs12", "encrypted": True}]
    found = describe(data, "my.p12", b"secret")
    assert [fact["type"] for fact in found] == ["pkcs12", "certificate", "certificate"]
    assert found[1]["names"] == LEAF_FACTS["names"]
    with pytest.raises(InvalidInput) as caught:
        describe(data, "my.p12", b"wrong")
    assert caught.value.reason is Reason.INPUT_NOT_P12


def test_a_file_of_many_things_is_described_in_order() -> None:
    """Every PEM block is described in its place, and a broken one does not hide the others."""
    broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    data = b"text before\n" + encode_chain([LEAF]) + broken + b"text\n" + encode_private_key(KEY)
    data += CSR.public_bytes(Encoding.PEM) + CRL.public_bytes(Encoding.PEM) + broken.replace(b"CERTIFICATE", b"PKCS7")
    found = describe(data, "all.pem")
    kinds = ["certificate", "certificate", "private key", "request", "revocation list", "pkcs7"]
    assert [fact["type"] for fact in found] == kinds
    assert "cannot be read" in str(found[1]["warnings"])
    assert "not understood" in str(found[5]["warnings"])


def handmade(
    *extensions: tuple[x509.ExtensionType, bool],
    cn: str = "x",
    issuer: str = "Test CA",
    days: int = 10,
    serial: int = 1,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = KEY,
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])
    issuer_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer_name).public_key(key.public_key())
    builder = builder.serial_number(serial).not_valid_before(NOW).not_valid_after(NOW + days * DAY)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return der(builder.sign(CA_KEY, hashes.SHA256()))


def usage(*, signs: bool, shakes: bool) -> tuple[x509.ExtensionType, bool]:
    return x509.KeyUsage(shakes, False, False, False, False, signs, False, False, False), True


URI = x509.UniformResourceIdentifier
EKU = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False
CA_EXTENSION = x509.BasicConstraints(True, None)


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        (handmade(EKU), "names nobody"),
        (handmade((x509.SubjectAlternativeName([x509.DNSName("a")]), False)), "does not say what it is for"),
        (handmade((x509.SubjectAlternativeName([x509.DNSName("a\x00b")]), False)), "no certificate may carry"),
        (handmade((x509.SubjectAlternativeName([URI("spiffe://td")]), False)), "no path"),
        (handmade((x509.SubjectAlternativeName([URI("spiffe://t/a"), URI("u:x")]), False)), "several URI names"),
        (handmade(cn="a\x00b"), "no certificate may carry"),
        (handmade(EKU, days=900), "825 days"),
        (handmade(usage(signs=True, shakes=True)), "may sign for one"),
        (handmade(usage(signs=False, shakes=False)), "does not allow digital signatures"),
        (handmade(), "no authority key identifier"),
        (handmade((CA_EXTENSION, True)), "without key usage"),
        (handmade((CA_EXTENSION, True)), "without subject key identifier"),
        (handmade((CA_EXTENSION, False)), "not critical"),
        (handmade((CA_EXTENSION, True), usage(signs=False, shakes=True)), "does not allow signing certificates"),
        (handmade(key=rsa.generate_private_key(65537, 1024)), "too weak"),
        (handmade((x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), b"\x30\x05"), True)), "extensions"),
    ],
)
def test_what_a_strict_verifier_would_dislike(data: bytes, warning: str) -> None:
    """Each fault is warned of; a certificate of ours has none of them."""
    assert warning in warnings(data)
    assert warning not in warnings(der(LEAF)) + warnings(der(ROOT))


def test_unknown_extensions_are_listed() -> None:
    """Extensions that we do not read are named, critical ones marked; also where none can be parsed."""
    odd = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    assert one(handmade((odd, True)))["other_extensions"] == ["1.2.3.4 (critical)"]
    broken = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.15"), b"\x30\x05")
    assert one(handmade((odd, False), (broken, True)))["other_extensions"] == ["1.2.3.4", "2.5.29.15 (critical)"]


def test_files_of_openssl_are_described() -> None:
    """A certificate made by `openssl req -x509` is described, with its weaknesses."""
    command = ["openssl", "req", "-x509", "-key", "/dev/stdin", "-sha1", "-subj", "/O=Acme/CN=CA"]
    made = subprocess.run(command, input=encode_private_key(KEY), capture_output=True, check=True).stdout
    found = one(made)
    assert (found["subject"], found["ca"], found["signature_hash"]) == ("CN=CA,O=Acme", True, "sha1")
    assert "without key usage" in warnings(made)


def test_weak_requests_and_keys_are_warned_of() -> None:
    """A request that would be refused, and a key that is too weak, say so."""
    assert "not signed by its own key" in warnings(der(CSR).replace(b"a.example.com", b"b.example.com"))
    small = rsa.generate_private_key(65537, 1024)
    assert "too weak" in warnings(encode_private_key(small))
    edwards = ed448.Ed448PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert "cannot be read" in warnings(edwards)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x30\x00", b"-----BEGIN", b"-----BEGIN X-----\n", bytes(1000)])
def test_other_files_are_refused(data: bytes) -> None:
    """A file that holds nothing of ours is INPUT_UNKNOWN_FILE."""
    with pytest.raises(InvalidInput) as caught:
        describe(data, "my.file")
    assert caught.value.reason is Reason.INPUT_UNKNOWN_FILE


P12 = encode_p12("n", KEY, [LEAF], b"secret", legacy=True)
SAMPLES = [der(LEAF), der(ROOT), der(CSR), der(CRL), encode_chain([LEAF]), encode_private_key(KEY), P12]


@pytest.mark.filterwarnings("ignore")  # the library warns of oddities that it still reads
@given(st.sampled_from(SAMPLES), st.integers(0, 700), st.binary(max_size=4), st.binary(max_size=200))
def test_describing_is_total(sample: bytes, at: int, patch: bytes, garbage: bytes) -> None:
    """Whatever bytes are given, the answer is JSON that can be shown, or InvalidInput."""
    for data in (sample[:at] + patch + sample[at + len(patch) :], garbage):
        with suppress(InvalidInput):
            found = describe(data, "my.file", b"secret")
            json.dumps(found)
            assert render(found).replace("\n", "").isprintable()


def test_the_rendering_is_for_people() -> None:
    """One paragraph an object, no empty lines of facts, warnings marked."""
    text = render(describe(encode_chain([LEAF]) + handmade_pem(), "my.file"))
    first, second = text.split("\n\n")
    assert first.startswith("certificate\n  names:")
    assert "spiffe://td/web, dns:a.example.com" in first
    assert "subject:" not in first
    assert "  ca:                   no" in first
    assert "  !" not in first
    assert "  ! it has no subject alternative name" in second


def handmade_pem() -> bytes:
    return encode_chain([x509.load_der_x509_certificate(handmade())])


def test_names_cannot_steer_a_terminal() -> None:
    """Escape sequences and direction marks in certificates are shown escaped."""
    text = render(describe(handmade(cn="\x1b[2J\u202eevil", issuer="\x1b]0;x\x07"), "my.file"))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b" in text
