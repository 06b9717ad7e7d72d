"""The verbs `connect` and `curl`: calling out with our certificate."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import click

from handfast.cli.clients import client_files
from handfast.cli.output import (
    as_json_option,
    example,
    first_line,
    key_passphrase_option,
    note,
    passphrase_option,
    print_error,
    print_json,
    state_option,
)
from handfast.connector.call import CallFailed, Route, Tried, try_out
from handfast.connector.files import Material, Watch
from handfast.connector.service import Connector, Limits
from handfast.connector.words import span
from handfast.errors import Failure, HandfastError, InvalidInput, Reason
from handfast.files import read_file
from handfast.guard.events import EventLog, told
from handfast.guard.listening import bind
from handfast.guard.places import Place, join_address, parse_address, parse_place
from handfast.guard.service import raise_descriptor_limit
from handfast.pki.certificates import certificate_names, label, parse_certificates
from handfast.pki.names import Kind, Name, parse_dns, parse_pattern
from handfast.pki.profiles import parse_lifetime
from handfast.tls.client import ClientSettings, server_name_of

if TYPE_CHECKING:
    from handfast.cli.renewing import Renewal

F = TypeVar("F", bound=Callable[..., Any])

LISTEN = "127.0.0.1:9000"
_RENEWALS = 60.0  # seconds between two looks whether the certificate is due
# What curl ends with when TLS with the server, or the server's answer to our certificate, may be why (curl(1)).
_CURL_TLS = frozenset({35, 52, 55, 56, 58, 60, 77, 83, 90, 91, 92})
# How a URL begins among curl's words, and after which of its options it is not the one to call.
_URLS = ("https://", "http://")
_CURL_TAKES_URLS = frozenset({"-e", "--referer", "-x", "--proxy", "--preproxy", "--doh-url", "-H", "--header", "-d"})
# With these curl does not go where the URL says, or not with our files; a trial of ours would tell nothing.
_CURL_ELSEWHERE = ("--proxy", "-x", "--socks", "--preproxy", "--unix-socket", "-E")
_PROTOCOL = re.compile(r"[!-+\--~]{1,255}")
_CONNECT_TO = re.compile(r"([^:\[]*|\[[^]]*\]):(\d*):([^:\[]*|\[[^]]*\]):(\d*)")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we call as: a name whose files are in the state folder, or files."""

    name: str | None
    cert: Path | None
    key: Path | None
    ca: Path | None
    state: Path | None


def identity_options(function: F) -> F:
    """Add the options that say who we are to a verb, which gets them as one `identity`."""

    def with_identity(**values: Any) -> Any:
        names = ("as_name", "cert", "key", "ca", "state")
        return function(identity=Identity(*(values.pop(name) for name in names)), **values)

    with_identity.__doc__ = function.__doc__
    with_identity.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]  # click's own way
    path = click.Path(path_type=Path)
    for option in (
        state_option,
        click.option("--ca", type=path, help="The authorities to trust the server by.  [default with --as: our own]"),
        click.option("--key", type=path, help="Its private key."),
        click.option("--cert", type=path, help="The certificate to show, and its chain."),
        click.option("--as", "as_name", metavar="NAME", help="Call as NAME, by the files in clients/ of the state."),
    ):
        with_identity = option(with_identity)
    return with_identity  # type: ignore[return-value]  # click replaces it by a command anyway


@click.command(
    "connect",
    epilog=example(
        "handfast connect --to api.internal:8443 --listen 127.0.0.1:9000 --as web",
        "handfast connect --to 10.0.0.7:8443 --listen unix:/run/api.sock --as web --expect api",
        "handfast connect --to grpc.internal:8443 --as web --alpn h2",
    ),
    short_help="Call a server: a plain local port that speaks mutual TLS.",
)
@click.option("--to", required=True, metavar="HOST:PORT", help="The server.")
@click.option("--listen", default=LISTEN, show_default=True, metavar="HOST:PORT|unix:PATH", help="The local side.")
@identity_options
@click.option("--expect", metavar="PATTERN", help="The identity that the server must have, instead of its host name.")
@click.option("--sni", metavar="NAME", help="The host name to ask the server for, and to hold it to.")
@click.option("--tls-min", type=click.Choice(["1.2", "1.3"]), default="1.3", show_default=True, help="The oldest TLS.")
@click.option("--alpn", metavar="P,…", help="Application protocols to offer, as h2 for gRPC.  [default: none]")
@click.option("--unix-uid", "uids", type=int, multiple=True, metavar="UID", help="A user who may call over unix:PATH.")
@click.option("--unsafe-listen", is_flag=True, help="Listen where other machines reach it, and call as us.")
@click.option("--pool", type=click.IntRange(0, 1000), default=1, show_default=True, help="Handshakes to keep ready.")
@click.option("--max-connections", type=click.IntRange(1), default=10_000, show_default=True, help="At most so many.")
@click.option("--idle", metavar="TIME", help="End a connection without a byte for so long.  [default: never]")
@click.option("--no-check", is_flag=True, help="Do not try the server before listening.")
@key_passphrase_option
@passphrase_option
@as_json_option
def connect_(
    to: str,
    listen: str,
    identity: Identity,
    expect: str | None,
    sni: str | None,
    tls_min: str,
    alpn: str | None,
    uids: tuple[int, ...],
    unsafe_listen: bool,
    pool: int,
    max_connections: int,
    idle: str | None,
    no_check: bool,
    key_passphrase_file: Path | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Listen on a plain local port or UNIX socket, and carry each connection to the server at HOST:PORT over TLS in
    which both sides prove who they are. Whoever reaches the local side calls as us.

    Certificate, key and authorities are read again when their files change. A certificate of the authority in the
    state folder is renewed at half its life.
    """
    place = _place(listen, unsafe=unsafe_listen)
    if uids and not place.path:
        raise click.UsageError("--unix-uid goes with --listen unix:PATH; a TCP port does not tell who calls")
    route = _route(to)
    secret = None if key_passphrase_file is None else first_line(key_passphrase_file)
    material = _material(identity, _Server(route.host, sni, expect, tls_min == "1.2", _protocols(alpn)), secret)
    renewal = _renewal(identity, material, passphrase_file)
    now = datetime.now(UTC)
    if renewal is not None:
        renewal.before_start(now)
    watch = Watch(material)
    generation = watch.first(now)
    idle_limit = float("inf") if idle is None else parse_lifetime(idle).total_seconds()
    limits = Limits(connections=max_connections, idle=idle_limit)

    log = EventLog(sys.stdout.buffer, pretty=not as_json)
    raise_descriptor_limit()
    try:
        connector = Connector(route, generation, log, limits, pool, frozenset(uids), watch.look)
        _run(_Running(connector, place, not no_check, as_json, renewal).main())
    finally:
        log.close()


@click.command(
    "curl",
    context_settings={"ignore_unknown_options": True},
    epilog=example(
        "handfast curl https://api.internal:8443/status --as web",
        "handfast curl --as web -sS https://api.internal:8443/ -- --json '{}' -o answer",
    ),
    short_help="Run curl with our certificate.",
)
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="URL [CURL-OPTIONS]...")
@identity_options
@as_json_option
def curl_(words: tuple[str, ...], identity: Identity, as_json: bool) -> int:
    """Run the system's curl on URL with our certificate, key and trusted authorities; its exit code is ours.

    What else is given, curl gets, and after -- all of it. Where curl fails over TLS, we try the server as well, and say
    on standard error what is wrong.
    """
    url = _url_in(words)
    program = shutil.which("curl")
    if program is None:
        raise HandfastError(Reason.CONNECT_NO_CURL)
    host, port = _host_of(url)
    material = _material(identity, _Server(host, None, None, tls12=True), None)
    generation = material.load(datetime.now(UTC))
    files = ["--cert", str(material.cert), "--key", str(material.key), "--cacert", str(material.ca)]
    code = _call([program, *files, *words])
    tls = urlsplit(url).scheme == "https"
    if code not in _CURL_TLS or not tls or any(word.startswith(_CURL_ELSEWHERE) for word in words):
        return code
    try:
        _run(try_out(Route(*_led_elsewhere(words, host, port)), generation))
    except CallFailed as failed:
        failure = failed.verdict.failure
        if as_json:
            note(json.dumps(failure.as_json(), default=str))
        else:
            print_error(failure, False, failure.hint)
    return code


@dataclass(frozen=True, slots=True)
class _Server:
    """Whom to call, and how it is known."""

    host: str
    sni: str | None
    expect: str | None
    tls12: bool
    alpn: tuple[bytes, ...] = ()


@dataclass(slots=True)
class _Running:
    """A connector from its trial of the server to its end."""

    connector: Connector
    place: Place
    check: bool
    as_json: bool
    renewal: Renewal | None

    async def main(self) -> None:
        """Run until SIGINT or SIGTERM, then drain. Raises HandfastError where the server refuses the trial."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(lambda _loop, context: self._report(context))
        tried = await self._try() if self.check else None
        plug = bind(self.place, others=bool(self.connector.uids))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        try:
            await self._serve(plug, tried, stop)
        finally:
            if self.place.path:
                with suppress(OSError):
                    os.unlink(self.place.path)

    async def _serve(self, plug: socket.socket, tried: Tried | Failure | None, stop: asyncio.Event) -> None:
        connector, loop = self.connector, asyncio.get_running_loop()
        self._say(plug, tried)
        connector.listen(plug)
        keeping = loop.create_task(self._keep_renewed())
        await stop.wait()
        keeping.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._hurry)
        if not self.as_json:
            many = len(connector.connections)
            click.echo(f"\nstopping; {many} connection(s) may finish (Ctrl-C again: at once)")
        await connector.stop()
        if self.as_json:
            connector.event("stopped", {})
        connector.log.close()
        if connector.hurried:
            raise click.Abort
        if not self.as_json:
            click.echo("goodbye")

    def _hurry(self) -> None:
        """A second Ctrl-C."""
        self.connector.hurried = True

    async def _try(self) -> Tried | Failure:
        """One handshake before anybody calls. A server that is merely away may come back; one that refuses will not."""
        try:
            return await try_out(self.connector.route, self.connector.generation)
        except CallFailed as failed:
            failure = failed.verdict.failure
            if failure.reason is Reason.CONNECT_UNREACHABLE:
                return failure
            raise HandfastError(failure.reason, **failure.facts) from None

    def _say(self, plug: socket.socket, tried: Tried | Failure | None) -> None:
        connector = self.connector
        if self.place.path:
            shown = url = str(self.place)
        else:
            shown = join_address(*plug.getsockname()[:2])
            url = f"tcp://{shown}"
        leaf = connector.generation.own.chain[0]
        until = leaf.not_valid_after_utc
        event: dict[str, object] = {
            "url": url,
            "to": str(connector.route),
            "as": label(leaf),
            "not_after": until.isoformat(),
        }
        event["renews"] = self.renewal is not None
        if isinstance(tried, Tried):
            event |= {"server": str(tried.peer.identity), "answered": tried.answered}
            state = f"the server is {tried.peer.identity}, and TLS with our certificate is done"
        elif tried is not None:
            event["unreachable"] = tried.message
            state = f"{tried.message}; going on, it may come"
        else:
            state = "the server was not tried"
        if self.as_json:
            print_json({"event": "ready", **event})
            return
        click.echo(f"listening on {shown}, calling {connector.route} as {label(leaf)}")
        click.echo(f"  {state}")
        how = "renewed here at half its life" if self.renewal is not None else "read again when its files change"
        click.echo(f"  our certificate is good for {span(until - connector.now)}; {how}")
        click.echo("Ctrl-C stops it\n")

    async def _keep_renewed(self) -> None:
        """Renew our certificate when it is due; what is in force changes when the files have."""
        renewal, said = self.renewal, ""
        while renewal is not None:
            await asyncio.sleep(_RENEWALS)
            try:
                if await asyncio.to_thread(renewal.renew, datetime.now(UTC)):
                    self.connector.event("renewal", {"outcome": "done"})
                said = ""
            except Exception as error:
                failure = (
                    error.failure
                    if isinstance(error, HandfastError)
                    else Failure(Reason.BUG, {"detail": repr(error)[:200]})
                )
                if said != failure.message:  # once for each cause
                    said = failure.message
                    self.connector.event("renewal", {"outcome": "failed"} | told(failure))

    def _report(self, context: dict[str, Any]) -> None:
        """What the loop caught is a bug of ours: one event, and no traceback for the user."""
        failure = Failure(Reason.BUG, {"detail": f"{context.get('message')}: {context.get('exception')!r}"[:300]})
        self.connector.event("bug", told(failure))


def _place(listen: str, *, unsafe: bool) -> Place:
    """Where to listen. Raises InvalidInput (INPUT_ADDRESS, CONNECT_OPEN_PORT)."""
    if listen.startswith("unix:"):
        return Place(path=str(Path(parse_place(listen).path).absolute()))
    host, port = parse_address(listen)
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host.lower() == "localhost"
    if not inside and not unsafe:
        raise InvalidInput(Reason.CONNECT_OPEN_PORT, address=join_address(host, port))
    return Place(host, port)


def _route(to: str) -> Route:
    host, port = parse_address(to)
    if port == 0:
        raise InvalidInput(Reason.INPUT_ADDRESS, value=to, detail="port 0 is no place to connect to")
    return Route(host, port)


def _protocols(text: str | None) -> tuple[bytes, ...]:
    """Names of application protocols (RFC 7301 3.1), with commas between them. Raises UsageError."""
    names = [] if text is None else text.split(",")
    if not all(_PROTOCOL.fullmatch(name) for name in names):
        raise click.UsageError("--alpn takes names with commas between them, as h2,http/1.1")
    return tuple(name.encode() for name in names)


def _material(identity: Identity, server: _Server, secret: bytes | None) -> Material:
    """The files of an identity, and the server they are for. Raises HandfastError and UsageError."""
    cert, key, ca, renew = _paths(identity)
    pattern = None if server.expect is None else parse_pattern(server.expect, _trust_domain(cert))
    asked = server.sni or server.host
    sni = None if (host := server_name_of(asked)) is None else parse_dns(host).value
    settings = ClientSettings(sni, pattern, server.tls12, server.alpn)
    return Material(cert, key, ca, settings, renew, None if pattern else _server_name(asked), identity.name, secret)


def _paths(identity: Identity) -> tuple[Path, Path, Path, str]:
    """Certificate, key, authorities, and how to come by a new certificate."""
    if identity.name is None:
        if identity.cert is None or identity.key is None or identity.ca is None:
            raise click.UsageError("say who calls: --as NAME, or all of --cert F, --key F and --ca F")
        return identity.cert, identity.key, identity.ca, f"handfast issue NAME, and put it in {identity.cert}"
    if identity.cert is not None or identity.key is not None:
        raise click.UsageError("--as NAME has its own certificate and key; leave out --cert and --key, or it")
    files = client_files(identity.state, identity.name)
    return files.cert, files.key, identity.ca or files.ca, files.renew


def _renewal(identity: Identity, material: Material, passphrase_file: Path | None) -> Renewal | None:
    if identity.name is None:
        return None
    from handfast.cli.opening import folder_of
    from handfast.cli.renewing import renewal_of

    return renewal_of(material.cert, material.key, folder_of(identity.state), passphrase_file)


def _trust_domain(cert: Path) -> str | None:
    """That of our own certificate: what a bare name in a pattern is of."""
    leaf = parse_certificates(read_file(cert, "certificate file"), str(cert))[0]
    return next((name.trust_domain for name in certificate_names(leaf) if name.trust_domain), None)


def _server_name(host: str) -> Name:
    try:
        return Name(Kind.IP, str(ipaddress.ip_address(host)))
    except ValueError:
        return parse_dns(host.rstrip("."))


def _url_in(words: tuple[str, ...]) -> str:
    """The URL among curl's words: the first one, or that which begins as one. Raises UsageError."""
    if not words[0].startswith("-"):
        return words[0]
    for before, word in pairwise(words):
        if before == "--url" or (word.lower().startswith(_URLS) and before not in _CURL_TAKES_URLS):
            return word
    raise click.UsageError("there is no URL; give it first, or with https:// before it")


def _led_elsewhere(words: tuple[str, ...], host: str, port: int) -> tuple[str, int]:
    """Where curl's --resolve or --connect-to, as curl(1) has them, lead a call to this host and port."""
    for option, value in pairwise(words):
        if option == "--resolve":
            asked, _, rest = value.removeprefix("+").partition(":")
            asked_port, _, addresses = rest.partition(":")
            address = addresses.split(",")[0].strip("[]")
            if asked.lower() in (host.lower(), "*") and asked_port == str(port) and address:
                return address, port
        if option == "--connect-to":
            found = _CONNECT_TO.fullmatch(value)
            if found and found[1].lower() in ("", host.lower()) and found[2] in ("", str(port)):
                return found[3].strip("[]") or host, int(found[4] or port)
    return host, port


def _host_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise InvalidInput(Reason.INPUT_ADDRESS, value=url, detail="its port is not a number") from None


def _call(line: list[str]) -> int:
    """Run curl with our standard streams; return its exit code, or 128 and the signal that ended it."""
    with subprocess.Popen(line) as child:  # noqa: S603  # a list, no shell; the words are the user's own
        while True:
            try:
                code = child.wait()
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:  # it got the same, and ends
                continue


def _run(main: Coroutine[Any, Any, Any]) -> Any:
    import uvloop

    return uvloop.run(main)
