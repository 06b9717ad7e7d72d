"""Handshakes in memory: outcomes, channels, and what breaks them."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL

from handfast.errors import Failure, InvalidInput, Reason
from handfast.pki import Purpose, Terms, TrustBundle
from handfast.tls.channel import Channel, TlsBroken
from handfast.tls.client import ClientHandshake
from handfast.tls.credential import Credential
from handfast.tls.engine import engine_version
from handfast.tls.probe import Offer, Probe, ProbeRefused
from handfast.tls.reasons import handshake_failure
from handfast.tls.server import Accepted, Refused, ServerContext, ServerHandshake, ServerSettings
from tests.support.certs import DAY, Ca, Leaf

ROOT = Ca.root()
_SERVERS, _CLIENTS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ROOT.server()


def _context(**settings: Any) -> ServerContext:
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.CLIENT)
    return ServerContext(Credential(SERVER.key, SERVER.presented), terms, ServerSettings(**settings))


def _now() -> datetime:
    return datetime.now(UTC)


def _shake(context: ServerContext, leaf: Leaf | None, *, cut: int = 1 << 20) -> tuple[Accepted | Refused, Channel]:
    """Run a handshake in memory, in pieces of `cut` bytes; return both ends."""
    credential = None if leaf is None else Credential(leaf.key, leaf.presented)
    client, server = ClientHandshake("localhost", credential), context.accept(_now)
    outcome, channel, records = None, None, b""
    while outcome is None:
        channel = channel or client.feed(records)
        sent = client.take()
        for at in range(0, len(sent), cut):
            outcome = server.feed(sent[at : at + cut]) or outcome
        records = server.take()
    assert channel is not None
    channel.feed(records)
    return outcome, channel


@pytest.mark.parametrize("cut", [1 << 20, 1, 7])
def test_a_good_client_is_accepted_however_its_bytes_come(cut: int) -> None:
    """A handshake in one piece, byte by byte, or in odd pieces has the same outcome."""
    outcome, _ = _shake(_context(), ROOT.client(), cut=cut)
    assert isinstance(outcome, Accepted)
    assert outcome.peer is not None
    assert str(outcome.peer.identity) == "spiffe://test/web"
    assert (outcome.facts.version, outcome.facts.server_name) == ("TLSv1.3", "localhost")


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        (None, Reason.VERIFY_NO_CERTIFICATE),
        (Ca.root("Other").client(), Reason.VERIFY_UNKNOWN_ISSUER),
        (ROOT.client(eku=None), Reason.VERIFY_NO_EKU),
    ],
)
def test_a_refused_client_is_no_peer_but_can_be_told(leaf: Leaf | None, reason: Reason) -> None:
    """A refusal carries its reason and, after a finished handshake, a channel to say it on; no peer."""
    outcome, client = _shake(_context(), leaf)
    assert isinstance(outcome, Refused)
    assert outcome.failures[0].reason is reason
    assert outcome.channel is not None
    outcome.channel.write(b"no")
    client.feed(outcome.channel.take())
    assert client.read() == b"no"


def _pair() -> tuple[Channel, Channel]:
    outcome, client = _shake(_context(), ROOT.client())
    assert isinstance(outcome, Accepted)
    return outcome.channel, client


@pytest.mark.parametrize("size", [1, 16_384, 16_385, 300_000, 1 << 20])
def test_a_channel_carries_any_size_both_ways(size: int) -> None:
    """What is written on one side is read on the other, whole."""
    server, client = _pair()
    body = bytes(index % 251 for index in range(size))
    for here, there in ((server, client), (client, server)):
        here.write(body)
        there.feed(here.take())
        got = b""
        while piece := there.read():
            got += piece
        assert got == body


def test_two_channels_do_not_share_bytes() -> None:
    """The buffer that all channels read through carries nothing from one to another."""
    (first, first_client), (second, second_client) = _pair(), _pair()
    first_client.write(b"first secret, rather long")
    second_client.write(b"2nd")
    first.feed(first_client.take())
    second.feed(second_client.take())
    assert first.read() == b"first secret, rather long"
    assert second.read() == b"2nd"
    assert first.read() == second.read() == b""


def test_an_end_is_an_end_and_a_cut_is_none() -> None:
    """close_notify ends the stream; its absence does not look like an end."""
    server, client = _pair()
    client.write(b"last")
    client.close()
    server.feed(client.take())
    assert server.read() == b"last"
    assert server.read() == b""
    assert server.at_eof
    other, _ = _pair()
    assert other.read() == b""
    assert not other.at_eof


def test_records_that_do_not_decrypt_break_the_channel() -> None:
    """An altered record is an error and stays one; it never looks like an end."""
    server, client = _pair()
    client.write(b"hello")
    record = bytearray(client.take())
    record[-1] ^= 1
    server.feed(bytes(record))
    for _ in range(2):
        with pytest.raises(TlsBroken):
            server.read()
    assert not server.at_eof


def test_an_error_that_another_left_behind_is_not_ours() -> None:
    """Something in OpenSSL's error queue of this thread does not break a good channel."""
    server, client = _pair()
    client.write(b"hello")
    server.feed(client.take())
    lib = SSL._lib  # type: ignore[attr-defined]  # there is no public way to leave an error behind
    nothing = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    assert lib.SSL_write(nothing._ssl, b"x", 1) <= 0
    assert lib.ERR_peek_error() != 0
    assert server.read() == b"hello"
    assert server.read() == b""


def test_garbage_is_refused_with_a_reason() -> None:
    """Bytes that are no handshake give a refusal without channel or peer."""
    for data in (b"\x16\x03\x01\x00\x05hello", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"GET / HTTP/1.1\r\n\r\n"):
        outcome = _context().accept(_now).feed(data)
        assert isinstance(outcome, Refused)
        assert outcome.channel is None
        assert outcome.failures[0].reason.code.startswith("tls.")


def test_a_key_of_another_certificate_makes_no_context() -> None:
    """A generation that cannot serve is refused when it is made."""
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.CLIENT)
    with pytest.raises(InvalidInput) as refused:
        ServerContext(Credential(ec.generate_private_key(ec.SECP256R1()), SERVER.presented), terms, ServerSettings())
    assert refused.value.reason is Reason.TLS_HANDSHAKE


def _broken() -> datetime:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(("answer_refusals", "told"), [(False, True), (True, False)])
def test_an_exception_while_judging_refuses(answer_refusals: bool, told: bool) -> None:
    """B8: a bug while a good client is judged comes out as itself and makes no peer (CVE-2026-27448); within the
    handshake it fails that as well.
    """
    leaf = ROOT.client()
    client = ClientHandshake("localhost", Credential(leaf.key, leaf.presented))
    server = _context(answer_refusals=answer_refusals).accept(_broken)
    client.feed(b"")
    server.feed(client.take())
    channel = client.feed(server.take())
    assert channel is not None
    with pytest.raises(RuntimeError, match="a bug"):
        server.feed(client.take())
    channel.feed(server.take())
    if told:
        with pytest.raises(TlsBroken) as broken:
            channel.read()
        assert broken.value.failure.reason is Reason.TLS_ALERT


@pytest.mark.parametrize("answer_refusals", [True, False])
def test_the_same_client_is_accepted_without_the_bug(answer_refusals: bool) -> None:
    """The negative twin: wherever it is judged, the same client is a peer."""
    outcome, _ = _shake(_context(answer_refusals=answer_refusals), ROOT.client())
    assert isinstance(outcome, Accepted)
    assert outcome.peer is not None


def test_an_unknown_error_is_still_a_reason() -> None:
    """Whatever OpenSSL says, there is a reason for it."""
    assert handshake_failure(SSL.Error([("SSL routines", "", "something new")])).reason is Reason.TLS_HANDSHAKE
    alert = handshake_failure(SSL.Error([("SSL routines", "", "ssl/tls alert unknown ca")]))
    assert (alert.reason, alert.facts["alert"]) == (Reason.TLS_ALERT, "unknown_ca")
    assert isinstance(handshake_failure(SSL.SysCallError(-1, "Unexpected EOF")), Failure)


def test_the_engine_has_a_name() -> None:
    """The engine says what it is: OpenSSL 3.5 or later, which knows post-quantum groups."""
    words = engine_version().split()
    assert words[0] == "OpenSSL"
    assert tuple(map(int, words[1].split(".")[:2])) >= (3, 5)


@pytest.mark.parametrize("answer_refusals", [False, True])
@pytest.mark.parametrize("usages", [[_SERVERS], [_SERVERS, _CLIENTS], None])
def test_an_authority_for_servers_makes_no_clients(
    answer_refusals: bool, usages: list[x509.ObjectIdentifier] | None
) -> None:
    """What an issuing authority may certify by its extended key usage binds its leaves, in both modes."""
    client = ROOT.sub(eku=usages).client()
    handshake = _context(answer_refusals=answer_refusals).accept(_now)
    ders = tuple(one.public_bytes(Encoding.DER) for one in client.presented)
    outcome = _with(handshake, Probe(Offer("localhost", ders, client.key)))
    if usages == [_SERVERS]:
        assert isinstance(outcome, Refused)
        assert outcome.failures[0].reason is Reason.VERIFY_PURPOSE
    else:
        assert isinstance(outcome, Accepted)


def _with(handshake: ServerHandshake, probe: Probe) -> Accepted | Refused | None:
    """How the handshake with a probe ends."""
    outcome = None
    for _ in range(6):
        probe.feed(handshake.take())
        outcome = handshake.feed(probe.take())
        if outcome is not None:
            break
    return outcome


@pytest.mark.parametrize("answer_refusals", [False, True])
def test_a_strangers_keys_cost_little(answer_refusals: bool) -> None:
    """A chain of nine strangers with exponents of 3,070 bits costs no multiple of one with usual exponents."""
    signer, numbers = rsa.generate_private_key(65537, 3072), random.Random(1)
    key = ec.generate_private_key(ec.SECP256R1())

    def chain(exponent: int | None) -> tuple[bytes, ...]:
        made = []
        for at in range(10):
            modulus = 3 << 3070 | numbers.getrandbits(3070) | 1
            public: Any = key.public_key()
            if at:
                public = rsa.RSAPublicNumbers(
                    exponent or 1 << 3070 | numbers.getrandbits(3070) | 1, modulus
                ).public_key()
            names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"c{at + up}")]) for up in (0, 1)]
            builder = x509.CertificateBuilder(names[1], names[0], public, at + 1, _now() - DAY, _now() + DAY)
            if at:
                builder = builder.add_extension(x509.BasicConstraints(True, None), True)
            made.append(builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.DER))
        return tuple(made)

    def cost(exponent: int | None) -> float:
        presented, spent = chain(exponent), []
        for _ in range(3):
            handshake, probe = _context(answer_refusals=answer_refusals).accept(_now), Probe(Offer("x", presented, key))
            began = time.thread_time()
            with suppress(ProbeRefused):
                outcome = _with(handshake, probe)
                assert isinstance(outcome, Refused)
            spent.append(time.thread_time() - began)
        return min(spent)

    assert cost(None) < 5 * cost(65537)
