"""The verb `up`: a guard with an authority of our own, in one command."""

from __future__ import annotations

import shlex
import socket
from datetime import UTC, datetime
from pathlib import Path

import click

from handfast.cli.certificates import file_base, issue_command
from handfast.cli.clients import ClientFiles
from handfast.cli.guard import allow_option, listen_option, no_ca_names_option, say, to_option
from handfast.cli.opening import folder_of, founded
from handfast.cli.output import as_json_option, example, passphrase_option, state_option
from handfast.cli.running import Serving, serve
from handfast.cli.starting import loose_keys, silent_apps
from handfast.cli.upkeep import LISTENER, Upkeep
from handfast.errors import HandfastError, InvalidInput, Reason
from handfast.guard.connection import Limits, Listener
from handfast.guard.listening import bind
from handfast.guard.places import Place, Target, parse_place, parse_target
from handfast.guard.routes import HTTP_ALPN
from handfast.guard.schema import leads_back
from handfast.guard.upstream import Backend, Upstreams
from handfast.pki.names import Name, parse_dns, parse_name
from handfast.policy import parse_policy
from handfast.tls.server import ServerSettings

_ITSELF = "it is where handfast itself is to listen"
_NAMELESS = "a socket has no name to hold its certificate to"


@click.command(
    "up",
    epilog=example(
        "handfast up --to 127.0.0.1:8000",
        "handfast up --to 127.0.0.1:8000 --name app.internal --allow web --allow 'ops/* GET /status'",
    ),
    short_help="Guard an app: authority, certificates and all.",
)
@to_option
@listen_option
@click.option("--name", "names", multiple=True, help="A host that clients call it by.  [default: this machine's names]")
@allow_option
@click.option(
    "--client", "clients", multiple=True, metavar="NAME", help="A client identity to keep.  [default: client]"
)
@click.option("--trust-domain", default=None, help="Of a new authority.  [default: handfast.internal]")
@no_ca_names_option
@passphrase_option
@state_option
@as_json_option
def up_(
    to: str,
    listen: str,
    names: tuple[str, ...],
    allow: tuple[str, ...],
    clients: tuple[str, ...],
    trust_domain: str | None,
    no_ca_names: bool,
    passphrase_file: Path | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Put mutual TLS in front of the app at TARGET: makes an authority if there is none, a server certificate
    and a client's, listens, and says how to call it.

    Without --allow, every identity of the trust domain is let through: all of them were issued by you. In a rule, GET
    does not cover HEAD: write GET,HEAD. An app that speaks TLS (https://…) has to show a certificate of this authority
    for the host in TARGET. A --client that was revoked gets no new certificate here.
    """
    place = parse_place(listen)
    target = _target(to, place)
    folder, plug = folder_of(state), bind(place)
    with plug, founded(folder, trust_domain, passphrase_file) as authority:
        domain = authority.trust_domain
        policy = parse_policy(allow or (f"spiffe://{domain}/**",), domain)
        client_names = [parse_name(name, domain) for name in clients or ("client",)]
        upkeep = Upkeep(
            authority,
            Upstreams(str(target), (Backend(target),)),
            policy,
            ServerSettings(
                answer_refusals=target.http,
                offer_authorities=not no_ca_names,
                alpn=HTTP_ALPN if target.http else (),
            ),
            _server_names(names, place.host),
            tuple(ClientFiles(name, folder / "clients" / file_base(name)) for name in client_names),
        )
        snapshot = upkeep.snapshot(datetime.now(UTC))
        warnings = [*_withheld(upkeep, state), *loose_keys(client.key for client in upkeep.clients)]
        warnings += [] if as_json else _silent(upkeep, state)

        def ready(urls: list[str]) -> dict[str, object]:
            url = urls[0]
            first = next((client for client in upkeep.clients if client not in upkeep.withheld), None)
            host, _, port = url.partition("://")[2].rpartition(":")
            if host in ("0.0.0.0", "[::]"):  # noqa: S104  # compared with, not bound to
                url = f"{url.partition('://')[0]}://{upkeep.server_names[0].value}:{port}"
            rules = [str(rule) for rule in policy.rules]
            files = None if first is None else _files(first)
            if not as_json:
                say(url, str(target), rules, warnings)
                click.echo("Ctrl-C stops it\n")
                _say_how(url, folder / "root.crt", files, target.http)
            event: dict[str, object] = {"url": url, "ca": str(folder / "root.crt"), "client": files}
            return event | {"to": str(target), "allow": rules, "warnings": warnings}

        listener = Listener(LISTENER, target.http, Limits())
        serve(Serving(snapshot, ((listener, plug),), ready, as_json, upkeep.refresh))


def _target(to: str, place: Place) -> Target:
    """The app. Raises InvalidInput, also for the guard's own address, and where there is no name to judge it by."""
    target = parse_target(to)
    if leads_back(target, place):
        raise InvalidInput(Reason.INPUT_TARGET, value=to, detail=_ITSELF, remedy="give the app's own address")
    if target.tls and target.path:
        step = "write [upstream.NAME] with server_name, for handfast guard -c FILE: see handfast guard --keys"
        raise InvalidInput(Reason.INPUT_TARGET, value=to, detail=_NAMELESS, remedy=step)
    return target


def _withheld(upkeep: Upkeep, state: Path | None) -> list[str]:
    """Which clients get no certificate, for they were revoked, and how to give them one on purpose."""
    return [
        f"{client.name} was revoked on {revoked:%Y-%m-%d %H:%M} UTC, so it gets no new certificate; to give it one: "
        f"{issue_command([str(client.name)], client.base.parent, state)} --force"
        for client, revoked in upkeep.withheld.items()
    ]


def _silent(upkeep: Upkeep, state: Path | None) -> list[str]:
    """That the app does not answer, or not in TLS that holds, and how it comes by a certificate that does."""
    said, target = silent_apps([upkeep.upstreams]), upkeep.upstreams.target
    if said and target.tls:
        said.append(
            f"it has to show a certificate of this authority: {issue_command([target.host], Path('DIR'), state)}"
        )
    return said


def _files(client: ClientFiles) -> dict[str, str]:
    files = {"cert": str(client.cert), "key": str(client.key), "p12": str(client.p12)}
    return files | {"name": str(client.name), "p12_password_file": str(client.p12_password)}


def _server_names(names: tuple[str, ...], host: str) -> tuple[Name, ...]:
    """What the server certificate is for: as told, or what this machine is called by."""
    if names:
        return tuple(dict.fromkeys(map(_host_name, names)))
    good = []
    for text in ("localhost", "127.0.0.1", "::1", host, socket.gethostname()):
        try:
            name = _host_name(text)
        except HandfastError:
            continue
        if name.value not in ("0.0.0.0", "::"):  # noqa: S104  # compared with, not bound to
            good.append(name)
    return tuple(dict.fromkeys(good))


def _host_name(text: str) -> Name:
    """A name that clients call a server by: a bare word is a host here, not an identity."""
    return parse_name(text) if ":" in text or "." in text else parse_dns(text)


def _say_how(url: str, ca: Path, files: dict[str, str] | None, http: bool) -> None:
    if files is None:  # all that were asked for are revoked
        click.echo(f"Clients trust {ca}.")
    elif http:
        curl = f"curl --cacert {shlex.quote(str(ca))}"
        click.echo(f"This works, as {files['name']}:")
        click.echo(f"  {curl} --cert {shlex.quote(files['cert'])} --key {shlex.quote(files['key'])} {url}/\n")
        click.echo("This is refused, for it shows no certificate:")
        click.echo(f"  {curl} {url}/\n")
        click.echo(f"For a browser, import {files['p12']} (its password is in {files['p12_password_file']}) and {ca}.")
    else:
        click.echo(f"Clients show the certificate {files['cert']} with the key {files['key']}, and trust {ca}.")
    click.echo("Another client: handfast issue NAME\n")
