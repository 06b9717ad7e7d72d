"""The run: bounded, counted, and never a pass for a check that broke."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from handfast.audit.catalogue import CHECKS, choose
from handfast.audit.model import Check, Need, Outcome, Remedies, Severity, Verdict, passed
from handfast.audit.runner import GENTLE, Audit, Means, Pace, prepare, run
from handfast.audit.wires import Silence
from handfast.errors import InvalidInput, Reason, Unreachable
from handfast.testing import TestAuthority
from tests.audit.kit import FAST, answering, nginx_with, python_context, scripted, target
from tests.support.apps import App
from tests.support.programs import free_port


def check(attack: Callable[[Audit], Outcome], *needs: Need, seconds: float = 5) -> Check:
    """A check that makes this attack, whatever the server speaks."""
    remedies = Remedies("", "", "", "", "")
    return Check("test.check", "", "", Severity.HIGH, (), remedies, attack, needs, seconds, tls=False)


def outcome(port: int, attack: Callable[[Audit], Outcome], *needs: Need, pace: Pace = FAST) -> Outcome:
    report = run(prepare(target(port), Means(), pace), [check(attack, *needs)], lambda *_: None)
    return report.findings[0].outcome


def breaks(_: Audit) -> Outcome:
    raise KeyError("a bug")


def times_out(_: Audit) -> Outcome:
    raise Silence


def loses_the_server(_: Audit) -> Outcome:
    raise Unreachable(Reason.UNREACHABLE, target="x", detail="gone")


@pytest.mark.parametrize(
    ("attack", "why"), [(breaks, "KeyError"), (times_out, "its time was up"), (loses_the_server, "cannot be reached")]
)
def test_a_check_that_breaks_does_not_pass(attack: Callable[[Audit], Outcome], why: str) -> None:
    """An exception in a check makes it inconclusive, and says what happened."""
    with App() as app:
        got = outcome(app.port, attack)
    assert got.verdict is Verdict.INCONCLUSIVE
    assert why in got.why


@pytest.mark.parametrize("need", Need)
def test_a_check_without_what_it_needs_is_not_made(need: Need) -> None:
    """It is not applicable, with the reason, and its attack is never made."""
    with scripted(lambda connection: connection.close()) as port:
        got = outcome(port, breaks, need)
    assert got == Outcome(Verdict.NOT_APPLICABLE, need.value)


@pytest.mark.parametrize(
    ("answer", "instead"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP/1.1 400"), (b"220 mail ESMTP\r\n", "220 mail")],
    ids=["http", "smtp"],
)
def test_another_protocol_passes_nothing(answer: bytes, instead: str, authority: TestAuthority) -> None:
    """Where no TLS is spoken, no check of TLS is made or passes, with a credential or without, and the report says
    what came instead.
    """

    def speaks(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(answer)

    checks = [one for one in CHECKS if one.id.startswith("outsider.") and one.tls]
    with scripted(speaks) as port:
        for means in (Means(), Means(authority.client())):
            report = run(prepare(target(port), means, FAST), checks, lambda *_: None)
            assert {one.outcome.verdict for one in report.findings} <= {Verdict.INCONCLUSIVE, Verdict.NOT_APPLICABLE}
            assert instead in report.no_tls


def test_a_server_that_only_hangs_up_passes_nothing() -> None:
    """Where a ClientHello gets no answer at all, attacks are made, and that they got nothing shows nothing."""
    checks = choose(["outsider.no-certificate", "outsider.self-signed", "outsider.old-versions", "outsider.plaintext"])
    with scripted(lambda connection: print(connection.recv(4096))) as port:
        report = run(prepare(target(port), Means(), FAST), checks, lambda *_: None)
    verdicts = {one.check.id: one.outcome.verdict for one in report.findings}
    assert verdicts.pop("outsider.plaintext") is Verdict.PASS  # which needs no TLS to be shown
    assert set(verdicts.values()) == {Verdict.INCONCLUSIVE}
    assert "did not answer" in report.no_tls


def test_an_alert_is_tls(authority: TestAuthority, tmp_path: Path) -> None:
    """The negative twin: a server that takes nobody, and says so with an alert, speaks TLS; so does one that serves."""

    def refuses(connection: socket.socket) -> None:
        connection.sendall(b"\x15\3\3\0\2\2\x70")
        while connection.recv(4096):  # a close with bytes unread would be a reset, which can overtake the alert
            pass

    with scripted(refuses) as port:
        look = prepare(target(port), Means(), FAST).look
    assert (look.facts, look.instead) == (None, "")
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        report = run(prepare(target(port), Means(), FAST), choose(["outsider.no-certificate"]), lambda *_: None)
    assert (report.no_tls, report.findings[0].outcome.verdict) == ("", Verdict.PASS)


@pytest.mark.parametrize("host", ["nowhere.invalid", "a..b", "a" * 70])
def test_a_name_that_leads_nowhere(host: str) -> None:
    """A host that is no name, or that nobody knows, ends as that; a port without a server does not."""
    with pytest.raises(Unreachable) as missed:
        prepare(replace(target(1), host=host), Means(), FAST)
    assert missed.value.reason is Reason.UNREACHABLE_NAME
    assert "getent hosts" in missed.value.hint


def test_nothing_listens() -> None:
    """An audit of a port on which nothing listens ends as unreachable, not with a clean report."""
    with pytest.raises(Unreachable) as missed:
        prepare(target(free_port()), Means(), FAST)
    assert missed.value.reason is Reason.UNREACHABLE


def test_a_credential_that_is_not_taken_is_no_baseline(authority: TestAuthority, tmp_path: Path) -> None:
    """What the user says is accepted must be: else every refusal would look like a defence."""
    stranger = TestAuthority.root("Stranger").client()
    context = python_context(authority, tmp_path, ssl.CERT_REQUIRED)
    with scripted(answering(context)) as port:
        with pytest.raises(InvalidInput) as refused:
            prepare(target(port), Means(stranger), FAST)
        assert refused.value.reason is Reason.AUDIT_BASELINE
        assert prepare(target(port), Means(authority.client()), FAST).baseline is not None


def test_a_refusal_in_http_is_no_baseline_either(authority: TestAuthority, tmp_path: Path) -> None:
    """nginx refuses a certificate in HTTP, with 400; that is known for what it is."""
    stranger = TestAuthority.root("Stranger").client()
    with (
        nginx_with(authority, tmp_path, "ssl_verify_client on;") as port,
        pytest.raises(InvalidInput) as refused,
    ):
        prepare(target(port), Means(stranger), FAST)
    assert refused.value.reason is Reason.AUDIT_BASELINE


@pytest.mark.parametrize(("pace", "most"), [(FAST, 4), (replace(GENTLE, pause=0.05, patience=0.2), 1)])
def test_connections_are_counted(pace: Pace, most: int) -> None:
    """No more connections are open at a time than the pace allows."""
    now, peak, lock = 0, 0, threading.Lock()

    def attack(audit: Audit) -> Outcome:
        nonlocal now, peak
        with audit.connect() as wire:  # counted on this side: the server may hear late of an end
            with lock:
                now += 1
                peak = max(peak, now)
            wire.send(b"x")
            wire.read_all(within=0.2)
            with lock:
                now -= 1
        return passed("")

    with scripted(lambda connection: print(connection.recv(4096))) as port:
        audit = prepare(target(port), Means(), pace)
        run(audit, [check(attack)] * 12, lambda *_: None)
    assert 1 <= peak <= most


def test_a_gentle_run_pauses() -> None:
    """Any two connections of a gentle run are apart by its pause."""
    taken: list[float] = []
    with scripted(lambda _: None) as port:
        audit = prepare(target(port), Means(), replace(GENTLE, pause=0.2))

        def attack(audit: Audit) -> Outcome:
            began = time.monotonic()  # from before the first to after the last: a slow machine makes it longer alone
            for _ in range(6):
                with audit.connect() as wire:
                    wire.read_all()
            taken.append(time.monotonic() - began)
            return passed("")

        run(audit, [check(attack)], lambda *_: None)
    assert taken[0] >= 5 * 0.2 - 0.01


def test_the_whole_is_bounded(authority: TestAuthority, tmp_path: Path) -> None:
    """When the time for the audit is up, what was not tried is inconclusive."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        audit = replace(prepare(target(port), Means(), FAST), pace=replace(FAST, whole=0.0))
        report = run(audit, choose(["outsider.no-certificate"]), lambda *_: None)
    assert report.findings[0].outcome.verdict is Verdict.INCONCLUSIVE
    assert "time for the whole audit" in report.findings[0].outcome.why


def test_a_check_is_bounded() -> None:
    """A wait of a check ends with the check's own time, whatever it asked for."""

    def waits(audit: Audit) -> Outcome:
        with audit.connect(60) as wire:
            wire.receive()
        return passed("")

    with scripted(lambda connection: print(connection.recv(1))) as port:
        began = time.monotonic()
        audit = prepare(target(port), Means(), replace(FAST, answer=0.5))
        report = run(audit, [check(waits, seconds=0.5)], lambda *_: None)
    assert report.findings[0].outcome.verdict is Verdict.INCONCLUSIVE
    assert time.monotonic() - began < 30


def test_progress_is_told() -> None:
    """Each check is told twice: when it begins, and with its outcome."""
    told: list[bool] = []
    with App() as app:
        run(
            prepare(target(app.port), Means(), FAST), [check(breaks)] * 3, lambda _, done: told.append(done is not None)
        )
    assert sorted(told) == [False] * 3 + [True] * 3


def test_checks_are_chosen_by_pattern() -> None:
    """An id chooses one check, a pattern those that it fits, nothing all; a slip is an error."""
    assert [one.id for one in choose(["outsider.grease"])] == ["outsider.grease"]
    assert len(choose(["outsider.replayed-*"])) == 2
    assert choose([]) == CHECKS
    with pytest.raises(InvalidInput):
        choose(["outsider.greese"])


def test_the_catalogue_is_whole() -> None:
    """Every check has an id of its own, whole sentences, references, and a remedy for each product."""
    assert len({one.id for one in CHECKS}) == len(CHECKS)
    for one in CHECKS:
        assert one.attack.endswith("."), one.id
        assert one.proves.endswith("."), one.id
        assert one.references, one.id
        assert all(text for _, text in one.remedies.items()), one.id
