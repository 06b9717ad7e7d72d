"""Whose turn it is when files and an authority's feed change at once: neither waits for the other for ever."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handfast.errors import HandfastError
from handfast.guard.assembly import Assembly
from handfast.guard.routes import Snapshot
from handfast.guard.schema import Config, ListenerConfig, SiteConfig
from handfast.pki.revocation import Revocations
from handfast.pki.verification import TrustBundle
from tests.support.certs import Ca

NOW = datetime.now(UTC)


@dataclass
class Ledger:
    """A feed whose authority revokes one more certificate whenever `count` grows."""

    ca: Ca
    count: int = 0
    busy: bool = False  # it revokes one more each time that it is asked

    def revision(self) -> int:
        self.count += self.busy
        return self.count

    def bundle(self) -> TrustBundle:
        return TrustBundle((self.ca.certificate,))

    def revocations(self, now: datetime) -> Revocations:
        return Revocations(frozenset((b"issuer", serial) for serial in range(self.count)))


@pytest.fixture
def assembly(ca: Ca, tmp_path: Path) -> Assembly:
    """One site that takes the clients of a feed's authority, and has a file of rules."""
    ca.server().save(tmp_path, "server")
    rules = tmp_path / "rules"
    rules.write_text("any\n")
    site = SiteConfig(cert=tmp_path / "server.crt", key=tmp_path / "server.key", to="127.0.0.1:9", allow_file=rules)
    assembly = Assembly(Config(listeners=(ListenerConfig(site=site),)), lambda _path: b"", feed=Ledger(ca))
    assembly.build(NOW)
    return assembly


def _feed(assembly: Assembly) -> Ledger:
    assert isinstance(assembly.feed, Ledger)
    return assembly.feed


def _revoked(snapshot: Snapshot | None) -> int:
    assert snapshot is not None
    (sites,) = snapshot.sites.values()
    return len(sites.all[0].context.terms.revocations.serials)


def _rules(assembly: Assembly) -> Path:
    path = assembly.config.listeners[0].all_sites[0].allow_file
    assert path is not None
    return path


def test_a_revocation_that_comes_as_a_bad_file_is_read_is_not_lost(assembly: Assembly) -> None:
    """What the authority said while files were found wanting is in force with the next tick, and tried no more than
    needed.
    """
    feed, rules = _feed(assembly), _rules(assembly)
    rules.write_text("allow nonsense(\n")
    assembly.reload()
    with pytest.raises(HandfastError):
        assembly.refresh(NOW)
    feed.count = 3
    assert _revoked(assembly.refresh(NOW)) == 3
    with pytest.raises(HandfastError):  # the file is looked at again, and told again
        assembly.refresh(NOW)
    assert assembly.refresh(NOW) is None
    feed.busy = True  # it grows between one look and the next
    assembly.reload()
    seen = []
    for tick in range(6):
        try:
            seen.append(_revoked(assembly.refresh(NOW + timedelta(seconds=tick))))
        except HandfastError:
            continue
    feed.busy = False
    assert seen
    last = assembly.refresh(NOW + timedelta(minutes=1))
    assert last is None or _revoked(last) == feed.count


def test_files_do_not_wait_for_a_feed_that_keeps_changing(assembly: Assembly) -> None:
    """While the authority revokes one certificate after the other, a changed file is taken within two turns."""
    feed, rules = _feed(assembly), _rules(assembly)
    feed.busy = True
    rules.write_text("deny any\n")
    assembly.reload()
    turns = [assembly.refresh(NOW), assembly.refresh(NOW)]
    policies = [snapshot.sites["listener-1"].all[0].routes[0].policy for snapshot in turns if snapshot is not None]
    assert str(policies[-1].rules[0]) == "deny any"
    assert _revoked(turns[-1]) > 0
