"""The verb `explain` as a user has it: exit codes, files, JSON, a server of the next client, recordings, reasons."""

from __future__ import annotations

import json
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from handfast.errors import Exit
from tests.e2e.kit import Caller
from tests.explain.kit import CLIENTS, Files
from tests.support.apps import accepted
from tests.support.certs import Ca
from tests.support.programs import HANDFAST, Child, curl, free_port, handfast, made, must, s_server, served
from tests.support.waiting import PATIENCE

WORDS = ("-cert", "server.crt", "-key", "server.key", "-CAfile", "ca.crt", "-Verify", "3", "-verify_return_error")
OWN = ("--cert", "client.crt", "--key", "client.key", "--ca", "ca.crt", "--timeout", "5")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of an `openssl s_server` that asks for a certificate; a good client's files are beside it."""
    Files(tmp_path)
    for name, leaf in CLIENTS.items():
        if leaf is not None:
            leaf.save(tmp_path, "client" if name == "good" else name)
    with s_server(*WORDS, folder=tmp_path) as (port, _):
        yield f"127.0.0.1:{port}"


def test_a_handshake_that_works_exits_0_and_is_drawn(call: Caller, server: str) -> None:
    """A good client: the diagram, what mutual TLS added with times, and the verdict."""
    outcome = call("explain", server, *OWN)
    assert outcome.code == Exit.OK
    for words in ("+ CertificateVerify", "What mutual TLS added", "medians of 3", "WORKS  Mutual TLS works"):
        assert words in outcome.out
    assert "\x1b" not in outcome.out
    assert "\x1b[" in call("explain", server, *OWN, "--color", "always").out


def test_a_refusal_exits_3_with_its_cause(call: Caller, server: str) -> None:
    """A client without a certificate, and an expired one: exit 3, the reason, and who must act, also as JSON."""
    bare = call("explain", server, "--ca", "ca.crt")
    assert (bare.code, "verify.no_certificate" in bare.out) == (Exit.REFUSED, True)
    outcome = call("explain", server, "--cert", "expired.crt", "--key", "expired.key", "--ca", "ca.crt", "--json")
    verdict = outcome.json["verdict"]
    assert (outcome.code, verdict["reason"], verdict["who"]) == (Exit.REFUSED, "verify.expired", "the client")
    old = call("explain", server, *OWN, "--tls1.2", "--json")
    assert (old.code, old.json["version"]) == (Exit.OK, "TLS 1.2")


def test_nobody_there_exits_6(call: Caller) -> None:
    """A port on which nothing listens, and a host that does not exist, are unreachable, each in its own words."""
    assert call.refused("explain", f"127.0.0.1:{free_port()}") == (Exit.UNREACHABLE, "unreachable")
    assert call.refused("explain", "nowhere.invalid:443", "--timeout", "5") == (Exit.UNREACHABLE, "unreachable.name")
    assert "next: check the name" in call("explain", "nowhere.invalid:443").err


def test_a_refusal_in_a_closed_recording_is_not_taken_for_success(call: Caller, server: str) -> None:
    """A refused handshake whose recording stays closed: exit 2 and the command that would tell; with the key log, 3.
    With another connection's key log it is said that it does not fit.
    """
    expired = ("--cert", "expired.crt", "--key", "expired.key", "--timeout", "5")
    call("explain", server, *expired, "--pcap", "bad.pcap", "--keylog", "bad.keys")
    call("explain", server, *OWN, "--pcap", "good.pcap", "--keylog", "good.keys")
    closed = call("explain", "bad.pcap")
    assert closed.code == Exit.USAGE
    assert "UNKNOWN" in closed.out
    assert "next: handfast explain bad.pcap --keylog FILE" in closed.out
    other = call("explain", "bad.pcap", "--keylog", "good.keys")
    assert (other.code, "good.keys holds no secrets of this connection" in other.err) == (Exit.USAGE, True)
    assert call("explain", "bad.pcap", "--keylog", "bad.keys").code == Exit.REFUSED


def test_the_files_are_written_and_the_secrets_kept(call: Caller, server: str, tmp_path: Path) -> None:
    """The page, the pcap and the key log: the last is private, warned of, and opens the recording for `explain`."""
    outcome = call("explain", server, *OWN, "--html", "x.html", "--pcap", "x.pcap", "--keylog", "x.keys", "--json")
    assert outcome.code == Exit.OK
    assert "x.keys opens the recording" in outcome.err
    assert stat.S_IMODE((tmp_path / "x.keys").stat().st_mode) == 0o600
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")
    secret = (tmp_path / "x.keys").read_text().split()[-1]
    assert secret not in outcome.out + outcome.err + (tmp_path / "x.html").read_text()
    again = call("explain", "x.pcap", "--keylog", "x.keys", "--json")
    assert (again.code, again.json["verdict"]["headline"]) == (Exit.OK, "Mutual TLS works")
    names = [step["message"] for step in outcome.json["steps"] if step["message"] != "application data"]
    assert sorted(names) == sorted(s["message"] for s in again.json["steps"] if s["message"] != "application data")
    closed = call("explain", "x.pcap", "--json")
    assert (closed.code, closed.json["verdict"]["reason"]) == (Exit.USAGE, "seen.sealed")
    assert closed.json["verdict"]["command"] == "handfast explain x.pcap --keylog FILE"
    assert "CertificateRequest" not in {step["message"] for step in closed.json["steps"]}
    assert "x.keys" not in call("explain", server, *OWN, "--pcap", "y.pcap").err


def test_of_several_connections_the_one_that_fails_is_shown(call: Caller, server: str, tmp_path: Path) -> None:
    """Of a recorded good and a refused connection, the refused one is explained; it is said that there are two."""
    expired = ("--cert", "expired.crt", "--key", "expired.key", "--timeout", "5")
    call("explain", server, *OWN, "--pcap", "good.pcap", "--keylog", "good.keys")
    call("explain", server, *expired, "--pcap", "bad.pcap", "--keylog", "bad.keys")
    bad = bytearray((tmp_path / "bad.pcap").read_bytes())
    shifted = bytes(bad[24:]).replace(bytes((192, 0, 2, 1)), bytes((192, 0, 2, 9)))
    (tmp_path / "both.pcap").write_bytes((tmp_path / "good.pcap").read_bytes() + shifted)
    (tmp_path / "both.keys").write_bytes((tmp_path / "good.keys").read_bytes() + (tmp_path / "bad.keys").read_bytes())
    outcome = call("explain", "both.pcap", "--keylog", "both.keys", "--json")
    assert (outcome.code, outcome.json["verdict"]["reason"]) == (Exit.REFUSED, "verify.expired")
    assert "holds 2 TLS connections; this is number 2" in outcome.err


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.png", b"\x89PNG\r\n" + b"\0" * 40, "input.not_capture"),
        ("x.pcap", b"\xd4\xc3\xb2\xa1" + b"\0" * 20, "input.no_handshake"),
        ("x.txt", b"", "input.empty"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(
    call: Caller, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    """A picture, a recording without TLS and an empty file are each refused with a reason."""
    (tmp_path / name).write_bytes(content)
    assert call.refused("explain", name) == (Exit.USAGE, reason)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "usage"),
        (("127.0.0.1:1", "--reason", "bug"), "usage"),
        (("127.0.0.1:1", "--cert", "x"), "usage"),
        (("--listen", "127.0.0.1:0", "--cert", "x"), "usage"),
        (("not-a-place.pcap",), "input.missing"),
        (("folder/not-a-place",), "input.missing"),
        (("localhost",), "input.address"),
        (("http://localhost:8443/",), "input.address"),
        (("https://localhost:99999/",), "input.address"),
        (("localhost:99999",), "input.address"),
        (("127.0.0.1:1", "--as", "nobody"), "connect.no_credential"),
        (("127.0.0.1:1", "--ca", "missing.crt"), "input.missing"),
        (("--reason", "nonsense"), "input.reason"),
        (("127.0.0.1:1", "--sni", "bad..name"), "input.name"),
    ],
)
def test_what_cannot_be_meant_is_refused(call: Caller, words: tuple[str, ...], reason: str) -> None:
    """Options that do not go together, and files and names that are not there, are refused in words."""
    assert call.refused("explain", *words)[1] == reason


def test_a_url_and_a_name_without_a_port(call: Caller, server: str, tmp_path: Path) -> None:
    """A URL is called at its host and port; for a bare name the port is asked for; a file of that name is read."""
    assert call("explain", f"https://localhost:{server.rpartition(':')[2]}/x", *OWN).code == Exit.OK
    assert "give HOST:PORT, as localhost:443" in call("explain", "localhost").err
    (tmp_path / "localhost").write_bytes(b"no recording")
    assert call.refused("explain", "localhost") == (Exit.USAGE, "input.not_capture")


def test_a_client_that_is_not_there_is_told_where_it_would_be(call: Caller, tmp_path: Path) -> None:
    """`--as NAME` without its files says which folder was looked in, and what makes them."""
    err = call("explain", "127.0.0.1:1", "--as", "nobody", "--state", "state").err
    clients = tmp_path / "state" / "clients"
    assert f"in {clients}, nor in this folder [connect.no_credential]" in err
    assert f"next: make one: handfast issue nobody --out {clients} --state state\n" in err


def test_a_reason_is_explained(call: Caller) -> None:
    """`--reason` says what a code means, what to do and who acts; `list` has every code."""
    outcome = call("explain", "--reason", "verify.crl_missing")
    assert outcome.code == Exit.OK
    assert "who acts: the server" in outcome.out
    assert call("explain", "--reason", "verify.expired", "--json").json["exit"] == 3
    assert "verify.expired" in call("explain", "--reason", "list").out
    assert len(call("explain", "--reason", "list", "--json").json) > 100


def _listening(folder: Path, *words: str | Path) -> Child:
    return Child((*HANDFAST, "explain", "--listen", "127.0.0.1:0", "--json", *words), folder, merge=False)


def _last(child: Child) -> Any:
    return json.loads(child.line(r'"verdict"'))


def test_the_wait_for_a_client_ends(call: Caller, tmp_path: Path) -> None:
    """With `--timeout` nobody's coming ends it; without, it says that it waits until Ctrl-C, and does."""
    Files(tmp_path)
    files = ("--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt", "--listen", "127.0.0.1:0")
    waited = call("explain", *files, "--timeout", "0.3")
    assert (waited.code, "[seen.nobody]" in waited.err) == (Exit.UNREACHABLE, True)
    assert ", for 0.3 s" in waited.out
    with Child((*HANDFAST, "explain", *files), tmp_path, merge=False) as child:
        assert child.line("waiting for a client").strip().endswith(", until Ctrl-C")
        child._process.send_signal(signal.SIGINT)
        assert child._process.wait(PATIENCE) == Exit.REFUSED


def test_the_servers_side_of_the_next_client_is_explained(tmp_path: Path) -> None:
    """`--listen` waits for one client, judges it as a guard does, explains, and ends with the exit code that fits."""
    Files(tmp_path)
    files = ("--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt")
    for name, reason in (("good", None), ("expired", "verify.expired"), ("none", "verify.no_certificate")):
        leaf = CLIENTS[name]
        own: tuple[str, ...] = ()
        if leaf is not None:
            leaf.save(tmp_path, "client")
            own = ("--cert", "client.crt", "--key", "client.key")
        with _listening(tmp_path, *files) as child:
            place = json.loads(child.line("ready"))["place"]
            answer = curl(f"https://localhost:{place.rpartition(':')[2]}/", "--cacert", "ca.crt", *own, folder=tmp_path)
            verdict = _last(child)["verdict"]
            assert verdict["reason"] == reason
            assert answer.body == "handfast let you in: hello\n" if reason is None else answer.error == reason


def test_the_authority_of_the_state_folder_serves_and_a_client_of_up_is_shown(tmp_path: Path) -> None:
    """Without files, `--listen` gets its certificate from the authority, and `--as NAME` shows one of its clients."""
    state = ("--state", tmp_path / "state")
    made("authority", "init", *state, folder=tmp_path)
    made("issue", "web", *state, "--out", tmp_path, folder=tmp_path)
    with _listening(tmp_path, *state) as child:
        place = json.loads(child.line("ready"))["place"]
        done = handfast("explain", place, "--as", "web", *state, "--json", folder=tmp_path)
        assert json.loads(done.stdout)["verdict"]["worked"], done
        assert _last(child)["verdict"]["headline"] == "Mutual TLS works"


def test_as_takes_the_client_that_up_keeps(tmp_path: Path) -> None:
    """A client of `up` is called by its name: its certificate, and the authority's root to judge the server by."""
    state = ("--state", tmp_path / "state")
    made("authority", "init", *state, folder=tmp_path)
    with served("up", "--to", "127.0.0.1:1", *state, folder=tmp_path) as guard:
        place = f"localhost:{guard.port}"
        known = handfast("explain", place, "--as", "client", *state, "--json", folder=tmp_path)
        assert json.loads(known.stdout)["verdict"]["worked"], known
        stranger = handfast("explain", place, "--json", folder=tmp_path)
        assert json.loads(stranger.stdout)["verdict"]["reason"] == "verify.no_certificate"
        assert (known.returncode, stranger.returncode) == (0, 3)


def test_a_constrained_authority_is_judged_as_the_guard_judges_it(tmp_path: Path) -> None:
    """A server whose name its authority's constraints permit works; one under the same constraints, for another name,
    fails for that.
    """
    state = ("--state", tmp_path / "state")
    made("authority", "init", "--constrain", "example.internal", *state, folder=tmp_path)
    made("issue", "api", "api.example.internal", *state, "--out", tmp_path, folder=tmp_path)
    (root,) = x509.load_pem_x509_certificates((tmp_path / "ca.crt").read_bytes())
    limits = root.extensions.get_extension_for_class(x509.NameConstraints)
    assert any(isinstance(base, x509.UniformResourceIdentifier) for base in limits.value.permitted_subtrees or ())
    other = Ca.root(extra=[(limits.value, True)])
    other.save(tmp_path, "other-ca")
    other.client("spiffe://handfast.internal/api").save(tmp_path, "caller")
    other.server("b.example.internal").save(tmp_path, "inside")
    other.server("b.example.com").save(tmp_path, "outside")
    for files, client, ca, name, reason in (
        ("api", "api", "ca.crt", "api.example.internal", None),
        ("inside", "caller", "other-ca.crt", "b.example.internal", None),
        ("outside", "caller", "other-ca.crt", "b.example.com", "verify.name_constraint"),
    ):
        asks = ("-CAfile", ca, "-Verify", "3", "-verify_return_error")
        chain = ("-cert", f"{files}.crt", "-cert_chain", f"{files}.crt", "-key", f"{files}.key")
        with s_server(*asks, *chain, folder=tmp_path) as (port, _):
            own = ("--cert", f"{client}.crt", "--key", f"{client}.key", "--ca", ca, "--sni", name)
            done = handfast("explain", f"127.0.0.1:{port}", *own, "--json", folder=tmp_path)
        verdict = json.loads(done.stdout)["verdict"]
        assert (verdict["reason"], done.returncode) == (reason, Exit.OK if reason is None else Exit.REFUSED), done
    guard = ("verify", "outside.crt", "--bundle", "other-ca.crt", "--purpose", "server")
    assert "[verify.name_constraint]" in handfast(*guard, folder=tmp_path).stderr


@contextmanager
def _narrow(port: int) -> Iterator[int]:
    """A middlebox that passes a connection on only if its first packet is small."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def carry(source: socket.socket, target: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(1 << 16):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        def serve() -> None:
            while (client := accepted(listener)) is not None:
                with client, suppress(OSError):
                    first = client.recv(1 << 16)
                    if len(first) > 1000:
                        continue
                    with socket.create_connection(("127.0.0.1", port)) as server:
                        server.sendall(first)
                        back = threading.Thread(target=carry, args=(server, client))
                        back.start()
                        carry(client, server)
                        back.join(PATIENCE)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)


def test_a_middlebox_that_cuts_large_hellos_is_found(call: Caller, server: str) -> None:
    """Where a post-quantum hello is cut on the way and a small one is not, the network is named."""
    with _narrow(int(server.rpartition(":")[2])) as port:
        verdict = call("explain", f"127.0.0.1:{port}", *OWN, "--json").json["verdict"]
    assert (verdict["reason"], verdict["who"], verdict["sure"]) == ("seen.cut", "the network", "likely")
    assert "post-quantum" in verdict["text"]


def test_an_encrypted_key_opens_with_its_passphrase(call: Caller, server: str, tmp_path: Path) -> None:
    """A key under a passphrase is taken with --key-passphrase-file, and refused without."""
    must(
        "openssl",
        "pkcs8",
        "-topk8",
        "-in",
        "client.key",
        "-out",
        "sealed.key",
        "-passout",
        "pass:secret",
        folder=tmp_path,
    )
    (tmp_path / "word").write_text("secret\n")
    words = ("explain", server, "--cert", "client.crt", "--key", "sealed.key", "--ca", "ca.crt")
    assert call.refused(*words)[1] == "input.key_encrypted"
    assert call(*words, "--key-passphrase-file", "word").code == Exit.OK


def test_output_that_cannot_be_written_is_an_error(call: Caller, server: str) -> None:
    """A page into a folder that is not there fails with the disk's reason, and not with a traceback."""
    code, reason = call.refused("explain", server, *OWN, "--html", "no/such/folder/x.html")
    assert (code, reason) == (Exit.STORE, "store.disk")
