from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from handfast.errors import Reason
from handfast.guard.listening import bind_shared
from handfast.guard.places import Place
from handfast.guard.workers import auto_workers, deal
from tests.support.programs import Child, environment
from tests.support.waiting import PATIENCE, until

# What a worker does here: it answers each connection with its number and pid, and reports each answer.
PROGRAM = """
import json, os, select, signal, socket, sys, time
from handfast.errors import HandfastError, InvalidInput, Reason
from handfast.guard import workers
from handfast.guard.listening import bind_shared
from handfast.guard.places import Place
from handfast.guard.workers import Plan, Worker, deal, supervise

mode, count, drain = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
workers.LONG_LIFE = float(os.environ.get("LONG_LIFE", workers.LONG_LIFE))


def say(event, fields):
    os.write(1, json.dumps({"event": event, **fields}).encode() + b"\\n")  # whole, among those of other processes


def run(worker):
    if mode == "config" and worker.index == 1:
        raise InvalidInput(Reason.INPUT_MISSING, path="/no/such.toml")
    if mode == "code" and worker.index == 1:
        return 7
    if mode == "bug" and worker.index == 1:
        raise RuntimeError("a bug")
    if mode == "killed" and worker.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "flapping" and os.path.exists("fail"):
        return 9
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer)
    waiting = select.poll()
    waiting.register(reader, select.POLLIN)
    for plug in worker.sockets:
        waiting.register(plug, select.POLLIN)
    by_number = {plug.fileno(): plug for plug in worker.sockets}
    say("up", {"worker": worker.index, "pid": os.getpid()})
    worker.ready()
    while True:
        for number, _ in waiting.poll():
            if number == reader:
                for number in os.read(reader, 100):
                    say("got", {"worker": worker.index, "signal": signal.Signals(number).name})
                    if number == signal.SIGHUP:
                        worker.ready()
                    elif mode == "stuck":
                        say("stuck", {"worker": worker.index})
                        time.sleep(60)
                    else:
                        return 0
            else:
                try:
                    connection, _ = by_number[number].accept()
                except BlockingIOError:
                    continue
                with connection:
                    connection.settimeout(60)
                    if connection.recv(1):
                        connection.sendall(b"%d %d" % (worker.index, os.getpid()))
                if worker.report is not None:
                    worker.report.send(b"%d" % worker.index)


def admin(worker):
    signal.signal(signal.SIGTERM, lambda *_: (say("admin_stopped", {}), os._exit(0)))
    say("up", {"worker": worker.index, "pid": os.getpid()})
    worker.ready()
    while True:
        select.select([worker.report], [], [])
        say("reported", {"by": int(worker.report.recv(100))})


plugs = bind_shared(Place("127.0.0.1", 0), count)
say("bound", {"port": plugs[0].getsockname()[1], "pid": os.getpid()})
plan = Plan(run, deal(plugs, count), say, admin=admin if mode == "admin" else None, drain=drain)
try:
    sys.exit(supervise(plan))
except HandfastError as error:
    say("raised", {"reason": error.reason.code, "message": str(error)})
    sys.exit(error.reason.exit)
"""


class Supervised:
    """The program above as a child, its events as they come."""

    def __init__(self, folder: Path, mode: str = "serve", count: int = 2, drain: float = 10, **more: str) -> None:
        script = folder / "workers.py"
        script.write_text(PROGRAM)
        words = (sys.executable, script, mode, str(count), str(drain))
        # What is a long life is told by the clock, and so by the machine: none is, where a test does not ask for it.
        self.child = Child(words, folder, environment(**({"LONG_LIFE": "1000"} | more)), merge=False)

    def __enter__(self) -> Supervised:
        self.child.__enter__()
        bound = self.next("bound")
        self.port, self.pid = bound["port"], bound["pid"]
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.child.stop()

    def next(self, event: str, **fields: object) -> dict[str, Any]:
        while True:
            found: dict[str, Any] = json.loads(self.child.line(rf'"event": "{event}"'))
            if fields.items() <= found.items():
                return found

    def serving(self, count: int = 2) -> dict[int, int]:
        """The pids of the workers, once all serve."""
        up = [self.next("up") for _ in range(count)]
        self.next("serving")
        return {event["worker"]: event["pid"] for event in up}

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, once it has ended by itself."""
        return self.child._process.wait(2 * PATIENCE)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.child.lines]


def ask(port: int) -> tuple[int, int]:
    """Which worker answers, and its pid. Raises OSError when the connection is refused or reset."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        connection.sendall(b"?")
        answer = connection.recv(100)
    if not answer:
        raise ConnectionResetError("closed without an answer")
    index, pid = answer.split()
    return int(index), int(pid)


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[tuple[Supervised, dict[int, int]]]:
    with Supervised(tmp_path) as supervised:
        yield supervised, supervised.serving()


def test_workers_share_a_port(serving: tuple[Supervised, dict[int, int]]) -> None:
    """Connections to one port are spread over all workers, and each is answered by a process of its own."""
    supervised, pids = serving
    answers = Counter(ask(supervised.port) for _ in range(200))
    assert set(answers) == set(pids.items())
    assert min(answers.values()) > 20
    supervised.signal(signal.SIGTERM)
    assert supervised.wait() == 0


def test_a_worker_that_dies_is_restarted_and_refuses_nobody(serving: tuple[Supervised, dict[int, int]]) -> None:
    """While a killed worker is down its connections wait in its queue: not one is refused or reset."""
    supervised, pids = serving
    for turn in range(3):
        os.kill(pids[1], signal.SIGKILL)
        until(lambda: not alive(pids[1]), "its death")
        answers = [ask(supervised.port) for _ in range(100)]  # each would raise
        died = supervised.next("worker_died", worker=1)
        assert (died["how"], died["reason"]) == ("signal 9", Reason.GUARD_WORKER_DIED.code)
        assert died["restart_in"] == pytest.approx(0.1 * 2**turn)
        new = supervised.next("up", worker=1)["pid"]
        assert {pid for index, pid in answers if index == 1} == {new}
        assert {pid for index, pid in answers if index == 0} == {pids[0]}
        pids[1] = new


def test_a_connection_waits_for_the_restart(serving: tuple[Supervised, dict[int, int]]) -> None:
    """What connects to a dead worker is answered by its next life, not before."""
    supervised, pids = serving
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(alive, pids.values())), "their death")
    waiting = [socket.create_connection(("127.0.0.1", supervised.port), PATIENCE) for _ in range(20)]
    answered = set()
    for connection in waiting:
        with connection:
            connection.sendall(b"?")
            answered.add(int(connection.recv(100).split()[1]))
    assert len(answered) == 2
    assert not answered & set(pids.values())


def test_restarts_that_fail_are_tried_less_and_less(tmp_path: Path) -> None:
    """A worker whose restarts fail is started after ever longer waits while the others serve, until it succeeds."""
    with Supervised(tmp_path, "flapping") as supervised:
        pids = supervised.serving()
        (tmp_path / "fail").touch()
        os.kill(pids[0], signal.SIGKILL)
        delays = [supervised.next("worker_died", worker=0)["restart_in"] for _ in range(4)]
        assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8])
        (tmp_path / "fail").unlink()
        supervised.next("up", worker=0)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0


def test_a_long_life_forgets_earlier_deaths(tmp_path: Path) -> None:
    """A worker that lived long is restarted as soon as at its first death."""
    with Supervised(tmp_path, LONG_LIFE="0") as supervised:
        pids = supervised.serving()
        for _ in range(3):
            os.kill(pids[0], signal.SIGKILL)
            assert supervised.next("worker_died", worker=0)["restart_in"] == pytest.approx(0.1)
            pids[0] = supervised.next("up", worker=0)["pid"]


def test_a_closed_socket_resets_those_who_wait() -> None:
    """Why the parent keeps the sockets of the dead: to close one of a shared port resets its queue."""
    kept, closed = bind_shared(Place("127.0.0.1", 0), 2)
    waiting = [socket.create_connection(kept.getsockname(), 5) for _ in range(50)]
    closed.close()
    ends: Counter[str] = Counter()
    for connection in waiting:
        with connection:
            connection.settimeout(0.05)
            try:
                connection.recv(1)
            except ConnectionResetError:
                ends["reset"] += 1
            except TimeoutError:
                ends["waits"] += 1
    kept.close()
    assert ends["reset"] > 5
    assert ends["waits"] > 5


@pytest.mark.parametrize(
    ("mode", "code", "reason", "words"),
    [
        ("config", 4, "input.missing", "/no/such.toml: no such file"),
        ("bug", 1, "bug", "a bug"),
        ("killed", 1, "guard.worker_died", "worker 1 ended unasked (signal 9)"),
        ("code", 7, None, None),
    ],
)
def test_a_worker_that_cannot_start_ends_the_whole(
    tmp_path: Path, mode: str, code: int, reason: str | None, words: str | None
) -> None:
    """What fails before all serve is not tried again: its exit code and reason are the whole's."""
    with Supervised(tmp_path, mode) as supervised:
        assert supervised.wait() == code
        supervised.child.stop()
        assert supervised.child.errors == []  # no traceback
        failed = [event for event in supervised.events if event["event"] == "worker_failed"]
        raised = [event for event in supervised.events if event["event"] == "raised"]
    assert len(failed) == 1
    assert [event["reason"] for event in raised] == ([] if reason is None else [reason])
    assert words is None or words in raised[0]["message"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_whole(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT reach each worker as SIGTERM, once; nobody connects from then on and the code is 0."""
    with Supervised(tmp_path) as supervised:
        pids = supervised.serving()
        supervised.signal(number)
        assert supervised.wait() == 0
        supervised.child.stop()
        got = [event for event in supervised.events if event["event"] == "got"]
        assert sorted((event["worker"], event["signal"]) for event in got) == [(0, "SIGTERM"), (1, "SIGTERM")]
        assert not any(map(alive, pids.values()))
        with pytest.raises(ConnectionRefusedError):
            ask(supervised.port)


def test_ctrl_c_reaches_workers_through_the_parent_alone(tmp_path: Path) -> None:
    """A SIGINT to the whole group, as a terminal sends it, is one SIGTERM for each worker."""
    with Supervised(tmp_path) as supervised:
        supervised.serving()
        os.killpg(supervised.pid, signal.SIGINT)
        assert supervised.wait() == 0
        supervised.child.stop()
        got = [event["signal"] for event in supervised.events if event["event"] == "got"]
        assert got == ["SIGTERM", "SIGTERM"]


def test_a_worker_that_does_not_drain_is_killed(tmp_path: Path) -> None:
    """After the time to drain, workers that are left are killed, and that is told and is an error."""
    with Supervised(tmp_path, "stuck", drain=0.3) as supervised:
        pids = supervised.serving()
        began = time.monotonic()
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 1
        assert 0.3 <= time.monotonic() - began < 20
        supervised.child.stop()
        killed = [event["reason"] for event in supervised.events if event["event"] == "worker_killed"]
    assert killed == [Reason.GUARD_WORKER_STUCK.code] * 2
    assert not any(map(alive, pids.values()))


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """The second SIGTERM does not wait for the drain."""
    with Supervised(tmp_path, "stuck", drain=60) as supervised:
        pids = supervised.serving()
        supervised.signal(signal.SIGTERM)
        for _ in pids:
            supervised.next("stuck")
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 3
        assert not any(map(alive, pids.values()))


def test_sighup_is_passed_on(tmp_path: Path) -> None:
    """SIGHUP reaches each worker, each time, and ends nobody; systemd is told when all have acted on it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        with Supervised(tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")) as supervised:
            pids = supervised.serving()
            assert systemd.recv(1000) == b"READY=1"
            for _ in range(3):
                supervised.signal(signal.SIGHUP)
                assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", systemd.recv(1000))
                assert systemd.recv(1000) == b"READY=1"
                assert {supervised.next("got", signal="SIGHUP")["worker"] for _ in pids} == {0, 1}
            assert all(map(alive, pids.values()))
            supervised.signal(signal.SIGTERM)
            assert systemd.recv(1000) == b"STOPPING=1"
            assert supervised.wait() == 0


def test_the_watchdog_is_fed(tmp_path: Path) -> None:
    """systemd's watchdog hears of the parent in each half of its time, with nothing else going on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        with Supervised(tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000") as supervised:
            supervised.serving()
            while systemd.recv(1000) != b"READY=1":
                pass

            def four() -> float:
                began = time.monotonic()
                assert [systemd.recv(1000) for _ in range(4)] == [b"WATCHDOG=1"] * 4
                return time.monotonic() - began

            # Where this process was held up, what had come meanwhile is read at once; it is not every time.
            until(lambda: four() > 0.25, "a time between the messages")


def test_workers_end_with_their_parent(serving: tuple[Supervised, dict[int, int]]) -> None:
    """A parent that is killed with -9 leaves no worker behind: each gets SIGTERM and drains."""
    supervised, pids = serving
    supervised.signal(signal.SIGKILL)
    assert {supervised.next("got", signal="SIGTERM")["worker"] for _ in pids} == {0, 1}
    until(lambda: not any(map(alive, pids.values())), "the end of the workers")


def test_the_admin_process_reads_reports_and_stops_last(tmp_path: Path) -> None:
    """Reports of all workers reach the admin process, through a restart of it, and it ends after the workers."""
    with Supervised(tmp_path, "admin") as supervised:
        pids = supervised.serving(3)
        for _ in range(2):
            asked = [ask(supervised.port)[0] for _ in range(20)]
            assert Counter(supervised.next("reported")["by"] for _ in asked) == Counter(asked)
            os.kill(pids[-1], signal.SIGKILL)
            pids[-1] = supervised.next("up", worker=-1)["pid"]
        asked = [ask(supervised.port)[0] for _ in range(20)]
        assert Counter(supervised.next("reported")["by"] for _ in asked) == Counter(asked)
        supervised.signal(signal.SIGTERM)
        assert supervised.wait() == 0
        supervised.child.stop()
        order = [event["event"] for event in supervised.events if event["event"] in ("got", "admin_stopped")]
    assert order == ["got", "got", "admin_stopped"]


def test_the_parent_sleeps(serving: tuple[Supervised, dict[int, int]]) -> None:
    """With nothing to do the parent uses no processor time, also when a worker has died and come back."""
    supervised, pids = serving
    os.kill(pids[0], signal.SIGKILL)
    supervised.next("up", worker=0)
    assert ask(supervised.port)

    def spent() -> int:
        fields = Path(f"/proc/{supervised.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # utime, stime: proc(5)

    before = spent()
    time.sleep(0.5)  # what is measured is that nothing happens in it
    assert spent() - before <= 2  # of 50 ticks


def test_a_process_with_threads_is_not_forked() -> None:
    """A fork copies locks that other threads hold, so a process that has them is refused."""
    source = (
        "import threading\nfrom handfast.guard.workers import *\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "supervise(Plan(lambda worker: 0, [[]], print))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert "ValueError: supervise() forks, so there must be no other thread" in done.stderr


@pytest.mark.parametrize(("sockets", "workers"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 4), (7, 2), (2, 7)])
def test_every_socket_is_served_and_every_worker_serves(sockets: int, workers: int) -> None:
    """However many sockets there are for however many workers, none is left without the other."""
    plugs = [socket.socket() for _ in range(sockets)]
    try:
        hands = deal(plugs, workers)
        assert len(hands) == workers
        assert all(hands)
        assert {id(plug) for hand in hands for plug in hand} == {id(plug) for plug in plugs}
        assert all(len({id(plug) for plug in hand}) == len(hand) for hand in hands)
    finally:
        for plug in plugs:
            plug.close()


def test_as_many_workers_as_processors() -> None:
    """`auto` is the number of processors that the process may use, not of those that the machine has."""
    source = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    source += "from handfast.guard.workers import auto_workers; print(auto_workers())"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "1"
    assert auto_workers() == len(os.sched_getaffinity(0))
