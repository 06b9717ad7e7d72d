"""HTTP/2 header lists and what they say in HTTP/1.1: one strict reading, held against h2's own checks."""

from __future__ import annotations

import pytest
from h2.exceptions import ProtocolError
from h2.utilities import HeaderValidationFlags, validate_headers
from hpack import NeverIndexedHeaderTuple
from hypothesis import given, settings
from hypothesis import strategies as st

from handfast.errors import Reason, RemoteProtocolError
from handfast.wire.bodies import BodyKind
from handfast.wire.http1 import Header, parse_response_head, rewrite_request
from handfast.wire.http2 import answer_fields, app_answer, request_fields, request_head, trailer_fields
from handfast.wire.identity import claims_identity

PSEUDO: list[Header] = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":authority", b"a.test:8443"),
    (b":path", b"/x?y=z"),
]


def _with(*fields: Header, **pseudo: bytes | None) -> list[Header]:
    """The usual list, with other pseudo-headers (None: without), and more headers."""
    changed = {b":" + name.encode(): value for name, value in pseudo.items()}
    made = [(name, changed.pop(name, value)) for name, value in PSEUDO] + list(changed.items())
    return [(name, value) for name, value in made if value is not None] + list(fields)


def test_a_request_becomes_one_of_http_1() -> None:
    """The pseudo-headers become the request line and Host; split cookies are one again; te stays with the hop."""
    fields = _with((b"cookie", b"a=1"), (b"te", b"trailers"), (b"cookie", b"b=2"), (b"x-mine", b"\xff kept"))
    head = request_head(fields, True)
    assert (head.method, head.target, head.path, head.host) == (b"GET", b"/x?y=z", b"/x", b"a.test")
    assert head.body is BodyKind.NONE
    sent = rewrite_request(head, [(b"Client-Cert", b":x:")], claims_identity)
    assert sent == (
        b"GET /x?y=z HTTP/1.1\r\nhost: a.test:8443\r\nx-mine: \xff kept\r\ncookie: a=1; b=2\r\nClient-Cert: :x:\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("fields", "ended", "kind", "length"),
    [
        (_with(method=b"POST"), False, BodyKind.CHUNKED, 0),
        (_with((b"content-length", b"7"), method=b"POST"), False, BodyKind.LENGTH, 7),
        (_with((b"content-length", b"0"), method=b"POST"), True, BodyKind.LENGTH, 0),
        (_with(method=b"POST"), True, BodyKind.NONE, 0),
    ],
)
def test_bodies_are_framed_anew(fields: list[Header], ended: bool, kind: BodyKind, length: int) -> None:
    """A body of known length keeps it; one of unknown length is chunked; none is none."""
    head = request_head(fields, ended)
    assert (head.body, head.length) == (kind, length)


def test_a_caller_behind_a_proxy_of_its_own_says_http() -> None:
    """A caller without TLS (gRPC, to our connector) says http: it is read, and the app hears https all the same."""
    fields = _with(scheme=b"http")
    assert request_fields(fields, request_head(fields, True), (), claims_identity) == PSEUDO


def test_crumbs_of_cookies_are_one_header() -> None:
    """A browser may send each of 150 cookies by itself (RFC 9113 8.2.3): they are one again, with 99 other headers."""
    head = request_head(_with(*[(b"cookie", b"a=b")] * 150, *[(b"a", b"b")] * 97), True)
    assert (b"cookie", b"; ".join([b"a=b"] * 150)) in head.headers


def test_host_may_stand_for_authority() -> None:
    """Without :authority Host names the site; with both they say the same (RFC 9113 8.3.1)."""
    assert request_head(_with((b"host", b"b.test"), authority=None), True).host == b"b.test"
    assert request_head(_with((b"host", b"a.test:8443")), True).host == b"a.test"


def test_a_websocket_becomes_an_upgrade() -> None:
    """An extended CONNECT (RFC 8441) is the GET with Upgrade that it stands for."""
    head = request_head(_with((b"sec-websocket-version", b"13"), method=b"CONNECT", protocol=b"websocket"), False)
    assert head.websocket
    sent = rewrite_request(head, [(b"Sec-WebSocket-Key", b"k")], claims_identity)
    assert sent.startswith(b"GET /x?y=z HTTP/1.1\r\n")
    assert b"Connection: Upgrade\r\nUpgrade: websocket\r\n" in sent
    assert sent.count(b"pgrade: ") == 1


HEADER, HOST = Reason.HTTP_HEADER, Reason.HTTP_HOST
REFUSED: dict[str, tuple[list[Header], Reason]] = {
    "upper_case": (_with((b"X-A", b"b")), HEADER),
    "no_token": (_with((b"a b", b"c")), HEADER),
    "colon": (_with((b"a:b", b"c")), HEADER),
    "empty_name": (_with((b"", b"c")), HEADER),
    "cr_lf": (_with((b"a", b"b\r\nclient-cert: x")), HEADER),
    "bare_lf": (_with((b"a", b"b\nc: d")), HEADER),
    "nul": (_with((b"a", b"b\0")), HEADER),
    "del": (_with((b"a", b"\x7f")), HEADER),
    "name_with_line": (_with((b"a\r\nb", b"c")), HEADER),
    "path_with_line": (_with(path=b"/ HTTP/1.1\r\nclient-cert: x"), Reason.HTTP_TARGET),
    "method_with_line": (_with(method=b"GET / HTTP/1.1\r\nx: "), Reason.HTTP_REQUEST_LINE),
    "authority_with_line": (_with(authority=b"a.test\r\nx: y"), HOST),
    "connection": (_with((b"connection", b"client-cert")), HEADER),
    "keep_alive": (_with((b"keep-alive", b"1")), HEADER),
    "proxy_connection": (_with((b"proxy-connection", b"x")), HEADER),
    "transfer_encoding": (_with((b"transfer-encoding", b"chunked")), HEADER),
    "folded_transfer_encoding": (_with((b"transfer_encoding", b"chunked")), HEADER),
    "folded_host": (_with((b"h.ost", b"b.test")), HEADER),
    "upgrade": (_with((b"upgrade", b"websocket")), HEADER),
    "http2_settings": (_with((b"http2-settings", b"x")), HEADER),
    "te": (_with((b"te", b"gzip")), HEADER),
    "twice": ([*PSEUDO, PSEUDO[0]], HEADER),
    "late": ([PSEUDO[0], (b"a", b"b"), *PSEUDO[1:]], HEADER),
    "unknown": (_with(status=b"200"), HEADER),
    "protocol": (_with(protocol=b"websocket"), HEADER),
    "ftp": (_with(scheme=b"ftp"), HEADER),
    "no_scheme": (_with(scheme=None), HEADER),
    "no_method": (_with(method=None), Reason.HTTP_REQUEST_LINE),
    "no_path": (_with(path=None), Reason.HTTP_TARGET),
    "empty_path": (_with(path=b""), Reason.HTTP_TARGET),
    "absolute": (_with(path=b"https://a.test/"), Reason.HTTP_TARGET),
    "fragment": (_with(path=b"/#a"), Reason.HTTP_TARGET),
    "no_authority": (_with(authority=None), HOST),
    "other_host": (_with((b"host", b"b.test")), HOST),
    "two_hosts": (_with((b"host", b"a.test:8443"), (b"host", b"a.test:8443")), HOST),
    "userinfo": (_with(authority=b"b@a.test"), HOST),
    "long_authority": (_with(authority=b"a" * 300), HOST),
    "two_lengths": (_with((b"content-length", b"1"), (b"content-length", b"1")), Reason.HTTP_FRAMING),
    "list_of_lengths": (_with((b"content-length", b"1, 1")), Reason.HTTP_FRAMING),
    "signed_length": (_with((b"content-length", b"+1")), Reason.HTTP_FRAMING),
    "connect": (_with(method=b"CONNECT"), Reason.HTTP_METHOD),
    "connect_ip": (_with(method=b"CONNECT", protocol=b"connect-ip"), Reason.HTTP_METHOD),
    "trace": (_with(method=b"TRACE"), Reason.HTTP_METHOD),
    "expectation": (_with((b"expect", b"tea")), Reason.HTTP_EXPECTATION),
    "too_many_beside_cookies": (
        _with(*[(b"cookie", b"a=b")] * 50, *[(b"a", b"b")] * 100),
        Reason.HTTP_TOO_MANY_HEADERS,
    ),
    "too_many_crumbs": (_with(*[(b"cookie", b"a=b")] * 281), Reason.HTTP_TOO_MANY_HEADERS),
    "too_many": (_with(*[(b"a", b"b")] * 101), Reason.HTTP_TOO_MANY_HEADERS),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_requests_are_refused(case: str) -> None:
    """What RFC 9113 8.2 and 8.3 forbid, and what HTTP/1.1 refuses, has its reason."""
    fields, reason = REFUSED[case]
    with pytest.raises(RemoteProtocolError) as refused:
        request_head(fields, False)
    assert refused.value.reason is reason


def test_a_length_without_a_body_is_refused() -> None:
    """A request that ends with its head and declares a body would leave the app waiting for it."""
    with pytest.raises(RemoteProtocolError) as refused:
        request_head(_with((b"content-length", b"5"), method=b"POST"), True)
    assert refused.value.reason is Reason.HTTP_FRAMING


_names = st.sampled_from(
    [b"a", b"host", b"te", b"cookie", b"connection", b"A", b"a b", b"content-length", b":path", b""]
)
_values = st.sampled_from([b"", b"a.test:8443", b"trailers", b"1", b" x", b"a\nb", b"a\r\nb", b"a\0b"]) | st.binary()
_pseudo = st.sampled_from([b":method", b":scheme", b":authority", b":path", b":status", b":protocol"])
_lists = st.one_of(
    st.builds(lambda more: PSEUDO + more, st.lists(st.tuples(_names, _values), max_size=4)),
    st.lists(st.tuples(_pseudo | _names, st.sampled_from([b"GET", b"https", b"a.test", b"/"]) | _values), max_size=8),
)


@settings(max_examples=400)
@given(fields=_lists, ended=st.booleans())
def test_what_we_accept_h2_accepts(fields: list[Header], ended: bool) -> None:
    """Any list is read or refused, nothing else; and nothing passes here that h2's own checks refuse.

    But for white space around values, which we take away.
    """
    try:
        head = request_head(fields, ended)
    except RemoteProtocolError:
        return
    flags = HeaderValidationFlags(False, False, False, False)
    try:
        list(validate_headers([(name, value.strip(b" \t")) for name, value in fields], flags))
    except ProtocolError as error:
        pytest.fail(f"h2 refuses it: {error}")
    sent = rewrite_request(head, (), claims_identity)
    assert sent.count(b"\r\n") <= len(fields) + 3
    assert sent.count(b"\r\n\r\n") == 1


def test_an_http_2_app_gets_what_one_of_http_1_would() -> None:
    """Identity headers of the client's, in any spelling, are taken out, ours set; te and the order stay."""
    fields = _with(
        *((b"client-cert", b"x"), (b"client_cert", b"x"), (b"x-ssl-client-verify", b"x"), (b"te", b"trailers")),
        *((b"host", b"a.test:8443"), (b"my.own", b"x"), (b"a", b"b")),
    )
    made = request_fields(
        fields, request_head(fields, True), [(b"Client-Cert", b":y:"), (b"My-Own", b"z")], claims_identity
    )
    assert made == [*PSEUDO, (b"te", b"trailers"), (b"a", b"b"), (b"client-cert", b":y:"), (b"my-own", b"z")]


def test_white_space_around_values_is_taken_away() -> None:
    """A value with white space at its ends goes on without it, in requests, answers and trailers, and stays secret."""
    odd = [(b"a", b" b\t"), NeverIndexedHeaderTuple(b"c", b" d "), (b"e", b" "), (b"f", b"g h")]
    good = [(b"a", b"b"), (b"c", b"d"), (b"e", b""), (b"f", b"g h")]
    fields = _with(*odd)
    head = request_head(fields, True)
    assert list(head.headers[1:]) == good
    sent = request_fields(fields, head, (), claims_identity)
    assert sent == [*PSEUDO, *good]
    assert isinstance(sent[5], NeverIndexedHeaderTuple)
    assert app_answer([(b":status", b"200"), *odd]) == (200, good)
    assert trailer_fields(odd) == good


def test_our_own_headers_hold_no_control_bytes() -> None:
    """A line break in a header of ours is a bug, never sent."""
    with pytest.raises(ValueError, match="control byte"):
        request_fields(PSEUDO, request_head(PSEUDO, True), [(b"Client-Cert", b"a\r\nb")], claims_identity)


def test_an_answer_of_http_1_loses_its_framing() -> None:
    """Names are in lower case; headers of one hop, those Connection lists and Alt-Svc do not go on."""
    head = parse_response_head(
        b"HTTP/1.1 200 OK\r\nContent-Type: a\r\nConnection: X-Hop\r\nX-Hop: 1\r\nAlt-Svc: h3\r\nSet-Cookie: b\r\n"
        b"Content-Length: 3\r\nKeep-Alive: 1\r\n\r\n",
        b"GET",
    )
    assert answer_fields(head) == [(b"content-type", b"a"), (b"set-cookie", b"b"), (b"content-length", b"3")]


def test_an_answer_of_an_http_2_app_is_checked() -> None:
    """A good one goes on without what could lead round the guard; a malformed one is the app's fault."""
    good = [(b":status", b"200"), (b"a", b"b"), (b"alt-svc", b"x"), (b"content-length", b"3")]
    assert app_answer(good) == (200, [(b"a", b"b"), (b"content-length", b"3")])
    bad: list[list[Header]] = [
        *([], [(b"a", b"b")], [(b":status", b"2000")], [(b":status", b"200"), (b":status", b"200")]),
        *([(b":status", b"200"), (b"A", b"b")], [(b":status", b"200"), (b"a", b"b\r\nc")]),
        [(b":status", b"200"), (b"connection", b"close")],
    ]
    for fields in bad:
        with pytest.raises(RemoteProtocolError) as refused:
            app_answer(fields)
        assert refused.value.reason is Reason.UPSTREAM_BAD_RESPONSE


def test_trailers_carry_no_identity_and_no_framing() -> None:
    """grpc-status goes on; what says who calls, or frames the message, does not; pseudo-headers are refused."""
    fields = [(b"grpc-status", b"0"), (b"client_cert", b"x"), (b"content-length", b"3"), (b"authorization", b"x")]
    assert trailer_fields(fields, claims_identity) == [(b"grpc-status", b"0")]
    assert trailer_fields(fields) == fields[:2]
    for bad in ((b":path", b"/"), (b"connection", b"x"), (b"A", b"b"), (b"a", b"b\nc")):
        with pytest.raises(RemoteProtocolError):
            trailer_fields([bad])
