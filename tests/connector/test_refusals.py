"""Servers that refuse us, and servers that we refuse: what the log says, and what the local client gets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from handfast.policy import parse_policy
from tests.connector.kit import Calling, Server, everything, generation
from tests.support.apps import App, get, refusing
from tests.support.certs import SERVER, Ca, Leaf
from tests.support.guards import Running
from tests.support.waiting import until

DAY = timedelta(days=1)
NOW = datetime.now(UTC)


def revoking(ca: Ca, leaf: Leaf, folder: Path) -> Path:
    """A revocation list that has one certificate on it."""
    entry = x509.RevokedCertificateBuilder().serial_number(leaf.certificate.serial_number).revocation_date(NOW).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.certificate.subject).add_revoked_certificate(entry)
    crl = builder.last_update(NOW - DAY).next_update(NOW + DAY).sign(ca.key, hashes.SHA256())
    path = folder / "list.crl"
    path.write_bytes(crl.public_bytes(serialization.Encoding.PEM))
    return path


def refusal(calling: Calling) -> dict[str, Any]:
    """What a raw client meets: a reset; and the event of it."""
    with calling.open() as plug, pytest.raises(ConnectionResetError):  # noqa: PT012  # it may come before it has spoken
        plug.sendall(b"\0raw")
        everything(plug)
    return calling.events.next("refused")


@pytest.mark.parametrize("pool", [0, 1])
@pytest.mark.parametrize(
    ("case", "cause", "words"),
    [
        ("expired", "certificate_expired", "the server refused our certificate: it expired 3 days ago"),
        ("other", "unknown_ca", "most likely the server does not know the authority that issued it, CN=Other"),
        ("server", "unsupported_certificate", "is not for client use (it is for server)"),
        ("early", "bad_certificate", "it is not valid yet; it will be in"),
        ("revoked", "certificate_revoked", "the server refused our certificate: it was revoked"),
    ],
)  # fmt: skip
def test_a_server_that_refuses_us_is_told_in_words(
    ca: Ca, tmp_path: Path, case: str, cause: str, words: str, pool: int
) -> None:
    """Each refusal that Python's own TLS server sends as an alert becomes a sentence, who must act, and a command; no
    connection is ever called connected before.
    """
    makers: dict[str, Callable[[], Leaf]] = {
        "expired": lambda: ca.client(not_before=NOW - 9 * DAY, not_after=NOW - 3 * DAY),
        "other": lambda: Ca.root("Other").client(),
        "server": lambda: ca.client(eku=[SERVER]),
        "early": lambda: ca.client(not_before=NOW + DAY, not_after=NOW + 2 * DAY),
        "revoked": ca.client,
    }
    leaf = makers[case]()
    crl = revoking(ca, leaf, tmp_path) if case == "revoked" else None
    with Server(ca, tmp_path, crl=crl) as server, Calling(server.address, generation(ca, leaf), pool) as calling:
        event = refusal(calling)
        assert words in event["detail"]
        assert (event["cause"], event["fault"]) == (
            cause,
            "the authority" if case in ("server", "revoked") else "the client",
        )
        assert event["remedy"]
        if case in ("expired", "revoked"):
            assert "handfast issue web" in event["remedy"]
        assert calling.of("connected") == []
        assert not server.peers


def test_a_good_client_is_connected_with_the_first_byte(ca: Ca, tmp_path: Path) -> None:
    """The negative twin: a certificate that is in order is offered, and connected with the server's first byte."""
    with Server(ca, tmp_path) as server, Calling(server.address, generation(ca, ca.client())) as calling:
        with calling.open() as plug:
            assert calling.events.next("offered")["server"] == "dns:localhost"
            assert calling.of("connected") == []
            plug.sendall(b"x")
            assert plug.recv(1) == b"x"
            assert calling.events.next("connected")["by"] == "the server's first byte"
        assert calling.of("refused") == []


def test_a_quiet_server_counts_as_having_taken_us_after_a_while(ca: Ca, tmp_path: Path) -> None:
    """With no byte and no objection for the quiet time, the log says that this is all that is known."""
    made = generation(ca, ca.client())
    with Server(ca, tmp_path) as server, Calling(server.address, made) as calling, calling.open():
        assert calling.events.next("connected")["by"] == "no objection within 0.5 s"


def test_with_nothing_sent_a_refusal_is_tried_once_more(ca: Ca, tmp_path: Path) -> None:
    """A client that has said nothing costs one more handshake before it is refused; one that has, costs none."""
    expired = generation(ca, ca.client(not_before=NOW - 9 * DAY, not_after=NOW - 3 * DAY))
    with Server(ca, tmp_path) as server, Calling(server.address, expired) as calling:
        with calling.open() as plug, pytest.raises(ConnectionResetError):
            everything(plug)
        assert calling.events.next("retry")["cause"] == "certificate_expired"
        assert calling.events.next("refused")["cause"] == "certificate_expired"
        assert server.connections == 2
        server.go.clear()
        with calling.open() as plug:
            plug.sendall(b"\0raw")
            until(lambda: server.connections == 3, "a handshake that waits")
            calling.call(lambda: None)  # and what was said is taken in meanwhile
            server.go.set()
            with pytest.raises(ConnectionResetError):
                everything(plug)
        assert calling.events.next("refused")["cause"] == "certificate_expired"
        assert server.connections == 3
        assert len(calling.of("retry")) == 1


def test_a_client_that_speaks_http_is_told_why(ca: Ca, tmp_path: Path) -> None:
    """A refused HTTP client gets 502 with the code and the id of the log's line, however its head comes."""
    expired = generation(ca, ca.client(not_before=NOW - 9 * DAY, not_after=NOW - 3 * DAY))
    with Server(ca, tmp_path) as server, Calling(server.address, expired) as calling:
        for cut in (len(get()), 1):
            server.go.clear()  # or it is refused before it has spoken
            with calling.open() as plug:
                for at in range(0, len(get()), cut):
                    plug.sendall(get()[at : at + cut])
                    if at + cut >= len(get()) // 2:
                        server.go.set()
                head, _, body = everything(plug).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
            event = calling.events.next("refused")
            assert json.loads(body) == {"error": "connect.refused", "id": event["id"]}
        server.go.clear()
        with calling.open() as plug:
            plug.sendall(get().replace(b"GET", b"HEAD"))
            server.go.set()
            assert everything(plug).endswith(b"\r\n\r\n")
        server.go.clear()
        with calling.open() as plug:  # an inline Redis command is no HTTP
            plug.sendall(b"GET key\r\n")
            server.go.set()
            with pytest.raises(ConnectionResetError):
                everything(plug)


@pytest.mark.parametrize(
    ("case", "cause", "words"),
    [
        ("name", "verify.name_mismatch", "the certificate is for dns:api.internal, not for dns:localhost"),
        ("ca", "verify.unknown_issuer", "was issued by CN=Other, which is not in the trust bundle"),
        ("expect", "verify.name_mismatch", "not for spiffe://test/api"),
    ],
)
def test_a_server_that_is_not_the_one_meant_gets_nothing(
    ca: Ca, tmp_path: Path, case: str, cause: str, words: str
) -> None:
    """The wrong name, authority or identity is refused in words, and no byte of the client reaches that server."""
    leaf = {"name": ca.server("api.internal"), "ca": Ca.root("Other").server(), "expect": ca.server()}[case]
    made = generation(ca, ca.client(), expect="spiffe://test/api" if case == "expect" else None)
    with Server(ca, tmp_path, leaf=leaf) as server, Calling(server.address, made, 1) as calling:
        event = refusal(calling)
        assert event["detail"].startswith("we do not trust the server: ")
        assert words in event["detail"]
        assert (event["cause"], event["reason"]) == (cause, "connect.untrusted")
        assert not server.peers


def test_a_server_that_is_away_or_plain_is_never_spoken_to_in_the_clear(ca: Ca, tmp_path: Path) -> None:
    """Nothing falls back to plain: a plain server gets a ClientHello, and none of the client's bytes."""
    made = generation(ca, ca.client())
    with refusing() as address:
        port = address.rpartition(":")[2]
        with Calling(f"localhost:{port}", made) as calling:
            event = refusal(calling)
            assert (event["reason"], event["fault"]) == ("connect.unreachable", "the network")
            assert f"localhost:{port}: connection refused" in event["detail"]

    def greet(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"220 smtp ready\r\n")

    with App(greet) as app:
        app_listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            plain, _ = app_listener.accept()
            with plain:
                plain.sendall(b"220 smtp ready\r\n")
                app.received += plain.recv(1 << 16)

        threading.Thread(target=serve, daemon=True).start()
        with app_listener, Calling(f"localhost:{app_listener.getsockname()[1]}", made) as calling:
            event = refusal(calling)
            assert "what answers there does not speak TLS" in event["detail"]
        assert b"raw" not in app.received


@pytest.mark.parametrize(("mode", "cause"), [("tcp", "closed"), ("http", None)])
def test_a_guard_whose_rules_do_not_allow_us(ca: Ca, mode: str, cause: str | None) -> None:
    """A guard that closes for its policy's sake is a refusal without a reason; one that speaks HTTP answers itself."""
    policy = parse_policy(["spiffe://test/other"])
    with (
        App() as app,
        Running(ca, f"{mode}://{app.address}", policy) as guard,
        Calling(guard.address.replace("127.0.0.1", "localhost"), generation(ca, ca.client())) as calling,
    ):
        if cause is None:
            assert b"policy.no_rule" in calling.fetch(get())
            assert calling.events.next("connected")
            event = calling.events.next("turned_away")
            assert event["cause"] == "policy.no_rule"
            assert event["remedy"].endswith(guard.events.next("request")["request"])
        else:
            event = refusal(calling)
            assert (event["reason"], event["cause"]) == ("connect.silent", cause)
            assert "does a rule allow this name?" in event["remedy"]
        assert app.connections == 0


def test_a_guard_lets_us_through(ca: Ca) -> None:
    """The negative twin, with a real guard: the same call passes where the rules allow it."""
    with (
        App() as app,
        Running(ca, app.address, parse_policy(["spiffe://test/web"])) as guard,
        Calling(guard.address.replace("127.0.0.1", "localhost"), generation(ca, ca.client()), 1) as calling,
    ):
        assert calling.fetch(get()).endswith(b"Hello World\n")
        assert guard.events.next("connection")["peer"] == "spiffe://test/web"
        calling.events.next("closed")
        assert "turned_away" not in {event["event"] for event in calling.events.all}


def test_a_certificate_that_expires_while_it_is_used_is_logged(ca: Ca, tmp_path: Path) -> None:
    """A connection goes on past its certificate's end for as long as the server lets it, and the log says so once."""
    with ExitStack() as stack:
        server = stack.enter_context(Server(ca, tmp_path))
        made = generation(ca, ca.client(not_after=datetime.now(UTC) + timedelta(seconds=4)))
        calling = stack.enter_context(Calling(server.address, made))
        plug = stack.enter_context(calling.open())
        event = calling.events.next("expired")
        assert "our certificate spiffe://test/web expired on" in event["detail"]
        assert "handfast issue web" in event["remedy"]
        plug.sendall(b"still here")
        assert plug.recv(100) == b"still here"
        until(lambda: len(calling.of("connected")) == 1, "the event of it")
        assert len(calling.of("expired")) == 1
