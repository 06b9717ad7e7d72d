"""The verb `status`: what a guard does, in a terminal, as it happens."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from textwrap import wrap

import click
import msgspec

from handfast.cli.output import as_json_option, example
from handfast.errors import Reason, Unreachable
from handfast.guard.admin import Status
from handfast.guard.metrics import BOUNDS, SILENT, Labels, Series, State, is_whole, quantile
from handfast.guard.places import join_address, parse_address

ADMIN = "127.0.0.1:9464"
PATIENCE = 5.0  # seconds for an answer
MAX_ANSWER = 8 << 20  # bytes
TOP = 5  # refusal reasons that are shown
REASON_LINES = 4  # of why a reload was kept back
WIDTH = 80

_decode = msgspec.json.Decoder(Status).decode


@click.command("status", epilog=example("handfast status", "handfast status --admin unix:/run/guard.sock --once"))
@click.option(
    "--admin",
    default=ADMIN,
    show_default=True,
    metavar="PLACE",
    help="The guard's admin listener: HOST:PORT, unix:PATH.",
)
@click.option("--once", is_flag=True, help="Print once and end, as it is done where no terminal is.")
@as_json_option
def status_(admin: str, once: bool, as_json: bool) -> None:
    """Show what a guard does: who is refused and why, how fast it is, what ends soon.

    In a terminal it is shown anew each second, until Ctrl-C.
    """
    place = parse_admin(admin)
    answer = fetch(place)
    status = read_status(place, answer)
    if as_json:
        click.echo(answer)
        return
    if once or not sys.stdout.isatty():
        click.echo("\n".join(view(status, None)))
    else:
        watch(place, status)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an admin listener is: a TCP address, or the path of a UNIX socket."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else join_address(self.host, self.port)


def parse_admin(text: str) -> Place:
    """Parse `HOST:PORT`, `http://HOST:PORT` or `unix:PATH`. Raises InvalidInput (INPUT_ADDRESS)."""
    if text.startswith("unix:") and len(text) > 5:
        return Place("", 0, text.removeprefix("unix:"))
    host, port = parse_address(text.removeprefix("http://").removesuffix("/"))
    return Place(host, port)


def fetch(place: Place) -> str:
    """The JSON of `/status`. Raises Unreachable (ADMIN_UNREACHABLE, ADMIN_NOT_OURS)."""
    try:
        connection = http.client.HTTPConnection(place.host or "localhost", place.port or None, timeout=PATIENCE)
        with closing(connection):
            if place.path:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(PATIENCE)
                connection.sock.connect(place.path)
            connection.request("GET", "/status")
            with connection.getresponse() as response:
                body = _read(response, place, time.monotonic() + PATIENCE)
    except http.client.HTTPException as error:
        raise _not_ours(place, f"no HTTP: {type(error).__name__}") from None
    except (OSError, UnicodeError) as error:
        detail = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error)
        raise Unreachable(Reason.ADMIN_UNREACHABLE, target=str(place), detail=detail) from None
    if response.status != 200:
        raise _not_ours(place, f"it answers {response.status}")
    return body.decode("utf-8", "replace").strip()


def _read(response: http.client.HTTPResponse, place: Place, deadline: float) -> bytes:
    body = b""
    while piece := response.read1(1 << 16):
        body += piece
        if len(body) > MAX_ANSWER or time.monotonic() > deadline:
            raise _not_ours(place, "its answer does not end")
    return body


def read_status(place: Place, answer: str) -> Status:
    """What the answer says. Raises Unreachable (ADMIN_NOT_OURS)."""
    try:
        status = _decode(answer)
    except msgspec.DecodeError as error:
        raise _not_ours(place, f"it answers other JSON: {error}") from None
    if not is_whole(status["state"]):
        raise _not_ours(place, "it counts other things: is it of another version?")
    return status


def _not_ours(place: Place, detail: str) -> Unreachable:
    return Unreachable(Reason.ADMIN_NOT_OURS, target=str(place), detail=detail)


# The live view.


def watch(place: Place, first: Status) -> None:
    """Show the status anew each second, until Ctrl-C or the end of a guard that was draining."""
    before, now, said = None, first, ""
    lines = _fitting(first, None)
    try:
        with _screen() as show:
            while True:
                show([said, "", *lines] if said else lines)
                time.sleep(1)
                try:
                    before, now, said = now, read_status(place, fetch(place)), ""
                    lines = _fitting(now, before)
                except Unreachable as error:
                    if now["draining"] is not None:
                        lines = [f"the guard at {place} has stopped"]
                        break
                    said = _style(f"{error}; the last that was seen:", "red")
    except KeyboardInterrupt:
        pass
    click.echo("\n".join(lines))


def _fitting(now: Status, before: Status | None) -> list[str]:
    return view(now, before, min(WIDTH, shutil.get_terminal_size().columns))


@contextmanager
def _screen() -> Iterator[Callable[[list[str]], None]]:
    """A screen of its own, without a cursor, that is gone afterwards; lines are drawn over the last ones."""

    def show(lines: list[str]) -> None:
        height = shutil.get_terminal_size().lines
        shown = lines if len(lines) < height else [*lines[: height - 2], "..."]
        sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in shown) + "\x1b[J")
        sys.stdout.flush()

    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        yield show
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def view(now: Status, before: Status | None, width: int = WIDTH) -> list[str]:
    """The lines of the view, `width` columns at most. Rates are those since `before`; without it, sums are shown."""
    seconds = 0.0 if before is None else now["now"] - before["now"]
    change = Change(now["state"], before["state"] if before is not None and seconds > 0 else None, seconds)
    parts = (
        _head(now),
        _draining(now),
        _listeners(now, change),
        _latency(change),
        _refused(change),
        _in_force(now, width),
        _upstreams(now["state"]),
        _workers(now["state"], change),
    )
    lines: list[str] = []
    for part in parts:
        if part and lines:
            lines.append("")
        lines += [_style(_cut(text, width), colour) for text, colour in part]
    return lines


Line = tuple[str, str]  # text and its colour: "", "bold", "red", "yellow", "green"


class Change:
    """What was counted since another state, or, without one, since the guard started."""

    def __init__(self, state: State, before: State | None, seconds: float) -> None:
        self.state = state
        self.seconds = seconds if before is not None else 0.0
        self._before = before

    def since(self, family: str) -> Series:
        """How much was counted of each of a family's labels."""
        before = {} if self._before is None else dict(self._before["counters"][family])
        return [(key, much - before.get(key, 0)) for key, much in self.state["counters"][family]]

    def values(self, family: str, fits: Callable[[Labels], bool]) -> list[int]:
        """The counts of a histogram's buckets, of the labels that fit."""
        sums = [0] * (len(BOUNDS) + 1)
        for sign, state in ((1, self.state), (-1, self._before)):
            for key, counts, _ in state["histograms"][family] if state is not None else []:
                if fits(key):
                    sums = [one + sign * other for one, other in zip(sums, counts, strict=False)]
        return [max(0, count) for count in sums]

    def cpu(self, worker: int, pid: int) -> float | None:
        """The part of a processor that a worker used; None where it is not known."""
        spent = [
            one["cpu_seconds"]
            for state in (self.state, self._before)
            for one in (state["workers"] if state is not None else [])
            if (one["worker"], one["pid"]) == (worker, pid)
        ]
        return max(0.0, spent[0] - spent[1]) / self.seconds if len(spent) == 2 and self.seconds else None

    def shown(self, count: float) -> str:
        """A count as a rate, or as the sum that it is."""
        return f"{count / self.seconds:,.1f}" if self.seconds else f"{count:,.0f}"

    def reasons(self) -> dict[str, float]:
        """How often each reason refused or cut something off."""
        found: dict[str, float] = {}
        for labels, much in self.since("handshakes"):
            if labels[1] != "accept":
                found[labels[2]] = found.get(labels[2], 0) + much
        for labels, much in self.since("requests"):
            if labels[1] != "allow" or labels[2].startswith(("upstream.", "guard.")):
                found[labels[2]] = found.get(labels[2], 0) + much
        for labels, much in self.since("ended"):
            found[labels[0]] = found.get(labels[0], 0) + much
        for labels, much in self.since("limited"):  # may have been counted as a handshake or a request, too
            found[labels[0]] = max(found.get(labels[0], 0), much)
        return found


def _head(now: Status) -> list[Line]:
    workers = now["state"]["workers"]
    since = min((worker["started"] for worker in workers), default=now["now"])
    title = f"handfast {now['version']}   up {_span(now['now'] - since)}   {_many(len(workers), 'worker')}"
    if not now["unready"]:
        return [(f"{title}   ready", "green")]
    return [(title, "bold"), *((f"not ready: {reason}", "red") for reason in now["unready"])]


def _draining(now: Status) -> list[Line]:
    drain = now["draining"]
    if drain is None:
        return []
    left = sum(now["state"]["connections"].values())
    done = 1.0 if drain["of"] <= 0 else min(1.0, max(0.0, 1 - left / drain["of"]))
    bar = f"{'#' * round(30 * done):.<30}"
    seconds = max(0, round(drain["seconds_left"]))
    return [(f"draining  [{bar}]  {left} of {drain['of']} left, {seconds} s at most", "yellow")]


def _listeners(now: Status, change: Change) -> list[Line]:
    unit = "/s" if change.seconds else ""
    titles = ("open", f"accepted{unit}", f"refused{unit}", f"requests{unit}")
    lines = [_row("listener", "address", titles, "bold")]
    for name, address in now["listeners"].items():
        handshakes = [(key[1], much) for key, much in change.since("handshakes") if key[0] == name]
        accepted = sum(much for outcome, much in handshakes if outcome == "accept")
        refused = sum(much for _, much in handshakes) - accepted
        requests = sum(much for key, much in change.since("requests") if key[0] == name)
        open_now = now["state"]["connections"].get(name, 0)
        counts = (f"{open_now:,}", *map(change.shown, (accepted, refused, requests)))
        lines.append(_row(name, address, counts))
    return lines


def _latency(change: Change) -> list[Line]:
    lines: list[Line] = [(f"{'latency':<38}{'p50':>10}{'p99':>10}", "bold")]
    handshakes = change.values("handshake_seconds", lambda key: key[1] == "accept")
    for name, counts in (("handshake", handshakes), ("request", change.values("request_seconds", lambda _: True))):
        lines.append((f"  {name:<36}{_wait(quantile(counts, 0.5)):>10}{_wait(quantile(counts, 0.99)):>10}", ""))
    return lines


def _refused(change: Change) -> list[Line]:
    recent, ever = change.reasons(), Change(change.state, None, 0).reasons()
    if not ever:
        return []
    rate = f"{'a second':>12}" if change.seconds else ""
    lines: list[Line] = [(f"{'refused':<38}{'since start':>12}{rate}", "bold")]
    for code in sorted(ever, key=lambda code: (-recent.get(code, 0), -ever[code]))[:TOP]:
        rate = f"{change.shown(recent.get(code, 0)):>12}" if change.seconds else ""
        lines.append(
            (f"  {code:<36}{ever[code]:>12,.0f}{rate}", "yellow" if change.seconds and recent.get(code) else "")
        )
        message, hint = words_of(code)
        lines += [(f"    {text}", "") for text in (message, hint and f"next: {hint}") if text]
    return lines


def _in_force(now: Status, width: int) -> list[Line]:
    state = now["state"]
    lines: list[Line] = []
    ends = [(not_after, name, "ends", "ENDED") for name, not_after in state["certificates"].items()]
    ends += [(due, f"list of {name}", "due", "WAS DUE") for name, due in state["lists"].items()]
    for end, name, will, did in sorted(ends):
        left = end - now["now"]
        words = f"{will} in {_span(left)}" if left > 0 else f"{did} {_span(-left)} ago"
        colour = "red" if left <= 0 else "yellow" if left < 3600 else ""
        lines.append((f"  {name:<36}{words} ({datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%M} UTC)", colour))
    age = _span(now["now"] - state["loaded_at"])
    words = f"number {state['generation']}, loaded {age} ago" if state["generation"] else "NONE IN FORCE"
    lines.append((f"  {'snapshot':<36}{words}", "" if state["generation"] else "red"))
    for (outcome, reason), much in state["counters"]["reloads"]:
        kept = outcome != "taken"
        words = f"{much:,.0f} {outcome}" + (f": {reason}" if kept and reason else "")
        lines.append((f"  {'reloads':<36}{words}", "yellow" if kept else ""))
    if state["kept"]:
        lines.append(("  the last reload was kept back; what was in force still is:", "red"))
        lines += [(f"    {text}", "red") for text in wrap(state["kept"], max(10, width - 4))[:REASON_LINES]]
    if state["log_broken"]:
        lines.append((f"  {'log':<36}CANNOT BE WRITTEN", "red"))
    return [("in force", "bold"), *lines]


def _upstreams(state: State) -> list[Line]:
    lines: list[Line] = []
    for name, target, healthy, connections in state["upstreams"]:
        words = f"{'healthy' if healthy else 'DOWN'}, {_many(connections, 'connection')}"
        lines.append((f"  {_fit(name, 22)} {_fit(target, 29)} {words}", "" if healthy else "red"))
    return [("upstreams", "bold"), *lines] if lines else []


def _workers(state: State, change: Change) -> list[Line]:
    lines: list[Line] = []
    for worker in state["workers"]:
        used = change.cpu(worker["worker"], worker["pid"])
        cpu = f"{worker['cpu_seconds']:,.0f} s" if used is None else f"{100 * used:.0f} %"
        silent = worker["silent"] >= SILENT
        memory = f"{worker['memory'] / (1 << 20):,.0f} MiB"
        words = f"process {worker['pid']:<10} CPU {cpu:<10} memory {memory:<12}"
        words += f"SILENT for {_span(worker['silent'])}" if silent else ""
        lines.append((f"  {worker['worker']:<3} {words}", "red" if silent else ""))
    return [("workers", "bold"), *lines] if lines else []


def _row(name: str, address: str, counts: tuple[str, ...], colour: str = "") -> Line:
    open_, accepted, refused, requests = counts
    return (f"{_fit(name, 14)} {_fit(address, 22)} {open_:>7} {accepted:>11} {refused:>10} {requests:>11}", colour)


def words_of(code: str) -> tuple[str, str]:
    """What a reason means and what to do, without the facts of one case. Empty for a code that is not ours."""
    reason = _REASONS.get(code)
    if reason is None:
        return "", ""
    message = _FACT.sub(lambda fact: _FACTS.get(fact[1], "…"), reason.value.message)
    hint = _FACT.sub("…", reason.value.hint)
    return _VAGUE.sub("", message).removesuffix(": …"), "" if hint == "…" else hint


_REASONS = {reason.code: reason for reason in Reason}
_FACT = re.compile(r"\{(\w+)[^}]*\}")
_VAGUE = re.compile(r" \([^()]*…[^()]*\)")  # a bracket that holds nothing without its facts
_FACTS = {"subject": "the certificate", "issuer": "its issuer", "who": "a client"}


def _wait(seconds: float | None) -> str:
    """A wait in three digits and its unit."""
    if seconds is None:
        return "-"
    if seconds > BOUNDS[-1]:
        return f"> {BOUNDS[-1]:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _span(seconds: float) -> str:
    """A length of time in words, its two largest units."""
    left = max(0, int(seconds))
    words: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count and len(words) < 2:
            words.append(f"{count} {unit}")
        elif words:
            break
    return " ".join(words) or "0 s"


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _cut(text: str, width: int) -> str:
    """On one line, of printable characters, no wider than `width`: what answers may not be a guard."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text).rstrip()
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _fit(text: str, width: int) -> str:
    """A name in so many columns, cut in its midst: names that go together often begin alike, or end so."""
    if len(text) <= width:
        return f"{text:<{width}}"
    end = width // 2
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def _style(text: str, colour: str) -> str:
    if not colour or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, bold=True) if colour == "bold" else click.style(text, fg=colour)
