from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from handfast.guard.systemd import notify, watchdog_interval
from tests.support.programs import Child, environment, free_port, run

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "howto" / "run-as-a-service.md"

# Tells what it was given, and answers one connection on the first socket.
PROGRAM = """
import json, os, socket, sys
from handfast.errors import HandfastError
from handfast.guard.systemd import listen_sockets
try:
    given = listen_sockets()
except HandfastError as error:
    places = [f"/proc/self/fd/{n}" for n in range(3, 8)]
    open_still = [int(p[-1]) for p in places if os.path.exists(p) and "socket" in os.readlink(p)]
    print(json.dumps({"reason": error.reason.code, "message": str(error), "open": open_still}))
    sys.exit(error.reason.exit)
names = {name: [str(plug.getsockname()) for plug in plugs] for name, plugs in given.items()}
kept = [name for name in os.environ if name.startswith("LISTEN_")]
plugs = [plug for plugs in given.values() for plug in plugs]
inheritable = [plug.get_inheritable() or plug.getblocking() for plug in plugs]
print(json.dumps({"names": names, "kept": kept, "inheritable": inheritable, "again": listen_sockets()}), flush=True)
if "serve" in sys.argv:
    plugs[0].setblocking(True)
    connection, _ = plugs[0].accept()
    connection.sendall(b"hello")
    connection.close()
"""


def started(plugs: list[socket.socket], names: str | None, count: str | None = None, pid: str = "$$") -> dict[str, Any]:
    """What the program says when it is started as systemd does it: sockets from 3 on, its own pid in LISTEN_PID."""
    places = range(3, 3 + len(plugs))
    moves = " ".join(f"{place}<&{plug.fileno()}" for place, plug in zip(places, plugs, strict=True))
    named = f"LISTEN_FDNAMES={names!r} " if names is not None else ""
    line = f'LISTEN_PID={pid} LISTEN_FDS={count or len(plugs)} {named}exec "$0" -c "$1" {moves}'
    for plug in plugs:  # above those of the program
        assert plug.fileno() > 8
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, PROGRAM],
        env=environment(),
        pass_fds=[plug.fileno() for plug in plugs],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def high(plug: socket.socket) -> socket.socket:
    """The same socket under a number that is out of the way."""
    import fcntl

    number = fcntl.fcntl(plug.fileno(), fcntl.F_DUPFD_CLOEXEC, 100)
    plug.close()
    return socket.socket(fileno=number)


def listening() -> socket.socket:
    return high(socket.create_server(("127.0.0.1", 0)))


def test_sockets_come_by_name(tmp_path: Path) -> None:
    """Sockets are found under their names, in their order, TCP and UNIX; nothing is left for children."""
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "socket"))
    unix.listen()
    plugs = [listening(), listening(), high(unix)]
    said = started(plugs, "main:main:local")
    assert said["names"] == {
        "main": [str(plug.getsockname()) for plug in plugs[:2]],
        "local": [str(tmp_path / "socket")],
    }
    assert (said["kept"], said["inheritable"], said["again"]) == ([], [False] * 3, {})
    for plug in plugs:
        plug.close()


def test_sockets_without_names_are_unknown() -> None:
    """Without LISTEN_FDNAMES a socket is called unknown, as sd_listen_fds_with_names(3) has it."""
    with listening() as plug:
        assert list(started([plug], None)["names"]) == ["unknown"]


@pytest.mark.parametrize("pid", ["1", "", "x", "99999999999999"])
def test_sockets_of_another_process_are_left_alone(pid: str) -> None:
    """Variables that were meant for a parent are dropped, and the descriptors are not touched."""
    with listening() as plug:
        said = started([plug], "main", pid=pid)
    assert (said["names"], said["kept"]) == ({}, [])


def bound_only() -> socket.socket:
    plug = socket.socket()
    plug.bind(("127.0.0.1", 0))
    return high(plug)


def datagram() -> socket.socket:
    plug = socket.socket(type=socket.SOCK_DGRAM)
    plug.bind(("127.0.0.1", 0))
    return high(plug)


@pytest.mark.parametrize(
    ("make", "names", "count", "words"),
    [
        (bound_only, "main", None, "'main' (descriptor 3): it does not listen"),
        (datagram, "main", None, "'main' (descriptor 3): it is a"),
        (listening, "main", "2", "1 names for 2 sockets"),
        (listening, "main:more", "2", "'more' (descriptor 4)"),
        (listening, "a:b", None, "2 names for 1 sockets"),
        (listening, "main", "-1", "LISTEN_FDS is '-1'"),
        (listening, "main", "9999", "LISTEN_FDS is '9999'"),
        (listening, "main", "3x", "LISTEN_FDS is '3x'"),
    ],
)
def test_what_is_no_listener_is_refused(make: Any, names: str, count: str | None, words: str) -> None:
    """A descriptor that is not a listening stream socket stops the start, and none is left open."""
    with make() as plug:
        said = started([plug], names, count)
    assert said["reason"] == "guard.sockets"
    assert words in said["message"]
    assert said["open"] == ([] if not words.startswith("LISTEN_FDS") else [3])


def test_the_socket_activation_of_systemd(tmp_path: Path) -> None:
    """systemd's own activator hands over a socket on which a client waits; the client is answered."""
    port = free_port()
    words = ("systemd-socket-activate", "-l", f"127.0.0.1:{port}", "--fdname=main", sys.executable, "-c", PROGRAM)
    with Child((*words, "serve"), tmp_path) as activator:
        activator.line("Listening on")
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            assert client.recv(100) == b"hello"
        said = json.loads(activator.line(r'^\{"names"'))
    assert said["names"] == {"main": [f"('127.0.0.1', {port})"]}


@pytest.mark.parametrize("abstract", [False, True])
def test_states_are_told(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States arrive as lines, at a path and at an abstract address; a value cannot smuggle in a line."""
    address = f"\0handfast-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        assert notify(READY=1, STATUS="serving 2\nMAINPID=1\r\nSTOPPING=1")
        assert systemd.recv(1000) == b"READY=1\nSTATUS=serving 2 MAINPID=1 STOPPING=1"
        before = time.monotonic_ns() // 1000
        assert notify(RELOADING=1)
        found = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", systemd.recv(1000))
        assert found is not None
        assert before <= int(found[1]) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize("place", ["", "relative", "vsock:2:1", "/nowhere/notify", "@handfast-nobody", "/" + "x" * 200])
def test_without_systemd_nothing_is_told(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No systemd, or one that cannot be reached, is no error."""
    monkeypatch.setenv("NOTIFY_SOCKET", place)
    assert not notify(READY=1)
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify(READY=1)


@pytest.mark.parametrize(
    ("limit", "pid", "interval"),
    [
        ("30000000", "", 15.0),
        ("30000000", "ours", 15.0),
        ("30000000", "1", None),
        ("0", "", None),
        ("", "", None),
        ("-5", "", None),
        ("many", "", None),
        ("9" * 40, "", None),
    ],
)
def test_the_watchdog_is_asked_for(
    limit: str, pid: str, interval: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of WATCHDOG_USEC, if it is meant for this process."""
    monkeypatch.setenv("WATCHDOG_USEC", limit)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "ours" else pid)
    assert watchdog_interval() == interval


def test_the_units_of_the_manual_are_good(tmp_path: Path) -> None:
    """systemd finds nothing to say about the unit files that the manual shows."""
    files = dict(re.findall(r"^```ini (handfast\.\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    assert set(files) == {"handfast.service", "handfast.socket"}
    for name, text in files.items():
        command = f"ExecStart={sys.executable} "
        (tmp_path / name).write_text(re.sub(r"^ExecStart=\S+ ", command, text, flags=re.M))
    done = run("systemd-analyze", "verify", *(tmp_path / name for name in files), folder=tmp_path)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    broken = tmp_path / "broken.service"
    broken.write_text(files["handfast.service"] + "NoSuchSetting=1\n")
    assert "NoSuchSetting" in run("systemd-analyze", "verify", broken, folder=tmp_path).stderr
