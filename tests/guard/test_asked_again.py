"""A request without an answer is asked again where that is safe, whichever HTTP brought it; its backend is blamed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from handfast.guard.places import Target, parse_target
from handfast.guard.upstream import Backend, Handshake, Upstreams
from tests.support.apps import App, client_context, talk
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.http2 import Client

Send = Callable[[Running, str], int]


@pytest.fixture(params=["http/1.1", "h2"])
def send(request: pytest.FixtureRequest, ca: Ca, tmp_path: Path) -> Send:
    """Ask a guard for `/` by this method over each HTTP; returns the status."""
    bundle, leaf = ca.save(tmp_path, "ca"), ca.client()

    def send(guard: Running, method: str) -> int:
        context = client_context(bundle, leaf, tmp_path)
        if request.param == "h2":
            with Client(guard.address, context) as client:
                return client.get(method=method).status
        lines = (f"{method} / HTTP/1.1", "Host: localhost", "Content-Length: 0", "Connection: close")
        asked = "".join(f"{line}\r\n" for line in (*lines[: 2 if method != "POST" else 3], lines[3], ""))
        return int(talk(guard.address, context, asked.encode()).split(b" ", 2)[1])

    return send


def _dies(connection: socket.socket, _request: bytes) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def _guard(ca: Ca, apps: list[App], retries: int) -> Running:
    guard = Running(ca, apps[0].address)
    backends = tuple(Backend(parse_target(app.address)) for app in apps)
    guard.upstreams = Upstreams("app", backends, round_robin=True, retries=retries)
    return guard


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_a_safe_request_goes_to_another_backend(ca: Ca, send: Send, method: str) -> None:
    """Of two backends one dies on each request: the client does not notice, and it is chosen no more for a while."""
    with App(_dies) as bad, App() as good, _guard(ca, [bad, good], 1) as guard:
        assert [send(guard, method) for _ in range(4)] == [200] * 4
        dying, serving = guard.upstreams.backends
        assert bad.received.count(b" / HTTP/1.1") == dying.refusals >= 1
        assert serving.refusals == 0


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_safe_request_is_asked_so_often_and_no_more(ca: Ca, send: Send, retries: int) -> None:
    """Where every connection dies, a request is asked anew as often as the settings say (0: never), then 502."""
    with App(_dies) as bad, _guard(ca, [bad], retries) as guard:
        assert send(guard, "GET") == 502
        assert bad.received.count(b"GET /") == 1 + retries
        assert guard.events.next("request")["reason"] == "upstream.down"


def test_a_bug_on_the_way_to_the_app_ends_the_request(ca: Ca, send: Send) -> None:
    """What fails unforeseen while a connection is dialled is 502 at once, and said to be ours; the guard goes on."""

    def begin(_target: Target) -> Handshake:
        raise AssertionError("unforeseen")

    with App() as app:
        guard = Running(ca, f"https://{app.address}")
        guard.upstreams = Upstreams("app", (Backend(parse_target(f"https://{app.address}")),), handshake=begin)
        with guard:
            for method in ("GET", "POST"):
                assert send(guard, method) == 502
                event = guard.events.next("request")
                assert (event["reason"], "unforeseen" in event["detail"]) == ("upstream.bug", True)
            guard.upstreams.handshake = None
            assert send(guard, "GET") == 502
        assert app.received == b""


@pytest.mark.parametrize("alert", [True, False])
def test_an_app_that_wants_tls_is_told_from_one_that_dies(ca: Ca, send: Send, alert: bool) -> None:
    """A TLS alert in answer to a plain request says what the app speaks; without one it is no more than a guess."""

    def close(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"\x15\x03\x01\x00\x02\x02\x0a" if alert else b"")
        connection.shutdown(socket.SHUT_RDWR)

    with App(close) as app, _guard(ca, [app], 0) as guard:
        assert send(guard, "POST") == 502
        event = guard.events.next("request")
        assert event["reason"] == ("upstream.bad_response" if alert else "upstream.down")
        assert event["remedy"].startswith("it speaks TLS" if alert else "if it speaks TLS")
        assert f"https://{app.address}" in event["remedy"]


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
def test_another_request_is_never_asked_twice(ca: Ca, send: Send, method: str) -> None:
    """What may have been done already is not sent again, though another backend is well: 502."""
    with App(_dies) as bad, App() as good, _guard(ca, [bad, good], 3) as guard:
        answers = sorted(send(guard, method) for _ in range(2))
        assert answers == [200, 502]
        assert bad.received.count(f"{method} /".encode()) == good.received.count(f"{method} /".encode()) == 1
