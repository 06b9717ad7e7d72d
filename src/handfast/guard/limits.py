"""How much a listener takes: connections at once, handshakes and requests a second.

Owns the counts and the verdict. Does no I/O and reads no clock: `now` is monotonic seconds.

Theory of operation. A token bucket is one number, the instant at which it is full again (the generic cell rate
algorithm, ITU-T I.371 annex A): a token moves it on by 1/rate, and it may lie burst/rate ahead at most. A full
bucket is like one that was never seen, so it can be forgotten at no loss. One that is not full is never
forgotten: else whoever calls from many addresses would push an empty bucket of theirs out of the table, and
come back to a full one. While the table is full of buckets that are not, newcomers share a fixed number of
buckets, and who gets a bucket of their own later takes over what the shared one lacks. So no key ever gets
more than burst + rate * seconds, and memory is bounded whatever comes.
"""

from __future__ import annotations

import socket
from array import array
from collections import OrderedDict
from dataclasses import dataclass, fields
from math import ceil, inf
from typing import Any

from handfast.errors import Failure, Reason

CAPACITY = 65536  # buckets in one table, some 11 MB when all are in use
SHARED = 4096  # buckets for those who find the table full
_LOOK = 4  # how many of the oldest a newcomer makes us look at: more than one, so that a table shrinks again
_SLACK = 1e-6  # seconds; sums of fractions must not cost the last token of a burst

_EACH = ("_per_address", "_per_identity")  # how the settings end that are not for the listener as a whole

_NAT64 = bytes.fromhex("0064ff9b") + bytes(8)  # RFC 6052 2.1: an IPv4 address behind a translator
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2: an IPv4 client of a socket that takes both


class Bucket:
    """A token bucket: `burst` tokens at first and at most, `rate` more each second."""

    __slots__ = ("_depth", "_full_at", "_step")

    def __init__(self, rate: float, burst: float) -> None:
        self._step, self._depth = _timing(rate, burst)
        self._full_at = -inf

    def take(self, now: float) -> bool:
        """Take one token; False when there is none. A clock that goes back gives nothing away."""
        full_at = self._full_at
        at = (full_at if full_at > now else now) + self._step
        if at - now > self._depth:
            return False
        self._full_at = at
        return True


class Buckets:
    """A token bucket for each key, of which at most `capacity` are remembered. See the theory of operation."""

    __slots__ = ("_capacity", "_depth", "_full_at", "_shared", "_step")

    def __init__(self, rate: float, burst: float, capacity: int = CAPACITY) -> None:
        self._step, self._depth = _timing(rate, burst)
        self._capacity = capacity
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._shared = array("d", [-inf]) * min(SHARED, capacity)

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: str, now: float) -> bool:
        """Take one token from the key's bucket; False when there is none."""
        full_at = self._full_at.get(key)
        if full_at is None:
            return self._take_new(key, now)
        at = (full_at if full_at > now else now) + self._step
        if at - now > self._depth:
            return False
        self._full_at[key] = at
        return True

    def _take_new(self, key: str, now: float) -> bool:
        self._forget_full(now)
        slot = hash(key) % len(self._shared)  # salted by the interpreter, so nobody can choose whom to share with
        at = max(self._shared[slot], now) + self._step
        if at - now > self._depth:
            return False
        if len(self._full_at) < self._capacity:
            self._full_at[key] = at
        else:
            self._shared[slot] = at
        return True

    def _forget_full(self, now: float) -> None:
        """Forget the full ones among the oldest; the others have their turn again when all have been looked at."""
        table = self._full_at
        for _ in range(min(_LOOK, len(table))):
            key = next(iter(table))
            if table[key] <= now:
                del table[key]
            else:
                table.move_to_end(key)


class Counts:
    """How many of each key are there now. Holds no key that has none, so it is as bounded as what it counts."""

    __slots__ = ("_counts", "ceiling")

    def __init__(self, ceiling: int | None) -> None:
        self.ceiling = ceiling
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def of(self, key: str) -> int:
        """How many there are of this key."""
        return self._counts.get(key, 0)

    def enter(self, key: str) -> bool:
        """Count one more; False, and not counted, when there are as many as there may be."""
        count = self._counts.get(key, 0)
        if self.ceiling is not None and count >= self.ceiling:
            return False
        self._counts[key] = count + 1
        return True

    def leave(self, key: str) -> None:
        """Count one less. One that never entered changes nothing."""
        count = self._counts.get(key, 0)
        if count > 1:
            self._counts[key] = count - 1
        elif count:
            del self._counts[key]


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second, and so many at once after a rest. ValueError for a rate of nothing or a burst below one."""

    per_second: float
    burst: float

    def __post_init__(self) -> None:
        _timing(self.per_second, self.burst)

    def __str__(self) -> str:
        return f"{self.per_second:g} a second, {self.burst:g} at once"


_UNDIVIDED = frozenset({"requests_per_second_per_address", "requests_per_second_per_identity"})


@dataclass(frozen=True, slots=True)
class Rates:
    """The limits of one listener; None is no limit. The field names are those of the settings.

    `workers`: of how many these are one's share.
    """

    connections: int | None = None  # open at once
    connections_per_address: int | None = None
    connections_per_identity: int | None = None
    handshakes_per_second: Rate | None = None
    handshakes_per_second_per_address: Rate | None = None
    handshakes_per_second_per_identity: Rate | None = None
    requests_per_second: Rate | None = None
    requests_per_second_per_address: Rate | None = None
    requests_per_second_per_identity: Rate | None = None
    workers: int = 1

    def share(self, workers: int) -> Rates:
        """What one of several worker processes may take, so that together they keep these limits.

        The kernel spreads connections over the workers, so what is counted by connection or handshake is divided.
        The requests of one address or identity are not: they often come over one connection, and so to one worker;
        who opens many connections may get up to `workers` times as many.
        """
        shared: dict[str, Any] = {"workers": workers}
        for field in fields(self):
            if field.name != "workers":
                limit = getattr(self, field.name)
                shared[field.name] = limit if field.name in _UNDIVIDED else _part(limit, workers)
        return Rates(**shared)


NO_LIMITS = Rates()


class Gate:
    """The limits of one listener at work: what may come in, and what is in now.

    A connection passes `admit_connection`, `admit_handshake` and, once its peer is known, `admit_identity`; then
    each of its requests passes `admit_request`. `leave` is called once for each connection that was admitted, with
    the identity that was. An address is an IP address in text, without its port; "" for a UNIX socket's clients.
    """

    __slots__ = ("_addresses", "_buckets", "_identities", "_limits_requests", "_listener", "_open", "_whole", "rates")

    def __init__(self, listener: str, rates: Rates = NO_LIMITS) -> None:
        self._listener = listener
        self._open = 0
        self._addresses = Counts(None)
        self._identities = Counts(None)
        self.rates = NO_LIMITS
        self._whole: dict[str, Bucket] = {}  # by setting: one for the listener
        self._buckets: dict[str, Buckets] = {}  # by setting: one for each address or identity
        self._limits_requests = False
        self.change(rates)

    def __len__(self) -> int:
        return self._open

    def change(self, rates: Rates) -> None:
        """Put other limits in force. Open connections stay counted; buckets whose rate stays keep their level."""
        asked = {field.name: getattr(rates, field.name) for field in fields(rates)}
        new = {name: rate for name, rate in asked.items() if isinstance(rate, Rate)}
        same = {name for name, rate in new.items() if rate == getattr(self.rates, name)}
        self._whole = {
            name: self._whole[name] if name in same else Bucket(rate.per_second, rate.burst)
            for name, rate in new.items()
            if not name.endswith(_EACH)
        }
        self._buckets = {
            name: self._buckets[name] if name in same else Buckets(rate.per_second, rate.burst)
            for name, rate in new.items()
            if name.endswith(_EACH)
        }
        self.rates = rates
        self._addresses.ceiling = rates.connections_per_address
        self._identities.ceiling = rates.connections_per_identity
        self._limits_requests = any(name.startswith("requests") for name in new)

    def admit_connection(self, address: str) -> Failure | None:
        """Take a connection in, or say why not (LIMIT_CONNECTIONS). Not counted when refused."""
        ceiling = self.rates.connections
        if ceiling is not None and self._open >= ceiling:
            return self._many("connections", ceiling, "", "")
        if not self._addresses.enter(address_key(address)):
            return self._many("connections_per_address", self._addresses.ceiling, "address", address)
        self._open += 1
        return None

    def admit_handshake(self, address: str, now: float) -> Failure | None:
        """Let an admitted connection begin its handshake, or say why not (LIMIT_HANDSHAKES)."""
        # The narrow limit first: one address that asks too often must not use up what is there for all.
        if self._over_address("handshakes_per_second_per_address", address, now):
            return self._often(Reason.LIMIT_HANDSHAKES, "handshakes_per_second_per_address", "address", address)
        if self._drained("handshakes_per_second", now):
            return self._often(Reason.LIMIT_HANDSHAKES, "handshakes_per_second", "", "")
        return None

    def admit_identity(self, identity: str, now: float) -> Failure | None:
        """Let the verified peer of an admitted connection in, or say why not (LIMIT_HANDSHAKES, LIMIT_CONNECTIONS).

        Not counted when refused: `leave` is then called without the identity.
        """
        if self._over("handshakes_per_second_per_identity", identity, now):
            return self._often(Reason.LIMIT_HANDSHAKES, "handshakes_per_second_per_identity", "identity", identity)
        if not self._identities.enter(identity):
            return self._many("connections_per_identity", self._identities.ceiling, "identity", identity)
        return None

    def admit_request(self, identity: str | None, address: str, now: float) -> Failure | None:
        """Let a request through, or say why not (LIMIT_REQUESTS). None: a client without a certificate."""
        if not self._limits_requests:
            return None
        if identity is not None and self._over("requests_per_second_per_identity", identity, now):
            return self._often(Reason.LIMIT_REQUESTS, "requests_per_second_per_identity", "identity", identity)
        if self._over_address("requests_per_second_per_address", address, now):
            return self._often(Reason.LIMIT_REQUESTS, "requests_per_second_per_address", "address", address)
        if self._drained("requests_per_second", now):
            return self._often(Reason.LIMIT_REQUESTS, "requests_per_second", "", "")
        return None

    def leave(self, address: str, identity: str | None = None) -> None:
        """An admitted connection has ended; `identity` is what `admit_identity` let in, if it did."""
        self._open -= 1
        self._addresses.leave(address_key(address))
        if identity is not None:
            self._identities.leave(identity)

    def _over(self, setting: str, key: str, now: float) -> bool:
        buckets = self._buckets.get(setting)
        return buckets is not None and not buckets.take(key, now)

    def _over_address(self, setting: str, address: str, now: float) -> bool:
        buckets = self._buckets.get(setting)
        return buckets is not None and not buckets.take(address_key(address), now)

    def _drained(self, setting: str, now: float) -> bool:
        bucket = self._whole.get(setting)
        return bucket is not None and not bucket.take(now)

    def _many(self, setting: str, ceiling: int | None, kind: str, key: str) -> Failure:
        return Failure(
            Reason.LIMIT_CONNECTIONS, self._facts(setting, kind, key) | {"limit": self._told(setting, ceiling)}
        )

    def _often(self, reason: Reason, setting: str, kind: str, key: str) -> Failure:
        limit = self._told(setting, getattr(self.rates, setting))
        return Failure(reason, self._facts(setting, kind, key) | {"limit": limit})

    def _told(self, setting: str, limit: object) -> str:
        workers = self.rates.workers
        share = "" if workers == 1 or setting in _UNDIVIDED else f", the share of one of {workers} workers"
        return f"{limit}{share}"

    def _facts(self, setting: str, kind: str, key: str) -> dict[str, str]:
        who = f"the {kind} {key}" if kind else f"the listener {self._listener}"
        named = {kind: key} if kind else {}
        return {"listener": self._listener, "setting": setting, "who": who, **named}


def address_key(address: str) -> str:
    """What an address is counted as: IPv6 by its /64, which one client has whole (RFC 6177), IPv4 by itself.

    An IPv4 address in IPv6 clothes is the IPv4 address. Text that is no IPv6 address though it has a colon is
    counted as one client with all of its kind. Raises nothing.
    """
    if ":" not in address:
        return address
    try:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):  # ValueError: NUL or what has no encoding
        return "::"
    if packed.startswith((_MAPPED, _NAT64)):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return packed[:8].hex()


def _timing(rate: float, burst: float) -> tuple[float, float]:
    """The seconds of one token, and how far ahead the instant of fullness may lie."""
    if not (0 < rate < inf and 1 <= burst < inf):
        raise ValueError("a rate is more than 0 a second, and a burst 1 or more")
    return 1 / rate, burst / rate + _SLACK


def _part(limit: int | Rate | None, workers: int) -> int | Rate | None:
    match limit:
        case None:
            return None
        case Rate(per_second, burst):
            return Rate(per_second / workers, max(1.0, burst / workers))
        case _:
            return ceil(limit / workers)
