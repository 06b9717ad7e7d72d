from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handfast.errors import InvalidInput, Reason, StoreError
from handfast.files import (
    check_private,
    generate_key,
    load_key,
    make_private_folder,
    read_file,
    write_private,
    write_public,
)
from handfast.pki.keys import KeyType, encode_private_key, key_type_of, same_key
from tests.authority.disks import mounted, remount


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk") as path:
        yield path


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_reads_a_file_up_to_its_limit(tmp_path: Path) -> None:
    """A file of exactly the limit is read whole; one byte more is refused."""
    path = tmp_path / "a.crt"
    path.write_bytes(b"x" * 10)
    assert read_file(path, "certificate", limit=10) == b"x" * 10
    with pytest.raises(InvalidInput) as refused:
        read_file(path, "certificate", limit=9)
    assert refused.value.reason is Reason.INPUT_TOO_LARGE


def _make_nothing(path: Path) -> None:
    pass


def _make_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_make_nothing, Reason.INPUT_MISSING),
        (Path.touch, Reason.INPUT_EMPTY),
        (Path.mkdir, Reason.INPUT_UNREADABLE),
        (os.mkfifo, Reason.INPUT_UNREADABLE),
        (_make_link_to_itself, Reason.INPUT_UNREADABLE),
    ],
)
def test_refuses_what_is_no_file_with_something_in_it(
    tmp_path: Path, make: Callable[[Path], None], reason: Reason
) -> None:
    """What is missing, empty, a folder, a FIFO without a writer or a loop is refused by its reason, at once."""
    path = tmp_path / "input"
    make(path)
    with pytest.raises(InvalidInput) as refused:
        read_file(path, "certificate")
    assert refused.value.reason is reason


@pytest.mark.parametrize("path", [Path("/dev/zero"), Path("a\0b"), Path("\ud800"), Path("x" * 5000)])
def test_refuses_devices_and_what_is_no_path(path: Path) -> None:
    """An endless device and a text that cannot be a path are refused and raise nothing else."""
    with pytest.raises(InvalidInput) as refused:
        read_file(path, "certificate")
    assert refused.value.reason is Reason.INPUT_UNREADABLE


def test_a_path_below_a_file_is_missing(tmp_path: Path) -> None:
    """A path that goes through a file names nothing."""
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(InvalidInput) as refused:
        read_file(tmp_path / "file" / "below", "certificate")
    assert refused.value.reason is Reason.INPUT_MISSING


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_are_as_asked_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    """A private file is 0600 and a public one 0644, also when they replace a file of another mode."""
    private, public = tmp_path / "a.key", tmp_path / "a.crt"
    private.touch(mode=0o666)
    before = os.umask(umask)
    try:
        write_private(private, b"secret")
        write_public(public, b"known")
    finally:
        os.umask(before)
    assert (_mode(private), private.read_bytes()) == (0o600, b"secret")
    assert (_mode(public), public.read_bytes()) == (0o644, b"known")
    assert sorted(os.listdir(tmp_path)) == ["a.crt", "a.key"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """Writing over a symbolic link leaves what it points to as it was."""
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_bytes(b"old")
    link.symlink_to(victim)
    write_private(link, b"new")
    assert (victim.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"old", b"new", False)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Where the rename cannot be done, the old state stays and no temporary file is left."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(StoreError) as refused:
        write_private(tmp_path / "taken", b"x")
    assert refused.value.reason is Reason.STORE_DISK
    assert os.listdir(tmp_path) == ["taken"]


def test_a_write_into_no_folder_is_refused(tmp_path: Path) -> None:
    """A folder that is not there is named as what is wrong."""
    with pytest.raises(StoreError) as refused:
        write_private(tmp_path / "no" / "a.key", b"x")
    assert refused.value.reason is Reason.STORE_DISK


def test_a_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    """On a full disk a write says so, keeps the old bytes and leaves no temporary file; with space it works."""
    path = small_disk / "a.key"
    write_private(path, b"old")
    with pytest.raises(StoreError) as refused:
        write_private(path, b"x" * (4 << 20))
    assert refused.value.reason is Reason.STORE_FULL
    assert (path.read_bytes(), os.listdir(small_disk)) == (b"old", ["a.key"])
    write_private(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_read_only_disk_is_told_as_such(small_disk: Path) -> None:
    """On a read-only file system a write is refused by that reason."""
    remount(small_disk, "ro")
    with pytest.raises(StoreError) as refused:
        write_private(small_disk / "a.key", b"x")
    assert refused.value.reason is Reason.STORE_READ_ONLY


def test_makes_a_private_folder_with_its_parents(tmp_path: Path) -> None:
    """The folder and the parents it had to make are 0700; making it again changes nothing."""
    path = tmp_path / "a" / "b"
    make_private_folder(path)
    make_private_folder(path)
    assert (_mode(tmp_path / "a"), _mode(path)) == (0o700, 0o700)


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o755, 0o720])
def test_refuses_a_folder_that_others_may_enter(tmp_path: Path, mode: int) -> None:
    """Any permission of group or others is refused, and the hint is the command that closes it."""
    path = tmp_path / "state"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(StoreError) as refused:
        make_private_folder(path)
    assert refused.value.reason is Reason.STORE_TOO_OPEN
    assert refused.value.hint == f"close it: chmod 700 {path}"
    path.chmod(0o700)
    make_private_folder(path)


def test_refuses_a_private_file_that_others_may_read(tmp_path: Path) -> None:
    """A key file that others may read is refused with its own chmod line; a closed one is not."""
    path = tmp_path / "a.key"
    path.write_bytes(b"x")
    path.chmod(0o640)
    with pytest.raises(StoreError) as refused:
        check_private(path)
    assert refused.value.hint == f"close it: chmod 600 {path}"
    path.chmod(0o600)
    check_private(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_refuses_a_folder_of_another_user(tmp_path: Path) -> None:
    """A folder that belongs to another user is refused, though its mode is right."""
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)
    with pytest.raises(StoreError) as refused:
        make_private_folder(path)
    assert refused.value.reason is Reason.STORE_NOT_OURS


def test_refuses_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    """A file in the place of the folder's parent is an error of the disk, not a traceback."""
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StoreError) as refused:
        make_private_folder(tmp_path / "file" / "state")
    assert refused.value.reason is Reason.STORE_DISK


@pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.P384, KeyType.ED25519, KeyType.RSA2048])
def test_keys_are_of_the_type_asked_for(key_type: KeyType) -> None:
    """A generated key is of its type."""
    assert key_type_of(generate_key(key_type).public_key()) is key_type


def test_loads_the_key_that_was_written(tmp_path: Path) -> None:
    """An encrypted key file opens with its passphrase and with no other."""
    key, path = generate_key(KeyType.P256), tmp_path / "a.key"
    write_private(path, encode_private_key(key, b"right", rounds=2048))
    assert same_key(load_key(path, b"right").public_key(), key.public_key())
    with pytest.raises(InvalidInput) as refused:
        load_key(path, b"wrong")
    assert refused.value.reason is Reason.INPUT_WRONG_PASSPHRASE
