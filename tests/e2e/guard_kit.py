"""`handfast guard` as its user runs it: a child with a configuration, its events, and clients that call it."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPMessage, HTTPResponse
from pathlib import Path
from typing import Any

from tests.support.apps import Answer as AppAnswer
from tests.support.apps import App
from tests.support.certs import Ca, Leaf
from tests.support.programs import HANDFAST, Child
from tests.support.waiting import PATIENCE as WAIT
from tests.support.waiting import Stopwatch, until

LIMIT = 2.0  # seconds in which the end of trust takes effect
JSON = 'log = "json"\n'


@dataclass
class Files:
    """A folder with a server's certificate, its authority, and clients' certificates as they are asked for."""

    folder: Path
    ca: Ca = field(default_factory=Ca.root)
    clients: dict[str, Leaf] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ca.save(self.folder, "ca")
        self.ca.server().save(self.folder, "server")

    def server(self, name: str, *names: str, ca: Ca | None = None) -> None:
        """Write NAME.crt and NAME.key for a server of these names."""
        (ca or self.ca).server(*names).save(self.folder, name)

    def client(self, name: str = "alice", ca: Ca | None = None, **spec: Any) -> Client:
        """A client whose certificate is for spiffe://test/NAME, in NAME.crt."""
        if name not in self.clients:
            self.clients[name] = (ca or self.ca).client(f"spiffe://test/{name}", **spec)
            self.clients[name].save(self.folder, name)
        return Client(self.folder / "ca.crt", self.folder / f"{name}.crt", self.folder / f"{name}.key")

    @property
    def nobody(self) -> Client:
        """A client without a certificate."""
        return Client(self.folder / "ca.crt")


@dataclass(frozen=True)
class Got:
    """One answer. `error`: the code in a refusal's body."""

    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def error(self) -> tuple[int, str]:
        return self.status, json.loads(self.body)["error"]

    @property
    def lines(self) -> dict[str, str]:
        """The headers that an app which echoes its request's head was sent, by their names in lower case."""
        pairs = (line.split(": ", 1) for line in self.body.decode("latin-1").split("\r\n")[1:])
        return {name.lower(): value for name, value in pairs}


@dataclass
class Line:
    """An open connection on which requests are sent one after another."""

    tls: ssl.SSLSocket
    host: str

    def ask(self, path: str = "/", *headers: str, method: str = "GET", host: str = "", body: bytes = b"") -> Got:
        """Send a request and read its answer."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host or self.host}", *headers]
        lines += [f"Content-Length: {len(body)}"] if body else []
        self.tls.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return self.answer(method)

    def answer(self, method: str = "GET") -> Got:
        """Read an answer."""
        with HTTPResponse(self.tls, method=method) as response:
            response.begin()
            return Got(response.status, response.headers, response.read())

    def ends_within(self, seconds: float) -> bool:
        """Whether the guard closes the connection in time (of a machine that goes on), without a word before."""
        self.tls.settimeout(WAIT)
        with Stopwatch() as watch:
            try:
                if self.tls.recv(1 << 16) != b"":
                    return False
            except TimeoutError:
                return False
            except (ConnectionResetError, ssl.SSLError):
                pass
        return watch.seconds < seconds

    @property
    def shown(self) -> bytes:
        """The certificate that the guard showed, in DER."""
        der = self.tls.getpeercert(binary_form=True)
        assert der is not None
        return der


@dataclass(frozen=True)
class Client:
    """A client with the files that it was given."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, issued: dict[str, Any]) -> Client:
        """The one whose files `handfast issue --json` named."""
        return cls(Path(issued["ca"]), Path(issued["cert"]), Path(issued["key"]))

    def context(self, *, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.maximum_version = newest
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key)
        return context

    @contextmanager
    def line(
        self,
        port: int,
        name: str | None = "localhost",
        before: bytes = b"",
        newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        checked: bool = True,
    ) -> Iterator[Line]:
        """Open a connection; `name` None sends no server name, `before` is sent in front of the handshake.

        `checked`: whether the certificate must be for the name.
        """
        context = self.context(newest=newest)
        context.check_hostname = checked and name is not None
        with socket.create_connection(("127.0.0.1", port), WAIT) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a request waits 40 ms for an ACK
            if before:
                plain.sendall(before)
            with context.wrap_socket(plain, server_hostname=name) as tls:
                yield Line(tls, name or "localhost")

    def ask(self, port: int, path: str = "/", *headers: str, name: str | None = "localhost", **more: Any) -> Got:
        """One request on a connection of its own."""
        with self.line(port, name) as line:
            return line.ask(path, "Connection: close", *headers, **more)


@dataclass
class Guarded:
    """A guard that runs as a child: its first event and those to come."""

    child: Child
    ready: dict[str, Any]

    @property
    def pid(self) -> int:
        return self.child._process.pid

    @property
    def port(self) -> int:
        """The port of its first listener."""
        return self.ports[self.ready["listeners"][0]["name"]]

    @property
    def ports(self) -> dict[str, int]:
        """The ports of its listeners, by name."""
        return {one["name"]: int(one["url"].rpartition(":")[2]) for one in self.ready["listeners"]}

    def next(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next event of this kind and with these fields; others before it are passed over."""
        while True:
            event: dict[str, Any] = json.loads(self.child.line())
            if event["event"] == kind and all(event.get(name) == value for name, value in fields.items()):
                return event

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind so far."""
        return [event for event in map(json.loads, list(self.child.lines)) if event["event"] == kind]

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.child._process.send_signal(number)


@contextmanager
def guarding(
    folder: Path, config: str | None, *words: str | Path, top: str = "", complains: bool = False
) -> Iterator[Guarded]:
    """`handfast guard`, with a file or with flags, from its ready line to a clean end.

    `config` is the file's text, `top` what stands at the top level of it. Without one, `words` are the flags.
    `complains`: something may be said on standard error.
    """
    if config is not None:
        (folder / "handfast.toml").write_text(JSON + top + config)
        words = ("-c", folder / "handfast.toml", *words)
    else:
        words = (*words, "--listen", "127.0.0.1:0", "--json")
    with Child((*HANDFAST, "guard", *words), folder, merge=False) as child:
        ready = json.loads(child.line('"event": "ready"|"error"'))  # of several workers, one may have its say before
        assert ready.get("event") == "ready", (ready, child.errors)
        guard = Guarded(child, ready)
        yield guard
        code = child.stop()
    assert code == 0, child.errors
    assert complains or not child.errors, child.errors
    assert "stopped" in {json.loads(line)["event"] for line in child.lines}
    assert guard.events("bug") == []
    assert not [event for event in guard.events("ended") if event["reason"] == "bug"]


def named(name: str) -> AppAnswer:
    """What an app answers with that says its name."""

    def answer(connection: socket.socket, _request: bytes) -> None:
        body = name.encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    return answer


@contextmanager
def apps(*names: str) -> Iterator[list[App]]:
    """Apps that say their names."""
    running = [App(named(name)) for name in names]
    for app in running:
        app.__enter__()
    try:
        yield running
    finally:
        for app in running:
            app.__exit__()


@dataclass
class Load:
    """Clients that call without pause, each on connections of its own, until the `with` ends."""

    call: Callable[[], None]
    clients: int = 2
    calls: int = 0
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT)

    def goes_on(self, more: int = 10) -> None:
        """Wait until so many more calls were made."""
        before = self.calls
        until(lambda: self.calls >= before + more or self.failures, f"{more} more calls", 2 * WAIT)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.call()
            except (OSError, AssertionError, ValueError) as error:
                self.failures.append(repr(error))
                return
            self.calls += 1


def metric(admin: int | str, pattern: str) -> float:
    """The sum of the samples whose line begins with `pattern`, as /metrics has them."""
    text = admin_get(admin, "/metrics")[1].decode()
    lines = [line for line in text.splitlines() if line.startswith(pattern)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def admin_get(port: int | str, path: str) -> tuple[int, bytes]:
    """Ask an admin listener for something."""
    with socket.create_connection(("127.0.0.1", int(port)), WAIT) as plain:
        plain.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with HTTPResponse(plain) as response:
            response.begin()
            return response.status, response.read()
