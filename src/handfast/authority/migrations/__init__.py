"""How an older ledger becomes a current one; run by alembic, which is imported for nothing else."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

_HERE = Path(__file__).parent


def upgrade(connection: Connection) -> None:
    """Bring the schema to the newest revision, within the transaction that the connection is in."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def known(revision: str) -> bool:
    """Whether the revision is one of ours, and not one of a newer handfast."""
    return any(script.revision == revision for script in ScriptDirectory.from_config(_config()).walk_revisions())


def head() -> str | None:
    """The newest revision."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_HERE).replace("%", "%%"))  # alembic interpolates %
    config.set_main_option("path_separator", "os")
    return config
