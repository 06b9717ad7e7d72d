"""Calling and looking at servers that show odd things: nothing of that is a bug of ours, and none of it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from handfast.errors import Reason, VerificationFailed
from handfast.pki.names import parse_name
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.client import ClientContext, ClientHandshake, ClientSettings, ServerFacts, VerifyingHandshake
from handfast.tls.engine import step, take
from handfast.tls.probe import Offer, Probe
from tests.support.certs import Ca
from tests.support.odd import serving, unreadable, unreadable_name

ROOT = Ca.root()
LEAF = ROOT.server()
OTHER = Ca.root("Other").certificate


def _verifying() -> VerifyingHandshake:
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.SERVER, parse_name("localhost"))
    return ClientContext(None, terms, ClientSettings("localhost")).connect(lambda: datetime.now(UTC))


def _shake(context: SSL.Context, feed: Callable[[bytes], object], sent: Callable[[], bytes]) -> None:
    """Run a handshake in memory until the client's side of it is done."""
    server, records = SSL.Connection(context, None), b""
    server.set_accept_state()
    while not feed(records):
        step(server, sent())
        records = take(server)


def _called(context: SSL.Context) -> ServerFacts:
    client = _verifying()
    _shake(context, client.feed, client.take)
    return client.facts


def _looked_at(context: SSL.Context) -> ServerFacts:
    client = ClientHandshake("localhost")
    _shake(context, client.feed, client.take)
    return client.facts


def _probed(context: SSL.Context) -> ServerFacts:
    client = Probe(Offer("localhost"))
    _shake(context, _feeding(client), client.take)
    return client.facts


def _feeding(probe: Probe) -> Callable[[bytes], bool]:
    def feed(records: bytes) -> bool:
        probe.feed(records)
        return probe.done

    return feed


LOOKS = pytest.mark.parametrize("look", [_called, _looked_at, _probed])


@LOOKS
def test_a_further_certificate_that_cannot_be_read_is_left_out(look: Callable[[SSL.Context], ServerFacts]) -> None:
    """A good server that shows one odd certificate besides is as good as without; a readable one is there."""
    odd = look(serving(LEAF, unreadable(OTHER), OTHER.public_bytes(Encoding.DER)))
    assert (odd.chain, odd.unread, odd.version) == ((LEAF.certificate, OTHER), 1, "TLSv1.3")
    good = look(serving(LEAF, OTHER.public_bytes(Encoding.DER)))
    assert (good.chain, good.unread) == ((LEAF.certificate, OTHER), 0)


@pytest.mark.parametrize("look", [_looked_at, _probed])
def test_without_a_readable_leaf_there_is_no_chain(look: Callable[[SSL.Context], ServerFacts]) -> None:
    """Where the leaf cannot be read, no other certificate takes its place."""
    facts = look(serving(LEAF, OTHER.public_bytes(Encoding.DER), shown=unreadable(LEAF.certificate)))
    assert (facts.chain, facts.unread) == ((), 2)


def test_a_server_whose_certificate_cannot_be_read_is_refused_as_that() -> None:
    """It is not said to have shown none; a stranger that can be read is refused for its issuer."""
    for context, reason in (
        (serving(LEAF, shown=unreadable(LEAF.certificate)), Reason.VERIFY_MALFORMED),
        (serving(Ca.root("Stranger").server()), Reason.VERIFY_UNKNOWN_ISSUER),
    ):
        client = _verifying()
        with pytest.raises(VerificationFailed) as refused:
            _shake(context, client.feed, client.take)
        assert refused.value.reason is reason
        assert client.peer is None


@LOOKS
def test_an_authority_whose_name_cannot_be_read_is_told_in_der(look: Callable[[SSL.Context], ServerFacts]) -> None:
    """A server may accept authorities by names that break their type; those that can be read are told as names."""
    accepts = (unreadable_name(OTHER), ROOT.certificate.public_bytes(Encoding.DER))
    odd, good = look(serving(LEAF, accepts=accepts)).accepted_authorities
    assert (odd[:3], bytes.fromhex(odd[1:]).endswith(b"@" * 5), good) == ("#30", True, "CN=Test Root")


def test_a_probe_leaves_out_the_names_that_it_cannot_read() -> None:
    """As names, only those can be had that are."""
    client = Probe(Offer("localhost"))
    accepts = (unreadable_name(OTHER), ROOT.certificate.public_bytes(Encoding.DER))
    _shake(serving(LEAF, accepts=accepts), _feeding(client), client.take)
    assert client.accepted_authorities == (ROOT.certificate.subject,)
