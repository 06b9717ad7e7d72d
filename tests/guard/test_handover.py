from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from handfast.errors import Failure, Reason
from handfast.guard.handover import Handed, hand_over, own_command
from tests.support.programs import Child, environment
from tests.support.waiting import PATIENCE, until

COMMON = """
import asyncio, json, os, signal, socket, sys, time, uvloop
from handfast.errors import Failure, HandfastError, Reason
from handfast.guard.handover import Handed, begin, hand_over, inherited, own_command, say_failed, say_ready

def say(event, **fields):
    os.write(1, json.dumps({"event": event, "pid": os.getpid(), **fields}).encode() + b"\\n")
"""

# One process with an event loop: it answers each connection with its pid.
SINGLE = (
    COMMON
    + """
open_now = set()


class Answer(asyncio.Protocol):
    def connection_made(self, transport):
        open_now.add(self)
        self.transport = transport

    def data_received(self, data):
        self.transport.write(b"%d" % os.getpid())
        self.transport.close()

    def connection_lost(self, error):
        open_now.discard(self)


async def main():
    try:
        given = inherited()
    except HandfastError as error:
        say("refused", message=str(error))
        sys.exit(2)
    plugs = given.get("main") or [socket.create_server(("127.0.0.1", 0), backlog=4096)]
    mode = open("mode").read() if os.path.exists("mode") else ""
    if given and mode == "failing":
        say_failed(Failure(Reason.INPUT_MISSING, {"path": "handfast.toml"}))
        sys.exit(4)
    if given and mode == "ending":
        sys.exit(5)
    if given and mode == "silent":
        time.sleep(60)
    if given and mode == "closing":
        os.closerange(3, 100)
        time.sleep(60)
    loop, stop, asked = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    servers = [await loop.create_server(Answer, sock=plug, backlog=4096) for plug in plugs]
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGUSR2, asked.set)
    left = [name for name in os.environ if name.startswith("HANDFAST_FDS")]
    say("serving", port=plugs[0].getsockname()[1], given=sorted(given), left=left, again=inherited())
    say_ready()
    while not stop.is_set():
        waits = [asyncio.ensure_future(event.wait()) for event in (stop, asked)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        [wait.cancel() for wait in waits]
        if asked.is_set() and not stop.is_set():
            asked.clear()
            limit = 0.5 if os.path.exists("mode") and open("mode").read() == "silent" else 20
            command = ["/no/such/program"] if os.path.exists("gone") else own_command()
            outcome = await asyncio.to_thread(hand_over, {"main": plugs}, command, dict(os.environ), limit)
            if isinstance(outcome, Handed):
                say("handed", to=outcome.pid)
                break
            say("kept", reason=outcome.reason.code, message=outcome.message)
    for server in servers:
        server.close()
    while open_now:
        await asyncio.sleep(0.01)
    say("ended")

uvloop.run(main())
"""
)

# A supervisor with two workers.
SUPERVISED = (
    COMMON
    + """
import select
from handfast.guard.listening import bind_shared
from handfast.guard.places import Place
from handfast.guard.workers import Plan, deal, supervise

def run(worker):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    worker.ready()
    while not stopped:
        ready, _, _ = select.select([reader, *worker.sockets], [], [])
        for plug in set(ready) & set(worker.sockets):
            try:
                connection, _ = plug.accept()
            except BlockingIOError:
                continue
            with connection:
                connection.settimeout(60)
                if connection.recv(1):
                    connection.sendall(b"%d" % os.getppid())
    return 0

plugs = inherited().get("main") or bind_shared(Place("127.0.0.1", 0), 2)
port = plugs[0].getsockname()[1]

def told(event, fields):
    say(event, port=port, **{name: value for name, value in fields.items() if name != "pid"})

hand_over = lambda: begin({"main": plugs}, own_command(), os.environ)
sys.exit(supervise(Plan(run, deal(plugs, 2), told, begin_hand_over=hand_over)))
"""
)


class Clients:
    """Clients that connect in a tight loop from two threads, and what became of each connection."""

    def __init__(self, port: int) -> None:
        self.answered: dict[int, int] = {}  # by pid
        self.failed: list[str] = []
        self._port = port
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def count(self) -> int:
        with self._lock:
            return sum(self.answered.values())

    def wait(self, more: int) -> None:
        """Until so many more connections were answered."""
        goal = self.count + more
        until(lambda: self.count >= goal or self.failed, f"{more} more answers", 2 * PATIENCE)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as connection:
                    connection.sendall(b"?")
                    pid = int(connection.recv(100))
            except (OSError, ValueError) as error:
                self.failed.append(repr(error))
                continue
            with self._lock:
                self.answered[pid] = self.answered.get(pid, 0) + 1


class Program:
    """The first process and all that come after it; they share its output."""

    def __init__(self, child: Child) -> None:
        self.child = child

    def next(self, event: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.child.line(rf'"event": "{event}"'))
        return found


@contextmanager
def program(folder: Path, source: str, **more: str) -> Iterator[Program]:
    script = folder / "program.py"
    script.write_text(source)
    child = Child((sys.executable, script), folder, environment(**more), merge=False)
    with child:
        try:
            yield Program(child)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child._process.pid, signal.SIGKILL)
    assert child.errors == []


def test_three_restarts_refuse_nobody(tmp_path: Path) -> None:
    """Thousands of connections over three hand-overs: none is refused, none is reset, each process serves some."""
    with program(tmp_path, SINGLE) as running:
        first = running.next("serving")
        assert (first["given"], first["left"]) == ([], [])
        pids = [first["pid"]]
        with Clients(first["port"]) as clients:
            for _ in range(3):
                clients.wait(500)
                os.kill(pids[-1], signal.SIGUSR2)
                new = running.next("serving")
                assert (new["port"], new["given"], new["left"], new["again"]) == (first["port"], ["main"], [], {})
                handed = running.next("handed")
                assert (handed["pid"], handed["to"]) == (pids[-1], new["pid"])
                assert running.next("ended")["pid"] == pids[-1]
                pids.append(new["pid"])
            clients.wait(500)
        assert clients.failed == []
        assert set(clients.answered) == set(pids)
        assert sum(clients.answered.values()) > 2000
        os.kill(pids[-1], signal.SIGTERM)
        assert running.next("ended")["pid"] == pids[-1]


def test_a_plain_restart_does_refuse(tmp_path: Path) -> None:
    """The same clients see refused connections when the process just ends: the test above can fail."""
    with program(tmp_path, SINGLE) as running:
        first = running.next("serving")
        with Clients(first["port"]) as clients:
            clients.wait(100)
            os.kill(first["pid"], signal.SIGTERM)
            running.next("ended")
            until(lambda: clients.failed, "a client that fails")
        assert any("Refused" in failure or "Reset" in failure for failure in clients.failed)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("failing", "the new process did not take over: handfast.toml: no such file"),
        ("ending", "it ended with exit code 5 before it served"),
        ("silent", "it did not serve in time"),
        ("closing", "it never said that it serves"),
        ("gone", "it cannot be started"),
    ],
)
def test_a_new_process_that_fails_leaves_the_old_serving(tmp_path: Path, mode: str, words: str) -> None:
    """The old process says why and serves on, loses no connection, and the next attempt succeeds."""
    with program(tmp_path, SINGLE) as running:
        first = running.next("serving")
        with Clients(first["port"]) as clients:
            (tmp_path / ("gone" if mode == "gone" else "mode")).write_text(mode)
            os.kill(first["pid"], signal.SIGUSR2)
            kept = running.next("kept")
            assert kept["pid"] == first["pid"]
            assert kept["reason"] == Reason.GUARD_HANDOVER.code
            assert words in kept["message"]
            clients.wait(100)
            assert set(clients.answered) == {first["pid"]}
            (tmp_path / ("gone" if mode == "gone" else "mode")).unlink()
            os.kill(first["pid"], signal.SIGUSR2)
            new = running.next("serving")["pid"]
            running.next("handed")
            clients.wait(100)
        assert clients.failed == []
        assert set(clients.answered) == {first["pid"], new}


def test_workers_are_replaced_without_a_refusal(tmp_path: Path) -> None:
    """A supervisor hands all sockets of its workers over, and its workers drain: nobody is refused."""
    with program(tmp_path, SUPERVISED) as running:
        parent = running.next("serving")
        with Clients(parent["port"]) as clients:
            parents = [parent["pid"]]
            for _ in range(2):
                clients.wait(300)
                os.kill(parents[-1], signal.SIGUSR2)
                new = running.next("serving")
                assert new["port"] == parent["port"]
                assert running.next("handed_over")["pid"] == parents[-1]
                parents.append(new["pid"])
            clients.wait(300)
        assert clients.failed == []
        assert set(parents) <= set(clients.answered)


def test_systemd_learns_the_new_main_process(tmp_path: Path) -> None:
    """The old process tells systemd the pid of the new one; the watchdog is not bound to the old pid any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        with program(tmp_path, SINGLE, NOTIFY_SOCKET=str(tmp_path / "notify")) as running:
            os.kill(running.next("serving")["pid"], signal.SIGUSR2)
            new = running.next("serving")["pid"]
            assert systemd.recv(100) == b"MAINPID=%d" % new


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nonsense", "HANDFAST_FDS is malformed"),
        ('{"parent": PARENT}', "HANDFAST_FDS is malformed"),
        ('{"parent": PARENT, "sockets": [["main"]]}', "HANDFAST_FDS is malformed"),
        ('{"parent": PARENT, "sockets": [["main", 1]]}', "names descriptors that cannot be"),
        ('{"parent": PARENT, "sockets": [["main", -1]]}', "names descriptors that cannot be"),
        ('{"parent": PARENT, "sockets": [["main", 90], ["api", 90]]}', "names descriptors that cannot be"),
        ('{"parent": PARENT, "sockets": [["main", 90]]}', "'main' (descriptor 90): bad file descriptor"),
    ],
)
def test_sockets_that_cannot_be_are_refused(tmp_path: Path, value: str, words: str) -> None:
    """What does not name listening sockets stops the start."""
    with program(tmp_path, SINGLE, HANDFAST_FDS=value.replace("PARENT", str(os.getpid()))) as running:
        assert words in running.next("refused")["message"]


def test_sockets_meant_for_another_are_left_alone(tmp_path: Path) -> None:
    """A program that only inherited the variables, from a process that did not start it, binds its own socket."""
    value = json.dumps({"parent": 1, "sockets": [["main", 90]]})
    with program(tmp_path, SINGLE, HANDFAST_FDS=value, HANDFAST_READY="1:1") as running:
        assert running.next("serving")["given"] == []


def test_a_command_that_is_not_there_is_a_failure() -> None:
    """A program that cannot be started is told in words; nothing is raised."""
    with socket.create_server(("127.0.0.1", 0)) as plug:
        outcome = hand_over({"main": [plug]}, ["/no/such/program"], {})
        assert isinstance(outcome, Failure)
        assert "cannot be started" in outcome.message
        assert isinstance(hand_over({"main": [plug] * 2000}, ["/bin/true"], {}), Failure)
        plug.getsockname()  # and the socket is as it was


def test_only_what_belongs_to_the_new_process_is_passed_on(tmp_path: Path) -> None:
    """The new process gets the environment without what was for the old one alone."""
    shown = tmp_path / "shown"
    given = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "WATCHDOG_PID": "1", "WATCHDOG_USEC": "5", "NOTIFY_SOCKET": "/x"}
    script = f"env > {shown}; echo ready >&${{HANDFAST_READY#*:}}"
    with socket.create_server(("127.0.0.1", 0)) as plug:
        outcome = hand_over({"main": [plug]}, ["/bin/bash", "-c", script], given)
    assert isinstance(outcome, Handed)
    os.waitpid(outcome.pid, 0)
    names = {line.partition("=")[0] for line in shown.read_text().splitlines()}
    assert {"WATCHDOG_USEC", "NOTIFY_SOCKET", "HANDFAST_FDS"} <= names
    assert not names & {"LISTEN_PID", "LISTEN_FDS", "WATCHDOG_PID"}


def test_the_own_command_is_that_of_this_process() -> None:
    """The program is started with the words that it was started with."""
    assert own_command() == [sys.executable, *sys.orig_argv[1:]]
