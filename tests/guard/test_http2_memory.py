"""What the guard remembers of HTTP/2 requests and answers: each comes out as if it were read for the first time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from h2 import events
from h2.connection import H2Connection

from handfast.policy import parse_policy
from tests.support.apps import client_context
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.http2 import Client, Http2App

Enter = Callable[..., Client]
Fields = list[tuple[str, str]]
OK = [(":status", "200"), ("content-type", "application/grpc")]
STATUS = [("grpc-status", "0")]


@pytest.fixture
def enter(ca: Ca, tmp_path: Path) -> Enter:
    """Connect to a guard as a client that speaks HTTP/2 frame by frame."""
    bundle = ca.save(tmp_path, "ca")

    def enter(guard: Running, leaf: Leaf | None = None) -> Client:
        return Client(guard.address, client_context(bundle, leaf or ca.client(), tmp_path))

    return enter


def _answering(answers: dict[str, tuple[Fields, Fields]]) -> Callable[[H2Connection, events.Event], None]:
    """An app that answers each path with its header list, a body, and its trailers."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            path = {str(name): str(value) for name, value in event.headers}[":path"]
            head, trailers = answers[path]
            app.send_headers(event.stream_id, head)
            app.send_data(event.stream_id, path.encode())
            app.send_headers(event.stream_id, trailers, end_stream=True)

    return on


def test_answers_come_as_the_app_said_them(ca: Ca, enter: Enter) -> None:
    """Answers that come again, others between them, and more kinds than are remembered: each is the app's own."""
    answers = {f"/{at}": ([*OK, ("x-at", f"{at}")], [*STATUS, ("x-end", f"{at}")]) for at in range(20)}
    answers["/none"] = [(":status", "404")], [("grpc-status", "5")]
    order = ["/0"] * 4 + ["/1", "/0", "/none"] * 4 + list(answers) * 2 + ["/0"] * 4
    with Http2App(_answering(answers)) as app, Running(ca, app.address) as guard, enter(guard) as client:
        for path in order:
            answer = client.get(path)
            head, trailers = answers[path]
            assert answer.headers == dict(head)
            assert answer.trailers == dict(trailers)
            assert answer.body == path.encode()
        assert app.connections == 1


BAD_HEADS: dict[str, Fields] = {
    "upper_case": [*OK, ("X-Up", "a")],
    "connection": [*OK, ("connection", "close")],
    "line": [*OK, ("a", "b\r\nc: d")],
    "status": [(":status", "099")],
    "twice": [*OK, (":status", "200")],
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_a_malformed_answer_is_one_each_time(ca: Ca, enter: Enter, case: str) -> None:
    """It is 502 the first time and the third, and good answers before, between and after are good."""
    answers = {"/good": (OK, STATUS), "/bad": (BAD_HEADS[case], STATUS), "/end": (OK, [("A", "b")])}
    with Http2App(_answering(answers)) as app, Running(ca, app.address) as guard, enter(guard) as client:
        for _ in range(3):
            for path, status in (("/good", 200), ("/bad", 502), ("/good", 200)):
                assert client.get(path).status == status
            cut = client.get("/end")
            assert cut.trailers is None
            assert cut.reset is not None


BAD_REQUESTS: dict[str, Fields] = {
    "upper_case": [("X-Up", "a")],
    "connection": [("connection", "client-cert")],
    "line": [("a", "b\r\nclient-cert: x")],
    "te": [("te", "gzip")],
    "late": [(":path", "/b")],
    "host": [("host", "other.test")],
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_malformed_request_is_one_each_time(ca: Ca, enter: Enter, case: str) -> None:
    """One that comes again after good ones is refused again, and never reaches the app."""
    with (
        Http2App(_answering({"/good": (OK, STATUS)})) as app,
        Running(ca, app.address) as guard,
        enter(guard) as client,
    ):
        for _ in range(3):
            assert client.get("/good").status == 200
            assert client.get("/bad", *BAD_REQUESTS[case]).status == 400
        assert [head[":path"] for head in app.headers()] == ["/good"] * 3


def test_clients_that_send_the_same_bytes_are_told_apart(ca: Ca, enter: Enter) -> None:
    """Two clients whose requests are alike byte for byte, again and again: the app hears of each one's own identity."""
    leaves = [ca.client(f"spiffe://test/{name}") for name in ("one", "two")]
    with Http2App(_answering({"/": (OK, STATUS)})) as app, Running(ca, app.address) as guard:
        clients = [enter(guard, leaf) for leaf in leaves]
        for _ in range(4):
            for client in clients:
                assert client.get("/", ("client-identity", "admin")).status == 200
        for client in clients:
            client.tls.close()
        assert [head["client-identity"] for head in app.headers()] == [
            '"spiffe://test/one"',
            '"spiffe://test/two"',
        ] * 4


def test_a_remembered_request_is_judged_each_time(ca: Ca, enter: Enter) -> None:
    """A policy that changes refuses what was let through many times, and lets it through again."""
    with Http2App(_answering({"/": (OK, STATUS)})) as app, Running(ca, app.address) as guard, enter(guard) as client:
        for rule, status in (("allow any /", 200), ("allow any /other", 403), ("allow any /", 200)):
            guard.swap(guard.snapshot(parse_policy([rule])))
            assert [client.get("/").status for _ in range(3)] == [status] * 3
        assert len(app.headers()) == 6
