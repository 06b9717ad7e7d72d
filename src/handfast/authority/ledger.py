"""The ledger: what was planned, issued and revoked, in a database that survives kills and power failures.

Owns the tables and every statement. It knows certificates as rows: it never signs, and decides nothing
but what the database must decide: that a serial and an authorization are used once.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    ClauseElement,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    and_,
    bindparam,
    event,
    insert,
    or_,
    select,
    update,
)

from handfast.authority import schema
from handfast.authority.records import Intent, IssuerRow, Planned, Record, Revocation, RevocationReason
from handfast.authority.sqlite import engine_for, store_errors, use_write_ahead_log
from handfast.errors import IssuanceRefused, Reason, StoreError
from handfast.pki.certificates import serial_text

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PAGE = 500  # rows read at once, so that no read holds the database for long
_MANY = 1000  # the most that a look-up by name or prefix returns

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_Transaction = AbstractContextManager[Connection]


class _Prepared:
    """A statement compiled once and handed to the driver: the way through SQLAlchemy takes twice as long."""

    def __init__(self, engine: Engine, statement: ClauseElement) -> None:
        compiled = statement.compile(dialect=engine.dialect)
        self._sql = str(compiled)
        self._order: list[str] | None = getattr(compiled, "positiontup", None)
        self.conflict: type[Exception] = engine.dialect.loaded_dbapi.IntegrityError

    def run(self, connection: Connection, *rows: dict[str, object]) -> None:
        """Execute it for each row. Raises `conflict` where a key is taken."""
        cursor = connection.connection.cursor()
        for row in rows:
            cursor.execute(self._sql, row if self._order is None else [row[name] for name in self._order])
        cursor.close()


class Ledger:
    """One open ledger: one connection, usable from any thread, one at a time. Not to be used across a fork.

    Every method raises StoreError for what the disk does to it (STORE_LOCKED, STORE_FULL, STORE_READ_ONLY,
    STORE_CORRUPT, STORE_DISK).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._turn = threading.RLock()
        self._begin = "BEGIN"
        self._engine = engine_for(path)
        event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql(self._begin))
        with store_errors(path):
            self._connection = self._engine.connect()
        self._prepare()

    @classmethod
    def create(cls, path: Path, trust_domain: str, certificates: Sequence[IssuerRow], now: datetime) -> None:
        """Make a new ledger, whole and durable, in a file that must not exist yet."""
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        ledger = cls(path)
        try:
            with ledger._writing() as connection:
                schema.metadata.create_all(connection)
                schema.version.create(connection)
                connection.execute(insert(schema.version).values(version_num=schema.HEAD))
                at = _seconds(now)
                connection.execute(
                    insert(schema.authority).values(
                        id=1, trust_domain=trust_domain, created_at=at, revision=0, crl_number=0
                    )
                )
                for row in certificates:
                    connection.execute(
                        insert(schema.issuers).values(
                            id=row.id,
                            anchor=int(row.anchor),
                            signs=int(row.signs),
                            sha256=row.sha256,
                            der=row.der,
                            created_at=at,
                        )
                    )
                facts = {"trust_domain": trust_domain, "certificates": [row.sha256 for row in certificates]}
                connection.execute(insert(schema.audit).values(at=at, event="authority.created", facts=_json(facts)))
            # Last, so that there is no log beside the file when it is renamed into place.
            with store_errors(path):
                use_write_ahead_log(ledger._connection)
        finally:
            ledger.close()

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Open a ledger; an older one is brought up to date first.

        Raises StoreError, also STORE_SCHEMA_NEWER.
        """
        ledger = cls(path)
        try:
            with ledger._reading() as connection:
                found = connection.execute(select(schema.version.c.version_num)).scalar_one_or_none()
            if found != schema.HEAD:
                from handfast.authority import migrations  # only here: alembic costs 0.15 s to import

                if found is not None and not migrations.known(found):
                    raise StoreError(Reason.STORE_SCHEMA_NEWER, path=str(path), found=found, known=schema.HEAD)
                with ledger._writing() as connection:
                    migrations.upgrade(connection)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close it. The last process to do so folds the write-ahead log into the file."""
        with self._turn:
            self._connection.close()
            self._engine.dispose()

    def trust_domain(self) -> str:
        """The authority's trust domain."""
        with self._reading() as connection:
            return str(connection.execute(select(schema.authority.c.trust_domain)).scalar_one())

    def max_leaf_lifetime(self) -> timedelta | None:
        """The longest life that this authority gives a leaf; None: what its profile says."""
        with self._reading() as connection:
            seconds = connection.execute(select(schema.authority.c.max_leaf_seconds)).scalar_one()
        return None if seconds is None else timedelta(seconds=seconds)

    def set_max_leaf_lifetime(self, lifetime: timedelta, now: datetime) -> None:
        """Change the longest life of a leaf, for what is issued from now on."""
        seconds = int(lifetime.total_seconds())
        with self._writing() as connection:
            connection.execute(update(schema.authority).values(max_leaf_seconds=seconds))
            facts = _json({"max_leaf_seconds": seconds})
            connection.execute(
                insert(schema.audit).values(at=_seconds(now), event="authority.max_leaf_lifetime", facts=facts)
            )

    def issuers(self) -> list[IssuerRow]:
        """All certificates of the authority, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(select(schema.issuers).order_by(schema.issuers.c.id)).all()
        return [IssuerRow(row.id, bool(row.anchor), bool(row.signs), row.sha256, row.der) for row in rows]

    def revision(self) -> int:
        """A number that grows with every revocation, by whatever process."""
        with self._reading() as connection:
            return int(connection.execute(select(schema.authority.c.revision)).scalar_one())

    @contextmanager
    def reserving(self, plan: Planned) -> Iterator[None]:
        """One durable step: use the authorization, take the serial, write the intent. Commits on leaving.

        Raises IssuanceRefused (ISSUE_AUTHORIZATION_SPENT) and StoreError (STORE_SERIAL_TAKEN).
        """
        with self._writing() as connection:
            try:
                self._use_authorization.run(
                    connection,
                    {
                        "id": plan.authorization_id,
                        "profile": plan.profile,
                        "names": _json(plan.allowed),
                        "created_at": _seconds(plan.authorized_at),
                        "expires_at": _seconds(plan.expires_at),
                        "consumed_at": _seconds(plan.at),
                    },
                )
            except self._use_authorization.conflict:
                raise IssuanceRefused(Reason.ISSUE_AUTHORIZATION_SPENT) from None
            try:
                self._add_intent.run(
                    connection,
                    {
                        "serial": serial_text(plan.serial),
                        "issuer_id": plan.issuer_id,
                        "authorization_id": plan.authorization_id,
                        "profile": plan.profile,
                        "names": _json(plan.names),
                        "created_at": _seconds(plan.at),
                        "not_after": _seconds(plan.not_after),
                        "state": "open",
                    },
                )
            except self._add_intent.conflict:
                raise StoreError(Reason.STORE_SERIAL_TAKEN, serial=serial_text(plan.serial)) from None
            yield

    @contextmanager
    def storing(self, plan: Planned, record: Record, der: bytes, now: datetime) -> Iterator[None]:
        """One durable step: the certificate, its names, the audit row, the intent settled. Commits on leaving."""
        serial = serial_text(record.serial)
        with self._writing() as connection:
            self._add_certificate.run(
                connection,
                {
                    "serial": serial,
                    "issuer_id": plan.issuer_id,
                    "profile": record.profile,
                    "not_before": _seconds(record.not_before),
                    "not_after": _seconds(record.not_after),
                    "sha256": record.sha256,
                    "key_id": record.key_id,
                    "der": der,
                },
            )
            self._add_name.run(
                connection,
                *({"serial": serial, "position": at, "name": name} for at, name in enumerate(record.names)),
            )
            facts = {"serial": serial, "profile": record.profile, "names": record.names, "sha256": record.sha256}
            facts["authorization"] = plan.authorization_id
            self._add_audit.run(connection, {"at": _seconds(now), "event": "certificate.issued", "facts": _json(facts)})
            self._settle_intent.run(connection, {"which": serial, "state": "issued"})
            yield

    def drop(self, plan: Planned) -> None:
        """Settle an intent of which it is certain that the issuer's key did not sign it."""
        with self._writing() as connection:
            self._settle_intent.run(connection, {"which": serial_text(plan.serial), "state": "dropped"})

    def sweep(self, begun_before: datetime, now: datetime) -> list[Intent]:
        """Mark the open intents that were begun before as lost; return all lost ones that still matter.

        Those matter that are neither past their end nor revoked.
        """
        old = and_(schema.unsettled, schema.intents.c.created_at < _seconds(begun_before))
        with self._reading() as connection:
            begun = connection.execute(
                select(schema.intents.c.serial).where(old, schema.intents.c.state == "open").limit(1)
            ).first()
        if begun is not None:
            with self._writing() as connection:
                lost = [
                    row.serial
                    for row in connection.execute(
                        select(schema.intents.c.serial).where(old, schema.intents.c.state == "open")
                    )
                ]
                connection.execute(
                    update(schema.intents).where(old, schema.intents.c.state == "open").values(state="lost")
                )
                for serial in lost:
                    facts = _json({"serial": serial})
                    connection.execute(insert(schema.audit).values(at=_seconds(now), event="intent.lost", facts=facts))
        with self._reading() as connection:
            return _lost(connection, now)

    def find(self, serial_prefix: str | None, name: str | None) -> list[Record]:
        """The certificates of a name, or whose serial begins so (hex); those that end last first; at most 1000."""
        wanted = []
        if serial_prefix:
            wanted.append(_begins(schema.certificates.c.serial, serial_prefix))
        if name is not None:
            wanted.append(
                schema.certificates.c.serial.in_(
                    select(schema.certificate_names.c.serial).where(schema.certificate_names.c.name == name)
                )
            )
        if not wanted:
            return []
        statement = (
            _records()
            .where(or_(*wanted))
            .order_by(schema.certificates.c.not_after.desc(), schema.certificates.c.serial)
        )
        with self._reading() as connection:
            return _with_names(connection, connection.execute(statement.limit(_MANY)).all())

    def certificates(self, ends_after: datetime | None, ends_before: datetime | None) -> Iterator[Record]:
        """Stream the certificates, those that end first first. A limit of None is no limit."""
        statement = _records().order_by(schema.certificates.c.not_after, schema.certificates.c.serial).limit(_PAGE)
        if ends_after is not None:
            statement = statement.where(schema.certificates.c.not_after > _seconds(ends_after))
        if ends_before is not None:
            statement = statement.where(schema.certificates.c.not_after <= _seconds(ends_before))
        page = statement
        while True:
            with self._reading() as connection:
                rows = connection.execute(page).all()
                records = _with_names(connection, rows)
            yield from records
            if len(rows) < _PAGE:
                return
            end, serial = rows[-1].not_after, rows[-1].serial
            behind = or_(
                schema.certificates.c.not_after > end,
                and_(schema.certificates.c.not_after == end, schema.certificates.c.serial > serial),
            )
            page = statement.where(behind)

    def revoke_serial(self, prefix: str, reason: RevocationReason, now: datetime) -> list[Revocation]:
        """Revoke the one serial that begins with `prefix` (hex), be it issued or lost; [] if there is none.

        Raises StoreError (STORE_AMBIGUOUS, STORE_ALREADY_REVOKED).
        """
        wanted = (
            _intents().where(_begins(schema.intents.c.serial, prefix), schema.intents.c.state != "dropped").limit(_MANY)
        )
        with self._writing() as connection:
            rows = connection.execute(wanted).all()
            if len(rows) > 1:
                raise StoreError(Reason.STORE_AMBIGUOUS, value=prefix, count=len(rows))
            return self._revoke(connection, rows, reason, now)

    def revoke_name(self, name: str, reason: RevocationReason, now: datetime) -> list[Revocation]:
        """Revoke every certificate of a name that has not ended, and every lost intent for it; [] if there is none.

        Raises StoreError (STORE_ALREADY_REVOKED) if all of them were.
        """
        of_name = select(schema.certificate_names.c.serial).where(schema.certificate_names.c.name == name)
        issued = _intents().where(schema.intents.c.serial.in_(of_name), schema.intents.c.not_after > _seconds(now))
        with self._writing() as connection:
            lost = connection.execute(
                _intents().where(
                    schema.unsettled, schema.intents.c.state == "lost", schema.intents.c.not_after > _seconds(now)
                )
            )
            rows = [*connection.execute(issued), *(row for row in lost if name in json.loads(row.names))]
            return self._revoke(connection, rows, reason, now)

    def revoked(self, ends_after: datetime) -> list[Revocation]:
        """All revocations of certificates that end after an instant."""
        wanted = select(schema.revocations).where(schema.revocations.c.not_after > _seconds(ends_after))
        with self._reading() as connection:
            return [
                Revocation(
                    int(row.serial, 16),
                    row.issuer_id,
                    (),
                    _instant(row.not_after),
                    _instant(row.revoked_at),
                    RevocationReason(row.reason),
                )
                for row in connection.execute(wanted)
            ]

    def next_crl_number(self) -> int:
        """Draw the number of the next revocation list: each is larger than all before it."""
        with self._writing() as connection:
            connection.execute(update(schema.authority).values(crl_number=schema.authority.c.crl_number + 1))
            return int(connection.execute(select(schema.authority.c.crl_number)).scalar_one())

    def _revoke(
        self, connection: Connection, rows: Sequence[Row[Any]], reason: RevocationReason, now: datetime
    ) -> list[Revocation]:
        fresh = [row for row in rows if row.revoked_at is None]
        if rows and not fresh:
            first = rows[0]
            raise StoreError(
                Reason.STORE_ALREADY_REVOKED, value=f"serial {first.serial}", when=_instant(first.revoked_at)
            )
        for row in fresh:
            connection.execute(
                insert(schema.revocations).values(
                    serial=row.serial,
                    issuer_id=row.issuer_id,
                    revoked_at=_seconds(now),
                    reason=reason.value,
                    not_after=row.not_after,
                )
            )
            facts = {"serial": row.serial, "names": json.loads(row.names), "reason": reason.value}
            connection.execute(
                insert(schema.audit).values(at=_seconds(now), event="certificate.revoked", facts=_json(facts))
            )
        if fresh:
            connection.execute(update(schema.authority).values(revision=schema.authority.c.revision + 1))
        when = _instant(_seconds(now))
        return [
            Revocation(int(row.serial, 16), row.issuer_id, _names(row.names), _instant(row.not_after), when, reason)
            for row in fresh
        ]

    def _prepare(self) -> None:
        engine = self._engine
        self._use_authorization = _Prepared(engine, insert(schema.authorizations))
        self._add_intent = _Prepared(engine, insert(schema.intents))
        self._add_certificate = _Prepared(engine, insert(schema.certificates))
        self._add_name = _Prepared(engine, insert(schema.certificate_names))
        self._add_audit = _Prepared(engine, insert(schema.audit).values(at=0, event="", facts=""))
        settle = update(schema.intents).where(schema.intents.c.serial == bindparam("which")).values(state="")
        self._settle_intent = _Prepared(engine, settle)

    @contextmanager
    def _transaction(self, begin: Literal["BEGIN", "BEGIN IMMEDIATE"]) -> Iterator[Connection]:
        with self._turn, store_errors(self.path):
            self._begin = begin
            with self._connection.begin():
                yield self._connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._transaction("BEGIN") as connection:
            try:
                yield connection
            except (ValueError, OverflowError) as error:  # what is stored is not what we ever store
                raise StoreError(Reason.STORE_CORRUPT, path=str(self.path), detail=str(error)) from None

    def _writing(self) -> _Transaction:
        # The lock is taken at once: a reader that turned writer could not wait for another writer to end.
        return self._transaction("BEGIN IMMEDIATE")


def _records() -> Select[Any]:
    columns = [column for column in schema.certificates.c if column.name != "der"]
    statement = select(*columns, schema.revocations.c.revoked_at, schema.revocations.c.reason)
    return statement.select_from(
        schema.certificates.outerjoin(schema.revocations, schema.revocations.c.serial == schema.certificates.c.serial)
    )


def _intents() -> Select[Any]:
    return select(schema.intents, schema.revocations.c.revoked_at).select_from(
        schema.intents.outerjoin(schema.revocations, schema.revocations.c.serial == schema.intents.c.serial)
    )


def _with_names(connection: Connection, rows: Sequence[Row[Any]]) -> list[Record]:
    names: dict[str, list[str]] = {row.serial: [] for row in rows}
    table = schema.certificate_names
    wanted = select(table.c.serial, table.c.name).where(table.c.serial.in_(names))
    for serial, name in connection.execute(wanted.order_by(table.c.serial, table.c.position)) if names else ():
        names[serial].append(name)
    return [
        Record(
            int(row.serial, 16),
            row.profile,
            tuple(names[row.serial]),
            _instant(row.not_before),
            _instant(row.not_after),
            row.sha256,
            row.key_id,
            None if row.revoked_at is None else _instant(row.revoked_at),
            None if row.reason is None else RevocationReason(row.reason),
        )
        for row in rows
    ]


def _lost(connection: Connection, now: datetime) -> list[Intent]:
    wanted = _intents().where(
        schema.unsettled,
        schema.intents.c.state == "lost",
        schema.intents.c.not_after > _seconds(now),
        schema.revocations.c.revoked_at.is_(None),
    )
    return [
        Intent(int(row.serial, 16), row.profile, _names(row.names), _instant(row.created_at), _instant(row.not_after))
        for row in connection.execute(wanted.order_by(schema.intents.c.created_at).limit(_MANY))
    ]


def _begins(column: Column[str], prefix: str) -> ColumnElement[bool]:
    """Whether hex text begins so, as a range that an index answers: "g" follows every hex digit."""
    return and_(column >= prefix, column < prefix + "g")


def _seconds(instant: datetime) -> int:
    return int(instant.timestamp())


def _instant(seconds: int) -> datetime:
    return _EPOCH + timedelta(seconds=seconds)


def _names(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))
