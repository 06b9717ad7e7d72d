"""The verb `guard`: from flags or a file to a Config, and from that to a guard that runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from handfast.cli.output import as_json_option, choice, example, first_line, key_passphrase_option, print_json
from handfast.cli.running import TakenText, Telling, become_user, run
from handfast.cli.starting import doubts, loose_files
from handfast.errors import HandfastError
from handfast.guard.assembly import Assembly, Feed
from handfast.guard.assertion import Minter
from handfast.guard.config import KEYS, check_config, load_config
from handfast.guard.handover import say_failed
from handfast.guard.kinds import is_name, parse_duration
from handfast.guard.places import parse_place, parse_target
from handfast.guard.schema import (
    AdminConfig,
    AssertionConfig,
    AuthorityFile,
    Config,
    ListenerConfig,
    LogStyle,
    Mode,
    Ocsp,
    RouteConfig,
    SiteConfig,
    TlsVersion,
)
from handfast.guard.workers import auto_workers
from handfast.policy import parse_policy
from handfast.tls.server import ClientAuth
from handfast.wire.forwarding import HeaderStyle

LISTEN = "127.0.0.1:8443"

to_option = click.option(
    "--to", "to", required=True, metavar="TARGET", help="The app: HOST:PORT, https://…, unix:PATH or tcp://HOST:PORT."
)
listen_option = click.option(
    "--listen", default=LISTEN, show_default=True, metavar="HOST:PORT", help="Where to listen."
)
allow_option = click.option(
    "--allow",
    multiple=True,
    metavar="RULE",
    help="Whom to let through: a name, a pattern, or WHO METHODS PATH. May be repeated; the first that fits decides.",
)


no_ca_names_option = click.option(
    "--no-ca-names", is_flag=True, help="Do not tell clients which authorities are accepted."
)
_file = click.Path(path_type=Path)


@click.command(
    "guard",
    epilog=example(
        "handfast guard --to 127.0.0.1:8000 --cert server.crt --key server.key --client-ca ca.crt",
        "handfast guard --to tcp://:5432 --cert s.crt --key s.key --client-ca ca.crt --allow dns:*.corp",
        "handfast guard -c handfast.toml",
    ),
    short_help="Guard apps with certificates you have, or by a file.",
)
@click.option(
    "-c", "--config", "file", type=_file, metavar="FILE", help="A handfast.toml; takes the other flags' place."
)
@click.option("--check", is_flag=True, help="Say whether the configuration is good, and end.")
@click.option(
    "--keys",
    is_flag=True,
    help="List the keys of a handfast.toml, and end.",
)
@click.option(
    "--to", "to", metavar="TARGET", help="The app: HOST:PORT, h2c://…, unix:PATH or tcp://…; https:// needs a file."
)
@click.option("--cert", type=_file, help="The server's certificate and chain.")
@click.option("--key", type=_file, help="The server's private key.")
@click.option(
    "--client-ca",
    multiple=True,
    metavar="[NAME=]FILE",
    help="The authorities of the clients; rules ask for a NAME: WHO by NAME. Repeatable.",
)
@allow_option
@listen_option
@key_passphrase_option
@click.option(
    "--client-auth", type=choice(ClientAuth), default="required", show_default=True, help="Who must show one."
)
@click.option("--crl", "crls", multiple=True, type=_file, help="Revocation lists, one for each authority. Repeatable.")
@click.option("--ocsp", type=choice(Ocsp), default="off", show_default=True, help="Ask the authority's responder.")
@click.option("--verify-depth", type=click.IntRange(0, 10), help="Authorities between a client and its root, at most.")
@click.option("--tls-min", type=choice(TlsVersion), default="1.3", show_default=True, help="The oldest TLS taken.")
@click.option(
    "--header",
    "headers",
    multiple=True,
    type=choice(HeaderStyle),
    metavar="STYLE",
    help=f"How the app is told who called: {', '.join(HeaderStyle)}. Repeatable.",
)
@click.option("--workers", default="1", metavar="N|auto", help="Processes that share the port.  [default: 1]")
@click.option("--admin", metavar="HOST:PORT", help="Serve metrics, health and status there, in plain HTTP.")
@click.option("--drain", default="30s", show_default=True, metavar="TIME", help="For open requests, when it stops.")
@click.option("--legacy-certs", is_flag=True, help="Admit clients whose certificates lack key usage or names (by CN).")
@no_ca_names_option
@as_json_option
def guard_(file: Path | None, check: bool, keys: bool, as_json: bool, **flags: Any) -> int | None:
    """Put mutual TLS in front of the app at TARGET, with your own server certificate and client authority.

    Without --allow, every client with a valid certificate of that authority is let through, as nginx does with
    ssl_verify_client on. A file says all that flags say, and more: many listeners, sites by server name, routes.
    """
    if keys:
        return _say_keys(as_json)
    try:
        if file is None:
            config = _from_flags(flags, as_json)
        else:
            _refuse_flags()
            config = load_config(file)
            as_json = as_json or config.log is LogStyle.JSON
        return _guard(config, file, check, as_json)
    except HandfastError as error:
        say_failed(error.failure)  # to the guard that this one was to take over from
        raise


def _guard(config: Config, file: Path | None, check: bool, as_json: bool) -> int:
    minter = None if config.assertion is None else Minter(config.assertion)
    taken = TakenText()

    @contextmanager
    def make() -> Iterator[Assembly]:
        with _feed(config) as feed:
            yield Assembly(config, first_line, file, feed, config.workers or auto_workers(), minter, taken)

    if check:
        if os.geteuid() == 0:
            become_user(config)  # who must be able to read it all
        now = datetime.now(UTC)
        with make() as assembly:
            said = doubts(assembly.build(now), assembly.upstreams(), now)
        _say_checked(config, as_json, [*loose_files(config, file), *said])
        return 0
    ready = partial(_ready, config, loose_files(config, file), as_json)
    return run(config, make, Telling(ready, as_json, by_file=file is not None))


@contextmanager
def _feed(config: Config) -> Iterator[Feed | None]:
    if config.state is None:
        yield None
        return
    from handfast.cli.feed import open_feed  # loads a database, which a guard without an authority needs not

    with open_feed(config.state) as feed:
        yield feed


def _from_flags(flags: dict[str, Any], as_json: bool) -> Config:
    for name in ("to", "cert", "key", "client_ca"):
        if flags[name] in (None, ()) and not (name == "client_ca" and flags["client_auth"] == ClientAuth.OFF):
            raise click.UsageError(f"Missing option '--{name.replace('_', '-')}'.")
    target = parse_target(flags["to"])
    defaults = SiteConfig()
    site = SiteConfig(
        cert=flags["cert"],
        key=flags["key"],
        key_passphrase_file=flags["key_passphrase_file"],
        client_ca=_authorities(flags["client_ca"]),
        client_auth=ClientAuth(flags["client_auth"]),
        crl=flags["crls"],
        ocsp=Ocsp(flags["ocsp"]),
        verify_depth=flags["verify_depth"],
        tls_min=TlsVersion(flags["tls_min"]),
        legacy_certs=flags["legacy_certs"],
        offer_authorities=not flags["no_ca_names"],
        to=str(target),
        allow=flags["allow"],
        headers=tuple(map(HeaderStyle, flags["headers"])) or defaults.headers,
    )
    # A rule that is wrong is told as such, and not by its place in a file.
    parse_policy(site.allow, authorities=site.authorities)
    listener = ListenerConfig("main", str(parse_place(flags["listen"])), Mode.HTTP if target.http else Mode.TCP, site)
    config = Config(
        workers=_workers(flags["workers"]),
        log=LogStyle.JSON if as_json else LogStyle.PRETTY,
        drain=parse_duration(flags["drain"]),
        listeners=(listener,),
        admin=None if flags["admin"] is None else AdminConfig(flags["admin"]),
        assertion=AssertionConfig() if HeaderStyle.ASSERTION in site.headers else None,
    )
    check_config(config, "the flags")
    return config


def _refuse_flags() -> None:
    """A flag beside a file would leave open which of the two holds."""
    context = click.get_current_context()
    taken = {"file", "check", "as_json"}
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    for parameter in context.command.params:
        if parameter.name in given and parameter.name not in taken:
            raise click.UsageError(f"{parameter.opts[0]} and --config do not go together: write it in the file.")


def _authorities(given: Sequence[str]) -> tuple[AuthorityFile, ...]:
    """The files of --client-ca. What stands before `=` is a name if it may be one; such a file is written ./a=b.crt."""
    found = []
    for text in given:
        name, equals, path = text.partition("=")
        found.append(AuthorityFile(Path(path), name) if equals and is_name(name) else AuthorityFile(Path(text)))
    names = [one.name for one in found]
    if len(found) > 1 and (not all(names) or len(set(names)) < len(names)):
        raise click.UsageError("Each of several --client-ca needs a name of its own: --client-ca NAME=FILE.")
    return tuple(found)


def _workers(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise click.UsageError("--workers takes a number from 1 to 1024, or auto.")
    return int(text)


def _say_keys(as_json: bool) -> int:
    if as_json:
        print_json([{"key": key.key, "text": key.text, "takes": key.kind, "default": key.default} for key in KEYS])
        return 0
    for key in KEYS:
        click.echo(key.key)
        default = f" Default: {key.default}." if key.default else ""
        click.echo(f"    {key.text} Takes {key.kind}.{default}")
    return 0


def _say_checked(config: Config, as_json: bool, warnings: list[str]) -> None:
    places = [f"{listener.name} on {listener.listen}" for listener in config.listeners]
    if as_json:
        print_json({"good": True, "listeners": places, "warnings": warnings})
    else:
        _warn(warnings)
        click.echo(f"good: {len(places)} listener(s): {', '.join(places)}")


def _ready(
    config: Config, loose: list[str], as_json: bool, urls: list[str], doubtful: Sequence[str] = ()
) -> dict[str, object]:
    shown, warnings = [], [*loose, *doubtful]
    for url, listener in zip(urls, config.listeners, strict=True):
        sites = [_shown(config, site) for site in listener.all_sites]
        first = {"to": sites[0]["to"], "allow": sites[0]["allow"]}
        shown.append({"name": listener.name, "url": url, **first, "sites": sites})
        if not as_json:
            for site, said in zip(listener.all_sites, sites, strict=True):
                names = f" for {', '.join(site.names)}" if site.names else ""
                say(f"{url}{names}", said["to"], said["allow"] if _has_rules(site) else [_everyone(config, site)])
                for route in said["routes"]:
                    methods = f"{','.join(route['methods'])} " if route["methods"] else ""
                    click.echo(f"  {methods}{route['path']} to {route['to']}: {route['who']}")
    if not as_json:
        _warn(warnings)
        click.echo("Ctrl-C stops it\n")
    first = {"url": urls[0], "to": shown[0]["to"], "allow": shown[0]["allow"]}
    return {"listeners": shown, **first, "warnings": warnings}


def _shown(config: Config, site: SiteConfig) -> dict[str, Any]:
    """What is said of a site."""
    to = site.to or ", ".join(dict.fromkeys(route.to for route in site.routes if route.to))
    rules = [rule if rule.startswith(("allow ", "deny ")) else f"allow {rule}" for rule in site.allow]
    if site.allow_file is not None:
        rules.append(f"the rules in {site.allow_file}")
    routes = [
        {"path": route.path, "methods": route.methods, "to": route.to or site.to, "who": _who(config, site, route)}
        for route in site.routes
    ]
    return {"names": site.names, "to": to, "allow": rules or ["allow any"], "routes": routes}


def _who(config: Config, site: SiteConfig, route: RouteConfig) -> str:
    """Whom a route lets through."""
    if (route.client_auth or site.client_auth) is not ClientAuth.REQUIRED:
        return "everyone"
    rules = route.allow if route.allow is not None else site.allow
    if rules or (route.allow is None and site.allow_file is not None):
        return ", ".join(rules) or f"the rules in {site.allow_file}"
    return f"every client with a certificate of {_vouching(config, site)}"


def _vouching(config: Config, site: SiteConfig) -> str:
    """Whose clients come in."""
    return " or ".join(map(str, site.client_ca)) or str(config.state)


def _has_rules(site: SiteConfig) -> bool:
    return bool(site.allow) or site.allow_file is not None


def _everyone(config: Config, site: SiteConfig) -> str:
    """Who comes in where there are no rules."""
    authority = _vouching(config, site)
    match site.client_auth:
        case ClientAuth.OFF:
            return "everyone: no certificate is asked for"
        case ClientAuth.OPTIONAL:
            return f"everyone; who shows a certificate must have one of {authority}"
        case ClientAuth.REQUIRED:
            return f"every client with a certificate of {authority}"


def say(url: str, target: str, allowed: list[str], warnings: Sequence[str] = ()) -> None:
    """Say what is guarded, where, who is let through, and what is not as it should be."""
    click.echo(f"guarding {target} at {url}")
    for line in allowed:
        click.echo(f"  {line}" if line.startswith(("allow", "deny")) else f"  let through: {line}")
    _warn(warnings)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        click.echo(f"  note: {warning}")
