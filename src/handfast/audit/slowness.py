"""Clients that do not get on with their handshake: one that says nothing, and one that says a byte now and then."""

from __future__ import annotations

import time

from handfast.audit.clienthello import Hello
from handfast.audit.model import Check, Evidence, Outcome, Remedies, Severity, failed, passed, unclear
from handfast.audit.runner import Audit
from handfast.audit.wires import Silence

_CRUMBS = 60  # a ClientHello has more bytes than this, so it is never whole

_TIMEOUTS = Remedies(
    handfast="nothing to do: a handshake has 10 s",
    nginx="client_header_timeout 10s; (it bounds the handshake as well; 60 s unless set)",
    haproxy="timeout client-hs 10s, where the release has it; timeout client 10s counts from the last byte",
    envoy="transport_socket_connect_timeout: 10s on every filter chain (none unless set)",
    apache="RequestReadTimeout handshake=5-10 (mod_reqtimeout; off unless set)",
)


def _silent(audit: Audit) -> Outcome:
    return _endured(audit, "a TCP connection and nothing on it", b"")


def _trickling(audit: Audit) -> Outcome:
    crumbs = Hello(audit.target.sni).records()
    return _endured(audit, f"one byte of a ClientHello every {audit.pace.limit / _CRUMBS:.2g} s", crumbs)


def _endured(audit: Audit, said: str, data: bytes) -> Outcome:
    """How long the server keeps a connection over which `data` comes byte by byte."""
    pace, at = audit.pace, 0
    step = pace.limit / _CRUMBS
    wait = min(pace.patience, pace.limit)
    with audit.connect(wait) as wire:
        began = time.monotonic()
        try:
            while wire.left > 0:
                wire.send(data[at : at + 1])
                at = min(at + 1, len(data) - 1) if data else 0
                try:
                    ended = not wire.receive(step if data else None)
                except Silence:
                    continue
                if ended:
                    break
            else:
                kept = time.monotonic() - began
                evidence = Evidence.of(said, f"still open after {kept:.1f} s")
                if wait >= pace.limit:
                    return failed(f"the server had not ended it after {pace.limit:g} s", evidence)
                return unclear(f"not ended after {wait:g} s; {pace.limit:g} s are allowed", evidence)
        except OSError:
            pass
        kept = time.monotonic() - began
    return passed(f"the server ended it after {kept:.1f} s", Evidence.of(said, f"ended after {kept:.1f} s"))


CHECKS = (
    Check(
        "outsider.silent-client",
        "A client connects and says nothing, to hold a place for as long as it can.",
        "A place is given up in the time that is allowed, so that strangers cannot fill the server cheaply.",
        Severity.MEDIUM,
        ("CWE-400", "CWE-772"),
        _TIMEOUTS,
        _silent,
        seconds=150,
    ),
    Check(
        "outsider.trickling-client",
        "A client sends its ClientHello a byte at a time, so that there is always something new (Slowloris).",
        "The time for a handshake is counted from its beginning and not from the last byte.",
        Severity.MEDIUM,
        ("CVE-2007-6750", "CWE-400"),
        _TIMEOUTS,
        _trickling,
        seconds=150,
    ),
)
