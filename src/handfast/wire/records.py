"""TLS as bytes on a connection: who sent what when, records out of a stream, handshake messages out of records.

Owns RFC 8446 5.1's framing and the values that a recorded handshake is made of. What a message says is read in
`messages`; nothing here decrypts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum

MAX_HANDSHAKE = 1 << 20  # bytes of handshake that are kept of one connection; real ones have under 20,000
LARGEST_RECORD = 16_384 + 2048  # RFC 5246 6.2.3; TLS 1.3 allows 256 for its overhead
_HEADER = 5


class Side(StrEnum):
    """An end of the connection."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def other(self) -> Side:
        """The far end."""
        return Side.SERVER if self is Side.CLIENT else Side.CLIENT


class ContentType(IntEnum):
    """What a record carries: IANA's TLS ContentType registry, as far as TLS uses it."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    APPLICATION_DATA = 23
    HEARTBEAT = 24


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes as they crossed the network. `at`: seconds from the connection's beginning."""

    at: float
    sender: Side
    data: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """One message, in the clear: a whole handshake message with its header, an alert, a change of cipher.

    `kind` is a content type's number. `encrypted`: it crossed the network encrypted. Application data is noted
    by its length alone, in `size`.
    """

    at: float
    sender: Side
    kind: int
    data: bytes
    encrypted: bool = False
    size: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One TLS record as it lies on the wire."""

    kind: int
    version: int
    payload: bytes

    @property
    def header(self) -> bytes:
        """The five bytes before the payload, which TLS 1.3's encryption authenticates."""
        return bytes((self.kind, *self.version.to_bytes(2, "big"), *len(self.payload).to_bytes(2, "big")))


class RecordReader:
    """Cuts a stream into records. Once something in it is no record, `broken` says so and it reads no further."""

    __slots__ = ("_buffer", "broken")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.broken = False

    def feed(self, data: bytes) -> Iterator[Record]:
        """Take the next bytes; yield the records that are whole. Raises nothing."""
        if self.broken:
            return
        buffer, at = self._buffer, 0
        buffer += data
        while len(buffer) - at >= _HEADER:
            kind, length = buffer[at], buffer[at + 3] << 8 | buffer[at + 4]
            if kind not in _KINDS or buffer[at + 1] != 3 or length > LARGEST_RECORD:
                self.broken = True
                return
            end = at + _HEADER + length
            if len(buffer) < end:
                break
            yield Record(kind, 0x300 | buffer[at + 2], bytes(buffer[at + _HEADER : end]))
            at = end
        del buffer[:at]


class MessageJoiner:
    """Puts handshake messages together from the records of one direction, which cut them anywhere."""

    __slots__ = ("_buffer", "broken")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.broken = False  # a message is longer than all that is kept of a handshake

    def feed(self, payload: bytes) -> Iterator[bytes]:
        """Take a handshake record's payload; yield the messages that are whole, header and all. Raises nothing."""
        if self.broken:
            return
        buffer = self._buffer
        buffer += payload
        while len(buffer) >= 4:
            length = 4 + int.from_bytes(buffer[1:4], "big")
            if length > MAX_HANDSHAKE:
                self.broken = True
                return
            if len(buffer) < length:
                return
            yield bytes(buffer[:length])
            del buffer[:length]


_KINDS = frozenset(ContentType)
