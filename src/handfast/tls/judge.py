"""OpenSSL as judge of a chain: the same verifier and settings for a handshake and for a file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from OpenSSL.crypto import X509, X509Store, X509StoreContext, X509StoreContextError, X509StoreFlags

from handfast.pki.verification import Judgement, TrustBundle
from handfast.tls.reasons import path_detail


class Judge:
    """Judges chains against one trust bundle, as of now, or as of `moment` (aware)."""

    def __init__(self, bundle: TrustBundle, moment: datetime | None = None) -> None:
        self._store = X509Store()
        for anchor in bundle.anchors:
            self._store.add_cert(X509.from_cryptography(anchor))
        self._store.set_flags(X509StoreFlags.PARTIAL_CHAIN)
        if moment is not None:  # OpenSSL compares with `time_t`; pyOpenSSL takes the naive form of UTC
            self._store.set_time(moment.replace(tzinfo=None))

    def __call__(self, chain: Sequence[x509.Certificate]) -> Judgement:
        """Return OpenSSL's word on `chain` (leaf first). Purpose and names are for pki.verify to judge."""
        rest = [X509.from_cryptography(certificate) for certificate in chain[1:]]
        try:
            path = X509StoreContext(self._store, X509.from_cryptography(chain[0]), rest).get_verified_chain()
        except X509StoreContextError as error:
            code, depth = (error.errors[0], error.errors[1]) if len(error.errors) > 1 else (0, 0)
            return Judgement((), path_detail(int(code), int(depth)))
        return Judgement(tuple(certificate.to_cryptography() for certificate in path))


def judge_offline(chain: Sequence[x509.Certificate], bundle: TrustBundle, now: datetime) -> Judgement:
    """Return OpenSSL's word on a chain that lies in a file (leaf first) at `now`."""
    return Judge(bundle, now)(chain)
