"""Every refusal, met for real: from the client's side at real servers, and from the server's side with real clients."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from handfast.errors import Reason
from handfast.explain.model import Ending, Known, Sure, Who
from handfast.explain.probe import call
from handfast.explain.story import as_json, explain
from handfast.policy import parse_policy
from tests.explain.kit import (
    CLIENTS,
    HOUR,
    ISSUER,
    LIMITS,
    NOW,
    OTHER,
    ROOT,
    Files,
    called,
    caller,
    plain_server,
    revocation_list,
    watching,
)
from tests.support.apps import App
from tests.support.certs import CLIENT, Leaf
from tests.support.guards import Running
from tests.support.programs import curl, free_port, nginx, s_client, s_server

MUST = ("-CAfile", "ca.crt", "-Verify", "3", "-verify_return_error")
FILES = ("-cert", "server.crt", "-key", "server.key")

# Certificate -> the reason that is to be found, and whether it is found for certain.
REFUSED = {
    "none": (Reason.VERIFY_NO_CERTIFICATE, Sure.CERTAIN),
    "other": (Reason.VERIFY_UNKNOWN_ISSUER, Sure.CERTAIN),
    "expired": (Reason.VERIFY_EXPIRED, Sure.CERTAIN),
    "early": (Reason.VERIFY_NOT_YET_VALID, Sure.CERTAIN),
    "purpose": (Reason.VERIFY_PURPOSE, Sure.CERTAIN),
    "constraint": (Reason.VERIFY_NAME_CONSTRAINT, Sure.CERTAIN),
}


@pytest.mark.parametrize("only_tls12", [False, True])
def test_openssl_refuses_and_the_cause_is_found(tmp_path: Path, only_tls12: bool) -> None:
    """A good client gets through `openssl s_server`; each bad one is refused for the cause that is named."""
    Files(tmp_path)
    with s_server(*FILES, *MUST, folder=tmp_path) as (port, _):
        good = called(port, CLIENTS["good"], only_tls12=only_tls12)
        assert good.verdict.worked, good.verdict
        assert good.version == ("TLS 1.2" if only_tls12 else "TLS 1.3")
        assert len(good.added.messages) == 3
        for name, (reason, sure) in REFUSED.items():
            found = called(port, CLIENTS[name], only_tls12=only_tls12)
            likely = Sure.LIKELY if name == "none" and only_tls12 else sure
            assert (found.verdict.worked, found.verdict.reason, found.verdict.sure) == (False, reason, likely), name
            assert found.verdict.who in (Who.CLIENT, Who.AUTHORITY)
            assert found.verdict.text
            assert found.verdict.command


def test_a_missing_a_stale_and_a_telling_revocation_list_are_told_apart(tmp_path: Path) -> None:
    """The same client: no list makes OpenSSL say unknown_ca, an old one certificate_expired; both are seen through."""
    Files(tmp_path)
    leaf = CLIENTS["good"]
    assert leaf is not None
    lists = {
        "none": (None, Reason.VERIFY_CRL_MISSING, Sure.LIKELY),
        "stale": (revocation_list(ROOT, next_update=NOW - HOUR), Reason.VERIFY_CRL_STALE, Sure.LIKELY),
        "revoked": (revocation_list(ROOT, leaf.certificate.serial_number), Reason.VERIFY_REVOKED, Sure.CERTAIN),
        "fresh": (revocation_list(ROOT), None, Sure.CERTAIN),
    }
    for name, (pem, reason, sure) in lists.items():
        words = ["-crl_check"]
        if pem is not None:
            (tmp_path / "list.pem").write_bytes(pem)
            words += ["-CRL", "list.pem"]
        with s_server(*FILES, *MUST, *words, folder=tmp_path) as (port, _):
            verdict = called(port, leaf).verdict
        assert (verdict.worked, verdict.reason, verdict.sure) == (reason is None, reason, sure), name
        assert "unknown_ca" in verdict.text or name != "none"


def test_a_missing_intermediate_is_named_as_a_cause(tmp_path: Path) -> None:
    """A client that leaves its intermediate out is told so; with it, it gets through."""
    Files(tmp_path)
    whole = ISSUER.client()
    bare = Leaf(whole.certificate, whole.key)
    with s_server(*FILES, *MUST, folder=tmp_path) as (port, _):
        verdict = called(port, bare).verdict
        assert verdict.reason is Reason.VERIFY_UNKNOWN_ISSUER
        assert any("intermediate" in other for other in verdict.also)
        assert called(port, whole).verdict.worked


@pytest.mark.parametrize(
    ("words", "offer", "reason", "text"),
    [
        (("-tls1_3",), {"only_tls12": True}, Reason.TLS_VERSION, "TLS 1.2"),
        (("-cipher", "AES128-SHA", "-tls1_2"), {}, Reason.TLS_NO_COMMON, "cipher suite"),
        (("-groups", "brainpoolP256r1", "-tls1_3"), {}, Reason.TLS_NO_COMMON, "group"),
        (("-alpn", "h2"), {}, Reason.TLS_NO_COMMON, "http/1.1"),
        (
            (
                "-servername",
                "other.example",
                "-servername_fatal",
                *FILES,
                "-cert2",
                "server.crt",
                "-key2",
                "server.key",
            ),
            {},
            Reason.TLS_UNKNOWN_NAME,
            "localhost",
        ),
    ],
    ids=["version", "cipher", "group", "alpn", "sni"],
)
def test_what_two_sides_do_not_share_is_named(
    tmp_path: Path, words: tuple[str, ...], offer: dict[str, Any], reason: Reason, text: str
) -> None:
    """A server that shares no version, cipher, group, protocol or name with the client refuses; each is named."""
    Files(tmp_path)
    with s_server(*FILES, *MUST, *words, folder=tmp_path) as (port, _):
        verdict = called(port, CLIENTS["good"], **offer).verdict
    assert (verdict.worked, verdict.reason) == (False, reason), verdict
    assert text in verdict.text


@pytest.mark.parametrize(
    ("server", "name", "reason", "who"),
    [
        (ROOT.server(), "localhost", None, Who.NOBODY),
        (ROOT.server(), "else.example", Reason.VERIFY_NAME_MISMATCH, Who.AUTHORITY),
        (OTHER.server(), "localhost", Reason.VERIFY_UNKNOWN_ISSUER, Who.SERVER),
        (ROOT.server(not_before=NOW - 9 * HOUR, not_after=NOW - HOUR), "localhost", Reason.VERIFY_EXPIRED, Who.SERVER),
        (ROOT.server(eku=[CLIENT]), "localhost", Reason.VERIFY_PURPOSE, Who.AUTHORITY),
    ],
    ids=["good", "name", "issuer", "expired", "purpose"],
)
def test_a_server_that_no_client_should_trust_is_found_out(
    tmp_path: Path, server: Leaf, name: str, reason: Reason | None, who: Who
) -> None:
    """The server's chain is judged by the bundle that is given, for the name that is asked for."""
    Files(tmp_path)
    server.save(tmp_path, "server")
    with s_server(*FILES, "-CAfile", "ca.crt", "-Verify", "3", folder=tmp_path) as (port, _):
        verdict = called(port, CLIENTS["good"], name=name, server_name=name).verdict
    assert (verdict.worked, verdict.reason, verdict.who) == (reason is None, reason, who)


def test_a_server_that_asks_for_no_certificate_is_not_mutual(tmp_path: Path) -> None:
    """Plain TLS works, and is said not to be mutual; an optional certificate is said to be optional."""
    Files(tmp_path)
    with s_server(*FILES, folder=tmp_path) as (port, _):
        verdict = called(port, CLIENTS["good"]).verdict
        assert (verdict.worked, verdict.reason) == (True, Reason.SEEN_NOT_MUTUAL)
    with s_server(*FILES, "-CAfile", "ca.crt", "-verify", "3", folder=tmp_path) as (port, _):
        verdict = called(port, None).verdict
        assert (verdict.worked, verdict.reason) == (True, None)
        assert "optional" in verdict.text


def test_nginx_answers_in_http_and_is_understood(tmp_path: Path) -> None:
    """nginx finishes the handshake and answers 400; no certificate and a bad one are told apart."""
    Files(tmp_path)
    port = free_port()
    server = (
        f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate server.crt; ssl_certificate_key server.key;"
        " ssl_client_certificate ca.crt; ssl_verify_client on; location / { return 200 hello; } }"
    )
    with nginx(server, tmp_path):
        good = called(port, CLIENTS["good"])
        assert good.verdict.worked
        assert "HTTP answered 200" in good.verdict.text
        for name in ("none", "other", "expired"):
            verdict = called(port, CLIENTS[name]).verdict
            assert (verdict.worked, verdict.reason) == (False, REFUSED[name][0]), name
            assert "nginx" in verdict.text
            assert verdict.sure is (Sure.CERTAIN if name == "none" else Sure.LIKELY)


@pytest.mark.parametrize("server", ["nginx", "openssl"])
def test_an_authority_that_is_not_named_outweighs_an_expiry(tmp_path: Path, server: str) -> None:
    """A certificate that is expired and of an authority that the server does not name: both are told, the authority
    first, for a renewal would be refused too. Either fault alone is told alone.
    """
    Files(tmp_path)
    both = OTHER.client(not_before=NOW - 9 * HOUR, not_after=NOW - HOUR)
    with _nginx(tmp_path) if server == "nginx" else s_server(*FILES, *MUST, folder=tmp_path) as (port, _):
        verdict = called(port, both).verdict
        assert verdict.reason is Reason.VERIFY_UNKNOWN_ISSUER
        assert verdict.besides == ("the client's certificate has expired [verify.expired]",)
        assert ("refused next" in verdict.text) is (server == "nginx")
        for name in ("other", "expired"):
            verdict = called(port, CLIENTS[name]).verdict
            assert (verdict.reason, verdict.besides) == (REFUSED[name][0], ()), name


@contextmanager
def _nginx(folder: Path) -> Iterator[tuple[int, None]]:
    """nginx that asks for a client certificate of the authority."""
    port = free_port()
    server = (
        f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate server.crt; ssl_certificate_key server.key;"
        " ssl_client_certificate ca.crt; ssl_verify_client on; location / { return 200 hello; } }"
    )
    with nginx(server, folder):
        yield port, None


def test_what_we_asked_and_were_answered_is_told(tmp_path: Path) -> None:
    """Our request, why it waited, and the answer stand at their records; where nothing was sent, nothing is told. The
    server is said not to be judged where it was not.
    """
    Files(tmp_path)
    with _nginx(tmp_path) as (port, _):
        judged = called(port, CLIENTS["good"])
        bare = called(port, None, bundle=None)
        silent = explain(call("127.0.0.1", port, caller(CLIENTS["good"]), LIMITS), Known(datetime.now(UTC)))
    said = [step.purpose for step in judged.steps if step.name == "application data"]
    assert said[0].startswith("Our request: GET /. It waited 0.")
    assert said[1] == "The answer: 200."
    assert [step.purpose for step in bare.steps if step.name == "application data"][-1] == "The answer: 400."
    assert not any("Our request" in step.purpose for step in silent.steps)
    assert "not judged" not in judged.verdict.text
    assert "The server's certificate was not judged" in bare.verdict.text


def test_a_clients_path_is_not_told() -> None:
    """From the server's side the client's method is told, and not its path, which may hold a secret."""
    good = CLIENTS["good"]
    assert good is not None
    with watching() as watched:
        request = b"GET /?token=geheim HTTP/1.1\r\nHost: localhost\r\n\r\n"
        call("127.0.0.1", watched.port, caller(good), LIMITS, request)
    said = [step.purpose for step in watched.found[0].steps if step.name == "application data"]
    assert said == ["The client's request: GET.", "Our answer: 204."]
    assert "geheim" not in str(as_json(watched.found[0]))


def test_a_guard_gives_its_reason_and_it_is_understood() -> None:
    """A guard's short code becomes the cause: certificates that it refuses, and names that no rule allows."""
    with App() as app, Running(ROOT, app.address, policy=parse_policy(["spiffe://test/web"])) as guard:
        port = int(guard.address.rpartition(":")[2])
        assert called(port, CLIENTS["good"]).verdict.worked
        for name in ("none", "other", "expired", "purpose"):
            verdict = called(port, CLIENTS[name]).verdict
            assert (verdict.worked, verdict.reason, verdict.sure) == (False, REFUSED[name][0], Sure.CERTAIN), name
        verdict = called(port, ROOT.client("spiffe://test/other")).verdict
        assert (verdict.worked, verdict.reason, verdict.who) == (False, Reason.POLICY_NO_RULE, Who.SERVER)


# What is no TLS, or says nothing.


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "plain HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (b"220 mail.example ESMTP\r\n", "STARTTLS"),
        (b"\x00\x01\x02nonsense", "nonsense"),
    ],
)
def test_tls_on_a_plain_port_is_told(words: bytes, text: str) -> None:
    """A server that does not speak TLS is known by how it begins, where that can be."""

    def behave(plug: socket.socket) -> None:
        plug.recv(4096)
        plug.sendall(words)

    with plain_server(behave) as port:
        verdict = called(port, CLIENTS["good"]).verdict
    assert (verdict.worked, verdict.reason) == (False, Reason.SEEN_NO_TLS)
    assert text in verdict.text


def _reset(plug: socket.socket) -> None:
    plug.recv(4096)
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def _close(plug: socket.socket) -> None:
    plug.recv(4096)


@pytest.mark.parametrize(("behave", "ending"), [(_reset, Ending.RESET), (_close, Ending.CUT)])
def test_a_cut_is_told_with_who_could_have_made_it(behave: Callable[[socket.socket], None], ending: Ending) -> None:
    """A connection that ends without an alert points to the network, and says what else it could be."""
    with plain_server(behave) as port:
        found = called(port, CLIENTS["good"])
    assert found.recording.ending is ending
    assert (found.verdict.reason, found.verdict.who, found.verdict.sure) == (
        Reason.SEEN_CUT,
        Who.NETWORK,
        Sure.POSSIBLE,
    )
    assert any("filter" in other for other in found.verdict.also)


def _listen(plug: socket.socket) -> None:
    while plug.recv(4096):
        pass


def test_a_silent_server_is_a_timeout() -> None:
    """A server that takes the hello and says nothing is waited for no longer than was asked."""
    began = time.monotonic()
    with plain_server(_listen) as port:
        verdict = called(port, CLIENTS["good"]).verdict
    assert time.monotonic() - began < 12
    assert (verdict.worked, verdict.reason) == (False, Reason.TLS_TIMEOUT)


# From the server's side.


def _s_client(port: int, folder: Path, *words: str) -> None:
    s_client(port, *words, folder=folder)


@pytest.mark.parametrize("name", [*REFUSED, "good"])
@pytest.mark.parametrize("answer_refusals", [True, False])
def test_a_client_is_judged_as_a_guard_would(tmp_path: Path, name: str, answer_refusals: bool) -> None:
    """`openssl s_client` with each certificate: the server's side names the same cause as a guard would."""
    leaf = CLIENTS[name]
    words: tuple[str, ...] = ()
    if leaf is not None:
        leaf.save(tmp_path, "client")
        words = ("-cert", "client.crt", "-key", "client.key")
        if leaf.chain:
            words += ("-cert_chain", "client.crt")
    with watching(answer_refusals=answer_refusals) as watched:
        _s_client(watched.port, tmp_path, *words)
    verdict = watched.found[0].verdict
    assert (verdict.worked, verdict.reason) == (name == "good", None if name == "good" else REFUSED[name][0]), verdict


def test_a_client_that_does_not_trust_the_server_is_understood(tmp_path: Path) -> None:
    """curl without our authority refuses the server: the alert is explained with the server as the one refused."""
    with watching() as watched:
        assert curl(f"https://localhost:{watched.port}/", folder=tmp_path).status == 0
    verdict = watched.found[0].verdict
    assert (verdict.worked, verdict.reason) == (False, Reason.VERIFY_UNKNOWN_ISSUER)
    assert "The client refused the server" in verdict.text


def test_an_expired_server_is_told_by_the_clients_alert(tmp_path: Path) -> None:
    """A client's alert is weighed against our own certificate: this one has expired."""
    ROOT.save(tmp_path, "ca")
    with watching(ROOT.server(not_before=NOW - 9 * HOUR, not_after=NOW - HOUR)) as watched:
        curl(f"https://localhost:{watched.port}/", "--cacert", "ca.crt", folder=tmp_path)
    verdict = watched.found[0].verdict
    assert (verdict.reason, verdict.sure, verdict.who) == (Reason.VERIFY_EXPIRED, Sure.CERTAIN, Who.SERVER)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", Reason.TLS_PLAIN_HTTP),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", Reason.TLS_NOT_TLS),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Reason.TLS_NOT_TLS),
        (b"\x16\x03\x01\x00\x05hello", None),
    ],
)
def test_a_client_without_tls_is_told(words: bytes, reason: Reason | None) -> None:
    """Plain HTTP, a PROXY header, PostgreSQL's request for TLS: each is known. A broken hello is no success."""
    with watching() as watched, socket.create_connection(("127.0.0.1", watched.port), 5) as plug:
        plug.sendall(words)
        plug.shutdown(socket.SHUT_WR)
        while plug.recv(4096):
            pass
    verdict = watched.found[0].verdict
    assert not verdict.worked
    assert verdict.reason is (reason or verdict.reason) is not None


def test_a_client_of_an_old_version_is_told(tmp_path: Path) -> None:
    """A client that offers TLS 1.2 alone to a TLS 1.3 server: the versions are named; with 1.2 allowed it works."""
    leaf = CLIENTS["good"]
    assert leaf is not None
    leaf.save(tmp_path, "client")
    words = ("-tls1_2", "-cert", "client.crt", "-key", "client.key")
    with watching() as watched:
        _s_client(watched.port, tmp_path, *words)
    verdict = watched.found[0].verdict
    assert (verdict.worked, verdict.reason) == (False, Reason.TLS_VERSION)
    with watching(allow_tls12=True) as watched:
        _s_client(watched.port, tmp_path, *words)
    assert watched.found[0].verdict.worked


def test_a_client_that_hangs_up_is_told() -> None:
    """A client that connects and leaves without a word is told as that."""
    with watching() as watched:
        socket.create_connection(("127.0.0.1", watched.port), 5).close()
    verdict = watched.found[0].verdict
    assert (verdict.worked, verdict.reason) == (False, Reason.TLS_CLOSED)
