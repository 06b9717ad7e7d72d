"""A client's files by its name: found by all verbs alike, written so that a kill costs nothing, renewed by one."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handfast.authority import GeneratedPassphrase
from handfast.cli.clients import client_files
from handfast.cli.placing import alone, place_pair
from handfast.cli.renewing import Renewal
from handfast.errors import Exit, HandfastError, InvalidInput, Reason, StoreError
from handfast.files import generate_key
from handfast.pki.certificates import parse_certificates
from handfast.pki.keys import KeyType, encode_private_key, parse_private_key, same_key
from tests.e2e.kit import Caller

# Ends itself, as a kill would, where the file that it is told of is about to get its name.
KILLED = """
import os, sys
from pathlib import Path
from handfast.cli.placing import place_pair
def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]) == sys.argv[1]:
        os._exit(9)
sys.addaudithook(kill)
place_pair(Path("web.key"), b"new", Path("web.crt"), b"new")
"""


def is_pair(folder: Path) -> bool:
    """Whether web's certificate is of its key."""
    leaf = parse_certificates((folder / "web.crt").read_bytes(), "web")[0]
    key = parse_private_key((folder / "web.key").read_bytes(), "web")
    return same_key(key.public_key(), leaf.public_key())  # type: ignore[arg-type]  # an EC key


@pytest.mark.parametrize(
    ("at", "key", "certificate"),
    [("web.key", b"old", b"old"), ("web.crt", b"new", b"old"), ("nowhere", b"new", b"new")],
)
def test_a_new_certificate_never_stands_beside_the_old_key(
    tmp_path: Path, at: str, key: bytes, certificate: bytes
) -> None:
    """Killed while it writes a pair, it leaves the old certificate, which says that a renewal is due."""
    (tmp_path / "web.key").write_bytes(b"old")
    (tmp_path / "web.crt").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, at], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == (0 if at == "nowhere" else 9)
    assert ((tmp_path / "web.key").read_bytes(), (tmp_path / "web.crt").read_bytes()) == (key, certificate)
    place_pair(tmp_path / "web.key", b"next", tmp_path / "web.crt", b"next")
    assert {path.name for path in tmp_path.iterdir()} == {"web.key", "web.crt"}


def test_a_certificate_that_cannot_get_its_name_brings_the_old_key_back(tmp_path: Path) -> None:
    """Where the certificate's place cannot be taken, the key that was there is there still, and nothing else."""
    (tmp_path / "web.key").write_bytes(b"old")
    (tmp_path / "web.crt").mkdir()
    with pytest.raises(StoreError):
        place_pair(tmp_path / "web.key", b"new", tmp_path / "web.crt", b"new")
    assert (tmp_path / "web.key").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"web.key", "web.crt"}


def test_two_that_write_at_once_do_not_mix_their_pairs(tmp_path: Path) -> None:
    """Of pairs that two write over and over, the one on the disk is always whole."""

    def write(what: bytes) -> None:
        for _ in range(100):
            place_pair(tmp_path / "web.key", what, tmp_path / "web.crt", what)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write, what) for what in (b"one", b"two")]:
            done.result()
    assert (tmp_path / "web.key").read_bytes() == (tmp_path / "web.crt").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"web.key", "web.crt"}


def test_a_pair_that_cannot_be_written_whole_is_not_written(tmp_path: Path) -> None:
    """Where there is no room for one of the two, both stay as they are, and nothing is left beside them."""
    key = tmp_path / "web.key"
    key.write_bytes(b"old")
    with pytest.raises(StoreError):
        place_pair(key, b"new", tmp_path / "missing" / "web.crt", b"new")
    assert key.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [key]


def test_half_a_pair_is_mended_by_the_next_renewal(call: Caller, state: Path) -> None:
    """A key without its certificate, as a killed renewal leaves it, is replaced when the certificate is due."""
    clients = state / "clients"
    call.done("issue", "web", "--out", clients, "--state", state)
    (clients / "web.key").write_bytes(encode_private_key(generate_key(KeyType.P256)))
    assert not is_pair(clients)
    renewal = Renewal(state, GeneratedPassphrase(), clients / "web.crt", clients / "web.key")
    assert renewal.renew(datetime.now(UTC) + timedelta(hours=14))
    assert is_pair(clients)


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """The second is told so; what goes wrong while it is held stays what it is, and lets go."""
    with alone(tmp_path) as first, alone(tmp_path) as second:
        assert (first, second) == (True, False)
    with pytest.raises(BlockingIOError, match="not the lock's"), alone(tmp_path):
        raise BlockingIOError("not the lock's")
    with alone(tmp_path) as again:
        assert again
    with pytest.raises(StoreError), alone(tmp_path / "missing"):
        pass


def test_a_name_leads_to_its_files(call: Caller, state: Path, tmp_path: Path) -> None:
    """The pair in the state folder is found by the bare name and the whole one; here, only where that is asked for."""
    clients = state / "clients"
    call.done("issue", "web", "--out", clients, "--state", state)
    for name in ("web", "spiffe://handfast.internal/web"):
        found = client_files(state, name)
        assert (found.cert, found.key, found.ca) == (clients / "web.crt", clients / "web.key", state / "root.crt")
    call.done("issue", "db", "--state", state)
    assert client_files(state, "db", here=True).cert == Path("db.crt")
    with pytest.raises(HandfastError) as refused:
        client_files(state, "db")
    assert refused.value.reason is Reason.CONNECT_NO_CREDENTIAL
    with pytest.raises(InvalidInput):
        client_files(state, "no name")


@pytest.mark.parametrize(
    "words",
    [
        ("connect", "--to", "localhost:1", "--listen", "127.0.0.1:0"),
        ("curl", "https://localhost:1/"),
        ("explain", "localhost:1"),
        ("audit", "localhost:1"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("half", [False, True])
def test_every_verb_says_how_to_come_by_the_files(
    call: Caller, state: Path, words: tuple[str, ...], half: bool
) -> None:
    """The command that is told has the state folder in it, replaces half a pair, and makes what was missing."""
    clients = state / "clients"
    if half:
        call.done("issue", "web", "--out", clients, "--state", state)
        (clients / "web.key").unlink()
    outcome = call(*words, "--as", "web", "--state", "state", "--json")
    assert outcome.code == Exit.NOT_FOUND
    command = outcome.json["hint"].removeprefix("make one: handfast ").split()
    assert command[-1:] == (["--force"] if half else ["state"])
    call.done(*command)
    assert is_pair(clients)


def test_after_a_revocation_the_next_command_is_of_the_same_authority(
    call: Caller, state: Path, tmp_path: Path
) -> None:
    """Where the client's files are kept, the command puts new ones in their place, by the authority that was named;
    elsewhere it replaces nothing.
    """
    call.done("issue", "web", "--state", state, "--out", state / "clients")
    call.done("issue", "other", "--state", state, "--out", tmp_path / "elsewhere")
    names = {name: call("revoke", name, "--state", state).out.splitlines()[-1] for name in ("web", "other")}
    assert names["web"].endswith(f"/web --out {state / 'clients'} --state {state} --force")
    assert names["other"].endswith("/other")
