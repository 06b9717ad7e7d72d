"""The floor under what others have signed: hashes and keys that prove nothing, and whose signature one is.

What we issue for is held to more, by `keys.weakness`.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, mldsa, rsa

from handfast.pki.certificates import UNREADABLE
from handfast.pki.keys import CURVES

BROKEN_HASHES = frozenset({"md5", "sha1"})  # RFC 6151, RFC 9155; `cryptography` reads no signature with an older one


def broken_hash(algorithm: hashes.HashAlgorithm | None) -> str:
    """The name of a hash under which a signature proves nothing, or ''. None is for keys that bring their own hash."""
    return algorithm.name.upper() if algorithm is not None and algorithm.name in BROKEN_HASHES else ""


def weak_size(key: object) -> str:
    """Why a key is below the floor (NIST SP 800-131A: 112 bits), or ''. Size only: who issued it checked the rest."""
    match key:
        case rsa.RSAPublicKey():
            return f"RSA of {key.key_size} bits; 2048 at least" if not 2048 <= key.key_size <= 16384 else ""
        case ec.EllipticCurvePublicKey():
            return "" if isinstance(key.curve, CURVES) else f"the curve {key.curve.name}"
        case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            return ""
        case mldsa.MLDSA44PublicKey() | mldsa.MLDSA65PublicKey() | mldsa.MLDSA87PublicKey():
            return ""
        case _:
            return "a kind of key that is not accepted"


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate, *, any_size: bool = False) -> bool:
    """Whether the key of `issuer`, and its name, stand behind the certificate; whether it may is another question.

    A stranger's giant key would cost milliseconds a check, so it counts for nothing: `any_size` is for an issuer that
    was chosen. Raises nothing.
    """
    try:
        key = issuer.public_key()
        giant = isinstance(key, rsa.RSAPublicKey) and (key.key_size > 4096 or key.public_numbers().e >> 32 > 0)
        if giant and not any_size:
            return False
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True
