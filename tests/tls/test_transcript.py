"""Watched handshakes: what the engine's callbacks tell, on both sides, and that it is bounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from handfast.pki import Purpose, Terms, TrustBundle
from handfast.tls import transcript
from handfast.tls.channel import TlsBroken
from handfast.tls.credential import Credential
from handfast.tls.server import Accepted, Refused, ServerContext, ServerSettings
from handfast.tls.transcript import Offer, Recorder, WatchedClient, WatchedServer
from handfast.wire import messages as m
from handfast.wire.records import Event, Side
from tests.support.certs import Ca, Leaf

ROOT = Ca.root()
SERVER, CLIENT = ROOT.server(), ROOT.client()


def _clock() -> Callable[[], float]:
    ticks = iter(range(1_000_000))
    return lambda: float(next(ticks))


def _shake(leaf: Leaf | None, *, only_tls12: bool = False) -> tuple[Recorder, Recorder, Accepted | Refused]:
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.CLIENT)
    context = ServerContext(Credential(SERVER.key, SERVER.presented), terms, ServerSettings(allow_tls12=only_tls12))
    credential = None if leaf is None else Credential(leaf.key, leaf.presented)
    client = WatchedClient(Offer("localhost", credential, ("http/1.1",), only_tls12), _clock())
    server, outcome, channel, records = WatchedServer(context, _clock()), None, None, b""
    while outcome is None:
        channel = channel or client.feed(records)
        outcome = server.feed(client.take())
        records = server.take()
    if channel is None:
        channel = client.feed(records)
        records = b""
    assert channel is not None
    channel.feed(records)
    channel.read()
    return client.recorder, server.recorder, outcome


def _handshake(recorder: Recorder) -> list[tuple[Side, bytes]]:
    return [(event.sender, event.data) for event in recorder.events if event.kind == 22]


@pytest.mark.parametrize("only_tls12", [False, True])
def test_both_sides_see_the_same_messages_in_the_clear(only_tls12: bool) -> None:
    """Client and server tell the same handshake, message by message, encrypted or not."""
    client, server, outcome = _shake(CLIENT, only_tls12=only_tls12)
    assert isinstance(outcome, Accepted)
    names = [type(message).__name__ for _, message in m.read_events(tuple(client.events))]
    assert {"ClientHello", "ServerHello", "CertificateRequest", "CertificateVerify", "Finished"} <= set(names)
    assert "Unreadable" not in names
    assert [data for side, data in _handshake(client) if side is Side.CLIENT] == [
        data for side, data in _handshake(server) if side is Side.CLIENT
    ]
    theirs = [data for side, data in _handshake(server) if side is Side.SERVER]
    assert [data for side, data in _handshake(client) if side is Side.SERVER] == theirs
    assert [event.at for event in client.events] == sorted(event.at for event in client.events)


@pytest.mark.parametrize(("only_tls12", "open_ones"), [(False, {1, 2}), (True, {1, 2, 11, 12, 13, 14, 15, 16})])
def test_it_is_told_what_crossed_encrypted(only_tls12: bool, open_ones: set[int]) -> None:
    """In TLS 1.3 only the hellos are in the clear; in TLS 1.2 all but what follows ChangeCipherSpec is."""
    for recorder in _shake(CLIENT, only_tls12=only_tls12)[:2]:
        clear = {event.data[0] for event in recorder.events if event.kind == 22 and not event.encrypted}
        sealed = {event.data[0] for event in recorder.events if event.kind == 22 and event.encrypted}
        assert clear == open_ones
        assert 20 in sealed  # Finished


def test_a_client_without_certificate_is_seen_to_show_none() -> None:
    """The negative twin: the same handshake without a certificate has an empty one and no proof."""
    client, _, outcome = _shake(None)
    assert isinstance(outcome, Refused)
    shown = [message for event, message in m.read_events(tuple(client.events)) if event.sender is Side.CLIENT]
    assert m.Certificate(b"", ()) in shown
    assert not any(isinstance(message, m.CertificateVerify) for message in shown)


def test_the_key_log_has_both_sides_the_same_secrets() -> None:
    """Both engines write the same traffic secrets, in NSS's format; TLS 1.2 has one line, of the master secret."""
    client, server, _ = _shake(CLIENT)
    assert sorted(client.keylog) == sorted(server.keylog)
    labels = {line.split()[0] for line in client.keylog}
    assert {b"CLIENT_HANDSHAKE_TRAFFIC_SECRET", b"SERVER_TRAFFIC_SECRET_0"} <= labels
    assert {line.split()[0] for line in _shake(CLIENT, only_tls12=True)[0].keylog} == {b"CLIENT_RANDOM"}


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that says more than is kept is marked as full, and goes on."""
    monkeypatch.setattr(transcript, "MAX_EVENTS", 3)
    client, _, outcome = _shake(CLIENT)
    assert isinstance(outcome, Accepted)
    assert client.full
    assert len(client.events) == 3
    monkeypatch.setattr(transcript, "MAX_HANDSHAKE", 1000)
    assert sum(len(event.data) for event in _shake(CLIENT)[1].events) <= 1000


def test_an_alert_is_told_with_its_number() -> None:
    """What a side says in an alert is told, whichever side it was."""
    client = WatchedClient(Offer("localhost", None), _clock())
    client.feed(b"")
    client.take()
    with pytest.raises(TlsBroken):
        client.feed(b"\x15\x03\x03\x00\x02\x02\x28")
    assert client.recorder.events[-1] == Event(client.recorder.events[-1].at, Side.SERVER, 21, b"\x02\x28", False, 2)
