"""A client certificate from a PKCS#12 file in a real browser: headless Chromium with a certificate database."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import Issued
from tests.support.apps import App
from tests.support.programs import Browser, must, served

CLASSIC = ("--cert", "server.crt", "--key", "server.key", "--client-ca", "ca.crt", "--legacy-certs")
# Chromium takes no server certificate without a subject alternative name, and the walk-through's has none.
NO_SAN = "--ignore-certificate-errors"


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    return Browser(tmp_path / "home").prepare()


def test_the_walkthroughs_pfx_opens_the_page(classic: Path, browser: Browser) -> None:
    """Once openssl's client.pfx is imported the browser shows the app's page; before that, the refusal."""
    with App() as app, served("guard", "--to", app.address, *CLASSIC, folder=classic) as guard:
        before = browser.page(guard.url, NO_SAN)
        assert "verify.no_certificate" in before
        assert app.connections == 0
    browser.take(classic / "client.pfx", "secret")
    with App() as app, served("guard", "--to", app.address, *CLASSIC, folder=classic) as guard:
        assert "Hello World" in browser.page(guard.url, NO_SAN)


def test_a_browser_offers_no_certificate_of_another_authority(classic: Path, browser: Browser) -> None:
    """The browser chooses by the authorities that the guard names; not told them, it offers any, and is refused."""
    export = ("pkcs12", "-export", "-inkey", "client.key", "-in", "stranger.crt", "-passout", "pass:secret")
    must("openssl", *export, "-out", browser.home / "stranger.pfx", folder=classic)
    browser.take(browser.home / "stranger.pfx", "secret")
    with App() as app:
        with served("guard", "--to", app.address, *CLASSIC, folder=classic) as guard:
            assert "verify.no_certificate" in browser.page(guard.url, NO_SAN)
        with served("guard", "--to", app.address, *CLASSIC, "--no-ca-names", folder=classic) as guard:
            assert "verify.unknown_issuer" in browser.page(guard.url, NO_SAN)
        assert app.connections == 0


@pytest.mark.parametrize("name", ["web", "old"], ids=["modern", "legacy"])
def test_our_p12_opens_the_page(issued: Issued, browser: Browser, name: str) -> None:
    """With handfast's own PKCS#12 file, modern or legacy, the page opens, and nothing has to be waved through."""
    browser.take(issued.folder / f"{name}.p12", (issued.folder / f"{name}.p12.password").read_text().strip())
    browser.trust(issued.root)
    words = ("--cert", "localhost.crt", "--key", "localhost.key", "--client-ca", issued.root)
    with App() as app, served("guard", "--to", app.address, *words, folder=issued.folder) as guard:
        assert "Hello World" in browser.page(guard.url)
        assert guard.next("request")["peer"] == f"spiffe://handfast.internal/{name}"


def test_our_server_needs_to_be_trusted(issued: Issued, browser: Browser) -> None:
    """A browser that was not told of the authority breaks off: it shows neither the page nor a refusal."""
    browser.take(issued.folder / "web.p12", (issued.folder / "web.p12.password").read_text().strip())
    words = ("--cert", "localhost.crt", "--key", "localhost.key", "--client-ca", issued.root)
    with App() as app, served("guard", "--to", app.address, *words, folder=issued.folder) as guard:
        page = browser.page(guard.url)
        assert "Hello World" not in page
        assert "error" not in page
        assert guard.next("connection")["reason"] in ("tls.alert", "tls.closed")
        assert app.connections == 0
