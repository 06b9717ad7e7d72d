"""Handshakes that are watched: the engine's decrypted messages, and its key log, as values.

OpenSSL tells a callback of every message it sends or takes, in the clear (SSL_CTX_set_msg_callback). pyOpenSSL
offers no such call, so its raw binding is used; tests/tls/test_transcript.py holds that. Secrets stay in `keylog`,
which nothing prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from OpenSSL import SSL

from handfast.tls.channel import Channel
from handfast.tls.client import ClientHandshake
from handfast.tls.credential import Credential
from handfast.tls.engine import ffi, lib
from handfast.tls.server import Accepted, Refused, ServerContext
from handfast.wire.records import MAX_HANDSHAKE, ContentType, Event, Side

MAX_EVENTS = 2000  # of one connection that are kept

_HEADER, _INNER_TYPE = 256, 257  # SSL3_RT_HEADER, SSL3_RT_INNER_CONTENT_TYPE
_ON_MESSAGE = "void (*)(int, int, int, const void *, size_t, SSL *, void *)"
_ON_KEYLOG = "void (*)(const SSL *, const char *)"
_MOST_SECRETS = 64  # a handshake has five, and each change of keys two
_MESSAGES = (ContentType.ALERT, ContentType.HANDSHAKE)

Clock = Callable[[], float]


class Recorder:
    """Notes what one connection says, as the engine on `side` sees it. `clock`: seconds from its beginning.

    `full`: the connection said more than is kept (MAX_HANDSHAKE, MAX_EVENTS); what came later is not noted.
    """

    def __init__(self, side: Side, clock: Clock) -> None:
        self.events: list[Event] = []
        self.keylog: list[bytes] = []  # lines in NSS's key log format, which open the recording
        self.full = False
        self._side = side
        self._clock = clock
        self._size = 0
        self._version = SSL.TLS1_2_VERSION  # of the last handshake message
        self._header = dict.fromkeys(Side, b"")  # of the record that is under way
        self._ciphered: set[Side] = set()  # who has changed to the new keys, before TLS 1.3
        # They live as long as the context may call them.
        self._on_message_callback = ffi.callback(_ON_MESSAGE, self._on_message)
        self._on_secret_callback = ffi.callback(_ON_KEYLOG, self._on_secret)

    def watch(self, context: SSL.Context) -> None:
        """Note what the next connection of `context` says. Each context serves one watched connection."""
        # Not through pyOpenSSL's `set_keylog_callback`, which takes no context that was proved before.
        lib.SSL_CTX_set_msg_callback(context._context, self._on_message_callback)
        lib.SSL_CTX_set_keylog_callback(context._context, self._on_secret_callback)

    def _on_secret(self, _ssl: Any, line: Any) -> None:
        if len(self.keylog) < _MOST_SECRETS:
            self.keylog.append(bytes(ffi.string(line, 1000)))

    def _on_message(self, sent: int, version: int, kind: int, data: Any, size: int, _ssl: Any, _argument: Any) -> None:
        """OpenSSL sent or took something. What this raised would be printed, so it raises nothing."""
        sender = self._side if sent else self._side.other
        if kind == _HEADER:
            self._header[sender] = bytes(ffi.buffer(data, min(size, 5)))
            self._on_header(sender)
        elif kind == _INNER_TYPE:
            if ffi.buffer(data, 1)[0] == b"\x17":
                self._note_data(sender)
        elif kind in _MESSAGES:
            self._note(sender, version, kind, size, data)

    def _on_header(self, sender: Side) -> None:
        """A record begins. Of two kinds OpenSSL tells nothing else: data before TLS 1.3, and a change of cipher
        (of one that it took before TLS 1.3).
        """
        kind = self._header[sender][:1]
        if kind == b"\x14":
            self._ciphered.add(sender)
            self._add(Event(self._clock(), sender, ContentType.CHANGE_CIPHER_SPEC, b"\1", False, 1))
        elif kind == b"\x17" and self._version < SSL.TLS1_3_VERSION:  # TLS 1.3's headers are of 1.2's form
            self._note_data(sender)

    def _note(self, sender: Side, version: int, kind: int, size: int, data: Any) -> None:
        header = self._header[sender]
        encrypted = header[:1] == b"\x17" or (sender in self._ciphered and version < SSL.TLS1_3_VERSION)
        if kind == ContentType.HANDSHAKE:
            self._version = version
        if self._size + size <= MAX_HANDSHAKE:
            self._size += size
            self._add(Event(self._clock(), sender, kind, bytes(ffi.buffer(data, size)), encrypted, size))
        else:
            self.full = True

    def _add(self, event: Event) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append(event)
        else:
            self.full = True

    def _note_data(self, sender: Side) -> None:
        size = int.from_bytes(self._header[sender][3:5], "big")
        self._add(Event(self._clock(), sender, ContentType.APPLICATION_DATA, b"", True, size))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a watched client offers. `alpn`: application protocols, in its order.

    `only_tls12`: it offers nothing newer. `small`: no post-quantum key share, so that its hello fits one packet.
    """

    server_name: str = ""
    credential: Credential | None = field(default=None, repr=False)
    alpn: tuple[str, ...] = ()
    only_tls12: bool = False
    small: bool = False


class WatchedClient:
    """A client's handshake over memory that verifies nothing and is watched; the caller judges what it saw."""

    def __init__(self, offer: Offer, clock: Clock) -> None:
        self.recorder = Recorder(Side.CLIENT, clock)
        self._handshake = ClientHandshake(
            offer.server_name or None, offer.credential, lambda context: _adjust(context, offer, self.recorder)
        )

    def feed(self, records: bytes) -> Channel | None:
        """Go on with what the network brought (b'' to begin); None while more is needed. Raises TlsBroken."""
        return self._handshake.feed(records)

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return self._handshake.take()

    @property
    def protocol(self) -> str:
        """The application protocol that was settled; '' if none was."""
        return self._handshake.protocol.decode("latin-1")


class WatchedServer:
    """A server's handshake over memory, judged as a guard judges it, and watched.

    The context serves this one connection and no other after it.
    """

    def __init__(self, context: ServerContext, clock: Clock) -> None:
        self.recorder = Recorder(Side.SERVER, clock)
        self.recorder.watch(context._context)
        self._handshake = context.accept(lambda: datetime.now(UTC))

    def feed(self, records: bytes) -> Accepted | Refused | None:
        """Go on with what the network brought; None while more is needed."""
        return self._handshake.feed(records)

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        return self._handshake.take()


def _adjust(context: SSL.Context, offer: Offer, recorder: Recorder) -> None:
    if offer.only_tls12:
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
    if offer.alpn:
        context.set_alpn_protos([protocol.encode("latin-1") for protocol in offer.alpn])
    if offer.small:
        lib.SSL_CTX_set1_curves_list(context._context, b"X25519:P-256:P-384")
    recorder.watch(context)
