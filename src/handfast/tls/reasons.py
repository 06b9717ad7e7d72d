"""OpenSSL's words turned into our reasons. The one place that knows them; handshakes in tests hold it.

pyOpenSSL hands out (library, function, reason) texts and no numbers; the texts are OpenSSL 3 and 4's.
"""

from __future__ import annotations

from OpenSSL import SSL

from handfast.errors import Failure, Reason

_BY_TEXT: tuple[tuple[str, Failure], ...] = (
    ("peer did not return a certificate", Failure(Reason.VERIFY_NO_CERTIFICATE)),
    ("http request", Failure(Reason.TLS_PLAIN_HTTP)),
    ("https proxy request", Failure(Reason.TLS_PLAIN_HTTP)),
    ("unsupported protocol", Failure(Reason.TLS_VERSION)),
    ("wrong version number", Failure(Reason.TLS_NOT_TLS)),
    ("wrong ssl version", Failure(Reason.TLS_NOT_TLS)),
    ("no shared cipher", Failure(Reason.TLS_NO_COMMON, {"what": "cipher suite"})),
    ("no suitable key share", Failure(Reason.TLS_NO_COMMON, {"what": "key exchange group"})),
    ("no shared group", Failure(Reason.TLS_NO_COMMON, {"what": "key exchange group"})),
    ("no suitable groups", Failure(Reason.TLS_NO_COMMON, {"what": "key exchange group"})),
    ("no suitable signature algorithm", Failure(Reason.TLS_NO_COMMON, {"what": "signature algorithm"})),
    ("no shared signature algorithms", Failure(Reason.TLS_NO_COMMON, {"what": "signature algorithm"})),
    ("no application protocol", Failure(Reason.TLS_NO_COMMON, {"what": "application protocol (ALPN)"})),
    ("bad signature", Failure(Reason.TLS_BAD_PROOF)),
    ("unexpected eof while reading", Failure(Reason.TLS_CLOSED)),
)

# X509_V_ERR_*, openssl/x509_vfy.h: what a diagnosis of ours may not find.
_PATH_ERRORS = {
    2: "an issuer is missing",
    5: "the certificate's signature cannot be decoded",
    7: "a signature is wrong",
    9: "a certificate is not valid yet",
    10: "a certificate has expired",
    18: "the certificate is self-signed",
    19: "the chain ends in a root that is not trusted",
    20: "an issuer is not known",
    21: "the chain cannot be followed",
    22: "the chain is too long",
    24: "an issuer is not a certificate authority",
    25: "a path length is exceeded",
    26: "the certificate is for another purpose",
    47: "a name is outside the issuer's name constraints",
    48: "a name is excluded by the issuer's name constraints",
    51: "a name constraint is of a kind that is not supported",
    52: "a name constraint is malformed",
    53: "a name is of a form that name constraints cannot judge",
    66: "the certificate's key is too weak",
    67: "an issuer's key is too weak",
    68: "a signature's hash is too weak",
}


def handshake_failure(error: SSL.Error) -> Failure:
    """Return why a handshake, or a channel after it, broke."""
    if isinstance(error, SSL.SysCallError):
        return Failure(Reason.TLS_CLOSED)
    text = _text(error)
    for words, failure in _BY_TEXT:
        if words in text:
            return failure
    if " alert " in f" {text} ":
        alert = text.rpartition("alert ")[2]
        return Failure(Reason.TLS_ALERT, {"alert": alert.replace(" ", "_"), "detail": "see its own log"})
    return Failure(Reason.TLS_HANDSHAKE, {"detail": text or "no reason given"})


# The error of OpenSSL's that makes it send the alert that fits (ssl_x509err2alert); any other refusal of ours is
# 47, which becomes certificate_unknown.
_ALERT_ERRORS = {
    Reason.VERIFY_EXPIRED: 10,
    Reason.VERIFY_NOT_YET_VALID: 9,
    Reason.VERIFY_REVOKED: 23,
    Reason.VERIFY_UNKNOWN_ISSUER: 20,
    Reason.VERIFY_PURPOSE: 26,
    Reason.VERIFY_NO_EKU: 26,
    Reason.VERIFY_CA_AS_LEAF: 26,
    Reason.VERIFY_KEY_USAGE: 26,
    Reason.VERIFY_BAD_SIGNATURE: 7,
    Reason.VERIFY_NOT_A_CA: 79,
    Reason.VERIFY_PATH_LENGTH: 25,
    Reason.VERIFY_CHAIN_TOO_LONG: 22,
    Reason.VERIFY_MALFORMED: 28,
}


def alert_error(reason: Reason) -> int:
    """Return the X509_V_ERR_* with which a handshake that we refuse for `reason` gives the right alert."""
    return _ALERT_ERRORS.get(reason, 47)


def path_detail(error: int, depth: int) -> str:
    """Say what OpenSSL found wrong with a path, at the certificate `depth` steps from the leaf."""
    return f"{_PATH_ERRORS.get(error, f'X509_V_ERR {error}')} (certificate {depth} of the chain)"


def _text(error: SSL.Error) -> str:
    """The last reason in OpenSSL's queue, in lower case."""
    if error.args and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][-1][-1]).lower()
    return ""
