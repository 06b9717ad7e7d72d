"""The stage of `audit --local`: its app, its lists, one report of several; and that a hole on it is found."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest
from cryptography import x509

from handfast.audit.catalogue import choose
from handfast.audit.local import BACK, FRONT, Echo, Stage, fold, run_apart
from handfast.audit.model import (
    Check,
    Evidence,
    Finding,
    Outcome,
    Remedies,
    Report,
    Severity,
    Verdict,
    failed,
    not_applicable,
    passed,
    unclear,
)
from handfast.audit.runner import Audit, prepare
from handfast.cli import auditing_local
from handfast.cli.auditing_local import Ears, audit_local, guard_config, how_many
from handfast.cli.main import _run
from handfast.errors import Exit
from handfast.guard.config import load_config
from handfast.pki.revocation import parse_crls
from tests.audit.kit import FAST, answering, python_context, scripted, target

NO_REMEDY = Remedies("", "", "", "", "")
GOOD = passed("it held")


def check(name: str, run: Callable[[Audit], Outcome] = lambda _: GOOD, seconds: float = 20.0) -> Check:
    return Check(name, "", "", Severity.HIGH, (), NO_REMEDY, run, seconds=seconds)


def report(*found: tuple[str, Outcome]) -> Report:
    findings = tuple(Finding(check(name), outcome, 0.5) for name, outcome in found)
    return Report("127.0.0.1:1", "TLS 1.3", "HTTP/1.1 200 OK", "2026-01-01T00:00:00+00:00", findings)


def said(*requests: bytes) -> bytes:
    """All that the app answers to these pieces until it, or we, are done."""
    with Echo() as app, socket.create_connection(("127.0.0.1", app.port), 5) as connection:
        for request in requests:
            connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        pieces = []
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
        return b"".join(pieces)


# The app.


def test_the_app_answers_with_what_it_got() -> None:
    """The request line and every header come back byte for byte, and odd spellings with them."""
    head = b"GET /echo?c HTTP/1.1\r\nHost: x\r\nclient_cert:  two  spaces\r\nX: \xff"
    answer = said(head + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n" + head)


def test_the_app_keeps_a_connection_and_tells_requests_apart() -> None:
    """Three requests on a connection, with bodies of both kinds and cut anywhere, get three answers in their order."""
    one = b"POST /echo?one HTTP/1.1\r\nContent-Length: 5\r\n\r\nGET /"
    two = b"POST /echo?two HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4;x=y\r\nGET \r\n0\r\nTrailer: t\r\n\r\n"
    three = b"GET /echo?three HTTP/1.1\r\nConnection: close\r\n\r\n"
    whole = one + two + three
    for pieces in ((whole,), tuple(bytes((byte,)) for byte in whole)):
        answer = said(*pieces)
        assert [answer.count(b"HTTP/1.1 200 OK"), answer.count(b"HTTP/1.1 400")] == [3, 0]
        assert answer.index(b"?one") < answer.index(b"?two") < answer.index(b"?three")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/", b"may see"),
        ("/protected/secret", b"the secret"),
        ("//protected/./x/..%2fsecret;a?b", b"the secret"),
        ("/protected\\secret.", b"the secret"),
        ("https://x/protected/secret", b"the secret"),
        ("/protected/secrets", b"no such page"),
        ("/PROTECTED/secret", b"no such page"),
    ],
)
def test_the_app_finds_a_path_in_every_spelling(path: str, says: bytes) -> None:
    """What a rule misses the app would give away: the secret comes under every spelling of it, and under no other."""
    assert says in said(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\na",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_the_app_guesses_no_length(request_: bytes) -> None:
    """A request whose end is not plain gets 400 and is the last of its connection: no request is made of its rest."""
    answer = said(request_ + b"GET /smuggled HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"smuggled" not in answer


# The stage.


def test_the_stage_has_what_a_server_needs(tmp_path: Path) -> None:
    """Two sites of two authorities, lists that these signed, and a leaf that stands on the first; keys are private."""
    stage = Stage.set_up(tmp_path)
    (crl,) = parse_crls((tmp_path / "front.crl").read_bytes(), "front.crl")
    assert crl.is_signature_valid(stage.front.certificate.public_key())  # type: ignore[arg-type]  # it is P-256
    assert [one.serial_number for one in crl] == [stage.revoked.certificate.serial_number]
    (empty,) = parse_crls((tmp_path / "back.crl").read_bytes(), "back.crl")
    assert len(list(empty)) == 0
    for name, site in (("front", FRONT), ("back", BACK)):
        leaf = x509.load_pem_x509_certificate((tmp_path / f"{name}.crt").read_bytes())
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [site]
        assert {(tmp_path / f"{name}.{end}").stat().st_mode & 0o777 for end in ("key", "pem")} == {0o600}


def test_the_revoker_adds_to_the_list(tmp_path: Path) -> None:
    """A leaf that is revoked joins the list that the server reads, and one that is only issued does not."""
    stage = Stage.set_up(tmp_path)
    bad, good = stage.revoker.issue(("spiffe://test/a",)), stage.revoker.issue(("spiffe://test/a",))
    stage.revoker.revoke(bad)
    (crl,) = parse_crls((tmp_path / "front.crl").read_bytes(), "front.crl")
    serials = {one.serial_number for one in crl}
    assert serials == {stage.revoked.certificate.serial_number, bad.certificate.serial_number}
    assert good.certificate.serial_number not in serials


def test_the_guard_takes_the_configuration(tmp_path: Path) -> None:
    """What is written for the guard is a configuration without an error: two listeners of two sites each."""
    Stage.set_up(tmp_path)
    (tmp_path / "handfast.toml").write_text(guard_config(8000, [Ears(), Ears(oldest="1.2", crl=True)]))
    config = load_config(tmp_path / "handfast.toml")
    assert [len(one.all_sites) for one in config.listeners] == [2, 2]
    assert [bool(site.crl) for one in config.listeners for site in one.all_sites] == [False, False, True, True]


# One report of several.


def test_the_worst_of_a_check_counts() -> None:
    """A hole at one listener is a hole, whatever the others do, and it says where; nothing is asked of nobody."""
    bad = failed("it is open", Evidence.of("a", "b"))
    one = report(("a", GOOD), ("b", GOOD), ("c", not_applicable("no")), ("d", GOOD))
    two = report(("a", bad), ("b", unclear("hm")), ("c", GOOD), ("d", GOOD))
    found = fold([("here", one), ("there", two)])
    outcomes = {finding.check.id: finding.outcome for finding in found.findings}
    assert [finding.check.id for finding in found.findings] == ["a", "b", "c", "d"]
    assert outcomes["a"] == failed("there: it is open", *bad.evidence)
    assert outcomes["b"] == unclear("there: hm")
    assert outcomes["c"] == passed("there: it held")
    assert outcomes["d"] == GOOD
    assert found.failed
    assert not fold([("here", one)]).failed


def test_a_finding_about_all_stands_with_the_others() -> None:
    """What was found of the whole is one more finding, in its place."""
    found = fold([("here", report(("a", GOOD)))], Finding(check("z"), failed("broken"), 0.1))
    assert [finding.check.id for finding in found.findings] == ["z", "a"]


def test_checks_run_apart(tmp_path: Path) -> None:
    """One check at a time makes its attack, so that none measures another; those that wait do so beside them."""
    stage = Stage.set_up(tmp_path)
    running, most, waited = [0], [0], threading.Event()

    def busy(_: Audit) -> Outcome:
        running[0] += 1
        most[0] = max(most[0], running[0])
        waited.wait(0.05)
        running[0] -= 1
        return GOOD

    def wait(audit: Audit) -> Outcome:
        return GOOD if waited.wait(audit.deadline - monotonic()) else unclear("nobody came")

    def release(audit: Audit) -> Outcome:
        waited.set()
        return busy(audit)

    checks = [check("slow", wait, 100.0), *(check(f"{number}", busy) for number in range(4)), check("last", release)]
    context = python_context(stage.front, tmp_path, ssl.CERT_NONE)
    with scripted(answering(context)) as port:
        audits = [prepare(target(port), stage.means, FAST) for _ in range(2)]
        found = run_apart(audits[0], audits[1], checks, lambda *_: None)
    assert {finding.check.id: finding.outcome for finding in found.findings} == {one.id: GOOD for one in checks}
    assert most == [1]


# The verb.


def test_a_hole_in_the_guard_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that asks nobody for a certificate fails the same audit that the right one passes."""
    (no_certificate,) = choose(["outsider.no-certificate"])
    told: list[Verdict] = []

    def progress(_: Check, outcome: Outcome | None) -> None:
        if outcome is not None:
            told.append(outcome.verdict)

    assert not audit_local([no_certificate], FAST, progress).failed
    assert len(told) == how_many([no_certificate]) == 3

    def careless(app: int, listeners: list[Ears]) -> str:
        text = guard_config(app, listeners).replace(
            '\nallow = ["deny any /protected/**", "allow spiffe://test/web"]', ""
        )
        return text.replace("\ntls_min", '\nclient_auth = "optional"\ntls_min')

    monkeypatch.setattr(auditing_local, "guard_config", careless)
    found = audit_local([no_certificate], FAST, progress)
    assert [finding.check.id for finding in found.findings if finding.failed] == ["outsider.no-certificate"]


@pytest.mark.parametrize(
    ("lines", "errors", "code", "verdict"),
    [
        (['{"event": "request", "reason": "rule.matched"}'], [], 0, Verdict.PASS),
        (['{"event": "bug", "detail": "x"}'], [], 0, Verdict.FAIL),
        (['{"event": "ended", "reason": "bug"}'], [], 0, Verdict.FAIL),
        (["Traceback (most recent call last):"], [], 0, Verdict.FAIL),
        ([], ["Exception ignored in: x"], 0, Verdict.FAIL),
        ([], [], 1, Verdict.FAIL),
        ([], [], None, Verdict.FAIL),
    ],
)
def test_the_guards_own_word_counts(lines: list[str], errors: list[str], code: int | None, verdict: Verdict) -> None:
    """A bug in its log, a word on standard error, or an end that is not clean fails the audit of our own guard."""
    log = auditing_local._Log(code=code)
    log.read(lines)
    log.listen(errors)
    whole = auditing_local._whole(log)
    assert whole.run(None).verdict is verdict  # type: ignore[arg-type]  # it looks at the log alone


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("localhost:1",), "HOST:PORT"),
        (("--cert", "x"), "--cert"),
        (("--as", "web"), "--as"),
        (("--sni", "x"), "--sni"),
        (("--mitm", "curl"), "--mitm"),
    ],
)
def test_local_takes_no_other_target(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], what: str) -> None:
    """What says whom to attack, or as whom, is a slip beside --local, and is not passed over."""
    assert _run(["audit", "--local", *words]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert (out, what in err) == ("", True)
