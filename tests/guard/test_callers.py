"""What the guard remembers of a client serves that client's connections alone, and only while it holds."""

from __future__ import annotations

import re
import socket
import ssl
from ipaddress import ip_network
from pathlib import Path

from handfast.guard.door import Caller
from handfast.guard.limits import Gate, Rate, Rates
from handfast.policy import parse_policy
from tests.support.apps import App, client_context, echo_head, get
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running

LOCAL = (ip_network("127.0.0.0/8"),)


def _ask(guard: Running, leaf: Leaf, folder: Path, name: str = "localhost", *, preamble: bytes = b"") -> bytes:
    """The answer to the same request as ever, on a connection of its own that is left open until it came."""
    context = client_context(guard.ca.save(folder, "ca"), leaf, folder)
    host, _, port = guard.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as plain:
        plain.sendall(preamble)
        with context.wrap_socket(plain, server_hostname=name) as tls:
            tls.sendall(get("/a", close=False))
            return _whole(tls)


def _whole(tls: ssl.SSLSocket) -> bytes:
    answer = b""
    while b"\r\n\r\n" not in answer or len(answer.partition(b"\r\n\r\n")[2]) < int(
        re.search(rb"(?i)content-length: ([0-9]+)", answer)[1]  # type: ignore[index]  # each answer has one
    ):
        piece = tls.recv(1 << 16)
        assert piece, answer
        answer += piece
    return answer


def _callers(guard: Running) -> list[Caller]:
    site = guard.guard.snapshot.sites["main"].only
    assert site is not None
    return list(site.callers.values())


def test_the_same_request_of_two_clients_carries_each_ones_name(ca: Ca, tmp_path: Path) -> None:
    """Two clients ask for the same, byte for byte, in turn; the app hears each time who it was."""
    leaves = {name: ca.client(f"spiffe://test/{name}") for name in ("alice", "bob")}
    with App(echo_head) as app, Running(ca, app.address) as guard:
        for _ in range(3):
            for name, leaf in leaves.items():
                answer = _ask(guard, leaf, tmp_path)
                assert re.findall(rb"spiffe://test/[a-z]+", answer) == [f"spiffe://test/{name}".encode()]
        assert len(guard.call(_callers, guard)) == 2, "each is known once, on three connections"


def test_one_client_from_two_addresses_is_two_callers(ca: Ca, tmp_path: Path) -> None:
    """The address that the app is told is the connection's own, whatever another of the same client's was."""
    leaf = ca.client()
    with App(echo_head) as app, Running(ca, app.address, proxy_from=LOCAL) as guard:
        for _ in range(2):
            for address in (b"192.0.2.1", b"192.0.2.2"):
                answer = _ask(guard, leaf, tmp_path, preamble=b"PROXY TCP4 %b 192.0.2.9 5 443\r\n" % address)
                assert re.findall(rb"X-Forwarded-For: ([0-9.]+)", answer) == [address]


def test_what_one_server_name_was_answered_another_is_not(ca: Ca, tmp_path: Path) -> None:
    """A request that was let through under one server name is judged anew under another, and is misdirected."""
    leaf, server = ca.client(), ca.server("localhost", "other.test")
    with App(echo_head) as app, Running(ca, app.address, server=server) as guard:
        assert b" 200 " in _ask(guard, leaf, tmp_path)
        assert b" 421 " in _ask(guard, leaf, tmp_path, "other.test")
        assert b" 200 " in _ask(guard, leaf, tmp_path)


def test_a_new_snapshot_knows_nobody(ca: Ca, tmp_path: Path) -> None:
    """What the rules before allowed is judged by the rules now in force, on open connections and on new ones."""
    leaf = ca.client()
    with App(echo_head) as app, Running(ca, app.address) as guard:
        assert b" 200 " in _ask(guard, leaf, tmp_path)
        guard.swap(guard.snapshot(parse_policy(["any POST /**"])))
        assert b" 403 " in _ask(guard, leaf, tmp_path)
        assert app.received.count(b"GET /a") == 1


def test_a_known_request_is_counted_by_the_limit_as_any_other(ca: Ca, tmp_path: Path) -> None:
    """That a request is known makes it cheap, not free: beyond the client's rate it is refused."""
    leaf = ca.client()
    gate = Gate("main", Rates(requests_per_second_per_identity=Rate(0.001, 3)))
    with App(echo_head) as app, Running(ca, app.address, gate=gate) as guard:
        answers = [_ask(guard, leaf, tmp_path) for _ in range(5)]
        assert [answer[9:12] for answer in answers] == [b"200"] * 3 + [b"429"] * 2
