"""What a TLS context is made from, read from files: a credential (key and chain) and a trust bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL

from handfast.errors import Failure, InvalidInput, Reason, VerificationFailed
from handfast.files import load_key, read_file
from handfast.pki.certificates import extended_usages, is_authority, label, parse_certificates
from handfast.pki.keys import PrivateKey, same_key
from handfast.pki.verification import Purpose, TrustBundle


@dataclass(frozen=True, slots=True)
class Credential:
    """A private key and its certificates, leaf first."""

    key: PrivateKey
    chain: tuple[x509.Certificate, ...]

    def configure(self, context: SSL.Context) -> None:
        """Give it to a context that has not been used yet. Raises InvalidInput where OpenSSL will not take it."""
        try:
            context.use_certificate(self.chain[0])
            for certificate in self.chain[1:]:
                context.add_extra_chain_cert(certificate)
            context.use_privatekey(self.key)
            context.check_privatekey()
        except (SSL.Error, ValueError, TypeError) as error:
            detail = f"the certificate or key is not accepted by TLS ({str(error)[:120]})"
            raise InvalidInput(Reason.TLS_HANDSHAKE, detail=detail) from None


def load_credential(certificate: Path, key: Path, passphrase: bytes | None = None) -> Credential:
    """Read a certificate file (leaf first, PEM or one DER) and its key file (PEM or DER).

    Raises InvalidInput: what is wrong with which file, or INPUT_KEY_MISMATCH.
    """
    chain = parse_certificates(read_file(certificate, "certificate file"), str(certificate))
    private = load_key(key, passphrase)
    if not same_key(private.public_key(), chain[0].public_key()):  # type: ignore[arg-type]  # other kinds compare unequal
        raise InvalidInput(Reason.INPUT_KEY_MISMATCH, key=str(key), cert=str(certificate))
    return Credential(private, chain)


def load_bundle(path: Path) -> TrustBundle:
    """Read a trust bundle: certificates of authorities. Raises InvalidInput, also for one that is no authority."""
    anchors = parse_certificates(read_file(path, "certificate file"), str(path))
    for anchor in anchors:
        if not is_authority(anchor):  # a leaf as an anchor would vouch for itself
            detail = f"{label(anchor)} is not an authority's certificate"
            remedy = "give the authority's own certificate, by which those of clients or servers are judged"
            raise InvalidInput(Reason.INPUT_NOT_CERTIFICATE, what=str(path), detail=detail, remedy=remedy)
    return TrustBundle(anchors)


def check_usable(credential: Credential, purpose: Purpose, now: datetime) -> None:
    """Refuse a credential of ours that the other side would not accept: out of its time, or for another use.

    Raises VerificationFailed (VERIFY_EXPIRED, VERIFY_NOT_YET_VALID, VERIFY_PURPOSE). One that does not say its use
    passes: it is for the other side to judge, and many take it.
    """
    leaf = credential.chain[0]
    check_time((leaf,), now)
    usages = extended_usages(leaf)
    if usages is not None and not {purpose.usage, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}.intersection(usages):
        words = next((str(other) for other in Purpose if other.usage in usages), "another")
        facts = {"subject": label(leaf), "purpose": str(purpose), "usages": words}
        raise VerificationFailed((Failure(Reason.VERIFY_PURPOSE, facts),))


def check_time(certificates: Sequence[x509.Certificate], now: datetime) -> None:
    """Refuse when none of the certificates is valid now. Raises VerificationFailed."""
    failures = []
    for certificate in certificates:
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if begins <= now <= ends:
            return
        if now > ends:
            failures.append(Failure(Reason.VERIFY_EXPIRED, {"subject": label(certificate), "not_after": ends}))
        else:
            facts = {"subject": label(certificate), "not_before": begins}
            failures.append(Failure(Reason.VERIFY_NOT_YET_VALID, facts))
    raise VerificationFailed(tuple(failures))
