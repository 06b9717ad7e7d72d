"""From a configuration to what a guard runs: listeners, backends, and snapshots made anew when files change.

Theory of operation. `build` reads every file that the configuration names and makes one whole snapshot, or raises
and changes nothing. `refresh` is asked by the guard each tick: when a file or the configuration itself has changed
it builds again; when the authority's feed has, it builds with what the files held when they were read last, so that a
revocation waits for no file. What must outlive a snapshot (counts, health, limits' levels) is kept by name where the
configuration of it has not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cryptography import x509

from handfast.errors import HandfastError, InvalidInput, Reason
from handfast.files import read_file
from handfast.guard.assertion import Minter
from handfast.guard.config import parse_config, parse_rules, read_config
from handfast.guard.connection import Limits, Listener
from handfast.guard.limits import Gate, Rate, Rates
from handfast.guard.ocsp import OcspChecker
from handfast.guard.places import Speech, Target, parse_target
from handfast.guard.routes import H2, HTTP1, HTTP_ALPN, Identify, Route, Site, Sites, Snapshot
from handfast.guard.schema import (
    Balance,
    Config,
    LimitsConfig,
    ListenerConfig,
    Mode,
    Ocsp,
    ProxyProtocol,
    RouteConfig,
    SiteConfig,
    TlsVersion,
    UpstreamConfig,
)
from handfast.guard.upstream import Backend, Handshake, Upstreams
from handfast.guard.watch import Watch
from handfast.pki.certificates import certificate_names, label, public_key_der
from handfast.pki.names import Name, parse_name, parse_pattern
from handfast.pki.revocation import NO_REVOCATIONS, CrlSet, Revocations, check_crls, parse_crls
from handfast.pki.verification import Purpose, Terms, TrustBundle, VerifiedPeer
from handfast.policy import ALLOW_ANY, Policy, parse_path, parse_policy
from handfast.tls.client import ClientContext, ClientSettings, server_name_of
from handfast.tls.credential import Credential, check_time, check_usable, load_bundle, load_credential
from handfast.tls.server import ClientAuth, ServerContext, ServerSettings
from handfast.wire.forwarding import HeaderStyle, facts_of, identity_headers
from handfast.wire.http1 import Header

MAX_CRL = 64 << 20  # bytes; a list of a million entries has about 36 MiB
MAX_POLICY = 64 << 20  # bytes of a file of rules
_RETRY = timedelta(seconds=30)  # after which a reload that failed is tried again, though nothing changed
# Backends by what `to` says and the seconds to connect, with the configuration that they were made of.
_Groups = dict[tuple[str, float], tuple[UpstreamConfig, Upstreams]]
_Loaded = dict[tuple[object, ...], Any]  # what the files held, by what was read of which
_Lists = tuple[str, tuple[Path, ...]]  # a listener and the files of its revocation lists
_T = TypeVar("_T")
_Asking = tuple[Ocsp, str | None, frozenset[str]]  # how a site asks by OCSP; those that do alike know the same


class Feed(Protocol):
    """An authority as a source of trust: what changes there is in force here within a tick."""

    def revision(self) -> int:
        """Changes whenever one of the others does."""

    def bundle(self) -> TrustBundle:
        """The issuers that it vouches for."""

    def revocations(self, now: datetime) -> Revocations:
        """What it has revoked."""


class Taken(Protocol):
    """The text of the configuration that was last put in force, for all processes of a guard."""

    def save(self, text: str) -> None:
        """Another one is in force."""

    def load(self) -> str:
        """Return it; '' while it is the one that the guard was started with."""


@dataclass(slots=True)
class Assembly:
    """Makes what a guard runs. `source`: the file that the configuration came from, to be read again on change.

    `workers`: how many processes share the listeners, and so the limits that count connections. `minter`: one for
    all of them, or what one signs could not be checked with the keys that another publishes. `confinement` says how
    the process is confined, and `reach` which folders that leaves open; None: all.
    """

    config: Config
    passphrase: Callable[[Path], bytes]  # reads the one in a file
    source: Path | None = None
    feed: Feed | None = None
    workers: int = 1
    minter: Minter | None = None
    taken: Taken | None = None
    confinement: tuple[str, ...] = ()
    reach: tuple[Path, ...] | None = None
    listeners: dict[str, Listener] = field(default_factory=dict)
    certificates: dict[str, datetime] = field(default_factory=dict)  # listener and names -> when it expires
    lists: dict[str, datetime] = field(default_factory=dict)  # listener and names, issuer -> when its list is due
    _groups: _Groups = field(default_factory=dict)
    _checkers: dict[_Asking, OcspChecker] = field(default_factory=dict)  # and so what they know outlives a snapshot
    # By listener and files: the newest list of each issuer that was ever in force, also of one that has none now.
    _newest: dict[_Lists, dict[tuple[bytes, bytes], tuple[int, datetime]]] = field(default_factory=dict)
    _loaded: _Loaded = field(default_factory=dict)  # in force
    _revision: int = -1  # of the feed, in what is in force
    _unfit: int = -1  # of the feed, which no snapshot could be made of
    _followed: bool = False  # the feed had the last turn
    _watch: Watch = field(default_factory=lambda: Watch(()))
    _forced: bool = False  # by SIGHUP
    _pending: bool = False  # a change was seen, and not acted on yet
    _again: datetime | None = None  # when to try once more what failed

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
        if self._forced:  # all is read now: what changed until now is no news in the next tick
            self._forced, self._watch = False, Watch(self._files(self.config))
            self._pending = True
        elif self._watch.changed() or (self._again is not None and now >= self._again):
            self._pending = True
        if self.feed is not None and not (self._pending and self._followed):  # else files would wait for a busy feed
            revision = self.feed.revision()
            if revision not in (self._revision, self._unfit):
                self._followed = True
                return self._follow_feed(now, revision)
        self._followed = False
        if not self._pending:
            return None
        self._pending, self._again = False, now + _RETRY
        snapshot = self._adopt(None if self.source is None else read_config(self.source), now)
        self._again = None
        return snapshot

    def _follow_feed(self, now: datetime, revision: int) -> Snapshot:
        try:
            snapshot = self._build(self.config, now, self._loaded)
        except HandfastError:
            self._unfit, self._again = revision, now + _RETRY
            raise
        if self._again is not None:  # what failed before fails still: it is told again
            self._again = now
        return snapshot

    def build_newest(self, now: datetime) -> Snapshot:
        """Build what the file says now, or else what it said when it was last taken: by the guard's other workers.

        For a worker that is started anew. Raises HandfastError.
        """
        self._watch.follow(self._files(self.config))
        if self.source is None:
            return self._adopt(None, now)
        try:
            return self._adopt(read_config(self.source), now)
        except HandfastError:
            self._again = now + _RETRY
            return self._adopt((self.taken.load() or None) if self.taken is not None else None, now)

    def _adopt(self, text: str | None, now: datetime) -> Snapshot:
        """Make a snapshot of what the file says (None: of what is in force already). Raises HandfastError."""
        config = self.config
        if text is not None:
            assert self.source is not None
            config = parse_config(text, str(self.source), self.source.absolute().parent)
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
        if text is not None and self.taken is not None:
            self.taken.save(text)
        return snapshot

    def files(self) -> list[Path]:
        """The files that it reads."""
        return self._files(self.config)

    def upstreams(self) -> list[Upstreams]:
        """The groups of backends in force."""
        return [group for _, group in self._groups.values()]

    def reload(self) -> None:
        """Have the next `refresh` read everything again (SIGHUP)."""
        self._forced = True

    def _refuse_lasting(self, config: Config) -> None:
        """What cannot change while the guard runs must not seem to."""
        now = {one.name: (one.listen, one.mode) for one in self.config.listeners}
        then = {one.name: (one.listen, one.mode) for one in config.listeners}
        fixed = ("workers", "user", "group", "log", "drain", "sandbox", "admin", "assertion", "state")
        changed = [key for key in fixed if getattr(config, key) != getattr(self.config, key)]
        if now != then:
            changed.append("the listeners' names, addresses or modes")
        if self.minter is not None and config.assertion is not None and not self.minter.has_key_of(config.assertion):
            changed.append("the key of assertion")
        if self.reach is not None:
            beyond = [path for path in self._files(config) if not _below(path, self.reach)]
            if beyond:
                changed.append(f"the folders that files are in (the sandbox is closed to {beyond[0].parent})")
        if changed:
            raise HandfastError(Reason.GUARD_RESTART, what=", ".join(changed))

    def _build(self, config: Config, now: datetime, loaded: _Loaded | None = None) -> Snapshot:
        """Make a snapshot, of what is `loaded` where that is given, and else of the files as they are now."""
        making, revision = _Making(config, now, loaded), -1
        if self.feed is not None:
            revision = self.feed.revision()  # before the lists: a later change is seen later
            making.bundle, making.revocations = self.feed.bundle(), self.feed.revocations(now)
        sites = {
            listener.name: Sites([self._site(making, listener, site) for site in listener.all_sites])
            for listener in config.listeners
        }
        self._groups, self.certificates = making.groups, making.certificates
        self._loaded, self._revision, self.lists = making.loaded, revision, {}
        for key, (place, crls) in making.crls.items():
            self.lists |= {f"{key}, {issuer}": end for issuer, end in crls.next_updates().items()}
            self._newest.setdefault(place, {}).update(crls.newest())
        for asked, group in making.groups.values():
            if asked.health is None:  # nobody would find out that it is well again
                for backend in group.backends:
                    backend.healthy = True
        return Snapshot(sites)

    def _site(self, making: _Making, listener: ListenerConfig, site: SiteConfig) -> Site:
        http = listener.mode is Mode.HTTP
        credential = making.load(
            ("credential", site.cert, site.key, site.key_passphrase_file), lambda: self._credential(site, making.now)
        )
        bundle = making.trust(site)
        key, crls = f"{listener.name} {' '.join(site.names)}".strip(), making.crl_set(site.crl, bundle)
        if crls is not None:
            place = listener.name, site.crl
            failure = crls.rolled_back_from(self._newest.get(place, {}))
            if failure is not None:
                raise HandfastError(failure.reason, **failure.facts)
            making.crls[key] = place, crls
        terms = Terms(
            bundle,
            Purpose.CLIENT,
            revocations=making.revocations,
            crls=crls,
            legacy=site.legacy_certs,
            depth=site.verify_depth,
        )
        alpn = tuple(name.encode() for name in listener.alpn)
        if http:
            alpn = HTTP_ALPN if listener.http2 else (HTTP1,)
        settings = ServerSettings(
            answer_refusals=http,
            offer_authorities=site.offer_authorities,
            allow_tls12=site.tls_min is TlsVersion.TLS12,
            client_auth=site.client_auth,
            alpn=alpn,
        )
        context = ServerContext(credential, terms, settings)
        making.certificates[key] = credential.chain[0].not_valid_after_utc
        policy = _policy(making, site, bundle)
        asked = [*site.routes, RouteConfig()] if site.to is not None else site.routes
        routes = [self._route(making, (listener, site, route), policy, bundle) for route in asked]
        identify, renew = self._identify(site, credential.chain[0], bundle)
        nameless = site.default or not site.names or len(listener.all_sites) == 1
        return Site(context, tuple(routes), site.names, nameless, identify, renew, ocsp=self._ocsp(site))

    def _credential(self, site: SiteConfig, now: datetime) -> Credential:
        assert site.cert is not None
        assert site.key is not None
        opens = None
        if site.key_passphrase_file is not None:
            opens = self.passphrase(site.key_passphrase_file)
        credential = load_credential(site.cert, site.key, opens)
        check_usable(credential, Purpose.SERVER, now)
        return credential

    def _route(
        self,
        making: _Making,
        where: tuple[ListenerConfig, SiteConfig, RouteConfig],
        policy: Policy,
        bundle: TrustBundle,
    ) -> Route:
        listener, site, route = where
        to = route.to or site.to
        assert to is not None
        if route.allow is not None:
            policy = parse_policy(route.allow, bundle.trust_domain, site.authorities)
        client_auth = site.client_auth if route.client_auth is None else route.client_auth
        return Route(
            upstreams=self._group(making, listener, to),
            policy=policy,
            anonymous=client_auth in (ClientAuth.OPTIONAL, ClientAuth.OFF),
            path=None if route.path == "/**" else parse_path(route.path),
            methods=frozenset(method.encode() for method in route.methods),
        )

    def _group(self, making: _Making, listener: ListenerConfig, to: str) -> Upstreams:
        asked = making.config.upstream(to)
        connect = (asked.connect or listener.limits.connect).total_seconds()
        if (made := making.groups.get((to, connect))) is not None:
            return made[1]
        old = self._groups.get((to, connect))
        if old is not None and old[0] == asked and old[1].handshake is None:
            group = old[1]
        else:  # the files of TLS may have changed, so such groups are made anew
            group = making.upstreams(to, connect, () if old is None else old[1].backends)
        making.groups[to, connect] = asked, group
        return group

    def _ocsp(self, site: SiteConfig) -> OcspChecker | None:
        if site.ocsp is Ocsp.OFF or site.client_auth is ClientAuth.OFF:
            return None
        asking = site.ocsp, site.ocsp_url, frozenset(site.ocsp_hosts)
        if asking not in self._checkers:
            self._checkers[asking] = OcspChecker(asking[0], url=asking[1], hosts=asking[2])
        return self._checkers[asking]

    def _identify(self, site: SiteConfig, leaf: x509.Certificate, bundle: TrustBundle) -> tuple[Identify, float]:
        minter = None
        if HeaderStyle.ASSERTION in site.headers:
            minter = self.minter
            if minter is None:
                raise InvalidInput(Reason.GUARD_SITES, detail="headers has assertion, but there is no [assertion]")
        by = next((name.value for name in certificate_names(leaf) if name.is_uri), "")

        def identify(peer: VerifiedPeer | None, now: datetime) -> tuple[Header, ...]:
            if peer is None:
                return identity_headers(site.headers, None)
            authority = bundle.authority_of(peer.path)
            headers = identity_headers(site.headers, facts_of(peer, by, authority))
            return headers if minter is None else (*headers, minter.header(peer, authority, now))

        return identify, 0.0 if minter is None else minter.renew_after

    def _files(self, config: Config) -> list[Path]:
        files: list[Path | None] = [self.source]
        for listener in config.listeners:
            for site in listener.all_sites:
                files += [site.cert, site.key, site.allow_file, site.key_passphrase_file, *site.crl]
                files += [one.file for one in site.client_ca]
        for upstream in config.upstreams.values():
            files += [upstream.ca, upstream.cert, upstream.key]
        if config.assertion is not None:
            files.append(config.assertion.key)
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
        handshakes_per_second_per_identity=rate(limits.handshakes_per_second_per_identity),
        requests_per_second=rate(limits.requests_per_second),
        requests_per_second_per_address=rate(limits.requests_per_second_per_address),
        requests_per_second_per_identity=rate(limits.requests_per_second_per_identity),
    )


def _policy(making: _Making, site: SiteConfig, bundle: TrustBundle) -> Policy:
    policy = parse_policy(site.allow, bundle.trust_domain, site.authorities)
    if (file := site.allow_file) is not None:
        data = making.load(("policy", file), lambda: read_file(file, "policy", MAX_POLICY))
        text = data.decode("utf-8", "replace")
        return Policy((*policy.rules, *parse_rules(text, str(file), bundle.trust_domain, site.authorities)))
    return policy if site.allow else ALLOW_ANY


@dataclass(slots=True)
class _Making:
    """A snapshot while it is made. `bundle` and `revocations` are the authority's, read once for all sites.

    `before`: what the files held when they were read last, in place of reading them; None: they are read.
    """

    config: Config
    now: datetime
    before: _Loaded | None = None
    loaded: _Loaded = field(default_factory=dict)
    bundle: TrustBundle = field(default_factory=lambda: TrustBundle(()))
    revocations: Revocations = NO_REVOCATIONS
    groups: _Groups = field(default_factory=dict)
    crls: dict[str, tuple[_Lists, CrlSet]] = field(default_factory=dict)
    certificates: dict[str, datetime] = field(default_factory=dict)

    def load(self, key: tuple[object, ...], read: Callable[[], _T]) -> _T:
        """Return what `read` makes of files, which `key` names; once, however many ask. Raises HandfastError."""
        if key not in self.loaded:
            self.loaded[key] = read() if self.before is None else self.before[key]
        value: _T = self.loaded[key]
        return value

    def trust(self, site: SiteConfig) -> TrustBundle:
        """Whom the site believes. What the authority revoked is revoked under `client_ca` too: it may be its own."""
        if not site.client_ca:
            bundle = TrustBundle(()) if site.client_auth is ClientAuth.OFF else self.bundle
        else:
            found = [
                (one.name, anchor)
                for one in site.client_ca
                for anchor in self.load(("bundle", one.file), partial(load_bundle, one.file)).anchors
            ]
            _refuse_two_names(found)
            names = tuple(name for name, _ in found) if site.authorities else ()
            bundle = TrustBundle(tuple(anchor for _, anchor in found), site.trust_domain, names)
        if bundle.anchors and self.before is None:
            check_time(bundle.anchors, self.now)
        return bundle

    def crl_set(self, files: tuple[Path, ...], bundle: TrustBundle) -> CrlSet | None:
        """The revocation lists of a site; None where it has none."""
        if not files:
            return None

        def read(path: Path) -> tuple[x509.CertificateRevocationList, ...]:
            return parse_crls(read_file(path, "revocation list", MAX_CRL), str(path))

        lists = [self.load(("revocation list", path), partial(read, path)) for path in files]
        return check_crls([crl for some in lists for crl in some], bundle.anchors)

    def upstreams(self, name: str, connect: float, before: tuple[Backend, ...]) -> Upstreams:
        """The group that `name` means. Targets that were there before keep their counts and health."""
        asked = self.config.upstream(name)
        targets = tuple(parse_target(text) for text in asked.targets)
        known = {backend.target: backend for backend in before}
        backends = tuple(known.get(target) or Backend(target) for target in targets)
        return Upstreams(
            name=name,
            backends=backends,
            handshake=self._caller(asked) if any(target.tls for target in targets) else None,
            round_robin=asked.balance is Balance.ROUND_ROBIN,
            retries=asked.retries,
            connect=connect,
            response=None if asked.response is None else asked.response.total_seconds(),
            proxy=asked.proxy_protocol is not ProxyProtocol.OFF,
            proxy_certificate=asked.proxy_protocol is ProxyProtocol.V2_CERT,
            health=asked.health,
        )

    def _caller(self, asked: UpstreamConfig) -> Callable[[Target], Handshake]:
        ca, cert, key = asked.ca, asked.cert, asked.key
        bundle = self.bundle if ca is None else self.load(("bundle", ca), lambda: load_bundle(ca))
        credential = None
        if cert is not None and key is not None:
            credential = self.load(("own", cert, key), lambda: load_credential(cert, key))
        return caller_of(asked, bundle, self.revocations, credential)


def _refuse_two_names(found: Iterable[tuple[str, x509.Certificate]]) -> None:
    """Raises InvalidInput for an authority under two names, whichever of its certificates: which one would vouch?"""
    names: dict[bytes, str] = {}
    for name, anchor in found:
        if (first := names.setdefault(public_key_der(anchor), name)) != name:
            raise InvalidInput(Reason.GUARD_SITES, detail=f"{label(anchor)} is both {first} and {name} in client_ca")


def caller_of(
    asked: UpstreamConfig, bundle: TrustBundle, revocations: Revocations, credential: Credential | None = None
) -> Callable[[Target], Handshake]:
    """Return what begins TLS towards a target; each is held to its own name.

    `credential`: what is shown to those that ask. Raises HandfastError, and InvalidInput for a target that has no
    name.
    """
    expect = None if asked.expect is None else parse_pattern(asked.expect)
    contexts: dict[Target, ClientContext] = {}

    def begin(target: Target) -> Handshake:
        context = contexts.get(target)
        if context is None:
            host = asked.server_name or target.host
            name: Name | None = parse_name(host) if expect is None else None
            terms = Terms(bundle, Purpose.SERVER, name=name, revocations=revocations)
            alpn = (H2,) if target.speech is Speech.HTTP2 else ()
            old = asked.tls_min is TlsVersion.TLS12
            settings = ClientSettings(server_name_of(host) if host else None, expect, allow_tls12=old, alpn=alpn)
            context = contexts[target] = ClientContext(credential, terms, settings)
        return context.connect(lambda: datetime.now(UTC))

    for text in asked.targets:  # so that what is wrong is known at start
        target = parse_target(text)
        if target.tls:
            begin(target)
    return begin


def _below(path: Path, folders: tuple[Path, ...]) -> bool:
    """Whether a file is in reach, where it is named and where that leads."""
    return all(any(folder in one.parents for folder in folders) for one in (path, path.resolve()))
