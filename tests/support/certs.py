"""Certificates made by hand, so that tests can make those that handfast would never issue."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
DAY = timedelta(days=1)


@dataclass
class Leaf:
    """A certificate, its key, and the certificates between it and the root."""

    certificate: x509.Certificate
    key: Any
    chain: tuple[x509.Certificate, ...] = ()

    @property
    def presented(self) -> tuple[x509.Certificate, ...]:
        return (self.certificate, *self.chain)

    def save(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write NAME.crt (with its chain) and NAME.key; return both paths."""
        cert, key = folder / f"{name}.crt", folder / f"{name}.key"
        cert.write_bytes(b"".join(c.public_bytes(serialization.Encoding.PEM) for c in self.presented))
        key.write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        key.chmod(0o600)
        return cert, key


@dataclass
class Spec:
    """What to put into a certificate; the defaults make a good client."""

    names: list[x509.GeneralName] = field(default_factory=list)
    cn: str | None = None
    eku: list[x509.ObjectIdentifier] | None = field(default_factory=lambda: [CLIENT])
    ca: bool | None = None  # None: no basicConstraints
    path_length: int | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    key_usage: bool = True
    key: Any = None
    hash: Any = field(default_factory=hashes.SHA256)
    extra: list[tuple[x509.ExtensionType, bool]] = field(default_factory=list)
    serial: int | None = None


@dataclass
class Ca:
    """An authority for tests."""

    certificate: x509.Certificate
    key: Any
    above: tuple[x509.Certificate, ...] = ()  # its own certificate and those up to the root, for chains

    @classmethod
    def root(cls, cn: str = "Test Root", **spec: Any) -> Ca:
        made = make(Spec(cn=cn, eku=None, ca=True, not_after=_now() + 3650 * DAY, **spec), None)
        return cls(made.certificate, made.key)

    def sub(self, cn: str = "Test Issuer", **spec: Any) -> Ca:
        made = make(Spec(**({"cn": cn, "eku": None, "ca": True, "not_after": _now() + 365 * DAY} | spec)), self)
        return Ca(made.certificate, made.key, (made.certificate, *self.above))

    def leaf(self, *names: str, **spec: Any) -> Leaf:
        return make(Spec(names=[general(name) for name in names], **spec), self)

    def client(self, name: str = "spiffe://test/web", **spec: Any) -> Leaf:
        return self.leaf(name, **spec)

    def server(self, *names: str, **spec: Any) -> Leaf:
        return self.leaf(*(names or ("localhost", "127.0.0.1")), **({"eku": [SERVER]} | spec))

    def save(self, folder: Path, name: str) -> Path:
        path = folder / f"{name}.crt"
        path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        return path


def general(text: str) -> x509.GeneralName:
    """A name as tests write it: an address, a URI, an email, or a host."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if "://" in text or text.startswith("urn:"):
        return x509.UniformResourceIdentifier(text)
    return x509.RFC822Name(text) if "@" in text else x509.DNSName(text)


def make(spec: Spec, issuer: Ca | None) -> Leaf:
    """Make what the spec says, sound or not."""
    key = spec.key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, spec.cn)] if spec.cn else [])
    signer = issuer.key if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(spec.serial or x509.random_serial_number())
        .not_valid_before(spec.not_before or _now() - timedelta(hours=1))
        .not_valid_after(spec.not_after or _now() + DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
    )
    if spec.names:
        builder = builder.add_extension(x509.SubjectAlternativeName(spec.names), not spec.cn)
    if spec.eku is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(spec.eku), False)
    if spec.ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(spec.ca, spec.path_length if spec.ca else None), True)
    if spec.key_usage:
        builder = builder.add_extension(_key_usage(bool(spec.ca)), True)
    for extension, critical in spec.extra:
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(signer, spec.hash)
    return Leaf(certificate, key, issuer.above if issuer else ())


def _key_usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
