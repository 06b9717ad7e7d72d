"""Rows C1 to C11: what is missing, broken or odd never opens the door."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
import struct
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.audit.clienthello import Hello
from handfast.errors import Failure, HandfastError
from handfast.guard.assembly import Assembly
from handfast.guard.config import load_config
from handfast.guard.events import Logged
from handfast.guard.places import parse_target
from handfast.guard.routes import Sites, Snapshot
from handfast.guard.upstream import Backend, Upstreams
from handfast.pki.certificates import fingerprint
from handfast.pki.names import parse_name
from handfast.pki.verification import Identity, Judgement, Purpose, Terms, TrustBundle, VerifiedPeer
from handfast.policy import Decision, parse_policy
from handfast.tls.client import ClientContext, ClientSettings
from handfast.tls.server import Accepted, ClientAuth, Facts, Refused
from tests.attacks.kit import (
    LISTENER,
    Attacker,
    Command,
    Vhost,
    command,
    one,
    port_of,
    revoked,
    serve_sites,
    untouched,
)
from tests.support.apps import HELLO, App, echo_head, get
from tests.support.certs import Ca, Leaf, Spec, general, make
from tests.support.guards import Running
from tests.support.waiting import PATIENCE, until

KEPT = get(close=False)


def _files(folder: Path, ca: Ca, to: str) -> str:
    ca.server().save(folder, "server")
    ca.save(folder, "clients")
    return f'{LISTENER}to = "{to}"\n'


def _start(folder: Path, config: str) -> None:
    (folder / "handfast.toml").write_text(config)
    Assembly(load_config(folder / "handfast.toml"), lambda path: path.read_bytes()).build(datetime.now(UTC))


def _missing(path: Path, ca: Ca) -> None:
    path.unlink()


def _dangling(path: Path, ca: Ca) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere.crt")


def _folder(path: Path, ca: Ca) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path, ca: Ca) -> None:
    path.unlink()
    os.mkfifo(path)


BUNDLES: dict[str, tuple[Callable[[Path, Ca], object], str]] = {
    "missing": (_missing, "input.missing"),
    "dangling": (_dangling, "input.missing"),
    "empty": (lambda path, ca: path.write_bytes(b""), "input.empty"),
    "blank": (lambda path, ca: path.write_bytes(b"\n\n"), "input.not_certificate"),
    "text": (lambda path, ca: path.write_text("no certificate"), "input.not_certificate"),
    "cut": (lambda path, ca: path.write_bytes(path.read_bytes()[:200]), "input.not_certificate"),
    "second_cut": (
        lambda path, ca: path.write_bytes(path.read_bytes() + path.read_bytes()[:200]),
        "input.not_certificate",
    ),
    "leaf": (
        lambda path, ca: path.write_bytes(ca.client().certificate.public_bytes(Encoding.PEM)),
        "input.not_certificate",
    ),
    "key": (lambda path, ca: shutil.copy(path.parent / "server.key", path), "input.not_certificate"),
    "folder": (_folder, "input.unreadable"),
    "fifo": (_fifo, "input.unreadable"),
    "expired": (
        lambda path, ca: path.write_bytes(_expired().certificate.public_bytes(Encoding.PEM)),
        "verify.expired",
    ),
}


def _expired() -> Leaf:
    now = datetime.now(UTC)
    begin, end = now - timedelta(days=2), now - timedelta(days=1)
    return make(Spec(cn="Old", eku=None, ca=True, not_before=begin, not_after=end), None)


@pytest.mark.parametrize("case", BUNDLES)
def test_c1_without_a_sound_bundle_there_is_no_start(ca: Ca, tmp_path: Path, case: str) -> None:
    """C1: a client_ca that is missing, empty, damaged, unreadable, no authority or expired refuses to start."""
    spoil, reason = BUNDLES[case]
    config = _files(tmp_path, ca, "127.0.0.1:1")
    _start(tmp_path, config)
    spoil(tmp_path / "clients.crt", ca)
    with pytest.raises(HandfastError) as refused:
        _start(tmp_path, config)
    assert refused.value.reason.code == reason


def test_c1_c2_a_bundle_that_breaks_keeps_the_old_one(attacker: Attacker, ca: Ca, tmp_path: Path) -> None:
    """C1, C2: after each reload with a broken bundle the old one is in force; an authority that the system trusts is
    never taken for one of ours."""
    stranger, leaf = Ca.root("System"), ca.client()
    system = stranger.save(tmp_path, "system")
    good = tmp_path / "good.crt"
    with App() as app:
        config = _files(tmp_path, ca, app.address)
        shutil.copy(tmp_path / "clients.crt", good)
        with command(tmp_path, config, SSL_CERT_FILE=str(system), SSL_CERT_DIR=str(tmp_path)) as guard:
            bundle = tmp_path / "clients.crt"
            for spoil, reason in BUNDLES.values():
                spoil(bundle, ca)
                _kept(guard, reason)
                assert attacker.call(guard.address, leaf).status == 200
                seen = bytes(app.received)
                assert attacker.call(guard.address, stranger.client()).refusal == (403, "verify.unknown_issuer")
                assert bytes(app.received) == seen
                _clear(bundle)
                shutil.copy(good, bundle)
                while guard.reload()["outcome"] != "taken":
                    pass


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _kept(guard: Command, reason: str) -> None:
    """Reload; the guard must say that it keeps what it has, and why."""
    event = guard.reload()
    while event.get("reason") != reason:  # it may have seen the change of file before the signal, or half of it
        assert event["outcome"] == "kept", event
        event = guard.next("reload")


@pytest.mark.parametrize(
    "line",
    [
        'client_auth = "required"\n',
        'client_auth = "optional"\n',
        'client_ca = ""\n',
        'client_ca = "clients.crt"\nallow = []\n',
        'client_ca = "clients.crt"\nalow = ["any"]\n',
        'client_ca = "clients.crt"\nclient_auth = "request"\n',
        'client_ca = "clients.crt"\nclient_auth = "optional"\nallow = ["spiffe://test/web"]\n',
        'client_auth = "off"\nallow = ["any"]\n',
        'client_ca = "clients.crt"\nocsp = "best effort"\n',
        'client_ca = "clients.crt"\ncrl = []\ncrls = ["x"]\n',
    ],
)
def test_c2_c4_c8_a_configuration_that_could_be_read_as_open_is_refused(ca: Ca, tmp_path: Path, line: str) -> None:
    """C2, C4, C8, D8: no client authority, an empty list of rules, an unknown key, rules that bind nobody, or a check
    that is not made, do not start."""
    _files(tmp_path, ca, "127.0.0.1:1")
    base = LISTENER.replace('client_ca = "clients.crt"\n', "") + 'to = "127.0.0.1:1"\n'
    _start(tmp_path, base + 'client_ca = "clients.crt"\n')
    with pytest.raises(HandfastError) as refused:
        _start(tmp_path, base + line)
    assert refused.value.reason.code in ("input.config", "guard.sites", "guard.no_bundle")


def test_c3_half_a_change_is_no_change(attacker: Attacker, ca: Ca, tmp_path: Path) -> None:
    """C3: a new certificate beside the old key, or a good bundle beside a broken rule, changes nothing; whole, it is
    taken, also as Kubernetes swaps it."""
    new, leaf = Ca.root("New"), ca.client()
    with App() as app:
        config = _files(tmp_path, ca, app.address)
        versions = [tmp_path / "..v1", tmp_path / "..v2"]
        for folder, authority in zip(versions, (ca, new), strict=True):
            folder.mkdir()
            ca.server().save(folder, "server")
            authority.save(folder, "clients")
        link = tmp_path / "..data"
        link.symlink_to("..v1")
        for name in ("server.crt", "server.key", "clients.crt"):
            (tmp_path / name).unlink()
            (tmp_path / name).symlink_to(f"..data/{name}")
        with command(tmp_path, config) as guard:

            def whom() -> tuple[int, int]:
                old, newcomer = attacker.call(guard.address, leaf), attacker.call(guard.address, new.client())
                return old.status, newcomer.status

            assert whom() == (200, 403)
            key = versions[0] / "server.key"
            kept = key.read_bytes()
            key.write_bytes((versions[1] / "server.key").read_bytes())
            new.save(versions[0], "clients")
            _kept(guard, "input.key_mismatch")
            assert whom() == (200, 403)
            key.write_bytes(kept)
            (tmp_path / "handfast.toml").write_text(config + 'allow = ["any", "spiffe://**"]\n')
            _kept(guard, "input.config")
            assert whom() == (200, 403)
            ca.save(versions[0], "clients")
            (tmp_path / "handfast.toml").write_text(config)
            while guard.reload()["outcome"] != "taken":
                pass
            assert whom() == (200, 403)
            swapped = tmp_path / "..tmp"
            swapped.symlink_to("..v2")
            os.replace(swapped, link)
            while guard.next("reload")["outcome"] != "taken":  # it notices by itself
                pass
            assert whom() == (403, 200)


@pytest.mark.parametrize("mode", ["required", "optional", "off", "tcp"])
def test_c4_a_certificate_that_nobody_vouches_for_is_no_identity(attacker: Attacker, ca: Ca, mode: str) -> None:
    """C4: a self-signed CN=admin is refused wherever certificates are asked for, and tells the app nothing where they
    are not."""
    admin = make(Spec(names=[general("spiffe://test/admin")], cn="admin"), None)
    with App(echo_head) as app, Running(ca, f"tcp://{app.address}" if mode == "tcp" else app.address) as guard:
        if mode != "tcp":
            serve_sites(guard, Vhost(app, client_auth=ClientAuth(mode), nameless=True))
        heard = attacker.call(guard, admin)
        if mode == "off":
            assert heard.status == 200
            assert b"client-" not in heard.body.lower()
            assert b"admin" not in heard.body
            return
        assert heard.status == (0 if mode == "tcp" else 403)
        assert guard.events.next("connection")["reason"] == "verify.unknown_issuer"
        assert untouched(app)


def test_c5_there_is_one_verdict() -> None:
    """C5: no value that says who a peer is, or whether it may go on, has a flag beside it that somebody could forget to
    read: a revoked peer is no VerifiedPeer."""
    values = (VerifiedPeer, Identity, Judgement, Decision, Accepted, Refused, Facts, Failure, Logged)
    for value in values:
        kinds = (
            [field.type for field in dataclasses.fields(value)]
            if dataclasses.is_dataclass(value)
            else list(value.__annotations__.values())
        )
        assert not [kind for kind in kinds if kind in ("bool", bool)], value
    assert not [name for name in ("accepted", "verified", "revoked") if hasattr(VerifiedPeer, name)]


@pytest.mark.parametrize("mode", ["required", "optional"])
def test_c5_a_revoked_peer_is_nowhere_called_verified(attacker: Attacker, ca: Ca, mode: str) -> None:
    """C5: a revoked certificate makes no "verified, but": the app is not told of it in any way."""
    leaf = ca.client()
    with App() as app, Running(ca, app.address) as guard:
        serve_sites(
            guard,
            Vhost(app, client_auth=ClientAuth(mode), nameless=True, terms={"revocations": revoked(leaf)}),
        )
        assert attacker.call(guard, leaf).refusal == (403, "verify.revoked")
        assert guard.events.next("connection")["decision"] == "deny"
        assert untouched(app)


def test_c6_what_a_refused_client_says_goes_nowhere(attacker: Attacker, ca: Ca) -> None:
    """C6: a refused client that goes on talking, pipelined or bit by bit, reaches no app (CVE-2021-30130's class)."""
    with App() as app, Running(ca, app.address) as guard:
        for request in (KEPT * 50, b"GET / HT", b"\x16\x03\x01" * 10, b"x" * 200_000):
            for leaf in (None, Ca.root("Other").client()):
                with attacker.open(guard, leaf) as tls:
                    heard = one(tls, request + b"\r\n\r\n")
                    assert heard.status in (0, 403)
                    assert one(tls, KEPT).statuses in ([], [403])
        assert untouched(app)


def test_c7_plaintext_before_the_handshake_is_never_served(ca: Ca) -> None:
    """C7: 2,000 clients that send a request in the clear, or a hello and a request, and end at once by FIN or RST,
    bring not a byte to the app, nor is it dialled (CVE-2023-40217)."""
    hello = Hello("localhost").records()
    openings = (KEPT, hello + KEPT, hello[:50] + KEPT, b"\x17\x03\x03" + len(KEPT).to_bytes(2, "big") + KEPT)
    reset = struct.pack("ii", 1, 0)
    for tcp in (False, True):
        with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
            for turn in range(1000):
                with socket.create_connection(port_of(guard.address), timeout=PATIENCE) as plain:
                    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    opening = openings[turn % len(openings)]
                    cut = turn % 7 * len(opening) // 7
                    plain.sendall(opening[:cut])
                    for _ in range(turn % 50 * 20):  # some microseconds
                        pass
                    plain.sendall(opening[cut:])
                    match turn % 3:
                        case 0:
                            plain.shutdown(socket.SHUT_WR)
                        case 1:
                            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            until(lambda: not guard.guard.connections, "the end of all")
            assert untouched(app)


@pytest.mark.parametrize("tcp", [False, True])
def test_c8_an_empty_policy_lets_nobody_in(attacker: Attacker, ca: Ca, tcp: bool) -> None:
    """C8: no rule at all denies everyone."""
    with (
        App() as app,
        Running(ca, f"tcp://{app.address}" if tcp else app.address, parse_policy([])) as guard,
    ):
        heard = attacker.call(guard, ca.client())
        assert heard.status in (0, 403)
        assert untouched(app)
        event = guard.events.next("connection" if tcp else "request")
        assert (event["decision"], event["reason"]) == ("deny", "policy.no_rule")


URIS = {
    "https://admin@corp.example/x": False,
    "https://corp.example/a?x=/ops": False,
    "https://corp.example/a#/ops": False,
    "https://corp.example/ops/../admin": False,
    "https://corp.example/ops/%2e%2e/admin": False,
    "https://corp.example/ops/a/b": False,
    "https://corp.example/ops/": False,
    "https://CORP.example/OPS/a": False,
    "https://corp.example.evil/ops/a": False,
    "https://corp.example/ops/a": True,
}


@pytest.mark.parametrize("uri", URIS)
def test_c9_a_star_stays_in_its_segment(attacker: Attacker, ca: Ca, uri: str) -> None:
    """C9: `uri:https://corp.example/ops/*` lets in one segment more, and nothing that only reads like it."""
    with (
        App() as app,
        Running(ca, app.address, parse_policy(["uri:https://corp.example/ops/*"])) as guard,
    ):
        assert (attacker.call(guard, ca.client(uri)).status == 200) is URIS[uri]
        assert untouched(app) is not URIS[uri]


def test_c10_identities_do_not_mix_on_the_way_to_the_app(attacker: Attacker, ca: Ca) -> None:
    """C10: two clients that take turns 1,000 times each are told apart by the app every time, and get their own
    answers."""
    with App(echo_head) as app, Running(ca, app.address) as guard:
        names = ("alice", "bob")
        wrong: list[bytes] = []

        def take_turns(name: str) -> None:
            with attacker.open(guard, ca.client(f"spiffe://test/{name}")) as tls:
                for turn in range(1000):
                    body = one(tls, get(f"/{name}/{turn}", close=False)).body
                    told = re.findall(rb'^Client-Identity: "spiffe://test/(\w+)"\r?$', body, re.M)
                    if told != [name.encode()] or not body.startswith(f"GET /{name}/{turn} ".encode()):
                        wrong.append(body)

        threads = [threading.Thread(target=take_turns, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert app.connections == 2  # one to the app for each client, never shared


def test_c10_an_answer_that_nobody_asked_for_is_nobodys(attacker: Attacker, ca: Ca) -> None:
    """C10: a second answer from the app, at once or later, is not given to the next request (CVE-2026-1642's class)."""

    def twice(connection: socket.socket, request: bytes) -> None:
        stale = HELLO.replace(b"Hello World", b"stale stale")
        connection.sendall(HELLO + (stale if b"/at-once" in request else b""))
        if b"/later" in request:
            threading.Timer(0.05, connection.sendall, (stale,)).start()

    with App(twice) as app, Running(ca, app.address) as guard, attacker.open(guard, ca.client()) as tls:
        for path in ("/at-once", "/later", "/"):
            assert one(tls, get(path, close=False)).body == b"Hello World\n"
            if path == "/later":
                until(lambda: guard.call(_upstream_gone, guard), "the end of the connection to the app")
        assert app.connections == 3


def _upstream_gone(guard: Running) -> bool:
    (connection,) = guard.guard.connections
    return connection._session._upstream is None  # type: ignore[union-attr]  # no way to see it from outside


def test_c10_what_an_app_says_before_its_handshake_is_no_answer(attacker: Attacker, ca: Ca) -> None:
    """C10: an answer in the clear from an app that should speak TLS is not passed on (CVE-2026-1642)."""

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(HELLO)
            connection.recv(1 << 16)

    with socket.create_server(("127.0.0.1", 0)) as listener, Running(ca, "127.0.0.1:1") as guard:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        target = parse_target(f"https://127.0.0.1:{listener.getsockname()[1]}")
        terms = Terms(TrustBundle((ca.certificate,)), Purpose.SERVER, parse_name("localhost"))
        context = ClientContext(None, terms, ClientSettings("localhost"))
        group = Upstreams(
            "tls", (Backend(target),), handshake=lambda _: context.connect(lambda: datetime.now(UTC)), retries=0
        )
        held = guard.snapshot().sites["main"].all[0]
        route = dataclasses.replace(held.routes[0], upstreams=group)
        guard.swap(Snapshot({"main": Sites([dataclasses.replace(held, routes=(route,))])}))
        heard = attacker.call(guard, ca.client())
        assert heard.status == 502
        assert b"Hello World" not in heard.answer
        thread.join(PATIENCE)


def test_c11_a_pinned_certificate_is_still_judged(attacker: Attacker, ca: Ca) -> None:
    """C11: a rule that names a certificate by its digest lets in neither that certificate out of its time nor one that
    another authority made or that was revoked."""
    now = datetime.now(UTC)
    leaves: dict[str, tuple[Leaf, str | None]] = {
        "good": (ca.client(), None),
        "expired": (ca.client(not_before=now - timedelta(days=2), not_after=now - timedelta(days=1)), "verify.expired"),
        "stranger": (Ca.root("Other").client(), "verify.unknown_issuer"),
        "purpose": (ca.client(eku=None), "verify.no_eku"),
        "revoked": (ca.client("spiffe://test/revoked"), "verify.revoked"),
    }
    pins: list[Any] = [f"sha256:{fingerprint(leaf.certificate)}" for leaf, _ in leaves.values()]
    with App() as app, Running(ca, app.address) as guard:
        guard.swap(guard.snapshot(parse_policy(pins), revocations=revoked(leaves["revoked"][0])))
        for leaf, reason in leaves.values():
            heard = attacker.call(guard, leaf)
            assert heard.status == 200 if reason is None else heard.refusal == (403, reason)
        assert app.connections == 1
        assert attacker.call(guard, ca.client()).refusal == (403, "policy.no_rule")
