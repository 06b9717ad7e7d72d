"""The verbs about certificates: issue, sign, list, show, revoke."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from handfast.authority import Authority, Issued, Record, RevocationReason
from handfast.cli.clients import ClientFiles
from handfast.cli.export import P12Options, p12_files, p12_options, p12_password, save_p12
from handfast.cli.opening import folder_of, opened
from handfast.cli.output import as_json_option, choice, example, passphrase_option, print_json, state_option
from handfast.cli.placing import check_places, make_folder, place_bundle, place_pair
from handfast.files import generate_key, read_file, write_public
from handfast.pki.certificates import encode_chain, serial_text
from handfast.pki.issuing import Order, authorize_names
from handfast.pki.keys import KeyType, encode_private_key
from handfast.pki.names import Kind, Name, parse_name
from handfast.pki.profiles import PROFILES, Profile, parse_lifetime
from handfast.pki.requests import parse_csr

_LONGEST_BASE = 200  # characters; file systems take names of 255 bytes, of which endings need some
LEAVES = [name for name, profile in PROFILES.items() if not profile.ca]
profile_option = click.option(
    "--profile", type=click.Choice(LEAVES), help="What it is for.  [default: server for a host, else client]"
)
lifetime_option = click.option(
    "--for", "lifetime", metavar="TIME", help="How long it is good.  [default: 24h; at most 7d]"
)


@click.command(
    "issue",
    epilog=example("handfast issue web", "handfast issue api.internal 10.0.0.7 --profile server --for 7d"),
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@profile_option
@lifetime_option
@click.option(
    "--key-type",
    type=choice(KeyType),
    default=KeyType.P256.value,
    show_default=True,
    metavar="TYPE",
    help=f"What key to make: {', '.join(KeyType)}.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Where to write.  [default: here]")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@p12_options
@passphrase_option
@state_option
@as_json_option
def issue_(
    names: tuple[str, ...],
    profile: str | None,
    lifetime: str | None,
    key_type: str,
    out: Path,
    force: bool,
    p12: P12Options,
    passphrase_file: Path | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Make a key and a certificate for NAME (one certificate; further names are further names of the same).

    A bare NAME is spiffe://<trust domain>/NAME; a host or address is a server's. Writes NAME.crt (with its
    chain), NAME.key (mode 0600) and ca.crt.
    """
    span = None if lifetime is None else parse_lifetime(lifetime)
    password = p12_password(p12)
    with opened(state, passphrase_file) as authority:
        wanted = tuple(parse_name(name, authority.trust_domain) for name in names)
        kind = PROFILES[profile or guess_profile(wanted)]
        base = file_base(wanted[0])
        cert, key_path, ca = out / f"{base}.crt", out / f"{base}.key", out / "ca.crt"
        make_folder(out)
        check_places([cert, key_path, *p12_files(p12)], force=force)
        if cert.name == ca.name:
            raise click.UsageError(f"the certificate would be called {ca}, as the trust bundle is; choose another NAME")
        place_bundle(ca, encode_chain(authority.trust_bundle()), force=force)
        key = generate_key(KeyType(key_type))
        issued = _issue(authority, Order(kind, wanted, key.public_key(), span))
        place_pair(key_path, encode_private_key(key), cert, issued.pem)
    result = _issued(issued, wanted, kind) | {"cert": str(cert), "key": str(key_path), "ca": str(ca)}
    if p12.path is not None:
        result |= save_p12(p12, password, base, key, (issued.certificate, *issued.chain))
    _print(result, as_json)


@click.command(
    "sign",
    epilog=example("handfast sign web.csr --name web --out web.crt"),
)
@click.argument("csr", type=click.Path(path_type=Path))
@click.option("--name", "names", multiple=True, required=True, help="A name it may have. Repeat for more.")
@profile_option
@lifetime_option
@click.option("--out", type=click.Path(path_type=Path), help="Where to write.  [default: CSR with .crt]")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@passphrase_option
@state_option
@as_json_option
def sign_(
    csr: Path,
    names: tuple[str, ...],
    profile: str | None,
    lifetime: str | None,
    out: Path | None,
    force: bool,
    passphrase_file: Path | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Sign the public key of a request (PEM or DER). Its names must be among those given with --name, which are
    the names of the certificate; nothing else is taken from it.
    """
    span = None if lifetime is None else parse_lifetime(lifetime)
    request = parse_csr(read_file(csr, "request"), str(csr))
    target = csr.with_suffix(".crt") if out is None else out
    check_places([target], force=force)
    with opened(state, passphrase_file) as authority:
        wanted = tuple(parse_name(name, authority.trust_domain) for name in names)
        authorize_names(request.names, wanted)
        kind = PROFILES[profile or guess_profile(wanted)]
        issued = _issue(authority, Order(kind, wanted, request.public_key, span))
        write_public(target, issued.pem)
    _print(_issued(issued, wanted, kind) | {"cert": str(target)}, as_json)


@click.command("list", epilog=example("handfast list --expiring 24h"))
@click.option("--expiring", metavar="TIME", help="Only those that end within this time.")
@click.option("--all", "ended", is_flag=True, help="Also those that have ended.")
@state_option
@as_json_option
def list_(expiring: str | None, ended: bool, state: Path | None, as_json: bool) -> None:
    """List the certificates that were issued, those that end first first. With --json: one object a line."""
    within = None if expiring is None else parse_lifetime(expiring)
    now = datetime.now(UTC)
    with opened(state) as authority:
        for record in authority.certificates(expiring=within, ended=ended):
            if as_json:
                print_json(_record(record, now))
            else:
                row = _record(record, now)
                until = f"{record.not_after:%Y-%m-%d %H:%M}"
                click.echo(
                    f"{row['status']:<8} {until}  {row['profile']:<7} {', '.join(record.names)}  {row['serial']}"
                )


@click.command("show", epilog=example("handfast show web"))
@click.argument("serial_or_name", metavar="SERIAL|NAME")
@state_option
@as_json_option
def show_(serial_or_name: str, state: Path | None, as_json: bool) -> None:
    """Show what is known of a SERIAL (its first 4 hex digits or more), or of each certificate of a NAME."""
    now = datetime.now(UTC)
    with opened(state) as authority:
        found = [_record(record, now) for record in authority.find(serial_or_name)]
    if as_json:
        print_json(found)
        return
    for row in found:
        for key, value in row.items():
            if value is not None:
                click.echo(f"{key:<12} {', '.join(value) if isinstance(value, tuple) else value}")
        click.echo()


@click.command("revoke", epilog=example("handfast revoke web --reason key_compromise"))
@click.argument("serial_or_name", metavar="SERIAL|NAME")
@click.option(
    "--reason",
    type=choice(RevocationReason),
    default=RevocationReason.UNSPECIFIED.value,
    metavar="REASON",
    help=f"Why: {', '.join(RevocationReason)}.",
)
@state_option
@as_json_option
def revoke_(serial_or_name: str, reason: str, state: Path | None, as_json: bool) -> None:
    """Revoke one SERIAL, or every certificate in use of a NAME. A running `up` ends its connections within 2 s, and
    makes no new one for it.
    """
    with opened(state) as authority:
        revoked = authority.revoke(serial_or_name, RevocationReason(reason))
    rows = [
        {"serial": serial_text(one.serial), "names": one.names, "revoked_at": one.revoked_at.isoformat()}
        for one in revoked
    ]
    if as_json:
        print_json(rows)
        return
    for one in revoked:
        click.echo(f"revoked {', '.join(one.names) or 'a certificate'} (serial {serial_text(one.serial)})")
    for names in dict.fromkeys(one.names for one in revoked if one.names):
        command, name = f"handfast issue {shlex.join(names)}", parse_name(names[0])
        clients = folder_of(state) / "clients"
        if ClientFiles(name, clients / file_base(name)).cert.exists():  # the next one belongs in its place
            command = f"{issue_command(names, clients, state)} --force"
        click.echo(f"  next: to give it another one, on purpose: {command}")


def guess_profile(names: tuple[Name, ...]) -> str:
    """What names look like: a host or an address is a server's, anything else a client's."""
    hosts = [name.kind in (Kind.DNS, Kind.IP) for name in names]
    if all(hosts):
        return "server"
    return "peer" if any(hosts) and names[0].kind is Kind.SPIFFE else "client"


def file_base(name: Name) -> str:
    """What files of a name are called: its last part, in characters that no file system minds."""
    last = name.value.rstrip("/").rpartition("/")[2] or name.trust_domain
    clean = "".join(letter if letter.isalnum() or letter in ".-_@" else "_" for letter in last)
    return clean.lstrip(".")[:_LONGEST_BASE] or "leaf"


def issue_command(names: Sequence[str], clients: Path, state: Path | None = None) -> str:
    """The command that would put a client's files into the folder where its certificate is looked for."""
    command = f"handfast issue {shlex.join(names)} --out {shlex.quote(str(clients))}"
    return command if state is None else f"{command} --state {shlex.quote(str(state))}"


def _issue(authority: Authority, order: Order) -> Issued:
    return authority.issue(order, authority.authorize(order.names, order.profile))


def _issued(issued: Issued, names: tuple[Name, ...], profile: Profile) -> dict[str, Any]:
    return {
        "names": [str(name) for name in names],
        "profile": profile.name,
        "serial": issued.serial,
        "not_after": issued.certificate.not_valid_after_utc.isoformat(),
    }


def _record(record: Record, now: datetime) -> dict[str, Any]:
    status = "revoked" if record.revoked_at else "ended" if now >= record.not_after else "good"
    return {
        "serial": serial_text(record.serial),
        "names": record.names,
        "profile": record.profile,
        "status": status,
        "not_before": record.not_before.isoformat(),
        "not_after": record.not_after.isoformat(),
        "sha256": record.sha256,
        "revoked_at": record.revoked_at.isoformat() if record.revoked_at else None,
        "reason": record.reason,
    }


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    until = datetime.fromisoformat(result["not_after"])
    click.echo(f"{result['profile']} certificate for {', '.join(result['names'])}, until {until:%Y-%m-%d %H:%M} UTC")
    for key, value in result.items():
        if key not in ("names", "profile", "not_after"):
            click.echo(f"  {key.replace('_', ' '):<13} {value}")
