"""What a server's refusal means, in the words of a call: what happened, who must act, what to do.

A server that refuses says little: one alert, or nothing. What that means is `explain`'s to say; what speaks of calls,
and of the command that made them, is said here. Pure: `now` is an argument. It never decides whether anything goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509

from handfast.errors import Failure, Reason
from handfast.explain.advice import advice_for
from handfast.explain.chain import own_faults
from handfast.explain.model import Sure, Who
from handfast.explain.refusals import Shown, certificate_cause, is_about_certificate, weighed
from handfast.pki.certificates import label
from handfast.pki.verification import Purpose
from handfast.wire.alerts import Alert
from handfast.wire.records import Side


@dataclass(frozen=True, slots=True)
class Own:
    """What we show: the chain, leaf first, and the command that brings a new certificate."""

    chain: tuple[x509.Certificate, ...]
    renew: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a call failed. `cause` is the alert's name or the code of a reason: stable, for scripts."""

    failure: Failure
    who: Who
    cause: str

    def fields(self) -> dict[str, object]:
        """As fields of an event."""
        failure = self.failure
        told: dict[str, object] = {"reason": failure.reason.code, "cause": self.cause, "fault": str(self.who)}
        return told | {"detail": failure.message, "remedy": failure.hint or None}


def refused(alert: str, own: Own, accepted: Sequence[str], now: datetime) -> Verdict:
    """Explain an alert (its name in the RFCs) that a server gave us. `accepted`: the authorities that it named."""
    known = next((one for one in Alert if one.wire_name == alert), None)
    if known is None:
        return _verdict(Reason.CONNECT_HANDSHAKE, Who.SERVER, alert, f"it gave the alert {alert}", _ITS_LOG)
    ours = _ours(own, accepted, now)
    parameters = known is Alert.HANDSHAKE_FAILURE and not ours.shown.troubles  # which it says in the first place
    if is_about_certificate(known.number, shown=not parameters):
        return _of_certificate(known, ours)
    detail, who, following = _OF_CALLS.get(
        known, (f"it says: {known.meaning} ({known.wire_name})", Who.SERVER, f"look for this: {known.cause}")
    )
    return _verdict(Reason.CONNECT_HANDSHAKE, who, alert, detail, following)


def broken(failure: Failure, own: Own, accepted: Sequence[str], now: datetime) -> Verdict:
    """Explain why TLS with a server broke, before or after the handshake was done."""
    code = failure.reason.code
    match failure.reason:
        case Reason.TLS_ALERT:
            return refused(str(failure.facts.get("alert", "")), own, accepted, now)
        case Reason.TLS_NOT_TLS | Reason.TLS_PLAIN_HTTP:
            detail, following = "what answers there does not speak TLS", "check the port in --to"
            return _verdict(Reason.CONNECT_HANDSHAKE, Who.CALLER, code, detail, following)
        case Reason.TLS_VERSION:
            detail, who, following = _OF_CALLS[Alert.PROTOCOL_VERSION]
            return _verdict(Reason.CONNECT_HANDSHAKE, who, code, detail, following)
        case Reason.TLS_BAD_PROOF:
            advice = advice_for(failure.reason, Side.SERVER)
            return _verdict(Reason.CONNECT_UNTRUSTED, advice.who, code, advice.what, _clause(advice.todo))
        case Reason.TLS_CLOSED:
            return closed_early(now, own)
        case Reason.TLS_TIMEOUT:
            detail = f"it did not finish the handshake in {failure.facts.get('limit'):g} s"
            return _verdict(Reason.CONNECT_HANDSHAKE, Who.SERVER, code, detail, _ITS_LOG)
        case Reason.TLS_NO_COMMON:
            detail = f"we share no {failure.facts.get('what')} with it"
            return _verdict(Reason.CONNECT_HANDSHAKE, Who.SERVER, code, detail, "see: handfast inspect HOST:PORT")
    return _verdict(Reason.CONNECT_HANDSHAKE, Who.SERVER, code, failure.message, _ITS_LOG)


def closed_early(now: datetime, own: Own) -> Verdict:
    """Explain a server that closed within the handshake, without an alert."""
    detail, code = "it closed the connection within the handshake", Reason.TLS_CLOSED.code
    ours = _ours(own, (), now)
    if ours.shown.troubles:  # TLS 1.2: our certificate goes out before the handshake is done
        detail += f"; our certificate may be why: {ours.suspected('it')}"
        return ours.verdict(Reason.CONNECT_HANDSHAKE, ours.shown.troubles[0], code, detail)
    return _verdict(Reason.CONNECT_HANDSHAKE, Who.CALLER, code, detail, "is the port in --to the right one?")


def silent(own: Own, accepted: Sequence[str], now: datetime, *, cut: bool) -> Verdict:
    """Explain a server that finished the handshake and then closed before its first byte, with no alert.

    So closes one whose rules allow us nothing, and one whose alert was lost on the way. `cut`: without close_notify.
    """
    code = "cut" if cut else "closed"
    ours = _ours(own, accepted, now)
    if ours.shown.troubles:
        detail = f"it gave no reason; the likely one is that {ours.suspected(_BY_NAME)}"
        return ours.verdict(Reason.CONNECT_SILENT, ours.shown.troubles[0], code, detail)
    detail = f"it gave no reason; by our clock nothing is wrong with our certificate, {label(own.chain[0])}"
    following = "see the server's own log: does a rule allow this name?"
    return _verdict(Reason.CONNECT_SILENT, Who.SERVER, code, detail, following)


def untrusted(failures: Sequence[Failure]) -> Verdict:
    """Explain a server that we refused. The first failure is the one that tells most."""
    first = failures[0]
    advice = advice_for(first.reason, Side.SERVER)
    who, following = _OF_SERVERS.get(first.reason, (advice.who, _clause(advice.todo)))
    return _verdict(Reason.CONNECT_UNTRUSTED, who, first.reason.code, first.message, following)


def unreachable(target: str, detail: str) -> Verdict:
    """Explain a server to which there is no connection."""
    following = f"is it running, and is {target} its address?"
    return _verdict(Reason.CONNECT_UNREACHABLE, Who.NETWORK, "unreachable", f"{target}: {detail}", following)


def span(length: timedelta) -> str:
    """A length of time in words, in its largest unit: `3 days`, `1 hour`, `40 seconds`."""
    seconds = max(0, int(length.total_seconds()))
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "0 seconds"


_BY_NAME = "our certificate"  # in a sentence that is not about it already
_ITS_LOG = "see the server's own log"
_MOST_NAMED = 3
# Alerts that are about the call: in words, who must act, and what to change.
_OF_CALLS = {
    Alert.PROTOCOL_VERSION: (
        "it speaks no TLS 1.3",
        Who.SERVER,
        "let it speak TLS 1.3; or, if it cannot, allow the older one: --tls-min 1.2",
    ),
    Alert.UNRECOGNIZED_NAME: (
        "it has no site by the name that we asked for",
        Who.CALLER,
        "ask for one that it has: --sni NAME",
    ),
    Alert.NO_APPLICATION_PROTOCOL: (
        "it takes none of the application protocols (ALPN) that we offer",
        Who.CALLER,
        "offer one that it takes, as --alpn h2 for gRPC, or --alpn postgresql",
    ),
    Alert.INTERNAL_ERROR: ("it failed in itself (internal_error)", Who.SERVER, _ITS_LOG),
}
# A server that we refuse, where the call itself may be wrong: who must act, and what to change.
_OF_SERVERS = {
    Reason.VERIFY_NAME_MISMATCH: (
        Who.CALLER,
        "call it by a name that its certificate has (--to, --sni), or say which identity to expect: --expect PATTERN",
    ),
    Reason.VERIFY_UNKNOWN_ISSUER: (
        Who.CALLER,
        "trust its authority with --ca F, if it is the right server; its address may lead to another one",
    ),
    Reason.VERIFY_BAD_SIGNATURE: (Who.SERVER, "do not go on: somebody may stand between you and the server"),
    Reason.VERIFY_TRUST_DOMAIN: (Who.CALLER, "give the bundle of the server's own trust domain: --ca F"),
}


@dataclass(frozen=True, slots=True)
class _Ours:
    """Our certificate as a server sees it. `accepted`: the authorities that the server named."""

    own: Own
    shown: Shown
    accepted: Sequence[str]
    now: datetime

    def told(self, failure: Failure, it: str = "it") -> str:
        """What is wrong, as a clause about our certificate, which is called `it`: its own facts, where they tell it."""
        facts, what = failure.facts, advice_for(failure.reason, Side.CLIENT, it).what
        subject = facts.get("subject")
        which = it if subject == label(self.own.chain[0]) else f"an authority above {it}, {subject},"
        match failure.reason:
            case Reason.VERIFY_EXPIRED:
                return f"{which} expired {span(self.now - facts['not_after'])} ago"
            case Reason.VERIFY_NOT_YET_VALID:
                return f"{which} is not valid yet; it will be in {span(facts['not_before'] - self.now)}"
            case Reason.VERIFY_UNKNOWN_ISSUER:
                return f"{what}, {facts['issuer']}{_naming(self.accepted)}"
            case Reason.SEEN_REFUSED:
                return "it does not say why"
        return failure.message if failure in self.shown.faults else what

    def suspected(self, it: str) -> str:
        """What a server that says nothing most likely minds: our own fact first, then what a renewal would not mend."""
        gravest, *others = self.shown.troubles
        if gravest in self.shown.faults or not others:
            return self.told(gravest, it)
        return f"{self.told(others[0], it)}; besides, {self.told(gravest, _BY_NAME)}"

    def verdict(self, reason: Reason, mended: Failure, cause: str, detail: str) -> Verdict:
        """A verdict whose next step mends one failure."""
        who = advice_for(mended.reason, Side.CLIENT).who
        return _verdict(reason, who, cause, detail, self._following(mended))

    def _following(self, failure: Failure) -> str:
        advice, renew = advice_for(failure.reason, Side.CLIENT, _BY_NAME), self.own.renew
        todo = _clause(advice.todo)
        match failure.reason:
            case Reason.VERIFY_EXPIRED | Reason.TLS_BAD_PROOF:
                return f"run: {renew}"
            case Reason.VERIFY_NO_CERTIFICATE:
                return f"use one with a P-256 key; run: {renew}"
            case Reason.VERIFY_PURPOSE | Reason.VERIFY_NO_EKU:
                return f"{todo}, with --profile client: {renew}"
            case Reason.VERIFY_CRL_STALE:
                return f"compare the clocks of both machines; where they agree, {todo}"
            case Reason.POLICY_DENIED:
                return f"have the server allow {label(self.own.chain[0])}, or call as another: --as NAME"
        return f"{todo}: {renew}" if advice.anew else todo


def _ours(own: Own, accepted: Sequence[str], now: datetime) -> _Ours:
    faults = own_faults(own.chain, Purpose.CLIENT, now)
    named = any(one.issuer.rfc4514_string() in accepted for one in own.chain) if accepted else None
    return _Ours(own, Shown(Side.CLIENT, own.chain, faults, named, given=True), accepted, now)


def _of_certificate(alert: Alert, ours: _Ours) -> Verdict:
    """An alert that is about our certificate: what it says, and what else is wrong; the next step mends the surest."""
    said = certificate_cause(alert.number, ours.shown)
    cause, others = weighed(said, ours.shown)
    mended, guessed = cause.failure, cause.sure is not Sure.CERTAIN
    told = [f"{said.sure.prefix}{ours.told(said.failure)}", *said.also]
    match said.failure.reason:
        case Reason.VERIFY_NO_CERTIFICATE:  # and yet we have one
            told, guessed = told[1:], True
        case Reason.VERIFY_CRL_STALE:
            told[0] = (
                f"by our clock it is good until {ours.own.chain[0].not_valid_after_utc:%Y-%m-%d %H:%M} UTC; {told[0]}"
            )
        case Reason.SEEN_REFUSED:
            told[:2] = [f"{told[0]}; perhaps {told[1]}"]
    if mended is not said.failure:
        others = (mended, *others)
    elif others and guessed:
        mended = others[0]
    detail = "; or ".join(told) + "".join(f"; besides, {ours.told(other, _BY_NAME)}" for other in others[:1])
    return ours.verdict(Reason.CONNECT_REFUSED, mended, alert.wire_name, detail)


def _naming(accepted: Sequence[str]) -> str:
    if not accepted:
        return ""
    more = f" and {len(accepted) - _MOST_NAMED} more" if len(accepted) > _MOST_NAMED else ""
    return f"; the server accepts {', '.join(name[:100] for name in accepted[:_MOST_NAMED])}{more}"


def _clause(sentence: str) -> str:
    """A sentence as part of another one."""
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def _verdict(reason: Reason, who: Who, cause: str, detail: str, following: str) -> Verdict:
    return Verdict(Failure(reason, {"detail": detail, "next": following}), who, cause)
