"""Name constraints: which names an authority may vouch for (RFC 5280 4.2.1.10).

Used to issue, where a name in doubt is refused. It is not the verifier: that is a judge's work.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from cryptography import x509

from handfast.errors import InvalidInput
from handfast.pki.names import Kind, Name, parse_dns


def subtree(name: Name) -> x509.GeneralName:
    """Return the subtree that holds `name`, for a list of permitted ones.

    A DNS name stands for itself and all below it, a SPIFFE ID for its whole trust domain, an IP or email
    address for itself alone. ValueError for other kinds, which cannot be constrained so.
    """
    match name.kind:
        case Kind.DNS:
            return x509.DNSName(name.value.removeprefix("*."))
        case Kind.SPIFFE:
            return x509.UniformResourceIdentifier(name.trust_domain)
        case Kind.IP:
            return x509.IPAddress(ipaddress.ip_network(name.value))
        case Kind.EMAIL:
            return x509.RFC822Name(name.value)
        case _:
            raise ValueError(f"{name} cannot be a name constraint")


def forbidden_by(authority: x509.Certificate, names: Sequence[Name], subject: x509.Name) -> Iterator[str]:
    """Yield each of `names`, and the subject, that the authority's name constraints forbid, as text.

    ValueError, and the errors of reading extensions, where the authority's cannot be read.
    """
    try:
        constraints = authority.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return
    permitted, excluded = constraints.permitted_subtrees or (), constraints.excluded_subtrees or ()
    for name in (*names, *_hosts_in(subject, names)):
        bases = [base for base in permitted if isinstance(base, _form(name))]
        if (bases and not any(_within(name, base) for base in bases)) or any(
            isinstance(base, _form(name)) and (_within(name, base) or _touches(name, base)) for base in excluded
        ):
            yield str(name)
    if subject:  # RFC 5280: an empty subject is in no directory
        directories = [base.value for base in permitted if isinstance(base, x509.DirectoryName)]
        outside = bool(directories) and not any(_below(subject, base) for base in directories)
        barred = any(isinstance(base, x509.DirectoryName) and _below(subject, base.value) for base in excluded)
        if outside or barred:
            yield subject.rfc4514_string()


def _form(name: Name) -> type[x509.GeneralName]:
    match name.kind:
        case Kind.DNS:
            return x509.DNSName
        case Kind.IP:
            return x509.IPAddress
        case Kind.EMAIL:
            return x509.RFC822Name
        case _:
            return x509.UniformResourceIdentifier


def _within(name: Name, base: x509.GeneralName) -> bool:
    match base:
        case x509.DNSName():
            return _is_below(name.value.removeprefix("*."), base.value) or _is_below(name.value, base.value)
        case x509.IPAddress():
            network = base.value
            if not isinstance(network, (ipaddress.IPv4Network, ipaddress.IPv6Network)):
                raise ValueError("an IP constraint without a mask")
            return ipaddress.ip_address(name.value) in network
        case x509.RFC822Name():
            return _mailbox_within(name.value, base.value)
        case x509.UniformResourceIdentifier():
            return _host_within(_uri_host(name), base.value)
        case _:
            return False


def _touches(name: Name, excluded: x509.GeneralName) -> bool:
    """Whether what is excluded forbids a name that is not within it: a wildcard over it, a URI without a host."""
    match excluded:
        case x509.DNSName():
            host = excluded.value.lower().lstrip(".")
            return name.value.startswith("*.") and host.partition(".")[2] == name.value[2:]
        case x509.UniformResourceIdentifier():
            return not _uri_host(name)  # RFC 5280: such a URI is refused where URIs are constrained
        case _:
            return False


def _is_below(host: str, base: str) -> bool:
    """DNS: `base` itself and all below; `.base`, as OpenSSL has it, all below; an empty base is everything."""
    base = base.lower()
    return not base or host == base or host.endswith(base if base.startswith(".") else f".{base}")


def _host_within(host: str, base: str) -> bool:
    """URI and email hosts: `base` is that host alone; `.base` all below it."""
    base = base.lower()
    return bool(host) and (host.endswith(base) and host != base if base.startswith(".") else host == base)


def _mailbox_within(mailbox: str, base: str) -> bool:
    local, _, host = mailbox.rpartition("@")
    base_local, at, base_host = base.rpartition("@")
    if at:
        return local == base_local and host == base_host.lower()
    return _host_within(host, base)


def _uri_host(name: Name) -> str:
    """The host of a URI in lower case; empty where it has none, or an IP address (RFC 5280 4.2.1.10)."""
    if name.kind is Kind.SPIFFE:
        return name.trust_domain
    try:
        host = urlsplit(name.value).hostname or ""
    except ValueError:
        return ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host
    return ""


def _hosts_in(subject: x509.Name, names: Sequence[Name]) -> list[Name]:
    """Common names that OpenSSL holds against DNS constraints, where there is no DNS name: dotted hosts."""
    if any(name.kind is Kind.DNS for name in names):
        return []
    hosts = []
    for part in subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME):
        try:
            host = parse_dns(str(part.value))
        except InvalidInput:
            continue
        if "." in host.value:
            hosts.append(host)
    return hosts


def _below(subject: x509.Name, base: x509.Name) -> bool:
    return subject.rdns[: len(base.rdns)] == base.rdns
