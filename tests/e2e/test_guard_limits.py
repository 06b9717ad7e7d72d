"""How much a listener takes: each limit refuses with its reason, is counted, and lets in again."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.guard_kit import Client, Files, Guarded, guarding, metric
from tests.support.apps import App
from tests.support.programs import free_port
from tests.support.waiting import PATIENCE as WAIT
from tests.support.waiting import Stopwatch, until


def config(admin: int, to: str, **limits: str) -> str:
    """A listener for each limit, called by its name."""
    text = f'[admin]\nlisten = "127.0.0.1:{admin}"\n'
    for name, lines in limits.items():
        text += f"""
            [[listener]]
            name = "{name}"
            listen = "127.0.0.1:0"
            cert = "server.crt"
            key = "server.key"
            client_ca = "ca.crt"
            to = "{to}"
            [listener.limits]
            {lines}
        """
    return text


def turned_away(client: Client, port: int) -> bool:
    """Whether a client gets no answer at all."""
    try:
        with client.line(port) as line:
            line.ask()
    except OSError:
        return True
    return False


def test_connections_at_once(tmp_path: Path) -> None:
    """Of connections that are open at once, so many are taken for a listener, an address and an identity; one more is
    turned away with its reason, others are not touched, and after one ended there is room again.
    """
    files, admin = Files(tmp_path), free_port()
    alice, bob = files.client("alice"), files.client("bob")
    limits = {
        "whole": "connections = 2",
        "address": "connections_per_address = 2",
        "identity": "connections_per_identity = 2",
    }
    with App() as app, guarding(tmp_path, config(admin, app.address, **limits)) as guard:
        for name, port in guard.ports.items():
            with ExitStack() as stack:
                lines = [stack.enter_context(alice.line(port)) for _ in range(2)]
                assert [line.ask().status for line in lines] == [200, 200]
                assert turned_away(alice, port)
                told = guard.next("connection", reason="limit.connections")
                while limits[name] not in told["detail"]:  # that was of the listener before
                    told = guard.next("connection", reason="limit.connections")
                assert turned_away(bob, port) is (name != "identity")
                assert [line.ask().status for line in lines] == [200, 200]
            until(lambda port=port: not turned_away(alice, port), "room again")  # type: ignore[misc]  # bound to this turn's
        assert metric(admin, 'handfast_limited_total{reason="limit.connections"}') >= 5


def test_how_often(tmp_path: Path) -> None:
    """Handshakes and requests of a listener, an address or an identity are taken so many at once;
    what comes too soon is turned away, or answered with 429 on a connection that goes on.
    """
    files, admin = Files(tmp_path), free_port()
    alice, bob = files.client("alice"), files.client("bob")
    limits = {
        "handshakes": "handshakes_per_second = 0.01\nburst = 3",
        "by_address": "handshakes_per_second_per_address = 0.01\nburst = 3",
        "by_identity": "requests_per_second_per_identity = 0.01\nburst = 3",
        "requests": "requests_per_second = 0.01\nburst = 3",
        "caller": "requests_per_second_per_address = 0.01\nburst = 3",
        "comer": "handshakes_per_second_per_identity = 0.01\nburst = 3",
    }
    with App() as app, guarding(tmp_path, config(admin, app.address, **limits)) as guard:
        for name in ("handshakes", "by_address"):
            assert [turned_away(alice, guard.ports[name]) for _ in range(4)] == [False] * 3 + [True]
            assert guard.next("connection", decision="deny")["reason"] == "limit.handshakes"
        assert [turned_away(alice, guard.ports["comer"]) for _ in range(4)] == [False] * 3 + [True]
        assert guard.next("connection", decision="deny")["reason"] == "limit.handshakes"
        assert turned_away(bob, guard.ports["comer"]) is False
        for name in ("by_identity", "requests", "caller"):
            with alice.line(guard.ports[name]) as hers, bob.line(guard.ports[name]) as his:
                assert [hers.ask().status for _ in range(5)] == [200, 200, 200, 429, 429]
                assert hers.ask().error == (429, "limit.requests")
                assert his.ask().status == (200 if name == "by_identity" else 429)
            assert turned_away(alice, guard.ports[name]) is False
            told = guard.next("request", decision="deny")
            assert (told["reason"], told["peer"]) == ("limit.requests", "spiffe://test/alice")
        assert metric(admin, 'handfast_limited_total{reason="limit.handshakes"}') == 3
        assert metric(admin, 'handfast_limited_total{reason="limit.requests"}') == 14
        assert metric(admin, 'handfast_requests_total{decision="deny"') == 14
    assert app.received.count(b"GET") == 3 + 3 + 4 + 4 + 3 + 3


def test_a_rate_comes_back(tmp_path: Path) -> None:
    """A second later there is room for more, at the rate that is allowed."""
    files, admin = Files(tmp_path), free_port()
    limits = {"requests": "requests_per_second_per_identity = 1\nburst = 1"}
    with (
        App() as app,
        guarding(tmp_path, config(admin, app.address, **limits)) as guard,
        files.client().line(guard.port) as line,
    ):
        assert {line.ask().status for _ in range(5)} == {200, 429}
        until(lambda: line.ask().status == 200, "room again")


def _by_itself(guard: Guarded) -> None:
    pass


def _by_signal(guard: Guarded) -> None:
    guard.send(signal.SIGHUP)


@pytest.mark.parametrize("told", [_by_itself, _by_signal])
def test_limits_change_while_it_runs(tmp_path: Path, told: Callable[[Guarded], None]) -> None:
    """A limit that is raised in the file holds for the next connection; those that are open stay counted."""
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    with App() as app:
        text = config(admin, app.address, main="connections = 1")
        with guarding(tmp_path, text) as guard, alice.line(guard.port) as first:
            assert first.ask().status == 200
            assert turned_away(alice, guard.port)
            path = tmp_path / "handfast.toml"
            path.write_text(path.read_text().replace("connections = 1", "connections = 2"))
            told(guard)
            guard.next("reload", outcome="taken")
            with alice.line(guard.port) as second:
                assert second.ask().status == 200
                assert turned_away(alice, guard.port)
                assert first.ask().status == 200


def test_times_that_are_too_long(tmp_path: Path) -> None:
    """A handshake, a head and an idle connection have their time, and no more."""
    files, admin = Files(tmp_path), free_port()
    limits = {"handshake": 'handshake = "300ms"', "head": 'head = "300ms"', "idle": 'idle = "2s"'}
    with App() as app, guarding(tmp_path, config(admin, app.address, **limits)) as guard:
        with socket.create_connection(("127.0.0.1", guard.ports["handshake"]), WAIT) as silent, Stopwatch() as watch:
            assert silent.recv(1) == b""
        assert watch.seconds < 3
        assert guard.next("connection", decision="deny")["reason"] == "tls.timeout"
        with files.client().line(guard.ports["head"]) as line:
            line.tls.sendall(b"GET / HTTP/1.1\r\nHost: loc")
            assert line.answer().error == (408, "http.timeout")
        with files.client().line(guard.ports["idle"]) as line:
            assert line.ask().status == 200
            assert line.ends_within(5)
