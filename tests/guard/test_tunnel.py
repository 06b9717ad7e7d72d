"""TCP mode: whole connections, allowed or not, and their bytes unread."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
from pathlib import Path

import pytest

from handfast.policy import parse_policy
from tests.support.apps import App, client_context, refusing
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.waiting import PATIENCE, until


class Raw(App):
    """An app that speaks no HTTP: it greets, and gives every byte back."""

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(b"hello\n")
            while data := connection.recv(1 << 16):
                self.received += data
                connection.sendall(data)


def _connect(guard: Running, ca: Ca, leaf: Leaf | None, folder: Path) -> ssl.SSLSocket:
    host, _, port = guard.address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=PATIENCE)
    context = client_context(ca.save(folder, "ca"), leaf, folder)
    return context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)


def test_bytes_go_both_ways(ca: Ca, tmp_path: Path) -> None:
    """An allowed peer gets the app's greeting first, and 4 MiB back as they were. They are counted."""
    body = bytes(range(256)) * (1 << 14)
    with (
        Raw() as app,
        Running(ca, f"tcp://{app.address}", parse_policy(["spiffe://test/web"])) as guard,
        _connect(guard, ca, ca.client(), tmp_path) as tls,
    ):
        assert tls.recv(6) == b"hello\n"
        total, seen = hashlib.sha256(), 0
        for at in range(0, len(body), 1 << 16):
            tls.sendall(body[at : at + (1 << 16)])
            want = min(1 << 16, len(body) - at)
            while want:
                piece = tls.recv(want)
                total.update(piece)
                want -= len(piece)
                seen += len(piece)
        assert (seen, total.digest()) == (len(body), hashlib.sha256(body).digest())
        assert guard.events.next("connection")["decision"] == "allow"
        tls.close()
        closed = guard.events.next("closed")
        counted = {("main", "in"): closed["bytes_in"], ("main", "out"): closed["bytes_out"]}
        assert guard.guard.metrics._bytes == counted == {("main", "in"): len(body), ("main", "out"): len(body) + 6}


@pytest.mark.parametrize(
    ("case", "alert", "reason"),
    [
        ("none", "CERTIFICATE_REQUIRED", "verify.no_certificate"),
        ("other", "UNKNOWN_CA", "verify.unknown_issuer"),
        ("expired", "CERTIFICATE_EXPIRED", "verify.expired"),
    ],
)
def test_a_refusal_is_an_alert(ca: Ca, tmp_path: Path, case: str, alert: str, reason: str) -> None:
    """A client that proves nothing reads the alert that fits; the app is not even dialled."""
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    leaves = {
        "none": None,
        "other": Ca.root("Other").client(),
        "expired": ca.client(not_before=now - timedelta(days=2), not_after=now - timedelta(days=1)),
    }
    with Raw() as app, Running(ca, f"tcp://{app.address}") as guard:
        with _connect(guard, ca, leaves[case], tmp_path) as tls, pytest.raises(ssl.SSLError, match=alert):
            tls.recv(1)
        assert guard.events.next("connection")["reason"] == reason
        assert app.connections == 0


def test_a_denied_peer_is_closed_before_the_app_is_dialled(ca: Ca, tmp_path: Path) -> None:
    """A peer that the policy refuses reads nothing but the end."""
    policy = parse_policy(["spiffe://test/web"])
    with Raw() as app, Running(ca, f"tcp://{app.address}", policy) as guard:
        with _connect(guard, ca, ca.client("spiffe://test/other"), tmp_path) as tls:
            assert tls.recv(1) == b""
        assert guard.events.next("connection")["reason"] == "policy.no_rule"
        assert app.connections == 0


def test_a_certificate_that_our_own_rules_refuse_gets_the_alert_that_fits(ca: Ca, tmp_path: Path) -> None:
    """What OpenSSL would let pass is refused within the handshake, and the client is told by an alert."""
    with Raw() as app, Running(ca, f"tcp://{app.address}") as guard:
        with (
            _connect(guard, ca, ca.client(eku=None), tmp_path) as tls,
            pytest.raises(ssl.SSLError, match="UNSUPPORTED_CERTIFICATE"),
        ):
            tls.recv(1)
        assert guard.events.next("connection")["reason"] == "verify.no_eku"
        assert app.connections == 0


def test_the_end_of_one_side_leaves_the_other_open(ca: Ca, tmp_path: Path) -> None:
    """After the client's close_notify the app can still answer (half-close)."""

    class Counting(App):
        def _serve(self, connection: socket.socket) -> None:
            with connection:
                total = 0
                while data := connection.recv(1 << 16):
                    total += len(data)
                connection.sendall(b"%d bytes" % total)

    with Counting() as app, Running(ca, f"tcp://{app.address}") as guard:
        from OpenSSL import SSL

        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        cert, key = ca.client().save(tmp_path, "half")
        context.use_certificate_chain_file(str(cert))
        context.use_privatekey_file(str(key))
        host, _, port = guard.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as plain:
            plain.setblocking(True)
            tls = SSL.Connection(context, plain)
            tls.set_connect_state()
            tls.do_handshake()
            tls.sendall(b"x" * 100_000)
            tls.shutdown()
            assert tls.recv(100) == b"100000 bytes"


def test_an_app_that_is_down_is_logged(ca: Ca, tmp_path: Path) -> None:
    """With the app away the client's connection ends, and the log says which app."""
    with refusing() as address, Running(ca, f"tcp://{address}") as guard:
        with _connect(guard, ca, ca.client(), tmp_path) as tls:
            assert tls.recv(1) == b""
        event = guard.events.next("upstream")
        assert event["reason"] == "upstream.down"
        assert address.rpartition(":")[2] in event["detail"]


def test_a_truncated_stream_is_not_passed_as_a_whole_one(ca: Ca, tmp_path: Path) -> None:
    """A client that vanishes without close_notify does not give the app a clean end of stream."""
    ends: list[str] = []

    class Watching(App):
        def _serve(self, connection: socket.socket) -> None:
            with connection:
                try:
                    while connection.recv(1 << 16):
                        pass
                    ends.append("clean")
                except ConnectionResetError:
                    ends.append("reset")

    with Watching() as app, Running(ca, f"tcp://{app.address}") as guard:
        tls = _connect(guard, ca, ca.client(), tmp_path)
        tls.sendall(b"half a message")
        guard.events.next("connection")
        socket.socket.close(tls)  # the TCP end alone
        guard.events.next("closed")
        until(lambda: ends, "the app's end of it")
    assert ends == ["reset"]
