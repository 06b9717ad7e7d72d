"""OCSP (RFC 6960): the question whether a certificate was revoked, and what an answer to it is worth.

An answer in doubt is no answer: one that is not signed by the issuer or its delegate, not about the certificate, not of
now or not understood is refused. It asks nobody; the nonce and the clock are handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, ExtensionOID

from handfast.errors import Reason, RemoteProtocolError
from handfast.pki.certificates import UNREADABLE, extended_usages, label
from handfast.pki.floor import broken_hash, weak_size

MAX_ANSWER = 64 << 10  # bytes; real ones have 0.5 to 3 KiB
SKEW = timedelta(minutes=5)  # by how much clocks may differ; the default of `openssl ocsp -validity_period`
UNDATED = timedelta(minutes=5)  # how long an answer holds that says no time: a newer one is always to be had (4.2.2.1)
NONCE = 32  # bytes (RFC 9654 2.1)

_MAX_SIGNERS = 4  # certificates in an answer that are looked at
_MAX_URLS = 4
_NOT_ACCEPTED = "its signer's key is of a kind or size that is not accepted"
_CRITICAL = b"\x01\x01\xff"  # BOOLEAN TRUE in DER: without these bytes, nothing in an answer is critical

# What a responder says in place of an answer (4.2.1). Nobody signs it.
_NO_ANSWER = {
    ocsp.OCSPResponseStatus.MALFORMED_REQUEST: "the responder did not understand the question",
    ocsp.OCSPResponseStatus.INTERNAL_ERROR: "the responder has an internal error",
    ocsp.OCSPResponseStatus.TRY_LATER: "the responder says: try later",
    ocsp.OCSPResponseStatus.SIG_REQUIRED: "the responder wants signed questions",
    ocsp.OCSPResponseStatus.UNAUTHORIZED: "the responder does not answer for this authority (unauthorized)",
}
_UNDERSTOOD_IN_SIGNERS = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.CERTIFICATE_POLICIES,
        ExtensionOID.OCSP_NO_CHECK,
    }
)


class Status(Enum):
    """What a responder says of a certificate."""

    GOOD = "good"
    REVOKED = "revoked"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Question:
    """Was this certificate, of this issuer, revoked? `nonce`: NONCE random bytes, or b'' to send none."""

    certificate: x509.Certificate
    issuer: x509.Certificate
    nonce: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the responder says, signed, and until when by its own word (aware, UTC)."""

    status: Status
    until: datetime


def responders(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the responders' addresses that a certificate names (RFC 5280 4.2.2.1), as they stand there; a few at most.

    They are what its issuer wrote: of any scheme and to any host. Raises nothing.
    """
    try:
        access = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        return ()
    found = [
        description.access_location.value
        for description in access
        if description.access_method == AuthorityInformationAccessOID.OCSP
        and isinstance(description.access_location, x509.UniformResourceIdentifier)
    ]
    return tuple(found[:_MAX_URLS])


def build_request(question: Question) -> bytes:
    """Return the question in DER (RFC 6960 4.1)."""
    # RFC 5019 2.1.1: what every responder knows. It only names the issuer; the answer is signed.
    sha1 = hashes.SHA1()  # noqa: S303  # see above
    builder = ocsp.OCSPRequestBuilder().add_certificate(question.certificate, question.issuer, sha1)
    if question.nonce:
        builder = builder.add_extension(x509.OCSPNonce(question.nonce), False)
    return builder.build().public_bytes(Encoding.DER)


def read_answer(data: bytes, question: Question, now: datetime) -> Answer:
    """Return what an answer in DER says, once it is proven (RFC 6960 3.2). `now` is aware, UTC.

    Its signer is the issuer, or a delegate whose certificate the issuer signed for that (id-kp-OCSPSigning) and that
    is valid now; whether the delegate was revoked itself is not asked (4.2.2.2.1: short lives are the remedy). An
    answer without the nonce is taken, since most responders sign beforehand; one with another is not.
    Raises RemoteProtocolError (VERIFY_OCSP_INVALID) and nothing else, on any bytes.
    """
    try:
        if len(data) > MAX_ANSWER:
            raise _invalid(question, f"it is larger than {MAX_ANSWER} bytes")
        response = ocsp.load_der_ocsp_response(data)
        if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
            raise _invalid(question, _NO_ANSWER[response.response_status])
        _check_signer(response, question, now)
        _check_extensions(response, question)
        return _about(response, question, now)
    except UNREADABLE as error:
        raise _invalid(question, f"it cannot be read ({str(error)[:100]})") from None


def _about(response: ocsp.OCSPResponse, question: Question, now: datetime) -> Answer:
    """What the answer says of the certificate; what speaks against it counts first."""
    singles = [single for single in response.responses if _is_about(single, question)]
    if not singles:
        raise _invalid(question, "it is about another certificate")
    for single in singles:
        if single.certificate_status is ocsp.OCSPCertStatus.REVOKED:  # also where it is stale
            return Answer(Status.REVOKED, _until(single))
    untils = []
    for single in singles:
        until = _until(single)
        if single.this_update_utc > now + SKEW:
            raise _invalid(question, f"it is dated in the future ({single.this_update_utc:%Y-%m-%d %H:%M:%S} UTC)")
        if until < single.this_update_utc or until + SKEW < now:
            raise _invalid(question, f"it is stale: it held until {until:%Y-%m-%d %H:%M:%S} UTC")
        untils.append(until)
    good = all(single.certificate_status is ocsp.OCSPCertStatus.GOOD for single in singles)
    return Answer(Status.GOOD if good else Status.UNKNOWN, min(untils))


def _is_about(single: ocsp.OCSPSingleResponse, question: Question) -> bool:
    """Whether the CertID is the certificate's: its issuer's name and key, each hashed, and its serial (4.1.1)."""
    if single.serial_number != question.certificate.serial_number:
        return False
    builder = ocsp.OCSPRequestBuilder()
    try:
        ours = builder.add_certificate(question.certificate, question.issuer, single.hash_algorithm).build()
    except UNREADABLE:
        return False
    return (single.issuer_name_hash, single.issuer_key_hash) == (ours.issuer_name_hash, ours.issuer_key_hash)


def _until(single: ocsp.OCSPSingleResponse) -> datetime:
    return single.next_update_utc or single.this_update_utc + UNDATED


def _check_extensions(response: ocsp.OCSPResponse, question: Question) -> None:
    if _CRITICAL in response.tbs_response_bytes:
        extensions = [*response.extensions, *response.single_extensions]  # a ValueError where it speaks of several
        critical = [one.oid.dotted_string for one in extensions if one.critical and one.oid != x509.OCSPNonce.oid]
        if critical:
            raise _invalid(question, f"it has a critical extension that is not understood ({critical[0]})")
    if not question.nonce:
        return
    try:
        nonce = response.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce
    except x509.ExtensionNotFound:
        return
    if nonce != question.nonce:
        raise _invalid(question, "it answers another question (the nonce differs)")


# Who signed it.


def _check_signer(response: ocsp.OCSPResponse, question: Question, now: datetime) -> None:
    """RFC 6960 4.2.2.2. Raises RemoteProtocolError with what is wrong with the signer that fits best."""
    issuer = question.issuer
    flaw = "it is signed by neither the issuer nor a delegate that it brings along"
    if _names(response, issuer):
        flaw = _signature_flaw(response, issuer)
        if not flaw:
            return
    for delegate in response.certificates[:_MAX_SIGNERS]:
        if delegate == issuer or not _names(response, delegate):
            continue
        flaw = _delegate_flaw(delegate, question, now) or _signature_flaw(response, delegate)
        if not flaw:
            return
    raise _invalid(question, flaw)


def _names(response: ocsp.OCSPResponse, certificate: x509.Certificate) -> bool:
    """Whether the certificate is the responder's that the answer names (ResponderID, 4.2.1)."""
    if response.responder_name is not None:
        return response.responder_name.public_bytes() == certificate.subject.public_bytes()
    digest = x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest  # the same SHA-1
    return response.responder_key_hash == digest


def _delegate_flaw(delegate: x509.Certificate, question: Question, now: datetime) -> str:
    """Why a certificate does not make its holder a delegate of the issuer; '' if it does."""
    if delegate == question.certificate:
        return "the certificate vouches for itself"
    try:
        delegate.verify_directly_issued_by(question.issuer)
    except (InvalidSignature, *UNREADABLE):
        return "its signer was not certified by the issuer"
    extensions = delegate.extensions
    if ExtendedKeyUsageOID.OCSP_SIGNING not in (extended_usages(delegate) or ()):
        return "its signer may not sign OCSP answers"
    if not delegate.not_valid_before_utc <= now <= delegate.not_valid_after_utc:
        return f"its signer's certificate is not valid now ({label(delegate)})"
    try:
        if not extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature:
            return "its signer's key may not sign"
    except x509.ExtensionNotFound:
        pass
    if broken := broken_hash(delegate.signature_hash_algorithm):
        return f"its signer's certificate is signed with {broken}"
    unknown = [one.oid for one in extensions if one.critical and one.oid not in _UNDERSTOOD_IN_SIGNERS]
    if unknown:
        return f"its signer's certificate has a critical extension that is not understood ({unknown[0].dotted_string})"
    return ""


def _signature_flaw(response: ocsp.OCSPResponse, signer: x509.Certificate) -> str:
    key, signature, signed = signer.public_key(), response.signature, response.tbs_response_bytes
    algorithm = response.signature_hash_algorithm
    if broken := broken_hash(algorithm):
        return f"it is signed with {broken}"
    if weak_size(key):
        return _NOT_ACCEPTED
    try:
        match key:
            case rsa.RSAPublicKey() if algorithm is not None:
                key.verify(signature, signed, padding.PKCS1v15(), algorithm)
            case ec.EllipticCurvePublicKey() if algorithm is not None:
                key.verify(signature, signed, ec.ECDSA(algorithm))
            case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
                key.verify(signature, signed)
            case mldsa.MLDSA44PublicKey() | mldsa.MLDSA65PublicKey() | mldsa.MLDSA87PublicKey():
                key.verify(signature, signed)
            case _:
                return _NOT_ACCEPTED
    except InvalidSignature:
        return "its signature is not its signer's"
    return ""


def _invalid(question: Question, detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reason.VERIFY_OCSP_INVALID, subject=label(question.certificate), detail=detail)
