"""Every check finds the hole it looks for, in a server that has it: a check that cannot fail would be noticed here."""

from __future__ import annotations

import select
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock

import pytest

from handfast.audit.catalogue import CHECKS, choose
from handfast.audit.clienthello import RENEGOTIATION_INFO, TLS12, VERSIONS
from handfast.audit.model import Severity, Verdict
from handfast.audit.runner import Client, Means, prepare, run
from handfast.files import generate_key
from handfast.pki.keys import KeyType
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.kit import (
    FAST,
    Gullible,
    Serve,
    answering,
    credulous,
    found,
    nginx_with,
    openssl_with,
    python_context,
    scripted,
    target,
)
from tests.support.apps import App

Server = Callable[[TestAuthority, Path], Iterator[int]]

OLD = ("-cipher", "ALL:@SECLEVEL=0")


# Servers with a hole. Each is a context manager that gives its port.


def asks_nobody(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Python's ssl with verify_mode left at CERT_NONE."""
    with scripted(answering(python_context(authority, folder, ssl.CERT_NONE))) as port:
        yield port


def optional(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """nginx with ssl_verify_client optional, and nothing that looks at $ssl_client_verify."""
    with nginx_with(authority, folder, "ssl_verify_client optional;") as port:
        yield port


def optional_no_ca(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """nginx with ssl_verify_client optional_no_ca."""
    with nginx_with(authority, folder, "ssl_verify_client optional_no_ca;") as port:
        yield port


def unverified(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """tlslite-ng asks for a certificate and verifies no chain."""
    with scripted(credulous(authority)) as port:
        yield port


def unproved(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """A server that does not check CertificateVerify."""
    with scripted(credulous(authority, Gullible)) as port:
        yield port


def repeats(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """A server whose answers depend on nothing but what it is sent: it says to a recording what it said before."""
    with nginx_with(authority, folder, "ssl_verify_client on;") as real, scripted(_repeating(real)) as port:
        yield port


def early_data(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """nginx with ssl_early_data on."""
    lines = ("ssl_verify_client on;", "ssl_early_data on;", "ssl_protocols TLSv1.3;")
    with nginx_with(authority, folder, *lines) as port:
        yield port


def tls11(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with openssl_with(authority, folder, "-tls1_1", *OLD) as port:
        yield port


def tls10(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with openssl_with(authority, folder, "-tls1", *OLD) as port:
        yield port


def null_suites(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with openssl_with(authority, folder, "-tls1_2", "-cipher", "eNULL:@SECLEVEL=0") as port:
        yield port


def anonymous_suites(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with openssl_with(authority, folder, "-tls1_2", "-cipher", "aNULL:@SECLEVEL=0") as port:
        yield port


def weak_curve(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with openssl_with(authority, folder, "-tls1_2", "-cipher", "ECDHE:@SECLEVEL=0", "-curves", "P-192") as port:
        yield port


def short_prime(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Diffie-Hellman of 1024 bits: the prime of Oakley group 2 (RFC 2409 6.2), which Logjam's authors feared for."""
    server = authority.server(key=generate_key(KeyType.RSA2048))
    cert, key = server.save(folder, "rsa")
    (folder / "dh.pem").write_text(_OAKLEY_2)
    words = ("-tls1_2", "-cipher", "DHE:@SECLEVEL=0", "-dhparam", str(folder / "dh.pem"), "-cert", str(cert))
    with openssl_with(authority, folder, *words, "-key", str(key)) as port:
        yield port


def renegotiates(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with openssl_with(authority, folder, "-tls1_2", "-client_renegotiation") as port:
        yield port


def insecurely_renegotiates(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """A TLS 1.2 server from before RFC 5746."""
    with openssl_with(authority, folder, "-tls1_2") as real, scripted(_choosing(real)) as port:
        yield port


def compresses(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with scripted(_says(_server_hello(compression=1))) as port:
        yield port


def routes_by_first_bytes(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """A router that sends what it does not recognise to an open backend."""
    open_ = scripted(answering(python_context(authority, folder, ssl.CERT_NONE)))
    with nginx_with(authority, folder, "ssl_verify_client on;") as guarded, open_ as unguarded:

        def route(connection: socket.socket) -> None:
            head = connection.recv(9, socket.MSG_PEEK | socket.MSG_WAITALL)
            record, message = int.from_bytes(head[3:5], "big"), int.from_bytes(head[6:9], "big")
            _forward(connection, guarded if record >= message + 4 else unguarded)

        with scripted(route) as port:
            yield port


def swallows(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Reads a ClientHello of any length."""
    with scripted(_reads_on) as port:
        yield port


def knows_no_grease(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Ends the handshake for a suite that it has not heard of."""
    with nginx_with(authority, folder, "ssl_verify_client on;") as real:

        def serve(connection: socket.socket) -> None:
            hello = connection.recv(16384, socket.MSG_PEEK)
            if b"\x1a\x1a" in hello[40:90]:
                connection.sendall(b"\x15\3\3\0\2\2\x2f")  # illegal_parameter
                return
            _forward(connection, real)

        with scripted(serve) as port:
            yield port


def takes_any_name(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with scripted(_says(_server_hello())) as port:
        yield port


def plain(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """No TLS at all."""
    with App() as app:
        yield app.port


def either(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """A port that speaks TLS to those who begin with it, and plain HTTP to the others."""
    with nginx_with(authority, folder, "ssl_verify_client on;") as guarded, App() as app:

        def serve(connection: socket.socket) -> None:
            first = connection.recv(1, socket.MSG_PEEK)
            _forward(connection, guarded if first == b"\x16" else app.port)

        with scripted(serve) as port:
            yield port


def speaks_anything(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Chooses a protocol where it knows one, and goes on without where it does not, as OpenSSL's users often do."""
    context = python_context(authority, folder, ssl.CERT_REQUIRED)
    context.set_alpn_protocols(["http/1.1"])
    with scripted(answering(context)) as port:
        yield port


def passes_over_plaintext(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Takes lines of plaintext before the handshake, as mail servers with STARTTLS do."""
    context = python_context(authority, folder, ssl.CERT_REQUIRED)

    def serve(connection: socket.socket) -> None:
        while not (seen := connection.recv(4096, socket.MSG_PEEK)).startswith(b"\x16\3"):
            if not seen:
                return
            at = seen.find(b"\x16\3")
            connection.recv(at if at > 0 else len(seen))
        answering(context)(connection)

    with scripted(serve) as port:
        yield port


def believes_proxy_headers(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with nginx_with(authority, folder, "ssl_verify_client on;", listen="ssl proxy_protocol") as port:
        yield port


def keeps(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Waits for whoever does not go on."""
    with openssl_with(authority, folder) as port:
        yield port


def names_its_authorities(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with nginx_with(authority, folder, "ssl_verify_client on;") as port:
        yield port


@pytest.mark.parametrize(
    ("check", "server"),
    [
        ("no-certificate", asks_nobody),
        ("no-certificate", optional),
        ("self-signed", optional_no_ca),
        ("self-signed", unverified),
        ("same-name-other-ca", optional_no_ca),
        ("same-name-other-ca", unverified),
        ("spoofed-names", optional_no_ca),
        ("spoofed-names", unverified),
        ("tampered-signature", unverified),
        ("leaf-as-issuer", unverified),
        ("copied-certificate", unproved),
        ("authority-names", names_its_authorities),
        ("replayed-flights", repeats),
        ("replayed-session", repeats),
        ("early-data", early_data),
        ("old-versions", tls11),
        ("old-versions", tls10),
        ("weak-suites", null_suites),
        ("weak-suites", anonymous_suites),
        ("weak-groups", weak_curve),
        ("weak-groups", short_prime),
        ("compression", compresses),
        ("renegotiation", renegotiates),
        ("renegotiation", insecurely_renegotiates),
        ("fragmented-hello", routes_by_first_bytes),
        ("oversized-hello", swallows),
        ("grease", knows_no_grease),
        ("server-names", takes_any_name),
        ("plaintext", plain),
        ("plaintext", either),
        ("plaintext-first", passes_over_plaintext),
        ("proxy-header", believes_proxy_headers),
        ("proxy-header", passes_over_plaintext),
        ("other-protocol", speaks_anything),
        ("silent-client", keeps),
        ("silent-client", swallows),
        ("trickling-client", keeps),
        ("trickling-client", swallows),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_hole_is_found(
    authority: TestAuthority, client: TestLeaf, tmp_path: Path, check: str, server: Server
) -> None:
    """The check fails, with evidence of what was sent and what came back."""
    (wanted,) = choose([f"outsider.{check}"])
    with contextmanager(server)(authority, tmp_path) as port:
        means = Means(client if wanted.needs or check in ("copied-certificate", "early-data") else None)
        finding = found(wanted.id, port, means)
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert finding.failed == (wanted.severity is not Severity.INFO)
    assert finding.outcome.evidence
    assert all(item.sent and item.received for item in finding.outcome.evidence)


def careless_curl(host: str, port: int, ca: str, _folder: Path) -> list[str]:
    return ["curl", "-sSk", "--max-time", "8", "--connect-to", f"{host}:443:127.0.0.1:{port}", f"https://{host}/"]


def careless_python(host: str, port: int, ca: str, _folder: Path) -> list[str]:
    script = (
        "import socket, ssl, sys; c = ssl.create_default_context(); c.check_hostname = False; "
        "c.verify_mode = ssl.CERT_NONE; s = c.wrap_socket(socket.create_connection(('127.0.0.1', int(sys.argv[1])))); "
        "s.sendall(b'GET / HTTP/1.1\\r\\n\\r\\n')"
    )
    return [sys.executable, "-c", script, str(port)]


@pytest.mark.parametrize("command", [careless_curl, careless_python])
def test_a_careless_client_is_found(
    authority: TestAuthority, tmp_path: Path, command: Callable[[str, int, str, Path], list[str]]
) -> None:
    """A client that verifies nothing tells the person in the middle its request."""
    means = Means(client=Client("careless", str(authority.save(tmp_path)), command))
    with App() as app:
        finding = found("outsider.person-in-the-middle", app.port, means)
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert "GET / HTTP/1.1" in finding.outcome.evidence[0].received


def test_every_check_has_a_server_with_its_hole() -> None:
    """No check of an outsider is left out above."""
    marks = test_the_hole_is_found.pytestmark  # type: ignore[attr-defined]  # pytest puts it there
    tried = {f"outsider.{check}" for mark in marks for check, _ in mark.args[1]} | {"outsider.person-in-the-middle"}
    assert tried == {check.id for check in CHECKS if check.id.startswith("outsider.")}


def test_a_server_that_dies_of_it_fails(authority: TestAuthority, tmp_path: Path) -> None:
    """A server that beats the attack back and does not shake hands afterwards has not held."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as real:
        dead: list[bool] = []

        def serve(connection: socket.socket) -> None:
            if dead:
                return
            hello = connection.recv(16384, socket.MSG_PEEK)
            if int.from_bytes(hello[3:5], "big") == 1:
                dead.append(True)
                return
            _forward(connection, real)

        with scripted(serve) as port:
            finding = found("outsider.fragmented-hello", port)
    assert finding.outcome.verdict is Verdict.FAIL
    assert "any more" in finding.outcome.why


def test_gentle_patience_is_no_finding(authority: TestAuthority, tmp_path: Path) -> None:
    """A server that is not watched for the whole time it has is not accused."""
    with contextmanager(keeps)(authority, tmp_path) as port:
        audit = prepare(target(port), Means(), replace(FAST, limit=60.0, patience=0.5))
        report = run(audit, choose(["outsider.silent-client"]), lambda *_: None)
    assert [one.outcome.verdict for one in report.findings] == [Verdict.INCONCLUSIVE]


def test_no_ticket_is_no_proof(authority: TestAuthority, client: TestLeaf, tmp_path: Path) -> None:
    """Who is refused before any ticket is sent learns nothing of early data; who is let in does."""
    with scripted(answering(python_context(authority, tmp_path, ssl.CERT_REQUIRED))) as port:
        stranger = found("outsider.early-data", port)
        known = found("outsider.early-data", port, Means(client))
    assert stranger.outcome.verdict is Verdict.NOT_APPLICABLE
    assert known.outcome.verdict is Verdict.PASS


def test_without_a_control_nothing_is_shown(authority: TestAuthority, client: TestLeaf, tmp_path: Path) -> None:
    """A server that the odd engine cannot talk to at all does not pass for one that checks proofs."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;", "ssl_protocols TLSv1.2 TLSv1.3;") as real:

        def serve(connection: socket.socket) -> None:
            hello = connection.recv(16384, socket.MSG_PEEK)
            # OpenSSL offers no heartbeat (RFC 6520), and tlslite-ng does.
            if b"\x00\x0f\x00\x01" in hello:
                return
            _forward(connection, real)

        with scripted(serve) as port:
            finding = found("outsider.copied-certificate", port, Means(client))
    assert finding.outcome.verdict is Verdict.INCONCLUSIVE, finding.outcome


# Parts of such servers.


def _forward(connection: socket.socket, port: int) -> None:
    """Carry bytes both ways until one side ends."""
    with socket.create_connection(("127.0.0.1", port), 5) as behind:
        while True:
            for ready in select.select([connection, behind], [], [], 5)[0]:
                data = ready.recv(1 << 16)
                other = behind if ready is connection else connection
                if not data:
                    return
                other.sendall(data)


def _reads_on(connection: socket.socket) -> None:
    connection.settimeout(30)
    while connection.recv(1 << 16):
        pass


def _says(answer: bytes) -> Serve:
    """Answers whatever comes."""

    def serve(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(answer)
        connection.recv(1 << 16)

    return serve


def _server_hello(compression: int = 0, suite: int = 0xC02F) -> bytes:
    """A ServerHello of TLS 1.2 and ServerHelloDone, in one record."""
    body = TLS12.to_bytes(2, "big") + bytes(32) + b"\0" + suite.to_bytes(2, "big") + bytes((compression,))
    messages = b"\2" + len(body).to_bytes(3, "big") + body + b"\x0e\0\0\0"
    return b"\x16\3\3" + len(messages).to_bytes(2, "big") + messages


def _choosing(real: int) -> Serve:
    """To a ClientHello with renegotiation_info it answers as before RFC 5746; the rest goes to a real server."""

    def serve(connection: socket.socket) -> None:
        hello = connection.recv(16384, socket.MSG_PEEK)
        offers = RENEGOTIATION_INFO.to_bytes(2, "big") + b"\0\1\0" in hello
        if offers and VERSIONS.to_bytes(2, "big") not in hello and hello[43]:  # OpenSSL's own has no session id
            connection.sendall(_server_hello())
            return
        _forward(connection, real)

    return serve


def _repeating(real: int) -> Serve:
    """Notes what a first client and the server said; to the same bytes it then says the same."""
    told: list[tuple[list[tuple[bytes, bytes]], Event]] = []  # the turns, and whether all of them are there
    lock = Lock()

    def play(connection: socket.socket, first: bytes, turns: list[tuple[bytes, bytes]]) -> None:
        got = first
        for sent, answer in turns:
            while len(got) < len(sent):
                got += connection.recv(1 << 16)
            got = got[len(sent) :]
            connection.sendall(answer)

    def serve(connection: socket.socket) -> None:
        first = connection.recv(1 << 16)
        with lock:
            known = next((one for one in told if first.startswith(one[0][0][0])), None)
        if known is not None:
            assert known[1].wait(30)
            play(connection, first, known[0])
            return
        turns: list[tuple[bytes, bytes]] = []
        whole = Event()
        try:
            note(connection, first, turns, whole)
        finally:
            whole.set()

    def note(connection: socket.socket, first: bytes, turns: list[tuple[bytes, bytes]], whole: Event) -> None:
        with socket.create_connection(("127.0.0.1", real), 5) as behind:
            turns.append((first, b""))
            behind.sendall(first)
            while ready := select.select([connection, behind], [], [], 5)[0]:
                if behind in ready:  # what belongs to the turn so far comes before the client's next
                    if not (piece := behind.recv(1 << 16)):
                        return
                    if turns[0][1] == b"":
                        with lock:
                            told.append((turns, whole))
                    turns[-1] = turns[-1][0], turns[-1][1] + piece
                    connection.sendall(piece)
                else:
                    if not (piece := connection.recv(1 << 16)):
                        return
                    turns.append((piece, b""))
                    behind.sendall(piece)

    return serve


_OAKLEY_2 = """-----BEGIN DH PARAMETERS-----
MIGHAoGBAP//////////yQ/aoiFowjTExmKLgNwc0SkCTgiKZ8x0Agu+pjsTmyJR
Sgh5jjQE3e+VGbPNOkMbMCsKbfJfFDdP4TVtbVHCReSFtXZiXn7G9ExC6aY37WsL
/1y29Aa37e44a/taiZ+lrp8kEXxLH+ZJKGZR7OZTgf//////////AgEC
-----END DH PARAMETERS-----
"""
