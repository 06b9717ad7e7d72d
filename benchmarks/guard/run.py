"""Measures the guard beside its peers: the processor's time of the proxy for each operation, in alternating rounds.

Everything runs on loopback, on free ports, and is stopped at the end. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from decisions import measure_decisions
from peers import PEERS, App, Peer, install_envoy
from stage import BODY, Lacking, Running, Stage, Void, loading, staged, started

IDLE = 5000


@dataclass(frozen=True, slots=True)
class Mark:
    """What we want to reach: at most `factor` times the peer, or at most `value`."""

    factor: float = 0
    peer: str = ""
    value: float = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a proxy does, and the load that makes it do so."""

    key: str
    title: str
    unit: str
    app: App
    load: tuple[str, ...]
    modes: tuple[bool, ...] = (True, False)  # HTTP, TCP
    strangers: bool = False  # each connection with a certificate that the proxy has not seen lately
    marks: tuple[Mark, ...] = ()
    tcp_marks: tuple[Mark, ...] = ()


_BODY_MARKS = (Mark(0.7, "nginx"), Mark(1.0, "envoy"))
OPERATIONS = (
    Operation(
        "new",
        "new connection + 1 request",
        "µs",
        App.PAGE,
        ("new", "-c", "32"),
        marks=(Mark(0.65, "nginx"), Mark(1.0, "envoy")),
    ),
    Operation(
        "strangers", "the same, each client's certificate new", "µs", App.PAGE, ("new", "-c", "32"), strangers=True
    ),
    Operation(
        "keep",
        "keep-alive request",
        "µs",
        App.PAGE,
        ("keep", "-c", "32"),
        marks=(Mark(0.9, "nginx"), Mark(0.4, "envoy")),
    ),
    Operation(
        "trip",
        "round trip of 64 bytes",
        "µs",
        App.ECHO,
        ("tcp", "-c", "32"),
        modes=(False,),
        tcp_marks=(Mark(1.0, "nginx-stream"),),
    ),
    Operation("download", "64 MiB download", "ms", App.PAGE, ("keep", "-c", "4", "-p", "/big"), marks=_BODY_MARKS),
    Operation("upload", "64 MiB upload", "ms", App.SINK, ("put", "-c", "4", "-b", str(BODY)), marks=_BODY_MARKS),
    Operation(
        "grpc",
        "gRPC unary call over h2",
        "µs",
        App.HELLO,
        ("grpc", "-c", "32", "-p", "/bench.Hello/Say"),
        modes=(True,),
        marks=(Mark(1.5, "envoy"),),
    ),
    Operation(
        "idle",
        f"memory of an idle connection, {IDLE:,} of them",
        "KiB",
        App.PAGE,
        ("idle", "-c", str(IDLE)),
        marks=(Mark(value=40),),
        tcp_marks=(Mark(value=40),),
    ),
    Operation(
        "latency",
        "p99 latency at half of nginx's top rate",
        "ms",
        App.PAGE,
        ("rate", "-c", "64"),
        modes=(True,),
        marks=(Mark(1.5, "nginx"),),
    ),
)
DECISIONS = "decisions"


@dataclass(slots=True)
class Cell:
    """What one peer made of one operation: a figure for each round, or why there is none."""

    figures: list[float] = field(default_factory=list)
    void: str = ""
    lacking: bool = False
    more: list[Any] = field(default_factory=list)  # the load's own results

    @property
    def median(self) -> float | None:
        return None if self.void or not self.figures else statistics.median(self.figures)

    def __str__(self) -> str:
        if self.lacking:
            return "no"
        if self.void:
            return f"void: {self.void}"
        if not self.figures:
            return ""
        if len(self.figures) == 1:
            return number(self.figures[0])
        return f"{number(statistics.median(self.figures))} ({number(min(self.figures))}–{number(max(self.figures))})"


Cells = dict[str, dict[str, Cell]]  # by operation, by peer


def main() -> None:
    options = arguments()
    if (os.cpu_count() or 1) < 2:
        sys.exit("two processors are needed: one for the proxy, one for the load")
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda number, _: sys.exit(128 + number))  # through every `with`, which ends what it began
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="handfast-bench-") as name:
        peers = chosen_peers(options.peers)
        with staged(Path(name)) as stage:
            cells = {op.key: measured(stage, op, peers, options) for op in OPERATIONS if op.key in options.only}
    decisions = measure_decisions(options.rounds) if DECISIONS in options.only else []
    floor = crypto_floor()
    text = "\n\n".join(
        [
            facts(peers, options, load_before),
            *tables(cells, peers),
            *([decisions_table(decisions)] if decisions else []),
            floor_text(floor),
        ]
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        shown = {op: {peer: asdict(cell) for peer, cell in row.items()} for op, row in cells.items()}
        options.json.write_text(json.dumps({"operations": shown, "decisions": decisions, "floor": floor}, indent=1))
    if any(cell.void for row in cells.values() for cell in row.values()):
        sys.exit(1)


def arguments() -> argparse.Namespace:
    keys = [op.key for op in OPERATIONS] + [DECISIONS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="[default: 5]")
    parser.add_argument("--seconds", type=float, default=3, help="of load for each figure  [default: 3]")
    parser.add_argument("--only", nargs="+", metavar="OP", choices=keys, default=keys, help=", ".join(keys))
    parser.add_argument(
        "--peers", nargs="+", metavar="PEER", choices=[p.key for p in PEERS], help=", ".join(p.key for p in PEERS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    return parser.parse_args()


def chosen_peers(keys: Sequence[str] | None) -> list[Peer]:
    chosen = [peer for peer in PEERS if keys is None or peer.key in keys]
    if any(peer.key.startswith("envoy") for peer in chosen):
        install_envoy()
    for peer in chosen:
        if peer.missing:
            print(f"{peer.name} is left out: {peer.program} is not installed", file=sys.stderr)
    return [peer for peer in chosen if not peer.missing]


# Measuring


def measured(stage: Stage, op: Operation, peers: list[Peer], options: argparse.Namespace) -> dict[str, Cell]:
    """One row: all peers of the operation's modes in turn, round by round."""
    able = [peer for peer in peers if peer.http in op.modes]
    cells = {peer.key: Cell() for peer in able}
    if op.key == "idle":
        for _ in range(min(options.rounds, 2)):  # each with fresh processes: what was held once is not given back
            for peer in able:
                attempt(cells[peer.key], lambda peer=peer: idle_memory(stage, op, peer))
                tell(op, peer, cells[peer.key])
        return cells
    with ExitStack() as stack:
        running: dict[str, Running] = {}
        for peer in able:
            attempt(cells[peer.key], lambda peer=peer: running.update({peer.key: start(stack, stage, op, peer)}))
            if peer.key not in running:
                tell(op, peer, cells[peer.key])
        rate = half_of_top(stage, running.get("nginx"), options.seconds) if op.key == "latency" else 0
        for _ in range(options.rounds):
            for peer in able:
                if peer.key in running:
                    one = running[peer.key]
                    attempt(cells[peer.key], lambda one=one: figure(stage, op, one, options.seconds, rate))
                    tell(op, peer, cells[peer.key])
    return cells


def attempt(cell: Cell, measure: Callable[[], tuple[float, Any] | None]) -> None:
    """Take one figure into the cell. An error in the load makes the whole cell void."""
    if cell.void or cell.lacking:
        return
    try:
        got = measure()
    except Lacking:
        cell.lacking = True
    except Void as void:
        cell.void = str(void)
    else:
        if got is not None:
            cell.figures.append(got[0])
            cell.more.append(got[1])


def start(stack: ExitStack, stage: Stage, op: Operation, peer: Peer) -> Running:
    """Start the peer and run the load for a moment, so that nothing is done for the first time later."""
    running = stack.enter_context(started(stage, peer, op.app))
    words = ("keep", "-c", "4") if op.key == "latency" else op.load
    with loading(stage, running.port, (*words, "-t", "0.3"), strangers=op.strangers) as run:
        run()
    return running


def figure(stage: Stage, op: Operation, peer: Running, seconds: float, rate: float) -> tuple[float, Any]:
    words = (*op.load, "-t", str(seconds), *(("-r", f"{rate:.0f}") if rate else ()))
    with loading(stage, peer.port, words, strangers=op.strangers) as run:
        pids, before = peer.processor()
        result = run()
        pids_after, after = peer.processor()
    if pids != pids_after:
        raise Void("its processes changed in the midst")
    result["cpu"] = after - before
    if op.key == "latency":
        return result["p99"], result
    if op.unit == "ms":  # by bytes: what is under way at the end counts for what it is
        return result["cpu"] / (result["bytes"] / BODY) * 1e3, result
    return result["cpu"] / result["done"] * 1e6, result


def half_of_top(stage: Stage, nginx: Running | None, seconds: float) -> float:
    if nginx is None:
        sys.exit("the latency is measured at half of nginx's top rate: nginx has to be among the peers")
    with loading(stage, nginx.port, ("keep", "-c", "64", "-t", str(seconds))) as run:
        result = run()
    return float(result["done"] / result["seconds"] / 2)


def idle_memory(stage: Stage, op: Operation, peer: Peer) -> tuple[float, Any]:
    with started(stage, peer, op.app) as running:
        with loading(stage, running.port, ("keep", "-c", "8", "-t", "0.3")) as run:
            run()
        before = running.resident()
        with loading(stage, running.port, op.load):
            after = running.resident()
    return (after - before) / IDLE / 1024, {"before": before, "after": after}


def tell(op: Operation, peer: Peer, cell: Cell) -> None:
    mode = "HTTP" if peer.http else "TCP"
    last = "no" if cell.lacking else f"void: {cell.void}" if cell.void else f"{number(cell.figures[-1])} {op.unit}"
    print(f"{op.key:<10} {peer.name:<14} {mode:<4} {last}", file=sys.stderr, flush=True)


def crypto_floor() -> dict[str, float]:
    """Microseconds of what a server's side of the handshake cannot do without, by `openssl speed`."""
    command = ["taskset", "-c", "0", "openssl", "speed", "-mr", "-seconds", "2", "ecdsap256", "ecdhx25519"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ecdsa = re.search(r"^\+F4:\d+:256:([\d.]+):([\d.]+)", said, re.M)
    ecdh = re.search(r"^\+F5:\d+:253:([\d.]+)", said, re.M)
    if ecdsa is None or ecdh is None:
        return {}
    sign, verify, derive = (1e6 / float(text) for text in (ecdsa[1], ecdsa[2], ecdh[1]))
    return {"sign": sign, "verify": verify, "derive": derive}


# The tables


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def tables(cells: Cells, peers: list[Peer]) -> list[str]:
    return [
        f"{title}\n\n{table(rows)}"
        for title, http in (("HTTP mode", True), ("TCP mode: the same through a tunnel", False))
        if len(rows := peers_table(cells, [peer for peer in peers if peer.http is http])) > 1
    ]


def peers_table(cells: Cells, peers: list[Peer]) -> list[list[str]]:
    ops = [op for op in OPERATIONS if op.key in cells and any(peer.key in cells[op.key] for peer in peers)]
    if not peers or not ops:
        return []
    rows = [["median (least–most)", *(peer.name for peer in peers), "at most", "kept"]]
    for op in ops:
        row = cells[op.key]
        figures = [str(row.get(peer.key, "")) for peer in peers]
        marks = op.marks if peers[0].http else op.tcp_marks
        ours = row.get("handfast" if peers[0].http else "handfast-tcp", Cell())
        verdicts = [judged(mark, ours, row, op.unit) for mark in marks]
        wanted, kept = ("<br>".join(words) for words in zip(*verdicts, strict=True)) if verdicts else ("", "")
        rows.append([f"{op.title}, {op.unit}", *figures, wanted, kept])
    return rows


def judged(mark: Mark, ours: Cell, row: dict[str, Cell], unit: str) -> tuple[str, str]:
    """What the mark asks, and whether we keep it."""
    mine = ours.median
    if not mark.peer:
        return f"{number(mark.value)} {unit}", "void" if mine is None else "yes" if mine <= mark.value else "**no**"
    name = next(peer.name for peer in PEERS if peer.key == mark.peer)
    theirs = row.get(mark.peer, Cell()).median
    if mine is None or theirs is None:
        return f"{mark.factor} × {name}", "**no**" if ours.lacking else "void"
    ratio = mine / theirs
    return f"{mark.factor} × {name}", f"{'yes' if ratio <= mark.factor else '**no**'}: {ratio:.2f}"


def decisions_table(decisions: list[dict[str, Any]]) -> str:
    rows = [["median, ns", "10", "many", "times", "at most", "kept"]]
    for one in decisions:
        ratio = one["many_ns"] / one["few_ns"]
        kept = "yes" if ratio <= 1.2 else "**no**"
        rows.append([one["what"], number(one["few_ns"]), number(one["many_ns"]), f"{ratio:.2f}", "1.2", kept])
    return f"Decisions, in one process\n\n{table(rows)}"


def floor_text(floor: dict[str, float]) -> str:
    if not floor:
        return "The crypto floor is not known: `openssl speed` says it in another way."
    sign, verify, derive = floor["sign"], floor["verify"], floor["derive"]
    total = sign + 2 * verify + 2 * derive
    return (
        f"Crypto floor of a new connection: {total:.0f} µs by `openssl speed` on the same core: one P-256 signature"
        f" {sign:.0f}, two verifications of {verify:.0f}, X25519 key and agreement {derive:.0f} each."
    )


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("---" if at == 0 else "---:" for at in range(len(widths))) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def facts(peers: list[Peer], options: argparse.Namespace, load_before: float) -> str:
    """The machine, the command, and each peer's version and what is switched on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    words = shlex.join(["benchmarks/guard/run.py", *sys.argv[1:]])
    said = [
        f"machine   {os.cpu_count()} cores of {model}, Linux {platform.release()}; load {load_before:.1f} at the start,"
        f" {os.getloadavg()[0]:.1f} at the end",
        f"command   {words}: {options.rounds} rounds of {options.seconds:g} s",
        "TLS       1.3, TLS_AES_128_GCM_SHA256, X25519, P-256 certificates right under their root, no resumption",
    ]
    versions: dict[str, str] = {}
    for peer in peers:
        versions.setdefault(peer.name.partition(",")[0].partition(" ")[0], peer.version())
    said += [f"{name:<9} {version}" for name, version in versions.items()]
    said += [f"  {peer.name} ({'HTTP' if peer.http else 'TCP'}): {peer.note}" for peer in peers]
    return "```text\n" + "\n".join(said) + "\n```"


if __name__ == "__main__":
    main()
