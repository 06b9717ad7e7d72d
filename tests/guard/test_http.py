"""Requests and answers on their way through: framing, identity headers, bodies, upgrades, faults of the app."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.guard import entry
from handfast.guard.connection import Limits
from handfast.guard.transports import LINGER
from handfast.policy import parse_policy
from tests.guard.conftest import Ask
from tests.support.apps import HELLO, App, client_context, echo_head, get, refusing, talk
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.waiting import PATIENCE, until


def _open(guard: Running, ca: Ca, folder: Path) -> ssl.SSLSocket:
    host, _, port = guard.address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=PATIENCE)
    context = client_context(ca.save(folder, "ca"), ca.client(), folder)
    # An end without close_notify is an error here: it is how a client sees that an answer was cut short.
    return context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)


def _read(tls: ssl.SSLSocket, end: bytes) -> bytes:
    answer = b""
    while not answer.endswith(end):
        piece = tls.recv(1 << 16)
        if not piece:
            break
        answer += piece
    return answer


def test_identity_headers_are_ours_alone(ca: Ca, ask: Ask) -> None:
    """Client-Cert and Client-Identity say who the peer is; no spelling of theirs gets through."""
    leaf = ca.client("spiffe://test/web")
    spoofed = [
        *("Client-Cert: :bm9wZQ==:", "client_cert: x", "Client.Cert: x", "CLIENT-IDENTITY: admin"),
        *("Client_Identity: admin", "X-SSL-Client-Verify: SUCCESS", "X-Forwarded-Client-Cert: URI=spiffe://test/admin"),
        *("X-Forwarded-For: 6.6.6.6", "Forwarded: for=6.6.6.6", "Connection: close, Client-Cert", "X-Mine: kept"),
    ]
    with App(echo_head) as app, Running(ca, app.address) as guard:
        seen = ask(guard, leaf, get("/", "localhost", *spoofed, close=False)).partition(b"\r\n\r\n")[2].decode()
    lines = seen.split("\r\n")
    assert lines[0] == "GET / HTTP/1.1"
    headers = [line.partition(": ") for line in lines[1:]]
    folded = [name.lower().replace("_", "").replace("-", "").replace(".", "") for name, _, _ in headers]
    values = {name: value for name, _, value in headers}
    der = base64.b64encode(leaf.certificate.public_bytes(Encoding.DER)).decode()
    assert values["Client-Cert"] == f":{der}:"
    assert values["Client-Identity"] == '"spiffe://test/web"'
    assert values["X-Forwarded-For"] == "127.0.0.1"
    assert values["X-Mine"] == "kept"
    assert folded.count("clientcert") == folded.count("clientidentity") == folded.count("xforwardedfor") == 1
    assert not {"xsslclientverify", "xforwardedclientcert", "forwarded", "connection"} & set(folded)


SMUGGLING = {
    "cl_te": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "te_te": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0",
    "two_cl": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "bad_chunk": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0x4\r\nabcd\r\n0\r\n\r\n",
    "obs_fold": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n",
    "bare_lf": b"GET / HTTP/1.1\r\nHost: localhost\nX: a\r\n\r\n",
    "bare_cr": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
    "space_colon": b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "absolute": b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two_hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "no_host": b"GET / HTTP/1.1\r\n\r\n",
    "underscore_te": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer_Encoding: chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("case", SMUGGLING)
def test_ambiguous_framing_is_refused(ca: Ca, ask: Ask, case: str) -> None:
    """What two servers could frame in two ways is 400, the connection ends, and no request behind it is served."""
    with App() as app, Running(ca, app.address) as guard:
        answer = ask(guard, ca.client(), SMUGGLING[case] + get("/smuggled"))
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"smuggled" not in app.received
        if case != "bad_chunk":
            assert app.connections == 0


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("bare_cr", "a control byte, or a bare CR or LF"),
        ("bad_chunk", "a malformed chunk size or extension"),
        ("underscore_te", "a name that an app may read as Transfer-Encoding"),
    ],
)
def test_the_log_says_what_is_malformed(ca: Ca, ask: Ask, case: str, said: str) -> None:
    """Whoever runs the guard reads in the log which part of a request was refused."""
    with App() as app, Running(ca, app.address) as guard:
        ask(guard, ca.client(), SMUGGLING[case])
        assert guard.events.next("request")["detail"].lower().endswith(said.lower())


def test_other_refusals_have_their_status(ca: Ca, ask: Ask) -> None:
    """An overlong head is 431, HTTP/2.0 505, CONNECT 405, a strange expectation 417."""
    cases = {
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n": 431,
        b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n": 505,
        b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n": 405,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nExpect: tea\r\n\r\nx": 417,
    }
    with App() as app, Running(ca, app.address) as guard:
        for request, status in cases.items():
            assert ask(guard, ca.client(), request).startswith(b"HTTP/1.1 %d " % status)
        assert app.connections == 0


def _digest(connection: socket.socket, request: bytes) -> None:
    """Answer with the SHA-256 of the body, chunked or not."""
    head, _, body = request.partition(b"\r\n\r\n")
    file = connection.makefile("rb")
    total = hashlib.sha256()
    if b"chunked" in head:
        pending = body

        def take(count: int) -> bytes:
            nonlocal pending
            while len(pending) < count:
                pending += connection.recv(1 << 16)
            taken, pending = pending[:count], pending[count:]
            return taken

        def line() -> bytes:
            made = b""
            while not made.endswith(b"\r\n"):
                made += take(1)
            return made

        while size := int(line(), 16):
            total.update(take(size))
            take(2)
        take(2)
    else:
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        total.update(body)
        left = length - len(body)
        while left:
            piece = file.read1(min(left, 1 << 16))
            total.update(piece)
            left -= len(piece)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + total.hexdigest().encode())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_upload_arrives_whole(ca: Ca, ask: Ask, chunked: bool) -> None:
    """16 MiB, by length or in chunks, arrive as they were sent."""
    body = bytes(range(256)) * (1 << 16)
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    sent = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n" if chunked else body
    request = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + framing + b"\r\n\r\n" + sent
    with App(_digest) as app, Running(ca, app.address) as guard:
        assert ask(guard, ca.client(), request).endswith(hashlib.sha256(body).hexdigest().encode())


def _big(connection: socket.socket, request: bytes) -> None:
    body = b"x" * (8 << 20)
    if b"/chunked" in request:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
    elif b"/until-close" in request:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize("path", ["/length", "/chunked", "/until-close"])
def test_a_large_download_arrives_whole(ca: Ca, ask: Ask, path: str) -> None:
    """8 MiB come back whole, however the app frames them."""
    with App(_big) as app, Running(ca, app.address) as guard:
        answer = ask(guard, ca.client(), get(path))
        assert answer.count(b"x") >= 8 << 20


def _say_no_more(tls: ssl.SSLSocket) -> None:
    """Send close_notify, and read on (RFC 8446 6.1)."""
    tls.setblocking(False)
    with pytest.raises(ssl.SSLWantReadError):
        tls.unwrap()
    tls.settimeout(PATIENCE)


def test_the_app_hears_of_a_client_that_left(ca: Ca, tmp_path: Path) -> None:
    """A client that closes while it waits for an answer: the app's connection ends, and the log says who left."""
    left = threading.Event()

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.settimeout(PATIENCE)
        if connection.recv(1) == b"":
            left.set()

    with App(answer) as app, Running(ca, app.address) as guard:
        with _open(guard, ca, tmp_path) as tls:
            tls.sendall(get("/slow", close=False))
            until(lambda: b"GET" in app.received, "the request at the app")
        assert left.wait(PATIENCE)
        event = guard.events.next("request")
        assert (event["path"], event["outcome"], event.get("status")) == ("/slow", "client gone", None)


@pytest.mark.parametrize("half", [True, False])
def test_a_client_that_sends_no_more_is_answered_and_let_go(ca: Ca, tmp_path: Path, half: bool) -> None:
    """After the answer to a client that said close_notify nothing is waited for; another may ask again."""
    go = threading.Event()

    def answer(connection: socket.socket, _request: bytes) -> None:
        go.wait(PATIENCE)
        connection.sendall(HELLO)

    with App(answer) as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(get("/", close=False))
        until(lambda: b"GET" in app.received, "the request at the app")
        if half:
            _say_no_more(tls)
        go.set()
        answered = _read(tls, b"World\n")
        assert answered.endswith(b"Hello World\n")
        if half:
            with pytest.raises(ssl.SSLZeroReturnError):  # close_notify: nothing else is that
                tls.recv(1)
        else:
            tls.sendall(get("/", close=False))
            assert _read(tls, b"World\n")


def test_what_was_asked_before_the_end_is_answered(ca: Ca, tmp_path: Path) -> None:
    """Requests in a row before the client said close_notify are all answered, then the connection ends."""
    go = threading.Event()

    def answer(connection: socket.socket, _request: bytes) -> None:
        go.wait(PATIENCE)
        connection.sendall(HELLO)

    with App(answer) as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(get("/a", close=False) + get("/b", close=False))
        until(lambda: b"GET /a" in app.received, "the first request at the app")
        _say_no_more(tls)
        go.set()
        answered = b""
        with suppress(ssl.SSLZeroReturnError):
            while piece := tls.recv(1 << 16):
                answered += piece
        assert answered.count(b"HTTP/1.1 200 OK") == 2
        assert b"GET /b" in app.received


def test_a_slow_reader_holds_the_app_back(ca: Ca, tmp_path: Path) -> None:
    """While the client does not read, the guard does not take the whole answer into memory."""
    progress: list[int] = []

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (256 << 20))
        connection.settimeout(1)
        try:
            for _ in range(4096):
                connection.sendall(b"x" * (1 << 16))
                progress.append(1 << 16)
        except TimeoutError:
            progress.append(-1)

    with App(answer) as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(get())
        until(lambda: progress[-1:] == [-1] or sum(progress) >= 64 << 20, "an app that is held back")
        assert sum(progress) < 64 << 20, "the guard swallows it"
        assert tls.fileno() >= 0  # open, and nothing was read from it


def test_requests_follow_one_another_on_one_connection(ca: Ca, tmp_path: Path) -> None:
    """Three requests on one connection use one connection to the app, and each is logged."""
    with App() as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        for _ in range(3):
            tls.sendall(get(close=False))
            assert _read(tls, b"Hello World\n").startswith(b"HTTP/1.1 200 ")
            assert guard.events.next("request")["status"] == 200
        assert app.connections == 1


def test_pipelined_requests_are_answered_in_order(ca: Ca, tmp_path: Path) -> None:
    """Requests sent in one go are served one after another, each under its own decision."""
    policy = parse_policy(["any GET /a/**", "any GET /c/**"])
    with App(echo_head) as app, Running(ca, app.address, policy) as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(get("/a/1", close=False) + get("/b/2", close=False) + get("/c/3"))
        answer = b""
        while piece := tls.recv(1 << 16):
            answer += piece
        assert re.findall(rb"HTTP/1.1 ([0-9]+) ", answer) == [b"200", b"403", b"200"]
        assert answer.index(b"GET /a/1") < answer.index(b"policy.no_rule") < answer.index(b"GET /c/3")
        assert b"/b/2" not in app.received


def test_head_204_and_304_have_no_body(ca: Ca, tmp_path: Path) -> None:
    """After HEAD, 204 and 304 the next answer is read where it begins."""

    def answer(connection: socket.socket, request: bytes) -> None:
        if request.startswith(b"HEAD"):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n")
        elif b"/204" in request:
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        elif b"/304" in request:
            connection.sendall(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n")
        else:
            connection.sendall(HELLO)

    with App(answer) as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        for request, status in (
            (b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"200"),
            (get("/204", close=False), b"204"),
            (get("/304", close=False), b"304"),
        ):
            tls.sendall(request)
            assert _read(tls, b"\r\n\r\n").startswith(b"HTTP/1.1 " + status)
        tls.sendall(get())
        assert _read(tls, b"Hello World\n").endswith(b"Hello World\n")


def test_expect_100_continue_goes_through(ca: Ca, tmp_path: Path) -> None:
    """The app's 100 Continue reaches the client before the body is sent."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = connection.recv(5)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + body)

    with App(answer) as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert _read(tls, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        tls.sendall(b"abcde")
        assert _read(tls, b"abcde").startswith(b"HTTP/1.1 200 ")


def test_a_client_is_told_to_go_on_where_the_app_does_not(ca: Ca, tmp_path: Path) -> None:
    """An app that never says 100 Continue has the body all the same: after a moment the guard asks for it."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        body = connection.recv(5)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + body)

    with App(answer) as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert _read(tls, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        tls.sendall(b"abcde")
        assert _read(tls, b"abcde").startswith(b"HTTP/1.1 200 ")


def test_an_answer_before_the_upload_is_through_arrives(ca: Ca, tmp_path: Path) -> None:
    """An app that answers at the head of an upload and closes, while the client sends on: its answer is the answer."""
    large = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlong"

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(large)
        connection.close()  # with the body unread: a reset

    with App(answer) as app, Running(ca, app.address) as guard:
        for _ in range(20):
            with _open(guard, ca, tmp_path) as tls:
                tls.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (4 << 20))
                tls.sendall(bytes(4 << 20))
                assert _read(tls, b"long").startswith(b"HTTP/1.1 413 ")


def test_a_refusal_waits_for_who_still_sends(ca: Ca, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused upload that goes on for longer than silence may: its client reads why; after silence it is cut off."""
    monkeypatch.setattr(entry, "LINGER", 1.0)
    with App() as app, Running(ca, app.address, parse_policy(["any /ok"])) as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(12):
            tls.sendall(b"x")
            time.sleep(0.2)
        assert _read(tls, b"}\n").startswith(b"HTTP/1.1 403 ")
        until(lambda: not guard.guard.connections, "the end")


def test_who_was_not_let_in_may_not_stay(ca: Ca, tmp_path: Path) -> None:
    """A stranger who is told so and goes on sending is cut off after a moment, and holds up no stop."""
    with App() as app, Running(ca, app.address, drain=30) as guard:
        host, _, port = guard.address.rpartition(":")
        with socket.create_connection((host, int(port)), PATIENCE) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            began = time.monotonic()
            with suppress(ConnectionError):
                while time.monotonic() < began + PATIENCE:
                    plain.sendall(b"x")
                    time.sleep(0.2)
        assert time.monotonic() - began < PATIENCE / 3


def test_a_drain_waits_for_no_refused_upload(ca: Ca, tmp_path: Path) -> None:
    """Whoever sends on after a refusal has but a moment once the guard is told to stop."""
    with App() as app, Running(ca, app.address, parse_policy(["any /ok"]), drain=30) as guard:
        tls = _open(guard, ca, tmp_path)
        tls.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        assert _read(tls, b"}\n").startswith(b"HTTP/1.1 403 ")
        (connection,) = guard.guard.connections
        guard.call(connection.drain)
        began = time.monotonic()
        with suppress(ConnectionError, ssl.SSLError):
            while time.monotonic() < began + PATIENCE:
                tls.sendall(b"x")
                time.sleep(0.2)
        assert time.monotonic() - began < PATIENCE / 3
        tls.close()


def test_a_slow_reader_gets_the_whole_of_a_last_answer(ca: Ca, tmp_path: Path) -> None:
    """An answer after which the connection closes arrives whole, though its client takes longer than a moment."""
    body = bytes(1 << 20)

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)

    with App(answer) as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        (connection,) = guard.guard.connections
        plug = connection.transport.get_extra_info("socket")
        guard.call(plug.setsockopt, socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        tls.sendall(get("/", close=True))
        got = 0
        while not isinstance(connection._state, entry.Lingering):  # the guard has all of it
            got += len(tls.recv(1 << 13))
        assert guard.call(connection.transport.get_write_buffer_size) > 0
        began = time.monotonic()
        until(lambda: time.monotonic() > began + 1.5 * LINGER, "a client that is slow")
        with suppress(ssl.SSLZeroReturnError):
            while piece := tls.recv(1 << 16):
                got += len(piece)
        assert got > len(body)


def test_a_websocket_is_a_tunnel_after_101(ca: Ca, tmp_path: Path) -> None:
    """After the app agreed to a websocket, bytes go both ways; one that it declines ends the connection."""

    def answer(connection: socket.socket, request: bytes) -> None:
        if b"/no" in request:
            connection.sendall(HELLO)
            return
        connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst"
        )
        while data := connection.recv(1 << 16):
            connection.sendall(data.upper())

    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
    with App(answer) as app, Running(ca, app.address) as guard:
        with _open(guard, ca, tmp_path) as tls:
            tls.sendall(get("/ws", "localhost", *upgrade, close=False))
            assert _read(tls, b"first").startswith(b"HTTP/1.1 101 ")
            tls.sendall(b"frames")
            assert _read(tls, b"FRAMES") == b"FRAMES"
        with _open(guard, ca, tmp_path) as tls:
            tls.sendall(get("/no", "localhost", *upgrade, close=False) + get("/behind", close=False))
            answer_bytes = b""
            while piece := tls.recv(1 << 16):
                answer_bytes += piece
            assert answer_bytes.count(b"HTTP/1.1 ") == 1
        assert b"/behind" not in app.received


def test_an_app_that_is_down_is_502(ca: Ca, ask: Ask) -> None:
    """A refused connection to the app is 502, with a log line that names the app."""
    with refusing() as address, Running(ca, address) as guard:
        answer = ask(guard, ca.client())
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == "upstream.down"
        assert address.rpartition(":")[2] in guard.events.next("request")["detail"]


def test_an_app_that_is_slow_is_504(ca: Ca, ask: Ask) -> None:
    """An app that does not answer in time is 504."""
    with (
        App(lambda connection, request: None) as app,
        Running(ca, app.address, limits=Limits(response=0.3), drain=1) as guard,
    ):
        assert ask(guard, ca.client()).startswith(b"HTTP/1.1 504 ")
        assert guard.events.next("request")["reason"] == "upstream.timeout"


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad Header: x\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
def test_an_answer_that_is_not_http_is_502(ca: Ca, ask: Ask, answer: bytes) -> None:
    """What the app must not say is not passed on; the client gets 502."""
    with App(lambda connection, request: connection.sendall(answer)) as app, Running(ca, app.address) as guard:
        assert ask(guard, ca.client()).startswith(b"HTTP/1.1 502 ")


def test_an_answer_cut_short_is_not_passed_as_whole(ca: Ca, tmp_path: Path) -> None:
    """When the app dies in the midst of its answer, the client's connection breaks too."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        connection.shutdown(socket.SHUT_RDWR)

    with App(answer) as app, Running(ca, app.address) as guard:
        with _open(guard, ca, tmp_path) as tls:
            tls.sendall(get())
            with pytest.raises((ssl.SSLError, ConnectionError)):
                _read(tls, b"the end never comes")
        assert guard.events.next("request")["reason"] == "upstream.bad_response"


def test_a_kept_connection_that_the_app_closed_is_opened_again(ca: Ca, tmp_path: Path) -> None:
    """The app may close its idle connection; the next safe request is sent on a new one."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(HELLO)
        connection.shutdown(socket.SHUT_RDWR)

    with App(answer) as app, Running(ca, app.address) as guard, _open(guard, ca, tmp_path) as tls:
        for _ in range(3):
            tls.sendall(get(close=False))
            assert _read(tls, b"Hello World\n").startswith(b"HTTP/1.1 200 ")
        assert app.connections == 3


def test_a_slow_head_is_cut_off(ca: Ca, tmp_path: Path) -> None:
    """A request whose head does not come in time is 408."""
    limits = Limits(head=0.3)
    with App() as app, Running(ca, app.address, limits=limits) as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(b"GET / HT")
        assert _read(tls, b"}\n").startswith(b"HTTP/1.1 408 ")


def test_a_log_that_fails_stops_forwarding(ca: Ca, ask: Ask) -> None:
    """While the log cannot be written nothing is forwarded; when it can again, requests go on."""
    with App() as app, Running(ca, app.address) as guard:
        guard.events.fail = True
        ask(guard, None)
        until(lambda: guard.guard.log.broken, "a broken log")
        seen = app.connections
        assert ask(guard, ca.client()).startswith(b"HTTP/1.1 503 ")
        assert app.connections == seen
        guard.events.fail = False
        ask(guard, None)
        until(lambda: not guard.guard.log.broken, "a log that works again")
        assert ask(guard, ca.client()).startswith(b"HTTP/1.1 200 ")


def test_a_query_is_forwarded_and_never_logged(ca: Ca, ask: Ask) -> None:
    """The query reaches the app; the log has the path alone."""
    with App() as app, Running(ca, app.address) as guard:
        ask(guard, ca.client(), get("/x?token=secret"))
        assert b"GET /x?token=secret HTTP/1.1" in app.received
        assert guard.events.next("request")["path"] == "/x"
        assert "secret" not in json.dumps(guard.events.all)


def test_http10_is_served_and_closed(ca: Ca, ask: Ask) -> None:
    """An HTTP/1.0 client gets its answer without chunks, and the close that ends it."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")

    with App(answer) as app, Running(ca, app.address) as guard:
        answer_bytes = ask(guard, ca.client(), b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert answer_bytes.partition(b"\r\n\r\n")[2] == b"hello"


def test_a_unix_socket_is_a_target(ca: Ca, tmp_path: Path) -> None:
    """An app on a UNIX socket is reached as one on a port is."""
    path = tmp_path / "app.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    import threading

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(HELLO)

    threading.Thread(target=serve, daemon=True).start()
    with Running(ca, f"unix:{path}") as guard, listener:
        context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
        assert talk(guard.address, context, get()).endswith(b"Hello World\n")
