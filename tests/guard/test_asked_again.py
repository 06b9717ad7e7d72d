"""A request without an answer is asked again where that is safe, whichever HTTP brought it; its backend is blamed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from handfast.errors import Failure, Reason
from handfast.guard.connection import Limits
from handfast.guard.places import Target, parse_target
from handfast.guard.upstream import Backend, Handshake, Owner, Upstream, Upstreams
from tests.support.apps import App, client_context, talk
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.http2 import Client
from tests.support.waiting import PATIENCE

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


class _Anybody:
    """An owner that wants nothing but connections."""

    def __init__(self, opened: list[Upstream], failed: list[Failure] | None = None) -> None:
        self.upstream_open = opened.append
        self.upstream_failed = [].append if failed is None else failed.append

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def test_backends_that_are_being_dialled_count_as_busy() -> None:
    """Five connections asked for at once even out what three apps have, though none of them is open yet."""

    async def dial(group: Upstreams) -> None:
        opened: list[Upstream] = []
        group.backends[0].connections = 1
        await asyncio.gather(*(group.dial(cast(Owner, _Anybody(opened))) for _ in range(5)))
        assert [backend.connections for backend in group.backends] == [2, 2, 2]
        for upstream in opened:
            upstream.drop()

    with App() as one, App() as two, App() as three:
        asyncio.run(dial(Upstreams("app", tuple(Backend(parse_target(app.address)) for app in (one, two, three)))))


def test_want_of_descriptors_is_our_own_fault() -> None:
    """A connection for which no open file is left says so, with what to raise; its backend is not blamed."""

    async def dial(group: Upstreams) -> list[Failure]:
        failed: list[Failure] = []
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(lowest := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            await group.dial(cast(Owner, _Anybody([], failed)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return failed

    with App() as app:
        group = Upstreams("app", (Backend(parse_target(app.address)),))
        (failure,) = asyncio.run(dial(group))
        assert failure.reason is Reason.UPSTREAM_DOWN
        assert "LimitNOFILE" in failure.hint
        assert (group.backends[0].refusals, app.connections) == (0, 0)


def _reads_nothing(connection: socket.socket, _request: bytes) -> None:
    connection.recv(1, socket.MSG_PEEK)
    threading.Event().wait(PATIENCE)


def test_an_app_that_does_not_read_is_to_blame(ca: Ca, tmp_path: Path) -> None:
    """An upload that an app does not take is no client's fault: 504 after the time for its answer, and its name."""
    bundle, leaf = ca.save(tmp_path, "ca"), ca.client()
    request = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (64 << 20)
    with App(_reads_nothing) as app, Running(ca, app.address, limits=Limits(response=1)) as guard:
        context = client_context(bundle, leaf, tmp_path)
        host, _, port = guard.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            writer = threading.Thread(target=_write, args=(tls, request + bytes(64 << 20)))
            writer.start()
            assert tls.recv(1 << 16).startswith(b"HTTP/1.1 504 ")
            tls.shutdown(socket.SHUT_RDWR)
            writer.join(PATIENCE)
        assert guard.events.next("request")["reason"] == "upstream.timeout"
        with Client(guard.address, context) as client:
            stream = client.send(client.head("/", method="POST"), None)
            writer = threading.Thread(target=client.body, args=(stream, bytes(64 << 20)))
            writer.start()
            writer.join(PATIENCE)
            assert client.answers[stream].status == 504
        assert guard.events.next("request")["reason"] == "upstream.timeout"


def _write(tls: ssl.SSLSocket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        tls.sendall(data)


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
