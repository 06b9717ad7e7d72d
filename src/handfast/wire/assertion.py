"""A signed statement of who called, so that an app can tell a request of the guard from one that went around it.

Owns its bytes: a JWT (RFC 7519) in compact JWS (RFC 7515) with ES256 (RFC 7518 3.4), and the set of keys that it is
checked with (RFC 7517). What it proves: the holder of the key saw, at the time of issue, this certificate's holder
call. It is bound to no request, and until it expires it is good for whoever reads it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

ASSERTION_HEADER = b"Handfast-Assertion"
MAX_LIFETIME = timedelta(hours=1)
MAX_TOKEN = 8192  # bytes; a SPIFFE ID has at most 2,048

_SIGN = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)  # RFC 6979: no randomness that could be poor
_SIZE = 32  # bytes of a coordinate, and of each half of a signature


@dataclass(frozen=True, slots=True)
class Assertion:
    """What is said. Times are whole seconds; `expires` is at most an hour after `issued`.

    `subject` is the peer's name as text, `spiffe://…` or `dns:…`, and `authority` who vouches for it, "" where that is
    not told: the same name of two authorities is two identities. `thumbprint` is the SHA-256 of its leaf's DER
    (RFC 8705 3.1), b"" where it is not told.
    """

    issuer: str
    audience: str
    subject: str
    id: str
    issued: datetime
    expires: datetime
    thumbprint: bytes = b""
    authority: str = ""


@dataclass(frozen=True, slots=True)
class AssertionKey:
    """A P-256 key with its id, the RFC 7638 thumbprint, and the JWS header that goes with it."""

    private: ec.EllipticCurvePrivateKey
    id: str
    header: bytes


def assertion_key(private: ec.EllipticCurvePrivateKey) -> AssertionKey:
    """Return the key made ready for signing. ValueError for another curve than P-256, which ES256 is defined for."""
    kid = key_id(private.public_key())
    return AssertionKey(private, kid, _json_part({"alg": "ES256", "kid": kid, "typ": "JWT"}))


def sign_assertion(key: AssertionKey, claims: Assertion) -> bytes:
    """Return the compact JWS. The same claims give the same bytes.

    ValueError for claims that no reader should take: nobody as issuer, audience or subject, a life of no time or of
    more than an hour, a thumbprint that is none, more than 8 KiB in all.
    """
    issued, expires = int(claims.issued.timestamp()), int(claims.expires.timestamp())
    if not (claims.issuer and claims.audience and claims.subject and claims.id):
        raise ValueError("an assertion names its issuer, audience and subject, and has an id")
    if not 0 < expires - issued <= MAX_LIFETIME.total_seconds():
        raise ValueError("an assertion that lives too long or not at all")
    if len(claims.thumbprint) not in (0, 32):
        raise ValueError("a thumbprint that is no SHA-256")
    members: dict[str, Any] = {"iss": claims.issuer, "aud": claims.audience, "sub": claims.subject, "jti": claims.id}
    members |= {"iat": issued, "exp": expires}
    if claims.authority:
        members["authority"] = claims.authority
    if claims.thumbprint:
        members["cnf"] = {"x5t#S256": _base64url(claims.thumbprint).decode("ascii")}
    signed = key.header + b"." + _json_part(members)
    # RFC 7518 3.4: the two numbers side by side, not in DER.
    r, s = decode_dss_signature(key.private.sign(signed, _SIGN))
    token = signed + b"." + _base64url(r.to_bytes(_SIZE, "big") + s.to_bytes(_SIZE, "big"))
    if len(token) > MAX_TOKEN:
        raise ValueError(f"an assertion of more than {MAX_TOKEN} bytes")
    return token


def jwks(keys: Iterable[ec.EllipticCurvePublicKey]) -> dict[str, list[dict[str, str]]]:
    """Return the set of keys to publish, as JSON values (RFC 7517 5). ValueError for another curve than P-256.

    While a key is replaced, publish both: the next one before it signs, the last one until what it signed has expired.
    """
    return {"keys": [_jwk(key) | {"kid": key_id(key), "alg": "ES256", "use": "sig"} for key in keys]}


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Return the key's RFC 7638 thumbprint, in base64url. ValueError for another curve than P-256."""
    members = json.dumps(_jwk(key), sort_keys=True, separators=(",", ":"))
    return _base64url(hashlib.sha256(members.encode("ascii")).digest()).decode("ascii")


def _jwk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """RFC 7518 6.2.1: the members that the thumbprint is made of."""
    if not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("ES256 is defined for P-256 alone")
    numbers = key.public_numbers()
    x, y = (_base64url(number.to_bytes(_SIZE, "big")).decode("ascii") for number in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y}


def _json_part(members: dict[str, Any]) -> bytes:
    return _base64url(json.dumps(members, separators=(",", ":")).encode("ascii"))


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
