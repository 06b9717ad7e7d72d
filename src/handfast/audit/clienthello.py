"""ClientHellos byte by byte, sound or not, and what a server answers before anything is encrypted (RFC 8446 4.1)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from handfast.audit.oracle import End
from handfast.audit.wires import Silence, Wire
from handfast.wire.alerts import alert_name

TLS10, TLS11, TLS12, TLS13 = 0x0301, 0x0302, 0x0303, 0x0304
HANDSHAKE, ALERT = 22, 21
SERVER_HELLO, SERVER_KEY_EXCHANGE, SERVER_HELLO_DONE = 2, 12, 14

# Extension numbers (IANA's registry).
SERVER_NAME, GROUPS, POINT_FORMATS, SIGNATURES, ALPN, PADDING = 0, 10, 11, 13, 16, 21
VERSIONS, KEY_SHARE, RENEGOTIATION_INFO = 43, 51, 0xFF01

GOOD_SUITES_13 = (0x1301, 0x1302, 0x1303)
GOOD_SUITES_12 = (0xC02B, 0xC02F, 0xC02C, 0xC030, 0xCCA9, 0xCCA8)
GOOD_GROUPS = (0x001D, 0x0017, 0x0018)  # X25519, P-256, P-384
_SCHEMES = (0x0403, 0x0503, 0x0603, 0x0807, 0x0804, 0x0805, 0x0806, 0x0401, 0x0501, 0x0601, 0x0203, 0x0201)
_X25519 = 0x001D
_MAX_ANSWER = 256 << 10


@dataclass(frozen=True, slots=True)
class Hello:
    """A ClientHello; the defaults make a sound one for TLS 1.3 and 1.2.

    `versions` () leaves supported_versions out, as before TLS 1.3. `names`: the bodies of server_name extensions, in
    place of one for `server_name`. `extensions` come last, as (number, body).
    """

    server_name: str | None
    legacy_version: int = TLS12
    versions: tuple[int, ...] = (TLS13, TLS12)
    suites: tuple[int, ...] = (*GOOD_SUITES_13, *GOOD_SUITES_12)
    groups: tuple[int, ...] = GOOD_GROUPS
    compression: bytes = b"\0"
    names: tuple[bytes, ...] | None = None
    extensions: tuple[tuple[int, bytes], ...] = ()

    def message(self) -> bytes:
        """The handshake message."""
        extensions = b"".join(_u16(number) + _v16(body) for number, body in self._extensions())
        body = (
            _u16(self.legacy_version)
            + os.urandom(32)
            + _v8(os.urandom(32))
            + _v16(b"".join(map(_u16, self.suites)))
            + _v8(self.compression)
            + _v16(extensions)
        )
        return b"\1" + len(body).to_bytes(3, "big") + body

    def records(self, size: int = 16384) -> bytes:
        """The message in records of at most `size` bytes."""
        return in_records(self.message(), size)

    def _extensions(self) -> Iterator[tuple[int, bytes]]:
        if self.names is not None:
            for body in self.names:
                yield SERVER_NAME, body
        elif self.server_name is not None:
            yield SERVER_NAME, server_name_list(self.server_name.encode("ascii"))
        yield GROUPS, _v16(b"".join(map(_u16, self.groups)))
        yield POINT_FORMATS, b"\1\0"
        yield SIGNATURES, _v16(b"".join(map(_u16, _SCHEMES)))
        yield RENEGOTIATION_INFO, b"\0"
        if self.versions:
            yield VERSIONS, _v8(b"".join(map(_u16, self.versions)))
            # Any 32 bytes are a public key of X25519 (RFC 7748 5).
            yield KEY_SHARE, _v16(_u16(_X25519) + _v16(os.urandom(32)))
        yield from self.extensions


@dataclass(frozen=True, slots=True)
class Choice:
    """What a ServerHello chose; `extensions` are the numbers in it. `version` is the one in force."""

    version: int
    suite: int
    compression: int
    extensions: frozenset[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to a ClientHello: a choice, an alert (its RFC name), or an end.

    `messages`: the handshake messages that were not encrypted, as (type, body). `raw`: all of it, for evidence.
    """

    choice: Choice | None
    alert: str
    end: End
    messages: tuple[tuple[int, bytes], ...]
    raw: bytes

    @property
    def refused(self) -> bool:
        """Whether the server ended the handshake without choosing anything."""
        return self.choice is None and (bool(self.alert) or self.end in (End.CLOSED, End.RESET))

    def __str__(self) -> str:
        if self.choice is not None:
            return f"ServerHello: version {self.choice.version:#06x}, suite {self.choice.suite:#06x}"
        if self.alert:
            return f"the alert {self.alert}"
        if self.raw:
            return self.raw[:200].decode("latin-1")
        return {End.SILENT: "nothing", End.RESET: "a reset"}.get(self.end, "the connection was closed")


def say(wire: Wire, hello: Hello, within: float | None = None) -> Answer:
    """Send a ClientHello and read the answer. A server that is gone is an answer too."""
    try:
        wire.send(hello.records())
    except Silence:
        return Answer(None, "", End.SILENT, (), b"")
    except OSError:
        pass  # what it said before it went may still be there
    return read_answer(wire, within)


def read_answer(wire: Wire, within: float | None = None) -> Answer:
    """Read until the server has chosen and said its piece, has sent an alert, has ended, or is silent."""
    raw, end = b"", End.OPEN
    while len(raw) < _MAX_ANSWER:
        try:
            piece = wire.receive(within)
        except Silence:
            end = End.OPEN if raw else End.SILENT
            break
        except OSError:
            end = End.RESET
            break
        if not piece:
            end = End.CLOSED
            break
        raw += piece
        answer = parse_answer(raw, End.OPEN)
        if answer.alert or (answer.choice and _is_said(answer)) or raw[0] not in (HANDSHAKE, ALERT):
            return answer
    return parse_answer(raw, end)


def parse_answer(raw: bytes, end: End) -> Answer:
    """Read what can be read of a server's records. Total: what is no TLS has neither choice nor alert."""
    handshake, alert, at = b"", "", 0
    while at + 5 <= len(raw) and raw[at] in (HANDSHAKE, ALERT):
        length = int.from_bytes(raw[at + 3 : at + 5], "big")
        body = raw[at + 5 : at + 5 + length]
        if len(body) < length:
            break
        if raw[at] == HANDSHAKE:
            handshake += body
        elif len(body) == 2:
            alert = alert_name(body[1])
            break
        at += 5 + length
    messages = tuple(_messages(handshake))
    hello = next((body for kind, body in messages if kind == SERVER_HELLO), None)
    return Answer(None if hello is None else _choice(hello), alert, end, messages, raw)


def in_records(message: bytes, size: int) -> bytes:
    """A handshake message in plaintext records of at most `size` bytes each."""
    pieces = (message[at : at + size] for at in range(0, len(message), size))
    return b"".join(b"\x16\3\1" + _v16(piece) for piece in pieces)


def refragmented(records: bytes, size: int) -> bytes:
    """The same handshake bytes in records of at most `size`."""
    message, at = b"", 0
    while at + 5 <= len(records):
        length = int.from_bytes(records[at + 3 : at + 5], "big")
        message += records[at + 5 : at + 5 + length]
        at += 5 + length
    return in_records(message, size)


def server_name_list(*names: bytes) -> bytes:
    """The body of a server_name extension with these host names (RFC 6066 3)."""
    return _v16(b"".join(b"\0" + _v16(name) for name in names))


def protocol_names(*names: bytes) -> tuple[int, bytes]:
    """The extension that names the application protocols that the client speaks (RFC 7301 3.1)."""
    return ALPN, _v16(b"".join(map(_v8, names)))


def _is_said(answer: Answer) -> bool:
    """Whether more than the choice is not to be had: in TLS 1.3 the rest is encrypted."""
    assert answer.choice is not None
    return answer.choice.version == TLS13 or any(kind == SERVER_HELLO_DONE for kind, _ in answer.messages)


def _messages(handshake: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(handshake):
        length = int.from_bytes(handshake[at + 1 : at + 4], "big")
        if at + 4 + length > len(handshake):
            return
        yield handshake[at], handshake[at + 4 : at + 4 + length]
        at += 4 + length


def _choice(body: bytes) -> Choice | None:
    """RFC 8446 4.1.3; None where it is cut short."""
    try:
        version, session = struct.unpack_from("!H32xB", body)
        suite, compression = struct.unpack_from("!HB", body, 35 + session)
        at, extensions = 35 + session + 5, {}
        while at + 4 <= len(body):
            number, length = struct.unpack_from("!HH", body, at)
            extensions[number] = body[at + 4 : at + 4 + length]
            at += 4 + length
    except struct.error:
        return None
    if len(chosen := extensions.get(VERSIONS, b"")) == 2:
        version = int.from_bytes(chosen, "big")
    return Choice(version, suite, compression, frozenset(extensions))


def _u16(number: int) -> bytes:
    return number.to_bytes(2, "big")


def _v8(data: bytes) -> bytes:
    return bytes((len(data),)) + data


def _v16(data: bytes) -> bytes:
    return _u16(len(data)) + data
