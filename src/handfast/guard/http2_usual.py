"""The usual frames of HTTP/2, by a short way through the library (`h2`): it spends most of its time around them.

Owns no state: what it reads and changes is the library's own, so the two ways cannot differ in what they know. It
must not act on a frame that is not plainly usual, nor change anything before it is sure of that.

Theory of operation. A whole frame without padding or priority, of a stream in a state where it is expected, within
windows and sizes, is acted on here. Each method first asks all that the library would, and gives up without a trace
where the answer is not the usual one; then the frame goes the library's way, which judges it and raises what there is
to raise. Streams that end here leave at once for the library's list of closed ones, to which it would move them when
the next one opens. With a release of the library that this was not tested with, every frame goes its way.
"""

from __future__ import annotations

from collections import OrderedDict
from struct import Struct
from typing import TYPE_CHECKING, Any

import h2
from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection, _decode_headers
from h2.events import (
    DataReceived,
    Event,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.stream import H2Stream, StreamClosedBy, StreamState
from h2.utilities import authority_from_headers

from handfast.wire.packing import Packer, Unpacker, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hpack.struct import Header, HeaderWeaklyTyped

    from handfast.guard.http2_frames import Frames

TESTED = frozenset({"4.4.1"})  # releases of h2 whose state this knows

_CLOSED = 512  # streams that are remembered when they are over
_MANY = 128  # streams, the ended ones among them; beyond it the library clears up as the next one opens
_WIDE = 1 << 18  # bytes of a stream's window once as many have come: those that are soon left to wait hold less
_LARGEST_ID = _LARGEST_WINDOW = 2**31 - 1  # RFC 9113 5.1.1, 6.9.1

_HEAD = Struct(">HBBBL")  # RFC 9113 4.1: length (in two parts), type, flags, stream
_SIZE, _pack_head, _unpack_head = _HEAD.size, _HEAD.pack, _HEAD.unpack_from
_DATA, _HEADERS, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 8, 9
_END_STREAM, _END_HEADERS = 1, 4

_OPEN, _CLOSED_BY_US, _CLOSED_BY_THEM, _OVER = (
    *(StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL),
    *(StreamState.HALF_CLOSED_REMOTE, StreamState.CLOSED),
)

_set_item = OrderedDict.__setitem__  # the bound is kept here
_new = object.__new__  # of an event: its __init__ costs more than the rest, and its defaults stand in its class
_ENDED = StreamEnded(stream_id=0)  # that it ended, whichever it was


class Machine(H2Connection):
    """See the module's docstring. What it is asked, it answers as the library's own."""

    MAX_CLOSED_STREAMS = _CLOSED  # the one way to set it; else each connection may remember 65,536

    def __init__(self, config: H2Configuration) -> None:
        super().__init__(config)
        self._client = bool(config.client_side)
        self._going = ConnectionState.CLIENT_OPEN if self._client else ConnectionState.SERVER_OPEN
        self._known_settings: tuple[int, int, int, int] | None = None
        self._short = h2.__version__ in TESTED

    def take_parts(self, frames: Frames, packer: Packer, unpacker: Unpacker) -> None:
        """Use these in place of the library's own: they have as much of them as it uses."""
        self._frames = frames
        self._packer, self._unpacker = packer, unpacker
        self._same_lists = packer.same
        # The library's types have lists of headers. These are tuples, which nobody changes.
        self._known_blocks: dict[bytes, tuple[Any, bool]] = unpacker.known
        self.incoming_buffer = frames  # type: ignore[assignment]
        self.encoder = packer  # type: ignore[assignment]
        self.decoder = unpacker  # type: ignore[assignment]

    # What came.

    def receive_data(self, data: bytes) -> list[Event]:  # type: ignore[override]  # of all buffers these are ours
        """As the library's, but for StreamEnded, which comes only as a part of other events."""
        reader = self._frames.reader
        if not self._short or reader._preamble_len or reader._headers_buffer:
            return self._long_way(data)
        if begun := reader._data:
            head = bytes(begun[:_SIZE])
            head += data[: _SIZE - len(head)]
            if len(begun) + len(data) < _SIZE + int.from_bytes(head[:3], "big") or len(head) < _SIZE:
                return self._long_way(data)
            data = bytes(begun) + data
            begun.clear()
        events: list[Event] = []
        at, size, streams, largest = 0, len(data), self.streams, self._largest()
        while size - at >= _SIZE:
            high, low, kind, flags, identifier = _unpack_head(data, at)
            body = at + _SIZE
            end = body + (high << 8 | low)
            if end > size:
                break
            event: Event | None = None
            if end - body <= largest:
                try:
                    if kind == _HEADERS:
                        event = self._take_headers(flags, identifier, data[body:end])
                    elif kind == _DATA and flags <= _END_STREAM and (stream := streams.get(identifier)) is not None:
                        event = self._take_data(flags, stream, data[body:end])
                    elif kind == _WINDOW_UPDATE:
                        event = self._take_window(identifier, data[body:end])
                except ProtocolError as error:  # as the library does: GOAWAY, and up with it
                    self.close_connection(error.error_code)
                    raise
            if event is not None:
                events.append(event)
                at = end
                continue
            events += self._long_way(data[at:end])
            at, largest = end, self._largest()
            if reader._headers_buffer:  # what comes next belongs to it
                break
        if at < size:
            events += self._long_way(data[at:])
        return events

    def _largest(self) -> int:
        """Bytes of a frame that may go the short way; -1 while the connection is not in its usual state."""
        return self.max_inbound_frame_size if self.state_machine.state is self._going else -1

    def _long_way(self, data: bytes) -> list[Event]:
        self._known_settings = None
        return super().receive_data(data)

    def _take_data(self, flags: int, stream: H2Stream, body: bytes) -> DataReceived | None:
        states, size = stream.state_machine, len(body)
        whole, own = self._inbound_flow_control_window_manager, stream._inbound_window_manager
        state, expected = states.state, stream._expected_content_length
        if (
            (state is not _OPEN and state is not _CLOSED_BY_US)
            or not states.headers_received
            or size > whole.current_window_size
            or size > own.current_window_size
            or (expected is not None and not _fits(stream, size, flags))
        ):
            return None
        self._frames.saw_data(size, flags == _END_STREAM)
        whole.current_window_size -= size
        own.current_window_size -= size
        stream._actual_content_length += size
        event = _new(DataReceived)
        event.stream_id, event.data, event.flow_controlled_length = stream.stream_id, body, size
        if flags:
            event.stream_ended = self._they_ended(stream)
        return event

    def _take_headers(self, flags: int, identifier: int, block: bytes) -> Event | None:
        stream, ended = self.streams.get(identifier), flags & _END_STREAM
        if flags - ended != _END_HEADERS or not block:
            return None
        if self._client:
            if stream is None:
                return None
            states = stream.state_machine
            if states.state is not _OPEN and states.state is not _CLOSED_BY_US:
                return None
            if states.headers_received and (states.trailers_received or not ended):
                return None
        elif (
            stream is not None
            or not self.highest_inbound_stream_id < identifier <= _LARGEST_ID
            or not identifier & 1
            or len(self.streams) >= (self._known_settings or self._settings())[3]
        ):
            return None
        known = self._known_blocks.get(block)
        if known is not None:
            self._frames.count += 1
            headers, usual = known
        else:
            self._frames.saw_block(block)
            unpacked: Any = _decode_headers(self._unpacker, block)  # type: ignore[arg-type]  # as much of a Decoder as it uses
            headers, usual = unpacked, plain(unpacked)
        stream = stream or self._begin(identifier)
        if not usual or stream.request_method == b"HEAD":  # the library's way, from where it has unpacked
            return stream.receive_headers(headers, ended != 0, None)[1][0]
        states, stream._expected_content_length = stream.state_machine, None
        event: RequestReceived | ResponseReceived | TrailersReceived
        if not self._client:
            states.client, states.state = False, _OPEN
            event = _new(RequestReceived)
        elif states.headers_received:
            states.trailers_received = True
            event = _new(TrailersReceived)
        else:
            event = _new(ResponseReceived)
        event.stream_id, event.headers = identifier, headers
        states.headers_received = True
        if ended:
            event.stream_ended = self._they_ended(stream)
        return event

    def _take_window(self, identifier: int, body: bytes) -> WindowUpdated | None:
        step = int.from_bytes(body, "big")
        if len(body) != 4 or not 1 <= step <= _LARGEST_WINDOW:
            return None
        if identifier == 0:
            if self.outbound_flow_control_window + step > _LARGEST_WINDOW:
                return None
            self._frames.saw_quiet()
            self.outbound_flow_control_window += step
        else:
            stream = self.streams.get(identifier)
            if stream is None or not stream.open or stream.outbound_flow_control_window + step > _LARGEST_WINDOW:
                return None
            self._frames.saw_quiet()
            stream.outbound_flow_control_window += step
        return WindowUpdated(stream_id=identifier, delta=step)

    # What goes.

    def send_headers(
        self, stream_id: int, headers: Iterable[HeaderWeaklyTyped], end_stream: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        """As the library's. A tuple that comes again costs least."""
        if args or kwargs or not isinstance(headers, (tuple, list)):
            super().send_headers(stream_id, headers, end_stream, *args, **kwargs)
        else:
            self.put_headers(stream_id, headers, end_stream)

    def put_headers(self, identifier: int, headers: Sequence[Header], ended: bool) -> None:
        """As `send_headers`. A tuple that comes again costs least."""
        stream = self._ready(identifier, headers, ended)
        if stream is None:
            super().send_headers(identifier, headers, ended)
            return
        same = self._same_lists.get(id(headers))
        block = same[1] if same is not None and same[0] is headers else self._packer.encode(headers)
        size, out, flags = len(block), self._data_to_send, _END_STREAM if ended else 0
        if size <= self.max_outbound_frame_size:
            out += _pack_head(size >> 8, size & 0xFF, _HEADERS, flags | _END_HEADERS, identifier)
            out += block
        else:
            self._put_pieces(identifier, block, flags)
        if ended:
            self._we_ended(stream)

    def _ready(self, identifier: int, headers: Sequence[Header], ended: bool) -> H2Stream | None:
        """The stream, begun or new, once it may have these headers and counts as having them; else None."""
        if not self._short or not headers or self.state_machine.state is not self._going:
            return None
        stream, (name, value) = self.streams.get(identifier), headers[0]
        if stream is None:
            if (
                not self._client
                or name != b":method"
                or identifier != self.highest_outbound_stream_id + 2
                or len(self.streams) >= (self._known_settings or self._settings())[3]
            ):
                return None
            stream = self._begin(identifier)
            stream._authority = authority_from_headers(headers)
            stream.request_method = value
            states = stream.state_machine
            states.client, states.state = True, _OPEN
        else:
            states = stream.state_machine
            if states.client is not False or (states.state is not _OPEN and states.state is not _CLOSED_BY_THEM):
                return None
            if states.headers_sent:
                if states.trailers_sent or not ended or name[:1] == b":":
                    return None
                states.trailers_sent = True
            elif name != b":status" or value[:1] == b"1":
                return None
            stream.request_method = None  # as the library has it of a server's streams
        states.headers_sent = True
        return stream

    def _put_pieces(self, identifier: int, block: bytes, flags: int) -> None:
        """Cut a block into frames that the peer takes."""
        most, out, kind = self.max_outbound_frame_size, self._data_to_send, _HEADERS
        for at in range(0, len(block), most):
            piece = block[at : at + most]
            last = _END_HEADERS if at + most >= len(block) else 0
            out += _pack_head(len(piece) >> 8, len(piece) & 0xFF, kind, flags | last, identifier)
            out += piece
            kind, flags = _CONTINUATION, 0

    def send_data(
        self, stream_id: int, data: bytes | memoryview, end_stream: bool = False, pad_length: int | None = None
    ) -> None:
        """As the library's."""
        stream = self.streams.get(stream_id)
        if stream is None or pad_length is not None or not self.put_data(stream, data, end_stream):
            super().send_data(stream_id, data, end_stream, pad_length)

    def put_data(self, stream: H2Stream, data: bytes | memoryview, ended: bool) -> bool:
        """Send data in one frame, or none of it: False where that is not plainly allowed."""
        states, size = stream.state_machine, len(data)
        state, left = states.state, stream.outbound_flow_control_window - size
        if (
            (state is not _OPEN and state is not _CLOSED_BY_THEM)
            or size > self.max_outbound_frame_size
            or (size and (left < 0 or size > self.outbound_flow_control_window))
            or self.state_machine.state is not self._going
            or not self._short
        ):
            return False
        out = self._data_to_send
        out += _pack_head(size >> 8, size & 0xFF, _DATA, _END_STREAM if ended else 0, stream.stream_id)
        out += data
        self.outbound_flow_control_window -= size
        stream.outbound_flow_control_window = left
        if ended:
            self._we_ended(stream)
        return True

    def room(self, stream: H2Stream) -> int:
        """Bytes that may go in the next frame of a stream."""
        windows = self.outbound_flow_control_window, stream.outbound_flow_control_window
        return max(0, min(*windows, self.max_outbound_frame_size))

    def live(self, identifier: int) -> H2Stream | None:
        """A stream on which the peer still hears us."""
        stream = self.streams.get(identifier)
        return None if stream is None or stream.state_machine.state is _OVER else stream

    @property
    def unsent(self) -> int:
        """Bytes that `data_to_send` has."""
        return len(self._data_to_send)

    @property
    def places(self) -> int:
        """How many streams the peer takes at a time."""
        return (self._known_settings or self._settings())[2]

    @property
    def next_stream(self) -> int:
        """The id of a client's next stream. Raises NoAvailableStreamIDError where there is none."""
        identifier = self.highest_outbound_stream_id + 2
        return identifier if 2 < identifier <= _LARGEST_ID else self.get_next_available_stream_id()

    def acknowledge_received_data(self, acknowledged_size: int, stream_id: int) -> None:
        """As the library's: the peer is told once it may send half a window more. A long body's window is widened."""
        whole, stream = self._inbound_flow_control_window_manager, self.streams.get(stream_id)
        taken, size = whole._bytes_processed + acknowledged_size, acknowledged_size
        usual = self._short and size >= 0 and whole.current_window_size > 0 and taken < whole.max_window_size // 2
        if usual and stream is None:
            usual = stream_id & 1 == 1 and 0 < stream_id <= self._highest
        elif usual and stream is not None and stream.state_machine.state is not _OVER:
            own = stream._inbound_window_manager
            taken_own = own._bytes_processed + size
            usual = own.current_window_size > 0 and taken_own < own.max_window_size // 2
            if usual:
                own._bytes_processed = taken_own
        if usual:
            whole._bytes_processed = taken
            return
        super().acknowledge_received_data(acknowledged_size, stream_id)
        if stream is not None and stream._actual_content_length >= _WIDE and self.state_machine.state is self._going:
            own = stream._inbound_window_manager
            more = _WIDE - own.max_window_size
            if more > 0 and not own._bytes_processed and stream.state_machine.state in (_OPEN, _CLOSED_BY_US):
                self.increment_flow_control_window(more, stream_id)
                own.max_window_size = _WIDE

    # Streams.

    @property
    def _highest(self) -> int:
        return self.highest_outbound_stream_id if self._client else self.highest_inbound_stream_id

    def _begin(self, identifier: int) -> H2Stream:
        """Take up the client's next stream."""
        inbound, outbound, _, _ = self._known_settings or self._settings()
        stream = self.streams[identifier] = H2Stream(identifier, self.config, inbound, outbound)
        stream.max_outbound_frame_size = self.max_outbound_frame_size
        if self._client:
            self.highest_outbound_stream_id = identifier
        else:
            self.highest_inbound_stream_id = identifier
        return stream

    def _settings(self) -> tuple[int, int, int, int]:
        """The first windows of a stream, ours and theirs, and how many there may be: they change by long ways alone."""
        if self._known_settings is None:
            ours, theirs = self.local_settings, self.remote_settings
            most = (theirs if self._client else ours).max_concurrent_streams
            self._known_settings = ours.initial_window_size, theirs.initial_window_size, most, min(most, _MANY)
        return self._known_settings

    def _they_ended(self, stream: H2Stream) -> StreamEnded:
        states = stream.state_machine
        if states.state is _OPEN:
            states.state = _CLOSED_BY_THEM
        else:
            self._leave(stream, StreamClosedBy.RECV_END_STREAM)
        return _ENDED

    def _we_ended(self, stream: H2Stream) -> None:
        states = stream.state_machine
        if states.state is _OPEN:
            states.state = _CLOSED_BY_US
        else:
            self._leave(stream, StreamClosedBy.SEND_END_STREAM)

    def _leave(self, stream: H2Stream, by: StreamClosedBy) -> None:
        stream.state_machine.state, stream.state_machine.stream_closed_by = _OVER, by
        del self.streams[stream.stream_id]
        closed = self._closed_streams
        _set_item(closed, stream.stream_id, by)
        if len(closed) > _CLOSED:
            del closed[next(iter(closed))]


def _fits(stream: H2Stream, size: int, ended: int) -> bool:
    """Whether the body is not longer than its head said, and as long at its end."""
    expected, came = stream._expected_content_length, stream._actual_content_length + size
    return expected is None or came == expected or (came < expected and not ended)
