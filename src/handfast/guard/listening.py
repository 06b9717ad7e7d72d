"""Sockets to listen on: ports, several sockets for one port, and UNIX sockets that their owner alone may open."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handfast.errors import Reason, Unreachable
from handfast.guard.places import Place

BACKLOG = 4096
_ALIVE = 1.0  # seconds for a UNIX socket to show that somebody listens on it


def bind(place: Place, *, others: bool = False) -> socket.socket:
    """Take a place to listen on; who connects waits for it. Raises Unreachable (GUARD_LISTEN).

    Port 0 lets the system choose. A UNIX socket is made with mode 0600, or 0666 where `others` may open it. One that
    is there already and that nobody listens on is replaced; what is there and is no socket stays.
    """
    try:
        if place.path:
            return _bind_unix(Path(place.path), others)
        return _listen(*_resolve(place), shared=False)
    except (OSError, UnicodeError) as error:
        raise cannot_listen(str(place), error) from None


async def serve_unix(make: Callable[[], asyncio.Protocol], plug: socket.socket) -> asyncio.Server:
    """Accept from a UNIX socket. Its name stays when that ends: it is not for one server alone.

    From Python 3.13 on event loops remove the name else, and a pause or a hand-over would leave nobody a way in.
    """
    loop = asyncio.get_running_loop()
    try:
        return await loop.create_unix_server(make, sock=plug, backlog=BACKLOG, cleanup_socket=False)  # type: ignore[call-arg]  # since 3.13
    except TypeError:  # an event loop that does not know it removes nothing
        return await loop.create_unix_server(make, sock=plug, backlog=BACKLOG)


def bind_shared(place: Place, count: int) -> list[socket.socket]:
    """Take a port `count` times, with SO_REUSEPORT; port 0 lets the system choose one for all.

    A port that another program serves is refused, although SO_REUSEPORT would let the two share it. Raises
    Unreachable (GUARD_LISTEN), and ValueError for a UNIX socket: share that one.
    """
    if place.path:
        raise ValueError("a UNIX socket cannot be bound twice")
    plugs: list[socket.socket] = []
    try:
        family, address = _resolve(place)
        if place.port != 0:
            _listen(family, address, shared=False).close()
        for _ in range(count):
            plugs.append(_listen(family, address if not plugs else plugs[0].getsockname(), shared=True))
    except (OSError, UnicodeError) as error:
        for plug in plugs:
            plug.close()
        raise cannot_listen(str(place), error) from None
    return plugs


def cannot_listen(place: str, error: OSError | UnicodeError) -> Unreachable:
    """Return what to raise where the system will not have us listen."""
    detail = str(error)
    if isinstance(error, (socket.gaierror, UnicodeError)):
        detail = "the host is not known here"
    elif error.errno:
        detail = os.strerror(error.errno).lower()
    return Unreachable(Reason.GUARD_LISTEN, address=place, detail=detail)


def _resolve(place: Place) -> tuple[socket.AddressFamily, Any]:
    family, _, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
    return family, address


def _listen(family: int, address: Any, *, shared: bool) -> socket.socket:
    plug = socket.socket(family, socket.SOCK_STREAM)
    try:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        plug.setblocking(False)
        plug.bind(address)
        plug.listen(BACKLOG)  # at once: two that are bound with SO_REUSEADDR would not mind each other until then
    except OSError:
        plug.close()
        raise
    return plug


def _bind_unix(path: Path, others: bool) -> socket.socket:
    _remove_dead(path)
    before = os.umask(0o177)  # private from its first instant
    try:
        plug = _listen(socket.AF_UNIX, str(path), shared=False)
    finally:
        os.umask(before)
    if others:
        try:
            path.chmod(0o666)
        except OSError:
            plug.close()
            raise
    return plug


def _remove_dead(path: Path) -> None:
    """Remove a socket on which nobody listens. Raises OSError for anything else that is in the way."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_ALIVE)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # left behind by a process that is gone
            path.unlink(missing_ok=True)
            return
        except (BlockingIOError, TimeoutError):  # its queue is full: somebody listens
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
