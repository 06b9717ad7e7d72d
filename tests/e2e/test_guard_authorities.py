"""Two authorities on one site: rules ask who vouches for a name, whichever way the guard is told of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.e2e.guard_kit import JSON, Client, Files, Guarded, guarding
from tests.e2e.kit import Caller
from tests.support.apps import App, echo_head
from tests.support.certs import Ca, Leaf

SITE = """
[[listener]]
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = {ca}
to = "{to}"
"""
BOTH = '{ staff = "ca.crt", partners = "partners.crt" }'
RULES = 'allow = ["cn:admin by staff", "any by partners GET /public/**"]\n'


class Two(Files):
    """A folder with two authorities that bear one name, and from each a client that bears one name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.others = Ca.root("Test Root")
        self.others.save(self.folder, "partners")
        self.ours, self.theirs = self.admin("ours", self.ca), self.admin("theirs", self.others)

    def admin(self, file: str, ca: Ca) -> Client:
        ca.client("spiffe://test/admin", cn="admin").save(self.folder, file)
        return Client(self.folder / "ca.crt", self.folder / f"{file}.crt", self.folder / f"{file}.key")


@pytest.fixture
def files(tmp_path: Path) -> Two:
    return Two(tmp_path)


@pytest.fixture
def app() -> Iterator[App]:
    with App(echo_head) as app:
        yield app


def test_a_rule_asks_who_vouches(files: Two, app: App) -> None:
    """The same name of two authorities is two identities: in rules, in the log, and in what the app is told. What a
    refusal advises would let in that one alone.
    """
    config = '[assertion]\naudience = "app"\n' + SITE.format(ca=BOTH, to=app.address) + RULES
    with guarding(files.folder, config + 'headers = ["assertion", "client-authority"]\n') as guard:
        assert not any("vouch" in line for line in guard.ready["warnings"])
        said = {}
        for name, client in (("staff", files.ours), ("partners", files.theirs)):
            got = client.ask(guard.port, "/public/x")
            assert (got.status, guard.next("connection")["authority"]) == (200, name)
            assert got.lines["client-authority"] == f'"{name}"'
            request = guard.next("request")
            assert (request["peer"], request["by"]) == ("spiffe://test/admin", name)
            claims = jwt.decode(got.lines["handfast-assertion"], options={"verify_signature": False})
            said[name] = claims["authority"], claims["sub"]
        assert said == {"staff": ("staff", "spiffe://test/admin"), "partners": ("partners", "spiffe://test/admin")}
        assert files.ours.ask(guard.port).status == 200
        assert files.theirs.ask(guard.port).error == (403, "policy.no_rule")
        refused = guard.next("request", decision="deny")
        assert refused["by"] == "partners"
        assert '"spiffe://test/admin by partners GET /"' in refused["remedy"]


def test_what_names_mean_changes_on_open_connections(files: Two, app: App) -> None:
    """When authorities' names change places, open connections are judged by the new ones: who may not stay is cut off,
    and of who may the app is told the new name with the next request.
    """
    site = SITE.format(ca=BOTH, to=app.address) + 'headers = ["client-authority"]\n'
    rules = 'allow = ["any by staff"]\n'
    both = site + "allow = ['any by staff /staff', 'any /any']\n"

    def turn(guard: Guarded) -> None:
        text = (files.folder / "handfast.toml").read_text()
        turned = '{ staff = "partners.crt", partners = "ca.crt" }'
        (files.folder / "handfast.toml").write_text(text.replace(BOTH, turned))
        guard.send(signal.SIGHUP)

    with guarding(files.folder, site + rules) as guard, files.ours.line(guard.port) as line:
        assert line.ask().status == 200
        assert files.theirs.ask(guard.port).error == (403, "policy.no_rule")
        turn(guard)
        assert guard.next("ended")["reason"] == "ended.policy"
        guard.next("reload", outcome="taken")
        assert files.theirs.ask(guard.port).status == 200
        assert files.ours.ask(guard.port).error == (403, "policy.no_rule")
    with guarding(files.folder, both) as guard, files.ours.line(guard.port) as line:
        assert line.ask("/staff").status == 200
        assert line.ask("/any").lines["client-authority"] == '"staff"'
        turn(guard)
        guard.next("reload", outcome="taken")
        assert line.ask("/staff").error == (403, "policy.no_rule")
        assert line.ask("/any").lines["client-authority"] == '"partners"'
        assert guard.next("request", status=200, by="partners")["path"] == "/any"


def test_an_authority_may_have_two_roots(files: Two, app: App) -> None:
    """Clients of an old and a new root in one file are of the same authority, so that a root can be renewed."""
    new = Ca.root("New Root")
    with (files.folder / "ca.crt").open("ab") as bundle:
        bundle.write(new.save(files.folder, "new").read_bytes())
    renewed = files.admin("renewed", new)
    with guarding(files.folder, SITE.format(ca=BOTH, to=app.address) + 'allow = ["any by staff"]\n') as guard:
        for client, status in ((files.ours, 200), (renewed, 200), (files.theirs, 403)):
            assert client.ask(guard.port).status == status


@pytest.mark.parametrize("tcp", [False, True])
def test_flags_name_authorities_too(files: Two, app: App, tcp: bool) -> None:
    """`--client-ca NAME=FILE` and `--allow 'WHO by NAME'` say the same, over TCP as well."""
    to = f"tcp://{app.address}" if tcp else app.address
    words = ["--to", to, "--cert", "server.crt", "--key", "server.key", "--allow", "any by staff"]
    words += ["--client-ca", "staff=ca.crt", "--client-ca", "partners=partners.crt"]
    with guarding(files.folder, None, *words) as guard:
        assert files.ours.ask(guard.port).status == 200
        with files.theirs.line(guard.port) as line:
            if tcp:
                assert line.ends_within(5)
            else:
                assert line.ask().error == (403, "policy.no_rule")
        refused = guard.next("connection", decision="deny") if tcp else guard.next("request", decision="deny")
        assert (refused["reason"], "by partners" in refused["remedy"]) == ("policy.no_rule", True)


@pytest.mark.parametrize(
    ("given", "rule", "words"),
    [
        (("ca.crt", "partners.crt"), "any", "needs a name of its own"),
        (("a=ca.crt", "partners.crt"), "any", "needs a name of its own"),
        (("a=ca.crt", "a=partners.crt"), "any", "needs a name of its own"),
        (("ca.crt",), "any by a", "no authority is called a"),
        (("ca.crt",), "any by", "no authority is called NAME"),
        (("a=ca.crt", "b=partners.crt"), "any by c", "the authorities' names are a, b"),
        (("a=ca.crt", "b=./ca.crt"), "any", "is both a and b in client_ca"),
        (("a=ca.crt", "b=renewed.crt"), "any", "is both a and b in client_ca"),
        (("a=none.crt",), "any", "none.crt"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    files: Two, monkeypatch: pytest.MonkeyPatch, call: Caller, given: tuple[str, ...], rule: str, words: str
) -> None:
    """Two authorities without names, one under two names (also in a certificate renewed under its key), and names
    that nobody bears: the guard does not start, and says why.
    """
    monkeypatch.chdir(files.folder)
    again = Ca.root("Test Root", key=files.ca.key)
    again.save(files.folder, "renewed")
    flags = [word for one in given for word in ("--client-ca", one)]
    flags += ["--to", "127.0.0.1:9", "--cert", "server.crt", "--key", "server.key", "--allow", rule]
    code, _ = call.refused("guard", *flags, "--check")
    assert code != 0
    assert words in call("guard", *flags, "--check").err


def test_a_file_of_that_name_is_no_authoritys_name(files: Two, monkeypatch: pytest.MonkeyPatch, call: Caller) -> None:
    """A file with `=` in its name is written with its folder."""
    monkeypatch.chdir(files.folder)
    (files.folder / "a=b.crt").write_bytes((files.folder / "ca.crt").read_bytes())
    flags = ("--to", "127.0.0.1:9", "--cert", "server.crt", "--key", "server.key", "--check")
    assert call.done("guard", *flags, "--client-ca", "./a=b.crt")["good"]
    assert "b.crt" in call("guard", *flags, "--client-ca", "a=b.crt").err


@pytest.mark.parametrize(
    ("rules", "noted"),
    [
        ("", False),
        ('allow = ["any"]', False),
        ('allow = ["any by staff", "cn:x by partners"]', False),
        ('allow = ["any by staff", "cn:x"]', True),
        ('allow = ["spiffe://test/**"]', True),
        ('allow = ["deny dns:*.test", "any"]', True),
        ('trust_domain = "test"\nallow = ["web"]', True),  # of which domain both may vouch
    ],
)
def test_a_rule_that_either_may_fill_is_noted(files: Two, call: Caller, rules: str, noted: bool) -> None:
    """The start and `--check` tell of a rule about names that does not say who vouches, where two may."""
    path = files.folder / "handfast.toml"
    path.write_text(SITE.format(ca=BOTH, to="127.0.0.1:9") + rules)
    warnings = call.done("guard", "-c", path, "--check")["warnings"]
    assert [line for line in warnings if "each of 2 authorities may vouch" in line] == warnings
    assert bool(warnings) is noted


def _aiming_at(ca: Ca, issuer: x509.Certificate) -> Leaf:
    """A client of an authority whose certificate names one of its certificates by issuer and serial (RFC 5280 4.2.1.1),
    so that OpenSSL takes this one for the path and not the one that is trusted.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    usual = ca.client("spiffe://test/admin", key=key).certificate
    aim = x509.AuthorityKeyIdentifier(None, [x509.DirectoryName(issuer.issuer)], issuer.serial_number)
    builder = (
        x509.CertificateBuilder()
        .subject_name(usual.subject)
        .issuer_name(usual.issuer)
        .public_key(key.public_key())
        .serial_number(usual.serial_number)
        .not_valid_before(usual.not_valid_before_utc)
        .not_valid_after(usual.not_valid_after_utc)
        .add_extension(aim, critical=False)
    )
    for extension in usual.extensions:
        if not isinstance(extension.value, x509.AuthorityKeyIdentifier):
            builder = builder.add_extension(extension.value, extension.critical)
    return Leaf(builder.sign(ca.key, hashes.SHA256()), key, (issuer,))


@pytest.mark.parametrize("kind", ["an issuer below, renewed", "a root that the other certified"])
def test_a_client_cannot_choose_who_vouches(files: Two, app: App, kind: str) -> None:
    """Whichever certificate of its authority a client leads over, also to the other authority that certified it, the
    nearest one that has a name counts.
    """
    if kind == "an issuer below, renewed":
        below = files.ca.sub("Partners")
        files.ca.sub("Partners", key=below.key).save(files.folder, "partners")
    else:
        below = files.ca.sub("Test Partners", key=files.others.key)
        Ca.root("Test Partners", key=files.others.key).save(files.folder, "partners")
    _aiming_at(below, below.certificate).save(files.folder, "aiming")
    aiming = Client(files.folder / "ca.crt", files.folder / "aiming.crt", files.folder / "aiming.key")
    rules = 'allow = ["any by staff", "any by partners /theirs"]\nheaders = ["client-authority"]\n'
    with guarding(files.folder, SITE.format(ca=BOTH, to=app.address) + rules) as guard:
        assert aiming.ask(guard.port).error == (403, "policy.no_rule")
        assert aiming.ask(guard.port, "/theirs").lines["client-authority"] == '"partners"'
        assert files.ours.ask(guard.port).lines["client-authority"] == '"staff"'


def test_an_authority_that_gets_a_name_takes_its_clients_along(files: Two, app: App) -> None:
    """A reload that names an authority below one with a name: clients that came by it are its own from then on."""
    below = files.ca.sub("Partners")
    below.save(files.folder, "partners")
    theirs = files.admin("below", below)
    one = SITE.format(ca='{ staff = "ca.crt" }', to=app.address) + 'headers = ["client-authority"]\n'
    two = SITE.format(ca=BOTH, to=app.address) + 'headers = ["client-authority"]\n'
    with guarding(files.folder, one) as guard, theirs.line(guard.port) as line:
        assert line.ask().lines["client-authority"] == '"staff"'
        (files.folder / "handfast.toml").write_text(JSON + two + 'allow = ["deny any by partners /no", "any"]\n')
        guard.send(signal.SIGHUP)
        guard.next("reload", outcome="taken")
        assert line.ask("/no").error == (403, "policy.denied")
        assert line.ask().lines["client-authority"] == '"partners"'


def test_sites_may_call_different_authorities_alike(files: Two, app: App) -> None:
    """Limits of identities hold for each authority, though two sites of a listener call theirs by one name."""
    files.server("a", "a.test")
    files.server("b", "b.test")
    site = '[[listener.site]]\nnames = ["{0}.test"]\ncert = "{0}.crt"\nkey = "{0}.key"\nto = "{1}"\n'
    config = '[[listener]]\nlisten = "127.0.0.1:0"\nlimits = { connections_per_identity = 1 }\n'
    config += site.format("a", app.address) + 'client_ca = { clients = "ca.crt" }\n'
    config += site.format("b", app.address) + 'client_ca = { clients = "partners.crt" }\n'
    with guarding(files.folder, config) as guard, files.theirs.line(guard.port, "b.test") as line:
        assert line.ask().status == 200
        assert files.ours.ask(guard.port, name="a.test").status == 200
        with pytest.raises((OSError, HTTPException)):
            files.theirs.ask(guard.port, name="b.test")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_reload_makes_doubtful_is_noted_once(files: Two, workers: int) -> None:
    """A second authority that comes with a reload is noted in the log, as at the start; nothing is told twice."""
    top, site = f"workers = {workers}\n", SITE + 'allow = ["cn:admin"]\n'
    with guarding(files.folder, site.format(ca='{ staff = "ca.crt" }', to="127.0.0.1:9"), top=top) as guard:
        for more in ("", "# again\n"):
            text = JSON + top + site.format(ca=BOTH, to="127.0.0.1:9") + more
            (files.folder / "handfast.toml").write_text(text)
            guard.send(signal.SIGHUP)
            for _ in range(workers):
                guard.next("reload", outcome="taken")
        notes = [event["detail"] for event in guard.events("note")]
    assert len(notes) == 1
    assert "each of 2 authorities may vouch for whom 'allow cn:admin' means" in notes[0]
