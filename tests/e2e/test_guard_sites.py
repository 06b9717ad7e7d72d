"""Several listeners, sites by server name, and routes: who gets where, and who nowhere."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from handfast.errors import InvalidInput
from handfast.guard.config import parse_config
from tests.e2e.guard_kit import Client, Files, apps, guarding
from tests.support.apps import App, echo_head
from tests.support.certs import SERVER, Ca

SITES = """
[[listener]]
name = "front"
listen = "127.0.0.1:0"

[[listener.site]]
names = ["App.Test", "*.app.test"]
default = true
cert = "app.crt"
key = "app.key"
client_ca = "staff.crt"
to = "{app}"

[[listener.site]]
names = ["deep.app.test"]
cert = "deep.crt"
key = "deep.key"
client_ca = "partners.crt"
tls_min = "1.2"
to = "{deep}"

[[listener]]
name = "other"
listen = "127.0.0.1:0"
mode = "tcp"

[[listener.site]]
names = ["db.test"]
cert = "db.crt"
key = "db.key"
client_ca = "partners.crt"
to = "tcp://{db}"
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Servers of one authority; clients of two others, in staff.crt and partners.crt."""
    files = Files(tmp_path)
    staff, partners = Ca.root("Staff"), Ca.root("Partners")
    staff.save(tmp_path, "staff")
    partners.save(tmp_path, "partners")
    files.server("app", "app.test", "*.app.test")
    files.server("deep", "deep.app.test")
    files.server("db", "db.test")
    files.client("ann", staff)
    files.client("pat", partners)
    return files


def test_each_name_has_its_own_site(files: Files) -> None:
    """A server name leads to its site, exact before wildcard, in any case, with a dot behind it and without a name;
    each site shows its own certificate, takes clients of its own authority and no other, and has its own app.
    """
    ann, pat = files.client("ann"), files.client("pat")
    with (
        apps("app", "deep", "db") as (app, deep, db),
        guarding(files.folder, SITES.format(app=app.address, deep=deep.address, db=db.address)) as guard,
    ):
        port = guard.ports["front"]
        assert shown_name(ann, port, "app.test") == "app.test"
        assert shown_name(pat, port, "deep.app.test") == "deep.app.test"
        for name in ("app.test", "www.app.test", "APP.Test", "app.test.", None):
            with ann.line(port, name, checked=False) as line:
                assert line.ask(host="app.test" if name is None else "").body == b"app"
        assert pat.ask(port, name="deep.app.test").body == b"deep"
        assert ann.ask(port, name="deep.app.test").error == (403, "verify.unknown_issuer")
        assert pat.ask(port, name="app.test").error == (403, "verify.unknown_issuer")
        assert (len(deep.received) > 0, app.connections, deep.connections) == (True, 5, 1)
        assert app.received.count(b"deep") == 0
        assert set(guard.ports) == {"front", "other"}
        with pat.line(guard.ports["other"], "db.test") as line:
            assert line.ask().body == b"db"
        with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"), ann.line(guard.ports["other"], "db.test") as line:
            line.ask()


def shown_name(client: Client, port: int, name: str) -> str:
    """The first name of the certificate that a server of this name shows."""
    with client.line(port, name) as line:
        shown = line.tls.getpeercert()
        assert shown is not None
        return str(shown["subjectAltName"][0][1])


@pytest.mark.parametrize("name", ["unknown.test", "a.b.app.test", "app.test.evil.test", "xapp.test"])
def test_a_name_of_no_site_is_refused(files: Files, name: str) -> None:
    """A server name that no site has gets the alert unrecognized_name (112) and a log line; nothing is shown."""
    ann, sites = files.client("ann"), SITES.format(app="127.0.0.1:9", deep="127.0.0.1:9", db="127.0.0.1:9")
    with guarding(files.folder, sites) as guard:
        with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name"), ann.line(guard.ports["front"], name):
            pass
        event = guard.next("connection")
        assert (event["decision"], event["reason"]) == ("deny", "tls.unknown_name")
        assert name in event["detail"]
        with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name"), ann.line(guard.ports["other"], "app.test"):
            pass
        assert files.client("ann").ask(guard.ports["front"], name="app.test").status == 502


def test_what_is_asked_for_must_be_what_was_named(files: Files) -> None:
    """A Host of another site, or of none, is 421 on a connection for this one, and the app hears nothing of it."""
    ann = files.client("ann")
    with apps("app") as (app,):
        config = SITES.format(app=app.address, deep=app.address, db=app.address)
        with guarding(files.folder, config) as guard:
            port = guard.ports["front"]
            with ann.line(port, "app.test") as line:
                for host in ("deep.app.test", "www.app.test", "unknown.test", "127.0.0.1"):
                    assert line.ask(host=host).error == (421, "http.misdirected")
                assert app.connections == 0
                for host in ("app.test", "APP.test", "app.test.", "app.test:443"):
                    assert line.ask(host=host).status == 200
            with ann.line(port, None) as line:
                assert line.ask(host="deep.app.test").error == (421, "http.misdirected")
                assert line.ask(host="x.app.test").status == 200


def test_each_site_has_its_own_oldest_version(files: Files) -> None:
    """TLS 1.2 is spoken where tls_min says so, and refused by the sites beside it."""
    ann, pat = files.client("ann"), files.client("pat")
    with apps("app") as (app,):
        config = SITES.format(app=app.address, deep=app.address, db=app.address)
        with guarding(files.folder, config) as guard:
            port = guard.ports["front"]
            with pat.line(port, "deep.app.test", newest=ssl.TLSVersion.TLSv1_2) as line:
                assert (line.tls.version(), line.ask().status) == ("TLSv1.2", 200)
            with (
                pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
                ann.line(port, "app.test", newest=ssl.TLSVersion.TLSv1_2),
            ):
                pass
            assert guard.next("connection", decision="deny")["reason"] == "tls.version"


ROUTES = """
[[listener]]
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
client_auth = "optional"
to = "{site}"

[[listener.route]]
path = "/admin/**"
client_auth = "required"
allow = ["spiffe://test/alice GET", "spiffe://test/bob"]
to = "{admin}"

[[listener.route]]
path = "/upload/*"
methods = ["PUT", "POST"]
to = "{upload}"

[[listener.route]]
path = "/private"
client_auth = "required"
"""


def test_routes_say_where_to_and_who(tmp_path: Path) -> None:
    """The first route that fits by path and method decides on the app and the rules; what it leaves out is as the
    site has it; and where no certificate is required, anybody may come.
    """
    files = Files(tmp_path)
    alice, bob, carol, nobody = (*map(files.client, ("alice", "bob", "carol")), files.nobody)
    with (
        apps("site", "admin", "upload") as (site, admin, upload),
        guarding(tmp_path, ROUTES.format(site=site.address, admin=admin.address, upload=upload.address)) as guard,
    ):
        port = guard.port
        assert alice.ask(port, "/admin/users").body == b"admin"
        assert alice.ask(port, "/admin/users", method="POST").error == (403, "policy.no_rule")
        assert bob.ask(port, "/admin/users", method="POST").body == b"admin"
        assert carol.ask(port, "/admin/users").error == (403, "policy.no_rule")
        assert nobody.ask(port, "/admin/users").error == (403, "verify.no_certificate")
        assert nobody.ask(port, "/administrator").body == b"site"
        assert nobody.ask(port, "/upload/a", method="PUT").body == b"upload"
        assert nobody.ask(port, "/upload/a/b", method="PUT").body == b"site"
        assert nobody.ask(port, "/upload/a").body == b"site"
        assert nobody.ask(port, "/private").error == (403, "verify.no_certificate")
        assert carol.ask(port, "/private").body == b"site"
        for way_round in ("/x/../admin/users", "/admin%2fusers", "//admin/users", "/admin;x/users", "/%61dmin/users"):
            assert nobody.ask(port, way_round).status in (400, 403), way_round
        with nobody.line(port) as line:  # one refusal does not end the connection
            assert line.ask("/private").status == 403
            assert line.ask("/").body == b"site"
        assert admin.received.count(b"HTTP/1.1") == 2


def test_a_bad_certificate_is_never_nobody(tmp_path: Path) -> None:
    """Where certificates are optional, a bad one is refused on every path; only none at all makes a client nobody."""
    files, other = Files(tmp_path), Ca.root("Other")
    files.client("mallory", other)
    files.client("server-only", eku=[SERVER])
    with (
        apps("app") as (app,),
        guarding(tmp_path, ROUTES.format(site=app.address, admin=app.address, upload=app.address)) as guard,
    ):
        for name, reason in (("mallory", "verify.unknown_issuer"), ("server-only", "verify.purpose")):
            for path in ("/", "/private"):
                assert files.client(name).ask(guard.port, path).error == (403, reason)
        assert app.connections == 0
        assert files.nobody.ask(guard.port).status == 200


SPOOFS = (
    *("Client-Cert: :AAAA:", "client_identity: root", "CLIENT.CERT: x", "X-SSL-Client-Verify: SUCCESS"),
    *("X-Forwarded-Client-Cert: Hash=0", "Handfast-Assertion: a.b.c", "X-Forwarded-For: 10.0.0.1"),
)


@pytest.mark.parametrize("client_auth", ["optional", "off"])
def test_nobody_has_no_identity_and_cannot_take_one(tmp_path: Path, client_auth: str) -> None:
    """A client without a certificate gets no identity header, and none that it sends reaches the app."""
    files = Files(tmp_path)
    config = f"""
        [[listener]]
        listen = "127.0.0.1:0"
        cert = "server.crt"
        key = "server.key"
        client_auth = "{client_auth}"
        {'client_ca = "ca.crt"' if client_auth == "optional" else ""}
        headers = ["client-cert", "client-identity", "xfcc", "x-ssl-client"]
        to = "%s"
    """
    with App(echo_head) as app, guarding(tmp_path, config % app.address) as guard:
        sent = files.nobody.ask(guard.port, "/", *SPOOFS).lines
        allowed = {"host", "connection", "x-forwarded-for", "x-forwarded-proto", "x-ssl-client-verify"}
        assert (set(sent) - allowed, sent["x-ssl-client-verify"]) == (set(), "NONE")
        assert sent["x-forwarded-for"] == "127.0.0.1"
        assert guard.next("request").get("peer") is None
        alice = files.client("alice").ask(guard.port, "/", *SPOOFS).lines
        if client_auth == "optional":
            assert alice["client-identity"] == '"spiffe://test/alice"'
            assert alice["x-ssl-client-verify"] == "SUCCESS"
        else:
            assert set(alice) - allowed == set()


def test_rules_that_bind_nobody_are_refused(tmp_path: Path) -> None:
    """Where routes let anybody in, rules for them would only seem to hold: such a configuration does not start."""
    good = ROUTES.format(site="127.0.0.1:1", admin="127.0.0.1:2", upload="127.0.0.1:3")
    parse_config(good, "handfast.toml", tmp_path)
    for old, new in (
        ('path = "/upload/*"', 'path = "/upload/*"\nallow = ["any"]'),
        ('allow = ["spiffe://test/alice GET"', 'client_auth = "optional"\nallow = ["spiffe://test/alice GET"'),
    ):
        bad = good.replace('client_auth = "required"\nallow', "allow") if "optional" in new else good
        with pytest.raises(InvalidInput, match="binds nobody"):
            parse_config(bad.replace(old, new), "handfast.toml", tmp_path)
