"""What to do about a reason: who must act, in a sentence, with the command. One table for both sides of a handshake.

In the texts, {holder} is the side whose certificate it is, {judge} the side that looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass

from handfast.errors import Reason
from handfast.explain.model import Who


@dataclass(frozen=True, slots=True)
class Advice:
    """`what`: the fault as a clause; `todo`: the way out; `command`: what to type, with {place} and {profile}.

    `who` is a Who, or "holder" or "judge", which the situation fills in.
    """

    what: str
    todo: str
    who: str
    command: str = ""


_ISSUE = "handfast issue --profile {profile} NAME"

ADVICE = {
    Reason.VERIFY_NO_CERTIFICATE: Advice(
        "the {holder} showed no certificate",
        "Give the {holder} a certificate and its key; with handfast's authority, one is made by the command below.",
        "holder",
        _ISSUE,
    ),
    Reason.VERIFY_UNKNOWN_ISSUER: Advice(
        "the {judge} does not know the authority that issued the {holder}'s certificate",
        "Use a certificate of an authority that the {judge} accepts, send the intermediate certificates along, or"
        " add the authority to the {judge}'s bundle.",
        "holder",
        "handfast verify LEAF --bundle CA --purpose {profile}",
    ),
    Reason.VERIFY_EXPIRED: Advice(
        "the {holder}'s certificate has expired",
        "Renew it, and have the {holder} load the new one: a program that runs on keeps the old one in memory.",
        "holder",
        _ISSUE,
    ),
    Reason.VERIFY_NOT_YET_VALID: Advice(
        "the {holder}'s certificate is not valid yet",
        "Compare the clocks of both machines and of the one that issued it.",
        "holder",
        "date -u",
    ),
    Reason.VERIFY_REVOKED: Advice(
        "the {holder}'s certificate was revoked",
        "If that was a mistake, issue a new one; a revocation cannot be taken back.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_CRL_MISSING: Advice(
        "the {judge} checks revocations and has no revocation list of the certificate's issuer",
        "Give the {judge} a revocation list of every authority in the chain, or switch the check off.",
        "judge",
        "handfast inspect CRL",
    ),
    Reason.VERIFY_CRL_STALE: Advice(
        "the {judge}'s revocation list is out of date",
        "Fetch a fresh one from the authority, and have the {judge} load it.",
        "judge",
        "handfast inspect CRL",
    ),
    Reason.VERIFY_CRL_INVALID: Advice(
        "the {judge}'s revocation list cannot be trusted", "Fetch it anew.", "judge", "handfast inspect CRL"
    ),
    Reason.VERIFY_OCSP_UNAVAILABLE: Advice(
        "the {judge} asks by OCSP whether the {holder}'s certificate was revoked, and got no answer",
        "See that the authority's responder is up and that the {judge} may reach it.",
        "judge",
    ),
    Reason.VERIFY_OCSP_INVALID: Advice(
        "the {judge} asked by OCSP about the {holder}'s certificate and got an answer that is not good",
        "Have whoever runs the authority's responder look at what it answers.",
        Who.AUTHORITY,
    ),
    Reason.VERIFY_PURPOSE: Advice(
        "the {holder}'s certificate is for another purpose",
        "Issue one for {profile} use: servers' and clients' certificates are two kinds.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_NO_EKU: Advice(
        "the {holder}'s certificate does not say what it is for",
        "Issue one for {profile} use; a guard admits such certificates with --legacy-certs.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_NAME_MISMATCH: Advice(
        "the {holder}'s certificate is for another name",
        "Call it by a name in its certificate, or issue one for the name that it is called by.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_NAME_CONSTRAINT: Advice(
        "the {holder}'s certificate carries a name that its authority may not issue for",
        "Issue it from an authority that is allowed the name, or for another name.",
        Who.AUTHORITY,
        _ISSUE,
    ),
    Reason.VERIFY_BAD_SIGNATURE: Advice(
        "the signature on the {holder}'s certificate is wrong",
        "It was altered or forged, or the authority was made anew under its old name. Issue the certificate anew.",
        "holder",
        _ISSUE,
    ),
    Reason.TLS_BAD_PROOF: Advice(
        "the {holder} could not prove that it holds its certificate's key",
        "The key in use is not that of the certificate: take both from one issuing.",
        "holder",
        "handfast inspect FILE",
    ),
    Reason.POLICY_DENIED: Advice(
        "the {holder}'s certificate is good, and a rule keeps it out",
        "Allow its name in the {judge}'s rules, if it should come in.",
        "judge",
    ),
    Reason.SEEN_REFUSED: Advice(
        "the {judge} refused the {holder}'s certificate without saying why",
        "The {judge}'s log says more. Check the {holder}'s certificate against the authorities that the {judge} has.",
        "judge",
        "handfast verify LEAF --bundle CA --purpose {profile}",
    ),
}

_REISSUE = Advice(
    "the {holder}'s certificate breaks a rule", "Issue one that does not.", Who.AUTHORITY, "handfast inspect FILE"
)


def advice_for(reason: Reason) -> Advice:
    """What to do about a certificate that is refused for that reason. Raises nothing."""
    if reason in (Reason.POLICY_NO_RULE, Reason.ENDED_POLICY):
        return ADVICE[Reason.POLICY_DENIED]
    if reason in (Reason.ENDED_EXPIRED, Reason.ENDED_REVOKED):
        return ADVICE[Reason.VERIFY_EXPIRED if reason is Reason.ENDED_EXPIRED else Reason.VERIFY_REVOKED]
    return ADVICE.get(reason, _REISSUE)
