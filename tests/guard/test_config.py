"""handfast.toml: what it means, and what each mistake in it is told as."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handfast.errors import Failure, InvalidInput, Reason
from handfast.guard import schema
from handfast.guard.config import KEYS, KeyDoc, check_config, load_config, parse_config, parse_rules
from handfast.guard.kinds import MAX_PROBLEMS, parse_duration, render_duration
from handfast.guard.schema import (
    AdminConfig,
    AssertionConfig,
    AuthorityFile,
    Balance,
    Config,
    HealthConfig,
    LimitsConfig,
    ListenerConfig,
    LogStyle,
    Mode,
    Ocsp,
    ProxyProtocol,
    RouteConfig,
    SiteConfig,
    TlsVersion,
    UpstreamConfig,
)
from handfast.tls.server import ClientAuth
from handfast.wire.forwarding import HeaderStyle

HERE = Path("/etc/handfast")
HOWTO = Path(__file__).parent.parent.parent / "docs" / "howto" / "configure-the-guard.md"
SITE = """
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "127.0.0.1:8000"
"""
LISTENER = f'[[listener]]\nlisten = "127.0.0.1:8443"\n{SITE}'
TCP = LISTENER.replace('"127.0.0.1:8000"', '"tcp://127.0.0.1:5432"') + 'mode = "tcp"\n'
UPSTREAM = '[upstream.app]\ntargets = ["127.0.0.1:8000"]\n'
TLS_UPSTREAM = '[upstream.app]\ntargets = ["https://app.internal:8443"]\n'


CA = (AuthorityFile(HERE / "ca.crt"),)


def parsed(text: str) -> Config:
    return parse_config(text, "handfast.toml", HERE)


def mistakes(text: str) -> dict[str, str]:
    """Where and what, of all that is wrong with a text that must be wrong."""
    with pytest.raises(InvalidInput) as caught:
        parsed(text)
    assert caught.value.reason is Reason.INPUT_CONFIG
    return {one["at"]: one["detail"] for one in caught.value.facts["problems"]}


def test_the_least_that_is_a_configuration() -> None:
    """One listener with a certificate, a client authority and an app is enough; the rest has defaults."""
    config = parsed(LISTENER)
    site = SiteConfig(cert=HERE / "server.crt", key=HERE / "server.key", client_ca=CA, to="127.0.0.1:8000")
    assert config == Config(listeners=(ListenerConfig(name="listener-1", listen="127.0.0.1:8443", site=site),))
    assert site.client_auth is ClientAuth.REQUIRED
    assert site.tls_min is TlsVersion.TLS13
    assert site.headers == (HeaderStyle.CLIENT_CERT, HeaderStyle.CLIENT_IDENTITY)
    check_config(config, "flags")


def test_an_empty_text_is_no_configuration() -> None:
    """Without a listener there is nothing to guard."""
    assert mistakes("") == {"listener": "there is none; begin one with [[listener]]"}
    with pytest.raises(InvalidInput) as caught:
        check_config(Config(), "flags")
    assert str(caught.value) == "flags: listener: there is none; begin one with [[listener]]"


EVERYTHING = """
workers = "auto"
user = "handfast"
group = "www-data"
log = "json"
drain = "1m"
sandbox = false
state = "state"

[limits]
handshake = "250ms"
idle = "2m"
tunnel_idle = "1h"
connections = 1000
requests_per_second = 2
requests_per_second_per_address = 1
handshakes_per_second_per_identity = 3
max_body = 1048576

[admin]
listen = "unix:admin.sock"

[assertion]
key = "/keys/assertion.key"
issuer = "https://guard.example"
audience = "app"
lifetime = "30s"

[upstream.web]
targets = ["https://a.internal:8443", "https://b.internal:8443"]
balance = "round_robin"
ca = "apps.crt"
cert = "guard.crt"
key = "guard.key"
server_name = "App.Internal."
expect = "spiffe://corp.internal/app/*"
tls_min = "1.2"
proxy_protocol = "v2"
connect = "1s"
response = "90s"
retries = 2

[upstream.web.health]
path = "/health"
interval = "10s"
timeout = "1s"
rise = 1
fall = 2

[upstream.database]
targets = ["tcp+unix:pg/.s.PGSQL.5432"]

[[listener]]
name = "public"
listen = ":8443"
proxy_protocol_from = ["10.0.0.0/8", "::1"]
http2 = false

[listener.limits]
idle = "30s"
connections = "off"

[[listener.site]]
names = ["App.Example.com", "*.apps.example.com"]
default = true
cert = "app.crt"
key = "app.key"
key_passphrase_file = "/run/pass"
client_auth = "optional"
crl = ["root.crl", "/crl/issuer.crl"]
ocsp = "allow_unreachable"
verify_depth = 2
tls_min = "1.2"
legacy_certs = true
offer_authorities = false
trust_domain = "corp.internal"
to = "web"
allow = ["deny web/old", "web/*", "ops GET /status"]
allow_file = "rules.txt"
headers = ["xfcc", "assertion"]

[[listener.site.route]]
path = "/admin/**"
methods = ["GET", "POST"]
to = "127.0.0.1:9000"
client_auth = "required"
allow = ["ops"]

[[listener.site.route]]
path = "/private/**"
client_auth = "required"

[[listener]]
listen = "systemd:postgres"
mode = "tcp"
alpn = ["postgresql"]
cert = "db.crt"
key = "db.key"
to = "database"
"""


def test_every_key_arrives() -> None:
    """A text that uses every key becomes the value that says the same, with paths below the file's folder."""
    limits = LimitsConfig(
        handshake=timedelta(milliseconds=250),
        idle=timedelta(minutes=2),
        tunnel_idle=timedelta(hours=1),
        connections=1000,
        requests_per_second=2.0,
        requests_per_second_per_address=1.0,
        handshakes_per_second_per_identity=3.0,
        max_body=1 << 20,
    )
    web = UpstreamConfig(
        targets=("https://a.internal:8443", "https://b.internal:8443"),
        balance=Balance.ROUND_ROBIN,
        ca=HERE / "apps.crt",
        cert=HERE / "guard.crt",
        key=HERE / "guard.key",
        server_name="app.internal",
        expect="spiffe://corp.internal/app/*",
        tls_min=TlsVersion.TLS12,
        proxy_protocol=ProxyProtocol.V2,
        connect=timedelta(seconds=1),
        response=timedelta(seconds=90),
        retries=2,
        health=HealthConfig("/health", timedelta(seconds=10), timedelta(seconds=1), 1, 2),
    )
    routes = (
        RouteConfig("/admin/**", ("GET", "POST"), "127.0.0.1:9000", ClientAuth.REQUIRED, ("ops",)),
        RouteConfig("/private/**", client_auth=ClientAuth.REQUIRED),
    )
    app = SiteConfig(
        names=("app.example.com", "*.apps.example.com"),
        default=True,
        cert=HERE / "app.crt",
        key=HERE / "app.key",
        key_passphrase_file=Path("/run/pass"),
        client_auth=ClientAuth.OPTIONAL,
        crl=(HERE / "root.crl", Path("/crl/issuer.crl")),
        ocsp=Ocsp.ALLOW_UNREACHABLE,
        verify_depth=2,
        tls_min=TlsVersion.TLS12,
        legacy_certs=True,
        offer_authorities=False,
        trust_domain="corp.internal",
        to="web",
        allow=("deny web/old", "web/*", "ops GET /status"),
        allow_file=HERE / "rules.txt",
        headers=(HeaderStyle.XFCC, HeaderStyle.ASSERTION),
        routes=routes,
    )
    public = ListenerConfig(
        name="public",
        listen=":8443",
        sites=(app,),
        proxy_protocol_from=(ip_network("10.0.0.0/8"), ip_network("::1/128")),
        http2=False,
        limits=LimitsConfig(
            handshake=timedelta(milliseconds=250),
            idle=timedelta(seconds=30),
            tunnel_idle=timedelta(hours=1),
            requests_per_second=2.0,
            requests_per_second_per_address=1.0,
            handshakes_per_second_per_identity=3.0,
            max_body=1 << 20,
        ),
    )
    postgres = ListenerConfig(
        name="listener-2",
        listen="systemd:postgres",
        mode=Mode.TCP,
        site=SiteConfig(cert=HERE / "db.crt", key=HERE / "db.key", to="database"),
        alpn=("postgresql",),
        limits=limits,
    )
    assert parsed(EVERYTHING) == Config(
        workers=0,
        user="handfast",
        group="www-data",
        log=LogStyle.JSON,
        drain=timedelta(minutes=1),
        sandbox=False,
        state=HERE / "state",
        listeners=(public, postgres),
        upstreams={"web": web, "database": UpstreamConfig(targets=("tcp+unix:/etc/handfast/pg/.s.PGSQL.5432",))},
        admin=AdminConfig("unix:/etc/handfast/admin.sock"),
        assertion=AssertionConfig(Path("/keys/assertion.key"), "https://guard.example", "app", timedelta(seconds=30)),
        limits=limits,
    )


def test_where_a_site_leads() -> None:
    """A `to` is a named upstream, or stands for one with the defaults."""
    config = parsed(LISTENER.replace("127.0.0.1:8000", "app") + UPSTREAM)
    assert config.upstream("app") is config.upstreams["app"]
    assert config.upstream("127.0.0.1:9") == UpstreamConfig(targets=("127.0.0.1:9",))


def test_sites_of_a_listener() -> None:
    """The site of the listener's own keys comes first; what stands there is not passed on to the others."""
    config = parsed(LISTENER + f'[[listener.site]]\nnames = ["b.example"]\n{SITE}')
    listener = config.listeners[0]
    assert listener.all_sites == (listener.site, listener.sites[0])
    assert mistakes(LISTENER + '[[listener.site]]\nnames = ["b.example"]\nto = "127.0.0.1:1"\n').keys() == {
        "listener[0].site[0].cert",
        "listener[0].site[0].key",
        "listener[0].site[0].client_ca",
    }


# A text that is wrong, the place of its one mistake, and words of what is said.
NAMED = LISTENER.replace('"ca.crt"', '{ a = "a.crt", b = "b.crt" }')
WRONG = [
    # Authorities and their names.
    (LISTENER.replace('"ca.crt"', "{}"), "listener[0].client_ca", "it takes the path of a file; or names and paths"),
    (LISTENER.replace('"ca.crt"', "[]"), "listener[0].client_ca", "it takes the path of a file; or names and paths"),
    (LISTENER.replace('"ca.crt"', "{ a = 1 }"), "listener[0].client_ca.a", "it takes the path of a file"),
    (LISTENER.replace('"ca.crt"', '{ "1" = "x" }'), "listener[0].client_ca.1", "a name begins with a letter"),
    (LISTENER + 'allow = ["any by a"]', "listener[0].allow[0]", "no authority is called a: client_ca = { a = FILE }"),
    (NAMED + 'allow = ["any by c"]', "listener[0].allow[0]", "the authorities' names are a, b"),
    (NAMED + 'allow = ["any by"]', "listener[0].allow[0]", "the authorities' names are a, b"),
    (NAMED + '[[listener.route]]\nallow = ["any by c"]', "listener[0].route[0].allow[0]", "names are a, b"),
    # Unknown keys.
    (LISTENER + 'clientca = "x"', "listener[0].clientca", "no such key in [[listener]]; did you mean client_ca?"),
    (LISTENER + 'client-auth = "off"', "listener[0].client-auth", "did you mean client_auth?"),
    ("worker = 2\n" + LISTENER, "worker", "no such key at the top level; did you mean workers?"),
    ("[limits]\nhand_shake = 1\n" + LISTENER, "limits.hand_shake", "in [limits]; did you mean handshake?"),
    (
        LISTENER + "[listener.limits]\nburts = 1",
        "listener[0].limits.burts",
        "in [listener.limits]; did you mean burst?",
    ),
    (LISTENER + "sandbox = true", "listener[0].sandbox", "in [[listener]]; it belongs at the top level"),
    (LISTENER + 'balance = "x"', "listener[0].balance", "it belongs in [upstream.NAME]"),
    (LISTENER + "zzz = 1", "listener[0].zzz", "the nearest is "),
    (LISTENER + '"a.b\\n" = 1', "listener[0].'a.b\\n'", "there is no such key"),
    (UPSTREAM + "[upstream.app.health]\npaths = '/'\n" + LISTENER, "upstream.app.health.paths", "did you mean path?"),
    # Values of the wrong kind or out of range.
    ("workers = 1025\n" + LISTENER, "workers", '1025 stands there; it takes a whole number from 0 to 1024; or "auto"'),
    ("workers = true\n" + LISTENER, "workers", "true stands there"),
    ("workers = 1.0\n" + LISTENER, "workers", "1.0 stands there"),
    (f"workers = {'9' * 4000}\n" + LISTENER, "workers", "a number too large stands there"),
    (f"workers = 0x{'f' * 9000}\n" + LISTENER, "workers", "a number too large stands there"),
    ("log = 'xml'\n" + LISTENER, "log", '\'xml\' stands there; it takes "json" or "pretty"'),
    ("drain = 30\n" + LISTENER, "drain", '30 stands there; it takes a length of time from "1s" to "1d"'),
    ("drain = '30'\n" + LISTENER, "drain", "'30' stands there"),
    ("drain = '52w'\n" + LISTENER, "drain", "'52w' stands there"),
    ("drain = 2026-11-21\n" + LISTENER, "drain", "2026-11-21 stands there"),
    ("sandbox = 'yes'\n" + LISTENER, "sandbox", "it takes true or false"),
    ("state = ''\n" + LISTENER, "state", "it takes the path of a folder"),
    ("state = '''a\nb'''\n" + LISTENER, "state", "it takes the path of a folder"),
    ("user = 'a b'\n" + LISTENER, "user", "the name of an account"),
    ("[limits]\nhandshake = '1h'\n" + LISTENER, "limits.handshake", 'from "100ms" to "10m"'),
    (LISTENER + "[listener.limits]\nhandshake = 5", "listener[0].limits.handshake", "5 stands there"),
    ("[limits]\nconnections = 0\n" + LISTENER, "limits.connections", '1 or more; or "off"'),
    ("[limits]\nrequests_per_second = 0\n" + LISTENER, "limits.requests_per_second", "a number more than 0"),
    ("[limits]\nrequests_per_second = nan\n" + LISTENER, "limits.requests_per_second", "nan stands there"),
    ("[limits]\nrequests_per_second = inf\n" + LISTENER, "limits.requests_per_second", "inf stands there"),
    ("limits = 3\n" + LISTENER, "limits", "3 stands there; it is a table, written [limits]"),
    ("listener = 3", "listener", "it is begun with [[listener]], in double brackets"),
    ("[listener]", "listener", "a table stands there; it is begun with [[listener]], in double brackets"),
    ("listener = [3]", "listener[0]", "3 stands there; it is a table"),
    ("upstream = 3\n" + LISTENER, "upstream", "3 stands there; it takes tables, each [upstream.NAME]"),
    ("[upstream]\napp = 3\n" + LISTENER, "upstream.app", "3 stands there; it is a table, written [upstream.NAME]"),
    ("[upstream.'8000']\ntargets = ['a:1']\n" + LISTENER, "upstream.8000", "a name begins with a letter"),
    ("[upstream.'a.b']\ntargets = ['a:1']\n" + LISTENER, "upstream.'a.b'", "a name begins with a letter"),
    (LISTENER + "name = 'a b'", "listener[0].name", "a name of letters"),
    (LISTENER.replace("127.0.0.1:8443", "127.0.0.1"), "listener[0].listen", "a port from 0 to 65535 stands last"),
    (
        LISTENER.replace("127.0.0.1:8443", f"unix:{'x' * 108}"),
        "listener[0].listen",
        "a socket's path has 1 to 107 bytes",
    ),
    (LISTENER.replace("127.0.0.1:8443", "systemd:"), "listener[0].listen", "a socket's name"),
    (LISTENER + "mode = 'udp'", "listener[0].mode", '"http" or "tcp"'),
    (LISTENER + "proxy_protocol_from = ['10.0.0.1/8']", "listener[0].proxy_protocol_from[0]", "host bits set"),
    (LISTENER + "proxy_protocol_from = '10.0.0.0/8'", "listener[0].proxy_protocol_from", "a list of networks"),
    (LISTENER + "verify_depth = 11", "listener[0].verify_depth", "from 0 to 10"),
    # Rules that nobody would be held to.
    (LISTENER + "client_auth = 'optional'\nallow = ['any']", "listener[0].allow", "binds nobody"),
    (LISTENER + "client_auth = 'optional'\nallow_file = 'rules'", "listener[0].allow_file", "binds nobody"),
    (
        LISTENER + "client_auth = 'optional'\n[[listener.route]]\npath = '/a'\nallow = ['any']",
        "listener[0].route[0].allow",
        "binds nobody",
    ),
    (
        LISTENER
        + "client_auth = 'optional'\nallow = ['any']\n"
        + "[[listener.route]]\nclient_auth = 'required'\nallow = ['any']",
        "listener[0].allow",
        "no route requires a certificate and leaves out allow",
    ),
    (LISTENER + "tls_min = '1.1'", "listener[0].tls_min", '"1.2" or "1.3"'),
    (LISTENER + "tls_min = 1.3", "listener[0].tls_min", "1.3 stands there"),
    (LISTENER + "headers = ['Client-Cert']", "listener[0].headers[0]", '"client-cert" or '),
    (LISTENER + "headers = ['xfcc', 'xfcc']", "listener[0].headers", "xfcc stands there twice"),
    (LISTENER + "names = ['a.*.example']", "listener[0].names[0]", "the left-most"),
    (LISTENER + "names = ['ab*.example']", "listener[0].names[0]", "the left-most"),
    (LISTENER + "names = ['*']", "listener[0].names[0]", "the left-most"),
    (LISTENER + "names = ['127.0.0.1']", "listener[0].names[0]", "it takes a DNS name"),
    (LISTENER + "names = ['::1']", "listener[0].names[0]", "it takes a DNS name"),
    (LISTENER + "names = ['a b']", "listener[0].names[0]", "it takes a DNS name"),
    (LISTENER + "names = ['a.example', 'A.Example.']", "listener[0].names", "a.example stands there twice"),
    (LISTENER + "trust_domain = 'A'", "listener[0].trust_domain", "a trust domain is of"),
    (LISTENER + "[[listener.route]]\npath = 'public'", "listener[0].route[0].path", "a path pattern"),
    (LISTENER + "[[listener.route]]\npath = '/a?b'", "listener[0].route[0].path", "holds no ?"),
    (LISTENER + "[[listener.route]]\nmethods = ['get']", "listener[0].route[0].methods[0]", "a method in capitals"),
    (
        LISTENER + "[[listener.route]]\nclient_auth = 'off'",
        "listener[0].route[0].client_auth",
        '"required" or "optional"',
    ),
    ("[assertion]\nlifetime = '6m'\n" + LISTENER, "assertion.lifetime", 'from "1s" to "5m"'),
    (UPSTREAM + "retries = 6\n" + LISTENER, "upstream.app.retries", "from 0 to 5"),
    (UPSTREAM + "health = {path = 'x'}\n" + LISTENER, "upstream.app.health.path", "a path, as /health"),
    # A rule that would be no rule, or never one that is meant.
    (LISTENER + "allow = []", "listener[0].allow", "a list of rules"),
    (LISTENER + "[[listener.route]]\nallow = []", "listener[0].route[0].allow", "a list of rules"),
    (LISTENER + "allow = 'any'", "listener[0].allow", "a list of rules"),
    (LISTENER + "allow = ['any', 'web']", "listener[0].allow[1]", "a bare name needs a trust domain"),
    (LISTENER + "allow = ['any get']", "listener[0].allow[0]", "methods are upper-case words"),
    (
        LISTENER + "[[listener.route]]\nallow = ['any y z']",
        "listener[0].route[0].allow[0]",
        "methods are upper-case words",
    ),
    (TCP + "allow = ['any GET']", "listener[0].allow[0]", "a rule says only who"),
    (TCP + "allow = ['any /x']", "listener[0].allow[0]", "a rule says only who"),
    # One setting against another.
    (LISTENER.replace('client_ca = "ca.crt"', ""), "listener[0].client_ca", 'client_auth = "required" needs'),
    (
        LISTENER.replace('client_ca = "ca.crt"', 'client_auth = "optional"'),
        "listener[0].client_ca",
        'client_auth = "optional" needs',
    ),
    (LISTENER + "client_auth = 'off'\nallow = ['any']", "listener[0].allow", '"off" asks for none'),
    (LISTENER + "client_auth = 'off'\nallow_file = 'x'", "listener[0].allow_file", '"off" asks for none'),
    (
        LISTENER + "client_auth = 'off'\n[[listener.route]]\nallow = ['any']",
        "listener[0].route[0].allow",
        '"off" asks for none',
    ),
    (
        LISTENER + "client_auth = 'off'\n[[listener.route]]\nclient_auth = 'required'",
        "listener[0].route[0].client_auth",
        '"off" asks for none',
    ),
    (
        LISTENER + "[[listener.route]]\nclient_auth = 'optional'",
        "listener[0].route[0].client_auth",
        "before the path is known",
    ),
    (LISTENER.replace('key = "server.key"', ""), "listener[0].key", "is missing: the private key"),
    (LISTENER.replace('cert = "server.crt"', ""), "listener[0].cert", "is missing: a site has a server certificate"),
    (LISTENER.replace('to = "127.0.0.1:8000"', ""), "listener[0].to", "is missing: the app"),
    ("[[listener]]", "listener[0].cert", "give cert and key here, or sites in [[listener.site]]"),
    (LISTENER.replace("127.0.0.1:8000", "ap") + UPSTREAM, "listener[0].to", "no upstream 'ap'; did you mean app?"),
    (LISTENER.replace("127.0.0.1:8000", "web"), "listener[0].to", "no upstream 'web'; write [upstream.web]"),
    (LISTENER.replace("127.0.0.1:8000", "ftp://a:1"), "listener[0].to", "is not spoken to apps"),
    (LISTENER.replace("127.0.0.1:8000", "127.0.0.1:0"), "listener[0].to", "port 0 is no place"),
    (LISTENER + "[[listener.route]]\nto = 'web'", "listener[0].route[0].to", "no upstream 'web'"),
    (LISTENER.replace("127.0.0.1:8000", "https://a:1"), "listener[0].to", "needs an authority"),
    (LISTENER.replace("127.0.0.1:8000", "tcp://a:1"), "listener[0].to", 'does not go with mode = "http"'),
    (TCP.replace("tcp://", "http://"), "listener[0].to", 'does not go with mode = "tcp"'),
    (TCP.replace("tcp://", ""), "listener[0].to", "which takes tcp:// or tls://"),
    (TCP.replace("tcp://127.0.0.1:5432", "app") + UPSTREAM, "listener[0].to", 'does not go with mode = "tcp"'),
    (TCP + "[[listener.route]]", "listener[0].route", 'belongs to mode = "http"'),
    (TCP + "headers = ['xfcc']", "listener[0].headers", 'belongs to mode = "http"'),
    (TCP + "http2 = false", "listener[0].http2", 'belongs to mode = "http"'),
    (LISTENER + "alpn = ['h2']", "listener[0].alpn", 'belongs to mode = "tcp"'),
    (LISTENER + "headers = ['assertion']", "listener[0].headers", "needs the table [assertion]"),
    (LISTENER + LISTENER, "listener[1].listen", "127.0.0.1:8443 is taken by listener[0]"),
    (
        LISTENER + "name = 'listener-2'\n" + LISTENER.replace("8443", "1"),
        "listener[1].name",
        "is the name of listener[0]",
    ),
    (LISTENER + "[[listener.site]]" + SITE, "listener[0].site[0].names", "listener[0] takes any server name already"),
    (
        LISTENER + "names = ['a.example']\n[[listener.site]]\nnames = ['A.example', 'b.example']" + SITE,
        "listener[0].site[0].names",
        "a.example stands in listener[0].names already",
    ),
    (
        LISTENER + "default = true\n[[listener.site]]\ndefault = true\nnames = ['b.example']" + SITE,
        "listener[0].site[0].default",
        "listener[0] takes clients that send no server name already",
    ),
    ("[admin]\nlisten = '0.0.0.0:9464'\n" + LISTENER, "admin.listen", "write public = true"),
    ("[admin]\nlisten = 'example.com:9464'\n" + LISTENER, "admin.listen", "write public = true"),
    ("[admin]\nlisten = '127.0.0.1:8443'\n" + LISTENER, "admin.listen", "is taken by listener[0]"),
    ("[upstream.app]\n" + LISTENER, "upstream.app.targets", "is missing"),
    ("[upstream.app]\ntargets = ['a']\n" + LISTENER, "upstream.app.targets[0]", "is not a place to forward to"),
    ("[upstream.app]\ntargets = ['a:1', 'tcp://a:2']\n" + LISTENER, "upstream.app.targets", "in the same way"),
    ("[upstream.app]\ntargets = ['a:1', 'https://a:2']\n" + LISTENER, "upstream.app.targets", "in the same way"),
    (UPSTREAM + "ca = 'x'\n" + LISTENER, "upstream.app.ca", "is for TLS, which these targets do not speak"),
    (UPSTREAM + "expect = 'dns:a.b'\n" + LISTENER, "upstream.app.expect", "is for TLS"),
    (TLS_UPSTREAM + LISTENER, "upstream.app.ca", "the system's are not taken for granted"),
    (TLS_UPSTREAM + "ca = 'x'\ncert = 'y'\n" + LISTENER, "upstream.app.key", "cert is given, and they go together"),
    (TLS_UPSTREAM + "ca = 'x'\nkey = 'y'\n" + LISTENER, "upstream.app.cert", "key is given, and they go together"),
    (TLS_UPSTREAM + "ca = 'x'\nexpect = 'web'\n" + LISTENER, "upstream.app.expect", "a bare name needs a trust domain"),
    (TLS_UPSTREAM + "ca = 'x'\nserver_name = '-'\n" + LISTENER, "upstream.app.server_name", "a host's name or address"),
    (
        "[upstream.app]\nca = 'x'\ntargets = ['https+unix:/a']\n" + LISTENER,
        "upstream.app.server_name",
        "a socket has no name",
    ),
    (
        "[upstream.app]\ntargets = ['tcp://a:1']\nhealth.path = '/'\n" + LISTENER,
        "upstream.app.health.path",
        "belongs to HTTP",
    ),
    (UPSTREAM + "health.timeout = '6s'\n" + LISTENER, "upstream.app.health.timeout", "is longer than interval"),
    # No TOML.
    ("a = 1\nb = = 2", "line 2, column 5", "this is not TOML: Invalid value"),
    ("a = 1\na = 2", "line 2, column 6", "this is not TOML: Cannot overwrite a value"),
    ("a = 1\nb = [", "line 2, column 6", "this is not TOML: "),
    ("a = " + "9" * 5000, "the text", "more digits"),
    ("a = " + "[" * 100_000, "the text", "nested too deep"),
    ("a = 1\n " + ".".join("b" * 100_000) + " = 1", "line 2, column 2", "no more than 64 parts"),
    ("a = 1\n" + " . ".join(['"b"', "'c'"] * 50_000) + " = 1", "line 2, column 1", "no more than 64 parts"),
    ("a = '\ud800'", "the text", "holds what is not Unicode"),
]


@pytest.mark.parametrize(("text", "at", "words"), WRONG, ids=[f"{n}-{at}" for n, (_, at, _) in enumerate(WRONG)])
def test_a_mistake_is_told_where_it_stands(text: str, at: str, words: str) -> None:
    """Each mistake is one mistake, with its place and what may stand there, and brings no others along."""
    found = mistakes(text)
    assert list(found) == [at]
    assert words in found[at]


# The twins of what is refused above: the same, made right.
RIGHT = [
    NAMED + 'allow = ["any by a GET /x", "deny cn:x by b"]\n[[listener.route]]\nallow = ["any by b"]',
    TCP.replace('"ca.crt"', '{ a = "a.crt" }') + 'allow = ["any by a"]',
    LISTENER,
    LISTENER + "client_auth = 'optional'\nallow = ['any']\n[[listener.route]]\nclient_auth = 'required'",
    LISTENER + "client_auth = 'optional'\n[[listener.route]]\nclient_auth = 'required'\nallow = ['any']",
    TCP,
    TCP + "allow = ['any']",
    "state = 'x'\n" + TCP.replace("tcp://", "tls://"),
    "state = 'x'\n" + LISTENER.replace('client_ca = "ca.crt"', ""),
    LISTENER.replace('client_ca = "ca.crt"', "client_auth = 'off'"),
    "state = 'x'\n" + LISTENER + "allow = ['web']",
    LISTENER + "trust_domain = 'corp'\nallow = ['web']",
    "state = 'x'\n" + LISTENER.replace("127.0.0.1:8000", "https://a:1"),
    "state = 'x'\n" + TLS_UPSTREAM + "expect = 'web'\n" + LISTENER,
    TLS_UPSTREAM + "ca = 'x'\ncert = 'y'\nkey = 'z'\n" + LISTENER.replace("127.0.0.1:8000", "app"),
    "[upstream.app]\nca = 'x'\nserver_name = 'a.b'\ntargets = ['https+unix:/a']\n" + LISTENER,
    LISTENER.replace('to = "127.0.0.1:8000"', "[[listener.route]]\nto = 'a:1'"),
    LISTENER + "client_auth = 'optional'\n[[listener.route]]\nclient_auth = 'required'",
    "[assertion]\n" + LISTENER + "headers = ['assertion']",
    LISTENER + "headers = []",
    LISTENER.replace("8443", "0") + LISTENER.replace("8443", "0"),
    LISTENER + "[[listener.site]]\nnames = ['a.example']" + SITE + "[[listener.site]]\nnames = ['*.example']" + SITE,
    "[admin]\nlisten = '0.0.0.0:9464'\npublic = true\n" + LISTENER,
    "[admin]\nlisten = '[::1]:9464'\n" + LISTENER,
    "[admin]\nlisten = 'localhost:9464'\n" + LISTENER,
    "workers = 0\n" + LISTENER,
    "\n\n# nothing but a comment\n" + LISTENER,
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_is_taken(text: str) -> None:
    """What the mistakes above were made of is a configuration."""
    assert parsed(text).listeners


def test_all_mistakes_are_told() -> None:
    """Mistakes in several tables come in one refusal, which fits one line and JSON."""
    text = "workers = 'many'\n[limits]\nidle = 3\n" + LISTENER.replace("server.key", "") + "allow = ['x y z w']\n"
    with pytest.raises(InvalidInput) as caught:
        parsed(text)
    places = ["workers", "limits.idle", "listener[0].key", "listener[0].allow[0]"]
    assert [one["at"] for one in caught.value.facts["problems"]] == places
    message = str(caught.value)
    assert message.startswith("handfast.toml: workers: 'many' stands there; ")
    assert all(f"{place}: " in message for place in places)
    json.dumps(Failure(caught.value.reason, caught.value.facts).as_json())


def test_a_mistake_hides_what_was_judged_by_it() -> None:
    """A key that was mistyped, or holds what it may not, is not said to be missing as well."""
    assert list(mistakes(LISTENER.replace("client_ca", "client_sa"))) == ["listener[0].client_sa"]
    assert list(mistakes(LISTENER.replace('"ca.crt"', "1"))) == ["listener[0].client_ca"]
    assert list(mistakes("state = 1\n" + LISTENER.replace('client_ca = "ca.crt"', ""))) == ["state"]
    assert list(mistakes("upstream = 1\n" + LISTENER.replace("127.0.0.1:8000", "app"))) == ["upstream"]
    assert list(mistakes(TCP.replace('"tcp"', '"tpc"'))) == ["listener[0].mode"]


def test_no_more_mistakes_than_a_person_reads() -> None:
    """Twenty mistakes are told, and that there are more; a file full of them does not take long."""
    found = mistakes("".join(f"key{number} = 1\n" for number in range(30_000)))
    assert len(found) == MAX_PROBLEMS
    conflicts = mistakes("".join(f'[[listener]]\nlisten = "127.0.0.1:{port}"\n' for port in range(1, 100)))
    assert len(conflicts) == MAX_PROBLEMS
    with pytest.raises(InvalidInput, match=r"; and more$"):
        parsed("".join(f"key{number} = 1\n" for number in range(21)))


@pytest.mark.parametrize(
    ("text", "length"),
    [("250ms", timedelta(milliseconds=250)), ("10s", timedelta(seconds=10)), ("5m", timedelta(minutes=5))],
)
def test_lengths_of_time(text: str, length: timedelta) -> None:
    """Lengths of time are read, and written as they were."""
    assert parse_duration(text) == length
    assert render_duration(length) == text


@pytest.mark.parametrize(
    "text", ["", "0ms", "10", "-1s", "1.5s", "10 s", "10S", "1e3ms", "٣s", "10s\n", "9" * 20 + "ms"]
)
def test_no_lengths_of_time(text: str) -> None:
    """What is no length of time is refused as such."""
    with pytest.raises(InvalidInput) as caught:
        parse_duration(text)
    assert caught.value.reason is Reason.INPUT_LIFETIME


def test_a_file_of_rules() -> None:
    """An allow_file is one rule a line, with comments and empty lines."""
    rules = parse_rules("# who\n\nweb GET /x # why\r\n  deny cn:a#b\n", "rules.txt", "corp")
    assert list(map(str, rules)) == ["allow spiffe://corp/web GET /x", "deny cn:a#b"]


def test_a_file_of_no_rules() -> None:
    """A file without a rule is refused, so that it cannot be taken for no restriction; wrong lines have numbers."""
    for text in ("", "# nobody\n\n"):
        with pytest.raises(InvalidInput) as caught:
            parse_rules(text, "rules.txt")
        assert caught.value.reason is Reason.INPUT_EMPTY
    with pytest.raises(InvalidInput) as caught:
        parse_rules("any\nweb\nany any any any", "rules.txt")
    assert caught.value.reason is Reason.INPUT_CONFIG
    assert [one["at"] for one in caught.value.facts["problems"]] == ["line 2", "line 3"]


def test_a_file_is_loaded(tmp_path: Path) -> None:
    """Paths in a file are below the file's folder; a byte order mark, as Windows puts it, is passed over."""
    path = tmp_path / "handfast.toml"
    path.write_bytes(b"\xef\xbb\xbf" + LISTENER.encode())
    site = load_config(path).listeners[0].site
    assert site is not None
    assert site.cert == tmp_path / "server.crt"


def test_a_file_that_cannot_be_loaded(tmp_path: Path) -> None:
    """A file that is not there, is empty, is no text, or is too large is refused for that reason."""
    path = tmp_path / "handfast.toml"
    with pytest.raises(InvalidInput) as caught:
        load_config(path)
    assert caught.value.reason is Reason.INPUT_MISSING
    for data, reason in (
        (b"", Reason.INPUT_EMPTY),
        (b"a = 1\n\xff", Reason.INPUT_CONFIG),
        (b"#" * (2 << 20), Reason.INPUT_TOO_LARGE),
    ):
        path.write_bytes(data)
        with pytest.raises(InvalidInput) as caught:
            load_config(path)
        assert caught.value.reason is reason
    path.write_bytes(b"a = 1\n\xff")
    with pytest.raises(InvalidInput, match=r"handfast\.toml: line 2: is not UTF-8"):
        load_config(path)


# The keys as they are documented.

TABLES: dict[str, type] = {
    "": Config,
    "limits.": LimitsConfig,
    "admin.": AdminConfig,
    "assertion.": AssertionConfig,
    "upstream.NAME.": UpstreamConfig,
    "upstream.NAME.health.": HealthConfig,
    "listener.": ListenerConfig,
    "listener.limits.": LimitsConfig,
    "listener.route.": RouteConfig,
    "listener.site.": SiteConfig,
    "listener.site.route.": RouteConfig,
}
SINGULAR = {"listeners": "listener", "upstreams": "upstream", "sites": "site", "routes": "route"}


def keys_of(kind: type) -> set[str]:
    assert is_dataclass(kind)
    names = {SINGULAR.get(one.name, one.name) for one in fields(kind)}
    if kind is ListenerConfig:  # its own site's keys stand in the listener
        names |= keys_of(SiteConfig)
    return names


def test_every_key_is_documented() -> None:
    """Each field of the dataclasses is a documented key, and there is no other key."""
    documented = [doc.key for doc in KEYS]
    assert len(documented) == len(set(documented))
    assert set(documented) == {prefix + name for prefix, kind in TABLES.items() for name in keys_of(kind)}
    configs = {kind for name, kind in vars(schema).items() if name.endswith("Config")}
    assert configs == set(TABLES.values())


def test_documents_are_sentences() -> None:
    """Each key has what it takes in words, and one sentence."""
    for doc in KEYS:
        assert doc.kind
        assert re.fullmatch(r"[A-Z].*[^.]\.", doc.text), doc.text
    defaults = {doc.key: doc.default for doc in KEYS}
    assert defaults["limits.handshake"] == '"10s"'
    assert defaults["listener.client_auth"] == '"required"'
    assert defaults["listener.site.headers"] == '["client-cert", "client-identity"]'
    assert defaults["workers"] == "1"
    assert defaults["sandbox"] == "true"


TOML_DEFAULTS = [doc for doc in KEYS if re.fullmatch(r'".*"|\[.*\]|true|false|\d+', doc.default)]


@pytest.mark.parametrize("doc", TOML_DEFAULTS, ids=lambda doc: doc.key)
def test_a_default_may_be_written(doc: KeyDoc) -> None:
    """A default that is documented as TOML is a value that its key takes."""
    table, _, key = doc.key.rpartition(".")
    header = f"[[{table}]]" if table.endswith(("listener", "site", "route")) else f"[{table}]"
    before = "[[listener]]\n[[listener.site]]\n" if table.startswith("listener.") else ""
    with pytest.raises(InvalidInput) as caught:  # since nothing else is given
        parsed(f"{before}{header if table else ''}\n{key} = {doc.default}\nunknown = 1\n")
    wrong = [one["at"] for one in caught.value.facts["problems"]]
    assert [at for at in wrong if at.endswith(".unknown" if table else "unknown")]
    assert [at for at in wrong if at.endswith(f".{key}" if table else key)] == []


def blocks() -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```$", HOWTO.read_text(), re.M | re.S)


def test_the_example_of_the_manual() -> None:
    """The manual's configurations are taken as they stand; the full one, with its comments opened, has every key."""
    found = blocks()
    assert len(found) >= 2
    for text in found:
        assert parsed(text).listeners
    full = max(found, key=len)
    opened = re.sub(r"^# ?(?=[a-z0-9_]+ = |\[)", "", full, flags=re.M)
    parsed(opened)
    in_sites = {f"listener.{key}": f"listener.site.{key}" for key in keys_of(SiteConfig)}
    shown = {in_sites.get(key, key) for key in written(tomllib.loads(opened), "")}
    every = {in_sites.get(doc.key, doc.key) for doc in KEYS}
    repeated = ("listener.limits.", "listener.route.")  # as limits and listener.site.route
    assert {key for key in every if not key.startswith(repeated)} - shown == set()


def written(table: dict[str, Any], prefix: str) -> Iterable[str]:
    """The documented names of the keys that a text uses."""
    for key, value in table.items():
        yield prefix + key
        inner = value if isinstance(value, list) else [value]
        for one in inner:
            if isinstance(one, dict) and prefix + key == "upstream":
                for upstream in one.values():
                    yield from written(upstream, "upstream.NAME.")
            elif isinstance(one, dict):
                yield from written(one, f"{prefix}{key}.")


# No text does anything but be taken or refused.

WORDS = st.sampled_from(
    [
        *(doc.key.rpartition(".")[2] for doc in KEYS),
        *("off", "auto", "required", "10s", "250ms", "any", "web GET /x", "unix:a", "tcp://a:1", "https://[::1]:1"),
        *(
            "app",
            "*.a.b",
            "10.0.0.0/8",
            "/public/**",
            "/../x",
            "",
            "\0",
            "é",
            "xfcc",
            "http",
            "tcp",
            "9" * 30,
            "::",
            "1",
        ),
    ]
)
SCALARS = st.one_of(
    WORDS,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=6), max_leaves=25
)


def toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return f"{{{', '.join(f'{toml(key)} = {toml(one)}' for key, one in value.items())}}}"
        case _:
            return str(value).replace("e+", "e")


def refused_or_taken(text: str) -> None:
    try:
        config = parsed(text)
    except InvalidInput as refusal:
        error = refusal
    else:
        check_config(config, "again")
        return
    assert error.reason is Reason.INPUT_CONFIG
    assert 1 <= len(error.facts["problems"]) <= MAX_PROBLEMS


@given(st.text(max_size=200))
@example("a = 0x" + "f" * 9000)
@example("a.b.c = 1e999\n[a]\n")
@example("[listener")
def test_any_text(text: str) -> None:
    """Whatever the text, it is taken or refused with a reason."""
    refused_or_taken(text)


@given(st.dictionaries(WORDS, VALUES, max_size=8))
def test_any_document(document: dict[str, Any]) -> None:
    """Whatever the values of whatever keys, they are taken or refused with a reason."""
    refused_or_taken("".join(f"{toml(key)} = {toml(value)}\n" for key, value in document.items()))


@given(st.dictionaries(WORDS, SCALARS, max_size=12), st.dictionaries(WORDS, VALUES, max_size=6))
def test_any_listener(own: dict[str, Any], site: dict[str, Any]) -> None:
    """A listener and a site of any keys are taken or refused with a reason."""
    document = {"listener": [own | {"site": [site]}], "upstream": {"app": site | own}, "limits": own, "admin": own}
    refused_or_taken("".join(f"{key} = {toml(value)}\n" for key, value in document.items()))


@given(st.text(max_size=60), st.text(max_size=30))
def test_any_damage(before: str, after: str) -> None:
    """A good text with anything before, after or inside a value is taken or refused with a reason."""
    refused_or_taken(before + EVERYTHING + after)
    refused_or_taken(EVERYTHING.replace("app.internal", toml(after)[1:-1]).replace("web GET", toml(before)[1:-1]))
