from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.apps import App, client_context, get, talk
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running


@pytest.fixture(scope="session")
def ca() -> Ca:
    return Ca.root()


Ask = Callable[..., bytes]


@pytest.fixture
def ask(ca: Ca, tmp_path: Path) -> Ask:
    """Ask a guard for something as a client with (or without) a certificate; returns the whole answer."""
    bundle = ca.save(tmp_path, "ca")

    def ask(guard: Running, leaf: Leaf | None, request: bytes = get()) -> bytes:
        return talk(guard.address, client_context(bundle, leaf, tmp_path), request)

    return ask


__all__ = ["App", "Ask", "Ca", "Leaf", "Running"]
