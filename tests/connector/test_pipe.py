"""Bytes through a connector: whole, both ways, at once, with each side's end told as what it was."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from handfast.connector.service import Limits
from tests.connector.kit import Calling, Server, count, echo, everything, finish, generation
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.waiting import PATIENCE, until

MIB = 1 << 20


def test_twenty_mebibytes_both_ways(ca: Ca, tmp_path: Path) -> None:
    """20 MiB go out while they come back, byte for byte, and the log has the counts."""
    body = bytes(range(256)) * (20 * MIB // 256)
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client())) as calling:
        with calling.open() as plug:

            def send() -> None:
                plug.sendall(body)
                plug.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            total, seen = hashlib.sha256(), 0
            while piece := plug.recv(1 << 18):
                total.update(piece)
                seen += len(piece)
            sender.join()
        assert (seen, total.digest()) == (len(body), hashlib.sha256(body).digest())
        closed = calling.events.next("closed")
        assert (closed["bytes_out"], closed["bytes_in"], closed["how"]) == (len(body), len(body), "ended")


def test_a_client_that_does_not_read_holds_the_server_back(ca: Ca, tmp_path: Path) -> None:
    """The server cannot push more than buffers hold while the local client does not read; nothing is lost after."""
    sent = []

    def flood(tls: ssl.SSLSocket) -> None:
        for _ in range(40):
            tls.sendall(b"x" * MIB)
            sent.append(1)
        finish(tls)

    with (
        Server(ca, tmp_path, flood) as server,
        Calling(server.address, generation(ca, ca.client())) as calling,
        calling.open() as plug,
    ):
        until(lambda: len(sent) >= 1, "the first MiB")
        held = -1
        while held != len(sent):  # until it stands still
            held = len(sent)
            threading.Event().wait(0.3)
        assert held < 40
        assert sum(map(len, iter(lambda: plug.recv(1 << 18), b""))) == 40 * MIB


def test_a_protocol_in_which_the_server_speaks_first(ca: Ca, tmp_path: Path) -> None:
    """Raw bytes, as of Redis or PostgreSQL: a greeting before any request, then requests and answers."""

    def inline(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"+hello\r\n")
        for line in tls.makefile("rb"):
            tls.sendall(b"+PONG\r\n" if line == b"PING\r\n" else b"-ERR unknown command\r\n")
        finish(tls)

    with (
        Server(ca, tmp_path, inline) as server,
        Calling(server.address, generation(ca, ca.client()), 1) as calling,
        calling.open() as plug,
        plug.makefile("rb") as lines,
    ):
        assert lines.readline() == b"+hello\r\n"
        for _ in range(3):
            plug.sendall(b"PING\r\n")
            assert lines.readline() == b"+PONG\r\n"
        plug.sendall(b"GET \x00\xff\r\n")
        assert lines.readline() == b"-ERR unknown command\r\n"


def test_the_clients_end_leaves_the_answer_open(ca: Ca, tmp_path: Path) -> None:
    """After the local client's end the server can still answer (half-close outwards)."""
    with Server(ca, tmp_path, count) as server, Calling(server.address, generation(ca, ca.client())) as calling:
        assert calling.ask(b"x" * 100_000) == b"100000 bytes"
        assert calling.events.next("closed")["how"] == "ended"


def test_the_servers_end_leaves_the_request_open(ca: Ca, tmp_path: Path) -> None:
    """After the server's close_notify the local client can still send (half-close inwards)."""
    got = bytearray()
    done = threading.Event()

    with (
        Running(ca, "tcp://127.0.0.1:1") as guard,  # only for its certificate and bundle
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        from OpenSSL import SSL

        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        cert, key = (guard.server or ca.server()).save(tmp_path, "half")
        context.use_certificate_chain_file(str(cert))
        context.use_privatekey_file(str(key))

        def serve() -> None:
            plain, _ = listener.accept()
            with plain:
                tls = SSL.Connection(context, plain)
                tls.set_accept_state()
                tls.do_handshake()
                tls.sendall(b"I say no more\n")
                tls.shutdown()
                with contextlib.suppress(SSL.ZeroReturnError):
                    while True:
                        got.extend(tls.recv(1 << 16))
            done.set()

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        with Calling(f"localhost:{port}", generation(ca, ca.client())) as calling, calling.open() as plug:
            assert everything(plug) == b"I say no more\n"
            plug.sendall(b"but I do")
            plug.shutdown(socket.SHUT_WR)
            assert done.wait(PATIENCE)
            assert calling.events.next("closed")["how"] == "ended"
    assert bytes(got) == b"but I do"


def test_a_stream_that_the_server_cuts_is_a_reset(ca: Ca, tmp_path: Path) -> None:
    """A server that is killed in the midst of an answer gives the local client a reset, never a quiet end."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client())) as calling:
        with calling.open() as plug:
            plug.sendall(b"half an answer")
            assert plug.recv(100) == b"half an answer"
            server.kill()
            with pytest.raises(ConnectionResetError):
                plug.recv(100)
        closed = calling.events.next("closed")
        assert (closed["how"], closed["reason"]) == ("cut", "connect.cut")
        assert "the server cut the connection" in closed["detail"]


def test_what_came_before_a_cut_is_the_clients(ca: Ca, tmp_path: Path) -> None:
    """A slow client gets every byte that a server sent before it closed without close_notify, then the reset."""
    size = 200_000  # less than is read at once

    def cut(tls: ssl.SSLSocket) -> None:
        tls.recv(1 << 16)
        tls.sendall(bytes(size))
        socket.socket.shutdown(tls, socket.SHUT_WR)
        tls.recv(1 << 16)

    with (
        Server(ca, tmp_path, cut) as server,
        Calling(server.address, generation(ca, ca.client())) as calling,
        calling.open() as plug,
    ):
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        plug.sendall(b"all of it")
        calling.events.next("closed")  # the connector has all of it
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := plug.recv(1 << 14):
                got += len(piece)
            pytest.fail("a quiet end")
        assert got == size


def test_a_stream_that_the_client_cuts_is_no_end_for_the_server(ca: Ca, tmp_path: Path) -> None:
    """A local client that is reset in the midst of a request gives the server no close_notify."""
    ends: list[str] = []

    def watch(tls: ssl.SSLSocket) -> None:
        try:
            while tls.recv(1 << 16):
                pass
            ends.append("clean")
            finish(tls)
        except OSError as error:  # ssl.SSLError is one
            ends.append(type(error).__name__)

    with Server(ca, tmp_path, watch) as server, Calling(server.address, generation(ca, ca.client())) as calling:
        with calling.open() as plug:
            plug.sendall(b"half a request")
            calling.events.next("offered")
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        until(lambda: ends, "an end")
        assert calling.events.next("closed")["detail"].startswith("the local side cut the connection")
        assert calling.ask(b"") == b""  # the negative twin: an orderly end is one
        until(lambda: len(ends) == 2, "the second end")
    assert ends in (["ConnectionResetError", "clean"], ["SSLEOFError", "clean"])


def test_two_hundred_connections_at_once(ca: Ca, tmp_path: Path) -> None:
    """200 clients at once each get their own bytes back."""
    with (
        Server(ca, tmp_path) as server,
        Calling(server.address, generation(ca, ca.client()), 1) as calling,
        ThreadPoolExecutor(200) as crowd,
    ):
        together = threading.Barrier(200, timeout=60)

        def one(number: int) -> bool:
            body = b"%d " % number * 1000
            with calling.open() as plug:
                plug.settimeout(60)
                together.wait()
                plug.sendall(body)
                plug.shutdown(socket.SHUT_WR)
                return everything(plug) == body

        assert all(crowd.map(one, range(200)))
        until(lambda: len(calling.of("closed")) == 200, "the end of all")
        until(lambda: not calling.connector.connections, "no connection left")


def test_an_idle_connection_ends_when_that_is_asked_for(ca: Ca, tmp_path: Path) -> None:
    """With a limit, a connection without a byte either way ends with a reset and its reason; without one it stays."""
    made = generation(ca, ca.client())
    with Server(ca, tmp_path) as server, Calling(server.address, made, limits=Limits(idle=0.5, drain=1)) as calling:
        with calling.open() as plug, pytest.raises(ConnectionResetError):
            plug.recv(1)
        assert calling.events.next("closed")["reason"] == "ended.idle"
    with Server(ca, tmp_path) as server, Calling(server.address, made) as calling, calling.open() as plug:
        plug.settimeout(1.2)
        with pytest.raises(TimeoutError):
            plug.recv(1)


def test_a_drain_lets_what_is_open_finish(ca: Ca, tmp_path: Path) -> None:
    """A connector that is told to stop takes nobody new, and lets who is there finish; past the limit it cuts."""
    made = generation(ca, ca.client())
    with Server(ca, tmp_path, echo) as server:
        calling = Calling(server.address, made, limits=Limits(drain=10)).__enter__()
        with calling.open() as plug:
            plug.sendall(b"a")
            assert plug.recv(1) == b"a"
            stopping = threading.Thread(target=calling.stop)
            stopping.start()
            until(lambda: not calling.connector._plugs, "a closed door")
            with pytest.raises(ConnectionRefusedError):
                calling.open()
            plug.sendall(b"b")
            plug.shutdown(socket.SHUT_WR)
            assert everything(plug) == b"b"
            stopping.join(PATIENCE)
            assert not stopping.is_alive()
        with Calling(server.address, made, limits=Limits(drain=0.2)) as calling:
            late = calling.open()
            late.sendall(b"a")
            assert late.recv(1) == b"a"
        with late, pytest.raises(ConnectionResetError):
            late.recv(1)
