"""HTTP/2 header lists (RFC 9113 8) and what they say in HTTP/1.1, for a guard between a client and an app.

Owns the translation, both ways, and its strictness. It opens no socket, knows no frames and decides nothing
about who may do what.

Theory of operation. A request's header list is checked for what HTTP/2 forbids, and for every byte that could end
a line. Then it is written down as a head of HTTP/1.1 and read by `parse_request_head`. So there is one set of
rules for both: what is refused in HTTP/1.1 is refused here, and what reaches an app over either has one reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire.http1 import (
    MAX_HEAD,
    MAX_HEADERS,
    Header,
    RequestHead,
    ResponseHead,
    lasting_headers,
    parse_request_head,
)
from handfast.wire.identity import fold
from handfast.wire.targets import MAX_HOST

MAX_CRUMBS = 180  # pairs of a cookie that may come by themselves (RFC 9113 8.2.3), as many as Chrome keeps of a site
MAX_LIST = MAX_HEAD  # bytes of a header list, counted as RFC 9113 6.5.2 does

# RFC 9113 8.2.1, with the token of RFC 9110 5.6.2 for names. Values may be empty.
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_VISIBLE = re.compile(rb"[!-~]+")
_STATUS = re.compile(rb"[1-5][0-9]{2}")
_PSEUDO = frozenset({b":method", b":scheme", b":authority", b":path", b":protocol"})
# RFC 9113 8.2.2: a message that has one of these is malformed. HTTP2-Settings: RFC 7540 3.2.1.
_OF_CONNECTIONS = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"http2-settings"}
)
# What an HTTP/2 app never gets, by folded name. The host is in `:authority`; the rest is between us and the client.
_NEVER_UPSTREAM = frozenset({b"host", b"proxyauthorization", b"proxyauthenticate"})
_NEVER_DOWNSTREAM = frozenset({b"altsvc", b"proxyauthorization", b"proxyauthenticate"})  # see http1
# RFC 9110 6.5.1: these are of no use, or of ill use, where they come after the body was acted on.
_NEVER_IN_TRAILERS = frozenset(
    {
        *(b"host", b"contentlength", b"contentencoding", b"contenttype", b"contentrange", b"transferencoding"),
        *(b"connection", b"keepalive", b"proxyconnection", b"upgrade", b"te", b"trailer", b"expect", b"maxforwards"),
        *(b"authorization", b"proxyauthorization", b"proxyauthenticate", b"cookie", b"setcookie", b"altsvc"),
    }
)


def request_head(fields: Sequence[Header], ended: bool) -> RequestHead:
    """Return the head that a request's header list says; `ended`: no body follows it.

    An extended CONNECT for a websocket (RFC 8441) becomes the upgrade that HTTP/1.1 has for it. Raises
    RemoteProtocolError as `parse_request_head` does, and nothing else, on any list of names and values.
    """
    pseudo, rest = _split(fields)
    method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
    protocol = pseudo.get(b":protocol")
    if not _METHOD.fullmatch(method):
        raise RemoteProtocolError(Reason.HTTP_REQUEST_LINE)
    if method == b"CONNECT":
        if protocol != b"websocket" or ended:
            raise RemoteProtocolError(Reason.HTTP_METHOD, method="CONNECT")
        method = b"GET"
    elif protocol is not None:
        _refuse("a :protocol without CONNECT")
    if pseudo.get(b":scheme") not in (b"https", b"http"):  # http: of a caller behind a TLS proxy of its own, as ours
        _refuse("a :scheme that is neither https nor http")
    if not _VISIBLE.fullmatch(path):
        raise RemoteProtocolError(Reason.HTTP_TARGET)
    lines = [b"%b %b HTTP/1.1" % (method, path), b"host: " + _authority(pseudo, rest)]
    cookies: list[bytes] = []
    measured = False
    for name, value in rest:
        if name == b"cookie":
            cookies.append(value)
        elif name != b"host":
            measured = measured or name == b"content-length"
            lines.append(b"%b: %b" % (name, value))
    if cookies:  # RFC 9113 8.2.3: split for compression, and one again towards HTTP/1.1
        lines.append(b"cookie: " + b"; ".join(cookies))
    if protocol is not None:
        lines.append(b"connection: upgrade\r\nupgrade: websocket")
    elif not ended and not measured:
        lines.append(b"transfer-encoding: chunked")
    lines.append(b"\r\n")
    head = parse_request_head(b"\r\n".join(lines))
    if ended and head.length:
        raise RemoteProtocolError(Reason.HTTP_FRAMING, detail="a length, and no body")
    return head


def request_fields(
    fields: Iterable[Header], head: RequestHead, set_headers: Iterable[Header], strip: Callable[[bytes], bool]
) -> list[Header]:
    """Return the header list that is sent to an HTTP/2 app for what `request_head` made of `fields`.

    Taken out: what `strip` says, and every spelling of one in `set_headers`, which come last. The tuples of `fields`
    that stay are the ones that came. ValueError when `set_headers` hold a control byte, a bug of the caller.
    """
    ours = [(name.lower(), value) for name, value in set_headers]
    if not all(_NAME.fullmatch(name) and _VALUE.fullmatch(value) for name, value in ours):
        raise ValueError("a control byte in a header of our own")
    dropped = _NEVER_UPSTREAM.union([fold(name) for name, _ in ours])
    authority = next(value for name, value in head.headers if name == b"host")
    made = [(b":method", head.method), (b":scheme", b"https"), (b":authority", authority), (b":path", head.target)]
    for field in fields:
        name = field[0]
        if name[0] != 0x3A and fold(name) not in dropped and not strip(name):  # `:`
            made.append(_trim(field))
    return made + ours


def answer_fields(head: ResponseHead) -> list[Header]:
    """Return the header list, without `:status`, for an answer that came in HTTP/1.1."""
    fields = [(name.lower(), value) for name, value in lasting_headers(head)]
    if head.length >= 0:
        fields.append((b"content-length", b"%d" % head.length))
    return fields


def app_answer(fields: Sequence[Header]) -> tuple[int, list[Header]]:
    """Return the status of an HTTP/2 app's answer, and what of its header list goes to the client.

    Raises RemoteProtocolError (UPSTREAM_BAD_RESPONSE, target left empty) and nothing else.
    """
    try:
        if not fields or fields[0][0] != b":status" or not _STATUS.fullmatch(fields[0][1]):
            _refuse("it has no :status, or not first")
        rest = _checked(fields[1:])
    except RemoteProtocolError as error:
        raise RemoteProtocolError(
            Reason.UPSTREAM_BAD_RESPONSE, target="", detail=error.facts.get("detail", error.failure.message)
        ) from None
    return int(fields[0][1]), [field for field in rest if fold(field[0]) not in _NEVER_DOWNSTREAM]


def trailer_fields(fields: Sequence[Header], strip: Callable[[bytes], bool] | None = None) -> list[Header]:
    """Return what of a message's trailers goes on. `strip`: for a request's, as in `request_fields`.

    Raises RemoteProtocolError (HTTP_HEADER, HTTP_TOO_MANY_HEADERS) and nothing else.
    """
    return [
        field
        for field in _checked(fields)
        if fold(field[0]) not in _NEVER_IN_TRAILERS and (strip is None or not strip(field[0]))
    ]


def _split(fields: Sequence[Header]) -> tuple[dict[bytes, bytes], Sequence[Header]]:
    """Return the pseudo-headers, which come first and once, and the others (RFC 9113 8.3)."""
    pseudo: dict[bytes, bytes] = {}
    at = 0
    for name, value in fields:
        if name[:1] != b":":
            break
        if name in pseudo or name not in _PSEUDO:
            _refuse("a pseudo-header that comes twice, or that requests do not have")
        pseudo[name] = value
        at += 1
    return pseudo, _checked(fields[at:])


def _checked(fields: Sequence[Header]) -> Sequence[Header]:
    """Return a header list, trimmed; refuse what none may have (RFC 9113 8.2).

    A pseudo-header in here comes too late. White space around a value is malformed by RFC 9113 8.2.1, and yet usual in
    `grpc-message`; HTTP/1.1 takes it away (RFC 9110 5.5), and so do we.
    """
    trimmed = False
    # The crumbs of a cookie are one header, and cost as much to read as others.
    if len(fields) > MAX_HEADERS and (
        len(fields) > MAX_HEADERS + MAX_CRUMBS or sum(name != b"cookie" for name, _ in fields) >= MAX_HEADERS
    ):
        raise RemoteProtocolError(
            Reason.HTTP_TOO_MANY_HEADERS, limit=MAX_HEADERS, detail=f"more than {MAX_HEADERS} headers"
        )
    for name, value in fields:
        if not _NAME.fullmatch(name):
            _refuse("a name that is no token in lower case, or a pseudo-header after others")
        if not _VALUE.fullmatch(value):
            if not _VALUE.fullmatch(value.strip(b" \t")):
                _refuse(f"a control byte in the value of {name[:64].decode('ascii')}")
            trimmed = True
        if name in _OF_CONNECTIONS or (name == b"te" and value.lower() != b"trailers"):
            _refuse(f"HTTP/2 has no {name.decode('ascii')} (RFC 9113 8.2.2)")
    return [_trim(field) for field in fields] if trimmed else fields


def _trim(field: Header) -> Header:
    """Return a header without white space around its value, of the kind that it was."""
    name, value = field
    kept = value.strip(b" \t")
    return field if len(kept) == len(value) else tuple.__new__(type(field), (name, kept))


def _authority(pseudo: dict[bytes, bytes], rest: Sequence[Header]) -> bytes:
    """Return the one host that is named, as sent. Whether it is a valid one is judged with the head."""
    named = [value for name, value in rest if name == b"host"]
    authority = pseudo.get(b":authority")
    if authority is not None:
        if any(host != authority for host in named):
            raise RemoteProtocolError(Reason.HTTP_HOST)
    elif named:
        authority = named[0]
    if authority is None or len(named) > 1 or len(authority) > MAX_HOST or not _VISIBLE.fullmatch(authority):
        raise RemoteProtocolError(Reason.HTTP_HOST)
    return authority


def _refuse(detail: str) -> NoReturn:
    raise RemoteProtocolError(Reason.HTTP_HEADER, detail=detail)
