"""Sockets to listen on, of guards and connectors: who may open them, what they replace, and what they leave alone."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from handfast.errors import Reason, Unreachable
from handfast.guard.listening import bind, bind_shared
from handfast.guard.places import Place
from tests.support.programs import free_port


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for a UNIX socket."""
    return Path(os.path.relpath(tmp_path_factory.mktemp("s") / "l.sock"))


def _refusal(place: Place) -> object:
    with pytest.raises(Unreachable) as refused:
        bind(place)
    assert refused.value.reason is Reason.GUARD_LISTEN
    assert refused.value.facts["address"] == str(place)
    return refused.value.facts["detail"]


@pytest.mark.parametrize(("others", "mode"), [(False, 0o600), (True, 0o666)])
def test_a_unix_socket_is_its_owners_unless_told_otherwise(path: Path, others: bool, mode: int) -> None:
    """Nobody else may open it, whatever the umask, unless others are let in."""
    before = os.umask(0)
    try:
        with bind(Place(path=str(path)), others=others):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        assert os.umask(before) == 0


def test_a_dead_socket_is_replaced(path: Path) -> None:
    """What a killed process left behind is taken over."""
    place = Place(path=str(path))
    bind(place).close()
    assert path.is_socket()
    with bind(place), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_live_socket_is_left_alone(path: Path) -> None:
    """The negative twin: where somebody listens, we do not, and clients still reach who was there first."""
    place = Place(path=str(path))
    with bind(place) as first:
        assert _refusal(place) == "address already in use"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            first.accept()[0].close()


def test_a_live_socket_with_a_full_queue_is_left_alone(path: Path) -> None:
    """Who is too busy to accept still listens."""
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert _refusal(Place(path=str(path))) == "address already in use"
    assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "folder", "fifo", "link"])
def test_what_is_no_socket_is_not_removed(path: Path, kind: str) -> None:
    """A path with a typing mistake costs nobody a file, nor the link to a socket."""
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to("dead.sock")
            bind(Place(path=str(path.with_name("dead.sock")))).close()
    before = path.lstat()
    assert _refusal(Place(path=str(path))) == "file exists"
    assert path.lstat().st_ino == before.st_ino
    if kind == "file":
        assert path.read_text() == "precious"


def test_a_port_that_is_taken_is_said_to_be() -> None:
    """Two cannot have one port, and the error has its name."""
    with bind(Place("127.0.0.1", 0)) as plug:
        assert _refusal(Place("127.0.0.1", plug.getsockname()[1])) == "address already in use"


@pytest.mark.parametrize(
    ("host", "detail"),
    [("a..b", "the host is not known here"), ("192.0.2.1", "cannot assign requested address")],
)
def test_an_address_that_is_not_ours_is_refused(host: str, detail: str) -> None:
    """A host that does not resolve, or that is another machine (RFC 5737), is said to be so."""
    assert _refusal(Place(host, 8443)) == detail
    with pytest.raises(Unreachable, match=detail):
        bind_shared(Place(host, 8443), 2)


def test_a_port_of_another_is_not_shared_by_mistake() -> None:
    """SO_REUSEPORT would let two guards take one port and half of each other's clients: the second is refused."""
    port = free_port()
    first = bind_shared(Place("127.0.0.1", port), 2)
    try:
        with pytest.raises(Unreachable) as refused:
            bind_shared(Place("127.0.0.1", port), 2)
        assert refused.value.reason is Reason.GUARD_LISTEN
        assert refused.value.facts == {"address": f"127.0.0.1:{port}", "detail": "address already in use"}
    finally:
        for plug in first:
            plug.close()
    for plug in bind_shared(Place("127.0.0.1", port), 3):  # and is free again at once
        assert plug.getsockname()[1] == port
        assert not plug.get_inheritable()
        plug.close()


def test_a_unix_address_is_not_bound_twice() -> None:
    """A UNIX socket cannot be bound by each worker; to ask for it is a mistake of the caller."""
    with pytest.raises(ValueError):
        bind_shared(Place(path="/tmp/x"), 2)
