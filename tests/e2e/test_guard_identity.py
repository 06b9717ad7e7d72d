"""How the app is told who called: each header by choice, and a token that it can check."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.e2e.guard_kit import Files, admin_get, guarding
from tests.e2e.kit import Caller
from tests.support.apps import App, echo_head
from tests.support.programs import free_port, must

CONFIG = """
[[listener]]
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
headers = [{headers}]
to = "{to}"
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """alice has a certificate of an issuer below the root."""
    files = Files(tmp_path)
    files.client("alice", files.ca.sub())
    return files


def test_each_header_is_there_by_choice(files: Files) -> None:
    """The styles that are asked for are what the app gets, each as its specification has it; no other is."""
    alice = files.clients["alice"]
    leaf, issuer = (certificate.public_bytes(Encoding.DER) for certificate in alice.presented)
    all_styles = ("client-cert", "client-cert-chain", "client-identity", "xfcc", "x-ssl-client")
    with App(echo_head) as app:
        config = CONFIG.format(headers=json.dumps(all_styles)[1:-1], to=app.address)
        with guarding(files.folder, config) as guard:
            sent = files.client("alice").ask(guard.port).lines
    # RFC 9440 2.2 and 2.3: byte sequences of RFC 8941.
    assert base64.b64decode(sent["client-cert"].strip(":")) == leaf
    assert base64.b64decode(sent["client-cert-chain"].strip(":")) == issuer
    assert sent["client-identity"] == '"spiffe://test/alice"'
    fields = dict(field.split("=", 1) for field in sent["x-forwarded-client-cert"].split(";"))
    assert fields["Hash"] == hashlib.sha256(leaf).hexdigest()
    assert fields["URI"].strip('"') == "spiffe://test/alice"
    assert "Cert" not in fields
    assert sent["x-ssl-client-verify"] == "SUCCESS"
    assert int(sent["x-ssl-client-serial"], 16) == alice.certificate.serial_number


@pytest.mark.parametrize("style", ["client-cert-chain", "client-identity", "xfcc", "xfcc-cert", "x-ssl-client"])
def test_no_other_header_is_there(files: Files, style: str) -> None:
    """One style alone brings its own headers alone, whatever the client sends."""
    own = {
        "client-cert-chain": {"client-cert-chain"},
        "client-identity": {"client-identity"},
        "xfcc": {"x-forwarded-client-cert"},
        "xfcc-cert": {"x-forwarded-client-cert"},
    }
    with App(echo_head) as app, guarding(files.folder, CONFIG.format(headers=f'"{style}"', to=app.address)) as guard:
        sent = files.client("alice").ask(guard.port, "/", "Client-Cert: :AA==:", "X-SSL-Client-S-DN: CN=root").lines
    told = set(sent) - {"host", "connection", "x-forwarded-for", "x-forwarded-proto"}
    if style == "x-ssl-client":
        assert "x-ssl-client-verify" in told
        assert all(name.startswith("x-ssl-client-") for name in told)
        assert "root" not in sent.get("x-ssl-client-s-dn", "")
    else:
        assert told == own[style]
    if style == "xfcc-cert":
        fields = dict(field.split("=", 1) for field in sent["x-forwarded-client-cert"].split(";"))
        pem = unquote(fields["Cert"].strip('"'))
        assert x509.load_pem_x509_certificate(pem.encode()) == files.clients["alice"].certificate


@pytest.mark.parametrize("workers", [1, 2])
def test_the_app_can_check_the_assertion(files: Files, workers: int) -> None:
    """The token is signed with a key that the admin listener publishes, for this app, this caller and a minute; with
    several workers it is one key. A token of another, for another or with a changed word is refused.
    """
    admin = free_port()
    tables = f'[admin]\nlisten = "127.0.0.1:{admin}"\n[assertion]\nissuer = "https://guard"\naudience = "shop"\n'
    with App(echo_head) as app:
        config = tables + CONFIG.format(headers='"assertion"', to=app.address)
        with guarding(files.folder, config, top=f"workers = {workers}\n") as guard:
            tokens = [files.client("alice").ask(guard.port).lines["handfast-assertion"] for _ in range(6)]
            keys = jwt.PyJWKSet.from_json(admin_get(admin, "/.well-known/jwks.json")[1].decode())
    assert len(keys.keys) == 1
    for token in tokens:
        key = keys[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(token, key, algorithms=["ES256"], audience="shop", issuer="https://guard")
        assert claims["sub"] == "spiffe://test/alice"
        assert 0 < claims["exp"] - datetime.now(UTC).timestamp() <= 60
        der = files.clients["alice"].certificate.public_bytes(Encoding.DER)
        thumbprint = base64.urlsafe_b64encode(hashlib.sha256(der).digest()).rstrip(b"=").decode()
        assert claims["cnf"]["x5t#S256"] == thumbprint  # RFC 8705 3.1
    # One token serves all of a client's connections for a part of its life; each worker makes its own.
    assert 1 <= len({jwt.decode(token, options={"verify_signature": False})["jti"] for token in tokens}) <= workers
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(tokens[0], key, algorithms=["ES256"], audience="bank")
    head, body, signature = tokens[0].split(".")
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(f"{head}.{body[:-4]}AAAA.{signature}", key, algorithms=["ES256"], audience="shop")


def test_the_assertion_is_signed_with_the_key_that_is_given(files: Files, call: Caller) -> None:
    """A P-256 key from a file signs; a key of another kind is refused at start, and another key while it runs."""
    must("openssl", "ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out", "sign.key", folder=files.folder)
    public = must("openssl", "ec", "-in", "sign.key", "-pubout", folder=files.folder)
    with App(echo_head) as app:
        config = '[assertion]\nkey = "sign.key"\n' + CONFIG.format(headers='"assertion"', to=app.address)
        with guarding(files.folder, config) as guard:
            token = files.client("alice").ask(guard.port).lines["handfast-assertion"]
            must(
                "openssl",
                "ecparam",
                "-genkey",
                "-noout",
                "-name",
                "prime256v1",
                "-out",
                "sign.key",
                folder=files.folder,
            )
            kept = guard.next("reload")
            assert (kept["outcome"], kept["reason"]) == ("kept", "guard.restart")
            assert "the key of assertion" in kept["detail"]
    assert jwt.decode(token, public, algorithms=["ES256"], audience="handfast")["iss"] == "handfast"
    must("openssl", "ecparam", "-genkey", "-noout", "-name", "secp384r1", "-out", "sign.key", folder=files.folder)
    assert call.refused("guard", "-c", "handfast.toml", "--check") == (2, "input.not_key")
