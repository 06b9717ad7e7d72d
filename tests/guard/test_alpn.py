"""The application protocol is agreed on in the handshake, or there is none (RFC 7301 3.2)."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest

from tests.support.apps import App, client_context
from tests.support.certs import Ca
from tests.support.guards import Running


def _agree(guard: Running, folder: Path, named: list[str], *, tls13: bool = True) -> str | None:
    """What is agreed on with a client that names these. Raises ssl.SSLError."""
    context = client_context(guard.ca.save(folder, "ca"), guard.ca.client(), folder)
    if not tls13:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if named:
        context.set_alpn_protocols(named)
    host, _, port = guard.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        return tls.selected_alpn_protocol()


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("tls13", [False, True])
def test_a_client_that_names_none_of_our_protocols_is_refused(ca: Ca, tmp_path: Path, tcp: bool, tls13: bool) -> None:
    """It gets the alert no_application_protocol and the log says so; one that names ours, or none, is let in."""
    with App() as app:
        target = f"tcp://{app.address}" if tcp else app.address
        spoken = "postgresql" if tcp else "http/1.1"
        with Running(ca, target, alpn=(b"postgresql",), tls12=True) as guard:
            for named in (["ftp"], ["smtp", "ftp"]):
                with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
                    _agree(guard, tmp_path, named, tls13=tls13)
                event = guard.events.next("connection")
                assert (event["decision"], event["reason"]) == ("deny", "tls.no_common")
                assert "ALPN" in event["detail"]
            assert _agree(guard, tmp_path, ["ftp", spoken], tls13=tls13) == spoken
            assert guard.events.next("connection")["decision"] != "deny"
            assert _agree(guard, tmp_path, [], tls13=tls13) is None
            assert guard.events.next("connection")["decision"] != "deny"
