"""Many wrong certificates at the door: good clients are answered meanwhile, and the server's memory stays flat."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from handfast.audit.insider import Inside, by_client, meanwhile, versions
from handfast.audit.model import (
    Check,
    Evidence,
    Need,
    Outcome,
    Remedies,
    Severity,
    failed,
    not_applicable,
    passed,
)
from handfast.audit.oracle import Reach, reach
from handfast.errors import HandfastError
from handfast.testing import Flaw, TestAuthority, TestLeaf

_TRIES = 200  # wrong certificates at full load
_AT_ONCE = 3
_WARM, _COUNTED = 200, 600  # tries before memory is measured, and while it is
_A_TRY = 8 << 10  # bytes that may be kept of one try: less than the certificate it brought and its connection
_ROUGH = 2 << 20  # bytes by which an allocator's figure moves by itself
# What needs no authority: a thief's, an impostor's, one's own.
_FLAWS = (Flaw.SELF_SIGNED, Flaw.OTHER_AUTHORITY, Flaw.EXPIRED, Flaw.NOT_YET_VALID, Flaw.SERVER_ONLY)

_LIMITS = Remedies(
    handfast="[limits] of the listener: handshakes per second and connections, by address",
    nginx="limit_conn and, before TLS, a stream server with limit_conn by $binary_remote_addr",
    haproxy="a stick-table with conn_rate(10s) by source and tcp-request connection reject",
    envoy="the local_ratelimit network filter, connection_limit, and the overload manager",
    apache="mod_reqtimeout, MaxConnectionsPerChild, and a limit by address before it",
)


def _brute_force(inside: Inside) -> Outcome:
    count = max(int(_TRIES * inside.audit.pace.load), 20)
    let_in: list[str] = []

    def attack(flaw: str, leaf: TestLeaf) -> None:
        if _gets_in(inside, leaf):
            let_in.append(flaw)

    attacks = [partial(attack, flaw, leaf) for flaw, leaf in islice(cycle(_wrong(inside)), count)]
    outcome = meanwhile(inside, _said(count), attacks)
    if let_in:
        kinds = ", ".join(dict.fromkeys(let_in))
        return failed(f"{len(let_in)} of them got in ({kinds})", Evidence.of(_said(count), "the application"))
    return outcome


def _flat_memory(inside: Inside) -> Outcome:
    audit = inside.audit
    pid = audit.means.pid
    assert pid is not None  # it is needed
    if _memory(pid) is None:
        return not_applicable(f"the memory of process {pid} cannot be read here")
    wrong = cycle(_wrong(inside))
    _many(inside, list(islice(wrong, max(int(_WARM * audit.pace.load), 40))))
    before = _memory(pid)
    count = max(int(_COUNTED * audit.pace.load), 60)
    _many(inside, list(islice(wrong, count)))
    after = _memory(pid)
    if before is None or after is None:
        return failed(f"process {pid} is gone", Evidence.of(_said(count), "it ended"))
    grown = after - before
    evidence = Evidence.of(_said(count), f"{before >> 10} KiB before, {after >> 10} KiB after")
    if grown > max(count * _A_TRY, _ROUGH):
        return failed(f"{grown // count} bytes of memory are kept of every refused client", evidence)
    return passed("memory stays flat", evidence)


def _many(inside: Inside, leaves: list[tuple[str, TestLeaf]]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda wrong: _gets_in(inside, wrong[1]), leaves))


def _gets_in(inside: Inside, leaf: TestLeaf) -> bool:
    try:
        reply = inside.audit.call(leaf, tls12=versions(inside.audit)[0])
    except (HandfastError, OSError):
        return False
    return reach(reply, inside.control)[0] is Reach.YES


def _wrong(inside: Inside) -> list[tuple[str, TestLeaf]]:
    """A few of each kind; a stranger's authority stands in where there is none of the server's."""
    authority = inside.audit.means.authority
    if authority is None:
        authority = TestAuthority.root(inside.client.certificate.issuer)
    return [(flaw.value, authority.flawed(flaw, *inside.names)) for flaw in _FLAWS for _ in range(4)]


def _memory(pid: int) -> int | None:
    """Resident bytes of a process and its children; None where they cannot be read."""
    try:
        total = _resident(pid)
    except (OSError, ValueError):
        return None
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                total += _resident(int(status.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    return total


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _said(count: int) -> str:
    return f"{count} clients with wrong certificates, {_AT_ONCE} at a time"


CHECKS = (
    Check(
        "insider.brute-force",
        "Hundreds of wrong certificates of accepted names are tried, one after the other, while a good client calls.",
        "Trying certificates gets nobody in, and takes nothing from those who may come in.",
        Severity.HIGH,
        ("CWE-307", "CWE-400"),
        _LIMITS,
        by_client(_brute_force),
        (Need.INSIDER,),
        seconds=120,
    ),
    Check(
        "insider.flat-memory",
        "Hundreds of wrong certificates are tried, and the server's memory is watched.",
        "Who is refused leaves nothing behind.",
        Severity.MEDIUM,
        ("CWE-401", "CWE-770"),
        _LIMITS,
        by_client(_flat_memory),
        (Need.INSIDER, Need.PID),
        seconds=180,
    ),
)
