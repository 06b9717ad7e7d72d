"""What refusals mean: each alert, with our certificate good and bad, and who must act."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.connector.words import Own, broken, refused, silent, span, untrusted
from handfast.errors import Failure, Reason
from handfast.explain.model import Who
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
    ("alert", "kind", "accepted", "message", "who", "hint"),
    [
        ("certificate_expired", "expired", (), "it expired 3 days ago", Who.CLIENT, "run: handfast issue web"),
        ("certificate_expired", "expired", ("CN=Corp",), "it expired 3 days ago; besides, the server does not know the"
         " authority that issued our certificate, CN=Test Root; the server accepts CN=Corp", Who.CLIENT, "bundle"),
        ("certificate_expired", "good", (), "by our clock it is good until 2026-06-02 00:00 UTC; most likely the"
         " server's revocation list is out of date; or the server's clock is ahead", Who.SERVER, "compare the clocks"),
        ("certificate_expired", "old issuer", (), "an authority above it, cn:Old Issuer, expired 2 days ago",
         Who.CLIENT, "run:"),
        ("certificate_revoked", "good", (), "it was revoked", Who.AUTHORITY, "issue a new one: handfast issue web"),
        ("bad_certificate", "early", (), "it is not valid yet; it will be in 5 minutes", Who.CLIENT, "clock"),
        ("bad_certificate", "expired", (), "most likely it expired 3 days ago", Who.CLIENT, "run: handfast issue web"),
        ("bad_certificate", "good", (), "it does not say why; perhaps the certificate is not yet valid (compare the"
         " clocks)", Who.SERVER, "the server's log says more"),
        ("bad_certificate", "good", ("CN=Corp",), "most likely the server does not know the authority that issued it,"
         " CN=Test Root; the server accepts CN=Corp", Who.CLIENT, "bundle"),
        ("unsupported_certificate", "server", (), "is not for client use (it is for server)", Who.AUTHORITY,
         "with --profile client: handfast issue web"),
        ("unsupported_certificate", "no eku", (), "(no extended key usage)", Who.AUTHORITY, "--profile client:"),
        ("unsupported_certificate", "good", (), "the server takes other kinds of keys", Who.SERVER, "log"),
        ("unknown_ca", "good", ("CN=Corp",), "the server does not know the authority that issued it, CN=Test Root;"
         " the server accepts CN=Corp", Who.CLIENT, "bundle"),
        ("unknown_ca", "good", (), "most likely the server does not know the authority that issued it, CN=Test Root;"
         " or", Who.CLIENT, "bundle"),
        ("unknown_ca", "good", ("CN=Test Root",), "has no revocation list of the certificate's issuer", Who.SERVER,
         "revocation list"),
        ("unknown_ca", "expired", ("CN=Test Root",), "besides, our certificate expired", Who.CLIENT, "run:"),
        ("certificate_required", "good", ("CN=Corp",), "the server accepts CN=Corp", Who.CLIENT, "bundle"),
        ("certificate_required", "good", (), "so it was not sent", Who.CLIENT, "P-256"),
        ("decrypt_error", "good", (), "could not prove that it holds", Who.CLIENT, "run: handfast issue web"),
        ("access_denied", "good", (), "it is good, and a rule keeps it out", Who.SERVER,
         "allow spiffe://test/web, or call as another: --as NAME"),
        ("access_denied", "expired", (), "most likely it expired 3 days ago; or a rule of the server keeps it out",
         Who.CLIENT, "run:"),
        ("certificate_unknown", "good", (), "its issuer may not issue for its name", Who.SERVER, "log"),
        ("handshake_failure", "expired", (), "it expired 3 days ago", Who.CLIENT, "run: handfast issue web"),
    ],
)  # fmt: skip
def test_an_alert_about_us_is_explained(
    alert: str, kind: str, accepted: tuple[str, ...], message: str, who: Who, hint: str
) -> None:
    """Alert and certificate together say what is wrong, who must act, and the next step."""
    verdict = refused(alert, own(kind), accepted, NOW)
    assert verdict.failure.reason is Reason.CONNECT_REFUSED
    assert verdict.failure.message.startswith("the server refused our certificate: ")
    assert message in verdict.failure.message
    assert (verdict.who, verdict.cause) == (who, alert)
    assert verdict.fields()["fault"] == str(who)
    assert hint in verdict.failure.hint


@pytest.mark.parametrize(
    ("alert", "message", "hint"),
    [
        ("protocol_version", "it speaks no TLS 1.3", "--tls-min 1.2"),
        ("unrecognized_name", "it has no site by the name", "--sni NAME"),
        ("no_application_protocol", "ALPN", "--alpn h2"),
        ("internal_error", "it failed in itself", "log"),
        ("illegal_parameter", "a field of the handshake is out of range", "rewrites the handshake"),
        ("alert 200", "the alert alert 200", "log"),
    ],
)
def test_an_alert_about_something_else_does_not_blame_our_certificate(alert: str, message: str, hint: str) -> None:
    """What has nothing to do with our certificate is told as what it is, even while that has expired."""
    verdict = refused(alert, own("expired"), (), NOW)
    assert verdict.failure.reason is Reason.CONNECT_HANDSHAKE
    assert message in verdict.failure.message
    assert hint in verdict.failure.hint


def test_a_handshake_without_common_parameters_is_not_blamed_on_a_good_certificate() -> None:
    """handshake_failure is about the certificate only where something is wrong with that."""
    verdict = refused("handshake_failure", own("good"), ("CN=Test Root",), NOW)
    assert (verdict.failure.reason, verdict.who) == (Reason.CONNECT_HANDSHAKE, Who.SERVER)


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
    assert (verdict.who, verdict.cause) == (Who.CLIENT, "cut")
    verdict = silent(own("expired"), ("CN=Corp",), NOW, cut=True)
    assert "that our certificate expired 3 days ago; besides, the server does not know" in verdict.failure.message
    assert "of an authority that the server accepts" in verdict.failure.hint
    verdict = silent(own("good"), ("CN=Test Root",), NOW, cut=False)
    assert "nothing is wrong with our certificate, spiffe://test/web" in verdict.failure.message
    assert (verdict.who, verdict.cause) == (Who.SERVER, "closed")


def test_a_server_that_we_refuse_is_explained() -> None:
    """The first failure of the verification is told, with a next step of its own."""
    failures = (
        Failure(Reason.VERIFY_NAME_MISMATCH, {"names": "dns:a", "name": "dns:b"}),
        Failure(Reason.VERIFY_NO_EKU),
    )
    verdict = untrusted(failures)
    assert verdict.failure.message == "we do not trust the server: the certificate is for dns:a, not for dns:b"
    assert (verdict.cause, "--expect" in verdict.failure.hint) == ("verify.name_mismatch", True)
    verdict = untrusted((Failure(Reason.VERIFY_EXPIRED, {"subject": "dns:a", "not_after": NOW}),))
    assert (verdict.who, verdict.failure.hint[:8]) == (Who.SERVER, "renew it")


@given(st.timedeltas(timedelta(), timedelta(days=9999)))
def test_a_span_is_one_number_and_its_unit(length: timedelta) -> None:
    """A length of time is said in its largest whole unit, singular for one."""
    count, unit = span(length).split()
    assert (count == "1") != unit.endswith("s")
    unit_length = {"day": DAY, "hour": DAY / 24, "minute": DAY / 1440, "second": DAY / 86400}[unit.rstrip("s")]
    assert int(count) * unit_length <= length < (int(count) + 1) * unit_length
