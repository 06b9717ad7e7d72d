"""From a configuration to what a guard runs: listeners, backends, and snapshots made anew when files change.

Theory of operation. `build` reads every file that the configuration names and makes one whole snapshot, or raises
and changes nothing. `refresh` is asked by the guard each tick: when a file, the authority's feed or the
configuration itself has changed it builds again. What must outlive a snapshot (counts, health, limits' levels) is
kept by name where the configuration of it has not changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509

from handfast.errors import HandfastError, InvalidInput, Reason
from handfast.files import read_file
from handfast.guard.assertion import Minter
from handfast.guard.config import load_config, parse_rules
from handfast.guard.connection import Limits, Listener
from handfast.guard.limits import Gate, Rate, Rates
from handfast.guard.places import Target, parse_target
from handfast.guard.routes import Identify, Route, Site, Sites, Snapshot
from handfast.guard.schema import (
    Balance,
    Config,
    LimitsConfig,
    ListenerConfig,
    Mode,
    ProxyProtocol,
    RouteConfig,
    SiteConfig,
    TlsVersion,
    UpstreamConfig,
)
from handfast.guard.upstream import Backend, Handshake, Upstreams
from handfast.guard.watch import Watch
from handfast.pki.certificates import certificate_names
from handfast.pki.names import Name, parse_name, parse_pattern
from handfast.pki.revocation import NO_REVOCATIONS, CrlSet, Revocations, check_crls, parse_crls
from handfast.pki.verification import Purpose, Terms, TrustBundle, VerifiedPeer
from handfast.policy import ALLOW_ANY, Policy, parse_path, parse_policy
from handfast.tls.client import ClientContext, ClientSettings, server_name_of
from handfast.tls.credential import check_server, check_time, load_bundle, load_credential
from handfast.tls.server import MAX_KNOWN, ClientAuth, ServerContext, ServerSettings
from handfast.wire.forwarding import HeaderStyle, facts_of, identity_headers
from handfast.wire.http1 import Header

MAX_CRL = 64 << 20  # bytes; a list of a million entries has about 36 MiB
_H2, _HTTP1 = b"h2", b"http/1.1"
# Backends by what `to` says, with what they were made of: the configuration, and seconds to connect.
_Groups = dict[str, tuple[UpstreamConfig, float, Upstreams]]


class Feed(Protocol):
    """An authority as a source of trust: what changes there is in force here within a tick."""

    def revision(self) -> int:
        """Changes whenever one of the others does."""

    def bundle(self) -> TrustBundle:
        """The issuers that it vouches for."""

    def revocations(self, now: datetime) -> Revocations:
        """What it has revoked."""


@dataclass(slots=True)
class Assembly:
    """Makes what a guard runs. `source`: the file that the configuration came from, to be read again on change.

    `workers`: how many processes share the listeners, and so the limits that count connections.
    """

    config: Config
    passphrase: Callable[[Path], bytes]  # reads the one in a file
    source: Path | None = None
    feed: Feed | None = None
    workers: int = 1
    minter: Minter | None = None
    listeners: dict[str, Listener] = field(default_factory=dict)
    certificates: dict[str, datetime] = field(default_factory=dict)  # listener and names -> when it expires
    _groups: _Groups = field(default_factory=dict)
    _generation: int = 0
    _revision: int = -1
    _watch: Watch = field(default_factory=lambda: Watch(()))
    _forced: bool = False

    def __post_init__(self) -> None:
        if self.minter is None and self.config.assertion is not None:
            self.minter = Minter(self.config.assertion)
        for listener in self.config.listeners:
            self.listeners[listener.name] = Listener(
                name=listener.name,
                http=listener.mode is Mode.HTTP,
                limits=_limits(listener.limits),
                gate=Gate(listener.name, _rates(listener.limits).share(self.workers)),
                proxy_from=listener.proxy_protocol_from,
            )

    def build(self, now: datetime) -> Snapshot:
        """Read all files and make a snapshot. Raises HandfastError with what is wrong; nothing has changed then."""
        watch = Watch(self._files(self.config))  # before they are read: a change meanwhile is seen later
        snapshot = self._build(self.config, now)
        self._watch = watch
        return snapshot

    def refresh(self, now: datetime) -> Snapshot | None:
        """Return a new snapshot if anything changed, else None. Raises HandfastError; what is in force then stays."""
        changed = bool(self._watch.changed()) or self._forced
        if self.feed is not None and self.feed.revision() != self._revision:
            changed = True
        if not changed:
            return None
        self._forced = False
        config = self.config if self.source is None else load_config(self.source)
        self._watch.follow([*self._files(self.config), *self._files(config)])
        self._refuse_lasting(config)
        snapshot = self._build(config, now)
        self.config = config
        self._watch.follow(self._files(config))
        for listener in config.listeners:
            running = self.listeners[listener.name]
            running.limits, running.proxy_from = _limits(listener.limits), listener.proxy_protocol_from
            if running.gate is not None:
                running.gate.change(_rates(listener.limits).share(self.workers))
        return snapshot

    def files(self) -> list[Path]:
        """The files that it reads."""
        return self._files(self.config)

    def upstreams(self) -> list[Upstreams]:
        """The groups of backends in force."""
        return [group for _, _, group in self._groups.values()]

    def reload(self) -> None:
        """Have the next `refresh` read everything again (SIGHUP)."""
        self._forced = True

    def _refuse_lasting(self, config: Config) -> None:
        """What cannot change while the guard runs must not seem to."""
        now = {one.name: (one.listen, one.mode) for one in self.config.listeners}
        then = {one.name: (one.listen, one.mode) for one in config.listeners}
        fixed = ("workers", "user", "group", "log", "admin", "assertion", "state")
        changed = [key for key in fixed if getattr(config, key) != getattr(self.config, key)]
        if now != then:
            changed.append("the listeners' names, addresses or modes")
        if changed:
            raise HandfastError(Reason.GUARD_RESTART, what=", ".join(changed))

    def _build(self, config: Config, now: datetime) -> Snapshot:
        revision = -1 if self.feed is None else self.feed.revision()  # before the lists: a later change is seen later
        groups: _Groups = {}
        certificates: dict[str, datetime] = {}
        sites = {
            listener.name: Sites(
                [self._site(config, listener, site, (now, groups, certificates)) for site in listener.all_sites]
            )
            for listener in config.listeners
        }
        self._generation += 1
        self._groups, self.certificates, self._revision = groups, certificates, revision
        return Snapshot(sites, self._generation)

    def _site(
        self,
        config: Config,
        listener: ListenerConfig,
        site: SiteConfig,
        made: tuple[datetime, _Groups, dict[str, datetime]],
    ) -> Site:
        now, groups, certificates = made
        http = listener.mode is Mode.HTTP
        assert site.cert is not None
        assert site.key is not None
        opens = None
        if site.key_passphrase_file is not None:
            opens = self.passphrase(site.key_passphrase_file)
        credential = load_credential(site.cert, site.key, opens)
        check_server(credential, now)
        bundle, revocations = self._trust(site)
        if bundle.anchors:
            check_time(bundle.anchors, now)
        terms = Terms(
            bundle,
            Purpose.CLIENT,
            revocations=revocations,
            crls=_crls(site.crl, bundle),
            legacy=site.legacy_certs,
            depth=site.verify_depth,
        )
        alpn = tuple(name.encode() for name in listener.alpn)
        if http:
            alpn = (_H2, _HTTP1) if listener.http2 else (_HTTP1,)
        settings = ServerSettings(
            answer_refusals=http,
            offer_authorities=site.offer_authorities,
            allow_tls12=site.tls_min is TlsVersion.TLS12,
            client_auth=site.client_auth,
            alpn=alpn,
        )
        context = ServerContext(credential, terms, settings)
        certificates[f"{listener.name} {' '.join(site.names)}".strip()] = credential.chain[0].not_valid_after_utc
        policy = _policy(site, bundle.trust_domain)
        routes = [self._route(config, listener, site, route, (policy, groups)) for route in site.routes]
        if site.to is not None:
            whole = RouteConfig()
            routes.append(self._route(config, listener, site, whole, (policy, groups)))
        identify, renew = self._identify(site, credential.chain[0])
        nameless = site.default or not site.names or len(listener.all_sites) == 1
        return Site(context, tuple(routes), site.names, nameless, identify, renew)

    def _trust(self, site: SiteConfig) -> tuple[TrustBundle, Revocations]:
        if site.client_ca is not None:
            return replace(load_bundle(site.client_ca), trust_domain=site.trust_domain), NO_REVOCATIONS
        if self.feed is not None and site.client_auth is not ClientAuth.OFF:
            return self.feed.bundle(), self.feed.revocations(datetime.now(UTC))
        return TrustBundle(()), NO_REVOCATIONS

    def _route(
        self,
        config: Config,
        listener: ListenerConfig,
        site: SiteConfig,
        route: RouteConfig,
        made: tuple[Policy, _Groups],
    ) -> Route:
        policy, groups = made
        to = route.to or site.to
        assert to is not None
        client_auth = site.client_auth if route.client_auth is None else route.client_auth
        return Route(
            upstreams=self._group(config, listener, to, groups),
            policy=policy if route.allow is None else parse_policy(route.allow, site.trust_domain),
            anonymous=client_auth is not ClientAuth.REQUIRED,
            path=None if route.path == "/**" else parse_path(route.path),
            methods=frozenset(method.encode() for method in route.methods),
        )

    def _group(
        self,
        config: Config,
        listener: ListenerConfig,
        to: str,
        groups: _Groups,
    ) -> Upstreams:
        asked = config.upstream(to)
        connect = (asked.connect or listener.limits.connect).total_seconds()
        made = groups.get(to)
        if made is not None and made[:2] == (asked, connect):
            return made[2]
        old = self._groups.get(to)
        if old is not None and old[:2] == (asked, connect) and old[2].handshake is None:
            group = old[2]  # with its counts and health; TLS files may have changed, so such groups are made anew
        else:
            group = _upstreams(to, asked, connect, self.feed)
            if old is not None:
                _carry_over(old[2], group)
        groups[to] = asked, connect, group
        return group

    def _identify(self, site: SiteConfig, leaf: x509.Certificate) -> tuple[Identify, float]:
        styles = tuple(HeaderStyle(style.value) for style in site.headers if style.value != "assertion")
        asserted = any(style.value == "assertion" for style in site.headers)
        minter = self.minter if asserted else None
        if asserted and minter is None:
            raise InvalidInput(Reason.GUARD_SITES, detail="headers has assertion, but there is no [assertion]")
        by = next((name.value for name in certificate_names(leaf) if name.is_uri), "")

        made: dict[int, tuple[VerifiedPeer, tuple[Header, ...]]] = {}  # by the peer's identity in memory

        def identify(peer: VerifiedPeer | None, now: datetime) -> tuple[Header, ...]:
            if peer is None:
                return identity_headers(styles, None)
            known = made.get(id(peer))
            if known is None or known[0] is not peer:
                if len(made) >= MAX_KNOWN:
                    made.clear()
                known = made[id(peer)] = peer, identity_headers(styles, facts_of(peer, by))
            headers = known[1]
            if minter is not None:
                headers += (minter.header(peer, now),)
            return headers

        return identify, 0.0 if minter is None else minter.renew_after

    def _files(self, config: Config) -> list[Path]:
        files: list[Path | None] = [self.source]
        for listener in config.listeners:
            for site in listener.all_sites:
                files += [site.cert, site.key, site.client_ca, site.allow_file, site.key_passphrase_file, *site.crl]
        for upstream in config.upstreams.values():
            files += [upstream.ca, upstream.cert, upstream.key]
        return list(dict.fromkeys(path for path in files if path is not None))


def _limits(limits: LimitsConfig) -> Limits:
    return Limits(
        handshake=limits.handshake.total_seconds(),
        head=limits.head.total_seconds(),
        idle=limits.idle.total_seconds(),
        response=limits.response.total_seconds(),
        tunnel_idle=None if limits.tunnel_idle is None else limits.tunnel_idle.total_seconds(),
        max_body=limits.max_body,
    )


def _rates(limits: LimitsConfig) -> Rates:
    def rate(per_second: float | None) -> Rate | None:
        if per_second is None:
            return None
        return Rate(per_second, float(limits.burst or max(1.0, per_second)))

    return Rates(
        connections=limits.connections,
        connections_per_address=limits.connections_per_address,
        connections_per_identity=limits.connections_per_identity,
        handshakes_per_second=rate(limits.handshakes_per_second),
        handshakes_per_second_per_address=rate(limits.handshakes_per_second_per_address),
        requests_per_second=rate(limits.requests_per_second),
        requests_per_second_per_identity=rate(limits.requests_per_second_per_identity),
    )


def _policy(site: SiteConfig, trust_domain: str | None) -> Policy:
    if site.allow_file is not None:
        text = read_file(site.allow_file, "policy", 64 << 20).decode("utf-8", "replace")
        lines = (*parse_policy(site.allow, trust_domain).rules, *parse_rules(text, str(site.allow_file), trust_domain))
        return Policy(lines)
    return parse_policy(site.allow, trust_domain) if site.allow else ALLOW_ANY


def _crls(files: tuple[Path, ...], bundle: TrustBundle) -> CrlSet | None:
    if not files:
        return None
    lists = [crl for path in files for crl in parse_crls(read_file(path, "revocation list", MAX_CRL), str(path))]
    return check_crls(lists, bundle.anchors)


def _upstreams(name: str, asked: UpstreamConfig, connect: float, feed: Feed | None) -> Upstreams:
    targets = tuple(parse_target(text) for text in asked.targets)
    return Upstreams(
        name=name,
        backends=tuple(Backend(target) for target in targets),
        handshake=_caller(asked, feed) if any(target.tls for target in targets) else None,
        round_robin=asked.balance is Balance.ROUND_ROBIN,
        retries=asked.retries,
        connect=connect,
        response=None if asked.response is None else asked.response.total_seconds(),
        proxy=asked.proxy_protocol is not ProxyProtocol.OFF,
        proxy_certificate=asked.proxy_protocol is ProxyProtocol.V2_CERT,
        health=asked.health,
    )


def _caller(asked: UpstreamConfig, feed: Feed | None) -> Callable[[Target], Handshake]:
    """What begins TLS towards a target: read once, and a context for each target's own name."""
    if asked.ca is not None:
        bundle = load_bundle(asked.ca)
    else:
        assert feed is not None  # find_conflicts
        bundle = feed.bundle()
    credential = None
    if asked.cert is not None and asked.key is not None:
        credential = load_credential(asked.cert, asked.key)
    expect = None if asked.expect is None else parse_pattern(asked.expect)
    contexts: dict[Target, ClientContext] = {}

    def begin(target: Target) -> Handshake:
        context = contexts.get(target)
        if context is None:
            host = asked.server_name or target.host
            name: Name | None = parse_name(host) if expect is None else None
            terms = Terms(bundle, Purpose.SERVER, name=name)
            alpn = (_H2,) if target.speech.value == "h2" else ()
            settings = ClientSettings(server_name_of(host) if host else None, expect, alpn=alpn)
            context = contexts[target] = ClientContext(credential, terms, settings)
        return context.connect(lambda: datetime.now(UTC))

    for text in asked.targets:  # so that what is wrong is known at start
        target = parse_target(text)
        if target.tls:
            begin(target)
    return begin


def _carry_over(old: Upstreams, new: Upstreams) -> None:
    """Targets that stay keep their health."""
    known = {backend.target: backend for backend in old.backends}
    for backend in new.backends:
        before = known.get(backend.target)
        if before is not None:
            backend.healthy, backend.refusals, backend.rest_until = before.healthy, before.refusals, before.rest_until
