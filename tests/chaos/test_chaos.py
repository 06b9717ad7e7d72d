"""Everything at once: workers killed, apps that crash, certificates and rules that change, under load.

The oracle does not guess. A worker is stopped before it is killed, and the kernel says whose connections it holds;
those alone may break. An answer is right only if it names the client and the very request that it asked.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.errors import Reason
from tests.chaos.kit import Apps, Caller, Guard, guarding
from tests.e2e.guard_kit import Files
from tests.support.apps import App, hello
from tests.support.certs import Ca
from tests.support.waiting import until

CONFIG = """
workers = 2

[[listener]]
listen = "127.0.0.1:PORT"
cert = "server.crt"
key = "server.key"
client_ca = "bundle.crt"
allow_file = "allow.txt"
to = "apps"

[upstream.apps]
targets = [{targets}]
retries = 3
"""
KEEPERS, COMERS = ("alice", "bob", "chris", "dora"), ("erin", "frank")
FICKLE = "grace"  # whose rule comes and goes
NAMES = (*KEEPERS, *COMERS)
RETRIES = 3  # of a request whose connection a kill cut; another kill may cut the next
LAST_LINES = 1.0  # seconds before a kill, of which the log may lack some


@dataclass
class Report:
    """What a run came to. The lists are what must be empty."""

    requests: Counter[str] = field(default_factory=Counter)  # by client
    connections: int = 0
    kills: int = 0
    halves: int = 0  # new workers that found a certificate and the next one's key
    cut: int = 0  # requests and handshakes that died with their worker
    crashes: int = 0  # of apps
    all_down: int = 0  # answers 502 while no app was up
    rotations: int = 0
    shown: set[bytes] = field(default_factory=set)  # server certificates that clients saw
    fickle: Counter[int] = field(default_factory=Counter)  # statuses of the client whose rule changes
    ended: int = 0  # connections of that client that ended with its rule, and not in the last moment of a worker
    slowest: float = 0.0  # seconds until a client was connected
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{sum(self.requests.values())} requests on {self.connections} connections;"
            f" {self.kills} workers killed, {self.cut} cut with them, {self.halves} found half a rotation;"
            f" {self.crashes} crashes of apps, {self.all_down} answers 502 with none up;"
            f" {self.rotations} rotations, {len(self.shown)} server certificates seen;"
            f" fickle {dict(self.fickle)} and {self.ended} ended; slowest connection {self.slowest:.2f} s;"
            f" {len(self.failed)} failed, {len(self.wrong)} wrong"
        )


@dataclass
class Outage:
    """From when till when no app was up."""

    begin: float
    end: float = float("inf")


@dataclass
class Storm:
    """A run: its threads, and what each of them has to tell the others."""

    files: Files
    guard: Guard
    apps: Apps
    report: Report = field(default_factory=Report)
    doomed: list[tuple[int, float]] = field(default_factory=list)  # a client's port, and when its worker was stopped
    killed: list[float] = field(default_factory=list)  # when
    ends: list[float] = field(default_factory=list)  # when connections ended by a rule
    outages: list[Outage] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def blow(self, seconds: float) -> Report:
        """Run for so long."""
        jobs: list[Callable[[], None]] = [self._rotate, self._rewrite, self._crash, self._kill, self._be_fickle]
        jobs += [lambda name=name: self._call(name, keep=True) for name in KEEPERS]  # type: ignore[misc]
        jobs += [lambda name=name: self._call(name, keep=False) for name in COMERS]  # type: ignore[misc]
        threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        self.over.wait(seconds)
        self.over.set()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        # Held against the log in the end. A worker's last lines, which had still to be written, die with it.
        logged = [end for end in self.ends if all(abs(killed - end) > LAST_LINES for killed in self.killed)]
        self.report.ended = len(logged)
        return self.report

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self.report.failed.append(f"{job}: {error!r}")
            self.over.set()
            raise

    # The weather.

    def _rotate(self) -> None:
        while not self.over.wait(1.0):
            rotate(self.files)
            self.report.rotations += 1

    def _rewrite(self) -> None:
        allowed = True
        while not self.over.wait(1.3):
            allowed = not allowed
            allow(self.files.folder, fickle=allowed)

    def _crash(self) -> None:
        first, second = self.apps.ports
        for turn in range(1 << 30):
            if self.over.wait(0.5):
                break
            self.apps.stop(first)
            self.report.crashes += 1
            if turn % 4 == 3:
                outage = Outage(time.monotonic())  # before the other is stopped: what is under way there fails too
                self.outages.append(outage)
                self.apps.stop(second)
                self.over.wait(0.2)
                self.apps.start(second)
                outage.end = time.monotonic()
            self.over.wait(0.3)
            self.apps.start(first)
            first, second = second, first

    def _kill(self) -> None:
        chance = random.Random(1)
        while not self.over.wait(3.0):
            pid = chance.choice(self.guard.workers())
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                until(lambda pid=pid: stands_still(pid), "a worker that stands still")  # type: ignore[misc]  # bound to this turn's
                now, ports = time.monotonic(), self.guard.clients_of(pid)
                self.doomed += [(port, now) for port in ports]
                os.kill(pid, signal.SIGKILL)
                self.killed.append(now)
                self.report.kills += 1

    # The clients.

    def _call(self, name: str, *, keep: bool) -> None:
        caller = Caller(name, self.guard.port, self.files.client(name).context())
        chance = random.Random(name)
        while not self.over.is_set():
            self._ask(caller)
            if not keep or chance.random() < 0.01:
                caller.close()
        caller.close()
        with self.lock:
            self.report.requests[name] = caller.count
            self.report.slowest = max(self.report.slowest, caller.slowest)

    def _ask(self, caller: Caller) -> None:
        """One request, again where a kill cut it off, until there is an answer."""
        for _ in range(RETRIES + 1):
            began = time.monotonic()
            try:
                if not caller.connected:
                    caller.open()
                    with self.lock:
                        self.report.connections += 1
                        self.report.shown.add(caller.shown)
                answer = caller.ask()
            except (OSError, ssl.SSLError) as error:
                caller.close()
                if not self._was_doomed(caller):
                    break_ = f"{caller.name} {caller.count}: {error!r} after {time.monotonic() - began:.2f} s"
                    self.report.failed.append(break_)
                    return
                self.report.cut += 1
                continue
            if answer.status == 502 and self._none_was_up(began):
                self.report.all_down += 1
            elif answer.status != 200:
                self.report.failed.append(f"{caller.name} {caller.count}: {answer.status} {answer.body!r}")
            elif not answer.right:
                self.report.wrong.append(f"{caller.name} {caller.count}: {answer.body!r}")
            return
        self.report.failed.append(f"{caller.name} {caller.count}: cut off {RETRIES + 1} times")

    def _be_fickle(self) -> None:
        """The client whose rule comes and goes: it is answered or refused, and is never anybody else."""
        caller = Caller(FICKLE, self.guard.port, self.files.client(FICKLE).context())
        while not self.over.wait(0.02):
            began = time.monotonic()
            try:
                answer = caller.ask()
            except (OSError, ssl.SSLError) as error:
                caller.close()
                if isinstance(error, ConnectionResetError) and not self._was_doomed(caller):
                    self.ends.append(time.monotonic())
                elif not self._was_doomed(caller):
                    self.report.failed.append(f"{FICKLE}: {error!r} after {time.monotonic() - began:.2f} s")
                continue
            self.report.fickle[answer.status] += 1
            if answer.status == 200 and not answer.right:
                self.report.wrong.append(f"{FICKLE}: {answer.body!r}")
            if answer.status not in (200, 403) and not (answer.status == 502 and self._none_was_up(began)):
                self.report.failed.append(f"{FICKLE}: {answer.status} {answer.body!r}")
        caller.close()

    def _was_doomed(self, caller: Caller) -> bool:
        """Whether its connection was a killed worker's."""
        return any(port == caller.own_port and caller.opened <= when for port, when in list(self.doomed))

    def _none_was_up(self, began: float) -> bool:
        """Whether, at some time since `began`, no app was up."""
        return any(outage.end >= began for outage in list(self.outages))


def rotate(files: Files) -> None:
    """A new server certificate and key, and a bundle with another authority beside the clients'."""
    server = files.ca.server()
    server.save(files.folder, "next")
    for kind in ("key", "crt"):
        (files.folder / f"next.{kind}").rename(files.folder / f"server.{kind}")
    both = [files.ca.certificate, Ca.root("Another").certificate]
    random.shuffle(both)
    (files.folder / "next.crt").write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in both))
    (files.folder / "next.crt").rename(files.folder / "bundle.crt")


def allow(folder: Path, *, fickle: bool) -> None:
    """The rules: all clients but one, and that one or not."""
    names = (*NAMES, *([FICKLE] if fickle else []))
    (folder / "allow.next").write_text("".join(f"spiffe://test/{name}\n" for name in names))
    (folder / "allow.next").rename(folder / "allow.txt")


def chaos(folder: Path, seconds: float) -> Report:
    """Run it all for so long, and say what came of it."""
    files = Files(folder)
    rotate(files)
    allow(folder, fickle=True)
    for name in (*NAMES, FICKLE):
        files.client(name)
    with Apps(2) as apps:
        targets = ", ".join(f'"127.0.0.1:{port}"' for port in apps.ports)
        with guarding(folder, CONFIG.format(targets=targets)) as guard:
            until(lambda: len(guard.workers()) == 2, "two workers")
            report = Storm(files, guard, apps).blow(seconds)
            killed = ("signal 9", Reason.GUARD_WORKER_DIED.code)
            until(lambda: deaths(guard)[killed] >= report.kills, "the parent's word on each kill")
            until(lambda: len(guard.workers()) == 2, "two workers again")
            guard.well()
            died = deaths(guard)
            assert died.pop(killed) == report.kills
            report.halves = died.total()  # came back between the key and its certificate, and once more after
            assert {reason for _, reason in died} <= {Reason.INPUT_KEY_MISMATCH.code}, died
            assert guard.events("reload")
            until(lambda: report.ended <= len(ended_by_rule(guard)), "the log of each end by rule")
            assert {event["peer"] for event in ended_by_rule(guard)} <= {f"spiffe://test/{FICKLE}"}
    return report


def deaths(guard: Guard) -> Counter[tuple[str, str]]:
    """How its workers died, and the reasons, by the log."""
    return Counter((event["how"], event["reason"]) for event in guard.events("worker_died"))


def ended_by_rule(guard: Guard) -> list[dict[str, Any]]:
    return [event for event in guard.events("ended") if event["reason"] == Reason.ENDED_POLICY.code]


def stands_still(pid: int) -> bool:
    """Whether a process that was sent SIGSTOP has come to a stop: the signal alone does not wait for that."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZX"


@pytest.mark.timeout(600)
def test_nothing_fails_but_what_dies_with_its_worker(tmp_path: Path) -> None:
    """Under kills, crashes, rotations and changing rules no request fails but those in flight in a killed worker."""
    report = chaos(tmp_path, 60)
    assert (report.wrong, report.failed) == ([], []), str(report)
    assert min(report.requests[name] for name in NAMES) > 20, str(report)
    assert report.kills >= 3, str(report)
    assert report.cut > 0, str(report)
    assert report.crashes >= 5, str(report)
    assert len(report.shown) >= 4, str(report)
    assert {200, 403} <= set(report.fickle), str(report)


def dies(connection: socket.socket, _request: bytes) -> None:
    """An app that crashes over a request: its kernel resets the connection."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


TWO = """
[[listener]]
listen = "127.0.0.1:PORT"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "apps"

[upstream.apps]
targets = ["{first}", "{second}"]
"""


def test_a_safe_request_whose_app_crashes_is_asked_of_another(tmp_path: Path) -> None:
    """A GET on a new connection to an app that resets it is answered by the other app; the first is asked once."""
    files = Files(tmp_path)
    alice = files.client("alice")
    with App(dies) as bad, App(hello) as good:
        with guarding(tmp_path, TWO.format(first=bad.address, second=good.address)) as guard:
            got = [alice.ask(guard.port).status for _ in range(4)]
        assert got == [200] * 4
        assert bad.connections >= 1


def test_an_unsafe_request_whose_app_crashes_is_not_asked_again(tmp_path: Path) -> None:
    """A POST may have been acted on: it fails with 502, and the other app never hears of it."""
    files = Files(tmp_path)
    alice = files.client("alice")
    with App(dies) as bad, App(hello) as good:
        with guarding(tmp_path, TWO.format(first=bad.address, second=good.address)) as guard:
            got = [alice.ask(guard.port, method="POST", body=b"once").status for _ in range(4)]
        assert set(got) == {200, 502}
        assert got.count(502) == bad.connections
        assert got.count(200) == good.connections
