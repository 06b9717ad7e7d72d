"""X-SSL-Client-* beside nginx: for one certificate, its $ssl_client_* variables and our values are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from handfast.pki.names import Kind, Name
from handfast.wire.forwarding import HeaderStyle, PeerFacts, identity_headers
from tests.support.certs import Ca
from tests.support.programs import curl, free_port, nginx
from tests.wire.subjects import SUBJECTS, client

ROOT = Ca.root()
ISSUER = ROOT.sub()
VARIABLES = {
    "Verify": "verify",
    "S-DN": "s_dn",
    "I-DN": "i_dn",
    "Serial": "serial",
    "Fingerprint": "fingerprint",
    "V-Start": "v_start",
    "V-End": "v_end",
    "Cert": "escaped_cert",
}
BLOCK = """
server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate server.crt;
    ssl_certificate_key server.key;
    ssl_client_certificate root.crt;
    ssl_verify_client optional;
    ssl_verify_depth 3;
    location / {{ return 200 "{lines}"; }}
}}
"""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An nginx that says what it makes of a client's certificate."""
    folder = tmp_path_factory.mktemp("nginx")
    ROOT.save(folder, "root")
    ROOT.server().save(folder, "server")
    lines = "\\n".join(f"{name}: $ssl_client_{variable}" for name, variable in VARIABLES.items())
    number = free_port()
    with nginx(BLOCK.format(port=number, lines=lines), folder):
        yield number


def said(port: int, folder: Path, *words: str | Path) -> dict[str, str]:
    """What nginx says of a client."""
    answer = curl(f"https://127.0.0.1:{port}/", "--insecure", *words, folder=folder)
    assert answer.status == 200, answer
    return dict(line.split(": ", 1) for line in answer.body.split("\n") if line)


def ours(peer: PeerFacts | None) -> dict[str, str]:
    headers = identity_headers((HeaderStyle.X_SSL_CLIENT,), peer)
    return {name.decode().removeprefix("X-SSL-Client-"): value.decode() for name, value in headers}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_nginx_says_the_same(port: int, subject: str, tmp_path: Path) -> None:
    """Every value agrees with nginx's, for usual subjects and for those that break quoting elsewhere."""
    leaf = client(ISSUER, SUBJECTS[subject], serial=0xABC if subject == "usual" else 0xFEDCBA9876543210)
    cert, key = leaf.save(tmp_path, "client")
    assert said(port, tmp_path, "--cert", cert, "--key", key) == ours(
        PeerFacts(leaf.certificate, Name(Kind.CN, "x"), "")
    )


def test_nginx_says_the_same_of_nobody(port: int, tmp_path: Path) -> None:
    """Without a certificate both say NONE; what nginx leaves empty we leave out."""
    assert {name: value for name, value in said(port, tmp_path).items() if value} == ours(None) == {"Verify": "NONE"}
