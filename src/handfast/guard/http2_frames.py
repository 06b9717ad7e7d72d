"""The HTTP/2 machine (`h2`), made to fit between strangers: what it takes is bounded, what repeats costs little.

Owns what stands around the library's parts: frames are counted before they are acted on, header blocks are bounded
before they are unpacked, and GOAWAY ends no stream that is under way (RFC 9113 6.8). It knows no requests.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from time import monotonic

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import DenialOfServiceError, FrameTooLargeError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from hpack import Decoder, Encoder, HeaderTuple
from hpack.table import HeaderTable
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame

from handfast.wire.http1 import Header
from handfast.wire.http2 import MAX_LIST

MAX_STREAMS = 100  # requests at a time (RFC 9113 6.5.2 names no less)
STREAM_WINDOW = 1 << 18  # bytes of a request's body that wait for the app, of each stream
CONNECTION_WINDOW = 1 << 20  # and of all streams together
_LARGEST = 1 << 16  # bytes of a DATA frame of ours, where the peer takes so many: others want their turn
TABLE = 4096  # bytes of a header table, RFC 9113 6.5.2's default; a peer's larger wish is not followed
_HEADER = 9  # bytes of a frame's head, RFC 9113 4.1
_CLOSED = 512  # streams that are remembered when they are over

# How many, and how many more a second. The tables of others for the same: nghttp2 takes 1,000 resets and 33 a second;
# Envoy takes 10 WINDOW_UPDATE for each DATA that it sent.
_RESETS = (400, 100)
_QUIET = (1000, 200)
_EARNED = 10  # quiet frames that each DATA of ours gives a right to
_EARNED_BY_THEIRS = 2  # and each of the peer's own
_MOST_KNOWN, _LONGEST_KNOWN = 16, 2048  # blocks of headers that each direction remembers, and bytes of one

# Changes of the table's size at the head of a block. RFC 7541 4.2: at most two. A flood of them is work for nothing.
_SIZES = re.compile(rb"(?:[\x20-\x3e]|\x3f[\x80-\xff]*+[\x00-\x7f]){3}")


class Flood(DenialOfServiceError):
    """A peer sends more of a kind than one that means well; the connection ends with ENHANCE_YOUR_CALM."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(what)


class _Budget:
    """A token bucket: so many at once, and so many more a second."""

    __slots__ = ("_at", "_burst", "_left", "_rate", "_what")

    def __init__(self, what: str, burst: int, rate: int) -> None:
        self._what, self._burst, self._rate = what, burst, rate
        self._left = float(burst)
        self._at = monotonic()

    def spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            moment = monotonic()
            self._left = min(self._left + (moment - self._at) * self._rate, self._burst)
            self._at = moment
            if self._left < 0:
                raise Flood(self._what)

    def earn(self, count: int) -> None:
        self._left = min(self._left + count, self._burst)


class Frames:
    """Where `h2` takes its frames from: its own reader, and every frame looked at before it is acted on.

    A GOAWAY is kept here and not handed on, since `h2` would let nothing through after it.
    """

    def __init__(self, reader: FrameBuffer, *, count_resets: bool) -> None:
        self._reader = reader
        self._count_resets = count_resets  # those of an app are its answers: a gRPC server may end each call with one
        self._resets = _Budget("resets", *_RESETS)
        self._quiet = _Budget("frames that ask for nothing", *_QUIET)
        self.count = 0
        self.goaway: GoAwayFrame | None = None

    @property
    def max_frame_size(self) -> int:
        """Bytes of a frame at most; `h2` sets it."""
        return self._reader.max_frame_size

    @max_frame_size.setter
    def max_frame_size(self, size: int) -> None:
        self._reader.max_frame_size = size

    def add_data(self, data: bytes) -> None:
        """Take what the network brought. Raises ProtocolError for what does not begin as HTTP/2."""
        self._reader.add_data(data)

    def earn(self) -> None:
        """A DATA frame was sent: the peer may answer it with window updates and pings."""
        self._quiet.earn(_EARNED)

    def spend_reset(self) -> None:
        """Count a stream that was begun for nothing."""
        self._resets.spend()

    def __iter__(self) -> Frames:
        return self

    def __next__(self) -> Frame:
        frame = next(self._reader, None)
        if frame is None:
            # The library looks at a frame's length when all of it has come: up to 16 MiB that it would keep.
            begun = self._reader._data
            if len(begun) >= _HEADER and int.from_bytes(begun[:3], "big") > self._reader.max_frame_size:
                raise FrameTooLargeError("a frame larger than agreed")
            raise StopIteration
        self.count += 1
        if isinstance(frame, DataFrame):
            if frame.data:
                self._quiet.earn(_EARNED_BY_THEIRS)
            elif "END_STREAM" not in frame.flags:
                self._quiet.spend()
        elif isinstance(frame, HeadersFrame):
            if len(frame.data) > MAX_LIST or _SIZES.match(frame.data):
                raise Flood("bytes of headers")
        elif isinstance(frame, RstStreamFrame):
            if self._count_resets:
                self._resets.spend()
        else:
            self._quiet.spend()
            if isinstance(frame, GoAwayFrame):
                self.goaway = frame
                return next(self)
        return frame


class _Packer:
    """A packer of headers (RFC 7541) without Huffman's code, which costs more here than it saves.

    A list that comes again while the table is as it was is not packed again.
    """

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._known: dict[object, bytes] = {}

    @property
    def header_table_size(self) -> int:
        return self._encoder.header_table_size

    @header_table_size.setter
    def header_table_size(self, size: int) -> None:
        self._known.clear()  # the next block must tell of it
        self._encoder.header_table_size = min(size, TABLE)

    def encode(self, headers: Iterable[Header]) -> bytes:
        fields = tuple(headers)
        key = fields, tuple(map(type, fields))  # the type says whether the table may have it
        packed = self._known.get(key)
        if packed is None:
            before, resized = _State(self._encoder.header_table), self._encoder.header_table.resized
            packed = self._encoder.encode(fields, huffman=False)
            if resized or not before.holds():
                self._known.clear()
            elif len(packed) <= _LONGEST_KNOWN and len(self._known) < _MOST_KNOWN:
                self._known[key] = packed
        return packed


class _Unpacker:
    """An unpacker of headers. A block that comes again while the table is as it was is not unpacked again."""

    def __init__(self) -> None:
        self._decoder = Decoder(MAX_LIST)
        self._known: dict[bytes, list[HeaderTuple]] = {}

    def decode(self, block: bytes, raw: bool = True) -> list[HeaderTuple]:
        headers = self._known.get(block)
        if headers is None:
            before = _State(self._decoder.header_table)
            headers = list(self._decoder.decode(block, raw))
            if not before.holds():
                self._known.clear()
            elif len(block) <= _LONGEST_KNOWN and len(self._known) < _MOST_KNOWN:
                self._known[block] = headers
        return headers


class _State:
    """What tells a table from itself a moment later: entries come in front, each a new object, and go at the back."""

    __slots__ = ("_count", "_newest", "_size", "_table")

    def __init__(self, table: HeaderTable) -> None:
        entries = table.dynamic_entries
        self._table, self._count, self._size = table, len(entries), table.maxsize
        self._newest = entries[0] if entries else None  # kept, so that its place in memory is not given to another

    def holds(self) -> bool:
        entries = self._table.dynamic_entries
        newest = entries[0] if entries else None
        return newest is self._newest and len(entries) == self._count and self._table.maxsize == self._size


class _Machine(H2Connection):
    MAX_CLOSED_STREAMS = _CLOSED  # the one way to set it; else each connection may remember 65,536


def machine(*, client_side: bool) -> tuple[H2Connection, Frames]:
    """Return the machine of one connection, its first words waiting to be sent, and its frames.

    It checks no header lists: `wire.http2` does, for one stream at a time. All else that RFC 9113 asks of framing,
    states and windows it holds the peer to, and raises h2's ProtocolError.
    """
    made = _Machine(
        H2Configuration(
            client_side=client_side,
            header_encoding=None,
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
    )
    frames = Frames(made.incoming_buffer, count_resets=not client_side)
    made.incoming_buffer = frames  # type: ignore[assignment]  # as much of a FrameBuffer as `h2` uses
    made.encoder = _Packer()  # type: ignore[assignment]  # likewise
    made.decoder = _Unpacker()  # type: ignore[assignment]  # likewise
    made.local_settings = _settings(client_side, MAX_STREAMS)
    made.initiate_connection()
    made.increment_flow_control_window(CONNECTION_WINDOW - made.inbound_flow_control_window)
    # A client may open some before it has read how many; these get REFUSED_STREAM, which lets it ask again.
    made.local_settings = _settings(client_side, 2 * MAX_STREAMS)
    return made, frames


def goaway(last_stream: int) -> bytes:
    """Return a GOAWAY that lets the streams up to `last_stream` finish, which h2's own does not."""
    return GoAwayFrame(0, last_stream_id=last_stream).serialize()


def _settings(client_side: bool, streams: int) -> Settings:
    settings = {
        SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
        SettingCodes.MAX_HEADER_LIST_SIZE: MAX_LIST,
        SettingCodes.ENABLE_PUSH: 0,
    }
    if not client_side:
        settings |= {SettingCodes.MAX_CONCURRENT_STREAMS: streams, SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}
    return Settings(client=client_side, initial_values=settings)


class Outflow:
    """What one stream has to send: pieces of a body, each with the credit that its sender gets back for it.

    Sends as much as the peer's windows take. `id`: the stream's, 0 until it is begun. `done`: all is sent, the end
    of the stream too.
    """

    __slots__ = ("_frames", "_machine", "_queue", "done", "id", "last", "size", "trailers")

    def __init__(self, machine: H2Connection, frames: Frames, identifier: int = 0) -> None:
        self._machine, self._frames, self.id = machine, frames, identifier
        self._queue: deque[tuple[bytes | memoryview, int]] = deque()
        self.size = 0  # bytes that wait
        self.last = False  # nothing more comes
        self.trailers: list[Header] = []
        self.done = False

    def push(self, data: bytes, credit: int, last: bool) -> None:
        """Take a piece. A large one is cut up without being copied for each cut."""
        if data or credit:
            self._queue.append((data if len(data) <= _LARGEST else memoryview(data), credit))
            self.size += len(data)
        self.last = self.last or last

    def pump(self) -> int:
        """Send what can be sent; return the credit of the pieces that went."""
        machine, queue, credit = self._machine, self._queue, 0
        if not self.id:
            return 0
        stream = machine.streams.get(self.id)
        if self.done or stream is None or stream.closed:
            return self.drop()
        while queue:
            data, worth = queue[0]
            size = len(data)
            if size:
                windows = machine.outbound_flow_control_window, stream.outbound_flow_control_window
                room = min(*windows, machine.max_outbound_frame_size, _LARGEST)
                if room <= 0:
                    return credit
                self._frames.earn()
                if size > room:
                    machine.send_data(self.id, data[:room])
                    queue[0] = data[room:], worth
                    self.size -= room
                    continue
            queue.popleft()
            self.size -= size
            credit += worth
            self.done = self.last and not queue and not self.trailers
            if size or self.done:
                machine.send_data(self.id, data, end_stream=self.done)
        if self.last and not self.done:
            self.done = True
            if self.trailers:
                machine.send_headers(self.id, self.trailers, end_stream=True)
            else:
                machine.end_stream(self.id)
        return credit

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send but the end."""
        return not self._queue and not self.trailers

    def drop(self) -> int:
        """Forget what waits; return its credit."""
        credit = sum(worth for _, worth in self._queue)
        self._queue.clear()
        self.size = 0
        return credit
