"""The usual request and the usual answer, as kept connections carry them by the thousand.

Shortcuts, and nothing else: what is read here is what `http1` would read and write, at a fraction of the cost,
and whatever is not plainly usual goes to `http1`. Tests hold the two against each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from handfast.wire.bodies import TOKEN, BodyKind
from handfast.wire.http1 import Header, RequestHead, ResponseHead, parse_request_head, rewrite_request

# Header lines that neither frame a message nor belong to one hop: those begin with a, c, e, h, k, p, t or u,
# in whatever spelling, so any name with another first letter is one; of those letters some names are spelled out.
_LINES = (
    rb"(?:(?:[BDFGIJLMNOQRSVWXYZbdfgijlmnoqrsvwxyz]%b*+"
    rb"|[Cc]ontent-(?:[Tt]ype|[Ee]ncoding|[Ll]anguage|[Dd]isposition|[Ss]ecurity-[Pp]olicy)"
    rb"|[Cc]ache-[Cc]ontrol|E[Tt]ag|etag|[Ee]xpires|[Aa]ge|[Aa]ccept-[Rr]anges|[Aa]ccess-[Cc]ontrol-[A-Za-z-]++)"
    rb": [!-~\x80-\xff][ -~\x80-\xff]*+(?<! )\r\n)*+" % TOKEN
)
_ANSWER = re.compile(
    rb"HTTP/1\.1 ((?:2(?!04)|3(?!04)|4|5)[0-9]{2}) ([ -~]*+)\r\n"
    rb"%b[Cc]ontent-[Ll]ength: ([0-9]{1,18})\r\n%b([Cc]onnection: [Kk]eep-[Aa]live\r\n)?%b\r\n"
    % (_LINES, _LINES, _LINES)
)
_REQUEST_LINE = re.compile(rb"([A-Z]{3,16}) ((/[!\"$->@-~]*+)[!\"$-~]*+) HTTP/1\.1")
_NOT_HERE = frozenset({b"CONNECT", b"TRACE", b"HEAD"})
_LONGEST_REMEMBERED = 4096  # bytes of a head that is remembered
_MOST_REMEMBERED = 8  # heads


def usual_answer(head: bytes) -> tuple[ResponseHead, bytes] | None:
    """Return a usual answer's head, and what is sent to a client of HTTP/1.1 whose connection stays open.

    None for any other. Not for answers to HEAD. The returned head lists no headers: they are in the bytes.
    """
    found = _ANSWER.fullmatch(head)
    if found is None or head.count(b"\r\n") > 100:
        return None
    response = ResponseHead(int(found[1]), found[2], 1, (), BodyKind.LENGTH, int(found[3]), True, None, frozenset())
    begin, end = found.span(4)
    return response, head if begin < 0 else head[:begin] + head[end:]


class Answers:
    """The answers of one app, on all connections. A head that came lately is not read again."""

    __slots__ = ("_read",)

    def __init__(self) -> None:
        self._read: dict[bytes, tuple[ResponseHead, bytes] | None] = {}

    def usual(self, head: bytes) -> tuple[ResponseHead, bytes] | None:
        """As `usual_answer`."""
        if head in self._read:
            return self._read[head]
        read = usual_answer(head)
        if len(head) <= _LONGEST_REMEMBERED:
            if len(self._read) >= _MOST_REMEMBERED:
                self._read.clear()
            self._read[head] = read
        return read

    def whole(self, data: bytes) -> tuple[ResponseHead, bytes] | None:
        """Return a usual answer's head and all that is sent for it, if `data` is one whole answer; else None."""
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            return None
        read = self.usual(data[:end])
        if read is None or len(data) - end != read[0].length:
            return None
        return read[0], read[1] + data[end:]


class Requests:
    """The requests of one client, read and rewritten. What came lately is not read again.

    `set_headers` and `strip` are as for `rewrite_request`.
    """

    __slots__ = ("_came", "_head", "_known", "_lines", "_rest", "set_headers", "strip")

    def __init__(self, set_headers: tuple[Header, ...], strip: Callable[[bytes], bool]) -> None:
        self.strip = strip
        self.set_headers = set_headers
        self._known: dict[bytes, tuple[RequestHead, bytes]] = {}  # heads, and what was sent for them
        # What was parsed last, if it is of the kind that may be remembered: others may differ in the first line alone.
        self._came = b""
        self._head: RequestHead | None = None
        self._lines = b""  # all of it but its first line
        self._rest = b""  # what these became

    def usual(self, data: bytes) -> tuple[RequestHead, bytes] | None:
        """Return the request and what is sent for it, if `data` is one that came before, whole and alone; else None."""
        return self._known.get(data) if len(data) <= _LONGEST_REMEMBERED else None

    def parse(self, head: bytes) -> RequestHead:
        """As `parse_request_head`, which may raise RemoteProtocolError."""
        line, _, lines = head.partition(b"\r\n")
        known = self._head
        if known is not None and lines == self._lines:
            found = _REQUEST_LINE.fullmatch(line)
            if found is not None and found[1] not in _NOT_HERE:
                self._came = head
                return known._replace(method=found[1], target=found[2], path=found[3])
        self._came, self._head, self._lines, self._rest = b"", None, b"", b""
        parsed = parse_request_head(head)
        if (
            parsed.body is BodyKind.NONE
            and parsed.upgrade is None
            and parsed.minor
            and parsed.keep_alive
            and len(head) <= _LONGEST_REMEMBERED
        ):
            self._came, self._head, self._lines = head, parsed, lines
        return parsed

    def rewrite(self, head: RequestHead) -> bytes:
        """As `rewrite_request`, of the head that `parse` returned last."""
        if self._rest and self._head is not None:
            sent = b"%b %b HTTP/1.1\r\n%b" % (head.method, head.target, self._rest)
        else:
            sent = rewrite_request(head, self.set_headers, self.strip)
        if self._head is not None:
            self._rest = sent.partition(b"\r\n")[2]
            if head.method not in _NOT_HERE and len(self._came) <= _LONGEST_REMEMBERED:
                if len(self._known) >= _MOST_REMEMBERED:
                    self._known.clear()
                self._known[self._came] = head, sent
        return sent

    def set_by(self, set_headers: tuple[Header, ...]) -> None:
        """Set these from now on."""
        if set_headers is not self.set_headers:
            self.set_headers = set_headers
            self._rest = b""
            self._known.clear()
