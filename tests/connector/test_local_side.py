"""The local side: who may call, how many, and what happens when the machine runs out."""

from __future__ import annotations

import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from handfast.connector.service import Limits
from tests.connector.kit import Calling, Server, everything, generation
from tests.support.certs import Ca
from tests.support.waiting import PATIENCE, until


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for a UNIX socket."""
    return Path(os.path.relpath(tmp_path_factory.mktemp("s") / "c.sock"))


def test_a_unix_socket_is_private(ca: Ca, tmp_path: Path, place: Path) -> None:
    """The socket has mode 0600, carries bytes like a port, and the log has who called."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client()), unix=place) as calling:
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert calling.ask(b"x") == b"x"
        event = calling.events.next("offered")
        assert (event["uid"], event["pid"]) == (os.getuid(), os.getpid())


def test_only_the_users_that_are_named_may_call(ca: Ca, tmp_path: Path, place: Path) -> None:
    """With uids named, another user is turned away before the server is called; one of them gets through."""
    made, us = generation(ca, ca.client()), os.getuid()
    with Server(ca, tmp_path) as server:
        with Calling(server.address, made, uids=frozenset({us + 1}), unix=place) as calling:
            with calling.open() as plug:
                assert everything(plug) == b""
            event = calling.events.next("refused")
            assert (event["reason"], event["uid"]) == ("connect.user", us)
            assert f"--unix-uid {us}" in event["remedy"]
            assert server.connections == 0
        with Calling(server.address, made, uids=frozenset({us, us + 1}), unix=place) as calling:
            assert calling.ask(b"x") == b"x"


def test_past_the_limit_clients_are_turned_away(ca: Ca, tmp_path: Path) -> None:
    """One connection more than allowed is closed and logged; when one ends, the next is let in."""
    limits = Limits(connections=2, drain=1)
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client()), limits=limits) as calling:
        plugs = [calling.open() for _ in range(2)]
        for plug in plugs:
            plug.sendall(b"x")
            assert plug.recv(1) == b"x"
        with calling.open() as more:
            assert everything(more) == b""
        event = calling.events.next("refused")
        assert (event["reason"], "--max-connections" in event["remedy"]) == ("connect.full", True)
        for plug in plugs:
            plug.close()
        until(lambda: not calling.connector.connections, "the end of both")
        assert calling.ask(b"y") == b"y"


def test_without_descriptors_accepts_pause_and_come_back(ca: Ca, tmp_path: Path) -> None:
    """When open files run out nobody is dropped from the queue; with room again, all are served."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client())) as calling:
        assert calling.ask(b"x") == b"x"
        waiting = [socket.socket() for _ in range(3)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
            for plug in waiting:
                plug.settimeout(PATIENCE)
                plug.connect(("127.0.0.1", calling.port))
            event = calling.events.next("paused")
            assert (event["reason"], "open files" in event["detail"]) == ("connect.descriptors", True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for plug in waiting:
            with plug:
                plug.sendall(b"y")
                assert plug.recv(1) == b"y"


def test_a_log_that_cannot_be_written_lets_nobody_through(ca: Ca, tmp_path: Path) -> None:
    """What is not recorded is not done: with a broken log a client is refused before the server is called."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client())) as calling:
        calling.events.fail = True
        assert calling.ask(b"x") == b"x"
        until(lambda: calling.connector.log.broken, "a broken log")
        before = server.connections
        with calling.open() as plug, pytest.raises(ConnectionResetError):  # noqa: PT012  # it may be cut off unheard
            plug.sendall(b"\0")
            everything(plug)
        assert server.connections == before
        calling.events.fail = False
        until(lambda: not calling.connector.log.broken, "a log that works again")
        assert calling.ask(b"x") == b"x"
