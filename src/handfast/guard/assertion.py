"""Signed assertions of who called, made while the guard runs: the key, the clock and the ids that `wire` has not."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from handfast.errors import InvalidInput, Reason
from handfast.files import generate_key, load_key
from handfast.guard.schema import AssertionConfig
from handfast.pki.keys import KeyType, same_key
from handfast.pki.verification import VerifiedPeer
from handfast.wire.assertion import ASSERTION_HEADER, Assertion, assertion_key, jwks, sign_assertion
from handfast.wire.http1 import Header


class Minter:
    """Signs assertions with one key. `renew_after`: seconds that one may be used for. Raises InvalidInput."""

    def __init__(self, config: AssertionConfig) -> None:
        key = generate_key(KeyType.P256) if config.key is None else load_key(config.key)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise InvalidInput(Reason.INPUT_NOT_KEY, what=str(config.key), detail="ES256 needs a P-256 key")
        self._config = config
        self._key = assertion_key(key)
        self._lifetime = config.lifetime
        self.renew_after = config.lifetime.total_seconds() / 2

    def header(self, peer: VerifiedPeer, authority: str, now: datetime) -> Header:
        """Return the header that says, signed, that `peer`, for whom `authority` vouches, called through this guard."""
        claims = Assertion(
            issuer=self._config.issuer,
            audience=self._config.audience or self._config.issuer,
            subject=str(peer.identity.name),
            id=secrets.token_hex(16),
            issued=now,
            expires=now + self._lifetime,
            thumbprint=peer.leaf.fingerprint(hashes.SHA256()),
            authority=authority,
        )
        return ASSERTION_HEADER, sign_assertion(self._key, claims)

    def has_key_of(self, config: AssertionConfig) -> bool:
        """Whether it signs with the key that the configuration names. Raises InvalidInput."""
        return config.key is None or same_key(load_key(config.key).public_key(), self._key.private.public_key())

    def jwks(self) -> dict[str, Any]:
        """Return the key set to publish (RFC 7517 5)."""
        return jwks([self._key.private.public_key()])
