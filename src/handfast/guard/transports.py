"""What asyncio's transports do not do or tell by themselves: resets, and news that its hearer may fail at.

Shared by the guard and the connector; it knows nothing of either's protocols.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import ParamSpec

LINGER, LONGEST_LINGER = 2.0, 30.0  # seconds of silence, and in all, for a peer that was refused to read why
LINGER_BYTES = 1 << 30  # and what it may send meanwhile: who is in the midst of an upload reads after it
_UNREAD = 1 << 20  # bytes, or so, that are read of what a connection leaves behind
_LOOK = 0.05  # seconds between two looks at whether a peer has taken what was written
_RESET = struct.pack("ii", 1, 0)  # socket(7): with a linger time of zero, close sends RST
_P = ParamSpec("_P")


def reset(transport: asyncio.Transport) -> None:
    """Close at once, with a reset where the kind of socket has one: the peer must not take it for a quiet end."""
    plug = transport.get_extra_info("socket")
    if plug is not None and plug.family != socket.AF_UNIX:
        with suppress(OSError):  # it is closed already
            plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


def reset_when_taken(transport: asyncio.Transport, until: float) -> None:
    """Reset once the peer has taken what was written to it; at `until`, on the clock of `monotonic`, in any case.

    A reset throws away what is on its way: what came before a stream was cut is good all the same.
    """
    plug = transport.get_extra_info("socket")
    if plug is None or transport.is_closing():
        return
    left = transport.get_write_buffer_size()
    with suppress(OSError):  # tcp(7), unix(7): SIOCOUTQ, bytes that the peer has not acknowledged, or not read
        left = left or int.from_bytes(fcntl.ioctl(plug.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    if left and monotonic() < until:
        asyncio.get_running_loop().call_later(_LOOK, reset_when_taken, transport, until)
    else:
        reset(transport)


def was_reset(transport: asyncio.Transport) -> bool:
    """Whether an end is none: libuv tells of a reset that comes together with bytes as of an end after them."""
    plug = transport.get_extra_info("socket")
    return plug is not None and plug.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def unread(transport: asyncio.Transport) -> bytes:
    """What came on a connection before a write failed. To be asked in `connection_lost`, while its socket is open.

    The transports end there. But a server that refuses an upload, or our certificate, says why before it closes with
    bytes of ours unread, and the kernel has it.
    """
    plug, came = transport.get_extra_info("socket"), b""
    with suppress(OSError):
        while plug is not None and len(came) < _UNREAD and (piece := os.read(plug.fileno(), 1 << 16)):
            came += piece
    return came


def tell(on_bug: Callable[[Exception], None], what: Callable[_P, None], *news: _P.args, **more: _P.kwargs) -> None:
    """Tell an owner something; what it raises is a bug, which `on_bug` hears of. Nothing gets into the event loop."""
    try:
        what(*news, **more)
    except Exception as bug:
        on_bug(bug)
