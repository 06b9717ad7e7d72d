"""Certificates and handshakes for test suites: an authority in memory, good leaves, and every kind of bad one.

    from handfast.testing import Flaw, TestAuthority, shake_hands

    authority = TestAuthority.root()
    cert, key = authority.server("localhost").save(tmp_path, "server")   # PEM files for the server under test
    good = authority.client("spiffe://test/web")
    bad = authority.flawed(Flaw.EXPIRED, "spiffe://test/web")            # must be refused
    outcome = shake_hands(authority, bad)                                # as a guard would judge it; no network

Nothing made here is fit for anything but tests: keys are unprotected, and what is asked for is made, sound or not.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from handfast.files import generate_key, write_private, write_public
from handfast.pki import der
from handfast.pki.keys import KeyType, PrivateKey
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.credential import Credential
from handfast.tls.probe import Offer, Probe, ProbeRefused
from handfast.tls.server import Accepted, Refused, ServerContext, ServerSettings

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
WeakHash = Literal["md5", "sha1"]

_DAY = timedelta(days=1)
_BACKDATE = timedelta(minutes=5)  # clocks of two machines differ
_UNKNOWN_OID = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")  # nobody's: no verifier can know it
# AlgorithmIdentifier of the hashes that `cryptography` does not sign with any more (RFC 3279 2.2.1, 2.2.3).
_WEAK_ALGORITHMS = {
    ("rsa", "md5"): bytes.fromhex("300d06092a864886f70d0101040500"),
    ("rsa", "sha1"): bytes.fromhex("300d06092a864886f70d0101050500"),
    ("ec", "sha1"): bytes.fromhex("300906072a8648ce3d0401"),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """What to put into a certificate; the defaults make a good client's.

    `names` are written as people write them: a host, an address, an email, a URI. `san` is the DER of the whole
    alternative-name extension and takes their place. `validity` is (not before, not after), seen from now.
    `public_key` is certified in the place of the key's own: nobody then holds the key to the certificate.
    """

    names: tuple[str, ...] = ()
    subject: str | x509.Name | None = None
    eku: tuple[x509.ObjectIdentifier, ...] | None = (CLIENT,)
    ca: bool | None = None  # None: no basicConstraints
    path_length: int | None = None
    validity: tuple[timedelta, timedelta] = (-_BACKDATE, _DAY)
    key_usage: bool = True
    key: PrivateKey | None = None
    public_key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | None = None
    weak_hash: WeakHash | None = None
    san: bytes | None = None
    extensions: tuple[tuple[x509.ExtensionType, bool], ...] = ()
    permitted: tuple[str, ...] = ()  # name constraints, for an authority
    excluded: tuple[str, ...] = ()
    serial: int | None = None
    key_ids: bool = True  # subject and authority key identifiers


@dataclass(frozen=True, slots=True)
class TestLeaf:
    """A key and what is presented with it: DER certificates, leaf first. They are bytes, for some do not parse."""

    __test__: ClassVar[bool] = False  # pytest shall not take it for a class of tests
    key: PrivateKey
    presented: tuple[bytes, ...]

    @property
    def certificate(self) -> x509.Certificate:
        """The leaf. ValueError where it is of a kind that no library reads."""
        return x509.load_der_x509_certificate(self.presented[0])

    @property
    def pem(self) -> bytes:
        """The chain as PEM, leaf first."""
        return b"".join(_pem(one) for one in self.presented)

    @property
    def key_pem(self) -> bytes:
        """The private key as unencrypted PKCS#8 PEM."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def credential(self) -> Credential:
        """The same for handfast's own TLS. ValueError as `certificate`."""
        return Credential(self.key, tuple(x509.load_der_x509_certificate(one) for one in self.presented))

    def save(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write NAME.crt (the chain, PEM) and NAME.key (PEM, mode 0600); return both paths. Raises StoreError."""
        cert, key = folder / f"{name}.crt", folder / f"{name}.key"
        write_public(cert, self.pem)
        write_private(key, self.key_pem)
        return cert, key

    def with_key(self, key: PrivateKey) -> TestLeaf:
        """The same certificates beside a key that is not theirs: what a thief of a certificate has."""
        return replace(self, key=key)


@dataclass(frozen=True, slots=True)
class TestAuthority:
    """An authority in memory: a new one from `root`, or one whose certificate and key are at hand.

    `above` is what its leaves present behind themselves, DER, its own certificate first; a root presents nothing.
    """

    __test__: ClassVar[bool] = False
    certificate: x509.Certificate
    key: PrivateKey
    above: tuple[bytes, ...] = ()

    @classmethod
    def root(cls, name: str | x509.Name = "Test Root", **spec: Any) -> TestAuthority:
        """A new root. `spec`: fields of Spec."""
        made = make(_authority(name, spec), None)
        return cls(made.certificate, made.key)

    def sub(self, name: str | x509.Name = "Test Issuer", **spec: Any) -> TestAuthority:
        """An authority below this one. `spec`: fields of Spec, as path_length=0 or permitted=("example.com",)."""
        made = make(_authority(name, spec), self)
        return TestAuthority(made.certificate, made.key, made.presented)

    def twin(self) -> TestAuthority:
        """An authority that says it is this one and has another key: what an impostor makes."""
        return TestAuthority.root(self.certificate.subject)

    def client(self, *names: str, **spec: Any) -> TestLeaf:
        """A client's leaf; spiffe://test/web unless names are given. `spec`: fields of Spec."""
        return make(Spec(**({"names": names or ("spiffe://test/web",)} | spec)), self)

    def server(self, *names: str, **spec: Any) -> TestLeaf:
        """A server's leaf; for localhost and 127.0.0.1 unless names are given. `spec`: fields of Spec."""
        return make(Spec(**({"names": names or ("localhost", "127.0.0.1"), "eku": (SERVER,)} | spec)), self)

    def flawed(self, flaw: Flaw, *names: str) -> TestLeaf:
        """A client's leaf that a careful server refuses, for this one reason and no other."""
        return _FLAWS[flaw](self, names or ("spiffe://test/web",))

    @property
    def pem(self) -> bytes:
        """Its certificate, PEM: the trust bundle of whoever believes in it."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def bundle(self) -> TrustBundle:
        """The trust bundle with this authority alone."""
        return TrustBundle((self.certificate,))

    def save(self, folder: Path, name: str = "ca") -> Path:
        """Write NAME.crt (PEM) and return its path. The key stays in memory. Raises StoreError."""
        path = folder / f"{name}.crt"
        write_public(path, self.pem)
        return path


class Flaw(StrEnum):
    """What can be wrong with a client's certificate; `TestAuthority.flawed` makes it."""

    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    SERVER_ONLY = "server-only"  # extendedKeyUsage without clientAuth
    NO_EKU = "no-eku"
    NO_NAME = "no-name"  # a common name alone
    CA_AS_LEAF = "ca-as-leaf"
    LEAF_AS_ISSUER = "leaf-as-issuer"
    SELF_SIGNED = "self-signed"
    OTHER_AUTHORITY = "other-authority"  # an impostor with the authority's name
    TAMPERED = "tampered"  # the signature was made over other bytes
    WRONG_KEY = "wrong-key"  # a good certificate beside a key that is not its own
    WEAK_KEY = "weak-key"  # RSA of 1024 bits
    WEAK_CURVE = "weak-curve"  # P-192
    SHA1 = "sha1"
    MD5 = "md5"  # from an RSA issuer: presented with that issuer behind it
    HUGE_KEY = "huge-key"  # RSA of 16384 bits; nobody holds its key
    HUGE_ISSUER_KEY = "huge-issuer-key"  # an issuer with such a key, and a signature of its length that nobody made
    NUL_IN_NAME = "nul-in-name"  # CVE-2009-2408
    CONTROL_IN_NAME = "control-in-name"
    NUL_IN_SUBJECT = "nul-in-subject"
    NUL_BEHIND_NAME = "nul-behind-name"  # the first name, a NUL, and more: who stops at the NUL takes it for good
    TWO_URIS = "two-uris"
    URI_AS_DNS = "uri-as-dns"  # a URI spelled in a dNSName
    URI_AS_OTHER_NAME = "uri-as-other-name"
    HUGE_NAMES = "huge-names"  # 1,000 names, 60 kB: sound, and a load; a server may take it
    LONG_NAME = "long-name"  # one of 20 kB
    CRITICAL_EXTENSION = "critical-extension"
    TWICE = "duplicate-extension"  # extendedKeyUsage twice, and the two differ
    PATH_LENGTH = "path-length"
    NAME_CONSTRAINT = "name-constraint"
    NOT_A_CA = "issuer-not-ca"  # an issuer with basicConstraints cA:false
    LONG_CHAIN = "long-chain"  # 100 issuers


class NameKind(Enum):
    """A kind of alternative name (RFC 5280 4.2.1.6) that can hold any text."""

    EMAIL = "email"
    DNS = "DNS name"
    URI = "URI"
    OTHER = "other name"

    @property
    def tag(self) -> int:
        """Its tag in GeneralName."""
        return {NameKind.EMAIL: _EMAIL, NameKind.DNS: _DNS, NameKind.URI: _URI, NameKind.OTHER: _OTHER_NAME}[self]


def make(spec: Spec, issuer: TestAuthority | None) -> TestLeaf:
    """Make what the spec says, sound or not; self-signed without an issuer."""
    key = spec.key or generate_key(KeyType.P256)
    subject = spec.subject if isinstance(spec.subject, x509.Name) else _name(spec.subject)
    signer = issuer.key if issuer else key
    now = datetime.now(UTC).replace(microsecond=0)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(spec.public_key or key.public_key())
        .serial_number(spec.serial or x509.random_serial_number())
        .not_valid_before(now + spec.validity[0])
        .not_valid_after(now + spec.validity[1])
    )
    for extension, critical in _extensions(spec, key, signer):
        builder = builder.add_extension(extension, critical)
    ed25519_key = isinstance(signer, ed25519.Ed25519PrivateKey)
    made = builder.sign(signer, None if ed25519_key else hashes.SHA256()).public_bytes(Encoding.DER)
    if spec.weak_hash is not None:
        made = resign(made, signer, spec.weak_hash)
    return TestLeaf(key, (made, *(issuer.above if issuer else ())))


def resign(certificate: bytes, key: PrivateKey, weak_hash: WeakHash) -> bytes:
    """Return the certificate (DER) signed anew over a hash that nobody should take any more. RSA, or EC with SHA-1."""
    kind = "rsa" if isinstance(key, rsa.RSAPrivateKey) else "ec"
    algorithm = _WEAK_ALGORITHMS[kind, weak_hash]
    old, _, _ = der.read_all(der.read_one(certificate)[1])
    fields = [_tlv(tag, contents) for tag, contents in der.read_all(old[1])]
    fields[2] = algorithm  # version, serial number, signature, ...
    signed = _tlv(der.SEQUENCE, *fields)
    digest = hashlib.new(weak_hash, signed, usedforsecurity=False).digest()
    hashed = Prehashed(hashes.MD5() if weak_hash == "md5" else hashes.SHA1())  # noqa: S303  # what it is for
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(digest, padding.PKCS1v15(), hashed)
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        signature = key.sign(digest, ec.ECDSA(hashed))
    else:
        raise ValueError("an Ed25519 key signs with no other hash than its own")
    return _tlv(der.SEQUENCE, signed, algorithm, _tlv(_BIT_STRING, b"\0" + signature))


def tampered(leaf: TestLeaf, key: PrivateKey | None = None) -> TestLeaf:
    """The leaf with `key`'s public half in the place of its own, under the old signature: a forgery.

    Whoever checks that the peer holds the key and not the issuer's signature lets it in.
    """
    key = key or generate_key(KeyType.P256)
    old, algorithm, signature = der.read_all(der.read_one(leaf.presented[0])[1])
    fields = [_tlv(tag, contents) for tag, contents in der.read_all(old[1])]
    fields[6] = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    forged = _tlv(der.SEQUENCE, _tlv(der.SEQUENCE, *fields), _tlv(*algorithm), _tlv(*signature))
    return TestLeaf(key, (forged, *leaf.presented[1:]))


def general_name(text: str) -> x509.GeneralName:
    """A name as people write it: an address, a URI, an email, or a host."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if "://" in text or text.startswith("urn:"):
        return x509.UniformResourceIdentifier(text)
    return x509.RFC822Name(text) if "@" in text else x509.DNSName(text)


def shake_hands(
    authority: TestAuthority, client: TestLeaf | None, server: TestLeaf | None = None, *, at: datetime | None = None
) -> Accepted | Refused:
    """Shake hands in memory with a server that trusts `authority`, and return what it makes of the client.

    The server judges as a guard does, with the clock at `at`. Raises ProbeRefused where the server's certificate
    or the client's is not even taken by the engine.
    """
    terms = Terms(authority.bundle, Purpose.CLIENT)
    context = ServerContext((server or authority.server()).credential, terms, ServerSettings())
    ours = Probe(Offer("localhost", None if client is None else client.presented, client.key if client else None))
    theirs = context.accept(lambda: at or datetime.now(UTC))
    for _ in range(10):  # TLS 1.3 needs three turns, with HelloRetryRequest four
        ours.feed(theirs.take())
        if outcome := theirs.feed(ours.take()):
            return outcome
    raise ProbeRefused("the handshake does not end")


_Flawed = Callable[[TestAuthority, tuple[str, ...]], TestLeaf]


def _spec(**fields: Any) -> _Flawed:
    return lambda authority, names: make(Spec(**({"names": names} | fields)), authority)


def _leaf_as_issuer(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    return below(authority.client("spiffe://test/insider"), Spec(names=names))


def below(leaf: TestLeaf, spec: Spec) -> TestLeaf:
    """What a leaf's holder makes who plays the authority: a certificate signed with the leaf's key."""
    return make(spec, TestAuthority(leaf.certificate, leaf.key, leaf.presented))


def names_as(kind: NameKind, text: str) -> bytes:
    """The DER of an alternative-name extension with one entry of this kind, whatever the text is."""
    if kind is NameKind.OTHER:
        return _san((_OTHER_NAME, _OTHER_OID + _tlv(0xA0, _tlv(0x0C, text.encode()))))
    return _san((kind.tag, text.encode()))


def _raw(text: str) -> tuple[int, bytes]:
    """A text as the name that it looks like, whatever bytes are in it."""
    return (_URI if "://" in text or text.startswith("urn:") else _EMAIL if "@" in text else _DNS), text.encode()


def _san(*names: tuple[int, bytes]) -> bytes:
    return _tlv(der.SEQUENCE, *(_tlv(tag, text) for tag, text in names))


def _weak_curve(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    return make(Spec(names=names, key=ec.generate_private_key(ec.SECP192R1())), authority)


def _weak_key(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    return make(Spec(names=names, key=rsa.generate_private_key(65537, 1024)), authority)  # noqa: S505  # the flaw


def _huge() -> rsa.RSAPublicKey:
    # Any odd number is a modulus to whoever verifies; to make a true one takes minutes.
    modulus = (1 << 16383) | int.from_bytes(hashlib.shake_256(b"modulus").digest(2047), "big") | 1
    return rsa.RSAPublicNumbers(65537, modulus).public_key()


def _huge_key(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    return make(Spec(names=names, public_key=_huge()), authority)


def _huge_issuer_key(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    issuer = authority.sub("Huge Issuer", public_key=_huge())
    rsa_key = generate_key(KeyType.RSA2048)  # for the algorithm's name; its signature is replaced
    named = TestAuthority(issuer.certificate, rsa_key, issuer.above)
    leaf = make(Spec(names=names, key_ids=False), named)
    signed, algorithm, _ = der.read_all(der.read_one(leaf.presented[0])[1])
    forged = _tlv(der.SEQUENCE, _tlv(*signed), _tlv(*algorithm), _tlv(_BIT_STRING, b"\0" + b"\x55" * 2048))
    return TestLeaf(leaf.key, (forged, *leaf.presented[1:]))


def _weak_hash(name: WeakHash) -> _Flawed:
    def flawed(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
        key = authority.key
        if isinstance(key, rsa.RSAPrivateKey) or (name == "sha1" and isinstance(key, ec.EllipticCurvePrivateKey)):
            return make(Spec(names=names, weak_hash=name), authority)
        signs = authority.sub("RSA Issuer", key=generate_key(KeyType.RSA2048))
        return make(Spec(names=names, weak_hash=name), signs)

    return flawed


def _duplicate(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    good = make(Spec(names=names), authority)
    wrong = make(Spec(names=names, eku=(SERVER,)), authority)
    return TestLeaf(good.key, (_spliced(good.presented[0], wrong.presented[0], authority.key), *good.presented[1:]))


def _spliced(certificate: bytes, other: bytes, key: PrivateKey) -> bytes:
    """The certificate with all extensions of the other behind its own that the two have in common."""
    parts = [list(der.read_all(der.read_one(one)[1])) for one in (certificate, other)]
    fields, others = ([_tlv(*field) for field in der.read_all(part[0][1])] for part in parts)
    extended = der.read_one(der.read_one(fields[-1])[1])[1]
    usages = [
        _tlv(*one)
        for one in der.read_all(der.read_one(der.read_one(others[-1])[1])[1])
        if bytes.fromhex("0603551d25") in one[1]  # id-ce-extKeyUsage
    ]
    fields[-1] = _tlv(0xA3, _tlv(der.SEQUENCE, extended, *usages))
    signed = _tlv(der.SEQUENCE, *fields)
    return _tlv(der.SEQUENCE, signed, _tlv(*parts[0][1]), _tlv(_BIT_STRING, b"\0" + _signature(key, signed)))


def _signature(key: PrivateKey, signed: bytes) -> bytes:
    match key:
        case rsa.RSAPrivateKey():
            return key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        case ec.EllipticCurvePrivateKey():
            return key.sign(signed, ec.ECDSA(hashes.SHA256()))
        case ed25519.Ed25519PrivateKey():
            return key.sign(signed)


def _path_length(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    return authority.sub("Short Issuer", path_length=0).sub("Issuer Too Many").client(*names)


def _name_constraint(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    nowhere = ("nowhere.invalid", "uri:nowhere.invalid", "email:nowhere.invalid")
    return authority.sub("Constrained Issuer", permitted=nowhere).client(*names)


def _not_a_ca(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    return authority.sub("No Issuer", ca=False).client(*names)


def _long_chain(authority: TestAuthority, names: tuple[str, ...]) -> TestLeaf:
    key = generate_key(KeyType.P256)  # one for all: only the length is meant
    for number in range(100):
        authority = authority.sub(f"Issuer {number}", key=key)
    return authority.client(*names)


def _authority(name: str | x509.Name, fields: dict[str, Any]) -> Spec:
    usual = {"subject": name, "eku": None, "ca": True, "validity": (-_BACKDATE, 365 * _DAY)}
    return Spec(**(usual | fields))


def _extensions(spec: Spec, key: PrivateKey, signer: PrivateKey) -> Iterator[tuple[x509.ExtensionType, bool]]:
    public = spec.public_key or key.public_key()
    if spec.key_ids:
        yield x509.SubjectKeyIdentifier.from_public_key(public), False
        yield x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False
    if spec.san is not None:
        yield x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, spec.san), False
    elif spec.names:
        yield x509.SubjectAlternativeName([general_name(name) for name in spec.names]), spec.subject is None
    if spec.eku is not None:
        yield x509.ExtendedKeyUsage(spec.eku), False
    if spec.ca is not None:
        yield x509.BasicConstraints(spec.ca, spec.path_length if spec.ca else None), True
    if spec.key_usage:
        yield _key_usage(bool(spec.ca)), True
    if spec.permitted or spec.excluded:
        trees = [[_constraint(name) for name in names] or None for names in (spec.permitted, spec.excluded)]
        yield x509.NameConstraints(*trees), True
    yield from spec.extensions


def _constraint(text: str) -> x509.GeneralName:
    """A subtree: `example.com`, `uri:example.com`, `email:example.com`, or a network in CIDR."""
    kind, _, rest = text.partition(":")
    match kind:
        case "uri":
            return x509.UniformResourceIdentifier(rest)
        case "email":
            return x509.RFC822Name(rest)
    return x509.IPAddress(ipaddress.ip_network(text)) if "/" in text else x509.DNSName(text)


def _key_usage(ca: bool) -> x509.KeyUsage:
    usages = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    rest = dict.fromkeys((*usages, "encipher_only", "decipher_only"), False)
    return x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **rest)


def _name(text: str | None) -> x509.Name:
    return x509.Name([] if text is None else [x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _tlv(tag: int, *contents: bytes) -> bytes:
    """One DER value (X.690 10.1)."""
    data = b"".join(contents)
    if len(data) < 0x80:
        return bytes((tag, len(data))) + data
    length = len(data).to_bytes((len(data).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + data


def _pem(certificate: bytes) -> bytes:
    text = base64.encodebytes(certificate).replace(b"\n", b"")
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]  # RFC 7468 2
    return b"\n".join((b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----", b""))


_EMAIL, _DNS, _URI, _OTHER_NAME = 0x81, 0x82, 0x86, 0xA0  # GeneralName's tags, RFC 5280 4.2.1.6
_BIT_STRING = 0x03
_OTHER_OID = bytes.fromhex("06082b06010401868d1f")  # 1.3.6.1.4.1.99999
_FLAWS: dict[Flaw, _Flawed] = {
    Flaw.EXPIRED: _spec(validity=(-2 * _DAY, -_DAY)),
    Flaw.NOT_YET_VALID: _spec(validity=(_DAY, 2 * _DAY)),
    Flaw.SERVER_ONLY: _spec(eku=(SERVER,)),
    Flaw.NO_EKU: _spec(eku=None),
    Flaw.NO_NAME: lambda authority, names: make(Spec(subject=names[0][:64]), authority),
    Flaw.CA_AS_LEAF: _spec(ca=True),
    Flaw.LEAF_AS_ISSUER: _leaf_as_issuer,
    Flaw.SELF_SIGNED: lambda _, names: make(Spec(names=names), None),
    Flaw.OTHER_AUTHORITY: lambda authority, names: authority.twin().client(*names),
    Flaw.TAMPERED: lambda authority, names: tampered(authority.client(*names)),
    Flaw.WRONG_KEY: lambda authority, names: authority.client(*names).with_key(generate_key(KeyType.P256)),
    Flaw.WEAK_KEY: _weak_key,
    Flaw.WEAK_CURVE: _weak_curve,
    Flaw.SHA1: _weak_hash("sha1"),
    Flaw.MD5: _weak_hash("md5"),
    Flaw.HUGE_KEY: _huge_key,
    Flaw.HUGE_ISSUER_KEY: _huge_issuer_key,
    Flaw.NUL_IN_NAME: _spec(san=_san((_DNS, b"admin.test\0.attacker.test"))),
    Flaw.CONTROL_IN_NAME: _spec(san=_san((_URI, b"spiffe://test/web\r\nX-Admin: yes"))),
    Flaw.NUL_IN_SUBJECT: _spec(subject="admin\0.attacker.test"),
    Flaw.NUL_BEHIND_NAME: lambda authority, names: authority.client(san=_san(_raw(names[0] + "\0.attacker.test"))),
    Flaw.TWO_URIS: lambda authority, names: authority.client(names[0], "spiffe://test/admin"),
    Flaw.URI_AS_DNS: _spec(san=_san((_DNS, b"spiffe://test/admin"))),
    Flaw.URI_AS_OTHER_NAME: _spec(san=_san((_OTHER_NAME, _OTHER_OID + b"\xa0\x05\x0c\x03web"))),
    Flaw.HUGE_NAMES: _spec(san=_san(*((_DNS, b"%050d.test" % number) for number in range(1000)))),
    Flaw.LONG_NAME: _spec(san=_san((_URI, b"spiffe://test/" + b"a" * 20_000))),
    Flaw.CRITICAL_EXTENSION: _spec(extensions=((x509.UnrecognizedExtension(_UNKNOWN_OID, b"\x05\x00"), True),)),
    Flaw.TWICE: _duplicate,
    Flaw.PATH_LENGTH: _path_length,
    Flaw.NAME_CONSTRAINT: _name_constraint,
    Flaw.NOT_A_CA: _not_a_ca,
    Flaw.LONG_CHAIN: _long_chain,
}
