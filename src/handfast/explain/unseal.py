"""A recorded stream read as TLS: records, messages, and what a key log opens.

Decrypts TLS 1.3 (RFC 8446 5.2, 7.3) and TLS 1.2's AEAD suites (RFC 5288, RFC 7905) with the secrets of an NSS key
log. What does not open is shown as encrypted; nothing here raises for what was recorded.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from handfast.explain.capture import Stream, moment
from handfast.explain.model import Recording
from handfast.wire import messages as m
from handfast.wire import registry
from handfast.wire.records import ContentType, Event, MessageJoiner, Record, RecordReader, Side

_LINE = re.compile(rb"^([A-Z0-9_]{1,40}) ([0-9a-fA-F]{64}) ([0-9a-fA-F]{64,128})\s*$", re.M)
_MOST_SECRETS = 100_000
_MOST_EVENTS = 2000
_MOST_ANSWER = 1 << 16
_CHACHA_SUITES = frozenset({0x1303, 0xCCA8, 0xCCA9, 0xCCAA})

Secrets = Mapping[tuple[bytes, bytes], bytes]


def parse_keylog(data: bytes) -> Secrets:
    """Return (label, client random) -> secret of an NSS key log file; lines of another form are passed over."""
    found: dict[tuple[bytes, bytes], bytes] = {}
    for line in _LINE.finditer(data):
        if len(found) >= _MOST_SECRETS:
            break
        if len(line[3]) % 2 == 0:
            found[line[1], bytes.fromhex(line[2].decode())] = bytes.fromhex(line[3].decode())
    return found


def is_tls(stream: Stream) -> bool:
    """Whether either side's first bytes are a TLS handshake record or an alert."""
    return any(stream.first(side)[:2] in (b"\x16\x03", b"\x15\x03") for side in Side)


def read_stream(stream: Stream, secrets: Secrets) -> Recording:
    """Return a TCP connection as a recording of TLS."""
    book = _Book(secrets)
    for chunk in stream.chunks:
        for record in book.sides[chunk.sender].reader.feed(chunk.data):
            book.take(chunk.at, chunk.sender, record)
    return Recording(
        place=stream.place,
        began=moment(stream.began),
        seen_from=None,
        events=tuple(book.events),
        chunks=tuple(stream.chunks),
        ending=stream.ending,
        done=book.done,
        said=bytes(book.said[Side.CLIENT]),
        answer=bytes(book.said[Side.SERVER]),
    )


@dataclass(slots=True)
class _Direction:
    """What is known of one direction."""

    reader: RecordReader = field(default_factory=RecordReader)
    joiner: MessageJoiner = field(default_factory=MessageJoiner)
    ciphered: bool = False  # it has changed to encryption
    finished: bool = False
    opener: _Opener | None = None
    secret: bytes = b""


class _Book:
    """The connection as it is read."""

    def __init__(self, secrets: Secrets) -> None:
        self.events: list[Event] = []
        self.said = {side: bytearray() for side in Side}  # application data, opened
        self.done: float | None = None  # when both sides had finished
        self.sides = {side: _Direction() for side in Side}
        self._secrets = secrets
        self._randoms = dict.fromkeys(Side, b"")
        self._version = self._suite = 0

    def take(self, at: float, sender: Side, record: Record) -> None:
        """Read a record in its turn."""
        if len(self.events) >= _MOST_EVENTS:
            return
        side = self.sides[sender]
        sealed = record.kind == ContentType.APPLICATION_DATA or (
            side.ciphered and self._version < m.TLS_1_3 and record.kind != ContentType.CHANGE_CIPHER_SPEC
        )
        kind, payload = record.kind, record.payload
        if sealed:
            opened = None if side.opener is None else side.opener.open(record)
            if opened is None:
                self.events.append(Event(at, sender, kind, b"", True, len(payload)))
                if kind == ContentType.HANDSHAKE:  # TLS 1.2, where nothing but Finished comes here
                    self._finish(at, side)
                return
            kind, payload = opened
        self._plain(at, sender, Event(at, sender, kind, payload, sealed, len(record.payload)))

    def _plain(self, at: float, sender: Side, event: Event) -> None:
        side = self.sides[sender]
        match event.kind:
            case ContentType.HANDSHAKE:
                for data in side.joiner.feed(event.data):
                    self.events.append(Event(at, sender, event.kind, data, event.encrypted, len(data)))
                    self._follow(at, sender, data)
            case ContentType.APPLICATION_DATA:
                if len(self.said[sender]) < _MOST_ANSWER:
                    self.said[sender] += event.data
                self.events.append(Event(at, sender, event.kind, b"", True, event.size))
            case _:
                self.events.append(replace(event, size=len(event.data)))
        if event.kind == ContentType.CHANGE_CIPHER_SPEC and self._version < m.TLS_1_3:
            side.ciphered = True
            side.opener = self._opener_12(sender)

    def _finish(self, at: float, side: _Direction) -> None:
        side.finished = True
        if self.done is None and all(one.finished for one in self.sides.values()):
            self.done = at

    def _follow(self, at: float, sender: Side, data: bytes) -> None:
        """What a message changes for those after it."""
        message, side = m.read_message(data, self._version or m.TLS_1_2, self._suite), self.sides[sender]
        match message:
            case m.ClientHello(random=random):
                self._randoms[Side.CLIENT] = random
            case m.ServerHello(random=random) if not message.retry:
                self._randoms[Side.SERVER] = random
                self._version, self._suite = message.version, message.suite
                if self._version >= m.TLS_1_3:
                    for one in Side:
                        self._take_secret(one, b"HANDSHAKE_TRAFFIC_SECRET")
            case m.Finished():
                self._finish(at, side)
                if self._version >= m.TLS_1_3:
                    self._take_secret(sender, b"TRAFFIC_SECRET_0")
            case m.KeyUpdate() if side.secret:
                side.secret = _expand_label(side.secret, b"traffic upd", len(side.secret), _hash_of(self._suite))
                side.opener = _opener_13(side.secret, self._suite)

    def _take_secret(self, sender: Side, kind: bytes) -> None:
        label = sender.value.upper().encode() + b"_" + kind
        side = self.sides[sender]
        side.secret = self._secrets.get((label, self._randoms[Side.CLIENT]), b"")
        side.opener = _opener_13(side.secret, self._suite) if side.secret else None

    def _opener_12(self, sender: Side) -> _Opener | None:
        master = self._secrets.get((b"CLIENT_RANDOM", self._randoms[Side.CLIENT]))
        name = registry.SUITES.get(self._suite, "")
        chacha = self._suite in _CHACHA_SUITES
        if master is None or not (chacha or "_GCM_" in name):
            return None
        key_size, iv_size = 32 if chacha or "_256_" in name else 16, 12 if chacha else 4
        seed = b"key expansion" + self._randoms[Side.SERVER] + self._randoms[Side.CLIENT]
        block = _prf(master, seed, 2 * (key_size + iv_size), "sha384" if name.endswith("SHA384") else "sha256")
        at = 0 if sender is Side.CLIENT else 1
        key = block[at * key_size : (at + 1) * key_size]
        iv = block[2 * key_size + at * iv_size : 2 * key_size + (at + 1) * iv_size]
        return _Opener(ChaCha20Poly1305(key) if chacha else AESGCM(key), iv, new=False)


class _Opener:
    """Opens the records of one direction, one behind the other."""

    __slots__ = ("_aead", "_count", "_iv", "_new")

    def __init__(self, aead: AESGCM | ChaCha20Poly1305, iv: bytes, *, new: bool) -> None:
        self._aead = aead
        self._iv = iv
        self._new = new
        self._count = 0

    def open(self, record: Record) -> tuple[int, bytes] | None:
        """(content type, plain bytes) of a record; None where it does not open."""
        count = self._count.to_bytes(8, "big")
        try:
            plain = self._open_13(record) if self._new else self._open_12(record, count)
        except (InvalidTag, ValueError):
            return None
        self._count += 1
        if not self._new:
            return record.kind, plain
        plain = plain.rstrip(b"\0")  # RFC 8446 5.4: padding, behind the true content type
        return (plain[-1], plain[:-1]) if plain else None

    def _open_13(self, record: Record) -> bytes:
        return self._aead.decrypt(self._nonce(), record.payload, record.header)

    def _open_12(self, record: Record, count: bytes) -> bytes:
        explicit = 8 if len(self._iv) == 4 else 0
        nonce = self._iv + record.payload[:8] if explicit else self._nonce()
        sealed = record.payload[explicit:]
        size = max(len(sealed) - 16, 0).to_bytes(2, "big")
        about = count + bytes((record.kind,)) + record.version.to_bytes(2, "big") + size
        return self._aead.decrypt(nonce, sealed, about)

    def _nonce(self) -> bytes:
        return bytes(a ^ b for a, b in zip(self._iv, self._count.to_bytes(12, "big"), strict=True))


def _opener_13(secret: bytes, suite: int) -> _Opener | None:
    algorithm = _hash_of(suite)
    if suite not in (0x1301, 0x1302, 0x1303) or len(secret) != algorithm.digest_size:
        return None
    key = _expand_label(secret, b"key", 16 if suite == 0x1301 else 32, algorithm)
    iv = _expand_label(secret, b"iv", 12, algorithm)
    return _Opener(ChaCha20Poly1305(key) if suite in _CHACHA_SUITES else AESGCM(key), iv, new=True)


def _hash_of(suite: int) -> hashes.HashAlgorithm:
    return hashes.SHA384() if suite == 0x1302 else hashes.SHA256()


def _expand_label(secret: bytes, label: bytes, size: int, algorithm: hashes.HashAlgorithm) -> bytes:
    """RFC 8446 7.1."""
    info = size.to_bytes(2, "big") + bytes((6 + len(label),)) + b"tls13 " + label + b"\0"
    return HKDFExpand(algorithm, size, info).derive(secret)


def _prf(secret: bytes, seed: bytes, size: int, algorithm: str) -> bytes:
    """RFC 5246 5."""

    def blocks() -> Iterator[bytes]:
        a = seed
        for _ in range(size // 32 + 1):
            a = hmac.digest(secret, a, algorithm)
            yield hmac.digest(secret, a + seed, algorithm)

    return b"".join(blocks())[:size]
