"""Metrics: what is counted, that sums of workers never go down, and that Prometheus can read it."""

from __future__ import annotations

import time
import timeit
from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from handfast.guard.metrics import (
    BOUNDS,
    MAX_SERIES,
    Histogram,
    Metrics,
    State,
    Totals,
    is_whole,
    merge,
    quantile,
    render,
)


def read(text: bytes) -> dict[str, list[Sample]]:
    """The samples of an exposition by name, as Prometheus' own library reads them."""
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.name.startswith("handfast_")
        assert family.documentation.endswith(".")
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(samples: dict[str, list[Sample]], metric: str, **labels: str) -> float:
    """The one sample with these labels."""
    (found,) = [one for one in samples[metric] if one.labels == labels]
    return found.value


def busy(worker: int = 0) -> Metrics:
    """Metrics with one of everything."""
    metrics = Metrics(worker)
    metrics.set_snapshot(3, 1000.0, {"main": 5000.0, "other": 9000.0}, {"main, CN=Root": 4500.0})
    metrics.connection_opened("main")
    metrics.connection_opened("main")
    metrics.connection_closed("main")
    metrics.handshake("accept", "", 0.002, "main")
    metrics.handshake("deny", "verify.expired", 0.003, "main")
    metrics.request("main", "allow", "policy.rule_matched", 200, 0.004)
    metrics.request("main", "allow", "policy.rule_matched", 204, 0.004)
    metrics.request("main", "allow", "upstream.down", 502, 0.2)
    metrics.request("main", "allow", "policy.rule_matched", None, 70)
    metrics.ended("ended.revoked")
    metrics.reload("taken", "")
    metrics.reload("kept", "input.not_key")
    metrics.upstream("app", "127.0.0.1:8000", True, 4)
    metrics.bytes("main", 100, 2000)
    metrics.limited("limit.requests")
    return metrics


def test_everything_is_told_to_prometheus() -> None:
    """Each count is in the exposition under its name and labels, with the value that was counted."""
    samples = read(render(busy().state(), now=1060.0))
    told = partial(value, samples)
    assert told("handfast_handshakes_total", listener="main", outcome="deny", reason="verify.expired") == 1
    assert told("handfast_requests_total", listener="main", decision="allow", status="2xx") == 2
    assert told("handfast_requests_total", listener="main", decision="allow", status="none") == 1
    assert told("handfast_decisions_total", listener="main", decision="allow", reason="policy.rule_matched") == 3
    assert told("handfast_connections", listener="main") == 1
    assert told("handfast_connections_opened_total", listener="main") == 2
    assert told("handfast_connections_cut_total", reason="ended.revoked") == 1
    assert told("handfast_reloads_total", outcome="kept", reason="input.not_key") == 1
    assert told("handfast_limited_total", reason="limit.requests") == 1
    assert told("handfast_bytes_total", listener="main", direction="out") == 2000
    assert told("handfast_certificate_expiry_timestamp_seconds", certificate="main") == 5000
    assert told("handfast_revocation_list_next_update_timestamp_seconds", list="main, CN=Root") == 4500
    assert told("handfast_snapshot_generation") == 3
    assert told("handfast_snapshot_age_seconds") == 60
    assert told("handfast_log_broken") == 0
    assert told("handfast_upstream_healthy", upstream="app", target="127.0.0.1:8000") == 1
    assert told("handfast_upstream_connections", upstream="app", target="127.0.0.1:8000") == 4
    assert told("handfast_worker_up", worker="0") == 1
    assert told("handfast_worker_resident_memory_bytes", worker="0") > 1 << 20
    assert told("handfast_request_seconds_count", listener="main") == 4
    assert told("handfast_request_seconds_sum", listener="main") == pytest.approx(70.208)
    assert told("handfast_request_seconds_bucket", listener="main", le="0.005") == 2
    assert told("handfast_request_seconds_bucket", listener="main", le="60.0") == 3
    assert told("handfast_request_seconds_bucket", listener="main", le="+Inf") == 4
    assert told("handfast_handshake_seconds_count", listener="main", outcome="accept") == 1


def test_nothing_counted_is_readable_too() -> None:
    """Before the first snapshot there is an exposition, without an age of what is not there."""
    samples = read(render(merge([]), now=1.0))
    assert value(samples, "handfast_snapshot_generation") == 0
    assert "handfast_snapshot_age_seconds" not in samples


def test_a_broken_log_and_a_lost_app_show() -> None:
    """What went wrong changes its gauge, and what is well again changes it back."""
    metrics = busy()
    for broken, healthy in ((True, False), (False, True)):
        metrics.log_broken(broken)
        metrics.upstream("app", "127.0.0.1:8000", healthy, 0)
        samples = read(render(metrics.state(), now=2000.0))
        assert value(samples, "handfast_log_broken") == broken
        assert value(samples, "handfast_upstream_healthy", upstream="app", target="127.0.0.1:8000") == healthy


def test_labels_are_bounded() -> None:
    """Identities and paths given as a reason, and thousands of different reasons, make no series of their own."""
    metrics = Metrics()
    metrics.ended("spiffe://domain/web")
    metrics.ended("/a/path")
    metrics.ended('"quoted"\n')
    for number in range(3 * MAX_SERIES):
        metrics.ended(f"reason{number}")
        metrics.handshake("deny", f"reason{number}", 0.1, f"listener{number}")
        metrics.request("main", "deny", f"reason{number}", 403, 0.1)
    state = metrics.state()
    for family in ("ended", "handshakes", "requests"):
        assert len(state["counters"][family]) <= MAX_SERIES + 1
    assert all(len(series) <= MAX_SERIES + 1 for series in state["histograms"].values())
    ended = dict(state["counters"]["ended"])
    assert sum(ended.values()) == 3 * MAX_SERIES + 3
    assert not any("/" in reason or '"' in reason for (reason,) in ended)


def test_many_certificates_keep_those_that_end_first() -> None:
    """Of more certificates than are shown, those that end soonest are."""
    metrics = Metrics()
    metrics.set_snapshot(1, 0.0, {f"site{number}": 10_000.0 - number for number in range(1000)})
    shown = metrics.state()["certificates"]
    assert len(shown) == 200
    assert "site999" in shown
    assert "site0" not in shown


def test_workers_add_up_and_the_worst_is_shown() -> None:
    """Of two workers, counts add; the older snapshot, the earlier end, the broken log and the lost app hold."""
    one, other = busy(0), busy(1)
    other.set_snapshot(2, 900.0, {"main": 4000.0})
    other.upstream("app", "127.0.0.1:8000", False, 3)
    one.upstream("app", "127.0.0.1:8000", True, 4)
    other.log_broken(True)
    merged = merge([one.state(), other.state()])
    samples = read(render(merged, now=1000.0))
    assert value(samples, "handfast_handshakes_total", listener="main", outcome="accept", reason="") == 2
    assert value(samples, "handfast_request_seconds_count", listener="main") == 8
    assert value(samples, "handfast_connections", listener="main") == 2
    assert value(samples, "handfast_snapshot_generation") == 2
    assert value(samples, "handfast_snapshot_age_seconds") == 100
    assert value(samples, "handfast_certificate_expiry_timestamp_seconds", certificate="main") == 4000
    assert value(samples, "handfast_log_broken") == 1
    assert value(samples, "handfast_upstream_healthy", upstream="app", target="127.0.0.1:8000") == 0
    assert value(samples, "handfast_upstream_connections", upstream="app", target="127.0.0.1:8000") == 7
    assert [worker["worker"] for worker in merged["workers"]] == [0, 1]


def test_a_reload_of_many_workers_is_one() -> None:
    """The first worker counts a reload, and no other; why one was kept back is said by whichever it was."""
    workers = [Metrics(number) for number in range(3)]
    for metrics in workers:
        metrics.reload("kept", "input.not_key", "server.key holds no private key")
    merged = merge([metrics.state() for metrics in workers])
    assert merged["counters"]["reloads"] == [(("kept", "input.not_key"), 1)]
    assert merged["kept"] == "server.key holds no private key"
    workers[2].reload("kept", "bug", "x" * 10_000)
    assert len(workers[2].state()["kept"]) == 500
    for metrics in workers:
        metrics.reload("taken", "")
    merged = merge([metrics.state() for metrics in workers])
    assert dict(merged["counters"]["reloads"]) == {("kept", "input.not_key"): 1, ("taken", ""): 1}
    assert merged["kept"] == ""


def test_states_travel_as_json() -> None:
    """A state that went through JSON is the state that was sent, and is known to be whole."""
    state = busy().state()
    assert msgspec.json.decode(msgspec.json.encode(state), type=State) == state
    assert is_whole(state)
    assert not is_whole(state | {"counters": {}})
    short = state["counters"] | {"handshakes": [(("main",), 1.0)]}
    assert not is_whole(state | {"counters": short})
    flat = state["histograms"] | {"request_seconds": [(("main",), [1, 2], 0.1)]}
    assert not is_whole(state | {"histograms": flat})


def handshakes(state: State) -> float:
    return sum(count for _, count in state["counters"]["handshakes"])


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["count", "report", "die", "restart"]), st.integers(1, 5)),
        max_size=60,
    )
)
def test_no_total_goes_down(steps: list[tuple[int, str, int]]) -> None:
    """Whatever workers do, die and come back among it, the total of all handshakes never falls."""
    totals, workers = Totals(), {index: Metrics(index) for index in range(3)}
    before = 0.0
    for index, step, much in steps:
        match step:
            case "count":
                for _ in range(much):
                    workers[index].handshake("accept", "", 0.01, "main")
            case "report":
                totals.take(index, workers[index].state())
            case "die":
                totals.gone(index)
                workers[index] = Metrics(index)
            case _:  # seen only by its next report
                workers[index] = Metrics(index)
        now = handshakes(totals.state())
        assert now >= before
        counted = sum(sum(counts) for _, counts, _ in totals.state()["histograms"]["handshake_seconds"])
        assert counted == now
        before = now


def test_what_the_dead_counted_is_counted_once() -> None:
    """A worker that died leaves its counts and takes its connections; one that is back begins at zero."""
    totals, first = Totals(), busy()
    totals.take(0, first.state())
    totals.gone(0)
    totals.gone(0)
    state = totals.state()
    assert (handshakes(state), state["connections"], state["generation"], state["workers"]) == (2, {}, 0, [])
    second = Metrics(0)
    second.handshake("accept", "", 0.01, "main")
    for _ in range(3):
        totals.take(0, second.state())
    assert handshakes(totals.state()) == 3


@given(st.lists(st.floats(0.0001, 59), min_size=1, max_size=300), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], q: float) -> None:
    """The estimate is within the bounds of the bucket that the true quantile fell into."""
    histogram = Histogram()
    for one in values:
        histogram.observe(one)
    estimate = quantile(histogram.counts, q)
    rank = q * len(values)
    true = next(one for at, one in enumerate(sorted(values), 1) if at >= rank)
    high = next(bound for bound in BOUNDS if true <= bound)
    low = max((bound for bound in BOUNDS if bound < true), default=0.0)
    assert estimate is not None
    assert low <= estimate <= high


def test_quantiles_at_the_ends() -> None:
    """Without values there is none, and above the last bound all that is known is that it lies above."""
    histogram = Histogram()
    assert quantile(histogram.counts, 0.5) is None
    histogram.observe(61)
    assert quantile(histogram.counts, 0.5) == float("inf")


def test_what_counting_costs() -> None:
    """A request is counted in a few microseconds at the very most."""
    count = partial(Metrics().request, "main", "allow", "policy.rule_matched", 200, 0.0012)
    assert min(timeit.repeat(count, timer=time.thread_time, number=10_000, repeat=20)) / 10_000 < 3e-6
