"""Profiles: what may be issued, for how long, and why so. A table; issuing.py holds orders to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

from handfast.errors import InvalidInput, Reason
from handfast.pki.keys import KeyType
from handfast.pki.names import Kind

BACKDATE = timedelta(seconds=60)  # notBefore lies so far back, for peers whose clocks are slow


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of certificate."""

    name: str
    purpose: str  # one sentence: what for, why so
    ca: bool
    path_length: int | None  # of an authority: how many authorities may stand below it
    server: bool  # extended key usage serverAuth
    client: bool  # extended key usage clientAuth
    kinds: frozenset[Kind]  # of names it may carry
    key_types: tuple[KeyType, ...]  # the first is the default
    lifetime: timedelta  # where the order gives none
    max_lifetime: timedelta


_KEY_TYPES = tuple(KeyType)
_ROOT_KEY_TYPES = (KeyType.P384, *(kind for kind in KeyType if kind is not KeyType.P384))
_DAY, _WEEK = timedelta(days=1), timedelta(days=7)
_YEAR, _DECADE = timedelta(days=365), timedelta(days=3652)

_ALL = (
    Profile(
        name="root",
        purpose="The anchor that peers trust; it signs issuers, rarely, and can be kept offline.",
        ca=True,
        path_length=1,
        server=False,
        client=False,
        kinds=frozenset({Kind.SPIFFE}),
        key_types=_ROOT_KEY_TYPES,
        lifetime=_DECADE,
        max_lifetime=_DECADE,
    ),
    Profile(
        name="issuer",
        purpose="Signs leaves day by day, so that the root need not; it may have no authority below it.",
        ca=True,
        path_length=0,
        server=False,
        client=False,
        kinds=frozenset({Kind.SPIFFE}),
        key_types=_KEY_TYPES,
        lifetime=_YEAR,
        max_lifetime=_DECADE,
    ),
    Profile(
        name="server",
        purpose="For a host that clients reach by its DNS name or IP address; it cannot be used as a client.",
        ca=False,
        path_length=None,
        server=True,
        client=False,
        kinds=frozenset({Kind.DNS, Kind.IP, Kind.SPIFFE}),
        key_types=_KEY_TYPES,
        lifetime=_DAY,
        max_lifetime=_WEEK,
    ),
    Profile(
        name="client",
        purpose="For a person or program that calls out; it cannot be used as a server.",
        ca=False,
        path_length=None,
        server=False,
        client=True,
        kinds=frozenset({Kind.SPIFFE, Kind.URI, Kind.EMAIL, Kind.DNS}),
        key_types=_KEY_TYPES,
        lifetime=_DAY,
        max_lifetime=_WEEK,
    ),
    Profile(
        name="peer",
        purpose="For a workload that both calls and is called: one SPIFFE ID (X509-SVID 2), both uses.",
        ca=False,
        path_length=None,
        server=True,
        client=True,
        kinds=frozenset({Kind.SPIFFE, Kind.DNS, Kind.IP}),
        key_types=_KEY_TYPES,
        lifetime=_DAY,
        max_lifetime=_WEEK,
    ),
)

PROFILES: Mapping[str, Profile] = MappingProxyType({profile.name: profile for profile in _ALL})

_LIFETIME = re.compile(r"([1-9][0-9]{0,8})([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_lifetime(text: str) -> timedelta:
    """Parse a length of time: `90s`, `15m`, `24h`, `7d`, `52w`. Raises InvalidInput (INPUT_LIFETIME)."""
    found = _LIFETIME.fullmatch(text)
    if not found:
        raise InvalidInput(Reason.INPUT_LIFETIME, value=text)
    length = int(found[1]) * _UNITS[found[2]]
    if length > 100 * 366 * 86400:  # a century: longer ones leave the years that a certificate can hold
        raise InvalidInput(Reason.INPUT_LIFETIME, value=text)
    return timedelta(seconds=length)
