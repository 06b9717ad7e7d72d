"""What the process may still do once it is set up: another user, no new privileges, few files and system calls.

Owns the calls into the kernel for that (setresuid(2), prctl(2), landlock(7)); knows nothing of what the files are.
Which system calls it gives up stands in `guard/seccomp.py`.
"""

from __future__ import annotations

import ctypes
import errno
import grp
import os
import platform
import pwd
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from handfast.errors import HandfastError, Reason
from handfast.guard.seccomp import MACHINES, refusing

# prctl(2)
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_PR_SET_NO_NEW_PRIVS = 38

# landlock(7); the numbers are the same on every architecture but alpha.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_RULE_PATH, _RULE_PORT = 1, 2
_NEWEST = 6  # the newest ABI that we speak; newer kernels speak it too

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 9
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILES_BY_ABI = {1: (1 << 13) - 1, 2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}  # what each ABI added
_ON_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV  # the rest is for folders
_READ = _READ_FILE | _READ_DIR
_WRITE = _READ | _WRITE_FILE | _TRUNCATE | _MAKE_REG | _MAKE_DIR | _MAKE_SOCK | _REMOVE_FILE | _REMOVE_DIR | _REFER
_BIND_TCP, _CONNECT_TCP = 1, 2
_ABSTRACT_SOCKETS, _SIGNALS = 1, 2
_NOBODY = (1 << 32) - 1  # (uid_t) -1: "leave as it is", setresuid(2)
_MISSING_FROM = {2: "moves between folders", 3: "truncation", 4: "tcp ports", 5: "device ioctls", 6: "signals"}

# Not built in; switched off at boot; or a container's filter that answers so to calls it does not know.
_NO_LANDLOCK = {errno.ENOSYS: "ENOSYS", errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EPERM: "EPERM"}
# Not built in (prctl(2)); or a container's filter that answers so.
_NO_SECCOMP = {errno.EINVAL: "EINVAL", errno.ENOSYS: "ENOSYS", errno.EPERM: "EPERM"}

# What name look-up, time zones and the C library read, beside Python's own files.
_SYSTEM = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/host.conf", "/etc/services"),
    *("/etc/protocols", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/ld.so.cache", "/etc/ssl/openssl.cnf"),
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/run/systemd/resolve"),
    *("/dev/null", "/dev/urandom", "/proc/self"),
)


def drop_privileges(user: str, group: str | None = None) -> None:
    """Become a user for good, and give up ever gaining privileges by a set-user-ID program.

    `user` and `group` are names or numbers; without a group it is the user's own. The user's further groups come
    along; those of root do not. Call it before threads start, after the ports below 1024 are bound. A process that
    is this user already stays so. Raises HandfastError (GUARD_PRIVILEGES), also when the kernel lets us back: end
    the process then.
    """
    uid, gid, groups = _account(user, group)
    try:
        if (os.getresuid(), os.getresgid()) != ((uid,) * 3, (gid,) * 3):
            # Groups first and the user last: once not root, nothing else can be changed (CERT POS36-C).
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    except OSError as error:
        raise _no_privileges(user, os.strerror(error.errno or 0).lower()) from None
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3:
        raise _no_privileges(user, "the kernel did not make the change")
    regains: tuple[Callable[[], None], ...] = (
        lambda: os.setresuid(0, 0, 0),
        lambda: os.setresgid(0, 0, 0),
        lambda: os.setgroups([0]),
    )
    for regain in regains:
        try:
            regain()
        except OSError:
            continue
        raise _no_privileges(user, "root could be had back (is a capability kept?)")


def forbid_core_dumps() -> None:
    """Keep keys out of core dumps, and out of the reach of debuggers of the same user (PR_SET_DUMPABLE).

    Call it after `drop_privileges` and again in each program that is started: exec(2) forgets it, fork(2) does not.
    Raises HandfastError (GUARD_SANDBOX). Does nothing where there is no prctl.
    """
    if sys.platform != "linux":
        return
    try:
        _prctl(_PR_SET_DUMPABLE, 0)
    except OSError as error:
        raise _not_confined(os.strerror(error.errno or 0).lower()) from None


def end_with_parent(number: int) -> None:
    """Have this process get a signal when its parent dies, by kill -9 too. Nothing where the kernel is not Linux.

    A change of user forgets it (prctl(2)), so ask anew after `drop_privileges`; then look whether the parent is
    still there.
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, number)


def runtime_paths() -> list[Path]:
    """What Python and the C library may read at any time: give them to `confine` beside the guard's own files."""
    python = {sys.prefix, sys.base_prefix, *filter(os.path.isabs, sys.path)}
    return [Path(path) for path in (*sorted(python), *_SYSTEM) if os.path.exists(path)]


def confine(
    read: Iterable[Path],
    write: Iterable[Path] = (),
    execute: Iterable[Path] = (),
    *,
    bind: Iterable[int] | None = None,
    connect: Iterable[int] | None = None,
) -> str:
    """Let this process open only these files, by Landlock; return one sentence that says what was done.

    A folder stands for all that is below it. A file stands for its inode alone: where files are replaced by
    renaming, as `handfast` and most tools do, give their folder, or the new file cannot be read. What is open
    stays open. `write` allows reading too; `execute` is for programs to start, with their loader
    (`/lib64/ld-linux-x86-64.so.2`). `bind` and `connect` are the TCP
    ports that may be listened on or dialled; None leaves them free.

    What the kernel is too old for is left out and told; without Landlock nothing is confined and that is told: ask
    for the sentence in the log. A path that this user cannot reach is told and stays
    forbidden.

    Landlock holds for the calling thread and what it starts, not for threads that run already: call it early.
    It holds for the programs started later as well, and cannot be taken back: with a hand-over, confine the
    workers, not the supervisor. From ABI 6, signals and abstract sockets do not reach outside either, but for a
    systemd that waits at an abstract address. Raises HandfastError (GUARD_SANDBOX), and ValueError when other
    threads run.
    """
    if thread_count() != 1:
        raise ValueError("confine() holds for one thread: call it before others start")
    abi = _landlock_abi()
    if isinstance(abi, str):
        return f"not confined: this kernel has no Landlock ({abi})"
    files = 0
    for since, added in _FILES_BY_ABI.items():
        files |= added if since <= abi else 0
    ports = [] if abi < 4 else [(_BIND_TCP, bind), (_CONNECT_TCP, connect)]
    net = sum(right for right, allowed in ports if allowed is not None)
    try:
        ruleset = _create_ruleset(abi, files, net)
        try:
            grants = ((_READ, read), (_WRITE, write), (_READ_FILE | _EXECUTE, execute))
            missing = [
                path for right, paths in grants for path in paths if not _allow_path(ruleset, path, right & files)
            ]
            for right, allowed in ports:
                for port in allowed or ():
                    _syscall(_ADD_RULE, ruleset, _RULE_PORT, struct.pack("=QQ", right, port), 0)
            _prctl(_PR_SET_NO_NEW_PRIVS, 1)  # or only root might confine itself
            _syscall(_RESTRICT_SELF, ruleset, 0)
        finally:
            os.close(ruleset)
    except OSError as error:
        if error.errno == errno.E2BIG:  # LANDLOCK_MAX_NUM_LAYERS, landlock(7): inherited over as many hand-overs
            return "confined by Landlock as the process before this one was"
        raise _not_confined(os.strerror(error.errno or 0).lower()) from None
    return _sentence(abi, missing, ports=bind is not None or connect is not None)


def refuse_calls(*, programs: bool) -> str:
    """Give up the system calls that a proxy never makes; return a few words that say what was done.

    `programs`: starting a program is given up too. Holds for the calling thread and what it starts, cannot be taken
    back, and adds to a filter that is there. What is refused fails with EPERM. Where the kernel, or the
    architecture, is none that we know how to ask, nothing is refused and that is told. Raises HandfastError
    (GUARD_SANDBOX), and ValueError when other threads run.
    """
    if thread_count() != 1:
        raise ValueError("refuse_calls() holds for one thread: call it before others start")
    machine = MACHINES.get(platform.machine()) if sys.platform == "linux" and sys.maxsize > 1 << 32 else None
    if machine is None:
        return f"no seccomp filter: it is {sys.platform} on {platform.machine()}"
    program = refusing(machine, programs=programs)
    lines = ctypes.create_string_buffer(program, len(program))
    packed = struct.pack("@HP", len(program) // 8, ctypes.addressof(lines))  # struct sock_fprog
    try:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_SECCOMP, _MODE_FILTER, packed)
    except OSError as error:
        if error.errno in _NO_SECCOMP:
            return f"no seccomp filter: this kernel takes none ({_NO_SECCOMP[error.errno]})"
        if error.errno == errno.ENOMEM:  # seccomp(2): inherited over as many hand-overs
            return "seccomp as the process before this one"
        raise _not_confined(os.strerror(error.errno or 0).lower()) from None
    return f"seccomp refuses {len(machine.others) + len(machine.programs) * programs} system calls"


def _sentence(abi: int, missing: list[Path], *, ports: bool) -> str:
    held = ["files"] + ["tcp ports"] * (ports and abi >= 4) + ["signals"] * (abi >= 6)
    free = [what for since, what in _MISSING_FROM.items() if abi < since and (ports or since != 4)]
    text = f"confined by Landlock (ABI {abi}): {', '.join(held)}"
    if free:
        text += f"; this kernel cannot confine {', '.join(free)}"
    if missing:
        text += f"; out of reach, so forbidden: {', '.join(map(str, missing))}"
    return text


def _create_ruleset(abi: int, files: int, net: int) -> int:
    scoped = _SIGNALS if os.environ.get("NOTIFY_SOCKET", "").startswith("@") else _SIGNALS | _ABSTRACT_SOCKETS
    fields = (files,) if abi < 4 else (files, net) if abi < 6 else (files, net, scoped)
    packed = struct.pack(f"={len(fields)}Q", *fields)
    return _syscall(_CREATE_RULESET, packed, ctypes.c_size_t(len(packed)), 0)


def _allow_path(ruleset: int, path: Path, rights: int) -> bool:
    """Add a rule; False when there is no such path, or none that this user can reach."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except OSError as error:
        raise _not_confined(f"{path}: {os.strerror(error.errno or 0).lower()}") from None
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _ON_A_FILE
        _syscall(_ADD_RULE, ruleset, _RULE_PATH, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)
    return True


def _landlock_abi() -> int | str:
    """The ABI to speak, or the name of the error where there is none."""
    if sys.platform != "linux":
        return f"it is {sys.platform}"
    try:
        return min(_syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION), _NEWEST)
    except OSError as error:
        if error.errno in _NO_LANDLOCK:
            return _NO_LANDLOCK[error.errno]
        raise _not_confined(os.strerror(error.errno or 0).lower()) from None


def thread_count() -> int:
    """How many threads this process has, those of C libraries included where /proc tells."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def _account(user: str, group: str | None) -> tuple[int, int, list[int]]:
    """The numbers of a user and group, and of all the groups that the process will have."""
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
        uid, gid, name = entry.pw_uid, entry.pw_gid, entry.pw_name
    except (KeyError, OverflowError, ValueError):
        if not user.isdecimal():
            raise _no_privileges(user, "there is no such user") from None
        if group is None:
            raise _no_privileges(user, "it is known by number only, so a group must be given") from None
        uid, gid, name = int(user), -1, ""
    if group is not None:
        gid = _group(user, group)
    if uid == 0 or gid == 0:
        raise _no_privileges(user, "that is root, or root's group")
    if max(uid, gid) >= _NOBODY:
        raise _no_privileges(user, "the number is too large")
    return uid, gid, sorted({gid, *os.getgrouplist(name, gid)} - {0}) if name else [gid]


def _group(user: str, group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise _no_privileges(user, f"there is no group {group!r}") from None


def _prctl(option: int, value: int, pointed: bytes | None = None) -> None:
    """Raises OSError."""
    rest = [ctypes.c_ulong(0)] * 2
    third = ctypes.c_ulong(0) if pointed is None else ctypes.c_char_p(pointed)
    if _libc().prctl(ctypes.c_int(option), ctypes.c_ulong(value), third, *rest) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _syscall(number: int, *arguments: object) -> int:
    """Integers are passed as longs, bytes by their address. Raises OSError."""
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _libc().syscall(ctypes.c_long(number), *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), "syscall")
    return result


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _no_privileges(user: str, detail: str) -> HandfastError:
    return HandfastError(Reason.GUARD_PRIVILEGES, user=user, detail=detail)


def _not_confined(detail: str) -> HandfastError:
    return HandfastError(Reason.GUARD_SANDBOX, detail=detail)
