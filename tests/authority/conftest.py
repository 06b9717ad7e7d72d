from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from handfast.authority import Authority
from tests.authority.disks import mounted
from tests.authority.kit import found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an authority may be made."""
    return tmp_path / "state"


@pytest.fixture
def authority(folder: Path) -> Iterator[Authority]:
    """A new authority in `folder`."""
    with found(folder) as made:
        yield made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A private folder on a disk of 1 MiB."""
    with mounted(tmp_path / "disk") as path:
        yield path
