"""What a server's refusal means, in words: what happened, whose fault it is, what to do.

A server that refuses says little: one alert, or nothing. The rest is found by looking at our own certificate as the
server would. Pure: `now` is an argument. It explains, and never decides whether anything goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from handfast.errors import Failure, Reason
from handfast.pki.certificates import label
from handfast.wire.alerts import Alert


class Fault(StrEnum):
    """Who has to act."""

    OURS = "ours"
    THEIRS = "the server's"
    NETWORK = "the network's"
    EITHER = "ours or the server's"


@dataclass(frozen=True, slots=True)
class Own:
    """What we show: the chain, leaf first, and the command that brings a new certificate."""

    chain: tuple[x509.Certificate, ...]
    renew: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a call failed. `cause` is the alert's name or the code of a reason: stable, for scripts."""

    failure: Failure
    fault: Fault
    cause: str

    def fields(self) -> dict[str, object]:
        """As fields of an event."""
        failure = self.failure
        told: dict[str, object] = {"reason": failure.reason.code, "cause": self.cause, "fault": str(self.fault)}
        return told | {"detail": failure.message, "remedy": failure.hint or None}


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Something wrong with our own certificate that a server would refuse it for."""

    alerts: frozenset[Alert]  # those that a server gives for it
    detail: str
    next: str


def refused(alert: str, own: Own, accepted: Sequence[str], now: datetime) -> Verdict:
    """Explain an alert (its name in the RFCs) that a server gave us. `accepted`: the authorities that it named."""
    known = next((one for one in Alert if one.wire_name == alert), None)
    if known is None:
        detail = f"it gave the alert {alert}"
        return _verdict(Reason.CONNECT_HANDSHAKE, Fault.EITHER, alert, detail, "see the server's own log")
    if known in _ABOUT_US:
        return _of_certificate(known, own, accepted, now)
    detail, fault, following = _OTHERWISE.get(
        known, (f"it says: {known.meaning} ({known.wire_name})", Fault.EITHER, f"look for this: {known.cause}")
    )
    return _verdict(Reason.CONNECT_HANDSHAKE, fault, alert, detail, following)


def broken(failure: Failure, own: Own, accepted: Sequence[str], now: datetime) -> Verdict:
    """Explain why TLS with a server broke, before or after the handshake was done."""
    code = failure.reason.code
    match failure.reason:
        case Reason.TLS_ALERT:
            return refused(str(failure.facts.get("alert", "")), own, accepted, now)
        case Reason.TLS_NOT_TLS | Reason.TLS_PLAIN_HTTP:
            detail, following = "what answers there does not speak TLS", "check the port in --to"
            return _verdict(Reason.CONNECT_HANDSHAKE, Fault.EITHER, code, detail, following)
        case Reason.TLS_VERSION:
            detail, fault, following = _OTHERWISE[Alert.PROTOCOL_VERSION]
            return _verdict(Reason.CONNECT_HANDSHAKE, fault, code, detail, following)
        case Reason.TLS_BAD_PROOF:
            detail = "it could not prove that it holds its certificate's key"
            return _verdict(Reason.CONNECT_UNTRUSTED, Fault.THEIRS, code, detail, "give the server its own key")
        case Reason.TLS_CLOSED:
            return closed_early(now, own)
        case Reason.TLS_TIMEOUT:
            detail = f"it did not finish the handshake in {failure.facts.get('limit'):g} s"
            return _verdict(Reason.CONNECT_HANDSHAKE, Fault.THEIRS, code, detail, "see the server's own log")
        case Reason.TLS_NO_COMMON:
            detail = f"we share no {failure.facts.get('what')} with it"
            return _verdict(Reason.CONNECT_HANDSHAKE, Fault.EITHER, code, detail, "see: handfast inspect HOST:PORT")
    return _verdict(Reason.CONNECT_HANDSHAKE, Fault.EITHER, code, failure.message, "see the server's own log")


def closed_early(now: datetime, own: Own) -> Verdict:
    """Explain a server that closed within the handshake, without an alert."""
    detail = "it closed the connection within the handshake"
    troubles = _troubles(own, (), now)
    if troubles:  # TLS 1.2: our certificate goes out before the handshake is done
        detail += f"; our certificate may be why: {troubles[0].detail}"
        return _verdict(Reason.CONNECT_HANDSHAKE, Fault.OURS, Reason.TLS_CLOSED.code, detail, troubles[0].next)
    return _verdict(
        Reason.CONNECT_HANDSHAKE, Fault.THEIRS, Reason.TLS_CLOSED.code, detail, "is the port in --to the right one?"
    )


def silent(own: Own, accepted: Sequence[str], now: datetime, *, cut: bool) -> Verdict:
    """Explain a server that finished the handshake and then closed before its first byte, with no alert.

    So closes one whose rules allow us nothing, and one whose alert was lost on the way. `cut`: without close_notify.
    """
    cause = "cut" if cut else "closed"
    troubles = _troubles(own, accepted, now)
    if troubles:
        detail = f"it gave no reason; the likely one is that {_of_ours(troubles[0].detail)}"
        return _verdict(Reason.CONNECT_SILENT, Fault.OURS, cause, detail, troubles[0].next)
    detail = f"it gave no reason; by our clock nothing is wrong with our certificate, {label(own.chain[0])}"
    following = "see the server's own log: does a rule allow this name?"
    return _verdict(Reason.CONNECT_SILENT, Fault.THEIRS, cause, detail, following)


def untrusted(failures: Sequence[Failure]) -> Verdict:
    """Explain a server that we refused. The first failure is the one that tells most."""
    first = failures[0]
    fault, following = _SERVER_FAULTS.get(first.reason, (Fault.THEIRS, "give the server a certificate that is good"))
    return _verdict(Reason.CONNECT_UNTRUSTED, fault, first.reason.code, first.message, following)


def unreachable(target: str, detail: str) -> Verdict:
    """Explain a server to which there is no connection."""
    following = f"is it running, and is {target} its address?"
    return _verdict(Reason.CONNECT_UNREACHABLE, Fault.NETWORK, "unreachable", f"{target}: {detail}", following)


def span(length: timedelta) -> str:
    """A length of time in words, in its largest unit: `3 days`, `1 hour`, `40 seconds`."""
    seconds = max(0, int(length.total_seconds()))
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "0 seconds"


_ABOUT_US = frozenset(
    {
        *(Alert.BAD_CERTIFICATE, Alert.UNSUPPORTED_CERTIFICATE, Alert.CERTIFICATE_REVOKED, Alert.CERTIFICATE_EXPIRED),
        *(Alert.CERTIFICATE_UNKNOWN, Alert.UNKNOWN_CA, Alert.ACCESS_DENIED, Alert.DECRYPT_ERROR),
        *(Alert.CERTIFICATE_REQUIRED, Alert.NO_CERTIFICATE, Alert.HANDSHAKE_FAILURE),
    }
)
_OTHERWISE = {
    Alert.PROTOCOL_VERSION: (
        "it speaks no TLS 1.3",
        Fault.THEIRS,
        "let it speak TLS 1.3; or, if it cannot, allow the older one: --tls-min 1.2",
    ),
    Alert.UNRECOGNIZED_NAME: (
        "it has no site by the name that we asked for",
        Fault.OURS,
        "ask for one that it has: --sni NAME",
    ),
    Alert.NO_APPLICATION_PROTOCOL: (
        "it wants an application protocol (ALPN) to be named, and the connector names none",
        Fault.EITHER,
        "let the server take connections without ALPN",
    ),
    Alert.INTERNAL_ERROR: ("it failed in itself (internal_error)", Fault.THEIRS, "see the server's own log"),
}
# What is wrong with a server, whose fault that is, and what to do.
_SERVER_FAULTS = {
    Reason.VERIFY_NAME_MISMATCH: (
        Fault.EITHER,
        "call it by a name that its certificate has (--to, --sni), or say which identity to expect: --expect PATTERN",
    ),
    Reason.VERIFY_UNKNOWN_ISSUER: (
        Fault.EITHER,
        "trust its authority with --ca F, if it is the right server; its address may lead to another one",
    ),
    Reason.VERIFY_BAD_SIGNATURE: (Fault.THEIRS, "do not go on: somebody may stand between you and the server"),
    Reason.VERIFY_EXPIRED: (Fault.THEIRS, "renew the server's certificate"),
    Reason.VERIFY_NOT_YET_VALID: (Fault.EITHER, "compare the clocks of both machines"),
    Reason.VERIFY_TRUST_DOMAIN: (Fault.EITHER, "give the bundle of the server's own trust domain: --ca F"),
    Reason.VERIFY_NO_EKU: (Fault.THEIRS, "reissue the server's certificate with serverAuth"),
    Reason.VERIFY_PURPOSE: (Fault.THEIRS, "give the server a certificate for servers, with serverAuth"),
}


def _of_certificate(alert: Alert, own: Own, accepted: Sequence[str], now: datetime) -> Verdict:
    """An alert that is, or may be, about our certificate: by what is wrong with it, else by what the alert says."""
    cause, troubles = alert.wire_name, _troubles(own, accepted, now)
    fitting = next((one for one in troubles if alert in one.alerts), None)
    if fitting is not None:
        return _verdict(Reason.CONNECT_REFUSED, Fault.OURS, cause, fitting.detail, fitting.next)
    until = f"{own.chain[0].not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    detail, fault, following = {
        Alert.CERTIFICATE_EXPIRED: (
            f"it says that it has expired, and by our clock it is good until {until}",
            Fault.EITHER,
            "compare the clocks of both machines",
        ),
        Alert.CERTIFICATE_REVOKED: ("it was revoked", Fault.OURS, f"if that was a mistake, run: {own.renew}"),
        Alert.UNKNOWN_CA: (
            f"it does not know the authority that issued it, {_issuer(own)}{_naming(accepted)}",
            Fault.EITHER,
            "use a certificate of an authority that the server accepts, or add ours to the server's bundle",
        ),
        Alert.CERTIFICATE_REQUIRED: (
            "it saw none that it could use: our key may be of a kind that it does not take",
            Fault.EITHER,
            "issue a P-256 one",
        ),
        Alert.ACCESS_DENIED: (
            f"no rule of the server allows {label(own.chain[0])}",
            Fault.EITHER,
            "have the server allow this name, or call as another: --as NAME",
        ),
        Alert.DECRYPT_ERROR: (
            "our proof that we hold its key did not verify",
            Fault.OURS,
            f"do certificate and key belong together? run: {own.renew}",
        ),
        Alert.UNSUPPORTED_CERTIFICATE: (
            "it is of a kind that the server does not take, though it is a client's",
            Fault.EITHER,
            "see the server's own log: it may want another key type or key usage",
        ),
        Alert.BAD_CERTIFICATE: (
            "something in it is not to the server's liking, or by its clock it is not valid yet",
            Fault.EITHER,
            "compare the clocks, and see the server's own log",
        ),
        Alert.CERTIFICATE_UNKNOWN: (
            "for a reason that has no alert of its own, such as the names that its issuer may vouch for",
            Fault.EITHER,
            "see the server's own log",
        ),
    }.get(alert, (f"it says: {alert.meaning}", Fault.EITHER, f"look for this: {alert.cause}"))
    if troubles and fault is Fault.EITHER:  # not what the alert says, but wrong all the same
        detail, following = f"{detail}; besides, {_of_ours(troubles[0].detail)}", troubles[0].next
    return _verdict(Reason.CONNECT_REFUSED, fault, cause, detail, following)


def _troubles(own: Own, accepted: Sequence[str], now: datetime) -> list[_Trouble]:
    """What a server would refuse our certificate for, as far as we can see, the surest first."""
    found, leaf, renew = [], own.chain[0], f"run: {own.renew}"
    vague = {Alert.BAD_CERTIFICATE, Alert.CERTIFICATE_UNKNOWN, Alert.HANDSHAKE_FAILURE, Alert.ACCESS_DENIED}
    if now > leaf.not_valid_after_utc:
        detail = f"it expired {span(now - leaf.not_valid_after_utc)} ago"
        found.append(_Trouble(frozenset({Alert.CERTIFICATE_EXPIRED, *vague}), detail, renew))
    if now < leaf.not_valid_before_utc:
        detail = f"it is not valid yet; it will be in {span(leaf.not_valid_before_utc - now)}"
        found.append(_Trouble(frozenset(vague), detail, "is our clock right? compare it with the issuer's"))
    for issuer in own.chain[1:]:
        if now > issuer.not_valid_after_utc:
            detail = f"its issuer, {label(issuer)}, expired {span(now - issuer.not_valid_after_utc)} ago"
            found.append(_Trouble(frozenset({Alert.CERTIFICATE_EXPIRED, Alert.UNKNOWN_CA, *vague}), detail, renew))
    usages = _usages(leaf)
    purpose = frozenset({Alert.UNSUPPORTED_CERTIFICATE, *vague})
    if usages is not None and ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
        kind = "a server's" if ExtendedKeyUsageOID.SERVER_AUTH in usages else "not a client's"
        detail = f"it is {kind}: its extended key usage lacks clientAuth"
        found.append(_Trouble(purpose, detail, "use a client's certificate: handfast issue NAME --profile client"))
    if accepted and not _accepts(accepted, own.chain):
        detail = f"it is of {_issuer(own)}{_naming(accepted)}"
        following = "use a certificate of an authority that the server accepts, or add ours to the server's bundle"
        alerts = {Alert.UNKNOWN_CA, Alert.CERTIFICATE_REQUIRED, Alert.NO_CERTIFICATE, *vague}
        found.append(_Trouble(frozenset(alerts), detail, following))
    if usages is None:  # many servers do not mind
        detail = "it does not say what it is for: it has no extended key usage"
        found.append(_Trouble(purpose, detail, renew))
    return found


def _usages(leaf: x509.Certificate) -> list[x509.ObjectIdentifier] | None:
    try:
        return list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, ValueError):
        return None


def _accepts(accepted: Sequence[str], chain: Sequence[x509.Certificate]) -> bool:
    return any(one.issuer.rfc4514_string() in accepted for one in chain)


def _issuer(own: Own) -> str:
    return own.chain[-1].issuer.rfc4514_string() or "an authority without a name"


def _naming(accepted: Sequence[str]) -> str:
    if not accepted:
        return ""
    more = f" and {len(accepted) - 3} more" if len(accepted) > 3 else ""
    return f"; the server accepts {', '.join(name[:100] for name in accepted[:3])}{more}"


def _of_ours(detail: str) -> str:
    """A sentence about `it` as one about our certificate, to stand inside another."""
    rest = detail.removeprefix("it ")
    return detail if rest == detail else f"our certificate {rest}"


def _verdict(reason: Reason, fault: Fault, cause: str, detail: str, following: str) -> Verdict:
    return Verdict(Failure(reason, {"detail": detail, "next": following}), fault, cause)
