"""A server is trusted until its certificate ends, and no call outlives that."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.connector.kit import Calling, Server, generation
from tests.connector.test_pool import ready
from tests.support.certs import Ca, Leaf
from tests.support.waiting import Stopwatch, until

SOON = timedelta(seconds=4)  # of which up to one is lost to the whole second
SECOND = timedelta(seconds=1)  # the last one of a certificate is good for a handshake yet (RFC 5280 4.1.2.5)


def brief(ca: Ca) -> Leaf:
    """A server's certificate that ends soon."""
    return ca.server(not_after=datetime.now(UTC) + SOON)


def over(leaf: Leaf, since: timedelta = timedelta(0)) -> bool:
    return datetime.now(UTC) >= leaf.certificate.not_valid_after_utc + since


def test_a_call_ends_with_the_servers_certificate(ca: Ca, tmp_path: Path) -> None:
    """An open call is cut within 2 s of the end of the server's certificate, and no sooner; one that lasts stays."""
    made, leaf, folder = generation(ca, ca.client()), brief(ca), tmp_path / "brief"
    folder.mkdir()
    with (
        Server(ca, folder, leaf=leaf) as ending,
        Server(ca, tmp_path) as lasting,
        Calling(ending.address, made) as calling,
        Calling(lasting.address, made) as other,
        calling.open() as plug,
        other.open() as kept,
    ):
        for each in (plug, kept):
            each.sendall(b"a")
            assert each.recv(1) == b"a"
        with Stopwatch() as watch, pytest.raises(ConnectionResetError):
            plug.recv(1)
        assert over(leaf)
        assert watch.seconds < SOON.total_seconds() + 2
        closed = calling.events.next("closed")
        assert (closed["how"], closed["reason"]) == ("expired", "ended.expired")
        assert closed["remedy"] == "renew the server's certificate"
        kept.sendall(b"b")
        assert kept.recv(1) == b"b"


def test_a_call_that_waits_is_not_used_past_the_servers_certificate(ca: Ca, tmp_path: Path) -> None:
    """A pool gives out no call to a server whose certificate has ended meanwhile; until then it does."""
    leaf = brief(ca)
    with Server(ca, tmp_path, leaf=leaf) as server, Calling(server.address, generation(ca, ca.client()), 1) as calling:
        ready(calling, 1)
        with calling.open():
            assert calling.events.next("offered")["pooled"] is True
        ready(calling, 1)
        waiting = calling.connector.pool._waiting[0].call
        calling.connector.pool.size = 0  # nothing is dialled in its place
        until(lambda: over(leaf, SECOND), "the end of the certificate")
        assert not calling.call(lambda: waiting.usable)
        with calling.open() as plug:
            plug.sendall(b"x\n")
            with pytest.raises(ConnectionResetError):
                plug.recv(1)
        assert calling.events.next("refused")["cause"] == "verify.expired"
        assert len(calling.of("offered")) == 1


def test_a_pool_keeps_no_call_past_the_servers_certificate(ca: Ca, tmp_path: Path) -> None:
    """A call that waits is dropped at the end of the server's certificate, and the next handshake says why."""
    leaf = brief(ca)
    with Server(ca, tmp_path, leaf=leaf) as server, Calling(server.address, generation(ca, ca.client()), 1) as calling:
        ready(calling, 1)
        assert calling.of("pool") == []
        event = calling.events.next("pool")
        assert event["cause"] == "verify.expired"
        assert over(leaf)
        ready(calling, 0)
