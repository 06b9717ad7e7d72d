"""The verb `audit`: attack a mutual-TLS endpoint, and report."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
from click.core import ParameterSource
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.audit.catalogue import choose
from handfast.audit.middle import CLIENTS
from handfast.audit.model import Check, Finding, Outcome, Report
from handfast.audit.report import as_json as report_json
from handfast.audit.report import render_html, render_junit, render_sarif, render_text
from handfast.audit.runner import GENTLE, Client, Means, Pace, Progress, Target, prepare, run
from handfast.cli.auditing_insider import insider_options, own_revoker, parse_endpoint, parse_path
from handfast.cli.auditing_local import audit_local, how_many
from handfast.cli.clients import client_files
from handfast.cli.output import (
    as_json_option,
    asked,
    example,
    first_line,
    key_passphrase_option,
    note,
    passphrase_option,
    print_error,
    print_json,
    state_option,
)
from handfast.errors import Exit, Failure, InvalidInput, Reason
from handfast.files import load_key, write_public
from handfast.pki.keys import same_key
from handfast.pki.names import parse_dns, parse_name
from handfast.testing import TestAuthority, TestLeaf
from handfast.tls.credential import Credential, load_bundle, load_credential

_path = click.Path(path_type=Path)


@click.command(
    "audit",
    epilog=example(
        "handfast audit api.internal:8443",
        "handfast audit api.internal:8443 --cert web.crt --key web.key --html audit.html",
        "handfast audit --local",
        "handfast audit --list",
    ),
    short_help="Attack a mutual-TLS server that is yours, and report what holds.",
)
@click.argument("address", metavar="HOST:PORT", required=False)
@click.option("--local", is_flag=True, help="Start a guard with an app and an authority of its own, and attack that.")
@click.option(
    "--as", "as_name", metavar="NAME", help="An accepted client: NAME, by its files in clients/ of the state."
)
@click.option("--cert", type=_path, help="The certificate of an accepted client, and its chain.")
@click.option("--key", type=_path, help="Its private key.")
@click.option("--ca", type=_path, help="The authority that the server trusts; with --mitm, the one the client trusts.")
@click.option("--ca-key", type=_path, help="Its key: also make the attacks of an insider, with certificates by it.")
@click.option("--authority", is_flag=True, help="The same with the authority in the state folder.")
@click.option("--only", multiple=True, metavar="ID", help="Only this check, or those that fit (outsider.*). Repeat.")
@click.option("--sni", metavar="NAME", help="The server name to ask for.  [default: HOST, where it is a name]")
@click.option("--path", default="/", show_default=True, help="What an accepted client may ask for.")
@click.option(
    "--mitm", type=click.Choice(sorted(CLIENTS)), help="Stand between this client and the server. Takes --ca."
)
@insider_options
@click.option("--gentle", is_flag=True, help="One connection at a time, with pauses, and less of everything.")
@click.option(
    "--handshake-limit",
    type=click.FloatRange(0.5, 120),
    default=65,
    show_default=True,
    metavar="SECONDS",
    help="How long the server may keep a client that is slow to shake hands.",
)
@click.option("--sarif", is_flag=True, help="Print SARIF 2.1.0.")
@click.option("--html", type=_path, metavar="FILE", help="Also write a page.")
@click.option("--junit", type=_path, metavar="FILE", help="Also write JUnit XML.")
@click.option("--list", "list_checks", is_flag=True, help="List the checks and make none.")
@key_passphrase_option
@passphrase_option
@state_option
@as_json_option
def audit_(address: str | None, list_checks: bool, only: tuple[str, ...], as_json: bool, **options: object) -> int:
    """Attack the mutual-TLS server at HOST:PORT with what mutual TLS is meant to stop, and report what held.

    Only for servers that are yours to test. Nothing is sent anywhere else. With a certificate that the server
    accepts (--cert or --as), more checks are made, and all are surer. Exit 3: a hole was found; 6: nobody
    answers there, or nobody who speaks TLS.

    --local attacks a guard that it starts itself, and leaves nothing behind.
    """
    checks = choose(only)
    if list_checks:
        _list(checks, as_json)
        return Exit.OK
    ask = _Asked(**options)  # type: ignore[arg-type]  # click gives each option its type
    if ask.local:
        _refuse_beside_local()
        report = audit_local(checks, _pace(ask), _progress(how_many(checks)))
    elif address is None:
        raise click.UsageError("say which server to attack: HOST:PORT; or --local, a guard that is started for it")
    else:
        audit = prepare(_target(address, ask), _means(ask), _pace(ask))
        report = run(audit, checks, _progress(len(checks)))
    _write(report, ask, as_json)
    code = Exit.OK
    if report.no_tls:
        failure = Failure(Reason.AUDIT_NO_TLS, {"target": report.target, "detail": report.no_tls})
        code = print_error(failure, as_json=False, hint=failure.hint)  # standard output has the report
    return Exit.REFUSED if report.failed else code


@dataclass(frozen=True, slots=True)
class _Asked:
    """The options of one call."""

    local: bool
    as_name: str | None
    cert: Path | None
    key: Path | None
    ca: Path | None
    ca_key: Path | None
    authority: bool
    sni: str | None
    path: str
    mitm: str | None
    gentle: bool
    handshake_limit: float
    sarif: bool
    html: Path | None
    junit: Path | None
    key_passphrase_file: Path | None
    passphrase_file: Path | None
    state: Path | None
    revoked_cert: Path | None
    revoked_key: Path | None
    other: str | None
    echo: str | None
    protected: str | None
    pid: int | None


def _refuse_beside_local() -> None:
    """What says whom to attack and by what means would be passed over beside --local."""
    context = click.get_current_context()
    ours = {"local", "only", "gentle", "handshake_limit", "as_json", "sarif", "html", "junit"}
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in ours and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            what = "HOST:PORT" if name == "address" else parameter.opts[0]
            raise click.UsageError(f"--local makes its own server and clients; leave out {what}")


def _target(address: str, ask: _Asked) -> Target:
    endpoint = parse_endpoint(address)
    sni = parse_dns(ask.sni).value if ask.sni else endpoint.sni
    echo, protected = (None if path is None else parse_path(path) for path in (ask.echo, ask.protected))
    return Target(endpoint.host, endpoint.port, sni, parse_path(ask.path), echo, protected)


def _means(ask: _Asked) -> Means:
    if ask.authority and ask.ca_key:
        raise click.UsageError("give --authority or --ca-key, not both")
    authority = _own_authority(ask) if ask.authority else _given_authority(ask) if ask.ca_key else None
    client = None
    if ask.mitm is not None:
        if ask.ca is None:
            raise click.UsageError("--mitm needs --ca F: what the client trusts")
        load_bundle(ask.ca)
        client = Client(ask.mitm, str(ask.ca), CLIENTS[ask.mitm])
    return Means(
        _credential(ask, authority),
        authority,
        client,
        _revoked(ask),
        own_revoker(ask.state, ask.passphrase_file) if ask.authority else None,
        parse_endpoint(ask.other) if ask.other else None,
        ask.pid,
    )


def _revoked(ask: _Asked) -> TestLeaf | None:
    if ask.revoked_cert is None and ask.revoked_key is None:
        return None
    if ask.revoked_cert is None or ask.revoked_key is None:
        raise click.UsageError("--revoked-cert F and --revoked-key F go together")
    secret = first_line(ask.key_passphrase_file) if ask.key_passphrase_file else None
    return _leaf(load_credential(ask.revoked_cert, ask.revoked_key, secret))


def _credential(ask: _Asked, authority: TestAuthority | None) -> TestLeaf | None:
    secret = first_line(ask.key_passphrase_file) if ask.key_passphrase_file else None
    if ask.as_name is None:
        if ask.cert is None and ask.key is None:
            return None
        if ask.cert is None or ask.key is None:
            raise click.UsageError("--cert F and --key F go together")
        return _leaf(load_credential(ask.cert, ask.key, secret))
    if ask.cert is not None or ask.key is not None:
        raise click.UsageError("--as NAME has its own certificate and key; leave out --cert and --key, or it")
    if authority is not None and ask.ca_key is not None:
        parse_name(ask.as_name, "any")  # raises where it is none
        return authority.client(ask.as_name)
    files = client_files(ask.state, ask.as_name)
    return _leaf(load_credential(files.cert, files.key, secret))


def _leaf(credential: Credential) -> TestLeaf:
    return TestLeaf(credential.key, tuple(one.public_bytes(Encoding.DER) for one in credential.chain))


def _given_authority(ask: _Asked) -> TestAuthority:
    """The authority of --ca and --ca-key. What it makes stays in memory."""
    if ask.ca is None or ask.ca_key is None:
        raise click.UsageError("--ca-key F needs --ca F, its certificate")
    key = load_key(ask.ca_key, first_line(ask.key_passphrase_file) if ask.key_passphrase_file else None)
    chain = load_bundle(ask.ca).anchors
    if not same_key(key.public_key(), chain[0].public_key()):  # type: ignore[arg-type]  # other kinds compare unequal
        raise InvalidInput(Reason.INPUT_KEY_MISMATCH, key=str(ask.ca_key), cert=str(ask.ca))
    above = tuple(one.public_bytes(Encoding.DER) for one in chain) if chain[0].issuer != chain[0].subject else ()
    return TestAuthority(chain[0], key, above)


def _own_authority(ask: _Asked) -> TestAuthority:
    """The issuer in the state folder. What is made with it here is in no ledger, and never leaves memory."""
    from handfast.authority import PassphraseFile, usual_passphrase
    from handfast.authority.state import Folder, read_passphrase
    from handfast.cli.opening import folder_of, opened

    folder = folder_of(ask.state)
    with opened(ask.state, ask.passphrase_file) as authority:
        chain = tuple(one.public_bytes(Encoding.DER) for one in authority.chain())
        source = PassphraseFile(ask.passphrase_file) if ask.passphrase_file else usual_passphrase(folder, asked)
        secret = read_passphrase(source, folder, "Passphrase of the authority")
        return TestAuthority(authority.issuer, load_key(Folder(folder).issuer_key, secret), chain)


def _pace(ask: _Asked) -> Pace:
    pace = GENTLE if ask.gentle else Pace()
    return replace(pace, limit=ask.handshake_limit, patience=min(pace.patience, ask.handshake_limit))


def _progress(total: int) -> Progress:
    """One line on standard error for each check that is done."""
    done, lock = itertools.count(1), threading.Lock()

    def told(check: Check, outcome: Outcome | None) -> None:
        if outcome is not None:
            with lock:
                note(f"{next(done):3}/{total} {Finding(check, outcome, 0.0).word:<14} {check.id}")

    return told


def _write(report: Report, ask: _Asked, as_json: bool) -> None:
    if ask.html is not None:
        write_public(ask.html, render_html(report).encode())
    if ask.junit is not None:
        write_public(ask.junit, render_junit(report).encode())
    if as_json:
        print_json(report_json(report))
    elif ask.sarif:
        click.echo(render_sarif(report), nl=False)
    else:
        click.echo(render_text(report), nl=False)


def _list(checks: Sequence[Check], as_json: bool) -> None:
    if as_json:
        keys = ("id", "attack", "proves", "references")
        print_json(
            [
                {key: getattr(check, key) for key in keys}
                | {"severity": check.severity.value, "remedies": dict(check.remedies.items())}
                for check in checks
            ]
        )
        return
    for check in checks:
        click.echo(f"{check.id} ({check.severity})\n  {check.attack}")
