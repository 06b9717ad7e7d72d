"""What is remembered of header blocks is what the library would make of them, and no connection sees another's."""

from __future__ import annotations

from typing import Any

import pytest
from hpack import Decoder, Encoder, HeaderTuple, HPACKError, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from handfast.wire.http2 import MAX_LIST
from handfast.wire.packing import Packer, Unpacker

LEARN = b"\x40\x01a\x01b"  # a: b, and into the table
NEWEST = b"\xbe"  # what went into the table last
MOST = 16

_NAMES = [b"a", b"authorization", b":path", b"x-large", b":status", b"content-length"]
_VALUES = [b"", b"1", b"100", b"y" * 900, b"z" * 3000, b"z" * 5000]
_field = st.tuples(st.sampled_from(_NAMES), st.sampled_from(_VALUES), st.booleans())
_fields = st.lists(_field, max_size=5)
_step = st.one_of(_fields, st.sampled_from([0, 64, 1000, 4096]))  # a list to pack, or a new size of the table


def _tuples(fields: list[tuple[bytes, bytes, bool]]) -> tuple[HeaderTuple, ...]:
    return tuple((NeverIndexedHeaderTuple if secret else HeaderTuple)(name, value) for name, value, secret in fields)


def _table(decoder: Decoder) -> tuple[list[tuple[bytes, bytes]], int]:
    return list(decoder.header_table.dynamic_entries), decoder.header_table_size


def _alike(ours: Unpacker, judge: Decoder, block: bytes) -> bool:
    """Check that both read the same, and have the same table then; whether they read anything."""
    try:
        meant = list(judge.decode(block, raw=True))
    except HPACKError as error:
        with pytest.raises(type(error)):
            ours.decode(block)
        return False
    read = ours.decode(block)
    assert list(read) == meant
    assert [type(field) for field in read] == [type(field) for field in meant]
    assert _table(ours._decoder) == _table(judge)
    return True


@given(steps=st.lists(_step, max_size=25), huffman=st.booleans(), again=st.integers(1, 3))
def test_the_unpacker_reads_what_the_library_reads(steps: list[Any], huffman: bool, again: int) -> None:
    """Any lists under any tables, with entries that go and sizes that change, each block once and more often."""
    encoder, judge, ours = Encoder(), Decoder(MAX_LIST), Unpacker()
    for step in steps:
        if isinstance(step, int):
            encoder.header_table_size = step
            continue
        block = encoder.encode(_tuples(step), huffman=huffman)
        for _ in range(again):
            if not _alike(ours, judge, block):
                return


@given(blocks=st.lists(st.one_of(st.binary(max_size=12), st.sampled_from([LEARN, NEWEST, b"\x20", b"\x3f\xe1\x1f"]))))
def test_the_unpacker_refuses_what_the_library_refuses(blocks: list[bytes]) -> None:
    """Of any bytes both make the same, or neither anything; what was refused is not remembered."""
    judge, ours = Decoder(MAX_LIST), Unpacker()
    for block in [one for one in blocks for _ in range(2)]:
        if not _alike(ours, judge, block):
            assert block not in ours.known
            return


@given(steps=st.lists(st.tuples(_step, st.booleans()), max_size=25))
def test_the_packer_says_what_was_meant(steps: list[tuple[Any, bool]]) -> None:
    """Lists and tuples, new or the very same again, between changes of the table: a reader has what was meant."""
    ours, judge = Packer(), Decoder()
    kept: list[tuple[HeaderTuple, ...]] = []
    for step, anew in steps:
        if isinstance(step, int):
            ours.header_table_size = step
            continue
        fields = _tuples(step)
        kept.append(fields)
        for one in [list(fields), *([fields] if anew else kept)] * 2:
            assert list(judge.decode(ours.encode(one), raw=True)) == list(one)


def test_a_block_that_comes_again_is_the_same_tuple() -> None:
    """The second time nothing is unpacked: the very tuple of the first comes back; another block is another."""
    ours = Unpacker()
    first = ours.decode(b"\x82\x84")
    assert ours.decode(b"\x82\x84") is first
    assert list(ours.decode(b"\x83\x84")) == [(b":method", b"POST"), (b":path", b"/")]


def test_a_block_that_changes_the_table_is_read_each_time() -> None:
    """It adds an entry each time, and what was known before it is read anew."""
    ours = Unpacker()
    ours.decode(b"\x82")
    assert b"\x82" in ours.known
    for times in (1, 2):
        ours.decode(LEARN)
        assert len(ours._decoder.header_table.dynamic_entries) == times
        assert not ours.known
    assert list(ours.decode(NEWEST)) == [(b"a", b"b")]
    ours.decode(b"\x40\x01a\x01c")
    assert list(ours.decode(NEWEST)) == [(b"a", b"c")]


@pytest.mark.parametrize("size", [b"\x20", b"\x3f\x01"])  # to 0 and to 32: what was in it goes
def test_after_a_change_of_the_size_a_block_is_read_anew(size: bytes) -> None:
    """An entry that went with the table's size is not remembered past it."""
    ours = Unpacker()
    ours.decode(LEARN)
    assert ours.decode(NEWEST) is ours.decode(NEWEST)
    ours.decode(size)
    with pytest.raises(HPACKError):
        ours.decode(NEWEST)


def test_new_limits_are_held_against_what_is_known() -> None:
    """A block that was fine is refused where the limit of a list is smaller now."""
    ours = Unpacker()
    ours.decode(b"\x82\x84")
    ours.max_header_list_size = 50
    with pytest.raises(HPACKError):
        ours.decode(b"\x82\x84")


def test_a_packed_list_is_packed_anew_after_a_change() -> None:
    """A new entry or size of the table makes another block of the same tuple."""
    ours, judge = Packer(), Decoder()
    fields = (HeaderTuple(b"a", b"b"),)
    blocks = [ours.encode(fields) for _ in range(4)]
    assert blocks == [blocks[0], NEWEST, NEWEST, NEWEST]
    assert ours.same
    blocks.append(ours.encode((HeaderTuple(b"c", b"d"),)))
    assert not ours.same
    blocks.append(ours.encode(fields))
    ours.header_table_size = 0
    blocks.append(ours.encode(fields))
    assert blocks[-2:] == [b"\xbf", b"\x20" + LEARN]
    read = [field for block in blocks for field in judge.decode(block, raw=True)]
    assert read == [(b"a", b"b")] * 4 + [(b"c", b"d")] + [(b"a", b"b")] * 2


@pytest.mark.parametrize("first", [0, 1])
def test_a_secret_is_another_list_than_the_same_words_without(first: int) -> None:
    """What must be in no table (RFC 7541 7.1.3) says so each time, though its plain twin was packed as well."""
    ours, judge = Packer(), Decoder()
    pair = (NeverIndexedHeaderTuple(b":path", b"/secret"),), (HeaderTuple(b":path", b"/secret"),)
    ours.header_table_size = 0  # a table in which the twin stood would be pointed to
    for fields in (pair[first], pair[1 - first]) * 3:
        got = list(judge.decode(ours.encode(fields), raw=True))
        assert [field.indexable for field in got] == [fields is pair[1]]


def test_one_connection_knows_nothing_of_another() -> None:
    """The same bytes mean to each connection what its own table says."""
    one, other = Unpacker(), Unpacker()
    one.decode(LEARN)
    other.decode(b"\x40\x01a\x01c")
    assert list(one.decode(NEWEST)) == [(b"a", b"b")]
    assert list(other.decode(NEWEST)) == [(b"a", b"c")]
    with pytest.raises(HPACKError):
        Unpacker().decode(NEWEST)
    assert Packer().same is not Packer().same


def test_what_is_remembered_is_bounded() -> None:
    """Few blocks and lists are, no long ones, and those that come again are not kept out by those that do not."""
    unpacker, packer = Unpacker(), Packer()
    for at in range(100):
        unpacker.decode(b"\x00\x01a\x03%03d" % at)
        fields = (NeverIndexedHeaderTuple(b"a", b"%d" % at),)
        for _ in range(2):
            packer.encode(fields)
    assert len(unpacker.known) == len(packer.same) == len(packer._known) == MOST
    assert unpacker.decode(b"\x82") is unpacker.decode(b"\x82")
    long = b"\x82" * 65
    assert unpacker.decode(long) is not unpacker.decode(long)
