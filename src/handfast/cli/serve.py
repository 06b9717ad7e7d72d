"""The verbs that serve: `guard` with the user's own files, and `up` with an authority of our own."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

from handfast.cli.look import load_bundle
from handfast.cli.output import as_json_option, example, print_json
from handfast.guard.events import EventLog
from handfast.guard.places import Target, parse_address, parse_target
from handfast.guard.service import Guard, Snapshot, raise_descriptor_limit
from handfast.pki.verification import Purpose, Terms
from handfast.policy import ALLOW_ANY, parse_policy
from handfast.tls.credential import load_credential
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
        "handfast guard --to tcp://127.0.0.1:5432 --cert s.crt --key s.key --client-ca ca.crt --allow dns:*.internal",
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
        log.emit("stopped", guard.now)
    else:
        click.echo("goodbye")


def _run(main: object) -> None:
    try:
        from uvloop import run
    except ImportError:  # Windows
        from asyncio import run
    run(main)  # type: ignore[arg-type]  # both take a coroutine


def _say(url: str, target: Target, allowed: list[str]) -> None:
    click.echo(f"guarding {target} at {url}")
    for line in allowed:
        click.echo(f"  {line}" if line.startswith(("allow", "deny")) else f"  let through: {line}")
    click.echo("Ctrl-C stops it\n")
