"""What each request of a connection must pass before an app learns of it, whichever HTTP brought it.

A Door is made for one verified peer, or for a client that need not say who it is. Limits and the end of trust are
looked at for every request. What was judged and made for a client before is a `Caller`, which all its connections
share; it lives as long as the site, which a new snapshot replaces.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from handfast.errors import Failure, Reason
from handfast.guard.events import encode, request_facts
from handfast.guard.routes import Route, Site
from handfast.pki.verification import VerifiedPeer
from handfast.policy import Decision, Effect, Request, decide_by, rule_for
from handfast.tls.server import Facts
from handfast.wire.http1 import Header
from handfast.wire.identity import claims_identity, fold, overrides_request
from handfast.wire.targets import ambiguous_path, normal_host
from handfast.wire.usual import Requests

if TYPE_CHECKING:
    from handfast.guard.connection import Connection
    from handfast.guard.service import Guard

_MOST_KNOWN = 32  # requests of a caller that are remembered
_MOST_CALLERS = 128  # of a site that are
_LONGEST_KNOWN = 512  # bytes of a path
_LONGEST_SHOWN = 200  # bytes of a path in a sentence
# What a proxy says of the client's side; ours replaces whatever the client sent.
_FORWARDED = frozenset(
    {
        *(b"xforwardedfor", b"xforwardedproto", b"forwarded", b"xrealip", b"xforwardedhost", b"xforwardedport"),
        *(b"xforwardedserver", b"xforwardedprotocol", b"xforwardedscheme", b"xforwardedssl", b"xoriginalhost"),
        *(b"trueclientip", b"clientip", b"xclientip", b"xclusterclientip", b"cfconnectingip"),
        b"proxy",  # CGI makes it HTTP_PROXY, by which the app's own calls would go (httpoxy, CVE-2016-5385)
        *(b"scriptname", b"pathinfo"),  # gunicorn takes these from 127.0.0.1 for its own, and moves the path
    }
)
_OPEN = Decision(Effect.ALLOW, None, Reason.POLICY_OPEN_ROUTE)


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that may go on: where to, and why. `note` is what its log line says of it, as JSON members."""

    route: Route
    effect: str
    reason: str  # its code
    note: bytes


class Caller:
    """A client at a site: one peer (or nobody), from one address, under one server name."""

    __slots__ = ("_headers", "_host", "_renew_at", "admitted", "peer", "requests", "site")

    def __init__(self, site: Site, peer: VerifiedPeer | None, host: str) -> None:
        self.site = site
        self.peer = peer
        self.admitted: dict[tuple[bytes, bytes, bytes], Admission] = {}  # by method, path, host
        self.requests = Requests((), strip_override if site.judges_requests else strip)
        self._host = host.encode()
        self._headers: tuple[Header, ...] = ()
        self._renew_at = 0.0

    def headers(self, guard: Guard) -> tuple[Header, ...]:
        """Return what tells the app who calls; the same tuple for as long as it holds."""
        if monotonic() >= self._renew_at:
            refresh = self.site.refresh_headers
            self._renew_at = monotonic() + refresh if refresh else float("inf")
            # Over a UNIX socket there is no address to tell.
            origin = ((b"X-Forwarded-For", self._host),) if self._host else ()
            self._headers = (*origin, (b"X-Forwarded-Proto", b"https"), *self.site.identify(self.peer, guard.now))
        return self._headers


class Door:
    """See the module's docstring. `headers` tell the app who calls; every other spelling of them is taken out."""

    __slots__ = ("_caller", "_connection", "_server_name", "_trusted_until", "peer")

    def __init__(self, connection: Connection, site: Site, peer: VerifiedPeer | None, facts: Facts) -> None:
        self.peer = peer
        self._connection = connection
        self._server_name = normal_host(facts.server_name) or b"" if facts.server_name else None
        self._trusted_until = float("inf") if peer is None else peer.not_after.timestamp()
        self._caller = self._known_at(site)

    def _known_at(self, site: Site) -> Caller:
        """Who this is at a site, as other connections may know already."""
        key = (id(self.peer), self._connection.host, self._server_name)  # the caller keeps the peer, and so its id
        caller = site.callers.get(key)
        if caller is None:
            if len(site.callers) >= _MOST_CALLERS:
                site.callers.clear()
            caller = site.callers[key] = Caller(site, self.peer, self._connection.host)
        return caller

    @property
    def caller(self) -> Caller:
        """The client at the site that is now in force: a new snapshot reaches the next request."""
        if self._connection.site is not self._caller.site:
            self._caller = self._known_at(self._connection.site)
        return self._caller

    def judge(self, method: bytes, path: bytes, host: bytes) -> Admission | Failure:
        """Judge a request: `path` without query, `host` as `normal_host` gives it. A failure's facts hold `rule`."""
        connection = self._connection
        if connection.guard.log.broken:
            return Failure(Reason.GUARD_LOG_FAILED)
        if time() >= self._trusted_until:
            return Failure(Reason.ENDED_EXPIRED)
        if (gate := connection.gate) is not None:
            failure = gate.admit_request(connection.counted_as, connection.host, monotonic())
            if failure is not None:
                return failure
        admitted = self.caller.admitted
        known = admitted.get((method, path, host))
        if known is not None:
            return known
        judged = self._judge(method, path, host)
        if isinstance(judged, Admission) and len(path) <= _LONGEST_KNOWN:
            if len(admitted) >= _MOST_KNOWN:
                admitted.clear()
            admitted[method, path, host] = judged
        return judged

    def allows(self, method: bytes, path: bytes) -> bool:
        """Whether what is under way may go on under the site now in force (a websocket)."""
        return not isinstance(self._decide(self._connection.site, method, path), Failure)

    @property
    def strip(self) -> Callable[[bytes], bool]:
        """What says whether a request's header is taken out, by the site now in force."""
        return self.caller.requests.strip

    def headers(self) -> tuple[Header, ...]:
        """Return the headers for the app; the same tuple for as long as they hold."""
        return self.caller.headers(self._connection.guard)

    def requests(self) -> Requests:
        """Return what reads and rewrites the requests; it sets these headers."""
        requests = self.caller.requests
        requests.set_by(self.headers())
        return requests

    def _judge(self, method: bytes, path: bytes, host: bytes) -> Admission | Failure:
        site = self._connection.site
        if (self._server_name is not None and self._server_name != host) or not site.answers(host):
            return Failure(Reason.HTTP_MISDIRECTED)
        if site.judges_paths and ambiguous_path(path):
            return Failure(Reason.HTTP_AMBIGUOUS_PATH)
        decided = self._decide(site, method, path)
        if isinstance(decided, Failure):
            return decided
        route, decision = decided
        note: dict[str, Any] = {
            "decision": str(decision.effect),
            "rule": None if decision.rule is None else decision.rule.text,
            "reason": decision.reason.code,
        }
        return Admission(
            route, note["decision"], note["reason"], encode(note | request_facts(method, host, path))[1:-1]
        )

    def _decide(self, site: Site, method: bytes, path: bytes) -> tuple[Route, Decision] | Failure:
        route = site.route(method, path)
        if route is None:
            return Failure(Reason.HTTP_NO_ROUTE)
        if route.anonymous:
            return route, _OPEN
        if self.peer is None:
            return Failure(Reason.VERIFY_NO_CERTIFICATE)
        about, request = site.rules_about(route.policy, self.peer), Request(method, path)
        decision = decide_by(about, request)
        if decision.allowed:
            return route, decision
        if decision.rule is not None:
            return Failure(decision.reason, {"who": str(self.peer.identity), "rule": str(decision.rule)})
        by_file = self._connection.guard.by_file
        return no_rule(self.peer, request if about else None, site.asked_for(self.peer), by_file=by_file)


def no_rule(peer: VerifiedPeer, request: Request | None, by: str, *, by_file: bool) -> Failure:
    """The failure of a peer that no rule allows this request, or, with None, anything; and how to allow just that.

    `by`: as `Site.asked_for`. `by_file`: whether rules stand in a file and not in flags.
    """
    facts: dict[str, object] = {"who": str(peer.identity), "rule": None}
    rule = None
    if request is None or len(request.path) <= _LONGEST_SHOWN:
        rule = rule_for(peer.identity.name, request, by)
    if request is not None:
        shown = request_facts(request.method[:32], b"", request.path[:_LONGEST_SHOWN])
        facts["who"] = f"{peer.identity} to {shown['method']} {shown['path']}"
    if rule is None:  # a rule holds no such name, path or method, or it would take more with it
        return Failure(Reason.POLICY_NO_RULE, facts | {"remedy": "allow it by a rule WHO METHODS PATH that covers it"})
    return Failure(Reason.POLICY_NO_RULE, facts | {"remedy": _allowing(rule, by_file)})


def _allowing(rule: str, by_file: bool) -> str:
    """How to add a rule, for a file (TOML's strings are JSON's here) or for a shell."""
    if by_file:
        return f"allow it: allow = [..., {json.dumps(rule)}]"
    quoted = rule.replace("'", "'\"'\"'")
    return f"allow it: --allow '{quoted}'"


def strip(name: bytes) -> bool:
    """Whether a request's header is taken out: it says who the client is, or where it comes from."""
    return claims_identity(name) or fold(name) in _FORWARDED


def strip_override(name: bytes) -> bool:
    """As `strip`; where rules judge method and path, no header may tell the app another one."""
    return strip(name) or overrides_request(name)
