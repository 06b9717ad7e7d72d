"""What the tests of explanations share: an authority with good and bad certificates, and calls to a server."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from handfast.explain.model import Explanation, Known
from handfast.explain.probe import Limits, answer, call
from handfast.explain.story import explain
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.credential import Credential
from handfast.tls.server import ServerContext, ServerSettings
from handfast.tls.transcript import Offer
from tests.support.certs import SERVER, Ca, Leaf

NOW = datetime.now(UTC).replace(microsecond=0)
HOUR = timedelta(hours=1)
LIMITS = Limits(5, 0.7)
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

ROOT = Ca.root("Explained Root")
OTHER = Ca.root("Other Root")
ISSUER = ROOT.sub("Explained Issuer")
NAMED = ROOT.sub(
    "Constrained Issuer",
    extra=[(x509.NameConstraints([x509.DNSName("good.example")], None), True)],
)

CLIENTS: dict[str, Leaf | None] = {
    "good": ROOT.client(),
    "none": None,
    "other": OTHER.client(),
    "expired": ROOT.client(not_before=NOW - 9 * HOUR, not_after=NOW - HOUR),
    "early": ROOT.client(not_before=NOW + HOUR, not_after=NOW + 9 * HOUR),
    "purpose": ROOT.client(eku=[SERVER]),
    "constraint": NAMED.leaf("bad.example"),
}


@dataclass
class Files:
    """The server's files, in a folder."""

    folder: Path

    def __post_init__(self) -> None:
        ROOT.save(self.folder, "ca")
        ROOT.server().save(self.folder, "server")


def caller(leaf: Leaf | None, **more: Any) -> Offer:
    """What a client with that certificate offers."""
    credential = None if leaf is None else Credential(leaf.key, leaf.presented)
    return Offer(**({"server_name": "localhost", "credential": credential, "alpn": ("http/1.1",)} | more))


def called(
    port: int, leaf: Leaf | None, *, bundle: Ca | None = ROOT, name: str = "localhost", **more: Any
) -> Explanation:
    """Call a server on loopback and explain what came of it."""
    recording = call("127.0.0.1", port, caller(leaf, **more), LIMITS, REQUEST)
    known = Known(datetime.now(UTC), name, own=() if leaf is None else leaf.presented)
    return explain(recording, known, None if bundle is None else TrustBundle((bundle.certificate,)))


def revocation_list(issuer: Ca, *serials: int, next_update: datetime | None = None) -> bytes:
    """A revocation list in PEM."""
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.certificate.subject)
    builder = builder.last_update(NOW - 48 * HOUR).next_update(next_update or NOW + 24 * HOUR)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW - HOUR).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@contextmanager
def plain_server(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP server that does as told with one connection after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    plug, _ = listener.accept()
                except OSError:
                    return
                with plug, contextlib.suppress(OSError):
                    plug.settimeout(10)
                    behave(plug)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(12)


@dataclass
class Watched:
    """A server that waits for one client and explains it."""

    port: int
    found: list[Explanation]


@contextmanager
def watching(server: Leaf | None = None, **settings: Any) -> Iterator[Watched]:
    """Wait for one client, as `explain --listen` does; `found` has the explanation once the `with` has ended."""
    leaf = server or ROOT.server()
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.CLIENT)
    context = ServerContext(Credential(leaf.key, leaf.presented), terms, ServerSettings(**settings))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        watched = Watched(listener.getsockname()[1], [])

        def serve() -> None:
            plug, _ = listener.accept()
            recording = answer(plug, context, LIMITS, f"127.0.0.1:{watched.port}", b"HTTP/1.1 204 No Content\r\n\r\n")
            known = Known(datetime.now(UTC), "localhost", own=leaf.presented)
            watched.found.append(explain(recording, known, terms.bundle))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield watched
        finally:
            thread.join(20)
        assert watched.found, json.dumps("no client came, or it was not explained")
