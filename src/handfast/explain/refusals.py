"""From an alert to a cause: what the side that sent it most likely means, given the certificate it was sent for.

Alerts are few and their use differs: OpenSSL answers a missing revocation list with `unknown_ca`, Go answers nearly
all with `bad_certificate`. So each is weighed against what is wrong with the certificate whoever judges it, and
against the authorities that were named (ssl_x509err2alert in OpenSSL's ssl/statem/statem_lib.c; Go's
crypto/tls/handshake_server.go).
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509

from handfast.errors import Failure, Reason
from handfast.explain.chain import load_chain, own_faults
from handfast.explain.model import Sure
from handfast.explain.scene import Scene
from handfast.pki.certificates import UNREADABLE, label
from handfast.pki.verification import Purpose
from handfast.wire.alerts import alert_of
from handfast.wire.records import Side

_CERTIFICATE_ALERTS = frozenset({41, 42, 43, 44, 45, 46, 48, 116})
# What OpenSSL, and those that follow it, mean by an alert, where our own look at the certificate agrees.
_AGREES = {
    42: (
        Reason.VERIFY_NOT_YET_VALID,
        Reason.VERIFY_WEAK_KEY,
        Reason.VERIFY_WEAK_HASH,
        Reason.VERIFY_FORBIDDEN_NAME,
        Reason.VERIFY_MALFORMED,
    ),
    43: (Reason.VERIFY_PURPOSE, Reason.VERIFY_NO_EKU, Reason.VERIFY_KEY_USAGE, Reason.VERIFY_CA_AS_LEAF),
    45: (Reason.VERIFY_EXPIRED,),
    46: (Reason.VERIFY_NAME_CONSTRAINT,),
    48: (Reason.VERIFY_NOT_A_CA, Reason.VERIFY_PATH_LENGTH, Reason.VERIFY_CHAIN_TOO_LONG),
    51: (Reason.VERIFY_BAD_SIGNATURE,),
}
# Who says one of these has found the chain good, whatever authorities are named.
_PAST_THE_CHAIN = ("policy.", "ended.", "verify.revoked", "verify.crl_", "verify.ocsp_")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a certificate, or a handshake, was refused. `also`: what would look the same."""

    failure: Failure
    sure: Sure = Sure.CERTAIN
    also: tuple[str, ...] = ()


def is_about_certificate(number: int, scene: Scene, holder: Side) -> bool:
    """Whether an alert to `holder` is about its certificate rather than about the parameters."""
    if number in _CERTIFICATE_ALERTS:
        return True
    asked = holder is Side.SERVER or scene.request is not None
    return asked and holder in scene.shown and number in (40, 49, 51)


def certificate_cause(number: int, scene: Scene, holder: Side) -> Cause:
    """Why the far side of `holder` refused its certificate with the alert of that number. Raises nothing."""
    judge = holder.other.value
    if number == 116 or not scene.ders(holder):
        return _none_shown(number, scene, holder)
    chain = load_chain(scene.ders(holder))
    faults = own_faults(chain, Purpose.CLIENT if holder is Side.CLIENT else Purpose.SERVER, scene.known.now)
    for reason in _AGREES.get(number, ()):
        for fault in faults:
            if fault.reason is reason:
                return Cause(fault)
    match number:
        case 44:
            return Cause(Failure(Reason.VERIFY_REVOKED, _subject(chain)))
        case 48:
            return _unknown_ca(scene, holder, chain)
        case 49:
            return Cause(Failure(Reason.POLICY_DENIED, {"rule": "of the other side"}))
        case 45:
            also = (f"the {judge}'s clock is ahead of ours", "an authority above the certificate has expired")
            return Cause(Failure(Reason.VERIFY_CRL_STALE, _issuer(chain)), Sure.LIKELY, also)
        case 51:
            return Cause(Failure(Reason.TLS_BAD_PROOF), Sure.LIKELY, ("the certificate, or one above it, was altered",))
    if faults:
        return Cause(faults[0], Sure.LIKELY)
    return _unsaid(number, judge, chain)


def weighed(cause: Cause, scene: Scene, holder: Side) -> tuple[Cause, tuple[Failure, ...]]:
    """The gravest cause, and what else is wrong with the holder's certificate as far as it is known here.

    An authority that the server does not name outweighs what a renewal would mend, for that would be refused next.
    Raises nothing.
    """
    chain = load_chain(scene.ders(holder))
    faults = scene.known.peer_faults if holder is Side.SERVER else None
    if faults is None:
        faults = own_faults(chain, Purpose.CLIENT if holder is Side.CLIENT else Purpose.SERVER, scene.known.now)
    if cause.failure.reason.code.startswith(_PAST_THE_CHAIN):
        return cause, ()
    others = tuple(fault for fault in faults if fault.reason is not cause.failure.reason)
    accepted = scene.request.authorities if scene.request is not None and holder is Side.CLIENT else ()
    if not chain or not accepted or _is_named(chain, accepted):
        return cause, others
    unknown = Failure(Reason.VERIFY_UNKNOWN_ISSUER, _subject(chain) | _issuer(chain))
    if cause.failure.reason is unknown.reason:
        return cause, others
    if cause.failure.reason not in {fault.reason for fault in faults}:
        return cause, (unknown, *others)
    sure = Sure.CERTAIN if scene.us is Side.SERVER else Sure.LIKELY  # a server may accept more than it names
    return Cause(unknown, sure, cause.also), (cause.failure, *others)


def _none_shown(number: int, scene: Scene, holder: Side) -> Cause:
    sure = Sure.LIKELY if number == 40 else Sure.CERTAIN
    also: tuple[str, ...] = ("no cipher or signature algorithm is shared",) if number == 40 else ()
    if scene.us is holder and scene.known.own:
        also += ("the certificate that was given is of a kind that the server does not take, so it was not sent",)
    return Cause(Failure(Reason.VERIFY_NO_CERTIFICATE), sure, also)


def _unknown_ca(scene: Scene, holder: Side, chain: tuple[x509.Certificate, ...]) -> Cause:
    failure = Failure(Reason.VERIFY_UNKNOWN_ISSUER, _subject(chain) | _issuer(chain))
    accepted = scene.request.authorities if scene.request is not None and holder is Side.CLIENT else ()
    missing = "an intermediate certificate was not sent along"
    judge = holder.other.value
    no_list = f"the {judge} checks revocations and has no list of the issuer (OpenSSL says unknown_ca for that too)"
    if not accepted:
        if holder is Side.SERVER:
            return Cause(failure, Sure.LIKELY, (missing,) if _open_ended(chain) else ())
        return Cause(failure, Sure.LIKELY, (*((missing,) if _open_ended(chain) else ()), no_list))
    if not _is_named(chain, accepted):
        return Cause(failure, Sure.CERTAIN, (missing,) if _open_ended(chain) else ())
    also = ("its authority was made anew under the same name, so that the keys differ",)
    return Cause(Failure(Reason.VERIFY_CRL_MISSING, _issuer(chain)), Sure.LIKELY, also)


def _unsaid(number: int, judge: str, chain: tuple[x509.Certificate, ...]) -> Cause:
    known = alert_of(number)
    also = [] if known is None else [known.cause]
    also += [f"its authority is not in the {judge}'s bundle: some TLS libraries say so with this alert"]
    return Cause(Failure(Reason.SEEN_REFUSED, _subject(chain)), Sure.POSSIBLE, tuple(also))


def _open_ended(chain: tuple[x509.Certificate, ...]) -> bool:
    """Whether the chain stops below a root."""
    return bool(chain) and chain[-1].issuer != chain[-1].subject


def _is_named(chain: tuple[x509.Certificate, ...], accepted: tuple[bytes, ...]) -> bool:
    """Whether the chain leads to an authority that the server says it accepts."""
    return any(_der_of(certificate.issuer) in accepted for certificate in chain)


def _der_of(name: x509.Name) -> bytes:
    try:
        return name.public_bytes()
    except UNREADABLE:
        return b""


def _subject(chain: tuple[x509.Certificate, ...]) -> dict[str, object]:
    return {"subject": label(chain[0]), "serial": f"{chain[0].serial_number:x}"} if chain else {}


def _issuer(chain: tuple[x509.Certificate, ...]) -> dict[str, object]:
    try:
        issuer = chain[0].issuer.rfc4514_string() if chain else ""
    except UNREADABLE:
        issuer = ""
    return {"issuer": issuer if issuer and issuer.isprintable() else "its authority", "next_update": "?"}
