"""Rows A1 to A15: what was proved once is not taken for proved now."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from OpenSSL import SSL
from tlslite.errors import TLSError
from tlslite.messages import Certificate

from handfast.guard.routes import Snapshot
from handfast.pki import TrustBundle
from handfast.policy import parse_policy
from handfast.tls.server import ClientAuth
from tests.attacks.kit import (
    LISTENER,
    Attacker,
    Stepwise,
    Vhost,
    chain_of,
    command,
    ended_within,
    lax_twin,
    one,
    port_of,
    revoked,
    serve_sites,
    tlslite,
    untouched,
    upgraded,
    websocket_app,
)
from tests.support.apps import App, echo_head, get
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.programs import free_port, must, run
from tests.support.waiting import PATIENCE, until

KEPT = get(close=False)
SOON = 4  # seconds of a life that ends while a test looks on; less than one of them is lost to the whole second
# How a session can be offered again: by a PSK of TLS 1.3 (and a ticket of 1.2, from who gives one), or by its ID.
WAYS = ("tls13", "tls12")


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["b.test", None])
def test_a1_a_session_of_one_site_is_nothing_at_another(attacker: Attacker, ca: Ca, way: str, name: str | None) -> None:
    """A1: a session made at site a under authority A gives no entry to site b, which believes B alone."""
    other, leaf = Ca.root("Other"), ca.client()
    with App() as a, App() as b, Running(ca, a.address) as guard:
        tls12 = way == "tls12"
        server = ca.server("a.test", "b.test")
        common: dict[str, Any] = {"tls12": tls12, "server": server}
        serve_sites(
            guard, Vhost(a, ("a.test",), **common), Vhost(b, ("b.test",), ca=other, nameless=name is None, **common)
        )
        context = attacker.context(leaf, tls12=tls12)
        first = attacker.call(guard, request=get(host="a.test"), name="a.test", context=context)
        assert first.status == 200
        again = attacker.call(guard, request=get(host="b.test"), name=name, context=context, session=first.session)
        assert again.refusal == (403, "verify.unknown_issuer")
        assert not again.reused
        assert untouched(b)
        assert attacker.call(guard, other.client(), get(host="b.test"), name, context=None).status == 200 or tls12


@pytest.mark.parametrize("way", ["tls13", "tls12_ticket", "tls12_id"])
def test_a2_a_session_of_a_lax_server_with_our_certificate_is_nothing(
    attacker: Attacker, ca: Ca, tmp_path: Path, way: str
) -> None:
    """A2: a session that another server with the same key gave away without a certificate opens nothing here."""
    server, tls12 = ca.server(), way != "tls13"
    context = attacker.context(tls12=tls12)
    with lax_twin(server, tmp_path, session_ids=way == "tls12_id") as twin:
        given = attacker.call(twin, context=context)
        assert given.session is not None
        assert given.session.has_ticket is (way != "tls12_id")
        assert attacker.call(twin, context=context, session=given.session).reused  # it is a good session there
        with App() as app, Running(ca, app.address, server=server, tls12=tls12) as guard:
            heard = attacker.call(guard, context=context, session=given.session)
            assert heard.refusal == (403, "verify.no_certificate")
            assert not heard.reused
            assert untouched(app)


@pytest.mark.parametrize("way", WAYS)
def test_a2_a_session_of_an_optional_listener_is_nothing_at_a_strict_one(attacker: Attacker, ca: Ca, way: str) -> None:
    """A2: a session from a listener that asks for nothing is no certificate at its strict neighbour, nor after a start
    anew."""
    server, tls12 = ca.server(), way == "tls12"
    context = attacker.context(tls12=tls12)
    with App() as app, App() as strict, Running(ca, app.address, server=server, tls12=tls12) as lax:
        serve_sites(lax, Vhost(app, client_auth=ClientAuth.OPTIONAL, tls12=tls12, server=server, nameless=True))
        first = attacker.call(lax, context=context)
        assert first.status == 200
        for _ in range(2):  # a neighbour, then one that was started anew
            with Running(ca, strict.address, server=server, tls12=tls12) as guard:
                again = attacker.call(guard, context=context, session=first.session)
                assert again.refusal == (403, "verify.no_certificate")
                assert not again.reused
    assert untouched(strict)


Change = Callable[[Running, Leaf], Snapshot]
CHANGES: dict[str, tuple[Change, tuple[int, str]]] = {
    "a3_authority_removed": (
        lambda guard, leaf: guard.snapshot(bundle=TrustBundle((Ca.root("New").certificate,))),
        (403, "verify.unknown_issuer"),
    ),
    "a4_revoked": (lambda guard, leaf: guard.snapshot(revocations=revoked(leaf)), (403, "verify.revoked")),
    "a5_denied": (lambda guard, leaf: guard.snapshot(parse_policy(["deny spiffe://test/web", "any"])), (403, "")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CHANGES)
def test_a3_a4_a5_a_session_does_not_outlive_what_it_was_granted_by(
    attacker: Attacker, ca: Ca, case: str, way: str
) -> None:
    """A3, A4, A5: a client that comes back with its session after its authority was removed, after it was revoked or
    denied, is refused for that."""
    change, refusal = CHANGES[case]
    leaf, tls12 = ca.client(), way == "tls12"
    with App() as app, Running(ca, app.address, tls12=tls12) as guard:
        context = attacker.context(leaf, tls12=tls12)
        first = attacker.call(guard, context=context)
        assert first.status == 200
        guard.swap(change(guard, leaf))
        seen = bytes(app.received)
        again = attacker.call(guard, context=context, session=first.session)
        assert again.refusal == (refusal[0], refusal[1] or "policy.denied")
        assert not again.reused
        assert bytes(app.received) == seen


@pytest.mark.parametrize("way", WAYS)
def test_a6_a_session_does_not_outlive_the_certificate(attacker: Attacker, ca: Ca, way: str) -> None:
    """A6: a client whose certificate has ended since it got its session is refused for it."""
    tls12 = way == "tls12"
    with App() as app, Running(ca, app.address, tls12=tls12) as guard:
        leaf = ca.client(not_after=_in(SOON))
        context = attacker.context(leaf, tls12=tls12)
        first = attacker.call(guard, context=context)
        assert first.status == 200
        seen = bytes(app.received)
        # notAfter is the last second in which it is valid (RFC 5280 4.1.2.5), all of it.
        until(lambda: datetime.now(UTC) > leaf.certificate.not_valid_after_utc + timedelta(seconds=1), "its end")
        again = attacker.call(guard, context=context, session=first.session)
        assert again.status == 403
        assert again.refusal[1] in ("verify.expired", "ended.expired")
        assert not again.reused
        assert bytes(app.received) == seen


@pytest.mark.parametrize("way", WAYS)
def test_a7_sessions_cannot_be_renewed_for_ever(attacker: Attacker, ca: Ca, way: str) -> None:
    """A7: a client that offers the newest session each time has to prove itself each time."""
    tls12 = way == "tls12"
    with App() as app, Running(ca, app.address, tls12=tls12) as guard:
        context, session = attacker.context(ca.client(), tls12=tls12), None
        for _ in range(6):
            heard = attacker.call(guard, context=context, session=session)
            assert (heard.status, heard.reused) == (200, False)
            session = heard.session


def test_a8_no_path_of_resumption_is_open(attacker: Attacker, ca: Ca) -> None:
    """A8: in TLS 1.2 a client gets neither a ticket nor a session ID, so it has nothing to come back with."""
    with App() as app, Running(ca, app.address, tls12=True) as guard:
        session = attacker.call(guard, context=attacker.context(ca.client(), tls12=True)).session
        assert session is None or not session.has_ticket
        said = must(
            *("openssl", "s_client", "-connect", guard.address, "-tls1_2", "-servername", "localhost"),
            folder=attacker.folder,
        )
        assert "Session-ID: \n" in said
        assert "TLS session ticket" not in said


def test_a8_the_command_gives_no_ticket_and_takes_none(ca: Ca, tmp_path: Path) -> None:
    """A2, A8: `handfast guard` with two workers sends no ticket in TLS 1.3; a session from elsewhere with the same key
    is not resumed by either."""
    server, client = ca.server(), ca.client()
    server.save(tmp_path, "server")
    ca.save(tmp_path, "clients")
    cert, key = client.save(tmp_path, "client")
    shown = ("-cert", str(cert), "-key", str(key), "-servername", "localhost", "-ign_eof")
    with lax_twin(server, tmp_path) as twin, App() as app:
        config = f'workers = 2\n{LISTENER}to = "{app.address}"\n'
        with command(tmp_path, config) as guard:

            def say(address: str, *words: str) -> str:
                line = ("openssl", "s_client", "-connect", address, *words)
                return run(*line, folder=tmp_path, stdin=get().decode()).stdout

            assert "New Session Ticket arrived" in say(twin, "-sess_out", "given", *shown)
            said = say(guard.address, "-sess_out", "ours", *shown)
            assert "200 OK" in said
            assert "New Session Ticket arrived" not in said
            for _ in range(6):
                said = say(guard.address, "-sess_in", "given", *shown[4:])
                assert "Reused" not in said
                assert "verify.no_certificate" in said
        assert app.connections == 1


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("version", [(3, 3), (3, 4)])
def test_a9_a_certificate_without_its_key_is_nothing(ca: Ca, tcp: bool, version: tuple[int, int]) -> None:
    """A9: who shows another's certificate and signs with a key of their own is refused by the handshake."""
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address, tls12=True) as guard:
        stolen = tlslite(guard, ca.client(), key=ca.client(), versions=(version, version))
        with pytest.raises((TLSError, ConnectionError)), stolen as tls:  # noqa: PT012  # 1.3: it tells when one reads
            tls.write(KEPT)
            tls.read(min=1)
        event = guard.events.next("connection")
        assert (event["decision"], event["reason"]) == ("deny", "tls.bad_proof")
        assert untouched(app)
        with tlslite(guard, ca.client(), versions=(version, version)) as tls:  # its twin: the same with the right key
            tls.write(KEPT)
            assert bytes(tls.read(min=1)).startswith(b"HTTP/1.1 200 ")


def test_a9_the_identity_is_that_of_the_handshake(attacker: Attacker, ca: Ca) -> None:
    """A9: alice's session in bob's hands makes bob, not alice."""
    with App(echo_head) as app, Running(ca, app.address) as guard:
        context = attacker.context(ca.client("spiffe://test/alice"))
        session = attacker.call(guard, context=context).session
        context.load_cert_chain(*ca.client("spiffe://test/bob").save(attacker.folder, "bob"))
        heard = attacker.call(guard, context=context, session=session)
        assert b'Client-Identity: "spiffe://test/bob"' in heard.body
        assert b"alice" not in heard.body


def test_a10_no_early_data_is_taken(attacker: Attacker, ca: Ca, tmp_path: Path) -> None:
    """A10: early data under a session from elsewhere is rejected, and the app learns nothing of it."""
    server, client = ca.server(), ca.client()
    pair, own = server.save(tmp_path, "server"), client.save(tmp_path, "client")
    (tmp_path / "early").write_bytes(get("/early", close=False))
    shown = ("-cert", str(own[0]), "-key", str(own[1]), "-servername", "localhost", "-ign_eof")
    port = free_port()
    twin = ("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-early_data", "-naccept", "1")
    with subprocess.Popen(
        [*twin, "-cert", pair[0], "-key", pair[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as lax:
        assert lax.stdout is not None
        while "ACCEPT" not in lax.stdout.readline():
            pass
        to = ("openssl", "s_client", "-connect", f"127.0.0.1:{port}")
        with subprocess.Popen([*to, "-sess_out", "session", *shown], cwd=tmp_path, stdout=subprocess.DEVNULL):
            while "END SSL SESSION" not in lax.stdout.readline():
                pass
            lax.communicate("Q\n")
    assert "Max Early Data: 16384" in must("openssl", "sess_id", "-in", "session", "-text", folder=tmp_path)
    with App() as app, Running(ca, app.address, server=server) as guard:
        to = ("openssl", "s_client", "-connect", guard.address)
        said = run(
            *to, "-sess_in", "session", "-early_data", "early", *shown, folder=tmp_path, stdin=get("/late").decode()
        )
        assert "Early data was rejected" in said.stdout
        assert b"/early" not in app.received
        assert app.received.count(b"GET /late ") == 1
        assert guard.events.next("request")["path"] == "/late"


def test_a11_no_request_is_served_after_the_certificates_end(attacker: Attacker, ca: Ca) -> None:
    """A11: on a kept connection, no request that begins after NotAfter is forwarded, not even before the next look."""
    with App() as app, Running(ca, app.address) as guard, ExitStack() as stack:
        leaf = ca.client(not_after=_in(SOON))
        end = leaf.certificate.not_valid_after_utc
        tls = stack.enter_context(attacker.open(guard, leaf))
        while True:
            began, seen = datetime.now(UTC), len(app.received)
            heard = one(tls, KEPT)
            if began >= end:
                assert heard.status in (0, 403), heard
                assert len(app.received) == seen
                break
            assert heard.status in (200, 403, 0), heard
            if heard.status != 200:
                assert datetime.now(UTC) >= end
                break
        assert ended_within(tls, 2)


@pytest.mark.parametrize("where", ["leaf", "intermediate"])
def test_a11_a_websocket_ends_with_the_chain(attacker: Attacker, ca: Ca, where: str) -> None:
    """A11: an open websocket is cut within two seconds of the end of the first certificate of its chain."""
    with websocket_app() as app, Running(ca, app.address) as guard, ExitStack() as stack:
        end = _in(SOON)
        leaf = ca.client(not_after=end) if where == "leaf" else ca.sub(not_after=end).client()
        tls = stack.enter_context(attacker.open(guard, leaf))
        upgraded(tls)
        # The end falls within the second before; all of the last one is still good (RFC 5280 4.1.2.5).
        until(lambda: datetime.now(UTC) >= end, "its end")
        assert ended_within(tls, 2)
        assert guard.events.next("ended")["reason"] == "ended.expired"


@pytest.mark.parametrize("tcp", [False, True])
def test_a11_a_certificate_that_ends_during_the_handshake(attacker: Attacker, ca: Ca, tcp: bool) -> None:
    """A11: a handshake begun in time and finished late is refused, also for a chain that was good before."""
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        leaf = ca.client(not_after=_in(SOON))
        with attacker.open(guard, leaf) as tls:
            assert one(tls, KEPT).status == 200  # the guard knows the chain now
        guard.events.next("connection")
        seen = bytes(app.received)
        with Stepwise(guard.address, attacker.context(leaf)) as slow:
            slow.plain.sendall(slow.hello)
            last = slow.flight()
            # notAfter is the last second in which it is valid (RFC 5280 4.1.2.5), all of it.
            until(lambda: datetime.now(UTC) > leaf.certificate.not_valid_after_utc + timedelta(seconds=1), "its end")
            slow.finish(last, KEPT)
        assert guard.events.next("connection")["reason"] in ("verify.expired", "ended.expired")
        assert bytes(app.received) == seen


@pytest.mark.parametrize("tcp", [False, True])
def test_a12_a_revocation_between_hello_and_finished(attacker: Attacker, ca: Ca, tcp: bool) -> None:
    """A12: a revocation that arrives while the handshake runs refuses its client (the race of ztunnel#1986)."""
    leaf = ca.client()
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        for bad in (False, True):
            with Stepwise(guard.address, attacker.context(leaf)) as slow:
                slow.plain.sendall(slow.hello)
                last = slow.flight()
                if bad:
                    guard.swap(guard.snapshot(revocations=revoked(leaf)))
                seen = bytes(app.received)
                heard = slow.finish(last, get())
            if not bad:
                assert heard.status == 200
                guard.events.next("connection")
        assert heard.status in (0, 403)
        assert guard.events.next("connection")["reason"] in ("verify.revoked", "ended.revoked")
        assert bytes(app.received) == seen


def test_a12_a_revocation_ends_a_websocket(attacker: Attacker, ca: Ca) -> None:
    """A12: an open websocket of a revoked client is cut at once; its neighbour's goes on."""
    bad, good = ca.client("spiffe://test/bad"), ca.client("spiffe://test/good")
    with websocket_app() as app, Running(ca, app.address) as guard:
        first, second = attacker.open(guard, bad), attacker.open(guard, good)
        with first, second:
            upgraded(first)
            upgraded(second)
            guard.swap(guard.snapshot(revocations=revoked(bad)))
            assert ended_within(first, 2)
            second.sendall(b"still")
            assert second.recv(5) == b"STILL"


@pytest.mark.parametrize("tcp", [False, True])
def test_a12_the_verified_chain_counts_and_not_the_presented(attacker: Attacker, ca: Ca, tcp: bool) -> None:
    """A12: the revocation of an issuer cuts who was verified through it, whatever else they showed; a revoked
    certificate that is only shown along harms nobody."""
    used, unused = ca.sub("Used"), ca.sub("Unused")
    leaf = used.client()
    shown = Leaf(leaf.certificate, leaf.key, (unused.certificate, used.certificate))
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        with attacker.open(guard, shown) as tls:
            assert one(tls, KEPT).status == 200
            guard.swap(guard.snapshot(revocations=revoked(unused)))
            assert one(tls, KEPT).status == 200
            guard.swap(guard.snapshot(revocations=revoked(used)))
            assert ended_within(tls, 2)
        assert guard.events.next("ended")["reason"] == "ended.revoked"


def test_a13_times_at_the_edge(attacker: Attacker, ca: Ca) -> None:
    """A13: dates after 2049 and "no expiry" are read as they are meant; a clock that is slow by seconds is not
    forgiven, and an expired anchor vouches for nobody."""
    good = {
        "2050": ca.client(not_after=datetime(2050, 1, 1, tzinfo=UTC)),
        "no_expiry": ca.client(not_after=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    }
    past = Ca.root("Old", not_before=_in(-9 * 86400))
    with App() as app, Running(ca, app.address) as guard:
        for leaf in good.values():
            assert attacker.call(guard, leaf).status == 200
        seen = bytes(app.received)
        assert attacker.call(guard, ca.client(not_before=_in(60))).refusal == (403, "verify.not_yet_valid")
        old = _expired_root(past)
        guard.swap(guard.snapshot(bundle=TrustBundle((old.certificate,))))
        assert attacker.call(guard, old.client()).refusal == (403, "verify.expired")
        assert bytes(app.received) == seen


def _expired_root(ca: Ca) -> Ca:
    """The same authority, with a certificate of its own that has ended."""
    from tests.support.certs import Spec, make

    made = make(Spec(cn="Old", eku=None, ca=True, not_before=_in(-99999), not_after=_in(-60), key=ca.key), None)
    return Ca(made.certificate, made.key)


def test_a14_new_rules_reach_a_connection_that_asks_the_same_again(attacker: Attacker, ca: Ca) -> None:
    """A14: a request that was allowed a hundred times on a connection is denied by the next rules, and the other way
    round."""
    with App() as app, Running(ca, app.address) as guard, attacker.open(guard, ca.client()) as tls:
        for rules, status in ((["any"], 200), (["any POST"], 403), (["any GET /"], 200), (["any GET /x"], 403)):
            guard.swap(guard.snapshot(parse_policy(rules)))
            seen = len(app.received)
            for _ in range(100):
                assert one(tls, KEPT).status == status
            assert (len(app.received) > seen) is (status == 200)


def test_a14_new_rules_end_a_websocket(attacker: Attacker, ca: Ca) -> None:
    """A14: a websocket on a path that the peer may no longer ask for is cut, though other paths are left to it."""
    with websocket_app() as app, Running(ca, app.address) as guard, attacker.open(guard, ca.client()) as tls:
        upgraded(tls, "/ws")
        guard.swap(guard.snapshot(parse_policy(["any /ws", "any /other"])))
        tls.sendall(b"still")
        assert tls.recv(5) == b"STILL"
        guard.swap(guard.snapshot(parse_policy(["any /other"])))
        assert ended_within(tls, 2)
        assert guard.events.next("ended")["reason"] == "ended.policy"


def test_a15_there_is_no_renegotiation(ca: Ca, tmp_path: Path) -> None:
    """A15: a TLS 1.2 client that asks for another handshake on its connection gets none, and stays who it was."""
    alice, bob = ca.client("spiffe://test/alice"), ca.client("spiffe://test/bob")
    with App(echo_head) as app, Running(ca, app.address, tls12=True) as guard:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
        for leaf, name in ((alice, "alice"), (bob, "bob")):
            leaf.save(tmp_path, name)
        context.use_certificate_file(str(tmp_path / "alice.crt"))
        context.use_privatekey_file(str(tmp_path / "alice.key"))
        with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
            plain.setblocking(True)
            tls = SSL.Connection(context, plain)
            tls.set_connect_state()
            tls.do_handshake()
            tls.sendall(KEPT)
            assert b"test/alice" in tls.recv(1 << 16)
            tls.use_certificate(bob.certificate)
            tls.use_privatekey(bob.key)
            assert tls.renegotiate()
            with pytest.raises(SSL.Error):  # noqa: PT012  # the refusal may come with any of them
                tls.do_handshake()
                tls.sendall(KEPT)
                tls.recv(1 << 16)
        assert b"bob" not in app.received
        assert app.received.count(b"GET / ") <= 2


def test_a15_no_certificate_is_taken_after_the_handshake(attacker: Attacker, ca: Ca) -> None:
    """A15: a client that offers post-handshake authentication is never asked, and one that sends a certificate unasked
    is cut off."""
    with App() as app, Running(ca, app.address) as guard:
        serve_sites(guard, Vhost(app, client_auth=ClientAuth.OPTIONAL, nameless=True))
        context = attacker.context(ca.client())
        context.post_handshake_auth = True
        assert attacker.call(guard, context=context).status == 200
        seen = bytes(app.received)
        with tlslite(guard, versions=((3, 4), (3, 4))) as tls:
            message = Certificate(0, (3, 4)).create(chain_of(ca.client("spiffe://test/admin")), b"")
            for _ in tls._sendMsg(message):
                pass
            with pytest.raises((TLSError, ConnectionError)):  # noqa: PT012  # it may be written before it is known
                tls.write(KEPT)
                tls.read(min=1)
        assert bytes(app.received) == seen
