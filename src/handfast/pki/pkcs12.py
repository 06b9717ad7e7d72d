"""PKCS#12 (RFC 7292): key and chain in one file, for browsers, phones and Java."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import PrivateFormat, pkcs12

from handfast.errors import InvalidInput, Reason
from handfast.pki.keys import PrivateKey, check_passphrase

_ROUNDS = 100_000  # importers must do as many; browsers and Java take this in a tenth of a second
_LEGACY_ROUNDS = 2048  # what the importers of old were made for


def encode_p12(
    name: str, key: PrivateKey, chain: Sequence[x509.Certificate], password: bytes, legacy: bool = False
) -> bytes:
    """Return a PKCS#12 file with the key and its chain, leaf first; `name` is what importers show.

    It is encrypted with AES-256-CBC under PBKDF2-HMAC-SHA256, with a SHA-256 MAC; `legacy`, for importers that
    cannot read that (macOS before 15, Windows before 10 1709), with triple DES and SHA-1, which protect badly.
    Raises InvalidInput (INPUT_BAD_PASSPHRASE); ValueError where the chain is empty or not the key's.
    """
    if not chain:
        raise ValueError("a chain holds at least the key's own certificate")
    builder = PrivateFormat.PKCS12.encryption_builder()
    if legacy:
        builder = builder.kdf_rounds(_LEGACY_ROUNDS).hmac_hash(hashes.SHA1())  # noqa: S303  # asked for by name
        builder = builder.key_cert_algorithm(pkcs12.PBES.PBESv1SHA1And3KeyTripleDESCBC)
    else:
        builder = builder.kdf_rounds(_ROUNDS).hmac_hash(hashes.SHA256())
        builder = builder.key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
    encryption = builder.build(check_passphrase(password))
    return pkcs12.serialize_key_and_certificates(name.encode(), key, chain[0], chain[1:] or None, encryption)


def parse_p12(data: bytes, what: str, password: bytes | None) -> tuple[PrivateKey | None, tuple[x509.Certificate, ...]]:
    """Return the key in a PKCS#12 file, if it has one, and its certificates, the key's own first.

    `what` names the source in messages. Raises InvalidInput (INPUT_NOT_P12): also for a wrong password, which
    cannot be told from a damaged file, and for a key of a kind that is not accepted.
    """
    try:
        found = pkcs12.load_pkcs12(data, password)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, Warning):
        # A Warning, where those are errors, is of a key so old that the library will drop it.
        raise InvalidInput(Reason.INPUT_NOT_P12, what=what) from None
    if not isinstance(found.key, PrivateKey | None):
        raise InvalidInput(Reason.INPUT_NOT_P12, what=what)
    own = [found.cert] if found.cert is not None else []
    return found.key, tuple(entry.certificate for entry in [*own, *found.additional_certs])
