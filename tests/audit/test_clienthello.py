"""Hand-made ClientHellos are sound where they mean to be, and whatever comes back is read without harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.audit.clienthello import (
    Hello,
    in_records,
    parse_answer,
    refragmented,
    server_name_list,
)
from handfast.audit.oracle import End
from handfast.errors import RemoteProtocolError
from handfast.wire.hello import HelloReader


def test_a_usual_hello_is_read_as_it_was_meant() -> None:
    """The guard's own strict reader takes it, with its name."""
    hello = HelloReader().feed(Hello("api.internal").records())
    assert hello is not None
    assert hello.server_name == "api.internal"


@pytest.mark.parametrize("size", [1, 7, 16384])
def test_crumbs_are_the_same_hello(size: int) -> None:
    """Cut into small records it is still the same message."""
    records = Hello("api.internal").records()
    hello = HelloReader().feed(refragmented(records, size))
    assert hello is not None
    assert hello.server_name == "api.internal"


@pytest.mark.parametrize(
    "names",
    [
        (server_name_list(b"a"), server_name_list(b"b")),
        (server_name_list(b"a", b"b"),),
        (server_name_list(b"a" * 300),),
        (server_name_list(b"a\0b"),),
        (server_name_list(b"a")[:-1],),
    ],
)
def test_odd_names_are_odd(names: tuple[bytes, ...]) -> None:
    """The guard's own reader refuses each of them: the attack is one."""
    with pytest.raises(RemoteProtocolError):
        HelloReader().feed(Hello(None, names=names).records())


@given(raw=st.binary(max_size=300), end=st.sampled_from(End))
def test_reading_an_answer_is_total(raw: bytes, end: End) -> None:
    """Whatever a server sends, it is read as a choice, an alert or neither."""
    answer = parse_answer(raw, end)
    assert str(answer)
    assert not (answer.refused and answer.choice)


@given(body=st.binary(max_size=120))
def test_reading_a_server_hello_is_total(body: bytes) -> None:
    """A ServerHello with anything in it is a choice or none."""
    record = in_records(b"\2" + len(body).to_bytes(3, "big") + body, 16384)
    assert parse_answer(record, End.OPEN).raw == record
