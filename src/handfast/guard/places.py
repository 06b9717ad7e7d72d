"""Places: where to listen and where to forward to, as a person writes them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from handfast.errors import InvalidInput, Reason

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?\.?")


@dataclass(frozen=True, slots=True)
class Target:
    """Where the app is. `http` false: bytes are forwarded unread. `path` is a UNIX socket's."""

    http: bool
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        place = f"unix:{self.path}" if self.path else join_address(self.host, self.port)
        return place if self.http else f"tcp://{place}" if not self.path else f"tcp+{place}"


def parse_target(text: str) -> Target:
    """Parse `[http://]HOST:PORT`, `tcp://HOST:PORT`, `unix:PATH` or `tcp+unix:PATH`.

    Raises InvalidInput (INPUT_TARGET).
    """
    scheme, mark, rest = text.partition("://")
    if not mark:
        scheme, rest = "http", text
    if scheme not in ("http", "tcp"):
        raise _bad(Reason.INPUT_TARGET, text, f"{scheme}:// is not spoken to apps; http:// and tcp:// are")
    if rest.startswith(("unix:", "tcp+unix:")):
        path = rest.partition("unix:")[2]
        if not path or "\0" in path or len(path.encode()) > 107:  # sun_path, unix(7)
            raise _bad(Reason.INPUT_TARGET, text, "a socket's path has 1 to 107 bytes")
        return Target(http=scheme == "http" and not rest.startswith("tcp+"), path=path)
    host, port = _split(text, rest.removesuffix("/"), Reason.INPUT_TARGET)
    if port == 0:
        raise _bad(Reason.INPUT_TARGET, text, "port 0 is no place to connect to")
    return Target(http=scheme == "http", host=host, port=port)


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


def _bad(reason: Reason, value: str, detail: str) -> InvalidInput:
    return InvalidInput(reason, value=value, detail=detail)
