"""HTTP/2 as a weapon: each flood, bomb and stall ends its connection or stream, and its good twin is served."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hpack import Decoder, Encoder, HeaderTuple, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from handfast.guard.connection import Connection, Limits
from handfast.guard.http2 import MANY_HELD, MOST_HELD, Http2Session
from handfast.guard.http2_frames import machine
from handfast.wire.packing import TABLE
from tests.support.apps import HELLO, App, client_context
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.http2 import Client
from tests.support.waiting import PATIENCE, until

HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 1, 2, 3, 4, 6, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4

Enter = Callable[..., Client]


@pytest.fixture
def enter(ca: Ca, tmp_path: Path) -> Enter:
    """Connect to a guard as a client that speaks HTTP/2."""
    bundle = ca.save(tmp_path, "ca")

    def enter(guard: Running, *, greedy: bool = True, **initial: int) -> Client:
        return Client(guard.address, client_context(bundle, ca.client(), tmp_path), greedy=greedy, **initial)

    return enter


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def _pour(client: Client, frames: bytes, most: int = 400) -> None:
    """Send the same frames over and over until the far side has had enough."""
    for _ in range(most):
        if client.closed:
            break
        client.raw(frames)
    client.until(lambda: client.closed)


def _ended(guard: Running, client: Client, reason: str, code: ErrorCodes) -> str:
    """Check how a connection ended; return what the log says of it."""
    event = guard.events.next("ended")
    assert event["reason"] == reason
    assert client.goaway is None or client.goaway[0] == code  # a reset by the system may be quicker than the reader
    return str(event["detail"])


def _silent(connection: socket.socket, request: bytes) -> None:
    if b"/good" in request:
        connection.sendall(HELLO)


FLOODS: dict[str, bytes] = {
    "ping": _frame(PING, 0, 0, b"12345678"),
    "settings": _frame(SETTINGS, 0, 0, struct.pack(">HL", SettingCodes.MAX_FRAME_SIZE, 20_000)),
    "empty_settings": _frame(SETTINGS, 0, 0),
    "priority": _frame(PRIORITY, 0, 3, struct.pack(">LB", 1, 16)),
    "window_update": _frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", 1)),
    "empty_data": _frame(0, 0, 1),
    "padding": _frame(0, 8, 1, b"\x04" + bytes(4)),
    "unknown": _frame(0xFA, 0, 0, b"x"),
    "late_reset": _frame(RST_STREAM, 0, 1, struct.pack(">L", 8)),
}


@pytest.mark.parametrize("case", FLOODS)
def test_floods_of_frames_end_the_connection(ca: Ca, enter: Enter, case: str) -> None:
    """Thousands of frames that ask for nothing: GOAWAY with ENHANCE_YOUR_CALM, and a line in the log."""
    with App(_silent) as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.send(client.head(method="POST"), None)
        _pour(client, FLOODS[case] * 200)
        detail = _ended(guard, client, "http.h2_flood", ErrorCodes.ENHANCE_YOUR_CALM)
        assert ("resets" if case == "late_reset" else "frames that ask for nothing") in detail


@pytest.mark.parametrize("case", FLOODS)
def test_some_such_frames_are_fine(ca: Ca, enter: Enter, case: str) -> None:
    """A hundred of them do no harm, and requests are served before and after."""
    with App(_silent) as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.send(client.head(method="POST"), None)
        for _ in range(4):
            client.raw(FLOODS[case] * 25)
            assert client.get("/good").status == 200
        assert client.goaway is None


def test_downloads_and_uploads_earn_their_window_updates(ca: Ca, enter: Enter) -> None:
    """A client that answers each DATA frame with window updates for both windows is no flood, however long."""
    size = 32 << 20
    app = App(lambda plain, _: plain.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)))
    with app, Running(ca, app.address) as guard, enter(guard, greedy=False) as client:
        stream, seen = client.send(client.head()), 0
        answer = client.answers[stream]
        while not answer.over and not client.closed:
            client.read()
            fresh = len(answer.body) - seen
            seen += fresh
            for part in (fresh // 2, fresh - fresh // 2) if fresh > 1 and not answer.over else ():
                client.h2.increment_flow_control_window(part)
                client.h2.increment_flow_control_window(part, stream)
            client.flush()
        assert answer.ended
        assert seen == size


def test_rapid_resets_end_the_connection(ca: Ca, enter: Enter) -> None:
    """Streams begun and reset at once (CVE-2023-44487) are counted; a few are what any client may do."""
    with App(_silent) as app, Running(ca, app.address) as guard:
        with enter(guard) as client:
            for _ in range(50):
                client.h2.reset_stream(client.send(client.head("/a")), ErrorCodes.CANCEL)
            client.flush()
            assert client.get("/good").status == 200
        with enter(guard) as client:
            while not client.closed and client.h2.highest_outbound_stream_id < 20_000:
                for _ in range(50):
                    stream = client.h2.get_next_available_stream_id()
                    client.h2.send_headers(stream, client.head("/b"), end_stream=True)
                    client.h2.reset_stream(stream, ErrorCodes.CANCEL)
                client.flush()
            client.until(lambda: client.closed)
        assert "resets" in _ended(guard, client, "http.h2_flood", ErrorCodes.ENHANCE_YOUR_CALM)
        assert app.received.count(b"GET /b") < 500


def test_deadlines_are_no_rapid_resets(ca: Ca, enter: Enter) -> None:
    """A client that gives up 100 requests at a time, each after it has waited a little, may do so without end."""
    with App(_silent) as app, Running(ca, app.address) as guard, enter(guard) as client:
        for _ in range(12):
            client.get("/good")
            streams = [client.send(client.head("/a", method="POST"), b"x") for _ in range(100)]
            began = time.monotonic()
            while time.monotonic() < began + 0.1:
                client.h2.ping(b"deadline")
                client.flush()
                client.until(lambda: client.pongs > 0)
                client.pongs = 0
            for stream in streams:
                client.h2.reset_stream(stream, ErrorCodes.CANCEL)
            client.flush()
        assert client.get("/good").status == 200


def test_malformed_requests_are_counted_too(ca: Ca, enter: Enter) -> None:
    """Streams that are begun only to be refused cost as resets do."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
        while not client.closed and client.h2.highest_outbound_stream_id < 20_000:
            for _ in range(50):
                stream = client.h2.get_next_available_stream_id()
                client.h2.send_headers(stream, client.head("/", ("connection", "x")), end_stream=True)
            client.flush()
            client.wait(stream)
        _ended(guard, client, "http.h2_flood", ErrorCodes.ENHANCE_YOUR_CALM)
        assert app.connections == 0


@pytest.mark.parametrize("size", [0, 1, 16_000])
def test_continuation_floods_end_the_connection(ca: Ca, enter: Enter, size: int) -> None:
    """A head that never ends (CVE-2024-27316) is cut off after so many CONTINUATION frames, whatever their size."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.raw(_frame(HEADERS, END_STREAM, 1, b"\x82"))
        _pour(client, _frame(CONTINUATION, 0, 1, bytes([0x82]) * size) * 20)
        event = guard.events.next("ended")
        assert event["reason"] == "http.h2"
        assert "continuation" in event["detail"]
        assert app.connections == 0


def test_a_head_in_pieces_is_one(ca: Ca, enter: Enter) -> None:
    """A head in a few CONTINUATION frames is read whole."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
        block = Encoder().encode(client.head("/pieces", ("a", "b" * 100)))
        pieces = [block[at : at + 10] for at in range(0, len(block), 10)]
        client.h2.send_headers(1, client.head(), end_stream=True)  # for the client's own state
        client.h2.clear_outbound_data_buffer()
        client.raw(_frame(HEADERS, END_STREAM, 1, pieces[0]))
        for piece in pieces[1:]:
            client.raw(_frame(CONTINUATION, 0, 1, piece))
        client.raw(_frame(CONTINUATION, END_HEADERS, 1))
        assert client.wait(1).status == 200
        assert b"GET /pieces HTTP/1.1" in app.received


def test_a_frame_that_is_too_large_is_not_waited_for(ca: Ca, enter: Enter) -> None:
    """A frame that announces more than was agreed ends the connection at its head, before any of it is kept."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.raw(_frame(0xFA, 0, 0, b"x" * 16_384))
        assert client.get().status == 200
        client.raw(b"\xff\xff\xff\xfa\0\0\0\0\0")
        client.until(lambda: client.closed)
        _ended(guard, client, "http.h2", ErrorCodes.FRAME_SIZE_ERROR)


@pytest.mark.parametrize(("times", "served"), [(10, True), (20, False)])
def test_header_bombs(ca: Ca, enter: Enter, times: int, served: bool) -> None:
    """One large header, put in the table and named many times, ends the connection beyond 64 KiB; below it is fine."""
    with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
        assert client.get("/", ("bomb", "x" * 3900)).status == 200
        stream = client.send(client.head("/bomb", *[("bomb", "x" * 3900)] * times))
        if served:
            assert client.wait(stream).status == 200
        else:
            client.until(lambda: client.closed)
            _ended(guard, client, "http.h2", ErrorCodes.ENHANCE_YOUR_CALM)
            assert b"/bomb" not in app.received


def test_floods_within_a_header_block(ca: Ca, enter: Enter) -> None:
    """Thousands of changes of the table's size, or more bytes than a list may have, end the connection unread."""
    for block in (b"\x20\x3f\xe1\x1f" * 2000, b"\x00\x01a\x01b" * 100_000):
        with App() as app, Running(ca, app.address) as guard, enter(guard) as client:
            pieces = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
            client.raw(_frame(HEADERS, END_STREAM, 1, pieces[0]))
            for piece in pieces[1:]:
                client.raw(_frame(CONTINUATION, 0, 1, piece))
            client.raw(_frame(CONTINUATION, END_HEADERS, 1))
            client.until(lambda: client.closed)
            assert "bytes of headers" in _ended(guard, client, "http.h2_flood", ErrorCodes.ENHANCE_YOUR_CALM)


@pytest.mark.parametrize("window", [0, 10])
def test_a_window_that_stays_shut(ca: Ca, enter: Enter, window: int) -> None:
    """A client that asks and takes nothing loses the stream after the idle limit; one that opens in time gets all."""
    with App() as app, Running(ca, app.address, limits=Limits(idle=2)) as guard:
        with enter(guard, greedy=False, initial_window_size=window) as client:
            answer = client.get()
            assert (answer.status, answer.reset) == (200, ErrorCodes.CANCEL)
            assert guard.events.next("request")["reason"] == "ended.idle"
        with enter(guard, greedy=False, initial_window_size=window) as client:
            stream = client.send(client.head())
            client.wait(stream, lambda one: one.status == 200)
            client.h2.increment_flow_control_window(100, stream)
            client.flush()
            assert client.wait(stream).body == b"Hello World\n"


LARGE = 50_000_000  # bytes of an answer that no client of these tests takes whole


def _large(connection: socket.socket, request: bytes) -> None:
    if b"/small" in request:
        connection.sendall(HELLO)
        return
    size = 200_000 if b"/some" in request else LARGE
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    piece = bytes(50_000)
    for _ in range(size // len(piece)):
        connection.sendall(piece)


def _settled(value: Callable[[], int]) -> int:
    """What a number is once it has stayed the same for half a second."""
    deadline, since, last = time.monotonic() + 15, time.monotonic(), value()
    while time.monotonic() - since < 0.5:
        assert time.monotonic() < deadline, "it never rests"
        time.sleep(0.02)
        if (now := value()) != last:
            since, last = time.monotonic(), now
    return last


def _held(guard: Running) -> int:
    """Bytes of answers that wait in the guard for its one client."""
    (connection,) = guard.guard.connections
    session = connection._session
    assert isinstance(session, Http2Session)
    streams = session._streams.values()
    held = guard.call(lambda: sum(stream.waiting for stream in streams))
    assert isinstance(held, int)
    return held


@pytest.mark.parametrize("window", [0, 1, 65_535])
def test_answers_that_nobody_reads_are_bounded_together(ca: Ca, enter: Enter, window: int) -> None:
    """100 streams ask for 50 MB each and the client reads nothing: the guard takes some 8 MiB from the apps in all."""
    with App(_large) as app, Running(ca, app.address) as guard:
        with enter(guard, greedy=False, initial_window_size=window) as client:
            for number in range(100):
                client.send(client.head(f"/{number}"))
            deadline = time.monotonic() + 15
            while app.connections < 100:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            held = _settled(lambda: _held(guard))
            assert MANY_HELD < held < MOST_HELD + (1 << 18)
        ended = [guard.events.next("request") for _ in range(100)]
        assert {event["outcome"] for event in ended} == {"client gone"}
        assert sum(event["bytes_out"] for event in ended) < MOST_HELD + (1 << 18) + 2 * 65_535


def test_a_client_that_reads_gets_all_of_every_answer(ca: Ca, enter: Enter) -> None:
    """100 answers at once, many times what may be held together, come whole to a client that takes them."""
    with App(_large) as app, Running(ca, app.address) as guard, enter(guard) as client:
        streams = [client.send(client.head("/some")) for _ in range(100)]
        assert [len(client.wait(stream).body) for stream in streams] == [200_000] * 100
        assert all(client.answers[stream].ended for stream in streams)
        assert _settled(lambda: _held(guard)) == 0


def test_streams_that_rest_leave_room_for_others(ca: Ca, enter: Enter) -> None:
    """With more unread answers than the first bound, others are served whole beside them, and the unread go on."""
    enter_slow = partial(enter, greedy=False, initial_window_size=1 << 16)
    with App(_large) as app, Running(ca, app.address) as guard, enter_slow(guard) as client:
        client.h2.increment_flow_control_window(1 << 30)
        client.flush()
        resting = 0
        while not resting or _settled(lambda: _held(guard)) <= MANY_HELD:
            resting = client.send(client.head("/large"))
            client.wait(resting, lambda answer: len(answer.body) == 1 << 16)
        for _ in range(3):
            stream = client.send(client.head("/some"))
            client.h2.increment_flow_control_window(1 << 20, stream)
            client.flush()
            assert len(client.wait(stream).body) == 200_000
            assert client.get("/small").status == 200
        client.h2.increment_flow_control_window(1 << 20, resting)
        client.flush()
        client.wait(resting, lambda answer: len(answer.body) == (1 << 16) + (1 << 20))


def _narrow(guard: Running) -> Connection:
    """Let the guard's one connection hand the system but little at a time, as over a long way."""
    (connection,) = guard.guard.connections
    plug = connection.transport.get_extra_info("socket")
    guard.call(plug.setsockopt, socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)
    return connection


def test_the_end_of_an_answer_waits_for_the_way_to_the_client(ca: Ca, enter: Enter) -> None:
    """A small answer whose end comes while a large one fills the way to the client ends all the same."""
    end = threading.Event()

    def answer(plain: socket.socket, request: bytes) -> None:
        if b"/large" in request:
            plain.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (8 << 20) + bytes(8 << 20))
        else:
            plain.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
            end.wait(PATIENCE)
            plain.sendall(b"0\r\n\r\n")

    with (
        App(answer) as app,
        Running(ca, app.address) as guard,
        enter(guard, greedy=False, initial_window_size=1 << 24) as client,
    ):
        client.h2.increment_flow_control_window(1 << 30)
        session = _narrow(guard)._session
        assert isinstance(session, Http2Session)
        small = client.send(client.head("/small"))
        client.wait(small, lambda answer: answer.body == b"hello")
        large = client.send(client.head("/large"))
        until(lambda: session.blocked, "a way that is full")
        out = session._streams[small]._out
        end.set()
        until(lambda: out.last, "the end of the small answer")
        assert len(client.wait(large).body) == 8 << 20
        assert client.wait(small).ended


def test_windows_that_open_all_at_once_cut_nobody_off(ca: Ca, enter: Enter) -> None:
    """100 answers wait, and their client opens the window of each in one breath: it gets all of them."""
    with App(_large) as app, Running(ca, app.address) as guard, enter(guard, initial_window_size=0) as client:
        client.greedy = False
        client.h2.increment_flow_control_window(1 << 30)
        _narrow(guard)
        streams = [client.send(client.head("/some")) for _ in range(100)]
        _settled(lambda: _held(guard))
        for stream in streams:
            client.h2.increment_flow_control_window(1 << 20, stream)
        client.flush()
        assert [len(client.wait(stream).body) for stream in streams] == [200_000] * 100


def test_a_refusal_waits_for_the_window_too(ca: Ca, enter: Enter) -> None:
    """Our own answers keep to the client's windows."""
    with App() as app, Running(ca, app.address) as guard, enter(guard, initial_window_size=0) as client:
        fields = client.head()
        fields[2] = (":authority", "other.test")
        stream = client.send(fields)
        client.wait(stream, lambda one: one.status == 421)
        client.h2.increment_flow_control_window(100, stream)
        client.flush()
        assert json.loads(client.wait(stream).body)["error"] == "http.misdirected"
        assert app.connections == 0


@pytest.mark.parametrize("sent", [b"PRI * HTTP/2.0\r\n", _frame(HEADERS, END_STREAM, 1, b"\x82" * 50)[:20]])
def test_slow_heads_are_cut_off(ca: Ca, enter: Enter, sent: bytes) -> None:
    """A head, or the first words, byte by byte: there is one limit for all of it."""
    with App() as app, Running(ca, app.address, limits=Limits(head=2)) as guard:
        with enter(guard) as client:
            assert client.get().status == 200
            began = time.monotonic()
            part = sent if sent[:1] != b"P" else _frame(HEADERS, 0, 3, b"\x82")
            for at in range(len(part)):
                client.raw(part[at : at + 1])
                time.sleep(0.05)
            client.until(lambda: client.closed)
            assert time.monotonic() - began < 15
        assert guard.events.next("ended")["reason"] == "http.timeout"


def test_what_is_no_http_2_ends_the_connection(ca: Ca, tmp_path: Path) -> None:
    """A client that agreed on HTTP/2 and speaks HTTP/1.1 is not understood."""
    with App() as app, Running(ca, app.address) as guard:
        context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
        context.set_alpn_protocols(["h2"])
        host, _, port = guard.address.rpartition(":")
        plain = socket.create_connection((host, int(port)), timeout=30)
        with plain, context.wrap_socket(plain, server_hostname="localhost") as tls:
            tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while tls.recv(1 << 16):
                pass
        assert guard.events.next("ended")["reason"] == "http.h2"
        assert app.connections == 0


def test_too_many_streams_are_refused_one_by_one(ca: Ca, enter: Enter) -> None:
    """Beyond a hundred at a time streams get REFUSED_STREAM, which is safe to ask again; the others are served."""
    go = threading.Event()

    def slow(connection: socket.socket, _request: bytes) -> None:
        go.wait(60)
        connection.sendall(HELLO)

    with App(slow) as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.until(lambda: client.h2.remote_settings.max_concurrent_streams == 100)
        client.h2.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
        client.h2.remote_settings.acknowledge()
        streams = [client.send(client.head()) for _ in range(110)]
        assert [client.wait(stream).reset for stream in streams[100:]] == [ErrorCodes.REFUSED_STREAM] * 10
        go.set()
        assert all(client.wait(stream).status == 200 for stream in streams[:100])


def test_bodies_have_a_limit(ca: Ca, enter: Enter) -> None:
    """A body over the limit is 413, declared or not; one within it goes through."""
    with App(_silent) as app, Running(ca, app.address, limits=Limits(max_body=1000)) as guard, enter(guard) as client:
        for head in ([("content-length", "1001")], []):
            assert client.get("/", *head, method="POST", body=b"x" * 1001).status == 413
        assert client.get("/good", method="POST", body=b"x" * 1000).status == 200


def test_a_request_that_does_not_end_is_408(ca: Ca, enter: Enter) -> None:
    """A body that stops half-way has the limit of an answer."""
    with App(_silent) as app, Running(ca, app.address, limits=Limits(response=2)) as guard, enter(guard) as client:
        stream = client.send(client.head(method="POST"), None)
        client.body(stream, b"half")
        assert client.wait(stream).status == 408
        assert client.get("/good").status == 200


# The machine itself.


def test_a_peer_cannot_make_our_table_grow() -> None:
    """A wish for a table of 4 GiB is heard and not followed; a smaller one is."""
    server, _ = machine(client_side=False)
    client, _ = machine(client_side=True)
    for wish, got in ((2**32 - 1, TABLE), (100, 100)):
        client.update_settings({SettingCodes.HEADER_TABLE_SIZE: wish})
        server.receive_data(client.data_to_send())
        assert server.encoder.header_table_size == got


_field = st.tuples(
    st.sampled_from([b"a", b"authorization", b":path", b"x-large"]),
    st.sampled_from([b"", b"1", b"2", b"y" * 900, b"z" * 5000]),
    st.booleans(),
)


@given(blocks=st.lists(st.lists(_field, max_size=5), max_size=30), size=st.sampled_from([0, 100, 2000, 4096]))
def test_what_is_remembered_is_what_would_be_packed(blocks: list[list[tuple[bytes, bytes, bool]]], size: int) -> None:
    """Whatever lists come, and come again, both readers of ours and of the library read what was meant."""
    sender, _ = machine(client_side=True)
    receiver, _ = machine(client_side=False)
    judge = Decoder()
    sender.encoder.header_table_size = size
    for block in blocks + blocks:
        fields = [(NeverIndexedHeaderTuple if secret else HeaderTuple)(name, value) for name, value, secret in block]
        packed = sender.encoder.encode(fields)
        for got in (receiver.decoder.decode(packed), judge.decode(packed, raw=True)):
            assert list(got) == fields


def test_what_is_secret_stays_so() -> None:
    """A header that must not be kept in tables (RFC 7541 7.1.3) is in none, and says so, each time it is packed."""
    sender, _ = machine(client_side=True)
    fields = [(b"a", b"b"), NeverIndexedHeaderTuple(b"authorization", b"secret")]
    for _ in range(4):
        got = list(Decoder().decode(sender.encoder.encode(fields[1:]), raw=True))
        assert [type(one) for one in got] == [NeverIndexedHeaderTuple]
    assert b"secret" not in [value for _, value in sender.encoder._encoder.header_table.dynamic_entries]  # type: ignore[attr-defined]  # our own
