"""The filter of system calls that a serving process never makes, as the kernel takes it (seccomp(2)).

Pure: it makes a program of classic BPF; `guard/sandbox.py` gives it to the kernel. It names what is refused, not
what is allowed: a list of what Python and its libraries may call would break with the next C library. What it takes
from a process that was taken over: to start programs, to read other processes, to reach the kernel's less trodden
ways.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from errno import ENOSYS, EPERM


@dataclass(frozen=True, slots=True)
class Machine:
    """An architecture: how seccomp calls it, and the numbers of its system calls."""

    audit: int  # AUDIT_ARCH_*, <linux/audit.h>
    programs: dict[str, int]  # calls that start a program
    others: dict[str, int]
    clone: int
    clone3: int
    foreign: int | None = None  # the first number that is another architecture's, in the same table


# Their numbers on x86_64 (<asm/unistd_64.h>) and on aarch64 (<asm-generic/unistd.h>), which lacks some.
_PROGRAMS = {"execve": (59, 221), "execveat": (322, 281)}
_OTHERS: dict[str, tuple[int, int | None]] = {
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
}


def _numbers(table: Mapping[str, tuple[int, int | None]], column: int) -> dict[str, int]:
    return {name: number for name, numbers in table.items() if (number := numbers[column]) is not None}


MACHINES = {  # by uname(2)
    "x86_64": Machine(0xC000003E, _numbers(_PROGRAMS, 0), _numbers(_OTHERS, 0), 56, 435, foreign=0x40000000),  # x32
    "aarch64": Machine(0xC00000B7, _numbers(_PROGRAMS, 1), _numbers(_OTHERS, 1), 220, 435),
}

# <linux/bpf_common.h>, <linux/seccomp.h>; offsets in struct seccomp_data.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FLAGS = 0, 4, 16  # the last: the lower half of clone's first argument, on both machines
_ALLOW, _REFUSE, _UNKNOWN = 0x7FFF0000, 0x00050000 | EPERM, 0x00050000 | ENOSYS
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET: clone(2)


def refusing(machine: Machine, *, programs: bool) -> bytes:
    """Make the filter: an array of struct sock_filter. What is refused fails with EPERM.

    `programs`: whether starting a program is refused too. Calls of another architecture than the process's are, and
    clone(2) into new namespaces. A filter cannot see what clone3(2) is asked for: it is told to be unknown, and C
    libraries use clone(2) then.
    """
    numbers = [*machine.others.values(), *(machine.programs.values() if programs else ())]
    tests = [(_IF_EQUAL, number) for number in numbers]
    if machine.foreign is not None:
        tests.append((_IF_AT_LEAST, machine.foreign))
    left = len(tests) + 4  # instructions until ALLOW, behind which REFUSE stands: how far a test has to jump
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 0, left + 2, machine.audit),
        (_LOAD, 0, 0, _NUMBER),
        *((test, left - at, 0, number) for at, (test, number) in enumerate(tests)),
        (_IF_EQUAL, 5, 0, machine.clone3),
        (_IF_EQUAL, 0, 2, machine.clone),
        (_LOAD, 0, 0, _FLAGS),
        (_IF_ANY_BIT, 1, 0, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _UNKNOWN),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
