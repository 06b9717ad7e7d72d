"""What `tests/chaos` does, as long as is wanted: each prints its figures, and fails if it must.

python benchmarks/soak.py chaos --minutes 1
python benchmarks/soak.py identities --requests 100000
python benchmarks/soak.py refused --clients 100000
python benchmarks/soak.py log --mebibytes 16
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos.test_chaos import chaos
from tests.chaos.test_exhaustion import MIB, refuse, swell
from tests.chaos.test_two_identities import attribute


def soak_chaos(folder: Path, words: argparse.Namespace) -> bool:
    report = chaos(folder, words.minutes * 60)
    print(report)
    for line in [*report.failed, *report.wrong][:10]:
        print("  ", line)
    return not report.failed and not report.wrong


def soak_identities(folder: Path, words: argparse.Namespace) -> bool:
    good = True
    for clients, workers in ((2, 1), (4, 1), (4, 2)):
        place = folder / f"{clients}-{workers}"
        place.mkdir()
        began = time.monotonic()
        tally = attribute(place, clients, words.requests, workers)
        print(f"{clients} clients, {workers} workers: {tally}; {time.monotonic() - began:.0f} s")
        good = good and not tally.wrong and not tally.failed
    return good


def soak_refused(folder: Path, words: argparse.Namespace) -> bool:
    memory = refuse(folder, 5_000, words.clients, 200)
    print(
        f"{memory.refused} refused in {memory.seconds:.0f} s; {memory.before / MIB:.1f} MiB after the first 5,000,"
        f" {memory.after / MIB:.1f} MiB after all"
    )
    return memory.grown < 8 * MIB


def soak_log(folder: Path, words: argparse.Namespace) -> bool:
    answered, grown = swell(folder, words.mebibytes * MIB)
    print(f"{answered} requests until the guard refused for its log's sake; it had grown by {grown / MIB:.1f} MiB")
    return grown < (words.mebibytes + 48) * MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = parser.add_subparsers(required=True)
    kind = kinds.add_parser("chaos", help="kills, crashes, rotations and changing rules, under load")
    kind.add_argument("--minutes", type=float, default=1)
    kind.set_defaults(soak=soak_chaos)
    kind = kinds.add_parser("identities", help="two and four clients, pipelined and kept, each to be told its own name")
    kind.add_argument("--requests", type=int, default=100_000)
    kind.set_defaults(soak=soak_identities)
    kind = kinds.add_parser("refused", help="clients that must not come in, and what memory they cost")
    kind.add_argument("--clients", type=int, default=100_000)
    kind.set_defaults(soak=soak_refused)
    kind = kinds.add_parser("log", help="a log that nobody reads, until the guard forwards no more")
    kind.add_argument("--mebibytes", type=int, default=16, help="what may wait for the reader, as the guard has it")
    kind.set_defaults(soak=soak_log)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good: bool = words.soak(Path(folder), words)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
