"""The guard as processes: workers that die and come back, a drain, a hand-over, and systemd."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.guard_kit import Files, Guarded, Load, admin_get, apps, guarding, metric
from tests.support.apps import App, hello
from tests.support.programs import Child, environment, free_port, handfast
from tests.support.waiting import PATIENCE as WAIT
from tests.support.waiting import until

CONFIG = """
[admin]
listen = "127.0.0.1:{admin}"

[[listener]]
name = "main"
listen = "{listen}"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "{to}"
"""


def config(admin: int, to: str, listen: str = "127.0.0.1:0") -> str:
    return CONFIG.format(admin=admin, to=to, listen=listen)


def pids(admin: int) -> dict[int, int]:
    """The process of each worker, by its number."""
    workers = json.loads(admin_get(admin, "/status")[1])["state"]["workers"]
    return {worker["worker"]: worker["pid"] for worker in workers}


def test_both_of_two_workers_serve(tmp_path: Path) -> None:
    """Connections are spread over both; /metrics adds up what they count; /readyz, /status and `handfast status`
    speak for the whole.
    """
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    with App() as app, guarding(tmp_path, config(admin, app.address), top="workers = 2\n") as guard:
        until(lambda: len(pids(admin)) == 2, "two workers")
        before = [metric(admin, f'handfast_worker_open_fds{{worker="{number}"}}') for number in (0, 1)]
        lines = [alice.line(guard.port) for _ in range(16)]
        for line in lines:
            assert line.__enter__().ask().status == 200
        handshakes = 'handfast_handshakes_total{listener="main",outcome="accept"'
        until(lambda: metric(admin, handshakes) == 16, "a count of 16")
        assert metric(admin, 'handfast_connections{listener="main"}') == 16
        after = [metric(admin, f'handfast_worker_open_fds{{worker="{number}"}}') for number in (0, 1)]
        assert all(now > then for now, then in zip(after, before, strict=True)), (before, after)
        assert admin_get(admin, "/readyz") == (200, b'{"ready":true,"reasons":[]}\n')
        shown = handfast("status", "--once", "--admin", f"127.0.0.1:{admin}", folder=tmp_path)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "2 workers" in shown.stdout
        assert f"127.0.0.1:{guard.port}" in shown.stdout
        for line in lines:
            line.__exit__(None, None, None)


def test_a_worker_that_is_killed_comes_back(tmp_path: Path) -> None:
    """After kill -9 of a worker it is started again, nobody who connects is refused meanwhile, and counts stay."""
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    with App() as app, guarding(tmp_path, config(admin, app.address), top="workers = 2\n") as guard:
        until(lambda: len(pids(admin)) == 2, "two workers")
        first = pids(admin)
        cut: list[OSError] = []

        def call() -> None:
            try:
                assert alice.ask(guard.port).status == 200
            except ConnectionRefusedError:
                raise
            except OSError as error:
                cut.append(error)  # it was with the worker that died

        with Load(call, clients=3) as load:
            load.goes_on()
            os.kill(first[0], signal.SIGKILL)
            died = guard.next("worker_died")
            assert (died["worker"], died["pid"], died["reason"]) == (0, first[0], "guard.worker_died")
            load.goes_on(20)
            until(lambda: pids(admin).get(0, first[0]) != first[0], "another worker")
            load.goes_on(20)
        assert load.failures == []
        assert len(cut) <= 3
        assert pids(admin)[1] == first[1]
        assert admin_get(admin, "/readyz")[0] == 200


def test_a_worker_that_comes_back_has_the_settings_of_today(tmp_path: Path) -> None:
    """It takes the file as it is now; while that is broken, or needs a restart, what the others took last."""
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    with apps("first", "second", "third") as (first, second, third):
        path, top = tmp_path / "handfast.toml", 'log = "json"\nworkers = 2\n'

        def kill_both() -> None:
            for number, pid in pids(admin).items():
                os.kill(pid, signal.SIGKILL)
                guard.next("worker_died", pid=pid)
                until(lambda number=number, pid=pid: pids(admin).get(number, pid) != pid, "another worker")  # type: ignore[misc]  # bound to this turn's

        def answers() -> set[bytes]:
            return {alice.ask(guard.port).body for _ in range(8)}

        with guarding(tmp_path, config(admin, first.address), top="workers = 2\n") as guard:
            until(lambda: len(pids(admin)) == 2, "two workers")
            path.write_text(top + config(admin, second.address))
            for _ in range(2):
                guard.next("reload", outcome="taken")
            path.write_text(top.replace("2", "3") + config(admin, third.address))
            for _ in range(2):
                assert guard.next("reload", outcome="kept")["reason"] == "guard.restart"
            kill_both()
            assert answers() == {b"second"}
            path.write_text(top + config(admin, third.address))
            for _ in range(2):
                guard.next("reload", outcome="taken")
            assert answers() == {b"third"}


class Slow:
    """An app that answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()

    def __call__(self, connection: socket.socket, request: bytes) -> None:
        self.asked.set()
        assert self.go_on.wait(WAIT)
        hello(connection, request)


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_drains(tmp_path: Path, workers: int) -> None:
    """On SIGTERM what is under way is finished, new connections are refused, /readyz says so, and it ends with 0."""
    files, admin, slow = Files(tmp_path), free_port(), Slow()
    alice = files.client()
    with App(slow) as app, guarding(tmp_path, config(admin, app.address), top=f"workers = {workers}\n") as guard:
        with alice.line(guard.port) as line:
            line.tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert slow.asked.wait(WAIT)
            guard.send(signal.SIGTERM)
            until(lambda: refuses(guard.port), "a closed door")
            until(lambda: admin_get(admin, "/readyz")[0] == 503, "503 of /readyz")
            assert b"draining" in admin_get(admin, "/readyz")[1]
            drain = json.loads(admin_get(admin, "/status")[1])["draining"]
            assert 0 < drain["seconds_left"] <= 30
            slow.go_on.set()
            assert line.answer().status == 200
        assert guard.child._process.wait(WAIT) == 0


def test_a_drain_has_an_end(tmp_path: Path) -> None:
    """What is not finished when the drain is over is cut off; a second SIGTERM does not wait for it."""
    files, admin, slow = Files(tmp_path), free_port(), Slow()
    alice = files.client()
    with App(slow) as app:
        for top in ('drain = "1s"\n', 'drain = "1s"\nworkers = 2\n'):
            with guarding(tmp_path, config(admin, app.address), top=top) as guard, alice.line(guard.port) as line:
                line.tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert slow.asked.wait(WAIT)
                guard.send(signal.SIGTERM)
                assert guard.next("request")["reason"] == "ended.stopped"
                assert guard.child._process.wait(WAIT) == 0
                assert line.ends_within(1)
            slow.asked.clear()
        slow.go_on.set()


def refuses(port: int) -> bool:
    """Whether nobody listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), WAIT).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass
    return False


@contextmanager
def successor(guard: Guarded) -> Iterator[int]:
    """The process that takes over at SIGUSR2, once it serves; it is ended with the `with`."""
    guard.send(signal.SIGUSR2)
    pid = guard.next("handed_over")["pid"]
    try:
        assert guard.child._process.wait(WAIT) == 0
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hand_over_refuses_nobody(tmp_path: Path, workers: int) -> None:
    """On SIGUSR2 a new process takes the sockets and serves with the file of now; nobody who connects, before,
    meanwhile or after, is refused; what the old one has under way is finished.
    """
    files, admin, slow = Files(tmp_path), free_port(), Slow()
    alice = files.client()
    with App(slow) as app, apps("after") as (after,):
        top = f"workers = {workers}\n"
        with guarding(tmp_path, config(admin, app.address), top=top) as guard, alice.line(guard.port) as line:
            line.tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert slow.asked.wait(WAIT)
            text = config(admin, after.address).replace('"127.0.0.1:0"', f'"127.0.0.1:{guard.port}"')
            (tmp_path / "handfast.toml").write_text('log = "json"\nworkers = 3\n' + text)
            slow.go_on.set()

            def call() -> None:
                assert alice.ask(guard.port).status == 200

            with Load(call) as load:
                load.goes_on()
                with successor(guard) as pid:
                    load.goes_on()
                    assert pid != guard.pid
                    assert line.answer().status == 200
                    assert alice.ask(guard.port).body == b"after"
                    until(lambda: len(pids(admin)) == 3, "three workers")
                    assert len(guard.events("ready")) == 2
                    load.__exit__()
        assert load.failures == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_hand_over_fails_no_request_on_a_kept_connection(tmp_path: Path, workers: int) -> None:
    """Clients that ask again and again on one connection are told with an answer that it closes, and never by an end in
    its place; their next connection is the new process's.
    """
    files, admin = Files(tmp_path), free_port()
    alice, kept, told = files.client(), threading.local(), []
    with App() as app:
        top = f"workers = {workers}\n"
        with guarding(tmp_path, config(admin, app.address), top=top) as guard:
            text = config(admin, app.address).replace('"127.0.0.1:0"', f'"127.0.0.1:{guard.port}"')
            (tmp_path / "handfast.toml").write_text(f'log = "json"\n{top}{text}')

            def call() -> None:
                if not hasattr(kept, "stack"):
                    kept.stack = ExitStack()
                    kept.line = kept.stack.enter_context(alice.line(guard.port))
                got = kept.line.ask(method="POST", body=b"once")
                assert got.status == 200
                if got.headers["Connection"] == "close":
                    told.append(got)
                    kept.stack.close()
                    del kept.stack

            with Load(call, clients=4) as load:
                load.goes_on(100)
                with successor(guard):
                    load.goes_on(100)
                    load.__exit__()
        assert load.failures == []
        assert len(told) == 4, "each was told once"


def test_a_hand_over_that_fails_changes_nothing(tmp_path: Path) -> None:
    """A new process that cannot start says why in the log of the old one, which serves on."""
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    with App() as app, guarding(tmp_path, config(admin, app.address), complains=True) as guard:
        path = tmp_path / "handfast.toml"
        good = path.read_text()
        path.write_text(good + "clientca = 1\n")
        guard.send(signal.SIGUSR2)
        failed = guard.next("hand_over_failed")
        assert failed["reason"] == "guard.handover"
        assert "clientca" in failed["detail"]
        assert alice.ask(guard.port).status == 200
        path.write_text(good)
        with successor(guard):
            assert alice.ask(guard.port).status == 200


LAUNCHER = """
import os, socket, sys
os.dup2(socket.create_server(("127.0.0.1", int(sys.argv[1]))).detach(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), WATCHDOG_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="web")
os.execv(sys.executable, [sys.executable, "-m", "handfast", *sys.argv[2:]])
"""


class Systemd:
    """What systemd is to a service: who makes its socket, and who is told things on another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(folder / "notify.sock"))
        self.notify.settimeout(WAIT)

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self.notify.close()

    @contextmanager
    def service(self) -> Iterator[Guarded]:
        """Start the guard as a service that was activated by its socket."""
        env = environment(NOTIFY_SOCKET=str(self.folder / "notify.sock"), WATCHDOG_USEC="1000000")
        launcher = self.folder / "launcher.py"
        launcher.write_text(LAUNCHER)
        words = (sys.executable, "launcher.py", str(self.port), "guard", "-c", "handfast.toml")
        with Child(words, self.folder, env, merge=False) as child:
            guard = Guarded(child, json.loads(child.line('"event": "ready"')))
            yield guard
            assert child.stop() == 0
            assert child.errors == []

    def next(self, state: str) -> dict[str, str]:
        """The next message that says this; others before it are passed over."""
        while True:
            message = self.notify.recv(4096).decode()
            said = dict(line.split("=", 1) for line in message.splitlines())
            if state in said:
                return said


@pytest.mark.parametrize("workers", [1, 2])
def test_systemd_starts_it_and_is_told(tmp_path: Path, workers: int) -> None:
    """With a socket of systemd's it serves on that one, and tells READY, WATCHDOG, RELOADING and STOPPING."""
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    with App() as app, Systemd(tmp_path) as systemd:
        text = config(admin, app.address, "systemd:web")
        (tmp_path / "handfast.toml").write_text(f'log = "json"\nworkers = {workers}\n{text}')
        with systemd.service() as guard:
            assert systemd.next("READY") == {"READY": "1"}
            assert alice.ask(systemd.port).status == 200
            assert systemd.next("WATCHDOG") == {"WATCHDOG": "1"}
            guard.send(signal.SIGHUP)
            reloading = systemd.next("RELOADING")
            assert int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
            systemd.next("READY")
            guard.send(signal.SIGTERM)
            assert systemd.next("STOPPING") == {"STOPPING": "1"}
            assert guard.child._process.wait(WAIT) == 0
    assert guard.ready["url"] == f"https://127.0.0.1:{systemd.port}"


def test_a_socket_that_systemd_did_not_make(tmp_path: Path) -> None:
    """Without the socket that is asked for it ends with exit 2 and says which one is missing."""
    Files(tmp_path)
    (tmp_path / "handfast.toml").write_text(config(free_port(), "127.0.0.1:9", "systemd:web"))
    done = handfast("guard", "-c", "handfast.toml", folder=tmp_path)
    assert done.returncode == 2
    assert "systemd gave no socket called web [guard.sockets]" in done.stderr
