"""Issuing: an order that fits its profile and its issuer is filled to the letter, and no other is."""

from __future__ import annotations

import ipaddress
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, IssuanceRefused, Reason
from handfast.pki.certificates import certificate_names, encode_chain, parse_certificates
from handfast.pki.issuing import (
    MAX_NAMES,
    Issuer,
    Order,
    authorize_names,
    build_certificate,
    lint,
    make_serial,
    sign,
)
from handfast.pki.keys import KeyType, PrivateKey, encode_private_key, key_id
from handfast.pki.names import Kind, Name, parse_name
from handfast.pki.profiles import BACKDATE, PROFILES

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)
SERIAL = make_serial(7, bytes(range(16)))

ROOT_KEY = ec.generate_private_key(ec.SECP384R1())
ISSUER_KEY = ec.generate_private_key(ec.SECP256R1())
LEAF_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def names(*texts: str) -> tuple[Name, ...]:
    return tuple(parse_name(text) for text in texts)


def order(profile: str, *texts: str, key: PrivateKey = LEAF_KEY) -> Order:
    return Order(PROFILES[profile], names(*texts), key.public_key())


def issue(wanted: Order, issuer: Issuer | None, key: PrivateKey | None = None, now: datetime = NOW) -> x509.Certificate:
    signing = key or (issuer.key if issuer else ROOT_KEY)
    certificate = sign(build_certificate(wanted, issuer, SERIAL, now), signing)
    lint(certificate, wanted, issuer.certificate if issuer else None)
    return certificate


def refusal(wanted: Order, issuer: Issuer | None = None, now: datetime = NOW) -> IssuanceRefused:
    with pytest.raises(IssuanceRefused) as caught:
        build_certificate(wanted, issuer or ISSUER, SERIAL, now)
    return caught.value


ROOT_ORDER = replace(order("root", key=ROOT_KEY), common_name="Test root")
ROOT = issue(ROOT_ORDER, None)
ISSUER_ORDER = replace(order("issuer", key=ISSUER_KEY), common_name="Test issuer")
INTERMEDIATE = issue(ISSUER_ORDER, Issuer(ROOT, ROOT_KEY, ()))
ISSUER = Issuer(INTERMEDIATE, ISSUER_KEY, (INTERMEDIATE,))


def constrained(*permitted: str) -> Issuer:
    """An issuer that we made, with name constraints."""
    wanted = replace(ISSUER_ORDER, permitted=names(*permitted))
    return Issuer(issue(wanted, Issuer(ROOT, ROOT_KEY, ())), ISSUER_KEY, ())


def foreign(
    *extensions: x509.ExtensionType,
    ca: bool | None = True,
    key: PrivateKey = ISSUER_KEY,
    subject: str | None = "Foreign",
    not_before: datetime = NOW - 30 * DAY,
    not_after: datetime = NOW + 300 * DAY,
) -> Issuer:
    """An authority as others make them: self-signed, with these extensions and no more."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(not_before).not_valid_after(not_after)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), True)
    for extension in extensions:
        builder = builder.add_extension(extension, True)
    return Issuer(builder.sign(key, hashes.SHA256()), key, ())


def key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(True, False, False, False, False, sign_certificates, True, False, False)


# What comes out.


def test_a_leaf_is_what_its_profile_says() -> None:
    """A peer's certificate has its names, both uses, critical usage and constraints, and points at its issuer."""
    wanted = order("peer", "spiffe://td/web", "web.example.com", "10.0.0.1")
    leaf = issue(wanted, ISSUER)
    found = {type(extension.value): extension for extension in leaf.extensions}
    assert certificate_names(leaf) == wanted.names
    assert found[x509.SubjectAlternativeName].critical  # the subject is empty
    assert not leaf.subject
    assert found[x509.KeyUsage].critical
    assert found[x509.KeyUsage].value.digital_signature
    assert found[x509.BasicConstraints].value == x509.BasicConstraints(False, None)
    assert list(found[x509.ExtendedKeyUsage].value) == [SERVER, CLIENT]
    assert found[x509.AuthorityKeyIdentifier].value == x509.AuthorityKeyIdentifier(
        key_id(ISSUER_KEY.public_key()), None, None
    )
    assert found[x509.SubjectKeyIdentifier].value == x509.SubjectKeyIdentifier(key_id(LEAF_KEY.public_key()))
    assert len(found) == 6
    assert leaf.serial_number == SERIAL
    leaf.verify_directly_issued_by(INTERMEDIATE)


def test_an_authority_is_what_its_profile_says() -> None:
    """Root and issuer may sign certificates and lists, may not shake hands, and bound what stands below them."""
    for certificate, length in ((ROOT, 1), (INTERMEDIATE, 0)):
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value == x509.BasicConstraints(True, length)
    ROOT.verify_directly_issued_by(ROOT)
    INTERMEDIATE.verify_directly_issued_by(ROOT)


def test_a_common_name_makes_the_names_uncritical() -> None:
    """With a subject, the names need not be critical (RFC 5280 4.2.1.6)."""
    leaf = issue(replace(order("peer", "spiffe://td/web"), common_name="the web"), ISSUER)
    assert not leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).critical
    assert leaf.subject.rfc4514_string() == "CN=the web"


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ROOT_KEY, hashes.SHA384),
        (ISSUER_KEY, hashes.SHA256),
        (RSA_KEY, hashes.SHA256),
        (ec.generate_private_key(ec.SECP521R1()), hashes.SHA512),
        (ed25519.Ed25519PrivateKey.generate(), type(None)),
    ],
)
def test_the_hash_fits_the_key(key: PrivateKey, algorithm: type) -> None:
    """Each kind of key signs with the hash of its strength."""
    certificate = sign(build_certificate(ROOT_ORDER, None, SERIAL, NOW), key)
    assert isinstance(certificate.signature_hash_algorithm, algorithm)


@pytest.mark.parametrize("strict", [[], ["-x509_strict"]])
@pytest.mark.parametrize("permitted", [(), ("example.com", "spiffe://td/x", "10.0.0.1")])
def test_openssl_accepts_what_we_issue(tmp_path: Path, strict: list[str], permitted: tuple[str, ...]) -> None:
    """`openssl verify` accepts our chains for both uses, with and without name constraints."""
    issuer = constrained(*permitted) if permitted else ISSUER
    leaf = issue(order("peer", "spiffe://td/web", "web.example.com", "10.0.0.1"), issuer)
    for name, certificate in (("root", ROOT), ("issuer", issuer.certificate), ("leaf", leaf)):
        (tmp_path / name).write_bytes(encode_chain([certificate]))
    for purpose in ("sslclient", "sslserver"):
        command = ["openssl", "verify", *strict, "-attime", str(int(NOW.timestamp())), "-purpose", purpose]
        command += ["-CAfile", "root", "-untrusted", "issuer", "leaf"]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert shown.stdout == "leaf: OK\n", shown.stderr


# Time.


def test_validity_is_backdated_and_clamped() -> None:
    """A certificate begins a minute ago, lives as asked, and never ends after its issuer or begins before it."""
    wanted = replace(order("peer", "spiffe://td/web"), lifetime=timedelta(hours=3))
    leaf = issue(wanted, ISSUER, now=NOW + DAY + timedelta(microseconds=5))
    assert leaf.not_valid_before_utc == NOW + DAY - BACKDATE
    assert leaf.not_valid_after_utc == NOW + DAY + timedelta(hours=3)
    late = INTERMEDIATE.not_valid_after_utc - timedelta(minutes=10)
    assert issue(wanted, ISSUER, now=late).not_valid_after_utc == INTERMEDIATE.not_valid_after_utc
    early = foreign(not_before=NOW - timedelta(seconds=5))
    assert issue(wanted, early).not_valid_before_utc == NOW - timedelta(seconds=5)


def test_the_lifetime_is_the_profiles_where_none_is_asked() -> None:
    """Without a lifetime it is the profile's, or the authority's ceiling if that is lower."""
    plain = order("peer", "spiffe://td/web")
    assert issue(plain, ISSUER).not_valid_after_utc == NOW + DAY
    low = replace(plain, max_lifetime=timedelta(hours=1))
    assert issue(low, ISSUER).not_valid_after_utc == NOW + timedelta(hours=1)


def test_a_lifetime_over_the_ceiling_is_refused() -> None:
    """The ceiling itself passes; a second more, nothing or less than nothing is ISSUE_LIFETIME with both values."""
    plain = order("peer", "spiffe://td/web")
    issue(replace(plain, lifetime=7 * DAY), ISSUER)
    issue(replace(plain, lifetime=30 * DAY, max_lifetime=30 * DAY), ISSUER)
    for lifetime in (7 * DAY + timedelta(seconds=1), 8 * DAY, timedelta(0), -DAY, timedelta(milliseconds=1)):
        refused = refusal(replace(plain, lifetime=lifetime))
        assert refused.reason is Reason.ISSUE_LIFETIME
        assert refused.facts["allowed"] == "7d"
    assert refusal(replace(plain, lifetime=timedelta(hours=36) * 10)).facts["value"] == "15d"
    assert refusal(replace(plain, lifetime=DAY, max_lifetime=timedelta(hours=1))).facts["allowed"] == "1h"


def test_an_issuer_out_of_its_time_signs_nothing() -> None:
    """Expired to the second, or not yet valid, the issuer is refused."""
    plain = order("peer", "spiffe://td/web")
    end = INTERMEDIATE.not_valid_after_utc
    assert refusal(plain, now=end).reason is Reason.ISSUE_ISSUER_EXPIRED
    assert refusal(plain, now=end + DAY).reason is Reason.ISSUE_ISSUER_EXPIRED
    assert refusal(plain, now=NOW - DAY).reason is Reason.ISSUE_ISSUER_NOT_YET_VALID
    issue(plain, ISSUER, now=end - timedelta(seconds=2))


# Names.


@pytest.mark.parametrize(
    ("profile", "texts"),
    [
        ("server", ["web.example.com"]),
        ("server", ["*.example.com", "10.0.0.1", "::1", "spiffe://td/web"]),
        ("client", ["spiffe://td/web"]),
        ("client", ["uri:urn:uuid:1234", "email:ann@example.com", "laptop.example.com"]),
        ("peer", ["spiffe://td/web"]),
        ("peer", ["spiffe://td/web", "*.example.com", "10.0.0.1"]),
    ],
)
def test_names_that_a_profile_takes(profile: str, texts: list[str]) -> None:
    """These names are issued, in their order."""
    assert certificate_names(issue(order(profile, *texts), ISSUER)) == names(*texts)


@pytest.mark.parametrize(
    ("profile", "texts", "reason"),
    [
        ("server", [], Reason.ISSUE_NO_NAME),
        ("server", ["email:ann@example.com"], Reason.ISSUE_NAME_KIND),
        ("server", ["uri:urn:x:y"], Reason.ISSUE_NAME_KIND),
        ("server", ["cn:web"], Reason.ISSUE_NAME_KIND),
        ("server", ["spiffe://td/a", "spiffe://td/b"], Reason.ISSUE_URI_COUNT),
        ("client", [], Reason.ISSUE_NO_NAME),
        ("client", ["10.0.0.1"], Reason.ISSUE_NAME_KIND),
        ("client", ["*.example.com"], Reason.ISSUE_NAME_KIND),
        ("client", ["spiffe://td"], Reason.ISSUE_NAME_KIND),
        ("client", ["spiffe://td/a", "uri:urn:x:y"], Reason.ISSUE_URI_COUNT),
        ("peer", [], Reason.ISSUE_NO_NAME),
        ("peer", ["web.example.com"], Reason.ISSUE_URI_COUNT),
        ("peer", ["spiffe://td/a", "spiffe://td/b"], Reason.ISSUE_URI_COUNT),
        ("peer", ["spiffe://td/a", "email:a@b.c"], Reason.ISSUE_NAME_KIND),
    ],
)
def test_names_that_a_profile_does_not_take(profile: str, texts: list[str], reason: Reason) -> None:
    """These are refused for the named reason."""
    assert refusal(order(profile, *texts)).reason is reason


def test_names_of_authorities() -> None:
    """An authority needs a common name; its SPIFFE ID, if any, has no path (X509-SVID 3.2)."""
    above = Issuer(ROOT, ROOT_KEY, ())
    assert refusal(replace(ISSUER_ORDER, common_name=None), above).reason is Reason.ISSUE_NO_NAME
    issue(replace(ISSUER_ORDER, names=names("spiffe://td")), above)
    for text in ("spiffe://td/web", "web.example.com"):
        assert refusal(replace(ISSUER_ORDER, names=names(text)), above).reason is Reason.ISSUE_NAME_KIND


def test_a_name_said_twice_is_issued_once() -> None:
    """Duplicates are dropped, and a certificate holds no more than MAX_NAMES."""
    many = [f"h{n}.example.com" for n in range(MAX_NAMES)]
    leaf = issue(order("server", *many, *many), ISSUER)
    assert certificate_names(leaf) == names(*many)
    assert refusal(order("server", *many, "more.example.com")).reason is Reason.ISSUE_TOO_MANY_NAMES


@pytest.mark.parametrize("value", ["web\x00.example.com", "WEB.example.com", "a..b", "exa mple.com"])
def test_a_name_that_was_never_parsed_does_not_pass_the_lint(value: str) -> None:
    """A Name made by hand, around the parser, is caught when the certificate is read back."""
    wanted = replace(order("server", "x.example.com"), names=(Name(Kind.DNS, value),))
    with pytest.raises(IssuanceRefused) as caught:
        issue(wanted, ISSUER)
    assert caught.value.reason is Reason.ISSUE_LINT


def test_a_common_name_that_looks_like_a_name_must_be_one() -> None:
    """Software that still reads common names must not be shown a host that was not authorized."""
    plain = order("server", "web.example.com")
    issue(replace(plain, common_name="web.example.com"), ISSUER)
    issue(replace(plain, common_name="Our Web"), ISSUER)
    for text in ("admin.example.com", "10.0.0.1", "spiffe://td/admin", "root@example.com", "localhost"):
        refused = refusal(replace(plain, common_name=text))
        assert refused.reason is Reason.ISSUE_NAME_NOT_AUTHORIZED, text


@pytest.mark.parametrize("text", ["", "a\x00b", "a\nb", "x" * 65, "\u202eadmin"])
def test_a_common_name_is_short_and_printable(text: str) -> None:
    """Control and direction characters, and more than 64 characters, are INPUT_NAME."""
    with pytest.raises(InvalidInput) as caught:
        build_certificate(replace(order("peer", "spiffe://td/web"), common_name=text), ISSUER, SERIAL, NOW)
    assert caught.value.reason is Reason.INPUT_NAME


def test_requested_names_must_be_allowed() -> None:
    """A request may ask for some or none of the allowed names, and for nothing else, wildcards taken literally."""
    allowed = names("spiffe://td/web", "*.example.com")
    authorize_names((), allowed)
    authorize_names(names("*.example.com"), allowed)
    authorize_names(allowed, allowed)
    for text in ("web.example.com", "spiffe://td/web/x", "spiffe://td/we", "cn:spiffe://td/web"):
        with pytest.raises(IssuanceRefused) as caught:
            authorize_names([*allowed, parse_name(text)], allowed)
        assert caught.value.reason is Reason.ISSUE_NAME_NOT_AUTHORIZED
        assert caught.value.facts["value"] == str(parse_name(text))


# Keys.


def test_every_key_type_is_issued_for() -> None:
    """Each profile takes each key type."""
    for profile in ("server", "client", "peer"):
        for key in (LEAF_KEY, ROOT_KEY, ed25519.Ed25519PrivateKey.generate(), RSA_KEY):
            issue(order(profile, "spiffe://td/web", key=key), ISSUER)


def test_weak_and_unwanted_keys_are_refused() -> None:
    """A weak key is ISSUE_WEAK_KEY; a sound one that the profile does not list is ISSUE_KEY_TYPE."""
    weak = order("peer", "spiffe://td/web", key=rsa.generate_private_key(65537, 1024))
    assert refusal(weak).reason is Reason.ISSUE_WEAK_KEY
    p521 = order("peer", "spiffe://td/web", key=ec.generate_private_key(ec.SECP521R1()))
    refused = refusal(p521)
    assert refused.reason is Reason.ISSUE_KEY_TYPE
    assert refused.facts["value"] == "521-bit EC"
    only_ec = replace(PROFILES["peer"], key_types=(KeyType.P256,))
    assert refusal(replace(p521, profile=only_ec, public_key=RSA_KEY.public_key())).facts["value"] == "rsa2048"


# Issuers.


def test_an_authority_of_openssl_can_issue(tmp_path: Path) -> None:
    """An RSA authority as `openssl req -x509` makes it, without key usage, issues what openssl accepts."""
    (tmp_path / "key").write_bytes(encode_private_key(RSA_KEY))
    command = ["openssl", "req", "-new", "-x509", "-key", "key", "-out", "ca"]
    subprocess.run([*command, "-subj", "/O=Acme/CN=CA", "-days", "9"], cwd=tmp_path, capture_output=True, check=True)
    certificate = parse_certificates((tmp_path / "ca").read_bytes(), "ca")[0]
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.KeyUsage)
    now = certificate.not_valid_before_utc + timedelta(minutes=5)
    issuer = Issuer(certificate, RSA_KEY, ())
    leaf = issue(order("peer", "spiffe://td/web"), issuer, now=now)
    (tmp_path / "leaf").write_bytes(encode_chain([leaf]))
    command = ["openssl", "verify", "-attime", str(int(now.timestamp())), "-CAfile", "ca", "leaf"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert shown.stdout == b"leaf: OK\n"


def test_an_issuer_without_key_identifier_is_pointed_at_by_its_key() -> None:
    """Where the issuer has no SKI the AKI is made from its key; where it has an odd one, that is used."""
    for issuer, expected in (
        (foreign(), key_id(ISSUER_KEY.public_key())),
        (foreign(x509.SubjectKeyIdentifier(b"odd")), b"odd"),
    ):
        leaf = issue(order("peer", "spiffe://td/web"), issuer)
        found = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        assert found.key_identifier == expected


def unreadable_key() -> Issuer:
    """A sound authority whose key is a point off its curve."""
    good = foreign()
    point = ISSUER_KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    data = good.certificate.public_bytes(Encoding.DER).replace(point, point[:-1] + bytes([point[-1] ^ 1]))
    return replace(good, certificate=x509.load_der_x509_certificate(data))


@pytest.mark.parametrize(
    ("issuer", "detail"),
    [
        (foreign(ca=False), "basic constraints"),
        (foreign(ca=None), "basic constraints"),
        (foreign(key_usage(sign_certificates=False)), "key usage"),
        (foreign(subject=None), "no subject"),
        (replace(foreign(), key=LEAF_KEY), "not its own"),
        (unreadable_key(), "cannot be read"),
        (foreign(x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), b"\x30\x05")), "cannot be read"),
    ],
)
def test_what_is_no_authority_signs_nothing(issuer: Issuer, detail: str) -> None:
    """Each lack of an authority is refused and named."""
    refused = refusal(order("peer", "spiffe://td/web"), issuer)
    assert refused.reason is Reason.ISSUE_ISSUER_NOT_CA
    assert detail in refused.facts["detail"]
    issue(order("peer", "spiffe://td/web"), foreign(key_usage(sign_certificates=True)))


def test_an_issuer_keeps_to_its_path_length() -> None:
    """An issuer with path length 0 makes no authority; the root, with 1, does."""
    below = replace(ISSUER_ORDER, public_key=LEAF_KEY.public_key(), common_name="Deeper")
    assert refusal(below, ISSUER).reason is Reason.ISSUE_ISSUER_LIMITED
    issue(below, Issuer(ROOT, ROOT_KEY, ()))
    issue(below, foreign())


def test_an_issuer_keeps_to_its_extended_usages() -> None:
    """An authority for servers only makes no client; one for any use does."""
    servers = foreign(x509.ExtendedKeyUsage([SERVER]))
    issue(order("server", "web.example.com"), servers)
    for profile in ("client", "peer"):
        refused = refusal(order(profile, "spiffe://td/web"), servers)
        assert refused.reason is Reason.ISSUE_ISSUER_LIMITED
        assert "clientAuth" in refused.facts["detail"]
    issue(
        order("peer", "spiffe://td/web"), foreign(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]))
    )


def test_only_a_root_signs_itself() -> None:
    """A leaf without an issuer, and a root with one, are bugs of the caller."""
    for wanted, issuer in ((order("peer", "spiffe://td/web"), None), (ROOT_ORDER, ISSUER)):
        with pytest.raises(ValueError, match="root signs itself"):
            build_certificate(wanted, issuer, SERIAL, NOW)


def test_now_is_aware() -> None:
    """A naive time is a bug of the caller, not a certificate of the wrong zone."""
    with pytest.raises(ValueError, match="aware"):
        build_certificate(order("peer", "spiffe://td/web"), ISSUER, SERIAL, NOW.replace(tzinfo=None))


# Name constraints.


def permits(*bases: x509.GeneralName) -> Issuer:
    return foreign(x509.NameConstraints(list(bases), None))


def excludes(*bases: x509.GeneralName) -> Issuer:
    return foreign(x509.NameConstraints(None, list(bases)))


DNS, URI, EMAIL = x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name


def IP(network: str) -> x509.IPAddress:
    return x509.IPAddress(ipaddress.ip_network(network))


@pytest.mark.parametrize(
    ("base", "inside", "outside", "doubtful"),
    [
        (
            DNS("example.com"),
            ["example.com", "a.b.example.com", "*.example.com"],
            ["badexample.com", "example.com.org", "dns:com", "*.org"],
            ["*.com"],  # covers example.com and others
        ),
        (DNS("Example.COM"), ["a.example.com"], ["a.example.org"], []),
        (DNS(".example.com"), ["a.example.com", "*.example.com"], ["example.com", "aexample.com"], []),
        (DNS("a.b.example.com"), ["a.b.example.com"], ["*.example.com"], ["*.b.example.com"]),
        (DNS(""), ["a.example.com", "localhost"], [], []),
        (IP("10.0.0.0/8"), ["10.1.2.3"], ["11.0.0.1", "::a00:1"], []),
        (IP("fd00::/8"), ["fd00::1"], ["10.0.0.1", "fe80::1"], []),
        (URI("td"), ["spiffe://td/web"], ["spiffe://td.example/web", "spiffe://other/td", "spiffe://a.td/web"], []),
        (URI(".a.example"), ["spiffe://b.a.example/w"], ["spiffe://a.example/w", "spiffe://ba.example/w"], []),
        (
            URI("h.example"),
            ["uri:https://u@H.example:8443/x"],
            ["uri:https://h.example.org/", "uri:https://h/?h.example"],
            ["uri:urn:uuid:1", "uri:https://10.0.0.1/", "uri:x://[", "uri:file:///h.example"],  # have no host name
        ),
        (EMAIL("ann@example.com"), ["ann@example.com"], ["Ann@example.com", "bob@example.com"], []),
        (EMAIL("example.com"), ["bob@example.com"], ["bob@a.example.com"], []),
        (EMAIL(".example.com"), ["bob@a.example.com"], ["bob@example.com"], []),
    ],
)
def test_permitted_and_excluded_names(
    base: x509.GeneralName, inside: list[str], outside: list[str], doubtful: list[str]
) -> None:
    """What is permitted is issued, what is excluded is not, and what may be either is refused both ways."""
    for text in [*inside, *outside, *doubtful]:
        wanted = order("server" if parse_name(text).kind in (Kind.DNS, Kind.IP) else "client", text)
        for issuer, good in ((permits(base), inside), (excludes(base), outside)):
            if text in good:
                issue(wanted, issuer)
            else:
                refused = refusal(wanted, issuer)
                assert refused.reason is Reason.ISSUE_NAME_CONSTRAINT, text
                assert refused.facts["value"] == str(parse_name(text))


def test_a_kind_that_is_not_constrained_is_free() -> None:
    """Permitted DNS names say nothing of SPIFFE IDs (RFC 5280 4.2.1.10)."""
    issue(order("peer", "spiffe://td/web", "a.example.com"), permits(DNS("example.com")))
    both = permits(DNS("example.com"), URI("td"))
    assert refusal(order("peer", "spiffe://other/web"), both).reason is Reason.ISSUE_NAME_CONSTRAINT


def test_constraints_of_the_authorities_above_count() -> None:
    """A chain's constraints bind its last issuer too."""
    above = permits(DNS("example.com")).certificate
    below = replace(ISSUER, chain=(INTERMEDIATE, above))
    issue(order("server", "a.example.com"), below)
    assert refusal(order("server", "a.example.org"), below).reason is Reason.ISSUE_NAME_CONSTRAINT


def test_common_names_and_subjects_are_constrained() -> None:
    """A dotted common name counts as a DNS name where there is none; a subject must be in a permitted directory."""
    wanted = replace(order("peer", "spiffe://td/web"), common_name="web")
    issue(wanted, permits(DNS("example.com")))
    acme = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Acme")]))
    web = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "web")]))
    issue(order("peer", "spiffe://td/web"), permits(acme))
    assert refusal(wanted, permits(acme)).reason is Reason.ISSUE_NAME_CONSTRAINT
    issue(wanted, permits(acme, web))
    assert refusal(wanted, excludes(web)).reason is Reason.ISSUE_NAME_CONSTRAINT
    issue(wanted, excludes(acme))
    authority = replace(ISSUER_ORDER, common_name="ca.example.org", public_key=LEAF_KEY.public_key())
    assert refusal(authority, permits(DNS("example.com"))).facts["value"] == "dns:ca.example.org"


def test_constraints_that_we_make_hold() -> None:
    """An issuer made for a domain and a trust domain issues within them, and no host or address besides."""
    issuer = constrained("example.com", "spiffe://td/any")
    issue(order("peer", "spiffe://td/web", "a.example.com"), issuer)
    for texts in (["spiffe://other/web"], ["spiffe://td/web", "a.example.org"], ["spiffe://td/web", "10.0.0.1"]):
        assert refusal(order("peer", *texts), issuer).reason is Reason.ISSUE_NAME_CONSTRAINT
    only_ip = constrained("10.0.0.1", "email:ann@example.com")
    issue(order("server", "10.0.0.1"), only_ip)
    for text in ("10.0.0.2", "::1", "localhost"):
        assert refusal(order("server", text), only_ip).reason is Reason.ISSUE_NAME_CONSTRAINT


def test_only_authorities_are_constrained() -> None:
    """Name constraints on a leaf, or of a kind that has none, are bugs of the caller."""
    with pytest.raises(ValueError, match="for authorities"):
        build_certificate(replace(order("server", "a.b"), permitted=names("a.b")), ISSUER, SERIAL, NOW)
    with pytest.raises(ValueError, match="name constraint"):
        constrained("cn:x")


# Serials and lint.


@given(st.integers(0, 0x3FFF), st.binary(min_size=16, max_size=16))
def test_serials_are_positive_and_18_octets(signer: int, random: bytes) -> None:
    """Every serial encodes as 18 octets, says who signed, and keeps all its random bits."""
    serial = make_serial(signer, random)
    octets = serial.to_bytes(18, "big")
    assert 0x40 <= octets[0] <= 0x7F
    assert octets[2:] == random
    assert int.from_bytes(octets[:2], "big") & 0x3FFF == signer


@pytest.mark.parametrize(("signer", "random"), [(-1, bytes(16)), (0x4000, bytes(16)), (0, bytes(15)), (0, bytes(17))])
def test_serials_are_made_of_the_right_parts(signer: int, random: bytes) -> None:
    """Anything else than a 14-bit signer and 16 bytes is a bug of the caller."""
    with pytest.raises(ValueError, match="serial"):
        make_serial(signer, random)


GOOD = order("peer", "spiffe://td/web", "web.example.com")
CA_GOOD = replace(ISSUER_ORDER, permitted=names("example.com"))


@pytest.mark.parametrize(
    ("other", "detail"),
    [
        (replace(GOOD, names=names("spiffe://td/web")), "names"),
        (replace(GOOD, names=names("web.example.com", "spiffe://td/web")), "names"),
        (replace(GOOD, public_key=ROOT_KEY.public_key()), "key"),
        (replace(GOOD, common_name="web"), "subject"),
        (replace(GOOD, profile=PROFILES["server"]), "extendedKeyUsage"),
        (replace(GOOD, profile=PROFILES["client"]), "extendedKeyUsage"),
        (replace(GOOD, profile=PROFILES["issuer"]), "basicConstraints"),
        (replace(GOOD, lifetime=timedelta(hours=1)), "longer"),
        (replace(GOOD, max_lifetime=timedelta(hours=1)), "longer"),
        (replace(GOOD, permitted=names("example.com")), "nameConstraints"),
    ],
)
def test_the_lint_finds_what_differs_from_the_order(other: Order, detail: str) -> None:
    """A certificate made for one order does not pass for another."""
    leaf = issue(GOOD, ISSUER)
    with pytest.raises(IssuanceRefused) as caught:
        lint(leaf, other, INTERMEDIATE)
    assert caught.value.reason is Reason.ISSUE_LINT
    assert detail in caught.value.facts["detail"]


def test_the_lint_finds_what_the_builder_did_wrong() -> None:
    """An extension too many, a serial too short or an issuer not meant is found."""
    builder = build_certificate(GOOD, ISSUER, SERIAL, NOW)
    extra = builder.add_extension(x509.OCSPNoCheck(), False)
    short = build_certificate(GOOD, ISSUER, 5, NOW)
    for made, issuer, detail in (
        (extra, INTERMEDIATE, "OCSPNoCheck"),
        (short, INTERMEDIATE, "serial"),
        (builder, ROOT, "issuer is another"),
        (builder, foreign(not_after=NOW + timedelta(hours=1)).certificate, "outlives"),
        (builder, None, "own issuer"),
    ):
        with pytest.raises(IssuanceRefused) as caught:
            lint(sign(made, ISSUER_KEY), GOOD, issuer)
        assert detail in caught.value.facts["detail"], detail


def test_the_lint_holds_authorities_to_their_constraints() -> None:
    """Other permitted names than ordered, or none, do not pass."""
    above = Issuer(ROOT, ROOT_KEY, ())
    made = issue(CA_GOOD, above)
    for other in (ISSUER_ORDER, replace(CA_GOOD, permitted=names("example.org"))):
        with pytest.raises(IssuanceRefused) as caught:
            lint(made, other, ROOT)
        assert "nameConstraints" in caught.value.facts["detail"]


def test_the_lint_refuses_an_issuers_subject() -> None:
    """A certificate that bears its issuer's subject would look self-signed."""
    same = replace(ISSUER_ORDER, common_name="Test root")
    with pytest.raises(IssuanceRefused, match="issuer's"):
        issue(same, Issuer(ROOT, ROOT_KEY, ()))


def test_rehearsal_and_signature_agree() -> None:
    """The same builder, signed with a throwaway key and with the real one, is the same to the byte but for that."""
    builder = build_certificate(GOOD, ISSUER, SERIAL, NOW)
    throwaway = ec.generate_private_key(ec.SECP256R1())
    rehearsed, signed = sign(builder, throwaway), sign(builder, ISSUER_KEY)
    assert rehearsed.tbs_certificate_bytes == signed.tbs_certificate_bytes
    assert rehearsed.public_bytes(Encoding.DER) != signed.public_bytes(Encoding.DER)
