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
from handfast.wire.distinguished import Spelling, render_rdns

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
        return render_rdns(der.read_one(name)[1], Spelling.READABLE) or "an empty name"
    except InvalidInput:
        return f"a name that cannot be read ({len(name)} bytes)"


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
        case (registry.SERVER_NAME, _):
            yield from _host_names(field.inside(2))
        case (registry.ALPN, _):
            names = field.inside(2)
            while names.left:
                yield _text(names.vector(1))
        case (registry.SUPPORTED_GROUPS, _):
            yield from _named(registry.GROUPS, field.inside(2))
        case (registry.SIGNATURE_ALGORITHMS | registry.SIGNATURE_ALGORITHMS_CERT, _):
            yield from _named(registry.SCHEMES, field.inside(2))
        case (registry.SUPPORTED_VERSIONS, "client"):
            yield from _named(registry.VERSIONS, field.inside(1))
        case (registry.SUPPORTED_VERSIONS, _):
            yield registry.name_of(registry.VERSIONS, field.number(2))
        case (registry.KEY_SHARE, "client"):
            shares = field.inside(2)
            while shares.left:
                group = registry.name_of(registry.GROUPS, shares.number(2))
                yield f"{group} ({len(shares.vector(2))} bytes)"
        case (registry.KEY_SHARE, "server"):
            group = registry.name_of(registry.GROUPS, field.number(2))
            yield f"{group} ({len(field.vector(2))} bytes)"
        case (registry.KEY_SHARE, "retry"):
            yield registry.name_of(registry.GROUPS, field.number(2))
        case (registry.CERTIFICATE_AUTHORITIES, _):
            yield from map(render_name, read_names(field.inside(2)))
        case (registry.PRE_SHARED_KEY, "client"):
            yield f"{len(field.vector(2))} bytes of identities"
        case (registry.RECORD_SIZE_LIMIT, _):
            yield f"{field.number(2)} bytes"
        case (registry.EARLY_DATA, "ticket"):
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
