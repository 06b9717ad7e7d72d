"""Revocation: what is revoked is found, and a list in doubt counts against the certificate."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import Failure, InvalidInput, IssuanceRefused, Reason
from handfast.pki.certificates import encode_chain
from handfast.pki.issuing import Issuer, Order, build_certificate, make_serial, sign
from handfast.pki.keys import PrivateKey
from handfast.pki.names import parse_name
from handfast.pki.profiles import BACKDATE, PROFILES
from handfast.pki.revocation import NO_REVOCATIONS, Revocations, build_crl, check_crls, parse_crls

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = ec.generate_private_key(ec.SECP256R1())
OTHER_KEY = ec.generate_private_key(ec.SECP256R1())
LEAF_KEY = ec.generate_private_key(ec.SECP256R1())


def authority(cn: str = "CA", key: PrivateKey = KEY) -> Issuer:
    order = Order(PROFILES["root"], (), key.public_key(), common_name=cn)
    return Issuer(sign(build_certificate(order, None, make_serial(0, bytes(16)), NOW), key), key, ())


CA, OTHER = authority(), authority("Other", OTHER_KEY)
SAME_NAME = authority("CA", OTHER_KEY)


def leaf(serial: int, issuer: Issuer = CA) -> x509.Certificate:
    order = Order(PROFILES["peer"], (parse_name("spiffe://td/web"),), LEAF_KEY.public_key())
    return sign(build_certificate(order, issuer, make_serial(1, serial.to_bytes(16, "big")), NOW), issuer.key)


ONE, TWO = leaf(1), leaf(2)


def crl(*revoked: x509.Certificate, issuer: Issuer = CA, now: datetime = NOW) -> x509.CertificateRevocationList:
    entries = [(certificate.serial_number, now, "keyCompromise") for certificate in revoked]
    return build_crl(issuer, entries, 1, now, now + DAY)


def judged(*crls: x509.CertificateRevocationList, issuer: Issuer = CA, now: datetime = NOW) -> Failure | None:
    """What the lists have against ONE, the same whether the issuer was known before or not."""
    known = check_crls(crls, [issuer.certificate]).failure(ONE, issuer.certificate, now)
    unknown = check_crls(crls, []).failure(ONE, issuer.certificate, now)
    assert known == unknown
    return known


def invalid(*crls: x509.CertificateRevocationList, issuer: Issuer = CA, now: datetime = NOW) -> str:
    failure = judged(*crls, issuer=issuer, now=now)
    assert failure is not None
    assert failure.reason is Reason.VERIFY_CRL_INVALID
    return str(failure.facts["detail"])


def test_revocations_know_issuer_and_serial() -> None:
    """A serial is revoked for its issuer alone."""
    revocations = Revocations(frozenset({(CA.certificate.subject.public_bytes(), ONE.serial_number)}))
    assert revocations.revoked(ONE)
    assert not revocations.revoked(TWO)
    assert not revocations.revoked(leaf(1, OTHER))
    assert not NO_REVOCATIONS.revoked(ONE)


def test_a_list_tells_revoked_from_good() -> None:
    """A certificate on its issuer's list is VERIFY_REVOKED, with its serial; one that is not on it passes."""
    failure = judged(crl(ONE))
    assert failure is not None
    assert failure.reason is Reason.VERIFY_REVOKED
    assert failure.facts == {"subject": "spiffe://td/web", "serial": f"{ONE.serial_number:x}"}
    assert judged(crl(TWO)) is None
    assert judged(crl()) is None


def test_a_missing_list_is_a_failure() -> None:
    """With lists given, an issuer without one is VERIFY_CRL_MISSING."""
    for crls in ([], [crl(issuer=OTHER)]):
        failure = judged(*crls)
        assert failure is not None
        assert failure.reason is Reason.VERIFY_CRL_MISSING


def test_a_stale_list_is_a_failure() -> None:
    """Past its next update a list is VERIFY_CRL_STALE; what it revoked stays VERIFY_REVOKED."""
    assert judged(crl(), now=NOW + DAY) is None
    stale = judged(crl(), now=NOW + DAY + timedelta(seconds=1))
    assert stale is not None
    assert stale.reason is Reason.VERIFY_CRL_STALE
    assert stale.facts["next_update"] == NOW + DAY
    revoked = judged(crl(ONE), now=NOW + 9 * DAY)
    assert revoked is not None
    assert revoked.reason is Reason.VERIFY_REVOKED


def test_a_list_from_the_future_is_invalid() -> None:
    """A list dated after now proves a wrong clock somewhere; a minute of difference is allowed for."""
    assert "future" in invalid(crl(), now=NOW - BACKDATE - timedelta(seconds=1))
    assert judged(crl(), now=NOW - BACKDATE) is None


def test_a_list_signed_by_another_is_invalid() -> None:
    """A forged list of the issuer's name does not count, and does not push aside the real one."""
    forged = crl(issuer=SAME_NAME, now=NOW + timedelta(hours=1))
    assert "not signed" in invalid(forged)
    failure = judged(forged, crl(ONE), now=NOW + timedelta(hours=2))
    assert failure is not None
    assert failure.reason is Reason.VERIFY_REVOKED


def test_two_authorities_of_one_name_have_their_own_lists() -> None:
    """After a new key under the old name, each key's list answers for the certificates of that key."""
    lists = check_crls([crl(ONE), crl(issuer=SAME_NAME)], [CA.certificate, SAME_NAME.certificate])
    assert lists.failure(ONE, SAME_NAME.certificate, NOW) is None
    failure = lists.failure(ONE, CA.certificate, NOW)
    assert failure is not None
    assert failure.reason is Reason.VERIFY_REVOKED


def test_the_newest_list_counts() -> None:
    """Of several lists the newest is used, in whatever order they come."""
    old, new = crl(), crl(ONE, now=NOW + timedelta(hours=1))
    for lists in ([old, new], [new, old]):
        failure = judged(*lists, now=NOW + timedelta(hours=2))
        assert failure is not None
        assert failure.reason is Reason.VERIFY_REVOKED


def handmade(
    *extensions: tuple[x509.ExtensionType, bool],
    entry: tuple[x509.ExtensionType, bool] | None = None,
    key: PrivateKey = KEY,
) -> x509.CertificateRevocationList:
    builder = x509.CertificateRevocationListBuilder().issuer_name(CA.certificate.subject)
    builder = builder.last_update(NOW).next_update(NOW + DAY)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    if entry is not None:
        one = x509.RevokedCertificateBuilder().serial_number(5).revocation_date(NOW).add_extension(*entry).build()
        builder = builder.add_revoked_certificate(one)
    return builder.sign(key, hashes.SHA256())


def point(**options: bool) -> x509.IssuingDistributionPoint:
    flags = dict.fromkeys(
        (
            "only_contains_user_certs",
            "only_contains_ca_certs",
            "indirect_crl",
            "only_contains_attribute_certs",
        ),
        False,
    )
    where = [x509.UniformResourceIdentifier("http://x/crl")]
    return x509.IssuingDistributionPoint(where, None, only_some_reasons=None, **(flags | options))


@pytest.mark.parametrize(
    "extension", [point(), point(indirect_crl=True), point(only_contains_ca_certs=True), x509.DeltaCRLIndicator(1)]
)
def test_a_partial_indirect_or_delta_list_is_invalid(extension: x509.ExtensionType) -> None:
    """A list that is not of all the issuer's certificates cannot say that one is good (RFC 5280 5.2.4, 5.2.5)."""
    assert "critical" in invalid(handmade((extension, True)))
    assert judged(handmade((x509.CRLNumber(1), False))) is None
    assert judged(handmade((extension, True)), crl()) is None


def test_a_critical_entry_extension_is_invalid() -> None:
    """An entry of another issuer makes the list an indirect one (RFC 5280 5.3.3)."""
    issuer = x509.CertificateIssuer([x509.DirectoryName(OTHER.certificate.subject)])
    assert "critical" in invalid(handmade(entry=(issuer, True)))
    assert judged(handmade(entry=(x509.CRLReason(x509.ReasonFlags.superseded), False))) is None


def test_bytes_that_only_look_critical_do_no_harm() -> None:
    """A serial that holds the octets of BOOLEAN TRUE is not taken for a critical extension."""
    serial = int.from_bytes(b"\x40\x01\x01\xff\x01\x01\xff", "big")
    assert judged(build_crl(CA, [(serial, NOW, None)], 1, NOW, NOW + DAY)) is None


def test_a_list_signed_with_sha1_is_invalid() -> None:
    """SHA-1 can be made to collide, so a list signed with it proves nothing."""
    key = rsa.generate_private_key(65537, 2048)
    issuer = authority(key=key)
    good = handmade(key=key)
    assert judged(good, issuer=issuer) is None
    # sha256WithRSAEncryption and sha1WithRSAEncryption differ in one octet (RFC 8017 A.2.4).
    oid = bytes.fromhex("2a864886f70d0101")
    data = good.public_bytes(Encoding.DER).replace(oid + b"\x0b", oid + b"\x05")
    tbs = x509.load_der_x509_crl(data).tbs_certlist_bytes
    weak = x509.load_der_x509_crl(data[:-256] + key.sign(tbs, padding.PKCS1v15(), hashes.SHA1()))
    assert "SHA1" in invalid(weak, issuer=issuer)


def issuer_with(*extensions: x509.ExtensionType) -> Issuer:
    name = CA.certificate.subject
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + DAY)
    for extension in extensions:
        builder = builder.add_extension(extension, True)
    return Issuer(builder.sign(KEY, hashes.SHA256()), KEY, ())


def test_an_issuer_that_may_not_sign_lists_does_not() -> None:
    """Key usage without cRLSign makes a list invalid and is not signed with; no key usage at all allows both."""
    barred = issuer_with(x509.KeyUsage(True, False, False, False, False, True, False, False, False))
    assert "may not sign" in invalid(crl(), issuer=barred)
    with pytest.raises(IssuanceRefused) as caught:
        crl(issuer=barred)
    assert caught.value.reason is Reason.ISSUE_ISSUER_LIMITED
    free = issuer_with()
    assert judged(crl(issuer=free), issuer=free) is None


def test_an_issuer_that_cannot_be_read_fails() -> None:
    """An issuer with a broken extension is a failure, not an exception."""
    odd = issuer_with(x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.15"), b"\x30\x05"))
    assert "cannot be read" in invalid(crl(), issuer=odd)


@pytest.mark.parametrize("key", [KEY, ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())])
@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_what_we_build_is_read_again(key: PrivateKey, encoding: Encoding) -> None:
    """Number, dates, entries with reasons and the key identifier survive writing and reading."""
    issuer = authority(key=key)
    entries = [(1, NOW - DAY, None), (2**140, NOW, "keyCompromise"), (3, NOW, "certificateHold")]
    data = build_crl(issuer, entries, 42, NOW, NOW + DAY).public_bytes(encoding)
    (found,) = parse_crls(data, "a.crl")
    assert found.is_signature_valid(issuer.certificate.public_key())  # type: ignore[arg-type]  # a signing key
    assert (found.last_update_utc, found.next_update_utc) == (NOW - BACKDATE, NOW + DAY)
    assert found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 42
    reasons = [entry.extensions.get_extension_for_class(x509.CRLReason).value.reason for entry in found[1:]]
    assert [(entry.serial_number, entry.revocation_date_utc) for entry in found] == [e[:2] for e in entries]
    assert reasons == [x509.ReasonFlags.key_compromise, x509.ReasonFlags.certificate_hold]
    assert not list(found[0].extensions)
    certificate = leaf(9, issuer).extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    assert found.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value == certificate.value


def test_an_unknown_reason_is_the_callers_bug() -> None:
    """A reason that RFC 5280 does not know is not written."""
    with pytest.raises(ValueError, match="boredom"):
        build_crl(CA, [(1, NOW, "boredom")], 1, NOW, NOW + DAY)


def test_openssl_reads_our_lists(tmp_path: Path) -> None:
    """`openssl verify -crl_check` accepts the good leaf and refuses the revoked one, by our list."""
    (tmp_path / "ca").write_bytes(encode_chain([CA.certificate]))
    (tmp_path / "crl").write_bytes(crl(ONE).public_bytes(Encoding.PEM))
    command = ["openssl", "verify", "-attime", str(int(NOW.timestamp())), "-crl_check", "-CAfile", "ca"]
    for certificate, text in ((ONE, "certificate revoked"), (TWO, "leaf: OK")):
        (tmp_path / "leaf").write_bytes(encode_chain([certificate]))
        shown = subprocess.run(
            [*command, "-CRLfile", "crl", "leaf"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert text in shown.stdout + shown.stderr


def test_several_lists_in_one_file() -> None:
    """PEM files may hold lists of several issuers, among other blocks."""
    parts = [crl().public_bytes(Encoding.PEM), encode_chain([ONE]), crl(issuer=OTHER).public_bytes(Encoding.PEM)]
    found = parse_crls(b"".join(parts), "a.crl")
    assert [one.issuer for one in found] == [CA.certificate.subject, OTHER.certificate.subject]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x30\x00",
        encode_chain([ONE]),
        crl().public_bytes(Encoding.PEM)[:-40],
        crl().public_bytes(Encoding.PEM) + crl().public_bytes(Encoding.PEM)[:-40],
        crl().public_bytes(Encoding.DER)[:-1],
        crl().public_bytes(Encoding.DER).replace(b"\x02\x01\x01", b"\x02\x01\x05", 1),  # of no known version
        b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
    ],
)
def test_what_is_no_list_is_refused(data: bytes) -> None:
    """Other files, and files that were cut short, are INPUT_NOT_CRL."""
    with pytest.raises(InvalidInput) as caught:
        parse_crls(data, "a.crl")
    assert caught.value.reason is Reason.INPUT_NOT_CRL


GOOD = crl(ONE, TWO).public_bytes(Encoding.DER)


@pytest.mark.filterwarnings("ignore")  # the library warns of oddities that it still reads
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4))
def test_a_damaged_list_never_clears_a_certificate(at: int, patch: bytes) -> None:
    """Whatever bytes of a list are changed, it is refused or what it revokes stays revoked; nothing else is raised."""
    with suppress(InvalidInput):
        lists = parse_crls(GOOD[:at] + patch + GOOD[at + len(patch) :], "a.crl")
        assert check_crls(lists, [CA.certificate]).failure(ONE, CA.certificate, NOW) is not None


def test_lookup_does_not_grow_with_the_list() -> None:
    """A list is read once: 2000 questions to 20 000 entries are answered well within the time of a test."""
    many = build_crl(CA, ((n, NOW, None) for n in range(1, 20_001)), 1, NOW, NOW + DAY)
    lists = check_crls([many], [CA.certificate])
    for _ in range(2000):
        assert lists.failure(TWO, CA.certificate, NOW) is None
