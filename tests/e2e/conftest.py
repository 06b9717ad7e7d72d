from __future__ import annotations

from pathlib import Path

import pytest

from handfast.authority import GeneratedPassphrase, Plan, create_authority
from tests.e2e.kit import Caller, copy_state


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Caller:
    """The command, called in this process with the test's own folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return Caller(capsys)


@pytest.fixture(scope="session")
def first_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority as `authority init` makes it; tests get copies."""
    folder = tmp_path_factory.mktemp("authority") / "state"
    create_authority(folder, Plan("handfast.internal"), GeneratedPassphrase()).close()
    return folder


@pytest.fixture
def state(first_state: Path, tmp_path: Path) -> Path:
    """The test's own copy of an authority."""
    return copy_state(first_state, tmp_path / "state")
