"""Handshakes that OpenSSL will not make, by tlslite-ng over a wire: a certificate beside a key that is not its own.

tlslite-ng is for tests and attacks: slow, in Python, and without care for side channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlslite.api import HandshakeSettings, TLSConnection, X509CertChain, parsePEMKey
from tlslite.constants import ExtensionType
from tlslite.errors import TLSAbruptCloseError, TLSError, TLSLocalAlert, TLSRemoteAlert
from tlslite.x509 import X509

from handfast.audit.oracle import End, Reply
from handfast.audit.wires import MAX_REPLY, Silence, Wire, is_whole
from handfast.testing import TestLeaf
from handfast.wire.alerts import alert_name

if TYPE_CHECKING:
    from handfast.audit.runner import Audit

_CLOSE_NOTIFY = 0


@dataclass(frozen=True, slots=True)
class OddReply:
    """A reply, and how much early data each session ticket that came with it would allow, in bytes."""

    reply: Reply
    early_data: tuple[int, ...]

    @property
    def tickets(self) -> int:
        """How many tickets came."""
        return len(self.early_data)


def call(audit: Audit, leaf: TestLeaf | None, *, tls12: bool = False) -> Reply:
    """As `Audit.call`, but the leaf's key need not fit its certificate: its proof is then wrong."""
    with audit.connect(min(audit.pace.answer * 2, 20.0)) as wire:
        return converse(wire, audit.target.sni, leaf, audit.request, tls12=tls12).reply


def converse(
    wire: Wire, server_name: str | None, leaf: TestLeaf | None, request: bytes, *, tls12: bool = False
) -> OddReply:
    """Shake hands over the wire, send a request and read the answer. Raises Silence, OSError."""
    connection = TLSConnection(_Bounded(wire))
    settings = HandshakeSettings()
    settings.minVersion, settings.maxVersion = (3, 3), (3, 3) if tls12 else (3, 4)
    settings.minKeySize, settings.maxKeySize = 512, 16384
    # tlslite-ng compresses its certificate (RFC 8879) also for servers that did not offer to take it so.
    settings.certificate_compression_send = settings.certificate_compression_receive = []
    chain, key = (None, None) if leaf is None else (chain_of(leaf), parsePEMKey(leaf.key_pem.decode(), private=True))
    done, data = False, b""
    try:
        connection.handshakeClientCert(chain, key, settings=settings, serverName=server_name or "")
        done = True
        connection.write(request)
        while len(data) < MAX_REPLY and not is_whole(data):
            piece = connection.read(min=1)
            if not piece:
                break
            data += bytes(piece)
            if not data.startswith(b"HTTP/"):
                break
    except TLSRemoteAlert as alert:
        said = alert_name(alert.description)
        end = End.CLOSED if alert.description == _CLOSE_NOTIFY else End.ALERT
        return _with_tickets(connection, Reply(done, data, end, said if end is End.ALERT else ""))
    except TLSAbruptCloseError:
        return _with_tickets(connection, Reply(done, data, End.CLOSED))
    except (TLSLocalAlert, TLSError) as error:
        # What the server sent broke the rules, or we could not go on. Nothing was let in, and nothing is proved.
        return OddReply(Reply(done, data, End.UNMADE, detail=f"the handshake broke off on our side: {error}"), ())
    except Silence:
        return _with_tickets(connection, Reply(done, data, End.OPEN if data else End.SILENT))
    except OSError:
        return _with_tickets(connection, Reply(done, data, End.RESET))
    return _with_tickets(connection, Reply(done, data, End.OPEN if data else End.CLOSED))


def _with_tickets(connection: TLSConnection, reply: Reply) -> OddReply:
    allowed = []
    for ticket in connection.tickets:
        extension = ticket.getExtension(ExtensionType.early_data)
        # RFC 8446 4.2.10: in a ticket, max_early_data_size, four octets.
        allowed.append(0 if extension is None else int.from_bytes(bytes(extension.extData), "big"))
    return OddReply(reply, tuple(allowed))


def chain_of(leaf: TestLeaf) -> X509CertChain:
    """A leaf's certificates as tlslite-ng takes them."""
    certificates = []
    for der in leaf.presented:
        certificate = X509()
        certificate.parseBinary(bytearray(der))
        certificates.append(certificate)
    return X509CertChain(certificates)


class _Bounded:
    """A wire as the socket that tlslite-ng asks for."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def send(self, data: bytes) -> int:
        self._wire.send(bytes(data))
        return len(data)

    def sendall(self, data: bytes) -> None:
        self._wire.send(bytes(data))

    def recv(self, _size: int) -> bytes:
        return self._wire.receive()

    def close(self) -> None:
        """The wire is its owner's to close."""
