from __future__ import annotations

import pytest

from handfast.testing import TestAuthority, TestLeaf


@pytest.fixture(scope="session")
def authority() -> TestAuthority:
    return TestAuthority.root("Audit Test Root")


@pytest.fixture(scope="session")
def client(authority: TestAuthority) -> TestLeaf:
    return authority.client()
