"""The shortcuts read and write what the long way does, or decline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire.bodies import BodyKind
from handfast.wire.http1 import RequestHead, parse_request_head, parse_response_head, rewrite_request, rewrite_response
from handfast.wire.identity import claims_identity
from handfast.wire.usual import Answers, Requests, usual_answer

OURS = ((b"Client-Cert", b":AA==:"), (b"X-Forwarded-For", b"127.0.0.1"))
LINES = (
    *("Date: Sat, 21 Nov 2026 09:53:40 GMT", "Content-Type: text/plain", "Content-Length: 12", "Server: x y"),
    *("Connection: keep-alive", "Connection: close", "Keep-Alive: timeout=5", "Transfer-Encoding: chunked", "X: "),
    *('ETag: "a"', 'Alt-Svc: h2=":1"', "Content_Length: 3", "content-length: 9", "Upgrade: h2c", "Set-Cookie: a=b"),
    *("Cache-Control: no-store", "X-A : b", " folded: x", "Trailer: X", "Proxy-Authenticate: x", "Vary:*", "TE: gzip"),
)


def _lines_of(made: bytes) -> list[bytes]:
    first, *rest = made.removesuffix(b"\r\n\r\n").split(b"\r\n")
    return [first, *sorted(rest, key=bytes.lower)]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["200 OK", "204 No Content", "304 Not Modified", "404 ", "101 Switching", "600 x", "200"]),
    st.lists(st.sampled_from(LINES), max_size=6),
)
def test_a_usual_answer_is_what_the_long_way_makes(status: str, lines: list[str]) -> None:
    """What the shortcut takes, the parser takes too, with the same meaning, and is sent on the same."""
    head = ("\r\n".join([f"HTTP/1.1 {status}", *lines]) + "\r\n\r\n").encode()
    found = usual_answer(head)
    if found is None:
        return
    response, sent = found
    long = parse_response_head(head, b"GET")
    assert (response.status, response.body, response.length) == (long.status, long.body, long.length)
    assert response.keep_alive == long.keep_alive
    written = rewrite_response(long, True)
    assert [line.lower() for line in _lines_of(sent)] == [line.lower() for line in _lines_of(written)]


def test_the_most_usual_answers_are_taken() -> None:
    """nginx's, uvicorn's and Go's plain answers go the short way."""
    for lines in (
        "Server: nginx\r\nDate: x\r\nContent-Type: text/html\r\nContent-Length: 5\r\nConnection: keep-alive\r\n",
        "date: x\r\nserver: uvicorn\r\ncontent-length: 17\r\ncontent-type: application/json\r\n",
        "Content-Type: text/plain\r\nDate: x\r\nContent-Length: 3\r\n",
    ):
        assert usual_answer(f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode()) is not None


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nX: a\nY: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nX: a\0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_what_is_not_usual_is_declined(head: bytes) -> None:
    """Anything that frames the body otherwise, or hides something, goes the long way."""
    assert usual_answer(head) is None


METHODS = ["GET", "HEAD", "POST", "CONNECT", "TRACE", "get", "DELETE"]
TARGETS = ["/", "/a?b=c", "/a/../b", "*", "http://x/", "/a#b", "/é", "/%2f"]
REQUEST_LINES = [
    "Host: localhost",
    "Accept: */*",
    "Client_Cert: x",
    "Content-Length: 3",
    "Connection: keep-alive, X",
    "X: y",
]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(METHODS),
            st.sampled_from(TARGETS),
            st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0"]),
            st.lists(st.sampled_from(REQUEST_LINES), max_size=4).map(lambda lines: ["Host: localhost", *lines]),
        ),
        max_size=6,
    )
)
def test_a_request_is_what_the_long_way_makes(requests: list[tuple[str, str, str, list[str]]]) -> None:
    """One after another, each request is read and rewritten as if it were the only one."""
    memory = Requests(OURS, claims_identity)
    for method, target, version, lines in requests:
        head = ("\r\n".join([f"{method} {target} {version}", *lines]) + "\r\n\r\n").encode()
        long = _outcome(parse_request_head, head)
        assert _outcome(memory.parse, head) == long
        if isinstance(long, RequestHead):
            assert memory.rewrite(long) == rewrite_request(long, OURS, claims_identity)


def _outcome(parse: Callable[[bytes], RequestHead], head: bytes) -> RequestHead | Reason:
    try:
        return parse(head)
    except RemoteProtocolError as error:
        return error.reason


def test_headers_that_are_set_anew_are_set_at_once() -> None:
    """A request that was rewritten with one identity's headers is rewritten anew with the next."""
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Old: 1\r\n\r\n"
    memory = Requests(OURS, claims_identity)
    for _ in range(2):
        assert b"Client-Cert: :AA==:\r\n" in memory.rewrite(memory.parse(head))
    assert memory.usual(head) is not None
    memory.set_by(((b"Client-Cert", b":BB==:"),))
    assert memory.usual(head) is None
    for _ in range(2):
        sent = memory.rewrite(memory.parse(head))
        assert b"Client-Cert: :BB==:\r\n" in sent
        assert b"AA" not in sent


def test_only_what_came_whole_is_known() -> None:
    """A request that came before is known by all its bytes: one byte more, less or other is not."""
    head = b"GET /a HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\n\r\n"
    memory = Requests(OURS, claims_identity)
    parsed = memory.parse(head)
    assert memory.usual(head) is None, "it was parsed, and not yet let through"
    sent = memory.rewrite(parsed)
    assert memory.usual(head) == (parsed, sent)
    for other in (head + b"G", head[:-1], head.replace(b"/a", b"/b"), head.replace(b"X-A: 1", b"X-A: 2"), b""):
        assert memory.usual(other) is None


def test_memories_are_bounded() -> None:
    """However many requests and answers come, few are kept, and none that is long."""
    memory, answers = Requests(OURS, claims_identity), Answers()
    heads = [b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % number for number in range(100)]
    for head in heads:
        memory.rewrite(memory.parse(head))
    assert sum(memory.usual(head) is not None for head in heads) <= 8
    long = b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 4096)
    memory.rewrite(memory.parse(long))
    assert memory.usual(long) is None
    for number in range(100):
        body = b"x" * (number % 7)
        whole = b"HTTP/1.1 200 OK\r\nX-Number: %d\r\nContent-Length: %d\r\n\r\n%b" % (number, len(body), body)
        for data in (whole, whole):
            found = answers.whole(data)
            assert found is not None
            assert found[1] == whole
        assert answers.whole(whole + b"x") is None


def test_a_body_is_never_remembered() -> None:
    """A request with a body is framed by its own header, whatever came before."""
    memory = Requests(OURS, claims_identity)
    for length in (3, 5):
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length
        parsed = memory.parse(head)
        assert (parsed.body, parsed.length) == (BodyKind.LENGTH, length)
        assert b"Content-Length: %d\r\n" % length in memory.rewrite(parsed)
