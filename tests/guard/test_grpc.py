"""gRPC through the guard, with a real client and a real server; and apps that speak HTTP/2 in ways no good one does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from h2 import events
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from hyperframe.frame import GoAwayFrame

from handfast.guard.connection import Limits
from handfast.guard.http2_frames import STREAM_WINDOW
from handfast.policy import parse_policy
from tests.support.apps import client_context
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.http2 import Client, Http2App

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # other tests of this process start programs

LARGE = [("grpc.max_receive_message_length", 64 << 20)]


@dataclass
class Service:
    """A gRPC server in the clear, with one method of each kind, and what it saw."""

    options: list[tuple[str, Any]] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    hanging: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __enter__(self) -> Service:
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool, options=LARGE + self.options)
        kinds = {
            "Unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "Down": grpc.unary_stream_rpc_method_handler(self._down),
            "Up": grpc.stream_unary_rpc_method_handler(self._up),
            "Both": grpc.stream_stream_rpc_method_handler(self._both),
            "Fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "Hang": grpc.unary_unary_rpc_method_handler(self._hang),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", kinds),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait(5)
        self._pool.shutdown()

    @property
    def address(self) -> str:
        return f"h2c://127.0.0.1:{self.port}"

    def _unary(self, request: bytes, context: Any) -> bytes:
        self.seen.append(dict(context.invocation_metadata()))
        context.set_trailing_metadata((("x-trailer", "yes"),))
        return request[::-1]

    def _down(self, request: bytes, _context: Any) -> Iterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number * 1000

    def _up(self, requests: Iterator[bytes], _context: Any) -> bytes:
        return b"%d" % sum(map(len, requests))

    def _both(self, requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        for request in requests:
            yield request[::-1]

    def _fail(self, _request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now")
        return b""

    def _hang(self, _request: bytes, context: Any) -> bytes:
        if not context.add_callback(self.cancelled.set):
            self.cancelled.set()  # it was over before it was here
        self.hanging.release()
        self.cancelled.wait(60)
        return b""


Open = Callable[..., Any]


@pytest.fixture
def channel(ca: Ca, tmp_path: Path) -> Iterator[Open]:
    """Open a gRPC channel to a guard."""
    opened: list[Any] = []
    bundle = ca.save(tmp_path, "ca").read_bytes()

    def channel(guard: Running, leaf: Leaf | None = None) -> Any:
        cert, key = (leaf or ca.client()).save(tmp_path, f"grpc{len(opened)}")
        credentials = grpc.ssl_channel_credentials(bundle, key.read_bytes(), cert.read_bytes())
        # A channel of its own, and not one that another with like options shares.
        options = [*LARGE, ("grpc.use_local_subchannel_pool", 1)]
        made = grpc.secure_channel(f"localhost:{guard.address.rpartition(':')[2]}", credentials, options)
        opened.append(made)
        return made

    yield channel
    for one in opened:
        one.close()


def test_all_four_kinds_of_calls(ca: Ca, channel: Open) -> None:
    """Unary, and streams either way and both: messages, trailers and status arrive."""
    with Service() as service, Running(ca, service.address) as guard:
        calls = channel(guard)
        answer, call = calls.unary_unary("/t.T/Unary").with_call(b"abc", timeout=30)
        assert (answer, call.code()) == (b"cba", grpc.StatusCode.OK)
        assert ("x-trailer", "yes") in [tuple(one) for one in call.trailing_metadata()]
        assert len(list(calls.unary_stream("/t.T/Down")(b"50", timeout=30))) == 50
        assert calls.stream_unary("/t.T/Up")(iter([b"x" * 50_000] * 40), timeout=60) == b"2000000"
        with pytest.raises(grpc.RpcError) as failed:
            calls.unary_unary("/t.T/Fail")(b"", timeout=30)
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "not now")
        event = guard.events.next("request")
        assert (event["status"], event["method"], event["path"]) == (200, "POST", "/t.T/Unary")


def test_a_conversation_goes_back_and_forth(ca: Ca, channel: Open) -> None:
    """In a stream both ways each message is answered before the next is sent: nothing waits for an end."""
    with Service() as service, Running(ca, service.address) as guard:
        said: list[bytes] = []
        heard = threading.Semaphore(1)

        def ask() -> Iterator[bytes]:
            for number in range(20):
                assert heard.acquire(timeout=30)
                yield b"a%d" % number

        for answer in channel(guard).stream_stream("/t.T/Both")(ask(), timeout=30):
            said.append(answer)
            heard.release()
        assert said == [(b"a%d" % number)[::-1] for number in range(20)]


def test_large_messages_go_both_ways(ca: Ca, channel: Open) -> None:
    """Twelve MiB there and back, through windows far smaller."""
    message = os.urandom(12 << 20)
    with Service() as service, Running(ca, service.address) as guard:
        assert channel(guard).unary_unary("/t.T/Unary")(message, timeout=60) == message[::-1]


def test_the_app_knows_who_calls(ca: Ca, channel: Open) -> None:
    """Metadata that says who the caller is, is ours; two callers at once are never taken for each other."""
    with Service() as service, Running(ca, service.address) as guard:
        names = ["spiffe://test/one", "spiffe://test/two"]
        asks = [channel(guard, ca.client(name)).unary_unary("/t.T/Unary") for name in names]
        spoofed = [("client-identity", "admin"), ("client_identity", "admin"), ("x-forwarded-client-cert", "x")]
        pending = []
        for number in range(100):
            for ask, name in zip(asks, names, strict=True):
                more = [*spoofed, ("x-name", name), ("x-number", str(number))]
                pending.append(ask.future(b"abc", metadata=more, timeout=60))
        assert all(one.result() == b"cba" for one in pending)
        assert len(service.seen) == 200
        for seen in service.seen:
            assert seen["client-identity"] == f'"{seen["x-name"]}"'
            assert not {"client_identity", "x-forwarded-client-cert"} & set(seen)


def test_deadlines_and_cancellations_reach_the_server(ca: Ca, channel: Open) -> None:
    """A call that its client gave up is given up by the server too; the channel serves on."""
    with Service() as service, Running(ca, service.address) as guard:
        calls = channel(guard)
        assert calls.unary_unary("/t.T/Unary")(b"abc", timeout=60) == b"cba"  # the channel is open from here on
        for seconds in (0.3, 1, 3, 9):  # on a slow machine the call may be over before it is there
            with pytest.raises(grpc.RpcError) as late:
                calls.unary_unary("/t.T/Hang")(b"", timeout=seconds)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if service.hanging.acquire(timeout=1):
                break
        else:
            raise AssertionError("the call never came")
        assert service.cancelled.wait(30)
        while service.hanging.acquire(timeout=0.1):  # those that came late
            pass
        service.cancelled.clear()
        call = calls.unary_unary("/t.T/Hang").future(b"")
        assert service.hanging.acquire(timeout=30)
        call.cancel()
        assert service.cancelled.wait(30)
        assert calls.unary_unary("/t.T/Unary")(b"abc", timeout=60) == b"cba"


def test_refusals_have_their_status_in_grpc(ca: Ca, channel: Open) -> None:
    """What the policy denies is PERMISSION_DENIED; an app that is gone UNAVAILABLE."""
    policy = parse_policy(["allow any /t.T/Unary"])
    with Service() as service, Running(ca, service.address, policy) as guard:
        calls = channel(guard)
        assert calls.unary_unary("/t.T/Unary")(b"abc", timeout=60) == b"cba"
        with pytest.raises(grpc.RpcError) as denied:
            calls.unary_unary("/t.T/Fail")(b"", timeout=30)
        assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with Running(ca, "h2c://127.0.0.1:1") as guard, pytest.raises(grpc.RpcError) as gone:
        channel(guard).unary_unary("/t.T/Unary")(b"", timeout=30)
    assert gone.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_stranger_gets_nowhere(ca: Ca, channel: Open) -> None:
    """A client of another authority makes no call: it is told, and the server hears nothing."""
    with Service() as service, Running(ca, service.address) as guard:
        with pytest.raises(grpc.RpcError) as refused:
            channel(guard, Ca.root("Other").client()).unary_unary("/t.T/Unary")(b"", timeout=30)
        assert refused.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        assert not service.seen


def test_a_server_that_renews_its_connections_loses_no_call(ca: Ca, channel: Open) -> None:
    """With GOAWAY after every 300 ms, calls go on without an error: old ones finish, new ones get a new connection."""
    options = [("grpc.max_connection_age_ms", 300), ("grpc.max_connection_age_grace_ms", 5000)]
    with Service(options) as service, Running(ca, service.address) as guard:
        ask = channel(guard).unary_unary("/t.T/Unary")
        enough, end, count, codes = time.monotonic() + 2, time.monotonic() + 60, 0, set()
        while time.monotonic() < enough or count <= 20:
            assert time.monotonic() < end, f"{count} calls in a minute"
            try:
                assert ask(b"abc", timeout=60) == b"cba"
            except grpc.RpcError as error:  # begun as the GOAWAY was on its way: said to be safe to ask again
                codes.add(error.code())
            count += 1
        assert codes <= {grpc.StatusCode.UNAVAILABLE}


# Apps that speak HTTP/2 frame by frame.


@pytest.fixture
def enter(ca: Ca, tmp_path: Path) -> Callable[[Running], Client]:
    """Connect to a guard as a client that speaks HTTP/2 frame by frame."""
    bundle = ca.save(tmp_path, "ca")
    return lambda guard: Client(guard.address, client_context(bundle, ca.client(), tmp_path))


Enter = Callable[[Running], Client]
OK = [(":status", "200"), ("content-type", "application/grpc")]


def _path(event: events.RequestReceived) -> str:
    return str({str(name): str(value) for name, value in event.headers}[":path"])


def test_the_request_arrives_as_it_was_sent(ca: Ca, enter: Enter) -> None:
    """:authority, path, te and trailers are kept; trailers that say who calls are not; 1xx come back."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.StreamEnded):
            app.send_headers(event.stream_id, [(":status", "103"), ("link", "</a>")])
            app.send_headers(event.stream_id, OK)
            app.send_headers(event.stream_id, [("grpc-status", "0"), ("x", "y")], end_stream=True)

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        stream = client.send(client.head("/a?b=c", ("te", "trailers"), ("client_cert", "x"), method="POST"), None)
        client.body(stream, b"abc")
        client.h2.send_headers(stream, [("x-sum", "1"), ("client-identity", "admin")], end_stream=True)
        client.flush()
        answer = client.wait(stream)
        assert answer.trailers == {"grpc-status": "0", "x": "y"}
        assert [one[":status"] for one in answer.informational] == ["103"]
        (head,) = app.headers()
        assert (head[":authority"], head[":path"], head["te"]) == (client.authority, "/a?b=c", "trailers")
        assert head["client-identity"] == '"spiffe://test/web"'
        assert "client_cert" not in head
        (trailers,) = [event for event in app.seen if isinstance(event, events.TrailersReceived)]
        assert [tuple(map(str, one)) for one in trailers.headers] == [("x-sum", "1")]
        assert app.connections == 1


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        (ErrorCodes.CANCEL, ErrorCodes.CANCEL),
        (ErrorCodes.REFUSED_STREAM, ErrorCodes.REFUSED_STREAM),
        (ErrorCodes.PROTOCOL_ERROR, ErrorCodes.INTERNAL_ERROR),
    ],
)
def test_resets_of_the_app_reach_the_client(ca: Ca, enter: Enter, code: ErrorCodes, seen: ErrorCodes) -> None:
    """A reset means to the client what it meant to us; faults between us and the app are internal; others go on."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            if _path(event) == "/reset":
                app.send_headers(event.stream_id, OK)
                app.send_data(event.stream_id, b"half")
                app.reset_stream(event.stream_id, code)
            else:
                app.send_headers(event.stream_id, OK, end_stream=True)

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        answer = client.get("/reset")
        assert (answer.ended, answer.reset) == (False, seen)
        assert code.name in guard.events.next("request")["detail"]
        assert client.get("/good").ended


def test_resets_of_the_client_reach_the_app(ca: Ca, enter: Enter) -> None:
    """A stream that its client resets is reset at the app; the connection to it serves on."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived) and _path(event) == "/good":
            app.send_headers(event.stream_id, OK, end_stream=True)

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        stream = client.send(client.head("/hang", method="POST"), None)
        app.until(events.RequestReceived)
        client.h2.reset_stream(stream, ErrorCodes.CANCEL)
        client.flush()
        app.until(events.StreamReset)
        assert client.get("/good").ended
        assert app.connections == 1
        assert guard.events.next("request")["outcome"] == "client gone"


def test_goaway_of_the_app(ca: Ca, enter: Enter) -> None:
    """What it took finishes; what it did not take may be asked again; the next request gets a new connection."""

    def on(app: H2Connection, event: events.Event) -> None:
        if not isinstance(event, events.RequestReceived):
            return
        if _path(event) == "/first":
            app.send_headers(event.stream_id, OK)
        elif _path(event) == "/second":
            app._data_to_send += GoAwayFrame(0, last_stream_id=event.stream_id - 2).serialize()
            app.send_data(event.stream_id - 2, b"whole", end_stream=True)
        else:
            app.send_headers(event.stream_id, OK, end_stream=True)

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        first = client.send(client.head("/first"))
        client.wait(first, lambda answer: answer.status == 200)
        second = client.send(client.head("/second"))
        assert client.wait(second).reset == ErrorCodes.REFUSED_STREAM
        assert client.wait(first).body == b"whole"
        assert client.answers[first].ended
        assert client.get("/third").ended
        assert app.connections == 2


def test_an_app_that_takes_few_streams(ca: Ca, enter: Enter) -> None:
    """Requests beyond what the app takes at a time wait for their turn."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            assert app.open_inbound_streams <= 2
            app.send_headers(event.stream_id, OK, end_stream=True)

    with Http2App(on, max_concurrent_streams=2) as app, Running(ca, app.address) as guard, enter(guard) as client:
        assert client.get().ended
        streams = [client.send(client.head(f"/{number}")) for number in range(30)]
        assert all(client.wait(stream).ended for stream in streams)
        assert app.connections == 1


BAD: dict[str, list[tuple[str, str]]] = {
    "connection": [*OK, ("connection", "close")],
    "line": [*OK, ("a", "b\r\nc: d")],
    "upper_case": [*OK, ("A", "b")],
    "switching": [(":status", "101")],
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_answers_are_502(ca: Ca, enter: Enter, case: str) -> None:
    """A header list that HTTP/2 forbids is the app's fault, and does not reach the client."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            app.send_headers(
                event.stream_id, BAD[case] if _path(event) == "/bad" else OK, end_stream=case != "switching"
            )

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        answer = client.get("/bad")
        assert answer.status == 502
        assert "a" not in answer.headers
        assert guard.events.next("request")["reason"] == "upstream.bad_response"
        if case != "switching":
            assert client.get("/good").ended


def test_an_app_that_breaks_off(ca: Ca, enter: Enter) -> None:
    """Nonsense from the app ends its connection: what was begun is reset, what was not answered is 502."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            if _path(event) == "/begun":
                app.send_headers(event.stream_id, OK)
            else:
                app._data_to_send += b"\xff" * 9

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        begun = client.send(client.head("/begun"))
        client.wait(begun, lambda answer: answer.status == 200)
        assert client.get("/nonsense").status == 502
        assert client.wait(begun).reset == ErrorCodes.INTERNAL_ERROR
        assert app.connections == 1


def test_flow_control_goes_from_end_to_end(ca: Ca, enter: Enter) -> None:
    """An app whose client takes nothing is given no more window than the guard holds; then all of it comes."""
    size, state = 8 << 20, {"sent": 0, "stream": 0}

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            if _path(event) == "/small":
                app.send_headers(event.stream_id, OK, end_stream=True)
                return
            state["stream"] = event.stream_id
            app.send_headers(event.stream_id, OK)
        while state["sent"] < size and state["stream"]:
            room = min(app.local_flow_control_window(state["stream"]), 16_384, size - state["sent"])
            if room <= 0:
                return
            state["sent"] += room
            app.send_data(state["stream"], b"x" * room, end_stream=state["sent"] == size)

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.greedy = False
        client.h2.increment_flow_control_window(1 << 20)
        stream = client.send(client.head())
        client.wait(stream, lambda answer: len(answer.body) == 65_535)
        assert client.get("/small").ended
        assert state["sent"] <= 65_535 + (1 << 19)
        client.greedy = True
        client.h2.increment_flow_control_window(1 << 20, stream)
        client.flush()
        assert len(client.wait(stream).body) == size


def test_answers_that_are_left_unread_hold_up_no_other(ca: Ca, enter: Enter) -> None:
    """50 answers of which the client takes nothing: the app may send a little of each, and other calls go on."""
    large = bytes(1 << 20)
    left: dict[int, memoryview] = {}

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            app.send_headers(event.stream_id, OK)
            left[event.stream_id] = memoryview(large if _path(event) == "/large" else b"here")
        for stream, body in list(left.items()):
            while body and (room := min(app.local_flow_control_window(stream), 16_384, len(body))) > 0:
                app.send_data(stream, bytes(body[:room]), end_stream=room == len(body))
                left[stream] = body = body[room:]

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        client.greedy = False
        client.h2.increment_flow_control_window(1 << 30)
        streams = [client.send(client.head("/large")) for _ in range(50)]
        for stream in streams:
            client.wait(stream, lambda answer: len(answer.body) == 65_535)
        assert [client.get("/small").body for _ in range(3)] == [b"here"] * 3
        assert sum(len(large) - len(body) for body in left.values() if body) <= 50 * (STREAM_WINDOW + 2 * 65_535)
        for stream in streams:
            client.h2.increment_flow_control_window(1 << 30, stream)
        client.flush()
        assert [len(client.wait(stream).body) for stream in streams] == [len(large)] * 50


def test_uploads_that_an_app_leaves_hold_up_no_other(ca: Ca, enter: Enter) -> None:
    """50 requests of whose bodies the app takes nothing: the client may send a little of each, and others whole."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RemoteSettingsChanged):
            app.increment_flow_control_window(1 << 30)
        elif isinstance(event, events.RequestReceived) and _path(event) == "/small":
            app.send_headers(event.stream_id, OK)
        elif isinstance(event, events.StreamEnded):
            app.send_data(event.stream_id, b"all", end_stream=True)

    with Http2App(on) as app, Running(ca, app.address) as guard, enter(guard) as client:
        size = 65_535 + STREAM_WINDOW // 2  # what the app takes, and what waits for it
        streams = [client.send(client.head("/large", method="POST"), None) for _ in range(50)]
        for stream in streams:
            client.body(stream, bytes(size))
        client.until(lambda: client.h2.outbound_flow_control_window >= STREAM_WINDOW)
        assert [client.get("/small", method="POST", body=b"x").body for _ in range(3)] == [b"all"] * 3
        assert not any(client.answers[stream].over for stream in streams)


def test_a_quiet_grpc_stream_may_rest_and_another_may_not(ca: Ca, enter: Enter) -> None:
    """Between its messages a gRPC stream may be silent; an answer of another kind has the idle limit."""

    def on(app: H2Connection, event: events.Event) -> None:
        if isinstance(event, events.RequestReceived):
            app.send_headers(event.stream_id, OK if _path(event) == "/grpc" else OK[:1])

    limits = Limits(idle=2)
    with Http2App(on) as app, Running(ca, app.address, limits=limits) as guard, enter(guard) as client:
        quiet = client.send(client.head("/grpc"))
        other = client.send(client.head("/other"))
        assert client.wait(other).reset == ErrorCodes.CANCEL
        assert guard.events.next("request")["reason"] == "ended.idle"
        assert not client.answers[quiet].over


def test_a_websocket_towards_an_http_2_app_is_refused(ca: Ca, enter: Enter) -> None:
    """There is no Upgrade in HTTP/2, and the app was not asked whether it takes an extended CONNECT."""
    with Http2App(lambda *_: None) as app, Running(ca, app.address) as guard, enter(guard) as client:
        fields = client.head(method="CONNECT")
        fields.insert(1, (":protocol", "websocket"))
        assert client.wait(client.send(fields, None)).status == 405
        assert app.connections == 0
