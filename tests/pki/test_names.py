"""Names and patterns: text is parsed strictly, certificates totally, and `*` stays where it is put."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, Reason
from handfast.pki import der
from handfast.pki.names import (
    Kind,
    Name,
    Pattern,
    general_name,
    parse_dns,
    parse_name,
    parse_pattern,
    parse_san,
    parse_spiffe_id,
    parse_trust_domain,
    printable,
)

TD = "td.example"


def tlv(tag: int, contents: bytes) -> bytes:
    size = len(contents)
    if size < 0x80:
        return bytes([tag, size]) + contents
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + contents


def san(*entries: tuple[int, bytes]) -> bytes:
    return tlv(0x30, b"".join(tlv(tag, contents) for tag, contents in entries))


# SPIFFE IDs, SPIFFE-ID section 2.


@pytest.mark.parametrize(
    "text",
    [
        "spiffe://td",
        "spiffe://td/web",
        "spiffe://td.example.com/ns/prod/sa/web",
        "spiffe://a_b-c.1/A_b-C.9",
        "spiffe://td/...",
        "spiffe://td/.hidden",
        "spiffe://" + "a" * 255 + "/x",
        "spiffe://td/" + "x" * (2048 - 12),
    ],
)
def test_spiffe_ids(text: str) -> None:
    """What section 2 allows is parsed, and kept to the letter."""
    assert parse_spiffe_id(text) == parse_name(text) == Name(Kind.SPIFFE, text)
    assert str(parse_spiffe_id(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe:",
        "spiffe://",
        "spiffe:///web",  # 2.1: the trust domain is not empty
        "SPIFFE://td/web",
        "http://td/web",
        "spiffe:/td/web",
        " spiffe://td/web",
        "spiffe://td/web ",
        "spiffe://td/web\n",
        "spiffe://TD/web",  # 2.1: lower case
        "spiffe://td:443/web",  # 2.1: no port
        "spiffe://td:/web",
        "spiffe://user@td/web",  # 2.1: no userinfo
        "spiffe://t%64/web",
        "spiffe://tdé/web",
        "spiffe://t*/web",
        "spiffe://[::1]/web",
        "spiffe://td/",  # 2.2: no trailing slash
        "spiffe://td/web/",
        "spiffe://td//web",  # 2.2: no empty segment
        "spiffe://td/.",  # 2.2: no relative segment
        "spiffe://td/..",
        "spiffe://td/a/../b",
        "spiffe://td/w%65b",  # 2.2: no percent-encoding
        "spiffe://td/a b",
        "spiffe://td/é",
        "spiffe://td/a~b",
        "spiffe://td/a\x00b",
        "spiffe://td/web?q",  # 2: no query
        "spiffe://td?q",
        "spiffe://td/web#f",  # 2: no fragment
        "spiffe://td/web;v=1",
        "spiffe://td\\web",
        "spiffe://" + "a" * 256 + "/x",  # 2.3: 255 bytes of trust domain
        "spiffe://td/" + "x" * (2048 - 11),  # 2.3: 2048 bytes in all
    ],
)
def test_what_is_no_spiffe_id(text: str) -> None:
    """What section 2 forbids is INPUT_NAME, and in a certificate FORBIDDEN."""
    with pytest.raises(InvalidInput) as caught:
        parse_spiffe_id(text)
    assert caught.value.reason is Reason.INPUT_NAME
    if text.lower().startswith("spiffe:") and text.isascii():
        assert [name.kind for name in parse_san(san((0x86, text.encode())))] == [Kind.FORBIDDEN]


@given(st.text(max_size=40))
def test_a_spiffe_id_means_one_thing(path: str) -> None:
    """Whatever is accepted has a trust domain and a path that put together give it again, and is ASCII."""
    with suppress(InvalidInput):
        name = parse_spiffe_id(f"spiffe://{path}")
        domain, _, rest = name.value.removeprefix("spiffe://").partition("/")
        assert name.trust_domain == domain == parse_trust_domain(domain)
        assert re.fullmatch(r"[a-z0-9._-]+", domain, re.ASCII)
        assert name.value.isascii()
        assert not {"", ".", ".."} & set(rest.split("/")) or name.value == f"spiffe://{domain}"


def test_trust_domains() -> None:
    """A trust domain is the host of a SPIFFE ID; other kinds of name have none."""
    assert parse_trust_domain("td.example") == "td.example"
    for text in ("", "TD", "td/web", "td:1", "spiffe://td", "a" * 256, "td\n"):
        with pytest.raises(InvalidInput):
            parse_trust_domain(text)
    assert parse_spiffe_id("spiffe://td").trust_domain == "td"
    assert parse_dns("td").trust_domain == ""


# Text from people.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("web", Name(Kind.SPIFFE, "spiffe://td.example/web")),
        ("ns/prod/web", Name(Kind.SPIFFE, "spiffe://td.example/ns/prod/web")),
        ("web.example.com", Name(Kind.DNS, "web.example.com")),
        ("WEB.Example.com", Name(Kind.DNS, "web.example.com")),
        ("*.example.com", Name(Kind.DNS, "*.example.com")),
        ("localhost", Name(Kind.DNS, "localhost")),
        ("dns:web", Name(Kind.DNS, "web")),
        ("10.0.0.1", Name(Kind.IP, "10.0.0.1")),
        ("::1", Name(Kind.IP, "::1")),
        ("2001:DB8:0:0::1", Name(Kind.IP, "2001:db8::1")),
        ("ip:2001:db8::1", Name(Kind.IP, "2001:db8::1")),
        ("ann@Example.com", Name(Kind.EMAIL, "ann@example.com")),
        ("email:Ann@example.com", Name(Kind.EMAIL, "Ann@example.com")),
        ("uri:urn:uuid:1", Name(Kind.URI, "urn:uuid:1")),
        ("uri:spiffe://td/web", Name(Kind.SPIFFE, "spiffe://td/web")),
        ("cn:Ann, of Acme", Name(Kind.CN, "Ann, of Acme")),
    ],
)
def test_names_as_people_write_them(text: str, name: Name) -> None:
    """Each way of writing a name gives one kind, and its text gives it again."""
    assert parse_name(text, TD) == name
    assert parse_name(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "we b.example.com",
        "-web.example.com",
        "web-.example.com",
        "web..example.com",
        ".example.com",
        "example.com.",
        "w*b.example.com",
        "a.*.example.com",
        "*.*.example.com",
        "dns:*",
        "*.",
        "a" * 64 + ".example.com",
        "a." * 127 + "a",
        "büro.example.com",
        "web\x00.example.com",
        "ip:10.0.0",
        "ip:010.0.0.1",
        "ip:10.0.0.0/8",
        "ip:fe80::1%eth0",
        "fe80::1%eth0",
        "@example.com",
        "ann@",
        "ann@@example.com",
        "ann @example.com",
        "ann@*.example.com",
        "uri:no-scheme",
        "uri:x:",
        "uri:x:a b",
        "uri:SPIFFE://td/web",
        "uri:spiffe:td",
        "cn:",
        "cn:a\x00b",
        "cn:a\u202eb",
        "web/",
        "/web",
        "w?b",
        "sha256:00",
    ],
)
def test_what_is_no_name(text: str) -> None:
    """What no certificate could carry is INPUT_NAME."""
    with pytest.raises(InvalidInput) as caught:
        parse_name(text, TD)
    assert caught.value.reason is Reason.INPUT_NAME


def test_a_bare_name_needs_a_trust_domain() -> None:
    """Without a trust domain a bare name means nothing."""
    with pytest.raises(InvalidInput, match="trust domain"):
        parse_name("web")


@given(st.text(max_size=50))
def test_parsing_text_is_total_and_stable(text: str) -> None:
    """Any text is a name or INPUT_NAME, and what a name shows is parsed to the same name."""
    with suppress(InvalidInput):
        name = parse_name(text, TD)
        assert parse_name(str(name)) == name
        assert printable(name.value)


@pytest.mark.parametrize("name", ["spiffe://td/web", "web.example.com", "10.0.0.1", "::1", "a@b.c", "uri:urn:x:y"])
def test_names_survive_a_certificate(name: str) -> None:
    """A name put into a subjectAltName comes out the same."""
    wanted = parse_name(name)
    assert parse_san(x509.SubjectAlternativeName([general_name(wanted)]).public_bytes()) == (wanted,)


def test_kinds_that_are_never_issued() -> None:
    """Common names, fingerprints and what was carried unread cannot become alternative names."""
    for kind in (Kind.CN, Kind.SHA256, Kind.OPAQUE, Kind.FORBIDDEN):
        with pytest.raises(ValueError, match="cannot be"):
            general_name(Name(kind, "x"))


# Bytes from certificates.


@pytest.mark.parametrize(
    ("tag", "contents", "kind"),
    [
        (0x82, b"web.example.com", Kind.DNS),
        (0x82, b"web.example.com\x00.evil.example", Kind.FORBIDDEN),  # CVE-2009-2408
        (0x82, b"web.example.com\n", Kind.FORBIDDEN),
        (0x82, b"", Kind.FORBIDDEN),
        (0x82, b" ", Kind.FORBIDDEN),  # RFC 5280 4.2.1.6 names this one
        (0x82, b"\xc3\xa9.example.com", Kind.FORBIDDEN),
        (0x82, b"example.com.", Kind.FORBIDDEN),
        (0x82, b"*", Kind.FORBIDDEN),
        (0x82, b"10.0.0.1", Kind.DNS),  # a common mistake; it matches no address
        (0x86, b"spiffe://td/web", Kind.SPIFFE),
        (0x86, b"SPIFFE://td/web", Kind.FORBIDDEN),
        (0x86, b"spiffe://td/web\x00", Kind.FORBIDDEN),
        (0x86, b"spiffe://td/\xff", Kind.FORBIDDEN),
        (0x86, b"https://a.example.com:8443/", Kind.URI),
        (0x86, b"relative", Kind.FORBIDDEN),
        (0x86, b"", Kind.FORBIDDEN),
        (0x81, b"ann@example.com", Kind.EMAIL),
        (0x81, b"ann\x00@example.com", Kind.FORBIDDEN),
        (0x81, b"Ann <ann@example.com>", Kind.FORBIDDEN),
        (0x87, b"\x0a\x00\x00\x01", Kind.IP),
        (0x87, bytes(15) + b"\x01", Kind.IP),
        (0x87, b"\x0a\x00\x00", Kind.FORBIDDEN),
        (0x87, bytes(8), Kind.FORBIDDEN),  # an address with a mask is for name constraints
        (0x88, b"\x2a\x03", Kind.OPAQUE),
        (0xA0, b"", Kind.OPAQUE),
        (0xA4, b"\x30\x00", Kind.OPAQUE),
        (0xA2, b"web.example.com", Kind.OPAQUE),
        (0x02, b"\x01", Kind.OPAQUE),
    ],
)
def test_entries_of_a_certificate(tag: int, contents: bytes, kind: Kind) -> None:
    """Each entry becomes one name of the right kind, and the entries beside it are not disturbed."""
    before, found, after = parse_san(san((0x82, b"a.example"), (tag, contents), (0x82, b"b.example")))
    assert found.kind is kind
    assert (before.value, after.value) == ("a.example", "b.example")
    assert printable(found.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30",
        b"\x30\x05\x82\x01a",
        b"\x04\x00",
        b"\x30\x80\x82\x01a\x00\x00",
        b"\x30\x00\x00",
        b"\x30\x03\x82\x02a",
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30\x85\x00\x00\x00\x00\x00",
        b"\x30\x03\x1f\x81\x00",
        b"\x30\x81\x03\x82\x01a",  # a length in more octets than it needs (X.690 10.1)
        b"\x30\x82\x00\x03\x82\x01a",
    ],
)
def test_what_is_no_der_is_refused(data: bytes) -> None:
    """Where the DER itself does not parse, there is one error and it is VERIFY_MALFORMED."""
    with pytest.raises(InvalidInput) as caught:
        parse_san(data)
    assert caught.value.reason is Reason.VERIFY_MALFORMED


entries = st.tuples(
    st.sampled_from([0x81, 0x82, 0x86, 0x87, 0x88, 0xA0, 0xA4, 0x30, 0x00]),
    st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda text: b"spiffe://" + text.encode("utf-8"))),
)


@given(st.lists(entries, max_size=5))
def test_parsing_a_certificate_is_total(found: list[tuple[int, bytes]]) -> None:
    """Whatever entries a certificate holds, each becomes one printable name that says what it is."""
    names = parse_san(san(*found))
    assert len(names) == len(found)
    for name, (tag, _) in zip(names, found, strict=True):
        assert printable(name.value)
        if name.kind not in (Kind.FORBIDDEN, Kind.OPAQUE):
            assert tag in (0x81, 0x82, 0x86, 0x87)
            assert parse_name(str(name)) == name
        else:
            assert not parse_pattern("**", TD).matches(name)


@given(st.binary(max_size=200))
def test_parsing_garbage_is_total(data: bytes) -> None:
    """Any bytes are names or VERIFY_MALFORMED."""
    with suppress(InvalidInput):
        parse_san(data)
    with suppress(InvalidInput):
        der.certificate_parts(data)
    with suppress(InvalidInput):
        der.dotted(data)


def test_certificate_parts_refuse_what_is_no_certificate() -> None:
    """A sequence without fields, with too few, or with an extension twice is VERIFY_MALFORMED."""
    extension = tlv(0x30, tlv(0x06, b"\x55\x1d\x11") + tlv(0x04, san((0x82, b"a"))))
    other = tlv(0x30, tlv(0x06, b"\x55\x1d\x0f") + tlv(0x01, b"\xff") + tlv(0x04, b"x"))
    fields = b"".join(tlv(0x30, bytes([0x05, 0x00]) * (at == 4)) for at in range(6))
    good = tlv(0x30, tlv(0x30, fields + tlv(0xA3, tlv(0x30, extension + other))))
    assert der.certificate_parts(good) == (
        b"\x05\x00",
        {"2.5.29.17": (False, san((0x82, b"a"))), "2.5.29.15": (True, b"x")},
    )
    twice = tlv(0x30, tlv(0x30, fields + tlv(0xA3, tlv(0x30, extension + extension))))
    for data in (b"", b"\x30\x00", b"\x30\x02\x30\x00", tlv(0x30, tlv(0x30, fields[:8])), twice):
        with pytest.raises(InvalidInput) as caught:
            der.certificate_parts(data)
        assert caught.value.reason is Reason.VERIFY_MALFORMED


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_der_reads_what_was_written(contents: list[bytes]) -> None:
    """Values of all lengths, one behind the other, are read as they were written."""
    assert list(der.read_all(b"".join(tlv(0x04, one) for one in contents))) == [(0x04, one) for one in contents]


@pytest.mark.parametrize("oid", ["2.5.29.17", "1.2.840.113549.1.1.11", "0.9.2342.19200300.100.1.25", "2.999.1"])
def test_object_identifiers(oid: str) -> None:
    """Object identifiers come out in dots as `cryptography` writes them."""
    value = x509.ExtendedKeyUsage([x509.ObjectIdentifier(oid)]).public_bytes()
    assert der.dotted(der.read_one(der.read_one(value)[1])[1]) == oid


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x2a\x83", b"\x2a\x80\x01", b"\x2a" * 129, b"\xff" * 5000])
def test_broken_object_identifiers(data: bytes) -> None:
    """An object identifier that is empty, cut off, or padded is malformed (X.690 8.19.2)."""
    with pytest.raises(InvalidInput):
        der.dotted(data)


# Patterns.


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("any", ["spiffe://x/y", "dns:a", "cn:z", "sha256:" + "0" * 64], []),
        ("web", ["web"], ["webx", "web/x", "spiffe://other/web", "dns:web", "cn:web", "cn:spiffe://td.example/web"]),
        ("spiffe://td/web", ["spiffe://td/web"], ["spiffe://td/WEB", "uri:https://td/web"]),
        ("*", ["web"], ["a/b", "spiffe://other/web"]),
        ("web-*", ["web-1", "web-"], ["web", "web-1/x", "aweb-1"]),
        ("*-web-*", ["a-web-b", "-web-"], ["web", "a/web-b"]),
        ("ns/*/web", ["ns/a/web"], ["ns/a/b/web", "ns/web", "ns//web"]),
        ("ns/**", ["ns/a", "ns/a/b/c"], ["ns", "nsx/a", "ns/"]),
        ("**", ["a", "a/b"], ["spiffe://other/a"]),
        ("spiffe://td/a/*", ["spiffe://td/a/b"], ["spiffe://td/a", "spiffe://tdx/a/b", "spiffe://x.td/a/b"]),
        ("web.example.com", ["web.example.com", "WEB.example.com"], ["a.web.example.com", "dns:example.com"]),
        ("*.example.com", ["a.example.com"], ["a.b.example.com", "example.com", "a.example.com.evil.com"]),
        ("dns:web-*.example.com", ["web-1.example.com"], ["web-1.a.example.com", "web.example.com"]),
        ("dns:**.internal", ["a.internal", "a.b.internal"], ["dns:internal", "ainternal.x", "a.internal.x"]),
        ("*.EXAMPLE.com", ["a.example.com"], ["a.example.org"]),
        ("ip:10.0.0.0/8", ["10.1.2.3"], ["11.0.0.1", "::1", "::ffff:10.0.0.1"]),
        ("ip:fd00::/8", ["fd00::1"], ["10.0.0.1"]),
        ("10.0.0.1", ["10.0.0.1"], ["10.0.0.10"]),
        ("ann@example.com", ["ann@example.com", "ann@EXAMPLE.com"], ["Ann@example.com", "ann@a.example.com"]),
        ("email:*@example.com", ["ann@example.com"], ["ann@b.example.com", "dns:example.com"]),
        ("*@*.example.com", ["a@b.example.com"], ["a@example.com", "a@c.b.example.com"]),
        ("uri:urn:dev:*", ["uri:urn:dev:1"], ["uri:urn:dev:1/2", "uri:urn:dev:a:b", "uri:urn:dev:1?x"]),
        ("uri:https://h/**", ["uri:https://h/a", "uri:https://h/a/b"], ["uri:https://h.x/a", "uri:https://hx/a"]),
        ("cn:Ann, of Acme", ["cn:Ann, of Acme"], ["cn:ann, of acme"]),
        ("cn:*", ["cn:*"], ["cn:ann"]),
        ("sha256:" + "AB" * 32, ["sha256:" + "ab" * 32], ["sha256:" + "cd" * 32]),
    ],
)
def test_what_patterns_mean(pattern: str, inside: list[str], outside: list[str]) -> None:
    """A pattern matches these names and not those; `*` never crosses a segment or label."""
    found = parse_pattern(pattern, TD)
    for text in inside:
        assert found.matches(named(text)), text
    for text in outside:
        with suppress(InvalidInput):
            assert not found.matches(named(text)), text
    assert parse_pattern(str(found)) == found


def named(text: str) -> Name:
    if text.startswith("sha256:"):
        return Name(Kind.SHA256, text.removeprefix("sha256:"))
    return parse_name(text, TD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://*/web",
        "spiffe://t*/web",
        "spiffe://**",
        "spiffe://td",  # is a name, see below
        "spiffe://*",
        "ns/**/web",
        "ns/a**",
        "ns/***",
        "**/web",
        "ns//*",
        "ns/*/",
        "../*",
        "*%2f*",
        "*?",
        "[ab]*",
        "dns:a.**.b",
        "dns:a**.b",
        "dns:*.a b",
        "dns:*..b",
        "email:**@example.com",
        "email:*@*@example.com",
        "email:*@",
        "email:@*.example.com",
        "uri:*://x",
        "uri:ht*ps://x/*",
        "uri:x*",
        "ip:10.0.0.1/8",
        "ip:10.0.0.*",
        "ip:10.0.0.0/33",
        "sha256:00",
        "sha256:" + "zz" * 32,
        "cn:",
    ],
)
def test_what_is_no_pattern(text: str) -> None:
    """Patterns that would mean two things, or nothing, are INPUT_PATTERN."""
    if text == "spiffe://td":
        assert parse_pattern(text).exact == Name(Kind.SPIFFE, text)
        return
    with pytest.raises(InvalidInput) as caught:
        parse_pattern(text, TD)
    assert caught.value.reason is Reason.INPUT_PATTERN


segments = st.text("abcXYZ019._-", min_size=1, max_size=6).filter(lambda text: text not in (".", ".."))
globs = st.text("abX0._-*", min_size=1, max_size=5).filter(lambda text: "**" not in text and text.strip("."))


@given(st.lists(globs, min_size=1, max_size=4), st.lists(segments, min_size=1, max_size=5))
def test_a_star_stays_inside_its_segment(pattern: list[str], path: list[str]) -> None:
    """A pattern without `**` matches exactly if each of its segments matches that of the path, by itself."""
    name = parse_spiffe_id(f"spiffe://{TD}/{'/'.join(path)}")
    found = parse_pattern(f"spiffe://{TD}/{'/'.join(pattern)}")
    alone = [_matches(one, segment) for one, segment in zip(pattern, path, strict=False)]
    assert found.matches(name) is (len(pattern) == len(path) and all(alone))


labels = st.tuples(st.text("ab0", min_size=1, max_size=3), st.sampled_from(["", "-a", "-b0"])).map("".join)
label_globs = st.text("ab0*", min_size=1, max_size=4).filter(lambda text: "**" not in text)


@given(st.lists(label_globs, min_size=1, max_size=4), st.lists(labels, min_size=1, max_size=5))
def test_a_star_stays_inside_its_label(pattern: list[str], host: list[str]) -> None:
    """The same of DNS names and their labels."""
    name, found = parse_dns(".".join(host)), parse_pattern(f"dns:{'.'.join(pattern)}")
    alone = [_matches(one, label) for one, label in zip(pattern, host, strict=False)]
    assert found.matches(name) is (len(pattern) == len(host) and all(alone))


def _matches(glob: str, text: str) -> bool:
    """A second opinion: backtracking by hand; a lone star takes one character at least."""
    if glob == "*":
        return bool(text)
    if not glob:
        return not text
    if glob[0] == "*":
        return any(_matches_rest(glob[1:], text[at:]) for at in range(len(text) + 1))
    return bool(text) and glob[0] == text[0] and _matches_rest(glob[1:], text[1:])


def _matches_rest(glob: str, text: str) -> bool:
    if glob == "*":
        return True
    return _matches(glob, text)


@given(st.text(max_size=40))
def test_parsing_patterns_is_total(text: str) -> None:
    """Any text is a pattern or INPUT_PATTERN; no pattern but `any` matches a forbidden or unread name."""
    with suppress(InvalidInput):
        pattern = parse_pattern(text, TD)
        for kind in (Kind.FORBIDDEN, Kind.OPAQUE):
            assert not pattern.matches(Name(kind, text)) or text == "any"
        assert parse_pattern(str(pattern), TD) == pattern


def test_patterns_do_not_explode() -> None:
    """A pattern of many stars is answered at once (no catastrophic backtracking)."""
    pattern = parse_pattern("*a" * 30 + "*", TD)
    assert isinstance(pattern, Pattern)
    assert not pattern.matches(parse_name("b" * 60, TD))
    assert not parse_pattern("*a" * 12 + "*b", TD).matches(parse_name("a" * 200, TD))


def test_a_wildcard_in_a_certificate_is_no_wildcard_in_a_rule() -> None:
    """A certificate for *.example.com is the one name `*.example.com`, and no host below it matches it."""
    name = parse_dns("*.example.com")
    assert not parse_pattern("dns:web.example.com").matches(name)
    assert ipaddress.ip_address("10.0.0.1") in ipaddress.ip_network("10.0.0.0/8")
