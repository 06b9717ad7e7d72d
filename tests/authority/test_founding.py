from __future__ import annotations

import os
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from handfast.authority import (
    AskedPassphrase,
    Authority,
    Existing,
    GeneratedPassphrase,
    PassphraseFile,
    Plan,
    create_authority,
    import_authority,
    open_authority,
)
from handfast.errors import HandfastError, InvalidInput, IssuanceRefused, Reason, StoreError
from handfast.files import load_key
from handfast.pki.keys import KeyType, key_type_of
from tests.authority.disks import fill, remount
from tests.authority.kit import PEER, PLAN, TRUST_DOMAIN, found, issue, name, order, query, reopen


def _secret(text: bytes) -> AskedPassphrase:
    return AskedPassphrase(lambda question: text)


def _openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)


def _refusal(authority_maker: object, *arguments: object) -> HandfastError:
    assert callable(authority_maker)
    with pytest.raises(HandfastError) as refused:
        authority_maker(*arguments)
    return refused.value


def test_a_new_authority_is_whole_and_private(authority: Authority, folder: Path) -> None:
    """A new authority has a root and an issuer below it, and everything but the certificates is 0600."""
    (root,) = authority.trust_bundle()
    assert root.issuer == root.subject
    authority.issuer.verify_directly_issued_by(root)
    assert authority.chain() == (authority.issuer,)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {file for file, mode in modes.items() if mode != 0o600} == {"root.crt", "issuer.crt"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_key_types_are_as_planned(authority: Authority, tmp_path: Path) -> None:
    """The root is P-384 and the issuer P-256 unless the plan says other."""
    secret = (authority.folder / "passphrase").read_bytes().strip()
    types = [key_type_of(load_key(authority.folder / f, secret).public_key()) for f in ("root.key", "issuer.key")]
    assert types == [KeyType.P384, KeyType.P256]
    plan = Plan(TRUST_DOMAIN, KeyType.ED25519, KeyType.P384)
    with create_authority(tmp_path / "other", plan, GeneratedPassphrase()) as other:
        secret = (other.folder / "passphrase").read_bytes().strip()
        types = [key_type_of(load_key(other.folder / f, secret).public_key()) for f in ("root.key", "issuer.key")]
        assert types == [KeyType.ED25519, KeyType.P384]
        issue(other)


def test_openssl_accepts_what_it_issues(authority: Authority, tmp_path: Path) -> None:
    """Openssl verifies a leaf against root.crt with the issuer between them, and not without the issuer."""
    leaf = tmp_path / "leaf.crt"
    leaf.write_bytes(issue(authority).pem)
    root, issuer = authority.folder / "root.crt", authority.folder / "issuer.crt"
    strict = ("verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", root)
    assert _openssl(*strict, "-untrusted", issuer, leaf).returncode == 0
    assert _openssl(*strict, leaf).returncode != 0


def test_the_keys_are_encrypted_with_the_passphrase(folder: Path, tmp_path: Path) -> None:
    """A human passphrase encrypts both keys with 600 000 rounds; another one signs nothing."""
    create_authority(folder, PLAN, _secret(b"correct horse")).close()
    for file in ("root.key", "issuer.key"):
        shown = _openssl("asn1parse", "-in", folder / file).stdout  # the outer structure only
        assert "PBES2" in shown
        assert ":0927C0" in shown  # 600 000
    with open_authority(folder, _secret(b"correct horse")) as authority:
        issue(authority)
    with open_authority(folder, _secret(b"wrong horse")) as authority:
        with pytest.raises(InvalidInput) as refused:
            issue(authority)
        assert refused.value.reason is Reason.INPUT_WRONG_PASSPHRASE
        assert "horse" not in str(refused.value)
        assert query(folder, "SELECT COUNT(*) FROM intents") == [(1,)]
    assert not (folder / "passphrase").exists()


def test_a_person_is_asked_once(folder: Path) -> None:
    """Who has just given a new authority its passphrase is not asked for it again to issue; later, once."""
    questions: list[str] = []

    def ask(question: str) -> bytes:
        questions.append(question)
        return b"correct horse"

    with create_authority(folder, PLAN, AskedPassphrase(ask)) as authority:
        issue(authority)
    assert len(questions) == 1
    with open_authority(folder, AskedPassphrase(ask)) as authority:
        issue(authority)
        issue(authority)
    assert len(questions) == 2


def test_only_signing_needs_the_passphrase(authority: Authority, folder: Path) -> None:
    """Listing, revoking and reading revocations ask for no passphrase; issuing and signing a list do."""
    issue(authority)
    nowhere = PassphraseFile(folder / "no-such-file")
    with open_authority(folder, nowhere) as keyless:
        assert len(list(keyless.certificates())) == 1
        keyless.revoke("web")
        assert len(keyless.revocations().serials) == 1
        with pytest.raises(InvalidInput) as refused:
            keyless.crl()
        assert refused.value.reason is Reason.INPUT_MISSING


def test_a_second_authority_does_not_overwrite_the_first(authority: Authority, folder: Path) -> None:
    """Making an authority where there is one is refused, and the first one still issues."""
    before = {path.name: path.read_bytes() for path in folder.glob("*.key")}
    assert _refusal(found, folder).reason is Reason.STORE_EXISTS
    assert {path.name: path.read_bytes() for path in folder.glob("*.key")} == before
    issue(authority)


def test_keys_without_a_ledger_are_not_swept(authority: Authority, folder: Path) -> None:
    """Where only the ledger was lost, a new authority is refused rather than made over the old keys."""
    authority.close()
    for path in folder.glob("ledger.db*"):
        path.unlink()
    refused = _refusal(found, folder)
    assert refused.reason is Reason.STORE_EXISTS
    assert (folder / "root.key").exists()
    assert _refusal(reopen, folder).reason is Reason.STORE_NO_AUTHORITY


def test_where_there_is_nothing_there_is_no_authority(folder: Path, tmp_path: Path) -> None:
    """A missing folder, an empty one, and a path through a file hold no authority."""
    (tmp_path / "empty").mkdir(mode=0o700)
    (tmp_path / "file").touch()
    for path in (folder, tmp_path / "empty", tmp_path / "file" / "state"):
        assert _refusal(reopen, path).reason is Reason.STORE_NO_AUTHORITY


@pytest.mark.parametrize("trust_domain", ["", "Example.test", "a/b", "a b"])
def test_a_bad_trust_domain_makes_nothing(folder: Path, trust_domain: str) -> None:
    """A trust domain that SPIFFE does not know is refused before anything is written."""
    refused = _refusal(create_authority, folder, Plan(trust_domain), GeneratedPassphrase())
    assert refused.reason is Reason.INPUT_NAME
    assert not folder.exists()


def test_a_long_trust_domain_fits_its_subjects(folder: Path) -> None:
    """The longest trust domain still makes common names that X.509 allows."""
    with create_authority(folder, Plan("a" * 255), GeneratedPassphrase()) as authority:
        (attribute,) = authority.issuer.subject
        assert len(str(attribute.value)) == 64


def test_a_constrained_authority_says_so_and_keeps_to_it(folder: Path) -> None:
    """A constrained authority carries critical name constraints and issues only for names within."""
    permitted = (name("spiffe://example.test"), name("dns:internal.test"))
    with create_authority(folder, Plan(TRUST_DOMAIN, permitted=permitted), GeneratedPassphrase()) as authority:
        for certificate in (authority.trust_bundle()[0], authority.issuer):
            extension = certificate.extensions.get_extension_for_class(x509.NameConstraints)
            assert extension.critical
            assert extension.value.permitted_subtrees is not None
            assert len(extension.value.permitted_subtrees) == 2
        issue(authority)


def test_a_folder_that_others_may_enter_is_refused(authority: Authority, folder: Path) -> None:
    """An authority whose folder was opened to others is neither opened nor made."""
    authority.close()
    folder.chmod(0o750)
    assert _refusal(reopen, folder).reason is Reason.STORE_TOO_OPEN
    assert _refusal(found, folder).reason is Reason.STORE_TOO_OPEN
    folder.chmod(0o700)
    reopen(folder).close()


def test_a_key_that_others_may_read_signs_nothing(authority: Authority, folder: Path) -> None:
    """A key file that was opened to others is refused when it is needed."""
    (folder / "issuer.key").chmod(0o644)
    with pytest.raises(StoreError) as refused:
        issue(authority)
    assert refused.value.reason is Reason.STORE_TOO_OPEN


def test_a_key_of_another_authority_signs_nothing(authority: Authority, folder: Path, tmp_path: Path) -> None:
    """An issuer.key that does not belong to the ledger's issuer is refused."""
    with found(tmp_path / "other") as other:
        for file in ("issuer.key", "passphrase"):
            os.replace(other.folder / file, folder / file)
    with reopen(folder) as mixed_up, pytest.raises(InvalidInput) as refused:
        issue(mixed_up)
    assert refused.value.reason is Reason.INPUT_KEY_MISMATCH


def test_a_full_disk_makes_no_authority_and_leaves_no_half(small_disk: Path) -> None:
    """Where the disk is full nothing is left but the lock; with space again the authority is made."""
    filler = fill(small_disk)
    assert _refusal(found, small_disk / "state").reason is Reason.STORE_FULL
    left = os.listdir(small_disk / "state") if (small_disk / "state").exists() else []
    assert set(left) <= {"lock"}
    filler.unlink()
    found(small_disk / "state").close()


def test_no_authority_is_made_on_a_read_only_disk(small_disk: Path) -> None:
    """A read-only file system is told as such."""
    remount(small_disk, "ro")
    assert _refusal(found, small_disk / "state").reason is Reason.STORE_READ_ONLY


# Importing


def _make_root(folder: Path, *options: str) -> Existing:
    folder.mkdir(exist_ok=True)
    made = Existing(folder / "ca.crt", folder / "ca.key")
    subject = ("-subj", "/O=Old house/CN=Old root", "-days", "30", "-nodes")
    where = ("-keyout", str(made.key), "-out", str(made.certificate))
    done = _openssl("req", "-new", "-x509", "-newkey", "rsa:2048", *subject, *options, *where)
    assert done.returncode == 0, done.stderr
    return made


def _make_below(folder: Path, above: Existing, stem: str, *, extensions: str = "basicConstraints=CA:TRUE") -> Existing:
    made = Existing(folder / f"{stem}.crt", folder / f"{stem}.key")
    request, config = folder / f"{stem}.csr", folder / f"{stem}.cnf"
    config.write_text(extensions + "\n")
    _openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={stem}",
             "-keyout", made.key, "-out", request)  # fmt: skip
    done = _openssl("x509", "-req", "-in", request, "-CA", above.certificate, "-CAkey", above.key, "-CAcreateserial",
                    "-days", "20", "-extfile", config, "-out", made.certificate)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return made


def _imported(folder: Path, existing: Existing, now: datetime | None = None) -> Authority:
    return import_authority(folder, existing, TRUST_DOMAIN, GeneratedPassphrase(), now=now)


def test_a_root_of_openssl_becomes_root_and_issuer(folder: Path, tmp_path: Path) -> None:
    """An RSA root of openssl req -x509, without key usage, issues leaves that openssl verifies."""
    existing = _make_root(tmp_path / "old")
    with _imported(folder, existing) as authority:
        certificate = authority.issuer
        with pytest.raises(x509.ExtensionNotFound):
            certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert authority.trust_bundle() == (certificate,)
        issued = issue(authority)
        assert issued.chain == ()
        (tmp_path / "leaf.crt").write_bytes(issued.pem)
    assert _openssl("verify", "-CAfile", folder / "root.crt", tmp_path / "leaf.crt").returncode == 0
    assert not (folder / "root.key").exists()
    assert b"ENCRYPTED" in (folder / "issuer.key").read_bytes()


def test_an_intermediate_comes_with_its_chain(folder: Path, tmp_path: Path) -> None:
    """An intermediate becomes the issuer and its root the trust bundle; its leaves verify by openssl."""
    root = _make_root(tmp_path / "old")
    middle = _make_below(tmp_path / "old", root, "middle")
    below = _make_below(tmp_path / "old", middle, "below")
    chain = tmp_path / "chain.pem"
    chain.write_bytes(root.certificate.read_bytes() + middle.certificate.read_bytes())
    with _imported(folder, Existing(below.certificate, below.key, chain)) as authority:
        issued = issue(authority)
        assert len(issued.chain) == 2
        assert authority.trust_bundle()[0].subject == issued.chain[-1].issuer
        (tmp_path / "leaf.crt").write_bytes(issued.pem)
    verify = ("verify", "-CAfile", folder / "root.crt", "-untrusted", tmp_path / "leaf.crt", tmp_path / "leaf.crt")
    assert _openssl(*verify).returncode == 0


def test_an_intermediate_without_its_root_is_refused(folder: Path, tmp_path: Path) -> None:
    """An intermediate without chain, or with one that did not sign it, is refused, and nothing is written."""
    below = _make_below(tmp_path / "old", _make_root(tmp_path / "old"), "below")
    stranger = _make_root(tmp_path / "stranger")
    for chain in (None, stranger.certificate, below.certificate):
        refused = _refusal(_imported, folder, Existing(below.certificate, below.key, chain))
        assert refused.reason is Reason.INPUT_NO_CHAIN
    assert not folder.exists()


def test_an_import_checks_that_the_key_belongs(folder: Path, tmp_path: Path) -> None:
    """A key of another certificate is refused."""
    root, other = _make_root(tmp_path / "old"), _make_root(tmp_path / "other")
    refused = _refusal(_imported, folder, Existing(root.certificate, other.key))
    assert refused.reason is Reason.INPUT_KEY_MISMATCH


@pytest.mark.parametrize(
    "extensions",
    ["basicConstraints=CA:FALSE", "subjectKeyIdentifier=hash", "basicConstraints=CA:TRUE\nkeyUsage=digitalSignature"],
)
def test_an_import_must_be_an_authority(folder: Path, tmp_path: Path, extensions: str) -> None:
    """A certificate that may not sign others is refused, whatever it lacks."""
    root = _make_root(tmp_path / "old")
    below = _make_below(tmp_path / "old", root, "below", extensions=extensions)
    refused = _refusal(_imported, folder, Existing(below.certificate, below.key, root.certificate))
    assert refused.reason is Reason.ISSUE_ISSUER_NOT_CA


def test_an_import_minds_the_path_length(folder: Path, tmp_path: Path) -> None:
    """An authority below one that allows none below it is refused: no verifier would take its leaves."""
    root = _make_root(tmp_path / "old")
    middle = _make_below(tmp_path / "old", root, "middle", extensions="basicConstraints=CA:TRUE,pathlen:0")
    below = _make_below(tmp_path / "old", middle, "below")
    chain = tmp_path / "chain.pem"
    chain.write_bytes(root.certificate.read_bytes() + middle.certificate.read_bytes())
    refused = _refusal(_imported, folder, Existing(below.certificate, below.key, chain))
    assert refused.reason is Reason.ISSUE_ISSUER_NOT_CA
    with _imported(folder, Existing(middle.certificate, middle.key, root.certificate)) as authority:
        issue(authority)


def test_an_import_must_not_have_expired(folder: Path, tmp_path: Path) -> None:
    """An authority is taken over a day before its end, and refused a day after."""
    existing = _make_root(tmp_path / "old")
    end = datetime.now(UTC) + timedelta(days=30)
    assert _refusal(_imported, folder, existing, end + timedelta(days=1)).reason is Reason.ISSUE_ISSUER_EXPIRED
    _imported(folder, existing, end - timedelta(days=1)).close()


def test_a_weak_import_is_refused(folder: Path, tmp_path: Path) -> None:
    """A root with an RSA key of 1024 bits is refused."""
    existing = _make_root(tmp_path / "old", "-newkey", "rsa:1024")
    assert _refusal(_imported, folder, existing).reason is Reason.ISSUE_WEAK_KEY


def test_an_encrypted_key_is_imported_with_its_passphrase(folder: Path, tmp_path: Path) -> None:
    """The old passphrase opens the key once; from then on it has the new one."""
    existing = _make_root(tmp_path / "old")
    encrypted = tmp_path / "encrypted.key"
    _openssl("pkcs8", "-topk8", "-in", existing.key, "-out", encrypted, "-passout", "pass:old", "-v2", "aes256")
    refused = _refusal(_imported, folder, Existing(existing.certificate, encrypted))
    assert refused.reason is Reason.INPUT_KEY_ENCRYPTED
    with _imported(folder, Existing(existing.certificate, encrypted, key_passphrase=b"old")) as authority:
        issue(authority)


def test_leaves_of_an_expired_issuer_are_refused(folder: Path) -> None:
    """An issuer past its end signs nothing."""
    with found(folder) as authority:
        late = authority.issuer.not_valid_after_utc + timedelta(days=1)
        allowed = authority.authorize([name()], PEER, now=late)
        with pytest.raises(IssuanceRefused) as refused:
            authority.issue(order(), allowed, now=late)
        assert refused.value.reason is Reason.ISSUE_ISSUER_EXPIRED
