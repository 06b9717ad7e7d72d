"""The admin listener: what it shows, to whom, and that nothing which goes wrong in it reaches the guard."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from handfast.guard.admin import (
    DEADLINE,
    MAX_CLIENTS,
    MAX_REQUEST,
    Admin,
    AdminFacts,
    Drain,
    Reports,
    Status,
    send_state,
    status_of,
    unready_for,
)
from handfast.guard.metrics import MAX_SERIES, SILENT, Metrics, State, merge
from tests.support.programs import curl, run
from tests.support.waiting import PATIENCE, Stopwatch, until


@dataclass
class Watched:
    """An admin listener on a thread of its own, over metrics that the test sets as it likes."""

    metrics: Metrics = field(default_factory=Metrics)
    draining: Drain | None = None
    fault: Exception | None = None
    bugs: list[Exception] = field(default_factory=list)
    jwks: Callable[[], dict[str, Any]] | None = None
    path: Path | None = None
    host: str = "127.0.0.1"
    runner: Callable[..., None] = uvloop.run

    def __enter__(self) -> Watched:
        self.plug = socket.socket(socket.AF_UNIX if self.path else socket.AF_INET)
        self.plug.bind(str(self.path) if self.path else (self.host, 0))
        self.plug.listen(200)
        self.plug.setblocking(False)
        self.port = 0 if self.path else int(self.plug.getsockname()[1])
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: self.runner(self._main(started)))
        self._thread.start()
        started.result(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def state(self) -> State:
        if self.fault is not None:
            raise self.fault
        return self.metrics.state()

    def ready(self) -> list[str]:
        return unready_for(self.state(), time.time(), listening=True, draining=self.draining is not None)

    def status(self) -> Status:
        return status_of(self.state(), {"main": "127.0.0.1:8443"}, self.ready(), self.draining)

    def send(self, request: bytes) -> bytes:
        """All that comes back for these bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as client:
            client.sendall(request)
            return read_all(client)

    async def _main(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        admin = Admin(AdminFacts(self.state, self.ready, self.status, self.jwks, self.bugs.append))
        await admin.serve(self.plug)
        started.set_result(None)
        await self._stop.wait()
        admin.close()
        await asyncio.sleep(0.05)


def read_all(client: socket.socket) -> bytes:
    got = b""
    while piece := client.recv(1 << 16):
        got += piece
    return got


def in_force(metrics: Metrics) -> Metrics:
    """Metrics of a guard that has all it needs."""
    metrics.set_snapshot(1, time.time(), {"main": time.time() + 3600})
    return metrics


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    with Watched(in_force(Metrics()), runner=request.param) as running:
        yield running


def test_curl_reads_every_page(watched: Watched, tmp_path: Path) -> None:
    """Metrics, health, readiness and status answer 200 to curl, each in its own form."""
    watched.metrics.handshake("deny", "verify.expired", 0.01, "main")
    metrics = curl(f"{watched.url}/metrics", folder=tmp_path)
    assert metrics.status == 200
    (counted,) = [one for one in text_string_to_metric_families(metrics.body) if one.name == "handfast_handshakes"]
    assert counted.samples[0].labels["reason"] == "verify.expired"
    assert json.loads(curl(f"{watched.url}/healthz", folder=tmp_path).body) == {"alive": True}
    ready = curl(f"{watched.url}/readyz?verbose", folder=tmp_path)
    assert (ready.status, json.loads(ready.body)) == (200, {"ready": True, "reasons": []})
    status = json.loads(curl(f"{watched.url}/status", folder=tmp_path).body)
    assert status["listeners"] == {"main": "127.0.0.1:8443"}
    assert status["state"]["counters"]["handshakes"] == [[["main", "deny", "verify.expired"], 1]]
    assert curl(f"{watched.url}/.well-known/jwks.json", folder=tmp_path).status == 404
    assert curl(f"{watched.url}/", folder=tmp_path).status == 404


def test_types_and_the_end_of_the_connection(watched: Watched) -> None:
    """Prometheus' type is told, nothing is cached, and each connection ends with its answer, HEAD's without body."""
    whole = watched.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in whole
    assert b"Cache-Control: no-store\r\n" in whole
    assert b"Connection: close\r\n" in whole
    head = watched.send(b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Length: 15\r\n" in head
    assert head.endswith(b"\r\n\r\n")


def test_keys_are_published(tmp_path: Path) -> None:
    """Where assertions are signed, their keys are at the well-known place."""
    with Watched(in_force(Metrics()), jwks=lambda: {"keys": []}) as watched:
        answer = curl(f"{watched.url}/.well-known/jwks.json", folder=tmp_path)
        assert (answer.status, answer.body) == (200, '{"keys":[]}\n')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda metrics: metrics.log_broken(True), "the log cannot be written"),
        (lambda metrics: metrics.set_snapshot(1, 0.0, {"main": time.time() - 1}), "the certificate of main expired"),
        (lambda metrics: metrics.set_snapshot(0, 0.0, {}), "no snapshot is in force"),
    ],
    ids=["log", "certificate", "snapshot"],
)
def test_not_ready_says_why(change: Callable[[Metrics], None], reason: str, tmp_path: Path) -> None:
    """A guard that should get no traffic answers 503 with the reason, while it is alive."""
    with Watched(in_force(Metrics())) as watched:
        change(watched.metrics)
        answer = curl(f"{watched.url}/readyz", folder=tmp_path)
        assert (answer.status, json.loads(answer.body)) == (503, {"ready": False, "reasons": [reason]})
        assert curl(f"{watched.url}/healthz", folder=tmp_path).status == 200


def test_readiness_beyond_the_counts() -> None:
    """Not listening, draining, and workers that are not heard of are reasons too; a good guard has none."""
    state = in_force(Metrics()).state()
    now = time.time()
    assert unready_for(state, now, listening=True, draining=False) == []
    said = unready_for(state, now, listening=False, draining=True)
    assert said == ["it does not listen", "it is draining"]
    state["workers"][0]["silent"] = SILENT + 1
    assert unready_for(state, now, listening=True, draining=False) == ["no worker is heard of"]
    assert "no worker is heard of" in unready_for(merge([]), now, listening=True, draining=False)


def test_a_fault_is_a_500_and_no_more(watched: Watched, tmp_path: Path) -> None:
    """What goes wrong in what is shown is answered without its words, told to the guard, and over with the request."""
    watched.fault = RuntimeError("a secret")
    for page in ("metrics", "status", "readyz"):
        answer = curl(f"{watched.url}/{page}", folder=tmp_path)
        assert (answer.status, answer.body) == (500, '{"error":"bug"}\n')
    assert [str(bug) for bug in watched.bugs] == ["a secret"] * 3
    watched.fault = None
    assert curl(f"{watched.url}/metrics", folder=tmp_path).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9464", 200),
        ("127.0.0.1", 200),
        ("[::1]:9464", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("192.0.2.1", 421),
    ],
)
def test_a_page_that_rebinds_its_name_reads_nothing(watched: Watched, host: str, status: int) -> None:
    """On a loopback address only loopback names are answered, so no web page can read the guard's state."""
    answer = watched.send(f"GET /status HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert (b"listeners" in answer) is (status == 200)


def test_where_others_can_connect_any_name_is_answered() -> None:
    """A listener on all addresses is called by names that it cannot know."""
    with Watched(in_force(Metrics()), host="0.0.0.0") as watched:
        answer = watched.send(b"GET /status HTTP/1.1\r\nHost: guard-3.corp:9464\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx", b"405"),
        (b"DELETE /status HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405"),
        (b"GET /status HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /status HTTP/2.0\r\nHost: localhost\r\n\r\n", b"505"),
        (b"\x16\x03\x01\x00\x05hello\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * MAX_REQUEST + b"\r\n\r\n", b"431"),
        (b"GET /" + b"x" * (MAX_REQUEST + 1), b"431"),
    ],
    ids=["post", "delete", "no host", "version", "tls", "large", "endless"],
)
def test_other_requests_are_refused(watched: Watched, request_: bytes, status: bytes) -> None:
    """What is no small GET or HEAD gets the status that says why, and the next one is served."""
    assert watched.send(request_).split(b" ")[1] == status
    assert watched.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").split(b" ")[1] == b"200"


def test_clients_that_wait_are_few_and_ended() -> None:
    """Silent clients take at most their places, are cut off in seconds, and then others are served again."""
    with Watched(in_force(Metrics())) as watched, ExitStack() as silent:
        address = ("127.0.0.1", watched.port)
        clients = [silent.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(MAX_CLIENTS)]
        until(lambda: b"limit.connections" in watched.send(b""), "one too many")
        with Stopwatch() as watch:
            assert clients[0].recv(1) == b""
        assert watch.seconds < DEADLINE + 2
        asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        until(lambda: watched.send(asked).startswith(b"HTTP/1.1 200 "), "room again")


def test_a_unix_socket(tmp_path: Path) -> None:
    """The listener can be a UNIX socket, where any name is answered."""
    with Watched(in_force(Metrics()), path=tmp_path / "admin.sock"):
        done = run("curl", "-sS", "--unix-socket", tmp_path / "admin.sock", "http://guard/readyz", folder=tmp_path)
        assert json.loads(done.stdout)["ready"] is True


# Reports of workers.


@contextmanager
def pair() -> Iterator[tuple[socket.socket, Reports]]:
    """Where workers send, and what reads it."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with here, there:
        yield here, Reports(there)


def counted(number: int, worker: int = 0) -> Metrics:
    metrics = in_force(Metrics(worker))
    for _ in range(number):
        metrics.handshake("accept", "", 0.01, "main")
    return metrics


def handshakes(state: State) -> float:
    return sum(count for _, count in state["counters"]["handshakes"])


def test_workers_in_other_processes_report() -> None:
    """States that forked processes send are read, added up, and shown with the processes they came from."""
    with pair() as (here, reports):
        children = []
        for worker in range(3):
            if (child := os.fork()) == 0:
                os._exit(0 if send_state(here, worker, counted(worker + 1, worker).state()) else 1)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
        state = reports.state()
        assert handshakes(state) == 6
        assert [worker["pid"] for worker in state["workers"]] == children
        assert [worker["worker"] for worker in state["workers"]] == [0, 1, 2]
        assert all(worker["silent"] < SILENT for worker in state["workers"])


def test_a_dead_worker_keeps_its_counts() -> None:
    """A worker that is gone is not shown, what it counted stays, and one in its place counts on."""
    with pair() as (here, reports):
        assert send_state(here, 0, counted(5).state())
        reports.gone(0)
        assert reports.states() == {}
        assert handshakes(reports.state()) == 5
        assert send_state(here, 0, counted(2).state())
        assert handshakes(reports.state()) == 7


def test_a_silent_worker_is_shown_as_such() -> None:
    """A worker whose last report is older than the limit counts as silent and not as up."""
    with pair() as (here, reports):
        assert send_state(here, 0, counted(1).state())
        datagram = _datagrams(counted(2, 1).state(), 1)[0]
        here.send(_sent_at(datagram, time.monotonic() - SILENT - 1))
        state = reports.state()
        assert [worker["silent"] > SILENT for worker in state["workers"]] == [False, True]
        assert handshakes(state) == 3


def test_a_long_state_travels_in_parts() -> None:
    """A state larger than a datagram arrives whole; one of which a part was lost is passed over."""
    metrics = in_force(Metrics())
    for number in range(2 * MAX_SERIES):
        metrics.handshake("deny", f"a.rather.long.reason.{number}", 0.1, f"a.rather.long.listener.{number}")
    state = metrics.state()
    parts = _datagrams(state, 0)
    assert len(parts) > 1
    assert max(map(len, parts)) <= 60 << 10
    with pair() as (here, reports):
        here.send(parts[0])
        assert reports.states() == {}
        assert send_state(here, 0, state)
        assert handshakes(reports.state()) == 2 * MAX_SERIES


def _datagrams(state: State, worker: int) -> list[bytes]:
    """What is sent for a state."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        there.setblocking(False)
        assert send_state(here, worker, state)
        found = []
        while True:
            try:
                found.append(there.recv(1 << 16))
            except BlockingIOError:
                return found


def _sent_at(datagram: bytes, moment: float) -> bytes:
    return datagram[:4] + struct.pack("!d", moment) + datagram[12:]


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"hfst",
        b"\0" * 18,
        struct.pack("!4sdHHH", b"hfst", 1.0, 0, 0, 1) + b"no JSON",
        struct.pack("!4sdHHH", b"hfst", 1.0, 0, 0, 1) + b"{}",
        struct.pack("!4sdHHH", b"hfst", 1.0, 0, 1, 1) + b"{}",
        struct.pack("!4sdHHH", b"hfst", float("nan"), 0, 0, 1) + b"{}",
        struct.pack("!4sdHHH", b"hfst", 1.0, 65535, 0, 2) + b"{}",
        struct.pack("!4sdHHH", b"hfst", 1.0, 0, 0, 60000) + b"{}",
    ],
)
def test_what_is_no_report_is_passed_over(datagram: bytes) -> None:
    """Bytes that are no report change nothing, and the next report is read."""
    with pair() as (here, reports):
        here.send(datagram)
        assert reports.states() == {}
        assert send_state(here, 0, counted(1).state())
        assert handshakes(reports.state()) == 1


def test_a_reader_that_does_not_read_or_is_gone_holds_nobody_up() -> None:
    """Sending never waits: it says that it did not get through."""
    with pair() as (here, reports):
        deadline, state = time.monotonic() + PATIENCE, counted(1).state()
        while send_state(here, 0, state):
            assert time.monotonic() < deadline
        assert handshakes(reports.state()) == 1
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    there.close()
    with here:
        assert not send_state(here, 0, counted(1).state())
