"""The way to the app: sockets, TLS both ways, several targets, health, PROXY headers, and the limits of patience."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from handfast.wire.proxy import Address, Endpoints, proxy_v2, read_proxy
from tests.e2e.guard_kit import Files, apps, guarding, metric, named
from tests.support.apps import App, echo_head
from tests.support.certs import Ca
from tests.support.programs import free_port, nginx
from tests.support.waiting import until

CONFIG = """
[[listener]]
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
"""


def test_an_app_on_a_socket_or_by_name(tmp_path: Path) -> None:
    """An app is reached over a UNIX socket, relative to the file's folder, and by a host's name, sandbox and all; one
    that is gone is 502, and it is served again once it is back.
    """
    files = Files(tmp_path)
    alice = files.client()
    route = '[[listener.route]]\npath = "/named"\nto = "localhost:{port}"\n'
    with App(named("by name")) as app:
        config = CONFIG + 'to = "unix:app.sock"\n' + route.format(port=app.port)
        with guarding(tmp_path, config) as guard:
            assert alice.ask(guard.port).error == (502, "upstream.down")
            with unix_app(tmp_path / "app.sock"):
                until(lambda: alice.ask(guard.port).body == b"by socket")
                assert alice.ask(guard.port, "/named").body == b"by name"
            event = guard.next("request", reason="upstream.down")
            assert "no such file" in event["detail"]


@contextmanager
def unix_app(path: Path) -> Iterator[None]:
    """An app on a UNIX socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1 << 16)
                    named("by socket")(connection, b"")

        threading.Thread(target=serve, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


INNER = CONFIG.replace("server.", "inner.") + 'to = "{to}"\nallow = ["dns:front.test"]\n'
OUTER = """
[upstream.inner]
targets = ["{scheme}://127.0.0.1:{port}"]
{tls}
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Two guards' files: the inner one serves as inner.test and localhost, the outer one calls as front.test."""
    files = Files(tmp_path)
    files.server("inner", "localhost", "inner.test")
    files.ca.leaf("front.test").save(tmp_path, "front")
    Ca.root("Other").save(tmp_path, "other")
    return files


def inner_folder(files: Files) -> Path:
    """A folder for the inner guard's own handfast.toml, with the same files."""
    folder = files.folder / "inner"
    folder.mkdir()
    for file in files.folder.glob("*.*"):
        (folder / file.name).symlink_to(file)
    return folder


TLS = {
    "right": ('server_name = "localhost"\nca = "ca.crt"\ncert = "front.crt"\nkey = "front.key"', 200, "", ""),
    "expected": ('expect = "dns:inner.test"\nca = "ca.crt"\ncert = "front.crt"\nkey = "front.key"', 200, "", ""),
    "wrong name": ('server_name = "wrong.test"\nca = "ca.crt"', 502, "upstream.tls", "not for dns:wrong.test"),
    "the address": ('ca = "ca.crt"', 502, "upstream.tls", "not for ip:127.0.0.1"),
    "unexpected": ('expect = "dns:other.test"\nca = "ca.crt"', 502, "upstream.tls", "other.test"),
    "wrong authority": ('server_name = "localhost"\nca = "other.crt"', 502, "upstream.tls", "not in the trust bundle"),
    "no certificate": ('server_name = "localhost"\nca = "ca.crt"', 403, "verify.no_certificate", ""),
}


@pytest.mark.parametrize("how", TLS)
def test_a_guard_behind_a_guard(files: Files, how: str) -> None:
    """Over mutual TLS the outer guard shows its certificate and judges the inner one's; a wrong name, a wrong identity
    or a wrong authority is 502 with the reason in the log, and not a byte of the request goes there.
    """
    tls, status, reason, detail = TLS[how]
    folder, port = inner_folder(files), free_port()
    alice = files.client()
    with App(echo_head) as app:
        inner = INNER.format(to=app.address).replace("127.0.0.1:0", f"127.0.0.1:{port}")
        outer = OUTER.format(scheme="https", port=port, tls=tls) + CONFIG + 'to = "inner"\n'
        with guarding(folder, inner), guarding(files.folder, outer) as guard:
            got = alice.ask(guard.port)
            assert got.status == status
            if status == 200:
                assert got.lines["client-identity"] == '"dns:front.test"'
                with alice.line(guard.port) as line:
                    assert [line.ask().status for _ in range(3)] == [200] * 3
            else:
                assert got.error[1] == reason
                assert app.received == b""
            if detail:
                assert detail in guard.next("request", reason=reason)["detail"]


@contextmanager
def of_tls12(files: Files) -> Iterator[int]:
    """An app that speaks TLS 1.2 and nothing newer; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.folder / "inner.crt", files.folder / "inner.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):  # the end of the listener
                while True:
                    plain, _ = listener.accept()
                    with suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
                        named("old")(connection, connection.recv(1 << 16))

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("allowed", [True, False])
def test_an_app_of_tls_1_2_needs_a_word(files: Files, allowed: bool) -> None:
    """With tls_min such an app is spoken to; without it is not, and the log names the key."""
    alice, lines = files.client(), 'server_name = "localhost"\nca = "ca.crt"\n' + 'tls_min = "1.2"' * allowed
    with of_tls12(files) as port:
        text = OUTER.format(scheme="https", port=port, tls=lines) + CONFIG + 'to = "inner"\n'
        with guarding(files.folder, text) as guard:
            if allowed:
                assert alice.ask(guard.port).body == b"old"
            else:
                assert alice.ask(guard.port).error == (502, "upstream.tls")
                assert "tls_min" in guard.next("request", reason="upstream.tls")["remedy"]


def test_bytes_over_tls_of_our_own(files: Files) -> None:
    """In TCP mode bytes go on over mutual TLS too, both ways, until one side ends."""
    folder, port = inner_folder(files), free_port()
    tls, tcp = TLS["right"][0], CONFIG + 'mode = "tcp"\n'
    with App() as app:
        inner = tcp.replace("server.", "inner.").replace("127.0.0.1:0", f"127.0.0.1:{port}")
        inner += f'to = "tcp://{app.address}"\nallow = ["dns:front.test"]\n'
        outer = OUTER.format(scheme="tls", port=port, tls=tls) + tcp + 'to = "inner"\n'
        with (
            guarding(folder, inner),
            guarding(files.folder, outer) as guard,
            files.client().line(guard.port) as line,
        ):
            assert [line.ask().status for _ in range(3)] == [200] * 3
        assert app.connections == 1


def test_of_two_targets_each_is_used(tmp_path: Path) -> None:
    """round_robin takes targets in turn; least_connections takes the one with fewer connections."""
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    with apps("a", "b") as (a, b):
        upstreams = "".join(
            f'[upstream.{balance}]\ntargets = ["{a.address}", "{b.address}"]\nbalance = "{balance}"\n'
            for balance in ("round_robin", "least_connections")
        )
        config = f'[admin]\nlisten = "127.0.0.1:{admin}"\n{upstreams}{CONFIG}to = "least_connections"\n'
        config += '[[listener.route]]\npath = "/turn"\nto = "round_robin"\n'
        with guarding(tmp_path, config) as guard, ExitStack() as stack:
            assert [alice.ask(guard.port, "/turn").body for _ in range(6)] in ([b"a", b"b"] * 3, [b"b", b"a"] * 3)
            lines = [stack.enter_context(alice.line(guard.port)) for _ in range(6)]
            whose = [line.ask().body for line in lines]
            assert sorted(whose) == [b"a"] * 3 + [b"b"] * 3
            for line, name in zip(lines, whose, strict=True):
                if name == b"a":
                    line.tls.close()
            at_a = f'handfast_upstream_connections{{target="{a.address}",upstream="least_connections"}}'
            until(lambda: metric(admin, at_a) == 0, "the end of the connections to a")
            lines = [stack.enter_context(alice.line(guard.port)) for _ in range(3)]
            assert [line.ask().body for line in lines] == [b"a"] * 3


def test_a_target_that_is_down_is_noticed_by_nobody(tmp_path: Path) -> None:
    """A request, safe or not, goes to the other target where one takes no connection; it is left alone for a while,
    and used again when it is back. With all of them down it is 502.
    """
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    dead = free_port()
    with App(named("alive")) as app:
        config = f"""
            [admin]
            listen = "127.0.0.1:{admin}"
            [upstream.app]
            targets = ["127.0.0.1:{dead}", "{app.address}"]
            balance = "round_robin"
            {CONFIG}
            to = "app"
        """
        with guarding(tmp_path, config) as guard:
            for _ in range(5):
                assert alice.ask(guard.port).body == b"alive"
                assert alice.ask(guard.port, method="POST", body=b"once").body == b"alive"
            healthy = f'handfast_upstream_healthy{{target="127.0.0.1:{dead}"'
            # It rests for seconds, and is then tried again: on a slow machine that may be over just now.
            until(lambda: alice.ask(guard.port).body == b"alive" and metric(admin, healthy) == 0, "its rest")
            assert app.received.count(b"once") == 5
            with socket.create_server(("127.0.0.1", dead)) as back:
                threading.Thread(target=_answer_one, args=(back,), daemon=True).start()
                until(lambda: alice.ask(guard.port).body == b"back", "an answer of the one that is back")
            app.__exit__()
            until(lambda: alice.ask(guard.port).status == 502, "502")


def _answer_one(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        named("back")(connection, b"")


def test_health_checks_mark_a_target(tmp_path: Path) -> None:
    """A target whose health path answers 500 gets no requests until it answers 200 again; both are logged."""
    files, admin = Files(tmp_path), free_port()
    alice, sick = files.client(), threading.Event()

    def answer(connection: socket.socket, request: bytes) -> None:
        if request.startswith(b"GET /health ") and sick.is_set():
            connection.sendall(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n")
        else:
            named("first")(connection, request)

    with App(answer) as first, App(named("second")) as second:
        config = f"""
            [admin]
            listen = "127.0.0.1:{admin}"
            [upstream.app]
            targets = ["{first.address}", "{second.address}"]
            balance = "round_robin"
            [upstream.app.health]
            path = "/health"
            interval = "1s"
            timeout = "1s"
            rise = 2
            fall = 2
            {CONFIG}
            to = "app"
        """
        with guarding(tmp_path, config) as guard:
            assert {alice.ask(guard.port).body for _ in range(4)} == {b"first", b"second"}
            sick.set()
            told = guard.next("health", target=first.address)
            assert (told["upstream"], told["healthy"]) == ("app", False)
            assert {alice.ask(guard.port).body for _ in range(4)} == {b"second"}
            assert metric(admin, f'handfast_upstream_healthy{{target="{first.address}"') == 0
            sick.clear()
            assert guard.next("health", target=first.address)["healthy"] is True
            assert {alice.ask(guard.port).body for _ in range(4)} == {b"first", b"second"}
            assert b"Host: 127.0.0.1" in first.received


NGINX = """
server {{
    listen 127.0.0.1:{port} proxy_protocol;
    location / {{ return 200 "$proxy_protocol_addr $proxy_protocol_port"; }}
}}
"""


def test_nginx_reads_the_proxy_header(tmp_path: Path) -> None:
    """With proxy_protocol = "v2" an nginx behind the guard sees the client's address and port."""
    files, port = Files(tmp_path), free_port()
    alice = files.client()
    (tmp_path / "nginx").mkdir()
    config = f'[upstream.app]\ntargets = ["127.0.0.1:{port}"]\nproxy_protocol = "v2"\n{CONFIG}to = "app"\n'
    with (
        nginx(NGINX.format(port=port), tmp_path / "nginx"),
        guarding(tmp_path, config) as guard,
        alice.line(guard.port) as line,
    ):
        host, client_port = line.tls.getsockname()
        assert line.ask().body.decode() == f"{host} {client_port}"
        assert line.ask().body.decode() == f"{host} {client_port}"


@pytest.mark.parametrize("style", ["v2", "v2-cert"])
@pytest.mark.parametrize("mode", ["http", "tcp"])
def test_the_proxy_header_tells_of_the_handshake(tmp_path: Path, style: str, mode: str) -> None:
    """In HAProxy's TLVs stand the TLS version, the cipher, the server name and, by choice, the client's certificate."""
    files = Files(tmp_path)
    alice = files.client()
    with App() as app:
        to = app.address if mode == "http" else f"tcp://{app.address}"
        upstream = f'[upstream.app]\ntargets = ["{to}"]\nproxy_protocol = "{style}"\n'
        with (
            guarding(tmp_path, f'{upstream}{CONFIG}mode = "{mode}"\nto = "app"\n') as guard,
            alice.line(guard.port) as line,
        ):
            assert line.ask().status == 200
            # A header of version 2 holds an empty line, so the app may answer to that before it has the request.
            until(lambda: b"GET / HTTP/1.1\r\n" in app.received, "the request at the app")
            source = Address(*line.tls.getsockname())
            destination = Address("127.0.0.1", guard.port)
        read = read_proxy(bytes(app.received))
    assert read is not None
    proxied, used = read
    assert proxied.endpoints == Endpoints(source, destination)
    assert app.received[used:].startswith(b"GET / HTTP/1.1\r\n")
    tlvs = dict(proxied.tlvs)
    assert tlvs[0x02] == b"localhost"
    assert b"TLSv1.3" in tlvs[0x20]
    assert (b"\x30\x82" in tlvs[0x20]) is (style == "v2-cert")


TRUSTED = CONFIG + 'proxy_protocol_from = ["{network}"]\nto = "{to}"\n'
CLIENT = Endpoints(Address("192.0.2.7", 4711), Address("198.51.100.1", 443))
HEADERS = [proxy_v2(CLIENT), b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 443\r\n"]


@pytest.mark.parametrize("header", HEADERS, ids=["v2", "v1"])
def test_a_proxy_that_is_trusted_says_who_the_client_is(tmp_path: Path, header: bytes) -> None:
    """The address of a PROXY header is the client's, in the log and for the app, if a trusted network sent it."""
    files = Files(tmp_path)
    with App(echo_head) as app, guarding(tmp_path, TRUSTED.format(network="127.0.0.0/8", to=app.address)) as guard:
        with files.client().line(guard.port, before=header) as line:
            assert line.ask().lines["x-forwarded-for"] == "192.0.2.7"
        assert guard.next("request")["address"] == "192.0.2.7:4711"


@pytest.mark.parametrize("header", HEADERS, ids=["v2", "v1"])
def test_a_proxy_that_is_not_trusted_is_refused(tmp_path: Path, header: bytes) -> None:
    """From elsewhere a PROXY header is not TLS, and refused as such."""
    files = Files(tmp_path)
    with App() as app, guarding(tmp_path, TRUSTED.format(network="192.0.2.0/24", to=app.address)) as guard:
        with pytest.raises(OSError), files.client().line(guard.port, before=header):
            pass
        event = guard.next("connection", decision="deny")
        assert event["reason"] == "tls.not_tls"
        assert "proxy_protocol_from" in event["remedy"]
        assert event["address"].startswith("127.0.0.1:")
        assert files.client().ask(guard.port).status == 200


def test_a_trusted_proxy_must_send_its_header(tmp_path: Path) -> None:
    """Without a header, or with a malformed one, a connection from a trusted network is refused and logged."""
    files = Files(tmp_path)
    with App() as app, guarding(tmp_path, TRUSTED.format(network="127.0.0.1/32", to=app.address)) as guard:
        for header in (b"", b"PROXY TCP4 192.0.2.7\r\n", proxy_v2(CLIENT).replace(b"\x21\x11", b"\x31\x11")):
            with pytest.raises(OSError), files.client().line(guard.port, before=header):
                pass
            assert guard.next("connection", decision="deny")["reason"] == "proxy.malformed"
        assert app.connections == 0


def test_an_app_that_takes_too_long(tmp_path: Path) -> None:
    """An app that does not answer in time is 504, one that takes no connection in time 502."""
    files = Files(tmp_path)
    alice = files.client()
    with App(lambda connection, request: None) as silent, socket.socket() as full, ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # more than its queue holds
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        config = f"""
            [upstream.silent]
            targets = ["{silent.address}"]
            response = "200ms"
            [upstream.full]
            targets = ["127.0.0.1:{full.getsockname()[1]}"]
            connect = "200ms"
            {CONFIG}
            to = "silent"
            [[listener.route]]
            path = "/full"
            to = "full"
        """
        with guarding(tmp_path, config) as guard:
            assert alice.ask(guard.port).error == (504, "upstream.timeout")
            assert alice.ask(guard.port, "/full").error == (502, "upstream.down")
            assert "no answer in 0.2 s" in guard.next("request", reason="upstream.down")["detail"]


def test_a_body_may_only_be_so_large(tmp_path: Path) -> None:
    """A body beyond max_body is 413, told beforehand or found on the way; one that is not goes through."""
    files = Files(tmp_path)
    alice = files.client()
    with App() as app, guarding(tmp_path, f'{CONFIG}to = "{app.address}"\n[listener.limits]\nmax_body = 10\n') as guard:
        assert alice.ask(guard.port, method="PUT", body=b"x" * 10).status == 200
        assert alice.ask(guard.port, method="PUT", body=b"y" * 11).error == (413, "http.body_too_large")
        with alice.line(guard.port) as line:
            chunks = b"6\r\nzzzzzz\r\n" * 2
            head = b"PUT / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            line.tls.sendall(head + chunks)
            assert line.answer().error == (413, "http.body_too_large")
        assert b"y" not in re.sub(rb"(?s)\A.*?\r\n\r\n", b"", bytes(app.received))
