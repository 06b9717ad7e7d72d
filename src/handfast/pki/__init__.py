"""Certificates without a network: names, keys, profiles, issuing, verification, revocation, PKCS#12.

Pure: it opens no socket and no file, and reads no clock, environment or random source. `now`, `serial`
and `signer` are arguments.
"""

from handfast.pki.verification import Identity, Purpose, Terms, TrustBundle, VerifiedPeer, verify

__all__ = ["Identity", "Purpose", "Terms", "TrustBundle", "VerifiedPeer", "verify"]
