"""Files on disk: read within bounds, written whole or not at all, private where they hold keys.

The one place where handfast makes keys. It knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from handfast.errors import InvalidInput, Reason, StoreError
from handfast.pki.keys import KeyType, PrivateKey, parse_private_key

MAX_FILE = 1 << 20  # bytes: certificates, keys and requests are a few kB, a system's whole trust bundle 250 kB
TEMPORARY = ".tmp"  # how the names of files end that are being written

_RSA_EXPONENT = 65537  # NIST SP 800-56B 6.2: odd and at least 65537


def read_file(path: Path, kind: str, limit: int = MAX_FILE) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes. Never waits, as on a FIFO.

    `kind` says what is in it, as `certificate`. Raises InvalidInput (INPUT_MISSING, INPUT_UNREADABLE,
    INPUT_EMPTY, INPUT_TOO_LARGE).
    """
    try:
        # Non-blocking, or opening a FIFO would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidInput(Reason.INPUT_UNREADABLE, path=str(path), detail="it is not a regular file")
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidInput(Reason.INPUT_MISSING, path=str(path)) from None
    except OSError as error:
        raise InvalidInput(Reason.INPUT_UNREADABLE, path=str(path), detail=os.strerror(error.errno or 0)) from None
    except ValueError:  # a NUL byte in the path, or characters that no path can hold
        raise InvalidInput(Reason.INPUT_UNREADABLE, path=repr(str(path)), detail="it is not a path") from None
    if not data:
        raise InvalidInput(Reason.INPUT_EMPTY, what=str(path))
    if len(data) > limit:
        raise InvalidInput(Reason.INPUT_TOO_LARGE, what=str(path), limit=limit, kind=kind)
    return data


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read: mode 0600 from its first byte.

    Readers see the old bytes or the new ones, also after a power failure: a temporary file in the same
    folder is synced and renamed. A symbolic link at `path` is replaced, not followed. Raises StoreError
    (STORE_FULL, STORE_READ_ONLY, STORE_DISK) and then leaves nothing behind.
    """
    _write(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Write a file that all may read (mode 0644), in the same way as `write_private`."""
    _write(path, data, 0o644)


def make_private_folder(path: Path) -> None:
    """Make a folder with mode 0700, and its missing parents likewise; check it if it exists.

    Raises StoreError (STORE_TOO_OPEN, STORE_NOT_OURS, and what writing raises).
    """
    with disk_errors(path):
        for folder in [path, *path.parents][::-1]:
            if not folder.exists():
                try:
                    folder.mkdir(mode=0o700)
                except FileExistsError:  # another process was faster
                    continue
                sync_folder(folder.parent)
    check_private(path)


def check_private(path: Path) -> None:
    """Raise StoreError if anyone but its owner may read or write a file or folder, or if it is not ours.

    STORE_TOO_OPEN has the mode to give it; STORE_NOT_OURS says whose it is. STORE_DISK: it is not there.
    """
    with disk_errors(path):
        found = path.stat()
    want = "700" if stat.S_ISDIR(found.st_mode) else "600"
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise StoreError(Reason.STORE_TOO_OPEN, path=str(path), mode=f"{stat.S_IMODE(found.st_mode):03o}", want=want)
    if found.st_uid != os.geteuid():
        raise StoreError(Reason.STORE_NOT_OURS, path=str(path), owner=found.st_uid, me=os.geteuid())


def sync_folder(path: Path) -> None:
    """Make the renames and removals in a folder durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the OSErrors of writing at `path` into StoreError."""
    try:
        yield
    except OSError as error:
        detail = os.strerror(error.errno or 0)
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                raise StoreError(Reason.STORE_FULL, path=str(path)) from None
            case errno.EROFS | errno.EACCES | errno.EPERM:
                raise StoreError(Reason.STORE_READ_ONLY, path=str(path), detail=detail) from None
            case _:
                raise StoreError(Reason.STORE_DISK, path=str(path), detail=detail) from None


def generate_key(key_type: KeyType) -> PrivateKey:
    """Make a new private key."""
    match key_type:
        case KeyType.P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyType.P384:
            return ec.generate_private_key(ec.SECP384R1())
        case KeyType.ED25519:
            return ed25519.Ed25519PrivateKey.generate()
        case KeyType.RSA2048:
            return rsa.generate_private_key(_RSA_EXPONENT, 2048)
        case KeyType.RSA3072:
            return rsa.generate_private_key(_RSA_EXPONENT, 3072)
        case KeyType.RSA4096:
            return rsa.generate_private_key(_RSA_EXPONENT, 4096)


def load_key(path: Path, passphrase: bytes | None = None) -> PrivateKey:
    """Read a private key, PEM or DER. Raises InvalidInput as `read_file` and `parse_private_key` do."""
    return parse_private_key(read_file(path, "key"), str(path), passphrase)


def _write(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    with disk_errors(path):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), mode)  # as asked, whatever the umask
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
