"""Requests of an accepted client that say something else than its certificate: another host, identity or path.

What an identity header is, is learned from the server: what its application gets that we did not send.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from handfast.audit import http2
from handfast.audit.insider import Inside, by_client, request_to, versions
from handfast.audit.model import (
    Check,
    Evidence,
    Need,
    Outcome,
    Remedies,
    Severity,
    Verdict,
    failed,
    not_applicable,
    passed,
    unclear,
)
from handfast.audit.oracle import REFUSALS, Reach, Reply, reach, worst
from handfast.audit.runner import Audit

NOBODY = "audit.invalid"  # no server has this name (RFC 6761 6.4)
MARK = "audit-spoofed"
NO_HTTP = "the server does not speak HTTP"
NO_HTTP2 = "the server does not speak HTTP/2"
_MOST_HEADERS = 4
# RFC 9440; Envoy; what nginx's, HAProxy's and Apache's documents call them.
_KNOWN = frozenset(
    {
        *("client-cert", "client-cert-chain", "client-identity", "x-forwarded-client-cert", "x-ssl-cert"),
        *("x-client-cert", "x-client-dn", "x-client-cn", "x-client-verify", "ssl-client-cert", "ssl-client-s-dn"),
        *("ssl-client-verify", "remote-user", "x-remote-user", "x-ssl-client-cert", "x-ssl-client-cn"),
        *("x-ssl-client-dn", "x-ssl-client-s-dn", "x-ssl-client-verify", "x-ssl-client-fingerprint"),
        "x-ssl-client-serial",
    }
)
# Other ways to write {path}, which is /{inner}, with {first} its first letter percent-encoded and {rest} the others.
# The same path to whoever follows RFC 3986 6.2.2, or merges slashes: any content for it counts.
_SAME = (
    *("/{path}", "//{path}", "/.{path}", "/audit/..{path}", "/%2e{path}", "/audit/%2e%2e{path}"),
    *("/audit/%2E%2E{path}", "{allowed}/..{path}", "/{first}{rest}", "https://{host}{path}", "http://{host}{path}"),
    *("{path}?audit=1", "{path}?", "{path}#audit"),
)
# The same to some applications alone: content counts where it is not what any unknown path gets.
_LOOSE = (
    *("/%2f{inner}", "/audit%2f..%2f{inner}", "/audit/..%2f{inner}", "/audit/..;{path}", "/;{path}", "/%5c{inner}"),
    *("\\{inner}", "/\\{inner}", "/audit/..\\{inner}", "/audit\\..\\{inner}", "{path};audit", "{path}%3baudit"),
    *("{path}%00", "{path}%00.png", "{path}\0", "{path}%20", "{path}%09", "{path}%25", "{path}%2f", "{path}%23"),
    *("{path}%3f", "{path}/", "{path}//", "{path}/.", "{path}.", "{path}%2e", "/%25{first_hex}{rest}", "/{upper}"),
    *("/{title}", "{inner}"),
)

_HOSTS = Remedies(
    handfast="nothing to do: a request for another host than the server name is answered with 421",
    nginx="if ($ssl_server_name != $host) { return 421; } in every server block, and a default server that refuses",
    haproxy="http-request deny deny_status 421 unless { ssl_fc_sni,lower -m str %[req.hdr(host),field(1,:),lower] }",
    envoy="one filter chain per server name, with virtual hosts of that name alone; no `*` domain",
    apache="SSLStrictSNIVHostCheck on, and SSLVerifyClient the same in every virtual host",
)
_HEADERS = Remedies(
    handfast="nothing to do: every spelling that folds to one of ours is removed before ours is set",
    nginx="proxy_set_header for each of them, underscores_in_headers off, and no application that folds `.` or `_`",
    haproxy="http-request del-header X -m reg for every spelling, before http-request set-header",
    envoy="forward_client_cert_details: SANITIZE_SET, headers_with_underscores_action: REJECT_REQUEST",
    apache="RequestHeader unset NAME early for every spelling, before RequestHeader set; HttpProtocolOptions Strict",
)
_PATHS = Remedies(
    handfast="nothing to do: an ambiguous path is refused; rules that allow are better than rules that deny",
    nginx="proxy_pass without a URI part hands on the raw path: deny by default, allow by location = or ^~",
    haproxy="http-request normalize-uri for path-merge-slashes, path-strip-dotdot, percent-decode-unreserved",
    envoy="normalize_path, merge_slashes, path_with_escaped_slashes_action: REJECT_REQUEST",
    apache="AllowEncodedSlashes Off, MergeSlashes On, and Require in <Location> with all denied above it",
)


# The host.


def _other_host(inside: Inside) -> Outcome:
    audit = inside.audit
    if not inside.http:
        return not_applicable(NO_HTTP)
    if audit.target.sni is None:
        return not_applicable("no server name is asked for, so no Host can differ from it: --sni NAME")
    tries, path = [], audit.target.echo or audit.target.path
    for name in _other_names(audit):
        for said, asked_for, host in (
            (f"Host: {name}", path, name),
            (f"the request target https://{name}{path}", f"https://{name}{path}", None),
        ):
            request = request_to(audit, asked_for, f"X-Audit: {MARK}", "Connection: close", host=host)
            tries.append(_misdirected(inside, f"server name {audit.target.sni}, then {said}", _asked(inside, request)))
    return worst(tries)


def _misdirected(inside: Inside, said: str, reply: Reply) -> Outcome:
    """The outcome of a request for another host. A proxy's own 404 for a host that it does not have is no hole."""
    if reply.status is not None and reply.status not in REFUSALS and inside.audit.target.echo is not None:
        evidence = Evidence.of(said, str(reply))
        if MARK.encode() in reply.data:
            return failed("the application was reached", evidence)
        return passed(f"the server answered with HTTP {reply.status}, and asked no application", evidence)
    if reply.status == 404 and inside.control.status != 404:
        why = "HTTP 404 may be the server's own or the application's; name an echo with --echo"
        return unclear(why, Evidence.of(said, str(reply)))
    return inside.judge(said, reply)


def _other_names(audit: Audit) -> list[str]:
    other = audit.means.other
    names = [NOBODY, other.sni if other is not None and other.sni else NOBODY]
    return [name for name in dict.fromkeys(names) if name != audit.target.sni]


def _asked(inside: Inside, request: bytes) -> Reply:
    return inside.audit.call(inside.client, request=request, tls12=versions(inside.audit)[0])


def _other_authority(inside: Inside) -> Outcome:
    """RFC 9113 9.1.1: a connection may be used for other names; a server that does not want it says 421."""
    audit = inside.audit
    own = audit.target.sni
    if own is None:
        return not_applicable("no server name is asked for, so no :authority can differ from it: --sni NAME")
    path, mark = audit.target.echo or audit.target.path, (b"x-audit", MARK.encode())
    asked = [(f":authority {name}", h2_head(audit, name, path)) for name in (own, *_other_names(audit))]
    asked.append((f":authority {own}, Host: {NOBODY}", [*h2_head(audit, own, path), (b"host", NOBODY.encode())]))
    replies = h2_asked(inside, [([*head, mark], b"") for _, head in asked])
    if replies is None:
        return not_applicable(NO_HTTP2)
    if reach(replies[0], inside.control)[0] is not Reach.YES:
        return unclear(f"a good request over HTTP/2 is not answered ({replies[0]}), so nothing is shown")
    return worst(
        [
            _misdirected(inside, f"server name {own}, then {said}", reply)
            for (said, _), reply in zip(asked[1:], replies[1:], strict=True)
        ]
    )


def h2_head(audit: Audit, authority: str, path: str | None = None, method: str = "GET") -> list[tuple[bytes, bytes]]:
    """The pseudo-headers of a request."""
    fields = {":method": method, ":scheme": "https", ":authority": authority, ":path": path or audit.target.path}
    return [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]


def h2_asked(inside: Inside, requests: list[tuple[list[tuple[bytes, bytes]], bytes]]) -> list[Reply] | None:
    """The good client's requests over one HTTP/2 connection; None where the server does not speak it."""
    audit = inside.audit
    # With HTTP/1.1 beside it, a server that does not speak HTTP/2 chooses that, and ends no handshake.
    offer = audit.offer(inside.client, tls12=versions(audit)[0], alpn=("h2", "http/1.1"))
    with audit.connect() as wire:
        return http2.ask(wire, offer, requests)


# The identity.


@dataclass(frozen=True, slots=True)
class _Spoof:
    """One request that brings an identity of its own. `listed`: it names our header as one of the connection's."""

    said: str
    request: bytes
    header: str
    listed: bool = False


def _spoofed_headers(inside: Inside) -> Outcome:
    audit = inside.audit
    echo = audit.target.echo
    assert echo is not None  # it is needed
    reply = _asked(inside, request_to(audit, echo, "Connection: close"))
    told = echoed(reply)
    if reply.status != 200 or not told:
        return unclear(f"{echo} does not answer with the headers it got", Evidence.of(f"GET {echo}", str(reply)))
    headers = _identity_headers(inside, told)
    if not headers:
        names = ", ".join(dict.fromkeys(name for name, _ in told))
        return not_applicable(f"the application gets no header that tells who the client is (it gets {names})")
    tries = [
        _spoof_judged(spoof, _asked(inside, spoof.request), told)
        for header in headers
        for spoof in _spoofs(audit, echo, header)
    ]
    return _gathered(tries, f"the application's {', '.join(headers)} came from the server alone")


def echoed(reply: Reply) -> list[tuple[str, str]]:
    """The headers that an echo says it got: JSON of them, or lines. Any line end counts, as to the laxest reader."""
    text = reply.data.partition(b"\r\n\r\n")[2].decode("latin-1")
    try:
        data = json.loads(text)
    except ValueError:
        lines = re.split(r"[\r\n]", text)
        return [(name, value.strip()) for name, colon, value in (line.partition(":") for line in lines) if colon]
    if isinstance(data, dict):
        data = data.get("headers", data)
    pairs = data.items() if isinstance(data, dict) else data if isinstance(data, list) else ()
    found = []
    for pair in pairs:
        if isinstance(pair, list | tuple) and len(pair) == 2:
            values = pair[1] if isinstance(pair[1], list) else [pair[1]]
            found += [(str(pair[0]), str(value)) for value in values]
    return found


def _fold(name: str) -> str:
    """A header's name as CGI, WSGI and their like see it: without case, and with one sort of separator."""
    return re.sub(r"[_.\s-]+", "-", name.strip(" \t\v\f\0\x85\xa0").lower())


def _identity_headers(inside: Inside, told: list[tuple[str, str]]) -> list[str]:
    """The headers that tell who the client is, by what is in them or by what they are called."""
    der = inside.client.presented[0]
    serial = f"{inside.client.certificate.serial_number:x}"
    signs = (*inside.names, base64.b64encode(der).decode()[:60], hashlib.sha256(der).hexdigest(), serial)
    found = [
        name
        for name, value in told
        if _fold(name) in _KNOWN
        or any(sign.lower() in value.replace(":", "").lower() or sign in value for sign in signs)
    ]
    return list(dict.fromkeys(found))[:_MOST_HEADERS]


def _spoofs(audit: Audit, echo: str, header: str) -> Iterator[_Spoof]:
    lower = header.lower()
    spellings = (header, lower, header.upper(), lower.replace("-", "_"), header.replace("-", "_", 1))
    dotted = (lower.replace("-", "."), header.replace("-", "_").upper(), f"{lower[:-1]}{lower[-1].upper()}")
    for name in dict.fromkeys((*spellings, *dotted)):
        yield _Spoof(name, request_to(audit, echo, f"{name}: {MARK}", "Connection: close"), header)
    for said, line in (
        ("twice", f"{header}: {MARK}\r\n{header}: {MARK}"),
        ("a space before the colon", f"{header} : {MARK}"),
        ("a tab before the colon", f"{header}\t: {MARK}"),
        ("a NUL before the colon", f"{header}\0: {MARK}"),
        ("a space in front", f" {header}: {MARK}"),
        ("a vertical tab in front", f"\v{header}: {MARK}"),
        ("a folded line", f"X-Audit: a\r\n {header}: {MARK}"),
        ("a folded value", f"{header}:\r\n {MARK}"),
        ("behind a bare LF", f"X-Audit: a\n{header}: {MARK}"),
        ("behind a bare CR", f"X-Audit: a\r{header}: {MARK}"),
    ):
        yield _Spoof(f"{header}, {said}", request_to(audit, echo, line, "Connection: close"), header)
    trailer = f"0\r\n{header}: {MARK}\r\n\r\n"
    lines = ("Transfer-Encoding: chunked", f"Trailer: {header}", "Connection: close")
    yield _Spoof(f"{header} in a trailer", request_to(audit, echo, *lines, body=trailer), header)
    for listed in (f"close, {header}", f"{lower}, close"):
        request = request_to(audit, echo, f"Connection: {listed}")
        yield _Spoof(f"Connection: {listed}", request, header, listed=True)
        both = request_to(audit, echo, f"{header}: {MARK}", f"Connection: {listed}")
        yield _Spoof(f"{header} and Connection: {listed}", both, header, listed=True)


def _spoof_judged(spoof: _Spoof, reply: Reply, usual: list[tuple[str, str]]) -> Outcome:
    evidence = Evidence.of(spoof.said, str(reply))
    if reply.status is None or reply.status in REFUSALS:
        if reply.data or reply.end.value in ("closed", "alert", "reset"):
            return passed("refused", evidence)
        return unclear("the server neither answered nor ended the connection", evidence)
    told = echoed(reply)
    if reply.status != 200 or not told:
        return unclear(f"the server answered with HTTP {reply.status}, and no headers", evidence)
    folded = _fold(spoof.header)
    for name, value in told:
        if MARK in value and _fold(name) == folded:
            return failed(
                "an identity of our own making reaches the application", Evidence.of(spoof.said, f"{name}: {value}")
            )
    ours = {value for name, value in usual if _fold(name) == folded}
    if spoof.listed and not ours & {value for name, value in told if _fold(name) == folded}:
        return failed("the client can take away the header that tells who it is", evidence)
    return passed("removed", evidence)


def _gathered(tries: list[Outcome], why: str) -> Outcome:
    """The worst of many tries; where all passed, in one sentence."""
    outcome = worst(tries)
    return passed(why, *outcome.evidence) if outcome.verdict is Verdict.PASS else outcome


# The path.


def _paths(inside: Inside) -> Outcome:
    audit = inside.audit
    protected = audit.target.protected
    assert protected is not None  # it is needed
    if not inside.http:
        return not_applicable(NO_HTTP)
    plain = _path_asked(inside, protected)
    if _given(plain):
        return failed(f"{protected} is not protected at all", Evidence.of(f"GET {protected}", str(plain)))
    nowhere = "/audit-no-such-path"
    unknown = _without(_path_asked(inside, nowhere), nowhere)
    tries = []
    for same, path in _spellings(protected, audit):
        reply = _path_asked(inside, path)
        evidence = Evidence.of(f"GET {path}", str(reply))
        if _given(reply) and (same or _without(reply, path) != unknown):
            tries.append(failed("the protected path was answered under another spelling", evidence))
        else:
            tries.append(_not_given(reply, evidence))
    tries += _methods(inside, protected)
    tries += _overrides(inside, protected)
    return _gathered(tries, f"{protected} was refused in every spelling")


def _path_asked(inside: Inside, path: str, *headers: str, method: str = "GET") -> Reply:
    request = request_to(inside.audit, path, *headers, "Connection: close")
    return _asked(inside, request.replace(b"GET ", method.encode() + b" ", 1))


def _given(reply: Reply) -> bool:
    return reply.status is not None and 200 <= reply.status < 300


def _not_given(reply: Reply, evidence: Evidence) -> Outcome:
    if reply.status is not None and reply.status >= 500:
        return unclear(f"the server answered with HTTP {reply.status}", evidence)
    if reply.data or reply.end.value in ("closed", "alert", "reset"):
        return passed("not given", evidence)
    return unclear("the server neither answered nor ended the connection", evidence)


def _without(reply: Reply, *texts: str) -> tuple[int | None, bytes]:
    """Status and body, without what a request said of itself: echoes of it are no difference."""
    body = reply.data.partition(b"\r\n\r\n")[2]
    for text in texts:
        body = body.replace(text.encode("latin-1"), b"")
    return reply.status, body


def _spellings(path: str, audit: Audit) -> Iterator[tuple[bool, str]]:
    """Other ways to write a path, and whether each means the same to everybody."""
    inner, code = path[1:], f"{ord(path[1:2] or '/'):02x}"
    words = {"path": path, "inner": inner, "first": f"%{code}", "first_hex": code, "rest": path[2:]}
    words |= {"upper": inner.upper(), "title": inner.title(), "allowed": audit.target.path.rstrip("/")}
    words["host"] = audit.target.sni or str(audit.target)
    for same, templates in ((True, _SAME), (False, _LOOSE)):
        for template in templates:
            written = template.format_map(words)
            if written != path:
                yield same, written


def _methods(inside: Inside, protected: str) -> list[Outcome]:
    override = "X-HTTP-Method-Override: GET"
    tries = []
    for method, headers in (("HEAD", ()), ("get", ()), ("POST", ("Content-Length: 0", override))):
        reply = _path_asked(inside, protected, *headers, method=method)
        evidence = Evidence.of("; ".join((f"{method} {protected}", *headers)), str(reply))
        given = failed("the protected path was answered to another method", evidence)
        tries.append(given if _given(reply) else _not_given(reply, evidence))
    return tries


def _overrides(inside: Inside, protected: str) -> list[Outcome]:
    """Headers by which some applications take another path than the request line's."""
    path = inside.audit.target.path
    names = ("X-Original-URL", "X-Rewrite-URL", "X-Override-URL", "X-Forwarded-Uri")
    usual = [_without(_path_asked(inside, path)) for _ in range(2)]
    if usual[0] != usual[1]:
        return [unclear(f"{path} gets another answer each time, so that an overridden one cannot be told")]
    tries = []
    for name in names:
        reply = _path_asked(inside, path, f"{name}: {protected}")
        evidence = Evidence.of(f"GET {path}; {name}: {protected}", str(reply))
        lines = [line for line in reply.data.splitlines(True) if name.lower().encode() not in line.lower()]
        shown = reply.status, b"".join(lines).partition(b"\r\n\r\n")[2]
        other = _given(reply) and shown != usual[0] and _without(reply) != usual[0]
        tries.append(failed(f"{name} changes what is asked for", evidence) if other else _not_given(reply, evidence))
    return tries


def _check(
    name: str, attack: str, proves: str, severity: Severity, references: tuple[str, ...], remedies: Remedies,
    run: Callable[[Inside], Outcome], *needs: Need,
) -> Check:  # fmt: skip
    found = by_client(run)
    return Check(
        f"insider.{name}", attack, proves, severity, references, remedies, found, (Need.INSIDER, *needs), seconds=120
    )


CHECKS = (
    _check(
        "other-host",
        "An accepted client connects by one server name and asks for another host.",
        "What was decided for one server name does not open another.",
        Severity.MEDIUM,
        ("RFC 9110 7.4", "RFC 9110 15.5.20", "CVE-2018-11759", "CWE-290"),
        _HOSTS,
        _other_host,
    ),
    _check(
        "other-authority",
        "An accepted client uses its HTTP/2 connection for another :authority.",
        "A connection is not coalesced across hosts that ask for different clients.",
        Severity.MEDIUM,
        ("RFC 9113 9.1.1", "RFC 9110 15.5.20", "CWE-290"),
        _HOSTS,
        _other_authority,
    ),
    _check(
        "spoofed-headers",
        "An accepted client sends the header that names the client itself, in every spelling that applications fold.",
        "The application can believe what it is told of the client.",
        Severity.CRITICAL,
        ("RFC 9440 4", "CVE-2022-31813", "CVE-2023-25690", "CWE-290"),
        _HEADERS,
        _spoofed_headers,
        Need.ECHO,
    ),
    _check(
        "path-confusion",
        "An accepted client writes a path that it must not reach in every other way.",
        "Rules about paths see the path that the application sees.",
        Severity.HIGH,
        ("RFC 3986 6.2.2", "CVE-2021-41773", "CVE-2021-32777", "CWE-22", "CWE-863"),
        _PATHS,
        _paths,
        Need.PROTECTED,
    ),
)  # fmt: skip
