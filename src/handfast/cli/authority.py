"""The verb `authority`: make one, take one over, show the one there is."""

from __future__ import annotations

from pathlib import Path

import click

from handfast.authority import Authority, Existing, GeneratedPassphrase, Passphrase, Plan, create_authority
from handfast.authority import import_authority as take_over
from handfast.cli.opening import TRUST_DOMAIN, folder_of, new_passphrase, opened
from handfast.cli.output import (
    as_json_option,
    choice,
    example,
    first_line,
    key_passphrase_option,
    passphrase_option,
    print_json,
    state_option,
)
from handfast.pki.certificates import fingerprint, label
from handfast.pki.keys import KeyType
from handfast.pki.names import parse_dns, parse_spiffe_id
from handfast.pki.profiles import PROFILES, parse_lifetime

ask_option = click.option("--ask-passphrase", is_flag=True, help="Ask for the passphrase of the new keys.")
trust_domain_option = click.option(
    "--trust-domain", default=TRUST_DOMAIN, show_default=True, help="The domain of the identities it vouches for."
)


@click.group(
    "authority",
    epilog=example("handfast authority init --trust-domain corp.internal"),
)
def authority_() -> None:
    """Make, import or show the authority: the root that others trust, and the issuer that signs leaves."""


@authority_.command(
    "init", epilog=example("handfast authority init --trust-domain corp.internal"), short_help="Make a new one."
)
@trust_domain_option
@click.option(
    "--root-key",
    type=choice(PROFILES["root"].key_types),
    default=KeyType.P384.value,
    show_default=True,
    metavar="TYPE",
    help=f"The root's key: {', '.join(PROFILES['root'].key_types)}.",
)
@click.option(
    "--issuer-key",
    type=choice(PROFILES["issuer"].key_types),
    default=KeyType.P256.value,
    show_default=True,
    metavar="TYPE",
    help="The issuer's key, one of the same.",
)
@click.option(
    "--constrain",
    multiple=True,
    metavar="HOST",
    help="Let it vouch for this DNS domain and its own trust domain alone.",
)
@ask_option
@passphrase_option
@state_option
@as_json_option
def init(
    trust_domain: str,
    root_key: str,
    issuer_key: str,
    constrain: tuple[str, ...],
    ask_passphrase: bool,
    passphrase_file: Path | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Make a root and an issuer in one go. Their keys are encrypted; without a passphrase of yours, one is
    generated and kept beside them in a file that only you may read.
    """
    folder = folder_of(state)
    passphrase = new_passphrase(passphrase_file, ask_passphrase)
    permitted = tuple(parse_dns(host) for host in constrain)
    if permitted:
        permitted += (parse_spiffe_id(f"spiffe://{trust_domain}"),)
    plan = Plan(trust_domain, KeyType(root_key), KeyType(issuer_key), permitted)
    with create_authority(folder, plan, passphrase) as authority:
        _show(authority, folder, as_json, passphrase)


@authority_.command(
    "import",
    epilog=example("handfast authority import --cert ca.crt --key ca.key"),
    short_help="Take over one that you have.",
)
@click.option("--cert", required=True, type=click.Path(path_type=Path), help="The authority's certificate.")
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Its private key.")
@click.option("--chain", type=click.Path(path_type=Path), help="The certificates above it, up to the root.")
@key_passphrase_option
@trust_domain_option
@ask_option
@passphrase_option
@state_option
@as_json_option
def import_(
    cert: Path,
    key: Path,
    chain: Path | None,
    key_passphrase_file: Path | None,
    trust_domain: str,
    ask_passphrase: bool,
    passphrase_file: Path | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Take over an authority that you have, as made by openssl. A self-signed one signs leaves itself."""
    folder = folder_of(state)
    opens = None if key_passphrase_file is None else first_line(key_passphrase_file)
    passphrase = new_passphrase(passphrase_file, ask_passphrase)
    with take_over(folder, Existing(cert, key, chain, opens), trust_domain, passphrase) as authority:
        _show(authority, folder, as_json, passphrase)


@authority_.command("show", epilog=example("handfast authority show --json"), short_help="Show the one there is.")
@state_option
@as_json_option
def show(state: Path | None, as_json: bool) -> None:
    """Show the authority: its trust domain, its certificates, and until when they are good."""
    with opened(state) as authority:
        _show(authority, folder_of(state), as_json)


@authority_.command("set", epilog=example("handfast authority set --max-lifetime 30d"))
@click.option("--max-lifetime", required=True, metavar="TIME", help="The longest life of a certificate it issues.")
@state_option
@as_json_option
def set_(max_lifetime: str, state: Path | None, as_json: bool) -> None:
    """Change how long the certificates may live that it issues from now on. Without this it is 7 days: what is
    short-lived needs revoking less. Nothing outlives the issuer.
    """
    lifetime = parse_lifetime(max_lifetime)
    with opened(state) as authority:
        authority.allow_lifetime(lifetime)
        _show(authority, folder_of(state), as_json)


def _show(authority: Authority, folder: Path, as_json: bool, made_with: Passphrase | None = None) -> None:
    root, issuer = authority.trust_bundle()[-1], authority.issuer
    ceiling = authority.max_leaf_lifetime or PROFILES["client"].max_lifetime
    if as_json:
        print_json(
            {
                "trust_domain": authority.trust_domain,
                "state": str(folder),
                "ca": str(folder / "root.crt"),
                "root": {
                    "name": label(root),
                    "sha256": fingerprint(root),
                    "not_after": root.not_valid_after_utc.isoformat(),
                },
                "issuer": {"name": label(issuer), "not_after": issuer.not_valid_after_utc.isoformat()},
                "max_leaf_seconds": int(ceiling.total_seconds()),
            }
        )
        return
    click.echo(f"authority of {authority.trust_domain}, in {folder}")
    click.echo(f"  root:    {label(root)}, until {root.not_valid_after_utc:%Y-%m-%d}")
    click.echo(f"           sha256 {fingerprint(root)}")
    click.echo(f"  issuer:  {label(issuer)}, until {issuer.not_valid_after_utc:%Y-%m-%d}")
    click.echo(f"  leaves:  live {ceiling.total_seconds() / 86400:g} days at most")
    click.echo(f"  trust:   {folder / 'root.crt'} is what the other side needs")
    if isinstance(made_with, GeneratedPassphrase):
        click.echo(
            f"  keys:    encrypted under a generated passphrase in {folder / 'passphrase'}, readable by you alone;"
        )
        click.echo(
            "           whoever reads this folder has the keys. To hold the passphrase yourself: --ask-passphrase"
        )
    elif made_with is not None:
        click.echo("  keys:    encrypted under your passphrase")
