"""Requests whose end is in doubt: each check finds two readers that disagree, and a guard is none."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded
from h2.exceptions import H2Error

from handfast.audit.insider_smuggling import CHECKS
from handfast.audit.model import Check, Verdict
from handfast.audit.runner import Means
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.insider_kit import (
    BAD,
    Lengths,
    Stream,
    answer,
    application,
    by_any_coding,
    by_coding,
    by_last_length,
    by_length,
    echo,
    found_at,
    path_of,
    proxy,
)
from tests.audit.kit import nginx_with, python_context, scripted
from tests.support.apps import App, echo_head
from tests.support.certs import Ca
from tests.support.guards import Running


@pytest.fixture
def known(authority: TestAuthority, client: TestLeaf) -> Means:
    return Means(client, authority)


def pages(head: bytes) -> bytes:
    """An application with one page."""
    return answer(b"the page") if path_of(head) == "/" else answer(b"no", "404 Not Found")


def by_first_length(head: bytes) -> int | None:
    found = re.search(rb"(?im)^content-length[ \t]*:[ \t]*\+?(\d+)", head)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("check", "front", "back"),
    [
        ("smuggled-by-length", by_length, by_coding),
        ("smuggled-by-length", by_coding, by_length),
        ("smuggled-by-length", by_last_length, by_first_length),
        ("smuggled-by-chunks", by_length, by_any_coding),
        ("smuggled-by-chunks", by_any_coding, by_length),
    ],
    ids=["CL.TE", "TE.CL", "CL.CL", "CL.TE-odd", "TE.CL-odd"],
)
@pytest.mark.parametrize("told", [True, False], ids=["echo", "pages"])
def test_two_readers_that_disagree(
    authority: TestAuthority, known: Means, tmp_path: Path, check: str, front: Lengths, back: Lengths, told: bool
) -> None:
    """A proxy and an application that frame requests otherwise give one client's answer to another."""
    respond = echo if told else pages
    with application(respond, back) as app, proxy(authority, tmp_path, app, lengths=front) as port:
        finding = found_at(f"insider.{check}", port, known, echo="/echo" if told else None)
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert "not its own" in finding.outcome.why or "more behind it" in finding.outcome.why


def strictly(head: bytes) -> bytes:
    """A rule that refuses every head in doubt."""
    names = re.findall(rb"(?m)^([^\r\n:]*):", head.partition(b"\r\n")[2])
    sound = all(re.fullmatch(rb"[A-Za-z-]+", name) for name in names) and not re.search(rb"[^\r]\n|\r[^\n]|\0", head)
    lengths = re.findall(rb"(?im)^content-length: *(.*)\r$", head)
    return head if sound and len(lengths) < 2 and not re.search(rb"(?im)^transfer-encoding", head) else BAD


def test_a_proxy_that_refuses_what_is_in_doubt(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """Who refuses every message in doubt, and ends the connection, passes."""
    context = python_context(authority, tmp_path, ssl.CERT_REQUIRED)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            head = Stream(tls).head()
            bad = strictly(head) is BAD or b"content-length" in head.lower()
            tls.sendall(BAD if bad else pages(head))

    with scripted(serve) as port:
        for check in ("smuggled-by-length", "smuggled-by-chunks"):
            finding = found_at(f"insider.{check}", port, known)
            assert finding.outcome.verdict is Verdict.PASS, finding.outcome


# HTTP/2.


@contextmanager
def translating(authority: TestAuthority, folder: Path, behind: int, *, careful: bool) -> Iterator[int]:
    """A proxy from HTTP/2 to HTTP/1.1 that writes fields as they come; a careful one resets what has a line end."""
    context = python_context(authority, folder, ssl.CERT_REQUIRED)
    context.set_alpn_protocols(["h2", "http/1.1"])
    upstream = Stream(socket.create_connection(("127.0.0.1", behind), 5))
    upstream.connection.settimeout(1.0)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            if tls.selected_alpn_protocol() == "h2":
                with suppress(H2Error):
                    over_http2(tls)
            else:
                stream = Stream(tls)
                while head := stream.head():
                    upstream.connection.sendall(head)
                    got = upstream.head()
                    tls.sendall(got + upstream.body(by_length(got)))
                    if b"connection: close" in head.lower():
                        return

    def over_http2(tls: ssl.SSLSocket) -> None:
        lax = H2Configuration(client_side=False, header_encoding=None, validate_inbound_headers=False)
        engine = H2Connection(lax)
        engine.initiate_connection()
        tls.sendall(engine.data_to_send())
        heads: dict[int, dict[bytes, bytes]] = {}
        bodies: dict[int, bytes] = {}
        while data := tls.recv(1 << 16):
            for event in engine.receive_data(data):
                number = getattr(event, "stream_id", 0) or 0
                if isinstance(event, RequestReceived):
                    heads[number], bodies[number] = dict(event.headers or ()), b""
                elif isinstance(event, DataReceived):
                    bodies[number] += event.data or b""
                elif isinstance(event, StreamEnded):
                    respond(engine, number, heads[number], bodies[number])
            tls.sendall(engine.data_to_send())

    def respond(engine: H2Connection, number: int, fields: dict[bytes, bytes], body: bytes) -> None:
        odd = any(re.search(rb"[\r\n ]|^transfer-encoding$", part) for pair in fields.items() for part in pair)
        if careful and (odd or (b"content-length" in fields and int(fields[b"content-length"]) != len(body))):
            engine.reset_stream(number, 1)
            return
        passed_on(engine, number, fields, body)

    def passed_on(engine: H2Connection, number: int, fields: dict[bytes, bytes], body: bytes) -> None:
        line = b"%s %s HTTP/1.1\r\nHost: %s\r\n" % (fields[b":method"], fields[b":path"], fields[b":authority"])
        lines = b"".join(b"%s: %s\r\n" % pair for pair in fields.items() if not pair[0].startswith(b":"))
        own = b"content-length" in fields or b"transfer-encoding" in fields
        framing = b"" if own else b"Content-Length: %d\r\n" % len(body)
        upstream.connection.sendall(line + lines + framing + b"\r\n" + body)
        got = upstream.head()
        engine.send_headers(number, [(b":status", got[9:12])])
        engine.send_data(number, upstream.body(by_length(got)), end_stream=True)

    try:
        with scripted(serve) as port:
            yield port
    finally:
        upstream.connection.close()


def test_lines_in_fields(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """A proxy that writes HTTP/2 fields into HTTP/1.1 as they are lets the client write lines of its own."""
    with application(echo) as app, translating(authority, tmp_path, app, careful=False) as port:
        finding = found_at("insider.smuggled-by-http2", port, known, echo="/echo")
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert finding.outcome.evidence[0].sent == "HTTP/2: CR LF in a value"


def test_who_looks_at_fields(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """A proxy that resets such streams passes; so does nginx, and a server without HTTP/2 is no case."""
    with application(echo) as app, translating(authority, tmp_path, app, careful=True) as port:
        careful = found_at("insider.smuggled-by-http2", port, known, echo="/echo")
    assert careful.outcome.verdict is Verdict.PASS, careful.outcome
    (tmp_path / "plain").mkdir()
    with nginx_with(authority, tmp_path / "plain", "ssl_verify_client on;") as port:
        plain = found_at("insider.smuggled-by-http2", port, known)
    assert plain.outcome.verdict is Verdict.NOT_APPLICABLE, plain.outcome


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
@pytest.mark.parametrize("told", [True, False], ids=["echo", "pages"])
def test_a_guard_holds(authority: TestAuthority, known: Means, check: Check, told: bool) -> None:
    """A guard refuses every message in doubt, and no answer goes astray."""
    ca = Ca(authority.certificate, authority.key)
    respond: Callable[[socket.socket, bytes], None] = echo_head if told else lambda s, head: s.sendall(pages(head))
    with App(respond) as app, Running(ca, app.address) as guard:
        port = int(guard.address.rpartition(":")[2])
        finding = found_at(check.id, port, known, echo="/echo" if told else None)
    right = (Verdict.PASS, Verdict.NOT_APPLICABLE) if check.id.endswith("http2") else (Verdict.PASS,)
    assert finding.outcome.verdict in right, finding.outcome


def test_every_check_has_a_server_with_its_hole() -> None:
    """No check of this theme is left out above."""
    tried = {"smuggled-by-length", "smuggled-by-chunks", "smuggled-by-http2"}
    assert {f"insider.{check}" for check in tried} == {check.id for check in CHECKS}
