"""A signed statement of who called, so that an app can tell a request of the guard from one that went around it.

Owns its bytes: a JWT (RFC 7519) in compact JWS (RFC 7515) with ES256 (RFC 7518 3.4), and the set of keys that it is
checked with (RFC 7517). What it proves: the holder of the key saw, at the time of issue, this certificate's holder
call, and, where method and target are in it, make that request. It does not cover header lines or the body, and
until it expires it is good for whoever reads it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from handfast.errors import Failure, InvalidInput, Reason, RemoteProtocolError, VerificationFailed

ASSERTION_HEADER = b"Handfast-Assertion"
MAX_LIFETIME = timedelta(hours=1)
LEEWAY = timedelta(seconds=5)
MAX_TOKEN = 8192  # bytes; a SPIFFE ID has at most 2,048, and a URL of ours as many
MAX_KEYS = 64  # in a set
MAX_JWKS = 65_536  # bytes; a key takes about 250

_SIGN = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)  # RFC 6979: no randomness that could be poor
_VERIFY = ec.ECDSA(hashes.SHA256())
_SIZE = 32  # bytes of a coordinate, and of each half of a signature
_LAST_TIME = 253_402_300_800  # the year 10000
_BASE64URL = re.compile(rb"[A-Za-z0-9_-]+")
_MEMBERS = frozenset({"iss", "aud", "sub", "jti", "iat", "exp"})


@dataclass(frozen=True, slots=True)
class Assertion:
    """What is said. Times are whole seconds; `expires` is at most an hour after `issued`.

    `subject` is the peer's identity as text, `spiffe://…` or `dns:…`. `thumbprint` is the SHA-256 of its leaf's DER
    (RFC 8705 3.1), b"" where it is not told. `method` and `target` (`https://host/path` without a query, as `htm` and
    `htu` of RFC 9449 4.2) bind it to one request; both are "" in one that is good for all requests of a connection.
    """

    issuer: str
    audience: str
    subject: str
    id: str
    issued: datetime
    expires: datetime
    thumbprint: bytes = b""
    method: str = ""
    target: str = ""


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

    ValueError for claims that `verify_assertion` would refuse: nobody as issuer, audience or subject, a life of no
    time or of more than an hour, a method without a target, a thumbprint that is none, more than 8 KiB in all.
    """
    issued, expires = int(claims.issued.timestamp()), int(claims.expires.timestamp())
    if not (claims.issuer and claims.audience and claims.subject and claims.id):
        raise ValueError("an assertion names its issuer, audience and subject, and has an id")
    if not 0 < expires - issued <= MAX_LIFETIME.total_seconds() or bool(claims.method) is not bool(claims.target):
        raise ValueError("an assertion that lives too long or not at all, or is bound to half a request")
    if len(claims.thumbprint) not in (0, 32):
        raise ValueError("a thumbprint that is no SHA-256")
    members: dict[str, Any] = {"iss": claims.issuer, "aud": claims.audience, "sub": claims.subject, "jti": claims.id}
    members |= {"iat": issued, "exp": expires}
    if claims.thumbprint:
        members["cnf"] = {"x5t#S256": _base64url(claims.thumbprint).decode("ascii")}
    if claims.method:
        members |= {"htm": claims.method, "htu": claims.target}
    signed = key.header + b"." + _json_part(members)
    # RFC 7518 3.4: the two numbers side by side, not in DER.
    r, s = decode_dss_signature(key.private.sign(signed, _SIGN))
    token = signed + b"." + _base64url(r.to_bytes(_SIZE, "big") + s.to_bytes(_SIZE, "big"))
    if len(token) > MAX_TOKEN:
        raise ValueError(f"an assertion of more than {MAX_TOKEN} bytes")
    return token


def verify_assertion(
    token: bytes,
    keys: Mapping[str, ec.EllipticCurvePublicKey],
    audience: str,
    now: datetime,
    leeway: timedelta = LEEWAY,
) -> Assertion:
    """Return what a token says, if a key of the set signed it, for this audience, and it is in force at `now`.

    `keys` is what `parse_jwks` returns. Raises RemoteProtocolError (ASSERTION_MALFORMED) for what is no token of
    this kind, another algorithm included, and VerificationFailed (ASSERTION_SIGNATURE, _AUDIENCE, _EXPIRED or
    _NOT_YET); nothing else, whatever the bytes. That its method, target and certificate are those of the request
    is for the caller to compare, and so is an id seen before.
    """
    if len(token) > MAX_TOKEN:
        raise _malformed(f"it is longer than {MAX_TOKEN} bytes")
    parts = token.split(b".")
    if len(parts) != 3:
        raise _malformed("it is not of three parts")
    header = _json_object(parts[0])
    # Never another algorithm, whatever the header says: RFC 8725 2.1, 3.1.
    if header.get("alg") != "ES256":
        raise _malformed("its algorithm is not ES256")
    if "crit" in header or header.get("typ", "JWT") != "JWT":
        raise _malformed("its header asks for what is not understood")
    signature = _decoded(parts[2])
    if len(signature) != 2 * _SIZE:
        raise _malformed("its signature is not of 64 bytes")
    kid = header.get("kid")
    key = keys.get(kid) if isinstance(kid, str) else None
    if key is None:
        raise _failed(Reason.ASSERTION_SIGNATURE, detail="its key is not known here")
    r, s = (int.from_bytes(half, "big") for half in (signature[:_SIZE], signature[_SIZE:]))
    try:
        key.verify(encode_dss_signature(r, s), parts[0] + b"." + parts[1], _VERIFY)
    except InvalidSignature:
        raise _failed(Reason.ASSERTION_SIGNATURE, detail="its signature is wrong") from None
    claims = _claims(_json_object(parts[1]))
    if claims.audience != audience:
        raise _failed(Reason.ASSERTION_AUDIENCE, audience=claims.audience, expected=audience)
    if now >= claims.expires + leeway:
        raise _failed(Reason.ASSERTION_EXPIRED, not_after=claims.expires)
    if now < claims.issued - leeway:
        raise _failed(Reason.ASSERTION_NOT_YET, not_before=claims.issued)
    return claims


def jwks(keys: Iterable[ec.EllipticCurvePublicKey]) -> dict[str, list[dict[str, str]]]:
    """Return the set of keys to publish, as JSON values (RFC 7517 5). ValueError for another curve than P-256.

    While a key is replaced, publish both: the next one before it signs, the last one until what it signed has expired.
    """
    return {"keys": [_jwk(key) | {"kid": key_id(key), "alg": "ES256", "use": "sig"} for key in keys]}


def parse_jwks(document: bytes) -> dict[str, ec.EllipticCurvePublicKey]:
    """Return a published set's P-256 keys by their id. Keys of other kinds, and without an id, are passed over.

    Raises InvalidInput (INPUT_JWKS) where it is no set of keys, a P-256 key is malformed, or two have one id.
    """
    try:
        if len(document) > MAX_JWKS:
            raise ValueError
        listed = json.loads(document.decode("utf-8"), object_pairs_hook=_unique)
        entries = listed["keys"]
        if not isinstance(entries, list) or len(entries) > MAX_KEYS:
            raise ValueError
        keys: dict[str, ec.EllipticCurvePublicKey] = {}
        for entry in entries:
            if (entry.get("kty"), entry.get("crv")) != ("EC", "P-256") or not isinstance(entry.get("kid"), str):
                continue
            if entry["kid"] in keys:
                raise ValueError
            x, y = (_coordinate(entry[name]) for name in ("x", "y"))
            keys[entry["kid"]] = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RemoteProtocolError):
        raise InvalidInput(Reason.INPUT_JWKS) from None
    return keys


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


def _coordinate(text: str) -> int:
    octets = _decoded(text.encode("ascii"))
    if len(octets) != _SIZE:  # RFC 7518 6.2.1.2
        raise ValueError
    return int.from_bytes(octets, "big")


def _claims(members: dict[str, Any]) -> Assertion:
    if not members.keys() >= _MEMBERS:
        raise _malformed("a claim is missing")
    confirmation = members.get("cnf", {})
    if not isinstance(confirmation, dict):
        raise _malformed("its confirmation is no object")
    thumbprint = confirmation.get("x5t#S256", "")
    texts = [members[name] for name in ("iss", "aud", "sub", "jti")]
    request = [members.get("htm", ""), members.get("htu", "")]
    if not all(isinstance(text, str) for text in (*texts, *request, thumbprint)) or not all(texts):
        raise _malformed("a claim is no text, or empty")
    digest = _decoded(thumbprint.encode("utf-8", "surrogatepass")) if thumbprint else b""
    if len(digest) not in (0, 32):
        raise _malformed("its thumbprint is not a SHA-256")
    if bool(request[0]) is not bool(request[1]):
        raise _malformed("it is bound to half a request")
    issued, expires = _time(members["iat"]), _time(members["exp"])
    if not timedelta(0) < expires - issued <= MAX_LIFETIME:
        raise _malformed("it lives for no time, or for too long")
    issuer, audience, subject, identifier = texts
    return Assertion(issuer, audience, subject, identifier, issued, expires, digest, *request)


def _time(value: object) -> datetime:
    if type(value) is not int or not 0 <= value < _LAST_TIME:  # a bool is an int, but no time
        raise _malformed("a time is not in whole seconds")
    return datetime.fromtimestamp(value, UTC)


def _json_part(members: dict[str, Any]) -> bytes:
    return _base64url(json.dumps(members, separators=(",", ":")).encode("ascii"))


def _json_object(part: bytes) -> dict[str, Any]:
    try:
        found = json.loads(_decoded(part).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise _malformed("a part is no JSON") from None
    if not isinstance(found, dict):
        raise _malformed("a part is no JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that readers may take in two ways: RFC 7519 4."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _decoded(part: bytes) -> bytes:
    """RFC 7515 2: base64url without padding. One value has one spelling: stray bits at the end are refused."""
    if _BASE64URL.fullmatch(part) and len(part) % 4 != 1:
        data = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
        if _base64url(data) == part:
            return data
    raise _malformed("a part is not in base64url")


def _malformed(detail: str) -> RemoteProtocolError:
    return RemoteProtocolError(Reason.ASSERTION_MALFORMED, detail=detail)


def _failed(reason: Reason, **facts: Any) -> VerificationFailed:
    return VerificationFailed((Failure(reason, facts),))
