"""A stage for an audit on this machine: throwaway authorities, an app that says what reached it, one report of many.

It puts no server before the app: whoever calls does that. All it makes is in one folder, and on ports of loopback.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote_to_bytes

from cryptography.hazmat.primitives.serialization import Encoding

from handfast.audit.middle import CLIENTS
from handfast.audit.model import Check, Finding, Report, Verdict
from handfast.audit.oracle import MAX_ITEMS
from handfast.audit.runner import Audit, Client, Means, Progress, Revoker, Target, run
from handfast.files import write_public
from handfast.pki.issuing import Issuer
from handfast.pki.revocation import build_crl
from handfast.testing import TestAuthority, TestLeaf

FRONT, BACK = "front.audit.internal", "back.audit.internal"  # server names: two sites of one server
PROTECTED = "/protected"  # what is below this the server before the app has to deny to everybody
SECRET = f"{PROTECTED}/secret"

_DAY = timedelta(days=1)
_LONG = 90.0  # seconds: what takes longer waits for a limit of the server's
_TRIES, _WAITED = 3, "a good client"
_MAX_HEAD = 64 << 10  # bytes
_MAX_BODY = 16 << 20  # bytes of one request
_PATIENCE = 120.0  # seconds without a byte, after which the app ends a connection
# In front of what is echoed, so that every answer is longer than any alert of TLS.
_PREFACE = (
    b"The app got a request; below this line is what it has to say to it, or what came.\r\n" + b"-" * 80 + b"\r\n"
)


@dataclass
class Echo:
    """An HTTP/1.1 app on loopback: /echo answers with the request line and the headers that it got, / with a page, and
    the protected path with a secret. It finds its paths as easy-going apps do: decoded, merged, without parameters;
    capitals count (RFC 3986 6.2.2.1).

    It is strict where an app should be: a request with two lengths, or with one that it cannot read, is answered
    with 400, and the connection ends. The bodies of requests are read and dropped.
    """

    connections: int = 0
    _open: set[socket.socket] = field(default_factory=set)

    def __enter__(self) -> Echo:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._acceptor = threading.Thread(target=self._accept, name="echo", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # a thread in accept() does not see a close
        self._listener.close()
        self._acceptor.join(_PATIENCE)
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return int(self._listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="echo", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(_PATIENCE)
            pending: bytes | None = b""
            while pending is not None:
                pending = _attend(connection, pending)
        self._open.discard(connection)


def _attend(connection: socket.socket, pending: bytes) -> bytes | None:
    """Answer one request; what came behind it, or None when the connection is at its end."""
    while b"\r\n\r\n" not in pending:
        data = connection.recv(1 << 16)
        if not data or len(pending) > _MAX_HEAD:
            return None
        pending += data
    head, _, pending = pending.partition(b"\r\n\r\n")
    rest = _past_body(connection, head, pending)
    if rest is None:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return None
    status, body = _page(head)
    last = b"close" in b",".join(_values(head, b"connection")).lower()
    answer = b"HTTP/1.1 %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n" % (status, len(body))
    answer += b"Connection: close\r\n\r\n" if last else b"\r\n"
    connection.sendall(answer if head.startswith(b"HEAD ") else answer + body)
    return None if last else rest


def _page(head: bytes) -> tuple[bytes, bytes]:
    """The status and body for a request."""
    target = head.split(b"\r\n", 1)[0].partition(b" ")[2].partition(b" ")[0]
    text = unquote_to_bytes(re.split(rb"[?#]", target)[0]).replace(b"\\", b"/")
    text = re.sub(rb"^[a-zA-Z]+://[^/]*", b"", text)
    parts: list[bytes] = []
    for part in re.split(rb"/+", re.sub(rb";[^/]*|\0.*", b"", text).strip(b" \t")):
        if part == b"..":
            parts = parts[:-1]
        elif part not in (b"", b"."):
            parts.append(part.rstrip(b"."))
    match b"/".join(parts).decode("latin-1"):
        case "echo":
            return b"200 OK", _PREFACE + head
        case "":
            return b"200 OK", _PREFACE + b"This is the page that everybody may see."
        case path if f"/{path}" == SECRET:
            return b"200 OK", _PREFACE + b"This is the secret."
    return b"404 Not Found", _PREFACE + b"There is no such page."


def _values(head: bytes, name: bytes) -> list[bytes]:
    return re.findall(rb"(?mi)^" + re.escape(name) + rb":[ \t]*([^\r\n]*?)[ \t]*$", head.replace(b"\r\n", b"\n"))


def _past_body(connection: socket.socket, head: bytes, data: bytes) -> bytes | None:
    """Read over a request's body; what follows it, or None where its length is not plain (RFC 9112 6.3)."""
    lengths, codings = _values(head, b"content-length"), _values(head, b"transfer-encoding")
    if codings:
        return None if lengths or codings != [b"chunked"] else _past_chunks(connection, data)
    if not lengths:
        return data
    if len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,9}", lengths[0]) or int(lengths[0]) > _MAX_BODY:
        return None
    data = _until(connection, data, int(lengths[0]))
    return data[int(lengths[0]) :]


def _past_chunks(connection: socket.socket, data: bytes) -> bytes | None:
    taken = 0
    while taken <= _MAX_BODY:
        data = _until_line(connection, data)
        line, _, data = data.partition(b"\r\n")
        found = re.match(rb"([0-9A-Fa-f]{1,7})[ \t]*(?:;.*)?$", line)
        if found is None:
            return None
        size = int(found[1], 16)
        if size == 0:
            while line:  # trailers, to the empty line
                data = _until_line(connection, data)
                line, _, data = data.partition(b"\r\n")
            return data
        data = _until(connection, data, size + 2)
        if data[size : size + 2] != b"\r\n":
            return None
        taken, data = taken + size, data[size + 2 :]
    return None


def _until(connection: socket.socket, data: bytes, size: int) -> bytes:
    pieces, have = [data], len(data)
    while have < size:
        piece = connection.recv(1 << 16)
        if not piece:
            raise ConnectionResetError
        pieces.append(piece)
        have += len(piece)
    return b"".join(pieces)


def _until_line(connection: socket.socket, data: bytes) -> bytes:
    while b"\r\n" not in data:
        if len(data) > _MAX_HEAD:
            raise ConnectionResetError
        data = _until(connection, data, len(data) + 1)
    return data


@dataclass(frozen=True, slots=True)
class Stage:
    """The files that a server is set up with, and the keys that attack it.

    In `folder`, PEM: front.crt, front.key, back.crt, back.key (servers, by the third authority in servers.crt), each
    pair also in one file, .pem; front-ca.crt and back-ca.crt (whom each site takes clients of), and the revocation
    lists of these two, front.crl and back.crl. On the first stands `revoked`, a client's leaf.
    """

    folder: Path
    front: TestAuthority
    back: TestAuthority
    revoked: TestLeaf
    _serials: list[int] = field(default_factory=list)  # on the list of the authority in front

    @classmethod
    def set_up(cls, folder: Path) -> Stage:
        """Make the authorities and write the files. Raises StoreError."""
        servers = TestAuthority.root("Audit Servers")
        servers.save(folder, "servers")
        front, back = TestAuthority.root("Audit Front"), TestAuthority.root("Audit Back")
        stage = cls(folder, front, back, front.client())
        for name, site, authority in (("front", FRONT, stage.front), ("back", BACK, stage.back)):
            authority.save(folder, f"{name}-ca")
            cert, key = servers.server(site).save(folder, name)
            both = folder / f"{name}.pem"
            both.touch(0o600)
            both.write_bytes(cert.read_bytes() + key.read_bytes())
        stage.revoke(stage.revoked)
        write_public(folder / "back.crl", _crl(back, ()))
        return stage

    def revoke(self, leaf: TestLeaf) -> None:
        """Put a leaf on the list in front.crl. Raises StoreError."""
        self._serials.append(leaf.certificate.serial_number)
        write_public(self.folder / "front.crl", _crl(self.front, self._serials))

    @property
    def revoker(self) -> Revoker:
        """The authority of the site in front, with its list, for a server that reads the list when it changes."""
        return Revoker(lambda names: self.front.client(*names), self.revoke)

    def target(self, port: int) -> Target:
        """The site in front, at a port of this machine."""
        return Target("127.0.0.1", port, FRONT, echo="/echo", protected=SECRET)

    @property
    def means(self) -> Means:
        """What an outsider and an insider have: a client's leaf, and the key of the authority of the site in front.

        The client that a person in the middle is to be kept from is our own connector.
        """
        client = Client("handfast", str(self.folder / "servers.crt"), CLIENTS["handfast"])
        return Means(self.front.client(), self.front, client)


def _crl(authority: TestAuthority, serials: Sequence[int]) -> bytes:
    """A revocation list as PEM; its number is how many are on it."""
    now = datetime.now(UTC)
    entries = [(serial, now, None) for serial in serials]
    issuer = Issuer(authority.certificate, authority.key, ())
    return build_crl(issuer, entries, len(entries) + 1, now, now + _DAY).public_bytes(Encoding.PEM)


def run_apart(waiting: Audit, working: Audit, checks: Sequence[Check], progress: Progress) -> Report:
    """Run the checks one at a time, and beside them those that mostly wait, so that none measures another's load.

    Two audits of one endpoint, since the checks of one share its turns.
    """
    with ThreadPoolExecutor(1) as pool:
        patient = [check for check in checks if check.seconds >= _LONG]
        beside = pool.submit(run, waiting, patient, progress)
        reports = [_surely(working, check, progress) for check in checks if check.seconds < _LONG]
        reports.append(beside.result())
    findings = [finding for report in reports for finding in report.findings]
    return replace(reports[0], findings=_in_order(findings))


def _surely(audit: Audit, check: Check, progress: Progress) -> Report:
    """Run a check; again where it found that a good client was kept waiting: this machine may have made it wait."""
    for _ in range(_TRIES - 1):
        report = run(audit, [check], lambda *_: None)
        (finding,) = report.findings
        if finding.outcome.verdict is not Verdict.FAIL or not finding.outcome.why.startswith(_WAITED):
            progress(check, finding.outcome)
            return report
    return run(audit, [check], progress)


def fold(reports: Sequence[tuple[str, Report]], *more: Finding) -> Report:
    """One report of several of the same checks, by what was audited in each: of every check the worst that it came to.

    A check that says different things of different places says which. `more`: findings about all of it. At least one
    report is needed.
    """
    (_, first), *_ = reports
    by_check: dict[str, list[tuple[str, Finding]]] = {}
    for name, report in reports:
        for finding in report.findings:
            by_check.setdefault(finding.check.id, []).append((name, finding))
    return Report(
        target=", ".join(f"{report.target} ({name})" for name, report in reports),
        server="; ".join(f"{name}: {report.server}" for name, report in reports),
        baseline=first.baseline,
        began=min(report.began for _, report in reports),
        findings=_in_order([*map(_worst, by_check.values()), *more]),
        no_tls="; ".join(f"{name}: {report.no_tls}" for name, report in reports if report.no_tls),
    )


def _in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The worst first, as `run` has them."""
    order = list(Verdict)
    return tuple(
        sorted(findings, key=lambda one: (order.index(one.outcome.verdict), one.check.severity.rank, one.check.id))
    )


def _worst(found: Sequence[tuple[str, Finding]]) -> Finding:
    order = list(Verdict)
    verdict = min((finding.outcome.verdict for _, finding in found), key=order.index)
    chosen = [(name, finding.outcome) for name, finding in found if finding.outcome.verdict is verdict]
    whys = {outcome.why for _, outcome in chosen}
    if len(whys) == 1 and len(chosen) == len(found):
        (why,) = whys
    else:
        why = "; ".join(f"{name}: {outcome.why}" for name, outcome in chosen)
    evidence = tuple(item for _, outcome in chosen for item in outcome.evidence)
    outcome = replace(chosen[0][1], why=why, evidence=evidence[:MAX_ITEMS])
    return Finding(found[0][1].check, outcome, sum(finding.seconds for _, finding in found))
