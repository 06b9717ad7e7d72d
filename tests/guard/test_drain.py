"""A guard that is told to stop refuses nobody who came in, and keeps nobody who asks nothing."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest

from handfast.guard.connection import LAST_MOMENT
from handfast.guard.http import LATELY
from tests.support.apps import App, client_context, get
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.http2 import Client
from tests.support.waiting import PATIENCE, Stopwatch


def _enter(guard: Running, ca: Ca, folder: Path) -> ssl.SSLSocket:
    context = client_context(ca.save(folder, "ca"), ca.client(), folder)
    host, _, port = guard.address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=PATIENCE)
    return context.wrap_socket(plain, server_hostname="localhost")


def _rest(tls: ssl.SSLSocket) -> bytes:
    """All that comes until the end."""
    answer = b""
    while piece := tls.recv(1 << 16):
        answer += piece
    return answer


def _drain(guard: Running) -> None:
    for connection in guard.guard.connections:
        connection.drain()


def test_who_came_in_may_ask_once(ca: Ca, tmp_path: Path) -> None:
    """A client whose first request is on its way when the guard is told to stop gets its answer, then the end."""
    with App() as app, Running(ca, app.address) as guard, _enter(guard, ca, tmp_path) as tls:
        guard.events.next("connection")  # the guard's side of the handshake is done, too
        guard.call(_drain, guard)
        tls.sendall(get(close=False))
        answer = _rest(tls)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer.lower()


def test_who_came_in_over_http2_may_ask(ca: Ca, tmp_path: Path) -> None:
    """The same over HTTP/2."""
    context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
    with App() as app, Running(ca, app.address) as guard, Client(guard.address, context) as client:
        guard.events.next("connection")
        guard.call(_drain, guard)
        assert client.get("/").status == 200


def test_who_asked_lately_may_ask_once_more(ca: Ca, tmp_path: Path) -> None:
    """A client that keeps its connection and asks again as the guard is told to stop gets an answer that says that the
    connection closes, and not an end in place of an answer.
    """
    with App() as app, Running(ca, app.address) as guard, _enter(guard, ca, tmp_path) as tls:
        tls.sendall(get(close=False))
        assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        guard.events.next("request")
        guard.call(_drain, guard)
        tls.sendall(get(close=False))
        answer = _rest(tls)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("asked", ["never", "now", "long ago"])
def test_who_asks_nothing_is_let_go(ca: Ca, tmp_path: Path, asked: str) -> None:
    """A client that does not ask is closed after a moment; one that has not asked for longer than that, at once."""
    with App() as app, Running(ca, app.address) as guard, _enter(guard, ca, tmp_path) as tls:
        if asked == "never":
            guard.events.next("connection")
        else:
            tls.sendall(get(close=False))
            assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            guard.events.next("request")
        if asked == "long ago":
            (connection,) = guard.guard.connections
            connection.deadline -= LATELY + 1  # as if so much time had passed
        with Stopwatch() as watch:
            guard.call(_drain, guard)
            assert tls.recv(1 << 16) == b""
        assert watch.seconds < (1 if asked == "long ago" else LAST_MOMENT + 2)
