"""What the attacks share: clients that misbehave in known ways, several sites behind one address, and the oracle.

The oracle is never what the attacker sees. It is what the app received, and what the log says of it.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from tlslite.api import HandshakeSettings, TLSConnection, X509CertChain, parsePEMKey
from tlslite.x509 import X509

from handfast.guard.places import parse_target
from handfast.guard.routes import Identify, Route, Site, Sites, Snapshot, usual_headers
from handfast.guard.upstream import Backend, Upstreams
from handfast.pki.revocation import Revocations
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.policy import ALLOW_ANY, Policy
from handfast.tls.credential import Credential
from handfast.tls.server import ClientAuth, ServerContext, ServerSettings
from tests.support.apps import HELLO, App, accepted, client_context, get
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.programs import HANDFAST, Child, environment
from tests.support.waiting import PATIENCE as WAIT
from tests.support.waiting import Stopwatch

UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13")


def untouched(*apps: App) -> bool:
    """Whether no app was even dialled."""
    return all(app.connections == 0 and not app.received for app in apps)


def revoked(*leaves: Leaf | Ca) -> Revocations:
    """What an authority says once it has revoked these."""
    certificates = [leaf.certificate for leaf in leaves]
    return Revocations(frozenset((one.issuer.public_bytes(), one.serial_number) for one in certificates))


# Clients.


@dataclass(frozen=True)
class Heard:
    """What came of a call. `error`: what the client's TLS complained of; '' when the far side closed in order."""

    answer: bytes
    error: str = ""
    reused: bool = False
    session: ssl.SSLSession | None = None

    @property
    def statuses(self) -> list[int]:
        """The statuses of all answers."""
        return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", self.answer)]

    @property
    def status(self) -> int:
        """The status of the one answer; 0 without any."""
        assert len(self.statuses) <= 1, self.answer
        return self.statuses[0] if self.statuses else 0

    @property
    def body(self) -> bytes:
        return self.answer.partition(b"\r\n\r\n")[2]

    @property
    def refusal(self) -> tuple[int, str]:
        """The status and code of a refusal."""
        return self.status, json.loads(self.body)["error"]


def port_of(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


@dataclass(frozen=True)
class Attacker:
    """Makes clients. A context is kept by who wants its sessions offered again."""

    ca: Path
    folder: Path

    def context(self, leaf: Leaf | None = None, *, tls12: bool = False) -> ssl.SSLContext:
        context = client_context(self.ca, leaf, self.folder)
        context.check_hostname = False
        if tls12:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        return context

    def open(
        self,
        guard: Running | str,
        leaf: Leaf | None = None,
        name: str | None = "localhost",
        *,
        context: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        """A connection whose handshake is done, as far as the client can tell."""
        address = guard if isinstance(guard, str) else guard.address
        plain = socket.create_connection(port_of(address), timeout=WAIT)
        try:
            return (context or self.context(leaf)).wrap_socket(
                plain, server_hostname=name, session=session, suppress_ragged_eofs=False
            )
        except BaseException:
            plain.close()
            raise

    def call(
        self,
        guard: Running | str,
        leaf: Leaf | None = None,
        request: bytes = get(),
        name: str | None = "localhost",
        *,
        context: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
    ) -> Heard:
        """Say something on a connection of its own, and take what comes until the far side ends it."""
        try:
            tls = self.open(guard, leaf, name, context=context, session=session)
        except (ssl.SSLError, ConnectionError) as error:
            return Heard(b"", getattr(error, "reason", None) or str(error))
        with tls:
            return hear(tls, request)


def hear(tls: ssl.SSLSocket, request: bytes = b"") -> Heard:
    """Say something, and take what comes until the far side ends it."""
    answer, error = b"", ""
    try:
        if request:
            tls.sendall(request)
        while piece := tls.recv(1 << 16):
            answer += piece
    except (ssl.SSLError, ConnectionError) as broken:
        error = getattr(broken, "reason", None) or type(broken).__name__
    except TimeoutError:
        error = "silence"
    return Heard(answer, error, bool(tls.session_reused), tls.session)


def one(tls: ssl.SSLSocket, request: bytes) -> Heard:
    """One request and its answer, which has a Content-Length, on a connection that goes on; b'' when it ended."""
    answer = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        tls.sendall(request)
        while not (found := re.search(rb"content-length: ([0-9]+)\r\n", answer, re.I)) or len(answer) < (
            answer.find(b"\r\n\r\n") + 4 + int(found[1])
        ):
            piece = tls.recv(1 << 16)
            if not piece:
                break
            answer += piece
    return Heard(answer)


def ended_within(tls: ssl.SSLSocket, seconds: float) -> bool:
    """Whether the far side ends the connection in time without a word before."""
    tls.settimeout(WAIT)
    with Stopwatch() as watch:
        try:
            if tls.recv(1) != b"":
                return False
        except TimeoutError:
            return False
        except (ssl.SSLError, ConnectionError):
            pass
    return watch.seconds < seconds


class Stepwise:
    """A client that shakes hands flight by flight, so that a test can do something in between."""

    def __init__(self, address: str, context: ssl.SSLContext, name: str | None = "localhost") -> None:
        self.plain = socket.create_connection(port_of(address), timeout=WAIT)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname=name)
        self.hello = self._flight()

    def __enter__(self) -> Stepwise:
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.close()

    def _flight(self) -> bytes:
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self._out.read()

    def flight(self) -> bytes:
        """Read the server's flight, and return the client's last without sending it."""
        while True:
            data = self.plain.recv(1 << 16)
            assert data, "the server ended the handshake"
            self._in.write(data)
            if flight := self._flight():
                return flight

    def finish(self, flight: bytes, request: bytes = b"") -> Heard:
        """Send the last flight, and a request; take what comes."""
        if request:
            self.tls.write(request)
        self.plain.sendall(flight + self._out.read())
        answer, error = b"", ""
        try:
            while not answer.endswith(HELLO) and (data := self.plain.recv(1 << 16)):
                self._in.write(data)
                with contextlib.suppress(ssl.SSLWantReadError):
                    while piece := self.tls.read(1 << 16):
                        answer += piece
        except (ssl.SSLError, ConnectionError) as broken:
            error = getattr(broken, "reason", None) or type(broken).__name__
        return Heard(answer, error)


def in_crumbs(records: bytes, size: int) -> bytes:
    """The same handshake messages in records of at most `size` bytes (RFC 8446 5.1)."""
    message, at = b"", 0
    while at < len(records):
        length = int.from_bytes(records[at + 3 : at + 5], "big")
        message += records[at + 5 : at + 5 + length]
        at += 5 + length
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(records[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


def chain_of(leaf: Leaf) -> X509CertChain:
    """A leaf's certificates as tlslite-ng takes them."""
    certificates = []
    for certificate in leaf.presented:
        made = X509()
        made.parseBinary(bytearray(certificate.public_bytes(serialization.Encoding.DER)))
        certificates.append(made)
    return X509CertChain(certificates)


def key_of(leaf: Leaf) -> Any:
    """A leaf's key as tlslite-ng takes it."""
    form = serialization.PrivateFormat.PKCS8
    pem = leaf.key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return parsePEMKey(pem.decode(), private=True)


@contextmanager
def tlslite(
    guard: Running,
    leaf: Leaf | None = None,
    *,
    key: Leaf | None = None,
    versions: tuple[tuple[int, int], tuple[int, int]] = ((3, 3), (3, 4)),
    name: str = "localhost",
) -> Iterator[Any]:
    """A connection of tlslite-ng, which does as it is told. `key`: whose key signs, where it is not the leaf's own."""
    settings = HandshakeSettings()
    settings.minVersion, settings.maxVersion = versions
    settings.certificate_compression_send = settings.certificate_compression_receive = []
    with socket.create_connection(port_of(guard.address), timeout=WAIT) as plain:
        connection = TLSConnection(plain)
        connection.closeSocket = False
        shown = (None, None) if leaf is None else (chain_of(leaf), key_of(key or leaf))
        connection.handshakeClientCert(*shown, settings=settings, serverName=name)
        yield connection


# Servers.


@contextmanager
def lax_twin(leaf: Leaf, folder: Path, *, session_ids: bool = False) -> Iterator[str]:
    """Another server with the guard's certificate and key, that asks clients for nothing and resumes sessions."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*leaf.save(folder, "twin"))
    if session_ids:
        context.options |= ssl.OP_NO_TICKET

    def serve() -> None:
        while (plain := accepted(listener)) is not None:
            with contextlib.suppress(OSError), plain, context.wrap_socket(plain, server_side=True) as tls:
                tls.recv(1 << 16)
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                tls.unwrap()  # a session that ends without it is forgotten

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT)


@dataclass
class Vhost:
    """One site: its names, whom it believes, and how strict it is."""

    app: App
    names: tuple[str, ...] = ()
    ca: Ca | None = None  # of its clients
    client_auth: ClientAuth = ClientAuth.REQUIRED
    policy: Policy = ALLOW_ANY
    nameless: bool = False
    tls12: bool = False
    identify: Identify = usual_headers
    alpn: tuple[bytes, ...] = ()
    terms: dict[str, Any] = field(default_factory=dict)
    server: Leaf | None = None


def site(guard: Running, vhost: Vhost) -> Site:
    """A site for a guard that runs."""
    bundle = TrustBundle(((vhost.ca or guard.ca).certificate,), vhost.terms.pop("trust_domain", None))
    leaf = vhost.server or guard.ca.server(*(vhost.names or ("localhost",)))
    settings = ServerSettings(
        answer_refusals=guard.upstreams.target.http,
        allow_tls12=vhost.tls12,
        client_auth=vhost.client_auth,
        alpn=vhost.alpn,
    )
    terms = Terms(vhost.terms.pop("bundle", bundle), Purpose.CLIENT, **vhost.terms)
    target = vhost.app.address if guard.upstreams.target.http else f"tcp://{vhost.app.address}"
    group = Upstreams(target, (Backend(parse_target(target)),))
    anonymous = vhost.client_auth is not ClientAuth.REQUIRED
    return Site(
        ServerContext(Credential(leaf.key, leaf.presented), terms, settings),
        (Route(group, vhost.policy, anonymous),),
        vhost.names,
        vhost.nameless,
        vhost.identify,
    )


def serve_sites(guard: Running, *vhosts: Vhost) -> Snapshot:
    """Put these sites in force."""
    snapshot = Snapshot({"main": Sites([site(guard, vhost) for vhost in vhosts])})
    guard.swap(snapshot)
    return snapshot


def websocket_app() -> App:
    """An app that agrees to every websocket, and gives back what it gets in capitals."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        while data := connection.recv(1 << 16):
            connection.sendall(data.upper())

    return App(answer)


def upgraded(tls: ssl.SSLSocket, path: str = "/ws") -> None:
    """Turn a connection into a websocket, and see that it is one."""
    tls.sendall(get(path, "localhost", *UPGRADE, close=False))
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += tls.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 101 "), answer
    tls.sendall(b"frame")
    assert tls.recv(5) == b"FRAME"


# The real command.

LISTENER = """log = "json"
[[listener]]
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = "clients.crt"
"""


@dataclass
class Command:
    """`handfast guard -c`, as a child, and its events."""

    child: Child
    address: str

    def next(self, kind: str) -> dict[str, Any]:
        """The next event of this kind; others before it are passed over."""
        event: dict[str, Any] = json.loads(self.child.line(f'"event": ?"{kind}"'))
        return event

    def reload(self) -> dict[str, Any]:
        """Have it read its files again; what it says of that."""
        self.child._process.send_signal(signal.SIGHUP)
        return self.next("reload")


@contextmanager
def command(folder: Path, config: str, **env: str) -> Iterator[Command]:
    """Run the guard with a configuration until the `with` ends."""
    (folder / "handfast.toml").write_text(config)
    words = (*HANDFAST, "guard", "-c", folder / "handfast.toml")
    with Child(words, folder, environment(**env), merge=False) as child:
        ready = json.loads(child.line('"event": ?"ready"'))
        yield Command(child, ready["listeners"][0]["url"].partition("://")[2])
        code = child.stop()
    assert (code, child.errors) == (0, [])
