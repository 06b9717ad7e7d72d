"""Recordings of a network: written as pcap, read from pcap and pcapng, and TCP put together out of their packets.

Everything read is bounded and total over garbage: a damaged file gives what was readable before the damage. The
packets that are written carry the true bytes and times of one connection in made-up TCP segments.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from handfast.errors import InvalidInput, Reason
from handfast.explain.model import Ending, Recording
from handfast.wire.records import Chunk, Side

MAX_CAPTURE = 64 << 20  # bytes of a file
MAX_STREAM = 2 << 20  # bytes that are kept of one direction of a connection
_MOST_STREAMS = 10_000
_MOST_PENDING = 128  # segments that wait for one before them
_SEGMENT = 1400  # bytes of payload of a packet that we write
_FIN, _SYN, _RST, _PSH, _ACK = 1, 2, 4, 8, 16

# LINKTYPE_ values, www.tcpdump.org/linktypes.html.
_NULL, _ETHERNET, _RAW, _LOOP, _SLL, _IPV4, _IPV6, _SLL2 = 0, 1, 101, 108, 113, 228, 229, 276
_DSB_KEYLOG = 0x544C534B  # "TLSK", pcapng 4.7

Endpoint = tuple[str, int]


@dataclass(slots=True)
class Stream:
    """One TCP connection of a capture. `client` opened it, as far as that was seen."""

    client: Endpoint
    server: Endpoint
    began: float  # seconds since 1970
    chunks: list[Chunk] = field(default_factory=list)
    ending: Ending = Ending.QUIET

    @property
    def place(self) -> str:
        """The server's address."""
        host, port = self.server
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def first(self, side: Side) -> bytes:
        """The first bytes of a side."""
        return next((chunk.data for chunk in self.chunks if chunk.sender is side), b"")


@dataclass(frozen=True, slots=True)
class Capture:
    """The connections of a file, in their order, and the key log that a pcapng file may carry."""

    streams: tuple[Stream, ...]
    keylog: bytes = b""


def read_capture(data: bytes, what: str) -> Capture:
    """Return the TCP connections in a pcap or pcapng file. Raises InvalidInput (INPUT_NOT_CAPTURE)."""
    secrets = bytearray()
    if data[:4] == b"\x0a\x0d\x0d\x0a":
        packets = _pcapng(data, secrets)
    elif data[:4] in _MAGICS and len(data) >= 24:
        packets = _pcap(data)
    else:
        raise InvalidInput(Reason.INPUT_NOT_CAPTURE, what=what, detail="it begins with neither's magic number")
    table = _Table()
    for at, link, packet in packets:
        table.take(at, link, packet)
    return Capture(tuple(table.streams), bytes(secrets))


def write_capture(recording: Recording) -> bytes:
    """Return the connection as a pcap file (raw IP): its bytes and times are true, its TCP headers made up."""
    client, server = _addresses(recording.place)
    began = recording.began.timestamp()
    out = [struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, _RAW)]
    sequence = {Side.CLIENT: 1000, Side.SERVER: 2000}

    def put(at: float, sender: Side, flags: int, payload: bytes = b"") -> None:
        source, target = (client, server) if sender is Side.CLIENT else (server, client)
        numbers = (sequence[sender], sequence[sender.other] if flags & _ACK else 0)
        packet = _packet(source, target, numbers, flags, payload)
        seconds = began + at
        out.append(struct.pack("<IIII", int(seconds), int(seconds % 1 * 1e6), len(packet), len(packet)) + packet)
        sequence[sender] += len(payload) + bool(flags & (_SYN | _FIN))

    put(0, Side.CLIENT, _SYN)
    put(0, Side.SERVER, _SYN | _ACK)
    put(0, Side.CLIENT, _ACK)
    last = 0.0
    for chunk in recording.chunks:
        last = chunk.at
        for at in range(0, len(chunk.data), _SEGMENT):
            put(chunk.at, chunk.sender, _PSH | _ACK, chunk.data[at : at + _SEGMENT])
    ender = Side.SERVER if recording.ending in (Ending.CUT, Ending.RESET, Ending.CLOSED) else Side.CLIENT
    if recording.ending is Ending.RESET:
        put(last, ender, _RST | _ACK)
    else:
        put(last, ender, _FIN | _ACK)
        put(last, ender.other, _FIN | _ACK)
        put(last, ender, _ACK)
    return b"".join(out)


# Writing.


def _addresses(place: str) -> tuple[Endpoint, Endpoint]:
    host, _, port = place.rpartition(":")
    number = int(port) if port.isdigit() else 443
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        address = ipaddress.ip_address("192.0.2.2")  # RFC 5737: for documentation
    client = "2001:db8::1" if address.version == 6 else "192.0.2.1"
    return (client, 50_000), (str(address), number)


def _packet(source: Endpoint, target: Endpoint, numbers: tuple[int, int], flags: int, payload: bytes) -> bytes:
    tcp = struct.pack(
        ">HHIIBBHHH", source[1], target[1], *(n & 0xFFFFFFFF for n in numbers), 5 << 4, flags, 65535, 0, 0
    )
    from_ip, to_ip = ipaddress.ip_address(source[0]), ipaddress.ip_address(target[0])
    length = len(tcp) + len(payload)
    pseudo = from_ip.packed + to_ip.packed + struct.pack(">II", length, 6)
    check = _checksum(pseudo + tcp + payload)
    segment = tcp[:16] + struct.pack(">H", check) + tcp[18:] + payload
    if from_ip.version == 6:
        return struct.pack(">IHBB", 6 << 28, length, 6, 64) + from_ip.packed + to_ip.packed + segment
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, 6, 0) + from_ip.packed + to_ip.packed
    return head[:10] + struct.pack(">H", _checksum(head)) + head[12:] + segment


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


# The files.

_MAGICS = {
    b"\xd4\xc3\xb2\xa1": ("<", 1e-6),
    b"\xa1\xb2\xc3\xd4": (">", 1e-6),
    b"\x4d\x3c\xb2\xa1": ("<", 1e-9),
    b"\xa1\xb2\x3c\x4d": (">", 1e-9),
}

Packets = Iterator[tuple[float, int, bytes]]


def _pcap(data: bytes) -> Packets:
    """libpcap's format, draft-ietf-opsawg-pcap."""
    order, unit = _MAGICS[data[:4]]
    link = struct.unpack_from(f"{order}I", data, 20)[0] & 0xFFFF
    head, at = struct.Struct(f"{order}IIII"), 24
    while at + 16 <= len(data):
        seconds, fraction, size, _ = head.unpack_from(data, at)
        at += 16
        if at + size > len(data):
            return
        yield seconds + fraction * unit, link, data[at : at + size]
        at += size


def _pcapng(data: bytes, secrets: bytearray) -> Packets:
    """draft-ietf-opsawg-pcapng: section headers, interfaces, packets, and decryption secrets."""
    order, at = "<", 0
    interfaces: list[tuple[int, float]] = []
    while at + 12 <= len(data):
        kind = struct.unpack_from(f"{order}I", data, at)[0]
        if kind == 0x0A0D0D0A:
            order = "<" if data[at + 8 : at + 12] == b"\x4d\x3c\x2b\x1a" else ">"
            interfaces = []
        size = struct.unpack_from(f"{order}I", data, at + 4)[0]
        if size < 12 or size % 4 or at + size > len(data):
            return
        body = data[at + 8 : at + size - 4]
        at += size
        if kind == 1 and len(body) >= 8 and len(interfaces) < 1000:
            interfaces.append((struct.unpack_from(f"{order}H", body)[0], _unit(body[8:], order)))
        elif kind == 10 and len(body) >= 8 and struct.unpack_from(f"{order}I", body)[0] == _DSB_KEYLOG:
            length = struct.unpack_from(f"{order}I", body, 4)[0]
            secrets += body[8 : 8 + length]
        elif kind == 6 and len(body) >= 20:
            interface, high, low, length, _ = struct.unpack_from(f"{order}IIIII", body)
            if interface < len(interfaces):
                link, unit = interfaces[interface]
                yield (high << 32 | low) * unit, link, body[20 : 20 + length]
        elif kind == 3 and len(body) >= 4 and interfaces:
            yield 0.0, interfaces[0][0], body[4:]


def _unit(options: bytes, order: str) -> float:
    """The unit of an interface's timestamps, from its option if_tsresol; microseconds without."""
    at = 0
    while at + 4 <= len(options):
        code, length = struct.unpack_from(f"{order}HH", options, at)
        if code == 0:
            break
        if code == 9 and length == 1 and at + 4 < len(options):
            value = options[at + 4]
            return 2.0 ** -(value & 0x7F) if value & 0x80 else 10.0**-value
        at += 4 + length + -length % 4
    return 1e-6


# The packets.


def _network(link: int, packet: bytes) -> bytes:
    """The IP packet in a frame; b'' where there is none."""
    match link:
        case 1:
            at, kind = 12, packet[12:14]
            while kind in (b"\x81\x00", b"\x88\xa8"):  # VLAN tags
                at += 4
                kind = packet[at : at + 2]
            return packet[at + 2 :] if kind in (b"\x08\x00", b"\x86\xdd") else b""
        case 0 | 108:
            return packet[4:]
        case 113:
            return packet[16:]
        case 276:
            return packet[20:]
        case 12 | 14 | 101 | 228 | 229:
            return packet
    return b""


def _segment(packet: bytes) -> tuple[Endpoint, Endpoint, bytes] | None:
    """(source, target, TCP segment) of an IP packet; the ports are read from the segment. None if it is no TCP."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        length, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
        fragment = int.from_bytes(packet[6:8], "big") & 0x3FFF
        if packet[9] != 6 or fragment or length < 20:
            return None
        segment = packet[length : total or None]  # 0: the card was to fill it in
        hosts = (str(ipaddress.IPv4Address(packet[12:16])), str(ipaddress.IPv4Address(packet[16:20])))
    elif version == 6 and len(packet) >= 40:
        following, at = packet[6], 40
        while following in (0, 43, 60) and at + 8 <= len(packet):  # RFC 8200 4: headers that may stand between
            following, at = packet[at], at + 8 + packet[at + 1] * 8
        if following != 6:
            return None
        total = int.from_bytes(packet[4:6], "big")
        segment = packet[at : 40 + total if total else None]
        hosts = (str(ipaddress.IPv6Address(packet[8:24])), str(ipaddress.IPv6Address(packet[24:40])))
    else:
        return None
    if len(segment) < 20 or (segment[12] >> 4) * 4 < 20:
        return None
    ports = struct.unpack_from(">HH", segment)
    return (hosts[0], ports[0]), (hosts[1], ports[1]), segment


class _Direction:
    """One direction of a connection, put into order."""

    __slots__ = ("_pending", "next", "size")

    def __init__(self) -> None:
        self.next: int | None = None  # the sequence number that comes next
        self.size = 0
        self._pending: dict[int, bytes] = {}

    def take(self, sequence: int, payload: bytes) -> bytes:
        """Take a segment; return the bytes that are in order now."""
        if self.next is None:
            self.next = sequence  # the recording begins in the middle
        if len(self._pending) < _MOST_PENDING and self.size < MAX_STREAM:
            held = self._pending.get(sequence, b"")
            self._pending[sequence] = max(held, payload, key=len)
        out = b""
        while (found := self._following()) is not None:
            out += found
        self.size += len(out)
        return out

    def _following(self) -> bytes | None:
        assert self.next is not None
        for sequence, payload in self._pending.items():
            behind = (self.next - sequence) & 0xFFFFFFFF
            if behind < 1 << 31:  # it begins here or before
                del self._pending[sequence]
                new = payload[behind:]
                self.next = (self.next + len(new)) & 0xFFFFFFFF
                return new
        return None


class _Table:
    """The connections of a capture as they grow."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self._open: dict[tuple[Endpoint, Endpoint], tuple[Stream, dict[Side, _Direction]]] = {}

    def take(self, at: float, link: int, packet: bytes) -> None:
        found = _segment(_network(link, packet))
        if found is None:
            return
        source, target, segment = found
        sequence, flags = struct.unpack_from(">I", segment, 4)[0], segment[13]
        payload = segment[(segment[12] >> 4) * 4 :]
        entry = self._entry(at, source, target, flags, payload)
        if entry is None:
            return
        stream, directions = entry
        sender = Side.CLIENT if source == stream.client else Side.SERVER
        if flags & _SYN:
            directions[sender].next = (sequence + 1) & 0xFFFFFFFF
        elif payload:
            data = directions[sender].take(sequence, payload)
            if data:
                stream.chunks.append(Chunk(max(at - stream.began, 0.0), sender, data))
        if flags & _RST:
            stream.ending = Ending.RESET
        elif flags & _FIN and stream.ending is Ending.QUIET:
            stream.ending = Ending.CUT

    def _entry(
        self, at: float, source: Endpoint, target: Endpoint, flags: int, payload: bytes
    ) -> tuple[Stream, dict[Side, _Direction]] | None:
        known = self._open.get((source, target)) or self._open.get((target, source))
        begins = bool(flags & _SYN) and not flags & _ACK
        if known is not None and not (begins and known[0].chunks):
            return known
        if len(self.streams) >= _MOST_STREAMS or (not begins and not payload and not flags & _SYN):
            return None
        from_server = bool(flags & _SYN and flags & _ACK) or (payload[:1], payload[5:6]) == (
            b"\x16",
            b"\x02",
        )  # ServerHello
        client, server = (target, source) if from_server else (source, target)
        self._open.pop((server, client), None)
        stream = Stream(client, server, at)
        self.streams.append(stream)
        self._open[client, server] = stream, {side: _Direction() for side in Side}
        return self._open[client, server]


def moment(seconds: float) -> datetime:
    """A packet's time; the epoch where the file has nonsense."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(0, UTC)
