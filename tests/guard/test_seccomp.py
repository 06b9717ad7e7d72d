"""The filter of system calls: what a process that serves can no longer ask of the kernel."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from typing import Any

import pytest

from handfast.guard.seccomp import MACHINES
from tests.support.programs import environment

# Prefixed to what runs in a child. `call` makes a system call with no argument that makes sense.
COMMON = """
import ctypes, errno, json, os, platform, socket, subprocess, sys, threading
from handfast.guard.sandbox import confine, refuse_calls, runtime_paths, thread_count
from handfast.guard.seccomp import MACHINES

libc = ctypes.CDLL(None, use_errno=True)
machine = MACHINES[platform.machine()]

def call(number):
    senseless = [ctypes.c_long(-1)] * 6
    return errno.errorcode[ctypes.get_errno()] if libc.syscall(ctypes.c_long(number), *senseless) == -1 else "done"

def attempt(do):
    try:
        return str(do())
    except Exception as error:
        return type(error).__name__

def say(**told):
    print(json.dumps(told))
"""
SEES = {"execve": "EFAULT", "execveat": "EFAULT", "pidfd_getfd": "EINVAL", "unshare": "EINVAL", "kcmp": "ESRCH"}


def child(body: str) -> dict[str, Any]:
    """Run code in a process of its own; return what it said."""
    line = [sys.executable, "-c", COMMON + body]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_what_is_named_is_refused() -> None:
    """Every call that the filter names fails with EPERM; one that it does not name is the kernel's to answer."""
    body = """
said = refuse_calls(programs=True)
named = machine.programs | machine.others
say(said=said, got={name: call(number) for name, number in named.items()},
    close=call({"x86_64": 3, "aarch64": 57}[platform.machine()]))
"""
    said = child(body)
    assert set(said["got"].values()) == {"EPERM"}
    assert said["said"] == f"seccomp refuses {len(said['got'])} system calls"
    assert said["close"] == "EBADF"


def test_without_it_the_kernel_answers() -> None:
    """The same senseless calls without a filter fail for what they are, so it is the filter that refuses them."""
    body = f"say(got={{name: call((machine.programs | machine.others)[name]) for name in {tuple(SEES)}}})"
    assert child(body)["got"] == SEES


@pytest.mark.parametrize("programs", [True, False])
def test_programs_start_only_where_they_may(programs: bool) -> None:
    """A worker starts nothing; a guard that has to hand over can."""
    body = f"""
refuse_calls(programs={programs})
say(started=attempt(lambda: subprocess.run([sys.executable, "-c", "print('x')"], capture_output=True).stdout),
    traced=call(machine.others["ptrace"]))
"""
    assert child(body) == {"started": "PermissionError" if programs else "b'x\\n'", "traced": "EPERM"}


def test_what_a_guard_does_still_works() -> None:
    """Threads, forks, names, sockets and files are as before, also together with Landlock."""
    body = """
confine([*runtime_paths()])
refuse_calls(programs=True)
def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.wait()[1])
def thread():
    kept = []
    runner = threading.Thread(target=kept.append, args=(1,))
    runner.start()
    runner.join()
    return kept
def talk():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        return server.accept()[0].send(b"x")
say(fork=attempt(fork), thread=attempt(thread), talk=attempt(talk), memory=attempt(lambda: os.memfd_create("x") > 0),
    name=attempt(lambda: bool(socket.getaddrinfo("localhost", 1))))
"""
    assert child(body) == {"fork": "7", "thread": "[1]", "talk": "1", "memory": "True", "name": "True"}


def test_new_namespaces_are_refused_however_asked_for() -> None:
    """clone(2) makes processes and threads, but no new user namespace; clone3(2), into which no filter can see, is told
    to be unknown. Without the filter both are the kernel's to answer.
    """
    body = """
CLONE_NEWUSER, SIGCHLD = 0x10000000, 17
def clone(flags):
    pid = libc.syscall(ctypes.c_long(machine.clone), ctypes.c_long(flags | SIGCHLD), *[ctypes.c_long(0)] * 4)
    if pid == 0:
        os._exit(0)
    if pid > 0:
        os.waitpid(pid, 0)
    return errno.errorcode[ctypes.get_errno()] if pid < 0 else "child"
before = call(machine.clone3), clone(0)
refuse_calls(programs=True)
say(before=before, after=(call(machine.clone3), clone(0), clone(CLONE_NEWUSER)))
"""
    said = child(body)
    assert said["before"][0] != "ENOSYS"
    assert said["before"][1] == "child"
    assert said["after"] == ["ENOSYS", "child", "EPERM"]


def test_it_adds_up_and_holds_for_children() -> None:
    """A second filter takes more away, never less, and what is forked has both."""
    body = """
refuse_calls(programs=False)
before = attempt(lambda: subprocess.run([sys.executable, "-c", "1"]).returncode)
refuse_calls(programs=True)
refuse_calls(programs=False)
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, call(machine.programs["execve"]).encode())
    os._exit(0)
os.wait()
say(before=before, after=os.read(reader, 10).decode())
"""
    assert child(body) == {"before": "0", "after": "EPERM"}


@pytest.mark.skipif(sys.maxsize < 1 << 32, reason="x32 is of 64-bit processors")
def test_another_architectures_numbers_are_refused() -> None:
    """A call by the number that x32 has for it does not slip past the list; where there is no x32, there is none."""
    body = """
refuse_calls(programs=True)
say(x32=call(0x40000000 + machine.programs["execve"]))
"""
    assert child(body)["x32"] in {"EPERM", "ENOSYS"}


def test_a_process_with_threads_is_not_filtered() -> None:
    """The filter would not hold for threads that run already, so that is an error."""
    body = """
go = threading.Event()
other = threading.Thread(target=go.wait)
other.start()
told = attempt(lambda: refuse_calls(programs=True))
go.set()
other.join()
while thread_count() > 1:  # the kernel's is gone a moment later
    pass
say(told=told, after=attempt(lambda: refuse_calls(programs=True))[:16])
"""
    assert child(body) == {"told": "ValueError", "after": "seccomp refuses "}


def test_an_unknown_architecture_is_told() -> None:
    """Where we do not know the numbers, nothing is refused, and the sentence says so."""
    said = child("platform.machine = lambda: 'pdp11'\nsay(said=refuse_calls(programs=True))")["said"]
    assert said == "no seccomp filter: it is linux on pdp11"


def test_a_kernel_that_takes_no_filter_is_told() -> None:
    """Where what is around us forbids a filter, the sentence says so, and the process goes on."""
    body = """
from handfast.guard.seccomp import Machine
prctl = {"x86_64": 157, "aarch64": 167}[platform.machine()]
MACHINES[platform.machine()] = Machine(machine.audit, {}, {"prctl": prctl}, machine.clone, machine.clone3)
say(first=refuse_calls(programs=False), second=refuse_calls(programs=False))
"""
    second = "no seccomp filter: this kernel takes none (EPERM)"
    assert child(body) == {"first": "seccomp refuses 1 system calls", "second": second}


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_the_numbers_are_right(name: str) -> None:
    """Each number is what libseccomp has for that call on that architecture."""
    machine, library = MACHINES[name], ctypes.CDLL("libseccomp.so.2")
    calls = machine.programs | machine.others | {"clone": machine.clone, "clone3": machine.clone3}
    resolve = library.seccomp_syscall_resolve_name_arch
    found = {call: resolve(ctypes.c_uint32(machine.audit), call.encode()) for call in calls}
    assert found == calls
    assert resolve(ctypes.c_uint32(machine.audit), b"no_such_call") < 0
