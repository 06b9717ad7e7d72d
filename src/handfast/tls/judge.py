"""OpenSSL as judge of a path: the same verifier and settings within a handshake, after one, and for a file.

OpenSSL follows the path and checks its signatures; who the peer is, `pki.verify` alone says. A handshake's own store
of anchors stays empty: what it presents is judged by a `Judge`, once, and what was judged before need not be again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509, Error, X509Store, X509StoreContext, X509StoreContextError, X509StoreFlags

from handfast.errors import VerificationFailed
from handfast.pki.verification import MAX_CHAIN, Judgement, TrustBundle, VerifiedPeer
from handfast.tls.engine import ffi, lib, path_of, step
from handfast.tls.reasons import alert_error, path_detail


class Judge:
    """Judges chains against one trust bundle, as of now, or as of `moment` (aware)."""

    def __init__(self, bundle: TrustBundle, moment: datetime | None = None) -> None:
        self._store = X509Store()
        for anchor in bundle.anchors:
            self._store.add_cert(X509.from_cryptography(anchor))
        # The anchors are what the operator chose, each an authority; one need not be self-signed to be trusted.
        self._store.set_flags(X509StoreFlags.PARTIAL_CHAIN)
        if moment is not None:  # OpenSSL compares with `time_t`; pyOpenSSL takes the naive form of UTC
            self._store.set_time(moment.replace(tzinfo=None))

    def __call__(self, chain: Sequence[x509.Certificate]) -> Judgement:
        """Return OpenSSL's word on `chain` (leaf first). Purpose and names are for pki.verify to judge."""
        if not 0 < len(chain) <= MAX_CHAIN:
            return Judgement((), "nothing, or too much, was presented")
        rest = [X509.from_cryptography(certificate) for certificate in chain[1:]]
        try:
            path = X509StoreContext(self._store, X509.from_cryptography(chain[0]), rest).get_verified_chain()
        except X509StoreContextError as error:
            code, depth = (error.errors[0], error.errors[1]) if len(error.errors) > 1 else (0, 0)
            return Judgement((), path_detail(int(code), int(depth)))
        return Judgement(tuple(certificate.to_cryptography() for certificate in path))


def judge_offline(chain: Sequence[x509.Certificate], bundle: TrustBundle, now: datetime) -> Judgement:
    """Return OpenSSL's word on a chain that lies in a file or a recording (leaf first) at `now`. Raises nothing."""
    try:
        return Judge(bundle, now)(chain)
    except Error:  # `cryptography` reads certificates that OpenSSL does not
        return Judgement((), "OpenSSL cannot read one of the certificates")


def judge_within(context: SSL.Context, *, optional: bool = False) -> None:
    """Have each handshake of a context judge the other side while it runs. Its connections need a `Judging` each.

    `optional`: a client may go without a certificate. A server never may.
    """
    _set_verify(context, SSL.VERIFY_PEER | (0 if optional else SSL.VERIFY_FAIL_IF_NO_PEER_CERT), _on_certificate)


def judge_later(context: SSL.Context) -> None:
    """Have the handshakes of a server's context ask for a certificate, and go on whatever comes.

    Who calls this must judge what was presented before the connection is of any use.
    """
    _set_verify(context, SSL.VERIFY_PEER, _go_on)
    # OpenSSL goes on all the same, but follows no path: no signature by keys of a stranger is verified.
    context.set_verify_depth(0)


class Judging:
    """One handshake in which the other side is judged; it fails closed, with the alert that fits.

    The judging is done at OpenSSL's first word, which is that it can follow the path no further: the store is empty. A
    client's own certificate has not gone out by then. `verify` gets the path in DER, leaf first, and says who the
    other side is, or raises VerificationFailed; what else it raises is a bug, and fails the handshake too.
    """

    __slots__ = ("_bug", "_verify", "path", "peer", "refused")

    def __init__(self, connection: SSL.Connection, verify: Callable[[tuple[bytes, ...]], VerifiedPeer]) -> None:
        self._verify = verify
        self._bug: Exception | None = None
        self.path: tuple[bytes, ...] = ()  # what was judged
        self.peer: VerifiedPeer | None = None
        self.refused: VerificationFailed | None = None
        connection.set_app_data(self)

    def step(self, connection: SSL.Connection, records: bytes) -> bool:
        """Go on with the handshake (b'' begins it); return whether it is finished.

        Raises SSL.Error, and what is a bug of ours.
        """
        try:
            return step(connection, records)
        except SSL.Error:
            if self._bug is not None:
                raise self._bug from None
            raise

    def on_certificate(self, store_context: Any) -> int:
        """OpenSSL has a word on the path; 1 lets it go on, 0 ends the handshake. Raises nothing."""
        if self.peer is not None:
            return 1
        try:
            self.path = path_of(store_context)
            self.peer = self._verify(self.path)
            return 1
        except VerificationFailed as refused:
            self.refused = refused
            lib.X509_STORE_CTX_set_error(store_context, alert_error(refused.failures[0].reason))
        except Exception as bug:  # CVE-2026-27448: an exception in a callback let the other side in
            self._bug = bug
        return 0


def _set_verify(context: SSL.Context, mode: int, callback: Any) -> None:
    context.set_verify_depth(MAX_CHAIN)
    # Not through pyOpenSSL's `set_verify`: its callback is told neither the path nor how to choose the alert.
    lib.SSL_CTX_set_verify(context._context, mode, callback)


# cffi returns `error` where one of these raises.
@ffi.callback("int (*)(int, X509_STORE_CTX *)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _on_certificate(_ok: int, store_context: Any) -> int:
    ssl = lib.X509_STORE_CTX_get_ex_data(store_context, lib.SSL_get_ex_data_X509_STORE_CTX_idx())
    judging = SSL.Connection._reverse_mapping[ssl].get_app_data()
    return judging.on_certificate(store_context) if isinstance(judging, Judging) else 0


@ffi.callback("int (*)(int, X509_STORE_CTX *)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _go_on(_ok: int, _store_context: Any) -> int:
    return 1
