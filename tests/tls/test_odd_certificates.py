"""Certificates that OpenSSL reads and the library that judges them does not: refused for what they are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

from handfast.errors import Reason
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.credential import Credential
from handfast.tls.engine import ffi, lib, step, take
from handfast.tls.server import Accepted, Refused, ServerContext, ServerSettings
from tests.support.certs import Ca

KEY = ec.generate_private_key(ec.SECP256R1())
VERSION = bytes.fromhex("a003020102")  # [0] INTEGER 2: version 3
MONTH = b"\x17\x0d"  # UTCTime of 13 bytes: YYMMDDHHMMSSZ


def _plain() -> bytes:
    """A certificate that a stranger signed for himself, in DER."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stranger")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, KEY.public_key(), 5, now - timedelta(1), now + timedelta(1))
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _of_version_6() -> bytes:
    return _plain().replace(VERSION, VERSION[:-1] + b"\x05")


def _of_month_13() -> bytes:
    der = _plain()
    at = der.index(MONTH) + len(MONTH) + 2
    return der[:at] + b"13" + der[at + 2 :]


def _shown_to(context: ServerContext, der: bytes) -> Accepted | Refused:
    """What a server says to a client that shows these bytes as its certificate."""
    ours = SSL.Context(SSL.TLS_CLIENT_METHOD)
    bio = lib.BIO_new_mem_buf(ffi.from_buffer(der), len(der))
    certificate = ffi.gc(lib.d2i_X509_bio(bio, ffi.NULL), lib.X509_free)
    lib.BIO_free(bio)
    assert certificate != ffi.NULL, "OpenSSL reads it"
    assert lib.SSL_CTX_use_certificate(ours._context, certificate) == 1
    ours.use_privatekey(KEY)
    client = SSL.Connection(ours, None)
    client.set_connect_state()
    server, records = context.accept(lambda: datetime.now(UTC)), b""
    while True:
        step(client, records)
        outcome = server.feed(take(client))
        if outcome is not None:
            return outcome
        records = server.take()


@pytest.mark.parametrize("answer_refusals", [True, False])
@pytest.mark.parametrize(
    ("der", "reason"),
    [
        (_of_version_6(), Reason.VERIFY_MALFORMED),
        (_of_month_13(), Reason.VERIFY_MALFORMED),
        (_plain(), Reason.VERIFY_UNKNOWN_ISSUER),
    ],
    ids=["version", "month", "plain"],
)
def test_a_certificate_that_cannot_be_read_is_refused_as_that(
    answer_refusals: bool, der: bytes, reason: Reason
) -> None:
    """It is neither a bug of ours nor "no certificate"; one that can be read is refused for its issuer."""
    root = Ca.root()
    server = root.server()
    terms = Terms(TrustBundle((root.certificate,)), Purpose.CLIENT)
    settings = ServerSettings(answer_refusals=answer_refusals)
    outcome = _shown_to(ServerContext(Credential(server.key, server.presented), terms, settings), der)
    assert isinstance(outcome, Refused)
    assert outcome.failures[0].reason is reason
