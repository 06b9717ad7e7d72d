"""A guard in processes of its own under stress, apps that come and go, and clients that notice every wrong word."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import uvloop

from tests.support.programs import HANDFAST, environment, free_port
from tests.support.waiting import PATIENCE as WAIT
from tests.support.waiting import until

PATIENCE = 60.0  # seconds that a client waits: the queue of a dead worker is served by its next life
_TICKS = os.sysconf("SC_CLK_TCK")


# The guard.


@dataclass
class Guard:
    """`handfast guard -c` whose log goes to a file or wherever it is told to."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[int]:
        """Its processes but the first, by what the kernel says."""
        return [int(word) for word in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def resident(self) -> int:
        """Bytes of memory that it holds, with its workers."""
        return sum(_status(pid, "VmRSS") * 1024 for pid in (self.pid, *self.workers()))

    def processor(self) -> float:
        """Seconds of processor that it has used, with its workers."""
        return sum(_processor(pid) for pid in (self.pid, *self.workers()))

    def descriptors(self) -> int:
        """How many files it has open, in its first process."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def clients_of(self, pid: int) -> set[int]:
        """The ports of the clients whose connections one of its processes has accepted. Stop the process before."""
        inodes = set()
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
            except FileNotFoundError:
                continue
        rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
        here = f":{self.port:04X}"
        return {int(row[2][-4:], 16) for row in rows if row[1].endswith(here) and f"socket:[{row[9]}]" in inodes}

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind in its log so far."""
        mark = b'"event":"%b"' % kind.encode()
        found = []
        with self.log.open("rb") as lines:
            for line in lines:
                if mark in line.replace(b'": "', b'":"') and line.endswith(b"\n"):
                    found.append(json.loads(line))
        return found

    def well(self) -> None:
        """Assert that nothing in it went wrong that should not."""
        assert self.process.poll() is None, "the guard ended"
        assert self.events("bug") == []
        assert [event for event in self.events("ended") if event["reason"] == "bug"] == []


@contextmanager
def guarding(
    folder: Path, config: str, *, out: int | IO[bytes] | None = None, limits: dict[int, int] | None = None
) -> Iterator[Guard]:
    """Run a guard with this configuration, where PORT stands for a free port, until the `with` ends.

    `out` takes its log in place of the file `guard.log`; `limits` are those of its processes (setrlimit(2)).
    """
    port = free_port()
    (folder / "handfast.toml").write_text('log = "json"\n' + config.replace("PORT", str(port)))
    log = folder / "guard.log"
    words: tuple[str, ...] = (*HANDFAST, "guard", "-c", str(folder / "handfast.toml"))
    for number, limit in (limits or {}).items():
        words = ("prlimit", f"--{_LIMITS[number]}={limit}:{limit}", *words)
    with log.open("wb") as file, (folder / "guard.err").open("wb") as errors:
        process = subprocess.Popen(
            words, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=file if out is None else out,
            stderr=errors, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or _listens(port), "a guard that listens")
        assert process.poll() is None, (folder / "guard.err").read_text() + log.read_text(errors="replace")
        yield Guard(process, port, log)
        process.terminate()
        code = process.wait(WAIT)
        assert (code, (folder / "guard.err").read_text()) == (0, "")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_LIMITS = {7: "nofile", 1: "fsize"}  # RLIMIT_NOFILE, RLIMIT_FSIZE


def _listens(port: int) -> bool:
    """Whether somebody does, without the connection that asking would be."""
    here = f":{port:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[1].endswith(here) and row[3] == "0A" for row in rows)


def _status(pid: int, what: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(what)), 0)


def _processor(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(words[11]) + int(words[12])) / _TICKS


# The apps.


class Apps:
    """Apps on one thread that answer each request with the identity that it came with, and its target.

    `stop` ends one as a crash does: what it had open is reset. `start` brings it back at the same port.
    """

    def __init__(self, count: int) -> None:
        self.ports = [free_port() for _ in range(count)]
        self.answered = 0

    def __enter__(self) -> Apps:
        self._servers: dict[int, asyncio.Server] = {}
        self._open: dict[int, set[_Echo]] = {port: set() for port in self.ports}
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main(ready)))
        self._thread.start()
        ready.result(WAIT)
        for port in self.ports:
            self.start(port)
        return self

    def __exit__(self, *_: object) -> None:
        for port in self.ports:
            self.stop(port)
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(WAIT)

    def start(self, port: int) -> None:
        asyncio.run_coroutine_threadsafe(self._start(port), self._loop).result(WAIT)

    def stop(self, port: int) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(port), self._loop).result(WAIT)

    async def _main(self, ready: Future[None]) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        ready.set_result(None)
        await self._ended.wait()
        await asyncio.sleep(0.05)

    async def _start(self, port: int) -> None:
        make = lambda: _Echo(self, self._open[port])  # noqa: E731  # one line, used once
        self._servers[port] = await self._loop.create_server(make, "127.0.0.1", port, backlog=4096)

    async def _stop(self, port: int) -> None:
        if (server := self._servers.pop(port, None)) is not None:
            server.close()
        for echo in list(self._open[port]):
            echo.transport.abort()


class _Echo(asyncio.Protocol):
    """One connection to an app."""

    transport: asyncio.Transport

    def __init__(self, apps: Apps, among: set[_Echo]) -> None:
        self._apps, self._among, self._pending = apps, among, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's are no subclasses of asyncio's
        self._among.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._among.discard(self)

    def data_received(self, data: bytes) -> None:
        self._pending += data
        while (end := self._pending.find(b"\r\n\r\n")) >= 0:
            head = self._pending[:end]
            length = _after(head.lower(), b"content-length: ")
            whole = end + 4 + int(length or 0)
            if len(self._pending) < whole:
                return
            self._pending = self._pending[whole:]
            body = (_after(head, b"Client-Identity: ") or b"nobody") + b" " + head.split(b" ", 2)[1]
            self._apps.answered += 1
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def _after(head: bytes, mark: bytes) -> bytes:
    begin = head.find(b"\r\n" + mark)
    return b"" if begin < 0 else head[begin + 2 + len(mark) :].partition(b"\r\n")[0]


# The clients.


@dataclass(frozen=True)
class Answer:
    """One answer. `right`: it is the app's, to this client and this very request."""

    status: int
    body: bytes
    right: bool


@dataclass
class Caller:
    """A client that is somebody, with one connection at a time."""

    name: str
    port: int
    context: ssl.SSLContext
    opened: float = 0.0  # when its connection began, on the clock of `monotonic`
    own_port: int = 0
    slowest: float = 0.0  # seconds from a connection's beginning to the end of its handshake
    count: int = 0
    _tls: ssl.SSLSocket | None = None
    _pending: bytes = b""

    def open(self) -> None:
        """Connect anew. Raises OSError."""
        self.close()
        self.opened, self.own_port = time.monotonic(), 0
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as plain:
            self.own_port = plain.getsockname()[1]
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tls = self.context.wrap_socket(plain, server_hostname="localhost")
        self.slowest = max(self.slowest, time.monotonic() - self.opened)

    @property
    def connected(self) -> bool:
        return self._tls is not None

    @property
    def shown(self) -> bytes:
        """The certificate that the guard showed, in DER."""
        assert self._tls is not None
        return self._tls.getpeercert(binary_form=True) or b""

    def close(self) -> None:
        tls, self._tls, self._pending = self._tls, None, b""
        if tls is not None:
            tls.close()

    def ask(self) -> Answer:
        """One request; on the open connection, or else on a new one. Raises OSError."""
        return self.ask_many(1)[0]

    def ask_many(self, many: int, bodies: bool = False) -> list[Answer]:
        """Some requests at once, without waiting for the answers between them. Raises OSError.

        `bodies`: every other one is a POST, whose body looks like a request of somebody else's.
        """
        if self._tls is None:
            self.open()
        assert self._tls is not None
        targets = []
        requests = []
        for _ in range(many):
            self.count += 1
            target = b"/%b/%d" % (self.name.encode(), self.count)
            targets.append(target)
            if bodies and self.count % 2:
                body = b"GET /stolen HTTP/1.1\r\nHost: localhost\r\nClient-Identity: nobody\r\n\r\n"
                head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                requests.append(head % (target, len(body), body))
            else:
                requests.append(b"GET %b HTTP/1.1\r\nHost: localhost\r\nClient-Identity: nobody\r\n\r\n" % target)
        self._tls.sendall(b"".join(requests))
        return [self._answer(target) for target in targets]

    def _answer(self, target: bytes) -> Answer:
        """Read an answer. Raises OSError."""
        while (end := self._pending.find(b"\r\n\r\n")) < 0:
            self._read()
        head = self._pending[:end]
        length = int(_after(head, b"Content-Length: "))
        while len(self._pending) < end + 4 + length:
            self._read()
        body, self._pending = self._pending[end + 4 : end + 4 + length], self._pending[end + 4 + length :]
        if b"\r\nConnection: close" in head:
            self.close()
        expected = b'"spiffe://test/%b" %b' % (self.name.encode(), target)
        return Answer(int(head[9:12]), body, body == expected)

    def _read(self) -> None:
        if self._tls is None:
            raise ConnectionResetError("closed before the answer")
        piece = self._tls.recv(1 << 16)
        if not piece:
            raise ConnectionResetError("closed before the answer")
        self._pending += piece
