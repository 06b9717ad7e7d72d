"""The verb `export`: certificates in the forms that browsers, servers and people want; and PKCS#12 for `issue`."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from cryptography import x509

from handfast.cli.output import (
    as_json_option,
    asked,
    example,
    first_line,
    key_passphrase_option,
    print_json,
    state_option,
)
from handfast.cli.placing import check_places
from handfast.errors import InvalidInput, Reason
from handfast.files import read_file, write_private
from handfast.guard.places import Target, parse_address, parse_target
from handfast.pki.certificates import encode_chain, label, parse_certificates
from handfast.pki.keys import PrivateKey, check_passphrase
from handfast.pki.pkcs12 import encode_p12
from handfast.tls.credential import load_credential

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
        click.option("--p12-password-file", type=click.Path(path_type=Path), help="Read its password from this file."),
        click.option("--p12", "p12_path", type=click.Path(path_type=Path), help="Write a PKCS#12 file, for browsers."),
    ):
        with_p12 = option(with_p12)
    return with_p12  # type: ignore[return-value]  # click replaces it by a command anyway


def p12_password(options: P12Options) -> bytes:
    """The password of a PKCS#12 file: read, asked for or generated. Raises InvalidInput and UsageError."""
    if options.path is None and (options.password_file or options.ask or options.legacy):
        raise click.UsageError("options of the PKCS#12 file are given, but no --p12 F to write one")
    if options.password_file is not None and options.ask:
        raise click.UsageError("give one of --p12-password-file F and --ask-p12-password")
    if options.password_file is not None:
        return check_passphrase(first_line(options.password_file))
    if options.ask:
        return check_passphrase(asked("Password of the PKCS#12 file", confirm=True))
    return secrets.token_urlsafe(15).encode()


def p12_files(options: P12Options) -> list[Path]:
    """The files that will be written: none, the PKCS#12 file, or that and the one with its generated password."""
    if options.path is None:
        return []
    return [options.path] if options.password_file or options.ask else [options.path, _password_beside(options.path)]


def save_p12(
    options: P12Options, password: bytes, name: str, key: PrivateKey, chain: Sequence[x509.Certificate]
) -> dict[str, str]:
    """Write a PKCS#12 file (0600); return where it is and, if it was generated, where its password is."""
    assert options.path is not None
    made = {"p12": str(options.path)}
    for beside in p12_files(options)[1:]:
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
)
@click.option("--cert", type=click.Path(path_type=Path), help="The certificate and its chain.")
@click.option("--key", type=click.Path(path_type=Path), help="Its private key.")
@click.option("--pem", is_flag=True, help="Print the certificates as PEM; without --cert, the trust bundle.")
@click.option("--nginx", is_flag=True, help="Print an nginx server block that asks for client certificates.")
@click.option("--to", default="127.0.0.1:8000", show_default=True, metavar="TARGET", help="The app, for --nginx.")
@click.option(
    "--listen", default="8443", show_default=True, metavar="[HOST:]PORT", help="Where nginx listens, for --nginx."
)
@p12_options
@key_passphrase_option
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
    key_passphrase_file: Path | None,
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
    opens = None if key_passphrase_file is None else first_line(key_passphrase_file)
    credential = load_credential(cert, key, opens)
    if nginx:
        text = nginx_block(cert, key, _root_file(state), parse_target(to), listen)
        print_json({"nginx": text}) if as_json else click.echo(text, nl=False)
        return
    password = p12_password(p12)
    check_places(p12_files(p12), force=False)
    made = save_p12(p12, password, label(credential.chain[0]), credential.key, credential.chain)
    if as_json:
        print_json(made)
    else:
        for what, path in made.items():
            click.echo(f"{what.replace('_', ' '):<18} {path}")


def nginx_block(cert: Path, key: Path, client_ca: Path, to: Target, listen: str) -> str:
    """An nginx server block for mutual TLS, with what nginx leaves open by default closed.

    Sessions are not resumed: nginx would skip revocation and expiry (CVE-2025-23419 shows how that goes wrong).
    Raises InvalidInput (INPUT_TARGET) for a target that is not HTTP, and (INPUT_ADDRESS).
    """
    parse_address(listen)
    if not to.http:
        raise InvalidInput(Reason.INPUT_TARGET, value=str(to), detail="an nginx server block forwards HTTP alone")
    app = _quoted(f"http://unix:{to.path}:" if to.path else f"http://{to}")
    return f"""\
server {{
    listen {listen} ssl;
    ssl_certificate         {_nginx_word(cert)};
    ssl_certificate_key     {_nginx_word(key)};
    ssl_client_certificate  {_nginx_word(client_ca)};
    ssl_verify_client       on;
    ssl_verify_depth        2;
    ssl_protocols           TLSv1.3;
    ssl_session_tickets     off;
    ssl_session_cache       off;

    location / {{
        proxy_pass {app};
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


def _nginx_word(path: Path) -> str:
    return _quoted(str(path.absolute()))


def _quoted(text: str) -> str:
    """One word of nginx's configuration, which ends words at blanks and semicolons."""
    if "$" in text or not text.isprintable():
        raise click.UsageError(f"nginx takes no {text!r}: a $ begins a variable there, and control characters are lost")
    plain = re.fullmatch(r"[\w@%+=:,./~\[\]-]+", text)
    return text if plain else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _password_beside(p12: Path) -> Path:
    return p12.with_name(p12.name + ".password")


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
