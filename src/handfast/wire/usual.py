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
_LONGEST_REMEMBERED = 4096  # bytes of header lines that a connection remembers
_LONGEST_LINE = 512  # bytes of a request line that it remembers
_MOST_LINES = 16


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
    """The answers that one connection carries. The head that came last is not read again."""

    __slots__ = ("_head", "_read")

    def __init__(self) -> None:
        self._head = b""
        self._read: tuple[ResponseHead, bytes] | None = None

    def usual(self, head: bytes) -> tuple[ResponseHead, bytes] | None:
        """As `usual_answer`."""
        if head != self._head or self._read is None:
            self._read = usual_answer(head)
            self._head = head if len(head) <= _LONGEST_REMEMBERED else b""
        return self._read

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
    """The requests of one connection, read and rewritten. What it has just seen is not read again.

    `set_headers` and `strip` are as for `rewrite_request`.
    """

    __slots__ = ("_by_line", "_head", "_lines", "_rest", "set_headers", "strip")

    def __init__(self, set_headers: tuple[Header, ...], strip: Callable[[bytes], bool]) -> None:
        self.strip = strip
        self.set_headers = set_headers
        self._lines = b""  # all of the last request but its first line
        self._head: RequestHead | None = None
        self._rest = b""  # what they became
        self._by_line: dict[bytes, tuple[RequestHead, bytes]] = {}  # requests with these lines

    def usual(self, data: bytes) -> tuple[RequestHead, bytes] | None:
        """Return the request and what is sent for it, if `data` is one that came before, whole and alone; else None."""
        line, _, lines = data.partition(b"\r\n")
        return self._by_line.get(line) if lines == self._lines else None

    def parse(self, head: bytes) -> RequestHead:
        """As `parse_request_head`, which may raise RemoteProtocolError."""
        line, _, lines = head.partition(b"\r\n")
        known = self._head
        if known is not None and lines == self._lines:
            found = _REQUEST_LINE.fullmatch(line)
            if found is not None and found[1] not in _NOT_HERE:
                return known._replace(method=found[1], target=found[2], path=found[3])
        self.forget()
        parsed = parse_request_head(head)
        if (
            parsed.body is BodyKind.NONE
            and parsed.upgrade is None
            and parsed.minor
            and parsed.keep_alive
            and len(lines) <= _LONGEST_REMEMBERED
        ):
            self._head, self._lines = parsed, lines
        return parsed

    def rewrite(self, head: RequestHead) -> bytes:
        """As `rewrite_request`, of the head that `parse` returned last."""
        if self._rest and self._head is not None:
            sent = b"%b %b HTTP/1.1\r\n%b" % (head.method, head.target, self._rest)
        else:
            sent = rewrite_request(head, self.set_headers, self.strip)
        if self._head is not None:
            self._rest = sent.partition(b"\r\n")[2]
            line = b"%b %b HTTP/1.1" % (head.method, head.target)
            if head.method not in _NOT_HERE and len(line) <= _LONGEST_LINE:
                if len(self._by_line) >= _MOST_LINES:
                    self._by_line.clear()
                self._by_line[line] = head, sent
        return sent

    def set_by(self, set_headers: tuple[Header, ...], strip: Callable[[bytes], bool]) -> None:
        """Set and strip by these from now on."""
        if strip is not self.strip or set_headers is not self.set_headers:
            self.strip, self.set_headers = strip, set_headers
            self._rest = b""
            self._by_line.clear()

    def forget(self) -> None:
        """Keep nothing of what was seen."""
        self._head, self._lines, self._rest = None, b"", b""
        self._by_line.clear()
