"""PROXY headers that we write, read by nginx."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest

from handfast.wire.proxy import Address, Endpoints, TlsFacts, proxy_v2
from tests.support.programs import WAIT, free_port, nginx

V4 = Endpoints(Address("192.0.2.1", 56324), Address("198.51.100.7", 443))
V6 = Endpoints(Address("2001:db8::1", 1), Address("2001:db8::2", 65535))
# nginx before 1.23.3 reads no header of more than 107 bytes.
SHORT = TlsFacts("TLSv1.3", alpn=b"h2", server_name="a.test", verified=True, common_name="web")
BLOCK = """
server {{
    listen 127.0.0.1:{port} proxy_protocol;
    location / {{
        return 200 "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port";
    }}
}}
"""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An nginx that wants a PROXY header, and says what it reads in it."""
    number = free_port()
    with nginx(BLOCK.format(port=number), tmp_path_factory.mktemp("nginx")):
        yield number


def answer(port: int, header: bytes) -> str:
    """What nginx answers to a request behind the header; "" where it closes instead."""
    with socket.create_connection(("127.0.0.1", port), WAIT) as connection:
        connection.sendall(header + b"GET / HTTP/1.0\r\n\r\n")
        said = b""
        try:
            while data := connection.recv(4096):
                said += data
        except ConnectionResetError:
            pass
        return said.decode()


@pytest.mark.parametrize("tls", [None, SHORT])
def test_nginx_reads_our_headers(port: int, tls: TlsFacts | None) -> None:
    """nginx finds both ends, IPv4 and IPv6, with TLVs and without."""
    said = answer(port, proxy_v2(V4, tls))
    assert said.endswith("\r\n\r\n192.0.2.1 56324 198.51.100.7 443"), said
    said = answer(port, proxy_v2(V6, tls))
    assert said.endswith("\r\n\r\n2001:db8::1 1 2001:db8::2 65535"), said


def test_nginx_takes_a_local_header(port: int) -> None:
    """A LOCAL header says nothing of a client, and nginx answers."""
    assert re.search("\r\n\r\n *$", answer(port, proxy_v2(None)))


def test_nginx_refuses_a_request_without_a_header(port: int) -> None:
    """Without the header nginx answers nothing, so the header above was what it read."""
    assert answer(port, b"") == ""
    assert answer(port, b"\x00" + proxy_v2(V4)) == ""
