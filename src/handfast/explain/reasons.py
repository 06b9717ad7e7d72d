"""What each of our reason codes means: in words, what to do, who acts, and how it leaves the program."""

from __future__ import annotations

import string
from dataclasses import dataclass

from handfast.errors import Exit, InvalidInput, Reason
from handfast.explain.advice import ADVICE, advice_for
from handfast.explain.model import Who
from handfast.wire.records import Side

_BY_CODE = {reason.code: reason for reason in Reason}

# Who acts, by the first part of the code; the exceptions stand below.
_WHO = {
    "bug": Who.HANDFAST,
    "input": Who.CALLER,
    "usage": Who.CALLER,
    "interrupted": Who.NOBODY,
    "verify": Who.CLIENT,
    "issue": Who.AUTHORITY,
    "store": Who.CALLER,
    "policy": Who.SERVER,
    "http": Who.CLIENT,
    "upstream": Who.APP,
    "tls": Who.CLIENT,
    "seen": Who.SERVER,
    "ended": Who.CLIENT,
    "guard": Who.SERVER,
    "connect": Who.CLIENT,
    "admin": Who.CALLER,
    "limit": Who.CLIENT,
    "proxy": Who.NETWORK,
    "unreachable": Who.SERVER,
}
_EXCEPTIONS = {
    Reason.ENDED_REVOKED: Who.AUTHORITY,
    Reason.ENDED_POLICY: Who.SERVER,
    Reason.ENDED_IDLE: Who.NOBODY,
    Reason.POLICY_RULE_MATCHED: Who.NOBODY,
    Reason.SEEN_CUT: Who.NETWORK,
    Reason.SEEN_NOT_MUTUAL: Who.NOBODY,
    Reason.SEEN_SEALED: Who.CALLER,
    Reason.SEEN_NOBODY: Who.CLIENT,
    Reason.UNREACHABLE_NAME: Who.CALLER,
}


@dataclass(frozen=True, slots=True)
class Meaning:
    """A reason in words. Facts that a message would be filled with are shown as <fact>."""

    code: str
    message: str
    hint: str
    who: Who
    exit: Exit
    http: int
    advice: str = ""

    def as_json(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "who": str(self.who),
            "exit": int(self.exit),
            "http": self.http or None,
            "advice": self.advice,
        }


def all_codes() -> tuple[str, ...]:
    """Every code, in the order of the table."""
    return tuple(_BY_CODE)


def meaning_of(code: str) -> Meaning:
    """Return what a code means. Raises InvalidInput (INPUT_REASON)."""
    reason = _BY_CODE.get(code.strip().lower())
    if reason is None:
        raise InvalidInput(Reason.INPUT_REASON, value=code[:100])
    row = reason.value
    told = advice_for(reason, Side.CLIENT).todo if reason in ADVICE else ""
    return Meaning(row.code, _bare(row.message), _bare(row.hint), who_acts(reason), row.exit, row.http, told)


def who_acts(reason: Reason) -> Who:
    """Who can mend it, where a client's certificate is what it is about. Raises nothing."""
    if reason in _EXCEPTIONS:
        return _EXCEPTIONS[reason]
    if reason in ADVICE:
        return advice_for(reason, Side.CLIENT).who
    return _WHO.get(reason.code.partition(".")[0], Who.CALLER)


def _bare(template: str) -> str:
    """A format string with its fields shown as <name>."""
    pieces = []
    for text, name, _, _ in string.Formatter().parse(template):
        pieces.append(text + (f"<{name}>" if name else ""))
    return "".join(pieces)
