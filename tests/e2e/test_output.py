"""Where a command's words go: pipes that are closed, disks that are full, streams that are not there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handfast.errors import Exit
from tests.e2e.kit import Caller, Outcome, check_refusal, serials
from tests.support.apps import App
from tests.support.programs import HANDFAST, Child, environment, run

VERBS = [("--help",), ("version",), ("version", "--json"), ("list", "--state", "state"), ("inspect", "state/root.crt")]
QUICK = 60.0  # seconds


@pytest.fixture(autouse=True)
def _here(state: Path, call: Caller, tmp_path: Path) -> None:
    """A state in the current folder, with enough in it to fill a pipe's first write."""
    call.done("issue", "web", "--out", "web", "--state", state)


def _child(*words: str | Path, stdout: int | None, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "handfast", *map(str, words)]
    return subprocess.run(line, stdout=stdout, stderr=stderr, text=True, timeout=QUICK, check=False)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_reader_that_goes_away_is_no_failure(verb: tuple[str, ...]) -> None:
    """Into a pipe that nobody reads any more, as with `| head -1`, a verb ends silently with exit 0."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = _child(*verb, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (Exit.OK, "")


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_full_disk_behind_standard_output_is_told(verb: tuple[str, ...]) -> None:
    """Output that cannot be written is exit 5, said on standard error, also where JSON was asked for."""
    with open("/dev/full", "w") as full:
        done = _child(*verb, stdout=full.fileno())
    assert done.returncode == Exit.STORE
    assert check_refusal(Outcome(done.returncode, "", done.stderr)) == "store.full"
    assert "standard output" in done.stderr


def test_what_was_issued_is_kept_when_it_cannot_be_told(tmp_path: Path, state: Path) -> None:
    """`issue` into a full standard output has written its files before it says so."""
    with open("/dev/full", "w") as full:
        done = _child("issue", "ops", "--out", "ops", "--state", state, stdout=full.fileno())
    assert done.returncode == Exit.STORE
    assert run(
        "openssl", "verify", "-CAfile", "ops/ca.crt", "-untrusted", "ops/ops.crt", "ops/ops.crt", folder=tmp_path
    )
    assert len(serials(state)) == 2


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_not_there(verb: tuple[str, ...], closed: str) -> None:
    """With standard streams closed a verb does its work, and no file that it opens takes their place."""
    ledger = Path("state/ledger.db").read_bytes()
    line = " ".join([sys.executable, "-m", "handfast", *verb, closed])
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=QUICK, check=False)
    assert done.returncode == Exit.OK
    assert done.stderr == ""
    assert Path("state/ledger.db").read_bytes() == ledger


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_a_failure_that_cannot_be_told_still_has_its_exit_code(closed: str) -> None:
    """Without a standard error the exit code speaks."""
    line = f"{sys.executable} -m handfast list --state nowhere {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=QUICK, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (Exit.NOT_FOUND, "", "")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_path_that_is_no_text_is_shown_all_the_same(tmp_path: Path, encoding: str) -> None:
    """Paths are bytes; one that is not UTF-8, or that the terminal cannot show, is written to and told."""
    odd = os.fsdecode(b"o\xff\xc3\xa9")
    env = environment(PYTHONIOENCODING=encoding)
    for words in (("issue", "odd", "--state", "state", "--out", odd), ("inspect", f"{odd}/odd.crt")):
        line = [*HANDFAST, *words]
        done = subprocess.run(line, capture_output=True, env=env, timeout=QUICK, check=False)
        assert (done.returncode, done.stderr) == (Exit.OK, b"")
    assert (tmp_path / odd / "odd.key").exists()


def test_a_message_is_one_line_without_control_characters(call: Caller) -> None:
    """A file's name may hold line ends and terminal codes; what is printed of it holds neither."""
    outcome = call("inspect", "a\nhandfast: all is well [ok]\x1b[2J\u202e")
    assert check_refusal(outcome) == "input.missing"
    assert outcome.err.isascii()
    assert "\x1b" not in outcome.err


def test_interrupting_a_verb_says_so(tmp_path: Path) -> None:
    """Ctrl-C while a server keeps `inspect` waiting ends it with one line and a stable exit code."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(QUICK)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with Child((*HANDFAST, "inspect", address), tmp_path, merge=False) as child, listener.accept()[0] as waiting:
            assert waiting.recv(1)
            child._process.send_signal(signal.SIGINT)
            assert child._process.wait(QUICK) == Exit.REFUSED
    assert child.errors[-1:] == ["handfast: interrupted before it was done [interrupted]"]


def test_up_whose_log_nobody_reads_lets_nobody_through(tmp_path: Path) -> None:
    """`up --json | head -1` gives its ready line; with the log gone nothing more is forwarded, and it stops cleanly."""
    with App() as app:
        line = [*HANDFAST, "up", "--to", app.address, "--listen", "127.0.0.1:0", "--state", "state", "--json"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                ready = json.loads(process.stdout.readline())
                process.stdout.close()
                files = ("--cacert", ready["ca"], "--cert", ready["client"]["cert"], "--key", ready["client"]["key"])
                deadline = time.monotonic() + QUICK
                while (body := run("curl", "-sS", *files, ready["url"], folder=tmp_path).stdout) == "Hello World\n":
                    assert time.monotonic() < deadline
                assert json.loads(body)["error"] == "guard.log_failed"
            finally:
                process.terminate()
            assert process.wait(QUICK) == Exit.OK
            assert "Traceback" not in process.stderr.read()
