from __future__ import annotations

import pytest

from tests.support.certs import Ca


@pytest.fixture(scope="session")
def ca() -> Ca:
    return Ca.root()
