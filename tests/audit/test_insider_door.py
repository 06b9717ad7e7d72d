"""Many wrong certificates at the door: each check finds its hole, and a guard has none."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from dataclasses import replace
from pathlib import Path

from handfast.audit.insider_door import CHECKS
from handfast.audit.model import Verdict
from handfast.audit.runner import Means
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.insider_kit import found_at
from tests.audit.kit import ANSWER, FAST, answering, credulous, nginx_with, python_context, scripted
from tests.support.apps import App
from tests.support.programs import served
from tests.support.waiting import until

FEW = replace(FAST, load=0.2)


def test_a_server_that_a_hundred_refusals_wear_down(authority: TestAuthority, client: TestLeaf, tmp_path: Path) -> None:
    """A server that takes its time over each refusal, one after the other, has none for good clients."""
    context, turn = python_context(authority, tmp_path, ssl.CERT_REQUIRED), threading.Lock()

    def serve(connection: socket.socket) -> None:
        with turn:
            try:
                tls = context.wrap_socket(connection, server_side=True)
            except ssl.SSLError:
                time.sleep(0.7)  # what a refusal costs here
                return
            with tls:
                tls.recv(4096)
                tls.sendall(ANSWER)

    with scripted(serve) as port:
        finding = found_at("insider.brute-force", port, Means(client, authority), FEW)
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert "good client" in finding.outcome.why


def test_a_server_that_one_of_many_gets_into(authority: TestAuthority, client: TestLeaf) -> None:
    """Who lets a wrong one in has no door."""
    with scripted(credulous(authority)) as port:
        finding = found_at("insider.brute-force", port, Means(client), FEW)
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert "got in" in finding.outcome.why


def test_a_server_that_forgets_nobody(authority: TestAuthority, client: TestLeaf, tmp_path: Path) -> None:
    """A server that keeps something of every refused client grows with each."""
    context, kept = python_context(authority, tmp_path, ssl.CERT_REQUIRED), []

    def serve(connection: socket.socket) -> None:
        try:
            answering(context)(connection)
        except ssl.SSLError:
            kept.append(bytearray(os.urandom(256 << 10)))
            raise

    with scripted(serve) as port:
        finding = found_at("insider.flat-memory", port, Means(client, authority, pid=os.getpid()), FEW)
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert "are kept of every refused client" in finding.outcome.why


def test_nginx_holds(authority: TestAuthority, client: TestLeaf, tmp_path: Path) -> None:
    """nginx answers good clients meanwhile, and its memory stays flat."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        pid = _written(tmp_path / "nginx.pid")
        for check in CHECKS:
            finding = found_at(check.id, port, Means(client, authority, pid=pid), FEW)
            assert finding.outcome.verdict is Verdict.PASS, finding.outcome


def test_a_guard_holds(authority: TestAuthority, client: TestLeaf, tmp_path: Path) -> None:
    """A guard, in a process of its own, does the same."""
    cert, key = authority.server().save(tmp_path, "server")
    words = ("--cert", cert, "--key", key, "--client-ca", authority.save(tmp_path))
    with (
        App(lambda connection, _: connection.sendall(ANSWER)) as app,
        served("guard", "--to", app.address, *words, "--allow", "any", folder=tmp_path) as guard,
    ):
        pid = guard.child._process.pid
        for check in CHECKS:
            finding = found_at(check.id, guard.port, Means(client, authority, pid=pid), FEW)
            assert finding.outcome.verdict is Verdict.PASS, finding.outcome


def test_memory_that_cannot_be_read(authority: TestAuthority, client: TestLeaf, tmp_path: Path) -> None:
    """A process that is not there is no flat one."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        finding = found_at("insider.flat-memory", port, Means(client, authority, pid=2**22 + 1), FEW)
    assert finding.outcome.verdict is Verdict.NOT_APPLICABLE


def test_every_check_has_a_server_with_its_hole() -> None:
    """No check of this theme is left out above."""
    assert {check.id for check in CHECKS} == {"insider.brute-force", "insider.flat-memory"}


def _written(path: Path) -> int:
    """The number in a file that a program writes as it starts."""
    until(lambda: path.exists() and path.read_text().strip(), f"{path}")
    return int(path.read_text())
