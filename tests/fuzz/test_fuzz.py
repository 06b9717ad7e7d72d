"""The targets of the harness, for a moment each: no bytes bring a reader to anything but what it says it raises."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.harness import TARGETS, Target, mutate, run_blindly

# cryptography tells of serial numbers that it will refuse one day; they are what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
EXAMPLES, MORE = 50, 200


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_near_a_good_input_breaks_nothing(name: str) -> None:
    """Each reader takes its seeds, their mutations and any bytes without a surprise."""
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        target.fuzz(seed)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds), st.integers(0, 1 << 32))
    def near(seed: bytes, chance: int) -> None:
        target.fuzz(mutate(seed, seeds, random.Random(chance)))

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=300))
    def anything(data: bytes) -> None:
        target.fuzz(data)

    near()
    anything()
    chance = random.Random(0)
    for _ in range(MORE):
        target.fuzz(mutate(chance.choice(seeds), seeds, chance))


def test_the_harness_finds_a_planted_crash() -> None:
    """A reader that fails on a changed length is found, with the input that it fails on."""

    def broken(data: bytes) -> None:
        if data.startswith(b"len") and data[3:4] != b"7":
            raise IndexError

    found = run_blindly(Target(broken, lambda: [b"len7 and more"]), 5)
    assert found.crash is not None
    data, error = found.crash
    assert isinstance(error, IndexError)
    assert data.startswith(b"len")
    assert found.runs > 1


def test_the_harness_ends_without_a_crash() -> None:
    """A reader that takes all is tried until the time is up."""
    found = run_blindly(Target(len, lambda: [b"x"]), 0.1)  # type: ignore[arg-type]  # what it returns is of no interest
    assert found.crash is None
    assert found.runs > 10
