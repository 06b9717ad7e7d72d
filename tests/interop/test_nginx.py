"""Certificates of handfast in a real nginx, with the configuration that `export --nginx` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import Issued
from tests.support.apps import App, echo_head
from tests.support.certs import Ca
from tests.support.programs import curl, free_port, made, nginx, refused, s_client

PAIR = ("--cert", "localhost.crt", "--key", "localhost.key")
WEB = ("--cert", "web.crt", "--key", "web.key")


def block(issued: Issued, to: str, port: int, pair: tuple[str | Path, ...] = PAIR) -> str:
    """What `export --nginx` prints."""
    words = ("--to", to, "--listen", f"127.0.0.1:{port}", "--state", issued.state)
    text: str = made("export", "--nginx", *pair, *words, folder=issued.folder)["nginx"]
    return text


def test_nginx_takes_our_certificates(issued: Issued, tmp_path: Path) -> None:
    """curl with handfast's client certificate gets the app; without one, or with another authority's, 400."""
    stranger = Ca.root().client("spiffe://handfast.internal/web")
    cert, key = stranger.save(tmp_path, "stranger")
    port, trust = free_port(), ("--cacert", issued.root)
    with App() as app, nginx(block(issued, app.address, port), tmp_path):
        for host in ("localhost", "127.0.0.1"):
            answer = curl(f"https://{host}:{port}/", *WEB, *trust, folder=issued.folder)
            assert (answer.status, answer.body) == (200, "Hello World\n")
        served = app.connections
        assert curl(f"https://localhost:{port}/", *trust, folder=issued.folder).status == 400
        assert curl(f"https://localhost:{port}/", "--cert", cert, "--key", key, *trust, folder=tmp_path).status == 400
        # A server's certificate is no client's.
        assert curl(f"https://localhost:{port}/", *PAIR, *trust, folder=issued.folder).status == 400
        assert app.connections == served


def test_nginx_tells_the_app_and_strips_what_the_client_says(issued: Issued, tmp_path: Path) -> None:
    """The app behind nginx learns who the client is from nginx alone."""
    port = free_port()
    names = ("X-SSL-Client-Verify", "X-SSL-Client-Cert", "Client-Cert", "Client-Identity")
    forged = [word for name in names for word in ("-H", f"{name}: forged")]
    with App(echo_head) as app, nginx(block(issued, app.address, port), tmp_path):
        head = curl(f"https://localhost:{port}/", *WEB, *forged, "--cacert", issued.root, folder=issued.folder).body
    assert "X-SSL-Client-Verify: SUCCESS" in head
    assert "X-SSL-Client-Cert: -----BEGIN%20CERTIFICATE-----" in head
    assert "forged" not in head


def test_nginx_resumes_no_session(issued: Issued, tmp_path: Path) -> None:
    """With the exported configuration a session that openssl saved is not taken up again."""
    port, session = free_port(), tmp_path / "session"
    words = ("-cert", "web.crt", "-key", "web.key", "-cert_chain", issued.issuer, "-CAfile", issued.root)
    with App() as app, nginx(block(issued, app.address, port), tmp_path):
        first = s_client(port, *words, "-sess_out", session, folder=issued.folder)
        assert "Hello World" in first
        if session.exists():
            assert "Reused" not in s_client(port, *words, "-sess_in", session, folder=issued.folder)
        old = s_client(port, *words, "-tls1_2", folder=issued.folder)
        assert "alert protocol version" in old


def test_paths_with_blanks_are_quoted(issued: Issued, tmp_path: Path) -> None:
    """A certificate in a folder with a blank and a semicolon in its name works."""
    folder = tmp_path / "my certs; mine"
    folder.mkdir()
    pair: list[str | Path] = []
    for option, name in (("--cert", "localhost.crt"), ("--key", "localhost.key")):
        (folder / name).write_bytes((issued.folder / name).read_bytes())
        pair += [option, folder / name]
    port = free_port()
    with App() as app, nginx(block(issued, f"http://{app.address}", port, tuple(pair)), tmp_path):
        assert curl(f"https://localhost:{port}/", *WEB, "--cacert", issued.root, folder=issued.folder).status == 200


@pytest.mark.parametrize(
    ("to", "directive"),
    [
        ("127.0.0.1:8000", "proxy_pass http://127.0.0.1:8000;"),
        ("http://127.0.0.1:8000", "proxy_pass http://127.0.0.1:8000;"),
        ("unix:/run/app.sock", "proxy_pass http://unix:/run/app.sock:;"),
    ],
)
def test_targets_are_written_as_nginx_reads_them(issued: Issued, to: str, directive: str) -> None:
    """Every HTTP target that the guard takes is written in nginx's own way."""
    assert directive in block(issued, to, 8443)


def test_a_target_that_is_not_http_is_refused(issued: Issued) -> None:
    """A TCP target is refused: an nginx server block cannot forward to it."""
    words = ("export", "--nginx", *PAIR, "--to", "tcp://127.0.0.1:5432", "--state", issued.state)
    code, error = refused(*words, folder=issued.folder)
    assert (code, error["error"]) == (2, "input.target")
