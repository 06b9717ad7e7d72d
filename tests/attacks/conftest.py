from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.kit import Attacker
from tests.support.certs import Ca


@pytest.fixture(scope="session")
def ca() -> Ca:
    """The authority of the servers, and of the clients where a test names no other."""
    return Ca.root()


@pytest.fixture
def attacker(ca: Ca, tmp_path: Path) -> Attacker:
    """Makes clients that believe the servers of `ca`."""
    return Attacker(ca.save(tmp_path, "ca"), tmp_path)
