"""What is in force: listeners' sites, their routes and policies, as one snapshot that is swapped whole.

    Snapshot -> Sites of a listener -> pick(SNI) -> Site -> route(request) -> Upstreams

What decides never changes once made; a site beside that remembers what it found. What lives on between snapshots
(backends, counters) is only referred to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

from handfast.errors import Failure, InvalidInput, Reason
from handfast.guard.ocsp import OcspChecker
from handfast.guard.upstream import Upstreams
from handfast.pki.verification import VerifiedPeer, still_trusted
from handfast.policy import Effect, Policy, Rule, rules_about
from handfast.tls.server import MAX_KNOWN, ClientAuth, ServerContext
from handfast.wire.forwarding import DEFAULT_STYLES, facts_of, identity_headers
from handfast.wire.http1 import Header
from handfast.wire.targets import normal_host

if TYPE_CHECKING:
    from handfast.guard.door import Caller

H2, HTTP1 = b"h2", b"http/1.1"  # in ALPN: RFC 9113 3.1, RFC 7301 6
HTTP_ALPN = (H2, HTTP1)  # what is spoken to clients over HTTP, best first

Identify = Callable[[VerifiedPeer | None, datetime], tuple[Header, ...]]


def usual_headers(peer: VerifiedPeer | None, _now: datetime) -> tuple[Header, ...]:
    """Return what tells the app who called, where nothing else was chosen."""
    return identity_headers(DEFAULT_STYLES, None if peer is None else facts_of(peer))


@dataclass(frozen=True, slots=True)
class Route:
    """Where requests of a kind go, and who may make them.

    `anonymous`: clients without a certificate may, and nobody is asked who they are; else `policy` decides.
    """

    upstreams: Upstreams
    policy: Policy
    anonymous: bool = False
    path: re.Pattern[bytes] | None = None  # None: every path
    methods: frozenset[bytes] = frozenset()  # empty: every method

    def covers(self, method: bytes, path: bytes) -> bool:
        """Whether the route is for such requests."""
        if self.methods and method not in self.methods:
            return False
        return self.path is None or self.path.fullmatch(path) is not None


@dataclass(frozen=True, slots=True)
class Site:
    """What stands behind one or more server names: a TLS generation, and routes, of which the first that fits counts.

    `names`: as `normal_host` gives them, or `*.` and one; empty takes every name. `nameless`: it also takes
    clients that send no server name. `refresh_headers`: seconds after which `identify` is asked again; 0: never.
    `elsewhere`: the names of the listener's other sites, which `Sites` sets.
    """

    context: ServerContext
    routes: tuple[Route, ...]
    names: tuple[str, ...] = ()
    nameless: bool = True
    identify: Identify = usual_headers
    refresh_headers: float = 0.0
    ocsp: OcspChecker | None = None  # None: no responder is asked about clients
    elsewhere: frozenset[str] = frozenset()
    judges_paths: bool = field(init=False, default=False)
    judges_requests: bool = field(init=False, default=False)
    # Rules about a peer, by the identity in memory of policy and peer, which are kept beside them.
    _about: dict[tuple[int, int], tuple[Policy, VerifiedPeer, list[Rule]]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    # Clients by the identity in memory of the peer, their address, and the server name they gave.
    callers: dict[tuple[int, str, bytes | None], Caller] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        paths = any(route.path is not None or route.policy.judges_paths for route in self.routes)
        methods = any(bool(route.methods) or route.policy.judges_requests for route in self.routes)
        object.__setattr__(self, "judges_paths", paths)
        object.__setattr__(self, "judges_requests", paths or methods)

    def route(self, method: bytes, path: bytes) -> Route | None:
        """Return the first route that covers such requests."""
        for route in self.routes:
            if route.covers(method, path):
                return route
        return None

    def rules_about(self, policy: Policy, peer: VerifiedPeer) -> list[Rule]:
        """As `policy.rules_about`, remembered: a peer that comes again is the same value."""
        known = self._about.get((id(policy), id(peer)))
        if known is None:
            if len(self._about) >= MAX_KNOWN:
                self._about.clear()
            known = self._about[id(policy), id(peer)] = policy, peer, rules_about(policy, peer, self.asked_for(peer))
        return known[2]

    def admits(self, policy: Policy, peer: VerifiedPeer) -> bool:
        """Whether any rule could allow the peer anything."""
        return any(rule.effect is Effect.ALLOW for rule in self.rules_about(policy, peer))

    def asked_for(self, peer: VerifiedPeer) -> str:
        """The name by which rules ask for a peer's authority; '' where authorities have none."""
        bundle = self.context.terms.bundle
        return bundle.authority_of(peer.path) if bundle.names else ""

    def answers(self, host: bytes) -> bool:
        """Whether requests for this host are for this site, where the client sent no server name or this one."""
        if self.elsewhere and host.decode("ascii", "replace") in self.elsewhere:
            return False  # though a wildcard here may fit: an exact name goes first
        if not self.names:
            return not any(_name_fits(name, host) for name in self.elsewhere)
        return any(_name_fits(name, host) for name in self.names)

    def objection(self, peer: VerifiedPeer | None, now: datetime) -> Failure | None:
        """Why a connected peer may not stay; None if it may."""
        if peer is None:
            required = self.context.settings.client_auth is ClientAuth.REQUIRED
            return Failure(Reason.VERIFY_NO_CERTIFICATE) if required else None
        failure = still_trusted(peer, self.context.terms, now)
        if failure is not None:
            return failure
        if any(route.anonymous or self.admits(route.policy, peer) for route in self.routes):
            return None
        return Failure(Reason.ENDED_POLICY)


class Sites:
    """A listener's sites, found by server name. InvalidInput where two would answer to one name."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.all = _apart(tuple(sites))
        self._exact: dict[bytes, Site] = {}
        self._wild: dict[bytes, Site] = {}  # by what follows the `*`
        self._any: Site | None = None
        self.nameless: Site | None = None
        for site in self.all:
            for name in site.names:
                table, key = (self._wild, name[1:]) if name.startswith("*.") else (self._exact, name)
                if table.setdefault(key.encode(), site) is not site:
                    raise InvalidInput(Reason.GUARD_SITES, detail=f"two sites are called {name}")
            if not site.names:
                if self._any is not None:
                    raise InvalidInput(Reason.GUARD_SITES, detail="two sites take every name")
                self._any = site
            if site.nameless:
                if self.nameless is not None:
                    raise InvalidInput(Reason.GUARD_SITES, detail="two sites take clients that send no server name")
                self.nameless = site
        # A listener with one site that takes all need not look at the server name before the handshake.
        self.only = self._any if len(self.all) == 1 and self._any is not None and self._any.nameless else None

    def pick(self, server_name: str) -> Site | None:
        """Return the site for a server name as sent ('' for none); None: the client is not for us."""
        if not server_name:
            return self.nameless
        host = normal_host(server_name)
        if host is None:
            return None
        site = self._exact.get(host)
        if site is None and self._wild:
            site = self._wild.get(host[host.find(b".") :]) if b"." in host else None
        return site or self._any


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that decides, for each listener by its name."""

    sites: Mapping[str, Sites]


def one_site(context: ServerContext, policy: Policy, upstreams: Upstreams) -> Sites:
    """Return the sites of a listener that sends all to one place."""
    return Sites((Site(context, (Route(upstreams, policy),)),))


def _apart(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Sites that know each other's names."""
    if len(sites) == 1:
        return sites
    names = {name for site in sites for name in site.names}
    return tuple(replace(site, elsewhere=frozenset(names.difference(site.names))) for site in sites)


def _name_fits(name: str, host: bytes) -> bool:
    if not name.startswith("*."):
        return name.encode() == host
    return b"." in host and host[host.find(b".") :] == name[1:].encode()
