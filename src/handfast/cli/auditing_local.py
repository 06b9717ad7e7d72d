"""`audit --local`: a guard of ours with an app behind it, attacked with its own authority's key; nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from handfast.audit.local import BACK, FRONT, PROTECTED, Echo, Stage, fold, run_apart
from handfast.audit.model import Check, Evidence, Outcome, Remedies, Report, Severity, failed, passed
from handfast.audit.runner import Audit, Means, Pace, Progress, prepare, run
from handfast.errors import Reason, Unreachable
from handfast.files import write_public

_PATIENCE = 30.0  # seconds for the guard to start, and to end
_HANDSHAKE = 15.0  # seconds that a slow client may have: the guard's own limit is 10
_MOST = 20  # lines of the guard's that are kept


@dataclass(frozen=True, slots=True)
class Ears:
    """A listener: the oldest version of TLS that it takes, whether it reads revocation lists, and where it is."""

    oldest: str = "1.3"
    crl: bool = False
    listen: str = "127.0.0.1:0"


_HEAD = 'log = "json"\ndrain = "2s"\n'
_LISTENER = """
[[listener]]
name = "listener-{number}"
listen = "{listen}"
"""
_SITE = """
[[listener.site]]
names = ["{site}"]
cert = "{name}.crt"
key = "{name}.key"
client_ca = "{name}-ca.crt"
tls_min = "{oldest}"
to = "127.0.0.1:{app}"
allow = ["deny any {protected}/**", "allow spiffe://test/web"]
headers = ["client-cert", "client-identity", "xfcc", "x-ssl-client"]
"""
_CRL = 'crl = ["{name}.crl"]\n'


# Without a list all of a chain is judged by other things; with one, every authority in it must have its own.
_LISTENERS = {"TLS 1.3": Ears(), "TLS 1.2 and a revocation list": Ears(oldest="1.2", crl=True)}


def audit_local(checks: Sequence[Check], pace: Pace, progress: Progress) -> Report:
    """Start the guard and its app in a folder of their own, attack each listener, and stop and remove all of it.

    The report has the worst that a check came to at any listener. Raises HandfastError.
    """
    pace = replace(pace, limit=min(pace.limit, _HANDSHAKE), patience=min(pace.patience, _HANDSHAKE))
    with TemporaryDirectory(prefix="handfast-audit-") as name, Echo() as app:
        stage = Stage.set_up(Path(name))
        write_public(stage.folder / "handfast.toml", guard_config(app.port, _LISTENERS.values()).encode())
        log = _Log()
        reports = []
        with _guarding(stage.folder, log) as (pid, ports):
            for port in ports:
                means = _means(stage, pid, ports, port)
                audits = [prepare(stage.target(port), means, pace) for _ in range(2)]
                reports.append(run_apart(audits[0], audits[1], checks, progress))
        (whole,) = run(audits[0], [_whole(log)], progress).findings
    return fold(list(zip(_LISTENERS, reports, strict=True)), whole)


def _means(stage: Stage, pid: int, ports: Sequence[int], port: int) -> Means:
    """What there is against the listener at `port`: elsewhere is the site in back, or the listener without a list.

    Only a listener that reads lists can be told of a revocation.
    """
    means = replace(stage.means, pid=pid)
    if list(_LISTENERS.values())[ports.index(port)].crl:
        other = next(one for one in ports if one != port)
        return replace(means, other=stage.target(other), revoked=stage.revoked, revoker=stage.revoker)
    return replace(means, other=replace(stage.target(port), sni=BACK))


def how_many(checks: Sequence[Check]) -> int:
    """How often `audit_local` tells that a check is done."""
    return len(checks) * len(_LISTENERS) + 1


def guard_config(app: int, listeners: Iterable[Ears]) -> str:
    """A handfast.toml for the files of a Stage, beside them: two sites, the app at a port, and a path denied to all."""
    text = _HEAD
    for number, ears in enumerate(listeners, 1):
        text += _LISTENER.format(number=number, listen=ears.listen)
        for name, site in (("front", FRONT), ("back", BACK)):
            text += _SITE.format(name=name, site=site, oldest=ears.oldest, app=app, protected=PROTECTED)
            text += _CRL.format(name=name) if ears.crl else ""
    return text


@dataclass
class _Log:
    """What the guard said: the bugs of its own that it logged, its complaints, and how it ended."""

    ready: Future[dict[str, Any]] = field(default_factory=Future)
    events: int = 0
    bugs: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    code: int | None = None

    def read(self, stream: Any) -> None:
        """Take the events as they come."""
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "bug", "line": line[:200]}
            self.events += 1
            if event["event"] == "ready":
                self.ready.set_result(event)
            elif (event["event"] == "bug" or event.get("reason") == Reason.BUG.code) and len(self.bugs) < _MOST:
                self.bugs.append(line.strip())
        if not self.ready.done():
            self.ready.set_result({})

    def listen(self, stream: Any) -> None:
        """Take what comes on standard error."""
        for line in stream:
            if len(self.complaints) < _MOST:
                self.complaints.append(line.strip())


@contextmanager
def _guarding(folder: Path, log: _Log) -> Iterator[tuple[int, list[int]]]:
    """Run `handfast guard` on what is in `folder`: its process, and the ports of its listeners. Raises Unreachable."""
    command = [sys.executable, "-m", "handfast", "guard", "-c", str(folder / "handfast.toml")]
    process = subprocess.Popen(  # noqa: S603  # ours
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    readers = [
        threading.Thread(target=log.read, args=(process.stdout,)),
        threading.Thread(target=log.listen, args=(process.stderr,)),
    ]
    for reader in readers:
        reader.start()
    try:
        ready = log.ready.result(_PATIENCE)
        if not ready:
            detail = "; ".join(log.complaints) or "it ended at once"
            raise Unreachable(Reason.UNREACHABLE, target="the guard", detail=detail[:400])
        yield process.pid, [int(one["url"].rpartition(":")[2]) for one in ready["listeners"]]
    except TimeoutError:
        raise Unreachable(Reason.UNREACHABLE, target="the guard", detail="it did not begin to serve") from None
    finally:
        process.terminate()
        try:
            log.code = process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for reader in readers:
            reader.join()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def _whole(log: _Log) -> Check:
    """The check that the guard came through the attacks: nothing that it did not foresee, and a clean end."""

    def judge(_: Audit) -> Outcome:
        if log.bugs or log.complaints:
            evidence = [Evidence.of("all attacks", line) for line in (*log.bugs, *log.complaints)]
            return failed("an attack met what the guard did not foresee", *evidence[:_MOST])
        if log.code != 0:
            said = "it had to be killed" if log.code is None else f"exit code {log.code}"
            return failed("the guard did not end as it should", Evidence.of("SIGTERM", said))
        return passed(f"{log.events} events, none of them a bug of the guard's, and a clean end")

    upgrade = "upgrade, and report it with what the log says"
    return Check(
        "local.guard-whole",
        "All attacks above, one beside the other.",
        "The guard foresaw all of it: its log has no bug of its own, and it ends cleanly.",
        Severity.HIGH,
        ("CWE-755",),
        Remedies(upgrade, upgrade, upgrade, upgrade, upgrade),
        judge,
    )
