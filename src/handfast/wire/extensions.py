"""The extensions of handshake messages, read: what each says, in words (RFC 8446 4.2, RFC 6066 and their kin).

Total over any bytes: what is malformed is shown as that. Also owns the reader of fields that `messages` reads with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from handfast.errors import InvalidInput
from handfast.pki import der
from handfast.wire import registry

MAX_VALUES = 1000  # of one list that are shown


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension: its number, its bytes, and what they say, in words; () where they are empty or not known."""

    number: int
    data: bytes
    values: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its registered name."""
        return registry.name_of(registry.EXTENSIONS, self.number)


Extensions: TypeAlias = tuple[Extension, ...]


def render_name(name: bytes) -> str:
    """A distinguished name in DER as text, as RFC 4514 has it, printable whatever it holds. Raises nothing."""
    try:
        parts = [
            _attribute(attribute)
            for _, rdn in der.read_all(der.read_one(name)[1])
            for _, attribute in der.read_all(rdn)
        ]
    except (InvalidInput, ValueError, IndexError):
        return f"a name that cannot be read ({len(name)} bytes)"
    return ",".join(reversed(parts)) or "an empty name"


class Malformed(Exception):
    """The bytes are not what their place asks for."""


class Reader:
    """Takes fields off the front of bytes. Each method raises Malformed where they are not there."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes there are yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            raise Malformed("a field ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, octets: int) -> int:
        """A number of so many octets."""
        return int.from_bytes(self.take(octets), "big")

    def vector(self, octets: int) -> bytes:
        """A field behind its length, which has so many octets."""
        return self.take(self.number(octets))

    def inside(self, octets: int) -> Reader:
        """A reader of the field behind its length."""
        return Reader(self.vector(octets))

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def end(self) -> None:
        """See that nothing is left."""
        if self.left:
            raise Malformed(f"{self.left} bytes are left over")


def read_extensions(reader: Reader, where: str) -> Extensions:
    """Take a list of extensions. `where`: client, server, retry, request, or another message's name.

    Raises Malformed where the list does not parse; an extension in it that does not is shown as unreadable.
    """
    inside, found = reader.inside(2), list[Extension]()
    while inside.left:
        number, data = inside.number(2), inside.vector(2)
        try:
            field = Reader(data)
            values = tuple(_extension(number, field, where))[:MAX_VALUES] if data else ()
        except Malformed as malformed:
            values = (f"unreadable: {malformed}",)
        found.append(Extension(number, data, values))
    return tuple(found)


def _extension(number: int, field: Reader, where: str) -> Iterator[str]:
    """What an extension says. The forms of several hang on the message that they are in."""
    match number, where:
        case (0, _):
            yield from _host_names(field.inside(2))
        case (16, _):
            names = field.inside(2)
            while names.left:
                yield _text(names.vector(1))
        case (10, _):
            yield from _named(registry.GROUPS, field.inside(2))
        case (13 | 50, _):
            yield from _named(registry.SCHEMES, field.inside(2))
        case (43, "client"):
            yield from _named(registry.VERSIONS, field.inside(1))
        case (43, _):
            yield registry.name_of(registry.VERSIONS, field.number(2))
        case (51, "client"):
            shares = field.inside(2)
            while shares.left:
                group = registry.name_of(registry.GROUPS, shares.number(2))
                yield f"{group} ({len(shares.vector(2))} bytes)"
        case (51, "server"):
            group = registry.name_of(registry.GROUPS, field.number(2))
            yield f"{group} ({len(field.vector(2))} bytes)"
        case (51, "retry"):
            yield registry.name_of(registry.GROUPS, field.number(2))
        case (47, _):
            yield from map(render_name, read_names(field.inside(2)))
        case (41, "client"):
            yield f"{len(field.vector(2))} bytes of identities"
        case (28, _):
            yield f"{field.number(2)} bytes"
        case (42, "ticket"):
            yield f"{field.number(4)} bytes"
        case _:
            return


def _host_names(names: Reader) -> Iterator[str]:
    while names.left:
        kind, name = names.number(1), names.vector(2)
        if kind == 0:
            yield _text(name)


def _named(table: dict[int, str], numbers: Reader) -> Iterator[str]:
    for number in read_numbers(numbers, 2):
        if not registry.is_grease(number):
            yield registry.name_of(table, number)


def read_numbers(reader: Reader, octets: int) -> tuple[int, ...]:
    """Take all that is left, as numbers of so many octets. Raises Malformed."""
    if reader.left % octets:
        raise Malformed("a list ends within an entry")
    data = reader.rest()
    return tuple(int.from_bytes(data[at : at + octets], "big") for at in range(0, len(data), octets))


def read_names(reader: Reader) -> tuple[bytes, ...]:
    """Take the distinguished names that are left, in DER; `MAX_VALUES` at most. Raises Malformed."""
    found: list[bytes] = []
    while reader.left and len(found) < MAX_VALUES:
        found.append(reader.vector(2))
    return tuple(found)


def _text(data: bytes) -> str:
    text = data.decode("ascii", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# X.520's attributes as RFC 4514 3 writes them, and those that are in use besides.
_ATTRIBUTES = {
    "2.5.4.3": "CN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "STREET",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "0.9.2342.19200300.100.1.25": "DC",
    "0.9.2342.19200300.100.1.1": "UID",
    "1.2.840.113549.1.9.1": "emailAddress",
}


def _attribute(attribute: bytes) -> str:
    (_, oid), (tag, value) = list(der.read_all(attribute))[:2]
    dotted = der.dotted(oid)
    encoding = {0x1E: "utf-16-be", 0x1C: "utf-32-be", 0x14: "latin-1"}.get(tag, "utf-8")
    text = value.decode(encoding, "replace")
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return f"{_ATTRIBUTES.get(dotted, dotted)}={shown.replace(',', chr(92) + ',')}"
