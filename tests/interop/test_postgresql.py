"""PostgreSQL behind the guard, its client behind the connector: what the manual's page promises."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from handfast.policy import parse_policy
from tests.connector.kit import Calling, generation
from tests.support.certs import Ca
from tests.support.guards import Running
from tests.support.programs import free_port, program


def _as_postgres() -> list[str]:
    """initdb and postgres refuse to run as root."""
    return ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []


@pytest.fixture(scope="module")
def database() -> Iterator[int]:
    """A PostgreSQL server on a port of loopback."""
    # Not below pytest's own folder, which another run of it closes to PostgreSQL's user.
    folder = Path(tempfile.mkdtemp(prefix="handfast-pg-"))
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
    port = free_port()  # one that the kernel gives to nobody meanwhile
    data = folder / "data"
    subprocess.run(
        [*_as_postgres(), str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres", "--no-sync"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    start = [*_as_postgres(), str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o"]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    subprocess.run([*start, options, "start"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    try:
        yield port
    finally:
        stop = [*_as_postgres(), str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop"]
        subprocess.run(stop, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        shutil.rmtree(folder, ignore_errors=True)


def _ask(port: int, statement: str) -> subprocess.CompletedProcess[str]:
    where = f"host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable connect_timeout=10"
    return subprocess.run(
        [program("psql"), where, "-X", "-A", "-t", "-c", statement], capture_output=True, text=True, timeout=60
    )


def test_a_database_is_asked_through_connector_and_guard(database: int, tmp_path: Path) -> None:
    """psql gets its answer, a large one too; a client whose name no rule allows gets none, and the log says why."""
    ca = Ca.root()
    policy = parse_policy(["spiffe://test/web"])
    with Running(ca, f"tcp://127.0.0.1:{database}", policy) as guard:
        with Calling(guard.address, generation(ca, ca.client())) as calling:
            assert _ask(calling.port, "select 6 * 7").stdout.strip() == "42"
            rows = _ask(calling.port, "select repeat('x', 100) from generate_series(1, 20000)").stdout
            assert rows.count("x" * 100) == 20_000
        with Calling(guard.address, generation(ca, ca.client("spiffe://test/other"))) as calling:
            refused = _ask(calling.port, "select 1")
            assert refused.returncode != 0
            assert "server closed the connection" in refused.stderr
        while (event := guard.events.next("connection"))["decision"] != "deny":
            pass
        assert event["reason"] == "policy.no_rule"


def test_a_client_that_begins_with_tls_needs_no_connector(database: int, tmp_path: Path) -> None:
    """libpq 17 and newer speaks to the guard itself, by ALPN; without a certificate, or to another, it does not."""
    ca = Ca.root()
    cert, key = ca.client().save(tmp_path, "web")
    words = {
        "host": "localhost",
        "hostaddr": "127.0.0.1",
        "user": "postgres",
        "dbname": "postgres",
        "sslnegotiation": "direct",
        "sslmode": "verify-full",
        "sslrootcert": str(ca.save(tmp_path, "ca")),
        "connect_timeout": 10,
    }
    own = {"sslcert": str(cert), "sslkey": str(key)}
    policy = parse_policy(["spiffe://test/web"])
    with Running(ca, f"tcp://127.0.0.1:{database}", policy, alpn=(b"postgresql",)) as guard:
        port = guard.address.rpartition(":")[2]
        with psycopg.connect(**words, **own, port=port) as connection:  # type: ignore[arg-type]  # libpq's own words
            assert connection.execute("select 6 * 7").fetchone() == (42,)
            assert connection.pgconn.ssl_in_use
        with pytest.raises(psycopg.OperationalError, match="certificate required"):
            psycopg.connect(**words, port=port)  # type: ignore[arg-type]  # libpq's own words
    with Running(ca, f"tcp://127.0.0.1:{database}", policy, alpn=(b"other",)) as guard:
        port = guard.address.rpartition(":")[2]
        with pytest.raises(psycopg.OperationalError, match="no application protocol"):
            psycopg.connect(**words, **own, port=port)  # type: ignore[arg-type]  # libpq's own words
