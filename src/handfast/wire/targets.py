"""Where a request is meant to go: hosts in one normal form, and paths that can be read in two ways."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from urllib.parse import unquote_to_bytes

# Segments that are not empty and do not begin with a dot, of bytes that no app reads in two ways.
_PLAIN_PATH = re.compile(rb"/(?:[A-Za-z0-9_~!$&'()*+,=:@-][A-Za-z0-9_~!$&'()*+,=:@.-]*+(?:/|\Z))*")
_AMBIGUOUS = re.compile(
    rb"//|/\.\.?(?:/|\Z)|[^!-~]|[;\\]"
    rb"|%(?![0-9A-Fa-f]{2})"
    rb"|%(?:[01][0-9A-Fa-f]|7[Ff])"  # control bytes
    rb"|%(?:2[Ff]|3[Bb]|5[Cc])"  # / ; \
    rb"|%(?:2[DdEe]|3[0-9]|4[1-9A-Fa-f]|5[0-9AaFf]|6[1-9A-Fa-f]|7[0-9AaEe])"  # unreserved: RFC 3986 2.3
)
_ESCAPE = re.compile(rb"%[0-9A-Fa-f]{2}")


def ambiguous_path(path: bytes) -> bool:
    """Whether the app may read the path as another than the bytes that a rule judges. Raises nothing.

    So are: empty, `.` and `..` segments; `\\`, `;` and bytes that are not visible ASCII; escapes that are
    malformed, of control bytes, of `/`, `\\` and `;`, of characters that need none (RFC 3986 2.3: `%61` is
    `a`), that decode to another escape, or that are not UTF-8, overlong forms among them.
    """
    if _PLAIN_PATH.fullmatch(path):
        return False
    if not path.startswith(b"/"):
        return path != b"*"
    if _AMBIGUOUS.search(path):
        return True
    decoded = unquote_to_bytes(path)
    if _ESCAPE.search(decoded):
        return True
    try:
        decoded.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


# RFC 1034 3.5 with the underscore that practice allows, as in certificates' DNS names.
_HOST_NAME = re.compile(rb"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMERIC_END = re.compile(rb"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_HOST_VALUE = re.compile(rb"(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9A-Za-z._-]{1,254}))(?::([0-9]{1,5}))?")


def normal_host(text: bytes | str) -> bytes | None:
    """Return a host in the one form that the Host header and the TLS server name are compared in.

    Lower case, no dot at the end, IP addresses in canonical text, IPv6 without brackets. None for what is no
    host: non-ASCII (names are in A-labels), empty or overlong labels, and numbers that only some read as an
    address (`127.1`, `0x7f.1`). Raises nothing.
    """
    return _normal_host(text) if len(text) <= MAX_HOST else None


@lru_cache(1024)
def _normal_host(text: bytes | str) -> bytes | None:
    if isinstance(text, str):
        if not text.isascii():
            return None
        text = text.encode("ascii")
    host = text.lower()
    if b":" in host:
        if b"%" in host:  # a zone, which means something on one machine only
            return None
        try:
            return str(ipaddress.IPv6Address(host.decode("ascii"))).encode("ascii")
        except ValueError:
            return None
    host = host.removesuffix(b".")
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        return None
    if _NUMERIC_END.fullmatch(host):
        try:
            return str(ipaddress.IPv4Address(host.decode("ascii"))).encode("ascii")
        except ValueError:
            return None
    return host


@lru_cache(256)  # each key is at most MAX_HOST bytes
def parse_host(value: bytes) -> bytes | None:
    """Return the host of a Host header's value in its normal form, without port; None if it is no valid one."""
    found = _HOST_VALUE.fullmatch(value)
    if found is None or (found[3] is not None and int(found[3]) > 65535):
        return None
    if found[1] is not None:
        return normal_host(found[1]) if b":" in found[1] else None
    return normal_host(found[2])


MAX_HOST = 262  # a name of 254 bytes, a colon and a port
