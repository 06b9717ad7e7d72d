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
from handfast.explain.model import Sure
from handfast.pki.certificates import UNREADABLE, label
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


@dataclass(frozen=True, slots=True)
class Shown:
    """The holder's certificate as it was put before the other side, and what is known of how that looks at it.

    `chain`: leaf first, as far as it can be read. `faults`: what is wrong with it, by `own_faults` or by a bundle of
    authorities. `named`: whether the judge said that it accepts an authority of the chain; None where it named none, or
    nothing was shown. `exact`: it accepts no others than it named. `given`: the holder is us, and has a certificate.
    """

    holder: Side
    chain: tuple[x509.Certificate, ...]
    faults: tuple[Failure, ...]
    named: bool | None = None
    exact: bool = False
    given: bool = False
    sent: bool = True

    @property
    def troubles(self) -> tuple[Failure, ...]:
        """All that is wrong with it as far as is known, an authority that was not named before the rest."""
        return self.faults if self.named is not False else (self.unknown, *self.faults)

    @property
    def unknown(self) -> Failure:
        """That its authority is not accepted."""
        return Failure(Reason.VERIFY_UNKNOWN_ISSUER, _subject(self.chain) | _issuer(self.chain))


def is_about_certificate(number: int, *, shown: bool) -> bool:
    """Whether an alert is about its receiver's certificate rather than about the parameters.

    `shown`: the receiver was asked for one and showed it, which some alerts are about then.
    """
    return number in _CERTIFICATE_ALERTS or (shown and number in (40, 49, 51))


def certificate_cause(number: int, shown: Shown) -> Cause:
    """Why a certificate was refused with the alert of that number. Raises nothing."""
    judge, chain, faults = shown.holder.other.value, shown.chain, shown.faults
    if number in (41, 116) or not shown.sent:
        return _none_shown(number, shown)
    for reason in _AGREES.get(number, ()):
        for fault in faults:
            if fault.reason is reason:
                return Cause(fault)
    match number:
        case 44:
            return Cause(Failure(Reason.VERIFY_REVOKED, _subject(chain)))
        case 48:
            return _unknown_ca(shown)
        case 49 if not faults:
            return Cause(Failure(Reason.POLICY_DENIED, {"rule": "of the other side"}))
        case 45:
            also = (f"the {judge}'s clock is ahead of ours", "an authority above the certificate has expired")
            return Cause(Failure(Reason.VERIFY_CRL_STALE, _issuer(chain)), Sure.LIKELY, also)
        case 51:
            return Cause(Failure(Reason.TLS_BAD_PROOF), Sure.LIKELY, ("the certificate, or one above it, was altered",))
    if faults:
        return Cause(faults[0], Sure.LIKELY, (f"a rule of the {judge} keeps it out",) if number == 49 else ())
    if shown.named is False:
        return Cause(shown.unknown, Sure.LIKELY)
    return _unsaid(number, judge, chain)


def weighed(cause: Cause, shown: Shown) -> tuple[Cause, tuple[Failure, ...]]:
    """The gravest cause, and what else is wrong with the certificate as far as it is known here.

    An authority that the judge does not name outweighs what a renewal would mend, for that would be refused next.
    Raises nothing.
    """
    reason = cause.failure.reason
    if reason.code.startswith(_PAST_THE_CHAIN):
        return cause, () if cause.sure is Sure.CERTAIN else shown.faults
    others = tuple(fault for fault in shown.troubles if fault.reason is not reason)
    if shown.named is not False or reason not in {fault.reason for fault in shown.faults}:
        return cause, others
    sure = Sure.CERTAIN if shown.exact else Sure.LIKELY
    return Cause(shown.unknown, sure, cause.also), (cause.failure, *others[1:])


def _none_shown(number: int, shown: Shown) -> Cause:
    sure = Sure.LIKELY if number == 40 else Sure.CERTAIN
    also: tuple[str, ...] = ("no cipher or signature algorithm is shared",) if number == 40 else ()
    if shown.given:
        also += ("the certificate that was given is of a kind that the server does not take, so it was not sent",)
    return Cause(Failure(Reason.VERIFY_NO_CERTIFICATE), sure, also)


def _unknown_ca(shown: Shown) -> Cause:
    chain, judge = shown.chain, shown.holder.other.value
    open_ended = chain and chain[-1].issuer != chain[-1].subject  # it stops below a root
    missing = ("an intermediate certificate was not sent along",) if open_ended else ()
    no_list = f"the {judge} checks revocations and has no list of the issuer (OpenSSL says unknown_ca for that too)"
    match shown.named:
        case None if shown.holder is Side.SERVER:
            return Cause(shown.unknown, Sure.LIKELY, missing)
        case None:
            return Cause(shown.unknown, Sure.LIKELY, (*missing, no_list))
        case False:
            return Cause(shown.unknown, Sure.CERTAIN, missing)
    also = ("its authority was made anew under the same name, so that the keys differ",)
    return Cause(Failure(Reason.VERIFY_CRL_MISSING, _issuer(chain)), Sure.LIKELY, also)


def _unsaid(number: int, judge: str, chain: tuple[x509.Certificate, ...]) -> Cause:
    known = alert_of(number)
    also = [] if known is None else [known.cause]
    if number == 43:  # whose usual cause would have been seen
        also = [f"the {judge} takes other kinds of keys or key usages"]
    also += [f"its authority is not in the {judge}'s bundle: some TLS libraries say so with this alert"]
    return Cause(Failure(Reason.SEEN_REFUSED, _subject(chain)), Sure.POSSIBLE, tuple(also))


def _subject(chain: tuple[x509.Certificate, ...]) -> dict[str, object]:
    return {"subject": label(chain[0]), "serial": f"{chain[0].serial_number:x}"} if chain else {}


def _issuer(chain: tuple[x509.Certificate, ...]) -> dict[str, object]:
    try:
        issuer = chain[0].issuer.rfc4514_string() if chain else ""
    except UNREADABLE:
        issuer = ""
    return {"issuer": issuer if issuer and issuer.isprintable() else "its authority", "next_update": "?"}
