"""`handfast up` as its user meets it: one command, a curl line that works, and who gets through from then on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import ssl
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPSConnection
from pathlib import Path

import pytest

from handfast.errors import Exit
from handfast.pki.certificates import parse_certificates
from handfast.pki.pkcs12 import parse_p12
from tests.e2e.kit import Caller, serials
from tests.support.apps import App
from tests.support.programs import HANDFAST, Child, Served, environment, free_port, run
from tests.support.waiting import PATIENCE as WAIT
from tests.support.waiting import Stopwatch, until

LIMIT = 2.0  # seconds in which a revocation takes effect


@contextmanager
def up(folder: Path, to: str, *words: str | Path, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """`up --json` before an app, on a free port and with the state in `folder`."""
    line = (*HANDFAST, "up", "--to", to, "--listen", "127.0.0.1:0", "--state", folder / "state", "--json", *words)
    with Child(line, folder, env, merge=False) as child:
        yield Served(child, json.loads(child.line()))


@pytest.fixture
def app() -> Iterator[App]:
    with App() as running:
        yield running


def ask(served: Served, cert: str | Path | None, key: str | Path = "", path: str = "/") -> tuple[int, str]:
    """One request on a connection of its own; the status and the body."""
    with _connection(served, cert, key) as connection:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def ask_as_client(served: Served) -> tuple[int, str]:
    return ask(served, served.ready["client"]["cert"], served.ready["client"]["key"])


def error_of(answer: tuple[int, str]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["error"]


def mode(path: str | Path) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def test_the_first_line_says_all_that_a_script_needs(tmp_path: Path, app: App) -> None:
    """`up --json` first prints the ready event: where it listens, the authority to trust, and a client's files."""
    with up(tmp_path, app.address) as served:
        ready, client = served.ready, served.ready["client"]
        assert ready["event"] == "ready"
        assert ready["url"].startswith("https://127.0.0.1:")
        assert client["name"] == "spiffe://handfast.internal/client"
        for secret in ("key", "p12", "p12_password_file"):
            assert mode(client[secret]) == 0o600
        assert {mode(tmp_path / "state"), mode(Path(client["key"]).parent)} == {0o700}
        assert Path(ready["ca"]).read_bytes().startswith(b"-----BEGIN CERTIFICATE-----")
        password = Path(client["p12_password_file"]).read_bytes().strip()
        _, (leaf, *_) = parse_p12(Path(client["p12"]).read_bytes(), "p12", password)
        assert leaf == parse_certificates(Path(client["cert"]).read_bytes(), "crt")[0]
        assert ask_as_client(served)[0] == 200
        assert error_of(ask(served, None)) == (403, "verify.no_certificate")
        assert app.received.count(b"GET / ") == 1
        assert served.child.stop() == Exit.OK
    assert json.loads(served.child.lines[-1])["event"] == "stopped"


def test_the_printed_curl_lines_do_what_is_said_of_them(tmp_path: Path, app: App) -> None:
    """The first line that a person is shown gets Hello World; the second, without a certificate, is refused."""
    state = tmp_path / "a state with blanks"
    line = (*HANDFAST, "up", "--to", app.address, "--listen", "127.0.0.1:0", "--state", state)
    with Child(line, tmp_path) as child:
        works, refused = child.line("^  curl"), child.line("^  curl")
        child.line("^Another client")
        good = run(*shlex.split(works), "-sS", folder=tmp_path)
        assert (good.returncode, good.stdout) == (0, "Hello World\n")
        bad = run(*shlex.split(refused), "-sS", folder=tmp_path)
        assert json.loads(bad.stdout)["error"] == "verify.no_certificate"
        assert child.stop() == Exit.OK
    assert "goodbye" in child.lines
    assert app.received.count(b"GET / ") == 1


def test_a_second_start_goes_on_with_what_is_there(tmp_path: Path, app: App) -> None:
    """Authority, client certificate, key and PKCS#12 file are those of the first start, and still work."""
    with up(tmp_path, app.address) as first:
        client = first.ready["client"]
        kept = [Path(path) for path in (first.ready["ca"], client["cert"], client["key"], client["p12"])]
        before = [path.read_bytes() for path in kept]
    with up(tmp_path, app.address) as second:
        assert [path.read_bytes() for path in kept] == before
        assert second.ready["client"] == client
        assert ask_as_client(second)[0] == 200
        assert second.child.stop() == Exit.OK
    assert second.child.errors == []


def test_allowed_clients_and_names_are_as_told(tmp_path: Path, app: App) -> None:
    """--client keeps each identity's files, --allow lets one of them in, --name is what the server goes by."""
    words = ("--allow", "alice", "--client", "alice", "--client", "ops/carol", "--name", "app.internal")
    with up(tmp_path, app.address, *words) as served:
        clients = tmp_path / "state" / "clients"
        assert served.ready["client"]["cert"] == str(clients / "alice.crt")
        assert served.ready["allow"] == ["allow spiffe://handfast.internal/alice"]
        with _tls(served, clients / "alice.crt", clients / "alice.key", "app.internal") as tls:
            tls.sendall(b"GET / HTTP/1.1\r\nHost: app.internal\r\nConnection: close\r\n\r\n")
            assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200")
        with _tls(served, clients / "carol.crt", clients / "carol.key", "app.internal") as tls:
            tls.sendall(b"GET / HTTP/1.1\r\nHost: app.internal\r\nConnection: close\r\n\r\n")
            assert tls.recv(1 << 16).startswith(b"HTTP/1.1 403")
        with pytest.raises(ssl.SSLCertVerificationError, match="not valid for 'localhost'"):
            _tls(served, clients / "alice.crt", clients / "alice.key", "localhost")


@pytest.mark.parametrize("allow", [None, "alice"])
def test_who_is_issued_a_certificate_meanwhile(call: Caller, tmp_path: Path, app: App, allow: str | None) -> None:
    """`issue bob` beside a running `up` lets bob in at once, unless the rules name others."""
    with up(tmp_path, app.address, *(("--allow", allow) if allow else ())) as served:
        bob = call.done("issue", "bob", "--state", tmp_path / "state")
        answer = ask(served, bob["cert"], bob["key"])
        if allow:
            assert error_of(answer) == (403, "policy.no_rule")
        else:
            assert answer == (200, "Hello World\n")


def test_an_authority_of_another_make_is_refused(call: Caller, tmp_path: Path, app: App) -> None:
    """A certificate for the same name by another authority is refused, and the app hears nothing of it."""
    call.done("authority", "init", "--state", "other")
    impostor = call.done("issue", "client", "--state", "other")
    with up(tmp_path, app.address) as served:
        assert error_of(ask(served, impostor["cert"], impostor["key"])) == (403, "verify.unknown_issuer")
    assert app.received == b""


def test_a_revocation_takes_effect_within_two_seconds(call: Caller, tmp_path: Path) -> None:
    """It cuts the identity's open connections, idle or a websocket, refuses new ones, and touches nobody else."""
    with App(answer=_http_or_websocket) as app, up(tmp_path, app.address) as served, ExitStack() as stack:
        state = tmp_path / "state"
        bob, carol = (call.done("issue", name, "--state", state) for name in ("bob", "carol"))
        idle = stack.enter_context(_tls(served, bob["cert"], bob["key"]))
        idle.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(1 << 16).endswith(b"Hello World\n")
        sockets = [stack.enter_context(_tls(served, who["cert"], who["key"])) for who in (bob, carol)]
        for tls in sockets:
            tls.sendall(_UPGRADE)
            assert tls.recv(1 << 16).startswith(b"HTTP/1.1 101")
            tls.sendall(b"ping")
            assert tls.recv(1 << 16) == b"ping"
        call.done("revoke", "bob", "--state", state)
        with Stopwatch() as watch:
            for cut in (idle, sockets[0]):
                assert _read_end(cut)
            assert error_of(ask(served, bob["cert"], bob["key"])) == (403, "verify.revoked")
        assert watch.seconds < LIMIT
        assert served.next("ended")["reason"] == "ended.revoked"
        sockets[1].sendall(b"still here")
        assert sockets[1].recv(1 << 16) == b"still here"
        assert ask(served, carol["cert"], carol["key"])[0] == 200


def test_revoking_by_serial_leaves_the_other_certificate_of_a_name(call: Caller, tmp_path: Path, app: App) -> None:
    """Of two certificates for bob, the one whose serial is revoked is refused and the other is not."""
    with up(tmp_path, app.address) as served:
        first = call.done("issue", "bob", "--out", "1", "--state", tmp_path / "state")
        second = call.done("issue", "bob", "--out", "2", "--state", tmp_path / "state")
        call.done("revoke", first["serial"], "--state", tmp_path / "state")
        assert served.next("reload")["outcome"] == "taken"
        assert error_of(ask(served, first["cert"], first["key"])) == (403, "verify.revoked")
        assert ask(served, second["cert"], second["key"])[0] == 200


def test_the_state_is_whole_after_a_kill(call: Caller, tmp_path: Path, app: App) -> None:
    """After kill -9 of `up` the ledger opens, certificates can be issued, and `up` starts with the same files."""
    with up(tmp_path, app.address) as first:
        assert ask_as_client(first)[0] == 200
        os.kill(first.child._process.pid, signal.SIGKILL)
    state = tmp_path / "state"
    client = Path(first.ready["client"]["cert"]).read_bytes()
    assert [row["status"] for row in call.done("show", "client", "--state", state)] == ["good"]
    bob = call.done("issue", "bob", "--state", state)
    with up(tmp_path, app.address) as second:
        assert Path(second.ready["client"]["cert"]).read_bytes() == client
        assert ask_as_client(second)[0] == 200
        assert ask(second, bob["cert"], bob["key"])[0] == 200


def test_a_client_key_that_lost_its_certificate_is_replaced(tmp_path: Path, app: App) -> None:
    """Killed between writing a client's key and its certificate, the next start makes a pair that works."""
    with up(tmp_path, app.address) as first:
        client = first.ready["client"]
    run("openssl", "genpkey", "-algorithm", "ed25519", "-out", client["key"], folder=tmp_path)
    with up(tmp_path, app.address) as second:
        assert ask_as_client(second)[0] == 200
        assert mode(client["key"]) == 0o600


@pytest.mark.parametrize("how", ["file", "environment"])
def test_a_passphrase_of_ones_own(call: Caller, tmp_path: Path, app: App, how: str) -> None:
    """`up` takes the passphrase from a file or the environment, keeps none, and with a wrong one ends with exit 2."""
    for name, text in (("right", "corréct horse"), ("wrong", "battery staple")):
        (tmp_path / name).write_text(f"{text}\n")

    def given(name: str) -> tuple[tuple[str | Path, ...], dict[str, str]]:
        if how == "file":
            return ("--passphrase-file", tmp_path / name), environment()
        return (), environment(HANDFAST_PASSPHRASE=(tmp_path / name).read_text().strip())

    words, env = given("right")
    for _ in range(2):
        with up(tmp_path, app.address, *words, env=env) as served:
            assert ask_as_client(served)[0] == 200
    state = tmp_path / "state"
    assert not (state / "passphrase").exists()
    before = serials(state)
    words, env = given("wrong")
    line = (*HANDFAST, "up", "--to", app.address, "--listen", "127.0.0.1:0", "--state", state, *words)
    done = run(*line, folder=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert "handfast: the passphrase does not open" in done.stderr
    assert "[input.wrong_passphrase]\n  next: give the right one with --passphrase-file F" in done.stderr
    assert "battery" not in done.stderr
    assert serials(state) == before
    without = run(*line[: len(line) - len(words)], folder=tmp_path)
    assert without.returncode == Exit.USAGE
    assert "[input.no_passphrase]" in without.stderr


def test_no_secret_is_shown(tmp_path: Path, app: App) -> None:
    """Passphrase, PKCS#12 password, private keys and query strings are in no log, no message and no argument list."""
    env = environment(HANDFAST_PASSPHRASE="correct horse battery")
    with up(tmp_path, app.address, env=env) as served:
        client = served.ready["client"]
        assert ask(served, client["cert"], client["key"], "/?token=s3cr3t")[0] == 200
        assert served.next("request")["path"] == "/"
        arguments = Path(f"/proc/{served.child._process.pid}/cmdline").read_text()
        served.child.stop()
    said = "\n".join([arguments, *served.child.lines, *served.child.errors])
    password = Path(client["p12_password_file"]).read_text().strip()
    key = [line for line in Path(client["key"]).read_text().splitlines() if "-----" not in line]
    for secret in ("correct horse", password, "s3cr3t", *key):
        assert secret not in said
    assert client["key"] in said  # where it is, is no secret
    for file in (tmp_path / "state").rglob("*"):
        assert b"correct horse" not in (file.read_bytes() if file.is_file() else b"")


def test_of_two_starts_at_once_on_one_state_one_wins(tmp_path: Path, app: App) -> None:
    """Two `up` on a new state: one makes the authority and serves, the other ends with exit 5."""
    line = (*HANDFAST, "up", "--to", app.address, "--listen", "127.0.0.1:0", "--state", tmp_path / "state", "--json")
    with Child(line, tmp_path, merge=False) as one, Child(line, tmp_path, merge=False) as two:
        first, second = json.loads(one.line()), json.loads(two.line())
        winner, loser = ((one, first), (two, second)) if "event" in first else ((two, second), (one, first))
        assert loser[1]["error"] == "store.locked"
        assert loser[0]._process.wait(WAIT) == Exit.STORE
        assert ask_as_client(Served(*winner))[0] == 200
        assert winner[0].stop() == Exit.OK


def test_of_two_starts_at_once_on_one_port_one_wins(tmp_path: Path, app: App) -> None:
    """Two `up` on one port: one serves, the other ends with exit 6 and says how to choose another."""
    port = free_port()
    lines = [
        (*HANDFAST, "up", "--to", app.address, "--listen", f"127.0.0.1:{port}", "--state", tmp_path / name, "--json")
        for name in ("a", "b")
    ]
    with Child(lines[0], tmp_path, merge=False) as one, Child(lines[1], tmp_path, merge=False) as two:
        first, second = json.loads(one.line()), json.loads(two.line())
        winner, loser = ((one, first), (two, second)) if "event" in first else ((two, second), (one, first))
        assert loser[1]["error"] == "guard.listen"
        assert "--listen" in loser[1]["hint"]
        assert loser[0]._process.wait(WAIT) == Exit.UNREACHABLE
        assert ask_as_client(Served(*winner))[0] == 200


def test_an_app_that_is_down_is_no_reason_to_stop(tmp_path: Path) -> None:
    """Before its app runs, `up` answers 502 and logs why; once it runs, requests get through."""
    port = free_port()
    with up(tmp_path, f"127.0.0.1:{port}") as served:
        assert error_of(ask_as_client(served)) == (502, "upstream.down")
        event = served.next("request")
        assert event["reason"] == "upstream.down"
        assert "connection refused" in event["detail"]
        with socket.create_server(("127.0.0.1", port)) as listener:
            threading.Thread(target=_serve_once, args=(listener,), daemon=True).start()
            assert ask_as_client(served) == (200, "Hello World\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_lets_an_open_request_finish(tmp_path: Path, number: signal.Signals) -> None:
    """On SIGTERM or Ctrl-C the door closes, the answer under way is finished, and it ends with goodbye and exit 0."""
    asked, go_on = threading.Event(), threading.Event()

    def slow(connection: socket.socket, _request: bytes) -> None:
        asked.set()
        assert go_on.wait(WAIT)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")

    state = tmp_path / "state"
    with App(answer=slow) as app:
        line = (*HANDFAST, "up", "--to", app.address, "--listen", "127.0.0.1:0", "--state", state)
        with Child(line, tmp_path) as child:
            url = child.line("^guarding").split()[-1]
            served = Served(child, {"url": url, "ca": str(state / "root.crt")})
            files = state / "clients" / "client.crt", state / "clients" / "client.key"
            child.line("^Another client")
            answers: list[tuple[int, str]] = []
            asking = threading.Thread(target=lambda: answers.append(ask(served, *files)))
            asking.start()
            assert asked.wait(WAIT)
            os.kill(child._process.pid, number)
            child.line("^stopping; 1 connection")
            _await_closed_door(served.port)
            assert not answers
            go_on.set()
            asking.join(WAIT)
            assert answers == [(200, "late")]
            assert child._process.wait(WAIT) == Exit.OK
            child.line("^goodbye$")


_UPGRADE = (
    b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def _http_or_websocket(connection: socket.socket, request: bytes) -> None:
    if not re.search(rb"(?i)upgrade: websocket", request):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nHello World\n")
        return
    connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n")
    connection.sendall(b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def _serve_once(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nHello World\n")


def _context(served: Served, cert: str | Path | None, key: str | Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=served.ready["ca"])
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context


@contextmanager
def _connection(served: Served, cert: str | Path | None, key: str | Path) -> Iterator[HTTPSConnection]:
    connection = HTTPSConnection("127.0.0.1", served.port, context=_context(served, cert, key), timeout=WAIT)
    try:
        yield connection
    finally:
        connection.close()


def _tls(served: Served, cert: str | Path, key: str | Path, host: str = "localhost") -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", served.port), timeout=WAIT)
    try:
        return _context(served, cert, key).wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _read_end(tls: ssl.SSLSocket) -> bool:
    """Whether the far side ends the connection before the socket's timeout."""
    try:
        return tls.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:  # reset
        return True


def _await_closed_door(port: int) -> None:
    """Wait until nobody listens on a port."""

    def closed() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=WAIT).close()
        except OSError:
            return True
        return False

    until(closed, "a closed door")
