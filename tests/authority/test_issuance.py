from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.authority import Authority, Issued, RevocationReason, Step
from handfast.authority.issuance import sign_as_rehearsed, throwaway_key
from handfast.authority.state import utc_now
from handfast.errors import IssuanceRefused, Reason, StoreError
from handfast.files import load_key
from handfast.pki.certificates import certificate_names, parse_certificates, serial_text
from handfast.pki.issuing import Issuer, Order, build_certificate, sign
from handfast.pki.names import parse_name
from handfast.pki.profiles import PROFILES
from tests.authority.disks import fill
from tests.authority.kit import CLIENT, LEAF_KEY, PEER, check, found, issue, name, order, query, reopen


def _refusal(call: Callable[[], object]) -> Reason:
    with pytest.raises((IssuanceRefused, StoreError)) as refused:
        call()
    assert isinstance(refused.value, IssuanceRefused | StoreError)
    return refused.value.reason


def test_a_certificate_is_stored_before_it_is_given(authority: Authority, folder: Path) -> None:
    """What is issued is on record byte for byte, named, audited, and signed by the issuer."""
    issued = issue(authority)
    issued.certificate.verify_directly_issued_by(authority.issuer)
    assert certificate_names(issued.certificate) == (name(),)
    assert parse_certificates(issued.pem, "pem") == (issued.certificate, authority.issuer)
    with reopen(folder) as other:
        (record,) = other.find("web")
        der = issued.certificate.public_bytes(Encoding.DER)
        assert query(folder, "SELECT serial, der FROM certificates") == [(issued.serial, der)]
        assert serial_text(record.serial) == issued.serial
        assert (record.profile, record.names, record.revoked_at) == ("peer", ("spiffe://example.test/web",), None)
        assert record.not_after == issued.certificate.not_valid_after_utc
    assert query(folder, "SELECT state FROM intents") == [("issued",)]
    assert query(folder, "SELECT event FROM audit ORDER BY seq") == [("authority.created",), ("certificate.issued",)]


def test_the_steps_come_in_order(authority: Authority) -> None:
    """An issuance goes through every step, in the order of their definition."""
    steps: list[str] = []
    issue(authority, on_step=steps.append)
    assert steps == list(Step)


def test_an_authorization_is_good_once(authority: Authority) -> None:
    """The second use of an authorization is refused; a new one is good again."""
    allowed = authority.authorize([name()], PEER)
    authority.issue(order(), allowed)
    assert _refusal(lambda: authority.issue(order(), allowed)) is Reason.ISSUE_AUTHORIZATION_SPENT
    authority.issue(order(), authority.authorize([name()], PEER))
    assert len(list(authority.certificates())) == 2


def test_an_authorization_is_spent_by_one_of_many_at_once(authority: Authority) -> None:
    """Of eight threads with the same authorization one gets a certificate."""
    allowed = authority.authorize([name()], PEER)

    def attempt(number: int) -> Issued | Reason:
        try:
            return authority.issue(order(), allowed)
        except IssuanceRefused as refused:
            return refused.reason

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(attempt, range(8)))
    assert [one for one in outcomes if not isinstance(one, Issued)] == [Reason.ISSUE_AUTHORIZATION_SPENT] * 7


def test_an_authorization_holds_for_what_it_says(authority: Authority) -> None:
    """Another name, another profile, and a time past its end are refused, and it stays unspent."""
    now = utc_now()
    allowed = authority.authorize([name("web"), name("api")], PEER, now=now, lifetime=timedelta(minutes=1))
    client = Order(CLIENT, (name(),), LEAF_KEY.public_key())
    late = now + timedelta(minutes=1)
    refusals = {
        Reason.ISSUE_NAME_NOT_AUTHORIZED: lambda: authority.issue(order("db"), allowed, now=now),
        Reason.ISSUE_PROFILE_NOT_AUTHORIZED: lambda: authority.issue(client, allowed, now=now),
        Reason.ISSUE_AUTHORIZATION_EXPIRED: lambda: authority.issue(order(), allowed, now=late),
    }
    for reason, attempt in refusals.items():
        assert _refusal(attempt) is reason
    authority.issue(order("api"), allowed, now=now)  # a subset of its names


def test_an_authorization_of_another_authority_is_a_bug(authority: Authority, tmp_path: Path) -> None:
    """Only the authority that made an authorization takes it."""
    with found(tmp_path / "other") as other, pytest.raises(ValueError, match="another authority"):
        authority.issue(order(), other.authorize([name()], PEER))


def test_only_names_of_the_trust_domain_are_authorized(authority: Authority) -> None:
    """A SPIFFE ID of another trust domain is not authorized; a DNS name has none and is."""
    foreign = parse_name("spiffe://elsewhere.test/web")
    assert _refusal(lambda: authority.authorize([foreign], PEER)) is Reason.ISSUE_TRUST_DOMAIN
    authority.authorize([name(), parse_name("web.example.com")], PEER)


@pytest.mark.parametrize("profile", ["root", "issuer"])
def test_authorities_are_not_issued_like_leaves(authority: Authority, profile: str) -> None:
    """No authorization can be had for an authority's profile."""
    refused = _refusal(lambda: authority.authorize([], PROFILES[profile]))
    assert refused is Reason.ISSUE_PROFILE_NOT_AUTHORIZED


def test_a_refused_order_leaves_no_trace(authority: Authority, folder: Path) -> None:
    """An order that breaks its profile writes nothing, and its authorization is still good."""
    allowed = authority.authorize([name()], PEER)
    refused = _refusal(lambda: authority.issue(order(lifetime=timedelta(days=400)), allowed))
    assert refused is Reason.ISSUE_LIFETIME
    assert query(folder, "SELECT COUNT(*) FROM intents") == [(0,)]
    authority.issue(order(), allowed)


def test_what_is_signed_must_be_what_was_checked(authority: Authority, folder: Path) -> None:
    """A builder that differs from the checked certificate by its serial alone is not let through."""
    key = load_key(folder / "issuer.key", (folder / "passphrase").read_bytes().strip())
    issuer = Issuer(authority.issuer, key, ())
    now = utc_now()
    checked = sign(build_certificate(order(), issuer, 2, now), throwaway_key(key))
    sign_as_rehearsed(build_certificate(order(), issuer, 2, now), checked, key)
    other = build_certificate(order(), issuer, 3, now)
    assert _refusal(lambda: sign_as_rehearsed(other, checked, key)) is Reason.ISSUE_LINT


def test_several_threads_issue_at_the_same_time(authority: Authority) -> None:
    """One authority serves several threads: every certificate is stored, none twice."""
    with ThreadPoolExecutor(4) as threads:
        issued = list(threads.map(lambda number: issue(authority, f"web-{number}"), range(40)))
    assert len({one.serial for one in issued}) == len(list(authority.certificates())) == 40


def test_a_full_disk_issues_nothing_and_loses_nothing(small_disk: Path) -> None:
    """With a full disk issuing is refused; with space again it goes on, and all that was issued is there."""
    with found(small_disk / "state") as authority:
        issue(authority)
        filler = fill(small_disk)
        refused = None
        for _ in range(200):  # the log's file has some room left in it
            try:
                issue(authority)
            except StoreError as error:
                refused = error.reason
                break
        assert refused is Reason.STORE_FULL
        before = len(list(authority.certificates()))
        filler.unlink()
        issue(authority)
        assert len(list(authority.certificates())) == before + 1
        check(small_disk / "state")


# Revoking and finding


def test_revoking_a_serial_leaves_its_sibling(authority: Authority) -> None:
    """Only the certificate of the serial is revoked, by its first digits or written with colons."""
    first, second = issue(authority), issue(authority)
    (revoked,) = authority.revoke(first.serial[:16], RevocationReason.KEY_COMPROMISE)
    assert serial_text(revoked.serial) == first.serial
    revocations = authority.revocations()
    assert revocations.revoked(first.certificate)
    assert not revocations.revoked(second.certificate)
    pairs = ":".join(second.serial[at : at + 2] for at in range(0, len(second.serial), 2))
    authority.revoke(pairs.upper())
    assert authority.revocations().revoked(second.certificate)


def test_revoking_a_name_revokes_all_of_it(authority: Authority) -> None:
    """Every certificate of a name that has not ended is revoked, and no other; the reason is kept."""
    old = issue(authority, now=utc_now() - timedelta(days=3))
    current = [issue(authority) for _ in range(3)]
    other = issue(authority, "api")
    revoked = authority.revoke("web", RevocationReason.SUPERSEDED)
    assert {serial_text(one.serial) for one in revoked} == {one.serial for one in current}
    assert {one.names for one in revoked} == {("spiffe://example.test/web",)}
    revocations = authority.revocations()
    assert [revocations.revoked(one.certificate) for one in (*current, old, other)] == [True] * 3 + [False] * 2
    assert authority.find("web")[0].reason is RevocationReason.SUPERSEDED


def test_revoking_twice_is_refused(authority: Authority) -> None:
    """What was revoked is not revoked again: its date and reason stay."""
    issued = issue(authority)
    authority.revoke(issued.serial, RevocationReason.KEY_COMPROMISE)
    assert _refusal(lambda: authority.revoke("web")) is Reason.STORE_ALREADY_REVOKED
    assert _refusal(lambda: authority.revoke(issued.serial)) is Reason.STORE_ALREADY_REVOKED
    assert authority.find("web")[0].reason is RevocationReason.KEY_COMPROMISE
    assert authority.revision() == 1


@pytest.mark.parametrize("text", ["nobody", "4000ffff", "40", "", "%", "spiffe://example.test/nobody", "ü"])
def test_what_is_not_known_is_not_revoked(authority: Authority, text: str) -> None:
    """A name or serial that was never issued is refused, and so is too short a piece of a serial."""
    issue(authority)
    assert _refusal(lambda: authority.revoke(text)) is Reason.STORE_NO_CERTIFICATE
    assert _refusal(lambda: authority.find(text)) is Reason.STORE_NO_CERTIFICATE


def test_a_prefix_of_several_serials_revokes_none(authority: Authority) -> None:
    """A piece that fits several serials is refused, and none is revoked; to find, it may fit several."""
    serials = {issue(authority).serial for _ in range(2)}
    first, second = sorted(serials)
    shared = first[: next(at for at in range(36) if first[at] != second[at])]
    assert _refusal(lambda: authority.revoke(shared)) is Reason.STORE_AMBIGUOUS
    assert {serial_text(record.serial) for record in authority.find(shared)} == serials
    assert authority.revocations().serials == frozenset()


def test_a_name_is_found_in_each_way_it_is_written(authority: Authority) -> None:
    """A bare name is one of the trust domain; a whole SPIFFE ID and a DNS name are found as well."""
    names = (name("web"), parse_name("web.example.com"))
    allowed = authority.authorize(names, PEER)
    authority.issue(Order(PEER, names, LEAF_KEY.public_key()), allowed)
    for text in ("web", "spiffe://example.test/web", "web.example.com", "dns:WEB.example.com"):
        assert authority.find(text)[0].names == tuple(map(str, names))
    assert _refusal(lambda: authority.find("api")) is Reason.STORE_NO_CERTIFICATE


def test_lists_what_ends_soon(authority: Authority) -> None:
    """A list holds what has not ended, the first to end first; it can be cut to what ends soon, or widened."""
    now = utc_now()
    for text, hours in (("later", 20), ("soon", 2)):
        issue(authority, text, lifetime=timedelta(hours=hours), now=now)
    issue(authority, "ended", lifetime=timedelta(hours=1), now=now - timedelta(days=1))

    def listed(**limits: timedelta | bool) -> list[str]:
        expiring = limits.get("expiring")
        assert expiring is None or isinstance(expiring, timedelta)
        found = authority.certificates(expiring=expiring, ended=limits.get("ended") is True, now=now)
        return [record.names[0].removeprefix("spiffe://example.test/") for record in found]

    assert listed() == ["soon", "later"]
    assert listed(expiring=timedelta(hours=3)) == ["soon"]
    assert listed(expiring=timedelta(minutes=3)) == []
    assert listed(ended=True) == ["ended", "soon", "later"]


def test_openssl_reads_the_revocation_list(authority: Authority, tmp_path: Path) -> None:
    """The revocation list is signed by the issuer, and openssl refuses the revoked leaf and takes the other."""
    revoked, good = issue(authority, "a"), issue(authority, "b")
    authority.revoke("a", RevocationReason.KEY_COMPROMISE)
    crl = authority.crl()
    bundle = tmp_path / "crl.pem"
    bundle.write_bytes(crl.public_bytes(Encoding.PEM))
    for issued, code in ((revoked, 2), (good, 0)):
        leaf = tmp_path / "leaf.crt"
        leaf.write_bytes(issued.pem)
        command = f"openssl verify -crl_check -CRLfile {bundle} -CAfile {authority.folder}/root.crt".split()
        done = subprocess.run([*command, "-untrusted", str(leaf), str(leaf)], capture_output=True, check=False)
        assert done.returncode == code, done.stderr


@pytest.mark.parametrize("reason", list(RevocationReason))
def test_every_reason_comes_out_in_the_list(authority: Authority, reason: RevocationReason) -> None:
    """Each reason is in the list under its RFC 5280 name; unspecified is left out, as 5.3.1 asks."""
    issued = issue(authority)
    authority.revoke("web", reason)
    entry = authority.crl().get_revoked_certificate_by_serial_number(issued.certificate.serial_number)
    assert entry is not None
    stated = [extension.value for extension in entry.extensions if isinstance(extension.value, x509.CRLReason)]
    expected = [] if reason is RevocationReason.UNSPECIFIED else [x509.CRLReason(x509.ReasonFlags[reason.value])]
    assert stated == expected


def test_each_list_has_a_larger_number(authority: Authority, folder: Path) -> None:
    """The number of a revocation list grows, also when another process makes the next one."""

    def number(maker: Authority) -> int:
        return maker.crl().extensions.get_extension_for_class(x509.CRLNumber).value.crl_number

    with reopen(folder) as other:
        assert [number(authority), number(other), number(authority)] == [1, 2, 3]


def test_a_revocation_stays_for_one_list_past_the_end(authority: Authority) -> None:
    """An entry is still in a list made just after its certificate ended, and gone a day later (RFC 5280 3.3)."""
    issued = issue(authority, lifetime=timedelta(hours=1))
    authority.revoke("web")
    end = issued.certificate.not_valid_after_utc
    assert len(authority.crl(now=end + timedelta(hours=1))) == 1
    assert len(authority.crl(now=end + timedelta(hours=25))) == 0
    assert authority.revocations(now=end + timedelta(hours=25)).serials == frozenset()


def test_times_are_kept_to_the_second(authority: Authority) -> None:
    """What the ledger gives back is what the certificate says, in UTC."""
    issued = issue(authority, now=datetime.now(UTC).replace(microsecond=999_999))
    (record,) = authority.find("web")
    assert record.not_before == issued.certificate.not_valid_before_utc
    assert record.not_after == issued.certificate.not_valid_after_utc


def test_an_authority_may_allow_longer_lives(authority: Authority) -> None:
    """Eight days are refused until the authority allows them; then they are issued, and nine are not."""

    def ask(days: int) -> timedelta:
        wanted = order("long", timedelta(days=days))
        certificate = authority.issue(wanted, authority.authorize(wanted.names, wanted.profile)).certificate
        return certificate.not_valid_after_utc - certificate.not_valid_before_utc

    assert _refusal(lambda: ask(8)) is Reason.ISSUE_LIFETIME
    authority.allow_lifetime(timedelta(days=8))
    assert ask(8) >= timedelta(days=8)
    assert _refusal(lambda: ask(9)) is Reason.ISSUE_LIFETIME
    authority.allow_lifetime(timedelta(hours=1))
    assert _refusal(lambda: ask(1)) is Reason.ISSUE_LIFETIME
