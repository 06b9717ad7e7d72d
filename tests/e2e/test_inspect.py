"""The verb `inspect` as a user has it: what an encrypted file needs next."""

from __future__ import annotations

from pathlib import Path

import pytest

from handfast.errors import Exit
from tests.e2e.kit import Caller


@pytest.fixture
def pfx(call: Caller) -> str:
    """A PKCS#12 file with its password beside it."""
    call.done("authority", "init", "--state", "state")
    call.done("issue", "ann", "--state", "state", "--out", ".", "--p12", "ann x.pfx")
    return "ann x.pfx"


def test_an_encrypted_file_says_what_opens_it(call: Caller, pfx: str, tmp_path: Path) -> None:
    """Without a password: the command with the password file that lies beside it; with the password, nothing more."""
    closed = call("inspect", pfx)
    assert (closed.code, "encrypted:" in closed.out) == (Exit.OK, True)
    assert closed.err == "next: handfast inspect 'ann x.pfx' --password-file 'ann x.pfx.password'\n"
    opened = call("inspect", pfx, "--password-file", f"{pfx}.password")
    assert (opened.code, "spiffe://" in opened.out, opened.err) == (Exit.OK, True, "")
    (tmp_path / f"{pfx}.password").unlink()
    assert call("inspect", pfx).err == "next: handfast inspect 'ann x.pfx' --password-file F\n"


def test_a_file_that_is_open_needs_nothing_next(call: Caller, pfx: str) -> None:
    """A certificate and a plain key have no next step; JSON has one value and no words beside it."""
    assert call("inspect", "ann.crt").err == call("inspect", "ann.key").err == ""
    told = call("inspect", pfx, "--json")
    assert (told.err, told.json[0]["encrypted"]) == ("", True)
