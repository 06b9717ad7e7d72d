"""Rows F1 to F5: what two parsers could read in two ways, and what wears a guard out."""

from __future__ import annotations

import os
import re
import resource
import socket
import ssl
import struct
import time
from contextlib import suppress

import pytest
from OpenSSL import SSL
from tlslite.constants import KeyUpdateMessageType
from tlslite.errors import TLSError

from handfast.guard.connection import Limits
from handfast.policy import parse_policy
from tests.attacks.kit import UPGRADE, Attacker, hear, one, port_of, tlslite, untouched
from tests.support.apps import App, get
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.waiting import PATIENCE, Stopwatch, until

KEPT = get(close=False)
MARK = b"POST /smuggled HTTP/1.1\r\nHost: localhost\r\nX-Mark: smuggled\r\nContent-Length: 0\r\n\r\n"


class Backend(App):
    """An app that reads requests as a strict server does, or as a lax one, and notes what it took for requests.

    Lax: a bare LF ends a line, a header may be folded or have white space before its colon, `_` is `-`, the last of
    several lengths counts, any Transfer-Encoding with `chunked` in it is chunks, and a bad size is what int() makes
    of its digits.
    """

    def __init__(self, lax: bool) -> None:
        super().__init__()
        self.lax = lax
        self.seen: list[tuple[bytes, list[bytes]]] = []  # the first line, and who the headers say it is

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            pending = b""
            while data := connection.recv(1 << 16):
                self.received += data
                pending += data
                while (rest := self._take(pending)) is not None:
                    pending = rest
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def _take(self, data: bytes) -> bytes | None:
        """What follows the first whole request; None when there is none."""
        end = re.search(rb"\r?\n\r?\n" if self.lax else rb"\r\n\r\n", data)
        if end is None:
            return None
        head, body = data[: end.start()], data[end.end() :]
        lines = re.split(rb"\r?\n" if self.lax else rb"\r\n", head)
        headers: list[tuple[bytes, bytes]] = []
        for line in lines[1:]:
            if self.lax and line[:1] in (b" ", b"\t") and headers:
                headers[-1] = headers[-1][0], headers[-1][1] + line.strip()
                continue
            name, _, value = line.partition(b":")
            name = name.strip().lower() if self.lax else name.lower()
            headers.append((name.replace(b"_", b"-") if self.lax else name, value.strip()))
        codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
        lengths = [value for name, value in headers if name == b"content-length"]
        if any(b"chunked" in value for value in codings):
            rest = self._chunks(body)
        else:
            length = int(re.sub(rb"[^0-9]", b"", lengths[-1]) or b"0") if lengths else 0
            rest = body[length:] if len(body) >= length else None
        if rest is not None:
            who = [value for name, value in headers if name == b"client-identity"]
            self.seen.append((lines[0], who))
        return rest

    def _chunks(self, body: bytes) -> bytes | None:
        while True:
            line, ended, body = body.partition(b"\n" if self.lax else b"\r\n")
            if not ended:
                return None
            size = int(re.match(rb"(?:0x)?([0-9a-fA-F]*)", line.strip())[1] or b"0", 16)  # type: ignore[index]
            gap = 2
            if len(body) < size + gap:
                return None
            if size == 0:
                return body[gap:] if body[:gap] == b"\r\n" else body.partition(b"\r\n\r\n")[2]
            body = body[size + gap :]


def _post(*headers: bytes, body: bytes = b"", line: bytes = b"POST / HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: localhost", *headers, b"", b""]) + body


_TE, _CL = b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(MARK)
_END = b"0\r\n\r\n"
CORPUS: dict[str, bytes] = {
    # CL.TE and TE.CL: two lengths, and whichever is believed, the other's rest is a request.
    "cl_te": _post(b"Content-Length: %d" % (len(_END + MARK)), _TE, body=_END + MARK),
    "te_cl": _post(_TE, b"Content-Length: 4", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(MARK), MARK)),
    "cl_0_te": _post(b"Content-Length: 0", _TE, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(MARK), MARK)),
    # Obfuscated Transfer-Encoding.
    **{
        f"te_{name}": _post(coding, _CL, body=_END + MARK)
        for name, coding in {
            "xchunked": b"Transfer-Encoding: xchunked",
            "space": b"Transfer-Encoding : chunked",
            "tab": b"Transfer-Encoding:\tchunked",
            "vtab": b"Transfer-Encoding: \x0bchunked",
            "quoted": b'Transfer-Encoding: "chunked"',
            "identity": b"Transfer-Encoding: identity, chunked",
            "chunked_identity": b"Transfer-Encoding: chunked, identity",
            "twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
            "folded": b"Transfer-Encoding:\r\n chunked",
            "lf": b"X: y\nTransfer-Encoding: chunked",
            "cr": b"X: y\rTransfer-Encoding: chunked",
            "nul": b"Transfer-Encoding: chunked\0",
            "underscore": b"Transfer_Encoding: chunked",
            "upper": b"TRANSFER-ENCODING: CHUNKED",
            "semicolon": b"Transfer-Encoding: chunked;x=y",
            "comma": b"Transfer-Encoding: ,chunked",
            "empty": b"Transfer-Encoding:",
            "high": b"Transfer-Encoding: chunked\xff",
            "leading_space": b" Transfer-Encoding: chunked",
        }.items()
    },
    # Lengths (CVE-2021-40346, haproxy a32f99f6, h2 4.4.0).
    **{
        f"cl_{name}": _post(length, body=MARK)
        for name, length in {
            "twice": b"Content-Length: 0\r\nContent-Length: %d" % len(MARK),
            "list": b"Content-Length: 0, %d" % len(MARK),
            "same_list": b"Content-Length: 0, 0",
            "empty": b"Content-Length:",
            "plus": b"Content-Length: +0",
            "minus": b"Content-Length: -0",
            "hex": b"Content-Length: 0x0",
            "underscore": b"Content-Length: 0_0",
            "space": b"Content-Length : 0",
            "inner_space": b"Content-Length: 0 0",
            "huge": b"Content-Length: 99999999999999999999999999",
            "overflow": b"Content-Length: 18446744073709551616",
            "decimal": b"Content-Length: 0.0",
            "arabic": "Content-Length: ٠".encode(),
            "long_name": b"Content-Length0" + b"a" * 240 + b":\r\nContent-Length: %d" % len(MARK),
            "spelled": b"Content_Length: %d" % len(MARK),
            "lf": b"X: y\nContent-Length: 0",
        }.items()
    },
    # Chunks (h11 GHSA-vqfr-h8mv-ghfj, CVE-2026-42926's class).
    **{
        f"chunk_{name}": _post(_TE, body=body)
        for name, body in {
            "hex_prefix": b"0x0\r\n\r\n" + MARK,
            "plus": b"+0\r\n\r\n" + MARK,
            "minus": b"-1\r\n\r\n" + MARK,
            "underscore": b"0_0\r\n\r\n" + MARK,
            "space": b" 0\r\n\r\n" + MARK,
            "lf_size": b"0\n\r\n" + MARK,
            "lf_end": b"0\r\n\n" + MARK,
            "cr_extension": b"0;\r\r\n\r\n" + MARK,
            "lf_extension": b"5;a\nhello\r\n0\r\n\r\n" + MARK,
            "no_crlf_after_data": b"5\r\nhelloXX0\r\n\r\n" + MARK,
            "junk_after_data": b"5\r\nhello" + MARK + b"0\r\n\r\n",
            "overflow": b"10000000000000000\r\n" + MARK,
            "empty_size": b"\r\n\r\n" + MARK,
            "not_hex": b"zz\r\n\r\n" + MARK,
            "trailer_folded": b"0\r\nX: y\r\n z\r\n\r\n" + MARK,
            "trailer_space": b"0\r\nContent-Length : 5\r\n\r\n" + MARK,
        }.items()
    },
    # Bodies where none is expected, and lines that end early.
    "get_body": _post(_CL, body=MARK, line=b"GET / HTTP/1.1"),
    "head_body": _post(_CL, body=MARK, line=b"HEAD / HTTP/1.1"),
    "http10_te": _post(_TE, body=_END + MARK, line=b"POST / HTTP/1.0"),
    "http11_lower": _post(_CL, body=MARK, line=b"POST / http/1.1"),
    "no_version": b"POST /\r\nHost: localhost\r\n\r\n" + MARK,
    "lf_lines": b"POST / HTTP/1.1\nHost: localhost\nContent-Length: 0\n\n" + MARK,
    "lf_before_end": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\n\r\n" + MARK,
    "target_crlf": b"POST /%0d%0a HTTP/1.1\r\nX: " + b"y\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    "target_space": b"POST / HTTP/1.1 HTTP/1.1\r\nHost: localhost\r\n\r\n" + MARK,
    "upgrade_body": _post(*(line.encode() for line in UPGRADE), _CL, body=MARK),
    "expect_body": _post(b"Expect: 100-continue", _CL, body=MARK),
    "leading_crlf": b"\r\n\r\n" + _post(_CL, body=MARK),
    "connection_cl": _post(b"Connection: Content-Length", _CL, body=MARK),
    "connection_te": _post(b"Connection: Transfer-Encoding", _TE, body=_END + MARK),
    "connection_host": _post(b"Connection: close, Host", body=MARK),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("lax", [False, True])
def test_f1_no_request_is_smuggled(attacker: Attacker, ca: Ca, lax: bool) -> None:
    """F1: for each of the corpus, the app takes as many requests as the guard says it forwarded, each with one
    identity, the sender's; and the requests of a client beside them stay its own."""
    limits, alice = Limits(head=3, response=3, idle=3), ca.client("spiffe://test/alice")
    app = Backend(lax)
    with app, Running(ca, app.address, limits=limits) as guard:
        for case, attack in CORPUS.items():
            with attacker.open(guard, ca.client(f"spiffe://test/{case}")) as tls:
                tls.settimeout(0.1)
                hear(tls, attack + get("/after"))
            until(lambda: not guard.guard.connections, f"the end of {case}")
            with attacker.open(guard, alice) as other:
                assert one(other, get(f"/alice/{case}", close=False)).status == 200
        until(lambda: not guard.guard.connections, "the end of all")
    asked = [event for event in guard.events.all if event["event"] == "request"]
    assert len({event["peer"] for event in asked}) > len(CORPUS) * 0.9
    for case in (*CORPUS, "alice"):
        name = f"spiffe://test/{case}"
        forwarded = [event for event in asked if event["peer"] == name and event["decision"] == "allow"]
        answered = [event for event in forwarded if event.get("status") == 200]
        taken = [line for line, who in app.seen if who == [f'"{name}"'.encode()]]
        assert len(answered) <= len(taken) <= len(forwarded), (case, taken, forwarded)
        paths = [line.split(b" ")[1].decode() for line in taken]
        assert paths == [event["path"] for event in forwarded][: len(paths)], case
        assert "/smuggled" not in paths, case
    assert all(len(who) == 1 for _, who in app.seen)
    assert len(app.seen) >= 2 * len(CORPUS) * 0.5


def test_f1_the_corpus_smuggles_where_nobody_guards() -> None:
    """F1: the corpus is worth something: without a guard, a strict and a lax app take many of its bodies for requests,
    and not the same ones."""
    fooled: dict[bool, set[str]] = {False: set(), True: set()}
    for lax in fooled:
        for case, attack in CORPUS.items():
            app, pending = Backend(lax), attack
            while (rest := app._take(pending)) is not None:
                pending = rest
            if any(b"/smuggled" in line for line, _ in app.seen):
                fooled[lax].add(case)
    assert min(map(len, fooled.values())) > 15
    assert len(fooled[True] ^ fooled[False]) > 5


PATHS = [
    *(
        "/public/../admin",
        "/public/./../admin",
        "/public/..",
        "/public/.",
        "/public/%2e%2e/admin",
        "/public/%2E%2e/admin",
    ),
    *("/public/.%2e/admin", "/public/%2e/x", "/public//admin", "//admin", "/public/%2fadmin", "/public/%2F..%2fadmin"),
    *("/public/%5cadmin", "/public/\\..\\admin", "/public/..;/admin", "/public;x=1/admin", "/public/;/admin"),
    *("/public/%00", "/public/x%00.html", "/public/%0a", "/public/%7f", "/public/%252e%252e/admin", "/public/%2561"),
    *("/public/%c0%ae%c0%ae/admin", "/public/%e0%80%ae", "/public/%ff", "/public/%u002e", "/public/%zz", "/public/%"),
    *("/public/%61dmin", "/public/%3b", "/public/%2", "/public/\x7f", "/public/é"),
]


@pytest.mark.parametrize("path", PATHS)
def test_f2_a_path_that_reads_in_two_ways_is_refused(attacker: Attacker, ca: Ca, path: str) -> None:
    """F2: where a rule judges paths, one that the app might read as another is 400 and goes nowhere."""
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    with App() as app, Running(ca, app.address, parse_policy(["any GET /public/**"])) as guard:
        assert attacker.call(guard, ca.client(), request).status == 400
        assert untouched(app)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/public/a?x=/../admin", 200),
        ("/public/a?../../admin", 200),
        ("/public?/x", 200),
        ("/admin?/public/x", 403),
        ("/public/a#/admin", 400),
        ("/PUBLIC/a", 403),
        ("/public/a.", 200),
        ("/public/%C3%A9", 200),
        ("/public/%c3%a9", 200),
        ("/public", 200),
        ("http://localhost/public/a", 400),
        ("public/a", 400),
        ("*", 400),
    ],
)
def test_f2_the_rule_sees_the_bytes_that_go_on(attacker: Attacker, ca: Ca, target: str, status: int) -> None:
    """F2: what is allowed is forwarded byte for byte, and a query, a fragment, another case or the absolute form do not
    stand for a path that is."""
    with App() as app, Running(ca, app.address, parse_policy(["any GET /public/**"])) as guard:
        assert attacker.call(guard, ca.client(), get(target)).status == status
        assert untouched(app) is (status != 200)
        if status == 200:
            assert app.received.startswith(f"GET {target} HTTP/1.1\r\n".encode())


METHODS = {
    "lower": (b"post / HTTP/1.1", 405),
    "mixed": (b"Post / HTTP/1.1", 405),
    "other": (b"DELETE / HTTP/1.1", 403),
    "invented": (b"GETX / HTTP/1.1", 403),
    "trace": (b"TRACE / HTTP/1.1", 405),
    "trace_lower": (b"trace / HTTP/1.1", 405),
    "connect": (b"CONNECT localhost:22 HTTP/1.1", 405),
    "connect_path": (b"CONNECT / HTTP/1.1", 405),
    "connect_lower": (b"connect localhost:22 HTTP/1.1", 405),
    "head_lower": (b"head / HTTP/1.1", 405),
    "pri": (b"PRI * HTTP/2.0", 505),
    "space": (b" GET / HTTP/1.1", 400),
    "colon": (b"GET: / HTTP/1.1", 400),
    "empty": (b" / HTTP/1.1", 400),
}


@pytest.mark.parametrize("case", METHODS)
def test_f3_a_method_is_what_it_says(attacker: Attacker, ca: Ca, case: str) -> None:
    """F3: a rule for GET lets no other method pass, in no other case; TRACE and CONNECT never go on."""
    line, status = METHODS[case]
    with App() as app, Running(ca, app.address, parse_policy(["any GET,HEAD"])) as guard:
        heard = attacker.call(guard, ca.client(), line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert heard.status == status
        assert untouched(app)


@pytest.mark.parametrize("method", ["POST", "post", "Post"])
def test_f3_a_denied_method_does_not_pass_in_another_case(attacker: Attacker, ca: Ca, method: str) -> None:
    """F3: what is allowed but for POST is not asked for as `post` either, which some apps take for POST."""
    with App() as app, Running(ca, app.address, parse_policy(["deny any POST", "any"])) as guard:
        line = f"{method} / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        assert attacker.call(guard, ca.client(), line.encode()).status == (403 if method == "POST" else 405)
        assert untouched(app)
        assert attacker.call(guard, ca.client(), get("/")).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        ("Connection: Upgrade", "Upgrade: h2c, websocket"),
        ("Connection: Upgrade", "Upgrade: TLS/1.0"),
        ("Connection: Upgrade", "Upgrade: websocket, h2c"),
    ],
)
def test_f3_no_other_protocol_is_changed_to(attacker: Attacker, ca: Ca, headers: tuple[str, ...]) -> None:
    """F3: a change to h2c, or to anything but a websocket, does not reach the app: the request does, without a word of
    it (RFC 9110 7.8), and what comes after it is a request that is judged.
    """
    with App() as app, Running(ca, app.address, parse_policy(["any /"])) as guard:
        sent = get("/", "localhost", *headers, close=False) + get("/admin")
        assert attacker.call(guard, ca.client(), sent).statuses == [200, 403]
        assert app.received.count(b"GET ") == 1
        assert not re.search(rb"(?i)upgrade|http2-settings", app.received)


def test_f3_a_websocket_that_was_declined_is_no_tunnel(attacker: Attacker, ca: Ca) -> None:
    """F3: after an answer other than 101 what the client sends is neither frames nor requests for the app."""
    upgrade = get("/ws", "localhost", *UPGRADE, close=False)
    with App() as app, Running(ca, app.address, parse_policy(["any /ws"])) as guard:
        heard = attacker.call(guard, ca.client(), upgrade + get("/admin", close=False) * 3)
        assert heard.statuses == [200]
        assert b"/admin" not in app.received
        assert app.received.count(b"GET ") == 1


def test_f3_an_app_cannot_change_protocol_unasked(attacker: Attacker, ca: Ca) -> None:
    """F3: a 101 to a usual request is 502, and opens no tunnel."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")

    with App(answer) as app, Running(ca, app.address) as guard:
        heard = attacker.call(guard, ca.client(), KEPT + get("/second"))
        assert heard.statuses == [502]
        assert b"/second" not in app.received


AUTHORITIES = {
    "absolute": b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n",
    "absolute_no_path": b"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n",
    "absolute_userinfo": b"GET http://localhost@evil/ HTTP/1.1\r\nHost: localhost\r\n",
    "two_hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n",
    "no_host": b"GET / HTTP/1.1\r\nX: y\r\n",
    "host_space": b"GET / HTTP/1.1\r\nHost: localhost evil\r\n",
    "host_tab": b"GET / HTTP/1.1\r\nHost: localhost\tevil\r\n",
    "host_slash": b"GET / HTTP/1.1\r\nHost: localhost/evil\r\n",
    "host_question": b"GET / HTTP/1.1\r\nHost: localhost?evil\r\n",
    "host_backslash": b"GET / HTTP/1.1\r\nHost: localhost\\evil\r\n",
    "host_at": b"GET / HTTP/1.1\r\nHost: evil@localhost\r\n",
    "host_percent": b"GET / HTTP/1.1\r\nHost: localhost%2eevil\r\n",
    "host_port_text": b"GET / HTTP/1.1\r\nHost: localhost:http\r\n",
    "host_port_large": b"GET / HTTP/1.1\r\nHost: localhost:65536\r\n",
    "host_two_ports": b"GET / HTTP/1.1\r\nHost: localhost:1:2\r\n",
    "host_bracket": b"GET / HTTP/1.1\r\nHost: [localhost]\r\n",
    "host_zone": b"GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]\r\n",
    "host_empty": b"GET / HTTP/1.1\r\nHost:\r\n",
    "host_long": b"GET / HTTP/1.1\r\nHost: " + b"a." * 200 + b"\r\n",
}


@pytest.mark.parametrize("case", AUTHORITIES)
def test_f4_an_authority_has_one_reading(attacker: Attacker, ca: Ca, case: str) -> None:
    """F4: a request whose authority is missing, doubled, malformed or given twice over is 400."""
    with App() as app, Running(ca, app.address) as guard:
        assert attacker.call(guard, ca.client(), AUTHORITIES[case] + b"Connection: close\r\n\r\n").status == 400
        assert untouched(app)


def test_f5_a_flood_of_key_updates_stops_nobody(attacker: Attacker, ca: Ca) -> None:
    """F5: a thousand KeyUpdate messages that ask for an answer neither fill the memory nor hold up another client
    (haproxy@91004114f)."""
    newest = ((3, 4), (3, 4))
    with App() as app, Running(ca, app.address) as guard:  # noqa: SIM117  # it would not fit a line
        with tlslite(guard, ca.client(), versions=newest) as tls:
            tls.sock.settimeout(1)
            sent = 0
            with suppress(TLSError, OSError):
                for _ in range(1000):
                    for _part in tls.send_keyupdate_request(KeyUpdateMessageType.update_requested):
                        pass
                    sent += 1
            with Stopwatch() as watch:
                assert attacker.call(guard, ca.client()).status == 200
            assert watch.seconds < 2
            assert sent == 1000
            for connection in list(guard.guard.connections):
                assert guard.call(connection.transport.get_write_buffer_size) < 1 << 22


def test_f5_a_handshake_in_drops_is_cut_off(ca: Ca, attacker: Attacker) -> None:
    """F5: a hello that trickles in, a byte each 20 ms, is over when its time is; the limit is not begun anew."""
    context = attacker.context(ca.client())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    with App() as app, Running(ca, app.address, limits=Limits(handshake=1)) as guard:
        with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
            plain.settimeout(0.02)
            began, ended = time.monotonic(), False
            for octet in hello:
                try:
                    plain.sendall(bytes([octet]))
                    ended = plain.recv(1) == b""
                except TimeoutError:
                    continue
                except ConnectionError:
                    ended = True
                if ended:
                    break
            assert ended
            assert time.monotonic() - began < 6  # and not the 10 s that all of it would take
        assert guard.events.next("connection")["reason"] == "tls.timeout"
        assert untouched(app)


def test_f5_the_end_of_a_large_answer_is_not_lost(attacker: Attacker, ca: Ca) -> None:
    """F5: an app that sends 8 MiB and closes at once, to a client that has half-closed, is heard to the end in TCP mode
    (ghostunnel's close timeout lost it)."""
    size = 8 << 20

    class Sender(App):
        def _serve(self, connection: socket.socket) -> None:
            with connection:
                while connection.recv(1 << 16):
                    pass
                connection.sendall(b"x" * size)

    with Sender() as app, Running(ca, f"tcp://{app.address}") as guard:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        cert, key = ca.client().save(attacker.folder, "half")
        context.use_certificate_chain_file(str(cert))
        context.use_privatekey_file(str(key))
        with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
            plain.setblocking(True)
            tls = SSL.Connection(context, plain)
            tls.set_connect_state()
            tls.do_handshake()
            tls.sendall(b"go")
            tls.shutdown()
            got = 0
            with suppress(SSL.ZeroReturnError):
                while piece := tls.recv(1 << 16):
                    got += len(piece)
        assert got == size


def test_f5_without_descriptors_it_waits_and_recovers(attacker: Attacker, ca: Ca) -> None:
    """F5: with no file descriptor left the guard does not crash; when there are some again, the next client is served
    (ghostunnel#757). That it does not spin meanwhile is measured of its own process: tests/chaos/test_exhaustion.py."""
    held: list[int] = []
    with App() as app, Running(ca, app.address) as guard:
        assert attacker.call(guard, ca.client()).status == 200
        context = attacker.context(ca.client())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        plain = socket.socket()
        plain.settimeout(PATIENCE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
            with suppress(OSError):
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            plain.connect(port_of(guard.address))
            deadline = time.monotonic() + 1
            until(lambda: time.monotonic() > deadline, "a second")
        finally:
            for each in held:
                os.close(each)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            plain.close()
        until(lambda: attacker.call(guard, context=context).status == 200, "an answer again")
        assert app.connections >= 2


def test_f5_connections_that_come_and_go_leave_none_behind(attacker: Attacker, ca: Ca) -> None:
    """F5: 300 clients that vanish in the midst of a request, by FIN or RST, leave no connection, no task and no app
    connection open."""

    class Counting(App):
        def __init__(self) -> None:
            super().__init__()
            self.gone: list[socket.socket] = []

        def _serve(self, connection: socket.socket) -> None:
            with suppress(OSError):
                super()._serve(connection)
            self.gone.append(connection)

    app = Counting()
    with app, Running(ca, app.address) as guard:
        context = attacker.context(ca.client())
        for turn in range(300):
            with suppress(OSError, ssl.SSLError), attacker.open(guard, context=context) as tls:
                tls.sendall((KEPT, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx")[turn % 2])
                if turn % 3 == 0:
                    tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: not guard.guard.connections, "the end of all")
        until(lambda: len(app.gone) == app.connections, "the end of all connections to the app")
