"""The files that a connector's identity is in: read, checked as a pair, watched, and swapped as one value."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from handfast.connector.call import Generation
from handfast.connector.words import Own
from handfast.errors import Failure, HandfastError, Reason, VerificationFailed
from handfast.files import read_file
from handfast.pki.certificates import certificate_names, label
from handfast.pki.names import Name, parse_name
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.client import ClientContext, ClientSettings
from handfast.tls.credential import Credential, check_time, load_bundle, load_credential

_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Material:
    """Where a connector's identity is, and whom it calls.

    `name`: whose certificate of our own authority it must be, as a person writes it, or None. `server`: the name that
    the server must have, where `settings.expect` does not say it. `renew`: the command that brings a new certificate.
    """

    cert: Path
    key: Path
    ca: Path
    settings: ClientSettings
    renew: str
    server: Name | None = None
    name: str | None = None
    passphrase: bytes | None = None

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """All files."""
        return (self.cert, self.key, self.ca)

    def load(self, now: datetime) -> Generation:
        """Read and check everything. Raises HandfastError: what is wrong, and the next step."""
        credential, bundle = load_credential(self.cert, self.key, self.passphrase), load_bundle(self.ca)
        check_time(bundle.anchors, now)
        leaf = credential.chain[0]
        if now > leaf.not_valid_after_utc:
            ended = {"subject": label(leaf), "not_after": leaf.not_valid_after_utc}
            raise HandfastError(Reason.CONNECT_EXPIRED, **ended, next=f"run: {self.renew}")
        check_client(credential, now)
        if self.name is not None:
            self._check_name(leaf, self.name)
        trusted = TrustBundle(bundle.anchors, self._trust_domain(leaf))
        terms = Terms(trusted, Purpose.SERVER, self.server)
        return Generation(ClientContext(credential, terms, self.settings), Own(credential.chain, self.renew))

    def _check_name(self, leaf: x509.Certificate, text: str) -> None:
        names, name = certificate_names(leaf), parse_name(text, self._trust_domain(leaf))
        if name not in names:
            facts = {"names": ", ".join(map(str, names)) or label(leaf), "name": str(name)}
            raise VerificationFailed((Failure(Reason.VERIFY_NAME_MISMATCH, facts),))

    def _trust_domain(self, leaf: x509.Certificate) -> str | None:
        """Our own authority vouches for its own trust domain alone; of another's we know nothing."""
        if self.name is None:
            return None
        return next((name.trust_domain for name in certificate_names(leaf) if name.trust_domain), None)


def check_client(credential: Credential, now: datetime) -> None:
    """Refuse a credential that no server would accept from a client: out of its time, or for another use.

    Raises VerificationFailed (VERIFY_EXPIRED, VERIFY_NOT_YET_VALID, VERIFY_PURPOSE). One that does not say its use
    passes: many servers take it.
    """
    leaf = credential.chain[0]
    check_time((leaf,), now)
    try:
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(usages):
        words = "server" if ExtendedKeyUsageOID.SERVER_AUTH in usages else "another"
        facts = {"subject": label(leaf), "purpose": "client", "usages": words}
        raise VerificationFailed((Failure(Reason.VERIFY_PURPOSE, facts),))


@dataclass(slots=True)
class Watch:
    """Looks whether the files have changed; a change that is bad, or half done, keeps what is in force.

    What fails is looked at again each time, for time alone may mend it, and is reported once it has failed twice:
    certificate and key are two files, and are never replaced in the same instant.
    """

    material: Material
    failures: int = 0
    _stamp: _Stamp = ()
    _digest: bytes = b""
    _failing: tuple[bytes, str] = (b"", "")
    _told: tuple[bytes, str] = (b"", "")
    _again: bool = field(default=False)

    def first(self, now: datetime) -> Generation:
        """What the files hold at the start. Raises HandfastError."""
        self._stamp = self._stamps()
        generation = self.material.load(now)
        self._digest = self._digest_now()
        return generation

    def look(self, now: datetime) -> Generation | HandfastError | None:
        """A new generation, a failure not told before, or None. Cheap while nothing changes."""
        stamp = self._stamps()
        if stamp == self._stamp and not self._again:
            return None
        self._stamp = stamp
        digest = b""
        try:
            digest = self._digest_now()
            if digest == self._digest:
                self._again = False
                return None
            generation = self.material.load(now)
        except HandfastError as error:
            return self._failed(digest, error)
        if self._digest_now() != digest:  # replaced while they were read
            self._again = True
            return None
        self._digest, self._again = digest, False
        self._failing = self._told = (b"", "")
        return generation

    def _failed(self, digest: bytes, error: HandfastError) -> HandfastError | None:
        self._again = True
        failing = (digest, str(error))
        if failing != self._failing:
            self._failing = failing
            return None
        if failing == self._told:
            return None
        self._told = failing
        self.failures += 1
        return error

    def _stamps(self) -> _Stamp:
        return tuple(map(_stamp_of, self.material.paths))

    def _digest_now(self) -> bytes:
        whole = hashlib.sha256()
        for path in self.material.paths:
            whole.update(hashlib.sha256(read_file(path, "file")).digest())
        return whole.digest()


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
