"""The ClientHello reader: real hellos, bad ones, and however the bytes are cut.

`hellos.json` holds the first flights that real clients sent, in base64.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire.hello import MAX_HELLO, MAX_RECORDS, ClientHello, HelloReader

SITE = "web.example.com"

RECORDED = {
    name: base64.b64decode(entry["hello"])
    for name, entry in json.loads((Path(__file__).parent / "hellos.json").read_text()).items()
}
NAMELESS = ClientHello("")
EXPECTED = dict.fromkeys(RECORDED, ClientHello(SITE)) | dict.fromkeys(("openssl-no-name", "curl-address"), NAMELESS)
CLOSED_ONES = [name for name in RECORDED if name != "openssl-early-data"]  # nothing follows the hello


def handshake(data: bytes) -> bytes:
    """The handshake message in the first record."""
    return data[5 : 5 + int.from_bytes(data[3:5], "big")]


def records(message: bytes, size: int = 16384, head: bytes = b"\x16\x03\x01") -> bytes:
    """A message in records of `size` bytes."""
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(head + len(part).to_bytes(2, "big") + part for part in parts)


def extension(kind: int, value: bytes) -> bytes:
    return struct.pack(">HH", kind, len(value)) + value


def server_name(*names: bytes, kind: int = 0) -> bytes:
    listed = b"".join(struct.pack(">BH", kind, len(name)) + name for name in names)
    return extension(0, len(listed).to_bytes(2, "big") + listed)


def body(*extensions: bytes, version: bytes = b"\x03\x03", session: bytes = b"", suites: bytes = b"\x13\x01") -> bytes:
    """A ClientHello's body (RFC 8446 4.1.2)."""
    listed = b"".join(extensions)
    fields = (
        version + bytes(32) + bytes([len(session)]) + session + len(suites).to_bytes(2, "big") + suites + b"\x01\x00"
    )
    return fields + (len(listed).to_bytes(2, "big") + listed if extensions else b"")


def message(content: bytes) -> bytes:
    return b"\x01" + len(content).to_bytes(3, "big") + content


def hello(*extensions: bytes) -> bytes:
    return records(message(body(*extensions)))


def fed(data: bytes, size: int) -> ClientHello | None:
    """Feed pieces of `size` bytes until an answer comes."""
    reader = HelloReader()
    for at in range(0, len(data), size):
        found = reader.feed(data[at : at + size])
        if found is not None:
            return found
    return None


def read_hello(data: bytes) -> ClientHello | None:
    """What bytes that come at once are read as."""
    return HelloReader().feed(data)


def outcome(data: bytes) -> ClientHello | tuple[Reason, str] | None:
    try:
        return read_hello(data)
    except RemoteProtocolError as error:
        return error.reason, error.facts.get("detail", "")


@pytest.mark.parametrize("name", RECORDED)
def test_real_hellos_are_read(name: str) -> None:
    """What real clients sent is read as the name they were told to ask for."""
    assert read_hello(RECORDED[name]) == EXPECTED[name]


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("size", [1, 7, 100, 500])
def test_a_hello_split_over_records_is_the_same_hello(name: str, size: int) -> None:
    """A hello in records of a few bytes reads as in one, fed whole or byte by byte."""
    split = records(handshake(RECORDED[name]), size)
    assert read_hello(split) == EXPECTED[name]
    assert fed(split, 1) == EXPECTED[name]


@pytest.mark.parametrize("name", CLOSED_ONES)
@pytest.mark.parametrize("size", [16384, 40])
def test_a_hello_that_is_not_all_there_has_no_answer_yet(name: str, size: int) -> None:
    """No beginning of a hello is taken for a hello, one without a name least of all (CVE-2026-32305)."""
    data = records(handshake(RECORDED[name]), size)
    assert {read_hello(data[:end]) for end in range(len(data))} == {None}
    assert read_hello(data) == EXPECTED[name]


def test_what_follows_the_hello_is_left_alone() -> None:
    """Early data and the like behind the hello's last record change nothing."""
    assert read_hello(RECORDED["curl-1.3"] + b"\x14\x03\x03\x00\x01\x01 and more") == EXPECTED["curl-1.3"]
    assert len(RECORDED["openssl-early-data"]) > 5 + len(handshake(RECORDED["openssl-early-data"]))


def test_what_is_not_understood_is_passed_over() -> None:
    """GREASE (RFC 8701) and what resumes a session change nothing of the site that is asked for."""
    versions = extension(43, b"\x06\x4a\x4a\x03\x04\xfa\xfa")
    alpn = extension(16, b"\x00\x06\x02\x0a\x0a\x02h2")
    grease = (extension(0x1A1A, b""), versions, alpn, extension(0xDADA, b"\x00"))
    resuming = (extension(35, b"ticket"), extension(42, b""), extension(41, b"psk"))
    found = read_hello(records(message(body(*grease, server_name(b"a.test"), *resuming, session=b"x" * 32))))
    assert found == ClientHello("a.test")


BAD_BODIES = {
    "not TLS": body(version=b"\x02\x00"),
    "a long session id": body(session=b"x" * 33),
    "no cipher suites": body(suites=b""),
    "half a cipher suite": body(suites=b"\x13\x01\x13"),
    "a cut body": body()[:20],
    "no compression": body()[:-2] + b"\x00",
    "half a length of extensions": body() + b"\x00",
    "extensions that end early": body() + b"\x00\x05\x00\x00\x00\x00",
    "bytes behind the extensions": body(server_name(b"a")) + b"\x00",
    "an extension that is cut off": body(b"\x00\x17\x00\x04\x00"),
    "an extension's head cut off": body(b"\x00\x17\x00"),
    "an extension twice": body(extension(23, b""), extension(23, b"")),
    "a server name twice": body(server_name(b"a"), server_name(b"b")),
    "something behind the pre-shared key": body(extension(41, b"psk"), extension(23, b"")),
    "two server names": body(server_name(b"a", b"b")),
    "no server name in the list": body(server_name()),
    "an empty extension of a server name": body(extension(0, b"")),
    "an empty server name": body(server_name(b"")),
    "a server name of 256 bytes": body(server_name(b"a" * 256)),
    "a server name of another type": body(server_name(b"a", kind=1)),
    "a server name beyond its list": body(extension(0, b"\x00\x04\x00\x00\x09a")),
    "a list of names beyond its extension": body(extension(0, b"\x00\x09\x00\x00\x01a")),
    "a server name in UTF-8": body(server_name("bücher.example".encode())),
    "a NUL in the server name": body(server_name(b"web\x00.evil")),
    "a line break in the server name": body(server_name(b"web\r\n")),
    "a space in the server name": body(server_name(b"web evil")),
    "no application protocols": body(extension(16, b"\x00\x00")),
    "an empty application protocol": body(extension(16, b"\x00\x03\x00\x01h")),
    "a cut application protocol": body(extension(16, b"\x00\x03\x05h2")),
    "a wrong length of application protocols": body(extension(16, b"\x00\x09\x02h2")),
    "no versions": body(extension(43, b"\x00")),
    "half a version": body(extension(43, b"\x03\x03\x04\x03")),
    "versions that end early": body(extension(43, b"\x04\x03\x04")),
    "early data with contents": body(extension(42, b"x")),
}


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.parametrize("size", [16384, 1])
def test_a_malformed_hello_is_refused(name: str, size: int) -> None:
    """What a field cannot be is refused with its reason, in one record and in many."""
    with pytest.raises(RemoteProtocolError) as caught:
        read_hello(records(message(BAD_BODIES[name]), size))
    assert caught.value.reason is Reason.TLS_BAD_HELLO
    assert caught.value.facts["detail"]


def test_the_least_hello_is_read() -> None:
    """A hello without extensions, as old clients send, and a name of one and of 255 bytes are good."""
    assert read_hello(hello()) == NAMELESS
    for name in (b"a", b"a" * 255):
        found = read_hello(hello(server_name(name)))
        assert found is not None
        assert found.server_name == name.decode()


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (records(b"\x02\x00\x00\x00"), "another handshake message"),
        (records(message(body()) + b"\x01"), "something follows it"),
        (b"\x16\x03\x01\x00\x00", "a record has 0 bytes"),
        (b"\x16\x03\x01\x40\x01", "a record has 16385 bytes"),
        (records(message(body())[:20]) + b"\x17", "another record comes in between"),
        (records(message(body())[:20]) + b"\x15\x03\x01\x00\x02\x01\x00", "another record comes in between"),
        (records(message(body())[:20]) + b"\x16\x03\x01\x00\x00", "a record has 0 bytes"),
        (records(message(body())[:20]) + b"\x16\x04", "of no TLS"),
        (records(b"\x01" + (MAX_HELLO - 3).to_bytes(3, "big")), "longer than 65536 bytes"),
        (records(b"\x01\xff\xff\xff"), "longer than 65536 bytes"),
        (records(message(b"\x03" * 20_000), 1), "records are longer than 81920 bytes"),
    ],
)
def test_bad_records_are_refused(data: bytes, detail: str) -> None:
    """Records that are empty, too long, of another type or too many are refused as soon as they are seen."""
    with pytest.raises(RemoteProtocolError, match=detail) as caught:
        read_hello(data)
    assert caught.value.reason is Reason.TLS_BAD_HELLO
    with pytest.raises(RemoteProtocolError, match=detail):
        fed(data, 1)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x80\x2e\x01\x03\x01", b"\x16\x02", b"\x15\x03\x01", b"S"]
)
def test_what_is_no_tls_is_told_apart(data: bytes) -> None:
    """Bytes that begin no handshake record are no TLS: plain HTTP, SSL 2, an alert."""
    with pytest.raises(RemoteProtocolError) as caught:
        read_hello(data)
    assert caught.value.reason is Reason.TLS_NOT_TLS


def test_the_largest_hello_is_read_and_bounded() -> None:
    """A hello of 64 KiB is read; one byte more is refused before it is there."""
    room = MAX_HELLO - 4 - len(body()) - 2 - 4
    largest = message(body(extension(0xFFFF, bytes(room))))
    assert len(largest) == MAX_HELLO
    assert read_hello(records(largest)) == NAMELESS
    assert len(records(largest, 21)) < MAX_RECORDS < len(records(largest, 19))
    assert read_hello(records(largest, 21)) is not None
    with pytest.raises(RemoteProtocolError):
        read_hello(records(largest, 19))


NOISE = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda tail: b"\x16\x03\x01" + tail),
    st.binary(max_size=200).map(lambda tail: records(message(tail))),
    st.lists(st.tuples(st.sampled_from([0, 16, 35, 41, 42, 43, 23]), st.binary(max_size=12)), max_size=5).map(
        lambda parts: hello(*(extension(kind, value) for kind, value in parts))
    ),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real hello with some bytes changed, in records of some size."""
    data = bytearray(handshake(draw(st.sampled_from(sorted(RECORDED.items())))[1]))
    for at, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        data[at] = value
    return records(bytes(data), draw(st.sampled_from([1, 50, 16384])))


@given(st.one_of(NOISE, damaged()), st.lists(st.integers(0, 3000), max_size=6))
def test_nothing_else_is_raised_and_cuts_do_not_matter(data: bytes, cuts: list[int]) -> None:
    """Whatever comes, the answer is a hello, None or a refusal, and the same for every way of cutting the bytes."""
    whole = outcome(data)
    reader = HelloReader()
    found: ClientHello | tuple[Reason, str] | None = None
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for start, end in itertools.pairwise(edges):
        assert outcome(data[:start]) in (None, whole)
        try:
            found = reader.feed(data[start:end])
        except RemoteProtocolError as error:
            found = error.reason, error.facts.get("detail", "")
        if found is not None:
            break
    assert found == whole
