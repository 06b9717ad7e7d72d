"""Where verbs put files: looked at before anything is issued, for a certificate that cannot be written is lost."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import click

from handfast.errors import HandfastError, Reason, StoreError
from handfast.files import disk_errors, read_file, sync_folder, write_private, write_public


def make_folder(folder: Path) -> None:
    """Make a folder for keys (mode 0700), if need be; one that is there stays as it is. Raises StoreError."""
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def check_places(paths: Iterable[Path], *, force: bool) -> None:
    """See that each file can be written: its folder takes files, and unless `force` says so, nothing is replaced.

    Raises StoreError, and UsageError where two would be one file.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.absolute() in seen:
            raise click.UsageError(f"two of the files to write would be called {path}")
        seen.add(path.absolute())
        if not path.parent.is_dir():
            raise StoreError(Reason.STORE_DISK, path=str(path.parent), detail="it is no folder")
        if path.is_dir():
            raise StoreError(Reason.STORE_DISK, path=str(path), detail="it is a folder")
        if not force and os.path.lexists(path):
            raise StoreError(Reason.STORE_EXISTS, path=str(path))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            frozen = os.statvfs(path.parent).f_flag & os.ST_RDONLY
            detail = "its disk is read-only" if frozen else "permission denied"
            raise StoreError(Reason.STORE_READ_ONLY, path=str(path.parent), detail=detail)


def place_pair(key: Path, key_pem: bytes, certificate: Path, pem: bytes, *, held: bool = False) -> None:
    """Write a private key (0600) and its certificate; neither, on a disk that takes but one. Raises StoreError.

    Both are on the disk before either gets its name. The certificate gets it last: whoever is killed in between leaves
    an old one, or none, and by that a renewal sees that it is due. A new one beside the old key would look done. If the
    certificate cannot get its name, the key that was there comes back. Two that write at once would mix their pairs, so
    the key's folder is held meanwhile; `held`: the caller does.
    """
    staged_key, staged = (path.with_name(f".{path.name}.new") for path in (key, certificate))
    old = key.with_name(f".{key.name}.old")
    with nullcontext() if held else alone(key.parent, wait=True), disk_errors(key):
        try:
            old.unlink(missing_ok=True)  # of one that was killed
            write_private(staged_key, key_pem)
            write_public(staged, pem)
            with suppress(OSError):  # there is none, or the disk has no links
                old.hardlink_to(key)
            staged_key.replace(key)
            sync_folder(key.parent)  # or a power failure could swap the order
            try:
                staged.replace(certificate)
            except OSError:
                with suppress(OSError):
                    old.replace(key)
                raise
            sync_folder(certificate.parent)
        finally:
            for left in (staged_key, staged, old):
                left.unlink(missing_ok=True)


def place_bundle(path: Path, bundle: bytes, *, force: bool) -> None:
    """Put a trust bundle where perhaps one is. Somebody else's `ca.crt` is not replaced. Raises StoreError."""
    if os.path.lexists(path) and not force:
        if not _holds(path, bundle):
            raise StoreError(Reason.STORE_EXISTS, path=str(path))
    else:
        write_public(path, bundle)


def _holds(path: Path, wanted: bytes) -> bool:
    try:
        return read_file(path, "trust bundle") == wanted
    except HandfastError:
        return False


@contextmanager
def alone(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a folder of clients for a moment; False if another process holds it. Raises StoreError.

    `wait`: until nobody else does. A process that holds it already would wait for itself.
    """
    with disk_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        with disk_errors(folder):
            mine = _locked(descriptor, wait)
        yield mine
    finally:
        os.close(descriptor)


def _locked(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
