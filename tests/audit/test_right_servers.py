"""Right servers stand: no check fails against them, and none is left open for want of a right answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from handfast.audit.catalogue import choose
from handfast.audit.middle import CLIENTS
from handfast.audit.model import Report, Severity, Verdict
from handfast.audit.runner import Client, Means, prepare, run
from handfast.guard.connection import Limits
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.kit import ANSWER, FAST, found, nginx_with, target
from tests.support.apps import App
from tests.support.certs import Ca
from tests.support.guards import Running

# A right server ends what it should, and how soon is told by the machine as well.
PATIENT = replace(FAST, answer=5.0, limit=8.0, patience=8.0)
# What cannot be made against a server without a credential, or needs a client on the other side.
WITHOUT_CREDENTIAL = {
    "outsider.copied-certificate",
    "outsider.leaf-as-issuer",
    "outsider.replayed-flights",
    "outsider.replayed-session",
    "outsider.person-in-the-middle",
}


def of(port: int, means: Means) -> Report:
    """What all checks of an outsider come to."""
    return run(prepare(target(port), means, PATIENT), choose(["outsider.*"]), lambda *_: None)


def holds(report: Report) -> None:
    """No hole, and nothing that was left undecided."""
    for finding in report.findings:
        told = f"{finding.check.id}: {finding.outcome}"
        if finding.check.severity is not Severity.INFO:
            assert finding.outcome.verdict in (Verdict.PASS, Verdict.NOT_APPLICABLE), told


def not_made(report: Report) -> set[str]:
    return {one.check.id for one in report.findings if one.outcome.verdict is Verdict.NOT_APPLICABLE}


@pytest.mark.parametrize("known", [False, True], ids=["stranger", "with-credential"])
def test_nginx_holds(authority: TestAuthority, client: TestLeaf, tmp_path: Path, known: bool) -> None:
    """nginx with ssl_verify_client on beats back every attack."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;", "ssl_protocols TLSv1.2 TLSv1.3;") as port:
        report = of(port, Means(client if known else None))
    holds(report)
    assert not_made(report) == ({"outsider.person-in-the-middle"} if known else WITHOUT_CREDENTIAL)


@pytest.mark.parametrize("known", [False, True], ids=["stranger", "with-credential"])
@pytest.mark.parametrize("tls12", [False, True], ids=["tls13", "tls12"])
def test_a_guard_holds(authority: TestAuthority, client: TestLeaf, known: bool, tls12: bool) -> None:
    """A guard beats back every attack, with TLS 1.3 alone and with TLS 1.2 allowed."""
    ours = Ca(authority.certificate, authority.key)
    limits = Limits(handshake=1.0)
    with (
        App(lambda connection, _: connection.sendall(ANSWER)) as app,
        Running(ours, app.address, limits=limits, tls12=tls12) as guard,
    ):
        report = of(int(guard.address.rpartition(":")[2]), Means(client if known else None))
    holds(report)
    missing = {"outsider.person-in-the-middle"} if known else set(WITHOUT_CREDENTIAL)
    if not tls12:
        missing.add("outsider.renegotiation")
    assert not_made(report) - {"outsider.compression"} == missing


@pytest.mark.parametrize("kind", CLIENTS)
def test_right_clients_find_the_person_in_the_middle(authority: TestAuthority, tmp_path: Path, kind: str) -> None:
    """curl, Python, openssl and our connector end the handshake with a forged server, each by an alert."""
    means = Means(client=Client(kind, str(authority.save(tmp_path)), CLIENTS[kind]))
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        finding = found("outsider.person-in-the-middle", port, means)
    assert finding.outcome.verdict is Verdict.PASS, finding.outcome
    assert len(finding.outcome.evidence) == 2
    assert "alert" in finding.outcome.why
