"""Rows B1 to B8: the name in the handshake, the name in the request, and the site that they lead to, are one."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from handfast.audit.clienthello import Hello, server_name_list
from handfast.guard.limits import Gate, Rates
from handfast.guard.routes import Site, Sites
from handfast.pki.issuing import Issuer
from handfast.pki.revocation import build_crl, check_crls
from handfast.policy import parse_policy
from handfast.tls.server import ClientAuth
from handfast.wire.targets import parse_host
from tests.attacks.kit import Attacker, Vhost, in_crumbs, one, port_of, serve_sites, untouched
from tests.support.apps import App, get
from tests.support.certs import DAY, Ca, Leaf, _now
from tests.support.guards import Running
from tests.support.waiting import PATIENCE

OFF, OPTIONAL, REQUIRED = ClientAuth.OFF, ClientAuth.OPTIONAL, ClientAuth.REQUIRED


def _fronted(target: str, *hosts: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", *(f"Host: {host}" for host in hosts), "Connection: close"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8")


FRONTING = {
    "exact": (_fronted("/", "secret.test"), 421),
    "upper_case": (_fronted("/", "SECRET.TEST"), 421),
    "trailing_dot": (_fronted("/", "secret.test."), 421),
    "port": (_fronted("/", "secret.test:443"), 421),
    "wildcard": (_fronted("/", "a.wild.test"), 421),
    "wildcard_itself": (_fronted("/", "*.wild.test"), 400),
    "address": (_fronted("/", "127.0.0.1"), 421),
    "number": (_fronted("/", "0x7f000001"), 400),
    "idn": (_fronted("/", "secret。test"), 400),
    "fullwidth": (_fronted("/", "ｓecret.test"), 400),
    "userinfo": (_fronted("/", "public.test@secret.test"), 400),
    "path": (_fronted("/", "public.test/secret.test"), 400),
    "two": (_fronted("/", "public.test", "secret.test"), 400),
    "two_turned": (_fronted("/", "secret.test", "public.test"), 400),
    "list": (_fronted("/", "public.test, secret.test"), 400),
    "none": (_fronted("/"), 400),
    "empty": (_fronted("/", ""), 400),
    "absolute_form": (_fronted("https://secret.test/", "public.test"), 400),
    "absolute_form_same": (_fronted("https://secret.test/", "secret.test"), 400),
    "authority_form": (_fronted("secret.test:443", "public.test"), 400),
    "folded_host": (b"GET / HTTP/1.1\r\nHost: public.test\r\n secret.test\r\nConnection: close\r\n\r\n", 400),
    "spelled_host": (_fronted("/", "public.test")[:-2] + b"h_ost: secret.test\r\n\r\n", 400),
    "nul": (_fronted("/", "public.test\0secret.test"), 400),
}


@pytest.mark.parametrize("name", ["public.test", None])
@pytest.mark.parametrize("case", FRONTING)
def test_b1_a_public_name_in_front_of_a_protected_one(attacker: Attacker, ca: Ca, case: str, name: str | None) -> None:
    """B1: a handshake for the open site carries no request to the protected one, however its host is written."""
    request, status = FRONTING[case]
    with App() as public, App() as secret, App() as wild, Running(ca, public.address) as guard:
        serve_sites(
            guard,
            Vhost(public, ("public.test",), client_auth=OFF, nameless=True),
            Vhost(secret, ("secret.test",)),
            Vhost(wild, ("*.wild.test",)),
        )
        heard = attacker.call(guard, None, request, name)
        assert heard.status == status
        assert guard.events.next("request")["decision"] == "deny"
        assert untouched(public, secret, wild)
        assert attacker.call(guard, None, get(host="PUBLIC.test.:443"), name).status == 200
        assert attacker.call(guard, None, get(host="secret.test"), "secret.test").refusal[1] == "verify.no_certificate"


_LABEL = st.text("aAbB0_-.*[]:@%。ß\0 ", max_size=6)
_HOSTS = st.one_of(
    st.builds(
        "".join, st.lists(st.sampled_from(["a", "A", "b", "test", "TEST", ".", "*", ":443", "-", "_", " ", "é"]))
    ),
    _LABEL,
    st.sampled_from(["a.test", "A.TEST.", "x.a.test", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0x7f.1", "127.1"]),
)


@settings(max_examples=200, deadline=None)
@given(text=_HOSTS)
def test_b2_one_normaliser_for_both_names(text: str) -> None:
    """B2: a server name leads to a site if and only if a Host of the same text is for that site."""
    answering = []
    for at, one_site in enumerate(SITES.all):
        host = parse_host(text.encode("utf-8"))
        if host is not None and one_site.answers(host):
            answering.append(at)
    picked = SITES.pick(text) if text else None
    if picked is None:
        assert answering == [] or ":" in text  # a server name has no port
    else:
        assert SITES.all.index(picked) in answering or ":" in text or "[" in text


def _bare(names: tuple[str, ...]) -> Site:
    class Context:
        settings = None

    return Site(Context(), (), names, False)  # type: ignore[arg-type]  # names alone are looked at


SITES = Sites([_bare(("a.test",)), _bare(("*.a.test", "127.0.0.1")), _bare(("b.test",))])


def _strict_and_lax(guard: Running, lax: App, strict: App) -> None:
    serve_sites(
        guard,
        Vhost(lax, ("lax.test",), client_auth=OFF, nameless=True),
        Vhost(strict, ("strict.test",)),
    )


def _whole(context: Any, guard: Running, send: Callable[[socket.socket, bytes], None]) -> bytes:
    """Shake hands for strict.test without a certificate, `send` bringing the hello over; ask; return the answer."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="strict.test")
    with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
        first, done, answer = True, False, b""
        while b"}\n" not in answer:
            try:
                if not done:
                    tls.do_handshake()
                    done = True
                    tls.write(get(host="strict.test"))
                answer += tls.read(1 << 16)
            except ssl.SSLWantReadError:
                pass
            if data := outgoing.read():
                send(plain, data) if first else plain.sendall(data)
                first = False
            elif not answer:
                data = plain.recv(1 << 16)
                if not data:
                    break
                incoming.write(data)
        return answer


def _by_byte(plain: socket.socket, data: bytes) -> None:
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for octet in data:
        plain.sendall(bytes([octet]))


SPLITS: dict[str, Callable[[socket.socket, bytes], None]] = {
    "segments_of_1": _by_byte,
    "records_of_1": lambda plain, data: plain.sendall(in_crumbs(data, 1)),
    "records_of_7": lambda plain, data: plain.sendall(in_crumbs(data, 7)),
    "segments_and_records_of_1": lambda plain, data: _by_byte(plain, in_crumbs(data, 1)),
    "name_in_the_second_record": lambda plain, data: plain.sendall(in_crumbs(data, 60)),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("case", SPLITS)
def test_b3_a_hello_in_pieces_goes_where_it_says(attacker: Attacker, ca: Ca, case: str, large: bool) -> None:
    """B3: a ClientHello for the strict site, cut into any pieces or padded to many records, meets the strict site and
    not the open default (CVE-2026-32305)."""
    with App() as lax, App() as strict, Running(ca, lax.address) as guard:
        _strict_and_lax(guard, lax, strict)
        context = attacker.context()
        if large:
            context.set_alpn_protocols([f"{at:03}".ljust(200, "x") for at in range(80)])  # 16 KB of them
        if large and case.endswith("records_of_1"):  # 16,000 records: more than a reader should put up with
            with pytest.raises(ssl.SSLError, match="DECODE_ERROR"):
                _whole(context, guard, SPLITS[case])
        else:
            assert b"verify.no_certificate" in _whole(context, guard, SPLITS[case])
            assert guard.events.next("connection")["reason"] == "verify.no_certificate"
        assert untouched(lax, strict)


def test_b3_a_hello_of_a_post_quantum_client_goes_where_it_says(ca: Ca) -> None:
    """B3: a hello with an X25519MLKEM768 share, which fills more than one segment, meets the strict site."""
    with App() as lax, App() as strict, Running(ca, lax.address) as guard:
        _strict_and_lax(guard, lax, strict)
        with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
            plain.setblocking(True)
            tls = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), plain)
            tls.set_tlsext_host_name(b"strict.test")
            tls.set_connect_state()
            tls.do_handshake()
            assert tls.get_group_name() == "X25519MLKEM768"
            tls.sendall(get(host="strict.test"))
            assert b"verify.no_certificate" in tls.recv(1 << 16)
        assert untouched(lax, strict)


NAMES = {
    "two_extensions": (server_name_list(b"lax.test"), server_name_list(b"strict.test")),
    "two_names": (server_name_list(b"lax.test", b"strict.test"),),
    "300_bytes": (server_name_list(b"a" * 300),),
    "nul": (server_name_list(b"lax.test\0.strict.test"),),
    "cut": (server_name_list(b"lax.test")[:-1],),
    "overlong": (b"\xff\xff" + server_name_list(b"lax.test")[2:],),
    "empty_list": (b"\0\0",),
    "empty_name": (server_name_list(b""),),
    "other_kind": (b"\0\x0b\x07\0\x08lax.test",),
    "not_ascii": (server_name_list("läx.test".encode()),),
}


@pytest.mark.parametrize("case", NAMES)
def test_b3_an_odd_server_name_is_no_missing_one(ca: Ca, case: str) -> None:
    """B3: a server name that is malformed, doubled or overlong is refused; it never counts as none, which the open
    site takes."""
    with App() as lax, App() as strict, Running(ca, lax.address) as guard:
        _strict_and_lax(guard, lax, strict)
        with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
            plain.sendall(Hello(None, names=NAMES[case]).records())
            answer = b""
            while piece := plain.recv(1 << 16):
                answer += piece
        assert answer[0] == 21  # an alert, and no ServerHello
        event = guard.events.next("connection")
        assert event["decision"] == "deny"
        assert event["reason"].startswith("tls.")
        assert untouched(lax, strict)


def test_b3_grease_changes_nothing(attacker: Attacker, ca: Ca) -> None:
    """B3: unknown versions, suites, groups and extensions (RFC 8701) do not hide the server name."""
    grease = Hello(
        "nowhere.test", versions=(0x1A1A, 0x0304), suites=(0x1A1A, 0x1301), extensions=((0x1A1A, b""), (0xDADA, b"\0"))
    )
    with App() as lax, App() as strict, Running(ca, lax.address) as guard:
        _strict_and_lax(guard, lax, strict)
        with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
            plain.sendall(grease.records())
            assert plain.recv(1 << 16)[:1] == b"\x15"
        assert guard.events.next("connection")["reason"] == "tls.unknown_name"


def _crl(ca: Ca, *bad: Leaf) -> Any:
    revoked = [(leaf.certificate.serial_number, _now() - DAY, None) for leaf in bad]
    return check_crls(
        [build_crl(Issuer(ca.certificate, ca.key, ()), revoked, 1, _now() - DAY, _now() + DAY)], [ca.certificate]
    )


STRICTER: dict[str, Callable[[Ca], tuple[dict[str, Any], Leaf | None, str]]] = {
    "client_auth": lambda ca: ({}, None, "verify.no_certificate"),
    "authority": lambda ca: ({"ca": Ca.root("Another")}, ca.client(), "verify.unknown_issuer"),
    "crl": lambda ca: (lambda leaf: ({"terms": {"crls": _crl(ca, leaf)}}, leaf, "verify.revoked"))(ca.client()),
    "crl_missing": lambda ca: (
        {"terms": {"crls": _crl(Ca.root("Another"))}},
        ca.client(),
        "verify.crl_missing",
    ),
    "depth": lambda ca: ({"terms": {"depth": 0}}, ca.sub().client(), "verify.depth"),
    "legacy": lambda ca: ({}, ca.client(eku=None), "verify.no_eku"),
    "trust_domain": lambda ca: ({"terms": {"trust_domain": "else"}}, ca.client(), "verify.trust_domain"),
    "policy": lambda ca: ({"policy": parse_policy(["spiffe://test/ops"])}, ca.client(), "policy.no_rule"),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tls12", [False, True])
@pytest.mark.parametrize("case", STRICTER)
def test_b4_a_site_has_all_of_its_own_settings(
    attacker: Attacker, ca: Ca, case: str, tls12: bool, turned: bool
) -> None:
    """B4: each setting of a site holds beside a weaker default, and a stricter default does not spill over."""
    stricter, leaf, reason = STRICTER[case](ca)
    with App() as lax, App() as strict, Running(ca, lax.address) as guard:
        weak = Vhost(lax, ("lax.test",), client_auth=OPTIONAL, nameless=not turned, tls12=True, terms={"legacy": True})
        serve_sites(guard, weak, Vhost(strict, ("strict.test",), nameless=turned, tls12=tls12, **stricter))
        context = attacker.context(leaf, tls12=tls12)
        assert attacker.call(guard, request=get(host="lax.test"), name="lax.test", context=context).status == 200
        heard = attacker.call(guard, request=get(host="strict.test"), name="strict.test", context=context)
        assert heard.refusal[1] == reason
        if turned:
            heard = attacker.call(guard, request=get(host="strict.test"), name=None, context=context)
            assert heard.refusal[1] == reason
        assert untouched(strict)


def test_b4_a_site_has_its_own_tls_version(attacker: Attacker, ca: Ca) -> None:
    """B4: TLS 1.2 for the default site opens it for no other."""
    with App() as lax, App() as strict, Running(ca, lax.address) as guard:
        serve_sites(guard, Vhost(lax, ("lax.test",), nameless=True, tls12=True), Vhost(strict, ("strict.test",)))
        context = attacker.context(ca.client(), tls12=True)
        assert attacker.call(guard, request=get(host="lax.test"), name="lax.test", context=context).status == 200
        guard.events.next("connection")
        heard = attacker.call(guard, request=get(host="strict.test"), name="strict.test", context=context)
        assert "PROTOCOL_VERSION" in heard.error
        assert guard.events.next("connection")["reason"] == "tls.version"
        assert untouched(strict)


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("name", ["nowhere.test", "deep.a.wild.test", "wild.test", "127.0.0.1", None])
def test_b5_an_unknown_name_is_refused(attacker: Attacker, ca: Ca, name: str | None, tcp: bool) -> None:
    """B5: without a site of that name, and without one that takes clients who name none, there is no handshake."""
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        serve_sites(guard, Vhost(app, ("a.test",)), Vhost(app, ("*.wild.test",)))
        heard = attacker.call(guard, ca.client(), get(host="a.test"), name)
        assert "UNRECOGNIZED_NAME" in heard.error
        assert guard.events.next("connection")["reason"] == "tls.unknown_name"
        assert untouched(app)


def test_b6_a_connection_is_not_used_for_another_name(attacker: Attacker, ca: Ca) -> None:
    """B6: on a certificate that is good for both names, a request for the second on the first's connection is 421, and
    the connection goes on."""
    server = ca.server("*.wild.test")
    with App() as a, App() as b, Running(ca, a.address) as guard:
        serve_sites(guard, Vhost(a, ("a.wild.test",), server=server), Vhost(b, ("*.wild.test",), server=server))
        with attacker.open(guard, ca.client(), "a.wild.test") as tls:
            assert one(tls, get(host="a.wild.test", close=False)).status == 200
            assert one(tls, get(host="b.wild.test", close=False)).refusal == (421, "http.misdirected")
            assert one(tls, get(host="a.wild.test", close=False)).status == 200
        with attacker.open(guard, ca.client(), "b.wild.test") as tls:  # within one site too
            assert one(tls, get(host="c.wild.test", close=False)).status == 421
        assert untouched(b)
        assert a.received.count(b"GET ") == 2


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("alpn", [(), (b"http/1.1",)])
def test_b7_a_challenge_protocol_is_no_way_in(attacker: Attacker, ca: Ca, tcp: bool, alpn: tuple[bytes, ...]) -> None:
    """B7: who names `acme-tls/1` (RFC 8737) and shows no certificate brings no byte to the app."""
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        serve_sites(guard, Vhost(app, nameless=True, alpn=alpn))
        context = attacker.context()
        context.set_alpn_protocols(["acme-tls/1"])
        heard = attacker.call(guard, context=context)
        assert heard.status in (0, 403)
        assert guard.events.next("connection")["decision"] == "deny"
        assert untouched(app)


def test_b7_the_app_cannot_send_clients_round_the_guard(attacker: Attacker, ca: Ca) -> None:
    """B7: an app's Alt-Svc, which names another port, does not reach the client."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b'HTTP/1.1 200 OK\r\nAlt-Svc: h3=":8080"\r\nalt-svc: clear\r\nContent-Length: 0\r\n\r\n')

    with App(answer) as app, Running(ca, app.address) as guard:
        heard = attacker.call(guard, ca.client())
        assert heard.status == 200
        assert b"alt-svc" not in heard.answer.lower()


def _explode(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("owner", "hook"),
    [
        (Sites, "pick"),
        ("guard.log", "emit"),
        ("guard.metrics", "handshake"),
        (Gate, "admit_request"),
        (Gate, "admit_identity"),
        (Site, "answers"),
        (Site, "route"),
    ],
)
def test_b8_a_hook_that_fails_refuses(
    attacker: Attacker, ca: Ca, monkeypatch: pytest.MonkeyPatch, owner: Any, hook: str
) -> None:
    """B8: an exception where a name, a limit, a rule, a log line or a metric is looked after never lets a client
    through."""
    with App() as app, Running(ca, app.address, gate=Gate("main", Rates())) as guard:
        serve_sites(guard, Vhost(app, ("localhost",)))
        place = owner
        if isinstance(owner, str):
            place = type(getattr(guard.guard, owner.partition(".")[2]))
        with monkeypatch.context() as broken:
            broken.setattr(place, hook, _explode)
            assert attacker.call(guard, ca.client()).status in (0, 500, 503)
            assert untouched(app)
        assert attacker.call(guard, ca.client()).status == 200


def test_b8_a_header_that_cannot_be_made_refuses(attacker: Attacker, ca: Ca) -> None:
    """B8: when what tells the app who called fails, or would break out of its line, nothing is forwarded."""
    failing: list[Any] = [_explode, lambda *_: ((b"Client-Identity", b"a\r\nX: b"),)]
    for identify in failing:
        with App() as app, Running(ca, app.address) as guard:
            serve_sites(guard, Vhost(app, nameless=True, identify=identify))
            assert attacker.call(guard, ca.client()).status == 0
            assert guard.events.next("ended")["reason"] == "bug"
            assert not app.received
