"""The way to the app: one connection of its own for each client connection that needs it.

Never shared between clients, so no answer can reach the wrong one, and no identity another's request.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Protocol, cast

from handfast.errors import Failure, Reason
from handfast.guard.places import Target

_RESET = struct.pack("ii", 1, 0)  # socket(7): with a linger time of zero, close sends RST


class Owner(Protocol):
    """Who an upstream connection belongs to."""

    def upstream_open(self, upstream: Upstream) -> None:
        """It can be written to."""

    def upstream_failed(self, failure: Failure) -> None:
        """It could not be opened."""

    def upstream_data(self, data: bytes) -> None:
        """The app sent bytes."""

    def upstream_ended(self) -> None:
        """The app sends no more; it may still read."""

    def upstream_lost(self, reset: bool) -> None:
        """It is closed; `reset`: in the midst of things, so what came may be cut short."""

    def upstream_writable(self, yes: bool) -> None:
        """The way to the app is full, or free again."""

    def upstream_bug(self, bug: Exception) -> None:
        """One of the others raised what it should not: fail closed."""


class Upstream(asyncio.Protocol):
    """One connection to the app."""

    __slots__ = ("_owner", "transport")

    transport: asyncio.Transport

    def __init__(self, owner: Owner) -> None:
        self._owner: Owner | None = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of it

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None:
            _tell(owner, owner.upstream_data, data)

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None:
            _tell(owner, owner.upstream_ended)
        return self._owner is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        owner, self._owner = self._owner, None
        if owner is not None:
            _tell(owner, owner.upstream_lost, exc is not None)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None:
            _tell(owner, owner.upstream_writable, False)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if (owner := self._owner) is not None:
            _tell(owner, owner.upstream_writable, True)

    @property
    def usable(self) -> bool:
        """Whether it is still open, as far as we know."""
        return self._owner is not None and not self.transport.is_closing()

    def close(self) -> None:
        """Close it when what was written is sent; the owner hears no more of it."""
        self._owner = None
        self.transport.close()

    def drop(self, *, cut: bool = False) -> None:
        """Close it at once; the owner hears no more of it.

        `cut`: what was sent is not whole, and the app must not take a quiet end for its end: reset it.
        """
        self._owner = None
        plug = self.transport.get_extra_info("socket")
        if cut and plug is not None:
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()


def _tell(owner: Owner, what: Callable[..., None], *news: bytes | bool | Failure | Upstream) -> None:
    try:
        what(*news)
    except Exception as bug:
        owner.upstream_bug(bug)


def dial(target: Target, owner: Owner, limit: float) -> asyncio.Task[None]:
    """Open a connection to the app for `owner`, which hears how it went. Cancel the task to give up."""
    return asyncio.get_running_loop().create_task(_dial(target, owner, limit))


async def _dial(target: Target, owner: Owner, limit: float) -> None:
    loop = asyncio.get_running_loop()
    made: list[Upstream] = []

    def protocol() -> Upstream:
        made.append(Upstream(owner))
        return made[-1]

    try:
        async with asyncio.timeout(limit):
            if target.path:
                await loop.create_unix_connection(protocol, target.path)
            else:
                await loop.create_connection(protocol, target.host, target.port)
    except TimeoutError:
        _tell(owner, owner.upstream_failed, _down(target, f"no answer in {limit:g} s"))
    except (socket.gaierror, UnicodeError):
        _tell(owner, owner.upstream_failed, _down(target, "its name is not known"))
    except OSError as error:
        detail = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
        _tell(owner, owner.upstream_failed, _down(target, detail))
    else:
        _tell(owner, owner.upstream_open, made[-1])


def _down(target: Target, detail: str) -> Failure:
    return Failure(Reason.UPSTREAM_DOWN, {"target": str(target), "detail": detail})
