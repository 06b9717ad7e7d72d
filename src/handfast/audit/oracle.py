"""Was the application reached? Judges what came back on one connection. Pure.

Theory of operation. A refusal comes in two forms: TLS ends (an alert, a close), or the server answers in HTTP
with a status that says no. Everything else that carries application data means that the attacker got through.
Silence says nothing, and is never a pass. A status alone could be the application's own no; the baseline, an
accepted client's request for the same thing, rules that out: it must have been answered with a yes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from handfast.audit.model import Evidence, Outcome, Verdict, failed, passed, unclear

_STATUS = re.compile(rb"HTTP/\d(?:\.\d)? (\d{3})")
# 400: nginx, for a certificate it does not take; 401 and 403: handfast and most gateways; 421: RFC 9110 15.5.20;
# 495 and 496: nginx's own numbers for the same as 400.
REFUSALS = frozenset({400, 401, 403, 421, 495, 496})
MAX_ITEMS = 12  # pieces of evidence in one finding
_BUSY = frozenset({408, 429, 503})  # who says this may not have looked at the client at all


class End(StrEnum):
    """How a connection came to its end."""

    CLOSED = "closed"
    ALERT = "alert"
    RESET = "reset"
    OPEN = "open"  # the server had said enough, or all there was to wait for
    SILENT = "silent"  # nothing came for the time there was
    UNMADE = "unmade"  # the attack could not be made; `detail` says why


@dataclass(frozen=True, slots=True)
class Reply:
    """What one connection brought. `data`: application bytes, decrypted, cut at a limit; `alert`: its RFC name.

    `handshake`: it was finished as far as the client could tell. In TLS 1.3 that is before the server judges.
    """

    handshake: bool
    data: bytes
    end: End
    alert: str = ""
    detail: str = ""

    @property
    def status(self) -> int | None:
        """The HTTP status; None where it is not HTTP."""
        found = _STATUS.match(self.data)
        return int(found[1]) if found else None

    def __str__(self) -> str:
        """In words, for evidence."""
        if self.data:
            return self.data[:300].decode("latin-1").strip()
        match self.end:
            case End.ALERT:
                return f"the alert {self.alert}"
            case End.SILENT:
                return "nothing"
            case End.RESET:
                return "the connection was reset"
            case _:
                return self.detail or "the connection was closed"


class Reach(StrEnum):
    """Whether the application was reached."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


def reach(reply: Reply, baseline: Reply | None) -> tuple[Reach, str]:
    """Say whether the application was reached, and why one may think so. Raises nothing."""
    if not reply.data:
        if reply.end is End.UNMADE:
            return Reach.UNKNOWN, f"the attack could not be made: {reply.detail}"
        if reply.end in (End.SILENT, End.OPEN):
            return Reach.UNKNOWN, "the server neither answered nor ended the connection"
        return Reach.NO, f"the server ended the connection ({reply.alert or reply.end})"
    status = reply.status
    if status is None:
        return Reach.YES, "the server sent application data"
    if status in _BUSY:
        return Reach.UNKNOWN, f"the server says that it is busy or was kept waiting (HTTP {status})"
    if status not in REFUSALS:
        return Reach.YES, f"the server answered with HTTP {status}"
    if baseline is None:
        return (
            Reach.NO,
            f"the server answered with HTTP {status}, a refusal; without a baseline the status alone says so",
        )
    return Reach.NO, f"the server answered with HTTP {status}, and an accepted client gets {baseline.status or 'data'}"


def must_be_refused(sent: str, reply: Reply, baseline: Reply | None) -> Outcome:
    """The outcome of an attack that must not reach the application. `sent`: what was done, in words."""
    reached, why = reach(reply, baseline)
    evidence = Evidence.of(sent, str(reply))
    match reached:
        case Reach.YES:
            return failed(f"the application was reached: {why}", evidence)
        case Reach.NO:
            return passed(why, evidence)
        case Reach.UNKNOWN:
            return unclear(why, evidence)


def worst(outcomes: list[Outcome]) -> Outcome:
    """One outcome for several tries of one attack: a failure if any failed, a pass only if all passed."""
    for verdict in Verdict:
        chosen = [one for one in outcomes if one.verdict is verdict]
        if chosen:
            evidence = tuple(item for one in chosen for item in one.evidence)
            return Outcome(verdict, "; ".join(dict.fromkeys(one.why for one in chosen)), evidence[:MAX_ITEMS])
    return unclear("nothing was tried")
