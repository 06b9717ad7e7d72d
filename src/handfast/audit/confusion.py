"""Which protocol is it? Plaintext where TLS belongs: alone, before the handshake, or dressed as a PROXY header."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from handfast.audit.clienthello import Hello, parse_answer, protocol_names, read_answer, say
from handfast.audit.model import Check, Evidence, Outcome, Remedies, Severity, failed, not_applicable, passed, unclear
from handfast.audit.oracle import End, Reach, Reply, reach, worst
from handfast.audit.runner import Audit
from handfast.audit.wires import Silence, Wire, shake_hands
from handfast.tls.probe import Probe, ProbeRefused

_PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"  # PROXY protocol 2.2
_LOOPBACK_4 = bytes((127, 0, 0, 1, 127, 0, 0, 1)) + (40_000).to_bytes(2, "big") + (443).to_bytes(2, "big")

_PLAIN = Remedies(
    handfast="nothing to do: the port speaks TLS alone",
    nginx="listen 443 ssl; on its own, with no plain listener on the same port",
    haproxy="every bind line with `ssl crt F`; no tcp-request rule that sends what is not TLS to a backend",
    envoy="a transport_socket of TLS on every filter chain, and no default_filter_chain without one",
    apache="SSLEngine on, not `optional`; no Listen of the port without https",
)


def _plaintext(audit: Audit) -> Outcome:
    upgrade = audit.request_for(audit.target.path, "Upgrade: TLS/1.0").replace(
        b"Connection: close", b"Connection: Upgrade"
    )
    tries = [
        _sends(audit, "a request in plaintext", audit.request),
        _sends(audit, "a request in plaintext, then the end of sending", audit.request, Wire.half_close),
        _sends(audit, "a request to change to TLS (RFC 2817)", upgrade),
        _sends(audit, "STARTTLS, as for SMTP", b"EHLO audit.invalid\r\nSTARTTLS\r\n"),
        _sends(audit, "STARTTLS, as for IMAP", b"a1 STARTTLS\r\n"),
        _sends(audit, "SSLRequest, as for PostgreSQL", b"\0\0\0\x08\x04\xd2\x16\x2f"),
    ]
    return worst(tries)


def _sends(audit: Audit, said: str, data: bytes, then: Callable[[Wire], None] | None = None) -> Outcome:
    """Send plain bytes and judge the plain answer. A server that answers with a TLS alert has refused."""
    with audit.connect() as wire:
        with suppress(Silence, OSError):  # ended already; what it said may be there
            wire.send(data)
            if then is not None:
                then(wire)
        got, end = wire.read_all(within=audit.pace.answer)
    answer = parse_answer(got, end)
    if answer.alert:
        return audit.judge(said, Reply(False, b"", End.ALERT, answer.alert))
    if end is End.SILENT and audit.baseline is None:
        # A TLS server may wait for the rest of what it takes for a record; there was nothing to be had in that time.
        return passed("the server gave nothing in plaintext", Evidence.of(said, "nothing"))
    reply = Reply(False, got, end)
    if end is End.SILENT and reach(reply, audit.baseline)[0] is Reach.UNKNOWN:
        return passed("the server gave nothing in plaintext", Evidence.of(said, "nothing"))
    return audit.judge(said, reply)


def _before(audit: Audit) -> Outcome:
    """Plaintext and a ClientHello in one piece: neither may be taken, and surely not the second after the first."""
    tries = []
    for said, prefix in (
        ("a plaintext request and a ClientHello in one piece", audit.request),
        ("a line of plaintext and a ClientHello in one piece", b"NOOP\r\n"),
        ("STARTTLS and a ClientHello in one piece", b"STARTTLS\r\n"),
    ):
        tries.append(_prefixed(audit, said, prefix, "the server took plaintext and then shook hands"))
    return worst(tries)


def _proxy_header(audit: Audit) -> Outcome:
    tries = []
    for said, header in (
        ("a PROXY header of version 1 that says 127.0.0.1", b"PROXY TCP4 127.0.0.1 127.0.0.1 40000 443\r\n"),
        ("a PROXY header of version 2 that says 127.0.0.1", _PROXY_V2 + b"\x21\x11\0\x0c" + _LOOPBACK_4),
    ):
        hole = "the server takes a PROXY header from us: a client's address can be made up"
        tries.append(_prefixed(audit, f"{said}, then a ClientHello", header, hole))
    return worst(tries)


def _other_protocol(audit: Audit) -> Outcome:
    known = ("http/1.1", "h2", "postgresql")
    probe = Probe(audit.offer(tls12=not audit.look.tls13, alpn=known))
    with audit.connect() as wire, suppress(ProbeRefused):
        shake_hands(wire, probe)
    if probe.alpn not in known:
        return not_applicable(f"the server agrees on none of {', '.join(known)} (ALPN), and so has none to insist on")
    with audit.connect() as wire:
        answer = say(wire, Hello(audit.target.sni, extensions=(protocol_names(b"ftp"),)))
    evidence = Evidence.of("a ClientHello of a client that speaks ftp and nothing else (ALPN)", str(answer))
    if answer.choice is not None:
        return failed(f"the server speaks {probe.alpn}, and takes a client that speaks only ftp", evidence)
    if answer.refused:
        return passed("the server refused the client", evidence)
    return unclear("the server did not answer", evidence)


def _prefixed(audit: Audit, said: str, prefix: bytes, hole: str) -> Outcome:
    with audit.connect() as wire:
        with suppress(Silence, OSError):
            wire.send(prefix + Hello(audit.target.sni).records())
        answer = read_answer(wire)
    evidence = Evidence.of(said, str(answer))
    if answer.choice is not None:
        return failed(hole, evidence)
    if answer.alert or not answer.raw:
        if answer.end is End.SILENT:
            return unclear("the server did not answer", evidence)
        return passed("the server refused it", evidence)
    return audit.judge(said, Reply(False, answer.raw, answer.end))


CHECKS = (
    Check(
        "outsider.plaintext",
        "A client speaks plaintext to the TLS port: HTTP, an upgrade, STARTTLS.",
        "There is no way to the application that goes around TLS.",
        Severity.CRITICAL,
        ("RFC 9110 7.8", "RFC 3207", "CVE-2023-40217", "CWE-319"),
        _PLAIN,
        _plaintext,
        seconds=60,
        tls=False,
    ),
    Check(
        "outsider.plaintext-first",
        "A client sends plaintext and a ClientHello in one piece, so that the first is taken for part of the second.",
        "Nothing that came before the handshake counts as if it had come over it.",
        Severity.HIGH,
        ("CVE-2011-0411", "CVE-2023-40217", "CVE-2021-38371", "CWE-74"),
        _PLAIN,
        _before,
    ),
    Check(
        "outsider.proxy-header",
        "A client begins with a PROXY header that says it comes from another address.",
        "Only balancers that are trusted may say where a client comes from.",
        Severity.MEDIUM,
        ("https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt 1", "CWE-290", "CWE-348"),
        Remedies(
            handfast="take PROXY headers only from your balancers' addresses",
            nginx="no `proxy_protocol` on a listener that clients reach; set_real_ip_from with the balancers alone",
            haproxy="`accept-proxy` only where none but balancers can connect, or tcp-request connection expect-proxy "
            "layer4 if { src BALANCERS }",
            envoy="no proxy_protocol listener filter where clients connect",
            apache="RemoteIPProxyProtocol off, or RemoteIPProxyProtocolExceptions for all but the balancers",
        ),
        _proxy_header,
    ),
    Check(
        "outsider.other-protocol",
        "A client says that it speaks FTP and nothing else, as one whose connection is led to the wrong server.",
        "A connection that was meant for a server of another protocol ends before this one reads a byte (ALPACA).",
        Severity.MEDIUM,
        ("RFC 7301 3.2", "RFC 9325 3.8", "CWE-940"),
        Remedies(
            handfast="upgrade handfast and report it: this must not happen",
            nginx="upgrade: nginx refuses what it does not speak since 1.21.4",
            haproxy="http-request reject if !{ ssl_fc_alpn -m found }; that also refuses clients that name none",
            envoy="a tls_inspector, application_protocols in each filter_chain_match, and no default_filter_chain",
            apache="let Protocols name what is served, and upgrade",
        ),
        _other_protocol,
    ),
)
