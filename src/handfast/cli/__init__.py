"""The command: it parses, calls and renders, and decides nothing."""

from handfast.cli.main import main

__all__ = ["main"]
