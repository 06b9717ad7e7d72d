"""The plan of the house, held by a test: who may import whom, and that the pure rooms are pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "handfast"

# Room -> what it may import. `files` is the shells' way to the disk.
ALLOWED = {
    "errors": set(),
    "pki": {"errors"},
    "policy": {"errors", "pki"},
    "wire": {"errors", "pki"},
    "files": {"errors", "pki"},
    "tls": {"errors", "pki", "policy", "wire", "files"},
    "authority": {"errors", "pki", "policy", "wire", "files", "tls"},
    "guard": {"errors", "pki", "policy", "wire", "files", "tls"},
    "connector": {"errors", "pki", "policy", "wire", "files", "tls", "guard", "explain"},
    "testing": {"errors", "pki", "policy", "wire", "files", "tls"},
    "audit": {"errors", "pki", "policy", "wire", "files", "tls", "testing"},
    "explain": {"errors", "pki", "policy", "wire", "files", "tls"},
    "cli": {
        "errors",
        "pki",
        "policy",
        "wire",
        "files",
        "tls",
        "authority",
        "guard",
        "connector",
        "testing",
        "audit",
        "explain",
    },
}
PURE = ("pki", "policy", "wire", "errors")
# Modules that reach the world, and names that read a clock, the environment or a random source.
IMPURE_MODULES = {
    *("asyncio", "glob", "io", "os", "pathlib", "random", "secrets", "shutil", "signal", "socket", "sqlite3", "ssl"),
    *(
        "subprocess",
        "sys",
        "tempfile",
        "threading",
        "time",
        "urllib.request",
        "OpenSSL",
        "uvloop",
        "sqlalchemy",
        "click",
    ),
}
IMPURE_CALLS = {"now", "utcnow", "today", "open", "urandom", "generate_private_key", "generate", "random_serial_number"}


def _modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if "migrations" not in path.parts)


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def findings(source: str, room: str) -> list[str]:
    """What a module of `room` does that its room may not."""
    tree = ast.parse(source)
    imports = _imports(tree)
    rooms = {name.split(".")[1] for name in imports if name.startswith("handfast.")}
    found = [f"imports {other}" for other in sorted(rooms & set(ALLOWED) - ALLOWED[room] - {room})]
    if room in PURE:
        found += [f"imports {name}" for name in sorted(imports & IMPURE_MODULES)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in IMPURE_CALLS:
                    found.append(f"calls {name}")
    if room != "tls" and any(name.split(".")[0] in ("OpenSSL", "ssl") for name in imports):
        found.append("touches OpenSSL")
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_keeps_to_its_room(path: Path) -> None:
    """Imports point down the plan, and the pure rooms reach nothing outside."""
    room = _room(path)
    if room in ("__init__", "__main__"):
        return
    assert findings(path.read_text(), room) == []


@pytest.mark.parametrize(
    ("room", "source", "finding"),
    [
        ("pki", "from datetime import datetime\nx = datetime.now()", "calls now"),
        ("pki", "import os", "imports os"),
        ("pki", "from handfast.tls.server import Channel", "imports tls"),
        ("policy", "open('x')", "calls open"),
        ("guard", "from handfast.authority import Authority", "imports authority"),
        ("authority", "from handfast.guard.http import HttpSession", "imports guard"),
        ("tls", "from handfast.cli import main", "imports cli"),
        ("guard", "from OpenSSL import SSL", "touches OpenSSL"),
    ],
)
def test_the_check_finds_what_it_looks_for(room: str, source: str, finding: str) -> None:
    """A module that breaks the plan is found, each way of breaking it."""
    assert finding in findings(source, room)


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path) -> None:
    """Every module begins with a docstring."""
    assert ast.get_docstring(ast.parse(path.read_text()))
