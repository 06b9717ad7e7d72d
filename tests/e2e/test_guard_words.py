"""What a guard says of itself: doubts at its start, and logs that name the listener, the site and the cause."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.e2e.guard_kit import Files, guarding, metric, named
from tests.e2e.kit import Caller
from tests.e2e.test_guard_revocation import crl
from tests.support.apps import App
from tests.support.certs import Ca
from tests.support.programs import free_port

LISTENER = """
[[listener]]
name = "public"
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "{to}"
"""


def _fresh_list(files: Files) -> str:
    crl(files.folder / "list.crl", files.ca)
    return 'crl = ["list.crl"]'


def _list_of_another(files: Files) -> str:
    crl(files.folder / "list.crl", Ca.root("Other"))
    return 'crl = ["list.crl"]'


def _stale_list(files: Files) -> str:
    crl(files.folder / "list.crl", files.ca, until=timedelta(seconds=-5))
    return 'crl = ["list.crl"]'


def _other_name(_files: Files) -> str:
    return 'names = ["elsewhere.example"]\ndefault = true'


def _one_label(files: Files) -> str:
    files.server("server", "localhost", "app")
    return 'names = ["app"]\ndefault = true'


def _own_name(_files: Files) -> str:
    return 'names = ["localhost"]\ndefault = true'


def _nearly_over(files: Files) -> str:
    now = datetime.now(UTC)
    files.ca.server("localhost", not_before=now - timedelta(hours=20), not_after=now + timedelta(hours=1)).save(
        files.folder, "server"
    )
    return ""


def _open_socket(files: Files) -> str:
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(files.folder / "app.sock"))
    (files.folder / "app.sock").chmod(0o666)
    return "to = unix:app.sock"


def _closed_socket(files: Files) -> str:
    _open_socket(files)
    (files.folder / "app.sock").chmod(0o660)
    return "to = unix:app.sock"


def _two_authorities(files: Files) -> str:
    other = Ca.root("Other").save(files.folder, "other")
    with (files.folder / "ca.crt").open("ab") as bundle:
        bundle.write(other.read_bytes())
    return 'allow = ["spiffe://test/alice"]'


def _parted_authorities(files: Files) -> str:
    return _two_authorities(files) + '\ntrust_domain = "test"'


def _two_without_rules(files: Files) -> str:
    _two_authorities(files)
    return ""


DOUBTS: dict[Callable[[Files], str], str] = {
    _fresh_list: "",
    _list_of_another: "there is no revocation list of",
    _stale_list: "was due for renewal",
    _own_name: "",
    _one_label: "",
    _other_name: "is not for elsewhere.example",
    _nearly_over: "put a new one in its place",
    _two_without_rules: "",
    _parted_authorities: "",
    _two_authorities: "each of 2 authorities may vouch",
    _closed_socket: "",
    _open_socket: "can reach unix:",
}


@pytest.mark.parametrize("case", DOUBTS, ids=lambda case: case.__name__.strip("_"))
def test_what_is_hardly_meant_is_told(call: Caller, tmp_path: Path, case: Callable[[Files], str]) -> None:
    """At --check and at the start a guard tells what it can serve with and is hardly meant, and nothing else."""
    more, to = case(Files(tmp_path)), "127.0.0.1:9"
    if more.startswith("to = "):
        more, to = "", more.removeprefix("to = ")
    config = LISTENER.format(to=to) + more
    with guarding(tmp_path, config) as guard:
        told = [line for line in guard.ready["warnings"] if "nothing answers" not in line]
    checked = call.done("guard", "-c", str(tmp_path / "handfast.toml"), "--check")["warnings"]
    assert checked == told
    assert (DOUBTS[case] in told[0]) if DOUBTS[case] else told == []


def test_events_name_the_listener_and_the_server_name(tmp_path: Path) -> None:
    """Connections and requests, let in or not, are logged with the listener; connections with the name they gave."""
    files = Files(tmp_path)
    alice, mallory = files.client(), files.client("mallory", Ca.root("Other"))
    with App() as app, guarding(tmp_path, LISTENER.format(to=app.address)) as guard:
        assert alice.ask(guard.port).status == 200
        accepted, request = guard.next("connection"), guard.next("request")
        assert (accepted["listener"], accepted["server_name"], request["listener"]) == ("public", "localhost", "public")
        assert mallory.ask(guard.port).status == 403
        denied = guard.next("connection", decision="deny")
        assert (denied["listener"], denied["server_name"]) == ("public", "localhost")


def test_a_server_name_that_is_none_is_told_as_that(tmp_path: Path) -> None:
    """A malformed server name is refused as unknown, where any good one is served, and not by the policy."""
    files = Files(tmp_path)
    alice = files.client()
    with App() as app, guarding(tmp_path, LISTENER.format(to=app.address)) as guard:
        with alice.line(guard.port, "-x.y", checked=False) as line:
            assert line.ask(host="localhost").error == (403, "tls.unknown_name")
        assert guard.next("connection")["reason"] == "tls.unknown_name"
        with alice.line(guard.port, "x.y", checked=False) as line:
            assert line.ask().status == 200


@pytest.mark.parametrize(
    ("first", "reason", "remedy"),
    [
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", "tls.not_tls", "sslnegotiation=direct"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "tls.not_tls", ""),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "tls.plain_http", "https://"),
    ],
)
def test_who_takes_the_port_for_another_is_told_apart(tmp_path: Path, first: bytes, reason: str, remedy: str) -> None:
    """What does not speak TLS is told as what it is, with what helps."""
    Files(tmp_path)
    with guarding(tmp_path, LISTENER.format(to="127.0.0.1:9")) as guard:
        with socket.create_connection(("127.0.0.1", guard.port)) as plain:
            plain.sendall(first)
            event = guard.next("connection", decision="deny")
        assert event["reason"] == reason
        assert remedy in event.get("remedy", "")


def test_a_target_that_is_out_says_why(tmp_path: Path) -> None:
    """When health checks take a target out, the log has the cause; an interval alone is enough of a setting."""
    Files(tmp_path)
    dead = free_port()

    def busy(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")

    upstream = (
        '[upstream.{name}]\ntargets = ["127.0.0.1:{port}"]\n[upstream.{name}.health]\npath = "/"\ninterval = "100ms"\n'
    )
    with App(busy) as app:
        text = upstream.format(name="a", port=dead) + upstream.format(name="b", port=app.address.rpartition(":")[2])
        listeners = LISTENER.format(to="a") + LISTENER.replace("public", "other").format(to="b")
        with guarding(tmp_path, text + listeners) as guard:
            causes = {event["upstream"]: event["detail"] for event in (guard.next("health"), guard.next("health"))}
    assert "connection refused" in causes["a"]
    assert causes["b"] == "status 503"


def test_a_divided_limit_says_so(tmp_path: Path) -> None:
    """With several workers a refusal names the share of one, and that it is one."""
    files = Files(tmp_path)
    alice = files.client()
    config = LISTENER.format(to="{to}") + "[listener.limits]\nconnections_per_identity = 2\n"
    with App(named("app")) as app, guarding(tmp_path, config.format(to=app.address), top="workers = 2\n") as guard:
        while not guard.events("connection") or guard.events("connection")[-1].get("reason") != "limit.connections":
            with alice.line(guard.port) as one, alice.line(guard.port) as two, alice.line(guard.port) as three:
                for line in (one, two, three):
                    try:
                        line.ask()
                    except OSError:
                        break
            if any(event.get("reason") == "limit.connections" for event in guard.events("connection")):
                break
        told = guard.next("connection", reason="limit.connections")
        assert "connections_per_identity = 1, the share of one of 2 workers" in told["detail"]
        assert told["worker"] in (0, 1)


def test_keys_are_for_scripts_too(call: Caller) -> None:
    """`guard --keys --json` is a list of what stands in the text."""
    keys = call("guard", "--keys", "--json")
    listed = json.loads(keys.out)
    assert {"key", "text", "takes", "default"} == set(listed[0])
    assert any(one["key"] == "listener.cert" for one in listed)
    assert "listener.cert\n" in call("guard", "--keys").out


def test_a_list_shows_when_it_is_due(tmp_path: Path) -> None:
    """The metrics tell until when a revocation list holds, before it refuses everybody."""
    files, admin = Files(tmp_path), free_port()
    config = f'[admin]\nlisten = "127.0.0.1:{admin}"\n' + LISTENER.format(to="127.0.0.1:9")
    name = "handfast_revocation_list_next_update_timestamp_seconds"
    with guarding(tmp_path, config + _fresh_list(files)):
        assert metric(admin, f'{name}{{list="public, CN=Test Root"}}') > time.time()
    with guarding(tmp_path, config):
        assert metric(admin, name) == 0


def test_what_time_makes_doubtful_is_noted(tmp_path: Path) -> None:
    """When a certificate comes near its end, and when a revocation list falls due, the log says so, once."""
    files, now = Files(tmp_path), datetime.now(UTC)
    life = timedelta(seconds=104)  # of which the last tenth begins in some 4 s
    files.ca.server(
        "localhost", not_before=now - timedelta(seconds=90), not_after=now - timedelta(seconds=90) + life
    ).save(tmp_path, "server")
    crl(tmp_path / "list.crl", files.ca, until=timedelta(seconds=3))
    config = LISTENER.format(to="127.0.0.1:9") + 'crl = ["list.crl"]'
    with guarding(tmp_path, config) as guard:
        told = [line for line in guard.ready["warnings"] if "nothing answers" not in line]  # none, unless it is slow
        while len(told) < 2:
            told.append(guard.next("note")["detail"])
    assert "was due for renewal" in told[0]
    assert "put a new one in its place" in told[1]
