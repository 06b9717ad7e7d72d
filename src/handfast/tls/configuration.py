"""How OpenSSL is configured for a process of ours, before it starts.

OpenSSL reads its configuration once, when it is first used, from the file that OPENSSL_CONF names. That is the only
way to ask for no session tickets: pyOpenSSL has no call for it. Imports nothing that starts OpenSSL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VARIABLE = "OPENSSL_CONF"


@contextmanager
def configured() -> Iterator[None]:
    """Have OpenSSL, if it starts within, read our configuration; one that the user chose is left alone.

    The variable is gone afterwards, so that programs we start do not read it.
    """
    if _VARIABLE in os.environ:
        yield
        return
    os.environ[_VARIABLE] = str(Path(__file__).with_name("openssl.cnf"))
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
