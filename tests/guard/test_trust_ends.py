"""Trust ends on time: on live connections too, and within two seconds of the change."""

from __future__ import annotations

import contextlib
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handfast.errors import InvalidInput, Reason
from handfast.guard.connection import Limits
from handfast.guard.http import HttpSession
from handfast.pki import TrustBundle
from handfast.pki.revocation import Revocations
from handfast.policy import parse_policy
from tests.guard.conftest import Ask
from tests.support.apps import App, client_context, get
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.waiting import PATIENCE, Stopwatch, until

SOON = timedelta(seconds=4)  # of which up to one is lost to the whole second


def _open(guard: Running, ca: Ca, leaf: Leaf, folder: Path) -> ssl.SSLSocket:
    host, _, port = guard.address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=PATIENCE)
    return client_context(ca.save(folder, "ca"), leaf, folder).wrap_socket(plain, server_hostname="localhost")


def _served(tls: ssl.SSLSocket) -> bool:
    tls.sendall(get(close=False))
    return tls.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def _ended(tls: ssl.SSLSocket) -> float:
    """Seconds until the far side ends the connection, of a machine that goes on."""
    with Stopwatch() as watch, contextlib.suppress(ConnectionError):
        assert tls.recv(1) == b""
    return watch.seconds


def _revoked(leaf: Leaf) -> Revocations:
    return Revocations(frozenset({(leaf.certificate.issuer.public_bytes(), leaf.certificate.serial_number)}))


@pytest.mark.parametrize("tcp", [False, True])
def test_an_expiry_ends_a_live_connection(ca: Ca, tmp_path: Path, tcp: bool) -> None:
    """When its certificate ends, a connection does too, in the midst of whatever it does."""
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        leaf = ca.client(not_after=datetime.now(UTC) + SOON)
        with _open(guard, ca, leaf, tmp_path) as tls:
            assert _served(tls)
            assert _ended(tls) < SOON.total_seconds() + 2
        assert guard.events.next("ended")["reason"] == "ended.expired"


@pytest.mark.parametrize("tcp", [False, True])
def test_a_revocation_ends_a_live_connection_and_no_other(ca: Ca, tmp_path: Path, tcp: bool) -> None:
    """A snapshot with a new revocation cuts that peer at once; its neighbour goes on."""
    bad, good = ca.client("spiffe://test/bad"), ca.client("spiffe://test/good")
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        with _open(guard, ca, bad, tmp_path) as first, _open(guard, ca, good, tmp_path) as second:
            assert _served(first)
            assert _served(second)
            guard.swap(guard.snapshot(revocations=_revoked(bad)))
            assert _ended(first) < 2
            assert _served(second)
        event = guard.events.next("ended")
        assert (event["reason"], event["peer"]) == ("ended.revoked", "spiffe://test/bad")


def test_a_revoked_peer_cannot_come_back(ca: Ca, ask: Ask) -> None:
    """After the snapshot a new handshake of the revoked peer is refused for it."""
    leaf = ca.client()
    with App() as app, Running(ca, app.address) as guard:
        assert b" 200 " in ask(guard, leaf)
        guard.swap(guard.snapshot(revocations=_revoked(leaf)))
        assert b"verify.revoked" in ask(guard, leaf)


def test_a_new_policy_reaches_open_connections(ca: Ca, tmp_path: Path) -> None:
    """The next request on an open connection is judged by the new rules; a peer with none left is cut."""
    with App() as app, Running(ca, app.address) as guard, _open(guard, ca, ca.client(), tmp_path) as tls:
        assert _served(tls)
        guard.swap(guard.snapshot(parse_policy(["spiffe://test/web POST"])))
        tls.sendall(get(close=False))
        assert tls.recv(1 << 16).startswith(b"HTTP/1.1 403 ")
        guard.swap(guard.snapshot(parse_policy(["spiffe://test/other"])))
        assert _ended(tls) < 2
        assert guard.events.next("ended")["reason"] == "ended.policy"


def test_a_removed_authority_ends_its_peers(ca: Ca, tmp_path: Path) -> None:
    """When an authority leaves the bundle, the connections it vouched for end."""
    with App() as app, Running(ca, app.address) as guard, _open(guard, ca, ca.client(), tmp_path) as tls:
        assert _served(tls)
        guard.swap(guard.snapshot(bundle=TrustBundle((Ca.root("New").certificate,))))
        assert _ended(tls) < 2


def test_a_guard_without_client_authorities_does_not_start(ca: Ca) -> None:
    """An empty bundle is refused; the system's roots are never taken in its place."""
    guard = Running(ca, "127.0.0.1:1")
    with pytest.raises(InvalidInput) as refused:
        guard.snapshot(bundle=TrustBundle(()))
    assert refused.value.reason is Reason.GUARD_NO_BUNDLE


def test_a_bad_change_keeps_what_is_in_force(ca: Ca, ask: Ask) -> None:
    """A refresh that fails leaves the old snapshot whole, and says so once."""

    def fail(_now: datetime) -> None:
        raise InvalidInput(Reason.INPUT_MISSING, path="bundle.pem")

    with App() as app, Running(ca, app.address) as guard:
        guard.guard.refresh = fail
        event = guard.events.next("reload")
        assert (event["outcome"], event["reason"]) == ("kept", "input.missing")
        assert b" 200 " in ask(guard, ca.client())


def test_a_bug_ends_its_own_connection_and_no_other(
    ca: Ca, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B8: an exception while judging refuses that peer; the guard goes on, and trust is still looked at."""
    from handfast.guard import door

    def explode(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    with App() as app, Running(ca, app.address) as guard:
        with monkeypatch.context() as broken:
            broken.setattr(door, "decide_by", explode)
            assert ask(guard, ca.client()) == b""
            assert guard.events.next("ended")["reason"] == "bug"
            assert app.connections == 0
        assert b" 200 " in ask(guard, ca.client())
        with _open(guard, ca, ca.client(), tmp_path) as tls:
            assert _served(tls)
            with monkeypatch.context() as broken:
                broken.setattr(HttpSession, "_done_usually", explode)
                tls.sendall(get(close=False))
                assert _ended(tls) < 2
        guard.guard.refresh = explode
        assert guard.events.next("reload")["reason"] == "bug"
        leaf = ca.client(not_after=datetime.now(UTC) + SOON)
        with _open(guard, ca, leaf, tmp_path) as tls:
            assert _served(tls)
            assert _ended(tls) < SOON.total_seconds() + 2


def test_a_stop_lets_requests_finish(ca: Ca, tmp_path: Path) -> None:
    """A request that is under way when the guard is told to stop is still answered; new ones are not taken."""
    import threading

    go = threading.Event()

    def answer(connection: socket.socket, _request: bytes) -> None:
        go.wait(PATIENCE)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")

    with App(answer) as app, Running(ca, app.address, drain=20) as guard:
        tls = _open(guard, ca, ca.client(), tmp_path)
        tls.sendall(get(close=False))
        until(lambda: app.received, "the request at the app")
        guard.loop.call_soon_threadsafe(guard._stop.set)
        go.set()
        answered = b""
        while piece := tls.recv(1 << 16):
            answered += piece
        assert answered.endswith(b"done")
        assert b"Connection: close" in answered or b"HTTP/1.1 200" in answered
        tls.close()


def test_silent_clients_do_not_stop_others(ca: Ca, ask: Ask) -> None:
    """Two thousand connections that say nothing, or half a handshake, leave room for one that speaks."""
    with App() as app, Running(ca, app.address, limits=Limits(handshake=3), drain=1) as guard:
        host, _, port = guard.address.rpartition(":")
        silent = [socket.create_connection((host, int(port)), timeout=PATIENCE) for _ in range(2000)]
        for each in silent[::2]:
            each.sendall(b"\x16\x03\x01\x02\x00")
        assert b" 200 " in ask(guard, ca.client())
        told: dict[str, str] = {}  # in either order: to make so many connections takes its time
        while len(told) < 2:
            event = guard.events.next("connection")
            told[event["decision"]] = event.get("reason", "")
        assert told["deny"] == "tls.timeout"
        for each in silent:
            each.close()
