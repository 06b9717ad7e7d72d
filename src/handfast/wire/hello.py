"""The first message of a TLS connection, read from its first bytes: for which site it is.

Owns the reading of a ClientHello (RFC 8446 4.1.2) out of its records (5.1), so that a site is chosen before a
TLS engine sees a byte. It is stricter than it must be: what two readers could take in two ways is refused. In
particular a hello that is not all there is never a hello without a name (CVE-2026-32305). It answers nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from struct import error as StructError

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire.records import ContentType
from handfast.wire.registry import ALPN, EARLY_DATA, PRE_SHARED_KEY, SERVER_NAME, SUPPORTED_VERSIONS

MAX_HELLO = 65_536  # bytes of handshake; hellos with post-quantum keys have under 2,000
MAX_RECORDS = 81_920  # bytes of records, their headers with them
MAX_NAME = 255  # bytes, as OpenSSL has it (TLSEXT_MAXLEN_host_name); DNS names have at most 253

_HANDSHAKE = ContentType.HANDSHAKE
_CLIENT_HELLO = 1
_LARGEST_RECORD = 16_384  # RFC 8446 5.1

_EXTENSION = Struct(">HH")  # type, length
_SERVER_NAME_HEAD = Struct(">HBH")  # length of the list, type of the one name, its length


@dataclass(frozen=True, slots=True)
class ClientHello:
    """A hello that is all there: what a client asks for.

    `server_name` is as it was sent, of visible ASCII, and "" where none was: bring it into its normal form before
    comparing.
    """

    server_name: str


class HelloReader:
    """Reads one hello that comes in pieces. Its work is in proportion to the bytes, however they are cut."""

    __slots__ = ("_buffer", "_message", "_taken")

    def __init__(self) -> None:
        self._buffer = bytearray()  # what no whole record has been made of
        self._message = bytearray()  # the handshake bytes of the records so far
        self._taken = 0  # bytes of records so far

    def feed(self, data: bytes) -> ClientHello | None:
        """Take the next bytes; return the hello that all so far hold, or None while more are needed.

        What follows the hello's last record is not looked at. Whichever way the bytes are cut, the answer is the same.
        Raises RemoteProtocolError: TLS_NOT_TLS where the bytes begin no handshake record, else TLS_BAD_HELLO. Not to
        be fed again once it has returned a hello or raised.
        """
        if not self._buffer and not self._taken and _is_whole(data):
            return _parse(data[9 : 5 + (data[3] << 8 | data[4])])
        self._buffer += data
        buffer, message, at = self._buffer, self._message, 0
        while True:
            self._check_record(buffer[at : at + 5])
            if len(buffer) < at + 5:
                break
            end = at + 5 + (buffer[at + 3] << 8 | buffer[at + 4])
            if len(buffer) < end:
                break
            message += buffer[at + 5 : end]
            self._taken += end - at
            at = end
            if message[0] != _CLIENT_HELLO:
                raise _bad("it is another handshake message")
            if len(message) >= 4:
                length = int.from_bytes(message[1:4], "big")
                if length > MAX_HELLO - 4:
                    raise _bad(f"it is longer than {MAX_HELLO} bytes")
                if len(message) > 4 + length:
                    raise _bad("something follows it in its record")
                if len(message) == 4 + length:
                    return _parse(bytes(message[4:]))
        del buffer[:at]
        return None

    def _check_record(self, head: bytes | bytearray) -> None:
        """Refuse a record by as much of its header as is there."""
        first = self._taken == 0
        if head and head[0] != _HANDSHAKE:
            raise RemoteProtocolError(Reason.TLS_NOT_TLS) if first else _bad("another record comes in between")
        # RFC 8446 5.1: the version of a record says nothing, but no TLS ever had another first byte.
        if len(head) > 1 and head[1] != 3:
            raise RemoteProtocolError(Reason.TLS_NOT_TLS) if first else _bad("a record is of no TLS")
        if len(head) < 5:
            return
        length = head[3] << 8 | head[4]
        if not 0 < length <= _LARGEST_RECORD:
            raise _bad(f"a record has {length} bytes")
        if self._taken + 5 + length > MAX_RECORDS:
            raise _bad(f"its records are longer than {MAX_RECORDS} bytes")


def _is_whole(data: bytes) -> bool:
    """Whether this is the usual hello: one record, all there."""
    if len(data) < 9 or data[0] != _HANDSHAKE or data[1] != 3 or data[5] != _CLIENT_HELLO:
        return False
    length = data[3] << 8 | data[4]
    return len(data) >= 5 + length <= 5 + _LARGEST_RECORD and (data[6] << 16 | data[7] << 8 | data[8]) == length - 4


def _parse(body: bytes) -> ClientHello:
    """RFC 8446 4.1.2: version, random, session id, cipher suites, compression methods, extensions."""
    try:
        if body[0] != 3:
            raise _bad("its version is of no TLS")
        session = body[34]
        at = 35 + session
        suites = body[at] << 8 | body[at + 1]
        at += 2 + suites
        compressions = body[at]
        at += 1 + compressions
        if session > 32 or suites < 2 or suites % 2 or not compressions or at > len(body):
            raise _bad("a field has a length that it cannot have")
        extensions = _extensions(body, at) if at < len(body) else {}
        name = _server_name(extensions[SERVER_NAME]) if SERVER_NAME in extensions else ""
        if SUPPORTED_VERSIONS in extensions:
            _check_versions(extensions[SUPPORTED_VERSIONS])
        if ALPN in extensions:
            _check_alpn(extensions[ALPN])
    except (IndexError, StructError):
        raise _bad("a field ends too early") from None
    if extensions.get(EARLY_DATA):
        raise _bad("its early_data extension is not empty")
    return ClientHello(name)


def _extensions(body: bytes, at: int) -> dict[int, bytes]:
    """The extensions by type. RFC 8446 4.2: none comes twice, and a pre-shared key comes last (4.2.11)."""
    end = at + 2 + (body[at] << 8 | body[at + 1])
    if end != len(body):
        raise _bad("its extensions do not fill it")
    at += 2
    found: dict[int, bytes] = {}
    count = 0
    kind = PRE_SHARED_KEY
    unpack = _EXTENSION.unpack_from
    while at < end:
        kind, length = unpack(body, at)
        at += 4
        found[kind] = body[at : at + length]
        at += length
        count += 1
    if at != end:
        raise _bad("an extension is cut off")
    if count != len(found):
        raise _bad("an extension is there twice")
    if PRE_SHARED_KEY in found and kind != PRE_SHARED_KEY:
        raise _bad("an extension follows the pre-shared key")
    return found


def _server_name(value: bytes) -> str:
    """RFC 6066 3: a list of one host name. No other type of name was ever given a meaning, so none is read."""
    listed, kind, length = _SERVER_NAME_HEAD.unpack_from(value)
    if listed != len(value) - 2 or kind != 0 or length > listed - 3:
        raise _bad("its server name is malformed")
    if length < listed - 3:
        raise _bad("it has two server names")
    if not 0 < length <= MAX_NAME:
        raise _bad(f"its server name has {length} bytes")
    name = value[5:]
    if not name.isascii() or not name.decode("ascii").isprintable() or b" " in name:
        raise _bad("its server name is not of visible ASCII")
    return name.decode("ascii")


def _check_alpn(value: bytes) -> None:
    """RFC 7301 3.1: a list of names of 1 to 255 bytes, at least one."""
    if len(value) < 4 or value[0] << 8 | value[1] != len(value) - 2:
        raise _bad("its list of application protocols is malformed")
    at = 2
    while at < len(value):
        length = value[at]
        at += 1 + length
        if not length or at > len(value):
            raise _bad("an application protocol's name is empty or cut off")


def _check_versions(value: bytes) -> None:
    """RFC 8446 4.2.1: 1 to 127 versions."""
    if len(value) < 3 or value[0] != len(value) - 1 or value[0] % 2:
        raise _bad("its list of versions is malformed")


def _bad(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reason.TLS_BAD_HELLO, detail=detail)
