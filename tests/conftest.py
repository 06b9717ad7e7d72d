"""Every test leaves the machine as it was; none reads this machine's own authority."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is told by the machine, which runs other tests at once.
settings.register_profile("handfast", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("handfast")


@pytest.fixture(autouse=True)
def no_authority_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Point the default state folder into the test's own folder, and take away passphrases."""
    monkeypatch.setenv("HANDFAST_HOME", str(tmp_path / "default-state"))
    monkeypatch.delenv("HANDFAST_PASSPHRASE", raising=False)
