"""Measures, in one process, whether a decision costs the same with many identities or revocations as with few."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from handfast.files import generate_key
from handfast.pki.issuing import Issuer, Order, build_certificate, make_serial, sign
from handfast.pki.keys import KeyType
from handfast.pki.names import parse_name
from handfast.pki.profiles import PROFILES
from handfast.pki.revocation import Revocations, build_crl, check_crls
from handfast.pki.verification import Judgement, Purpose, Terms, TrustBundle, verify
from handfast.policy import Request, decide, parse_policy

FEW, IDENTITIES, REVOCATIONS = 10, 100_000, 1_000_000
CALLS = 20_000


def measure_decisions(rounds: int) -> list[dict[str, Any]]:
    """Nanoseconds of one decision and of one look-up, with few and with many; medians of alternating rounds."""
    now = datetime.now(UTC)
    key = generate_key(KeyType.P256)
    root = sign(
        build_certificate(Order(PROFILES["root"], (), key.public_key(), common_name="bench"), None, _serial(), now), key
    )
    issuer = Issuer(root, key, (root,))
    names = [f"spiffe://bench.internal/{at}" for at in range(IDENTITIES)]
    some = names[:: IDENTITIES // FEW]
    leaves = [
        sign(
            build_certificate(Order(PROFILES["client"], (parse_name(n),), key.public_key()), issuer, _serial(), now),
            key,
        )
        for n in some
    ]
    terms = Terms(TrustBundle((root,), "bench.internal"), Purpose.CLIENT)
    peers = [verify((leaf,), terms, now, Judgement((leaf, root))) for leaf in leaves]
    request = Request(b"GET", b"/")

    def decisions(allowed: list[str]) -> Callable[[], object]:
        policy = parse_policy(allowed)
        assert all(decide(policy, peer, request).allowed for peer in peers)
        return lambda: [decide(policy, peer, request) for peer in peers]

    def revocations(count: int) -> Callable[[], object]:
        subject = root.subject.public_bytes()
        revoked = Revocations(frozenset((subject, at) for at in range(1, count + 1)))
        assert not any(revoked.revoked(leaf) for leaf in leaves)
        return lambda: [revoked.revoked(leaf) for leaf in leaves]

    def listed(count: int) -> Callable[[], object]:
        entries = ((at, now, None) for at in range(1, count + 1))
        crls = check_crls([build_crl(issuer, entries, 1, now, now + timedelta(days=1))], [root])
        assert not any(crls.failure(leaf, root, now) for leaf in leaves)
        return lambda: [crls.failure(leaf, root, now) for leaf in leaves]

    return [
        _compare(
            f"decision, {FEW} or {IDENTITIES:,} identities in the policy", decisions(some), decisions(names), rounds
        ),
        _compare(f"revoked? by the feed, {FEW} or {REVOCATIONS:,}", revocations(FEW), revocations(REVOCATIONS), rounds),
        _compare(f"revoked? by a CRL, {FEW} or {REVOCATIONS:,}", listed(FEW), listed(REVOCATIONS), rounds),
    ]


def _compare(what: str, few: Callable[[], object], many: Callable[[], object], rounds: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {"few": [], "many": []}
    for _ in range(rounds):
        for key, call in (("few", few), ("many", many)):
            began = time.process_time_ns()
            for _ in range(CALLS // FEW):
                call()
            taken[key].append((time.process_time_ns() - began) / CALLS)
    return {
        "what": what,
        "few_ns": statistics.median(taken["few"]),
        "many_ns": statistics.median(taken["many"]),
        "rounds": taken,
    }


def _serial() -> int:
    return make_serial(0, os.urandom(16))
