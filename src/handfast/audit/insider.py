"""What all attacks of an insider begin with: a good client, who gets in, beside whom the bad one is judged.

An insider has an authority's key, or at least one accepted client's. Where the good client does not get in, a
refusal of the bad one shows nothing, and the check is inconclusive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from cryptography import x509

from handfast.audit.model import Evidence, Need, Outcome, failed, not_applicable, passed, unclear
from handfast.audit.oracle import Reach, Reply, must_be_refused, reach, worst
from handfast.audit.runner import Audit
from handfast.audit.wires import Wire, answer, ask, call, shake_hands
from handfast.errors import Unreachable
from handfast.testing import TestAuthority, TestLeaf
from handfast.tls.probe import Offer, Probe

_AT_ONCE = 3  # attacks beside a good client
_SLOWER, _SLOW = 10.0, 1.0  # a good client may wait so many times as long, and this many seconds anyway
_USUAL = ("spiffe://audit/web",)  # who an insider says to be where no accepted client is known
Bad = tuple[str, TestLeaf]  # what is sent, in words, and the leaf


@dataclass(frozen=True, slots=True)
class Inside:
    """A good client's leaf, its names, and what it got: the measure of whatever a bad one gets."""

    audit: Audit
    client: TestLeaf
    names: tuple[str, ...]
    control: Reply

    @property
    def authority(self) -> TestAuthority:
        """The authority of the insider; only where Need.AUTHORITY is stated."""
        authority = self.audit.means.authority
        assert authority is not None
        return authority

    @property
    def http(self) -> bool:
        """Whether the good client was answered in HTTP."""
        return self.control.status is not None

    def judge(self, said: str, reply: Reply) -> Outcome:
        """The outcome of what must not reach the application."""
        return must_be_refused(said, reply, self.control)

    def gets_in(self, leaf: TestLeaf, *, tls12: bool = False) -> bool:
        """Whether this leaf reaches the application."""
        return reach(self.audit.call(leaf, tls12=tls12), self.control)[0] is Reach.YES

    def all_refused(self, bad: Sequence[Bad]) -> Outcome:
        """Show each leaf, in every version that the server speaks, after the good one in the same version."""
        tries = []
        for old in versions(self.audit):
            if not self.gets_in(self.client, tls12=old):
                tries.append(unclear(f"TLS 1.{3 - old}: the good client does not get in, so nothing is shown"))
                continue
            for said, leaf in bad:
                tries.append(self.judge(f"TLS 1.{3 - old}: {said}", self.audit.call(leaf, tls12=old)))
        return worst(tries)


def by_authority(attack: Callable[[Inside], Outcome]) -> Callable[[Audit], Outcome]:
    """A check's function from one that has a good client by the authority. The check needs Need.AUTHORITY."""

    def run(audit: Audit) -> Outcome:
        authority = audit.means.authority
        assert authority is not None  # it is needed
        names = names_of(audit.means.credential)
        return _entered(audit, authority.client(*names), names, attack)

    return run


def by_client(attack: Callable[[Inside], Outcome]) -> Callable[[Audit], Outcome]:
    """The same with the accepted client, or one by the authority. The check needs Need.INSIDER."""

    def run(audit: Audit) -> Outcome:
        authority, credential = audit.means.authority, audit.means.credential
        names = names_of(credential)
        if credential is not None:
            return _entered(audit, credential, names, attack)
        if authority is None:
            return not_applicable(Need.INSIDER.value)
        return _entered(audit, authority.client(*names), names, attack)

    return run


def _entered(audit: Audit, client: TestLeaf, names: tuple[str, ...], attack: Callable[[Inside], Outcome]) -> Outcome:
    control = audit.call(client, tls12=not audit.look.tls13 and audit.look.tls12)
    reached, why = reach(control, audit.baseline)
    if reached is not Reach.YES:
        return unclear(f"a good certificate does not get in ({why}), so nothing would be shown by a bad one")
    return attack(Inside(audit, client, names, control))


def names_of(credential: TestLeaf | None) -> tuple[str, ...]:
    """The names of an accepted client, as text; a usual one where none can be read."""
    if credential is None:
        return _USUAL
    try:
        found = credential.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return _USUAL
    kinds = (x509.DNSName, x509.UniformResourceIdentifier, x509.IPAddress, x509.RFC822Name)
    return tuple(str(name.value) for name in found if isinstance(name, kinds)) or _USUAL


def versions(audit: Audit) -> list[bool]:
    """The versions to try, each as whether it is TLS 1.2."""
    return [old for old, spoken in ((False, audit.look.tls13), (True, audit.look.tls12)) if spoken] or [False]


def request_to(audit: Audit, path: str, *headers: str, host: str | None = None, body: str = "") -> bytes:
    """An HTTP/1.1 request that leaves the connection open. `headers`: whole lines; a `body` makes it a POST."""
    named = audit.target.sni or str(audit.target)
    lines = (f"{'POST' if body else 'GET'} {path} HTTP/1.1", f"Host: {named if host is None else host}", *headers)
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode("latin-1")


@dataclass(slots=True)
class Talk:
    """A connection that stays open for several requests."""

    wire: Wire
    probe: Probe

    def ask(self, request: bytes) -> Reply:
        """Send one request and read its answer."""
        return ask(self.wire, self.probe, request)

    def more(self) -> Reply:
        """What comes without a request."""
        return answer(self.wire, self.probe)


@contextmanager
def talking(audit: Audit, offer: Offer, seconds: float | None = None) -> Iterator[Talk]:
    """Shake hands and keep the connection. Raises ProbeRefused, Silence, OSError, Unreachable."""
    with audit.connect(seconds) as wire:
        probe = Probe(offer)
        shake_hands(wire, probe)
        yield Talk(wire, probe)


def meanwhile(inside: Inside, said: str, attacks: Sequence[Callable[[], object]]) -> Outcome:
    """Whether a good client is answered while the attacks are made, a few at a time.

    What counts is its usual wait, so that one slow answer, of this machine's perhaps, accuses nobody.
    """
    before = [took(inside) for _ in range(3)]
    if None in before:
        return unclear("the good client got no answer before the attack")
    usual = median(one for one in before if one is not None)
    during: list[float | None] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = [pool.submit(attack) for attack in attacks]
        try:
            while not during or not all(one.done() for one in running):
                during.append(took(inside))
                if during[-2:] == [None, None]:
                    return failed("a good client got no answer meanwhile", Evidence.of(said, "twice no answer"))
        finally:
            for one in running:
                one.cancel()
    waits = [one for one in during if one is not None]
    if not waits:
        return failed("a good client got no answer meanwhile", Evidence.of(said, "no answer"))
    wait = median(waits)
    got = f"{len(during)} good clients: median {wait:.2f} s, at most {max(waits):.2f} s; {usual:.2f} s before"
    if wait > max(usual * _SLOWER, _SLOW):
        return failed(f"a good client had to wait {wait:.1f} s, as a rule", Evidence.of(said, got))
    return passed("good clients were answered meanwhile", Evidence.of(said, got))


def took(inside: Inside) -> float | None:
    """Seconds from a good client's connection to its answer; None where it gets none. Raises Silence.

    The wait for a turn of ours is left out.
    """
    audit = inside.audit
    try:
        with audit.connect() as wire:
            began = time.monotonic()
            reply, _ = call(wire, audit.offer(inside.client, tls12=versions(audit)[0]), audit.request)
            waited = time.monotonic() - began
    except Unreachable:
        return None
    return waited if reach(reply, inside.control)[0] is Reach.YES else None
