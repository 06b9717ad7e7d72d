"""The encrypted pipe of a finished handshake, of a server or a client, over memory.

It moves no bytes over a network and judges nobody: who holds a channel was judged before.
"""

from __future__ import annotations

from OpenSSL import SSL

from handfast.errors import Failure, Reason
from handfast.tls.engine import BUFFER_SIZE, ffi, lib, room, take_bio
from handfast.tls.reasons import handshake_failure


class Channel:
    """The encrypted pipe of a finished handshake: plain bytes on one side, TLS records on the other."""

    __slots__ = ("_connection", "_in", "_out", "_ssl", "at_eof", "more")

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection = connection  # owns what the others point to
        self._ssl = connection._ssl
        self._in = connection._into_ssl
        self._out = connection._from_ssl
        self.at_eof = False
        self.more = False  # whether the last `read` left plain bytes behind

    def feed(self, records: bytes) -> None:
        """Take what the network brought."""
        if lib.BIO_write(self._in, records, len(records)) != len(records):
            raise MemoryError("a memory BIO takes no more")

    def read(self) -> bytes:
        """Return the next plain bytes; b'' when more records are needed or, with `at_eof`, at the peer's end.

        Raises TlsBroken when records do not decrypt.
        """
        self.more = False
        if self.at_eof:
            return b""
        buffer = room.buffer
        lib.ERR_clear_error()  # SSL_get_error reads the thread's queue, whoever left something in it
        size = lib.SSL_read(self._ssl, buffer, BUFFER_SIZE)  # one record's bytes at most
        if size <= 0:
            self._see_why(size)
            return b""
        while lib.BIO_get_mem_data(self._in, room.where):  # more records, or a part of one
            if size == BUFFER_SIZE:
                self.more = True
                break
            got = lib.SSL_read(self._ssl, buffer + size, BUFFER_SIZE - size)
            if got <= 0:
                self._see_why(got)
                break
            size += got
        if size == BUFFER_SIZE and not self.more:  # a record may have been cut by the end of the room
            self.more = lib.SSL_pending(self._ssl) > 0
        return bytes(ffi.unpack(buffer, size))

    def _see_why(self, result: int) -> None:
        """Nothing was read: more is needed, it is the end, or it broke."""
        error = lib.SSL_get_error(self._ssl, result)
        if error == lib.SSL_ERROR_ZERO_RETURN:
            self.at_eof = True
        elif error != lib.SSL_ERROR_WANT_READ:  # broken is not ended: the stream may have been cut
            raise TlsBroken(self._failure(result))

    def write(self, plain: bytes) -> None:
        """Encrypt; `take` has the records. Raises TlsBroken."""
        if plain and (put := lib.SSL_write(self._ssl, plain, len(plain))) != len(plain):
            raise TlsBroken(self._failure(put))

    def close(self) -> None:
        """Say close_notify, where that can still be said."""
        try:
            self._connection.shutdown()
        except SSL.Error:
            return

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return take_bio(self._out)

    def _failure(self, result: int) -> Failure:
        try:
            self._connection._raise_ssl_error(self._ssl, result)
        except SSL.Error as error:
            return handshake_failure(error)
        return Failure(Reason.TLS_HANDSHAKE, {"detail": "no reason given"})


class TlsBroken(Exception):
    """The channel cannot go on; `failure` says why. Who holds the channel turns it into an event or an answer."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)
