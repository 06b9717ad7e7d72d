"""Chains, looked at link by link: who signed what, until when, for whom, for what use.

For eyes: what a side accepts is `pki.verify`'s to say, and its word is what verdicts are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509

from handfast.errors import Failure, Reason, VerificationFailed
from handfast.explain.model import Check, Link
from handfast.pki.certificates import UNREADABLE, encode_chain, is_authority, label, serial_text
from handfast.pki.floor import is_signed_by
from handfast.pki.inspect import describe
from handfast.pki.names import Name
from handfast.pki.verification import Purpose, Terms, TrustBundle, name_matches, verify
from handfast.tls.judge import judge_offline

_MOST_LINKS = 20


def load_chain(ders: Sequence[bytes]) -> tuple[x509.Certificate, ...]:
    """The certificates that can be read, up to the first that cannot. Raises nothing."""
    found = []
    for der in ders[:_MOST_LINKS]:
        try:
            found.append(x509.load_der_x509_certificate(der))
        except UNREADABLE:
            break
    return tuple(found)


def look_at_chain(
    ders: Sequence[bytes], purpose: Purpose, now: datetime, anchors: Sequence[x509.Certificate], name: Name | None
) -> tuple[Link, ...]:
    """Return a link for each certificate that was presented and, if the bundle has it, the anchor above them."""
    chain = load_chain(ders)
    links = []
    for at, certificate in enumerate(chain):
        above = (*chain[at + 1 : at + 2], *chain[:at], *chain[at + 2 :])
        checks = [_signature(certificate, above, anchors), _validity(certificate, now)]
        if at == 0:
            checks += [_purpose(certificate, purpose), *([] if name is None else [_name(certificate, name)])]
        else:
            checks.append(_authority(certificate))
        links.append(_link(certificate, tuple(checks), len(ders[at])))
    if len(chain) < min(len(ders), _MOST_LINKS):
        size = len(ders[len(chain)])
        unreadable = Check("form", False, "it cannot be read")
        links.append(Link("unreadable", "", "", "", "", None, None, (), (unreadable,), size=size))
    top = chain[-1] if chain and len(chain) == len(ders) else None
    for anchor in anchors:
        if top is not None and top not in anchors and is_signed_by(top, anchor, any_size=True):
            checks = [Check("trust", True, "it is in your bundle"), _validity(anchor, now), _authority(anchor)]
            links.append(_link(anchor, tuple(checks), 0, sent=False))
            break
    return tuple(links)


def own_faults(chain: Sequence[x509.Certificate], purpose: Purpose, now: datetime) -> tuple[Failure, ...]:
    """What is wrong with a chain of our own, whoever judges it: all but whether its authority is accepted."""
    if not chain:
        return ()
    terms = Terms(TrustBundle((chain[-1],)), purpose)
    return tuple(failure for failure in faults(chain, terms, now) if failure.reason is not Reason.VERIFY_UNKNOWN_ISSUER)


def faults(chain: Sequence[x509.Certificate], terms: Terms, now: datetime) -> tuple[Failure, ...]:
    """What `pki.verify` has against a chain. Servers need not say what they are for: clients do not ask it."""
    try:
        verify(chain, terms, now, judge_offline(chain, terms.bundle, now))
    except VerificationFailed as refused:
        failures = refused.failures
    else:
        return ()
    if terms.purpose is Purpose.SERVER:
        failures = tuple(failure for failure in failures if failure.reason is not Reason.VERIFY_NO_EKU)
    return failures


def _link(certificate: x509.Certificate, checks: tuple[Check, ...], size: int, sent: bool = True) -> Link:
    facts = describe(encode_chain([certificate]), "certificate")[0]
    names = facts.get("names")
    return Link(
        label=label(certificate),
        subject=str(facts.get("subject") or ""),
        issuer=str(facts.get("issuer") or ""),
        serial=serial_text(certificate.serial_number),
        key=f"{facts.get('key')}, signed with {facts.get('signature_hash')}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        names=tuple(str(name) for name in names) if isinstance(names, list) else (),
        checks=checks,
        sha256=str(facts.get("sha256") or ""),
        size=size,
        sent=sent,
    )


def _signature(
    certificate: x509.Certificate, others: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate]
) -> Check:
    for anchor in anchors:
        if certificate == anchor:
            return Check("trust", True, "it is in your bundle")
        if is_signed_by(certificate, anchor, any_size=True):
            return Check("signature", True, f"made by {label(anchor)}, which is in your bundle")
    named = [other for other in others if other.subject == certificate.issuer]
    for other in named:
        if is_signed_by(certificate, other):
            return Check("signature", True, f"made by {label(other)}, which was sent along")
    if named or any(anchor.subject == certificate.issuer for anchor in anchors):
        return Check("signature", False, "not made by the key of the issuer of that name")
    if certificate.issuer == certificate.subject:
        if not is_signed_by(certificate, certificate, any_size=True):
            return Check("signature", False, "it says that it signs itself, and does not")
        return Check("signature", False if anchors else None, "it signs itself, and is not in your bundle")
    text = "its issuer was not sent along"
    return Check("signature", False if anchors else None, f"{text}{', and is not in your bundle' if anchors else ''}")


def _validity(certificate: x509.Certificate, now: datetime) -> Check:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        return Check("validity", False, f"it expired on {ends:%Y-%m-%d %H:%M} UTC")
    if now < begins:
        return Check("validity", False, f"it is not valid before {begins:%Y-%m-%d %H:%M} UTC")
    left = ends - now
    span = f"{left.days} d" if left.days else f"{left.seconds // 3600} h {left.seconds % 3600 // 60} min"
    return Check("validity", True, f"until {ends:%Y-%m-%d %H:%M} UTC, {span} from now")


def _purpose(certificate: x509.Certificate, purpose: Purpose) -> Check:
    purposes = describe(encode_chain([certificate]), "certificate")[0].get("purposes")
    if not isinstance(purposes, list):
        return Check("purpose", None, "it does not say what it is for (no extended key usage)")
    return Check("purpose", str(purpose) in purposes, f"for {', '.join(map(str, purposes))} use")


def _name(certificate: x509.Certificate, name: Name) -> Check:
    try:
        good = name_matches(certificate, name)
    except UNREADABLE:
        good = False
    return Check("name", good, f"it is {'' if good else 'not '}for {name}")


def _authority(certificate: x509.Certificate) -> Check:
    good = is_authority(certificate)
    return Check("authority", good, "it may issue certificates" if good else "it is no authority, so it may not issue")
