"""The HTTP/2 machine (`h2`), made to fit between strangers: what it takes is bounded, what repeats costs little.

Owns what stands around the library's parts: frames are counted before they are acted on, header blocks are bounded
before they are unpacked, and GOAWAY ends no stream that is under way (RFC 9113 6.8). It knows no requests.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from time import monotonic

from h2.config import H2Configuration
from h2.exceptions import DenialOfServiceError, FrameTooLargeError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame

from handfast.guard.http2_usual import Machine
from handfast.wire.http1 import Header
from handfast.wire.http2 import MAX_LIST
from handfast.wire.packing import Packer, Unpacker

MAX_STREAMS = 100  # requests at a time (RFC 9113 6.5.2 names no less)
MOST_STREAMS = 2**31 - 1  # there are, on one connection (RFC 9113 5.1.1)
STREAM_WINDOW = 1 << 16  # bytes of a body that wait for the other side, of each stream: all streams may have so many
CONNECTION_WINDOW = 1 << 23  # and of all streams together
_LARGEST = 1 << 16  # bytes of a DATA frame of ours, where the peer takes so many: others want their turn
_HEADER = 9  # bytes of a frame's head, RFC 9113 4.1

# How many, and how many more a second. The tables of others for the same: nghttp2 takes 1,000 resets and 33 a second;
# Envoy takes 10 WINDOW_UPDATE for each DATA that it sent.
_RESETS = (400, 100)
_BRIEF = 0.05  # seconds; Envoy counts streams of less than one second, when they are more than half of all
_LATE_RESETS = (2000, 500)  # those of streams that lived longer: deadlines. The app may work on for each of them
_QUIET = (1000, 200)
_EARNED = 10  # quiet frames that each DATA of ours gives a right to
_EARNED_BY_THEIRS = 2  # and each of the peer's own

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
        if self._left < self._burst:
            self._left = min(self._left + count, self._burst)


class Frames:
    """Where `h2` takes its frames from: its own reader, and every frame looked at before it is acted on.

    A GOAWAY is kept here and not handed on, since `h2` would let nothing through after it.
    """

    def __init__(self, reader: FrameBuffer, *, count_resets: bool) -> None:
        self.reader = reader
        self._count_resets = count_resets  # those of an app are its answers: a gRPC server may end each call with one
        self._resets = _Budget("resets", *_RESETS)
        self._late_resets = _Budget("resets", *_LATE_RESETS)
        self._quiet = _Budget("frames that ask for nothing", *_QUIET)
        self.count = 0
        self.goaway: GoAwayFrame | None = None

    @property
    def max_frame_size(self) -> int:
        """Bytes of a frame at most; `h2` sets it."""
        return self.reader.max_frame_size

    @max_frame_size.setter
    def max_frame_size(self, size: int) -> None:
        self.reader.max_frame_size = size

    def add_data(self, data: bytes) -> None:
        """Take what the network brought. Raises ProtocolError for what does not begin as HTTP/2."""
        self.reader.add_data(data)

    def earn(self) -> None:
        """A DATA frame was sent: the peer may answer it with window updates and pings."""
        self._quiet.earn(_EARNED)

    def spend_reset(self, lived: float = 0.0) -> None:
        """Count a stream that was begun for nothing: it ended after so many seconds. All resets are counted as late."""
        if lived < _BRIEF:
            self._resets.spend()

    def saw_data(self, size: int, ended: bool) -> None:
        """Count a DATA frame. These raise Flood."""
        self.count += 1
        if size:
            self._quiet.earn(_EARNED_BY_THEIRS)
        elif not ended:
            self._quiet.spend()

    def saw_block(self, block: bytes) -> None:
        """Count a whole block of headers, and look at it before it is unpacked."""
        self.count += 1
        if len(block) > MAX_LIST or _SIZES.match(block):
            raise Flood("bytes of headers")

    def saw_quiet(self) -> None:
        """Count a frame that asks for nothing."""
        self.count += 1
        self._quiet.spend()

    def __iter__(self) -> Frames:
        return self

    def __next__(self) -> Frame:
        frame = next(self.reader, None)
        while isinstance(frame, GoAwayFrame):
            self.saw_quiet()
            self.goaway = frame
            frame = next(self.reader, None)
        if frame is None:
            # The library looks at a frame's length when all of it has come: up to 16 MiB that it would keep.
            begun = self.reader._data
            if len(begun) >= _HEADER and int.from_bytes(begun[:3], "big") > self.reader.max_frame_size:
                raise FrameTooLargeError("a frame larger than agreed")
            raise StopIteration
        if isinstance(frame, DataFrame):
            self.saw_data(len(frame.data), "END_STREAM" in frame.flags)
        elif isinstance(frame, HeadersFrame):
            self.saw_block(frame.data)
        elif isinstance(frame, RstStreamFrame):
            self.count += 1
            if self._count_resets:
                self._late_resets.spend()
        else:
            self.saw_quiet()
        return frame


def machine(*, client_side: bool) -> tuple[Machine, Frames]:
    """Return the machine of one connection, its first words waiting to be sent, and its frames.

    It checks no header lists: `wire.http2` does, for one stream at a time. All else that RFC 9113 asks of framing,
    states and windows it holds the peer to, and raises h2's ProtocolError.
    """
    made = Machine(
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
    made.take_parts(frames, Packer(), Unpacker())
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

    def __init__(self, machine: Machine, frames: Frames, identifier: int = 0) -> None:
        self._machine, self._frames, self.id = machine, frames, identifier
        self._queue: deque[tuple[bytes | memoryview, int]] | None = None  # until something has to wait
        self.size = 0  # bytes that wait
        self.last = False  # nothing more comes
        self.trailers: Sequence[Header] = ()
        self.done = False

    def push(self, data: bytes, credit: int, last: bool) -> None:
        """Take a piece. A large one is cut up without being copied for each cut."""
        if data or credit:
            if self._queue is None:
                self._queue = deque()
            self._queue.append((data if len(data) <= _LARGEST else memoryview(data), credit))
            self.size += len(data)
        self.last = self.last or last

    def send(self, data: bytes, credit: int, last: bool) -> int:
        """Take a piece and send what can be sent, as `push` and `pump` do: at once, where nothing waits before it."""
        if data and self.id and not self._queue and not self.done and not self.trailers and len(data) <= _LARGEST:
            stream = self._machine.streams.get(self.id)
            if stream is not None and self._machine.put_data(stream, data, last):
                self._frames.earn()
                self.last = self.done = last
                return credit
        self.push(data, credit, last)
        return self.pump()

    def pump(self) -> int:
        """Send what can be sent; return the credit of the pieces that went."""
        machine, queue, credit = self._machine, self._queue, 0
        if not self.id:
            return 0
        stream = machine.live(self.id)
        if self.done or stream is None:
            return self.drop()
        while queue:
            data, worth = queue[0]
            size, done = len(data), self.last and len(queue) == 1 and not self.trailers
            if size:
                if size > _LARGEST or not machine.put_data(stream, data, done):
                    if not (room := machine.room(stream)):
                        return credit
                    room = min(room, _LARGEST)
                    if size > room:
                        self._frames.earn()
                        machine.send_data(self.id, data[:room])
                        queue[0] = data[room:], worth
                        self.size -= room
                        continue
                    machine.send_data(self.id, data, done)
                self._frames.earn()
            elif done:
                machine.send_data(self.id, data, done)
            queue.popleft()
            self.size -= size
            credit += worth
            self.done = done
        if self.last and not self.done:
            self.done = True
            if self.trailers:
                machine.put_headers(self.id, self.trailers, True)
            else:
                machine.end_stream(self.id)
        return credit

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send but the end."""
        return not self._queue and not self.trailers

    def drop(self) -> int:
        """Forget what waits; return its credit."""
        if not self._queue:
            return 0
        credit = sum(worth for _, worth in self._queue)
        self._queue.clear()
        self.size = 0
        return credit
