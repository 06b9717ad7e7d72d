"""A recording's messages, each with what it is for and what it says, in words.

Owns the words about the protocol. It neither draws nor judges; `verdict` does the one, `draw` and `page` the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from handfast.errors import HandfastError
from handfast.explain.chain import look_at_chain
from handfast.explain.model import Known, Recording, Step
from handfast.pki.certificates import UNREADABLE
from handfast.pki.names import Name, parse_dns, parse_name
from handfast.pki.verification import Purpose
from handfast.wire import messages as m
from handfast.wire import registry
from handfast.wire.alerts import alert_of
from handfast.wire.extensions import render_name
from handfast.wire.records import Event, Side

_MOST_STEPS = 200
_MOST_SHOWN = 8  # entries of a list
_A_PAUSE = 0.1  # seconds between the handshake and our request from which on they want an explanation

Facts = tuple[tuple[str, str], ...]


@dataclass
class Settled:
    """What the handshake has settled, as far as it was read."""

    version: int = 0
    suite: int = 0
    group: str = ""
    asked: bool = False  # the server asked for a client certificate
    retried: bool = False
    spoken: set[Side] = field(default_factory=set)  # who has sent application data

    @property
    def new(self) -> bool:
        """Whether it is TLS 1.3."""
        return self.version >= m.TLS_1_3


def steps_of(recording: Recording, known: Known) -> tuple[tuple[Step, ...], Settled]:
    """Return the steps in their order, and what they settled. Raises nothing, whatever was recorded."""
    settled, steps = Settled(), list[Step]()
    for event, message in m.read_events(recording.events):
        step = _step(event, message, settled, known, recording)
        if steps and isinstance(message, m.ApplicationData) and _same(steps[-1], step):
            steps[-1] = replace(steps[-1], size=steps[-1].size + step.size)
        elif steps and isinstance(message, m.NewSessionTicket) and _same(steps[-1], step):
            steps.append(replace(step, purpose="Another one."))
        elif len(steps) < _MOST_STEPS:
            steps.append(step)
    return tuple(steps), settled


def expected_name(text: str) -> Name | None:
    """The host that a server is asked to be, as a name; None if there is none that could be compared."""
    try:
        return (
            (parse_name(text) if ":" in text or text.replace(".", "").isdigit() else parse_dns(text)) if text else None
        )
    except (HandfastError, *UNREADABLE):
        return None


def _same(last: Step, step: Step) -> bool:
    return (last.name, last.sender) == (step.name, step.sender)


def _step(event: Event, message: m.Message, settled: Settled, known: Known, recording: Recording) -> Step:
    name, purpose, facts = _words(event, message, settled)
    step = Step(event.at * 1000, event.sender, name, event.size or len(event.data), event.encrypted, purpose, facts)
    match message:
        case m.CertificateRequest():
            settled.asked = True
            return replace(step, mutual=True)
        case m.Certificate(entries=entries):
            ders = [entry.der for entry in entries]
            purposes = {Side.SERVER: Purpose.SERVER, Side.CLIENT: Purpose.CLIENT}
            theirs = recording.seen_from is not event.sender
            wanted = expected_name(known.server_name) if event.sender is Side.SERVER else None
            anchors = known.anchors if theirs else ()
            chain = look_at_chain(ders, purposes[event.sender], known.now, anchors, wanted)
            return replace(step, chain=chain, mutual=event.sender is Side.CLIENT)
        case m.CertificateVerify():
            return replace(step, mutual=event.sender is Side.CLIENT)
        case m.AlertMessage() | m.Unreadable():
            return replace(step, bad=isinstance(message, m.Unreadable) or message.fatal)
        case m.ApplicationData() if settled.new and recording.done is None:
            return replace(step, purpose="Encrypted: what is left of the handshake, or what TLS is for.")
        case m.ApplicationData() if event.sender not in settled.spoken:
            settled.spoken.add(event.sender)
            return replace(step, purpose=_application(event, recording) or purpose)
    return step


def _application(event: Event, recording: Recording) -> str:
    """What a side said first over TLS, where it is known and is HTTP. Of a path only our own is shown: others' may
    hold secrets.
    """
    ours = recording.seen_from is event.sender
    data = recording.said if event.sender is (recording.seen_from or Side.CLIENT) else recording.answer
    if found := re.match(rb"HTTP/1\.[01] (\d{3})", data):
        return f"{'Our' if ours else 'The'} answer: {found[1].decode()}."
    found = re.match(rb"([A-Z]{1,20}) (/[!-~]{0,200}) HTTP/1\.[01]\r\n", data)
    if found is None:
        return ""
    if not ours:
        return f"The client's request: {found[1].decode()}."
    text = f"Our request: {found[1].decode()} {found[2].decode()}."
    waited = 0.0 if recording.done is None else event.at - recording.done
    if waited < _A_PAUSE:
        return text
    return f"{text} It waited {waited:.2f} s on purpose: a server that greets, or refuses in TLS, has done so by then."


def _words(event: Event, message: m.Message, settled: Settled) -> tuple[str, str, Facts]:
    """A message's name, its purpose in a sentence or two, and what it says."""
    who = event.sender.value
    match message:
        case m.ClientHello():
            return _client_hello(message, settled)
        case m.ServerHello():
            return _server_hello(message, settled)
        case m.EncryptedExtensions(extensions=extensions):
            protocol = "".join(m.values_of(message, 16))
            others = _listed(extension.name for extension in extensions)
            text = "The server's answers to the offer that need no eavesdropper."
            return "EncryptedExtensions", text, _facts(("application protocol", protocol), ("extensions", others))
        case m.CertificateRequest():
            return _request(message)
        case m.Certificate():
            return _certificate(message, event.sender, settled)
        case m.CertificateVerify(scheme=scheme, signature=signature):
            text = (
                f"Proof that the {who} holds the key of its certificate: a signature over all that was said so far."
                " A copied certificate without its key ends here."
            )
            facts = (("signature", f"{registry.name_of(registry.SCHEMES, scheme)}, {len(signature)} bytes"),)
            return "CertificateVerify", text, facts
        case m.ServerKeyExchange() | m.ClientKeyExchange():
            return _key_exchange(message, settled)
        case m.Finished():
            text = f"A checksum, under the new keys, of all that was said: the {who} saw the same handshake, unaltered."
            return "Finished", text + _after_finished(event.sender, settled), ()
        case m.AlertMessage():
            return _alert(message, who)
        case _:
            return _others(message, who, settled)


def _client_hello(hello: m.ClientHello, settled: Settled) -> tuple[str, str, Facts]:
    text = "The client says what it can do, and which host it wants."
    if settled.retried:
        text = "The client asks again, with a key share in the group that the server named."
    shares = m.values_of(hello, 51)
    if shares:
        text += " Its key shares come along already: that saves TLS 1.3 a round trip."
    suites = [registry.name_of(registry.SUITES, suite) for suite in hello.suites if not registry.is_grease(suite)]
    names = [e.name for e in hello.extensions if not registry.is_grease(e.number)]
    return (
        "ClientHello",
        text,
        _facts(
            ("host (SNI)", hello.server_name or "none"),
            ("versions", _listed(hello.versions)),
            ("application protocols", _listed(hello.protocols)),
            ("key shares", _listed(shares)),
            ("groups", _listed(m.values_of(hello, 10))),
            ("signatures", _listed(m.values_of(hello, 13))),
            ("cipher suites", _listed(suites)),
            ("extensions", _listed(names)),
        ),
    )


def _server_hello(hello: m.ServerHello, settled: Settled) -> tuple[str, str, Facts]:
    settled.version, settled.suite = hello.version, hello.suite
    share = "".join(m.values_of(hello, 51))
    settled.group = share.partition(" ")[0] or settled.group
    suite = registry.name_of(registry.SUITES, hello.suite)
    version = registry.name_of(registry.VERSIONS, hello.version)
    facts = _facts(("version", version), ("cipher suite", suite), ("key share", share))
    if hello.retry:
        settled.retried = True
        text = "The server wants a key share in another group. It costs a round trip, and nothing else."
        return "HelloRetryRequest", text, facts
    if settled.new:
        text = (
            "The server chooses. Each side now makes the same secret out of its own key and the other's share; all"
            " that follows is encrypted. TLS 1.3 sends no premaster secret: a certificate's key signs, and never"
            " carries the secret, so that a key stolen later opens no recording."
        )
    else:
        text = (
            "The server chooses. In TLS 1.2 what follows, certificates and names included, can be read on the way"
            " until both sides have changed to the new keys."
        )
    return "ServerHello", text, facts


def _request(request: m.CertificateRequest) -> tuple[str, str, Facts]:
    text = "Here mutual TLS begins: the server asks the client for a certificate."
    if request.authorities:
        text += " It names the authorities that it accepts; clients choose by them."
    else:
        text += " It does not say of which authorities."
    schemes = [registry.name_of(registry.SCHEMES, scheme) for scheme in request.schemes]
    types = [registry.name_of(registry.CERTIFICATE_TYPES, kind) for kind in request.types]
    return (
        "CertificateRequest",
        text,
        _facts(
            ("accepted authorities", _listed(map(render_name, request.authorities), "; ")),
            ("signatures", _listed(schemes)),
            ("certificate types", _listed(types)),
        ),
    )


def _certificate(certificate: m.Certificate, sender: Side, settled: Settled) -> tuple[str, str, Facts]:
    count = len(certificate.entries)
    if sender is Side.SERVER:
        text = "The server says who it is. The client checks the chain below against the authorities it trusts."
    elif count:
        text = "The client says who it is, which plain TLS does not ask. The server checks the chain below."
    else:
        text = "The client was asked for a certificate and has none to show."
    if count and not settled.new:
        text += " In TLS 1.2 anyone on the way can read it."
    return "Certificate", text, _facts(("certificates", str(count)))


def _key_exchange(message: m.ServerKeyExchange | m.ClientKeyExchange, settled: Settled) -> tuple[str, str, Facts]:
    if isinstance(message, m.ServerKeyExchange):
        group = "finite-field Diffie-Hellman"
        if message.group is not None:
            group = registry.name_of(registry.GROUPS, message.group)
        settled.group = group
        scheme = "" if message.scheme is None else registry.name_of(registry.SCHEMES, message.scheme)
        text = "The server's half of the key agreement, signed with the key of its certificate."
        return "ServerKeyExchange", text, _facts(("group", group), ("signature", scheme))
    if registry.SUITES.get(settled.suite, "").startswith("TLS_RSA_"):
        settled.group = "RSA key transport"
        text = (
            "The client made up the premaster secret and sends it encrypted to the server's certificate. Whoever gets"
            " that key, even years later, can read the recording. TLS 1.3 has done away with this."
        )
    else:
        text = (
            "The client's half of the key agreement. Both sides make the premaster secret from the two halves, and"
            " all keys from that; it is never sent. TLS 1.3 does the same one round trip earlier, in the hellos."
        )
    return "ClientKeyExchange", text, _facts(("length", f"{message.size} bytes"))


def _after_finished(sender: Side, settled: Settled) -> str:
    if sender is Side.CLIENT and settled.new and settled.asked:
        return " The client now believes itself connected; a TLS 1.3 server that refuses it says so only after this."
    return ""


def _alert(alert: m.AlertMessage, who: str) -> tuple[str, str, Facts]:
    known = alert_of(alert.number)
    text = f"The {who} says: {known.meaning}." if known else f"The {who} sent an alert without a name."
    fatal = "it ends the connection" if alert.fatal else "a notice"
    return f"Alert: {alert.name}", text, (("number", f"{alert.number}, {fatal}"),)


def _others(message: m.Message, who: str, settled: Settled) -> tuple[str, str, Facts]:
    match message:
        case m.NewSessionTicket(lifetime=lifetime):
            text = (
                "The server takes the client for connected, and gives a ticket to resume with. A resumed session"
                " skips the certificates; handfast's guards honour none."
            )
            return "NewSessionTicket", text, (("lifetime", f"{lifetime} s"),)
        case m.ChangeCipherSpec():
            if settled.new or not settled.version:
                return "ChangeCipherSpec", "Means nothing in TLS 1.3; it is there for old middleboxes.", ()
            return "ChangeCipherSpec", f"From here on the {who} encrypts.", ()
        case m.ApplicationData():
            return "application data", "What TLS is for; encrypted.", ()
        case m.KeyUpdate(requested=requested):
            more = " and asks the other side for the same" if requested else ""
            return "KeyUpdate", f"The {who} takes fresh keys{more}.", ()
        case m.CertificateStatus():
            return "CertificateStatus", "A stapled OCSP answer: the certificate was not revoked when it was made.", ()
        case m.CompressedCertificate(unpacked=unpacked):
            text = f"The {who}'s certificates, compressed (RFC 8879)."
            return "CompressedCertificate", text, (("unpacked", f"{unpacked} bytes"),)
        case m.Sealed(handshake=True):
            return "encrypted message", f"In TLS 1.2, what comes here is the {who}'s Finished.", ()
        case m.Sealed():
            return "encrypted alert", "An alert, which only the key log opens.", ()
        case m.Bare(name=name):
            return name, _BARE.get(name, "A message that is not known here."), ()
        case m.Unreadable(name=name, detail=detail):
            return name, f"This message cannot be read: {detail}.", ()
    return "message", "", ()


_BARE = {
    "ServerHelloDone": "The server has said its part; it is the client's turn.",
    "HelloRequest": "The server asks for another handshake.",
    "EndOfEarlyData": "The client's early data ends here.",
}


def _facts(*facts: tuple[str, str]) -> Facts:
    return tuple((key, value) for key, value in facts if value)


def _listed(values: Iterable[str], between: str = ", ") -> str:
    found = list(values)
    more = len(found) - _MOST_SHOWN
    return between.join(found[:_MOST_SHOWN]) + (f"{between}and {more} more" if more > 0 else "")
