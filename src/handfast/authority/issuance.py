"""The one path by which certificates are issued, and the authority that walks it.

Whatever asks, an order is filled only against an `Authorization`, which only the authority makes and which
the ledger lets be used once. Nothing is signed by the issuer before the ledger has the plan on disk.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cache, cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.authority.ledger import Ledger
from handfast.authority.records import Intent, Planned, Record, Revocation, RevocationReason
from handfast.authority.state import Folder, Passphrase, read_passphrase, utc_now
from handfast.errors import InvalidInput, IssuanceRefused, Reason, StoreError
from handfast.files import check_private, generate_key, load_key
from handfast.pki.certificates import encode_chain, fingerprint, serial_text
from handfast.pki.issuing import Issuer, Order, authorize_names, build_certificate, lint, make_serial, sign
from handfast.pki.keys import KeyType, PrivateKey, key_id, key_type_of, same_key
from handfast.pki.names import Kind, Name, parse_name
from handfast.pki.profiles import Profile
from handfast.pki.revocation import Revocations, build_crl

CRL_LIFETIME = timedelta(hours=24)
# An issuance takes milliseconds and waits seconds at most; one that is older was killed.
LOST_AFTER = timedelta(seconds=30)

_AUTHORIZATION_LIFETIME = timedelta(minutes=15)
_SERIAL_PREFIX = re.compile(r"[0-9a-f]{4,40}")


class Step(StrEnum):
    """The steps of issuing, in order. At each of them the process may die."""

    BEGUN = "begun"
    RESERVED = "reserved"  # written, not committed
    INTENDED = "intended"  # committed: serial and authorization are used up from here on
    LINTED = "linted"
    SIGNED = "signed"
    STORED = "stored"  # written, not committed
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Authorization:
    """The proof that one order may be filled, once. Only `Authority.authorize` makes a good one."""

    id: str
    profile: str
    names: tuple[Name, ...]
    at: datetime
    expires: datetime
    _seal: object = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Issued:
    """A new certificate, and the certificates between it and the root, the issuer's first."""

    certificate: x509.Certificate
    chain: tuple[x509.Certificate, ...]

    @property
    def serial(self) -> str:
        """The serial in hex."""
        return serial_text(self.certificate.serial_number)

    @property
    def pem(self) -> bytes:
        """What a server or client sends: the certificate and its chain, PEM, leaf first, without the root."""
        return encode_chain((self.certificate, *self.chain))


def _quiet(step: str) -> None:
    """Nobody watches the steps."""


class Authority:
    """An authority: its certificates, its ledger, and, once something is to be signed, its key.

    Methods raise StoreError for what the disk does to them. It may be used from several threads; not across
    a fork.
    """

    def __init__(self, folder: Path, ledger: Ledger, passphrase: Passphrase) -> None:
        self.folder = folder
        self._ledger = ledger
        self._passphrase = passphrase
        self._seal = object()
        self.trust_domain = ledger.trust_domain()
        rows = ledger.issuers()
        self._certificates = {row.id: _load(row.der, ledger) for row in rows}
        self._roots = tuple(self._certificates[row.id] for row in rows if row.anchor)
        signing = [row.id for row in rows if row.signs]
        if not signing or not self._roots:
            raise StoreError(Reason.STORE_CORRUPT, path=str(folder), detail="the ledger holds no issuer or no root")
        self._issuer_id = signing[-1]
        self.issuer = self._certificates[self._issuer_id]

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def __enter__(self) -> Authority:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def trust_bundle(self) -> tuple[x509.Certificate, ...]:
        """The roots: what a peer must trust to accept this authority's leaves."""
        return self._roots

    def chain(self) -> tuple[x509.Certificate, ...]:
        """The certificates from the issuer's own up to, and without, the root; () where the root signs."""
        above = {certificate.subject.public_bytes(): certificate for certificate in self._certificates.values()}
        chain: list[x509.Certificate] = []
        at = self.issuer
        while at not in self._roots and len(chain) < len(above):
            chain.append(at)
            at = above.get(at.issuer.public_bytes(), at)
        return tuple(chain)

    @property
    def max_leaf_lifetime(self) -> timedelta | None:
        """The longest life it gives a leaf; None: what the profile says (7 days)."""
        return self._ledger.max_leaf_lifetime()

    def allow_lifetime(self, lifetime: timedelta, *, now: datetime | None = None) -> None:
        """Let leaves live as long as this from now on, or shorter than their profile says."""
        self._ledger.set_max_leaf_lifetime(lifetime, now or utc_now())

    def authorize(
        self,
        names: Sequence[Name],
        profile: Profile,
        *,
        lifetime: timedelta = _AUTHORIZATION_LIFETIME,
        now: datetime | None = None,
    ) -> Authorization:
        """Allow one certificate of a profile for these names or some of them.

        It is the operator's own authority over the state folder: whoever may call this may have any name in the
        trust domain. Raises IssuanceRefused (ISSUE_TRUST_DOMAIN; ISSUE_PROFILE_NOT_AUTHORIZED for an authority's
        profile).
        """
        if profile.ca:
            raise IssuanceRefused(Reason.ISSUE_PROFILE_NOT_AUTHORIZED, value=profile.name, allowed="leaves")
        for name in names:
            if name.kind is Kind.SPIFFE and name.trust_domain != self.trust_domain:
                raise IssuanceRefused(Reason.ISSUE_TRUST_DOMAIN, value=str(name), allowed=self.trust_domain)
        at = now or utc_now()
        return Authorization(secrets.token_hex(16), profile.name, tuple(names), at, at + lifetime, self._seal)

    def issue(
        self,
        order: Order,
        authorization: Authorization,
        *,
        now: datetime | None = None,
        on_step: Callable[[str], None] = _quiet,
    ) -> Issued:
        """Fill an order. The certificate is in the ledger, durably, before it is returned.

        A refused order leaves no trace and uses up no authorization. A process that dies on the way leaves at
        most a lost intent (see `sweep`). `on_step` is told each `Step`. Raises IssuanceRefused, and InvalidInput
        for a key that does not open.
        """
        at = now or utc_now()
        self._check(order, authorization, at)
        order = replace(order, max_lifetime=self.max_leaf_lifetime)  # the authority's word, whatever was ordered
        serial = make_serial(self._issuer_id, secrets.token_bytes(16))
        signer = self._signer
        # Building signs nothing, so an order that breaks its profile is refused before anything is written.
        builder = build_certificate(order, signer, serial, at)
        rehearsed = sign(builder, throwaway_key(signer.key))
        plan = Planned(
            serial=serial,
            issuer_id=self._issuer_id,
            authorization_id=authorization.id,
            profile=order.profile.name,
            names=_texts(order.names),
            allowed=_texts(authorization.names),
            authorized_at=authorization.at,
            expires_at=authorization.expires,
            at=at,
            not_after=rehearsed.not_valid_after_utc,
        )
        on_step(Step.BEGUN)
        with self._ledger.reserving(plan):
            on_step(Step.RESERVED)
        on_step(Step.INTENDED)
        try:
            lint(rehearsed, order, signer.certificate)
        except IssuanceRefused:
            self._ledger.drop(plan)
            raise
        on_step(Step.LINTED)
        certificate = sign_as_rehearsed(builder, rehearsed, signer.key)
        on_step(Step.SIGNED)
        record = Record(
            serial=serial,
            profile=plan.profile,
            names=plan.names,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            sha256=fingerprint(certificate),
            key_id=key_id(order.public_key).hex(),
            revoked_at=None,
            reason=None,
        )
        with self._ledger.storing(plan, record, certificate.public_bytes(Encoding.DER), at):
            on_step(Step.STORED)
        on_step(Step.DONE)
        return Issued(certificate, signer.chain)

    def sweep(self, *, now: datetime | None = None, lost_after: timedelta = LOST_AFTER) -> list[Intent]:
        """Settle what killed processes left: the intents of which no certificate came.

        Returns all of them that are neither past their end nor revoked. Such a certificate was maybe signed,
        and `revoke` takes its serial.
        """
        at = now or utc_now()
        return self._ledger.sweep(at - lost_after, at)

    def find(self, text: str) -> list[Record]:
        """The certificates of a name as a person writes it, or of a serial by its first 4 hex digits or more.

        Those that end last come first; at most 1000. Raises StoreError (STORE_NO_CERTIFICATE).
        """
        found = self._ledger.find(*self._meant(text))
        if not found:
            raise StoreError(Reason.STORE_NO_CERTIFICATE, value=text)
        return found

    def certificates(
        self, *, expiring: timedelta | None = None, ended: bool = False, now: datetime | None = None
    ) -> Iterator[Record]:
        """Stream the certificates, those that end first first; a read never holds up issuing.

        `expiring`: only those that end within that time. `ended`: also those that ended already.
        """
        at = now or utc_now()
        return self._ledger.certificates(None if ended else at, None if expiring is None else at + expiring)

    def revoke(
        self, text: str, reason: RevocationReason = RevocationReason.UNSPECIFIED, *, now: datetime | None = None
    ) -> list[Revocation]:
        """Revoke one serial (its first 4 hex digits or more), or all current certificates of a name.

        Lost intents count as certificates here. Raises StoreError (STORE_NO_CERTIFICATE, STORE_AMBIGUOUS,
        STORE_ALREADY_REVOKED).
        """
        at = now or utc_now()
        prefix, name = self._meant(text)
        revoked = self._ledger.revoke_name(name, reason, at) if name is not None else []
        if not revoked and prefix is not None:
            revoked = self._ledger.revoke_serial(prefix, reason, at)
        if not revoked:
            raise StoreError(Reason.STORE_NO_CERTIFICATE, value=text)
        return revoked

    def revision(self) -> int:
        """A number that grows with every revocation, by whatever process: cheap to poll."""
        return self._ledger.revision()

    def revocations(self, *, now: datetime | None = None) -> Revocations:
        """What is revoked, for a verifier: O(1) to ask. Certificates past their end are left out."""
        issuer_names = {number: found.subject.public_bytes() for number, found in self._certificates.items()}
        revoked = self._ledger.revoked((now or utc_now()) - CRL_LIFETIME)
        return Revocations(frozenset((issuer_names[one.issuer_id], one.serial) for one in revoked))

    def crl(self, *, now: datetime | None = None) -> x509.CertificateRevocationList:
        """Sign a revocation list of the issuer, good for 24 hours, with a number larger than all before it.

        RFC 5280 3.3: an entry stays until it was on one list past its certificate's end; so it stays a list's
        lifetime longer.
        """
        at = now or utc_now()
        signer = self._signer
        entries = [
            (one.serial, one.revoked_at, _reason_text(one.reason))
            for one in self._ledger.revoked(at - CRL_LIFETIME)
            if one.issuer_id == self._issuer_id
        ]
        return build_crl(signer, entries, self._ledger.next_crl_number(), at, at + CRL_LIFETIME)

    @cached_property
    def _signer(self) -> Issuer:
        """The issuer with its key, decrypted at the first use: reading and revoking need no passphrase."""
        path = Folder(self.folder).issuer_key
        if path.exists():
            check_private(path)
        secret = read_passphrase(self._passphrase, self.folder, f"Passphrase of the authority {self.trust_domain}")
        key = load_key(path, secret)
        if not belongs(key, self.issuer):
            cert = Folder(self.folder).issuer_certificate
            raise InvalidInput(Reason.INPUT_KEY_MISMATCH, key=str(path), cert=str(cert))
        return Issuer(self.issuer, key, self.chain())

    def _check(self, order: Order, authorization: Authorization, at: datetime) -> None:
        if authorization._seal is not self._seal:
            raise ValueError("an authorization of another authority, or none that any authority made")
        if at >= authorization.expires:
            raise IssuanceRefused(Reason.ISSUE_AUTHORIZATION_EXPIRED, expires=authorization.expires)
        if order.profile.name != authorization.profile:
            raise IssuanceRefused(
                Reason.ISSUE_PROFILE_NOT_AUTHORIZED, value=order.profile.name, allowed=authorization.profile
            )
        authorize_names(order.names, authorization.names)

    def _meant(self, text: str) -> tuple[str | None, str | None]:
        """(serial prefix in hex, name) that a person may mean by a text."""
        prefix = text.replace(":", "").lower()
        try:
            name = str(parse_name(text, self.trust_domain))
        except InvalidInput:
            name = None
        return prefix if _SERIAL_PREFIX.fullmatch(prefix) else None, name


def throwaway_key(key: PrivateKey) -> PrivateKey:
    """A key of the same kind, that signs what is only to be looked at; made once per process.

    For RSA the smallest will do: what is signed names the algorithm, not the key's size, and large keys take
    seconds to make.
    """
    if isinstance(key, rsa.RSAPrivateKey):
        return _throwaway(KeyType.RSA2048)
    kind = key_type_of(key.public_key())
    if kind is None:
        raise IssuanceRefused(Reason.ISSUE_WEAK_KEY, detail="this kind of key cannot sign here")
    return _throwaway(kind)


def sign_as_rehearsed(
    builder: x509.CertificateBuilder, rehearsed: x509.Certificate, key: PrivateKey
) -> x509.Certificate:
    """Sign, and make sure that what was signed is, to the byte, what was linted (RFC 5280 4.1.1.1).

    Raises IssuanceRefused (ISSUE_LINT).
    """
    certificate = sign(builder, key)
    if certificate.tbs_certificate_bytes != rehearsed.tbs_certificate_bytes:
        raise IssuanceRefused(Reason.ISSUE_LINT, detail="what was signed is not what was checked")
    return certificate


def belongs(key: PrivateKey, certificate: x509.Certificate) -> bool:
    """Whether a private key is that of a certificate."""
    public = certificate.public_key()
    kinds = (ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey, rsa.RSAPublicKey)
    return isinstance(public, kinds) and same_key(key.public_key(), public)


@cache
def _throwaway(kind: KeyType) -> PrivateKey:
    return generate_key(kind)


def _texts(names: Sequence[Name]) -> tuple[str, ...]:
    return tuple(str(name) for name in dict.fromkeys(names))  # in a certificate, too, each is there once


def _reason_text(reason: RevocationReason) -> str | None:
    """As RFC 5280 5.3.1 spells it; it wants `unspecified` left out."""
    return None if reason is RevocationReason.UNSPECIFIED else x509.ReasonFlags[reason.value].value


def _load(der: bytes, ledger: Ledger) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError as error:
        raise StoreError(Reason.STORE_CORRUPT, path=str(ledger.path), detail=str(error)) from None
