"""Sessions and connections that outlast trust: each check finds its hole, and a guard has none."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handfast.audit.insider_sessions import CHECKS
from handfast.audit.model import Check, Verdict
from handfast.audit.runner import Means, Revoker, Target
from handfast.pki.revocation import Revocations
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.kit import BODY, found, nginx_with, python_context, scripted
from tests.support.apps import App
from tests.support.certs import Ca
from tests.support.guards import Running

KEPT = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY.encode())
Change = Callable[[ssl.SSLContext], None]


def psk(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3


def ticket(context: ssl.SSLContext) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_2


def session_id(context: ssl.SSLContext) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_TICKET


def no_resumption(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0


def keeping(context: ssl.SSLContext) -> Callable[[socket.socket], None]:
    """Answer request after request, for as long as the client likes."""

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            while tls.recv(4096):
                tls.sendall(KEPT)
            tls.unwrap()  # else OpenSSL forgets the session

    return serve


@contextmanager
def python_with(authority: TestAuthority, folder: Path, change: Change) -> Iterator[tuple[int, int]]:
    """Python's ssl, which resumes whatever it is offered; two listeners with one context."""
    context = python_context(authority, folder, ssl.CERT_REQUIRED)
    change(context)
    serve = keeping(context)
    with scripted(serve) as port, scripted(serve) as other:
        yield port, other


def means(authority: TestAuthority, client: TestLeaf, other: int, revoke: Callable[[TestLeaf], None]) -> Means:
    revoker = Revoker(lambda names: authority.client(*names), revoke)
    return Means(client, authority, revoker=revoker, other=Target("127.0.0.1", other, "localhost"))


RESUMED = ("resumed-under-another-name", "resumed-after-expiry", "resumed-after-revocation", "resumed-elsewhere")
KEEPING = ("kept-past-expiry", "kept-past-revocation")
HOLES = [(check, change) for check in RESUMED for change in (psk, ticket, session_id)]


@pytest.mark.parametrize(("check", "change"), [*HOLES, *((check, no_resumption) for check in KEEPING)])
def test_the_hole_is_found(
    authority: TestAuthority, client: TestLeaf, tmp_path: Path, check: str, change: Change
) -> None:
    """Python's ssl resumes past expiry and revocation, and at another listener; and nothing ends its connections."""
    with python_with(authority, tmp_path, change) as (port, other):
        finding = found(f"insider.{check}", port, means(authority, client, other, lambda _: None))
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert all(item.sent and item.received for item in finding.outcome.evidence)


@pytest.mark.parametrize("check", RESUMED)
def test_who_resumes_nothing_passes(authority: TestAuthority, client: TestLeaf, tmp_path: Path, check: str) -> None:
    """A server that gives no tickets cannot be entered by them."""
    with python_with(authority, tmp_path, no_resumption) as (port, other):
        finding = found(f"insider.{check}", port, means(authority, client, other, lambda _: None))
    assert finding.outcome.verdict is Verdict.PASS, finding.outcome
    assert finding.outcome.why == "the server resumes no session"


def test_who_closes_after_each_answer_keeps_nothing(authority: TestAuthority, client: TestLeaf, tmp_path: Path) -> None:
    """A server without keep-alive has no connection that could outlast anything."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;", "keepalive_timeout 0;") as port:
        finding = found("insider.kept-past-expiry", port, means(authority, client, port, lambda _: None))
    assert finding.outcome.verdict is Verdict.NOT_APPLICABLE, finding.outcome


def test_every_check_has_a_server_with_its_hole() -> None:
    """No check of this theme is left out above."""
    assert {f"insider.{check}" for check in (*RESUMED, *KEEPING)} == {check.id for check in CHECKS}


@pytest.mark.parametrize("tls12", [False, True], ids=["tls13", "tls12"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_a_guard_holds(authority: TestAuthority, client: TestLeaf, check: Check, tls12: bool) -> None:
    """A guard resumes nothing, and ends connections with what they stand on."""
    ca = Ca(authority.certificate, authority.key)
    with (
        App(lambda connection, _: connection.sendall(KEPT)) as app,
        Running(ca, app.address, tls12=tls12) as guard,
        Running(ca, app.address, tls12=tls12) as second,
    ):
        port, other = (int(one.address.rpartition(":")[2]) for one in (guard, second))
        finding = found(check.id, port, means(authority, client, other, lambda leaf: revoked(guard, leaf)))
    assert finding.outcome.verdict is Verdict.PASS, finding.outcome


def revoked(guard: Running, leaf: TestLeaf) -> None:
    """Tell the guard of a revocation, as the authority's feed does."""
    taken = leaf.certificate
    serials = frozenset({(taken.issuer.public_bytes(), taken.serial_number)})
    guard.swap(guard.snapshot(revocations=Revocations(serials)))
