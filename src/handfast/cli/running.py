"""How a guard is run from the command line: its sockets, its process or processes, and how each begins and ends.

run(config) -> sockets (bound, inherited or systemd's) -> privileges dropped -> one process, or workers
a process   -> Assembly -> Guard -> signals: TERM and INT drain, HUP reloads, USR2 hands over
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from time import monotonic, time
from typing import Any

import click

from handfast.cli.output import print_json
from handfast.cli.starting import doubts, next_doubt, silent_apps
from handfast.errors import Failure, HandfastError, Reason, Unreachable
from handfast.guard import handover, systemd
from handfast.guard.admin import Admin, AdminFacts, Drain, Reports, send_state, status_of, unready_for
from handfast.guard.assembly import Assembly
from handfast.guard.connection import Listener
from handfast.guard.events import EventLog, told
from handfast.guard.health import HealthChecks
from handfast.guard.listening import bind, bind_shared
from handfast.guard.metrics import Metrics, State
from handfast.guard.places import Place, parse_place
from handfast.guard.routes import Snapshot
from handfast.guard.sandbox import confine, drop_privileges, forbid_core_dumps, refuse_calls, runtime_paths
from handfast.guard.schema import Config, Mode
from handfast.guard.service import Guard, raise_descriptor_limit
from handfast.guard.upstream import Upstreams
from handfast.guard.workers import Plan, Worker, auto_workers, deal, supervise

_ADMIN = "admin"  # what the admin socket is called among those handed over
_PULSE = 0.5  # seconds between two reports of a worker
_LONGER = 5.0  # seconds that workers have, on top of what their connections have

# What Python loads where it is first used, which may be in a folder that is not the user's to read.
_LOADED_LATE = (
    *("concurrent.futures.thread", "encodings.idna", "uvloop"),
    *("prometheus_client.exposition", "prometheus_client.metrics_core", "prometheus_client.registry"),
)
_LOADED_WITH_STATE = ("handfast.cli.feed", "importlib.metadata", "sqlalchemy.dialects.sqlite")

Make = Callable[[], AbstractContextManager[Assembly]]
Ready = Callable[[list[str]], dict[str, object]]
ReadyOrNot = Callable[[list[str], Sequence[str]], dict[str, object]]


@dataclass(frozen=True, slots=True)
class Serving:
    """One process's guard: what it needs to run.

    `listeners` come with sockets that are bound already, so that nothing is issued for a port that is taken. `ready`
    is told the URLs, says what there is to say, and returns the ready event.
    """

    snapshot: Snapshot
    listeners: tuple[tuple[Listener, socket.socket], ...]
    ready: Ready
    as_json: bool
    refresh: Callable[[datetime], Snapshot | None] | None = None
    drain: float = 30.0
    assembly: Assembly | None = None
    admin: socket.socket | None = None
    worker: Worker | None = None
    log_lock: int | None = None
    sockets: Mapping[str, list[socket.socket]] = field(default_factory=dict)  # to hand over, by name


def serve(serving: Serving) -> int:
    """Run a guard until SIGINT or SIGTERM, then drain. Raises Unreachable when it cannot listen."""
    raise_descriptor_limit()
    index = None if serving.worker is None else serving.worker.index
    log = EventLog(sys.stdout.buffer, pretty=not serving.as_json, lock=serving.log_lock, worker=index)
    try:
        _loop(_Process(serving, log).run())
    finally:
        log.close()
    return 0


@dataclass(frozen=True, slots=True)
class Telling:
    """How a guard speaks to who started it. `ready` is told the URLs, and what is doubtful.

    `by_file`: whether its settings stand in a file, which remedies then name.
    """

    ready: ReadyOrNot
    as_json: bool
    by_file: bool = False
    doubts: tuple[str, ...] = ()

    def say(self, urls: list[str]) -> dict[str, object]:
        """See `Serving.ready`."""
        return self.ready(urls, self.doubts)


def run(config: Config, make: Make, telling: Telling) -> int:
    """Run what a configuration says, until a signal ends it; return the exit code. Raises HandfastError."""
    count = config.workers or auto_workers()
    # What is wrong is said before anything is bound. But a ledger belongs to one user, who we are only then.
    early = config.user is None or config.state is None
    tried = _tried(make) if early else None
    sockets = _sockets(config, count, telling.by_file)
    admin = sockets.get(_ADMIN, [None])[0]
    try:
        become_user(config)
        forbid_core_dumps()
        upstreams, said = tried or _tried(make)
    except HandfastError:
        _close(sockets)
        raise
    telling = replace(telling, doubts=(*said, *(() if telling.as_json else silent_apps(upstreams))))
    if count > 1:
        return _run_workers(config, make, telling, (count, sockets, admin))
    with _confined(config, make, alone=True) as assembly:
        return serve(_serving(assembly, sockets, telling, admin=admin))


def become_user(config: Config) -> None:
    """Give up root's rights, where the configuration names a user. Raises HandfastError (GUARD_PRIVILEGES)."""
    if config.user is None:
        return
    for name in (*_LOADED_LATE, *(() if config.state is None else _LOADED_WITH_STATE)):
        import_module(name)
    drop_privileges(config.user, config.group)


def _tried(make: Make) -> tuple[list[Upstreams], list[str]]:
    """Build once, to know that it can be done; return the apps, and what is doubtful. Raises HandfastError."""
    now = datetime.now(UTC)
    with make() as assembly:
        snapshot, upstreams = assembly.build(now), assembly.upstreams()
        return upstreams, doubts(snapshot, upstreams, now)


def _run_workers(
    config: Config, make: Make, telling: Telling, what: tuple[int, dict[str, list[socket.socket]], socket.socket | None]
) -> int:
    count, sockets, admin = what
    dealt = {listener.name: deal(sockets[listener.name], count) for listener in config.listeners}
    lock = _log_lock()
    log = _ParentLog(telling.as_json, lock)
    names = {name: _address(sockets[name][0]) for name in dealt}

    def work(worker: Worker) -> int:
        own = {name: hands[worker.index] for name, hands in dealt.items()}
        with _confined(config, make) as assembly:
            quiet = replace(telling, ready=lambda urls, told: {})
            return serve(_serving(assembly, own, quiet, worker=worker, log_lock=lock))

    def oversee(worker: Worker) -> int:
        assert worker.report is not None
        assert admin is not None
        with _confined(config, make) as assembly:
            _loop(_serve_admin(assembly, worker, admin, names))
        return 0

    def say(event: str, fields: dict[str, Any]) -> None:
        if event == "serving":
            http = {listener.name: listener.mode is Mode.HTTP for listener in config.listeners}
            log.ready(telling.say([_as_url(http[name], address) for name, address in names.items()]))
        log.emit(event, fields)

    hands = [[plug for name in dealt for plug in dealt[name][index]] for index in range(count)]
    plan = Plan(
        run=work,
        sockets=hands,
        say=say,
        admin=None if admin is None else oversee,
        admin_sockets=() if admin is None else (admin,),
        begin_hand_over=lambda: handover.begin(sockets, handover.own_command(), os.environ),
        drain=config.drain.total_seconds() + _LONGER,
    )
    code = supervise(plan)
    log.stopped()
    return code


class _Process:
    """A guard in this process, with all that surrounds it."""

    def __init__(self, serving: Serving, log: EventLog) -> None:
        self._serving = serving
        self._log = log
        metrics = Metrics(0 if serving.worker is None else serving.worker.index)
        by_file = serving.assembly is not None and serving.assembly.source is not None
        self._guard = Guard(serving.snapshot, log, serving.drain, self._refresh, metrics, by_file=by_file)
        self._snapshots = 0  # how many were in force
        self._doubts: list[str] = []
        self._doubt_again: datetime | None = None  # when time alone may make something doubtful
        self._doubt(serving.snapshot, self._guard.now)
        self._stop = asyncio.Event()
        self._connections_at_stop = 0
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly

    async def run(self) -> None:
        serving, guard = self._serving, self._guard
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: _report(guard, context))
        self._handle_signals(loop)
        urls = []
        for listener, plug in serving.listeners:
            urls.append(_as_url(listener.http, await guard.listen(plug, listener)))
        self._note_snapshot()
        health = HealthChecks(self._groups, self._log)
        health.start()
        admin = await self._start_admin()
        event = serving.ready(urls)
        if serving.as_json and serving.worker is None:
            print_json({"event": "ready", **event})
        self._tell_confinement()
        self._tell_ready()
        pulse = loop.create_task(self._pulse())
        await self._stop.wait()
        pulse.cancel()
        health.stop()
        await self._drain(loop)
        if admin is not None:
            admin.close()

    def _handle_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if self._serving.worker is None or number is signal.SIGTERM:
                loop.add_signal_handler(number, self._stop.set)
        if self._serving.assembly is not None:
            loop.add_signal_handler(signal.SIGHUP, self._reload)
            if self._serving.worker is None:
                loop.add_signal_handler(signal.SIGUSR2, self._hand_over)

    async def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        serving, guard = self._serving, self._guard
        for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C ends it at once
            if serving.worker is None:
                loop.remove_signal_handler(number)
        self._connections_at_stop = len(guard.connections)
        if serving.worker is None:
            systemd.notify(STOPPING=1)
            if not serving.as_json:
                click.echo(f"\nstopping; {self._connections_at_stop} connection(s) may finish (Ctrl-C again: at once)")
        await guard.stop()
        if serving.as_json and serving.worker is None:
            self._log.emit("stopped", guard.now, {})
        self._log.close()
        if not serving.as_json and serving.worker is None:
            click.echo("goodbye")

    def _groups(self) -> Any:
        assembly = self._serving.assembly
        return [] if assembly is None else assembly.upstreams()

    def _refresh(self, now: datetime) -> Snapshot | None:
        snapshot = None if self._serving.refresh is None else self._serving.refresh(now)
        if snapshot is not None:
            self._guard.loaded = time()
            self._note_snapshot()
        if snapshot is not None or (self._doubt_again is not None and now >= self._doubt_again):
            before = self._doubts
            self._doubt(snapshot or self._guard.snapshot, now)
            for doubt in self._doubts:
                if doubt not in before:
                    self._log.emit("note", now, {"detail": doubt})
        return snapshot

    def _doubt(self, snapshot: Snapshot, now: datetime) -> None:
        """See what is hardly meant; one of several workers does."""
        if self._serving.worker is None or self._serving.worker.index == 0:
            self._doubts = doubts(snapshot, self._groups(), now)
            self._doubt_again = next_doubt(snapshot, now)

    def _reload(self) -> None:
        """SIGHUP: read everything again, now."""
        assert self._serving.assembly is not None
        if self._serving.worker is None:
            systemd.notify(RELOADING=1)
        self._serving.assembly.reload()
        self._guard.refresh_now()
        self._tell_ready()

    def _tell_confinement(self) -> None:
        """Log how the process is confined; for people, only what is lacking."""
        said = () if self._serving.assembly is None else self._serving.assembly.confinement
        whole = all(";" not in part and not part.startswith(("not", "no ")) for part in said)
        if said and (self._serving.as_json or not whole):
            self._log.emit("sandbox", self._guard.now, {"detail": "; ".join(said)})

    def _tell_ready(self) -> None:
        if self._serving.worker is not None:
            self._serving.worker.ready()
        else:
            handover.say_ready()
            systemd.notify(READY=1)

    def _hand_over(self) -> None:
        """SIGUSR2: start the program anew with our sockets; once it serves, drain and end."""
        task = asyncio.get_running_loop().create_task(self._hand_over_now())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _hand_over_now(self) -> None:
        start = partial(handover.hand_over, self._serving.sockets, handover.own_command(), os.environ)
        outcome = await asyncio.get_running_loop().run_in_executor(None, start)
        if isinstance(outcome, Failure):
            self._log.emit("hand_over_failed", self._guard.now, told(outcome))
            return
        self._log.emit("handed_over", self._guard.now, {"pid": outcome.pid})
        self._stop.set()

    def _note_snapshot(self) -> None:
        self._snapshots += 1
        guard, assembly = self._guard, self._serving.assembly
        ends = {} if assembly is None else {name: end.timestamp() for name, end in assembly.certificates.items()}
        lists = {} if assembly is None else {name: end.timestamp() for name, end in assembly.lists.items()}
        guard.metrics.set_snapshot(self._snapshots, guard.loaded, ends, lists)

    def _state(self) -> State:
        metrics = self._guard.metrics
        metrics.log_broken(self._log.broken)
        for group in self._groups():
            for backend in group.backends:
                metrics.upstream(group.name, str(backend.target), backend.usable(monotonic()), backend.connections)
        return metrics.state()

    async def _start_admin(self) -> Admin | None:
        serving = self._serving
        if serving.admin is None:
            return None
        names = {listener.name: _address(plug) for listener, plug in serving.listeners}

        def unready() -> list[str]:
            return unready_for(self._state(), time(), listening=True, draining=self._guard.draining)

        def draining() -> Drain | None:
            if not self._guard.draining:
                return None
            return Drain(of=self._connections_at_stop, seconds_left=max(0.0, self._guard.drain_until - monotonic()))

        minter = None if serving.assembly is None else serving.assembly.minter
        admin = Admin(
            AdminFacts(
                state=self._state,
                ready=unready,
                status=lambda: status_of(self._state(), names, unready(), draining()),
                jwks=None if minter is None else minter.jwks,
                bug=lambda bug: _report(self._guard, {"message": "admin", "exception": bug}),
            )
        )
        await admin.serve(serving.admin)
        return admin

    async def _pulse(self) -> None:
        """Report to the admin process; tell systemd's watchdog that the loop turns."""
        worker, interval = self._serving.worker, systemd.watchdog_interval()
        due = monotonic()
        while True:
            if worker is not None and worker.report is not None:
                send_state(worker.report, worker.index, self._state())
            elif worker is None and interval is not None and monotonic() >= due:
                systemd.notify(WATCHDOG=1)
                due = monotonic() + interval
            await asyncio.sleep(_PULSE)


async def _serve_admin(assembly: Assembly, worker: Worker, plug: socket.socket, names: Mapping[str, str]) -> None:
    """The admin process of several workers: shows what they report."""
    assert worker.report is not None
    reports, stop = Reports(worker.report), asyncio.Event()
    drains: list[tuple[int, float]] = []  # how many connections there were when it began, and when it ends

    def drain() -> None:
        left = monotonic() + assembly.config.drain.total_seconds()
        drains.append((sum(reports.state()["connections"].values()), left))

    def draining() -> Drain | None:
        return Drain(of=drains[0][0], seconds_left=max(0.0, drains[0][1] - monotonic())) if drains else None

    def unready() -> list[str]:
        return unready_for(reports.state(), time(), listening=True, draining=bool(drains))

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGHUP, worker.ready)  # it has nothing to read anew, and is asked all the same
    loop.add_signal_handler(signal.SIGUSR2, drain)  # the workers are told to stop; this one goes last
    loop.add_reader(worker.report.fileno(), reports.read)
    admin = Admin(
        AdminFacts(
            state=reports.state,
            ready=unready,
            status=lambda: status_of(reports.state(), names, unready(), draining()),
            jwks=None if assembly.minter is None else assembly.minter.jwks,
        )
    )
    await admin.serve(plug)
    worker.ready()
    await stop.wait()
    admin.close()


class _ParentLog:
    """The events of the process that oversees workers: few, and written at once, for it may have no thread."""

    def __init__(self, as_json: bool, lock: int) -> None:
        self._as_json = as_json
        self._lock = lock

    def ready(self, event: dict[str, object]) -> None:
        if self._as_json:
            print_json({"event": "ready", **event})
        sys.stdout.flush()

    def emit(self, event: str, fields: dict[str, Any]) -> None:
        EventLog.write_one(sys.stdout.buffer, event, fields, pretty=not self._as_json, lock=self._lock)

    def stopped(self) -> None:
        """The last word, as a guard of one process has it."""
        with suppress(OSError):
            if self._as_json:
                self.emit("stopped", {})
            else:
                click.echo("goodbye")


def _serving(assembly: Assembly, sockets: Mapping[str, list[socket.socket]], telling: Telling, **more: Any) -> Serving:
    snapshot = assembly.build_newest(datetime.now(UTC))
    pairs = [(assembly.listeners[name], plug) for name, plugs in sockets.items() if name != _ADMIN for plug in plugs]
    return Serving(
        snapshot,
        tuple(pairs),
        telling.say,
        telling.as_json,
        assembly.refresh,
        assembly.config.drain.total_seconds(),
        assembly,
        sockets=sockets,
        **more,
    )


def _sockets(config: Config, count: int, by_file: bool) -> dict[str, list[socket.socket]]:
    """A listener's sockets by its name: those handed over, systemd's, or our own. Raises HandfastError.

    `by_file`: whether the addresses stand in a file, and not in flags.
    """
    before, given = handover.inherited(), systemd.listen_sockets()
    asked = [(listener.name, listener.listen, count) for listener in config.listeners]
    if config.admin is not None:
        asked.append((_ADMIN, config.admin.listen, 1))
    sockets: dict[str, list[socket.socket]] = {}
    try:
        for name, listen, many in asked:
            place = parse_place(listen)
            try:
                sockets[name] = _kept(before, name, place) or _take(place, given, many)
            except Unreachable as error:
                raise Unreachable(error.reason, **error.facts, remedy=_elsewhere(name, by_file)) from None
    except HandfastError:
        _close(sockets)
        raise
    finally:
        _close(before)  # of listeners that are no more, or are elsewhere now
    return sockets


def _elsewhere(name: str, by_file: bool) -> str:
    """How to have a listener's address, or the admin listener's, be another."""
    if by_file:
        return f"choose another: listen in {'[admin]' if name == _ADMIN else f'the [[listener]] {name}'}"
    return f"choose another with {'--admin' if name == _ADMIN else '--listen'} HOST:PORT"


def _close(sockets: Mapping[str, list[socket.socket]]) -> None:
    for plugs in sockets.values():
        for plug in plugs:
            plug.close()


def _kept(before: dict[str, list[socket.socket]], name: str, place: Place) -> list[socket.socket]:
    """The sockets that were handed over for a listener, if its address is still the one that they have."""
    plugs = before.get(name, [])
    return before.pop(name) if plugs and all(_is_at(plug, place) for plug in plugs) else []


def _is_at(plug: socket.socket, place: Place) -> bool:
    at = plug.getsockname()
    if place.systemd:
        return True
    if place.path or not isinstance(at, tuple):
        return bool(at == place.path)
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError):
        return False
    return at[0] == found[0] and place.port in (0, at[1])


def _take(place: Place, given: dict[str, list[socket.socket]], count: int) -> list[socket.socket]:
    if place.systemd:
        if place.systemd not in given:
            raise HandfastError(Reason.GUARD_SOCKETS, detail=f"systemd gave no socket called {place.systemd}")
        return given.pop(place.systemd)
    if count == 1 or place.path:
        return [bind(place)]
    return bind_shared(place, count)


@contextmanager
def _confined(config: Config, make: Make, *, alone: bool = False) -> Iterator[Assembly]:
    """Make the assembly of a process that serves; the process may then read its own files, and little else.

    One that serves `alone` may start Python, to hand over. The process that oversees workers stays as it is: it
    reads no byte of a client, and starts what takes over from it, which may have files elsewhere.
    """
    with make() as assembly:
        if config.sandbox:
            folders = {path.parent for path in assembly.files()} | {path.resolve().parent for path in assembly.files()}
            write = [] if config.state is None else [config.state]
            python = [Path(sys.executable), Path(sys.executable).resolve(), *map(Path, ("/lib64", "/lib", "/usr/lib"))]
            # /proc: for the metrics of this process
            said = confine([*folders, *runtime_paths(), Path("/proc")], write, python if alone else ())
            assembly.confinement = (said, refuse_calls(programs=not alone))
            if said.startswith("confined"):
                assembly.reach = (*folders, *write)
        yield assembly


class TakenText:
    """A Taken in a file without a name, which processes inherit."""

    def __init__(self) -> None:
        self._file = os.memfd_create("handfast-config") if hasattr(os, "memfd_create") else -1

    def save(self, text: str) -> None:
        """See Taken."""
        data = text.encode()
        if self._file >= 0 and data != self._read():
            # In this order a reader that comes between finds a length that does not fit, and so nothing.
            os.pwrite(self._file, (0).to_bytes(8), 0)
            os.pwrite(self._file, data, 8)
            os.pwrite(self._file, len(data).to_bytes(8), 0)

    def load(self) -> str:
        """See Taken."""
        return self._read().decode()

    def _read(self) -> bytes:
        if self._file < 0:
            return b""
        size = int.from_bytes(os.pread(self._file, 8, 0))
        return os.pread(self._file, size, 8)


def _log_lock() -> int:
    """A file that processes lock while they write lines to the one log."""
    return os.memfd_create("handfast-log") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)


def _address(plug: socket.socket) -> str:
    name = plug.getsockname()
    return str(Place(*name[:2])) if isinstance(name, tuple) else f"unix:{name}"


def _as_url(http: bool, address: str) -> str:
    return address if address.startswith("unix:") else f"{'https' if http else 'tls'}://{address}"


def _report(guard: Guard, context: dict[str, Any]) -> None:
    """What the loop caught is a bug of ours: one event, and no traceback for the user."""
    failure = Failure(Reason.BUG, {"detail": f"{context.get('message')}: {context.get('exception')!r}"[:300]})
    guard.log.emit("bug", guard.now, told(failure))


def _loop(main: Coroutine[Any, Any, None]) -> None:
    import uvloop

    uvloop.run(main)
