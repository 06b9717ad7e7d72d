"""Certificate signing requests (PKCS#10, RFC 2986): what one asks for, and whether its key may have it."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from handfast.errors import InvalidInput, IssuanceRefused, Reason
from handfast.pki.keys import PublicKey, weakness
from handfast.pki.names import Name, parse_san, printable

_GOOD_HASHES = frozenset({"sha256", "sha384", "sha512", "sha3-256", "sha3-384", "sha3-512"})


@dataclass(frozen=True, slots=True)
class Request:
    """What is taken from a request: the key. The names are only what it asks for, and prove nothing."""

    public_key: PublicKey
    names: tuple[Name, ...]  # of its subjectAltName, in order; some may be of kind FORBIDDEN or OPAQUE
    common_name: str | None  # of its subject, where there is a printable one


def parse_csr(data: bytes, what: str) -> Request:
    """Parse a request, PEM or DER; check its key, and that the request is signed with it.

    `what` names the source in messages. Raises InvalidInput (INPUT_NOT_CSR), and IssuanceRefused:
    ISSUE_WEAK_KEY (also for an EC point that is not on its curve), ISSUE_WEAK_HASH, ISSUE_CSR_SIGNATURE.
    """
    csr = load_csr(data, what)
    key = _checked_key(csr)
    _check_signature(csr)
    try:
        return Request(key, requested_names(csr), _common_name(csr.subject))
    except (InvalidInput, ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        detail = error.facts.get("detail", "") if isinstance(error, InvalidInput) else str(error)
        raise _not_csr(what, f"what it asks for cannot be read: {detail}"[:150]) from None


def load_csr(data: bytes, what: str) -> x509.CertificateSigningRequest:
    """Return the request in PEM or DER, nothing checked. Raises InvalidInput (INPUT_NOT_CSR)."""
    load = x509.load_pem_x509_csr if b"-----BEGIN" in data else x509.load_der_x509_csr
    try:
        return load(data)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise _not_csr(what, str(error).split("\n")[0][:100]) from None


def requested_names(csr: x509.CertificateSigningRequest) -> tuple[Name, ...]:
    """Return the names a request asks for. Raises ValueError and x509's errors where they cannot be read."""
    for extension in csr.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            return parse_san(extension.value.public_bytes())
    return ()


def _checked_key(csr: x509.CertificateSigningRequest) -> PublicKey:
    try:
        key = csr.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _weak(str(error).split("\n")[0][:100]) from None
    weak = weakness(key)
    if weak is not None or not isinstance(key, PublicKey):
        raise _weak(weak or "it is of a kind that is not accepted")
    return key


def _check_signature(csr: x509.CertificateSigningRequest) -> None:
    try:
        algorithm = csr.signature_hash_algorithm  # None for Ed25519, which has its own
        if algorithm is not None and algorithm.name not in _GOOD_HASHES:
            raise IssuanceRefused(Reason.ISSUE_WEAK_HASH, hash=algorithm.name.upper())
        good = csr.is_signature_valid
    except UnsupportedAlgorithm:
        oid = csr.signature_algorithm_oid
        raise IssuanceRefused(Reason.ISSUE_WEAK_HASH, hash=f"an unknown algorithm ({oid.dotted_string})") from None
    except ValueError:
        good = False
    if not good:
        raise IssuanceRefused(Reason.ISSUE_CSR_SIGNATURE)


def _common_name(subject: x509.Name) -> str | None:
    for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        if isinstance(attribute.value, str) and attribute.value and printable(attribute.value):
            return attribute.value
    return None


def _weak(detail: str) -> IssuanceRefused:
    return IssuanceRefused(Reason.ISSUE_WEAK_KEY, detail=detail)


def _not_csr(what: str, detail: str) -> InvalidInput:
    return InvalidInput(Reason.INPUT_NOT_CSR, what=what, detail=detail)
