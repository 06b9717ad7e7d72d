"""A state folder that cannot be used: every verb says why, with exit 5 and the next step, and nothing is lost."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from handfast.authority import lock
from handfast.errors import Exit
from tests.authority.disks import fill, mounted, remount
from tests.e2e.kit import Caller, check_refusal, copy_state, serials
from tests.support.programs import HANDFAST, run

UP = ("up", "--to", "127.0.0.1:1", "--listen", "127.0.0.1:0")
# All verbs that need an authority; those that write it, apart.
READERS = [("authority", "show"), ("list",), ("show", "web"), ("export", "--pem")]
WRITERS = [("issue", "ops", "--out", "out"), ("sign", "web.csr", "--name", "web"), ("revoke", "web"), UP]
VERBS = [*READERS, *WRITERS]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    with mounted(tmp_path / "disk", "256k") as path:
        yield path


@pytest.fixture
def used(call: Caller, state: Path, tmp_path: Path) -> Path:
    """A state in which `web` has a certificate; `web.csr` is a request beside it."""
    call.done("issue", "web", "--out", "web", "--state", state)
    done = run("openssl", "req", "-new", "-key", "web/web.key", "-subj", "/", "-out", "web.csr", folder=tmp_path)
    assert done.returncode == 0, done
    return state


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_folder_that_others_may_read_is_refused(call: Caller, used: Path, verb: tuple[str, ...]) -> None:
    """With mode 0755 or 0777 the keys are not secret: refused with the chmod that closes it, and fine after that."""
    for mode in (0o755, 0o777, 0o701):
        used.chmod(mode)
        assert call.refused(*verb, "--state", used) == (Exit.STORE, "store.too_open")
        assert f"next: close it: chmod 700 {used}\n" in call(*verb, "--state", used).err
    used.chmod(0o700)
    assert call("list", "--state", used).code == Exit.OK


@pytest.mark.parametrize("verb", [("authority", "init"), UP], ids=" ".join)
def test_no_authority_is_made_where_others_may_read(call: Caller, tmp_path: Path, verb: tuple[str, ...]) -> None:
    """An empty folder that is too open stays empty."""
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    assert call.refused(*verb, "--state", folder) == (Exit.STORE, "store.too_open")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb is not UP], ids=" ".join)
def test_a_folder_without_an_authority_is_told(call: Caller, used: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    """No folder, an empty one, or a file in its place: exit 4, how to make one, and no folder comes of it."""
    (tmp_path / "empty").mkdir(mode=0o700)
    (tmp_path / "file").touch()
    for place in ("missing", "empty", "file"):
        assert call.refused(*verb, "--state", tmp_path / place) == (Exit.NOT_FOUND, "store.no_authority")
    assert not (tmp_path / "missing").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [("authority", "init"), UP], ids=" ".join)
def test_a_file_where_the_folder_should_be_is_kept(call: Caller, tmp_path: Path, verb: tuple[str, ...]) -> None:
    """A state that is a file, or below one, is refused, and the file keeps its bytes."""
    file = tmp_path / "file"
    file.write_text("mine")
    file.chmod(0o600)
    for place in (file, file / "below"):
        code, reason = call.refused(*verb, "--state", place)
        assert (code, reason) == (Exit.STORE, "store.disk")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("damage", ["empty", "header", "rest", "half"])
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_damaged_ledger_is_told_and_left_alone(call: Caller, used: Path, verb: tuple[str, ...], damage: str) -> None:
    """A ledger that was emptied, overwritten or cut is exit 5, no verb writes to it, and the copy put back works."""
    ledger = used / "ledger.db"
    whole = ledger.read_bytes()
    bad = {
        "empty": b"",
        "header": b"not a database" + whole[14:],
        "rest": whole[:100] + b"\xff" * (len(whole) - 100),
        "half": whole[: len(whole) // 2],
    }[damage]
    ledger.write_bytes(bad)
    assert call.refused(*verb, "--state", used) == (Exit.STORE, "store.corrupt")
    assert ledger.read_bytes() == bad
    ledger.write_bytes(whole)
    assert len(call("list", "--state", used).out.splitlines()) == 1


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_ledger_of_a_newer_handfast_is_left_alone(call: Caller, used: Path, verb: tuple[str, ...]) -> None:
    """A schema that this version does not know is exit 5 and stays as it is."""
    with closing(sqlite3.connect(used / "ledger.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = (used / "ledger.db").read_bytes()
    assert call.refused(*verb, "--state", used) == (Exit.STORE, "store.schema_newer")
    assert (used / "ledger.db").read_bytes() == before


@pytest.mark.parametrize("verb", WRITERS, ids=" ".join)
def test_a_read_only_disk_is_told(call: Caller, used: Path, small_disk: Path, verb: tuple[str, ...]) -> None:
    """On a disk that was mounted read-only nothing is issued or revoked; once it is writable all works."""
    state = copy_state(used, small_disk / "state")
    before = serials(used)
    remount(small_disk, "ro")
    assert call.refused(*verb, "--state", state) == (Exit.STORE, "store.read_only")
    remount(small_disk, "rw")
    assert serials(state) == before
    call.done("issue", "after", "--state", state)


@pytest.mark.parametrize("verb", READERS, ids=" ".join)
def test_reading_from_a_read_only_disk(call: Caller, used: Path, small_disk: Path, verb: tuple[str, ...]) -> None:
    """Verbs that only read either work on a read-only disk or say that it is one."""
    state = copy_state(used, small_disk / "state")
    remount(small_disk, "ro")
    outcome = call(*verb, "--state", state)
    assert outcome.code == Exit.OK or check_refusal(outcome) == "store.read_only"


@pytest.mark.parametrize("verb", WRITERS, ids=" ".join)
def test_a_full_disk_loses_nothing(call: Caller, used: Path, small_disk: Path, verb: tuple[str, ...]) -> None:
    """On a full disk nothing is issued or revoked; after some space is freed, all that was there is, and all works."""
    state = copy_state(used, small_disk / "state")
    before = serials(state)
    filler = fill(small_disk)
    assert call.refused(*verb, "--state", state) == (Exit.STORE, "store.full")
    filler.unlink()
    assert serials(state) == before
    call.done("issue", "after", "--state", state)
    assert _listed(call, state) == {"web": "good", "after": "good"}
    assert not list(state.rglob(".*.tmp"))


@pytest.mark.parametrize("room", [*range(4, 49, 4), 64, 96])
def test_a_disk_that_fills_up_on_the_way(call: Caller, used: Path, small_disk: Path, room: int) -> None:
    """With room for a part of what `issue` writes, it works whole or is store.full; the old pair or the new fits."""
    state, out = copy_state(used, small_disk / "state"), small_disk / "out"
    call.done("issue", "ops", "--out", out, "--state", state)
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - room * 1024)
    outcome = call("issue", "ops", "--force", "--out", out, "--state", state)
    assert outcome.code == Exit.OK or (outcome.code, check_refusal(outcome)) == (Exit.STORE, "store.full")
    call.done("export", "--cert", out / "ops.crt", "--key", out / "ops.key", "--p12", "ops.p12")
    filler.unlink()
    call.done("issue", "after", "--state", state)
    assert _listed(call, state) == {"web": "good", "ops": "good", "after": "good"}
    assert sorted(path.name for path in out.iterdir()) == ["ca.crt", "ops.crt", "ops.key"]


@pytest.mark.parametrize("verb", [("authority", "init"), UP], ids=" ".join)
def test_an_authority_that_does_not_fit_leaves_nothing(
    call: Caller, small_disk: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    """Where the disk has no room for an authority, the next attempt with room makes one."""
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - 16384)  # room for a few small files
    state = small_disk / "state"
    assert call.refused(*verb, "--state", state) == (Exit.STORE, "store.full")
    assert call.refused("list", "--state", state) == (Exit.NOT_FOUND, "store.no_authority")
    filler.unlink()
    call.done("authority", "init", "--state", state)


@pytest.mark.parametrize("where", ["read-only", "full"])
def test_a_place_for_results_that_takes_none(call: Caller, used: Path, small_disk: Path, where: str) -> None:
    """Where key and certificate cannot be written, nothing is issued for them."""
    filler = fill(small_disk)
    if where == "read-only":
        filler.unlink()
        remount(small_disk, "ro")
    before = serials(used)
    reason = "store.read_only" if where == "read-only" else "store.full"
    for place in (small_disk, small_disk / "new"):
        assert call.refused("issue", "ops", "--out", place, "--state", used) == (Exit.STORE, reason)
    assert serials(used) == before


def test_a_folder_that_another_up_holds(call: Caller, used: Path, tmp_path: Path) -> None:
    """While one `up` runs, a second on its state ends with exit 5; verbs work beside it."""
    with lock(used):
        second = run(*HANDFAST, *UP, "--state", used, "--json", folder=tmp_path)
        call.done("issue", "ops", "--state", used)
    assert (second.returncode, json.loads(second.stdout)["error"]) == (Exit.STORE, "store.locked")


def test_a_ledger_that_another_program_holds(call: Caller, used: Path) -> None:
    """While somebody holds the ledger locked, as a copy by hand may, writing ends with exit 5 after some seconds."""
    with closing(sqlite3.connect(used / "ledger.db")) as holder:
        holder.execute("BEGIN IMMEDIATE")
        outcome = call("revoke", "web", "--state", used)
        assert (outcome.code, check_refusal(outcome)) == (Exit.STORE, "store.locked")
        holder.rollback()
    assert call("revoke", "web", "--state", used).code == Exit.OK


def _listed(call: Caller, state: Path) -> dict[str, str]:
    """Name -> status of every certificate that `list` shows."""
    rows = [json.loads(line) for line in call("list", "--state", state, "--json").out.splitlines()]
    return {row["names"][0].rpartition("/")[2]: row["status"] for row in rows}
