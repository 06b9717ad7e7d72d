"""Clients and apps that speak HTTP/2 frame by frame, so that tests can say what no good library would."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import ProtocolError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame, GoAwayFrame

from tests.support.apps import accepted, stop_accepting
from tests.support.waiting import PATIENCE, until

Fields = Iterable[tuple[str, str]]


def connection(*, client: bool, **initial: int) -> H2Connection:
    """A machine that checks nothing of what it sends; `initial` are settings by their names."""
    made = H2Connection(
        H2Configuration(
            client_side=client,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
    )
    values = {SettingCodes[name.upper()]: value for name, value in initial.items()}
    made.local_settings = Settings(client=client, initial_values=values)
    return made


@dataclass
class Answer:
    """What came on one stream so far."""

    headers: dict[str, str] = field(default_factory=dict)
    informational: list[dict[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    trailers: dict[str, str] | None = None
    ended: bool = False
    reset: int | None = None  # its code

    @property
    def status(self) -> int:
        return int(self.headers.get(":status", 0))

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


class Client:
    """An HTTP/2 client over TLS. It gives windows back as it reads, unless `greedy` is off."""

    def __init__(self, address: str, context: ssl.SSLContext, *, greedy: bool = True, **initial: int) -> None:
        host, _, port = address.rpartition(":")
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection((host, int(port)), timeout=PATIENCE)
        self.tls = context.wrap_socket(plain, server_hostname="localhost")
        assert self.tls.selected_alpn_protocol() == "h2"
        self.authority = f"localhost:{port}"
        self.greedy = greedy
        self.answers: dict[int, Answer] = defaultdict(Answer)
        self.goaway: tuple[int, int] | None = None  # its code and last stream
        self.pongs = 0
        self.closed = False
        self._deaf = False  # the far side takes no more
        self.h2 = connection(client=True, **initial)
        self.h2.incoming_buffer = _Reader(self, self.h2.incoming_buffer)  # type: ignore[assignment]  # as much as is used
        self.h2.initiate_connection()
        self.flush()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.tls.close()

    def flush(self) -> None:
        self.raw(self.h2.data_to_send())

    def raw(self, data: bytes) -> None:
        """Send bytes as they are. Where the far side is gone already, what it said before is read to the end."""
        if self._deaf:
            return
        try:
            self.tls.sendall(data)
        except (ConnectionError, ssl.SSLError):
            self._deaf = True
            while not self.closed:
                self.read()

    def head(self, path: str = "/", *headers: tuple[str, str], method: str = "GET") -> list[tuple[str, str]]:
        """A usual header list."""
        pseudo = [(":method", method), (":scheme", "https"), (":authority", self.authority), (":path", path)]
        return [*pseudo, *headers]

    def send(self, fields: Fields, body: bytes | None = b"") -> int:
        """Begin a stream: with this body and its end, or (None) left open."""
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, list(fields), end_stream=body == b"")
        self.flush()
        if body:
            self.body(stream, body, last=True)
        return stream

    def body(self, stream: int, data: bytes, *, last: bool = False) -> None:
        """Send a body as the windows allow."""
        left = memoryview(data)
        while left:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room:
                self.h2.send_data(stream, left[:room], end_stream=last and len(left) <= room)
                left = left[room:]
                self.flush()
            else:
                self.read()
                if self.closed or self.answers[stream].over:
                    return

    def get(self, path: str = "/", *headers: tuple[str, str], method: str = "GET", body: bytes = b"") -> Answer:
        """Ask, and wait for the whole answer."""
        return self.wait(self.send(self.head(path, *headers, method=method), body))

    def wait(self, stream: int, until: Callable[[Answer], bool] = lambda answer: answer.over) -> Answer:
        """Wait for what a stream brings; or for the end of the connection."""
        self.until(lambda: until(self.answers[stream]))
        return self.answers[stream]

    def until(self, true: Callable[[], bool], timeout: float = 2 * PATIENCE) -> None:
        """Read until something is true, or the connection is closed."""
        deadline = time.monotonic() + timeout
        while not true() and not self.closed:
            assert time.monotonic() < deadline, "it did not come in time"
            self.read()

    def read(self) -> None:
        """Take in what comes next."""
        try:
            data = self.tls.recv(1 << 16)
        except TimeoutError:
            raise AssertionError("nothing came") from None
        except (ConnectionError, ssl.SSLError):
            data = b""
        if not data:
            self.closed = True
            return
        for event in self.h2.receive_data(data):
            self._on(event)
        if not self.closed:
            with suppress(ProtocolError):
                self.flush()

    def _on(self, event: events.Event) -> None:
        match event:
            case events.ResponseReceived():
                self.answers[event.stream_id].headers = _dict(event.headers)
            case events.InformationalResponseReceived():
                self.answers[event.stream_id].informational.append(_dict(event.headers))
            case events.DataReceived():
                self.answers[event.stream_id].body += event.data
                if self.greedy and event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case events.TrailersReceived():
                self.answers[event.stream_id].trailers = _dict(event.headers)
            case events.StreamEnded():
                self.answers[event.stream_id].ended = True
            case events.StreamReset():
                self.answers[event.stream_id].reset = int(event.error_code or 0)
            case events.PingAckReceived():
                self.pongs += 1
            case _:
                pass


class _Reader:
    """Frames on their way to the machine, without GOAWAY: it would let nothing through after that."""

    def __init__(self, client: Client, frames: FrameBuffer) -> None:
        self._client, self._frames = client, frames
        self.add_data = frames.add_data

    def __setattr__(self, name: str, value: object) -> None:
        if name == "max_frame_size":
            self._frames.max_frame_size = value  # type: ignore[assignment]  # it is an int
        else:
            object.__setattr__(self, name, value)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Frame:
        frame = next(self._frames)
        if isinstance(frame, GoAwayFrame):
            self._client.goaway = frame.error_code, frame.last_stream_id
            return next(self)
        return frame


def _dict(headers: Iterable[tuple[object, object]]) -> dict[str, str]:
    return {str(name): str(value) for name, value in headers}


On = Callable[[H2Connection, events.Event], None]


class Http2App:
    """An app that speaks HTTP/2 in the clear; `on` is called with each event, and answers on the machine."""

    def __init__(self, on: On, **initial: int) -> None:
        self._on, self._initial = on, initial
        self.connections = 0
        self.seen: list[events.Event] = []

    def __enter__(self) -> Http2App:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        stop_accepting(self._listener, self._acceptor)

    @property
    def address(self) -> str:
        return f"h2c://127.0.0.1:{self._listener.getsockname()[1]}"

    def headers(self) -> list[dict[str, str]]:
        """The header lists of all requests."""
        return [_dict(event.headers) for event in self.seen if isinstance(event, events.RequestReceived)]

    def until(self, kind: type[events.Event], count: int = 1) -> None:
        """Wait until it has seen so many of a kind."""
        until(lambda: sum(isinstance(event, kind) for event in self.seen) >= count, f"{count} {kind.__name__}")

    def _accept(self) -> None:
        while (plain := accepted(self._listener)) is not None:
            self.connections += 1
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        made = connection(client=False, **self._initial)
        made.initiate_connection()
        with plain, suppress(OSError, ProtocolError):
            plain.sendall(made.data_to_send())
            while data := plain.recv(1 << 16):
                for event in made.receive_data(data):
                    self._on(made, event)
                    self.seen.append(event)
                plain.sendall(made.data_to_send())
