"""Connections and sessions that outlast what they stand on: resumed under another name, and after trust has ended.

A resumed session skips the certificate, so whoever resumes must be asked again whether they may. Each way to resume
is tried: a TLS 1.3 ticket, a TLS 1.2 ticket, a TLS 1.2 session id.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum

from handfast.audit.insider import Inside, by_authority, by_client, request_to, talking, versions
from handfast.audit.insider_certificates import REVOKED_WITHIN
from handfast.audit.model import (
    Check,
    Evidence,
    Need,
    Outcome,
    Remedies,
    Severity,
    Verdict,
    not_applicable,
    passed,
    unclear,
)
from handfast.audit.oracle import Reach, Reply, reach, worst
from handfast.audit.runner import Audit, Target
from handfast.audit.wires import Silence, call
from handfast.testing import TestLeaf
from handfast.tls.probe import Offer, ProbeRefused, Session

_SHORT = timedelta(seconds=3)  # the life of a certificate that expires while we watch
_GRACE = 2.0  # seconds after its end in which a server may still serve it
_GOODBYE = 0.5  # seconds in which a server may put a session into its cache
_NOBODY = "audit.invalid"  # no server has this name (RFC 6761 6.4)

_NO_RESUMPTION = Remedies(
    handfast="nothing to do: no session is resumed",
    nginx="ssl_session_cache off; ssl_session_tickets off; in every server block that asks for client certificates",
    haproxy="no-tls-tickets and tune.ssl.cachesize 0; ssl-default-bind-options no-tls-tickets",
    envoy="disable_stateless_session_resumption and disable_stateful_session_resumption: true",
    apache="SSLSessionTickets off and SSLSessionCache none",
)
_ENDS = Remedies(
    handfast="nothing to do: a connection ends when its certificate expires or is revoked",
    nginx="keepalive_time 5m; keepalive_requests 100; nothing looks at the certificate again",
    haproxy="timeout http-keep-alive and hard-stop-after; nothing looks at the certificate again",
    envoy="max_connection_duration: 300s; newer releases close connections whose certificate has expired",
    apache="KeepAliveTimeout and MaxKeepAliveRequests; nothing looks at the certificate again",
)


class _Way(Enum):
    """How a session is resumed: in words, whether TLS 1.2, whether by ticket."""

    PSK = ("a TLS 1.3 ticket", False, True)
    TICKET = ("a TLS 1.2 ticket", True, True)
    ID = ("a TLS 1.2 session id", True, False)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A session of a good client, and how it may be resumed."""

    way: _Way
    leaf: TestLeaf
    session: Session


def _begin(inside: Inside, way: _Way, leaf: TestLeaf) -> _Kept | None:
    """Make a session for this leaf, or None where the server resumes none, not even for the good client."""
    if way.value[1] not in versions(inside.audit):
        return None
    trial = _fresh(inside.audit, way, inside.client)
    if trial is None or not _resume(inside.audit, _Kept(way, inside.client, trial))[1]:
        return None
    session = _fresh(inside.audit, way, leaf)
    if session is None:
        raise ProbeRefused("a client that should get in did not")
    return _Kept(way, leaf, session)


def _fresh(audit: Audit, way: _Way, leaf: TestLeaf) -> Session | None:
    _, tls12, tickets = way.value
    with audit.connect() as wire:
        reply, probe = call(wire, replace(audit.offer(leaf, tls12=tls12), tickets=tickets), audit.request)
        if probe is None or not reply.handshake:
            return None
        session = probe.leave()
        with suppress(OSError, Silence):  # the server has left already
            wire.send(probe.take())
            wire.read_all(within=_GOODBYE)
    return session


def _resume(audit: Audit, kept: _Kept, server_name: str | None = "") -> tuple[Reply, bool]:
    """Offer the session, to another server name if one is given; the reply, and whether it was resumed."""
    name = audit.target.sni if server_name == "" else server_name
    with audit.connect() as wire:
        reply, probe = call(wire, Offer(name, session=kept.session), audit.request)
    return reply, probe is not None and reply.handshake and probe.resumed


def _judged(inside: Inside, said: str, tried: tuple[Reply, bool]) -> Outcome:
    reply, resumed = tried
    if not resumed:  # then the certificate was asked for, and judged as always
        return passed("the session was not resumed", Evidence.of(said, "a full handshake, or none"))
    return inside.judge(said, reply)


def _each_way(attack: Callable[[Inside, _Way], Outcome | None]) -> Callable[[Inside], Outcome]:
    """Try every way to resume. Where none is to be had, that is the best defence."""

    def run(inside: Inside) -> Outcome:
        tries = [outcome for way in _Way if (outcome := attack(inside, way)) is not None]
        if not tries:
            return passed("the server resumes no session", Evidence.of("three ways to resume", "a full handshake"))
        return worst(tries)

    return run


def _other_names(inside: Inside, way: _Way) -> Outcome | None:
    """RFC 6066 3: a session must not be resumed under another server name than it was made for."""
    own = inside.audit.target.sni
    other = inside.audit.means.other
    names = [_NOBODY, other.sni if other else None, None if own else "localhost"]
    tries = []
    for name in dict.fromkeys(name for name in names if name and name != own):
        kept = _begin(inside, way, inside.client)
        if kept is None:
            return None
        said = f"{way.value[0]}, made for {own or 'no name'}, offered to {name}"
        tries.append(_judged(inside, said, _resume(inside.audit, kept, name)))
    return worst(tries)


def _after_expiry(inside: Inside, way: _Way) -> Outcome | None:
    leaf = inside.authority.client(*inside.names, validity=(-_SHORT * 100, _SHORT))
    kept = _begin(inside, way, leaf)
    if kept is None:
        return None
    _wait_for_end(leaf)
    return _judged(inside, f"{way.value[0]}, after the certificate has expired", _resume(inside.audit, kept))


def _after_revocation(inside: Inside, way: _Way) -> Outcome | None:
    revoker = inside.audit.means.revoker
    assert revoker is not None  # it is needed
    leaf = revoker.issue(inside.names)
    kept = _begin(inside, way, leaf)
    if kept is None:
        return None
    revoker.revoke(leaf)
    ends = time.monotonic() + REVOKED_WITHIN
    while time.monotonic() < ends and inside.gets_in(leaf, tls12=way.value[1]):
        time.sleep(0.25)
    return _judged(inside, f"{way.value[0]}, after the certificate was revoked", _resume(inside.audit, kept))


def _elsewhere(inside: Inside, way: _Way) -> Outcome | None:
    other = inside.audit.means.other
    assert other is not None  # it is needed
    kept = _begin(inside, way, inside.client)
    if kept is None:
        return None
    there = replace(inside.audit, target=_as_asked(other, inside.audit.target))
    return _judged(inside, f"{way.value[0]}, made at {inside.audit.target}, offered to {other}", _resume(there, kept))


def _as_asked(other: Target, target: Target) -> Target:
    """The other listener; asked for the same name, where it is at the same host, so that the name alone says no."""
    return replace(other, sni=other.sni or target.sni)


def _kept_past_expiry(inside: Inside) -> Outcome:
    leaf = inside.authority.client(*inside.names, validity=(-_SHORT * 100, _SHORT))
    return _kept_open(inside, leaf, lambda: _wait_for_end(leaf), "has expired")


def _kept_past_revocation(inside: Inside) -> Outcome:
    revoker = inside.audit.means.revoker
    assert revoker is not None  # it is needed
    leaf = revoker.issue(inside.names)
    return _kept_open(inside, leaf, lambda: revoker.revoke(leaf), "was revoked", REVOKED_WITHIN)


def _kept_open(inside: Inside, leaf: TestLeaf, ends: Callable[[], None], how: str, within: float = 0.0) -> Outcome:
    """Ask, let trust end, and ask again on the same connection, until it is refused or `within` seconds are over."""
    audit = inside.audit
    request = request_to(audit, audit.target.path)
    with talking(audit, audit.offer(leaf, tls12=versions(audit)[0]), _SHORT.total_seconds() + 25) as talk:
        first = talk.ask(request)
        if reach(first, inside.control)[0] is not Reach.YES:
            return unclear(f"the good certificate did not get in ({first}), so nothing is shown")
        if b"\r\nconnection: close" in first.data.partition(b"\r\n\r\n")[0].lower():
            return not_applicable("the server closes every connection after one answer")
        ends()
        until = time.monotonic() + within
        while True:
            outcome = inside.judge(f"a request on a connection whose certificate {how}", talk.ask(request))
            if outcome.verdict is not Verdict.FAIL or time.monotonic() > until:
                return outcome
            time.sleep(0.25)


def _wait_for_end(leaf: TestLeaf) -> None:
    left = leaf.certificate.not_valid_after_utc - datetime.now(UTC)
    time.sleep(max(left.total_seconds(), 0.0) + _GRACE)


CHECKS = (
    Check(
        "insider.resumed-under-another-name",
        "A client resumes a session that was made for one server name, and asks for another.",
        "A site that asks for more than its neighbour cannot be entered with the neighbour's session.",
        Severity.MEDIUM,
        ("RFC 6066 3", "CVE-2025-23419", "CVE-2014-3616", "CWE-287"),
        _NO_RESUMPTION,
        by_client(_each_way(_other_names)),
        (Need.INSIDER,),
        seconds=60,
    ),
    Check(
        "insider.resumed-after-expiry",
        "A client resumes a session after its certificate has expired.",
        "Resumption does not prolong trust.",
        Severity.HIGH,
        ("RFC 8446 4.6.1", "CWE-613"),
        _NO_RESUMPTION,
        by_authority(_each_way(_after_expiry)),
        (Need.AUTHORITY,),
        seconds=60,
    ),
    Check(
        "insider.resumed-after-revocation",
        "A client resumes a session after its certificate was revoked.",
        "Who was put out cannot come back by an old session.",
        Severity.HIGH,
        ("RFC 8446 4.6.1", "CWE-613"),
        _NO_RESUMPTION,
        by_client(_each_way(_after_revocation)),
        (Need.INSIDER, Need.REVOKER),
        seconds=60,
    ),
    Check(
        "insider.resumed-elsewhere",
        "A client resumes a session of one listener at another.",
        "A session opens no other door than the one it was made at.",
        Severity.HIGH,
        ("RFC 8446 4.6.1", "CVE-2014-3616", "CWE-287"),
        _NO_RESUMPTION,
        by_client(_each_way(_elsewhere)),
        (Need.INSIDER, Need.OTHER),
        seconds=60,
    ),
    Check(
        "insider.kept-past-expiry",
        "A client connects with a certificate that has seconds to live, and goes on asking when it is over.",
        "A connection ends with the certificate that opened it.",
        Severity.MEDIUM,
        ("RFC 5280 6.1.3 (a)(2)", "CWE-613"),
        _ENDS,
        by_authority(_kept_past_expiry),
        (Need.AUTHORITY,),
        seconds=60,
    ),
    Check(
        "insider.kept-past-revocation",
        "A client keeps a connection open while its certificate is revoked, and goes on asking.",
        "Revocation ends connections, and does not only refuse new ones.",
        Severity.HIGH,
        ("RFC 5280 6.3", "CWE-613"),
        _ENDS,
        by_client(_kept_past_revocation),
        (Need.INSIDER, Need.REVOKER),
        seconds=60,
    ),
)
