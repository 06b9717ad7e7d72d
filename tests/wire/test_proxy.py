"""The PROXY protocol: what is written can be read, and what is no header is refused."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire.proxy import (
    ALPN,
    AUTHORITY,
    CRC32C,
    MAX_V1,
    MAX_V2,
    NOOP,
    SSL,
    Address,
    Endpoints,
    Proxied,
    TlsFacts,
    crc32c,
    proxy_v2,
    read_proxy,
)
from tests.support.proxies import summed

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
V4 = Endpoints(Address("192.0.2.1", 56324), Address("198.51.100.7", 443))
V6 = Endpoints(Address("2001:db8::1", 1), Address("2001:db8::2", 65535))
UNIX = Endpoints(b"/run/client.sock", b"\x00abstract")
TLS = TlsFacts("TLSv1.3", "TLS_AES_256_GCM_SHA384", b"h2", "web.example.com")
SHOWN = TlsFacts(
    "TLSv1.2", "ECDHE-RSA-AES128-GCM-SHA256", verified=True, common_name="Ünal", certificate=b"\x30\x03DER"
)


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


def v2(block: bytes, command: int = 0x21, family: int = 0x11) -> bytes:
    return SIGNATURE + bytes([command, family]) + len(block).to_bytes(2, "big") + block


BLOCK = bytes([192, 0, 2, 1, 198, 51, 100, 7]) + (56324).to_bytes(2, "big") + (443).to_bytes(2, "big")


def read(data: bytes) -> Proxied:
    """The header that `data` is, whole."""
    answer = read_proxy(data)
    assert answer is not None
    assert answer[1] == len(data)
    return answer[0]


def test_a_header_is_written_as_specified() -> None:
    """IPv4, without TLS: the bytes of section 2.2."""
    assert proxy_v2(V4) == v2(BLOCK)
    assert proxy_v2(None) == v2(b"", 0x20, 0)


def test_what_tls_agreed_on_is_written_as_specified() -> None:
    """ALPN, the server name, and SSL with its own TLVs; `verify` is zero only where a certificate was verified."""
    ssl = b"\x01\x00\x00\x00\x01" + tlv(0x21, b"TLSv1.3") + tlv(0x23, b"TLS_AES_256_GCM_SHA384")
    assert proxy_v2(V4, TLS) == v2(BLOCK + tlv(0x01, b"h2") + tlv(0x02, b"web.example.com") + tlv(0x20, ssl))
    ssl = b"\x07\x00\x00\x00\x00" + tlv(0x21, b"TLSv1.2") + tlv(0x23, b"ECDHE-RSA-AES128-GCM-SHA256")
    ssl += tlv(0x22, "Ünal".encode()) + tlv(0x28, b"\x30\x03DER")
    assert proxy_v2(V4, SHOWN) == v2(BLOCK + tlv(0x20, ssl))


def test_no_certificate_is_told_of_a_client_that_showed_none() -> None:
    """A common name and certificate without a verification stay out of the header."""
    facts = TlsFacts("TLSv1.3", verified=False, common_name="admin", certificate=b"DER")
    assert b"admin" not in proxy_v2(V4, facts)
    assert b"DER" not in proxy_v2(V4, facts)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (proxy_v2(V4), Proxied(2, V4)),
        (proxy_v2(V6), Proxied(2, V6)),
        (proxy_v2(UNIX), Proxied(2, UNIX)),
        (summed(proxy_v2(None, TLS)), Proxied(2)),
        (v2(b"anything at all", 0x20, 0x99), Proxied(2)),  # LOCAL: the block is skipped
        (v2(b"\x01\x00\xff", 0x21, 0x00), Proxied(2)),  # AF_UNSPEC
        (v2(BLOCK, 0x21, 0x10), Proxied(2)),
        (v2(BLOCK + tlv(NOOP, b"") * 2 + tlv(0xEA, b"vpc")), Proxied(2, V4, ((4, b""), (4, b""), (0xEA, b"vpc")))),
        (v2(b"/a\x00rest".ljust(108, b"x") + bytes(108), family=0x31), Proxied(2, Endpoints(b"/a", b""))),
        (v2(bytes(10) + b"\xff\xff\x7f\x00\x00\x01" + bytes(15) + b"\x01" + b"\x00\x01\x00\x02", family=0x21),
         Proxied(2, Endpoints(Address("127.0.0.1", 1), Address("::1", 2)))),
        (b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n", Proxied(1, V4)),
        (b"PROXY TCP6 2001:DB8::1 2001:db8:0:0:0:0:0:2 1 65535\r\n", Proxied(1, V6)),
        (b"PROXY TCP6 ::ffff:127.0.0.1 ::1 1 2\r\n", Proxied(1, Endpoints(Address("127.0.0.1", 1), Address("::1", 2)))),
        (b"PROXY UNKNOWN\r\n", Proxied(1)),
        (b"PROXY UNKNOWN ffff::1 what ever 5\r\n", Proxied(1)),
        (b"PROXY UNKNOWN " + b"x" * (MAX_V1 - 16) + b"\r\n", Proxied(1)),
    ],
)  # fmt: skip
def test_a_header_is_read(data: bytes, expected: Proxied) -> None:
    """Each kind of header says what it should, alone, with bytes behind it, and not before it is all there."""
    assert read(data) == expected
    assert read_proxy(data + b"GET / HTTP/1.1\r\n") == (expected, len(data))
    assert {read_proxy(data[:end]) for end in range(len(data))} == {None}


# Sent by HAProxy 2.6.12, `send-proxy-v2 proxy-v2-options ssl,cert-cn,ssl-cipher,authority,crc32c`, for a client with a
# certificate and for one without.
HAPROXY = [
    bytes.fromhex(
        "0d0a0d0a000d0a515549540a2111005d7f0000017f000001a7466232030004ebb5edef010002683202000f7765622e6578616d706c652e"
        "636f6d2000300700000000210007544c5376312e33220005c39c6e616c230016544c535f4145535f3235365f47434d5f534841333834"
    ),
    bytes.fromhex(
        "0d0a0d0a000d0a515549540a211100507f0000017f000001a7546232030004e0107be502000f7765622e6578616d706c652e636f6d2000"
        "280100000000210007544c5376312e33230016544c535f4145535f3235365f47434d5f534841333834"
    ),
]


def test_what_haproxy_sends_is_read() -> None:
    """HAProxy's headers are read, their checksums hold, and with a certificate its TLS is told in our own words."""
    shown, anonymous = (read(data) for data in HAPROXY)
    assert shown.endpoints == Endpoints(Address("127.0.0.1", 42822), Address("127.0.0.1", 25138))
    tls = TlsFacts("TLSv1.3", "TLS_AES_256_GCM_SHA384", b"h2", "web.example.com", verified=True, common_name="Ünal")
    theirs, ours = dict(shown.tlvs), dict(read(proxy_v2(V4, tls)).tlvs)
    assert (theirs[ALPN], theirs[AUTHORITY]) == (ours[ALPN], ours[AUTHORITY])
    assert theirs[SSL][:5] == ours[SSL][:5]
    assert sorted(inner(theirs[SSL][5:])) == sorted(inner(ours[SSL][5:]))
    assert dict(anonymous.tlvs)[SSL][0] == dict(read(proxy_v2(V4, TLS)).tlvs)[SSL][0] == 1


def inner(tlvs: bytes) -> list[tuple[int, bytes]]:
    """The TLVs inside the TLV of SSL."""
    return list(read(v2(BLOCK + tlvs)).tlvs)


REFUSED = {
    "HTTP": (b"GET / HTTP/1.1\r\n", "there is none"),
    "TLS": (b"\x16\x03\x01", "there is none"),
    "another signature": (SIGNATURE[:11] + b"\x00", "there is none"),
    "a lower-case word": (b"proxy TCP4", "there is none"),
    "a blank too few": (b"PROXYTCP4 ", "there is none"),
    "version 1 in binary": (SIGNATURE + b"\x11", "another version or command"),
    "an unknown command": (SIGNATURE + b"\x22", "another version or command"),
    "an unknown family": (SIGNATURE + b"\x21\x41", "family or protocol"),
    "an unknown protocol": (SIGNATURE + b"\x21\x13", "family or protocol"),
    "a datagram": (v2(BLOCK, family=0x12), "a datagram"),
    "a cut address": (v2(BLOCK[:-1]), "addresses are cut off"),
    "a cut IPv6 address": (v2(bytes(35), family=0x21), "addresses are cut off"),
    "a cut UNIX path": (v2(bytes(215), family=0x31), "addresses are cut off"),
    "a length over the limit": (SIGNATURE + b"\x21\x11" + (MAX_V2 - 15).to_bytes(2, "big"), "longer than 4112 bytes"),
    "the largest length": (SIGNATURE + b"\x20\x00\xff\xff", "longer than 4112 bytes"),
    "a TLV without a length": (v2(BLOCK + b"\x04"), "a TLV is cut off"),
    "a TLV with half a length": (v2(BLOCK + b"\x04\x00"), "a TLV is cut off"),
    "a TLV that overruns": (v2(BLOCK + b"\x04\x00\x02x"), "a TLV is cut off"),
    "a TLV that overruns far": (v2(BLOCK + b"\x04\xff\xffx"), "a TLV is cut off"),
    "two server names": (v2(BLOCK + tlv(AUTHORITY, b"a") + tlv(AUTHORITY, b"b")), "there twice"),
    "two checksums": (v2(BLOCK + tlv(CRC32C, bytes(4)) * 2), "checksum is wrong"),
    "a checksum of 3 bytes": (v2(BLOCK + tlv(CRC32C, bytes(3))), "checksum is wrong"),
    "an empty checksum": (v2(BLOCK + tlv(CRC32C, b"")), "checksum is wrong"),
    "a wrong checksum": (v2(BLOCK + tlv(CRC32C, b"\x01\x02\x03\x04")), "checksum is wrong"),
    "a line without an end": (b"PROXY UNKNOWN " + b"x" * (MAX_V1 - 14), "longer than 107 bytes"),
    "a line of 108 bytes": (b"PROXY UNKNOWN " + b"x" * (MAX_V1 - 15) + b"\r\n", "longer than 107 bytes"),
    "a bare LF": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n", "CR LF"),
    "a bare CR": (b"PROXY UNKNOWN \rx", "CR LF"),
    "an LF in what is not looked at": (b"PROXY UNKNOWN a\nb\r\n", "CR LF"),
    "an unknown word": (b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n", "its line is malformed"),
    "a word that begins as UNKNOWN": (b"PROXY UNKNOWNS\r\n", "its line is malformed"),
    "a port too few": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n", "its line is malformed"),
    "two blanks": (b"PROXY TCP4  1.2.3.4 1.2.3.4 1 2\r\n", "its line is malformed"),
    "a blank at the end": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 \r\n", "its line is malformed"),
    "a host name": (b"PROXY TCP4 web.example 1.2.3.4 1 2\r\n", "its line is malformed"),
    "a zone": (b"PROXY TCP6 fe80::1%lo ::1 1 2\r\n", "its line is malformed"),
    "a bad address": (b"PROXY TCP4 1.2.3.256 1.2.3.4 1 2\r\n", "an address is malformed"),
    "octal": (b"PROXY TCP4 01.2.3.4 1.2.3.4 1 2\r\n", "an address is malformed"),
    "IPv6 as TCP4": (b"PROXY TCP4 ::1 1.2.3.4 1 2\r\n", "address or port"),
    "IPv4 as TCP6": (b"PROXY TCP6 ::1 1.2.3.4 1 2\r\n", "address or port"),
    "a large port": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n", "address or port"),
    "a port with a zero in front": (b"PROXY TCP4 1.2.3.4 1.2.3.4 01 2\r\n", "address or port"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_header_is_refused(name: str) -> None:
    """Anything that is not exactly a header is refused, and says where it broke."""
    data, detail = REFUSED[name]
    with pytest.raises(RemoteProtocolError, match=detail) as caught:
        read_proxy(data)
    assert caught.value.reason is Reason.PROXY_MALFORMED


@pytest.mark.parametrize(
    ("data", "value"),
    [
        # RFC 3720 B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
    ],
)
def test_the_checksum_is_the_known_one(data: bytes, value: int) -> None:
    """CRC-32C gives the values that the standards print."""
    assert crc32c(data) == value


def test_a_checksum_is_held_over_every_byte() -> None:
    """A header with a checksum reads; with any bit of it changed it does not."""
    good = summed(proxy_v2(V4, SHOWN))
    assert read(good).endpoints == V4
    held = [*range(16, len(good) - 7), *range(len(good) - 4, len(good))]  # all but the checksum's own type and length
    damaged = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in held]
    assert all(str(outcome(data)).startswith("proxy.malformed") for data in damaged)


@pytest.mark.parametrize(
    "endpoints",
    [
        Endpoints(b"/" + b"x" * 108, b""),
        Endpoints(b"/a\x00b", b""),
        Endpoints(b"/a", Address("127.0.0.1", 1)),
        Endpoints(Address("localhost", 1), Address("127.0.0.1", 1)),
        Endpoints(Address("fe80::1%", 1), Address("fe80::2", 1)),
    ],
)
def test_what_cannot_be_written_is_not_written(endpoints: Endpoints) -> None:
    """Ends that the header has no room for are an error, never a header that says something else."""
    with pytest.raises(ValueError):
        proxy_v2(endpoints)


def test_a_zone_is_left_out() -> None:
    """A client on a link is told without the name that the link has here; and that is all that is left out."""
    linked = Endpoints(Address("fe80::1%eth0", 7), Address("fe80::2%eth0", 443))
    assert read(proxy_v2(linked)).endpoints == Endpoints(Address("fe80::1", 7), Address("fe80::2", 443))
    assert proxy_v2(linked) != proxy_v2(Endpoints(Address("fe80::3", 7), Address("fe80::2", 443)))


@pytest.mark.parametrize("size", [65_532, 65_536, 100_000])
def test_a_certificate_that_does_not_fit_is_an_error(size: int) -> None:
    """Lengths that two bytes cannot say are an error."""
    with pytest.raises(ValueError):
        proxy_v2(V4, TlsFacts("TLSv1.3", verified=True, certificate=bytes(size)))


ADDRESS = st.builds(Address, st.ip_addresses().map(str), st.integers(0, 65535))
PATH = st.binary(min_size=1, max_size=107).map(lambda path: b"/" + path.replace(b"\x00", b"0"))
TEXT = st.text("abcXYZ019-._", max_size=20)
FACTS = st.builds(
    TlsFacts,
    version=st.sampled_from(["TLSv1.2", "TLSv1.3"]),
    cipher=TEXT,
    alpn=st.binary(max_size=10),
    server_name=TEXT,
    verified=st.booleans(),
    common_name=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    certificate=st.binary(max_size=1500),
)


def plain(end: Address | bytes) -> Address | bytes:
    """An end with IPv4 in IPv6 as IPv4."""
    if isinstance(end, bytes):
        return end
    host = ipaddress.ip_address(end.host)
    mapped = host.ipv4_mapped if isinstance(host, ipaddress.IPv6Address) else None
    return Address(str(mapped or host), end.port)


@given(
    st.none() | st.builds(Endpoints, ADDRESS, ADDRESS) | st.builds(Endpoints, PATH, PATH),
    st.none() | FACTS,
    st.booleans(),
)
def test_what_is_written_can_be_read(endpoints: Endpoints | None, tls: TlsFacts | None, checksum: bool) -> None:
    """A header reads back as its ends and the TLVs of its TLS, with a checksum and without."""
    header = proxy_v2(endpoints, tls)
    found = read(summed(header) if checksum else header)
    if endpoints is None:
        assert found == Proxied(2)
        return
    assert found.endpoints == Endpoints(plain(endpoints.source), plain(endpoints.destination))
    told = dict(found.tlvs)
    assert (CRC32C in told) is checksum
    assert (SSL in told) is (tls is not None)
    if tls is not None:
        assert told.get(ALPN, b"") == tls.alpn
        assert told.get(AUTHORITY, b"").decode() == tls.server_name
        assert (told[SSL][1:5] == bytes(4)) is tls.verified


def outcome(data: bytes) -> tuple[Proxied, int] | str | None:
    try:
        return read_proxy(data)
    except RemoteProtocolError as error:
        return f"{error.reason.code}: {error}"


NOISE = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=300).map(lambda tail: SIGNATURE + tail),
    st.tuples(st.binary(max_size=300), st.sampled_from([0x20, 0x21]), st.sampled_from([0, 0x11, 0x21, 0x31])).map(
        lambda parts: v2(*parts)
    ),
    st.text("0123456789.: TCP46UNKOW\r\n", max_size=110).map(lambda tail: b"PROXY " + tail.encode()),
    st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=9)), max_size=5).map(
        lambda parts: v2(BLOCK + b"".join(tlv(kind, value) for kind, value in parts))
    ),
)


@given(NOISE)
def test_nothing_else_is_raised_and_cuts_do_not_matter(data: bytes) -> None:
    """Whatever comes, the answer is a header, None or a refusal, and no beginning of it has another answer."""
    whole = outcome(data)
    assert not isinstance(whole, str) or whole.startswith("proxy.malformed: ")
    for end in range(len(data)):
        assert outcome(data[:end]) in (None, whole)
