"""Places: where to listen and where to forward to, as a person writes them, and why one is not reached."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from enum import StrEnum

from handfast.errors import InvalidInput, Reason

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")


class Speech(StrEnum):
    """What an app is spoken to in."""

    HTTP1 = "http"
    HTTP2 = "h2"
    BYTES = "tcp"  # forwarded unread


@dataclass(frozen=True, slots=True)
class Target:
    """Where the app is, and how to speak to it. `path` is a UNIX socket's; `tls`: over TLS of our own."""

    speech: Speech
    host: str = ""
    port: int = 0
    path: str = ""
    tls: bool = False

    @property
    def http(self) -> bool:
        """Whether requests are forwarded, and not bytes."""
        return self.speech is not Speech.BYTES

    def __str__(self) -> str:
        place = f"unix:{self.path}" if self.path else join_address(self.host, self.port)
        scheme = next(name for name, known in _SCHEMES.items() if known == (self.speech, self.tls))
        if scheme == "http":
            return place
        return f"{scheme}+{place}" if self.path else f"{scheme}://{place}"


_SCHEMES = {
    "http": (Speech.HTTP1, False),
    "https": (Speech.HTTP1, True),
    "h2c": (Speech.HTTP2, False),  # HTTP/2 from the first byte (RFC 9113 3.3), as gRPC servers speak it
    "h2": (Speech.HTTP2, True),
    "tcp": (Speech.BYTES, False),
    "tls": (Speech.BYTES, True),
}


def parse_target(text: str) -> Target:
    """Parse `[SCHEME://]HOST:PORT`, `unix:PATH` or `SCHEME+unix:PATH`.

    SCHEME is http (if none is given), https, h2c, h2, tcp or tls. Raises InvalidInput (INPUT_TARGET).
    """
    before, mark, path = text.partition("unix:")
    if mark and (not before or before.endswith(("+", "://"))):
        speech, tls = _scheme(text, before.removesuffix("+").removesuffix("://") or "http")
        if not path or "\0" in path or len(path.encode()) > 107:  # sun_path, unix(7)
            raise _bad(Reason.INPUT_TARGET, text, "a socket's path has 1 to 107 bytes")
        return Target(speech, path=path, tls=tls)
    scheme, mark, rest = text.partition("://")
    speech, tls = _scheme(text, scheme if mark else "http")
    host, port = _split(text, (rest if mark else text).removesuffix("/"), Reason.INPUT_TARGET)
    if port == 0:
        raise _bad(Reason.INPUT_TARGET, text, "port 0 is no place to connect to")
    return Target(speech, host, port, tls=tls)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to listen: an address, a UNIX socket's path, or a socket that systemd made, by its name."""

    host: str = ""
    port: int = 0
    path: str = ""
    systemd: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"systemd:{self.systemd}" if self.systemd else join_address(self.host, self.port)


def parse_place(text: str) -> Place:
    """Parse `HOST:PORT`, `:PORT`, `PORT`, `unix:PATH` or `systemd:NAME`. Raises InvalidInput (INPUT_ADDRESS)."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        if not rest or "\0" in rest or len(rest.encode()) > 107:
            raise _bad(Reason.INPUT_ADDRESS, text, "a socket's path has 1 to 107 bytes")
        return Place(path=rest)
    if kind == "systemd":
        if not re.fullmatch(r"[!-9;-~]{1,255}", rest):  # FileDescriptorName=, systemd.socket(5)
            raise _bad(Reason.INPUT_ADDRESS, text, "a socket's name has 1 to 255 visible characters and no colon")
        return Place(systemd=rest)
    host, port = parse_address(text)
    return Place(host, port)


def parse_address(text: str) -> tuple[str, int]:
    """Parse `HOST:PORT`, `:PORT` or `PORT`; port 0 lets the system choose. Raises InvalidInput (INPUT_ADDRESS)."""
    return _split(text, text, Reason.INPUT_ADDRESS)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(text: str, place: str, reason: Reason) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise _bad(reason, text, "a port from 0 to 65535 stands last")
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(port)
        except ValueError:
            raise _bad(reason, text, "what stands in brackets is not an IPv6 address") from None
    if host and not _HOST.fullmatch(host):
        raise _bad(reason, text, "the host is neither a name nor an address")
    return host or "127.0.0.1", int(port)


def _scheme(text: str, scheme: str) -> tuple[Speech, bool]:
    known = _SCHEMES.get(scheme)
    if known is None:
        raise _bad(Reason.INPUT_TARGET, text, f"{scheme}:// is not spoken to apps; {', '.join(_SCHEMES)} are")
    return known


def _bad(reason: Reason, value: str, detail: str) -> InvalidInput:
    return InvalidInput(reason, value=value, detail=detail)


def no_way(error: OSError | UnicodeError) -> str:
    """Say why a place could not be connected to."""
    if isinstance(error, socket.gaierror | UnicodeError):
        return "its name is not known"
    return os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
