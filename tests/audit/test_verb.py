"""The verb `audit`: exit codes, formats, and who may be attacked with what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from handfast.audit.catalogue import CHECKS
from handfast.cli.main import _run
from handfast.errors import Exit
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.kit import nginx_with
from tests.support.apps import App
from tests.support.programs import free_port

CERTIFICATES = ("--only", "outsider.no-certificate", "--only", "outsider.self-signed")


@pytest.fixture
def right(authority: TestAuthority, tmp_path: Path) -> Iterator[str]:
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        yield f"localhost:{port}"


@pytest.fixture
def open_to_all(authority: TestAuthority, tmp_path: Path) -> Iterator[str]:
    with nginx_with(authority, tmp_path, "ssl_verify_client optional_no_ca;") as port:
        yield f"localhost:{port}"


def ran(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = _run(["audit", *map(str, words)])
    return int(code), *capsys.readouterr()


def test_a_server_that_holds_ends_with_0(capsys: pytest.CaptureFixture[str], right: str) -> None:
    """Nothing failed: exit 0; the progress is on standard error and the report on standard output."""
    code, out, err = ran(capsys, right, *CERTIFICATES)
    assert code == Exit.OK
    assert "pass  outsider.no-certificate (critical)" in out
    assert out.rstrip().endswith("0 failed, 2 passed, 0 inconclusive, 0 not applicable")
    assert sorted(line.split()[0] for line in err.splitlines()) == ["1/2", "2/2"]


def test_a_hole_ends_with_3(capsys: pytest.CaptureFixture[str], open_to_all: str) -> None:
    """Something failed: exit 3, with the evidence and what closes it for each product."""
    code, out, _ = ran(capsys, open_to_all, *CERTIFICATES)
    assert code == Exit.REFUSED
    assert "FAIL  outsider.no-certificate (critical)" in out
    assert "nginx: ssl_verify_client on" in out
    assert "got:  HTTP/1.1 200 OK" in out


def test_what_is_only_worth_knowing_ends_with_0(capsys: pytest.CaptureFixture[str], right: str) -> None:
    """The names of the authorities are told to anybody; that fails no audit."""
    code, out, _ = ran(capsys, right, "--only", "outsider.authority-names")
    assert code == Exit.OK
    assert out.rstrip().endswith("1 worth knowing")
    _, out, err = ran(capsys, right, "--only", "outsider.authority-names", "--json")
    assert [one["verdict"] for one in json.loads(out)["findings"]] == ["note"]
    assert err.split()[1] == "note"


def test_a_port_without_tls_is_no_clean_report(capsys: pytest.CaptureFixture[str]) -> None:
    """What speaks no TLS ends with 6 and a clear word, also in JSON; the way around TLS is the hole that it is: 3."""
    with App() as app:
        code, out, err = ran(capsys, app.address, *CERTIFICATES)
        assert code == Exit.UNREACHABLE
        assert "????  outsider.no-certificate (critical)" in out
        assert out.rstrip().endswith(f"{app.address} does not speak TLS")
        assert "[audit.no_tls]" in err
        code, out, _ = ran(capsys, app.address, *CERTIFICATES, "--json")
        assert (code, bool(json.loads(out)["no_tls"])) == (Exit.UNREACHABLE, True)
        code, out, _ = ran(capsys, app.address, *CERTIFICATES, "--only", "outsider.plaintext")
        assert (code, "FAIL  outsider.plaintext" in out) == (Exit.REFUSED, True)


def test_what_more_there_is_to_try_is_said(
    capsys: pytest.CaptureFixture[str], right: str, authority: TestAuthority, tmp_path: Path
) -> None:
    """Without the authority's key it is said how many checks that would give; with it, no more."""
    only = ("--only", "insider.expired", "--only", "insider.not-yet-valid")
    _, out, _ = ran(capsys, right, *only)
    assert "2 more checks with --ca F --ca-key F" in out
    key = TestLeaf(authority.key, ()).save(tmp_path, "authority")[1]
    _, out, _ = ran(capsys, right, *only, "--ca", authority.save(tmp_path, "the"), "--ca-key", key)
    assert "more check" not in out


def test_every_format_at_once(capsys: pytest.CaptureFixture[str], open_to_all: str, tmp_path: Path) -> None:
    """JSON on standard output, a page and JUnit in files; SARIF in the place of JSON."""
    page, junit = tmp_path / "audit.html", tmp_path / "audit.xml"
    code, out, _ = ran(capsys, open_to_all, *CERTIFICATES, "--json", "--html", page, "--junit", junit)
    told = json.loads(out)
    assert code == Exit.REFUSED
    assert {one["verdict"] for one in told["findings"]} == {"fail"}
    assert page.read_text().startswith("<!doctype html>")
    assert ElementTree.parse(junit).getroot().attrib["failures"] == "2"
    _, out, _ = ran(capsys, open_to_all, *CERTIFICATES, "--sarif")
    assert json.loads(out)["runs"][0]["results"][0]["kind"] == "fail"


def test_with_a_credential_there_is_a_baseline(
    capsys: pytest.CaptureFixture[str], right: str, client: TestLeaf, tmp_path: Path
) -> None:
    """--cert and --key give the report what an accepted request gets; one without the other is a slip."""
    cert, key = client.save(tmp_path, "client")
    _, out, _ = ran(capsys, right, *CERTIFICATES, "--cert", cert, "--key", key)
    assert "an accepted request gets: HTTP/1.1 200 OK" in out
    code, _, err = ran(capsys, right, *CERTIFICATES, "--cert", cert)
    assert code == Exit.USAGE
    assert "go together" in err


def test_a_credential_that_is_refused_is_said(capsys: pytest.CaptureFixture[str], right: str, tmp_path: Path) -> None:
    """A certificate of another authority is no accepted client, and nothing is audited by it."""
    cert, key = TestAuthority.root("Stranger").client().save(tmp_path, "stranger")
    code, out, err = ran(capsys, right, "--cert", cert, "--key", key)
    assert (code, out) == (Exit.USAGE, "")
    assert "[audit.baseline]" in err


def test_an_authority_makes_the_client(
    capsys: pytest.CaptureFixture[str], right: str, authority: TestAuthority, tmp_path: Path
) -> None:
    """--as NAME with the authority's own key needs no files of that name."""
    key = TestLeaf(authority.key, ()).save(tmp_path, "authority")[1]
    words = ("--ca", authority.save(tmp_path, "the"), "--ca-key", key, "--as", "spiffe://test/web")
    _, out, _ = ran(capsys, right, *CERTIFICATES, *words)
    assert "an accepted request gets: HTTP/1.1 200 OK" in out
    other = TestAuthority.root("Other").save(tmp_path, "other")
    code, _, err = ran(capsys, right, "--ca", other, "--ca-key", key)
    assert code == Exit.USAGE
    assert "[input.key_mismatch]" in err


def test_the_list_needs_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    """--list names every check, in words and as JSON, and attacks nobody."""
    code, out, _ = ran(capsys, "--list")
    assert code == Exit.OK
    assert all(check.id in out and check.attack in out for check in CHECKS)
    _, out, _ = ran(capsys, "--list", "--json", "--only", "outsider.grease")
    assert [one["id"] for one in json.loads(out)] == ["outsider.grease"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), Exit.USAGE),
        (("localhost",), Exit.USAGE),
        (("localhost:0",), Exit.USAGE),
        (("localhost:1", "--only", "nothing"), Exit.USAGE),
        (("localhost:1", "--path", "a b"), Exit.USAGE),
        (("localhost:1", "--mitm", "curl"), Exit.USAGE),
        (("localhost:1", "--ca-key", "x"), Exit.USAGE),
        (("localhost:1", "--as", "nobody"), Exit.NOT_FOUND),
        (("nowhere.invalid:1",), Exit.UNREACHABLE),
        (("localhost:1", "--cert", "missing", "--key", "missing"), Exit.NOT_FOUND),
    ],
)
def test_slips_attack_nobody(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: Exit) -> None:
    """A slip ends with its own code before a connection is made, with one line and a next step."""
    got, out, err = ran(capsys, *words)
    assert (got, out) == (code, "")
    assert "handfast:" in err
    assert "next:" in err


def test_a_port_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens: the audit is unreachable, and no clean report comes of it."""
    code, out, _ = ran(capsys, f"127.0.0.1:{free_port()}")
    assert (code, out) == (Exit.UNREACHABLE, "")
