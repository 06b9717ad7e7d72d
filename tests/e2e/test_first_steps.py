"""What a newcomer meets in the first hour: apps that are away or speak TLS, names that were revoked, keys left open."""

from __future__ import annotations

import json
import shlex
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from handfast.errors import Exit
from tests.e2e.guard_kit import Files, admin_get, guarding
from tests.e2e.kit import Caller
from tests.support.apps import HELLO, App, accepted, refusing, stop_accepting
from tests.support.certs import Ca
from tests.support.programs import HANDFAST, Child, Served, curl, free_port, handfast, must, served
from tests.support.waiting import until

SITE = """
[[listener]]
name = "main"
listen = "127.0.0.1:{port}"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
"""


@pytest.fixture
def app() -> Iterator[App]:
    with App() as running:
        yield running


@contextmanager
def secure_app(cert: Path, key: Path) -> Iterator[int]:
    """An app that speaks HTTP over TLS; to what is no TLS it says nothing, as many do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(plain: socket.socket) -> None:
        with plain, suppress(OSError), context.wrap_socket(plain, server_side=True) as tls:
            while tls.recv(1 << 16):
                tls.sendall(HELLO)

    def accept() -> None:
        while (plain := accepted(listener)) is not None:
            threading.Thread(target=serve, args=(plain,), daemon=True).start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    yield listener.getsockname()[1]
    stop_accepting(listener, acceptor)


def ask(guard: Served, *words: str, name: str = "client", folder: Path) -> tuple[int, str]:
    """One request with curl, as a client that `up` keeps; the status and the error's code."""
    clients = Path(guard.ready["ca"]).parent / "clients"
    files = ("--cacert", guard.ready["ca"], "--cert", clients / f"{name}.crt", "--key", clients / f"{name}.key")
    got = curl(guard.url, "--max-time", "20", *files, *words, folder=folder)
    return got.status, "" if got.status == 200 else got.error


def test_up_speaks_tls_to_an_app_and_judges_it(call: Caller, tmp_path: Path) -> None:
    """An app with a certificate of this authority for its host is served; one of another authority, or for another
    host, is 502 at once, with the reason in the log.
    """
    state = tmp_path / "state"
    call.done("authority", "init", "--state", state)
    good = call.done("issue", "127.0.0.1", "--state", state, "--out", "good")
    other = call.done("issue", "elsewhere.test", "--state", state, "--out", "other")
    Ca.root("Stranger").server("127.0.0.1").save(tmp_path, "stranger")
    cases = {
        (good["cert"], good["key"]): (200, ""),
        (other["cert"], other["key"]): (502, "not for ip:127.0.0.1"),
        (str(tmp_path / "stranger.crt"), str(tmp_path / "stranger.key")): (502, "not in the trust bundle"),
    }
    for (cert, key), (status, detail) in cases.items():
        with (
            secure_app(Path(cert), Path(key)) as port,
            served("up", "--to", f"https://127.0.0.1:{port}", "--state", state, folder=tmp_path) as guard,
        ):
            for protocol in ("--http1.1", "--http2"):
                assert ask(guard, protocol, folder=tmp_path) == (status, "" if status == 200 else "upstream.tls")
            assert detail in guard.next("request").get("detail", "")


def test_a_revoked_server_is_called_no_more(call: Caller, tmp_path: Path) -> None:
    """Once an app's own certificate is revoked, a running `up` sends it nothing."""
    state = tmp_path / "state"
    call.done("authority", "init", "--state", state)
    good = call.done("issue", "127.0.0.1", "--state", state, "--out", "good")
    with (
        secure_app(Path(good["cert"]), Path(good["key"])) as port,
        served("up", "--to", f"https://127.0.0.1:{port}", "--state", state, folder=tmp_path) as guard,
    ):
        assert ask(guard, folder=tmp_path) == (200, "")
        call.done("revoke", good["serial"], "--state", state)
        guard.next("reload")
        assert ask(guard, folder=tmp_path) == (502, "upstream.tls")


@pytest.mark.parametrize("to", ["https+unix:/run/app.sock", "tls+unix:app.sock"])
def test_a_socket_has_no_name_to_be_judged_by(call: Caller, tmp_path: Path, to: str) -> None:
    """TLS over a UNIX socket is refused at the start, before anything is made, with the way that there is."""
    words = ("up", "--to", to, "--state", tmp_path / "state", "--listen", "127.0.0.1:0")
    assert call.refused(*words) == (Exit.USAGE, "input.target")
    assert "[upstream.NAME] with server_name" in call(*words).err
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("to", ["127.0.0.1:{}", "localhost:{}", "https://127.0.0.1:{}", "tcp://:{}"])
def test_a_guard_does_not_call_itself(call: Caller, tmp_path: Path, state: Path, to: str) -> None:
    """An app at the very address to listen on is refused, by `up`, flags and file; at another port it is not."""
    Files(tmp_path)
    port = free_port()
    here = to.format(port)
    listen = f"127.0.0.1:{port}"
    words = ("up", "--to", here, "--listen", listen, "--state", state)
    assert call.refused(*words) == (Exit.USAGE, "input.target")
    flags = ("--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt", "--listen", listen, "--check")
    if not here.startswith("https"):  # which flags refuse anyway
        assert call.refused("guard", "--to", here, *flags) == (Exit.USAGE, "input.config")
        assert "is where this listener listens itself" in call("guard", "--to", here, *flags).err
        assert call("guard", "--to", to.format(port - 1), *flags).code == Exit.OK
    (tmp_path / "handfast.toml").write_text(f'{SITE.format(port=port)}to = "app"\n[upstream.app]\ntargets = ["{here}"]')
    if here.startswith(("127", "localhost")):
        assert "is where this listener listens itself" in call("guard", "-c", "handfast.toml", "--check").err


def test_a_revocation_outlives_a_restart(call: Caller, tmp_path: Path, state: Path, app: App) -> None:
    """`up` started again gives a revoked client nothing, says since when and how to change that, and serves the others;
    what it says works.
    """
    words = ("up", "--to", app.address, "--client", "reader", "--client", "web", "--state", state)
    with served(*words, folder=tmp_path) as guard:
        assert guard.ready["client"]["name"] == "spiffe://handfast.internal/reader"
        assert guard.ready["warnings"] == []
        revoked = call("revoke", "reader", "--state", state)
        assert "next: to give it another one, on purpose: handfast issue spiffe://" in revoked.out
    before = (state / "clients" / "reader.crt").read_bytes()
    for _ in range(2):
        with served(*words, folder=tmp_path) as guard:
            assert guard.ready["client"]["name"] == "spiffe://handfast.internal/web"
            assert ask(guard, name="web", folder=tmp_path) == (200, "")
            assert ask(guard, name="reader", folder=tmp_path) == (403, "verify.revoked")
            (warning,) = guard.ready["warnings"]
            assert "reader was revoked on 20" in warning
    assert (state / "clients" / "reader.crt").read_bytes() == before
    again = shlex.split(warning.partition("to give it one: ")[2])
    assert call(*again[1:]).code == Exit.OK
    with served(*words, folder=tmp_path) as guard:
        assert guard.ready["warnings"] == []
        assert ask(guard, name="reader", folder=tmp_path) == (200, "")


def test_where_all_clients_are_revoked_none_is_shown(call: Caller, tmp_path: Path, state: Path, app: App) -> None:
    """With its only client revoked, `up` serves whoever else is issued one, and prints no line that would not work."""
    line = (*HANDFAST, "up", "--to", app.address, "--listen", "127.0.0.1:0", "--state", state)
    for revoked in (False, True):
        with Child(line, tmp_path) as child:
            child.line("^Another client")
            said = "\n".join(child.lines)
        assert ("curl" in said) is not revoked
        assert ("client was revoked on" in said) is revoked
        if not revoked:
            assert f"client.p12.password) and {state / 'root.crt'}." in said
            call.done("revoke", "client", "--state", state)


@pytest.mark.parametrize(
    ("method", "path", "what", "remedy"),
    [
        ("POST", "/x", "to POST /x", "--allow 'spiffe://handfast.internal/client POST /x'"),
        ("GET", "/x", "", ""),
        ("HEAD", "/x", "to HEAD /x", "--allow 'spiffe://handfast.internal/client HEAD /x'"),
        ("PUT", "/it's", "to PUT /it's", """--allow 'spiffe://handfast.internal/client PUT /it'"'"'s'"""),
        ("PUT", "/a*b", "to PUT /a*b", "a rule WHO METHODS PATH that covers it"),
        ("PUT", "/a%20b", "to PUT /a%20b", "a rule WHO METHODS PATH that covers it"),
        ("PUT", "/" + "a" * 600, "to PUT /" + "a" * 199, "a rule WHO METHODS PATH that covers it"),
    ],
)
def test_a_remedy_allows_just_what_was_asked(
    tmp_path: Path, state: Path, app: App, method: str, path: str, what: str, remedy: str
) -> None:
    """Where rules speak of a client and none allows its request, method and path are named, within bounds, and a rule
    that allows just that; where they cannot stand in a rule, none is given that would allow more.
    """
    words = ("up", "--to", app.address, "--allow", "client GET", "--state", state)
    with served(*words, folder=tmp_path) as guard:
        url = ("--request-target", path, "-X", method) if method != "HEAD" else ("--request-target", path, "-I")
        clients = state / "clients"
        files = ("--cacert", guard.ready["ca"], "--cert", clients / "client.crt", "--key", clients / "client.key")
        status = curl(guard.url, "--path-as-is", *files, *url, folder=tmp_path).status
        event = guard.next("request")
    if not what:
        assert (status, event["reason"]) == (200, "policy.rule_matched")
        return
    assert (status, event["reason"]) == (403, "policy.no_rule")
    assert event["detail"] == f"no rule allows spiffe://handfast.internal/client {what}"
    assert event["remedy"] == f"allow it: {remedy}" or event["remedy"] == f"allow it by {remedy}"
    if "--allow" in remedy:
        rule = shlex.split(remedy)[1]
        with served(*words, "--allow", rule, folder=tmp_path) as guard:
            assert curl(guard.url, "--path-as-is", *files, *url, folder=tmp_path).status == 200
            assert curl(guard.url, *files, "-X", "DELETE", folder=tmp_path).status == 403


def test_a_remedy_for_a_file_is_written_as_in_one(tmp_path: Path, app: App) -> None:
    """With a file, a remedy is a rule for `allow`, and a client of whom no rule speaks is named alone."""
    files = Files(tmp_path)
    alice, bob = files.client(), files.client("bob")
    config = f'{SITE.format(port=0)}to = "{app.address}"\nallow = ["spiffe://test/alice GET"]\n'
    with guarding(tmp_path, config) as guard:
        assert alice.ask(guard.port, "/x", method="POST").error == (403, "policy.no_rule")
        event = guard.next("request")
        assert event["detail"] == "no rule allows spiffe://test/alice to POST /x"
        assert event["remedy"] == 'allow it: allow = [..., "spiffe://test/alice POST /x"]'
        assert bob.ask(guard.port, "/x").error == (403, "policy.no_rule")
        event = guard.next("request")
        assert event["detail"] == "no rule allows spiffe://test/bob"
        assert event["remedy"] == 'allow it: allow = [..., "spiffe://test/bob"]'


def test_a_folder_for_keys_is_closed(call: Caller, tmp_path: Path, app: App) -> None:
    """What the refusal of `curl --as` says makes a folder that `up` takes; a folder that is there stays as it is."""
    state = tmp_path / "state"
    call.done("authority", "init", "--state", state)
    refusal = call("curl", "--as", "web", "https://localhost/", "--state", state)
    step = refusal.err.rpartition("next: make one: handfast ")[2]
    assert "--force" not in step
    assert call(*shlex.split(step)).code == Exit.OK
    assert (state / "clients").stat().st_mode & 0o777 == 0o700
    with served("up", "--to", app.address, "--client", "web", "--state", state, folder=tmp_path) as guard:
        assert ask(guard, name="web", folder=tmp_path) == (200, "")
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    call.done("issue", "web", "--out", "open", "--state", state)
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o755


def test_an_app_that_does_not_answer_is_told_of_at_the_start(
    call: Caller, tmp_path: Path, state: Path, app: App
) -> None:
    """`up` and `guard` say which app is not there, or has no name, and go on; of one that is there they say nothing."""
    Files(tmp_path)
    guard = ("guard", "--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt")
    with refusing() as away:
        cases = {
            away: f"nothing answers at {away} yet (connection refused)",
            "app.invalid:80": "nothing answers at app.invalid:80 yet (its name is not known)",
            f"unix:{tmp_path}/none": f"nothing answers at unix:{tmp_path}/none yet (no such file or directory)",
            app.address: "",
        }
        for to, words in cases.items():
            for verb in (("up", "--state", str(state)), guard):
                with Child((*HANDFAST, *verb, "--to", to, "--listen", "127.0.0.1:0"), tmp_path) as child:
                    child.line("^Ctrl-C")
                    assert [line for line in child.lines if "note:" in line] == ([f"  note: {words}"] if words else [])
                    assert child.stop() == Exit.OK
    assert app.received == b""


def test_an_app_without_our_tls_is_told_of_at_the_start(call: Caller, tmp_path: Path, state: Path) -> None:
    """`up --to https://…` before an app of another authority says so as it starts."""
    Ca.root("Stranger").server("127.0.0.1").save(tmp_path, "stranger")
    with secure_app(tmp_path / "stranger.crt", tmp_path / "stranger.key") as port:
        line = ("up", "--to", f"https://127.0.0.1:{port}", "--listen", "127.0.0.1:0", "--state", state)
        with Child((*HANDFAST, *line), tmp_path) as child:
            said = child.line("^  note:")
            assert f"no TLS with https://127.0.0.1:{port} yet" in said
            assert "not in the trust bundle" in said
            assert "handfast issue 127.0.0.1 --out DIR --state" in child.line("^  note:")


def test_files_that_are_too_open_are_told_of(tmp_path: Path, app: App) -> None:
    """A key that all may read, a certificate or rules that all may change: a warning with its chmod, and it serves."""
    files = Files(tmp_path)
    alice = files.client()
    config = f'{SITE.format(port=0)}to = "{app.address}"\n'
    (tmp_path / "server.key").chmod(0o644)
    (tmp_path / "ca.crt").chmod(0o666)
    with guarding(tmp_path, config) as guard:
        assert alice.ask(guard.port).status == 200
        one, two = guard.ready["warnings"]
    assert one == f"{tmp_path}/server.key can be read by others (mode 644); close it: chmod 600 {tmp_path}/server.key"
    assert two == f"{tmp_path}/ca.crt can be changed by others (mode 666); close it: chmod o-w {tmp_path}/ca.crt"
    for warning in (one, two):
        must("sh", "-c", warning.partition("close it: ")[2], folder=tmp_path)
    (tmp_path / "server.key").chmod(0o640)  # as Debian's group ssl-cert has it
    with guarding(tmp_path, config) as guard:
        assert guard.ready["warnings"] == []


def test_a_client_key_that_is_too_open_is_told_of(tmp_path: Path, state: Path, app: App) -> None:
    """`up` says so where others may read a key that it keeps for a client."""
    words = ("up", "--to", app.address, "--state", state)
    with served(*words, folder=tmp_path) as guard:
        assert guard.ready["warnings"] == []
        key = Path(guard.ready["client"]["key"])
    key.chmod(0o644)
    with served(*words, folder=tmp_path) as guard:
        assert guard.ready["warnings"] == [f"{key} can be read by others (mode 644); close it: chmod 600 {key}"]


def test_an_app_that_wants_tls_is_recognized(call: Caller, tmp_path: Path, state: Path) -> None:
    """Behind a plain target, an app that closes on a plain request is said to speak TLS, perhaps."""
    Ca.root("Stranger").server("127.0.0.1").save(tmp_path, "stranger")
    with (
        secure_app(tmp_path / "stranger.crt", tmp_path / "stranger.key") as port,
        served("up", "--to", f"127.0.0.1:{port}", "--state", state, folder=tmp_path) as guard,
    ):
        for protocol in ("--http1.1", "--http2"):
            assert ask(guard, protocol, folder=tmp_path) == (502, "upstream.down")
            event = guard.next("request")
            assert "perhaps it speaks TLS" in event["detail"]
            assert f"write https://127.0.0.1:{port}" in event["remedy"]


def test_curl_takes_its_url_wherever_it_stands(call: Caller, tmp_path: Path, state: Path, app: App) -> None:
    """Options may come before the URL; a URL that belongs to an option is not taken for it."""
    with served("up", "--to", app.address, "--state", state, folder=tmp_path) as guard:
        for words in (
            ("-sS", guard.url),
            ("-sS", "-e", "https://nowhere.invalid/", guard.url),
            (guard.url, "-sS"),
            ("-sS", "--url", guard.url),
        ):
            done = handfast("curl", "--as", "client", "--state", state, *words, folder=tmp_path)
            assert (done.returncode, done.stdout) == (0, "Hello World\n"), done.stderr
    code, reason = call.refused("curl", "--as", "client", "--state", state, "-sS")
    assert (code, reason) == (Exit.USAGE, "usage")
    assert "there is no URL" in call("curl", "--as", "client", "--state", state, "-sS").err


def test_a_taken_port_is_told_by_its_own_setting(call: Caller, tmp_path: Path, app: App) -> None:
    """With a file it is the table's key, with flags the flag, for the admin listener as for others."""
    Files(tmp_path)
    listener = SITE.format(port=app.port) + 'to = "127.0.0.1:1"\n'
    admin = f'[admin]\nlisten = "{app.address}"\n{SITE.format(port=0)}to = "127.0.0.1:1"\n'
    for text, words in ((listener, "listen in the [[listener]] main"), (admin, "listen in [admin]")):
        (tmp_path / "handfast.toml").write_text(text)
        assert words in call("guard", "-c", "handfast.toml").err
    flags = ("--to", "127.0.0.1:1", "--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt")
    assert "with --listen" in call("guard", *flags, "--listen", app.address).err
    assert "with --admin" in call("guard", *flags, "--listen", "127.0.0.1:0", "--admin", app.address).err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_is_counted_once_and_why_it_was_kept_back_is_shown(
    tmp_path: Path, state: Path, app: App, workers: int
) -> None:
    """However many workers there are, one change is one reload; what kept it back, and its remedy, is in the log and in
    `status` until a reload is taken.
    """
    Files(tmp_path)
    admin = free_port()
    config = f'[admin]\nlisten = "127.0.0.1:{admin}"\n{SITE.format(port=0)}to = "{app.address}"\n'

    def counted() -> dict[str, float]:
        state = json.loads(admin_get(admin, "/status")[1])["state"]
        return {key[0]: count for key, count in state["counters"]["reloads"]}

    def shown() -> str:
        return handfast("status", "--admin", f"127.0.0.1:{admin}", "--once", folder=tmp_path).stdout

    with guarding(tmp_path, config, top=f"workers = {workers}\n") as guard:
        path = tmp_path / "handfast.toml"
        good = path.read_text()
        path.write_text(good.replace(f"workers = {workers}", "workers = 3"))
        kept = [guard.next("reload", outcome="kept") for _ in range(workers)]
        assert {event["reason"] for event in kept} == {"guard.restart"}
        assert all("kill -USR2" in event["remedy"] for event in kept)
        until(lambda: counted() == {"kept": 1}, "one reload")
        assert "the last reload was kept back" in shown()
        assert "this cannot change while the guard runs: workers; next: restart it" in shown()
        path.write_text(good + "# the same\n")
        for _ in range(workers):
            guard.next("reload", outcome="taken")
        until(lambda: counted() == {"kept": 1, "taken": 1}, "two reloads")
        until(lambda: "kept back" not in shown(), "a status without it")


def test_help_is_that_of_the_verb(call: Caller, tmp_path: Path) -> None:
    """An option without its argument leads to its verb's help; wrong settings lead to the list of all of them."""
    assert "see: handfast up --help" in call("up", "--to").err
    assert "see: handfast guard --help" in call("guard", "--cert").err
    assert "see: handfast --help" in call("--nonsense").err
    Files(tmp_path)
    (tmp_path / "handfast.toml").write_text(SITE.format(port=0) + 'to = ":1"\n[limits]\nmax_body = "1MB"\n')
    said = call("guard", "-c", "handfast.toml").err
    assert "it takes a whole number of bytes, 0 or more" in said
    assert "handfast guard --keys" in said
    listed = call("guard", "--keys")
    assert listed.code == Exit.OK
    assert "limits.max_body\n    The largest body of a request, in bytes." in listed.out
