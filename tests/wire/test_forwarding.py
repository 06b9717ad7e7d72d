"""The headers that tell an app who called: what each style says, and that no name can say more."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from urllib.parse import unquote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from handfast.pki.certificates import certificate_names, fingerprint
from handfast.pki.names import Kind, Name
from handfast.pki.verification import Purpose, Terms, TrustBundle, verify
from handfast.tls.judge import judge_offline
from handfast.wire.forwarding import (
    DEFAULT_STYLES,
    HeaderStyle,
    PeerFacts,
    facts_of,
    forwarded_client_cert,
    identity_headers,
)
from handfast.wire.identity import claims_identity
from tests.support.certs import Ca, Leaf
from tests.wire.subjects import SUBJECTS, client

ROOT = Ca.root()
ISSUER = ROOT.sub()
WEB = "spiffe://test/web"
GUARD = "spiffe://test/guard"
SPIFFE = x509.UniformResourceIdentifier(WEB)


def facts(leaf: Leaf, by: str = "") -> PeerFacts:
    names = certificate_names(leaf.certificate)
    return PeerFacts(leaf.certificate, Name(Kind.SPIFFE, WEB), "partners", names, leaf.chain, by)


def told(peer: PeerFacts | None, *styles: HeaderStyle) -> dict[str, str]:
    """The headers of some styles, of all where none is named."""
    return {name.decode(): value.decode("ascii") for name, value in identity_headers(styles or list(HeaderStyle), peer)}


def elements(value: str) -> list[tuple[str, str]]:
    """XFCC as a careful reader sees it: pairs, split at `;` outside of quotes, where `\\` quotes the next byte."""
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^";,]*)(?:;|\Z)', value)
    assert ";".join(f"{key}={text}" for key, text in pairs) == value
    return [(key, text[1:-1] if text.startswith('"') else text) for key, text in pairs]


def careless(value: str) -> list[tuple[str, ...]]:
    """XFCC as the most careless reader sees it: split at every `;`."""
    return [tuple(part.split("=", 1)) for part in value.split(";")]


def unescaped(text: str) -> bytes:
    """RFC 2253 2.4, backwards."""
    return re.sub(
        rb"\\([0-9A-F]{2}|.)",
        lambda found: bytes.fromhex(found[1].decode()) if len(found[1]) == 2 else found[1],
        text.encode("ascii"),
    )


def test_each_style_says_what_it_should() -> None:
    """A usual client in every style."""
    leaf = client(ISSUER, SUBJECTS["usual"], SPIFFE, x509.DNSName("a.test"), x509.DNSName("b.test"))
    der, pem = leaf.certificate.public_bytes(Encoding.DER), leaf.certificate.public_bytes(Encoding.PEM)
    issuer = ISSUER.certificate.public_bytes(Encoding.DER)
    headers = told(facts(leaf, GUARD))
    assert headers["Client-Cert"] == f":{base64.b64encode(der).decode()}:"
    assert headers["Client-Cert-Chain"].startswith(f":{base64.b64encode(issuer).decode()}:")
    assert headers["Client-Identity"] == f'"{WEB}"'
    assert headers["Client-Authority"] == '"partners"'
    xfcc = elements(headers["X-Forwarded-Client-Cert"])
    assert [key for key, _ in xfcc] == ["By", "Hash", "Cert", "Chain", "Subject", "URI", "DNS", "DNS"]
    values = dict(xfcc)
    assert (values["By"], values["Hash"], values["URI"]) == (GUARD, fingerprint(leaf.certificate), WEB)
    assert [text for key, text in xfcc if key == "DNS"] == ["a.test", "b.test"]
    assert values["Subject"] == "CN=web,O=Acme,C=DE"
    assert unquote(values["Cert"]).encode() == pem
    assert unquote(values["Chain"]).encode() == b"".join(each.public_bytes(Encoding.PEM) for each in leaf.presented)
    assert {name: headers[f"X-SSL-Client-{name}"] for name in ("Verify", "S-DN", "I-DN", "Serial", "V-Start")} == {
        "Verify": "SUCCESS",
        "S-DN": "CN=web,O=Acme,C=DE",
        "I-DN": "CN=Test Issuer",
        "Serial": "0ABC",
        "V-Start": "Jan  2 09:08:07 2026 GMT",
    }
    assert unquote(headers["X-SSL-Client-Cert"]).encode() == pem
    assert re.fullmatch("[0-9a-f]{40}", headers["X-SSL-Client-Fingerprint"])


def test_only_what_is_asked_for_is_told() -> None:
    """A style gives its own headers and no others; certificates are in XFCC only where they are asked for."""
    peer = facts(client(ISSUER, SUBJECTS["usual"], SPIFFE))
    assert told(peer, *DEFAULT_STYLES).keys() == {"Client-Cert", "Client-Identity"}
    assert identity_headers((), peer) == ()
    xfcc = told(peer, HeaderStyle.XFCC)
    assert xfcc.keys() == {"X-Forwarded-Client-Cert"}
    assert [key for key, _ in elements(xfcc["X-Forwarded-Client-Cert"])] == ["Hash", "Subject", "URI"]
    both = identity_headers((HeaderStyle.XFCC, HeaderStyle.XFCC_CERT), peer)
    assert [name for name, _ in both] == [b"X-Forwarded-Client-Cert"]
    assert b"Cert=" in both[0][1]
    alone = facts(Leaf(peer.leaf, None))
    assert "Client-Cert-Chain" not in told(alone)


def test_nobody_is_told_as_nobody() -> None:
    """For a client without a certificate there is no header but nginx's NONE."""
    assert told(None) == {"X-SSL-Client-Verify": "NONE"}
    assert told(None, *DEFAULT_STYLES, HeaderStyle.XFCC_CERT) == {}


def test_every_header_of_every_style_is_taken_from_requests() -> None:
    """What a style emits, a client cannot send, in any usual spelling."""
    leaf = client(ISSUER, SUBJECTS["usual"], SPIFFE)
    names = [
        name
        for name, _ in (*identity_headers(list(HeaderStyle), facts(leaf)), *identity_headers(list(HeaderStyle), None))
    ]
    assert len(set(names)) == 13
    for name in names:
        for spelling in (name, name.lower(), name.upper().replace(b"-", b"_"), name.replace(b"-", b".")):
            assert claims_identity(spelling), spelling


def test_a_verified_peer_is_told_with_its_chain_and_without_the_root() -> None:
    """The facts of a verified peer: its identity, its names, and the issuers between it and the trust anchor."""
    leaf = ISSUER.client(WEB)
    terms = Terms(TrustBundle((ROOT.certificate,)), Purpose.CLIENT)
    now = datetime.now(UTC)
    found = facts_of(verify(leaf.presented, terms, now, judge_offline(leaf.presented, terms.bundle, now)), GUARD)
    assert (found.leaf, found.identity, found.chain, found.by) == (
        leaf.certificate,
        Name(Kind.SPIFFE, WEB),
        (ISSUER.certificate,),
        GUARD,
    )
    assert f"URI={WEB}" in told(found)["X-Forwarded-Client-Cert"]
    direct = ROOT.client(WEB)
    judgement = judge_offline(direct.presented, terms.bundle, now)
    assert facts_of(verify(direct.presented, terms, now, judgement)).chain == ()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_no_subject_breaks_a_value(subject: str) -> None:
    """Whatever a subject holds, values are printable ASCII, and XFCC has the same fields for every reader."""
    leaf = client(ISSUER, SUBJECTS[subject], SPIFFE)
    headers = told(facts(leaf))
    assert all(re.fullmatch("[ -~]*", value) for value in headers.values())
    xfcc = told(facts(leaf), HeaderStyle.XFCC)["X-Forwarded-Client-Cert"]
    assert [key for key, _ in elements(xfcc)] == ["Hash", "Subject", "URI"]
    assert [pair[0] for pair in careless(xfcc)] == ["Hash", "Subject", "URI"]
    assert careless(xfcc)[2] == ("URI", WEB)
    assert not [part for part in xfcc.split(",")[1:] if part.startswith(("By=", "Hash=", "Subject=", "URI=", "DNS="))]


def test_what_a_common_name_forges_stays_in_the_subject() -> None:
    """CN=`a";URI="spiffe://x/admin` is text of the subject, not a URI."""
    xfcc = told(facts(client(ISSUER, SUBJECTS["forged"], SPIFFE)), HeaderStyle.XFCC)["X-Forwarded-Client-Cert"]
    assert [text for key, text in elements(xfcc) if key == "URI"] == [WEB]
    assert r'Subject="CN=a\22\3BURI=\22spiffe://x/admin"' in xfcc


@pytest.mark.parametrize(
    ("uri", "told_as"),
    [
        ("https://a.test/x?b=c", 'URI="https://a.test/x?b=c"'),
        ("urn:uuid:1", "URI=urn:uuid:1"),
        ("https://a.test/;URI=spiffe://x/admin", None),
        ("https://a.test/,URI=spiffe://x/admin", None),
        ('https://a.test/"', None),
        ("https://a.test/\\", None),
    ],
)
def test_a_uri_that_could_be_read_as_another_field_is_left_out(uri: str, told_as: str | None) -> None:
    """A URI is told as it is; one with `;`, `,`, a quote or a backslash is not told in XFCC at all."""
    leaf = client(ISSUER, SUBJECTS["usual"], SPIFFE, x509.UniformResourceIdentifier(uri))
    value = forwarded_client_cert(facts(leaf), certificates=False).decode()
    assert value.split(";")[2:] == [f"URI={WEB}", *([told_as] if told_as else [])]
    assert ("By=" in forwarded_client_cert(facts(leaf, uri), certificates=False).decode()) is (told_as is not None)


# What RFC 2253 calls a string: any character, in its own type where it has one.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.text(
    ' ",;\\#+<>=\x00\r\n\x7faé', min_size=1, max_size=8
)
OIDS = st.sampled_from([NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME, NameOID.TITLE])


@given(st.lists(st.tuples(OIDS, TEXT), min_size=1, max_size=3))
def test_a_subject_can_be_read_back(parts: list[tuple[x509.ObjectIdentifier, str]]) -> None:
    """Both spellings of a subject give its text back, and so no two subjects look alike."""
    leaf = client(ISSUER, [[part] for part in parts])
    headers = told(facts(leaf), HeaderStyle.XFCC, HeaderStyle.X_SSL_CLIENT)
    subject = dict(elements(headers["X-Forwarded-Client-Cert"]))["Subject"]
    for text in (subject, headers["X-SSL-Client-S-DN"]):
        assert re.fullmatch("[ -~]*", text)
        found = re.findall(r"(CN|O|title)=((?:[^,\\]|\\.)*)(?:,|\Z)", text)
        assert ",".join(f"{kind}={value}" for kind, value in found) == text
        values = [unescaped(value).decode() for _, value in found]
        assert values == [value for _, value in reversed(parts)]
    assert not set(re.sub(r"\\[0-9A-F]{2}", "", subject)) & set('"\\;')
