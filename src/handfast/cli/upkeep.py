"""What keeps `up` going: a server certificate renewed in memory, client files renewed on disk, revocations taken over.

It joins the authority and the guard, which do not know each other.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509

from handfast.authority import Authority
from handfast.errors import HandfastError
from handfast.files import generate_key, read_file, write_private, write_public
from handfast.guard.service import Snapshot
from handfast.pki.certificates import certificate_names, encode_chain, parse_certificates
from handfast.pki.issuing import Order
from handfast.pki.keys import KeyType, PrivateKey, encode_private_key
from handfast.pki.names import Name
from handfast.pki.pkcs12 import encode_p12
from handfast.pki.profiles import PROFILES
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.policy import Policy
from handfast.tls.credential import Credential
from handfast.tls.server import ServerContext, ServerSettings


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """Where a client's certificate, key and PKCS#12 file are, and the password of the last."""

    name: Name
    base: Path

    @property
    def cert(self) -> Path:
        """The certificate and its chain, PEM."""
        return self.base.with_name(self.base.name + ".crt")

    @property
    def key(self) -> Path:
        """The private key, PEM, mode 0600."""
        return self.base.with_name(self.base.name + ".key")

    @property
    def p12(self) -> Path:
        """Key and chain for a browser, mode 0600."""
        return self.base.with_name(self.base.name + ".p12")

    @property
    def p12_password(self) -> Path:
        """The password of the PKCS#12 file, mode 0600."""
        return self.base.with_name(self.base.name + ".p12.password")


@dataclass(slots=True)
class Upkeep:
    """Makes snapshots for a guard from an authority. `refresh` is cheap when nothing has changed."""

    authority: Authority
    policy: Policy
    settings: ServerSettings
    server_names: tuple[Name, ...]
    clients: tuple[ClientFiles, ...]
    _credential: Credential | None = None
    _revision: int = -1
    _renew_at: dict[Path, datetime] = field(default_factory=dict)

    def snapshot(self, now: datetime) -> Snapshot:
        """Everything as of now; issues what is missing."""
        for client in self.clients:
            self._keep_client(client, now)
        if self._credential is None or now >= half_life(self._credential.chain[0]):
            self._credential = self._issue_server()
        self._revision = self.authority.revision()
        bundle = TrustBundle(self.authority.trust_bundle(), self.authority.trust_domain)
        terms = Terms(bundle, Purpose.CLIENT, revocations=self.authority.revocations(now=now))
        return Snapshot(ServerContext(self._credential, terms, self.settings), self.policy)

    def refresh(self, now: datetime) -> Snapshot | None:
        """A new snapshot if anything changed or a certificate is half spent; else None. Raises HandfastError."""
        assert self._credential is not None
        if (
            self.authority.revision() == self._revision
            and now < half_life(self._credential.chain[0])
            and all(now < at for at in self._renew_at.values())
        ):
            return None
        return self.snapshot(now)

    def _issue_server(self) -> Credential:
        key = generate_key(KeyType.P256)  # lives in this process alone; each start makes another
        order = Order(PROFILES["server"], self.server_names, key.public_key())
        issued = self.authority.issue(order, self.authority.authorize(self.server_names, PROFILES["server"]))
        return Credential(key, (issued.certificate, *issued.chain))

    def _keep_client(self, client: ClientFiles, now: datetime) -> None:
        due = self._renew_at.get(client.cert)
        if due is None:
            due = self._usable_until(client, now)
        if due is None or now >= due:
            due = half_life(self._issue_client(client))
        self._renew_at[client.cert] = due

    def _usable_until(self, client: ClientFiles, now: datetime) -> datetime | None:
        """When the files that are there are due for renewal; None if they do not serve."""
        try:
            leaf = parse_certificates(read_file(client.cert, "certificate file"), str(client.cert))[0]
        except HandfastError:
            return None
        ours = leaf.issuer == self.authority.issuer.subject and client.name in certificate_names(leaf)
        complete = client.key.exists() and client.p12.exists() and client.p12_password.exists()
        if not (ours and complete) or self.authority.revocations(now=now).revoked(leaf):
            return None
        return half_life(leaf)

    def _issue_client(self, client: ClientFiles) -> x509.Certificate:
        key = generate_key(KeyType.P256)
        profile = PROFILES["client"]
        order = Order(profile, (client.name,), key.public_key())
        issued = self.authority.issue(order, self.authority.authorize((client.name,), profile))
        save_client(client, key, (issued.certificate, *issued.chain))
        return issued.certificate


def save_client(client: ClientFiles, key: PrivateKey, chain: tuple[x509.Certificate, ...]) -> None:
    """Write a client's files; the password of its PKCS#12 file is kept if there is one."""
    client.base.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if client.p12_password.exists():
        password = read_file(client.p12_password, "password file").strip()
    else:
        password = secrets.token_urlsafe(15).encode()
        write_private(client.p12_password, password + b"\n")
    write_private(client.key, encode_private_key(key))
    write_public(client.cert, encode_chain(chain))
    write_private(client.p12, encode_p12(client.base.name, key, chain, password))


def half_life(certificate: x509.Certificate) -> datetime:
    """When a certificate is due for renewal: half way, as ACME's renewal information has it for short lives."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begins + (ends - begins) / 2
