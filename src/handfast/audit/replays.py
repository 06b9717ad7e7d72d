"""Recorded traffic sent again: flight by flight, a whole session, and whether early data may be repeated at all.

The far side's records cannot be read in a replay, since its keys are new. How many bytes come back tells: an alert is
short, and an answer is as long as it was the first time.
"""

from __future__ import annotations

from dataclasses import dataclass

from handfast.audit import odd
from handfast.audit.model import (
    Check,
    Evidence,
    Need,
    Outcome,
    Remedies,
    Severity,
    failed,
    not_applicable,
    passed,
    unclear,
)
from handfast.audit.oracle import End, Reach, reach
from handfast.audit.runner import Audit
from handfast.audit.wires import Silence, Wire, call

_ALERTS = 64  # bytes: two encrypted alerts with their records take 48
_LEAST_ANSWER = 110  # bytes that an answer must have had to be told from alerts
_TURN = 0.5  # seconds of quiet after which the server has said its flight

_UPGRADE = Remedies(
    handfast="upgrade handfast and report it: this must not happen",
    nginx="upgrade nginx and OpenSSL; look for a broken random source",
    haproxy="upgrade HAProxy and its TLS library; look for a broken random source",
    envoy="upgrade Envoy; look for a broken random source",
    apache="upgrade httpd and OpenSSL; look for a broken random source",
)


@dataclass(frozen=True, slots=True)
class _Recording:
    """A good session's flights as they were on the wire."""

    sent: tuple[bytes, ...]
    before: int  # bytes that came before the client's last flight
    answer: int  # and after it


def _flights(audit: Audit) -> Outcome:
    recording = _record(audit)
    if isinstance(recording, Outcome):
        return recording
    last = b""
    with audit.connect(audit.pace.answer * 2) as wire:
        try:
            for flight in recording.sent:
                wire.send(flight)
                last, end = wire.read_all(within=_TURN if flight is not recording.sent[-1] else audit.pace.answer)
        except (OSError, Silence):
            end = End.RESET
    return _judge("the recorded flights of a good session, each in its turn", last, end, recording.answer)


def _session(audit: Audit) -> Outcome:
    recording = _record(audit)
    if isinstance(recording, Outcome):
        return recording
    with audit.connect() as wire:
        try:
            wire.send(b"".join(recording.sent))
            got, end = wire.read_all(within=audit.pace.answer)
        except (OSError, Silence):
            got, end = b"", End.RESET
    return _judge("all that a good session sent, at once", got[recording.before :], end, recording.answer)


def _record(audit: Audit) -> _Recording | Outcome:
    credential = audit.means.credential
    assert credential is not None  # it is needed
    with audit.connect() as wire:
        reply, _ = call(wire, audit.offer(credential), audit.request)
        recording = _of(wire)
    if reach(reply, audit.baseline)[0] is not Reach.YES:
        return unclear(f"the session to be recorded did not go well: {reply}")
    if recording.answer < _LEAST_ANSWER:
        return unclear(f"the answer has {recording.answer} bytes; that is too few to be told from an alert")
    return recording


def _of(wire: Wire) -> _Recording:
    """What went over a wire. After the last flight that was sent, all that came is the answer."""
    last = len(wire.sent) - 1
    before = sum(map(len, wire.received[:last]))
    return _Recording(tuple(wire.sent), before, sum(map(len, wire.received[last:])))


def _judge(said: str, got: bytes, end: End, answer: int) -> Outcome:
    evidence = Evidence.of(said, f"{len(got)} bytes, then: {end}; the first time it was {answer} bytes")
    if len(got) > _ALERTS:
        return failed("the server answered what was recorded as if it were new", evidence)
    if end in (End.CLOSED, End.RESET):
        return passed("the server ended it", evidence)
    return unclear("the server neither answered nor ended it", evidence)


def _early_data(audit: Audit) -> Outcome:
    if not audit.look.tls13:
        return not_applicable("the server does not speak TLS 1.3")
    with audit.connect(audit.pace.answer * 2) as wire:
        got = odd.converse(wire, audit.target.sni, audit.means.credential, audit.request)
    if not got.reply.handshake:
        return unclear(f"no handshake could be had: {got.reply.detail or got.reply}")
    allowed = max(got.early_data, default=0)
    evidence = Evidence.of(
        "a TLS 1.3 handshake, then a wait for tickets", f"{got.tickets} tickets, early data of {allowed} bytes at most"
    )
    if allowed:
        return failed(
            f"the server's tickets allow {allowed} bytes of early data, which anybody can send again", evidence
        )
    if not got.tickets and not got.reply.data and audit.means.credential is None:
        return not_applicable(f"the server refused us before it sent a ticket; it {Need.CREDENTIAL.value}")
    return passed("no ticket allows early data", evidence)


CHECKS = (
    Check(
        "outsider.replayed-flights",
        "Somebody who listened sends an accepted client's records again, each in its turn.",
        "The handshake is bound to what the server chose anew, so a recording opens nothing.",
        Severity.CRITICAL,
        ("RFC 8446 E.1", "CWE-294"),
        _UPGRADE,
        _flights,
        needs=(Need.CREDENTIAL,),
        seconds=40,
    ),
    Check(
        "outsider.replayed-session",
        "Somebody who listened sends all of an accepted client's bytes again, at once.",
        "No request is carried out twice because it was recorded.",
        Severity.CRITICAL,
        ("RFC 8446 E.1", "CWE-294"),
        _UPGRADE,
        _session,
        needs=(Need.CREDENTIAL,),
        seconds=40,
    ),
    Check(
        "outsider.early-data",
        "Somebody who listened sends a client's early data (0-RTT) again, which TLS does not prevent.",
        "The server offers no early data, so no request in a client's name can be repeated by others.",
        Severity.MEDIUM,
        ("RFC 8446 8", "RFC 8470", "CWE-294"),
        Remedies(
            handfast="nothing to do: there is no early data and no resumption",
            nginx="ssl_early_data off (the default)",
            haproxy="no `allow-0rtt` on bind or server lines",
            envoy="nothing to do on TCP listeners; for QUIC leave enable_early_data off",
            apache="nothing to do: mod_ssl has no early data",
        ),
        _early_data,
    ),
)
