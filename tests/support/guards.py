"""A guard in this process, on a thread of its own, with its events at hand."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import uvloop

from handfast.guard.connection import Limits, Listener
from handfast.guard.events import EventLog
from handfast.guard.limits import Gate
from handfast.guard.listening import bind
from handfast.guard.places import Place, parse_target
from handfast.guard.routes import HTTP_ALPN, Snapshot, one_site
from handfast.guard.service import Guard
from handfast.guard.upstream import Backend, Upstreams
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.policy import ALLOW_ANY, Policy
from handfast.tls.credential import Credential
from handfast.tls.server import ServerContext, ServerSettings
from tests.support.certs import Ca, Leaf
from tests.support.waiting import PATIENCE


class Events:
    """The stream of a guard's log, as a queue of events."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self.fail = False

    def write(self, data: bytes) -> int:
        if self.fail:
            raise OSError(28, "No space left on device")
        for line in data.splitlines():
            event = json.loads(line)
            self.all.append(event)
            self._queue.put(event)
        return len(data)

    def flush(self) -> None:
        pass

    def next(self, kind: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """The next event of this kind; others before it are passed over."""
        while True:
            try:
                event = self._queue.get(timeout=timeout)
            except queue.Empty:
                raise AssertionError(f"no event {kind!r} came in {timeout:g} s: {self.all[-3:]}") from None
            if event["event"] == kind:
                return event


@dataclass
class Running:
    """A guard that runs until the `with` ends."""

    ca: Ca
    target: str
    policy: Policy = ALLOW_ANY
    server: Leaf | None = None
    limits: Limits = field(default_factory=Limits)
    drain: float = 2
    trust_domain: str | None = None
    legacy: bool = False
    tls12: bool = False
    gate: Gate | None = None
    proxy_from: tuple[IPv4Network | IPv6Network, ...] = ()
    alpn: tuple[bytes, ...] = ()  # in TCP mode

    def snapshot(self, policy: Policy | None = None, **terms: Any) -> Snapshot:
        """What is in force, or would be with other terms."""
        target = self.upstreams.target
        server = self.server or self.ca.server()
        alpn = HTTP_ALPN if target.http else self.alpn
        settings = ServerSettings(answer_refusals=target.http, allow_tls12=self.tls12, alpn=alpn)
        bundle = terms.pop("bundle", TrustBundle((self.ca.certificate,), self.trust_domain))
        asked = Terms(bundle, Purpose.CLIENT, legacy=self.legacy, **terms)
        context = ServerContext(Credential(server.key, server.presented), asked, settings)
        return Snapshot({"main": one_site(context, self.policy if policy is None else policy, self.upstreams)})

    @cached_property
    def upstreams(self) -> Upstreams:
        return Upstreams(self.target, (Backend(parse_target(self.target)),))

    def __enter__(self) -> Running:
        self.events = Events()
        started: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main(started)))
        self._thread.start()
        self.address = started.result(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the guard did not stop"

    def call(self, function: Any, *arguments: Any) -> Any:
        """Call something on the guard's loop and return what it returns."""
        done: Future[Any] = Future()
        self.loop.call_soon_threadsafe(lambda: done.set_result(function(*arguments)))
        return done.result(PATIENCE)

    def swap(self, snapshot: Snapshot) -> None:
        self.call(self.guard.swap, snapshot)

    async def _main(self, started: Future[str]) -> None:
        try:
            self.loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            log = EventLog(self.events, pretty=False)  # type: ignore[arg-type]  # as much of a stream as is used
            self.guard = Guard(self.snapshot(), log, drain=self.drain)
            listener = Listener("main", self.upstreams.target.http, self.limits, self.gate, self.proxy_from)
            started.set_result(await self.guard.listen(bind(Place("127.0.0.1", 0)), listener))
        except BaseException as error:
            started.set_exception(error)
            raise
        await self._stop.wait()
        await self.guard.stop()
        log.close()
