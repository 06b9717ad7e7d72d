"""What `audit` is told for an insider's attacks: options, and a revoker that is the authority in the state folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives.serialization import Encoding

from handfast.audit.runner import Revoker, Target
from handfast.authority import RevocationReason
from handfast.cli.opening import opened
from handfast.errors import InvalidInput, Reason
from handfast.files import generate_key
from handfast.guard.places import parse_address
from handfast.pki.certificates import serial_text
from handfast.pki.issuing import Order
from handfast.pki.keys import KeyType
from handfast.pki.names import parse_name
from handfast.pki.profiles import PROFILES
from handfast.testing import TestLeaf
from handfast.tls.client import server_name_of

_path = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--revoked-cert", type=_path, help="A certificate of a client's that was revoked, and its chain."),
    click.option("--revoked-key", type=_path, help="Its private key."),
    click.option("--other", metavar="HOST:PORT", help="A second listener of yours, that no session may be carried to."),
    click.option(
        "--echo", metavar="PATH", help="A path that answers with the headers of the request, as text or JSON."
    ),
    click.option("--protected", metavar="PATH", help="A path that the accepted client must not reach."),
    click.option("--pid", type=click.IntRange(1), help="The server's process on this machine: its memory is watched."),
)


def insider_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the options of an insider's attacks."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def parse_path(text: str) -> str:
    """A path as it is asked for. Raises InvalidInput (INPUT_NAME)."""
    if not text.startswith("/") or not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidInput(Reason.INPUT_NAME, value=text, detail="a path is ASCII, without spaces, and begins with /")
    return text


def parse_endpoint(text: str) -> Target:
    """HOST:PORT as a place to connect to. Raises InvalidInput (INPUT_ADDRESS)."""
    host, port = parse_address(text)
    if port == 0:
        raise InvalidInput(Reason.INPUT_ADDRESS, value=text, detail="port 0 is no place to connect to")
    return Target(host, port, server_name_of(host))


def own_revoker(state: Path | None, passphrase_file: Path | None) -> Revoker:
    """The authority in the state folder. What it issues and revokes for this is in its ledger, as all it does."""

    def issue(names: tuple[str, ...]) -> TestLeaf:
        key = generate_key(KeyType.P256)
        with opened(state, passphrase_file) as authority:
            meant = tuple(parse_name(name, authority.trust_domain) for name in names)
            order = Order(PROFILES["client"], meant, key.public_key())
            issued = authority.issue(order, authority.authorize(meant, order.profile))
            chain = (issued.certificate, *authority.chain())
        return TestLeaf(key, tuple(one.public_bytes(Encoding.DER) for one in chain))

    def revoke(leaf: TestLeaf) -> None:
        with opened(state, passphrase_file) as authority:
            authority.revoke(serial_text(leaf.certificate.serial_number), RevocationReason.UNSPECIFIED)

    return Revoker(issue, revoke)
