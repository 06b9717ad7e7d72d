"""HTTP/2 requests for attacks: whatever is asked is sent, sound or not. The answers come as HTTP/1.1 text would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import H2Error

from handfast.audit.oracle import End, Reply
from handfast.audit.wires import MAX_REPLY, Silence, Wire, shake_hands
from handfast.tls.probe import Offer, Probe, ProbeRefused

Headers = Sequence[tuple[bytes, bytes]]
_WHATEVER = H2Configuration(
    client_side=True,
    header_encoding=None,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
    validate_inbound_headers=False,
    split_outbound_cookies=False,
)


@dataclass(slots=True)
class _Stream:
    head: bytes = b""
    body: bytes = b""
    end: End | None = None
    detail: str = ""

    def reply(self) -> Reply:
        return Reply(True, self.head + self.body, self.end or (End.OPEN if self.head else End.SILENT), "", self.detail)


@dataclass(slots=True)
class _Session:
    wire: Wire
    probe: Probe
    engine: H2Connection
    streams: dict[int, _Stream] = field(default_factory=dict)

    def flush(self) -> None:
        self.probe.write(self.engine.data_to_send())
        self.wire.send(self.probe.take())

    def take(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            for each in self.streams.values():
                each.end = each.end or End.CLOSED
            return
        stream = self.streams.get(getattr(event, "stream_id", 0) or 0)
        if stream is None:
            return
        match event:
            case ResponseReceived(headers=headers):
                stream.head = _as_text(headers or ())
            case DataReceived(data=data):
                stream.body = (stream.body + (data or b""))[:MAX_REPLY]
                self.engine.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            case StreamEnded():
                stream.end = stream.end or End.OPEN
            case StreamReset(error_code=code):
                stream.end, stream.detail = End.RESET, f"the stream was reset ({code})"
            case _:
                pass


def ask(wire: Wire, offer: Offer, requests: Sequence[tuple[Headers, bytes]]) -> list[Reply] | None:
    """Ask all of it over one connection, each request with its body; None where the server does not speak HTTP/2.

    `offer.alpn` must name h2. Raises ProbeRefused, Silence, OSError where there is no connection at all.
    """
    probe = Probe(offer)
    shake_hands(wire, probe)
    if probe.alpn != "h2":
        return None
    session = _Session(wire, probe, H2Connection(_WHATEVER))
    session.engine.initiate_connection()
    for headers, body in requests:
        number = session.engine.get_next_available_stream_id()
        session.streams[number] = _Stream()
        session.engine.send_headers(number, headers, end_stream=not body)
        if body:
            session.engine.send_data(number, body, end_stream=True)
    try:
        session.flush()
        _listen(session)
    except (ProbeRefused, OSError, H2Error):
        _all_end(session, End.CLOSED)
    except Silence:
        _all_end(session, None)
    return [stream.reply() for stream in session.streams.values()]


def _listen(session: _Session) -> None:
    while any(stream.end is None for stream in session.streams.values()):
        plain = session.probe.read()
        if plain is None:
            _all_end(session, End.CLOSED)
            return
        if plain:
            for event in session.engine.receive_data(plain):
                session.take(event)
            session.flush()
            continue
        records = session.wire.receive()
        if not records:
            _all_end(session, End.CLOSED)
            return
        session.probe.feed(records)


def _all_end(session: _Session, end: End | None) -> None:
    for stream in session.streams.values():
        stream.end = stream.end or end


def _as_text(headers: Headers) -> bytes:
    """A head as HTTP/1.1 would have it, so that there is one reader of answers."""
    fields = dict(headers)
    lines = [b"HTTP/2 " + fields.get(b":status", b"000")]
    lines += [name + b": " + value for name, value in headers if not name.startswith(b":")]
    return b"\r\n".join(lines) + b"\r\n\r\n"
