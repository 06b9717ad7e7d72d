"""As `entry.Refusing`, for a client that speaks HTTP/2: what it asks at first is answered with why it is refused.

Nothing in here can reach an app.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from h2.errors import ErrorCodes
from h2.events import RequestReceived
from h2.exceptions import ProtocolError

from handfast.errors import Reason
from handfast.guard.events import refusal_body
from handfast.guard.http2_frames import machine
from handfast.tls.channel import Channel
from handfast.wire.http1 import MAX_HEAD

if TYPE_CHECKING:
    from handfast.guard.connection import Connection


class Http2Refusing:
    """See the module's docstring."""

    __slots__ = ("_channel", "_connection", "_left", "_machine", "_reason")

    def __init__(self, connection: Connection, channel: Channel, reason: Reason) -> None:
        self._connection = connection
        self._channel = channel
        self._reason = reason
        self._machine, _ = machine(client_side=False)
        self._left = 2 * MAX_HEAD  # bytes that it may send until the head of its request is there

    def received(self, data: bytes) -> None:
        """Read until the head of the request is there; then answer. No byte of it goes anywhere."""
        self._channel.feed(data)
        self.read()

    def read(self) -> None:
        """See `received`."""
        while plain := self._channel.read():
            self._left -= len(plain)
            try:
                events = self._machine.receive_data(plain)
            except ProtocolError:
                self._close()
                return
            requests = [event for event in events if isinstance(event, RequestReceived)]
            for request in requests:
                self._answer(request)
            if requests:  # GOAWAY names the last of them: what comes after may be asked elsewhere (RFC 9113 6.8)
                self._close()
                return
        if self._channel.at_eof or self._left < 0:
            self._close()
            return
        self._send()

    def ended(self) -> None:
        """It did not ask anything."""
        self._connection.linger()

    def writable(self, yes: bool) -> None:
        """The answers always fit: the client may send but little."""

    def lost(self) -> None:
        """Nothing to tidy."""

    def expired(self) -> None:
        """It asked nothing in time."""
        self._close()

    def _answer(self, event: RequestReceived) -> None:
        body, made, identifier = refusal_body(self._reason, self._connection.id), self._machine, event.stream_id
        if made.live(identifier) is not None:  # else it was reset in the same breath
            bodiless = (b":method", b"HEAD") in event.headers or made.local_flow_control_window(identifier) < len(body)
            fields = [(b":status", b"%d" % (self._reason.http or 403)), (b"content-type", b"application/json")]
            made.send_headers(identifier, fields, end_stream=bodiless)
            if not bodiless:
                made.send_data(identifier, body, end_stream=True)

    def _close(self) -> None:
        self._machine.close_connection(ErrorCodes.NO_ERROR)
        self._send()
        self._connection.linger(self._channel)

    def _send(self) -> None:
        if data := self._machine.data_to_send():
            self._channel.write(data)
        if records := self._channel.take():
            self._connection.transport.write(records)
