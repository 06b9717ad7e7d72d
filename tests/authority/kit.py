"""What the authority's tests share: an authority made fast, orders, and processes that die when told to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from handfast.authority import Authority, GeneratedPassphrase, Issued, Plan, create_authority, open_authority
from handfast.authority.state import utc_now
from handfast.files import generate_key
from handfast.pki.issuing import Order
from handfast.pki.keys import KeyType
from handfast.pki.names import Name, parse_name
from handfast.pki.profiles import PROFILES

TRUST_DOMAIN = "example.test"
PEER = PROFILES["peer"]
CLIENT = PROFILES["client"]
PLAN = Plan(TRUST_DOMAIN)
LEAF_KEY = generate_key(KeyType.P256)

# The children are forked off one that has everything imported, so that each costs milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.authority.kit"])


def found(folder: Path) -> Authority:
    """An authority that is a month old, so that tests can issue in its past."""
    return create_authority(folder, PLAN, GeneratedPassphrase(), now=utc_now() - timedelta(days=30))


def reopen(folder: Path) -> Authority:
    return open_authority(folder, GeneratedPassphrase())


def name(text: str = "web") -> Name:
    return parse_name(text, TRUST_DOMAIN)


def order(text: str = "web", lifetime: timedelta | None = None) -> Order:
    return Order(PEER, (name(text),), LEAF_KEY.public_key(), lifetime)


def issue(
    authority: Authority,
    text: str = "web",
    *,
    lifetime: timedelta | None = None,
    now: datetime | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Issued:
    allowed = authority.authorize([name(text)], PEER, now=now)
    return authority.issue(order(text, lifetime), allowed, now=now, on_step=on_step)


def run_child(target: Callable[..., None], *args: object) -> int | None:
    """Run a function of a module in another process; return its exit code, negative for a signal."""
    child = processes.Process(target=target, args=args)
    child.start()
    child.join()
    return child.exitcode


def dying_at(wanted: str) -> Callable[[str], None]:
    """An `on_step` that kills its process, as the kernel or a power failure would."""

    def die(step: str) -> None:
        if step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return die


def query(folder: Path, statement: str) -> list[Any]:
    """What the database itself says, past our code."""
    connection = sqlite3.connect(folder / "ledger.db")
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def check(folder: Path) -> None:
    """See that every page of the database is whole, and that no row lacks the one it points at."""
    assert query(folder, "PRAGMA integrity_check(1)") == [("ok",)]
    assert query(folder, "PRAGMA foreign_key_check") == []


def change(folder: Path, statement: str) -> None:
    """Change the database behind our back."""
    connection = sqlite3.connect(folder / "ledger.db")
    try:
        connection.execute(statement)
        connection.commit()
    finally:
        connection.close()
