"""Revocation: what is revoked, and the signed lists that say so (CRLs, RFC 5280 5).

A list in doubt counts against the certificate: one that is missing, stale, not signed by the issuer or
not understood is a failure, never a pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from handfast.errors import Failure, InvalidInput, IssuanceRefused, Reason
from handfast.pki.certificates import UNREADABLE, label, serial_text
from handfast.pki.floor import broken_hash
from handfast.pki.issuing import Issuer, authority_key_id, signature_hash
from handfast.pki.profiles import BACKDATE

_PEM = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.S)
_CRITICAL = b"\x01\x01\xff"  # BOOLEAN TRUE in DER: without these bytes, nothing in a list is critical
_MOST_KEYS = 1024  # issuers' keys whose lists are remembered; more would only be an attacker's


@dataclass(frozen=True, slots=True)
class Revocations:
    """What is revoked, as one value that can be swapped."""

    serials: frozenset[tuple[bytes, int]]  # (the issuer's subject in DER, serial)

    def revoked(self, certificate: x509.Certificate) -> bool:
        """Whether the certificate is revoked. O(1)."""
        return bool(self.serials) and (certificate.issuer.public_bytes(), certificate.serial_number) in self.serials


NO_REVOCATIONS = Revocations(frozenset())


def parse_crls(data: bytes, what: str) -> tuple[x509.CertificateRevocationList, ...]:
    """Return the revocation lists in PEM, or the one in DER; at least one. `what` names the source in messages.

    Raises InvalidInput (INPUT_NOT_CRL).
    """
    try:
        if b"-----BEGIN" not in data:
            return (_readable(x509.load_der_x509_crl(data)),)
        blocks = _PEM.findall(data)
        if not blocks or data.count(b"-----BEGIN X509 CRL-----") > len(blocks):
            raise ValueError("it was cut short" if b"BEGIN X509 CRL" in data else "it is PEM of another kind")
        return tuple(_readable(x509.load_pem_x509_crl(block)) for block in blocks)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        detail = str(error).split("\n")[0][:100]
        raise InvalidInput(Reason.INPUT_NOT_CRL, what=what, detail=detail) from None


# The number and the date of an issuer's list, by the issuer's name in DER and its key (b'' where it is not known).
Newest = Mapping[tuple[bytes, bytes], tuple[int, datetime]]


@dataclass(frozen=True, slots=True)
class _List:
    """One revocation list, read once."""

    crl: x509.CertificateRevocationList
    serials: frozenset[int]
    last_update: datetime
    next_update: datetime | None
    number: int  # CRLNumber (RFC 5280 5.2.3); 0 without
    flaw: str  # why it cannot be used at all; '' if it can


class CrlSet:
    """Revocation lists, read once and looked up in O(1). `check_crls` makes it."""

    def __init__(self, lists: dict[bytes, list[_List]]) -> None:
        self._lists = lists  # by the issuer's name in DER
        self._chosen: dict[tuple[bytes, bytes], _List | None] = {}  # by the issuer's name and key

    def failure(self, certificate: x509.Certificate, issuer: x509.Certificate, now: datetime) -> Failure | None:
        """Return what the issuer's list has against the certificate at `now` (aware, UTC), or None.

        VERIFY_REVOKED, also where the list is stale; VERIFY_CRL_MISSING; VERIFY_CRL_STALE; VERIFY_CRL_INVALID:
        not signed by the issuer's key, or the key may not sign lists (RFC 5280 4.2.1.3), or the list is partial,
        indirect or a delta, or is dated in the future, or SHA-1 signed. Raises nothing.
        """
        facts: dict[str, object] = {"issuer": label(issuer)}
        try:
            name = issuer.subject.public_bytes()
            if name not in self._lists:
                return Failure(Reason.VERIFY_CRL_MISSING, facts)
            found = self._signed_by(name, issuer)
            allowed = _may_sign_lists(issuer)
        except UNREADABLE:
            return _invalid(facts, "the issuer's certificate cannot be read")
        if found is None:
            # A signature of a broken kind does not verify, so that is said first.
            flaws = [one.flaw for one in self._lists[name] if one.flaw]
            return _invalid(facts, flaws[0] if flaws else "it is not signed with the issuer's key")
        if not allowed:
            return _invalid(facts, "the issuer's key may not sign revocation lists")
        if found.flaw:
            return _invalid(facts, found.flaw)
        if certificate.serial_number in found.serials:
            serial = serial_text(certificate.serial_number)
            return Failure(Reason.VERIFY_REVOKED, {"subject": label(certificate), "serial": serial})
        if found.next_update is None:
            return _invalid(facts, "it does not say until when it holds")
        if now > found.next_update:
            return Failure(Reason.VERIFY_CRL_STALE, facts | {"next_update": found.next_update})
        if now < found.last_update:
            return _invalid(facts, "it is dated in the future")
        return None

    def newest(self) -> Newest:
        """Return which list of each issuer counts. Lists that nobody is known to have signed say nothing of others."""
        signed = {key: one for key, one in self._chosen.items() if one is not None and not one.flaw}
        newest = {key: (one.number, one.last_update) for key, one in signed.items()}
        for name in self._lists.keys() - {name for name, _ in self._chosen}:
            newest[name, b""] = min((one.number, one.last_update) for one in self._lists[name])
        return newest

    def next_updates(self) -> dict[str, datetime]:
        """Return until when the lists of each issuer hold, by its name (RFC 4514), where they say so."""
        ends = [
            (lists[0].crl.issuer.rfc4514_string()[:200], [one.next_update for one in lists if one.next_update])
            for lists in self._lists.values()
        ]
        return {issuer: max(updates) for issuer, updates in ends if updates}

    def rolled_back_from(self, held: Newest) -> Failure | None:
        """Return why these lists must not come after what was `held`: one of the same issuer is older. Raises nothing.

        An old list is still signed and may still be in its time, and would un-revoke what was revoked since. For an
        issuer without a list here there is nothing to say: its certificates are refused (VERIFY_CRL_MISSING).
        """
        for key, given in self.newest().items():
            if key in held and given < held[key]:
                issuer = self._lists[key[0]][0].crl.issuer.rfc4514_string()[:200]
                then, now = (f"number {number} of {when:%Y-%m-%d %H:%M:%S}" for number, when in (held[key], given))
                return Failure(Reason.VERIFY_CRL_OLDER, {"issuer": issuer, "held": then, "given": now})
        return None

    def _signed_by(self, name: bytes, issuer: x509.Certificate) -> _List | None:
        """The newest list of that name and signed with the issuer's key; a usable one before one that is not."""
        key = issuer.public_key()
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if (name, spki) in self._chosen:
            return self._chosen[name, spki]
        # Newest first, so that the signatures of older lists are not looked at.
        candidates = sorted(
            self._lists[name], key=lambda one: (not one.flaw, one.last_update, one.number), reverse=True
        )
        found = next((one for one in candidates if _is_signed(one.crl, issuer)), None)
        if len(self._chosen) < _MOST_KEYS:
            self._chosen[name, spki] = found
        return found


def check_crls(crls: Sequence[x509.CertificateRevocationList], issuers: Sequence[x509.Certificate]) -> CrlSet:
    """Read revocation lists for looking up. The signatures for `issuers` are checked now, for others when asked.

    Raises nothing: a list that cannot be used fails the certificates of its issuer.
    """
    lists: dict[bytes, list[_List]] = {}
    for crl in crls:
        lists.setdefault(crl.issuer.public_bytes(), []).append(_read(crl))
    found = CrlSet(lists)
    for issuer in issuers:
        found.failure(issuer, issuer, issuer.not_valid_before_utc)
    return found


def build_crl(
    issuer: Issuer,
    revoked: Iterable[tuple[int, datetime, str | None]],
    number: int,
    now: datetime,
    next_update: datetime,
) -> x509.CertificateRevocationList:
    """Sign a revocation list. `revoked` is (serial, when, reason as RFC 5280 5.3.1 spells it, or None).

    It is dated BACKDATE before `now`, for verifiers whose clocks are slow. Raises IssuanceRefused
    (ISSUE_ISSUER_LIMITED) where the issuer's key usage does not allow it; ValueError for an unknown reason.
    """
    if not _may_sign_lists(issuer.certificate):
        detail = "its key usage does not allow signing revocation lists"
        raise IssuanceRefused(Reason.ISSUE_ISSUER_LIMITED, subject=label(issuer.certificate), detail=detail)
    # All entries at once: adding them one by one copies the list each time.
    builder = x509.CertificateRevocationListBuilder(revoked_certificates=[_entry(*entry) for entry in revoked])
    builder = builder.issuer_name(issuer.certificate.subject).last_update(now - BACKDATE).next_update(next_update)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier(authority_key_id(issuer), None, None), False)
    return builder.add_extension(x509.CRLNumber(number), False).sign(issuer.key, signature_hash(issuer.key))


def _readable(crl: x509.CertificateRevocationList) -> x509.CertificateRevocationList:
    """Touch what is read lazily, so that a list that was parsed is a list that can be used."""
    _ = crl.issuer.public_bytes(), crl.last_update_utc, crl.next_update_utc
    return crl


def _entry(serial: int, when: datetime, reason: str | None) -> x509.RevokedCertificate:
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when)
    if reason is not None:
        entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags(reason)), False)
    return entry.build()


def _read(crl: x509.CertificateRevocationList) -> _List:
    serials = frozenset(entry.serial_number for entry in crl)
    return _List(crl, serials, crl.last_update_utc, crl.next_update_utc, _number(crl), _flaw(crl))


def _number(crl: x509.CertificateRevocationList) -> int:
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except (x509.ExtensionNotFound, *UNREADABLE):
        return 0


def _flaw(crl: x509.CertificateRevocationList) -> str:
    try:
        if broken := broken_hash(crl.signature_hash_algorithm):
            return f"it is signed with {broken}"
        if _CRITICAL not in crl.tbs_certlist_bytes:
            return ""
        # RFC 5280 5.2: issuingDistributionPoint (partial or indirect) and deltaCRLIndicator are critical.
        critical = [extension.oid for extension in crl.extensions if extension.critical]
        critical += [extension.oid for entry in crl for extension in entry.extensions if extension.critical]
    except UNREADABLE:
        return "it cannot be read"
    return f"it has a critical extension that is not understood ({critical[0].dotted_string})" if critical else ""


def _is_signed(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    try:
        return crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # TypeError for other kinds
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def _may_sign_lists(issuer: x509.Certificate) -> bool:
    try:
        return issuer.extensions.get_extension_for_class(x509.KeyUsage).value.crl_sign
    except x509.ExtensionNotFound:
        return True


def _invalid(facts: dict[str, object], detail: str) -> Failure:
    return Failure(Reason.VERIFY_CRL_INVALID, facts | {"detail": detail})
