"""The tables of the ledger. Every change here comes with a migration beside it; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    literal_column,
    or_,
)

HEAD = "0001"  # the newest revision in migrations/versions

# Times are whole seconds since 1970 (a certificate knows no finer ones); names and facts are JSON text.
# A serial is hex text: it is too long for an integer column, and hex is what people paste.
metadata = MetaData()

authority = Table(
    "authority",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="one_authority"), primary_key=True),
    Column("trust_domain", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),  # grows with every revocation
    Column("max_leaf_seconds", BigInteger),  # the longest life of a leaf; NULL: what its profile says
    Column("crl_number", BigInteger, nullable=False),  # RFC 5280 5.2.3: it must only ever grow
)
issuers = Table(
    "issuers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("anchor", Integer, nullable=False),  # 1: a root, in the trust bundle
    Column("signs", Integer, nullable=False),  # 1: its key signs leaves
    Column("sha256", String(64), nullable=False, unique=True),
    Column("der", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
authorizations = Table(
    "authorizations",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("profile", Text, nullable=False),
    Column("names", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("consumed_at", BigInteger),
)
intents = Table(
    "intents",
    metadata,
    Column("serial", String(40), primary_key=True),
    Column("issuer_id", Integer, ForeignKey("issuers.id"), nullable=False),
    Column("authorization_id", String(32), ForeignKey("authorizations.id"), nullable=False),
    Column("profile", Text, nullable=False),
    Column("names", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("not_after", BigInteger, nullable=False),
    Column("state", String(8), nullable=False),
)
# Nearly every intent is settled; the index holds only the few that are not.
unsettled = or_(intents.c.state == literal_column("'open'"), intents.c.state == literal_column("'lost'"))
Index("intents_unsettled", intents.c.created_at, sqlite_where=unsettled, postgresql_where=unsettled)
certificates = Table(
    "certificates",
    metadata,
    Column("serial", String(40), ForeignKey("intents.serial"), primary_key=True),
    Column("issuer_id", Integer, ForeignKey("issuers.id"), nullable=False),
    Column("profile", Text, nullable=False),
    Column("not_before", BigInteger, nullable=False),
    Column("not_after", BigInteger, nullable=False, index=True),
    Column("sha256", String(64), nullable=False),
    Column("key_id", String(40), nullable=False),
    Column("der", LargeBinary, nullable=False),
)
certificate_names = Table(
    "certificate_names",
    metadata,
    Column("serial", String(40), ForeignKey("certificates.serial"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("name", Text, nullable=False, index=True),
)
# Apart from the certificates, because the serial of a lost intent, too, can be revoked.
revocations = Table(
    "revocations",
    metadata,
    Column("serial", String(40), ForeignKey("intents.serial"), primary_key=True),
    Column("issuer_id", Integer, ForeignKey("issuers.id"), nullable=False),
    Column("revoked_at", BigInteger, nullable=False),
    Column("reason", String(32), nullable=False),
    Column("not_after", BigInteger, nullable=False, index=True),
)
audit = Table(
    "audit",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("event", Text, nullable=False),
    Column("facts", Text, nullable=False),
)
# Alembic's own table, as alembic makes it; not part of `metadata`, which alembic compares with the database.
version = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False, primary_key=True),
)
