"""What is refused shows in the metrics as in the log, whichever HTTP brought it and however early it was."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path

import pytest

from handfast.guard.connection import Limits
from handfast.guard.limits import Gate, Rate, Rates
from handfast.policy import parse_policy
from tests.support.apps import App, client_context, get, talk
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.http2 import Client

BELIEVED = (ip_network("127.0.0.0/8"),)
SAYS = b"PROXY TCP4 192.0.2.7 192.0.2.8 4321 443\r\n"


def _counts(guard: Running, family: str) -> dict[tuple[str, ...], float]:
    """One family of counters, by its labels without the listener."""
    series = guard.call(guard.guard.metrics.state)["counters"][family]
    return {tuple(label for label in labels if label != "main"): count for labels, count in series}


Ask = Callable[[Running, str], None]


@pytest.fixture(params=["http/1.1", "h2"])
def ask(request: pytest.FixtureRequest, ca: Ca, tmp_path: Path) -> Ask:
    """Ask a guard for a path over each HTTP."""
    bundle, leaf = ca.save(tmp_path, "ca"), ca.client()

    def ask(guard: Running, path: str) -> None:
        context = client_context(bundle, leaf, tmp_path)
        if request.param == "h2":
            with Client(guard.address, context) as client:
                client.get(path)
        else:
            talk(guard.address, context, get(path))

    return ask


def test_a_refused_request_is_counted_once(ca: Ca, ask: Ask) -> None:
    """A request that the policy denies is counted as denied, and one that it allows as allowed alone."""
    with App() as app, Running(ca, app.address, parse_policy(["any /yes"])) as guard:
        ask(guard, "/yes")
        assert _counts(guard, "requests") == {("allow", "policy.rule_matched", "2xx"): 1}
        ask(guard, "/no")
        allowed, denied = ("allow", "policy.rule_matched", "2xx"), ("deny", "policy.no_rule", "4xx")
        assert _counts(guard, "requests") == {allowed: 1, denied: 1}
        assert _counts(guard, "limited") == {}


def test_a_request_that_its_app_does_not_answer_is_counted_as_allowed(ca: Ca, ask: Ask) -> None:
    """An app that is down makes 502 of a request that was allowed; it is counted once, with that reason."""
    with Running(ca, "127.0.0.1:1") as guard:
        ask(guard, "/")
        assert _counts(guard, "requests") == {("allow", "upstream.down", "5xx"): 1}


def test_a_request_over_the_limit_is_counted_as_limited(ca: Ca, ask: Ask) -> None:
    """The second request of a client that may make one is counted as limited, and the first is not."""
    gate = Gate("main", Rates(requests_per_second=Rate(0.001, 1)))
    with App() as app, Running(ca, app.address, gate=gate) as guard:
        ask(guard, "/")
        assert _counts(guard, "limited") == {}
        ask(guard, "/")
        assert _counts(guard, "limited") == {("limit.requests",): 1}
        assert _counts(guard, "requests")["deny", "limit.requests", "4xx"] == 1


@pytest.mark.parametrize(
    ("sent", "reason"), [(b"PROXY NONSENSE\r\n", "proxy.malformed"), (SAYS[:9], "tls.timeout"), (b"", "tls.timeout")]
)
def test_a_bad_announcement_is_counted_as_a_refused_handshake(ca: Ca, tmp_path: Path, sent: bytes, reason: str) -> None:
    """Behind a proxy that is believed, no header or a bad one counts as denied; a good one as what follows it."""
    limits = Limits(handshake=1 if reason == "tls.timeout" else 10)
    with App() as app, Running(ca, app.address, proxy_from=BELIEVED, limits=limits) as guard:
        host, _, port = guard.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            plain.sendall(sent)
            with suppress(ConnectionResetError):
                assert plain.recv(1) == b""
        assert guard.events.next("connection")["reason"] == reason
        assert _counts(guard, "handshakes") == {("deny", reason): 1}
        guard.guard.metrics = type(guard.guard.metrics)()
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            plain.sendall(SAYS)
            context = client_context(ca.save(tmp_path, "ca"), ca.client(), tmp_path)
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                tls.sendall(get())
                assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        assert _counts(guard, "handshakes") == {("accept", ""): 1}
