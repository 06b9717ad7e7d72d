"""Handshakes between openssl and handfast's guard, and between openssl and openssl with handfast's certificates."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from tests.interop.conftest import Issued
from tests.support.apps import HELLO, App
from tests.support.certs import Ca
from tests.support.programs import curl, s_client, s_server, served

GUARD = ("--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt", "--legacy-certs")
CLIENT = ("-cert", "client.crt", "-key", "client.key", "-CAfile", "ca.crt")
LINES = "hello\nCLOSE\n"  # what `s_server -rev` turns round, and by which it ends


def hello_and_end(connection: socket.socket, _request: bytes) -> None:
    """Say hello and close, as a server that serves once."""
    connection.sendall(HELLO)
    connection.shutdown(socket.SHUT_WR)


def test_tls13_alone_is_spoken(classic: Path) -> None:
    """openssl gets TLS 1.3, and with TLS 1.2 the alert protocol_version, which the log explains."""
    with App() as app, served("guard", "--to", app.address, *GUARD, folder=classic) as guard:
        good = s_client(guard.port, *CLIENT, folder=classic)
        assert "New, TLSv1.3, Cipher is TLS_AES_128_GCM_SHA256" in good
        assert "Hello World" in good
        assert "alert protocol version" in s_client(guard.port, *CLIENT, "-tls1_2", folder=classic)
        assert guard.next("connection")["decision"] == "accept"
        assert guard.next("connection")["reason"] == "tls.version"
        assert app.connections == 1


def test_no_session_is_resumed(classic: Path, tmp_path: Path) -> None:
    """A session that openssl saved is not taken up again; openssl's own server takes it up."""

    def sessions(port: int, stdin: str) -> list[bool]:
        kept = tmp_path / f"session-{port}"
        words = (*CLIENT, "-tls1_3")
        first = s_client(port, *words, "-sess_out", kept, folder=classic, stdin=stdin)
        again = (*words, "-sess_in", kept) if kept.exists() else words
        return ["Reused, TLSv1.3" in said for said in (first, s_client(port, *again, folder=classic, stdin=stdin))]

    pair = ("-cert", "server.crt", "-key", "server.key", "-CAfile", "ca.crt", "-Verify", "1")
    with s_server(*pair, folder=classic) as (port, _):
        assert sessions(port, LINES) == [False, True]
    with App() as app, served("guard", "--to", app.address, *GUARD, folder=classic) as guard:
        assert sessions(guard.port, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") == [False, False]


def test_accepted_authorities_are_shown_unless_told_not_to(classic: Path) -> None:
    """openssl reads the names of the accepted authorities; with --no-ca-names there are none to read."""
    names = "Acceptable client certificate CA names\nCN = My CA\n"
    with App() as app:
        with served("guard", "--to", app.address, *GUARD, folder=classic) as guard:
            assert names in s_client(guard.port, *CLIENT, folder=classic)
        with served("guard", "--to", app.address, *GUARD, "--no-ca-names", folder=classic) as guard:
            said = s_client(guard.port, *CLIENT, folder=classic)
            assert "No client certificate CA names sent" in said
            assert "Hello World" in said


@pytest.mark.parametrize(
    ("shown", "alert", "number", "reason"),
    [
        (None, "certificate required", 116, "verify.no_certificate"),
        ("stranger", "unknown ca", 48, "verify.unknown_issuer"),
        ("expired", "certificate expired", 45, "verify.expired"),
    ],
)
def test_tcp_refusals_are_alerts(
    classic: Path, bad: dict[str, tuple[str, ...]], shown: str | None, alert: str, number: int, reason: str
) -> None:
    """In TCP mode the client reads the alert (RFC 8446 6.2) of its fault, the log has the reason, the app nothing."""
    pair = () if shown is None else ("-cert", f"{shown}.crt", "-key", "client.key")
    with App() as app, served("guard", "--to", f"tcp://{app.address}", *GUARD, folder=classic) as guard:
        assert guard.ready["url"].startswith("tls://")
        said = s_client(guard.port, *pair, "-CAfile", "ca.crt", folder=classic)
        assert re.search(rf"alert {alert}:.*SSL alert number {number}\b", said), said
        event = guard.next("connection")
        assert (event["decision"], event["reason"]) == ("deny", reason)
        assert event.get("presented") == (None if shown is None else "cn:client")
        words = tuple(f"-{word}" if word.startswith("-") else word for word in pair)
        assert f"alert {alert}" in curl(guard.url, *words, "--cacert", "ca.crt", folder=classic).complaint
        assert (app.connections, bytes(app.received)) == (0, b"")


def test_tcp_mode_carries_an_allowed_client(classic: Path) -> None:
    """In TCP mode the right client's bytes reach the app, and the app's answer comes back."""
    with App(hello_and_end) as app, served("guard", "--to", f"tcp://{app.address}", *GUARD, folder=classic) as guard:
        assert "Hello World" in s_client(guard.port, *CLIENT, folder=classic)
        assert guard.next("connection")["peer"] == "cn:client"
        assert app.received.startswith(b"GET / HTTP/1.1\r\n")


def test_the_end_of_a_tunnel_is_logged(classic: Path) -> None:
    """When the app ends first and the client follows, the log says how many bytes went each way."""
    with App(hello_and_end) as app, served("guard", "--to", f"tcp://{app.address}", *GUARD, folder=classic) as guard:
        assert "Hello World" in s_client(guard.port, *CLIENT, folder=classic)
        closed = guard.next("closed")
        assert (closed["bytes_in"], closed["bytes_out"]) == (len(app.received), len(HELLO))


def server_pair(issued: Issued, *more: str | Path) -> tuple[str | Path, ...]:
    """What s_server is told to serve with handfast's certificate and to ask clients for theirs."""
    own = ("-cert", "localhost.crt", "-key", "localhost.key", "-cert_chain", issued.issuer)
    return (*own, "-CAfile", issued.root, "-Verify", "1", "-verify_return_error", *more)


def client_pair(issued: Issued, name: str) -> tuple[str | Path, ...]:
    """What s_client is told to show, and to ask of the server."""
    own = ("-cert", f"{name}.crt", "-key", f"{name}.key", "-cert_chain", issued.issuer)
    return (*own, "-CAfile", issued.root, "-verify_return_error")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_openssl_accepts_both_sides(issued: Issued, name: str) -> None:
    """openssl's server takes handfast's client certificate, its client handfast's server certificate, by its names."""
    check = ("-verify_ip", name) if name[0].isdigit() else ("-verify_hostname", name)
    with s_server(*server_pair(issued), folder=issued.folder) as (port, server):
        said = s_client(port, *client_pair(issued, "web"), *check, folder=issued.folder, stdin=LINES)
        assert "Verify return code: 0 (ok)" in said
        assert "olleh" in said
        assert server.line("verify return:1")
    with s_server(*server_pair(issued), folder=issued.folder) as (port, _):
        wrong = ("-verify_hostname", "other.example")
        said = s_client(port, *client_pair(issued, "web"), *wrong, folder=issued.folder, stdin=LINES)
        assert "hostname mismatch" in said
        assert "olleh" not in said


def test_openssl_refuses_what_it_should(issued: Issued, tmp_path: Path) -> None:
    """openssl's server turns away no certificate, another authority's, and ours that is for servers."""
    cert, key = Ca.root().client().save(tmp_path, "stranger")
    with s_server(*server_pair(issued), folder=issued.folder) as (port, server):
        trust = ("-CAfile", issued.root)
        none = s_client(port, *trust, folder=issued.folder, stdin=LINES)
        assert "alert certificate required" in none
        stranger = s_client(port, *trust, "-cert", cert, "-key", key, folder=issued.folder, stdin=LINES)
        assert "alert unknown ca" in stranger
        misused = s_client(port, *client_pair(issued, "localhost"), folder=issued.folder, stdin=LINES)
        assert "alert unsupported certificate" in misused
        assert server.line("unsuitable certificate purpose")
        assert "olleh" not in none + stranger + misused
