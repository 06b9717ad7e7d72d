from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import environment

# Prefixed to what runs in a child: `confined` is the sentence, `attempt` says what came of something.
COMMON = """
import ctypes, json, os, signal, socket, subprocess, sys, threading
from pathlib import Path
from handfast.errors import HandfastError
from handfast.guard.sandbox import *
from handfast.guard.sandbox import _landlock_abi

def attempt(do):
    try:
        return str(do())
    except HandfastError as error:
        return f"{error.reason.code}: {error}"
    except Exception as error:
        return type(error).__name__

def say(**told):
    print(json.dumps(told))
"""
NOBODY = 65534


def child(body: str, *words: object, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run code in a process of its own; return what it said."""
    line = [sys.executable, "-c", COMMON + body, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, env=env or environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def landlock() -> int | str:
    """The ABI of this kernel, or why it has none."""
    abi: int | str = child("say(abi=_landlock_abi())")["abi"]
    return abi


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    for name in ("inside", "outside", "spool"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path


FILES = """
home = Path(sys.argv[1])
before = open(home / "outside" / "file")
sentence = confine([*runtime_paths(), home / "inside", home / "missing"], [home / "spool"])
def write(path, text="new"):
    path.write_text(text)
    return "written"
say(
    sentence=sentence,
    read_inside=attempt((home / "inside" / "file").read_text),
    list_inside=attempt(lambda: os.listdir(home / "inside")),
    write_inside=attempt(lambda: write(home / "inside" / "file")),
    make_inside=attempt(lambda: write(home / "inside" / "new")),
    remove_inside=attempt((home / "inside" / "file").unlink),
    read_outside=attempt((home / "outside" / "file").read_text),
    list_outside=attempt(lambda: os.listdir(home / "outside")),
    read_shadow=attempt(Path("/etc/shadow").read_text),
    link_out=attempt(lambda: os.link(home / "outside" / "file", home / "spool" / "link")),
    through_link=attempt((home / "inside" / "way-out").read_text),
    open_before=before.read(),
    write_spool=attempt(lambda: write(home / "spool" / "other")),
    replace_spool=attempt(lambda: os.replace(home / "spool" / "other", home / "spool" / "file")),
    truncate_spool=attempt(lambda: os.truncate(home / "spool" / "file", 1)),
    read_spool=attempt((home / "spool" / "file").read_text),
    execute=attempt(lambda: subprocess.run(["/bin/true"], check=True)),
    lazy_import=attempt(lambda: __import__("xml.dom.minidom").__name__),
)
"""


def test_files_outside_are_out_of_reach(folders: Path) -> None:
    """After it, what was named can be read or written as named, and nothing else, whatever the user."""
    (folders / "inside" / "way-out").symlink_to(folders / "outside" / "file")
    said = child(FILES, folders)
    if isinstance(landlock(), str):
        assert said["sentence"].startswith("not confined: this kernel has no Landlock (")
        assert said["read_outside"] == "outside"
        return
    assert said["sentence"].startswith("confined by Landlock (ABI ")
    assert f"out of reach, so forbidden: {folders / 'missing'}" in said["sentence"]
    forbidden = "write_inside make_inside remove_inside read_outside list_outside read_shadow through_link execute"
    assert {name: said[name] for name in forbidden.split()} == dict.fromkeys(forbidden.split(), "PermissionError")
    assert said["link_out"] in ("PermissionError", "OSError")  # EACCES, or EXDEV: landlock(7)
    assert (said["read_inside"], said["open_before"]) == ("inside", "outside")
    assert "file" in said["list_inside"]
    assert (said["write_spool"], said["replace_spool"], said["read_spool"]) == ("written", "None", "n")
    assert said["lazy_import"] == "xml"


def test_without_it_all_of_it_can_be_done(folders: Path) -> None:
    """The same acts succeed when nothing is confined: it is the sandbox that forbids them."""
    body = FILES.replace("sentence = confine(", 'sentence = "none"; print(')
    (folders / "inside" / "way-out").symlink_to(folders / "outside" / "file")
    said = child(body, folders)
    assert (said["read_outside"], said["through_link"], said["write_inside"]) == ("outside", "outside", "written")
    assert not said["execute"].endswith("Error")


def test_a_replaced_file_needs_its_folder(folders: Path) -> None:
    """A rule for a file is lost when the file is replaced by renaming; a rule for its folder is not."""
    body = """
home, by_folder = Path(sys.argv[1]), sys.argv[2] == "folder"
reader, writer = os.pipe()
if os.fork() == 0:
    os.read(reader, 1)
    (home / "inside" / "new").write_text("new")
    os.replace(home / "inside" / "new", home / "inside" / "file")
    os._exit(0)
confine([*runtime_paths(), home / "inside" if by_folder else home / "inside" / "file"])
first = attempt((home / "inside" / "file").read_text)
os.write(writer, b"x")
os.wait()
say(first=first, then=attempt((home / "inside" / "file").read_text))
"""
    assert child(body, folders, "folder") == {"first": "inside", "then": "new"}
    (folders / "inside" / "file").write_text("inside")
    lost = "new" if isinstance(landlock(), str) else "PermissionError"
    assert child(body, folders, "file") == {"first": "inside", "then": lost}


def test_it_holds_for_children_and_cannot_be_taken_back(folders: Path) -> None:
    """Programs that are started stay inside, and a second call cannot give back what the first took."""
    body = """
home = Path(sys.argv[1])
programs = [Path("/bin"), Path("/usr/bin"), Path("/lib64"), Path("/lib"), Path("/usr/lib")]
confine([*runtime_paths(), home / "inside"], execute=programs)
def cat(name):
    return subprocess.run(["/bin/cat", home / name / "file"], capture_output=True, text=True).stdout
inside, outside = attempt(lambda: cat("inside")), attempt(lambda: cat("outside"))
again = attempt(lambda: confine([Path("/")], execute=programs))
say(inside=inside, outside=outside, again=again, then=attempt((home / "outside" / "file").read_text))
"""
    said = child(body, folders)
    assert said["inside"] == "inside"
    if isinstance(landlock(), str):
        assert (said["outside"], said["then"]) == ("outside", "outside")
    else:
        assert said["again"].startswith("confined")
        assert (said["outside"], said["then"]) == ("", "PermissionError")


def test_ports_are_held_if_asked(folders: Path) -> None:
    """Where the kernel can, only the given TCP ports are dialled and bound; unasked, all are free."""
    body = """
allowed, other, asked = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "asked"
ports = {"bind": [0], "connect": [allowed]} if asked else {}
sentence = confine(runtime_paths(), **ports)
def dial(port):
    socket.create_connection(("127.0.0.1", port), 5).close()
def bind(port):
    socket.create_server(("127.0.0.1", port)).close()
say(sentence=sentence, allowed=attempt(lambda: dial(allowed)), other=attempt(lambda: dial(other)),
    bind=attempt(lambda: bind(0)), bind_other=attempt(lambda: bind(int(sys.argv[4]))))
"""
    abi = landlock()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        with socket.create_server(("127.0.0.1", 0)) as three:
            spare = three.getsockname()[1]
        places = (one.getsockname()[1], two.getsockname()[1])
        asked, unasked = child(body, *places, "asked", spare), child(body, *places, "unasked", spare)
    results = ("allowed", "other", "bind", "bind_other")
    assert [unasked[name] for name in results] == ["None"] * 4
    if isinstance(abi, int) and abi >= 4:
        assert [asked[name] for name in results] == ["None", "PermissionError", "None", "PermissionError"]
        assert "tcp ports" in asked["sentence"]
        assert "tcp ports" not in unasked["sentence"]
    else:
        assert [asked[name] for name in results] == ["None"] * 4
        assert "this kernel" in asked["sentence"]


def test_signals_do_not_leave_the_sandbox() -> None:
    """From ABI 6 a confined process cannot signal those outside, nor reach their abstract sockets."""
    body = """
outside = socket.socket(socket.AF_UNIX)
outside.bind(f"\\0handfast-{os.getpid()}")
outside.listen()
pid = os.fork()
if pid == 0:
    sentence = confine(runtime_paths())
    def dial():
        with socket.socket(socket.AF_UNIX) as plug:
            plug.connect(outside.getsockname())
    say(sentence=sentence, kill=attempt(lambda: os.kill(os.getppid(), 0)), own=attempt(lambda: os.kill(os.getpid(), 0)),
        dial=attempt(dial))
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
"""
    abi = landlock()
    held = isinstance(abi, int) and abi >= 6
    said = child(body)
    refused = "PermissionError" if held else "None"
    assert (said["kill"], said["own"], said["dial"]) == (refused, "None", refused)
    assert ("signals" in said["sentence"].partition(";")[0]) is held
    with_systemd = child(body, env=environment(NOTIFY_SOCKET="@systemd"))
    assert with_systemd["dial"] == "None"  # or the watchdog would kill us


@pytest.mark.parametrize("abi", range(1, 7))
def test_older_kernels_do_what_they_can(folders: Path, abi: int) -> None:
    """Spoken to as each ABI is, the kernel takes the rules, and what that ABI lacks is told."""
    body = """
import handfast.guard.sandbox as sandbox
sandbox._NEWEST = int(sys.argv[2])
home = Path(sys.argv[1])
say(sentence=confine([*runtime_paths(), home / "inside"], [home / "spool"], bind=[0]),
    inside=attempt((home / "inside" / "file").read_text), outside=attempt((home / "outside" / "file").read_text))
"""
    said = child(body, folders, abi)
    found = landlock()
    if isinstance(found, str):
        assert said["sentence"] == f"not confined: this kernel has no Landlock ({found})"
        return
    assert (said["inside"], said["outside"]) == ("inside", "PermissionError")
    spoken = min(abi, found)
    assert said["sentence"].startswith(f"confined by Landlock (ABI {spoken}): files")
    for since, what in ((2, "moves between folders"), (3, "truncation"), (4, "tcp ports"), (6, "signals")):
        lacking = said["sentence"].partition("cannot confine ")[2].partition(";")[0]
        assert (what in lacking) is (spoken < since)


# A seccomp filter that answers one error to landlock_create_ruleset(2), as kernels without it do: seccomp(2).
NO_LANDLOCK = """
import struct
def without_landlock(error):
    rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(packed)))
    libc = ctypes.CDLL(None, use_errno=True)
    ulong = ctypes.c_ulong
    assert libc.prctl(38, ulong(1), ulong(0), ulong(0), ulong(0)) == 0
    assert libc.prctl(22, ulong(2), program, ulong(0), ulong(0)) == 0, ctypes.get_errno()
"""


@pytest.mark.parametrize(("error", "name"), [(38, "ENOSYS"), (95, "EOPNOTSUPP"), (1, "EPERM")])
def test_a_kernel_without_landlock_is_told(folders: Path, error: int, name: str) -> None:
    """Where the kernel, or a container's filter, has no Landlock, that is said and the process goes on."""
    body = NO_LANDLOCK + "without_landlock(int(sys.argv[2]))\nhome = Path(sys.argv[1])\n"
    body += "say(sentence=confine([home]), outside=attempt((home / 'outside' / 'file').read_text))"
    said = child(body, folders, error)
    expected = landlock() if isinstance(landlock(), str) else name
    assert said == {"sentence": f"not confined: this kernel has no Landlock ({expected})", "outside": "outside"}


def test_another_error_is_not_taken_for_an_old_kernel(folders: Path) -> None:
    """An error that does not mean absence stops the start: nothing runs free that should be confined."""
    body = NO_LANDLOCK + "without_landlock(12)\nsay(said=attempt(lambda: confine([Path('/')])))"
    assert child(body)["said"] == "guard.sandbox: this process cannot be confined: cannot allocate memory"


def test_a_process_with_threads_is_not_confined() -> None:
    """Landlock would leave other threads free, so a process that has some is refused."""
    body = "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    body += "say(said=attempt(lambda: confine([])))\nsys.stdout.flush()\nos._exit(0)"
    assert child(body)["said"] == "ValueError"


DROP = """
secret = Path(sys.argv[3])
said = attempt(lambda: drop_privileges(*sys.argv[1:3]) if sys.argv[2] else drop_privileges(sys.argv[1]))
status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\\t" in line)
say(said=said, uids=os.getresuid(), gids=os.getresgid(), groups=os.getgroups(), no_new_privs=status["NoNewPrivs"],
    caps=[status["CapPrm"], status["CapEff"]], secret=attempt(secret.read_text),
    regain=[attempt(lambda: os.setuid(0)), attempt(lambda: os.setgid(0)), attempt(lambda: os.setgroups([0]))])
"""
ROOT = os.geteuid() == 0


@pytest.mark.parametrize(
    ("user", "group", "gid"),
    [("nobody", "", NOBODY), ("65534", "", NOBODY), ("nobody", "daemon", 1), ("12345", "7", 7)],
)
def test_privileges_are_dropped_for_good(tmp_path: Path, user: str, group: str, gid: int) -> None:
    """Root becomes the user in all ids and groups, reads root's files no more, and has no way back."""
    secret = tmp_path / "secret"
    secret.write_text("key")
    secret.chmod(0o600)
    said = child(DROP, user, group, secret)
    if not ROOT:
        assert said["said"].startswith("guard.privileges: cannot run as the user")
        return
    uid = 12345 if user == "12345" else NOBODY
    assert said["said"] == "None"
    assert (said["uids"], said["gids"]) == ([uid] * 3, [gid] * 3)
    assert gid in said["groups"]
    assert 0 not in said["groups"]
    assert said["no_new_privs"] == "1"
    assert {int(mask, 16) for mask in said["caps"]} == {0}
    assert said["secret"] == "PermissionError"
    assert said["regain"] == ["PermissionError"] * 3


@pytest.mark.parametrize(
    ("user", "group", "words"),
    [
        ("root", "", "that is root, or root's group"),
        ("0", "", "that is root, or root's group"),
        ("nobody", "root", "that is root, or root's group"),
        ("no-such-user", "", "there is no such user"),
        ("nobody", "no-such-group", "there is no group 'no-such-group'"),
        ("12345", "", "it is known by number only, so a group must be given"),
        ("4294967295", "7", "the number is too large"),
        ("99999999999999999999", "7", "the number is too large"),
        ("", "", "there is no such user"),
    ],
)
def test_a_change_that_cannot_be_is_refused(tmp_path: Path, user: str, group: str, words: str) -> None:
    """A user that is root or nobody knows stops the start; nothing has changed by then."""
    said = child(DROP, user, group, tmp_path)
    assert said["said"] == f"guard.privileges: cannot run as the user {user}: {words}"
    assert said["uids"] == [os.getuid()] * 3


def test_only_root_can_change(tmp_path: Path) -> None:
    """One who is not root stays himself, and cannot become another."""
    body = """
if os.geteuid() == 0:
    drop_privileges("nobody")
me = str(os.getuid())
say(same=attempt(lambda: drop_privileges(me, str(os.getgid()))), other=attempt(lambda: drop_privileges("daemon")))
"""
    said = child(body)
    assert said["same"] == "None"
    assert said["other"] == "guard.privileges: cannot run as the user daemon: operation not permitted"


def test_a_way_back_to_root_is_noticed() -> None:
    """Where a capability survives the change, the drop is refused instead of believed."""
    body = """
libc = ctypes.CDLL(None, use_errno=True)
ulong = ctypes.c_ulong
if os.geteuid() == 0:
    assert libc.prctl(28, ulong(1 << 2 | 1 << 3), ulong(0), ulong(0), ulong(0)) == 0  # SECBIT_NO_SETUID_FIXUP
say(said=attempt(lambda: drop_privileges("nobody")))
"""
    words = "root could be had back (is a capability kept?)" if ROOT else "operation not permitted"
    assert child(body)["said"] == f"guard.privileges: cannot run as the user nobody: {words}"


def test_core_dumps_and_debuggers_get_nothing() -> None:
    """After it the process is not dumpable, its children neither, and another of its user cannot read its memory."""
    body = """
PR_GET_DUMPABLE = 3
dumpable = lambda: ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
me, (reader, writer) = os.getpid(), os.pipe()
def asked_by_a_child():
    pid = os.fork()
    if pid == 0:
        os.write(writer, attempt(lambda: open(f"/proc/{me}/mem", "rb").close()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(reader, 100).decode()
before = (dumpable(), asked_by_a_child())
forbid_core_dumps()
if os.fork() == 0:
    os.write(writer, b"%d" % dumpable())
    os._exit(0)
os.wait()
say(before=before, inherited=os.read(reader, 10).decode(), after=(dumpable(), asked_by_a_child()))
"""
    assert child(body) == {"before": [1, "None"], "inherited": "0", "after": [0, "PermissionError"]}


def test_it_all_works_together() -> None:
    """A worker that changed its user, is not dumpable and is confined still reads, watches and finds names."""
    body = """
from handfast.guard.watch import Watch, look
home = Path(sys.argv[1])
find = lambda: bool(socket.getaddrinfo("localhost", 1))
find()  # Python's own files may be out of reach of the user
if os.geteuid() == 0:
    drop_privileges("nobody")
forbid_core_dumps()
end_with_parent(signal.SIGTERM)
sentence = confine([*runtime_paths(), home])
watch = Watch([home / "file"])
first = watch.changed()
say(inside=attempt((home / "file").read_text), found=attempt(find), path=str(look(home / "file")[0]), first=first,
    passwd=attempt(Path("/etc/passwd").read_text)[:4], outside=attempt(lambda: os.listdir("/var")), said=sentence)
"""
    with tempfile.TemporaryDirectory() as folder:  # those of pytest are closed to others
        home = Path(folder)
        home.chmod(0o755)
        (home / "file").write_text("inside")
        said = child(body, home)
        assert (said["inside"], said["found"], said["first"], said["passwd"]) == ("inside", "True", [], "root")
        assert said["path"] == str((home / "file").resolve())
    if not isinstance(landlock(), str):
        assert said["outside"] == "PermissionError", said["said"]
