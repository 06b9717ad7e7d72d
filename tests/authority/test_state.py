from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from handfast.authority import (
    AskedPassphrase,
    GeneratedPassphrase,
    Passphrase,
    PassphraseFile,
    PassphraseVariable,
    default_folder,
    lock,
    usual_passphrase,
)
from handfast.authority.state import read_passphrase
from handfast.errors import HandfastError, Reason, StoreError
from tests.authority.kit import processes


def _ask(question: str) -> bytes:
    return b"from a person"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HANDFAST_HOME": "/srv/ca", "XDG_DATA_HOME": "/data"}, "/srv/ca"),
        ({"XDG_DATA_HOME": "/data"}, "/data/handfast"),
        ({"XDG_DATA_HOME": "relative", "HOME": "/home/ann"}, "/home/ann/.local/share/handfast"),
        ({"HANDFAST_HOME": "", "HOME": "/home/ann"}, "/home/ann/.local/share/handfast"),
    ],
)
def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    """HANDFAST_HOME wins, then an absolute XDG_DATA_HOME, then the home folder."""
    for variable in ("HANDFAST_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert default_folder() == Path(expected)


def test_the_passphrase_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable comes before the generated file, and a person is asked when there is neither."""
    monkeypatch.delenv("HANDFAST_PASSPHRASE", raising=False)
    assert usual_passphrase(tmp_path, _ask) == AskedPassphrase(_ask)
    (tmp_path / "passphrase").touch(mode=0o600)
    assert usual_passphrase(tmp_path, _ask) == GeneratedPassphrase()
    monkeypatch.setenv("HANDFAST_PASSPHRASE", "from the environment")
    assert usual_passphrase(tmp_path, _ask) == PassphraseVariable()


def test_each_source_gives_its_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gives its first line without the line's end, a variable its bytes, a person the answer."""
    monkeypatch.setenv("HANDFAST_PASSPHRASE", "grüße")
    (tmp_path / "file").write_bytes(b"first line\r\nsecond")
    (tmp_path / "passphrase").write_bytes(b"generated\n")
    (tmp_path / "passphrase").chmod(0o600)
    sources: dict[bytes, Passphrase] = {
        b"from a person": AskedPassphrase(_ask),
        b"first line": PassphraseFile(tmp_path / "file"),
        "grüße".encode(): PassphraseVariable(),
        b"generated": GeneratedPassphrase(),
    }
    for expected, source in sources.items():
        assert read_passphrase(source, tmp_path, "Passphrase") == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (AskedPassphrase(lambda question: b""), Reason.INPUT_EMPTY),
        (AskedPassphrase(lambda question: b"s3cret" * 500), Reason.INPUT_TOO_LARGE),
        (PassphraseFile(Path("/nowhere/passphrase")), Reason.INPUT_MISSING),
        (PassphraseVariable("HANDFAST_NOT_SET"), Reason.INPUT_NO_PASSPHRASE),
        (GeneratedPassphrase(), Reason.INPUT_MISSING),
    ],
)
def test_a_passphrase_that_cannot_be_had_is_refused(tmp_path: Path, source: Passphrase, reason: Reason) -> None:
    """Each source that gives nothing usable is refused by its reason, and no secret is in the message."""
    with pytest.raises(HandfastError) as refused:
        read_passphrase(source, tmp_path, "Passphrase")
    assert refused.value.reason is reason
    assert "s3cret" not in repr(refused.value.facts) + str(refused.value)


def test_a_generated_passphrase_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """The file of a generated passphrase must be closed to others."""
    (tmp_path / "passphrase").write_bytes(b"generated\n")
    (tmp_path / "passphrase").chmod(0o644)
    with pytest.raises(StoreError) as refused:
        read_passphrase(GeneratedPassphrase(), tmp_path, "Passphrase")
    assert refused.value.reason is Reason.STORE_TOO_OPEN


def _hold(folder: Path, pipe: Connection) -> None:
    with lock(folder):
        pipe.send("held")
        pipe.recv()


@contextmanager
def _held_elsewhere(folder: Path) -> Iterator[Connection]:
    ours, theirs = processes.Pipe()
    child = processes.Process(target=_hold, args=(folder, theirs))
    child.start()
    assert ours.recv() == "held"
    try:
        yield ours
    finally:
        child.kill()
        child.join()
        ours.close()
        theirs.close()


def test_a_folder_is_held_by_one_process(folder: Path) -> None:
    """A lock held by another process is waited for, but not for long; when its holder is killed it is free."""
    with _held_elsewhere(folder):
        started = time.monotonic()
        with pytest.raises(StoreError) as refused, lock(folder, wait=timedelta(milliseconds=50)):
            pass
        assert refused.value.reason is Reason.STORE_LOCKED
        assert time.monotonic() - started < 20
    with lock(folder, wait=timedelta(0)):
        pass


def test_the_holder_may_enter_again(folder: Path) -> None:
    """A process that holds the folder can take it once more, and keeps it until it left as often."""
    with lock(folder):
        with lock(folder):
            pass
        assert _locked_for_others(folder)
    assert not _locked_for_others(folder)


def _try(folder: Path) -> None:
    with lock(folder, wait=timedelta(0)):
        pass


def _locked_for_others(folder: Path) -> bool:
    child = processes.Process(target=_exit_if_locked, args=(folder,))
    child.start()
    child.join()
    return child.exitcode == 7


def _exit_if_locked(folder: Path) -> None:
    try:
        _try(folder)
    except StoreError:
        os._exit(7)
