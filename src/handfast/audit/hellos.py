"""ClientHellos of odd shapes: in crumbs, far too large, with GREASE, with two names. They find routers that look no
further than the first bytes, readers without bounds, and servers that choke on what they do not know.
"""

from __future__ import annotations

from handfast.audit.clienthello import GOOD_SUITES_12, GOOD_SUITES_13, Hello, refragmented, say, server_name_list
from handfast.audit.model import (
    Check,
    Evidence,
    Outcome,
    Remedies,
    Severity,
    Verdict,
    failed,
    not_applicable,
    passed,
    unclear,
)
from handfast.audit.oracle import End, worst
from handfast.audit.runner import Audit
from handfast.audit.wires import Silence, Wire

_OVERSIZE = 1 << 20  # bytes; OpenSSL takes 131,396 at most, BoringSSL 16,384
_CLAIMED = (1 << 24) - 1  # the most that a handshake header can claim
_GREASE = 0x1A1A  # RFC 8701 2
_CRUMBS = (1, 7)  # bytes in a record

_UPGRADE = Remedies(
    handfast="upgrade handfast and report it: this must not happen",
    nginx="upgrade nginx and OpenSSL; with ssl_preread, let the default route refuse and not lead to a backend",
    haproxy="upgrade; with req.ssl_sni rules, let the default be a reject and not a backend",
    envoy="upgrade; the tls_inspector must have no fall-through filter chain without TLS",
    apache="upgrade httpd and OpenSSL",
)


def _fragmented(audit: Audit) -> Outcome:
    tries = []
    for size in _CRUMBS:

        def crumbs(wire: Wire, records: bytes, size: int = size) -> None:
            wire.send(refragmented(records, size))

        reply = audit.call(None, flight=crumbs)
        tries.append(
            audit.judge(f"a ClientHello in records of {size} bytes, then a request without a certificate", reply)
        )
    return _and_alive(audit, worst(tries))


def _oversized(audit: Audit) -> Outcome:
    """Claims a message of 16 MB and sends on until the server has had enough."""
    limit = int(_OVERSIZE * audit.pace.load)
    said = f"a ClientHello that claims {_CLAIMED} bytes"
    start = b"\1" + _CLAIMED.to_bytes(3, "big") + Hello(audit.target.sni).message()[4:]
    sent = 0
    with audit.connect() as wire:
        try:
            while sent < limit:
                piece = (start if not sent else b"").ljust(16384, b"\0")
                wire.send(b"\x16\3\1" + len(piece).to_bytes(2, "big") + piece)
                sent += len(piece)
            _, end = wire.read_all(1024, within=1.0)
        except Silence:
            return unclear(
                f"the server stopped reading after {sent} bytes and did not end it", Evidence.of(said, "nothing")
            )
        except OSError:
            end = End.RESET
    evidence = Evidence.of(f"{said}, and {sent} of them", str(end))
    if end in (End.OPEN, End.SILENT):
        return failed(f"the server took in {sent} bytes of one ClientHello and waits for more", evidence)
    return _and_alive(audit, passed(f"the server ended it ({end}) after {sent} bytes at most", evidence))


def _grease(audit: Audit) -> Outcome:
    name = audit.target.sni
    with audit.connect() as wire:
        plain = say(wire, Hello(name))
    if plain.choice is None:
        return not_applicable(f"the server does not take a usual ClientHello either: {plain}")
    greased = Hello(
        name,
        versions=(_GREASE, 0x0304, 0x0303),
        suites=(_GREASE, *GOOD_SUITES_13, *GOOD_SUITES_12),
        groups=(_GREASE, 0x001D, 0x0017, 0x0018),
        extensions=((_GREASE, b""), (0xDADA, b"\0")),
    )
    with audit.connect() as wire:
        answer = say(wire, greased)
    evidence = Evidence.of("a ClientHello with unknown versions, suites, groups and extensions (GREASE)", str(answer))
    if answer.choice is not None:
        return passed("the server passed over what it does not know", evidence)
    return failed("the server refuses a ClientHello with values that it does not know, and takes one without", evidence)


def _server_names(audit: Audit) -> Outcome:
    name = audit.target.name.encode("ascii")
    other = b"other.invalid"
    odd = (
        ("two server_name extensions that differ", (server_name_list(name), server_name_list(other))),
        ("one server_name extension with two names", (server_name_list(name, other),)),
        ("a server name of 300 bytes", (server_name_list(b"a" * 300),)),
        ("a server name with a NUL byte", (server_name_list(name + b"\0.invalid"),)),
        ("a server_name extension cut short", (server_name_list(name)[:-1],)),
    )
    tries = []
    for said, bodies in odd:
        with audit.connect() as wire:
            answer = say(wire, Hello(None, names=bodies))
        evidence = Evidence.of(f"a ClientHello with {said}", str(answer))
        if answer.choice is not None:
            tries.append(failed(f"the server takes {said}", evidence))
        elif answer.refused:
            tries.append(passed("the server refused all of them", evidence))
        else:
            tries.append(unclear(f"the server did not answer {said}", evidence))
    return _and_alive(audit, worst(tries))


def _and_alive(audit: Audit, outcome: Outcome) -> Outcome:
    """The outcome, or a failure if the server does not shake hands any more."""
    if outcome.verdict is Verdict.FAIL or audit.alive():
        return outcome
    return failed("the server does not shake hands any more after it", *outcome.evidence)


CHECKS = (
    Check(
        "outsider.fragmented-hello",
        "A client sends its ClientHello in records of one byte each, then a request without a certificate.",
        "What routes by the first bytes leads nobody past the guard, and the server stays up.",
        Severity.HIGH,
        ("RFC 8446 5.1", "CVE-2026-32305", "CWE-288"),
        _UPGRADE,
        _fragmented,
    ),
    Check(
        "outsider.oversized-hello",
        "A client claims a ClientHello of 16 MB and sends on and on.",
        "The first message is bounded, so that strangers cannot fill the memory.",
        Severity.MEDIUM,
        ("RFC 8446 4", "CWE-770"),
        _UPGRADE,
        _oversized,
    ),
    Check(
        "outsider.grease",
        "A client offers versions, suites, groups and extensions that nobody knows (GREASE), as browsers do.",
        "The server passes over what it does not know, so that new clients are not locked out.",
        Severity.LOW,
        ("RFC 8701", "RFC 8446 9.3"),
        _UPGRADE,
        _grease,
    ),
    Check(
        "outsider.server-names",
        "A client names two servers at once, or one with a NUL byte, cut short or far too long.",
        "Nobody who routes by the server name, and nobody behind them, can read two different names.",
        Severity.MEDIUM,
        ("RFC 6066 3", "RFC 8446 4.2", "CWE-436"),
        _UPGRADE,
        _server_names,
    ),
)
