"""The verdict: what came of a connection, the cause in plain words, who must act, and the command.

It goes from the certain to the guessed: no TLS at all, an alert, our own judgement, the far side's words in HTTP,
and last a silence or a cut. It says how sure it is, and what else would look the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

from cryptography import x509

from handfast.errors import Failure, Reason
from handfast.explain.advice import advice_for, side_acts
from handfast.explain.chain import load_chain, own_faults
from handfast.explain.model import Ending, Known, Recording, Result, Sure, Verdict, Who
from handfast.explain.reasons import who_acts
from handfast.explain.refusals import Cause, Shown, certificate_cause, is_about_certificate, weighed
from handfast.explain.scene import Scene, plain_speech, scene_of
from handfast.pki.certificates import UNREADABLE
from handfast.pki.verification import Purpose
from handfast.wire import registry
from handfast.wire.alerts import alert_of
from handfast.wire.extensions import render_name
from handfast.wire.messages import AlertMessage
from handfast.wire.records import Side

_BY_CODE = {reason.code: reason for reason in Reason}
_MOST_NAMED = 5
_SAID_ALREADY = (Reason.SEEN_REFUSED, Reason.VERIFY_NO_CERTIFICATE, Reason.TLS_BAD_PROOF, Reason.POLICY_DENIED)


def judge(recording: Recording, known: Known) -> Verdict:
    """Return the verdict on a recorded connection. Raises nothing, whatever was recorded."""
    scene = scene_of(recording, known)
    found = [
        verdict
        for verdict in (_not_tls(scene), _untrusted(scene), _alerted(scene), _refused_by_us(scene), _in_words(scene))
        if verdict is not None
    ]
    if not found:
        found = [_sealed(scene) or _broken(scene) or _unanswered(scene) or _silent_refusal(scene) or _worked(scene)]
    first, *rest = found
    besides = tuple(_shortly(other.headline, other.reason) for other in rest if other.reason is not first.reason)
    return _unjudged(scene, replace(first, besides=tuple(dict.fromkeys(first.besides + besides))))


def _unjudged(scene: Scene, verdict: Verdict) -> Verdict:
    """The same, with the word that the server's certificate was not judged, if it was not."""
    if scene.us is Side.SERVER or scene.known.peer_faults is not None or not scene.ders(Side.SERVER):
        return verdict
    text = "The server's certificate was not judged: give the authority that you trust with --ca."
    return replace(verdict, text=f"{verdict.text} {text}")


def _shortly(what: str, reason: Reason | None) -> str:
    return what if reason is None else f"{what} [{reason.code}]"


# No TLS.


def _not_tls(scene: Scene) -> Verdict | None:
    for side in (Side.SERVER, Side.CLIENT):
        if scene.spoke_tls(side):
            continue
        speech = plain_speech(scene.first_bytes(side))
        shown = speech or f"its first bytes are {scene.first_bytes(side)[:16]!r}"
        if side is Side.CLIENT:
            return _client_without_tls(scene, speech, shown)
        text = (
            f"The client began TLS and {scene.place} answered with something else: {shown}. There is no certificate"
            " to quarrel about yet: this is the wrong port, or the server has TLS switched off."
        )
        command = f"curl http://{scene.place}/" if speech == "plain HTTP" else ""
        return _verdict(Reason.SEEN_NO_TLS, f"{scene.place} does not speak TLS", text, Who.SERVER, command)
    return None


def _client_without_tls(scene: Scene, speech: str, shown: str) -> Verdict:
    if speech == "plain HTTP":
        text = "The client spoke plain HTTP to a port that speaks TLS. It must call https://, not http://."
        command = f"curl --cacert ca.crt --cert client.crt --key client.key https://{scene.place}/"
        return _verdict(Reason.TLS_PLAIN_HTTP, "the client spoke plain HTTP", text, Who.CLIENT, command)
    text = f"The client did not begin with TLS: {shown}. Have it speak TLS from its first byte."
    if "PROXY" in speech:
        text = "A PROXY protocol header came before TLS: a proxy in front sends it, and this listener takes none."
        return _verdict(Reason.TLS_NOT_TLS, "a PROXY header came instead of TLS", text, Who.NETWORK)
    return _verdict(Reason.TLS_NOT_TLS, "the client does not speak TLS", text, Who.CLIENT)


# An alert.


def _alerted(scene: Scene) -> Verdict | None:
    for sender, alert in scene.alerts:
        if sender is not scene.us:
            return _alert(scene, sender, alert)
    return None


def _alert(scene: Scene, sender: Side, alert: AlertMessage) -> Verdict:
    holder = sender.other
    asked = holder is Side.SERVER or scene.request is not None
    if is_about_certificate(alert.number, shown=asked and holder in scene.shown):
        cause = certificate_cause(alert.number, _shown(scene, holder))
        return _certificate(scene, holder, cause, f"with the alert {alert.name} ({alert.number})")
    known = alert_of(alert.number)
    said = f"The {sender} ended the handshake with the alert {alert.name} ({alert.number})"
    match alert.number:
        case 70:
            return _version(scene, said)
        case 40 | 71 if scene.answer is None:
            return _no_common(scene, said)
        case 112:
            name = scene.hello.server_name if scene.hello else ""
            text = (
                f"{said}: it has no site called {name or '(no name was sent)'!s}. Ask for a name that it serves, or"
                " give it that site. Note that the name in the ClientHello (SNI) counts here, not the address."
            )
            headline = f"the server has no site called {name}" if name else "the server wants to be called by a name"
            command = f"handfast explain {scene.place} --sni NAME"
            return _verdict(Reason.TLS_UNKNOWN_NAME, headline, text, Who.CLIENT, command)
        case 120:
            offered = ", ".join(scene.hello.protocols) if scene.hello else ""
            text = (
                f"{said}: the client offers {offered or 'no application protocol'} (ALPN), and the server speaks none"
                " of these. Offer one that it speaks, as h2, http/1.1 or postgresql."
            )
            command = f"handfast explain {scene.place} --alpn PROTOCOL"
            return _verdict(Reason.TLS_NO_COMMON, "no application protocol (ALPN) is shared", text, Who.CLIENT, command)
    text = f"{said}. It means: {known.meaning if known else 'nothing that is registered'}."
    also = (known.cause,) if known else ()
    verdict = _verdict(Reason.TLS_ALERT, f"the {sender} broke off: {alert.name}", text, side_acts(sender))
    return replace(verdict, sure=Sure.POSSIBLE, also=also)


def _version(scene: Scene, said: str) -> Verdict:
    offered = ", ".join(scene.hello.versions) if scene.hello else "?"
    text = (
        f"{said}: the client offers {offered}, and the server accepts none of these. Let one side take what the"
        " other has: TLS 1.3 on both is best."
    )
    headline = "client and server share no TLS version"
    if scene.hello and "TLS 1.3" in scene.hello.versions:  # so the server has only what is older than all of them
        return _verdict(Reason.TLS_VERSION, headline, text, Who.SERVER)
    return _verdict(Reason.TLS_VERSION, headline, text, Who.CLIENT, f"handfast explain {scene.place}")


def _no_common(scene: Scene, said: str) -> Verdict:
    hello = scene.hello
    versions = ", ".join(hello.versions) if hello else "?"
    text = (
        f"{said} before it chose anything: it accepts no cipher suite, key exchange group or signature algorithm that"
        f" the client offers (it offers {versions}). Compare what ClientHello lists with the server's settings."
    )
    verdict = _verdict(Reason.TLS_NO_COMMON, "client and server share no parameters", text, Who.SERVER)
    also = ("the server asks for a newer TLS and says it with this alert", "the server has no certificate to show")
    return replace(verdict, sure=Sure.LIKELY, also=also)


# A certificate, refused by one side or the other.


def _untrusted(scene: Scene) -> Verdict | None:
    """What we, the client, have against the server's certificate."""
    faults = scene.known.peer_faults
    if scene.us is Side.SERVER or not faults:
        return None
    return _certificate(scene, Side.SERVER, Cause(faults[0]), "(so says handfast, by the authorities you gave)")


def _refused_by_us(scene: Scene) -> Verdict | None:
    """What we, the server, have against the client."""
    broken = scene.recording.broken
    if scene.us is not Side.SERVER or broken is None:
        return None
    if broken.reason.code.startswith("verify.") or broken.reason is Reason.TLS_BAD_PROOF:
        return _certificate(scene, Side.CLIENT, Cause(broken), "(so a guard with these settings would say)")
    match broken.reason:
        case Reason.TLS_VERSION:
            return _version(scene, "The handshake ended at its first message")
        case Reason.TLS_NO_COMMON:
            text = f"The handshake could not begin: {broken.message}. Compare ClientHello's lists with the server's."
            return _verdict(Reason.TLS_NO_COMMON, broken.message, text, Who.CLIENT)
    return None


def _shown(scene: Scene, holder: Side) -> Shown:
    """What a side showed, for the other to judge; of a server's, with what our own bundle has against it."""
    known, ders = scene.known, scene.ders(holder)
    chain, faults, named = load_chain(ders), known.peer_faults, None
    if holder is Side.CLIENT or faults is None:
        faults = own_faults(chain, Purpose(holder.value), known.now)
    if chain and holder is Side.CLIENT and scene.request is not None and scene.request.authorities:
        named = any(_der_of(certificate.issuer) in scene.request.authorities for certificate in chain)
    given = scene.us is holder and bool(known.own)
    return Shown(holder, chain, faults, named, exact=scene.us is Side.SERVER, given=given, sent=bool(ders))


def _der_of(name: x509.Name) -> bytes:
    try:
        return name.public_bytes()
    except UNREADABLE:
        return b""


def _certificate(scene: Scene, holder: Side, cause: Cause, how: str) -> Verdict:
    said, (cause, others) = cause, weighed(cause, _shown(scene, holder))
    reason = cause.failure.reason
    advice = advice_for(reason, holder)
    message = cause.failure.message
    detail = "" if "?" in message or reason in _SAID_ALREADY else f" In detail: {message}."
    accepted = _accepted(scene) if holder is Side.CLIENT and _is_about_authority(reason) else ""
    why = f"{cause.sure.prefix}{advice.what}."
    if reason is not said.failure.reason:
        first = advice_for(said.failure.reason, holder).what
        why = f"{first}. A new one of the same authority would be refused next: {why}"
    text = f"The {holder.other} refused the {holder} {how}: {why}{detail}{accepted} {advice.todo}"
    verdict = _verdict(reason, advice.what, text, advice.who, advice.command)
    return replace(verdict, sure=cause.sure, also=cause.also, besides=_told(others, holder))


def _told(failures: tuple[Failure, ...], holder: Side) -> tuple[str, ...]:
    return tuple(_shortly(advice_for(one.reason, holder).what, one.reason) for one in failures)


def _is_about_authority(reason: Reason) -> bool:
    return reason in (Reason.VERIFY_NO_CERTIFICATE, Reason.VERIFY_UNKNOWN_ISSUER, Reason.SEEN_REFUSED)


def _accepted(scene: Scene) -> str:
    if scene.request is None or not scene.request.authorities:
        return ""
    names = [render_name(name) for name in scene.request.authorities]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f" The server accepts certificates of: {'; '.join(names[:_MOST_NAMED])}{more}."


# A refusal in the application's words.


def _in_words(scene: Scene) -> Verdict | None:
    """What an HTTP answer says of the certificate: handfast's own refusals, nginx's, Envoy's."""
    if scene.us is Side.SERVER:
        return None
    head, _, body = scene.recording.answer.partition(b"\r\n\r\n")
    found = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    if found is None:
        return None
    status = int(found[1])
    if (ours := _our_refusal(body)) is not None:
        identifier = f" (its log has it under the id {ours[1]})" if ours[1] else ""
        if ours[0].code.startswith(("verify.", "ended.", "policy.")):
            cause = Cause(Failure(ours[0], _facts_of(scene, ours[0])))
            return _certificate(scene, Side.CLIENT, cause, f"with the HTTP status {status}{identifier}")
        return _no_refusal(ours[0], f"The guard answered {status}{identifier}")
    if status in (400, 496) and b"No required SSL certificate was sent" in body:
        cause = Cause(Failure(Reason.VERIFY_NO_CERTIFICATE))
        return _certificate(scene, Side.CLIENT, cause, f"with the HTTP status {status}, as nginx does")
    if status in (400, 495) and b"The SSL certificate error" in body:
        return _certificate(scene, Side.CLIENT, _nginx_cause(scene), f"with the HTTP status {status}, as nginx does")
    if status == 403 and b"RBAC: access denied" in body:
        cause = Cause(Failure(Reason.POLICY_DENIED, {"rule": "of Envoy (RBAC)"}))
        return _certificate(scene, Side.CLIENT, cause, "with the HTTP status 403, as Envoy does")
    return None


def _no_refusal(reason: Reason, said: str) -> Verdict:
    """The guard let the client in; what it answers is about the request or the app."""
    failure = Failure(reason)
    detail = "" if "?" in failure.message else f" In words: {failure.message}."
    text = f"The handshake worked on both sides. {said} with {reason.code}, which is not about a certificate.{detail}"
    return replace(_verdict(reason, f"TLS works; then {reason.code}", text, who_acts(reason)), result=Result.WORKS)


def _our_refusal(body: bytes) -> tuple[Reason, str] | None:
    try:
        said = json.loads(body[:4096])
    except ValueError:
        return None
    if not isinstance(said, Mapping) or not isinstance(said.get("error"), str) or said["error"] not in _BY_CODE:
        return None
    identifier = str(said.get("id", ""))[:64]
    return _BY_CODE[said["error"]], identifier if identifier.isalnum() else ""


def _facts_of(scene: Scene, reason: Reason) -> dict[str, object]:
    """The facts of a refusal that only gave its code, as far as our own look at the certificate has them."""
    chain = load_chain(scene.ders(Side.CLIENT))
    for fault in own_faults(chain, Purpose.CLIENT, scene.known.now):
        if fault.reason is reason:
            return fault.facts
    return {}


def _nginx_cause(scene: Scene) -> Cause:
    """nginx says the same of every certificate that it refuses; its error log has the reason."""
    cause = certificate_cause(46, _shown(scene, Side.CLIENT))
    if cause.failure.reason is not Reason.SEEN_REFUSED:
        return replace(cause, sure=Sure.LIKELY)
    also = ("its authority is not the one that nginx trusts", "it was revoked", "nginx has no revocation list for it")
    return replace(cause, also=also)


# No words at all.


def _sealed(scene: Scene) -> Verdict | None:
    """A recording of TLS 1.3 without its key log."""
    if not scene.sealed:
        return None
    text = (
        "TLS 1.3 encrypts all that follows ServerHello: the certificates, and a refusal too. So whether it worked"
        " cannot be told from this recording alone. The key log of either side opens the rest; curl, browsers and"
        " others write one where the environment variable SSLKEYLOGFILE tells them."
    )
    headline, command = "what came of it is encrypted", "handfast explain RECORDING --keylog FILE"
    return replace(_verdict(Reason.SEEN_SEALED, headline, text, Who.CALLER, command), result=Result.UNKNOWN)


def _broken(scene: Scene) -> Verdict | None:
    """What our own engine could not take of the far side."""
    broken, us = scene.recording.broken, scene.us
    if broken is None or us is None or broken.reason is Reason.TLS_CLOSED:
        return None
    text = f"Our TLS engine could not go on with what the {us.other} sent: {broken.message}."
    match broken.reason:
        case Reason.TLS_VERSION:
            return _version(scene, "The server chose a TLS version that this client does not take")
        case Reason.TLS_BAD_PROOF:
            return _certificate(scene, us.other, Cause(broken), "(its signature does not verify)")
    return _verdict(broken.reason, "the handshake broke off on our side", text, side_acts(us.other))


def _unanswered(scene: Scene) -> Verdict | None:
    recording = scene.recording
    if recording.done is not None or (scene.us is None and recording.ending is Ending.QUIET):
        return None
    far = scene.us.other if scene.us else Side.SERVER
    if recording.ending is Ending.FULL:
        text = "More came than any handshake has, so it was not read to its end."
        return _verdict(Reason.TLS_HANDSHAKE, "the handshake is too long", text, side_acts(far))
    after = _last_of(scene, far)
    if recording.ending is Ending.TIMEOUT:
        return _timed_out(scene, far, after)
    how = "reset" if recording.ending is Ending.RESET else "closed"
    if far is Side.CLIENT:
        text = f"The client {how} the connection after {after}, without an alert." + _closed_by_client(scene)
        return replace(_verdict(Reason.TLS_CLOSED, "the client hung up", text, Who.CLIENT), sure=Sure.POSSIBLE)
    text = f"The connection was {how} after {after}, without an alert. A TLS server that refuses says why."
    also = ["the port is of a service that does not speak TLS", "the server crashed, or is overloaded"]
    if scene.answer is None:
        also.append("something on the way lets this host name, or TLS at all, not pass (a firewall, a filter by SNI)")
        also.append("the server expects a PROXY protocol header first")
    if scene.known.small_works:
        text += (
            " A smaller ClientHello, without a post-quantum key share, was answered: something on the way, or the"
            " server, cannot take a hello that does not fit one packet."
        )
        also = []
    verdict = _verdict(Reason.SEEN_CUT, f"the connection was cut after {after}", text, Who.NETWORK)
    return replace(verdict, sure=Sure.LIKELY if scene.known.small_works else Sure.POSSIBLE, also=tuple(also))


def _timed_out(scene: Scene, far: Side, after: str) -> Verdict:
    text = f"The {far} said nothing more after {after}, and the time was over."
    if scene.answer is None and far is Side.SERVER:
        text += (
            " TCP connects, so something listens there: a service that waits for another protocol, or one that hangs."
        )
    also: tuple[str, ...] = ("packets are lost on the way, large ones above all (MTU)", f"the {far} is overloaded")
    if scene.known.small_works:
        text += " A smaller ClientHello was answered: something on the way cannot take one that needs two packets."
        also = ()
    who = Who.NETWORK if scene.known.small_works else side_acts(far)
    verdict = _verdict(Reason.TLS_TIMEOUT, f"no answer after {after}", text, who)
    return replace(verdict, sure=Sure.POSSIBLE, also=also)


def _closed_by_client(scene: Scene) -> str:
    if Side.SERVER in scene.shown:
        return " Some clients do so when they do not trust the server's certificate; others ask their user first."
    return " It sent no ClientHello." if scene.hello is None else ""


def _last_of(scene: Scene, far: Side) -> str:
    """The last thing that happened, in a few words."""
    for side in (far, far.other):
        said = [event for event in scene.recording.events if event.sender is side and event.kind == 22 and event.data]
        if said:
            name = registry.MESSAGES.get(said[-1].data[0], "message")
            return f"the {side}'s {name}"
    return "TCP had connected"


def _silent_refusal(scene: Scene) -> Verdict | None:
    """A server that closes right after a TLS 1.3 handshake, with no word, when it had asked for a certificate."""
    recording = scene.recording
    closed = recording.ending in (Ending.CUT, Ending.RESET, Ending.CLOSED)
    if scene.us is not Side.CLIENT or recording.done is None or not closed or recording.answer:
        return None
    if scene.request is None:
        text = "The handshake was done, and the server closed without having said anything."
        return replace(
            _verdict(None, "the handshake worked; then the server closed", text, Who.NOBODY), result=Result.WORKS
        )
    what = "certificate" if scene.ders(Side.CLIENT) else "client without a certificate"
    text = (
        f"The handshake was done from the client's side, and the server closed {'' if recording.waited else 'at once '}"
        f"within {recording.waited:.1f} s without a word. A server that asks for a certificate and does that has most"
        f" likely refused the {what}; its log says why."
    )
    verdict = _verdict(Reason.SEEN_REFUSED, "the server closed right after the handshake", text, Who.SERVER)
    also = ("a rule of the server keeps this name out", "the server's application closed for a reason of its own")
    return replace(
        verdict, sure=Sure.LIKELY, also=also, besides=_told(_shown(scene, Side.CLIENT).troubles, Side.CLIENT)
    )


def _worked(scene: Scene) -> Verdict:
    recording = scene.recording
    if scene.us is None and recording.done is None:
        return _cut_recording(scene)
    both = scene.request is not None and bool(scene.ders(Side.CLIENT))
    said = f" HTTP answered {status}." if (status := _status(recording.answer)) else ""
    if scene.us is Side.CLIENT and recording.done is not None:
        said += "" if said else f" No refusal came within {recording.waited:.1f} s."
    if scene.request is None:
        text = (
            "The handshake worked, and the server did not ask for a client certificate: this is plain TLS. Whoever"
            f" reaches the port is served.{said}"
        )
        verdict = _verdict(Reason.SEEN_NOT_MUTUAL, "TLS works; it is not mutual", text, Who.NOBODY)
        return replace(verdict, result=Result.WORKS)
    if both:
        text = f"Both sides showed a certificate, proved that they hold its key, and went on.{said}"
        return replace(_verdict(None, "mutual TLS works", text, Who.NOBODY), result=Result.WORKS)
    text = f"The server asks for a client certificate and went on without one: it is optional here.{said}"
    return replace(_verdict(None, "TLS works without a client certificate", text, Who.NOBODY), result=Result.WORKS)


def _cut_recording(scene: Scene) -> Verdict:
    after = _last_of(scene, Side.SERVER)
    text = (
        f"The recording ends after {after}, before both sides had finished. Without the key log, what is encrypted"
        " stays closed."
    )
    return replace(
        _verdict(Reason.SEEN_CUT, "the handshake is not seen to its end", text, Who.NOBODY), sure=Sure.POSSIBLE
    )


def _status(answer: bytes) -> str:
    found = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    return found[1].decode() if found else ""


def _verdict(reason: Reason | None, headline: str, text: str, who: Who, command: str = "") -> Verdict:
    return Verdict(Result.FAILS, headline[:1].upper() + headline[1:], " ".join(text.split()), who, command, reason)
