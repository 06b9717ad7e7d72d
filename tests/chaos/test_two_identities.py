"""Identities side by side: every answer names the client that asked, whatever is kept, pipelined or shared."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.chaos.kit import PATIENCE, Answer, Apps, Caller, Guard, guarding
from tests.e2e.guard_kit import Files

CONFIG = """
workers = {workers}

[[listener]]
listen = "127.0.0.1:PORT"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "127.0.0.1:{app}"
"""
BATCHES = (1, 1, 2, 7, 16)  # requests in flight at once, in turn
LIFE = 200  # requests of a connection before the next


@dataclass
class Tally:
    """What the clients were answered."""

    right: Counter[str] = field(default_factory=Counter)
    wrong: list[Answer] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{sum(self.right.values())} right {dict(self.right)}, {len(self.wrong)} wrong, {self.failed}"


def interleave(guard: Guard, files: Files, clients: int, requests: int) -> Tally:
    """So many requests of so many clients at once: kept connections, batches of requests, bodies like requests."""
    tally = Tally()
    together = threading.Barrier(clients)

    def call(name: str) -> None:
        caller = Caller(name, guard.port, files.client(name).context())
        try:
            together.wait(PATIENCE)
            turn = 0
            while caller.count < requests // clients:
                turn += 1
                for answer in caller.ask_many(BATCHES[turn % len(BATCHES)], bodies=turn % 3 == 0):
                    if answer.status == 200 and answer.right:
                        tally.right[name] += 1
                    else:
                        tally.wrong.append(answer)
                if caller.count // LIFE != (caller.count - BATCHES[turn % len(BATCHES)]) // LIFE:
                    caller.close()
        except BaseException as error:
            tally.failed.append(error)
        finally:
            caller.close()

    names = [f"client{number}" for number in range(clients)]
    for name in names:
        files.client(name)
    threads = [threading.Thread(target=call, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def attribute(folder: Path, clients: int, requests: int, workers: int = 1) -> Tally:
    """Run a guard and an app, and count right answers."""
    files = Files(folder)
    with Apps(1) as apps, guarding(folder, CONFIG.format(workers=workers, app=apps.ports[0])) as guard:
        tally = interleave(guard, files, clients, requests)
        assert apps.answered >= sum(tally.right.values())
        guard.well()
    return tally


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("clients", "workers"), [(2, 1), (4, 2)])
def test_every_answer_is_its_own_clients(tmp_path: Path, clients: int, workers: int) -> None:
    """Of 100,000 interleaved requests, pipelined or with bodies like requests, all get their own client's answer."""
    tally = attribute(tmp_path, clients, 50_000, workers)
    assert (tally.wrong, tally.failed) == ([], []), str(tally)
    assert len(tally.right) == clients
    assert sum(tally.right.values()) >= 50_000


def test_the_oracle_sees_a_wrong_identity(tmp_path: Path) -> None:
    """A client that claims to be another than its certificate says is told so by every answer."""
    files = Files(tmp_path)
    with Apps(1) as apps, guarding(tmp_path, CONFIG.format(workers=1, app=apps.ports[0])) as guard:
        liar = Caller("alice", guard.port, files.client("mallory").context())
        answers = liar.ask_many(3, bodies=True)
        liar.close()
    assert [answer.status for answer in answers] == [200] * 3
    assert not any(answer.right for answer in answers)
