"""Our own regression suite: the whole catalogue against a guard of ours, with its authority's key at hand."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from handfast.audit.catalogue import CHECKS
from handfast.errors import Exit
from tests.support.programs import HANDFAST, environment

LIMIT = 400.0  # seconds; it takes about 30 on two cores that nothing else uses

# What may stay undecided, and why. Whatever else is inconclusive fails the test.
INCONCLUSIVE: dict[str, str] = {}
# What cannot be asked of this stage, and why.
NOT_ASKED = {
    "insider.two-authorities": "each site takes clients of one authority alone",
    "insider.other-authority": "where the guard does not speak HTTP/2",
    "insider.smuggled-by-http2": "where the guard does not speak HTTP/2",
}
# How long others wait is told by the machine as well, which runs the attacks, the guard and other tests at once.
TIMED = {"insider.brute-force", "insider.huge-keys", "insider.huge-names"}
WAITED = "a good client had to wait"


def audited(folder: Path) -> tuple[int, dict[str, Any]]:
    """`handfast audit --local`, all of it, with what it leaves behind in `folder`."""
    done = subprocess.run(
        [*HANDFAST, "audit", "--local", "--json"],
        env=environment(TMPDIR=str(folder)),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode in (Exit.OK, Exit.REFUSED), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.timeout(450)
def test_the_guard_withstands_the_catalogue(tmp_path: Path) -> None:
    """Nothing fails, nothing is left open without a known reason, every check was made, and nothing is left behind."""
    code, report = audited(tmp_path)
    found = {one["id"]: one for one in report["findings"]}
    failed = [one for one in found.values() if one["verdict"] == "fail" and one["severity"] != "info"]
    holes = [one for one in failed if one["id"] not in TIMED or WAITED not in one["why"]]
    assert [f"{one['id']}: {one['why']} {one['evidence']}" for one in holes] == []
    assert code == (Exit.REFUSED if failed else Exit.OK)
    undecided = {name: one["why"] for name, one in found.items() if one["verdict"] == "inconclusive"}
    assert {name: why for name, why in undecided.items() if name not in INCONCLUSIVE} == {}
    not_asked = {name: one["why"] for name, one in found.items() if one["verdict"] == "not-applicable"}
    assert {name: why for name, why in not_asked.items() if name not in NOT_ASKED} == {}
    assert set(found) == {check.id for check in CHECKS} | {"local.guard-whole"}
    assert list(tmp_path.iterdir()) == []
