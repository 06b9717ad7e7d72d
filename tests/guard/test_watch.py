from __future__ import annotations

import os
import time
import timeit
from pathlib import Path

import pytest

from handfast.guard.watch import MAX_UNREST, Watch, look


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tls.crt"
    path.write_text("one")
    return path


def replace(path: Path, text: str) -> None:
    """Write beside it and rename, as most tools do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def later(path: Path) -> None:
    """Let the file have been written a second later, whatever the clock's grain is."""
    now = path.stat().st_mtime_ns
    os.utime(path, ns=(now, now + 10**9))


def test_nothing_changes(file: Path) -> None:
    """A file that stays as it is is never told, also when it is read or its folder changes."""
    watch = Watch([file])
    file.read_text()
    (file.parent / "other").write_text("x")
    assert [watch.changed() for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize("how", ["replaced", "overwritten", "same size", "same size and time", "longer", "removed"])
def test_a_change_is_told_once_it_is_quiet(file: Path, how: str) -> None:
    """Each way to change a file is told at the second poll that sees it, and once."""
    watch = Watch([file])
    assert watch.changed() == []
    found = file.stat()
    match how:
        case "replaced":
            replace(file, "two")
        case "overwritten":
            file.write_text("different")
        case "same size":
            file.write_text("two")
            later(file)
        case "same size and time":  # cp -p
            file.write_text("two")
            os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
            until_other_ctime(file, found.st_ctime_ns)
        case "longer":
            with file.open("a") as stream:
                stream.write("more")
        case "removed":
            file.unlink()
    assert [watch.changed() for _ in range(4)] == [[], [file], [], []]


def until_other_ctime(path: Path, before: int) -> None:
    """Touch the inode until the clock's grain has passed."""
    while path.stat().st_ctime_ns == before:
        path.chmod(0o600)


def test_a_torn_write_is_not_told(file: Path) -> None:
    """While a file is being written, poll after poll, nothing is told; what is told is whole."""
    watch = Watch([file])
    with file.open("w") as stream:
        for _ in range(5):
            stream.write("part")
            stream.flush()
            assert watch.changed() == []
    assert watch.changed() == [file]


def test_a_pair_is_told_together(tmp_path: Path) -> None:
    """A certificate whose key comes a poll later is told with the key, never without it."""
    cert, key, other = tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt"
    for path in (cert, key, other):
        path.write_text("one")
    watch = Watch([cert, key, other])
    replace(cert, "the new one")
    assert watch.changed() == []
    replace(key, "the new key")
    assert watch.changed() == []
    assert watch.changed() == [cert, key]
    assert watch.changed() == []


def test_a_file_that_never_rests_does_not_hide_the_others(tmp_path: Path) -> None:
    """A file that changes with every poll delays what settled by a bounded number of polls."""
    restless, settled = tmp_path / "restless", tmp_path / "settled"
    restless.write_text("")
    settled.write_text("one")
    watch = Watch([restless, settled])
    replace(settled, "two!")
    told = []
    for _ in range(MAX_UNREST + 1):
        with restless.open("a") as stream:
            stream.write("x")
        told.append(watch.changed())
    assert [settled] in told
    assert sum(map(len, told)) == 1


def test_missing_files_count_once(file: Path) -> None:
    """A file that goes is one change, however long it is gone, and its return is another."""
    missing = file.with_name("missing")
    watch = Watch([file, missing])
    assert watch.changed() == []
    file.unlink()
    assert [watch.changed() for _ in range(4)] == [[], [file], [], []]
    missing.write_text("here")
    file.write_text("back")
    assert [watch.changed() for _ in range(3)] == [[], [file, missing], []]


def test_kubernetes_swaps_its_link(tmp_path: Path) -> None:
    """The link ..data that points to another folder changes all files below it, though each keeps its name."""
    for name in ("..1", "..2"):
        (tmp_path / name).mkdir()
    (tmp_path / "..1" / "tls.crt").write_text("one")
    os.link(tmp_path / "..1" / "tls.crt", tmp_path / "..2" / "tls.crt")  # the same inode: only the link tells
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "tls.crt"
    path.symlink_to("..data/tls.crt")
    watch = Watch([path])
    assert watch.changed() == []
    (tmp_path / "..tmp").symlink_to("..2")
    (tmp_path / "..tmp").replace(tmp_path / "..data")
    assert [watch.changed() for _ in range(3)] == [[], [path], []]


def test_following_others_keeps_what_is_to_be_told(file: Path) -> None:
    """New paths start as they are; a change of one that stays is still told; one that went is forgotten."""
    gone, new = file.with_name("gone"), file.with_name("new")
    gone.write_text("x")
    watch = Watch([file, gone])
    replace(file, "two!")
    replace(gone, "two!")
    assert watch.changed() == []
    new.write_text("new")
    watch.follow([new, file])
    assert watch.changed() == [file]
    replace(gone, "three")
    assert [watch.changed() for _ in range(2)] == [[], []]


@pytest.mark.parametrize("make", ["folder", "fifo", "loop", "nul", "unreadable"])
def test_what_is_no_file_is_looked_at_without_harm(tmp_path: Path, make: str) -> None:
    """Folders, FIFOs, loops of links and impossible paths neither block nor raise, and turn into files later."""
    path = tmp_path / "odd"
    match make:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "unreadable":
            path.write_text("secret")
            path.chmod(0)
        case "nul":
            path = Path("a\0b")
    watch = Watch([path])
    assert [watch.changed() for _ in range(3)] == [[]] * 3


def test_a_look_is_cheap(tmp_path: Path) -> None:
    """A look takes less than 20 µs, links of Kubernetes included: it is done for each file, twice a second."""
    (tmp_path / "..1").mkdir()
    (tmp_path / "..1" / "tls.crt").write_text("one")
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "tls.crt"
    path.symlink_to("..data/tls.crt")
    best = min(timeit.repeat(lambda: look(path), timer=time.thread_time, number=500, repeat=20)) / 500
    assert best < 20e-6
