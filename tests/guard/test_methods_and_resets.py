"""Methods without end, streams that we are made to reset, and what comes after the end of HTTP/2."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire.http1 import parse_request_head
from tests.support.apps import App, client_context
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.http2 import Client
from tests.support.waiting import until

HEADERS, RST_STREAM, SETTINGS, GOAWAY = 1, 3, 4, 7
WHOLE, PRIORITY = 5, 32  # END_STREAM and END_HEADERS; a priority comes first


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def _get(authority: str, path: bytes = b"/") -> bytes:
    """GET, in HPACK, without a change to the table."""
    host = authority.encode()
    return b"\x82\x87\x04" + bytes([len(path)]) + path + b"\x01" + bytes([len(host)]) + host


def _ended(guard: Running) -> list[str]:
    return [event["reason"] for event in guard.events.all if event["event"] == "ended"]


def _drain(guard: Running) -> None:
    for connection in guard.guard.connections:
        connection.drain()


def test_a_method_is_short() -> None:
    """A method of 65 bytes is no request; one of 64 is: it is remembered and logged for each request."""
    for length in (64, 65):
        head = b"A" * length + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        if length == 64:
            assert parse_request_head(head).method == b"A" * 64
        else:
            with pytest.raises(RemoteProtocolError) as refused:
                parse_request_head(head)
            assert refused.value.reason is Reason.HTTP_REQUEST_LINE


@pytest.mark.parametrize("twice", [False, True])
def test_making_us_reset_streams_is_a_flood(ca: Ca, tmp_path: Path, twice: bool) -> None:
    """A client that breaks each of its streams so that we reset them is cut off (CVE-2025-8671); a fast one is not."""
    context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
    with App() as app, Running(ca, app.address) as guard, Client(guard.address, context) as client:
        if not twice:
            assert all(client.get("/").status == 200 for _ in range(500))
            assert not _ended(guard)
            return
        with suppress(OSError):
            for stream in range(1, 1001, 2):
                client.raw(_frame(HEADERS, WHOLE, stream, _get(client.authority)) * 2)
        until(lambda: _ended(guard) == ["http.h2_flood"], "the end")


def test_one_breath_after_the_end_is_nobodys(ca: Ca, tmp_path: Path) -> None:
    """While a guard drains, what follows a request that ended the connection reaches no app and is no bug."""
    context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
    with App() as app, Running(ca, app.address) as guard, Client(guard.address, context) as client:
        guard.events.next("connection")
        guard.call(setattr, guard.guard, "draining", True)
        guard.call(_drain, guard)
        client.raw(
            _frame(HEADERS, WHOLE, 1, _get("other.test"))
            + _frame(HEADERS, WHOLE, 3, _get(client.authority, b"/second"))
        )
        assert guard.events.next("request")["reason"] == "http.misdirected"
        guard.call(_drain, guard)  # again, when all is said
        until(lambda: not guard.call(len, guard.guard.connections), "the end of the connection")
        assert b"/second" not in app.received
        assert all(event["event"] != "bug" for event in guard.events.all)


def test_a_refused_client_of_http2_makes_no_bug(ca: Ca, tmp_path: Path) -> None:
    """However a stranger begins and ends streams, or says goodbye a thousand times, it is refused and no more."""
    context = client_context(ca.save(tmp_path, "ca"), Ca.root("Other").client(), tmp_path)
    with App() as app, Running(ca, app.address) as guard:
        for odd in (
            _frame(HEADERS, WHOLE, 1, _get("localhost"))
            + _frame(RST_STREAM, 0, 1, (8).to_bytes(4, "big"))
            + _frame(HEADERS, WHOLE | PRIORITY, 3, b"\0\0\0\0\x10" + _get("localhost")),
            _frame(GOAWAY, 0, 0, bytes(8)) * 999,
        ):
            with Client(guard.address, context) as client:
                client.raw(odd)
                assert guard.events.next("connection")["decision"] == "deny"
        until(lambda: not guard.call(len, guard.guard.connections), "the end of the connections")
        assert all(event["event"] != "bug" for event in guard.events.all)
