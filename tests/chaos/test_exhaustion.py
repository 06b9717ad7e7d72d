"""What runs out: patience with strangers, file descriptors, the disk of the log, the reader of the log."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from handfast.errors import Reason
from tests.authority.disks import fill, mounted
from tests.chaos.kit import Answer, Apps, Caller, Guard, guarding
from tests.e2e.guard_kit import Files
from tests.support.apps import client_context
from tests.support.certs import Ca
from tests.support.waiting import PATIENCE, until

CONFIG = """
workers = WORKERS

[[listener]]
listen = "127.0.0.1:PORT"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "127.0.0.1:APP"
"""
MIB = 1 << 20
FEW = 64  # descriptors
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: an end with RST leaves no port behind in TIME_WAIT


@contextmanager
def running(
    folder: Path, workers: int = 1, out: int | None = None, limits: dict[int, int] | None = None
) -> Iterator[tuple[Files, Apps, Guard]]:
    """A guard in front of an app that echoes identities."""
    files = Files(folder)
    config = CONFIG.replace("WORKERS", str(workers))
    with Apps(1) as apps, guarding(folder, config.replace("APP", str(apps.ports[0])), out=out, limits=limits) as guard:
        until(lambda: len(guard.workers()) == (workers if workers > 1 else 0), "all workers")
        yield files, apps, guard


# Strangers.


@dataclass(frozen=True)
class Strangers:
    """Clients that no guard should let in, of every kind in turn."""

    port: int
    nobody: ssl.SSLContext
    unknown: tuple[ssl.SSLContext, ...]  # each with a certificate of an authority of its own
    hello: bytes

    @classmethod
    def against(cls, guard: Guard, folder: Path, many: int) -> Strangers:
        """Make them; `many` have certificates."""
        bundle = folder / "ca.crt"
        unknown = tuple(client_context(bundle, Ca.root(f"Unknown {n}").client(), folder) for n in range(many))
        outgoing = ssl.MemoryBIO()
        hello = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
        with suppress(ssl.SSLWantReadError):
            hello.do_handshake()
        return cls(guard.port, client_context(bundle), unknown, outgoing.read())

    def come(self, number: int) -> str:
        """One of them; returns what it was told: a code, 'silence' or 'nothing asked'."""
        with socket.create_connection(("127.0.0.1", self.port), 30) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            match number % 5:
                case 0:
                    return self._shake(plain, self.nobody)
                case 1:
                    return self._shake(plain, self.unknown[number // 5 % len(self.unknown)])
                case 2:
                    plain.sendall(GET)
                    return _code(_whole(plain))
                case 3:
                    plain.sendall(b"\xff" + random.Random(number).randbytes(200))
                    _whole(plain)
                    return "silence"
                case _:
                    plain.sendall(self.hello[: len(self.hello) // 2])
                    return "nothing asked"

    def _shake(self, plain: socket.socket, context: ssl.SSLContext) -> str:
        with context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=True) as tls:
            tls.sendall(GET)
            return _code(_whole(tls))


def _whole(plug: socket.socket) -> bytes:
    """All that comes until the far side ends it."""
    answer = b""
    while piece := plug.recv(4096):
        answer += piece
    return answer


def _code(answer: bytes) -> str:
    return answer.partition(b'"error": "')[2].partition(b'"')[0].decode()


TOLD = {
    Reason.VERIFY_NO_CERTIFICATE.code,
    Reason.VERIFY_UNKNOWN_ISSUER.code,
    Reason.TLS_PLAIN_HTTP.code,
    "silence",
    "nothing asked",
}


@dataclass(frozen=True)
class Memory:
    """Bytes that the guard held after the first strangers, and after all."""

    before: int
    after: int
    refused: int
    seconds: float

    @property
    def grown(self) -> int:
        return self.after - self.before


def refuse(folder: Path, first: int, then: int, unknown: int) -> Memory:
    """So many strangers to warm it up, then so many more, of which `unknown` have different certificates."""
    with running(folder) as (files, apps, guard), ThreadPoolExecutor(4) as pool:
        strangers = Strangers.against(guard, folder, unknown)

        def come(numbers: range) -> int:
            assert set(pool.map(strangers.come, numbers, chunksize=1)) == TOLD
            until(lambda: guard.descriptors() <= idle + 1, "the end of the strangers' connections")
            return guard.resident()

        idle = guard.descriptors()
        before = come(range(first))
        began = time.monotonic()
        after = come(range(first, first + then))
        memory = Memory(before, after, then, time.monotonic() - began)
        assert apps.answered == 0
        alice = Caller("alice", guard.port, files.client("alice").context())
        assert alice.ask().right
        alice.close()
        least = (first + then) * 4 // 5  # of half a hello that is gone at once there may be nothing to say
        until(lambda: [event["decision"] for event in guard.events("connection")].count("deny") >= least, "the log")
        guard.well()
    return memory


@pytest.mark.timeout(900)
def test_refused_handshakes_leave_nothing_behind(tmp_path: Path) -> None:
    """After 4,000 refused clients of five kinds, 96,000 more cost no memory, no descriptor, and no request."""
    memory = refuse(tmp_path, 4_000, 96_000, 50)
    assert memory.grown < 4 * MIB, memory


# Descriptors.


def _hold(guard: Guard, many: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", guard.port), PATIENCE) for _ in range(many)]


def _closed(plugs: list[socket.socket]) -> int:
    """How many of them the guard has closed."""
    count = 0
    for plug in plugs:
        plug.setblocking(False)
        with suppress(BlockingIOError):
            count += plug.recv(1) == b""
    return count


def _share(guard: Guard, seconds: float) -> float:
    """The part of a processor that it uses for so long."""
    used, began = guard.processor(), time.monotonic()
    threading.Event().wait(seconds)
    return (guard.processor() - used) / (time.monotonic() - began)


def test_accepting_pauses_while_descriptors_are_out(tmp_path: Path) -> None:
    """With its descriptors used up a guard serves whom it has, makes others wait, does not spin, and recovers."""
    with running(tmp_path, limits={resource.RLIMIT_NOFILE: FEW}) as (files, _, guard):
        alice = Caller("alice", guard.port, files.client("alice").context())
        assert alice.ask().right
        held = _hold(guard, 100)
        bob = Caller("bob", guard.port, files.client("bob").context())
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(bob.ask)
            assert _share(guard, 2) < 0.3
            assert all(alice.ask().right for _ in range(20))
            assert not waiting.done()
            assert _closed(held) == 0
            for plug in held:
                plug.close()
            assert waiting.result(PATIENCE).right
        bob.close()
        alice.close()
        until(lambda: guard.descriptors() < FEW // 2, "descriptors that are free again")
        dora = Caller("dora", guard.port, files.client("dora").context())
        assert all(answer.right for answer in dora.ask_many(5))
        dora.close()
        guard.well()


def test_no_client_is_taken_in_whose_app_could_not_be_reached(tmp_path: Path) -> None:
    """More clients than there are descriptors for: each that is let in is answered, the rest wait, and come in turn."""
    full = threading.Event()

    def come(caller: Caller) -> Answer:
        caller.open()
        full.wait(PATIENCE)
        return caller.ask()

    with running(tmp_path, limits={resource.RLIMIT_NOFILE: FEW}) as (files, _, guard):
        context = files.client("alice").context()
        callers = [Caller("alice", guard.port, context) for _ in range(FEW)]
        with ThreadPoolExecutor(FEW) as pool, ExitStack() as stack:
            for caller in callers:
                stack.callback(caller.close)
            asked = {pool.submit(come, caller): caller for caller in callers}
            until(lambda: guard.events("accepting"), "a pause")
            full.set()
            held: list[Caller] = []  # as many as the guard takes at a time
            while asked:
                done, _ = wait(asked, 1, FIRST_COMPLETED)
                assert done or held
                held += [asked.pop(answer) for answer in done if answer.result().right]
                while not done and held:
                    held.pop().close()
        paused = guard.events("accepting")
        assert paused[0]["paused"]
        assert f"{FEW} open files" in paused[0]["detail"]
        assert "LimitNOFILE" in paused[0]["remedy"]
        guard.well()


# The log.


def test_a_full_disk_stops_forwarding_until_there_is_room(tmp_path: Path) -> None:
    """While the disk of the log is full no request reaches the app; with room again they do, and no line is lost."""
    with ExitStack() as stack:
        disk = stack.enter_context(mounted(tmp_path / "disk", "256k"))
        log = stack.enter_context((disk / "log").open("wb", buffering=0))
        files, apps, guard = stack.enter_context(running(tmp_path, out=log.fileno()))
        alice = Caller("alice", guard.port, files.client("alice").context())
        assert alice.ask().right
        until(lambda: b'"status":200' in (disk / "log").read_bytes(), "the line of the first request")
        filler = fill(disk)
        answers = [alice.ask()]
        while answers[-1].status != Reason.GUARD_LOG_FAILED.http:
            answers.append(alice.ask())
        answered = apps.answered
        refusals = [alice.ask() for _ in range(10)]
        assert all(Reason.GUARD_LOG_FAILED.code.encode() in refusal.body for refusal in refusals)
        assert apps.answered == answered
        filler.unlink()
        while not answers[-1].right:
            answers.append(alice.ask())
        many = 1 + len(answers) + len(refusals)
        until(lambda: (disk / "log").read_bytes().count(b'"request":"') == many, "a line for each request")
        requests = [json.loads(line).get("request") for line in (disk / "log").read_text().splitlines()]
        assert len({request for request in requests if request}) == many
        alice.close()


class Reader:
    """The far end of the pipe that a guard logs to; it reads when told to."""

    def __init__(self) -> None:
        self._near, self.out = os.pipe()
        self.data = b""
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.out)
        if self._thread is not None:  # else it could read from whatever gets the number next
            self._thread.join(PATIENCE)
            assert not self._thread.is_alive(), "somebody still has the pipe"
        os.close(self._near)

    def begin(self) -> None:
        """Read from now on."""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError):
            while piece := os.read(self._near, 1 << 16):
                self.data += piece


def _ask_some(guard: Guard, files: Files, clients: int, batches: int) -> int:
    """Requests by several clients, in batches of eight; returns how many were answered right."""
    right = 0
    for number in range(clients):
        caller = Caller(f"client{number}", guard.port, files.client(f"client{number}").context())
        right += sum(answer.right for _ in range(batches) for answer in caller.ask_many(8))
        caller.close()
    return right


@pytest.mark.parametrize("workers", [1, 2])
def test_a_slow_reader_of_the_log_holds_nobody_up(tmp_path: Path, workers: int) -> None:
    """While nobody reads the log, requests go on; what they said comes whole and once when it is read."""
    with Reader() as reader, running(tmp_path, workers, out=reader.out) as (files, _, guard):
        assert _ask_some(guard, files, 6, 30) == 6 * 30 * 8
        reader.begin()
        until(lambda: reader.data.count(b'"status":200') == 6 * 30 * 8, "a line for each request")


def test_a_worker_is_replaced_while_nobody_reads_the_log(tmp_path: Path) -> None:
    """A parent that cannot say that a worker died starts another all the same, and still ends when it is told to."""
    with Reader() as reader, running(tmp_path, 2, out=reader.out) as (files, _, guard):
        assert _ask_some(guard, files, 6, 30) == 6 * 30 * 8
        dead = guard.workers()[0]
        os.kill(dead, signal.SIGKILL)
        try:
            until(lambda: len(guard.workers()) == 2 and dead not in guard.workers(), "another worker")
        finally:
            reader.begin()  # or the guard would not end


def swell(folder: Path, limit: int) -> tuple[int, int]:
    """Ask until nothing is forwarded because nobody reads the log; return how many were, and what memory it took."""
    with Reader() as reader, running(folder, out=reader.out) as (files, apps, guard):
        alice = Caller("alice", guard.port, files.client("alice").context())
        assert alice.ask().right
        before = guard.resident()
        with suppress(ConnectionResetError):  # a refusal for its log's sake ends the connection, and what was behind
            while all(answer.right for answer in alice.ask_many(16)):
                assert apps.answered < limit // 50, "it forwards for ever"
        alice.close()
        answered = apps.answered
        assert Reason.GUARD_LOG_FAILED.code.encode() in alice.ask().body
        assert apps.answered == answered
        grown = guard.resident() - before
        reader.begin()
        until(lambda: alice.ask().right, "a right answer again")
        alice.close()
        return answered, grown
