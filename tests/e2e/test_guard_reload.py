"""Change without a drop: files and settings are taken while the guard runs, whole or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.e2e.guard_kit import LIMIT, Files, Guarded, Load, apps, guarding, metric
from tests.support.apps import App
from tests.support.certs import Ca, Leaf
from tests.support.programs import free_port

CONFIG = """
[[listener]]
name = "main"
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
{site}
"""


def config(to: str, site: str = "") -> str:
    return CONFIG.format(site=f'to = "{to}"\n{site}')


def put(path: Path, text: str | bytes) -> None:
    """Replace a file by renaming."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(text.encode() if isinstance(text, str) else text)
    new.rename(path)


def renew(files: Files) -> Leaf:
    """Put another server certificate and its key in place, one after the other."""
    leaf = files.ca.server()
    made = leaf.save(files.folder, "next")
    for new, old in zip(made, ("server.crt", "server.key"), strict=True):
        put(files.folder / old, new.read_bytes())
    return leaf


def by_itself(guard: Guarded) -> None:
    """The guard finds a change."""


def by_signal(guard: Guarded) -> None:
    """The guard is told of a change."""
    guard.send(signal.SIGHUP)


@pytest.mark.parametrize("told", [by_itself, by_signal])
def test_a_new_certificate_is_shown(tmp_path: Path, told: Callable[[Guarded], None]) -> None:
    """New handshakes show the new certificate, found in the files or told of by SIGHUP; an open connection goes on
    as it was; there is one event.
    """
    files = Files(tmp_path)
    alice = files.client()
    with App() as app, guarding(tmp_path, config(app.address)) as guard, alice.line(guard.port) as line:
        assert line.ask().status == 200
        leaf = renew(files)
        told(guard)
        assert guard.next("reload")["outcome"] == "taken"
        assert line.ask().status == 200
        with alice.line(guard.port) as new:
            assert new.shown == leaf.certificate.public_bytes(Encoding.DER) != line.shown
            assert new.ask().status == 200
        assert app.connections == 2
    assert len(guard.events("reload")) == 1


def _broken_certificate(files: Files) -> str:
    put(files.folder / "server.crt", "-----BEGIN CERTIFICATE-----\nMIIB")
    return "input.not_certificate"


def _half_a_pair(files: Files) -> str:
    put(files.folder / "server.crt", files.ca.server().save(files.folder, "next")[0].read_bytes())
    return "input.key_mismatch"


def _missing_key(files: Files) -> str:
    (files.folder / "server.key").unlink()
    return "input.missing"


def _empty_authorities(files: Files) -> str:
    put(files.folder / "ca.crt", "")
    return "input.empty"


def _unknown_setting(files: Files) -> str:
    path = files.folder / "handfast.toml"
    put(path, path.read_text() + "clientca = 1\n")
    return "input.config"


def _other_address(files: Files) -> str:
    path = files.folder / "handfast.toml"
    put(path, path.read_text().replace('listen = "127.0.0.1:0"', 'listen = "127.0.0.2:0"'))
    return "guard.restart"


def _more_workers(files: Files) -> str:
    path = files.folder / "handfast.toml"
    put(path, "workers = 4\n" + path.read_text())
    return "guard.restart"


def _another_listener(files: Files) -> str:
    path = files.folder / "handfast.toml"
    text = path.read_text()
    put(path, text + text[text.index("[[listener]]") :].replace('"main"', '"second"'))
    return "guard.restart"


def _file_beyond_the_sandbox(files: Files) -> str:
    elsewhere = files.folder.parent / f"{files.folder.name}-elsewhere"
    elsewhere.mkdir()
    files.ca.server().save(elsewhere, "server")
    path = files.folder / "handfast.toml"
    put(path, path.read_text().replace('"server.', f'"{elsewhere}/server.'))
    return "guard.restart"


SPOILED = (
    *(_broken_certificate, _half_a_pair, _missing_key, _empty_authorities, _unknown_setting),
    *(_other_address, _more_workers, _another_listener, _file_beyond_the_sandbox),
)


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_cannot_be_taken_changes_nothing(tmp_path: Path, spoil: Callable[[Files], str]) -> None:
    """Half a change, a broken or missing file, and a setting that only a restart can change leave all as it was, for
    open connections and new ones; one event says why, a metric counts it; once mended, all that came since is taken.
    """
    files, admin = Files(tmp_path), free_port()
    files.ca.save(tmp_path, "trusted")  # by the client; ca.crt is the guard's
    alice = replace(files.client(), ca=tmp_path / "trusted.crt")
    with apps("old", "new") as (old, new):
        text = f'[admin]\nlisten = "127.0.0.1:{admin}"\n' + config(old.address)
        with guarding(tmp_path, text) as guard, alice.line(guard.port) as line:
            assert line.ask().body == b"old"
            before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".crt", ".key")}
            reason = spoil(files)
            kept = guard.next("reload")
            assert (kept["outcome"], kept["reason"]) == ("kept", reason)
            assert kept["detail"]
            guard.send(signal.SIGHUP)  # the same again is no news
            assert line.ask().body == b"old"
            with alice.line(guard.port) as another:
                assert another.shown == line.shown
                assert another.ask().body == b"old"
            assert metric(admin, f'handfast_reloads_total{{outcome="kept",reason="{reason}"}}') == 1
            for path, data in before.items():
                put(path, data)
            put(tmp_path / "handfast.toml", 'log = "json"\n' + text.replace(old.address, new.address))
            assert guard.next("reload")["outcome"] == "taken"
            assert line.ask().body == b"new"
            assert metric(admin, "handfast_reloads_total") == 2


def test_rules_and_routes_reach_the_next_request(tmp_path: Path) -> None:
    """Rules of the file, of a rules file, and routes hold from the next request on, on connections that are open;
    who is let in nowhere any more is cut off.
    """
    files = Files(tmp_path)
    alice, bob = files.client("alice"), files.client("bob")
    rules = tmp_path / "rules"
    rules.write_text("any GET\n")
    with apps("one", "two") as (one, two):
        text = config(one.address, 'allow_file = "rules"\n')
        with guarding(tmp_path, text) as guard, alice.line(guard.port) as hers, bob.line(guard.port) as his:
            assert hers.ask().body == b"one"
            assert hers.ask(method="PUT").error == (403, "policy.no_rule")
            put(rules, "spiffe://test/alice  # all that she wants\nany GET /public/**\n")
            guard.next("reload", outcome="taken")
            assert hers.ask(method="PUT").body == b"one"
            assert his.ask().error == (403, "policy.no_rule")
            assert his.ask("/public/a").body == b"one"
            route = f'[[listener.route]]\npath = "/two/**"\nto = "{two.address}"\nallow = ["spiffe://test/alice"]\n'
            put(tmp_path / "handfast.toml", 'log = "json"\n' + text + route)
            guard.next("reload", outcome="taken")
            assert hers.ask("/two/x").body == b"two"
            assert hers.ask("/").body == b"one"
            assert his.ask("/two/x").error == (403, "policy.no_rule")
            put(rules, "spiffe://test/alice\n")
            assert guard.next("ended")["reason"] == "ended.policy"
            assert his.ends_within(LIMIT)
            guard.next("reload", outcome="taken")
            put(rules, "spiffe://test/al ice nonsense words\n")
            kept = guard.next("reload", outcome="kept")
            assert kept["reason"] == "input.config"
            assert "line 1" in kept["detail"]
            assert hers.ask().body == b"one"


def test_an_authority_that_is_taken_away_takes_its_clients_along(tmp_path: Path) -> None:
    """A client authority that is no longer in the bundle ends the connections of its clients within 2 s."""
    files = Files(tmp_path)
    alice = files.client()
    with App() as app, guarding(tmp_path, config(app.address)) as guard, alice.line(guard.port) as line:
        assert line.ask().status == 200
        Ca.root("Next").save(tmp_path, "next")
        put(tmp_path / "handfast.toml", (tmp_path / "handfast.toml").read_text().replace('"ca.crt"', '"next.crt"'))
        assert line.ends_within(LIMIT)
        assert guard.next("ended")["reason"] == "verify.unknown_issuer"
        assert alice.ask(guard.port).error == (403, "verify.unknown_issuer")


@pytest.mark.parametrize("workers", [1, 2])
def test_under_load_no_request_fails(tmp_path: Path, workers: int) -> None:
    """While certificates, rules and settings change again and again, every request on new and on open connections
    is answered with 200.
    """
    files = Files(tmp_path)
    alice = files.client()
    local = threading.local()
    with App() as app:
        text = config(app.address, 'allow = ["any"]\n')
        with guarding(tmp_path, text, top=f"workers = {workers}\n") as guard:
            lines = []

            def call() -> None:
                if not hasattr(local, "line"):
                    opened = alice.line(guard.port)
                    local.line = opened.__enter__()
                    lines.append(opened)
                assert local.line.ask().status == 200
                assert alice.ask(guard.port).status == 200

            with Load(call) as load:
                for number in range(3):
                    renew(files)
                    put(
                        tmp_path / "handfast.toml",
                        f'log = "json"\nworkers = {workers}\n' + text.replace('["any"]', f'["any", "any /{number}"]'),
                    )
                    guard.send(signal.SIGHUP)
                    for _ in range(workers):
                        guard.next("reload", outcome="taken")
                    load.goes_on()
            for opened in lines:
                opened.__exit__(None, None, None)
            assert load.failures == []
            assert load.calls > 30
