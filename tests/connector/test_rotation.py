"""Certificates replaced on disk: taken whole or not at all, under traffic, without a connection lost."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handfast.connector.call import Generation
from handfast.connector.files import Material, Watch
from handfast.errors import HandfastError, Reason, VerificationFailed
from handfast.pki.names import parse_name
from handfast.tls.client import ClientSettings
from tests.connector.kit import RENEW, Calling, Server
from tests.support.certs import SERVER, Ca, Leaf
from tests.support.waiting import until

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def place(leaf: Leaf, folder: Path) -> None:
    """Put certificate and key in force, each renamed into its place."""
    cert, key = leaf.save(folder, "next")
    os.replace(cert, folder / "web.crt")
    os.replace(key, folder / "web.key")


def material(ca: Ca, folder: Path, name: str | None = None) -> Material:
    bundle = ca.save(folder, "bundle")
    settings = ClientSettings("localhost")
    return Material(folder / "web.crt", folder / "web.key", bundle, settings, RENEW, parse_name("localhost"), name)


def settled(watch: Watch) -> Generation | HandfastError | None:
    """What a change comes to, once a second look finds the files at rest."""
    assert watch.look(NOW) is None
    return watch.look(NOW)


def test_a_new_pair_is_taken_whole(ca: Ca, tmp_path: Path) -> None:
    """Nothing happens while nothing changes; a new pair is a new generation, once."""
    first, second = ca.client(), ca.client()
    place(first, tmp_path)
    watch = Watch(material(ca, tmp_path))
    assert watch.first(NOW).own.chain == first.presented
    assert watch.look(NOW) is None
    (tmp_path / "web.crt").touch()
    assert settled(watch) is None  # another time on it, the same bytes in it
    place(second, tmp_path)
    taken = settled(watch)
    assert isinstance(taken, Generation)
    assert taken.own.chain == second.presented
    assert watch.look(NOW) is None


def test_a_pair_that_comes_piece_by_piece_is_no_failure(ca: Ca, tmp_path: Path) -> None:
    """A certificate whose key is still to come is not taken for a bad change."""
    first, second = ca.client(), ca.client()
    place(first, tmp_path)
    watch = Watch(material(ca, tmp_path))
    watch.first(NOW)
    cert, key = second.save(tmp_path, "next")
    os.replace(cert, tmp_path / "web.crt")
    assert watch.look(NOW) is None
    os.replace(key, tmp_path / "web.key")
    taken = settled(watch)
    assert isinstance(taken, Generation)
    assert taken.own.chain == second.presented
    assert watch.failures == 0


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("half", Reason.INPUT_KEY_MISMATCH),
        ("gone", Reason.INPUT_MISSING),
        ("garbage", Reason.INPUT_NOT_CERTIFICATE),
        ("expired", Reason.CONNECT_EXPIRED),
        ("server", Reason.VERIFY_PURPOSE),
        ("bundle", Reason.INPUT_NOT_CERTIFICATE),
    ],
)
def test_a_bad_change_keeps_what_is_in_force_and_is_told_once(
    ca: Ca, tmp_path: Path, case: str, reason: Reason
) -> None:
    """A change that is bad gives no generation, is told once it is still bad at the second look, and is counted; when
    it is mended, the new pair is taken.
    """
    place(ca.client(), tmp_path)
    watch = Watch(material(ca, tmp_path))
    watch.first(NOW)
    match case:
        case "half":
            os.replace(ca.client().save(tmp_path, "next")[0], tmp_path / "web.crt")
        case "gone":
            (tmp_path / "web.key").unlink()
        case "garbage":
            (tmp_path / "web.crt").write_text("not a certificate")
        case "expired":
            place(ca.client(not_before=NOW - 2 * DAY, not_after=NOW - DAY), tmp_path)
        case "server":
            place(ca.client(eku=[SERVER]), tmp_path)
        case "bundle":
            (tmp_path / "bundle.crt").write_bytes((tmp_path / "web.crt").read_bytes())
    failure = settled(watch)
    assert isinstance(failure, HandfastError)
    assert failure.reason is reason
    assert watch.look(NOW) is None
    assert watch.failures == 1
    mended = ca.client()
    place(mended, tmp_path)
    ca.save(tmp_path, "bundle")
    taken = watch.look(NOW)
    assert isinstance(taken, Generation)
    assert taken.own.chain == mended.presented


def test_a_pair_that_is_not_valid_yet_is_taken_when_it_is(ca: Ca, tmp_path: Path) -> None:
    """Time alone can mend what is wrong: no file need change again."""
    place(ca.client(), tmp_path)
    watch = Watch(material(ca, tmp_path))
    watch.first(NOW)
    place(ca.client(not_before=NOW + timedelta(hours=1), not_after=NOW + DAY), tmp_path)
    assert isinstance(settled(watch), VerificationFailed)
    assert isinstance(watch.look(NOW + timedelta(hours=2)), Generation)


@pytest.mark.parametrize(("name", "good"), [("web", True), ("spiffe://test/web", True), ("db", False)])
def test_the_files_of_a_name_hold_that_name(ca: Ca, tmp_path: Path, name: str, good: bool) -> None:
    """Files that hold somebody else's certificate are refused, whatever they are called."""
    place(ca.client(), tmp_path)
    watch = Watch(material(ca, tmp_path, name))
    if good:
        assert watch.first(NOW)
    else:
        with pytest.raises(VerificationFailed) as refused:
            watch.first(NOW)
        assert refused.value.reason is Reason.VERIFY_NAME_MISMATCH


def test_certificates_change_under_traffic_without_a_connection_lost(ca: Ca, tmp_path: Path) -> None:
    """While clients call without pause and the pair is replaced again and again, no call fails, an open connection
    goes on under the certificate it began with, and new ones show the new.
    """
    place(ca.client(), tmp_path)
    watch = Watch(material(ca, tmp_path))
    made = watch.first(datetime.now(UTC))
    served = tmp_path / "server"
    served.mkdir()
    failures: list[BaseException | bytes] = []
    stop = threading.Event()
    with Server(ca, served) as server, Calling(server.address, made, 1, look=watch.look) as calling:
        with calling.open() as old:
            old.sendall(b"old")
            assert old.recv(10) == b"old"

            def traffic() -> None:
                while not stop.is_set():
                    try:
                        if (answer := calling.ask(b"ping")) != b"ping":
                            failures.append(answer)
                    except OSError as error:
                        failures.append(error)

            callers = [threading.Thread(target=traffic) for _ in range(4)]
            for caller in callers:
                caller.start()
            try:
                for count in range(1, 4):
                    leaf = ca.client()
                    place(leaf, tmp_path)
                    until(lambda serial=leaf.certificate.serial_number: serial in server.peers, "the new certificate")  # type: ignore[misc]  # a lambda's default
                    until(lambda many=count: len(calling.of("reload")) == many, "the event of it")  # type: ignore[misc]  # likewise
            finally:
                stop.set()
                for caller in callers:
                    caller.join()
            old.sendall(b"still")
            assert old.recv(10) == b"still"
        assert failures == []
        assert {event["outcome"] for event in calling.of("reload")} == {"taken"}
        assert calling.of("refused") == []
        assert len(set(server.peers)) == 4
