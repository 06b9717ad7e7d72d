"""The words of an audit: a check, what one run of it showed, and how bad a hole is. Values only; no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from handfast.audit.runner import Audit

MAX_EVIDENCE = 400  # characters of what was sent or came back that a report keeps


class Severity(StrEnum):
    """How bad it is when a check fails. A failure that is only INFO does not fail an audit."""

    CRITICAL = "critical"  # anybody gets in
    HIGH = "high"  # somebody gets in, or gets to be someone else
    MEDIUM = "medium"  # a defence is missing, or the server can be worn down
    LOW = "low"  # against the standards; no attack is known
    INFO = "info"  # worth knowing

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return list(Severity).index(self)


class Verdict(StrEnum):
    """What a check came to. Only PASS says that the attack was made and beaten back."""

    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    PASS = "pass"  # noqa: S105  # no password
    NOT_APPLICABLE = "not-applicable"


class Need(StrEnum):
    """What a check cannot be made without; the value is what a report says where it is not there."""

    CREDENTIAL = "needs a certificate that the server takes: --cert F --key F"
    AUTHORITY = "needs an authority that the server trusts: --ca F --ca-key F"
    HTTP = "the server does not speak HTTP"
    CLIENT = "needs a client to be put to the test: --mitm KIND"
    INSIDER = "needs a client that the server takes: --cert F --key F, or --ca F --ca-key F"
    ECHO = "needs a path that answers with the headers of the request: --echo PATH"
    PROTECTED = "needs a path that the accepted client must not reach: --protected PATH"
    REVOKER = "needs an authority that can revoke while we watch: --authority"
    OTHER = "needs a second listener: --other HOST:PORT"
    PID = "needs the server's process on this machine: --pid N"

    @property
    def option(self) -> str:
        """The options that fill it; '' where none does."""
        return self.value.partition(": ")[2]


@dataclass(frozen=True, slots=True)
class Remedies:
    """What closes the hole, by product. One sentence or one setting each."""

    handfast: str
    nginx: str
    haproxy: str
    envoy: str
    apache: str

    def items(self) -> tuple[tuple[str, str], ...]:
        """(product, what to do)."""
        return (
            ("handfast", self.handfast),
            ("nginx", self.nginx),
            ("HAProxy", self.haproxy),
            ("Envoy", self.envoy),
            ("Apache", self.apache),
        )


@dataclass(frozen=True, slots=True)
class Evidence:
    """One exchange: what was sent, and what came back, each in words or as text, printable and short."""

    sent: str
    received: str

    @classmethod
    def of(cls, sent: str | bytes, received: str | bytes) -> Evidence:
        """Evidence of whatever was exchanged, cut to MAX_EVIDENCE characters."""
        return cls(shown(sent), shown(received))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check's function returns: the verdict, why in one sentence, and the evidence.

    `why` may have words of the server's in it: it is not safe for a terminal or a page as it is.
    """

    verdict: Verdict
    why: str
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One attack. `run` makes it and never decides by its own failure: an exception is inconclusive.

    `id` is CLASS.NAME and does not change. `seconds` bounds one run; a slow check says more than the usual. `tls`: it
    says nothing of a server that does not speak TLS, and is not made there.
    """

    id: str
    attack: str  # one sentence: what the attacker does
    proves: str  # one sentence: what a pass shows
    severity: Severity
    references: tuple[str, ...]  # CVE-…, CWE-…, RFC N section
    remedies: Remedies
    run: Callable[[Audit], Outcome]
    needs: tuple[Need, ...] = ()
    seconds: float = 20.0
    tls: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of an audit."""

    check: Check
    outcome: Outcome
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether this alone makes the audit fail."""
        return self.outcome.verdict is Verdict.FAIL and self.check.severity is not Severity.INFO

    @property
    def word(self) -> str:
        """The verdict in a word. A failure that is only worth knowing is a `note`: who counts `fail` counts holes."""
        return "note" if self.outcome.verdict is Verdict.FAIL and not self.failed else self.outcome.verdict.value


@dataclass(frozen=True, slots=True)
class Report:
    """All findings of one audit, the worst first, and what was audited. `baseline`: what an accepted request got.

    `no_tls`: what came in place of TLS, in words; '' where TLS is spoken.
    """

    target: str
    server: str
    baseline: str
    began: str  # ISO 8601, UTC
    findings: tuple[Finding, ...]
    no_tls: str = ""

    @property
    def failed(self) -> bool:
        """Whether any hole was found."""
        return any(finding.failed for finding in self.findings)

    def count(self, verdict: Verdict) -> int:
        """How many findings came to this verdict."""
        return sum(finding.outcome.verdict is verdict for finding in self.findings)

    @property
    def untried(self) -> dict[Need, int]:
        """How many checks were not made for want of what an option gives, the most first."""
        whys = [one.outcome.why for one in self.findings if one.outcome.verdict is Verdict.NOT_APPLICABLE]
        counts = {need: whys.count(need.value) for need in Need if need.option}
        return {need: counts[need] for need in sorted(counts, key=lambda one: -counts[one]) if counts[need]}


def passed(why: str, *evidence: Evidence) -> Outcome:
    """The attack was made and beaten back."""
    return Outcome(Verdict.PASS, why, evidence)


def failed(why: str, *evidence: Evidence) -> Outcome:
    """The hole is there."""
    return Outcome(Verdict.FAIL, why, evidence)


def unclear(why: str, *evidence: Evidence) -> Outcome:
    """What came back says neither."""
    return Outcome(Verdict.INCONCLUSIVE, why, evidence)


def not_applicable(why: str, *evidence: Evidence) -> Outcome:
    """The attack cannot be made here."""
    return Outcome(Verdict.NOT_APPLICABLE, why, evidence)


def shown(data: str | bytes) -> str:
    """Whatever was exchanged as short printable text; bytes that are no text are in hex."""
    if isinstance(data, bytes):
        data = data[:MAX_EVIDENCE]
        text = data.decode("latin-1")
        data = text if all(letter.isprintable() or letter in "\r\n\t" for letter in text) else data.hex(" ", 1)
    if len(data) > MAX_EVIDENCE:
        data = data[: MAX_EVIDENCE - 1] + "…"
    return visible(data)


def visible(text: str) -> str:
    """Text without what would move a terminal's cursor: such characters are spelled out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
