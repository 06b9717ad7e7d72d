"""The verb `inspect` as a user has it: what an encrypted file needs next, and servers that show odd things."""

from __future__ import annotations

from pathlib import Path

import pytest

from handfast.errors import Exit
from tests.e2e.kit import Caller
from tests.support.certs import Ca
from tests.support.odd import answering, serving, unreadable


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


def test_a_server_that_shows_an_unreadable_certificate_can_be_looked_at(call: Caller) -> None:
    """What can be read is shown, and how many cannot; with a leaf that cannot be read there is only the server."""
    leaf, odd = Ca.root().server(), unreadable(Ca.root("Other").certificate)
    with answering(serving(leaf, odd)) as address:
        shown = call("inspect", address)
        assert (shown.code, shown.err, "dns:localhost" in shown.out) == (Exit.OK, "", True)
        assert "  ! 1 of the certificates that it shows cannot be read\n" in shown.out
    with answering(serving(leaf, odd, shown=unreadable(leaf.certificate))) as address:
        (server,) = call("inspect", address, "--json").json
        assert server["warnings"] == ["2 of the certificates that it shows cannot be read"]


def test_a_server_whose_certificates_can_be_read_gives_no_warning(call: Caller) -> None:
    """The negative twin: its one certificate is shown, and nothing is said to be missing."""
    with answering(serving(Ca.root().server())) as address:
        server, certificate = call("inspect", address, "--json").json
    assert ("warnings" in server, certificate["names"]) == (False, ["dns:localhost", "ip:127.0.0.1"])
