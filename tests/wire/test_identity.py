"""Identity headers: what is told to the app, and what a client must not say."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.pki.names import Kind, Name
from handfast.wire import identity
from handfast.wire.identity import (
    IDENTITY_HEADERS,
    IDENTITY_PREFIXES,
    claims_identity,
    client_cert,
    client_cert_chain,
    client_identity,
    fold,
    overrides_request,
)

CLAIMS = [
    b"Client-Cert",
    b"Client-Cert-Chain",
    b"Client-Identity",
    b"Handfast-Anything",
    b"X-Forwarded-Client-Cert",
    b"X-SSL-Client-Cert",
    b"X-SSL-Client-Verify",
    b"X-SSL-Client-S-DN",
    b"SSL-Client-Cert",
    b"SSL_CLIENT_VERIFY",
    b"SSL_CLIENT_S_DN_CN",
    b"X-Forwarded-Tls-Client-Cert",
    b"X-Forwarded-Tls-Client-Cert-Info",
    b"X-Client-Cert",
    b"X-Client-Cert-Dn",
    b"X-Client-Certificate",
    b"X-Client-DN",
    b"X-Client-Verify",
    b"X-ARR-ClientCert",
    b"X-Amzn-Mtls-Clientcert-Subject",
    b"Cf-Client-Cert-Der-Base64",
    b"Cf-Access-Authenticated-User-Email",
    b"l5d-client-id",
    b"Remote-User",
    b"REMOTE_USER",
    b"X-Remote-User",
    b"X-Remote-Extra-Scopes",
    b"X-Forwarded-User",
    b"X-Auth-Request-Email",
    b"X-WEBAUTH-USER",
    b"X-Goog-Authenticated-User-Email",
    b"Teleport-Jwt-Assertion",
    b"Tailscale-User-Login",
]
HARMLESS = [
    b"Host",
    b"Accept",
    b"Cookie",
    b"Authorization",
    b"User-Agent",
    b"Forwarded",
    b"X-Forwarded-For",
    b"X-Forwarded-Proto",
    b"X-Forwarded-Host",
    b"X-Request-Id",
    b"Client",
    b"Remote",
    b"X-Client-Version",
    b"Sec-Fetch-User",
    b"",
    b"---",
]


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("separator", [b"-", b"_", b".", b"", b"--", b"~"])
def test_identity_headers_are_known_in_every_spelling(name: bytes, separator: bytes) -> None:
    """A header that apps take for the caller's identity is recognised in any case and with any separator."""
    spelled = re.sub(rb"[-_]", separator, name)
    for spelling in (spelled, spelled.lower(), spelled.upper(), spelled.title(), spelled + b"_", b"-" + spelled):
        assert claims_identity(spelling), spelling


@pytest.mark.parametrize("name", HARMLESS)
def test_other_headers_are_left_alone(name: bytes) -> None:
    """Headers that say nothing of the caller, X-Forwarded-For and its kin among them, are not claimed."""
    assert not claims_identity(name)
    assert not claims_identity(name.upper())


@given(st.binary(max_size=80))
def test_claims_do_not_depend_on_memory(name: bytes) -> None:
    """The remembered answer is the computed one, for any bytes."""
    folded = fold(name)
    expected = folded in IDENTITY_HEADERS or folded.startswith(IDENTITY_PREFIXES)
    assert claims_identity(name) is expected
    assert claims_identity(name) is expected


def test_memory_is_bounded() -> None:
    """Clients cannot make the memory of names grow, neither by number nor by length."""
    for number in range(3000):
        claims_identity(b"x-made-up-%d" % number)
    claims_identity(b"x" * 60_000)
    assert len(identity._answers) <= 1024
    assert max(map(len, identity._answers)) <= 64


def test_listed_names_are_folded_themselves() -> None:
    """The list holds folded names, so that no entry is dead."""
    for name in (*IDENTITY_HEADERS, *IDENTITY_PREFIXES):
        assert fold(name) == name
        assert claims_identity(name)


@given(st.binary())
def test_fold_keeps_letters_and_digits_only(name: bytes) -> None:
    """Folding leaves lower-case ASCII letters and digits, and folding twice changes nothing."""
    folded = fold(name)
    assert re.fullmatch(rb"[a-z0-9]*", folded)
    assert fold(folded) == folded == fold(name.upper())


@pytest.mark.parametrize("name", [b"X-HTTP-Method-Override", b"x_http_method", b"X-Original-URL", b"X-Rewrite-Url"])
def test_overrides_are_known(name: bytes) -> None:
    """Headers that ask the app to see another method or path than the rules saw are recognised."""
    assert overrides_request(name)
    assert not overrides_request(b"X-Forwarded-Proto")


@given(st.binary(max_size=200))
def test_client_cert_is_a_byte_sequence(der: bytes) -> None:
    """Client-Cert is the DER in standard base64 between colons (RFC 9440 2.2, RFC 8941 3.3.5)."""
    value = client_cert(der)
    assert re.fullmatch(rb":[A-Za-z0-9+/]*={0,2}:", value)
    assert base64.b64decode(value[1:-1], validate=True) == der


def test_chain_is_a_list() -> None:
    """Client-Cert-Chain is a list of byte sequences in the order given, empty for none."""
    assert client_cert_chain([b"a", b"bc"]) == b":YQ==:, :YmM=:"
    assert client_cert_chain([]) == b""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (Name(Kind.SPIFFE, "spiffe://example.org/web"), b'"spiffe://example.org/web"'),
        (Name(Kind.DNS, "web.example.com"), b'"dns:web.example.com"'),
        (Name(Kind.CN, 'a";URI="spiffe://x/admin'), rb'"cn:a\";URI=\"spiffe://x/admin"'),
        (Name(Kind.CN, "a\\"), rb'"cn:a\\"'),
        (Name(Kind.CN, 'a\\"'), rb'"cn:a\\\""'),
        (Name(Kind.CN, "a\r\nX: y"), b'"cn:a%0D%0AX: y"'),
        (Name(Kind.CN, "admin\0.evil"), b'"cn:admin%00.evil"'),
        (Name(Kind.CN, "Zoë"), b'"cn:Zo%C3%AB"'),
        (Name(Kind.CN, "Zo%C3%AB"), b'"cn:Zo%25C3%25AB"'),
        (Name(Kind.CN, "\udc80"), b'"cn:%ED%B2%80"'),
    ],
)
def test_identity_values(name: Name, value: bytes) -> None:
    """The identity is one string: nothing in a certificate can end it, split it or look like another name."""
    assert client_identity(name) == value


@given(st.text())
def test_identity_can_be_read_back(text: str) -> None:
    """Parsing the string and then percent-decoding it gives the typed name, whatever it holds."""
    value = client_identity(Name(Kind.CN, text)).decode("ascii")
    assert re.fullmatch(r'"(?:[ !#-\[\]-~]|\\["\\])*"', value)  # RFC 9651 3.3.3
    assert unquote(re.sub(r"\\(.)", r"\1", value[1:-1]), errors="strict") == f"cn:{text}"
