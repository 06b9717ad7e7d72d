"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "authority",
        sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1", name="one_authority"), primary_key=True),
        sa.Column("trust_domain", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("max_leaf_seconds", sa.BigInteger),
        sa.Column("crl_number", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "issuers",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("anchor", sa.Integer, nullable=False),
        sa.Column("signs", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("der", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "authorizations",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("profile", sa.Text, nullable=False),
        sa.Column("names", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("consumed_at", sa.BigInteger),
    )
    op.create_table(
        "intents",
        sa.Column("serial", sa.String(40), primary_key=True),
        sa.Column("issuer_id", sa.Integer, sa.ForeignKey("issuers.id"), nullable=False),
        sa.Column("authorization_id", sa.String(32), sa.ForeignKey("authorizations.id"), nullable=False),
        sa.Column("profile", sa.Text, nullable=False),
        sa.Column("names", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
    )
    unsettled = sa.text("state = 'open' OR state = 'lost'")
    op.create_index("intents_unsettled", "intents", ["created_at"], sqlite_where=unsettled, postgresql_where=unsettled)
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(40), sa.ForeignKey("intents.serial"), primary_key=True),
        sa.Column("issuer_id", sa.Integer, sa.ForeignKey("issuers.id"), nullable=False),
        sa.Column("profile", sa.Text, nullable=False),
        sa.Column("not_before", sa.BigInteger, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(40), nullable=False),
        sa.Column("der", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "certificate_names",
        sa.Column("serial", sa.String(40), sa.ForeignKey("certificates.serial"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
    )
    op.create_table(
        "revocations",
        sa.Column("serial", sa.String(40), sa.ForeignKey("intents.serial"), primary_key=True),
        sa.Column("issuer_id", sa.Integer, sa.ForeignKey("issuers.id"), nullable=False),
        sa.Column("revoked_at", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String(32), nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
    )
    op.create_index("ix_certificates_not_after", "certificates", ["not_after"])
    op.create_index("ix_certificate_names_name", "certificate_names", ["name"])
    op.create_index("ix_revocations_not_after", "revocations", ["not_after"])
