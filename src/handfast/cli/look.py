"""Verbs that look and change nothing: inspect, verify, version."""

from __future__ import annotations

import os
import platform
import re
import shlex
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

import click

import handfast
from handfast.cli.output import as_json_option, choice, example, note, print_json
from handfast.errors import InvalidInput, Reason, Unreachable
from handfast.files import read_file
from handfast.guard.places import join_address, parse_address
from handfast.pki.certificates import encode_chain, label, parse_certificates
from handfast.pki.inspect import describe, render
from handfast.pki.names import parse_name
from handfast.pki.revocation import check_crls, parse_crls
from handfast.pki.verification import Purpose, Terms, verify
from handfast.tls.channel import TlsBroken
from handfast.tls.client import ClientHandshake, ServerFacts, server_name_of
from handfast.tls.credential import load_bundle
from handfast.tls.engine import engine_version
from handfast.tls.judge import judge_offline

_CONNECT_LIMIT = 10.0  # seconds for a server that is looked at
_CRL_LIMIT = 64 << 20  # bytes: a list of a million revocations


@click.command(
    "inspect",
    epilog=example("handfast inspect client.crt", "handfast inspect 127.0.0.1:8443"),
)
@click.argument("place", metavar="FILE|HOST:PORT")
@click.option("--password-file", type=click.Path(path_type=Path), help="The password of a PKCS#12 file or a key.")
@as_json_option
def inspect_(place: str, password_file: Path | None, as_json: bool) -> None:
    """Show what is in FILE (certificate, key, request, revocation list or PKCS#12; PEM or DER), or what the
    server at HOST:PORT shows of itself and asks of its clients.
    """
    address = server_address(place)
    if address is not None:
        facts = look_at_server(*address)
        found = describe(encode_chain(facts.chain), place) if facts.chain else []
        server: dict[str, object] = {
            "type": "server",
            "version": facts.version,
            "cipher": facts.cipher,
            "group": facts.group,
            "accepted_authorities": list(facts.accepted_authorities),
        }
        if facts.unread:
            server["warnings"] = [f"{facts.unread} of the certificates that it shows cannot be read"]
        found.insert(0, server)
    else:
        password = None if password_file is None else read_file(password_file, "password file").strip(b"\r\n")
        found = describe(read_file(Path(place), "file", _CRL_LIMIT), place, password)
    if as_json:
        print_json(found)
        return
    click.echo(render(found))
    if address is None and password_file is None and any(one.get("encrypted") for one in found):
        note(f"next: {_opened(Path(place))}")


def _opened(path: Path) -> str:
    """The command that shows what is in an encrypted file; `export` and `issue` write its password beside it."""
    beside = Path(f"{path}.password")
    password = shlex.quote(str(beside)) if beside.exists() else "F"
    return f"handfast inspect {shlex.quote(str(path))} --password-file {password}"


@click.command(
    "verify",
    epilog=example("handfast verify client.crt --bundle ca.crt --purpose client"),
)
@click.argument("leaf", type=click.Path(path_type=Path))
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="The authorities that are trusted.")
@click.option("--chain", type=click.Path(path_type=Path), help="Certificates between the leaf and the bundle.")
@click.option(
    "--purpose", type=choice(Purpose), default=Purpose.CLIENT.value, show_default=True, help="What it is used as."
)
@click.option("--name", help="Whom it must be for: a host, or spiffe://domain/name.")
@click.option("--at", "at", help="Judge as of this time instead of now.")
@click.option("--crl", type=click.Path(path_type=Path), help="Revocation lists of the issuers.")
@click.option("--legacy-certs", is_flag=True, help="Admit certificates without extended key usage or names.")
@as_json_option
def verify_(
    leaf: Path,
    bundle: Path,
    chain: Path | None,
    purpose: str,
    name: str | None,
    at: str | None,
    crl: Path | None,
    legacy_certs: bool,
    as_json: bool,
) -> None:
    """Judge the certificate LEAF as a guard or a client would. Exit 0: it proves what it claims; 3: it does not."""
    presented = parse_certificates(read_file(leaf, "certificate file"), str(leaf))
    if chain is not None:
        presented += parse_certificates(read_file(chain, "certificate file"), str(chain))
    trusted = load_bundle(bundle)
    now = datetime.now(UTC) if at is None else parse_time(at)
    crls = None
    if crl is not None:
        crls = check_crls(
            parse_crls(read_file(crl, "revocation list", _CRL_LIMIT), str(crl)), trusted.anchors + presented
        )
    expected = None if name is None else parse_name(name)
    terms = Terms(trusted, Purpose(purpose), expected, crls=crls, legacy=legacy_certs)
    peer = verify(presented, terms, now, judge_offline(presented, trusted, now))
    path = [label(certificate) for certificate in peer.path]
    result = {
        "identity": str(peer.identity),
        "authority": peer.identity.authority,
        "path": path,
        "not_after": peer.not_after.isoformat(),
    }
    if as_json:
        print_json(result)
    else:
        click.echo(f"good for {purpose} use: {peer.identity}")
        click.echo(f"  path:    {' <- '.join(path)}")
        click.echo(f"  expires: {peer.not_after:%Y-%m-%d %H:%M:%S} UTC")


@click.command("version", epilog=example("handfast version --json"))
@as_json_option
def version_(as_json: bool) -> None:
    """Show the version of handfast, of Python, and of the TLS engine that guards run on."""
    if as_json:
        print_json(
            {"handfast": handfast.__version__, "python": platform.python_version(), "tls_engine": engine_version()}
        )
    else:
        click.echo(f"handfast {handfast.__version__} (Python {platform.python_version()}, {engine_version()})")


def parse_time(text: str) -> datetime:
    """Parse a date or an instant (ISO 8601; UTC where no zone is said). Raises InvalidInput (INPUT_TIME)."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):  # the second: in UTC it is before the year 1, or after 9999
        raise InvalidInput(Reason.INPUT_TIME, value=text) from None


def look_at_server(host: str, port: int) -> ServerFacts:
    """Shake hands with a server and return what it showed. Nothing is verified. Raises Unreachable."""
    target = join_address(host, port)
    deadline = time.monotonic() + _CONNECT_LIMIT
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_LIMIT) as connection:
            handshake = ClientHandshake(server_name_of(host))
            records = b""
            while handshake.feed(records) is None:
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                connection.sendall(handshake.take())
                records = connection.recv(1 << 16)
                if not records:
                    raise Unreachable(Reason.UNREACHABLE, target=target, detail="it closed during the handshake")
            return handshake.facts
    except TlsBroken as broken:
        raise Unreachable(Reason.UNREACHABLE, target=target, detail=broken.failure.message) from None
    except UnicodeError:  # of a host that no resolver can be asked for
        raise Unreachable(Reason.UNREACHABLE_NAME, target=target, host=host, detail="it is not a name") from None
    except socket.gaierror as error:
        detail = (error.strerror or str(error)).lower()
        raise Unreachable(Reason.UNREACHABLE_NAME, target=target, host=host, detail=detail) from None
    except OSError as error:
        raise Unreachable(Reason.UNREACHABLE, target=target, detail=(error.strerror or str(error)).lower()) from None


def server_address(place: str) -> tuple[str, int] | None:
    """Parse HOST:PORT, also as a URL, whose port may be left out; None for the path of a file.

    Raises InvalidInput (INPUT_ADDRESS).
    """
    if place.startswith("https://"):
        host = place.removeprefix("https://").partition("/")[0]
        return parse_address(host if re.search(r":[0-9]*$", host) else f"{host}:443")
    if os.path.exists(place) or not re.fullmatch(r"[^/]*:[0-9]+", place):
        return None
    return parse_address(place)
