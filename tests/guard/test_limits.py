"""Limits: what a listener lets through, and that nobody gets more by coming as many."""

from __future__ import annotations

import time
import timeit
import tracemalloc
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handfast.errors import Failure, Reason
from handfast.guard.limits import CAPACITY, Bucket, Buckets, Counts, Gate, Rate, Rates, address_key

_rates = st.floats(0.01, 10_000)
_bursts = st.floats(1, 1000)
# Steps of time, some of them backwards: a clock of another process, or a bug.
_steps = st.lists(st.floats(-0.5, 5), max_size=300)


@given(_rates, _bursts, st.floats(0, 1e7), _steps)
@example(2.0, 1.0, 0.0, [-0.5, 0.5])
def test_a_bucket_never_gives_more_than_its_rate(rate: float, burst: float, start: float, steps: list[float]) -> None:
    """Whatever the times, no more is taken than the burst and the rate over the time since it was first asked."""
    bucket, taken, now, times = Bucket(rate, burst), 0, start, list[float]()
    for step in steps:
        now += step
        times.append(now)
        taken += bucket.take(now)
        assert taken <= burst + rate * (max(times) - times[0]) + 1e-5 * rate + 1e-6


@given(st.integers(1, 1000), st.floats(0.1, 1000), st.floats(0, 1e6))
def test_a_bucket_gives_its_whole_burst_and_then_its_rate(burst: int, rate: float, start: float) -> None:
    """After a rest there is the whole burst, then nothing, then one token each 1/rate seconds."""
    bucket = Bucket(rate, burst)
    assert all(bucket.take(start) for _ in range(burst))
    assert not bucket.take(start)
    assert not bucket.take(start + 0.9 / rate)
    assert bucket.take(start + 1.001 / rate)
    assert not bucket.take(start + 1.001 / rate)


@settings(max_examples=50)
@given(
    _rates, st.floats(1, 20), st.lists(st.tuples(st.integers(0, 30), st.floats(0, 2)), max_size=300), st.integers(1, 8)
)
def test_no_key_gets_more_when_the_table_is_too_small(
    rate: float, burst: float, takes: list[tuple[int, float]], capacity: int
) -> None:
    """With many more keys than buckets, each key still gets no more than its burst and its rate."""
    buckets, now = Buckets(rate, burst, capacity), 100.0
    taken: dict[str, int] = {}
    for key, step in takes:
        now += step
        taken[str(key)] = taken.get(str(key), 0) + buckets.take(str(key), now)
        assert taken[str(key)] <= burst + rate * (now - 100.0) + 1e-5 * rate + 1e-6
        assert len(buckets) <= capacity


def test_an_empty_bucket_is_not_pushed_out_by_strangers() -> None:
    """Who has used up a burst and then floods the table with other keys comes back to an empty bucket."""
    buckets = Buckets(rate=0.1, burst=5, capacity=100)
    assert [buckets.take("attacker", 0.0) for _ in range(6)] == [True] * 5 + [False]
    for stranger in range(10_000):
        buckets.take(f"stranger {stranger}", 1.0)
    assert not buckets.take("attacker", 2.0)
    assert buckets.take("attacker", 11.0)


def test_who_finds_the_table_full_shares_a_bucket_and_takes_its_level_along() -> None:
    """A newcomer to a full table uses a shared bucket; a bucket of its own, later, lacks what the shared one lacks."""
    buckets = Buckets(rate=1, burst=2, capacity=1)
    assert buckets.take("first", 0.0)
    assert buckets.take("first", 0.0)
    assert [buckets.take("second", 0.0) for _ in range(3)] == [True, True, False]
    assert [buckets.take("third", 0.0) for _ in range(2)] == [False, False], "capacity 1 shares one bucket"
    assert [buckets.take("second", 1.5) for _ in range(2)] == [True, False]
    assert len(buckets) == 1
    assert buckets.take("second", 10.0)


@pytest.mark.timeout(400)
def test_a_million_keys_stay_bounded() -> None:
    """A million different addresses fill no more than the table."""
    buckets, counts = Buckets(rate=0.01, burst=3), Counts(5)
    for number in range(1_000_000):
        key = str(number)
        buckets.take(key, number * 1e-5)
        counts.enter(key)
        counts.leave(key)
    assert len(buckets) == CAPACITY
    assert len(counts) == 0


def test_a_full_table_takes_no_more_memory() -> None:
    """Strangers at a full table cost no memory."""
    buckets = Buckets(rate=0.01, burst=3, capacity=1000)
    tracemalloc.start()
    try:
        for number in range(20_000):
            buckets.take(str(number), 1.0)
        assert tracemalloc.get_traced_memory()[0] < 512 << 10
    finally:
        tracemalloc.stop()


def test_the_table_shrinks_again() -> None:
    """Full buckets are forgotten as newcomers come, so the table holds about as many as are in use."""
    buckets = Buckets(rate=10, burst=10)
    for number in range(10_000):
        buckets.take(str(number), 0.0)
    assert len(buckets) == 10_000
    for number in range(5_000):
        buckets.take(f"later {number}", 100.0 + number)
    assert len(buckets) < 10


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("64:ff9b::192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("::1", "192.0.2.1", False),
        ("", "127.0.0.1", False),
        ("192.0.2.1:4000", "192.0.2.1:4001", True),  # not what is asked for, and no way round a limit
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    """IPv6 addresses of one /64 are one client; IPv4 addresses are each their own, in any clothes."""
    assert (address_key(one) == address_key(other)) is same


@given(st.text(max_size=60))
def test_any_text_is_an_address_to_count(text: str) -> None:
    """Counting raises for no text, and keys stay short where the text is no plain word."""
    assert ":" not in text or len(address_key(text)) <= 16


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=100), st.integers(0, 3))
def test_counts_follow_what_is_there(moves: list[tuple[bool, str]], ceiling: int) -> None:
    """A count is the number of those that entered and have not left, never above the ceiling nor below zero."""
    counts, model = Counts(ceiling), dict.fromkeys("abc", 0)
    for enters, key in moves:
        if enters:
            assert counts.enter(key) is (model[key] < ceiling)
            model[key] = min(model[key] + 1, ceiling)
        else:
            counts.leave(key)
            model[key] = max(model[key] - 1, 0)
        assert {key: counts.of(key) for key in "abc"} == model
        assert len(counts) == sum(map(bool, model.values()))


def _reason(failure: Failure | None) -> str:
    return "" if failure is None else failure.reason.code


@pytest.mark.parametrize(
    ("rates", "others_pass"),
    [(Rates(connections=2), False), (Rates(connections_per_address=2), True)],
    ids=["listener", "address"],
)
def test_connections_at_once(rates: Rates, others_pass: bool) -> None:
    """The third connection is refused and not counted, whose limit it is tells who else is; one leaves, one enters."""
    gate = Gate("main", rates)
    assert [_reason(gate.admit_connection("192.0.2.1")) for _ in range(3)] == ["", "", "limit.connections"]
    assert len(gate) == 2
    assert (gate.admit_connection("192.0.2.2") is None) is others_pass
    gate.leave("192.0.2.1")
    assert gate.admit_connection("192.0.2.1") is None


def test_connections_of_one_identity() -> None:
    """An identity's second connection is refused by its own limit, and another's is not."""
    gate = Gate("main", Rates(connections_per_identity=1))
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
        assert gate.admit_connection(address) is None
    assert gate.admit_identity("web", 0.0) is None
    failure = gate.admit_identity("web", 0.0)
    assert failure is not None
    assert failure.reason is Reason.LIMIT_CONNECTIONS
    assert failure.reason.http == 429
    assert failure.facts == {
        "listener": "main",
        "setting": "connections_per_identity",
        "who": "the identity web",
        "identity": "web",
        "limit": "1",
    }
    assert failure.message == (
        "the identity web has as many connections open as the listener main allows (connections_per_identity = 1)"
    )
    assert "raise connections_per_identity of the listener main" in failure.hint
    gate.leave("192.0.2.2")
    assert gate.admit_identity("ops", 0.0) is None
    gate.leave("192.0.2.1", "web")
    assert gate.admit_identity("web", 0.0) is None


def test_handshakes_a_second() -> None:
    """One address that asks too often is refused by its own limit, and leaves the listener's tokens to others."""
    gate = Gate("main", Rates(handshakes_per_second=Rate(10, 5), handshakes_per_second_per_address=Rate(1, 2)))
    asked = [gate.admit_handshake("2001:db8::1", 0.0) for _ in range(50)]
    assert [_reason(one) for one in asked] == [""] * 2 + ["limit.handshakes"] * 48
    assert asked[-1] is not None
    assert asked[-1].facts["address"] == "2001:db8::1"
    assert "1 a second, 2 at once" in asked[-1].message
    others = [_reason(gate.admit_handshake(f"192.0.2.{number}", 0.0)) for number in range(5)]
    assert others == [""] * 3 + ["limit.handshakes"] * 2
    assert gate.admit_handshake("192.0.2.9", 0.2) is None


def test_handshakes_of_one_identity() -> None:
    """An identity that connects too often is refused, and its connection is not counted."""
    gate = Gate("main", Rates(handshakes_per_second_per_identity=Rate(1, 1), connections_per_identity=1))
    assert gate.admit_identity("web", 0.0) is None
    gate.leave("192.0.2.1", "web")
    assert _reason(gate.admit_identity("web", 0.1)) == "limit.handshakes"
    assert gate.admit_identity("web", 1.1) is None


@pytest.mark.parametrize(
    ("rates", "identity", "address"),
    [
        (Rates(requests_per_second=Rate(1, 3)), "ops", "192.0.2.2"),
        (Rates(requests_per_second_per_identity=Rate(1, 3)), "web", "192.0.2.2"),
        (Rates(requests_per_second_per_address=Rate(1, 3)), None, "192.0.2.1"),
    ],
    ids=["listener", "identity", "address"],
)
def test_requests_a_second(rates: Rates, identity: str | None, address: str) -> None:
    """The fourth request at once is refused, also from whoever else falls under the same limit."""
    gate = Gate("main", rates)
    asked = [_reason(gate.admit_request("web", "192.0.2.1", 0.0)) for _ in range(4)]
    assert asked == [""] * 3 + ["limit.requests"]
    assert _reason(gate.admit_request(identity, address, 0.0)) == "limit.requests"
    if rates.requests_per_second is None:
        assert gate.admit_request("ops", "192.0.2.9", 0.0) is None
    assert gate.admit_request("web", "192.0.2.1", 1.1) is None


def test_without_limits_all_comes_in() -> None:
    """No limit refuses nothing, and connections are counted all the same."""
    gate = Gate("main")
    for number in range(1000):
        assert gate.admit_connection("192.0.2.1") is None
        assert gate.admit_handshake("192.0.2.1", 0.0) is None
        assert gate.admit_identity("web", 0.0) is None
        assert gate.admit_request("web", "192.0.2.1", 0.0) is None
        assert len(gate) == number + 1


def test_other_limits_in_force() -> None:
    """A reload counts the connections that are open, keeps buckets whose rate stays, and fills those that change."""
    gate = Gate("main", Rates(requests_per_second=Rate(1, 1), requests_per_second_per_identity=Rate(1, 1)))
    for _ in range(3):
        assert gate.admit_connection("192.0.2.1") is None
    assert gate.admit_request("web", "192.0.2.1", 0.0) is None
    gate.change(Rates(connections=3, requests_per_second=Rate(2, 5), requests_per_second_per_identity=Rate(1, 1)))
    assert _reason(gate.admit_connection("192.0.2.1")) == "limit.connections"
    assert _reason(gate.admit_request("web", "192.0.2.1", 0.0)) == "limit.requests"
    assert gate.admit_request("ops", "192.0.2.1", 0.0) is None
    gate.change(Rates())
    assert gate.admit_connection("192.0.2.1") is None
    assert gate.admit_request("web", "192.0.2.1", 0.0) is None


def test_workers_share_the_limits() -> None:
    """Four workers keep a quarter each, rounded up; what one connection sends is not divided."""
    rates = Rates(
        connections=10,
        handshakes_per_second=Rate(100, 2),
        requests_per_second=Rate(8, 8),
        requests_per_second_per_identity=Rate(5, 5),
    )
    assert rates.share(4) == Rates(
        connections=3,
        handshakes_per_second=Rate(25, 1),
        requests_per_second=Rate(2, 2),
        requests_per_second_per_identity=Rate(5, 5),
        workers=4,
    )
    assert rates.share(1) == rates


@pytest.mark.parametrize(("per_second", "burst"), [(0, 1), (-1, 1), (1, 0.5), (float("inf"), 1), (float("nan"), 1)])
def test_a_rate_that_is_none_cannot_be_made(per_second: float, burst: float) -> None:
    """A rate of nothing, without end, or that lets nothing through at once, is a bug of the caller."""
    with pytest.raises(ValueError, match="a rate is more than 0"):
        Rate(per_second, burst)


def test_what_a_request_costs() -> None:
    """A request's check costs well below what the guard can spend: a microsecond without limits, a few with."""
    rate = Rate(1e9, 1e9)
    limited = Gate("main", Rates(requests_per_second=rate, requests_per_second_per_identity=rate))
    for gate, limit in ((Gate("main"), 1e-6), (limited, 2e-6)):
        asked = partial(gate.admit_request, "web", "192.0.2.1", 1.0)
        assert min(timeit.repeat(asked, timer=time.thread_time, number=10_000, repeat=20)) / 10_000 < limit
