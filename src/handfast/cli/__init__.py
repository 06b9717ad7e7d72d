"""The command: it parses, calls and renders, and decides nothing."""

from handfast.tls.configuration import configured

with configured():  # OpenSSL starts with the first import of `cryptography`
    from handfast.cli.main import main

__all__ = ["main"]
