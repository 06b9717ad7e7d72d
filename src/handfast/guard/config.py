"""handfast.toml: text -> Config, strictly. Owns its keys and how they are documented (`KEYS`).

Parsing is pure; `load_config` alone reads a file. None of the files that the settings name is opened here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from enum import StrEnum
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from handfast.errors import InvalidInput, Reason
from handfast.files import read_file
from handfast.guard import kinds
from handfast.guard.kinds import MAX_PROBLEMS, Key, Kind, Notes, Spot, Table, read_table, render_duration
from handfast.guard.schema import (
    AdminConfig,
    AssertionConfig,
    Balance,
    Config,
    HealthConfig,
    LimitsConfig,
    ListenerConfig,
    LogStyle,
    Mode,
    Ocsp,
    Problem,
    ProxyProtocol,
    RouteConfig,
    SiteConfig,
    TlsVersion,
    UpstreamConfig,
    find_conflicts,
)
from handfast.policy import Rule, parse_rule
from handfast.tls.server import ClientAuth
from handfast.wire.forwarding import HeaderStyle

_TOML_PLACE = re.compile(r"(.*) \(at (line \d+, column \d+|end of document)\)", re.S)
# tomllib's memory grows with the square of a dotted key's parts. No string that means anything has so many either.
_PART = r"""(?:"[^"\n]*+"|'[^'\n]*+'|[A-Za-z0-9_-]++)[ \t]*+"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{_PART}\.[ \t]*+){{64}}")
_COMMENT = re.compile(r"(?:^|\s)#.*")


def load_config(path: Path) -> Config:
    """Read `handfast.toml`. Relative paths in it are below its folder.

    Raises InvalidInput as `read_config` and `parse_config` do.
    """
    return parse_config(read_config(path), str(path), path.absolute().parent)


def read_config(path: Path) -> str:
    """Read the text of `handfast.toml`. Raises InvalidInput as `read_file` does, and for what is not UTF-8."""
    data = read_file(path, "configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refusal(str(path), [Problem(f"line {line}", "is not UTF-8, which TOML is written in")]) from None


def parse_config(text: str, where: str, folder: Path) -> Config:
    """Parse the text of `handfast.toml`; `where` names it in errors, relative paths are below `folder`.

    Raises InvalidInput (INPUT_CONFIG) with up to MAX_PROBLEMS mistakes: in words, and as the fact `problems`,
    a list of {"at", "detail"}. Raises nothing else, whatever the text.
    """
    values = _parse_toml(text, where)
    notes = Notes(_TABLES)
    config: Config = read_table(_ROOT, values, Spot("", folder, notes))
    notes.add_conflicts(find_conflicts(config))
    if notes.problems:
        raise _refusal(where, notes.problems)
    return config


def check_config(config: Config, where: str) -> None:
    """Hold the settings of a Config that was not parsed, but made of flags, against each other.

    Raises InvalidInput (INPUT_CONFIG).
    """
    problems = list(islice(find_conflicts(config), MAX_PROBLEMS + 1))
    if problems:
        raise _refusal(where, problems)


def parse_rules(
    text: str, where: str, trust_domain: str | None = None, authorities: Collection[str] = ()
) -> tuple[Rule, ...]:
    """Parse the text of an `allow_file`: one rule a line; `#` begins a comment, at the start or after a space.

    Raises InvalidInput: INPUT_CONFIG with the lines that are wrong; INPUT_EMPTY if there is no rule, which must
    not be taken for "no restriction".
    """
    rules: list[Rule] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):
        rule = _COMMENT.sub("", line).strip()
        if rule and len(problems) <= MAX_PROBLEMS:
            try:
                rules.append(parse_rule(rule, trust_domain, authorities))
            except InvalidInput as error:
                problems.append(Problem(f"line {number}", str(error)))
    if problems:
        raise _refusal(where, problems)
    if not rules:
        raise InvalidInput(Reason.INPUT_EMPTY, what=where)
    return tuple(rules)


def _parse_toml(text: str, where: str) -> dict[str, Any]:
    try:
        text.encode()  # lone surrogates have no place in TOML, and no path could hold them
        long_key = _LONG_KEY.search(text)
        if long_key is None:
            return tomllib.loads(text)
        problem = Problem(_place(text, long_key.start()), "a key has no more than 64 parts")
    except UnicodeEncodeError:
        problem = Problem("the text", "holds what is not Unicode")
    except RecursionError:
        problem = Problem("the text", "is nested too deep")
    except ValueError as error:
        found = _TOML_PLACE.fullmatch(str(error))
        if found is None:  # Python's own word on numbers of thousands of digits
            problem = Problem("the text", "a number in it has more digits than any that is meant")
        else:
            at = _place(text, len(text)) if found[2] == "end of document" else found[2]
            problem = Problem(at, f"this is not TOML: {found[1][:200]}")
    raise _refusal(where, [problem])


def _place(text: str, at: int) -> str:
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"


def _refusal(where: str, problems: list[Problem]) -> InvalidInput:
    told = problems[:MAX_PROBLEMS]
    detail = "; ".join(map(str, told)) + ("; and more" if len(problems) > MAX_PROBLEMS else "")
    listed = [{"at": problem.at, "detail": problem.detail} for problem in told]
    return InvalidInput(Reason.INPUT_CONFIG, path=where, detail=detail, problems=listed)


# The tables and their keys.

_COUNT = kinds.or_word("off", None, kinds.whole(1))
_PER_SECOND = kinds.or_word("off", None, kinds.RATE)
_TO = Kind(f"the name of an upstream, or {kinds.TARGET.words}", kinds.TARGET.read)
_RULES = kinds.many(kinds.text("a rule"), 'rules, as "allow web GET /public/**"', least=1, unique=False)
_METHODS = kinds.many(kinds.text("a method in capitals", r"[A-Z]{1,32}"), 'methods, as "GET"')
_ACCOUNT = kinds.text("the name of an account", r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?")  # useradd(8)
_LABEL = kinds.text("a name of letters, digits, - and _", r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_PROTOCOL = kinds.text("a protocol's ALPN name", r"[!-~]{1,255}")  # RFC 7301 3.1
_SHORT = kinds.text("text of up to 255 characters", r".{1,255}")

_LIMITS = Table(
    "[limits]",
    {
        "handshake": Key(
            kinds.length("100ms", "10m"), "From the first byte of a connection to the end of its handshake."
        ),
        "head": Key(kinds.length("100ms", "10m"), "From the first byte of a request to the end of its head."),
        "idle": Key(kinds.length("100ms", "1d"), "Between requests, or without a byte either way during one."),
        "connect": Key(kinds.length("10ms", "10m"), "To connect to the app."),
        "response": Key(kinds.length("10ms", "1d"), "From a request to the head of its response."),
        "tunnel_idle": Key(
            kinds.or_word("off", None, kinds.length("1s", "30d")),
            "Without a byte either way in TCP mode and on a websocket.",
        ),
        "connections": Key(_COUNT, "Connections that the listener has open at once."),
        "connections_per_identity": Key(_COUNT, "The same, for each client by its certificate."),
        "connections_per_address": Key(_COUNT, "The same, for each client by its address."),
        "handshakes_per_second": Key(_PER_SECOND, "Handshakes that the listener begins."),
        "handshakes_per_second_per_address": Key(_PER_SECOND, "The same, for each address."),
        "handshakes_per_second_per_identity": Key(_PER_SECOND, "The same, for each client by its certificate."),
        "requests_per_second": Key(_PER_SECOND, "Requests that the listener forwards."),
        "requests_per_second_per_address": Key(_PER_SECOND, "The same, for each address."),
        "requests_per_second_per_identity": Key(_PER_SECOND, "The same, for each client by its certificate."),
        "burst": Key(
            _COUNT,
            "How many may come at once after a rest, where a rate is limited.",
            default="one second's",
        ),
        "max_body": Key(
            kinds.or_word("off", None, kinds.whole(0, unit="bytes")), "The largest body of a request, in bytes."
        ),
    },
    LimitsConfig(),
    lambda given: LimitsConfig(**given),
)
_LISTENER_LIMITS = replace(_LIMITS, header="[listener.limits]", make=dict)

_ROUTE = Table(
    "[[listener.route]]",
    {
        "path": Key(kinds.ROUTE_PATH, "The paths of the route, as in rules; the first route that fits is taken."),
        "methods": Key(_METHODS, "The methods of the route; none: every method."),
        "to": Key(_TO, "The app of the route; without it, the site's."),
        "client_auth": Key(
            kinds.choice(ClientAuth, ClientAuth.OFF),
            "Whether a client must have a certificate here; without it, as the site has it.",
        ),
        "allow": Key(_RULES, "Who may do what here, in place of the site's rules."),
    },
    RouteConfig(),
    lambda given: RouteConfig(**given),
)
_SITE_ROUTE = replace(_ROUTE, header="[[listener.site.route]]")


def _site_keys(route: Table) -> dict[str, Key]:
    return {
        "names": Key(
            kinds.many(kinds.SERVER_NAME, "DNS names, as app.example.com or *.example.com"),
            "The TLS server names that the site stands for; none: any.",
        ),
        "default": Key(
            kinds.FLAG, "Takes the clients that send no server name; a listener's only site does so anyway."
        ),
        "cert": Key(
            kinds.PATH, "The server's certificate in PEM, followed by those up to its root.", default="required"
        ),
        "key": Key(kinds.PATH, "Its private key.", default="required"),
        "key_passphrase_file": Key(kinds.PATH, "What opens the private key, if it is encrypted: the first line."),
        "client_ca": Key(
            kinds.AUTHORITIES,
            "The authorities of the clients, in PEM; without it, those of state. Never the system's. Rules may ask"
            " for one by its name.",
        ),
        "client_auth": Key(
            kinds.choice(ClientAuth), "Whether clients must have a certificate, may have one, or are not asked."
        ),
        "crl": Key(
            kinds.many(kinds.PATH, "paths of files"), "Revocation lists; every authority of a client's chain needs one."
        ),
        "ocsp": Key(
            kinds.choice(Ocsp),
            "Whether the clients' authorities are asked by OCSP, and whether no answer is a refusal.",
        ),
        "ocsp_url": Key(
            kinds.text('a URL, as "http://ocsp.example.com/"', r"http://[!-~]{1,1024}"),
            "The one responder that is asked; without it, the one that each client's certificate names.",
        ),
        "ocsp_hosts": Key(
            kinds.many(kinds.HOST, "hosts' names or addresses"),
            "The hosts that a certificate may name as its responder; none: any at a public address, at port 80.",
        ),
        "verify_depth": Key(kinds.whole(0, 10), "How many authorities may stand between a client and its root."),
        "tls_min": Key(kinds.choice(TlsVersion), "The oldest version of TLS."),
        "legacy_certs": Key(kinds.FLAG, "Admits clients whose certificates lack key usage or names (by CN)."),
        "offer_authorities": Key(kinds.FLAG, "Tells clients which authorities are accepted; browsers choose by it."),
        "trust_domain": Key(kinds.TRUST_DOMAIN, "What bare names in rules belong to; without it, that of state."),
        "to": Key(_TO, "The app: an upstream or a target.", default="required, here or in every route"),
        "allow": Key(
            _RULES,
            "Who may do what; the first rule that fits decides, and none that fits is no.",
            default="every verified client",
        ),
        "allow_file": Key(kinds.PATH, "More rules, one a line, after those of allow."),
        "headers": Key(
            kinds.many(kinds.choice(HeaderStyle), f"{kinds.choice(HeaderStyle).words}"),
            "How the app is told who the client is.",
        ),
        "route": Key(kinds.each_table(route), "What holds for some paths of the site.", "routes"),
    }


_SITE = Table("[[listener.site]]", _site_keys(_SITE_ROUTE), SiteConfig(), lambda given: SiteConfig(**given))


def _make_listener(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a listener, those of its own site in one; it becomes a value with its number and all limits."""
    own = {name: given.pop(name) for name in _SITE_FIELDS & set(given)}
    return given | {"site": SiteConfig(**own) if own else None}


def _make_config(given: dict[str, Any]) -> Config:
    limits = given.get("limits", LimitsConfig())
    listeners = []
    for number, listener in enumerate(given.pop("listeners", ()), 1):
        own = replace(limits, **listener.pop("limits", {}))
        listeners.append(ListenerConfig(**({"name": f"listener-{number}"} | listener), limits=own))
    return Config(**given, listeners=tuple(listeners))


_SITE_FIELDS = {one.name for one in fields(SiteConfig)}
_DEFAULTS = {one.name: getattr(SiteConfig(), one.name) for one in fields(SiteConfig)}
_DEFAULTS |= {one.name: getattr(ListenerConfig(), one.name) for one in fields(ListenerConfig)}
_LISTENER = Table(
    "[[listener]]",
    {
        "name": Key(_LABEL, "Names the listener in logs and metrics.", default="listener-1, listener-2, …"),
        "listen": Key(kinds.PLACE, "Where clients connect."),
        "mode": Key(kinds.choice(Mode), "Whether requests are read and forwarded, or bytes of any protocol."),
        "proxy_protocol_from": Key(
            kinds.many(kinds.NETWORK, "networks, as 10.0.0.0/8"),
            "Peers that must send a PROXY protocol header (v1 or v2), which is believed; from others it is refused.",
        ),
        "alpn": Key(
            kinds.many(_PROTOCOL, "ALPN names, as postgresql"), 'The protocols that are offered in mode = "tcp".'
        ),
        "http2": Key(kinds.FLAG, "Offers HTTP/2 beside HTTP/1.1."),
        "limits": Key(kinds.one_table(_LISTENER_LIMITS), "What differs here from the limits for all listeners."),
        "site": Key(kinds.each_table(_SITE), "Sites by TLS server name.", "sites"),
        **_site_keys(_ROUTE),
    },
    SimpleNamespace(**_DEFAULTS),
    _make_listener,
)


def _make_health(given: dict[str, Any]) -> HealthConfig:
    if "interval" in given:  # or the default of the one would contradict the other
        given = {"timeout": min(HealthConfig().timeout, given["interval"])} | given
    return HealthConfig(**given)


_HEALTH = Table(
    "[upstream.NAME.health]",
    {
        "path": Key(
            kinds.text("a path, as /health", r"/[!-~]*"),
            "Asked with GET; a status from 200 to 399 is well.",
            default="that it takes a connection is enough",
        ),
        "interval": Key(kinds.length("100ms", "1h"), "Between two checks of a target."),
        "timeout": Key(
            kinds.length("10ms", "1h"), "How long an answer may take.", default="2s, or interval if that is less"
        ),
        "rise": Key(kinds.whole(1, 100), "Good checks in a row that bring a target back."),
        "fall": Key(kinds.whole(1, 100), "Bad checks in a row that take a target out."),
    },
    HealthConfig(),
    _make_health,
)
_UPSTREAM = Table(
    "[upstream.NAME]",
    {
        "targets": Key(
            kinds.many(
                kinds.TARGET, "targets: HOST:PORT, unix:PATH, or with http, https, h2c, h2, tcp or tls:// before it"
            ),
            "Where the app is.",
            default="required",
        ),
        "balance": Key(kinds.choice(Balance), "How one of several targets is chosen."),
        "ca": Key(
            kinds.PATH, "The authorities of the servers, in PEM, for https, h2 and tls; without it, those of state."
        ),
        "cert": Key(kinds.PATH, "The client certificate that is shown to them."),
        "key": Key(kinds.PATH, "Its private key."),
        "server_name": Key(
            kinds.HOST,
            "The name that their certificates must have, and that is sent as TLS server name.",
            default="the target's host",
        ),
        "tls_min": Key(kinds.choice(TlsVersion), "The oldest version of TLS that is spoken to them."),
        "expect": Key(_SHORT, "The identity that they must have instead of a host's name: a pattern, as in rules."),
        "proxy_protocol": Key(
            kinds.choice(ProxyProtocol), "Tells them the client's address and certificate in front of the first byte."
        ),
        "connect": Key(kinds.length("10ms", "10m"), "To connect.", default="the listener's limit"),
        "response": Key(
            kinds.length("10ms", "1d"), "From a request to the head of its response.", default="the listener's limit"
        ),
        "retries": Key(
            kinds.whole(0, 5),
            "How often a safe request without an answer is sent again, to another target if there is one; 0: never.",
        ),
        "health": Key(kinds.one_table(_HEALTH), "How targets are looked after; without it, as requests find them."),
    },
    UpstreamConfig(),
    lambda given: UpstreamConfig(**given),
)
_ADMIN = Table(
    "[admin]",
    {
        "listen": Key(kinds.PLACE, "Where metrics and health are served, in plain HTTP."),
        "public": Key(kinds.FLAG, "Allows an address that other machines can reach."),
    },
    AdminConfig(),
    lambda given: AdminConfig(**given),
)
_ASSERTION = Table(
    "[assertion]",
    {
        "key": Key(kinds.PATH, "The P-256 key that signs.", default="made at start"),
        "issuer": Key(_SHORT, "The claim iss."),
        "audience": Key(_SHORT, "The claim aud."),
        "lifetime": Key(kinds.length("1s", "5m"), "How long an assertion holds."),
    },
    AssertionConfig(),
    lambda given: AssertionConfig(**given),
)
_ROOT = Table(
    "at the top level",
    {
        "workers": Key(
            kinds.or_word("auto", 0, kinds.whole(0, 1024)),
            'Processes that share the work; 0 and "auto": one for each processor.',
        ),
        "user": Key(_ACCOUNT, "Whose rights are kept once the addresses are bound."),
        "group": Key(_ACCOUNT, "The same, for the group.", default="that of user"),
        "log": Key(kinds.choice(LogStyle), "Events as JSON, one a line, or for people."),
        "drain": Key(kinds.length("1s", "1d"), "How long open requests may take, once the guard is told to stop."),
        "sandbox": Key(kinds.FLAG, "Gives up what the guard does not need of the system, where the kernel can."),
        "state": Key(
            kinds.FOLDER,
            "An authority's folder: its trust bundle, trust domain and revocations are used as they change.",
        ),
        "limits": Key(kinds.one_table(_LIMITS), "Limits of each listener that has none of its own."),
        "admin": Key(kinds.one_table(_ADMIN), "The admin listener; without it, there is none."),
        "assertion": Key(kinds.one_table(_ASSERTION), 'The signed token of headers = ["assertion"].'),
        "upstream": Key(kinds.named_tables(_UPSTREAM), "Apps, by name.", "upstreams"),
        "listener": Key(kinds.each_table(_LISTENER), "Where clients connect, and all that holds there.", "listeners"),
    },
    Config(),
    _make_config,
)
_TABLES = (
    *(_ROOT, _LIMITS, _ADMIN, _ASSERTION, _UPSTREAM, _HEALTH),
    *(_LISTENER, _LISTENER_LIMITS, _ROUTE, _SITE, _SITE_ROUTE),
)


# How they are documented.


@dataclass(frozen=True, slots=True)
class KeyDoc:
    """One key of `handfast.toml`, for the reference. In `key`, NAME stands for a name of the user's."""

    key: str  # dotted, as listener.site.cert
    kind: str  # what it takes, in words
    default: str  # as TOML or in words; "" for none
    text: str  # one sentence


def _documents() -> Iterator[KeyDoc]:
    for table in _TABLES:
        prefix = "" if table is _ROOT else table.header.strip("[]") + "."
        for name, key in table.keys.items():
            default = _as_toml(getattr(table.blank, key.name or name)) if key.default is None else key.default
            yield KeyDoc(prefix + name, key.kind.words, default, key.text)


def _as_toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case timedelta():
            return f'"{render_duration(value)}"'
        case StrEnum():
            return f'"{value}"'
        case tuple() if value:
            return f"[{', '.join(map(_as_toml, value))}]"
        case str():
            return f'"{value}"'
        case int():
            return str(value)
        case _:  # no value, or tables
            return ""


KEYS: tuple[KeyDoc, ...] = tuple(_documents())
