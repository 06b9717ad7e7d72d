"""What to do about a reason: who must act, in a sentence, with the command. One table for both sides of a handshake.

It knows nothing of a connection: whose certificate it is, and what to call that, is told to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from handfast.errors import Reason
from handfast.explain.model import Who
from handfast.wire.records import Side


@dataclass(frozen=True, slots=True)
class Advice:
    """`what`: the fault as a clause; `todo`: the way out in sentences; `command`: what to type.

    `anew`: a new certificate is the way out.
    """

    what: str
    todo: str
    who: Who
    command: str
    anew: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """Advice with places to fill: {holder} is the side whose certificate {it} is, {judge} the side that looks at it.

    `who` is a Who, or "holder" or "judge".
    """

    what: str
    todo: str
    who: str
    command: str = ""


_ISSUE = "handfast issue --profile {profile} NAME"

ADVICE = {
    Reason.VERIFY_NO_CERTIFICATE: _Row(
        "the {holder} showed no certificate",
        "Give the {holder} a certificate and its key; with handfast's authority, one is made by the command below.",
        "holder",
        _ISSUE,
    ),
    Reason.VERIFY_UNKNOWN_ISSUER: _Row(
        "the {judge} does not know the authority that issued {it}",
        "Use a certificate of an authority that the {judge} accepts, send the intermediate certificates along, or"
        " add the authority to the {judge}'s bundle.",
        "holder",
        "handfast verify LEAF --bundle CA --purpose {profile}",
    ),
    Reason.VERIFY_EXPIRED: _Row(
        "{it} has expired",
        "Renew it, and have the {holder} load the new one: a program that runs on keeps the old one in memory.",
        "holder",
        _ISSUE,
    ),
    Reason.VERIFY_NOT_YET_VALID: _Row(
        "{it} is not valid yet",
        "Compare the clocks of both machines and of the one that issued it.",
        "holder",
        "date -u",
    ),
    Reason.VERIFY_REVOKED: _Row(
        "{it} was revoked",
        "A revocation cannot be taken back. If it was a mistake, issue a new one.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_CRL_MISSING: _Row(
        "the {judge} checks revocations and has no revocation list of the certificate's issuer",
        "Give the {judge} a revocation list of every authority in the chain, or switch the check off.",
        "judge",
        "handfast inspect CRL",
    ),
    Reason.VERIFY_CRL_STALE: _Row(
        "the {judge}'s revocation list is out of date",
        "Fetch a fresh list from the authority, and have the {judge} load it.",
        "judge",
        "handfast inspect CRL",
    ),
    Reason.VERIFY_CRL_INVALID: _Row(
        "the {judge}'s revocation list cannot be trusted", "Fetch it anew.", "judge", "handfast inspect CRL"
    ),
    Reason.VERIFY_OCSP_UNAVAILABLE: _Row(
        "the {judge} asks by OCSP whether {it} was revoked, and got no answer",
        "See that the authority's responder is up and that the {judge} may reach it.",
        "judge",
    ),
    Reason.VERIFY_OCSP_INVALID: _Row(
        "the {judge} asked by OCSP about {it} and got an answer that is not good",
        "Have whoever runs the authority's responder look at what it answers.",
        Who.AUTHORITY,
    ),
    Reason.VERIFY_PURPOSE: _Row(
        "{it} is for another purpose",
        "Servers' and clients' certificates are two kinds. Issue one for {profile} use.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_NO_EKU: _Row(
        "{it} does not say what it is for",
        "Of clients, a guard takes such ones with --legacy-certs. Issue one for {profile} use.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_NAME_MISMATCH: _Row(
        "{it} is for another name",
        "Call it by a name in its certificate, or issue one for the name that it is called by.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_NAME_CONSTRAINT: _Row(
        "{it} carries a name that its authority may not issue for",
        "Issue it from an authority that is allowed the name, or for another name.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_BAD_SIGNATURE: _Row(
        "the signature on {it} is wrong",
        "It was altered or forged, or the authority was made anew under its old name. Issue the certificate anew.",
        "holder",
        _ISSUE,
    ),
    Reason.TLS_BAD_PROOF: _Row(
        "the {holder} could not prove that it holds its certificate's key",
        "The key in use is not that of the certificate: take both from one issuing.",
        "holder",
        "handfast inspect FILE",
    ),
    Reason.POLICY_DENIED: _Row(
        "{it} is good, and a rule keeps it out",
        "Allow its name in the {judge}'s rules, if it should come in.",
        "judge",
    ),
    Reason.SEEN_REFUSED: _Row(
        "the {judge} refused {it} without saying why",
        "The {judge}'s log says more. Check {it} against the authorities that the {judge} has.",
        "judge",
        "handfast verify LEAF --bundle CA --purpose {profile}",
    ),
}

_REISSUE = _Row("{it} breaks a rule", "Have one issued without this fault.", Who.AUTHORITY, "handfast inspect FILE")
# What ends a connection that was let in is mended as what would not have let it in.
_ALIKE = {
    Reason.POLICY_NO_RULE: Reason.POLICY_DENIED,
    Reason.ENDED_POLICY: Reason.POLICY_DENIED,
    Reason.ENDED_EXPIRED: Reason.VERIFY_EXPIRED,
    Reason.ENDED_REVOKED: Reason.VERIFY_REVOKED,
}


def advice_for(reason: Reason, holder: Side, it: str = "") -> Advice:
    """What to do about the holder's certificate, refused for that reason. Raises nothing.

    `it`: what the certificate is called in a sentence; else it is "the client's certificate", or the server's.
    """
    row = ADVICE.get(_ALIKE.get(reason, reason), _REISSUE)
    words = {"holder": holder, "judge": holder.other, "profile": holder, "it": it or f"the {holder}'s certificate"}
    who = {"holder": side_acts(holder), "judge": side_acts(holder.other)}.get(row.who) or Who(row.who)
    what, todo, command = (text.format(**words) for text in (row.what, row.todo, row.command))
    return Advice(what, todo, who, command, row.command == _ISSUE)


def side_acts(side: Side) -> Who:
    """A side of a handshake as the one who must act."""
    return Who.CLIENT if side is Side.CLIENT else Who.SERVER
