"""HTTP/1.1 framing: what is read, what is refused, and what is sent on."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire import http1
from handfast.wire.bodies import (
    MAX_EXTENSION,
    MAX_TRAILER,
    Body,
    BodyKind,
    ChunkedReader,
    CloseReader,
    LengthReader,
    body_reader,
)
from handfast.wire.http1 import (
    MAX_HEAD,
    MAX_HEADERS,
    RequestHead,
    find_head,
    parse_request_head,
    parse_response_head,
    plain_response,
    rewrite_request,
    rewrite_response,
    stays_open,
)
from handfast.wire.identity import claims_identity, fold
from handfast.wire.targets import ambiguous_path, normal_host

R = Reason
H = b"Host: a\r\n"


def get(lines: bytes = b"", start: bytes = b"GET / HTTP/1.1") -> bytes:
    return start + b"\r\n" + H + lines + b"\r\n"


def outcome(head: bytes) -> RequestHead | Reason:
    try:
        return parse_request_head(head)
    except RemoteProtocolError as error:
        return error.reason


def lines_of(head: bytes) -> list[bytes]:
    assert head.endswith(b"\r\n\r\n")
    return head[:-4].split(b"\r\n")


def keep_all(name: bytes) -> bool:
    return False


# Request heads.

CURL = b"GET / HTTP/1.1\r\nHost: localhost:8443\r\nUser-Agent: curl/8.14.1\r\nAccept: */*\r\n\r\n"
BROWSER = (
    b"GET /items/42?limit=10&q=%20 HTTP/1.1\r\nHost: App.Example.com\r\nUser-Agent: Mozilla/5.0 (X11)\r\n"
    b"Accept: text/html;q=0.9,*/*;q=0.8\r\nAccept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, br\r\n"
    b"Connection: keep-alive\r\nCookie: a=b; c=d\r\nUpgrade-Insecure-Requests: 1\r\nSec-Fetch-Dest: document\r\n"
    b"Sec-Fetch-Mode: navigate\r\nSec-Fetch-Site: same-origin\r\nPriority: u=0, i\r\n\r\n"
)
POST = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\n"

# head -> fields of the parsed head
ACCEPTED: list[tuple[bytes, dict[str, object]]] = [
    (CURL, {"method": b"GET", "target": b"/", "host": b"localhost", "body": BodyKind.NONE, "keep_alive": True}),
    (BROWSER, {"target": b"/items/42?limit=10&q=%20", "path": b"/items/42", "host": b"app.example.com"}),
    (POST, {"body": BodyKind.LENGTH, "length": 5}),
    (get(b"Content-Length: 0\r\n"), {"body": BodyKind.LENGTH, "length": 0}),
    (get(b"content-length:\t7 \r\n"), {"body": BodyKind.LENGTH, "length": 7}),
    (get(b"Content-Length: 999999999999999999\r\n"), {"length": 10**18 - 1}),
    (get(b"Transfer-Encoding: chunked\r\n"), {"body": BodyKind.CHUNKED, "length": 0}),
    (get(b"transfer-encoding: Chunked\r\n"), {"body": BodyKind.CHUNKED}),
    (get(start=b"OPTIONS * HTTP/1.1"), {"target": b"*", "path": b"*"}),
    (get(start=b"PURGE /x HTTP/1.1"), {"method": b"PURGE"}),
    (get(start=b"M-SEARCH /?? HTTP/1.1"), {"path": b"/", "target": b"/??"}),
    (get(start=b"GET / HTTP/1.0"), {"minor": 0, "keep_alive": False}),
    (get(b"Connection: keep-alive\r\n", b"GET / HTTP/1.0"), {"minor": 0, "keep_alive": True}),
    (get(b"Connection: close\r\n"), {"keep_alive": False}),
    (get(b"Connection: Keep-Alive, CLOSE\r\n"), {"keep_alive": False}),
    (get(b"Connection:, ,close,\r\n"), {"keep_alive": False, "listed": frozenset()}),
    (get(b"Connection: x-a\r\nConnection: X-B\r\n"), {"listed": frozenset({b"xa", b"xb"})}),
    (get(b"Connection: Upgrade\r\nUpgrade: WebSocket\r\n"), {"upgrade": b"websocket", "websocket": True}),
    (get(b"Upgrade: websocket\r\n"), {"upgrade": None, "websocket": False}),
    (get(b"Connection: upgrade\r\nUpgrade: h2c\r\n"), {"upgrade": b"h2c", "websocket": False}),
    (get(b"Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n"), {"websocket": False}),
    (get(b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"GET / HTTP/1.0"), {"upgrade": None}),
    (get(b"Expect: 100-Continue\r\nContent-Length: 1\r\n"), {"expect_continue": True}),
    (get(b"Expect: 100-continue\r\n"), {"expect_continue": False}),
    (get(b"Expect: 100-continue\r\nContent-Length: 1\r\n", b"PUT / HTTP/1.0"), {"expect_continue": False}),
    (get(b"X-A: \t b\tc \t\r\nX-E:\r\n"), {"headers": ((b"Host", b"a"), (b"X-A", b"b\tc"), (b"X-E", b""))}),
    (get(b"X-A: y \r\n"), {"headers": ((b"Host", b"a"), (b"X-A", b"y"))}),
    (get(b"X-A:  y\r\n"), {"headers": ((b"Host", b"a"), (b"X-A", b"y"))}),
    (get("X-A: Zoë\r\n".encode()), {"headers": ((b"Host", b"a"), (b"X-A", "Zoë".encode()))}),
    (b"GET / HTTP/1.1\r\nhOST:A.B.:80\r\n\r\n", {"host": b"a.b"}),
    (b"GET / HTTP/1.1\r\nHost: [::1]:65535\r\n\r\n", {"host": b"::1"}),
    (b"GET / HTTP/1.1\r\nHost: [2001:DB8:0::1]\r\n\r\n", {"host": b"2001:db8::1"}),
    (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", {"host": b"127.0.0.1"}),
]

REFUSED: list[tuple[bytes, Reason]] = [
    # F1: two framings, or one that two servers may read in two ways.
    (get(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), R.HTTP_FRAMING),
    (get(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"), R.HTTP_FRAMING),
    (get(b"Content-Length: 5\r\nContent-Length: 6\r\n"), R.HTTP_FRAMING),
    (get(b"Content-Length: 5\r\nContent-Length: 5\r\n"), R.HTTP_FRAMING),
    (b"GET / HTTP/1.1\r\nContent-Length: 5\r\nHost: a\r\nContent-Length: 5\r\n\r\n", R.HTTP_FRAMING),
    *(
        (get(b"Content-Length:" + value + b"\r\n"), R.HTTP_FRAMING)
        for value in (
            b"",
            b" ",
            b"5, 5",
            b"5,6",
            b"+5",
            b"-5",
            b"0x5",
            b"5.0",
            b"5 5",
            b"1e3",
            b"9" * 19,
            b'"5"',
            b"\xb2",
        )
    ),
    *(
        (get(b"Transfer-Encoding: " + value + b"\r\n"), R.HTTP_FRAMING)
        for value in (
            *(b"", b"identity", b"gzip", b"gzip, chunked", b"chunked, chunked", b"chunked, identity", b"chunked;q=1"),
            *(b"xchunked", b"chunkedx", b'"chunked"', b"chunked,", b",chunked", b"chun ked", b"\xefchunked", b"cow"),
        )
    ),
    (get(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), R.HTTP_FRAMING),
    (get(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n"), R.HTTP_FRAMING),
    (get(b"Transfer-Encoding: chunked\r\n", b"POST / HTTP/1.0"), R.HTTP_FRAMING),
    (get(b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n"), R.HTTP_FRAMING),
    # Names and lines that some servers repair.
    (get(b"Transfer-Encoding : chunked\r\n"), R.HTTP_HEADER),
    (get(b"Transfer-Encoding\t: chunked\r\n"), R.HTTP_HEADER),
    (get(b" Transfer-Encoding: chunked\r\n"), R.HTTP_HEADER),
    (get(b"X: y\r\n Transfer-Encoding: chunked\r\n"), R.HTTP_HEADER),
    (get(b"X:\r\n\tchunked\r\n"), R.HTTP_HEADER),
    (get(b"Transfer-Encoding:\x0bchunked\r\n"), R.HTTP_HEADER),
    (get(b"Transfer-Encoding: chunked\x0c\r\n"), R.HTTP_HEADER),
    (get(b"X: y\rTransfer-Encoding: chunked\r\n"), R.HTTP_HEADER),
    (get(b"X: y\nTransfer-Encoding: chunked\r\n"), R.HTTP_HEADER),
    (get(b"X: y\n\rTransfer-Encoding: chunked\r\n"), R.HTTP_HEADER),
    (get(b"Transfer_Encoding: chunked\r\n"), R.HTTP_HEADER),
    (get(b"TRANSFER.ENCODING: chunked\r\n"), R.HTTP_HEADER),
    (get(b"Content_Length: 5\r\n"), R.HTTP_HEADER),
    (get(b"content-length_: 5\r\n"), R.HTTP_HEADER),
    (get(b"Host_: b\r\n"), R.HTTP_HEADER),
    (get(b"-Host: b\r\n"), R.HTTP_HEADER),
    (get(b"Con.nection: close\r\n"), R.HTTP_HEADER),
    (get(b": y\r\n"), R.HTTP_HEADER),
    (get(b":\r\n"), R.HTTP_HEADER),
    (get(b"X\r\n"), R.HTTP_HEADER),
    (get(b"X y: z\r\n"), R.HTTP_HEADER),
    (get(b"X\0: z\r\n"), R.HTTP_HEADER),
    (get(b"X\x7f: z\r\n"), R.HTTP_HEADER),
    (get(b"X\xe9: z\r\n"), R.HTTP_HEADER),
    (get(b"X(: z\r\n"), R.HTTP_HEADER),
    (get(b"X: a\0b\r\n"), R.HTTP_HEADER),
    (get(b"X: a\x7f\r\n"), R.HTTP_HEADER),
    (get(b"X: a\x1b[0m\r\n"), R.HTTP_HEADER),
    (get(b"X: y\r\r\n"), R.HTTP_HEADER),
    (get() + b"X: y\r\n\r\n", R.HTTP_HEADER),
    (get()[:-2], R.HTTP_HEADER),
    (b"GET / HTTP/1.1\r\n", R.HTTP_HEADER),
    (b"GET / HTTP/1.1\r\n\r\n\r\n", R.HTTP_HEADER),
    *(
        (get(b"Connection: " + value + b"\r\n"), R.HTTP_HEADER)
        for value in (
            *(b"Host", b"content-length", b"close, Transfer-Encoding", b"Content_Length", b"expect", b"keep alive"),
            *(b'"close"', b"close;x", b"\xff"),
        )
    ),
    (get(b"Connection: upgrade\r\nUpgrade: web(socket)\r\n"), R.HTTP_HEADER),
    (get(b"X: y\r\n" * MAX_HEADERS), R.HTTP_TOO_MANY_HEADERS),
    (get(b"X: y\r\n" * (MAX_HEADERS - 1) + b"C: d\r\n"), R.HTTP_TOO_MANY_HEADERS),
    # Request lines.
    *(
        (line + b"\r\n" + H + b"\r\n", R.HTTP_REQUEST_LINE)
        for line in (
            *(
                b"",
                b" ",
                b"GET",
                b"GET /",
                b"GET  / HTTP/1.1",
                b" GET / HTTP/1.1",
                b"GET / HTTP/1.1 ",
                b"GET / a HTTP/1.1",
            ),
            *(
                b"GET\t/\tHTTP/1.1",
                b"GET / http/1.1",
                b"GET / HTTP/11",
                b"GET / HTTP/1.1\r",
                b"GET / HTTP/1.10",
                b"GET / ",
            ),
            *(b"\r\nGET / HTTP/1.1", b"\0GET / HTTP/1.1", b"G@T / HTTP/1.1", b"G\xc9T / HTTP/1.1", b"/ / HTTP/1.1"),
            *(b"GET / HTTP/1.1\nX: y", b"GET / HTTP/+1.1", b"GET / HTTP/ 1.1", b"GET / XTTP/1.1"),
        )
    ),
    (b"\r\n\r\n", R.HTTP_REQUEST_LINE),
    (b"", R.HTTP_REQUEST_LINE),
    (b"PRI * HTTP/2.0\r\n\r\n", R.HTTP_VERSION),
    *((get(start=b"GET / HTTP/" + version), R.HTTP_VERSION) for version in (b"0.9", b"1.2", b"2.0", b"3.0", b"9.9")),
    *(
        (get(start=method + b" / HTTP/1.1"), R.HTTP_METHOD)
        for method in (b"CONNECT", b"TRACE", b"trace", b"Connect", b"head", b"Head", b"get", b"Post", b"purge")
    ),
    (get(start=b"CONNECT a:443 HTTP/1.1"), R.HTTP_METHOD),
    *(
        (get(start=b"GET " + target + b" HTTP/1.1"), R.HTTP_TARGET)
        for target in (
            *(b"http://a/", b"HTTP://a", b"a:443", b"*", b"a", b"", b"?x", b"/#x", b"/a?b#c", b"/\0", b"/\x7f", b"/\t"),
            *(b"/\xe9", b"/a\rb", b"/a\nb", b"//a#", b"\\a", b"%2f"),
        )
    ),
    (get(start=b"OPTIONS ** HTTP/1.1"), R.HTTP_TARGET),
    # Host.
    (b"GET / HTTP/1.1\r\n\r\n", R.HTTP_HOST),
    (b"GET / HTTP/1.1\r\nX: y\r\n\r\n", R.HTTP_HOST),
    (b"GET / HTTP/1.0\r\n\r\n", R.HTTP_HOST),
    (get(H), R.HTTP_HOST),
    (get(b"host: b\r\n"), R.HTTP_HOST),
    *(
        (b"GET / HTTP/1.1\r\nHost:" + host + b"\r\n\r\n", R.HTTP_HOST)
        for host in (
            *(b"", b" ", b"a b", b"a,b", b"a@b", b"u:p@a", b"a/b", b"http://a", b"a:", b"a:b", b"a:80:80", b"a:65536"),
            *(b"a:-1", b"a:+1", b":80", b"[::1", b"::1", b"[a]", b"[127.0.0.1]", b"[::1]x", b"[::1%25eth0]", b"[::g]"),
            *(b"a..b", b".a", b".", b"a..", b"-a", b"a-", b"*.a", b"a%2eb", b"a\\b", b"a#b", b"a?b", b"\xe9", b"a\tb"),
            *(
                b"127.1",
                b"1.2.3.4.5",
                b"0x7f.1",
                b"a.1",
                b"010.0.0.1",
                b"256.1.1.1",
                b"1",
                b"x" * 64,
                b"a." * 127 + b"a",
            ),
            *(b"a" * 300, b"'a'", b"a_b;c", b"a:808080"),
        )
    ),
    # Expect.
    *(
        (get(b"Content-Length: 1\r\nExpect: " + value + b"\r\n"), R.HTTP_EXPECTATION)
        for value in (b"", b"x", b"100-continue, x", b"200-ok", b"100-continue;a")
    ),
    (get(b"Expect: 100-continue\r\nExpect: 100-continue\r\n"), R.HTTP_EXPECTATION),
]


@pytest.mark.parametrize(("head", "fields"), ACCEPTED)
def test_good_request_heads(head: bytes, fields: dict[str, object]) -> None:
    """A good head is read as the RFC says."""
    parsed = parse_request_head(head)
    assert {field: getattr(parsed, field) for field in fields} == fields


@pytest.mark.parametrize(("head", "reason"), REFUSED)
def test_bad_request_heads(head: bytes, reason: Reason) -> None:
    """A head that is malformed, or that two servers may read in two ways, is refused for its own reason."""
    assert outcome(head) is reason


@pytest.mark.parametrize("head", [head for head, _ in ACCEPTED])
def test_heads_are_found_at_any_cut(head: bytes) -> None:
    """The end of a head is found at the same place whether it comes whole, byte by byte or with more behind it."""
    assert [find_head(head[:cut]) for cut in range(len(head))] == [-1] * len(head)
    assert find_head(head) == find_head(head + head) == len(head)
    assert find_head(bytearray(b"xx" + head + b"GET /"), 2) == len(head) + 2


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\nHost: a\n\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: y\n\r\n", b"\n\n"])
def test_heads_that_end_in_bare_line_feeds(head: bytes) -> None:
    """A head whose end only a lenient server would see is refused at once, not waited for."""
    with pytest.raises(RemoteProtocolError) as refused:
        find_head(head)
    assert refused.value.reason is R.HTTP_HEADER


def test_heads_are_bounded() -> None:
    """A head of MAX_HEAD bytes is found; a longer one is refused as soon as that is clear."""
    head = get(b"X: " + b"y" * (MAX_HEAD - len(get(b"X: \r\n"))) + b"\r\n")
    assert find_head(head) == len(head) == MAX_HEAD
    assert find_head(b"zz" + head, 2) == MAX_HEAD + 2
    assert find_head(head[:-1]) == -1
    for longer in (get(b"X" + head), b"A" * MAX_HEAD, head[:-1] + b"X\r\n\r\n"):
        with pytest.raises(RemoteProtocolError) as refused:
            find_head(longer)
        assert refused.value.reason is R.HTTP_HEAD_TOO_LARGE


def test_common_heads_take_the_fast_path() -> None:
    """The heads that clients send most are taken by the regular expression, and no head is read otherwise by it."""
    for head in (CURL, BROWSER, POST, CURL.lower().replace(b"get / http", b"GET / HTTP")):
        assert http1._parse_common(head) is not None
    for head, _ in (*ACCEPTED, *REFUSED):
        fast = http1._parse_common(head)
        assert fast is None or fast == http1._parse_strictly(head)


TOKENS = st.sampled_from(
    [
        *(
            b"GET",
            b"POST",
            b"HEAD",
            b"TRACE",
            b" ",
            b" ",
            b"/",
            b"/a",
            b"?q",
            b"*",
            b"HTTP/1.1",
            b"HTTP/1.0",
            b"\r\n",
            b"\r\n",
        ),
        *(
            b"Host: a\r\n",
            b"Host",
            b"host",
            b": ",
            b": ",
            b":",
            b"a",
            b"a.b:80",
            b"[::1]",
            b"Content-Length: 5\r\n",
            b"5",
        ),
        *(
            b"Content-Length",
            b"content-length",
            b"Transfer-Encoding",
            b"chunked",
            b"Connection",
            b"keep-alive",
            b"close",
        ),
        *(b"Upgrade", b"websocket", b"Expect: 100-continue\r\n", b"Cookie: a=b\r\n", b"Accept: */*\r\n", b"X-A: b\r\n"),
        *(
            b"Connection: keep-alive\r\n",
            b"traceparent: 00\r\n",
            b"\r",
            b"\n",
            b"\t",
            b"\0",
            b"\x7f",
            b"\xe9",
            b"_",
            b"-",
        ),
        *(
            b"Content_Length: 1\r\n",
            b"X:  y \r\n",
            b"Te: x\r\n",
            b"User-Agent: u\r\n",
            b",",
            b"#",
            b"127.1",
            b"\r\n\r\n",
        ),
    ]
)
SOUP = st.lists(TOKENS, max_size=25).map(b"".join)
HEAD_SOUP = st.lists(TOKENS, max_size=14).map(lambda parts: b"GET / HTTP/1.1\r\n" + b"".join(parts) + b"\r\n\r\n")
MUTATED = st.tuples(
    st.sampled_from([CURL, BROWSER, POST]),
    st.integers(0, 200),
    st.integers(0, 2),
    st.one_of(st.binary(max_size=3), TOKENS),
).map(lambda m: m[0][: m[1]] + m[3] + m[0][m[1] + m[2] :])


@settings(max_examples=600)
@given(st.one_of(SOUP, HEAD_SOUP, MUTATED, st.binary(max_size=200)))
def test_what_the_fast_path_takes_the_strict_one_takes_alike(head: bytes) -> None:
    """The fast path never takes what the strict parser refuses, nor reads it otherwise; both raise nothing else."""
    fast = http1._parse_common(head)
    try:
        strict = http1._parse_strictly(head)
    except RemoteProtocolError:
        assert fast is None
    else:
        assert fast in (None, strict)


@settings(max_examples=400)
@given(st.one_of(SOUP, HEAD_SOUP, MUTATED, st.binary(max_size=200)), st.booleans())
def test_accepted_heads_leave_the_guard_with_one_framing(head: bytes, strips: bool) -> None:
    """What is sent on has one Host, at most one framing header, and reads back to the same request."""
    try:
        parsed = parse_request_head(head)
    except RemoteProtocolError:
        return
    sent = rewrite_request(parsed, [(b"Client-Cert", b":AA==:")], claims_identity if strips else keep_all)
    folded = [fold(line.partition(b":")[0]) for line in lines_of(sent)[1:]]
    assert folded.count(b"host") == 1
    assert folded.count(b"clientcert") == 1
    assert folded.count(b"contentlength") + folded.count(b"transferencoding") <= 1
    again = parse_request_head(sent)
    for field in ("method", "target", "path", "body", "length", "host", "websocket", "expect_continue"):
        assert getattr(again, field) == getattr(parsed, field)
    assert again.minor == 1
    if parsed.body is not BodyKind.NONE:
        assert folded.count(b"contentlength") + folded.count(b"transferencoding") == 1


@given(SOUP)
def test_no_bytes_break_the_search_for_a_head(data: bytes) -> None:
    """Finding a head raises nothing but RemoteProtocolError, and finds only ends of heads."""
    try:
        end = find_head(data)
    except RemoteProtocolError:
        return
    assert end == -1 or data[:end].endswith(b"\r\n\r\n")


def test_memory_of_names_is_bounded() -> None:
    """Clients cannot make the memories of header names grow, neither by number nor by length."""
    ours = [(b"X-Test", b"1")]
    for number in range(40):
        lines = b"".join(b"X-%d-%d: y\r\n" % (number, line) for line in range(MAX_HEADERS - 2))
        rewrite_request(parse_request_head(get(b"Te: x\r\n" + lines)), ours, keep_all)
    rewrite_request(parse_request_head(get(b"Te: x\r\n" + b"x" * 60_000 + b": y\r\n")), ours, keep_all)
    for memory in (http1._folded_names, http1._kept_names(keep_all, (b"X-Test",))):
        assert len(memory) < 1024 + MAX_HEADERS
        assert max(map(len, memory)) <= 64


# What is sent to the app.

OURS = [(b"Client-Cert", b":AA==:"), (b"Client-Identity", b'"spiffe://x/web"'), (b"X-Forwarded-For", b"192.0.2.1")]

REWRITTEN: list[tuple[bytes, list[bytes]]] = [
    (b"", []),
    (b"Accept: */*\r\nX-A:\r\n", [b"Accept: */*", b"X-A: "]),
    (b"Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\n", []),
    (b"TE: trailers\r\nTrailer: X-Sum\r\nProxy-Authorization: Basic x\r\nHTTP2-Settings: AA\r\n", []),
    (b"Connection: X-A, x_b\r\nX-A: 1\r\nX-B: 2\r\nX-C: 3\r\n", [b"X-C: 3"]),
    (b"Upgrade: websocket\r\n", []),
    (b"Connection: Upgrade\r\nUpgrade: h2c\r\n", []),
    (
        b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n",
        [b"Sec-WebSocket-Key: x", b"Connection: Upgrade", b"Upgrade: websocket"],
    ),
    (b"Content-Length:  007\r\nX: y\r\n", [b"X: y", b"Content-Length: 7"]),
    (b"transfer-encoding: CHUNKED\r\n", [b"Transfer-Encoding: chunked"]),
    (b"Content-Length: 1\r\nExpect: 100-CONTINUE\r\n", [b"Content-Length: 1", b"Expect: 100-continue"]),
    (b"Expect: 100-continue\r\n", []),
    # E1, E2, E3, E5: every spelling of an identity header, and of a header that we set.
    (b"Client-Cert: :BB==:\r\nclient_cert: x\r\nCLIENT.CERT: x\r\nClientCert: x\r\nClient-Cert: x\r\n", []),
    (b"X-SSL-Client-Verify: SUCCESS\r\nSSL_CLIENT_S_DN: CN=admin\r\nRemote_User: root\r\n", []),
    (b"X-Forwarded-For: 10.0.0.1\r\nX_Forwarded_For: 10.0.0.2\r\n", []),
    (b"X-Forwarded-Host: b\r\nForwarded: for=b\r\n", [b"X-Forwarded-Host: b", b"Forwarded: for=b"]),
    # E4: Connection cannot take out what we set.
    (b"Connection: Client-Cert, Client-Identity, X-Forwarded-For, close\r\n", []),
    (b"Connection: client_cert\r\nTE: Client-Cert\r\nTrailer: Client-Identity\r\nKeep-Alive: Client-Cert\r\n", []),
]


@pytest.mark.parametrize(("lines", "kept"), REWRITTEN)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_what_the_app_is_sent(lines: bytes, kept: list[bytes], version: bytes) -> None:
    """The app gets the same request line as HTTP/1.1, its end-to-end headers, canonical framing, and ours last."""
    head = b"PUT /a?b HTTP/" + version + b"\r\n" + H + lines + b"\r\n"
    if version == b"1.0":
        if b"transfer-encoding" in lines:
            return
        kept = [line for line in kept if line.partition(b":")[0] not in (b"Expect", b"Connection", b"Upgrade")]
    if b"websocket" in lines:
        head = head.replace(b"PUT", b"GET")
    for _ in range(2):  # the second time from memory
        sent = lines_of(rewrite_request(parse_request_head(head), OURS, claims_identity))
        assert sent[0] == head[:3] + b" /a?b HTTP/1.1"
        assert sent[1:] == [b"Host: a", *kept, *(b"%b: %b" % header for header in OURS)]


def test_nothing_is_set_or_stripped_unasked() -> None:
    """Without headers of our own and with nothing to strip, end-to-end headers pass as they came."""
    head = get(b"Client-Cert: x\r\nX-Forwarded-For: y\r\n")
    assert rewrite_request(parse_request_head(head), (), keep_all) == head


def test_our_host_replaces_the_clients() -> None:
    """A Host that we set is the only one that is sent."""
    sent = rewrite_request(parse_request_head(get()), [(b"Host", b"b")], keep_all)
    assert sent == b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"


@pytest.mark.parametrize("value", [b"a\r\nX: y", b"a\n", b"a\r", b"\r\n", b"a\0", b"\x7f"])
def test_our_own_headers_cannot_be_split(value: bytes) -> None:
    """E7: a value of ours that would end its line is a bug, and nothing is sent."""
    head = parse_request_head(get())
    for ours in ([(b"Client-Identity", value)], [(b"A", b"b"), (b"C", value), (b"D", b"e")], [(value, b"a")]):
        with pytest.raises(ValueError, match="control byte"):
            rewrite_request(head, ours, keep_all)
        with pytest.raises(ValueError, match="control byte"):
            plain_response(200, b"", extra=ours)


# Response heads.


def answer(lines: bytes = b"", start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return start + b"\r\n" + lines + b"\r\n"


CHUNKED = b"Transfer-Encoding: chunked\r\n"
FIVE = b"Content-Length: 5\r\n"

# head, method of the request -> (body, length, keep_alive)
ANSWERS: list[tuple[bytes, bytes, tuple[BodyKind, int, bool]]] = [
    (answer(FIVE), b"GET", (BodyKind.LENGTH, 5, True)),
    (answer(CHUNKED), b"GET", (BodyKind.CHUNKED, -1, True)),
    (answer(), b"GET", (BodyKind.UNTIL_CLOSE, -1, False)),
    (answer(b"Content-Length: 0\r\n"), b"GET", (BodyKind.LENGTH, 0, True)),
    (answer(FIVE), b"HEAD", (BodyKind.NONE, 5, True)),
    (answer(CHUNKED), b"HEAD", (BodyKind.NONE, -1, True)),
    (answer(), b"HEAD", (BodyKind.NONE, -1, True)),
    (answer(FIVE), b"CONNECT", (BodyKind.NONE, 5, True)),
    (answer(FIVE, b"HTTP/1.1 403 No"), b"CONNECT", (BodyKind.LENGTH, 5, True)),
    (answer(b"", b"HTTP/1.1 204 No Content"), b"GET", (BodyKind.NONE, -1, True)),
    (answer(b"Content-Length: 0\r\n", b"HTTP/1.1 204 No Content"), b"GET", (BodyKind.NONE, -1, True)),
    (answer(FIVE, b"HTTP/1.1 204 No Content"), b"GET", (BodyKind.NONE, -1, False)),
    (answer(CHUNKED, b"HTTP/1.1 204 No Content"), b"GET", (BodyKind.NONE, -1, False)),
    (answer(FIVE, b"HTTP/1.1 304 Not Modified"), b"GET", (BodyKind.NONE, 5, True)),
    (answer(b"", b"HTTP/1.1 100 Continue"), b"POST", (BodyKind.NONE, -1, True)),
    (answer(b"", b"HTTP/1.1 103 Early Hints"), b"GET", (BodyKind.NONE, -1, True)),
    (answer(FIVE + b"Connection: close\r\n"), b"GET", (BodyKind.LENGTH, 5, False)),
    (answer(FIVE, b"HTTP/1.0 200 OK"), b"GET", (BodyKind.LENGTH, 5, False)),
    (answer(FIVE + b"Connection: keep-alive\r\n", b"HTTP/1.0 200 OK"), b"GET", (BodyKind.LENGTH, 5, True)),
    (answer(FIVE, b"HTTP/1.1 200 "), b"GET", (BodyKind.LENGTH, 5, True)),
    (answer(FIVE, b"HTTP/1.1 200"), b"GET", (BodyKind.LENGTH, 5, True)),
    (answer(FIVE, b"HTTP/1.1 599 \xc3\xa9\t!"), b"GET", (BodyKind.LENGTH, 5, True)),
]

BAD_ANSWERS = [
    *(
        answer(FIVE, line)
        for line in (
            *(b"", b"200 OK", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 099 OK"),
            *(b"HTTP/1.1 600 OK", b"HTTP/1.1  200 OK", b"HTTP/2.0 200 OK", b"HTTP/1.2 200 OK", b"http/1.1 200 OK"),
            *(
                b"HTTP/1.1 200\tOK",
                b"HTTP/1.1 200 O\rK",
                b"HTTP/1.1 200 O\nK",
                b"HTTP/1.1 200 O\0K",
                b" HTTP/1.1 200 OK",
            ),
            *(
                b"HTTP/1.1 +20 OK",
                b"\r\nHTTP/1.1 200 OK",
                b"ICY 200 OK",
                b"HTTP/1.1 2e1 OK",
                b"HTTP/1.1 \xb2\xb2\xb2 OK",
            ),
        )
    ),
    answer(FIVE + CHUNKED),
    answer(CHUNKED + FIVE),
    answer(FIVE + FIVE),
    answer(b"Content-Length: 5, 5\r\n"),
    answer(b"Content-Length: \r\n"),
    answer(b"Transfer-Encoding: gzip, chunked\r\n"),
    answer(CHUNKED, b"HTTP/1.0 200 OK"),
    answer(FIVE + b"X: y\n"),
    answer(FIVE + b"X: y\r\n Z: y\r\n"),
    answer(FIVE + b"X : y\r\n"),
    answer(FIVE + b"X\r\n"),
    answer(FIVE + b"X: \0\r\n"),
    answer(b"Content_Length: 5\r\n"),
    answer(b"Connection: content-length\r\n" + FIVE),
    answer(b"X: y\r\n" * (MAX_HEADERS + 1)),
    answer(FIVE)[:-2],
    b"HTTP/1.1 200 OK\r\n",
    b"\x16\x03\x01\r\n\r\n",
]


@pytest.mark.parametrize(("head", "method", "expected"), ANSWERS)
def test_good_response_heads(head: bytes, method: bytes, expected: tuple[BodyKind, int, bool]) -> None:
    """The end of a response's body is found as RFC 9112 6.3 says."""
    parsed = parse_response_head(head, method)
    assert (parsed.body, parsed.length, parsed.keep_alive) == expected


@pytest.mark.parametrize("head", BAD_ANSWERS)
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_bad_response_heads(head: bytes, method: bytes) -> None:
    """A response head that is malformed or framed twice is refused, and the reason says what is wrong."""
    with pytest.raises(RemoteProtocolError) as refused:
        parse_response_head(head, method)
    assert refused.value.reason is R.UPSTREAM_BAD_RESPONSE
    assert refused.value.facts["detail"]
    assert refused.value.facts["target"] == ""


@settings(max_examples=300)
@given(st.one_of(SOUP, SOUP.map(lambda rest: b"HTTP/1.1 200 OK\r\n" + rest + b"\r\n\r\n"), st.binary(max_size=100)))
def test_responses_raise_nothing_else_and_read_back(head: bytes) -> None:
    """Any bytes are a response or a RemoteProtocolError; what is sent to the client reads back to the same."""
    try:
        parsed = parse_response_head(head, b"GET")
    except RemoteProtocolError:
        return
    again = parse_response_head(rewrite_response(parsed, parsed.keep_alive), b"GET")
    for field in ("status", "reason", "body", "length", "keep_alive"):
        assert getattr(again, field) == getattr(parsed, field)


def test_what_the_client_is_sent() -> None:
    """The client gets the end-to-end headers, framing of our own, and no way round the guard."""
    head = parse_response_head(
        answer(
            b'Server: x\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 5\r\nAlt-Svc: h3=":443"\r\n'
            b"content-length:  05\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nTrailer: T\r\nUpgrade: h2c\r\n",
            b"HTTP/1.0 200 Fine",
        ),
        b"GET",
    )
    kept = [b"HTTP/1.1 200 Fine", b"Server: x", b"Set-Cookie: a", b"Set-Cookie: b", b"Content-Length: 5"]
    assert lines_of(rewrite_response(head, True)) == kept
    assert lines_of(rewrite_response(head, False)) == [*kept, b"Connection: close"]
    assert lines_of(rewrite_response(head, True, client_minor=0)) == [*kept, b"Connection: keep-alive"]


@pytest.mark.parametrize(
    ("head", "minor", "last"),
    [
        (answer(CHUNKED), 1, [b"Transfer-Encoding: chunked"]),
        (answer(CHUNKED), 0, [b"Connection: close"]),
        (answer(), 1, [b"Connection: close"]),
        (answer(), 0, [b"Connection: close"]),
    ],
)
def test_framing_for_the_client(head: bytes, minor: int, last: list[bytes]) -> None:
    """A client of HTTP/1.0 gets no chunks, and a body without length ends with the connection."""
    request = parse_request_head(get(b"Connection: keep-alive\r\n", b"GET / HTTP/1.%d" % minor))
    response = parse_response_head(head, b"GET")
    keep_alive = stays_open(request, response)
    assert keep_alive is (b"Connection: close" not in last)
    for asked in (keep_alive, True):
        assert lines_of(rewrite_response(response, asked, client_minor=minor))[1:] == last


def test_bodiless_responses() -> None:
    """HEAD and 304 keep the length that they declare; 204 and 1xx declare none, and 1xx does not close."""
    for head, method, kept in [
        (answer(FIVE), b"HEAD", [b"Content-Length: 5", b"Connection: close"]),
        (answer(FIVE, b"HTTP/1.1 304 "), b"GET", [b"Content-Length: 5", b"Connection: close"]),
        (answer(FIVE, b"HTTP/1.1 204 "), b"GET", [b"Connection: close"]),
        (answer(FIVE + b"Link: x\r\n", b"HTTP/1.1 103 "), b"GET", [b"Link: x"]),
    ]:
        assert lines_of(rewrite_response(parse_response_head(head, method), False))[1:] == kept


def test_websocket_answers() -> None:
    """101 is passed on only when a websocket was asked for and is what the app changed to."""
    lines = b"Connection: upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Accept: x\r\n"
    good = parse_response_head(answer(lines, b"HTTP/1.1 101 Switching"), b"GET")
    assert lines_of(rewrite_response(good, True, upgrade=True)) == [
        b"HTTP/1.1 101 Switching",
        b"Sec-WebSocket-Accept: x",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
    ]
    h2c = parse_response_head(answer(lines.replace(b"WebSocket", b"h2c"), b"HTTP/1.1 101 Switching"), b"GET")
    bare = parse_response_head(answer(b"", b"HTTP/1.1 101 Switching"), b"GET")
    for head, upgrade in ((good, False), (h2c, True), (bare, True)):
        with pytest.raises(RemoteProtocolError) as refused:
            rewrite_response(head, True, upgrade=upgrade)
        assert refused.value.reason is R.UPSTREAM_BAD_RESPONSE
    refusal = parse_response_head(answer(FIVE, b"HTTP/1.1 403 No"), b"GET")
    assert rewrite_response(refusal, True, upgrade=True) == answer(FIVE, b"HTTP/1.1 403 No")


def test_plain_responses() -> None:
    """Our own answers say their type and length, close unless told not to, and leave out what has no body."""
    assert plain_response(403, b"{}") == (
        b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    )
    assert plain_response(200, b"ok", b"text/plain", close=False, extra=[(b"X", b"y")]) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\nX: y\r\n\r\nok"
    )
    assert plain_response(403, b"{}", head_only=True).endswith(b"Content-Length: 2\r\nConnection: close\r\n\r\n")
    assert plain_response(100, b"", close=False) == plain_response(100, b"x") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert plain_response(204, b"x", close=False) == b"HTTP/1.1 204 No Content\r\n\r\n"
    for reason in Reason:
        if reason.http:
            assert parse_response_head(plain_response(reason.http, b"", head_only=True), b"GET").status == reason.http


# Bodies.


def feed_all(reader: Body, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """Feed the pieces; return what was sent on and what was left."""
    sent, rest = b"", b""
    for piece in pieces:
        if reader.done:
            rest += piece
            continue
        forward, used = reader.feed(piece)
        assert used == len(piece) or reader.done
        sent += forward
        rest += piece[used:]
    return sent, rest


def ways(data: bytes) -> list[list[bytes]]:
    return [[data], [data[i : i + 1] for i in range(len(data))], [data[:1], b"", data[1:]], [data[:-1], data[-1:]]]


# chunked body -> (what is sent on, what it holds)
CHUNKS: list[tuple[bytes, bytes, bytes]] = [
    (b"0\r\n\r\n", b"0\r\n\r\n", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"000A\r\n0123456789\r\n000\r\n\r\n", b"a\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    (b'1;a\r\nx\r\n1;b=c;d="e f\\""\r\ny\r\n0;z\r\n\r\n', b"1\r\nx\r\n1\r\ny\r\n0\r\n\r\n", b"xy"),
    (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
    (b"1\r\nx\r\n0\r\nX-Sum: abc\r\nClient-Cert: x\r\n\r\n", b"1\r\nx\r\n0\r\n\r\n", b"x"),
    (*(b"11\r\n0\r\n\r\nGET / HTTP\r\n\r\n0\r\n\r\n",) * 2, b"0\r\n\r\nGET / HTTP\r\n"),
]

BAD_CHUNKS = [
    *(
        size + b"\r\nx\r\n0\r\n\r\n"
        for size in (b"", b" 1", b"1 ", b"1\t", b"0x1", b"+1", b"-1", b"g", b"1_0", b"1.0", b"\xb2", b"1,1")
    ),
    *(
        b"1" + extension + b"\r\nx\r\n0\r\n\r\n"
        for extension in (b";", b" ;a", b"; a", b";a =b", b";a=", b";a=b c", b';a="', b";a\0")
    ),
    b"1;a\rb\r\nx\r\n0\r\n\r\n",
    b'1;a="\n"\r\nx\r\n0\r\n\r\n',
    b"0" * 15 + b"1\r\nx\r\n0\r\n\r\n",
    b"f" * 16 + b"\r\n",
    b"1\nx\r\n0\r\n\r\n",
    b"1\r\nx\n0\r\n\r\n",
    b"1\r\nx0\r\n\r\n",
    b"1\r\nxy\r\n0\r\n\r\n",
    b"1\r\nx\r\r\n0\r\n\r\n",
    b"2\r\nx\r\n0\r\n\r\n",
    b"1\r\r\nx\r\n0\r\n\r\n",
    b"0\r\n\n",
    b"0\r\nX\r\n\r\n",
    b"0\r\nX : y\r\n\r\n",
    b"0\r\n: y\r\n\r\n",
    b"0\r\n X: y\r\n\r\n",
    b"0\r\nX: y\0\r\n\r\n",
    b"0\r\nX: y\rz\r\n\r\n",
    b"0\r\nX: y\n\r\n",
    b"0\r\nGET / HTTP/1.1\r\n\r\n",
    b"1;" + b"a" * MAX_EXTENSION + b"\r\nx\r\n0\r\n\r\n",
    b"1" + b"a" * 400,
    b"0\r\nX: " + b"y" * MAX_TRAILER + b"\r\n\r\n",
    b"0\r\n" + b"X: y\r\n" * (MAX_TRAILER // 6 + 1) + b"\r\n",
]


@pytest.mark.parametrize(("data", "sent", "contents"), CHUNKS)
def test_good_chunks(data: bytes, sent: bytes, contents: bytes) -> None:
    """A chunked body goes on as plain chunks, at any cut, and ends exactly at its end."""
    for pieces in (*ways(data), *ways(data + b"GET /"), [data, b"GET /"]):
        rest = b"GET /" if b"".join(pieces) != data else b""
        for decode, expected in ((False, sent), (True, contents)):
            reader = ChunkedReader(decode)
            assert feed_all(reader, pieces) == (expected, rest)
            assert reader.done
            assert reader.feed(b"more") == (b"", 0)


@pytest.mark.parametrize(("data", "sent", "contents"), CHUNKS)
def test_cut_chunks_are_not_done(data: bytes, sent: bytes, contents: bytes) -> None:
    """No beginning of a chunked body counts as the whole, nor is the last chunk sent on for it."""
    for cut in range(len(data)):
        reader = ChunkedReader()
        forward, used = reader.feed(data[:cut])
        assert used == cut
        assert not reader.done
        assert sent.startswith(forward)
        assert len(forward) <= len(sent) - 5


@pytest.mark.parametrize("data", BAD_CHUNKS)
def test_bad_chunks(data: bytes) -> None:
    """A chunk that two servers may read in two ways is refused, at any cut."""
    for pieces in ways(data):
        with pytest.raises(RemoteProtocolError) as refused:
            feed_all(ChunkedReader(), pieces)
        assert refused.value.reason is R.HTTP_CHUNK


def test_limits_of_chunks_are_exact() -> None:
    """The longest extension and the longest trailer are taken."""
    extension = b";" + b"a" * (MAX_EXTENSION - 1)
    trailer = b"X: " + b"y" * (MAX_TRAILER - 7) + b"\r\n\r\n"
    assert len(trailer) == MAX_TRAILER
    for pieces in ways(b"1" + extension + b"\r\nx\r\n0\r\n" + trailer):
        assert feed_all(ChunkedReader(), pieces) == (b"1\r\nx\r\n0\r\n\r\n", b"")


def test_data_within_a_chunk_is_not_copied() -> None:
    """A piece that lies wholly within a chunk goes through as the same object."""
    reader = ChunkedReader()
    reader.feed(b"100000\r\n")
    piece = b"x" * 65536
    assert reader.feed(piece)[0] is piece
    assert LengthReader(100_000).feed(piece)[0] is piece
    assert CloseReader().feed(piece)[0] is piece


EXTENSIONS = st.from_regex(rb"(;[a-z]{1,4}(=([a-z]{1,4}|\"[ -!#-\[]{0,4}\"))?){0,2}", fullmatch=True)
TRAILERS = st.from_regex(rb"([A-Z]{1,4}: [a-z]{0,4}\r\n){0,2}", fullmatch=True)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(0, 3), EXTENSIONS)), TRAILERS, st.data())
def test_chunking_round_trips(chunks: list[tuple[bytes, int, bytes]], trailer: bytes, draw: st.DataObject) -> None:
    """Whatever the chunking, extensions, trailers and cuts, the same bytes come out as the same plain chunks."""
    data = b"".join(
        b"0" * zeros + b"%X" % len(body) + extension + b"\r\n" + body + b"\r\n" for body, zeros, extension in chunks
    )
    data += b"0\r\n" + trailer + b"\r\n"
    plain = b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body, _, _ in chunks) + b"0\r\n\r\n"
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)] + [b"next"]
    assert feed_all(ChunkedReader(), pieces) == (plain, b"next")
    assert feed_all(ChunkedReader(), [plain]) == (plain, b"")
    assert feed_all(ChunkedReader(decode=True), pieces) == (b"".join(body for body, _, _ in chunks), b"next")


@given(
    st.lists(st.one_of(st.binary(max_size=8), st.sampled_from([b"1\r\n", b"0\r\n", b"\r\n", b"a", b";b", b"X: y\r\n"])))
)
def test_chunked_bodies_raise_nothing_else(pieces: list[bytes]) -> None:
    """Any bytes are chunks or a RemoteProtocolError, with the same outcome whole and in pieces."""

    def run(parts: list[bytes]) -> tuple[bytes, bytes] | Reason:
        try:
            return feed_all(ChunkedReader(), parts)
        except RemoteProtocolError as error:
            return error.reason

    assert run(pieces) == run([b"".join(pieces)])


@pytest.mark.parametrize(
    ("kind", "length", "sent", "done"),
    [
        (BodyKind.NONE, 0, b"", True),
        (BodyKind.LENGTH, 0, b"", True),
        (BodyKind.LENGTH, 5, b"5\r\nhe", True),
        (BodyKind.LENGTH, 50, b"5\r\nhello\r\n0\r\n\r\nmore", False),
        (BodyKind.CHUNKED, 0, b"5\r\nhello\r\n0\r\n\r\n", True),
        (BodyKind.UNTIL_CLOSE, -1, b"5\r\nhello\r\n0\r\n\r\nmore", False),
    ],
)
def test_every_kind_of_body(kind: BodyKind, length: int, sent: bytes, done: bool) -> None:
    """Each kind of body ends where it should, at any cut, and leaves the rest."""
    data = b"5\r\nhello\r\n0\r\n\r\nmore"
    for pieces in ways(data):
        reader = body_reader(kind, length)
        forward, rest = feed_all(reader, pieces)
        assert (forward, reader.done) == (sent, done)
        assert rest == data[len(sent) :]


# Paths and hosts.


PLAIN = rb"""
/ /a /a/ /a/b.txt /a.b/c..d/e. /~me/$x&(y)*+,=:@!'_- /.well-known/x /..a/.b /a.../b /{a}|b^"<>` *
/a%20b /%40x /%3A%2C%2B%3D /%5B%5D /100%25 /a%25zz /caf%C3%A9 /%E2%82%AC%f0%9f%98%80
"""
AMBIGUOUS = rb"""
a a/b ? ** // /a//b /a// /. /.. /./a /../a /a/. /a/.. /a/./b /a/../b /a;x=1/b /a/..;/b /; /a\b /a\..\b
/%2e /%2E%2e/a /a/%2e%2e/b /.%2e/ /a%2fb /a%2Fb /a%5cb /a%5Cb /a%3bb /a%3B
/a%00 /%0d%0a /%1F /%7f /%09 /%61dmin /%41 /%5a /%30 /%7E /%2D /%5f
/% /%4 /%zz /%u0041 /a%2 /%-1 /%%41 /%+1
/%252e /%252f /%255c /%2500 /%25252e /%25%32%65 /%2541 /%%32%65 /%25c0 /%2525
/%c0%af /%C1%9C /%e0%80%af /%f0%80%80%af /%f5 /%ff /%FE /%80 /%e9 /%ed%a0%80
"""


@pytest.mark.parametrize("path", PLAIN.split())
def test_plain_paths(path: bytes) -> None:
    """Paths that every app reads alike are not held back."""
    assert not ambiguous_path(path)


@pytest.mark.parametrize("path", [*AMBIGUOUS.split(), b"", b"/a b", b"/a\0", b"/a\n", b"/a\x7f", b"/\xe9"])
def test_ambiguous_paths(path: bytes) -> None:
    """F2: a path that guard and app may read in two ways is known as such."""
    assert ambiguous_path(path)


@given(st.binary(max_size=30), st.booleans())
def test_paths_raise_nothing(path: bytes, rooted: bool) -> None:
    """Any bytes are a path or ambiguous; a plain path holds no dot segment however often it is decoded."""
    path = b"/" + path if rooted else path
    if not ambiguous_path(path) and path != b"*":
        decoded = unquote_to_bytes(path)
        assert decoded == unquote_to_bytes(decoded)
        assert decoded.count(b"/") == path.count(b"/")
        assert not {b".", b".."}.intersection(decoded.split(b"/"))
        assert b"" not in decoded.split(b"/")[1:-1]


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Example.COM", b"example.com"),
        (b"example.com.", b"example.com"),
        ("xn--bcher-kva.example", b"xn--bcher-kva.example"),
        ("_dmarc.a_b.example", b"_dmarc.a_b.example"),
        ("localhost", b"localhost"),
        ("1a.2b", b"1a.2b"),
        ("3.example", b"3.example"),
        ("127.0.0.1", b"127.0.0.1"),
        ("127.0.0.1.", b"127.0.0.1"),
        (b"::1", b"::1"),
        ("2001:DB8:0:0::1", b"2001:db8::1"),
        ("a" * 63 + ".b", b"a" * 63 + b".b"),
        (("a" * 49 + ".") * 5 + "abc", (b"a" * 49 + b".") * 5 + b"abc"),
        ("bücher.example", None),
        (b"\xff", None),
        ("", None),
        (".", None),
        ("a..", None),
        ("a..b", None),
        ("*.example", None),
        ("a:80", None),
        ("[::1]", None),
        ("fe80::1%eth0", None),
        ("127.1", None),
        ("2130706433", None),
        ("0x7f000001", None),
        ("0x7f.0.0.1", None),
        ("0177.0.0.1", None),
        ("1.2.3.256", None),
        ("a.0X1", None),
        ("a" * 64, None),
        (("a" * 49 + ".") * 5 + "abcd", None),
        ("a\n", None),
        ("a\0", None),
        (" a", None),
    ],
)
def test_hosts(text: str | bytes, host: bytes | None) -> None:
    """Host header and server name are brought to one form, and what is no host is none."""
    assert normal_host(text) == host


@given(st.one_of(st.text(max_size=20), st.binary(max_size=20), st.from_regex(r"[a0.:xF-]{1,12}", fullmatch=True)))
def test_hosts_raise_nothing(text: str | bytes) -> None:
    """Any text has one normal form or none, and the normal form is its own."""
    host = normal_host(text)
    if host is not None:
        assert normal_host(host) == normal_host(host.decode("ascii")) == host
        assert re.fullmatch(rb"[a-z0-9._:-]+", host)
