"""Servers that show certificates which nobody can read: called where the rest is good, refused in words where not."""

from __future__ import annotations

import pytest

from tests.connector.kit import Calling, everything, generation
from tests.support.certs import Ca
from tests.support.odd import answering, serving, unreadable


def test_one_odd_certificate_besides_does_no_harm(ca: Ca) -> None:
    """A server that proves who it is, and shows an unreadable certificate besides, is called as any other."""
    context = serving(ca.server(), unreadable(Ca.root("Other").certificate))
    with answering(context) as address, Calling(address, generation(ca, ca.client())) as calling:
        assert calling.ask(b"x") == b"x"
        assert calling.events.next("offered")["server"] == "dns:localhost"
        assert calling.of("refused") == []


def test_a_server_whose_own_cannot_be_read_is_not_trusted(ca: Ca) -> None:
    """The negative twin: an unreadable leaf proves nothing, and the event says what is wrong with it."""
    leaf = ca.server()
    context = serving(leaf, shown=unreadable(leaf.certificate))
    with answering(context) as address, Calling(address, generation(ca, ca.client())) as calling:
        with calling.open() as plug:
            plug.sendall(b"x\n")
            with pytest.raises(ConnectionResetError):
                everything(plug)
        event = calling.events.next("refused")
        assert (event["reason"], event["cause"]) == ("connect.untrusted", "verify.malformed")
        assert "cannot be read" in event["detail"]


def test_a_bug_at_the_end_of_a_handshake_is_told_as_one(ca: Ca, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in us is no fault of the server's; without it the same server is called."""

    def explode(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    with answering(serving(ca.server())) as address, Calling(address, generation(ca, ca.client())) as calling:
        with monkeypatch.context() as broken:
            broken.setattr("handfast.tls.client.server_facts", explode)
            with calling.open() as plug, pytest.raises(ConnectionResetError):
                everything(plug)
            event = calling.events.next("closed")
            assert (event["how"], event["reason"]) == ("bug", "bug")
        assert calling.ask(b"x") == b"x"
        assert calling.of("refused") == []
