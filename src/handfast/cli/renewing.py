"""Renewal of a client's files by the authority in the state folder, for the verbs that use them for long."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from handfast.authority import Authority, Passphrase, PassphraseFile, open_authority, usual_passphrase
from handfast.authority.state import AskedPassphrase, Folder
from handfast.cli.clients import ClientFiles
from handfast.cli.output import asked, note
from handfast.cli.placing import alone, place_pair
from handfast.cli.upkeep import half_life, save_client
from handfast.errors import HandfastError, InvalidInput, Reason, StoreError
from handfast.files import generate_key, read_file
from handfast.pki.certificates import certificate_names, fingerprint, parse_certificates, serial_text
from handfast.pki.issuing import Order
from handfast.pki.keys import KeyType, encode_private_key
from handfast.pki.profiles import PROFILES

_GRACE = 20  # one part of so many of a certificate's life, in which an `up` that keeps the same files goes first


@dataclass(frozen=True, slots=True)
class Renewal:
    """Renews one certificate under today's rules of its authority, with a new key and the same names.

    What was revoked is not renewed. Nobody is asked anything.
    """

    folder: Path
    passphrase: Passphrase
    cert: Path
    key: Path

    def before_start(self, now: datetime) -> None:
        """Renew at once what is due. Where that fails, what is there may still serve: say so, and go on."""
        try:
            if self.renew(now):
                note(f"renewed {self.cert}")
        except HandfastError as error:
            note(f"note: {self.cert} is due for renewal, and was not renewed: {error}")

    def renew(self, now: datetime) -> bool:
        """Renew the certificate if it is due; return whether that was done. Raises HandfastError."""
        if not self._due(now):
            return False
        with alone(self.cert.parent) as mine:
            if not mine or not self._due(now):  # another connector was faster
                return False
            with open_authority(self.folder, self.passphrase) as authority:
                self._issue(authority, now)
        return True

    def _due(self, now: datetime) -> bool:
        leaf = self._leaf()
        return now >= half_life(leaf) + (leaf.not_valid_after_utc - leaf.not_valid_before_utc) / _GRACE

    def _issue(self, authority: Authority, now: datetime) -> None:
        leaf = self._leaf()
        try:
            record = authority.find(serial_text(leaf.serial_number))[0]
        except (StoreError, InvalidInput):
            raise self._refused("this authority did not issue it") from None
        if record.sha256 != fingerprint(leaf):
            raise self._refused("this authority did not issue it")
        if record.revoked_at is not None:
            raise self._refused(f"it was revoked on {record.revoked_at:%Y-%m-%d %H:%M} UTC")
        key, names = generate_key(KeyType.P256), certificate_names(leaf)
        order = Order(PROFILES[record.profile], names, key.public_key())
        issued = authority.issue(order, authority.authorize(names, order.profile, now=now), now=now)
        files = ClientFiles(names[0], self.cert.with_suffix(""))
        if files.p12.exists():
            save_client(files, key, (issued.certificate, *issued.chain), held=True)
        else:
            place_pair(self.key, encode_private_key(key), self.cert, issued.pem, held=True)

    def _leaf(self) -> x509.Certificate:
        return parse_certificates(read_file(self.cert, "certificate file"), str(self.cert))[0]

    def _refused(self, detail: str) -> HandfastError:
        return HandfastError(Reason.CONNECT_NOT_ISSUED_HERE, cert=str(self.cert), detail=detail)


def renewal_of(cert: Path, key: Path, folder: Path, passphrase_file: Path | None) -> Renewal | None:
    """What renews these files; None where there is no authority, or its keys would need a person."""
    if not Folder(folder).ledger.exists():
        return None
    source = PassphraseFile(passphrase_file) if passphrase_file else usual_passphrase(folder, asked)
    if isinstance(source, AskedPassphrase):
        return None
    return Renewal(folder, source, cert, key)
