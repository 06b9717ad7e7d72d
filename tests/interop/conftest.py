"""What the tests with real programs share: the walk-through's own certificates, and an authority of ours."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tests.interop.page import Page
from tests.support.certs import Ca, Spec, make
from tests.support.programs import made, must

DAY = timedelta(days=1)
WALKTHROUGH = Path(__file__).parents[2] / "docs" / "howto" / "replace-the-openssl-nginx-walkthrough.md"


@dataclass(frozen=True)
class Issued:
    """An authority in `state`, and in `folder` what it issued: localhost (server), web, old and api."""

    state: Path
    folder: Path

    @property
    def root(self) -> Path:
        return self.state / "root.crt"

    @property
    def issuer(self) -> Path:
        return self.state / "issuer.crt"


@pytest.fixture(scope="session")
def page() -> Page:
    """The walk-through as it is written."""
    return Page.read(WALKTHROUGH)


@pytest.fixture(scope="session")
def classic(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the walk-through's openssl commands were run, as they are written."""
    folder = tmp_path_factory.mktemp("classic")
    for command in page.commands:
        if command.line.startswith(("openssl ", "printf ")):
            must("bash", "-c", command.line, folder=folder)
    return folder


@pytest.fixture(scope="session")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    """An authority of handfast, and certificates of each kind from it."""
    at = Issued(tmp_path_factory.mktemp("authority") / "state", tmp_path_factory.mktemp("issued"))
    made("authority", "init", "--state", at.state, folder=at.folder)
    for words in (
        ("localhost", "127.0.0.1", "--profile", "server"),
        ("web", "--p12", "web.p12"),
        ("old", "--p12", "old.p12", "--legacy-p12"),
    ):
        made("issue", *words, "--state", at.state, folder=at.folder)
    return at


@pytest.fixture(scope="session")
def bad(classic: Path) -> dict[str, tuple[str, ...]]:
    """What curl is told to show, by the reason for which it is refused; every certificate is for the same subject."""
    key = serialization.load_pem_private_key((classic / "client.key").read_bytes(), None)
    ca_key = serialization.load_pem_private_key((classic / "ca.key").read_bytes(), None)
    ca = Ca(x509.load_pem_x509_certificate((classic / "ca.crt").read_bytes()), ca_key)
    now = datetime.now(UTC).replace(microsecond=0)

    def like_the_client(issuer: Ca, begins: datetime, ends: datetime) -> x509.Certificate:
        spec = Spec(cn="client", eku=None, key_usage=False, key=key, not_before=begins, not_after=ends)
        return make(spec, issuer).certificate

    impostor = Ca.root("My CA")  # the right name and the wrong key
    bad = {
        "expired": like_the_client(ca, now - 9 * DAY, now - DAY),
        "not_yet_valid": like_the_client(ca, now + DAY, now + 9 * DAY),
        "bad_signature": like_the_client(impostor, now - DAY, now + DAY),
    }
    for what, certificate in bad.items():
        (classic / f"{what}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    shown = {what: ("--cert", f"{what}.crt", "--key", "client.key") for what in bad}
    return {"no_certificate": (), "unknown_issuer": ("--cert", "stranger.crt", "--key", "client.key"), **shown}
