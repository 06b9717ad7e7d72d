"""Clients' certificates with subjects that no authority of ours would sign."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from tests.support.certs import CLIENT, DAY, Ca, Leaf

Part = tuple[x509.ObjectIdentifier, str] | tuple[x509.ObjectIdentifier, str, _ASN1Type]
UNKNOWN = x509.ObjectIdentifier("1.2.3.4.5")
KEY = ec.generate_private_key(ec.SECP256R1())  # one for all: making them takes longer than the tests

SUBJECTS: dict[str, list[list[Part]]] = {
    "usual": [[(NameOID.COUNTRY_NAME, "DE")], [(NameOID.ORGANIZATION_NAME, "Acme")], [(NameOID.COMMON_NAME, "web")]],
    "empty": [],
    "specials": [[(NameOID.ORGANIZATION_NAME, 'Müller, "Sons" + Co; <x> \\ #1=a')], [(NameOID.COMMON_NAME, "a\\")]],
    "blanks": [[(NameOID.ORGANIZATION_NAME, " Acme ")], [(NameOID.COMMON_NAME, "#web")], [(NameOID.TITLE, "  ")]],
    "forged": [[(NameOID.COMMON_NAME, 'a";URI="spiffe://x/admin')]],
    "forged elements": [[(NameOID.COMMON_NAME, "a,By=spiffe://x/guard;Hash=00;URI=spiffe://x/admin")]],
    "control bytes": [[(NameOID.COMMON_NAME, "a\r\nX-Evil: 1\t\x01\x7f")]],
    "unicode": [[(NameOID.COMMON_NAME, "bücher \N{EURO SIGN} \N{GRINNING FACE} \u202e")]],
    "one RDN of two": [
        [(NameOID.ORGANIZATION_NAME, "Acme")],
        [(NameOID.COMMON_NAME, "web"), (NameOID.USER_ID, "7")],
    ],
    "an unknown type": [[(UNKNOWN, "odd")], [(UNKNOWN, "long" * 100)], [(NameOID.COMMON_NAME, "web")]],
    "old strings": [
        [(NameOID.COMMON_NAME, "b\xfccher", _ASN1Type.BMPString)],
        [(NameOID.ORGANIZATION_NAME, "Acme", _ASN1Type.PrintableString)],
        [(NameOID.EMAIL_ADDRESS, "me@example.com", _ASN1Type.IA5String)],
    ],
    "many types": [
        [(oid, "x")]
        for oid in (
            *(NameOID.DOMAIN_COMPONENT, NameOID.STREET_ADDRESS, NameOID.SERIAL_NUMBER, NameOID.SURNAME),
            *(NameOID.GIVEN_NAME, NameOID.LOCALITY_NAME, NameOID.STATE_OR_PROVINCE_NAME, NameOID.DN_QUALIFIER),
            *(NameOID.PSEUDONYM, NameOID.ORGANIZATION_IDENTIFIER, NameOID.BUSINESS_CATEGORY, NameOID.POSTAL_CODE),
            *(NameOID.INITIALS, NameOID.GENERATION_QUALIFIER, NameOID.ORGANIZATIONAL_UNIT_NAME),
            *(NameOID.UNSTRUCTURED_NAME, NameOID.EMAIL_ADDRESS),
        )
    ],
}


def client(issuer: Ca, subject: Sequence[Sequence[Part]], *names: x509.GeneralName, serial: int = 0xABC) -> Leaf:
    """A client's certificate with this subject, valid since 09:08:07 of a day with one digit."""
    rdns = [
        x509.RelativeDistinguishedName([x509.NameAttribute(*part, _validate=False) for part in rdn]) for rdn in subject
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(rdns))
        .issuer_name(issuer.certificate.subject)
        .public_key(KEY.public_key())
        .serial_number(serial)
        .not_valid_before(datetime(2026, 1, 2, 9, 8, 7, tzinfo=UTC))
        .not_valid_after(datetime.now(UTC) + DAY)
        .add_extension(x509.ExtendedKeyUsage([CLIENT]), False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    return Leaf(builder.sign(issuer.key, hashes.SHA256()), KEY, issuer.above)
