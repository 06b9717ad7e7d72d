"""Bodies on their way through: read just far enough to find their end (RFC 9112 6, 7).

What goes on is written anew: one length, or plain chunks. So the app sees the boundaries that the guard saw.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Protocol

from handfast.errors import Reason, RemoteProtocolError

MAX_TRAILER = 8 * 1024  # bytes of all trailer lines of a body
MAX_EXTENSION = 256  # bytes of one chunk's extensions
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"  # RFC 9110 5.6.2
NAME = re.compile(rb"%b+" % TOKEN)
VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 5.5, obs-text allowed


class BodyKind(Enum):
    """How the end of a body is found (RFC 9112 6.3)."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until close"


class Body(Protocol):
    """A body on its way through, read just far enough to find its end."""

    @property
    def done(self) -> bool:
        """Whether the end was found. A connection that closes before it was cut short."""

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Return what to send on, and how many bytes of `data` were used: all, unless the body ended in it.

        Raises RemoteProtocolError (HTTP_CHUNK); the reader is of no use after that.
        """


def body_reader(kind: BodyKind, length: int, decode: bool = False) -> Body:
    """Return the reader of a body; `decode` makes a chunked one give its contents without the chunks."""
    match kind:
        case BodyKind.CHUNKED:
            return ChunkedReader(decode)
        case BodyKind.UNTIL_CLOSE:
            return CloseReader()
        case BodyKind.LENGTH:
            return LengthReader(length)
        case BodyKind.NONE:
            return LengthReader(0)


class LengthReader:
    """A body of known length; none at all is one of length 0."""

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        self._left = length

    @property
    def done(self) -> bool:
        """Whether all of it has come."""
        return self._left == 0

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """See Body. Raises nothing."""
        used = min(self._left, len(data))
        self._left -= used
        return data[:used], used


class CloseReader:
    """A response's body that ends when the app closes the connection: never done."""

    __slots__ = ()

    @property
    def done(self) -> bool:
        """False: only the close of the connection ends it."""
        return False

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """See Body. Raises nothing."""
        return data, len(data)


class _Expects(Enum):
    SIZE = 1
    DATA_END = 2
    TRAILER = 3


# RFC 9112 7.1, without the white space that 7.1.1 calls bad. 15 digits stay below 2**63.
_SIZE_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,15})((?:;%b+(?:=(?:%b+|\"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*\"))?)*)" % (TOKEN, TOKEN)
)


class ChunkedReader:
    """A chunked body (RFC 9112 7.1), given on as plain chunks of the same sizes.

    Extensions and trailers are checked and dropped. The last chunk goes out only when the trailer was good.
    """

    __slots__ = ("_decode", "_expects", "_left", "_line", "_trailer", "done")

    def __init__(self, decode: bool = False) -> None:
        self.done = False
        self._decode = decode
        self._expects = _Expects.SIZE
        self._left = 0  # bytes of the chunk's data still to come
        self._line = b""  # the part of a line that has come
        self._trailer = 0  # bytes of trailer lines so far

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """See Body. Data in the midst of a chunk goes through uncopied."""
        size = len(data)
        if size < self._left:
            self._left -= size
            return data, size
        view = memoryview(data)
        out: list[bytes | memoryview] = []
        at = 0
        while at < size and not self.done:
            if self._left:
                used = min(self._left, size - at)
                out.append(view[at : at + used])
                at += used
                self._left -= used
            else:
                at = self._take_line(data, at, out)
        return b"".join(out), at

    def _take_line(self, data: bytes, at: int, out: list[bytes | memoryview]) -> int:
        """Read up to the end of a line, or of `data`; return the index behind it."""
        match self._expects:
            case _Expects.SIZE:
                limit = 15 + MAX_EXTENSION + 2
            case _Expects.DATA_END:
                limit = 2  # CRLF and nothing else
            case _Expects.TRAILER:
                limit = MAX_TRAILER - self._trailer
        room = limit - len(self._line)
        end = data.find(b"\n", at, at + room) + 1
        if end == 0:
            if len(data) - at >= room:
                raise RemoteProtocolError(Reason.HTTP_CHUNK, detail=f"a line longer than {limit} bytes")
            self._line += data[at:]
            return len(data)
        line = self._line + data[at:end]
        self._line = b""
        if line[-2:] != b"\r\n":
            raise RemoteProtocolError(Reason.HTTP_CHUNK, detail="a line that ends in a bare LF")
        mark = self._end_line(line[:-2])
        if not self._decode:
            out.append(mark)
        return end

    def _end_line(self, line: bytes) -> bytes:
        """Take in a line; return the framing that is sent on for it."""
        match self._expects:
            case _Expects.SIZE:
                found = _SIZE_LINE.fullmatch(line)
                if found is None or len(found[2]) > MAX_EXTENSION:
                    raise RemoteProtocolError(Reason.HTTP_CHUNK, detail="a malformed chunk size or extension")
                self._left = int(found[1], 16)
                if self._left == 0:
                    self._expects = _Expects.TRAILER
                    return b""
                self._expects = _Expects.DATA_END
                return b"%x\r\n" % self._left
            case _Expects.DATA_END:
                self._expects = _Expects.SIZE
                return b"\r\n"
            case _Expects.TRAILER:
                if not line:
                    self.done = True
                    return b"0\r\n\r\n"
                name, colon, value = line.partition(b":")
                if not colon or not NAME.fullmatch(name) or not VALUE.fullmatch(value):
                    raise RemoteProtocolError(Reason.HTTP_CHUNK, detail="a malformed trailer line")
                self._trailer += len(line) + 2
                return b""
