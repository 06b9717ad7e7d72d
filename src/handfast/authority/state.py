"""The state folder: where it is, what is in it, who may change it, and what opens its keys.

A folder holds an authority if and only if it holds a ledger; `founding` makes one, in that order.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from handfast.errors import InvalidInput, Reason, StoreError
from handfast.files import check_private, disk_errors, make_private_folder, read_file

PASSPHRASE_VARIABLE = "HANDFAST_PASSPHRASE"  # noqa: S105 - where one is, not one

_LONGEST_PASSPHRASE = 1000  # bytes; OpenSSL reads 1023 at most
_LOCK_WAIT = timedelta(seconds=2)
_LOCK_POLL = 0.02  # seconds
_held: dict[Path, int] = {}  # how often this process has entered the lock of a folder
_held_turn = threading.Lock()


@dataclass(frozen=True, slots=True)
class Folder:
    """The names of the files in a state folder."""

    path: Path

    @property
    def root_certificate(self) -> Path:
        """What others trust: PEM, for copying."""
        return self.path / "root.crt"

    @property
    def root_key(self) -> Path:
        """Encrypted PKCS#8; absent where the root's key is kept elsewhere."""
        return self.path / "root.key"

    @property
    def issuer_certificate(self) -> Path:
        """The issuer's certificate, and those between it and the root: PEM, for copying."""
        return self.path / "issuer.crt"

    @property
    def issuer_key(self) -> Path:
        """Encrypted PKCS#8."""
        return self.path / "issuer.key"

    @property
    def ledger(self) -> Path:
        """The database: the authority exists once this does."""
        return self.path / "ledger.db"

    @property
    def new_ledger(self) -> Path:
        """The database while it is being made."""
        return self.path / "ledger.new"

    @property
    def passphrase(self) -> Path:
        """The generated passphrase, where it was generated."""
        return self.path / "passphrase"

    @property
    def half_made(self) -> Path:
        """A mark that an authority is being made here: what is beside it may be swept."""
        return self.path / ".half-made"

    @property
    def lock(self) -> Path:
        """The file that `lock` locks; never removed."""
        return self.path / "lock"


@dataclass(frozen=True, slots=True)
class AskedPassphrase:
    """A person is asked, by a function that is given the question."""

    ask: Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class PassphraseFile:
    """The first line of a file."""

    path: Path


@dataclass(frozen=True, slots=True)
class PassphraseVariable:
    """An environment variable."""

    name: str = PASSPHRASE_VARIABLE


@dataclass(frozen=True, slots=True)
class GeneratedPassphrase:
    """Made by handfast and kept beside the keys, mode 0600, for machines that start with nobody there."""


Passphrase: TypeAlias = AskedPassphrase | PassphraseFile | PassphraseVariable | GeneratedPassphrase


def default_folder() -> Path:
    """`$HANDFAST_HOME`, or `handfast` in the XDG data folder (XDG Base Directory 0.8)."""
    if home := os.environ.get("HANDFAST_HOME"):
        return Path(home).absolute()
    data = os.environ.get("XDG_DATA_HOME", "")
    # The specification wants relative paths to be ignored.
    base = Path(data) if data.startswith("/") else Path("~/.local/share").expanduser()
    return base / "handfast"


def usual_passphrase(folder: Path, ask: Callable[[str], bytes]) -> Passphrase:
    """Where the passphrase of a folder comes from when nothing was said: variable, generated file, person."""
    if PASSPHRASE_VARIABLE in os.environ:
        return PassphraseVariable()
    if os.path.exists(Folder(folder).passphrase):  # not Path.exists: that raises in a folder we may not enter
        return GeneratedPassphrase()
    return AskedPassphrase(ask)


def read_passphrase(source: Passphrase, folder: Path, question: str) -> bytes:
    """Return the passphrase. Raises InvalidInput, also INPUT_NO_PASSPHRASE, and StoreError (STORE_TOO_OPEN)."""
    match source:
        case AskedPassphrase(ask):
            found = ask(question)
        case PassphraseFile(path):
            found = _first_line(path)
        case PassphraseVariable(name):
            found = os.environb.get(name.encode(), b"")
            if not found:
                raise InvalidInput(Reason.INPUT_NO_PASSPHRASE)
        case GeneratedPassphrase():
            path = Folder(folder).passphrase
            if path.exists():
                check_private(path)
            found = _first_line(path)
    if not found:
        raise InvalidInput(Reason.INPUT_EMPTY, what="the passphrase")
    if len(found) > _LONGEST_PASSPHRASE:
        raise InvalidInput(Reason.INPUT_TOO_LARGE, what="the passphrase", limit=_LONGEST_PASSPHRASE, kind="passphrase")
    return found


def generate_passphrase() -> bytes:
    """Return 32 random bytes as hex text, which a person can copy and openssl can read from a file."""
    return secrets.token_hex(32).encode()


def utc_now() -> datetime:
    """The one clock of the authority."""
    return datetime.now(UTC)


@contextmanager
def lock(folder: Path, wait: timedelta = _LOCK_WAIT) -> Iterator[None]:
    """Hold the folder for oneself: for making an authority in it, and for one `up` at a time.

    Makes the folder if need be. The kernel lets go when the process ends, however it ends. A process that
    holds it may enter again. Raises StoreError (STORE_LOCKED) if another process holds it for longer than `wait`.
    """
    make_private_folder(folder)
    path = folder.resolve()
    with _held_turn:
        entered = _held.get(path, 0)
        if entered:
            _held[path] = entered + 1
    descriptor = None if entered else _acquire(Folder(path).lock, wait)
    if descriptor is not None:
        with _held_turn:
            _held[path] = 1
    try:
        yield
    finally:
        with _held_turn:
            _held[path] -= 1
        if descriptor is not None:
            os.close(descriptor)


def forget_half_made(folder: Folder) -> None:
    """Remove a mark that outlived its making. Else a ledger lost later would have the keys swept."""
    if folder.ledger.exists():
        with suppress(OSError):
            folder.half_made.unlink(missing_ok=True)


def _acquire(path: Path, wait: timedelta) -> int:
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait.total_seconds()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise StoreError(Reason.STORE_LOCKED, path=str(path.parent)) from None
            time.sleep(_LOCK_POLL)


def _first_line(path: Path) -> bytes:
    return read_file(path, "passphrase", limit=4096).partition(b"\n")[0].removesuffix(b"\r")
