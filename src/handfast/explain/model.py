"""What is recorded of a connection, and what is said about it. Values alone; nothing here reads or draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from cryptography import x509

from handfast.errors import Failure, Reason
from handfast.wire.records import Chunk, Event, Side


class Ending(StrEnum):
    """How a recorded connection came to its end."""

    QUIET = "quiet"  # nothing more came in the time that was waited
    CLOSED = "closed"  # the far side said that it was done (close_notify)
    CUT = "cut"  # the far side, or something between, closed without a word
    RESET = "reset"  # the same, with a TCP reset
    TIMEOUT = "timeout"  # the handshake was not done in time
    BROKEN = "broken"  # an alert, or an error in TLS
    FULL = "full"  # more was said than is read


@dataclass(frozen=True, slots=True)
class Recording:
    """One connection. `seen_from`: whose end we were, or None for somebody else's recording.

    `done`: when the handshake was done on our side, in seconds from the beginning; None if it never was.
    `said`: application bytes of our own, or the client's where it is not ours; `answer`: those of the far side, as
    many as are kept of each. `broken`: the engine's own word.
    """

    place: str  # the server's address
    began: datetime
    seen_from: Side | None
    events: tuple[Event, ...]
    chunks: tuple[Chunk, ...]
    ending: Ending
    done: float | None = None
    waited: float = 0.0  # seconds after the handshake in which a refusal could come
    broken: Failure | None = None
    said: bytes = b""
    answer: bytes = b""
    protocol: str = ""  # ALPN
    keylog: tuple[bytes, ...] = field(default=(), repr=False)

    def sent_by(self, side: Side) -> int:
        """Bytes that `side` put on the network."""
        return sum(len(chunk.data) for chunk in self.chunks if chunk.sender is side)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known besides the recording, with which a dumb alert becomes a cause.

    `own`: our certificates, leaf first, whether they were shown or not.
    `peer_faults`: what is wrong with the far side's; None if it was not judged, for no authority was given.
    """

    now: datetime
    server_name: str = ""
    own: tuple[x509.Certificate, ...] = ()
    peer_faults: tuple[Failure, ...] | None = None
    anchors: tuple[x509.Certificate, ...] = ()
    small_works: bool | None = None  # a second try with a smaller ClientHello: it got an answer, or did not


class Who(StrEnum):
    """Who must act."""

    CLIENT = "the client"
    SERVER = "the server"
    AUTHORITY = "the authority"
    NETWORK = "the network"
    CALLER = "whoever gave the command"
    APP = "the app behind the guard"
    HANDFAST = "handfast's makers"
    NOBODY = "nobody"


class Sure(StrEnum):
    """How sure a verdict is."""

    CERTAIN = "certain"
    LIKELY = "likely"
    POSSIBLE = "possible"

    @property
    def prefix(self) -> str:
        """What is said before a cause that is this sure; '' or a word and its blank."""
        return {Sure.CERTAIN: "", Sure.LIKELY: "most likely ", Sure.POSSIBLE: ""}[self]


class Result(StrEnum):
    """What came of a connection."""

    WORKS = "works"
    FAILS = "fails"
    UNKNOWN = "unknown"  # what would show it cannot be read


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it, why, who must act, and the command. `reason` is None where nothing is wrong.

    `also`: other causes that would look the same from here. `besides`: what is wrong as well, and would be the next
    refusal.
    """

    result: Result
    headline: str
    text: str
    who: Who = Who.NOBODY
    command: str = ""
    reason: Reason | None = None
    sure: Sure = Sure.CERTAIN
    also: tuple[str, ...] = ()
    besides: tuple[str, ...] = ()

    @property
    def worked(self) -> bool:
        """Whether it is known to work."""
        return self.result is Result.WORKS


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at in a certificate. `good` is None where it could not be judged."""

    what: str
    good: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Link:
    """One certificate of a chain, with what was checked. `sent`: it was presented, and not taken from our bundle."""

    label: str
    subject: str
    issuer: str
    serial: str
    key: str
    not_before: datetime | None
    not_after: datetime | None
    names: tuple[str, ...]
    checks: tuple[Check, ...]
    sha256: str = ""
    size: int = 0
    sent: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """One message, explained. `at`: milliseconds from the beginning. `mutual`: only mutual TLS has it."""

    at: float
    sender: Side
    name: str
    size: int
    encrypted: bool
    purpose: str
    facts: tuple[tuple[str, str], ...] = ()
    mutual: bool = False
    bad: bool = False
    chain: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True)
class Added:
    """What mutual TLS added to this handshake: messages and bytes counted in it, times measured on the endpoint.

    Times in milliseconds, to the end of the client's handshake: medians of `runs`. None: not measured.
    """

    messages: tuple[str, ...]
    size: int
    total: int
    mutual_ms: float | None = None
    plain_ms: float | None = None
    runs: int = 0


@dataclass(frozen=True, slots=True)
class Explanation:
    """A connection, explained."""

    recording: Recording
    steps: tuple[Step, ...]
    added: Added
    verdict: Verdict
    version: str = ""
    suite: str = ""
    group: str = ""
    sealed: bool = False  # most of it stayed encrypted
