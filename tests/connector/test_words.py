"""What refusals mean: each alert, with our certificate good and bad, and whose fault it is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.connector.words import Fault, Own, broken, refused, silent, span, untrusted
from handfast.errors import Failure, Reason
from handfast.wire.alerts import Alert
from tests.support.certs import SERVER, Ca

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
ROOT = Ca.root(not_before=NOW - 900 * DAY)
OLD_ISSUER = ROOT.sub("Old Issuer", not_before=NOW - 90 * DAY, not_after=NOW - 2 * DAY)


def own(kind: str) -> Own:
    spec: dict[str, Any] = {"not_before": NOW - 10 * DAY, "not_after": NOW + DAY}
    match kind:
        case "expired":
            spec["not_after"] = NOW - 3 * DAY
        case "early":
            spec["not_before"] = NOW + timedelta(minutes=5)
        case "server":
            spec["eku"] = [SERVER]
        case "no eku":
            spec["eku"] = None
    issuer = OLD_ISSUER if kind == "old issuer" else ROOT
    return Own(issuer.client(**spec).presented, "handfast issue web")


@pytest.mark.parametrize(
    ("alert", "kind", "accepted", "message", "fault", "hint"),
    [
        ("certificate_expired", "expired", (), "it expired 3 days ago", Fault.OURS, "run: handfast issue web"),
        ("certificate_expired", "good", (), "by our clock it is good until 2026-06-02", Fault.EITHER, "clocks"),
        ("certificate_expired", "old issuer", (), "its issuer, cn:Old Issuer, expired 2 days ago", Fault.OURS, "run:"),
        ("certificate_revoked", "good", (), "it was revoked", Fault.OURS, "run: handfast issue web"),
        ("bad_certificate", "early", (), "it is not valid yet; it will be in 5 minutes", Fault.OURS, "clock"),
        ("bad_certificate", "good", (), "not to the server's liking", Fault.EITHER, "see the server's own log"),
        ("unsupported_certificate", "server", (), "it is a server's: its extended key usage lacks clientAuth",
         Fault.OURS, "--profile client"),
        ("unsupported_certificate", "no eku", (), "it has no extended key usage", Fault.OURS, "run:"),
        ("unsupported_certificate", "good", (), "though it is a client's", Fault.EITHER, "log"),
        ("unknown_ca", "good", ("CN=Corp",), "it is of CN=Test Root; the server accepts CN=Corp", Fault.OURS, "bundle"),
        ("unknown_ca", "good", (), "does not know the authority that issued it, CN=Test Root", Fault.EITHER, "bundle"),
        ("certificate_required", "good", ("CN=Corp",), "the server accepts CN=Corp", Fault.OURS, "bundle"),
        ("certificate_required", "good", (), "it saw none that it could use", Fault.EITHER, "P-256"),
        ("decrypt_error", "good", (), "our proof that we hold its key", Fault.OURS, "run: handfast issue web"),
        ("access_denied", "good", (), "no rule of the server allows spiffe://test/web", Fault.EITHER, "--as NAME"),
        ("certificate_unknown", "good", (), "names that its issuer may vouch for", Fault.EITHER, "log"),
        ("handshake_failure", "expired", (), "it expired 3 days ago", Fault.OURS, "run: handfast issue web"),
        ("unknown_ca", "expired", ("CN=Test Root",), "besides, our certificate expired", Fault.EITHER, "run:"),
    ],
)  # fmt: skip
def test_an_alert_about_us_is_explained(
    alert: str, kind: str, accepted: tuple[str, ...], message: str, fault: Fault, hint: str
) -> None:
    """Alert and certificate together say what is wrong, whose fault it is, and the next command."""
    verdict = refused(alert, own(kind), accepted, NOW)
    assert verdict.failure.reason is Reason.CONNECT_REFUSED
    assert verdict.failure.message.startswith("the server refused our certificate: ")
    assert message in verdict.failure.message
    assert (verdict.fault, verdict.cause) == (fault, alert)
    assert hint in verdict.failure.hint


@pytest.mark.parametrize(
    ("alert", "message", "hint"),
    [
        ("protocol_version", "it speaks no TLS 1.3", "--tls-min 1.2"),
        ("unrecognized_name", "it has no site by the name", "--sni NAME"),
        ("no_application_protocol", "ALPN", "without ALPN"),
        ("internal_error", "it failed in itself", "log"),
        ("alert 200", "the alert alert 200", "log"),
    ],
)
def test_an_alert_about_something_else_does_not_blame_our_certificate(alert: str, message: str, hint: str) -> None:
    """What has nothing to do with our certificate is told as what it is, even while that has expired."""
    verdict = refused(alert, own("expired"), (), NOW)
    assert verdict.failure.reason is Reason.CONNECT_HANDSHAKE
    assert message in verdict.failure.message
    assert hint in verdict.failure.hint


@pytest.mark.parametrize("alert", Alert, ids=lambda alert: alert.wire_name)
@pytest.mark.parametrize("kind", ["good", "expired", "early", "server", "no eku", "old issuer"])
def test_every_alert_has_words_and_a_next_step(alert: Alert, kind: str) -> None:
    """No alert, with no certificate, is left without a sentence and a next step."""
    verdict = refused(alert.wire_name, own(kind), ("CN=Test Root",), NOW)
    assert verdict.failure.hint
    assert "{" not in verdict.failure.message + verdict.failure.hint
    assert verdict.fields()["cause"] == alert.wire_name


@pytest.mark.parametrize(
    ("failure", "reason", "message"),
    [
        (Failure(Reason.TLS_ALERT, {"alert": "certificate_expired"}), Reason.CONNECT_REFUSED, "expired 3 days ago"),
        (Failure(Reason.TLS_NOT_TLS), Reason.CONNECT_HANDSHAKE, "does not speak TLS"),
        (Failure(Reason.TLS_VERSION), Reason.CONNECT_HANDSHAKE, "no TLS 1.3"),
        (Failure(Reason.TLS_CLOSED), Reason.CONNECT_HANDSHAKE, "may be why: it expired 3 days ago"),
        (Failure(Reason.TLS_BAD_PROOF), Reason.CONNECT_UNTRUSTED, "could not prove"),
        (Failure(Reason.TLS_TIMEOUT, {"limit": 10.0}), Reason.CONNECT_HANDSHAKE, "in 10 s"),
        (Failure(Reason.TLS_NO_COMMON, {"what": "cipher suite"}), Reason.CONNECT_HANDSHAKE, "no cipher suite"),
        (Failure(Reason.TLS_HANDSHAKE, {"detail": "odd"}), Reason.CONNECT_HANDSHAKE, "odd"),
    ],
)
def test_a_broken_handshake_is_explained(failure: Failure, reason: Reason, message: str) -> None:
    """Each way of breaking has its own words."""
    verdict = broken(failure, own("expired"), (), NOW)
    assert verdict.failure.reason is reason
    assert message in verdict.failure.message
    assert verdict.failure.hint


def test_a_server_that_closes_without_a_word_is_explained() -> None:
    """What is wrong with our certificate is named as the likely cause; with a good one, the server's rules are."""
    verdict = silent(own("expired"), (), NOW, cut=True)
    assert "the likely one is that our certificate expired 3 days ago" in verdict.failure.message
    assert (verdict.fault, verdict.cause) == (Fault.OURS, "cut")
    verdict = silent(own("good"), ("CN=Test Root",), NOW, cut=False)
    assert "nothing is wrong with our certificate, spiffe://test/web" in verdict.failure.message
    assert (verdict.fault, verdict.cause) == (Fault.THEIRS, "closed")


def test_a_server_that_we_refuse_is_explained() -> None:
    """The first failure of the verification is told, with a next step of its own."""
    failures = (
        Failure(Reason.VERIFY_NAME_MISMATCH, {"names": "dns:a", "name": "dns:b"}),
        Failure(Reason.VERIFY_NO_EKU),
    )
    verdict = untrusted(failures)
    assert verdict.failure.message == "we do not trust the server: the certificate is for dns:a, not for dns:b"
    assert (verdict.cause, "--expect" in verdict.failure.hint) == ("verify.name_mismatch", True)


@given(st.timedeltas(timedelta(), timedelta(days=9999)))
def test_a_span_is_one_number_and_its_unit(length: timedelta) -> None:
    """A length of time is said in its largest whole unit, singular for one."""
    count, unit = span(length).split()
    assert (count == "1") != unit.endswith("s")
    unit_length = {"day": DAY, "hour": DAY / 24, "minute": DAY / 1440, "second": DAY / 86400}[unit.rstrip("s")]
    assert int(count) * unit_length <= length < (int(count) + 1) * unit_length
