"""Everything that can go wrong, in one tree and one table.

A `Reason` is stable: its code is what logs, JSON and HTTP answers carry. The table row says what
it means in words, what to do next, and how it leaves the program (exit code, HTTP status).

    HandfastError            .reason  .facts  .message  .hint
      InvalidInput           what we were given does not parse
      RemoteProtocolError    the peer broke the rules of a protocol
      VerificationFailed     a chain that does not prove who it claims to be; .failures has every reason
      IssuanceRefused        the order breaks its profile
      StoreError             disk and ledger: missing, locked, corrupt, full, too open
      Unreachable            network, not peer
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum
from typing import Any


class Exit(IntEnum):
    """Exit codes of the command; they do not change."""

    OK = 0
    BUG = 1
    USAGE = 2
    REFUSED = 3
    NOT_FOUND = 4
    STORE = 5
    UNREACHABLE = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table. `message` and `hint` are format strings over the error's facts."""

    code: str
    message: str
    hint: str
    exit: Exit
    http: int = 0  # the status a client of the guard sees; 0: never answered over HTTP


def _input(code: str, message: str, hint: str = "", exit: Exit = Exit.USAGE) -> Row:
    return Row(f"input.{code}", message, hint, exit)


def _verify(code: str, message: str, hint: str = "", http: int = 403) -> Row:
    # RFC 9110 15.5.2: a 401 names a scheme of authentication, and none stands for a certificate
    return Row(f"verify.{code}", message, hint, Exit.REFUSED, http)


def _issue(code: str, message: str, hint: str = "") -> Row:
    return Row(f"issue.{code}", message, hint, Exit.REFUSED)


def _store(code: str, message: str, hint: str = "", exit: Exit = Exit.STORE) -> Row:
    return Row(f"store.{code}", message, hint, exit)


def _http(code: str, message: str, http: int = 400, hint: str = "") -> Row:
    return Row(f"http.{code}", message, hint, Exit.REFUSED, http)


def _tls(code: str, message: str, hint: str = "", http: int = 0) -> Row:
    return Row(f"tls.{code}", message, hint, Exit.REFUSED, http)


def _limit(code: str, message: str) -> Row:
    hint = "if that is wanted, raise {setting} of the listener {listener}; if not, look at what calls"
    return Row(f"limit.{code}", message, hint, Exit.REFUSED, 429)  # RFC 6585 4


def _seen(code: str, message: str, hint: str = "") -> Row:
    return Row(f"seen.{code}", message, hint, Exit.REFUSED)


class Reason(Enum):
    """Every reason that handfast gives; the value is its table row."""

    BUG = Row(
        "bug",
        "handfast failed in a way it should not: {detail}",
        "please report it, with the command and this line; HANDFAST_DEBUG=1 shows where it happened",
        Exit.BUG,
        500,
    )
    USAGE = Row("usage", "{detail}", "{help}", Exit.USAGE)
    INTERRUPTED = Row("interrupted", "interrupted before it was done", "", Exit.REFUSED)

    # What we were given.
    INPUT_MISSING = _input("missing", "{path}: no such file", "check the path", Exit.NOT_FOUND)
    INPUT_UNREADABLE = _input("unreadable", "{path}: cannot be read ({detail})", "check its owner and mode")
    INPUT_EMPTY = _input("empty", "{what} is empty", "was it written whole?")
    INPUT_TOO_LARGE = _input("too_large", "{what} is larger than {limit} bytes, more than any {kind} needs")
    INPUT_NOT_CERTIFICATE = _input(
        "not_certificate", "{what} holds no certificate ({detail})", "a certificate is PEM (BEGIN CERTIFICATE) or DER"
    )
    INPUT_NOT_KEY = _input(
        "not_key", "{what} holds no private key ({detail})", "a key is PEM (BEGIN PRIVATE KEY) or DER"
    )
    INPUT_NOT_CSR = _input(
        "not_csr", "{what} holds no certificate signing request ({detail})", "make one: openssl req -new -key my.key"
    )
    INPUT_NOT_CRL = _input("not_crl", "{what} holds no certificate revocation list ({detail})")
    INPUT_NOT_P12 = _input("not_p12", "{what} is not a PKCS#12 file that this password opens")
    INPUT_UNKNOWN_FILE = _input(
        "unknown_file", "{what} is neither a certificate, a key, a request, a revocation list nor PKCS#12"
    )
    INPUT_KEY_ENCRYPTED = _input(
        "key_encrypted", "{what} is encrypted and needs its passphrase", "give it with --passphrase-file F"
    )
    INPUT_WRONG_PASSPHRASE = _input(
        "wrong_passphrase",
        "the passphrase does not open {what}",
        "give the right one with --passphrase-file F, or HANDFAST_PASSPHRASE",
    )
    INPUT_KEY_MISMATCH = _input(
        "key_mismatch", "the key in {key} does not belong to the certificate in {cert}", "compare: handfast inspect F"
    )
    INPUT_NAME = _input(
        "name", "{value!r} is not a name: {detail}", "names look like web, web.example.com, spiffe://domain/web"
    )
    INPUT_PATTERN = _input(
        "pattern",
        "{value!r} is not a pattern: {detail}",
        "patterns look like web, spiffe://domain/web/*, dns:*.internal, email:a@b.c, cn:NAME, sha256:HEX, any",
    )
    INPUT_RULE = _input("rule", "{value!r} is not a rule: {detail}", "rules look like: allow web GET,HEAD /public/**")
    INPUT_ADDRESS = _input("address", "{value!r} is not an address: {detail}", "addresses look like 127.0.0.1:8443")
    INPUT_TARGET = _input(
        "target",
        "{value!r} is not a place to forward to: {detail}",
        "targets look like 127.0.0.1:8000, http://host:8000, unix:/run/app.sock, tcp://127.0.0.1:5432",
    )
    INPUT_LIFETIME = _input("lifetime", "{value!r} is not a length of time", "write 90s, 15m, 24h or 7d")
    INPUT_TIME = _input("time", "{value!r} is not a time", "write 2026-11-21 or 2026-11-21T12:00:00Z")
    INPUT_NO_PASSPHRASE = _input(
        "no_passphrase", "a passphrase is needed and there is no terminal to ask on", "give --passphrase-file F"
    )
    INPUT_BAD_PASSPHRASE = _input("bad_passphrase", "this passphrase cannot be used: {detail}", "choose another")
    INPUT_NO_CHAIN = _input(
        "no_chain",
        "{cert} is not self-signed, and the certificates up to its root were not given ({detail})",
        "give the authorities above it in one PEM file: --chain F",
    )
    INPUT_CONFIG = _input("config", "{path}: {detail}", "see every key, and what it takes: handfast guard --keys")
    INPUT_NOT_CAPTURE = _input(
        "not_capture",
        "{what} is no recording of a network ({detail})",
        "one is made by: tcpdump -w FILE, or --pcap FILE",
    )
    INPUT_NO_HANDSHAKE = _input(
        "no_handshake", "{what} holds no TLS connection", "was it recorded from the connection's beginning?"
    )
    INPUT_REASON = _input("reason", "no reason is called {value!r}", "see all of them: handfast explain --reason list")

    # What a chain proves, or does not.
    VERIFY_NO_CERTIFICATE = _verify(
        "no_certificate",
        "no client certificate was presented",
        "present one: curl --cert client.crt --key client.key",
    )
    VERIFY_MALFORMED = _verify("malformed", "the certificate cannot be read: {detail}")
    VERIFY_UNKNOWN_ISSUER = _verify(
        "unknown_issuer",
        "{subject} was issued by {issuer}, which is not in the trust bundle",
        "add that authority to the bundle; if it stands below one in it, have its certificate sent after the leaf",
    )
    VERIFY_BAD_SIGNATURE = _verify(
        "bad_signature", "the signature on {subject} was not made by {issuer}", "the certificate was altered or forged"
    )
    VERIFY_EXPIRED = _verify("expired", "{subject} expired on {not_after}", "issue a new one: handfast issue NAME")
    VERIFY_NOT_YET_VALID = _verify(
        "not_yet_valid", "{subject} is not valid before {not_before}", "check the clocks on both sides"
    )
    VERIFY_REVOKED = _verify(
        "revoked", "{subject} (serial {serial}) was revoked", "issue a new one if it was a mistake"
    )
    VERIFY_CRL_MISSING = _verify(
        "crl_missing", "there is no revocation list of {issuer}", "give one for each issuer, or none at all"
    )
    VERIFY_CRL_STALE = _verify(
        "crl_stale", "the revocation list of {issuer} was due for renewal on {next_update}", "fetch a fresh one"
    )
    VERIFY_CRL_OLDER = _verify(
        "crl_older",
        "the revocation list of {issuer} ({given}) is older than one that was in force before ({held})",
        "fetch the newest; if it is meant, start the guard again",
    )
    VERIFY_CRL_INVALID = _verify("crl_invalid", "the revocation list of {issuer} cannot be trusted: {detail}")
    VERIFY_NO_EKU = _verify(
        "no_eku",
        "{subject} does not say what it is for (no extended key usage), so it is refused for {purpose} use",
        "reissue it with {purpose}Auth, or admit such certificates with --legacy-certs (legacy_certs = true in a file)",
    )
    VERIFY_PURPOSE = _verify(
        "purpose",
        "{subject} is not for {purpose} use (it is for {usages})",
        "issue one: handfast issue --profile {purpose}",
    )
    VERIFY_KEY_USAGE = _verify("key_usage", "the key of {subject} may not be used for {usage}")
    VERIFY_NO_NAME = _verify(
        "no_name",
        "{subject} carries no subject alternative name, so it names nobody",
        "reissue it with a name, or admit such by their CN with --legacy-certs (legacy_certs = true in a file)",
    )
    VERIFY_FORBIDDEN_NAME = _verify("forbidden_name", "{subject} carries a name that no certificate may carry: {name}")
    VERIFY_SVID_NAMES = _verify("svid_names", "{subject} carries {count} URI names; a peer has one (X509-SVID 2)")
    VERIFY_TRUST_DOMAIN = _verify(
        "trust_domain", "{name} is outside the trust domain {trust_domain}, all that its authority may vouch for"
    )
    VERIFY_NAME_MISMATCH = _verify("name_mismatch", "the certificate is for {names}, not for {name}")
    VERIFY_NAME_CONSTRAINT = _verify("name_constraint", "{issuer} may not issue for {name}")
    VERIFY_NOT_A_CA = _verify("not_a_ca", "{issuer} signed {subject} but is not a certificate authority")
    VERIFY_CA_AS_LEAF = _verify("ca_as_leaf", "{subject} is an authority's certificate; it cannot be used as a peer's")
    VERIFY_PATH_LENGTH = _verify("path_length", "the chain below {issuer} is longer than it allows ({limit})")
    VERIFY_CHAIN_TOO_LONG = _verify("chain_too_long", "the chain has {count} certificates, more than {limit}")
    VERIFY_DEPTH = _verify(
        "depth", "{count} authorities stand between {subject} and its root; {limit} may", "raise --verify-depth"
    )
    VERIFY_WEAK_KEY = _verify("weak_key", "the key of {subject} is too weak: {detail}")
    VERIFY_WEAK_HASH = _verify("weak_hash", "{subject} is signed with {hash}, which is broken")
    VERIFY_CRITICAL_EXTENSION = _verify(
        "critical_extension", "{subject} has a critical extension that is not understood ({oid})"
    )
    VERIFY_JUDGE = _verify("judge", "the verifier refused the chain: {detail}")
    VERIFY_OCSP_UNAVAILABLE = _verify(
        "ocsp_unavailable",
        "nobody says whether {subject} was revoked: {detail}",
        "is the authority's OCSP responder up, and may it be asked from here?",
        http=503,
    )
    VERIFY_OCSP_INVALID = _verify(
        "ocsp_invalid",
        "the OCSP answer about {subject} is not good: {detail}",
        "tell whoever runs the authority's responder",
    )

    # What may be issued.
    ISSUE_CSR_SIGNATURE = _issue("csr_signature", "the request is not signed by its own key", "make it anew")
    ISSUE_WEAK_KEY = _issue(
        "weak_key", "the key is too weak: {detail}", "use P-256: openssl ecparam -genkey -name prime256v1"
    )
    ISSUE_WEAK_HASH = _issue(
        "weak_hash", "the request is signed with {hash}; SHA-256 or better is asked", "openssl req -new -sha256"
    )
    ISSUE_KEY_TYPE = _issue("key_type", "profile {profile} takes no {value} key; it takes {allowed}")
    ISSUE_NAME_NOT_AUTHORIZED = _issue(
        "name_not_authorized",
        "the request asks for {value}; it may only be for {allowed}",
        "give --name {value} to allow it",
    )
    ISSUE_NAME_KIND = _issue("name_kind", "profile {profile} takes no name like {value}; it takes {allowed}")
    ISSUE_NO_NAME = _issue("no_name", "a {profile} certificate needs at least one name")
    ISSUE_TOO_MANY_NAMES = _issue("too_many_names", "{value} names are asked for; {allowed} are allowed")
    ISSUE_LIFETIME = _issue(
        "lifetime",
        "a lifetime of {value} is asked for; this authority allows {allowed} for {profile}",
        "ask for less, or allow more: handfast authority set --max-lifetime TIME",
    )
    ISSUE_ISSUER_EXPIRED = _issue(
        "issuer_expired", "the issuer's own certificate expired on {not_after}, so it can sign nothing"
    )
    ISSUE_ISSUER_NOT_CA = _issue("issuer_not_ca", "{subject} is not a certificate authority: {detail}")
    ISSUE_NAME_CONSTRAINT = _issue("name_constraint", "the issuer is constrained and may not issue for {value}")
    ISSUE_TRUST_DOMAIN = _issue("trust_domain", "{value} is outside this authority's trust domain, {allowed}")
    ISSUE_LINT = _issue("lint", "the certificate about to be signed breaks its profile: {detail}")
    ISSUE_AUTHORIZATION_SPENT = _issue(
        "authorization_spent", "this authorization has been used; one authorization is good for one certificate"
    )
    ISSUE_AUTHORIZATION_EXPIRED = _issue("authorization_expired", "this authorization ended on {expires}")
    ISSUE_PROFILE_NOT_AUTHORIZED = _issue(
        "profile_not_authorized", "profile {value} is asked for; the authorization is for {allowed}"
    )
    ISSUE_ISSUER_NOT_YET_VALID = _issue(
        "issuer_not_yet_valid", "the issuer's own certificate is not valid before {not_before}", "check the clock"
    )
    ISSUE_ISSUER_LIMITED = _issue("issuer_limited", "{subject} may not issue this: {detail}")
    ISSUE_URI_COUNT = _issue(
        "uri_count", "a {profile} certificate carries {allowed} URI name (X509-SVID 2); {value} are asked for"
    )

    # Disk and ledger.
    STORE_NO_AUTHORITY = _store(
        "no_authority", "there is no authority in {path}", "make one: handfast authority init", Exit.NOT_FOUND
    )
    STORE_EXISTS = _store(
        "exists", "{path} exists already", "choose another place, or move it away first", Exit.REFUSED
    )
    STORE_NO_CERTIFICATE = _store(
        "no_certificate", "no certificate is known by {value}", "see what there is: handfast list", Exit.NOT_FOUND
    )
    STORE_AMBIGUOUS = _store(
        "ambiguous", "{value} fits {count} certificates", "give more of the serial: handfast list", Exit.USAGE
    )
    STORE_ALREADY_REVOKED = _store("already_revoked", "{value} was revoked already, on {when}", "", Exit.REFUSED)
    STORE_LOCKED = _store(
        "locked", "{path} is in use by another handfast", "wait for it to end, or give another --state DIR"
    )
    STORE_TOO_OPEN = _store(
        "too_open",
        "{path} can be read by others (mode {mode}), so its keys are not secret",
        "close it: chmod {want} {path}",
    )
    STORE_READ_ONLY = _store(
        "read_only", "{path} cannot be written ({detail})", "check its owner and mode, or give --state DIR"
    )
    STORE_FULL = _store("full", "no space left on the disk for {path}", "free some space; nothing was lost")
    STORE_CORRUPT = _store("corrupt", "{path} is damaged: {detail}", "restore it from a copy")
    STORE_SCHEMA_NEWER = _store(
        "schema_newer",
        "{path} was written by a newer handfast (schema {found}; this one knows {known})",
        "upgrade handfast",
    )
    STORE_DISK = _store("disk", "{path}: {detail}")
    STORE_NOT_OURS = _store(
        "not_ours",
        "{path} belongs to another user (uid {owner}, we are {me}), who could read or change its keys",
        "run as its owner, or choose another place with --state DIR",
    )
    STORE_SERIAL_TAKEN = _store(
        "serial_taken",
        "the serial {serial} was drawn twice, so this machine's randomness cannot be trusted",
        "nothing was signed; was this machine cloned or brought back from a snapshot while it ran?",
    )

    # Who may do what.
    POLICY_RULE_MATCHED = Row("policy.rule_matched", "the rule {rule} matched", "", Exit.OK)
    POLICY_DENIED = Row("policy.denied", "the rule {rule} denies it", "change the rule", Exit.REFUSED, 403)
    POLICY_NO_RULE = Row(
        "policy.no_rule",
        "no rule allows {who}",
        "allow it: --allow '{who}'",
        Exit.REFUSED,
        403,
    )

    POLICY_OPEN_ROUTE = Row("policy.open_route", "the route is open to clients without a certificate", "", Exit.OK)

    # HTTP between a client and the guard.
    HTTP_REQUEST_LINE = _http("request_line", "the request line is not HTTP/1.1")
    HTTP_VERSION = _http("version", "this version of HTTP is not taken here: {detail}", 505)
    HTTP_METHOD = _http("method", "the method {method} is not forwarded", 405)
    HTTP_HEADER = _http("header", "a header line is malformed: {detail}")
    HTTP_FRAMING = _http("framing", "Content-Length and Transfer-Encoding do not frame one body: {detail}")
    HTTP_CHUNK = _http("chunk", "a chunk is malformed: {detail}")
    HTTP_HOST = _http("host", "there must be exactly one valid Host header")
    HTTP_TARGET = _http("target", "the request target is malformed or not in origin form")
    HTTP_AMBIGUOUS_PATH = _http("ambiguous_path", "the path can be read in two ways, so no path rule can judge it")
    HTTP_MISDIRECTED = _http("misdirected", "the Host header and the TLS server name differ", 421)
    HTTP_NO_ROUTE = _http("no_route", "no route covers the request", 404)
    HTTP_HEAD_TOO_LARGE = _http("head_too_large", "the request head is larger than {limit} bytes", 431)
    HTTP_EXPECTATION = _http("expectation", "only Expect: 100-continue is understood", 417)
    HTTP_BODY_TOO_LARGE = _http("body_too_large", "the request's body is larger than {limit} bytes", 413)
    HTTP_TIMEOUT = _http("timeout", "the request did not arrive in time", 408)
    HTTP_TOO_MANY_HEADERS = _http("too_many_headers", "the request has more than {limit} header lines", 431)
    HTTP_H2 = _http("h2", "the client does not keep to HTTP/2: {detail}")
    HTTP_H2_FLOOD = _http("h2_flood", "the client sends more {what} than one that means well", 429)

    # The app behind the guard.
    UPSTREAM_DOWN = Row(
        "upstream.down", "the app at {target} cannot be reached ({detail})", "start it", Exit.UNREACHABLE, 502
    )
    UPSTREAM_TLS = Row(
        "upstream.tls",
        "no TLS with {target}: {detail}",
        "handfast inspect HOST:PORT shows it; in a file of handfast guard, ca = FILE in [upstream.NAME] trusts its "
        "authority, and server_name or expect names it",
        Exit.UNREACHABLE,
        502,
    )
    UPSTREAM_BUG = Row(
        "upstream.bug",
        "handfast failed in a way it should not, on its way to {target}: {detail}",
        "please report it, with the request's line of the log",
        Exit.BUG,
        502,
    )
    UPSTREAM_TIMEOUT = Row(
        "upstream.timeout", "the app at {target} did not answer in {limit} s", "", Exit.UNREACHABLE, 504
    )
    UPSTREAM_BAD_RESPONSE = Row(
        "upstream.bad_response",
        "the app at {target} gave no good answer ({detail})",
        "",
        Exit.UNREACHABLE,
        502,
    )

    # The handshake.
    TLS_PLAIN_HTTP = _tls("plain_http", "the client spoke plain HTTP to a TLS port", "use https://", 400)
    TLS_NOT_TLS = _tls("not_tls", "the other side did not speak TLS")
    TLS_HANDSHAKE = _tls("handshake", "the handshake failed: {detail}")
    TLS_ALERT = _tls("alert", "the peer ended the handshake with the alert {alert}: {detail}")
    TLS_VERSION = _tls(
        "version",
        "the client offers no TLS version that is allowed here",
        'TLS 1.3 is asked for; --tls-min 1.2 (tls_min = "1.2" in a file) takes the older one too',
    )
    TLS_NO_COMMON = _tls("no_common", "client and server share no {what}")
    TLS_BAD_PROOF = _tls("bad_proof", "the client could not prove that it holds its certificate's key")
    TLS_UNKNOWN_NAME = _tls("unknown_name", "no site here is called {name}", "ask for a name that this guard serves")
    TLS_TIMEOUT = _tls("timeout", "the handshake was not done in {limit} s")
    TLS_CLOSED = _tls("closed", "the client closed the connection during the handshake")
    TLS_BAD_HELLO = _tls("bad_hello", "the client's first message is malformed: {detail}")
    PROXY_MALFORMED = Row(
        "proxy.malformed",
        "the PROXY header is malformed: {detail}",
        "does the proxy in front send PROXY headers to this address?",
        Exit.REFUSED,
    )

    # What an explanation finds, seen from outside.
    SEEN_NO_TLS = _seen(
        "no_tls", "what answers there does not speak TLS: {detail}", "check the port; some protocols begin TLS later"
    )
    SEEN_CUT = _seen(
        "cut",
        "the connection was closed {when}, without a word",
        "ask who stands between; read the log of the other side",
    )
    SEEN_REFUSED = _seen(
        "refused",
        "the certificate was refused, and the other side does not say why",
        "its log says more; handfast verify LEAF --bundle ITS-CA says what its authorities prove",
    )
    SEEN_NOT_MUTUAL = Row(
        "seen.not_mutual", "the server asks for no client certificate, so this is not mutual TLS", "", Exit.OK
    )
    SEEN_SEALED = Row(
        "seen.sealed",
        "what came of the handshake is encrypted, and the secrets that open it are not there",
        "give the key log of either side: handfast explain RECORDING --keylog FILE",
        Exit.USAGE,
    )
    SEEN_NOBODY = Row(
        "seen.nobody",
        "no client came to {place} within {limit} s",
        "was the client told to call {place}? wait longer with --timeout SECONDS; without it, until Ctrl-C",
        Exit.UNREACHABLE,
    )

    # A connection that was good and is not any more; and the guard itself.
    ENDED_EXPIRED = Row("ended.expired", "the peer's certificate expired during the connection", "", Exit.REFUSED, 403)
    ENDED_REVOKED = Row(
        "ended.revoked", "the peer's certificate was revoked during the connection", "", Exit.REFUSED, 403
    )
    ENDED_POLICY = Row("ended.policy", "the policy does not allow the peer any more", "", Exit.REFUSED, 403)
    ENDED_IDLE = Row("ended.idle", "nothing was sent for {limit} s", "", Exit.OK)
    ENDED_STOPPED = Row(
        "ended.stopped", "the guard was told to stop, and this was not done {limit} s later", "raise drain", Exit.OK
    )
    GUARD_LOG_FAILED = Row(
        "guard.log_failed",
        "the log cannot be written, so nothing is forwarded",
        "free the disk the log is on",
        Exit.STORE,
        503,
    )
    GUARD_RESTART = Row(
        "guard.restart",
        "this cannot change while the guard runs: {what}",
        "restart it, or hand over to a new one with kill -USR2",
        Exit.USAGE,
    )
    GUARD_SITES = Row("guard.sites", "the sites do not fit together: {detail}", "", Exit.USAGE)
    GUARD_NO_BUNDLE = Row(
        "guard.no_bundle", "no client authority is given, so nobody could be let in", "give --client-ca F", Exit.USAGE
    )
    GUARD_LISTEN = Row(
        "guard.listen",
        "cannot listen on {address}: {detail}",
        "choose another with --listen HOST:PORT",
        Exit.UNREACHABLE,
    )
    GUARD_SOCKETS = Row(
        "guard.sockets",
        "the sockets handed to this process cannot be used: {detail}",
        "look at the service's .socket unit, or at what started this process",
        Exit.USAGE,
    )
    GUARD_HANDOVER = Row(
        "guard.handover",
        "the new process did not take over: {detail}",
        "the old one serves on; mend the cause and send SIGUSR2 again",
        Exit.REFUSED,
    )
    GUARD_WORKER_DIED = Row(
        "guard.worker_died", "{worker} ended unasked ({how})", "what it said last stands above in the log", Exit.BUG
    )
    GUARD_WORKER_STUCK = Row(
        "guard.worker_stuck", "{worker} did not stop within {limit} s and was killed", "", Exit.BUG
    )
    GUARD_PRIVILEGES = Row(
        "guard.privileges",
        "cannot run as the user {user}: {detail}",
        "start as root, or as that user without asking for a change",
        Exit.USAGE,
    )
    GUARD_SANDBOX = Row("guard.sandbox", "this process cannot be confined: {detail}", "", Exit.USAGE)

    # How much a listener takes, and where a guard is watched.
    LIMIT_CONNECTIONS = _limit(
        "connections", "{who} has as many connections open as the listener {listener} allows ({setting} = {limit})"
    )
    LIMIT_HANDSHAKES = _limit(
        "handshakes", "{who} connects more often than the listener {listener} allows ({setting}: {limit})"
    )
    LIMIT_REQUESTS = _limit(
        "requests", "{who} sends more requests than the listener {listener} allows ({setting}: {limit})"
    )
    ADMIN_UNREACHABLE = Row(
        "admin.unreachable",
        "no guard answers at {target}: {detail}",
        "is it running, with its admin listener there? give another address: handfast status --admin HOST:PORT",
        Exit.UNREACHABLE,
    )
    ADMIN_NOT_OURS = Row(
        "admin.not_ours",
        "what answers at {target} is not the admin listener of a guard ({detail})",
        "give its address: handfast status --admin HOST:PORT",
        Exit.UNREACHABLE,
    )

    # The connector: what the far side does, and what the local side may not. `next` is the command to give.
    CONNECT_REFUSED = Row(
        "connect.refused", "the server refused our certificate: {detail}", "{next}", Exit.REFUSED, 502
    )
    CONNECT_UNTRUSTED = Row("connect.untrusted", "we do not trust the server: {detail}", "{next}", Exit.REFUSED, 502)
    CONNECT_HANDSHAKE = Row("connect.handshake", "no TLS with the server: {detail}", "{next}", Exit.REFUSED, 502)
    CONNECT_SILENT = Row(
        "connect.silent",
        "the server closed the connection before its first byte: {detail}",
        "{next}",
        Exit.REFUSED,
        502,
    )
    CONNECT_UNREACHABLE = Row(
        "connect.unreachable", "the server cannot be reached: {detail}", "{next}", Exit.UNREACHABLE, 502
    )
    CONNECT_FULL = Row(
        "connect.full", "{limit} connections are open already", "allow more: --max-connections N", Exit.REFUSED, 503
    )
    CONNECT_USER = Row(
        "connect.user", "the local user with uid {uid} may not call", "let it: --unix-uid {uid}", Exit.REFUSED
    )
    CONNECT_CUT = Row("connect.cut", "{who} cut the connection, so what came may be cut short", "", Exit.REFUSED)
    CONNECT_EXPIRED = Row(
        "connect.expired", "our certificate {subject} expired on {not_after}", "{next}", Exit.REFUSED, 502
    )
    CONNECT_DESCRIPTORS = Row(
        "connect.descriptors",
        "no connection can be taken for want of {what}; it is tried again",
        "allow more open files: ulimit -n",
        Exit.STORE,
    )
    CONNECT_OPEN_PORT = Row(
        "connect.open_port",
        "who reaches {address} calls as us, and that is more than this machine",
        "listen on 127.0.0.1 or unix:PATH, or say --unsafe-listen",
        Exit.USAGE,
    )
    CONNECT_NO_CREDENTIAL = Row(
        "connect.no_credential", "there is no certificate of {name} in {path}", "make one: {next}", Exit.NOT_FOUND
    )
    CONNECT_NOT_ISSUED_HERE = Row(
        "connect.not_issued_here", "{cert} cannot be renewed here: {detail}", "put a new one in its place", Exit.REFUSED
    )
    CONNECT_NO_CURL = Row(
        "connect.no_curl", "there is no curl on this machine", "install it: apt install curl", Exit.NOT_FOUND
    )

    # An audit.
    AUDIT_BASELINE = Row(
        "audit.baseline",
        "{target} refuses the client that it is said to accept ({detail})",
        "give a certificate that it accepts, and with --path what that client may ask for; or give none",
        Exit.USAGE,
    )
    AUDIT_NO_TLS = Row(
        "audit.no_tls",
        "{target} does not speak TLS: {detail}",
        "check the port, and that TLS is switched on there; some protocols begin TLS later",
        Exit.UNREACHABLE,
    )
    AUDIT_UNKNOWN_CHECK = Row(
        "audit.unknown_check",
        "there is no check {value!r}",
        "see what there is: handfast audit --list",
        Exit.USAGE,
    )

    UNREACHABLE = Row("unreachable", "{target} cannot be reached: {detail}", "is it running?", Exit.UNREACHABLE)
    UNREACHABLE_NAME = Row(
        "unreachable.name",
        "{target} cannot be reached: its name leads to no address ({detail})",
        "check the name, and what this machine makes of it: getent hosts {host}",
        Exit.UNREACHABLE,
    )

    @property
    def code(self) -> str:
        """The stable code, as `verify.expired`."""
        return self.value.code

    @property
    def exit(self) -> Exit:
        """The exit code of a command that ends for this reason."""
        return self.value.exit

    @property
    def http(self) -> int:
        """The HTTP status a peer gets for it; 0 where it is never answered over HTTP."""
        return self.value.http


class _Facts(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def _shown(value: object) -> object:
    return f"{value:%Y-%m-%d %H:%M:%S} UTC" if isinstance(value, datetime) else value


@dataclass(frozen=True, slots=True)
class Failure:
    """One reason with its facts: a refusal as a value."""

    reason: Reason
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """What is wrong, in one sentence."""
        return self._fill(self.reason.value.message)

    @property
    def hint(self) -> str:
        """What to do next; may be empty. Where a case knows better than its row, it says so in the fact `remedy`."""
        known = self.facts.get("remedy")
        return known if isinstance(known, str) else self._fill(self.reason.value.hint)

    def as_json(self) -> dict[str, Any]:
        """The failure as JSON values: error, message, hint, facts."""
        facts = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in self.facts.items()}
        return {"error": self.reason.code, "message": self.message, "hint": self.hint, "facts": facts}

    def _fill(self, template: str) -> str:
        return template.format_map(_Facts({k: _shown(v) for k, v in self.facts.items()}))


class HandfastError(Exception):
    """Base of all errors that handfast raises on purpose."""

    def __init__(self, reason: Reason, **facts: Any) -> None:
        self.failure = Failure(reason, facts)
        super().__init__(self.failure.message)

    @property
    def reason(self) -> Reason:
        """The stable reason."""
        return self.failure.reason

    @property
    def facts(self) -> dict[str, Any]:
        """What the sentence is filled with."""
        return self.failure.facts

    @property
    def hint(self) -> str:
        """What to do next; may be empty."""
        return self.failure.hint


class InvalidInput(HandfastError):
    """What we were given does not parse."""


class RemoteProtocolError(HandfastError):
    """The peer broke the rules of a protocol."""


class VerificationFailed(HandfastError):
    """A chain does not prove who it claims to be. `failures` holds every reason, the most telling first."""

    def __init__(self, failures: tuple[Failure, ...]) -> None:
        self.failures = failures
        super().__init__(failures[0].reason, **failures[0].facts)


class IssuanceRefused(HandfastError):
    """The order breaks its profile or its authorization."""


class StoreError(HandfastError):
    """Disk and ledger: missing, locked, corrupt, full, too open."""


class Unreachable(HandfastError):
    """The network, not the peer."""
