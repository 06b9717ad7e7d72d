"""What a verdict is found from: the messages of a recording by their kind, and the first words of each side."""

from __future__ import annotations

from dataclasses import dataclass

from handfast.explain.model import Known, Recording
from handfast.wire import messages as m
from handfast.wire.records import RecordReader, Side

# How protocols that are not TLS begin (their RFCs and manuals), and what to call them.
_GREETINGS = (
    (b"HTTP/", "plain HTTP"),
    (b"<!DOCTYPE", "plain HTTP"),
    (b"<html", "plain HTTP"),
    (b"SSH-", "SSH"),
    (b"220", "SMTP or FTP, which begin TLS later (STARTTLS)"),
    (b"+OK", "POP3, which begins TLS later (STLS)"),
    (b"* OK", "IMAP, which begins TLS later (STARTTLS)"),
    (b"-ERR", "Redis without TLS"),
    (b"AMQP", "AMQP without TLS"),
    (b"RFB ", "VNC"),
    (b"PROXY ", "a PROXY protocol header"),
    (b"\r\n\r\n\0\r\nQUIT\n", "a PROXY protocol header"),
    (b"\0\0\0\x08\x04\xd2\x16\x2f", "PostgreSQL's request for TLS (sslnegotiation=postgres); a guard wants direct"),
)
_METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"CONNECT ", b"PRI * ")


@dataclass(frozen=True, slots=True)
class Scene:
    """The parts of a handshake that verdicts look at; None or () where they did not come."""

    recording: Recording
    known: Known
    hello: m.ClientHello | None
    answer: m.ServerHello | None
    request: m.CertificateRequest | None
    shown: dict[Side, m.Certificate]
    proved: frozenset[Side]  # who sent CertificateVerify
    alerts: tuple[tuple[Side, m.AlertMessage], ...]  # the fatal ones, in their order
    finished: frozenset[Side]

    @property
    def new(self) -> bool:
        """Whether TLS 1.3 was settled."""
        return self.answer is not None and self.answer.version >= m.TLS_1_3

    @property
    def sealed(self) -> bool:
        """Whether it is a recording of TLS 1.3 whose encrypted part stayed closed."""
        return self.new and self.us is None and Side.SERVER not in self.finished

    @property
    def place(self) -> str:
        """The server's address."""
        return self.recording.place

    @property
    def us(self) -> Side | None:
        """Whose end was ours."""
        return self.recording.seen_from

    def ders(self, side: Side) -> list[bytes]:
        """The certificates that a side showed."""
        return [entry.der for entry in self.shown[side].entries] if side in self.shown else []

    def first_bytes(self, side: Side) -> bytes:
        """The first bytes that a side put on the network."""
        data = b""
        for chunk in self.recording.chunks:
            if chunk.sender is side and len(data) < 512:
                data += chunk.data[:512]
        return data[:512]

    def spoke_tls(self, side: Side) -> bool:
        """Whether a side's first bytes begin a TLS record; True where it said nothing."""
        data = self.first_bytes(side)
        reader = RecordReader()
        list(reader.feed(data))
        return not data or (not reader.broken and data[0] in (20, 21, 22, 23))


def scene_of(recording: Recording, known: Known) -> Scene:
    """Read a recording's messages into their places. Raises nothing."""
    hello: m.ClientHello | None = None
    answer: m.ServerHello | None = None
    request: m.CertificateRequest | None = None
    shown: dict[Side, m.Certificate] = {}
    proved, finished, alerts = set[Side](), set[Side](), list[tuple[Side, m.AlertMessage]]()
    for event, message in m.read_events(recording.events):
        match message:
            case m.ClientHello():
                hello = hello or message
            case m.ServerHello() if not message.retry:
                answer = message
            case m.CertificateRequest():
                request = message
            case m.Certificate():
                shown.setdefault(event.sender, message)
            case m.CertificateVerify():
                proved.add(event.sender)
            case m.Finished() | m.Sealed(handshake=True):
                finished.add(event.sender)
            case m.AlertMessage() if message.fatal:
                alerts.append((event.sender, message))
    return Scene(recording, known, hello, answer, request, shown, frozenset(proved), tuple(alerts), frozenset(finished))


def plain_speech(data: bytes) -> str:
    """What protocol bytes are of that are not TLS; '' where it cannot be told."""
    for greeting, name in _GREETINGS:
        if data.startswith(greeting):
            return name
    if data.startswith(_METHODS):
        return "plain HTTP"
    if len(data) > 5 and data[3:5] == b"\0\x0a":
        return "MySQL, which begins TLS later"
    return ""
