"""Rows E1 to E12: what tells the app who called is the guard's word alone, once, and whole."""

from __future__ import annotations

import re
import socket
from functools import cache
from ipaddress import ip_network
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from handfast.guard.routes import Identify
from handfast.tls.server import ClientAuth
from handfast.wire.forwarding import HeaderStyle, facts_of, identity_headers
from handfast.wire.identity import IDENTITY_HEADERS, IDENTITY_PREFIXES, fold
from handfast.wire.proxy import Address, Endpoints, proxy_v2
from tests.attacks.kit import Attacker, Vhost, hear, one, port_of, serve_sites, untouched
from tests.support.apps import App, echo_head, get
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.waiting import PATIENCE, until

# As they are spelled by who emits or believes them.
SPOOFED = (
    *("Client-Cert", "Client-Cert-Chain", "Client-Identity", "X-Forwarded-Client-Cert", "X-SSL-Client-Verify"),
    *("X-SSL-Client-S-DN", "X-SSL-Client-CN", "X-SSL-Client-SHA1", "X-SSL-Client-Cert", "SSL_CLIENT_CERT"),
    *("SSL_CLIENT_VERIFY", "SSL_CLIENT_S_DN", "Ssl-Client-Subject-Dn", "X-Forwarded-Tls-Client-Cert"),
    *("X-Forwarded-Tls-Client-Cert-Info", "l5d-client-id", "Remote-User", "X-Remote-User", "X-Remote-Group"),
    *("X-Remote-Extra-Scopes", "X-Client-Cert", "X-Client-Verify", "X-Client-DN", "X-ARR-ClientCert"),
    *("Cf-Client-Cert-Der-Base64", "Cf-Access-Jwt-Assertion", "Cf-Access-Authenticated-User-Email"),
    *("X-Amzn-Mtls-Clientcert", "X-Amzn-Oidc-Identity", "X-Goog-Authenticated-User-Email", "Teleport-Jwt-Assertion"),
    *("X-Auth-Request-User", "X-Forwarded-User", "X-Forwarded-Email", "X-WEBAUTH-USER", "X-Consumer-Username"),
    *("X-Pomerium-Jwt-Assertion", "X-authentik-username", "Tailscale-User-Login", "Handfast-Assertion"),
    *("X-Spiffe-Id", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Forwarded", "X-Real-IP"),
)
STYLES = tuple(HeaderStyle)
_OURS = {"xforwardedfor", "xforwardedproto", "clientcert", "clientidentity"}


def _fields(body: bytes) -> dict[str, list[str]]:
    """The headers that the app saw, by folded name."""
    found: dict[str, list[str]] = {}
    for line in body.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(": ")
        found.setdefault(fold(name.encode("latin-1")).decode(), []).append(value)
    return found


def _styled(*styles: HeaderStyle) -> Identify:
    return lambda peer, now: identity_headers(styles, None if peer is None else facts_of(peer))


def _case(name: str, joint: str) -> str:
    return re.sub("[-_]", joint, name)


@pytest.mark.parametrize("anonymous", [False, True])
@pytest.mark.parametrize("joint", ["-", "_", ".", "", "~", "--", "-_"])
def test_e1_e2_e3_no_spelling_of_an_identity_passes(attacker: Attacker, ca: Ca, joint: str, anonymous: bool) -> None:
    """E1, E2, E3: no header that an app may read as who the caller is gets through, with any joint between its words,
    in any case, with a certificate and without one."""
    spoofed = [f"{_case(name, joint)}: spoofed" for name in SPOOFED]
    spoofed += [f"{_case(name, joint).upper()}: spoofed" for name in SPOOFED[:10]]
    with App(echo_head) as app, Running(ca, app.address) as guard:
        serve_sites(guard, Vhost(app, client_auth=ClientAuth.OPTIONAL, nameless=True))
        heard = attacker.call(
            guard, None if anonymous else ca.client(), get("/", "localhost", *spoofed, "X-Mine: kept")
        )
    assert heard.status == 200
    assert b"spoofed" not in heard.body
    seen = _fields(heard.body)
    assert seen["xmine"] == ["kept"]
    assert set(seen) == {"host", "xmine"} | (_OURS - {"clientcert", "clientidentity"} if anonymous else _OURS)
    assert all(len(values) == 1 for values in seen.values())


def test_e1_every_name_that_we_know_is_taken_out(attacker: Attacker, ca: Ca) -> None:
    """E1: every folded name and prefix of the list is taken out of a request."""
    names = [name.decode() for name in sorted(IDENTITY_HEADERS)]
    names += [f"{prefix.decode()}-anything" for prefix in IDENTITY_PREFIXES]
    with (
        App(echo_head) as app,
        Running(ca, app.address) as guard,
        attacker.open(guard, ca.client()) as tls,
    ):
        for at in range(0, len(names), 60):
            spoofed = [f"{name}: spoofed" for name in names[at : at + 60]]
            assert b"spoofed" not in one(tls, get("/", "localhost", *spoofed, close=False)).body


@pytest.mark.parametrize("how", ["Connection", "connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer"])
def test_e4_no_header_takes_ours_away(attacker: Attacker, ca: Ca, how: str) -> None:
    """E4: naming our headers as belonging to this hop does not take them out (CVE-2024-45410)."""
    listed = ", ".join(["close", "Client-Cert", "client_identity", "X-Forwarded-For", "X-Forwarded-Proto"])
    with App(echo_head) as app, Running(ca, app.address) as guard:
        heard = attacker.call(guard, ca.client(), get("/", "localhost", f"{how}: {listed}"))
    seen = _fields(heard.body)
    assert {name: len(values) for name, values in seen.items() if name in _OURS} == dict.fromkeys(_OURS, 1)
    assert seen["clientidentity"] == ['"spiffe://test/web"']


def test_e5_exactly_one_value_reaches_the_app(attacker: Attacker, ca: Ca) -> None:
    """E5: repeated headers and comma lists leave one value, the guard's, in each style."""
    spoofed = []
    for name in (
        "Client-Cert",
        "Client-Identity",
        "X-Forwarded-Client-Cert",
        "X-SSL-Client-Verify",
        "Client-Cert-Chain",
    ):
        spoofed += [f"{name}: spoofed", f"{name}: spoofed, spoofed", f"{name.upper()}: spoofed"]
    with App(echo_head) as app, Running(ca, app.address) as guard:
        serve_sites(guard, Vhost(app, nameless=True, identify=_styled(*STYLES)))
        heard = attacker.call(guard, ca.sub().client(), get("/", "localhost", *spoofed))
    seen = _fields(heard.body)
    assert b"spoofed" not in heard.body
    assert seen["xsslclientverify"] == ["SUCCESS"]
    assert [name for name, values in seen.items() if len(values) != 1] == []
    assert {"clientcert", "clientcertchain", "xforwardedclientcert", "clientidentity"} <= set(seen)


ODD_HEADS = {
    "obs_fold": b"X-A: b\r\n Client-Identity: spoofed",
    "tab_fold": b"X-A: b\r\n\tClient-Identity: spoofed",
    "space_before_colon": b"Client-Identity : spoofed",
    "tab_before_colon": b"Client-Identity\t: spoofed",
    "empty_name": b": spoofed",
    "no_colon": b"Client-Identity spoofed",
    "leading_space": b" Client-Identity: spoofed",
    "nul": b"Client-Identity\0: spoofed",
    "nul_in_value": b"X-A: b\0\r\nX-B: spoofed",
    "cr": b"X-A: b\rClient-Identity: spoofed",
    "lf": b"X-A: b\nClient-Identity: spoofed",
    "high": b"Client\xadIdentity: spoofed",
    "utf8": "Client‑Identity: spoofed".encode(),
    "pseudo": b":authority: spoofed",
    "quoted": b'"Client-Identity": spoofed',
}


@pytest.mark.parametrize("case", ODD_HEADS)
def test_e6_odd_heads_are_refused(attacker: Attacker, ca: Ca, case: str) -> None:
    """E6: folded lines, white space before the colon, names that are empty or no tokens, and control bytes are 400, and
    the app learns nothing."""
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + ODD_HEADS[case] + b"\r\nConnection: close\r\n\r\n"
    with App() as app, Running(ca, app.address) as guard:
        assert attacker.call(guard, ca.client(), request).status == 400
        assert guard.events.next("request")["reason"].startswith("http.")
        assert untouched(app)


def test_e6_trailers_bring_no_identity(attacker: Attacker, ca: Ca) -> None:
    """E6: fields behind a chunked body do not reach the app, which might merge them into the head."""
    body = b"5\r\nhello\r\n0\r\nClient-Identity: spoofed\r\nX-SSL-Client-Verify: spoofed\r\n\r\n"
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTrailer: Client-Identity\r\nTransfer-Encoding: chunked\r\n"

    bodies: list[bytes] = []

    def answer(connection: socket.socket, request: bytes) -> None:
        body = request.partition(b"\r\n\r\n")[2]
        while not re.search(rb"(?s)(\A|\r\n)0\r\n(.*\r\n)?\r\n\Z", body):
            body += connection.recv(1 << 16)
        bodies.append(body)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with App(answer) as app, Running(ca, app.address) as guard:
        heard = attacker.call(guard, ca.client(), head + b"Connection: close\r\n\r\n" + body)
        assert heard.status == 200
        assert bodies == [b"5\r\nhello\r\n0\r\n\r\n"]
        assert b"spoofed" not in app.received


def test_e6_an_interim_answer_says_nothing_of_who_called(attacker: Attacker, ca: Ca) -> None:
    """E6: a 103 of the app passes as such, and does not become the answer or the head of the next request."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with App(answer) as app, Running(ca, app.address) as guard:
        heard = attacker.call(guard, ca.client())
        assert heard.statuses == [103, 200]
        assert heard.answer.endswith(b"ok")


INJECTIONS = [
    'a";URI="spiffe://test/admin',
    "a;URI=spiffe://test/admin",
    "a,By=x;Hash=y",
    "a,OU=admins",
    "a\\",
    'a\\";URI=spiffe://test/admin;x="',
    "a+OU=admins",
    "a=b",
    ":YWRtaW4=:",
    "%0d%0aX-Admin: yes",
]
TEMPLATES = [
    "{http.request.header.X-A}",
    "{{.Name}}",
    "${jndi:ldap://x}",
    "$ssl_client_s_dn",
    "%{SSL_CLIENT_S_DN}e",
    "%REQ(X-A)%",
    "%s%n",
    "{0}",
    "{peer}",
]


@pytest.mark.parametrize("text", INJECTIONS + TEMPLATES)
def test_e7_e8_a_name_stays_a_value(attacker: Attacker, ca: Ca, text: str) -> None:
    """E7, E8: quotes, semicolons, commas, backslashes and placeholders in a common name, or in a client's header,
    neither end a value nor stand for anything: each style has one URI, ours, and no field or line is added."""
    with App(echo_head) as app, Running(ca, app.address) as guard:
        serve_sites(guard, Vhost(app, nameless=True, identify=_styled(*STYLES)))
        heard = attacker.call(guard, ca.client(cn=text), get("/", "localhost", f"X-A: {text}", "X-Admin-Not: 1"))
        assert heard.status == 200
        seen = _fields(heard.body)
        assert seen["xa"] == [text]
        assert "xadmin" not in seen
        assert all(len(values) == 1 for values in seen.values())
        (xfcc,) = seen["xforwardedclientcert"]
        fields = [part.partition("=")[0] for part in xfcc.split(";")]  # by the most careless reader there is
        assert fields == ["Hash", "Cert", "Chain", "Subject", "URI"]
        assert xfcc.endswith(";URI=spiffe://test/web")
        assert "," not in xfcc
        assert seen["clientidentity"] == ['"spiffe://test/web"']
        assert guard.events.next("request")["peer"] == "spiffe://test/web"


BELIEVED = (ip_network("127.0.0.0/8"),)
_SAYS = proxy_v2(Endpoints(Address("6.6.6.6", 1), Address("7.7.7.7", 2)))


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("preamble", [_SAYS, b"PROXY TCP4 6.6.6.6 7.7.7.7 1 2\r\n"])
def test_e10_a_preamble_of_a_stranger_is_no_address(ca: Ca, preamble: bytes, tcp: bool) -> None:
    """E10: a PROXY header from who is not believed is no TLS, and is refused; from who is, it is the address."""
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
            plain.sendall(preamble)
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(1 << 16):
                pass
        event = guard.events.next("connection")
        assert event["reason"] in ("tls.not_tls", "tls.plain_http")
        assert event["address"].startswith("127.0.0.1")
        assert untouched(app)


def test_e10_a_preamble_within_tls_is_the_clients_own_words(attacker: Attacker, ca: Ca) -> None:
    """E10: inside TLS a PROXY header is no request in HTTP mode, and comes behind the guard's own in TCP mode."""
    with App() as app, Running(ca, app.address) as guard:
        assert attacker.call(guard, ca.client(), _SAYS + get()).status == 400
        assert attacker.call(guard, ca.client(), b"PROXY TCP4 6.6.6.6 7.7.7.7 1 2\r\n" + get()).status == 400
        assert untouched(app)
    with App() as app, Running(ca, f"tcp://{app.address}") as guard:
        guard.upstreams.proxy = True
        with attacker.open(guard, ca.client()) as tls:
            tls.sendall(_SAYS + get(close=False))
            assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            # A preamble holds an empty line, so the app may answer to the guard's own before it has the client's.
            until(lambda: _SAYS in app.received, "the client's own preamble")
        assert app.received.startswith(_SAYS[:12])
        assert b"\x7f\x00\x00\x01\x7f\x00\x00\x01" in app.received[:28]
        assert app.received.index(_SAYS) > 28


BAD_PREAMBLES = {
    "none": b"",
    "tlv_overrun": _SAYS[:14]
    + (int.from_bytes(_SAYS[14:16], "big") + 3).to_bytes(2, "big")
    + _SAYS[16:]
    + b"\x20\xff\xff",
    "length_too_short": _SAYS[:14] + b"\0\4" + _SAYS[16:20],
    "version_3": _SAYS[:12] + b"\x31" + _SAYS[13:],
    "v1_too_long": b"PROXY TCP4 " + b"1" * 200 + b"\r\n",
    "v1_lf": b"PROXY TCP4 6.6.6.6 7.7.7.7 1 2\n",
    "v1_bad_port": b"PROXY TCP4 6.6.6.6 7.7.7.7 1 99999\r\n",
}


@pytest.mark.parametrize("case", BAD_PREAMBLES)
def test_e10_a_broken_preamble_lets_nobody_in(attacker: Attacker, ca: Ca, case: str) -> None:
    """E10: behind a believed proxy, a connection without a sound header gets no handshake."""
    with App() as app, Running(ca, app.address, proxy_from=BELIEVED) as guard:
        plain = socket.create_connection(port_of(guard.address), timeout=PATIENCE)
        with pytest.raises((OSError, ConnectionError)):  # noqa: PT012  # when it is cut off depends on the case
            plain.sendall(BAD_PREAMBLES[case])
            with attacker.context(ca.client()).wrap_socket(plain, server_hostname="localhost") as tls:
                hear(tls, get())
        plain.close()
        assert guard.events.next("connection")["decision"] == "deny"
        assert untouched(app)
        plain = socket.create_connection(port_of(guard.address), timeout=PATIENCE)
        plain.sendall(_SAYS)
        with attacker.context(ca.client()).wrap_socket(plain, server_hostname="localhost") as tls:
            assert hear(tls, get()).status == 200
        assert b"X-Forwarded-For: 6.6.6.6\r\n" in app.received


@cache
def _large_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 4096)  # half a second and more


@pytest.mark.parametrize("limit", [8190, 16384])
def test_e12_a_large_certificate_is_told_whole_or_not_at_all(attacker: Attacker, ca: Ca, limit: int) -> None:
    """E12: where RSA-4096 certificates make the head larger than the app takes, its 431 reaches the client; the request
    is never sent with less in it."""
    key = _large_key()
    leaf = ca.sub("Large", key=key).client(key=key, cn="x" * 60)

    def answer(connection: socket.socket, request: bytes) -> None:
        large = len(request) > limit
        status = b"431 Request Header Fields Too Large" if large else b"200 OK"
        connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

    identify: Any = _styled(*STYLES)
    with App(answer) as app, Running(ca, app.address) as guard:
        serve_sites(guard, Vhost(app, nameless=True, identify=identify))
        heard = attacker.call(guard, leaf, get("/", "localhost"))
        assert len(app.received) > 8190
        assert heard.status == (431 if len(app.received) > limit else 200)
        assert b"\r\nClient-Cert: :" in app.received
        assert b"\r\nClient-Cert-Chain: :" in app.received
        assert b'\r\nClient-Identity: "spiffe://test/web"\r\n' in app.received
