"""OpenSSL as judge of a chain that lies in a file: the same verifier, with the same settings, as in a handshake."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from OpenSSL.crypto import X509, X509Store, X509StoreContext, X509StoreContextError, X509StoreFlags

from handfast.pki.verification import Judgement, TrustBundle
from handfast.tls.reasons import path_detail


def judge_offline(chain: Sequence[x509.Certificate], bundle: TrustBundle, now: datetime) -> Judgement:
    """Return OpenSSL's word on `chain` (leaf first) at `now`. Purpose and names are for pki.verify to judge."""
    store = X509Store()
    for anchor in bundle.anchors:
        store.add_cert(X509.from_cryptography(anchor))
    store.set_flags(X509StoreFlags.PARTIAL_CHAIN)
    # OpenSSL compares with `time_t`; pyOpenSSL takes the naive form of UTC.
    store.set_time(now.replace(tzinfo=None))
    rest = [X509.from_cryptography(certificate) for certificate in chain[1:]]
    try:
        path = X509StoreContext(store, X509.from_cryptography(chain[0]), rest).get_verified_chain()
    except X509StoreContextError as error:
        code, depth = (error.errors[0], error.errors[1]) if len(error.errors) > 1 else (0, 0)
        return Judgement((), path_detail(int(code), int(depth)))
    return Judgement(tuple(certificate.to_cryptography() for certificate in path))
