"""What cannot be asked again goes to an app on a connection that the app is not about to close."""

from __future__ import annotations

import socket
import ssl
from http.client import HTTPResponse
from pathlib import Path

import pytest
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection

from handfast.guard.places import parse_target
from handfast.guard.upstream import Backend
from tests.support.apps import App, client_context
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.waiting import PATIENCE


def _ask(tls: ssl.SSLSocket, method: str) -> int:
    length = "" if method == "GET" else "Content-Length: 0\r\n"
    tls.sendall(f"{method} / HTTP/1.1\r\nHost: localhost\r\n{length}\r\n".encode())
    with HTTPResponse(tls, method=method) as response:
        response.begin()
        response.read()
        return response.status


def _ask_h2(tls: ssl.SSLSocket, machine: H2Connection, method: str) -> None:
    stream = machine.get_next_available_stream_id()
    head = [(":method", method), (":path", "/"), (":scheme", "https"), (":authority", "localhost")]
    machine.send_headers(stream, head, end_stream=True)
    tls.sendall(machine.data_to_send())
    while True:
        for event in machine.receive_data(tls.recv(1 << 16)):
            if isinstance(event, events.StreamEnded) and event.stream_id == stream:
                return
        tls.sendall(machine.data_to_send())


@pytest.mark.parametrize(("method", "rested", "dials"), [("POST", True, 3), ("POST", False, 1), ("GET", True, 1)])
@pytest.mark.parametrize("h2", [False, True])
def test_a_post_takes_no_connection_that_rested(
    ca: Ca, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, rested: bool, dials: int, h2: bool
) -> None:
    """A POST goes to the app on a fresh connection when the kept one has rested: apps close theirs after some seconds,
    and a request that meets the close is lost. What follows at once, and what may be asked again, takes the kept one.
    """
    for module in ("http", "http2_lines"):
        monkeypatch.setattr(f"handfast.guard.{module}.FRESH", 0.0 if rested else PATIENCE)
    context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
    context.set_alpn_protocols(["h2"] if h2 else ["http/1.1"])
    with App() as app, Running(ca, app.address) as guard:
        host, _, port = guard.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            machine = H2Connection(H2Configuration())
            if h2:
                machine.initiate_connection()
            for _ in range(3):
                if h2:
                    _ask_h2(tls, machine, method)
                else:
                    assert _ask(tls, method) == 200
        assert app.connections == dials


def test_what_fails_at_one_time_counts_once() -> None:
    """Ten connections that an app ended as it crashed give it the rest of one, so that it is asked again soon."""
    backend = Backend(parse_target("127.0.0.1:1"))
    for _ in range(10):
        backend.refused(100.0)
    assert backend.usable(100.3)
    backend.refused(100.3)
    assert not backend.usable(100.6)
    assert backend.usable(100.8)
    backend.took()
    backend.refused(101.0)
    assert backend.usable(101.3)
