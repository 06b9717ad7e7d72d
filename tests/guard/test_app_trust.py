"""An app behind TLS is trusted until its certificate ends: all that is open or kept ends then."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from h2 import events
from h2.connection import H2Connection

from handfast.pki.names import parse_name
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.client import ClientContext, ClientSettings
from handfast.tls.credential import Credential
from tests.connector.kit import Serve, Server, echo
from tests.support.apps import HELLO, client_context, get
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.http2 import Client, Http2App
from tests.support.waiting import PATIENCE, Stopwatch, until

SOON = timedelta(seconds=4)  # of which up to one is lost to the whole second
WEBSOCKET = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")
AGREED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@contextmanager
def calling(
    ca: Ca, folder: Path, scheme: str, serve: Serve, leaf: Leaf | None = None
) -> Iterator[tuple[Running, Server]]:
    """A guard in front of one app, which it calls over mutual TLS."""
    with Server(ca, folder, serve, leaf) as server:
        guard, shown = Running(ca, f"{scheme}://127.0.0.1:{server.port}"), ca.client("spiffe://test/front")
        terms = Terms(TrustBundle((ca.certificate,)), Purpose.SERVER, parse_name("localhost"))
        context = ClientContext(Credential(shown.key, shown.presented), terms, ClientSettings("localhost"))
        guard.upstreams.handshake = lambda _target: context.connect(lambda: datetime.now(UTC))
        with guard:
            yield guard, server


def brief(ca: Ca) -> Leaf:
    """An app's certificate that ends soon."""
    return ca.server(not_after=datetime.now(UTC) + SOON)


def _open(guard: Running, ca: Ca, folder: Path) -> ssl.SSLSocket:
    host, _, port = guard.address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=PATIENCE)
    return client_context(ca.save(folder, "ca"), ca.client(), folder).wrap_socket(plain, server_hostname="localhost")


def _ended(tls: ssl.SSLSocket) -> float:
    """Seconds until the far side ends the connection, of a machine that goes on."""
    with Stopwatch() as watch, contextlib.suppress(ConnectionError):
        assert tls.recv(1) == b""
    return watch.seconds


def hello(tls: ssl.SSLSocket) -> None:
    """Answer each request."""
    while tls.recv(1 << 16):
        tls.sendall(HELLO)


def agree(tls: ssl.SSLSocket) -> None:
    """Become a websocket that gives every byte back."""
    tls.recv(1 << 16)
    tls.sendall(AGREED)
    echo(tls)


def speak_http2(tls: ssl.SSLSocket) -> None:
    """Answer each request over HTTP/2."""

    def on(made: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            made.send_headers(event.stream_id, [(":status", "200")], end_stream=True)

    Http2App(on)._serve(tls)


@pytest.mark.parametrize("websocket", [False, True])
def test_a_tunnel_ends_with_the_apps_certificate(ca: Ca, tmp_path: Path, websocket: bool) -> None:
    """Bytes go through an open tunnel until the app's certificate ends; where it lasts, on and on."""
    (tmp_path / "lasting").mkdir()
    scheme, serve = ("https", agree) if websocket else ("tls", echo)
    with (
        calling(ca, tmp_path, scheme, serve, leaf := brief(ca)) as (guard, _),
        calling(ca, tmp_path / "lasting", scheme, serve) as (other, _),
        _open(guard, ca, tmp_path) as tls,
        _open(other, ca, tmp_path) as kept,
    ):
        for each in (tls, kept):
            if websocket:
                each.sendall(get("/", "localhost", *WEBSOCKET, close=False))
                assert each.recv(1 << 16).startswith(b"HTTP/1.1 101 ")
            each.sendall(b"a")
            assert each.recv(1) == b"a"
        assert _ended(tls) < SOON.total_seconds() + 2
        assert datetime.now(UTC) >= leaf.certificate.not_valid_after_utc
        event = guard.events.next("request" if websocket else "upstream")
        assert event["reason"] == "upstream.tls"
        assert "its certificate expired during the connection" in event["detail"]
        assert event["remedy"].startswith("renew the certificate of ")
        kept.sendall(b"b")
        assert kept.recv(1) == b"b"


Ask = Callable[[], tuple[int, bytes]]


@contextmanager
def asking(guard: Running, ca: Ca, folder: Path, http2: bool) -> Iterator[Ask]:
    """Ask over one connection of a client; each time the status and the body."""
    if http2:
        with Client(guard.address, client_context(ca.save(folder, "ca"), ca.client(), folder)) as client:
            yield lambda: ((answer := client.get()).status, bytes(answer.body))
        return
    with _open(guard, ca, folder) as tls:

        def ask() -> tuple[int, bytes]:
            tls.sendall(get(close=False))
            head, _, body = tls.recv(1 << 16).partition(b"\r\n\r\n")
            return int(head.split()[1]), body

        yield ask


KINDS = pytest.mark.parametrize(
    ("scheme", "serve", "http2"),
    [("https", hello, False), ("https", hello, True), ("h2", speak_http2, True)],
    ids=["http1", "http2 to http1", "http2"],
)


@KINDS
def test_a_kept_connection_is_not_used_past_the_apps_certificate(
    ca: Ca, tmp_path: Path, scheme: str, serve: Serve, http2: bool
) -> None:
    """A connection that is kept for the next request is dropped when the app's certificate ends, and the next request
    meets the app's new handshake; the client's connection stays.
    """
    leaf = brief(ca)
    with (
        calling(ca, tmp_path, scheme, serve, leaf) as (guard, server),
        asking(guard, ca, tmp_path, http2) as ask,
    ):
        assert [ask()[0] for _ in range(2)] == [200, 200]
        assert server.connections == 1
        past = leaf.certificate.not_valid_after_utc + timedelta(seconds=1)  # the last one is good for a handshake yet
        until(lambda: datetime.now(UTC) >= past, "the end of the certificate")
        assert guard.upstreams.backends[0].connections == 0
        status, body = ask()
        assert (status, b"upstream.tls" in body) == (502, True)
        event = guard.events.next("request")
        while event["status"] == 200:
            event = guard.events.next("request")
        assert "expired on" in event["detail"]


@KINDS
def test_a_kept_connection_is_used_while_the_apps_certificate_lasts(
    ca: Ca, tmp_path: Path, scheme: str, serve: Serve, http2: bool
) -> None:
    """The negative twin: over a good certificate, requests apart in time share a connection."""
    with (
        calling(ca, tmp_path, scheme, serve) as (guard, server),
        asking(guard, ca, tmp_path, http2) as ask,
    ):
        assert ask()[0] == 200
        threading.Event().wait(2.2)  # the connection is looked at each second
        assert ask()[0] == 200
        assert server.connections == 1


def test_an_answer_that_is_awaited_ends_with_the_apps_certificate(ca: Ca, tmp_path: Path) -> None:
    """A request that the app has not answered by then is 502 with the reason; what it says later reaches nobody."""
    late = threading.Event()

    def hold(tls: ssl.SSLSocket) -> None:
        tls.recv(1 << 16)
        late.wait(PATIENCE)
        tls.sendall(HELLO)

    with calling(ca, tmp_path, "https", hold, brief(ca)) as (guard, _), _open(guard, ca, tmp_path) as tls:
        tls.sendall(get(close=False))
        with Stopwatch() as watch:
            head, _, body = tls.recv(1 << 16).partition(b"\r\n\r\n")
        late.set()
        assert watch.seconds < SOON.total_seconds() + 2
        assert head.startswith(b"HTTP/1.1 502 ")
        assert b"upstream.tls" in body
        assert tls.recv(1) == b""
        assert "its certificate expired during the connection" in guard.events.next("request")["detail"]
