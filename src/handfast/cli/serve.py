"""The verb `guard`, and how a guard is run from the command line."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from handfast.cli.output import as_json_option, example, first_line, key_passphrase_option, print_json
from handfast.errors import Failure, Reason
from handfast.guard.events import EventLog, told
from handfast.guard.places import Target, parse_address, parse_target
from handfast.guard.service import Guard, Snapshot, bind, raise_descriptor_limit
from handfast.pki.verification import Purpose, Terms
from handfast.policy import ALLOW_ANY, parse_policy
from handfast.tls.credential import check_server, check_time, load_bundle, load_credential
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


no_ca_names_option = click.option(
    "--no-ca-names", is_flag=True, help="Do not tell clients which authorities are accepted."
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
@key_passphrase_option
@click.option("--legacy-certs", is_flag=True, help="Admit clients whose certificates lack key usage or names (by CN).")
@no_ca_names_option
@as_json_option
def guard_(
    to: str,
    cert: Path,
    key: Path,
    client_ca: Path,
    allow: tuple[str, ...],
    listen: str,
    key_passphrase_file: Path | None,
    legacy_certs: bool,
    no_ca_names: bool,
    as_json: bool,
) -> None:
    """Put mutual TLS in front of the app at TARGET, with your own server certificate and client authority.

    Without --allow, every client with a valid certificate of that authority is let through, as nginx does with
    ssl_verify_client on.
    """
    target, address = parse_target(to), parse_address(listen)
    policy = parse_policy(allow) if allow else ALLOW_ANY
    settings = ServerSettings(answer_refusals=target.http, offer_authorities=not no_ca_names)
    now, opens = datetime.now(UTC), None if key_passphrase_file is None else first_line(key_passphrase_file)
    bundle, credential = load_bundle(client_ca), load_credential(cert, key, opens)
    check_time(bundle.anchors, now)
    check_server(credential, now)
    context = ServerContext(credential, Terms(bundle, Purpose.CLIENT, legacy=legacy_certs), settings)

    def ready(url: str) -> dict[str, object]:
        rules = [str(rule) for rule in policy.rules]
        if not as_json:
            say(url, target, rules if allow else [f"every client with a certificate of {client_ca}"])
        return {"url": url, "to": str(target), "allow": rules}

    serve(Serving(Snapshot(context, policy), target, bind(*address), ready, as_json))


@dataclass(frozen=True, slots=True)
class Serving:
    """What a guard needs to run. `ready` is told the URL, says what there is to say, and returns the ready event."""

    snapshot: Snapshot
    target: Target
    plug: socket.socket  # bound already, so that nothing is issued for a port that is taken
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
    address = await guard.listen(serving.plug)
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
    log.close()
    if not serving.as_json:
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


def say(url: str, target: Target, allowed: list[str]) -> None:
    """Say what is guarded, where, and who is let through."""
    click.echo(f"guarding {target} at {url}")
    for line in allowed:
        click.echo(f"  {line}" if line.startswith(("allow", "deny")) else f"  let through: {line}")
    click.echo("Ctrl-C stops it\n")
