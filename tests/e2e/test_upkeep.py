"""What keeps `up` going for weeks, the clock turned by hand: renewals, and revocations that never wait for them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509 import Certificate

from handfast.authority import Authority, GeneratedPassphrase, open_authority
from handfast.cli.clients import ClientFiles
from handfast.cli.upkeep import LISTENER, Upkeep
from handfast.errors import HandfastError, InvalidInput, Reason
from handfast.files import generate_key
from handfast.guard.places import parse_target
from handfast.guard.upstream import Backend, Upstreams
from handfast.pki.certificates import parse_certificates, serial_text
from handfast.pki.issuing import Order
from handfast.pki.keys import KeyType, parse_private_key, same_key
from handfast.pki.names import parse_name
from handfast.pki.pkcs12 import parse_p12
from handfast.pki.profiles import PROFILES
from handfast.policy import ALLOW_ANY
from handfast.tls.server import ServerSettings
from tests.e2e.kit import serials

CLIENT = parse_name("spiffe://handfast.internal/client")
UPSTREAMS = Upstreams("app", (Backend(parse_target("127.0.0.1:1")),))
HOUR, TICK = timedelta(hours=1), timedelta(seconds=0.5)


@pytest.fixture
def authority(state: Path) -> Iterator[Authority]:
    with open_authority(state, GeneratedPassphrase()) as opened:
        yield opened


@pytest.fixture
def files(state: Path) -> ClientFiles:
    return ClientFiles(CLIENT, state / "clients" / "client")


def upkeep(authority: Authority, *clients: ClientFiles) -> Upkeep:
    return Upkeep(authority, UPSTREAMS, ALLOW_ANY, ServerSettings(), (parse_name("localhost"),), clients)


def issue(authority: Authority, name: str, now: datetime) -> Certificate:
    """A certificate that somebody issues beside `up`."""
    names = (parse_name(name),)
    order = Order(PROFILES["client"], names, generate_key(KeyType.P256).public_key())
    return authority.issue(order, authority.authorize(names, order.profile, now=now), now=now).certificate


def whole(files: ClientFiles) -> bool:
    """Whether certificate, key and PKCS#12 file belong together."""
    leaf = parse_certificates(files.cert.read_bytes(), "crt")[0]
    key = parse_private_key(files.key.read_bytes(), "key")
    _, (in_p12, *_) = parse_p12(files.p12.read_bytes(), "p12", files.p12_password.read_bytes().strip())
    return same_key(key.public_key(), leaf.public_key()) and in_p12 == leaf  # type: ignore[arg-type]  # an EC key


def test_nothing_is_made_anew_before_half_time(authority: Authority, state: Path, files: ClientFiles) -> None:
    """A tick on which nothing is due makes no snapshot and issues nothing; past half time both leaves are renewed."""
    now = datetime.now(UTC)
    keeping = upkeep(authority, files)
    keeping.snapshot(now)
    assert len(serials(state)) == 2
    assert keeping.refresh(now + TICK) is None
    assert keeping.refresh(now + 11 * HOUR) is None
    assert len(serials(state)) == 2
    before = files.cert.read_bytes()
    assert keeping.refresh(now + 13 * HOUR) is not None
    assert len(serials(state)) == 4
    assert files.cert.read_bytes() != before
    assert whole(files)
    assert files.key.stat().st_mode & 0o777 == 0o600


def test_a_renewal_that_fails_holds_up_no_revocation(authority: Authority, state: Path, files: ClientFiles) -> None:
    """Where client files cannot be written it says so, tries once a minute, and takes revocations meanwhile."""
    now = datetime.now(UTC)
    keeping = upkeep(authority, files)
    keeping.snapshot(now)
    other = issue(authority, "spiffe://handfast.internal/other", now)
    (state / "clients").rename(state / "moved")
    (state / "clients").touch(mode=0o600)
    late = now + 13 * HOUR
    with pytest.raises(HandfastError):
        keeping.refresh(late)
    begun = len(serials(state))
    authority.revoke("other")
    taken = keeping.refresh(late + TICK)
    assert taken is not None
    assert taken.sites[LISTENER].all[0].context.terms.revocations.revoked(other)
    for tick in range(2, 100):
        keeping.refresh(late + tick * TICK)
    assert len(serials(state)) == begun + 1  # the server's own, and no client's on each tick
    (state / "clients").unlink()
    (state / "moved").rename(state / "clients")
    keeping.refresh(late + timedelta(seconds=70))
    assert len(serials(state)) == begun + 2
    assert whole(files)


@pytest.mark.parametrize("lost", ["cert", "key", "p12", "p12_password"])
def test_client_files_that_are_not_whole_are_made_anew(authority: Authority, files: ClientFiles, lost: str) -> None:
    """A start with any of a client's files gone, as after a kill between two of them, makes a whole set."""
    now = datetime.now(UTC)
    upkeep(authority, files).snapshot(now)
    before = files.cert.read_bytes()
    upkeep(authority, files).snapshot(now)
    assert files.cert.read_bytes() == before
    getattr(files, lost).unlink()
    upkeep(authority, files).snapshot(now)
    assert whole(files)


@pytest.mark.parametrize("lost", [False, True])
def test_a_revoked_client_gets_no_other_certificate(authority: Authority, files: ClientFiles, lost: bool) -> None:
    """Neither the next start, with its files or without, nor a running `up` gives a revoked name a new certificate."""
    now = datetime.now(UTC)
    running = upkeep(authority, files)
    running.snapshot(now)
    before = files.cert.read_bytes()
    (revoked,) = authority.revoke(str(CLIENT))
    if lost:
        files.cert.unlink()
    next_start = upkeep(authority, files)
    next_start.snapshot(now)
    for keeping in (running, next_start):
        keeping.refresh(now + TICK)
        keeping.refresh(now + 13 * HOUR)
        assert keeping.withheld == {files: revoked.revoked_at}
    assert not files.cert.exists() if lost else files.cert.read_bytes() == before
    assert [record.revoked_at is None for record in authority.find(str(CLIENT))] == [False]


def test_a_name_that_is_issued_again_on_purpose_is_kept(authority: Authority, files: ClientFiles) -> None:
    """After a revocation, a certificate that somebody issues has the client's files made anew, PKCS#12 and all."""
    now = datetime.now(UTC)
    upkeep(authority, files).snapshot(now)
    authority.revoke(str(CLIENT))
    keeping = upkeep(authority, files)
    keeping.snapshot(now)
    assert keeping.withheld
    issue(authority, str(CLIENT), now + timedelta(seconds=2))
    snapshot = upkeep(authority, files).snapshot(now + timedelta(seconds=2))
    assert keeping.refresh(now + timedelta(seconds=90)) is None
    assert keeping.withheld == {}
    leaf = parse_certificates(files.cert.read_bytes(), "crt")[0]
    assert not snapshot.sites[LISTENER].all[0].context.terms.revocations.revoked(leaf)
    assert whole(files)


def test_a_client_of_which_another_certificate_is_revoked_is_renewed(authority: Authority, files: ClientFiles) -> None:
    """To revoke one serial of a name leaves the certificate that `up` keeps for it, and its renewal."""
    now = datetime.now(UTC)
    old = issue(authority, str(CLIENT), now - timedelta(seconds=5))
    keeping = upkeep(authority, files)
    keeping.snapshot(now)
    authority.revoke(serial_text(old.serial_number))
    before = files.cert.read_bytes()
    keeping.refresh(now + TICK)
    keeping.refresh(now + 13 * HOUR)
    assert keeping.withheld == {}
    assert files.cert.read_bytes() != before
    assert whole(files)


def test_two_clients_do_not_share_files(authority: Authority, state: Path, files: ClientFiles) -> None:
    """Two names whose files would be the same are refused before anything is issued; one name twice is one."""
    other = ClientFiles(parse_name("spiffe://handfast.internal/ops/client"), files.base)
    with pytest.raises(InvalidInput) as refused:
        upkeep(authority, files, other)
    assert refused.value.reason is Reason.INPUT_NAME
    upkeep(authority, files, files).snapshot(datetime.now(UTC))
    assert len(serials(state)) == 2


def test_an_issuer_near_its_end_is_not_asked_over_and_over(
    authority: Authority, state: Path, files: ClientFiles
) -> None:
    """In its issuer's last minutes, when certificates get ever shorter, `up` renews at most once a minute."""
    end = authority.issuer.not_valid_after_utc
    keeping = upkeep(authority, files)
    keeping.snapshot(end - timedelta(seconds=300))
    for second in range(299, 0, -1):
        keeping.refresh(end - timedelta(seconds=second))
    assert len(serials(state)) <= 2 * 6
