"""TLS alerts: the table of words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.wire.alerts import Alert, alert_name, alert_of

# RFC 8446 6 and appendix B.2, RFC 5246 7.2, RFC 6066 9: a copy made apart from the table.
KNOWN = {
    0: "close_notify",
    10: "unexpected_message",
    20: "bad_record_mac",
    21: "decryption_failed",
    22: "record_overflow",
    30: "decompression_failure",
    40: "handshake_failure",
    41: "no_certificate",
    42: "bad_certificate",
    43: "unsupported_certificate",
    44: "certificate_revoked",
    45: "certificate_expired",
    46: "certificate_unknown",
    47: "illegal_parameter",
    48: "unknown_ca",
    49: "access_denied",
    50: "decode_error",
    51: "decrypt_error",
    60: "export_restriction",
    70: "protocol_version",
    71: "insufficient_security",
    80: "internal_error",
    86: "inappropriate_fallback",
    90: "user_canceled",
    100: "no_renegotiation",
    109: "missing_extension",
    110: "unsupported_extension",
    111: "certificate_unobtainable",
    112: "unrecognized_name",
    113: "bad_certificate_status_response",
    114: "bad_certificate_hash_value",
    115: "unknown_psk_identity",
    116: "certificate_required",
    117: "general_error",
    120: "no_application_protocol",
    121: "ech_required",
}


def test_every_alert_has_its_number_and_name() -> None:
    """The table holds every alert of the RFCs under its own number, and no other."""
    assert {alert.number: alert.wire_name for alert in Alert} == KNOWN
    assert len(KNOWN) == len(Alert)


@pytest.mark.parametrize("alert", Alert)
def test_every_alert_is_explained(alert: Alert) -> None:
    """Every alert says what it means and what most likely caused it, as one line without a full stop."""
    for text in (alert.meaning, alert.cause):
        assert text
        assert "\n" not in text
        assert not text.endswith(".")


@given(st.integers())
def test_naming_is_total(number: int) -> None:
    """Any number has a name, and only the known ones have an alert."""
    alert = alert_of(number)
    if number in KNOWN:
        assert alert is not None
        assert alert_name(number) == alert.wire_name == KNOWN[number]
    else:
        assert alert is None
        assert alert_name(number) == f"alert {number}"


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (116, "no certificate"),
        (48, "another authority"),
        (48, "revocation list"),
        (45, "not renewed"),
        (44, "revoked"),
        (42, "not yet valid"),
        (43, "extended key usage"),
        (46, "name constraints"),
        (51, "private key"),
        (40, "no client certificate"),
    ],
)
def test_refusals_of_mutual_tls_point_to_their_cause(number: int, cause: str) -> None:
    """The alert that a refused client reads names the mistake that leads to it in practice."""
    alert = alert_of(number)
    assert alert is not None
    assert cause in alert.cause
