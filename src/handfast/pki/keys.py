"""Keys: which are accepted, how they are read and written, and why one is too weak.

It makes no key: where randomness comes from is for the shells to say.
"""

from __future__ import annotations

import base64
import math
import re
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_pem_private_key,
    pkcs12,
)

from handfast.errors import InvalidInput, Reason
from handfast.pki import der

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


class KeyType(StrEnum):
    """A key that handfast makes and issues for."""

    P256 = "p256"
    P384 = "p384"
    ED25519 = "ed25519"
    RSA2048 = "rsa2048"
    RSA3072 = "rsa3072"
    RSA4096 = "rsa4096"


CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_RSA_TYPES = {2048: KeyType.RSA2048, 3072: KeyType.RSA3072, 4096: KeyType.RSA4096}

_RSA_LEAST, _RSA_MOST = 2048, 8192  # bits; NIST SP 800-131A asks the first, the cost of a handshake the second
_E_LEAST, _E_LIMIT = 65537, 1 << 32  # NIST SP 800-56B 6.2; many libraries read e into 32 bits

_SMALL_PRIMES = [n for n in range(3, 752, 2) if all(n % d for d in range(3, math.isqrt(n) + 1, 2))]
_SMALL_PRODUCT = math.prod(_SMALL_PRIMES)  # Boulder's goodkey tries the same primes

# A prime made by Infineon's library is k*M + (65537**a mod M), so the modulus is a power of 65537 modulo
# every small prime (CVE-2017-15361; Nemec et al., "The Return of Coppersmith's Attack", 2017, 2.3).
_ROCA = [(p, frozenset(pow(65537, a, p) for a in range(p))) for p in _SMALL_PRIMES if p <= 167]

_FERMAT_ROUNDS = 100  # CA/B Baseline Requirements 6.1.1.3 ask this many

_P25519 = 2**255 - 19  # edwards25519, RFC 8032 5.1
_D25519 = -121665 * pow(121666, -1, _P25519) % _P25519


def key_type_of(key: PublicKey) -> KeyType | None:
    """Return the type of a key; None for a size or curve that we do not issue for."""
    match key:
        case ec.EllipticCurvePublicKey():
            return {"secp256r1": KeyType.P256, "secp384r1": KeyType.P384}.get(key.curve.name)
        case ed25519.Ed25519PublicKey():
            return KeyType.ED25519
        case rsa.RSAPublicKey():
            return _RSA_TYPES.get(key.key_size)


def weakness(key: object) -> str | None:
    """Return why a public key is too weak to be used, as a phrase, or None. Raises nothing.

    Anything that is not known to be good is weak: other kinds, other curves, odd sizes. RSA moduli are tried
    for small factors, for the primes of a broken smart-card library (ROCA) and for primes close together
    (Fermat). Left out: the keys of Debian's 2008 generator (CVE-2008-0166). Their list has hundreds of
    thousands of entries, and no key made since is on it.
    """
    match key:
        case ec.EllipticCurvePublicKey():  # the point was checked to be on its curve when it was loaded
            return None if isinstance(key.curve, CURVES) else f"the curve {key.curve.name}; P-256 or P-384 is asked"
        case ed25519.Ed25519PublicKey():
            return _ed25519_weakness(key.public_bytes(Encoding.Raw, PublicFormat.Raw))
        case rsa.RSAPublicKey():
            numbers = key.public_numbers()
            return _rsa_weakness(numbers.n, numbers.e)
        case _:
            return "it is of a kind that is not accepted; P-256, P-384, Ed25519 and RSA are"


def same_key(a: PublicKey, b: PublicKey) -> bool:
    """Whether two public keys are one and the same."""
    return _public_der(a) == _public_der(b)


def key_id(key: PublicKey) -> bytes:
    """Return the SHA-1 of the subjectPublicKey bits, 20 octets (RFC 5280 4.2.1.2, method 1)."""
    return x509.SubjectKeyIdentifier.from_public_key(key).digest


def parse_private_key(data: bytes, what: str, passphrase: bytes | None = None) -> PrivateKey:
    """Parse a private key, PEM or DER, in PKCS#8, PKCS#1 or SEC 1. `what` names the source in messages.

    A passphrase that is given and not needed is no error. Raises InvalidInput: INPUT_NOT_KEY,
    INPUT_KEY_ENCRYPTED (there is no passphrase), INPUT_WRONG_PASSPHRASE.
    """
    load = load_pem_private_key if b"-----BEGIN" in data else load_der_private_key
    try:
        key = load(data, None)
    except TypeError:  # how the library says "encrypted"
        if passphrase is None:
            raise InvalidInput(Reason.INPUT_KEY_ENCRYPTED, what=what) from None
        try:
            key = load(data, passphrase)
        except (ValueError, TypeError):  # TypeError: the passphrase is empty
            raise InvalidInput(Reason.INPUT_WRONG_PASSPHRASE, what=what) from None
        except UnsupportedAlgorithm as error:
            raise InvalidInput(Reason.INPUT_NOT_KEY, what=what, detail=str(error)[:100]) from None
    except (ValueError, UnsupportedAlgorithm, Warning):  # Warning: a key so old that the library warns of it
        raise InvalidInput(Reason.INPUT_NOT_KEY, what=what, detail=_why_no_key(data)) from None
    if not isinstance(key, PrivateKey):
        raise InvalidInput(Reason.INPUT_NOT_KEY, what=what, detail="its kind is neither EC, Ed25519 nor RSA")
    return key


def encode_private_key(key: PrivateKey, passphrase: bytes | None = None, rounds: int = 600_000) -> bytes:
    """Return the key as PKCS#8 PEM; with a passphrase, as encrypted PKCS#8 PEM.

    Encrypted is PBES2: AES-256-CBC under PBKDF2-HMAC-SHA256 with `rounds` rounds (RFC 8018 6.2; OWASP's advice
    is 600 000). Raises InvalidInput (INPUT_BAD_PASSPHRASE) where the passphrase is empty or not UTF-8.
    """
    if passphrase is None:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    builder = PrivateFormat.PKCS12.encryption_builder().kdf_rounds(rounds).hmac_hash(hashes.SHA256())
    encryption = builder.key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC).build(check_passphrase(passphrase))
    bag = _shrouded_key(pkcs12.serialize_key_and_certificates(None, key, None, None, encryption))
    text = base64.b64encode(bag).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]  # RFC 7468 2
    label = "ENCRYPTED PRIVATE KEY"
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()


def check_passphrase(passphrase: bytes) -> bytes:
    """Return a passphrase that can encrypt. Raises InvalidInput (INPUT_BAD_PASSPHRASE): empty, or not UTF-8."""
    if not passphrase:
        raise InvalidInput(Reason.INPUT_BAD_PASSPHRASE, detail="it is empty")
    try:
        passphrase.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(Reason.INPUT_BAD_PASSPHRASE, detail="it is not UTF-8 text") from None
    return passphrase


def _shrouded_key(p12: bytes) -> bytes:
    """Return the EncryptedPrivateKeyInfo of a PKCS#12 file that holds one key and nothing else.

    `cryptography` lets the number of rounds be chosen for PKCS#12 alone; its shrouded key bag is the
    same structure as an encrypted PKCS#8 key (RFC 7292 4.2.2).
    """
    _, safes = list(der.read_all(der.read_one(p12)[1]))[1]
    for _ in range(2):  # authSafe, and the one safe in it: ContentInfo {data, [0] OCTET STRING {SEQUENCE}}
        _, content = list(der.read_all(safes))[1]
        _, inner = der.read_one(der.read_one(content)[1])
        _, safes = der.read_one(inner)
    _, bag = list(der.read_all(safes))[1]
    return bag


def _why_no_key(data: bytes) -> str:
    if b"BEGIN OPENSSH PRIVATE KEY" in data:
        return "it is an OpenSSH key; ssh-keygen -p -m PKCS8 -f FILE converts it"
    if found := re.search(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----", data):
        kind = found[1].decode().lower()
        return "it is damaged" if "private key" in kind or kind == "ec parameters" else f"it holds a {kind}"
    return "it is neither PEM nor DER, or damaged"


def _rsa_weakness(n: int, e: int) -> str | None:
    bits = n.bit_length()
    if not _RSA_LEAST <= bits <= _RSA_MOST or bits % 8:
        return f"RSA of {bits} bits; {_RSA_LEAST} to {_RSA_MOST} are accepted, in whole bytes"
    if not (_E_LEAST <= e < _E_LIMIT and e % 2):
        return f"its RSA exponent is {e if e < _E_LIMIT else 'too large'}; 65537 is usual"
    if n % 2 == 0 or math.gcd(n, _SMALL_PRODUCT) != 1:
        return "its RSA modulus has a small factor"
    if all(n % p in powers for p, powers in _ROCA):
        return "it was made by a broken generator (ROCA, CVE-2017-15361)"
    if _has_close_primes(n):
        return "its RSA primes are too close together (Fermat)"
    return None


def _has_close_primes(n: int) -> bool:
    """Fermat's factoring: n = a² - b² is found fast where the primes a+b and a-b are close."""
    a = math.isqrt(n - 1) + 1
    rest = a * a - n
    for _ in range(_FERMAT_ROUNDS):
        if math.isqrt(rest) ** 2 == rest:
            return True
        rest += 2 * a + 1
        a += 1
    return False


def _ed25519_weakness(raw: bytes) -> str | None:
    y = int.from_bytes(raw, "little") & ((1 << 255) - 1)
    y2 = y * y % _P25519
    # RFC 8032 5.1.3: y is below p, and x² = (y² - 1) / (d y² + 1) has a root.
    square = (y2 - 1) * pow(_D25519 * y2 + 1, -1, _P25519) % _P25519
    if y >= _P25519 or (square and pow(square, (_P25519 - 1) // 2, _P25519) != 1):
        return "its Ed25519 point is not on the curve"
    # The points of order 1, 2 (x = 0), 4 (y = 0) and 8 (doubled, they have y = 0, so x² = -y²). A signature under
    # one of them can be made without a private key, and holds for any message.
    if y * (y2 - 1) * (_D25519 * y2 * y2 + 2 * y2 - 1) % _P25519 == 0:
        return "its Ed25519 point has a small order"
    return None


def _public_der(key: PublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
