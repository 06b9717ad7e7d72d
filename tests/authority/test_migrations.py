from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from handfast.authority import Authority, migrations, schema
from handfast.authority.ledger import Ledger
from tests.authority.kit import query


def _empty_ledger(folder: Path) -> Path:
    """A ledger at revision base: alembic's table and nothing else."""
    folder.mkdir(mode=0o700)
    with closing(sqlite3.connect(folder / "ledger.db")) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
        connection.commit()
    return folder


def _shape(folder: Path) -> dict[str, object]:
    """Columns, keys and indexes of each table, as SQLite sees them."""
    shape: dict[str, object] = {}
    for (table,) in query(folder, "SELECT name FROM sqlite_master WHERE type = 'table'"):
        indexes = query(folder, f"PRAGMA index_list({table})")
        shape[table] = (
            query(folder, f"PRAGMA table_info({table})"),
            sorted(row[2:] for row in query(folder, f"PRAGMA foreign_key_list({table})")),
            sorted((row[1:], tuple(query(folder, f"PRAGMA index_info({row[1]})"))) for row in indexes),
        )
    return shape


def test_the_head_is_the_newest_migration() -> None:
    """The revision that new ledgers are stamped with is that of the newest migration."""
    assert migrations.head() == schema.HEAD
    assert migrations.known(schema.HEAD)
    assert not migrations.known("9999")


def test_migrating_from_nothing_gives_the_same_tables(authority: Authority, folder: Path, tmp_path: Path) -> None:
    """Opening a ledger of the oldest revision migrates it to the very shape that a new one has."""
    old = _empty_ledger(tmp_path / "old")
    Ledger.open(old / "ledger.db").close()
    assert _shape(old) == _shape(folder)
    assert query(old, "SELECT version_num FROM alembic_version") == [(schema.HEAD,)]
    assert query(old, "SELECT sql FROM sqlite_master WHERE name = 'intents_unsettled'") == query(
        folder, "SELECT sql FROM sqlite_master WHERE name = 'intents_unsettled'"
    )


def test_alembic_sees_no_difference(authority: Authority) -> None:
    """What alembic would generate to bring a new ledger up to the tables in the code is nothing."""
    with authority._ledger._reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
