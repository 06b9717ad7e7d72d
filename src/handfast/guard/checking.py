"""Between handshake and session: a client that waits for a responder's word, and open ones that are asked about anew.

Nothing in here can reach an app: what was proven so far is handed back once the word is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from handfast.errors import Failure, Reason
from handfast.guard.ocsp import TIMEOUT, OcspChecker, Verdict
from handfast.pki.certificates import label
from handfast.pki.verification import VerifiedPeer
from handfast.tls.server import Accepted

if TYPE_CHECKING:
    from handfast.guard.connection import Connection

MAX_HELD = 1 << 18  # bytes that may have been read already when reading stops
DEADLINE = 2 * TIMEOUT + 1  # seconds; the checker is done before

GoOn = Callable[["Connection", Accepted, Verdict], None]


class Checking:
    """A client that proved who it is, while its authority's responder is asked. It is not read from meanwhile."""

    __slots__ = ("_accepted", "_connection", "_go_on", "_held", "_task")

    def __init__(self, connection: Connection, accepted: Accepted, checker: OcspChecker, go_on: GoOn) -> None:
        """`go_on` is called with the verdict; it lets the client in or refuses it."""
        assert accepted.peer is not None
        self._connection = connection
        self._accepted = accepted
        self._go_on = go_on
        self._held = 0
        connection.set_deadline(DEADLINE)
        if not connection.transport.is_closing():
            connection.transport.pause_reading()
        self._task = asyncio.get_running_loop().create_task(self._wait(checker, accepted.peer))

    def received(self, data: bytes) -> None:
        """What was on its way when reading stopped; kept for the session, within bounds."""
        self._held += len(data)
        if self._held > MAX_HELD:
            self._connection.denied(Failure(Reason.TLS_HANDSHAKE, {"detail": "too much was sent before an answer"}))
            self._connection.abort()
            return
        self._accepted.channel.feed(data)

    def ended(self) -> None:
        """The client went away: nobody waits for the word."""
        self._connection.denied(Failure(Reason.TLS_CLOSED))
        self._connection.abort()

    def writable(self, yes: bool) -> None:
        """Nothing is written here."""

    def lost(self) -> None:
        """The client is gone."""
        self._task.cancel()

    def expired(self) -> None:
        """The word did not come in time, which the checker should have said itself: refuse."""
        self._task.cancel()
        assert self._accepted.peer is not None
        facts = {"subject": label(self._accepted.peer.leaf), "detail": f"no answer in {DEADLINE:g} s"}
        self._finish(Verdict(Failure(Reason.VERIFY_OCSP_UNAVAILABLE, facts)))

    async def _wait(self, checker: OcspChecker, peer: VerifiedPeer) -> None:
        try:
            self._finish(await checker.check(peer, self._connection.guard.now))
        except Exception as bug:
            self._connection.bug(bug)

    def _finish(self, verdict: Verdict) -> None:
        connection = self._connection
        if connection.transport.is_closing():
            return
        connection.transport.resume_reading()
        self._go_on(connection, self._accepted, verdict)


def look_again(connection: Connection, now: datetime) -> None:
    """Have an open connection's peer asked about anew once the last answer has run out; end it if it may not stay.

    A peer that was revoked is cut off with the first answer that says so. One for whom there is no good answer any more
    is, where the policy would not let it in now. Raises nothing.
    """
    checker, peer = connection.site.ocsp, connection.peer
    if checker is None or peer is None:
        return
    try:
        verdict = checker.known(peer, now)
        if verdict is None:
            checker.renew(peer, now)
        elif verdict.failure is not None:
            revoked = verdict.failure.reason is Reason.VERIFY_REVOKED
            connection.end_trust(Failure(Reason.ENDED_REVOKED) if revoked else verdict.failure)
    except Exception as bug:
        connection.bug(bug)
