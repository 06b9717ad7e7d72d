"""Processes that are killed with SIGKILL at each step, and processes that issue at the same time."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest

from handfast.authority import Authority, GeneratedPassphrase, Step, create_authority
from handfast.authority.ledger import Ledger
from handfast.authority.records import Planned
from handfast.authority.state import utc_now
from handfast.errors import IssuanceRefused, Reason, StoreError
from tests.authority.kit import PLAN, check, dying_at, found, issue, processes, query, reopen, run_child

CREATION_STEPS = [
    ".half-made",
    "passphrase",
    "root.key",
    "issuer.key",
    "root.crt",
    "issuer.crt",
    "ledger.new",
    "ledger.db",
    "done",
]
AT_ONCE = timedelta(seconds=-1)  # every open intent counts as lost


def _create_and_die(folder: Path, step: str) -> None:
    create_authority(folder, PLAN, GeneratedPassphrase(), on_step=dying_at(step))


def _issue_and_die(folder: Path, step: str) -> None:
    issue(reopen(folder), on_step=dying_at(step))


def _issue_many(folder: Path, count: int) -> None:
    with reopen(folder) as authority:
        for number in range(count):
            issue(authority, f"web-{os.getpid()}-{number}")


@pytest.mark.parametrize("step", CREATION_STEPS)
def test_a_killed_creation_leaves_an_authority_or_none(folder: Path, step: str) -> None:
    """Killed at any step, there is a whole authority or none; and if none, the next attempt makes one."""
    assert run_child(_create_and_die, folder, step) == -signal.SIGKILL
    if step == "done":
        with pytest.raises(StoreError) as refused:
            found(folder)
        assert refused.value.reason is Reason.STORE_EXISTS
    else:
        with pytest.raises(StoreError) as refused:
            reopen(folder)
        assert refused.value.reason is Reason.STORE_NO_AUTHORITY
        found(folder).close()
    with reopen(folder) as authority:
        issue(authority)
        check(folder)
    assert set(os.listdir(folder)) >= {"root.crt", "root.key", "issuer.crt", "issuer.key", "ledger.db", "passphrase"}
    assert not {".half-made", "ledger.new"} & set(os.listdir(folder))
    assert not [left for left in os.listdir(folder) if left.endswith(".tmp")]


def test_a_finished_creation_is_never_swept(folder: Path) -> None:
    """Killed after its last step, an authority is whole; if its ledger is lost later, its keys are left alone."""
    assert run_child(_create_and_die, folder, "done") == -signal.SIGKILL
    reopen(folder).close()
    for path in folder.glob("ledger.db*"):
        path.unlink()
    with pytest.raises(StoreError) as refused:
        found(folder)
    assert refused.value.reason is Reason.STORE_EXISTS
    assert (folder / "root.key").exists()


def test_a_half_written_file_is_swept(folder: Path) -> None:
    """What a kill in the middle of a write left is removed by the next attempt, and other files are not."""
    assert run_child(_create_and_die, folder, "issuer.key") == -signal.SIGKILL
    for name in (".issuer.key.0123.tmp", "ledger.new-wal", "notes.txt"):
        (folder / name).write_bytes(b"half")
    found(folder).close()
    left = set(os.listdir(folder))
    assert "notes.txt" in left
    assert not {".issuer.key.0123.tmp", "ledger.new-wal", ".half-made"} & left


def _create(folder: Path) -> None:
    try:
        found(folder).close()
    except StoreError as refused:
        os._exit(7 if refused.reason is Reason.STORE_EXISTS else 1)


def test_of_several_creators_one_succeeds(folder: Path) -> None:
    """Of four processes that make an authority in the same folder one makes it, and the others are told."""
    children = [processes.Process(target=_create, args=(folder,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert sorted(child.exitcode or 0 for child in children) == [0, 7, 7, 7]
    with reopen(folder) as authority:
        issue(authority)


def test_the_steps_of_creation_are_all_tested(folder: Path) -> None:
    """The table above names every step that creation has."""
    steps: list[str] = []
    create_authority(folder, PLAN, GeneratedPassphrase(), on_step=steps.append).close()
    assert steps == CREATION_STEPS


@pytest.mark.parametrize("step", list(Step))
def test_a_killed_issuance_is_whole_lost_or_never_was(folder: Path, step: Step) -> None:
    """Killed at any step, nothing is issued twice or half; what may have been signed is shown and revocable."""
    found(folder).close()
    assert run_child(_issue_and_die, folder, step) == -signal.SIGKILL
    with reopen(folder) as authority:
        check(folder)
        assert authority.sweep(lost_after=timedelta(hours=1)) == []  # too young to be called lost
        lost = authority.sweep(lost_after=AT_ONCE)
        stored = list(authority.certificates())
        spent = query(folder, "SELECT id FROM authorizations WHERE consumed_at IS NOT NULL")
        match step:
            case Step.BEGUN | Step.RESERVED:
                assert (lost, stored, spent) == ([], [], [])
            case Step.DONE:
                assert (len(lost), len(stored), len(spent)) == (0, 1, 1)
            case _:
                assert (len(lost), len(stored), len(spent)) == (1, 0, 1)
                assert lost[0].names == ("spiffe://example.test/web",)
                _revoke_lost(authority, lost[0].serial)
        issue(authority)
        for (spent_id,) in spent:
            _assert_spent(folder, spent_id)


def _revoke_lost(authority: Authority, serial: int) -> None:
    before = authority.revision()
    (revoked,) = authority.revoke(f"{serial:x}")
    assert (revoked.serial, authority.revision()) == (serial, before + 1)
    assert (authority.issuer.subject.public_bytes(), serial) in authority.revocations().serials
    assert authority.crl().get_revoked_certificate_by_serial_number(serial) is not None
    assert authority.sweep(lost_after=AT_ONCE) == []  # it needs no more attention


def _assert_spent(folder: Path, authorization_id: str) -> None:
    now = utc_now()
    again = Planned(1, 2, authorization_id, "peer", (), (), now, now, now, now)
    ledger = Ledger.open(folder / "ledger.db")
    with pytest.raises(IssuanceRefused) as refused, ledger.reserving(again):
        pass
    ledger.close()
    assert refused.value.reason is Reason.ISSUE_AUTHORIZATION_SPENT


def test_four_processes_issue_at_the_same_time(folder: Path) -> None:
    """Certificates of four processes at once are all stored, each with its own serial, and none waits for ever."""
    found(folder).close()
    children = [processes.Process(target=_issue_many, args=(folder, 30)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    with reopen(folder) as authority:
        records = list(authority.certificates())
        assert len({record.serial for record in records}) == len({record.names for record in records}) == 120
        assert authority.sweep(lost_after=AT_ONCE) == []
        check(folder)


def _revoke(folder: Path, text: str) -> None:
    with reopen(folder) as authority:
        authority.revoke(text)


def test_a_revocation_by_another_process_is_seen(authority: Authority, folder: Path) -> None:
    """The revision grows when another process revokes, and not when one issues."""
    issue(authority)
    assert authority.revision() == 0
    assert run_child(_revoke, folder, "web") == 0
    assert authority.revision() == 1
    assert len(authority.revocations().serials) == 1
