"""Distinguished names as text: RFC 4514's own examples, and what a name could forge."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput
from handfast.pki import der
from handfast.wire.distinguished import Spelling, render_rdns
from handfast.wire.extensions import render_name

Part = tuple[x509.ObjectIdentifier, str]
CN, OU, O, DC, UID = (  # noqa: E741  # as they are written
    *(NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.ORGANIZATION_NAME),
    *(NameOID.DOMAIN_COMPONENT, NameOID.USER_ID),
)
ODD = x509.ObjectIdentifier("1.3.6.1.4.1.1466.0")


def name(*rdns: list[Part]) -> bytes:
    """A name in DER; the first RDN is the first in it."""
    attributes = [[x509.NameAttribute(oid, text, _validate=False) for oid, text in rdn] for rdn in rdns]
    return x509.Name(map(x509.RelativeDistinguishedName, attributes)).public_bytes()


@pytest.mark.parametrize(
    ("der_name", "readable", "ascii_only", "hexed"),
    [
        (name([(DC, "net")], [(DC, "example")], [(UID, "jsmith")]), "UID=jsmith,DC=example,DC=net", None, None),
        (name([(DC, "net")], [(CN, "J.  Smith"), (OU, "Sales")]), "CN=J.  Smith+OU=Sales,DC=net", None, None),
        (
            name([(CN, 'James "Jim" Smith, III')]),
            r"CN=James \"Jim\" Smith\, III",
            None,
            r"CN=James \22Jim\22 Smith\2C III",
        ),
        (name([(CN, "Before\rAfter")]), r"CN=Before\0DAfter", None, None),
        (name([(ODD, "Hi")]), "1.3.6.1.4.1.1466.0=#0C024869", None, None),
        (name([(CN, "Lučić")]), "CN=Lučić", r"CN=Lu\C4\8Di\C4\87", r"CN=Lu\C4\8Di\C4\87"),
        (name([(CN, "a+b=c;<d>\\")]), r"CN=a\+b=c\;\<d\>\\", None, r"CN=a\2Bb=c\3B\3Cd\3E\5C"),
        (name([(CN, " a ")], [(O, "#b")], [(OU, " ")]), r"OU=\ ,O=\#b,CN=\ a\ ", None, r"OU=\20,O=\23b,CN=\20a\20"),
        (name([(CN, "a\u202eb")]), r"CN=a\E2\80\AEb", None, None),
        (name(), "", None, None),
    ],
)
def test_a_name_is_written_as_rfc_4514_has_it(
    der_name: bytes, readable: str, ascii_only: str | None, hexed: str | None
) -> None:
    """The examples of RFC 4514 4 and their kin, in the three spellings; None where a spelling is the readable one."""
    _, rdns = der.read_one(der_name)
    expected = {Spelling.READABLE: readable, Spelling.ASCII: ascii_only, Spelling.HEX: hexed}
    for spelling, text in expected.items():
        assert render_rdns(rdns, spelling) == (readable if text is None else text)
    assert render_name(der_name) == (readable or "an empty name")


@pytest.mark.parametrize(
    "rdns", [b"\x30", bytes.fromhex("31023000"), bytes.fromhex("310530030201 01"), bytes.fromhex("31043002 0500")]
)
def test_what_is_no_name_is_refused(rdns: bytes) -> None:
    """Bytes that are no RDNSequence raise, and are shown as unreadable where they only are to be seen."""
    with pytest.raises(InvalidInput):
        render_rdns(rdns, Spelling.READABLE)
    assert render_name(b"\x30" + bytes([len(rdns)]) + rdns).startswith("a name that cannot be read")


def test_bytes_that_are_not_their_strings_are_written_as_der() -> None:
    """A UTF8String that is not UTF-8 is told by its DER, and not with a character in its place."""
    damaged = name([(CN, "ab")]).replace(b"\x0c\x02ab", b"\x0c\x02\xff\xfe")
    assert render_name(damaged) == "CN=#0C02FFFE"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.text(
    ' ",;\\#+<>=\x00é', min_size=1, max_size=6
)


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([CN, O, OU]), TEXT), min_size=1, max_size=2, unique_by=lambda part: part[0]),
        max_size=3,
    )
)
def test_the_spellings_agree_on_the_parts(parts: list[list[Part]]) -> None:
    """In each spelling the text is printable, and has as many unescaped `,` and `+` as the name has parts to divide."""
    _, rdns = der.read_one(name(*parts))
    for spelling in Spelling:
        text = render_rdns(rdns, spelling)
        assert text.isprintable()
        assert spelling is Spelling.READABLE or text.isascii()
        bare, at = "", 0
        while at < len(text):
            if text[at] == "\\":
                at += 2
                continue
            bare += text[at]
            at += 1
        assert bare.count(",") == max(len(parts) - 1, 0)
        assert bare.count("+") == sum(len(rdn) - 1 for rdn in parts)
