"""The verb `export`: certificates in the forms that browsers, servers and people want; and PKCS#12 for `issue`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from cryptography import x509

from handfast.cli.output import as_json_option, example, print_json, state_option
from handfast.errors import InvalidInput, Reason, StoreError
from handfast.files import load_key, read_file, write_private
from handfast.pki.certificates import encode_chain, label, parse_certificates
from handfast.pki.keys import PrivateKey, same_key
from handfast.pki.pkcs12 import encode_p12

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class P12Options:
    """Where a PKCS#12 file goes, and what its password is: from a file, asked for, or generated."""

    path: Path | None
    password_file: Path | None
    ask: bool
    legacy: bool


def p12_options(function: F) -> F:
    """Add the options of a PKCS#12 file to a verb, which gets them as one `p12`."""

    def with_p12(**values: Any) -> Any:
        names = ("p12_path", "p12_password_file", "ask_p12_password", "legacy_p12")
        return function(p12=P12Options(*(values.pop(name) for name in names)), **values)

    with_p12.__doc__ = function.__doc__
    with_p12.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]  # click's own way
    for option in (
        click.option("--legacy-p12", is_flag=True, help="3DES and SHA-1, for importers of before 2020."),
        click.option("--ask-p12-password", is_flag=True, help="Ask for the password of the PKCS#12 file."),
        click.option("--p12-password-file", type=click.Path(path_type=Path), help="Read it from this file."),
        click.option("--p12", "p12_path", type=click.Path(path_type=Path), help="Write a PKCS#12 file, for browsers."),
    ):
        with_p12 = option(with_p12)
    return with_p12  # type: ignore[return-value]  # click replaces it by a command anyway


def save_p12(options: P12Options, name: str, key: PrivateKey, chain: Sequence[x509.Certificate]) -> dict[str, str]:
    """Write a PKCS#12 file (0600); return where it is and, if it was generated, where its password is."""
    assert options.path is not None
    made = {"p12": str(options.path)}
    if options.password_file is not None:
        password = read_file(options.password_file, "password file").partition(b"\n")[0].rstrip(b"\r")
    elif options.ask:
        if not sys.stdin.isatty():
            raise InvalidInput(Reason.INPUT_NO_PASSPHRASE)
        answer: str = click.prompt("Password of the PKCS#12 file", hide_input=True, confirmation_prompt=True, err=True)
        password = answer.encode()
    else:
        password = secrets.token_urlsafe(15).encode()
        beside = options.path.with_name(options.path.name + ".password")
        write_private(beside, password + b"\n")
        made["p12_password_file"] = str(beside)
    write_private(options.path, encode_p12(name, key, chain, password, options.legacy))
    return made


@click.command(
    "export",
    epilog=example(
        "handfast export --cert web.crt --key web.key --p12 web.p12",
        "handfast export --nginx --cert api.crt --key api.key --to 127.0.0.1:8000",
    ),
    short_help="Write certificates in other forms: PKCS#12, PEM, an nginx block.",
)
@click.option("--cert", type=click.Path(path_type=Path), help="The certificate and its chain.")
@click.option("--key", type=click.Path(path_type=Path), help="Its private key.")
@click.option("--pem", is_flag=True, help="Print the certificates as PEM; without --cert, the trust bundle.")
@click.option("--nginx", is_flag=True, help="Print an nginx server block that asks for client certificates.")
@click.option("--to", default="127.0.0.1:8000", show_default=True, help="The app, for --nginx.")
@click.option("--listen", default="8443", show_default=True, help="Where nginx listens, for --nginx.")
@p12_options
@state_option
@as_json_option
def export_(
    cert: Path | None,
    key: Path | None,
    pem: bool,
    nginx: bool,
    to: str,
    listen: str,
    p12: P12Options,
    state: Path | None,
    as_json: bool,
) -> None:
    """Write what you have in another form. Exactly one of --p12, --pem and --nginx."""
    if (p12.path is not None) + pem + nginx != 1:
        raise click.UsageError("give one of --p12 F, --pem and --nginx")
    if pem:
        text = encode_chain(_bundle(state) if cert is None else _chain(cert)).decode()
        print_json({"pem": text}) if as_json else click.echo(text, nl=False)
        return
    if cert is None or key is None:
        raise click.UsageError("give --cert F and --key F")
    chain, private = _chain(cert), load_key(key)
    if not same_key(private.public_key(), chain[0].public_key()):  # type: ignore[arg-type]  # other kinds are unequal
        raise InvalidInput(Reason.INPUT_KEY_MISMATCH, key=str(key), cert=str(cert))
    if nginx:
        text = nginx_block(cert, key, _root_file(state), to, listen)
        print_json({"nginx": text}) if as_json else click.echo(text, nl=False)
        return
    assert p12.path is not None
    if p12.path.exists():
        raise StoreError(Reason.STORE_EXISTS, path=str(p12.path))
    made = save_p12(p12, label(chain[0]), private, chain)
    if as_json:
        print_json(made)
    else:
        for what, path in made.items():
            click.echo(f"{what.replace('_', ' '):<18} {path}")


def nginx_block(cert: Path, key: Path, client_ca: Path, to: str, listen: str) -> str:
    """An nginx server block for mutual TLS, with what nginx leaves open by default closed.

    Sessions are not resumed: nginx would skip revocation and expiry (CVE-2025-23419 shows how that goes wrong).
    """
    return f"""\
server {{
    listen {listen} ssl;
    ssl_certificate         {cert.absolute()};
    ssl_certificate_key     {key.absolute()};
    ssl_client_certificate  {client_ca.absolute()};
    ssl_verify_client       on;
    ssl_verify_depth        2;
    ssl_protocols           TLSv1.3;
    ssl_session_tickets     off;
    ssl_session_cache       off;

    location / {{
        proxy_pass http://{to};
        proxy_set_header Host $host;
        proxy_set_header Connection "";
        proxy_http_version 1.1;
        # Who the client is. The app must take these from nginx alone.
        proxy_set_header X-SSL-Client-Verify $ssl_client_verify;
        proxy_set_header X-SSL-Client-Cert $ssl_client_escaped_cert;
        proxy_set_header Client-Cert "";
        proxy_set_header Client-Identity "";
    }}
}}
"""


def _chain(cert: Path) -> tuple[x509.Certificate, ...]:
    return parse_certificates(read_file(cert, "certificate file"), str(cert))


def _bundle(state: Path | None) -> tuple[x509.Certificate, ...]:
    from handfast.cli.opening import opened

    with opened(state) as authority:
        return authority.trust_bundle()


def _root_file(state: Path | None) -> Path:
    from handfast.cli.opening import folder_of, opened

    opened(state).close()
    return folder_of(state) / "root.crt"
