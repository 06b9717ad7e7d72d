"""The signed assertion: what it says, who else can read it, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from handfast.wire.assertion import (
    ASSERTION_HEADER,
    MAX_LIFETIME,
    MAX_TOKEN,
    Assertion,
    assertion_key,
    jwks,
    key_id,
    sign_assertion,
)
from handfast.wire.identity import claims_identity

NOW = datetime.now(UTC).replace(microsecond=0)
SECOND = timedelta(seconds=1)
PRIVATE = ec.derive_private_key(0xC0FFEE, ec.SECP256R1())
KEY = assertion_key(PRIVATE)
OTHER = assertion_key(ec.derive_private_key(0xDECAF, ec.SECP256R1()))
AUDIENCE = "https://app.internal"
CLAIMS = Assertion(
    issuer="spiffe://test/guard",
    audience=AUDIENCE,
    subject="spiffe://test/web",
    id="c1-7",
    issued=NOW,
    expires=NOW + MAX_LIFETIME,
    thumbprint=hashlib.sha256(b"leaf").digest(),
)
PUBLISHED = jwks([OTHER.private.public_key(), PRIVATE.public_key()])
GOOD = sign_assertion(KEY, CLAIMS)


def b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def read(token: bytes, published: dict[str, Any] = PUBLISHED, audience: str = AUDIENCE) -> dict[str, Any]:
    """What an app reads with PyJWT, the published keys and the usual care: the page on the assertion says how."""
    key = jwt.PyJWKSet.from_dict(published)[jwt.get_unverified_header(token)["kid"]]
    options: Any = {"require": ["iss", "aud", "sub", "jti", "iat", "exp"]}
    return jwt.decode(token, key, ["ES256"], audience=audience, issuer=CLAIMS.issuer, options=options)


def test_what_is_signed_is_read_by_another() -> None:
    """PyJWT verifies our token with our published keys, and reads the claims that we meant: all, and the fewest."""
    members = {
        "iss": CLAIMS.issuer,
        "aud": AUDIENCE,
        "sub": CLAIMS.subject,
        "jti": CLAIMS.id,
        "iat": int(CLAIMS.issued.timestamp()),
        "exp": int(CLAIMS.expires.timestamp()),
    }
    assert read(GOOD) == members | {"cnf": {"x5t#S256": b64(CLAIMS.thumbprint).decode()}}
    assert read(sign_assertion(KEY, replace(CLAIMS, thumbprint=b""))) == members
    told = replace(CLAIMS, thumbprint=b"", authority="partners")
    assert read(sign_assertion(KEY, told)) == members | {"authority": "partners"}
    assert jwt.get_unverified_header(GOOD) == {"alg": "ES256", "kid": KEY.id, "typ": "JWT"}
    assert sign_assertion(KEY, CLAIMS) == GOOD  # RFC 6979


def other_payload() -> bytes:
    head, payload, signature = GOOD.split(b".")
    members = json.loads(base64.urlsafe_b64decode(payload + b"=="))
    return b".".join((head, b64(json.dumps(members | {"sub": "admin"}).encode()), signature))


REFUSED: dict[str, tuple[bytes, type[jwt.PyJWTError]]] = {
    "signed with another key": (
        sign_assertion(replace(OTHER, id=KEY.id, header=KEY.header), CLAIMS),
        jwt.InvalidSignatureError,
    ),
    "with another payload": (other_payload(), jwt.InvalidSignatureError),
    "for another audience": (sign_assertion(KEY, replace(CLAIMS, audience="https://x")), jwt.InvalidAudienceError),
    "from another issuer": (sign_assertion(KEY, replace(CLAIMS, issuer="spiffe://x/y")), jwt.InvalidIssuerError),
    "expired": (
        sign_assertion(KEY, replace(CLAIMS, issued=NOW - timedelta(seconds=90), expires=NOW - timedelta(seconds=30))),
        jwt.ExpiredSignatureError,
    ),
    "from a time to come": (
        sign_assertion(KEY, replace(CLAIMS, issued=NOW + timedelta(minutes=50))),
        jwt.ImmatureSignatureError,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_proves_nothing_is_refused(name: str) -> None:
    """What does not prove that this guard saw the caller, for this app and now, is refused by an app that checks it."""
    token, error = REFUSED[name]
    assert read(GOOD)["sub"] == CLAIMS.subject
    with pytest.raises(error):
        read(token)


def test_a_key_that_is_not_published_proves_nothing() -> None:
    """A token whose key is not in the set is refused, and so is one whose key was taken out of it."""
    with pytest.raises(jwt.PyJWTError):
        jwt.PyJWKSet.from_dict(jwks([]))
    with pytest.raises(KeyError):
        read(GOOD, jwks([OTHER.private.public_key()]))


def test_the_key_id_is_the_thumbprint() -> None:
    """The id is RFC 7638's thumbprint: the SHA-256 of the members in their order, without blanks."""
    entry = jwks([PRIVATE.public_key()])["keys"][0]
    text = f'{{"crv":"P-256","kty":"EC","x":"{entry["x"]}","y":"{entry["y"]}"}}'
    assert (
        entry["kid"] == KEY.id == key_id(PRIVATE.public_key()) == b64(hashlib.sha256(text.encode()).digest()).decode()
    )
    assert (entry["alg"], entry["use"]) == ("ES256", "sig")


@pytest.mark.parametrize(
    "claims",
    [
        replace(CLAIMS, issuer=""),
        replace(CLAIMS, audience=""),
        replace(CLAIMS, subject=""),
        replace(CLAIMS, id=""),
        replace(CLAIMS, expires=NOW),
        replace(CLAIMS, expires=NOW + MAX_LIFETIME + SECOND),
        replace(CLAIMS, thumbprint=b"short"),
        replace(CLAIMS, subject="spiffe://test/" + "x" * MAX_TOKEN),
    ],
)
def test_what_would_be_refused_is_not_signed(claims: Assertion) -> None:
    """Claims that no reader would take are an error where they are made."""
    with pytest.raises(ValueError):
        sign_assertion(KEY, claims)


def test_only_p256_keys_sign() -> None:
    """A key of another curve is an error: ES256 is P-256."""
    other = ec.derive_private_key(7, ec.SECP384R1())
    with pytest.raises(ValueError):
        assertion_key(other)
    with pytest.raises(ValueError):
        jwks([other.public_key()])


def test_a_client_cannot_send_the_header() -> None:
    """The header that carries an assertion is taken out of requests."""
    assert claims_identity(ASSERTION_HEADER)


def test_no_byte_can_be_changed() -> None:
    """A token with any byte of what is signed, or of most of its signature, replaced is refused."""
    for at in range(len(GOOD) - 1):  # the last letter has bits to spare, which PyJWT passes over
        changed = GOOD[:at] + (b"A" if GOOD[at : at + 1] != b"A" else b"B") + GOOD[at + 1 :]
        with pytest.raises((jwt.PyJWTError, KeyError)):
            read(changed)


TEXT = st.text(min_size=1, max_size=30)


@given(TEXT, TEXT, st.integers(1, 3600), st.binary(min_size=32, max_size=32) | st.just(b""))
def test_any_claims_come_back(identifier: str, subject: str, life: int, thumbprint: bytes) -> None:
    """Whatever the text in it, PyJWT reads an assertion as it was made."""
    expires = NOW + timedelta(seconds=life)
    claims = Assertion(CLAIMS.issuer, AUDIENCE, subject, identifier, NOW, expires, thumbprint)
    key = PRIVATE.public_key()
    options: Any = {"verify_exp": False}
    found = jwt.decode(sign_assertion(KEY, claims), key, ["ES256"], audience=AUDIENCE, options=options)
    assert (found["sub"], found["jti"], found["exp"]) == (subject, identifier, int(expires.timestamp()))
    assert ("cnf" in found) is bool(thumbprint)
