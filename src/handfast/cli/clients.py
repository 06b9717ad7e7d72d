"""A client's files by its name: where they are, how they are written, and the command that makes them.

It loads the ledger's library only once a name is looked up: most verbs take files as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from handfast.errors import HandfastError, Reason
from handfast.pki.names import Name, parse_name


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


@dataclass(frozen=True, slots=True)
class Found:
    """A client's pair of files, the authorities beside it, and the command that makes the pair anew."""

    cert: Path
    key: Path
    ca: Path
    renew: str


def client_files(state: Path | None, text: str, *, here: bool = False) -> Found:
    """The files that `up` keeps for a client, or that `issue` wrote where they are looked for.

    `here`: also those that `issue` wrote in this folder. Raises InvalidInput where `text` is no name, and
    HandfastError (CONNECT_NO_CREDENTIAL), with the command that makes them, where one of the two is not there.
    """
    from handfast.cli.certificates import file_base, issue_command
    from handfast.cli.opening import folder_of

    folder, name = folder_of(state), parse_name(text, "any")  # the trust domain is no part of a file's name
    files = ClientFiles(name, folder / "clients" / file_base(name))
    local = ClientFiles(name, Path(file_base(name)))
    places: Sequence[tuple[ClientFiles, Path]] = ((files, folder / "root.crt"), (local, Path("ca.crt")))
    command = issue_command([text], files.base.parent, state)
    for found, ca in places if here else places[:1]:
        if found.cert.exists() and found.key.exists():
            return Found(found.cert, found.key, ca, f"{command} --force")
    where = f"{files.base.parent}{', nor in this folder' if here else ''}"
    in_the_way = files.cert.exists() or files.key.exists()
    step = f"{command} --force" if in_the_way else command
    raise HandfastError(Reason.CONNECT_NO_CREDENTIAL, name=text, path=where, next=step)
