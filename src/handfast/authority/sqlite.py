"""All that is SQLite's own: how the file is opened, and what its errors mean.

Another database would have its own module like this one; nothing else in the authority would change.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError, MultipleResultsFound, NoResultFound
from sqlalchemy.pool import StaticPool

from handfast.errors import Reason, StoreError

BUSY = timedelta(seconds=5)  # how long a writer waits for another one


def engine_for(path: Path) -> Engine:
    """An engine of one connection to an existing file. Whoever uses it says how transactions begin."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode=rw",  # or SQLite would make the file when it is missing
            uri=True,
            isolation_level=None,  # we begin transactions ourselves
            check_same_thread=False,
            timeout=BUSY.total_seconds(),
        )
        # FULL: a commit that was answered survives a power failure, also with a write-ahead log.
        for setting in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {setting}")
        return connection

    return create_engine("sqlite://", creator=connect, poolclass=StaticPool)


def use_write_ahead_log(connection: Connection) -> None:
    """Set the journal mode, which stays in the file. A writer does not hold up readers; a commit is one sync."""
    connection.connection.cursor().execute("PRAGMA journal_mode=WAL")


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn the database's errors into StoreError; what is not SQLite's passes."""
    try:
        yield
    except DBAPIError as error:
        if not isinstance(error.orig, sqlite3.Error):
            raise
        raise _store_error(path, error.orig) from None
    except sqlite3.Error as error:
        raise _store_error(path, error) from None
    except (NoResultFound, MultipleResultsFound) as error:  # of a table that has one row
        raise StoreError(Reason.STORE_CORRUPT, path=str(path), detail=str(error)) from None


def _store_error(path: Path, error: sqlite3.Error) -> StoreError:
    """What an SQLite error means (https://www.sqlite.org/rescode.html); the low byte is its class."""
    where, detail = str(path), str(error)
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreError(Reason.STORE_LOCKED, path=where)
        case sqlite3.SQLITE_FULL:
            return StoreError(Reason.STORE_FULL, path=where)
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return StoreError(Reason.STORE_READ_ONLY, path=where, detail=detail)
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR if _no_space(path):
            return StoreError(Reason.STORE_FULL, path=where)
        case sqlite3.SQLITE_CANTOPEN if not os.access(path.parent, os.W_OK):
            return StoreError(Reason.STORE_READ_ONLY, path=where, detail=detail)
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR:
            # SQLITE_ERROR: our statements are right, so it is a table or column that is not there.
            return StoreError(Reason.STORE_CORRUPT, path=where, detail=detail)
        case _:
            return StoreError(Reason.STORE_DISK, path=where, detail=detail)


def _no_space(path: Path) -> bool:
    try:
        return os.statvfs(path.parent).f_bavail == 0
    except OSError:
        return False
