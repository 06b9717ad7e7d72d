"""Certificates that a trusted authority signed and should not have: each check finds its hole, and a guard has none."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from handfast.audit.insider_certificates import CHECKS
from handfast.audit.model import Check, Verdict
from handfast.audit.runner import Means, Revoker
from handfast.policy import parse_policy
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.kit import ANSWER, credulous, found, nginx_with, openssl_with, python_context, scripted
from tests.audit.test_insider_sessions import revoked
from tests.support.apps import App
from tests.support.certs import Ca
from tests.support.guards import Running

Server = Callable[[TestAuthority, Path], Iterator[int]]


def verifies_nothing(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """tlslite-ng asks for a certificate and verifies no chain."""
    with scripted(credulous(authority)) as port:
        yield port


def nginx_as_documented(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """nginx with ssl_verify_client on and a deep chain allowed, and no CRL."""
    with nginx_with(authority, folder, "ssl_verify_client on;", "ssl_verify_depth 200;") as port:
        yield port


def does_not_look_at_the_time(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with _verifying(authority, folder, "-no_check_time") as port:
        yield port


def ignores_critical(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with _verifying(authority, folder, "-ignore_critical") as port:
        yield port


def takes_any_purpose(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with _verifying(authority, folder, "-purpose", "any") as port:
        yield port


def takes_weak_ones(authority: TestAuthority, folder: Path) -> Iterator[int]:
    with _verifying(authority, folder, "-cipher", "ALL:@SECLEVEL=0", "-auth_level", "0") as port:
        yield port


def reads_names_of_every_kind(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Looks for the accepted name among all that is in the certificate, whatever kind it says to be."""
    with scripted(_looking_for(authority, folder, b"spiffe://test/web")) as port:
        yield port


def one_at_a_time(authority: TestAuthority, folder: Path) -> Iterator[int]:
    """Serves one client after the other, and takes long for big certificates."""
    context, turn = python_context(authority, folder, ssl.CERT_REQUIRED), threading.Lock()

    def serve(connection: socket.socket) -> None:
        with turn:
            try:
                tls = context.wrap_socket(connection, server_side=True)
            except ssl.SSLError:
                time.sleep(1.2)  # what it costs to find out
                return
            with tls:
                if len(tls.getpeercert(True) or b"") > 10_000:
                    time.sleep(1.2)
                tls.recv(4096)
                tls.sendall(ANSWER)

    with scripted(serve) as port:
        yield port


@contextmanager
def _verifying(authority: TestAuthority, folder: Path, *words: str) -> Iterator[int]:
    given = ("-Verify", "5", "-verify_return_error", "-CAfile", str(authority.save(folder)), *words)
    with openssl_with(authority, folder, *given) as port:
        yield port


BROKEN: dict[str, tuple[Server, ...]] = {
    "expired": (verifies_nothing, does_not_look_at_the_time),
    "not-yet-valid": (verifies_nothing, does_not_look_at_the_time),
    "revoked": (nginx_as_documented,),
    "wrong-usage": (verifies_nothing, takes_any_purpose),
    "no-usage": (nginx_as_documented,),
    "authority-as-client": (verifies_nothing, takes_any_purpose),
    "path-length": (verifies_nothing,),
    "name-constraints": (verifies_nothing,),
    "issuer-not-ca": (verifies_nothing,),
    "weak-keys": (takes_weak_ones,),
    "weak-hashes": (takes_weak_ones,),
    "malformed-names": (nginx_as_documented,),
    "two-names": (nginx_as_documented,),
    "name-types": (reads_names_of_every_kind,),
    "critical-extension": (verifies_nothing, ignores_critical),
    "duplicate-extension": (verifies_nothing,),
    "long-chain": (verifies_nothing, nginx_as_documented),
    "huge-keys": (one_at_a_time,),
    "huge-names": (one_at_a_time,),
}


@pytest.mark.parametrize(
    ("check", "server"),
    [(check, server) for check, servers in BROKEN.items() for server in servers],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_hole_is_found(
    authority: TestAuthority, client: TestLeaf, tmp_path: Path, check: str, server: Server
) -> None:
    """The check fails, with evidence of what was sent and what came back."""
    taken_back = authority.client() if check == "revoked" else None
    with contextmanager(server)(authority, tmp_path) as port:
        finding = found(f"insider.{check}", port, Means(client, authority, revoked=taken_back))
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert finding.failed
    assert all(item.sent and item.received for item in finding.outcome.evidence)


def test_a_second_authority_that_speaks_for_the_first(authority: TestAuthority, tmp_path: Path) -> None:
    """A server that looks for a name in the certificates of two authorities takes either's."""
    second = TestAuthority.root("Second Root")
    serve = _looking_for(authority, tmp_path, b"spiffe://test/web", second)
    with scripted(serve) as port:
        finding = found("insider.two-authorities", port, Means(authority.client(), second))
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome


def test_a_second_authority_that_does_not(authority: TestAuthority, tmp_path: Path) -> None:
    """A server that binds the name to its authority does not; and one client by one authority is no case."""
    second = TestAuthority.root("Second Root")
    serve = _looking_for(authority, tmp_path, b"spiffe://test/web", second, bound=True)
    with scripted(serve) as port:
        right = found("insider.two-authorities", port, Means(authority.client(), second))
        same = found("insider.two-authorities", port, Means(authority.client(), authority))
    assert right.outcome.verdict is Verdict.PASS, right.outcome
    assert same.outcome.verdict is Verdict.NOT_APPLICABLE


def test_every_check_has_a_server_with_its_hole() -> None:
    """No check of this theme is left out above."""
    assert {f"insider.{check}" for check in BROKEN} | {"insider.two-authorities"} == {check.id for check in CHECKS}


@pytest.fixture(scope="module", params=[False, True], ids=["tls13", "tls12"])
def guarded(authority: TestAuthority, request: pytest.FixtureRequest) -> Iterator[Running]:
    """A guard that lets one name in."""
    with (
        App(lambda connection, _: connection.sendall(ANSWER)) as app,
        Running(
            Ca(authority.certificate, authority.key),
            app.address,
            parse_policy(["allow spiffe://test/web"]),
            tls12=request.param,
        ) as guard,
    ):
        yield guard


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check.id != "insider.two-authorities"], ids=lambda check: check.id
)
def test_a_guard_holds(authority: TestAuthority, client: TestLeaf, guarded: Running, check: Check) -> None:
    """A guard that lets one name in beats back every one of them."""
    revoker = Revoker(lambda names: authority.client(*names), lambda leaf: revoked(guarded, leaf))
    port = int(guarded.address.rpartition(":")[2])
    finding = found(check.id, port, Means(client, authority, revoker=revoker))
    assert finding.outcome.verdict is Verdict.PASS, finding.outcome


def test_a_good_client_that_is_refused_shows_nothing(authority: TestAuthority, tmp_path: Path) -> None:
    """Where the good certificate does not get in either, nothing passes."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        finding = found("insider.expired", port, Means(None, TestAuthority.root("Somebody else's")))
    assert finding.outcome.verdict is Verdict.INCONCLUSIVE
    assert "does not get in" in finding.outcome.why


def test_a_server_that_takes_every_name_has_none_to_confuse(
    authority: TestAuthority, client: TestLeaf, tmp_path: Path
) -> None:
    """Where names decide nothing, their types cannot be confused, and the report says so."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        finding = found("insider.name-types", port, Means(client, authority))
    assert finding.outcome.verdict is Verdict.NOT_APPLICABLE


# Parts of such servers.


def _looking_for(
    authority: TestAuthority, folder: Path, name: bytes, second: TestAuthority | None = None, bound: bool = False
) -> Callable[[socket.socket], None]:
    """Let in whose certificate has the name in it anywhere; if `bound`, only of the first authority."""
    context = python_context(authority, folder, ssl.CERT_REQUIRED)
    if second is not None:
        context.load_verify_locations(cadata=second.pem.decode())

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            shown = tls.getpeercert(True)
            tls.recv(4096)
            issuer = x509.load_der_x509_certificate(shown or b"").issuer
            known = not bound or issuer == authority.certificate.subject
            tls.sendall(ANSWER if name in (shown or b"") and known else _NO)

    return serve


_NO = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
