"""What keeps `up` going: a server certificate renewed in memory, client files renewed on disk, revocations taken over.

It joins the authority and the guard, which do not know each other.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from handfast.authority import Authority, Issued
from handfast.cli.clients import ClientFiles
from handfast.cli.output import first_line
from handfast.cli.placing import place_pair
from handfast.errors import HandfastError, InvalidInput, Reason, StoreError
from handfast.files import generate_key, make_private_folder, read_file, write_private
from handfast.guard.assembly import caller_of
from handfast.guard.routes import Snapshot, one_site
from handfast.guard.schema import UpstreamConfig
from handfast.guard.upstream import Upstreams
from handfast.pki.certificates import certificate_names, encode_chain
from handfast.pki.issuing import Order
from handfast.pki.keys import KeyType, PrivateKey, encode_private_key
from handfast.pki.names import Name
from handfast.pki.pkcs12 import encode_p12, parse_p12
from handfast.pki.profiles import PROFILES
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.policy import Policy
from handfast.tls.credential import Credential, load_credential
from handfast.tls.server import ServerContext, ServerSettings

LISTENER = "main"  # what the one listener of `up` is called
_PAUSE = timedelta(seconds=60)  # between two attempts to renew one certificate; each is a row in the ledger


@dataclass(slots=True)
class Upkeep:
    """Makes snapshots for a guard from an authority. `refresh` is cheap when nothing has changed.

    A revocation never waits for a renewal: while certificates cannot be issued or written, as on a full disk,
    those there are serve on, and what is revoked is refused. A client whose last certificate was revoked gets no other
    one here: it is `withheld` until somebody issues one on purpose. An app that speaks TLS is held to this authority.
    Raises InvalidInput where two clients would share files.
    """

    authority: Authority
    upstreams: Upstreams
    policy: Policy
    settings: ServerSettings
    server_names: tuple[Name, ...]
    clients: tuple[ClientFiles, ...]
    withheld: dict[ClientFiles, datetime] = field(default_factory=dict)  # and when they were revoked
    _credential: Credential | None = None
    _revision: int = -1
    _due: dict[Path | None, datetime] = field(default_factory=dict)  # when to renew: a client's file; None: the server

    def __post_init__(self) -> None:
        self.clients = tuple(dict.fromkeys(self.clients))
        taken: dict[Path, Name] = {}
        for client in self.clients:
            other = taken.setdefault(client.cert, client.name)
            if other != client.name:
                detail = f"its files would be those of {other}"
                raise InvalidInput(Reason.INPUT_NAME, value=str(client.name), detail=detail)

    def snapshot(self, now: datetime) -> Snapshot:
        """Everything as of now; issues what is missing."""
        for client in self.clients:
            self._keep(client, now)
        self._issue_server(now)
        return self._as_of(now)

    def refresh(self, now: datetime) -> Snapshot | None:
        """A new snapshot if anything changed or a certificate is half spent; else None. Raises HandfastError."""
        if self.authority.revision() != self._revision:
            return self._as_of(now)
        for client in self.clients:
            if now >= self._due[client.cert]:
                self._due[client.cert] = now + _PAUSE  # if it fails
                self._keep(client, now)
        if now >= self._due[None]:
            self._due[None] = now + _PAUSE
            self._issue_server(now)
            return self._as_of(now)
        return None

    def _as_of(self, now: datetime) -> Snapshot:
        assert self._credential is not None
        revision = self.authority.revision()  # before the list: one more that comes meanwhile is seen the next time
        bundle = TrustBundle(self.authority.trust_bundle(), self.authority.trust_domain)
        terms = Terms(bundle, Purpose.CLIENT, revocations=self.authority.revocations(now=now))
        context = ServerContext(self._credential, terms, self.settings)
        if (target := self.upstreams.target).tls:
            asked = UpstreamConfig(targets=(str(target),))
            self.upstreams = replace(self.upstreams, handshake=caller_of(asked, bundle, terms.revocations))
        snapshot = Snapshot({LISTENER: one_site(context, self.policy, self.upstreams)})
        self._revision = revision
        return snapshot

    def _keep(self, client: ClientFiles, now: datetime) -> None:
        """Have a client's files serve, unless its last certificate was revoked."""
        due = self._usable_until(client, now)
        revoked = self._revoked_at(client) if due is None else None
        if revoked is not None:
            self.withheld[client] = revoked
            self._due[client.cert] = now + _PAUSE
            return
        self.withheld.pop(client, None)
        self._due[client.cert] = due or self._issue_client(client, now)

    def _revoked_at(self, client: ClientFiles) -> datetime | None:
        """When the last certificate of a client's name was revoked; None if it was not, or there was none."""
        try:
            known = self.authority.find(str(client.name))
        except StoreError as error:
            if error.reason is Reason.STORE_NO_CERTIFICATE:
                return None
            raise
        return max(known, key=lambda record: (record.not_before, record.revoked_at is None)).revoked_at

    def _issue_server(self, now: datetime) -> None:
        key = generate_key(KeyType.P256)  # lives in this process alone; each start makes another
        issued = self._issue(Order(PROFILES["server"], self.server_names, key.public_key()), now)
        self._credential = Credential(key, (issued.certificate, *issued.chain))
        self._due[None] = _renewal(issued.certificate, now)

    def _usable_until(self, client: ClientFiles, now: datetime) -> datetime | None:
        """When the files that are there are due for renewal; None if they do not serve, or are due."""
        try:
            leaf = load_credential(client.cert, client.key).chain[0]
        except HandfastError:
            return None
        ours = leaf.issuer == self.authority.issuer.subject and client.name in certificate_names(leaf)
        if not (ours and _is_in_p12(leaf, client)) or self.authority.revocations(now=now).revoked(leaf):
            return None
        due = half_life(leaf)
        return due if now < due else None

    def _issue_client(self, client: ClientFiles, now: datetime) -> datetime:
        key = generate_key(KeyType.P256)
        issued = self._issue(Order(PROFILES["client"], (client.name,), key.public_key()), now)
        save_client(client, key, (issued.certificate, *issued.chain))
        due = self._due[client.cert] = _renewal(issued.certificate, now)
        return due

    def _issue(self, order: Order, now: datetime) -> Issued:
        return self.authority.issue(order, self.authority.authorize(order.names, order.profile, now=now), now=now)


def save_client(
    client: ClientFiles, key: PrivateKey, chain: tuple[x509.Certificate, ...], *, held: bool = False
) -> None:
    """Write a client's files; the password of its PKCS#12 file is kept if there is one.

    The pair comes last, for by its certificate it is seen whether all was written. `held`: see `place_pair`. Raises
    StoreError.
    """
    make_private_folder(client.base.parent)
    if client.p12_password.exists():
        password = first_line(client.p12_password)
    else:
        password = secrets.token_urlsafe(15).encode()
        write_private(client.p12_password, password + b"\n")
    write_private(client.p12, encode_p12(client.base.name, key, chain, password))
    place_pair(client.key, encode_private_key(key), client.cert, encode_chain(chain), held=held)


def _is_in_p12(leaf: x509.Certificate, client: ClientFiles) -> bool:
    """Whether a client's PKCS#12 file is there and holds this certificate, and no older one."""
    try:
        password = first_line(client.p12_password)
        _, chain = parse_p12(read_file(client.p12, "PKCS#12 file"), str(client.p12), password)
    except HandfastError:
        return False
    return chain[:1] == (leaf,)


def half_life(certificate: x509.Certificate) -> datetime:
    """When a certificate is due for renewal: half way, as ACME's renewal information has it for short lives."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begins + (ends - begins) / 2


def _renewal(certificate: x509.Certificate, now: datetime) -> datetime:
    """As `half_life`, but never at once: close to the issuer's own end, new certificates are hardly longer lived."""
    return max(half_life(certificate), now + _PAUSE)
