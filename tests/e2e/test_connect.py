"""The verbs `connect` and `curl` against real servers: openssl, nginx and a guard, from start to end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from handfast.authority import GeneratedPassphrase, open_authority
from handfast.cli.renewing import Renewal, renewal_of
from handfast.errors import Exit, HandfastError, Reason
from handfast.pki.certificates import parse_certificates
from tests.connector.kit import everything
from tests.support.apps import App
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.programs import HANDFAST, Child, Served, free_port, handfast, made, nginx, refused, run, s_server
from tests.support.waiting import until

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
FILES = ("--cert", "web.crt", "--key", "web.key", "--ca", "ca.crt")
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@contextmanager
def connecting(*words: str | Path, folder: Path) -> Iterator[Served]:
    """`handfast connect` on a free port, from its ready line to a clean end."""
    line = (*HANDFAST, "connect", *words, "--json")
    if "--listen" not in words:
        line = (*line, "--listen", "127.0.0.1:0")
    with Child(line, folder, merge=False) as child:
        ready = json.loads(child.line())
        assert ready.get("event") == "ready", ready
        yield Served(child, ready)
        code = child.stop()
    assert (code, child.errors) == (0, [])
    assert json.loads(child.lines[-1])["event"] == "stopped"


def spoken(port: int, request: bytes) -> bytes:
    """Send a request to the local port; all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as plug:
        plug.sendall(request)
        return everything(plug)


@pytest.fixture
def files(tmp_path: Path) -> Ca:
    """An authority, a server's files and a client's, in the test's folder."""
    ca = Ca.root()
    ca.save(tmp_path, "ca")
    ca.server().save(tmp_path, "server")
    ca.client().save(tmp_path, "web")
    return ca


def place(leaf: Leaf, folder: Path, name: str) -> None:
    cert, key = leaf.save(folder, f"new-{name}")
    cert.replace(folder / f"{name}.crt")
    key.replace(folder / f"{name}.key")


SERVER = ("-cert", "server.crt", "-key", "server.key", "-CAfile", "ca.crt", "-Verify", "2", "-verify_return_error")


def test_openssl_is_called(files: Ca, tmp_path: Path) -> None:
    """`openssl s_server -Verify` takes the certificate, and lines go both ways; --json tells what is going on."""
    with (
        s_server(*SERVER, folder=tmp_path) as (port, _),
        connecting("--to", f"localhost:{port}", *FILES, "--pool", "0", folder=tmp_path) as connect,
    ):
        assert connect.ready["server"] == "dns:localhost"
        assert connect.ready["as"] == "spiffe://test/web"
        with socket.create_connection(("127.0.0.1", connect.port), timeout=30) as plug:
            plug.sendall(b"hello\n")
            assert plug.recv(100) == b"olleh\n"
        assert connect.next("offered")["version"] == "TLSv1.3"
        assert connect.next("connected")["by"] == "the server's first byte"
        assert connect.next("closed")["bytes_out"] == 6


@pytest.mark.parametrize(
    ("case", "reason", "words", "hint"),
    [
        ("expired", "connect.expired", "our certificate spiffe://test/web expired on", "handfast issue"),
        ("server", "verify.purpose", "is not for client use", "client"),
        ("other", "connect.refused", "the server accepts CN=Test Root", "authority that the server accepts"),
        ("untrusted", "connect.untrusted", "which is not in the trust bundle", "--ca F"),
        ("name", "connect.untrusted", "ip:127.0.0.1, not for dns:api.internal", "--sni"),
        ("identity", "connect.untrusted", "not for spiffe://test/api", "--expect"),
        ("mismatch", "input.key_mismatch", "does not belong to the certificate", "inspect"),
        ("encrypted", "input.key_encrypted", "needs its passphrase", "--key-passphrase-file"),
        ("plain", "connect.handshake", "does not speak TLS", "check the port"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_it_listens(
    files: Ca, tmp_path: Path, case: str, reason: str, words: str, hint: str
) -> None:
    """A credential that is no good, a server that refuses it, or one that is not the one meant end the start."""
    more: list[str] = []
    match case:
        case "expired":
            place(files.client(not_before=NOW - 9 * DAY, not_after=NOW - 3 * DAY), tmp_path, "web")
        case "server":
            place(files.server(), tmp_path, "web")
        case "other":
            place(Ca.root("Other").client(), tmp_path, "web")
        case "untrusted":
            Ca.root("Other").save(tmp_path, "mine")
            more = ["--ca", "mine.crt"]
        case "name":
            more = ["--sni", "api.internal"]
        case "identity":
            more = ["--expect", "spiffe://test/api"]
        case "mismatch":
            shutil.copy(tmp_path / "server.key", tmp_path / "web.key")
        case "encrypted":
            words_ = (
                "pkcs8",
                "-topk8",
                "-in",
                "web.key",
                "-out",
                "locked.key",
                "-passout",
                "pass:secret",
                "-v2",
                "aes256",
            )
            assert run("openssl", *words_, folder=tmp_path).returncode == 0
            (tmp_path / "locked.key").replace(tmp_path / "web.key")
    with s_server(*SERVER, folder=tmp_path) as (port, _), App() as app:
        to = app.address.replace("127.0.0.1", "localhost") if case == "plain" else f"localhost:{port}"
        if case == "plain":  # a server that speaks first, as of mail
            listener = socket.create_server(("127.0.0.1", 0))
            to = f"localhost:{listener.getsockname()[1]}"
            import threading

            def greet() -> None:
                plug, _ = listener.accept()
                with plug, listener:
                    plug.sendall(b"220 ready\r\n")
                    plug.recv(1 << 16)

            threading.Thread(target=greet, daemon=True).start()
        code, error = refused("connect", "--to", to, *FILES, *more, "--listen", "127.0.0.1:0", folder=tmp_path)
    assert (code, error["error"]) == (Exit.USAGE if reason.startswith("input.") else Exit.REFUSED, reason)
    assert words in error["message"]
    assert hint in error["hint"]


def test_a_server_that_is_away_is_said_to_be_and_called_when_it_comes(files: Ca, tmp_path: Path) -> None:
    """With the server away the connector starts all the same, answers 502, and connects once the server is there."""
    port = free_port()
    with connecting("--to", f"localhost:{port}", *FILES, folder=tmp_path) as connect:
        assert f"localhost:{port}: connection refused" in connect.ready["unreachable"]
        assert b"connect.unreachable" in spoken(connect.port, GET)
        assert connect.next("refused")["fault"] == "the network"
        line = ("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-www", *SERVER)
        with Child(line, tmp_path) as server:
            server.line("^ACCEPT")
            assert b"200 ok" in spoken(connect.port, GET)


def test_nginx_takes_us_and_says_what_it_does_not_like(files: Ca, tmp_path: Path) -> None:
    """nginx with ssl_verify_client lets the right certificate through, and answers a wrong one in HTTP."""
    port = free_port()
    block = f"""
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate server.crt; ssl_certificate_key server.key;
        ssl_client_certificate ca.crt; ssl_verify_client on; ssl_protocols TLSv1.3;
        location / {{ return 200 "hello $ssl_client_verify\\n"; }}
    }}
"""
    with nginx(block, tmp_path):
        with connecting("--to", f"localhost:{port}", *FILES, folder=tmp_path) as connect:
            assert spoken(connect.port, GET).endswith(b"hello SUCCESS\n")
        place(Ca.root("Other").client(), tmp_path, "web")
        with connecting("--to", f"localhost:{port}", *FILES, folder=tmp_path) as connect:
            assert b"400 The SSL certificate error" in spoken(connect.port, GET)


def test_http_2_goes_through_where_it_is_offered(files: Ca, tmp_path: Path) -> None:
    """With --alpn h2 a caller may speak HTTP/2 (as gRPC does) to the local port; without it the server takes it not."""
    with App() as app, Running(files, app.address) as guard:
        for alpn, said in ((("--alpn", "h2"), "200 2"), ((), "000")):
            arguments = ("--to", f"localhost:{guard.address.rpartition(':')[2]}", *FILES, *alpn)
            with connecting(*arguments, folder=tmp_path) as connect:
                ask = ["curl", "-sS", "--max-time", "30", "-o", "/dev/null", "-w", "%{http_code} %{http_version}"]
                ask += ["--connect-to", f"localhost:80:127.0.0.1:{connect.port}", "http://localhost/"]
                told = subprocess.run([*ask, "--http2-prior-knowledge"], capture_output=True, text=True, check=False)
                assert told.stdout.startswith(said), told
    done = handfast("connect", "--to", "localhost:1", *FILES, "--alpn", "h2,,x", folder=tmp_path)
    assert done.returncode == 2
    assert "h2,http/1.1" in done.stderr


def test_an_old_server_is_called_only_if_that_is_allowed(files: Ca, tmp_path: Path) -> None:
    """TLS 1.2 is refused with a hint, and spoken with --tls-min 1.2."""
    with s_server(*SERVER, "-tls1_2", folder=tmp_path) as (port, _):
        words = ("connect", "--to", f"localhost:{port}", *FILES)
        code, error = refused(*words, "--listen", "127.0.0.1:0", folder=tmp_path)
        assert (code, error["error"], "--tls-min 1.2" in error["hint"]) == (3, "connect.handshake", True)
        with connecting(*words[1:], "--tls-min", "1.2", "--pool", "0", folder=tmp_path) as connect:
            with socket.create_connection(("127.0.0.1", connect.port), timeout=30) as plug:
                plug.sendall(b"hello\n")
                assert plug.recv(100) == b"olleh\n"
            assert connect.next("offered")["version"] == "TLSv1.2"


def test_a_port_that_others_reach_needs_a_word(files: Ca, tmp_path: Path) -> None:
    """An address beyond this machine is refused unless that is said; uids go with UNIX sockets alone."""
    words = ("connect", "--to", "localhost:1", *FILES)
    code, error = refused(*words, "--listen", "0.0.0.0:0", folder=tmp_path)
    assert (code, error["error"]) == (Exit.USAGE, "connect.open_port")
    with connecting(*words[1:], "--listen", "0.0.0.0:0", "--unsafe-listen", folder=tmp_path) as connect:
        assert connect.ready["url"].startswith("tcp://0.0.0.0:")
    code, error = refused(*words, "--unix-uid", "0", folder=tmp_path)
    assert (code, error["error"]) == (Exit.USAGE, "usage")


def test_a_unix_socket_comes_and_goes(files: Ca, tmp_path: Path) -> None:
    """The socket is private while it is there, is taken over from a killed connector, and removed at the end."""
    with s_server(*SERVER, folder=tmp_path) as (port, _):
        words = ("--to", f"localhost:{port}", *FILES, "--listen", "unix:c.sock", "--pool", "0")
        with Child((*HANDFAST, "connect", *words, "--json"), tmp_path) as child:
            child.line("ready")
            child._process.send_signal(signal.SIGKILL)
            child._process.wait(30)
        assert stat.S_ISSOCK((tmp_path / "c.sock").stat().st_mode)
        with connecting(*words, folder=tmp_path):
            assert stat.S_IMODE((tmp_path / "c.sock").stat().st_mode) == 0o600
    assert not (tmp_path / "c.sock").exists()


def test_a_file_in_the_place_of_a_socket_stays(files: Ca, tmp_path: Path) -> None:
    """A UNIX address that names a file, by a mistake in typing, is refused, and costs nobody the file."""
    (tmp_path / "precious").write_text("data")
    code, error = refused("connect", "--to", "localhost:1", *FILES, "--listen", "unix:precious", folder=tmp_path)
    assert (code, error["error"]) == (Exit.UNREACHABLE, "guard.listen")
    assert (tmp_path / "precious").read_text() == "data"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The state folder that verbs find by themselves, with an authority, a server's certificate, and web's."""
    made("authority", "init", folder=tmp_path)
    state = tmp_path / "default-state"
    made("issue", "web", "--out", state / "clients", folder=tmp_path)
    made("issue", "localhost", "--out", tmp_path, folder=tmp_path)
    return state


OWN_SERVER = ("-cert", "localhost.crt", "-cert_chain", "localhost.crt", "-key", "localhost.key", "-CAfile", "ca.crt",
              "-Verify", "3", "-verify_return_error")  # fmt: skip


def test_a_name_of_the_authority_is_enough(home: Path, tmp_path: Path) -> None:
    """--as NAME finds certificate, key and authority in the state folder; an unknown name has a command."""
    with s_server(*OWN_SERVER, folder=tmp_path) as (port, _):
        with connecting("--to", f"localhost:{port}", "--as", "web", "--pool", "0", folder=tmp_path) as connect:
            assert (connect.ready["as"], connect.ready["renews"]) == ("spiffe://handfast.internal/web", True)
            with socket.create_connection(("127.0.0.1", connect.port), timeout=30) as plug:
                plug.sendall(b"hello\n")
                assert plug.recv(100) == b"olleh\n"
        code, error = refused("connect", "--to", f"localhost:{port}", "--as", "db", folder=tmp_path)
    assert (code, error["error"]) == (Exit.NOT_FOUND, "connect.no_credential")
    command = error["hint"].removeprefix("make one: handfast ").split()
    assert made(*command, folder=tmp_path)["names"] == ["spiffe://handfast.internal/db"]
    assert (home / "clients" / "db.crt").exists()


def renewal(home: Path) -> Renewal:
    found = renewal_of(home / "clients" / "web.crt", home / "clients" / "web.key", home, None)
    assert found is not None
    return found


def test_a_certificate_is_renewed_when_half_its_life_is_over(home: Path) -> None:
    """Before half time nothing is issued; after it, once, with a new key and the same names."""
    clients = home / "clients"
    before = parse_certificates((clients / "web.crt").read_bytes(), "web")[0]
    assert renewal(home).renew(NOW + timedelta(hours=11)) is False
    assert (clients / "web.crt").read_bytes().startswith(b"-----BEGIN")
    assert renewal(home).renew(NOW + timedelta(hours=14)) is True
    after = parse_certificates((clients / "web.crt").read_bytes(), "web")[0]
    assert after.serial_number != before.serial_number
    assert after.public_key() != before.public_key()
    assert stat.S_IMODE((clients / "web.key").stat().st_mode) == 0o600
    assert renewal(home).renew(NOW + timedelta(hours=14)) is False


@pytest.mark.parametrize(("case", "words"), [("revoked", "it was revoked on"), ("strange", "did not issue it")])
def test_what_the_authority_took_back_or_never_gave_is_not_renewed(home: Path, case: str, words: str) -> None:
    """A revoked certificate, or one of another authority, is not made anew behind the operator's back."""
    clients = home / "clients"
    if case == "revoked":
        with open_authority(home, GeneratedPassphrase()) as authority:
            authority.revoke("web")
    else:
        Ca.root().client("spiffe://handfast.internal/web").save(clients, "web")
    before = (clients / "web.crt").read_bytes()
    with pytest.raises(HandfastError, match=words) as refused_:
        renewal(home).renew(NOW + timedelta(hours=14))
    assert refused_.value.reason is Reason.CONNECT_NOT_ISSUED_HERE
    assert (clients / "web.crt").read_bytes() == before


def test_where_a_person_holds_the_passphrase_nothing_renews(home: Path) -> None:
    """Without a passphrase that can be had, and without an authority, there is no renewal; nobody is asked."""
    (home / "passphrase").rename(home / "elsewhere")
    web = (home / "clients" / "web.crt", home / "clients" / "web.key")
    assert renewal_of(*web, home, None) is None
    assert renewal_of(*web, home, home / "elsewhere") is not None
    assert renewal_of(*web, home / "clients", None) is None


def test_curl_gets_the_files_and_its_exit_code_is_ours(home: Path, tmp_path: Path) -> None:
    """`handfast curl` calls with the name's files; curl's options and exit codes pass through."""
    port = free_port()
    with Child(("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-www", *OWN_SERVER), tmp_path) as server:
        server.line("^ACCEPT")
        url = f"https://localhost:{port}/"
        done = handfast("curl", url, "--as", "web", "-sS", "-w", "%{http_code}", "-o", "page", folder=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "200", "")
        assert "Cipher" in (tmp_path / "page").read_text()
        files = (
            "--cert",
            home / "clients" / "web.crt",
            "--key",
            home / "clients" / "web.key",
            "--ca",
            home / "root.crt",
        )
        done = handfast("curl", *files, url, "--", "-sS", "-i", folder=tmp_path)
        assert (done.returncode, done.stdout.startswith("HTTP/1.0 200")) == (0, True)
        done = handfast("curl", f"https://localhost:{free_port()}/", "--as", "web", "-sS", folder=tmp_path)
        assert done.returncode == 7  # nobody there: curl's own words are enough
        assert "handfast:" not in done.stderr


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("name", 60, "the certificate is for dns:localhost, not for ip:127.0.0.1"),
        ("refused", 56, "the server refused our certificate: "),
    ],
)
def test_where_curl_fails_over_tls_we_say_why(home: Path, tmp_path: Path, case: str, code: int, words: str) -> None:
    """curl's exit code stays, and after its words come ours; in JSON where that is asked for."""
    port, host = free_port(), "127.0.0.1" if case == "name" else "localhost"
    strict = list(OWN_SERVER)
    if case == "refused":
        Ca.root("Other").save(tmp_path, "other")
        strict[strict.index("ca.crt")] = "other.crt"
    with Child(("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-www", *strict), tmp_path) as server:
        server.line("^ACCEPT")
        words_ = ("curl", f"https://{host}:{port}/", "--as", "web", "-sS")
        done = handfast(*words_, folder=tmp_path)
        assert done.returncode == code
        assert done.stderr.startswith(f"curl: ({code})")
        assert words in done.stderr.partition("handfast: ")[2]
        told = json.loads(handfast(*words_, "--json", folder=tmp_path).stderr.splitlines()[-1])
        assert told["error"] == ("connect.untrusted" if case == "name" else "connect.refused")


@pytest.mark.parametrize("option", ["--resolve", "--connect-to"])
def test_curl_that_is_led_elsewhere_is_explained_too(home: Path, tmp_path: Path, option: str) -> None:
    """Where curl's own options say which address a name has, our explanation is of the server there."""
    port, there = free_port(), f":{free_port()}"
    url, where = f"https://wrong.example:{port}/", f"wrong.example:{port}:127.0.0.1"
    if option == "--connect-to":
        url, where = f"https://wrong.example{there}/", f"wrong.example{there}:127.0.0.1:{port}"
    with Child(("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-www", *OWN_SERVER), tmp_path) as server:
        server.line("^ACCEPT")
        done = handfast("curl", url, "--as", "web", "-sS", option, where, folder=tmp_path)
    assert done.returncode == 60
    assert "the certificate is for dns:localhost, not for dns:wrong.example" in done.stderr.partition("handfast: ")[2]


def test_a_machine_without_curl_is_told_so(
    home: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No curl is an error of its own, not a traceback."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call.refused("curl", "https://localhost/", "--as", "web") == (Exit.NOT_FOUND, "connect.no_curl")


def test_a_renewed_file_is_taken_while_it_runs(files: Ca, tmp_path: Path) -> None:
    """A new pair beside the running connector is in force for the next call; a bad one keeps the old, and is told."""
    with s_server(*SERVER, folder=tmp_path) as (port, _):
        words = ("--to", f"localhost:{port}", *FILES, "--pool", "0", "--no-check")
        with connecting(*words, folder=tmp_path) as connect:
            place(files.client(), tmp_path, "web")
            assert connect.next("reload")["outcome"] == "taken"
            (tmp_path / "web.crt").write_text("broken")
            event = connect.next("reload")
            assert (event["outcome"], event["reason"]) == ("kept", "input.not_certificate")
            with socket.create_connection(("127.0.0.1", connect.port), timeout=30) as plug:
                plug.sendall(b"hello\n")
                assert plug.recv(100) == b"olleh\n"


def test_it_stops_when_told_and_at_once_when_told_twice(files: Ca, tmp_path: Path) -> None:
    """SIGTERM waits for who is open; a second signal does not."""
    with s_server(*SERVER, folder=tmp_path) as (port, _):
        line = (*HANDFAST, "connect", "--to", f"localhost:{port}", *FILES, "--listen", "127.0.0.1:0", "--pool", "0")
        with Child(line, tmp_path, merge=False) as child:
            shown = child.line("listening on")
            local = int(shown.partition("127.0.0.1:")[2].partition(",")[0])
            child.line("Ctrl-C stops it")
            with socket.create_connection(("127.0.0.1", local), timeout=30) as plug:
                plug.sendall(b"hello\n")
                assert plug.recv(100) == b"olleh\n"
                child._process.send_signal(signal.SIGINT)
                child.line(r"stopping; 1 connection\(s\) may finish")
                plug.sendall(b"again\n")
                assert plug.recv(100) == b"niaga\n"
                child._process.send_signal(signal.SIGINT)
                until(lambda: child._process.poll() is not None, "its end")
            assert child._process.returncode == Exit.REFUSED
