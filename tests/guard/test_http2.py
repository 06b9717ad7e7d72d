"""HTTP/2 clients: many requests at a time, each judged for itself; websockets, bodies, ends."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from h2.errors import ErrorCodes

from handfast.guard.connection import Limits
from handfast.guard.routes import Site, Sites, Snapshot
from handfast.policy import parse_policy
from tests.support.apps import HELLO, App, client_context, echo_head, get, talk
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.http2 import Answer, Client
from tests.support.waiting import PATIENCE, until

Enter = Callable[..., Client]


@pytest.fixture
def enter(ca: Ca, tmp_path: Path) -> Enter:
    """Connect to a guard as a client that speaks HTTP/2."""
    bundle = ca.save(tmp_path, "ca")

    def enter(guard: Running, leaf: Leaf | None = None, *, greedy: bool = True, **initial: int) -> Client:
        return Client(guard.address, client_context(bundle, leaf or ca.client(), tmp_path), greedy=greedy, **initial)

    return enter


def _curl(guard: Running, ca: Ca, leaf: Leaf, folder: Path, *more: str) -> str:
    cert, key = leaf.save(folder, "curl")
    command = ["curl", "-sSi", "--cacert", str(ca.save(folder, "ca")), "--cert", str(cert), "--key", str(key), *more]
    command.append(f"https://localhost:{guard.address.rpartition(':')[2]}/")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


# Who speaks what, and who is told what.


def test_the_protocol_is_chosen_by_alpn(ca: Ca, tmp_path: Path) -> None:
    """curl speaks HTTP/2 of itself, HTTP/1.1 when told to, and each is told who calls in the same words."""
    with App(echo_head) as app, Running(ca, app.address) as guard:
        new = _curl(guard, ca, ca.client("spiffe://test/web"), tmp_path)
        old = _curl(guard, ca, ca.client("spiffe://test/web"), tmp_path, "--http1.1")
    assert new.startswith("HTTP/2 200")
    assert old.startswith("HTTP/1.1 200 OK")
    for answer in (new, old):
        assert 'Client-Identity: "spiffe://test/web"' in answer


def test_identity_headers_are_ours_alone(ca: Ca, enter: Enter) -> None:
    """No spelling of a header that says who calls gets through; ours do, once."""
    spoofed = [
        *(("client-cert", ":bm9wZQ==:"), ("client_cert", "x"), ("client.cert", "x"), ("client-identity", "admin")),
        *(("client_identity", "admin"), ("x-ssl-client-verify", "SUCCESS"), ("x-forwarded-client-cert", "x")),
        *(("x-forwarded-for", "6.6.6.6"), ("forwarded", "for=6.6.6.6"), ("te", "trailers"), ("x-mine", "kept")),
    ]
    with App(echo_head) as app, Running(ca, app.address) as guard:
        with enter(guard, ca.client("spiffe://test/web")) as client:
            seen = client.get("/", *spoofed).body.decode()
        event = guard.events.next("request")
    lines = [line.partition(": ") for line in seen.split("\r\n")[1:]]
    values = {name: value for name, _, value in lines}
    folded = [re.sub("[^a-z0-9]", "", name.lower()) for name, _, _ in lines]
    assert values["Client-Identity"] == '"spiffe://test/web"'
    assert values["X-Forwarded-For"] == "127.0.0.1"
    assert values["x-mine"] == "kept"
    assert folded.count("clientcert") == folded.count("clientidentity") == folded.count("xforwardedfor") == 1
    assert not {"xsslclientverify", "xforwardedclientcert", "forwarded", "te", "connection"} & set(folded)
    assert (event["decision"], event["status"], event["method"], event["path"]) == ("allow", 200, "GET", "/")
    assert event["peer"] == "spiffe://test/web"


def test_a_refused_client_is_told_over_http_2(ca: Ca, enter: Enter, tmp_path: Path) -> None:
    """A client of another authority, or without a certificate, gets the reason on its first stream, then GOAWAY."""
    stranger = Ca.root("Other").client()
    with App() as app, Running(ca, app.address) as guard:
        with enter(guard, stranger) as client:
            answer = client.get()
            client.until(lambda: client.goaway is not None)
        refused = guard.events.next("connection")
        assert _curl(guard, ca, stranger, tmp_path).startswith("HTTP/2 403")
        assert app.connections == 0
        assert client.goaway == (ErrorCodes.NO_ERROR, 1)
        assert answer.status == 403
        assert json.loads(answer.body) == {"error": refused["reason"], "id": refused["id"]}
        with enter(guard) as good:
            assert good.get().status == 200


def test_all_that_a_refused_client_asks_at_once_is_answered(ca: Ca, enter: Enter) -> None:
    """Three requests in one breath: each has the reason, and GOAWAY names the last."""
    with App() as app, Running(ca, app.address) as guard, enter(guard, Ca.root("Other").client()) as client:
        for stream in (1, 3, 5):
            client.h2.send_headers(stream, client.head(), end_stream=True)
        client.flush()
        client.until(lambda: client.closed)
        assert [client.answers[stream].status for stream in (1, 3, 5)] == [403] * 3
        assert all(json.loads(client.answers[stream].body)["error"] == "verify.unknown_issuer" for stream in (1, 3, 5))
        assert client.goaway == (ErrorCodes.NO_ERROR, 5)
        assert app.connections == 0


def test_a_refused_client_that_asks_for_too_much_is_cut(ca: Ca, enter: Enter) -> None:
    """A refused client that sends no request but other frames is not read for ever."""
    with App() as app, Running(ca, app.address) as guard, enter(guard, Ca.root("Other").client()) as client:
        for _ in range(20):
            client.raw(_frame(0xFA, 0, 0, b"x" * 16_000))
        client.until(lambda: client.closed)
        assert app.connections == 0


# Each stream for itself.


def test_a_wrong_authority_is_421_and_the_connection_goes_on(ca: Ca, enter: Enter) -> None:
    """Browsers send requests for one name over another's connection: that stream is told, the others are served."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
        fields = client.head()
        fields[2] = (":authority", "other.test")
        wrong = client.wait(client.send(fields))
        assert wrong.status == 421
        assert json.loads(wrong.body)["error"] == "http.misdirected"
        assert guard.events.next("request")["reason"] == "http.misdirected"
        assert app.connections == 0
        assert client.get().status == 200


def test_each_stream_is_judged_for_itself(ca: Ca, enter: Enter) -> None:
    """What the policy denies is 403 on its stream, with the rule in the log; what it allows goes on beside it."""
    policy = parse_policy(["allow any GET /open/**", "deny any /closed"])
    with App() as app, Running(ca, app.address, policy) as guard, enter(guard) as client:
        streams = [client.send(client.head(path)) for path in ("/open/a", "/closed", "/else", "/open/b")]
        assert [client.wait(stream).status for stream in streams] == [200, 403, 403, 200]
        assert client.get("/open/../closed").status == 400
        assert app.received.count(b"GET /") == 2


MALFORMED: dict[str, list[tuple[str, str]]] = {
    "upper_case": [("X-Upper", "a")],
    "connection": [("connection", "client-cert")],
    "transfer_encoding": [("transfer-encoding", "chunked")],
    "folded": [("transfer_encoding", "chunked")],
    "line": [("a", "b\r\nclient-cert: x")],
    "nul": [("a", "b\0c")],
    "te": [("te", "gzip")],
    "host": [("host", "other.test")],
    "late": [(":path", "/b")],
    "many": [("a", "b")] * 101,
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_ends_its_stream_alone(ca: Ca, enter: Enter, case: str) -> None:
    """It is answered 4xx, no byte of it reaches the app, and the next request is served."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
        answer = client.get("/bad", *MALFORMED[case])
        assert answer.status in (400, 431)
        assert app.connections == 0
        assert client.get("/good").status == 200
        assert b"/bad" not in app.received


@pytest.mark.parametrize("sent", [3, 7])
def test_a_body_that_belies_its_length_is_never_whole(ca: Ca, enter: Enter, sent: int) -> None:
    """Less or more than Content-Length says ends the connection; the app gets no more than it was told of."""
    with App(lambda *_: None) as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.send(client.head("/", ("content-length", "5"), method="POST"), b"x" * sent)
        client.until(lambda: client.closed)
        assert guard.events.next("ended")["reason"] == "http.h2"
        assert client.goaway is not None
        assert bytes(app.received).partition(b"\r\n\r\n")[2].count(b"x") <= 3


def test_methods_that_make_tunnels_are_refused(ca: Ca, enter: Enter) -> None:
    """CONNECT, and an extended one for anything but a websocket, are 405."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
        plain = [(":method", "CONNECT"), (":authority", client.authority)]
        assert client.wait(client.send(plain, None)).status == 405
        tunnel = [*client.head(method="CONNECT"), (":protocol", "connect-ip")]
        assert client.wait(client.send(tunnel, None)).status == 405
        assert app.connections == 0


def test_two_identities_never_mix(ca: Ca, enter: Enter) -> None:
    """Two clients with many requests each, interleaved: every answer belongs to its asker."""
    with App(echo_head) as app, Running(ca, app.address) as guard:
        names = ["spiffe://test/one", "spiffe://test/two"]
        with enter(guard, ca.client(names[0])) as one, enter(guard, ca.client(names[1])) as two:
            asked: list[tuple[Client, str, str, int]] = []
            for number in range(150):
                for client, name in ((one, names[0]), (two, names[1])):
                    path = f"/{name[-3:]}/{number}"
                    asked.append((client, name, path, client.send(client.head(path))))
                if number % 20 == 19:
                    _attributed(asked)
                    asked.clear()
            _attributed(asked)
    assert app.connections >= 2


def _attributed(asked: list[tuple[Client, str, str, int]]) -> None:
    for client, name, path, stream in asked:
        seen = client.wait(stream).body.decode()
        assert seen.startswith(f"GET {path} HTTP/1.1\r\n")
        assert f'Client-Identity: "{name}"' in seen


# Bodies, heads and ends on their way through.


def _upload(connection: socket.socket, request: bytes) -> None:
    """Answer with the SHA-256 of a body that is chunked."""
    body = bytearray(request.partition(b"\r\n\r\n")[2])
    while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
        body += connection.recv(1 << 16)
    total, at = hashlib.sha256(), 0
    while (size := int(body[at : (end := body.index(b"\r\n", at))], 16)) > 0:
        total.update(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    digest = total.hexdigest().encode()
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + digest)


def test_bodies_go_through_whole(ca: Ca, enter: Enter) -> None:
    """Three MiB up, chunked for the app, arrive as they were; so do three MiB down."""
    body = hashlib.shake_128(b"seed").digest(3 << 20)

    def download(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(body), 50_000):
            piece = body[at : at + 50_000]
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        connection.sendall(b"0\r\n\r\n")

    with App(_upload) as app, Running(ca, app.address) as guard, enter(guard) as client:
        up = client.get(method="POST", body=body)
        assert up.body.decode() == hashlib.sha256(body).hexdigest()
        assert guard.events.next("request")["bytes_in"] == len(body)
    with App(download) as app, Running(ca, app.address) as guard, enter(guard) as client:
        down = client.get()
        assert down.ended
        assert down.body == body
        assert "transfer-encoding" not in down.headers


def test_an_answer_that_nobody_reads_waits_at_the_app(ca: Ca, enter: Enter) -> None:
    """With the client's window shut, the app is stopped; another stream is served meanwhile; then all of it comes."""
    size, sent = 24 << 20, threading.Event()

    def flood(connection: socket.socket, request: bytes) -> None:
        if b"/small" in request:
            connection.sendall(HELLO)
            return
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        connection.sendall(b"x" * size)
        sent.set()

    with App(flood) as app, Running(ca, app.address) as guard, enter(guard, greedy=False) as client:
        client.h2.increment_flow_control_window(1 << 20)
        stream = client.send(client.head())
        client.wait(stream, lambda answer: len(answer.body) == 65_535)
        assert client.get("/small").status == 200
        assert not sent.is_set()
        client.greedy = True
        client.h2.increment_flow_control_window(1 << 30)
        client.h2.increment_flow_control_window(1 << 30, stream)
        client.flush()
        answer = client.wait(stream)
        assert len(answer.body) == size
        assert sent.wait(PATIENCE)


def test_a_request_that_the_app_does_not_read_waits_at_the_client(ca: Ca, enter: Enter) -> None:
    """An app that stops reading stops the client, within the windows, not the guard's memory; the rest goes on."""
    go = threading.Event()

    def lazy(connection: socket.socket, request: bytes) -> None:
        if b"/small" in request:
            connection.sendall(HELLO)
            return
        go.wait(2 * PATIENCE)
        _upload(connection, request)

    body = b"x" * (16 << 20)
    with App(lazy) as app, Running(ca, app.address) as guard, enter(guard) as client:
        stream = client.send(client.head(method="POST"), None)
        client.tls.settimeout(1)
        sent = _fill(client, stream, body)
        assert sent < len(body)
        client.tls.settimeout(PATIENCE)
        assert client.get("/small").status == 200
        go.set()
        client.body(stream, body[sent:], last=True)
        assert client.wait(stream).body.decode() == hashlib.sha256(body).hexdigest()


def _fill(client: Client, stream: int, body: bytes) -> int:
    """Send until no window is given back any more; return how much."""
    sent = 0
    while True:
        room = min(client.h2.local_flow_control_window(stream), 16_384)
        if room:
            client.body(stream, body[sent : sent + room])
            sent += room
        else:
            try:
                client.read()
            except AssertionError:
                return sent


ANSWERS = {
    "head": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", 200, b""),
    "no_content": ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "not_modified": ("GET", b'HTTP/1.1 304 Not Modified\r\nETag: "a"\r\nContent-Length: 9\r\n\r\n', 304, b""),
    "empty": ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
    "early_hints": ("GET", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + HELLO, 200, b"Hello World\n"),
    "continue": ("GET", b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO, 200, b"Hello World\n"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_without_bodies_and_before_answers(ca: Ca, enter: Enter, case: str) -> None:
    """HEAD, 204, 304 and an empty body end with the head; 103 goes through, 100 only to who asked for it."""
    method, answer, status, body = ANSWERS[case]
    with App(lambda connection, _: connection.sendall(answer)) as app, Running(ca, app.address) as guard:
        with enter(guard) as client:
            for _ in range(2):
                got = client.get(method=method)
                assert (got.status, bytes(got.body), got.ended) == (status, body, True)
                assert [one[":status"] for one in got.informational] == (["103"] if case == "early_hints" else [])
        assert app.connections == 1


def test_expect_is_passed_on(ca: Ca, enter: Enter) -> None:
    """A client that waits for 100 gets it from the app, before it sends its body."""

    def careful(connection: socket.socket, request: bytes) -> None:
        assert b"Expect: 100-continue" in request
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        _upload(connection, request)

    with App(careful) as app, Running(ca, app.address) as guard, enter(guard) as client:
        stream = client.send(client.head("/", ("expect", "100-continue"), method="POST"), None)
        client.wait(stream, lambda answer: bool(answer.informational))
        assert client.answers[stream].informational[0][":status"] == "100"
        client.body(stream, b"abc", last=True)
        assert client.wait(stream).body.decode() == hashlib.sha256(b"abc").hexdigest()


def test_a_client_is_told_to_go_on_where_the_app_does_not(ca: Ca, enter: Enter) -> None:
    """An app that never says 100 has the body all the same: after a moment the guard asks for it."""
    with App(_upload) as app, Running(ca, app.address) as guard, enter(guard) as client:
        stream = client.send(client.head("/", ("expect", "100-continue"), method="POST"), None)
        client.wait(stream, lambda answer: bool(answer.informational))
        assert client.answers[stream].informational[0][":status"] == "100"
        client.body(stream, b"abc", last=True)
        assert client.wait(stream).body.decode() == hashlib.sha256(b"abc").hexdigest()


CUT = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nHello",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nHello\r\n",
    "bad_chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nHello\r\nx\r\n",
}


@pytest.mark.parametrize("case", CUT)
def test_a_cut_answer_never_looks_whole(ca: Ca, enter: Enter, case: str) -> None:
    """The stream is reset; one that ends where the app closes, as it may, is whole."""

    def cut(connection: socket.socket, request: bytes) -> None:
        whole = b"HTTP/1.1 200 OK\r\n\r\nHello"
        connection.sendall(whole if b"/whole" in request else CUT[case])
        connection.shutdown(socket.SHUT_RDWR)

    with App(cut) as app, Running(ca, app.address) as guard, enter(guard) as client:
        answer = client.get()
        assert (answer.status, answer.ended, answer.reset) == (200, False, ErrorCodes.INTERNAL_ERROR)
        assert guard.events.next("request")["reason"] == "upstream.bad_response"
        whole = client.get("/whole")
        assert (bytes(whole.body), whole.ended) == (b"Hello", True)


def test_faults_of_the_app_are_told(ca: Ca, enter: Enter) -> None:
    """No app is 502, a malformed answer 502, no answer in time 504; the connection goes on."""
    with Running(ca, "127.0.0.1:1") as guard, enter(guard) as client:
        assert json.loads(client.get().body)["error"] == "upstream.down"
        assert client.get(method="POST", body=b"x").status == 502

    def odd(connection: socket.socket, request: bytes) -> None:
        if b"/odd" in request:
            connection.sendall(b"SMTP ready\r\n\r\n")

    with App(odd) as app, Running(ca, app.address, limits=Limits(response=2)) as guard, enter(guard) as client:
        assert client.get("/odd").status == 502
        assert client.get("/never").status == 504
        assert json.loads(client.get("/never").body)["error"] == "upstream.timeout"


def test_a_request_trailer_stays_here(ca: Ca, enter: Enter) -> None:
    """Trailers end a body towards an HTTP/1.1 app and are not in it; malformed ones reset the stream."""
    with App(_upload) as app, Running(ca, app.address) as guard, enter(guard) as client:
        stream = client.send(client.head(method="POST"), None)
        client.body(stream, b"abc")
        client.h2.send_headers(stream, [("client-cert", "x"), ("a", "b")], end_stream=True)
        client.flush()
        assert client.wait(stream).body.decode() == hashlib.sha256(b"abc").hexdigest()
        assert b"client-cert: x" not in app.received
        stream = client.send(client.head(method="POST"), None)
        client.h2.send_headers(stream, [("connection", "x")], end_stream=True)
        client.flush()
        assert client.wait(stream).reset == ErrorCodes.PROTOCOL_ERROR
        assert client.get(method="POST", body=b"x").status == 200


def test_connections_to_the_app_are_kept_for_one_client(ca: Ca, enter: Enter) -> None:
    """Requests one after another take one connection; another client never gets it; a closed one is asked anew."""

    def once(connection: socket.socket, request: bytes) -> None:
        connection.sendall(HELLO)
        if b"/close" in request:
            connection.shutdown(socket.SHUT_RDWR)

    with App(once) as app, Running(ca, app.address) as guard, enter(guard) as one, enter(guard) as two:
        for _ in range(5):
            assert one.get().status == 200
        assert app.connections == 1
        assert two.get().status == 200
        assert app.connections == 2
        assert one.get("/close").status == 200
        assert one.get("/after").status == 200
        assert one.get("/after", method="POST", body=b"").status == 200
        assert app.connections == 3


# Websockets (RFC 8441).


def _websocket(connection: socket.socket, request: bytes) -> None:
    """Agree to a websocket, and send back what comes; or not, as the path says."""
    found = re.search(rb"Sec-WebSocket-Key: (\S+)\r\n", request)
    if b"/no" in request or found is None:
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")
        return
    key = b"x" if b"/wrong" in request else found[1]
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    connection.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Protocol: chat\r\nSec-WebSocket-Accept: %b\r\n\r\nhi" % accept
    )
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def _open_websocket(client: Client, path: str = "/") -> tuple[int, Answer]:
    fields = client.head(path, ("sec-websocket-version", "13"), ("sec-websocket-key", "mine"), method="CONNECT")
    fields.insert(1, (":protocol", "websocket"))
    stream = client.send(fields, None)
    return stream, client.wait(stream, lambda answer: bool(answer.status) or answer.over)


def test_a_websocket_goes_through(ca: Ca, enter: Enter) -> None:
    """An extended CONNECT becomes an upgrade, answered 200; bytes go both ways; the end of one is the other's."""
    with App(_websocket) as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.until(lambda: client.h2.remote_settings.enable_connect_protocol == 1)
        stream, answer = _open_websocket(client)
        assert answer.status == 200
        assert answer.headers["sec-websocket-protocol"] == "chat"
        assert not {"sec-websocket-accept", "upgrade", "connection"} & set(answer.headers)
        client.body(stream, b"ping")
        client.wait(stream, lambda one: one.body == b"hiping")
        assert client.get("/no").status == 404
        client.body(stream, b"", last=True)
        client.h2.end_stream(stream)
        client.flush()
        assert client.wait(stream).ended
        sent = bytes(app.received)
        assert sent.startswith(b"GET / HTTP/1.1\r\n")
        assert sent.count(b"Sec-WebSocket-Key") == 1
        assert b"mine" not in sent


def test_a_websocket_that_the_app_does_not_give(ca: Ca, enter: Enter) -> None:
    """Its refusal is the answer; a 101 that proves nothing, or that nobody asked for, is its fault."""
    with App(_websocket) as app, Running(ca, app.address) as guard, enter(guard) as client:
        stream, answer = _open_websocket(client, "/no")
        assert client.wait(stream).body == b"no"
        assert answer.status == 404
        assert _open_websocket(client, "/wrong")[1].status == 502
    unasked = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    unasking = App(lambda plain, _: plain.sendall(unasked))
    with unasking as app, Running(ca, app.address) as guard, enter(guard) as client:
        assert client.get().status == 502


# Time, policy, and the end of a connection.


def test_a_new_policy_ends_what_it_forbids(ca: Ca, enter: Enter) -> None:
    """A websocket that the new policy forbids is reset; one that it allows goes on; new streams are judged by it."""
    with App(_websocket) as app, Running(ca, app.address, parse_policy(["allow any"])) as guard, enter(guard) as client:
        stay, _ = _open_websocket(client, "/stay")
        go, _ = _open_websocket(client, "/go")
        assert client.get("/no").status == 404
        guard.swap(guard.snapshot(parse_policy(["allow any /stay"])))
        assert client.wait(go).reset == ErrorCodes.INTERNAL_ERROR
        client.body(stay, b"still")
        client.wait(stay, lambda answer: answer.body == b"histill")
        assert client.get("/no").status == 403


def test_idle_connections_close_with_goaway(ca: Ca, enter: Enter) -> None:
    """Without a request for the idle limit a connection ends, politely; pings buy no time."""
    with App() as app, Running(ca, app.address, limits=Limits(idle=2)) as guard, enter(guard) as client:
        assert client.get().status == 200
        began = time.monotonic()
        client.h2.ping(b"12345678")
        client.flush()
        client.until(lambda: client.closed)
        assert client.pongs == 1
        assert client.goaway == (ErrorCodes.NO_ERROR, 1)
        assert time.monotonic() - began < 15


def test_a_drain_lets_streams_finish(ca: Ca, enter: Enter) -> None:
    """Told to stop, the guard says GOAWAY, answers what was on its way, refuses more, and closes when all is said."""
    go = threading.Event()

    def slow(connection: socket.socket, _request: bytes) -> None:
        go.wait(PATIENCE)
        connection.sendall(HELLO)

    with App(slow) as app, Running(ca, app.address, drain=20) as guard, enter(guard) as client:
        stream = client.send(client.head())
        until(lambda: app.connections == 1, "the request at the app")
        guard.call(next(iter(guard.guard.connections)).drain)
        on_its_way = client.send(client.head("/on-its-way"))
        client.until(lambda: client.goaway is not None)
        assert client.goaway == (ErrorCodes.NO_ERROR, 2**31 - 1)
        client.until(lambda: client.goaway != (ErrorCodes.NO_ERROR, 2**31 - 1))
        assert client.goaway == (ErrorCodes.NO_ERROR, on_its_way)
        late = client.send(client.head("/late"))
        assert client.wait(late).reset == ErrorCodes.REFUSED_STREAM
        go.set()
        assert client.wait(stream).ended
        assert client.wait(on_its_way).status == 200
        client.until(lambda: client.closed)
        assert b"/late" not in app.received


def test_a_drain_ends_a_connection_that_rests(ca: Ca, enter: Enter) -> None:
    """One that asked lately may ask once more, and is closed after a second; and so is one that never asks again."""
    with App() as app, Running(ca, app.address, drain=20) as guard, enter(guard) as client:
        assert client.get("/first").status == 200
        guard.call(next(iter(guard.guard.connections)).drain)
        client.until(lambda: client.goaway is not None)
        assert client.get("/on-its-way").status == 200
        client.until(lambda: client.closed)
        assert client.goaway == (ErrorCodes.NO_ERROR, 3)


def test_a_bug_ends_its_connection_alone(ca: Ca, enter: Enter) -> None:
    """An exception while a stream is served ends that connection, closed and said; others go on."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as good:
        assert good.get().status == 200
        healthy = guard.guard.snapshot

        def broken(*_: object) -> tuple[()]:
            raise ZeroDivisionError("a bug")

        sites = [replace(site, identify=broken) for site in healthy.sites["main"].all]
        guard.call(setattr, guard.guard, "snapshot", Snapshot({"main": Sites(sites)}))
        with enter(guard) as bad:
            bad.send(bad.head())
            bad.until(lambda: bad.closed)
        assert "ZeroDivisionError" in guard.events.next("ended")["detail"]
        assert good.get().status == 200
        assert isinstance(sites[0], Site)


def test_http_1_is_as_before(ca: Ca, tmp_path: Path) -> None:
    """A client that names no protocol speaks HTTP/1.1."""
    with App() as app, Running(ca, app.address) as guard:
        context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
        assert talk(guard.address, context, get()).startswith(b"HTTP/1.1 200 OK")


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body
