"""Profiles: the table is sound, and lengths of time are read."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, Reason
from handfast.pki.keys import KeyType
from handfast.pki.names import Kind
from handfast.pki.profiles import PROFILES, Profile, parse_lifetime


def test_the_table_is_what_the_documents_say() -> None:
    """Names, uses and lifetimes of the profiles do not change by accident."""
    assert {name: (p.ca, p.path_length, p.server, p.client) for name, p in PROFILES.items()} == {
        "root": (True, 1, False, False),
        "issuer": (True, 0, False, False),
        "server": (False, None, True, False),
        "client": (False, None, False, True),
        "peer": (False, None, True, True),
    }
    day = timedelta(days=1)
    assert {name: p.lifetime // day for name, p in PROFILES.items()} == {
        "root": 3652,
        "issuer": 365,
        "server": 1,
        "client": 1,
        "peer": 1,
    }


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda p: p.name)
def test_every_profile_is_sound(profile: Profile) -> None:
    """Each profile has a use, a sentence, a default key and a lifetime within its ceiling."""
    assert profile.ca is not (profile.server or profile.client)
    assert (profile.path_length is not None) is profile.ca
    assert profile.purpose.endswith(".")
    assert set(profile.key_types) == set(KeyType)
    assert timedelta(0) < profile.lifetime <= profile.max_lifetime
    assert not profile.kinds & {Kind.CN, Kind.SHA256, Kind.OPAQUE, Kind.FORBIDDEN}
    if not profile.ca:
        assert profile.max_lifetime == timedelta(days=7)


def test_profiles_cannot_be_changed() -> None:
    """The table is a constant."""
    with pytest.raises(TypeError):
        PROFILES["mine"] = PROFILES["peer"]  # type: ignore[index]  # the point of the test


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("24h", 86400), ("7d", 604800), ("52w", 52 * 604800), ("1s", 1)]
)
def test_lengths_of_time(text: str, seconds: int) -> None:
    """A number and one unit are a length of time."""
    assert parse_lifetime(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "0s", "0d", "-1h", "1", "h", "1.5h", "1h30m", " 1h", "1h\n", "1H", "1y", "٣d", "01h", "999999999w"]
)
def test_what_is_no_length_of_time(text: str) -> None:
    """Everything else is refused, zero and the unbounded too."""
    with pytest.raises(InvalidInput) as caught:
        parse_lifetime(text)
    assert caught.value.reason is Reason.INPUT_LIFETIME


@given(st.text(max_size=15))
def test_parsing_is_total(text: str) -> None:
    """Any text is a length of time or InvalidInput."""
    with suppress(InvalidInput):
        assert parse_lifetime(text) > timedelta(0)
