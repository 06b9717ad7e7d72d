"""Rows D1 to D11: what a certificate can hold, and what it can cost."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID, ObjectIdentifier
from tlslite.errors import TLSError

from handfast.pki import TrustBundle
from handfast.pki.issuing import Issuer
from handfast.pki.revocation import build_crl, check_crls
from handfast.policy import parse_policy
from handfast.tls.server import ClientAuth
from tests.attacks.kit import LISTENER, Attacker, Vhost, command, serve_sites, tlslite, untouched
from tests.guard.test_admission import REFUSED
from tests.support.apps import App, get
from tests.support.certs import DAY, Ca, Leaf, Spec, _now, make
from tests.support.guards import Running
from tests.support.waiting import Stopwatch

KEPT = get(close=False)
FULL = int(os.environ.get("HANDFAST_REFUSALS", "4000"))  # 100,000 for the whole of D10, some two minutes


def _subject(ca: Ca, oid: ObjectIdentifier, value: str, kind: _ASN1Type = _ASN1Type.UTF8String) -> Leaf:
    """A client whose subject has one attribute of any kind of string, sound or not."""
    leaf = ca.client()
    key = ec.generate_private_key(ec.SECP256R1())
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(oid, value, _type=kind, _validate=False)]))
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - DAY)
        .not_valid_after(_now() + DAY)
    )
    for extension in leaf.certificate.extensions:
        if not isinstance(extension.value, x509.SubjectKeyIdentifier):
            made = made.add_extension(extension.value, extension.critical)
    return Leaf(made.sign(ca.key, leaf.certificate.signature_hash_algorithm), key)  # type: ignore[arg-type]  # SHA-256


def _san(ca: Ca, *names: x509.GeneralName) -> Leaf:
    return make(Spec(names=list(names)), ca)


def _raw(kind: type[Any], value: str) -> Any:
    return kind._init_without_validation(value)


def _bytes(leaf: Leaf, ca: Ca, old: bytes, new: bytes) -> Leaf:
    """The same certificate with other bytes in it, signed anew."""
    assert len(old) == len(new)
    from handfast.pki import der

    tbs = leaf.certificate.tbs_certificate_bytes.replace(old, new)
    assert tbs != leaf.certificate.tbs_certificate_bytes
    signature = ca.key.sign(tbs, ec.ECDSA(hashes.SHA256()))
    whole = leaf.certificate.public_bytes(Encoding.DER)
    _, contents = der.read_one(whole)
    algorithm = list(der.read_all(contents))[1][1]

    def tlv(tag: int, value: bytes) -> bytes:
        size = len(value)
        length = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
        return bytes([tag]) + length + value

    made = tlv(0x30, tbs + tlv(0x30, algorithm) + tlv(0x03, b"\0" + signature))
    return Leaf(x509.load_der_x509_certificate(made), leaf.key)


CN, OU = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME
BAD_NAMES: dict[str, Callable[[Ca], Leaf]] = {
    **{
        f"{where}_{what}": lambda ca, oid=oid, text=text: _subject(ca, oid, f"admin{text}evil")  # type: ignore[misc]
        for where, oid in (("cn", CN), ("ou", OU))
        for what, text in (
            *(("nul", "\0"), ("crlf", "\r\n"), ("tab", "\t"), ("del", "\x7f"), ("escape", "\x1b"), ("c1", "\x85")),
            *(("bidi", "\u202e"), ("isolate", "\u2066"), ("separator", "\u2028")),
        )
    },
    "cn_bmp_nul": lambda ca: _subject(ca, CN, "admin\0evil", _ASN1Type.BMPString),
    "cn_universal_nul": lambda ca: _subject(ca, CN, "admin\0evil", _ASN1Type.UniversalString),
    "cn_t61_nul": lambda ca: _subject(ca, CN, "admin\0evil", _ASN1Type.T61String),
    "dns_nul": lambda ca: _san(ca, _raw(x509.DNSName, "admin.example\0.evil.example")),
    "dns_newline": lambda ca: _san(ca, _raw(x509.DNSName, "admin.example\n")),
    "uri_nul": lambda ca: _san(ca, _raw(x509.UniformResourceIdentifier, "spiffe://test/admin\0evil")),
    "uri_crlf": lambda ca: _san(ca, _raw(x509.UniformResourceIdentifier, "spiffe://test/admin\r\nX-A: b")),
    "email_nul": lambda ca: _san(ca, _raw(x509.RFC822Name, "admin@example.com\0.evil")),
    "ip_of_3": lambda ca: _bytes(
        _san(ca, _raw(x509.DNSName, "abc"), x509.UniformResourceIdentifier("spiffe://test/web")),
        ca,
        b"\x82\x03abc",
        b"\x87\x03abc",
    ),
    "cn_beside_good_name": lambda ca: ca.client(cn="admin\0.evil"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_d1_control_bytes_in_a_name_refuse(attacker: Attacker, ca: Ca, case: str) -> None:
    """D1: a name with NUL, CR LF, TAB, DEL, bidirectional marks or bytes of no alphabet, in whatever field and kind of
    string, refuses the certificate; and nothing of it breaks a line of the log."""
    with App() as app, Running(ca, app.address, parse_policy(["cn:admin", "dns:admin.example", "any"])) as guard:
        heard = attacker.call(guard, BAD_NAMES[case](ca))
        assert heard.status == 403, heard
        assert heard.refusal[1] in ("verify.forbidden_name", "verify.malformed", "verify.no_name")
        event = guard.events.next("connection")
        assert event["decision"] == "deny"
        assert event["presented"].isprintable()
        assert untouched(app)


def test_d1_bytes_that_are_no_text_refuse(ca: Ca) -> None:
    """D1: a common name that is no UTF-8, which OpenSSL's own clients will not send, refuses."""
    leaf = _bytes(_subject(ca, CN, "adminEVIL"), ca, b"adminEVIL", b"admin\xff\xfe\xc0\xaf")
    with App() as app, Running(ca, app.address) as guard:
        with pytest.raises((TLSError, ConnectionError)), tlslite(guard, leaf) as tls:  # noqa: PT012  # either may tell
            tls.write(KEPT)
            assert not bytes(tls.read(min=1)).startswith(b"HTTP/1.1 200")
            raise ConnectionError("refused in words")
        assert guard.events.next("connection")["decision"] == "deny"
        assert untouched(app)


SAME_TEXT: dict[str, Callable[[Ca], Leaf]] = {
    "email": lambda ca: ca.leaf("x@admin.example"),
    "email_of_it": lambda ca: _san(ca, _raw(x509.RFC822Name, "admin.example")),
    "uri": lambda ca: ca.leaf("https://admin.example"),
    "spiffe": lambda ca: ca.leaf("spiffe://admin.example/x"),
    "other_name": lambda ca: _san(
        ca, x509.OtherName(ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x0dadmin.example")
    ),
    "directory": lambda ca: _san(ca, x509.DirectoryName(x509.Name([x509.NameAttribute(CN, "admin.example")]))),
    "registered_id": lambda ca: _san(ca, x509.RegisteredID(ObjectIdentifier("1.2.3"))),
    "cn": lambda ca: ca.leaf("web.example", cn="admin.example"),
    "ou": lambda ca: _subject(ca, OU, "admin.example"),
    "wildcard": lambda ca: ca.leaf("*.example"),
    "trailing_dot": lambda ca: _san(ca, _raw(x509.DNSName, "admin.example.")),
    "longer": lambda ca: ca.leaf("admin.example.evil"),
    "below": lambda ca: ca.leaf("x.admin.example"),
}


@pytest.mark.parametrize("case", SAME_TEXT)
def test_d2_d6_a_name_of_another_kind_is_not_that_name(attacker: Attacker, ca: Ca, case: str) -> None:
    """D2, D6: `dns:admin.example` lets in that DNS name, and not the same text in an email, a URI, another kind of
    entry, a common name, or a wildcard."""
    with App() as app, Running(ca, app.address, parse_policy(["dns:admin.example"])) as guard:
        assert attacker.call(guard, SAME_TEXT[case](ca)).status == 403
        assert untouched(app)
        assert attacker.call(guard, ca.leaf("ADMIN.example")).status == 200


def test_d2_an_address_as_text_is_no_address(attacker: Attacker, ca: Ca) -> None:
    """D2: 10.0.0.1 written into a DNS entry is not the address 10.0.0.1."""
    with App() as app, Running(ca, app.address, parse_policy(["ip:10.0.0.0/8"])) as guard:
        assert attacker.call(guard, _san(ca, x509.DNSName("10.0.0.1"))).status == 403
        assert untouched(app)
        assert attacker.call(guard, ca.leaf("10.0.0.1")).status == 200


@pytest.mark.parametrize("mode", ["tcp", "optional"])
@pytest.mark.parametrize("case", [case for case in REFUSED if case not in ("none", "weak_rsa")])
def test_d3_d9_each_fault_is_refused_in_every_mode(attacker: Attacker, ca: Ca, case: str, mode: str) -> None:
    """D3, D4, D5, D6, D9: what HTTP mode refuses is refused in TCP mode too, where OpenSSL walks the chain, and where a
    certificate is optional."""
    maker, _, code = REFUSED[case]
    with App() as app, Running(ca, f"tcp://{app.address}" if mode == "tcp" else app.address) as guard:
        if mode == "optional":
            serve_sites(guard, Vhost(app, client_auth=ClientAuth.OPTIONAL, nameless=True))
        heard = attacker.call(guard, maker(ca))
        assert heard.status == (0 if mode == "tcp" else 403)
        event = guard.events.next("connection")
        assert code in [event["reason"], *event.get("also", [])]
        assert untouched(app)


@pytest.mark.parametrize("tcp", [False, True])
def test_d4_a_constrained_issuer_cannot_leave_its_trust_domain(attacker: Attacker, ca: Ca, tcp: bool) -> None:
    """D4: an issuer held to DNS names below good.example, under which name constraints let any URI pass, cannot vouch
    for a SPIFFE ID of another trust domain; nor for a DNS name, or a common name like one, elsewhere."""
    held = ca.sub(extra=[(x509.NameConstraints([x509.DNSName("good.example")], None), True)])
    cases = {
        "verify.trust_domain": held.client("spiffe://other/admin"),
        "verify.name_constraint": held.leaf("evil.example"),
    }
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address, trust_domain="test") as guard:
        for reason, leaf in cases.items():
            assert attacker.call(guard, leaf).status in (0, 403)
            event = guard.events.next("connection")
            assert reason in [event["reason"], *event.get("also", [])]
        assert untouched(app)


def test_d5_two_authorities_of_two_sites_are_two(attacker: Attacker, ca: Ca) -> None:
    """D5: CN=admin of authority B is nobody on the site of A, though both are believed on one address, and though B
    bears A's own name."""
    namesake = Ca.root("Test Root")
    policy = parse_policy(["cn:admin"])
    with App() as a, App() as b, Running(ca, a.address) as guard:
        serve_sites(guard, Vhost(a, ("a.test",), policy=policy), Vhost(b, ("b.test",), ca=namesake, policy=policy))
        theirs, ours = namesake.client(cn="admin"), ca.client(cn="admin")
        assert attacker.call(guard, theirs, get(host="a.test"), "a.test").refusal == (403, "verify.bad_signature")
        assert untouched(a)
        assert attacker.call(guard, theirs, get(host="b.test"), "b.test").status == 200
        assert attacker.call(guard, ours, get(host="a.test"), "a.test").status == 200


@pytest.mark.parametrize("tcp", [False, True])
def test_d5_two_authorities_of_one_site_are_two(attacker: Attacker, ca: Ca, tcp: bool) -> None:
    """D5: on a site that believes both, CN=admin of authority B is not the admin of A, though B bears A's own name."""
    namesake = Ca.root("Test Root")
    bundle = TrustBundle((ca.certificate, namesake.certificate), names=("a", "b"))
    policy = parse_policy(["cn:admin by a"], authorities=bundle.names)
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        serve_sites(guard, Vhost(app, policy=policy, nameless=True, terms={"bundle": bundle}))
        assert attacker.call(guard, namesake.client(cn="admin")).status == (0 if tcp else 403)
        event = guard.events.next("connection" if tcp else "request")
        assert event["reason"] == "policy.no_rule"
        assert untouched(app)
        assert attacker.call(guard, ca.client(cn="admin")).status == 200


@pytest.mark.parametrize(
    ("subject", "rule"),
    [
        ("x,OU=admins", "cn:x"),
        ("x/OU=admins", "cn:x"),
        ("x+OU=admins", "cn:x"),
        ("/CN=admin", "cn:admin"),
        ("x,CN=admin", "cn:admin"),
        ("admin ", "cn:admin"),
        (" admin", "cn:admin"),
        ("ADMIN", "cn:admin"),
        ("аdmin", "cn:admin"),  # a Cyrillic а
        ("admin*", "cn:admin"),
        ("*", "cn:admin"),
    ],
)
def test_d6_a_common_name_is_one_value(attacker: Attacker, ca: Ca, subject: str, rule: str) -> None:
    """D6: a common name is compared as the value that it is, never as a part of a DN's text."""
    with App() as app, Running(ca, app.address, parse_policy([rule])) as guard:
        assert attacker.call(guard, ca.client(cn=subject)).status == 403
        assert untouched(app)


def test_d6_of_several_common_names_none_is_hidden(attacker: Attacker, ca: Ca) -> None:
    """D6: with two common names, a rule that denies one of them holds, whichever stands first."""
    key = ec.generate_private_key(ec.SECP256R1())
    with App() as app, Running(ca, app.address, parse_policy(["deny cn:banned", "any"])) as guard:
        for order in (("banned", "good"), ("good", "banned")):
            subject = x509.Name([x509.NameAttribute(CN, name) for name in order])
            plain = ca.client(key=key)
            builder = (
                x509.CertificateBuilder()
                .subject_name(subject)
                .issuer_name(ca.certificate.subject)
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(_now() - DAY)
                .not_valid_after(_now() + DAY)
            )
            for extension in plain.certificate.extensions:
                builder = builder.add_extension(extension.value, extension.critical)
            leaf = Leaf(builder.sign(ca.key, plain.certificate.signature_hash_algorithm), key)  # type: ignore[arg-type]
            assert attacker.call(guard, leaf).status == 403
        assert untouched(app)


def _list(
    ca: Ca, serials: list[int], number: int = 1, due: timedelta = DAY, reason: str | None = None
) -> x509.CertificateRevocationList:
    issuer = Issuer(ca.certificate, ca.key, ())
    return build_crl(issuer, [(serial, _now() - DAY, reason) for serial in serials], number, _now() - DAY, _now() + due)


LISTS: dict[str, tuple[Callable[[Ca, Leaf], list[x509.CertificateRevocationList]], str]] = {
    "revoked": (lambda ca, leaf: [_list(ca, [leaf.certificate.serial_number])], "verify.revoked"),
    "on_hold": (
        lambda ca, leaf: [_list(ca, [leaf.certificate.serial_number], reason="certificateHold")],
        "verify.revoked",
    ),
    "namesake": (lambda ca, leaf: [_list(Ca.root("Test Root"), [])], "verify.crl_"),
    "other": (lambda ca, leaf: [_list(Ca.root("Other"), [])], "verify.crl_missing"),
    "stale": (lambda ca, leaf: [_list(ca, [], due=-timedelta(hours=1))], "verify.crl_stale"),
    "older_beside_newer": (
        lambda ca, leaf: [_list(ca, [], 1), _list(ca, [leaf.certificate.serial_number], 2)],
        "verify.revoked",
    ),
}


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("case", LISTS)
def test_d7_lists_that_do_not_clear_refuse(attacker: Attacker, ca: Ca, case: str, tcp: bool) -> None:
    """D7: a list that is missing, stale, forged, or says so, refuses with its own reason, and not as an unknown
    authority."""
    lists, reason = LISTS[case]
    leaf = ca.client()
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        guard.swap(guard.snapshot(crls=check_crls(lists(ca, leaf), [ca.certificate])))
        assert attacker.call(guard, leaf).status in (0, 403)
        assert guard.events.next("connection")["reason"].startswith(reason)
        assert untouched(app)
        guard.swap(guard.snapshot(crls=check_crls([_list(ca, [])], [ca.certificate])))
        with attacker.open(guard, leaf) as tls:
            tls.sendall(KEPT)
            assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_d7_an_intermediate_needs_its_own_list(attacker: Attacker, ca: Ca) -> None:
    """D7: with lists in use, a chain whose intermediate has none is refused; with both lists it is let in."""
    sub = ca.sub()
    with App() as app, Running(ca, app.address) as guard:
        guard.swap(guard.snapshot(crls=check_crls([_list(ca, [])], [ca.certificate])))
        assert attacker.call(guard, sub.client()).refusal == (403, "verify.crl_missing")
        assert untouched(app)
        lists = [_list(ca, []), _list(sub, [])]
        guard.swap(guard.snapshot(crls=check_crls(lists, [ca.certificate, sub.certificate])))
        assert attacker.call(guard, sub.client()).status == 200


def test_d7_a_forged_list_is_no_cover_for_an_older_one(attacker: Attacker, ca: Ca, tmp_path: Path) -> None:
    """D7: beside a newer list that nobody signed an older one that was signed is refused all the same, and who was
    revoked stays so; nor does the forged one keep the next true one out.
    """
    leaf = ca.client()
    ca.server().save(tmp_path, "server")
    ca.save(tmp_path, "clients")
    crl, forger = tmp_path / "clients.crl", Ca.root(_cn(ca))
    forged = _list(forger, [], 1_000_000).public_bytes(Encoding.PEM)
    crl.write_bytes(_list(ca, [leaf.certificate.serial_number], 2).public_bytes(Encoding.PEM))
    with App() as app:
        config = f'{LISTENER}to = "{app.address}"\ncrl = ["clients.crl"]\n'
        with command(tmp_path, config) as guard:
            crl.write_bytes(_list(ca, [], 1).public_bytes(Encoding.PEM) + forged)
            guard.reload()
            assert attacker.call(guard.address, leaf).refusal == (403, "verify.revoked")
            crl.write_bytes(forged)
            guard.reload()
            assert attacker.call(guard.address, ca.client()).refusal == (403, "verify.crl_invalid")
            assert untouched(app)
            crl.write_bytes(_list(ca, [], 3).public_bytes(Encoding.PEM))
            guard.reload()
            assert attacker.call(guard.address, leaf).status == 200


def _cn(ca: Ca) -> str:
    return str(ca.certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)


@pytest.mark.parametrize("detour", [False, True])
def test_d7_an_older_list_does_not_take_the_place_of_a_newer(
    attacker: Attacker, ca: Ca, tmp_path: Path, detour: bool
) -> None:
    """D7: when the file of a list is replaced by an older one that is still in its time, who was revoked stays so; also
    when another authority's list stood there for a while.
    """
    leaf = ca.client()
    ca.server().save(tmp_path, "server")
    ca.save(tmp_path, "clients")
    crl = tmp_path / "clients.crl"
    crl.write_bytes(_list(ca, [leaf.certificate.serial_number], 2).public_bytes(Encoding.PEM))
    with App() as app:
        config = f'{LISTENER}to = "{app.address}"\ncrl = ["clients.crl"]\n'
        with command(tmp_path, config) as guard:
            assert attacker.call(guard.address, leaf).refusal == (403, "verify.revoked")
            if detour:
                crl.write_bytes(_list(Ca.root("Other"), [], 1).public_bytes(Encoding.PEM))
                guard.reload()
                assert attacker.call(guard.address, ca.client()).refusal == (403, "verify.crl_missing")
            crl.write_bytes(_list(ca, [], 1).public_bytes(Encoding.PEM))
            guard.reload()
            assert attacker.call(guard.address, leaf).refusal[1] == (
                "verify.crl_missing" if detour else "verify.revoked"
            )
            crl.write_bytes(_list(ca, [], 3).public_bytes(Encoding.PEM))
            guard.reload()
            assert untouched(app)
            assert attacker.call(guard.address, leaf).status == 200


def _crossed(ca: Ca) -> Leaf:
    """Two authorities that vouch for each other, and a leaf below one of them."""
    one, two = Ca.root("One"), Ca.root("Two")
    by_two = make(Spec(cn="One", eku=None, ca=True, key=one.key, not_after=_now() + 9 * DAY), two)
    by_one = make(Spec(cn="Two", eku=None, ca=True, key=two.key, not_after=_now() + 9 * DAY), one)
    leaf = one.client()
    return Leaf(leaf.certificate, leaf.key, (by_two.certificate, by_one.certificate))


PATHS: dict[str, tuple[Callable[[Ca], Leaf], bool]] = {
    "loop": (_crossed, False),
    "junk_before": (lambda ca: _with(ca.sub().client(), before=[Ca.root("Junk").certificate] * 3), True),
    "junk_after": (lambda ca: _with(ca.sub().client(), after=[ca.client().certificate] * 3), True),
    "doubled": (lambda ca: _with(ca.client(), after=[ca.certificate, ca.certificate]), True),
    "nine_deep": (lambda ca: _deep(ca, 8).client(), True),
    "twelve_deep": (lambda ca: _deep(ca, 12).client(), False),
    "hundred": (lambda ca: _with(ca.client(), after=[ca.certificate] * 99), False),
    "stranger_with_our_root": (lambda ca: _with(Ca.root("Other").client(), after=[ca.certificate]), False),
    "missing_intermediate": (lambda ca: _with(ca.sub().client(), drop=True), False),
}


def _with(leaf: Leaf, before: list[Any] | None = None, after: list[Any] | None = None, *, drop: bool = False) -> Leaf:
    chain = () if drop else leaf.chain
    return Leaf(leaf.certificate, leaf.key, (*(before or []), *chain, *(after or [])))


def _deep(ca: Ca, levels: int) -> Ca:
    for level in range(levels):
        ca = ca.sub(f"Level {level}")
    return ca


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("case", PATHS)
def test_d9_a_path_is_found_or_it_is_not(attacker: Attacker, ca: Ca, case: str, tcp: bool) -> None:
    """D9: authorities that vouch for each other, chains that are too long, or a path that does not end in an anchor are
    refused; certificates that are merely shown along change nothing."""
    maker, good = PATHS[case]
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        try:
            tls = attacker.open(guard, maker(ca))
        except (ssl.SSLError, ConnectionError):
            tls = None  # refused within the handshake
        if tls is not None:
            with tls:
                try:
                    tls.sendall(KEPT)
                    answer = tls.recv(1 << 16)
                except (ssl.SSLError, ConnectionError):
                    answer = b""
                assert answer.startswith(b"HTTP/1.1 200 ") is good, answer
        assert untouched(app) is not good
        assert guard.events.next("connection")["decision"] == (
            "accept" if good and not tcp else "allow" if good else "deny"
        )


def test_d9_an_intermediate_may_be_an_anchor_and_its_issuer_is_then_none(attacker: Attacker, ca: Ca) -> None:
    """D9: where only an intermediate is believed, its own clients are let in, and those of its sibling and of the root
    above it are not."""
    held, sibling = ca.sub("Held"), ca.sub("Sibling")
    with App() as app, Running(ca, app.address) as guard:
        guard.swap(guard.snapshot(bundle=TrustBundle((held.certificate,))))
        for leaf in (sibling.client(), ca.client()):
            assert attacker.call(guard, leaf).refusal[1] == "verify.unknown_issuer"
        assert untouched(app)
        assert attacker.call(guard, held.client()).status == 200


COSTLY: dict[str, Callable[[Ca], Leaf]] = {
    "many_names": lambda ca: ca.leaf(*(f"h{at}.example" for at in range(2000)), "spiffe://other/x"),
    "long_name": lambda ca: Ca.root("Other").client("spiffe://test/" + "a" * 40_000),
    "many_extensions": lambda ca: ca.client(
        extra=[(x509.UnrecognizedExtension(ObjectIdentifier(f"1.2.3.{at}"), b"\5\0"), True) for at in range(300)]
    ),
}


@pytest.mark.parametrize("case", COSTLY)
def test_d10_a_costly_certificate_costs_little(attacker: Attacker, ca: Ca, case: str) -> None:
    """D10: huge names, thousands of them, or hundreds of extensions do not hold up the next client for half a second,
    and are not echoed into the log at length."""
    with App() as app, Running(ca, app.address) as guard:
        leaf = COSTLY[case](ca)
        context = attacker.context(leaf)
        attacker.call(guard, context=context)
        good = attacker.context(ca.client())
        with Stopwatch() as watch:
            assert attacker.call(guard, context=good).status == 200
        assert watch.seconds < 1
        assert guard.events.next("request")["status"] == 200
        assert max(len(json.dumps(event)) for event in guard.events.all) < 4096


REFUSALS = """
import sys
from datetime import UTC, datetime
from OpenSSL import SSL
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.credential import Credential
from handfast.tls.server import Refused, ServerContext, ServerSettings
from tests.support.certs import Ca

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4  # KiB

root, other, count = Ca.root(), Ca.root("Other"), int(sys.argv[1])
server = root.server()
terms = Terms(TrustBundle((root.certificate,)), Purpose.CLIENT)
contexts = [
    ServerContext(Credential(server.key, server.presented), terms, ServerSettings(answer_refusals=answers))
    for answers in (True, False)
]
clients = []
for leaf in (None, None, None, other.client(), root.client(eku=None)):
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_verify(SSL.VERIFY_NONE)
    SSL._lib.SSL_CTX_set1_curves_list(context._context, b"X25519")
    if leaf is not None:
        context.use_certificate(leaf.certificate)
        context.use_privatekey(leaf.key)
    clients.append(context)

def refused(server, context):
    here, there, outcome = server.accept(lambda: datetime.now(UTC)), SSL.Connection(context, None), None
    there.set_connect_state()
    while outcome is None:
        try:
            there.do_handshake()
        except SSL.WantReadError:
            pass
        outcome = here.feed(there.bio_read(1 << 16))
        if records := here.take():
            there.bio_write(records)
    return isinstance(outcome, Refused)

seen = []
for turn in range(count):
    assert refused(contexts[turn % 2], clients[turn % len(clients)])
    if turn % (count // 10) == count // 10 - 1:
        seen.append(resident())
print(*seen)
"""


@pytest.mark.timeout(900)
def test_d10_refused_handshakes_leave_nothing_behind(tmp_path: Path) -> None:
    """D10: 4,000 refused handshakes (100,000 with HANDFAST_REFUSALS=100000), without a certificate, by a stranger and
    by a useless certificate, in both modes, leave memory as it was after the first tenth of them, but for 2 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS, str(FULL)], capture_output=True, text=True, check=True, timeout=890
    )
    resident = list(map(int, done.stdout.split()))
    assert len(resident) == 10
    assert max(resident[1:]) - resident[0] < 2048, resident


@pytest.mark.timeout(900)
def test_d10_refused_connections_leave_nothing_behind(attacker: Attacker, ca: Ca, tmp_path: Path) -> None:
    """D10: connections that `handfast guard` refuses, in words or by an alert, leave memory as it was."""
    ca.server().save(tmp_path, "server")
    ca.save(tmp_path, "clients")
    count = FULL // 50
    with App() as app:
        with command(tmp_path, f'{LISTENER}to = "{app.address}"\n') as guard:

            def resident() -> int:
                text = Path(f"/proc/{guard.child._process.pid}/statm").read_text()
                return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

            contexts = [attacker.context(), attacker.context(Ca.root("Other").client()), attacker.context(tls12=True)]
            seen = []
            for turn in range(count):
                heard = attacker.call(guard.address, context=contexts[turn % 3])
                assert heard.status in (0, 403)
                if turn % (count // 4) == count // 4 - 1:
                    seen.append(resident())
            assert max(seen[1:]) - seen[0] < 2048, seen
        assert untouched(app)


def _weak_rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 1024)


def _signed_by_openssl(ca: Ca, folder: Path) -> Leaf:
    """A client with SHA-1 under it, as `cryptography` will not make it."""
    cert, key = Leaf(ca.certificate, ca.key).save(folder, "authority")
    (folder / "extensions").write_text("extendedKeyUsage=clientAuth\nsubjectAltName=URI:spiffe://test/web\n")
    for line in (
        f"req -new -newkey rsa:2048 -nodes -keyout {folder}/k -subj / -out {folder}/csr",
        f"x509 -req -sha1 -in {folder}/csr -CA {cert} -CAkey {key} -set_serial 7 "
        f"-extfile {folder}/extensions -out {folder}/c",
    ):
        subprocess.run(["openssl", *line.split()], check=True, capture_output=True)
    made = x509.load_pem_x509_certificate((folder / "c").read_bytes())
    return Leaf(made, load_pem_private_key((folder / "k").read_bytes(), None))


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("case", ["sha1", "rsa_1024"])
def test_d11_weak_keys_and_hashes_are_refused(ca: Ca, tmp_path: Path, case: str, tcp: bool) -> None:
    """D11: a client with SHA-1 under its certificate or RSA of 1,024 bits is refused by the guard, though its own TLS
    (tlslite-ng) has no qualms. A curve that is not NIST's has no signature scheme in TLS 1.3 (tests/pki has it)."""
    make_it = {"sha1": lambda: _signed_by_openssl(ca, tmp_path), "rsa_1024": lambda: ca.client(key=_weak_rsa())}
    leaf = make_it[case]()
    with App() as app, Running(ca, f"tcp://{app.address}" if tcp else app.address) as guard:
        answer = b""
        try:
            with tlslite(guard, leaf) as tls:
                tls.write(KEPT)
                answer = bytes(tls.read(min=1))
        except (TLSError, ConnectionError, ValueError):
            pass
        assert not answer.startswith(b"HTTP/1.1 200 ")
        event = guard.events.next("connection")
        assert event["decision"] == "deny"
        weakness = "verify.weak_hash" if case == "sha1" else "verify.weak_key"
        assert weakness in [event["reason"], *event.get("also", [])]
        assert untouched(app)


@pytest.mark.parametrize("version", [(3, 1), (3, 2)])
def test_d11_nothing_below_tls_12(ca: Ca, version: tuple[int, int]) -> None:
    """D11: TLS 1.0 and 1.1 are refused, also where 1.2 is allowed."""
    with App() as app, Running(ca, app.address, tls12=True) as guard:
        with pytest.raises((TLSError, ConnectionError)), tlslite(guard, ca.client(), versions=(version, version)):
            pass
        assert guard.events.next("connection")["reason"] == "tls.version"
        assert untouched(app)
