"""`handfast guard` by flags and by a file: both say the same, and what is wrong is told."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from handfast.cli.guard import _from_flags, guard_
from handfast.errors import Exit
from handfast.guard.config import parse_config
from handfast.guard.schema import Config
from tests.e2e.guard_kit import Files, guarding
from tests.e2e.kit import Caller, Outcome
from tests.support.apps import App, echo_head
from tests.support.programs import HANDFAST, Child, handfast

NEEDED = ("--to", "127.0.0.1:8000", "--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt")
SITE = """
[[listener]]
name = "main"
listen = "127.0.0.1:8443"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "127.0.0.1:8000"
"""

# What is added to NEEDED, and what is added to the file: at its top, and in its listener.
TWINS: list[tuple[tuple[str, ...], str, str]] = [
    ((), "", ""),
    (("--listen", "[::1]:9443"), "", 'listen = "[::1]:9443"'),
    (("--to", "unix:/run/app.sock"), "", 'to = "unix:/run/app.sock"'),
    (("--to", "h2c://app:50051"), "", 'to = "h2c://app:50051"'),
    (("--to", "tcp://:5432"), "", 'mode = "tcp"\nto = "tcp://127.0.0.1:5432"'),
    (("--key-passphrase-file", "pass"), "", 'key_passphrase_file = "pass"'),
    (("--allow", "dns:*.corp", "--allow", "any GET"), "", 'allow = ["dns:*.corp", "any GET"]'),
    (("--client-auth", "optional"), "", 'client_auth = "optional"'),
    (("--client-auth", "off"), "", 'client_auth = "off"'),
    (("--crl", "a.crl", "--crl", "b.crl"), "", 'crl = ["a.crl", "b.crl"]'),
    (("--ocsp", "require"), "", 'ocsp = "require"'),
    (("--verify-depth", "0"), "", "verify_depth = 0"),
    (("--tls-min", "1.2"), "", 'tls_min = "1.2"'),
    (("--header", "xfcc", "--header", "client-cert"), "", 'headers = ["xfcc", "client-cert"]'),
    (("--header", "assertion"), "[assertion]", 'headers = ["assertion"]'),
    (("--legacy-certs",), "", "legacy_certs = true"),
    (("--no-ca-names",), "", "offer_authorities = false"),
    (("--workers", "3"), "workers = 3", ""),
    (("--workers", "auto"), 'workers = "auto"', ""),
    (("--admin", "127.0.0.1:9464"), '[admin]\nlisten = "127.0.0.1:9464"', ""),
    (("--drain", "5m"), 'drain = "5m"', ""),
    (("--json",), 'log = "json"', ""),
]


def by_flags(*words: str) -> Config:
    """What flags mean."""
    context = guard_.make_context("guard", list(words))
    flags = {name: context.params[name] for name in context.params if name not in ("file", "check", "as_json")}
    return _from_flags(flags, context.params["as_json"])


@pytest.mark.parametrize(("flags", "top", "listener"), TWINS)
def test_each_flag_has_its_twin(flags: tuple[str, ...], top: str, listener: str) -> None:
    """A guard of flags is the guard of a file that says the same, to the last setting."""
    needed = [word for at in range(0, len(NEEDED), 2) for word in NEEDED[at : at + 2] if NEEDED[at] not in flags]
    own = {line.partition(" ")[0] for line in listener.splitlines()}
    lines = [line for line in SITE.splitlines() if not line or line.partition(" ")[0] not in own]
    text = "\n".join([top, *lines, listener])
    assert by_flags(*needed, *flags) == parse_config(text, "handfast.toml", Path())


def test_every_flag_was_compared() -> None:
    """No flag is without a twin."""
    shown = {word for flags, _, _ in TWINS for word in flags} | {*NEEDED, "--help", "--config", "--check", "--keys"}
    every = {option.opts[-1] for option in guard_.params if isinstance(option, click.Option)}
    assert every - shown == set()


@pytest.fixture
def app() -> Iterator[App]:
    with App(echo_head) as running:
        yield running


@pytest.mark.parametrize("how", ["flags", "file"])
def test_flags_and_file_do_the_same(tmp_path: Path, app: App, how: str) -> None:
    """Rules, header style, TLS 1.2 and the admin listener work, whichever way they were asked for."""
    files = Files(tmp_path)
    alice, bob = files.client("alice"), files.client("bob")
    words: tuple[str, ...] = ()
    config = None
    if how == "flags":
        words = ("--to", app.address, *NEEDED[2:], "--allow", "spiffe://test/alice GET", "--header", "x-ssl-client")
        words += ("--tls-min", "1.2", "--admin", f"unix:{tmp_path}/admin.sock")
    else:
        config = f'[admin]\nlisten = "unix:admin.sock"\n{SITE}headers = ["x-ssl-client"]\ntls_min = "1.2"\n'
        config = config.replace("127.0.0.1:8000", app.address).replace("127.0.0.1:8443", "127.0.0.1:0")
        config += 'allow = ["spiffe://test/alice GET"]\n'
    with guarding(tmp_path, config, *words) as guard:
        sent = alice.ask(guard.port).lines
        assert (sent["x-ssl-client-verify"], "client-cert" in sent) == ("SUCCESS", False)
        assert alice.ask(guard.port, method="POST").error == (403, "policy.no_rule")
        assert bob.ask(guard.port).error == (403, "policy.no_rule")
        assert files.nobody.ask(guard.port).error == (403, "verify.no_certificate")
        assert guard.next("request", peer="spiffe://test/alice")["rule"] == "allow spiffe://test/alice GET"
        with alice.line(guard.port, newest=ssl.TLSVersion.TLSv1_2) as line:
            assert (line.ask().status, line.tls.version()) == (200, "TLSv1.2")
        with socket.socket(socket.AF_UNIX) as plain:
            plain.connect(str(tmp_path / "admin.sock"))
            plain.sendall(b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert plain.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert app.received.count(b"GET / ") == 2


def test_a_good_configuration_is_said_to_be_good(call: Caller, tmp_path: Path) -> None:
    """`--check` reads all files, says where the guard would listen, binds nothing and ends with 0."""
    Files(tmp_path)
    (tmp_path / "handfast.toml").write_text(SITE)
    said = call("guard", "-c", "handfast.toml", "--check")
    assert said == Outcome(Exit.OK, "good: 1 listener(s): main on 127.0.0.1:8443\n", "")
    assert call("guard", *NEEDED, "--check") == said
    as_json = call.done("guard", "-c", "handfast.toml", "--check")
    assert as_json == {"good": True, "listeners": ["main on 127.0.0.1:8443"], "warnings": []}
    done = handfast("guard", "-c", "handfast.toml", "--check", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (Exit.OK, said.out, "")


BAD = {
    'clientca = "x"': ("input.config", "listener[0].clientca: there is no such key in [[listener]]; did you mean"),
    "verify_depth = 11": ("input.config", "verify_depth: 11 stands there; it takes a whole number from 0 to 10"),
    'crl = ["missing.crl"]': ("input.missing", "missing.crl: no such file"),
    'crl = ["ca.crt"]': ("input.not_crl", "ca.crt holds no certificate revocation list"),
    'ocsp_hosts = ["ocsp.corp"]': ("input.config", 'ocsp = "off" asks nobody'),
    'allow = ["web"]': ("input.config", "listener[0].allow[0]"),
    'allow_file = "rules"': ("input.missing", "rules: no such file"),
    'client_auth = "optional"\nallow = ["any"]': ("input.config", "binds nobody"),
    'headers = ["assertion"]': ("input.config", '"assertion" needs the table [assertion]'),
    "= 3": ("input.config", "this is not TOML"),
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_configuration_is_told(call: Caller, tmp_path: Path, line: str) -> None:
    """`--check` says in one line what is wrong and where, and ends as the guard itself would."""
    Files(tmp_path)
    reason, words = BAD[line]
    (tmp_path / "handfast.toml").write_text(f"{SITE}{line}\n")
    code = Exit.NOT_FOUND if reason == "input.missing" else Exit.USAGE
    assert call.refused("guard", "-c", "handfast.toml", "--check") == (code, reason)
    assert words in call("guard", "-c", "handfast.toml", "--check").err
    assert call.refused("guard", "-c", "handfast.toml") == (code, reason)


def test_files_that_do_not_fit_are_told(call: Caller, tmp_path: Path) -> None:
    """A key of another certificate, a client's certificate as the server's, a leaf as authority, a late server."""
    files = Files(tmp_path)
    files.client("alice")
    files.server("other")
    swaps = {
        'key = "server.key"': ('key = "other.key"', "input.key_mismatch"),
        '"server.': ('"alice.', "verify.purpose"),
        'client_ca = "ca.crt"': ('client_ca = "server.crt"', "input.not_certificate"),
        'cert = "server.crt"': ('cert = "handfast.toml"', "input.not_certificate"),
    }
    for old, (new, reason) in swaps.items():
        (tmp_path / "handfast.toml").write_text(SITE.replace(old, new))
        assert call.refused("guard", "-c", "handfast.toml", "--check")[1] == reason


@pytest.mark.parametrize("missing", ["--to", "--cert", "--key", "--client-ca"])
def test_a_needed_flag_is_asked_for(call: Caller, missing: str) -> None:
    """Without --to, --cert, --key or --client-ca, and without a file, it is a usage error with exit 2."""
    words = [word for at in range(0, len(NEEDED), 2) for word in NEEDED[at : at + 2] if NEEDED[at] != missing]
    assert call.refused("guard", *words) == (Exit.USAGE, "usage")
    assert f"Missing option '{missing}'" in call("guard", *words).err


@pytest.mark.parametrize("flag", ["--workers=2", "--allow=any", "--legacy-certs", "--drain=30s", "--listen=:8443"])
def test_a_flag_beside_a_file_is_refused(call: Caller, flag: str) -> None:
    """A flag beside -c would leave open which of the two holds, even at its default: exit 2 says so."""
    words = ("guard", "-c", "handfast.toml", flag)
    assert call.refused(*words) == (Exit.USAGE, "usage")
    assert f"{flag.partition('=')[0]} and --config do not go together" in call(*words).err


def test_values_that_flags_do_not_take(call: Caller, tmp_path: Path) -> None:
    """A word that is none of a flag's is told, and nothing starts."""
    Files(tmp_path)
    for flag in ("--workers=0", "--verify-depth=11", "--tls-min=1.1", "--header=mine", "--client-auth=maybe"):
        assert call.refused("guard", *NEEDED, flag) == (Exit.USAGE, "usage")
    for flag, reason in (("--drain=soon", "input.lifetime"), ("--allow=a b c d", "input.rule")):
        assert call.refused("guard", *NEEDED, flag) == (Exit.USAGE, reason)
    assert call.refused("guard", *NEEDED, "--admin=0.0.0.0:9464") == (Exit.USAGE, "input.config")


def test_a_port_that_is_taken(call: Caller, tmp_path: Path, app: App) -> None:
    """A listener's or the admin listener's port that is taken is exit 6, with one worker and with two."""
    Files(tmp_path)
    for flags in (("--listen", app.address), ("--listen", app.address, "--workers", "2"), ("--admin", app.address)):
        words = flags if "--listen" in flags else (*flags, "--listen", "127.0.0.1:0")
        assert call.refused("guard", *NEEDED, *words) == (Exit.UNREACHABLE, "guard.listen")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_file_in_the_place_of_a_socket_stays(call: Caller, tmp_path: Path, workers: str) -> None:
    """A UNIX address that names a file, by a mistake in typing, is exit 6, and costs nobody the file."""
    Files(tmp_path)
    (tmp_path / "precious").write_text("data")
    words = ("--listen", "unix:precious", "--workers", workers)
    assert call.refused("guard", *NEEDED, *words) == (Exit.UNREACHABLE, "guard.listen")
    assert (tmp_path / "precious").read_text() == "data"


def test_a_configuration_that_is_not_there(call: Caller, tmp_path: Path) -> None:
    """A file that is missing, empty, a folder or not UTF-8 is told as such."""
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, reason in (
        ("missing", "input.missing"),
        ("empty", "input.empty"),
        (".", "input.unreadable"),
        ("binary", "input.config"),
    ):
        assert call.refused("guard", "-c", name)[1] == reason


def test_a_guard_without_a_terminal_tells_the_same_for_people(tmp_path: Path, app: App) -> None:
    """Without --json the guard says in words what it guards, whom it lets in, and that it ends."""
    Files(tmp_path)
    config = SITE.replace("127.0.0.1:8443", "127.0.0.1:0").replace("127.0.0.1:8000", app.address)
    (tmp_path / "handfast.toml").write_text(config)
    with Child((*HANDFAST, "guard", "-c", "handfast.toml"), tmp_path, merge=False) as child:
        assert f"guarding {app.address} at https://127.0.0.1:" in child.line("^guarding")
        assert "every client with a certificate of" in child.line("let through")
        child.line("^Ctrl-C stops it")
        assert child.stop() == Exit.OK
    assert child.lines[-1] == "goodbye"
    assert child.errors == []
