"""One file for each revision of the ledger's schema."""
