"""Files that handfast and openssl exchange: certificates, PKCS#12, signing requests, an authority's key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import Issued
from tests.support.programs import handfast, made, must, refused, run

WEB = "URI:spiffe://handfast.internal/web"


@pytest.mark.parametrize(
    ("cert", "purpose", "good"),
    [
        ("web.crt", "sslclient", True),
        ("web.crt", "sslserver", False),
        ("localhost.crt", "sslserver", True),
        ("localhost.crt", "sslclient", False),
    ],
)
def test_openssl_verify(issued: Issued, cert: str, purpose: str, good: bool) -> None:
    """openssl, at its strictest, accepts the chain for its purpose, and not for the other."""
    words = ("-x509_strict", "-purpose", purpose, "-CAfile", issued.root, "-untrusted", cert, cert)
    done = run("openssl", "verify", *words, folder=issued.folder)
    assert (done.returncode == 0) is good, done
    assert good or "unsuitable certificate purpose" in done.stderr


def test_openssl_verify_needs_the_issuer(issued: Issued) -> None:
    """Without the issuer in between the chain does not hold, so the file has to carry it."""
    done = run("openssl", "verify", "-CAfile", issued.root, "web.crt", folder=issued.folder)
    assert "unable to get local issuer certificate" in done.stderr
    must("openssl", "verify", "-CAfile", issued.root, "-untrusted", issued.issuer, "web.crt", folder=issued.folder)


@pytest.mark.parametrize(
    ("name", "provider", "mac", "cipher"),
    [
        ("web", (), "MAC: sha256", "PBES2, PBKDF2, AES-256-CBC, Iteration 100000, PRF hmacWithSHA256"),
        ("old", ("-legacy",), "MAC: sha1", "pbeWithSHA1And3-KeyTripleDES-CBC"),
    ],
    ids=["modern", "legacy"],
)
def test_openssl_opens_our_p12(issued: Issued, name: str, provider: tuple[str, ...], mac: str, cipher: str) -> None:
    """openssl opens the file with its password, finds key and chain in it, and nothing without the password."""
    words = ("openssl", "pkcs12", *provider, "-info", "-nodes", "-in", f"{name}.p12", "-passin")
    done = run(*words, f"file:{name}.p12.password", folder=issued.folder)
    assert done.returncode == 0, done.stderr
    assert mac in done.stderr
    assert f"Shrouded Keybag: {cipher}" in done.stderr
    assert f"friendlyName: {name}" in done.stdout
    assert done.stdout.count("BEGIN CERTIFICATE") == 2
    assert done.stdout.count("BEGIN PRIVATE KEY") == 1
    wrong = run(*words, "pass:wrong", folder=issued.folder)
    assert wrong.returncode == 1
    assert "invalid password" in wrong.stderr


def request(folder: Path, key: str, *more: str, names: str = WEB) -> None:
    """openssl makes web.key and web.csr."""
    new = ("openssl", "req", "-new", "-nodes", "-keyout", "web.key", "-out", "web.csr", "-subj", "/CN=web")
    algorithm, *options = key.split()
    pkey = [word for option in options for word in ("-pkeyopt", option)]
    must(*new, "-newkey", algorithm, *pkey, "-addext", f"subjectAltName={names}", *more, folder=folder)


def sign(issued: Issued, *more: str) -> tuple[str | Path, ...]:
    return ("sign", "web.csr", "--name", "web", *more, "--state", issued.state)


@pytest.mark.parametrize("key", ["ec ec_paramgen_curve:prime256v1", "rsa:2048", "ed25519"])
@pytest.mark.parametrize("form", ["PEM", "DER"])
def test_a_request_of_openssl_is_signed(issued: Issued, tmp_path: Path, key: str, form: str) -> None:
    """handfast signs openssl's request, and the certificate verifies and holds the request's key."""
    request(tmp_path, key, "-outform", form)
    result = made(*sign(issued), folder=tmp_path)
    assert result["names"] == ["spiffe://handfast.internal/web"]
    words = ("-x509_strict", "-purpose", "sslclient", "-CAfile", issued.root, "-untrusted", issued.issuer)
    must("openssl", "verify", *words, "web.crt", folder=tmp_path)
    ours = must("openssl", "x509", "-in", "web.crt", "-noout", "-pubkey", folder=tmp_path)
    assert ours == must("openssl", "pkey", "-in", "web.key", "-pubout", folder=tmp_path)


def test_nothing_but_the_key_is_taken_from_a_request(issued: Issued, tmp_path: Path) -> None:
    """A request that asks to be an authority and a server gets a client's certificate, with no common name."""
    wishes = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "extendedKeyUsage=serverAuth")
    request(tmp_path, "ed25519", *wishes)
    made(*sign(issued), folder=tmp_path)
    text = must("openssl", "x509", "-in", "web.crt", "-noout", "-text", folder=tmp_path)
    assert "CA:TRUE" not in text
    assert "TLS Web Client Authentication" in text
    assert "TLS Web Server Authentication" not in text
    assert must("openssl", "x509", "-in", "web.crt", "-noout", "-subject", folder=tmp_path) == "subject=\n"


@pytest.mark.parametrize(
    ("key", "more", "names", "error"),
    [
        ("ed25519", (), "URI:spiffe://handfast.internal/admin", "issue.name_not_authorized"),
        ("ed25519", (), f"{WEB},DNS:bank.example", "issue.name_not_authorized"),
        ("rsa:1024", (), WEB, "issue.weak_key"),
        ("rsa:2048", ("-sha1",), WEB, "issue.weak_hash"),
        ("rsa:2048", ("-md5",), WEB, "issue.weak_hash"),
    ],
    ids=["other name", "name too many", "RSA-1024", "SHA-1", "MD5"],
)
def test_a_bad_request_is_refused(
    issued: Issued, tmp_path: Path, key: str, more: tuple[str, ...], names: str, error: str
) -> None:
    """A request for another name, with a weak key or a broken hash is refused with exit 3, and nothing is written."""
    request(tmp_path, key, *more, names=names)
    code, shown = refused(*sign(issued), folder=tmp_path)
    assert (code, shown["error"]) == (3, error)
    assert not (tmp_path / "web.crt").exists()


def test_an_encrypted_authority_is_taken_over(classic: Path, tmp_path: Path) -> None:
    """openssl's encrypted ca.key is imported with its passphrase, and refused without it or with another."""
    (tmp_path / "right").write_text("open sesame\n")
    (tmp_path / "wrong").write_text("open barley\n")
    locked = tmp_path / "locked.key"
    must("openssl", "rsa", "-in", "ca.key", "-aes256", "-passout", "pass:open sesame", "-out", locked, folder=classic)
    words = ("authority", "import", "--cert", classic / "ca.crt", "--key", locked, "--state", tmp_path / "state")
    assert refused(*words, folder=tmp_path)[1]["error"] == "input.key_encrypted"
    wrong = refused(*words, "--key-passphrase-file", "wrong", folder=tmp_path)
    assert wrong[1]["error"] == "input.wrong_passphrase"
    made(*words, "--key-passphrase-file", "right", folder=tmp_path)
    made("issue", "web", "--state", tmp_path / "state", folder=tmp_path)
    must("openssl", "verify", "-CAfile", classic / "ca.crt", "web.crt", folder=tmp_path)


@pytest.mark.parametrize(
    ("cert", "key", "more", "error"),
    [
        ("ca.crt", "server.key", (), "input.key_mismatch"),
        ("client.crt", "client.key", ("--chain", "ca.crt"), "issue.issuer_not_ca"),
        ("client.crt", "client.key", (), "input.no_chain"),
    ],
    ids=["another key", "no authority", "no chain"],
)
def test_what_is_no_authority_is_not_taken_over(
    classic: Path, tmp_path: Path, cert: str, key: str, more: tuple[str, ...], error: str
) -> None:
    """A key that does not belong to the certificate, or a certificate that is no authority's, is not imported."""
    words = ("authority", "import", "--cert", cert, "--key", key, "--state", str(tmp_path / "state"), *more)
    code, shown = refused(*words, folder=classic)
    assert shown["error"] == error, shown
    assert code in (2, 3)
    assert handfast("authority", "show", "--state", tmp_path / "state", folder=tmp_path).returncode == 4
