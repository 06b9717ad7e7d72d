"""The client's side of a handshake that verifies: who is accepted, who is not, and what the server gets to see."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from handfast.connector.call import Generation
from handfast.errors import InvalidInput, Reason, VerificationFailed
from handfast.pki import Purpose, Terms, TrustBundle
from handfast.tls.client import ClientContext, ClientSettings, server_name_of
from handfast.tls.credential import Credential
from handfast.tls.server import Accepted, Refused, ServerContext, ServerSettings
from tests.connector.kit import generation
from tests.support.certs import CLIENT, Ca, Leaf

ROOT = Ca.root()
WEB = ROOT.client()


def shake(made: Generation, server: Leaf) -> tuple[str, Accepted | Refused | None]:
    """A handshake in memory: who the server proved to be, and what it made of us."""
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.CLIENT)
    context = ServerContext(Credential(server.key, server.presented), terms, ServerSettings())
    ours, theirs = made.context.connect(lambda: datetime.now(UTC)), context.accept(lambda: datetime.now(UTC))
    channel, outcome, records = None, None, b""
    while outcome is None:
        channel = channel or ours.feed(records)
        outcome = theirs.feed(ours.take())
        records = theirs.take()
    assert channel is not None
    assert ours.peer is not None
    return str(ours.peer.identity), outcome


@pytest.mark.parametrize(
    ("names", "asked", "expect"),
    [
        (("localhost",), "localhost", None),
        (("*.corp.internal",), "api.corp.internal", None),
        (("10.0.0.7",), "10.0.0.7", None),
        (("localhost", "spiffe://test/api"), None, "spiffe://test/api"),
        (("spiffe://test/api",), "other.host", "spiffe://test/*"),
    ],
)
def test_the_right_server_is_accepted(names: tuple[str, ...], asked: str | None, expect: str | None) -> None:
    """A server is known by its host name or address, or by the identity that it is expected to have."""
    _, outcome = shake(generation(ROOT, WEB, name=asked, expect=expect), ROOT.server(*names))
    assert isinstance(outcome, Accepted)
    assert outcome.peer is not None
    assert str(outcome.peer.identity) == "spiffe://test/web"


YESTERDAY = datetime.now(UTC) - timedelta(days=1)
SUB = ROOT.sub()


@pytest.mark.parametrize(
    ("server", "expect", "reason"),
    [
        (ROOT.server("api.internal"), None, Reason.VERIFY_NAME_MISMATCH),
        (ROOT.server("*.internal"), None, Reason.VERIFY_NAME_MISMATCH),
        (ROOT.leaf("spiffe://test/db", eku=None), "spiffe://test/db", Reason.VERIFY_NO_EKU),
        (ROOT.server("localhost", "spiffe://test/db"), "spiffe://test/api", Reason.VERIFY_NAME_MISMATCH),
        (Ca.root("Other").server(), None, Reason.VERIFY_UNKNOWN_ISSUER),
        (Ca.root("Test Root").server(), None, Reason.VERIFY_BAD_SIGNATURE),
        (ROOT.server(not_before=YESTERDAY - timedelta(days=1), not_after=YESTERDAY), None, Reason.VERIFY_EXPIRED),
        (ROOT.server(not_before=datetime.now(UTC) + timedelta(days=1),
                     not_after=datetime.now(UTC) + timedelta(days=2)), None, Reason.VERIFY_NOT_YET_VALID),
        (ROOT.server(eku=[CLIENT]), None, Reason.VERIFY_PURPOSE),
        (Leaf(SUB.server().certificate, None), None, Reason.VERIFY_UNKNOWN_ISSUER),
    ],
)  # fmt: skip
def test_another_server_is_refused_before_it_sees_our_certificate(
    server: Leaf, expect: str | None, reason: Reason
) -> None:
    """Each way of not being the server that is meant is refused for its own reason, and the server is told nothing
    of us but an alert.
    """
    if server.key is None:  # the chain without its intermediate
        whole = SUB.server()
        server = Leaf(whole.certificate, whole.key)
    made = generation(ROOT, WEB, expect=expect)
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.CLIENT)
    context = ServerContext(Credential(server.key, server.presented), terms, ServerSettings())
    ours, theirs = made.context.connect(lambda: datetime.now(UTC)), context.accept(lambda: datetime.now(UTC))
    assert ours.feed(b"") is None
    theirs.feed(ours.take())
    with pytest.raises(VerificationFailed) as refused:
        ours.feed(theirs.take())
    assert refused.value.reason is reason
    assert ours.peer is None
    outcome = theirs.feed(ours.take())
    assert isinstance(outcome, Refused)
    assert outcome.presented == ()
    assert outcome.failures[0].reason is Reason.TLS_ALERT


def _broken() -> datetime:
    raise RuntimeError("a bug")


def test_a_bug_while_the_server_is_judged_refuses_it() -> None:
    """An exception of ours within OpenSSL's call fails the handshake (CVE-2026-27448) and comes out as itself; a
    server that would have been accepted gets an alert and sees nothing of us.
    """
    server = ROOT.server()
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.CLIENT)
    context = ServerContext(Credential(server.key, server.presented), terms, ServerSettings())
    ours, theirs = generation(ROOT, WEB).context.connect(_broken), context.accept(lambda: datetime.now(UTC))
    assert ours.feed(b"") is None
    theirs.feed(ours.take())
    with pytest.raises(RuntimeError, match="a bug"):
        ours.feed(theirs.take())
    assert ours.peer is None
    outcome = theirs.feed(ours.take())
    assert isinstance(outcome, Refused)
    assert outcome.presented == ()
    assert outcome.failures[0].reason is Reason.TLS_ALERT
    with pytest.raises(RuntimeError):  # nor does it go on later
        ours.feed(b"")


def test_a_caller_without_anyone_to_trust_or_to_expect_is_not_made() -> None:
    """No bundle, or nothing that says which server is meant, is refused: a chain alone would let anyone pass."""
    credential = Credential(WEB.key, WEB.presented)
    with pytest.raises(InvalidInput) as empty:
        ClientContext(credential, Terms(TrustBundle(()), Purpose.SERVER), ClientSettings())
    assert empty.value.reason is Reason.INPUT_EMPTY
    with pytest.raises(InvalidInput) as nameless:
        ClientContext(credential, Terms(TrustBundle((ROOT.certificate,)), Purpose.SERVER), ClientSettings())
    assert nameless.value.reason is Reason.INPUT_NAME


@pytest.mark.parametrize(
    ("host", "sni"), [("API.internal.", "api.internal"), ("10.0.0.7", None), ("::1", None), ("localhost", "localhost")]
)
def test_an_address_sends_no_server_name(host: str, sni: str | None) -> None:
    """RFC 6066 3: the SNI is a host name, never an address."""
    assert server_name_of(host) == sni
