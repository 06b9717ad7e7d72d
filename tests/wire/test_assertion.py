"""The signed assertion: what it says, who else can read it, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, ProtocolError, Reason, RemoteProtocolError, VerificationFailed
from handfast.wire.assertion import (
    ASSERTION_HEADER,
    LEEWAY,
    MAX_LIFETIME,
    MAX_TOKEN,
    Assertion,
    assertion_key,
    jwks,
    key_id,
    parse_jwks,
    sign_assertion,
    verify_assertion,
)
from handfast.wire.identity import claims_identity

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
PRIVATE = ec.derive_private_key(0xC0FFEE, ec.SECP256R1())
KEY = assertion_key(PRIVATE)
OTHER = assertion_key(ec.derive_private_key(0xDECAF, ec.SECP256R1()))
KEYS = {KEY.id: PRIVATE.public_key()}
AUDIENCE = "https://app.internal"
CLAIMS = Assertion(
    issuer="spiffe://test/guard",
    audience=AUDIENCE,
    subject="spiffe://test/web",
    id="c1-7",
    issued=NOW,
    expires=NOW + timedelta(seconds=60),
    thumbprint=hashlib.sha256(b"leaf").digest(),
    method="GET",
    target="https://app.internal/orders",
)
HEADER = {"alg": "ES256", "kid": KEY.id, "typ": "JWT"}
MEMBERS: dict[str, Any] = {
    "iss": CLAIMS.issuer,
    "aud": AUDIENCE,
    "sub": CLAIMS.subject,
    "jti": CLAIMS.id,
    "iat": int(NOW.timestamp()),
    "exp": int(NOW.timestamp()) + 60,
}


def b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def signed(header: bytes, payload: bytes) -> bytes:
    """A token over these bytes, signed by the right key through PyJWT's own algorithm."""
    whole = b64(header) + b"." + b64(payload)
    return whole + b"." + b64(jwt.get_algorithm_by_name("ES256").sign(whole, PRIVATE))


def token(header: dict[str, Any] | None = None, without: str = "", **members: object) -> bytes:
    payload = {name: value for name, value in (MEMBERS | members).items() if name != without}
    return signed(json.dumps(header or HEADER).encode(), json.dumps(payload).encode())


def verify(data: bytes, now: datetime = NOW) -> Assertion:
    return verify_assertion(data, KEYS, AUDIENCE, now)


def test_what_is_signed_is_verified() -> None:
    """An assertion comes back as it was made, with all its claims and with the fewest."""
    assert verify(sign_assertion(KEY, CLAIMS)) == CLAIMS
    bare = replace(CLAIMS, thumbprint=b"", method="", target="")
    assert verify(sign_assertion(KEY, bare)) == bare
    assert sign_assertion(KEY, CLAIMS) == sign_assertion(KEY, CLAIMS)  # RFC 6979


def test_another_reader_takes_it() -> None:
    """PyJWT verifies our token with our published set of keys, and reads the claims that we meant."""
    keys = jwt.PyJWKSet.from_dict(jwks([OTHER.private.public_key(), PRIVATE.public_key()]))
    data = sign_assertion(KEY, CLAIMS).decode()
    kid = jwt.get_unverified_header(data)["kid"]
    options: Any = {"verify_exp": False, "verify_iat": False, "require": ["iss", "aud", "sub", "jti", "iat", "exp"]}
    read = jwt.decode(data, keys[kid], ["ES256"], audience=AUDIENCE, issuer=CLAIMS.issuer, options=options)
    assert read == MEMBERS | {
        "cnf": {"x5t#S256": b64(CLAIMS.thumbprint).decode()},
        "htm": "GET",
        "htu": "https://app.internal/orders",
    }
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(data, keys[kid], ["ES256"], audience="https://other", options=options)
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(data, keys[OTHER.id], ["ES256"], audience=AUDIENCE, options=options)


def test_another_writer_is_taken() -> None:
    """A token that PyJWT made with the key is verified by us; one that it made with another key is not."""
    made = jwt.encode(MEMBERS, PRIVATE, "ES256", headers={"kid": KEY.id}).encode()
    assert verify(made) == replace(CLAIMS, thumbprint=b"", method="", target="")
    foreign = jwt.encode(MEMBERS, OTHER.private, "ES256", headers={"kid": KEY.id}).encode()
    with pytest.raises(VerificationFailed) as caught:
        verify(foreign)
    assert caught.value.reason is Reason.ASSERTION_SIGNATURE


def test_the_key_id_is_the_thumbprint() -> None:
    """The id is RFC 7638's thumbprint: the SHA-256 of the members in their order, without blanks."""
    entry = jwks([PRIVATE.public_key()])["keys"][0]
    text = f'{{"crv":"P-256","kty":"EC","x":"{entry["x"]}","y":"{entry["y"]}"}}'
    assert (
        entry["kid"] == KEY.id == key_id(PRIVATE.public_key()) == b64(hashlib.sha256(text.encode()).digest()).decode()
    )
    assert (entry["alg"], entry["use"]) == ("ES256", "sig")


def confused(data: bytes) -> bytes:
    """The token signed by HMAC with the public key as its secret (RFC 8725 2.1)."""
    secret = PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    whole = b64(json.dumps(HEADER | {"alg": "HS256"}).encode()) + b"." + data.split(b".")[1]
    return whole + b"." + b64(hmac.digest(secret, whole, "sha256"))


GOOD = sign_assertion(KEY, CLAIMS)
PARTS = GOOD.split(b".")
M, S, A, E, N = (
    Reason.ASSERTION_MALFORMED,
    Reason.ASSERTION_SIGNATURE,
    Reason.ASSERTION_AUDIENCE,
    Reason.ASSERTION_EXPIRED,
    Reason.ASSERTION_NOT_YET,
)
REFUSED: dict[str, tuple[Reason, bytes]] = {
    "nothing": (M, b""),
    "two parts": (M, b".".join(PARTS[:2])),
    "four parts": (M, GOOD + b".e30"),
    "no signature": (M, b".".join(PARTS[:2]) + b"."),
    "too long": (M, GOOD + b"A" * MAX_TOKEN),
    "alg none": (M, b64(b'{"alg":"none"}') + b"." + PARTS[1] + b"."),
    "alg None with a signature": (M, token(HEADER | {"alg": "none"})),
    "alg in lower case": (M, token(HEADER | {"alg": "es256"})),
    "alg ES384": (M, token(HEADER | {"alg": "ES384"})),
    "alg in a list": (M, token(HEADER | {"alg": ["ES256"]})),
    "no alg": (M, token({"kid": KEY.id})),
    "HS256 with the public key": (M, confused(GOOD)),
    "critical extensions": (M, token(HEADER | {"crit": ["exp"]})),
    "another type": (M, token(HEADER | {"typ": "dpop+jwt"})),
    "a header that is no object": (M, signed(b'["ES256"]', b"{}")),
    "a header in UTF-16": (M, signed(json.dumps(HEADER).encode("utf-16"), b"{}")),
    "alg twice": (M, signed(b'{"alg":"none","alg":"ES256"}', b"{}")),
    "claims that are no object": (M, signed(json.dumps(HEADER).encode(), b'"claims"')),
    "a claim twice": (M, signed(json.dumps(HEADER).encode(), json.dumps(MEMBERS).encode()[:-1] + b',"sub":"admin"}')),
    "claims a thousand deep": (M, signed(json.dumps(HEADER).encode(), b"[" * 3000)),
    "a huge number": (M, signed(json.dumps(HEADER).encode(), b'{"exp":' + b"9" * 5000 + b"}")),
    "padding": (M, PARTS[0] + b"==." + PARTS[1] + b"." + PARTS[2]),
    "blanks": (M, GOOD.replace(b".", b". ")),
    "a line break": (M, GOOD + b"\n"),
    "stray bits": (M, GOOD[:-1] + bytes([GOOD[-1] + 1])),  # 64 bytes leave four bits over
    "the other alphabet": (M, GOOD[:-3] + b"+/A"),
    "a signature in DER": (
        M,
        b".".join(PARTS[:2]) + b"." + b64(PRIVATE.sign(b".".join(PARTS[:2]), ec.ECDSA(hashes.SHA256()))),
    ),
    "a signature of zeros": (S, b".".join(PARTS[:2]) + b"." + b64(bytes(64))),
    "a short signature": (M, b".".join(PARTS[:2]) + b"." + b64(bytes(63))),
    "another payload": (S, PARTS[0] + b"." + b64(json.dumps(MEMBERS | {"sub": "admin"}).encode()) + b"." + PARTS[2]),
    "another key": (S, sign_assertion(OTHER, CLAIMS)),
    "an unknown kid": (S, token(HEADER | {"kid": OTHER.id})),
    "no kid": (S, token({"alg": "ES256"})),
    "a kid that is no text": (S, token(HEADER | {"kid": [KEY.id]})),
    "a key in the header": (S, token({"alg": "ES256", "jwk": jwks([PRIVATE.public_key()])["keys"][0]})),
    "another audience": (A, token(aud="https://other")),
    "an audience that begins alike": (A, token(aud=AUDIENCE + ".evil.example")),
    "a list of audiences": (M, token(aud=[AUDIENCE])),
    "expired": (E, token(iat=MEMBERS["iat"] - 70, exp=MEMBERS["iat"] - 5)),
    "not yet valid": (N, token(iat=MEMBERS["iat"] + 6)),
    "no expiry": (M, token(without="exp")),
    "no issuer": (M, token(without="iss")),
    "no subject": (M, token(without="sub")),
    "an empty subject": (M, token(sub="")),
    "a subject that is no text": (M, token(sub=7)),
    "a time as text": (M, token(exp="9999999999")),
    "a time with a fraction": (M, token(exp=MEMBERS["exp"] + 0.5)),
    "a time that is true": (M, token(iat=True)),
    "a time before time": (M, token(iat=-1)),
    "a time beyond time": (M, token(exp=10**18)),
    "a time that is not a number": (M, token(exp=float("nan"))),
    "a life of no time": (M, token(exp=MEMBERS["iat"])),
    "a life of a day": (M, token(exp=MEMBERS["iat"] + 86400)),
    "a confirmation that is no object": (M, token(cnf="x")),
    "a thumbprint that is no SHA-256": (M, token(cnf={"x5t#S256": "AAAA"})),
    "a thumbprint that is no base64": (M, token(cnf={"x5t#S256": "\ud800"})),
    "a thumbprint that is no text": (M, token(cnf={"x5t#S256": 1})),
    "half a request": (M, token(htm="GET")),
    "a method that is no text": (M, token(htm=1, htu=1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_proves_nothing_is_refused(name: str) -> None:
    """Each way of being no good token is refused, for its own reason."""
    reason, data = REFUSED[name]
    with pytest.raises((RemoteProtocolError, VerificationFailed)) as caught:
        verify(data)
    assert caught.value.reason is reason, caught.value
    assert isinstance(caught.value, ProtocolError) is (reason is Reason.ASSERTION_MALFORMED)
    assert verify(token(unknown="claims are passed over")).subject == CLAIMS.subject


def test_time_is_kept_to_the_second() -> None:
    """A token is good from its issue to its expiry, with the leeway on both sides and not a second more."""
    for good in (CLAIMS.issued - LEEWAY, CLAIMS.expires + LEEWAY - SECOND):
        assert verify(GOOD, good) == CLAIMS
    for late, reason in ((CLAIMS.expires + LEEWAY, E), (CLAIMS.issued - LEEWAY - SECOND, N)):
        with pytest.raises(VerificationFailed) as caught:
            verify(GOOD, late)
        assert caught.value.reason is reason
    with pytest.raises(VerificationFailed):
        verify_assertion(GOOD, KEYS, AUDIENCE, CLAIMS.expires, timedelta(0))


@pytest.mark.parametrize(
    "claims",
    [
        replace(CLAIMS, issuer=""),
        replace(CLAIMS, audience=""),
        replace(CLAIMS, subject=""),
        replace(CLAIMS, id=""),
        replace(CLAIMS, expires=NOW),
        replace(CLAIMS, expires=NOW + MAX_LIFETIME + SECOND),
        replace(CLAIMS, method=""),
        replace(CLAIMS, target=""),
        replace(CLAIMS, thumbprint=b"short"),
        replace(CLAIMS, target="https://app.internal/" + "x" * MAX_TOKEN),
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


def test_published_keys_are_read_back() -> None:
    """A set of keys gives the same keys; what is not for us is passed over."""
    document: dict[str, Any] = jwks([PRIVATE.public_key(), OTHER.private.public_key()])
    document["keys"] += [
        {"kty": "RSA", "kid": "r"},
        {"kty": "EC", "crv": "P-384", "kid": "e"},
        {"kty": "oct", "k": "x"},
    ]
    keys = parse_jwks(json.dumps(document).encode())
    assert list(keys) == [KEY.id, OTHER.id]
    assert verify_assertion(GOOD, keys, AUDIENCE, NOW) == CLAIMS


ENTRY = jwks([PRIVATE.public_key()])["keys"][0]


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":["x"]}',
        b'{"keys":[],"keys":[]}',
        b"[" * 5000,
        b" " * 65_537,
        json.dumps({"keys": [ENTRY] * 2}).encode(),
        json.dumps({"keys": [{"kty": "oct"}] * 65}).encode(),
        json.dumps({"keys": [ENTRY | {"x": ENTRY["y"]}]}).encode(),  # no point of the curve
        json.dumps({"keys": [ENTRY | {"x": "AA"}]}).encode(),
        json.dumps({"keys": [ENTRY | {"x": ENTRY["x"] + "="}]}).encode(),
        json.dumps({"keys": [ENTRY | {"x": 5}]}).encode(),
        json.dumps({"keys": [{**ENTRY, "x": "ü"}]}).encode(),
        json.dumps({"keys": [{name: value for name, value in ENTRY.items() if name != "y"}]}).encode(),
    ],
)
def test_what_is_no_set_of_keys_is_refused(document: bytes) -> None:
    """A malformed set is refused whole."""
    with pytest.raises(InvalidInput) as caught:
        parse_jwks(document)
    assert caught.value.reason is Reason.INPUT_JWKS


def test_a_client_cannot_send_the_header() -> None:
    """The header that carries an assertion is taken out of requests."""
    assert claims_identity(ASSERTION_HEADER)


def test_no_byte_can_be_changed() -> None:
    """A token with any byte of it replaced is refused: one token has one spelling."""
    for at, octet in enumerate(GOOD):
        changed = GOOD[:at] + (b"A" if octet != ord("A") else b"B") + GOOD[at + 1 :]
        with pytest.raises((RemoteProtocolError, VerificationFailed)):
            verify(changed)


TEXT = st.text(min_size=1, max_size=30)


@given(TEXT, TEXT, TEXT, st.integers(1, 3600), st.binary(min_size=32, max_size=32) | st.just(b""))
def test_any_claims_come_back(issuer: str, subject: str, target: str, life: int, thumbprint: bytes) -> None:
    """Whatever the text in it, an assertion comes back as it was made, and PyJWT takes its signature."""
    expires = NOW + timedelta(seconds=life)
    claims = Assertion(issuer, AUDIENCE, subject, "1", NOW, expires, thumbprint, "GET", target)
    data = sign_assertion(KEY, claims)
    assert verify(data) == claims
    options: Any = {"verify_exp": False, "verify_iat": False}
    assert jwt.decode(data, PRIVATE.public_key(), ["ES256"], audience=AUDIENCE, options=options)["sub"] == subject


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["iss", "aud", "sub", "jti", "iat", "exp", "cnf", "htm", "htu"])


@given(
    st.one_of(
        st.binary(max_size=200),
        st.tuples(st.binary(max_size=60), st.binary(max_size=60)).map(lambda parts: signed(*parts)),
        st.dictionaries(NAMES, JSON, max_size=4).map(lambda members: token(None, "", **members)),
        st.dictionaries(st.sampled_from(["alg", "kid", "typ"]), JSON).map(lambda members: token(HEADER | members)),
    )
)
def test_nothing_else_is_raised(data: bytes) -> None:
    """Whatever comes is refused with a reason, or is a token that the key's holder signed."""
    try:
        found = verify(data)
    except (RemoteProtocolError, VerificationFailed) as error:
        assert error.reason.code.startswith("assertion.")  # noqa: PT017  # either way out is right
    else:
        assert found.audience == AUDIENCE
