"""Bodies that end otherwise than they said, hellos that change their mind, refusals without end."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from OpenSSL import SSL

from handfast.guard.events import MAX_PENDING, EventLog
from handfast.guard.http import MAX_REFUSALS
from handfast.guard.routes import Route, Site, Sites, Snapshot
from handfast.pki import Purpose, Terms, TrustBundle
from handfast.policy import ALLOW_ANY, parse_policy
from handfast.tls.credential import Credential
from handfast.tls.server import ServerContext, ServerSettings
from tests.support.apps import App
from tests.support.certs import Ca, Leaf
from tests.support.guards import Events, Running
from tests.support.waiting import PATIENCE, until

HELLO_RETRY = bytes.fromhex("CF21AD74E59A6111BE1D8C021E65B891")  # how its random begins, RFC 8446 4.1.3


class Draining:
    """An app that answers at once, and reads the rest of the body before the next request, as many do."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> Draining:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                plug, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plug,), daemon=True).start()

    def _serve(self, plug: socket.socket) -> None:
        buffer = b""
        with plug:
            while True:
                try:
                    while b"\r\n\r\n" not in buffer:
                        if not (data := plug.recv(65536)):
                            return
                        buffer += data
                    head, _, buffer = buffer.partition(b"\r\n\r\n")
                    self.lines.append(head.split(b"\r\n")[0])
                    lines = head.lower().split(b"\r\n")
                    length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                    plug.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    while len(buffer) < length:
                        if not (data := plug.recv(65536)):
                            return
                        buffer += data
                    buffer = buffer[length:]
                except ConnectionError:
                    return


def _h2(guard: Running, leaf: Leaf, folder: Path) -> tuple[ssl.SSLSocket, H2Connection]:
    context = ssl.create_default_context(cafile=guard.ca.save(folder, "ca"))
    context.load_cert_chain(*leaf.save(folder, "h2"))
    context.set_alpn_protocols(["h2"])
    host, _, port = guard.address.rpartition(":")
    tls = context.wrap_socket(
        socket.create_connection((host, int(port)), timeout=PATIENCE), server_hostname="localhost"
    )
    machine = H2Connection(H2Configuration(client_side=True, validate_outbound_headers=False))
    machine.initiate_connection()
    return tls, machine


def _ends(tls: ssl.SSLSocket, machine: H2Connection, stream: int) -> Any:
    """The event that ends a stream."""
    tls.sendall(machine.data_to_send())
    while True:
        data = tls.recv(65536)
        if not data:
            return None
        for event in machine.receive_data(data):
            if getattr(event, "stream_id", None) == stream and isinstance(
                event, events.StreamEnded | events.StreamReset
            ):
                return event
        tls.sendall(machine.data_to_send())


@pytest.mark.parametrize("short", [True, False])
def test_a_body_that_trailers_cut_short_is_no_request(ca: Ca, tmp_path: Path, short: bool) -> None:
    """A request over HTTP/2 whose trailers come too early is reset, and no other shares its app's connection."""
    fields = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost"), (":path", "/b")]
    with Draining() as app, Running(ca, app.address) as guard:
        tls, machine = _h2(guard, ca.client(), tmp_path)
        with tls:
            machine.send_headers(1, [*fields, ("content-length", "60" if short else "5")])
            machine.send_data(1, b"12345")
            machine.send_headers(1, [("x-t", "1")], end_stream=True)
            ended = _ends(tls, machine, 1)
            assert isinstance(ended, events.StreamReset) is short
            body = b"GET /admin HTTP/1.1\r\nHost: localhost\r\n\r\n" * 8
            machine.send_headers(3, [*fields, ("content-length", str(len(body)))])
            machine.send_data(3, body, end_stream=True)
            assert isinstance(_ends(tls, machine, 3), events.StreamEnded)
        assert not [line for line in app.lines if b"/admin" in line]


def _sites(guard: Running, **strict: Any) -> Snapshot:
    server = guard.ca.server("strict.example", "weak.example")

    def site(name: str, domain: str | None = None, **terms: Any) -> Site:
        asked = Terms(TrustBundle((guard.ca.certificate,), domain), Purpose.CLIENT, **terms)
        context = ServerContext(Credential(server.key, server.presented), asked, ServerSettings(alpn=(b"http/1.1",)))
        return Site(context, (Route(guard.upstreams, ALLOW_ANY),), (name,), nameless=False)

    return Snapshot({"main": Sites([site("strict.example", **strict), site("weak.example", legacy=True)])})


def _two_hellos(guard: Running, leaf: Leaf, first: bytes, second: bytes) -> bytes:
    """Say hello to `first` with a key share that is not taken, then to `second`; return what a request gets."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_verify(SSL.VERIFY_NONE)
    context.use_certificate(leaf.certificate)
    context.use_privatekey(leaf.key)
    tls = SSL.Connection(context, None)
    lib = SSL._lib  # type: ignore[attr-defined]  # pyOpenSSL has no call for the groups of one connection
    assert lib.SSL_set1_curves_list(tls._ssl, b"*ffdhe2048:X25519") == 1
    tls.set_tlsext_host_name(first)
    tls.set_connect_state()
    host, _, port = guard.address.rpartition(":")

    def talk(step: Callable[[], Any], plug: socket.socket) -> Any:
        while True:
            try:
                return step()
            except SSL.WantReadError:
                pass
            finally:
                with contextlib.suppress(SSL.WantReadError):
                    plug.sendall(tls.bio_read(1 << 16))
            data = plug.recv(1 << 16)
            if not data:
                raise ConnectionError
            if HELLO_RETRY in data:
                tls.set_tlsext_host_name(second)
            tls.bio_write(data)

    with socket.create_connection((host, int(port)), timeout=PATIENCE) as plug:
        try:
            talk(tls.do_handshake, plug)
            talk(lambda: tls.send(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % second), plug)
            answer: bytes = talk(lambda: tls.recv(4096), plug)
        except (ConnectionError, SSL.Error):
            return b""
    return answer


def test_a_second_hello_does_not_change_the_site(ca: Ca) -> None:
    """After a HelloRetryRequest another server name ends the handshake; the same one is served."""
    intruder = ca.client("spiffe://other/intruder")
    with App() as app, Running(ca, app.address) as guard:
        guard.swap(_sites(guard, domain="prod"))
        assert b" 200 " in _two_hellos(guard, intruder, b"weak.example", b"weak.example")
        assert b"verify.trust_domain" in _two_hellos(guard, intruder, b"strict.example", b"strict.example")
        before = app.connections
        assert _two_hellos(guard, intruder, b"weak.example", b"strict.example") == b""
        assert app.connections == before
        while guard.events.next("connection").get("reason") != "tls.bad_hello":
            pass


@pytest.mark.parametrize(
    ("names", "terms"),
    [
        (("spiffe://other/web",), {"bundle": "prod"}),
        (("spiffe://test/web",), {"bundle": "test"}),
    ],
)
def test_a_narrower_trust_domain_reaches_open_connections(
    ca: Ca, tmp_path: Path, names: tuple[str, ...], terms: dict[str, str]
) -> None:
    """A reload that binds the authority to another trust domain cuts who is outside it, and nobody else."""
    leaf = ca.client(*names)
    get = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with App() as app, Running(ca, app.address) as guard:
        context = ssl.create_default_context(cafile=ca.save(tmp_path, "ca"))
        context.load_cert_chain(*leaf.save(tmp_path, "open"))
        host, _, port = guard.address.rpartition(":")
        with context.wrap_socket(
            socket.create_connection((host, int(port)), timeout=PATIENCE), server_hostname="localhost"
        ) as tls:
            tls.sendall(get)
            answer = b""
            while not answer.endswith(b"Hello World\n"):
                answer += tls.recv(4096)
            assert b" 200 " in answer
            guard.swap(guard.snapshot(bundle=TrustBundle((ca.certificate,), terms["bundle"])))
            try:
                tls.sendall(get)
                answer = tls.recv(4096)
            except (ConnectionError, ssl.SSLError):
                answer = b""
        assert (b" 200 " in answer) is (terms["bundle"] == "test")


def test_what_a_client_shows_beside_its_chain_is_not_kept(ca: Ca) -> None:
    """The memo of accepted chains holds a digest of what was shown, however large that was."""
    guard = Running(ca, "127.0.0.1:1")
    context = guard.snapshot().sites["main"].all[0].context
    leaf = ca.client()
    junk = [Ca.root(f"Junk {number}").certificate for number in range(8)]
    shown = tuple(one.public_bytes(Encoding.DER) for one in (leaf.certificate, *junk))
    assert context.admit(shown, datetime.now(UTC)) is context.admit(shown, datetime.now(UTC))
    assert context.admit(shown[:1], datetime.now(UTC)) is not context.admit(shown, datetime.now(UTC))
    assert {len(key) for key in context._known} == {32}


def test_refusals_in_a_row_end_the_connection(ca: Ca, tmp_path: Path) -> None:
    """A thousand refused requests in one piece get 256 answers; allowed ones in between begin the count anew."""
    refused, allowed = (b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in (b"no", b"yes"))
    with App() as app, Running(ca, app.address, parse_policy(["any GET /yes"])) as guard:
        context = ssl.create_default_context(cafile=ca.save(tmp_path, "ca"))
        context.load_cert_chain(*ca.client().save(tmp_path, "web"))
        host, _, port = guard.address.rpartition(":")

        def answers(sent: bytes, most: int) -> int:
            plain = socket.create_connection((host, int(port)), timeout=PATIENCE)
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                got = b""
                with contextlib.suppress(ConnectionError, ssl.SSLError):  # it need not take all that is sent
                    tls.sendall(sent)
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    while got.count(b"HTTP/1.1 ") < most and (data := tls.recv(65536)):
                        got += data
            return got.count(b"HTTP/1.1 403") + got.count(b"HTTP/1.1 200")

        assert answers(refused * 1000, 1000) == MAX_REFUSALS
        assert answers((refused * 150 + allowed) * 3, 453) == 453


def test_what_the_log_cannot_take_is_counted_and_stops_the_guard() -> None:
    """Lines beyond the bound are lost, the log counts as broken at once, and says how many when it is whole again."""
    stream = Events()
    log = EventLog(stream, pretty=False)  # type: ignore[arg-type]  # as much of a stream as is used
    try:
        for _ in range(MAX_PENDING // 100_000 + 2):
            log.emit("event", datetime.now(UTC), {"text": "x" * 100_000})
        assert log.broken is True
        taken = MAX_PENDING // 100_100
        log.flush()
        for _ in range(taken):
            stream.next("event")
        until(lambda: not log.broken, "a log that works again")
        log.flush()
        assert stream.next("log")["lost"] > 0
    finally:
        log.close()
