"""The verb `explain`: a handshake as it happens, or as it was recorded, and whose fault a failure is."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from handfast.cli.clients import client_files
from handfast.cli.look import server_address
from handfast.cli.output import (
    as_json_option,
    example,
    first_line,
    key_passphrase_option,
    note,
    print_json,
    state_option,
)
from handfast.errors import Exit, InvalidInput, Reason, Unreachable
from handfast.explain.capture import MAX_CAPTURE, read_capture, write_capture
from handfast.explain.draw import draw
from handfast.explain.model import Explanation, Known, Result
from handfast.explain.page import render_page
from handfast.explain.probe import Limits, answer, call
from handfast.explain.reasons import all_codes, meaning_of
from handfast.explain.story import as_json as explanation_json
from handfast.explain.story import explain, measured
from handfast.explain.unseal import is_tls, parse_keylog, read_stream
from handfast.files import generate_key, read_file, write_private, write_public
from handfast.guard.places import join_address, parse_address
from handfast.pki.certificates import certificate_names
from handfast.pki.issuing import Order
from handfast.pki.keys import KeyType
from handfast.pki.names import parse_dns, parse_name
from handfast.pki.profiles import PROFILES
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.client import server_name_of
from handfast.tls.credential import Credential, load_bundle, load_credential
from handfast.tls.server import ServerContext, ServerSettings
from handfast.tls.transcript import Offer

_REQUEST = "GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: handfast-explain\r\nAccept: */*\r\nConnection: close\r\n\r\n"
_HELLO = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 27\r\nConnection: close\r\n\r\n"
    b"handfast let you in: hello\n"
)
_ISSUED_FOR = timedelta(hours=1)  # the server certificate that --listen gets from the authority
_RUNS = 3  # handshakes of each kind that are timed
_MOST_STREAMS = 1000  # of a file that are looked at for one that fails
_KEYLOG_LIMIT = 16 << 20  # bytes
_USUAL_WAIT = 10.0  # seconds
_HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_RECORDINGS = (".pcap", ".pcapng", ".cap", ".dmp", ".trace")
# Which of several connections is worth showing, the most so first.
_WORTH = (Result.FAILS, Result.UNKNOWN, Result.WORKS)
_path = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class _Output:
    """Where an explanation goes."""

    as_json: bool
    colour: str
    html: Path | None
    pcap: Path | None
    keylog: Path | None


@dataclass(frozen=True, slots=True)
class _Own:
    """What we show and whom we trust. Empty where nothing was given."""

    credential: Credential | None = None
    bundle: TrustBundle | None = None


@click.command(
    "explain",
    epilog=example(
        "handfast explain localhost:8443 --cert client.crt --key client.key --ca ca.crt",
        "handfast explain --listen 127.0.0.1:8443 --cert server.crt --key server.key --client-ca ca.crt",
        "handfast explain recording.pcap --keylog keys.log",
        "handfast explain --reason verify.expired",
    ),
)
@click.argument("place", metavar="[HOST:PORT|FILE]", required=False)
@click.option("--as", "as_name", metavar="NAME", help="Show the certificate of NAME, as `up` or `issue` wrote it.")
@click.option("--cert", type=_path, help="The certificate to show, with its chain.")
@click.option("--key", type=_path, help="Its private key.")
@click.option("--ca", type=_path, help="The authorities by which the server is judged.")
@click.option("--sni", help="The host name to ask for.  [default: HOST]")
@click.option("--tls1.2", "tls12", is_flag=True, help="Offer TLS 1.2 and nothing newer; with --listen: take it too.")
@click.option("--alpn", metavar="P,…", help="Application protocols to offer; none: none.  [default: http/1.1]")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 600),
    metavar="SECONDS",
    help="How long to wait; with --listen, also for a client.  [default: 10; for a client: until Ctrl-C]",
)
@click.option(
    "--listen",
    is_flag=False,
    flag_value="127.0.0.1:8443",
    metavar="[HOST:PORT]",
    help="Explain the next client that connects here.  [default: 127.0.0.1:8443]",
)
@click.option("--client-ca", type=_path, help="With --listen: the authorities by which the client is judged.")
@click.option("--reason", metavar="CODE", help="Say what one of our reason codes means; list: all of them.")
@click.option(
    "--color",
    "colour",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Whether to draw in colour; auto heeds NO_COLOR.",
)
@click.option("--html", type=_path, help="Write a page to look at in a browser.")
@click.option("--pcap", type=_path, help="Write the bytes for Wireshark; --keylog F goes with it.")
@click.option("--keylog", type=_path, help="Write the secrets that open --pcap; of a FILE: read them.")
@key_passphrase_option
@state_option
@as_json_option
def explain_(
    place: str | None,
    listen: str | None,
    reason: str | None,
    as_json: bool,
    colour: str,
    html: Path | None,
    pcap: Path | None,
    keylog: Path | None,
    **options: object,
) -> int:
    """Show a TLS handshake step by step, and say whose fault a failure is and what to do.

    Calls HOST:PORT as a client (after the handshake: one HTTP GET /, if HTTP was not ruled out with --alpn); or is the
    server of the next client (--listen); or reads a recording (FILE). Exit 0: it works; 3: it fails; 6: nobody there;
    2: it cannot be told, for want of a key log.
    """
    if sum(given is not None for given in (place, listen, reason)) != 1:
        raise click.UsageError("give one of HOST:PORT, FILE, --listen or --reason CODE")
    if reason is not None:
        return _reason(reason, as_json)
    output = _Output(as_json, colour, html, pcap, keylog)
    ask = _Ask(**{**options, "listen": listen or "", "place": place or ""})  # type: ignore[arg-type]  # click's names
    if listen is not None:
        found = _of_client(ask, as_json)
    elif (address := server_address(ask.place)) is not None:
        found = _of_server(ask, *address)
    else:
        return _finish(_of_file(ask, keylog), replace(output, keylog=None))
    return _finish(found, output)


@dataclass(frozen=True, slots=True)
class _Ask:
    """The options that say what is asked, as they were given."""

    place: str
    listen: str
    as_name: str | None
    cert: Path | None
    key: Path | None
    ca: Path | None
    sni: str | None
    tls12: bool
    alpn: str | None
    timeout: float | None
    client_ca: Path | None
    key_passphrase_file: Path | None
    state: Path | None

    @property
    def limits(self) -> Limits:
        """How long to wait: for the handshake as told, for a refusal a second."""
        whole = _USUAL_WAIT if self.timeout is None else self.timeout
        return Limits(whole, min(1.0, whole))

    @property
    def protocols(self) -> tuple[str, ...]:
        """The application protocols to offer."""
        if self.alpn is None:
            return ("http/1.1",)
        return () if self.alpn == "none" else tuple(word.strip() for word in self.alpn.split(",") if word.strip())


def _reason(code: str, as_json: bool) -> int:
    if code == "list":
        if as_json:
            print_json([meaning_of(one).as_json() for one in all_codes()])
        else:
            for one in all_codes():
                click.echo(f"{one:<32} {meaning_of(one).message}")
        return Exit.OK
    meaning = meaning_of(code)
    if as_json:
        print_json(meaning.as_json())
        return Exit.OK
    click.echo(f"{meaning.code}: {meaning.message}")
    for label, text in (("next", meaning.hint), ("advice", meaning.advice), ("who acts", str(meaning.who))):
        if text:
            click.echo(f"  {label + ':':<10}{text}")
    click.echo(f"  {'exit:':<10}{int(meaning.exit)}" + (f"; HTTP status {meaning.http}" if meaning.http else ""))
    return Exit.OK


# A server, called.


def _of_server(ask: _Ask, host: str, port: int) -> Explanation:
    own = _own(ask)
    name = ask.sni if ask.sni is not None else server_name_of(host) or ""
    offer = Offer(name, own.credential, ask.protocols, ask.tls12)
    request = _REQUEST.format(host=name or join_address(host, port)).encode() if "http/1.1" in ask.protocols else b""
    recording = call(host, port, offer, ask.limits, request)
    shown = () if own.credential is None else own.credential.chain
    known = Known(datetime.now(UTC), name or host, own=shown)
    if recording.done is None and not any(event.sender != recording.seen_from for event in recording.events):
        known = replace(known, small_works=_small_works(host, port, offer, ask.limits))
    found = explain(recording, known, own.bundle)
    if found.verdict.worked and own.credential is not None and found.added.messages:
        found = measured(found, *_times(host, port, offer, ask.limits))
    return found


def _small_works(host: str, port: int, offer: Offer, limits: Limits) -> bool:
    """Whether a ClientHello that fits one packet gets further than one that does not."""
    try:
        return call(host, port, replace(offer, small=True), limits).done is not None
    except Unreachable:
        return False


def _times(host: str, port: int, offer: Offer, limits: Limits) -> tuple[list[float], list[float]]:
    """Times of handshakes with our certificate and without, in turn, so that a drift touches both."""
    with_certificate, without = list[float](), list[float]()
    brief = Limits(limits.handshake, 0.0)
    for _ in range(_RUNS):
        for times, one in ((with_certificate, offer), (without, replace(offer, credential=None))):
            try:
                done = call(host, port, one, brief).done
            except Unreachable:
                return [], []
            if done is not None:
                times.append(done)
    return with_certificate, without


def _own(ask: _Ask) -> _Own:
    """The certificate to show and the bundle to judge by. Raises InvalidInput."""
    if (ask.cert is None) != (ask.key is None):
        raise click.UsageError("--cert and --key go together")
    bundle = None if ask.ca is None else load_bundle(ask.ca)
    opens = None if ask.key_passphrase_file is None else first_line(ask.key_passphrase_file)
    if ask.cert is not None and ask.key is not None:
        return _Own(load_credential(ask.cert, ask.key, opens), bundle)
    if ask.as_name is None:
        return _Own(None, bundle)
    files = client_files(ask.state, ask.as_name, here=True)
    if bundle is None and files.ca.exists():
        bundle = load_bundle(files.ca)
    return _Own(load_credential(files.cert, files.key, opens), bundle)


# A client, waited for.


def _of_client(ask: _Ask, as_json: bool) -> Explanation:
    host, port = parse_address(ask.listen)
    credential, terms = _served(ask, host)
    context = ServerContext(credential, terms, ServerSettings(allow_tls12=ask.tls12))
    with _bound(host, port) as listener:
        place = join_address(*listener.getsockname()[:2])
        if as_json:
            print_json({"event": "ready", "place": place})
        else:
            until = "until Ctrl-C" if ask.timeout is None else f"for {ask.timeout:g} s"
            click.echo(f"waiting for a client at {place}, {until}")
        sys.stdout.flush()
        listener.settimeout(ask.timeout)
        try:
            plug, _ = listener.accept()
        except TimeoutError:
            raise Unreachable(Reason.SEEN_NOBODY, place=place, limit=f"{ask.timeout:g}") from None
    recording = answer(plug, context, ask.limits, place, _HELLO)
    names = [name.value for name in certificate_names(credential.chain[0])]
    known = Known(datetime.now(UTC), names[0] if names else "", own=credential.chain)
    return explain(recording, known, terms.bundle)


def _served(ask: _Ask, host: str) -> tuple[Credential, Terms]:
    """What we show as a server, and what we ask of clients: from files, or from the authority in the state folder."""
    given = [one is not None for one in (ask.cert, ask.key, ask.client_ca)]
    if ask.cert is not None and ask.key is not None and ask.client_ca is not None:
        opens = None if ask.key_passphrase_file is None else first_line(ask.key_passphrase_file)
        return load_credential(ask.cert, ask.key, opens), Terms(load_bundle(ask.client_ca), Purpose.CLIENT)
    if any(given):
        raise click.UsageError("with --listen, --cert, --key and --client-ca go together")
    from handfast.cli.opening import opened  # with the ledger's library, which only this needs

    names = tuple(
        dict.fromkeys(parse_name(text) for text in ("127.0.0.1", "::1", host) if server_name_of(text) is None)
    )
    hosts = tuple(dict.fromkeys(parse_dns(text) for text in ("localhost", host) if server_name_of(text) is not None))
    with opened(ask.state) as authority:
        key = generate_key(KeyType.P256)
        order = Order(PROFILES["server"], hosts + names, key.public_key(), _ISSUED_FOR)
        issued = authority.issue(order, authority.authorize(order.names, order.profile))
        bundle = TrustBundle(authority.trust_bundle(), authority.trust_domain)
        terms = Terms(bundle, Purpose.CLIENT, revocations=authority.revocations(now=datetime.now(UTC)))
    return Credential(key, (issued.certificate, *issued.chain)), terms


def _bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        detail = (error.strerror or str(error)).lower()
        raise Unreachable(Reason.GUARD_LISTEN, address=join_address(host, port), detail=detail) from None


# A recording.


def _of_file(ask: _Ask, keylog: Path | None) -> Explanation:
    _refuse_host(ask.place)
    capture = read_capture(read_file(Path(ask.place), "recording", MAX_CAPTURE), ask.place)
    secrets = capture.keylog + (b"" if keylog is None else read_file(keylog, "key log", _KEYLOG_LIMIT))
    streams = [stream for stream in capture.streams if is_tls(stream)]
    if not streams:
        raise InvalidInput(Reason.INPUT_NO_HANDSHAKE, what=ask.place)
    bundle = None if ask.ca is None else load_bundle(ask.ca)
    keys = parse_keylog(secrets)
    looked = list[Explanation]()
    for stream in streams[:_MOST_STREAMS]:
        recording = read_stream(stream, keys)
        looked.append(explain(recording, Known(recording.began, ask.sni or ""), bundle))
        if looked[-1].verdict.result is Result.FAILS:
            break
    results = [_WORTH.index(one.verdict.result) for one in looked]
    number = results.index(min(results)) + 1
    chosen = looked[number - 1]
    if len(streams) > 1:
        which = {
            Result.FAILS: "the first of those that fail",
            Result.UNKNOWN: "the first of those that stay closed; none is seen to fail",
            Result.WORKS: "none of them fails",
        }[chosen.verdict.result]
        note(f"note: {ask.place} holds {len(streams)} TLS connections; this is number {number}, {which}")
    if chosen.verdict.result is not Result.UNKNOWN:
        return chosen
    if secrets:
        note(f"note: {keylog or ask.place} holds no secrets of this connection")
    command = f"handfast explain {shlex.quote(ask.place)} --keylog FILE"
    return replace(chosen, verdict=replace(chosen.verdict, command=command))


def _refuse_host(place: str) -> None:
    """What can only be meant for a server is no file that is missing. Raises InvalidInput (INPUT_ADDRESS)."""
    if os.path.exists(place):
        return
    if place.startswith("http://"):
        raise InvalidInput(Reason.INPUT_ADDRESS, value=place, detail="plain HTTP has no handshake; give HOST:PORT")
    if _HOST.fullmatch(place) and not place.lower().endswith(_RECORDINGS):
        detail = f"no file is called so; of a server, give HOST:PORT, as {place}:443"
        raise InvalidInput(Reason.INPUT_ADDRESS, value=place, detail=detail)


# The result.


def _finish(explanation: Explanation, output: _Output) -> int:
    if output.html is not None:
        write_public(output.html, render_page(explanation).encode())
    if output.pcap is not None:
        write_public(output.pcap, write_capture(explanation.recording))
    if output.keylog is not None:
        write_private(output.keylog, b"".join(line + b"\n" for line in explanation.recording.keylog) or b"\n")
        note(f"note: {output.keylog} opens the recording of this connection: keep it as secret as what was said in it")
    if output.as_json:
        print_json(explanation_json(explanation))
    else:
        click.echo(draw(explanation, colour=_colours(output.colour)), color=True)
    match explanation.verdict.result:
        case Result.WORKS:
            return Exit.OK
        case Result.UNKNOWN:
            return Exit.USAGE  # what was given does not tell
        case Result.FAILS:
            return Exit.REFUSED


def _colours(choice: str) -> bool:
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
