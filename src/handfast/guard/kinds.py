"""TOML tables read strictly: what a key takes, in words and in code, and every mistake told where it stands.

Knows no key of any table; `config.py` has those. Pure.

Theory of operation. A `Table` lists its keys; each key has a `Kind`, which says in words what it takes and reads
a value. What does not fit is noted and left at its default, so that reading goes on. Where it stood is kept, and
what is said later of such places is dropped: it would be about the default, not about what was written.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any

from handfast.errors import InvalidInput
from handfast.guard.places import parse_place
from handfast.guard.schema import AuthorityFile, Problem
from handfast.pki.names import parse_trust_domain
from handfast.pki.profiles import parse_lifetime
from handfast.policy import parse_rule
from handfast.wire.targets import normal_host

MAX_PROBLEMS = 20  # told at once; the search ends there
MAX_NUMBER = (1 << 53) - 1  # the largest size or count: exact as a float too

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_MILLISECONDS = re.compile(r"([1-9][0-9]{0,8})ms")
_RELATIVE_SOCKET = re.compile(r"((?:[a-z0-9]+(?:\+|://))?unix:)([^/].*)", re.S)
_LONGEST = 60  # characters of a wrong value that are shown
_UNITS = (("d", timedelta(days=1)), ("h", timedelta(hours=1)), ("m", timedelta(minutes=1)), ("s", timedelta(seconds=1)))


class Unfit(Exception):
    """A value that its key does not take; the text says why, or is empty where the kind's words do."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value. `read` raises Unfit, or the InvalidInput of a parser."""

    words: str
    read: Callable[[Any, Spot], Any]

    def take(self, value: object, spot: Spot, default: object) -> Any:
        """The value as it is meant; the default, and a note, where it does not fit."""
        try:
            return self.read(value, spot)
        except Unfit as why:
            spot.wrong(str(why) or f"{_shown(value)} stands there; it takes {self.words}")
        except InvalidInput as error:
            spot.wrong(str(error))
        return default


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table, and one sentence on it."""

    kind: Kind
    text: str
    name: str = ""  # the field of the dataclass, if it is not the key's
    default: str | None = None  # for people, where the dataclass's is not what holds


@dataclass(frozen=True, slots=True)
class Table:
    """The keys of one kind of table. `blank` has their defaults as attributes; `make` takes the fields given."""

    header: str
    keys: Mapping[str, Key]
    blank: object
    make: Callable[[dict[str, Any]], Any]


@dataclass(slots=True)
class Notes:
    """What was found wrong so far, and where. `tables`: all there are, to say where a key belongs."""

    tables: tuple[Table, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)  # places whose values are not what was written

    @property
    def full(self) -> bool:
        """Whether there is more than is told."""
        return len(self.problems) > MAX_PROBLEMS

    def add(self, at: str, detail: str) -> None:
        """Note what is wrong at a place."""
        self.wrong.add(at)
        if not self.full:
            self.problems.append(Problem(at, detail))

    def add_conflicts(self, conflicts: Iterable[Problem]) -> None:
        """Note what settings hold against each other, but for settings that are wrong by themselves."""
        for problem in conflicts:
            if self.full:
                return
            if not any(place in self.wrong for at in (problem.at, *problem.reads) for place in _upward(at)):
                self.problems.append(problem)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a value stands, and what reading it needs."""

    at: str
    folder: Path
    notes: Notes

    def below(self, key: str) -> Spot:
        """The place of a key in the table here."""
        shown = key if _BARE_KEY.fullmatch(key) else repr(key[:_LONGEST])
        return replace(self, at=f"{self.at}.{shown}" if self.at else shown)

    def item(self, number: int) -> Spot:
        """The place of an item in the list here, from 0."""
        return replace(self, at=f"{self.at}[{number}]")

    def wrong(self, detail: str) -> None:
        """Note what is wrong here."""
        self.notes.add(self.at, detail)


def read_table(table: Table, value: object, spot: Spot) -> Any:
    """What the table makes of the value; what does not fit is noted. Raises nothing."""
    if not isinstance(value, dict):
        spot.wrong(f"{_shown(value)} stands there; it is a table, written {table.header}")
        return table.make({})
    for key in value:
        if key not in table.keys and not spot.notes.full:
            _unknown(table, key, spot)
    fields = {}
    for name, key in table.keys.items():
        if name in value:
            field_name = key.name or name
            fields[field_name] = key.kind.take(value[name], spot.below(name), getattr(table.blank, field_name))
    return table.make(fields)


def _unknown(table: Table, key: str, spot: Spot) -> None:
    """Note a key that is not of the table, with the nearest that is, or the tables that have it."""
    near = get_close_matches(key[:64].lower().replace("-", "_"), table.keys, 1, 0.6)
    homes = [other.header for other in spot.notes.tables if key in other.keys]
    if near:
        more = f"did you mean {near[0]}?"
        spot.notes.wrong.add(spot.below(near[0]).at)  # it was given, if under another name
    elif homes:
        more = f"it belongs {' or '.join(map(_inside, homes))}"
    else:
        more = f"the nearest is {get_close_matches(key[:64], table.keys, 1, 0.0)[0]}"
    spot.below(key).wrong(f"there is no such key {_inside(table.header)}; {more}")


def _inside(header: str) -> str:
    return f"in {header}" if header.startswith("[") else header


def _upward(at: str) -> Iterator[str]:
    """A place and those that hold it: listener[0].site[1].cert, listener[0].site[1], listener[0].site, ..."""
    while at:
        yield at
        at = at[: max(at.rfind("."), at.rfind("["), 0)]


def _shown(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…")
        case int():
            return str(value) if abs(value) <= 1 << 64 else "a number too large"  # Python refuses to print some
        case dict():
            return "a table"
        case list():
            return "a list"
        case _:
            return str(value)


def parse_duration(text: str) -> timedelta:
    """Parse a length of time: what `parse_lifetime` takes, and `250ms`. Raises InvalidInput (INPUT_LIFETIME)."""
    found = _MILLISECONDS.fullmatch(text)
    return timedelta(milliseconds=int(found[1])) if found else parse_lifetime(text)


def render_duration(length: timedelta) -> str:
    """A length of time as `parse_duration` takes it, in its largest whole unit."""
    for unit, size in _UNITS:
        if length >= size and not length % size:
            return f"{length // size}{unit}"
    return f"{length // timedelta(milliseconds=1)}ms"


# Kinds of values. Each function makes one, or is one's `read`.


def text(words: str, pattern: str = r".+") -> Kind:
    """Printable text that the whole pattern matches."""
    expression = re.compile(pattern)

    def read(value: object, spot: Spot) -> str:
        found = _text(value)
        if not expression.fullmatch(found):
            raise Unfit
        return found

    return Kind(words, read)


def whole(low: int, high: int = MAX_NUMBER, unit: str = "") -> Kind:
    """A whole number, ends included; `unit` is what it counts, in words."""

    def read(value: object, spot: Spot) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Unfit
        return value

    span = f", {low} or more" if high == MAX_NUMBER else f" from {low} to {high}"
    return Kind(f"a whole number{unit and f' of {unit}'}{span}", read)


def length(low: str, high: str) -> Kind:
    """A length of time, ends included."""
    least, most = parse_duration(low), parse_duration(high)

    def read(value: object, spot: Spot) -> timedelta:
        if not isinstance(value, str):
            raise Unfit
        try:
            found = parse_duration(value)
        except InvalidInput:
            raise Unfit from None
        if not least <= found <= most:
            raise Unfit
        return found

    return Kind(f'a length of time from "{low}" to "{high}", as "250ms", "10s" or "5m"', read)


def choice(values: type[StrEnum], *without: StrEnum) -> Kind:
    """One of an enum's values, but for some."""
    taken = {one.value: one for one in values if one not in without}

    def read(value: object, spot: Spot) -> StrEnum:
        if not isinstance(value, str) or value not in taken:
            raise Unfit
        return taken[value]

    return Kind(" or ".join(f'"{one}"' for one in taken), read)


def or_word(word: str, meaning: object, kind: Kind) -> Kind:
    """A kind, or a word that stands for a value of its own."""
    return Kind(f'{kind.words}; or "{word}"', lambda value, spot: meaning if value == word else kind.read(value, spot))


def many(kind: Kind, words: str, *, least: int = 0, unique: bool = True) -> Kind:
    """A list of one kind, as a tuple."""

    def read(value: object, spot: Spot) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) < least:
            raise Unfit
        before = len(spot.notes.problems)
        taken = (kind.take(item, spot.item(number), None) for number, item in enumerate(value))
        found = tuple(item for item in taken if item is not None)
        if spot.notes.full or spot.notes.problems[before:]:
            spot.notes.wrong.add(spot.at)
        elif unique and len(set(found)) < len(found):
            raise Unfit(f"{Counter(found).most_common(1)[0][0]} stands there twice")
        return found

    return Kind(f"a list of {words}" + (", not empty" if least else ""), read)


def one_table(table: Table) -> Kind:
    """One table."""
    return Kind(f"a table, {table.header}", lambda value, spot: read_table(table, value, spot))


def each_table(table: Table) -> Kind:
    """Tables in an array, as a tuple."""

    def read(value: object, spot: Spot) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise Unfit(f"{_shown(value)} stands there; it is begun with {table.header}, in double brackets")
        return tuple(read_table(table, item, spot.item(number)) for number, item in enumerate(value))

    return Kind(f"tables, each {table.header}", read)


def named_tables(table: Table) -> Kind:
    """Tables by names of the user's: a letter, then letters, digits, `-` and `_`. No target looks so."""

    def read(value: object, spot: Spot) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise Unfit
        _check_names(value, spot)
        return {name: read_table(table, item, spot.below(name)) for name, item in value.items()}

    return Kind(f"tables, each {table.header}", read)


def _check_names(names: Iterable[str], spot: Spot) -> None:
    for name in names:
        if not is_name(name):
            spot.below(name).wrong("a name begins with a letter; letters, digits, - and _ may follow, 63 in all")


def is_name(text: str) -> bool:
    """Whether it may be a name of the user's."""
    return _NAME.fullmatch(text) is not None


def _text(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or not value.isprintable():  # PATH_MAX, limits.h
        raise Unfit
    return value


def _read_flag(value: object, spot: Spot) -> bool:
    if not isinstance(value, bool):
        raise Unfit
    return value


def _read_rate(value: object, spot: Spot) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_NUMBER:
        raise Unfit
    return float(value)


def _with_folder(text: str, folder: Path) -> str:
    """A target or address with the path of its UNIX socket below the folder."""
    found = _RELATIVE_SOCKET.fullmatch(text)
    return f"{found[1]}{folder / found[2]}" if found else text


def _read_place(value: object, spot: Spot) -> str:
    text = _with_folder(_text(value), spot.folder)
    parse_place(text)
    return text


def _read_authorities(value: object, spot: Spot) -> tuple[AuthorityFile, ...]:
    if not isinstance(value, dict):
        return (AuthorityFile(PATH.read(value, spot)),)
    if not value:
        raise Unfit
    before = len(spot.notes.problems)
    _check_names(value, spot)
    found = {name: PATH.take(path, spot.below(name), None) for name, path in value.items()}
    if spot.notes.full or spot.notes.problems[before:]:
        spot.notes.wrong.add(spot.at)
    return tuple(AuthorityFile(path, name) for name, path in found.items() if path is not None)


def _read_network(value: object, spot: Spot) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(_text(value))
    except ValueError as error:
        raise Unfit(str(error)) from None


def _read_host(value: object, spot: Spot) -> str:
    host = normal_host(_text(value))
    if host is None:
        raise Unfit
    return host.decode("ascii")


def _read_server_name(value: object, spot: Spot) -> str:
    text = _text(value)
    rest = text.removeprefix("*.")
    if "*" in rest:
        raise Unfit(f"{_shown(text)}: * stands for one whole label, the left-most, as in *.example.com")
    host = normal_host(rest)
    if host is None or b":" in host or host.rpartition(b".")[2].isdigit():  # RFC 6066 3: no address is a server name
        raise Unfit
    return ("*." if rest != text else "") + host.decode("ascii")


def _read_route_path(value: object, spot: Spot) -> str:
    text = _text(value)
    if not text.startswith("/") or " " in text:
        raise Unfit
    parse_rule(f"any {text}")
    return text


FLAG = Kind("true or false", _read_flag)
RATE = Kind("a number more than 0", _read_rate)
PATH = Kind("the path of a file", lambda value, spot: spot.folder / _text(value))
AUTHORITIES = Kind(
    'the path of a file; or names and paths, as { staff = "staff.crt", partners = "partners.crt" }', _read_authorities
)
FOLDER = Kind("the path of a folder", PATH.read)
TARGET = Kind(
    'a target, as "127.0.0.1:8000", "https://HOST:PORT" or "unix:PATH"',
    lambda value, spot: _with_folder(_text(value), spot.folder),
)
PLACE = Kind('"HOST:PORT", "unix:PATH" or "systemd:NAME"', _read_place)
NETWORK = Kind('a network, as "10.0.0.0/8"', _read_network)
HOST = Kind("a host's name or address", _read_host)
SERVER_NAME = Kind('a DNS name, as "app.example.com" or "*.example.com"', _read_server_name)
ROUTE_PATH = Kind('a path pattern, as "/public/**"', _read_route_path)
TRUST_DOMAIN = Kind('a trust domain, as "corp.internal"', lambda value, spot: parse_trust_domain(_text(value)))
