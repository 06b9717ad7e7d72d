"""The authority: issues, remembers and revokes. It is the only place where certificates come from.

Importing it loads the database library (0.2 s), so commands that need no authority must not import it.
"""

from handfast.authority.founding import Existing, Plan, create_authority, import_authority, open_authority
from handfast.authority.issuance import Authority, Authorization, Issued, Step
from handfast.authority.records import Intent, Record, Revocation, RevocationReason
from handfast.authority.state import (
    AskedPassphrase,
    GeneratedPassphrase,
    Passphrase,
    PassphraseFile,
    PassphraseVariable,
    default_folder,
    lock,
    usual_passphrase,
)

__all__ = [
    "AskedPassphrase",
    "Authority",
    "Authorization",
    "Existing",
    "GeneratedPassphrase",
    "Intent",
    "Issued",
    "Passphrase",
    "PassphraseFile",
    "PassphraseVariable",
    "Plan",
    "Record",
    "Revocation",
    "RevocationReason",
    "Step",
    "create_authority",
    "default_folder",
    "import_authority",
    "lock",
    "open_authority",
    "usual_passphrase",
]
