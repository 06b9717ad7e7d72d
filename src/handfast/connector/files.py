"""The files that a connector's identity is in: read, checked as a pair, watched, and swapped as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509

from handfast.connector.call import Generation
from handfast.connector.words import Own
from handfast.errors import Failure, HandfastError, Reason, VerificationFailed
from handfast.guard.watch import Watch as FileWatch
from handfast.pki.certificates import certificate_names, label
from handfast.pki.names import Name, parse_name
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.client import ClientContext, ClientSettings
from handfast.tls.credential import check_time, check_usable, load_bundle, load_credential


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
        check_usable(credential, Purpose.CLIENT, now)
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


@dataclass(slots=True)
class Watch:
    """Looks whether the files have changed; a change that is bad keeps what is in force.

    What fails is looked at again each time, for time alone may mend it, and is reported once.
    """

    material: Material
    failures: int = 0
    _files: FileWatch = field(default_factory=lambda: FileWatch(()))
    _holds: tuple[object, ...] = ()
    _failing: bool = False
    _told: str = ""

    def first(self, now: datetime) -> Generation:
        """What the files hold at the start. Raises HandfastError."""
        self._files.follow(self.material.paths)  # before they are read: a change meanwhile is seen later
        generation = self.material.load(now)
        self._holds = _held(generation)
        return generation

    def look(self, now: datetime) -> Generation | HandfastError | None:
        """A new generation, a failure not told before, or None. Cheap while nothing changes."""
        if not self._files.changed() and not self._failing:
            return None
        try:
            generation = self.material.load(now)
        except HandfastError as error:
            return self._failed(error)
        self._failing, self._told = False, ""
        if _held(generation) == self._holds:  # the files were touched, or are again what they were
            return None
        self._holds = _held(generation)
        return generation

    def _failed(self, error: HandfastError) -> HandfastError | None:
        self._failing = True
        if str(error) == self._told:
            return None
        self._told = str(error)
        self.failures += 1
        return error


def _held(generation: Generation) -> tuple[object, ...]:
    """What tells one generation from another: a certificate has but one key."""
    return generation.own.chain, generation.context.terms.bundle
