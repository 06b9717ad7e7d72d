"""systemd's side of a service: the sockets that it made for us, and what it wants to be told.

Speaks the two small protocols by hand (sd_listen_fds(3), sd_notify(3)) and needs no library. Never listens and
never decides what a socket is for.
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress

from handfast.errors import HandfastError, Reason

MAX_SOCKETS = 1024  # that one process takes over
UNNAMED = "unknown"  # how sd_listen_fds_with_names(3) calls a socket without a name

_FIRST = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")
_PATIENCE = 1.0  # seconds to wait for a systemd that does not read
_FAMILIES = frozenset({socket.AF_INET, socket.AF_INET6, socket.AF_UNIX})


def listen_sockets() -> dict[str, list[socket.socket]]:
    """Take the sockets that systemd listens on for this process, by FileDescriptorName=; none is no error.

    Each is a listening stream socket, non-blocking, and closed in programs that we start. The variables are
    removed, so a second call returns nothing and children do not take the sockets for theirs. Raises
    HandfastError (GUARD_SOCKETS), and then has closed all of them.
    """
    pid, _, count, names = (os.environ.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()):  # meant for a process above us, whose environment we got
        return {}
    if not re.fullmatch(r"[0-9]{1,4}", count) or int(count) > MAX_SOCKETS:
        raise HandfastError(Reason.GUARD_SOCKETS, detail=f"LISTEN_FDS is {count[:20]!r}")
    called = names.split(":") if names else [UNNAMED] * int(count)
    descriptors = range(_FIRST, _FIRST + int(count))
    if len(called) != len(descriptors):
        _close_all(descriptors)
        raise HandfastError(Reason.GUARD_SOCKETS, detail=f"{len(called)} names for {count} sockets")
    return adopt(list(zip(called, descriptors, strict=True)))


def adopt(given: list[tuple[str, int]]) -> dict[str, list[socket.socket]]:
    """Make sockets of named file descriptors, each checked to be a stream socket that listens.

    Raises HandfastError (GUARD_SOCKETS), and then has closed all of the descriptors.
    """
    taken: dict[str, list[socket.socket]] = {}
    for at, (name, descriptor) in enumerate(given):
        try:
            taken.setdefault(name, []).append(_listener(name, descriptor))
        except HandfastError:
            for plug in (plug for plugs in taken.values() for plug in plugs):
                plug.close()
            _close_all([left for _, left in given[at:]])
            raise
    return taken


def notify(**states: str | int) -> bool:
    """Tell systemd something, as `notify(READY=1, STATUS="serving")`; return whether it could be told.

    RELOADING=1 gets the MONOTONIC_USEC that it needs. False, and nothing else, when no systemd waits or it cannot
    be reached: a service does not stop for that.
    """
    place = os.environ.get("NOTIFY_SOCKET", "")
    if not place.startswith(("/", "@")):
        return False
    if states.get("RELOADING") == 1:
        states |= {"MONOTONIC_USEC": time.monotonic_ns() // 1000}
    # A line is a state, so a value with a line break could say what we did not mean.
    lines = [f"{name}={' '.join(str(value).splitlines())}" for name, value in states.items()]
    address = f"\0{place[1:]}" if place.startswith("@") else place
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_PATIENCE)
            sender.connect(address)
            sender.sendall("\n".join(lines).encode("utf-8", "replace"))
    except (OSError, ValueError):
        return False
    return True


def watchdog_interval() -> float | None:
    """How often, in seconds, to say `notify(WATCHDOG=1)`: half of WatchdogSec=. None: nobody waits for it."""
    limit, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return None
    if not re.fullmatch(r"[0-9]{1,18}", limit) or int(limit) == 0:
        return None
    return int(limit) / 2_000_000


def _listener(name: str, descriptor: int) -> socket.socket:
    try:
        plug = socket.socket(fileno=descriptor)
    except OSError as error:
        raise _unusable(name, descriptor, os.strerror(error.errno or 0).lower()) from None
    try:
        if plug.family not in _FAMILIES or plug.type != socket.SOCK_STREAM:
            raise _unusable(name, descriptor, f"it is a {plug.family!s} {plug.type!s}, not a stream of TCP or UNIX")
        if not plug.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise _unusable(name, descriptor, "it does not listen (Accept=yes is not for us)")
        plug.set_inheritable(False)
        plug.setblocking(False)
    except HandfastError:
        plug.detach()  # adopt closes it
        raise
    return plug


def _unusable(name: str, descriptor: int, detail: str) -> HandfastError:
    return HandfastError(Reason.GUARD_SOCKETS, detail=f"{name!r} (descriptor {descriptor}): {detail}")


def _close_all(descriptors: range | list[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)
