"""The short way of usual frames and the library's way: the same events, the same bytes, the same state, always."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import h2
import pytest
from h2.errors import ErrorCodes
from h2.events import Event, StreamEnded
from h2.exceptions import ProtocolError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handfast.guard.http2_frames import Frames, machine
from handfast.guard.http2_usual import TESTED, Machine

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, PADDED, PRIORITY = 1, 4, 8, 32
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REQUEST = (b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"a.test"), (b":path", b"/")
ANSWER = (b":status", b"200"), (b"content-type", b"application/grpc")
TRAILERS = ((b"grpc-status", b"0"),)


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


class Pair:
    """Two machines of one side that are told the same: one takes short ways, the other never does."""

    def __init__(self, *, client_side: bool) -> None:
        self.made = [machine(client_side=client_side) for _ in range(2)]
        for (made, _), short in zip(self.made, (True, False), strict=True):  # whichever release is installed
            made._short = short
        self.client = client_side
        self.broken = False
        self.long_ways = 0
        count = self.made[0][0]._long_way

        def counted(data: bytes) -> list[Event]:
            self.long_ways += 1
            return count(data)

        self.made[0][0]._long_way = counted  # type: ignore[method-assign]
        self.told((b"" if client_side else PREFACE) + _frame(SETTINGS, 0, 0))

    def told(self, data: bytes, cut: int = 0) -> list[Any]:
        """Hand both the same bytes, in one piece or two; return what they make of it."""
        made = []
        for one, _ in self.made:
            _clear_up(one)
            events: list[Event] = []
            try:
                for piece in (data[:cut], data[cut:]) if cut else (data,):
                    events += one.receive_data(piece)
            except ProtocolError as error:
                self.broken = True
                made.append([type(error), error.error_code])  # what came before it may be told or not
            else:
                made.append([_plainly(event) for event in events if not isinstance(event, StreamEnded)])
        assert made[0] == made[1]
        self.check()
        return made[0]

    def asked(self, what: str, *words: Any) -> None:
        """Have both do the same."""
        made = []
        for one, _ in self.made:
            _clear_up(one)
            try:
                made.append(getattr(one, what)(*words))
            except (ProtocolError, ValueError, KeyError, AssertionError) as error:
                made.append(type(error))
        assert made[0] == made[1]
        if isinstance(made[0], type):
            self.broken = True  # it was asked what it may not do, and is no longer the same
        self.check()

    def check(self) -> None:
        """Both have the same to say, and know the same."""
        short, long = (one.data_to_send() for one, _ in self.made)
        assert short == long
        if not self.broken:  # else what comes after the fault is kept by the one, and not by the other
            short_state, long_state = (_state(*one) for one in self.made)
            assert short_state == long_state


def _clear_up(one: Machine) -> None:
    """Have the library count streams, which clears up; it does when it likes, and that changes nothing else."""
    assert one.open_inbound_streams + one.open_outbound_streams >= 0


def _plainly(event: Event) -> Any:
    names = (vars(event).keys() | type(event).__annotations__.keys()) - {"stream_ended", "headers", "frame"}
    said = sorted((name, repr(getattr(event, name))) for name in names)
    ended = getattr(event, "stream_ended", None) is not None
    return type(event), said, ended, list(getattr(event, "headers", ()))


def _state(one: Machine, frames: Frames) -> Any:
    _clear_up(one)
    whole = one._inbound_flow_control_window_manager
    streams = {
        key: (
            *(stream.outbound_flow_control_window, stream.request_method, stream._authority, stream.closed_by),
            *(stream._expected_content_length, stream._actual_content_length, stream.max_outbound_frame_size),
            *(vars(stream._inbound_window_manager).values(), vars(stream.state_machine).values()),
        )
        for key, stream in one.streams.items()
        if not stream.closed
    }
    return (
        {key: (*plain, *map(tuple, views)) for key, (*plain, a, b) in streams.items() for views in [(a, b)]},
        (one.state_machine.state, one.highest_inbound_stream_id, one.highest_outbound_stream_id),
        (one.outbound_flow_control_window, one.max_outbound_frame_size, tuple(vars(whole).values())),
        sorted(one._closed_streams.items()),
        (frames.count, round(frames._quiet._left), round(frames._resets._left), bytes(frames.reader._data)),
        (list(one.encoder._encoder.header_table.dynamic_entries)),  # type: ignore[attr-defined]  # our own
        (list(one.decoder._decoder.header_table.dynamic_entries)),  # type: ignore[attr-defined]  # our own
    )


# What is said: usual in most cases, and each way of being unusual in some.

_BLOCKS = [
    b"\x83\x87\x84\x41\x06a.test",  # a request: its host goes into the table
    *(
        b"\x83\x87\x84\xbe",
        b"\x83\x87\x84\xbe\x5c\x015",
        b"\x82\x87\x84\xbe",
    ),  # named by its number, with a length, GET
    *(b"\x88", b"\x88\x0f\x10\x10application/grpc", b"\x88\x5c\x013", b"\x08\x03100", b"\x5c\x01x"),  # answers
    *(b"\x00\x01a\x01b", b"\x40\x01a\x01b", b"\xbe", b"\x20", b"\x20\x88", b"\x3f\xe1\x1f\x88", b"\xff", b""),
    b"\x20\x20\x20\x20\x88",
]
_streams = st.sampled_from([1, 1, 1, 3, 3, 5, 7, 0, 2, 2**31 - 1, 2**31 + 1])
_ours = st.sampled_from([1, 1, 1, 3, 3, 5, 7, 0, 2, 2**31 - 1])
_flags = st.sampled_from([0, END_STREAM, END_STREAM])
_bodies = st.sampled_from([b"x", b"x" * 3, b"x" * 5, b"", b"y" * 16_384, b"z" * 16_385, b"w" * 40])
_SETTING = [
    (1, 0),
    (1, 100),
    (1, 4096),
    (3, 0),
    (3, 1),
    (4, 0),
    (4, 5),
    (4, 2**31 - 1),
    (4, 2**31),
    (5, 16_384),
    (5, 20_000),
]

_frames = st.one_of(
    st.builds(lambda f, s, b: _frame(DATA, f, s, b), _flags, _streams, _bodies),
    st.builds(lambda f, s, b: _frame(HEADERS, f | END_HEADERS, s, b), _flags, _streams, st.sampled_from(_BLOCKS)),
    st.builds(
        lambda s, n: _frame(WINDOW_UPDATE, 0, s, struct.pack(">L", n)),
        st.one_of(_streams, st.just(0)),
        st.sampled_from([1, 5, 70_000, 0, 2**31 - 1, 2**31]),
    ),
    st.builds(lambda s: _frame(RST_STREAM, 0, s, struct.pack(">L", 8)), _streams),
    st.builds(lambda one: _frame(SETTINGS, 0, 0, struct.pack(">HL", *one)), st.sampled_from(_SETTING)),
    st.builds(  # a block in two frames, or one that does not end
        lambda s, b, n, k: _frame(HEADERS, 1, s, b[:n]) + _frame(k, END_HEADERS, s, b[n:]),
        _streams,
        st.sampled_from(_BLOCKS),
        st.integers(0, 4),
        st.sampled_from([CONTINUATION, CONTINUATION, DATA]),
    ),
    st.builds(lambda s, b: _frame(HEADERS, 37, s, b"\0\0\0\0\x10" + b), _streams, st.sampled_from(_BLOCKS)),
    st.builds(lambda s, b: _frame(DATA, PADDED, s, b"\x02" + b + b"\0\0"), _streams, _bodies),
    st.builds(lambda k, f, s, b: _frame(k, f, s, b), st.integers(0, 12), st.integers(0, 255), _streams, _bodies),
    st.sampled_from([_frame(SETTINGS, 1, 0), _frame(PING, 0, 0, b"12345678"), _frame(GOAWAY, 0, 0, bytes(8))]),
)
_asks = st.one_of(
    st.tuples(
        st.just("send_headers"),
        _ours,
        st.sampled_from([REQUEST, ANSWER, TRAILERS, ((b":status", b"103"),), (REQUEST[0], (b"x", b"y" * 17_000))]),
        st.booleans(),
    ),
    st.tuples(st.just("send_data"), _ours, _bodies, st.booleans()),
    st.tuples(st.just("end_stream"), _ours),
    st.tuples(st.just("reset_stream"), _ours, st.just(ErrorCodes.CANCEL)),
    st.tuples(st.just("acknowledge_received_data"), st.sampled_from([0, 1, 5, 16_384, 200_000]), _ours),
)
_steps = st.one_of(st.tuples(st.lists(_frames, min_size=1, max_size=4), st.sampled_from([0, 0, 0, 1, 9, 12])), _asks)


def _play(pair: Pair, steps: Iterable[Any]) -> None:
    for step in steps:
        if pair.broken:
            return
        if isinstance(step[0], list):
            pair.told(b"".join(step[0]), step[1])
        else:
            pair.asked(*step)


_thorough = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_thorough
@given(steps=st.lists(_steps, max_size=14))
def test_a_server_is_the_same_by_both_ways(steps: list[Any]) -> None:
    """Whatever a client sends, in whatever pieces, and whatever we answer."""
    pair = Pair(client_side=False)
    pair.told(_frame(HEADERS, END_HEADERS, 1, _BLOCKS[0]))
    _play(pair, steps)


@_thorough
@given(steps=st.lists(_steps, max_size=14))
def test_a_client_is_the_same_by_both_ways(steps: list[Any]) -> None:
    """Whatever we ask, and whatever an app sends, in whatever pieces."""
    pair = Pair(client_side=True)
    for stream in (1, 3):
        pair.asked("send_headers", stream, REQUEST, stream == 3)
    _play(pair, steps)


_kinds = st.sampled_from(["data", "last", "credit", "answer", "body", "trailers", "reset", "theirs", "next", "next"])


@_thorough
@given(steps=st.lists(st.tuples(_kinds, st.integers(0, 3), st.integers(0, 20_000)), max_size=40))
def test_good_calls_are_the_same_by_both_ways(steps: list[tuple[str, int, int]]) -> None:
    """Many streams at a time, as well-meaning peers have them: windows, ends and resets in any order."""
    pair, newest = Pair(client_side=False), 1
    pair.told(_frame(HEADERS, END_HEADERS, 1, _BLOCKS[0]))
    for kind, back, size in steps:
        if pair.broken:
            return
        stream = max(1, newest - 2 * back)
        match kind:
            case "next":
                newest += 2
                pair.told(_frame(HEADERS, END_HEADERS | (size & 1), newest, b"\x83\x87\x84\xbe"))
            case "data" | "last":
                pair.told(_frame(DATA, int(kind == "last"), stream, bytes(size % 16_384)))
            case "credit":
                pair.told(_frame(WINDOW_UPDATE, 0, stream * (size & 1), struct.pack(">L", size + 1)))
            case "theirs":
                pair.told(_frame(RST_STREAM, 0, stream, struct.pack(">L", 8)))
            case "answer":
                pair.asked("send_headers", stream, ANSWER, False)
            case "body":
                pair.asked("send_data", stream, bytes(size % 16_384), False)
            case "trailers":
                pair.asked("send_headers", stream, TRAILERS, True)
            case _:
                pair.asked("reset_stream", stream, ErrorCodes.CANCEL)


def test_a_call_of_grpc_goes_the_short_way_whole() -> None:
    """From its second call on, neither side of the guard has a frame go the library's way; an odd one does."""
    server, client = Pair(client_side=False), Pair(client_side=True)
    for stream in (1, 3, 5):
        before = server.long_ways, client.long_ways
        block = _BLOCKS[0] if stream == 1 else _BLOCKS[1]
        server.told(_frame(HEADERS, END_HEADERS, stream, block) + _frame(DATA, END_STREAM, stream, b"x"))
        client.asked("send_headers", stream, REQUEST, False)
        client.asked("send_data", stream, b"x", True)
        said = _frame(HEADERS, END_HEADERS, stream, b"\x88") + _frame(DATA, 0, stream, b"y")
        client.told(said + _frame(HEADERS, END_HEADERS | END_STREAM, stream, b"\x00\x0bgrpc-status\x010"))
        for side in (server, client):
            side.asked("acknowledge_received_data", 1, stream)
        server.asked("send_headers", stream, ANSWER, False)
        server.asked("send_data", stream, b"y", False)
        server.asked("send_headers", stream, TRAILERS, True)
        assert not server.broken
        assert not client.broken
        assert ((server.long_ways, client.long_ways) == before) is (stream > 1)
    assert not server.made[0][0].streams
    assert not client.made[0][0].streams
    server.told(_frame(HEADERS, END_HEADERS | PRIORITY, 7, b"\0\0\0\0\x10" + _BLOCKS[1]))
    assert server.long_ways == before[0] + 1


@pytest.mark.parametrize("block", [b"\x20\x20\x20\x88", b"\xff\xff\xff\xff\xff\x7f", b"\x5c\x01x"])
def test_a_bad_block_ends_the_connection_by_either_way(block: bytes) -> None:
    """A flood of sizes, a number beyond the table, a length that is none: it is over; a good one goes on."""
    for bad in (False, True):
        pair = Pair(client_side=False)
        pair.told(_frame(HEADERS, END_HEADERS, 1, _BLOCKS[0]))
        pair.told(_frame(HEADERS, END_HEADERS, 3, block if bad else _BLOCKS[1]))
        assert pair.broken is bad


def test_with_another_library_all_goes_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of the library's state holds for the releases that are named, and for no other."""
    for version, short in ((next(iter(TESTED)), True), ("4.4.99", False)):
        monkeypatch.setattr(h2, "__version__", version)
        made, _ = machine(client_side=True)
        made.send_headers(1, REQUEST)
        assert made._short is short
        assert made.streams[1].request_method == b"POST"
