"""Every verb on files and values that it should not be given: what is wrong, what to do, and nothing issued."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from handfast.authority import GeneratedPassphrase, Plan, create_authority
from handfast.errors import Exit
from handfast.pki.pkcs12 import encode_p12
from tests.e2e.kit import Caller, check_refusal, serials
from tests.support.apps import App, accepted
from tests.support.certs import Ca, Spec, make

# In the tables, @NAME is a file of `files`, STATE the state folder, OUT a new file, FILE the bad one.
GUARD = "guard --to 127.0.0.1:1 --cert @server.crt --key @server.key --client-ca @ca.crt"
VERBS = [
    *("up", "guard", "demo", "authority init", "authority import", "authority show", "issue", "sign", "list"),
    *("show", "revoke", "export", "inspect", "verify", "version"),
]

# Whatever a file is to hold: what is wrong with it -> the reason.
ANY_FILE = {
    "missing": "input.missing",
    "empty": "input.empty",
    "folder": "input.unreadable",
    "fifo": "input.unreadable",
    "unreadable": "input.unreadable",
    "huge": "input.too_large",
    "ca.crt/below-a-file": "input.missing",
}
# What a file is to hold -> the reason, and files that hold something else or nothing whole.
WRONG_FILE = {
    "certificate": ("input.not_certificate", ("cut.pem", "cut.der", "binary", "ca.key", "request.csr", "list.crl")),
    "key": ("input.not_key", ("cut.key", "cut.der", "binary", "ca.crt", "request.csr", "list.crl")),
    "request": ("input.not_csr", ("cut.csr", "cut.der", "binary", "ca.crt", "ca.key", "list.crl")),
    "list": ("input.not_crl", ("cut.pem", "cut.der", "binary", "ca.crt", "ca.key", "request.csr")),
    "anything": ("input.unknown_file", ("cut.pem", "cut.der", "binary")),
    "secret": ("", ()),
}
FILE_PLACES = {
    "guard --to 127.0.0.1:1 --cert FILE --key @server.key --client-ca @ca.crt": "certificate",
    "guard --to 127.0.0.1:1 --cert @server.crt --key FILE --client-ca @ca.crt": "key",
    "guard --to 127.0.0.1:1 --cert @server.crt --key @server.key --client-ca FILE": "certificate",
    "authority import --cert FILE --key @ca.key --state OUT": "certificate",
    "authority import --cert @ca.crt --key FILE --state OUT": "key",
    "authority import --cert @ca.crt --key @ca.key --chain FILE --state OUT": "certificate",
    "authority import --cert @ca.crt --key @encrypted.key --key-passphrase-file FILE --state OUT": "secret",
    "authority import --cert @ca.crt --key @ca.key --passphrase-file FILE --state OUT": "secret",
    "authority init --passphrase-file FILE --state OUT": "secret",
    "issue web --passphrase-file FILE --out OUT --state STATE": "secret",
    "issue web --p12 OUT.p12 --p12-password-file FILE --out OUT --state STATE": "secret",
    "sign FILE --name web --out OUT --state STATE": "request",
    "sign @request.csr --name web.internal --passphrase-file FILE --out OUT --state STATE": "secret",
    "up --to 127.0.0.1:1 --listen 127.0.0.1:0 --passphrase-file FILE --state STATE": "secret",
    "inspect FILE": "anything",
    "inspect @encrypted.key --password-file FILE": "secret",
    "verify FILE --bundle @ca.crt": "certificate",
    "verify @client.crt --bundle FILE": "certificate",
    "verify @client.crt --bundle @ca.crt --chain FILE": "certificate",
    "verify @client.crt --bundle @ca.crt --crl FILE": "list",
    "export --cert FILE --key @server.key --p12 OUT": "certificate",
    "export --cert @server.crt --key FILE --p12 OUT": "key",
    "export --cert @server.crt --key @encrypted.key --key-passphrase-file FILE --p12 OUT": "secret",
    "export --cert @server.crt --key @server.key --p12 OUT --p12-password-file FILE": "secret",
    "export --pem --cert FILE": "certificate",
}

# Files that are good, and do not belong together or not there.
WRONG_TOGETHER = [
    ("guard --to 127.0.0.1:1 --cert @server.crt --key @other.key --client-ca @ca.crt", 2, "input.key_mismatch"),
    ("guard --to 127.0.0.1:1 --cert @server.crt --key @encrypted.key --client-ca @ca.crt", 2, "input.key_encrypted"),
    ("guard --to 127.0.0.1:1 --cert @server.crt --key @server.key --client-ca @client.crt", 2, "input.not_certificate"),
    ("authority import --cert @ca.crt --key @other.key --state OUT", 2, "input.key_mismatch"),
    ("authority import --cert @ca.crt --key @encrypted.key --state OUT", 2, "input.key_encrypted"),
    (
        "authority import --cert @ca.crt --key @encrypted.key --key-passphrase-file @wrong --state OUT",
        2,
        "input.wrong_passphrase",
    ),
    ("authority import --cert @expired.crt --key @expired.key --state OUT", 3, "issue.issuer_expired"),
    ("authority import --cert @leaf.crt --key @leaf.key --state OUT", 3, "issue.issuer_not_ca"),
    ("authority import --cert @client.crt --key @client.key --state OUT", 2, "input.no_chain"),
    ("authority import --cert @client.crt --key @client.key --chain @ca.crt --state OUT", 3, "issue.issuer_not_ca"),
    ("export --cert @server.crt --key @other.key --p12 OUT", 2, "input.key_mismatch"),
    ("export --cert @server.crt --key @encrypted.key --p12 OUT", 2, "input.key_encrypted"),
    (
        "export --cert @server.crt --key @encrypted.key --key-passphrase-file @wrong --p12 OUT",
        2,
        "input.wrong_passphrase",
    ),
    ("export --cert @server.crt --key @server.key --p12 @ca.crt", 3, "store.exists"),
    ("export --cert @server.crt --key @server.key --p12 @missing/web.p12", 5, "store.disk"),
    ("verify @client.crt --bundle @client.crt", 2, "input.not_certificate"),
    ("verify @client.crt --bundle @expired.crt", 3, "verify.unknown_issuer"),
    ("verify @of-expired.crt --bundle @expired.crt", 3, "verify.expired"),
    ("verify @server.crt --bundle @ca.crt", 3, "verify.purpose"),
    ("verify @ca.crt --bundle @ca.crt", 3, "verify.ca_as_leaf"),
    ("sign @request.csr --name other --out OUT --state STATE", 3, "issue.name_not_authorized"),
    ("sign @request.csr --name web.internal --out @ca.crt --state STATE", 3, "store.exists"),
    ("sign @request.csr --name web.internal --out @missing/web.crt --state STATE", 5, "store.disk"),
    ("sign @request.csr --name web.internal --out @folder --force --state STATE", 5, "store.disk"),
    ("issue web --out @ca.crt --state STATE", 5, "store.disk"),
    ("issue web --out @ca.crt/below --state STATE", 5, "store.disk"),
    ("issue web --out OUT --p12 @missing/web.p12 --state STATE", 5, "store.disk"),
    ("issue web --out OUT --p12 @ca.crt --state STATE", 3, "store.exists"),
    ("issue web --out OUT --p12 OUT/web.key --state STATE", 2, "usage"),
    ("issue ca --out OUT --state STATE", 2, "usage"),
    ("authority init --state STATE", 3, "store.exists"),
    ("authority import --cert @ca.crt --key @ca.key --state STATE", 3, "store.exists"),
    ("inspect @encrypted.p12 --password-file @wrong", 2, "input.not_p12"),
]

BAD_VALUES = [
    # names
    ("issue bad!name --state STATE", 2, "input.name"),
    ("issue '' --state STATE", 2, "input.name"),
    ("issue web/ --state STATE", 2, "input.name"),
    ("issue ../../etc/passwd --state STATE", 2, "input.name"),
    ("issue spiffe://UPPER/web --state STATE", 2, "input.name"),
    ("issue a..b --state STATE", 2, "input.name"),
    ("issue ip:10.0.0.256 --state STATE", 2, "input.name"),
    ("issue email:nobody --state STATE", 2, "input.name"),
    ("issue \xfcber --state STATE", 2, "input.name"),
    ("issue web\udcff --state STATE", 2, "input.name"),
    ("issue spiffe://elsewhere/web --state STATE", 3, "issue.trust_domain"),
    ("issue 10.0.0.1 --profile client --state STATE", 3, "issue.name_kind"),
    ("issue cn:web --state STATE", 3, "issue.name_kind"),
    ("issue web web2 --state STATE", 3, "issue.uri_count"),
    ("sign @request.csr --name bad!name --out OUT --state STATE", 2, "input.name"),
    ("verify @client.crt --bundle @ca.crt --name bad!name", 2, "input.name"),
    ("verify @client.crt --bundle @ca.crt --name spiffe://test/other", 3, "verify.name_mismatch"),
    ("authority init --trust-domain Bad_Domain --state OUT", 2, "input.name"),
    ("authority init --constrain bad!host --state OUT", 2, "input.name"),
    ("authority import --cert @ca.crt --key @ca.key --trust-domain '' --state OUT", 2, "input.name"),
    ("up --to 127.0.0.1:1 --listen 127.0.0.1:0 --name bad!name --state STATE", 2, "input.name"),
    ("up --to 127.0.0.1:1 --listen 127.0.0.1:0 --client bad!name --state STATE", 2, "input.name"),
    ("up --to 127.0.0.1:1 --listen 127.0.0.1:0 --client a/web --client b/web --state STATE", 2, "input.name"),
    ("up --to 127.0.0.1:1 --listen 127.0.0.1:0 --trust-domain Bad_Domain --state OUT", 2, "input.name"),
    # lifetimes and times
    ("issue web --for soon --state STATE", 2, "input.lifetime"),
    ("issue web --for 0h --state STATE", 2, "input.lifetime"),
    ("issue web --for -1h --state STATE", 2, "input.lifetime"),
    ("issue web --for 999999999w --state STATE", 2, "input.lifetime"),
    ("issue web --for 8d --state STATE", 3, "issue.lifetime"),
    ("sign @request.csr --name web.internal --for never --out OUT --state STATE", 2, "input.lifetime"),
    ("list --expiring tomorrow --state STATE", 2, "input.lifetime"),
    ("verify @client.crt --bundle @ca.crt --at tomorrow", 2, "input.time"),
    ("verify @client.crt --bundle @ca.crt --at 0001-01-01T00:00:00+23:59", 2, "input.time"),
    ("verify @client.crt --bundle @ca.crt --at 9999-12-31T23:59:59-23:59", 2, "input.time"),
    ("verify @client.crt --bundle @ca.crt --at 0001-01-01", 3, "verify.not_yet_valid"),
    ("verify @client.crt --bundle @ca.crt --at 9999-12-31", 3, "verify.expired"),
    # choices
    ("issue web --profile root --state STATE", 2, "usage"),
    ("issue web --key-type dsa --state STATE", 2, "usage"),
    ("revoke web --reason because --state STATE", 2, "usage"),
    ("verify @client.crt --bundle @ca.crt --purpose peer", 2, "usage"),
    ("issue web --p12-password-file @wrong --state STATE", 2, "usage"),
    ("issue web --ask-p12-password --p12 OUT --out OUT.d --state STATE", 2, "input.no_passphrase"),
    ("authority init --ask-passphrase --state OUT", 2, "input.no_passphrase"),
    # serials and names of what is not there
    ("show nobody --state STATE", 4, "store.no_certificate"),
    ("show 40ff00 --state STATE", 4, "store.no_certificate"),
    ("show bad!name --state STATE", 4, "store.no_certificate"),
    ("revoke nobody --state STATE", 4, "store.no_certificate"),
    ("revoke bad!name --state STATE", 4, "store.no_certificate"),
    # places
    *(
        (f"{verb} --to {to} --listen 127.0.0.1:0", 2, "input.target")
        for verb in ("up --state OUT", "guard --cert @server.crt --key @server.key --client-ca @ca.crt")
        for to in ("127.0.0.1", "''", "127.0.0.1:0", "127.0.0.1:65536", "ftp://h:1", "unix:", "http://h:1/path", "a!:1")
    ),
    *(
        (f"{verb} --to 127.0.0.1:1 --listen {at}", code, reason)
        for verb in ("up --state OUT", "guard --cert @server.crt --key @server.key --client-ca @ca.crt")
        for at, code, reason in (
            ("nowhere", 2, "input.address"),
            ("''", 2, "input.address"),
            ("127.0.0.1:99999", 2, "input.address"),
            ("[::1:8443", 2, "input.address"),
            ("a..b:8443", 6, "guard.listen"),
            ("192.0.2.1:8443", 6, "guard.listen"),  # RFC 5737: nobody's
        )
    ),
    ("inspect 127.0.0.1:99999", 2, "input.address"),
    ("inspect https://bad!host:443", 2, "input.address"),
    ("inspect a..b:443", 6, "unreachable.name"),
    (f"inspect {'a' * 70}:443", 6, "unreachable.name"),
    ("inspect 127.0.0.1:1", 6, "unreachable"),
    ("inspect https://127.0.0.1:1/path", 6, "unreachable"),
    (f"inspect {'a' * 5000}", 2, "input.unreadable"),
    ("export --nginx --cert @server.crt --key @server.key --to x;y --state STATE", 2, "input.target"),
    ("export --nginx --cert @server.crt --key @server.key --to tcp://127.0.0.1:1 --state STATE", 2, "input.target"),
    ("export --nginx --cert @server.crt --key @server.key --listen 1;2 --state STATE", 2, "input.address"),
    # rules
    *(
        (f"{verb} --to 127.0.0.1:1 --listen 127.0.0.1:0 --allow {rule}", 2, reason)
        for verb in ("up --state STATE", "guard --cert @server.crt --key @server.key --client-ca @ca.crt")
        for rule, reason in (
            ("''", "input.rule"),
            ("'any get'", "input.rule"),
            ("'any GET public'", "input.rule"),
            ("'any GET /a /b'", "input.rule"),
            ("'any /a//b'", "input.rule"),
            ("'maybe any GET /a'", "input.rule"),
            ("spiffe://*/web", "input.pattern"),
            ("dns:a**b", "input.pattern"),
            ("ip:10.0.0.0/33", "input.pattern"),
            ("sha256:abcd", "input.pattern"),
        )
    ),
    ("guard --to 127.0.0.1:1 --cert @server.crt --key @server.key --client-ca @ca.crt --allow web", 2, "input.pattern"),
    # what a verb cannot do without, or cannot do together
    ("up", 2, "usage"),
    ("guard --to 127.0.0.1:1", 2, "usage"),
    ("issue", 2, "usage"),
    ("sign @request.csr", 2, "usage"),
    ("verify @client.crt", 2, "usage"),
    ("show", 2, "usage"),
    ("revoke", 2, "usage"),
    ("inspect", 2, "usage"),
    ("export", 2, "usage"),
    ("export --pem --nginx", 2, "usage"),
    ("export --p12 OUT", 2, "usage"),
    ("export --p12 OUT --cert @server.crt", 2, "usage"),
    ("authority import --cert @ca.crt", 2, "usage"),
    ("authority destroy", 2, "usage"),
    ("version 2", 2, "usage"),
    ("list everything", 2, "usage"),
]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good files, and of all that a path may lead to instead."""
    folder = tmp_path_factory.mktemp("files")
    ca = Ca.root()
    ca.save(folder, "ca")
    _save_key(folder / "ca.key", ca.key)
    ca.server().save(folder, "server")
    client = ca.client()
    client.save(folder, "client")
    make(Spec(cn="nobody"), None).save(folder, "leaf")
    ended = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    old = make(Spec(cn="Old", eku=None, ca=True, not_before=ended - timedelta(days=9), not_after=ended), None)
    old.save(folder, "expired")
    Ca(old.certificate, old.key).client().save(folder, "of-expired")
    _save_key(folder / "other.key", ec.generate_private_key(ec.SECP256R1()))
    _save_key(folder / "encrypted.key", ca.key, b"opens it")
    (folder / "right").write_text("opens it\n")
    (folder / "wrong").write_text("does not open it\n")
    p12 = encode_p12("client", client.key, client.presented, b"opens it")
    (folder / "encrypted.p12").write_bytes(p12)
    (folder / "request.csr").write_bytes(_request("web.internal"))
    (folder / "list.crl").write_bytes(_list(ca))
    for name in ("ca.crt", "ca.key", "request.csr"):
        whole = (folder / name).read_bytes()
        (folder / f"cut.{name[-3:].replace('crt', 'pem')}").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.der").write_bytes(ca.certificate.public_bytes(Encoding.DER)[:-20])
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    with (folder / "huge").open("wb") as huge:
        huge.truncate(100 << 20)  # without a block on the disk
    if os.geteuid() == 0:  # no mode stops root; but nobody can read this one from its beginning
        (folder / "unreadable").symlink_to("/proc/self/mem")
    else:
        (folder / "unreadable").touch(mode=0)
    return folder


@pytest.fixture
def place(files: Path, tmp_path: Path) -> Iterator[Path]:
    """Where OUT is; what is refused leaves nothing there."""
    out = tmp_path / "out"
    yield out
    left = [path.name for path in tmp_path.glob("out*") if path.name != "out"]
    left += [path.name for path in out.glob("*") if path.name not in ("lock", "ca.crt")]
    assert not left


@pytest.mark.parametrize(
    ("words", "bad", "reason"),
    [
        pytest.param(words, bad, reason, id=f"{words.replace('/', '|')} <- {bad.replace('/', '|')}")
        for words, kind in FILE_PLACES.items()
        for bad, reason in [*ANY_FILE.items(), *((bad, WRONG_FILE[kind][0]) for bad in WRONG_FILE[kind][1])]
    ],
)
def test_a_bad_file_is_told_by_what_is_wrong(
    call: Caller, files: Path, first_state: Path, place: Path, words: str, bad: str, reason: str
) -> None:
    """Whichever file of a verb is missing, empty, cut, huge, of another kind or no file is named with its reason."""
    before = serials(first_state)
    code, found = call.refused(*_words(words, files, first_state, place, bad))
    assert (code, found) == (Exit.NOT_FOUND if reason == "input.missing" else Exit.USAGE, reason)
    assert serials(first_state) == before


@pytest.mark.parametrize(("words", "code", "reason"), WRONG_TOGETHER)
def test_good_files_in_the_wrong_place_are_refused(
    call: Caller, files: Path, first_state: Path, place: Path, words: str, code: int, reason: str
) -> None:
    """Files that do not belong together, or would be overwritten, are refused before anything is issued or written."""
    before, files_before = serials(first_state), _contents(files)
    assert call.refused(*_words(words, files, first_state, place)) == (code, reason)
    assert serials(first_state) == before
    assert _contents(files) == files_before


@pytest.mark.parametrize(("words", "code", "reason"), BAD_VALUES)
def test_a_bad_value_is_refused(
    call: Caller, files: Path, first_state: Path, place: Path, words: str, code: int, reason: str
) -> None:
    """A name, pattern, rule, place, time or choice that is none is shown, with what it should look like."""
    before = serials(first_state)
    found = call.refused(*_words(words, files, first_state, place))
    if place.is_dir() and reason == "guard.listen":  # `up` had made its authority by then
        shutil.rmtree(place)
    assert found == (code, reason)
    if reason != "guard.listen":
        assert serials(first_state) == before


def test_the_commands_of_the_tables_work_with_good_files(
    call: Caller, files: Path, state: Path, tmp_path: Path
) -> None:
    """With good files the same commands do their work, so it was the bad ones that were refused."""
    commands = (
        "authority import --cert @ca.crt --key @encrypted.key --key-passphrase-file @right --state OUT/import",
        "authority import --cert @ca.crt --key @ca.key --chain @ca.crt --passphrase-file @right --state OUT/import2",
        "issue web --p12 OUT.p12 --p12-password-file @right --out OUT --state STATE",
        "sign @request.csr --name web.internal --out OUT/signed.crt --state STATE",
        "inspect @encrypted.key --password-file @right",
        "verify @client.crt --bundle @ca.crt --chain @ca.crt --crl @list.crl",
        "export --cert @ca.crt --key @encrypted.key --key-passphrase-file @right --p12 OUT/ca.p12",
        "export --pem --cert @server.crt",
        "export --nginx --cert @server.crt --key @server.key --to unix:/run/a --listen [::1]:8443 --state STATE",
    )
    for words in commands:
        call.done(*_words(words, files, state, tmp_path / "out"))


def test_a_file_of_ones_own_named_ca_crt_is_kept(call: Caller, files: Path, state: Path, tmp_path: Path) -> None:
    """`issue` writes ca.crt, but not over another authority's, and issues nothing then; its own is no obstacle."""
    shutil.copy(files / "ca.crt", tmp_path / "ca.crt")
    before = serials(state)
    assert call.refused("issue", "web", "--state", state) == (Exit.REFUSED, "store.exists")
    assert (tmp_path / "ca.crt").read_bytes() == (files / "ca.crt").read_bytes()
    assert serials(state) == before
    assert not (tmp_path / "web.key").exists()
    (tmp_path / "ca.crt").unlink()
    call.done("issue", "web", "--state", state)
    call.done("issue", "ops", "--state", state)
    assert (tmp_path / "ca.crt").read_bytes() == (state / "root.crt").read_bytes()


def test_what_is_there_is_replaced_only_on_request(call: Caller, state: Path, tmp_path: Path) -> None:
    """A second `issue` of a name leaves key and certificate alone; with --force both are new and fit."""
    words = ("issue", "web", "--p12", tmp_path / "web.p12", "--state", state)
    call.done(*words)
    first = (tmp_path / "web.key").read_bytes(), (tmp_path / "web.p12.password").read_bytes()
    assert call.refused(*words) == (Exit.REFUSED, "store.exists")
    (tmp_path / "web.p12").unlink()
    (tmp_path / "web.key").rename(tmp_path / "kept.key")
    (tmp_path / "web.crt").unlink()
    assert call.refused(*words) == (Exit.REFUSED, "store.exists")  # the password of the one that may have moved
    assert ((tmp_path / "kept.key").read_bytes(), (tmp_path / "web.p12.password").read_bytes()) == first
    call.done(*words, "--force")
    assert (tmp_path / "web.key").read_bytes() != first[0]
    call.done("export", "--cert", "web.crt", "--key", "web.key", "--p12", "again.p12")


def test_a_name_too_long_for_a_file_is_still_issued(call: Caller, state: Path, tmp_path: Path) -> None:
    """A name may be longer than a file's name can be; the file's is cut."""
    made = call.done("issue", "a" * 300, "--state", state)
    assert made["names"] == [f"spiffe://handfast.internal/{'a' * 300}"]
    assert Path(made["key"]).exists()


def test_an_authority_past_its_end_signs_nothing(call: Caller, tmp_path: Path) -> None:
    """With an issuer that expired, `issue` and `up` end with the reason, and `list` still works."""
    state = tmp_path / "old"
    two_years_ago = datetime.now(UTC) - timedelta(days=730)
    create_authority(state, Plan("handfast.internal"), GeneratedPassphrase(), now=two_years_ago).close()
    before = serials(state)
    assert call.refused("issue", "web", "--state", state) == (Exit.REFUSED, "issue.issuer_expired")
    up = ("up", "--to", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--state", state)
    assert call.refused(*up) == (Exit.REFUSED, "issue.issuer_expired")
    assert serials(state) == before
    assert call("list", "--state", state).code == Exit.OK


def test_a_port_in_use_is_told(call: Caller, files: Path, state: Path) -> None:
    """`guard` and `up` on a port that is taken end with exit 6 and say which."""
    with App() as taken:
        for words in (GUARD, "up --to 127.0.0.1:1 --state STATE"):
            command = [*_words(words, files, state, state), "--listen", taken.address]
            assert call.refused(*command) == (Exit.UNREACHABLE, "guard.listen")
            assert taken.address in call(*command).err


@pytest.mark.parametrize("greeting", [b"220 mail.example.com ESMTP\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_inspecting_a_server_that_speaks_no_tls(call: Caller, greeting: bytes) -> None:
    """A server that speaks something else, or hangs up, is told as such with exit 6."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_greet, args=(listener, greeting), daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert call.refused("inspect", address) == (Exit.UNREACHABLE, "unreachable")


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(call: Caller, verb: str) -> None:
    """A slip in an option's name is a usage error that says what was perhaps meant and where help is."""
    outcome = call(*verb.split(), "--jsno")
    assert check_refusal(outcome) == "usage"
    assert outcome.code == Exit.USAGE
    assert re.search(r"No such option '--jsno'\. .?Did you mean .*'--json'", outcome.err)
    assert outcome.err.endswith(f"  next: see: handfast {verb} --help\n")


def _words(text: str, files: Path, state: Path, out: Path, bad: str = "") -> list[str]:
    words = []
    for word in shlex.split(text):
        if word == "FILE":
            word = str(files / bad)
        elif word.startswith("@"):
            word = str(files / word[1:])
        elif word.startswith("OUT"):
            word = str(out) + word[3:]
        words.append(str(state) if word == "STATE" else word)
    return words


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.*")}


def _save_key(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> None:
    locked = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    path.chmod(0o600)


def _request(host: str) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), False)
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.PEM)


def _list(ca: Ca) -> bytes:
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.certificate.subject)
    builder = builder.last_update(now - timedelta(hours=1)).next_update(now + timedelta(days=1))
    builder = builder.add_extension(x509.CRLNumber(1), False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), False)
    return builder.sign(ca.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _greet(listener: socket.socket, greeting: bytes) -> None:
    while (connection := accepted(listener)) is not None:
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(greeting)
