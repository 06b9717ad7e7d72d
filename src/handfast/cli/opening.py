"""How verbs come by an authority: which folder, and what opens its keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handfast.authority import (
    AskedPassphrase,
    Authority,
    GeneratedPassphrase,
    Passphrase,
    PassphraseFile,
    PassphraseVariable,
    Plan,
    create_authority,
    default_folder,
    lock,
    open_authority,
    usual_passphrase,
)
from handfast.authority.state import PASSPHRASE_VARIABLE, Folder
from handfast.cli.output import asked, note
from handfast.errors import InvalidInput, Reason
from handfast.pki.certificates import serial_text

TRUST_DOMAIN = "handfast.internal"  # .internal is set aside for private use (ICANN, 2024)


def folder_of(state: Path | None) -> Path:
    """The state folder: as given, or the default."""
    return default_folder() if state is None else state.absolute()


def opened(state: Path | None, passphrase_file: Path | None = None) -> Authority:
    """Open the authority, and say what a killed issuance may have left. Raises StoreError."""
    folder = folder_of(state)
    authority = open_authority(folder, _source(folder, passphrase_file))
    try:
        swept = authority.sweep()
    except BaseException:
        authority.close()
        raise
    for lost in swept:
        serial = serial_text(lost.serial)
        note(f"note: an issuance for {', '.join(lost.names)} was cut off on {lost.at:%Y-%m-%d %H:%M} UTC;")
        note(f"      its certificate was maybe signed. To be sure: handfast revoke {serial}")
    return authority


@contextmanager
def founded(folder: Path, trust_domain: str | None, passphrase_file: Path | None) -> Iterator[Authority]:
    """Open the authority in a folder for a server to run on, and make it first if there is none.

    The folder is locked for the time: two servers on one state would renew each other's files. Raises StoreError,
    and InvalidInput where the authority that is there is of another trust domain than the one asked for.
    """
    with lock(folder):
        if Folder(folder).ledger.exists():
            authority = opened(folder, passphrase_file)
            if trust_domain not in (None, authority.trust_domain):
                authority.close()
                detail = f"the authority in {folder} is of {authority.trust_domain}"
                raise InvalidInput(Reason.INPUT_NAME, value=trust_domain, detail=detail)
        else:
            passphrase = new_passphrase(passphrase_file, ask=False)
            authority = create_authority(folder, Plan(trust_domain or TRUST_DOMAIN), passphrase)
            note(f"made an authority for {authority.trust_domain} in {folder}")
            if isinstance(passphrase, GeneratedPassphrase):
                note("  its keys are encrypted under a generated passphrase beside them, readable by you alone")
        with authority:
            yield authority


def new_passphrase(passphrase_file: Path | None, ask: bool) -> Passphrase:
    """Where the passphrase of a new authority comes from: a file, a prompt, the environment, or made up."""
    if passphrase_file is not None:
        return PassphraseFile(passphrase_file)
    if ask:
        return AskedPassphrase(lambda question: asked(question, confirm=True))
    return PassphraseVariable() if PASSPHRASE_VARIABLE in os.environ else GeneratedPassphrase()


def _source(folder: Path, passphrase_file: Path | None) -> Passphrase:
    return PassphraseFile(passphrase_file) if passphrase_file else usual_passphrase(folder, asked)
