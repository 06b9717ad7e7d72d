"""The local side's sockets: a port of this machine, or a UNIX socket that its owner alone may open."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from handfast.errors import Reason, Unreachable
from handfast.guard.places import join_address

BACKLOG = 1024


def bind_port(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 lets the system choose. Raises Unreachable (GUARD_LISTEN)."""
    address = join_address(host, port)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        plug = socket.socket(family, kind, protocol)
    except (socket.gaierror, UnicodeError):
        raise Unreachable(Reason.GUARD_LISTEN, address=address, detail="the host is not known here") from None
    except OSError as error:
        raise _cannot(address, error) from None
    try:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        plug.setblocking(False)
        plug.bind(place)
        plug.listen(BACKLOG)
    except OSError as error:
        plug.close()
        raise _cannot(address, error) from None
    return plug


def bind_unix(path: Path, *, others: bool = False) -> socket.socket:
    """Listen on a UNIX socket of mode 0600, or 0666 where `others` are let in by their uid. A dead one is replaced.

    Raises Unreachable (GUARD_LISTEN).
    """
    plug = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(path)
        before = os.umask(0o177)  # private from its first instant
        try:
            plug.bind(str(path))
        finally:
            os.umask(before)
        if others:
            path.chmod(0o666)
        plug.setblocking(False)
        plug.listen(BACKLOG)
    except OSError as error:
        plug.close()
        raise _cannot(f"unix:{path}", error) from None
    return plug


def _remove_dead(path: Path) -> None:
    """Remove a socket on which nobody listens. Raises OSError for anything else that is in the way."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                path.unlink()
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _cannot(address: str, error: OSError) -> Unreachable:
    detail = os.strerror(error.errno).lower() if error.errno else str(error)
    return Unreachable(Reason.GUARD_LISTEN, address=address, detail=detail)
