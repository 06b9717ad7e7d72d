"""Attacks five servers with the catalogue of `handfast audit`, each set up for mutual TLS as its documents say,
and prints the table side by side. All of it runs on loopback, on free ports, and is stopped at the end. See README.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from peers import PEERS, Peer, Place, install_envoy
from readings import READINGS

from handfast.audit.catalogue import choose
from handfast.audit.local import BACK, Echo, Stage, run_apart
from handfast.audit.model import Check, Finding, Need, Outcome, Report, Verdict, not_applicable, unclear
from handfast.audit.report import mark
from handfast.audit.runner import Pace, Revoker, prepare
from handfast.testing import TestLeaf

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "audit-of-peers.md"
RELOAD = 1.0  # seconds
PATIENCE = 30.0  # seconds for a server to start, and to end
REVOCATION = {"insider.revoked", "insider.resumed-after-revocation", "insider.kept-past-revocation"}
OF_REQUESTS = ("insider.other-*", "insider.spoofed-*", "insider.path-confusion", "insider.smuggled-*")
WAITED = "a good client"  # got no answer, or had to wait
MOST_LOAD = 2.0 * (os.cpu_count() or 1)  # with what the attack itself makes
MARKS = {"FAIL": "**fail**", "????": "?", "n/a ": "n/a", "note": "note", "pass": "pass"}


@dataclass(frozen=True, slots=True)
class Audited:
    """A server that was attacked: what it is, what it was told, and what came of it."""

    peer: Peer
    version: str
    config: str
    report: Report
    closed: frozenset[str] = frozenset()  # the checks that failed, and passed with the peer's settings

    def finding(self, check: str) -> Finding:
        return next(one for one in self.report.findings if one.check.id == check)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=[peer.key for peer in PEERS], help="only these")
    parser.add_argument("--only", action="append", default=[], help="only these checks, as for `handfast audit`")
    parser.add_argument("--page", type=Path, metavar="FILE", help=f"write the page; in the repository: {PAGE}")
    asked = parser.parse_args()
    # No client is put to the test here: what stands there are servers.
    checks = [check for check in choose(asked.only) if Need.CLIENT not in check.needs]
    peers = [peer for peer in PEERS if not asked.peers or peer.key in asked.peers]
    if any(peer.key == "envoy" for peer in peers):
        install_envoy()
    for peer in [peer for peer in peers if peer.missing]:
        print(f"{peer.name} is not installed; it is left out", file=sys.stderr)
    began = time.monotonic()
    audited = []
    for peer in peers:  # one after the other, or one server's load would be another's slowness
        if not peer.missing:
            print(f"{peer.name} …", file=sys.stderr)
            audited.append(audit(peer, checks))
    print(f"it took {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(table(audited, checks))
    for one in audited:
        for finding in one.report.findings:
            if finding.outcome.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE):
                print(f"{one.peer.name}  {finding.check.id}: {finding.outcome.verdict}: {finding.outcome.why}")
                for item in finding.outcome.evidence:
                    print(f"    sent: {item.sent!r}\n    got:  {item.received!r}")
    if asked.page is not None:
        asked.page.write_text(page(audited, checks, time.monotonic() - began))
    return 0


def audit(peer: Peer, checks: Sequence[Check]) -> Audited:
    """Attack a server before the echo app; and again with revocation lists, where a check needs that.

    With lists alone, every authority in a chain must have one, and some would pass for the want of it.
    """
    revocation = [check for check in checks if check.id in REVOCATION]
    others = [check for check in checks if check.id not in REVOCATION]
    reports, config = [], ""
    for crl, chosen in ((False, others), (True, revocation)):
        if chosen:
            report, text = _attack(peer, chosen, crl=crl)
            config = config or text
            reports.append(report)
    findings = tuple(_honest(finding) for report in reports for finding in report.findings)
    found = [one.check for one in findings if one.failed] if peer.settings else []
    closed: list[Finding] = []
    for crl, chosen in ((False, others), (True, revocation)):
        again = [check for check in chosen if check.id in {one.id for one in found}]
        if again:
            closed += _attack(peer, again, crl=crl, closed=True)[0].findings
    held = frozenset(one.check.id for one in closed if one.outcome.verdict is Verdict.PASS)
    return Audited(peer, peer.version(), config, replace(reports[0], findings=findings), held)


def _honest(finding: Finding) -> Finding:
    """Nobody can say whose fault a wait is where others keep the machine busy: that is no failure then."""
    load = os.getloadavg()[0]
    if finding.outcome.verdict is not Verdict.FAIL or WAITED not in finding.outcome.why or load <= MOST_LOAD:
        return finding
    why = f"{finding.outcome.why}; but others kept this machine busy (load {load:.0f}), so that says nothing"
    return replace(finding, outcome=unclear(why, *finding.outcome.evidence))


def _attack(peer: Peer, checks: Sequence[Check], *, crl: bool, closed: bool = False) -> tuple[Report, str]:
    with tempfile.TemporaryDirectory(prefix=f"audit-{peer.key}-") as name, Echo() as app:
        place = Place(Path(name), free_port(), app.port, crl, closed)
        stage = Stage.set_up(place.folder)
        config = peer.config(place)
        (place.folder / peer.file).write_text(config)
        with started(peer, place) as process:
            target = stage.target(place.port)
            means = replace(stage.means, client=None, pid=process.pid, other=replace(target, sni=BACK))
            if crl:
                means = replace(means, revoked=stage.revoked, revoker=_revoker(peer, stage, process))
            audits = [prepare(target, means, Pace()) for _ in range(2)]
            if not peer.http:  # the app's HTTP is none of its business
                audits = [replace(one, look=replace(one.look, http=False)) for one in audits]
            report = run_apart(audits[0], audits[1], [_fitting(peer, check) for check in checks], _progress)
    config = config.replace(str(place.port), "8443").replace(str(place.app), "8000")
    return report, config.replace(f"{place.folder}/", "")


def _revoker(peer: Peer, stage: Stage, process: subprocess.Popen[bytes]) -> Revoker:
    def revoke(leaf: TestLeaf) -> None:
        stage.revoke(leaf)
        if peer.signal is not None:
            process.send_signal(peer.signal)
            time.sleep(RELOAD)  # some close their socket for a moment, and there is nothing that tells

    return replace(stage.revoker, revoke=revoke)


def _fitting(peer: Peer, check: Check) -> Check:
    """A server that forwards bytes is not asked about hosts, paths and headers, which it never sees."""
    if peer.http or not any(fnmatchcase(check.id, pattern) for pattern in OF_REQUESTS):
        return check
    return replace(check, needs=(), run=lambda _: not_applicable("it forwards bytes, and reads no request"))


def _progress(check: Check, outcome: Outcome | None) -> None:
    if outcome is not None:
        print(f"  {outcome.verdict:<14} {check.id}", file=sys.stderr)


@contextmanager
def started(peer: Peer, place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the `with` ends."""
    with (place.folder / "output.txt").open("wb") as output:
        command = peer.command(place)
        process = subprocess.Popen(command, cwd=place.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            _wait_for(place, process)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(place: Place, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", place.port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    sys.exit(f"{process.args}: it does not serve\n{(place.folder / 'output.txt').read_text()}")


def free_port() -> int:
    """A port on which nothing listens, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def table(audited: Sequence[Audited], checks: Sequence[Check]) -> str:
    """Checks against servers, in Markdown."""
    lines = [f"| check | severity | {' | '.join(one.peer.name for one in audited)} |"]
    lines.append("|---|---|" + "---|" * len(audited))
    for check in checks:
        marks = " | ".join(
            "fail, closed" if check.id in one.closed else MARKS[mark(one.finding(check.id))] for one in audited
        )
        lines.append(f"| `{check.id}` | {check.severity} | {marks} |")
    for verdict, title in ((Verdict.FAIL, "failed"), (Verdict.PASS, "passed")):
        counts = (sum(_counts(finding, verdict) for finding in one.report.findings) for one in audited)
        lines.append(f"| **{title}** | | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def _counts(finding: Finding, verdict: Verdict) -> bool:
    return finding.failed if verdict is Verdict.FAIL else finding.outcome.verdict is verdict


def page(audited: Sequence[Audited], checks: Sequence[Check], seconds: float) -> str:
    """The page of the manual."""
    parts = [_HEAD.format(date=f"{datetime.now(UTC):%Y-%m-%d}", minutes=max(1, round(seconds / 60)))]
    parts += ["| server | version | set up after |", "|---|---|---|"]
    parts += [f"| {one.peer.name} | {one.version} | {', '.join(one.peer.documents)} |" for one in audited]
    parts += ["", "## The table", "", table(audited, checks), "", _LEGEND]
    parts += ["## What the failures mean", "", _READING]
    parts += [*_readings(audited, checks, Verdict.FAIL)]
    open_ones = _readings(audited, checks, Verdict.INCONCLUSIVE)
    if open_ones:
        parts += ["## What stayed open", "", *open_ones]
    parts += ["## Where handfast does not help", "", _OURS]
    parts += ["## What was not asked of whom", "", *_not_asked(audited, checks)]
    parts += ["## The configurations", "", "Relative paths are below one folder; the ports were others.", ""]
    for one in audited:
        kind = {"envoy.json": "json", "handfast.toml": "toml"}.get(one.peer.file, "text")
        parts += [f"### {one.peer.name}: `{one.peer.file}`", "", f"```{kind}", one.config.strip(), "```", ""]
        if one.peer.settings:
            parts += ["The settings with which what was found open was tried again:", ""]
            parts += ["```text", one.peer.settings.strip(), "```", ""]
        parts += [f"For the checks of revocation: `{one.peer.crl}`, and the same for the other site.", ""]
        if one.peer.beside:
            parts += [one.peer.beside, ""]
    return "\n".join(parts).rstrip() + "\n"


def _readings(audited: Sequence[Audited], checks: Sequence[Check], verdict: Verdict) -> list[str]:
    lines = []
    for check in checks:
        found = [one for one in audited if one.finding(check.id).outcome.verdict is verdict]
        if not found:
            continue
        lines += [f"### `{check.id}`", "", check.attack, ""]
        said: dict[str, list[str]] = {}
        for one in found:
            reading = READINGS.get((check.id, one.peer.key)) or READINGS.get((check.id, "*"), "")
            why = " ".join(one.finding(check.id).outcome.why.split())
            checked = "With the settings below it is beaten back: checked." if check.id in one.closed else ""
            said.setdefault(" ".join(f"{why}. {checked} {reading}".split()), []).append(one.peer.name)
        lines += [f"- **{', '.join(names)}**: {text}" for text, names in said.items()]
        lines.append("")
    return lines


def _not_asked(audited: Sequence[Audited], checks: Sequence[Check]) -> list[str]:
    lines = []
    for one in audited:
        reasons: dict[str, list[str]] = {}
        for check in checks:
            outcome = one.finding(check.id).outcome
            if outcome.verdict is Verdict.NOT_APPLICABLE:
                reasons.setdefault(" ".join(outcome.why.split()), []).append(f"`{check.id}`")
        lines += [f"- **{one.peer.name}**: {', '.join(ids)}: {why}." for why, ids in reasons.items()]
    return [*(lines or ["Everything was asked of all."]), ""]


_HEAD = """<!-- Written by `make bench-audit`; change benchmarks/audit, not this page. -->

# The audit of handfast and its peers

`handfast audit` attacks any mutual-TLS server. Here it attacks five, handfast among them, each before the same app: two
sites by server name, each with clients of another authority, and one path that nobody may ask for. Each is set up as
its own documents say for mutual TLS, and otherwise as it comes; the configurations stand at the end.

A failure is not a bug of a server. Often it is a default that a setting changes; then the setting is named, and where
it says *checked* the same attack was made again with it. The catalogue is ours, and so is its measure of what a server
should withstand: who wrote the checks passes more of them. Read it as a list of what to look at, not as a score.

Run on {date} in about {minutes} minutes, by:

```text
make bench-audit
```
"""

_LEGEND = """`pass`: the attack was made and beaten back. `fail`: it worked. `fail, closed`: it worked, and with the
settings below no longer. `note`: it worked, and is worth knowing.
`n/a`: it cannot be made there, and below it says why. `?`: what came back says neither.
`handfast audit --list` says what each attack is.
"""

_OURS = """Two things that the table does not show, tried by hand:

- Authorities in one `client_ca` are believed alike: a rule for `spiffe://test/web` lets in who has that name from any
  of them, and `insider.two-authorities` fails then. Give each authority a site of its own.
- A rule that denies a path denies its bytes. An app to which `/PROTECTED` and `/protected` are one answers the first,
  behind handfast as behind nginx. Our app here tells capitals apart (RFC 3986 6.2.2.1). Write rules that allow.
"""

_READING = """What the check saw, and what it means for somebody who runs that server.
"""


if __name__ == "__main__":
    sys.exit(main())
