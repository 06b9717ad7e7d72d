"""The verb `audit` with an insider's means: options, slips, and an authority that revokes while we watch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from handfast.audit import (
    insider_certificates,
    insider_door,
    insider_requests,
    insider_sessions,
    insider_smuggling,
)
from handfast.audit.catalogue import CHECKS
from handfast.audit.insider import names_of
from handfast.errors import Exit
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.insider_kit import answer, application, echo, path_of, proxy
from tests.audit.kit import nginx_with
from tests.audit.test_verb import ran
from tests.support.apps import App
from tests.support.programs import HANDFAST, Child


@pytest.fixture
def right(authority: TestAuthority, tmp_path: Path) -> Iterator[str]:
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        yield f"localhost:{port}"


def insider(authority: TestAuthority, folder: Path) -> tuple[str | Path, ...]:
    key = TestLeaf(authority.key, ()).save(folder, "authority")[1]
    return "--ca", authority.save(folder, "the"), "--ca-key", key, "--as", "spiffe://test/web"


def test_a_certificate_that_was_revoked(
    capsys: pytest.CaptureFixture[str], right: str, authority: TestAuthority, tmp_path: Path
) -> None:
    """--revoked-cert and --revoked-key name one that nginx without a CRL lets in; one without the other is a slip."""
    cert, key = authority.client().save(tmp_path, "revoked")
    words = (*insider(authority, tmp_path), "--only", "insider.revoked")
    code, out, _ = ran(capsys, right, *words, "--revoked-cert", cert, "--revoked-key", key)
    assert code == Exit.REFUSED
    assert "FAIL  insider.revoked (high)" in out
    assert "nginx: ssl_crl" in out
    code, out, _ = ran(capsys, right, *words)
    assert code == Exit.OK
    assert "n/a" in out
    code, _, err = ran(capsys, right, *words, "--revoked-cert", cert)
    assert code == Exit.USAGE
    assert "go together" in err


def test_paths_are_named(capsys: pytest.CaptureFixture[str], authority: TestAuthority, tmp_path: Path) -> None:
    """--echo and --protected turn two checks on; what is no path, and no place, is a slip."""
    with application(echo) as app, proxy(authority, tmp_path, app) as port:
        words = (f"localhost:{port}", *insider(authority, tmp_path))
        only = ("--only", "insider.path-confusion", "--only", "insider.spoofed-headers")
        code, out, _ = ran(capsys, *words, *only, "--echo", "/echo", "--protected", "/admin")
        assert code == Exit.REFUSED
        assert "/admin is not protected at all" in out
        assert "the application gets no header that tells who the client is" in out
        for slip in (("--echo", "echo"), ("--protected", "/a b"), ("--other", "localhost:0"), ("--pid", "0")):
            code, out, _ = ran(capsys, *words, *only, *slip)
            assert (code, out) == (Exit.USAGE, ""), slip


def test_our_own_authority_revokes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With --authority the state's own authority issues a client and revokes it; a running `up` keeps it out."""
    state, quiet = tmp_path / "state", ("--listen", "127.0.0.1:0", "--json")
    with (
        App(lambda connection, head: connection.sendall(answer(path_of(head).encode()))) as app,
        Child((*HANDFAST, "up", "--to", app.address, "--state", state, *quiet), tmp_path, merge=False) as up,
    ):
        port = json.loads(up.line())["url"].rstrip("/").rpartition(":")[2]
        words = ("--authority", "--as", "client", "--state", state)
        checks = ("revoked", "kept-past-revocation", "resumed-after-revocation", "expired", "path-length")
        only = [word for check in checks for word in ("--only", f"insider.{check}")]
        code, out, _ = ran(capsys, f"localhost:{port}", *words, *only)
    assert code == Exit.OK, out
    for check in checks[:-1]:
        assert f"pass  insider.{check} " in out, out
    assert "n/a   insider.path-length" in out  # our issuers may have none below them


def test_names_of_an_accepted_client() -> None:
    """Names are taken as they are from the certificate; where none can be read, a usual one stands in."""
    authority = TestAuthority.root()
    names = ("a.test", "spiffe://test/web", "127.0.0.1", "a@b.test")
    assert names_of(authority.client(*names)) == names
    assert names_of(authority.client(san=b"\x30\x00")) == names_of(None)


def test_every_insider_check_is_of_a_tested_theme() -> None:
    """Each theme's tests demand a server with the hole for each of its checks; no check is outside these themes."""
    themes = (insider_certificates, insider_sessions, insider_requests, insider_smuggling, insider_door)
    tested = {check.id for theme in themes for check in theme.CHECKS}
    assert tested == {check.id for check in CHECKS if check.id.startswith("insider.")}
