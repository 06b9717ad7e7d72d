"""Runs checks against one endpoint: a first look, a baseline, then each check within its bounds.

Theory of operation. `prepare` looks at the server and, with a credential, makes one good request: the baseline.
`run` gives each check an `Audit`, its only way to the network: every connection goes to the one address that the
user named, is counted, and waits its turn. At most `Pace.at_once` connections are open at a time; a gentle pace has
one, and pauses between two. A check that raises, or outlasts its time, is inconclusive; it never passes. Where the
first look finds another protocol, there is no baseline, and only checks that can do without TLS are made; where it
finds nothing at all, holes are still found, and a pass shows nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from handfast.audit.model import Check, Finding, Need, Outcome, Report, Verdict, not_applicable, shown, unclear
from handfast.audit.oracle import Reach, Reply, must_be_refused, reach
from handfast.audit.wires import Flight, Silence, Wire, call, shake_hands, whole
from handfast.errors import HandfastError, InvalidInput, Reason, Unreachable
from handfast.testing import TestAuthority, TestLeaf
from handfast.tls.client import ServerFacts
from handfast.tls.probe import Offer, Probe, ProbeRefused, Session

_TLS_RECORDS = (20, 21, 22, 23)  # RFC 8446 B.1
_MOST_SHOWN = 40  # bytes of what came in place of TLS

Progress = Callable[[Check, Outcome | None], None]  # a check begins (None) or has ended


@dataclass(frozen=True, slots=True)
class Target:
    """The one endpoint of an audit. `sni` is the server name that is asked for; `path` what an accepted client gets.

    `echo`: a path that answers with the request's headers as the application got them. `protected`: one that the
    accepted client must not reach.
    """

    host: str
    port: int
    sni: str | None = None
    path: str = "/"
    echo: str | None = None
    protected: str | None = None

    @property
    def name(self) -> str:
        """What the server is called: by the name that is asked for, else by its address."""
        return self.sni or self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Pace:
    """How hard the server is worked. Times in seconds; `whole` bounds the run, `answer` one wait for an answer.

    `limit`: how long a server may keep a client that does not get on with its handshake; `patience`: how long we
    wait to see it. `load`: bytes and counts that a check may throw at it are this share of the usual.
    """

    at_once: int = 4
    pause: float = 0.0
    answer: float = 5.0
    limit: float = 65.0  # nginx cuts after 60 s (client_header_timeout)
    patience: float = 65.0
    whole: float = 600.0
    load: float = 1.0


GENTLE = Pace(at_once=1, pause=0.25, patience=15.0, load=0.25)


@dataclass(frozen=True, slots=True)
class Means:
    """What the user gave to audit with.

    `credential`: a leaf that the server should take. `authority`: one that the server trusts, with its key.
    `client`: the kind of client to be put to the test by a person in the middle, and the file that it trusts.
    `revoked`: a leaf that was revoked; `revoker`: what can revoke one. `other`: a second listener of the same
    owner. `pid`: the server's process, where it runs on this machine.
    """

    credential: TestLeaf | None = None
    authority: TestAuthority | None = None
    client: Client | None = None
    revoked: TestLeaf | None = None
    revoker: Revoker | None = None
    other: Target | None = None
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Revoker:
    """An authority that the server hears of revocations from. `issue` makes a client's leaf of these names."""

    issue: Callable[[tuple[str, ...]], TestLeaf]
    revoke: Callable[[TestLeaf], None]


@dataclass(frozen=True, slots=True)
class Client:
    """A client program under test: `command(host, port, ca, folder)` is its command line: a request to `host`, at
    our `port`, trusting the file `ca`. `folder` is empty, and its own.
    """

    kind: str
    ca: str
    command: Callable[[str, int, str, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Look:
    """What the server shows to a client without a certificate. Nothing in it is verified.

    `facts` is None where no TLS handshake could be had. `tls12`: the server speaks it; `tls13` likewise. `alien`: what
    came in place of TLS, b'' if nothing did; None where the server spoke TLS, if only to refuse.
    """

    facts: ServerFacts | None
    authorities: tuple[x509.Name, ...] = ()
    tls12: bool = False
    tls13: bool = False
    http: bool = False
    alien: bytes | None = None

    @property
    def instead(self) -> str:
        """What came in place of TLS, in words; '' where the server spoke TLS."""
        if self.alien is None:
            return ""
        if not self.alien:
            return "it did not answer a ClientHello, not even with an alert"
        return f'it answered a ClientHello with "{shown(self.alien[:_MOST_SHOWN])}"'

    @property
    def leaf(self) -> x509.Certificate | None:
        """The server's certificate."""
        return self.facts.chain[0] if self.facts and self.facts.chain else None

    def __str__(self) -> str:
        if self.facts is None:
            return f"no TLS: {self.instead}" if self.instead else "TLS, and every handshake ended by the server"
        spoken = " and ".join(v for v, on in (("TLS 1.3", self.tls13), ("TLS 1.2", self.tls12)) if on)
        return f"{spoken}; {self.facts.version}, {self.facts.cipher}, {self.facts.group}"


class _Turns:
    """The gate that all connections of a run pass: so many at once, so long apart."""

    def __init__(self, pace: Pace) -> None:
        self._slots = threading.Semaphore(pace.at_once)
        self._pause = pace.pause
        self._lock = threading.Lock()
        self._next = 0.0
        self.count = 0

    @contextmanager
    def turn(self, deadline: float) -> Iterator[None]:
        if not self._slots.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            raise Silence
        try:
            with self._lock:
                self.count += 1
                begin = max(self._next, time.monotonic())
                self._next = begin + self._pause
            time.sleep(max(begin - time.monotonic(), 0.0))
            yield
        finally:
            self._slots.release()


@dataclass(frozen=True, slots=True)
class Audit:
    """What a check sees: the endpoint, what is known of it, and the only ways to reach it.

    `deadline` (in `time.monotonic()` seconds) ends the check; `connect` and `call` keep to it.
    """

    target: Target
    means: Means
    pace: Pace
    look: Look
    baseline: Reply | None
    deadline: float
    _turns: _Turns = field(repr=False)

    @property
    def request(self) -> bytes:
        """The request that every attack sends: what the baseline sent."""
        return self.request_for(self.target.path)

    def request_for(self, path: str, *headers: str, method: str = "GET") -> bytes:
        """An HTTP/1.1 request that asks to close afterwards. `headers` are whole lines."""
        lines = (f"{method} {path} HTTP/1.1", f"Host: {self.target.sni or self.target}", *headers, "Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    @contextmanager
    def connect(self, seconds: float | None = None) -> Iterator[Wire]:
        """One TCP connection to the endpoint, in its turn. `seconds`: how long it may last, if not `pace.answer`.

        Raises Unreachable; Silence when its turn does not come before the check's time is up.
        """
        with self._turns.turn(self.deadline):
            ends = min(self.deadline, time.monotonic() + (self.pace.answer if seconds is None else seconds))
            with Wire.connect(self.target.host, self.target.port, ends) as wire:
                yield wire

    def offer(
        self,
        leaf: TestLeaf | None = None,
        *,
        tls12: bool = False,
        alpn: tuple[str, ...] = (),
        session: Session | None = None,
    ) -> Offer:
        """What a client brings that shows `leaf`, or no certificate; the rest as in Offer."""
        presented, key = (None, None) if leaf is None else (leaf.presented, leaf.key)
        return Offer(self.target.sni, presented, key, tls12, alpn, session)

    def call(
        self, leaf: TestLeaf | None = None, *, request: bytes | None = None, tls12: bool = False, flight: Flight = whole
    ) -> Reply:
        """Connect, shake hands as a client that shows `leaf`, send a request (the baseline's) and read the answer.

        `flight` puts the first flight on the wire in its own way. Raises Unreachable, Silence. For ALPN and
        resumption use `connect`, `offer` and `wires.call`.
        """
        with self.connect() as wire:
            return call(wire, self.offer(leaf, tls12=tls12), request or self.request, flight)[0]

    def refused(self, sent: str, leaf: TestLeaf | None, *, tls12: bool = False) -> Outcome:
        """The outcome of a client that must not get in. `sent`: what it does, in words."""
        return self.judge(sent, self.call(leaf, tls12=tls12))

    def judge(self, sent: str, reply: Reply) -> Outcome:
        """The outcome of an attack that must not reach the application, from what it brought."""
        return must_be_refused(sent, reply, self.baseline)

    def alive(self) -> bool:
        """Whether the server still shakes hands, after something that may have hurt it."""
        try:
            with self.connect() as wire:
                shake_hands(wire, Probe(self.offer(tls12=not self.look.tls13)))
        except ProbeRefused as refused:
            return bool(refused.alert)  # it lives, and says no
        except (Unreachable, Silence, OSError):
            return False
        return True


def prepare(target: Target, means: Means, pace: Pace) -> Audit:
    """Look at the endpoint and make the baseline. Raises Unreachable, and InvalidInput (AUDIT_BASELINE) where a
    client with the credential is refused: its refusal could not be told from an attacker's. Where no TLS is spoken,
    there is no baseline.
    """
    turns = _Turns(pace)
    audit = Audit(target, means, pace, Look(None), None, time.monotonic() + pace.whole, turns)
    with audit.connect():  # there must be something to audit
        pass
    looked = replace(audit, look=_look(audit))
    if means.credential is None or looked.look.instead:
        return looked
    baseline = looked.call(means.credential)
    reached, why = reach(baseline, None)
    if reached is not Reach.YES:
        raise InvalidInput(Reason.AUDIT_BASELINE, target=str(target), detail=why[:200])
    return replace(looked, baseline=baseline, look=replace(looked.look, http=baseline.status is not None))


def run(audit: Audit, checks: Sequence[Check], progress: Progress) -> Report:
    """Run the checks and return what they came to, the worst first. `progress` is called from several threads."""
    began = datetime.now(UTC)
    ends = time.monotonic() + audit.pace.whole
    with ThreadPoolExecutor(max_workers=max(audit.pace.at_once, 1), thread_name_prefix="audit") as pool:
        started = [pool.submit(_one, audit, check, ends, progress) for check in checks]
        try:
            findings = [future.result() for future in started]
        except BaseException:
            _cancel(started)
            raise
    order = list(Verdict)
    findings.sort(key=lambda one: (order.index(one.outcome.verdict), one.check.severity.rank, one.check.id))
    said = began.isoformat(timespec="seconds")
    return Report(str(audit.target), str(audit.look), _base(audit), said, tuple(findings), audit.look.instead)


def _base(audit: Audit) -> str:
    if audit.baseline is not None:
        return str(audit.baseline).splitlines()[0]
    return "nothing: no TLS is spoken" if audit.look.instead else "none: no credential was given"


def lacks(audit: Audit, check: Check) -> Need | None:
    """The first thing that a check needs and the audit has not; None when it has all."""
    have = {
        Need.CREDENTIAL: audit.means.credential is not None,
        Need.AUTHORITY: audit.means.authority is not None,
        Need.CLIENT: audit.means.client is not None,
        Need.HTTP: audit.look.http,
        Need.INSIDER: audit.means.credential is not None or audit.means.authority is not None,
        Need.ECHO: audit.target.echo is not None,
        Need.PROTECTED: audit.target.protected is not None,
        Need.REVOKER: audit.means.revoker is not None,
        Need.OTHER: audit.means.other is not None,
        Need.PID: audit.means.pid is not None,
    }
    return next((need for need in check.needs if not have[need]), None)


def _one(audit: Audit, check: Check, ends: float, progress: Progress) -> Finding:
    began = time.monotonic()
    progress(check, None)
    missing = lacks(audit, check)
    if missing is not None:
        outcome = not_applicable(missing.value)
    elif check.tls and audit.look.alien:
        outcome = unclear("the server does not speak TLS, so nothing is shown")
    elif began >= ends:
        outcome = unclear("the time for the whole audit was up before its turn came")
    else:
        outcome = _tried(replace(audit, deadline=min(began + check.seconds, ends)), check)
        if check.tls and audit.look.instead and outcome.verdict is Verdict.PASS:
            outcome = unclear(
                f"the server speaks TLS with nobody, so this shows nothing: {outcome.why}", *outcome.evidence
            )
    progress(check, outcome)
    return Finding(check, outcome, time.monotonic() - began)


def _tried(audit: Audit, check: Check) -> Outcome:
    try:
        return check.run(audit)
    except Silence:
        return unclear("its time was up before it was done")
    except HandfastError as error:
        return unclear(str(error))
    except (ProbeRefused, OSError) as error:
        return unclear(f"the exchange broke off: {error}")
    except Exception as error:  # a check, or a library that it made odd things with, is wrong: never a pass
        return unclear(f"the check itself failed ({type(error).__name__}: {error})"[:300])


def _cancel(futures: Sequence[Future[Finding]]) -> None:
    for future in futures:
        future.cancel()


def _look(audit: Audit) -> Look:
    newest, first, alien = _glance(audit, tls12=False)
    older, second, alien_too = _glance(audit, tls12=True)
    seen = newest or older
    if seen is None:
        return Look(None, alien=None if alien is None or alien_too is None else alien or alien_too)
    # Without a handshake OpenSSL says the highest version that it would speak: only a finished one counts.
    facts, tls13 = seen.facts, newest is not None and newest.facts.version == "TLSv1.3"
    spoken = any(reply.status is not None for reply in (first, second))
    return Look(facts, seen.accepted_authorities, older is not None, tls13, spoken)


def _glance(audit: Audit, tls12: bool) -> tuple[Probe | None, Reply, bytes | None]:
    """A client without a certificate; the probe where it came to a handshake, refused or not; and what came in place
    of TLS, None where at least an alert did.
    """
    with audit.connect() as wire:
        reply, probe = call(wire, audit.offer(tls12=tls12), audit.request)
    spoke = probe is not None and (probe.done or bool(probe.facts.chain))
    received = b"".join(wire.received)
    if spoke or reply.alert or (received and received[0] in _TLS_RECORDS and received[1:2] in (b"", b"\3")):
        return probe if spoke else None, reply, None
    return None, reply, received
