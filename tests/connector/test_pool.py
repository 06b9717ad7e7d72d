"""Handshakes kept ready: used once, replaced when they die or age, and no burden on a server that refuses."""

from __future__ import annotations

import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic

import pytest

from tests.connector.kit import Calling, Server, generation
from tests.support.certs import Ca
from tests.support.waiting import until

DAY = timedelta(days=1)


def ready(calling: Calling, many: int) -> None:
    """Wait until so many calls wait."""
    until(lambda: calling.call(len, calling.connector.pool) == many, f"a pool of {many}")


def test_a_call_that_waits_is_used_once(ca: Ca, tmp_path: Path) -> None:
    """Connections take the calls that wait, each its own, and others are made in their place."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client()), 2) as calling:
        ready(calling, 2)
        assert server.connections == 2
        plugs = [calling.open() for _ in range(2)]
        assert [calling.events.next("offered")["pooled"] for _ in plugs] == [True, True]
        for at, plug in enumerate(plugs):
            plug.sendall(b"%d" % at)
        assert [plug.recv(10) for plug in plugs] == [b"0", b"1"]
        for plug in plugs:
            plug.close()
        ready(calling, 2)
        assert server.connections == 4


def test_without_a_pool_nothing_is_dialled_before_it_is_needed(ca: Ca, tmp_path: Path) -> None:
    """A pool of none makes no connection of its own accord."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client())) as calling:
        assert calling.ask(b"x") == b"x"
        assert calling.events.next("offered")["pooled"] is False
        assert server.connections == 1


def test_a_call_that_dies_while_it_waits_is_replaced(ca: Ca, tmp_path: Path) -> None:
    """A server that restarts leaves no dead call behind: the next client gets a live one."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client()), 1) as calling:
        ready(calling, 1)
        until(lambda: server.open, "the server's side of it")
        server.kill()
        until(lambda: server.connections == 2, "another call")
        ready(calling, 1)
        assert calling.ask(b"x") == b"x"


def test_a_call_does_not_wait_for_longer_than_a_minute(ca: Ca, tmp_path: Path) -> None:
    """A call that has waited too long is dropped for a new one."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client()), 1) as calling:
        ready(calling, 1)
        calling.call(calling.connector.pool.tick, monotonic() + 40)
        assert server.connections == 1
        calling.call(calling.connector.pool.tick, monotonic() + 60)
        until(lambda: server.connections == 2, "another call")
        ready(calling, 1)


def test_a_greeting_that_came_early_is_kept(ca: Ca, tmp_path: Path) -> None:
    """What a server says while the call waits reaches the client that gets the call."""

    def greet(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"+hello\r\n")
        with contextlib.suppress(OSError):
            tls.recv(1)

    with Server(ca, tmp_path, greet) as server, Calling(server.address, generation(ca, ca.client()), 1) as calling:
        ready(calling, 1)
        until(lambda: server.open, "the server's side of it")
        with calling.open() as plug:
            assert plug.recv(100) == b"+hello\r\n"
        assert calling.events.next("connected")["by"] == "the server's first byte"


def test_a_server_that_refuses_is_not_pressed(ca: Ca, tmp_path: Path) -> None:
    """While the server refuses, the pool says so once and tries again only after pauses that grow."""
    now = datetime.now(UTC)
    expired = generation(ca, ca.client(not_before=now - 9 * DAY, not_after=now - 3 * DAY))
    began = monotonic()
    with Server(ca, tmp_path) as server, Calling(server.address, expired, 1) as calling:
        event = calling.events.next("pool")
        assert "it expired 3 days ago" in event["detail"]
        until(lambda: server.connections >= 3, "a third call")
        made, passed = server.connections, monotonic() - began
        assert made <= 1 + sum(passed >= after for after in (0.5, 1.5, 3.5, 7.5))  # pauses of 0.5, 1, 2 and 4 s
        assert len(calling.of("pool")) == 1


@pytest.mark.parametrize("where", ["handfast.connector.service.dial", "handfast.connector.call.Call.peek"])
def test_a_bug_is_told_and_presses_nobody(ca: Ca, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What goes wrong in us is said once and tried again after pauses that grow; without it, there is a pool."""
    bugs: list[object] = []

    def explode(*at: object) -> None:
        bugs.append(at)
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(where, explode)
    began, made = monotonic(), generation(ca, ca.client())
    with Server(ca, tmp_path) as server, Calling(server.address, made, 1) as calling:
        event = calling.events.next("pool")
        assert (event["reason"], "a bug of ours" in event["detail"]) == ("bug", True)
        until(lambda: len(bugs) >= 3, "a third try")
        tries, passed = len(bugs), monotonic() - began
        assert tries <= 1 + sum(passed >= after for after in (0.5, 1.5, 3.5, 7.5))  # pauses of 0.5, 1, 2 and 4 s
        assert len(calling.of("pool")) == 1
        monkeypatch.undo()
        ready(calling, 1)
        assert calling.ask(b"x") == b"x"
