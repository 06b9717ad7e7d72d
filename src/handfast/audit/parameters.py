"""Old versions, weak suites and groups, compression, renegotiation: what a server agrees to before anybody is known.

Most of it is asked with a ClientHello that offers the weak thing alone: a ServerHello is then the finding.
"""

from __future__ import annotations

from dataclasses import replace

from handfast.audit.clienthello import (
    GOOD_SUITES_12,
    RENEGOTIATION_INFO,
    SERVER_KEY_EXCHANGE,
    TLS10,
    TLS11,
    TLS12,
    Answer,
    Hello,
    say,
)
from handfast.audit.model import (
    Check,
    Evidence,
    Outcome,
    Remedies,
    Severity,
    failed,
    not_applicable,
    passed,
    unclear,
)
from handfast.audit.oracle import End, worst
from handfast.audit.runner import Audit
from handfast.audit.wires import Silence, shake_hands
from handfast.tls.probe import Probe, ProbeRefused

# Suites by IANA's numbers, of TLS 1.2 and before; all that OpenSSL, NSS or SChannel ever spoke of each kind.
WEAK_SUITES = {
    "NULL (no encryption)": (0x0001, 0x0002, 0x003B, 0xC001, 0xC006, 0xC00B, 0xC010, 0xC015),
    "EXPORT (40 bits)": (0x0003, 0x0006, 0x0008, 0x000B, 0x000E, 0x0011, 0x0014, 0x0017, 0x0019, 0x0062, 0x0064),
    "anonymous (no server certificate)": (
        *(0x0018, 0x001B, 0x0034, 0x003A, 0x006C, 0x006D, 0x00A6, 0x00A7),
        *(0xC016, 0xC017, 0xC018, 0xC019),
    ),
    "RC4": (0x0004, 0x0005, 0xC002, 0xC007, 0xC00C, 0xC011),
    "DES": (0x0009, 0x000C, 0x000F, 0x0012, 0x0015, 0x001A),
    "3DES": (0x000A, 0x000D, 0x0010, 0x0013, 0x0016, 0xC003, 0xC008, 0xC00D, 0xC012),
}
# Curves under 112 bits of strength (NIST SP 800-57 part 1, table 2).
_WEAK_GROUPS = (0x0001, 0x0002, 0x0003, 0x0004, 0x0005, 0x000F, 0x0010, 0x0011, 0x0012, 0x0013)
_CERTIFICATE_CURVES = (0x0017, 0x0018, 0x0019)
_ECDHE_SUITES = (*GOOD_SUITES_12, 0xC009, 0xC00A, 0xC013, 0xC014)
_DHE_SUITES = (0x009E, 0x009F, 0x0033, 0x0039, 0x0067, 0x006B)
_OLD_SUITES = (*GOOD_SUITES_12, 0xC009, 0xC00A, 0xC013, 0xC014, 0x002F, 0x0035, 0x000A, 0x0005)
_LEAST_DH = 2048  # bits, NIST SP 800-52r2 3.3.1
_DEFLATE = 1
_NAMED_CURVE = 3

_CIPHERS = Remedies(
    handfast="nothing to do: TLS 1.3, and with --tls12 only ECDHE with AES-GCM or ChaCha20",
    nginx="ssl_protocols TLSv1.2 TLSv1.3; ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;",
    haproxy="ssl-default-bind-options ssl-min-ver TLSv1.2; ssl-default-bind-ciphers ECDHE+AESGCM:ECDHE+CHACHA20",
    envoy="tls_params: tls_minimum_protocol_version: TLSv1_2, and leave cipher_suites at its default",
    apache="SSLProtocol -all +TLSv1.2 +TLSv1.3; SSLCipherSuite ECDHE+AESGCM:ECDHE+CHACHA20",
)


def _old_versions(audit: Audit) -> Outcome:
    tries = []
    for version, name in ((0x0300, "SSL 3.0"), (TLS10, "TLS 1.0"), (TLS11, "TLS 1.1")):
        hello = _hello(audit, legacy_version=version, suites=_OLD_SUITES)
        tries.append(_not_chosen(audit, hello, f"a ClientHello for {name} at most", f"the server speaks {name}"))
    return worst(tries)


def _weak_suites(audit: Audit) -> Outcome:
    return worst(
        [
            _not_chosen(
                audit,
                _hello(audit, suites=suites),
                f"a ClientHello with {kind} suites alone",
                f"the server takes {kind}",
            )
            for kind, suites in WEAK_SUITES.items()
        ]
    )


def _weak_groups(audit: Audit) -> Outcome:
    return worst([_weak_curves(audit, ()), _weak_curves(audit, _CERTIFICATE_CURVES), _weak_prime(audit)])


def _weak_curves(audit: Audit, others: tuple[int, ...]) -> Outcome:
    """Weak curves alone, or before `others`: without its certificate's curve a server can use no ECDSA certificate."""
    said = "a ClientHello with curves under 224 bits " + ("first" if others else "alone")
    answer = _ask(audit, _hello(audit, groups=(*_WEAK_GROUPS, *others), suites=_ECDHE_SUITES))
    curve = _curve(answer)
    if curve is None:
        return _refusal(answer, said, None)
    evidence = Evidence.of(said, f"{answer}; curve {curve:#06x}")
    if curve in _WEAK_GROUPS:
        return failed(f"the server takes a weak curve ({curve:#06x})", evidence)
    return passed("the server took none of the weak curves", evidence)


def _weak_prime(audit: Audit) -> Outcome:
    said = "a ClientHello with finite-field Diffie-Hellman alone"
    answer = _ask(audit, _hello(audit, suites=_DHE_SUITES))
    bits = _dh_bits(answer)
    if bits is None:
        return _refusal(answer, said, None)
    evidence = Evidence.of(said, f"{answer}; {bits} bits")
    if bits < _LEAST_DH:
        return failed(f"the server uses Diffie-Hellman of {bits} bits", evidence)
    return passed(f"Diffie-Hellman has {bits} bits", evidence)


def _compression(audit: Audit) -> Outcome:
    said = "a ClientHello that offers DEFLATE before no compression"
    hello = _hello(audit, suites=_OLD_SUITES, compression=bytes((_DEFLATE, 0)))
    answer = _ask(audit, hello)
    evidence = Evidence.of(said, str(answer))
    if answer.choice is None:
        return _refusal(answer, said, not_applicable("the server speaks no version that can compress", evidence))
    if answer.choice.compression:
        return failed(f"the server compresses (method {answer.choice.compression})", evidence)
    return passed("the server chose no compression", evidence)


def _renegotiation(audit: Audit) -> Outcome:
    if not audit.look.tls12:
        return not_applicable("the server speaks TLS 1.3 alone, which has no renegotiation")
    answer = _ask(audit, _hello(audit))
    if answer.choice is not None and RENEGOTIATION_INFO not in answer.choice.extensions:
        evidence = Evidence.of("a ClientHello with renegotiation_info", f"{answer}, without renegotiation_info")
        return failed("the server does not know secure renegotiation (RFC 5746)", evidence)
    with audit.connect() as wire:
        probe = Probe(audit.offer(audit.means.credential, tls12=True))
        try:
            shake_hands(wire, probe)
        except ProbeRefused as refused:
            return not_applicable(f"no TLS 1.2 handshake can be had to renegotiate: {refused}; give --cert")
        evidence = Evidence.of("a ClientHello inside a TLS 1.2 connection", "")
        try:
            probe.renegotiate()
            wire.send(probe.take())
            while not probe.renegotiated:
                records = wire.receive()
                if not records:
                    break
                probe.again(records)
                wire.send(probe.take())
        except ProbeRefused as refused:
            return passed("the server refused it", replace(evidence, received=str(refused)))
        except Silence:
            return passed("the server did not answer it", replace(evidence, received="nothing"))
        except OSError:
            return passed("the server ended the connection", replace(evidence, received="a reset"))
        if probe.renegotiated:
            return failed(
                "the server renegotiated at a client's wish", replace(evidence, received="a second handshake")
            )
        return passed("the server ended the connection", replace(evidence, received="the connection was closed"))


def _hello(
    audit: Audit,
    *,
    legacy_version: int = TLS12,
    suites: tuple[int, ...] = GOOD_SUITES_12,
    groups: tuple[int, ...] = (0x0017, 0x0018, 0x001D),
    compression: bytes = b"\0",
) -> Hello:
    """A ClientHello as before TLS 1.3."""
    return Hello(audit.target.sni, legacy_version, (), suites, groups, compression)


def _ask(audit: Audit, hello: Hello) -> Answer:
    with audit.connect() as wire:
        return say(wire, hello)


def _not_chosen(audit: Audit, hello: Hello, said: str, hole: str) -> Outcome:
    answer = _ask(audit, hello)
    if answer.choice is None or answer.choice.suite not in hello.suites or answer.choice.version > hello.legacy_version:
        return _refusal(answer, said, None)
    return failed(hole, Evidence.of(said, str(answer)))


def _refusal(answer: Answer, said: str, instead: Outcome | None) -> Outcome:
    """A pass where the server refused; `instead`, if given, where that says nothing of the attack."""
    evidence = Evidence.of(said, str(answer))
    if answer.refused:
        return instead or passed(f"the server refused: {answer}", evidence)
    if answer.end is End.SILENT:
        return unclear("the server did not answer", evidence)
    return unclear("the answer is not one to the question", evidence)


def _curve(answer: Answer) -> int | None:
    """The named curve in a ServerKeyExchange for ECDHE (RFC 8422 5.4)."""
    if answer.choice is None or answer.choice.suite not in _ECDHE_SUITES:
        return None
    body = next((body for kind, body in answer.messages if kind == SERVER_KEY_EXCHANGE), b"")
    return int.from_bytes(body[1:3], "big") if len(body) > 3 and body[0] == _NAMED_CURVE else None


def _dh_bits(answer: Answer) -> int | None:
    """The length of the prime in a ServerKeyExchange for DHE (RFC 5246 7.4.3)."""
    if answer.choice is None or answer.choice.suite not in _DHE_SUITES:
        return None
    body = next((body for kind, body in answer.messages if kind == SERVER_KEY_EXCHANGE), b"")
    length = int.from_bytes(body[:2], "big")
    return int.from_bytes(body[2 : 2 + length], "big").bit_length() if len(body) > 2 + length else None


CHECKS = (
    Check(
        "outsider.old-versions",
        "A client offers SSL 3.0, TLS 1.0 or TLS 1.1 and nothing newer.",
        "No version is spoken whose handshake is protected by MD5 and SHA-1.",
        Severity.MEDIUM,
        ("RFC 8996", "CVE-2014-3566", "CWE-327"),
        _CIPHERS,
        _old_versions,
    ),
    Check(
        "outsider.weak-suites",
        "A client offers only suites that are broken: NULL, EXPORT, anonymous, RC4, DES, 3DES.",
        "No connection can be had that others can read or change.",
        Severity.HIGH,
        ("RFC 9325 4.1", "RFC 7465", "CVE-2015-0204", "CVE-2016-2183", "CWE-327"),
        _CIPHERS,
        _weak_suites,
        seconds=40,
    ),
    Check(
        "outsider.weak-groups",
        "A client offers only curves under 224 bits, or takes whatever Diffie-Hellman prime the server has.",
        "The key exchange cannot be solved (Logjam).",
        Severity.MEDIUM,
        ("RFC 9325 4.2", "CVE-2015-4000", "CWE-326"),
        _CIPHERS,
        _weak_groups,
    ),
    Check(
        "outsider.compression",
        "A client offers TLS compression.",
        "The length of what is encrypted does not give secrets away (CRIME).",
        Severity.MEDIUM,
        ("RFC 9325 3.3", "CVE-2012-4929"),
        _CIPHERS,
        _compression,
    ),
    Check(
        "outsider.renegotiation",
        "A TLS 1.2 client asks for a second handshake on its connection.",
        "Nobody can make the server work for handshakes on one connection, nor splice two connections into one.",
        Severity.MEDIUM,
        ("RFC 5746", "RFC 9325 3.5", "CVE-2009-3555", "CVE-2011-1473"),
        Remedies(
            handfast="nothing to do: renegotiation is off",
            nginx="nothing to do since 1.15.4; older ones: upgrade",
            haproxy="nothing to do: it is refused; upgrade releases before 1.5",
            envoy="nothing to do: BoringSSL refuses it",
            apache="SSLInsecureRenegotiation off, and no SSLVerifyClient inside <Location> (it renegotiates)",
        ),
        _renegotiation,
    ),
)
