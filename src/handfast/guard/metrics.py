"""What the guard counts: handshakes, requests, connections, and the age of what is in force.

Owns the counters of one process, their sum over workers, and their text for Prometheus. Labels are words of ours
and of the operator's settings, never a client's identity, path or host, and there is a most of them.

Theory of operation. Each worker has a `Metrics`; to count is to add to a number in a dict, without a lock, since
one event loop does it. `state()` is a copy as plain values. `Totals` takes the workers' states and makes one:
counters add, and what a worker had counted stays when it dies, so that no total goes down. Workers
share one configuration and reload together, so the first alone counts reloads. Of what is not a sum
the worst holds: the oldest snapshot, the earliest expiry, a broken log, an upstream that one worker cannot reach.
"""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from handfast import __version__

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# Seconds; 1, 2.5, 5 a decade, from a request on this machine to the longest wait for an app.
BOUNDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
MAX_SERIES = 500  # of one name; more are counted together as `other`
MAX_DETAIL = 500  # characters of why a reload was kept back
MAX_NAMED = 200  # certificates, lists and upstreams that are shown; of the first two those that end first

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text format

SILENT = 5.0  # seconds; a worker of which nothing was heard for so long does not count as up

# A listener's name or address, a reason's code, an outcome. No path and no SPIFFE ID is one.
_WORD = re.compile(r"[A-Za-z0-9_.:\[\]-]{0,64}")
_STATUSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")  # none: the client went away before there was one

Labels = tuple[str, ...]
Series = list[tuple[Labels, float]]


class Worker(TypedDict):
    """One worker process; `silent` is how many seconds ago it was heard of."""

    worker: int
    pid: int
    started: float  # Unix seconds, as all instants here
    silent: float
    cpu_seconds: float
    memory: int  # bytes that are resident
    descriptors: int  # that are open; 0: not known here


class State(TypedDict):
    """All counts of one worker, or of several together; plain values, for JSON."""

    workers: list[Worker]
    counters: dict[str, Series]  # by family, see COUNTERS
    histograms: dict[str, list[tuple[Labels, list[int], float]]]  # counts between BOUNDS and above, sum in seconds
    connections: dict[str, int]  # open now, by listener
    generation: int  # of the snapshot; 0: none is in force
    loaded_at: float
    certificates: dict[str, float]  # when each ends
    lists: dict[str, float]  # when each revocation list is due
    upstreams: list[tuple[str, str, bool, int]]  # name, target, healthy, connections
    log_broken: bool
    kept: str  # why the last reload left in force what was, in words; "": it did not


COUNTERS = {
    "handshakes": ("listener", "outcome", "reason"),
    "requests": ("listener", "decision", "reason", "status"),
    "opened": ("listener",),
    "ended": ("reason",),
    "reloads": ("outcome", "reason"),
    "limited": ("reason",),
    "bytes": ("listener", "direction"),
}
HISTOGRAMS = {
    "handshake_seconds": ("From a connection's first byte to the end of its handshake.", ("listener", "outcome")),
    "request_seconds": ("From a request's first byte to the end of its answer.", ("listener",)),
}


class Histogram:
    """How many values lie up to each of BOUNDS (itself included) and above the last, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in seconds."""
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.total += value


class Metrics:
    """The counts of one process. Reasons, outcomes and decisions are short words, as `errors.Reason` codes are."""

    def __init__(self, worker: int = 0) -> None:
        self._worker = worker
        self._started = time.time()
        self._counters: dict[str, dict[Labels, float]] = {family: {} for family in COUNTERS}
        self._handshakes = self._counters["handshakes"]
        self._requests = self._counters["requests"]
        self._bytes = self._counters["bytes"]
        self._handshake_seconds: dict[Labels, Histogram] = {}
        self._request_seconds: dict[Labels, Histogram] = {}
        self._open: dict[str, int] = {}
        self._generation = 0
        self._loaded_at = 0.0
        self._certificates: dict[str, float] = {}
        self._lists: dict[str, float] = {}
        self._upstreams: dict[tuple[str, str], tuple[bool, int]] = {}
        self._log_broken = False
        self._kept = ""

    def handshake(self, outcome: str, reason: str, seconds: float, listener: str) -> None:
        """Count a handshake; `outcome` is `accept` or `deny`."""
        _count(self._handshakes, (listener, outcome, reason), 1)
        _observe(self._handshake_seconds, (listener, outcome), seconds)

    def request(self, listener: str, decision: str, reason: str, status: int | None, seconds: float) -> None:
        """Count a request that was answered with `status` (100 to 599), by us or by the app; None: it never was."""
        _count(self._requests, (listener, decision, reason, _STATUSES[(status or 0) // 100]), 1)
        _observe(self._request_seconds, (listener,), seconds)

    def connection_opened(self, listener: str) -> None:
        """Count a connection."""
        _count(self._counters["opened"], (listener,), 1)
        self._open[listener] = self._open.get(listener, 0) + 1

    def connection_closed(self, listener: str) -> None:
        """Count a connection that was counted as opened."""
        self._open[listener] = self._open.get(listener, 0) - 1

    def bytes(self, listener: str, in_: int, out: int) -> None:
        """Count bytes that were forwarded from clients and to them."""
        _count(self._bytes, (listener, "in"), in_)
        _count(self._bytes, (listener, "out"), out)

    def ended(self, reason: str) -> None:
        """Count a connection that the guard cut off."""
        _count(self._counters["ended"], (reason,), 1)

    def limited(self, reason: str) -> None:
        """Count what a limit refused."""
        _count(self._counters["limited"], (reason,), 1)

    def reload(self, outcome: str, reason: str, detail: str = "") -> None:
        """Count a reload, in the first worker alone; `outcome` is `taken`, or `kept` where what was in force stays for
        `reason`, in words `detail`.
        """
        self._kept = detail[:MAX_DETAIL]
        if self._worker == 0:
            _count(self._counters["reloads"], (outcome, reason), 1)

    def set_snapshot(
        self,
        generation: int,
        loaded_at: float,
        certificate_not_after: Mapping[str, float],
        list_next_update: Mapping[str, float] | None = None,
    ) -> None:
        """Say what is in force. Instants are Unix seconds. Upstreams are forgotten, to be said anew."""
        self._generation, self._loaded_at = generation, loaded_at
        self._certificates, self._lists = _soonest(certificate_not_after), _soonest(list_next_update or {})
        self._upstreams.clear()

    def upstream(self, name: str, target: str, healthy: bool, connections: int) -> None:
        """Say how an upstream is."""
        if (name, target) in self._upstreams or len(self._upstreams) < MAX_NAMED:
            self._upstreams[name, target] = (healthy, connections)

    def log_broken(self, broken: bool) -> None:
        """Say whether the log cannot be written."""
        self._log_broken = broken

    def state(self) -> State:
        """A copy of all counts."""
        histograms = {"handshake_seconds": self._handshake_seconds, "request_seconds": self._request_seconds}
        return State(
            workers=[_process(self._worker, self._started)],
            counters={family: list(series.items()) for family, series in self._counters.items()},
            histograms={
                family: [(key, one.counts[:], one.total) for key, one in series.items()]
                for family, series in histograms.items()
            },
            connections=dict(self._open),
            generation=self._generation,
            loaded_at=self._loaded_at,
            certificates=dict(self._certificates),
            lists=dict(self._lists),
            upstreams=[(*names, *facts) for names, facts in self._upstreams.items()],
            log_broken=self._log_broken,
            kept=self._kept,
        )


def _soonest(ends: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(ends.items(), key=lambda item: item[1])[:MAX_NAMED])


def _process(worker: int, started: float) -> Worker:
    times = os.times()
    memory = descriptors = 0
    try:
        with open("/proc/self/statm", "rb") as statm:
            memory = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        descriptors = os.stat("/proc/self/fd").st_size  # how many are open, since Linux 6.2; 0 before
    except OSError:  # not Linux, or /proc is out of reach
        pass
    return Worker(
        worker=worker,
        pid=os.getpid(),
        started=started,
        silent=0.0,
        cpu_seconds=times.user + times.system,
        memory=memory,
        descriptors=descriptors,
    )


class Totals:
    """The counts of all workers, those that died among them."""

    def __init__(self) -> None:
        self._past: list[State] = []  # one at most: what the dead had counted
        self._live: dict[int, State] = {}

    def take(self, worker: int, state: State) -> None:
        """Take what a worker counts now. A process that was not there before begins at zero."""
        before = self._live.get(worker)
        if before is not None and _birth(before) != _birth(state):
            self.gone(worker)
        self._live[worker] = state

    def gone(self, worker: int) -> None:
        """A worker died: its counts stay, and all else of it goes."""
        state = self._live.pop(worker, None)
        if state is not None:
            self._past = [merge([*self._past, state])]

    def live(self) -> Mapping[int, State]:
        """The last state of each worker that is there."""
        return self._live

    def state(self) -> State:
        """All together; see `merge`."""
        merged = merge(self._live.values())
        if self._past:
            sums = merge([*self._past, merged])
            merged["counters"], merged["histograms"] = sums["counters"], sums["histograms"]
        return merged


def merge(states: Iterable[State]) -> State:
    """One state of several workers'.

    Counters, histograms and connections add. Of the rest the worst holds: the lowest generation, the earliest
    load and expiry, an upstream that is healthy only if all say so, a log that is broken if one is. Of no
    workers: nothing counted, and no snapshot in force.
    """
    every = list(states)
    upstreams: dict[tuple[str, str], tuple[bool, int]] = {}
    connections: dict[str, int] = {}
    for state in every:
        for name, target, healthy, count in state["upstreams"]:
            all_healthy, sum_ = upstreams.get((name, target), (True, 0))
            upstreams[name, target] = (all_healthy and healthy, sum_ + count)
        for listener, count in state["connections"].items():
            connections[listener] = connections.get(listener, 0) + count
    return State(
        workers=sorted((worker for state in every for worker in state["workers"]), key=lambda one: one["worker"]),
        counters={family: _add_counters(state["counters"][family] for state in every) for family in COUNTERS},
        histograms={family: _add_histograms(state["histograms"][family] for state in every) for family in HISTOGRAMS},
        connections=connections,
        generation=min((state["generation"] for state in every), default=0),
        loaded_at=min((state["loaded_at"] for state in every), default=0.0),
        certificates=_earliest(state["certificates"] for state in every),
        lists=_earliest(state["lists"] for state in every),
        upstreams=[(*names, *facts) for names, facts in upstreams.items()],
        log_broken=any(state["log_broken"] for state in every),
        kept=next((state["kept"] for state in every if state["kept"]), ""),
    )


def _earliest(every: Iterable[dict[str, float]]) -> dict[str, float]:
    earliest: dict[str, float] = {}
    for ends in every:
        for name, end in ends.items():
            earliest[name] = min(end, earliest.get(name, end))
    return earliest


def is_whole(state: State) -> bool:
    """Whether a state that came from elsewhere has all that is counted here, with as many labels."""
    counters, histograms = state["counters"], state["histograms"]
    return all(
        family in counters and all(len(key) == len(labels) for key, _ in counters[family])
        for family, labels in COUNTERS.items()
    ) and all(
        family in histograms
        and all(len(key) == len(labels) and len(counts) == len(BOUNDS) + 1 for key, counts, _ in histograms[family])
        for family, (_, labels) in HISTOGRAMS.items()
    )


def quantile(counts: Sequence[int], q: float) -> float | None:
    """The value below which the part `q` (0 to 1) of a histogram's values lies, in seconds; between two bounds by
    proportion, as Prometheus does. None without values; infinity above the last bound.
    """
    rank, seen = q * sum(counts), 0
    for at, count in enumerate(counts):
        if count and seen + count >= rank:
            if at == len(BOUNDS):
                return float("inf")
            low = BOUNDS[at - 1] if at else 0.0
            return low + (BOUNDS[at] - low) * (rank - seen) / count
        seen += count
    return None


def render(state: State, now: float) -> bytes:
    """The state as Prometheus reads it (CONTENT_TYPE). `now` is Unix seconds."""
    # Here, not above: it costs 70 ms, and only the process that serves metrics needs it.
    from prometheus_client.exposition import generate_latest
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector, CollectorRegistry

    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            for family in (*_counters(state), *_gauges(state, now), *_worker_families(state["workers"])):
                kind = CounterMetricFamily if family.counts else GaugeMetricFamily
                metric = kind(f"handfast_{family.name}", family.words, labels=family.labels)
                for key, value in family.samples:
                    metric.add_metric(key, value)
                yield metric
            for name, (words, labels) in HISTOGRAMS.items():
                histogram = HistogramMetricFamily(f"handfast_{name}", words, labels=labels)
                for key, counts, total in state["histograms"][name]:
                    histogram.add_metric(key, _cumulated(counts), total)
                yield histogram

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    return generate_latest(registry)


class _Family(NamedTuple):
    """One metric: its name without `handfast_` and `_total`, and its samples."""

    counts: bool  # a counter; else a gauge
    name: str
    words: str
    labels: Labels
    samples: Iterable[tuple[Labels, float]]


# Name, what it sums up, its help, and the labels that it keeps of those.
_COUNTED = (
    ("handshakes", "handshakes", "TLS handshakes, by how they ended.", ("listener", "outcome", "reason")),
    ("requests", "requests", "Requests, by the status of the answer.", ("listener", "decision", "status")),
    ("decisions", "requests", "Requests, by what was decided and why.", ("listener", "decision", "reason")),
    ("connections_opened", "opened", "Connections that were accepted.", ("listener",)),
    ("connections_cut", "ended", "Connections that the guard cut off, by why.", ("reason",)),
    ("reloads", "reloads", "Reloads: taken, or kept what was in force, by why.", ("outcome", "reason")),
    ("limited", "limited", "What a limit refused, by which.", ("reason",)),
    ("bytes", "bytes", "Bytes forwarded: in from clients, out to them.", ("listener", "direction")),
)


def _counters(state: State) -> Iterator[_Family]:
    for name, counted, words, labels in _COUNTED:
        at = [COUNTERS[counted].index(label) for label in labels]
        kept = [(tuple(key[each] for each in at), count) for key, count in state["counters"][counted]]
        yield _Family(True, name, words, labels, _add_counters([kept]))


def _gauges(state: State, now: float) -> Iterator[_Family]:
    def single(name: str, words: str, value: float) -> _Family:
        return _Family(False, name, words, (), [((), value)])

    listeners, upstream = ("listener",), ("upstream", "target")
    open_now = [((listener,), count) for listener, count in state["connections"].items()]
    yield _Family(False, "connections", "Connections that are open.", listeners, open_now)
    ends = [((name,), not_after) for name, not_after in state["certificates"].items()]
    words = "When a certificate of the guard ends, in Unix seconds."
    yield _Family(False, "certificate_expiry_timestamp_seconds", words, ("certificate",), ends)
    due = [((name,), next_update) for name, next_update in state["lists"].items()]
    words = "When a revocation list is due for renewal, in Unix seconds; its clients are refused from then on."
    yield _Family(False, "revocation_list_next_update_timestamp_seconds", words, ("list",), due)
    yield single("snapshot_generation", "Which snapshot is in force; 0: none.", state["generation"])
    if state["generation"]:
        yield single("snapshot_age_seconds", "How long ago it was loaded.", now - state["loaded_at"])
    yield single("log_broken", "1: the log cannot be written.", state["log_broken"])
    healthy = [((name, target), healthy) for name, target, healthy, _ in state["upstreams"]]
    yield _Family(False, "upstream_healthy", "1: the app is reached.", upstream, healthy)
    dialled = [((name, target), count) for name, target, _, count in state["upstreams"]]
    yield _Family(False, "upstream_connections", "Connections to the app.", upstream, dialled)
    yield _Family(False, "build_info", "The version of the guard.", ("version",), [((__version__,), 1)])


def _worker_families(workers: Sequence[Worker]) -> Iterator[_Family]:
    def of_each(counts: bool, name: str, words: str, value: Callable[[Worker], float]) -> _Family:
        samples = [((str(worker["worker"]),), value(worker)) for worker in workers]
        return _Family(counts, f"worker_{name}", words, ("worker",), samples)

    yield of_each(False, "up", "1: the worker is heard of.", lambda one: one["silent"] < SILENT)
    yield of_each(False, "start_time_seconds", "When it started, in Unix seconds.", lambda one: one["started"])
    yield of_each(True, "cpu_seconds", "CPU time, user and system.", lambda one: one["cpu_seconds"])
    yield of_each(False, "resident_memory_bytes", "Memory that is resident.", lambda one: one["memory"])
    yield of_each(False, "open_fds", "Open file descriptors; 0: not known.", lambda one: one["descriptors"])


def _cumulated(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Counts as Prometheus has them: of all values up to each bound."""
    names = [*map(str, BOUNDS), "+Inf"]
    return list(zip(names, accumulate(counts), strict=True))


def _birth(state: State) -> list[tuple[int, float]]:
    """What tells a process from the one that had its place before."""
    return [(worker["pid"], worker["started"]) for worker in state["workers"]]


def _add_counters(many: Iterable[Series]) -> Series:
    sums: dict[Labels, float] = {}
    for series in many:
        for key, count in series:
            sums[key] = sums.get(key, 0) + count
    return list(sums.items())


def _add_histograms(many: Iterable[list[tuple[Labels, list[int], float]]]) -> list[tuple[Labels, list[int], float]]:
    sums: dict[Labels, tuple[list[int], float]] = {}
    for series in many:
        for key, counts, total in series:
            before, seconds = sums.get(key, ([0] * len(counts), 0.0))
            sums[key] = ([one + other for one, other in zip(before, counts, strict=True)], seconds + total)
    return [(key, counts, total) for key, (counts, total) in sums.items()]


def _count(series: dict[Labels, float], key: Labels, much: float) -> None:
    try:
        series[key] += much
    except KeyError:
        key = _bounded(series, key)
        series[key] = series.get(key, 0) + much


def _observe(series: dict[Labels, Histogram], key: Labels, seconds: float) -> None:
    try:
        series[key].observe(seconds)
    except KeyError:
        series.setdefault(_bounded(series, key), Histogram()).observe(seconds)


def _bounded(series: Mapping[Labels, object], key: Labels) -> Labels:
    """The labels to count under: `other` for what is no short word, and for all when there are too many."""
    if len(series) >= MAX_SERIES:
        return ("other",) * len(key)
    return tuple([label if _WORD.fullmatch(label) else "other" for label in key])
