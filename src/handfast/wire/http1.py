"""HTTP/1.1 framing (RFC 9112) for a guard that stands between a client and an app.

Owns the reading and rewriting of heads; bodies are in `bodies`. It reads strictly: what two servers might read in two
ways is refused, never repaired. It opens no socket and decides nothing about who may do what.

Theory of operation. One regular expression takes the common request head, and says no to the rest; then
the head is read line by line, and what is wrong is named. Tests prove that the first takes nothing that the
second would refuse or read otherwise. Nothing about framing is copied through: a head is written anew with
one Content-Length or one `Transfer-Encoding: chunked`, and a chunked body with plain chunks, so the app sees
the boundaries that the guard saw. Headers are told apart by their folded name (identity.fold), and one that
only folds to a framing header's name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple, NoReturn

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire.bodies import NAME, TOKEN, BodyKind
from handfast.wire.identity import fold
from handfast.wire.targets import MAX_HOST, parse_host

MAX_HEAD = 64 * 1024  # bytes; Node takes 16 KiB, Apache 8 KiB a line, Envoy 60 KiB
MAX_HEADERS = 100  # lines; the default of Apache, HAProxy and gunicorn
SAFE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS"})  # RFC 9110 9.2.1: asking twice does what asking once does

Header = tuple[bytes, bytes]

_VALUE_BYTES = bytes([9, *range(0x20, 0x7F), *range(0x80, 0x100)])
_TARGET = re.compile(rb"/[!-\"$-~]*")  # RFC 9112 3.2.1; visible ASCII without the fragment's `#`
_VERSION = re.compile(rb"HTTP/[0-9]\.[0-9]")
_LENGTH = re.compile(rb"[0-9]{1,18}")  # below 2**63
_PROTOCOLS = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z/, -]+")  # RFC 9110 7.8
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*+))?\r\n")

# The common head: GET and its like, or a body of known length. Every framing header's folded name begins with
# c, e, h, t or u, so a name that begins with another letter frames nothing; of those five letters a few common
# names are spelled out. Host comes once; Content-Length may follow it once; Connection says keep-alive only.
_ORDINARY_LINES = (
    rb"(?:(?:[ABDFGI-SV-Zabdfgi-sv-z]%b*+"
    rb"|[Uu]ser-[Aa]gent|[Cc]ookie|[Cc]ache-[Cc]ontrol|[Cc]ontent-[Tt]ype|[Uu]pgrade-[Ii]nsecure-[Rr]equests"
    rb"|trace(?:parent|state)|[Cc]onnection(?=: [Kk]eep-[Aa]live\r))"
    rb": [!-~\x80-\xff][ -~\x80-\xff]*+(?<! )\r\n)*" % TOKEN
)
_COMMON = re.compile(
    rb"([A-Z]{3,16}) ((/[!\"$->@-~]*+)[!\"$-~]*+) HTTP/1\.1\r\n"
    rb"(%b[Hh]ost: ([0-9A-Za-z._:-]{1,262})\r\n%b(?:[Cc]ontent-[Ll]ength: ([0-9]{1,18})\r\n%b)?)\r\n"
    % (_ORDINARY_LINES, _ORDINARY_LINES, _ORDINARY_LINES)
)
_PAIR = re.compile(rb"([^:]++): ([^\r]*+)\r\n")

# Headers that frame a message, by folded name. Spelled any other way they are refused: an app server may
# read `Transfer_Encoding` as the real one.
_FRAMING = {
    b"host": b"host",
    b"connection": b"connection",
    b"contentlength": b"content-length",
    b"transferencoding": b"transfer-encoding",
    b"upgrade": b"upgrade",
    b"expect": b"expect",
}
# Connection may not list these: without them the message means something else (RFC 9110 7.6.1).
_UNLISTABLE = frozenset({b"host", b"contentlength", b"transferencoding", b"expect"})
# Hop-by-hop by definition or habit (RFC 9110 7.6.1, RFC 2616 13.5.1, RFC 7540 3.2.1). TE goes as well,
# `trailers` too, since trailers are dropped.
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keepalive", b"proxyconnection", b"te", b"trailer", b"transferencoding", b"upgrade"),
        *(b"proxyauthorization", b"proxyauthenticate", b"http2settings"),
    }
)
_NEVER_UPSTREAM = _HOP_BY_HOP | {b"contentlength", b"expect"}  # what of these is meant is written anew
_NEVER_DOWNSTREAM = _HOP_BY_HOP | {b"contentlength", b"altsvc"}  # Alt-Svc could lead the client round the guard
_LONGEST_METHOD = 64  # bytes; the longest registered has 17, and a request is remembered and logged with it
_REFUSED_METHODS = frozenset({b"CONNECT", b"TRACE"})
_NOTHING: frozenset[bytes] = frozenset()


# Named tuples, not frozen dataclasses: those take 2 µs to make, a third of a request's whole budget.
class RequestHead(NamedTuple):
    """A request head that has one reading: made by `parse_request_head`, or by `usual` from one that was."""

    method: bytes  # as received; methods are case-sensitive
    target: bytes  # as received: origin form, or `*` of OPTIONS
    path: bytes  # the target before `?`
    minor: int  # 0 or 1
    headers: tuple[Header, ...]  # names as received; values without the white space around them
    body: BodyKind
    length: int  # 0 unless the body is LENGTH
    host: bytes  # `normal_host` of the Host header, without port
    keep_alive: bool
    upgrade: bytes | None  # the protocols asked for, lower-case; only when Connection lists it
    expect_continue: bool  # the client waits for 100 Continue before it sends the body
    listed: frozenset[bytes]  # folded names that Connection lists

    @property
    def websocket(self) -> bool:
        """Whether it asks for a websocket and nothing else (RFC 6455 4.1)."""
        return self.upgrade == b"websocket" and self.method == b"GET"


class ResponseHead(NamedTuple):
    """A response head that has one reading: made by `parse_response_head`, or by `usual_answer` for the usual ones."""

    status: int  # 100 to 599
    reason: bytes
    minor: int
    headers: tuple[Header, ...]
    body: BodyKind
    length: int  # as declared, also where no body follows (HEAD, 304); -1 when not declared
    keep_alive: bool  # whether the app's connection may be used again
    upgrade: bytes | None
    listed: frozenset[bytes]


def find_head(buffer: bytes | bytearray, start: int = 0) -> int:
    """Return the index just past the head that begins at `start`, or -1 when more bytes are needed.

    Raises RemoteProtocolError: HTTP_HEAD_TOO_LARGE beyond MAX_HEAD, HTTP_HEADER for a head that ends in bare LFs.
    """
    end = buffer.find(b"\r\n\r\n", start, start + MAX_HEAD)
    if end >= 0:
        return end + 4
    if len(buffer) - start >= MAX_HEAD:
        raise RemoteProtocolError(Reason.HTTP_HEAD_TOO_LARGE, limit=MAX_HEAD)
    if buffer.find(b"\n\n", start) >= 0 or buffer.find(b"\n\r\n", start) >= 0:
        _refuse("a line that ends in a bare LF")
    return -1


def parse_request_head(head: bytes) -> RequestHead:
    """Parse a request head, from its first byte to the empty line (RFC 9112 3, 5, 6).

    Raises RemoteProtocolError (HTTP_REQUEST_LINE, _VERSION, _METHOD, _TARGET, _HEADER, _FRAMING, _HOST,
    _EXPECTATION, _TOO_MANY_HEADERS) and nothing else, on any bytes.
    """
    parsed = _parse_common(head)
    return _parse_strictly(head) if parsed is None else parsed


def parse_response_head(head: bytes, request_method: bytes) -> ResponseHead:
    """Parse a response head; the method of the request says whether a body follows (RFC 9112 4, 6.3).

    Raises RemoteProtocolError (UPSTREAM_BAD_RESPONSE, target left empty) and nothing else, on any bytes.
    """
    line = _STATUS_LINE.match(head)
    if line is None:
        raise _bad_response("its status line is malformed")
    try:
        return _read_response(line, _split(head, line.end()), request_method)
    except RemoteProtocolError as error:
        raise _bad_response(error.facts.get("detail", error.failure.message)) from None


def rewrite_request(head: RequestHead, set_headers: Iterable[Header], strip: Callable[[bytes], bool]) -> bytes:
    """Return the head that is sent to the app: the same request line, as HTTP/1.1, and framing of our own.

    Taken out: hop-by-hop headers, those that `strip` (of a name as received) says, and every spelling of one
    in `set_headers`. Those come last, so nothing that the client lists can take them out. What `strip` says
    of a name is remembered, so it must always say the same. ValueError when `set_headers` hold a control
    byte, which is a bug of the caller.
    """
    ours = list(set_headers)
    kept = _kept_names(strip, tuple([name for name, _ in ours]))
    lines = [b"%b %b HTTP/1.1" % (head.method, head.target)]
    try:
        lines += [b": ".join(header) for header in head.headers if kept[header[0]]]
    except KeyError:
        kept = _judge_names(head.headers, strip, ours, kept)
        lines += [b": ".join(header) for header in head.headers if kept[header[0]]]
    if head.listed:
        listed = [name for name, _ in head.headers if fold(name) in head.listed]
        lines[1:] = [line for line in lines[1:] if line.partition(b":")[0] not in listed]
    if head.body is BodyKind.LENGTH:
        lines.append(b"Content-Length: %d" % head.length)
    elif head.body is BodyKind.CHUNKED:
        lines.append(b"Transfer-Encoding: chunked")
    if head.expect_continue:
        lines.append(b"Expect: 100-continue")
    if head.upgrade is not None and head.websocket:
        lines.append(b"Connection: Upgrade\r\nUpgrade: websocket")
    if ours:
        lines.append(_lines_of(ours))
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def stays_open(request: RequestHead, response: ResponseHead) -> bool:
    """Whether the client's connection can carry another request after this response (RFC 9112 9.3)."""
    if response.body is BodyKind.UNTIL_CLOSE or (request.minor == 0 and response.body is BodyKind.CHUNKED):
        return False
    return request.keep_alive


def rewrite_response(head: ResponseHead, keep_alive: bool, upgrade: bool = False, client_minor: int = 1) -> bytes:
    """Return the head that is sent to the client; `keep_alive` is what `stays_open` said, or False.

    `upgrade` says that the request asked for a websocket; `client_minor` is its minor version: one of
    HTTP/1.0 knows no chunks, so its body must be read with `decode` and ends at the close of the connection.
    Raises RemoteProtocolError (UPSTREAM_BAD_RESPONSE) for a change of protocol that was not asked for.
    """
    lines = [b"HTTP/1.1 %d %b" % (head.status, head.reason)]
    lines += map(b": ".join, lasting_headers(head))
    if head.status < 200:
        if head.status == 101:
            if not upgrade or head.upgrade != b"websocket":
                raise _bad_response("it changed to a protocol that was not asked for")
            lines.append(b"Connection: Upgrade\r\nUpgrade: websocket")
    else:
        chunked = head.body is BodyKind.CHUNKED
        if chunked and client_minor:
            lines.append(b"Transfer-Encoding: chunked")
        elif head.length >= 0:
            lines.append(b"Content-Length: %d" % head.length)
        if not keep_alive or head.body is BodyKind.UNTIL_CLOSE or (chunked and not client_minor):
            lines.append(b"Connection: close")
        elif not client_minor:
            lines.append(b"Connection: keep-alive")
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def lasting_headers(head: ResponseHead) -> list[Header]:
    """Return the headers of an app's answer that are the client's to see: none of one hop, none that frame it."""
    dropped = _NEVER_DOWNSTREAM | head.listed if head.listed else _NEVER_DOWNSTREAM
    return [header for header in head.headers if fold(header[0]) not in dropped]


def plain_response(
    status: int,
    body: bytes,
    content_type: bytes = b"application/json",
    close: bool = True,
    head_only: bool = False,
    extra: Sequence[Header] = (),
) -> bytes:
    """Return a whole response of the guard's own; `head_only` leaves out the body, as HEAD asks.

    ValueError when a header holds a control byte, or for an unknown status: bugs of the caller.
    """
    bodiless = status < 200 or status in (204, 304)
    headers: list[Header] = []
    if not bodiless:
        headers += [(b"Content-Type", content_type), (b"Content-Length", b"%d" % len(body))]
    headers += extra
    if close and status >= 200:
        headers.append((b"Connection", b"close"))
    head = b"HTTP/1.1 %d %b" % (status, HTTPStatus(status).phrase.encode("ascii"))
    lines = [head, _lines_of(headers), b"\r\n"] if headers else [head, b"\r\n"]
    return b"\r\n".join(lines) + (b"" if bodiless or head_only else body)


# The headers, and those of them that frame the message, with their folded names.
_Fields = tuple[tuple[Header, ...], list[tuple[bytes, bytes, bytes]]]

# What is known of header names, by spelling. Emptied when full and closed to long names, so that no client
# can make it grow.
_folded_names: dict[bytes, bytes] = {}
_MAX_REMEMBERED = 1024
_MAX_REMEMBERED_NAME = 64  # bytes


def _parse_common(head: bytes) -> RequestHead | None:
    """Parse the common head, or return None for any other."""
    found = _COMMON.fullmatch(head)
    if found is None:
        return None
    method, target, path, block, host_value, length = found.groups()
    headers = tuple(_PAIR.findall(block))
    host = parse_host(host_value)
    if host is None or method in _REFUSED_METHODS or len(headers) > MAX_HEADERS:
        return None
    kind, size = (BodyKind.NONE, 0) if length is None else (BodyKind.LENGTH, int(length))
    return RequestHead(method, target, path, 1, headers, kind, size, host, True, None, False, _NOTHING)


def _parse_strictly(head: bytes) -> RequestHead:
    """Parse any head, line by line."""
    line, _, _ = head.partition(b"\r\n")
    parts = line.split(b" ")
    if len(parts) != 3 or not _VERSION.fullmatch(parts[2]):
        raise RemoteProtocolError(Reason.HTTP_REQUEST_LINE)
    method, target, version = parts
    if version not in (b"HTTP/1.0", b"HTTP/1.1"):
        raise RemoteProtocolError(Reason.HTTP_VERSION, detail="HTTP/1.1 and HTTP/1.0 are")
    if len(method) > _LONGEST_METHOD or not NAME.fullmatch(method):
        raise RemoteProtocolError(Reason.HTTP_REQUEST_LINE)
    # Methods are case-sensitive (RFC 9110 9.1), but some apps fold their case: a rule about POST would pass `post`.
    if method != method.upper() or method in _REFUSED_METHODS:
        raise RemoteProtocolError(Reason.HTTP_METHOD, method=method[:32].decode("ascii"))
    if not _TARGET.fullmatch(target) and not (target == b"*" and method == b"OPTIONS"):
        raise RemoteProtocolError(Reason.HTTP_TARGET)
    return _read_request(method, target, version[-1] - 0x30, _split(head, len(line) + 2))


def _split(head: bytes, start: int) -> _Fields:
    """Split the header lines from `start` (RFC 9112 5), or say what is wrong with them."""
    if not head.endswith(b"\r\n\r\n"):
        _refuse("a head that does not end in an empty line")
    lines = head[start:-2].split(b"\r\n")
    lines.pop()
    if len(lines) > MAX_HEADERS:
        raise RemoteProtocolError(
            Reason.HTTP_TOO_MANY_HEADERS, limit=MAX_HEADERS, detail=f"more than {MAX_HEADERS} header lines"
        )
    # Without its good bytes a head is line breaks: as many CRLF pairs as there are lines.
    if head.translate(None, _VALUE_BYTES) != b"\r\n" * (len(lines) + 2):
        _refuse("a control byte, or a bare CR or LF")
    headers = []
    framing = []
    for line in lines:
        name, colon, value = line.partition(b":")
        folded = _folded_names.get(name)
        if folded is None:
            folded = _learn_name(name, line)
        if not colon:
            _refuse("a line without a colon")
        value = value.strip()  # only SP and HTAB can be there: see above
        headers.append((name, value))
        if folded in _FRAMING:
            framing.append((folded, name, value))
    return tuple(headers), framing


def _learn_name(name: bytes, line: bytes) -> bytes:
    """Return the folded name, and remember it, or say what is wrong with the line."""
    if not NAME.fullmatch(name):
        if line[:1] in (b" ", b"\t"):
            _refuse("a line that continues another (RFC 9112 5.2)")
        _refuse("a name that is no token, or white space before the colon" if line else "an empty line")
    folded = fold(name)
    if len(name) <= _MAX_REMEMBERED_NAME:
        if len(_folded_names) >= _MAX_REMEMBERED:
            _folded_names.clear()
        _folded_names[name] = folded
    return folded


@lru_cache(16)  # a guard has one `strip` and a few sets of its own headers
def _kept_names(strip: Callable[[bytes], bool], ours: tuple[bytes, ...]) -> dict[bytes, bool]:
    """Return the memory of which names, as spelled, go to the app. `rewrite_request` fills it."""
    return {}


def _judge_names(
    headers: Iterable[Header], strip: Callable[[bytes], bool], ours: Iterable[Header], memory: dict[bytes, bool]
) -> dict[bytes, bool]:
    """Return which of the headers' names go to the app; remember it within bounds."""
    dropped = _NEVER_UPSTREAM.union([fold(name) for name, _ in ours])
    judged = {name: fold(name) not in dropped and not strip(name) for name, _ in headers}
    if len(memory) >= _MAX_REMEMBERED:
        memory.clear()
    memory.update({name: kept for name, kept in judged.items() if len(name) <= _MAX_REMEMBERED_NAME})
    return judged


class _Framing(NamedTuple):
    """What the headers of either direction say about the message's end."""

    length: int  # -1: not declared
    chunked: bool
    listed: frozenset[bytes]
    close: bool
    keep_alive: bool
    upgrade: bytes | None
    hosts: list[bytes]
    expectations: list[bytes]


def _read_framing(fields: _Fields, minor: int) -> _Framing:
    """Read the headers that frame a message. RFC 9112 6.1, 6.2: one of the two, once, in its plain form."""
    length = -1
    chunked = False
    tokens: list[bytes] = []
    upgrades: list[bytes] = []
    hosts: list[bytes] = []
    expectations: list[bytes] = []
    for folded, name, value in fields[1]:
        if name.lower() != _FRAMING[folded]:
            _refuse(f"a name that an app may read as {_FRAMING[folded].decode('ascii')}")
        if folded == b"host":
            hosts.append(value)
        elif folded == b"connection":
            tokens += value.lower().split(b",")
        elif folded == b"contentlength":
            if length >= 0 or chunked or not _LENGTH.fullmatch(value):
                _unframed("Content-Length is not one plain number, or not alone")
            length = int(value)
        elif folded == b"transferencoding":
            if length >= 0 or chunked or minor == 0 or value.lower() != b"chunked":
                _unframed("Transfer-Encoding is not just `chunked`, or not alone")
            chunked = True
        elif folded == b"upgrade":
            upgrades.append(value.lower())
        else:
            expectations.append(value.lower())
    listed, close, keep_alive = _NOTHING, False, False
    if tokens:
        listed, close, keep_alive = _read_connection(tokens)
    upgrade = None
    if b"upgrade" in listed and upgrades and minor == 1:
        upgrade = b", ".join(upgrades)
        if not _PROTOCOLS.fullmatch(upgrade):
            _refuse("a malformed Upgrade")
    return _Framing(length, chunked, listed, close, keep_alive, upgrade, hosts, expectations)


def _read_connection(tokens: Iterable[bytes]) -> tuple[frozenset[bytes], bool, bool]:
    """Return the folded names that Connection lists, and whether `close` and `keep-alive` are among them."""
    names = {stripped for token in tokens if (stripped := token.strip(b" \t"))}
    close, keep_alive = b"close" in names, b"keep-alive" in names
    names -= {b"close", b"keep-alive"}
    if not names:
        return _NOTHING, close, keep_alive
    if not all(map(NAME.fullmatch, names)):
        _refuse("a malformed Connection")
    listed = frozenset(map(fold, names))
    if listed & _UNLISTABLE:
        _refuse("a Connection that lists a header that frames the message")
    return listed, close, keep_alive


def _read_request(method: bytes, target: bytes, minor: int, fields: _Fields) -> RequestHead:
    framing = _read_framing(fields, minor)
    hosts = framing.hosts
    host = parse_host(hosts[0]) if len(hosts) == 1 and len(hosts[0]) <= MAX_HOST else None
    if host is None:
        raise RemoteProtocolError(Reason.HTTP_HOST)
    if framing.expectations and framing.expectations != [b"100-continue"]:
        raise RemoteProtocolError(Reason.HTTP_EXPECTATION)
    has_body = framing.chunked or framing.length > 0
    if framing.upgrade == b"websocket" and has_body:
        _unframed("a websocket's request with a body")
    return RequestHead(
        method,
        target,
        target.partition(b"?")[0],
        minor,
        fields[0],
        BodyKind.CHUNKED if framing.chunked else BodyKind.LENGTH if framing.length >= 0 else BodyKind.NONE,
        max(framing.length, 0),
        host,
        not framing.close and (minor == 1 or framing.keep_alive),
        framing.upgrade,
        bool(framing.expectations) and has_body and minor == 1,
        framing.listed,
    )


def _read_response(line: re.Match[bytes], fields: _Fields, request_method: bytes) -> ResponseHead:
    minor, status = int(line[1]), int(line[2])
    framing = _read_framing(fields, minor)
    length = framing.length
    keep_alive = not framing.close and (minor == 1 or framing.keep_alive)
    if status < 200 or status == 204:
        # RFC 9112 6.1, 6.2: these declare no body. An app that does may send one, and must not be asked again.
        keep_alive = keep_alive and length <= 0 and not framing.chunked
        body, length = BodyKind.NONE, -1
    elif status == 304 or request_method == b"HEAD" or (request_method == b"CONNECT" and status < 300):
        body = BodyKind.NONE
    elif framing.chunked:
        body = BodyKind.CHUNKED
    elif length >= 0:
        body = BodyKind.LENGTH
    else:
        body, keep_alive = BodyKind.UNTIL_CLOSE, False
    reason = (line[3] or b"").strip(b" \t")
    return ResponseHead(status, reason, minor, fields[0], body, length, keep_alive, framing.upgrade, framing.listed)


def _lines_of(headers: Sequence[Header]) -> bytes:
    """Return our own headers as lines, without the last line break; ValueError where one would make two."""
    made = b"\r\n".join([b": ".join(header) for header in headers])
    if made.translate(None, _VALUE_BYTES) != b"\r\n" * (len(headers) - 1):
        raise ValueError("a control byte in a header of our own")
    return made


def _refuse(detail: str) -> NoReturn:
    raise RemoteProtocolError(Reason.HTTP_HEADER, detail=detail)


def _unframed(detail: str) -> NoReturn:
    raise RemoteProtocolError(Reason.HTTP_FRAMING, detail=detail)


def _bad_response(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reason.UPSTREAM_BAD_RESPONSE, target="", detail=detail)
