"""The way from a recording to an explanation, and the explanation as JSON."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from statistics import median

from handfast.explain.chain import faults, load_chain
from handfast.explain.model import Added, Explanation, Known, Link, Recording, Result, Step
from handfast.explain.scene import scene_of
from handfast.explain.steps import expected_name, steps_of
from handfast.explain.verdict import judge
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.wire import registry
from handfast.wire.records import Side


def explain(recording: Recording, known: Known, bundle: TrustBundle | None = None) -> Explanation:
    """Explain a recording. With `bundle`, the server's chain is judged by it, for the name in `known`.

    Raises nothing, whatever was recorded.
    """
    if bundle is not None:
        known = replace(known, anchors=bundle.anchors)
        chain = load_chain(scene_of(recording, known).ders(Side.SERVER))
        if chain and recording.seen_from is not Side.SERVER:
            terms = Terms(bundle, Purpose.SERVER, expected_name(known.server_name))
            known = replace(known, peer_faults=faults(chain, terms, known.now))
    steps, settled = steps_of(recording, known)
    sealed = scene_of(recording, known).sealed
    return Explanation(
        recording=recording,
        steps=steps,
        added=_added(steps),
        verdict=judge(recording, known),
        version=registry.name_of(registry.VERSIONS, settled.version) if settled.version else "",
        suite=registry.name_of(registry.SUITES, settled.suite) if settled.version else "",
        group=settled.group,
        sealed=sealed,
    )


def measured(explanation: Explanation, mutual: list[float], plain: list[float]) -> Explanation:
    """The same, with the times of handshakes with a client certificate and without one, in seconds."""
    if not mutual or not plain:
        return explanation
    added = replace(
        explanation.added,
        mutual_ms=median(mutual) * 1000,
        plain_ms=median(plain) * 1000,
        runs=min(len(mutual), len(plain)),
    )
    return replace(explanation, added=added)


def _added(steps: tuple[Step, ...]) -> Added:
    mutual = [step for step in steps if step.mutual]
    handshake = [step for step in steps if step.name != "application data"]
    return Added(
        tuple(f"{step.sender}'s {step.name}" for step in mutual),
        sum(step.size for step in mutual),
        sum(step.size for step in handshake),
    )


def as_json(explanation: Explanation) -> dict[str, object]:
    """The explanation as JSON values. No secret is among them: neither keys nor application data."""
    recording, verdict, added = explanation.recording, explanation.verdict, explanation.added
    return {
        "place": recording.place,
        "began": recording.began.isoformat(),
        "seen_from": None if recording.seen_from is None else str(recording.seen_from),
        "version": explanation.version,
        "cipher_suite": explanation.suite,
        "group": explanation.group,
        "protocol": recording.protocol,
        "ending": str(recording.ending),
        "handshake_ms": None if recording.done is None else round(recording.done * 1000, 3),
        "bytes": {str(side): recording.sent_by(side) for side in Side},
        "steps": [_step(step) for step in explanation.steps],
        "added_by_mutual_tls": {
            "messages": list(added.messages),
            "bytes": added.size,
            "of_bytes": added.total,
            "with_certificate_ms": _rounded(added.mutual_ms),
            "without_certificate_ms": _rounded(added.plain_ms),
            "runs": added.runs,
        },
        "verdict": {
            "worked": None if verdict.result is Result.UNKNOWN else verdict.worked,
            "result": str(verdict.result),
            "headline": verdict.headline,
            "text": verdict.text,
            "reason": None if verdict.reason is None else verdict.reason.code,
            "who": str(verdict.who),
            "command": verdict.command,
            "sure": str(verdict.sure),
            "also": list(verdict.also),
            "besides": list(verdict.besides),
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _step(step: Step) -> dict[str, object]:
    found: dict[str, object] = {
        "at_ms": round(step.at, 3),
        "sender": str(step.sender),
        "message": step.name,
        "bytes": step.size,
        "encrypted": step.encrypted,
        "mutual": step.mutual,
        "purpose": step.purpose,
        "facts": dict(step.facts),
    }
    return found | ({"chain": [_link(link) for link in step.chain]} if step.chain else {})


def _link(link: Link) -> dict[str, object]:
    return {
        "label": link.label,
        "subject": link.subject,
        "issuer": link.issuer,
        "serial": link.serial,
        "key": link.key,
        "not_before": _moment(link.not_before),
        "not_after": _moment(link.not_after),
        "names": list(link.names),
        "sha256": link.sha256,
        "sent": link.sent,
        "checks": [{"what": check.what, "good": check.good, "text": check.text} for check in link.checks],
    }


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
