"""The PROXY protocol: who is at the far end of a connection that a proxy hands on.

Owns the bytes of versions 1 and 2 (HAProxy's doc/proxy-protocol.txt), both ways. It never decides from whom a
header is believed: read one only where the configuration says that one comes, and only from trusted peers.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from handfast.errors import Reason, RemoteProtocolError

MAX_V1 = 107  # bytes with the line break: section 2.1
MAX_V2 = 16 + 4096  # bytes; one of every address and text takes under 600, a client certificate most of the rest

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_V1 = re.compile(rb"PROXY (TCP4|TCP6) ([0-9A-Fa-f.:]{2,39}) ([0-9A-Fa-f.:]{2,39}) ([0-9]{1,5}) ([0-9]{1,5})")
_UNIX_PATH = 108  # bytes of an address field of AF_UNIX

# Types of TLVs: section 2.2, and HAProxy's connection-t.h for the client's certificate.
ALPN, AUTHORITY, CRC32C, NOOP, SSL = 0x01, 0x02, 0x03, 0x04, 0x20
SSL_VERSION, SSL_CN, SSL_CIPHER, SSL_CLIENT_CERT = 0x21, 0x22, 0x23, 0x28

_FIRST_CUSTOM = 0xE0

# Version and command; family and protocol, with the bytes of addresses that each has. What has none says nothing.
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6, _UNIX = 0x11, 0x21, 0x31
_DATAGRAM = 0x02
_SIZES = {
    **dict.fromkeys((0x00, 0x01, 0x02, 0x10, 0x20, 0x30), 0),
    _TCP4: 12,
    0x12: 12,
    _TCP6: 36,
    0x22: 36,
    _UNIX: 216,
    0x32: 216,
}

_CLIENT_SSL, _CLIENT_CERT_CONN, _CLIENT_CERT_SESS = 0x01, 0x02, 0x04


class Address(NamedTuple):
    """An IP address in canonical text, and a port."""

    host: str
    port: int


class Endpoints(NamedTuple):
    """The two ends of the connection that the client made: IP addresses both, or UNIX paths both (bytes)."""

    source: Address | bytes
    destination: Address | bytes


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """What was agreed on in the client's handshake. Empty fields are left out of the header.

    `version` and `cipher` are OpenSSL's names, as `TLSv1.3`. `common_name` and `certificate` (the leaf in DER) are
    those of a client certificate that was verified; `verified` says that there was one.
    """

    version: str
    cipher: str = ""
    alpn: bytes = b""
    server_name: str = ""
    verified: bool = False
    common_name: str = ""
    certificate: bytes = b""


@dataclass(frozen=True, slots=True)
class Proxied:
    """What a header says of a connection. `endpoints` is None for the proxy's own (LOCAL) and for unknown ones.

    `tlvs` are the TLVs of version 2 as (type, value) in their order; nothing in them has been judged.
    """

    version: int
    endpoints: Endpoints | None = None
    tlvs: tuple[tuple[int, bytes], ...] = ()


def proxy_v2(endpoints: Endpoints | None, tls: TlsFacts | None = None) -> bytes:
    """Return a header of version 2: a PROXY of a stream, or a LOCAL where `endpoints` is None.

    An IPv4 end beside an IPv6 one is written as IPv4-mapped; a zone (`%eth0`) is left out, for it means nothing on
    another machine (RFC 4007 6). Readers have limits: nginx takes 4,096 bytes, and before 1.23.3 only 107, so a
    certificate is for readers that want it. ValueError for what cannot be written: a host that is no IP address, a UNIX
    path of more than 108 bytes or beside an address, TLVs that do not fit. The connection must then not be made.
    """
    command, (family, addresses) = (_PROXY, _packed(endpoints)) if endpoints is not None else (_LOCAL, (0, b""))
    tlvs = b"" if tls is None else _tls_tlvs(tls)
    length = len(addresses) + len(tlvs)
    if length > 0xFFFF:
        raise ValueError("a PROXY header of more than 65,551 bytes")
    return _SIGNATURE + bytes((command, family)) + length.to_bytes(2, "big") + addresses + tlvs


def read_proxy(data: bytes) -> tuple[Proxied, int] | None:
    """Return what the header at the start of `data` says, and its length; None while more bytes are needed.

    The answer is the same whichever way the bytes are cut. Raises RemoteProtocolError (PROXY_MALFORMED) for all that
    is not exactly a header, also where there is none: more than 107 bytes (v1) or 4,112 bytes (v2), TLVs that
    overrun, a wrong checksum (2.2.3), a datagram.
    """
    if _SIGNATURE.startswith(data[:12]):
        return _read_v2(data)
    if b"PROXY ".startswith(data[:6]):
        return _read_v1(data)
    raise _bad("there is none")


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of the data: RFC 4960 appendix B."""
    table, value = _crc_table(), 0xFFFFFFFF
    for octet in data:
        value = value >> 8 ^ table[(value ^ octet) & 0xFF]
    return value ^ 0xFFFFFFFF


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _packed(endpoints: Endpoints) -> tuple[int, bytes]:
    """The byte of family and protocol, and the address block."""
    match endpoints:
        case (Address() as source, Address() as destination):
            ends = [ipaddress.ip_address(end.host) for end in (source, destination)]
            ports = source.port.to_bytes(2, "big") + destination.port.to_bytes(2, "big")
            if all(end.version == 4 for end in ends):
                return _TCP4, ends[0].packed + ends[1].packed + ports
            return _TCP6, _as_ipv6(ends[0]) + _as_ipv6(ends[1]) + ports
        case (bytes() as source, bytes() as destination):
            for path in endpoints:
                if len(path) > _UNIX_PATH or b"\x00" in path[1:]:
                    raise ValueError(f"a UNIX path with a NUL, or of more than {_UNIX_PATH} bytes")
            return _UNIX, source.ljust(_UNIX_PATH, b"\x00") + destination.ljust(_UNIX_PATH, b"\x00")
        case _:
            raise ValueError("an IP address beside a UNIX path")


def _as_ipv6(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    if isinstance(address, ipaddress.IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed  # RFC 4291 2.5.5.2
    return address.packed


def _tls_tlvs(tls: TlsFacts) -> bytes:
    client = _CLIENT_SSL | (_CLIENT_CERT_CONN | _CLIENT_CERT_SESS if tls.verified else 0)
    inner = [(SSL_VERSION, tls.version.encode("ascii")), (SSL_CIPHER, tls.cipher.encode("ascii"))]
    if tls.verified:
        inner += [(SSL_CN, tls.common_name.encode("utf-8")), (SSL_CLIENT_CERT, tls.certificate)]
    verify = 0 if tls.verified else 1  # 2.2.6: zero only if a certificate was presented and verified
    ssl = bytes((client,)) + verify.to_bytes(4, "big") + _tlvs(inner)
    return _tlvs([(ALPN, tls.alpn), (AUTHORITY, tls.server_name.encode("utf-8")), (SSL, ssl)])


def _tlvs(values: list[tuple[int, bytes]]) -> bytes:
    return b"".join(_tlv(kind, value) for kind, value in values if value)


def _tlv(kind: int, value: bytes) -> bytes:
    if len(value) > 0xFFFF:
        raise ValueError("a TLV of more than 65,535 bytes")
    return bytes((kind,)) + len(value).to_bytes(2, "big") + value


def _read_v1(data: bytes) -> tuple[Proxied, int] | None:
    line, found, _ = data[:MAX_V1].partition(b"\r\n")
    if b"\n" in line or b"\r" in (line if found else line[:-1]):
        raise _bad("its line does not end in CR LF")
    if not found:
        if len(data) >= MAX_V1:
            raise _bad(f"its line is longer than {MAX_V1} bytes")
        return None
    used = len(line) + 2
    if line == b"PROXY UNKNOWN" or line.startswith(b"PROXY UNKNOWN "):  # 2.1: the rest is not looked at
        return Proxied(1), used
    parts = _V1.fullmatch(line)
    if parts is None:
        raise _bad("its line is malformed")
    version = 4 if parts[1] == b"TCP4" else 6
    return Proxied(1, Endpoints(*(_v1_address(version, parts[at], parts[at + 2]) for at in (2, 3)))), used


def _v1_address(version: int, host: bytes, port: bytes) -> Address:
    try:
        address = ipaddress.ip_address(host.decode("ascii"))
    except ValueError:
        raise _bad("an address is malformed") from None
    if address.version != version or int(port) > 0xFFFF or (port != b"0" and port.startswith(b"0")):
        raise _bad("an address or port is malformed")
    return _address(address, int(port))


def _address(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> Address:
    """IPv4 in IPv6 is IPv4, so that one host has one spelling."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return Address(str(mapped or address), port)


def _early_v2(data: bytes) -> None:
    """Refuse what is wrong by as much of the first 16 bytes as is there."""
    if len(data) > 12 and data[12] not in (_LOCAL, _PROXY):
        raise _bad("it is of another version or command")
    if len(data) > 13 and data[12] == _PROXY:
        if data[13] not in _SIZES:
            raise _bad("its address family or protocol is not known")
        if data[13] & 0x0F == _DATAGRAM:
            raise _bad("it is of a datagram")


def _read_v2(data: bytes) -> tuple[Proxied, int] | None:
    _early_v2(data)
    if len(data) < 16:
        return None
    used = 16 + int.from_bytes(data[14:16], "big")
    if used > MAX_V2:
        raise _bad(f"it is longer than {MAX_V2} bytes")
    # 2.2: what a LOCAL holds is skipped, whatever it is; so are addresses of a kind that is not told.
    size = _SIZES[data[13]] if data[12] == _PROXY else 0
    if 16 + size > used:
        raise _bad("its addresses are cut off")
    if len(data) < used:
        return None
    if not size:
        return Proxied(2), used
    tlvs = _read_tlvs(data[:used], 16 + size)
    return Proxied(2, _unpacked(data[13], data[16 : 16 + size]), tlvs), used


def _unpacked(family: int, block: bytes) -> Endpoints:
    if family == _UNIX:
        return Endpoints(_unix_path(block[:_UNIX_PATH]), _unix_path(block[_UNIX_PATH:]))
    size = 4 if family == _TCP4 else 16
    ends = (
        _address(
            ipaddress.ip_address(block[at * size : (at + 1) * size]),
            int.from_bytes(block[2 * size + 2 * at :][:2], "big"),
        )
        for at in (0, 1)
    )
    return Endpoints(*ends)


def _unix_path(field: bytes) -> bytes:
    """A path ends at its NUL; an abstract name (unix(7)) begins with one."""
    return field.rstrip(b"\x00") if field.startswith(b"\x00") else field.partition(b"\x00")[0]


def _read_tlvs(header: bytes, at: int) -> tuple[tuple[int, bytes], ...]:
    """The TLVs from `at` to the header's end. What the protocol knows is there once, but for padding."""
    found: list[tuple[int, bytes]] = []
    seen: set[int] = set()
    while at < len(header):
        start = at + 3
        at = start + int.from_bytes(header[at + 1 : start], "big")
        if start > len(header) or at > len(header):
            raise _bad("a TLV is cut off")
        kind, value = header[start - 3], header[start:at]
        if kind in seen:
            raise _bad(f"a TLV of type {kind} is there twice")
        if kind != NOOP and kind < _FIRST_CUSTOM:
            seen.add(kind)
        if kind == CRC32C and value != crc32c(header[:start] + bytes(4) + header[at:]).to_bytes(4, "big"):
            raise _bad("its checksum is wrong")
        found.append((kind, value))
    return tuple(found)


def _bad(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reason.PROXY_MALFORMED, detail=detail)
