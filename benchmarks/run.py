"""Measures what users wait for: start-up, issuing, memory. Prints one table, with the machine it was made on.

Others that do the same are run in turn with us, round by round, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

import handfast
from handfast.authority import Authority, Existing, GeneratedPassphrase, import_authority
from handfast.files import generate_key, write_private, write_public
from handfast.pki.issuing import Order, build_certificate, make_serial, sign
from handfast.pki.keys import KeyType, encode_private_key
from handfast.pki.names import parse_name
from handfast.pki.profiles import PROFILES
from handfast.pki.requests import parse_csr
from handfast.tls.engine import engine_version

ROUNDS = 5
HOST = "web.bench.internal"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what, the median, and how it compares with ours."""

    what: str
    median: float
    unit: str
    spread: tuple[float, float]
    ratio: str = ""
    cpu: str = ""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that issues: `run` returns how many, `cpu` the seconds of processor that it has used so far."""

    what: str
    run: Callable[[], int]
    cpu: Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to be measured  [default: here]")
    parser.add_argument("--certificates", type=int, default=200, help="to issue in each round  [default: 200]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="handfast-bench-", dir=options.folder) as name:
        folder = Path(name)
        print(facts(folder))
        rows = start_up(folder)
        for key_type in (KeyType.P256, KeyType.RSA2048):
            rows += issuing(folder / key_type, key_type, options.certificates)
        print(table(rows))


# What the machine is.


def facts(folder: Path) -> str:
    """The machine and the versions, a line each."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or "an unknown processor",
    )
    load = f"{os.getloadavg()[0]:.1f}"
    return "\n".join(
        (
            f"machine   {os.cpu_count()} cores of {model}, Linux {platform.release()}, load {load} at the start",
            f"disk      {_file_system(folder)}; a 4 KiB write with fsync takes {fsync_time(folder) * 1000:.2f} ms",
            f"handfast  {handfast.__version__}, Python {platform.python_version()}, {engine_version()}",
            f"others    {_first_line('openssl', 'version')}; cfssl {_cfssl_version()}",
            "",
        )
    )


def fsync_time(folder: Path) -> float:
    """Seconds for a durable write of 4 KiB: what no durable ledger can go below."""
    times = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(50):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _file_system(folder: Path) -> str:
    best = ("", "an unknown file system")
    for line in _lines("/proc/self/mounts"):
        _, point, kind, *_ = line.split()
        if folder.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).splitlines()[0]


def _cfssl_version() -> str:
    if shutil.which("cfssl") is None:
        return "is not installed (Debian: golang-cfssl), so left out"
    return _first_line("cfssl", "version").removeprefix("Version: ")


# Start-up.


def start_up(folder: Path) -> list[Row]:
    """From the start of the command to its ready line, on no state and on an existing one; and its memory."""
    bare, new, existing, memory = [], [], [], []
    for number in range(ROUNDS):
        bare.append(_timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)))
        state = folder / f"state-{number}"
        new.append(_until_ready(state)[0])
        seconds, resident = _until_ready(state)
        existing.append(seconds)
        memory.append(resident)
    ours = statistics.median(existing)
    return [
        _row("start of `up` until ready, new state", new, "s", ours),
        _row("start of `up` until ready, existing state", existing, "s", ours),
        _row("start of Python itself", bare, "s", ours),
        _row("resident memory of `up` when ready", memory, "MiB"),
    ]


def _until_ready(state: Path) -> tuple[float, float]:
    words = ["up", "--to", "127.0.0.1:9", "--listen", "127.0.0.1:0", "--json", "--state", str(state)]
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "handfast", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        assert json.loads(line)["event"] == "ready", line
        resident = _resident(process.pid)
        process.terminate()
    return seconds, resident


def _resident(pid: int | str) -> float:
    line = next(line for line in _lines(f"/proc/{pid}/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


# Issuing.


def issuing(folder: Path, key_type: KeyType, count: int) -> list[Row]:
    """Certificates a second from requests that are there: ours, and the others', from the same issuer and requests."""
    folder.mkdir()
    make_issuer(folder, key_type)
    requests = make_requests(folder, key_type, count)
    authority = import_authority(
        folder / "state",
        Existing(folder / "ca.crt", folder / "ca.key"),
        "bench.internal",
        GeneratedPassphrase(),
    )
    contenders = [
        Contender("handfast, in one process, durable", lambda: issue_ours(authority, requests), time.process_time),
        Contender("`openssl ca`, in one process, no fsync", lambda: openssl_batch(folder, requests), _cpu_of_children),
        Contender(
            "`openssl ca`, a process each, no fsync",
            lambda: openssl_each(folder, requests[: count // 8]),
            _cpu_of_children,
        ),
        Contender(
            "`handfast sign`, a process each, durable",
            lambda: ours_each(folder, requests[: count // 40]),
            _cpu_of_children,
        ),
    ]
    with cfssl(folder) as serving:
        if serving is not None:
            port, pid = serving
            contenders.append(
                Contender(
                    "`cfssl serve`, on one connection, SQLite", lambda: cfssl_sign(port, requests), lambda: _cpu_of(pid)
                )
            )
        rates: list[list[float]] = [[] for _ in contenders]
        costs: list[list[float]] = [[] for _ in contenders]
        for _ in range(ROUNDS):
            for at, contender in enumerate(contenders):
                began, used = time.perf_counter(), contender.cpu()
                done = contender.run()
                rates[at].append(done / (time.perf_counter() - began))
                costs[at].append((contender.cpu() - used) / done * 1000)
    authority.close()
    ours = statistics.median(rates[0])
    rows = [
        replace(
            _row(f"{key_type}: {contender.what}", rates[at], "/s", ours), cpu=f"{statistics.median(costs[at]):.2f} ms"
        )
        for at, contender in enumerate(contenders)
    ]
    if key_type is KeyType.P256:
        rows.append(Row("resident memory after issuing these", _resident("self"), "MiB", (0, 0)))
    return rows


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def issue_ours(authority: Authority, requests: list[Path]) -> int:
    """Fill an order for each request through the one issuance path: two transactions, each on disk."""
    profile, name = PROFILES["server"], parse_name(HOST)
    for path in requests:
        key = parse_csr(path.read_bytes(), str(path)).public_key  # its signature is checked, as the others do
        issued = authority.issue(Order(profile, (name,), key), authority.authorize((name,), profile))
        assert issued.pem
    return len(requests)


def ours_each(folder: Path, requests: list[Path]) -> int:
    command = [sys.executable, "-m", "handfast", "sign", "--name", HOST, "--force", "--state", str(folder / "state")]
    for path in requests:
        _quietly(*command, "--out", str(path.with_suffix(".crt")), str(path))
    return len(requests)


def openssl_batch(folder: Path, requests: list[Path]) -> int:
    _quietly(*_openssl_ca(folder), "-outdir", str(folder / "new"), "-infiles", *map(str, requests))
    return len(requests)


def openssl_each(folder: Path, requests: list[Path]) -> int:
    for path in requests:
        _quietly(*_openssl_ca(folder), "-in", str(path), "-out", str(path.with_suffix(".crt")))
    return len(requests)


def _openssl_ca(folder: Path) -> list[str]:
    return ["openssl", "ca", "-batch", "-notext", "-config", str(folder / "ca.cnf")]


@contextmanager
def cfssl(folder: Path) -> Iterator[tuple[int, int] | None]:
    """Run `cfssl serve`, which stores what it signs in SQLite; its port and process, or None where it is missing."""
    if shutil.which("cfssl") is None:
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    database = folder / "cfssl.db"
    with sqlite3.connect(database) as connection:
        connection.executescript(CFSSL_SCHEMA)
    (folder / "cfssl-db.json").write_text(json.dumps({"driver": "sqlite3", "data_source": str(database)}))
    usages = ["digital signature", "server auth"]
    (folder / "cfssl.json").write_text(json.dumps({"signing": {"default": {"usages": usages, "expiry": "24h"}}}))
    serve = ["cfssl", "serve", "-address", "127.0.0.1", "-port", str(port)]
    serve += ["-ca", str(folder / "ca.crt"), "-ca-key", str(folder / "ca.key"), "-config", str(folder / "cfssl.json")]
    serve += ["-db-config", str(folder / "cfssl-db.json")]
    with subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port, folder)
            with sqlite3.connect(database) as connection:
                assert connection.execute("SELECT count(*) FROM certificates").fetchone() == (1,), "it stores nothing"
            yield port, process.pid
        finally:
            process.terminate()


CFSSL_SCHEMA = """
CREATE TABLE certificates (
    serial_number blob NOT NULL, authority_key_identifier blob NOT NULL, ca_label blob, status blob NOT NULL,
    reason int, expiry timestamp, revoked_at timestamp, pem blob NOT NULL,
    PRIMARY KEY(serial_number, authority_key_identifier));
CREATE TABLE ocsp_responses (
    serial_number blob NOT NULL, authority_key_identifier blob NOT NULL, body blob NOT NULL, expiry timestamp,
    PRIMARY KEY(serial_number, authority_key_identifier));
"""


def _wait_for(port: int, folder: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            cfssl_sign(port, [folder / "0.csr"])
            return
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def cfssl_sign(port: int, requests: list[Path]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for path in requests:
        body = json.dumps({"certificate_request": path.read_text(), "hosts": [HOST]})
        connection.request("POST", "/api/v1/cfssl/sign", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        assert answer["success"], answer["errors"]
    connection.close()
    return len(requests)


# What they all start from.


def make_issuer(folder: Path, key_type: KeyType) -> None:
    """One self-signed authority, for everybody, and the configuration of `openssl ca`."""
    key = generate_key(key_type)
    order = Order(PROFILES["root"], (), key.public_key(), common_name="bench root")
    root = sign(build_certificate(order, None, make_serial(0, os.urandom(16)), datetime.now(UTC)), key)
    write_public(folder / "ca.crt", root.public_bytes(Encoding.PEM))
    write_private(folder / "ca.key", encode_private_key(key))
    (folder / "new").mkdir()
    (folder / "index.txt").write_text("")
    (folder / "ca.cnf").write_text(OPENSSL_CONFIG.format(folder=folder, host=HOST))


OPENSSL_CONFIG = """
[ca]
default_ca = bench
[bench]
database = {folder}/index.txt
new_certs_dir = {folder}/new
certificate = {folder}/ca.crt
private_key = {folder}/ca.key
rand_serial = yes
unique_subject = no
default_md = sha256
default_days = 1
policy = policy
x509_extensions = leaf
[policy]
commonName = optional
[leaf]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:{host}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


def make_requests(folder: Path, key_type: KeyType, count: int) -> list[Path]:
    """Requests for as many keys; making keys is the workload's work and is not measured."""
    paths = []
    for number in range(count):
        key = generate_key(key_type)
        builder = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
        )
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        csr = builder.sign(key, hashes.SHA256())
        path = folder / f"{number}.csr"
        path.write_bytes(csr.public_bytes(Encoding.PEM))
        paths.append(path)
    return paths


# The table.


def _quietly(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])}: {done.stderr or done.stdout}")


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _row(what: str, values: list[float], unit: str, ours: float = 0) -> Row:
    median = statistics.median(values)
    ratio = f"{median / ours:.2g}" if ours else ""
    return Row(what, median, unit, (min(values), max(values)), ratio)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, so that they can be pasted as they are."""
    lines = [
        f"| what (median of {ROUNDS}) | value | least to most | times ours | CPU for each |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        spread = "" if row.spread == (0, 0) else f"{_figure(row.spread[0])} to {_figure(row.spread[1])}"
        lines.append(f"| {row.what} | {_figure(row.median)} {row.unit} | {spread} | {row.ratio} | {row.cpu} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"


if __name__ == "__main__":
    main()
