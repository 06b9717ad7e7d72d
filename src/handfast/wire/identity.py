"""Identity headers: how an app is told who called, and which names a client must not use to say it itself.

Owns the encoding of the headers that carry a verified peer, and the list of header names that apps trust.
Never decides who a peer is.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from urllib.parse import quote

from handfast.pki.names import Name

# Names are kept folded: see `fold`. A header that folds to one of these is taken out of every request.
IDENTITY_HEADERS = frozenset(
    {
        b"clientcert",  # Client-Cert and Client-Cert-Chain: RFC 9440 2.2, 2.3
        b"clientcertchain",
        b"clientidentity",  # ours
        b"clientauthority",
        b"l5dclientid",  # Linkerd
        b"xarrclientcert",  # Azure App Service
        b"certchain",  # Keycloak's default for HAProxy and Apache: CERT_CHAIN
        b"xsslcert",  # nginx recipes
        b"xsslissuer",  # HAProxy recipes
        b"xsslsubject",
        b"remoteuser",  # what CGI, WSGI and PHP call a logged-in user (RFC 3875 4.1.11)
        b"remotegroups",  # Authelia: Remote-User, -Groups, -Name, -Email
        b"remotename",
        b"remoteemail",
        b"xremoteuser",  # Kubernetes' authenticating proxy: X-Remote-User, -Group, -Extra-*
        b"xremotegroup",
        b"xforwardeduser",  # oauth2-proxy, Traefik's forwardAuth
        b"xforwardedemail",
        b"xforwardedgroups",
        b"xforwardedpreferredusername",
        b"xforwardedaccesstoken",
        b"teleportjwtassertion",  # Teleport. Signed, but an app behind a guard may skip the check
        b"xauthenticateduser",
        b"xauthuser",
        b"smuser",  # SiteMinder
        b"oamremoteuser",  # Oracle Access Manager
        b"xspiffeid",
        *(b"xauthenticateduserid", b"xforwardedname", b"xforwardedsubject", b"xforwardedroles"),
        *(b"xuser", b"xuserid", b"xusername", b"xuseremail"),
    }
)
IDENTITY_PREFIXES = (
    b"handfast",  # ours
    b"xforwardedclientcert",  # Envoy and Istio: X-Forwarded-Client-Cert
    b"xforwardedtlsclientcert",  # Traefik: X-Forwarded-Tls-Client-Cert and -Info
    b"sslclient",  # nginx, ingress-nginx, Apache's SSL_CLIENT_S_DN and kin
    b"xsslclient",  # HAProxy: X-SSL-Client-CN, -DN, -SHA1, -Verify
    b"xclientcert",  # Google's load balancers and many recipes: X-Client-Cert-Dn, X-Client-Certificate
    b"xclientdn",
    b"xclientcn",
    b"xclientverify",
    b"xclientsubject",
    b"xclientissuer",
    b"xclientserial",
    b"xclientfingerprint",
    b"xtlsclient",
    b"tlsclient",  # Caddy recipes
    b"xamznmtls",  # AWS load balancers: X-Amzn-Mtls-Clientcert-*
    b"xamznoidc",
    b"cfclientcert",  # Cloudflare: Cf-Client-Cert-*, Cf-Access-*
    b"cfaccess",
    b"xgoogauthenticateduser",  # Google's Identity-Aware Proxy
    b"xgoogiapjwtassertion",
    b"xremoteextra",
    b"xauthrequest",  # oauth2-proxy behind nginx's auth_request
    b"xauthentik",
    b"xpomerium",
    b"xwebauth",  # Grafana, Gitea
    b"xconsumer",  # Kong: X-Consumer-Username, -ID
    b"tailscaleuser",
    b"xmsclientprincipal",  # Azure's Easy Auth
    b"impersonate",  # Kubernetes: Impersonate-User, -Group, -Extra-*
    b"xcredential",  # Kong
    b"xvouch",
    b"shib",  # Apache's mod_shib, mod_auth_mellon, mod_auth_openidc
    b"mellon",
    b"oidcclaim",
    b"xsslverify",
    b"xssldn",
    b"xcertsubject",
    b"xcertificatesubject",
    b"xtlscert",
    b"xclientsdn",
    b"xmtls",
)

# With these a client asks the app to see another method or path than the one that the rules judged.
OVERRIDE_HEADERS = frozenset(
    {
        *(b"xhttpmethodoverride", b"xhttpmethod", b"xmethodoverride", b"xoriginalmethod", b"xforwardedmethod"),
        *(b"xoriginalurl", b"xoriginaluri", b"xrewriteurl", b"xforwardeduri", b"xforwardedpath", b"xforwardedprefix"),
        *(b"xscriptname", b"xenvoyoriginalpath"),
    }
)

_DROPPED = bytes(octet for octet in range(256) if not chr(octet).isascii() or not chr(octet).isalnum())
_LOWER = bytes(octet + 32 if 65 <= octet <= 90 else octet for octet in range(256))

# Answers by spelling. Emptied when full and closed to long names, so that no client can make it grow.
_answers: dict[bytes, bool] = {}
_MAX_ANSWERS = 1024
_MAX_REMEMBERED = 64  # bytes of a name

# Printable ASCII (RFC 9651 3.3.3) but `%`, and letters and digits, which `quote` leaves alone anyway.
_LITERAL = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"


def fold(name: bytes) -> bytes:
    """Return a header name in lower case with every byte but letters and digits dropped.

    App servers map `-`, `_`, `.` and more to one character, each in its way (WSGI, CGI, PHP). Two names
    that any of them may take for one fold to the same bytes.
    """
    return name.translate(_LOWER, _DROPPED)


def claims_identity(header_name: bytes) -> bool:
    """Whether an app may read the header as saying who the caller is. Any spelling, any bytes; raises nothing."""
    answer = _answers.get(header_name)
    if answer is None:
        folded = fold(header_name)
        answer = folded in IDENTITY_HEADERS or folded.startswith(IDENTITY_PREFIXES)
        if len(header_name) <= _MAX_REMEMBERED:
            if len(_answers) >= _MAX_ANSWERS:
                _answers.clear()
            _answers[header_name] = answer
    return answer


def overrides_request(header_name: bytes) -> bool:
    """Whether an app may read the header as another method or path for the request. Raises nothing."""
    return fold(header_name) in OVERRIDE_HEADERS


def client_cert(der: bytes) -> bytes:
    """Return the value of Client-Cert for a leaf in DER: a byte sequence (RFC 9440 2.2, RFC 9651 3.3.5)."""
    return b":" + base64.b64encode(der) + b":"


def client_cert_chain(ders: Iterable[bytes]) -> bytes:
    """Return the value of Client-Cert-Chain: the issuers in DER, nearest first, without the leaf (RFC 9440 2.3).

    Empty when there are none; the header is then left out.
    """
    return b", ".join(map(client_cert, ders))


def client_identity(name: Name) -> bytes:
    r"""Return the value of Client-Identity: the typed name as a string (RFC 9651 3.3.3), quotes and all.

    `"` and `\` are escaped with `\`. What is not printable ASCII is percent-encoded as UTF-8, and so is
    `%`, always. To read it back: parse the string, then percent-decode it. Two names never look alike.
    """
    return _string(str(name))


def client_authority(authority: str) -> bytes:
    """Return the value of Client-Authority, who vouches for the client: a string, as `client_identity` makes it."""
    return _string(authority)


def _string(value: str) -> bytes:
    text = quote(value, safe=_LITERAL, errors="surrogatepass")
    return b'"' + text.replace("\\", "\\\\").replace('"', '\\"').encode("ascii") + b'"'
