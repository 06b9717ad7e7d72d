"""An authority of ours as a guard's source of trust; it joins the two, which do not know each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from handfast.authority import Authority
from handfast.cli.opening import opened
from handfast.guard.assembly import Feed
from handfast.pki.revocation import Revocations
from handfast.pki.verification import TrustBundle


@contextmanager
def open_feed(state: Path) -> Iterator[Feed]:
    """Open the authority in a state folder. Raises StoreError."""
    with opened(state) as authority:
        yield _AuthorityFeed(authority)


class _AuthorityFeed:
    """An authority of ours, as the guard sees it."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority

    def revision(self) -> int:
        """See Feed."""
        return self._authority.revision()

    def bundle(self) -> TrustBundle:
        """See Feed."""
        return TrustBundle(self._authority.trust_bundle(), self._authority.trust_domain)

    def revocations(self, now: datetime) -> Revocations:
        """See Feed."""
        return self._authority.revocations(now=now)
