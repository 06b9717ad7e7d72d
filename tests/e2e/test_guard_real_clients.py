"""What clients and apps of the field do: say goodbye, upload on after a refusal, ask for h2c, take their time."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes

from tests.e2e.guard_kit import Files, guarding, named
from tests.support.apps import App
from tests.support.waiting import PATIENCE

LISTENER = """
[[listener]]
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "{to}"
"""
ONE = "limits = { connections_per_identity = 1 }\n"


def test_who_said_goodbye_is_gone(tmp_path: Path) -> None:
    """A client that closes with close_notify and FIN is counted no more at once: it may come again and again."""
    files = Files(tmp_path)
    alice = files.client()
    with App() as app, guarding(tmp_path, LISTENER.format(to=app.address) + ONE) as guard:
        for _ in range(5):
            with alice.line(guard.port) as line:
                assert line.ask().status == 200
                line.tls.unwrap().close()


def test_a_refusal_reaches_who_is_uploading(tmp_path: Path) -> None:
    """A client that sends all of its body before it reads gets the answer that says why, and no reset."""
    files = Files(tmp_path)
    alice, size = files.client(), 8 << 20
    with App() as app, guarding(tmp_path, LISTENER.format(to=app.address) + 'allow = ["any GET"]') as guard:
        with alice.line(guard.port) as line:
            head = f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
            line.tls.sendall(head.encode() + bytes(size))
            assert line.answer("POST").error == (403, "policy.no_rule")
        assert app.connections == 0


def test_no_more_is_asked_for_in_a_write_of_its_own(tmp_path: Path) -> None:
    """Over HTTP/2 the answer to a request that is not whole yet, and the word that the rest is not needed (RFC 9113
    8.1), come in records of their own: curl 7.88 loses an answer that comes with that word.
    """
    files = Files(tmp_path)
    context = files.client().context()
    context.set_alpn_protocols(["h2"])
    machine = H2Connection(H2Configuration())
    head = [(":method", "POST"), (":path", "/"), (":scheme", "https"), (":authority", "localhost")]
    records: list[list[events.Event]] = []
    with (
        guarding(tmp_path, LISTENER.format(to="127.0.0.1:9") + 'allow = ["any GET"]') as guard,
        socket.create_connection(("127.0.0.1", guard.port), PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        machine.initiate_connection()
        machine.send_headers(1, [*head, ("content-length", "9")])
        tls.sendall(machine.data_to_send())
        while not any(isinstance(event, events.StreamReset) for record in records for event in record):
            records.append(machine.receive_data(tls.recv(1 << 16)))  # one record's bytes at most
    (answered,) = [record for record in records if any(isinstance(event, events.ResponseReceived) for event in record)]
    (reset,) = [event for event in records[-1] if isinstance(event, events.StreamReset)]
    assert any(isinstance(event, events.StreamEnded) for event in answered)
    assert answered is not records[-1]
    assert reset.error_code == ErrorCodes.NO_ERROR


def test_an_app_has_its_own_time_for_requests_with_a_body(tmp_path: Path) -> None:
    """The time of an upstream for an answer counts for a POST as for a GET, and not the listener's."""
    files = Files(tmp_path)
    config = "[limits]\nresponse = '100ms'\n[upstream.slow]\ntargets = ['{to}']\nresponse = '20s'\n"

    def slow(connection: socket.socket, request: bytes) -> None:
        if request.endswith(b"\r\n\r\nbody") or request.startswith(b"GET"):
            connection.settimeout(1.5)  # three times what the guard takes to look at deadlines
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(None)
            named("slow")(connection, request)

    with (
        App(slow) as app,
        guarding(tmp_path, config.format(to=app.address) + LISTENER.format(to="slow")) as guard,
        files.client().line(guard.port) as line,
    ):
        line.tls.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody")
        assert line.answer("POST").body == b"slow"


@pytest.mark.parametrize(
    "method",
    ["GET / HTTP/1.1\r\n", "POST / HTTP/1.1\r\nContent-Length: 0\r\n", "POST / HTTP/1.1\r\nContent-Length: 2\r\n"],
)
def test_java_asks_for_h2c_and_is_answered(tmp_path: Path, method: str) -> None:
    """Java's HttpClient asks each plain server, as the connector is to it, to go over to h2c: that is let be."""
    files = Files(tmp_path)
    ask = "Host: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n\r\n"
    with App() as app, guarding(tmp_path, LISTENER.format(to=app.address)) as guard:
        with files.client().line(guard.port) as line:
            line.tls.sendall((method + ask + ("{}" if "2\r\n" in method else "")).encode())
            assert line.answer(method.split()[0]).status == 200
        assert b"pgrade" not in app.received
        assert b"HTTP2" not in app.received
