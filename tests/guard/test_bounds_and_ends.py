"""What a refused or slow client, an app that resets, or a log that fails cannot bring about."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from pathlib import Path

import pytest

from handfast.guard.connection import Limits
from handfast.policy import parse_policy
from tests.guard.conftest import Ask
from tests.support.apps import App, client_context, echo_head, get
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.waiting import PATIENCE


def _open(guard: Running, ca: Ca, folder: Path) -> ssl.SSLSocket:
    host, _, port = guard.address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=PATIENCE)
    context = client_context(ca.save(folder, "ca"), ca.client(), folder)
    return context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)


@pytest.mark.parametrize("first", ["/no", "/bad/../x"])
def test_the_body_of_a_refused_request_is_no_request(ca: Ca, ask: Ask, first: str) -> None:
    """F1: whatever a refused request carries as its body, none of it reaches the app."""
    body = get("/ok/smuggled", close=False) * 12_000  # several of the guard's reads
    head = f"POST {first} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with App() as app, Running(ca, app.address, parse_policy(["any /ok/**"])) as guard:
        try:
            answer = ask(guard, ca.client(), head + body)
        except (ssl.SSLError, ConnectionError):
            answer = b""  # it was cut off while it sent
        assert answer.count(b"HTTP/1.1 ") <= 1
        assert not app.received


def test_no_header_moves_the_path_or_the_method(ca: Ca, ask: Ask) -> None:
    """F2: what app servers take for another path or method does not get through where rules judge them."""
    moved = ("SCRIPT_NAME: /public", "Path-Info: /admin", "X-Forwarded-Prefix: /public", "X-Forwarded-Host: evil")
    method = ("X-HTTP-Method-Override: DELETE", "X-Forwarded-Method: DELETE")
    for rules in (["any GET"], ["any /**"]):
        with App(echo_head) as app, Running(ca, app.address, parse_policy(rules)) as guard:
            seen = ask(guard, ca.client(), get("/x", "localhost", *moved, *method)).lower()
            for header in (*moved, *method):
                assert header.partition(":")[0].lower().encode() not in seen, header


def test_a_byte_now_and_then_buys_no_time(ca: Ca, tmp_path: Path) -> None:
    """F5: a head that trickles in is cut off when its time is up, whatever came meanwhile."""
    limits = Limits(head=0.5, idle=0.5)
    with App() as app, Running(ca, app.address, limits=limits) as guard, _open(guard, ca, tmp_path) as tls:
        tls.settimeout(0.05)
        began, answer = time.monotonic(), b""
        while not answer and time.monotonic() - began < PATIENCE:
            try:
                tls.send(b"G")
                answer = tls.recv(100)
            except TimeoutError:
                continue
            except (ssl.SSLError, ConnectionError):
                break
        assert time.monotonic() - began < 10


def test_a_client_that_does_not_read_cannot_fill_the_memory(ca: Ca, tmp_path: Path) -> None:
    """F5: of 200,000 refusals that nobody reads the guard holds a few."""
    request = get("/denied", close=False) * 100
    with App() as app, Running(ca, app.address, parse_policy(["any /ok"])) as guard, _open(guard, ca, tmp_path) as tls:
        tls.settimeout(0.3)
        with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError):
            for _ in range(2_000):
                tls.sendall(request)
        assert guard.guard.connections
        for connection in list(guard.guard.connections):
            assert guard.call(connection.transport.get_write_buffer_size) < 1 << 20


@pytest.mark.parametrize("tcp", [False, True])
def test_a_reset_of_the_app_is_no_end(ca: Ca, tmp_path: Path, tcp: bool) -> None:
    """An answer that ends with a reset is not passed on as one that ended."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    with (
        App(answer) as app,
        Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard,
        _open(guard, ca, tmp_path) as tls,
    ):
        tls.sendall(get(close=False) if tcp else b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\na")
        got = b""
        while not got.endswith(b"half"):
            got += tls.recv(1 << 16)
        tls.sendall(b"b")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            tls.recv(1 << 16)


def test_a_denial_before_an_allowance_ends_a_tunnel(ca: Ca, tmp_path: Path) -> None:
    """A14: a new policy that denies the peer first ends its open tunnel, though a later rule would allow it."""

    class Echo(App):
        def _serve(self, connection: socket.socket) -> None:
            with connection, contextlib.suppress(ConnectionError):
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

    with Echo() as app, Running(ca, f"tcp://{app.address}") as guard, _open(guard, ca, tmp_path) as tls:
        tls.sendall(b"hello")
        assert tls.recv(5) == b"hello"
        guard.swap(guard.snapshot(parse_policy(["deny spiffe://test/web", "any"])))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            tls.recv(1)
        assert guard.events.next("ended")["reason"] == "ended.policy"


def test_a_log_that_fails_stops_tunnels_too(ca: Ca, tmp_path: Path) -> None:
    """While the log cannot be written no new tunnel is opened."""
    with App() as app, Running(ca, f"tcp://{app.address}") as guard:
        guard.guard.log.broken = True
        with _open(guard, ca, tmp_path) as tls:
            assert tls.recv(1) == b""
        assert app.connections == 0
