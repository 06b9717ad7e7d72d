"""Header blocks of HTTP/2 (RFC 7541), packed and unpacked once while they come again.

The library does the work. Remembered is only what it made of a whole list or block, under a table that it left as it
was, and only for as long as the table stays so. Each belongs to one direction of one connection and to no other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hpack import Decoder, Encoder, HeaderTuple
from hpack.table import HeaderTable

from handfast.wire.http1 import Header
from handfast.wire.http2 import MAX_LIST

TABLE = 4096  # bytes of a header table, RFC 9113 6.5.2's default; a peer's larger wish is not followed
_MOST_KNOWN, _LONGEST_KNOWN, _MOST_FIELDS = 16, 2048, 64  # lists that are remembered, bytes of a block, fields of one


class Packer:
    """A packer of headers without Huffman's code, which costs more here than it saves.

    `same`: by the id of a tuple, that tuple and its block, for those that would be packed as they were.
    """

    __slots__ = ("_encoder", "_known", "same")

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._known: dict[object, bytes] = {}
        self.same: dict[int, tuple[tuple[Header, ...], bytes]] = {}

    @property
    def header_table_size(self) -> int:
        """Bytes of the table; a change is told in the next block."""
        return self._encoder.header_table_size

    @header_table_size.setter
    def header_table_size(self, size: int) -> None:
        size = min(size, TABLE)
        if size != self._encoder.header_table_size:  # said twice, the library would not tell of it at all
            self._forget()
            self._encoder.header_table_size = size

    def encode(self, headers: Iterable[Header]) -> bytes:
        """Return the block that says these."""
        same = self.same.get(id(headers))
        if same is not None and same[0] is headers:
            return same[1]
        fields = tuple(headers)
        key = fields, tuple(map(type, fields))  # the type says whether the table may have it
        packed = self._known.get(key)
        if packed is None:
            before, resized = _State(self._encoder.header_table), self._encoder.header_table.resized
            packed = self._encoder.encode(fields, huffman=False)
            if resized or not before.holds():
                self._forget()
            elif len(packed) <= _LONGEST_KNOWN and len(fields) <= _MOST_FIELDS:
                _make_room(self._known)
                self._known[key] = packed
        elif fields is headers:
            _make_room(self.same)
            self.same[id(fields)] = fields, packed
        return packed

    def _forget(self) -> None:
        self._known.clear()
        self.same.clear()


class Unpacker:
    """An unpacker of headers. A block that comes again gives the same tuple again.

    `known`: the blocks that would be read as they were, and whether `plain` said yes of what they say.
    """

    __slots__ = ("_decoder", "known")

    def __init__(self) -> None:
        self._decoder = Decoder(MAX_LIST)
        self.known: dict[bytes, tuple[tuple[HeaderTuple, ...], bool]] = {}

    @property
    def max_header_list_size(self) -> int:
        """Bytes of a list at most; beyond it a block is refused."""
        return self._decoder.max_header_list_size

    @max_header_list_size.setter
    def max_header_list_size(self, size: int) -> None:
        self.known.clear()
        self._decoder.max_header_list_size = size

    @property
    def max_allowed_table_size(self) -> int:
        """Bytes that the peer may make the table."""
        return self._decoder.max_allowed_table_size

    @max_allowed_table_size.setter
    def max_allowed_table_size(self, size: int) -> None:
        self.known.clear()
        self._decoder.max_allowed_table_size = size

    def decode(self, block: bytes, raw: bool = True) -> tuple[HeaderTuple, ...]:
        """Return what a block says. Raises HPACKError, after which the connection cannot go on (RFC 9113 4.3)."""
        known = self.known.get(block)
        if known is not None:
            return known[0]
        before = _State(self._decoder.header_table)
        headers = tuple(self._decoder.decode(block, raw))
        if not before.holds():
            self.known.clear()
        elif len(block) <= _LONGEST_KNOWN and len(headers) <= _MOST_FIELDS:
            _make_room(self.known)
            self.known[block] = headers, plain(headers)
        return headers


def plain(headers: Iterable[Header]) -> bool:
    """Whether this is neither an answer of the class 1xx nor has a length that a body is held to."""
    return not any(name == b"content-length" or (name == b":status" and value[:1] == b"1") for name, value in headers)


class _State:
    """What tells a table from itself a moment later: entries come in front, each a new object, and go at the back."""

    __slots__ = ("_count", "_newest", "_size", "_table")

    def __init__(self, table: HeaderTable) -> None:
        entries = table.dynamic_entries
        self._table, self._count, self._size = table, len(entries), table.maxsize
        self._newest = entries[0] if entries else None  # kept, so that its place in memory is not given to another

    def holds(self) -> bool:
        entries = self._table.dynamic_entries
        newest = entries[0] if entries else None
        return newest is self._newest and len(entries) == self._count and self._table.maxsize == self._size


def _make_room(known: dict[Any, Any]) -> None:
    """The oldest goes for a new one: blocks that never come again do not keep out those that do."""
    if len(known) >= _MOST_KNOWN:
        del known[next(iter(known))]
