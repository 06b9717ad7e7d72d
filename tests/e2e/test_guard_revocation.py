"""Revocation: lists in files with each reason to refuse, rotated while the guard runs, and an authority's live feed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from tests.e2e.guard_kit import LIMIT, Client, Files, guarding, metric
from tests.e2e.kit import Caller
from tests.support.apps import App
from tests.support.certs import Ca, Leaf
from tests.support.programs import free_port
from tests.support.waiting import Stopwatch, until

HOUR = timedelta(hours=1)


def crl(path: Path, ca: Ca, *revoked: Leaf, until: timedelta = HOUR, signer: Ca | None = None) -> None:
    """Write a revocation list of an authority, by renaming, as those who fetch lists do."""
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.certificate.subject)
    builder = builder.last_update(now - 2 * HOUR).next_update(now + until)
    for leaf in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(leaf.certificate.serial_number).revocation_date(now)
        builder = builder.add_revoked_certificate(entry.build())
    signed = builder.sign((signer or ca).key, hashes.SHA256())
    new = path.with_suffix(".new")
    new.write_bytes(signed.public_bytes(Encoding.PEM))
    new.rename(path)


SITE = """
[[listener.site]]
names = ["{name}.test"]
cert = "{name}.crt"
key = "{name}.key"
client_ca = "ca.crt"
crl = [{crls}]
to = "{to}"
"""


def test_each_fault_of_a_list_has_its_reason(tmp_path: Path) -> None:
    """Revoked, no list of an issuer, a list out of date, and one that the issuer did not sign are four refusals; a
    list in doubt counts against the client, and a good list lets in whom it does not name.
    """
    files = Files(tmp_path)
    sub = files.ca.sub("Sub")
    for name, ca in (("good", files.ca), ("bad", files.ca), ("deep", sub)):
        files.client(name, ca)
    bad, impostor = files.clients["bad"], Ca.root("Test Root")
    crl(tmp_path / "good.crl", files.ca, bad)
    crl(tmp_path / "sub.crl", sub)
    crl(tmp_path / "late.crl", files.ca, bad, until=-HOUR)
    crl(tmp_path / "forged.crl", files.ca, signer=impostor)
    sites = {"plain": '"good.crl"', "both": '"good.crl", "sub.crl"', "late": '"late.crl"', "forged": '"forged.crl"'}
    for name in sites:
        files.server(name, f"{name}.test")
    cases = [
        ("plain", "good", 200, None),
        ("plain", "bad", 403, "verify.revoked"),
        ("plain", "deep", 403, "verify.crl_missing"),
        ("both", "deep", 200, None),
        ("late", "good", 403, "verify.crl_stale"),
        ("late", "bad", 403, "verify.revoked"),
        ("forged", "good", 403, "verify.crl_invalid"),
    ]
    with App() as app:
        config = '[[listener]]\nlisten = "127.0.0.1:0"\n'
        config += "".join(SITE.format(name=name, crls=crls, to=app.address) for name, crls in sites.items())
        with guarding(tmp_path, config) as guard:
            for site, who, status, reason in cases:
                got = files.client(who).ask(guard.port, name=f"{site}.test")
                assert (got.status, None if status == 200 else got.error[1]) == (status, reason), (site, who)
                if reason:
                    assert guard.next("connection", decision="deny")["reason"] == reason


@pytest.mark.parametrize("mode", ["http", "tcp"])
def test_a_list_that_is_replaced_cuts_who_is_on_it(tmp_path: Path, mode: str) -> None:
    """A new list in the file ends the open connection of whom it names within 2 s, refuses new ones, and leaves the
    others' connections open; the metrics count both.
    """
    files, admin = Files(tmp_path), free_port()
    alice, bob = files.client("alice"), files.client("bob")
    crl(tmp_path / "ca.crl", files.ca)
    with App() as app:
        to = app.address if mode == "http" else f"tcp://{app.address}"
        config = f"""
            [admin]
            listen = "127.0.0.1:{admin}"
            [[listener]]
            listen = "127.0.0.1:0"
            mode = "{mode}"
            cert = "server.crt"
            key = "server.key"
            client_ca = "ca.crt"
            crl = ["ca.crl"]
            to = "{to}"
        """
        with (
            guarding(tmp_path, config) as guard,
            alice.line(guard.port) as hers,
            bob.line(guard.port) as his,
        ):
            assert (hers.ask().status, his.ask().status) == (200, 200)
            crl(tmp_path / "ca.crl", files.ca, files.clients["bob"])
            assert his.ends_within(LIMIT)
            assert guard.next("ended", peer="spiffe://test/bob")["reason"] == "ended.revoked"
            assert hers.ask().status == 200
            assert refused(bob, guard.port)
            assert guard.next("connection", decision="deny")["reason"] == "verify.revoked"
            assert metric(admin, 'handfast_connections_cut_total{reason="ended.revoked"}') == 1
            assert metric(admin, 'handfast_reloads_total{outcome="taken"') == 1


def refused(client: Client, port: int) -> bool:
    """Whether a client is refused: in words, or by an alert where there are none."""
    try:
        return client.ask(port).status == 403
    except OSError:
        return True


def test_a_list_that_is_broken_keeps_the_one_before(tmp_path: Path) -> None:
    """A new list that cannot be read is not taken: who was revoked stays so, and who was not stays in."""
    files = Files(tmp_path)
    alice, bob = files.client("alice"), files.client("bob")
    crl(tmp_path / "ca.crl", files.ca, files.clients["bob"])
    with App() as app:
        config = f"""
            [[listener]]
            listen = "127.0.0.1:0"
            cert = "server.crt"
            key = "server.key"
            client_ca = "ca.crt"
            crl = ["ca.crl"]
            to = "{app.address}"
        """
        with guarding(tmp_path, config) as guard:
            (tmp_path / "ca.crl").write_text("-----BEGIN X509 CRL-----\nMIIB\n")
            kept = guard.next("reload")
            assert (kept["outcome"], kept["reason"]) == ("kept", "input.not_crl")
            assert "ca.crl" in kept["detail"]
            assert alice.ask(guard.port).status == 200
            assert bob.ask(guard.port).error == (403, "verify.revoked")


@pytest.mark.parametrize(("depth", "refusals"), [(0, {"one", "two"}), (1, {"two"}), (2, set())])
def test_how_deep_a_chain_may_be(tmp_path: Path, depth: int, refusals: set[str]) -> None:
    """--verify-depth is how many authorities may stand between a client and its root."""
    files = Files(tmp_path)
    one = files.ca.sub("One")
    for name, ca in (("none", files.ca), ("one", one), ("two", one.sub("Two"))):
        files.client(name, ca)
    with App() as app:
        words = ("--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt", "--to", app.address)
        with guarding(tmp_path, None, *words, "--verify-depth", str(depth)) as guard:
            for name in ("none", "one", "two"):
                got = files.client(name).ask(guard.port)
                assert got.status == (403 if name in refusals else 200)
                assert name not in refusals or got.error[1] == "verify.depth"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_authoritys_word_is_law_within_two_seconds(call: Caller, state: Path, tmp_path: Path, workers: int) -> None:
    """With `state = …`, `handfast revoke` beside the running guard cuts the client's open connections and refuses
    it, within 2 s; bare names in rules are of the authority's trust domain; the sandbox does not stand in the way.
    """
    server = call.done("issue", "localhost", "127.0.0.1", "--state", state)
    clients = {}
    for name in ("bob", "carol", "dave"):
        clients[name] = Client.of(call.done("issue", name, "--state", state, "--out", name))
    with App() as app:
        config = f"""
            [[listener]]
            listen = "127.0.0.1:0"
            cert = "{server["cert"]}"
            key = "{server["key"]}"
            to = "{app.address}"
            allow = ["bob", "carol"]
        """
        top = f'state = "{state}"\nworkers = {workers}\n'
        with guarding(tmp_path, config, top=top) as guard, clients["bob"].line(guard.port) as his:
            assert his.ask().status == 200
            assert clients["carol"].ask(guard.port).status == 200
            assert clients["dave"].ask(guard.port).error == (403, "policy.no_rule")
            call.done("revoke", "bob", "--state", state)
            with Stopwatch() as watch:
                assert his.ends_within(LIMIT)
                assert guard.next("ended")["reason"] == "ended.revoked"
                until(lambda: len(guard.events("reload")) == workers, "the revocation in each worker")
            assert watch.seconds < LIMIT
            for _ in range(4):
                assert clients["bob"].ask(guard.port).error == (403, "verify.revoked")
            assert clients["carol"].ask(guard.port).status == 200


def test_who_is_revoked_may_not_serve_either(call: Caller, state: Path, tmp_path: Path) -> None:
    """An app's server certificate that the authority revoked is no longer spoken to."""
    guard_cert = call.done("issue", "localhost", "--state", state, "--out", "guard")
    app_cert = call.done("issue", "localhost", "--state", state, "--out", "app")
    bob = Client.of(call.done("issue", "bob", "--state", state, "--out", "bob"))
    port, top = free_port(), f'state = "{state}"\n'
    with App() as app:
        inner = f"""
            [[listener]]
            listen = "127.0.0.1:{port}"
            cert = "{tmp_path / app_cert["cert"]}"
            key = "{tmp_path / app_cert["key"]}"
            client_auth = "off"
            to = "{app.address}"
        """
        outer = f"""
            [upstream.app]
            targets = ["https://127.0.0.1:{port}"]
            server_name = "localhost"
            [[listener]]
            listen = "127.0.0.1:0"
            cert = "{guard_cert["cert"]}"
            key = "{guard_cert["key"]}"
            to = "app"
        """
        (tmp_path / "inner").mkdir()
        with guarding(tmp_path / "inner", inner, top=top), guarding(tmp_path, outer, top=top) as guard:
            assert bob.ask(guard.port).status == 200
            call.done("revoke", app_cert["serial"], "--state", state)
            guard.next("reload", outcome="taken")
            assert bob.ask(guard.port).error == (502, "upstream.tls")
            assert "revoked" in guard.next("request", reason="upstream.tls")["detail"]


def test_a_revocation_waits_for_no_file(call: Caller, state: Path, tmp_path: Path) -> None:
    """While a file is broken, and so all files are kept as they were, who is revoked is still cut off within 2 s; once
    the file is whole again it is read, and the revocation stands.
    """
    server = call.done("issue", "localhost", "127.0.0.1", "--state", state, "--out", "server")
    clients = {}
    for name in ("bob", "carol"):
        clients[name] = Client.of(call.done("issue", name, "--state", state, "--out", name))
    rules = tmp_path / "rules"
    rules.write_text("allow bob\nallow carol\n")
    with App() as app:
        config = f"""
            [[listener]]
            listen = "127.0.0.1:0"
            cert = "{server["cert"]}"
            key = "{server["key"]}"
            to = "{app.address}"
            allow_file = "rules"
        """
        with guarding(tmp_path, config, top=f'state = "{state}"\n') as guard, clients["bob"].line(guard.port) as his:
            assert his.ask().status == 200
            rules.write_text("allow bob\nallow nonsense(\n")
            assert guard.next("reload")["outcome"] == "kept"
            call.done("revoke", "bob", "--state", state)
            with Stopwatch() as watch:
                assert his.ends_within(LIMIT)
            assert watch.seconds < LIMIT
            assert guard.next("ended")["reason"] == "ended.revoked"
            assert clients["bob"].ask(guard.port).error == (403, "verify.revoked")
            assert clients["carol"].ask(guard.port).status == 200, "the rules are as they were"
            assert guard.next("reload", outcome="kept")["reason"] == "input.config", "it is still told"
            rules.write_text("allow bob\n")
            guard.next("reload", outcome="taken")
            assert clients["carol"].ask(guard.port).error == (403, "policy.no_rule")
            assert clients["bob"].ask(guard.port).error == (403, "verify.revoked")
