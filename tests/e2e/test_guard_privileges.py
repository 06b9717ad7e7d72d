"""Rights: root's are given up once the ports are bound, and the sandbox closes the rest of the machine."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.guard_kit import Client, Files, admin_get, guarding, named
from tests.e2e.kit import Caller
from tests.support.apps import App
from tests.support.programs import HANDFAST, Child, free_port
from tests.support.waiting import until

NOBODY = pwd.getpwnam("nobody")
CONFIG = """
[admin]
listen = "127.0.0.1:{admin}"
[[listener]]
listen = "127.0.0.1:{port}"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "{to}"
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that another user can reach; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="handfast-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def give(folder: Path) -> None:
    """Make the files another user's."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)


def low_port(turn: int) -> int:
    """A port that root alone may bind, and that is free; tests with an odd turn never get one of an even turn's."""
    while True:
        port = random.randrange(600 + turn % 2, 1000, 2)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def identities(pid: int) -> dict[str, list[str]]:
    """What /proc says a process is: its users, groups and capabilities."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.partition(":")[0]: line.split()[1:] for line in lines}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@as_root
@pytest.mark.parametrize("workers", [1, 2])
def test_root_binds_and_is_root_no_more(shared: Path, workers: int) -> None:
    """A port below 1024 is bound, then every process is the user and has no way back; it serves, takes new
    certificates that the user may read, and shows its metrics.
    """
    files, admin, port = Files(shared), free_port(), low_port(workers)
    alice = files.client()
    give(shared)
    top = f'user = "nobody"\nworkers = {workers}\n'
    with App() as app, guarding(shared, CONFIG.format(admin=admin, port=port, to=app.address), top=top) as guard:
        assert alice.ask(port).status == 200
        for pid in (guard.pid, *children(guard.pid)):
            who = identities(pid)
            assert (set(who["Uid"]), set(who["Gid"])) == ({str(NOBODY.pw_uid)}, {str(NOBODY.pw_gid)})
            assert (who["CapEff"], who["CapPrm"], who["NoNewPrivs"]) == (["0" * 16], ["0" * 16], ["1"])
        for path in (*files.ca.server().save(shared, "next"),):
            os.chown(path, NOBODY.pw_uid, NOBODY.pw_gid)
            path.rename(path.with_stem("server"))
        for _ in range(workers):
            assert guard.next("reload")["outcome"] == "taken"
        assert alice.ask(port).status == 200
        until(lambda: admin_get(admin, "/readyz")[0] == 200, "200 of /readyz")
        assert b"handfast_handshakes_total" in admin_get(admin, "/metrics")[1]


@as_root
@pytest.mark.parametrize("workers", [1, 2])
def test_the_authority_of_the_user_is_open_to_it(call: Caller, shared: Path, workers: int) -> None:
    """With `user` and `state` together the ledger is opened as that user: its clients come in, and a revocation
    counts. A state folder of root's is refused at the start, by name.
    """
    state = shared / "state"
    call.done("authority", "init", "--state", state)
    server = call.done("issue", "localhost", "127.0.0.1", "--state", state, "--out", shared / "server")
    alice = Client.of(call.done("issue", "alice", "--state", state, "--out", shared / "alice"))
    top = f'user = "nobody"\nworkers = {workers}\nstate = "{state}"\n'
    with App() as app:
        config = f"""
            [[listener]]
            listen = "127.0.0.1:0"
            cert = "{server["cert"]}"
            key = "{server["key"]}"
            to = "{app.address}"
        """
        (shared / "handfast.toml").write_text(top + config)
        # By processes of their own: rights do not come back.
        line = (*HANDFAST, "guard", "-c", shared / "handfast.toml")
        for words in ((), ("--check",)):
            refused = subprocess.run((*line, *words), capture_output=True, text=True, timeout=30, check=False)
            assert refused.returncode == 5, refused.stderr
            assert "[store." in refused.stderr
        give(shared)
        subprocess.run((*line, "--check"), timeout=30, check=True)
        with guarding(shared, config, top=top) as guard:
            assert alice.ask(guard.port).status == 200
            os.chown(state, 0, 0)  # for the one command that is ours
            call.done("revoke", "alice", "--state", state)
            os.chown(state, NOBODY.pw_uid, NOBODY.pw_gid)
            for _ in range(workers):
                guard.next("reload", outcome="taken")
            assert alice.ask(guard.port).error == (403, "verify.revoked")


@as_root
def test_a_key_that_the_user_may_not_read(shared: Path) -> None:
    """A key that only root can read is told at start: the guard must be able to read it again later."""
    Files(shared)
    (shared / "handfast.toml").write_text('user = "nobody"\n' + CONFIG.format(admin=0, port=0, to="127.0.0.1:9"))
    with Child((*HANDFAST, "guard", "-c", "handfast.toml"), shared, merge=False) as child:
        assert child._process.wait(30) == 2
    assert "server.key: cannot be read (Permission denied) [input.unreadable]" in child.errors[0]
    assert child.lines == []


@pytest.mark.parametrize("user", ["root", "no-such-user"])
def test_a_user_that_cannot_be(call: Caller, tmp_path: Path, user: str) -> None:
    """A user that is root, or that there is not, is refused, and nothing is served."""
    Files(tmp_path)
    text = f'user = "{user}"\n' + CONFIG.format(admin=0, port=0, to="127.0.0.1:9")
    (tmp_path / "handfast.toml").write_text(text)
    assert call.refused("guard", "-c", "handfast.toml") == (2, "guard.privileges")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_sandbox_is_on_and_says_so(tmp_path: Path, workers: int) -> None:
    """Without being asked the guard closes the machine to itself, says how far, and does all the same: an app by
    name, one on a socket that comes later, metrics, and a log that is a file.
    """
    files, admin = Files(tmp_path), free_port()
    alice = files.client()
    route = '[[listener.route]]\npath = "/named"\nto = "localhost:{port}"\n'
    with App(named("app")) as app:
        config = CONFIG.format(admin=admin, port=0, to="unix:later.sock") + route.format(port=app.port)
        with guarding(tmp_path, config, top=f"workers = {workers}\n") as guard:
            told = guard.next("sandbox")["detail"]
            assert alice.ask(guard.port, "/named").body == b"app"
            assert alice.ask(guard.port).status == 502
            assert admin_get(admin, "/metrics")[0] == 200
            for pid in children(guard.pid) if workers > 1 else [guard.pid]:
                assert identities(pid)["NoNewPrivs"] == ["1"]
                assert identities(pid)["Seccomp"] == ["2"] or "no seccomp filter" in told
        (tmp_path / "handfast.toml").write_text(f"sandbox = false\n{(tmp_path / 'handfast.toml').read_text()}")
        log = tmp_path / "log"
        with log.open("w") as stream:
            line = (*HANDFAST, "guard", "-c", "handfast.toml")
            process = subprocess.Popen(line, cwd=tmp_path, stdout=stream, stderr=subprocess.STDOUT)
        try:
            until(lambda: '"event": "ready"' in log.read_text(), "the ready line")
            assert identities(process.pid)["Seccomp"] == identities(os.getpid())["Seccomp"]
        finally:
            process.terminate()
            assert process.wait(30) == 0
        assert '"sandbox"' not in log.read_text()
        assert '"stopped"' in log.read_text()
