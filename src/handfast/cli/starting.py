"""What a person should hear when a guard starts: apps that do not answer yet, and files that others may read or change.

It refuses nothing: an app may come later, and containers mount keys with whatever mode they have.
"""

from __future__ import annotations

import shlex
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from time import monotonic

from cryptography import x509

from handfast.errors import HandfastError, VerificationFailed
from handfast.guard.places import Target, no_way
from handfast.guard.routes import Site, Snapshot
from handfast.guard.schema import Config
from handfast.guard.upstream import Handshake, Upstreams
from handfast.pki.certificates import UNREADABLE, label
from handfast.pki.names import parse_dns
from handfast.pki.verification import name_matches
from handfast.policy import Rule
from handfast.tls.channel import TlsBroken

_LONGEST = 2.0  # seconds to look at all apps; those that are left then are not looked at
_EACH = 1.0  # seconds for one
_MOST_RECORDS = 1 << 17  # bytes of a handshake


def silent_apps(groups: Iterable[Upstreams]) -> list[str]:
    """Which backends take no connection, or no TLS where it is to be spoken; nothing is asked of those that do."""
    said: list[str] = []
    deadline = monotonic() + _LONGEST
    for group in groups:
        for backend in group.backends:
            if monotonic() >= deadline:
                return said
            target = backend.target
            # A PROXY header would have to come first, and there is no client to tell of.
            handshake = None if group.handshake is None or group.proxy or not target.tls else group.handshake(target)
            problem = _look(target, handshake)
            if problem and problem not in said:
                said.append(problem)
    return said


def _look(target: Target, handshake: Handshake | None) -> str:
    try:
        with _connected(target) as plug:
            if handshake is not None:
                _shake_hands(plug, handshake)
        return ""
    except (TlsBroken, VerificationFailed) as refused:
        return f"no TLS with {target} yet: {refused.failure.message}"
    except TimeoutError:
        detail = f"no answer in {_EACH:g} s"
    except (OSError, UnicodeError) as error:
        detail = no_way(error)
    return f"nothing answers at {target} yet ({detail})"


def _connected(target: Target) -> socket.socket:
    if not target.path:
        return socket.create_connection((target.host, target.port), _EACH)
    plug = socket.socket(socket.AF_UNIX)
    try:
        plug.settimeout(_EACH)
        plug.connect(target.path)
    except OSError:
        plug.close()
        raise
    return plug


def _shake_hands(plug: socket.socket, handshake: Handshake) -> None:
    """One handshake, and no byte more. Raises TlsBroken, VerificationFailed and OSError."""
    records, left, deadline = b"", _MOST_RECORDS, monotonic() + _EACH
    try:
        while handshake.feed(records) is None:
            plug.sendall(handshake.take())
            records = plug.recv(1 << 14)
            left -= len(records)
            if not records or left < 0:
                raise OSError("it closed in the midst of the TLS handshake")
            if monotonic() >= deadline:
                raise TimeoutError
    finally:
        with suppress(OSError):  # it may be gone; what went wrong before says more
            plug.sendall(handshake.take())


def doubts(snapshot: Snapshot, groups: Iterable[Upstreams], now: datetime) -> list[str]:
    """What a guard may serve with, and yet is hardly meant: lists that let nobody in, names that its certificate has
    not, a certificate near its end, an app that others on this machine can reach past it.
    """
    said: list[str] = []
    for site in _sites(snapshot):
        with suppress(HandfastError, *UNREADABLE):  # a doubt about a doubt stops nobody
            said += _doubts_of(site, now)
    for target in (backend.target for group in groups for backend in group.backends):
        with suppress(OSError):  # it is not there yet
            if target.path and stat.S_IMODE(Path(target.path).stat().st_mode) & 0o002:
                close = f"chmod o-w {shlex.quote(target.path)}"
                said.append(f"everyone on this machine can reach {target} past the guard; close it: {close}")
    return list(dict.fromkeys(said))


def next_doubt(snapshot: Snapshot, now: datetime) -> datetime | None:
    """When time alone makes something doubtful next: a certificate comes near its end, a revocation list falls due."""
    moments: list[datetime] = []
    for site in _sites(snapshot):
        moments.append(_near_end(site.context.credential.chain[0]))
        if (crls := site.context.terms.crls) is not None:
            moments += crls.next_updates().values()
    return min((moment for moment in moments if moment > now), default=None)


def _sites(snapshot: Snapshot) -> list[Site]:
    return [site for sites in snapshot.sites.values() for site in sites.all]


def _near_end(leaf: x509.Certificate) -> datetime:
    """When the last tenth of a certificate's life begins."""
    return leaf.not_valid_after_utc - (leaf.not_valid_after_utc - leaf.not_valid_before_utc) / 10


def _doubts_of(site: Site, now: datetime) -> Iterator[str]:
    terms, leaf = site.context.terms, site.context.credential.chain[0]
    for anchor in terms.bundle.anchors:
        if terms.crls is not None and (failure := terms.crls.failure(anchor, anchor, now)) is not None:
            yield f"{failure.message}: every client of it is refused [{failure.reason.code}]"
    vouching = set(terms.bundle.names) or {label(anchor) for anchor in terms.bundle.anchors}
    if len(vouching) > 1 and (terms.bundle.names or terms.bundle.trust_domain is None):
        loose = next((rule for route in site.routes for rule in route.policy.rules if _names_somebody(rule)), None)
        if loose is not None:
            who = ", ".join(sorted(vouching)[:3])
            ask = "" if terms.bundle.names else "name them, by client_ca = { NAME = FILE }, and "
            yield (
                f"each of {len(vouching)} authorities may vouch for whom {str(loose)!r} means ({who}):"
                f" {ask}write WHO by NAME in rules"
            )
    for name in site.names:
        if not name.startswith("*.") and not name_matches(leaf, parse_dns(name)):
            yield f"the certificate {label(leaf)} is not for {name}, so clients that ask for it will refuse it"
    if now >= _near_end(leaf):
        end = f"{leaf.not_valid_after_utc:%Y-%m-%d %H:%M:%S}"
        yield f"the certificate {label(leaf)} ends at {end} UTC: put a new one in its place"


def _names_somebody(rule: Rule) -> bool:
    """Whether whoever vouches for a name decides on whom the rule means."""
    return not rule.by and rule.who.text != "any" and not rule.who.text.startswith("sha256:")


def loose_files(config: Config, source: Path | None) -> list[str]:
    """The files of a guard that others may read or change and should not, each with what closes it.

    `source`: the file that the configuration came from.
    """
    sites = [site for listener in config.listeners for site in listener.all_sites]
    upstreams = list(config.upstreams.values())
    secret = [path for site in sites for path in (site.key, site.key_passphrase_file)]
    secret += [upstream.key for upstream in upstreams]
    secret += [] if config.assertion is None else [config.assertion.key]
    open_to_all = [source]
    open_to_all += [path for site in sites for path in (site.cert, site.allow_file, *site.crl)]
    open_to_all += [one.file for site in sites for one in site.client_ca]
    open_to_all += [path for upstream in upstreams for path in (upstream.ca, upstream.cert)]
    return [*loose_keys(secret), *_changeable(open_to_all)]


def loose_keys(paths: Iterable[Path | None]) -> Iterator[str]:
    """Those of these private keys that others may read or change. What a group may read passes: some do."""
    for path, mode in _modes(paths):
        if mode & 0o026:
            what = "read" if mode & 0o004 else "changed"
            yield f"{path} can be {what} by others (mode {mode:03o}); close it: chmod 600 {shlex.quote(str(path))}"


def _changeable(paths: Iterable[Path | None]) -> Iterator[str]:
    for path, mode in _modes(paths):
        if mode & 0o002:
            yield f"{path} can be changed by others (mode {mode:03o}); close it: chmod o-w {shlex.quote(str(path))}"


def _modes(paths: Iterable[Path | None]) -> Iterator[tuple[Path, int]]:
    for path in dict.fromkeys(paths):
        if path is None:
            continue
        try:
            yield path, stat.S_IMODE(path.stat().st_mode)
        except OSError:  # whoever needs it says so
            continue
