from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from handfast.authority import Authority, sqlite
from handfast.authority.ledger import Ledger
from handfast.authority.records import Planned
from handfast.authority.state import utc_now
from handfast.errors import IssuanceRefused, Reason, StoreError
from tests.authority.disks import remount
from tests.authority.kit import change, found, issue, query, reopen


def _planned(serial: int, authorization_id: str) -> Planned:
    now = utc_now()
    return Planned(serial, 2, authorization_id, "peer", (), (), now, now, now, now + timedelta(days=1))


def _reserve(folder: Path, plan: Planned) -> None:
    with closing(Ledger.open(folder / "ledger.db")) as ledger, ledger.reserving(plan):
        pass


def test_a_serial_is_taken_once(authority: Authority, folder: Path) -> None:
    """The same serial for another authorization is refused by the database; another serial is not."""
    _reserve(folder, _planned(7, "a"))
    with pytest.raises(StoreError) as refused:
        _reserve(folder, _planned(7, "b"))
    assert refused.value.reason is Reason.STORE_SERIAL_TAKEN
    _reserve(folder, _planned(8, "b"))  # the refusal took nothing


def test_an_authorization_is_used_once(authority: Authority, folder: Path) -> None:
    """The same authorization for another serial is refused by the database, in whatever process."""
    _reserve(folder, _planned(7, "a"))
    with pytest.raises(IssuanceRefused) as refused:
        _reserve(folder, _planned(8, "a"))
    assert refused.value.reason is Reason.ISSUE_AUTHORIZATION_SPENT
    assert query(folder, "SELECT serial FROM intents") == [("07",)]


def test_lists_far_more_than_a_page(authority: Authority, folder: Path) -> None:
    """A list of 1234 certificates, many of which end at the same second, has each of them once, in order."""
    now = int(utc_now().timestamp())
    serials = [f"{number:036x}" for number in range(1234)]
    with closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        connection.execute("INSERT INTO authorizations VALUES ('a', 'peer', '[]', 0, 0, 0)")
        for number, serial in enumerate(serials):
            end = now + 1000 + number // 700
            connection.execute("INSERT INTO intents VALUES (?, 2, 'a', 'peer', '[]', 0, ?, 'issued')", (serial, end))
            connection.execute(
                "INSERT INTO certificates VALUES (?, 2, 'peer', 0, ?, 'sha', 'key', x'00')", (serial, end)
            )
            connection.execute("INSERT INTO certificate_names VALUES (?, 0, ?)", (serial, f"spiffe://td/{number}"))
    records = list(authority.certificates())
    assert [record.serial for record in records] == list(range(1234))
    assert records[-1].names == ("spiffe://td/1233",)
    assert len(authority.find("0000")) == 1000  # bounded


def test_a_writer_is_waited_for_but_not_for_ever(
    authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process writes, writing gives up after its bound; reading goes on all the while."""
    monkeypatch.setattr(sqlite, "BUSY", timedelta(milliseconds=30))
    with (
        reopen(folder) as impatient,
        closing(sqlite3.connect(folder / "ledger.db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError) as refused:
            issue(impatient)
        assert refused.value.reason is Reason.STORE_LOCKED
        assert list(impatient.certificates()) == []
        other.execute("ROLLBACK")
        issue(impatient)


def test_a_newer_ledger_is_left_alone(authority: Authority, folder: Path) -> None:
    """A ledger of a revision that is not known here is not opened, and says both revisions."""
    authority.close()
    change(folder, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError) as refused:
        reopen(folder)
    assert refused.value.reason is Reason.STORE_SCHEMA_NEWER
    assert "9999" in str(refused.value)
    change(folder, "UPDATE alembic_version SET version_num = '0001'")
    reopen(folder).close()


@pytest.mark.parametrize("damage", ["empty", "header", "all", "table"])
def test_a_damaged_ledger_is_told_as_such(authority: Authority, folder: Path, damage: str) -> None:
    """A ledger that was emptied, overwritten or robbed of a table is corrupt, whatever SQLite calls it."""
    issue(authority)
    authority.close()
    path = folder / "ledger.db"
    whole = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "header":
            path.write_bytes(b"not a database" + whole[14:])
        case "all":
            path.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
        case _:
            change(folder, "DROP TABLE alembic_version")
    with pytest.raises(StoreError) as refused:
        reopen(folder)
    assert refused.value.reason is Reason.STORE_CORRUPT
    path.write_bytes(whole)
    reopen(folder).close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE revocations SET reason = 'mood'",
        "UPDATE revocations SET serial = 'xyz'",
        "UPDATE revocations SET not_after = 99999999999999999",
        "DELETE FROM authority",
    ],
)
def test_a_row_that_we_never_wrote_is_corruption(authority: Authority, folder: Path, statement: str) -> None:
    """A row with a value that handfast never stores is told as damage, and as nothing else."""
    issue(authority)
    authority.revoke("web")
    authority.revocations()
    change(folder, statement)
    with pytest.raises(StoreError) as refused:
        _ = authority.revocations(), authority.revision()
    assert refused.value.reason is Reason.STORE_CORRUPT


def test_an_unreadable_certificate_is_corruption(authority: Authority, folder: Path) -> None:
    """A certificate in the ledger that does not parse is damage of the ledger, not of an input."""
    authority.close()
    change(folder, "UPDATE issuers SET der = x'00'")
    with pytest.raises(StoreError) as refused:
        reopen(folder)
    assert refused.value.reason is Reason.STORE_CORRUPT


def test_a_read_only_disk_is_told_as_such(small_disk: Path) -> None:
    """On a disk that became read-only nothing is issued, by that reason; once it can be written again, it is."""
    folder = small_disk / "state"
    found(folder).close()
    remount(small_disk, "ro")
    with pytest.raises(StoreError) as refused, reopen(folder) as authority:
        issue(authority)
    assert refused.value.reason is Reason.STORE_READ_ONLY
    remount(small_disk, "rw")
    with reopen(folder) as authority:
        issue(authority)


def test_the_ledger_is_private(authority: Authority, folder: Path) -> None:
    """The database and its log can be read by their owner alone."""
    issue(authority)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.glob("ledger.db*")}
    assert modes == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}


def test_commits_are_synced(authority: Authority, folder: Path) -> None:
    """The log is a write-ahead log and each commit is synced to the disk before it is answered."""
    with authority._ledger._reading() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {setting}").scalar_one()
            for setting in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]  # 2: FULL


def test_the_audit_log_tells_what_was_done(authority: Authority, folder: Path) -> None:
    """Creation, issuance and revocation are in the audit log in order, with their facts and no secret."""
    issued = issue(authority)
    authority.revoke("web")
    log = [(event, json.loads(facts)) for event, facts in query(folder, "SELECT event, facts FROM audit ORDER BY seq")]
    assert [event for event, _ in log] == ["authority.created", "certificate.issued", "certificate.revoked"]
    assert log[1][1]["serial"] == log[2][1]["serial"] == issued.serial
