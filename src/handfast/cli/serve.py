"""The verbs that serve: `guard` with the user's own files, and `up` with an authority of our own."""

from __future__ import annotations

import asyncio
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from handfast.cli.output import as_json_option, example, passphrase_option, print_json, state_option
from handfast.errors import Failure, HandfastError, Reason
from handfast.guard.events import EventLog, told
from handfast.guard.places import Target, parse_address, parse_target
from handfast.guard.service import Guard, Snapshot, raise_descriptor_limit
from handfast.pki.names import Name, parse_dns, parse_name
from handfast.pki.verification import Purpose, Terms
from handfast.policy import ALLOW_ANY, parse_policy
from handfast.tls.credential import load_bundle, load_credential
from handfast.tls.server import ServerContext, ServerSettings

LISTEN = "127.0.0.1:8443"

to_option = click.option(
    "--to", "to", required=True, metavar="TARGET", help="The app: HOST:PORT, http://…, unix:PATH or tcp://HOST:PORT."
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


@click.command(
    "guard",
    epilog=example(
        "handfast guard --to 127.0.0.1:8000 --cert server.crt --key server.key --client-ca ca.crt",
        "handfast guard --to tcp://:5432 --cert s.crt --key s.key --client-ca ca.crt --allow dns:*.corp",
    ),
    short_help="Guard an app with certificates you have.",
)
@to_option
@click.option("--cert", required=True, type=click.Path(path_type=Path), help="The server's certificate and chain.")
@click.option("--key", required=True, type=click.Path(path_type=Path), help="The server's private key.")
@click.option("--client-ca", required=True, type=click.Path(path_type=Path), help="The authorities of the clients.")
@allow_option
@listen_option
@click.option("--legacy-certs", is_flag=True, help="Admit clients whose certificates lack key usage or names (by CN).")
@click.option("--no-ca-names", is_flag=True, help="Do not tell clients which authorities are accepted.")
@as_json_option
def guard_(
    to: str,
    cert: Path,
    key: Path,
    client_ca: Path,
    allow: tuple[str, ...],
    listen: str,
    legacy_certs: bool,
    no_ca_names: bool,
    as_json: bool,
) -> None:
    """Put mutual TLS in front of the app at TARGET, with your own server certificate and client authority.

    Without --allow, every client with a valid certificate of that authority is let through, as nginx does with
    ssl_verify_client on.
    """
    target = parse_target(to)
    policy = parse_policy(allow) if allow else ALLOW_ANY
    settings = ServerSettings(answer_refusals=target.http, offer_authorities=not no_ca_names)
    terms = Terms(load_bundle(client_ca), Purpose.CLIENT, legacy=legacy_certs)
    snapshot = Snapshot(ServerContext(load_credential(cert, key), terms, settings), policy)

    def ready(url: str) -> dict[str, object]:
        rules = [str(rule) for rule in policy.rules]
        if not as_json:
            _say(url, target, rules if allow else [f"every client with a certificate of {client_ca}"])
        return {"url": url, "to": str(target), "allow": rules}

    serve(Serving(snapshot, target, parse_address(listen), ready, as_json))


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
@click.option("--no-ca-names", is_flag=True, help="Do not tell clients which authorities are accepted.")
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

    Without --allow, every identity of the trust domain is let through: all of them were issued by you.
    """
    from handfast.cli.certificates import file_base
    from handfast.cli.opening import TRUST_DOMAIN, folder_of, founded
    from handfast.cli.upkeep import ClientFiles, Upkeep

    target, address = parse_target(to), parse_address(listen)
    folder = folder_of(state)
    with founded(folder, trust_domain or TRUST_DOMAIN, passphrase_file) as authority:
        domain = authority.trust_domain
        policy = parse_policy(allow or (f"spiffe://{domain}/**",), domain)
        client_names = [parse_name(name, domain) for name in clients or ("client",)]
        upkeep = Upkeep(
            authority,
            policy,
            ServerSettings(answer_refusals=target.http, offer_authorities=not no_ca_names),
            _server_names(names, address[0], domain),
            tuple(ClientFiles(name, folder / "clients" / file_base(name)) for name in client_names),
        )
        snapshot = upkeep.snapshot(datetime.now(UTC))

        def ready(url: str) -> dict[str, object]:
            first = upkeep.clients[0]
            host, _, port = url.partition("://")[2].rpartition(":")
            if host in ("0.0.0.0", "[::]"):  # noqa: S104  # compared with, not bound to
                url = f"{url.partition('://')[0]}://{upkeep.server_names[0].value}:{port}"
            rules = [str(rule) for rule in policy.rules]
            files = {"cert": str(first.cert), "key": str(first.key), "p12": str(first.p12)}
            files |= {"name": str(first.name), "p12_password_file": str(first.p12_password)}
            if not as_json:
                _say(url, target, rules)
                _say_how(url, folder / "root.crt", files, target.http)
            return {"url": url, "ca": str(folder / "root.crt"), "client": files, "to": str(target), "allow": rules}

        serve(Serving(snapshot, target, address, ready, as_json, upkeep.refresh))


@dataclass(frozen=True, slots=True)
class Serving:
    """What a guard needs to run. `ready` is told the URL, says what there is to say, and returns the ready event."""

    snapshot: Snapshot
    target: Target
    address: tuple[str, int]
    ready: Callable[[str], dict[str, object]]
    as_json: bool
    refresh: Callable[[datetime], Snapshot | None] | None = None


def serve(serving: Serving) -> None:
    """Run a guard until SIGINT or SIGTERM, then drain. Raises Unreachable when it cannot listen."""
    raise_descriptor_limit()
    log = EventLog(sys.stdout.buffer, pretty=not serving.as_json)
    try:
        _run(_serve(serving, log))
    finally:
        log.close()


async def _serve(serving: Serving, log: EventLog) -> None:
    guard = Guard(serving.snapshot, serving.target, log, refresh=serving.refresh)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: _report(guard, context))
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    address = await guard.listen(*serving.address)
    scheme = "https" if serving.target.http else "tls"
    event = serving.ready(f"{scheme}://{address}")
    if serving.as_json:
        print_json({"event": "ready", **event})
    await stop.wait()
    for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C ends it at once
        loop.remove_signal_handler(number)
    open_connections = len(guard.connections)
    if not serving.as_json:
        click.echo(f"\nstopping; {open_connections} connection(s) may finish (Ctrl-C again: at once)")
    await guard.stop()
    if serving.as_json:
        log.emit("stopped", guard.now, {})
    else:
        click.echo("goodbye")


def _report(guard: Guard, context: dict[str, Any]) -> None:
    """What the loop caught is a bug of ours: one event, and no traceback for the user."""
    failure = Failure(Reason.BUG, {"detail": f"{context.get('message')}: {context.get('exception')!r}"[:300]})
    guard.log.emit("bug", guard.now, told(failure))


def _run(main: Coroutine[Any, Any, None]) -> None:
    if sys.platform == "win32":  # uvloop is not to be had there
        asyncio.run(main)
    else:
        import uvloop

        uvloop.run(main)


def _server_names(names: tuple[str, ...], host: str, trust_domain: str) -> tuple[Name, ...]:
    """What the server certificate is for: as told, or what this machine is called by."""
    if names:
        return tuple(dict.fromkeys(parse_name(name, trust_domain) for name in names))
    found = ["localhost", "127.0.0.1", "::1", host, socket.gethostname()]
    good = []
    for text in found:
        try:
            name = parse_name(text) if ":" in text or "." in text else parse_dns(text)
        except HandfastError:
            continue
        if name.value not in ("0.0.0.0", "::"):  # noqa: S104  # compared with, not bound to
            good.append(name)
    return tuple(dict.fromkeys(good))


def _say_how(url: str, ca: Path, files: dict[str, str], http: bool) -> None:
    if http:
        curl = f"curl --cacert {shlex.quote(str(ca))}"
        click.echo(f"This works, as {files['name']}:")
        click.echo(f"  {curl} --cert {shlex.quote(files['cert'])} --key {shlex.quote(files['key'])} {url}/\n")
        click.echo("This is refused, for it shows no certificate:")
        click.echo(f"  {curl} {url}/\n")
        click.echo(f"For a browser, import {files['p12']} (its password is in {files['p12_password_file']}).")
    else:
        click.echo(f"Clients show the certificate {files['cert']} with the key {files['key']}, and trust {ca}.")
    click.echo("Another client: handfast issue NAME\n")


def _say(url: str, target: Target, allowed: list[str]) -> None:
    click.echo(f"guarding {target} at {url}")
    for line in allowed:
        click.echo(f"  {line}" if line.startswith(("allow", "deny")) else f"  let through: {line}")
    click.echo("Ctrl-C stops it\n")
