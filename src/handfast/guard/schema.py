"""The guard's settings as values, and what must hold between them.

Owns the dataclasses that `handfast.toml` and the flags of `guard` both become, and `find_conflicts`, which holds
one setting against another. Pure: it opens no file, so a path that leads nowhere is found by who loads it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from itertools import pairwise
from pathlib import Path

from handfast.errors import InvalidInput
from handfast.guard.places import Place, Target, parse_place, parse_target
from handfast.pki.names import parse_pattern
from handfast.policy import parse_rule
from handfast.tls.server import ClientAuth
from handfast.wire.forwarding import DEFAULT_STYLES, HeaderStyle

_LOCAL = {"localhost": "127.0.0.1", "0.0.0.0": "127.0.0.1"}  # noqa: S104  # where what is sent there arrives
_STAND_IN = "trust-domain.invalid"  # for checking rules whose trust domain is the authority's, known once it is read


class Mode(StrEnum):
    """What a listener forwards: requests that it reads, or bytes that it does not."""

    HTTP = "http"
    TCP = "tcp"


class Ocsp(StrEnum):
    """What is asked of the OCSP responders of the clients' authorities."""

    OFF = "off"
    REQUIRE = "require"  # no answer: refused
    ALLOW_UNREACHABLE = "allow_unreachable"


class TlsVersion(StrEnum):
    """The oldest version of TLS that is spoken."""

    TLS12 = "1.2"
    TLS13 = "1.3"


class Balance(StrEnum):
    """How one of several targets is chosen."""

    LEAST_CONNECTIONS = "least_connections"
    ROUND_ROBIN = "round_robin"


class ProxyProtocol(StrEnum):
    """Whether the app is told of the connection in front of its first byte."""

    OFF = "off"
    V2 = "v2"
    V2_CERT = "v2-cert"  # with the client's certificate, which makes the header large


class LogStyle(StrEnum):
    """How events are written."""

    JSON = "json"
    PRETTY = "pretty"


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """How long and how much; None is no limit."""

    handshake: timedelta = timedelta(seconds=10)
    head: timedelta = timedelta(seconds=10)
    idle: timedelta = timedelta(seconds=75)
    connect: timedelta = timedelta(seconds=5)
    response: timedelta = timedelta(seconds=60)
    tunnel_idle: timedelta | None = None
    connections: int | None = None
    connections_per_identity: int | None = None
    connections_per_address: int | None = None
    handshakes_per_second: float | None = None
    handshakes_per_second_per_address: float | None = None
    handshakes_per_second_per_identity: float | None = None
    requests_per_second: float | None = None
    requests_per_second_per_address: float | None = None
    requests_per_second_per_identity: float | None = None
    burst: int | None = None
    max_body: int | None = None  # bytes


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """What holds for some paths of a site."""

    path: str = "/**"  # as in policy rules
    methods: tuple[str, ...] = ()  # empty: every method
    to: str | None = None  # None: the site's
    client_auth: ClientAuth | None = None  # None: the site's; never OFF
    allow: tuple[str, ...] | None = None  # None: the site's rules


@dataclass(frozen=True, slots=True)
class AuthorityFile:
    """A file with the certificates of authorities, and what they are called in rules; '' for nothing."""

    file: Path
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.file)


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """A server certificate, whom it stands for, who may come in by it, and where they get to."""

    names: tuple[str, ...] = ()  # TLS server names in normal form, or *.NAME; empty: any
    default: bool = False  # takes clients that send no server name
    cert: Path | None = None
    key: Path | None = None
    key_passphrase_file: Path | None = None
    client_ca: tuple[AuthorityFile, ...] = ()  # of several, each has a name; empty: those of state
    client_auth: ClientAuth = ClientAuth.REQUIRED
    crl: tuple[Path, ...] = ()
    ocsp: Ocsp = Ocsp.OFF
    ocsp_url: str | None = None  # None: as each certificate says
    ocsp_hosts: tuple[str, ...] = ()  # in normal form; empty: any at a public address
    verify_depth: int | None = None
    tls_min: TlsVersion = TlsVersion.TLS13
    legacy_certs: bool = False
    offer_authorities: bool = True
    trust_domain: str | None = None
    to: str | None = None  # the name of an upstream, or a target
    allow: tuple[str, ...] = ()  # with allow_file None: every verified client
    allow_file: Path | None = None
    headers: tuple[HeaderStyle, ...] = DEFAULT_STYLES
    routes: tuple[RouteConfig, ...] = ()

    @property
    def authorities(self) -> tuple[str, ...]:
        """The names of authorities that its rules may ask for."""
        return tuple(one.name for one in self.client_ca if one.name)


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """One bound address. `limits` are whole: what the file leaves out here is filled from the limits for all."""

    name: str = "listener-1"
    listen: str = "127.0.0.1:8443"  # what parse_place takes
    mode: Mode = Mode.HTTP
    site: SiteConfig | None = None  # of the keys that stand in the listener itself
    sites: tuple[SiteConfig, ...] = ()
    proxy_protocol_from: tuple[IPv4Network | IPv6Network, ...] = ()
    alpn: tuple[str, ...] = ()
    http2: bool = True
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    @property
    def all_sites(self) -> tuple[SiteConfig, ...]:
        """The listener's own site, if it has one, and the others."""
        return self.sites if self.site is None else (self.site, *self.sites)


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """How a target is looked after."""

    path: str | None = None  # None: that it takes a connection is enough
    interval: timedelta = timedelta(seconds=5)
    timeout: timedelta = timedelta(seconds=2)
    rise: int = 2
    fall: int = 3


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """An app: its targets, and how they are spoken to."""

    targets: tuple[str, ...] = ()  # what parse_target takes
    balance: Balance = Balance.LEAST_CONNECTIONS
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None
    expect: str | None = None
    tls_min: TlsVersion = TlsVersion.TLS13
    proxy_protocol: ProxyProtocol = ProxyProtocol.OFF
    connect: timedelta | None = None  # None: the listener's limit
    response: timedelta | None = None  # None: the listener's limit
    retries: int = 1
    health: HealthConfig | None = None


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """Where metrics and health are served, in plain HTTP."""

    listen: str = "127.0.0.1:9464"
    public: bool = False


@dataclass(frozen=True, slots=True)
class AssertionConfig:
    """The signed token that tells the app who the client is."""

    key: Path | None = None  # None: made at start
    issuer: str = "handfast"
    audience: str | None = None
    lifetime: timedelta = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that a guard is told."""

    workers: int = 1  # 0: one for each processor
    user: str | None = None
    group: str | None = None
    log: LogStyle = LogStyle.PRETTY
    drain: timedelta = timedelta(seconds=30)
    sandbox: bool = True
    state: Path | None = None
    listeners: tuple[ListenerConfig, ...] = ()
    upstreams: Mapping[str, UpstreamConfig] = field(default_factory=dict)
    admin: AdminConfig | None = None
    assertion: AssertionConfig | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def upstream(self, to: str) -> UpstreamConfig:
        """The upstream that a site or route means by `to`: a named one, or one made of the target."""
        return self.upstreams.get(to) or UpstreamConfig(targets=(to,))


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and where. `reads` are other places that it was judged by."""

    at: str  # a dotted path, as listener[0].limits.handshake
    detail: str
    reads: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.at}: {self.detail}"


def find_conflicts(config: Config) -> Iterator[Problem]:
    """Yield what cannot be or must not be, one setting held against another. Raises nothing."""
    if not config.listeners:
        yield Problem("listener", "there is none; begin one with [[listener]]")
    yield from _repeated_places(config)
    for at, listener in enumerate(config.listeners):
        yield from _in_listener(config, listener, f"listener[{at}]")
    for name, upstream in config.upstreams.items():
        yield from _in_upstream(config, upstream, f"upstream.{name}")
    if config.admin is not None and not config.admin.public and not _loopback(config.admin.listen):
        detail = (
            f"{config.admin.listen} can be reached from other machines, in plain HTTP; write public = true to allow it"
        )
        yield Problem("admin.listen", detail, ("admin.public",))


def _repeated_places(config: Config) -> Iterator[Problem]:
    names: dict[str, str] = {}
    places: dict[str, str] = {}
    listens = [(f"listener[{at}].listen", listener.listen) for at, listener in enumerate(config.listeners)]
    if config.admin is not None:
        listens.append(("admin.listen", config.admin.listen))
    for at, listener in enumerate(config.listeners):
        first = names.setdefault(listener.name, f"listener[{at}].name")
        if first != f"listener[{at}].name":
            yield Problem(f"listener[{at}].name", f"{listener.name} is the name of {first.partition('.')[0]}", (first,))
    for spot, listen in listens:
        try:
            place = parse_place(listen)
        except InvalidInput as error:
            yield Problem(spot, str(error))
            continue
        first = places.setdefault(str(place), spot)
        if first != spot and (place.port or place.path or place.systemd):
            yield Problem(spot, f"{place} is taken by {first.partition('.')[0]}", (first,))


def _in_listener(config: Config, listener: ListenerConfig, table: str) -> Iterator[Problem]:
    if listener.alpn and listener.mode is Mode.HTTP:
        yield Problem(
            f"{table}.alpn", 'belongs to mode = "tcp"; http2 = false is how HTTP/2 is turned off', (f"{table}.mode",)
        )
    if not listener.http2 and listener.mode is Mode.TCP:
        yield Problem(f"{table}.http2", 'belongs to mode = "http"; bytes are forwarded unread here', (f"{table}.mode",))
    if not listener.all_sites:
        yield Problem(
            f"{table}.cert", "is missing; give cert and key here, or sites in [[listener.site]]", (f"{table}.site",)
        )
    tables = [] if listener.site is None else [table]
    tables += [f"{table}.site[{at}]" for at in range(len(listener.sites))]
    sites = list(zip(tables, listener.all_sites, strict=True))
    yield from _sites_that_compete(sites)
    for spot, site in sites:
        yield from _in_site(config, site, spot)
        asked = [(f"{spot}.to", site.to), *((f"{spot}.route[{at}].to", one.to) for at, one in enumerate(site.routes))]
        for at, to in asked:
            if to is not None:
                yield from _destination(config, listener.mode, to, at, f"{table}.mode")
                yield from _round_trip(config, listener, to, (at, f"{table}.listen"))
        if listener.mode is Mode.TCP:
            yield from _bytes_only(site, spot, f"{table}.mode")


def _sites_that_compete(sites: list[tuple[str, SiteConfig]]) -> Iterator[Problem]:
    named: dict[str, str] = {}
    for spot, site in sites:
        for name in site.names:
            first = named.setdefault(name.lower(), f"{spot}.names")
            if first != f"{spot}.names":
                yield Problem(f"{spot}.names", f"{name} stands in {first} already", (first,))
    for key, what in (("names", "takes any server name"), ("default", "takes clients that send no server name")):
        chosen = [spot for spot, site in sites if (site.default if key == "default" else not site.names)]
        for first, second in pairwise(chosen):
            detail = f"{first} {what} already, and only one site of a listener may"
            yield Problem(f"{second}.{key}", detail, (f"{first}.{key}",))


def _in_site(config: Config, site: SiteConfig, table: str) -> Iterator[Problem]:
    if site.cert is None:
        more = "" if ".site[" in table else "; what stands in the listener itself makes a site, and is not passed on"
        yield Problem(f"{table}.cert", f"is missing: a site has a server certificate{more}")
    if site.key is None:
        yield Problem(f"{table}.key", "is missing: the private key of cert")
    if site.client_auth is ClientAuth.OFF:
        yield from _rules_about_nobody(site, table)
    elif not site.client_ca and config.state is None:
        detail = (
            f'is missing: client_auth = "{site.client_auth}" needs the clients\' authority; or give state at the top'
        )
        yield Problem(f"{table}.client_ca", detail, (f"{table}.client_auth", "state"))
    if site.to is None and (not site.routes or any(route.to is None for route in site.routes)):
        yield Problem(
            f"{table}.to", "is missing: the app, as 127.0.0.1:8000 or the name of an upstream", (f"{table}.route",)
        )
    yield from _ocsp_of_nobody(site, table)
    if HeaderStyle.ASSERTION in site.headers and config.assertion is None:
        yield Problem(f"{table}.headers", '"assertion" needs the table [assertion]', ("assertion",))
    domain = site.trust_domain or (_STAND_IN if config.state else None)
    yield from _bad_rules(site, site.allow, f"{table}.allow", (domain, table))
    for at, route in enumerate(site.routes):
        spot = f"{table}.route[{at}]"
        yield from _bad_rules(site, route.allow or (), f"{spot}.allow", (domain, table))
        if route.client_auth is ClientAuth.OPTIONAL and site.client_auth is ClientAuth.REQUIRED:
            detail = (
                "the site requires a certificate at the handshake, before the path is known; write "
                'client_auth = "optional" for the site and "required" for the routes that need one'
            )
            yield Problem(f"{spot}.client_auth", detail, (f"{table}.client_auth",))
    if site.client_auth is ClientAuth.OPTIONAL:
        yield from _rules_of_open_routes(site, table)


def _rules_of_open_routes(site: SiteConfig, table: str) -> Iterator[Problem]:
    """Rules that nobody would be held to: who shows no certificate is let in beside them."""
    for at, route in enumerate(site.routes):
        if route.allow is not None and route.client_auth is not ClientAuth.REQUIRED:
            detail = 'binds nobody while clients without a certificate are let in; write client_auth = "required" here'
            reads = (f"{table}.route[{at}].client_auth", f"{table}.client_auth")
            yield Problem(f"{table}.route[{at}].allow", detail, reads)
    if not any(route.client_auth is ClientAuth.REQUIRED and route.allow is None for route in site.routes):
        detail = 'binds nobody: client_auth = "optional", and no route requires a certificate and leaves out allow'
        for key, given in (("allow", bool(site.allow)), ("allow_file", site.allow_file is not None)):
            if given:
                yield Problem(f"{table}.{key}", detail, (f"{table}.client_auth", f"{table}.route"))


def _ocsp_of_nobody(site: SiteConfig, table: str) -> Iterator[Problem]:
    for key, given in (("ocsp_url", site.ocsp_url is not None), ("ocsp_hosts", bool(site.ocsp_hosts))):
        if given and site.ocsp is Ocsp.OFF:
            detail = 'says whom to ask, but ocsp = "off" asks nobody; write "require" or "allow_unreachable"'
            yield Problem(f"{table}.{key}", detail, (f"{table}.ocsp",))


def _rules_about_nobody(site: SiteConfig, table: str) -> Iterator[Problem]:
    reads = (f"{table}.client_auth",)
    detail = (
        'speaks of clients with certificates, but client_auth = "off" asks for none; write "optional" or "required"'
    )
    if site.allow:
        yield Problem(f"{table}.allow", detail, reads)
    if site.allow_file is not None:
        yield Problem(f"{table}.allow_file", detail, reads)
    for at, route in enumerate(site.routes):
        if route.allow is not None:
            yield Problem(f"{table}.route[{at}].allow", detail, reads)
        if route.client_auth is not None:
            yield Problem(f"{table}.route[{at}].client_auth", detail, reads)


def _bad_rules(site: SiteConfig, rules: tuple[str, ...], at: str, of: tuple[str | None, str]) -> Iterator[Problem]:
    """Rules that do not parse, of a site that is `of` a trust domain and stands in a table."""
    domain, table = of
    for number, rule in enumerate(rules):
        try:
            parse_rule(rule, domain, site.authorities)
        except InvalidInput as error:
            yield Problem(f"{at}[{number}]", str(error), (at, f"{table}.trust_domain", f"{table}.client_ca", "state"))


def _bytes_only(site: SiteConfig, table: str, mode: str) -> Iterator[Problem]:
    if site.routes:
        yield Problem(f"{table}.route", 'belongs to mode = "http"; requests are not read here', (mode,))
    if site.headers != SiteConfig().headers:
        yield Problem(f"{table}.headers", 'belongs to mode = "http"; nothing is added to bytes', (mode,))
    for number, text in enumerate(site.allow):
        try:
            rule = parse_rule(text, _STAND_IN, site.authorities)
        except InvalidInput:  # told of with its reason by another check
            continue
        if rule.methods or rule.path:
            detail = 'in mode = "tcp" a rule says only who: there are no methods and paths'
            yield Problem(f"{table}.allow[{number}]", detail, (mode, f"{table}.allow"))


def _destination(config: Config, mode: Mode, to: str, at: str, mode_at: str) -> Iterator[Problem]:
    """What is wrong with a `to`; the targets of a named upstream are judged where they stand."""
    named = config.upstreams.get(to)
    if named is None and ":" not in to and not to.isdecimal():
        near = get_close_matches(to[:64], config.upstreams, 1)
        meant = f"; did you mean {near[0]}?" if near else f"; write [upstream.{to[:64]}], or HOST:PORT"
        yield Problem(at, f"there is no upstream {to[:64]!r}{meant}", ("upstream",))
        return
    texts = (to,) if named is None else named.targets[:1]
    for text in texts:
        try:
            target = parse_target(text)
        except InvalidInput as error:
            if named is None:
                yield Problem(at, str(error))
            return
        reads = (mode_at,) if named is None else (mode_at, f"upstream.{to}.targets")
        if target.http is (mode is Mode.TCP):
            want = "tcp:// or tls://" if mode is Mode.TCP else "http://, https://, h2c:// or h2://"
            yield Problem(at, f'{text} does not go with mode = "{mode}", which takes {want}', reads)
        elif named is None and target.tls and config.state is None:
            detail = f"{text} needs an authority to judge the server by: write an [upstream.NAME] with targets and ca"
            yield Problem(at, detail, ("state",))


def _round_trip(config: Config, listener: ListenerConfig, to: str, spots: tuple[str, str]) -> Iterator[Problem]:
    """A guard that would call itself; what does not parse is told of by other checks."""
    try:
        place = parse_place(listener.listen)
        targets = [parse_target(text) for text in config.upstream(to).targets]
    except InvalidInput:
        return
    for target in targets:
        if leads_back(target, place):
            at, listen = spots
            yield Problem(at, f"{target} is where this listener listens itself; the app is elsewhere", (listen,))


def _in_upstream(config: Config, upstream: UpstreamConfig, table: str) -> Iterator[Problem]:
    targets: list[Target] = []
    if not upstream.targets:
        yield Problem(f"{table}.targets", 'is missing: where the app is, as targets = ["127.0.0.1:8000"]')
    for number, text in enumerate(upstream.targets):
        try:
            targets.append(parse_target(text))
        except InvalidInput as error:
            yield Problem(f"{table}.targets[{number}]", str(error), (f"{table}.targets",))
    if (upstream.cert is None) is not (upstream.key is None):
        given, missing = ("cert", "key") if upstream.key is None else ("key", "cert")
        yield Problem(
            f"{table}.{missing}", f"is missing: {given} is given, and they go together", (f"{table}.{given}",)
        )
    if upstream.expect is not None:
        try:
            parse_pattern(upstream.expect, _STAND_IN if config.state else None)
        except InvalidInput as error:
            yield Problem(f"{table}.expect", str(error), ("state",))
    if upstream.health is not None and upstream.health.timeout > upstream.health.interval:
        yield Problem(f"{table}.health.timeout", "is longer than interval", (f"{table}.health.interval",))
    if targets and len(targets) == len(upstream.targets):
        for problem in _speech(config, upstream, targets, table):
            yield Problem(problem.at, problem.detail, (*problem.reads, f"{table}.targets"))


def _speech(config: Config, upstream: UpstreamConfig, targets: list[Target], table: str) -> Iterator[Problem]:
    first = targets[0]
    if any((one.speech, one.tls) != (first.speech, first.tls) for one in targets):
        yield Problem(f"{table}.targets", "all targets of an upstream are spoken to in the same way")
        return
    if not first.http and upstream.health is not None and upstream.health.path is not None:
        yield Problem(f"{table}.health.path", "belongs to HTTP; without it, a connection is enough")
    if not first.tls:
        for key in ("ca", "cert", "key", "server_name", "expect"):
            if getattr(upstream, key) is not None:
                detail = "is for TLS, which these targets do not speak; write https://, h2:// or tls://"
                yield Problem(f"{table}.{key}", detail)
        return
    if upstream.ca is None and config.state is None:
        detail = "is missing: the authorities of the server, in PEM; the system's are not taken for granted"
        yield Problem(f"{table}.ca", detail, ("state",))
    if upstream.server_name is None and upstream.expect is None and any(one.path for one in targets):
        yield Problem(f"{table}.server_name", "is missing: a socket has no name to judge the server by")


def leads_back(target: Target, place: Place) -> bool:
    """Whether a target is the very place that is listened on, so that a guard would call itself."""
    if target.path or place.path or place.systemd:
        return bool(place.path) and target.path == place.path
    ours, theirs = (_LOCAL.get(host, host) for host in (place.host, target.host))
    everywhere = place.host in ("0.0.0.0", "::") and theirs in ("127.0.0.1", "::1")  # noqa: S104  # compared with
    return place.port == target.port and (ours == theirs or everywhere)


def _loopback(listen: str) -> bool:
    try:
        place = parse_place(listen)
    except InvalidInput:  # told of where addresses are compared
        return True
    if place.path or place.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(place.host).is_loopback
    except ValueError:  # a name: where it leads is not known here
        return False
