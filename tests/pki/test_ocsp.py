"""OCSP: a good answer counts, and every answer in doubt is refused for its own reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.ocsp import OCSPCertStatus, OCSPResponderEncoding, OCSPResponseBuilder, OCSPResponseStatus
from cryptography.x509.oid import AuthorityInformationAccessOID as Access
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import Reason, RemoteProtocolError
from handfast.pki.ocsp import (
    MAX_ANSWER,
    SKEW,
    UNDATED,
    Answer,
    Question,
    Status,
    build_request,
    read_answer,
    responders,
)
from tests.support.certs import CLIENT, DAY, Ca, Leaf

NOW = datetime.now(UTC).replace(microsecond=0)
HOUR, SECOND = timedelta(hours=1), timedelta(seconds=1)
SIGNING = [ExtendedKeyUsageOID.OCSP_SIGNING]

ROOT = Ca.root()
CA = ROOT.sub()
SAME_NAME = ROOT.sub(key=ec.generate_private_key(ec.SECP256R1()))  # called as CA is, with another key
LEAF, OTHER = CA.client(), CA.client("spiffe://test/other")
DELEGATE = CA.leaf(cn="Responder", eku=SIGNING)
QUESTION = Question(LEAF.certificate, CA.certificate, bytes(range(32)))


@dataclass(frozen=True)
class Made:
    """What goes into an answer; the defaults make a good one that the issuer signs."""

    about: Leaf = field(default_factory=lambda: LEAF)
    issuer: Ca = field(default_factory=lambda: CA)
    status: OCSPCertStatus = OCSPCertStatus.GOOD
    this: datetime = NOW - SECOND
    next: datetime | None = NOW + HOUR
    signer: Leaf = field(default_factory=lambda: Leaf(CA.certificate, CA.key))
    by: OCSPResponderEncoding = OCSPResponderEncoding.HASH
    hash: Any = field(default_factory=hashes.SHA256)
    id_hash: Any = field(default_factory=hashes.SHA1)
    brings: tuple[Leaf, ...] = ()
    extra: tuple[tuple[x509.ExtensionType, bool], ...] = ()

    def der(self) -> bytes:
        revoked = self.status is OCSPCertStatus.REVOKED
        builder = OCSPResponseBuilder().add_response(
            *(self.about.certificate, self.issuer.certificate, self.id_hash, self.status, self.this, self.next),
            *(NOW - HOUR if revoked else None, x509.ReasonFlags.key_compromise if revoked else None),
        )
        builder = builder.responder_id(self.by, self.signer.certificate)
        if self.brings:
            builder = builder.certificates([leaf.certificate for leaf in self.brings])
        for extension, critical in self.extra:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.signer.key, self.hash).public_bytes(Encoding.DER)


def by(delegate: Leaf, **more: Any) -> Made:
    """An answer that a delegate signs and brings its certificate with."""
    return Made(signer=delegate, brings=(delegate,), **more)


def delegated(**spec: Any) -> Leaf:
    return CA.leaf(**({"cn": "Responder", "eku": SIGNING} | spec))


def refused(data: bytes, question: Question = QUESTION, now: datetime = NOW) -> str:
    """Why an answer is refused."""
    with pytest.raises(RemoteProtocolError) as caught:
        read_answer(data, question, now)
    assert caught.value.reason is Reason.VERIFY_OCSP_INVALID
    assert caught.value.facts["subject"] == "spiffe://test/web"
    return str(caught.value.facts["detail"])


GOOD = {
    "by_the_issuer": Made(),
    "responder_by_name": Made(by=OCSPResponderEncoding.NAME),
    "by_a_delegate": by(DELEGATE),
    "by_a_delegate_named": by(DELEGATE, by=OCSPResponderEncoding.NAME),
    "by_a_delegate_without_check": by(delegated(extra=[(x509.OCSPNoCheck(), False)])),
    "delegate_behind_others": replace(by(DELEGATE), brings=(OTHER, DELEGATE)),
    "id_by_sha256": Made(id_hash=hashes.SHA256()),
    "id_by_sha512": Made(id_hash=hashes.SHA512()),
    "nonce": Made(extra=((x509.OCSPNonce(QUESTION.nonce), False),)),
    "nonce_critical": Made(extra=((x509.OCSPNonce(QUESTION.nonce), True),)),
    "rsa": by(delegated(key=rsa.generate_private_key(65537, 2048))),
    "ed25519": by(delegated(key=ed25519.Ed25519PrivateKey.generate()), hash=None),
    "mldsa": by(delegated(key=mldsa.MLDSA44PrivateKey.generate()), hash=None),
    "clock_behind": Made(this=NOW + SKEW),
    "clock_ahead": Made(this=NOW - HOUR, next=NOW - SKEW),
    "critical_bytes_in_the_nonce": Made(extra=((x509.OCSPNonce(b"\x01\x01\xff"), False),)),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_good_answer_counts_until_it_says(case: str) -> None:
    """An answer of the issuer or its delegate, about the certificate and of now, says that it is good."""
    question = replace(QUESTION, nonce=b"") if case == "critical_bytes_in_the_nonce" else QUESTION
    assert read_answer(GOOD[case].der(), question, NOW) == Answer(Status.GOOD, GOOD[case].next or NOW)


BAD: dict[str, tuple[Made, str]] = {
    "other_authority": (Made(signer=Leaf(ROOT.certificate, ROOT.key)), "neither the issuer nor a delegate"),
    "same_name_other_key": (
        Made(signer=Leaf(SAME_NAME.certificate, SAME_NAME.key), by=OCSPResponderEncoding.NAME),
        "its signature is not its signer's",
    ),
    "signed_but_not_named": (
        Made(signer=Leaf(ROOT.sub("Elsewhere", key=CA.key).certificate, CA.key), by=OCSPResponderEncoding.NAME),
        "neither the issuer nor a delegate",
    ),
    "delegate_not_brought": (Made(signer=DELEGATE), "neither the issuer nor a delegate"),
    "delegate_beyond_the_bound": (replace(by(DELEGATE), brings=(*[OTHER] * 4, DELEGATE)), "neither the issuer nor"),
    "delegate_without_eku": (by(delegated(eku=None)), "may not sign OCSP answers"),
    "delegate_with_other_eku": (by(delegated(eku=[CLIENT])), "may not sign OCSP answers"),
    "delegate_with_any_eku": (
        by(delegated(eku=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])),
        "may not sign OCSP answers",
    ),
    "delegate_of_another": (by(ROOT.leaf(cn="Responder", eku=SIGNING)), "not certified by the issuer"),
    "delegate_of_the_same_name": (by(SAME_NAME.leaf(cn="Responder", eku=SIGNING)), "not certified by the issuer"),
    "delegate_expired": (by(delegated(not_before=NOW - 2 * DAY, not_after=NOW - SECOND)), "is not valid now"),
    "delegate_not_yet": (by(delegated(not_before=NOW + SECOND)), "is not valid now"),
    "delegate_that_may_not_sign": (by(delegated(ca=True)), "its signer's key may not sign"),
    "delegate_not_understood": (
        by(delegated(extra=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)])),
        "critical extension that is not understood (1.2.3.4)",
    ),
    "weak_rsa": (by(delegated(key=rsa.generate_private_key(65537, 1024))), "kind or size that is not accepted"),
    "stale": (Made(this=NOW - DAY, next=NOW - SKEW - SECOND), "it is stale"),
    "stale_undated": (Made(this=NOW - UNDATED - SKEW - SECOND, next=None), "it is stale"),
    "future": (Made(this=NOW + SKEW + SECOND), "dated in the future"),
    "other_serial": (Made(about=OTHER), "about another certificate"),
    "other_issuer_of_the_same_name": (Made(issuer=SAME_NAME), "about another certificate"),
    "other_issuer": (Made(issuer=ROOT), "about another certificate"),
    "other_nonce": (Made(extra=((x509.OCSPNonce(bytes(32)), False),)), "the nonce differs"),
    "critical_extension": (
        Made(extra=((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True),)),
        "critical extension that is not understood (1.2.3.4)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_answer_in_doubt_is_refused(case: str) -> None:
    """Each way in which an answer is not proven, not about the certificate or not of now is refused, and told."""
    made, words = BAD[case]
    assert words in refused(made.der())


def test_a_certificate_does_not_vouch_for_itself() -> None:
    """A client whose certificate is good for signing OCSP answers too cannot answer for itself, but for others."""
    both = CA.client(eku=[CLIENT, *SIGNING])
    question = replace(QUESTION, certificate=both.certificate)
    assert "vouches for itself" in refused(by(both, about=both).der(), question)
    assert read_answer(by(DELEGATE, about=both).der(), question, NOW).status is Status.GOOD
    assert read_answer(by(both).der(), QUESTION, NOW).status is Status.GOOD


def test_an_altered_answer_is_refused() -> None:
    """An answer whose signature covers something else is refused: `revoked` cannot be made `good`."""
    data = Made(status=OCSPCertStatus.REVOKED).der()
    assert read_answer(data, QUESTION, NOW).status is Status.REVOKED
    serial = LEAF.certificate.serial_number.to_bytes(20, "big").lstrip(b"\0")
    at = data.index(serial)
    assert refused(data[:at] + OTHER.certificate.serial_number.to_bytes(len(serial), "big") + data[at + len(serial) :])


def test_what_the_responder_says() -> None:
    """Revoked is revoked also where the answer is stale; unknown is neither good nor revoked."""
    assert read_answer(Made(status=OCSPCertStatus.UNKNOWN).der(), QUESTION, NOW).status is Status.UNKNOWN
    stale = Made(status=OCSPCertStatus.REVOKED, this=NOW - 2 * DAY, next=NOW - DAY)
    assert read_answer(stale.der(), QUESTION, NOW) == Answer(Status.REVOKED, NOW - DAY)


def test_an_answer_without_an_end_holds_for_minutes() -> None:
    """Without nextUpdate, newer is always to be had, so the answer holds UNDATED from when it was made."""
    assert read_answer(Made(next=None).der(), QUESTION, NOW) == Answer(Status.GOOD, NOW - SECOND + UNDATED)


@pytest.mark.parametrize("status", [one for one in OCSPResponseStatus if one is not OCSPResponseStatus.SUCCESSFUL])
def test_an_error_is_no_answer(status: OCSPResponseStatus) -> None:
    """What a responder says unsigned (tryLater, unauthorized, ...) is told in words, and is no answer."""
    detail = refused(OCSPResponseBuilder.build_unsuccessful(status).public_bytes(Encoding.DER))
    assert detail.startswith("the responder ")


def test_the_question_is_what_responders_know() -> None:
    """The question names the certificate by SHA-1 and carries the nonce, or none where none is wanted."""
    asked = ocsp.load_der_ocsp_request(build_request(QUESTION))
    assert (asked.serial_number, asked.hash_algorithm.name) == (LEAF.certificate.serial_number, "sha1")
    assert asked.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce == QUESTION.nonce
    assert not list(ocsp.load_der_ocsp_request(build_request(replace(QUESTION, nonce=b""))).extensions)


def described(*found: tuple[x509.ObjectIdentifier, x509.GeneralName]) -> x509.Certificate:
    access = x509.AuthorityInformationAccess([x509.AccessDescription(how, where) for how, where in found])
    return CA.client(extra=[(access, False)]).certificate


def test_the_responders_that_a_certificate_names() -> None:
    """Only OCSP's addresses are given, as they stand, and only the first few; a certificate without one has none."""
    uri = x509.UniformResourceIdentifier
    certificate = described(
        (Access.CA_ISSUERS, uri("http://ca/ca.crt")),
        (Access.OCSP, x509.DNSName("ocsp.example")),
        *((Access.OCSP, uri(f"ldap://{number}/")) for number in range(9)),
    )
    assert responders(certificate) == ("ldap://0/", "ldap://1/", "ldap://2/", "ldap://3/")
    assert responders(LEAF.certificate) == ()
    broken = x509.UnrecognizedExtension(x509.AuthorityInformationAccess.oid, b"\x04\x02no")
    assert responders(CA.client(extra=[(broken, False)]).certificate) == ()


def test_a_large_answer_is_not_read() -> None:
    """More than MAX_ANSWER bytes are refused unread."""
    assert re.search("larger than 65536", refused(Made().der() + bytes(MAX_ANSWER)))


SAMPLES = [Made().der(), by(DELEGATE).der(), Made(extra=((x509.OCSPNonce(QUESTION.nonce), True),)).der()]


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    """No bytes do anything but be refused."""
    refused(data)


@given(st.sampled_from(SAMPLES), st.data())
def test_damage_never_makes_an_answer_worth_more(sample: bytes, data: st.DataObject) -> None:
    """An answer with one byte changed says what it said, where the byte did not count, or is refused."""
    at = data.draw(st.integers(0, len(sample) - 1))
    changed = sample[:at] + bytes([data.draw(st.integers(0, 255))]) + sample[at + 1 :]
    try:
        answer = read_answer(changed, QUESTION, NOW)
    except RemoteProtocolError:
        refused(changed)
    else:
        assert answer == Answer(Status.GOOD, NOW + HOUR)


@given(st.sampled_from(SAMPLES), st.data())
def test_a_cut_answer_is_refused(sample: bytes, data: st.DataObject) -> None:
    """An answer that was cut short is refused."""
    refused(sample[: data.draw(st.integers(0, len(sample) - 1))])
