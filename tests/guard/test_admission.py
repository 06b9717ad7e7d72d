"""Who is let in, who is not, and that the app never sees a byte of those who are not."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from handfast.policy import parse_policy
from tests.guard.conftest import Ask
from tests.support.apps import App, client_context, get, talk
from tests.support.certs import CLIENT, DAY, SERVER, Ca, Leaf, general
from tests.support.guards import Running
from tests.support.waiting import PATIENCE

NOW = datetime.now(UTC).replace(microsecond=0)

REFUSED: dict[str, tuple[Callable[[Ca], Leaf | None], int, str]] = {
    "none": (lambda ca: None, 403, "verify.no_certificate"),
    "other_authority": (lambda ca: Ca.root("Other").client(), 403, "verify.unknown_issuer"),
    "same_name_other_key": (lambda ca: Ca.root("Test Root").client(), 403, "verify.bad_signature"),
    "self_signed": (lambda ca: Leaf(*_self_signed()), 403, "verify.unknown_issuer"),
    "expired": (
        lambda ca: ca.client(not_before=NOW - 2 * DAY, not_after=NOW - DAY),
        403,
        "verify.expired",
    ),
    "not_yet_valid": (lambda ca: ca.client(not_before=NOW + DAY, not_after=NOW + 2 * DAY), 403, "verify.not_yet_valid"),
    "no_eku": (lambda ca: ca.client(eku=None), 403, "verify.no_eku"),
    "server_eku": (lambda ca: ca.client(eku=[SERVER]), 403, "verify.purpose"),
    "any_eku": (
        lambda ca: ca.client(eku=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
        403,
        "verify.purpose",
    ),
    "no_name": (lambda ca: ca.leaf(cn="admin"), 403, "verify.no_name"),
    "two_uris": (lambda ca: ca.leaf("spiffe://test/a", "https://x.example/y"), 403, "verify.svid_names"),
    "nul_in_cn": (lambda ca: ca.client(cn="admin\0.evil"), 403, "verify.forbidden_name"),
    "newline_in_cn": (lambda ca: ca.client(cn="admin\r\nX: y"), 403, "verify.forbidden_name"),
    "bidi_in_cn": (lambda ca: ca.client(cn="admin‮"), 403, "verify.forbidden_name"),
    "ca_as_leaf": (lambda ca: ca.client(ca=True), 403, "verify.ca_as_leaf"),
    "leaf_as_issuer": (lambda ca: _under_leaf(ca), 403, "verify.not_a_ca"),
    "path_too_long": (lambda ca: ca.sub(path_length=0).sub("Deeper").client(), 403, "verify.path_length"),
    "unknown_critical": (
        lambda ca: ca.client(extra=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)]),
        403,
        "verify.critical_extension",
    ),
    "weak_rsa": (lambda ca: ca.client(key=rsa.generate_private_key(65537, 1024)), 403, "verify.weak_key"),
    "constrained": (
        lambda ca: ca.sub(extra=[(x509.NameConstraints([x509.DNSName("good.example")], None), True)]).leaf(
            "evil.example"
        ),
        403,
        "verify.name_constraint",
    ),
}


def _self_signed() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    from tests.support.certs import Spec, make

    made = make(Spec(names=[general("spiffe://test/web")], cn="admin"), None)
    return made.certificate, made.key


def _under_leaf(ca: Ca) -> Leaf:
    leaf = ca.client("spiffe://test/evil")
    return Ca(leaf.certificate, leaf.key, (leaf.certificate,)).client()


def test_a_verified_client_reaches_the_app(ca: Ca, ask: Ask) -> None:
    """A client with a good certificate gets the app's answer."""
    with App() as app, Running(ca, app.address) as guard:
        assert ask(guard, ca.client()).endswith(b"Hello World\n")
        event = guard.events.next("request")
        assert (event["decision"], event["peer"], event["status"]) == ("allow", "spiffe://test/web", 200)


@pytest.mark.parametrize("case", REFUSED)
def test_an_unproven_client_is_told_why_and_the_app_sees_nothing(ca: Ca, ask: Ask, case: str) -> None:
    """Each kind of bad certificate gets its status and code, one log event, and no byte to the app."""
    make, status, code = REFUSED[case]
    with App() as app, Running(ca, app.address) as guard:
        try:
            answer = ask(guard, make(ca))
        except ssl.SSLError:
            assert case == "weak_rsa"  # the client's own OpenSSL will not load it
            return
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert json.loads(body)["error"] == code
        event = guard.events.next("connection")
        assert code in [event["reason"], *event.get("also", [])]
        assert event["decision"] == "deny"
        assert event["id"] == json.loads(body)["id"]
    assert app.connections == 0


def test_the_answer_to_the_refused_holds_nothing_but_the_code(ca: Ca, ask: Ask) -> None:
    """A refused client learns a stable code and an id, not what was wrong in detail."""
    with App() as app, Running(ca, app.address) as guard:
        body = json.loads(ask(guard, Ca.root("Other").client()).partition(b"\r\n\r\n")[2])
        assert set(body) == {"error", "id"}


def test_legacy_certificates_only_with_the_flag(ca: Ca, ask: Ask) -> None:
    """A certificate without EKU or SAN is let in by its CN with the flag; without it the log names the flag."""
    leaf = ca.leaf(cn="client.example", eku=None, key_usage=False)
    with App() as app, Running(ca, app.address, legacy=True) as guard:
        assert ask(guard, leaf).endswith(b"Hello World\n")
        assert guard.events.next("request")["peer"] == "cn:client.example"
    with App() as app, Running(ca, app.address) as guard:
        assert b" 403 " in ask(guard, leaf)
        assert "--legacy-certs" in guard.events.next("connection")["remedy"]


def test_the_policy_decides_after_verification(ca: Ca, ask: Ask) -> None:
    """A rule that names the peer lets it through; without one it is 403, with the rule to add in the log."""
    policy = parse_policy(["spiffe://test/web"])
    with App() as app, Running(ca, app.address, policy) as guard:
        assert ask(guard, ca.client("spiffe://test/web")).endswith(b"Hello World\n")
        assert app.connections == 1
        denied = ask(guard, ca.client("spiffe://test/other"))
        assert denied.startswith(b"HTTP/1.1 403 ")
        assert b"policy.no_rule" in denied
        assert app.connections == 1


def test_names_of_two_authorities_are_not_one_identity(ca: Ca, ask: Ask, tmp_path: Path) -> None:
    """The same CN from another authority in no way equals ours: it is refused as unknown."""
    policy = parse_policy(["cn:admin"])
    with App() as app, Running(ca, app.address, policy, legacy=True) as guard:
        assert b" 200 " in ask(guard, ca.leaf(cn="admin"))
        assert b"verify.unknown_issuer" in ask(guard, Ca.root("Second").leaf(cn="admin"))


@pytest.mark.parametrize(
    ("rules", "request_line", "status"),
    [
        (["any GET /public/**"], "/public/a/b", 200),
        (["any GET /public/*"], "/public/a/b", 403),
        (["any GET /public/**"], "/private", 403),
        (["deny any GET /admin/**", "any"], "/admin/x", 403),
        (["deny any GET /admin/**", "any"], "/x", 200),
        (["any GET /public/**"], "/public/../private", 400),
        (["any GET /public/**"], "/public/%2e%2e/private", 400),
        (["any GET /public/**"], "/public//x", 400),
        (["any GET /public/**"], "/public/%2Fx", 400),
        (["any GET /public/**"], "/public/x;y", 400),
        (["any GET /public/**"], "/public/x\\y", 400),
        (["any"], "/public/../private", 200),
    ],
)
def test_path_rules_judge_what_is_forwarded(ca: Ca, ask: Ask, rules: list[str], request_line: str, status: int) -> None:
    """A path rule sees the bytes that the app gets; a path with two readings is 400 where paths matter."""
    with App() as app, Running(ca, app.address, parse_policy(rules)) as guard:
        answer = ask(guard, ca.client(), get(request_line))
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:100]
        if status == 200:
            assert f"GET {request_line} HTTP/1.1".encode() in app.received


def test_host_and_server_name_must_agree(ca: Ca, ask: Ask) -> None:
    """A request for another host than the handshake named is 421 and not forwarded."""
    with App() as app, Running(ca, app.address) as guard:
        assert ask(guard, ca.client(), get(host="other.example")).startswith(b"HTTP/1.1 421 ")
        assert app.connections == 0
        assert ask(guard, ca.client(), get(host="LOCALHOST.:8443")).startswith(b"HTTP/1.1 200 ")


def test_plain_http_is_answered_and_goes_nowhere(ca: Ca) -> None:
    """Plain HTTP on the TLS port gets a 400 in plain words, and the app nothing."""
    with App() as app, Running(ca, app.address) as guard:
        host, _, port = guard.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as plain:
            plain.sendall(get())
            assert plain.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert guard.events.next("connection")["reason"] == "tls.plain_http"
        assert app.connections == 0


def test_bytes_before_the_handshake_are_never_served(ca: Ca) -> None:
    """Plain bytes and an instant close never reach the app, whatever the timing (CVE-2023-40217)."""
    with App() as app, Running(ca, app.address) as guard:
        host, _, port = guard.address.rpartition(":")
        for _ in range(200):
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as plain:
                plain.sendall(get())
        guard.call(lambda: None)
        assert app.connections == 0


def test_garbage_is_refused(ca: Ca) -> None:
    """What is neither TLS nor HTTP is closed, with its reason in the log."""
    with App() as app, Running(ca, app.address) as guard:
        host, _, port = guard.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as plain:
            plain.sendall(b"\x00\x01\x02\x03")
            assert plain.recv(4096) == b""
        assert guard.events.next("connection")["reason"] == "tls.not_tls"


def test_tls12_is_refused_by_default_and_spoken_on_request(ca: Ca, tmp_path: Path) -> None:
    """A TLS 1.2 client is refused with its reason, and served only where 1.2 was asked for."""
    context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with App() as app, Running(ca, app.address) as guard:
        with pytest.raises(ssl.SSLError, match="protocol version"):
            talk(guard.address, context, get())
        assert guard.events.next("connection")["reason"] == "tls.version"
    with App() as app, Running(ca, app.address, tls12=True) as guard:
        assert talk(guard.address, context, get()).endswith(b"Hello World\n")


@pytest.mark.parametrize("tls12", [False, True])
def test_no_session_can_be_resumed(ca: Ca, tmp_path: Path, tls12: bool) -> None:
    """A client that offers its old session is given a new handshake, in TLS 1.3 and 1.2."""
    context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
    if tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    with App() as app, Running(ca, app.address, tls12=tls12) as guard:
        host, _, port = guard.address.rpartition(":")
        session = None
        for _ in range(2):
            with (
                socket.create_connection((host, int(port)), timeout=PATIENCE) as plain,
                context.wrap_socket(plain, server_hostname="localhost", session=session) as tls,
            ):
                tls.sendall(get())
                assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
                assert not tls.session_reused
                session = tls.session


def test_post_quantum_key_exchange_comes_first(ca: Ca) -> None:
    """A client that can do X25519MLKEM768 gets it; one that cannot gets X25519."""
    from OpenSSL import SSL

    for groups, chosen in ((None, "X25519MLKEM768"), (b"X25519", "x25519")):
        with App() as app, Running(ca, app.address) as guard:
            context = SSL.Context(SSL.TLS_CLIENT_METHOD)
            if groups is not None:
                SSL._lib.SSL_CTX_set1_curves_list(context._context, groups)  # type: ignore[attr-defined]  # no public call
            host, _, port = guard.address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as plain:
                tls = SSL.Connection(context, plain)
                plain.setblocking(True)
                tls.set_connect_state()
                tls.do_handshake()
                assert (tls.get_group_name() or "").lower() == chosen.lower()


def test_accepted_authorities_are_named(ca: Ca) -> None:
    """CertificateRequest names the client authority, by which browsers choose a certificate."""
    from handfast.cli.look import look_at_server

    with App() as app, Running(ca, app.address) as guard:
        host, _, port = guard.address.rpartition(":")
        assert look_at_server(host, int(port)).accepted_authorities == ("CN=Test Root",)


def test_a_short_lived_intermediate_works(ca: Ca, ask: Ask) -> None:
    """A chain through an intermediate is accepted when the intermediate is sent along, and not without it."""
    sub = ca.sub(path_length=0)
    with App() as app, Running(ca, app.address) as guard:
        leaf = sub.client()
        assert ask(guard, leaf).endswith(b"Hello World\n")
        assert b"verify.unknown_issuer" in ask(guard, Leaf(leaf.certificate, leaf.key))


def test_an_expired_intermediate_is_refused(ca: Ca, ask: Ask) -> None:
    """A good leaf under an expired intermediate is refused as expired."""
    sub = ca.sub(not_before=NOW - timedelta(days=9), not_after=NOW - timedelta(days=1))
    with App() as app, Running(ca, app.address) as guard:
        assert b"verify.expired" in ask(guard, sub.client())


def test_both_purposes_serve_as_a_client(ca: Ca, ask: Ask) -> None:
    """A certificate for client and server use is good for client use."""
    with App() as app, Running(ca, app.address) as guard:
        assert b" 200 " in ask(guard, ca.client(eku=[CLIENT, SERVER]))
