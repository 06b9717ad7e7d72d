"""What the ledger takes and gives: plain values, no database in them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class RevocationReason(StrEnum):
    """Why a certificate is revoked (RFC 5280 5.3.1), as far as it can befall a leaf and is final."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key_compromise"
    AFFILIATION_CHANGED = "affiliation_changed"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessation_of_operation"
    PRIVILEGE_WITHDRAWN = "privilege_withdrawn"


@dataclass(frozen=True, slots=True)
class IssuerRow:
    """An authority's certificate as the ledger holds it."""

    id: int
    anchor: bool
    signs: bool
    sha256: str
    der: bytes


@dataclass(frozen=True, slots=True)
class Planned:
    """What is written before anything is signed."""

    serial: int
    issuer_id: int
    authorization_id: str
    profile: str
    names: tuple[str, ...]
    allowed: tuple[str, ...]  # by the authorization: `names` or more
    authorized_at: datetime
    expires_at: datetime
    at: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Record:
    """One certificate that was issued. `names` are in typed text, in the certificate's order."""

    serial: int
    profile: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    sha256: str
    key_id: str
    revoked_at: datetime | None
    reason: RevocationReason | None


@dataclass(frozen=True, slots=True)
class Intent:
    """An issuance that was begun and of which no certificate is known: maybe signed, revocable by serial."""

    serial: int
    profile: str
    names: tuple[str, ...]
    at: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Revocation:
    """One revoked serial. `names` is empty where only the serial was asked for."""

    serial: int
    issuer_id: int
    names: tuple[str, ...]
    not_after: datetime
    revoked_at: datetime
    reason: RevocationReason
