"""All checks there are, and the choosing among them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from handfast.audit import (
    certificates,
    confusion,
    hellos,
    insider_certificates,
    insider_door,
    insider_requests,
    insider_sessions,
    insider_smuggling,
    middle,
    parameters,
    replays,
    slowness,
)
from handfast.audit.model import Check
from handfast.errors import InvalidInput, Reason

CHECKS: tuple[Check, ...] = (
    *certificates.CHECKS,
    *replays.CHECKS,
    *parameters.CHECKS,
    *hellos.CHECKS,
    *confusion.CHECKS,
    *slowness.CHECKS,
    *middle.CHECKS,
    *insider_certificates.CHECKS,
    *insider_sessions.CHECKS,
    *insider_requests.CHECKS,
    *insider_smuggling.CHECKS,
    *insider_door.CHECKS,
)


def choose(only: Sequence[str]) -> tuple[Check, ...]:
    """The checks of these ids, or of all where none is given. `outsider.*` stands for those that it fits.

    Raises InvalidInput (AUDIT_UNKNOWN_CHECK).
    """
    for pattern in only:
        if not any(fnmatchcase(check.id, pattern) for check in CHECKS):
            raise InvalidInput(Reason.AUDIT_UNKNOWN_CHECK, value=pattern)
    return tuple(check for check in CHECKS if not only or any(fnmatchcase(check.id, one) for one in only))
