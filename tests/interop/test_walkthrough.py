"""The classic openssl and nginx walk-through with handfast in nginx's place, by openssl and curl themselves."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.interop.page import Page, Reader
from tests.support.apps import App, echo_head
from tests.support.programs import Browser, curl, environment, made, must, served

GUARD = ("--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt")
CLIENT = ("--cert", "client.crt", "--key", "client.key")
TRUST = ("--cacert", "ca.crt")


REASONS = ("expired", "not_yet_valid", "bad_signature", "unknown_issuer", "no_certificate")


def test_the_page_as_written(page: Page, tmp_path: Path) -> None:
    """Whoever types the page's commands in order sees what the page shows, and the browser shows the app."""
    programs, home = tmp_path / "bin", tmp_path / "home"
    for folder in (programs, home, tmp_path / "work"):
        folder.mkdir()
    script = programs / "handfast"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m handfast "$@"\n')
    script.chmod(0o755)
    path = environment()["PATH"]
    env = environment(HOME=str(home), PATH=f"{programs}:{path}", HANDFAST_HOME=str(home / "handfast"))
    with Reader(tmp_path / "work", env) as reader:
        for command in page.commands:
            reader.type(command)
        _, guard, better = reader.children
        assert "Hello World!" in Browser(home).page(
            f"https://localhost:{reader.ports['8443']}/", "--ignore-certificate-errors"
        )
        guard.stop()
        better.stop()
    log = "\n".join(guard.lines)
    assert 'detail="cn:client was issued by CN=Other CA, which is not in the trust bundle"' in log
    assert guard.lines[-1] == better.lines[-1] == "goodbye"
    assert "--legacy-certs" in "\n".join(better.lines)


def test_the_client_gets_hello_world(classic: Path) -> None:
    """curl with the client certificate is served by the app, in TLS 1.3, and known by its common name."""
    with App() as app, served("guard", "--to", app.address, *GUARD, "--legacy-certs", folder=classic) as guard:
        answer = curl(guard.url, *CLIENT, *TRUST, folder=classic)
        assert (answer.status, answer.body) == (200, "Hello World\n")
        event = guard.next("connection")
        assert (event["decision"], event["peer"], event["version"]) == ("accept", "cn:client", "TLSv1.3")
        assert app.connections == 1


@pytest.mark.parametrize("what", REASONS)
def test_others_are_refused_in_words(classic: Path, bad: dict[str, tuple[str, ...]], what: str) -> None:
    """A client without the right certificate is told the reason over HTTP, and the app is not even dialled."""
    reason = f"verify.{what}"
    with App() as app, served("guard", "--to", app.address, *GUARD, "--legacy-certs", folder=classic) as guard:
        answer = curl(guard.url, *bad[what], *TRUST, folder=classic)
        assert (answer.status, answer.error) == (403, reason)
        event = guard.next("connection")
        assert (event["decision"], event["reason"]) == ("deny", reason)
        assert event["id"] in answer.body
        assert event.get("presented") == ("cn:client" if bad[what] else None)
        assert (app.connections, bytes(app.received)) == (0, b"")


def test_without_the_flag_the_log_names_it(classic: Path) -> None:
    """Without --legacy-certs the same client is refused, and the log's remedy is the flag; the app sees nothing."""
    with App() as app, served("guard", "--to", app.address, *GUARD, folder=classic) as guard:
        answer = curl(guard.url, *CLIENT, *TRUST, folder=classic)
        assert (answer.status, answer.error) == (403, "verify.no_eku")
        event = guard.next("connection")
        assert "--legacy-certs" in event["remedy"]
        assert event["also"] == ["verify.no_name"]
        assert app.connections == 0


def test_a_certificate_with_purpose_and_name_needs_no_flag(classic: Path) -> None:
    """openssl's certificate with clientAuth and an email name is let in without the flag, by that name."""
    with App() as app, served("guard", "--to", app.address, *GUARD, folder=classic) as guard:
        answer = curl(guard.url, "--cert", "ann.crt", "--key", "client.key", *TRUST, folder=classic)
        assert answer.status == 200
        assert guard.next("connection")["peer"] == "email:ann@example.com"


def test_the_server_is_known_by_its_common_name_alone(classic: Path) -> None:
    """curl takes the certificate without a SAN for localhost, as the walk-through does, and not for the address."""
    with App() as app, served("guard", "--to", app.address, *GUARD, "--legacy-certs", folder=classic) as guard:
        by_address = curl(f"https://127.0.0.1:{guard.port}/", *CLIENT, *TRUST, folder=classic)
        assert by_address.status == 0
        assert "does not match target host name" in by_address.complaint
        assert app.connections == 0
        assert curl(guard.url, *CLIENT, *TRUST, folder=classic).status == 200


@pytest.mark.parametrize(("rule", "status"), [("cn:client", 200), ("cn:other", 403)])
def test_a_rule_can_name_the_common_name(classic: Path, rule: str, status: int) -> None:
    """A cn: rule lets the client in by its common name; another name does not."""
    words = (*GUARD, "--legacy-certs", "--allow", rule)
    with App() as app, served("guard", "--to", app.address, *words, folder=classic) as guard:
        answer = curl(guard.url, *CLIENT, *TRUST, folder=classic)
        assert answer.status == status, answer
        assert app.connections == (status == 200)


def test_the_app_is_told_who_it_is(classic: Path) -> None:
    """The app gets the client's certificate and name from the guard, whatever the client writes itself."""
    forged = [
        word for name in ("Client-Cert", "client_identity", "X-SSL-Client-Verify") for word in ("-H", f"{name}: x")
    ]
    with App(echo_head) as app, served("guard", "--to", app.address, *GUARD, "--legacy-certs", folder=classic) as guard:
        head = curl(guard.url, *CLIENT, *TRUST, *forged, folder=classic).body.lower()
    der = x509.load_pem_x509_certificate((classic / "client.crt").read_bytes()).public_bytes(serialization.Encoding.DER)
    assert head.count("client-cert:") == 1
    assert f"client-cert: :{base64.b64encode(der).decode().lower()}:" in head
    assert "cn:client" in head
    assert "client_identity" not in head


def test_the_authority_can_be_taken_over(classic: Path, tmp_path: Path) -> None:
    """After `authority import`, what handfast issues verifies against openssl's ca.crt and opens the guard."""
    state, out = tmp_path / "state", tmp_path / "out"
    shown = made("authority", "import", "--cert", "ca.crt", "--key", "ca.key", "--state", state, folder=classic)
    assert shown["root"]["name"] == shown["issuer"]["name"] == "cn:My CA"
    made("issue", "web", "--out", out, "--state", state, folder=classic)
    web = ("--cert", out / "web.crt", "--key", out / "web.key")
    assert must("openssl", "verify", "-purpose", "sslclient", "-CAfile", "ca.crt", web[1], folder=classic)
    with App() as app, served("guard", "--to", app.address, *GUARD, folder=classic) as guard:
        assert curl(guard.url, *web, *TRUST, folder=classic).status == 200
        assert guard.next("connection")["peer"] == "spiffe://handfast.internal/web"
