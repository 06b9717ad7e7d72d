"""How an authority comes to be: made anew, or taken over from files; and how it is opened again.

Files are written under a mark, and the ledger is renamed into place last: a kill at any point leaves a
whole authority, or what the next attempt sweeps away.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from handfast.authority.issuance import Authority, belongs, sign_as_rehearsed, throwaway_key
from handfast.authority.ledger import Ledger
from handfast.authority.records import IssuerRow
from handfast.authority.state import (
    AskedPassphrase,
    Folder,
    GeneratedPassphrase,
    Passphrase,
    forget_half_made,
    generate_passphrase,
    lock,
    read_passphrase,
    utc_now,
)
from handfast.errors import Failure, InvalidInput, IssuanceRefused, Reason, StoreError, VerificationFailed
from handfast.files import (
    TEMPORARY,
    check_private,
    disk_errors,
    generate_key,
    load_key,
    make_private_folder,
    read_file,
    sync_folder,
    write_private,
    write_public,
)
from handfast.pki.certificates import encode_chain, fingerprint, label, parse_certificates
from handfast.pki.issuing import Issuer, Order, build_certificate, lint, make_serial, sign
from handfast.pki.keys import KeyType, PrivateKey, encode_private_key, key_id, weakness
from handfast.pki.names import Name, parse_trust_domain
from handfast.pki.profiles import PROFILES

# OWASP Password Storage Cheat Sheet, 2023: what slows down guessing a passphrase that a person chose.
_ROUNDS_FOR_PEOPLE = 600_000
# A generated passphrase has 256 bits: nobody guesses it, so slowing guesses down would only slow down starting.
_ROUNDS_FOR_RANDOM = 2048
_LONGEST_CHAIN = 10
_LONGEST_COMMON_NAME = 64  # RFC 5280 A.1, ub-common-name


@dataclass(frozen=True, slots=True)
class Plan:
    """What authority to make. `permitted` are the only names it will ever be able to vouch for; () is any."""

    trust_domain: str
    root_key: KeyType = KeyType.P384
    issuer_key: KeyType = KeyType.P256
    permitted: tuple[Name, ...] = ()


@dataclass(frozen=True, slots=True)
class Existing:
    """The files of an authority that exists: its certificate (PEM or DER), its key, and those above it.

    `chain` holds the authorities up to the root (PEM); not needed if the certificate is a root, or its file
    has them.
    """

    certificate: Path
    key: Path
    chain: Path | None = None
    key_passphrase: bytes | None = None


def _quiet(step: str) -> None:
    """Nobody watches the steps."""


def create_authority(
    folder: Path,
    plan: Plan,
    passphrase: Passphrase,
    *,
    now: datetime | None = None,
    on_step: Callable[[str], None] = _quiet,
) -> Authority:
    """Make a root and an issuer below it in a state folder, and open the authority.

    Both keys are encrypted with the passphrase. `on_step` is told each file that is about to be written.
    Raises StoreError (STORE_EXISTS if the folder holds an authority, or files that one would overwrite;
    STORE_LOCKED, STORE_TOO_OPEN, ...), InvalidInput and IssuanceRefused.
    """
    at = now or utc_now()
    parse_trust_domain(plan.trust_domain)
    with _making(folder, passphrase, on_step) as making:
        root_key, issuer_key = generate_key(plan.root_key), generate_key(plan.issuer_key)
        root = _sign_authority(plan, "root", root_key, None, at)
        issuer = _sign_authority(plan, "issuer", issuer_key, Issuer(root, root_key, ()), at)
        making.write_key(making.files.root_key, root_key)
        making.write_key(making.files.issuer_key, issuer_key)
        making.finish(plan.trust_domain, issuer, (root,), at)
    return open_authority(folder, AskedPassphrase(lambda question: making.secret))  # known: nobody is asked twice


def import_authority(
    folder: Path,
    existing: Existing,
    trust_domain: str,
    passphrase: Passphrase,
    *,
    now: datetime | None = None,
    on_step: Callable[[str], None] = _quiet,
) -> Authority:
    """Take over an authority that exists, and open it. `passphrase` is the one its key is to have here.

    A self-signed certificate becomes root and issuer in one; any other becomes the issuer. Raises InvalidInput
    (INPUT_KEY_MISMATCH, INPUT_NO_CHAIN, ...), IssuanceRefused (ISSUE_ISSUER_NOT_CA, ISSUE_ISSUER_EXPIRED,
    ISSUE_WEAK_KEY), VerificationFailed (VERIFY_WEAK_HASH), and what `create_authority` raises.
    """
    at = now or utc_now()
    parse_trust_domain(trust_domain)
    what = str(existing.certificate)
    issuer, *others = parse_certificates(read_file(existing.certificate, "certificate"), what)
    if existing.chain is not None:
        others += parse_certificates(read_file(existing.chain, "certificate"), str(existing.chain))
    above = _chain_above(issuer, others, what)
    _check_chain((issuer, *above), at)
    key = load_key(existing.key, existing.key_passphrase)
    if not belongs(key, issuer):
        raise InvalidInput(Reason.INPUT_KEY_MISMATCH, key=str(existing.key), cert=what)
    throwaway_key(key)  # refuses a kind that cannot sign here
    with _making(folder, passphrase, on_step) as making:
        making.write_key(making.files.issuer_key, key)
        making.finish(trust_domain, issuer, above, at)
    return open_authority(folder, AskedPassphrase(lambda question: making.secret))  # known: nobody is asked twice


def open_authority(folder: Path, passphrase: Passphrase) -> Authority:
    """Open the authority in a state folder. The passphrase is read only when something is signed.

    Raises StoreError (STORE_NO_AUTHORITY, STORE_TOO_OPEN, STORE_SCHEMA_NEWER, STORE_CORRUPT, ...).
    """
    folder = folder.absolute()
    files = Folder(folder)
    with disk_errors(folder):
        try:
            files.ledger.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(Reason.STORE_NO_AUTHORITY, path=str(folder)) from None
    check_private(folder)
    forget_half_made(files)
    ledger = Ledger.open(files.ledger)
    try:
        return Authority(folder, ledger, passphrase)
    except BaseException:
        ledger.close()
        raise


@dataclass(frozen=True, slots=True)
class _Making:
    """The writing of one authority's files, in order."""

    files: Folder
    secret: bytes
    rounds: int
    on_step: Callable[[str], None]

    def write_key(self, path: Path, key: PrivateKey) -> None:
        self.on_step(path.name)
        write_private(path, encode_private_key(key, self.secret, self.rounds))

    def finish(
        self, trust_domain: str, issuer: x509.Certificate, above: Sequence[x509.Certificate], now: datetime
    ) -> None:
        """Write certificates and ledger. `above`: from the issuer's issuer to the root; () if it is a root."""
        files = self.files
        chain = [issuer, *above]
        root = chain[-1]
        self.on_step(files.root_certificate.name)
        write_public(files.root_certificate, encode_chain([root]))
        self.on_step(files.issuer_certificate.name)
        write_public(files.issuer_certificate, encode_chain(chain[:-1] or [root]))
        rows = [
            IssuerRow(
                number,
                anchor=certificate is root,
                signs=certificate is issuer,
                sha256=fingerprint(certificate),
                der=certificate.public_bytes(Encoding.DER),
            )
            for number, certificate in enumerate(chain, start=1)
        ]
        self.on_step(files.new_ledger.name)
        with disk_errors(files.new_ledger):
            Ledger.create(files.new_ledger, trust_domain, rows, now)
            self.on_step(files.ledger.name)
            os.replace(files.new_ledger, files.ledger)
            sync_folder(files.path)
        self.on_step("done")
        forget_half_made(files)


@contextmanager
def _making(folder: Path, passphrase: Passphrase, on_step: Callable[[str], None]) -> Iterator[_Making]:
    """Clear the ground for a new authority, and clear up if it fails."""
    make_private_folder(folder)
    files = Folder(folder)
    with lock(folder):
        if files.ledger.exists():
            raise StoreError(Reason.STORE_EXISTS, path=str(files.ledger))
        _sweep(files)
        for path in _parts(files):
            if os.path.lexists(path):
                raise StoreError(Reason.STORE_EXISTS, path=str(path))
        generated = isinstance(passphrase, GeneratedPassphrase)
        question = "Passphrase for the new authority's keys"
        secret = generate_passphrase() if generated else read_passphrase(passphrase, folder, question)
        on_step(files.half_made.name)
        write_private(files.half_made, b"")
        try:
            if generated:
                on_step(files.passphrase.name)
                write_private(files.passphrase, secret + b"\n")
            yield _Making(files, secret, _ROUNDS_FOR_RANDOM if generated else _ROUNDS_FOR_PEOPLE, on_step)
        except BaseException:
            if not files.ledger.exists():
                with suppress(StoreError):
                    _sweep(files)
            raise


def _sweep(files: Folder) -> None:
    """Remove what a making left that did not come to its end. Without its mark, nothing is touched."""
    if not files.half_made.exists():
        return
    with disk_errors(files.path):
        for path in _parts(files):
            path.unlink(missing_ok=True)
        for path in files.path.glob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)
        sync_folder(files.path)
        files.half_made.unlink(missing_ok=True)


def _parts(files: Folder) -> list[Path]:
    database = [files.new_ledger.with_name(files.new_ledger.name + suffix) for suffix in ("", "-wal", "-shm")]
    certificates = [files.root_certificate, files.issuer_certificate]
    return [files.passphrase, files.root_key, files.issuer_key, *certificates, *database]


def _sign_authority(
    plan: Plan, profile: str, key: PrivateKey, issuer: Issuer | None, now: datetime
) -> x509.Certificate:
    public = key.public_key()
    # The key's id tells authorities of the same trust domain apart, where software looks only at subjects.
    tail = f" {profile} {key_id(public).hex()[:8]}"
    name = plan.trust_domain[: _LONGEST_COMMON_NAME - len(tail)] + tail
    order = Order(PROFILES[profile], (), public, common_name=name, permitted=plan.permitted)
    builder = build_certificate(order, issuer, make_serial(0, secrets.token_bytes(16)), now)
    signing = key if issuer is None else issuer.key
    rehearsed = sign(builder, throwaway_key(signing))
    lint(rehearsed, order, None if issuer is None else issuer.certificate)
    return sign_as_rehearsed(builder, rehearsed, signing)


def _chain_above(issuer: x509.Certificate, others: Sequence[x509.Certificate], what: str) -> list[x509.Certificate]:
    """The certificates from the issuer's issuer up to a self-signed one, each signature checked."""
    chain: list[x509.Certificate] = []
    at = issuer
    while not _signed_by(at, at):
        parent = next((other for other in others if _signed_by(at, other)), None)
        if parent is None or parent in chain or len(chain) >= _LONGEST_CHAIN:
            detail = f"{at.issuer.rfc4514_string()} is missing"
            raise InvalidInput(Reason.INPUT_NO_CHAIN, cert=what, detail=detail)
        chain.append(parent)
        at = parent
    return chain


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _check_chain(chain: Sequence[x509.Certificate], now: datetime) -> None:
    """Whether the first certificate can issue leaves under the last, as any verifier will judge it."""
    for below, certificate in enumerate(chain):
        limit = _path_length(certificate)
        if limit is not None and limit < below:
            raise _not_ca(certificate, f"its path length of {limit} allows no {below} authorities below it")
        if certificate.not_valid_after_utc <= now:
            raise IssuanceRefused(Reason.ISSUE_ISSUER_EXPIRED, not_after=certificate.not_valid_after_utc)
        weak = weakness(_readable_key(certificate))
        if weak is not None:
            raise IssuanceRefused(Reason.ISSUE_WEAK_KEY, detail=weak)
        algorithm = certificate.signature_hash_algorithm
        if isinstance(algorithm, (hashes.MD5, hashes.SHA1)) and certificate is not chain[-1]:  # nobody checks a root's
            facts = {"subject": label(certificate), "hash": algorithm.name.upper()}
            raise VerificationFailed((Failure(Reason.VERIFY_WEAK_HASH, facts),))


def _path_length(certificate: x509.Certificate) -> int | None:
    """The path length an authority's certificate allows. Raises IssuanceRefused if it is none (RFC 5280 4.2.1.9)."""
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            raise _not_ca(certificate, "its basic constraints say that it is none")
        # RFC 5280 4.2.1.3 wants keyUsage, but openssl req -x509 makes roots without it, and verifiers take them.
        if not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign:
            raise _not_ca(certificate, "its key usage does not allow it to sign certificates")
    except x509.ExtensionNotFound as missing:
        if missing.oid == ExtensionOID.BASIC_CONSTRAINTS:
            raise _not_ca(certificate, "it has no basic constraints") from None
    except (ValueError, x509.UnsupportedGeneralNameType, x509.DuplicateExtension) as error:
        raise _not_ca(certificate, f"its extensions cannot be read ({error})") from None
    return constraints.path_length


def _readable_key(certificate: x509.Certificate) -> object:
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IssuanceRefused(Reason.ISSUE_WEAK_KEY, detail=str(error)) from None


def _not_ca(certificate: x509.Certificate, detail: str) -> IssuanceRefused:
    return IssuanceRefused(Reason.ISSUE_ISSUER_NOT_CA, subject=label(certificate), detail=detail)
